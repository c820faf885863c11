//! Room in chunked storage: which grains of which chunk are free.
//!
//! Requests are for grains in a row. A bitmap per chunk finds them first-fit, so that what is given
//! back merges with its neighbours by itself and a long life leaves no fragments behind.

/// Grains per chunk.
pub(super) const GRAINS: u32 = 1 << 14;
const WORDS: usize = GRAINS as usize / 64;

/// See the module's documentation. Grains are numbered through all chunks.
#[derive(Debug, Default)]
pub(super) struct Space {
    chunks: Vec<Option<Chunk>>,
    /// Chunk that had room last.
    last: usize,
    taken: u64,
}

#[derive(Debug)]
struct Chunk {
    /// A set bit is a free grain.
    bits: Box<[u64; WORDS]>,
    free: u32,
    /// No request of this many grains or more has found room since the last one was given back.
    hopeless: u32,
    /// Word at which the next search begins.
    hint: usize,
}

/// Grains that a request got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// The first one.
    pub(super) grain: u32,
    /// The chunk is new: its memory has yet to be made.
    pub(super) chunk_is_new: bool,
}

impl Space {
    /// Takes `grains` in a row, at most a chunk's.
    pub(super) fn take(&mut self, grains: u32) -> Taken {
        debug_assert!((1..=GRAINS).contains(&grains));
        let count = self.chunks.len();
        for at in (self.last..count).chain(0..self.last.min(count)) {
            if let Some(grain) = self.chunks[at].as_mut().and_then(|chunk| chunk.take(grains)) {
                self.last = at;
                self.taken += u64::from(grains);
                return Taken { grain: at as u32 * GRAINS + grain, chunk_is_new: false };
            }
        }
        let at = self.chunks.iter().position(Option::is_none).unwrap_or(count);
        if at == count {
            self.chunks.push(None);
        }
        let mut chunk = Chunk::new();
        let grain = chunk.take(grains).unwrap_or_default();
        self.chunks[at] = Some(chunk);
        self.last = at;
        self.taken += u64::from(grains);
        Taken { grain: at as u32 * GRAINS + grain, chunk_is_new: true }
    }

    /// Takes `more` grains from `grain` on, if they are free and in its chunk.
    pub(super) fn take_at(&mut self, grain: u32, more: u32) -> bool {
        let (at, from) = (grain / GRAINS, grain % GRAINS);
        // The first grain of the next chunk is not behind the last one of this.
        if from == 0 || from + more > GRAINS {
            return false;
        }
        let Some(chunk) = self.chunks.get_mut(at as usize).and_then(Option::as_mut) else {
            return false;
        };
        if !chunk.all_free(from, more) {
            return false;
        }
        chunk.mark(from, more, false);
        self.taken += u64::from(more);
        true
    }

    /// Gives grains back. Returns the chunk if nothing is left in it and another empty one is
    /// kept: its memory may go.
    pub(super) fn give(&mut self, grain: u32, grains: u32) -> Option<usize> {
        let (at, from) = ((grain / GRAINS) as usize, grain % GRAINS);
        let chunk = self.chunks.get_mut(at)?.as_mut()?;
        chunk.mark(from, grains, true);
        chunk.hopeless = u32::MAX;
        chunk.hint = chunk.hint.min(from as usize / 64);
        self.taken -= u64::from(grains);
        if chunk.free < GRAINS {
            return None;
        }
        let empty = |chunk: &Option<Chunk>| chunk.as_ref().is_some_and(|c| c.free == GRAINS);
        if self.chunks.iter().filter(|chunk| empty(chunk)).count() < 2 {
            return None;
        }
        self.chunks[at] = None;
        Some(at)
    }

    /// Grains in use.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }
}

impl Chunk {
    fn new() -> Self {
        Self { bits: Box::new([u64::MAX; WORDS]), free: GRAINS, hopeless: u32::MAX, hint: 0 }
    }

    fn take(&mut self, grains: u32) -> Option<u32> {
        if grains > self.free || grains >= self.hopeless {
            return None;
        }
        let found = self.find(self.hint, grains).or_else(|| self.find(0, grains));
        let Some(from) = found else {
            self.hopeless = grains;
            return None;
        };
        self.mark(from, grains, false);
        self.hint = from as usize / 64;
        Some(from)
    }

    /// First free row of `grains` at or after a word.
    fn find(&self, word: usize, grains: u32) -> Option<u32> {
        let (mut start, mut have) = (0, 0);
        for (at, &bits) in self.bits.iter().enumerate().skip(word) {
            let mut bit = 0;
            while bit < 64 {
                let rest = bits >> bit;
                let ones = (!rest).trailing_zeros().min(64 - bit);
                if ones == 0 {
                    have = 0;
                    bit += rest.trailing_zeros().min(64 - bit);
                    continue;
                }
                if have == 0 {
                    start = at as u32 * 64 + bit;
                }
                have += ones;
                if have >= grains {
                    return Some(start);
                }
                bit += ones;
            }
        }
        None
    }

    fn all_free(&self, from: u32, grains: u32) -> bool {
        words(from, grains).all(|(at, mask)| self.bits[at] & mask == mask)
    }

    fn mark(&mut self, from: u32, grains: u32, free: bool) {
        for (at, mask) in words(from, grains) {
            if free {
                debug_assert_eq!(self.bits[at] & mask, 0, "given back twice");
                self.bits[at] |= mask;
            } else {
                self.bits[at] &= !mask;
            }
        }
        if free {
            self.free += grains;
        } else {
            self.free -= grains;
        }
    }
}

/// The words and masks of bits `from..from + count`.
pub(super) fn words(from: u32, count: u32) -> impl Iterator<Item = (usize, u64)> {
    let end = from + count;
    (from / 64..end.div_ceil(64)).map(move |word| {
        let low = from.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        let below = if high == 64 { u64::MAX } else { (1 << high) - 1 };
        (word as usize, below & (u64::MAX << low))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rows_never_overlap_and_come_back(
            ops in prop::collection::vec((0u32..4, 1u32..3000, any::<usize>()), 1..200)
        ) {
            let mut space = Space::default();
            let mut rows: Vec<(u32, u32)> = Vec::new();
            for (what, grains, which) in ops {
                match what {
                    0 if !rows.is_empty() => {
                        let (grain, grains) = rows.swap_remove(which % rows.len());
                        space.give(grain, grains);
                    }
                    1 if !rows.is_empty() => {
                        let at = which % rows.len();
                        let (grain, had) = rows[at];
                        let more = grains % 64 + 1;
                        if space.take_at(grain + had, more) {
                            rows[at].1 += more;
                        }
                    }
                    _ => rows.push((space.take(grains).grain, grains)),
                }
                let mut sorted = rows.clone();
                sorted.sort_unstable();
                for pair in sorted.windows(2) {
                    prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?} overlap");
                }
                for (grain, grains) in sorted {
                    prop_assert_eq!(grain / GRAINS, (grain + grains - 1) / GRAINS);
                }
                let taken: u64 = rows.iter().map(|row| u64::from(row.1)).sum();
                prop_assert_eq!(space.taken(), taken);
            }
        }
    }

    #[test]
    fn neighbours_merge() {
        let mut space = Space::default();
        let rows: Vec<u32> = (0..GRAINS / 4).map(|_| space.take(4).grain).collect();
        for row in &rows {
            assert_eq!(space.give(*row, 4), None, "the only chunk stays");
        }
        assert_eq!(space.take(GRAINS), Taken { grain: 0, chunk_is_new: false });
        assert_eq!(space.take(1), Taken { grain: GRAINS, chunk_is_new: true });
    }
}
