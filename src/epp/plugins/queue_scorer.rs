//! `queue-scorer`: prefers endpoints where fewer requests wait.
//!
//! ```text
//! score = (max - q) / (max - min)      q: waiting requests, max and min over the candidates
//!       = 1 for all                    if max = min
//! ```
//!
//! No parameters. An endpoint without metrics counts as the longest known queue
//! ([`UnknownMetrics`](crate::epp::datalayer::UnknownMetrics)).

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::scheduling::{Cycle, Plugin, Scorer},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "queue-scorer",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(QueueScorer))
}

/// Prefers endpoints where fewer requests wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueueScorer;

impl Plugin for QueueScorer {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }
}

impl Scorer for QueueScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        fewest_best(&cycle.load(among, |metrics| metrics.waiting), scores);
    }
}

/// Writes `(max - n) / (max - min)` for each count, 1 where all are equal.
pub(super) fn fewest_best(counts: &[u64], scores: &mut [f64]) {
    let max = counts.iter().copied().max().unwrap_or_default();
    let min = counts.iter().copied().min().unwrap_or_default();
    for (score, count) in scores.iter_mut().zip(counts) {
        *score = if max == min { 1.0 } else { (max - count) as f64 / (max - min) as f64 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        datalayer::{Metrics, UnknownMetrics},
        scheduling::testing::{Rig, assert_close, build, waiting},
    };
    use serde_json::json;

    /// `None` was never scraped.
    #[track_caller]
    fn check(unknown_metrics: UnknownMetrics, queues: &[Option<u64>], want: &[f64]) {
        let metrics = queues.iter().map(|queue| queue.map_or_else(Metrics::default, waiting));
        let rig = Rig { unknown_metrics, ..Rig::new(metrics) };
        assert_close(&rig.scores(&QueueScorer), want);
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn the_shortest_queue_is_best() {
        use UnknownMetrics::{AsIdle, AsWorst};
        check(AsWorst, &[Some(10), Some(5), Some(0)], &[0.0, 0.5, 1.0]);
        check(AsWorst, &[Some(5), Some(5)],           &[1.0, 1.0]);
        check(AsWorst, &[Some(0), Some(0)],           &[1.0, 1.0]);
        check(AsWorst, &[Some(3), Some(0), Some(10)], &[0.7, 1.0, 0.0]);
        check(AsWorst, &[Some(7)],                    &[1.0]);
        check(AsWorst, &[Some(u64::MAX), Some(0)],    &[0.0, 1.0]);
        // Never scraped.
        check(AsWorst, &[Some(4), None, Some(0)],     &[0.0, 0.0, 1.0]);
        check(AsWorst, &[Some(4), None],              &[1.0, 1.0]);
        check(AsWorst, &[None, None],                 &[1.0, 1.0]);
        check(AsIdle,  &[Some(4), None],              &[0.0, 1.0]);
        check(AsWorst, &[],                           &[]);
    }

    #[test]
    fn there_are_no_parameters() {
        assert!(build(REGISTRATION, json!({})).is_ok());
        assert_eq!(build(REGISTRATION, json!({"x": 1})).unwrap_err(), ["x: unknown field"]);
    }
}
