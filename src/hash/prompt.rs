//! A request's prompt → its request keys.

use crate::{hash::Scheme, model::RequestKey};

/// A multimodal item covers tokens `[offset, offset + length)` and taints every block it overlaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MultimodalItem {
    /// Content hash, as the engine's events name it.
    pub hash: String,
    /// First token.
    pub offset: u32,
    /// Number of tokens.
    pub length: u32,
}

/// A tokenized prompt with everything that enters its keys.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prompt<'a> {
    /// Model name after aliases.
    pub model: &'a str,
    /// Adapter name; empty = base model.
    pub lora: &'a str,
    /// All tokens; a partial tail is no block.
    pub tokens: &'a [u32],
    /// Empty = none.
    pub cache_salt: &'a str,
    /// In any order.
    pub multimodal: &'a [MultimodalItem],
}

/// Why a prompt has no keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// An item reaches beyond the last token.
    #[error("multimodal item {item} covers tokens {offset}..{end}, the prompt has {tokens}")]
    ItemOutOfRange {
        /// Its place in the list.
        item: usize,
        /// Its first token.
        offset: u32,
        /// The token after its last one.
        end: u64,
        /// Tokens in the prompt.
        tokens: usize,
    },
}

impl Prompt<'_> {
    /// The keys of all full blocks, in order.
    ///
    /// # Errors
    ///
    /// [`PromptError::ItemOutOfRange`].
    pub fn keys(&self, scheme: &Scheme) -> Result<Vec<RequestKey>, PromptError> {
        let block_size = scheme.block_size() as usize;
        let mut items: Vec<_> = self.multimodal.iter().collect();
        for (at, item) in items.iter().enumerate() {
            let end = u64::from(item.offset) + u64::from(item.length);
            if end > self.tokens.len() as u64 {
                return Err(PromptError::ItemOutOfRange {
                    item: at,
                    offset: item.offset,
                    end,
                    tokens: self.tokens.len(),
                });
            }
        }
        // An empty item touches no block.
        items.retain(|item| item.length > 0);
        items.sort_by_key(|item| item.offset);
        let mut key = scheme.root(self.model, self.lora);
        let mut scratch = Vec::new();
        let mut extras: Vec<&[u8]> = Vec::new();
        // Items before this one end before the current block, if they are sorted by end as well;
        // overlapping items are legal, so only a prefix whose ends have all passed is skipped.
        let mut first = 0;
        let mut keys = Vec::with_capacity(self.tokens.len() / block_size);
        for (block, tokens) in self.tokens.chunks_exact(block_size).enumerate() {
            let (start, end) = ((block * block_size) as u64, ((block + 1) * block_size) as u64);
            extras.clear();
            let item_end = |item: &MultimodalItem| u64::from(item.offset) + u64::from(item.length);
            while items.get(first).is_some_and(|item| item_end(item) <= start) {
                first += 1;
            }
            for item in items.iter().skip(first) {
                if u64::from(item.offset) >= end {
                    break;
                }
                let hash = item.hash.as_bytes();
                if item_end(item) > start && !extras.contains(&hash) {
                    extras.push(hash);
                }
            }
            if block == 0 && !self.cache_salt.is_empty() {
                extras.push(self.cache_salt.as_bytes());
            }
            key = scheme.next(key, tokens, &extras, &mut scratch);
            keys.push(key);
        }
        Ok(keys)
    }
}
