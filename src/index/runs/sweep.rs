//! Seats, and the thread that takes past lives out of the runs.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use super::{
    cover::{MARKS, Seat},
    lock,
    storage::Runs,
};
use crate::index::ledger::Ledger;

/// Which seats are free.
#[derive(Debug, Default)]
pub(super) struct Seats {
    free: Mutex<Free>,
    /// Changes before a seat that was somebody's becomes somebody else's.
    moment: AtomicU64,
}

#[derive(Debug, Default)]
struct Free {
    freed: BTreeSet<Seat>,
    /// Never used from here on.
    next: Seat,
}

impl Seats {
    /// Of a row that is gone; nothing is written for it.
    pub(super) const NONE: Seat = Seat::MAX;

    /// The lowest free seat: sets of seats are as wide as the highest one. `None` when all are
    /// taken, by rows or by past lives that are still to be swept.
    pub(super) fn take(&self) -> Option<Seat> {
        let mut free = lock(&self.free);
        if let Some(seat) = free.freed.pop_first() {
            self.moment.fetch_add(1, Ordering::SeqCst);
            return Some(seat);
        }
        let seat = free.next;
        if seat == MARKS {
            return None;
        }
        free.next += 1;
        Some(seat)
    }

    fn give(&self, seat: Seat) {
        if seat != Self::NONE {
            lock(&self.free).freed.insert(seat);
        }
    }

    /// Equal moments: no seat has changed its owner in between.
    pub(super) fn moment(&self) -> u64 {
        self.moment.load(Ordering::SeqCst)
    }
}

/// Ledgers of past lives, waiting to be swept.
#[derive(Debug)]
pub(super) struct Sweeper {
    shared: Arc<Pending>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Pending {
    runs: Arc<Runs>,
    seats: Arc<Seats>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// The first one is being swept.
    ledgers: VecDeque<Arc<Ledger>>,
    stop: bool,
}

impl Sweeper {
    /// A ledger with fewer keys is swept at once: about what a store of as many costs.
    const SMALL: usize = 256;
    /// Lives that may wait; beyond, who ends one sweeps it.
    const WAITING: usize = 256;

    pub(super) fn new(runs: Arc<Runs>, seats: Arc<Seats>) -> Self {
        let shared =
            Arc::new(Pending { runs, seats, queue: Mutex::default(), changed: Condvar::new() });
        let pending = Arc::clone(&shared);
        // Without the thread, every ledger is swept at once.
        let thread =
            std::thread::Builder::new().name("index-sweeper".to_owned()).spawn(move || {
                pending.run();
            });
        Self { shared, thread: thread.ok() }
    }

    /// Takes everything that a past life holds out of the runs, now or soon.
    pub(super) fn sweep(&self, ledger: Ledger) {
        let mut queue = lock(&self.shared.queue);
        if ledger.len() < Self::SMALL
            || queue.ledgers.len() >= Self::WAITING
            || self.thread.is_none()
        {
            drop(queue);
            self.shared.sweep(&ledger);
            return;
        }
        queue.ledgers.push_back(Arc::new(ledger));
        self.shared.changed.notify_one();
    }
}

#[cfg(test)]
impl Sweeper {
    /// Waits until nothing waits to be swept.
    pub(super) fn settle(&self) {
        let mut queue = lock(&self.shared.queue);
        while !queue.ledgers.is_empty() {
            drop(queue);
            std::thread::yield_now();
            queue = lock(&self.shared.queue);
        }
    }
}

impl Pending {
    fn run(&self) {
        let mut queue = lock(&self.queue);
        while !queue.stop {
            if let Some(ledger) = queue.ledgers.front().map(Arc::clone) {
                drop(queue);
                self.sweep(&ledger);
                queue = lock(&self.queue);
                let swept = queue.ledgers.pop_front();
                drop(queue);
                // Its memory goes back without the lock.
                drop((ledger, swept));
                queue = lock(&self.queue);
            } else {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn sweep(&self, ledger: &Ledger) {
        ledger.sweep(&self.runs);
        self.seats.give(ledger.seat());
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        lock(&self.shared.queue).stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A sweep that panicked has said so.
            drop(thread.join());
        }
    }
}
