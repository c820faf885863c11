//! Which endpoint was sent which prompts: what the approximate prefix-cache plugins share.
//!
//! # Model
//!
//! A prompt is cut into blocks whose hashes are [chained](Chains), so that one hash stands for a block
//! and all before it. The [store](PrefixStore) remembers for each endpoint the hashes it was last
//! sent, as many as fit into its cache; `Matcher` is what a plugin is made of: it hashes and matches
//! before scheduling and remembers after.

mod hashing;
mod length;
mod matcher;
mod metrics;
mod prompt;
mod recency;
mod store;
#[cfg(test)]
pub(super) mod testing;

pub use self::{
    hashing::{BlockHasher, Chains},
    store::PrefixStore,
};
pub(super) use self::{
    length::{MatchLength, fraction},
    matcher::{Limit, Matcher, Sizing},
    prompt::{BYTES_PER_TOKEN, input_tokens},
};

/// Blocks that are remembered per endpoint unless configured: the KV cache of a Llama 3 8B on an
/// 80 GB GPU.
pub(super) const DEFAULT_CAPACITY: usize = 31_250;

/// Most blocks that can be remembered per endpoint.
pub(super) const MAX_CAPACITY: usize = 1 << 22;
