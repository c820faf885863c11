//! Engines that do as told: a PUB socket that binds or connects, and a replay socket with a script.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use kv_indexer::wire::encode::{Batch, Form};

use super::script;
use crate::support::patience;

/// Sequence and payload of everything that an engine ever said, published or not.
pub(crate) type History = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// A publisher. Its socket is an XPUB, which knows who has subscribed.
pub(crate) struct Engine {
    socket: zmq::Socket,
    context: zmq::Context,
    pub(crate) endpoint: String,
    pub(crate) topic: String,
    pub(crate) rank: Option<u32>,
    pub(crate) form: Form,
    /// Number of the next batch.
    pub(crate) next: u64,
    pub(crate) history: History,
}

impl Engine {
    /// Binds a free port.
    pub(crate) fn bind(topic: &str) -> Self {
        Self::open(topic, |socket| {
            socket.bind("tcp://127.0.0.1:*").unwrap();
            socket.get_last_endpoint().unwrap().unwrap()
        })
    }

    /// The same, with this many messages at most that wait for a subscriber; more are dropped.
    pub(crate) fn bind_with_mark(topic: &str, messages: i32) -> Self {
        Self::open(topic, |socket| {
            socket.set_sndhwm(messages).unwrap();
            socket.bind("tcp://127.0.0.1:*").unwrap();
            socket.get_last_endpoint().unwrap().unwrap()
        })
    }

    /// Connects to an indexer that binds.
    pub(crate) fn connect(endpoint: &str, topic: &str) -> Self {
        Self::open(topic, |socket| {
            socket.connect(endpoint).unwrap();
            endpoint.to_owned()
        })
    }

    fn open(topic: &str, open: impl FnOnce(&zmq::Socket) -> String) -> Self {
        let context = zmq::Context::new();
        let socket = socket(&context);
        let endpoint = open(&socket);
        Self {
            socket,
            context,
            endpoint,
            topic: topic.to_owned(),
            rank: Some(0),
            form: Form::Map,
            next: 0,
            history: History::default(),
        }
    }

    pub(crate) fn with_rank(mut self, rank: Option<u32>) -> Self {
        self.rank = rank;
        self
    }

    /// Waits until somebody subscribes.
    #[track_caller]
    pub(crate) fn subscribed(&self) {
        let deadline = Instant::now() + patience();
        loop {
            match self.socket.recv_bytes(0) {
                Ok(message) if message.first() == Some(&1) => return,
                Ok(_) | Err(zmq::Error::EAGAIN | zmq::Error::EINTR) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "nobody subscribes to {}", self.endpoint);
        }
    }

    /// Waits until nobody subscribes any more.
    #[track_caller]
    pub(crate) fn deserted(&self) {
        let deadline = Instant::now() + patience();
        let mut last = None;
        loop {
            match self.socket.recv_bytes(0) {
                Ok(message) => last = message.first().copied(),
                // Nothing came for a while, and the last word was that the last one has gone.
                Err(zmq::Error::EAGAIN) if last == Some(0) => return,
                Err(zmq::Error::EAGAIN | zmq::Error::EINTR) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "somebody subscribes to {}", self.endpoint);
        }
    }

    /// Publishes a batch in the notation of [`script`]; returns its sequence.
    pub(crate) fn send(&mut self, text: &str) -> u64 {
        let (sequence, payload) = self.keep(text);
        self.raw(&[self.topic.as_bytes(), &sequence.to_be_bytes(), &payload]);
        sequence
    }

    /// Makes a batch that is lost on its way: only the history has it.
    pub(crate) fn keep(&mut self, text: &str) -> (u64, Vec<u8>) {
        let payload = payload(text, self.rank, self.form);
        let sequence = self.next;
        self.next += 1;
        self.history.lock().unwrap().push((sequence, payload.clone()));
        (sequence, payload)
    }

    /// Publishes a payload under the next sequence.
    pub(crate) fn send_payload(&mut self, payload: &[u8]) -> u64 {
        let sequence = self.next;
        self.next += 1;
        self.raw(&[self.topic.as_bytes(), &sequence.to_be_bytes(), payload]);
        sequence
    }

    /// Publishes frames as they are.
    pub(crate) fn raw(&self, frames: &[&[u8]]) {
        self.socket.send_multipart(frames, 0).unwrap();
    }

    /// Dies and comes up again on the same port, numbers and history from the beginning.
    pub(crate) fn restart(&mut self) {
        // The port is free only when the old socket is gone.
        self.socket = self.context.socket(zmq::XPUB).unwrap();
        self.context = zmq::Context::new();
        self.socket = socket(&self.context);
        let deadline = Instant::now() + patience();
        while let Err(error) = self.socket.bind(&self.endpoint) {
            assert!(Instant::now() < deadline, "{}: {error}", self.endpoint);
            thread::sleep(Duration::from_millis(5));
        }
        self.next = 0;
        self.history.lock().unwrap().clear();
    }
}

fn socket(context: &zmq::Context) -> zmq::Socket {
    let socket = context.socket(zmq::XPUB).unwrap();
    socket.set_linger(0).unwrap();
    socket.set_sndhwm(1_000_000).unwrap();
    socket.set_rcvtimeo(100).unwrap();
    socket.set_reconnect_ivl(20).unwrap();
    // Every subscriber is told of, not only the first: the last one may not be gone yet.
    socket.set_xpub_verbose(true).unwrap();
    socket
}

/// A batch as an engine encodes it, made now. Rank absent: the two elements of vLLM 0.9.0.
pub(crate) fn payload(text: &str, rank: Option<u32>, form: Form) -> Vec<u8> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let batch = Batch { timestamp: since.as_secs_f64(), events: script::events(text), rank };
    let mut payload = batch.encode(form).unwrap();
    if rank.is_none() {
        // A nil at the end: cut it off and count two.
        assert_eq!((payload[0], payload.pop()), (0x93, Some(0xc0)));
        payload[0] = 0x92;
    }
    payload
}

/// What a replay socket does about one request.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A message, after the identity.
    Say(Vec<Vec<u8>>),
    Pause(Duration),
}

/// `[b"", sequence, payload]`: vLLM up to 0.25.
pub(crate) fn two(sequence: u64, payload: &[u8]) -> Step {
    Step::Say(vec![Vec::new(), sequence.to_be_bytes().to_vec(), payload.to_vec()])
}

/// `[b"", topic, sequence, payload]`: later ones.
pub(crate) fn three(sequence: u64, payload: &[u8]) -> Step {
    let topic = if payload.is_empty() { Vec::new() } else { b"kv@x@m".to_vec() };
    Step::Say(vec![Vec::new(), topic, sequence.to_be_bytes().to_vec(), payload.to_vec()])
}

/// The end marker in the form of `reply`.
pub(crate) fn end(reply: fn(u64, &[u8]) -> Step) -> Step {
    reply(u64::MAX, b"")
}

/// Everything from `from` on, and the end marker.
pub(crate) fn whole(
    history: &[(u64, Vec<u8>)],
    from: u64,
    reply: fn(u64, &[u8]) -> Step,
) -> Vec<Step> {
    let batches = history.iter().filter(|(sequence, _)| *sequence >= from);
    let mut steps: Vec<Step> =
        batches.map(|(sequence, payload)| reply(*sequence, payload)).collect();
    steps.push(end(reply));
    steps
}

/// A replay socket: a ROUTER whose answers come from a script.
pub(crate) struct Router {
    pub(crate) endpoint: String,
    requests: Arc<Mutex<Vec<u64>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    /// `script` is told the number of the request, from 0, and the sequence asked for.
    pub(crate) fn start(script: impl Fn(usize, u64) -> Vec<Step> + Send + 'static) -> Self {
        let context = zmq::Context::new();
        let socket = context.socket(zmq::ROUTER).unwrap();
        socket.set_linger(0).unwrap();
        socket.set_sndhwm(100_000).unwrap();
        socket.bind("tcp://127.0.0.1:*").unwrap();
        let endpoint = socket.get_last_endpoint().unwrap().unwrap();
        let (requests, stop) =
            (Arc::<Mutex<Vec<u64>>>::default(), Arc::new(AtomicBool::new(false)));
        let (seen, stopped) = (Arc::clone(&requests), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if socket.poll(zmq::POLLIN, 20).unwrap() == 0 {
                    continue;
                }
                let frames = socket.recv_multipart(0).unwrap();
                let [identity, delimiter, start] = &frames[..] else { panic!("{frames:?}") };
                assert!(delimiter.is_empty());
                let from = u64::from_be_bytes(start[..].try_into().unwrap());
                let number = {
                    let mut seen = seen.lock().unwrap();
                    seen.push(from);
                    seen.len() - 1
                };
                for step in script(number, from) {
                    match step {
                        Step::Pause(pause) => thread::sleep(pause),
                        Step::Say(frames) => {
                            let all = [vec![identity.clone()], frames].concat();
                            socket.send_multipart(all, 0).unwrap();
                        }
                    }
                }
            }
        });
        Self { endpoint, requests, stop, thread: Some(thread) }
    }

    /// An engine's own replay of what it said.
    pub(crate) fn of(engine: &Engine) -> Self {
        let history = Arc::clone(&engine.history);
        Self::start(move |_, from| whole(&history.lock().unwrap(), from, three))
    }

    /// The sequences asked for so far.
    pub(crate) fn requests(&self) -> Vec<u64> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the replay socket's script failed");
        }
    }
}
