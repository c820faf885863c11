//! The main job: recorded streams of real engines go over real sockets into the real `kv-indexer`,
//! and its answers equal what the engines' own caches held: every chain, every rank, every checkpoint.
//!
//! * `decode`: a decoder of its own, not the crate's
//! * `truth`: the recordings and what the engines said about their caches
//! * `model`: chains and expected depths by the definition, with tests that need no indexer
//! * `session`: registration, publishing, asking, comparing
//! * `fake`: a small indexer for testing the tests, with faults to plant

mod decode;
mod fake;
mod model;
mod model_tests;
mod session;
mod truth;

use kv_indexer::{loadgen::replay::Publisher, proto::kvindexer::PodState};

use crate::{
    streams::{
        fake::{Fake, Fault},
        session::{Expect, Session, Setup, Subject},
        truth::{BIG, Fixture},
    },
    support::Indexer,
};

/// Publishes every rank from its first batch to its last, and compares at every moment whose truth is
/// known.
fn whole_stream(session: &mut Session, subject: &Subject<'_>) {
    let expected = (Expect::Exactly, PodState::Live);
    for (at, rank) in subject.fixture.ranks.iter().enumerate() {
        let mut publisher = subject.publisher(at);
        subject.register(session, &mut publisher);
        let mut epoch = 0;
        for moment in &rank.moments {
            while publisher.position() < moment.published {
                publisher.publish_next().unwrap();
            }
            let now = session.wait_visible(&subject.pod, rank.stream.rank, moment.sequence, epoch);
            subject.compare(session, at, (&moment.label, &moment.cached), expected);
            if moment.restart_follows {
                publisher.restart().unwrap();
                subject.subscribed(&mut publisher);
                epoch = now;
                // The truth is silent until the end of the new life, by when a clear has hidden what
                // may be left of the old one; the events are not.
                let first = publisher.publish_next().unwrap().unwrap();
                let number = rank.stream.rank;
                session.wait_visible(&subject.pod, number, first.sequence, epoch);
                let counted = subject.counted(at, publisher.position());
                subject.compare(session, at, ("first batch", &counted), expected);
            }
        }
        subject.compare_status(session, at, PodState::Live);
    }
}

/// Every stream, each with its own pods and model; every second one with a replay socket, every third
/// one with the engine named.
fn each_stream(session: &mut Session, block_size: usize, fixtures: &[Fixture]) {
    for (at, fixture) in fixtures.iter().enumerate() {
        let setup = Setup { block_size, replay: at % 2 == 0, named: at % 3 == 0 };
        whole_stream(session, &Subject::new(fixture, setup, ""));
    }
}

/// Runs `test` against the real indexer, which must then be found right in at least so many answers.
fn on_indexer(block_size: usize, at_least: usize, test: impl FnOnce(&mut Session)) {
    let indexer = Indexer::start(&["--block-size", &block_size.to_string()]);
    let mut session = Session::connect(indexer.grpc);
    test(&mut session);
    session.finish(at_least, 5);
    indexer.finish();
}

fn check_small(block_size: usize) {
    on_indexer(block_size, 30_000, |session| {
        each_stream(session, block_size, &Fixture::small());
    });
}

fn check_big(block_size: usize) {
    on_indexer(block_size, 10_000, |session| {
        each_stream(session, block_size, &[Fixture::load(BIG)]);
    });
}

#[test]
fn every_answer_is_exact() {
    check_small(16);
}

#[test]
fn every_answer_is_exact_with_smaller_request_blocks() {
    check_small(8);
}

#[test]
fn every_answer_is_exact_with_larger_request_blocks() {
    check_small(64);
}

#[test]
fn every_answer_is_exact_with_the_real_servers_block_size() {
    check_small(32);
}

#[test]
fn every_answer_about_fifty_thousand_blocks_is_exact() {
    check_big(16);
}

#[test]
fn every_answer_about_fifty_thousand_blocks_is_exact_with_larger_request_blocks() {
    check_big(64);
}

/// The real server's stream with and without its replay socket, before and after it was killed.
#[test]
fn a_restarted_engine_begins_anew() {
    on_indexer(16, 500, restarted_engine);
}

fn restarted_engine(session: &mut Session) {
    let fixture = Fixture::load("vllm-0.32.0-serve/serve_int_lora_restart");
    for replay in [true, false] {
        let setup = Setup { block_size: 16, replay, named: false };
        let subject = Subject::new(&fixture, setup, &format!(" replay={replay}"));
        whole_stream(session, &subject);
        let status = session.status(&subject.pod, 0);
        assert_eq!(status.epoch, 2, "{status:?}");
    }
}

/// Where a late joiner begins: batches that it never saw, of the life that it joins.
fn lose(publisher: &mut Publisher, batches: std::ops::Range<usize>) {
    while publisher.position() < batches.end {
        if publisher.position() == batches.start && batches.start > 0 {
            publisher.restart().unwrap();
        }
        publisher.skip_next().unwrap();
    }
}

/// Joins each rank of a stream after part of it, and goes on to the end of that life.
fn late_join(session: &mut Session, fixture: &Fixture, replay: bool, life: usize) {
    for third in 1..=2 {
        let setup = Setup { block_size: 16, replay, named: false };
        let label = format!(" life={life} join={third}/3 replay={replay}");
        let subject = Subject::new(fixture, setup, &label);
        for (at, rank) in fixture.ranks.iter().enumerate() {
            let ends: Vec<_> = rank
                .moments
                .iter()
                .filter(|moment| moment.restart_follows || moment.label == "end")
                .collect();
            let end = ends[life];
            let start = life.checked_sub(1).map_or(0, |before| ends[before].published);
            let joined = start + (end.published - start) * third / 3;
            let mut publisher = subject.publisher(at);
            lose(&mut publisher, 0..start);
            lose(&mut publisher, start..joined);
            subject.register(session, &mut publisher);
            while publisher.position() < end.published {
                publisher.publish_next().unwrap();
            }
            session.wait_visible(&subject.pod, rank.stream.rank, end.sequence, 0);
            // A clear ends what was not known.
            let whole = replay || subject.clears(at, joined..end.published);
            let expected = match whole {
                true => (Expect::Exactly, PodState::Live),
                false => (Expect::AtMost, PodState::Partial),
            };
            subject.compare(session, at, (&end.label, &end.cached), expected);
        }
    }
}

fn late_joins(session: &mut Session, replay: bool) {
    for name in [
        "sglang-0.5.23/radix_default",
        "vllm-0.9.2/basic_builtin",
        "vllm-0.23.0/hybrid_int",
        "vllm-0.32.0/offload_placeholder",
        "vllm-0.33.0/basic_int_sha256",
        "vllm-0.33.0/extra_int",
        "vllm-0.33.0/hybrid_sparse_int",
    ] {
        late_join(session, &Fixture::load(name), replay, 0);
    }
    // The first life's replay is byte for byte the recorded one: `replay_tool` compares them.
    let serve = Fixture::load("vllm-0.32.0-serve/serve_int_lora_restart");
    late_join(session, &serve, replay, 0);
    late_join(session, &serve, replay, 1);
}

#[test]
fn a_late_joiner_is_exact_after_replay() {
    on_indexer(16, 1_000, |session| late_joins(session, true));
}

#[test]
fn a_late_joiner_without_replay_never_overstates() {
    on_indexer(16, 1_000, |session| late_joins(session, false));
}

/// Publishes streams of which every fifth batch is lost on the way, the last one excepted.
fn lossy(session: &mut Session, fixtures: &[Fixture]) {
    for fixture in fixtures {
        let setup = Setup { block_size: 16, replay: true, named: true };
        let subject = Subject::new(fixture, setup, "");
        for (at, rank) in fixture.ranks.iter().enumerate() {
            let mut publisher = subject.publisher(at);
            subject.register(session, &mut publisher);
            for moment in &rank.moments {
                while publisher.position() < moment.published {
                    let last = publisher.position() + 1 == moment.published;
                    if publisher.position() % 5 == 3 && !last {
                        publisher.skip_next().unwrap();
                    } else {
                        publisher.publish_next().unwrap();
                    }
                }
                session.wait_visible(&subject.pod, rank.stream.rank, moment.sequence, 0);
                let expected = (Expect::Exactly, PodState::Live);
                subject.compare(session, at, (&moment.label, &moment.cached), expected);
            }
        }
    }
}

#[test]
fn lost_batches_are_brought_back() {
    let mut fixtures = Fixture::small();
    fixtures.retain(|fixture| !fixture.name.contains("restart"));
    on_indexer(16, 10_000, |session| lossy(session, &fixtures));
}

// ---- the tests, tested -------------------------------------------------------------------------

fn wrong_answers(block_size: usize, fault: Fault, test: impl FnOnce(&mut Session)) -> usize {
    let fake = Fake::start(block_size, fault);
    let mut session = Session::connect(fake.grpc);
    test(&mut session);
    session.failures().len()
}

/// Nothing is found wrong with an indexer that does nothing wrong, and each planted fault is found.
#[test]
fn the_comparison_sees_what_it_should_see() {
    let faults = [
        (Fault::LosesRemovals, "vllm-0.33.0/basic_int_sha256"),
        (Fault::DoesNotCount, "vllm-0.33.0/basic_int_sha256"),
        (Fault::IgnoresWindows, "vllm-0.33.0/hybrid_sparse_int"),
        (Fault::IgnoresSalts, "sglang-0.5.23/radix_default"),
        (Fault::IgnoresRestarts, "vllm-0.32.0-serve/serve_int_lora_restart"),
    ];
    let fixtures = Fixture::small();
    for block_size in [16, 64] {
        let play = |session: &mut Session| each_stream(session, block_size, &fixtures);
        assert_eq!(wrong_answers(block_size, Fault::None, play), 0, "{block_size}");
    }
    for (fault, name) in faults {
        let fixtures = [Fixture::load(name)];
        for block_size in [8, 16] {
            let play = |session: &mut Session| each_stream(session, block_size, &fixtures);
            assert_ne!(wrong_answers(block_size, fault, play), 0, "{fault:?} {block_size}");
        }
    }
}

#[test]
fn joins_and_losses_are_played_as_they_should_be() {
    let fixture = Fixture::load("vllm-0.33.0/extra_int");
    let join = |session: &mut Session| late_join(session, &fixture, true, 0);
    assert_eq!(wrong_answers(16, Fault::None, join), 0);
    let serve = Fixture::load("vllm-0.32.0-serve/serve_int_lora_restart");
    let join_second_life = |session: &mut Session| late_join(session, &serve, true, 1);
    assert_eq!(wrong_answers(16, Fault::None, join_second_life), 0);
    let streams = [Fixture::load("vllm-0.23.0/basic_int")];
    assert_eq!(wrong_answers(16, Fault::None, |session| lossy(session, &streams)), 0);
    assert_ne!(wrong_answers(16, Fault::NeverReplays, |session| lossy(session, &streams)), 0);
}

/// The demo against the fake: every pod is played to its end, and the numbers are the indexer's.
#[test]
fn the_demo_shows_what_the_indexer_answers() {
    let fake = Fake::start(16, Fault::None);
    let demo = std::process::Command::new(env!("CARGO_BIN_EXE_loadgen"))
        .arg("demo")
        .arg(format!("--indexer=http://{}", fake.grpc))
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8(demo.stdout).unwrap(), String::from_utf8(demo.stderr).unwrap());
    assert!(demo.status.success(), "{out}{err}");
    println!("{out}");
    let row = |start: &[&str]| {
        let mut rows = out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.find(|row| row.starts_with(start)).is_some()
    };
    assert!(row(&["vllm-serve", "0", "live", "2", "37", "25"]), "{out}");
    assert!(row(&["vllm-ranks", "0", "live", "1", "26", "15"]), "{out}");
    assert!(row(&["vllm-ranks", "1", "live", "1", "26", "15"]), "{out}");
    assert!(row(&["vllm-serve", "0", "76"]), "freshness of every batch: {out}");
    assert!(row(&["vllm-ranks", "1", "27"]), "{out}");
    assert!(row(&["last", "of", "vllm-serve", "rank", "0"]), "{out}");
    assert!(row(&["first", "of", "vllm-ranks", "rank", "1"]), "{out}");
}
