//! Small sets of pod slots and of 64-bit keys' hashes: the building blocks of the indexes.

use std::hash::{BuildHasherDefault, Hasher};

use smallvec::SmallVec;

use crate::model::PodSlot;

/// A bitset that stores only the words between its smallest and its largest member.
///
/// A block that one pod holds costs one word, whatever the pod's number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlotSet {
    /// Number of the first stored word.
    base: u32,
    words: SmallVec<[u64; 1]>,
}

fn split(slot: PodSlot) -> (u32, u64) {
    (slot.0 / 64, 1 << (slot.0 % 64))
}

impl SlotSet {
    /// Adds a slot; returns whether it was there before.
    pub(crate) fn insert(&mut self, slot: PodSlot) -> bool {
        let (word, bit) = split(slot);
        if self.words.is_empty() {
            self.base = word;
            self.words.push(bit);
            return false;
        }
        if word < self.base {
            self.words.insert_many(0, (word..self.base).map(|_| 0));
            self.base = word;
        }
        let at = (word - self.base) as usize;
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        let was = self.words[at] & bit != 0;
        self.words[at] |= bit;
        was
    }

    /// Removes a slot if it is there.
    pub(crate) fn remove(&mut self, slot: PodSlot) {
        let (word, bit) = split(slot);
        let Some(stored) =
            word.checked_sub(self.base).and_then(|at| self.words.get_mut(at as usize))
        else {
            return;
        };
        *stored &= !bit;
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
        let leading = self.words.iter().take_while(|&&word| word == 0).count();
        if leading > 0 {
            self.words.drain(..leading);
            self.base += leading as u32;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    pub(crate) fn contains(&self, slot: PodSlot) -> bool {
        let (word, bit) = split(slot);
        word.checked_sub(self.base)
            .and_then(|at| self.words.get(at as usize))
            .is_some_and(|stored| stored & bit != 0)
    }

    /// Members in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = PodSlot> + '_ {
        ones(&self.words).map(|slot| PodSlot(slot.0 + self.base * 64))
    }

    /// `out |= self`; members beyond `out` are left out.
    pub(crate) fn or_into(&self, out: &mut [u64]) {
        for (out, word) in out.iter_mut().skip(self.base as usize).zip(&self.words) {
            *out |= word;
        }
    }
}

/// The set bits of a plain bitset, ascending.
pub(crate) fn ones(words: &[u64]) -> impl Iterator<Item = PodSlot> + '_ {
    words.iter().enumerate().flat_map(|(at, &word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            (left != 0).then(|| {
                let bit = left.trailing_zeros();
                left &= left - 1;
                PodSlot(at as u32 * 64 + bit)
            })
        })
    })
}

/// Spreads keys that are hashes already with one multiplication (Fibonacci hashing): engines'
/// keys may be small integers, and hash tables take both ends of the hash.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KeyHasher(u64);

/// For maps whose keys are 64-bit hashes.
pub(crate) type KeyHash = BuildHasherDefault<KeyHasher>;

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        let product = u128::from(self.0.rotate_left(5) ^ value) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn slot_set_is_a_set(ops in prop::collection::vec((any::<bool>(), 0u32..400), 0..200)) {
            let (mut set, mut model) = (SlotSet::default(), BTreeSet::new());
            for (insert, slot) in ops {
                if insert {
                    prop_assert_eq!(set.insert(PodSlot(slot)), !model.insert(slot));
                } else {
                    set.remove(PodSlot(slot));
                    model.remove(&slot);
                }
                prop_assert_eq!(set.iter().map(|s| s.0).collect::<Vec<_>>(),
                    model.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(set.is_empty(), model.is_empty());
                prop_assert_eq!(set.contains(PodSlot(slot)), model.contains(&slot));
            }
        }
    }
}
