//! Threads of their own for tokenization: queues with a cap, a budget per request.
//!
//! # Model
//!
//! Jobs go one of two ways, each with a queue and threads that do nothing else:
//!
//! | jobs | threads | priority |
//! | --- | --- | --- |
//! | small: at most [`SMALL_BYTES`] of text to be tokenized anew | [`PoolConfig::threads`] | as the process |
//! | large | half as many, at least one | lower, on Linux |
//!
//! So a small job never waits behind a large one, and large ones leave the cores to whoever else
//! wants them: with as many threads as cores, they would take time from the threads that do I/O.
//!
//! # Failure
//!
//! A caller waits until its budget is spent and then goes on without tokens. Its job, if begun, runs
//! to its end: what the encoder remembers of it serves the next request. If not begun, it never is. A
//! job that panics is an error for its caller; the thread lives on.
//!
//! # Cost
//!
//! A job that goes to a thread and back costs two wake-ups: 8 µs of CPU time, 15 µs of waiting. Short
//! known prompts, which take about as long themselves, take the trip all the same: whether one is
//! known shows only once its template is rendered.

use std::{
    collections::VecDeque,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts, Registry};
use tokio::sync::oneshot;

use super::TokenizeError;
use crate::support::{metrics::family, sync::lock};

/// Text of a small job at most, in bytes: a few milliseconds of tokenizing.
pub const SMALL_BYTES: usize = 16 << 10;

/// What the priority of threads for large jobs is lowered by: ten steps are a tenth of the weight.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// How much tokenization may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Threads for small jobs, at least 1; half as many, at least 1, are for large ones.
    pub threads: usize,
    /// Jobs that may wait, of each size.
    pub queue: usize,
    /// How long one request waits for its tokens at most, waiting in the queue included.
    pub budget: Duration,
}

impl Default for PoolConfig {
    /// Half of the cores and at least two threads, 1 024 jobs, 20 ms.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(2, |cores| cores.get() / 2).max(2);
        Self { threads, queue: 1024, budget: Duration::from_millis(20) }
    }
}

/// The threads. Dropping it ends them, after the jobs that they are at.
#[derive(Debug)]
pub struct Pool {
    budget: Duration,
    small: Lane,
    large: Lane,
    metrics: Metrics,
}

impl Pool {
    /// Starts the threads. Metrics are named `{prefix}_tokenize_…`, such as `epp_tokenize_seconds`.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started, or metrics cannot be registered.
    pub fn start(config: PoolConfig, registry: &Registry, prefix: &str) -> anyhow::Result<Self> {
        let metrics = Metrics::register(registry, prefix)?;
        let waiting = &metrics.queue;
        let threads = config.threads.max(1);
        let small = Lane::start("tokenize", threads, config.queue, waiting, || {})?;
        let half = (threads / 2).max(1);
        let large = Lane::start("tokenize-large", half, config.queue, waiting, lower_priority)?;
        Ok(Self { budget: config.budget, small, large, metrics })
    }

    /// Runs a small job on one of the threads and waits for it, as long as the budget lasts. A job
    /// whose caller has gone is not begun.
    ///
    /// # Errors
    ///
    /// [`TokenizeError::Busy`], [`TokenizeError::Late`], [`TokenizeError::Unavailable`] if it panics,
    /// or the job's own.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, TokenizeError> + Send + 'static,
    ) -> Result<T, TokenizeError> {
        self.run_sized(0, job).await
    }

    /// Like [`Pool::run`], for a job that tokenizes so many bytes of text anew.
    ///
    /// # Errors
    ///
    /// As [`Pool::run`].
    pub async fn run_sized<T: Send + 'static>(
        &self,
        bytes: usize,
        job: impl FnOnce() -> Result<T, TokenizeError> + Send + 'static,
    ) -> Result<T, TokenizeError> {
        self.measured(|deadline| self.run_until(deadline, bytes, job)).await
    }

    /// Runs a job that finds out how large it is: `first` is a small job that comes to an end, or
    /// returns what is left to do for `second`, a large one. Both have one budget.
    ///
    /// # Errors
    ///
    /// As [`Pool::run`].
    pub async fn run_in_steps<T: Send + 'static, M: Send + 'static>(
        &self,
        first: impl FnOnce() -> Result<Step<T, M>, TokenizeError> + Send + 'static,
        second: impl FnOnce(M) -> Result<T, TokenizeError> + Send + 'static,
    ) -> Result<T, TokenizeError> {
        self.measured(async |deadline| match self.run_until(deadline, 0, first).await? {
            Step::Done(result) => Ok(result),
            Step::Large(rest) => self.run_until(deadline, usize::MAX, || second(rest)).await,
        })
        .await
    }

    async fn measured<T, F: Future<Output = Result<T, TokenizeError>>>(
        &self,
        run: impl FnOnce(Option<Instant>) -> F,
    ) -> Result<T, TokenizeError> {
        let start = Instant::now();
        let result = run(start.checked_add(self.budget)).await;
        if let Err(error @ (TokenizeError::Busy | TokenizeError::Late)) = &result {
            self.metrics.refused.with_label_values(&[error.reason()]).inc();
        }
        if !matches!(result, Err(TokenizeError::Busy)) {
            self.metrics.seconds.observe(start.elapsed().as_secs_f64());
        }
        result
    }

    async fn run_until<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        bytes: usize,
        job: impl FnOnce() -> Result<T, TokenizeError> + Send + 'static,
    ) -> Result<T, TokenizeError> {
        let (sender, receiver) = oneshot::channel();
        let is_late = move || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let job = Box::new(move || {
            if sender.is_closed() || is_late() {
                return;
            }
            let result = catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|_| {
                Err(TokenizeError::Unavailable("the tokenizer failed on this text".to_owned()))
            });
            // Nobody listens any more if it took too long.
            sender.send(result).unwrap_or_default();
        });
        let lane = if bytes <= SMALL_BYTES { &self.small } else { &self.large };
        lane.push(job)?;
        let answer = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), receiver).await,
            None => Ok(receiver.await),
        };
        // A job that was dropped was too late for its caller.
        answer.map_or(Err(TokenizeError::Late), |sent| sent.unwrap_or(Err(TokenizeError::Late)))
    }
}

/// How the first step of a job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<T, M> {
    /// With the result.
    Done(T),
    /// With what a large job needs to go on.
    Large(M),
}

type Job = Box<dyn FnOnce() + Send>;

/// A queue and the threads that work on it.
#[derive(Debug)]
struct Lane {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    cap: usize,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Jobs that wait, over all lanes.
    waiting: IntGauge,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("cap", &self.cap).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads that wait for a job.
    idle: usize,
    closed: bool,
}

impl Lane {
    fn start(
        name: &str,
        threads: usize,
        cap: usize,
        waiting: &IntGauge,
        prepare: fn(),
    ) -> anyhow::Result<Self> {
        let (queue, changed) = Default::default();
        let shared = Arc::new(Shared { cap, queue, changed, waiting: waiting.clone() });
        let mut lane = Self { shared, threads: Vec::with_capacity(threads) };
        for number in 0..threads {
            let shared = Arc::clone(&lane.shared);
            let builder = thread::Builder::new().name(format!("{name}-{number}"));
            let thread = builder.spawn(move || {
                prepare();
                shared.work();
            });
            lane.threads.push(thread.context("starting a thread for tokenization")?);
        }
        Ok(lane)
    }

    fn push(&self, job: Job) -> Result<(), TokenizeError> {
        let mut queue = lock(&self.shared.queue);
        if queue.jobs.len() >= self.shared.cap {
            return Err(TokenizeError::Busy);
        }
        queue.jobs.push_back(job);
        let wake = queue.idle > 0;
        drop(queue);
        self.shared.waiting.inc();
        if wake {
            self.shared.changed.notify_one();
        }
        Ok(())
    }
}

impl Shared {
    /// Runs jobs until the lane ends.
    fn work(&self) {
        while let Some(job) = self.next() {
            self.waiting.dec();
            job();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue.idle += 1;
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let mut queue = lock(&self.shared.queue);
        queue.closed = true;
        let left = std::mem::take(&mut queue.jobs);
        drop(queue);
        self.shared.waiting.sub(i64::try_from(left.len()).unwrap_or_default());
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // Jobs do not unwind out of their thread.
            thread.join().unwrap_or_default();
        }
    }
}

/// Makes the calling thread give way to all others.
fn lower_priority() {
    // Without the lower priority jobs run all the same.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "The threads for large texts keep their priority.");
    }
}

#[derive(Debug)]
struct Metrics {
    seconds: Histogram,
    queue: IntGauge,
    refused: IntCounterVec,
}

impl Metrics {
    fn register(registry: &Registry, prefix: &str) -> prometheus::Result<Self> {
        let name = |name: &str| format!("{prefix}_{name}");
        let seconds = HistogramOpts::new(
            name("tokenize_seconds"),
            "Time from asking for the tokens of a prompt to having them, or giving up.",
        );
        let seconds = seconds.buckets(prometheus::exponential_buckets(25e-6, 2.0, 15)?);
        let queue = IntGauge::new(name("tokenize_queue"), "Prompts that wait for a thread.")?;
        let refused = Opts::new(
            name("tokenize_refused_total"),
            "Prompts that went without tokens because of the queue or the time.",
        );
        Ok(Self {
            seconds: family(registry, Histogram::with_opts(seconds)?)?,
            queue: family(registry, queue)?,
            refused: family(registry, IntCounterVec::new(refused, &["reason"])?)?,
        })
    }
}

#[cfg(test)]
mod tests;
