//! One request's tokens and the chained hashes of its full blocks.
//!
//! As in vLLM (`v1/core/kv_cache_utils.py`), a block's hash covers the hash before it, its tokens and
//! its extra keys: LoRA name, multimodal items that touch it, and in block 0 the cache salt, in this
//! order. The hash function is XXH3 instead of SHA-256 of a pickle: consumers see an opaque number.

use std::sync::Arc;

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::wire::encode::Extra;

/// Seed of the hash of a first block; vLLM's `NONE_HASH`.
const ROOT: u64 = 0x6b76_6578_6e6f_6e65;

/// A LoRA adapter as the engine knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lora {
    /// Numeric id, from 1.
    pub id: u64,
    /// Served name.
    pub name: Arc<str>,
}

/// A multimodal item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Identifier, normally a hash of the content.
    pub identifier: String,
    /// Its first position, tokens.
    pub start: usize,
    /// Placeholder tokens that stand for it.
    pub length: usize,
}

/// What besides tokens makes two prefixes different.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The adapter, if the request names one.
    pub lora: Option<Lora>,
    /// Cache salt.
    pub salt: Option<String>,
    /// Multimodal items, by position.
    pub items: Vec<Item>,
}

impl Identity {
    /// Extra hash inputs of block `at`; `None` if there is none.
    fn extras(&self, at: usize, block_size: usize) -> Option<Vec<Extra>> {
        let mut extras = Vec::new();
        if let Some(lora) = &self.lora {
            extras.push(Extra::Text(lora.name.to_string()));
        }
        let (start, end) = (at * block_size, (at + 1) * block_size);
        for item in &self.items {
            if item.start < end && start < item.start + item.length {
                let offset = item.start as i64 - start as i64;
                extras.push(Extra::Item(item.identifier.clone(), offset));
            }
        }
        if let Some(salt) = self.salt.as_ref().filter(|_| at == 0) {
            extras.push(Extra::Text(salt.clone()));
        }
        (!extras.is_empty()).then_some(extras)
    }
}

/// Tokens of one request, prompt and output, with the hashes of their full blocks.
#[derive(Clone, Debug)]
pub struct Sequence {
    identity: Identity,
    tokens: Vec<u32>,
    hashes: Vec<u64>,
    block_size: usize,
    // Of all tokens; what a greedy decoder's next token depends on.
    state: u64,
}

impl Sequence {
    /// A prompt, cut into blocks of `block_size` tokens (at least 1).
    #[must_use]
    pub fn new(tokens: Vec<u32>, identity: Identity, block_size: usize) -> Self {
        let model = identity.lora.as_ref().map_or(0, |lora| lora.id);
        let state = xxh3_64_with_seed(bytemuck::cast_slice(&tokens), model);
        let block_size = block_size.max(1);
        let mut sequence = Self { identity, tokens, hashes: Vec::new(), block_size, state };
        sequence.hash_full_blocks();
        sequence
    }

    /// Appends a token.
    pub fn push(&mut self, token: u32) {
        self.state = xxh3_64_with_seed(&token.to_le_bytes(), self.state);
        self.tokens.push(token);
        self.hash_full_blocks();
    }

    /// All tokens.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Hashes of the full blocks, in order.
    #[must_use]
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// What besides its tokens it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A number that depends on every token and the adapter, and on nothing else.
    #[must_use]
    pub fn state(&self) -> u64 {
        self.state
    }

    /// Tokens of full block `at`.
    pub(super) fn block(&self, at: usize) -> &[u32] {
        &self.tokens[at * self.block_size..(at + 1) * self.block_size]
    }

    /// Extra keys of block `at`.
    pub(super) fn extras(&self, at: usize) -> Option<Vec<Extra>> {
        self.identity.extras(at, self.block_size)
    }

    fn hash_full_blocks(&mut self) {
        while (self.hashes.len() + 1) * self.block_size <= self.tokens.len() {
            let at = self.hashes.len();
            let parent = self.hashes.last().copied().unwrap_or(ROOT);
            let mut hash = Xxh3::with_seed(parent);
            hash.update(bytemuck::cast_slice(self.block(at)));
            for extra in self.extras(at).unwrap_or_default() {
                // A length before each, so that neighbours cannot be mistaken for one another.
                match extra {
                    Extra::Text(text) => {
                        hash.update(&(text.len() as u64).to_le_bytes());
                        hash.update(text.as_bytes());
                    }
                    Extra::Item(identifier, offset) => {
                        hash.update(&(identifier.len() as u64 | 1 << 63).to_le_bytes());
                        hash.update(identifier.as_bytes());
                        hash.update(&offset.to_le_bytes());
                    }
                    Extra::Bytes(bytes) => {
                        hash.update(&(bytes.len() as u64 | 1 << 62).to_le_bytes());
                        hash.update(&bytes);
                    }
                }
            }
            self.hashes.push(hash.digest());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tokens: &[u32], identity: Identity) -> Sequence {
        Sequence::new(tokens.to_vec(), identity, 2)
    }

    #[test]
    fn hashes_are_chained_and_depend_on_extras() {
        let plain = of(&[1, 2, 3, 4, 5], Identity::default());
        assert_eq!(plain.hashes().len(), 2);
        let mut grown = of(&[1, 2, 3], Identity::default());
        grown.push(4);
        assert_eq!(grown.hashes(), plain.hashes());
        assert_ne!(of(&[9, 9, 3, 4], Identity::default()).hashes()[1], plain.hashes()[1]);
        let salted = Identity { salt: Some("a".to_owned()), ..Identity::default() };
        assert_ne!(of(&[1, 2, 3, 4], salted.clone()).hashes()[1], plain.hashes()[1]);
        let lora = Some(Lora { id: 1, name: "a".into() });
        let adapted = of(&[1, 2, 3, 4], Identity { lora, ..Identity::default() });
        assert_ne!(adapted.hashes()[1], plain.hashes()[1]);
        assert_ne!(adapted.hashes()[1], of(&[1, 2, 3, 4], salted).hashes()[1]);
    }

    #[test]
    fn items_touch_blocks_with_signed_offsets() {
        let items = vec![Item { identifier: "x".to_owned(), start: 1, length: 3 }];
        let sequence = of(&[0; 6], Identity { items, ..Identity::default() });
        let at = |offset| Some(vec![Extra::Item("x".to_owned(), offset)]);
        assert_eq!(
            [sequence.extras(0), sequence.extras(1), sequence.extras(2)],
            [at(1), at(-1), None]
        );
    }
}
