//! `ScoreStream`: requests in, answers out, in order.
//!
//! ```text
//!  inbound ─▶ reader task: wait for room, read, check and hash ─▶ queue ─▶ answer: look up ─▶ out
//! ```
//!
//! The reader holds at most [`UNANSWERED`] requests, and at most one message's worth of bytes
//! beyond the largest message; then it stops reading, and HTTP/2 flow control stops the client. The
//! look-up runs when the transport takes the answer, so that a slow reader gets the state of that
//! moment. What is read and not answered also counts among the bytes that wait for the caller, over all
//! its streams; more than it may have ends the stream with RESOURCE_EXHAUSTED.

use std::sync::Arc;

use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tonic::{Status, Streaming};

use crate::{
    indexer::{
        ScoreError,
        metrics::Rpc,
        server::{
            gate::{Caller, Charge},
            guard::full,
        },
        service::{
            Inner,
            answers::Answers,
            request::{Prepared, Text},
        },
    },
    proto::kvindexer as pb,
};

/// Requests read and not yet answered, at most. The protocol names the number.
const UNANSWERED: usize = 256;

/// A request that was read, with its share of the byte budget.
#[derive(Debug)]
struct Pending {
    arrival: Instant,
    request_id: u64,
    request: Result<Prepared, ScoreError>,
    _bytes: OwnedSemaphorePermit,
    _charge: Option<Charge>,
}

/// The answers to `inbound`. Ends after the last answer when the client ends, with UNAVAILABLE when
/// the server shuts down, and with the transport's error when a message cannot be decoded.
pub(super) fn answers(
    inner: Arc<Inner>,
    inbound: Streaming<pb::ScoreRequest>,
    call: Option<Instant>,
    caller: Option<Caller>,
) -> Answers<pb::ScoreResponse> {
    // One more is being answered.
    let (queue, pending) = mpsc::channel(UNANSWERED - 1);
    inner.tasks.spawn(read(Arc::clone(&inner), inbound, call, caller, queue));
    Answers::new((inner, pending), |(inner, mut pending)| async move {
        let answer = match pending.recv().await? {
            Ok(pending) => Ok(answer(&inner, pending).await),
            Err(status) => Err(status),
        };
        Some((answer, (inner, pending)))
    })
}

async fn answer(inner: &Inner, pending: Pending) -> pb::ScoreResponse {
    let answer = match pending.request {
        Ok(request) => inner.score(&request).await,
        Err(error) => Err(error),
    };
    inner.metrics.answered(Rpc::ScoreStream, code_of(&answer), pending.arrival.elapsed());
    answer.unwrap_or_else(|error| pb::ScoreResponse {
        request_id: pending.request_id,
        error: Some(pb::Error {
            code: error.code().into(),
            message: error.to_string(),
            field: error.field().to_owned(),
        }),
        ..pb::ScoreResponse::default()
    })
}

fn code_of<T>(answer: &Result<T, ScoreError>) -> tonic::Code {
    answer.as_ref().map_or_else(ScoreError::code, |_| tonic::Code::Ok)
}

async fn read(
    inner: Arc<Inner>,
    mut inbound: Streaming<pb::ScoreRequest>,
    call: Option<Instant>,
    caller: Option<Caller>,
    queue: mpsc::Sender<Result<Pending, Status>>,
) {
    // Tokens shrink to keys, an eighth to a hundredth of them; counting the message is the simple
    // upper bound.
    let budget =
        inner.config.max_message_bytes.clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
    let bytes = Arc::new(Semaphore::new(budget));
    loop {
        let Ok(room) = queue.reserve().await else { return };
        let next = tokio::select! {
            biased;
            () = inner.stop.cancelled() => Err(ScoreError::ShuttingDown.into()),
            () = queue.closed() => return,
            next = inbound.message() => next,
        };
        let request = match next {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(status) => {
                room.send(Err(status));
                return;
            }
        };
        let arrival = Instant::now();
        let size = request.encoded_len().clamp(1, budget) as u32;
        let permit = tokio::select! {
            biased;
            () = queue.closed() => return,
            permit = Arc::clone(&bytes).acquire_many_owned(size) => permit,
        };
        let Ok(permit) = permit else { return };
        let mut charge = caller.as_ref().map(Caller::charge);
        if charge.as_mut().is_some_and(|charge| !charge.set(size as usize)) {
            room.send(Err(full()));
            return;
        }
        let request_id = request.request_id;
        let request = Prepared::new(&inner.config, request, arrival, call, Text::Stream).await;
        room.send(Ok(Pending { arrival, request_id, request, _bytes: permit, _charge: charge }));
    }
}
