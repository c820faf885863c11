//! Events that are lost for good, each in another way: what stays, and for how long.

use std::sync::Arc;

use kv_indexer::{
    proto::kvindexer::{LossPolicy, PodState, PodStatus},
    wire::encode::{Batch, Form},
};

use super::{
    engine::{Engine, Router, three, whole},
    rig::{Query, Rig},
    script,
};
use crate::support::eventually;

/// Short patience with silent replays, short terms.
const QUICK: &str = "kvEventsConfig: {loss: {ageOutMs: 200}, replay: {idleMs: 100, attempts: 1, cooldownMs: 600000}}";
const POLICIES: [LossPolicy; 3] = [LossPolicy::Keep, LossPolicy::AgeOut, LossPolicy::Clear];

#[track_caller]
fn register(rig: &mut Rig, engine: &Engine, router: Option<&Router>, policy: LossPolicy) {
    rig.register_as(engine, router, |request| {
        (request.pod, request.model) = ("a".to_owned(), "m".to_owned());
        request.loss_policy = policy.into();
    });
}

/// An engine that holds blocks 1 to 4 and removed 4 unheard, then named 1 and 2 again: what may a
/// pod in this state be credited with?
#[track_caller]
fn judge(rig: &mut Rig, policy: LossPolicy, last: u64, reason: &str) {
    rig.applied("a", last);
    // A row's numbers are read one after the other: those of before may come with the last sequence.
    let row = rig.applied("a", last);
    assert_eq!((row.state(), row.reason.as_str()), (PodState::Degraded, reason), "{policy:?}");
    assert!(row.may_overcount, "{row:?}");
    let depths = rig.depths("m", "1-64");
    match policy {
        LossPolicy::Keep => {
            assert_eq!((depths.as_str(), row.blocks, row.unconfirmed_blocks), ("a#0=4", 4, 2));
            let findings = rig.findings(&Query::new("m", "1-64"), "a");
            assert!(findings.contains("2 of 4 blocks have not been named"), "{findings}");
        }
        LossPolicy::AgeOut => {
            rig.expect("m", "1-64", "a#0=2");
            rig.counted("kv_events_aged_out_blocks_total", 2.0);
            let findings = rig.findings(&Query::new("m", "1-64"), "a");
            assert!(findings.contains("did not name it in time"), "{findings}");
        }
        _ => assert_eq!((depths.as_str(), row.blocks, row.unconfirmed_blocks), ("a#0=2", 2, 0)),
    }
}

/// What was announced twice ends with one removal; a clear ends the doubt.
#[track_caller]
fn heals(rig: &mut Rig, engine: &mut Engine) {
    engine.send("store 1-2 of 1-32");
    let last = engine.send("remove 1-4");
    rig.applied("a", last);
    let row = rig.applied("a", last);
    assert_eq!((row.blocks, row.unconfirmed_blocks), (0, 0), "{row:?}");
    engine.send("clear; store 1-2 of 1-32; store 1 of 1-16; remove 1");
    let row = rig.state("a", PodState::Live);
    assert_eq!(row.unconfirmed_blocks, 0);
    assert_eq!(rig.depths("m", "1-32"), "a#0=2", "counting again");
}

#[test]
fn a_gap_without_replay() {
    for policy in POLICIES {
        let mut rig = Rig::start(QUICK);
        let mut engine = Engine::bind("kv@a@m");
        register(&mut rig, &engine, None, policy);
        engine.send("store 1-4 of 1-64");
        engine.keep("remove 4");
        let last = engine.send("store 1-2 of 1-32");
        judge(&mut rig, policy, last, "gap of 1 batches at 1");
        assert_eq!(rig.metric("kv_events_losses_total{reason=\"gap\"}"), 1.0);
        heals(&mut rig, &mut engine);
        rig.finish();
    }
}

#[test]
fn a_replay_buffer_that_rolled_over_and_one_with_a_hole() {
    for policy in POLICIES {
        let mut rig = Rig::start(QUICK);
        let mut engine = Engine::bind("kv@a@m");
        let router = Router::of(&engine);
        register(&mut rig, &engine, Some(&router), policy);
        rig.state("a", PodState::Live);
        engine.send("store 1-4 of 1-64");
        engine.keep("remove 4");
        engine.keep("store 1 of 1-16");
        // The oldest two are out of the engine's buffer.
        engine.history.lock().unwrap().drain(..2);
        let last = engine.send("store 1-2 of 1-32");
        judge(&mut rig, policy, last, "hole in replay at 1");
        assert_eq!(rig.metric("kv_events_losses_total{reason=\"hole\"}"), 1.0);
        heals(&mut rig, &mut engine);
        rig.finish();
    }
}

#[test]
fn a_replay_that_is_silent() {
    for policy in POLICIES {
        let mut rig = Rig::start(QUICK);
        let mut engine = Engine::bind("kv@a@m");
        let history = Arc::clone(&engine.history);
        let router = Router::start(move |number, from| match number {
            0 => whole(&history.lock().unwrap(), from, three),
            _ => Vec::new(),
        });
        register(&mut rig, &engine, Some(&router), policy);
        rig.state("a", PodState::Live);
        engine.send("store 1-4 of 1-64");
        engine.keep("remove 4");
        let last = engine.send("store 1-2 of 1-32");
        judge(&mut rig, policy, last, "gap of 1 batches at 1");
        heals(&mut rig, &mut engine);
        rig.finish();
    }
}

#[test]
fn a_batch_that_cannot_be_read() {
    for policy in POLICIES {
        let mut rig = Rig::start(QUICK);
        let mut engine = Engine::bind("kv@a@m");
        register(&mut rig, &engine, None, policy);
        engine.send("store 1-4 of 1-64");
        engine.send_payload(b"\xc1");
        let last = engine.send("store 1-2 of 1-32");
        judge(&mut rig, policy, last, "batch 1 could not be read in full");
        assert_eq!(rig.metric("kv_events_losses_total{reason=\"unreadable\"}"), 1.0);
        heals(&mut rig, &mut engine);
        rig.finish();
    }
}

/// Ten thousand batches at once into a queue of eight: stores of one block, each removed by the next
/// batch but one.
#[test]
fn a_burst_into_a_consumer_that_is_too_slow() {
    for policy in POLICIES {
        let mut rig =
            Rig::start("kvEventsConfig: {queueBatches: 8, concurrency: 1, loss: {ageOutMs: 200}}");
        let mut engine = Engine::bind("kv@a@m");
        register(&mut rig, &engine, None, policy);
        burst(&mut engine);
        let row = settled(&mut rig, &mut engine);
        assert!(rig.metric("kv_events_dropped_total{reason=\"queue_full\"}") > 0.0);
        bounded(&mut rig, policy, &row);
        rig.finish();
    }
}

/// The engine's own queue is too short for a subscriber that is not read: its socket drops.
#[test]
fn drops_at_the_engine() {
    for policy in POLICIES {
        let mut rig = Rig::start(
            "kvEventsConfig: {receiveHighWaterMark: 2, queueBatches: 8, concurrency: 1, \
             loss: {ageOutMs: 200}}",
        );
        let mut engine = Engine::bind_with_mark("kv@a@m", 4);
        register(&mut rig, &engine, None, policy);
        burst(&mut engine);
        let row = settled(&mut rig, &mut engine);
        bounded(&mut rig, policy, &row);
        rig.finish();
    }
}

fn burst(engine: &mut Engine) {
    let batches: Vec<_> = (0..10_000_u32)
        .map(|batch| {
            let (from, first) = (1000 + batch * 64, 100 + batch * 4);
            let store = format!("store {first}-{} of {from}-{}", first + 3, from + 63);
            let gone = format!("remove {}-{}; ", first - 8, first - 5);
            engine.keep(&(if batch < 2 { String::new() } else { gone } + &store))
        })
        .collect();
    // Made beforehand: a burst is faster than whoever takes it in.
    for (sequence, payload) in batches {
        engine.raw(&[engine.topic.as_bytes(), &sequence.to_be_bytes(), &payload]);
    }
}

/// Goes on slowly until what was lost is known; returns the row when the last word, blocks 1 to 4,
/// is applied.
#[track_caller]
fn settled(rig: &mut Rig, engine: &mut Engine) -> PodStatus {
    eventually("a degraded row that is up to date", || {
        let last = engine.send("store 1-4 of 1-64");
        let mut row = rig.pod("a");
        // It may have been lost, too.
        for _ in 0..200 {
            if row.applied_sequence == Some(last) && row.state() == PodState::Degraded {
                return Ok(row);
            }
            row = rig.pod("a");
        }
        Err(format!("{row:?}"))
    })
}

/// The engine holds blocks 1 to 4 and the last eight of the burst.
#[track_caller]
fn bounded(rig: &mut Rig, policy: LossPolicy, row: &PodStatus) {
    assert_eq!(rig.depths("m", "1-64"), "a#0=4");
    match policy {
        LossPolicy::Keep => assert!(row.unconfirmed_blocks <= row.blocks - 4, "{row:?}"),
        _ => {
            drop(rig.until("a", "without phantoms", |row| {
                row.blocks <= 12 && row.unconfirmed_blocks <= 8
            }));
        }
    }
    assert_eq!(rig.depths("m", "1-64"), "a#0=4");
}

/// What an engine on a machine whose clock is behind says.
fn behind(text: &str) -> Vec<u8> {
    let batch = Batch { timestamp: 1e9, events: script::events(text), rank: Some(0) };
    batch.encode(Form::Map).unwrap()
}

/// The old blocks are gone when the first new one counts, whatever the new life's clock says.
#[test]
fn a_restart_on_a_clock_that_is_behind() {
    for replay in [true, false] {
        let mut rig = Rig::start("kvEventsConfig: {reconnectMs: 20, reconnectMaxMs: 50}");
        let mut engine = Engine::bind("kv@a@m");
        let router = replay.then(|| Router::of(&engine));
        register(&mut rig, &engine, router.as_ref(), LossPolicy::Keep);
        engine.send("store 1-4 of 1-64");
        let last = engine.send("store 5 of 65-80 after 4");
        rig.applied("a", last);
        engine.restart();
        engine.subscribed();
        let payload = behind("clear; store 9 of 101-116");
        engine.history.lock().unwrap().push((0, payload.clone()));
        engine.send_payload(&payload);
        rig.expect("m", "101-116", "a#0=1");
        assert_eq!(rig.depths("m", "1-80"), "");
        let row = rig.state("a", PodState::Live);
        assert_eq!((row.epoch, row.blocks), (2, 1), "replay {replay}: {row:?}");
        rig.finish();
    }
}

/// While we were away the engine began anew, and its numbers have passed ours.
#[test]
fn a_restart_that_overtakes() {
    let mut rig = Rig::start("kvEventsConfig: {reconnectMs: 20, reconnectMaxMs: 50}");
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    register(&mut rig, &engine, Some(&router), LossPolicy::Keep);
    let last = engine.send("store 1-4 of 1-64");
    rig.applied("a", last);
    engine.restart();
    for _ in 0..5 {
        engine.keep("store 9 of 101-116");
        engine.keep("remove 9");
    }
    engine.subscribed();
    let last = engine.send("store 9 of 101-116");
    rig.expect("m", "101-116", "a#0=1");
    assert_eq!(rig.depths("m", "1-64"), "");
    let row = rig.applied("a", last);
    assert_eq!((row.epoch, row.state(), row.blocks), (2, PodState::Live, 1), "{row:?}");
    rig.finish();
}
