//! Percentiles, intervals and knees. Pure.
//!
//! # Model
//!
//! A percentile is the value of rank ⌈p·n⌉, never an interpolation and never a mean of percentiles. A
//! value is *censored* when it is only a lower bound: what a request had waited when it was given up.
//! Censored values take part with their bound; a percentile that they decide is named as doubtful.
//! Intervals hold 95 %. Everything random takes a seed.

use hdrhistogram::Histogram;

use super::report::{LoopKind, Percentiles, Spread};

/// Quantiles that are reported, and how many samples each wants: P95 needs some ten samples beyond it,
/// the others as many.
const QUANTILES: [(&str, f64, u64); 5] = [
    ("p50", 0.5, 0),
    ("p90", 0.9, 0),
    ("p95", 0.95, 200),
    ("p99", 0.99, 1_000),
    ("p999", 0.999, 10_000),
];

/// What censored values may move a percentile by before it is doubtful, as a factor.
const CENSORED_TOLERANCE: f64 = 1.05;

/// Draws of a bootstrap.
const RESAMPLES: usize = 2_000;

/// The 97.5th percentile of the normal distribution.
const Z95: f64 = 1.959_963_984_540_054;

/// A value, or a lower bound of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observed {
    /// The value.
    pub value: f64,
    /// Is it only a lower bound?
    pub censored: bool,
}

impl From<f64> for Observed {
    fn from(value: f64) -> Self {
        Self { value, censored: false }
    }
}

/// Returns the rank, from 1, of the quantile `p` among `n` values: ⌈p·n⌉.
#[must_use]
pub fn rank(p: f64, n: usize) -> usize {
    // 0.95 · 200 is a little more than 190 in binary; that must not count as a whole rank.
    ((p * n as f64 - 1e-9).ceil() as usize).clamp(1, n.max(1))
}

/// Returns the quantile `p` of `sorted` values; `None` of none.
#[must_use]
pub fn quantile(sorted: &[f64], p: f64) -> Option<f64> {
    sorted.get(rank(p, sorted.len()) - 1).copied()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    values
}

/// Describes values, in any order. Values that are not finite are left out.
#[must_use]
pub fn percentiles<V: Into<Observed>>(values: impl IntoIterator<Item = V>) -> Percentiles {
    let mut all: Vec<Observed> =
        values.into_iter().map(Into::into).filter(|seen| seen.value.is_finite()).collect();
    all.sort_unstable_by(|a, b| {
        a.value.total_cmp(&b.value).then_with(|| a.censored.cmp(&b.censored))
    });
    let n = all.len();
    let mut described = Percentiles { n: n as u64, ..Percentiles::default() };
    if n == 0 {
        return described;
    }
    // As if all censored values were without bound.
    let known: Vec<f64> = all.iter().filter(|seen| !seen.censored).map(|seen| seen.value).collect();
    for (name, p, wanted) in QUANTILES {
        let rank = rank(p, n);
        let here = all[rank - 1];
        let at_most = known.get(rank - 1).copied().unwrap_or(f64::INFINITY);
        let decided = here.censored || at_most > here.value * CENSORED_TOLERANCE;
        if decided || (n as u64) < wanted {
            described.doubtful.push(name.to_owned());
        }
        set(&mut described, name, here.value);
    }
    let mean = all.iter().map(|seen| seen.value).sum::<f64>() / n as f64;
    let squares = all.iter().map(|seen| (seen.value - mean).powi(2)).sum::<f64>();
    described.mean = Some(mean);
    described.stddev = Some((squares / n as f64).sqrt());
    described.min = all.first().map(|seen| seen.value);
    described.max = all.last().map(|seen| seen.value);
    described
}

/// Describes a histogram whose values are `unit` each. Its percentiles are as exact as its digits.
#[must_use]
pub fn from_histogram(histogram: &Histogram<u64>, unit: f64) -> Percentiles {
    let n = histogram.len();
    let mut described = Percentiles { n, ..Percentiles::default() };
    if n == 0 {
        return described;
    }
    for (name, p, wanted) in QUANTILES {
        set(&mut described, name, histogram.value_at_quantile(p) as f64 * unit);
        if n < wanted {
            described.doubtful.push(name.to_owned());
        }
    }
    described.mean = Some(histogram.mean() * unit);
    described.stddev = Some(histogram.stdev() * unit);
    described.min = Some(histogram.min() as f64 * unit);
    described.max = Some(histogram.max() as f64 * unit);
    described
}

fn set(described: &mut Percentiles, name: &str, value: f64) {
    let place = match name {
        "p50" => &mut described.p50,
        "p90" => &mut described.p90,
        "p95" => &mut described.p95,
        "p99" => &mut described.p99,
        _ => &mut described.p999,
    };
    *place = Some(value);
}

/// Returns Wilson's 95 % interval of a share: `met` of `n`. Of nothing it is [0, 1].
#[must_use]
pub fn wilson(met: u64, n: u64) -> [f64; 2] {
    if n == 0 {
        return [0.0, 1.0];
    }
    let n = n as f64;
    let share = (met as f64 / n).min(1.0);
    let z2 = Z95 * Z95;
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    [(centre - half).max(0.0), (centre + half).min(1.0)]
}

/// Returns the 95 % bootstrap interval of the median of repeats; `None` for fewer than three.
#[must_use]
pub fn bootstrap_median(values: &[f64], seed: u64) -> Option<[f64; 2]> {
    if values.len() < 3 {
        return None;
    }
    let mut random = fastrand::Rng::with_seed(seed);
    let mut drawn = vec![0.0; values.len()];
    let draws = (0..RESAMPLES).filter_map(|_| {
        drawn.fill_with(|| values[random.usize(0..values.len())]);
        median(&drawn)
    });
    interval(&draws.collect::<Vec<_>>())
}

fn interval(draws: &[f64]) -> Option<[f64; 2]> {
    let draws = sorted(draws);
    let ends = [quantile(&draws, 0.025)?, quantile(&draws, 0.975)?];
    ends.iter().all(|end| end.is_finite()).then_some(ends)
}

/// Returns the median; of evenly many the mean of both in the middle. `None` of none.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let values = sorted(values);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 { upper } else { f64::midpoint(values[middle - 1], upper) })
}

/// Returns standard deviation (of a sample) ÷ mean; `None` for fewer than two values and for a mean of 0.
#[must_use]
pub fn cv(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 || mean == 0.0 {
        return None;
    }
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    Some((squares / (n - 1.0)).sqrt() / mean.abs())
}

/// Takes repeats of one quantity together; `None` of none.
#[must_use]
pub fn spread(values: &[f64]) -> Option<Spread> {
    let (min, max) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), value| {
        (min.min(*value), max.max(*value))
    });
    median(values).map(|median| Spread { median, min, max, cv: cv(values) })
}

/// A P95 above this many times that of the first level is beyond the knee.
const KNEE_LATENCY: f64 = 3.0;
/// A throughput below this share of the best so far is beyond the knee.
const KNEE_COLLAPSE: f64 = 0.85;
/// In closed loops, a level that brings less than this share of a proportional gain is beyond the knee.
const KNEE_GAIN: f64 = 0.25;

/// Returns the knee of a ladder of levels, each (level, throughput, P95 of the time to the first token),
/// rising by level: the last level before the first one that is beyond it; `None` if no level is, and for
/// fewer than two.
///
/// A level is beyond the knee if its P95 is more than three times that of the first level, or if its
/// throughput is less than 85 % of the best so far (more load, less served). In closed loops also if the
/// throughput grew by less than a quarter of what the level did: there, a full system shows no queue. In
/// open loops that rule would be wrong: throughput in tokens levels off long before waiting begins.
#[must_use]
pub fn knee(levels: &[(f64, f64, f64)], pacing: LoopKind) -> Option<f64> {
    let (_, mut best, first) = *levels.first()?;
    for pair in levels.windows(2) {
        let [(before, throughput_before, _), (level, throughput, p95)] = *pair else { continue };
        let gained = throughput / throughput_before - 1.0;
        let flat = pacing == LoopKind::Closed && gained < KNEE_GAIN * (level / before - 1.0);
        if p95 > KNEE_LATENCY * first || throughput < KNEE_COLLAPSE * best || flat {
            return Some(before);
        }
        best = best.max(throughput);
    }
    None
}

#[cfg(test)]
mod tests;
