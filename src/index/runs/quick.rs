//! The lookup that nearly every lookup is: rows with full attention only, without marks, whose
//! lines are spans.
//!
//! Depths are written into the caller's buffer as rows leave the set of those that hold everything
//! so far. Whatever does not fit (a bitmap under other tiers, a row that goes on after a run that
//! it holds in several tiers) is left to [`walk`](super::walk), which knows everything.

use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use super::{
    cover::{Seat, Word},
    storage::{Found, Outdated, PIN, Snapshot},
    view::Seats,
    walk::Question,
};
use crate::{
    index::Match,
    model::{PodSlot, TierTable},
};

/// Takes what a lookup finds.
pub(super) trait Sink {
    /// A row holds `depth` leading blocks, which weigh `score` in all.
    fn found(&mut self, slot: PodSlot, depth: u32, score: f64);
    /// How much it has taken.
    fn len(&self) -> usize;
    /// Gives back what it has taken since there was `len` of it.
    fn truncate(&mut self, len: usize);
    /// Takes 64 rows of one depth with slots in a row.
    fn found_all(&mut self, first: PodSlot, depth: u32, score: f64) {
        for slot in first.0..first.0 + 64 {
            self.found(PodSlot(slot), depth, score);
        }
    }
}

impl Sink for Vec<(PodSlot, u32)> {
    #[inline]
    fn found(&mut self, slot: PodSlot, depth: u32, _: f64) {
        self.push((slot, depth));
    }

    fn len(&self) -> usize {
        Self::len(self)
    }

    fn truncate(&mut self, len: usize) {
        Self::truncate(self, len);
    }

    fn found_all(&mut self, first: PodSlot, depth: u32, _: f64) {
        self.extend((first.0..first.0 + 64).map(|slot| (PodSlot(slot), depth)));
    }
}

impl Sink for Vec<Match> {
    #[inline]
    fn found(&mut self, slot: PodSlot, depth: u32, score: f64) {
        let (tiers, speculative) = (Vec::new(), 0);
        self.push(Match { slot, depth, confirmed: depth, score, tiers, speculative });
    }

    fn len(&self) -> usize {
        Self::len(self)
    }

    fn truncate(&mut self, len: usize) {
        Self::truncate(self, len);
    }
}

/// Why there is no quick answer.
pub(super) enum Unanswered {
    /// It takes [`walk`](super::walk).
    Hard,
    /// It takes a newer snapshot.
    Outdated,
}

impl From<Outdated> for Unanswered {
    fn from(_: Outdated) -> Self {
        Self::Outdated
    }
}

/// What became of one run.
enum Read {
    Done,
    /// Somebody wrote meanwhile.
    Torn,
    Hard,
}

struct Quick<'a, S> {
    snapshot: &'a Snapshot,
    question: &'a Question,
    gpu: f64,
    out: &'a mut S,
}

/// Follows the keys; rows come in no particular order. The view must have no hybrid rows.
pub(super) fn along(
    snapshot: &Snapshot,
    question: &Question,
    keys: &[crate::model::RequestKey],
    out: &mut impl Sink,
) -> Result<(), Unanswered> {
    let gpu = question.weights[usize::from(TierTable::GPU.0)];
    if question.weights.iter().any(|&other| other > gpu) {
        return Err(Unanswered::Hard);
    }
    let mut quick = Quick { snapshot, question, gpu, out };
    let mut next: Seats = SmallVec::new();
    let mut active: Seats = SmallVec::new();
    let mut at = 0;
    while let Some(found) = snapshot.find(&keys[at..])? {
        let before = quick.out.len();
        let simple = if at == 0 { &snapshot.view.simple } else { &active };
        let ends = at + found.common as usize == keys.len();
        let read = quick.read(&found, at as u32, ends, simple, &mut next);
        if !Snapshot::is_consistent(&found) || matches!(read, Read::Torn) {
            if matches!(read, Read::Torn) && Snapshot::is_consistent(&found) {
                return Err(Unanswered::Outdated);
            }
            quick.out.truncate(before);
            continue;
        }
        if matches!(read, Read::Hard) {
            return Err(Unanswered::Hard);
        }
        std::mem::swap(&mut active, &mut next);
        at += found.common as usize;
        if at == keys.len() || active.iter().all(|&word| word == 0) {
            break;
        }
    }
    quick.all(&active, at as u32);
    Ok(())
}

impl<S: Sink> Quick<'_, S> {
    /// Reads one run, and leaves in `next` the rows that hold all of it as far as the keys go.
    #[inline]
    fn read(
        &mut self,
        found: &Found<'_>,
        at: u32,
        ends: bool,
        active: &Seats,
        next: &mut Seats,
    ) -> Read {
        let Some(holders) = self.snapshot.holders(found) else { return Read::Torn };
        let common = found.common;
        next.clear();
        next.resize(active.len(), 0);
        for ((next, set), active) in next.iter_mut().zip(holders.set).zip(active) {
            *next = active & set.load(Ordering::Relaxed);
        }
        // Rows whose depth has been told here.
        let mut told: Seats = SmallVec::new();
        if at > 0 {
            told.resize(active.len(), 0);
        }
        let lines = holders.lines;
        let mut line = 0;
        while let Some(word) = load(lines, line) {
            let seat = word.id().seat();
            let first = line;
            line += 1;
            let (place, bit) = (usize::from(seat) / 64, 1u64 << (seat % 64));
            let alone = load(lines, line).is_none_or(|other| other.id().seat() != seat);
            if active.get(place).is_none_or(|active| active & bit == 0) {
                continue;
            }
            let held = if alone && word.id().is_plain() {
                match word.value() {
                    Ok((0, to)) => (to.min(common), f64::NAN),
                    Ok(_) => (0, f64::NAN),
                    Err(address) => match self.snapshot.bitmap(address) {
                        Some((leading, _)) => (leading.min(common), f64::NAN),
                        None => return Read::Torn,
                    },
                }
            } else {
                while load(lines, line).is_some_and(|other| other.id().seat() == seat) {
                    line += 1;
                }
                if next[place] & bit != 0 {
                    (common, f64::NAN)
                } else {
                    match self.union(&lines[first..line], common) {
                        Some(held) => held,
                        None => return Read::Hard,
                    }
                }
            };
            match held {
                (depth, score) if depth == common && score.is_nan() => next[place] |= bit,
                // Mixed tiers to the end of the run: only if the keys end there too.
                (depth, score) if depth < common || ends => {
                    let score = if score.is_nan() { f64::from(depth) * self.gpu } else { score };
                    if at + depth > 0 {
                        let before = f64::from(at) * self.gpu;
                        self.out.found(self.snapshot.view.slot(seat), at + depth, before + score);
                    }
                    if at > 0 {
                        told[place] |= bit;
                    }
                }
                _ => return Read::Hard,
            }
        }
        if at > 0 {
            for place in 0..active.len() {
                let gone = active[place] & !next[place] & !told[place];
                self.word(place, gone, at);
            }
        }
        Read::Done
    }

    /// What the lines of one row hold of a run's first blocks, and its weight; not a number where
    /// the GPU holds all of it. `None` for what takes a closer look.
    fn union(&self, lines: &[AtomicU64], common: u32) -> Option<(u32, f64)> {
        if let [first, second] = lines {
            let load = |line: &AtomicU64| Word(line.load(Ordering::Relaxed));
            let (first, second) = (load(first), load(second));
            let in_tier = |line: Word| line.id().part() == 0 && line.id().tag() < 16;
            if let (Ok((0, to)), Ok((from, end))) = (first.value(), second.value())
                && first.id().is_plain()
                && in_tier(second)
            {
                // What the GPU holds comes first, the other tier goes on, or does not.
                let gpu = to.min(common);
                if gpu == common {
                    return Some((common, f64::NAN));
                }
                let goes_on = from <= gpu && gpu < end;
                let depth = if goes_on { end.min(common) } else { gpu };
                let other = self.question.weights[usize::from(second.id().tag())];
                return Some((depth, f64::from(gpu) * self.gpu + f64::from(depth - gpu) * other));
            }
        }
        let weight = |word: Word| self.question.weights[usize::from(word.id().tag() & 15)];
        let lines: SmallVec<[Word; 4]> = lines
            .iter()
            .map(|line| Word(line.load(Ordering::Relaxed)))
            .filter(|line| line.id().part() != PIN)
            .collect();
        let first = *lines.first()?;
        if lines.len() == 1 && first.id().is_plain() {
            let depth = match first.value() {
                Ok((0, to)) => to,
                Ok(_) => 0,
                Err(address) => self.snapshot.bitmap(address)?.0,
            };
            return Some((depth.min(common), f64::NAN));
        }
        // Other tiers of what the heaviest one holds are of no account.
        if first.id().is_plain() && first.is_full(common) {
            return Some((common, f64::NAN));
        }
        let (mut depth, mut score) = (0, 0.0);
        while depth < common {
            let (mut best, mut until) = (f64::NEG_INFINITY, common);
            for &line in &lines {
                let (from, to) = line.value().ok()?;
                if line.id().part() != 0 || line.id().tag() > 15 {
                    return None;
                }
                if from <= depth && depth < to {
                    best = best.max(weight(line));
                    until = until.min(to);
                } else if from > depth {
                    until = until.min(from);
                }
            }
            if best == f64::NEG_INFINITY {
                break;
            }
            score += f64::from(until - depth) * best;
            depth = until;
        }
        Some((depth, score))
    }

    /// The rows of one word of a set have one depth.
    #[inline]
    fn word(&mut self, place: usize, seats: u64, depth: u32) {
        let score = f64::from(depth) * self.gpu;
        let first = (place * 64) as Seat;
        if seats == u64::MAX && self.snapshot.view.in_order {
            self.out.found_all(PodSlot(u32::from(first)), depth, score);
            return;
        }
        let mut left = seats;
        while left != 0 {
            let seat = first + left.trailing_zeros() as Seat;
            left &= left - 1;
            self.out.found(self.snapshot.view.slot(seat), depth, score);
        }
    }

    fn all(&mut self, seats: &Seats, depth: u32) {
        if depth > 0 {
            for (place, &seats) in seats.iter().enumerate() {
                self.word(place, seats, depth);
            }
        }
    }
}

#[inline]
fn load(lines: &[AtomicU64], at: usize) -> Option<Word> {
    lines.get(at).map(|line| Word(line.load(Ordering::Relaxed)))
}
