//! Draws from the distributions that workloads are made of, and the seeds of parts.

use std::f64::consts::TAU;

use fastrand::Rng;

/// What a part is in its prompt. Seeds of different roles, and of different indices of a role, differ
/// always, not just probably.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role {
    /// What a group has in common.
    System = 1,
    /// What is asked again and again.
    Question,
    /// What is asked once.
    Unique,
    /// What an engine is taken to have answered.
    Answer,
    /// A block of a recorded prompt.
    Recorded,
    /// No part: the order of requests.
    Order,
    /// No part: the lengths of answers.
    Output,
}

/// The seed of a part; `index` is below 2^60.
pub(super) fn seed_of(run: u64, role: Role, index: u64) -> u64 {
    mix(((role as u64) << 60 | index) ^ mix(run))
}

/// A permutation of 64-bit numbers whose outputs look random: SplitMix64's last step.
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Uniform in (0, 1].
fn positive(rng: &mut Rng) -> f64 {
    1.0 - rng.f64()
}

/// Exponential with mean 1.
pub(super) fn exponential(rng: &mut Rng) -> f64 {
    -positive(rng).ln()
}

/// Normal with mean 0 and deviation 1: Box and Muller's, of which the second value is given up.
pub(super) fn normal(rng: &mut Rng) -> f64 {
    (2.0 * exponential(rng)).sqrt() * (TAU * rng.f64()).cos()
}

/// Gamma with this shape, above 0, and scale 1: Marsaglia and Tsang, "A simple method for generating
/// gamma variables" (2000).
pub(super) fn gamma(rng: &mut Rng, shape: f64) -> f64 {
    if shape < 1.0 {
        return gamma(rng, shape + 1.0) * positive(rng).powf(1.0 / shape);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(rng);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && positive(rng).ln() < 0.5 * x * x + d * (1.0 - v + v.ln()) {
            return d * v;
        }
    }
}

/// Ranks from 0, of which rank k is drawn in proportion to 1 / (k + 1)^s.
#[derive(Clone, Debug)]
pub(super) struct Zipf {
    /// Sums of weights up to each rank.
    sums: Vec<f64>,
}

impl Zipf {
    /// Ranks below `count`, at least one.
    pub(super) fn new(count: u32, exponent: f64) -> Self {
        let mut sum = 0.0;
        let weight = |rank: u32| {
            sum += f64::from(rank).powf(-exponent);
            sum
        };
        Self { sums: (1..=count.max(1)).map(weight).collect() }
    }

    pub(super) fn draw(&self, rng: &mut Rng) -> u32 {
        let at = rng.f64() * self.sums.last().copied().unwrap_or_default();
        let rank = self.sums.partition_point(|sum| *sum <= at).min(self.sums.len() - 1);
        u32::try_from(rank).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(mut draw: impl FnMut(&mut Rng) -> f64, mean: f64, variance: f64) {
        const DRAWS: usize = 200_000;
        let mut rng = Rng::with_seed(1);
        let draws: Vec<f64> = (0..DRAWS).map(|_| draw(&mut rng)).collect();
        let got = draws.iter().sum::<f64>() / DRAWS as f64;
        assert!((got - mean).abs() < 0.02 * (1.0 + mean), "mean {got}, not {mean}");
        let got = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / DRAWS as f64;
        assert!((got - variance).abs() < 0.04 * (1.0 + variance), "variance {got}, not {variance}");
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        check(exponential, 1.0, 1.0);
        check(normal, 0.0, 1.0);
        for shape in [0.1, 0.25, 1.0, 4.0, 30.0] {
            check(|rng| gamma(rng, shape), shape, shape);
        }
    }

    #[test]
    fn popularity_falls_as_zipf_says() {
        let zipf = Zipf::new(3, 1.0);
        let mut rng = Rng::with_seed(1);
        let mut counts = [0_u32; 3];
        for _ in 0..110_000 {
            counts[zipf.draw(&mut rng) as usize] += 1;
        }
        for (count, want) in counts.into_iter().zip([60_000, 30_000, 20_000]) {
            assert!(count.abs_diff(want) < 1_000, "{counts:?}");
        }
        assert_eq!(Zipf::new(0, 1.2).draw(&mut rng), 0);
    }

    #[test]
    fn seeds_of_roles_differ() {
        let all = [Role::System, Role::Question, Role::Unique, Role::Answer, Role::Recorded];
        let seeds: std::collections::HashSet<u64> = (0..1_000)
            .flat_map(|index| all.map(|role| seed_of(0, role, index)))
            .chain((0..1_000).map(|index| seed_of(1, Role::Unique, index)))
            .collect();
        assert_eq!(seeds.len(), 6_000);
    }
}
