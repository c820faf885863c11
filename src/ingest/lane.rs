//! Lanes: writer threads. Each publisher has a bounded queue and is pinned to one lane.
//!
//! A lane takes turns: a few dozen items of one queue, then the next, so that a pod that publishes
//! without pause delays the others by little.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    ingest::{apply::Applier, frame::Frame, sequencer::Reason},
    model::{CountMode, PodState},
    support::sync::lock,
};

/// Items of one queue per turn.
const TURN: usize = 64;
/// How often a lane looks after orphans.
const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// What a queue carries, in order.
#[derive(Debug)]
pub(crate) enum Item {
    /// The last two tell the batch apart from others of its number.
    Batch {
        sequence: u64,
        payload: Frame,
        payload_hash: u64,
        timestamp: f64,
    },
    Reset {
        epoch: u64,
    },
    Rebuild,
    CountMode(Option<CountMode>),
    Loss(Reason),
    /// What is shown, why, and what the blocks can be trusted for, a replay under way aside.
    State(PodState, Reason, PodState),
}

impl Item {
    fn bytes(&self) -> usize {
        match self {
            Self::Batch { payload, .. } => payload.len(),
            _ => 0,
        }
    }
}

/// One publisher's queue, between its subscriber thread and its lane.
#[derive(Debug)]
pub(crate) struct Pipe {
    lane: Arc<Ready>,
    items: Mutex<VecDeque<Item>>,
    batches: AtomicUsize,
    bytes: AtomicUsize,
    /// On the lane's list, or being worked on.
    scheduled: AtomicBool,
    /// `None` once the publisher is gone; whoever takes it out knows that nothing is being applied.
    applier: Mutex<Option<Applier>>,
    /// The last AllBlocksCleared applied, for the sequencer.
    cleared: Mutex<Option<(u64, u64)>>,
    /// Who copies the row at present; nothing is applied meanwhile.
    holders: AtomicUsize,
}

impl Pipe {
    /// Is there room for one more batch of this size?
    pub(crate) fn has_room(&self, most_batches: usize, most_bytes: usize) -> bool {
        self.batches.load(Ordering::Relaxed) < most_batches
            && self.bytes.load(Ordering::Relaxed) < most_bytes
    }

    /// Queues an item. The caller asks [`has_room`](Self::has_room) before it takes in a message;
    /// what a replay held back may exceed that by what the sequencer holds, which is bounded too.
    pub(crate) fn push(self: &Arc<Self>, item: Item) {
        if let Item::Batch { .. } = item {
            self.batches.fetch_add(1, Ordering::Relaxed);
        }
        self.bytes.fetch_add(item.bytes(), Ordering::Relaxed);
        lock(&self.items).push_back(item);
        if !self.scheduled.swap(true, Ordering::AcqRel) {
            self.lane.push(Arc::clone(self));
        }
    }

    /// Ends the publisher: waits for the item under way, drops what is queued.
    pub(crate) fn close(&self) -> Option<Applier> {
        let applier = lock(&self.applier).take();
        lock(&self.items).clear();
        applier
    }

    /// Runs `work` between two items, which wait for it; the lane goes on with other publishers.
    /// `None` once this one is gone.
    pub(crate) fn hold<T>(self: &Arc<Self>, work: impl FnOnce(&Applier) -> T) -> Option<T> {
        self.holders.fetch_add(1, Ordering::SeqCst);
        let result = lock(&self.applier).as_ref().map(work);
        self.holders.fetch_sub(1, Ordering::SeqCst);
        self.wake();
        result
    }

    fn is_held(&self) -> bool {
        self.holders.load(Ordering::SeqCst) > 0
    }

    /// Puts the pipe on its lane's list if there is something to do and it is not there.
    fn wake(self: &Arc<Self>) {
        if !lock(&self.items).is_empty()
            && !self.is_held()
            && !self.scheduled.swap(true, Ordering::AcqRel)
        {
            self.lane.push(Arc::clone(self));
        }
    }

    pub(crate) fn take_cleared(&self) -> Option<(u64, u64)> {
        lock(&self.cleared).take()
    }

    /// Applies up to one turn of items; `true` when there are more, and nobody holds the pipe.
    fn turn(&self) -> bool {
        let now = Instant::now();
        for _ in 0..TURN {
            if self.is_held() {
                return false;
            }
            // The applier is locked first: once `close` has it, no item is applied any more.
            let mut applier = lock(&self.applier);
            let Some(item) = lock(&self.items).pop_front() else { return false };
            if let Item::Batch { .. } = item {
                self.batches.fetch_sub(1, Ordering::Relaxed);
            }
            self.bytes.fetch_sub(item.bytes(), Ordering::Relaxed);
            let Some(applier) = applier.as_mut() else { return false };
            match item {
                Item::Batch { sequence, payload, payload_hash, timestamp } => {
                    applier.batch(sequence, &payload, now);
                    applier.position.applied(sequence, payload_hash, timestamp);
                    if let Some(cleared) = applier.take_cleared() {
                        *lock(&self.cleared) = Some(cleared);
                    }
                }
                Item::Reset { epoch } => applier.reset(epoch),
                Item::Rebuild => applier.rebuild(),
                Item::CountMode(mode) => applier.count_mode(mode),
                Item::Loss(reason) => applier.lost(reason.as_str(), now),
                Item::State(state, reason, trust) => {
                    applier.position.trust(trust);
                    applier.state(state, reason);
                }
            }
        }
        true
    }
}

/// The pipes that have something to do; each at most once, so the list is bounded by the pods.
#[derive(Debug, Default)]
struct Ready {
    list: Mutex<(VecDeque<Arc<Pipe>>, bool)>,
    more: Condvar,
}

impl Ready {
    fn push(&self, pipe: Arc<Pipe>) {
        lock(&self.list).0.push_back(pipe);
        self.more.notify_one();
    }

    /// The next pipe; `None` after `patience`; `Err` when the lane is to stop and nothing is left.
    fn pop(&self, patience: Duration) -> Result<Option<Arc<Pipe>>, Stopped> {
        let mut list = lock(&self.list);
        if list.0.is_empty() && !list.1 {
            list = self.more.wait_timeout(list, patience).unwrap_or_else(PoisonError::into_inner).0;
        }
        match list.0.pop_front() {
            Some(pipe) => Ok(Some(pipe)),
            None if list.1 => Err(Stopped),
            None => Ok(None),
        }
    }
}

struct Stopped;

/// Every pipe with its lane.
type Pipes = Vec<(usize, Weak<Pipe>)>;

/// The writer threads.
#[derive(Debug)]
pub(crate) struct Lanes {
    ready: Vec<Arc<Ready>>,
    pipes: Arc<Mutex<Pipes>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    next: AtomicUsize,
}

impl Lanes {
    /// Starts `count` lanes.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started.
    pub(crate) fn start(count: usize) -> std::io::Result<Self> {
        let mut lanes = Self {
            ready: Vec::new(),
            pipes: Arc::default(),
            threads: Mutex::default(),
            next: AtomicUsize::new(0),
        };
        for lane in 0..count.max(1) {
            let ready = Arc::new(Ready::default());
            let (own, pipes) = (Arc::clone(&ready), Arc::clone(&lanes.pipes));
            let thread = std::thread::Builder::new()
                .name(format!("lane-{lane}"))
                .spawn(move || run(lane, &own, &pipes))?;
            lanes.ready.push(ready);
            lock(&lanes.threads).push(thread);
        }
        Ok(lanes)
    }

    /// A queue for a publisher, on the lane that has the fewest turns to give next.
    pub(crate) fn pipe(&self, applier: Applier) -> Arc<Pipe> {
        let lane = self.next.fetch_add(1, Ordering::Relaxed) % self.ready.len();
        let pipe = Arc::new(Pipe {
            lane: Arc::clone(&self.ready[lane]),
            items: Mutex::default(),
            batches: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            scheduled: AtomicBool::new(false),
            applier: Mutex::new(Some(applier)),
            cleared: Mutex::default(),
            holders: AtomicUsize::new(0),
        });
        let mut pipes = lock(&self.pipes);
        pipes.retain(|(_, pipe)| pipe.strong_count() > 0);
        pipes.push((lane, Arc::downgrade(&pipe)));
        pipe
    }

    /// The queues of all publishers.
    pub(crate) fn pipes(&self) -> Vec<Arc<Pipe>> {
        lock(&self.pipes).iter().filter_map(|(_, pipe)| pipe.upgrade()).collect()
    }

    /// Has a lane ended? Before [`stop`](Self::stop) none does by itself.
    pub(crate) fn has_ended(&self) -> bool {
        lock(&self.threads).iter().any(JoinHandle::is_finished)
    }

    /// Lets the lanes finish what is queued, for `patience` at most, and joins them.
    ///
    /// # Errors
    ///
    /// When not everything was applied: for want of time, or because a lane panicked.
    pub(crate) fn stop(&self, patience: Duration) -> anyhow::Result<()> {
        for ready in &self.ready {
            lock(&ready.list).1 = true;
            ready.more.notify_all();
        }
        let mut threads = lock(&self.threads);
        let deadline = Instant::now() + patience;
        while threads.iter().any(|thread| !thread.is_finished()) {
            if Instant::now() >= deadline {
                anyhow::bail!("queued batches were not applied within {patience:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let panicked = threads.drain(..).filter_map(|thread| thread.join().err()).count();
        anyhow::ensure!(panicked == 0, "{panicked} lanes panicked");
        Ok(())
    }
}

fn run(lane: usize, ready: &Ready, pipes: &Mutex<Pipes>) {
    let mut swept = Instant::now();
    // There is more to drop than was dropped at once.
    let mut pressing = false;
    while let Ok(pipe) = ready.pop(if pressing { Duration::ZERO } else { HOUSEKEEPING }) {
        if let Some(pipe) = pipe {
            if pipe.turn() {
                ready.push(pipe);
            } else {
                pipe.scheduled.store(false, Ordering::Release);
                // An item that came between the last look and the flag would wait for the next.
                pipe.wake();
            }
        }
        let now = Instant::now();
        if pressing || now.duration_since(swept) >= HOUSEKEEPING {
            (swept, pressing) = (now, false);
            let own: Vec<Arc<Pipe>> = lock(pipes)
                .iter()
                .filter(|(of, _)| *of == lane)
                .filter_map(|(_, pipe)| pipe.upgrade())
                .collect();
            for pipe in own.into_iter().filter(|pipe| !pipe.is_held()) {
                if let Some(applier) = &mut *lock(&pipe.applier) {
                    applier.expire_orphans(now);
                    pressing |= applier.age(now);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_panicked_is_noticed_and_reported() {
        let patience = Duration::from_secs(10);
        let lanes = Lanes::start(2).unwrap();
        assert!(!lanes.has_ended());
        lanes.stop(patience).unwrap();
        let lanes = Lanes::start(2).unwrap();
        lock(&lanes.threads).push(std::thread::spawn(|| panic!("by design")));
        let deadline = Instant::now() + patience;
        while !lanes.has_ended() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(lanes.has_ended());
        assert_eq!(lanes.stop(patience).unwrap_err().to_string(), "1 lanes panicked");
    }
}
