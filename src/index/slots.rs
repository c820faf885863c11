//! Bits of sets, and hashes of 64-bit keys: the building blocks of the index.

use std::hash::{BuildHasherDefault, Hasher};

use crate::model::PodSlot;

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
