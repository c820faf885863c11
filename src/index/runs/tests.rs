//! Long chains, many rows: what the differential suite's small world does not reach.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use proptest::prelude::*;

use super::*;
use crate::{
    hash::{Algorithm, Prompt, Scheme},
    model::{EngineKey, GroupKind, TierId},
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

/// Tiers of the test, by bit: the GPU, and one that weighs less.
const TIERS: [TierId; 2] = [TierTable::GPU, TierId(1)];

/// What a row holds, and what is expected on it, by prompt key.
#[derive(Clone, Debug, Default)]
struct Held {
    tiers: BTreeMap<RequestKey, u8>,
    marks: BTreeMap<RequestKey, BTreeSet<u64>>,
}

impl Held {
    fn in_tier(&self, key: RequestKey, tier: usize) -> bool {
        self.tiers.get(&key).is_some_and(|tiers| tiers >> tier & 1 == 1)
    }

    fn store(&mut self, key: RequestKey, tier: usize) {
        *self.tiers.entry(key).or_default() |= 1 << tier;
        self.marks.remove(&key);
    }

    fn remove(&mut self, key: RequestKey, tier: usize) {
        if let Some(tiers) = self.tiers.get_mut(&key) {
            *tiers &= !(1 << tier);
            if *tiers == 0 {
                self.tiers.remove(&key);
            }
        }
    }

    fn unmark(&mut self, key: RequestKey, mark: u64) {
        if let Some(marks) = self.marks.get_mut(&key) {
            marks.remove(&mark);
            if marks.is_empty() {
                self.marks.remove(&key);
            }
        }
    }

    fn matched(&self, slot: PodSlot, keys: &[RequestKey], weights: [f64; 2]) -> Option<Match> {
        let held = |key: &&RequestKey| self.tiers.contains_key(key);
        let marked = |key: &&RequestKey| self.marks.contains_key(key);
        let depth = keys.iter().take_while(|key| held(key) || marked(key)).count();
        let weigh = |key: &RequestKey| match self.tiers.get(key) {
            Some(1 | 3) => weights[0],
            _ if marked(&key) => weights[0],
            _ => weights[1],
        };
        let tier = |tier: usize| {
            let depth = keys.iter().take_while(|key| self.in_tier(**key, tier)).count() as u32;
            (depth > 0).then_some((TIERS[tier], depth))
        };
        (depth > 0).then(|| Match {
            slot,
            depth: depth as u32,
            confirmed: keys.iter().take_while(held).count() as u32,
            score: keys[..depth].iter().map(weigh).sum(),
            tiers: (0..TIERS.len()).filter_map(tier).collect(),
            speculative: keys.iter().take_while(marked).count() as u32,
        })
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Stores the prompt's blocks that the row's tier lacks up to a length, in steps.
    Fill {
        row: u32,
        tier: usize,
        prompt: usize,
        length: usize,
        step: usize,
    },
    /// Evicts from the back.
    Shrink {
        row: u32,
        tier: usize,
        prompt: usize,
        length: usize,
    },
    /// Evicts somewhere, which leaves a hole.
    Punch {
        row: u32,
        tier: usize,
        prompt: usize,
        at: usize,
        count: usize,
    },
    /// Expects a prompt's leading blocks.
    Mark {
        row: u32,
        prompt: usize,
        length: usize,
        mark: u64,
    },
    Unmark {
        row: u32,
        prompt: usize,
        length: usize,
        mark: u64,
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
        | Self::Mark { row, .. }
        | Self::Unmark { row, .. }
        | Self::Clear { row }) = *self;
        row
    }
}

const ROWS: u32 = 70;

fn op() -> impl Strategy<Value = Op> {
    let length = || prop_oneof![1usize..20, 1usize..400];
    let tier = || prop_oneof![4 => Just(0usize), 1 => Just(1usize)];
    let step = prop_oneof![Just(1usize), 1usize..200];
    let any = (0..ROWS, any::<usize>());
    prop_oneof![
        6 => (any.clone(), tier(), length(), step).prop_map(
            |((row, prompt), tier, length, step)| Op::Fill { row, tier, prompt, length, step }),
        2 => (any.clone(), tier(), length())
            .prop_map(|((row, prompt), tier, length)| Op::Shrink { row, tier, prompt, length }),
        2 => (any.clone(), tier(), length(), 1usize..100).prop_map(
            |((row, prompt), tier, at, count)| Op::Punch { row, tier, prompt, at, count }),
        2 => (any.clone(), length(), 0u64..4)
            .prop_map(|((row, prompt), length, mark)| Op::Mark { row, prompt, length, mark }),
        1 => (any.clone(), length(), 0u64..4)
            .prop_map(|((row, prompt), length, mark)| Op::Unmark { row, prompt, length, mark }),
        1 => any.prop_map(|(row, _)| Op::Clear { row }),
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
fn apply(index: &RunIndex, prompts: &[Prompted], held: &mut Held, op: &Op, salted: bool) {
    let row = op.row();
    let salt = if salted { u64::from(row) << 32 } else { 0 };
    let slot = PodSlot(row);
    let remove = |engine: &[EngineKey], tier: usize| {
        index.remove(slot, &Remove { keys: engine, group: None, tier: TIERS[tier], sequence: 0 });
    };
    match *op {
        Op::Fill { tier, prompt, length, step, .. } => {
            let prompt = &prompts[prompt % prompts.len()];
            let engine = prompt.engine(salt);
            let length = length.min(prompt.keys.len());
            let mut at = 0;
            while at < length {
                let lacks = |at: &usize| !held.in_tier(prompt.keys[*at], tier);
                let lacking = (at..length).take_while(lacks).count();
                if lacking == 0 {
                    at += 1;
                    continue;
                }
                let to = at + lacking.min(step);
                let parent = at.checked_sub(1).map(|parent| engine[parent]);
                let event = Store {
                    tier: TIERS[tier],
                    ..store(&engine[at..to], parent, &prompt.tokens[at..to])
                };
                let outcome = index.store(slot, &event);
                assert_eq!(outcome.placed as usize, to - at, "{op:?}");
                prompt.keys[at..to].iter().for_each(|&key| held.store(key, tier));
                at = to;
            }
        }
        Op::Shrink { tier, prompt, length, .. } => {
            let prompt = &prompts[prompt % prompts.len()];
            let from = length.min(prompt.keys.len());
            let mut engine = prompt.engine(salt)[from..].to_vec();
            engine.reverse();
            remove(&engine, tier);
            prompt.keys[from..].iter().for_each(|&key| held.remove(key, tier));
        }
        Op::Punch { tier, prompt, at, count, .. } => {
            let prompt = &prompts[prompt % prompts.len()];
            let (from, to) = (at.min(prompt.keys.len()), (at + count).min(prompt.keys.len()));
            remove(&prompt.engine(salt)[from..to], tier);
            prompt.keys[from..to].iter().for_each(|&key| held.remove(key, tier));
        }
        Op::Mark { prompt, length, mark, .. } => {
            let keys = &prompts[prompt % prompts.len()].keys;
            let keys = &keys[..length.min(keys.len())];
            index.speculate(slot, keys, mark);
            keys.iter().for_each(|&key| {
                held.marks.entry(key).or_default().insert(mark);
            });
        }
        Op::Unmark { prompt, length, mark, .. } => {
            let keys = &prompts[prompt % prompts.len()].keys;
            let keys = &keys[..length.min(keys.len())];
            index.unspeculate(slot, keys, mark);
            keys.iter().for_each(|&key| held.unmark(key, mark));
        }
        Op::Clear { .. } => {
            index.clear(slot);
            held.tiers.clear();
        }
    }
}

/// Holds what the index answers against the models, in its three ways.
#[track_caller]
fn compare(index: &RunIndex, models: &BTreeMap<u32, Held>, keys: &[RequestKey], context: &str) {
    let all = index.config.tiers.weights();
    let weights = [all[0], all[1]];
    let rows = models.iter();
    let want: Vec<Match> =
        rows.filter_map(|(&slot, held)| held.matched(PodSlot(slot), keys, weights)).collect();
    let (mut depths, mut matches) = (Vec::new(), Vec::new());
    index.depths(keys, &mut depths);
    depths.sort_unstable();
    let plain: Vec<_> = want.iter().map(|found| (found.slot, found.depth)).collect();
    assert_eq!(depths, plain, "depths {context}");
    for tiers in [true, false] {
        index.lookup(keys, tiers, &mut matches);
        assert_eq!(matches.len(), want.len(), "rows {context}");
        for (got, want) in matches.iter_mut().zip(&want) {
            assert!((got.score - want.score).abs() < 1e-6, "{got:?}, not {want:?} {context}");
            got.score = want.score;
            if !tiers {
                got.tiers.clone_from(&want.tiers);
            }
            assert_eq!(got, want, "tiers {tiers} {context}");
        }
    }
}

fn with_two_tiers() -> RunIndex {
    let tiers = Arc::<TierTable>::default();
    assert_eq!(tiers.id(Some("cpu")), TIERS[1]);
    RunIndex::new(IndexConfig { tiers, ..IndexConfig::default() })
}

fn check(ops: &[Op], salted: bool) {
    let index = with_two_tiers();
    let (prompts, mut models) = (prompts(), BTreeMap::new());
    for _ in 0..ROWS {
        let slot = index.register(spec()).unwrap();
        models.insert(slot.0, Held::default());
    }
    for op in ops {
        apply(&index, &prompts, models.get_mut(&op.row()).unwrap(), op, salted);
        index.sweeper.settle();
        index.runs.verify();
        for prompt in &prompts {
            compare(&index, &models, &prompt.keys, &format!("after {op:?}"));
        }
        for (&row, held) in &models {
            assert_eq!(index.pod_usage(PodSlot(row)).blocks, held.tiers.len() as u64);
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
    let index = with_two_tiers();
    let prompts: Vec<Prompted> = {
        let part = |seed: u32, length: u32| (0..length).map(move |at| seed * 1000 + at);
        let tree = |a: u32, b: u32, c: u32| {
            part(a, 3).chain(part(10 + b, 5)).chain(part(20 + c, 4)).collect()
        };
        (0..8).map(|at| Prompted::new(tree(at & 1, at >> 1 & 1, at >> 2))).collect()
    };
    let slots: Vec<PodSlot> = (0..lanes).map(|_| index.register(spec()).unwrap()).collect();
    let models: Vec<Held> = std::thread::scope(|scope| {
        let lanes: Vec<_> = slots
            .iter()
            .map(|slot| {
                let (index, prompts) = (&index, &prompts);
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed ^ u64::from(slot.0) << 32);
                    let mut held = Held::default();
                    for _ in 0..4000 {
                        let (row, prompt) = (slot.0, random.usize(..));
                        let length = random.usize(1..13);
                        let tier = usize::from(random.u8(0..4) == 0);
                        let (at, mark) = (length, random.u64(0..3));
                        let op = match random.u8(0..20) {
                            0..8 => {
                                Op::Fill { row, tier, prompt, length, step: random.usize(1..6) }
                            }
                            8..12 => Op::Shrink { row, tier, prompt, length: length - 1 },
                            12..15 => Op::Punch { row, tier, prompt, at, count: 2 },
                            15..17 => Op::Mark { row, prompt, length, mark },
                            17..19 => Op::Unmark { row, prompt, length, mark },
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
    let models = slots.iter().map(|slot| slot.0).zip(models).collect();
    for prompt in &prompts {
        compare(&index, &models, &prompt.keys, &format!("seed {seed}"));
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
fn marks_that_come_too_late_are_nobody_elses() {
    let index = RunIndex::new(IndexConfig::default());
    let prompt = Prompted::new((0..40).collect());
    let slot = index.register(spec()).unwrap();
    index.speculate(slot, &prompt.keys[..20], 1);
    // A call that has found the row, and goes on when it is gone.
    let row = index.row(slot).unwrap();
    index.unregister(slot);
    row.marks.mark(&prompt.keys, 2, &index.runs);
    assert_eq!(index.register(spec()), Some(slot));
    let mut found = Vec::new();
    index.lookup(&prompt.keys, false, &mut found);
    assert_eq!((&found[..], index.usage().keys), (&[][..], 0));
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
