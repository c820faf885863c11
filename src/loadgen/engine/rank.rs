//! One data-parallel rank: a scheduler with its cache, its publisher, and the thread that steps them.
//!
//! # Concurrency
//!
//! The thread holds the lock while it plans a step, lets go of it while the model would run, and takes
//! it again to end the step: events are published first, so that who has an answer can ask for them,
//! then tokens are handed out. Servers take the lock to submit, to abort and to look.
//!
//! # Bounds
//!
//! Requests that wait are limited by `max_waiting`; each has a channel with room for its whole answer,
//! so that handing out a token never blocks.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{
    cache::{CachedBlock, RequestId},
    metrics::{Latencies, Load, RankPage},
    scheduler::{Outcome, Output, Request, Scheduler, Totals},
};
use crate::{
    loadgen::{
        recording::Batch,
        replay::{PublishError, sockets::Sockets},
    },
    support::{clock::unix_ns, sync::lock},
    wire::encode::{self, Form},
};

/// How long a rank that has nothing to do sleeps at most.
const IDLE: Duration = Duration::from_millis(100);
/// How much of the next step a late end of the one before may take away.
const CATCH_UP: Duration = Duration::from_millis(1);

/// Where a rank publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventSource {
    /// Data-parallel rank.
    pub rank: u32,
    /// PUB socket, with the real port.
    pub endpoint: String,
    /// Replay socket, with the real port, if there is one.
    pub replay_endpoint: Option<String>,
    /// Topic of its messages.
    pub topic: String,
}

/// What a rank's cache holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CacheContents {
    /// Every hash that a lookup could find, by hash.
    pub blocks: Vec<CachedBlock>,
    /// Events that are not published yet: a step runs, or the cache was reset and no step followed.
    pub pending_events: usize,
    /// Sequence of the last batch that was published.
    pub last_sequence: Option<u64>,
}

/// The rank cannot take another request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("too many requests wait")]
    Full,
    #[error("the engine is stopping")]
    Stopped,
}

/// A publisher of batches as they are made.
pub(super) struct Live {
    sockets: Sockets<Arc<Batch>>,
    topic: String,
    form: Form,
    next: u64,
}

impl Live {
    pub(super) fn new(sockets: Sockets<Arc<Batch>>, topic: String, form: Form) -> Self {
        Self { sockets, topic, form, next: 0 }
    }

    fn publish(&mut self, events: Vec<encode::Event>, rank: u32) -> Result<(), PublishError> {
        let timestamp = unix_ns() as f64 / 1e9;
        let batch = encode::Batch { timestamp, events, rank: Some(rank) };
        let sequence = self.next;
        // As the engine: what cannot be encoded has used up its sequence.
        self.next += 1;
        let Ok(payload) = batch.encode(self.form) else { return Ok(()) };
        let batch = Batch { topic: self.topic.clone(), sequence, payload, arrived: None };
        self.sockets.send(Arc::new(batch), true)?;
        Ok(())
    }
}

struct Sink {
    outputs: mpsc::Sender<Output>,
    arrived: Instant,
}

struct State {
    scheduler: Scheduler,
    live: Option<Live>,
    sinks: HashMap<RequestId, Sink>,
    next_id: RequestId,
    latencies: Latencies,
    max_waiting: usize,
    stepping: bool,
    stopped: bool,
    fault: Option<String>,
}

/// See the module's page.
pub(super) struct Rank {
    number: u32,
    state: Mutex<State>,
    wake: Condvar,
}

impl fmt::Debug for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rank").field("number", &self.number).finish_non_exhaustive()
    }
}

/// A request in a rank. Dropping it aborts the request.
#[derive(Debug)]
pub(super) struct Ticket {
    rank: Arc<Rank>,
    id: RequestId,
    /// Its tokens; closed without a last one when the engine stops.
    pub(super) outputs: mpsc::Receiver<Output>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = lock(&self.rank.state);
        if state.sinks.remove(&self.id).is_some() {
            state.scheduler.abort(self.id);
        }
    }
}

impl Rank {
    pub(super) fn new(
        number: u32,
        scheduler: Scheduler,
        live: Option<Live>,
        max_waiting: usize,
    ) -> Arc<Self> {
        let state = State {
            scheduler,
            live,
            sinks: HashMap::new(),
            next_id: 0,
            latencies: Latencies::default(),
            max_waiting,
            stepping: false,
            stopped: false,
            fault: None,
        };
        Arc::new(Self { number, state: Mutex::new(state), wake: Condvar::new() })
    }

    /// Starts its thread.
    pub(super) fn start(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        let rank = Arc::clone(self);
        thread::Builder::new().name(format!("engine-{}", self.number)).spawn(move || rank.run())
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn source(&self) -> Option<EventSource> {
        let state = lock(&self.state);
        let live = state.live.as_ref()?;
        Some(EventSource {
            rank: self.number,
            endpoint: live.sockets.endpoint().to_owned(),
            replay_endpoint: live.sockets.replay_endpoint().map(str::to_owned),
            topic: live.topic.clone(),
        })
    }

    /// Queues a request; `make` gets its name. Its latencies run from `arrived`.
    pub(super) fn submit(
        self: &Arc<Self>,
        arrived: Instant,
        make: impl FnOnce(RequestId) -> Request,
    ) -> Result<Ticket, Refusal> {
        let mut state = lock(&self.state);
        if state.stopped {
            return Err(Refusal::Stopped);
        }
        if state.scheduler.waiting() >= state.max_waiting {
            return Err(Refusal::Full);
        }
        let id = state.next_id;
        state.next_id += 1;
        let request = make(id);
        let (outputs, receiver) = mpsc::channel(request.max_tokens.max(1));
        state.sinks.insert(id, Sink { outputs, arrived });
        state.scheduler.submit(request);
        drop(state);
        self.wake.notify_all();
        Ok(Ticket { rank: Arc::clone(self), id, outputs: receiver })
    }

    pub(super) fn reset_cache(&self) -> bool {
        lock(&self.state).scheduler.reset_cache()
    }

    pub(super) fn contents(&self) -> CacheContents {
        let state = lock(&self.state);
        let mut blocks: Vec<CachedBlock> = state.scheduler.cache().contents().collect();
        blocks.sort_unstable_by_key(|block| block.hash);
        CacheContents {
            blocks,
            pending_events: state.scheduler.cache().pending_events(),
            last_sequence: state.live.as_ref().and_then(|live| live.next.checked_sub(1)),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        lock(&self.state).scheduler.totals()
    }

    /// Has it neither requests nor a step under way?
    pub(super) fn is_idle(&self) -> bool {
        let state = lock(&self.state);
        !state.stepping && state.scheduler.running() == 0 && state.scheduler.waiting() == 0
    }

    /// Is anybody subscribed to its topic? Without a publisher: yes.
    pub(super) fn has_subscriber(&self) -> Result<bool, PublishError> {
        let mut state = lock(&self.state);
        let Some(live) = &mut state.live else { return Ok(true) };
        let topic = live.topic.clone();
        live.sockets.has_subscriber(Some(topic.as_bytes()))
    }

    pub(super) fn page(&self) -> RankPage {
        let state = lock(&self.state);
        let scheduler = &state.scheduler;
        RankPage {
            load: Load {
                running: scheduler.running(),
                waiting: scheduler.waiting(),
                kv_usage: scheduler.cache().usage(),
            },
            totals: scheduler.totals(),
            latencies: state.latencies.clone(),
            loras: scheduler.loras(),
        }
    }

    /// Why it stopped by itself, if it did.
    pub(super) fn fault(&self) -> Option<String> {
        lock(&self.state).fault.clone()
    }

    /// Ends its thread, and every request with it.
    pub(super) fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopped = true;
        state.sinks.clear();
        drop(state);
        self.wake.notify_all();
    }

    /// Closes its sockets, flushing what is queued or, `abruptly`, not. Blocks for up to two seconds.
    pub(super) fn close(&self, abruptly: bool) {
        let live = lock(&self.state).live.take();
        if let Some(live) = live.filter(|_| abruptly) {
            live.sockets.abandon();
        }
    }

    fn run(&self) {
        let mut state = lock(&self.state);
        // When the step before was meant to end, if this one follows on it.
        let mut ended = None;
        while !state.stopped {
            let Some(takes) = state.scheduler.begin() else {
                state =
                    self.wake.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner).0;
                ended = None;
                continue;
            };
            state.stepping = true;
            // What planning, handing out and waking up take is not the model's time. It is made up for by
            // one step at most, so that a machine that is too slow shows.
            let now = Instant::now();
            let earliest = now.checked_sub(takes.min(CATCH_UP)).unwrap_or(now);
            let began = ended.map_or(now, |ended: Instant| ended.clamp(earliest, now));
            let until = began + takes;
            ended = Some(until);
            while !state.stopped {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state =
                    self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            if state.stopped {
                return;
            }
            let outcome = state.scheduler.finish();
            state.stepping = false;
            if let Err(error) = state.hand_out(outcome, self.number) {
                tracing::warn!(%error, rank = self.number, "The engine cannot publish.");
                state.fault = Some(error.to_string());
                state.stopped = true;
                state.sinks.clear();
            }
        }
    }
}

impl State {
    fn hand_out(&mut self, outcome: Outcome, rank: u32) -> Result<(), PublishError> {
        let Outcome { outputs, events } = outcome;
        if let Some(live) = self.live.as_mut().filter(|_| !events.is_empty()) {
            live.publish(events, rank)?;
        }
        for output in outputs {
            let Some(sink) = self.sinks.get(&output.request) else { continue };
            let seconds = sink.arrived.elapsed().as_secs_f64();
            if output.first {
                self.latencies.ttft.observe(seconds);
            }
            if output.last {
                self.latencies.e2e.observe(seconds);
            }
            // There is room for every token; who does not listen any more drops its ticket.
            sink.outputs.try_send(output).ok();
            if output.last {
                self.sinks.remove(&output.request);
            }
        }
        Ok(())
    }
}
