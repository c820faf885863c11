//! What stands before every call: who may make it, and what it may leave unfinished.
//!
//! # Access
//!
//! Scores, states of pods and speculative entries are what routers live on, and are for everybody who
//! can connect; so are health and reflection. Any other call changes what the index is made of or
//! tells what is in it, and needs whatever [`Access`] asks for. A new call is guarded until
//! [`OPEN`] names it.
//!
//! # Bounds
//!
//! A message that has begun has to end within [`Limits::message`](super::gate::Limits::message), and
//! what has come of it is [charged](super::gate::Charge) to its caller; so are each open call and an
//! answer that is not taken.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{HeaderValue, Request, Response, header};
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tokio::time::{Instant, Sleep};
use tonic::{Status, body::Body, codegen::Service};

use super::gate::{Call, Caller, Charge, Refusal};
use crate::{
    indexer::metrics::ServerMetrics,
    proto::{kvindexer::kv_indexer_server, llmd::indexer_service_server},
    support::access::Access,
};

/// Calls of `kvindexer.v1.KvIndexer` for everybody.
const OPEN: [&str; 8] = [
    "Score",
    "ScoreStream",
    "ListPods",
    "WatchPods",
    "WaitVisible",
    "Speculate",
    "Unspeculate",
    "ReportActual",
];

/// What an open call counts as, bytes, whatever has come of it: about what its task and buffers take.
const CALL: usize = 4 << 10;

/// Bytes before each message: a flag and a length.
const PREFIX: usize = 5;

/// A service with a guard before it.
#[derive(Clone, Debug)]
pub(super) struct Guarded<S> {
    inner: S,
    access: Access,
    metrics: ServerMetrics,
}

impl<S> Guarded<S> {
    pub(super) fn new(inner: S, access: Access, metrics: ServerMetrics) -> Self {
        Self { inner, access, metrics }
    }

    /// Why the call may not be made.
    fn refusal(&self, request: &Request<Body>) -> Option<Status> {
        let call = guarded(request.uri().path())?;
        let authorization = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let denied = self.access.check(authorization).err()?;
        self.metrics.refused(denied.reason());
        let message = format!("{call} {denied}");
        Some(match denied.reason() {
            "closed" => Status::permission_denied(message),
            _ => Status::unauthenticated(message),
        })
    }
}

/// The name of a call that is not for everybody.
fn guarded(path: &str) -> Option<&str> {
    let (service, call) = path.strip_prefix('/')?.split_once('/')?;
    (service == kv_indexer_server::SERVICE_NAME && !OPEN.contains(&call)).then_some(call)
}

/// Does a client send one message, at once? Those that stream may pause between two.
fn is_unary(path: &str) -> bool {
    let ours = [kv_indexer_server::SERVICE_NAME, indexer_service_server::SERVICE_NAME];
    let service = path.strip_prefix('/').and_then(|path| path.split_once('/'));
    service.is_some_and(|(service, call)| ours.contains(&service) && call != "ScoreStream")
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if let Some(status) = self.refusal(&request) {
            return Box::pin(std::future::ready(Ok(status.into_http())));
        }
        let Some(caller) = request.extensions().get::<Caller>().cloned() else {
            // Somebody serves without a gate.
            return Box::pin(self.inner.call(request));
        };
        let mut charge = caller.charge();
        if !charge.set(CALL) {
            return Box::pin(std::future::ready(Ok(full().into_http())));
        }
        let call = caller.call();
        let unary = is_unary(request.uri().path());
        let request = request.map(|body| Body::new(Incoming::new(body, &caller, unary)));
        let answer = self.inner.call(request);
        Box::pin(async move {
            let response = answer.await?;
            Ok(response.map(|body| Body::new(Outgoing { body, charge, _call: call })))
        })
    }
}

/// The body of a request.
struct Incoming {
    body: Body,
    caller: Caller,
    charge: Charge,
    /// The prefix of the message that has begun, as far as it has come.
    prefix: [u8; PREFIX],
    /// Bytes of that prefix.
    begun: usize,
    /// What is missing of the message behind its prefix, and how much of that has come.
    missing: usize,
    arrived: usize,
    /// A first message is due even if nothing of it has come.
    due: bool,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    fn new(body: Body, caller: &Caller, due: bool) -> Self {
        Self {
            body,
            caller: caller.clone(),
            charge: caller.charge(),
            prefix: [0; PREFIX],
            begun: 0,
            missing: 0,
            arrived: 0,
            due,
            deadline: None,
        }
    }

    /// Bytes of the message that has begun and not ended.
    fn unfinished(&self) -> usize {
        self.begun + self.arrived
    }

    /// Follows the messages' borders through `data`.
    fn advance(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.begun < PREFIX {
                let take = data.len().min(PREFIX - self.begun);
                let (head, rest) = data.split_at(take);
                self.prefix[self.begun..self.begun + take].copy_from_slice(head);
                self.begun += take;
                data = rest;
                if self.begun == PREFIX {
                    let [_, length @ ..] = self.prefix;
                    self.missing = u32::from_be_bytes(length) as usize;
                }
            } else {
                let take = data.len().min(self.missing);
                (self.missing, self.arrived) = (self.missing - take, self.arrived + take);
                data = &data[take..];
            }
            if self.begun == PREFIX && self.missing == 0 {
                (self.begun, self.arrived, self.due, self.deadline) = (0, 0, false, None);
            }
        }
    }

    /// Is it too late for the message that is due?
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.due && self.unfinished() == 0 {
            return Poll::Pending;
        }
        let time = self.caller.gate().limits().message;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + time)));
        deadline.as_mut().poll(cx)
    }
}

impl HttpBody for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.advance(data);
                    let unfinished = self.unfinished();
                    if !self.charge.set(unfinished) {
                        return Poll::Ready(Some(Err(full())));
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Pending => {
                ready!(self.poll_late(cx));
                self.caller.gate().refused(Refusal::MessageTimeout);
                let why = "the message did not end within api.messageTimeoutMs";
                Poll::Ready(Some(Err(Status::deadline_exceeded(why))))
            }
            end => end,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// As many bytes wait for the callers of this address as may.
pub(crate) fn full() -> Status {
    Status::resource_exhausted(
        "too many unfinished requests and untaken answers: api.maxPendingBytes",
    )
}

/// The body of an answer; the call ends with it.
struct Outgoing {
    body: Body,
    /// What was given to the transport last. It asks for more when that is on its way.
    charge: Charge,
    _call: Call,
}

impl HttpBody for Outgoing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let next = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &next
            && let Some(data) = frame.data_ref()
            && !self.charge.set(CALL + data.len())
        {
            return Poll::Ready(Some(Err(full())));
        }
        Poll::Ready(next)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::indexer::server::gate::{Gate, Limits};

    #[test]
    fn only_named_calls_are_for_everybody() {
        for open in [
            "/kvindexer.v1.KvIndexer/Score",
            "/kvindexer.v1.KvIndexer/WatchPods",
            "/indexer.v1.IndexerService/GetPodScores",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "",
            "/",
        ] {
            assert_eq!(guarded(open), None, "{open}");
        }
        for call in ["Explain", "RegisterPod", "UnregisterPod", "Snapshot", "Unheard", ""] {
            assert_eq!(guarded(&format!("/kvindexer.v1.KvIndexer/{call}")), Some(call));
        }
        assert!(is_unary("/kvindexer.v1.KvIndexer/Score"));
        assert!(is_unary("/indexer.v1.IndexerService/GetPodScores"));
        assert!(!is_unary("/kvindexer.v1.KvIndexer/ScoreStream"));
        assert!(!is_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"));
    }

    #[tokio::test]
    async fn the_borders_of_messages_are_found_wherever_frames_are_cut() {
        let limits = Limits {
            connections: 1,
            idle: Duration::from_secs(9),
            pending_bytes: 1 << 20,
            message: Duration::from_secs(9),
        };
        let metrics = ServerMetrics::register(&prometheus::Registry::new()).unwrap();
        let caller = Gate::new(limits, metrics).caller();
        let mut wire = Vec::new();
        let mut borders = vec![0];
        for length in [0_usize, 1, 7, 300, 0, 2] {
            wire.push(0);
            wire.extend((length as u32).to_be_bytes());
            wire.resize(wire.len() + length, 9);
            borders.push(wire.len());
        }
        for cut in 1..wire.len() {
            let mut body = Incoming::new(Body::empty(), &caller, true);
            let mut at = 0;
            for piece in wire.chunks(cut) {
                body.advance(piece);
                at += piece.len();
                let border = borders.iter().rev().find(|&&border| border <= at).unwrap();
                assert_eq!(body.unfinished(), at - border, "pieces of {cut}, at {at}");
            }
            assert!(!body.due && body.unfinished() == 0);
        }
    }
}
