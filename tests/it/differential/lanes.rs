//! Rows written by several threads, as ingest's lanes do, with readers beside them.
//!
//! A stream is cut into rounds. In each the oracle goes first and notes what every row has to answer
//! after each of its events. Then as many threads as there are lanes apply the same events, each to
//! its own rows, in order, while readers ask. Between rounds nothing runs, and everything is compared.
//!
//! A reader knows how many events of a row were applied before it asked and how many were begun when it
//! had its answer. If these are equal, the row's answer has to be the oracle's, of which the past life
//! of a cleared row is no part. Otherwise ("Reads beside writes") the last block that it credits was
//! held at some time in between; and where no window asks for more than that, what was held all the time
//! is credited.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    thread,
};

use kv_indexer::{
    index::{BlockIndex, IndexConfig, Match, StoreOutcome, naive::NaiveIndex, runs::RunIndex},
    model::RequestKey,
};
use proptest::test_runner::TestCaseError;

use super::{
    EVENTS, Sizes, World, compare, compare_some, config, count, look, report, runner, spec,
    world::{self, Event, Op},
};

const PODS: usize = 6;
const READERS: usize = 2;
/// Events between two barriers.
const ROUND: usize = 96;
/// Chains that readers ask for in a round.
const QUERIES: usize = 2;

static EXACT: AtomicU64 = AtomicU64::new(0);
static BESIDE: AtomicU64 = AtomicU64::new(0);

/// What a row answers to one chain after each number of its events of the round.
#[derive(Debug, Default)]
struct History {
    answers: Vec<Option<Match>>,
    /// Bits of the blocks that it holds.
    held: Vec<u64>,
    /// Does the event that led there name a key twice? Then what it says first is held for a moment
    /// only, which no number of events shows.
    fleeting: Vec<bool>,
}

/// How many events of a row were begun, and how many are applied.
#[derive(Debug, Default)]
struct Progress {
    begun: AtomicUsize,
    done: AtomicUsize,
}

impl History {
    /// Is this an answer of the row, if it was asked when `done` events were applied and answered when
    /// `begun` were begun?
    fn allows(
        &self,
        found: Option<&Match>,
        done: usize,
        begun: usize,
        windows: bool,
    ) -> Result<(), String> {
        if done == begun {
            EXACT.fetch_add(1, Ordering::Relaxed);
            let want = self.answers[done].as_ref();
            return if found == want {
                Ok(())
            } else {
                Err(format!("at rest after {done} events: got {found:?}, want {want:?}"))
            };
        }
        BESIDE.fetch_add(1, Ordering::Relaxed);
        let depth = found.map_or(0, |found| found.confirmed);
        let ever = self.held[done..=begun].iter().fold(0, |ever, held| ever | held);
        let fleeting = self.fleeting[done + 1..=begun].contains(&true);
        if depth > 0 && ever >> (depth - 1) & 1 == 0 && !fleeting {
            return Err(format!("events {done} to {begun}: {depth} blocks, held ever {ever:b}"));
        }
        let confirmed = |answer: &Option<Match>| answer.as_ref().map_or(0, |found| found.confirmed);
        let always = self.answers[done..=begun].iter().map(confirmed).min().unwrap_or(0);
        if !windows && depth < always {
            return Err(format!("events {done} to {begun}: {depth} blocks, held always {always}"));
        }
        Ok(())
    }
}

/// Notes what the oracle says of a pod.
fn note(
    oracle: &dyn BlockIndex,
    world: &World,
    pod: usize,
    queries: &[Vec<RequestKey>],
    histories: &mut [History],
    fleeting: bool,
) {
    let slot = world.slot(pod);
    for (keys, history) in queries.iter().zip(histories) {
        let found = look(oracle, keys).into_iter().find(|found| found.slot == slot);
        let held = (0..keys.len().min(64))
            .filter(|&block| oracle.holders(keys, block).contains(&slot))
            .fold(0, |held, block| held | 1 << block);
        history.answers.push(found);
        history.held.push(held);
        history.fleeting.push(fleeting);
    }
}

/// Applies the events of a round on as many threads as there are streams, with readers beside them.
fn apply(
    subject: &dyn BlockIndex,
    world: &World,
    streams: &[Vec<Event>],
    queries: &[Vec<RequestKey>],
    histories: &[Vec<History>],
) -> Result<(), String> {
    let progress: Vec<Progress> = (0..PODS).map(|_| Progress::default()).collect();
    let (progress, stop) = (&*progress, &AtomicBool::new(false));
    let read = |reader: usize| {
        let mut calls = reader;
        while calls < 4 + reader || !stop.load(Ordering::Acquire) {
            calls += 1;
            let query = calls % queries.len();
            let done: Vec<usize> =
                progress.iter().map(|row| row.done.load(Ordering::SeqCst)).collect();
            let found = look(subject, &queries[query]);
            for (pod, &done) in done.iter().enumerate() {
                let begun = progress[pod].begun.load(Ordering::SeqCst);
                let slot = world.slot(pod);
                let own = found.iter().find(|found| found.slot == slot);
                histories[pod][query].allows(own, done, begun, world.has_windows()).map_err(
                    |why| {
                        let own = streams.iter().flatten().filter(|event| event.pod == pod);
                        let events: Vec<_> = own.skip(done).take(begun - done).collect();
                        format!("{slot:?} beside writers: {why}; {events:?}")
                    },
                )?;
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let writers: Vec<_> = streams
            .iter()
            .map(|stream| {
                scope.spawn(move || {
                    for event in stream {
                        let row = &progress[event.pod];
                        row.begun.fetch_add(1, Ordering::SeqCst);
                        world.apply(subject, event);
                        row.done.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let readers: Vec<_> =
            (0..READERS).map(|reader| scope.spawn(move || read(reader))).collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        stop.store(true, Ordering::Release);
        readers.into_iter().try_for_each(|reader| reader.join().unwrap())
    })
}

/// Plays a stream in rounds; see the module's documentation.
fn play(subject: &dyn BlockIndex, lanes: usize, sizes: Sizes, ops: &[Op]) -> Result<(), String> {
    let oracle = NaiveIndex::new(config());
    let mut world = World::new(sizes, PODS);
    if ops.len().is_multiple_of(2) {
        world.without_windows();
    }
    for pod in 0..PODS {
        let slot = subject.register(spec(sizes)).unwrap();
        assert_eq!(oracle.register(spec(sizes)), Some(slot));
        world.add(pod, slot);
    }
    for (round, ops) in ops.chunks(ROUND).enumerate() {
        // Between rounds a row goes and another takes its slot, or it becomes another where it is.
        let pod = round % PODS;
        match round % 3 {
            1 => {
                subject.unregister(world.slot(pod));
                oracle.unregister(world.slot(pod));
                let slot = subject.register(spec(sizes)).unwrap();
                assert_eq!(oracle.register(spec(sizes)), Some(slot));
                world.add(pod, slot);
                world.forget(pod);
            }
            2 => {
                subject.respec(world.slot(pod), spec(sizes));
                oracle.respec(world.slot(pod), spec(sizes));
                world.forget(pod);
            }
            _ => {}
        }
        let events: Vec<Event> = ops.iter().map(|op| world.event(op)).collect();
        let known = world.queries().count().max(1);
        let queries: Vec<Vec<RequestKey>> = (0..QUERIES)
            .filter_map(|at| world.queries().nth((round * 7 + at * 5) % known).cloned())
            .collect();
        let mut histories: Vec<Vec<History>> =
            (0..PODS).map(|_| queries.iter().map(|_| History::default()).collect()).collect();
        for (pod, histories) in histories.iter_mut().enumerate() {
            note(&oracle, &world, pod, &queries, histories, false);
        }
        let mut streams = vec![Vec::new(); lanes];
        for event in events {
            world.apply(&oracle, &event);
            let histories = &mut histories[event.pod];
            note(&oracle, &world, event.pod, &queries, histories, event.names_a_key_twice());
            streams[event.pod % lanes].push(event);
        }
        count(ops.len());
        if queries.is_empty() {
            for event in streams.iter().flatten() {
                world.apply(subject, event);
            }
        } else {
            apply(subject, &world, &streams, &queries, &histories)?;
        }
        compare_some(subject, &oracle, &world, round, 5)
            .map_err(|why| format!("after round {round}: {why}"))?;
    }
    compare(subject, &oracle, &world)?;
    world.slots().for_each(|slot| subject.unregister(slot));
    match subject.usage().keys {
        0 => Ok(()),
        left => Err(format!("{left} keys left without pods")),
    }
}

/// Plays random streams on so many lanes.
pub(super) fn check(
    name: &str,
    make: &dyn Fn() -> Box<dyn BlockIndex>,
    lanes: usize,
    cases: u32,
) -> Result<(), String> {
    let before = EVENTS.load(Ordering::Relaxed);
    let streams = (world::sizes(), world::ops_beside(600, PODS));
    let result = runner(cases, 4, 0).run(&streams, |(sizes, ops)| {
        play(&*make(), lanes, sizes, &ops).map_err(TestCaseError::fail)
    });
    let (exact, beside) = (EXACT.load(Ordering::Relaxed), BESIDE.load(Ordering::Relaxed));
    report(name, before, &format!("; answers of rows checked: {exact} at rest, {beside} beside"));
    result.map_err(|failure| failure.to_string())
}

/// A store that is refused at the cap has no effect at all, and the rest goes on as without a cap.
#[test]
fn agrees_with_the_oracle_at_the_cap() {
    let before = EVENTS.load(Ordering::Relaxed);
    let (refused, applied) = (AtomicU64::new(0), AtomicU64::new(0));
    let streams = (world::sizes(), world::ops_beside(200, world::PODS));
    let result = runner(48, 2, 0).run(&streams, |(sizes, ops)| {
        let cap_bytes = CAP >> (ops.len() % 3);
        let subject = RunIndex::new(IndexConfig { cap_bytes, ..config() });
        let oracle = NaiveIndex::new(config());
        let mut world = World::new(sizes, world::PODS);
        for pod in 0..world::PODS {
            world.add(pod, subject.register(spec(sizes)).unwrap());
            oracle.register(spec(sizes)).unwrap();
        }
        count(ops.len());
        for (at, op) in ops.iter().enumerate() {
            let event = world.event(op);
            let got = world.apply(&subject, &event);
            if got.refused > 0 {
                refused.fetch_add(1, Ordering::Relaxed);
                assert_eq!(got, StoreOutcome { refused: got.refused, ..StoreOutcome::default() });
            } else {
                applied.fetch_add(1, Ordering::Relaxed);
                assert_eq!(got, world.apply(&oracle, &event), "op {at} {op:?}");
            }
            if at % 16 == 15 {
                compare_some(&subject, &oracle, &world, at, 3).map_err(TestCaseError::fail)?;
            }
        }
        compare(&subject, &oracle, &world).map_err(TestCaseError::fail)
    });
    let (refused, applied) = (refused.into_inner(), applied.into_inner());
    report("cap", before, &format!("; {refused} stores refused"));
    result.unwrap();
    assert!(refused > 100 && applied > 100, "{refused} refused, {applied} applied");
}

/// Bytes that many of the streams do not fill; a quarter of them nearly all do.
const CAP: u64 = 16 << 10;
