//! The index in the endpoint picker's process, fed by mock engines over their real sockets.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    time::Duration,
};

use kv_indexer::{
    epp::{
        datalayer::{Endpoint, EndpointInfo, EndpointName, Endpoints},
        precise::{
            EndpointMatch, PrefixIndex, Query, RowState,
            embedded::{EmbeddedConfig, start},
        },
    },
    hash::{Models, Prompt},
    loadgen::engine::{Engine, EngineHandle, EngineOptions},
    model::PodState,
};
use prometheus::Registry;
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    ingest::engine::{Engine as Publisher, Router},
    support::{
        eventually,
        http::{read, send},
        patience, runtime,
    },
};

const MODEL: &str = "mock";

/// An index and the endpoints that it follows.
struct Rig {
    runtime: Runtime,
    endpoints: Arc<Endpoints>,
    index: Arc<dyn PrefixIndex>,
    stop: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
    registry: Registry,
}

fn config(socket_port: u16) -> EmbeddedConfig {
    EmbeddedConfig {
        models: Models::default(),
        tiers: Vec::new(),
        unlisted_weight: 1.0,
        speculative_weight: 0.5,
        cap_bytes: 1 << 30,
        discover_pods: true,
        socket_port,
        replay_port: None,
        topic_filter: "kv@".to_owned(),
        bind: None,
        engine: String::new(),
        lanes: 1,
    }
}

/// The port of `tcp://host:port`.
fn port(endpoint: &str) -> u16 {
    endpoint.rsplit(':').next().unwrap().parse().unwrap()
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

impl Rig {
    fn start(config: EmbeddedConfig) -> Self {
        // Tasks must go on while the test does not wait for any. One thread may block: see `pause`.
        let mut runtime = Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).max_blocking_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let (endpoints, registry) = (Arc::new(Endpoints::new()), Registry::new());
        let (index, task) = start(config, &endpoints, &registry).unwrap();
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        tasks.spawn_on(task(stop.clone()), runtime.handle());
        Self { runtime, endpoints, index, stop, tasks, registry }
    }

    /// With a mock engine, to whose events the configuration subscribes.
    fn with_engine(options: EngineOptions) -> (Self, Mock) {
        let mock = Mock::start(options);
        (Self::start(config(mock.port())), mock)
    }

    fn add(&self, name: &str, address: SocketAddr) -> Arc<Endpoint> {
        self.add_labelled(name, address, "")
    }

    fn add_labelled(&self, name: &str, address: SocketAddr, label: &str) -> Arc<Endpoint> {
        self.endpoints.upsert(EndpointInfo {
            name: EndpointName { namespace: "default".to_owned(), name: name.to_owned() },
            address,
            metrics_address: address,
            labels: BTreeMap::from([("label".to_owned(), label.to_owned())]),
        });
        let list = self.endpoints.list();
        Arc::clone(list.iter().find(|it| it.info().name.name == name).unwrap())
    }

    /// No publisher is declared or ended until the answer is dropped.
    fn pause(&self) -> Sender<()> {
        let (begun, begins) = channel();
        let (go_on, paused) = channel::<()>();
        self.runtime.spawn_blocking(move || {
            begun.send(()).unwrap();
            // An error, since nothing is ever sent.
            paused.recv().unwrap_or_default();
        });
        begins.recv().unwrap();
        go_on
    }

    /// A question about several prompts; `None` while nothing is known of the model.
    fn try_query(&self, model: &str, prompts: &[&[u32]]) -> Option<Query> {
        let addressing = self.index.addressing(model)?;
        let keys = |tokens: &&[u32]| {
            let prompt = Prompt { model: &addressing.model, tokens, ..Prompt::default() };
            prompt.keys(&addressing.scheme).unwrap()
        };
        let prompts = prompts.iter().map(keys).collect();
        Some(Query { addressing, prompts })
    }

    fn query(&self, tokens: &[u32]) -> Query {
        self.try_query(MODEL, &[tokens]).unwrap()
    }

    fn score(&self, query: &Query, endpoint: &Arc<Endpoint>) -> EndpointMatch {
        let endpoints = [Arc::clone(endpoint)];
        self.runtime.block_on(self.index.score(query, &endpoints)).unwrap()[0]
    }

    /// Waits until the endpoint holds this many blocks by events.
    #[track_caller]
    fn until(&self, tokens: &[u32], endpoint: &Arc<Endpoint>, confirmed: u32) -> EndpointMatch {
        eventually("blocks", || {
            let Some(query) = self.try_query(MODEL, &[tokens]) else {
                return Err(format!("nothing known: {:?}", self.index.impediments(MODEL)));
            };
            let found = self.score(&query, endpoint);
            if found.confirmed == confirmed { Ok(found) } else { Err(format!("{found:?}")) }
        })
    }

    /// Waits until this is all that is found about the model.
    #[track_caller]
    fn impeded(&self, findings: &[&str]) {
        eventually("findings", || {
            let found = self.index.impediments(MODEL);
            if found == findings { Ok(()) } else { Err(format!("{found:?}")) }
        });
    }

    fn end(mut self) {
        self.stop.cancel();
        let ended = self.runtime.block_on(self.tasks.join_next());
        ended.unwrap().unwrap().unwrap();
    }
}

/// A mock engine, on a runtime of its own.
struct Mock {
    runtime: Runtime,
    engine: EngineHandle,
}

impl Mock {
    fn start(options: EngineOptions) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let engine = runtime.block_on(Engine::start(options)).unwrap();
        Self { runtime, engine }
    }

    /// Of its first rank's events.
    fn port(&self) -> u16 {
        port(&self.engine.event_sources()[0].endpoint)
    }

    fn address(&self) -> SocketAddr {
        self.engine.http()
    }

    fn ask(&self, tokens: &[u32]) {
        self.ask_rank(tokens, 0);
    }

    fn ask_rank(&self, tokens: &[u32], rank: u32) {
        let body = serde_json::json!({"model": MODEL, "prompt": tokens, "max_tokens": 1});
        let (rank, json) = (rank.to_string(), "application/json");
        let headers = [("content-type", json), ("x-data-parallel-rank", rank.as_str())];
        let sent = send(self.address(), "POST", "/v1/completions", &headers, &body.to_string());
        assert_eq!(read(sent.unwrap()).unwrap().status, 200);
    }

    fn subscribed(&self) {
        assert!(self.runtime.block_on(self.engine.wait_for_subscribers(patience())));
    }

    fn end(self) {
        self.runtime.block_on(self.engine.stop());
    }
}

/// The first of so many consecutive ports that were free a moment ago.
fn free_ports(count: u16) -> u16 {
    eventually("free ports", || {
        let first = TcpListener::bind(local(0)).map_err(|error| error.to_string())?;
        let base = first.local_addr().map_err(|error| error.to_string())?.port();
        for port in 1..count {
            let port = base.checked_add(port).ok_or("the last port")?;
            TcpListener::bind(local(port)).map_err(|error| error.to_string())?;
        }
        Ok(base)
    })
}

fn tokens(from: u32) -> Vec<u32> {
    (from..from + 64).collect()
}

#[test]
fn nothing_begins_before_the_task_does() {
    let taken = TcpListener::bind(local(0)).unwrap();
    let bind = Some(format!("tcp://{}", taken.local_addr().unwrap()));
    let (endpoints, registry) = (Arc::new(Endpoints::new()), Registry::new());
    let config = EmbeddedConfig { bind, ..config(5557) };
    let (index, task) = start(config.clone(), &endpoints, &registry).unwrap();
    assert!(index.addressing(MODEL).is_none());
    assert_eq!(index.impediments(MODEL), ["no engine has connected to zmqEndpoint"]);
    // Beside the first one, whose metrics they have.
    drop(start(config, &endpoints, &registry).unwrap());
    let error = runtime().block_on(task(CancellationToken::new())).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("the embedded index cannot be fed: cannot bind"), "{error}");
}

#[test]
fn subscriptions_follow_the_endpoints() {
    let (rig, mock) = Rig::with_engine(EngineOptions::default());
    assert_eq!(rig.index.impediments(MODEL).len(), 1);
    assert!(rig.index.addressing(MODEL).is_none());
    let first = rig.add("a", mock.address());
    mock.subscribed();
    mock.ask(&tokens(0));
    let found = rig.until(&tokens(0), &first, 4);
    assert_eq!((found.depth, found.score), (4, 4.0));
    assert_ne!(found.state.unwrap().state, PodState::Connecting);
    rig.impeded(&[]);
    let adapter = rig.index.addressing("adapter").unwrap();
    assert_eq!((&*adapter.model, &*adapter.lora), (MODEL, "adapter"));
    let found = rig.index.impediments("adapter");
    assert!(found.len() == 1 && found[0].starts_with("\"adapter\" is taken for"), "{found:?}");
    assert!(found[0].contains("of mock") && found[0].contains("adapters: none"), "{found:?}");
    assert!(rig.registry.gather().iter().any(|family| family.name() == "kv_pod_blocks"));

    // Another life under the same name, elsewhere; the old one's blocks are nobody's.
    let query = rig.query(&tokens(0));
    let second = rig.add("a", local(1));
    assert_eq!(rig.score(&query, &first), EndpointMatch::default());
    eventually("the new life's row", || {
        let found = rig.score(&query, &second);
        if found.state.is_some() { Ok(()) } else { Err(format!("{found:?}")) }
    });
    assert_eq!(rig.score(&query, &second).depth, 0);

    rig.endpoints.remove(&second.info().name);
    rig.impeded(&["no engine's events are subscribed to"]);
    assert_eq!(rig.score(&query, &second), EndpointMatch::default());
    rig.end();
    mock.end();
}

#[test]
fn an_endpoint_that_takes_the_address_of_another_begins_with_nothing() {
    let mut engine = Publisher::bind("kv@a@mock");
    let rig = Rig::start(config(port(&engine.endpoint)));
    let first = rig.add_labelled("a", local(1), "old");
    engine.subscribed();
    engine.send("store 1-4 of 0-63");
    let query = {
        rig.until(&tokens(0), &first, 4);
        rig.query(&tokens(0))
    };
    let pause = rig.pause();
    let second = rig.add_labelled("a", local(1), "new");
    assert_ne!(first.id(), second.id());
    assert_eq!(rig.score(&query, &second), EndpointMatch::default());
    assert_eq!(rig.score(&query, &first), EndpointMatch::default());
    drop(pause);
    eventually("the new life's row", || {
        let found = rig.score(&query, &second);
        assert_eq!(found.depth, 0, "the old life's");
        if found.state.is_some() { Ok(()) } else { Err(format!("{found:?}")) }
    });
    assert_eq!(rig.score(&query, &first), EndpointMatch::default());
    engine.subscribed();
    engine.send("store 5-8 of 100-163");
    rig.until(&(100..164).collect::<Vec<_>>(), &second, 4);
    assert_eq!(rig.score(&query, &second).depth, 0);
    rig.end();
}

#[test]
fn the_rank_of_a_name_counts_ports() {
    let base = free_ports(2);
    let mock = Mock::start(EngineOptions {
        data_parallel_size: 2,
        events: Some(format!("tcp://127.0.0.1:{base}")),
        replay: None,
        ..EngineOptions::default()
    });
    let rig = Rig::start(config(base));
    let ranks = [rig.add("pod-rank-0", local(1)), rig.add("pod-rank-1", local(2))];
    mock.subscribed();
    for (rank, tokens) in [(0, tokens(0)), (1, tokens(1000))] {
        mock.ask_rank(&tokens, rank);
        rig.until(&tokens, &ranks[rank as usize], 4);
        let query = rig.query(&tokens);
        assert_eq!(rig.score(&query, &ranks[1 - rank as usize]).depth, 0);
    }
    rig.end();
    mock.end();
}

#[test]
fn engines_that_connect_are_known_by_their_topics() {
    let bind = format!("tcp://127.0.0.1:{}", free_ports(1));
    let rig = Rig::start(EmbeddedConfig {
        bind: Some(bind.clone()),
        discover_pods: false,
        ..config(5557)
    });
    let by_name = rig.add("a", local(1));
    let by_address = rig.add("b", local(2));
    let by_pod = rig.add("c-rank-0", local(3));
    rig.impeded(&["no engine has connected to zmqEndpoint"]);
    let mut stranger = Publisher::connect(&bind, "kv@stranger@mock");
    stranger.subscribed();
    stranger.send("store 1-4 of 0-63");
    rig.impeded(&["the pods of the engines' topics are no endpoints': stranger"]);
    for (endpoint, topic) in
        [(&by_name, "kv@a@mock"), (&by_address, "kv@127.0.0.1:2@mock"), (&by_pod, "kv@c@mock")]
    {
        let mut engine = Publisher::connect(&bind, topic);
        engine.subscribed();
        engine.send("store 1-2 of 0-31");
        rig.until(&tokens(0), endpoint, 2);
    }
    rig.impeded(&[]);
    rig.end();
}

#[test]
fn what_was_said_before_is_asked_for() {
    let mut engine = Publisher::bind("kv@a@mock");
    let router = Router::of(&engine);
    engine.send("store 1-2 of 0-31");
    engine.send("store 3 of 32-47 after 2");
    let replay_port = Some(port(&router.endpoint));
    let rig = Rig::start(EmbeddedConfig { replay_port, ..config(port(&engine.endpoint)) });
    let endpoint = rig.add("a", local(1));
    engine.subscribed();
    engine.send("store 4 of 48-63 after 3");
    rig.until(&tokens(0), &endpoint, 4);
    let query = rig.query(&tokens(0));
    eventually("trust", || {
        let found = rig.score(&query, &endpoint);
        let live = RowState { state: PodState::Live, stale: false };
        if found.state == Some(live) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    assert_eq!(router.requests()[0], 0);
    rig.end();
}

#[test]
fn the_prompts_of_a_question_add_up() {
    let (rig, mock) = Rig::with_engine(EngineOptions::default());
    let endpoint = rig.add("a", mock.address());
    mock.subscribed();
    mock.ask(&tokens(0));
    mock.ask(&tokens(1000)[..32]);
    rig.until(&tokens(0), &endpoint, 4);
    rig.until(&tokens(1000), &endpoint, 2);
    let prompts = [&tokens(0)[..], &tokens(1000), &tokens(2000), &[1]];
    let query = rig.try_query(MODEL, &prompts).unwrap();
    let found = rig.score(&query, &endpoint);
    assert_eq!((found.depth, found.confirmed, found.score), (6, 6, 6.0));
    rig.end();
    mock.end();
}

#[test]
fn endpoints_that_come_and_go_leave_no_subscription() {
    let engine = Publisher::bind("kv@a@mock");
    let rig = Rig::start(config(port(&engine.endpoint)));
    for round in 0..3_u16 {
        let names: Vec<_> = (0..50).map(|at| format!("{round}-{at}")).collect();
        for (name, port) in names.iter().zip(1..) {
            rig.add(name, local(round * 10 + port));
        }
        if round == 0 {
            engine.subscribed();
        }
        rig.endpoints.set(Vec::new());
    }
    engine.deserted();
    rig.impeded(&["no engine's events are subscribed to"]);
    rig.end();
}

#[test]
fn an_address_overrides_the_topic_and_another_topic_s_model_is_named() {
    let topic = Some("kv@somebody:1@other".to_owned());
    let (rig, mock) = Rig::with_engine(EngineOptions { topic, ..EngineOptions::default() });
    rig.add("a", mock.address());
    mock.subscribed();
    mock.ask(&tokens(0));
    let found = eventually("a finding", || {
        let found = rig.index.impediments(MODEL);
        // One model alone takes other names for adapters, whose blocks it does not hold.
        let known = rig.index.addressing(MODEL);
        if known.is_some() { Ok(known) } else { Err(format!("{found:?}")) }
    });
    let found = found.unwrap();
    assert_eq!((&*found.model, &*found.lora), ("other", MODEL));
    let found = rig.index.impediments(MODEL);
    assert!(found.len() == 1 && found[0].contains("an adapter of other"), "{found:?}");
    rig.end();
    mock.end();
}

#[test]
fn events_confirm_speculative_entries() {
    let (rig, mock) = Rig::with_engine(EngineOptions::default());
    let endpoint = rig.add("a", mock.address());
    mock.subscribed();
    mock.ask(&tokens(0));
    rig.until(&tokens(0), &endpoint, 4);
    let query = rig.query(&tokens(1000));
    let long = Duration::from_secs(60);
    let entry = rig.index.speculate(&query, &endpoint, long).unwrap();
    let found = rig.score(&query, &endpoint);
    assert_eq!((found.depth, found.confirmed, found.score), (4, 0, 2.0));
    rig.index.take_back(entry);
    assert_eq!(rig.score(&query, &endpoint).depth, 0);

    let entry = rig.index.speculate(&query, &endpoint, long).unwrap();
    mock.ask(&tokens(1000));
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
    mock.end();
}

#[test]
fn blocks_that_are_announced_again_are_noticed() {
    let mut engine = Publisher::bind("kv@a@mock");
    let rig = Rig::start(config(port(&engine.endpoint)));
    let endpoint = rig.add("a", local(1));
    engine.subscribed();
    let prompt: Vec<u32> = (0..64 * 16).collect();
    engine.send("store 1-64 of 0-1023");
    rig.until(&prompt, &endpoint, 64);
    rig.impeded(&[]);
    engine.send("store 1-64 of 0-1023");
    eventually("a finding", || {
        let found = rig.index.impediments(MODEL);
        let said = |it: &String| it.starts_with("engines announce blocks again");
        if found.len() == 1 && said(&found[0]) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    // Every second copy ends, and with one each nothing is wrong.
    engine.send("remove 1-64");
    rig.impeded(&[]);
    assert_eq!(rig.score(&rig.query(&prompt), &endpoint).confirmed, 64);
    engine.send("store 1-64 of 0-1023; clear; store 1 of 0-15");
    rig.until(&prompt, &endpoint, 1);
    rig.impeded(&[]);
    rig.end();
}
