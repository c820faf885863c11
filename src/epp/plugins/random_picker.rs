//! `random-picker`: picks any endpoints, whatever their scores.
//!
//! ```text
//! shuffle; take maxNumOfEndpoints
//! ```
//!
//! Parameter `maxNumOfEndpoints` (default 1; not positive = 1).

use std::sync::Arc;

use super::{Building, Registration, Stability, max_score_picker::max_endpoints};
use crate::{
    epp::scheduling::{Cycle, Picker, Plugin, Scored},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "random-picker",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(RandomPicker { max: max_endpoints(params) }))
}

/// Picks any endpoints, whatever their scores.
#[derive(Clone, Copy, Debug)]
pub struct RandomPicker {
    max: usize,
}

impl Plugin for RandomPicker {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn picker(&self) -> Option<&dyn Picker> {
        Some(self)
    }
}

impl Picker for RandomPicker {
    fn pick(&self, _: &Cycle<'_>, scored: &mut [Scored]) -> Vec<usize> {
        any(scored, self.max, &mut fastrand::Rng::new())
    }
}

/// `max` of them in random order: as much of a shuffle as is looked at.
pub(super) fn any(scored: &mut [Scored], max: usize, random: &mut fastrand::Rng) -> Vec<usize> {
    let count = max.min(scored.len());
    for at in 0..count {
        let other = random.usize(at..scored.len());
        scored.swap(at, other);
    }
    scored.iter().take(count).map(|scored| scored.endpoint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::testing::{Rig, build, scraped};
    use serde_json::json;

    fn scored(count: usize) -> Vec<Scored> {
        (0..count).map(|endpoint| Scored { endpoint, score: endpoint as f64 }).collect()
    }

    #[test]
    fn as_many_as_asked_for_and_each_once() {
        for (max, count, want) in [(1, 3, 1), (2, 3, 2), (9, 3, 3), (0, 3, 1), (-4, 3, 1)] {
            let picker = build(REGISTRATION, json!({"maxNumOfEndpoints": max})).unwrap();
            let rig = Rig::new(vec![scraped(); count]);
            let picks = picker.picker().unwrap().pick(&rig.cycle(), &mut scored(count));
            let mut unique = picks.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!((picks.len(), unique.len()), (want, want), "{max} of {count}: {picks:?}");
        }
    }

    #[test]
    fn every_order_is_equally_likely() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut counts = std::collections::BTreeMap::<Vec<usize>, u32>::new();
        for _ in 0..6000 {
            *counts.entry(any(&mut scored(3), 2, &mut random)).or_default() += 1;
        }
        assert_eq!(counts.len(), 6, "{counts:?}");
        // 1000 expected, standard deviation 29.
        assert!(counts.values().all(|count| count.abs_diff(1000) < 150), "{counts:?}");
    }
}
