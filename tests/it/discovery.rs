//! Engines asked over HTTP, played by a server in this process.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use http_body_util::Full;
use hyper::{Request, Response, body::Bytes, service::service_fn};
use hyper_util::rt::TokioIo;
use kv_indexer::ingest::{
    discovery::{model_of, parse_pod_flag, resolve},
    fleet::PodDeclaration,
};
use serde_json::json;
use tokio::{net::TcpListener, task::JoinSet};

const PATIENCE: Duration = Duration::from_secs(10);

/// Answers with the body of the path, `404` otherwise. Stops when dropped.
struct Engine {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Engine {
    async fn start(paths: &[(&'static str, u16, String)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (paths, log) = (Arc::new(paths.to_vec()), Arc::clone(&asked));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (paths, log) = (Arc::clone(&paths), Arc::clone(&log));
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let path = request.uri().path().to_owned();
                    let found = paths.iter().find(|(known, ..)| *known == path).cloned();
                    log.lock().unwrap().push(path);
                    async move {
                        let (_, status, body) = found.unwrap_or(("", 404, "no".to_owned()));
                        let body = Full::new(Bytes::from(body));
                        let response = Response::builder().status(status).body(body).unwrap();
                        Ok::<_, Infallible>(response)
                    }
                });
                connections.spawn(async move {
                    // A client that went away is its own business.
                    drop(
                        hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service)
                            .await,
                    );
                });
            }
        });
        Self { address, asked, _tasks: tasks }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn ok(path: &'static str, body: &serde_json::Value) -> (&'static str, u16, String) {
    (path, 200, body.to_string())
}

fn models() -> (&'static str, u16, String) {
    ok("/v1/models", &json!({"object": "list", "data": [{"id": "meta/llama"}, {"id": "lora"}]}))
}

fn declared(engine: &Engine) -> PodDeclaration {
    parse_pod_flag(&format!("10.0.0.1:8000={}", engine.address)).unwrap()
}

async fn failure(paths: &[(&'static str, u16, String)]) -> String {
    let engine = Engine::start(paths).await;
    format!("{:#}", resolve(&declared(&engine), PATIENCE).await.unwrap_err())
}

#[tokio::test]
async fn vllm_names_a_publisher_per_rank() {
    let sources = json!([
        {"data_parallel_rank": 1, "endpoint": "tcp://0.0.0.0:41002", "replay_endpoint": null,
         "topic": ""},
        {"data_parallel_rank": 0, "endpoint": "tcp://*:41001",
         "replay_endpoint": "tcp://0.0.0.0:41003", "topic": ""},
    ]);
    let engine = Engine::start(&[ok("/kv_event_sources", &sources), models()]).await;
    let declaration = PodDeclaration { block_size: Some(32), ..declared(&engine) };
    let zero = PodDeclaration {
        endpoint: "tcp://127.0.0.1:41001".to_owned(),
        replay_endpoint: Some("tcp://127.0.0.1:41003".to_owned()),
        model: Some("meta/llama".to_owned()),
        rank: Some(0),
        engine: "vllm".to_owned(),
        ..declaration.clone()
    };
    let one = PodDeclaration {
        endpoint: "tcp://127.0.0.1:41002".to_owned(),
        replay_endpoint: None,
        rank: Some(1),
        ..zero.clone()
    };
    assert_eq!(resolve(&declaration, PATIENCE).await.unwrap(), [zero, one.clone()]);
    assert_eq!(engine.asked(), ["/kv_event_sources", "/v1/models"]);

    let only = PodDeclaration { rank: Some(1), model: Some("m".to_owned()), ..declaration };
    let named = PodDeclaration { model: Some("m".to_owned()), ..one };
    assert_eq!(resolve(&only, PATIENCE).await.unwrap(), [named]);
    assert_eq!(engine.asked().len(), 3, "a configured model is not asked for");

    let none = PodDeclaration { rank: Some(7), ..only };
    let error = resolve(&none, PATIENCE).await.unwrap_err().to_string();
    assert!(error.contains("rank 7"), "{error}");
}

#[tokio::test]
async fn sglang_names_a_base_port() {
    let info = json!({
        "version": "0.5.23",
        "kv_events": {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557,
                      "topic": "kv-events", "block_size": 64, "dp_size": 1},
        "kv_events_config": r#"{"publisher": "zmq", "replay_endpoint": "tcp://*:5657"}"#,
    });
    for path in ["/server_info", "/get_server_info"] {
        let engine = Engine::start(&[ok(path, &info), models()]).await;
        let declaration = declared(&engine);
        let want = PodDeclaration {
            endpoint: "tcp://127.0.0.1:5557".to_owned(),
            replay_endpoint: Some("tcp://127.0.0.1:5657".to_owned()),
            model: Some("meta/llama".to_owned()),
            topic_filter: "kv-events".to_owned(),
            engine: "sglang".to_owned(),
            engine_version: Some("0.5.23".to_owned()),
            block_size: Some(64),
            ..declaration.clone()
        };
        assert_eq!(resolve(&declaration, PATIENCE).await.unwrap(), [want]);
    }
}

#[tokio::test]
async fn a_model_in_the_topic_comes_first() {
    let sources = json!([{"endpoint": "tcp://*:1", "topic": "kv@10.0.0.1:8000@base"}]);
    let engine = Engine::start(&[ok("/kv_event_sources", &sources), models()]).await;
    let resolved = resolve(&declared(&engine), PATIENCE).await.unwrap();
    assert_eq!(resolved[0].model, None);
    assert_eq!(engine.asked(), ["/kv_event_sources"]);
}

#[tokio::test]
async fn a_model_that_is_not_told_for_now_is_an_error() {
    let sources = ok("/kv_event_sources", &json!([{"endpoint": "tcp://*:1", "topic": "kv"}]));
    for (status, body, why) in [
        (503, "", "status 503"),
        (200, "{", "asking http://"),
        (200, r#"{"data": []}"#, "lists no model"),
    ] {
        let error = failure(&[sources.clone(), ("/v1/models", status, body.to_owned())]).await;
        assert!(error.contains(why), "{error}");
    }
}

#[tokio::test]
async fn an_engine_that_cannot_be_asked_for_its_model_is_no_error() {
    let sources = json!([{"endpoint": "tcp://*:1"}]);
    let engine = Engine::start(&[ok("/kv_event_sources", &sources)]).await;
    assert_eq!(resolve(&declared(&engine), PATIENCE).await.unwrap()[0].model, None);
    let error = model_of(&engine.address, PATIENCE).await.unwrap_err().to_string();
    assert!(error.contains("/v1/models"), "{error}");
}

#[tokio::test]
async fn models_are_asked_for() {
    let engine = Engine::start(&[models()]).await;
    assert_eq!(model_of(&engine.address, PATIENCE).await.unwrap(), "meta/llama");
    let empty = Engine::start(&[ok("/v1/models", &json!({"data": []}))]).await;
    assert!(model_of(&empty.address, PATIENCE).await.is_err());
    assert!(model_of("tcp://127.0.0.1:1", PATIENCE).await.is_err());
}

#[tokio::test]
async fn failures_say_what_is_wrong() {
    let long = format!("\"{}\"", "x".repeat(2 << 20));
    for (paths, why) in [
        (vec![], "neither /kv_event_sources"),
        (vec![("/kv_event_sources", 500, String::new())], "status 500"),
        (vec![("/kv_event_sources", 200, "<html>".to_owned())], "asking http://"),
        (vec![("/kv_event_sources", 200, long)], "length limit exceeded"),
        (vec![ok("/kv_event_sources", &json!([]))], "switched off"),
        (vec![ok("/kv_event_sources", &json!([{"endpoint": "ipc:///x"}]))], "ipc:///x"),
        (vec![ok("/server_info", &json!({"kv_events": null}))], "no KV-event publisher"),
    ] {
        let error = failure(&paths).await;
        assert!(error.contains(why), "{error}");
    }
}

#[tokio::test]
async fn silence_ends_in_time() {
    // Accepts connections in its backlog and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let error = model_of(&address, Duration::from_millis(50)).await.unwrap_err().to_string();
    assert!(error.contains("no answer within 50ms"), "{error}");
    drop(listener);
    let error = format!("{:#}", model_of(&address, PATIENCE).await.unwrap_err());
    assert!(error.contains("asking http://127.0.0.1"), "{error}");
}
