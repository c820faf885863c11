//! The messages of an exchange, as Envoy 1.40 sends them in `FULL_DUPLEX_STREAMED` mode.

use bytes::Bytes;

use crate::proto::ext_proc::{
    BodySendMode, HeaderMap, HeaderValue, HttpBody, HttpHeaders, Metadata, ProcessingRequest,
    ProtocolConfiguration, processing_request::Request,
};

/// The first message: a request's head. `id` is its `x-request-id`.
#[must_use]
pub(in crate::loadgen) fn request_headers(
    path: &str,
    id: &str,
    body_bytes: usize,
) -> ProcessingRequest {
    let headers = headers([
        (":authority", Bytes::from_static(b"127.0.0.1:8081")),
        (":path", Bytes::copy_from_slice(path.as_bytes())),
        (":method", Bytes::from_static(b"POST")),
        (":scheme", Bytes::from_static(b"http")),
        ("content-type", Bytes::from_static(b"application/json")),
        ("content-length", body_bytes.to_string().into()),
        ("user-agent", Bytes::from_static(b"loadgen")),
        ("accept", Bytes::from_static(b"*/*")),
        ("x-forwarded-proto", Bytes::from_static(b"http")),
        ("x-request-id", Bytes::copy_from_slice(id.as_bytes())),
    ]);
    let mode = BodySendMode::FullDuplexStreamed.into();
    ProcessingRequest {
        metadata_context: Some(Metadata::default()),
        protocol_config: Some(ProtocolConfiguration {
            request_body_mode: mode,
            response_body_mode: mode,
        }),
        ..message(Request::RequestHeaders(HttpHeaders { headers, end_of_stream: false }))
    }
}

/// A piece of the request body.
#[must_use]
pub(in crate::loadgen) fn request_body(body: Bytes, end_of_stream: bool) -> ProcessingRequest {
    message(Request::RequestBody(HttpBody { body, end_of_stream }))
}

/// A response's head.
#[must_use]
pub(in crate::loadgen) fn response_headers(status: u16, content_type: &str) -> ProcessingRequest {
    let headers = headers([
        (":status", status.to_string().into()),
        ("content-type", Bytes::copy_from_slice(content_type.as_bytes())),
    ]);
    message(Request::ResponseHeaders(HttpHeaders { headers, end_of_stream: false }))
}

/// A piece of the response body.
#[must_use]
pub(in crate::loadgen) fn response_body(
    body: impl Into<Bytes>,
    end_of_stream: bool,
) -> ProcessingRequest {
    message(Request::ResponseBody(HttpBody { body: body.into(), end_of_stream }))
}

fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest { request: Some(request), ..ProcessingRequest::default() }
}

fn headers<const N: usize>(pairs: [(&str, Bytes); N]) -> Option<HeaderMap> {
    let value = |(key, raw_value): (&str, Bytes)| HeaderValue {
        key: key.to_owned(),
        raw_value,
        ..HeaderValue::default()
    };
    Some(HeaderMap { headers: pairs.into_iter().map(value).collect() })
}
