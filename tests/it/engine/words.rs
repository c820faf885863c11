//! The mock engine with a model's own tokenizer: its tokens are those of `tokenize::Local`, and it finds
//! the blocks of its answers again.

use std::{net::SocketAddr, path::PathBuf};

use kv_indexer::{
    loadgen::engine::{Engine, EngineOptions},
    tokenize::{Input, Local, models::LocalConfig},
    wire::{BatchReader, Event, Frames, Limits, Scratch},
};
use prometheus::Registry;
use serde_json::{Value, json};

use super::client::Running;
use crate::support::{
    fixture,
    http::{get, post},
    patience, runtime,
};

const BLOCK: usize = 4;

fn model_dir() -> PathBuf {
    fixture("tokenize-tiny")
}

fn options() -> EngineOptions {
    EngineOptions { model_dir: Some(model_dir()), block_size: BLOCK, ..EngineOptions::default() }
}

/// What the engine is compared with.
fn ids(input: &Input) -> Vec<u32> {
    let config = LocalConfig { models_dir: Some(model_dir()), ..LocalConfig::default() };
    let local = Local::load(&config, &Registry::new(), "test").unwrap();
    local.tokenize_now("mock", input).unwrap().ids.to_vec()
}

fn text_ids(text: &str) -> Vec<u32> {
    ids(&Input::Text { text: text.into(), add_special_tokens: true })
}

fn chat_ids(body: &Value) -> Vec<u32> {
    ids(&Input::Chat(body.to_string().into()))
}

fn ask(to: SocketAddr, path: &str, body: &Value) -> Value {
    let reply = post(to, path, &body.to_string());
    assert_eq!(reply.status, 200, "{path} {body}: {reply:?}");
    reply.json()
}

fn cached(usage: &Value) -> usize {
    usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() as usize
}

/// Text and usage of a streamed chat.
fn streamed(to: SocketAddr, body: &Value) -> (String, Value) {
    let mut body = body.clone();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let reply = post(to, "/v1/chat/completions", &body.to_string());
    let mut events: Vec<String> = reply.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    let mut chunks: Vec<Value> =
        events.iter().map(|it| serde_json::from_str(it).unwrap()).collect();
    let usage = chunks.pop().unwrap()["usage"].take();
    let content =
        |chunk: &Value| chunk["choices"][0]["delta"]["content"].as_str().unwrap().to_owned();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    (chunks.iter().map(content).collect(), usage)
}

#[test]
fn chats_grow_by_what_was_answered_and_events_carry_the_ids() {
    const MADE: usize = 26;
    let engine = Running::start(options());
    let (context, sources) = (zmq::Context::new(), engine.event_sources());
    let sub = context.socket(zmq::SUB).unwrap();
    sub.set_rcvtimeo(patience().as_millis() as i32).unwrap();
    sub.set_subscribe(b"").unwrap();
    sub.connect(&sources[0].endpoint).unwrap();
    engine.subscribed();

    let mut body = json!({
        "messages": [{"role": "system", "content": "You are a test. 日本 🚀"},
                     {"role": "user", "content": "Tell me about block pools, please."}],
        "max_tokens": MADE,
    });
    let prompt = chat_ids(&body);
    let first = ask(engine.http(), "/v1/chat/completions", &body);
    let usage = &first["usage"];
    assert_eq!((&usage["prompt_tokens"], cached(usage)), (&json!(prompt.len()), 0));
    assert_eq!(usage["completion_tokens"], MADE);
    let answer = first["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let mut spoken = prompt.clone();
    spoken.extend(text_ids(&answer));
    assert_eq!(spoken.len(), prompt.len() + MADE, "{answer:?}");

    // The last token was never computed.
    let blocks = (spoken.len() - 1) / BLOCK;
    engine.idle();
    let until = engine.cache_contents(0).last_sequence.unwrap();
    assert_eq!(stored(&sub, until), spoken[..blocks * BLOCK]);

    let (again, usage) = streamed(engine.http(), &body);
    assert_eq!((again, cached(&usage)), (answer.clone(), (prompt.len() - 1) / BLOCK * BLOCK));

    let messages = body["messages"].as_array_mut().unwrap();
    messages.push(json!({"role": "assistant", "content": answer}));
    messages.push(json!({"role": "user", "content": [{"type": "text", "text": "More."}]}));
    assert!(chat_ids(&body).starts_with(&spoken));
    let (other, usage) = streamed(engine.http(), &body);
    assert_eq!(cached(&usage), blocks * BLOCK);
    assert_ne!(other, answer);
    engine.idle();
    let totals = engine.totals(0);
    let page = get(engine.http(), "/metrics").body;
    for (name, value) in [("queries", totals.queries), ("hits", totals.hits)] {
        let line = format!("vllm:prefix_cache_{name}_total{{engine=\"0\",model_name=\"mock\"}}");
        assert!(page.contains(&format!("{line} {value}.0\n")), "{line} {value}");
    }
}

/// Tokens of all that is stored up to a sequence, one block behind the other.
fn stored(sub: &zmq::Socket, until: u64) -> Vec<u32> {
    let (mut tokens, mut last) = (Vec::new(), None);
    loop {
        let frames = sub.recv_multipart(0).unwrap();
        let Frames { payload, sequence, .. } = Frames::split(&frames).unwrap();
        let mut reader = BatchReader::new(payload, &Limits::default()).unwrap();
        let mut scratch = Scratch::default();
        while let Some(event) = reader.next_event(&mut scratch) {
            let Event::Stored(event) = event.unwrap() else { panic!("nothing is removed") };
            assert_eq!(event.parent, last);
            last = event.block_hashes.last().copied();
            tokens.extend_from_slice(event.tokens);
        }
        if sequence >= until {
            return tokens;
        }
    }
}

#[test]
fn completions_go_on_with_what_was_answered() {
    let engine = Running::start(options());
    let mut body = json!({"prompt": "Blocks are", "max_tokens": 9});
    let first = ask(engine.http(), "/v1/completions", &body);
    let text = format!("Blocks are{}", first["choices"][0]["text"].as_str().unwrap());
    let tokens = text_ids(&text);
    assert_eq!(first["usage"]["total_tokens"], tokens.len());
    body["prompt"] = text.into();
    let second = ask(engine.http(), "/v1/completions", &body);
    assert_eq!(cached(&second["usage"]), (tokens.len() - 1) / BLOCK * BLOCK);
}

#[test]
fn tokens_are_those_of_the_local_tokenizer() {
    let engine = Running::start(options());
    let to = engine.http();
    let chat = json!({"messages": [{"role": "user", "content": "naïve 東京 <|im_end|>\n"}]});
    let continued = json!({
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "add_generation_prompt": false, "continue_final_message": true,
    });
    let texts = ["plain", "two\n\n  lines <|im_start|>", "fn main() { let x = 1; }"];
    for text in texts {
        let page = ask(to, "/tokenize", &json!({"prompt": text, "add_special_tokens": false}));
        let ids = text_ids(text);
        assert_eq!(page["tokens"], json!(ids), "{text}");
        assert_eq!((&page["count"], &page["max_model_len"]), (&json!(ids.len()), &json!(131_072)));
        let list = ask(to, "/v1/completions/render", &json!({"prompt": text}));
        assert_eq!(list.as_array().unwrap().len(), 1);
        assert_eq!(list[0]["token_ids"], json!(ids), "{text}");
    }
    let list = ask(to, "/v1/completions/render", &json!({"prompt": texts, "model": "mock"}));
    let each: Vec<Value> =
        list.as_array().unwrap().iter().map(|it| it["token_ids"].clone()).collect();
    assert_eq!(each, texts.map(|text| json!(text_ids(text))));
    for chat in [chat, continued] {
        let ids = json!(chat_ids(&chat));
        assert_eq!(ask(to, "/tokenize", &chat)["tokens"], ids, "{chat}");
        let mut page = ask(to, "/v1/chat/completions/render", &chat);
        assert!(page["request_id"].take().as_str().unwrap().starts_with("chatcmpl-"));
        assert_eq!(
            page,
            json!({"request_id": null, "token_ids": ids, "token_offsets": null, "features": null,
                   "model": "mock"})
        );
    }
}

#[test]
fn what_cannot_be_tokenized_is_refused() {
    let engine = Running::start(options());
    let picture = json!([{"type": "image_url", "image_url": {"url": "http://x"}}]);
    for (path, body, status) in [
        ("/v1/chat/completions", json!({"messages": []}), 400),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": picture}]}), 400),
        ("/v1/chat/completions/render", json!({"prompt": "x"}), 400),
        ("/v1/completions/render", json!({"prompt": ""}), 400),
        ("/v1/completions/render", json!({"prompt": "x", "model": "y"}), 404),
        ("/tokenize", json!({"messages": [7]}), 400),
    ] {
        let reply = post(engine.http(), path, &body.to_string());
        assert_eq!(reply.status, status, "{path} {body}: {reply:?}");
    }
}

#[test]
fn rendering_and_details_can_be_off() {
    let off = EngineOptions { scale_out: false, prompt_tokens_details: false, ..options() };
    let engine = Running::start(off);
    for path in ["/v1/completions/render", "/v1/chat/completions/render"] {
        let reply = post(engine.http(), path, r#"{"prompt": "x"}"#);
        let message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out \
                       to enable them.";
        assert_eq!(reply.status, 403, "{reply:?}");
        assert_eq!(
            reply.json(),
            json!({"error": {"message": message, "type": "PermissionDeniedError", "param": null,
                             "code": 403}})
        );
    }
    let reply = ask(engine.http(), "/v1/completions", &json!({"prompt": "x", "max_tokens": 2}));
    assert_eq!(reply["usage"]["prompt_tokens_details"], Value::Null);
}

#[track_caller]
fn refuses(tokenizer: Option<&str>, why: &str) {
    let folder = tempfile::tempdir().unwrap();
    if let Some(tokenizer) = tokenizer {
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    }
    let options = EngineOptions { model_dir: Some(folder.path().to_owned()), ..options() };
    let error = runtime().block_on(Engine::start(options)).unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
    assert!(error.contains(&*folder.path().to_string_lossy()), "{error}");
}

#[test]
fn model_directories_that_cannot_be_used_stop_the_start() {
    refuses(None, "tokenizer.json");
    refuses(Some("{"), "not a tokenizer");
    let letters = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}"#;
    refuses(Some(letters), "only 0 words");
}
