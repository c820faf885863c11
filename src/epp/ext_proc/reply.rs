//! Replies, and how they are built.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
};

use bytes::Bytes;
use prost_types::{Struct, Value, value::Kind};

use super::{
    body::{chunks, join},
    headers::{DESTINATION, HeaderEdits, SIDECAR_HEADERS},
};
use crate::{
    epp::director::Refusal,
    proto::ext_proc::{
        BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeaderValue, HeaderValueOption,
        HeadersResponse, HttpStatus, ImmediateResponse, ProcessingResponse, StreamedBodyResponse,
        TrailersResponse, body_mutation::Mutation, processing_response::Response,
    },
};

/// Namespace of the dynamic metadata that load balancing reads.
pub(super) const LB_METADATA: &str = "envoy.lb";
/// Namespace of the dynamic metadata that says how a request fared.
const REPORT_METADATA: &str = "kv-indexer";
/// Key in [`LB_METADATA`] of the endpoints' scores.
const SCORES: &str = "x-gateway-destination-endpoint-scores";
/// Marks every response that passed through here.
const WENT_THROUGH: &str = "x-went-into-resp-headers";
/// Why a request was not served.
const DROPPED_REASON: &str = "x-llm-d-request-dropped-reason";
/// As the Go EPP spells it.
const CONTENT_LENGTH: &str = "Content-Length";

/// Which conversation a reply belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Request,
    Response,
}

/// Replies in the order in which they are to be sent; reused from message to message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Replies(VecDeque<ProcessingResponse>);

impl Replies {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the first one out.
    pub fn pop(&mut self) -> Option<ProcessingResponse> {
        self.0.pop_front()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Is there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &ProcessingResponse> {
        self.0.iter()
    }

    /// Adds these numbers to the last reply, as dynamic metadata in the namespace `kv-indexer`. Does
    /// nothing if there are none of either.
    pub fn report(&mut self, numbers: &[(&'static str, f64)]) {
        let finite = numbers.iter().filter(|(_, number)| number.is_finite());
        let fields: BTreeMap<_, _> = finite
            .map(|&(name, number)| (name.to_owned(), value(Kind::NumberValue(number))))
            .collect();
        if let Some(last) = self.0.back_mut().filter(|_| !fields.is_empty()) {
            let report = value(Kind::StructValue(Struct { fields }));
            let metadata = last.dynamic_metadata.get_or_insert_default();
            metadata.fields.insert(REPORT_METADATA.to_owned(), report);
        }
    }

    fn push(&mut self, response: Response) {
        self.0.push_back(ProcessingResponse { response: Some(response), dynamic_metadata: None });
    }

    fn push_headers(&mut self, side: Side, response: CommonResponse) {
        let response = HeadersResponse { response: Some(response) };
        self.push(match side {
            Side::Request => Response::RequestHeaders(response),
            Side::Response => Response::ResponseHeaders(response),
        });
    }

    /// "Go on" without these, in reply to request headers whose routing is yet to come.
    pub(super) fn kept_headers(&mut self, without: impl Iterator<Item = &'static str>) {
        let remove_headers: Vec<String> = without.map(str::to_owned).collect();
        let header_mutation = (!remove_headers.is_empty())
            .then(|| HeaderMutation { set_headers: Vec::new(), remove_headers });
        self.push_headers(Side::Request, CommonResponse { header_mutation, ..Default::default() });
    }

    /// Where the request goes, in reply to its headers.
    pub(super) fn routed_headers(&mut self, mutation: HeaderMutation, metadata: Struct) {
        self.push_headers(Side::Request, routing(mutation, None));
        self.attach(metadata);
    }

    /// Where the request goes, in reply to its buffered body.
    pub(super) fn routed_body(
        &mut self,
        mutation: HeaderMutation,
        body: Option<Bytes>,
        metadata: Struct,
    ) {
        self.push_body(Side::Request, routing(mutation, body));
        self.attach(metadata);
    }

    /// Adds dynamic metadata to the last reply.
    pub(super) fn attach(&mut self, metadata: Struct) {
        if let Some(last) = self.0.back_mut() {
            last.dynamic_metadata = Some(metadata);
        }
    }

    /// The mark and `edits`, in reply to response headers.
    pub(super) fn response_headers(&mut self, edits: HeaderEdits) {
        let (set, remove) = edits.into_parts();
        let mut set_headers = Vec::with_capacity(1 + set.len());
        set_headers.push(header(WENT_THROUGH, Bytes::from_static(b"true")));
        set_headers.extend(set.into_iter().filter_map(sendable));
        let remove_headers = remove.into_iter().map(str::to_owned).collect();
        let mutation = HeaderMutation { set_headers, remove_headers };
        let response = CommonResponse { header_mutation: Some(mutation), ..Default::default() };
        self.push_headers(Side::Response, response);
    }

    fn push_body(&mut self, side: Side, response: CommonResponse) {
        let response = BodyResponse { response: Some(response) };
        self.push(match side {
            Side::Request => Response::RequestBody(response),
            Side::Response => Response::ResponseBody(response),
        });
    }

    /// Part of a body in duplex mode, in as many replies as it needs: at least one. With `end` the
    /// last one ends the body.
    pub(super) fn streamed(&mut self, side: Side, pieces: &[Bytes], end: bool) {
        chunks(pieces, |body, last| {
            let part = StreamedBodyResponse { body, end_of_stream: end && last };
            let mutation = BodyMutation { mutation: Some(Mutation::StreamedResponse(part)) };
            let response = CommonResponse { body_mutation: Some(mutation), ..Default::default() };
            self.push_body(side, response);
        });
    }

    /// "Go on" with a body or a chunk of one, in the modes that want one reply per message.
    pub(super) fn unchanged_body(&mut self, side: Side) {
        self.push_body(side, CommonResponse::default());
    }

    /// Another body, or chunk, in the modes that want one reply per message. `buffered`: with its
    /// length, without which Envoy refuses it.
    pub(super) fn replaced_body(&mut self, side: Side, pieces: &[Bytes], buffered: bool) {
        let body = join(pieces);
        let header_mutation = buffered.then(|| HeaderMutation {
            set_headers: vec![header(CONTENT_LENGTH, body.len().to_string())],
            remove_headers: Vec::new(),
        });
        let body_mutation = Some(BodyMutation { mutation: Some(Mutation::Body(body)) });
        self.push_body(
            side,
            CommonResponse { header_mutation, body_mutation, ..Default::default() },
        );
    }

    /// "Go on" with trailers.
    pub(super) fn trailers(&mut self, side: Side) {
        let response = TrailersResponse { header_mutation: None };
        self.push(match side {
            Side::Request => Response::RequestTrailers(response),
            Side::Response => Response::ResponseTrailers(response),
        });
    }

    /// An answer of ours.
    pub(super) fn refused(&mut self, refusal: &Refusal) {
        let headers = refusal.reason.map(|reason| HeaderMutation {
            set_headers: vec![header(DROPPED_REASON, reason.as_str())],
            remove_headers: Vec::new(),
        });
        self.push(Response::ImmediateResponse(ImmediateResponse {
            status: Some(HttpStatus { code: i32::from(refusal.code.status()) }),
            headers,
            body: format!("inference error: {refusal}").into(),
            details: String::new(),
        }));
    }
}

fn routing(mutation: HeaderMutation, body: Option<Bytes>) -> CommonResponse {
    CommonResponse {
        header_mutation: Some(mutation),
        body_mutation: body.map(|body| BodyMutation { mutation: Some(Mutation::Body(body)) }),
        clear_route_cache: true,
    }
}

fn header(name: impl Into<String>, value: impl Into<Bytes>) -> HeaderValueOption {
    let (key, raw_value) = (name.into(), value.into());
    HeaderValueOption { header: Some(HeaderValue { key, value: String::new(), raw_value }) }
}

/// A header as Envoy takes it; `None` if it would refuse the whole reply because of it.
fn sendable((name, value): (Cow<'static, str>, Bytes)) -> Option<HeaderValueOption> {
    let name_ok = http::HeaderName::from_bytes(name.as_bytes()).is_ok();
    let value_ok = value.iter().all(|byte| !byte.is_ascii_control() || *byte == b'\t');
    (name_ok && value_ok).then(|| header(name, value))
}

/// Which of the [`SIDECAR_HEADERS`] the client sent.
pub(super) type Sidecar = [bool; SIDECAR_HEADERS.len()];

/// The changes to a routed request's headers: destination, length of the body if given, and what
/// the picker wants; without the sidecar's headers unless the picker set them.
pub(super) fn request_mutation(
    destination: String,
    edits: HeaderEdits,
    sidecar: Sidecar,
    content_length: Option<usize>,
) -> HeaderMutation {
    let (mut set, mut remove) = edits.into_parts();
    let ours = |name: &str| {
        name.eq_ignore_ascii_case(DESTINATION) || name.eq_ignore_ascii_case(CONTENT_LENGTH)
    };
    set.retain(|(name, _)| !ours(name));
    // What the client did not send needs no removal.
    remove.retain(|name| !ours(name) && !SIDECAR_HEADERS.contains(name));
    let is_set = |name: &str| set.iter().any(|(set, _)| set.eq_ignore_ascii_case(name));
    let sent = SIDECAR_HEADERS.into_iter().zip(sidecar).filter(|(_, sent)| *sent);
    remove.extend(sent.map(|(name, _)| name).filter(|name| !is_set(name)));

    let mut set_headers = Vec::with_capacity(2 + set.len());
    set_headers.push(header(DESTINATION, destination));
    set_headers.extend(content_length.map(|length| header(CONTENT_LENGTH, length.to_string())));
    set_headers.extend(set.into_iter().filter_map(sendable));
    HeaderMutation { set_headers, remove_headers: remove.into_iter().map(str::to_owned).collect() }
}

fn value(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

/// `envoy.lb`: the destination, and the scores if there are any.
pub(super) fn routing_metadata(destination: &str, scores: Option<Vec<(String, f64)>>) -> Struct {
    let record = |fields| value(Kind::StructValue(Struct { fields }));
    let destination = value(Kind::StringValue(destination.to_owned()));
    let mut fields = BTreeMap::from([(DESTINATION.to_owned(), destination)]);
    if let Some(scores) = scores {
        let finite = scores.into_iter().filter(|(_, score)| score.is_finite());
        let scores = finite.map(|(endpoint, score)| (endpoint, value(Kind::NumberValue(score))));
        fields.insert(SCORES.to_owned(), record(scores.collect()));
    }
    Struct { fields: BTreeMap::from([(LB_METADATA.to_owned(), record(fields))]) }
}
