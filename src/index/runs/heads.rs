//! First block of a run → the run: a hash table that readers probe without a lock.
//!
//! A slot holds 32 bits of the key's hash and the run's number. Slots never move, and a freed one
//! keeps a tombstone, so a reader that meets a writer still finds every run that stays. A table
//! that fills up is copied into a new one, which the readers' snapshot then names.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::RequestKey;

/// Tables; each has a writers' lock of its own.
pub(super) const SHARDS: usize = 64;
const EMPTY: u64 = 0;
const TOMBSTONE: u64 = u32::MAX as u64;

/// One shard's slots.
#[derive(Debug)]
pub(super) struct Table {
    slots: Box<[AtomicU64]>,
}

/// What the writers of a shard know of its table.
#[derive(Debug, Default)]
pub(super) struct Load {
    live: usize,
    tombstones: usize,
}

/// Shard and tag of a key.
pub(super) fn place(key: RequestKey) -> (usize, u32) {
    // Fibonacci hashing: keys are hashes already, of whatever quality.
    let mixed = key.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 58) as usize % SHARDS, (mixed >> 24) as u32)
}

impl Table {
    pub(super) fn new(slots: usize) -> Self {
        Self { slots: (0..slots.next_power_of_two()).map(|_| AtomicU64::new(EMPTY)).collect() }
    }

    fn probe(&self, tag: u32) -> impl Iterator<Item = &AtomicU64> {
        let mask = self.slots.len() - 1;
        (0..self.slots.len()).map(move |step| &self.slots[(tag as usize + step) & mask])
    }

    /// The runs that may begin with a key of this tag.
    pub(super) fn candidates(&self, tag: u32) -> impl Iterator<Item = u32> {
        self.probe(tag)
            .map(|slot| slot.load(Ordering::Acquire))
            .take_while(|&word| word != EMPTY)
            .filter(move |&word| (word >> 32) as u32 == tag && word as u32 != u32::MAX)
            .map(|word| word as u32 - 1)
    }

    /// Adds a run; the caller holds the shard's lock and has seen that there is room.
    fn insert(&self, tag: u32, run: u32) -> bool {
        let word = u64::from(tag) << 32 | u64::from(run + 1);
        let free = |slot: &&AtomicU64| matches!(slot.load(Ordering::Relaxed), EMPTY | TOMBSTONE);
        let Some(slot) = self.probe(tag).find(free) else { return false };
        let was_tombstone = slot.load(Ordering::Relaxed) == TOMBSTONE;
        slot.store(word, Ordering::Release);
        was_tombstone
    }

    pub(super) fn bytes(&self) -> u64 {
        size_of_val(&*self.slots) as u64
    }
}

impl Load {
    /// Adds a run. Returns a new table if the old one is too full.
    pub(super) fn insert(&mut self, table: &Table, tag: u32, run: u32) -> Option<Table> {
        let slots = table.slots.len();
        self.live += 1;
        if (self.live + self.tombstones) * 8 <= slots * 7 {
            self.tombstones -= usize::from(table.insert(tag, run));
            return None;
        }
        self.tombstones = 0;
        // At most half full, so that the next copy is far away.
        let new = Table::new((self.live * 2).max(8));
        for word in table.slots.iter().map(|slot| slot.load(Ordering::Relaxed)) {
            if word != EMPTY && word != TOMBSTONE {
                new.insert((word >> 32) as u32, word as u32 - 1);
            }
        }
        new.insert(tag, run);
        Some(new)
    }

    /// Takes a run out.
    pub(super) fn remove(&mut self, table: &Table, tag: u32, run: u32) {
        let word = u64::from(tag) << 32 | u64::from(run + 1);
        let found = table
            .probe(tag)
            .take_while(|slot| slot.load(Ordering::Relaxed) != EMPTY)
            .find(|slot| slot.load(Ordering::Relaxed) == word);
        if let Some(slot) = found {
            slot.store(TOMBSTONE, Ordering::Release);
            self.live -= 1;
            self.tombstones += 1;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_table_is_a_map(ops in prop::collection::vec((any::<bool>(), 0u32..60), 0..400)) {
            let (mut table, mut load) = (Table::new(8), Load::default());
            let mut model: BTreeMap<u32, u32> = BTreeMap::new();
            for (add, run) in ops {
                // Few tags, so that they collide.
                let tag = run % 7 + 0xffff_fff0;
                if add && !model.contains_key(&run) {
                    if let Some(new) = load.insert(&table, tag, run) {
                        table = new;
                    }
                    model.insert(run, tag);
                } else if !add && model.remove(&run).is_some() {
                    load.remove(&table, tag, run);
                }
                for tag in 0xffff_fff0..0xffff_fff7 {
                    let mut got: Vec<u32> = table.candidates(tag).collect();
                    got.sort_unstable();
                    let want: Vec<u32> =
                        model.iter().filter(|m| *m.1 == tag).map(|m| *m.0).collect();
                    prop_assert_eq!(got, want);
                }
            }
        }
    }
}
