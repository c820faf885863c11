//! Snapshots: the real program killed, stopped and started again, engines that go on or restart
//! meanwhile, peers.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use kv_indexer::proto::kvindexer::PodState;
use tonic::Code;

use super::{
    engine::{Engine, Router},
    rig::{Query, Rig},
};
use crate::support::{Indexer, eventually};

const FILE: &str = "kv-indexer.snapshot";
const TOKENS: &str = "1-96";

/// The configuration of one pod `a` of model `m` that is saved in `dir`.
fn yaml(engine: &Engine, router: Option<&Router>, dir: Option<&Path>, interval_ms: u64) -> String {
    let replay = router
        .map_or_else(String::new, |router| format!("replayEndpoint: '{}', ", router.endpoint));
    let dir = dir.map_or_else(String::new, |dir| format!("dir: '{}', ", dir.display()));
    format!(
        "pods: [{{id: a, endpoint: '{}', {replay}model: m}}]\n\
         snapshot: {{{dir}intervalMs: {interval_ms}}}\n\
         kvEventsConfig: {{replay: {{idleMs: 500, cooldownMs: 600000}}}}\n",
        engine.endpoint,
    )
}

/// Four blocks in two tiers, in three batches; returns the last sequence.
fn fill(engine: &mut Engine) -> u64 {
    engine.send("store 1-4 of 1-64");
    engine.send("store 1-2 of 1-32 on CPU");
    engine.send("store 5 of 65-80 after 4; remove 5")
}

/// A running indexer that has applied [`fill`], and the last sequence.
fn filled(yaml: &str, engine: &mut Engine) -> (Rig, u64) {
    let mut rig = Rig::start(yaml);
    engine.subscribed();
    let last = fill(engine);
    rig.applied("a", last);
    (rig, last)
}

#[test]
fn a_restart_goes_on_from_the_snapshot_of_the_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    let yaml = yaml(&engine, Some(&router), Some(dir.path()), 0);
    let (mut rig, last) = filled(&yaml, &mut engine);
    let before = rig.ask(&Query::new("m", TOKENS));
    assert_eq!(before["a#0"].0, 4);
    let log = rig.finish();
    assert!(log.contains("Snapshot at shutdown is done."), "{log}");
    assert!(dir.path().join(FILE).is_file());

    // While it is down, the engine goes on.
    engine.keep("store 6 of 65-80 after 4");
    engine.keep("remove 1 on CPU");
    let asked = router.requests().len();
    let mut rig = Rig::start(&yaml);
    rig.expect("m", TOKENS, "a#0=5");
    let row = rig.state("a", PodState::Live);
    assert_eq!((row.applied_sequence, row.epoch), (Some(last + 2), 1), "{row:?}");
    // Not the whole history: from the last batch that was applied.
    assert_eq!(router.requests()[asked..], [last]);
    assert_eq!(rig.metric("kv_snapshot_rows_total{outcome=\"restored\"}"), 1.0);
    // Later events continue exactly: the copies on the CPU are still counted.
    engine.send("remove 1-2");
    let sequence = engine.send("remove 3");
    rig.applied("a", sequence);
    assert_eq!(rig.depths("m", TOKENS), "");
    rig.finish();
}

#[test]
fn blocks_score_before_their_engine_is_heard() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    let yaml = yaml(&engine, Some(&router), Some(dir.path()), 0);
    filled(&yaml, &mut engine).0.finish();
    // Nobody is there: the same place, without an engine.
    let elsewhere = yaml.replace(&engine.endpoint, "tcp://127.0.0.1:1");
    let mut rig = Rig::start(&format!("{elsewhere}readyTimeoutMs: 200\n"));
    assert_eq!(rig.depths("m", TOKENS), "a#0=4");
    let row = rig.pod("a");
    assert_eq!((row.state(), row.may_overcount), (PodState::Stale, true), "{row:?}");
    rig.finish();
}

#[test]
fn killed_at_any_moment_it_finds_the_old_snapshot_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    let yaml = yaml(&engine, Some(&router), Some(dir.path()), 10);
    let mut last = None;
    for round in 0..6u64 {
        let mut rig = Rig::start(&yaml);
        if last.is_none() {
            engine.subscribed();
        }
        let log = rig.indexer.log();
        assert!(!log.contains("is refused"), "{log}");
        assert_eq!(round > 0, log.contains("Snapshot loaded."), "{log}");
        let restored = rig.metric("kv_snapshot_rows_total{outcome=\"restored\"}");
        assert_eq!(restored, if round > 0 { 1.0 } else { 0.0 }, "{log}");
        if let Some(last) = last {
            rig.applied("a", last);
            assert_eq!(rig.state("a", PodState::Live).epoch, 1);
        }
        let block = round + 1;
        let (from, to) = (round * 16 + 1, round * 16 + 16);
        let parent = if round == 0 { String::new() } else { format!(" after {round}") };
        let sequence = engine.send(&format!("store {block} of {from}-{to}{parent}"));
        last = Some(sequence);
        rig.expect("m", "1-112", &format!("a#0={block}"));
        // One with the row at least has been written; the next one is under way or not.
        let endpoint = engine.endpoint.as_bytes();
        eventually("a snapshot", || {
            let file = fs::read(dir.path().join(FILE)).map_err(|error| error.to_string())?;
            let has_row = file.windows(endpoint.len()).any(|bytes| bytes == endpoint);
            if has_row { Ok(()) } else { Err("no row in it yet".to_owned()) }
        });
        thread::sleep(Duration::from_millis(round * 3));
        rig.kill();
    }
}

#[test]
fn an_engine_that_restarted_meanwhile_loses_its_old_blocks() {
    // With fewer batches than before, with as many, with more.
    for more in [0, 2, 5] {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = Engine::bind("kv@a@m");
        let router = Router::of(&engine);
        let yaml = yaml(&engine, Some(&router), Some(dir.path()), 0);
        let mut rig = Rig::start(&yaml);
        engine.subscribed();
        let last = fill(&mut engine);
        rig.applied("a", last);
        rig.finish();
        engine.restart();
        engine.keep("store 21 of 1-16");
        for at in 0..more {
            engine.keep(&format!("store {} of 200-215", 30 + at));
        }
        let mut rig = Rig::start(&yaml);
        rig.expect("m", TOKENS, "a#0=1");
        let row = rig.state("a", PodState::Live);
        assert_eq!((row.epoch, row.applied_sequence), (2, Some(more)), "{row:?}");
        rig.finish();
    }
}

#[test]
fn without_replay_a_restored_row_is_degraded() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::bind("kv@a@m");
    let yaml = yaml(&engine, None, Some(dir.path()), 0);
    filled(&format!("{yaml}readyTimeoutMs: 100\n"), &mut engine).0.finish();
    let mut rig = Rig::start(&yaml);
    let row = rig.state("a", PodState::Degraded);
    assert_eq!(row.reason, "restored from a snapshot", "{row:?}");
    assert_eq!(rig.depths("m", TOKENS), "a#0=4");
    engine.subscribed();
    // A clear ends the doubt.
    let clear = engine.send("clear; store 1 of 1-16");
    rig.applied("a", clear);
    assert_eq!(rig.state("a", PodState::Live).epoch, 1);
    assert_eq!(rig.depths("m", TOKENS), "a#0=1");
    rig.finish();
}

#[test]
fn a_file_that_is_damaged_or_foreign_is_refused_and_the_start_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    let yaml = yaml(&engine, Some(&router), Some(dir.path()), 0);
    filled(&yaml, &mut engine).0.finish();
    let path = dir.path().join(FILE);
    let good = fs::read(&path).unwrap();
    let mut damaged = good.clone();
    damaged[good.len() / 2] ^= 4;
    let cases = [
        (damaged, "is damaged"),
        (good[..good.len() - 3].to_vec(), "is cut short"),
        (b"something else altogether".to_vec(), "is no snapshot of kv-indexer"),
        (Vec::new(), "is no snapshot of kv-indexer"),
    ];
    for (bytes, why) in cases {
        fs::write(&path, &bytes).unwrap();
        let asked = router.requests().len();
        let mut rig = Rig::start(&yaml);
        assert_eq!(rig.metric("kv_snapshot_failures_total{operation=\"load\"}"), 1.0);
        rig.expect("m", TOKENS, "a#0=4");
        assert_eq!(router.requests()[asked..], [0], "{why}");
        // A killed process leaves what it found.
        let log = rig.indexer.log();
        assert!(log.contains("The snapshot is refused.") && log.contains(why), "{why}: {log}");
        rig.kill();
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    // Rows under other hash settings are left out.
    fs::write(&path, &good).unwrap();
    let rig = Rig::start(&format!("{yaml}tokenProcessorConfig: {{hashSeed: other}}\n"));
    let log = rig.indexer.log();
    assert!(log.contains("made with other settings"), "{log}");
    assert_eq!(rig.metric("kv_snapshot_rows_total{outcome=\"refused\"}"), 1.0);
    rig.finish();
}

#[test]
fn rows_that_nobody_declares_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    let own = yaml(&engine, Some(&router), Some(dir.path()), 0);
    filled(&own, &mut engine).0.finish();
    let dir = dir.path().display();
    let mut rig = Rig::start(&format!("snapshot: {{dir: '{dir}', intervalMs: 0, graceMs: 300}}\n"));
    eventually("no row", || match rig.rows()[..] {
        [] => Ok(()),
        ref rows => Err(format!("{rows:?}")),
    });
    assert_eq!(rig.metric("kv_snapshot_rows_total{outcome=\"dropped\"}"), 1.0);
    assert_eq!(rig.metric("kv_index_keys"), 0.0);
    rig.finish();
}

#[test]
fn a_new_replica_begins_with_its_peer_while_events_flow() {
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    let yaml = yaml(&engine, Some(&router), None, 0);
    let mut peer = Rig::start(&yaml);
    engine.subscribed();
    let last = fill(&mut engine);
    peer.applied("a", last);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let flow = thread::spawn(move || {
        // One prompt after the other, each evicted by the next but one.
        let mut at = 0u64;
        while !stopped.load(Ordering::Relaxed) {
            let first = 1_000 + at * 100;
            engine.send(&format!("store {first}-{} of {first}-{}", first + 3, first + 63));
            if at > 1 {
                let old = first - 200;
                engine.send(&format!("remove {old}-{}", old + 3));
            }
            at += 1;
            thread::sleep(Duration::from_millis(1));
        }
        let last = engine.next - 1;
        (engine, last, at)
    });
    let url = format!("http://{}", peer.indexer.grpc);
    let asked = router.requests().len();
    let mut replica = Rig::over(Indexer::with_config(&yaml, &["--bootstrap-from", &url]));
    assert_eq!(replica.metric("kv_snapshot_rows_total{outcome=\"restored\"}"), 1.0);
    stop.store(true, Ordering::Relaxed);
    let (_engine, last, rounds) = flow.join().unwrap();
    assert!(router.requests()[asked..].iter().all(|&from| from > 0), "{:?}", router.requests());
    for rig in [&mut peer, &mut replica] {
        rig.applied("a", last);
        assert_eq!(rig.state("a", PodState::Live).epoch, 1);
        assert_eq!(rig.depths("m", TOKENS), "a#0=4");
        for at in rounds.saturating_sub(4)..rounds {
            let first = 1_000 + at * 100;
            let held = if at + 2 >= rounds { "a#0=4" } else { "" };
            assert_eq!(rig.depths("m", &format!("{first}-{}", first + 63)), held, "round {at}");
        }
    }
    let blocks = |rig: &Rig| rig.metric("kv_index_keys");
    assert_eq!(blocks(&peer), blocks(&replica));
    // What the call sends is a file.
    let bytes = peer.snapshot().unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE), bytes).unwrap();
    peer.finish();
    replica.finish();
    let dir = dir.path().display();
    let mut again =
        Rig::start(&format!("snapshot: {{dir: '{dir}', intervalMs: 0, atShutdown: false}}\n"));
    assert_eq!(again.depths("m", TOKENS), "a#0=4");
    again.finish();
}

#[test]
fn a_peer_that_is_not_there_is_no_reason_not_to_start() {
    let rig = Rig::over(Indexer::start(&["--bootstrap-from", "http://127.0.0.1:1"]));
    assert_eq!(rig.metric("kv_snapshot_failures_total{operation=\"bootstrap\"}"), 1.0);
    assert!(rig.indexer.log().contains("No snapshot of the peer."));
    rig.finish();
}

#[test]
fn snapshots_at_a_time_are_bounded() {
    let mut engine = Engine::bind("kv@a@m");
    let yaml = yaml(&engine, None, None, 0).replace("intervalMs: 0", "maxStreams: 1");
    let mut rig = Rig::start(&format!("{yaml}readyTimeoutMs: 100\n"));
    engine.subscribed();
    // More than fits into the queue and the windows of the connection.
    let mut last = 0;
    for at in 0..400u32 {
        let first = 1 + at * 20_000;
        last = engine.send(&format!(
            "store {}-{} of {first}-{}",
            1 + at * 2_000,
            1_250 + at * 2_000,
            first + 19_999
        ));
    }
    rig.applied("a", last);
    let unread = rig.begin_snapshot().unwrap();
    let refused = eventually("a second call", || match rig.begin_snapshot() {
        Err(status) => Ok(status),
        Ok(_) => Err("it is served".to_owned()),
    });
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    drop(unread);
    let bytes = eventually("the first one's end", || rig.snapshot().map_err(|s| s.to_string()));
    assert!(bytes.len() > 400 * 1_250 * 16, "{}", bytes.len());
    rig.finish();
}
