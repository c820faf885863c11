//! One lookup's walk along the keys, from run to run.
//!
//! Rows that hold everything on the GPU so far are walked together as a set of seats: a run costs
//! one AND per 64 rows. A row leaves the set with its depth where its line ends. Rows of which
//! more must be known (several attention groups; several tiers where they matter; speculative
//! marks) are *recorded*: what they hold of each block is written down, and judged at the end.

use smallvec::SmallVec;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    cover::{LineId, Seat, Word},
    storage::{Found, MARK, Outdated, PIN, Snapshot},
    view::{Parts, Seats},
};
use crate::{
    index::{
        Match,
        ledger::{MIXED, Part},
        slots::ones,
    },
    model::{PodSlot, RequestKey, TierId, TierTable},
};

type Weights = [f64; TierTable::MAX];

/// Tiers that hold one block of one part: bit `t` = tier `t`, bit `16 + t` = several tiers
/// together, the lightest of them `t`.
type Tags = u32;

/// What a lookup asks beside the keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub(super) weights: Weights,
    pub(super) speculative_weight: f64,
    /// Are depths by tier wanted?
    pub(super) tiers: bool,
}

/// See the module's documentation.
pub(super) struct Walk<'a> {
    snapshot: &'a Snapshot,
    question: &'a Question,
    keys: &'a [RequestKey],
    /// May other tiers of a block that the GPU holds be ignored?
    gpu_is_enough: bool,
    active: Seats,
    recorded: Seats,
    records: Vec<Record<'a>>,
    pending: Vec<(LineId, Piece)>,
    /// Depths of the rows that were never recorded, by seat.
    found: Vec<(Seat, u32)>,
}

/// What a line says of the blocks of one run that were asked for.
#[derive(Debug)]
enum Piece {
    Span(u32, u32),
    Bits(SmallVec<[u64; 8]>),
}

fn has(seats: &Seats, seat: Seat) -> bool {
    seats.get(usize::from(seat) / 64).is_some_and(|word| word >> (seat % 64) & 1 == 1)
}

fn add(seats: &mut Seats, seat: Seat) {
    if let Some(word) = seats.get_mut(usize::from(seat) / 64) {
        *word |= 1 << (seat % 64);
    }
}

impl<'a> Walk<'a> {
    /// Follows the keys to where nobody goes on.
    pub(super) fn along(
        snapshot: &'a Snapshot,
        question: &'a Question,
        keys: &'a [RequestKey],
    ) -> Result<Self, Outdated> {
        let view = &*snapshot.view;
        let gpu = question.weights[usize::from(TierTable::GPU.0)];
        let mut walk = Self {
            snapshot,
            question,
            keys,
            gpu_is_enough: !question.tiers && question.weights.iter().all(|&weight| weight <= gpu),
            active: view.simple.clone(),
            recorded: SmallVec::new(),
            records: Vec::new(),
            pending: Vec::new(),
            found: Vec::new(),
        };
        for &slot in &view.hybrid {
            walk.record(slot, 0);
        }
        walk.go()?;
        Ok(walk)
    }

    /// Begins to record a row that held `blocks` blocks on the GPU so far.
    fn record(&mut self, slot: PodSlot, blocks: usize) {
        let Some(row) = self.snapshot.view.row(slot) else { return };
        let seat = row.seat;
        let width = usize::from(seat) / 64 + 1;
        if self.recorded.len() < width {
            self.recorded.resize(width, 0);
        }
        add(&mut self.recorded, seat);
        if let Some(word) = self.active.get_mut(usize::from(seat) / 64) {
            *word &= !(1 << (seat % 64));
        }
        let mut tags: SmallVec<[(Part, Vec<Tags>); 1]> = SmallVec::new();
        if blocks > 0 {
            tags.push((0, vec![1; blocks]));
        }
        self.records.push(Record {
            slot,
            seat,
            block_size: row.block_size.max(1),
            parts: &row.parts,
            tags,
            blocks,
            unbroken: blocks,
        });
    }

    fn go(&mut self) -> Result<(), Outdated> {
        let mut at = 0;
        while at < self.keys.len() {
            let Some(found) = self.snapshot.find(&self.keys[at..])? else {
                self.drop_active(at as u32, &Seats::new(), &Seats::new());
                self.active.clear();
                if !self.advance(1) {
                    break;
                }
                at += 1;
                continue;
            };
            let before = self.found.len();
            match self.read(&found, at as u32) {
                Some((now, left)) if Snapshot::is_consistent(&found) => {
                    self.settle(at as u32, now, &left);
                    let simple = self.active.iter().any(|&word| word != 0);
                    let recorded = self.advance(found.common);
                    at += found.common as usize;
                    if !simple && !recorded {
                        break;
                    }
                }
                None if Snapshot::is_consistent(&found) => return Err(Outdated),
                // Torn. The run may be gone at the next look, so nothing of it may stay.
                _ => {
                    self.found.truncate(before);
                    self.pending.clear();
                }
            }
        }
        let end = at.min(self.keys.len()) as u32;
        self.drop_active(end, &Seats::new(), &Seats::new());
        Ok(())
    }

    /// Reads who holds a run. Returns the rows that hold all of it as far as the keys go, and
    /// those that were active and need not be noted as leaving: they have been, or are pending.
    fn read(&mut self, found: &Found<'_>, at: u32) -> Option<(Seats, Seats)> {
        let holders = self.snapshot.holders(found)?;
        let common = found.common;
        let mut now: Seats = self.active.clone();
        for (word, now) in now.iter_mut().enumerate() {
            *now &= holders.set.get(word).map_or(0, |set| set.load(Ordering::Relaxed));
        }
        let mut left: Seats = SmallVec::new();
        let mut records = std::mem::take(&mut self.pending);
        for record in &self.records {
            if holders.is_member(record.seat) {
                records.push((LineId::new(record.seat, 0, 0), Piece::Span(0, common)));
            }
        }
        let (lines, marks) = holders.split();
        let mut marked: Seats = SmallVec::new();
        if !marks.is_empty() {
            marked.resize(self.active.len().max(self.recorded.len()), 0);
            marks.iter().filter_map(|line| self.marked_row(line)).for_each(|(id, _)| {
                add(&mut marked, id.seat());
            });
        }
        let word = |at: usize| lines.get(at).map(|line| Word(line.load(Ordering::Relaxed)));
        let mut next = 0;
        while let Some(line) = word(next) {
            let (first, seat) = (next, line.id().seat());
            next += 1;
            let active = has(&self.active, seat);
            let recorded = has(&self.recorded, seat);
            if !active && !recorded {
                continue;
            }
            let mut several = !line.id().is_plain() && line.id().part() != PIN;
            while let Some(line) = word(next).filter(|line| line.id().seat() == seat) {
                several |= line.id().part() != PIN;
                next += 1;
            }
            if active {
                let member = has(&now, seat);
                let gpu = if member {
                    common
                } else if line.id().is_plain() {
                    match line.value() {
                        Ok((0, to)) => to.min(common),
                        Ok(_) => 0,
                        Err(address) => self.snapshot.bitmap(address)?.0.min(common),
                    }
                } else {
                    0
                };
                several |= has(&marked, seat);
                let is_enough = self.gpu_is_enough && !has(&marked, seat);
                if gpu == common && (!several || is_enough) {
                    add(&mut now, seat);
                    continue;
                }
                if !several {
                    if gpu > 0 {
                        left.resize(self.active.len(), 0);
                        add(&mut left, seat);
                        self.found.push((seat, at + gpu));
                    }
                    continue;
                }
                self.part_with(seat, common, &mut now, &mut left, &mut records);
            }
            for line in (first..next).filter_map(word).filter(|line| line.id().part() != PIN) {
                records.push((line.id(), self.piece(line, common)?));
            }
        }
        for (id, line) in marks.iter().filter_map(|line| self.marked_row(line)) {
            if has(&self.active, id.seat()) && !has(&left, id.seat()) {
                self.part_with(id.seat(), common, &mut now, &mut left, &mut records);
            }
            records.push((id, self.piece(line, common)?));
        }
        self.pending = records;
        Some((now, left))
    }

    /// An active row leaves the set of those that are walked together, without a depth: its lines
    /// are pending.
    fn part_with(
        &self,
        seat: Seat,
        common: u32,
        now: &mut Seats,
        left: &mut Seats,
        pending: &mut Vec<(LineId, Piece)>,
    ) {
        left.resize(self.active.len(), 0);
        add(left, seat);
        if has(now, seat) {
            pending.push((LineId::new(seat, 0, 0), Piece::Span(0, common)));
            now[usize::from(seat) / 64] &= !(1 << (seat % 64));
        }
    }

    /// A line of marks, under the seat of the row's life, if lookups still follow that.
    fn marked_row(&self, line: &AtomicU64) -> Option<(LineId, Word)> {
        let line = Word(line.load(Ordering::Relaxed));
        let seat = self.snapshot.view.row(line.id().marked_slot())?.seat;
        let followed = has(&self.active, seat) || has(&self.recorded, seat);
        followed.then(|| (LineId::new(seat, MARK, 0), line))
    }

    fn piece(&self, line: Word, common: u32) -> Option<Piece> {
        Some(match line.value() {
            Ok((from, to)) => Piece::Span(from.min(common), to.min(common)),
            Err(address) => {
                let words = self.snapshot.bitmap(address)?.1.iter();
                Piece::Bits(words.map(|word| word.load(Ordering::Relaxed)).collect())
            }
        })
    }

    /// Takes in what [`read`](Self::read) returned, now that it is known to belong together.
    fn settle(&mut self, at: u32, now: Seats, left: &Seats) {
        self.drop_active(at, &now, left);
        self.active = now;
        for pending in 0..self.pending.len() {
            let seat = self.pending[pending].0.seat();
            if !has(&self.recorded, seat) {
                let slot = self.snapshot.view.slot(seat);
                self.record(slot, at as usize);
            }
        }
    }

    /// Notes the depth of active rows that do not go on.
    fn drop_active(&mut self, depth: u32, now: &Seats, left: &Seats) {
        if depth == 0 {
            return;
        }
        let stay = |word: usize| {
            let of = |seats: &Seats| seats.get(word).copied().unwrap_or(0);
            of(now) | of(left)
        };
        for (word, &active) in self.active.iter().enumerate() {
            let gone = [active & !stay(word)];
            self.found.extend(ones(&gone).map(|bit| ((word as u32 * 64 + bit.0) as Seat, depth)));
        }
    }

    /// Adds the pending pieces of the next `blocks` blocks to the records; is any worth going on?
    fn advance(&mut self, blocks: u32) -> bool {
        let mut any = false;
        for record in &mut self.records {
            let seat = record.seat;
            let own = self.pending.iter().filter(|(id, _)| id.seat() == seat);
            record.extend(blocks as usize, own);
            any |= record.goes_on();
        }
        self.pending.clear();
        any
    }

    /// Rows and their depths.
    pub(super) fn depths(&self, out: &mut Vec<(PodSlot, u32)>) {
        let view = &self.snapshot.view;
        out.extend(self.found.iter().map(|&(seat, depth)| (view.slot(seat), depth)));
        for record in &self.records {
            let depth = record.depth(self.keys.len(), u32::MAX, true) as u32;
            if depth > 0 {
                out.push((record.slot, depth));
            }
        }
    }

    /// Everything that is known of the rows.
    pub(super) fn matches(&self, out: &mut Vec<Match>) {
        let view = &self.snapshot.view;
        let gpu = self.question.weights[usize::from(TierTable::GPU.0)];
        out.extend(self.found.iter().map(|&(seat, depth)| Match {
            slot: view.slot(seat),
            depth,
            confirmed: depth,
            score: f64::from(depth) * gpu,
            tiers: if self.question.tiers { vec![(TierTable::GPU, depth)] } else { Vec::new() },
            speculative: 0,
        }));
        out.extend(
            self.records.iter().filter_map(|record| record.matched(self.keys.len(), self.question)),
        );
    }
}

/// What one row holds of each block.
struct Record<'a> {
    slot: PodSlot,
    seat: Seat,
    block_size: u32,
    parts: &'a Parts,
    /// By part, then by block; blocks beyond are not held.
    tags: SmallVec<[(Part, Vec<Tags>); 1]>,
    /// Recorded so far.
    blocks: usize,
    /// Leading blocks that full attention holds or that are marked.
    unbroken: usize,
}

fn heaviest(tags: Tags, weights: &Weights) -> f64 {
    let ids = |mask: u32| (0..TierTable::MAX).filter(move |tier| mask & (1 << tier) != 0);
    let whole = tags & 0xffff;
    let tags = if whole != 0 { whole } else { tags >> MIXED };
    ids(tags).map(|tier| weights[tier]).fold(0.0, f64::max)
}

impl Record<'_> {
    fn extend<'p>(&mut self, blocks: usize, pieces: impl Iterator<Item = &'p (LineId, Piece)>) {
        let (from, to) = (self.blocks, self.blocks + blocks);
        for (id, piece) in pieces {
            let at = self.tags.iter().position(|(part, _)| *part == id.part());
            let at = at.unwrap_or_else(|| {
                self.tags.push((id.part(), Vec::new()));
                self.tags.len() - 1
            });
            let tags = &mut self.tags[at].1;
            tags.resize(to, 0);
            let tag: Tags = 1 << (id.tag() & 31);
            match piece {
                Piece::Span(first, end) => {
                    let held = from + *first as usize..from + *end as usize;
                    tags[held].iter_mut().for_each(|tags| *tags |= tag);
                }
                Piece::Bits(bits) => {
                    for block in ones(bits).map(|bit| bit.0 as usize).take_while(|&b| b < blocks) {
                        tags[from + block] |= tag;
                    }
                }
            }
        }
        self.blocks = to;
        while self.unbroken < to
            && (self.is_marked(self.unbroken) || self.full(self.unbroken, u32::MAX))
        {
            self.unbroken += 1;
        }
    }

    /// Can it get any deeper? Windows can hold again after a hole; full attention cannot.
    fn goes_on(&self) -> bool {
        self.unbroken == self.blocks || self.parts.windows_only()
    }

    fn is_marked(&self, block: usize) -> bool {
        self.tags(block, MARK) != 0
    }

    fn tags(&self, block: usize, part: Part) -> Tags {
        let of = self.tags.iter().find(|(held, _)| *held == part);
        of.and_then(|(_, tags)| tags.get(block)).copied().unwrap_or(0)
    }

    fn full(&self, block: usize, mask: Tags) -> bool {
        let holds = |part: Part| self.tags(block, part) & mask != 0;
        self.parts.ungrouped.is_some_and(holds)
            || (!self.parts.full.is_empty() && self.parts.full.iter().all(|&part| holds(part)))
    }

    /// The largest L that every group is satisfied with, of `keys` blocks.
    fn depth(&self, keys: usize, mask: Tags, marks: bool) -> usize {
        let marked = |block: usize| marks && self.is_marked(block);
        let unbroken = |holds: &dyn Fn(usize) -> bool| {
            (0..keys.min(self.blocks)).take_while(|&b| marked(b) || holds(b)).count()
        };
        if !self.parts.any_full() && self.parts.windows.is_empty() {
            return unbroken(&|_| false);
        }
        let most = if self.parts.windows_only() {
            self.blocks.min(keys)
        } else {
            unbroken(&|block| self.full(block, mask))
        };
        if self.parts.windows.is_empty() {
            return most;
        }
        // For each window, how many blocks in a row end at L.
        let mut runs: SmallVec<[usize; 2]> = SmallVec::from_elem(0, self.parts.windows.len());
        let mut deepest = 0;
        for length in 1..=most {
            let mut satisfied = true;
            for (&(part, window), run) in self.parts.windows.iter().zip(&mut runs) {
                let holds = marked(length - 1) || self.tags(length - 1, part) & mask != 0;
                *run = if holds { *run + 1 } else { 0 };
                let asked = window.saturating_sub(1).div_ceil(self.block_size) as usize;
                let asked = asked.max(usize::from(!self.parts.any_full()));
                satisfied &= *run >= asked.min(length);
            }
            if satisfied {
                deepest = length;
            }
        }
        deepest
    }

    fn weight(&self, block: usize, weights: &Weights) -> f64 {
        let best = |part: Part| heaviest(self.tags(block, part), weights);
        let all = |part: &Part| self.tags(block, *part) != 0;
        let grouped = if !self.parts.full.is_empty() && self.parts.full.iter().all(all) {
            self.parts.full.iter().map(|&part| best(part)).fold(f64::MAX, f64::min)
        } else {
            0.0
        };
        grouped.max(self.parts.ungrouped.map_or(0.0, best))
    }

    fn matched(&self, keys: usize, question: &Question) -> Option<Match> {
        let depth = self.depth(keys, u32::MAX, true);
        if depth == 0 {
            return None;
        }
        let weights = &question.weights;
        let weigh = |block: usize| {
            if self.is_marked(block) {
                self.weight(block, weights).max(question.speculative_weight)
            } else if self.parts.any_full() {
                self.weight(block, weights)
            } else {
                // No full-attention group asks for the block: it weighs as if on the GPU.
                weights[usize::from(TierTable::GPU.0)]
            }
        };
        let mut tiers = Vec::new();
        if question.tiers {
            for tier in 0..TierTable::MAX as u8 {
                let depth = self.depth(keys, 1 << tier, false);
                if depth > 0 {
                    tiers.push((TierId(tier), depth as u32));
                }
            }
        }
        Some(Match {
            slot: self.slot,
            depth: depth as u32,
            confirmed: self.depth(keys, u32::MAX, false) as u32,
            score: (0..depth).map(weigh).sum(),
            tiers,
            speculative: (0..keys).take_while(|&block| self.is_marked(block)).count() as u32,
        })
    }
}
