//! Invariants of an exchange, checked from outside: by the fuzz target, its corpus and the tests.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Ask, Exchange, ExchangeConfig, Inbound, Phase, Replies, RewrittenBody, Routed, Usage,
    body::{CHUNK_BYTES, Pieces},
    headers::HeaderEdits,
    remove_usage::{EVENT_BYTES, UsageRemover},
    usage::UsageScan,
};
use crate::{
    epp::director::{DropReason, Refusal, RefusalCode},
    proto::ext_proc::{
        BodySendMode, CommonResponse, HeaderMap, HeaderValue, HttpBody, HttpHeaders, HttpTrailers,
        ProcessingRequest, ProcessingResponse, ProtocolConfiguration, body_mutation::Mutation,
        processing_request::Request, processing_response::Response,
    },
};

/// What one side of an exchange was told.
#[derive(Debug, Default)]
struct Heard {
    headers: bool,
    body: Vec<u8>,
    ended: bool,
    trailers: bool,
}

impl Heard {
    fn headers(&mut self) {
        assert!(!self.headers, "headers are answered once");
        assert!(!self.ended && !self.trailers && self.body.is_empty(), "headers come first");
        self.headers = true;
    }

    /// A body reply; in duplex mode it is a part of the body.
    fn body(&mut self, response: &CommonResponse, duplex: bool) {
        assert!(!self.ended && !self.trailers, "the body is over");
        let mutation = response.body_mutation.as_ref().and_then(|body| body.mutation.as_ref());
        match mutation {
            Some(Mutation::StreamedResponse(part)) => {
                assert!(duplex, "a streamed reply in another mode");
                assert!(part.body.len() <= CHUNK_BYTES);
                self.body.extend_from_slice(&part.body);
                self.ended = part.end_of_stream;
            }
            _ => assert!(!duplex, "duplex mode wants streamed replies"),
        }
    }

    fn trailers(&mut self) {
        assert!(!self.trailers && !self.ended, "trailers end a body, once");
        self.trailers = true;
    }
}

/// An Envoy that keeps what it is told and asserts that it makes sense.
#[derive(Debug, Default)]
struct Envoy {
    request: Heard,
    response: Heard,
    refused: bool,
}

impl Envoy {
    fn take(&mut self, reply: &ProcessingResponse, duplex: (bool, bool)) {
        assert!(!self.refused, "nothing follows an immediate response");
        let common = |response: &Option<CommonResponse>| response.clone().unwrap_or_default();
        match reply.response.as_ref() {
            Some(Response::RequestHeaders(_)) => self.request.headers(),
            Some(Response::RequestBody(reply)) => {
                assert!(self.request.headers, "a body before its headers");
                self.request.body(&common(&reply.response), duplex.0);
            }
            Some(Response::RequestTrailers(_)) => {
                assert!(self.request.headers, "trailers before headers");
                self.request.trailers();
            }
            Some(Response::ResponseHeaders(_)) => self.response.headers(),
            Some(Response::ResponseBody(reply)) => {
                self.response.body(&common(&reply.response), duplex.1);
            }
            Some(Response::ResponseTrailers(_)) => self.response.trailers(),
            Some(Response::ImmediateResponse(_)) => {
                assert!(!self.response.headers, "an answer after the pod's");
                self.refused = true;
            }
            None => unreachable!("an empty reply"),
        }
    }
}

/// Reads the fuzzer's bytes; zeros once they are used up.
struct Input<'a>(std::slice::Iter<'a, u8>);

impl Input<'_> {
    fn next(&mut self) -> u8 {
        self.0.next().copied().unwrap_or_default()
    }

    /// Up to seven fragments of JSON, so that names and usages come about.
    fn body(&mut self) -> Bytes {
        const PARTS: [&str; 18] = [
            "\"model\":",
            " ",
            "\"t\"",
            "\"",
            "\"mod",
            "el\":\"t\"",
            "{",
            "}",
            "\"usage\":",
            "\"usa",
            "ge\"",
            ":",
            "\"prompt_tokens\":3",
            ",\"output_tokens\":4",
            "data: ",
            "\n\n",
            "\"choices\":[]",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3}}\n\n",
        ];
        let count = self.next() % 8;
        let parts = (0..count).map(|_| PARTS[usize::from(self.next() % 18)]);
        Bytes::from(parts.collect::<String>())
    }

    fn answer(&mut self, inbound: &Inbound) -> Result<Routed, Refusal> {
        let how = self.next();
        if how.is_multiple_of(8) {
            let refusal = Refusal::new(RefusalCode::ResourceExhausted, "full");
            return Err(refusal.because(DropReason::RejectedSaturated));
        }
        let mut routed = Routed::to("127.0.0.1:8000");
        routed.edits.set("x-request-id", "a");
        routed.stream = how & 8 != 0;
        routed.skip_response = how & 0xf0 == 0xf0;
        routed.hides_usage = how & 64 != 0;
        if how & 16 != 0 {
            routed.incoming_model = "client".to_owned();
            routed.target_model = "t".to_owned();
        }
        if how & 32 != 0 {
            let half = inbound.body.len() / 2;
            let (one, two) = (inbound.body.slice(..half), inbound.body.slice(half..));
            let new = Bytes::from_static(b"new");
            routed.body = Some(RewrittenBody::from_iter([one, new, two]));
        }
        Ok(routed)
    }
}

/// A stream's first message, or any other.
fn message(request: Request, modes: Option<(i32, i32)>) -> ProcessingRequest {
    let modes = modes.map(|(request_body_mode, response_body_mode)| ProtocolConfiguration {
        request_body_mode,
        response_body_mode,
    });
    ProcessingRequest { request: Some(request), protocol_config: modes, ..Default::default() }
}

/// Headers as Envoy sends them: values as bytes.
pub(super) fn headers(pairs: &[(&str, &str)], end_of_stream: bool) -> HttpHeaders {
    let value = |(key, value): &(&str, &str)| HeaderValue {
        key: (*key).to_owned(),
        value: String::new(),
        raw_value: (*value).to_owned().into(),
    };
    let headers = Some(HeaderMap { headers: pairs.iter().map(value).collect() });
    HttpHeaders { headers, end_of_stream }
}

/// The whole response, restored at once.
fn restored(body: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(body);
    let text = text.replace("\"model\":\"t\"", "\"model\":\"client\"");
    text.replace("\"model\": \"t\"", "\"model\": \"client\"").into_bytes()
}

/// The whole response without its usage.
fn without_usage(body: &[u8]) -> Vec<u8> {
    let mut left = Pieces::new();
    UsageRemover::new().push(Bytes::copy_from_slice(body), false, &mut left);
    left.concat()
}

fn usage_of(body: Vec<u8>) -> Option<Usage> {
    let mut scan = UsageScan::default();
    scan.scan(&body.into());
    scan.usage()
}

/// Interprets `data` as messages and answers in any order and asserts the invariants after each one.
///
/// # Panics
///
/// When one does not hold.
pub fn is_total(data: &[u8]) {
    let mut input = Input(data.iter());
    let modes = (i32::from(input.next() % 7), i32::from(input.next() % 7));
    // The seventh value stands for an Envoy that says nothing.
    let modes = (modes.0 < 6 && modes.1 < 6).then_some(modes);
    let is_duplex = |mode| mode == BodySendMode::FullDuplexStreamed as i32 || mode == 5;
    let duplex = modes.map_or((true, true), |modes| (is_duplex(modes.0), is_duplex(modes.1)));
    let config = Arc::new(ExchangeConfig {
        max_body_bytes: 96,
        max_response_bytes: 96,
        always_content_length: modes.is_none(),
    });
    let mut exchange = Exchange::new(&config);
    let mut envoy = Envoy::default();
    let mut replies = Replies::new();
    let mut first = modes;
    let (mut received, mut gathered) = (Vec::new(), Vec::new());
    let (mut restores, mut hides) = (false, false);
    let mut largest = 0;
    while input.0.len() > 0 {
        let op = input.next();
        let end = op & 16 != 0;
        let request = match op % 11 {
            0 | 1 => Request::RequestHeaders(headers(
                &[(":path", "/v1/completions"), ("x-prefiller-host-port", "6.6.6.6:1")],
                end && op & 32 != 0,
            )),
            2..=4 => Request::RequestBody(HttpBody { body: input.body(), end_of_stream: end }),
            5 => Request::RequestTrailers(HttpTrailers::default()),
            6 => {
                let kind = if op & 32 == 0 { "application/json" } else { "Text/Event-Stream" };
                let pairs = [(":status", "200"), ("content-type", kind)];
                Request::ResponseHeaders(headers(&pairs, end && op & 64 != 0))
            }
            7..=9 => Request::ResponseBody(HttpBody { body: input.body(), end_of_stream: end }),
            _ => Request::ResponseTrailers(HttpTrailers::default()),
        };
        if let Request::RequestBody(part) | Request::ResponseBody(part) = &request {
            largest = largest.max(part.body.len());
        }
        let before = exchange.facts().clone();
        if let Request::ResponseBody(part) = &request
            && !before.ended
            && !exchange.is_finished()
        {
            received.extend_from_slice(&part.body);
        }
        let ask = exchange.receive(message(request, first.take()), &mut replies);
        assert!(exchange.held_bytes() <= 96 + 96 + 2 * largest + 64 + EVENT_BYTES);
        match ask {
            Some(Ask::Route(inbound)) => {
                // Whoever does not wait for the answer is not heard.
                let early = Request::RequestBody(HttpBody::default());
                assert_eq!(exchange.receive(message(early, None), &mut replies), None);
                let answer = input.answer(&inbound);
                if let Ok(routed) = &answer {
                    restores = routed.target_model != routed.incoming_model;
                    hides = routed.hides_usage;
                    gathered = match &routed.body {
                        Some(pieces) => pieces.concat(),
                        None => inbound.body.to_vec(),
                    };
                }
                exchange.routed(answer, &mut replies);
            }
            Some(Ask::ResponseHeaders(_)) => {
                let mut edits = HeaderEdits::new();
                edits.set("x-session-token", "a");
                exchange.response_headers(edits, &mut replies);
            }
            None => {}
        }
        if !duplex.0 && !duplex.1 {
            assert!(replies.len() <= 1, "one reply per message");
        }
        while let Some(reply) = replies.pop() {
            envoy.take(&reply, duplex);
        }
        let facts = exchange.facts();
        assert!(before.response_bytes <= facts.response_bytes);
        assert!(!before.ended || facts.ended);
        assert!(!before.routed || facts.routed);
        assert_eq!(facts.response_bytes, received.len() as u64);
        assert_eq!(envoy.refused, facts.phase == Phase::Refused);
        if duplex.0 && facts.routed && (envoy.request.ended || envoy.request.trailers) {
            let none = envoy.request.body.is_empty() && envoy.request.trailers;
            assert!(none || envoy.request.body == gathered, "another request body");
        }
        if duplex.1 && facts.ended {
            let left =
                if hides && facts.streaming { without_usage(&received) } else { received.clone() };
            let want = if restores { restored(&left) } else { left };
            assert_eq!(envoy.response.body, want, "another response body");
        }
        if facts.ended {
            assert_eq!(facts.usage, usage_of(received.clone()), "another usage");
        }
    }
    let facts = exchange.finish().clone();
    assert_eq!(facts.usage, usage_of(received));
    assert_eq!(exchange.held_bytes(), 0);
    assert!(exchange.is_finished());
}

#[cfg(test)]
mod tests {
    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config {
            cases: 4000, failure_persistence: None, ..Default::default()
        })]
        #[test]
        fn any_bytes_hold(data in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            super::is_total(&data);
        }
    }
}
