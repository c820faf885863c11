//! The block index: which pod holds which block of which prefix, on which tier.
//!
//! # Model
//!
//! A pod's events name *engine blocks* by opaque engine keys and carry their tokens. The index
//! lays the engine blocks over *request blocks* (`block_size` tokens of the pod's
//! [`Scheme`]) by token position, and answers, for a chain of request keys,
//! how many leading blocks each pod holds. ARCHITECTURE.md, "Semantics", is the contract;
//! [`naive`] implements that page word for word and every other index is compared with it.
//!
//! # Invariants
//!
//! * No lookup reports a block that no event has reported as stored for this very prefix, or
//!   whose every copy has been reported removed.
//! * After [`BlockIndex::clear`] or [`BlockIndex::unregister`] returned, no later lookup sees the
//!   blocks of before; a slot is reused only then.
//! * Nothing here does I/O, awaits, logs, or knows about gRPC or ZeroMQ.
//!
//! # Concurrency
//!
//! Writes for one slot come from one thread at a time, in order. Lookups run on any thread and
//! wait at most while a run that they read is written. Each block's membership is read at some
//! instant during the call, so an answer is exact for every pod to which nothing was applied
//! meanwhile.

mod image;
mod joints;
mod keymap;
mod ledger;
mod marks;
pub mod naive;
mod orphans;
mod place;
pub mod runs;
mod slots;

use std::{sync::Arc, time::Instant};

pub use self::image::{Anchors, ImageBuilder, ImageError, RowImage};
pub(crate) use self::image::{Reader, Writer};

use crate::{
    hash::Scheme,
    model::{CountMode, EngineKey, ExtraKey, GroupKind, PodSlot, RequestKey, TierId, TierTable},
};

/// What a row needs to be indexed.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Hash settings of the pod's model; their block size is the request block size.
    pub scheme: Arc<Scheme>,
    /// Model name that roots the request keys.
    pub model: Arc<str>,
    /// How stores and removals add up.
    pub count_mode: CountMode,
}

/// Extra hash inputs per engine block.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras<'a> {
    /// The inputs of all blocks, in order.
    pub items: &'a [ExtraKey<'a>],
    /// For each block, the end of its inputs in `items`. Empty: no block has any.
    pub ends: &'a [u32],
}

impl<'a> Extras<'a> {
    /// The inputs of block `at`.
    #[must_use]
    pub fn of(&self, at: usize) -> &'a [ExtraKey<'a>] {
        let end = self.ends.get(at).copied().unwrap_or_default() as usize;
        let start =
            at.checked_sub(1).map_or(0, |p| self.ends.get(p).copied().unwrap_or(0) as usize);
        self.items.get(start..end).unwrap_or_default()
    }
}

/// One `BlockStored` event.
#[derive(Clone, Copy, Debug)]
pub struct Store<'a> {
    /// Engine keys in prefix order.
    pub keys: &'a [EngineKey],
    /// The block before the first one; absent at the start of a prompt.
    pub parent: Option<EngineKey>,
    /// Tokens of the span. The event is *dense* if their number is `keys × block_size`; otherwise
    /// its keys are placed by what the same keys mean elsewhere in the pod.
    pub tokens: &'a [u32],
    /// Tokens per engine block.
    pub block_size: u32,
    /// Adapter name; numeric ids of engines without names come as decimals.
    pub lora: Option<&'a str>,
    /// Extra hash inputs per block.
    pub extras: Extras<'a>,
    /// Salt of the whole prompt, when the engine reports it apart from the extras (SGLang).
    pub salt: Option<&'a str>,
    /// Attention group.
    pub group: Option<u32>,
    /// What the group asks of a prefix; absent when the event does not say: then what the group
    /// said before, or full attention.
    pub kind: Option<GroupKind>,
    /// Tier that holds the copy.
    pub tier: TierId,
    /// Arrival, for the time limit of orphans.
    pub at: Instant,
}

impl<'a> Store<'a> {
    /// A store on the GPU that arrives now, without adapter, extra inputs or attention group.
    #[must_use]
    pub fn simple(
        keys: &'a [EngineKey],
        parent: Option<EngineKey>,
        tokens: &'a [u32],
        block_size: u32,
    ) -> Self {
        Self {
            keys,
            parent,
            tokens,
            block_size,
            lora: None,
            extras: Extras::default(),
            salt: None,
            group: None,
            kind: None,
            tier: TierTable::GPU,
            at: Instant::now(),
        }
    }
}

/// One `BlockRemoved` event.
#[derive(Clone, Copy, Debug)]
pub struct Remove<'a> {
    /// Engine keys.
    pub keys: &'a [EngineKey],
    /// Attention group.
    pub group: Option<u32>,
    /// Tier that held the copy.
    pub tier: TierId,
    /// Sequence of the batch, remembered for `Explain`.
    pub sequence: u64,
}

/// Sequence that [`BlockIndex::removed_at`] tells of blocks that were dropped as unconfirmed. No
/// batch has it.
pub const DROPPED: u64 = u64::MAX;

/// What [`BlockIndex::drop_unconfirmed`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Blocks taken out, counted as in [`PodUsage::unconfirmed`].
    pub blocks: u64,
    /// There may be more.
    pub more: bool,
}

/// What became of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreOutcome {
    /// Engine blocks that now have a position.
    pub placed: u32,
    /// Engine blocks that are held but have no position yet (placeholder, sparse, orphan).
    pub unplaced: u32,
    /// The event waits for its parent: blocks in the orphan buffer because of it.
    pub orphaned: u32,
    /// Blocks of earlier orphans that this store gave a position.
    pub attached: u32,
    /// Orphans dropped because the buffer was full.
    pub orphans_dropped: u32,
    /// Live engine keys that were stored again with other tokens or another parent.
    pub conflicting: u32,
    /// Blocks refused because the index is at its cap.
    pub refused: u32,
}

/// Limits and weights of an index.
#[derive(Clone, Debug)]
pub struct IndexConfig {
    /// Tier names and weights.
    pub tiers: Arc<TierTable>,
    /// Weight of a block that only a speculative entry claims.
    pub speculative_weight: f64,
    /// Estimated bytes beyond which stores are refused.
    pub cap_bytes: u64,
    /// Blocks per pod that may wait for an unknown parent.
    pub orphan_blocks: usize,
    /// Rows at most; beyond 32 767 it is as many.
    pub max_pods: usize,
}

impl Default for IndexConfig {
    fn default() -> Self {
        Self {
            tiers: Arc::default(),
            speculative_weight: 1.0,
            cap_bytes: 4 << 30,
            orphan_blocks: 65_536,
            max_pods: 4096,
        }
    }
}

/// How much a pod holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodUsage {
    /// Engine blocks held, counted once per attention group.
    pub blocks: u64,
    /// Engine blocks held per tier id.
    pub blocks_by_tier: Vec<u64>,
    /// Blocks that wait for their parent.
    pub orphans: u64,
    /// Estimate of the memory that the pod's entries take, in bytes.
    pub bytes: u64,
    /// Some attention group is of a kind that is not scored.
    pub hybrid_unsupported: bool,
    /// Adapter names seen, at most [`MAX_LORAS`](Self::MAX_LORAS).
    pub loras: Vec<Arc<str>>,
    /// Engine block sizes seen, at most 8.
    pub block_sizes: Vec<u32>,
    /// Of `blocks_by_tier`, those that are announced once more at least than removed.
    pub repeated: u64,
    /// Of `blocks_by_tier`, those that no store has named since the latest [`BlockIndex::doubt`].
    pub unconfirmed: u64,
}

impl PodUsage {
    /// Adapter names remembered at most.
    pub const MAX_LORAS: usize = 64;
    /// Repeated blocks from which they mean something: a few are copies that requests made at once.
    const MANY_REPEATED: u64 = 64;

    /// Does the engine look like one that announces blocks again which it holds already? More than
    /// half of them, and not only a few. Counted as copies they outlive their removal.
    #[must_use]
    pub fn reannounces(&self) -> bool {
        let held: u64 = self.blocks_by_tier.iter().sum();
        self.repeated >= Self::MANY_REPEATED && self.repeated > held / 2
    }
}

/// How much the index holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexUsage {
    /// Distinct request keys.
    pub keys: u64,
    /// Estimate of all memory, in bytes.
    pub bytes: u64,
    /// The cap, in bytes.
    pub cap_bytes: u64,
}

/// A pod's share of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// The row.
    pub slot: PodSlot,
    /// Contiguous leading blocks, speculative entries included.
    pub depth: u32,
    /// `depth` by events alone.
    pub confirmed: u32,
    /// Sum over the depth of each block's largest tier weight.
    pub score: f64,
    /// Contiguous leading blocks of each tier on its own; filled only when asked for. Depth 0 is absent.
    pub tiers: Vec<(TierId, u32)>,
    /// Contiguous leading blocks of speculative entries on their own.
    pub speculative: u32,
}

/// Thread-safe map from prefix to the pods that hold it.
pub trait BlockIndex: Send + Sync + std::fmt::Debug {
    /// Adds a row; `None` when there are as many rows as the index can number.
    fn register(&self, spec: PodSpec) -> Option<PodSlot>;
    /// Gives a row another spec. Its blocks go, its speculative marks stay.
    fn respec(&self, slot: PodSlot, spec: PodSpec);
    /// Removes a row and everything it held. Unknown slots are ignored, here and below.
    fn unregister(&self, slot: PodSlot);
    /// Applies a `BlockStored` event.
    fn store(&self, slot: PodSlot, store: &Store<'_>) -> StoreOutcome;
    /// Applies a `BlockRemoved` event. Unknown keys are ignored.
    fn remove(&self, slot: PodSlot, remove: &Remove<'_>);
    /// Forgets every block of the row, in every tier and group.
    fn clear(&self, slot: PodSlot);
    /// Changes how the row counts from now on.
    fn set_count_mode(&self, slot: PodSlot, mode: CountMode);
    /// A muted row keeps its entries and scores nothing.
    fn set_muted(&self, slot: PodSlot, muted: bool);
    /// Drops orphans that arrived before `before`; returns how many blocks.
    fn expire_orphans(&self, slot: PodSlot, before: Instant) -> usize;
    /// Marks `keys`, the leading blocks of a prompt, as expected on the row, under a caller-chosen
    /// mark. A later store of a key confirms it, which ends every mark on it.
    fn speculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64);
    /// Takes back what is left of a mark.
    fn unspeculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64);
    /// The pods that hold `keys[0]`, and how much of the prefix, in slot order. `out` is cleared
    /// first. With `tiers`, each match lists its tiers.
    ///
    /// Cost: one probe per block up to the deepest match; all of `keys` while there is a row of
    /// window groups only, which can hold again behind a hole.
    fn lookup(&self, keys: &[RequestKey], tiers: bool, out: &mut Vec<Match>);
    /// The rows that hold `keys[block]` in any group and tier, events only, in slot order.
    fn holders(&self, keys: &[RequestKey], block: usize) -> Vec<PodSlot>;
    /// Sequence of the batch that last removed `key` from the row, if it is among the last 4 096.
    fn removed_at(&self, slot: PodSlot, key: RequestKey) -> Option<u64>;
    /// Events of the row were lost: from now on everything that it holds is unconfirmed until a store
    /// names it again, in its group and tier, or [`confirm`](Self::confirm) does. A later doubt
    /// begins anew; a clear ends it. Returns the doubt's number, which grows during the row's life.
    fn doubt(&self, slot: PodSlot) -> u64;
    /// Takes some of the blocks out that are unconfirmed since the doubt of that number: looks at
    /// some 16 000 blocks (a few milliseconds), so that the row's writer is not kept long. Call it
    /// until there is no more.
    fn drop_unconfirmed(&self, slot: PodSlot, doubt: u64) -> Dropped;
    /// The engine was seen to hold these request blocks, which lead from the start of a prompt: the
    /// engine blocks of full-attention groups that make them up, in any tier, are not in doubt any
    /// more. What the row does not hold stays so.
    ///
    /// Cost: nothing outside a doubt; in one, a probe per block, and a scan of the engine blocks that
    /// are not exactly a request block each.
    fn confirm(&self, slot: PodSlot, keys: &[RequestKey]);
    /// Everything that the row holds by events, as of one moment between two writes; `None` for an
    /// unknown slot, and from an index that cannot. The row's writer waits meanwhile: some
    /// nanoseconds a block.
    fn export(&self, _slot: PodSlot) -> Option<RowImage> {
        None
    }
    /// Replaces what the row holds by what an image says; marks stay, it is in no doubt and not
    /// muted. The image
    /// must be that of a row with an equal spec. `anchors` are shared by the rows of one snapshot;
    /// where the image was exported from this very index just now, empty ones will do.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; the row then holds nothing.
    fn restore(
        &self,
        _slot: PodSlot,
        _image: &RowImage,
        _anchors: &mut Anchors,
    ) -> Result<(), ImageError> {
        Err(ImageError::Foreign)
    }
    /// How much the row holds.
    fn pod_usage(&self, slot: PodSlot) -> PodUsage;
    /// How much the index holds.
    fn usage(&self) -> IndexUsage;
}
