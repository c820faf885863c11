//! `overload-filter`: drops endpoints whose queue is long beside those of the others.
//!
//! ```text
//! keeps  waiting ≤ max(minWaiting, medianFactor · median of the candidates' waiting)
//!        everyone if nobody is such
//! ```
//!
//! The median of an even number is the mean of the middle two. Endpoints that were never scraped are
//! read as the configuration says of unknown metrics.
//!
//! Parameters: `minWaiting` (requests, default 8): shorter queues are no overload; `medianFactor`
//! (default 2, at least 1). A type of this program; the Go EPP has none such.

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::scheduling::{Cycle, Filter, Plugin},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "overload-filter",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let least = params.integer("minWaiting", 0..=u64::from(u32::MAX));
    let factor = params.number("medianFactor", 1.0).unwrap_or(2.0);
    Some(Arc::new(OverloadFilter {
        least: least.map_or(8.0, |least: u32| f64::from(least)),
        factor,
    }))
}

/// Drops endpoints whose queue is long beside those of the others.
#[derive(Clone, Copy, Debug)]
pub struct OverloadFilter {
    least: f64,
    factor: f64,
}

impl Plugin for OverloadFilter {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl Filter for OverloadFilter {
    fn filter(&self, cycle: &Cycle<'_>, keep: &mut Vec<usize>) {
        let waiting = cycle.load(keep, |metrics| metrics.waiting);
        let mut sorted = waiting.clone();
        sorted.sort_unstable();
        let Some(&high) = sorted.get(sorted.len() / 2) else { return };
        let low = sorted[(sorted.len() - 1) / 2];
        let limit = self.least.max(self.factor * (low as f64 + high as f64) / 2.0);
        let passes = |waiting: u64| waiting as f64 <= limit;
        if waiting.iter().any(|&waiting| passes(waiting)) {
            let mut each = waiting.iter();
            keep.retain(|_| each.next().is_none_or(|&waiting| passes(waiting)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        datalayer::Metrics,
        scheduling::testing::{Rig, build, waiting},
    };
    use serde_json::{Value, json};

    #[track_caller]
    fn check(params: Value, queues: &[u64], want: &[usize]) {
        let plugin = build(REGISTRATION, params).unwrap();
        let rig = Rig::new(queues.iter().map(|&queue| waiting(queue)));
        assert_eq!(rig.passing(&*plugin), want, "{queues:?}");
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn long_queues_are_dropped() {
        check(json!({}), &[], &[]);
        check(json!({}), &[0, 8, 0], &[0, 1, 2]);
        check(json!({}), &[0, 9, 0], &[0, 2]);
        check(json!({}), &[10, 20, 21], &[0, 1, 2]); // twice the median is 40
        check(json!({}), &[5, 10, 20, 21], &[0, 1, 2, 3]); // median 15
        check(json!({}), &[5, 10, 12, 23], &[0, 1, 2]); // median 11
        check(json!({}), &[1000], &[0]);
        check(json!({"minWaiting": 0}), &[0, 0, 1], &[0, 1]);
        check(json!({"medianFactor": 1}), &[10, 10, 11], &[0, 1]);
    }

    #[test]
    fn someone_is_always_kept() {
        // The median is never below the shortest queue, so at least that one passes.
        check(json!({"minWaiting": 0, "medianFactor": 1}), &[70, 80, 90], &[0, 1]);
        check(json!({"minWaiting": 0, "medianFactor": 1}), &[70], &[0]);
    }

    #[test]
    fn unknown_endpoints_count_as_the_busiest() {
        let plugin = build(REGISTRATION, json!({})).unwrap();
        let rig = Rig::new([waiting(0), waiting(30), Metrics::default(), waiting(0), waiting(0)]);
        let want: &[usize] = match rig.unknown_metrics {
            crate::epp::datalayer::UnknownMetrics::AsIdle => &[0, 2, 3, 4],
            _ => &[0, 3, 4],
        };
        assert_eq!(rig.passing(&*plugin), want);
    }

    #[test]
    fn wrong_parameters_are_refused() {
        let faults = build(REGISTRATION, json!({"medianFactor": 0.5, "min": 1})).unwrap_err();
        assert!(faults[0].starts_with("medianFactor: 0.5 is out of range"), "{faults:?}");
    }
}
