//! Extra hash inputs of an event: a lazy view, validated once, that copies nothing.
//!
//! Model: `[nil or [input, …], …]`, one element per block. An input is a string (LoRA name,
//! multimodal identifier of vLLM 0.17 and 0.18, cache salt), a pair `[identifier, offset]` (vLLM
//! from 0.19), or bytes (digest of prompt embeddings). Inputs of other shapes are passed over.

use super::ExtraKeys;
use super::msgpack::{Cursor, Fault, Kind, MAX_DEPTH};
use crate::model::ExtraKey;

/// Inputs of one block at most: an item has at least one token of it, a block rarely 64.
const MAX_PER_BLOCK: usize = 256;
/// Inputs of one event at most.
const MAX_PER_EVENT: usize = 1 << 18;

/// Why extra keys are not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtraFault {
    Shape(Fault),
    Utf8,
    /// More than a block or an event may have.
    TooMany {
        got: usize,
        limit: usize,
    },
    /// The offset of an item does not fit 64 bits with a sign.
    Offset {
        offset: usize,
    },
}

impl From<Fault> for ExtraFault {
    fn from(fault: Fault) -> Self {
        Self::Shape(fault)
    }
}

/// What [`validate`] found: the view, and whether any block has a list at all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Validated<'a> {
    pub(super) keys: ExtraKeys<'a>,
    pub(super) any: bool,
}

/// Reads an array of extra keys and proves that iterating over it cannot fail.
pub(super) fn validate<'a>(at: &mut Cursor<'a>) -> Result<Validated<'a>, ExtraFault> {
    let blocks = at.array()?;
    let start = *at;
    let (mut any, mut all) = (false, 0);
    for _ in 0..blocks {
        if at.take_nil() {
            continue;
        }
        any = true;
        let inputs = at.array()?;
        all += inputs;
        for (got, limit) in [(inputs, MAX_PER_BLOCK), (all, MAX_PER_EVENT)] {
            if got > limit {
                return Err(ExtraFault::TooMany { got, limit });
            }
        }
        for _ in 0..inputs {
            input(at)?;
        }
    }
    let length = at.offset() - start.offset();
    let raw = start.rest().get(..length).unwrap_or_default();
    Ok(Validated { keys: ExtraKeys { raw, blocks }, any })
}

/// Reads one input; `None` for a shape that we do not know.
fn input<'a>(at: &mut Cursor<'a>) -> Result<Option<ExtraKey<'a>>, ExtraFault> {
    match at.kind()? {
        Kind::Str => Ok(Some(ExtraKey::Text(text(at)?))),
        Kind::Bin => Ok(Some(ExtraKey::Bytes(at.bin()?))),
        Kind::Array => {
            let mut left = at.array()?;
            if left == 0 || at.kind()? != Kind::Str {
                at.skip_values(left, MAX_DEPTH)?;
                return Ok(None);
            }
            let id = text(at)?;
            left -= 1;
            let mut offset = 0;
            if left > 0 && at.kind()? == Kind::Int {
                let position = at.offset();
                offset = at.int()?.to_i64().ok_or(ExtraFault::Offset { offset: position })?;
                left -= 1;
            }
            at.skip_values(left, MAX_DEPTH)?;
            Ok(Some(ExtraKey::Item { id, offset }))
        }
        _ => {
            at.skip(MAX_DEPTH)?;
            Ok(None)
        }
    }
}

fn text<'a>(at: &mut Cursor<'a>) -> Result<&'a str, ExtraFault> {
    std::str::from_utf8(at.str_bytes()?).map_err(|_| ExtraFault::Utf8)
}

impl<'a> ExtraKeys<'a> {
    /// For how many blocks there is a list; a nil one counts. Equal to the number of block hashes
    /// if the event's tokens fill its blocks exactly.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Whether there is no block at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The inputs of each block, in block order. A block without any has an empty iterator.
    #[must_use]
    pub fn blocks(&self) -> ExtraBlocks<'a> {
        ExtraBlocks { at: Cursor::new(self.raw), left: self.blocks }
    }
}

/// Iterator over the blocks of [`ExtraKeys`].
#[derive(Clone, Debug)]
pub struct ExtraBlocks<'a> {
    at: Cursor<'a>,
    left: usize,
}

impl<'a> Iterator for ExtraBlocks<'a> {
    type Item = BlockExtraKeys<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        if self.at.take_nil() {
            return Some(BlockExtraKeys { at: self.at, left: 0 });
        }
        // Cannot fail on validated bytes.
        let left = self.at.array().ok()?;
        let keys = BlockExtraKeys { at: self.at, left };
        self.at.skip_values(left, MAX_DEPTH).ok()?;
        Some(keys)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for ExtraBlocks<'_> {}

/// Iterator over the extra keys of one block, in the engine's order.
#[derive(Clone, Debug)]
pub struct BlockExtraKeys<'a> {
    at: Cursor<'a>,
    left: usize,
}

impl<'a> Iterator for BlockExtraKeys<'a> {
    type Item = ExtraKey<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            // Cannot fail on validated bytes; if it did, this would end the block.
            if let Some(key) = input(&mut self.at).ok()? {
                return Some(key);
            }
        }
        None
    }
}
