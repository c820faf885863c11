//! The bodies and messages that are sent: built once, shared by all streams.

use std::{fmt, str::FromStr};

use bytes::Bytes;

use crate::proto::ext_proc::{
    BodySendMode, HeaderMap, HeaderValue, HttpBody, HttpHeaders, Metadata, ProcessingRequest,
    ProtocolConfiguration, processing_request::Request,
};

/// Bodies per group; exchanges take them in turn.
const VARIANTS: usize = 4;
/// Words of a prompt: what tokens look like matters to nobody here, what repeats does.
const WORDS: [&str; 16] = [
    "routing", "prefix", "cache", "tokens", "the", "of", "block", "fleet", "serves", "a", "prompt",
    "answer", "with", "engine", "stream", "and",
];

/// What the pod answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseShape {
    /// Nothing: the exchange is over with the routing answer.
    None,
    /// One JSON body with usage.
    Unary,
    /// A stream of so many events, and usage.
    Sse(usize),
}

impl FromStr for ResponseShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "unary" => Ok(Self::Unary),
            _ => text
                .strip_prefix("sse:")
                .and_then(|chunks| chunks.parse().ok())
                .map(Self::Sse)
                .ok_or_else(|| "none, unary, or sse: and a number of chunks".to_owned()),
        }
    }
}

impl fmt::Display for ResponseShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Unary => f.write_str("unary"),
            Self::Sse(chunks) => write!(f, "sse:{chunks}"),
        }
    }
}

/// All that exchanges have in common.
#[derive(Debug)]
pub(super) struct Traffic {
    bodies: Vec<Bytes>,
    /// Messages of the response phase, in order.
    pub(super) response: Vec<ProcessingRequest>,
}

impl Traffic {
    /// Bodies of `size` bytes (at least the envelope's) in `groups` groups.
    #[must_use]
    pub(super) fn new(size: usize, groups: usize, response: ResponseShape) -> Self {
        let bodies = (0..groups.max(1) * VARIANTS)
            .map(|n| Bytes::from(body(size, n / VARIANTS, n % VARIANTS)))
            .collect();
        Self { bodies, response: response_messages(response) }
    }

    /// The body of an exchange.
    #[must_use]
    pub(super) fn body(&self, serial: u64) -> Bytes {
        let at = usize::try_from(serial % self.bodies.len() as u64).unwrap_or_default();
        self.bodies[at].clone()
    }
}

/// A chat completion whose message shares its first three quarters within the group.
fn body(size: usize, group: usize, variant: usize) -> String {
    const HEAD: &str = r#"{"model":"bench-model","messages":[{"role":"user","content":""#;
    const TAIL: &str = r#""}],"max_tokens":8,"temperature":0}"#;
    let text = size.saturating_sub(HEAD.len() + TAIL.len());
    let mut random = fastrand::Rng::with_seed(group as u64);
    let mut content = format!("group {group}: ");
    let mut diverged = false;
    while content.len() < text {
        if !diverged && content.len() >= text / 4 * 3 {
            diverged = true;
            random = fastrand::Rng::with_seed(((group as u64) << 32) | (variant as u64 + 1));
        }
        content.push_str(WORDS[random.usize(..WORDS.len())]);
        content.push(' ');
    }
    content.truncate(text);
    format!("{HEAD}{content}{TAIL}")
}

fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest { request: Some(request), ..ProcessingRequest::default() }
}

fn headers<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> Option<HeaderMap> {
    let value = |(key, value): (&str, String)| HeaderValue {
        key: key.to_owned(),
        raw_value: value.into(),
        ..HeaderValue::default()
    };
    Some(HeaderMap { headers: pairs.into_iter().map(value).collect() })
}

/// The first message of an exchange, as Envoy 1.40 sends it.
pub(super) fn request_headers(serial: u64, body_bytes: usize) -> ProcessingRequest {
    let headers = headers([
        (":authority", "127.0.0.1:8081".to_owned()),
        (":path", "/v1/chat/completions".to_owned()),
        (":method", "POST".to_owned()),
        (":scheme", "http".to_owned()),
        ("content-type", "application/json".to_owned()),
        ("content-length", body_bytes.to_string()),
        ("user-agent", "loadgen".to_owned()),
        ("accept", "*/*".to_owned()),
        ("x-forwarded-proto", "http".to_owned()),
        ("x-request-id", format!("00000000-0000-4000-8000-{serial:012x}")),
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
pub(super) fn request_body(body: Bytes, end_of_stream: bool) -> ProcessingRequest {
    message(Request::RequestBody(HttpBody { body, end_of_stream }))
}

fn response_body(body: impl Into<Bytes>, end_of_stream: bool) -> ProcessingRequest {
    message(Request::ResponseBody(HttpBody { body: body.into(), end_of_stream }))
}

fn response_messages(shape: ResponseShape) -> Vec<ProcessingRequest> {
    const USAGE: &str = r#""usage":{"prompt_tokens":512,"completion_tokens":8,"total_tokens":520,"prompt_tokens_details":{"cached_tokens":384}}"#;
    let head = |content_type: &str| {
        let headers =
            headers([(":status", "200".to_owned()), ("content-type", content_type.to_owned())]);
        message(Request::ResponseHeaders(HttpHeaders { headers, end_of_stream: false }))
    };
    match shape {
        ResponseShape::None => Vec::new(),
        ResponseShape::Unary => vec![
            head("application/json"),
            response_body(
                format!(
                    r#"{{"id":"cmpl-1","model":"bench-model","choices":[{{"index":0,"text":" ok"}}],{USAGE}}}"#
                ),
                false,
            ),
            response_body("", true),
        ],
        ResponseShape::Sse(chunks) => {
            let event = |n| {
                format!(
                    "data: {{\"id\":\"cmpl-1\",\"model\":\"bench-model\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{n}\"}}}}]}}\n\n"
                )
            };
            let mut messages = vec![head("text/event-stream")];
            messages.extend((0..chunks).map(|n| response_body(event(n), false)));
            messages.push(response_body(
                format!("data: {{\"choices\":[],{USAGE}}}\n\ndata: [DONE]\n\n"),
                false,
            ));
            messages.push(response_body("", true));
            messages
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn bodies_are_requests_of_the_size_that_was_asked_for() {
        for size in [256, 2048, 32_768] {
            let traffic = Traffic::new(size, 3, ResponseShape::None);
            for serial in 0..12 {
                let body = traffic.body(serial);
                let parsed: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!((body.len(), &parsed["model"]), (size, &Value::from("bench-model")));
            }
        }
    }

    #[test]
    fn three_quarters_of_a_prompt_are_its_groups() {
        let shared = |a: &[u8], b: &[u8]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let one = body(4096, 0, 0);
        let within = shared(one.as_bytes(), body(4096, 0, 1).as_bytes());
        assert!((2900..3400).contains(&within), "{within}");
        assert!(shared(one.as_bytes(), body(4096, 1, 0).as_bytes()) < 100);
    }

    #[test]
    fn response_shapes_read_as_they_are_written() {
        for text in ["none", "unary", "sse:20"] {
            assert_eq!(text.parse::<ResponseShape>().unwrap().to_string(), text);
        }
        assert!("sse:x".parse::<ResponseShape>().is_err());
        assert_eq!(Traffic::new(9, 1, ResponseShape::Sse(20)).response.len(), 23);
    }
}
