//! Speculative entries: blocks that a router expects an engine to store soon.
//!
//! # Model
//!
//! A *handle* is one `Speculate` call. It owns a *mark* per prompt and row, and the index keeps
//! what is left of each mark: a later store confirms a block and ends every mark on it. A handle
//! ends when its time is up or when it is taken back, whichever comes first, and then takes its
//! marks with it; marks of other handles on the same blocks stay.
//!
//! # Concurrency
//!
//! Whoever removes a handle from the table, under the lock, is the one who takes its marks back,
//! outside the lock. [`Speculations::run`] must run, or nothing expires.
//!
//! # Cost
//!
//! Here 8 bytes a block, some 50 a mark and 100 a handle. In the index some 60 bytes for each
//! marked block of a row, which its cap in bytes does not count, and 17 for each distinct block,
//! which it does. Handles and blocks are capped; with the defaults the index's part may reach half
//! a gigabyte.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    index::BlockIndex,
    model::{PodSlot, RequestKey},
};

/// Blocks of all entries at most, per entry allowed: entries of 2 000 tokens fill both caps at
/// once with blocks of 16 tokens. With the default of 65 536 entries it is 8 388 608 blocks.
const BLOCKS_PER_ENTRY: usize = 128;

/// As many entries as may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} of speculative entries are at the limit of {limit}")]
pub struct TooMany {
    /// `calls` or `blocks`.
    pub what: &'static str,
    /// The limit.
    pub limit: usize,
}

/// The live handles.
#[derive(Debug)]
pub struct Speculations {
    index: Arc<dyn BlockIndex>,
    max_entries: usize,
    max_blocks: usize,
    next: AtomicU64,
    live: Mutex<Live>,
    earlier: Notify,
}

/// What one mark covers.
#[derive(Clone, Debug)]
struct Mark {
    slot: PodSlot,
    keys: Arc<[RequestKey]>,
    id: u64,
}

#[derive(Debug)]
struct Entry {
    marks: Vec<Mark>,
    blocks: usize,
    expires: Instant,
}

#[derive(Debug, Default)]
struct Live {
    entries: HashMap<u64, Entry>,
    /// Expiries, earliest first. One whose entry has gone or was extended is passed over.
    expiries: BinaryHeap<Reverse<(Instant, u64)>>,
    /// Of `entries`, and of calls that are marking the index right now.
    reserved: usize,
    blocks: usize,
}

impl Speculations {
    /// No handles yet, at most `max_entries` at a time.
    #[must_use]
    pub fn new(index: Arc<dyn BlockIndex>, max_entries: usize) -> Self {
        Self {
            index,
            max_entries,
            max_blocks: max_entries.saturating_mul(BLOCKS_PER_ENTRY),
            next: AtomicU64::new(1),
            live: Mutex::default(),
            earlier: Notify::new(),
        }
    }

    /// Handles alive.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Is none alive?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Marks the blocks of every prompt on every slot for `ttl`; returns the handle, never 0.
    ///
    /// # Errors
    ///
    /// [`TooMany`].
    pub fn add(
        &self,
        slots: &[PodSlot],
        prompts: Vec<Vec<RequestKey>>,
        ttl: Duration,
    ) -> Result<u64, TooMany> {
        let blocks = prompts.iter().map(Vec::len).sum::<usize>().saturating_mul(slots.len());
        self.reserve(blocks)?;
        let mut marks = Vec::with_capacity(slots.len() * prompts.len());
        for keys in prompts.into_iter().filter(|keys| !keys.is_empty()) {
            let keys: Arc<[RequestKey]> = keys.into();
            for &slot in slots {
                // A mark of its own for each: prompts of one call may share blocks.
                marks.push(Mark { slot, keys: Arc::clone(&keys), id: self.number() });
            }
        }
        // The index first: an entry that could expire before it is marked would never be unmarked.
        for mark in &marks {
            self.index.speculate(mark.slot, &mark.keys, mark.id);
        }
        let (handle, expires) = (self.number(), Instant::now() + ttl);
        let mut live = self.lock();
        live.entries.insert(handle, Entry { marks, blocks, expires });
        self.schedule(&mut live, expires, handle);
        Ok(handle)
    }

    /// Takes the marks of a handle back; `false` when it has gone already.
    pub fn take_back(&self, handle: u64) -> bool {
        let entry = self.lock().remove(handle);
        entry.is_some_and(|entry| {
            self.unmark(&entry);
            true
        })
    }

    /// Lets a handle expire `ttl` from now, earlier or later than it would have; `false` when it
    /// has gone already.
    pub fn extend(&self, handle: u64, ttl: Duration) -> bool {
        let expires = Instant::now() + ttl;
        let mut live = self.lock();
        let Some(entry) = live.entries.get_mut(&handle) else { return false };
        entry.expires = expires;
        self.schedule(&mut live, expires, handle);
        true
    }

    /// Ends handles when their time is up, to the timer's millisecond, until `stop`.
    ///
    /// # Errors
    ///
    /// None; the type is that of supervised tasks.
    pub async fn run(&self, stop: CancellationToken) -> anyhow::Result<()> {
        loop {
            let next = self.expire(Instant::now());
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = self.earlier.notified() => {}
                () = due => {}
            }
        }
    }

    /// Ends what is due at `now`; returns when the next one is.
    fn expire(&self, now: Instant) -> Option<Instant> {
        loop {
            let mut live = self.lock();
            let &Reverse((at, handle)) = live.expiries.peek()?;
            if at > now {
                return Some(at);
            }
            live.expiries.pop();
            let due = live.entries.get(&handle).is_some_and(|entry| entry.expires <= now);
            let entry = if due { live.remove(handle) } else { None };
            drop(live);
            if let Some(entry) = entry {
                self.unmark(&entry);
            }
        }
    }

    fn reserve(&self, blocks: usize) -> Result<(), TooMany> {
        let mut live = self.lock();
        if live.reserved >= self.max_entries {
            return Err(TooMany { what: "calls", limit: self.max_entries });
        }
        if live.blocks.saturating_add(blocks) > self.max_blocks {
            return Err(TooMany { what: "blocks", limit: self.max_blocks });
        }
        live.reserved += 1;
        live.blocks += blocks;
        Ok(())
    }

    fn schedule(&self, live: &mut Live, expires: Instant, handle: u64) {
        if live.expiries.peek().is_none_or(|Reverse((first, _))| expires < *first) {
            self.earlier.notify_one();
        }
        live.expiries.push(Reverse((expires, handle)));
        // Extensions and early ends leave stale expiries behind.
        if live.expiries.len() > 2 * live.entries.len() + 64 {
            let entries = live.entries.iter();
            live.expiries = entries.map(|(&id, entry)| Reverse((entry.expires, id))).collect();
        }
    }

    fn unmark(&self, entry: &Entry) {
        for mark in &entry.marks {
            self.index.unspeculate(mark.slot, &mark.keys, mark.id);
        }
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    fn remove(&mut self, handle: u64) -> Option<Entry> {
        let entry = self.entries.remove(&handle)?;
        self.reserved -= 1;
        self.blocks -= entry.blocks;
        Some(entry)
    }
}
