//! How much the length of a match counts beside its share of the prompt.
//!
//! ```text
//! w · min(1, tokens / S)² + (1 − w) · share
//! ```
//!
//! with `w` = `matchLengthWeight` (0) and `S` = `matchLengthScaleTokens` (8192).

use crate::support::fields::Fields;

const WEIGHT: &str = "matchLengthWeight";
const SCALE: &str = "matchLengthScaleTokens";
const DEFAULT_SCALE: f64 = 8192.0;

/// Weight and scale of a match's length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::epp::plugins) struct MatchLength {
    weight: f64,
    scale_tokens: f64,
}

impl MatchLength {
    /// Reads both parameters.
    pub(in crate::epp::plugins) fn read(params: &Fields<'_>) -> Self {
        let weight = fraction(params, WEIGHT).unwrap_or(0.0);
        let scale = params.signed(SCALE, i64::from(i32::MIN)..=1 << 40);
        let scale_tokens = scale.map_or(DEFAULT_SCALE, |scale| scale as f64);
        if weight > 0.0 && scale_tokens <= 0.0 {
            params.fault(SCALE, "must be greater than 0 when matchLengthWeight is");
        }
        if weight == 0.0 && scale.is_some() {
            params.warn(SCALE, "has no effect while matchLengthWeight is 0");
        }
        Self { weight, scale_tokens }
    }

    /// The score of a match of so many tokens, which are `share` of the prompt.
    pub(in crate::epp::plugins) fn score(self, tokens: f64, share: f64) -> f64 {
        // Weight 0 goes with any scale, 0 included.
        if self.weight == 0.0 {
            return share;
        }
        let length = (tokens / self.scale_tokens).min(1.0);
        self.weight * length * length + (1.0 - self.weight) * share
    }
}

/// A number between 0 and 1.
pub(in crate::epp::plugins) fn fraction(params: &Fields<'_>, name: &'static str) -> Option<f64> {
    params.take(name, |value| match value.as_f64() {
        Some(number) if (0.0..=1.0).contains(&number) => Ok(number),
        _ => Err(format!("must be a number between 0 and 1, got {value}")),
    })
}
