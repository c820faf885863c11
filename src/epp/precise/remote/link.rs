//! One connection's questions: those to be sent, and those that wait for their answers.
//!
//! # Concurrency
//!
//! Callers push into bounded channels and wait for their own reply; the connection's task takes from
//! them. A link dies with its connection: whoever waits then hears of it at once, and nothing that was
//! asked of one connection is answered by the next.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, atomic::AtomicUsize},
    task::{Context, Poll},
    time::Instant,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;

use crate::{
    epp::precise::{
        IndexError,
        remote::{
            metrics::{RemoteMetrics, Up},
            speculation::{Command, QUEUE},
        },
    },
    proto::kvindexer as pb,
    support::sync::lock,
};

/// Questions without an answer, at most: the service reads no more.
pub(super) const UNANSWERED: usize = 256;

/// The callers' side.
#[derive(Debug)]
pub(super) struct Link {
    questions: mpsc::Sender<Question>,
    unanswered: Arc<Semaphore>,
    /// What is to be done about speculative entries.
    pub(super) commands: mpsc::Sender<Command>,
    /// Speculative entries that may be alive.
    pub(super) open: Arc<AtomicUsize>,
    /// Cancelled by whoever finds an answer that is none.
    pub(super) broken: CancellationToken,
}

/// The connection's side.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) questions: Outbound,
    pub(super) pending: Pending,
    pub(super) commands: mpsc::Receiver<Command>,
}

#[derive(Debug)]
struct Question {
    request: pb::ScoreRequest,
    waiting: Waiting,
}

/// Somebody, as long as they wait, and the question's share of what may be unanswered.
#[derive(Debug)]
struct Waiting {
    reply: oneshot::Sender<pb::ScoreResponse>,
    asked: Instant,
    _permit: OwnedSemaphorePermit,
    _up: Up,
}

/// Questions that were sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending(Arc<Mutex<HashMap<u64, Waiting>>>);

/// The requests of the stream. What goes out waits for its answer from then on.
#[derive(Debug)]
pub(super) struct Outbound {
    questions: mpsc::Receiver<Question>,
    pending: Pending,
}

/// Both sides of a new link.
pub(super) fn link() -> (Link, Ends) {
    let (questions, receiver) = mpsc::channel(UNANSWERED);
    let (commands, received) = mpsc::channel(QUEUE);
    let pending = Pending::default();
    let link = Link {
        questions,
        unanswered: Arc::new(Semaphore::new(UNANSWERED)),
        commands,
        open: Arc::default(),
        broken: CancellationToken::new(),
    };
    let questions = Outbound { questions: receiver, pending: pending.clone() };
    (link, Ends { questions, pending, commands: received })
}

impl Link {
    /// Sends a question; its answer comes through what is returned, or never.
    ///
    /// # Errors
    ///
    /// [`IndexError::Busy`] or [`IndexError::Disconnected`].
    pub(super) fn ask(
        &self,
        request: impl FnOnce() -> pb::ScoreRequest,
        metrics: &RemoteMetrics,
    ) -> Result<oneshot::Receiver<pb::ScoreResponse>, IndexError> {
        let permit = Arc::clone(&self.unanswered).try_acquire_owned();
        let permit = permit.map_err(|_| IndexError::Busy)?;
        let (reply, answer) = oneshot::channel();
        let waiting =
            Waiting { reply, asked: Instant::now(), _permit: permit, _up: metrics.in_flight() };
        // There is room for each permit, so a channel that does not take it is closed.
        let sent = self.questions.try_send(Question { request: request(), waiting });
        sent.map_err(|_| IndexError::Disconnected)?;
        Ok(answer)
    }
}

impl Pending {
    /// Hands an answer to whoever waits for it; `false` if nobody asked.
    pub(super) fn answer(&self, answer: pb::ScoreResponse, metrics: &RemoteMetrics) -> bool {
        let Some(waiting) = lock(&self.0).remove(&answer.request_id) else { return false };
        if waiting.reply.send(answer).is_err() {
            metrics.late();
        }
        true
    }

    /// Nobody will get an answer any more.
    pub(super) fn clear(&self) {
        lock(&self.0).clear();
    }

    /// When the oldest question without an answer was asked.
    pub(super) fn oldest(&self) -> Option<Instant> {
        lock(&self.0).values().map(|waiting| waiting.asked).min()
    }
}

impl Stream for Outbound {
    type Item = pb::ScoreRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.questions.poll_recv(cx).map(|question| {
            let Question { request, waiting } = question?;
            lock(&self.pending.0).insert(request.request_id, waiting);
            Some(request)
        })
    }
}
