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
    collections::HashMap,
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
        fleet::{PodDeclaration, lock},
        frame::{self, Frame},
        publisher::{Context, Publisher},
    },
    wire::{DecodeError, Frames, Topic, header},
};

/// How long a poll may sleep: deadlines and commands are looked at no later.
const PATIENCE: Duration = Duration::from_millis(50);
/// Messages of one socket per round, so that one publisher cannot keep the others waiting.
const ROUND: usize = 64;
/// Commands that wait at most.
const COMMANDS: usize = 4096;

/// What a thread is told.
pub(crate) enum Command {
    /// Subscribe. The sender hears whether a row could be had.
    Add(Arc<PodDeclaration>, SyncSender<bool>),
    /// Unsubscribe what was declared under this pod and rank; heard when every trace is gone.
    Remove(String, Option<u32>, SyncSender<bool>),
    /// Serve engines that connect to us.
    Bind(String, SyncSender<Result<String, String>>),
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
        let endpoint = format!("inproc://subscriber-{number}");
        let asleep = context.zmq.socket(zmq::PAIR)?;
        asleep.bind(&endpoint)?;
        let wake = context.zmq.socket(zmq::PAIR)?;
        wake.connect(&endpoint)?;
        let (commands, inbox) = sync_channel(COMMANDS);
        let stop = Arc::new(AtomicBool::new(false));
        let mut worker = Worker {
            context: Arc::clone(context),
            asleep,
            inbox,
            stop: Arc::clone(&stop),
            sources: Vec::new(),
            number,
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
    number: usize,
    /// Sources opened so far: names their monitors.
    opened: usize,
}

/// One SUB socket and the publishers behind it.
struct Source {
    sub: zmq::Socket,
    monitor: Option<zmq::Socket>,
    kind: Kind,
    connected_before: bool,
}

enum Kind {
    /// We connect to one engine; its first rank is the lead, which has the replay socket.
    Connect {
        declaration: Arc<PodDeclaration>,
        lead: Box<Publisher>,
        others: HashMap<u32, Publisher>,
    },
    /// Engines connect to us.
    Bind { publishers: HashMap<(String, Option<u32>), Publisher> },
}

impl Source {
    fn publishers(&mut self) -> Vec<&mut Publisher> {
        match &mut self.kind {
            Kind::Connect { lead, others, .. } => {
                std::iter::once(&mut **lead).chain(others.values_mut()).collect()
            }
            Kind::Bind { publishers } => publishers.values_mut().collect(),
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
        self.sources.clear();
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
            if monitor {
                self.watch(at, now);
            }
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
            if let Some(monitor) = &source.monitor {
                items.push(monitor.as_poll_item(zmq::POLLIN));
            }
            let before = items.len();
            let publishers: Vec<&Publisher> = match &source.kind {
                Kind::Connect { lead, others, .. } => {
                    std::iter::once(&**lead).chain(others.values()).collect()
                }
                Kind::Bind { publishers } => publishers.values().collect(),
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
                let monitor = source.monitor.is_some() && next();
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
                let found = at.map(|at| self.sources.swap_remove(at));
                let any = found.is_some();
                if let Some(Source { kind: Kind::Connect { lead, others, .. }, .. }) = found {
                    lead.remove();
                    others.into_values().for_each(Publisher::remove);
                }
                heard.try_send(any).unwrap_or_default();
            }
            Command::Bind(endpoint, heard) => {
                let bound = self.bind(&endpoint).map_err(|error| error.to_string());
                heard.try_send(bound).unwrap_or_default();
            }
        }
    }

    fn socket(&self) -> zmq::Result<zmq::Socket> {
        let config = &self.context.config;
        let millis = |duration: Duration| i32::try_from(duration.as_millis()).unwrap_or(i32::MAX);
        let sub = self.context.zmq.socket(zmq::SUB)?;
        sub.set_linger(0)?;
        sub.set_rcvhwm(config.receive_high_water_mark)?;
        sub.set_maxmsgsize(i64::try_from(config.limits.payload_bytes).unwrap_or(i64::MAX))?;
        sub.set_ipv6(true)?;
        // Jitter: a fleet's subscribers must not all come back in the same instant.
        let jitter = 1.0 + f64::from(self.opened as u32 * 7919 % 1000) / 1000.0;
        sub.set_reconnect_ivl((f64::from(millis(config.reconnect)) * jitter) as i32)?;
        sub.set_reconnect_ivl_max((f64::from(millis(config.reconnect_max)) * jitter) as i32)?;
        if !config.heartbeat.is_zero() {
            sub.set_heartbeat_ivl(millis(config.heartbeat))?;
            sub.set_heartbeat_timeout(millis(config.heartbeat * 2))?;
            sub.set_heartbeat_ttl(millis(config.heartbeat * 3))?;
        }
        sub.set_tcp_keepalive(1)?;
        Ok(sub)
    }

    fn connect(&mut self, declaration: &Arc<PodDeclaration>) -> zmq::Result<Option<Source>> {
        self.opened += 1;
        let sub = self.socket()?;
        sub.set_subscribe(declaration.topic_filter.as_bytes())?;
        let name = format!("inproc://monitor-{}-{}", self.number, self.opened);
        let events =
            zmq::SocketEvent::HANDSHAKE_SUCCEEDED as i32 | zmq::SocketEvent::DISCONNECTED as i32;
        sub.monitor(&name, events)?;
        let monitor = self.context.zmq.socket(zmq::PAIR)?;
        monitor.connect(&name)?;
        sub.connect(&declaration.endpoint)?;
        let Some(lead) = Publisher::new(&self.context, declaration, Instant::now()) else {
            return Ok(None);
        };
        let kind = Kind::Connect {
            declaration: Arc::clone(declaration),
            lead: Box::new(lead),
            others: HashMap::new(),
        };
        Ok(Some(Source { sub, monitor: Some(monitor), kind, connected_before: false }))
    }

    fn bind(&mut self, endpoint: &str) -> zmq::Result<String> {
        self.opened += 1;
        let sub = self.socket()?;
        sub.set_subscribe(self.context.config.topic_filter.as_bytes())?;
        sub.bind(endpoint)?;
        let bound = sub.get_last_endpoint()?.unwrap_or_else(|_| endpoint.to_owned());
        let kind = Kind::Bind { publishers: HashMap::new() };
        self.sources.push(Source { sub, monitor: None, kind, connected_before: false });
        Ok(bound)
    }

    /// Connection events: `[u16 event, u32 value]`, then the peer's address.
    fn watch(&mut self, at: usize, now: Instant) {
        let source = &mut self.sources[at];
        let mut events = Vec::new();
        if let Some(monitor) = &source.monitor {
            while let Ok(frames) = monitor.recv_multipart(zmq::DONTWAIT) {
                if let Some(&[low, high, ..]) = frames.first().map(Vec::as_slice) {
                    events.push(u16::from_ne_bytes([low, high]));
                }
            }
        }
        for event in events {
            let connected = event == zmq::SocketEvent::HANDSHAKE_SUCCEEDED as u16;
            if connected && source.connected_before {
                self.context.shared.metrics.reconnections.inc();
            }
            source.connected_before |= connected;
            for publisher in source.publishers() {
                if connected {
                    publisher.connected(now);
                } else {
                    publisher.disconnected(now);
                }
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
        let context = &self.context;
        let header = header(&payload, &context.config.limits);
        let publisher = match &mut self.sources[at].kind {
            Kind::Connect { declaration, lead, others } => {
                // Only an engine that sends several ranks over one socket needs a second look.
                let rank = header.as_ref().ok().and_then(|header| header.rank);
                let leads = declaration.rank.is_some()
                    || rank.is_none()
                    || lead.row_id().rank.is_none_or(|known| Some(known) == rank);
                match rank.filter(|_| !leads) {
                    None => &mut **lead,
                    Some(rank) => match others.entry(rank) {
                        std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                        std::collections::hash_map::Entry::Vacant(vacant) => {
                            let own = Arc::new(PodDeclaration {
                                rank: Some(rank),
                                replay_endpoint: None,
                                ..PodDeclaration::clone(declaration)
                            });
                            let Some(new) = Publisher::new(context, &own, now) else {
                                context.shared.metrics.refuse("max_pods");
                                return Ok(());
                            };
                            vacant.insert(new)
                        }
                    },
                }
            }
            Kind::Bind { publishers } => {
                // Without its rank a message belongs to nobody.
                let rank = header.as_ref().map_err(DecodeError::clone)?.rank;
                let declared = context
                    .config
                    .pods
                    .iter()
                    .find(|known| known.pod == *pod && known.rank.is_none_or(|r| Some(r) == rank));
                let key = (pod.clone().into_owned(), rank);
                if !publishers.contains_key(&key) {
                    let mut declaration = match declared {
                        Some(declared) => declared.clone(),
                        None if context.config.allow_unconfigured_pods && !pod.is_empty() => {
                            PodDeclaration { pod: pod.clone().into_owned(), ..Default::default() }
                        }
                        None => {
                            context.shared.metrics.refuse("unconfigured");
                            return Ok(());
                        }
                    };
                    declaration.rank = rank;
                    if declaration.model.is_none() && !model.is_empty() {
                        declaration.model = Some(model.clone().into_owned());
                    }
                    let Some(new) = Publisher::new(context, &Arc::new(declaration), now) else {
                        context.shared.metrics.refuse("max_pods");
                        return Ok(());
                    };
                    publishers.insert(key.clone(), new);
                }
                let Some(publisher) = publishers.get_mut(&key) else { return Ok(()) };
                publisher
            }
        };
        if publisher.has_room() {
            let header = header.ok();
            publisher.message(&model, sequence, header.as_ref(), payload, now);
        } else {
            // As if the network had lost it: the next message shows the gap.
            context.shared.metrics.dropped.with_label_values(&["queue_full"]).inc();
        }
        Ok(())
    }
}

/// Longest pod id that a topic may carry.
const MAX_POD_ID_BYTES: usize = 512;
