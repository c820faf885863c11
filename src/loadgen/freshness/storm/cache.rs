//! What a publisher of a storm holds, and its next message. Pure.
//!
//! A chain is `batch` blocks from the root of the prefix tree; everything about it follows from its
//! number, so that only numbers are kept.

use std::collections::VecDeque;

use super::StormOptions;
use crate::{
    loadgen::recording::Batch,
    wire::encode::{self, BlockRemoved, BlockStored, Event, Hash, Tokens},
};

/// Chains that went last, remembered to see that they did.
const GONE: usize = 64;

/// One publisher's cache.
#[derive(Debug)]
pub(in crate::loadgen::freshness) struct Cache {
    options: StormOptions,
    topic: String,
    block_size: usize,
    /// Makes chains of different publishers differ.
    salt: u64,
    next: u64,
    /// Oldest first.
    held: VecDeque<u64>,
    gone: VecDeque<u64>,
    /// Counts clears and restarts: what was composed before cannot be taken back after.
    life: u64,
    random: fastrand::Rng,
}

/// A message that is encoded and not sent.
#[derive(Debug)]
pub(super) struct Composed {
    batch: Batch,
    /// Blocks stored and removed.
    pub(super) blocks: u64,
    stored: Vec<u64>,
    removed: Vec<u64>,
    life: u64,
}

impl Composed {
    /// The message with its sequence and the time at which it is sent.
    pub(super) fn stamped(&self, sequence: u64, unix_ns: u64) -> Batch {
        let mut batch = Batch { sequence, ..self.batch.clone() };
        // An array header of one byte, the marker of a 64-bit float, the float.
        if let Some(timestamp) = batch.payload.get_mut(2..10) {
            timestamp.copy_from_slice(&(unix_ns as f64 / 1e9).to_be_bytes());
        }
        batch
    }
}

impl Cache {
    pub(super) fn new(
        options: &StormOptions,
        topic: String,
        block_size: usize,
        number: usize,
    ) -> Self {
        let seed = mix(options.seed ^ mix(number as u64));
        Self {
            options: options.clone(),
            topic,
            block_size,
            salt: seed,
            next: 0,
            held: VecDeque::new(),
            gone: VecDeque::new(),
            life: 0,
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// The next message. What it removes is no longer held; what it stores is held once it is
    /// [sent](Self::sent).
    pub(super) fn compose(&mut self) -> Result<Composed, rmp_serde::encode::Error> {
        let mut events = Vec::with_capacity(self.options.events);
        let (mut stored, mut removed) = (Vec::new(), Vec::new());
        for _ in 0..self.options.events {
            let full = self.held.len() * self.options.batch >= self.options.cap;
            let oldest = (full || self.random.f64() < self.options.removes)
                .then(|| self.held.pop_front())
                .flatten();
            if let Some(chain) = oldest {
                removed.push(chain);
                events.push(Event::BlockRemoved(BlockRemoved {
                    block_hashes: self.hashes(chain),
                    medium: Some("GPU".to_owned()),
                    ..BlockRemoved::default()
                }));
            } else {
                let chain = self.next;
                self.next += 1;
                stored.push(chain);
                events.push(Event::BlockStored(BlockStored {
                    block_hashes: self.hashes(chain),
                    token_ids: Tokens::Plain(self.tokens(chain)),
                    block_size: self.block_size as i64,
                    medium: Some("GPU".to_owned()),
                    ..BlockStored::default()
                }));
            }
        }
        let blocks = self.options.message_blocks();
        Ok(Composed { batch: self.encode(events)?, blocks, stored, removed, life: self.life })
    }

    /// A message that says that everything is gone.
    pub(super) fn compose_clear(&self) -> Result<Composed, rmp_serde::encode::Error> {
        let batch = self.encode(vec![Event::AllBlocksCleared])?;
        Ok(Composed { batch, blocks: 0, stored: Vec::new(), removed: Vec::new(), life: self.life })
    }

    /// A message was handed to the socket.
    pub(super) fn sent(&mut self, message: &Composed) {
        self.held.extend(&message.stored);
        self.forget(message.removed.iter().copied());
    }

    /// A message will not be sent.
    pub(super) fn unsent(&mut self, message: &Composed) {
        if message.life == self.life {
            message.removed.iter().rev().for_each(|&chain| self.held.push_front(chain));
        }
    }

    /// Nothing is held any more.
    pub(super) fn clear(&mut self) {
        self.life += 1;
        let held = std::mem::take(&mut self.held);
        let last = held.len().saturating_sub(GONE);
        self.forget(held.into_iter().skip(last));
    }

    /// Up to `count` prompts and how many of their blocks should be held: all or none.
    pub(in crate::loadgen::freshness) fn sample(&mut self, count: usize) -> Vec<(Vec<u32>, u32)> {
        let mut chains: Vec<(u64, u32)> = Vec::new();
        for _ in 0..count.min(self.held.len()) {
            let at = self.random.usize(..self.held.len());
            chains.push((self.held[at], self.options.batch as u32));
        }
        chains.extend(self.gone.iter().rev().take(count).map(|&chain| (chain, 0)));
        chains.into_iter().map(|(chain, depth)| (self.tokens(chain), depth)).collect()
    }

    fn forget(&mut self, chains: impl Iterator<Item = u64>) {
        self.gone.extend(chains);
        while self.gone.len() > GONE {
            self.gone.pop_front();
        }
    }

    fn encode(&self, events: Vec<Event>) -> Result<Batch, rmp_serde::encode::Error> {
        let batch = encode::Batch { timestamp: 0.0, events, rank: Some(0) };
        let payload = batch.encode(self.options.form)?;
        Ok(Batch { topic: self.topic.clone(), payload, ..Batch::default() })
    }

    fn hashes(&self, chain: u64) -> Vec<Hash> {
        let base = mix(self.salt ^ mix(chain));
        let hash = |block: usize| mix(base ^ block as u64);
        (0..self.options.batch)
            .map(|block| match self.options.bytes {
                false => Hash::Unsigned(hash(block)),
                true => {
                    let words = [0, 1, 2, 3].map(|word| hash(block + (word << 32)).to_be_bytes());
                    Hash::Bytes(words.concat())
                }
            })
            .collect()
    }

    fn tokens(&self, chain: u64) -> Vec<u32> {
        let base = self.salt ^ mix(chain);
        let count = self.options.batch * self.block_size;
        (0..count as u64).map(|at| (mix(base.wrapping_add(at)) % 100_000) as u32).collect()
    }
}

/// SplitMix64's finalizer: nearby numbers become far ones.
pub(in crate::loadgen::freshness) fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, BatchReader, Limits, Scratch};

    fn cache(text: &str) -> Cache {
        Cache::new(&text.parse().unwrap(), "kv@p@m".to_owned(), 4, 0)
    }

    #[test]
    fn messages_are_what_the_cache_says() {
        for text in ["batch=3,events=2", "batch=3,events=2,form=array,hashes=bytes"] {
            let mut cache = cache(text);
            let message = cache.compose().unwrap();
            assert!(cache.held.is_empty(), "not sent yet");
            cache.sent(&message);
            assert_eq!(cache.held, [0, 1]);
            let batch = message.stamped(7, 1_500_000_000);
            assert_eq!((batch.sequence, batch.topic.as_str()), (7, "kv@p@m"));
            let mut reader = BatchReader::new(&batch.payload, &Limits::default()).unwrap();
            assert_eq!(reader.header().timestamp, 1.5);
            let mut scratch = Scratch::default();
            let mut chains = 0;
            while let Some(event) = reader.next_event(&mut scratch) {
                let Ok(wire::Event::Stored(event)) = event else { panic!("{event:?}") };
                assert_eq!((event.block_hashes.len(), event.block_size), (3, 4));
                assert_eq!(event.tokens, cache.tokens(chains));
                chains += 1;
            }
            assert_eq!(chains, 2);
        }
    }

    #[test]
    fn the_oldest_goes_and_the_cap_holds() {
        let mut cache = cache("batch=2,removes=0,cap=8");
        for _ in 0..50 {
            let message = cache.compose().unwrap();
            cache.sent(&message);
            assert!(cache.held.len() <= 4);
        }
        let youngest = cache.next - 1;
        assert!(cache.held.contains(&youngest) && !cache.held.contains(&0));
        assert!(cache.gone.contains(&0));
        cache.clear();
        assert!(cache.held.is_empty() && cache.gone.contains(&youngest));
        assert!(cache.sample(5).iter().all(|(tokens, depth)| tokens.len() == 8 && *depth == 0));
    }

    #[test]
    fn what_is_not_sent_is_taken_back() {
        let mut cache = cache("batch=2,removes=1");
        let first = cache.compose().unwrap();
        cache.sent(&first);
        let removal = cache.compose().unwrap();
        assert!(cache.held.is_empty());
        cache.unsent(&removal);
        assert_eq!(cache.held, [0]);
        let removal = cache.compose().unwrap();
        cache.clear();
        cache.unsent(&removal);
        assert!(cache.held.is_empty());
    }
}
