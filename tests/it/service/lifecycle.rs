//! Health, reflection, metrics, readiness, drain.

use std::{sync::Arc, time::Duration};

use kv_indexer::{
    indexer::ready,
    ingest::fleet::Fleet,
    model::{CountMode, PodState, RowId},
    proto::kvindexer as pb,
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::{
    PATIENCE,
    fake::{FakeIndex, World, keys, prompt, request, scheme, tokens},
};

const SERVICES: [&str; 3] = ["", "kvindexer.v1.KvIndexer", "indexer.v1.IndexerService"];

#[tokio::test]
async fn health_follows_readiness() {
    let mut world = World::start().await;
    let mut health = HealthClient::new(world.channel.clone());
    let check = |service: &str| HealthCheckRequest { service: service.to_owned() };
    for service in SERVICES {
        let answer = health.check(check(service)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::NotServing, "{service:?}");
    }
    assert_eq!(health.check(check("other")).await.unwrap_err().code(), Code::NotFound);
    let mut watch = health.watch(check("")).await.unwrap().into_inner();
    let mut next = async || {
        let answer = timeout(PATIENCE, watch.next()).await.unwrap();
        answer.map(|answer| answer.map(|answer| answer.status()))
    };
    assert_eq!(next().await.unwrap().unwrap(), ServingStatus::NotServing);
    world.ready.send_replace(true);
    assert_eq!(next().await.unwrap().unwrap(), ServingStatus::Serving);
    for service in SERVICES {
        let answer = health.check(check(service)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    world.ready.send_replace(false);
    assert_eq!(next().await.unwrap().unwrap(), ServingStatus::NotServing);
    // A watch must not hold the drain.
    timeout(PATIENCE, world.shut_down()).await.unwrap().unwrap();
}

#[tokio::test]
async fn calls_in_flight_end_before_the_server_does() {
    let mut world = World::start().await;
    let row = world.row("a", None);
    let mut client = world.client();
    world.index.slow(20);
    let mut calls = JoinSet::new();
    let ask = request(vec![prompt(&tokens(1)); 10]);
    calls.spawn(async move { client.score(ask).await });
    let mut waiting = world.client();
    let ask = pb::WaitVisibleRequest {
        pod: "a".into(),
        sequence: 99,
        timeout_ms: 60_000,
        ..Default::default()
    };
    let mut waits = JoinSet::new();
    waits.spawn(async move { waiting.wait_visible(ask).await });
    tokio::time::sleep(Duration::from_millis(60)).await;
    timeout(PATIENCE, world.shut_down()).await.unwrap().unwrap();
    assert_eq!(calls.join_next().await.unwrap().unwrap().unwrap().into_inner().prompts.len(), 10);
    let waited = waits.join_next().await.unwrap().unwrap().unwrap_err();
    assert_eq!(waited.code(), Code::Unavailable, "{waited}");
    drop(row);
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let world = World::start().await;
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(world.channel.clone());
    let answers = client.server_reflection_info(tokio_stream::iter([ask])).await.unwrap();
    let answer = answers.into_inner().next().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in SERVICES.into_iter().skip(1).chain(["grpc.health.v1.Health"]) {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
}

#[tokio::test]
async fn metrics_of_a_pod_vanish_with_it() {
    let world = World::start().await;
    let (a, b) = (world.row("a", Some(1)), world.row("b", None));
    world.index.hold(a.slot, &keys(&tokens(4)), 0);
    a.update(|status| {
        status.seen = Some(7);
        status.gaps = 2;
        status.lag_us = 1500;
        status.stale = true;
    });
    a.applied(1, 5, 1);
    b.update(|status| status.last_applied_unix_ns = 0);
    world.client().score(request(vec![prompt(&tokens(8))])).await.unwrap();
    let text = world.metrics();
    for line in [
        "kv_pod_blocks{pod=\"a\",rank=\"1\"} 4",
        "kv_pod_backlog_batches{pod=\"a\",rank=\"1\"} 2",
        "kv_pod_lag_seconds{pod=\"a\",rank=\"1\"} 0.0015",
        "kv_pod_gaps_total{pod=\"a\",rank=\"1\"} 2",
        "kv_pod_refused_blocks_total{pod=\"b\",rank=\"\"} 0",
        "kv_pod_connected{pod=\"b\",rank=\"\"} 1",
        "kv_pods{state=\"stale\"} 1",
        "kv_pods{state=\"live\"} 1",
        "kv_pods{state=\"degraded\"} 0",
        "kv_index_keys 4",
        "kv_index_bytes 1234",
        "kv_index_blocks{tier=\"gpu\"} 4",
        "kv_score_hit_ratio 0.5",
    ] {
        assert!(text.lines().any(|has| has == line), "no {line:?} in\n{text}");
    }
    assert!(text.contains("kv_pod_seconds_since_event{pod=\"a\""), "{text}");
    assert!(!text.contains("kv_pod_seconds_since_event{pod=\"b\""), "never: {text}");
    world.fleet.remove(a.slot);
    world.fleet.remove(b.slot);
    let text = world.metrics();
    assert!(!text.contains("pod=\""), "{text}");
    assert!(text.contains("kv_pods{state=\"live\"} 0"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn readiness_waits_for_the_pods_known_at_start() {
    let fleet = Arc::new(Fleet::new(Arc::new(FakeIndex::default())));
    let id = |pod: &str| RowId { pod: pod.into(), rank: None };
    let add = |pod: &str| {
        fleet.add(id(pod), "tcp://a:1", &scheme(), &"m".into(), CountMode::Counted).unwrap()
    };
    let run = |known: &[&str]| {
        let (sender, receiver) = watch::channel(false);
        let stop = CancellationToken::new();
        let known = known.iter().map(|pod| id(pod)).collect();
        let task =
            ready::run(Arc::clone(&fleet), known, Duration::from_secs(10), sender, stop.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(task);
        (receiver, stop, tasks)
    };
    let start = Instant::now();
    let (mut ready, stop, mut tasks) = run(&["a"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!*ready.borrow());
    let row = add("a");
    row.update(|status| status.state = PodState::Partial);
    fleet.changed();
    ready.wait_for(|ready| *ready).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(2));

    // Nothing that happens later takes it away.
    row.update(|status| (status.state, status.stale) = (PodState::Connecting, true));
    add("late");
    fleet.changed();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(*ready.borrow());
    stop.cancel();
    tasks.join_next().await.unwrap().unwrap().unwrap();
    assert!(!*ready.borrow(), "the end of the service does");

    // Both rows of the table are known now, and neither is settled: the timeout decides.
    let start = Instant::now();
    let (mut ready, _stop, _tasks) = run(&[]);
    ready.wait_for(|ready| *ready).await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 10);
}
