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
pub(in crate::loadgen) mod sockets;

use std::{fmt, sync::Arc, time::Duration};

use self::sockets::{Message, Sockets};
use crate::loadgen::recording::{Batch, RankStream};

/// Sequence frame of the last message of a replay: −1.
pub const END_OF_REPLAY: [u8; 8] = [0xff; 8];

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

/// One batch of a stream.
#[derive(Clone)]
struct Recorded {
    stream: Arc<RankStream>,
    at: usize,
}

impl Message for Recorded {
    fn batch(&self) -> &Batch {
        &self.stream.batches[self.at]
    }
}

/// Publishes one rank's stream. See the module's page.
pub struct Publisher {
    stream: Arc<RankStream>,
    next: usize,
    sockets: Sockets<Recorded>,
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
        let sockets = Sockets::bind(endpoint, options, Duration::ZERO)?;
        Ok(Self { stream, next: 0, sockets })
    }

    /// Where it publishes, with the real port. Stays the same for life.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        self.sockets.endpoint()
    }

    /// Where it answers replay requests, with the real port.
    #[must_use]
    pub fn replay_endpoint(&self) -> Option<&str> {
        self.sockets.replay_endpoint()
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
        let topic = self.stream.batches.get(self.next).map(|batch| batch.topic.as_bytes());
        self.sockets.has_subscriber(topic)
    }

    /// Waits until [`Self::has_subscriber`], at most `timeout`; tells whether it is.
    ///
    /// # Errors
    ///
    /// [`PublishError::Zmq`].
    pub fn wait_for_subscriber(&mut self, timeout: Duration) -> Result<bool, PublishError> {
        let topic = self.stream.batches.get(self.next).map(|batch| batch.topic.as_bytes());
        self.sockets.wait_for_subscriber(topic, timeout)
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
        self.sockets.restart()
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
        let message = Recorded { stream: Arc::clone(&self.stream), at: self.next };
        let unix_ns = self.sockets.send(message, publish)?;
        self.next += 1;
        Ok(Some(Sent { sequence, unix_ns }))
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher")
            .field("endpoint", &self.endpoint())
            .field("replay", &self.replay_endpoint())
            .field("rank", &self.stream.rank)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}
