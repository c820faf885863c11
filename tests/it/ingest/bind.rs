//! Engines that connect to us.

use kv_indexer::{
    proto::kvindexer::{PodState, RegisterPodRequest},
    wire::encode::Form,
};

use super::{
    engine::{Engine, Router, payload},
    rig::Rig,
};
use crate::support::eventually;

const OPEN: &str = "kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:0'}";

/// Where the indexer has bound its socket, as it says itself.
pub(super) fn endpoint(rig: &Rig) -> String {
    eventually("the bound endpoint", || {
        let log = rig.indexer.log();
        let (_, rest) = log.split_once("Engines may connect. endpoint=").ok_or(log.as_str())?;
        let end = |c: char| c.is_whitespace() || c == '"';
        Ok(rest.trim_start_matches('"').split(end).next().unwrap_or_default().to_owned())
    })
}

fn engine(rig: &Rig, topic: &str) -> Engine {
    let engine = Engine::connect(&endpoint(rig), topic);
    engine.subscribed();
    engine
}

#[test]
fn pods_and_ranks_interleave_on_the_bound_socket() {
    let mut rig = Rig::start(OPEN);
    let mut engines = [
        engine(&rig, "kv@a@m"),
        engine(&rig, "kv@a@m").with_rank(Some(1)),
        engine(&rig, "kv@b@m"),
        engine(&rig, "kv@c@n").with_rank(None),
    ];
    for round in 0..4_usize {
        for (at, engine) in engines.iter_mut().enumerate() {
            // One block less a round for each next engine.
            if round + at < 4 || round == 0 {
                let (hash, first) = (round + 1, round * 16 + 1);
                let parent = if round == 0 { String::new() } else { format!("after {round}") };
                engine.send(&format!("store {hash} of {first}-{} {parent}", first + 15));
            } else {
                engine.send("remove 99");
            }
        }
    }
    rig.expect("m", "1-64", "a#0=4 a#1=3 b#0=2");
    rig.expect("n", "1-64", "c=1");
    for row in rig.pods() {
        assert_eq!((row.state(), row.endpoint.as_str()), (PodState::Live, ""), "{row:?}");
    }
    assert_eq!(rig.metric("kv_pod_connected{pod=\"a\",rank=\"1\"}"), 1.0);
    rig.finish();
}

#[test]
fn with_configured_pods_nobody_else_is_admitted() {
    let mut rig = Rig::start(
        "kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*'}\nreadyTimeoutMs: 50\n\
         pods: [{id: a}, {id: b, rank: 1, model: own}, {id: c, endpoint: 'tcp://127.0.0.1:9'}]",
    );
    let refused = "kv_events_refused_publishers_total{reason=\"unconfigured\"}";
    let mut good = engine(&rig, "kv@a@m");
    let mut ranked = engine(&rig, "kv@b@m").with_rank(Some(1));
    let mut strangers = [
        engine(&rig, "kv@stranger@m"),
        engine(&rig, "kv@b@m").with_rank(Some(0)),
        // Configured, but not to connect to us.
        engine(&rig, "kv@c@m"),
        engine(&rig, "kv@@m"),
    ];
    for stranger in &mut strangers {
        stranger.send("store 1-4 of 1-64");
        stranger.send("store 5 of 65-80 after 4");
    }
    good.send("store 1 of 1-16");
    ranked.send("store 1 of 1-16");
    rig.counted(refused, 8.0);
    rig.expect("m", "1-64", "a#0=1");
    rig.expect("own", "1-64", "b#1=1");
    assert_eq!(rig.rows(), ["a#0", "b#1", "c"]);
    // A pod that is unregistered is a stranger, too, until it is declared again.
    rig.unregister("a").unwrap();
    good.send("store 2 of 17-32 after 1");
    rig.counted(refused, 9.0);
    assert_eq!(rig.depths("m", "1-64"), "");
    rig.finish();
}

#[test]
fn strangers_are_refused_where_the_configuration_says_so() {
    let mut rig = Rig::start(
        "kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*', allowUnconfiguredPods: false}",
    );
    engine(&rig, "kv@a@m").send("store 1 of 1-16");
    rig.counted("kv_events_refused_publishers_total{reason=\"unconfigured\"}", 1.0);
    assert!(rig.rows().is_empty());
    rig.finish();

    let mut rig = Rig::start(
        "kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*', allowUnconfiguredPods: true}\n\
         readyTimeoutMs: 0\npods: [{id: a, countMode: set}]",
    );
    engine(&rig, "kv@b@m")
        .send("store 1 of 1-16; store 1 of 1-16; remove 1; store 2 of 17-32 after 1");
    engine(&rig, "kv@a@m")
        .send("store 1 of 1-16; store 1 of 1-16; store 2 of 17-32 after 1; remove 1");
    rig.expect("m", "1-32", "b#0=2");
    assert_eq!(rig.rows(), ["a#0", "b#0"]);
    rig.finish();
}

/// A name belongs to the pod that we connect to, not to whoever uses it on the bound socket.
#[test]
fn a_pod_that_we_connect_to_is_not_taken_from_the_bound_socket() {
    let mut rig = Rig::start(OPEN);
    let mut claimed = engine(&rig, "kv@a@m");
    claimed.send("store 1-4 of 1-64");
    rig.expect("m", "1-64", "a#0=4");
    let mut real = Engine::bind("kv@a@m");
    rig.register("a", &real, None);
    assert_eq!(rig.depths("m", "1-64"), "", "what came by itself is gone");
    real.send("store 1 of 1-16");
    claimed.send("store 5 of 65-80 after 4");
    rig.counted("kv_events_refused_publishers_total{reason=\"declared_elsewhere\"}", 1.0);
    rig.expect("m", "1-64", "a#0=1");
    rig.unregister("a").unwrap();
    assert!(rig.rows().is_empty());
    // Nobody else has the name now.
    claimed.send("store 1 of 1-16");
    rig.expect("m", "1-64", "a#0=1");
    assert_eq!(rig.pod("a").state(), PodState::Partial);
    rig.unregister("a").unwrap();
    assert_eq!(rig.depths("m", "1-64"), "");
    let bad = RegisterPodRequest { pod: "a".to_owned(), ..Default::default() };
    assert_eq!(rig.try_register(bad).unwrap_err().code(), tonic::Code::InvalidArgument);
    rig.finish();
}

/// A topic is only a claim, which the address of its sender proves or not.
#[test]
fn a_pod_speaks_for_itself_only_where_addresses_are_checked() {
    let mut rig = Rig::start(
        "kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*', checkPeerAddress: true, \
         allowUnconfiguredPods: true}\nreadyTimeoutMs: 0\n\
         pods: [{id: b, replayEndpoint: 'tcp://127.0.0.1:9'}, \
         {id: c, replayEndpoint: 'tcp://127.0.0.7:9'}]",
    );
    let refused = |why: &str| format!("kv_events_refused_publishers_total{{reason=\"{why}\"}}");
    for topic in ["kv@127.0.0.9:8000@m", "kv@127.0.0.9@m", "kv@c@m"] {
        engine(&rig, topic).send("store 1-4 of 1-64");
    }
    rig.counted(&refused("wrong_address"), 3.0);
    engine(&rig, "kv@somebody@m").send("store 1-4 of 1-64");
    rig.counted(&refused("unknown_address"), 1.0);
    engine(&rig, "kv@127.0.0.1:8000@m").send("store 1-2 of 1-32");
    rig.expect("m", "1-64", "127.0.0.1:8000#0=2");
    engine(&rig, "kv@b@m").send("store 1-3 of 1-48");
    rig.expect("m", "1-64", "127.0.0.1:8000#0=2 b#0=3");
    assert_eq!(rig.metric(&refused("wrong_address")), 3.0);
    rig.finish();
}

#[test]
fn a_bound_pod_has_its_replay_socket() {
    let history = Engine::bind("unused");
    let router = Router::of(&history);
    let mut rig = Rig::start(&format!(
        "kvEventsConfig: {{zmqEndpoint: 'tcp://127.0.0.1:*'}}\nreadyTimeoutMs: 0\n\
         pods: [{{id: a, replayEndpoint: '{}'}}]",
        router.endpoint,
    ));
    let mut engine = engine(&rig, "kv@a@m");
    engine.history = std::sync::Arc::clone(&history.history);
    engine.keep("store 1 of 1-16");
    engine.keep("store 2 of 17-32 after 1");
    engine.send("store 3 of 33-48 after 2");
    rig.expect("m", "1-48", "a#0=3");
    rig.state("a", PodState::Live);
    // Another rank has another socket, which nobody declared.
    let second = payload("store 1 of 1-16", Some(1), Form::Array);
    engine.raw(&[b"kv@a@m", &4_u64.to_be_bytes(), &second]);
    rig.state("a#1", PodState::Partial);
    assert_eq!(router.requests(), [0]);
    rig.finish();
}

/// An engine that never comes holds readiness back until the timeout, and no longer.
#[test]
fn readiness_waits_for_bound_pods_but_not_for_ever() {
    let started = std::time::Instant::now();
    let rig = Rig::start(
        "kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*'}\nreadyTimeoutMs: 300\npods: [{id: a}]",
    );
    assert!(started.elapsed() >= std::time::Duration::from_millis(300));
    assert!(rig.finish().contains("pending=a"));
}
