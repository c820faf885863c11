//! The index in the endpoint picker's process, fed by mock engines over their real sockets.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use kv_indexer::{
    epp::{
        datalayer::{Endpoint, EndpointInfo, EndpointName, Endpoints},
        precise::{
            EndpointMatch, PrefixIndex, Query,
            embedded::{EmbeddedConfig, start},
        },
    },
    hash::{Models, Prompt},
    loadgen::engine::{Engine, EngineHandle, EngineOptions},
    model::PodState,
};
use prometheus::Registry;
use tokio::{runtime::Runtime, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::support::{eventually, http::post, patience, runtime};

const MODEL: &str = "mock";

/// An engine, an index and the endpoints that it follows.
struct Rig {
    runtime: Runtime,
    engine: EngineHandle,
    endpoints: Arc<Endpoints>,
    index: Arc<dyn PrefixIndex>,
    stop: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
    registry: Registry,
}

impl Rig {
    /// `socket_port` from that of the engine's events.
    fn start(options: EngineOptions, change: impl FnOnce(&mut EmbeddedConfig, u16)) -> Self {
        let runtime = runtime();
        let engine = runtime.block_on(Engine::start(options)).unwrap();
        let source = engine.event_sources().remove(0);
        let port: u16 = source.endpoint.rsplit(':').next().unwrap().parse().unwrap();
        let mut config = EmbeddedConfig {
            models: Models::default(),
            tiers: Vec::new(),
            unlisted_weight: 1.0,
            speculative_weight: 0.5,
            cap_bytes: 1 << 30,
            discover_pods: true,
            socket_port: port,
            replay_port: None,
            topic_filter: "kv@".to_owned(),
            bind: None,
            engine: String::new(),
            lanes: 1,
        };
        change(&mut config, port);
        let (endpoints, registry) = (Arc::new(Endpoints::new()), Registry::new());
        let (index, task) = start(config, &endpoints, &registry).unwrap();
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        tasks.spawn_on(task(stop.clone()), runtime.handle());
        Self { runtime, engine, endpoints, index, stop, tasks, registry }
    }

    /// Puts the engine among the endpoints.
    fn add(&self, name: &str, address: SocketAddr) -> Arc<Endpoint> {
        self.endpoints.upsert(EndpointInfo {
            name: EndpointName { namespace: "default".to_owned(), name: name.to_owned() },
            address,
            metrics_address: address,
            labels: std::collections::BTreeMap::default(),
        });
        let list = self.endpoints.list();
        Arc::clone(list.iter().find(|it| it.info().name.name == name).unwrap())
    }

    fn ask(&self, tokens: &[u32]) {
        let body = serde_json::json!({"model": MODEL, "prompt": tokens, "max_tokens": 1});
        let reply = post(self.engine.http(), "/v1/completions", &body.to_string());
        assert_eq!(reply.status, 200);
    }

    fn subscribed(&self) {
        assert!(self.runtime.block_on(self.engine.wait_for_subscribers(patience())));
    }

    fn query(&self, tokens: &[u32]) -> Query {
        let addressing = self.index.addressing(MODEL).unwrap();
        let prompt = Prompt { model: &addressing.model, tokens, ..Prompt::default() };
        let keys = prompt.keys(&addressing.scheme).unwrap();
        Query { addressing, prompts: [keys].into() }
    }

    fn score(&self, query: &Query, endpoint: &Arc<Endpoint>) -> EndpointMatch {
        let endpoints = [Arc::clone(endpoint)];
        self.runtime.block_on(self.index.score(query, &endpoints)).unwrap()[0]
    }

    /// Waits until the endpoint holds this many blocks by events.
    #[track_caller]
    fn until(&self, tokens: &[u32], endpoint: &Arc<Endpoint>, confirmed: u32) -> EndpointMatch {
        eventually("blocks", || {
            if self.index.addressing(MODEL).is_none() {
                return Err(format!("nothing known: {:?}", self.index.impediments(MODEL)));
            }
            let found = self.score(&self.query(tokens), endpoint);
            if found.confirmed == confirmed { Ok(found) } else { Err(format!("{found:?}")) }
        })
    }

    fn end(mut self) {
        self.stop.cancel();
        let ended = self.runtime.block_on(self.tasks.join_next());
        ended.unwrap().unwrap().unwrap();
        self.runtime.block_on(self.engine.stop());
    }
}

fn tokens(from: u32) -> Vec<u32> {
    (from..from + 64).collect()
}

#[test]
fn subscriptions_follow_the_endpoints() {
    let rig = Rig::start(EngineOptions::default(), |_, _| {});
    assert_eq!(rig.index.impediments(MODEL).len(), 1);
    assert!(rig.index.addressing(MODEL).is_none());
    let first = rig.add("a", rig.engine.http());
    rig.subscribed();
    rig.ask(&tokens(0));
    let found = rig.until(&tokens(0), &first, 4);
    assert_eq!((found.depth, found.score), (4, 4.0));
    assert_ne!(found.state.unwrap().state, PodState::Connecting);
    assert_eq!(rig.index.impediments(MODEL), Vec::<String>::new());
    let adapter = rig.index.addressing("adapter").unwrap();
    assert_eq!((&*adapter.model, &*adapter.lora), (MODEL, "adapter"));
    assert!(rig.registry.gather().iter().any(|family| family.name() == "kv_pod_blocks"));

    // Another life under the same name, elsewhere; the old one's blocks are nobody's.
    let query = rig.query(&tokens(0));
    let second = rig.add("a", SocketAddr::from(([127, 0, 0, 1], 1)));
    assert_eq!(rig.score(&query, &first), EndpointMatch::default());
    eventually("the new life's row", || {
        let found = rig.score(&query, &second);
        if found.state.is_some() { Ok(()) } else { Err(format!("{found:?}")) }
    });
    assert_eq!(rig.score(&query, &second).depth, 0);

    rig.endpoints.remove(&second.info().name);
    eventually("no rows", || {
        let found = rig.index.impediments(MODEL);
        if found == ["no engine's events are subscribed to"] {
            Ok(())
        } else {
            Err(format!("{found:?}"))
        }
    });
    assert_eq!(rig.score(&query, &second), EndpointMatch::default());
    rig.end();
}

#[test]
fn the_rank_of_a_name_counts_ports() {
    let rig = Rig::start(EngineOptions::default(), |config, port| config.socket_port = port - 3);
    let endpoint = rig.add("pod-rank-3", rig.engine.http());
    rig.subscribed();
    rig.ask(&tokens(0));
    rig.until(&tokens(0), &endpoint, 4);
    rig.end();
}

#[test]
fn an_address_overrides_the_topic_and_another_topic_s_model_is_named() {
    let topic = Some("kv@somebody:1@other".to_owned());
    let rig = Rig::start(EngineOptions { topic, ..EngineOptions::default() }, |_, _| {});
    rig.add("a", rig.engine.http());
    rig.subscribed();
    rig.ask(&tokens(0));
    let found = eventually("a finding", || {
        let found = rig.index.impediments(MODEL);
        // One model alone takes other names for adapters, whose blocks it does not hold.
        let known = rig.index.addressing(MODEL);
        if known.is_some() { Ok(known) } else { Err(format!("{found:?}")) }
    });
    let found = found.unwrap();
    assert_eq!((&*found.model, &*found.lora), ("other", MODEL));
    rig.end();
}

#[test]
fn events_confirm_speculative_entries() {
    let rig = Rig::start(EngineOptions::default(), |_, _| {});
    let endpoint = rig.add("a", rig.engine.http());
    rig.subscribed();
    rig.ask(&tokens(0));
    rig.until(&tokens(0), &endpoint, 4);
    let query = rig.query(&tokens(1000));
    let long = Duration::from_secs(60);
    let entry = rig.index.speculate(&query, &endpoint, long).unwrap();
    let found = rig.score(&query, &endpoint);
    assert_eq!((found.depth, found.confirmed, found.score), (4, 0, 2.0));
    rig.index.take_back(entry);
    assert_eq!(rig.score(&query, &endpoint).depth, 0);

    let entry = rig.index.speculate(&query, &endpoint, long).unwrap();
    rig.ask(&tokens(1000));
    let found = rig.until(&tokens(1000), &endpoint, 4);
    assert_eq!(found.score, 4.0);
    rig.index.take_back(entry);
    assert_eq!(rig.score(&query, &endpoint).depth, 4, "what is confirmed stays");

    let other = rig.query(&tokens(2000));
    let entry = rig.index.speculate(&other, &endpoint, long).unwrap();
    rig.index.extend(entry, Duration::from_millis(1));
    eventually("the end of an entry", || {
        let found = rig.score(&other, &endpoint);
        if found.depth == 0 { Ok(()) } else { Err(format!("{found:?}")) }
    });
    rig.end();
}
