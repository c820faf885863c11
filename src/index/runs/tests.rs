//! Long chains, many rows: what the differential suite's small world does not reach.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use proptest::prelude::*;

use super::*;
use crate::{
    hash::{Algorithm, Prompt, Scheme},
    model::{EngineKey, GroupKind},
};

const SIZE: u32 = 1;

fn spec() -> PodSpec {
    PodSpec {
        scheme: Arc::new(Scheme::new(Algorithm::Xxh3, "", SIZE)),
        model: Arc::from("m"),
        count_mode: CountMode::Counted,
    }
}

fn store<'a>(keys: &'a [EngineKey], parent: Option<EngineKey>, tokens: &'a [u32]) -> Store<'a> {
    Store::simple(keys, parent, tokens, SIZE)
}

/// A prompt with its keys; the engine's are named by pod, if they differ.
#[derive(Clone, Debug)]
struct Prompted {
    tokens: Vec<u32>,
    keys: Vec<RequestKey>,
}

impl Prompted {
    fn new(tokens: Vec<u32>) -> Self {
        let prompt = Prompt { model: "m", tokens: &tokens, ..Prompt::default() };
        Self { keys: prompt.keys(&spec().scheme).unwrap(), tokens }
    }

    fn engine(&self, salt: u64) -> Vec<EngineKey> {
        self.keys.iter().map(|key| EngineKey(key.0.rotate_left(7) ^ salt)).collect()
    }
}

/// What a row holds, by prompt key.
#[derive(Clone, Debug, Default)]
struct Model {
    rows: BTreeMap<u32, BTreeSet<RequestKey>>,
}

impl Model {
    fn depths(&self, keys: &[RequestKey]) -> Vec<(PodSlot, u32)> {
        let depth = |held: &BTreeSet<RequestKey>| {
            keys.iter().take_while(|key| held.contains(key)).count() as u32
        };
        let rows = self.rows.iter().map(|(&slot, held)| (PodSlot(slot), depth(held)));
        rows.filter(|(_, depth)| *depth > 0).collect()
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Stores the prompt's blocks that the row lacks up to a length, in steps.
    Fill {
        row: u32,
        prompt: usize,
        length: usize,
        step: usize,
    },
    /// Evicts from the back.
    Shrink {
        row: u32,
        prompt: usize,
        length: usize,
    },
    /// Evicts somewhere, which leaves a hole.
    Punch {
        row: u32,
        prompt: usize,
        at: usize,
        count: usize,
    },
    Clear {
        row: u32,
    },
}

impl Op {
    fn row(&self) -> u32 {
        let (Self::Fill { row, .. }
        | Self::Shrink { row, .. }
        | Self::Punch { row, .. }
        | Self::Clear { row }) = *self;
        row
    }
}

const ROWS: u32 = 70;

fn op() -> impl Strategy<Value = Op> {
    let (row, prompt) = (0..ROWS, any::<usize>());
    let length = prop_oneof![1usize..20, 1usize..400];
    prop_oneof![
        6 => (row.clone(), prompt, length.clone(), prop_oneof![Just(1usize), 1usize..200])
            .prop_map(|(row, prompt, length, step)| Op::Fill { row, prompt, length, step }),
        2 => (row.clone(), prompt, length.clone())
            .prop_map(|(row, prompt, length)| Op::Shrink { row, prompt, length }),
        2 => (row.clone(), prompt, length, 1usize..100)
            .prop_map(|(row, prompt, at, count)| Op::Punch { row, prompt, at, count }),
        1 => row.prop_map(|row| Op::Clear { row }),
    ]
}

/// Prompts that share prefixes of several lengths.
fn prompts() -> Vec<Prompted> {
    let part = |seed: u32, length: u32| (0..length).map(move |at| seed * 10_000 + at);
    let mut prompts = Vec::new();
    for (shared, own) in [(0, 400), (100, 200), (100, 60), (128, 272), (7, 90), (399, 1)] {
        for variant in 0..2 {
            let tokens = part(1, shared).chain(part(2 + variant + shared, own)).collect();
            prompts.push(Prompted::new(tokens));
        }
    }
    prompts
}

/// Applies an operation to a row's model and to the index.
fn apply(
    index: &RunIndex,
    prompts: &[Prompted],
    held: &mut BTreeSet<RequestKey>,
    op: &Op,
    salted: bool,
) {
    let row = op.row();
    let salt = if salted { u64::from(row) << 32 } else { 0 };
    let slot = PodSlot(row);
    let remove = |engine: &[EngineKey]| {
        let event = Remove { keys: engine, group: None, tier: TierTable::GPU, sequence: 0 };
        index.remove(slot, &event);
    };
    match *op {
        Op::Fill { prompt, length, step, .. } => {
            let prompt = &prompts[prompt % prompts.len()];
            let engine = prompt.engine(salt);
            let length = length.min(prompt.keys.len());
            let mut at = 0;
            while at < length {
                if held.contains(&prompt.keys[at]) {
                    at += 1;
                    continue;
                }
                let lacking = (at..length).take_while(|&b| !held.contains(&prompt.keys[b])).count();
                let to = at + lacking.min(step);
                let parent = at.checked_sub(1).map(|parent| engine[parent]);
                let event = store(&engine[at..to], parent, &prompt.tokens[at..to]);
                let outcome = index.store(slot, &event);
                assert_eq!(outcome.placed as usize, to - at, "{op:?}");
                held.extend(&prompt.keys[at..to]);
                at = to;
            }
        }
        Op::Shrink { prompt, length, .. } => {
            let prompt = &prompts[prompt % prompts.len()];
            let from = length.min(prompt.keys.len());
            let mut engine = prompt.engine(salt)[from..].to_vec();
            engine.reverse();
            remove(&engine);
            prompt.keys[from..].iter().for_each(|key| {
                held.remove(key);
            });
        }
        Op::Punch { prompt, at, count, .. } => {
            let prompt = &prompts[prompt % prompts.len()];
            let (from, to) = (at.min(prompt.keys.len()), (at + count).min(prompt.keys.len()));
            remove(&prompt.engine(salt)[from..to]);
            prompt.keys[from..to].iter().for_each(|key| {
                held.remove(key);
            });
        }
        Op::Clear { .. } => {
            index.clear(slot);
            held.clear();
        }
    }
}

fn check(ops: &[Op], salted: bool) {
    let index = RunIndex::new(IndexConfig::default());
    let (prompts, mut model) = (prompts(), Model::default());
    for _ in 0..ROWS {
        let slot = index.register(spec()).unwrap();
        model.rows.insert(slot.0, BTreeSet::new());
    }
    for op in ops {
        let held = model.rows.get_mut(&op.row()).unwrap();
        apply(&index, &prompts, held, op, salted);
        index.sweeper.settle();
        index.runs.verify();
        for prompt in &prompts {
            let (mut depths, mut matches) = (Vec::new(), Vec::new());
            index.depths(&prompt.keys, &mut depths);
            depths.sort_unstable();
            let want = model.depths(&prompt.keys);
            assert_eq!(depths, want, "after {op:?}");
            index.lookup(&prompt.keys, true, &mut matches);
            let got: Vec<_> = matches.iter().map(|found| (found.slot, found.confirmed)).collect();
            assert_eq!(got, want, "after {op:?}");
        }
        for (&row, held) in &model.rows {
            assert_eq!(index.pod_usage(PodSlot(row)).blocks, held.len() as u64);
        }
    }
    for row in 0..ROWS {
        index.unregister(PodSlot(row));
    }
    poll(|| index.usage().keys == 0);
    assert_eq!(index.usage().bytes, 0);
}

/// Waits for the sweeper, at most ten seconds.
fn poll(done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed().as_secs() < 10, "not done after ten seconds");
        std::thread::yield_now();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn long_chains_and_many_rows(ops in prop::collection::vec(op(), 1..60), salted in any::<bool>()) {
        check(&ops, salted);
    }
}

/// Rows on threads of their own that create, extend and drop the same runs.
fn race(lanes: u32, seed: u64) {
    let index = RunIndex::new(IndexConfig::default());
    let prompts: Vec<Prompted> = {
        let part = |seed: u32, length: u32| (0..length).map(move |at| seed * 1000 + at);
        let tree = |a: u32, b: u32, c: u32| {
            part(a, 3).chain(part(10 + b, 5)).chain(part(20 + c, 4)).collect()
        };
        (0..8).map(|at| Prompted::new(tree(at & 1, at >> 1 & 1, at >> 2))).collect()
    };
    let slots: Vec<PodSlot> = (0..lanes).map(|_| index.register(spec()).unwrap()).collect();
    let models: Vec<BTreeSet<RequestKey>> = std::thread::scope(|scope| {
        let lanes: Vec<_> = slots
            .iter()
            .map(|slot| {
                let (index, prompts) = (&index, &prompts);
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed ^ u64::from(slot.0) << 32);
                    let mut held = BTreeSet::new();
                    for _ in 0..4000 {
                        let (row, prompt) = (slot.0, random.usize(..));
                        let length = random.usize(1..13);
                        let op = match random.u8(0..16) {
                            0..8 => Op::Fill { row, prompt, length, step: random.usize(1..6) },
                            8..12 => Op::Shrink { row, prompt, length: length - 1 },
                            12..15 => Op::Punch { row, prompt, at: length, count: 2 },
                            _ => Op::Clear { row },
                        };
                        apply(index, prompts, &mut held, &op, slot.0 % 2 == 1);
                    }
                    held
                })
            })
            .collect();
        lanes.into_iter().map(|lane| lane.join().unwrap()).collect()
    });
    index.runs.verify();
    let rows = slots.iter().map(|slot| slot.0).zip(models).collect();
    let model = Model { rows };
    for prompt in &prompts {
        let mut depths = Vec::new();
        index.depths(&prompt.keys, &mut depths);
        depths.sort_unstable();
        assert_eq!(depths, model.depths(&prompt.keys), "seed {seed}");
    }
}

#[test]
fn racing_rows_share_every_run() {
    for seed in 0..8 {
        race(4, seed);
    }
}

/// A row with blocks of four tokens.
fn wide() -> PodSpec {
    PodSpec { scheme: Arc::new(Scheme::new(Algorithm::Xxh3, "", 4)), ..spec() }
}

/// A store at the start of a prompt.
fn whole<'a>(keys: &'a [EngineKey], tokens: &'a [u32]) -> Store<'a> {
    Store::simple(keys, None, tokens, 4)
}

/// Stores `blocks` blocks that nobody else has; returns how many were refused.
fn fill(index: &RunIndex, slot: PodSlot, prompt: u32, blocks: u32) -> u32 {
    let tokens: Vec<u32> = (0..blocks * 4).map(|at| prompt * 100_000 + at).collect();
    let keys: Vec<EngineKey> =
        (0..blocks).map(|at| EngineKey(u64::from(prompt) << 32 | u64::from(at))).collect();
    index.store(slot, &whole(&keys, &tokens)).refused
}

#[test]
fn the_cap_refuses_the_greedy_row_first() {
    let cap_bytes = 1 << 20;
    let index = RunIndex::new(IndexConfig { cap_bytes, ..IndexConfig::default() });
    let (greedy, modest) = (index.register(wide()).unwrap(), index.register(wide()).unwrap());
    let mut prompt = 0;
    let mut until_refused = |slot| {
        for stored in 0..10_000u32 {
            prompt += 1;
            if fill(&index, slot, prompt, 8) > 0 {
                return stored;
            }
            assert!(index.usage().bytes <= cap_bytes, "the cap holds");
        }
        panic!("never refused");
    };
    let many = until_refused(greedy);
    assert!(many > 100, "{many} stores fit in a megabyte");
    // What is left is for the row that has less than its share.
    let few = until_refused(modest);
    assert!(few > 10 && few < many / 4, "{few} against {many}");
    assert!(index.usage().bytes > cap_bytes * 15 / 16);
    // Room that is given back can be used again.
    index.clear(greedy);
    index.sweeper.settle();
    assert_eq!(fill(&index, modest, prompt + 10, 8), 0);
}

#[test]
fn estimated_bytes_go_back_to_nothing() {
    let index = RunIndex::new(IndexConfig::default());
    let slot = index.register(wide()).unwrap();
    for prompt in 0..50 {
        fill(&index, slot, prompt, 8);
    }
    assert_eq!(index.usage().keys, 400);
    assert!(index.usage().bytes > 400 * 16);
    index.clear(slot);
    index.sweeper.settle();
    assert_eq!((index.usage().keys, index.usage().bytes), (0, 0));
}

#[test]
fn slots_run_out_and_come_back() {
    let index = RunIndex::new(IndexConfig { max_pods: 2, ..IndexConfig::default() });
    let slots = [index.register(wide()).unwrap(), index.register(wide()).unwrap()];
    assert_eq!(index.register(wide()), None);
    fill(&index, slots[0], 1, 2);
    index.unregister(slots[0]);
    let tokens: Vec<u32> = (0..8).map(|at| 100_000 + at).collect();
    let keys =
        Prompt { model: "m", tokens: &tokens, ..Prompt::default() }.keys(&wide().scheme).unwrap();
    assert_eq!(index.register(wide()), Some(slots[0]), "the slot is free again");
    let mut found = Vec::new();
    index.lookup(&keys, true, &mut found);
    assert_eq!(found, [], "and nothing is left in it");
}

#[test]
fn groups_beyond_the_parts_are_never_scored() {
    let index = RunIndex::new(IndexConfig::default());
    let slot = index.register(wide()).unwrap();
    let tokens = [1, 2, 3, 4];
    let keys =
        Prompt { model: "m", tokens: &tokens, ..Prompt::default() }.keys(&wide().scheme).unwrap();
    let store = |group: u32| {
        let (group, kind) = (Some(group), Some(GroupKind::Full));
        index.store(slot, &Store { group, kind, ..whole(&[EngineKey(1)], &tokens) });
    };
    let depth = || {
        let mut found = Vec::new();
        index.lookup(&keys, false, &mut found);
        found.first().map_or(0, |found| found.depth)
    };
    // Twice, since a group is learnt by its first event.
    (0..40).chain(0..40).for_each(store);
    assert_eq!(depth(), 1);
    assert!(index.pod_usage(slot).hybrid_unsupported);
    assert_eq!(index.pod_usage(slot).blocks, 32);
    // The last group that counts loses the block: nobody stands in for it.
    for _ in 0..2 {
        let (keys, group) = (&[EngineKey(1)], Some(31));
        index.remove(slot, &Remove { keys, group, tier: TierTable::GPU, sequence: 0 });
    }
    assert_eq!(depth(), 0);
}
