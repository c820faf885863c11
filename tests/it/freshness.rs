//! `loadgen`'s freshness probes and storms against the real indexer.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use kv_indexer::{
    loadgen::{
        engine::{Engine, EngineOptions},
        freshness::{WatchOptions, Watched, watch},
        stack::EngineAddress,
    },
    proto::kvindexer::ListPodsRequest,
};
use tokio_util::sync::CancellationToken;

use crate::support::{Indexer, connect, http::post, patience, runtime};

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
        delayed: false,
    }
}

/// Watches for some seconds, and sees that nothing of it stays in the indexer.
fn watched(options: WatchOptions, seconds: f64) -> anyhow::Result<Watched> {
    let grpc = options.indexer;
    runtime().block_on(async {
        let stop = CancellationToken::new();
        let watching = watch(options, Instant::now(), stop.clone());
        tokio::pin!(watching);
        let watched = tokio::select! {
            ended = &mut watching => ended,
            () = tokio::time::sleep(Duration::from_secs_f64(seconds)) => {
                stop.cancel();
                watching.await
            }
        };
        if watched.is_ok() {
            let pods = connect(grpc).await.list_pods(ListPodsRequest {}).await.unwrap();
            assert!(pods.into_inner().pods.is_empty());
        }
        watched
    })
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
