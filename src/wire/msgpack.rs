//! A zero-copy msgpack cursor: reads what KV events are made of, skips the rest.
//!
//! Written by hand because this is the hottest input path, and because what a batch may cost must
//! be decided here: a declared count is checked against the bytes that are left before anybody
//! loops or reserves by it (every msgpack value takes at least one byte), and nesting is limited.
//!
//! Failure: every method returns a [`Fault`] with its byte offset, and leaves the cursor somewhere
//! inside the value. Cost: linear in the bytes read; nothing allocates.

use crate::model::EngineKey;

/// Deepest nesting that [`Cursor::skip`] follows, whatever the caller allows: the skip recurses,
/// and this many of its frames fit the smallest thread stack many times over.
pub(super) const MAX_DEPTH: usize = 64;

/// Why the bytes cannot be read as asked. Offsets count from the start of the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The bytes end inside a value, or a declared length exceeds them.
    Truncated { offset: usize },
    /// The marker `0xc1`, which msgpack never uses.
    Reserved { offset: usize },
    /// Containers are nested deeper than allowed.
    TooDeep { offset: usize },
    /// The value has another type than the one asked for.
    Type { offset: usize, found: Kind },
}

/// The type of a msgpack value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Nil,
    Bool,
    Int,
    Float,
    Str,
    Bin,
    Array,
    Map,
    Ext,
    Reserved,
}

impl Kind {
    const fn of(marker: u8) -> Self {
        match marker {
            0x00..=0x7f | 0xcc..=0xd3 | 0xe0..=0xff => Self::Int,
            0x80..=0x8f | 0xde | 0xdf => Self::Map,
            0x90..=0x9f | 0xdc | 0xdd => Self::Array,
            0xa0..=0xbf | 0xd9..=0xdb => Self::Str,
            0xc0 => Self::Nil,
            0xc1 => Self::Reserved,
            0xc2 | 0xc3 => Self::Bool,
            0xc4..=0xc6 => Self::Bin,
            0xc7..=0xc9 | 0xd4..=0xd8 => Self::Ext,
            0xca | 0xcb => Self::Float,
        }
    }

    /// Name for error messages.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Float => "float",
            Self::Str => "str",
            Self::Bin => "bin",
            Self::Array => "array",
            Self::Map => "map",
            Self::Ext => "ext",
            Self::Reserved => "reserved",
        }
    }
}

/// An integer of any width and sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Int {
    bits: u64,
    negative: bool,
}

impl Int {
    const fn unsigned(value: u64) -> Self {
        Self { bits: value, negative: false }
    }

    const fn signed(value: i64) -> Self {
        Self { bits: value.cast_unsigned(), negative: value < 0 }
    }

    /// The value's 64 bits; a negative one in two's complement.
    pub(super) const fn bits(self) -> u64 {
        self.bits
    }

    /// The value, unless it is negative.
    pub(super) const fn to_u64(self) -> Option<u64> {
        if self.negative { None } else { Some(self.bits) }
    }

    /// The value, unless it is negative or too large.
    pub(super) fn to_u32(self) -> Option<u32> {
        self.to_u64().and_then(|value| u32::try_from(value).ok())
    }

    /// The value, unless it is too large.
    pub(super) fn to_i64(self) -> Option<i64> {
        if self.negative { Some(self.bits.cast_signed()) } else { i64::try_from(self.bits).ok() }
    }
}

/// A position in a payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
    /// Length of the whole payload, so that errors can name offsets.
    len: usize,
}

impl<'a> Cursor<'a> {
    /// A cursor at the first byte of `payload`.
    pub(super) const fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload, len: payload.len() }
    }

    /// Bytes read so far.
    #[inline]
    pub(super) const fn offset(&self) -> usize {
        self.len - self.rest.len()
    }

    /// Bytes not read yet.
    #[inline]
    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Moves forward to `offset`; to the end if that is past it. Never moves back.
    pub(super) fn advance_to(&mut self, offset: usize) {
        let step = offset.saturating_sub(self.offset());
        self.rest = self.rest.get(step..).unwrap_or_default();
    }

    /// The type of the next value.
    #[inline]
    pub(super) fn kind(&self) -> Result<Kind, Fault> {
        match self.rest.first() {
            Some(&marker) => Ok(Kind::of(marker)),
            None => Err(self.truncated()),
        }
    }

    /// Reads a nil, if the next value is one.
    #[inline]
    pub(super) fn take_nil(&mut self) -> bool {
        match self.rest {
            [0xc0, rest @ ..] => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// Reads an integer of any width and sign.
    #[inline]
    pub(super) fn int(&mut self) -> Result<Int, Fault> {
        let before = *self;
        Ok(match self.byte()? {
            marker @ 0x00..=0x7f => Int::unsigned(u64::from(marker)),
            0xcc => Int::unsigned(u64::from(self.byte()?)),
            0xcd => Int::unsigned(u64::from(u16::from_be_bytes(self.take()?))),
            0xce => Int::unsigned(u64::from(u32::from_be_bytes(self.take()?))),
            0xcf => Int::unsigned(u64::from_be_bytes(self.take()?)),
            0xd0 => Int::signed(i64::from(self.byte()?.cast_signed())),
            0xd1 => Int::signed(i64::from(i16::from_be_bytes(self.take()?))),
            0xd2 => Int::signed(i64::from(i32::from_be_bytes(self.take()?))),
            0xd3 => Int::signed(i64::from_be_bytes(self.take()?)),
            marker @ 0xe0..=0xff => Int::signed(i64::from(marker.cast_signed())),
            marker => return Err(before.mismatch(marker)),
        })
    }

    /// Reads a float of either width, or an integer as the nearest float.
    pub(super) fn number(&mut self) -> Result<f64, Fault> {
        match self.rest.first() {
            Some(0xca) => {
                self.byte()?;
                Ok(f64::from(f32::from_be_bytes(self.take()?)))
            }
            Some(0xcb) => {
                self.byte()?;
                Ok(f64::from_be_bytes(self.take()?))
            }
            _ => {
                let int = self.int()?;
                Ok(int.to_i64().map_or(int.bits() as f64, |value| value as f64))
            }
        }
    }

    /// Reads a string's bytes. Whether they are UTF-8 is the caller's question.
    #[inline]
    pub(super) fn str_bytes(&mut self) -> Result<&'a [u8], Fault> {
        let before = *self;
        let len = match self.byte()? {
            marker @ 0xa0..=0xbf => usize::from(marker & 0x1f),
            0xd9 => usize::from(self.byte()?),
            0xda => usize::from(u16::from_be_bytes(self.take()?)),
            0xdb => self.len32()?,
            marker => return Err(before.mismatch(marker)),
        };
        self.slice(len)
    }

    /// Reads a byte string.
    #[inline]
    pub(super) fn bin(&mut self) -> Result<&'a [u8], Fault> {
        let before = *self;
        let len = match self.byte()? {
            0xc4 => usize::from(self.byte()?),
            0xc5 => usize::from(u16::from_be_bytes(self.take()?)),
            0xc6 => self.len32()?,
            marker => return Err(before.mismatch(marker)),
        };
        self.slice(len)
    }

    /// Reads an array's head: how many values follow, at most as many as bytes are left.
    #[inline]
    pub(super) fn array(&mut self) -> Result<usize, Fault> {
        let before = *self;
        let count = match self.byte()? {
            marker @ 0x90..=0x9f => usize::from(marker & 0x0f),
            0xdc => usize::from(u16::from_be_bytes(self.take()?)),
            0xdd => self.len32()?,
            marker => return Err(before.mismatch(marker)),
        };
        self.fits(count)
    }

    /// Reads a map's head: how many pairs follow, at most half as many as bytes are left.
    #[inline]
    pub(super) fn map(&mut self) -> Result<usize, Fault> {
        let before = *self;
        let count = match self.byte()? {
            marker @ 0x80..=0x8f => usize::from(marker & 0x0f),
            0xde => usize::from(u16::from_be_bytes(self.take()?)),
            0xdf => self.len32()?,
            marker => return Err(before.mismatch(marker)),
        };
        self.fits(count.saturating_mul(2)).map(|values| values / 2)
    }

    /// Reads integers of the three widths that tokens have (7, 16 and 32 bits, unsigned) into
    /// `slots`, and stops in front of the first value of any other form. Returns how many it read.
    ///
    /// Equivalent to calling [`int`](Self::int) while it returns such a width.
    #[inline]
    pub(super) fn fill_u32(&mut self, slots: &mut [u32]) -> usize {
        let mut rest = self.rest;
        let mut read = 0;
        for slot in slots.iter_mut() {
            match rest {
                [0xcd, a, b, tail @ ..] => {
                    *slot = u32::from(u16::from_be_bytes([*a, *b]));
                    rest = tail;
                }
                [0xce, a, b, c, d, tail @ ..] => {
                    *slot = u32::from_be_bytes([*a, *b, *c, *d]);
                    rest = tail;
                }
                [small @ 0x00..=0x7f, tail @ ..] => {
                    *slot = u32::from(*small);
                    rest = tail;
                }
                _ => break,
            }
            read += 1;
        }
        self.rest = rest;
        read
    }

    /// Reads 64-bit integers and 32-byte strings, the two usual forms of block hashes, into
    /// `slots`, and stops in front of the first value of any other form. Returns how many it read.
    #[inline]
    pub(super) fn fill_hashes(&mut self, slots: &mut [EngineKey]) -> usize {
        let mut read = 0;
        for slot in slots.iter_mut() {
            match self.rest {
                [0xcf | 0xd3, a, b, c, d, e, f, g, h, tail @ ..] => {
                    *slot = EngineKey(u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
                    self.rest = tail;
                }
                [0xc4, 32, tail @ ..] => {
                    let Some((digest, tail)) = tail.split_first_chunk::<32>() else { break };
                    let Some(low) = digest.last_chunk::<8>() else { break };
                    *slot = EngineKey(u64::from_be_bytes(*low));
                    self.rest = tail;
                }
                _ => break,
            }
            read += 1;
        }
        read
    }

    /// Skips one value with everything inside it, validating it on the way. Containers may be
    /// nested `depth` deep (a scalar needs 0), and never deeper than [`MAX_DEPTH`].
    #[inline]
    pub(super) fn skip(&mut self, depth: usize) -> Result<(), Fault> {
        self.skip_values(1, depth.min(MAX_DEPTH))
    }

    /// Skips `count` values; see [`skip`](Self::skip).
    pub(super) fn skip_values(&mut self, count: usize, depth: usize) -> Result<(), Fault> {
        for _ in 0..count {
            // Tokens first: they are nearly all of a payload. Constant steps behind predictable
            // branches let the processor run ahead, which a table of lengths would not.
            match self.rest {
                [0xcd, _, _, tail @ ..]
                | [0xce, _, _, _, _, tail @ ..]
                | [0x00..=0x7f, tail @ ..] => {
                    self.rest = tail;
                }
                [marker @ 0xa0..=0xbf, tail @ ..] => match tail.get(usize::from(marker & 0x1f)..) {
                    Some(tail) => self.rest = tail,
                    None => return Err(self.truncated()),
                },
                _ => self.skip_other(depth)?,
            }
        }
        Ok(())
    }

    fn skip_other(&mut self, depth: usize) -> Result<(), Fault> {
        let before = *self;
        let marker = self.byte()?;
        let bytes = match marker {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => 0,
            0xcc | 0xd0 => 1,
            0xcd | 0xd1 => 2,
            0xca | 0xce | 0xd2 => 4,
            0xcb | 0xcf | 0xd3 => 8,
            0xa0..=0xbf => usize::from(marker & 0x1f),
            0xc4 | 0xd9 => usize::from(self.byte()?),
            0xc5 | 0xda => usize::from(u16::from_be_bytes(self.take()?)),
            0xc6 | 0xdb => self.len32()?,
            // Extensions: one byte of type goes before the data.
            0xd4..=0xd8 => 1 + (1 << (marker - 0xd4)),
            0xc7 => 1 + usize::from(self.byte()?),
            0xc8 => 1 + usize::from(u16::from_be_bytes(self.take()?)),
            0xc9 => self.len32()?.saturating_add(1),
            0x80..=0x9f | 0xdc..=0xdf => {
                *self = before;
                let values = match Kind::of(marker) {
                    Kind::Map => self.map()? * 2,
                    _ => self.array()?,
                };
                let Some(depth) = depth.checked_sub(1) else {
                    return Err(Fault::TooDeep { offset: before.offset() });
                };
                return self.skip_values(values, depth);
            }
            0xc1 => return Err(Fault::Reserved { offset: before.offset() }),
        };
        self.slice(bytes).map(|_| ())
    }

    #[inline]
    fn byte(&mut self) -> Result<u8, Fault> {
        match self.rest {
            [byte, rest @ ..] => {
                self.rest = rest;
                Ok(*byte)
            }
            [] => Err(self.truncated()),
        }
    }

    #[inline]
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(*head)
            }
            None => Err(self.truncated()),
        }
    }

    #[inline]
    fn slice(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        match self.rest.split_at_checked(len) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => Err(self.truncated()),
        }
    }

    fn len32(&mut self) -> Result<usize, Fault> {
        let len = u32::from_be_bytes(self.take()?);
        // Saturates where usize is narrower than the header; nothing that long fits anyway.
        Ok(usize::try_from(len).unwrap_or(usize::MAX))
    }

    #[inline]
    fn fits(&self, values: usize) -> Result<usize, Fault> {
        if values > self.rest.len() { Err(self.truncated()) } else { Ok(values) }
    }

    #[cold]
    fn truncated(&self) -> Fault {
        Fault::Truncated { offset: self.offset() }
    }

    #[cold]
    fn mismatch(&self, marker: u8) -> Fault {
        match Kind::of(marker) {
            Kind::Reserved => Fault::Reserved { offset: self.offset() },
            found => Fault::Type { offset: self.offset(), found },
        }
    }
}

#[cfg(test)]
mod tests;
