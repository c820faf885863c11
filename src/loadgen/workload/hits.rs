//! What a prefix cache could reuse at best.
//!
//! # Model
//!
//! One cache for all, which sees the requests in their order, each complete before the next. As in vLLM,
//! only whole blocks count, from the beginning of a prompt, and never its last token, which has to be
//! computed for the first one of the answer. Answers are not counted: what they are is not known.

use std::collections::{BTreeMap, HashMap, HashSet};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Planned, Prompt};

/// Tokens of prompts, and how many of them need not be computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IdealHits {
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Of these, found in the cache.
    pub hit_tokens: u64,
}

impl IdealHits {
    /// Hits by tokens, 0 to 1; 0 without any.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        if self.prompt_tokens == 0 {
            0.0
        } else {
            self.hit_tokens as f64 / self.prompt_tokens as f64
        }
    }
}

/// Hits in a cache that forgets nothing, with blocks of `block` tokens.
pub fn ideal_hits<'a>(requests: impl Iterator<Item = &'a Planned>, block: usize) -> IdealHits {
    let mut held = HashSet::new();
    hits(requests, block, |blocks, most| {
        let found = blocks.iter().take(most).take_while(|key| held.contains(*key)).count();
        held.extend(blocks.iter().copied());
        found
    })
}

/// Hits in a cache of `capacity` blocks that forgets what was used longest ago; of one prompt, its end
/// first.
pub fn lru_hits<'a>(
    requests: impl Iterator<Item = &'a Planned>,
    block: usize,
    capacity: usize,
) -> IdealHits {
    let mut cache = Lru { capacity, ..Lru::default() };
    hits(requests, block, |blocks, most| {
        let found =
            blocks.iter().take(most).take_while(|key| cache.used.contains_key(*key)).count();
        // What is found is held while room is made for the rest.
        for &key in blocks[..found].iter().chain(blocks.iter().rev()) {
            cache.touch(key);
        }
        found
    })
}

/// Different whole blocks that the prompts have: what an infinite cache would hold in the end.
pub fn distinct_blocks<'a>(requests: impl Iterator<Item = &'a Planned>, block: usize) -> usize {
    let mut held = HashSet::new();
    hits(requests, block, |blocks, _| {
        held.extend(blocks.iter().copied());
        0
    });
    held.len()
}

/// Sums up; `found` says how many of a prompt's leading blocks are found, at most the number it is given.
fn hits<'a>(
    requests: impl Iterator<Item = &'a Planned>,
    block: usize,
    mut found: impl FnMut(&[u64], usize) -> usize,
) -> IdealHits {
    let block = block.max(1) as u64;
    let mut sum = IdealHits::default();
    let mut blocks = Vec::new();
    for request in requests {
        let tokens = request.prompt.tokens();
        blocks.clear();
        keys(&request.prompt, block, &mut blocks);
        let most = usize::try_from(tokens.saturating_sub(1) / block).unwrap_or(usize::MAX);
        sum.prompt_tokens += tokens;
        sum.hit_tokens += found(&blocks, most) as u64 * block;
    }
    sum
}

/// Chained keys of the whole blocks. A block is the same if it is cut from the same stretches of the same
/// parts, and so are all before it: no token has to be made for that.
fn keys(prompt: &Prompt, block: u64, keys: &mut Vec<u64>) {
    let (mut key, mut missing) = (0, block);
    for part in prompt.parts.iter() {
        let tokens = u64::from(part.tokens);
        let mut from = 0;
        while from < tokens {
            let taken = missing.min(tokens - from);
            let mut stretch = [0; 24];
            stretch[..8].copy_from_slice(&part.seed.to_le_bytes());
            stretch[8..16].copy_from_slice(&from.to_le_bytes());
            stretch[16..].copy_from_slice(&taken.to_le_bytes());
            key = xxh3_64_with_seed(&stretch, key);
            from += taken;
            missing -= taken;
            if missing == 0 {
                keys.push(key);
                missing = block;
            }
        }
    }
}

/// Blocks by when they were used.
#[derive(Default)]
struct Lru {
    capacity: usize,
    clock: u64,
    used: HashMap<u64, u64>,
    by_time: BTreeMap<u64, u64>,
}

impl Lru {
    fn touch(&mut self, key: u64) {
        self.clock += 1;
        if let Some(before) = self.used.insert(key, self.clock) {
            self.by_time.remove(&before);
        }
        self.by_time.insert(self.clock, key);
        if self.used.len() > self.capacity
            && let Some((_, oldest)) = self.by_time.pop_first()
        {
            self.used.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests;
