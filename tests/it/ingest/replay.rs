//! Replay, against a ROUTER that answers as scripted: C100 to C109.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kv_indexer::proto::kvindexer::PodState;

use super::{
    engine::{Engine, Router, Step, end, three, two, whole},
    rig::Rig,
};

/// Short patience, and no second thoughts within a test.
const QUICK: &str = "kvEventsConfig: {replay: {idleMs: 150, cooldownMs: 600000}}";

fn engine() -> Engine {
    Engine::bind("kv@a@m")
}

/// Replies of two frames carry no topic, so the model is declared.
#[track_caller]
fn register(rig: &mut Rig, engine: &Engine, router: Option<&Router>) {
    rig.register_as(engine, router, |request| {
        (request.pod, request.model) = ("a".to_owned(), "m".to_owned());
    });
}

/// An engine that said three batches before anybody came: blocks 1-2, 3, 4.
fn with_history() -> Engine {
    let mut engine = engine();
    engine.keep("store 1-2 of 1-32");
    engine.keep("store 3 of 33-48 after 2");
    engine.keep("store 4 of 49-64 after 3");
    engine
}

#[test]
fn both_forms_bring_the_history() {
    for reply in [two, three] {
        let mut rig = Rig::start(QUICK);
        let mut engine = with_history();
        let history = Arc::clone(&engine.history);
        let router = Router::start(move |_, from| whole(&history.lock().unwrap(), from, reply));
        register(&mut rig, &engine, Some(&router));
        rig.expect("m", "1-64", "a#0=4");
        let row = rig.state("a", PodState::Live);
        assert_eq!((row.reason.as_str(), row.may_undercount), ("", false), "{row:?}");
        // C109: what replay brought needs no second request.
        engine.next = 2;
        engine.keep("clear");
        engine.history.lock().unwrap().pop();
        engine.next = 3;
        let last = engine.send("store 5 of 65-80 after 4");
        rig.applied("a", last);
        assert_eq!(rig.depths("m", "1-80"), "a#0=5");
        assert_eq!(router.requests(), [0]);
        rig.finish();
    }
}

/// C100, C101, and a cut at the very beginning.
#[test]
fn a_replay_that_is_cut_goes_on_where_it_was() {
    for (cut, second) in [(0, 0), (2, 2), (3, 3)] {
        let mut rig = Rig::start(QUICK);
        let engine = with_history();
        let history = Arc::clone(&engine.history);
        let router = Router::start(move |number, from| {
            let mut steps = whole(&history.lock().unwrap(), from, three);
            if number == 0 {
                steps.truncate(cut);
            }
            steps
        });
        register(&mut rig, &engine, Some(&router));
        rig.expect("m", "1-64", "a#0=4");
        rig.state("a", PodState::Live);
        assert_eq!(router.requests(), [0, second], "cut after {cut}");
        rig.finish();
    }
}

/// C102: llm-d indexes nothing.
#[test]
fn a_history_that_starts_late_is_indexed_and_partial() {
    let mut rig = Rig::start(QUICK);
    let mut engine = with_history();
    engine.history.lock().unwrap().remove(0);
    engine.keep("store 7 of 1-16");
    let router = Router::of(&engine);
    register(&mut rig, &engine, Some(&router));
    rig.expect("m", "1-64", "a#0=1");
    let row = rig.state("a", PodState::Partial);
    assert_eq!(row.reason, "replay history starts at 1");
    assert!(row.may_undercount && !row.may_overcount, "{row:?}");
    let last = engine.send("store 8 of 17-32 after 7");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-64"), "a#0=2");
    // What was missing before does not matter after a clear.
    engine.send("clear");
    rig.state("a", PodState::Live);
    assert_eq!(rig.depths("m", "1-64"), "");
    rig.finish();
}

/// C103: llm-d clears the pod.
#[test]
fn a_hole_in_the_history_degrades_and_keeps() {
    let mut rig = Rig::start(QUICK);
    let engine = with_history();
    engine.history.lock().unwrap().remove(1);
    let router = Router::of(&engine);
    register(&mut rig, &engine, Some(&router));
    rig.expect("m", "1-64", "a#0=2");
    let row = rig.state("a", PodState::Degraded);
    assert_eq!(row.reason, "hole in replay at 1");
    assert!(row.may_overcount, "{row:?}");
    // Asked once more, from the hole, before it was believed.
    assert_eq!(router.requests(), [0, 1]);
    rig.finish();
}

/// C104: in real seconds, with the default patience of two.
#[test]
fn slow_replies_are_waited_for() {
    let mut rig = Rig::start("");
    let engine = with_history();
    let history = Arc::clone(&engine.history);
    let router = Router::start(move |_, from| {
        let pause = Step::Pause(Duration::from_millis(1100));
        let steps = whole(&history.lock().unwrap(), from, three);
        steps.into_iter().flat_map(|step| [pause.clone(), step]).collect()
    });
    register(&mut rig, &engine, Some(&router));
    rig.expect("m", "1-64", "a#0=4");
    rig.state("a", PodState::Live);
    assert_eq!(router.requests(), [0]);
    rig.finish();
}

/// C105, and the live stream goes on (C107).
#[test]
fn a_silent_replay_is_asked_three_times() {
    let mut rig = Rig::start(QUICK);
    let mut engine = engine();
    let router = Router::start(|_, _| Vec::new());
    register(&mut rig, &engine, Some(&router));
    rig.until("a", "asked", |row| row.state() == PodState::Replaying);
    let row = rig.state("a", PodState::Partial);
    assert_eq!((row.reason.as_str(), router.requests()), ("replay silent", vec![0, 0, 0]));
    engine.next = 5;
    engine.send("store 1-2 of 1-32");
    rig.expect("m", "1-32", "a#0=2");
    // A gap: nobody is asked while the silence is fresh, nothing is dropped.
    engine.keep("store 3 of 33-48 after 2");
    let last = engine.send("store 3 of 33-48 after 2");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-48"), "a#0=3");
    let row = rig.pod("a");
    assert_eq!((row.state(), row.reason.as_str()), (PodState::Degraded, "gap of 1 batches at 6"));
    assert_eq!((router.requests().len(), row.replays, row.gaps), (3, 3, 1));
    // Set counting since the gap: one removal heals.
    engine.send("store 3 of 33-48 after 2");
    let last = engine.send("remove 3");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-48"), "a#0=2");
    rig.finish();
}

/// C106.
#[test]
fn a_gap_is_filled_and_nothing_applied_twice() {
    let mut rig = Rig::start(QUICK);
    let mut engine = engine();
    let router = Router::of(&engine);
    register(&mut rig, &engine, Some(&router));
    rig.state("a", PodState::Live);
    engine.send("store 1 of 1-16");
    engine.keep("store 2 of 17-32 after 1");
    let last = engine.send("store 3 of 33-48 after 2");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-48"), "a#0=3");
    let last = engine.send("remove 3");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-48"), "a#0=2");
    let row = rig.pod("a");
    assert_eq!((router.requests(), row.state(), row.gaps), (vec![0, 1], PodState::Live, 1));
    rig.finish();
}

#[test]
fn a_gap_without_replay_degrades_until_a_clear() {
    let mut rig = Rig::start(QUICK);
    let mut engine = engine();
    rig.register("a", &engine, None);
    engine.send("store 1 of 1-16");
    engine.keep("remove 1");
    let last = engine.send("store 1-2 of 1-32");
    let row = rig.applied("a", last);
    assert_eq!((row.state(), row.reason.as_str()), (PodState::Degraded, "gap of 1 batches at 1"));
    let last = engine.send("remove 1-2");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-32"), "", "one removal clears");
    engine.send("clear; store 1-2 of 1-32; store 1 of 1-16; remove 1");
    rig.state("a", PodState::Live);
    assert_eq!(rig.depths("m", "1-32"), "a#0=2", "counting again");
    rig.finish();
}

#[test]
fn a_late_joiner_without_replay_is_partial() {
    let mut rig = Rig::start(QUICK);
    let mut engine = engine();
    engine.next = 7;
    rig.register("a", &engine, None);
    engine.send("store 1 of 1-16; remove 99");
    let row = rig.applied("a", 7);
    assert_eq!(row.state(), PodState::Partial);
    assert_eq!(row.reason, "joined mid-stream, no replay");
    assert_eq!(rig.depths("m", "1-32"), "a#0=1");
    rig.finish();
}

/// C108, in either way that a publisher can begin anew while the connection stays.
#[test]
fn a_new_life_takes_the_old_blocks() {
    for replay in [true, false] {
        let mut rig = Rig::start(QUICK);
        let mut engine = engine();
        let router = replay.then(|| Router::of(&engine));
        register(&mut rig, &engine, router.as_ref());
        engine.send("store 1-4 of 1-64");
        let last = engine.send("store 5 of 65-80 after 4");
        rig.applied("a", last);
        (engine.next, *engine.history.lock().unwrap()) = (0, Vec::new());
        engine.send("store 9 of 1-16");
        rig.expect("m", "1-80", "a#0=1");
        let row = rig.state("a", PodState::Live);
        assert_eq!(row.epoch, 2, "replay {replay}: {row:?}");
        rig.finish();
    }
}

/// The doubt that a silent replay leaves is healed when it speaks again.
#[test]
fn a_degraded_pod_is_healed_beside_the_stream() {
    let mut rig = Rig::start("kvEventsConfig: {replay: {idleMs: 50, cooldownMs: 0}}");
    let mut engine = with_history();
    let history = Arc::clone(&engine.history);
    let router = Router::start(move |number, from| {
        if number < 3 { Vec::new() } else { whole(&history.lock().unwrap(), from, two) }
    });
    register(&mut rig, &engine, Some(&router));
    rig.state("a", PodState::Partial);
    engine.send("store 5 of 65-80 after 4");
    rig.state("a", PodState::Live);
    rig.expect("m", "1-80", "a#0=5");
    assert_eq!(rig.pod("a").epoch, 1);
    rig.finish();
}

/// Nothing that the replay socket says is believed to be more than it is.
#[test]
fn garbage_on_the_replay_socket_is_counted_and_harmless() {
    let mut rig = Rig::start(QUICK);
    let mut engine = with_history();
    let history = Arc::clone(&engine.history);
    let router = Router::start(move |number, from| {
        let say = |frames: &[&[u8]]| Step::Say(frames.iter().map(|f| f.to_vec()).collect());
        let mut steps = vec![
            say(&[b""]),
            say(&[b"", b"x"]),
            say(&[b"", b"", b"", b"", b"", b"", b""]),
            say(&[b"", &[1, 2, 3], b"p"]),
            say(&[b"", &[0xff; 8], b"p"]),
            say(&[b"x", b"t", &[0; 8], b"p"]),
            say(&[b"", &0_u64.to_be_bytes(), b""]),
        ];
        if number == 0 {
            // More than a frame may have: libzmq cuts this connection.
            steps.push(two(0, &vec![0xc1; 5 << 20]));
        }
        steps.extend(whole(&history.lock().unwrap(), from, three));
        steps
    });
    let started = Instant::now();
    let tight = "kvEventsConfig: {limits: {payloadBytes: 64KiB}, replay: {idleMs: 150}}";
    let mut tight = Rig::start(tight);
    register(&mut tight, &engine, Some(&router));
    tight.expect("m", "1-64", "a#0=4");
    tight.state("a", PodState::Live);
    assert!(router.requests().len() >= 2, "{:?}", router.requests());
    for reason in ["frame_count", "sequence", "end_marker", "empty_payload"] {
        let series = format!("kv_events_rejected_total{{reason=\"{reason}\"}}");
        assert!(tight.metric(&series) > 0.0, "{reason}");
    }
    assert!(started.elapsed() < Duration::from_secs(20));
    tight.finish();

    // A batch of the replay that is none keeps its place; the pod is degraded, the rest is there.
    let router = Router::start(|_, _| {
        let good =
            super::engine::payload("store 1 of 1-16", Some(0), kv_indexer::wire::encode::Form::Map);
        vec![two(0, &good), two(1, b"\xc1"), end(two)]
    });
    engine.next = 2;
    register(&mut rig, &engine, Some(&router));
    let row = rig.state("a", PodState::Degraded);
    assert_eq!(row.reason, "batch 1 could not be read in full");
    assert_eq!(rig.depths("m", "1-64"), "a#0=1");
    rig.finish();
}
