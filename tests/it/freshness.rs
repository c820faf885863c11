//! `loadgen`'s freshness probes and storms against the real indexer.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use kv_indexer::{
    loadgen::{
        engine::{Engine, EngineOptions},
        freshness::{WatchOptions, Watched, watch},
        resources::Watched as Source,
        stack::{EngineAddress, Policy, Stack, StackOptions},
    },
    proto::kvindexer::ListPodsRequest,
};
use tokio_util::sync::CancellationToken;

use crate::{
    stack::rig,
    support::{Indexer, connect, http::post, http_get, patience, runtime},
};

fn options(indexer: SocketAddr) -> WatchOptions {
    WatchOptions {
        indexer,
        indexer_pid: None,
        model: "probes".to_owned(),
        probes_per_s: 100.0,
        condition: "idle".to_owned(),
        engines: Vec::new(),
        picker: None,
        storm: None,
        progress: None,
        delayed: false,
    }
}

/// Watches for some seconds, and sees that nothing of it stays in the indexer.
fn watched(options: WatchOptions, seconds: f64) -> anyhow::Result<Watched> {
    let grpc = options.indexer;
    runtime().block_on(async {
        let watched = watched_for(options, seconds).await;
        if watched.is_ok() {
            assert_eq!(rows(grpc).await, []);
        }
        watched
    })
}

async fn watched_for(options: WatchOptions, seconds: f64) -> anyhow::Result<Watched> {
    let stop = CancellationToken::new();
    let watching = watch(options, Instant::now(), stop.clone());
    tokio::pin!(watching);
    tokio::select! {
        ended = &mut watching => ended,
        () = tokio::time::sleep(Duration::from_secs_f64(seconds)) => {
            stop.cancel();
            watching.await
        }
    }
}

/// Pods and ranks that the indexer knows.
async fn rows(indexer: SocketAddr) -> Vec<(String, Option<u32>)> {
    let answer = connect(indexer).await.list_pods(ListPodsRequest {}).await.unwrap();
    let rows = answer.into_inner().pods.into_iter().map(|row| (row.pod, row.dp_rank));
    let mut rows: Vec<_> = rows.collect();
    rows.sort();
    rows
}

fn p50(watched: &Watched, kind: &str) -> f64 {
    let kinds = &watched.freshness.kinds;
    kinds.get(kind).and_then(|values| values.p50).unwrap_or_else(|| panic!("{kind}: {kinds:?}"))
}

#[test]
fn stores_and_removes_are_seen_and_a_delay_shows() {
    let indexer = Indexer::start(&[]);
    let direct = watched(options(indexer.grpc), 1.5).unwrap();
    let freshness = &direct.freshness;
    assert_eq!(freshness.lost, 0);
    assert!(freshness.n >= 20, "{freshness:?}");
    assert_eq!(direct.probes.len() as u64, freshness.n);
    for kind in ["store.idle", "remove.idle"] {
        assert!(freshness.kinds[kind].n >= 10, "{freshness:?}");
    }
    assert!(freshness.resolution_us.unwrap() > 1.0);
    // Theirs is when it was visible, ours when an answer showed it: later, or the clocks are wrong.
    let difference = freshness.difference.as_ref().unwrap();
    assert!(difference.n > 0 && difference.p50.unwrap() > 0.0, "{difference:?}");
    assert!(difference.min.unwrap() > -1_000.0, "{difference:?}");
    assert!(freshness.wait_visible.as_ref().unwrap().p50.unwrap() > 0.0);

    let options = WatchOptions { delayed: true, ..options(indexer.grpc) };
    let delayed = watched(options, 1.5).unwrap();
    assert_eq!(delayed.freshness.lost, 0);
    for kind in ["store", "remove"] {
        // The proxy holds each piece for 1 to 3 ms, so even the quickest probe is that late.
        let of = |watched: &Watched, kind: &str| watched.freshness.kinds[kind].min.unwrap();
        let late = of(&delayed, &format!("{kind}.delayed"));
        let soon = of(&direct, &format!("{kind}.idle"));
        assert!(late >= 1_000.0 && soon < late, "{kind}: {late} against {soon}");
    }
}

#[track_caller]
fn check_storm(storm: &str) -> Watched {
    let indexer = Indexer::start(&[]);
    let options = WatchOptions {
        storm: Some(storm.parse().unwrap()),
        condition: "steady".to_owned(),
        ..options(indexer.grpc)
    };
    let watched = watched(options, 3.0).unwrap();
    let report = watched.storm.as_ref().unwrap();
    assert_eq!(report.wrong_pods, [""; 0], "{report:?}");
    assert_eq!(report.lost_batches, 0, "{report:?}");
    assert_eq!(watched.freshness.lost, 0);
    assert!(report.bursts >= 2 && report.drain_ms.n >= 1, "{report:?}");
    assert_eq!(watched.event_bursts.len() as u64, report.bursts);
    assert!(watched.event_bursts.iter().all(|[begin, end]| begin < end));
    assert_eq!(watched.backlog.last().map(|[_, batches]| *batches), Some(0.0));
    assert!(p50(&watched, "store.steady") > 0.0);
    watched
}

#[test]
fn a_storm_leaves_what_it_should() {
    let storm = "publishers=3,rate=2000,burst=3000,interval=600ms,batch=8,cap=2000,hashes=bytes";
    let watched = check_storm(storm);
    let report = watched.storm.unwrap();
    assert_eq!(report.gaps, 0, "{report:?}");
    assert!(report.blocks > 6_000, "{report:?}");
    assert_eq!(report.publishers, 3);
}

#[test]
fn a_storm_with_faults_is_repaired() {
    let watched = check_storm(
        "publishers=2,rate=2000,burst=2000,interval=700ms,batch=8,form=array,removes=0.4,\
         faults=gap:0.02,duplicate:0.02,reorder:0.02,clear:0.005",
    );
    let report = watched.storm.unwrap();
    assert!(report.gaps > 0 && report.replays > 0, "{report:?}");
}

#[test]
fn publishers_that_start_again_are_followed() {
    check_storm(
        "publishers=2,rate=1600,burst=400,interval=700ms,batch=8,faults=restart:0.002,gap:0.01",
    );
}

#[test]
fn steps_of_an_engine_are_timed() {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let engine_runtime = builder.worker_threads(1).enable_all().build().unwrap();
    let engine = engine_runtime.block_on(Engine::start(EngineOptions::default())).unwrap();
    let source = engine.event_sources().remove(0);
    let indexer = Indexer::start(&["--pod", &format!("engine-1=http://{}", engine.http())]);
    assert!(engine_runtime.block_on(engine.wait_for_subscribers(patience())));
    let address = EngineAddress {
        name: "engine-1".to_owned(),
        http: engine.http(),
        events: source.endpoint,
        replay: source.replay_endpoint.unwrap_or_default(),
    };
    let options = WatchOptions { engines: vec![address], ..options(indexer.grpc) };
    let stop = CancellationToken::new();
    let watched = std::thread::scope(|scope| {
        let stopped = stop.clone();
        let watching = scope
            .spawn(move || runtime().block_on(watch(options, Instant::now(), stopped)).unwrap());
        let deadline = Instant::now() + Duration::from_secs(3);
        for prompt in 0_u32.. {
            if Instant::now() >= deadline {
                break;
            }
            let tokens: Vec<u32> = (0..64).map(|at| 1_000 * prompt + at).collect();
            let body = serde_json::json!({"model": "mock", "prompt": tokens, "max_tokens": 1});
            assert_eq!(post(engine.http(), "/v1/completions", &body.to_string()).status, 200);
        }
        stop.cancel();
        watching.join().unwrap()
    });
    assert_eq!(watched.freshness.lost, 0);
    let steps = &watched.freshness.kinds["engine_step.idle"];
    assert!(steps.n >= 2 && steps.min.unwrap() > 0.0, "{steps:?}");
    engine_runtime.block_on(engine.stop());
}

#[test]
fn what_is_not_there_is_an_error() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = watched(options(free), 30.0).unwrap_err();
    assert!(error.to_string().contains("no indexer at 127.0.0.1:"), "{error:#}");
    let engine = EngineAddress {
        name: "e".to_owned(),
        http: free,
        events: "nonsense".to_owned(),
        replay: String::new(),
    };
    let indexer = Indexer::start(&[]);
    let error =
        watched(WatchOptions { engines: vec![engine], ..options(indexer.grpc) }, 30.0).unwrap_err();
    assert!(error.to_string().contains("events of e at \"nonsense\""), "{error:#}");
}

/// Watches a stack through its endpoint picker.
fn through(stack: &Stack) -> WatchOptions {
    WatchOptions {
        engines: stack.engines().to_vec(),
        picker: stack.ext_proc(),
        // A series of picks each 100 ms.
        probes_per_s: 500.0,
        ..options(stack.indexer().unwrap())
    }
}

/// Sum of a metric of the endpoint picker.
async fn sum(stack: &Stack, name: &str) -> f64 {
    let metrics = stack.epp_metrics().unwrap();
    let page = tokio::task::spawn_blocking(move || http_get(metrics, "/metrics").unwrap()).await;
    let (_, page) = page.unwrap();
    let values = page.lines().filter_map(|line| line.strip_prefix(name));
    let values = values.filter(|rest| rest.starts_with(['{', ' ']));
    values.map(|rest| rest.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// Waits until nothing of what was asked is on its way.
async fn no_load(stack: &Stack) {
    let deadline = Instant::now() + patience();
    loop {
        let streams = sum(stack, "epp_open_streams").await;
        let requests = sum(stack, "llm_d_epp_inflight_requests").await;
        if (streams, requests) == (0.0, 0.0) {
            return;
        }
        assert!(Instant::now() < deadline, "{streams} streams, {requests} requests");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn picks_follow_what_is_published_and_leave_nothing() {
    runtime().block_on(async {
        let stack = rig::start(rig::options(Policy::Precise)).await;
        let before = rows(stack.indexer().unwrap()).await;
        let watched = watched_for(through(&stack), 3.0).await.unwrap();
        let freshness = &watched.freshness;
        assert_eq!(watched.warnings, [""; 0]);
        assert_eq!(freshness.lost, 0, "{freshness:?}");
        let picks = &freshness.kinds["endpoint_picker.idle"];
        // On a busy machine the picker misses its deadline for the index now and then.
        assert!(picks.n >= 10.max(4 * freshness.routed_elsewhere), "{freshness:?}");
        assert!(picks.min.unwrap() > 0.0, "{picks:?}");
        let resolution = freshness.pick_resolution_us.unwrap();
        // A pick is a call of its own, and its answer is the first or one of the next.
        assert!(resolution > 0.0 && picks.p50.unwrap() < 20.0 * resolution, "{freshness:?}");

        no_load(&stack).await;
        assert!(sum(&stack, "llm_d_epp_request_total").await >= 10.0 * picks.n as f64 / 2.0);
        assert_eq!(stack.scrape_predictions().await.unwrap().unwrap().compared(), 0);
        assert_eq!(rows(stack.indexer().unwrap()).await, before);
        for engine in stack.engine_totals().await.unwrap() {
            assert_eq!(engine.queries, 0, "no engine is asked");
        }
        stack.stop().await;
    });
}

#[test]
fn a_picker_that_does_not_follow_is_not_credited() {
    runtime().block_on(async {
        let random = rig::options(Policy::Random);
        let stack = rig::start(StackOptions { indexer: true, ..random }).await;
        let watched = watched_for(through(&stack), 7.0).await.unwrap();
        let freshness = &watched.freshness;
        // The indexer shows the chains; only nobody routes by them.
        assert_eq!(freshness.lost, 0, "{freshness:?}");
        let picks = freshness.kinds.get("endpoint_picker.idle").map_or(0, |picks| picks.n);
        // Chance ends one series in a hundred.
        assert!(freshness.routed_elsewhere + picks >= 1 && picks <= 1, "{freshness:?}");
        no_load(&stack).await;
        stack.stop().await;
    });
}

#[test]
fn picks_that_are_given_up_leave_nothing() {
    runtime().block_on(async {
        let stack = rig::start(rig::options(Policy::Precise)).await;
        let before = rows(stack.indexer().unwrap()).await;
        let watching = watch(through(&stack), Instant::now(), CancellationToken::new());
        // Dropped in the middle of it.
        assert!(tokio::time::timeout(Duration::from_millis(1_200), watching).await.is_err());
        no_load(&stack).await;
        let deadline = Instant::now() + patience();
        while rows(stack.indexer().unwrap()).await != before {
            assert!(Instant::now() < deadline, "{:?}", rows(stack.indexer().unwrap()).await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        no_load(&stack).await;
        stack.stop().await;
    });
}

/// Sends a signal to a part of a stack while it is watched with a storm. The watch is to end by itself,
/// or is ended eight seconds later.
async fn struck(part: &str, signal: &str) -> (Watched, Duration) {
    let stack = rig::start(rig::options(Policy::Precise)).await;
    let component = stack.components().into_iter().find(|it| it.name == part).unwrap();
    let [Source::Pid(pid)] = component.sources[..] else { panic!("{component:?}") };
    let send = |signal: &str| {
        let mut kill = std::process::Command::new("kill");
        assert!(kill.args([&format!("-{signal}"), &pid.to_string()]).status().unwrap().success());
    };
    let storm = "publishers=2,rate=2000,burst=1000,interval=400ms,batch=8,cap=2000";
    let options = WatchOptions { storm: Some(storm.parse().unwrap()), ..through(&stack) };
    let stop = CancellationToken::new();
    let watching = async {
        let watched = watch(options, Instant::now(), stop.clone()).await.unwrap();
        stop.cancel();
        (watched, Instant::now())
    };
    let striking = async {
        // Fifteen series of picks, or more than one that is not followed: so some bursts, too.
        let deadline = Instant::now() + patience();
        while sum(&stack, "llm_d_epp_request_total").await < 150.0 {
            assert!(Instant::now() < deadline, "nothing is asked");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        send(signal);
        let struck = Instant::now();
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(8)) => stop.cancel(),
            () = stop.cancelled() => {}
        }
        struck
    };
    let (watched, struck) = tokio::join!(watching, striking);
    if signal == "STOP" {
        send("CONT");
    }
    stack.stop().await;
    let (watched, ended) = watched;
    // What was measured before is there.
    let freshness = &watched.freshness;
    // A series ended, if only because the endpoint picker had no core to hear the indexer in time.
    let picks = freshness.kinds.keys().any(|kind| kind.starts_with("endpoint_picker."));
    assert!(picks || freshness.routed_elsewhere > 0, "{freshness:?} {:?}", watched.warnings);
    let storm = watched.storm.as_ref().unwrap();
    assert!(watched.freshness.n > 0 && storm.batches > 0, "{watched:?}");
    assert!(storm.drain_ms.n > 0 && !watched.event_bursts.is_empty(), "{storm:?}");
    (watched, ended - struck)
}

#[track_caller]
fn check_indexer(signal: &str) {
    let (watched, took) = runtime().block_on(struck("indexer", signal));
    assert!(took < Duration::from_secs(25), "{took:?}");
    let warnings = watched.warnings.join("\n");
    assert!(warnings.contains("freshness was measured in part: "), "{warnings:?}");
    assert!(!watched.storm.unwrap().wrong_pods.is_empty());
}

#[test]
fn an_indexer_that_dies_leaves_what_was_measured() {
    check_indexer("KILL");
}

#[test]
fn an_indexer_that_stops_leaves_what_was_measured() {
    check_indexer("STOP");
}

#[track_caller]
fn check_picker(signal: &str, want: &str) {
    let (watched, took) = runtime().block_on(struck("epp", signal));
    assert!(took < Duration::from_secs(25), "{took:?}");
    // All else goes on.
    let [warning] = &watched.warnings[..] else { panic!("{:?}", watched.warnings) };
    assert!(warning.contains(want), "{warning}");
    assert_eq!(watched.freshness.lost, 0);
    let storm = watched.storm.unwrap();
    assert_eq!((storm.lost_batches, storm.undrained), (0, 0), "{storm:?}");
    assert_eq!(storm.wrong_pods, [""; 0]);
}

#[test]
fn a_picker_that_dies_leaves_the_rest() {
    check_picker("KILL", "the endpoint picker routes nothing: endpoint_picker");
}

#[test]
fn a_picker_that_stops_leaves_the_rest() {
    check_picker("STOP", "the endpoint picker does not answer within 5s");
}
