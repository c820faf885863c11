//! Seeded prompts and the events that engines make of them. Equal seeds give equal streams.

use std::{ops::Range, sync::Arc};

use kv_indexer::model::EngineKey;

use crate::contender::{BLOCK, Event, Place, Span, What};

/// SplitMix64: the same streams on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Token ids of a vocabulary of 150 000.
    pub(crate) fn tokens(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| (self.next() % 150_000) as u32).collect()
    }

    /// Engine keys, as opaque as the engines' own.
    pub(crate) fn keys(&mut self, count: usize) -> Vec<EngineKey> {
        (0..count).map(|_| EngineKey(self.next())).collect()
    }
}

/// A prompt as an engine sees it.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    pub(crate) keys: Arc<[EngineKey]>,
    pub(crate) tokens: Arc<[u32]>,
}

impl Prompt {
    /// `blocks` blocks that no other prompt has.
    pub(crate) fn new(random: &mut Random, blocks: usize) -> Self {
        Self { keys: random.keys(blocks).into(), tokens: random.tokens(blocks * BLOCK).into() }
    }

    pub(crate) fn blocks(&self) -> usize {
        self.keys.len()
    }

    /// This prompt's first `shared` blocks, then its own up to `blocks`.
    pub(crate) fn diverging(&self, random: &mut Random, shared: usize, blocks: usize) -> Self {
        let own = blocks - shared;
        let keys = [&self.keys[..shared], &random.keys(own)].concat();
        let tokens = [&self.tokens[..shared * BLOCK], &random.tokens(own * BLOCK)].concat();
        Self { keys: keys.into(), tokens: tokens.into() }
    }

    /// The same tokens under other engine keys.
    pub(crate) fn renamed(&self, salt: u64) -> Self {
        let keys: Vec<_> =
            self.keys.iter().map(|key| EngineKey(Random(key.0 ^ salt).next())).collect();
        Self { keys: keys.into(), tokens: Arc::clone(&self.tokens) }
    }

    /// `blocks` stored on a pod, behind the block before them.
    pub(crate) fn stored(&self, pod: u32, place: Place, blocks: Range<usize>) -> Event {
        let parent = blocks.start.checked_sub(1).map(|at| self.keys[at]);
        let span = Span {
            all_keys: Arc::clone(&self.keys),
            all_tokens: Arc::clone(&self.tokens),
            start: blocks.start,
            end: blocks.end,
        };
        Event { pod, place, what: What::Stored { parent, span } }
    }

    /// Everything stored on a pod, in events of as many blocks as a prefill step has at most.
    pub(crate) fn stored_whole(&self, pod: u32) -> impl Iterator<Item = Event> + '_ {
        const STEP: usize = 512;
        let ends = (0..self.blocks()).step_by(STEP);
        ends.map(move |at| self.stored(pod, Place::Gpu, at..self.blocks().min(at + STEP)))
    }

    /// `blocks` evicted from a pod, the last one first, as engines do.
    pub(crate) fn removed(&self, pod: u32, place: Place, blocks: Range<usize>) -> Event {
        let keys = self.keys[blocks].iter().rev().copied().collect();
        Event { pod, place, what: What::Removed(keys) }
    }
}

/// Pods of the traffic streams.
pub(crate) const TRAFFIC_PODS: u32 = 16;
/// Blocks of a tail at most; 192.5 on average.
pub(crate) const TAIL: usize = 384;

/// Traffic as a fleet makes it: system prompts of 128 blocks that every pod holds, and tails of
/// 1 to 384 blocks behind them that one pod holds.
#[derive(Debug)]
pub(crate) struct Traffic {
    random: Random,
    prefixes: Vec<Prompt>,
}

impl Traffic {
    pub(crate) const PREFIX: usize = 128;

    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let prefixes = (0..64).map(|_| Prompt::new(&mut random, Self::PREFIX)).collect();
        Self { random, prefixes }
    }

    /// The system prompts, stored on every pod.
    pub(crate) fn shared(&self) -> impl Iterator<Item = Event> + '_ {
        (0..TRAFFIC_PODS).flat_map(|pod| {
            self.prefixes.iter().map(move |prefix| prefix.stored(pod, Place::Gpu, 0..Self::PREFIX))
        })
    }

    /// A prompt with a new tail, and the pod that serves it.
    pub(crate) fn prompt(&mut self) -> (Prompt, u32) {
        let pod = self.random.below(TRAFFIC_PODS as usize) as u32;
        let blocks = Self::PREFIX + 1 + self.random.below(TAIL);
        (self.prompt_of(blocks), pod)
    }

    /// What is answered for a prompt of whose tail `pod` holds so much that it has `depth` blocks.
    pub(crate) fn truth(pod: u32, depth: usize) -> Vec<(u32, u32)> {
        let prefix = Self::PREFIX;
        (0..TRAFFIC_PODS).map(|at| (at, if at == pod { depth } else { prefix } as u32)).collect()
    }

    /// A prompt with a new tail and `blocks` blocks in all.
    pub(crate) fn prompt_of(&mut self, blocks: usize) -> Prompt {
        let prefix = self.prefixes[self.random.below(self.prefixes.len())].clone();
        prefix.diverging(&mut self.random, Self::PREFIX, blocks)
    }
}
