//! What is remembered: chunks of text, and words.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hasher},
    mem,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use dashmap::DashMap;
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::support::sync::lock;

const SHARDS: usize = 16;

/// What an entry takes beside its text and ids: two pointers with lengths, counters of the `Arc`, the
/// table's slack, the allocator's headers.
const ENTRY_BYTES: usize = 96;

/// Words longer than this are not remembered: they hardly come again.
const WORD_BYTES: usize = 48;

/// Hashes text with XXH3 under a seed of its own, so that nobody outside knows which texts collide.
#[derive(Clone, Debug)]
struct TextHash {
    seed: u64,
}

struct TextHasher {
    seed: u64,
    hash: u64,
}

impl BuildHasher for TextHash {
    type Hasher = TextHasher;

    fn build_hasher(&self) -> TextHasher {
        TextHasher { seed: self.seed, hash: 0 }
    }
}

impl Hasher for TextHasher {
    fn finish(&self) -> u64 {
        self.hash
    }

    fn write(&mut self, bytes: &[u8]) {
        self.hash = xxh3_64_with_seed(bytes, self.seed ^ self.hash);
    }

    /// The end of a `str`, which tells nothing where the `str` is the whole key.
    fn write_u8(&mut self, _: u8) {}
}

type Generation = HashMap<Box<str>, Arc<[u32]>, TextHash>;

/// Chunks of text and their ids, the ones used least lately forgotten first.
///
/// Two generations: what is used moves to the young one; when that has half of the bytes it becomes the
/// old one, and what was not used since the last such change goes. So a chunk is kept while less than
/// half of the bytes was used after it, and there is no list to keep in order.
#[derive(Debug)]
pub(super) struct Chunks {
    hash: TextHash,
    shards: Box<[Mutex<Shard>]>,
    /// Bytes of one generation of one shard.
    cap: usize,
    evictions: AtomicU64,
}

#[derive(Debug)]
struct Shard {
    young: Generation,
    young_bytes: usize,
    old: Generation,
    old_bytes: usize,
}

fn cost(text: &str, ids: usize) -> usize {
    text.len() + size_of::<u32>() * ids + ENTRY_BYTES
}

impl Chunks {
    pub(super) fn new(bytes: usize) -> Self {
        let hash = TextHash { seed: fastrand::u64(..) };
        let empty = || Generation::with_hasher(TextHash { seed: fastrand::u64(..) });
        let shard = || Shard { young: empty(), young_bytes: 0, old: empty(), old_bytes: 0 };
        let shards = (0..SHARDS).map(|_| Mutex::new(shard())).collect();
        Self { hash, shards, cap: bytes / SHARDS / 2, evictions: AtomicU64::new(0) }
    }

    fn shard(&self, text: &str) -> &Mutex<Shard> {
        &self.shards[self.hash.hash_one(text) as usize % SHARDS]
    }

    pub(super) fn get(&self, text: &str) -> Option<Arc<[u32]>> {
        let mut shard = lock(self.shard(text));
        if let Some(ids) = shard.young.get(text) {
            return Some(Arc::clone(ids));
        }
        let (text, ids) = shard.old.remove_entry(text)?;
        let cost = cost(&text, ids.len());
        shard.old_bytes -= cost;
        let gone = self.put(&mut shard, text, Arc::clone(&ids), cost);
        drop(shard);
        drop(gone);
        Some(ids)
    }

    pub(super) fn contains(&self, text: &str) -> bool {
        let shard = lock(self.shard(text));
        shard.young.contains_key(text) || shard.old.contains_key(text)
    }

    pub(super) fn insert(&self, text: &str, ids: &[u32]) {
        let cost = cost(text, ids.len());
        if cost > self.cap {
            return;
        }
        let (text, ids): (Box<str>, _) = (text.into(), ids.into());
        let mut shard = lock(self.shard(&text));
        // Whoever encoded it at the same time was faster.
        if shard.young.contains_key(&text) || shard.old.contains_key(&text) {
            return;
        }
        let gone = self.put(&mut shard, text, ids, cost);
        drop(shard);
        drop(gone);
    }

    /// Puts an entry into the young generation; the one that goes is dropped without the lock.
    fn put(
        &self,
        shard: &mut Shard,
        text: Box<str>,
        ids: Arc<[u32]>,
        cost: usize,
    ) -> Option<Generation> {
        let mut gone = None;
        if shard.young_bytes + cost > self.cap {
            let empty = Generation::with_hasher(shard.young.hasher().clone());
            let aged = mem::replace(&mut shard.young, empty);
            let forgotten = mem::replace(&mut shard.old, aged);
            shard.old_bytes = mem::take(&mut shard.young_bytes);
            self.evictions.fetch_add(forgotten.len() as u64, Relaxed);
            gone = Some(forgotten);
        }
        shard.young_bytes += cost;
        shard.young.insert(text, ids);
        gone
    }

    pub(super) fn evictions(&self) -> u64 {
        self.evictions.load(Relaxed)
    }

    pub(super) fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard)).map(|s| s.young_bytes + s.old_bytes).sum()
    }
}

/// Words and their ids. When there are too many, all are forgotten: the frequent ones are back at once.
#[derive(Debug)]
pub(super) struct Words {
    words: DashMap<Box<str>, SmallVec<[u32; 4]>, TextHash>,
    bytes: AtomicUsize,
    cap: usize,
}

impl Words {
    pub(super) fn new(cap: usize) -> Self {
        let hash = TextHash { seed: fastrand::u64(..) };
        Self {
            words: DashMap::with_hasher_and_shard_amount(hash, SHARDS),
            bytes: AtomicUsize::new(0),
            cap,
        }
    }

    /// Appends the ids of a word, if it is known.
    pub(super) fn get(&self, word: &str, ids: &mut Vec<u32>) -> bool {
        if word.len() > WORD_BYTES {
            return false;
        }
        let Some(known) = self.words.get(word) else { return false };
        ids.extend_from_slice(&known);
        true
    }

    pub(super) fn insert(&self, word: &str, ids: &[u32]) {
        if word.len() > WORD_BYTES {
            return;
        }
        let cost = cost(word, ids.len());
        if self.bytes.fetch_add(cost, Relaxed) + cost > self.cap {
            self.words.clear();
            self.bytes.store(0, Relaxed);
            return;
        }
        self.words.insert(word.into(), ids.into());
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_bytes_are_bounded() {
        let bytes = 256 << 10;
        let chunks = Chunks::new(bytes);
        chunks.insert("kept", &[1, 2, 3]);
        for number in 0..20_000_u32 {
            chunks.insert(&format!("chunk {number}"), &[number]);
            assert_eq!(chunks.get("kept").as_deref(), Some([1, 2, 3].as_slice()));
            assert!(chunks.bytes() <= bytes, "{number}: {}", chunks.bytes());
        }
        assert!(!chunks.contains("chunk 0"));
        assert!(chunks.contains("chunk 19999"));
        assert!(chunks.evictions() > 10_000);
    }

    #[test]
    fn a_chunk_that_takes_a_whole_generation_is_not_kept() {
        let chunks = Chunks::new(32 << 10);
        chunks.insert(&"x".repeat(1024), &[]);
        assert_eq!(chunks.bytes(), 0);
    }

    #[test]
    fn words_are_bounded() {
        let words = Words::new(64 << 10);
        for number in 0..10_000_u32 {
            words.insert(&format!("word {number}"), &[number]);
            assert!(words.bytes() <= 64 << 10);
        }
        words.insert("last", &[1, 2, 3, 4, 5, 6]);
        let mut ids = vec![0];
        assert!(words.get("last", &mut ids));
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6]);
        assert!(!words.get("word 0", &mut ids));
    }
}
