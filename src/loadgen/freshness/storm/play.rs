//! The thread that publishes a storm.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    StormOptions,
    cache::{Cache, Composed},
};
use crate::{
    loadgen::{
        freshness::{Board, PodHandle},
        recording::Batch,
        replay::{PublisherOptions, sockets::Sockets},
    },
    support::{clock::unix_ns, sync::lock},
};

/// Sends that are remembered per publisher until they are applied.
const MOST_PENDING: usize = 1 << 16;
/// It looks this often whether it should stop.
const NAP: Duration = Duration::from_millis(20);
/// Nothing is encoded ahead so shortly before the next send.
const SPARE: Duration = Duration::from_micros(300);

/// What a publisher has sent in its present life.
#[derive(Debug, Default)]
pub(in crate::loadgen::freshness) struct Ledger {
    /// Counts its restarts.
    pub(in crate::loadgen::freshness) life: u64,
    /// Its next sequence.
    pub(in crate::loadgen::freshness) next: u64,
    /// Sequences that are not known to be applied, oldest first, and when they were sent.
    pub(in crate::loadgen::freshness) pending: VecDeque<(u64, Instant)>,
}

/// A burst that left.
#[derive(Clone, Debug)]
pub(in crate::loadgen::freshness) struct Burst {
    /// Its first send.
    pub(in crate::loadgen::freshness) began: Instant,
    /// After its last send.
    pub(in crate::loadgen::freshness) sent: Instant,
    /// Publisher, and its last sequence in the burst.
    pub(in crate::loadgen::freshness) last: Vec<(usize, u64)>,
}

/// One publisher.
pub(in crate::loadgen::freshness) struct Source {
    /// Its pod.
    pub(in crate::loadgen::freshness) pod: PodHandle,
    /// What it holds.
    pub(in crate::loadgen::freshness) cache: Cache,
    /// What it sent.
    pub(in crate::loadgen::freshness) ledger: Arc<Mutex<Ledger>>,
    sockets: Sockets<Arc<Batch>>,
    /// To be sent after its successor.
    held_back: Option<Arc<Batch>>,
}

impl Source {
    /// Binds number `number`.
    pub(in crate::loadgen::freshness) fn bind(
        options: &StormOptions,
        mut pod: PodHandle,
        at: &str,
        block_size: usize,
        number: usize,
    ) -> Result<Self> {
        // Nothing may be lost here without a word: no limit on what is queued.
        let publisher = PublisherOptions {
            replay: Some(at.to_owned()),
            high_water_mark: 0,
            buffer_steps: 20_000,
            ..PublisherOptions::default()
        };
        let sockets = Sockets::bind(at, publisher, Duration::ZERO)?;
        pod.endpoint = sockets.endpoint().to_owned();
        pod.replay = sockets.replay_endpoint().unwrap_or_default().to_owned();
        let cache = Cache::new(options, pod.topic(), block_size, number);
        Ok(Self { pod, cache, ledger: Arc::default(), sockets, held_back: None })
    }

    /// Is anyone subscribed?
    pub(in crate::loadgen::freshness) fn has_subscriber(&mut self) -> Result<bool> {
        Ok(self.sockets.has_subscriber(None)?)
    }

    /// Sends a message; the sequence that it got.
    fn send(&mut self, message: &Composed, fate: Fate) -> Result<u64> {
        let sequence = {
            let mut ledger = lock(&self.ledger);
            let sequence = ledger.next;
            ledger.next += 1;
            if ledger.pending.len() < MOST_PENDING {
                ledger.pending.push_back((sequence, Instant::now()));
            }
            sequence
        };
        let batch = Arc::new(message.stamped(sequence, unix_ns()));
        self.cache.sent(message);
        let late = self.held_back.take();
        let publish = matches!(fate, Fate::Sent | Fate::Twice);
        self.sockets.send(Arc::clone(&batch), publish)?;
        match fate {
            Fate::Twice => {
                self.sockets.send(batch, true)?;
            }
            Fate::Late => self.held_back = Some(batch),
            Fate::Sent | Fate::Lost => {}
        }
        if let Some(late) = late {
            self.sockets.send(late, true)?;
        }
        Ok(sequence)
    }

    fn restart(&mut self) -> Result<()> {
        self.held_back = None;
        self.sockets.restart()?;
        self.cache.clear();
        let mut ledger = lock(&self.ledger);
        *ledger = Ledger { life: ledger.life + 1, ..Ledger::default() };
        Ok(())
    }
}

/// What happens to a message on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Sent,
    Lost,
    Twice,
    Late,
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::loadgen::freshness) struct Totals {
    /// Messages.
    pub(in crate::loadgen::freshness) batches: u64,
    /// Blocks stored and removed.
    pub(in crate::loadgen::freshness) blocks: u64,
    /// Bursts.
    pub(in crate::loadgen::freshness) bursts: u64,
    /// From the first to the last send.
    pub(in crate::loadgen::freshness) span: Duration,
}

/// A storm.
pub(in crate::loadgen::freshness) struct Storm {
    /// What is sent.
    pub(in crate::loadgen::freshness) options: StormOptions,
    /// By whom.
    pub(in crate::loadgen::freshness) sources: Vec<Source>,
    /// Where bursts are announced.
    pub(in crate::loadgen::freshness) board: Arc<Board>,
    /// Where bursts that left go.
    pub(in crate::loadgen::freshness) bursts: mpsc::Sender<Burst>,
}

impl Storm {
    /// Publishes until it is stopped, and then one sound message each, which shows what was lost before
    /// it. Returns the publishers: their replay sockets are needed until everything is repaired.
    pub(in crate::loadgen::freshness) fn play(
        mut self,
        stop: &CancellationToken,
    ) -> Result<(Vec<Source>, Totals)> {
        let mut random = fastrand::Rng::with_seed(self.options.seed);
        let mut totals = Totals::default();
        let mut ahead: Vec<(usize, Composed)> = Vec::new();
        let per_message = self.options.message_blocks();
        let wanted = self.options.burst.div_ceil(per_message) as usize;
        let gap = (self.options.rate > 0.0).then(|| per_message as f64 / self.options.rate);
        let began = Instant::now();
        let mut last_send = began;
        let mut next_burst = began + self.options.interval;
        let mut steady = 0_u64;
        while !stop.is_cancelled() {
            let burst_due = (wanted > 0).then_some(next_burst);
            let steady_due = gap.map(|gap| began + Duration::from_secs_f64(gap * steady as f64));
            let due = [burst_due, steady_due].into_iter().flatten().min();
            let now = Instant::now();
            let left = due.map_or(NAP, |due| due.saturating_duration_since(now));
            if !left.is_zero() {
                if left > SPARE && ahead.len() < wanted {
                    self.prepare(&mut ahead)?;
                } else {
                    thread::sleep(left.min(NAP));
                }
            } else if burst_due.is_some_and(|at| at <= now) {
                while ahead.len() < wanted {
                    self.prepare(&mut ahead)?;
                }
                self.burst(&mut ahead, &mut random, &mut totals)?;
                while next_burst <= now {
                    next_burst += self.options.interval;
                }
                last_send = Instant::now();
            } else {
                let at = steady as usize % self.sources.len();
                let message = self.compose(at)?;
                self.send(at, &message, &mut random, &mut totals)?;
                steady += 1;
                last_send = Instant::now();
            }
        }
        totals.span = last_send - began;
        for (at, message) in ahead.iter().rev() {
            self.sources[*at].cache.unsent(message);
        }
        for at in 0..self.sources.len() {
            let message = self.compose(at)?;
            self.sources[at].send(&message, Fate::Sent)?;
            totals.batches += 1;
            totals.blocks += message.blocks;
        }
        Ok((self.sources, totals))
    }

    fn compose(&mut self, at: usize) -> Result<Composed> {
        self.sources[at].cache.compose().context("a message of the storm cannot be encoded")
    }

    fn prepare(&mut self, ahead: &mut Vec<(usize, Composed)>) -> Result<()> {
        let at = ahead.len() % self.sources.len();
        ahead.push((at, self.compose(at)?));
        Ok(())
    }

    fn burst(
        &mut self,
        ahead: &mut Vec<(usize, Composed)>,
        random: &mut fastrand::Rng,
        totals: &mut Totals,
    ) -> Result<()> {
        self.board.begun.fetch_add(1, Ordering::SeqCst);
        let began = Instant::now();
        let mut last = vec![None; self.sources.len()];
        for (at, message) in ahead.drain(..) {
            last[at] = self.send(at, &message, random, totals)?;
        }
        totals.bursts += 1;
        let last = last.into_iter().enumerate().filter_map(|(at, last)| Some((at, last?)));
        let burst = Burst { began, sent: Instant::now(), last: last.collect() };
        if self.bursts.try_send(burst).is_err() {
            // Nobody can tell when it is drained.
            self.board.drained.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Sends a message, or what its fault makes of it.
    fn send(
        &mut self,
        at: usize,
        message: &Composed,
        random: &mut fastrand::Rng,
        totals: &mut Totals,
    ) -> Result<Option<u64>> {
        let faults = self.options.faults;
        let mut happens = |share: f64| share > 0.0 && random.f64() < share;
        let source = &mut self.sources[at];
        if happens(faults.restart) {
            source.restart()?;
        }
        if happens(faults.clear) {
            source.cache.unsent(message);
            let clear = source.cache.compose_clear()?;
            source.cache.clear();
            totals.batches += 1;
            return source.send(&clear, Fate::Sent).map(Some);
        }
        let fate = if happens(faults.gap) {
            Fate::Lost
        } else if happens(faults.duplicate) {
            Fate::Twice
        } else if happens(faults.reorder) {
            Fate::Late
        } else {
            Fate::Sent
        };
        totals.batches += 1;
        totals.blocks += message.blocks;
        source.send(message, fate).map(Some)
    }
}
