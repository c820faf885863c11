//! An engine: vLLM's prefix cache without a model, and the sockets that tell of it, with what goes wrong there.
//!
//! Whatever the network does, the cache is the truth. [`Truth`] keeps what each life of the engine ever
//! announced, so that an answer can be judged while everything is in motion.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kv_indexer::{
    loadgen::engine::{
        cache::{Cache, CacheOptions, EventFields, Hits, RequestId},
        sequence::{Identity, Sequence},
    },
    wire::encode::{Batch, Event, Form, Hash},
};

use crate::{stats::Stats, universe::Universe};

/// Requests that hold blocks at once at most.
const MOST_RUNNING: usize = 4;
/// Shares of messages, each in a million, with a fault of their own.
const DROPPED: u32 = 2_000;
const REPEATED: u32 = 2_000;
const SWAPPED: u32 = 2_000;
const LEFT_OUT: u32 = 60;
const UNREADABLE: u32 = 15;
const CLEARED: u32 = 300;
/// How long a held-back message may be overtaken by others.
const MOST_LATE: u32 = 6;

/// What an engine is like, apart from what it caches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub(crate) block_size: usize,
    pub(crate) gpu_blocks: u32,
    pub(crate) form: Form,
    /// Frames of a replay's answers, 2 or 3; `None` = no replay socket.
    pub(crate) replay_frames: Option<usize>,
    /// Batches that can be asked for again.
    pub(crate) buffer: usize,
    /// Messages that wait for a slow subscriber.
    pub(crate) hwm: i32,
    /// From step to step.
    pub(crate) pace: Duration,
}

/// One life of an engine under one registration.
#[derive(Debug)]
pub(crate) struct Life {
    /// Number of the registration.
    pub(crate) incarnation: u64,
    /// When the pod was unregistered: calls that begin later must not see it.
    pub(crate) ended: Option<Instant>,
    pub(crate) block_size: usize,
    /// Every block that it ever announced.
    pub(crate) announced: HashSet<u64>,
}

/// What a pod's name ever stood for.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    pub(crate) lives: Vec<Life>,
}

/// What an engine holds at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) block_size: usize,
    pub(crate) blocks: HashSet<u64>,
    /// The message that removed a block of this life last.
    pub(crate) removed_at: HashMap<u64, u64>,
    /// Its last sequence.
    pub(crate) last: u64,
}

struct Sockets {
    publisher: zmq::Socket,
    replay: Option<zmq::Socket>,
    events_at: SocketAddr,
    replay_at: Option<SocketAddr>,
    // Behind the sockets, since it waits for them.
    _context: zmq::Context,
}

fn bind(kind: zmq::SocketType, context: &zmq::Context, hwm: i32) -> (zmq::Socket, SocketAddr) {
    let socket = context.socket(kind).unwrap();
    socket.set_linger(0).unwrap();
    socket.set_sndhwm(hwm).unwrap();
    // Small, so that a stalled connection is felt here soon.
    socket.set_sndbuf(8 << 10).unwrap();
    socket.bind("tcp://127.0.0.1:*").unwrap();
    let endpoint = socket.get_last_endpoint().unwrap().unwrap();
    let address = endpoint.trim_start_matches("tcp://").parse().unwrap();
    (socket, address)
}

impl Sockets {
    fn open(options: &Options) -> Self {
        let context = zmq::Context::new();
        let (publisher, events_at) = bind(zmq::PUB, &context, options.hwm);
        let room = i32::try_from(options.buffer * 2).unwrap();
        let replay = options.replay_frames.map(|_| bind(zmq::ROUTER, &context, room));
        let replay_at = replay.as_ref().map(|(_, at)| *at);
        let replay = replay.map(|(socket, _)| socket);
        Self { publisher, replay, events_at, replay_at, _context: context }
    }
}

/// See the module's page.
pub(crate) struct Engine {
    options: Options,
    universe: Arc<Universe>,
    stats: Arc<Stats>,
    random: fastrand::Rng,
    topic: String,
    cache: Cache,
    running: VecDeque<RequestId>,
    next_request: RequestId,
    sockets: Option<Sockets>,
    next: u64,
    buffer: VecDeque<(u64, Vec<u8>)>,
    /// Messages on their way that others overtake, and how many still may.
    held_back: Vec<(u32, u64, Vec<u8>)>,
    removed_at: HashMap<u64, u64>,
    truth: Arc<Mutex<Truth>>,
    incarnation: u64,
    fences: u32,
    /// Something unreadable was published in this life.
    unreadable: bool,
    /// Does it serve requests?
    pub(crate) works: bool,
    /// Do messages get lost, repeated and so on?
    pub(crate) faulty: bool,
    /// The replay socket takes requests and says nothing.
    pub(crate) mute: bool,
}

impl Engine {
    pub(crate) fn start(
        options: Options,
        name: &str,
        universe: &Arc<Universe>,
        stats: &Arc<Stats>,
        (truth, incarnation): (Arc<Mutex<Truth>>, u64),
        seed: u64,
    ) -> Self {
        let mut engine = Self {
            options,
            universe: Arc::clone(universe),
            stats: Arc::clone(stats),
            random: fastrand::Rng::with_seed(seed),
            topic: format!("kv@{name}@m"),
            cache: empty(&options),
            running: VecDeque::new(),
            next_request: 0,
            sockets: Some(Sockets::open(&options)),
            next: 0,
            buffer: VecDeque::new(),
            held_back: Vec::new(),
            removed_at: HashMap::new(),
            truth,
            incarnation,
            fences: 0,
            unreadable: false,
            works: false,
            faulty: false,
            mute: false,
        };
        engine.begin_life();
        engine
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Where it publishes and answers replays now.
    pub(crate) fn addresses(&self) -> (SocketAddr, Option<SocketAddr>) {
        let sockets = self.sockets.as_ref().unwrap();
        (sockets.events_at, sockets.replay_at)
    }

    fn begin_life(&mut self) {
        self.cache = empty(&self.options);
        self.running.clear();
        self.next = 0;
        self.buffer.clear();
        self.held_back.clear();
        self.removed_at.clear();
        self.unreadable = false;
        self.truth.lock().unwrap().lives.push(Life {
            incarnation: self.incarnation,
            ended: None,
            block_size: self.options.block_size,
            announced: HashSet::new(),
        });
    }

    /// Forgets everything and numbers from 0, over the same connections.
    pub(crate) fn restart_in_place(&mut self) {
        self.begin_life();
    }

    /// Dies with all connections, and comes up at other ports.
    pub(crate) fn restart(&mut self) {
        self.sockets = None;
        self.begin_life();
        self.sockets = Some(Sockets::open(&self.options));
    }

    pub(crate) fn held(&self) -> Held {
        Held {
            block_size: self.options.block_size,
            blocks: self.cache.contents().map(|block| block.hash).collect(),
            removed_at: self.removed_at.clone(),
            last: self.next.saturating_sub(1),
        }
    }

    /// Could whoever asks now learn everything that this life ever published?
    pub(crate) fn can_tell_all(&self) -> bool {
        let kept = self.buffer.iter().map(|(sequence, _)| *sequence);
        self.options.replay_frames.is_some() && !self.unreadable && kept.eq(0..self.next)
    }

    /// Sends what is still on its way.
    pub(crate) fn flush(&mut self) {
        for (_, sequence, payload) in std::mem::take(&mut self.held_back) {
            self.send(sequence, &payload);
        }
    }

    /// Stores a block that nobody else has ever stored; returns its tokens.
    pub(crate) fn fence(&mut self) -> Vec<u32> {
        self.fences += 1;
        let mut tokens = vec![1_000_000 + self.fences; self.options.block_size];
        tokens[0] = self.incarnation as u32;
        let sequence = Sequence::new(tokens.clone(), Identity::default(), self.options.block_size);
        let mut events = Vec::new();
        self.serve(&sequence, false, &mut events);
        self.publish(events);
        tokens
    }

    /// Serves a few requests and publishes what they did to the cache.
    pub(crate) fn step(&mut self) {
        if self.random.u32(..1_000_000) < CLEARED {
            while let Some(request) = self.running.pop_front() {
                self.cache.free(request);
            }
            self.cache.reset();
            self.stats.fault("cleared");
        }
        let mut events = self.cache.take_events();
        for _ in 0..self.random.usize(1..=3) {
            let at = self.universe.pick(&mut self.random);
            let universe = Arc::clone(&self.universe);
            let reuse = self.random.u8(..) > 40;
            self.serve(universe.sequence(at, self.options.block_size), reuse, &mut events);
        }
        if !events.is_empty() {
            self.publish(events);
        }
    }

    fn serve(&mut self, prompt: &Sequence, reuse: bool, events: &mut Vec<Event>) {
        let hits = if reuse { self.cache.lookup(prompt) } else { Hits::default() };
        let computed = hits.len() * self.options.block_size;
        let new = prompt.tokens().len() - computed;
        let request = self.next_request;
        self.next_request += 1;
        while self.cache.allocate(request, prompt, &hits, computed, new).is_err() {
            let Some(oldest) = self.running.pop_front() else { return };
            self.cache.free(oldest);
        }
        self.running.push_back(request);
        while self.running.len() > self.random.usize(..MOST_RUNNING) {
            if let Some(oldest) = self.running.pop_front() {
                self.cache.free(oldest);
            }
        }
        events.extend(self.cache.take_events());
    }

    fn publish(&mut self, events: Vec<Event>) {
        let sequence = self.next;
        self.next += 1;
        self.note(sequence, &events);
        self.stats.events(events.len() as u64);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let batch = Batch { timestamp: since.as_secs_f64(), events, rank: Some(0) };
        let payload = batch.encode(self.options.form).unwrap();
        let fate = if self.faulty { self.random.u32(..1_000_000) } else { u32::MAX };
        let mut limit = 0;
        let mut falls_below = |share: u32| {
            limit += share;
            fate < limit
        };
        if falls_below(LEFT_OUT) {
            // The engine could not encode it: the number is used up.
            self.stats.fault("left out");
            return;
        }
        self.keep(sequence, payload.clone());
        if falls_below(DROPPED) {
            self.stats.fault("dropped");
        } else if falls_below(SWAPPED) {
            self.stats.fault("swapped");
            let overtakers = self.random.u32(1..=MOST_LATE);
            self.held_back.push((overtakers, sequence, payload));
            return;
        } else {
            self.send(sequence, &payload);
            if falls_below(REPEATED) {
                self.stats.fault("repeated");
                self.send(sequence, &payload);
            }
        }
        for waiting in &mut self.held_back {
            waiting.0 -= 1;
        }
        let due: Vec<_> = self.held_back.extract_if(.., |waiting| waiting.0 == 0).collect();
        for (_, sequence, payload) in due {
            self.send(sequence, &payload);
        }
        if self.faulty && self.random.u32(..1_000_000) < UNREADABLE {
            self.stats.fault("unreadable");
            self.unreadable = true;
            let sequence = self.next;
            self.next += 1;
            let broken = payload_without_end(&payload);
            self.keep(sequence, broken.clone());
            self.send(sequence, &broken);
        }
    }

    fn keep(&mut self, sequence: u64, payload: Vec<u8>) {
        self.buffer.push_back((sequence, payload));
        while self.buffer.len() > self.options.buffer {
            self.buffer.pop_front();
        }
    }

    /// Before anything is sent, so that no answer can be ahead of it.
    fn note(&mut self, sequence: u64, events: &[Event]) {
        let mut truth = self.truth.lock().unwrap();
        let life = truth.lives.last_mut().unwrap();
        for event in events {
            match event {
                Event::BlockStored(stored) => life.announced.extend(hashes(&stored.block_hashes)),
                Event::BlockRemoved(removed) => {
                    let gone = hashes(&removed.block_hashes).map(|hash| (hash, sequence));
                    self.removed_at.extend(gone);
                }
                Event::AllBlocksCleared => {
                    let all = life.announced.iter().map(|&hash| (hash, sequence));
                    self.removed_at.extend(all);
                }
            }
        }
    }

    fn send(&self, sequence: u64, payload: &[u8]) {
        let Some(sockets) = &self.sockets else { return };
        let frames = [self.topic.as_bytes(), &sequence.to_be_bytes(), payload];
        // A PUB never waits: what a subscriber has no room for is dropped.
        sockets.publisher.send_multipart(frames, zmq::DONTWAIT).unwrap();
    }

    /// Answers replay requests, as the engine does between batches.
    pub(crate) fn answer(&mut self) {
        let Some(sockets) = &self.sockets else { return };
        let (Some(socket), Some(frames)) = (&sockets.replay, self.options.replay_frames) else {
            return;
        };
        while let Ok(request) = socket.recv_multipart(zmq::DONTWAIT) {
            let [identity, _, start] = &request[..] else { panic!("{request:?}") };
            if self.mute {
                self.stats.fault("replay mute");
                continue;
            }
            let from = u64::from_be_bytes(start[..].try_into().unwrap());
            let say = |sequence: u64, topic: &[u8], payload: &[u8]| {
                let number = sequence.to_be_bytes();
                let head: &[&[u8]] = &[&identity[..], b""];
                let topic: &[&[u8]] = if frames == 3 { &[topic] } else { &[] };
                let all = [head, topic, &[&number[..], payload]].concat();
                // Who asked may be gone; a ROUTER says nothing of it.
                socket.send_multipart(all, zmq::DONTWAIT).unwrap();
            };
            let fate = if self.faulty { self.random.u8(..) } else { u8::MAX };
            let mut left = self.buffer.iter().filter(|(sequence, _)| *sequence >= from).count();
            let short = (fate < 12).then(|| self.random.usize(..=left));
            let without = (12..24).contains(&fate).then(|| self.random.usize(..=left));
            if short.is_some() {
                self.stats.fault("replay cut short");
            } else if without.is_some() {
                self.stats.fault("replay with a hole");
            }
            for (sequence, payload) in self.buffer.iter().filter(|kept| kept.0 >= from) {
                left -= 1;
                if short.is_some_and(|at| left < at) {
                    break;
                }
                if without != Some(left) {
                    say(*sequence, self.topic.as_bytes(), payload);
                }
            }
            if short.is_none() {
                say(u64::MAX, b"", b"");
            }
        }
    }
}

fn empty(options: &Options) -> Cache {
    Cache::new(CacheOptions {
        num_gpu_blocks: options.gpu_blocks,
        block_size: options.block_size,
        fields: EventFields::default(),
        unhashed_first: options.form == Form::Map,
    })
}

fn hashes(hashes: &[Hash]) -> impl Iterator<Item = u64> + '_ {
    hashes.iter().map(|hash| match hash {
        Hash::Unsigned(hash) => *hash,
        other => panic!("{other:?}"),
    })
}

fn payload_without_end(payload: &[u8]) -> Vec<u8> {
    payload[..payload.len() / 2].to_vec()
}
