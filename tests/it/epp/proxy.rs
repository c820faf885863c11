//! Envoy's side of `ext_proc` without Envoy: messages, and replies in a form that can be compared.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use kv_indexer::proto::ext_proc::{
    CommonResponse, HeaderMap, HeaderMutation, HeaderValue, HttpBody, HttpHeaders, HttpTrailers,
    Metadata, ProcessingRequest, ProcessingResponse, body_mutation::Mutation,
    external_processor_client::ExternalProcessorClient, processing_request::Request,
    processing_response::Response,
};
use prost_types::{ListValue, Struct, Value, value::Kind};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::support::patience;

pub(crate) type Client = ExternalProcessorClient<Channel>;

/// A reply, without what its kind says anyway.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Said {
    /// To request headers: what is set (sorted), what is removed, the destination in the metadata.
    Headers(Vec<(String, String)>, Vec<String>, Option<String>),
    /// A part of the request's body, and whether it is the last one.
    Body(Bytes, bool),
    /// To request trailers.
    Trailers,
    /// To response headers: what is set (sorted).
    ResponseHeaders(Vec<(String, String)>),
    /// A part of the response's body, and whether it is the last one.
    ResponseBody(Bytes, bool),
    /// To response trailers.
    ResponseTrailers,
    /// An answer to the client: status, body, headers.
    Immediate(i32, String, Vec<(String, String)>),
}

/// A stream that is being talked on.
pub(crate) struct Talk {
    messages: Option<mpsc::Sender<ProcessingRequest>>,
    replies: Streaming<ProcessingResponse>,
}

pub(crate) async fn connect(grpc: SocketAddr) -> Client {
    let client = Client::connect(format!("http://{grpc}")).await.unwrap();
    client.max_decoding_message_size(64 << 20)
}

/// All replies to these messages, after which the stream is closed from our side.
pub(crate) async fn replies(
    client: &Client,
    messages: Vec<ProcessingRequest>,
) -> Result<Vec<ProcessingResponse>, Status> {
    let all = async {
        let mut stream = client.clone().process(tokio_stream::iter(messages)).await?.into_inner();
        let mut replies = Vec::new();
        while let Some(reply) = stream.message().await? {
            replies.push(reply);
        }
        Ok(replies)
    };
    within(all).await
}

impl Talk {
    pub(crate) async fn begin(client: &Client) -> Self {
        let (messages, receiver) = mpsc::channel(16);
        let mut client = client.clone();
        let stream = client.process(ReceiverStream::new(receiver));
        let replies = within(stream).await.unwrap().into_inner();
        Self { messages: Some(messages), replies }
    }

    pub(crate) async fn send(&self, message: ProcessingRequest) {
        self.messages.as_ref().unwrap().send(message).await.unwrap();
    }

    pub(crate) async fn reply(&mut self) -> Said {
        said(within(self.replies.message()).await.unwrap().unwrap())
    }

    /// Closes our side and waits for the end of the other.
    pub(crate) async fn finish(mut self) {
        self.messages = None;
        assert_eq!(within(self.replies.message()).await.unwrap(), None);
    }
}

async fn within<T>(run: impl Future<Output = T>) -> T {
    let limit: Duration = patience();
    tokio::time::timeout(limit, run).await.unwrap_or_else(|_| panic!("no reply in {limit:?}"))
}

#[track_caller]
pub(crate) fn said(reply: ProcessingResponse) -> Said {
    let metadata = reply.dynamic_metadata.as_ref().map(destination);
    match reply.response.unwrap() {
        Response::RequestHeaders(headers) => {
            let common = headers.response.unwrap();
            assert!(common.clear_route_cache && common.body_mutation.is_none());
            let (set, removed) = mutation(common.header_mutation);
            Said::Headers(set, removed, metadata)
        }
        Response::RequestBody(body) => {
            let (body, end) = streamed(body.response.unwrap());
            Said::Body(body, end)
        }
        Response::RequestTrailers(_) => Said::Trailers,
        Response::ResponseHeaders(headers) => {
            let common = headers.response.unwrap();
            assert!(!common.clear_route_cache);
            let (set, removed) = mutation(common.header_mutation);
            assert_eq!((removed, metadata), (Vec::new(), None));
            Said::ResponseHeaders(set)
        }
        Response::ResponseBody(body) => {
            let (body, end) = streamed(body.response.unwrap());
            Said::ResponseBody(body, end)
        }
        Response::ResponseTrailers(_) => Said::ResponseTrailers,
        Response::ImmediateResponse(answer) => {
            let body = String::from_utf8(answer.body.to_vec()).unwrap();
            let (set, removed) = mutation(answer.headers);
            assert_eq!((removed, metadata), (Vec::new(), None));
            Said::Immediate(answer.status.unwrap().code, body, set)
        }
    }
}

fn mutation(mutation: Option<HeaderMutation>) -> (Vec<(String, String)>, Vec<String>) {
    let mutation = mutation.unwrap_or_default();
    let text = |value: Bytes| String::from_utf8(value.to_vec()).unwrap();
    let headers = mutation.set_headers.into_iter().map(|set| set.header.unwrap());
    let mut set: Vec<_> = headers
        .map(|header| {
            assert!(header.value.is_empty(), "Envoy reads raw_value");
            (header.key, text(header.raw_value))
        })
        .collect();
    set.sort();
    (set, mutation.remove_headers)
}

fn streamed(common: CommonResponse) -> (Bytes, bool) {
    assert_eq!((common.header_mutation, common.clear_route_cache), (None, false));
    match common.body_mutation.unwrap().mutation.unwrap() {
        Mutation::StreamedResponse(part) => (part.body, part.end_of_stream),
        other => panic!("{other:?}"),
    }
}

fn field<'a>(of: &'a Struct, name: &str) -> Option<&'a Kind> {
    of.fields.get(name)?.kind.as_ref()
}

/// `envoy.lb` in dynamic metadata.
pub(crate) fn lb(metadata: &Struct) -> &Struct {
    assert_eq!(metadata.fields.len(), 1, "{metadata:?}");
    match field(metadata, "envoy.lb") {
        Some(Kind::StructValue(lb)) => lb,
        other => panic!("{other:?}"),
    }
}

fn destination(metadata: &Struct) -> String {
    match field(lb(metadata), "x-gateway-destination-endpoint") {
        Some(Kind::StringValue(destination)) => destination.clone(),
        other => panic!("{other:?}"),
    }
}

/// The scores in dynamic metadata.
pub(crate) fn scores(metadata: &Struct) -> Option<Vec<(String, f64)>> {
    let Some(Kind::StructValue(scores)) =
        field(lb(metadata), "x-gateway-destination-endpoint-scores")
    else {
        return None;
    };
    let number = |(name, value): (&String, &Value)| match value.kind {
        Some(Kind::NumberValue(number)) => (name.clone(), number),
        ref other => panic!("{other:?}"),
    };
    Some(scores.fields.iter().map(number).collect())
}

pub(crate) fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest { request: Some(request), ..ProcessingRequest::default() }
}

fn http_headers(pairs: &[(&str, &str)], end_of_stream: bool) -> HttpHeaders {
    let headers = pairs.iter().map(|&(key, value)| HeaderValue {
        key: key.to_owned(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
        ..HeaderValue::default()
    });
    HttpHeaders { headers: Some(HeaderMap { headers: headers.collect() }), end_of_stream }
}

pub(crate) fn headers(pairs: &[(&str, &str)], end: bool) -> ProcessingRequest {
    message(Request::RequestHeaders(http_headers(pairs, end)))
}

pub(crate) fn body(body: impl Into<Bytes>, end_of_stream: bool) -> ProcessingRequest {
    message(Request::RequestBody(HttpBody { body: body.into(), end_of_stream }))
}

pub(crate) fn trailers() -> ProcessingRequest {
    message(Request::RequestTrailers(HttpTrailers::default()))
}

pub(crate) fn response_headers(pairs: &[(&str, &str)], end: bool) -> ProcessingRequest {
    message(Request::ResponseHeaders(http_headers(pairs, end)))
}

pub(crate) fn response_body(body: impl Into<Bytes>, end_of_stream: bool) -> ProcessingRequest {
    message(Request::ResponseBody(HttpBody { body: body.into(), end_of_stream }))
}

pub(crate) fn response_trailers() -> ProcessingRequest {
    message(Request::ResponseTrailers(HttpTrailers::default()))
}

/// The message with a hint of the endpoints that may be chosen.
pub(crate) fn hinted(mut message: ProcessingRequest, subset: &[String]) -> ProcessingRequest {
    let text = |text: &String| Value { kind: Some(Kind::StringValue(text.clone())) };
    let list = Kind::ListValue(ListValue { values: subset.iter().map(text).collect() });
    let key = "x-gateway-destination-endpoint-subset".to_owned();
    let fields = [(key, Value { kind: Some(list) })].into();
    let namespace = "envoy.lb.subset_hint".to_owned();
    message.metadata_context =
        Some(Metadata { filter_metadata: [(namespace, Struct { fields })].into() });
    message
}
