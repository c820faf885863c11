//! What one row holds, apart from the index that it came from: exported, encoded, restored.
//!
//! # Model
//!
//! An image has everything that makes later events continue exactly: chains of request keys with the
//! row's engine keys beside them, and in which tiers; copies beyond the first; entries that are not
//! plain, with their places; joints; orphans; attention groups, adapters, block sizes; the last
//! removals. It has no speculative marks, which are the routers' and live for seconds.
//!
//! Chains are as they lay in memory. A chain that begins inside a prompt does not know the block
//! before it; [`Anchors`] say where its first key lies if it lies inside a chain of another row.
//!
//! # Bytes
//!
//! An image is a list of *parts*, each small enough to be checked and read alone. Numbers are
//! little-endian; a list is its length (u32) and its elements. Nothing is allocated for a length
//! that the bytes behind it do not bear out.
//!
//! # Failure
//!
//! Bytes and images may be anybody's: whatever is not consistent in itself is refused, and the row
//! is left empty. Nothing panics.

mod codec;

use std::{collections::HashMap, sync::Arc};

use smallvec::SmallVec;

pub(crate) use self::codec::{Reader, Writer};
use crate::{
    index::{
        ledger::{EntryKey, Group},
        naive,
        orphans::Orphan,
        place::{Completed, Place},
        runs::Block,
        slots::KeyHash,
    },
    model::{CountMode, EngineKey, RequestKey, TierId, TierTable},
};

/// Why an image is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It ends early.
    #[error("the image of a row is cut short")]
    Truncated,
    /// It contradicts itself.
    #[error("the image of a row is not consistent: {0}")]
    Inconsistent(&'static str),
    /// There is no such row, or no room for what it held.
    #[error("no room in the index")]
    Full,
    /// It was made by an index of another kind.
    #[error("this index cannot restore it")]
    Foreign,
}

/// What one row holds; see the module's documentation.
#[derive(Clone, Debug)]
pub struct RowImage {
    pub(crate) content: Content,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    Ledger(Box<LedgerImage>),
    Oracle(Arc<naive::Pod>),
}

/// The content of a [ledger](super::ledger).
#[derive(Clone, Debug, Default)]
pub(crate) struct LedgerImage {
    pub(crate) mode: CountMode,
    pub(crate) groups: Vec<Group>,
    pub(crate) loras: Vec<Arc<str>>,
    pub(crate) block_sizes: Vec<u32>,
    pub(crate) chains: Vec<Chain>,
    pub(crate) entries: Vec<EntryImage>,
    pub(crate) joints: Vec<Completed>,
    /// In order of arrival, each with its parent and how long it has waited, milliseconds.
    pub(crate) orphans: Vec<(EngineKey, u64, Orphan)>,
    pub(crate) removed: Vec<(RequestKey, u64)>,
}

/// Blocks that follow one another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Number of the first one in its prompt.
    pub(crate) position: u32,
    pub(crate) keys: Vec<RequestKey>,
    /// Beside them the row's plain keys; 0 where it has none.
    pub(crate) engine: Vec<EngineKey>,
    /// By tier, which of the plain ones it holds, as `from..to`.
    pub(crate) lines: Vec<(TierId, Spans)>,
    /// Copies beyond the first: offset, tier, how many.
    pub(crate) copies: Vec<(u32, TierId, u32)>,
}

pub(crate) type Spans = SmallVec<[(u32, u32); 1]>;

/// An engine key that is not plain. In its place, `at` says only whether there is a block.
#[derive(Clone, Debug)]
pub(crate) struct EntryImage {
    pub(crate) at: EntryKey,
    pub(crate) counts: SmallVec<[(TierId, u32); 2]>,
    pub(crate) place: Option<Place>,
}

/// Where chains that begin inside a prompt turned out to lie, while the rows of one snapshot are
/// restored, one after the other, and nothing else writes to the index.
///
/// A key lies in one place of an index at most. Rows are exported at different moments, so what was
/// the inside of a chain for one of them may be the start of one for another.
#[derive(Debug, Default)]
pub struct Anchors {
    blocks: HashMap<RequestKey, Option<Block>, KeyHash>,
}

impl Anchors {
    /// Takes in where the chains of an encoded part begin. Call it for every part of every row
    /// before the first one is restored.
    ///
    /// # Errors
    ///
    /// When the part cannot be read.
    pub fn note(&mut self, part: &[u8]) -> Result<(), ImageError> {
        codec::starts(part, |key| {
            self.blocks.insert(key, None);
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Says where a key lies, if it is one of them.
    pub(crate) fn found(&mut self, key: RequestKey, block: Block) {
        if let Some(at) = self.blocks.get_mut(&key) {
            *at = Some(block);
        }
    }

    /// Where a key lies inside what was restored before.
    pub(crate) fn block(&self, key: RequestKey) -> Option<Block> {
        self.blocks.get(&key).copied().flatten()
    }
}

impl RowImage {
    pub(crate) fn of_ledger(ledger: LedgerImage) -> Self {
        Self { content: Content::Ledger(Box::new(ledger)) }
    }

    /// Blocks that it makes the row hold, each engine key once.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        let Content::Ledger(image) = &self.content else { return 0 };
        let plain = image.chains.iter().flat_map(|chain| &chain.engine);
        plain.filter(|key| key.0 != 0).count() as u64 + image.entries.len() as u64
    }

    /// Hands out the parts, each of about `size` bytes unless a single element has more. The
    /// oracle's images have none.
    ///
    /// # Errors
    ///
    /// The first one of `each`, which then is not called again.
    pub fn encode<E>(
        &self,
        size: usize,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match &self.content {
            Content::Ledger(image) => codec::encode(image, size, &mut each),
            Content::Oracle(_) => Ok(()),
        }
    }

    /// Gives the tiers other numbers; absent ones must not occur.
    ///
    /// # Errors
    ///
    /// When one occurs.
    pub fn renumber(&mut self, tiers: &[Option<TierId>; TierTable::MAX]) -> Result<(), ImageError> {
        let Content::Ledger(image) = &mut self.content else { return Ok(()) };
        let new = |tier: &mut TierId| {
            let known = tiers.get(usize::from(tier.0)).copied().flatten();
            *tier = known.ok_or(ImageError::Inconsistent("a tier that it does not name"))?;
            Ok(())
        };
        for chain in &mut image.chains {
            chain.lines.iter_mut().try_for_each(|(tier, _)| new(tier))?;
            chain.copies.iter_mut().try_for_each(|(_, tier, _)| new(tier))?;
        }
        let counts = image.entries.iter_mut().flat_map(|entry| &mut entry.counts);
        counts.map(|(tier, _)| tier).try_for_each(new)
    }
}

/// Puts an image together from its parts, in order.
#[derive(Debug, Default)]
pub struct ImageBuilder {
    image: Box<LedgerImage>,
}

impl ImageBuilder {
    /// Adds a part.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn add(&mut self, part: &[u8]) -> Result<(), ImageError> {
        codec::decode(part, &mut self.image)
    }

    /// The image of all parts.
    #[must_use]
    pub fn finish(self) -> RowImage {
        RowImage { content: Content::Ledger(self.image) }
    }
}
