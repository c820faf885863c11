//! Asking an engine what it publishes, and what model it serves.
//!
//! Checked against these sources and their tests, as stored in November 2026:
//!
//! * vLLM `vllm/entrypoints/serve/kv_events/api_router.py`: `GET /kv_event_sources` answers with a
//!   JSON array of `{data_parallel_rank, endpoint, replay_endpoint, topic}`, endpoints resolved per
//!   rank; a fork wraps the array in `{"sources": …}`; 0.31 and 0.32 were read as `{rank: config}`.
//!   All three are understood.
//! * SGLang `KVEventsConfig.resolved_block` and its `/server_info` tests: `kv_events` is null or
//!   `{publisher, endpoint_host, endpoint_port_base, topic, block_size, dp_size}`, a rank's port is
//!   base + rank; beside it `kv_events_config`, the flag as a JSON string, `dp_size`, `page_size`
//!   and `version`. `/get_server_info` is its old name.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::{address::reachable, http::Server};
use crate::{ingest::fleet::PodDeclaration, wire::Topic};

/// Ranks per engine at most: a bound for what a broken answer can make us do.
const MAX_RANKS: u64 = 1024;

const NO_MODELS: &str = "there is no /v1/models";

/// One publisher that an engine announces.
#[derive(Debug, Default, PartialEq)]
struct Source {
    rank: Option<u32>,
    endpoint: String,
    replay_endpoint: Option<String>,
    topic: String,
}

/// What an engine says of itself.
#[derive(Debug, Default, PartialEq)]
struct Engine {
    name: &'static str,
    version: Option<String>,
    block_size: Option<u32>,
    sources: Vec<Source>,
}

/// Asks the engine at `declaration.endpoint` (`http://host:port`) for its publishers: one
/// declaration each, by rank, with what was declared taking precedence over what the engine says.
///
/// `timeout` bounds each request; there are at most four, one after the other.
///
/// # Errors
///
/// When the engine cannot be asked, announces no publisher that can be connected to, or none of
/// the declared rank. A model that is needed and not told is an error, too, for the declarations
/// would differ from those of an answer that tells it; unless the engine cannot be asked for it.
pub async fn resolve(
    declaration: &PodDeclaration,
    timeout: Duration,
) -> anyhow::Result<Vec<PodDeclaration>> {
    let server = Server::new(&declaration.endpoint, timeout)?;
    let mut engine = ask(&server).await?;
    if let Some(rank) = declaration.rank {
        engine.sources.retain(|source| source.rank.is_none_or(|announced| announced == rank));
        ensure!(!engine.sources.is_empty(), "the engine announces no publisher of rank {rank}");
    }
    engine.sources.sort_by_key(|source| source.rank);
    let declared_model = declaration.model.is_some();
    let model = if declared_model || engine.sources.iter().all(|s| topic_names_model(&s.topic)) {
        declaration.model.clone()
    } else {
        let model = ask_model(&server).await?;
        if model.is_none() {
            tracing::warn!(pod = declaration.pod, "{NO_MODELS}, so the engine names no model.");
        }
        model
    };
    let single = engine.sources.len() == 1;
    let sources = engine.sources.into_iter().map(|source| PodDeclaration {
        replay_endpoint: declaration
            .replay_endpoint
            .clone()
            .filter(|_| single)
            .or(source.replay_endpoint),
        model: model.clone().filter(|_| declared_model || !topic_names_model(&source.topic)),
        rank: declaration.rank.or(source.rank),
        topic_filter: if declaration.topic_filter.is_empty() {
            source.topic
        } else {
            declaration.topic_filter.clone()
        },
        engine: if declaration.engine.is_empty() {
            engine.name.to_owned()
        } else {
            declaration.engine.clone()
        },
        engine_version: declaration.engine_version.clone().or_else(|| engine.version.clone()),
        block_size: declaration.block_size.or(engine.block_size),
        endpoint: source.endpoint,
        ..declaration.clone()
    });
    Ok(sources.collect())
}

/// The first model that `/v1/models` of the engine at `http_address` (`http://host:port`) lists.
///
/// # Errors
///
/// When it cannot be asked within `timeout`, or lists none.
pub async fn model_of(http_address: &str, timeout: Duration) -> anyhow::Result<String> {
    ask_model(&Server::new(http_address, timeout)?).await?.context(NO_MODELS)
}

/// The engine's model; none when it has no such path.
async fn ask_model(server: &Server<'_>) -> anyhow::Result<Option<String>> {
    let Some(models) = server.get("/v1/models").await? else { return Ok(None) };
    let first = models.pointer("/data/0/id").and_then(Value::as_str);
    match first.filter(|id| !id.is_empty()) {
        Some(id) => Ok(Some(id.to_owned())),
        None => bail!("/v1/models lists no model"),
    }
}

async fn ask(server: &Server<'_>) -> anyhow::Result<Engine> {
    if let Some(json) = server.get("/kv_event_sources").await? {
        let engine = vllm(&json, server.host).context("reading /kv_event_sources")?;
        ensure!(!engine.sources.is_empty(), "the engine has KV-event publishing switched off");
        return Ok(engine);
    }
    for path in ["/server_info", "/get_server_info"] {
        if let Some(json) = server.get(path).await? {
            let engine = sglang(&json, server.host).with_context(|| format!("reading {path}"))?;
            ensure!(!engine.sources.is_empty(), "the engine announces no KV-event publisher");
            return Ok(engine);
        }
    }
    bail!(
        "the engine has neither /kv_event_sources (vLLM 0.31 and later) nor /server_info (SGLang): \
         declare its tcp:// endpoint"
    )
}

/// Is the topic `kv@pod@model`? Then the model comes from there.
fn topic_names_model(topic: &str) -> bool {
    Topic::parse(topic.as_bytes(), usize::MAX).is_ok_and(|topic| !topic.model.is_empty())
}

fn vllm(json: &Value, host: &str) -> anyhow::Result<Engine> {
    let mut sources = Vec::new();
    match json.get("sources").unwrap_or(json) {
        Value::Array(list) => {
            for config in list {
                sources.extend(vllm_source(None, config, host)?);
            }
        }
        Value::Object(one) if one.contains_key("endpoint") => {
            sources.extend(vllm_source(None, json, host)?);
        }
        Value::Object(by_rank) => {
            for (rank, config) in by_rank {
                let Ok(rank) = rank.parse() else { bail!("{rank:?} is no rank") };
                sources.extend(vllm_source(Some(rank), config, host)?);
            }
        }
        Value::Null => {}
        _ => bail!("neither a list nor an object of publishers"),
    }
    Ok(Engine { name: "vllm", sources, ..Engine::default() })
}

fn vllm_source(rank: Option<u32>, config: &Value, host: &str) -> anyhow::Result<Option<Source>> {
    let off = config.get("enable_kv_cache_events") == Some(&Value::Bool(false));
    let Some(endpoint) = text(config, "endpoint").filter(|_| !off && publishes(config, "zmq"))
    else {
        return Ok(None);
    };
    let rank = rank.or_else(|| number(config, "data_parallel_rank")).or(number(config, "rank"));
    let at = |endpoint| reachable(endpoint, host, 0).map_err(anyhow::Error::msg);
    Ok(Some(Source {
        rank,
        endpoint: at(endpoint)?,
        replay_endpoint: text(config, "replay_endpoint").map(at).transpose()?,
        topic: text(config, "topic").unwrap_or_default().to_owned(),
    }))
}

fn sglang(info: &Value, host: &str) -> anyhow::Result<Engine> {
    let flag = match info.get("kv_events_config") {
        Some(Value::String(flag)) => serde_json::from_str(flag).context("kv_events_config")?,
        other => other.cloned().unwrap_or_default(),
    };
    let block = info.get("kv_events").unwrap_or(&Value::Null);
    let mut engine = Engine {
        name: "sglang",
        version: text(info, "version").map(str::to_owned),
        block_size: number(block, "block_size")
            .or(number(info, "page_size"))
            .filter(|&size| size > 0),
        sources: Vec::new(),
    };
    // The publisher's default is `null`; the block is absent then.
    let endpoint = match (text(block, "endpoint_host"), number(block, "endpoint_port_base")) {
        (Some(host), Some(port)) if publishes(block, "zmq") => format!("tcp://{host}:{port}"),
        _ if publishes(&flag, "null") => {
            text(&flag, "endpoint").unwrap_or("tcp://*:5557").to_owned()
        }
        _ => return Ok(engine),
    };
    ensure!(
        flag.get("bind") != Some(&Value::Bool(false)),
        "the engine connects to {endpoint} instead of listening there: bind a socket for it"
    );
    let replay = text(&flag, "replay_endpoint");
    let topic = text(block, "topic").or(text(&flag, "topic")).unwrap_or_default();
    let ranks = block.get("dp_size").or(info.get("dp_size")).and_then(Value::as_u64).unwrap_or(1);
    ensure!(ranks <= MAX_RANKS, "{ranks} ranks are more than {MAX_RANKS}");
    for rank in 0..u32::try_from(ranks.max(1))? {
        let at = |endpoint| reachable(endpoint, host, rank).map_err(anyhow::Error::msg);
        engine.sources.push(Source {
            rank: (ranks > 1).then_some(rank),
            endpoint: at(&endpoint)?,
            replay_endpoint: replay.map(at).transpose()?,
            topic: topic.to_owned(),
        });
    }
    Ok(engine)
}

/// Is the publisher ZeroMQ, if `default` is what a configuration that names none means?
fn publishes(config: &Value, default: &str) -> bool {
    text(config, "publisher").unwrap_or(default) == "zmq"
}

/// A text that is there and not empty.
fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str().filter(|text| !text.is_empty())
}

fn number(value: &Value, key: &str) -> Option<u32> {
    value.get(key)?.as_u64().and_then(|number| number.try_into().ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn source(rank: impl Into<Option<u32>>, port: u16, replay: Option<u16>) -> Source {
        Source {
            rank: rank.into(),
            endpoint: format!("tcp://h:{port}"),
            replay_endpoint: replay.map(|port| format!("tcp://h:{port}")),
            topic: "kv".to_owned(),
        }
    }

    #[test]
    fn vllm_answers() {
        let configs = [
            json!({"data_parallel_rank": 0, "endpoint": "tcp://*:1", "replay_endpoint": null,
                   "topic": "kv"}),
            json!({"data_parallel_rank": 1, "endpoint": "tcp://0.0.0.0:2",
                   "replay_endpoint": "tcp://[::]:3", "topic": "kv", "new": {}}),
        ];
        let want = [source(0, 1, None), source(1, 2, Some(3))];
        for shape in [
            json!(configs),
            json!({"sources": configs}),
            json!({"0": configs[0], "1": configs[1]}),
            json!({"sources": {"0": configs[0], "1": configs[1]}}),
        ] {
            assert_eq!(vllm(&shape, "h").unwrap().sources, want, "{shape}");
        }
        assert_eq!(vllm(&configs[0], "h").unwrap().sources, want[..1]);
        for nothing in [
            json!([]),
            json!({}),
            json!(null),
            json!({"0": {"endpoint": null}}),
            json!([{"endpoint": "tcp://h:1", "publisher": "null"}]),
            json!([{"endpoint": "tcp://h:1", "enable_kv_cache_events": false}]),
        ] {
            assert_eq!(vllm(&nothing, "h").unwrap().sources, [], "{nothing}");
        }
        for wrong in [json!(1), json!({"x": {}}), json!([{"endpoint": "ipc:///tmp/x"}])] {
            assert!(vllm(&wrong, "h").is_err(), "{wrong}");
        }
    }

    #[test]
    fn sglang_answers() {
        let flag = r#"{"publisher": "zmq", "endpoint": "tcp://*:10", "topic": "kv",
                       "replay_endpoint": "tcp://*:20"}"#;
        let block = json!({"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 10,
                           "topic": "kv", "block_size": 64, "dp_size": 2});
        let two = [source(0, 10, Some(20)), source(1, 11, Some(21))];
        let full = json!({"kv_events": block, "kv_events_config": flag, "version": "0.5.23"});
        let engine = sglang(&full, "h").unwrap();
        assert_eq!(engine.sources, two);
        assert_eq!((engine.version.as_deref(), engine.block_size), (Some("0.5.23"), Some(64)));
        // Before the block there was the flag.
        let old = json!({"kv_events_config": flag, "dp_size": 2, "page_size": 16});
        let engine = sglang(&old, "h").unwrap();
        assert_eq!((engine.sources.as_slice(), engine.block_size), (two.as_slice(), Some(16)));
        let one = json!({"kv_events": {"endpoint_host": "h", "endpoint_port_base": 10,
                         "topic": "kv", "dp_size": 1}});
        assert_eq!(sglang(&one, "x").unwrap().sources, [source(None, 10, None)]);
        for nothing in [
            json!({}),
            json!({"kv_events": null, "kv_events_config": null}),
            json!({"kv_events_config": "{}"}),
            json!({"vllm_config": "…"}),
        ] {
            assert_eq!(sglang(&nothing, "h").unwrap().sources, [], "{nothing}");
        }
        for wrong in [
            json!({"kv_events_config": "{"}),
            json!({"kv_events_config": {"publisher": "zmq", "endpoint": "inproc://x"}}),
            json!({"kv_events_config": {"publisher": "zmq", "bind": false}}),
            json!({"kv_events_config": {"publisher": "zmq"}, "dp_size": 100_000}),
        ] {
            assert!(sglang(&wrong, "h").is_err(), "{wrong}");
        }
    }

    #[test]
    fn topics_that_name_a_model() {
        for named in ["kv@10.0.0.1:8000@meta/llama", "kv@pod@a@b"] {
            assert!(topic_names_model(named), "{named}");
        }
        for other in ["", "kv", "kv@pod", "kv@pod@"] {
            assert!(!topic_names_model(other), "{other}");
        }
    }
}
