//! The state machine of one exchange.

use std::{mem, sync::Arc};

use bytes::Bytes;
use prost_types::value::Kind;

use super::{
    ask::{Ask, ExchangeConfig, Facts, Inbound, Phase, Routed},
    body::{Gather, Pieces, join, length},
    headers::{DESTINATION, HeaderEdits, HeaderList, SIDECAR_HEADERS},
    remove_usage::UsageRemover,
    reply::{LB_METADATA, Replies, Side, Sidecar, request_mutation, routing_metadata},
    restore::Restorer,
    usage::UsageScan,
};
use crate::{
    epp::director::{Refusal, RefusalCode},
    proto::ext_proc::{
        BodySendMode, HeaderMap, HttpBody, HttpHeaders, Metadata, ProcessingRequest,
        processing_request::Request,
    },
};

/// Namespace and key under which the proxy says which endpoints it allows.
const SUBSET: (&str, &str) = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset");
/// Key in [`LB_METADATA`] under which the proxy says which endpoint has answered.
const SERVED: &str = "x-gateway-destination-endpoint-served";

/// One HTTP exchange, which is one gRPC stream.
#[derive(Debug)]
pub struct Exchange {
    config: Arc<ExchangeConfig>,
    /// A message came, so that the modes are known.
    begun: bool,
    /// No reply will follow.
    finished: bool,
    request_mode: Mode,
    response_mode: Mode,
    request: RequestState,
    response: ResponseState,
    /// What the newest message with a hint says.
    subset: Option<Vec<String>>,
    /// The client asked for a stream.
    stream: bool,
    remover: Option<UsageRemover>,
    restorer: Option<Restorer>,
    usage: UsageScan,
    facts: Facts,
}

/// How Envoy sends a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Duplex,
    /// In one message, and waits for the reply.
    Buffered,
    /// In chunks, each of which wants a reply of its own.
    Streamed,
    None,
}

impl Mode {
    fn of(wire: i32) -> Self {
        match BodySendMode::try_from(wire) {
            Ok(BodySendMode::None) => Self::None,
            Ok(BodySendMode::Streamed) => Self::Streamed,
            Ok(BodySendMode::Buffered | BodySendMode::BufferedPartial) => Self::Buffered,
            Ok(BodySendMode::FullDuplexStreamed | BodySendMode::Grpc) | Err(_) => Self::Duplex,
        }
    }
}

#[derive(Debug)]
enum RequestState {
    /// No headers yet.
    Idle,
    Gathering {
        headers: HeaderList,
        body: Gather,
        /// A message with a part of the body came, an empty one perhaps.
        begun: bool,
    },
    /// The picker was asked.
    Asking(Pending),
    /// Went on, but Envoy has more to say that wants a reply.
    Passing,
    /// Nothing more is said.
    Over,
}

/// What is needed to send a request on.
#[derive(Debug)]
struct Pending {
    end: End,
    body: Bytes,
    sidecar: Sidecar,
}

/// What made a request whole, and so what the routing is a reply to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Its headers: there is no body, or (`more`) none that we see in time.
    Headers { more: bool },
    /// The flag in a part of the body.
    Flag,
    /// Trailers; `body`: there were parts of the body before.
    Trailers { body: bool },
    /// The buffered body; `more`: trailers will follow.
    Buffered { more: bool },
    /// Trailers, where a buffered body should have been.
    BufferedTrailers,
}

#[derive(Debug)]
enum ResponseState {
    /// Nothing yet.
    Idle,
    /// The hooks were asked; `end`: there is no body.
    Asking {
        end: bool,
    },
    Body {
        /// Held back until it is whole; `None` if chunks go on as they come.
        held: Option<Gather>,
    },
    Over,
}

impl Exchange {
    /// An exchange of which no message came yet.
    #[must_use]
    pub fn new(config: &Arc<ExchangeConfig>) -> Self {
        Self {
            config: Arc::clone(config),
            begun: false,
            finished: false,
            request_mode: Mode::Duplex,
            response_mode: Mode::Duplex,
            request: RequestState::Idle,
            response: ResponseState::Idle,
            subset: None,
            stream: false,
            remover: None,
            restorer: None,
            usage: UsageScan::default(),
            facts: Facts::default(),
        }
    }

    /// Takes one message and appends the replies to it. A question must be answered before the
    /// next message; a message before that is dropped, as are those that make no sense.
    pub fn receive(&mut self, message: ProcessingRequest, replies: &mut Replies) -> Option<Ask> {
        if self.finished || self.is_asking() {
            return None;
        }
        // Only the first message says how bodies are sent.
        if !mem::replace(&mut self.begun, true)
            && let Some(config) = &message.protocol_config
        {
            self.request_mode = Mode::of(config.request_body_mode);
            self.response_mode = Mode::of(config.response_body_mode);
        }
        if message.observability_mode {
            // Replies would be ignored.
            return None;
        }
        if let Some(metadata) = &message.metadata_context {
            self.read_metadata(metadata);
        }
        match message.request? {
            Request::RequestHeaders(headers) => self.on_request_headers(headers, replies),
            Request::RequestBody(body) => self.on_request_body(body, replies),
            Request::RequestTrailers(_) => self.on_request_trailers(replies),
            Request::ResponseHeaders(headers) => self.on_response_headers(headers),
            Request::ResponseBody(body) => {
                self.on_response_body(body, replies);
                None
            }
            Request::ResponseTrailers(_) => {
                self.on_response_trailers(replies);
                None
            }
        }
    }

    /// Answers [`Ask::Route`]; does nothing if that was not asked.
    pub fn routed(&mut self, answer: Result<Routed, Refusal>, replies: &mut Replies) {
        let RequestState::Asking(pending) = &mut self.request else { return };
        let pending = Pending {
            end: pending.end,
            body: mem::take(&mut pending.body),
            sidecar: pending.sidecar,
        };
        match answer {
            Ok(routed) => self.send_on(pending, routed, replies),
            Err(refusal) => self.refuse(&refusal, replies),
        }
    }

    /// Answers [`Ask::ResponseHeaders`]; does nothing if that was not asked.
    pub fn response_headers(&mut self, edits: HeaderEdits, replies: &mut Replies) {
        let ResponseState::Asking { end } = self.response else { return };
        replies.response_headers(edits);
        if end {
            self.end_response();
        } else {
            self.response = self.response_body_state();
        }
    }

    /// The gRPC stream ended, in whatever way: lets go of what is held, and returns the facts. A
    /// response whose body Envoy does not show us counts as complete if its headers came.
    pub fn finish(&mut self) -> &Facts {
        if self.response_mode == Mode::None && matches!(self.response, ResponseState::Body { .. }) {
            self.end_response();
        }
        self.facts.usage = self.usage.usage();
        self.request = RequestState::Over;
        self.response = ResponseState::Over;
        self.remover = None;
        self.restorer = None;
        self.finished = true;
        &self.facts
    }

    /// What is known by now.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Will no message be answered any more? Then the stream is to be closed, without an error,
    /// once the replies are sent: the request was refused, or its response is nobody's business.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Bytes of bodies that are held back: at most the two limits, one message, a model's name, and the
    /// beginning of an event.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let request = match &self.request {
            RequestState::Gathering { body, .. } => body.bytes(),
            RequestState::Asking(pending) => pending.body.len(),
            _ => 0,
        };
        let response = match &self.response {
            ResponseState::Body { held: Some(held) } => held.bytes(),
            _ => 0,
        };
        let removed = self.remover.as_ref().map_or(0, UsageRemover::held_bytes);
        request + response + removed + self.restorer.as_ref().map_or(0, Restorer::held_bytes)
    }

    fn is_asking(&self) -> bool {
        matches!(self.request, RequestState::Asking(_))
            || matches!(self.response, ResponseState::Asking { .. })
    }

    fn read_metadata(&mut self, metadata: &Metadata) {
        let value = |(namespace, key): (&str, &str)| {
            metadata.filter_metadata.get(namespace)?.fields.get(key)?.kind.as_ref()
        };
        match value(SUBSET) {
            Some(Kind::ListValue(list)) => {
                let text = |value: &prost_types::Value| match &value.kind {
                    Some(Kind::StringValue(text)) => Some(text.clone()),
                    _ => None,
                };
                self.subset = Some(list.values.iter().filter_map(text).collect());
            }
            Some(Kind::StringValue(text)) => {
                let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
                let parts: Vec<String> = parts.map(str::to_owned).collect();
                if !parts.is_empty() {
                    self.subset = Some(parts);
                }
            }
            _ => {}
        }
        if let Some(Kind::StringValue(served)) = value((LB_METADATA, SERVED)) {
            self.facts.served = Some(served.clone());
        }
    }

    // The request.

    fn on_request_headers(&mut self, message: HttpHeaders, replies: &mut Replies) -> Option<Ask> {
        if !matches!(self.request, RequestState::Idle) {
            return None;
        }
        let headers = header_list(message.headers);
        let hidden = matches!(self.request_mode, Mode::Streamed | Mode::None);
        if message.end_of_stream || hidden {
            let more = !message.end_of_stream;
            let mut inbound = self.ask(headers, Bytes::new(), End::Headers { more });
            inbound.header_only = !more;
            inbound.body_hidden = more;
            return Some(Ask::Route(inbound));
        }
        if self.request_mode == Mode::Buffered {
            // What steers must not survive if there turns out to be no body to set it with.
            let steering = SIDECAR_HEADERS.into_iter().chain([DESTINATION]);
            replies.kept_headers(steering.filter(|name| headers.has(name)));
        }
        let body = Gather::default();
        self.request = RequestState::Gathering { headers, body, begun: false };
        None
    }

    fn on_request_body(&mut self, message: HttpBody, replies: &mut Replies) -> Option<Ask> {
        match &mut self.request {
            RequestState::Gathering { body, begun, .. } => {
                self.facts.request_bytes += message.body.len() as u64;
                if body.bytes() + message.body.len() > self.config.max_body_bytes {
                    let limit = self.config.max_body_bytes;
                    let message = format!("request body is larger than {limit} bytes");
                    self.refuse(&Refusal::new(RefusalCode::PayloadTooLarge, message), replies);
                    return None;
                }
                body.push(message.body);
                *begun = true;
                match (self.request_mode, message.end_of_stream) {
                    (Mode::Buffered, end) => self.whole(End::Buffered { more: !end }),
                    (_, true) => self.whole(End::Flag),
                    (_, false) => None,
                }
            }
            RequestState::Passing => {
                self.facts.request_bytes += message.body.len() as u64;
                replies.unchanged_body(Side::Request);
                if message.end_of_stream {
                    self.request = RequestState::Over;
                }
                None
            }
            _ => None,
        }
    }

    fn on_request_trailers(&mut self, replies: &mut Replies) -> Option<Ask> {
        match &mut self.request {
            RequestState::Gathering { begun, .. } => {
                let body = *begun;
                self.whole(match self.request_mode {
                    Mode::Duplex => End::Trailers { body },
                    _ => End::BufferedTrailers,
                })
            }
            RequestState::Passing => {
                replies.trailers(Side::Request);
                self.request = RequestState::Over;
                None
            }
            _ => None,
        }
    }

    /// The body is whole.
    fn whole(&mut self, end: End) -> Option<Ask> {
        let RequestState::Gathering { headers, body, .. } = &mut self.request else { return None };
        let (headers, body) = (mem::take(headers), body.take_whole());
        Some(Ask::Route(self.ask(headers, body, end)))
    }

    fn ask(&mut self, headers: HeaderList, body: Bytes, end: End) -> Inbound {
        let sidecar = SIDECAR_HEADERS.map(|name| headers.has(name));
        self.request = RequestState::Asking(Pending { end, body: body.clone(), sidecar });
        let subset = self.subset.take();
        let response_hidden = self.response_mode == Mode::None;
        Inbound { headers, body, subset, header_only: false, body_hidden: false, response_hidden }
    }

    fn send_on(&mut self, pending: Pending, routed: Routed, replies: &mut Replies) {
        let Pending { end, body, sidecar } = pending;
        let rewritten = routed.body;
        let sends_body = !matches!(end, End::Headers { .. } | End::BufferedTrailers);
        let length = rewritten.as_deref().map_or(body.len(), length);
        let says_length = rewritten.is_some() || self.config.always_content_length;
        let content_length = (sends_body && says_length).then_some(length);
        let metadata = routing_metadata(&routed.destination, routed.scores);
        let mutation = request_mutation(routed.destination, routed.edits, sidecar, content_length);
        let whole = std::slice::from_ref(&body);
        let pieces = rewritten.as_deref().unwrap_or(whole);
        match end {
            End::Headers { .. } => replies.routed_headers(mutation, metadata),
            End::Flag => {
                replies.routed_headers(mutation, metadata);
                replies.streamed(Side::Request, pieces, true);
            }
            End::Trailers { body } => {
                replies.routed_headers(mutation, metadata);
                if body && length > 0 {
                    replies.streamed(Side::Request, pieces, false);
                }
                replies.trailers(Side::Request);
            }
            End::Buffered { .. } => {
                replies.routed_body(mutation, rewritten.as_deref().map(join), metadata);
            }
            // Too late for the headers; what is left is the metadata.
            End::BufferedTrailers => {
                replies.trailers(Side::Request);
                replies.attach(metadata);
            }
        }
        let more = matches!(end, End::Headers { more: true } | End::Buffered { more: true });
        self.request = if more { RequestState::Passing } else { RequestState::Over };
        self.facts.routed = true;
        self.facts.phase = Phase::Routed;
        self.stream = routed.stream;
        self.finished = routed.skip_response;
        self.remover = routed.hides_usage.then(UsageRemover::new);
        self.restorer = Restorer::new(&routed.target_model, &routed.incoming_model);
    }

    /// Answers the client. Nobody else has: a response ends the request that is not routed.
    fn refuse(&mut self, refusal: &Refusal, replies: &mut Replies) {
        replies.refused(refusal);
        self.facts.refused = Some(refusal.code);
        self.facts.phase = Phase::Refused;
        self.request = RequestState::Over;
        self.response = ResponseState::Over;
        self.finished = true;
    }

    // The response.

    fn on_response_headers(&mut self, message: HttpHeaders) -> Option<Ask> {
        if !matches!(self.response, ResponseState::Idle) {
            return None;
        }
        let headers = header_list(message.headers);
        let status = headers.get(":status").or_else(|| headers.get("status"));
        self.facts.response_status = status.and_then(|status| status.parse().ok());
        let events = headers.get("content-type").is_some_and(is_event_stream);
        self.begin_response(events);
        self.response = ResponseState::Asking { end: message.end_of_stream };
        Some(Ask::ResponseHeaders(headers))
    }

    fn begin_response(&mut self, events: bool) {
        // A response to a request that we still have is a local reply of Envoy.
        if matches!(self.request, RequestState::Idle | RequestState::Gathering { .. }) {
            self.request = RequestState::Over;
        }
        self.facts.phase = Phase::Responding;
        self.facts.streaming = self.stream || events;
    }

    fn response_body_state(&self) -> ResponseState {
        let holds = self.response_mode == Mode::Duplex && !self.facts.streaming;
        ResponseState::Body { held: holds.then(Gather::default) }
    }

    fn on_response_body(&mut self, message: HttpBody, replies: &mut Replies) {
        // Envoy may be told not to send response headers.
        if matches!(self.response, ResponseState::Idle) {
            self.begin_response(false);
            self.response = self.response_body_state();
        }
        let ResponseState::Body { held } = &mut self.response else { return };
        let HttpBody { body, end_of_stream: end } = message;
        self.facts.response_bytes += body.len() as u64;
        self.facts.response_chunks += 1;
        self.facts.first_response_body |= !body.is_empty();
        self.usage.scan(&body);

        let duplex = self.response_mode == Mode::Duplex;
        let mut pieces = Pieces::new();
        let mut replaced = false;
        match self.remover.as_mut().filter(|_| self.facts.streaming) {
            Some(remover) => {
                // A buffered body may come without its end, and then nothing follows.
                let hold = !end && self.response_mode != Mode::Buffered;
                replaced = remover.push(body, hold, &mut pieces);
            }
            None => pieces.push(body),
        }
        if let Some(restorer) = &mut self.restorer {
            let last = pieces.len().saturating_sub(1);
            for (at, piece) in std::mem::take(&mut pieces).into_iter().enumerate() {
                let hold = duplex && !(end && at == last);
                replaced |= restorer.push(piece, hold, &mut pieces);
            }
            let rest = if end { restorer.rest() } else { Bytes::new() };
            if !rest.is_empty() {
                pieces.push(rest);
            }
        }
        match held {
            Some(held) => {
                pieces.into_iter().for_each(|piece| held.push(piece));
                let too_much = held.bytes() > self.config.max_response_bytes;
                if end || too_much {
                    replies.streamed(Side::Response, &held.take_pieces(), end);
                    self.response = ResponseState::Body { held: None };
                }
            }
            // All of it is held back: nothing is to be said yet.
            None if duplex && replaced && !end && length(&pieces) == 0 => {}
            None if duplex => replies.streamed(Side::Response, &pieces, end),
            None if replaced => {
                let buffered = self.response_mode == Mode::Buffered;
                replies.replaced_body(Side::Response, &pieces, buffered);
            }
            None => replies.unchanged_body(Side::Response),
        }
        if end {
            self.end_response();
        }
    }

    fn on_response_trailers(&mut self, replies: &mut Replies) {
        match &mut self.response {
            ResponseState::Idle => self.begin_response(false),
            ResponseState::Body { held } => {
                let mut pieces = held.as_mut().map(Gather::take_pieces).unwrap_or_default();
                let rest = self.remover.as_mut().map(UsageRemover::rest).unwrap_or_default();
                match &mut self.restorer {
                    Some(restorer) => {
                        restorer.push(rest, false, &mut pieces);
                    }
                    None => pieces.push(rest),
                }
                // In the other modes what was held back has no reply to go with.
                if length(&pieces) > 0 && self.response_mode == Mode::Duplex {
                    replies.streamed(Side::Response, &pieces, false);
                }
            }
            ResponseState::Asking { .. } | ResponseState::Over => return,
        }
        replies.trailers(Side::Response);
        self.end_response();
    }

    fn end_response(&mut self) {
        self.response = ResponseState::Over;
        self.facts.ended = true;
        self.facts.phase = Phase::Ended;
        self.facts.usage = self.usage.usage();
    }
}

/// Envoy sends `raw_value`; tests, and proxies before it existed, `value`.
fn header_list(headers: Option<HeaderMap>) -> HeaderList {
    let headers = headers.unwrap_or_default().headers.into_iter();
    HeaderList::from_pairs(headers.map(|header| {
        let raw = header.raw_value;
        (header.key, if raw.is_empty() { header.value.into() } else { raw })
    }))
}

fn is_event_stream(content_type: &str) -> bool {
    const EVENTS: &[u8] = b"text/event-stream";
    content_type.as_bytes().windows(EVENTS.len()).any(|part| part.eq_ignore_ascii_case(EVENTS))
}
