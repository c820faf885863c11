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
        IngestConfig,
        fleet::{PodDeclaration, lock},
        frame::{self, Frame},
        publisher::{Context, Publisher, most_frame_bytes},
    },
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

/// What a thread is told.
pub(crate) enum Command {
    /// Subscribe. The sender hears whether a row could be had.
    Add(Arc<PodDeclaration>, SyncSender<bool>),
    /// Unsubscribe what was declared under this pod and rank; heard when every trace is gone.
    Remove(String, Option<u32>, SyncSender<bool>),
    /// Serve engines that connect to us.
    Bind(String, SyncSender<Result<String, String>>),
    /// Engines of this pod and rank may connect to us. Heard when what was there of it is gone.
    Expect(Arc<PodDeclaration>, SyncSender<bool>),
    /// End what came to the bound socket under this pod and rank, and expect it no more; heard when
    /// every trace is gone.
    Dismiss(String, Option<u32>, SyncSender<bool>),
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

    /// Closes the sockets and joins the thread.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.nudge();
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("A subscriber thread panicked.");
        }
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

/// What is known of the connection to one engine.
struct Line {
    monitor: zmq::Socket,
    /// Where the monitor's other end goes when the source is closed.
    unheard: String,
    up: bool,
    connected_before: bool,
    /// libzmq lost the connection and has not said yet that it tries again. After a breach of the
    /// protocol, such as a frame over the limit, or another server at that port, it never does.
    lost: Option<Instant>,
    /// How long it is given for that; doubles while the connection is not made again.
    patience: Duration,
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
    Bind { expected: HashMap<Key, Arc<PodDeclaration>>, publishers: HashMap<Key, Publisher> },
}

type Key = (String, Option<u32>);

impl Source {
    /// Closes the sockets and hands over what they served. A source must not just be dropped:
    /// libzmq's own thread reports to the monitor, and waits for ever, and with it everything else
    /// that it serves, if the other end is closed before the socket is gone, which happens later.
    fn close(self) -> Kind {
        if let Kind::Connect { line, .. } = &self.kind {
            // A monitor of no events in the place of the old one.
            if let Err(error) = self.sub.monitor(&line.unheard, 0) {
                tracing::error!(%error, "Cannot end the monitor of a subscription.");
            }
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
            let Some(&(sub, monitor, dealer)) = ready.get(at) else { break };
            self.watch(at, monitor, now);
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

    /// Waits for any socket. Answers, per source: is the SUB, the monitor, any DEALER readable?
    fn poll(&mut self) -> zmq::Result<Vec<(bool, bool, bool)>> {
        let now = Instant::now();
        let mut patience = PATIENCE;
        let mut items = vec![self.asleep.as_poll_item(zmq::POLLIN)];
        let mut dealers = Vec::with_capacity(self.sources.len());
        for source in &self.sources {
            items.push(source.sub.as_poll_item(zmq::POLLIN));
            if let Kind::Connect { line, .. } = &source.kind {
                items.push(line.monitor.as_poll_item(zmq::POLLIN));
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
                let monitor = matches!(source.kind, Kind::Connect { .. }) && next();
                let dealer = (0..dealers).fold(false, |any, _| next() | any);
                (sub, monitor, dealer)
            })
            .collect())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add(declaration, heard) => {
                let added = match self.connect(&declaration) {
                    Ok(Some(source)) => {
                        self.sources.push(source);
                        true
                    }
                    Ok(None) => false,
                    Err(error) => {
                        let (pod, endpoint) = (&declaration.pod, &declaration.endpoint);
                        tracing::error!(%pod, %endpoint, %error, "Cannot subscribe.");
                        false
                    }
                };
                heard.try_send(added).unwrap_or_default();
            }
            Command::Remove(pod, rank, heard) => {
                let at = self.sources.iter().position(|source| match &source.kind {
                    Kind::Connect { declaration, .. } => {
                        declaration.pod == pod && declaration.rank == rank
                    }
                    Kind::Bind { .. } => false,
                });
                let found = at.map(|at| self.sources.swap_remove(at).close());
                let any = found.is_some();
                if let Some(Kind::Connect { lead, others, .. }) = found {
                    lead.remove();
                    others.into_values().for_each(Publisher::remove);
                }
                heard.try_send(any).unwrap_or_default();
            }
            Command::Bind(endpoint, heard) => {
                let bound = self.bind(&endpoint).map_err(|error| error.to_string());
                heard.try_send(bound).unwrap_or_default();
            }
            Command::Expect(declaration, heard) => {
                let key = (declaration.pod.clone(), declaration.rank);
                self.dismiss(&key);
                let bound = self.bound();
                let added = bound.map(|(expected, _)| expected.insert(key, declaration)).is_some();
                heard.try_send(added).unwrap_or_default();
            }
            Command::Dismiss(pod, rank, heard) => {
                let any = self.dismiss(&(pod, rank));
                heard.try_send(any).unwrap_or_default();
            }
        }
    }

    fn bound(
        &mut self,
    ) -> Option<(&mut HashMap<Key, Arc<PodDeclaration>>, &mut HashMap<Key, Publisher>)> {
        self.sources.iter_mut().find_map(|source| match &mut source.kind {
            Kind::Bind { expected, publishers } => Some((expected, publishers)),
            Kind::Connect { .. } => None,
        })
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
        sub.set_rcvhwm(config.receive_high_water_mark)?;
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

    fn connect(&mut self, declaration: &Arc<PodDeclaration>) -> zmq::Result<Option<Source>> {
        self.opened += 1;
        let zmq = self.room();
        let sub = self.socket(&zmq)?;
        sub.set_subscribe(declaration.topic_filter.as_bytes())?;
        let Some(lead) = Publisher::new(&self.context, declaration, &zmq, Instant::now()) else {
            return Ok(None);
        };
        let name = format!("inproc://monitor-{}", self.opened);
        let events = [
            zmq::SocketEvent::CONNECTED,
            zmq::SocketEvent::CONNECT_RETRIED,
            zmq::SocketEvent::HANDSHAKE_SUCCEEDED,
            zmq::SocketEvent::DISCONNECTED,
        ];
        let events = events.into_iter().fold(0, |all, event| all | event as i32);
        let monitor = zmq.socket(zmq::PAIR)?;
        // No limit: libzmq's own thread must never wait for us.
        monitor.set_rcvhwm(0)?;
        let heard = sub.monitor(&name, events).and_then(|()| monitor.connect(&name));
        let kind = Kind::Connect {
            declaration: Arc::clone(declaration),
            line: Line {
                monitor,
                unheard: format!("inproc://unheard-{}", self.opened),
                up: false,
                connected_before: false,
                lost: None,
                patience: self.context.config.reconnect,
            },
            lead: Box::new(lead),
            others: HashMap::new(),
        };
        let source = Source { sub, kind };
        if let Err(error) = heard.and_then(|()| source.sub.connect(&declaration.endpoint)) {
            if let Kind::Connect { lead, .. } = source.close() {
                lead.remove();
            }
            return Err(error);
        }
        Ok(Some(source))
    }

    fn bind(&mut self, endpoint: &str) -> zmq::Result<String> {
        self.opened += 1;
        let zmq = self.room();
        let sub = self.socket(&zmq)?;
        sub.set_subscribe(self.context.config.topic_filter.as_bytes())?;
        sub.bind(endpoint)?;
        let bound = sub.get_last_endpoint()?.unwrap_or_else(|_| endpoint.to_owned());
        let kind = Kind::Bind { expected: HashMap::new(), publishers: HashMap::new() };
        self.sources.push(Source { sub, kind });
        Ok(bound)
    }

    /// Connection events: `[u16 event, u32 value]`, then the peer's address.
    fn watch(&mut self, at: usize, readable: bool, now: Instant) {
        let (context, source) = (&self.context, &mut self.sources[at]);
        let Kind::Connect { declaration, line, lead, others } = &mut source.kind else { return };
        if readable {
            while let Ok(frames) = line.monitor.recv_multipart(zmq::DONTWAIT) {
                let Some(&[low, high, ..]) = frames.first().map(Vec::as_slice) else { continue };
                let event = zmq::SocketEvent::from_raw(u16::from_ne_bytes([low, high]));
                tracing::debug!(pod = %declaration.pod, ?event, "Connection event.");
                let was_up = line.up;
                line.observe(event, &context.config, now);
                if line.up == was_up {
                    continue;
                }
                if line.up {
                    if line.connected_before {
                        context.shared.metrics.reconnections.inc();
                    }
                    line.connected_before = true;
                }
                for publisher in std::iter::once(&mut **lead).chain(others.values_mut()) {
                    if line.up {
                        publisher.connected(now);
                    } else {
                        publisher.disconnected(now);
                    }
                }
            }
        }
        if line.lost.is_some_and(|lost| now.duration_since(lost) >= line.patience) {
            line.lost = Some(now);
            line.patience = (line.patience * 2).min(context.config.reconnect_max);
            let endpoint = &declaration.endpoint;
            tracing::warn!(pod = %declaration.pod, %endpoint, "libzmq gave the connection up; connecting anew.");
            // It knows none of this name any more if it gave up, which is what we ask for.
            source.sub.disconnect(endpoint).unwrap_or_default();
            if let Err(error) = source.sub.connect(endpoint) {
                tracing::error!(pod = %declaration.pod, %endpoint, %error, "Cannot connect.");
            }
        }
    }

    /// Takes in up to a round of live messages.
    fn receive(&mut self, at: usize, now: Instant) {
        for _ in 0..ROUND {
            let Ok(frames) = frame::receive(&self.sources[at].sub) else { return };
            if let Err(error) = self.dispatch(at, frames, now) {
                self.context.shared.metrics.reject(error.reason());
                tracing::debug!(%error, "Message skipped.");
            }
        }
    }

    fn dispatch(
        &mut self,
        at: usize,
        mut frames: Vec<Frame>,
        now: Instant,
    ) -> Result<(), DecodeError> {
        let sequence = Frames::split(&frames)?.sequence;
        let (Some(payload), Some(topic)) = (frames.pop(), frames.first()) else { return Ok(()) };
        let Topic { pod, model } = Topic::parse(topic, MAX_POD_ID_BYTES)?;
        let header = header(&payload, &self.context.config.limits);
        if let Kind::Bind { .. } = self.sources[at].kind {
            // Without its rank a message belongs to nobody.
            let rank = header.as_ref().map_err(DecodeError::clone)?.rank;
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
                                    if line.up {
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
        if publisher.has_room() {
            let header = header.ok();
            publisher.message(&model, sequence, header.as_ref(), payload, now);
        } else {
            publisher.drop_message(sequence, now);
        }
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
        let declared = expected.get(&key).or_else(|| expected.get(&(key.0.clone(), None)));
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

impl Line {
    fn observe(&mut self, event: zmq::SocketEvent, config: &IngestConfig, now: Instant) {
        match event {
            zmq::SocketEvent::HANDSHAKE_SUCCEEDED => {
                (self.up, self.lost, self.patience) = (true, None, config.reconnect);
            }
            zmq::SocketEvent::DISCONNECTED => (self.up, self.lost) = (false, Some(now)),
            // It is on its way.
            _ => self.lost = None,
        }
    }
}

/// Longest pod id that a topic may carry.
const MAX_POD_ID_BYTES: usize = 512;
