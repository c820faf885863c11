//! Which blocks of a run one row holds in one part and tier: a *line*.
//!
//! Most lines are prefixes of their run, since caches fill from the front and evict from the back,
//! and nearly all others are one span of it; a line with a hole is a bitmap. A line is one word in
//! the run's list, sorted by its upper half:
//!
//! ```text
//! 63      48 47   40 39   32 31 30              15 14              0
//! │  seat   │ part  │  tag  │0 │ first block      │ one after last   │
//!                           │1 │ address of the bitmap               │
//! ```

use smallvec::SmallVec;

use super::space::words;
use crate::{index::ledger::Part, model::PodSlot};

/// Number under which one life of a row is written in runs.
pub(crate) type Seat = u16;
/// Seats from here on are *mark seats*: this offset plus the row's slot. A row has one for all its
/// lives, so that marks outlive a clear; its lines come behind those of every life.
pub(crate) const MARKS: Seat = 1 << 15;

/// Names a line within its run, and sorts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LineId(pub(super) u32);

impl LineId {
    pub(crate) fn new(seat: Seat, part: Part, tag: u8) -> Self {
        Self(u32::from(seat) << 16 | u32::from(part) << 8 | u32::from(tag))
    }

    pub(crate) fn seat(self) -> Seat {
        (self.0 >> 16) as Seat
    }

    pub(crate) fn part(self) -> Part {
        (self.0 >> 8) as Part
    }

    /// The row of a line of marks.
    pub(super) fn marked_slot(self) -> PodSlot {
        PodSlot(u32::from(self.seat().wrapping_sub(MARKS)))
    }

    pub(crate) fn tag(self) -> u8 {
        self.0 as u8
    }

    /// Part 0 on the GPU, what nearly all lines are.
    pub(super) fn is_plain(self) -> bool {
        self.0 & 0xffff == 0
    }
}

/// A line as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word(pub(super) u64);

const BITMAP: u64 = 1 << 31;

impl Word {
    pub(super) fn span(id: LineId, from: u32, to: u32) -> Self {
        Self(u64::from(id.0) << 32 | u64::from(from) << 15 | u64::from(to))
    }

    pub(super) fn bitmap(id: LineId, address: u32) -> Self {
        Self(u64::from(id.0) << 32 | BITMAP | u64::from(address))
    }

    pub(super) fn id(self) -> LineId {
        LineId((self.0 >> 32) as u32)
    }

    /// What is held, first block and one after the last, or the address of the bitmap.
    pub(super) fn value(self) -> Result<(u32, u32), u32> {
        let value = self.0 as u32;
        if self.0 & BITMAP == 0 {
            Ok((value >> 15, value & 0x7fff))
        } else {
            Err(value & 0x7fff_ffff)
        }
    }

    /// Is it all of a run of `length` blocks?
    pub(super) fn is_full(self, length: u32) -> bool {
        self.value().is_ok_and(|(from, to)| from == 0 && to >= length)
    }
}

/// A line taken out of its run, to be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// Blocks that follow one another, up to one before the second number; `0, 0` is no line.
    Span(u32, u32),
    /// Bit by block; blocks beyond are not held.
    Bits(SmallVec<[u64; 8]>),
}

impl Line {
    pub(crate) const NONE: Self = Self::Span(0, 0);

    pub(crate) fn holds(&self, block: u32) -> bool {
        match self {
            Self::Span(from, to) => (*from..*to).contains(&block),
            Self::Bits(bits) => {
                bits.get(block as usize / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
            }
        }
    }

    /// Is anything of `from..to` held?
    pub(crate) fn any(&self, from: u32, to: u32) -> bool {
        match self {
            Self::Span(first, end) => from.max(*first) < to.min(*end),
            Self::Bits(bits) => words(from, to.saturating_sub(from))
                .any(|(at, mask)| bits.get(at).is_some_and(|word| word & mask != 0)),
        }
    }

    pub(crate) fn set(&mut self, from: u32, to: u32) {
        if let Self::Span(first, end) = *self {
            if first == end || (from <= end && first <= to) {
                let none = first == end;
                let first = if none { from } else { first.min(from) };
                *self = Self::Span(first, end.max(to));
                return;
            }
            *self = Self::Bits(bits_of(first, end));
        }
        if let Self::Bits(bits) = self {
            if bits.len() * 64 < to as usize {
                bits.resize(to.div_ceil(64) as usize, 0);
            }
            for (at, mask) in words(from, to - from) {
                bits[at] |= mask;
            }
        }
        self.normalize();
    }

    pub(crate) fn unset(&mut self, from: u32, to: u32) {
        match *self {
            Self::Span(first, end) if to <= first || end <= from => {}
            Self::Span(first, end) if from <= first && end <= to => *self = Self::NONE,
            Self::Span(first, _) if first < from && self.end() <= to => {
                *self = Self::Span(first, from);
            }
            Self::Span(first, end) if from <= first => *self = Self::Span(to, end),
            Self::Span(first, end) => {
                *self = Self::Bits(bits_of(first, end));
                self.unset(from, to);
            }
            Self::Bits(ref mut bits) => {
                let to = to.min(bits.len() as u32 * 64);
                for (at, mask) in words(from.min(to), to.saturating_sub(from)) {
                    bits[at] &= !mask;
                }
                self.normalize();
            }
        }
    }

    /// One more than the last block that is held.
    pub(super) fn end(&self) -> u32 {
        match self {
            Self::Span(_, end) => *end,
            Self::Bits(bits) => end(bits),
        }
    }

    /// Makes a span of what is one.
    fn normalize(&mut self) {
        if let Self::Bits(bits) = self {
            let Some(word) = bits.iter().position(|&word| word != 0) else {
                *self = Self::NONE;
                return;
            };
            let first = word as u32 * 64 + bits[word].trailing_zeros();
            let held: u32 = bits.iter().map(|word| word.count_ones()).sum();
            let end = end(bits);
            if end - first == held {
                *self = Self::Span(first, end);
            }
        }
    }
}

fn end(bits: &[u64]) -> u32 {
    let last = bits.iter().rposition(|&word| word != 0);
    last.map_or(0, |at| at as u32 * 64 + 64 - bits[at].leading_zeros())
}

fn bits_of(from: u32, to: u32) -> SmallVec<[u64; 8]> {
    let mut bits = SmallVec::from_elem(0, to.div_ceil(64) as usize);
    for (at, mask) in words(from, to - from) {
        bits[at] = mask;
    }
    bits
}

/// How many bits are set before the first one that is not.
pub(super) fn leading(bits: impl Iterator<Item = u64>) -> u32 {
    let mut count = 0;
    for word in bits {
        let ones = (!word).trailing_zeros();
        count += ones;
        if ones < 64 {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_line_is_a_set(ops in prop::collection::vec((any::<bool>(), 0u32..300, 1u32..80), 0..60)) {
            let (mut line, mut model) = (Line::NONE, BTreeSet::new());
            for (set, from, count) in ops {
                let to = from + count;
                if set {
                    line.set(from, to);
                    model.extend(from..to);
                } else {
                    line.unset(from, to);
                    model.retain(|block| !(from..to).contains(block));
                }
                for block in 0..400 {
                    prop_assert_eq!(line.holds(block), model.contains(&block));
                }
                prop_assert_eq!(line.end(), model.last().map_or(0, |last| last + 1));
                prop_assert_eq!(line.any(from, to), model.range(from..to).next().is_some());
                let first = model.first().copied().unwrap_or(0);
                let span = model.iter().zip(first..).all(|(&block, at)| at == block);
                prop_assert_eq!(matches!(line, Line::Span(..)), span);
            }
        }
    }
}
