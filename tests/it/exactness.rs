//! Streams made by hand, with their true answers: holes, copies, engine keys that mean nothing,
//! contents that come again under other prefixes. Each goes to the production index and to the
//! oracle, alone and with other pods that hold the same prompts, since blocks of many holders lie
//! otherwise than those of few.

use std::{ops::Range, sync::Arc};

use kv_indexer::{
    hash::{Algorithm, Prompt, Scheme},
    index::{BlockIndex, IndexConfig, PodSpec, Remove, Store, naive::NaiveIndex, runs::RunIndex},
    model::{CountMode, EngineKey, PodSlot, RequestKey, TierTable},
};

const BLOCK: u32 = 4;

fn scheme() -> Scheme {
    Scheme::new(Algorithm::Xxh3, "seed", BLOCK)
}

/// A prompt of blocks that are named by their content.
#[derive(Debug)]
struct Chain {
    tokens: Vec<u32>,
    keys: Vec<RequestKey>,
}

impl Chain {
    fn new(contents: impl IntoIterator<Item = u32>) -> Self {
        let tokens: Vec<u32> = contents
            .into_iter()
            .flat_map(|block| (0..BLOCK).map(move |at| block * BLOCK + at))
            .collect();
        let prompt = Prompt { model: "m", tokens: &tokens, ..Prompt::default() };
        Self { keys: prompt.keys(&scheme()).unwrap(), tokens }
    }

    /// What an engine calls the blocks: one name per prefix, another one with another salt.
    fn names(&self, salt: u64) -> Vec<EngineKey> {
        let name = |key: &RequestKey| EngineKey(key.0.rotate_left(23).wrapping_mul(2 * salt + 3));
        self.keys.iter().map(name).collect()
    }
}

/// Pods A and B, and others beside them.
struct Rig {
    index: Box<dyn BlockIndex>,
    a: PodSlot,
    b: PodSlot,
    others: Vec<PodSlot>,
}

impl Rig {
    fn new(index: Box<dyn BlockIndex>, mode: CountMode, others: usize) -> Self {
        let spec = PodSpec { scheme: Arc::new(scheme()), model: Arc::from("m"), count_mode: mode };
        let mut pods = (0..others + 2).map(|_| index.register(spec.clone()).unwrap());
        let (a, b) = (pods.next().unwrap(), pods.next().unwrap());
        let others = pods.collect();
        Self { index, a, b, others }
    }

    /// A prompt; the others hold all of it, under names of their own.
    fn chain(&self, contents: impl IntoIterator<Item = u32>) -> Chain {
        let chain = Chain::new(contents);
        for pod in &self.others {
            let salt = 100 + u64::from(pod.0);
            self.store_as(*pod, &chain, 0..chain.keys.len(), &chain.names(salt));
        }
        chain
    }

    /// One event for the blocks of a range, behind the block before them.
    fn store(&self, pod: PodSlot, chain: &Chain, blocks: Range<usize>) {
        self.store_as(pod, chain, blocks, &chain.names(0));
    }

    fn store_as(&self, pod: PodSlot, chain: &Chain, blocks: Range<usize>, names: &[EngineKey]) {
        let size = BLOCK as usize;
        let parent = blocks.start.checked_sub(1).map(|parent| names[parent]);
        let tokens = &chain.tokens[blocks.start * size..blocks.end * size];
        let store = Store::simple(&names[blocks.clone()], parent, tokens, BLOCK);
        let stored = self.index.store(pod, &store);
        assert_eq!(stored.placed as usize, blocks.len(), "{stored:?}");
    }

    fn remove(&self, pod: PodSlot, chain: &Chain, blocks: Range<usize>) {
        let keys = &chain.names(0)[blocks];
        let tier = TierTable::GPU;
        self.index.remove(pod, &Remove { keys, group: None, tier, sequence: 1 });
    }

    /// Asks for a prompt; the answer for A and B must be `truth`.
    #[track_caller]
    fn check(&self, chain: &Chain, truth: (u32, u32)) {
        let mut found = Vec::new();
        self.index.lookup(&chain.keys, false, &mut found);
        for one in &found {
            assert_eq!(one.depth, one.confirmed, "nobody speculates: {one:?}");
            assert_eq!(one.score, f64::from(one.depth), "all is on the GPU: {one:?}");
        }
        let depth =
            |pod| found.iter().find(|found| found.slot == pod).map_or(0, |found| found.depth);
        let got = (depth(self.a), depth(self.b));
        assert_eq!(got, truth, "beside {} others", self.others.len());
    }

    /// As [`check`](Self::check), of a prompt that the others hold in full.
    #[track_caller]
    fn check_all(&self, chain: &Chain, truth: (u32, u32)) {
        self.check(chain, truth);
        let mut found = Vec::new();
        self.index.lookup(&chain.keys, false, &mut found);
        for pod in &self.others {
            let own = found.iter().find(|found| found.slot == *pod);
            let depth = own.map_or(0, |own| own.depth as usize);
            assert_eq!(depth, chain.keys.len(), "another pod, {pod:?}");
        }
    }
}

/// Plays a stream in every company and by both ways of counting.
fn everywhere(make: &dyn Fn() -> Box<dyn BlockIndex>, company: &[usize], play: fn(&Rig)) {
    for mode in [CountMode::Counted, CountMode::Set] {
        for &others in company {
            play(&Rig::new(make(), mode, others));
        }
    }
}

/// A holds eight blocks; B four of them and then four others; A's first one goes.
fn head_is_evicted(rig: &Rig) -> (Chain, Chain) {
    let long = rig.chain(0..8);
    let other = rig.chain((0..4).chain(20..24));
    rig.store(rig.a, &long, 0..8);
    rig.store(rig.b, &other, 0..8);
    rig.check_all(&long, (8, 4));
    rig.remove(rig.a, &long, 0..1);
    (long, other)
}

fn an_evicted_head_ends_its_holder_and_credits_nobody(rig: &Rig) {
    let (long, other) = head_is_evicted(rig);
    rig.check_all(&long, (0, 4));
    rig.check_all(&other, (0, 8));
}

fn a_head_stored_again_joins_what_was_behind_it(rig: &Rig) {
    let (long, other) = head_is_evicted(rig);
    rig.store(rig.a, &long, 0..1);
    rig.check_all(&long, (8, 4));
    rig.check_all(&other, (4, 8));
}

fn a_hole_ends_the_prefix(rig: &Rig) {
    let ten = rig.chain(0..10);
    rig.store(rig.a, &ten, 0..10);
    rig.remove(rig.a, &ten, 5..6);
    rig.check_all(&ten, (5, 0));
}

fn a_filled_hole_gives_the_rest_back(rig: &Rig) {
    let ten = rig.chain(0..10);
    rig.store(rig.a, &ten, 0..10);
    rig.remove(rig.a, &ten, 5..6);
    rig.store(rig.a, &ten, 5..6);
    rig.check_all(&ten, (10, 0));
}

fn engine_keys_mean_nothing(rig: &Rig) {
    let long = rig.chain(0..64);
    rig.store(rig.a, &long, 0..64);
    rig.store_as(rig.b, &long, 0..40, &long.names(9));
    rig.check_all(&long, (64, 40));
    // A's names are unknown to B, and the other way round.
    rig.remove(rig.b, &long, 0..40);
    rig.check_all(&long, (64, 40));
}

fn engine_keys_may_be_small_numbers(rig: &Rig) {
    // From 0 on, and the same ones for different blocks on the two pods.
    let (one, two) = (rig.chain(0..6), rig.chain(10..16));
    let names: Vec<EngineKey> = (0..6).map(EngineKey).collect();
    rig.store_as(rig.a, &one, 0..6, &names);
    rig.store_as(rig.b, &two, 0..6, &names);
    rig.check_all(&one, (6, 0));
    rig.check_all(&two, (0, 6));
    rig.index.remove(
        rig.a,
        &Remove { keys: &names[..1], group: None, tier: TierTable::GPU, sequence: 1 },
    );
    rig.check_all(&one, (0, 0));
    rig.check_all(&two, (0, 6));
}

fn content_under_another_prefix_is_not_credited(rig: &Rig) {
    // The same seven blocks behind different first ones.
    let held = rig.chain([30].into_iter().chain(1..8));
    let asked = rig.chain([31].into_iter().chain(1..8));
    rig.store(rig.a, &held, 0..8);
    rig.check_all(&asked, (0, 0));
    // Even if the first one is held as well, and what follows it there is something else.
    rig.store(rig.a, &asked, 0..1);
    rig.store(rig.b, &asked, 0..1);
    rig.check_all(&asked, (1, 1));
    rig.check_all(&held, (8, 0));
    // In the middle: two ways to the same end.
    let held = rig.chain([40, 41, 42, 43, 44]);
    let asked = rig.chain([40, 41, 50, 43, 44]);
    rig.store(rig.a, &held, 0..5);
    rig.store(rig.b, &asked, 0..5);
    rig.check_all(&asked, (2, 5));
    rig.check_all(&held, (5, 2));
}

fn content_that_repeats_is_counted_by_position(rig: &Rig) {
    let eight = rig.chain([7; 8]);
    rig.store(rig.a, &eight, 0..3);
    rig.store(rig.b, &eight, 0..8);
    rig.remove(rig.b, &eight, 6..8);
    rig.check_all(&eight, (3, 6));
}

fn a_suffix_that_rejoins_is_not_credited(rig: &Rig) {
    // A lacks block 3, B all before block 3: neither holds 0..8.
    let long = rig.chain(0..8);
    rig.store(rig.a, &long, 0..8);
    rig.remove(rig.a, &long, 3..4);
    rig.store(rig.b, &long, 0..8);
    rig.remove(rig.b, &long, 0..3);
    rig.check_all(&long, (3, 0));
}

fn a_cleared_pod_keeps_nothing(rig: &Rig) {
    let long = rig.chain(0..8);
    rig.store(rig.a, &long, 0..8);
    rig.store(rig.b, &long, 0..8);
    rig.index.clear(rig.a);
    rig.check_all(&long, (0, 8));
    // A block of before the clear is nobody's parent any more.
    rig.store(rig.a, &long, 0..2);
    rig.check_all(&long, (2, 8));
}

/// Four blocks stored twice, the last one removed once. Engines that announce every copy still hold
/// it; to those that announce again what they hold, it is gone.
fn copies_are_counted_if_the_engine_counts_them(
    make: &dyn Fn() -> Box<dyn BlockIndex>,
    company: &[usize],
) {
    for (mode, depth) in [(CountMode::Set, 3), (CountMode::Counted, 4)] {
        for &others in company {
            let rig = Rig::new(make(), mode, others);
            let four = rig.chain(0..4);
            rig.store(rig.a, &four, 0..4);
            rig.store(rig.a, &four, 0..4);
            rig.remove(rig.a, &four, 3..4);
            rig.check_all(&four, (depth, 0));
            rig.remove(rig.a, &four, 3..4);
            rig.check_all(&four, (3, 0));
        }
    }
}

macro_rules! probes {
    ($($probe:ident),+ $(,)?) => {
        // Seventy others take more than a word of a bitset; the oracle has none, and is slow.
        probes!(in runs: RunIndex::new(IndexConfig::default()), [0, 1, 12, 70]; $($probe),+);
        probes!(in naive: NaiveIndex::new(IndexConfig::default()), [0, 3]; $($probe),+);
    };
    (in $index:ident: $make:expr, $company:expr; $($probe:ident),+) => {
        mod $index {
            use super::*;

            $(#[test]
            fn $probe() {
                everywhere(&|| Box::new($make), &$company, super::$probe);
            })+

            #[test]
            fn copies_are_counted_if_the_engine_counts_them() {
                super::copies_are_counted_if_the_engine_counts_them(&|| Box::new($make), &$company);
            }
        }
    };
}

probes!(
    an_evicted_head_ends_its_holder_and_credits_nobody,
    a_head_stored_again_joins_what_was_behind_it,
    a_hole_ends_the_prefix,
    a_filled_hole_gives_the_rest_back,
    engine_keys_mean_nothing,
    engine_keys_may_be_small_numbers,
    content_under_another_prefix_is_not_credited,
    content_that_repeats_is_counted_by_position,
    a_suffix_that_rejoins_is_not_credited,
    a_cleared_pod_keeps_nothing,
);
