//! From the engines' ZeroMQ streams to the index.
//!
//! ```text
//!  SUB sockets ─▶ subscriber threads ─▶ sequencer per publisher ─▶ queue per publisher ─▶ lanes ─▶ index
//!                      ▲    DEALER (replay) ─┘                                              └─▶ rows
//!  pods: configuration, pods file, discovery, RegisterPod
//! ```
//!
//! # Invariants
//!
//! * A publisher's batches are applied in order, by one lane.
//! * A row's state becomes true in the queue's order: `live` is shown when the last batch that it
//!   rests on is visible.
//! * Every queue is bounded; what does not fit is lost as on the network, shows as a gap, and is
//!   asked for again.
//! * After [`Ingest::remove`] returned, nothing of the pod is visible and nothing is applied any more.

mod apply;
pub mod bench;
pub mod config;
pub mod curve;
pub mod discovery;
pub mod fleet;
mod frame;
mod lane;
mod line;
pub mod llmd;
pub mod loss;
pub mod metrics;
mod peers;
mod publisher;
pub mod sequencer;
pub mod snapshot;
pub mod speculation;
mod subscriber;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

pub use self::config::IngestConfig;
use self::{
    apply::Shared,
    curve::Keys,
    fleet::{Fleet, PodDeclaration},
    lane::{Lanes, Pipe},
    metrics::IngestMetrics,
    publisher::Context,
    subscriber::{Command, Subscriber},
};
use crate::{hash::Models, model::TierTable, support::sync::lock};

/// How long a command to a subscriber thread may take.
const ANSWER: Duration = Duration::from_secs(10);
/// The thread that has the bound socket, if there is one.
const BOUND: usize = 0;
/// Why a pod without endpoint is refused.
const NOT_BOUND: &str = "it has none, and there is no bound socket that it could connect to";

/// The running ingest path. [`stop`](Self::stop) it before it is dropped.
#[derive(Debug)]
pub struct Ingest {
    context: Arc<Context>,
    subscribers: Vec<Subscriber>,
    /// [`ANSWER`]; tests have less.
    patience: Duration,
    /// Who declared what, and on which thread it runs.
    declared: Mutex<HashMap<Key, Declared>>,
    /// From [`stop`](Self::stop) on: the queues of the publishers, which are gone themselves.
    last: Mutex<Vec<Arc<Pipe>>>,
}

/// Pod and declared rank.
pub(crate) type Key = (String, Option<u32>);

#[derive(Debug)]
struct Declared {
    declaration: Arc<PodDeclaration>,
    thread: usize,
}

/// Why a pod was not added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// As many rows as configured.
    #[error("no room for pod {0}")]
    Full(String),
    /// An endpoint that ZeroMQ refuses.
    #[error("pod {pod}: its endpoint cannot be used: {why}")]
    Endpoint {
        /// The pod.
        pod: String,
        /// What is wrong with it.
        why: String,
    },
    /// No socket can be had.
    #[error("no socket for pod {0}: {1}")]
    Refused(String, String),
    /// The subscriber thread did not answer; it undoes what it may still begin.
    #[error("the subscriber thread does not answer")]
    Busy,
}

impl AddError {
    fn endpoint(pod: &str, why: &str) -> Self {
        Self::Endpoint { pod: pod.to_owned(), why: why.to_owned() }
    }
}

impl Ingest {
    /// Starts the threads, and the bound socket if one is configured. The configured pods are not
    /// added yet.
    ///
    /// # Errors
    ///
    /// When a thread or a socket cannot be made, or the bind address is taken.
    pub fn start(
        config: IngestConfig,
        models: Models,
        tiers: Arc<TierTable>,
        fleet: Arc<Fleet>,
        metrics: IngestMetrics,
    ) -> anyhow::Result<Self> {
        let curve = config.curve.as_ref().map(Keys::load).transpose()?;
        let lanes = Lanes::start(config.lanes)?;
        let threads = config.lanes.max(1);
        let shared = Arc::new(Shared {
            fleet,
            tiers,
            metrics,
            limits: config.limits.clone(),
            orphan_timeout: config.orphan_timeout,
            loss: config.loss.clone(),
        });
        let bind = config.bind.clone();
        let context = Arc::new(Context { config, models, shared, lanes, curve });
        let subscribers = (0..threads)
            .map(|number| Subscriber::start(&context, number))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let ingest = Self {
            context,
            subscribers,
            patience: ANSWER,
            declared: Mutex::default(),
            last: Mutex::default(),
        };
        if let Some(endpoint) = bind {
            ingest.bind(&endpoint)?;
        }
        Ok(ingest)
    }

    fn bind(&self, endpoint: &str) -> anyhow::Result<()> {
        let (heard, answer) = sync_channel(0);
        let told = self.subscribers[BOUND].tell(Command::Bind(endpoint.into(), heard));
        anyhow::ensure!(told, "the subscriber thread does not take commands");
        match answer.recv_timeout(ANSWER) {
            Ok(Ok(bound)) => {
                tracing::info!(endpoint = bound, "Engines may connect.");
                Ok(())
            }
            Ok(Err(error)) => anyhow::bail!("cannot bind {endpoint}: {error}"),
            Err(_) => anyhow::bail!("the subscriber thread does not answer"),
        }
    }

    /// Subscribes to a publisher; one without endpoint is expected at our bound socket. An equal
    /// declaration is a no-op; a different one for the same pod and rank replaces it. Blocks for the time of a few system calls.
    ///
    /// # Errors
    ///
    /// [`AddError`].
    pub fn add(&self, declaration: PodDeclaration) -> Result<(), AddError> {
        let key = (declaration.pod.clone(), declaration.rank);
        let mut declared = lock(&self.declared);
        if declared.get(&key).is_some_and(|known| *known.declaration == declaration) {
            return Ok(());
        }
        if let Some(old) = declared.remove(&key) {
            self.unsubscribe(&key, &old);
        }
        if declaration.endpoint.is_empty() {
            return self.expect(&mut declared, key, declaration);
        }
        let thread = (0..self.subscribers.len())
            .min_by_key(|thread| declared.values().filter(|other| other.thread == *thread).count())
            .unwrap_or_default();
        let declaration = Arc::new(declaration);
        self.ask(thread, |heard| Command::Add(Arc::clone(&declaration), heard))
            .unwrap_or(Err(AddError::Busy))?;
        // It may have come to the bound socket by itself before.
        self.dismiss(&key);
        declared.insert(key, Declared { declaration, thread });
        Ok(())
    }

    fn expect(
        &self,
        declared: &mut HashMap<Key, Declared>,
        key: Key,
        declaration: PodDeclaration,
    ) -> Result<(), AddError> {
        if self.context.config.bind.is_none() {
            return Err(AddError::endpoint(&key.0, NOT_BOUND));
        }
        let declaration = Arc::new(declaration);
        let expect = |heard| Command::Expect(Arc::clone(&declaration), heard);
        self.ask(BOUND, expect).unwrap_or(Err(AddError::Busy))?;
        declared.insert(key, Declared { declaration, thread: BOUND });
        Ok(())
    }

    /// Ends the publisher declared for this pod and rank, or come by itself to the bound socket;
    /// `rank` absent: every one of the pod. Returns whether there was one. When it returns, no trace
    /// is visible any more. An engine that goes on sending to the bound socket is from then on one
    /// that nobody configured.
    pub fn remove(&self, pod: &str, rank: Option<u32>) -> bool {
        let mut declared = lock(&self.declared);
        let keys: Vec<_> = declared
            .keys()
            .filter(|(known, of)| known == pod && (rank.is_none() || *of == rank))
            .cloned()
            .collect();
        for key in &keys {
            if let Some(old) = declared.remove(key) {
                self.unsubscribe(key, &old);
            }
        }
        let came = self.dismiss(&(pod.to_owned(), rank));
        came || !keys.is_empty()
    }

    /// Ends the one publisher declared so; those of other ranks go on.
    pub(crate) fn remove_one(&self, key: &Key) {
        if let Some(old) = lock(&self.declared).remove(key) {
            self.unsubscribe(key, &old);
        }
    }

    /// What is declared for a pod and rank.
    #[must_use]
    pub fn declaration(&self, pod: &str, rank: Option<u32>) -> Option<PodDeclaration> {
        let declared = lock(&self.declared);
        declared.get(&(pod.to_owned(), rank)).map(|known| (*known.declaration).clone())
    }

    /// Sockets that are subscribed, connected or not.
    #[must_use]
    pub fn subscriptions(&self) -> usize {
        let connects = |known: &&Declared| !known.declaration.endpoint.is_empty();
        lock(&self.declared).values().filter(connects).count()
            + usize::from(self.context.config.bind.is_some())
    }

    fn unsubscribe(&self, key: &Key, declared: &Declared) {
        if declared.declaration.endpoint.is_empty() {
            self.dismiss(key);
        } else {
            let remove = |heard| Command::Remove(key.0.clone(), key.1, heard);
            self.ask(declared.thread, remove);
        }
    }

    /// Ends what came to the bound socket under this name.
    fn dismiss(&self, key: &Key) -> bool {
        let dismiss = |heard| Command::Dismiss(key.0.clone(), key.1, heard);
        self.context.config.bind.is_some() && self.ask(BOUND, dismiss) == Some(true)
    }

    /// What a thread says to a command; `None` when it says nothing.
    fn ask<T>(&self, thread: usize, command: impl FnOnce(SyncSender<T>) -> Command) -> Option<T> {
        // Without room, so that the thread knows whether its answer was heard.
        let (heard, answer) = sync_channel(0);
        let told = self.subscribers[thread].tell(command(heard));
        let said = if told { answer.recv_timeout(self.patience).ok() } else { None };
        if said.is_none() {
            tracing::error!(thread, "The subscriber thread does not answer.");
        }
        said
    }

    /// Do all threads run, as they do until [`stop`](Self::stop)?
    ///
    /// # Errors
    ///
    /// When one has ended: its publishers are frozen, and nothing brings it back.
    pub fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.context.lanes.has_ended(), "a lane ended early");
        let ended = self.subscribers.iter().any(Subscriber::has_ended);
        anyhow::ensure!(!ended, "a subscriber thread ended early");
        Ok(())
    }

    /// Writes a snapshot of every row, also after [`stop`](Self::stop). Blocks for as long as `out`
    /// does.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn snapshot(&self, out: &mut dyn std::io::Write) -> std::io::Result<snapshot::Exported> {
        snapshot::write(&self.context.lanes, &self.context.shared, out)
    }

    /// Closes the sockets, applies what is queued for `patience` at most, and joins the threads.
    ///
    /// # Errors
    ///
    /// When not everything was received and applied: a thread panicked, or there was no time.
    pub fn stop(&self, patience: Duration) -> anyhow::Result<()> {
        *lock(&self.last) = self.context.lanes.pipes();
        // All of them, whatever became of the first.
        let received: Vec<_> = self.subscribers.iter().map(Subscriber::stop).collect();
        self.context.lanes.stop(patience)?;
        received.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{IndexConfig, naive::NaiveIndex};

    fn ingest(config: IngestConfig) -> Ingest {
        let fleet = Arc::new(Fleet::new(Arc::new(NaiveIndex::new(IndexConfig::default()))));
        let metrics = IngestMetrics::register(&prometheus::Registry::new()).unwrap();
        Ingest::start(config, Models::default(), Arc::default(), fleet, metrics).unwrap()
    }

    #[test]
    fn a_subscriber_thread_that_panicked_is_noticed_and_reported() {
        let ingest = ingest(IngestConfig::default());
        ingest.check().unwrap();
        assert!(ingest.subscribers[0].tell(Command::Panic));
        let deadline = std::time::Instant::now() + ANSWER;
        while ingest.check().is_ok() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        let early = ingest.check().unwrap_err().to_string();
        assert_eq!(early, "a subscriber thread ended early");
        let stopped = ingest.stop(ANSWER).unwrap_err().to_string();
        assert_eq!(stopped, "a subscriber thread panicked");
    }

    #[test]
    fn a_pod_that_was_added_too_late_is_taken_back() {
        let config =
            IngestConfig { lanes: 1, bind: Some("tcp://127.0.0.1:*".into()), ..Default::default() };
        let mut ingest = ingest(config);
        ingest.patience = Duration::from_millis(20);
        let pod = |endpoint: &str| PodDeclaration {
            pod: "a".to_owned(),
            endpoint: endpoint.to_owned(),
            ..Default::default()
        };
        let rows = |ingest: &Ingest| ingest.context.shared.fleet.table().rows.len();
        for endpoint in ["tcp://127.0.0.1:1", ""] {
            let (go_on, paused) = sync_channel(0);
            assert!(ingest.subscribers[0].tell(Command::Pause(paused)));
            assert_eq!(ingest.add(pod(endpoint)), Err(AddError::Busy));
            drop(go_on);
            ingest.patience = ANSWER;
            // Commands are obeyed in order, so the late one is done.
            assert!(!ingest.remove("a", None), "{endpoint:?}");
            assert_eq!((rows(&ingest), ingest.subscriptions()), (0, 1), "{endpoint:?}");
            ingest.patience = Duration::from_millis(20);
        }
        ingest.patience = ANSWER;
        ingest.add(pod("tcp://127.0.0.1:1")).unwrap();
        assert_eq!(rows(&ingest), 1);
        ingest.stop(ANSWER).unwrap();
    }

    /// A thread that is held up, an engine that sends and dies meanwhile: libzmq must go on, and try to
    /// connect again.
    #[test]
    fn an_engine_may_die_while_its_messages_wait() {
        let config = IngestConfig {
            receive_high_water_mark: 4,
            heartbeat: Duration::from_millis(20),
            reconnect: Duration::from_millis(5),
            reconnect_max: Duration::from_millis(20),
            ..IngestConfig::default()
        };
        let ingest = ingest(config);
        let engine = zmq::Context::new().socket(zmq::XPUB).unwrap();
        engine.set_linger(0).unwrap();
        engine.set_rcvtimeo(ANSWER.as_millis() as i32).unwrap();
        engine.bind("tcp://127.0.0.1:*").unwrap();
        let endpoint = engine.get_last_endpoint().unwrap().unwrap();
        let pod = PodDeclaration {
            pod: "a".to_owned(),
            endpoint: endpoint.clone(),
            ..PodDeclaration::default()
        };
        ingest.add(pod).unwrap();
        assert_eq!(engine.recv_bytes(0).unwrap().first(), Some(&1), "subscribed");
        let (go_on, paused) = sync_channel(0);
        assert!(ingest.subscribers[0].tell(Command::Pause(paused)));
        for sequence in 0..500_u64 {
            let number = sequence.to_be_bytes();
            engine.send_multipart([&b"kv@a@m"[..], &number, &[0; 16_384]], 0).unwrap();
        }
        drop(engine);
        // libzmq's own thread comes back, though ours does not run.
        let address = endpoint.trim_start_matches("tcp://");
        let deadline = std::time::Instant::now() + ANSWER;
        let next = loop {
            match std::net::TcpListener::bind(address) {
                Ok(listener) => break listener,
                Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
            }
        };
        next.set_nonblocking(true).unwrap();
        while let Err(error) = next.accept() {
            assert!(std::time::Instant::now() < deadline, "{error}");
            std::thread::yield_now();
        }
        drop(go_on);
        ingest.stop(ANSWER).unwrap();
    }

    #[test]
    fn an_endpoint_that_cannot_be_used_is_not_want_of_room() {
        let ingest = ingest(IngestConfig::default());
        for endpoint in ["", "udp://127.0.0.1:1", "tcp://127.0.0.1"] {
            let pod = PodDeclaration {
                pod: "a".to_owned(),
                endpoint: endpoint.to_owned(),
                ..Default::default()
            };
            let added = ingest.add(pod);
            assert!(
                matches!(&added, Err(AddError::Endpoint { pod, .. }) if pod == "a"),
                "{added:?}"
            );
        }
        assert!(ingest.context.shared.fleet.table().rows.is_empty());
        ingest.stop(ANSWER).unwrap();
    }
}
