//! An `ext_proc` service that decides nothing: the yardstick.
//!
//! It answers request headers at once with a fixed destination, and every body message with the same
//! bytes in pieces as large as Envoy takes, so that its cost is that of the transport, the encoding
//! and nothing else. What the endpoint picker costs beyond it is the endpoint picker's own.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    epp::ext_proc::headers::DESTINATION,
    proto::ext_proc::{
        BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeaderValue, HeaderValueOption,
        HeadersResponse, HttpBody, ProcessingRequest, ProcessingResponse, StreamedBodyResponse,
        TrailersResponse, body_mutation::Mutation, external_processor_server::ExternalProcessor,
        processing_request::Request as Part, processing_response::Response as Reply,
    },
};

/// Bytes of a body in one reply; Envoy's limit is 64 KiB for the whole message.
const BODY_LIMIT: usize = 62_000;

/// Sends everything to one destination.
#[derive(Clone, Debug)]
pub struct Null {
    destination: Bytes,
}

impl Null {
    /// Sends everything to `destination`, an `ip:port`.
    pub fn new(destination: impl Into<Bytes>) -> Self {
        Self { destination: destination.into() }
    }
}

#[tonic::async_trait]
impl ExternalProcessor for Null {
    type ProcessStream = Replies;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Replies>, Status> {
        let destination = self.destination.clone();
        let messages = request.into_inner();
        Ok(Response::new(Replies { messages, destination, pending: VecDeque::new() }))
    }
}

/// The replies to one exchange, made as its messages come.
#[derive(Debug)]
pub struct Replies {
    messages: Streaming<ProcessingRequest>,
    destination: Bytes,
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
            self.answer(message.request);
        }
    }
}

impl Replies {
    fn answer(&mut self, part: Option<Part>) {
        match part {
            Some(Part::RequestHeaders(_)) => {
                let header = HeaderValue {
                    key: DESTINATION.to_owned(),
                    raw_value: self.destination.clone(),
                    ..HeaderValue::default()
                };
                let set_headers = vec![HeaderValueOption { header: Some(header) }];
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
            Some(Part::RequestBody(body)) => self.pieces(body, Reply::RequestBody),
            Some(Part::ResponseBody(body)) => self.pieces(body, Reply::ResponseBody),
            Some(Part::RequestTrailers(_)) => {
                self.pending.push_back(Reply::RequestTrailers(TrailersResponse::default()));
            }
            Some(Part::ResponseTrailers(_)) => {
                self.pending.push_back(Reply::ResponseTrailers(TrailersResponse::default()));
            }
            None => {}
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
