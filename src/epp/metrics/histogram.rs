//! A histogram that is cheap to feed.
//!
//! # Cost
//!
//! Two additions and a search of at most six steps an observation: values and bounds are integers, so
//! the sum needs no loop. Several families are made of one histogram when it is read, so a second name
//! costs nothing here. The naive equivalent is `prometheus::Histogram`.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::proto;

/// Bounds of buckets, in integer units.
#[derive(Debug)]
pub(super) struct Scale {
    /// Units in one second, byte or token: what is reported is divided by it.
    pub(super) per_unit: u64,
    /// Upper bounds, inclusive, ascending.
    pub(super) bounds: &'static [u64],
}

impl Scale {
    const fn count(bounds: &'static [u64]) -> Self {
        Self { per_unit: 1, bounds }
    }

    /// For durations: sums of microseconds overflow after 58 years of 10 000 requests at a time.
    const fn micros(bounds: &'static [u64]) -> Self {
        Self { per_unit: 1_000_000, bounds }
    }

    /// For durations that are mostly below a few microseconds and are our own CPU time.
    const fn nanos(bounds: &'static [u64]) -> Self {
        Self { per_unit: 1_000_000_000, bounds }
    }
}

/// Whole requests: 5 ms to an hour.
pub(super) const LATENCY: Scale = Scale::micros(&micros([
    5, 25, 50, 100, 200, 400, 600, 800, 1_000, 1_250, 1_500, 2_000, 3_000, 4_000, 5_000, 6_000,
    8_000, 10_000, 15_000, 20_000, 30_000, 45_000, 60_000, 120_000, 180_000, 240_000, 300_000,
    360_000, 480_000, 600_000, 900_000, 1_200_000, 1_800_000, 2_700_000, 3_600_000,
]));

/// Time to the first token: 5 ms to two minutes.
pub(super) const TTFT: Scale = Scale::micros(&micros([
    5, 25, 50, 100, 200, 400, 600, 800, 1_000, 1_250, 1_500, 2_000, 3_000, 4_000, 5_000, 6_000,
    8_000, 10_000, 15_000, 20_000, 30_000, 45_000, 60_000, 120_000,
]));

/// Mean time for an output token: 0.5 ms to 2 s.
pub(super) const TPOT: Scale = Scale::micros(&[
    500, 2_050, 5_000, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000, 125_000, 150_000, 200_000,
    300_000, 400_000, 500_000, 600_000, 800_000, 1_000_000, 2_000_000,
]);

/// Time between chunks: 1 ms to 2 s.
pub(super) const ITL: Scale =
    Scale::micros(&micros([1, 5, 10, 20, 40, 60, 80, 100, 150, 200, 300, 500, 750, 1_000, 2_000]));

/// Latency by output token: 1 ms to 10 s.
pub(super) const NTPOT: Scale =
    Scale::micros(&micros([1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000]));

/// Request bodies: 64 bytes to 1 GiB.
pub(super) const REQUEST_BYTES: Scale = Scale::count(&[
    64,
    128,
    256,
    512,
    1024,
    2048,
    4096,
    8192,
    16_384,
    32_768,
    65_536,
    131_072,
    262_144,
    524_288,
    1_048_576,
    2_097_152,
    4_194_304,
    8_388_608,
    16_777_216,
    33_554_432,
    67_108_864,
    134_217_728,
    268_435_456,
    536_870_912,
    1_073_741_824,
]);

/// Response bodies. 32 778 is the Go EPP's, as below: dashboards know it.
pub(super) const RESPONSE_BYTES: Scale = Scale::count(&[
    1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_778, 65_536,
]);

/// Tokens of prompts.
pub(super) const INPUT_TOKENS: Scale = Scale::count(&[
    1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_778, 65_536, 131_072,
    262_144, 524_288, 1_048_576,
]);

/// Tokens of answers.
pub(super) const OUTPUT_TOKENS: Scale =
    Scale::count(&[1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]);

/// Scheduling and plugins: 0.1 ms to 0.1 s. What runs here is mostly below the first bound; the mean
/// tells more.
pub(super) const FAST: Scale = Scale::nanos(&[
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
]);

/// From a request's headers to the end of its body and our answer: 0.5 ms to 10 s.
pub(super) const REQUEST_PROCESSING: Scale = Scale::micros(&[
    500, 1_000, 2_000, 5_000, 10_000, 15_000, 25_000, 40_000, 60_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000,
]);

/// What a response costs us: 0.1 ms to 5 s.
pub(super) const RESPONSE_PROCESSING: Scale = Scale::micros(&[
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000,
]);

/// Life of an ext_proc stream: 1 ms to 10 min.
pub(super) const STREAM: Scale = Scale::micros(&micros([
    1, 5, 10, 50, 100, 500, 1_000, 5_000, 10_000, 30_000, 60_000, 120_000, 300_000, 600_000,
]));

/// Milliseconds → microseconds.
const fn micros<const N: usize>(mut millis: [u64; N]) -> [u64; N] {
    let mut at = 0;
    while at < N {
        millis[at] *= 1_000;
        at += 1;
    }
    millis
}

/// Counts of observations by bucket, and their sum.
#[derive(Debug)]
pub(super) struct Histogram {
    scale: &'static Scale,
    /// Not cumulative; the last one is for what exceeds all bounds.
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    pub(super) fn new(scale: &'static Scale) -> Self {
        let buckets = (0..=scale.bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { scale, buckets, sum: AtomicU64::new(0) }
    }

    /// Counts a value, in units of the scale.
    pub(super) fn observe(&self, value: u64) {
        let at = self.scale.bounds.partition_point(|bound| *bound < value);
        self.buckets[at].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Counts a duration; the scale must be one of durations.
    pub(super) fn observe_duration(&self, duration: std::time::Duration) {
        let value = if self.scale.per_unit == 1_000_000 {
            duration.as_micros()
        } else {
            duration.as_nanos()
        };
        self.observe(u64::try_from(value).unwrap_or(u64::MAX));
    }

    /// Adds what was observed so far. `into` is of the same scale, or new.
    pub(super) fn add_to(&self, into: &mut Counts) {
        into.scale = Some(self.scale);
        into.buckets.resize(self.buckets.len(), 0);
        for (sum, bucket) in into.buckets.iter_mut().zip(&self.buckets) {
            *sum += bucket.load(Ordering::Relaxed);
        }
        into.sum = into.sum.wrapping_add(self.sum.load(Ordering::Relaxed));
    }

    /// What was observed so far.
    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.add_to(&mut counts);
        counts
    }
}

/// What one or several histograms observed.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    scale: Option<&'static Scale>,
    buckets: Vec<u64>,
    sum: u64,
}

impl Counts {
    /// Was nothing observed?
    pub(super) fn is_empty(&self) -> bool {
        self.buckets.iter().all(|count| *count == 0)
    }

    /// As Prometheus wants it.
    pub(super) fn to_proto(&self) -> proto::Histogram {
        let mut histogram = proto::Histogram::default();
        let Some(scale) = self.scale else { return histogram };
        let per_unit = scale.per_unit as f64;
        let mut count = 0;
        let mut buckets = Vec::with_capacity(scale.bounds.len());
        for (bound, observed) in scale.bounds.iter().zip(&self.buckets) {
            count += observed;
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(*bound as f64 / per_unit);
            bucket.set_cumulative_count(count);
            buckets.push(bucket);
        }
        histogram.set_bucket(buckets);
        histogram.set_sample_count(self.buckets.iter().sum());
        histogram.set_sample_sum(self.sum as f64 / per_unit);
        histogram
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn buckets_are_those_of_prometheus() {
        #[track_caller]
        fn check(scale: &'static Scale, values: &[f64]) {
            let bounds = scale.bounds.iter().map(|b| *b as f64 / scale.per_unit as f64).collect();
            let opts = prometheus::HistogramOpts::new("h", "h").buckets(bounds);
            let theirs = prometheus::Histogram::with_opts(opts).unwrap();
            let ours = Histogram::new(scale);
            for value in values {
                theirs.observe(*value);
                if scale.per_unit == 1 {
                    ours.observe(*value as u64);
                } else {
                    ours.observe_duration(Duration::from_secs_f64(*value));
                }
            }
            let theirs = prometheus::core::Collector::collect(&theirs);
            let theirs = theirs[0].get_metric()[0].get_histogram();
            let ours = ours.counts().to_proto();
            assert_eq!(ours.get_sample_count(), theirs.get_sample_count());
            let difference = ours.get_sample_sum() - theirs.get_sample_sum();
            assert!(difference.abs() <= 1e-6 * theirs.get_sample_sum().max(1.0), "{difference}");
            let buckets = |h: &proto::Histogram| -> Vec<(String, u64)> {
                let bucket =
                    |b: &proto::Bucket| (b.upper_bound().to_string(), b.cumulative_count());
                h.get_bucket().iter().map(bucket).filter(|(bound, _)| bound != "inf").collect()
            };
            assert_eq!(buckets(&ours), buckets(theirs));
        }
        check(&LATENCY, &[0.0, 0.005, 0.0051, 1.0, 1.3, 3600.0, 9999.0]);
        check(&TPOT, &[0.000_5, 0.002_05, 0.002_06, 2.0, 3.0]);
        check(&FAST, &[0.000_000_2, 0.000_1, 0.000_100_1, 0.1, 0.2]);
        check(&RESPONSE_BYTES, &[0.0, 1.0, 2.0, 32_768.0, 32_778.0, 32_779.0, 1e9]);
        check(&REQUEST_BYTES, &[64.0, 65.0, 1_073_741_824.0]);
    }

    #[test]
    fn bounds_ascend() {
        for scale in [
            &LATENCY,
            &TTFT,
            &TPOT,
            &ITL,
            &NTPOT,
            &REQUEST_BYTES,
            &RESPONSE_BYTES,
            &INPUT_TOKENS,
            &OUTPUT_TOKENS,
            &FAST,
            &REQUEST_PROCESSING,
            &RESPONSE_PROCESSING,
            &STREAM,
        ] {
            assert!(scale.bounds.is_sorted_by(|a, b| a < b), "{scale:?}");
        }
    }
}
