//! Speculative marks of one row: which blocks a router expects there, and who says so.
//!
//! # Model
//!
//! Marked blocks lie in the runs as held ones do, under the row's *mark seat*, so that a lookup
//! meets them on its way. Here is what the runs do not say: which marks each of them has. Marks
//! belong to the row, not to a life of it: its mark seat stays through clears.
//!
//! # Cost
//!
//! A probe per block and call, and a write of the run for those that were not marked; some 60
//! bytes for each marked block, beside its place in the runs.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use smallvec::SmallVec;

use crate::{
    index::{
        runs::{Block, LineId, Locked, MARK, Path, Runs, Seat, Segment},
        slots::KeyHash,
    },
    model::RequestKey,
};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Marks {
    line: LineId,
    /// Blocks with marks, for a look without the lock.
    count: AtomicUsize,
    /// None once the row is gone: its mark seat may be another row's by then.
    blocks: Mutex<Option<Blocks>>,
}

type Blocks = HashMap<RequestKey, Marked, KeyHash>;

#[derive(Debug)]
struct Marked {
    block: Block,
    /// Ascending. A hot prefix may have thousands; the newest is the greatest, mostly.
    marks: SmallVec<[u64; 2]>,
}

impl Marks {
    /// Of a row with this mark seat.
    pub(crate) fn new(seat: Seat) -> Self {
        let line = LineId::new(seat, MARK, 0);
        Self { line, count: AtomicUsize::new(0), blocks: Mutex::new(Some(Blocks::default())) }
    }

    pub(crate) fn any(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// Marks the leading blocks of a prompt.
    pub(crate) fn mark(&self, keys: &[RequestKey], mark: u64, runs: &Runs) {
        let mut blocks = self.lock();
        let Some(blocks) = blocks.as_mut() else { return };
        let (mut at, mut after) = (0, None);
        while let Some(key) = keys.get(at) {
            if let Some(marked) = blocks.get_mut(key) {
                if let Err(place) = marked.marks.binary_search(&mark) {
                    marked.marks.insert(place, mark);
                }
                after = Some(marked.block);
                at += 1;
                continue;
            }
            let unmarked = keys[at..].iter().take_while(|key| !blocks.contains_key(key)).count();
            let path =
                Path { after, position: at as u32, keys: &keys[at..at + unmarked], engine: None };
            let hold = |run: &mut Locked<'_>, from, to| {
                let mut line = run.load(self.line);
                line.set(from, to);
                run.save(self.line, &line);
                true
            };
            let mut segments: SmallVec<[Segment; 4]> = SmallVec::new();
            let laid = runs.lay(&path, self.line.seat(), hold, &mut segments);
            if laid == 0 {
                break;
            }
            let laid_at = segments.iter().flat_map(|it| it.first..it.first + it.count);
            for (&key, block) in path.keys.iter().zip(laid_at) {
                blocks.insert(key, Marked { block, marks: SmallVec::from_elem(mark, 1) });
                after = Some(block);
            }
            at += laid;
        }
        self.count.store(blocks.len(), Ordering::Relaxed);
    }

    /// Takes one mark off blocks.
    pub(crate) fn unmark(&self, keys: &[RequestKey], mark: u64, runs: &Runs) {
        self.end(keys, runs, |marked| {
            if let Ok(at) = marked.marks.binary_search(&mark) {
                marked.marks.remove(at);
            }
            marked.marks.is_empty()
        });
    }

    /// Takes every mark off blocks.
    pub(crate) fn confirm(&self, keys: &[RequestKey], runs: &Runs) {
        if self.any() {
            self.end(keys, runs, |_| true);
        }
    }

    /// Takes every mark off the row, for good: whoever marks it yet is too late.
    pub(crate) fn forget(&self, runs: &Runs) {
        let mut blocks = self.lock();
        let mut last = None;
        for marked in blocks.take().unwrap_or_default().into_values() {
            // Once a run is swept its blocks may be another run's, where there is nothing to sweep.
            let run = runs.owner(marked.block);
            if last != Some(run) {
                runs.sweep(run, self.line.seat());
                last = Some(run);
            }
        }
        self.count.store(0, Ordering::Relaxed);
    }

    /// Forgets the blocks of which `is_over` says that no mark is left.
    fn end(&self, keys: &[RequestKey], runs: &Runs, mut is_over: impl FnMut(&mut Marked) -> bool) {
        let mut blocks = self.lock();
        let Some(blocks) = blocks.as_mut() else { return };
        // Blocks that follow one another within a run go together.
        let mut pending: Option<Segment> = None;
        for key in keys {
            let Some(marked) = blocks.get_mut(key) else { continue };
            if !is_over(marked) {
                continue;
            }
            let block = marked.block;
            blocks.remove(key);
            match &mut pending {
                Some(segment)
                    if segment.first + segment.count == block
                        && runs.owner(segment.first) == runs.owner(block) =>
                {
                    segment.count += 1;
                }
                other => {
                    if let Some(segment) = other.replace(Segment { first: block, count: 1 }) {
                        self.unset(segment, runs);
                    }
                }
            }
        }
        if let Some(segment) = pending {
            self.unset(segment, runs);
        }
        self.count.store(blocks.len(), Ordering::Relaxed);
    }

    fn unset(&self, segment: Segment, runs: &Runs) {
        runs.change(segment.first, self.line, |line, at| line.unset(at, at + segment.count));
    }

    fn lock(&self) -> MutexGuard<'_, Option<Blocks>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
