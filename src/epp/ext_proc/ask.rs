//! What an exchange asks, what it is answered, and what it knows afterwards.

use bytes::Bytes;
use smallvec::SmallVec;

use super::{
    headers::{HeaderEdits, HeaderList},
    usage::Usage,
};
use crate::epp::director::RefusalCode;

/// Limits and switches of all exchanges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeConfig {
    /// Largest request body that is kept for routing, in bytes; a larger one is refused with 413.
    pub max_body_bytes: usize,
    /// How much of a response that is no stream of events is held back until it is whole, in bytes.
    /// Beyond it what is held goes out, and the rest chunk by chunk. Usage is read all the same.
    pub max_response_bytes: usize,
    /// Set `Content-Length` on every routed request with a body, as the Go EPP does, and not only
    /// if the body was rewritten. Envoy ignores it in duplex mode.
    pub always_content_length: bool,
}

impl Default for ExchangeConfig {
    /// 64 MiB, 8 MiB, only if rewritten.
    fn default() -> Self {
        Self { max_body_bytes: 64 << 20, max_response_bytes: 8 << 20, always_content_length: false }
    }
}

/// A question to the caller; the exchange takes no message until it is answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// A whole request is here. Answer with [`Exchange::routed`](super::Exchange::routed).
    Route(Inbound),
    /// The response's headers came. Answer with
    /// [`Exchange::response_headers`](super::Exchange::response_headers).
    ResponseHeaders(HeaderList),
}

/// A whole request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inbound {
    /// The client's headers, pseudo headers included.
    pub headers: HeaderList,
    /// The body in one piece: the received bytes themselves if they came in one message.
    pub body: Bytes,
    /// Endpoints that the proxy allows, as `ip:port`; `None` if it did not say. An empty list
    /// allows none.
    pub subset: Option<Vec<String>>,
    /// The request has no body, by its headers.
    pub header_only: bool,
    /// There is a body that we do not get to see, because Envoy sends none or sends it after the
    /// headers are answered: route it unread.
    pub body_hidden: bool,
    /// We do not get to see the response's body, and cannot take anything out of it.
    pub response_hidden: bool,
}

/// A rewritten body: slices of the received one and what replaces the rest.
pub type RewrittenBody = SmallVec<[Bytes; 3]>;

/// Where a request goes, and how it changes on its way.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    /// `ip:port[,ip:port…]`, best first: header and dynamic metadata `x-gateway-destination-endpoint`.
    pub destination: String,
    /// Further changes to the request's headers.
    pub edits: HeaderEdits,
    /// The new body; `None` sends the received one on.
    pub body: Option<RewrittenBody>,
    /// Endpoint and score, for the dynamic metadata `x-gateway-destination-endpoint-scores`; scores
    /// that are not finite are left out.
    pub scores: Option<Vec<(String, f64)>>,
    /// The model that the client asked for; it is written back into the response.
    pub incoming_model: String,
    /// The model that serves it.
    pub target_model: String,
    /// The client asked for a stream: response chunks are passed on at once, whatever their type.
    pub stream: bool,
    /// The usage of a stream is ours: the event that brings it does not reach the client.
    pub hides_usage: bool,
    /// Nobody looks at the response: the exchange is finished once the request went on.
    pub skip_response: bool,
}

impl Routed {
    /// Sends a request on unchanged.
    #[must_use]
    pub fn to(destination: impl Into<String>) -> Self {
        Self { destination: destination.into(), ..Self::default() }
    }
}

/// How far an exchange has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// The request is not whole, or not routed yet.
    #[default]
    Request,
    /// The request is on its way to a pod.
    Routed,
    /// Response headers, or a part of the body, came.
    Responding,
    /// The response is complete.
    Ended,
    /// The client got an answer of ours.
    Refused,
}

/// What is known of an exchange, for accounting. Everything only ever grows or is set once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// How far it has come.
    pub phase: Phase,
    /// The request was routed.
    pub routed: bool,
    /// Bytes of the request's body as received.
    pub request_bytes: u64,
    /// Bytes of the response's body as received.
    pub response_bytes: u64,
    /// Messages with a part of the response's body.
    pub response_chunks: u64,
    /// Status of the pod's response: `:status`, or `status` as tests send it.
    pub response_status: Option<u16>,
    /// The endpoint that the proxy says has answered; it may differ from the picked one after a
    /// retry.
    pub served: Option<String>,
    /// The response is, or is asked to be, a stream of events.
    pub streaming: bool,
    /// The first bytes of the response's body came.
    pub first_response_body: bool,
    /// The response is complete. A stream that ends before was given up by the client or the proxy.
    pub ended: bool,
    /// What the response says of its tokens; final once `ended`.
    pub usage: Option<Usage>,
    /// Why the client got an answer of ours, the machine's own refusals included.
    pub refused: Option<RefusalCode>,
}
