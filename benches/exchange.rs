//! `cargo bench --bench exchange`: cost of one exchange in the protocol's state machine.
//!
//! Measures: messages in, replies out, the picker answering at once; neither gRPC nor parsing nor
//! scheduling, nor the making of the messages.
//! Model: what Envoy 1.40 sends: headers, the body in one message (`whole`) or in parts of 32 KiB
//! (`parts`), an empty end; then response headers and a unary body, or 100 events.
//! Reads as: time per exchange. `whole` must not grow with the body: it is passed on, not copied.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

use std::{hint::black_box, sync::Arc};

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use kv_indexer::{
    epp::ext_proc::{Ask, Exchange, ExchangeConfig, Replies, Routed, headers::HeaderEdits},
    proto::ext_proc::{
        BodySendMode, HeaderMap, HeaderValue, HttpBody, HttpHeaders, ProcessingRequest,
        ProtocolConfiguration, processing_request::Request,
    },
};

const UNARY: &str = r#"{"id":"cmpl-1","object":"text_completion","created":1,"model":"target","choices":[{"index":0,"text":"a few words of an answer, and then a few more","logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":512,"total_tokens":528,"completion_tokens":16,"prompt_tokens_details":{"cached_tokens":496}}}"#;
const EVENT: &str = "data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"target\",\"choices\":[{\"index\":0,\"text\":\" word\",\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n";
const LAST_EVENT: &str = "data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"target\",\"choices\":[],\"usage\":{\"prompt_tokens\":512,\"total_tokens\":612,\"completion_tokens\":100}}\n\ndata: [DONE]\n\n";
const EVENTS: usize = 100;

fn headers(pairs: &[(&str, &'static str)]) -> HttpHeaders {
    let value = |(key, value): &(&str, &'static str)| HeaderValue {
        key: (*key).to_owned(),
        value: String::new(),
        raw_value: Bytes::from_static(value.as_bytes()),
    };
    let headers = Some(HeaderMap { headers: pairs.iter().map(value).collect() });
    HttpHeaders { headers, end_of_stream: false }
}

fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest { request: Some(request), ..Default::default() }
}

fn body(body: Bytes, end_of_stream: bool) -> HttpBody {
    HttpBody { body, end_of_stream }
}

fn request(parts: &[Bytes]) -> Vec<ProcessingRequest> {
    let duplex = BodySendMode::FullDuplexStreamed as i32;
    let mut first = message(Request::RequestHeaders(headers(&[
        (":authority", "inference.example"),
        (":path", "/v1/completions"),
        (":method", "POST"),
        (":scheme", "http"),
        ("user-agent", "curl/8"),
        ("accept", "*/*"),
        ("content-type", "application/json"),
        ("content-length", "2048"),
        ("x-forwarded-proto", "http"),
        ("x-request-id", "5a6b7c8d-0000-4000-8000-000000000000"),
    ])));
    first.protocol_config =
        Some(ProtocolConfiguration { request_body_mode: duplex, response_body_mode: duplex });
    let mut messages = vec![first];
    messages
        .extend(parts.iter().map(|part| message(Request::RequestBody(body(part.clone(), false)))));
    messages.push(message(Request::RequestBody(body(Bytes::new(), true))));
    messages
}

fn response(kind: &'static str, parts: &[Bytes]) -> Vec<ProcessingRequest> {
    let pairs = [(":status", "200"), ("content-type", kind), ("server", "uvicorn")];
    let mut messages = vec![message(Request::ResponseHeaders(headers(&pairs)))];
    let part = |part: &Bytes| message(Request::ResponseBody(body(part.clone(), false)));
    messages.extend(parts.iter().map(part));
    messages.push(message(Request::ResponseBody(body(Bytes::new(), true))));
    messages
}

/// One exchange; with `incoming` the model's name is written back.
fn run(
    config: &Arc<ExchangeConfig>,
    messages: Vec<ProcessingRequest>,
    replies: &mut Replies,
    incoming: &str,
) -> u64 {
    let mut exchange = Exchange::new(config);
    for message in messages {
        match exchange.receive(message, replies) {
            Some(Ask::Route(inbound)) => {
                black_box(&inbound);
                let routed = Routed {
                    incoming_model: incoming.to_owned(),
                    target_model: "target".to_owned(),
                    ..Routed::to("192.168.1.2:8000")
                };
                exchange.routed(Ok(routed), replies);
            }
            Some(Ask::ResponseHeaders(_)) => {
                exchange.response_headers(HeaderEdits::new(), replies);
            }
            None => {}
        }
        while let Some(reply) = replies.pop() {
            black_box(reply);
        }
    }
    exchange.finish().usage.expect("the response has a usage").prompt
}

fn exchange(c: &mut Criterion) {
    let config = Arc::new(ExchangeConfig::default());
    let mut replies = Replies::new();
    let mut group = c.benchmark_group("epp/exchange");
    let mut bench = |name: &str, parameter: &str, messages: &[ProcessingRequest], incoming| {
        group.bench_function(BenchmarkId::new(name, parameter), |b| {
            b.iter_batched(
                || messages.to_vec(),
                |messages| assert_eq!(run(&config, messages, &mut replies, incoming), 512),
                BatchSize::SmallInput,
            );
        });
    };
    let unary = response("application/json", &[Bytes::from_static(UNARY.as_bytes())]);
    for size in [2 << 10, 32 << 10, 256 << 10] {
        let whole = Bytes::from(vec![b'x'; size]);
        let messages = [request(std::slice::from_ref(&whole)), unary.clone()].concat();
        bench("whole", &format!("{}kB", size >> 10), &messages, "target");
    }
    let parts = vec![Bytes::from(vec![b'x'; 32 << 10]); 8];
    bench("parts", "256kB", &[request(&parts), unary].concat(), "target");

    let mut events = vec![Bytes::from_static(EVENT.as_bytes()); EVENTS - 1];
    events.push(Bytes::from_static(LAST_EVENT.as_bytes()));
    let events = response("text/event-stream", &events);
    let messages = [request(&[Bytes::from(vec![b'x'; 2 << 10])]), events].concat();
    bench("events", "2kB+100", &messages, "target");
    bench("events_renamed", "2kB+100", &messages, "client");
    group.finish();
}

criterion_group!(benches, exchange);
criterion_main!(benches);
