//! The sockets of one publisher, whatever it publishes: an XPUB that sends batches, and a replay
//! socket from which the last of them can be asked for again.
//!
//! The XPUB belongs to whoever holds the [`Sockets`]; see the parent's page for the rest.

use std::{
    collections::{HashSet, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use super::{PublishError, PublisherOptions, server::ReplayServer};
use crate::{
    loadgen::recording::Batch,
    support::{clock::unix_ns, sync::lock},
};

/// How long a closed socket may still flush what is queued, milliseconds.
const LINGER_MS: i32 = 2_000;
/// How long a restart waits for the operating system to give the ports back.
const REBIND_PATIENCE: Duration = Duration::from_secs(5);

/// Something that can be published, and again on request. A clone is cheap.
pub(in crate::loadgen) trait Message: Clone + Send + 'static {
    /// What is sent.
    fn batch(&self) -> &Batch;
}

impl Message for Arc<Batch> {
    fn batch(&self) -> &Batch {
        self
    }
}

/// What a replay can return, oldest first.
pub(super) type Buffer<M> = Arc<Mutex<VecDeque<M>>>;

/// The sockets of one publisher.
pub(in crate::loadgen) struct Sockets<M> {
    options: PublisherOptions,
    subscriptions: HashSet<Vec<u8>>,
    buffer: Buffer<M>,
    endpoint: String,
    replay: Option<ReplayServer>,
    // Absent only while a restart has the ports closed.
    socket: Option<zmq::Socket>,
    context: zmq::Context,
}

impl<M: Message> Sockets<M> {
    /// Binds them. A port `*` is chosen by the operating system. A port in use is tried again for
    /// `patience`.
    pub(in crate::loadgen) fn bind(
        endpoint: &str,
        options: PublisherOptions,
        patience: Duration,
    ) -> Result<Self, PublishError> {
        let context = zmq::Context::new();
        let buffer = Buffer::default();
        let (socket, endpoint) =
            bind(&context, zmq::XPUB, endpoint, options.high_water_mark, patience)?;
        let replay = match &options.replay {
            Some(at) => Some(ReplayServer::start(&context, at, &options, &buffer, patience)?),
            None => None,
        };
        let subscriptions = HashSet::new();
        Ok(Self { options, subscriptions, buffer, endpoint, replay, socket: Some(socket), context })
    }

    /// Where it publishes, with the real port.
    pub(in crate::loadgen) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where it answers replay requests, with the real port.
    pub(in crate::loadgen) fn replay_endpoint(&self) -> Option<&str> {
        self.replay.as_ref().map(|server| server.endpoint.as_str())
    }

    /// Sends a batch, or with `publish` unset loses it on its way, and keeps it for replays. Returns
    /// the wall clock just before, nanoseconds since the Unix epoch.
    pub(in crate::loadgen) fn send(
        &mut self,
        message: M,
        publish: bool,
    ) -> Result<u64, PublishError> {
        // The engine answers replays between batches, on the thread that publishes. Under the lock
        // the two steps are one for the replay thread, too.
        let mut buffer = lock(&self.buffer);
        let unix_ns = unix_ns();
        if let Some(socket) = self.socket.as_ref().filter(|_| publish) {
            let batch = message.batch();
            let sequence = batch.sequence.to_be_bytes();
            let frames = [batch.topic.as_bytes(), &sequence[..], &batch.payload[..]];
            socket.send_multipart(frames, 0)?;
        }
        buffer.push_back(message);
        while buffer.len() > self.options.buffer_steps {
            buffer.pop_front();
        }
        Ok(unix_ns)
    }

    /// Is anyone subscribed to this topic, or to anything if there is none? Does not block.
    pub(in crate::loadgen) fn has_subscriber(
        &mut self,
        topic: Option<&[u8]>,
    ) -> Result<bool, PublishError> {
        self.read_subscriptions()?;
        Ok(self
            .subscriptions
            .iter()
            .any(|prefix| topic.is_none_or(|topic| topic.starts_with(prefix))))
    }

    /// Waits until [`Self::has_subscriber`], at most `timeout`; tells whether it is.
    pub(in crate::loadgen) fn wait_for_subscriber(
        &mut self,
        topic: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<bool, PublishError> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.has_subscriber(topic)? {
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

    /// Closes both sockets and binds them again at the same ports; what was sent is forgotten.
    pub(in crate::loadgen) fn restart(&mut self) -> Result<(), PublishError> {
        let replay = self.replay.take().map(|server| server.endpoint.clone());
        self.socket = None;
        self.subscriptions.clear();
        lock(&self.buffer).clear();
        let hwm = self.options.high_water_mark;
        let (socket, _) = bind(&self.context, zmq::XPUB, &self.endpoint, hwm, REBIND_PATIENCE)?;
        self.socket = Some(socket);
        if let Some(at) = replay {
            let patience = REBIND_PATIENCE;
            self.replay = Some(ReplayServer::start(
                &self.context,
                &at,
                &self.options,
                &self.buffer,
                patience,
            )?);
        }
        Ok(())
    }

    /// Closes both sockets and loses what is queued, as a killed process does.
    pub(in crate::loadgen) fn abandon(self) {
        if let Some(socket) = &self.socket {
            // It only fails on a socket that is closed already.
            socket.set_linger(0).ok();
        }
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

impl<M> fmt::Debug for Sockets<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// A bound socket and its real endpoint. A port in use is tried again for `patience`.
pub(super) fn bind(
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
