//! Hybrid attention, and streams that are decoded but must not be scored.

use kv_indexer::proto::kvindexer::PodState;

use super::{
    conformance::check,
    engine::Engine,
    rig::{Query, Rig},
};
use crate::support::eventually;

/// C65 to C69, with the difference that sliding windows are scored.
#[test]
fn attention_groups() {
    check(
        "tokenProcessorConfig: {blockSizeTokens: 16}",
        &[
            ("full", "a> store 1-4 of 1-64 group 0 kind full_attention\n? 1-64 => a=4"),
            ("mla", "a> store 1-4 of 1-64 group 0 kind mla_attention\n? 1-64 => a=4"),
            ("sink", "a> store 1-4 of 1-64 group 0 kind sink_full_attention\n? 1-64 => a=4"),
            // llm-d rejects a group without kind; here it is full attention.
            ("none", "a> store 1-4 of 1-64 group 0\n? 1-64 => a=4"),
            (
                "C68",
                "a> store 1-4 of 1-64 group 0 kind full_attention; store 1-4 of 1-64 group 1 kind full_attention\n? 1-64 => a=4\na> remove 4 group 0\n? 1-64 => a=3\na> remove 4 group 1; store 4 of 49-64 after 3 group 0 kind full_attention\n? 1-64 => a=3",
            ),
            // Both must hold the prefix: the window only its end.
            (
                "C69",
                "a> store 1-4 of 1-64 group 0 kind full_attention; store 1-4 of 1-64 group 1 kind sliding_window window 17\n? 1-64 => a=4\na> remove 1-3 group 1\n? 1-64 => a=4\na> remove 4 group 1\n? 1-64 =>",
            ),
            // Sparse stores of a window are placed by the same keys in the full group.
            (
                "sparse",
                "a> store 1-4 of 1-64 group 0 kind full_attention; store 3-4 of 1-64 group 1 kind sliding_window window 33\n? 1-64 => a=4\n? 1-48 => \na> remove 3 group 1\n? 1-64 =>",
            ),
            // A remove of an unknown group touches nothing.
            (
                "C67",
                "a> store 1-4 of 1-64 group 0 kind full_attention; remove 1-4 group 5\n? 1-64 => a=4",
            ),
            (
                "mamba",
                "a> store 1-4 of 1-64 group 0 kind full_attention; store 9 of 1-64 by 64 group 1 kind mamba\n? 1-64 => a=4",
            ),
        ],
    );
}

#[test]
fn kinds_that_are_not_scored_are_flagged() {
    let mut rig = Rig::start("");
    let mut engine = Engine::bind("kv@a@m");
    rig.register("a", &engine, None);
    engine.send("store 1-4 of 1-64 group 0 kind full_attention");
    let query = Query::new("m", "1-64");
    rig.expect("m", "1-64", "a#0=4");
    let before = rig.findings(&query, "a");
    let last = engine.send("store 8-9 of 1-64 by 32 group 1 kind mamba");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-64"), "a#0=4", "the depth of full attention is answered");
    let after = rig.findings(&query, "a");
    assert_ne!(before, after);
    assert!(after.contains("hybrid") || after.contains("attention"), "{after}");
    rig.finish();
}

#[test]
fn a_pod_without_a_model_is_warned_about_and_not_indexed() {
    let mut rig = Rig::start("");
    let mut engine = Engine::bind("no model here");
    rig.register("a", &engine, None);
    engine.send("store 1-4 of 1-64");
    engine.send("store 5 of 65-80 after 4");
    let row = rig.until("a", "heard", |row| row.seen_sequence == Some(1));
    assert_eq!((row.model.as_str(), row.blocks), ("", 0), "{row:?}");
    eventually("a reason", || match rig.pod("a").reason {
        reason if reason.contains("no model") => Ok(()),
        reason => Err(reason),
    });
    // When a model becomes known after all, what waited is there.
    engine.topic = "kv@a@m".to_owned();
    engine.send("store 6 of 81-96 after 5");
    rig.expect("m", "1-96", "a#0=6");
    let log = rig.finish();
    assert_eq!(log.matches("no model is known").count(), 1, "{log}");
}

#[test]
fn engines_that_do_not_chain_are_not_indexed_unless_trusted() {
    let engines = ["a", "b", "c"].map(|pod| Engine::bind(&format!("kv@{pod}@m")));
    let [mut old, mut trusted, mut new] = engines;
    let mut rig = Rig::start(&format!(
        "readyTimeoutMs: 0\npods:\n\
         - {{id: a, endpoint: '{}', engine: sglang, engineVersion: 0.5.6.post2}}\n\
         - {{id: b, endpoint: '{}', engine: sglang, engineVersion: 0.5.6, trustUnchained: true}}\n\
         - {{id: c, endpoint: '{}', engine: sglang, engineVersion: 0.5.7}}\n",
        old.endpoint, trusted.endpoint, new.endpoint,
    ));
    for engine in [&mut old, &mut trusted, &mut new] {
        engine.subscribed();
        engine.send("store 1-4 of 1-64");
    }
    for pod in ["a", "b", "c"] {
        rig.applied(pod, 0);
    }
    assert_eq!(rig.depths("m", "1-64"), "b#0=4 c#0=4");
    let row = rig.pod("a");
    assert!(row.may_undercount && row.reason.contains("chain"), "{row:?}");
    rig.finish();
}

#[test]
fn keys_that_are_used_again_for_other_tokens_mute_the_pod() {
    let mut rig = Rig::start("");
    let mut engine = Engine::bind("kv@a@m");
    let mut other = Engine::bind("kv@b@m");
    rig.register("a", &engine, None);
    rig.register("b", &other, None);
    engine.send("store 1-4 of 1-64");
    other.send("store 1-4 of 1-64");
    rig.expect("m", "1-64", "a#0=4 b#0=4");
    // One engine key, another prefix, again and again.
    for round in 1..=10 {
        engine.send(&format!("store 1 of {}-{}", round * 100 + 1, round * 100 + 16));
    }
    rig.applied("a", 10);
    assert_eq!(rig.depths("m", "1-64"), "b#0=4");
    assert_eq!(rig.depths("m", "1001-1016"), "");
    let row = rig.pod("a");
    assert_eq!(row.state(), PodState::Degraded);
    assert!(row.reason.contains("unchained"), "{row:?}");
    assert!(rig.metric("kv_events_conflicting_stores_total") >= 8.0);
    // A new life gets a new chance.
    engine.restart();
    engine.subscribed();
    engine.send("store 1-4 of 1-64");
    rig.expect("m", "1-64", "a#0=4 b#0=4");
    assert_eq!(rig.pod("a").state(), PodState::Live);
    rig.finish();
}
