//! What nobody should send: it is refused, counted, and hurts no one else.

use std::time::{Duration, Instant};

use kv_indexer::{proto::kvindexer::PodState, wire::encode::Form};

use super::{
    bind,
    engine::{Engine, Router, payload},
    rig::Rig,
};
use crate::support::{eventually, fixture};

/// A hand-written bad message: name, frames (topic, sequence and payload; or as they are), and what
/// is to become of it.
struct Bad {
    name: String,
    payload: Option<Vec<u8>>,
    frames: Vec<Vec<u8>>,
    expect: String,
}

fn malformed() -> Vec<Bad> {
    let text = std::fs::read_to_string(fixture("malformed/malformed.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |value: &serde_json::Value| base64(value.as_str().unwrap());
        let frames = value.get("frames_b64").and_then(|frames| frames.as_array());
        Bad {
            name: value["name"].as_str().unwrap().to_owned(),
            payload: value.get("payload_b64").map(text),
            frames: frames.into_iter().flatten().map(text).collect(),
            expect: value["expect"].as_str().unwrap().to_owned(),
        }
    });
    lines.collect()
}

fn base64(text: &str) -> Vec<u8> {
    let (mut out, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        (bits, count) = (bits << 6 | u32::from(value), count + 6);
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    out
}

fn rejects(rig: &Rig) -> f64 {
    let metrics = rig.metrics();
    let lines = metrics.lines().filter(|line| line.starts_with("kv_events_rejected_total{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// Resident memory of this process's child is what matters; the index itself says what it takes.
fn index_bytes(rig: &Rig) -> f64 {
    rig.metric("kv_index_bytes")
}

#[test]
fn every_malformed_message_among_good_ones() {
    let mut rig = Rig::start("");
    let mut victim = Engine::bind("kv@a@m");
    let mut other = Engine::bind("kv@b@m");
    rig.register("a", &victim, None);
    rig.register("b", &other, None);
    let all = malformed();
    assert!(all.len() > 80, "{}", all.len());
    let mut wanted_rejects = 0;
    let mut block = 0;
    let good = |engine: &mut Engine, block: u32| {
        // Chains of their own, so that nothing in the fixtures is parent or child of it.
        let (hash, first) = (1_000_000 + block, 5_000 + block * 16);
        let after = if block == 0 { String::new() } else { format!("after {}", hash - 1) };
        engine.send(&format!("store {hash} of {first}-{} {after}", first + 15))
    };
    // Those that clear are good, and take the good blocks with them.
    for bad in all.iter().filter(|bad| !bad.name.starts_with("cleared")) {
        match &bad.payload {
            // An empty payload is refused with its frames, and the sequence is missing then.
            Some(payload) if payload.is_empty() => {
                victim.raw(&[b"kv@a@m", &victim.next.to_be_bytes(), b""]);
                wanted_rejects += 1;
            }
            Some(payload) => {
                victim.send_payload(payload);
                wanted_rejects += usize::from(bad.expect == "reject");
            }
            None if bad.frames.is_empty() => {}
            None => {
                let frames: Vec<&[u8]> = bad.frames.iter().map(Vec::as_slice).collect();
                if bad.expect == "reject" {
                    victim.raw(&frames);
                    wanted_rejects += 1;
                }
            }
        }
        good(&mut victim, block);
        good(&mut other, block);
        block += 1;
    }
    let tokens = format!("5000-{}", 5_000 + block * 16 - 1);
    let wanted = format!("a#0={block} b#0={block}");
    eventually(&wanted, || match rig.depths("m", &tokens) {
        got if got.contains(&format!("a#0={block}")) && got.contains(&format!("b#0={block}")) => {
            Ok(())
        }
        got => Err(format!("{got} {:#?}", rig.pods())),
    });
    assert!(rejects(&rig) >= wanted_rejects as f64, "{wanted_rejects}\n{}", rig.metrics());
    for reason in ["frame_count", "sequence", "empty_payload", "end_marker", "malformed"] {
        let series = format!("kv_events_rejected_total{{reason=\"{reason}\"}}");
        assert!(rig.metric(&series) > 0.0, "{reason}: {}", rig.metrics());
    }
    let row = rig.pods().into_iter().find(|row| row.pod == "a").unwrap();
    assert!(row.rejected_events > 30, "{row:?}");
    assert_eq!((rig.pod("b").state(), rig.pod("b").rejected_events), (PodState::Live, 0));
    assert!(index_bytes(&rig) < f64::from(1 << 20));
    let log = rig.finish();
    assert!(!log.contains("panicked"), "{log}");
}

/// What could not be read may have been a removal: the pod says so until it knows better.
#[test]
fn an_unreadable_batch_degrades_until_a_clear() {
    let mut rig = Rig::start("");
    // A late joiner: partial, which promises that scores are never high.
    for (pod, first, state) in [("a", 0, PodState::Live), ("b", 3, PodState::Partial)] {
        let mut engine = Engine::bind("kv@x@m");
        rig.register(pod, &engine, None);
        engine.next = first;
        engine.send("store 1-2 of 1-32; store 1-2 of 1-32");
        rig.state(pod, state);
        engine.send_payload(b"\x93\xc1");
        let row = rig.state(pod, PodState::Degraded);
        assert_eq!(row.reason, format!("batch {} could not be read in full", first + 1));
        assert!(row.may_overcount);
        let last = engine.send("remove 2");
        rig.applied(pod, last);
        assert_eq!(rig.depths("m", "1-32"), format!("{pod}#0=1"), "one removal is enough");
        engine.send("clear; store 1 of 1-16");
        rig.state(pod, PodState::Live);
        rig.unregister(pod).unwrap();
    }
    rig.finish();
}

#[test]
fn payloads_over_the_limit() {
    let mut rig = Rig::start("kvEventsConfig: {limits: {payloadBytes: 2KiB}, reconnectMs: 20}");
    let mut engine = Engine::bind("kv@a@m");
    let router = Router::of(&engine);
    rig.register("a", &engine, Some(&router));
    rig.state("a", PodState::Live);
    engine.send("store 1 of 1-16");
    // A little over: skipped alone.
    engine.send_payload(&vec![0xc1; 8 << 10]);
    let last = engine.send("store 2 of 17-32 after 1");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-32"), "a#0=2");
    assert_eq!(rig.metric("kv_events_rejected_total{reason=\"payload_size\"}"), 1.0);
    assert_eq!(rig.pod("a").state(), PodState::Degraded);
    // Far over: libzmq cuts the connection and would never make it again by itself.
    engine.send_payload(&vec![0xc1; 6 << 20]);
    engine.subscribed();
    engine.send("store 3 of 33-48 after 2");
    rig.expect("m", "1-48", "a#0=3");
    assert!(rig.metric("kv_events_reconnections_total") >= 1.0);
    let row = rig.pod("a");
    assert_ne!(row.state(), PodState::Stale, "{row:?}");
    rig.finish();
}

#[test]
fn a_port_where_somebody_else_answers() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap();
    let mut rig = Rig::start("kvEventsConfig: {reconnectMs: 20}");
    let request = kv_indexer::proto::kvindexer::RegisterPodRequest {
        pod: "a".to_owned(),
        endpoint: format!("tcp://{port}"),
        ..Default::default()
    };
    rig.try_register(request).unwrap();
    for _ in 0..3 {
        let (mut stream, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    }
    assert_eq!(rig.pod("a").state(), PodState::Connecting);
    drop(listener);
    // The engine comes up at last.
    let mut engine = Engine::bind("kv@a@m");
    engine.endpoint = format!("tcp://{port}");
    engine.restart();
    engine.subscribed();
    engine.send("store 1 of 1-16");
    rig.expect("m", "1-16", "a#0=1");
    rig.finish();
}

#[test]
fn monstrous_names_are_refused() {
    let mut rig = Rig::start("kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*', topicFilter: ''}");
    let mut engine = Engine::connect(&bind::endpoint(&rig), "kv@a@m");
    engine.subscribed();
    let good = payload("store 1 of 1-16", Some(0), Form::Map);
    let sequence = 0_u64.to_be_bytes();
    engine.raw(&[format!("kv@{}@m", "p".repeat(1 << 20)).as_bytes(), &sequence, &good]);
    engine.raw(&["q".repeat(1 << 20).as_bytes(), &sequence, &good]);
    engine.raw(&[format!("kv@a@{}", "m".repeat(1 << 20)).as_bytes(), &sequence, &good]);
    engine.send("store 1 of 1-16");
    rig.expect("m", "1-16", "a#0=1");
    assert_eq!(rig.metric("kv_events_rejected_total{reason=\"pod_id_size\"}"), 2.0);
    assert_eq!(rig.metric("kv_events_rejected_total{reason=\"model_size\"}"), 1.0);
    assert_eq!(rig.rows(), ["a#0"]);
    rig.finish();
}

#[test]
fn a_crowd_of_strangers_takes_no_more_rows_than_allowed() {
    const CROWD: u32 = 100_000;
    let mut rig = Rig::start(
        "kvEventsConfig: {zmqEndpoint: 'tcp://127.0.0.1:*', maxPods: 8, receiveHighWaterMark: 1000000}",
    );
    let mut engine = Engine::connect(&bind::endpoint(&rig), "kv@known@m");
    engine.subscribed();
    engine.send("store 1 of 1-16");
    rig.expect("m", "1-16", "known#0=1");
    let good = payload("store 1 of 1-16", Some(0), Form::Map);
    for stranger in 0..CROWD {
        let topic = format!("kv@stranger-{stranger}@m");
        engine.raw(&[topic.as_bytes(), &0_u64.to_be_bytes(), &good]);
    }
    rig.counted("kv_events_refused_publishers_total{reason=\"max_pods\"}", f64::from(CROWD - 7));
    assert_eq!(rig.rows().len(), 8);
    engine.send("store 2 of 17-32 after 1");
    rig.expect("m", "1-32", &format!("known#0=2{}", strangers(7)));
    rig.finish();
}

fn strangers(count: usize) -> String {
    (0..count).map(|stranger| format!(" stranger-{stranger}#0=1")).collect()
}

/// The last message of all is lost in here, and nothing comes after it to show the gap.
#[test]
fn what_is_lost_last_is_known() {
    let mut rig = Rig::start(
        "kvEventsConfig: {queueBytes: 1MiB, limits: {payloadBytes: 1MiB}, replay: {heldBytes: 1MiB}}",
    );
    // Without a model everything waits, up to the limit.
    let mut engine = Engine::bind("no model");
    rig.register("a", &engine, None);
    let big = format!("store 1-2 of 1-32; store none of {}", "70000-199999");
    engine.send("store 1 of 1-16");
    for _ in 0..3 {
        engine.send(&big);
    }
    rig.counted("kv_events_dropped_total{reason=\"queue_full\"}", 1.0);
    let row = rig.state("a", PodState::Degraded);
    assert_eq!(row.seen_sequence, Some(3), "{row:?}");
    // A name for the model makes room, if not for the message that brings it.
    engine.topic = "kv@a@m".to_owned();
    engine.send("remove 99");
    rig.until("a", "settled", |row| row.applied_sequence >= Some(2));
    let last = engine.send("store 3 of 33-48 after 2");
    let row = rig.applied("a", last);
    assert!(row.reason.starts_with("gap of "), "{row:?}");
    assert_eq!(rig.depths("m", "1-48"), "a#0=3");
    rig.finish();
}

/// A flood that the lane cannot keep up with is lost knowingly, and found again with replay.
#[test]
fn a_flood_degrades_without_replay_and_heals_with_it() {
    for replay in [false, true] {
        let mut rig =
            Rig::start("kvEventsConfig: {queueBatches: 1, concurrency: 1, replay: {idleMs: 500}}");
        let mut engine = Engine::bind("kv@a@m");
        let router = replay.then(|| Router::of(&engine));
        rig.register("a", &engine, router.as_ref());
        engine.send("store 1 of 1-16");
        rig.expect("m", "1-16", "a#0=1");
        // Heavy batches: each takes the lane longer than the next one is on its way.
        let started = Instant::now();
        let dropped = "kv_events_dropped_total{reason=\"queue_full\"}";
        let mut blocks = 1;
        while rig.metric(dropped) == 0.0 {
            assert!(started.elapsed() < Duration::from_secs(20), "nothing was dropped");
            for _ in 0..64 {
                let first = blocks * 16 + 1;
                let last = blocks + 50;
                engine.send(&format!(
                    "store {}-{last} of {first}-{} after {blocks}",
                    blocks + 1,
                    last * 16,
                ));
                blocks = last;
            }
        }
        // Nothing more comes: what was lost last is known all the same.
        if replay {
            rig.applied("a", engine.next - 1);
            rig.state("a", PodState::Live);
            rig.expect("m", &format!("1-{}", blocks * 16), &format!("a#0={blocks}"));
        } else {
            let row = rig.state("a", PodState::Degraded);
            assert!(row.reason.contains("gap"), "{row:?}");
            assert!(row.seen_sequence >= row.applied_sequence);
            eventually("a clear gets through the flood", || {
                engine.send("clear");
                match rig.pod("a") {
                    row if row.blocks == 0 && row.state() == PodState::Live => Ok(()),
                    row => Err(format!("{row:?}")),
                }
            });
        }
        rig.finish();
    }
}
