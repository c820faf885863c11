//! Subscriber threads: many sockets each, never more than one thread to a socket.
//!
//! ```text
//!  commands ─▶ ┌─ loop ───────────────────────────────────────────────┐
//!  SUB      ─▶ │ frames ─▶ which publisher ─▶ sequencer ─▶ queue/lane │
//!  monitor  ─▶ │ connected, disconnected ─▶ sequencer                 │
//!  DEALER   ─▶ │ replies ─▶ sequencer                                 │
//!              └──────────────────────────────────────────────────────┘
//! ```

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    ingest::{
        AddError, Key, NOT_BOUND,
        discovery::MAX_POD_ID_BYTES,
        fleet::PodDeclaration,
        frame::{self, Frame},
        line::{Change, Line},
        peers,
        publisher::{Context, Publisher, most_frame_bytes},
    },
    support::sync::lock,
    wire::{DecodeError, Frames, Topic, header},
};

/// How long a poll may sleep: deadlines and commands are looked at no later.
const PATIENCE: Duration = Duration::from_millis(50);
/// Messages of one socket per round, so that one publisher cannot keep the others waiting.
const ROUND: usize = 64;
/// Commands that wait at most.
const COMMANDS: usize = 4096;
/// Publishers per ZeroMQ context. Each may have four sockets, its monitor's ends included, and
/// libzmq allows 1 023 to a context.
const CROWD: usize = 200;
/// ZMTP's longest time to live, milliseconds.
const MOST_TTL_MS: i32 = 6_553_500;
/// How long a handshake may take at most, milliseconds; libzmq's default.
const MOST_HANDSHAKE_MS: i32 = 30_000;

/// What a thread is told. The senders have no room: who asked has the answer, or has stopped waiting
/// for it, and then what was begun is undone.
pub(crate) enum Command {
    /// Subscribe.
    Add(Arc<PodDeclaration>, SyncSender<Result<(), AddError>>),
    /// Unsubscribe what was declared under this pod and rank; heard when every trace is gone.
    Remove(String, Option<u32>, SyncSender<bool>),
    /// Serve engines that connect to us.
    Bind(String, SyncSender<Result<String, String>>),
    /// Engines of this pod and rank may connect to us. Heard when what was there of it is gone.
    Expect(Arc<PodDeclaration>, SyncSender<Result<(), AddError>>),
    /// End what came to the bound socket under this pod and rank, and expect it no more; heard when
    /// every trace is gone.
    Dismiss(String, Option<u32>, SyncSender<bool>),
    /// Panic, to see who notices.
    #[cfg(test)]
    Panic,
    /// Wait for a word, or for the end of who could say it.
    #[cfg(test)]
    Pause(Receiver<()>),
}

/// A running thread.
pub(crate) struct Subscriber {
    commands: SyncSender<Command>,
    wake: Mutex<zmq::Socket>,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscriber").finish_non_exhaustive()
    }
}

impl Subscriber {
    /// Starts thread number `number`.
    ///
    /// # Errors
    ///
    /// When a socket or the thread cannot be made.
    pub(crate) fn start(context: &Arc<Context>, number: usize) -> anyhow::Result<Self> {
        let zmq = Arc::new(zmq::Context::new());
        let asleep = zmq.socket(zmq::PAIR)?;
        asleep.bind("inproc://subscriber")?;
        let wake = zmq.socket(zmq::PAIR)?;
        wake.connect("inproc://subscriber")?;
        let (commands, inbox) = sync_channel(COMMANDS);
        let stop = Arc::new(AtomicBool::new(false));
        let mut worker = Worker {
            context: Arc::clone(context),
            asleep,
            inbox,
            stop: Arc::clone(&stop),
            sources: Vec::new(),
            contexts: vec![zmq],
            opened: 0,
        };
        let thread = std::thread::Builder::new()
            .name(format!("subscriber-{number}"))
            .spawn(move || worker.run())?;
        Ok(Self { commands, wake: Mutex::new(wake), stop, thread: Mutex::new(Some(thread)) })
    }

    /// Hands over a command; `false` when the thread has more than it can take.
    pub(crate) fn tell(&self, command: Command) -> bool {
        match self.commands.try_send(command) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => return false,
        }
        self.nudge();
        true
    }

    fn nudge(&self) {
        // A full inproc pipe means that it is about to wake up anyway.
        lock(&self.wake).send("", zmq::DONTWAIT).unwrap_or_default();
    }

    /// Has the thread ended? Before [`stop`](Self::stop) it does not by itself.
    pub(crate) fn has_ended(&self) -> bool {
        lock(&self.thread).as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Closes the sockets and joins the thread.
    ///
    /// # Errors
    ///
    /// When it panicked.
    pub(crate) fn stop(&self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Release);
        self.nudge();
        let ended = lock(&self.thread).take().map(JoinHandle::join);
        anyhow::ensure!(!matches!(ended, Some(Err(_))), "a subscriber thread panicked");
        Ok(())
    }
}

struct Worker {
    context: Arc<Context>,
    asleep: zmq::Socket,
    inbox: Receiver<Command>,
    stop: Arc<AtomicBool>,
    sources: Vec<Source>,
    /// A new one when the others are [crowded](CROWD).
    contexts: Vec<Arc<zmq::Context>>,
    /// Sources opened so far: names their monitors.
    opened: usize,
}

/// One SUB socket and the publishers behind it.
struct Source {
    sub: zmq::Socket,
    kind: Kind,
}

enum Kind {
    /// We connect to one engine; its first rank is the lead, which has the replay socket.
    Connect {
        declaration: Arc<PodDeclaration>,
        line: Line,
        lead: Box<Publisher>,
        others: HashMap<u32, Publisher>,
    },
    /// Engines connect to us.
    Bind { expected: Expected, publishers: HashMap<Key, Publisher> },
}

/// Pods that may connect to us; without a rank, every rank of the pod.
type Expected = HashMap<Key, Arc<PodDeclaration>>;

/// Who is expected under this name: that rank, or every rank.
fn declared<'e>(
    expected: &'e Expected,
    pod: &str,
    rank: Option<u32>,
) -> Option<&'e Arc<PodDeclaration>> {
    expected.get(&(pod.to_owned(), rank)).or_else(|| expected.get(&(pod.to_owned(), None)))
}

impl Source {
    /// Closes the sockets and hands over what they served; a source must not just be dropped.
    fn close(self) -> Kind {
        if let Kind::Connect { line, .. } = &self.kind {
            line.close(&self.sub);
        }
        self.kind
    }

    fn publishers(&mut self) -> Vec<&mut Publisher> {
        match &mut self.kind {
            Kind::Connect { lead, others, .. } => {
                std::iter::once(&mut **lead).chain(others.values_mut()).collect()
            }
            Kind::Bind { publishers, .. } => publishers.values_mut().collect(),
        }
    }
}

impl Worker {
    fn run(&mut self) {
        while !self.stop.load(Ordering::Acquire) {
            if let Err(error) = self.round() {
                tracing::error!(%error, "Polling the subscriptions failed.");
                std::thread::sleep(PATIENCE);
            }
        }
        // Rows stay: what is queued is still applied, and the last snapshot is served until exit.
        for source in self.sources.drain(..) {
            drop(source.close());
        }
    }

    fn round(&mut self) -> zmq::Result<()> {
        let ready = self.poll()?;
        while self.asleep.recv_bytes(zmq::DONTWAIT).is_ok() {}
        while let Ok(command) = self.inbox.try_recv() {
            self.obey(command);
        }
        let now = Instant::now();
        for at in 0..self.sources.len() {
            // Sources added by a command just now are read in the next round.
            let Some(&(sub, dealer)) = ready.get(at) else { break };
            self.watch(at, now);
            if sub {
                self.receive(at, now);
            }
            for publisher in self.sources[at].publishers() {
                if dealer {
                    for _ in 0..ROUND {
                        if !publisher.has_room() || !publisher.replay(now) {
                            break;
                        }
                    }
                }
                publisher.tick(now);
            }
        }
        Ok(())
    }

    /// Waits for any socket. Answers, per source: is the SUB, is any DEALER readable?
    fn poll(&mut self) -> zmq::Result<Vec<(bool, bool)>> {
        let now = Instant::now();
        let mut patience = PATIENCE;
        let mut items = vec![self.asleep.as_poll_item(zmq::POLLIN)];
        let mut dealers = Vec::with_capacity(self.sources.len());
        for source in &self.sources {
            items.push(source.sub.as_poll_item(zmq::POLLIN));
            if let Kind::Connect { line, .. } = &source.kind {
                items.push(line.poll_item());
            }
            let before = items.len();
            let publishers: Vec<&Publisher> = match &source.kind {
                Kind::Connect { lead, others, .. } => {
                    std::iter::once(&**lead).chain(others.values()).collect()
                }
                Kind::Bind { publishers, .. } => publishers.values().collect(),
            };
            for publisher in publishers {
                if let Some(dealer) = publisher.dealer() {
                    items.push(dealer.as_poll_item(zmq::POLLIN));
                }
                if let Some(deadline) = publisher.deadline() {
                    patience = patience.min(deadline.saturating_duration_since(now));
                }
            }
            dealers.push(items.len() - before);
        }
        let patience = i64::try_from(patience.as_millis()).unwrap_or(0);
        match zmq::poll(&mut items, patience) {
            Ok(_) | Err(zmq::Error::EINTR) => {}
            Err(error) => return Err(error),
        }
        let mut readable = items.iter().skip(1).map(zmq::PollItem::is_readable);
        let mut next = || readable.next().unwrap_or(false);
        Ok(self
            .sources
            .iter()
            .zip(dealers)
            .map(|(source, dealers)| {
                let sub = next();
                if let Kind::Connect { .. } = source.kind {
                    next();
                }
                let dealer = (0..dealers).fold(false, |any, _| next() | any);
                (sub, dealer)
            })
            .collect())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add(declaration, heard) => {
                let added = self.connect(&declaration).map(|source| self.sources.push(source));
                if heard.send(added).is_err() {
                    self.disconnect(&declaration.pod, declaration.rank);
                }
            }
            Command::Remove(pod, rank, heard) => {
                let any = self.disconnect(&pod, rank);
                heard.send(any).unwrap_or_default();
            }
            Command::Bind(endpoint, heard) => {
                let bound = self.bind(&endpoint).map_err(|error| error.to_string());
                heard.send(bound).unwrap_or_default();
            }
            Command::Expect(declaration, heard) => {
                let key = (declaration.pod.clone(), declaration.rank);
                self.dismiss(&key);
                let added = match self.bound() {
                    Some((expected, _)) => {
                        expected.insert(key.clone(), declaration);
                        Ok(())
                    }
                    None => Err(AddError::endpoint(&key.0, NOT_BOUND)),
                };
                if heard.send(added).is_err() {
                    self.dismiss(&key);
                }
            }
            Command::Dismiss(pod, rank, heard) => {
                let any = self.dismiss(&(pod, rank));
                heard.send(any).unwrap_or_default();
            }
            #[cfg(test)]
            Command::Panic => panic!("by design"),
            #[cfg(test)]
            Command::Pause(paused) => paused.recv().unwrap_or_default(),
        }
    }

    fn bound(&mut self) -> Option<(&mut Expected, &mut HashMap<Key, Publisher>)> {
        self.sources.iter_mut().find_map(|source| match &mut source.kind {
            Kind::Bind { expected, publishers } => Some((expected, publishers)),
            Kind::Connect { .. } => None,
        })
    }

    /// Ends the source declared so; returns whether there was one.
    fn disconnect(&mut self, pod: &str, rank: Option<u32>) -> bool {
        let at = self.sources.iter().position(|source| match &source.kind {
            Kind::Connect { declaration, .. } => declaration.pod == pod && declaration.rank == rank,
            Kind::Bind { .. } => false,
        });
        let found = at.map(|at| self.sources.swap_remove(at).close());
        let any = found.is_some();
        if let Some(Kind::Connect { lead, others, .. }) = found {
            lead.remove();
            others.into_values().for_each(Publisher::remove);
        }
        any
    }

    fn dismiss(&mut self, key: &Key) -> bool {
        let Some((expected, publishers)) = self.bound() else { return false };
        let was_expected = expected.remove(key).is_some();
        let (pod, rank) = key;
        let ends = |of: &Key| of.0 == *pod && (rank.is_none() || of.1 == *rank);
        let gone: Vec<Publisher> =
            publishers.extract_if(|of, _| ends(of)).map(|(_, publisher)| publisher).collect();
        let any = was_expected || !gone.is_empty();
        gone.into_iter().for_each(Publisher::remove);
        any
    }

    /// A context with room for one more publisher.
    fn room(&mut self) -> Arc<zmq::Context> {
        if let Some(roomy) = self.contexts.iter().find(|c| Arc::strong_count(c) <= CROWD) {
            return Arc::clone(roomy);
        }
        let new = Arc::new(zmq::Context::new());
        self.contexts.push(Arc::clone(&new));
        new
    }

    fn socket(&self, zmq: &zmq::Context) -> zmq::Result<zmq::Socket> {
        let config = &self.context.config;
        let millis = |duration: Duration| i32::try_from(duration.as_millis()).unwrap_or(i32::MAX);
        let sub = zmq.socket(zmq::SUB)?;
        sub.set_linger(0)?;
        // No limit here. At a limit libzmq stops reading; a connection that breaks then, or whose
        // heartbeats are not read any more, meets an assertion of its timers (as of 4.3.4) that ends
        // the process. Every round reads into queues that are bounded, and what waits there behind a
        // thread that was held up is no more than engines keep for a slow subscriber.
        sub.set_rcvhwm(0)?;
        sub.set_maxmsgsize(most_frame_bytes(config))?;
        sub.set_ipv6(true)?;
        // Jitter: a fleet's subscribers must not all come back in the same instant.
        let jitter = 1.0 + f64::from(self.opened as u32 * 7919 % 1000) / 1000.0;
        sub.set_reconnect_ivl((f64::from(millis(config.reconnect)) * jitter) as i32)?;
        sub.set_reconnect_ivl_max((f64::from(millis(config.reconnect_max)) * jitter) as i32)?;
        if !config.heartbeat.is_zero() {
            sub.set_heartbeat_ivl(millis(config.heartbeat))?;
            sub.set_heartbeat_timeout(millis(config.heartbeat * 2))?;
            sub.set_heartbeat_ttl(millis(config.heartbeat * 3).min(MOST_TTL_MS))?;
            // A peer that accepts and then says nothing is as silent as one that stops.
            let handshake = millis(config.heartbeat * 3).clamp(1_000, MOST_HANDSHAKE_MS);
            sub.set_handshake_ivl(handshake)?;
        }
        sub.set_tcp_keepalive(1)?;
        Ok(sub)
    }

    fn connect(&mut self, declaration: &Arc<PodDeclaration>) -> Result<Source, AddError> {
        self.opened += 1;
        let pod = &declaration.pod;
        let no_socket = |error: zmq::Error| AddError::Refused(pod.clone(), error.to_string());
        let zmq = self.room();
        let sub = self.socket(&zmq).map_err(no_socket)?;
        sub.set_subscribe(declaration.topic_filter.as_bytes()).map_err(no_socket)?;
        if let Some(keys) = &self.context.curve {
            keys.connect(&sub).map_err(no_socket)?;
        }
        let Some(lead) = Publisher::new(&self.context, declaration, &zmq, Instant::now()) else {
            return Err(AddError::Full(pod.clone()));
        };
        let line = match Line::watch(&zmq, &sub, self.opened, &self.context.config) {
            Ok(line) => line,
            Err(error) => {
                lead.remove();
                return Err(no_socket(error));
            }
        };
        let kind = Kind::Connect {
            declaration: Arc::clone(declaration),
            line,
            lead: Box::new(lead),
            others: HashMap::new(),
        };
        let source = Source { sub, kind };
        if let Err(error) = source.sub.connect(&declaration.endpoint) {
            if let Kind::Connect { lead, .. } = source.close() {
                lead.remove();
            }
            return Err(AddError::endpoint(pod, &error.to_string()));
        }
        Ok(source)
    }

    fn bind(&mut self, endpoint: &str) -> zmq::Result<String> {
        self.opened += 1;
        let zmq = self.room();
        let sub = self.socket(&zmq)?;
        sub.set_subscribe(self.context.config.topic_filter.as_bytes())?;
        if let Some(keys) = &self.context.curve {
            keys.bind(&sub)?;
        }
        sub.bind(endpoint)?;
        let bound = sub.get_last_endpoint()?.unwrap_or_else(|_| endpoint.to_owned());
        let kind = Kind::Bind { expected: HashMap::new(), publishers: HashMap::new() };
        self.sources.push(Source { sub, kind });
        Ok(bound)
    }

    /// What became of the connection. Looked at before every batch of messages: a new connection
    /// must be known before what came over it.
    fn watch(&mut self, at: usize, now: Instant) {
        let (context, source) = (&self.context, &mut self.sources[at]);
        let Kind::Connect { declaration, line, lead, others } = &mut source.kind else { return };
        while let Some(change) = line.news(&context.config, now) {
            if change == (Change::Up { again: true }) {
                context.shared.metrics.reconnections.inc();
            }
            for publisher in std::iter::once(&mut **lead).chain(others.values_mut()) {
                match change {
                    Change::Up { .. } => publisher.connected(now),
                    Change::Down => publisher.disconnected(now),
                }
            }
        }
        line.mend(&source.sub, &declaration.endpoint, &context.config, now);
    }

    /// Takes in up to a round of live messages.
    fn receive(&mut self, at: usize, now: Instant) {
        for _ in 0..ROUND {
            let Source { sub, kind } = &self.sources[at];
            let checks =
                self.context.config.check_peer_address && matches!(kind, Kind::Bind { .. });
            let received = match checks {
                true => frame::receive_with_peer(sub).map(|(frames, peer)| (frames, Some(peer))),
                false => frame::receive(sub).map(|frames| (frames, None)),
            };
            let Ok((frames, peer)) = received else { return };
            if let Err(error) = self.dispatch(at, frames, peer, now) {
                self.context.shared.metrics.reject(error.reason());
                tracing::debug!(%error, "Message skipped.");
            }
        }
    }

    fn dispatch(
        &mut self,
        at: usize,
        mut frames: Vec<Frame>,
        checked: Option<Option<IpAddr>>,
        now: Instant,
    ) -> Result<(), DecodeError> {
        let sequence = Frames::split(&frames)?.sequence;
        let (Some(payload), Some(topic)) = (frames.pop(), frames.first()) else { return Ok(()) };
        let Topic { pod, model } = Topic::parse(topic, MAX_POD_ID_BYTES)?;
        let header = header(&payload, &self.context.config.limits);
        if let Kind::Bind { expected, .. } = &self.sources[at].kind {
            // Without its rank a message belongs to nobody.
            let rank = header.as_ref().map_err(DecodeError::clone)?.rank;
            if let Some(peer) = checked
                && let Err(reason) =
                    peers::judge(&pod, declared(expected, &pod, rank).map(Arc::as_ref), peer)
            {
                self.context.shared.metrics.refuse(reason);
                return Ok(());
            }
            if !self.admit(at, &pod, rank, &model, now) {
                return Ok(());
            }
        }
        let publisher = match &mut self.sources[at].kind {
            Kind::Bind { publishers, .. } => {
                let rank = header.as_ref().ok().and_then(|header| header.rank);
                publishers.get_mut(&(pod.into_owned(), rank))
            }
            Kind::Connect { declaration, line, lead, others } => {
                // Only an engine that sends several ranks over one socket needs a second look.
                let rank = header.as_ref().ok().and_then(|header| header.rank);
                match rank.filter(|_| !lead.takes(rank)) {
                    None => Some(&mut **lead),
                    Some(rank) => {
                        if let Entry::Vacant(vacant) = others.entry(rank) {
                            let own = Arc::new(PodDeclaration {
                                rank: Some(rank),
                                replay_endpoint: None,
                                ..PodDeclaration::clone(declaration)
                            });
                            let zmq = lead.zmq();
                            match Publisher::new(&self.context, &own, &zmq, now) {
                                Some(mut new) => {
                                    if line.is_up() {
                                        new.connected(now);
                                    }
                                    vacant.insert(new);
                                }
                                None => self.context.shared.metrics.refuse("max_pods"),
                            }
                        }
                        others.get_mut(&rank)
                    }
                }
            }
        };
        let Some(publisher) = publisher else { return Ok(()) };
        publisher.message(&model, sequence, header.ok().as_ref(), payload, now);
        Ok(())
    }

    /// Is this publisher known on the bound socket, or may it be from now on?
    fn admit(
        &mut self,
        at: usize,
        pod: &str,
        rank: Option<u32>,
        model: &str,
        now: Instant,
    ) -> bool {
        let context = Arc::clone(&self.context);
        let Kind::Bind { expected, publishers } = &self.sources[at].kind else { return false };
        let key = (pod.to_owned(), rank);
        if publishers.contains_key(&key) {
            return true;
        }
        let declared = declared(expected, pod, rank);
        let elsewhere =
            || context.shared.fleet.table().pod(pod).iter().any(|row| !row.endpoint.is_empty());
        let mut declaration = match declared {
            Some(declared) => PodDeclaration::clone(declared),
            None if !context.config.allow_unconfigured_pods || pod.is_empty() => {
                context.shared.metrics.refuse("unconfigured");
                return false;
            }
            // A pod that we connect to does not come by itself as well: somebody uses its name.
            None if elsewhere() => {
                context.shared.metrics.refuse("declared_elsewhere");
                return false;
            }
            None => PodDeclaration { pod: pod.to_owned(), ..Default::default() },
        };
        if declaration.rank.is_none() && rank.is_some_and(|rank| rank > 0) {
            // One replay socket serves one rank, and an engine with one rank says 0 or nothing.
            declaration.replay_endpoint = None;
        }
        declaration.rank = rank;
        if declaration.model.is_none() && !model.is_empty() {
            declaration.model = Some(model.to_owned());
        }
        let zmq = self.room();
        let Some(new) = Publisher::new(&context, &Arc::new(declaration), &zmq, now) else {
            context.shared.metrics.refuse("max_pods");
            return false;
        };
        let Kind::Bind { publishers, .. } = &mut self.sources[at].kind else { return false };
        publishers.insert(key, new);
        true
    }
}
