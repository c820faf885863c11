//! Every index against the oracle: random event streams, serial and concurrent.
//!
//! `suite!` gives an index the whole suite. The streams follow from `SEED` (a number, 1 by default),
//! so that a failure comes again; a failing stream is shrunk and printed. Few of them are played here,
//! without optimization; `tests/soak` plays them optimized, `PROPTEST_CASES` times:
//! `SEED=$RANDOM PROPTEST_CASES=20000 cargo test --manifest-path tests/soak/Cargo.toml`.

mod lanes;
mod world;

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use kv_indexer::{
    hash::{Algorithm, Scheme},
    index::{
        Anchors, BlockIndex, ImageError, IndexConfig, Match, PodSpec, RowImage, naive::NaiveIndex,
        runs::RunIndex,
    },
    model::{CountMode, PodSlot, RequestKey},
};
use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};

use self::world::{Op, Sizes, World, ops, ops_beside};

fn config() -> IndexConfig {
    IndexConfig { speculative_weight: 0.9, orphan_blocks: 40, ..IndexConfig::default() }
}

fn spec(sizes: Sizes) -> PodSpec {
    PodSpec {
        scheme: Arc::new(Scheme::new(Algorithm::Xxh3, "seed", sizes.request)),
        model: Arc::from("m"),
        count_mode: CountMode::Counted,
    }
}

fn look(index: &dyn BlockIndex, keys: &[RequestKey]) -> Vec<Match> {
    let mut out = Vec::new();
    index.lookup(keys, true, &mut out);
    for found in &mut out {
        // Sums of weights are compared, not their rounding.
        found.score = (found.score * 1e6).round() / 1e6;
    }
    out
}

/// Compares everything that the trait tells, for every chain that the stream ever named.
fn compare(subject: &dyn BlockIndex, oracle: &dyn BlockIndex, world: &World) -> Result<(), String> {
    compare_some(subject, oracle, world, 0, 1)
}

/// Compares everything that the trait tells, for every `step`th chain from `first` on.
fn compare_some(
    subject: &dyn BlockIndex,
    oracle: &dyn BlockIndex,
    world: &World,
    first: usize,
    step: usize,
) -> Result<(), String> {
    for keys in world.queries().skip(first % step).step_by(step) {
        let (got, want) = (look(subject, keys), look(oracle, keys));
        if got != want {
            return Err(format!("lookup of {} keys:\n got {got:?}\nwant {want:?}", keys.len()));
        }
        for (block, &key) in keys.iter().enumerate() {
            let (got, want) = (subject.holders(keys, block), oracle.holders(keys, block));
            if got != want {
                return Err(format!("holders of {key:?}: got {got:?}, want {want:?}"));
            }
            for slot in world.slots() {
                let (got, want) = (subject.removed_at(slot, key), oracle.removed_at(slot, key));
                if got != want {
                    return Err(format!("removal of {key:?}: got {got:?}, want {want:?}"));
                }
            }
        }
    }
    for slot in world.slots() {
        let (got, want) = (subject.pod_usage(slot), oracle.pod_usage(slot));
        let told = |usage: &kv_indexer::index::PodUsage| {
            (
                (usage.blocks, usage.blocks_by_tier.clone(), usage.repeated),
                (usage.orphans, usage.hybrid_unsupported, usage.unconfirmed),
            )
        };
        if told(&got) != told(&want) {
            return Err(format!("usage of {slot:?}: got {:?}, want {:?}", told(&got), told(&want)));
        }
    }
    Ok(())
}

/// Applies a stream to both and compares after every operation.
fn serial(subject: &dyn BlockIndex, sizes: Sizes, ops: &[Op]) -> Result<(), String> {
    let oracle = NaiveIndex::new(config());
    let mut world = World::new(sizes, world::PODS);
    for pod in 0..world::PODS {
        let (a, b) = (subject.register(spec(sizes)), oracle.register(spec(sizes)));
        assert_eq!(a, b, "both give out the lowest free slot");
        world.add(pod, a.unwrap());
    }
    count(ops.len());
    for (at, op) in ops.iter().enumerate() {
        let event = world.event(op);
        let (got, want) = (world.apply(subject, &event), world.apply(&oracle, &event));
        if got != want {
            return Err(format!("op {at} {op:?}: outcome {got:?}, want {want:?}"));
        }
        compare(subject, &oracle, &world).map_err(|why| format!("after op {at} {op:?}: {why}"))?;
    }
    for slot in world.slots() {
        subject.unregister(slot);
        oracle.unregister(slot);
    }
    compare(subject, &oracle, &world).map_err(|why| format!("after unregistration: {why}"))?;
    if subject.usage().keys != 0 {
        return Err(format!("{} keys left without pods", subject.usage().keys));
    }
    Ok(())
}

/// Events applied to a subject so far, by all tests of this process.
static EVENTS: AtomicU64 = AtomicU64::new(0);

fn count(events: usize) {
    EVENTS.fetch_add(events as u64, Ordering::Relaxed);
}

/// Tells the user how many events a test applied, whether or not its output is captured.
fn report(test: &str, before: u64, more: &str) {
    let total = EVENTS.load(Ordering::Relaxed);
    let line = format!("differential {test}: events={} of {total} so far{more}\n", total - before);
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// A runner of `cases` cases, or of a `share`th of `PROPTEST_CASES`, whose streams follow from `SEED`.
fn runner(cases: u32, share: u32, max_shrink_iters: u32) -> TestRunner {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u32>().unwrap());
    let config = ProptestConfig {
        cases: number("PROPTEST_CASES").map_or(cases, |soak| (soak / share).max(1)),
        failure_persistence: None,
        max_shrink_iters,
        ..ProptestConfig::default()
    };
    let mut seed = [0; 32];
    seed[..4].copy_from_slice(&number("SEED").unwrap_or(1).to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed))
}

/// Runs random streams; returns the shrunk failure, if any.
fn check(make: &dyn Fn() -> Box<dyn BlockIndex>, cases: u32) -> Result<(), String> {
    let before = EVENTS.load(Ordering::Relaxed);
    let mut runner = runner(cases, 1, 4096);
    let streams = (world::sizes(), ops(48, world::PODS));
    let result = runner
        .run(&streams, |(sizes, ops)| serial(&*make(), sizes, &ops).map_err(TestCaseError::fail));
    report("serial", before, "");
    result.map_err(|failure| failure.to_string())
}

/// Each pod's stream on a thread of its own, with readers beside them; exact at the end.
fn concurrent(make: &dyn Fn() -> Box<dyn BlockIndex>, cases: u32) -> Result<(), String> {
    let mut runner = runner(cases, 12, 0);
    let streams = (world::sizes(), ops_beside(400, world::PODS));
    let result = runner.run(&streams, |(sizes, ops)| {
        let subject = make();
        let oracle = NaiveIndex::new(config());
        let mut world = World::new(sizes, world::PODS);
        for pod in 0..world::PODS {
            world.add(pod, subject.register(spec(sizes)).unwrap());
            oracle.register(spec(sizes)).unwrap();
        }
        // One more pod that nothing is applied to while the others change: exact throughout.
        let idle = subject.register(spec(sizes)).unwrap();
        assert_eq!(oracle.register(spec(sizes)), Some(idle));
        let full = world.full_store(5);
        world.apply_at(&*subject, idle, &full);
        world.apply_at(&oracle, idle, &full);
        let mut lanes: Vec<Vec<world::Event>> = vec![Vec::new(); world::PODS];
        count(ops.len());
        for op in &ops {
            let event = world.event(op);
            world.apply(&oracle, &event);
            lanes[event.pod].push(event);
        }
        let stop = AtomicBool::new(false);
        let (subject, world, stop) = (&*subject, &world, &stop);
        let keys = world.full_keys(5);
        let steady = std::thread::scope(|scope| {
            let writers: Vec<_> = lanes
                .iter()
                .map(|lane| {
                    scope.spawn(move || {
                        for event in lane {
                            world.apply(subject, event);
                        }
                    })
                })
                .collect();
            let reader = scope.spawn(move || {
                let mut calls = 0u64;
                while calls < 10 || !stop.load(Ordering::Relaxed) {
                    let found = look(subject, &keys);
                    let own = found.iter().find(|found| found.slot == idle);
                    if own.is_none_or(|own| own.confirmed as usize != keys.len()) {
                        return Err(format!("the idle pod changed: {own:?}"));
                    }
                    calls += 1;
                }
                Ok(())
            });
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            stop.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        steady.and_then(|()| compare(subject, &oracle, world)).map_err(TestCaseError::fail)
    });
    result.map_err(|failure| failure.to_string())
}

/// Exports the rows at different moments of a stream, restores them all into an empty index, and
/// goes on: each row must be what it was at its moment, and change as the oracle's does.
fn moved(make: &dyn Fn() -> Box<dyn BlockIndex>, cases: u32) -> Result<(), String> {
    let mut runner = runner(cases, 1, 4096);
    let streams = (world::sizes(), ops(60, world::PODS), 0..40usize, 0..40usize);
    let result = runner.run(&streams, |(sizes, ops, first, step)| {
        let (subject, oracle) = (make(), NaiveIndex::new(config()));
        let (new_subject, new_oracle) = (make(), NaiveIndex::new(config()));
        let mut world = World::new(sizes, world::PODS);
        for pod in 0..world::PODS {
            for index in [&*subject, &oracle, &*new_subject, &new_oracle as &dyn BlockIndex] {
                world.add(pod, index.register(spec(sizes)).unwrap());
            }
        }
        let slots: Vec<PodSlot> = world.slots().collect();
        let mut images = Vec::new();
        for (at, op) in ops.iter().enumerate() {
            while images.len() < slots.len() && at >= first + step % 7 * images.len() {
                let slot = slots[images.len()];
                images.push((subject.export(slot).unwrap(), oracle.export(slot).unwrap()));
            }
            let event = world.event(op);
            world.apply(&*subject, &event);
            world.apply(&oracle, &event);
        }
        while images.len() < slots.len() {
            let slot = slots[images.len()];
            images.push((subject.export(slot).unwrap(), oracle.export(slot).unwrap()));
        }
        let mut anchors = Anchors::default();
        for (image, _) in &images {
            image.encode(80, |part| anchors.note(part)).unwrap();
        }
        for (&slot, (image, truth)) in slots.iter().zip(&images) {
            let image = world::through_bytes(image);
            new_subject.restore(slot, &image, &mut anchors).unwrap();
            new_oracle.restore(slot, truth, &mut Anchors::default()).unwrap();
        }
        let agree = |what: &str, world: &World| {
            compare(&*new_subject, &new_oracle, world)
                .map_err(|why| TestCaseError::fail(format!("{what}: {why}")))
        };
        agree("restored", &world)?;
        for op in &ops {
            let event = world.event(op);
            world.apply(&*new_subject, &event);
            world.apply(&new_oracle, &event);
            agree(&format!("after {op:?}"), &world)?;
        }
        for slot in slots {
            new_subject.unregister(slot);
        }
        match new_subject.usage().keys {
            0 => Ok(()),
            left => Err(TestCaseError::fail(format!("{left} keys left without pods"))),
        }
    });
    result.map_err(|failure| failure.to_string())
}

macro_rules! suite {
    ($name:ident, $make:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn agrees_with_the_oracle_serially() {
                check(&|| Box::new($make), 96).unwrap();
            }

            #[test]
            fn agrees_with_the_oracle_concurrently() {
                concurrent(&|| Box::new($make), 8).unwrap();
            }

            #[test]
            fn agrees_with_the_oracle_on_lanes() {
                for lanes in [1, 2, 4] {
                    let name = format!("{} on {lanes} lanes", stringify!($name));
                    lanes::check(&name, &|| Box::new($make), lanes, 16).unwrap();
                }
            }

            #[test]
            fn goes_on_from_images() {
                moved(&|| Box::new($make), 64).unwrap();
            }

            #[test]
            fn rejoining_suffix_is_not_credited() {
                // W0 holds [A], W1 holds [X, B]: for [A, B] neither holds B.
                world::rejoining_suffix(&$make);
            }
        }
    };
}

suite!(runs, RunIndex::new(config()));
suite!(naive, NaiveIndex::new(config()));

/// An index with a bug, to show that the suite sees it.
#[derive(Debug)]
struct Broken {
    inner: RunIndex,
    bug: Bug,
    removals: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
enum Bug {
    DropsEveryFifthRemoval,
    CreditsRejoiningSuffix,
    KeepsBlocksOverClear,
    IgnoresGroups,
    ForgetsTheSecondCopy,
    ForgetsExtras,
    ForgetsConfirmations,
}

impl BlockIndex for Broken {
    fn register(&self, spec: PodSpec) -> Option<PodSlot> {
        self.inner.register(spec)
    }
    fn respec(&self, slot: PodSlot, spec: PodSpec) {
        self.inner.respec(slot, spec);
    }
    fn unregister(&self, slot: PodSlot) {
        self.inner.unregister(slot);
    }
    fn store(
        &self,
        slot: PodSlot,
        store: &kv_indexer::index::Store<'_>,
    ) -> kv_indexer::index::StoreOutcome {
        let mut store = *store;
        match self.bug {
            Bug::IgnoresGroups => (store.group, store.kind) = (None, None),
            Bug::ForgetsExtras => store.extras = kv_indexer::index::Extras::default(),
            _ => {}
        }
        self.inner.store(slot, &store)
    }
    fn remove(&self, slot: PodSlot, remove: &kv_indexer::index::Remove<'_>) {
        let count = self.removals.fetch_add(1, Ordering::Relaxed);
        let mut remove = *remove;
        match self.bug {
            Bug::DropsEveryFifthRemoval if count % 5 == 4 => return,
            Bug::IgnoresGroups => remove.group = None,
            Bug::ForgetsTheSecondCopy => self.inner.remove(slot, &remove),
            _ => {}
        }
        self.inner.remove(slot, &remove);
    }
    fn clear(&self, slot: PodSlot) {
        if !matches!(self.bug, Bug::KeepsBlocksOverClear) {
            self.inner.clear(slot);
        }
    }
    fn set_count_mode(&self, slot: PodSlot, mode: CountMode) {
        self.inner.set_count_mode(slot, mode);
    }
    fn set_muted(&self, slot: PodSlot, muted: bool) {
        self.inner.set_muted(slot, muted);
    }
    fn expire_orphans(&self, slot: PodSlot, before: std::time::Instant) -> usize {
        self.inner.expire_orphans(slot, before)
    }
    fn speculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        self.inner.speculate(slot, keys, mark);
    }
    fn unspeculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        self.inner.unspeculate(slot, keys, mark);
    }
    fn lookup(&self, keys: &[RequestKey], tiers: bool, out: &mut Vec<Match>) {
        self.inner.lookup(keys, tiers, out);
        if matches!(self.bug, Bug::CreditsRejoiningSuffix) {
            for found in out {
                let next = found.depth as usize + 1;
                if self.inner.holders(keys, next).contains(&found.slot) {
                    found.depth += 2;
                    found.confirmed += 2;
                }
            }
        }
    }
    fn holders(&self, keys: &[RequestKey], block: usize) -> Vec<PodSlot> {
        self.inner.holders(keys, block)
    }
    fn export(&self, slot: PodSlot) -> Option<RowImage> {
        self.inner.export(slot)
    }
    fn restore(
        &self,
        slot: PodSlot,
        image: &RowImage,
        anchors: &mut Anchors,
    ) -> Result<(), ImageError> {
        self.inner.restore(slot, image, anchors)
    }
    fn removed_at(&self, slot: PodSlot, key: RequestKey) -> Option<u64> {
        self.inner.removed_at(slot, key)
    }
    fn doubt(&self, slot: PodSlot) -> u64 {
        self.inner.doubt(slot)
    }
    fn drop_unconfirmed(&self, slot: PodSlot, doubt: u64) -> kv_indexer::index::Dropped {
        self.inner.drop_unconfirmed(slot, doubt)
    }
    fn confirm(&self, slot: PodSlot, keys: &[RequestKey]) {
        if !matches!(self.bug, Bug::ForgetsConfirmations) {
            self.inner.confirm(slot, keys);
        }
    }
    fn pod_usage(&self, slot: PodSlot) -> kv_indexer::index::PodUsage {
        self.inner.pod_usage(slot)
    }
    fn usage(&self) -> kv_indexer::index::IndexUsage {
        self.inner.usage()
    }
}

#[test]
fn suite_sees_planted_bugs() {
    for bug in [
        Bug::DropsEveryFifthRemoval,
        Bug::CreditsRejoiningSuffix,
        Bug::KeepsBlocksOverClear,
        Bug::IgnoresGroups,
        Bug::ForgetsTheSecondCopy,
        Bug::ForgetsExtras,
        Bug::ForgetsConfirmations,
    ] {
        let make = || -> Box<dyn BlockIndex> {
            Box::new(Broken { inner: RunIndex::new(config()), bug, removals: AtomicU64::new(0) })
        };
        assert!(check(&make, 400).is_err(), "{bug:?} went unseen");
    }
}
