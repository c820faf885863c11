//! A zero-copy msgpack cursor: reads what KV events are made of, skips the rest.
//!
//! Written by hand because this is the hottest input path, and because what a batch may cost must
//! be decided here: a declared count is checked against the bytes that are left before anybody
//! loops or reserves by it (every msgpack value takes at least one byte), and nesting is limited.
//!
//! Failure: every method returns a [`Fault`] with its byte offset, and leaves the cursor where it
//! was. Cost: linear in the bytes read; nothing allocates.

mod skip;

use self::skip::Skip;
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
    #[inline]
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
    #[inline(always)]
    pub(super) fn int(&mut self) -> Result<Int, Fault> {
        if let [marker @ 0x00..=0x7f, tail @ ..] = self.rest {
            self.rest = tail;
            return Ok(Int::unsigned(u64::from(*marker)));
        }
        self.wide_int()
    }

    #[inline(never)]
    fn wide_int(&mut self) -> Result<Int, Fault> {
        let (int, tail) = match self.rest {
            [marker @ 0xe0..=0xff, tail @ ..] => {
                (Int::signed(i64::from(marker.cast_signed())), tail)
            }
            [0xcc, a, tail @ ..] => (Int::unsigned(u64::from(*a)), tail),
            [0xcd, a, b, tail @ ..] => {
                (Int::unsigned(u64::from(u16::from_be_bytes([*a, *b]))), tail)
            }
            [0xce, a, b, c, d, tail @ ..] => {
                (Int::unsigned(u64::from(u32::from_be_bytes([*a, *b, *c, *d]))), tail)
            }
            [0xcf, a, b, c, d, e, f, g, h, tail @ ..] => {
                (Int::unsigned(u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])), tail)
            }
            [0xd0, a, tail @ ..] => (Int::signed(i64::from(a.cast_signed())), tail),
            [0xd1, a, b, tail @ ..] => (Int::signed(i64::from(i16::from_be_bytes([*a, *b]))), tail),
            [0xd2, a, b, c, d, tail @ ..] => {
                (Int::signed(i64::from(i32::from_be_bytes([*a, *b, *c, *d]))), tail)
            }
            [0xd3, a, b, c, d, e, f, g, h, tail @ ..] => {
                (Int::signed(i64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])), tail)
            }
            _ => return Err(self.unexpected(Kind::Int)),
        };
        self.rest = tail;
        Ok(int)
    }

    /// Reads a float of either width, or an integer as the nearest float.
    pub(super) fn number(&mut self) -> Result<f64, Fault> {
        let (number, tail) = match self.rest {
            [0xca, a, b, c, d, tail @ ..] => {
                (f64::from(f32::from_be_bytes([*a, *b, *c, *d])), tail)
            }
            [0xcb, a, b, c, d, e, f, g, h, tail @ ..] => {
                (f64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]), tail)
            }
            [0xca | 0xcb, ..] => return Err(self.unexpected(Kind::Float)),
            _ => {
                let int = self.int()?;
                return Ok(int.to_i64().map_or(int.bits() as f64, |value| value as f64));
            }
        };
        self.rest = tail;
        Ok(number)
    }

    /// Reads a string's bytes. Whether they are UTF-8 is the caller's question.
    #[inline(always)] // keys: a call costs more than the common case
    pub(super) fn str_bytes(&mut self) -> Result<&'a [u8], Fault> {
        if let [marker @ 0xa0..=0xbf, tail @ ..] = self.rest
            && let Some((head, tail)) = tail.split_at_checked(usize::from(marker & 0x1f))
        {
            self.rest = tail;
            return Ok(head);
        }
        self.long_str_bytes()
    }

    #[inline(never)]
    fn long_str_bytes(&mut self) -> Result<&'a [u8], Fault> {
        match self.rest {
            [0xd9, a, tail @ ..] => self.split(tail, usize::from(*a)),
            [0xda, a, b, tail @ ..] => self.split(tail, long([0, 0, *a, *b])),
            [0xdb, a, b, c, d, tail @ ..] => self.split(tail, long([*a, *b, *c, *d])),
            _ => Err(self.unexpected(Kind::Str)),
        }
    }

    /// Reads a byte string.
    #[inline]
    pub(super) fn bin(&mut self) -> Result<&'a [u8], Fault> {
        match self.rest {
            [0xc4, a, tail @ ..] => self.split(tail, usize::from(*a)),
            [0xc5, a, b, tail @ ..] => self.split(tail, long([0, 0, *a, *b])),
            [0xc6, a, b, c, d, tail @ ..] => self.split(tail, long([*a, *b, *c, *d])),
            _ => Err(self.unexpected(Kind::Bin)),
        }
    }

    /// Reads an array's head: how many values follow, at most as many as bytes are left.
    #[inline(always)]
    pub(super) fn array(&mut self) -> Result<usize, Fault> {
        if let [marker @ 0x90..=0x9f, tail @ ..] = self.rest {
            return self.open(tail, usize::from(marker & 0x0f), 1);
        }
        self.long_array()
    }

    #[inline(never)]
    fn long_array(&mut self) -> Result<usize, Fault> {
        match self.rest {
            [0xdc, a, b, tail @ ..] => self.open(tail, long([0, 0, *a, *b]), 1),
            [0xdd, a, b, c, d, tail @ ..] => self.open(tail, long([*a, *b, *c, *d]), 1),
            _ => Err(self.unexpected(Kind::Array)),
        }
    }

    /// Reads a map's head: how many pairs follow, at most half as many as bytes are left.
    #[inline(always)]
    pub(super) fn map(&mut self) -> Result<usize, Fault> {
        if let [marker @ 0x80..=0x8f, tail @ ..] = self.rest {
            return self.open(tail, usize::from(marker & 0x0f), 2);
        }
        self.long_map()
    }

    #[inline(never)]
    fn long_map(&mut self) -> Result<usize, Fault> {
        match self.rest {
            [0xde, a, b, tail @ ..] => self.open(tail, long([0, 0, *a, *b]), 2),
            [0xdf, a, b, c, d, tail @ ..] => self.open(tail, long([*a, *b, *c, *d]), 2),
            _ => Err(self.unexpected(Kind::Map)),
        }
    }

    /// Reads unsigned integers of up to 32 bits, in the forms that engines write them, into
    /// `slots`, and stops in front of the first value of any other form, or within the payload's
    /// last 7 bytes. Returns how many it read.
    ///
    /// Equivalent to calling [`int`](Self::int) while it returns such a form. As long as all are
    /// 16 or all are 32 bits wide, the branch on that is free. Text mixes widths, where a mispredicted
    /// branch costs more than the step: then two steps at a time are computed, see [`Mixed`].
    #[inline]
    pub(super) fn fill_u32(&mut self, slots: &mut [u32]) -> usize {
        let mut rest = self.rest;
        let mut read = 0;
        let mut mixed = Mixed::default();
        loop {
            let from = read;
            while let [0xcd, high, low, tail @ ..] = rest
                && let Some(slot) = slots.get_mut(read)
            {
                *slot = u32::from(u16::from_be_bytes([*high, *low]));
                rest = tail;
                read += 1;
            }
            while let [0xce, a, b, c, d, tail @ ..] = rest
                && let Some(slot) = slots.get_mut(read)
            {
                *slot = u32::from_be_bytes([*a, *b, *c, *d]);
                rest = tail;
                read += 1;
            }
            let until = mixed.until(from, read);
            while read < until
                && let Some([low, high]) = slots.get_mut(read..).and_then(<[u32]>::first_chunk_mut)
                && let Some((first, second)) = two_u32(rest)
                && let Some(tail) = rest.get(first + second..)
                && let Some(first_at) = rest.first_chunk::<8>()
                && let Some(second_at) = rest.get(first..).and_then(<[u8]>::first_chunk)
            {
                *low = short_u32(*first_at, first);
                *high = short_u32(*second_at, second);
                rest = tail;
                read += 2;
            }
            if read == from {
                break;
            }
        }
        while let Some(slot) = slots.get_mut(read)
            && let Some(window @ [marker, ..]) = rest.first_chunk::<8>()
            && is_u32(*marker)
        {
            let size = 1 + int_bytes(*marker);
            *slot = short_u32(*window, size);
            rest = rest.get(size..).unwrap_or_default();
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
        self.skip_values(1, depth)
    }

    /// Skips `count` values; see [`skip`](Self::skip).
    #[inline]
    pub(super) fn skip_values(&mut self, count: usize, depth: usize) -> Result<(), Fault> {
        let mut skip = Skip { len: self.len, fault: Fault::Truncated { offset: self.len } };
        match skip.values(self.rest, count, depth.min(MAX_DEPTH)) {
            Some(rest) => {
                self.rest = rest;
                Ok(())
            }
            None => Err(skip.fault),
        }
    }

    /// Takes `len` bytes off `tail`, which follows the head of a string.
    #[inline]
    fn split(&mut self, tail: &'a [u8], len: usize) -> Result<&'a [u8], Fault> {
        match tail.split_at_checked(len) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(self.truncated()),
        }
    }

    /// Enters a container of `count` times `each` values that start at `tail`.
    #[inline]
    fn open(&mut self, tail: &'a [u8], count: usize, each: usize) -> Result<usize, Fault> {
        if count.saturating_mul(each) > tail.len() {
            return Err(self.truncated());
        }
        self.rest = tail;
        Ok(count)
    }

    #[cold]
    fn truncated(&self) -> Fault {
        Fault::Truncated { offset: self.offset() }
    }

    /// Why no value of type `want` starts here.
    #[cold]
    fn unexpected(&self, want: Kind) -> Fault {
        let offset = self.offset();
        match self.rest.first().map(|&marker| Kind::of(marker)) {
            Some(Kind::Reserved) => Fault::Reserved { offset },
            Some(found) if found != want => Fault::Type { offset, found },
            _ => Fault::Truncated { offset },
        }
    }
}

/// A length of 32 bits. Saturates where `usize` is narrower; nothing that long fits there anyway.
#[inline(always)]
fn long(bytes: [u8; 4]) -> usize {
    usize::try_from(u32::from_be_bytes(bytes)).unwrap_or(usize::MAX)
}

/// For how many integers widths are taken to be mixed. Where one width alone is the rule, few: the next
/// run of it is near. Each time that such a run turns out short, twice as many.
#[derive(Debug)]
struct Mixed(usize);

impl Default for Mixed {
    fn default() -> Self {
        Self(16)
    }
}

impl Mixed {
    /// Where the next run is to be looked for, after one from `from` to `to`.
    #[inline(always)]
    fn until(&mut self, from: usize, to: usize) -> usize {
        if to - from < 16 {
            self.0 = self.0.saturating_mul(2);
        }
        to.saturating_add(self.0)
    }
}

/// Bytes after the marker of an unsigned integer: none for `0x00..=0x7f`, and 1, 2, 4, 8 for
/// `0xcc..=0xcf`. Meaningless for other markers.
#[inline]
const fn int_bytes(marker: u8) -> usize {
    ((marker >> 7) as usize) << (marker & 3)
}

/// The sizes, with their markers, of the two unsigned integers of up to 32 bits that `bytes` starts
/// with; `None` if there are none or less than 8 bytes. Both markers lie in the first 8.
#[inline(always)]
fn two_u32(bytes: &[u8]) -> Option<(usize, usize)> {
    let window = u64::from_le_bytes(*bytes.first_chunk()?);
    let first = int_bytes(window as u8);
    // Masked, because after another marker `first` may be too large to shift by.
    let after = window >> 8 >> ((8 * first) & 63);
    let second = int_bytes(after as u8);
    let both = is_u32(window as u8) & is_u32(after as u8);
    both.then_some((first + 1, second + 1))
}

/// The value of the unsigned integer of `size` bytes, 1 to 5 with its marker, that `window` starts
/// with.
#[inline(always)]
fn short_u32(window: [u8; 8], size: usize) -> u32 {
    // Shifts the marker out at the top, and what follows the value out at the bottom: all of it
    // if the marker is the value, and in two steps because a shift by 64 is none.
    let wide = (u64::from_be_bytes(window) << 8) >> 1 >> (71_usize.wrapping_sub(8 * size) & 63);
    let [marker, ..] = window;
    // The marker if it is the value, else 0; tokens mix both, so no branch.
    let fixed = marker & !(marker.cast_signed() >> 7).cast_unsigned();
    wide as u32 | u32::from(fixed)
}

/// Whether a marker is one of an unsigned integer of up to 32 bits.
#[inline(always)]
const fn is_u32(marker: u8) -> bool {
    marker < 0x80 || marker.wrapping_sub(0xcc) < 3
}

#[cfg(test)]
mod tests;
