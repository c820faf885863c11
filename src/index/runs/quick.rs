//! The lookup that nearly every lookup is: rows with full attention only.
//!
//! Depths are written into the caller's buffer as rows leave the set of those that hold everything
//! on the GPU so far. A row of which more must be known (other tiers, speculative marks) is
//! *carried*: its depths and its weight are added up run by run. Whatever does not fit (several
//! groups, depths by tier, tiers that weigh more than the GPU) is left to [`walk`](super::walk),
//! which knows everything.

use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use super::{
    cover::{LineId, MARKS, Seat, Word},
    storage::{Found, Holders, MARK, Outdated, PIN, Snapshot},
    view::Seats,
    walk::Question,
};
use crate::{
    index::Match,
    model::{PodSlot, RequestKey, TierTable},
};

/// What a lookup finds of a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Depths {
    /// Leading blocks that are held or marked.
    pub(super) depth: u32,
    /// Leading blocks that are held.
    pub(super) confirmed: u32,
    /// Leading blocks that are marked.
    pub(super) speculative: u32,
    /// Weight of `depth`.
    pub(super) score: f64,
}

impl Depths {
    /// All of one tier, without marks.
    fn plain(depth: u32, score: f64) -> Self {
        Self { depth, confirmed: depth, speculative: 0, score }
    }
}

/// Takes what a lookup finds.
pub(super) trait Sink {
    fn found(&mut self, slot: PodSlot, depths: Depths);
    /// How much it has taken.
    fn len(&self) -> usize;
    /// Gives back what it has taken since there was `len` of it.
    fn truncate(&mut self, len: usize);
    /// Takes 64 rows of one depth with slots in a row.
    fn found_all(&mut self, first: PodSlot, depths: Depths) {
        for slot in first.0..first.0 + 64 {
            self.found(PodSlot(slot), depths);
        }
    }
}

impl Sink for Vec<(PodSlot, u32)> {
    #[inline]
    fn found(&mut self, slot: PodSlot, depths: Depths) {
        self.push((slot, depths.depth));
    }

    fn len(&self) -> usize {
        Self::len(self)
    }

    fn truncate(&mut self, len: usize) {
        Self::truncate(self, len);
    }

    fn found_all(&mut self, first: PodSlot, depths: Depths) {
        self.extend((first.0..first.0 + 64).map(|slot| (PodSlot(slot), depths.depth)));
    }
}

impl Sink for Vec<Match> {
    #[inline]
    fn found(&mut self, slot: PodSlot, depths: Depths) {
        let Depths { depth, confirmed, speculative, score } = depths;
        self.push(Match { slot, depth, confirmed, score, tiers: Vec::new(), speculative });
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

/// A row of which the set of active ones does not say enough. It goes on while its depth is where
/// the walk is.
#[derive(Clone, Copy, Debug)]
struct Carried {
    seat: Seat,
    depths: Depths,
}

/// Blocks of a run that one tier holds, and what each weighs; marks are a tier of their own.
#[derive(Clone, Copy, Debug)]
struct Piece {
    from: u32,
    to: u32,
    weight: f64,
    marked: bool,
}

type Pieces = SmallVec<[Piece; 8]>;

/// Pieces of one row and run at most; a row with more holes is left to the walk.
const MOST_PIECES: usize = 64;

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
    keys: &[RequestKey],
    out: &mut impl Sink,
) -> Result<(), Unanswered> {
    let gpu = question.weights[usize::from(TierTable::GPU.0)];
    if question.weights.iter().any(|&other| other > gpu) || question.speculative_weight > gpu {
        return Err(Unanswered::Hard);
    }
    let mut quick = Quick { snapshot, question, gpu, out };
    let mut next: Seats = SmallVec::new();
    let mut active: Seats = SmallVec::new();
    let mut carried: SmallVec<[Carried; 4]> = SmallVec::new();
    let mut at = 0;
    while let Some(found) = snapshot.find(&keys[at..])? {
        let (before, carried_before) = (quick.out.len(), carried.clone());
        let simple = if at == 0 { &snapshot.view.simple } else { &active };
        let read = quick.read(&found, at as u32, simple, &mut next, &mut carried);
        if !Snapshot::is_consistent(&found) || matches!(read, Read::Torn) {
            if matches!(read, Read::Torn) && Snapshot::is_consistent(&found) {
                return Err(Unanswered::Outdated);
            }
            quick.out.truncate(before);
            carried = carried_before;
            continue;
        }
        if matches!(read, Read::Hard) {
            return Err(Unanswered::Hard);
        }
        std::mem::swap(&mut active, &mut next);
        at += found.common as usize;
        if at == keys.len() || (carried.is_empty() && active.iter().all(|&word| word == 0)) {
            break;
        }
    }
    quick.all(&active, at as u32);
    for row in carried {
        quick.leave(row);
    }
    Ok(())
}

impl<S: Sink> Quick<'_, S> {
    /// Reads one run, and leaves in `next` the rows that hold all of it on the GPU as far as the
    /// keys go, and in `carried` the others that go on.
    #[inline]
    fn read(
        &mut self,
        found: &Found<'_>,
        at: u32,
        active: &Seats,
        next: &mut Seats,
        carried: &mut SmallVec<[Carried; 4]>,
    ) -> Read {
        let Some(holders) = self.snapshot.holders(found) else { return Read::Torn };
        let common = found.common;
        let (lines, marks) = holders.split();
        let unmarked;
        let mut active = active;
        if !marks.is_empty() || !carried.is_empty() {
            let mut left = active.clone();
            self.start_carrying(marks, at, &mut left, carried);
            unmarked = left;
            active = &unmarked;
            let read = self.carry(&holders, at, common, carried);
            if !matches!(read, Read::Done) {
                return read;
            }
        }
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
                        Ok(held) => held,
                        Err(read) => return read,
                    }
                }
            };
            let (depth, score) = held;
            // Tiers of the GPU's weight are as good.
            let full = score.is_nan() || score == f64::from(common) * self.gpu;
            if depth == common && full {
                next[place] |= bit;
                continue;
            }
            if at > 0 {
                told[place] |= bit;
            }
            let score = if score.is_nan() { f64::from(depth) * self.gpu } else { score };
            let depths = Depths::plain(at + depth, f64::from(at) * self.gpu + score);
            if depth == common {
                carried.push(Carried { seat, depths });
            } else {
                self.leave(Carried { seat, depths });
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
    /// the GPU holds all of it.
    #[inline]
    fn union(&self, lines: &[AtomicU64], common: u32) -> Result<(u32, f64), Read> {
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
                    return Ok((common, f64::NAN));
                }
                let goes_on = from <= gpu && gpu < end;
                let depth = if goes_on { end.min(common) } else { gpu };
                let other = self.question.weights[usize::from(second.id().tag())];
                return Ok((depth, f64::from(gpu) * self.gpu + f64::from(depth - gpu) * other));
            }
        }
        if let Some(first) = load(lines, 0)
            && first.id().is_plain()
            && first.is_full(common)
        {
            // Other tiers of what the heaviest one holds are of no account.
            return Ok((common, f64::NAN));
        }
        let mut pieces = Pieces::new();
        for line in lines {
            self.pieces(Word(line.load(Ordering::Relaxed)), common, &mut pieces)?;
        }
        Ok(covered(&pieces, common, |_| true))
    }

    /// Adds what a line says of the first blocks of a run.
    fn pieces(&self, line: Word, common: u32, pieces: &mut Pieces) -> Result<(), Read> {
        let id = line.id();
        let marked = id.part() == MARK;
        let weight = match (id.part(), id.tag()) {
            (PIN, _) => return Ok(()),
            (MARK, _) => self.question.speculative_weight,
            (0, tag @ 0..16) => self.question.weights[usize::from(tag)],
            _ => return Err(Read::Hard),
        };
        match line.value() {
            Ok((from, to)) => pieces.push(Piece { from, to: to.min(common), weight, marked }),
            Err(address) => {
                let Some((_, words)) = self.snapshot.bitmap(address) else {
                    return Err(Read::Torn);
                };
                let held = |block: u32| {
                    words
                        .get(block as usize / 64)
                        .is_some_and(|word| word.load(Ordering::Relaxed) >> (block % 64) & 1 == 1)
                };
                let mut from = 0;
                while from < common {
                    let to = (from..common).find(|&block| !held(block)).unwrap_or(common);
                    if from < to {
                        pieces.push(Piece { from, to, weight, marked });
                    }
                    if pieces.len() > MOST_PIECES {
                        return Err(Read::Hard);
                    }
                    from = (to..common).find(|&block| held(block)).unwrap_or(common);
                }
            }
        }
        Ok(())
    }

    /// Carries the active rows that a run has marks for.
    fn start_carrying(
        &self,
        marks: &[AtomicU64],
        at: u32,
        active: &mut Seats,
        carried: &mut SmallVec<[Carried; 4]>,
    ) {
        for mark in marks {
            let id = Word(mark.load(Ordering::Relaxed)).id();
            let Some(row) = self.snapshot.view.row(id.marked_slot()) else { continue };
            let (place, bit) = (usize::from(row.seat) / 64, 1u64 << (row.seat % 64));
            if active.get(place).is_some_and(|active| active & bit != 0) {
                active[place] &= !bit;
                let depths = Depths::plain(at, f64::from(at) * self.gpu);
                carried.push(Carried { seat: row.seat, depths });
            }
        }
    }

    /// Takes the carried rows over a run. Those that it ends for leave.
    fn carry(
        &mut self,
        holders: &Holders<'_>,
        at: u32,
        common: u32,
        carried: &mut SmallVec<[Carried; 4]>,
    ) -> Read {
        let (lines, marks) = holders.split();
        let mut kept = 0;
        for row in 0..carried.len() {
            let mut row = carried[row];
            let mut pieces = Pieces::new();
            if holders.is_member(row.seat) {
                pieces.push(Piece { from: 0, to: common, weight: self.gpu, marked: false });
            }
            let slot = self.snapshot.view.slot(row.seat);
            for (lines, seat) in [(lines, row.seat), (marks, MARKS.wrapping_add(slot.0 as Seat))] {
                let first = lines.partition_point(|line| {
                    Word(line.load(Ordering::Relaxed)).id() < LineId::new(seat, 0, 0)
                });
                for line in &lines[first..] {
                    let line = Word(line.load(Ordering::Relaxed));
                    if line.id().seat() != seat {
                        break;
                    }
                    if let Err(read) = self.pieces(line, common, &mut pieces) {
                        return read;
                    }
                }
            }
            let depths = &mut row.depths;
            let (depth, score) = covered(&pieces, common, |_| true);
            depths.depth += depth;
            depths.score += if score.is_nan() { f64::from(depth) * self.gpu } else { score };
            if depths.confirmed == at {
                depths.confirmed += covered(&pieces, common, |piece| !piece.marked).0;
            }
            if depths.speculative == at {
                depths.speculative += covered(&pieces, common, |piece| piece.marked).0;
            }
            if depth == common {
                carried[kept] = row;
                kept += 1;
            } else {
                self.leave(row);
            }
        }
        carried.truncate(kept);
        Read::Done
    }

    /// The walk is over for a row.
    #[inline]
    fn leave(&mut self, row: Carried) {
        if row.depths.depth > 0 {
            self.out.found(self.snapshot.view.slot(row.seat), row.depths);
        }
    }

    /// The rows of one word of a set have one depth.
    #[inline]
    fn word(&mut self, place: usize, seats: u64, depth: u32) {
        let depths = Depths::plain(depth, f64::from(depth) * self.gpu);
        let first = (place * 64) as Seat;
        if seats == u64::MAX && self.snapshot.view.in_order {
            self.out.found_all(PodSlot(u32::from(first)), depths);
            return;
        }
        let mut left = seats;
        while left != 0 {
            let seat = first + left.trailing_zeros() as Seat;
            left &= left - 1;
            self.out.found(self.snapshot.view.slot(seat), depths);
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

/// How many leading blocks the pieces that `count` cover, and what these weigh: each as much as
/// the heaviest piece that has it.
fn covered(pieces: &Pieces, common: u32, counts: impl Fn(&Piece) -> bool) -> (u32, f64) {
    let (mut depth, mut score) = (0, 0.0);
    while depth < common {
        let (mut best, mut until) = (f64::NEG_INFINITY, common);
        for piece in pieces.iter().filter(|piece| counts(piece)) {
            if piece.from <= depth && depth < piece.to {
                best = best.max(piece.weight);
                until = until.min(piece.to);
            } else if piece.from > depth {
                until = until.min(piece.from);
            }
        }
        if best == f64::NEG_INFINITY {
            break;
        }
        score += f64::from(until - depth) * best;
        depth = until;
    }
    (depth, score)
}

#[inline]
fn load(lines: &[AtomicU64], at: usize) -> Option<Word> {
    lines.get(at).map(|line| Word(line.load(Ordering::Relaxed)))
}
