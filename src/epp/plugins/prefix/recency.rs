//! The blocks that one endpoint was last sent, as many as it can hold.
//!
//! # Model
//!
//! A least-recently-used set of hashes. A prompt's blocks are used **last block first**, so that of
//! two blocks of a prompt the earlier one is always the more recent: whenever a block is held, all
//! before it are, and what is evicted is the end of some prompt. So the number of leading blocks held
//! is found by bisection, and it is also what counting all held blocks would give.
//!
//! # Concurrency
//!
//! Readers probe a table of atomic words without any lock or wait. One writer at a time changes it.
//! A reader beside a writer may miss a block that is being moved within the table, or see a prompt
//! that is half remembered: its answer is a little off, for that moment.
//!
//! # Cost
//!
//! On one core of a busy virtual machine, 64 full sets of 31 250 in turn, so that none is in a cache: a
//! prompt of 1024 new blocks is remembered in 100 µs, a known one in 44 µs; its depth in all 64 sets
//! is found in 11 µs.
//!
//! Per block 16 bytes in the list, and 8 bytes in the table, which is at most ¾ and, once it has
//! grown, at least ⅜ full: 27 to 37 bytes. A word of the table has 40 bits of the hash; by chance a
//! reader takes a block for another once in 10⁷ questions about a full table. Writers compare whole
//! hashes.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use arc_swap::ArcSwap;

use crate::support::sync::lock;

/// Words of the first table, a power of two.
const FIRST_WORDS: usize = 1 << 9;
/// Bits of a word that say which node of the list it is, plus one; the others are the hash's highest.
const NODE_BITS: u32 = 24;
const NONE: u32 = u32::MAX;
/// Blocks whose places are read ahead.
const AHEAD: usize = 32;

/// Hash → node of the list: open addressing, linear probing, no tombstones. A word of 0 is free.
#[derive(Debug)]
struct Table {
    words: Box<[AtomicU64]>,
    /// By how much a hash is shifted to give its first place.
    shift: u32,
}

impl Table {
    fn new(words: usize) -> Self {
        let shift = u64::BITS - words.trailing_zeros();
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect(), shift }
    }

    /// Places in the order in which `hash` is looked for.
    fn places(&self, hash: u64) -> impl Iterator<Item = usize> + use<> {
        let (first, mask) = ((hash >> self.shift) as usize, self.words.len() - 1);
        (0..=mask).map(move |step| (first + step) & mask)
    }

    fn contains(&self, hash: u64) -> bool {
        for place in self.places(hash) {
            let word = self.words[place].load(Relaxed);
            if word == 0 {
                return false;
            }
            if (word ^ hash) >> NODE_BITS == 0 {
                return true;
            }
        }
        false
    }

    /// The node with this hash, as `nodes` confirm it; else the place where it would go.
    fn find(&self, hash: u64, nodes: &[Node]) -> Result<u32, usize> {
        for place in self.places(hash) {
            let word = self.words[place].load(Relaxed);
            if word == 0 {
                return Err(place);
            }
            if (word ^ hash) >> NODE_BITS == 0 && nodes[node_of(word) as usize].hash == hash {
                return Ok(node_of(word));
            }
        }
        // Not reached: a table is never full.
        Err(0)
    }

    fn put(&self, place: usize, hash: u64, node: u32) {
        let word = hash >> NODE_BITS << NODE_BITS | u64::from(node + 1);
        self.words[place].store(word, Relaxed);
    }

    /// Frees the place of a node and closes the gap, so that no probe ends too early.
    fn remove(&self, hash: u64, node: u32) {
        let mask = self.words.len() - 1;
        let is_it = |place: &usize| {
            let word = self.words[*place].load(Relaxed);
            word != 0 && node_of(word) == node
        };
        let Some(mut gap) = self.places(hash).find(is_it) else { return };
        let mut next = gap;
        loop {
            next = (next + 1) & mask;
            let word = self.words[next].load(Relaxed);
            if word == 0 {
                break;
            }
            let first = (word >> self.shift) as usize;
            // May go back if its first place is not after the gap.
            if next.wrapping_sub(first) & mask >= next.wrapping_sub(gap) & mask {
                self.words[gap].store(word, Relaxed);
                gap = next;
            }
        }
        self.words[gap].store(0, Relaxed);
    }
}

fn node_of(word: u64) -> u32 {
    (word & ((1 << NODE_BITS) - 1)) as u32 - 1
}

#[derive(Clone, Copy, Debug)]
struct Node {
    hash: u64,
    /// The more recent neighbour.
    newer: u32,
    /// The less recent one.
    older: u32,
}

/// The list, for whoever changes the set.
#[derive(Debug)]
struct Writer {
    nodes: Vec<Node>,
    newest: u32,
    oldest: u32,
    capacity: usize,
    /// The endpoint is gone, nothing is taken any more.
    closed: bool,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Recency {
    table: ArcSwap<Table>,
    writer: Mutex<Writer>,
}

impl Recency {
    /// An empty set of at most `capacity` hashes, 1 to 2²³.
    pub(super) fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, 1 << (NODE_BITS - 1));
        Self {
            table: ArcSwap::from_pointee(Table::new(FIRST_WORDS)),
            writer: Mutex::new(Writer {
                nodes: Vec::new(),
                newest: NONE,
                oldest: NONE,
                capacity,
                closed: false,
            }),
        }
    }

    /// Leading blocks of `chain` that are held. O(log chain).
    pub(super) fn depth(&self, chain: &[u64]) -> usize {
        let table = self.table.load();
        // Most questions are answered by the ends: unknown, or asked again.
        match (chain.first(), chain.last()) {
            (Some(&first), Some(&last)) if table.contains(first) => {
                if table.contains(last) {
                    return chain.len();
                }
            }
            _ => return 0,
        }
        chain.partition_point(|&hash| table.contains(hash))
    }

    /// Remembers a prompt's blocks; gives by how much the set has grown.
    pub(super) fn insert(&self, chain: &[u64]) -> usize {
        let mut writer = lock(&self.writer);
        if writer.closed {
            return 0;
        }
        let before = writer.nodes.len();
        // The end of what does not fit would be evicted by its own beginning.
        let chain = &chain[..chain.len().min(writer.capacity)];
        let held = self.depth(chain);
        if held < chain.len() && before + chain.len() - held > writer.capacity {
            // Whatever is evicted for the new blocks must not be what is held of this prompt.
            let table = self.table.load();
            for &hash in chain[..held].iter().rev() {
                if let Ok(node) = table.find(hash, &writer.nodes) {
                    writer.refresh(node);
                }
            }
        }
        for blocks in chain.rchunks(AHEAD) {
            writer.fetch(&self.table.load(), blocks);
            for &hash in blocks.iter().rev() {
                self.touch(&mut writer, hash);
            }
        }
        writer.nodes.len() - before
    }

    /// Empties the set for good; gives how many it held.
    pub(super) fn close(&self) -> usize {
        let mut writer = lock(&self.writer);
        writer.closed = true;
        let held = std::mem::take(&mut writer.nodes);
        self.table.store(Table::new(FIRST_WORDS).into());
        held.len()
    }

    fn touch(&self, writer: &mut Writer, hash: u64) {
        let mut table = self.table.load();
        let mut place = match table.find(hash, &writer.nodes) {
            Ok(node) => return writer.refresh(node),
            Err(place) => place,
        };
        let node = if writer.nodes.len() < writer.capacity {
            if (writer.nodes.len() + 1) * 4 > table.words.len() * 3 {
                self.grow(&table, writer);
                table = self.table.load();
                place = table.find(hash, &writer.nodes).err().unwrap_or(0);
            }
            writer.nodes.push(Node { hash, newer: NONE, older: NONE });
            writer.nodes.len() as u32 - 1
        } else {
            let node = writer.oldest;
            table.remove(writer.nodes[node as usize].hash, node);
            writer.unlink(node);
            writer.nodes[node as usize].hash = hash;
            // Closing the gap may have moved the free place.
            place = table.find(hash, &writer.nodes).err().unwrap_or(place);
            node
        };
        writer.link(node);
        table.put(place, hash, node);
    }

    fn grow(&self, table: &Table, writer: &Writer) {
        let larger = Table::new(table.words.len() * 2);
        for (node, Node { hash, .. }) in writer.nodes.iter().enumerate() {
            if let Err(place) = larger.find(*hash, &writer.nodes) {
                larger.put(place, *hash, node as u32);
            }
        }
        self.table.store(larger.into());
    }

    /// Hashes, most recent first.
    #[cfg(test)]
    pub(super) fn hashes(&self) -> Vec<u64> {
        let writer = lock(&self.writer);
        let mut hashes = Vec::new();
        let mut at = writer.newest;
        while at != NONE {
            let node = writer.nodes[at as usize];
            hashes.push(node.hash);
            at = node.older;
        }
        assert_eq!(hashes.len(), writer.nodes.len());
        let table = self.table.load();
        let used = table.words.iter().filter(|word| word.load(Relaxed) != 0).count();
        assert_eq!(hashes.len(), used);
        assert!(hashes.iter().all(|&hash| table.contains(hash)));
        hashes
    }
}

impl Writer {
    /// Reads the places that remembering these blocks is going to need, those of the blocks which give
    /// way included: many reads at once wait for memory little longer than one does.
    fn fetch(&self, table: &Table, blocks: &[u64]) {
        let mut words = 0;
        let mut read =
            |hash: u64| words ^= table.words[(hash >> table.shift) as usize].load(Relaxed);
        let mut oldest = self.oldest;
        for &hash in blocks {
            read(hash);
            if let Some(node) = self.nodes.get(oldest as usize) {
                read(node.hash);
                oldest = node.newer;
            }
        }
        std::hint::black_box(words);
    }

    /// Makes a node the most recent one.
    fn refresh(&mut self, node: u32) {
        if node != self.newest {
            self.unlink(node);
            self.link(node);
        }
    }

    fn unlink(&mut self, node: u32) {
        let Node { newer, older, .. } = self.nodes[node as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
    }

    fn link(&mut self, node: u32) {
        let older = self.newest;
        let own = &mut self.nodes[node as usize];
        (own.newer, own.older) = (NONE, older);
        match older {
            NONE => self.oldest = node,
            older => self.nodes[older as usize].newer = node,
        }
        self.newest = node;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    /// A chain as hashes come: each from the one before.
    fn chain(blocks: &[u8]) -> Vec<u64> {
        let mut parent = 0;
        let step = |&block: &u8| {
            parent = xxh3_64(&[&[block][..], &u64::to_le_bytes(parent)].concat());
            parent
        };
        blocks.iter().map(step).collect()
    }

    /// The definition: a list, most recent first.
    struct Naive(VecDeque<u64>, usize);

    impl Naive {
        fn insert(&mut self, chain: &[u64]) {
            for hash in chain.iter().rev() {
                self.0.retain(|known| known != hash);
                self.0.push_front(*hash);
            }
            self.0.truncate(self.1);
        }

        /// As the Go EPP counts: all that are held, wherever they are.
        fn held(&self, chain: &[u64]) -> usize {
            chain.iter().filter(|hash| self.0.contains(hash)).count()
        }
    }

    proptest! {
        #[test]
        fn it_is_the_naive_list(
            capacity in 1_usize..40,
            prompts in prop::collection::vec(prop::collection::vec(0_u8..3, 0..12), 0..60),
        ) {
            let recency = Recency::new(capacity);
            let mut naive = Naive(VecDeque::new(), capacity);
            let mut len = 0;
            for prompt in &prompts {
                let chain = chain(prompt);
                prop_assert_eq!(recency.depth(&chain), naive.held(&chain));
                len += recency.insert(&chain);
                naive.insert(&chain);
                prop_assert_eq!(recency.hashes(), Vec::from(naive.0.clone()));
                prop_assert_eq!(len, naive.0.len());
            }
        }
    }

    #[test]
    fn a_full_set_stays_right_for_long() {
        let recency = Recency::new(3000);
        let mut naive = Naive(VecDeque::new(), 3000);
        for round in 0..400_u64 {
            let prompt: Vec<u64> = (0..50)
                .map(|block| xxh3_64(&(round * 37 % 113 * 100 + block).to_le_bytes()))
                .collect();
            recency.insert(&prompt);
            naive.insert(&prompt);
        }
        assert_eq!(recency.hashes(), Vec::from(naive.0));
    }

    #[test]
    fn ends_of_prompts_go_first() {
        let recency = Recency::new(4);
        let (old, new) = (chain(b"abcd"), chain(b"xy"));
        recency.insert(&old);
        assert_eq!(recency.insert(&new), 0);
        assert_eq!((recency.depth(&old), recency.depth(&new)), (2, 2));
        // More than fits: its beginning is kept.
        let long = chain(b"abcdefgh");
        recency.insert(&long);
        assert_eq!((recency.depth(&long), recency.depth(&new)), (4, 0));
    }

    #[test]
    fn a_closed_set_takes_nothing() {
        let recency = Recency::new(4);
        let blocks = chain(b"abc");
        assert_eq!(recency.insert(&blocks), 3);
        assert_eq!(recency.close(), 3);
        assert_eq!((recency.insert(&blocks), recency.depth(&blocks)), (0, 0));
    }
}
