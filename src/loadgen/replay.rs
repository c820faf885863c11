//! One engine's publisher, played from a recording: a PUB socket and a replay socket with vLLM's
//! semantics (`vllm/distributed/kv_events.py`, 0.9 … 0.33).
//!
//! # Model
//!
//! [`Publisher`] sends the batches of one [`RankStream`] in order, frames exactly as recorded:
//! `[topic, sequence as u64 big-endian, payload]`. What was sent (or [skipped](Publisher::skip_next))
//! since the last [restart](Publisher::restart) can be asked for again on the replay socket: a request
//! `[b"", start]` is answered by one message per buffered batch with `sequence ≥ start`, then by the
//! end marker. Requests of another shape are ignored without a word, as the engine does.
//!
//! # Concurrency
//!
//! The PUB socket belongs to whoever holds the `Publisher`, the ROUTER to a thread of its own that is
//! joined on drop. The socket is an XPUB, which differs from PUB only in that it tells who subscribed:
//! that is how a test knows that nothing will be lost.

mod server;

use std::{
    collections::{HashSet, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use self::server::ReplayServer;
use crate::{
    loadgen::recording::{Batch, RankStream},
    support::{clock::unix_ns, sync::lock},
};

/// Sequence frame of the last message of a replay: −1.
pub const END_OF_REPLAY: [u8; 8] = [0xff; 8];

/// How long a closed socket may still flush what is queued, milliseconds.
const LINGER_MS: i32 = 2_000;
/// How long a restart waits for the operating system to give the ports back.
const REBIND_PATIENCE: Duration = Duration::from_secs(5);

/// Layout of replay messages, after the identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ReplayForm {
    /// `[b"", sequence, payload]`: vLLM ≤ 0.25, SGLang ≤ 0.5.21.
    #[value(name = "two")]
    TwoFrames,
    /// `[b"", topic, sequence, payload]`: vLLM ≥ 0.26, SGLang ≥ 0.5.22.
    #[default]
    #[value(name = "three")]
    ThreeFrames,
}

/// What a publisher is like, apart from its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublisherOptions {
    /// Where the replay socket binds; `None` = the engine has none (vLLM's default).
    pub replay: Option<String>,
    /// How it answers.
    pub form: ReplayForm,
    /// Batches that can be asked for again; vLLM's default is 10 000.
    pub buffer_steps: usize,
    /// Messages queued per subscriber before they are lost; vLLM's default is 100 000.
    pub high_water_mark: i32,
}

impl Default for PublisherOptions {
    fn default() -> Self {
        Self {
            replay: None,
            form: ReplayForm::default(),
            buffer_steps: 10_000,
            high_water_mark: 100_000,
        }
    }
}

/// Why a publisher cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The endpoint cannot be bound.
    #[error("cannot bind {endpoint}")]
    Bind {
        /// As asked for.
        endpoint: String,
        /// What ZeroMQ says.
        source: zmq::Error,
    },
    /// A socket operation failed.
    #[error("a ZeroMQ socket failed")]
    Zmq(#[from] zmq::Error),
    /// The replay thread cannot be started.
    #[error("cannot start the replay thread")]
    Thread(#[from] std::io::Error),
}

/// A batch that left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Its sequence.
    pub sequence: u64,
    /// Wall clock just before it was handed to the socket, nanoseconds since the Unix epoch.
    pub unix_ns: u64,
}

/// Indices into the stream of the batches that a replay can return.
type Buffer = Arc<Mutex<VecDeque<usize>>>;

/// Publishes one rank's stream. See the module's page.
pub struct Publisher {
    stream: Arc<RankStream>,
    options: PublisherOptions,
    next: usize,
    subscriptions: HashSet<Vec<u8>>,
    buffer: Buffer,
    endpoint: String,
    replay: Option<ReplayServer>,
    // Absent only while a restart has the ports closed.
    socket: Option<zmq::Socket>,
    context: zmq::Context,
}

impl Publisher {
    /// Binds the sockets. A port `*` is chosen by the operating system, see [`Self::endpoint`].
    ///
    /// # Errors
    ///
    /// [`PublishError::Bind`] and [`PublishError::Thread`].
    pub fn bind(
        stream: Arc<RankStream>,
        endpoint: &str,
        options: PublisherOptions,
    ) -> Result<Self, PublishError> {
        let context = zmq::Context::new();
        let buffer = Buffer::default();
        let (socket, endpoint) =
            bind(&context, zmq::XPUB, endpoint, options.high_water_mark, Duration::ZERO)?;
        let replay = match &options.replay {
            Some(at) => {
                let patience = Duration::ZERO;
                Some(ReplayServer::start(&context, at, &options, &stream, &buffer, patience)?)
            }
            None => None,
        };
        Ok(Self {
            stream,
            options,
            next: 0,
            subscriptions: HashSet::new(),
            buffer,
            endpoint,
            replay,
            socket: Some(socket),
            context,
        })
    }

    /// Where it publishes, with the real port. Stays the same for life.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where it answers replay requests, with the real port.
    #[must_use]
    pub fn replay_endpoint(&self) -> Option<&str> {
        self.replay.as_ref().map(|server| server.endpoint.as_str())
    }

    /// What is published.
    #[must_use]
    pub fn stream(&self) -> &RankStream {
        &self.stream
    }

    /// How many batches of the stream were sent or skipped.
    #[must_use]
    pub fn position(&self) -> usize {
        self.next
    }

    /// The batch that [`Self::publish_next`] would send.
    #[must_use]
    pub fn peek(&self) -> Option<&Batch> {
        self.stream.batches.get(self.next)
    }

    /// Is anyone subscribed to the next batch's topic (after the last batch: to anything)? Does not
    /// block.
    ///
    /// # Errors
    ///
    /// [`PublishError::Zmq`].
    pub fn has_subscriber(&mut self) -> Result<bool, PublishError> {
        self.read_subscriptions()?;
        let topic = self.peek().map(|batch| batch.topic.as_bytes());
        Ok(self
            .subscriptions
            .iter()
            .any(|prefix| topic.is_none_or(|topic| topic.starts_with(prefix))))
    }

    /// Waits until [`Self::has_subscriber`], at most `timeout`; tells whether it is.
    ///
    /// # Errors
    ///
    /// [`PublishError::Zmq`].
    pub fn wait_for_subscriber(&mut self, timeout: Duration) -> Result<bool, PublishError> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.has_subscriber()? {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(socket) = self.socket.as_ref().filter(|_| !left.is_zero()) else {
                return Ok(false);
            };
            let slice = left.min(Duration::from_millis(100)).as_millis() as i64;
            match socket.poll(zmq::POLLIN, slice.max(1)) {
                Ok(_) | Err(zmq::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends the next batch; `None` after the last one.
    ///
    /// # Errors
    ///
    /// [`PublishError::Zmq`].
    pub fn publish_next(&mut self) -> Result<Option<Sent>, PublishError> {
        self.step(true)
    }

    /// Loses the next batch on its way to the subscribers: it can only be asked for again. `None`
    /// after the last one.
    ///
    /// # Errors
    ///
    /// None yet; the signature is that of [`Self::publish_next`].
    pub fn skip_next(&mut self) -> Result<Option<Sent>, PublishError> {
        self.step(false)
    }

    /// Sends batches up to the next one with this sequence, or all that are left if there is none.
    /// Returns them.
    ///
    /// # Errors
    ///
    /// [`PublishError::Zmq`].
    pub fn publish_until(&mut self, sequence: u64) -> Result<Vec<Sent>, PublishError> {
        let mut all = Vec::new();
        while let Some(sent) = self.publish_next()? {
            all.push(sent);
            if sent.sequence == sequence {
                break;
            }
        }
        Ok(all)
    }

    /// The engine is killed and comes up again: both sockets are closed and bound again at the same
    /// ports, connected peers have to reconnect, and what was sent cannot be asked for any more. The
    /// stream goes on where it was.
    ///
    /// # Errors
    ///
    /// [`PublishError::Bind`] when a port is not free again within five seconds.
    pub fn restart(&mut self) -> Result<(), PublishError> {
        let replay = self.replay.take().map(|server| server.endpoint.clone());
        self.socket = None;
        self.subscriptions.clear();
        lock(&self.buffer).clear();
        let hwm = self.options.high_water_mark;
        let (socket, _) = bind(&self.context, zmq::XPUB, &self.endpoint, hwm, REBIND_PATIENCE)?;
        self.socket = Some(socket);
        if let Some(at) = replay {
            self.replay = Some(ReplayServer::start(
                &self.context,
                &at,
                &self.options,
                &self.stream,
                &self.buffer,
                REBIND_PATIENCE,
            )?);
        }
        Ok(())
    }

    /// As [`Self::restart`], and the stream begins again with its first batch.
    ///
    /// # Errors
    ///
    /// As [`Self::restart`].
    pub fn rewind(&mut self) -> Result<(), PublishError> {
        self.next = 0;
        self.restart()
    }

    /// Closes the sockets; what is queued is still flushed, for two seconds at most. The same as
    /// dropping it.
    pub fn close(self) {}

    fn step(&mut self, publish: bool) -> Result<Option<Sent>, PublishError> {
        let Some(batch) = self.stream.batches.get(self.next) else { return Ok(None) };
        let sequence = batch.sequence;
        // The engine answers replays between batches, on the thread that publishes. Under the lock
        // the two steps are one for the replay thread, too.
        let mut buffer = lock(&self.buffer);
        let unix_ns = unix_ns();
        if let Some(socket) = self.socket.as_ref().filter(|_| publish) {
            let frames = [batch.topic.as_bytes(), &sequence.to_be_bytes()[..], &batch.payload[..]];
            socket.send_multipart(frames, 0)?;
        }
        buffer.push_back(self.next);
        while buffer.len() > self.options.buffer_steps {
            buffer.pop_front();
        }
        drop(buffer);
        self.next += 1;
        Ok(Some(Sent { sequence, unix_ns }))
    }

    fn read_subscriptions(&mut self) -> Result<(), PublishError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        loop {
            match socket.recv_bytes(zmq::DONTWAIT) {
                Ok(message) => match message.split_first() {
                    Some((1, prefix)) => {
                        self.subscriptions.insert(prefix.to_vec());
                    }
                    Some((0, prefix)) => {
                        self.subscriptions.remove(prefix);
                    }
                    _ => {}
                },
                Err(zmq::Error::EAGAIN) => return Ok(()),
                Err(zmq::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher")
            .field("endpoint", &self.endpoint)
            .field("replay", &self.replay_endpoint())
            .field("rank", &self.stream.rank)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// A bound socket and its real endpoint. A port in use is tried again for `patience`.
fn bind(
    context: &zmq::Context,
    kind: zmq::SocketType,
    endpoint: &str,
    hwm: i32,
    patience: Duration,
) -> Result<(zmq::Socket, String), PublishError> {
    let failed = |source| PublishError::Bind { endpoint: endpoint.to_owned(), source };
    let deadline = Instant::now() + patience;
    let socket = context.socket(kind).map_err(failed)?;
    socket.set_linger(LINGER_MS).map_err(failed)?;
    socket.set_sndhwm(hwm).map_err(failed)?;
    loop {
        match socket.bind(endpoint) {
            Ok(()) => break,
            Err(zmq::Error::EADDRINUSE) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(source) => return Err(failed(source)),
        }
    }
    let real = socket.get_last_endpoint().map_err(failed)?;
    Ok((socket, real.unwrap_or_else(|_| endpoint.to_owned())))
}
