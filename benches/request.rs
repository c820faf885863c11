//! `cargo bench --bench request`: cost of reading a request's body.
//!
//! Measures: the scan (JSON check, model, stream, limits, spans of the prompt), the prompt as bytes
//! and as pseudo tokens, and the splice of a model's name.
//! Model: completions with a prompt of English with a newline every 70 bytes; a chat of 40 messages
//! with a tool; 64 k token ids.
//! Reads as: time per request, and bytes of body per second. The targets: 256 kB in less than
//! 100 µs, 8 MB in less than 3 ms.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::epp::request::{Changes, Parsed, Parsers, Route, estimate_tokens, splice};
use std::hint::black_box;

const WORDS: [&str; 16] = [
    "the", "cache", "of", "a", "prefix", "is", "kept", "where", "it", "was", "computed", "and",
    "read", "again", "by", "requests",
];

/// Text of about so many bytes, as it stands in JSON.
fn text(bytes: usize) -> String {
    let mut random = common::Random(3);
    let mut text = String::with_capacity(bytes + 16);
    let mut line = 0;
    while text.len() < bytes {
        let word = WORDS[random.next() as usize % WORDS.len()];
        text.push_str(word);
        line += word.len() + 1;
        text.push_str(if line > 70 { "\\n" } else { " " });
        line = if line > 70 { 0 } else { line };
    }
    text
}

fn completions(bytes: usize) -> Bytes {
    let prompt = text(bytes);
    format!(r#"{{"max_tokens":100,"model":"meta-llama/Llama-3.1-8B","prompt":"{prompt}","stream":true,"temperature":0}}"#).into()
}

fn chat(bytes: usize, messages: usize) -> Bytes {
    let content = text(bytes / messages);
    let message = |at: usize| {
        let role = if at.is_multiple_of(2) { "user" } else { "assistant" };
        format!(r#"{{"role":"{role}","content":"{content}"}}"#)
    };
    let messages: Vec<String> = (0..messages).map(message).collect();
    let tool = r#"{"type":"function","function":{"name":"get","parameters":{"type":"object"}}}"#;
    let messages = messages.join(",");
    format!(r#"{{"messages":[{messages}],"model":"meta-llama/Llama-3.1-8B","stream":true,"tools":[{tool}]}}"#).into()
}

fn tokens(count: u32) -> Bytes {
    let ids = common::Random(5).tokens(count);
    format!(r#"{{"model":"m","prompt":{ids:?}}}"#).into()
}

fn read(path: &str, body: &[u8]) -> Parsed {
    route(path).read(body).expect("a good body")
}

fn route(path: &str) -> Route {
    Parsers::default().route(path).expect("a known path")
}

/// Bodies by name.
fn bodies() -> Vec<(&'static str, &'static str, Bytes)> {
    let (c, h) = ("/v1/completions", "/v1/chat/completions");
    vec![
        ("completions_2k", c, completions(2 << 10)),
        ("completions_32k", c, completions(32 << 10)),
        ("completions_256k", c, completions(256 << 10)),
        ("completions_8m", c, completions(8 << 20)),
        ("chat_40_256k", h, chat(256 << 10, 40)),
        ("tokens_64k", c, tokens(64 << 10)),
    ]
}

fn scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("request/scan");
    for (name, path, body) in bodies() {
        let route = route(path);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(name, |b| b.iter(|| route.read(black_box(&body))));
    }
    group.finish();
}

fn prompt(c: &mut Criterion) {
    for (what, estimate) in [("request/prompt_bytes", false), ("request/estimate_tokens", true)] {
        let mut group = c.benchmark_group(what);
        for (name, path, body) in bodies() {
            let parsed = read(path, &body);
            let mut out = Vec::new();
            group.throughput(Throughput::Bytes(body.len() as u64));
            group.bench_function(name, |b| {
                b.iter(|| {
                    if estimate {
                        out.clear();
                        estimate_tokens(&parsed, black_box(&body), &mut out, usize::MAX);
                        out.len()
                    } else {
                        parsed.prompt_bytes(black_box(&body)).len()
                    }
                });
            });
        }
        group.finish();
    }
}

fn splicing(c: &mut Criterion) {
    let body = completions(256 << 10);
    let parsed = read("/v1/completions", &body);
    let changes = Changes { model: Some("another-model"), usage: false };
    c.bench_function("request/splice_model/256k", |b| {
        b.iter(|| splice(&parsed, black_box(&body), changes));
    });
}

criterion_group!(benches, scan, prompt, splicing);
criterion_main!(benches);
