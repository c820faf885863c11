//! The production index: runs of blocks, found by their first key, each with the rows that hold it.
//!
//! # Model
//!
//! A prompt's request keys are walked from run to run (`walk`); `storage` says how runs lie in
//! memory, `ledger` which engine keys make a row hold what. A row *sits* on a
//! seat, the number under which runs know it. A clear gives it another seat: at that moment nothing
//! of the old life is seen any more, however much it was, and a thread takes the old seat out of
//! the runs afterwards.
//!
//! # Invariants
//!
//! * A seat is given out again only when no run knows it. A lookup during which that happened, or
//!   during which a chunk took the place of one that was gone, is made again.
//! * Readers take no lock and write nothing that is shared.
//!
//! # Cost
//!
//! A lookup costs a probe and a header per run, a binary search where the prompt leaves one, and
//! an AND per 64 rows. Sixteen bytes per distinct block, about eight per block and row.

mod cover;
mod heads;
mod quick;
mod seqlock;
mod space;
mod storage;
mod sweep;
mod view;
mod walk;

#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;

pub(crate) use self::{
    cover::{Line, LineId, MARKS, Seat},
    storage::{Block, Locked, Look, MARK, PIN, Path, RunId, Runs, Segment},
};
use self::{
    quick::{Sink, Unanswered},
    storage::Outdated,
    sweep::{Seats, Sweeper},
    view::{Parts, RowView, View},
    walk::{Question, Walk},
};
use crate::{
    index::{
        Anchors, BlockIndex, Dropped, ImageError, IndexConfig, IndexUsage, Match, PodSpec,
        PodUsage, Remove, RowImage, Store, StoreOutcome,
        image::Content,
        ledger::{Ledger, Shared},
        marks::Marks,
        place::Tail,
    },
    model::{CountMode, PodSlot, RequestKey, TierTable},
};

/// See the module's documentation.
#[derive(Debug)]
pub struct RunIndex {
    config: IndexConfig,
    runs: Arc<Runs>,
    seats: Arc<Seats>,
    sweeper: Sweeper,
    rows: ArcSwap<Rows>,
    /// Serializes changes of the rows.
    changing: Mutex<()>,
    /// Taken before it, while a free slot is looked for.
    registering: Mutex<()>,
}

/// By slot.
type Rows = Vec<Option<Arc<Row>>>;

#[derive(Debug)]
struct Row {
    /// Tokens per request block.
    block_size: u32,
    ledger: Mutex<Ledger>,
    /// Of the slot, whatever row it has.
    marks: Arc<Marks>,
    /// Of the ledger, estimated.
    bytes: AtomicU64,
    /// Blocks that may be stored before the cap is looked at again.
    spare: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RunIndex {
    /// Estimated bytes of a block in storage.
    const BLOCK_BYTES: u64 = 17;
    /// Estimated bytes of a run beside its blocks: header, slot in a table, unused grains.
    const RUN_BYTES: u64 = 160;

    /// An empty index.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        let (runs, seats) = (Arc::new(Runs::new()), Arc::new(Seats::default()));
        Self {
            config,
            sweeper: Sweeper::new(Arc::clone(&runs), Arc::clone(&seats)),
            runs,
            seats,
            rows: ArcSwap::default(),
            changing: Mutex::default(),
            registering: Mutex::default(),
        }
    }

    /// Puts a row in a slot, or takes it out.
    fn put(&self, slot: PodSlot, row: Option<Arc<Row>>) {
        let _changing = lock(&self.changing);
        let mut rows = Rows::clone(&self.rows.load());
        let at = slot.0 as usize;
        if at == rows.len() && row.is_some() {
            rows.push(None);
        }
        if let Some(own) = rows.get_mut(at) {
            *own = row;
            self.rows.store(Arc::new(rows));
        }
    }

    fn new_row(&self, spec: PodSpec, marks: Arc<Marks>) -> Option<(Arc<Row>, RowView)> {
        let block_size = spec.scheme.block_size();
        let seat = self.seats.take()?;
        let ledger = Mutex::new(Ledger::new(spec, &self.config, seat));
        let view = RowView { seat, block_size, muted: false, parts: Arc::default() };
        let (bytes, spare) = (AtomicU64::new(0), AtomicU64::new(0));
        let row = Row { block_size, ledger, marks, bytes, spare };
        Some((Arc::new(row), view))
    }

    fn row(&self, slot: PodSlot) -> Option<Arc<Row>> {
        self.rows.load().get(slot.0 as usize)?.clone()
    }

    fn read<T>(&self, slot: PodSlot, read: impl FnOnce(&Ledger) -> T) -> Option<T> {
        let row = self.row(slot)?;
        let ledger = lock(&row.ledger);
        Some(read(&ledger))
    }

    /// Runs `write` on the row's ledger and notes its bytes.
    fn write<T>(&self, row: &Row, write: impl FnOnce(&mut Ledger, Shared<'_>) -> T) -> T {
        let mut ledger = lock(&row.ledger);
        let result = write(&mut ledger, Shared { runs: &self.runs, marks: &row.marks });
        row.bytes.store(ledger.bytes(), Ordering::Relaxed);
        result
    }

    fn with<T>(
        &self,
        slot: PodSlot,
        write: impl FnOnce(&mut Ledger, Shared<'_>) -> T,
    ) -> Option<T> {
        let rows = self.rows.load();
        Some(self.write(rows.get(slot.0 as usize)?.as_deref()?, write))
    }

    fn change_view(&self, change: impl FnOnce(&mut View)) {
        self.runs.replace(|snapshot| change(Arc::make_mut(&mut snapshot.view)));
    }

    fn total_bytes(&self) -> u64 {
        let rows = self.rows.load();
        let rows = rows.iter().flatten().map(|row| row.bytes.load(Ordering::Relaxed));
        rows.sum::<u64>() + self.runs.bytes()
    }

    /// Must a store of this many blocks be refused? Beyond the cap every one is; in the last
    /// sixteenth before it those of rows that take more than their share are.
    fn refuses(&self, row: &Row, store: &Store<'_>) -> bool {
        let count = store.keys.len() as u64;
        // Only the row's writer changes it.
        let spare = row.spare.load(Ordering::Relaxed);
        if count <= spare {
            row.spare.store(spare - count, Ordering::Relaxed);
            return false;
        }
        let cap = self.config.cap_bytes;
        // An engine block that ends inside one of ours keeps the tokens from our block's start.
        let request = u64::from(row.block_size);
        let engine = u64::from(store.block_size).max(1);
        let each = if engine == request {
            Ledger::PLAIN_BYTES
        } else {
            let tail = if engine % request == 0 { 0 } else { Tail::most_bytes(request, engine) };
            Ledger::ENTRY_BYTES + tail
        };
        let more = count * (each + Self::BLOCK_BYTES) + Self::RUN_BYTES;
        let total = self.total_bytes().saturating_add(more);
        let reserve = cap - cap / 16;
        let rows = self.runs.load().view.rows().max(1) as u64;
        if total <= reserve {
            // If every row took as much unseen, half of what is left would be left.
            let each = each.max(Ledger::ENTRY_BYTES) + Self::RUN_BYTES;
            let spare = ((reserve - total) / 2 / rows / each).min(1 << 16);
            row.spare.store(spare, Ordering::Relaxed);
            return false;
        }
        // A row's own count leaves out the blocks, which rows share; scale its share alike.
        let share =
            reserve / rows * Ledger::PLAIN_BYTES / (Ledger::PLAIN_BYTES + Self::BLOCK_BYTES);
        total > cap || row.bytes.load(Ordering::Relaxed) > share
    }

    /// Equal moments: no seat and no chunk that was in use has been used again in between.
    fn moment(&self) -> (u64, u64) {
        (self.seats.moment(), self.runs.moment())
    }

    fn question(&self, tiers: bool) -> Question {
        Question {
            weights: self.config.tiers.weights(),
            speculative_weight: self.config.speculative_weight,
            tiers,
        }
    }

    /// Answers from one moment of the seats: quickly if that is possible, else with a walk that
    /// `take` reads.
    fn answer<S: Sink>(
        &self,
        keys: &[RequestKey],
        question: &Question,
        out: &mut S,
        mut take: impl FnMut(&Walk<'_>, &mut S),
    ) {
        loop {
            let moment = self.moment();
            let snapshot = self.runs.load();
            let mut answer = Err(Unanswered::Hard);
            if !question.tiers && snapshot.view.hybrid.is_empty() {
                answer = quick::along(&snapshot, question, keys, out);
            }
            if let Err(Unanswered::Hard) = answer {
                out.truncate(0);
                answer = match Walk::along(&snapshot, question, keys) {
                    Ok(walk) => {
                        take(&walk, out);
                        Ok(())
                    }
                    Err(Outdated) => Err(Unanswered::Outdated),
                };
            }
            if answer.is_ok() && self.moment() == moment {
                return;
            }
            out.truncate(0);
        }
    }

    /// The rows that hold `keys[0]`, and how many leading blocks they hold, speculative ones
    /// included: what [`lookup`](BlockIndex::lookup) finds, without weights and in any order.
    pub fn depths(&self, keys: &[RequestKey], out: &mut Vec<(PodSlot, u32)>) {
        out.clear();
        let question =
            Question { weights: [1.0; TierTable::MAX], speculative_weight: 1.0, tiers: false };
        self.answer(keys, &question, out, |walk, out| walk.depths(out));
    }
}

impl BlockIndex for RunIndex {
    fn register(&self, spec: PodSpec) -> Option<PodSlot> {
        let _registering = lock(&self.registering);
        let rows = self.rows.load();
        let free = rows.iter().position(Option::is_none).unwrap_or(rows.len());
        if free >= self.config.max_pods.min(usize::from(MARKS) - 1) {
            return None;
        }
        let marks = Arc::new(Marks::new(MARKS + free as Seat));
        let (slot, (row, view)) = (PodSlot(free as u32), self.new_row(spec, marks)?);
        self.change_view(|all| all.put(slot, Some(view)));
        self.put(slot, Some(row));
        Some(slot)
    }

    fn respec(&self, slot: PodSlot, spec: PodSpec) {
        let Some(old) = self.row(slot) else { return };
        let Some((row, view)) = self.new_row(spec.clone(), Arc::clone(&old.marks)) else {
            // Its own seat will do, once nothing is left on it.
            self.clear(slot);
            let mut ledger = lock(&old.ledger);
            *ledger = Ledger::new(spec, &self.config, ledger.seat());
            return;
        };
        self.change_view(|all| all.put(slot, Some(view)));
        self.put(slot, Some(row));
        self.end(&old);
    }

    fn unregister(&self, slot: PodSlot) {
        let Some(old) = self.row(slot) else { return };
        self.change_view(|all| all.put(slot, None));
        old.marks.forget(&self.runs);
        self.end(&old);
        // Last, so that the slot is not given out again before every trace of it is gone.
        self.put(slot, None);
    }

    fn store(&self, slot: PodSlot, store: &Store<'_>) -> StoreOutcome {
        let rows = self.rows.load();
        let Some(row) = rows.get(slot.0 as usize).and_then(Option::as_deref) else {
            return StoreOutcome::default();
        };
        if self.refuses(row, store) {
            let refused = store.keys.len() as u32;
            return StoreOutcome { refused, ..StoreOutcome::default() };
        }
        self.write(row, |ledger, out| {
            if ledger.seat() == Seats::NONE {
                return StoreOutcome::default();
            }
            if ledger.learn(store.group, store.kind) {
                let parts = Arc::new(Parts::new(ledger.groups()));
                self.change_view(|view| view.change(slot, |row| row.parts = parts));
            }
            ledger.store(store, out)
        })
    }

    fn remove(&self, slot: PodSlot, remove: &Remove<'_>) {
        self.with(slot, |ledger, out| ledger.remove(remove, out));
    }

    fn clear(&self, slot: PodSlot) {
        let Some(row) = self.row(slot) else { return };
        let old = self.write(&row, |ledger, out| {
            let Some(seat) = self.seats.take() else {
                // Slowly, but as surely.
                ledger.sweep(out.runs);
                *ledger = ledger.reborn(&self.config, ledger.seat());
                return None;
            };
            let new = ledger.reborn(&self.config, seat);
            self.change_view(|view| view.change(slot, |row| row.seat = seat));
            Some(std::mem::replace(ledger, new))
        });
        if let Some(old) = old {
            self.sweeper.sweep(old);
        }
    }

    fn set_count_mode(&self, slot: PodSlot, mode: CountMode) {
        self.with(slot, |ledger, _| ledger.set_count_mode(mode));
    }

    fn set_muted(&self, slot: PodSlot, muted: bool) {
        self.change_view(|view| view.change(slot, |row| row.muted = muted));
    }

    fn expire_orphans(&self, slot: PodSlot, before: Instant) -> usize {
        self.with(slot, |ledger, _| ledger.orphans().expire(before)).unwrap_or_default()
    }

    fn speculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        if let Some(row) = self.row(slot) {
            row.marks.mark(keys, mark, &self.runs);
        }
    }

    fn unspeculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        if let Some(row) = self.row(slot) {
            row.marks.unmark(keys, mark, &self.runs);
        }
    }

    fn lookup(&self, keys: &[RequestKey], tiers: bool, out: &mut Vec<Match>) {
        out.clear();
        self.answer(keys, &self.question(tiers), out, |walk, out| walk.matches(out));
        if !out.is_sorted_by_key(|found| found.slot) {
            out.sort_unstable_by_key(|found| found.slot);
        }
    }

    fn holders(&self, keys: &[RequestKey], block: usize) -> Vec<PodSlot> {
        let mut slots = Vec::new();
        loop {
            let moment = self.moment();
            let snapshot = self.runs.load();
            if let Ok(seats) = snapshot.holders_of(keys, block)
                && self.moment() == moment
            {
                slots.extend(seats.into_iter().map(|seat| snapshot.view.slot(seat)));
                break;
            }
        }
        // Seats of past lives are nobody's.
        slots.retain(|slot| slot.0 != u32::MAX);
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    fn export(&self, slot: PodSlot) -> Option<RowImage> {
        let row = self.row(slot)?;
        let shared = Shared { runs: &self.runs, marks: &row.marks };
        let image = lock(&row.ledger).export(shared);
        Some(RowImage::of_ledger(image))
    }

    fn restore(
        &self,
        slot: PodSlot,
        image: &RowImage,
        anchors: &mut Anchors,
    ) -> Result<(), ImageError> {
        let Content::Ledger(content) = &image.content else { return Err(ImageError::Foreign) };
        let spec = self.read(slot, |ledger| ledger.spec().clone()).ok_or(ImageError::Full)?;
        self.respec(slot, spec.clone());
        let more = image.blocks() * (Ledger::PLAIN_BYTES + Self::BLOCK_BYTES);
        if self.total_bytes().saturating_add(more) > self.config.cap_bytes {
            return Err(ImageError::Full);
        }
        let restored = self.with(slot, |ledger, out| {
            if ledger.seat() == Seats::NONE {
                return Err(ImageError::Full);
            }
            ledger.restore(content, anchors, out)?;
            let parts = Arc::new(Parts::new(ledger.groups()));
            self.change_view(|view| view.change(slot, |row| row.parts = parts));
            Ok(())
        });
        let restored = restored.unwrap_or(Err(ImageError::Full));
        if restored.is_err() {
            self.respec(slot, spec);
        }
        restored
    }

    fn removed_at(&self, slot: PodSlot, key: RequestKey) -> Option<u64> {
        self.read(slot, |ledger| ledger.removed_at(key))?
    }

    fn doubt(&self, slot: PodSlot) -> u64 {
        self.with(slot, |ledger, _| ledger.doubt()).unwrap_or_default()
    }

    fn drop_unconfirmed(&self, slot: PodSlot, doubt: u64) -> Dropped {
        self.with(slot, |ledger, out| ledger.drop_unconfirmed(doubt, out)).unwrap_or_default()
    }

    fn confirm(&self, slot: PodSlot, keys: &[RequestKey]) {
        self.with(slot, |ledger, out| ledger.vouch(keys, out));
    }

    fn pod_usage(&self, slot: PodSlot) -> PodUsage {
        self.read(slot, Ledger::usage).unwrap_or_default()
    }

    fn usage(&self) -> IndexUsage {
        IndexUsage {
            keys: self.runs.keys(),
            bytes: self.total_bytes(),
            cap_bytes: self.config.cap_bytes,
        }
    }
}

impl RunIndex {
    /// Retires the ledger of a row that is in no slot any more.
    fn end(&self, row: &Row) {
        let mut ledger = lock(&row.ledger);
        let new = ledger.reborn(&self.config, Seats::NONE);
        let old = std::mem::replace(&mut *ledger, new);
        row.bytes.store(0, Ordering::Relaxed);
        drop(ledger);
        self.sweeper.sweep(old);
    }
}
