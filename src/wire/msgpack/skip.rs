//! Finds where values end, and proves that everything inside them is well-formed.
//!
//! Half of decoding is this: a batch is skipped over once before its events are read.

use super::{Fault, Mixed, int_bytes, long, two_u32};

/// A skip under way. Positions are slices in registers, and the fault is set aside, because a
/// cursor in memory costs a stall for every container.
pub(super) struct Skip {
    /// Length of the whole payload.
    pub(super) len: usize,
    /// Why the skip ended, if it did.
    pub(super) fault: Fault,
}

impl Skip {
    /// What follows `left` values that start at `rest`, in containers nested at most `depth` deep.
    pub(super) fn values<'a>(
        &mut self,
        mut rest: &'a [u8],
        mut left: usize,
        depth: usize,
    ) -> Option<&'a [u8]> {
        while left > 0 {
            rest = match rest {
                [0x00..=0x7f | 0xcc..=0xcf, ..] => {
                    let (skipped, tail) = skip_ints(rest, left);
                    if skipped == 0 {
                        return self.truncated(rest);
                    }
                    left -= skipped;
                    rest = tail;
                    continue;
                }
                [marker @ 0xa0..=0xbf, tail @ ..] => match tail.get(usize::from(marker & 0x1f)..) {
                    Some(tail) => tail,
                    None => return self.truncated(rest),
                },
                [0xc0, tail @ ..] => tail,
                [marker @ 0x90..=0x9f, tail @ ..] => {
                    self.inside(rest, tail, usize::from(marker & 0x0f), depth)?
                }
                [marker @ 0x80..=0x8f, tail @ ..] => {
                    self.inside(rest, tail, usize::from(marker & 0x0f) * 2, depth)?
                }
                [0xdc, a, b, tail @ ..] => self.inside(rest, tail, long([0, 0, *a, *b]), depth)?,
                _ => self.rare(rest, depth)?,
            };
            left -= 1;
        }
        Some(rest)
    }

    /// What follows the container whose head is at `head` and whose `values` start at `tail`.
    #[inline(always)]
    fn inside<'a>(
        &mut self,
        head: &'a [u8],
        tail: &'a [u8],
        values: usize,
        depth: usize,
    ) -> Option<&'a [u8]> {
        if values > tail.len() {
            return self.truncated(head);
        }
        let Some(depth) = depth.checked_sub(1) else {
            self.fault = Fault::TooDeep { offset: self.len - head.len() };
            return None;
        };
        self.values(tail, values, depth)
    }

    /// What follows a value of a less common form.
    #[inline(never)]
    fn rare<'a>(&mut self, rest: &'a [u8], depth: usize) -> Option<&'a [u8]> {
        let (bytes, tail) = match rest {
            [0xc2 | 0xc3 | 0xe0..=0xff, tail @ ..] => (0, tail),
            [0xd0, tail @ ..] => (1, tail),
            [0xd1, tail @ ..] => (2, tail),
            [0xca | 0xd2, tail @ ..] => (4, tail),
            [0xcb | 0xd3, tail @ ..] => (8, tail),
            [0xc4 | 0xd9, a, tail @ ..] => (usize::from(*a), tail),
            [0xc5 | 0xda, a, b, tail @ ..] => (long([0, 0, *a, *b]), tail),
            [0xc6 | 0xdb, a, b, c, d, tail @ ..] => (long([*a, *b, *c, *d]), tail),
            // Extensions: one byte of type goes before the data.
            [marker @ 0xd4..=0xd8, _, tail @ ..] => (1 << (marker - 0xd4), tail),
            [0xc7, a, _, tail @ ..] => (usize::from(*a), tail),
            [0xc8, a, b, _, tail @ ..] => (long([0, 0, *a, *b]), tail),
            [0xc9, a, b, c, d, _, tail @ ..] => (long([*a, *b, *c, *d]), tail),
            [0xdd, a, b, c, d, tail @ ..] => {
                return self.inside(rest, tail, long([*a, *b, *c, *d]), depth);
            }
            [0xde, a, b, tail @ ..] => {
                return self.inside(rest, tail, long([0, 0, *a, *b]) * 2, depth);
            }
            [0xdf, a, b, c, d, tail @ ..] => {
                let values = long([*a, *b, *c, *d]).saturating_mul(2);
                return self.inside(rest, tail, values, depth);
            }
            [0xc1, ..] => {
                self.fault = Fault::Reserved { offset: self.len - rest.len() };
                return None;
            }
            _ => return self.truncated(rest),
        };
        match tail.get(bytes..) {
            Some(tail) => Some(tail),
            None => self.truncated(rest),
        }
    }

    #[cold]
    fn truncated<'a>(&mut self, rest: &[u8]) -> Option<&'a [u8]> {
        self.fault = Fault::Truncated { offset: self.len - rest.len() };
        None
    }
}

/// Skips unsigned integers while there are any, at most `most`; returns how many, and what follows
/// them. Nearly all of a payload are tokens, so this goes as [`Cursor::fill_u32`] does.
#[inline(always)]
fn skip_ints(mut rest: &[u8], most: usize) -> (usize, &[u8]) {
    let mut skipped = 0;
    let mut mixed = Mixed::default();
    loop {
        let from = skipped;
        while skipped < most
            && let [0xcd, _, _, tail @ ..] = rest
        {
            rest = tail;
            skipped += 1;
        }
        while skipped < most
            && let [0xce, _, _, _, _, tail @ ..] = rest
        {
            rest = tail;
            skipped += 1;
        }
        let until = mixed.until(from, skipped).min(most);
        while skipped + 2 <= until
            && let Some((first, second)) = two_u32(rest)
            && let Some(tail) = rest.get(first + second..)
        {
            rest = tail;
            skipped += 2;
        }
        if skipped == from {
            break;
        }
    }
    while skipped < most
        && let [marker @ (0x00..=0x7f | 0xcc..=0xcf), tail @ ..] = rest
        && let Some(tail) = tail.get(int_bytes(*marker)..)
    {
        rest = tail;
        skipped += 1;
    }
    (skipped, rest)
}
