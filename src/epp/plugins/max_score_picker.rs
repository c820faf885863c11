//! `max-score-picker`: picks the endpoints with the highest sums of scores.
//!
//! ```text
//! shuffle; sort by score, descending, stable; take maxNumOfEndpoints
//! ```
//!
//! So equal scores are picked with equal probability; scores are compared exactly. Parameter
//! `maxNumOfEndpoints` (default 1; not positive = 1): more than one gives a list, best first, for
//! gateways that retry. `seed` (integer, default none): the nth pick of equal scores is the same one in
//! every run; without it runs differ.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::{Building, Registration, Stability};
use crate::{
    epp::scheduling::{Cycle, Picker, Plugin, Scored},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "max-score-picker",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let seed = params.integer("seed", 0..=u64::MAX).map(AtomicU64::new);
    Some(Arc::new(MaxScorePicker { max: max_endpoints(params), seed }))
}

/// `maxNumOfEndpoints` of all pickers: at least 1.
pub(super) fn max_endpoints(params: &Fields<'_>) -> usize {
    let max = params.signed("maxNumOfEndpoints", i64::MIN..=i64::MAX).unwrap_or(1).max(1);
    usize::try_from(max).unwrap_or(usize::MAX)
}

/// Picks the endpoints with the highest sums of scores.
#[derive(Debug)]
pub struct MaxScorePicker {
    max: usize,
    /// Seed of the next pick, if picks can be repeated.
    seed: Option<AtomicU64>,
}

impl Default for MaxScorePicker {
    /// One endpoint.
    fn default() -> Self {
        Self { max: 1, seed: None }
    }
}

impl Plugin for MaxScorePicker {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn picker(&self) -> Option<&dyn Picker> {
        Some(self)
    }
}

impl Picker for MaxScorePicker {
    fn pick(&self, _: &Cycle<'_>, scored: &mut [Scored]) -> Vec<usize> {
        /// Seeds that follow each other differ in about half of their bits.
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut random = match &self.seed {
            Some(seed) => fastrand::Rng::with_seed(seed.fetch_add(STEP, Ordering::Relaxed)),
            None => fastrand::Rng::new(),
        };
        best(scored, self.max, &mut random)
    }
}

/// The `max` best, equals in random order.
fn best(scored: &mut [Scored], max: usize, random: &mut fastrand::Rng) -> Vec<usize> {
    if max > 1 {
        random.shuffle(scored);
        scored.sort_by(|a, b| b.score.total_cmp(&a.score));
        return scored.iter().take(max).map(|scored| scored.endpoint).collect();
    }
    // The same distribution in one pass: the nth of n equals replaces the choice with chance 1/n.
    let mut choice: Option<Scored> = None;
    let mut equals = 0;
    for &scored in scored.iter() {
        match choice {
            Some(best) if scored.score < best.score => continue,
            Some(best) if scored.score == best.score => {
                equals += 1;
                if random.usize(..equals) != 0 {
                    continue;
                }
            }
            _ => equals = 1,
        }
        choice = Some(scored);
    }
    choice.into_iter().map(|scored| scored.endpoint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::testing::{Rig, build, scraped};
    use serde_json::{Value, json};

    fn scored(scores: &[f64]) -> Vec<Scored> {
        scores.iter().enumerate().map(|(endpoint, &score)| Scored { endpoint, score }).collect()
    }

    #[track_caller]
    fn check(params: Value, scores: &[f64], want: &[usize]) {
        let picker = build(REGISTRATION, params).unwrap();
        let rig = Rig::new(vec![scraped(); scores.len()]);
        let got = picker.picker().unwrap().pick(&rig.cycle(), &mut scored(scores));
        assert_eq!(got, want, "{scores:?}");
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn the_best_are_picked_best_first() {
        check(json!({}),                        &[10.0, 25.0, 15.0], &[1]);
        check(json!({"maxNumOfEndpoints": 2}),  &[20.0, 25.0, 15.0], &[1, 0]);
        check(json!({"maxNumOfEndpoints": 3}),  &[20.0, 25.0],       &[1, 0]);
        check(json!({"maxNumOfEndpoints": 0}),  &[20.0, 25.0],       &[1]);
        check(json!({"maxNumOfEndpoints": -1}), &[20.0, 25.0],       &[1]);
        check(json!({}),                        &[-3.0, -2.0],       &[1]);
        // No epsilon.
        check(json!({}),                        &[0.1 + 0.2, 0.3],   &[0]);
    }

    #[test]
    fn equals_are_picked_equally_often() {
        let mut random = fastrand::Rng::with_seed(7);
        for max in [1, 2] {
            let mut counts = [0_u32; 5];
            for _ in 0..6000 {
                let picked = best(&mut scored(&[3.0, 1.0, 3.0, 2.0, 3.0]), max, &mut random);
                counts[picked[0]] += 1;
            }
            assert_eq!((counts[1], counts[3]), (0, 0));
            // 2000 expected, standard deviation 37.
            assert!([0, 2, 4].iter().all(|&at| counts[at].abs_diff(2000) < 200), "{counts:?}");
        }
    }

    #[test]
    fn seeded_picks_can_be_repeated() {
        let picks = |params: Value| -> Vec<usize> {
            let picker = build(REGISTRATION, params).unwrap();
            let rig = Rig::new(vec![scraped(); 4]);
            let pick = || picker.picker().unwrap().pick(&rig.cycle(), &mut scored(&[1.0; 4]))[0];
            (0..4000).map(|_| pick()).collect()
        };
        let seven = picks(json!({"seed": 7}));
        assert_eq!(seven, picks(json!({"seed": 7})));
        assert_ne!(seven, picks(json!({"seed": 8})));
        for pod in 0..4 {
            let times = seven.iter().filter(|&&picked| picked == pod).count();
            // 1000 expected, standard deviation 27.
            assert!(times.abs_diff(1000) < 160, "{pod}: {times}");
        }
    }

    #[test]
    fn unknown_parameters_are_refused() {
        let faults = build(REGISTRATION, json!({"maxNumEndpoints": 1})).unwrap_err();
        assert_eq!(faults, ["maxNumEndpoints: unknown field; did you mean `maxNumOfEndpoints`?"]);
    }
}
