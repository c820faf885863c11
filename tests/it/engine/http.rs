//! The HTTP API: completions, streams, errors, metrics, faults, restarts.

use std::{io::Read, time::Duration};

use kv_indexer::loadgen::engine::{EngineOptions, MetricsFault, Pace};
use serde_json::json;

use super::client::Running;
use crate::support::{
    eventually,
    http::{get, post, read, send},
};

fn gauge(page: &str, name: &str) -> Option<f64> {
    let line = page.lines().find(|line| line.starts_with(&format!("{name}{{")))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

#[test]
fn completions_are_answered_and_cached() {
    let options =
        EngineOptions { block_size: 4, loras: vec!["sql".to_owned()], ..Default::default() };
    let engine = Running::start(options);
    let prompt: Vec<u32> = (0..10).collect();
    let ask = json!({"model": "mock", "prompt": prompt, "max_tokens": 3});
    let first = post(engine.http(), "/v1/completions", &ask.to_string());
    assert_eq!(first.status, 200, "{first:?}");
    let reply = first.json();
    assert_eq!(
        reply["usage"],
        json!({"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13,
               "prompt_tokens_details": {"cached_tokens": 0}})
    );
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    let served_by = format!("x-served-by: {}", engine.http());
    assert!(first.head.contains(&served_by), "{first:?}");
    let again = post(engine.http(), "/v1/completions", &ask.to_string()).json();
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 8);
    assert_eq!(again["choices"][0]["text"], reply["choices"][0]["text"], "as greedy decoding does");
    // Another adapter, another salt: nothing in common.
    for other in [json!({"model": "sql"}), json!({"cache_salt": "s"})] {
        let mut ask = ask.clone();
        ask.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        let reply = post(engine.http(), "/v1/completions", &ask.to_string()).json();
        assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "{ask}");
    }
    let many = json!({"prompt": [[1, 2, 3], [4, 5, 6, 7]], "max_tokens": 2}).to_string();
    let reply = post(engine.http(), "/v1/completions", &many).json();
    assert_eq!(reply["choices"].as_array().unwrap().len(), 2);
    assert_eq!(reply["usage"]["prompt_tokens"], 7);
    engine.idle();
    assert_eq!(engine.totals(0).generation, 3 * 4 + 4);
}

#[test]
fn chats_are_streamed_and_grow() {
    let engine = Running::start(EngineOptions { block_size: 4, ..Default::default() });
    let mut messages =
        vec![json!({"role": "user", "content": "Tell me about block pools, please."})];
    let ask = |messages: &Vec<serde_json::Value>| {
        let body = json!({"messages": messages, "max_completion_tokens": 9, "stream": true,
                          "stream_options": {"include_usage": true}});
        let reply = post(engine.http(), "/v1/chat/completions", &body.to_string());
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.events()
    };
    let events = ask(&messages);
    assert_eq!(events.len(), 9 + 2);
    assert_eq!(events[10], "[DONE]");
    let chunks: Vec<serde_json::Value> =
        events[..10].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks[8]["choices"][0]["finish_reason"], "length");
    assert_eq!(chunks[9]["usage"]["completion_tokens"], 9);
    let text: String = chunks[..9]
        .iter()
        .map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    // The next turn finds what was generated, too: all but the last token, which was never computed.
    let first_turn = chunks[9]["usage"]["prompt_tokens"].as_u64().unwrap();
    messages.push(json!({"role": "assistant", "content": text}));
    messages.push(json!({"role": "user", "content": "More."}));
    let events = ask(&messages);
    let last: serde_json::Value = serde_json::from_str(&events[9]).unwrap();
    let cached = last["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached, (first_turn + 8) / 4 * 4);
}

#[test]
fn wrong_requests_get_openai_errors() {
    let options = EngineOptions { num_gpu_blocks: 5, block_size: 4, ..Default::default() };
    let engine = Running::start(options);
    for (path, body, status) in [
        ("/v1/completions", "{", 400),
        ("/v1/completions", r#"{"prompt": []}"#, 400),
        ("/v1/completions", r#"{"model": "x", "prompt": [1]}"#, 404),
        ("/v1/completions", r#"{"prompt": [1], "max_tokens": 16}"#, 400),
        ("/v1/chat/completions", r#"{"prompt": [1]}"#, 400),
        ("/nowhere", "", 404),
        ("/health", "", 405),
    ] {
        let reply = post(engine.http(), path, body);
        assert_eq!(reply.status, status, "{path} {body}: {reply:?}");
        assert_eq!(reply.json()["error"]["code"], status, "{path} {body}");
    }
    let unknown = post(engine.http(), "/v1/completions", r#"{"model": "x", "prompt": [1]}"#).json();
    assert_eq!(unknown["error"]["type"], "NotFoundError");
    assert_eq!(unknown["error"]["message"], "The model `x` does not exist.");
    // All that fits: four blocks.
    let fits = post(engine.http(), "/v1/completions", r#"{"prompt": [1], "max_tokens": 15}"#);
    assert_eq!(fits.json()["usage"]["completion_tokens"], 15);
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    // A token takes a second: nothing ends by itself.
    let pace = Pace { step_us: 1e6, ..Pace::default() };
    let engine = Running::start(EngineOptions { pace, ..Default::default() });
    for stream in ["true", "false"] {
        let body = format!(r#"{{"prompt": [1, 2, 3], "max_tokens": 1000, "stream": {stream}}}"#);
        let mut asked = send(engine.http(), "POST", "/v1/completions", &[], &body).unwrap();
        eventually("the request runs", || {
            let page = get(engine.http(), "/metrics").body;
            match gauge(&page, "vllm:num_requests_running") {
                Some(1.0) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        if stream == "true" {
            let mut byte = [0];
            asked.read_exact(&mut byte).unwrap();
        }
        drop(asked);
        engine.idle();
        assert_eq!(
            gauge(&get(engine.http(), "/metrics").body, "vllm:kv_cache_usage_perc"),
            Some(0.0)
        );
    }
}

#[test]
fn metrics_can_be_pinned_padded_and_broken() {
    let engine = Running::start(EngineOptions { metrics_padding: 90_000, ..Default::default() });
    engine.pin_load(7, 3, 0.5);
    let page = get(engine.http(), "/metrics").body;
    assert!((90_000..110_000).contains(&page.len()), "{}", page.len());
    let read_load = |page: &str| {
        ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
            .map(|name| gauge(page, name).unwrap())
    };
    assert_eq!(read_load(&page), [7.0, 3.0, 0.5]);
    engine.unpin_load();
    assert_eq!(read_load(&get(engine.http(), "/metrics").body), [0.0; 3]);
    engine.fail_metrics(Some(MetricsFault::Error));
    assert_eq!(get(engine.http(), "/metrics").status, 500);
    engine.fail_metrics(Some(MetricsFault::Garbage));
    assert!(get(engine.http(), "/metrics").body.starts_with("<html>"));
    engine.fail_metrics(Some(MetricsFault::Hang));
    let hangs = send(engine.http(), "GET", "/metrics", &[], "").unwrap();
    hangs.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    read(hangs).unwrap_err();
    assert_eq!(get(engine.http(), "/health").status, 200);
    engine.fail_metrics(None);
    assert_eq!(get(engine.http(), "/metrics").status, 200);
    engine.refuse_connections(true);
    eventually("it refuses", || match send(engine.http(), "GET", "/health", &[], "") {
        Err(_) => Ok(()),
        Ok(stream) => read(stream).map_or(Ok(()), |reply| Err(format!("{reply:?}"))),
    });
    engine.refuse_connections(false);
    eventually("it accepts again", || {
        let stream = send(engine.http(), "GET", "/health", &[], "").map_err(|e| e.to_string())?;
        read(stream).map(drop).map_err(|e| e.to_string())
    });
}

#[test]
fn ranks_are_taken_in_turn_or_by_name_and_heads_are_kept() {
    let engine = Running::start(EngineOptions { data_parallel_size: 2, ..Default::default() });
    let body = r#"{"prompt": [1, 2], "max_tokens": 1}"#;
    for _ in 0..4 {
        assert_eq!(post(engine.http(), "/v1/completions", body).status, 200);
    }
    let headers =
        [("X-data-parallel-rank", "1"), ("X-Request-Id", "r-7"), ("x-prefiller-host-port", "h:1")];
    for _ in 0..3 {
        let reply = read(send(engine.http(), "POST", "/v1/completions", &headers, body).unwrap());
        assert_eq!(reply.unwrap().json()["id"], "cmpl-r-7");
    }
    assert_eq!([0, 1].map(|rank| engine.totals(rank).generation), [2, 5]);
    let heads = engine.request_heads();
    assert_eq!((heads.len(), engine.requests_seen()), (7, 7));
    assert_eq!(heads[6].header("x-prefiller-host-port"), Some("h:1"));
    assert_eq!(heads[6].body, body.as_bytes());
    let wrong = [("X-data-parallel-rank", "2")];
    let reply = read(send(engine.http(), "POST", "/v1/completions", &wrong, body).unwrap());
    assert_eq!(reply.unwrap().status, 400);
    let sources = get(engine.http(), "/kv_event_sources").json();
    let published = engine.event_sources();
    assert_eq!(sources["1"]["endpoint"], published[1].endpoint);
    assert_ne!(published[0].endpoint, published[1].endpoint);
    assert_eq!(get(engine.http(), "/v1/models").json()["data"][0]["id"], "mock");
}

#[test]
fn it_starts_again_at_the_same_ports() {
    let mut engine = Running::start(EngineOptions::default());
    let (http, sources, options) = (engine.http(), engine.event_sources(), engine.same_ports());
    engine.stop();
    get_refused(http);
    let mut engine = Running::start(options.clone());
    assert_eq!((engine.http(), engine.event_sources()), (http, sources));
    let pace = Pace { step_us: 1e6, ..Pace::default() };
    engine.stop();
    let mut engine = Running::start(EngineOptions { pace, ..options });
    let body = r#"{"prompt": [1], "max_tokens": 1000}"#;
    let asked = send(engine.http(), "POST", "/v1/completions", &[], body).unwrap();
    eventually("the request arrives", || match engine.requests_seen() {
        0 => Err("none".to_owned()),
        _ => Ok(()),
    });
    engine.kill();
    read(asked).unwrap_err();
    get_refused(http);
}

fn get_refused(http: std::net::SocketAddr) {
    send(http, "GET", "/health", &[], "").map(drop).unwrap_err();
}
