//! The first concurrent index: one [`DashMap`] from request key to the rows that hold it.
//!
//! # Model
//!
//! Every row has a ledger (which engine keys are held, where they lie) behind a lock that only its
//! one writer takes; the ledger writes single facts into the shared map. A block's entry is a
//! handful of bitsets, one per part and tier, so a lookup ANDs words instead of visiting pods.
//!
//! # Concurrency
//!
//! A lookup takes one shard lock per block, shared, for a few instructions. The view (which
//! rows have more than one attention group, which are muted) changes before the events that need
//! it are applied, so a lookup never reads a part without knowing what it asks.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;
use dashmap::{DashMap, Entry};
use smallvec::{SmallVec, smallvec};

use crate::{
    index::{
        BlockIndex, IndexConfig, IndexUsage, Match, PodSpec, PodUsage, Remove, Store, StoreOutcome,
        ledger::{Holdings, Ledger, Part},
        lookup::{self, Parts, View},
        place::Tail,
        slots::{KeyHash, SlotSet},
    },
    model::{CountMode, PodSlot, RequestKey},
};

/// The rows that hold one block. Most blocks have one holder, which then takes no memory of its own.
#[derive(Debug)]
enum Holders {
    One(PodSlot, Part, u8),
    Many(Box<SmallVec<[Held; 1]>>),
}

impl Holders {
    /// Adds a fact; returns whether it was there before.
    fn insert(&mut self, slot: PodSlot, part: Part, tag: u8) -> bool {
        if let Self::One(one, its_part, its_tag) = *self {
            if (one, its_part, its_tag) == (slot, part, tag) {
                return true;
            }
            *self = Self::Many(Box::new(smallvec![Held::new(one, its_part, its_tag)]));
        }
        let Self::Many(sets) = self else { return false };
        match sets.iter_mut().find(|held| held.part == part && held.tag == tag) {
            Some(held) => held.slots.insert(slot),
            None => {
                sets.push(Held::new(slot, part, tag));
                false
            }
        }
    }

    /// Takes a fact out; returns whether none is left.
    fn remove(&mut self, slot: PodSlot, part: Part, tag: u8) -> bool {
        match self {
            Self::One(one, its_part, its_tag) => (*one, *its_part, *its_tag) == (slot, part, tag),
            Self::Many(sets) => {
                if let Some(at) = sets.iter().position(|held| held.part == part && held.tag == tag)
                {
                    sets[at].slots.remove(slot);
                    if sets[at].slots.is_empty() {
                        sets.swap_remove(at);
                    }
                }
                sets.is_empty()
            }
        }
    }

    /// What is held, by part and tag; `one` lends the room for a single holder.
    fn sets<'a>(&'a self, one: &'a mut SmallVec<[Held; 1]>) -> &'a [Held] {
        match *self {
            Self::One(slot, part, tag) => {
                one.clear();
                one.push(Held::new(slot, part, tag));
                one
            }
            Self::Many(ref sets) => sets,
        }
    }
}

/// One fact's rows. See [`ledger`](super::ledger) for parts and tags.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) part: Part,
    pub(super) tag: u8,
    pub(super) slots: SlotSet,
}

impl Held {
    fn new(slot: PodSlot, part: Part, tag: u8) -> Self {
        let mut slots = SlotSet::default();
        slots.insert(slot);
        Self { part, tag, slots }
    }
}

/// The rows on which a block is expected, each with the marks that say so. A hot prefix has few
/// rows and may have thousands of marks.
pub(super) type Marks = SmallVec<[(PodSlot, HashSet<u64, KeyHash>); 1]>;

/// See the module's documentation.
#[derive(Debug)]
pub struct DashIndex {
    config: IndexConfig,
    blocks: DashMap<RequestKey, Holders, KeyHash>,
    marks: DashMap<RequestKey, Marks, KeyHash>,
    marked: AtomicUsize,
    rows: ArcSwap<Rows>,
    view: ArcSwap<View>,
    /// Serializes changes of the view and of the rows.
    changing: Mutex<()>,
    /// Taken before it, while a free slot is looked for.
    registering: Mutex<()>,
    bytes: AtomicU64,
}

/// By slot.
type Rows = Vec<Option<Arc<Row>>>;

#[derive(Debug)]
struct Row {
    /// Tokens per request block.
    block_size: u32,
    ledger: Mutex<Ledger>,
    bytes: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The shared map as one row writes it.
struct RowHoldings<'a> {
    index: &'a DashIndex,
    slot: PodSlot,
}

impl Holdings for RowHoldings<'_> {
    fn set(&self, key: RequestKey, part: Part, tag: u8) -> bool {
        match self.index.blocks.entry(key) {
            Entry::Occupied(mut holders) => holders.get_mut().insert(self.slot, part, tag),
            Entry::Vacant(vacant) => {
                vacant.insert(Holders::One(self.slot, part, tag));
                false
            }
        }
    }

    fn unset(&self, key: RequestKey, part: Part, tag: u8) {
        if let Entry::Occupied(mut holders) = self.index.blocks.entry(key)
            && holders.get_mut().remove(self.slot, part, tag)
        {
            holders.remove();
        }
    }

    fn any_marks(&self) -> bool {
        self.index.marked.load(Ordering::Relaxed) > 0
    }

    fn confirm(&self, key: RequestKey) {
        self.index.unmark(key, self.slot, None);
    }
}

impl DashIndex {
    /// Estimated bytes of a block's entry in the shared map, with more than one holder.
    const BLOCK_BYTES: u64 = ((size_of::<(RequestKey, Holders)>() + 1) * 4 / 3
        + size_of::<SmallVec<[Held; 1]>>()) as u64;

    /// An empty index.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        Self {
            config,
            blocks: DashMap::default(),
            marks: DashMap::default(),
            marked: AtomicUsize::new(0),
            rows: ArcSwap::default(),
            view: ArcSwap::default(),
            changing: Mutex::default(),
            registering: Mutex::default(),
            bytes: AtomicU64::new(0),
        }
    }

    fn new_row(&self, spec: PodSpec) -> Arc<Row> {
        Arc::new(Row {
            block_size: spec.scheme.block_size(),
            ledger: Mutex::new(Ledger::new(spec, &self.config)),
            bytes: AtomicU64::new(0),
        })
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

    fn read<T>(&self, slot: PodSlot, read: impl FnOnce(&Ledger) -> T) -> Option<T> {
        let rows = self.rows.load();
        let row = rows.get(slot.0 as usize)?.as_deref()?;
        let ledger = lock(&row.ledger);
        Some(read(&ledger))
    }

    /// Runs `write` on the row's ledger and books the bytes that it gained or lost.
    fn with<T>(
        &self,
        slot: PodSlot,
        write: impl FnOnce(&mut Ledger, &RowHoldings<'_>) -> T,
    ) -> Option<T> {
        let rows = self.rows.load();
        Some(self.write(slot, rows.get(slot.0 as usize)?.as_deref()?, write))
    }

    fn write<T>(
        &self,
        slot: PodSlot,
        row: &Row,
        write: impl FnOnce(&mut Ledger, &RowHoldings<'_>) -> T,
    ) -> T {
        let mut ledger = lock(&row.ledger);
        let result = write(&mut ledger, &RowHoldings { index: self, slot });
        let now = ledger.bytes();
        let before = row.bytes.swap(now, Ordering::Relaxed);
        if now >= before {
            self.bytes.fetch_add(now - before, Ordering::Relaxed);
        } else {
            self.bytes.fetch_sub(before - now, Ordering::Relaxed);
        }
        result
    }

    fn total_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed) + self.blocks.len() as u64 * Self::BLOCK_BYTES
    }

    /// Must a store of this many blocks be refused? Beyond the cap every one is; in the last
    /// sixteenth before it those of rows that take more than their share are.
    fn refuses(&self, row: &Row, store: &Store<'_>) -> bool {
        let cap = self.config.cap_bytes;
        // An engine block that ends inside one of ours keeps the tokens from our block's start.
        let request = u64::from(row.block_size);
        let engine = u64::from(store.block_size).max(1);
        let tail = if engine % request == 0 { 0 } else { Tail::most_bytes(request, engine) };
        let more = store.keys.len() as u64 * (Ledger::ENTRY_BYTES + Self::BLOCK_BYTES + tail);
        // Counting the shared map's entries locks its shards: only near the cap.
        let own = self.bytes.load(Ordering::Relaxed).saturating_add(more);
        let most = own.saturating_mul(1 + Self::BLOCK_BYTES / Ledger::ENTRY_BYTES + 1);
        let reserve = cap - cap / 16;
        if most <= reserve {
            return false;
        }
        let total = self.total_bytes().saturating_add(more);
        let share = reserve / self.view.load().rows().max(1) as u64;
        // A row's own count leaves out the shared map; scale the share alike.
        let share = share * Ledger::ENTRY_BYTES / (Ledger::ENTRY_BYTES + Self::BLOCK_BYTES);
        total > cap || (total > reserve && row.bytes.load(Ordering::Relaxed) > share)
    }

    /// Takes one mark off a row's expectation of a block, or all of them.
    fn unmark(&self, key: RequestKey, slot: PodSlot, mark: Option<u64>) {
        let Entry::Occupied(mut marks) = self.marks.entry(key) else { return };
        let rows = marks.get_mut();
        let Some(at) = rows.iter().position(|(marked, _)| *marked == slot) else { return };
        let own = &mut rows[at].1;
        let before = own.len();
        match mark {
            Some(mark) => {
                own.remove(&mark);
            }
            None => own.clear(),
        }
        self.marked.fetch_sub(before - own.len(), Ordering::Relaxed);
        if own.is_empty() {
            rows.swap_remove(at);
        }
        if rows.is_empty() {
            marks.remove();
        }
    }

    fn change_view(&self, change: impl FnOnce(&mut View)) {
        let _changing = lock(&self.changing);
        let mut view = View::clone(&self.view.load());
        change(&mut view);
        self.view.store(Arc::new(view));
    }
}

impl BlockIndex for DashIndex {
    fn register(&self, spec: PodSpec) -> Option<PodSlot> {
        let block_size = spec.scheme.block_size();
        let row = self.new_row(spec);
        let slot = {
            let _registering = lock(&self.registering);
            let rows = self.rows.load();
            let free = rows.iter().position(Option::is_none).unwrap_or(rows.len());
            if free >= self.config.max_pods {
                return None;
            }
            let slot = PodSlot(free as u32);
            self.put(slot, Some(row));
            slot
        };
        self.change_view(|view| view.add(slot, block_size));
        Some(slot)
    }

    fn respec(&self, slot: PodSlot, spec: PodSpec) {
        self.clear(slot);
        self.change_view(|view| view.forget(slot));
        let block_size = spec.scheme.block_size();
        let row = self.new_row(spec);
        if !self.rows.load().get(slot.0 as usize).is_some_and(Option::is_some) {
            return;
        }
        self.put(slot, Some(row));
        self.change_view(|view| view.add(slot, block_size));
    }

    fn unregister(&self, slot: PodSlot) {
        self.clear(slot);
        let keys: Vec<RequestKey> = self
            .marks
            .iter()
            .filter(|marks| marks.iter().any(|(marked, _)| *marked == slot))
            .map(|marks| *marks.key())
            .collect();
        for key in keys {
            self.unmark(key, slot, None);
        }
        self.change_view(|view| view.forget(slot));
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
        self.write(slot, row, |ledger, out| {
            if ledger.learn(store.group, store.kind) {
                let parts = Parts::new(ledger.groups());
                self.change_view(|view| view.learn(slot, parts));
            }
            ledger.store(store, out)
        })
    }

    fn remove(&self, slot: PodSlot, remove: &Remove<'_>) {
        self.with(slot, |ledger, out| ledger.remove(remove, out));
    }

    fn clear(&self, slot: PodSlot) {
        self.with(slot, |ledger, out| ledger.clear(out));
    }

    fn set_count_mode(&self, slot: PodSlot, mode: CountMode) {
        self.with(slot, |ledger, _| ledger.set_count_mode(mode));
    }

    fn set_muted(&self, slot: PodSlot, muted: bool) {
        self.change_view(|view| view.mute(slot, muted));
    }

    fn expire_orphans(&self, slot: PodSlot, before: Instant) -> usize {
        self.with(slot, |ledger, _| ledger.orphans().expire(before)).unwrap_or_default()
    }

    fn speculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        for key in keys {
            let mut rows = self.marks.entry(*key).or_default();
            let at = rows.iter().position(|(marked, _)| *marked == slot).unwrap_or_else(|| {
                rows.push((slot, HashSet::default()));
                rows.len() - 1
            });
            if rows[at].1.insert(mark) {
                self.marked.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn unspeculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        for key in keys {
            self.unmark(*key, slot, Some(mark));
        }
    }

    fn lookup(&self, keys: &[RequestKey], tiers: bool, out: &mut Vec<Match>) {
        out.clear();
        let view = self.view.load();
        let any_marks = self.marked.load(Ordering::Relaxed) > 0;
        let mut one = SmallVec::new();
        let mut walk = lookup::Walk::new(&view, &self.config, keys.len(), tiers);
        for (block, key) in keys.iter().enumerate() {
            let marks = if any_marks { self.marks.get(key) } else { None };
            let marks = marks.as_deref().map_or(&[][..], |marks| marks);
            let holders = self.blocks.get(key);
            let sets = holders.as_ref().map_or(&[][..], |holders| holders.sets(&mut one));
            if !walk.step(block, sets, marks) {
                break;
            }
        }
        walk.finish(out);
    }

    fn holders(&self, key: RequestKey) -> Vec<PodSlot> {
        let Some(holders) = self.blocks.get(&key) else { return Vec::new() };
        let mut one = SmallVec::new();
        let sets = holders.sets(&mut one);
        let mut slots: Vec<PodSlot> = sets.iter().flat_map(|held| held.slots.iter()).collect();
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    fn removed_at(&self, slot: PodSlot, key: RequestKey) -> Option<u64> {
        self.read(slot, |ledger| ledger.removed_at(key))?
    }

    fn pod_usage(&self, slot: PodSlot) -> PodUsage {
        self.read(slot, Ledger::usage).unwrap_or_default()
    }

    fn usage(&self) -> IndexUsage {
        IndexUsage {
            keys: self.blocks.len() as u64,
            bytes: self.total_bytes(),
            cap_bytes: self.config.cap_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hash::{Algorithm, Prompt, Scheme},
        index::Extras,
        model::{EngineKey, TierTable},
    };

    fn spec() -> PodSpec {
        PodSpec {
            scheme: Arc::new(Scheme::new(Algorithm::Xxh3, "", 4)),
            model: Arc::from("m"),
            count_mode: CountMode::Counted,
        }
    }

    /// A store at the start of a prompt.
    fn dense<'a>(keys: &'a [EngineKey], tokens: &'a [u32]) -> Store<'a> {
        Store {
            keys,
            parent: None,
            tokens,
            block_size: 4,
            lora: None,
            extras: Extras::default(),
            salt: None,
            group: None,
            kind: None,
            tier: TierTable::GPU,
            at: Instant::now(),
        }
    }

    /// Stores `blocks` blocks that nobody else has; returns how many were refused.
    fn store(index: &DashIndex, slot: PodSlot, prompt: u32, blocks: u32) -> u32 {
        let tokens: Vec<u32> = (0..blocks * 4).map(|at| prompt * 100_000 + at).collect();
        let keys: Vec<EngineKey> =
            (0..blocks).map(|at| EngineKey(u64::from(prompt) << 32 | u64::from(at))).collect();
        index.store(slot, &dense(&keys, &tokens)).refused
    }

    #[test]
    fn the_cap_refuses_the_greedy_row_first() {
        let cap_bytes = 1 << 20;
        let index = DashIndex::new(IndexConfig { cap_bytes, ..IndexConfig::default() });
        let (greedy, modest) = (index.register(spec()).unwrap(), index.register(spec()).unwrap());
        let mut prompt = 0;
        let mut fill = |slot| {
            for stored in 0..10_000u32 {
                prompt += 1;
                if store(&index, slot, prompt, 8) > 0 {
                    return stored;
                }
                assert!(index.usage().bytes <= cap_bytes, "the cap holds");
            }
            panic!("never refused");
        };
        let many = fill(greedy);
        assert!(many > 100, "{many} stores fit in a megabyte");
        // What is left is for the row that has less than its share.
        let few = fill(modest);
        assert!(few > 10 && few < many / 4, "{few} against {many}");
        assert!(index.usage().bytes > cap_bytes * 15 / 16);
        // Room that is given back can be used again.
        index.clear(greedy);
        assert_eq!(store(&index, modest, prompt + 10, 8), 0);
    }

    #[test]
    fn estimated_bytes_go_back_to_nothing() {
        let index = DashIndex::new(IndexConfig::default());
        let slot = index.register(spec()).unwrap();
        for prompt in 0..50 {
            store(&index, slot, prompt, 8);
        }
        assert_eq!(index.usage().keys, 400);
        assert!(index.usage().bytes > 400 * 64);
        index.clear(slot);
        assert_eq!((index.usage().keys, index.usage().bytes), (0, 0));
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let index = DashIndex::new(IndexConfig { max_pods: 2, ..IndexConfig::default() });
        let slots = [index.register(spec()).unwrap(), index.register(spec()).unwrap()];
        assert_eq!(index.register(spec()), None);
        store(&index, slots[0], 1, 2);
        index.unregister(slots[0]);
        let tokens: Vec<u32> = (0..8).map(|at| 100_000 + at).collect();
        let keys = Prompt { model: "m", tokens: &tokens, ..Prompt::default() }
            .keys(&spec().scheme)
            .unwrap();
        assert_eq!(index.register(spec()), Some(slots[0]), "the slot is free again");
        let mut found = Vec::new();
        index.lookup(&keys, true, &mut found);
        assert_eq!(found, [], "and nothing is left in it");
    }

    #[test]
    fn groups_beyond_the_parts_are_never_scored() {
        let index = DashIndex::new(IndexConfig::default());
        let slot = index.register(spec()).unwrap();
        let tokens = [1, 2, 3, 4];
        let keys = Prompt { model: "m", tokens: &tokens, ..Prompt::default() }
            .keys(&spec().scheme)
            .unwrap();
        let store = |group: u32| {
            let (group, kind) = (Some(group), Some(crate::model::GroupKind::Full));
            index.store(slot, &Store { group, kind, ..dense(&[EngineKey(1)], &tokens) });
        };
        let depth = || {
            let mut found = Vec::new();
            index.lookup(&keys, false, &mut found);
            found.first().map_or(0, |found| found.depth)
        };
        // Twice, since a group is learnt by its first event.
        (0..40).chain(0..40).for_each(store);
        assert_eq!(depth(), 1);
        assert!(index.pod_usage(slot).hybrid_unsupported);
        assert_eq!(index.pod_usage(slot).blocks, 32);
        // The last group that counts loses the block: nobody stands in for it.
        for _ in 0..2 {
            let (keys, group) = (&[EngineKey(1)], Some(31));
            index.remove(slot, &Remove { keys, group, tier: TierTable::GPU, sequence: 0 });
        }
        assert_eq!(depth(), 0);
    }
}
