//! A request's prompt → its request keys.

use std::collections::HashMap;

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
    /// The items lie over each other so often, or have such long hashes, that hashing them would
    /// take far longer than hashing the tokens.
    #[error("multimodal items touch {work} blocks in sum, the limit of this prompt is {limit}")]
    TooManyOverlaps {
        /// Blocks touched, each item's counted; a hash of 128 bytes or more counts several times.
        work: usize,
        /// What a prompt of this size may have.
        limit: usize,
    },
}

/// Bytes of an item's hash that cost no more than finding the item.
const HASH_UNIT: usize = 128;
/// Items that may lie over a block, on average.
const OVERLAPS: usize = 8;
/// Touched blocks that any prompt may have.
const FREE_OVERLAPS: usize = 1 << 16;

/// Where an item lies, and which of the distinct hashes it has.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    end: usize,
    hash: usize,
}

impl Prompt<'_> {
    /// The keys of all full blocks, in order.
    ///
    /// # Errors
    ///
    /// See [`PromptError`].
    pub fn keys(&self, scheme: &Scheme) -> Result<Vec<RequestKey>, PromptError> {
        let block_size = scheme.block_size() as usize;
        let (spans, hashes) = self.spans(block_size)?;
        let mut spans = spans.into_iter().peekable();
        let mut key = scheme.root(self.model, self.lora);
        if hashes.is_empty() && self.cache_salt.is_empty() {
            return Ok(scheme.chain(key, self.tokens));
        }
        let mut scratch = Vec::new();
        let mut extras: Vec<&[u8]> = Vec::new();
        // The items over the current block, by start.
        let mut over: Vec<Span> = Vec::new();
        // By hash: the last end of a block that has it among its extras.
        let mut seen = vec![0; hashes.len()];
        let mut keys = Vec::with_capacity(self.tokens.len() / block_size);
        for (block, tokens) in self.tokens.chunks_exact(block_size).enumerate() {
            let (start, end) = (block * block_size, (block + 1) * block_size);
            extras.clear();
            over.retain(|span| span.end > start);
            while let Some(span) = spans.next_if(|span| span.start < end) {
                over.push(span);
            }
            for span in &over {
                if std::mem::replace(&mut seen[span.hash], end) != end {
                    extras.push(hashes[span.hash]);
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

    /// The items by start, and their distinct hashes.
    fn spans(&self, block_size: usize) -> Result<(Vec<Span>, Vec<&[u8]>), PromptError> {
        let blocks = self.tokens.len() / block_size;
        let limit = OVERLAPS * (blocks + self.multimodal.len()) + FREE_OVERLAPS;
        let (mut spans, mut hashes) = (Vec::new(), Vec::new());
        let (mut numbers, mut work) = (HashMap::new(), 0);
        for (at, item) in self.multimodal.iter().enumerate() {
            let end = u64::from(item.offset) + u64::from(item.length);
            if end > self.tokens.len() as u64 {
                return Err(PromptError::ItemOutOfRange {
                    item: at,
                    offset: item.offset,
                    end,
                    tokens: self.tokens.len(),
                });
            }
            // An empty item touches no block.
            if item.length == 0 {
                continue;
            }
            let (start, end) = (item.offset as usize, end as usize);
            let touched = end.div_ceil(block_size).min(blocks).saturating_sub(start / block_size);
            work += touched * (1 + item.hash.len() / HASH_UNIT);
            if work > limit {
                return Err(PromptError::TooManyOverlaps { work, limit });
            }
            let hash = *numbers.entry(item.hash.as_bytes()).or_insert_with_key(|hash| {
                hashes.push(*hash);
                hashes.len() - 1
            });
            spans.push(Span { start, end, hash });
        }
        spans.sort_by_key(|span| span.start);
        Ok((spans, hashes))
    }
}
