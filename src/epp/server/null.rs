//! An `ext_proc` service that decides nothing: the yardstick.
//!
//! It answers request headers at once with the next one of fixed destinations, and every body message
//! with the same bytes in pieces as large as Envoy takes, or with "unchanged" where Envoy keeps the
//! body, so that its cost is that of the transport, the encoding and nothing else. What the endpoint
//! picker costs beyond it is the endpoint picker's own.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    epp::ext_proc::headers::DESTINATION,
    proto::ext_proc::{
        BodyMutation, BodyResponse, BodySendMode, CommonResponse, HeaderMutation, HeaderValue,
        HeaderValueOption, HeadersResponse, HttpBody, ProcessingRequest, ProcessingResponse,
        ProtocolConfiguration, StreamedBodyResponse, TrailersResponse, body_mutation::Mutation,
        external_processor_server::ExternalProcessor, processing_request::Request as Part,
        processing_response::Response as Reply,
    },
};

/// Bytes of a body in one reply; Envoy's limit is 64 KiB for the whole message.
const BODY_LIMIT: usize = 62_000;

/// Sends requests to its destinations in turn. Clones share the turn.
#[derive(Clone, Debug)]
pub struct Null {
    destinations: Arc<[Bytes]>,
    next: Arc<AtomicUsize>,
}

impl Null {
    /// Sends everything to `destination`, an `ip:port`.
    pub fn new(destination: impl Into<Bytes>) -> Self {
        Self::in_turn([destination.into()])
    }

    /// Sends each request to the next one of `destinations`, `ip:port` each. Without any, requests are
    /// let through without a destination.
    pub fn in_turn(destinations: impl IntoIterator<Item = Bytes>) -> Self {
        Self { destinations: destinations.into_iter().collect(), next: Arc::default() }
    }

    fn destination(&self) -> Option<Bytes> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let at = turn.checked_rem(self.destinations.len())?;
        self.destinations.get(at).cloned()
    }
}

#[tonic::async_trait]
impl ExternalProcessor for Null {
    type ProcessStream = Replies;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Replies>, Status> {
        let messages = request.into_inner();
        let modes = ProtocolConfiguration {
            request_body_mode: BodySendMode::FullDuplexStreamed.into(),
            response_body_mode: BodySendMode::FullDuplexStreamed.into(),
        };
        Ok(Response::new(Replies { messages, null: self.clone(), modes, pending: VecDeque::new() }))
    }
}

/// The replies to one exchange, made as its messages come.
#[derive(Debug)]
pub struct Replies {
    messages: Streaming<ProcessingRequest>,
    null: Null,
    /// How Envoy sends bodies; duplex unless it says otherwise.
    modes: ProtocolConfiguration,
    pending: VecDeque<Reply>,
}

impl Stream for Replies {
    type Item = Result<ProcessingResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(reply) = self.pending.pop_front() {
                let response = Some(reply);
                return Poll::Ready(Some(Ok(ProcessingResponse {
                    response,
                    ..ProcessingResponse::default()
                })));
            }
            let message = match ready!(Pin::new(&mut self.messages).poll_next(context)) {
                Some(Ok(message)) => message,
                // Envoy ends most streams with a reset: nobody is left to be told.
                Some(Err(_)) | None => return Poll::Ready(None),
            };
            if let Some(modes) = message.protocol_config {
                self.modes = modes;
            }
            self.answer(message.request);
        }
    }
}

impl Replies {
    fn answer(&mut self, part: Option<Part>) {
        match part {
            Some(Part::RequestHeaders(_)) => {
                let header = self.null.destination().map(|raw_value| HeaderValue {
                    key: DESTINATION.to_owned(),
                    raw_value,
                    ..HeaderValue::default()
                });
                let set_headers: Vec<_> =
                    header.map(|it| HeaderValueOption { header: Some(it) }).into_iter().collect();
                let response = CommonResponse {
                    header_mutation: Some(HeaderMutation { set_headers, remove_headers: vec![] }),
                    clear_route_cache: true,
                    ..CommonResponse::default()
                };
                let response = Some(response);
                self.pending.push_back(Reply::RequestHeaders(HeadersResponse { response }));
            }
            Some(Part::ResponseHeaders(_)) => {
                self.pending.push_back(Reply::ResponseHeaders(HeadersResponse::default()));
            }
            Some(Part::RequestBody(body)) => {
                self.body(body, self.modes.request_body_mode(), Reply::RequestBody);
            }
            Some(Part::ResponseBody(body)) => {
                self.body(body, self.modes.response_body_mode(), Reply::ResponseBody);
            }
            Some(Part::RequestTrailers(_)) => {
                self.pending.push_back(Reply::RequestTrailers(TrailersResponse::default()));
            }
            Some(Part::ResponseTrailers(_)) => {
                self.pending.push_back(Reply::ResponseTrailers(TrailersResponse::default()));
            }
            None => {}
        }
    }

    fn body(&mut self, body: HttpBody, mode: BodySendMode, reply: fn(BodyResponse) -> Reply) {
        match mode {
            BodySendMode::Streamed | BodySendMode::Buffered | BodySendMode::BufferedPartial => {
                self.pending.push_back(reply(BodyResponse::default()));
            }
            // A mode that is not said reads as none.
            BodySendMode::None | BodySendMode::FullDuplexStreamed | BodySendMode::Grpc => {
                self.pieces(body, reply);
            }
        }
    }

    fn pieces(
        &mut self,
        HttpBody { mut body, end_of_stream }: HttpBody,
        reply: fn(BodyResponse) -> Reply,
    ) {
        loop {
            let piece = body.split_to(body.len().min(BODY_LIMIT));
            let streamed = StreamedBodyResponse {
                body: piece,
                end_of_stream: end_of_stream && body.is_empty(),
            };
            let response = CommonResponse {
                body_mutation: Some(BodyMutation {
                    mutation: Some(Mutation::StreamedResponse(streamed)),
                }),
                ..CommonResponse::default()
            };
            self.pending.push_back(reply(BodyResponse { response: Some(response) }));
            if body.is_empty() {
                break;
            }
        }
    }
}
