//! `weighted-random-picker`: picks endpoints with probabilities in proportion to their scores.
//!
//! ```text
//! key = U^(1/score)      U uniform in (0, 1); A-Res sampling (Efraimidis and Spirakis, 2006)
//!     = 0                if score ≤ 0
//! take the maxNumOfEndpoints largest keys; if no score is positive, pick at random
//! ```
//!
//! Compared as `ln U / score`, which orders alike and does not underflow for small scores. Parameter
//! `maxNumOfEndpoints` (default 1; not positive = 1).

use std::sync::Arc;

use super::{Building, Registration, Stability, max_score_picker::max_endpoints, random_picker};
use crate::{
    epp::scheduling::{Cycle, Picker, Plugin, Scored},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "weighted-random-picker",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(WeightedRandomPicker { max: max_endpoints(params) }))
}

/// Picks endpoints with probabilities in proportion to their scores.
#[derive(Clone, Copy, Debug)]
pub struct WeightedRandomPicker {
    max: usize,
}

impl Plugin for WeightedRandomPicker {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn picker(&self) -> Option<&dyn Picker> {
        Some(self)
    }
}

impl Picker for WeightedRandomPicker {
    fn pick(&self, _: &Cycle<'_>, scored: &mut [Scored]) -> Vec<usize> {
        sample(scored, self.max, &mut fastrand::Rng::new())
    }
}

/// A weighted sample without replacement, the first pick first.
fn sample(scored: &mut [Scored], max: usize, random: &mut fastrand::Rng) -> Vec<usize> {
    if !scored.iter().any(|scored| scored.score > 0.0) {
        return random_picker::any(scored, max, random);
    }
    if max > 1 {
        // Those without a chance share one key; a list that is longer than the others takes any.
        random.shuffle(scored);
    }
    let keyed = scored.iter().map(|scored| {
        // 1 - [0, 1) lies in (0, 1]: its logarithm is finite.
        let uniform = 1.0 - random.f64();
        let key = if scored.score > 0.0 { uniform.ln() / scored.score } else { f64::NEG_INFINITY };
        (key, scored.endpoint)
    });
    if max == 1 {
        let best = keyed.max_by(|(a, _), (b, _)| a.total_cmp(b));
        return best.into_iter().map(|(_, endpoint)| endpoint).collect();
    }
    let mut keyed: Vec<(f64, usize)> = keyed.collect();
    keyed.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    keyed.into_iter().take(max).map(|(_, endpoint)| endpoint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::testing::{Rig, build, scraped};
    use serde_json::json;

    const ROUNDS: u32 = 10_000;

    fn scored(scores: &[f64]) -> Vec<Scored> {
        scores.iter().enumerate().map(|(endpoint, &score)| Scored { endpoint, score }).collect()
    }

    /// First picks are distributed like `want`, give or take 3 percent points (six standard
    /// deviations), for lists of any length.
    #[track_caller]
    fn check(scores: &[f64], want: &[f64]) {
        for max in [1, 2] {
            let mut random = fastrand::Rng::with_seed(7);
            let mut counts = vec![0_u32; scores.len()];
            for _ in 0..ROUNDS {
                counts[sample(&mut scored(scores), max, &mut random)[0]] += 1;
            }
            for (count, want) in counts.iter().zip(want) {
                let got = f64::from(*count) / f64::from(ROUNDS);
                assert!((got - want).abs() < 0.03, "{scores:?}: {counts:?}");
                assert!(*want > 0.0 || *count == 0, "{scores:?}: {counts:?}");
            }
        }
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn picks_are_in_proportion_to_scores() {
        check(&[10.0, 90.0],             &[0.1, 0.9]);
        check(&[100.0, 100.0, 100.0],    &[1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]);
        check(&[30.0, 0.0, 70.0],        &[0.3, 0.0, 0.7]);
        check(&[0.01, 0.03],             &[0.25, 0.75]);
        check(&[1e-9, 3e-9],             &[0.25, 0.75]); // U^(1/score) would be 0
        check(&[0.0, 0.0],               &[0.5, 0.5]);
        check(&[-1.0, 2.0],              &[0.0, 1.0]);
        check(&[1.0],                    &[1.0]);
    }

    #[test]
    fn lists_are_as_long_as_asked_for() {
        for (max, want) in [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3)] {
            let picker = build(REGISTRATION, json!({"maxNumOfEndpoints": max})).unwrap();
            let rig = Rig::new(vec![scraped(); 3]);
            let mut scored = scored(&[0.0, 1.0, 2.0]);
            let mut picks = picker.picker().unwrap().pick(&rig.cycle(), &mut scored);
            assert_eq!(picks.len(), want, "{max}");
            assert!(max > 2 || !picks.contains(&0), "{picks:?}");
            picks.sort_unstable();
            picks.dedup();
            assert_eq!(picks.len(), want, "{max}");
        }
    }
}
