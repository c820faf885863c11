//! `load-aware-scorer`: prefers endpoints with a short queue, by an absolute measure.
//!
//! ```text
//! score = 0.5 × (1 - min(q, threshold) / threshold)      q: waiting requests
//! ```
//!
//! So 0.5 without a queue and 0 from `threshold` on. Parameter `threshold` (requests, default 128;
//! not positive = default). An endpoint without metrics counts as the longest known queue
//! ([`UnknownMetrics`](crate::epp::datalayer::UnknownMetrics)).

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::scheduling::{Cycle, Plugin, Scorer},
    support::fields::Fields,
};

/// Requests in a queue from which on it cannot be worse.
const DEFAULT_THRESHOLD: u64 = 128;

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "load-aware-scorer",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let threshold = params.signed("threshold", i64::MIN..=i64::MAX).unwrap_or_default();
    let threshold = match u64::try_from(threshold) {
        Ok(threshold) if threshold > 0 => threshold,
        _ => DEFAULT_THRESHOLD,
    };
    Some(Arc::new(LoadAwareScorer { threshold }))
}

/// Prefers endpoints with a short queue, by an absolute measure.
#[derive(Clone, Copy, Debug)]
pub struct LoadAwareScorer {
    /// Positive.
    threshold: u64,
}

impl Plugin for LoadAwareScorer {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }
}

impl Scorer for LoadAwareScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let queues = cycle.load(among, |metrics| metrics.waiting);
        for (score, queue) in scores.iter_mut().zip(queues) {
            *score = 0.5 * (1.0 - queue.min(self.threshold) as f64 / self.threshold as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        datalayer::{Metrics, UnknownMetrics},
        scheduling::testing::{Rig, assert_close, build, waiting},
    };
    use serde_json::{Value, json};

    /// `None` was never scraped.
    #[track_caller]
    fn check(params: Value, queues: &[Option<u64>], want: &[f64]) {
        let metrics = queues.iter().map(|queue| queue.map_or_else(Metrics::default, waiting));
        let plugin = build(REGISTRATION, params).unwrap();
        assert_close(&Rig::new(metrics).scores(&*plugin), want);
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn queues_count_up_to_the_threshold() {
        let ten = || json!({"threshold": 10});
        check(ten(), &[Some(2), Some(0), Some(15)], &[0.4, 0.5, 0.0]);
        check(ten(), &[Some(10), Some(5)],          &[0.0, 0.25]);
        check(ten(), &[Some(5), None, Some(2)],     &[0.25, 0.25, 0.4]);
        check(ten(), &[None],                       &[0.5]);
        for params in [json!({}), json!({"threshold": 0}), json!({"threshold": -3})] {
            check(params, &[Some(64), Some(128), Some(129)], &[0.25, 0.0, 0.0]);
        }
    }

    #[test]
    fn an_idle_reading_of_unknown_is_gos() {
        let plugin = build(REGISTRATION, json!({"threshold": 10})).unwrap();
        let mut rig = Rig::new([waiting(5), Metrics::default()]);
        rig.unknown_metrics = UnknownMetrics::AsIdle;
        assert_close(&rig.scores(&*plugin), &[0.25, 0.5]);
    }

    #[test]
    fn wrong_parameters_are_refused() {
        let faults = build(REGISTRATION, json!({"threshold": "x", "treshold": 1})).unwrap_err();
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults.iter().any(|fault| fault.contains("did you mean `threshold`")));
    }
}
