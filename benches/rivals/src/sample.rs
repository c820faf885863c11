//! Times of many calls.

use std::time::{Duration, Instant};

/// Nanoseconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    /// The `q`-quantile; NaN of nothing.
    pub(crate) fn quantile(&mut self, q: f64) -> f64 {
        self.0.sort_unstable_by(f64::total_cmp);
        let at = (q * self.0.len() as f64) as usize;
        self.0.get(at.min(self.0.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn median(&mut self) -> f64 {
        self.quantile(0.5)
    }

    pub(crate) fn push(&mut self, nanos: f64) {
        self.0.push(nanos);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// The median of what `measure` says `times` times.
pub(crate) fn median_of(times: usize, mut measure: impl FnMut() -> f64) -> f64 {
    let mut sample = Sample::default();
    (0..times).for_each(|_| sample.push(measure()));
    sample.median()
}

pub(crate) fn nanos(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// What timing a call costs by itself: it is taken off each single call.
pub(crate) fn empty_call() -> f64 {
    let mut sample = Sample::default();
    for _ in 0..20_000 {
        let start = Instant::now();
        sample.push(nanos(start.elapsed()));
    }
    sample.median()
}

/// Calls in a batch. A call's time is its batch's by this, so that reading the clock costs nothing.
pub(crate) const BATCH: usize = 64;

/// Nanoseconds per call, one figure a batch, for about as long as told and three batches at least.
/// `call` is given the number of the call in the batch.
pub(crate) fn batches(budget: Duration, mut call: impl FnMut(usize)) -> Sample {
    let mut sample = Sample::default();
    let end = Instant::now() + budget;
    while sample.len() < 3 || Instant::now() < end {
        let start = Instant::now();
        (0..BATCH).for_each(&mut call);
        sample.push(nanos(start.elapsed()) / BATCH as f64);
    }
    sample
}

/// Nanoseconds of single calls, a thousand at least, less what timing costs.
pub(crate) fn calls(budget: Duration, empty: f64, mut call: impl FnMut(usize)) -> Sample {
    let mut sample = Sample::default();
    let end = Instant::now() + budget;
    while sample.len() < 1000 || Instant::now() < end {
        for at in 0..BATCH {
            let start = Instant::now();
            call(at);
            sample.push((nanos(start.elapsed()) - empty).max(0.0));
        }
    }
    sample
}

/// Nanoseconds of single calls that find nothing of ours in the caches: before each, memory of
/// twice a large last-level cache is walked.
pub(crate) fn cold_calls(times: usize, empty: f64, mut call: impl FnMut(usize)) -> Sample {
    const WALKED: usize = 96 << 20;
    const LINE: usize = 64;
    let mut walked = vec![0u8; WALKED];
    let mut sample = Sample::default();
    for at in 0..times {
        walked.iter_mut().step_by(LINE).for_each(|byte| *byte = byte.wrapping_add(1));
        std::hint::black_box(&mut walked);
        let start = Instant::now();
        call(at);
        sample.push((nanos(start.elapsed()) - empty).max(0.0));
    }
    sample
}
