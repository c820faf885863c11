//! Messages as they are written in transcripts.

use bytes::Bytes;
use prost_types::{ListValue, Struct, Value, value::Kind};

use crate::epp::ext_proc::fuzz::headers;
pub(super) use crate::proto::ext_proc::BodySendMode as Mode;
use crate::proto::ext_proc::{
    CommonResponse, HeaderMutation, HttpBody, HttpTrailers, Metadata, ProcessingRequest,
    ProcessingResponse, ProtocolConfiguration, body_mutation::Mutation,
    processing_request::Request, processing_response::Response,
};

fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest { request: Some(request), ..Default::default() }
}

fn body(body: impl Into<Bytes>, end_of_stream: bool) -> HttpBody {
    HttpBody { body: body.into(), end_of_stream }
}

pub(super) fn request_headers(pairs: &[(&str, &str)]) -> ProcessingRequest {
    message(Request::RequestHeaders(headers(pairs, false)))
}

/// A request without a body.
pub(super) fn request_headers_only(pairs: &[(&str, &str)]) -> ProcessingRequest {
    message(Request::RequestHeaders(headers(pairs, true)))
}

pub(super) fn request_body(part: impl Into<Bytes>) -> ProcessingRequest {
    message(Request::RequestBody(body(part, false)))
}

pub(super) fn request_end(part: impl Into<Bytes>) -> ProcessingRequest {
    message(Request::RequestBody(body(part, true)))
}

pub(super) fn request_trailers() -> ProcessingRequest {
    message(Request::RequestTrailers(HttpTrailers::default()))
}

pub(super) fn response_headers(pairs: &[(&str, &str)]) -> ProcessingRequest {
    message(Request::ResponseHeaders(headers(pairs, false)))
}

/// A response without a body.
pub(super) fn response_headers_only(pairs: &[(&str, &str)]) -> ProcessingRequest {
    message(Request::ResponseHeaders(headers(pairs, true)))
}

pub(super) fn response_body(part: impl Into<Bytes>) -> ProcessingRequest {
    message(Request::ResponseBody(body(part, false)))
}

pub(super) fn response_end(part: impl Into<Bytes>) -> ProcessingRequest {
    message(Request::ResponseBody(body(part, true)))
}

pub(super) fn response_trailers() -> ProcessingRequest {
    message(Request::ResponseTrailers(HttpTrailers::default()))
}

/// As the first message of a stream whose bodies come so.
pub(super) fn first(
    message: ProcessingRequest,
    request: Mode,
    response: Mode,
) -> ProcessingRequest {
    let modes = ProtocolConfiguration {
        request_body_mode: request as i32,
        response_body_mode: response as i32,
    };
    ProcessingRequest { protocol_config: Some(modes), ..message }
}

fn with_metadata(
    message: ProcessingRequest,
    namespace: &str,
    key: &str,
    kind: Kind,
) -> ProcessingRequest {
    let fields = [(key.to_owned(), Value { kind: Some(kind) })].into();
    let filter_metadata = [(namespace.to_owned(), Struct { fields })].into();
    ProcessingRequest { metadata_context: Some(Metadata { filter_metadata }), ..message }
}

fn text(text: &str) -> Value {
    Value { kind: Some(Kind::StringValue(text.to_owned())) }
}

/// With a list of endpoints that the proxy allows.
pub(super) fn hinting(message: ProcessingRequest, endpoints: &[&str]) -> ProcessingRequest {
    let values = endpoints.iter().map(|endpoint| text(endpoint)).collect();
    hinting_as(message, Kind::ListValue(ListValue { values }))
}

/// With any value in the list's place.
pub(super) fn hinting_as(message: ProcessingRequest, kind: Kind) -> ProcessingRequest {
    with_metadata(message, "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset", kind)
}

/// With the endpoint that answered.
pub(super) fn served_by(message: ProcessingRequest, endpoint: &str) -> ProcessingRequest {
    let kind = Kind::StringValue(endpoint.to_owned());
    with_metadata(message, "envoy.lb", "x-gateway-destination-endpoint-served", kind)
}

/// A reply in one line.
pub(super) fn written(reply: &ProcessingResponse) -> String {
    let common = |name: &str, response: &Option<CommonResponse>| {
        format!("{name}{}", common(response.as_ref().expect("a reply says something")))
    };
    let line = match reply.response.as_ref().expect("a reply") {
        Response::RequestHeaders(reply) => common("request headers", &reply.response),
        Response::ResponseHeaders(reply) => common("response headers", &reply.response),
        Response::RequestBody(reply) => common("request body", &reply.response),
        Response::ResponseBody(reply) => common("response body", &reply.response),
        Response::RequestTrailers(reply) => {
            format!("request trailers{}", mutation(reply.header_mutation.as_ref()))
        }
        Response::ResponseTrailers(reply) => {
            format!("response trailers{}", mutation(reply.header_mutation.as_ref()))
        }
        Response::ImmediateResponse(reply) => {
            let code = reply.status.as_ref().map_or(0, |status| status.code);
            let headers = mutation(reply.headers.as_ref());
            format!("answer {code}{headers} {}", String::from_utf8_lossy(&reply.body))
        }
    };
    match &reply.dynamic_metadata {
        Some(metadata) => format!("{line} {}", structure(metadata)),
        None => line,
    }
}

fn common(response: &CommonResponse) -> String {
    let mut line = String::new();
    if response.clear_route_cache {
        line.push_str(" clear");
    }
    line.push_str(&mutation(response.header_mutation.as_ref()));
    match response.body_mutation.as_ref().map(|body| body.mutation.as_ref().expect("a mutation")) {
        Some(Mutation::StreamedResponse(part)) => {
            line.push_str(&format!(" {}", bytes(&part.body)));
            line.push_str(if part.end_of_stream { " end" } else { "" });
        }
        Some(Mutation::Body(body)) => line.push_str(&format!(" replaced by {}", bytes(body))),
        Some(Mutation::ClearBody(_)) => line.push_str(" cleared"),
        None => {}
    }
    line
}

fn mutation(mutation: Option<&HeaderMutation>) -> String {
    let Some(mutation) = mutation else { return String::new() };
    let set = mutation.set_headers.iter().map(|option| {
        let header = option.header.as_ref().expect("a header");
        assert!(header.value.is_empty(), "values are raw");
        format!(" {}={}", header.key, String::from_utf8_lossy(&header.raw_value))
    });
    let removed = mutation.remove_headers.iter().map(|name| format!(" -{name}"));
    set.chain(removed).collect()
}

fn bytes(bytes: &Bytes) -> String {
    match bytes.len() {
        0..=200 => format!("`{}`", String::from_utf8_lossy(bytes)),
        long => format!("<{long} bytes>"),
    }
}

fn structure(structure: &Struct) -> String {
    let fields = structure
        .fields
        .iter()
        .map(|(key, value)| format!("{key}: {}", kind(value.kind.as_ref().expect("a value"))));
    format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
}

fn kind(kind: &Kind) -> String {
    match kind {
        Kind::StringValue(text) => text.clone(),
        Kind::NumberValue(number) => number.to_string(),
        Kind::StructValue(fields) => structure(fields),
        other => panic!("{other:?} in dynamic metadata"),
    }
}
