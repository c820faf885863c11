//! Envoy's part towards an endpoint picker, as a client: ask, then tell how the answer goes on.
//!
//! # Model
//!
//! One gRPC stream for each request, as Envoy 1.40 has it in `FULL_DUPLEX_STREAMED` mode: the head, the
//! body in pieces, an empty end; the destination and the body come back, and the request goes out. Then
//! the response's head, its pieces as they come, an empty end; what the endpoint picker makes of them is
//! read at the end, and the stream is reset.
//!
//! Real Envoy hands a piece of a response on only when it is back. Here the client has it at once, so
//! that the endpoint picker's share of response times is in the time to route alone.
//!
//! # Failure
//!
//! Never on the way of a response: pieces that the stream cannot take yet are kept, up to
//! 256 KiB; beyond that, or when the stream broke, the rest is not told, and there is no
//! prediction. A connection that broke is made anew by the next request.
//!
//! # Concurrency
//!
//! A picker belongs to one runtime, that of its first request. All its requests share one connection,
//! as those of a thread of Envoy do.

use std::{
    net::SocketAddr,
    sync::OnceLock,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use prost_types::value::Kind;
use tokio::sync::mpsc;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use super::Failure;
use crate::{
    loadgen::ext_proc::{messages, session::Outgoing},
    proto::ext_proc::{
        HeadersResponse, ProcessingRequest, ProcessingResponse, body_mutation::Mutation,
        external_processor_client::ExternalProcessorClient, processing_response::Response,
    },
};

/// Largest piece of a body in one message, bytes; Envoy's read buffers are about as large.
const PIECE: usize = 62_000;
/// Messages of a response that wait for the connection at most.
const WAITING: usize = 32;
/// Bytes of a response that are kept beyond those.
const KEPT_BYTES: usize = 256 << 10;
/// How long the end of an exchange is waited for.
const END_PATIENCE: Duration = Duration::from_millis(50);
/// How long a connection may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// HTTP/2 windows, bytes: what an exchange may be answered before somebody reads, and all of them.
const WINDOWS: (u32, u32) = (1 << 20, 16 << 20);
/// Where the endpoint picker says that a request goes.
const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Namespace of what the endpoint picker says about a request at its end.
const REPORT: &str = "kv-indexer";

/// Connections to one endpoint picker, for one thread.
#[derive(Debug)]
pub struct Picker {
    endpoint: Endpoint,
    channel: OnceLock<Channel>,
}

/// An exchange that has been routed and goes on.
#[derive(Debug)]
pub struct Routed {
    /// Where the request goes.
    pub pod: SocketAddr,
    answers: Streaming<ProcessingResponse>,
    /// `None` after a fault.
    messages: Option<mpsc::Sender<ProcessingRequest>>,
    /// Pieces that the stream could not take yet.
    kept: BytesMut,
}

/// What the endpoint picker said at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Tokens that it expected in the pod's cache.
    pub predicted_tokens: Option<u32>,
    /// Tokens that the pod reported, as the endpoint picker read it.
    pub actual_tokens: Option<u32>,
}

impl Picker {
    /// Connects in the background; a picker that is not there shows at the first request.
    ///
    /// # Errors
    ///
    /// An address that cannot be one.
    pub fn new(address: SocketAddr) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1)
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_PATIENCE);
        Ok(Self { endpoint, channel: OnceLock::new() })
    }

    /// Asks where a request goes. Its time is for the caller to bound.
    ///
    /// # Errors
    ///
    /// [`Failure::Refused`] and [`Failure::Picker`].
    pub async fn pick(&self, path: &str, id: &str, body: &[Bytes]) -> Result<Routed, Failure> {
        // Not earlier: making one needs the runtime.
        let channel = self.channel.get_or_init(|| self.endpoint.connect_lazy());
        let mut client = ExternalProcessorClient::new(channel.clone())
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX);
        let (messages, then) = mpsc::channel(WAITING);
        let first = first_messages(path, id, body).into_iter();
        let stream = client.process(Outgoing { first, then }).await;
        let mut answers = stream.map_err(|_| Failure::Picker)?.into_inner();
        let mut pod = None;
        loop {
            let answer = answers.message().await.map_err(|_| Failure::Picker)?;
            match answer.and_then(|answer| answer.response) {
                Some(Response::RequestHeaders(head)) => pod = destination(head),
                // Envoy has the body from here.
                Some(Response::RequestBody(body)) => {
                    let mutation = body.response.and_then(|it| it.body_mutation?.mutation);
                    match mutation {
                        Some(Mutation::StreamedResponse(piece)) if !piece.end_of_stream => {}
                        _ => break,
                    }
                }
                Some(Response::ImmediateResponse(said)) => {
                    let status = said.status.and_then(|status| u16::try_from(status.code).ok());
                    return Err(Failure::Refused(status.unwrap_or(500)));
                }
                _ => return Err(Failure::Picker),
            }
        }
        let pod = pod.ok_or(Failure::Picker)?;
        Ok(Routed { pod, answers, messages: Some(messages), kept: BytesMut::new() })
    }
}

impl Routed {
    /// Tells that the answer's head is there.
    pub fn headers(&mut self, status: u16, content_type: &str) {
        self.tell(messages::response_headers(status, content_type));
    }

    /// Passes on a piece of the answer.
    pub fn piece(&mut self, piece: &Bytes) {
        let Some(sender) = &self.messages else { return };
        let full = match sender.try_reserve() {
            Ok(place) if self.kept.is_empty() => {
                place.send(messages::response_body(piece.clone(), false));
                return;
            }
            Ok(place) => {
                self.kept.extend_from_slice(piece);
                place.send(messages::response_body(self.kept.split().freeze(), false));
                return;
            }
            Err(error) => matches!(error, mpsc::error::TrySendError::Full(())),
        };
        if full && self.kept.len() + piece.len() <= KEPT_BYTES {
            self.kept.extend_from_slice(piece);
        } else {
            self.messages = None;
        }
    }

    /// Tells that the answer is complete, and waits for what the endpoint picker makes of it, at most
    /// 50 ms.
    pub async fn end(mut self) -> Prediction {
        let deadline = Instant::now() + END_PATIENCE;
        let whole = async {
            let sender = self.messages.take()?;
            if !self.kept.is_empty() {
                let rest = self.kept.split().freeze();
                sender.send(messages::response_body(rest, false)).await.ok()?;
            }
            sender.send(messages::response_body(Bytes::new(), true)).await.ok()?;
            // The channel stays open: Envoy resets a stream, it does not end it.
            let prediction = said_at_the_end(&mut self.answers).await;
            drop(sender);
            Some(prediction)
        };
        let told = tokio::time::timeout_at(deadline.into(), whole).await;
        told.ok().flatten().unwrap_or_default()
    }

    fn tell(&mut self, message: ProcessingRequest) {
        if let Some(sender) = &self.messages
            && sender.try_send(message).is_err()
        {
            self.messages = None;
        }
    }
}

/// A request from its head to the end of its body. Small pieces are put together.
fn first_messages(path: &str, id: &str, body: &[Bytes]) -> Vec<ProcessingRequest> {
    let whole = body.iter().map(Bytes::len).sum();
    let mut out = vec![messages::request_headers(path, id, whole)];
    let mut together = BytesMut::new();
    for piece in body {
        let mut piece = piece.clone();
        if together.len() + piece.len() > PIECE && !together.is_empty() {
            out.push(messages::request_body(together.split().freeze(), false));
        }
        while piece.len() > PIECE {
            out.push(messages::request_body(piece.split_to(PIECE), false));
        }
        if body.len() == 1 {
            out.push(messages::request_body(piece, false));
        } else {
            together.extend_from_slice(&piece);
        }
    }
    if !together.is_empty() {
        out.push(messages::request_body(together.freeze(), false));
    }
    out.push(messages::request_body(Bytes::new(), true));
    out
}

/// The first address of the destination header.
fn destination(head: HeadersResponse) -> Option<SocketAddr> {
    let headers = head.response?.header_mutation?.set_headers;
    let header = headers.into_iter().filter_map(|option| option.header);
    let header = header.into_iter().find(|it| it.key.eq_ignore_ascii_case(DESTINATION))?;
    let text = match header.raw_value.as_ref() {
        [] => header.value.as_str(),
        raw => std::str::from_utf8(raw).ok()?,
    };
    text.split(',').next()?.trim().parse().ok()
}

/// Reads to the end of the response's body, and what was said on the way.
async fn said_at_the_end(answers: &mut Streaming<ProcessingResponse>) -> Prediction {
    let mut said = Prediction::default();
    while let Ok(Some(answer)) = answers.message().await {
        if let Some(metadata) = &answer.dynamic_metadata {
            let number = |name: &str| {
                let Some(Kind::StructValue(report)) = &metadata.fields.get(REPORT)?.kind else {
                    return None;
                };
                match report.fields.get(name)?.kind {
                    Some(Kind::NumberValue(number)) if number >= 0.0 => Some(number as u32),
                    _ => None,
                }
            };
            said.predicted_tokens = number("predicted_cached_tokens").or(said.predicted_tokens);
            said.actual_tokens = number("actual_cached_tokens").or(said.actual_tokens);
        }
        let Some(Response::ResponseBody(body)) = answer.response else { continue };
        let mutation = body.response.and_then(|it| it.body_mutation?.mutation);
        if let Some(Mutation::StreamedResponse(piece)) = mutation
            && piece.end_of_stream
        {
            break;
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ext_proc::processing_request::Request;

    #[test]
    fn bodies_are_cut_and_put_together() {
        #[track_caller]
        fn check(pieces: &[usize], want: &[usize]) {
            let body: Vec<_> = pieces.iter().map(|&bytes| Bytes::from(vec![b'x'; bytes])).collect();
            let got: Vec<usize> = first_messages("/p", "i", &body)
                .into_iter()
                .filter_map(|message| match message.request {
                    Some(Request::RequestBody(body)) => Some(body.body.len()),
                    _ => None,
                })
                .collect();
            assert_eq!(got, want, "{pieces:?}");
        }
        check(&[], &[0]);
        check(&[10], &[10, 0]);
        check(&[10, 20, 30], &[60, 0]);
        check(&[PIECE], &[PIECE, 0]);
        check(&[PIECE + 1], &[PIECE, 1, 0]);
        check(&[PIECE - 1, 2], &[PIECE - 1, 2, 0]);
        check(&[5, 2 * PIECE + 5, 5], &[5, PIECE, PIECE, 10, 0]);
    }
}
