//! `running-requests-size-scorer`: prefers endpoints where fewer requests run.
//!
//! ```text
//! score = (max - r) / (max - min)      r: running requests, max and min over the candidates
//!       = 1 for all                    if max = min
//! ```
//!
//! No parameters. An endpoint without metrics counts as the busiest known one
//! ([`UnknownMetrics`](crate::epp::datalayer::UnknownMetrics)).

use std::sync::Arc;

use super::{Building, Registration, Stability, queue_scorer::fewest_best};
use crate::{
    epp::scheduling::{Cycle, Plugin, Scorer},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "running-requests-size-scorer",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(RunningRequestsSizeScorer))
}

/// Prefers endpoints where fewer requests run.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunningRequestsSizeScorer;

impl Plugin for RunningRequestsSizeScorer {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }
}

impl Scorer for RunningRequestsSizeScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        fewest_best(&cycle.load(among, |metrics| metrics.running), scores);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        datalayer::Metrics,
        scheduling::testing::{Rig, assert_close, scraped},
    };

    /// `None` was never scraped.
    #[track_caller]
    fn check(running: &[Option<u64>], want: &[f64]) {
        let metrics = running.iter().map(|running| match *running {
            // A queue must not matter.
            Some(running) => Metrics { running, waiting: 100 - running, ..scraped() },
            None => Metrics::default(),
        });
        assert_close(&Rig::new(metrics).scores(&RunningRequestsSizeScorer), want);
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn the_fewest_running_requests_are_best() {
        check(&[Some(10), Some(5), Some(0)], &[0.0, 0.5, 1.0]);
        check(&[Some(5), Some(5)],           &[1.0, 1.0]);
        check(&[Some(0), Some(0)],           &[1.0, 1.0]);
        check(&[Some(8), None, Some(4)],     &[0.0, 0.0, 1.0]);
        check(&[],                           &[]);
    }
}
