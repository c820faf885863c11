//! Blocks whose parent is not known yet, over the wire.

use super::{engine::Engine, rig::Rig};

fn outcome(name: &str) -> String {
    format!("kv_events_orphan_blocks_total{{outcome=\"{name}\"}}")
}

#[test]
fn a_child_waits_for_its_parent() {
    let mut rig = Rig::start("");
    let mut engine = Engine::bind("kv@a@m");
    rig.register("a", &engine, None);
    engine.send("store 3-4 of 33-64 after 2");
    let last = engine.send("store 5 of 65-80 after 4");
    let row = rig.applied("a", last);
    assert_eq!((row.orphans, rig.depths("m", "1-80").as_str()), (3, ""), "{row:?}");
    // Not even by their own tokens.
    assert_eq!(rig.depths("m", "33-64"), "");
    engine.send("store 1-2 of 1-32");
    rig.expect("m", "1-80", "a#0=5");
    assert_eq!(rig.metric(&outcome("waiting")), 3.0);
    assert_eq!(rig.metric(&outcome("attached")), 3.0);
    rig.finish();
}

#[test]
fn a_removed_orphan_does_not_come_back() {
    let mut rig = Rig::start("");
    let mut engine = Engine::bind("kv@a@m");
    rig.register("a", &engine, None);
    engine.send("store 3-4 of 33-64 after 2");
    engine.send("remove 4");
    let last = engine.send("store 1-2 of 1-32");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-64"), "a#0=3");
    // Nor does one that was cleared.
    engine.send("store 8 of 65-80 after 7");
    engine.send("clear");
    let last = engine.send("store 7 of 1-16");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-16,65-80"), "a#0=1");
    rig.finish();
}

#[test]
fn an_orphan_that_waits_too_long_expires() {
    let mut rig = Rig::start("kvEventsConfig: {orphanTimeoutMs: 50}");
    let mut engine = Engine::bind("kv@a@m");
    rig.register("a", &engine, None);
    engine.send("store 3-4 of 33-64 after 2");
    rig.counted(&outcome("expired"), 2.0);
    let last = engine.send("store 1-2 of 1-32");
    rig.applied("a", last);
    assert_eq!(rig.depths("m", "1-64"), "a#0=2", "expired");
    // Announced again, it is there.
    engine.send("store 3-4 of 33-64 after 2");
    rig.expect("m", "1-64", "a#0=4");
    rig.finish();
}

#[test]
fn more_orphans_than_allowed_are_dropped_and_counted() {
    let mut rig = Rig::start("kvEventsConfig: {orphanBlocks: 4}");
    let mut engine = Engine::bind("kv@a@m");
    rig.register("a", &engine, None);
    for block in 0..10 {
        let first = 1000 + block * 16;
        engine.send(&format!("store {} of {first}-{} after 99", 10 + block, first + 15));
    }
    rig.applied("a", 9);
    assert_eq!(rig.metric(&outcome("dropped")), 6.0);
    rig.finish();
}
