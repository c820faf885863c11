//! KV-event batches as vLLM 0.9 … 0.33 and SGLang 0.4.7 … 0.5.23 send them.
//!
//! | file | what it is for |
//! | --- | --- |
//! | `frame` | ZeroMQ frames → sequence, payload; topic → pod, model |
//! | `batch` | payload → header, events one at a time; limits |
//! | `event` | one event in array or map form |
//! | `extra` | lazy view of the extra hash inputs |
//! | `msgpack` | the cursor under all of them |
//! | `error` | why a message or an event was refused |
//! | [`encode`] | the other direction, for mock engines and tests |
//! | [`fuzz`] | properties over arbitrary bytes |
//!
//! Invariants: nothing that a peer sends panics, loops longer than its bytes or allocates past
//! [`Limits`]. A payload is refused as a whole only if it is not a batch; an event that is wrong
//! or unknown is refused alone. Hashes are opaque: never recomputed, never compared across pods.
//!
//! # Examples
//!
//! ```
//! use kv_indexer::wire::{BatchReader, Event, Limits, Scratch, encode};
//!
//! let batch = encode::Batch {
//!     timestamp: 1.5,
//!     events: vec![encode::Event::AllBlocksCleared],
//!     rank: Some(0),
//! };
//! let payload = batch.encode(encode::Form::Map)?;
//!
//! let mut reader = BatchReader::new(&payload, &Limits::default())?;
//! assert_eq!(reader.header().rank, Some(0));
//! let mut scratch = Scratch::default(); // kept for the next batch
//! while let Some(event) = reader.next_event(&mut scratch) {
//!     match event {
//!         Ok(event) => assert_eq!(event, Event::Cleared),
//!         Err(refused) => println!("{}: {refused}", refused.reason()),
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
pub mod encode;
mod error;
mod event;
mod extra;
mod frame;
pub mod fuzz;
mod msgpack;

pub use self::{
    batch::{BatchHeader, BatchReader, Scratch, header},
    error::{DecodeError, EventError},
    extra::{BlockExtraKeys, ExtraBlocks},
    frame::{Frames, MAX_MODEL_BYTES, ReplayReply, Topic},
};
use crate::model::EngineKey;

/// One KV event, borrowed from the payload and from the reader's scratch space.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<'a> {
    /// Blocks were stored.
    Stored(BlockStored<'a>),
    /// Blocks were removed.
    Removed(BlockRemoved<'a>),
    /// Every block of the publisher is gone, in every tier.
    Cleared,
}

/// `BlockStored`: one physical copy of each named block.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockStored<'a> {
    /// Engine keys, in prefix order. May be fewer than the tokens' blocks (sparse groups), or none.
    pub block_hashes: &'a [EngineKey],
    /// The block before the first one; absent at the start of a prompt.
    pub parent: Option<EngineKey>,
    /// Tokens of the whole span; empty on placeholder (offload) events. EAGLE pairs: first elements.
    pub tokens: &'a [u32],
    /// Tokens per block as the engine says; 0 on placeholder events.
    pub block_size: u32,
    /// Deprecated numeric adapter id.
    pub lora_id: Option<u64>,
    /// Adapter name.
    pub lora_name: Option<&'a str>,
    /// The tier's name on the wire.
    pub medium: Option<&'a str>,
    /// Extra hash inputs per block, if the event carries any that is not nil.
    pub extra_keys: Option<ExtraKeys<'a>>,
    /// SGLang's cache salt.
    pub cache_salt: Option<&'a str>,
    /// Attention group of a hybrid model.
    pub group: Option<u32>,
    /// `kv_cache_spec_kind`, such as `full_attention`.
    pub kind: Option<&'a str>,
    /// Width of the group's sliding window in tokens.
    pub sliding_window: Option<u32>,
    /// `LOCAL` or `REMOTE`.
    pub locality: Option<&'a str>,
}

/// `BlockRemoved`: one physical copy of each named block is gone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockRemoved<'a> {
    /// Engine keys.
    pub block_hashes: &'a [EngineKey],
    /// The tier's name on the wire.
    pub medium: Option<&'a str>,
    /// Attention group of a hybrid model.
    pub group: Option<u32>,
    /// `LOCAL` or `REMOTE`.
    pub locality: Option<&'a str>,
}

/// Extra hash inputs of an event, one list per block; a view into the validated payload. Equal if
/// the bytes are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExtraKeys<'a> {
    raw: &'a [u8],
    blocks: usize,
}

/// What one batch may ask for; checked before anything is allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the payload.
    pub payload_bytes: usize,
    /// Events in the batch.
    pub events: usize,
    /// Blocks in one event.
    pub blocks: usize,
    /// Tokens in one event.
    pub tokens: usize,
    /// Nesting of msgpack containers: the batch is 1, its events 3, a pair in extra keys 6. More
    /// than 64 counts as 64.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            payload_bytes: 64 << 20,
            events: 1 << 20,
            blocks: 1 << 17,
            tokens: 1 << 22,
            depth: 32,
        }
    }
}

#[cfg(test)]
mod tests;
