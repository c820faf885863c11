//! `kv-cache-utilization-scorer` (also `kv-cache-scorer`): prefers endpoints whose KV cache has room.
//!
//! ```text
//! score = 1 - used fraction of the KV cache
//! ```
//!
//! Absolute: not normalized over the candidates. No parameters. An endpoint without metrics counts as
//! the fullest known one ([`UnknownMetrics`](crate::epp::datalayer::UnknownMetrics)); a fraction that
//! is no number counts as full.

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::scheduling::{Cycle, Plugin, Scorer},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "kv-cache-utilization-scorer",
    aliases: &["kv-cache-scorer"],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(KvCacheUtilizationScorer))
}

/// Prefers endpoints whose KV cache has room.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvCacheUtilizationScorer;

impl Plugin for KvCacheUtilizationScorer {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }
}

impl Scorer for KvCacheUtilizationScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let usage = cycle
            .load(among, |metrics| if metrics.kv_usage.is_nan() { 1.0 } else { metrics.kv_usage });
        for (score, usage) in scores.iter_mut().zip(usage) {
            *score = 1.0 - usage;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        datalayer::{Metrics, UnknownMetrics},
        scheduling::testing::{Rig, assert_close, build, scraped},
    };
    use serde_json::json;

    /// `None` was never scraped.
    #[track_caller]
    fn check(unknown_metrics: UnknownMetrics, usage: &[Option<f64>], want: &[f64]) {
        let metrics = usage.iter().map(|usage| match *usage {
            Some(kv_usage) => Metrics { kv_usage, ..scraped() },
            None => Metrics::default(),
        });
        let rig = Rig { unknown_metrics, ..Rig::new(metrics) };
        assert_close(&rig.scores(&KvCacheUtilizationScorer), want);
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn free_space_is_the_score() {
        use UnknownMetrics::{AsIdle, AsWorst};
        check(AsWorst, &[Some(0.8), Some(0.5), Some(0.0)], &[0.2, 0.5, 1.0]);
        check(AsWorst, &[Some(0.6), Some(0.6)],            &[0.4, 0.4]);
        check(AsWorst, &[Some(0.0), Some(0.0)],            &[1.0, 1.0]);
        check(AsWorst, &[Some(1.0), Some(0.5)],            &[0.0, 0.5]);
        check(AsWorst, &[Some(f64::NAN), Some(0.5)],       &[0.0, 0.5]);
        // Never scraped.
        check(AsWorst, &[Some(0.3), None, Some(0.7)],      &[0.7, 0.3, 0.3]);
        check(AsWorst, &[None, None],                      &[1.0, 1.0]); // all equal
        check(AsIdle,  &[Some(0.3), None, Some(0.7)],      &[0.7, 1.0, 0.3]);
        check(AsWorst, &[],                                &[]);
    }

    #[test]
    fn there_are_no_parameters() {
        assert!(build(REGISTRATION, json!({})).is_ok());
        assert_eq!(build(REGISTRATION, json!({"x": 1})).unwrap_err(), ["x: unknown field"]);
    }
}
