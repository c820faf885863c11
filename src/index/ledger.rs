//! One row's book-keeping: which engine keys are held how often, and which request blocks follow.
//!
//! The ledger is owned by one writer. It turns events into lines of runs: which request blocks
//! the row holds, by part and tier.
//!
//! # Parts
//!
//! Each attention group of the row has a *part*, a small number. Part 0 is its first
//! full-attention group, so that a row without hybrid attention lives in part 0 alone.
//!
//! # Plain and other entries
//!
//! Nearly every engine key of nearly every row is *plain*: in part 0, exactly one request block,
//! and the only key of this row there. Of it the ledger keeps no more than where its block lies:
//! the tiers in which it is held are the row's lines in the run, the copies beyond the first are
//! in a map of their own. Everything else is an *entry* with its counts and its place.
//!
//! A request block that lies inside one engine block is held while that engine block is; one that
//! several engine blocks make up is a matter of [`joints`](super::joints).
//!
//! # Invariants
//!
//! * A plain key is its block's only key: before another key of the row makes facts of the same
//!   block, the plain one becomes an entry.
//! * What an entry or a joint names lies where it lies, held or not: *spots* pin it, counted.

mod doubt;
mod export;

use std::{
    collections::{HashMap, VecDeque, hash_map},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use smallvec::SmallVec;

use crate::{
    index::{
        IndexConfig, PodSpec, PodUsage, Remove, Store, StoreOutcome,
        joints::{Change, Joints},
        keymap::KeyMap,
        marks::Marks,
        orphans::{Orphan, Orphans},
        place::{Completed, Cursor, Laid, Place, PrefixId},
        runs::{Block, Line, LineId, Locked, Look, PIN, Path, RunId, Runs, Seat, Segment},
        slots::KeyHash,
    },
    model::{CountMode, EngineKey, GroupKind, RequestKey, TierId, TierTable},
};

/// Dense number of an attention group within a row.
pub(crate) type Part = u8;
/// Parts at most; groups beyond are not scored.
pub(crate) const MAX_PARTS: usize = 32;
/// The part of a group beyond them: it stays unsupported whatever it says, and flags the row.
const NO_PART: Part = Part::MAX;
/// Tags from here on say that a block is held by several tiers together and by none alone; the
/// tag is this offset plus the lightest of them.
pub(crate) const MIXED: u8 = TierTable::MAX as u8;
/// Removed request keys remembered for `Explain`.
const REMOVED_HISTORY: usize = 4096;
/// Engine block sizes remembered.
const MAX_BLOCK_SIZES: usize = 8;

/// Where a ledger writes: the runs of all rows, and its row's marks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared<'a> {
    pub(crate) runs: &'a Runs,
    pub(crate) marks: &'a Marks,
}

/// An attention group and what it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) id: Option<u32>,
    pub(crate) part: Part,
    pub(crate) kind: GroupKind,
}

/// An engine key in a part.
pub(crate) type EntryKey = (EngineKey, Part);
type Counts = SmallVec<[(TierId, u32); 2]>;

#[derive(Debug)]
struct Entry {
    counts: Counts,
    place: Option<Place>,
}

/// A request block that must stay where it is.
#[derive(Debug)]
struct Spot {
    block: Block,
    users: u32,
}

/// Engine keys of a run that are not the ones beside its blocks; 0 where they are.
#[derive(Debug)]
struct Own {
    base: Block,
    keys: Vec<u64>,
    used: u32,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Ledger {
    spec: PodSpec,
    mode: CountMode,
    tiers: Arc<TierTable>,
    groups: SmallVec<[Group; 1]>,
    seat: Seat,
    plain: KeyMap,
    own: HashMap<RunId, Own, KeyHash>,
    /// Keys in there.
    named: u64,
    /// Copies of plain keys beyond the first, by block and tier.
    more: HashMap<(Block, u8), u32, KeyHash>,
    entries: HashMap<EntryKey, Entry, KeyHash>,
    spots: HashMap<RequestKey, Spot, KeyHash>,
    /// How often a fact is set beyond the first time.
    again: HashMap<(RequestKey, Part, u8), u32, KeyHash>,
    joints: Joints,
    orphans: Orphans,
    removed: VecDeque<(RequestKey, u64)>,
    /// Since events were lost: what has been named again.
    doubt: Option<Box<doubt::Doubt>>,
    /// How often that was.
    doubts: u64,
    roots: Vec<(Arc<str>, RequestKey)>,
    block_sizes: Vec<u32>,
    by_tier: [u64; TierTable::MAX],
    /// Counts above 1.
    repeated: u64,
    odd_bytes: u64,
    scratch: Vec<u8>,
}

/// The engine keys beside the blocks, and the row's own ones.
struct Names<'a> {
    runs: &'a Runs,
    look: &'a Look,
    own: &'a HashMap<RunId, Own, KeyHash>,
}

impl Names<'_> {
    fn of(&self, block: Block) -> EngineKey {
        if !self.own.is_empty()
            && let Some(own) = self.own.get(&self.run_of(block))
            && let Some(&key) = own.keys.get((block - own.base) as usize)
            && key != 0
        {
            return EngineKey(key);
        }
        let beside = self.look.engine_key(block);
        beside.unwrap_or_else(|| self.runs.load().engine_key(block).unwrap_or_default())
    }

    fn run_of(&self, block: Block) -> RunId {
        self.look.run_of(block).unwrap_or_else(|| self.runs.owner(block))
    }
}

impl Ledger {
    /// Estimated bytes of one entry: key and value at hashbrown's usual load.
    pub(crate) const ENTRY_BYTES: u64 =
        ((size_of::<EntryKey>() + size_of::<Entry>() + 1) * 4 / 3) as u64;
    /// Estimated bytes of a plain key: its slot, at the usual load.
    pub(crate) const PLAIN_BYTES: u64 = ((size_of::<Block>() + 1) * 3 / 2) as u64;

    pub(crate) fn new(spec: PodSpec, config: &IndexConfig, seat: Seat) -> Self {
        let root = spec.scheme.root(&spec.model, "");
        Self {
            mode: spec.count_mode,
            roots: vec![(Arc::from(""), root)],
            spec,
            tiers: Arc::clone(&config.tiers),
            groups: SmallVec::new(),
            seat,
            plain: KeyMap::default(),
            own: HashMap::default(),
            named: 0,
            more: HashMap::default(),
            entries: HashMap::default(),
            spots: HashMap::default(),
            again: HashMap::default(),
            joints: Joints::default(),
            orphans: Orphans::new(config.orphan_blocks),
            removed: VecDeque::new(),
            doubt: None,
            doubts: 0,
            block_sizes: Vec::new(),
            by_tier: [0; TierTable::MAX],
            repeated: 0,
            odd_bytes: 0,
            scratch: Vec::new(),
        }
    }

    /// The ledger of the row's next life, on another seat: groups and names stay known.
    pub(crate) fn reborn(&self, config: &IndexConfig, seat: Seat) -> Self {
        Self {
            mode: self.mode,
            doubts: self.doubts,
            groups: self.groups.clone(),
            roots: self.roots.clone(),
            block_sizes: self.block_sizes.clone(),
            ..Self::new(self.spec.clone(), config, seat)
        }
    }

    pub(crate) fn seat(&self) -> Seat {
        self.seat
    }

    /// Keys that name something.
    pub(crate) fn len(&self) -> usize {
        self.plain.len() + self.entries.len() + self.spots.len()
    }

    /// Takes everything that the row holds out of the runs. The ledger is of no use afterwards.
    pub(crate) fn sweep(&self, runs: &Runs) {
        let mut last = None;
        let spots = self.spots.values().map(|spot| spot.block);
        for block in self.plain.blocks().chain(spots) {
            // Once a run is swept its blocks may have another owner, who does not know the seat.
            let run = runs.owner(block);
            if last != Some(run) {
                runs.sweep(run, self.seat);
                last = Some(run);
            }
        }
    }

    pub(crate) fn set_count_mode(&mut self, mode: CountMode) {
        self.mode = mode;
    }

    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Learns what a group asks. Returns whether anything is new; then readers must know of it
    /// before the event is applied.
    pub(crate) fn learn(&mut self, group: Option<u32>, kind: Option<GroupKind>) -> bool {
        if let Some(known) = self.groups.iter_mut().find(|known| known.id == group) {
            if known.part == NO_PART {
                return false;
            }
            let new = kind.filter(|&kind| kind != known.kind);
            known.kind = new.unwrap_or(known.kind);
            return new.is_some();
        }
        if self.groups.len() > MAX_PARTS {
            return false;
        }
        let mut kind = kind.unwrap_or(GroupKind::Full);
        let taken = |part: Part| self.groups.iter().any(|known| known.part == part);
        let first = if kind == GroupKind::Full { 0 } else { 1 };
        let free = (first..MAX_PARTS as Part).find(|&part| !taken(part));
        if free.is_none() {
            kind = GroupKind::Unsupported;
        }
        self.groups.push(Group { id: group, part: free.unwrap_or(NO_PART), kind });
        true
    }

    fn group(&self, id: Option<u32>) -> Option<Group> {
        self.groups.iter().copied().find(|group| group.id == id)
    }

    fn full_parts(&self) -> SmallVec<[Part; 2]> {
        let mut full: SmallVec<[(Option<u32>, Part); 2]> = self
            .groups
            .iter()
            .filter(|group| group.kind == GroupKind::Full)
            .map(|group| (group.id, group.part))
            .collect();
        full.sort_unstable();
        full.into_iter().map(|(_, part)| part).collect()
    }

    fn names<'a>(&'a self, look: &'a Look, out: Shared<'a>) -> Names<'a> {
        Names { runs: out.runs, look, own: &self.own }
    }

    fn find_plain(&self, key: EngineKey, out: Shared<'_>) -> Option<Block> {
        self.find_plain_in(key, &out.runs.look(), out)
    }

    fn find_plain_in(&self, key: EngineKey, look: &Look, out: Shared<'_>) -> Option<Block> {
        let names = self.names(look, out);
        self.plain.find(key, |block| names.of(block))
    }

    /// The plain key of a block.
    fn plain_of(&self, block: Block, out: Shared<'_>) -> Option<EngineKey> {
        let key = self.names(&out.runs.look(), out).of(block);
        (self.find_plain(key, out) == Some(block)).then_some(key)
    }

    /// Where a held key lies in one part.
    fn place_in(&self, at: EntryKey, out: Shared<'_>) -> Option<Place> {
        if let Some(entry) = self.entries.get(&at) {
            return entry.place.clone();
        }
        if at.1 != 0 {
            return None;
        }
        let look = out.runs.look();
        let block = self.find_plain_in(at.0, &look, out)?;
        Some(self.simple_place_in(block, &look, out))
    }

    fn simple_place(&self, block: Block, out: Shared<'_>) -> Place {
        self.simple_place_in(block, &out.runs.look(), out)
    }

    fn simple_place_in(&self, block: Block, look: &Look, out: Shared<'_>) -> Place {
        let described = look.describe(block).or_else(|| out.runs.load().describe(block));
        let (key, number) = described.unwrap_or_default();
        Place::simple(key, block, number, self.spec.scheme.block_size())
    }

    /// Where a held key lies: in the part itself, else in a full-attention part.
    fn placed(&self, key: EngineKey, part: Part, out: Shared<'_>) -> Option<Place> {
        if let Some(place) = self.place_in((key, part), out) {
            return Some(place);
        }
        if self.groups.len() < 2 {
            return None;
        }
        self.full_parts().iter().find_map(|&part| self.place_in((key, part), out))
    }

    /// The end of a held parent, if `tokens` more still have numbers.
    fn after(
        &self,
        parent: EngineKey,
        part: Part,
        tokens: usize,
        out: Shared<'_>,
    ) -> Option<Cursor> {
        let cursor = self.placed(parent, part, out)?.cursor();
        // The request block that the last token falls into must have numbers to its end.
        let end = u32::try_from(tokens).ok()?.checked_add(cursor.position)?;
        end.checked_add(self.spec.scheme.block_size())?;
        Some(cursor)
    }

    fn root(&mut self, lora: &str) -> RequestKey {
        if let Some((_, root)) = self.roots.iter().find(|(name, _)| **name == *lora) {
            return *root;
        }
        let root = self.spec.scheme.root(&self.spec.model, lora);
        if self.roots.len() <= PodUsage::MAX_LORAS {
            self.roots.push((Arc::from(lora), root));
        }
        root
    }

    /// Applies a store; its group must have been [learnt](Self::learn).
    pub(crate) fn store(&mut self, store: &Store<'_>, out: Shared<'_>) -> StoreOutcome {
        let mut outcome = StoreOutcome::default();
        let Some(group) = self.group(store.group).filter(|g| g.kind != GroupKind::Unsupported)
        else {
            return outcome;
        };
        if let Some(lora) = store.lora {
            self.root(lora);
        }
        let part = group.part;
        let block_size = store.block_size as usize;
        let dense = block_size > 0 && store.tokens.len() == store.keys.len() * block_size;
        let cursor = if !dense {
            None
        } else if let Some(parent) = store.parent {
            self.after(parent, part, store.tokens.len(), out)
        } else {
            let root = self.root(store.lora.unwrap_or_default());
            Some(Cursor::root(root, store.salt))
        };
        let mut placed = Vec::new();
        let mut confirmed = false;
        if let Some(cursor) = cursor {
            if !self.block_sizes.contains(&store.block_size)
                && self.block_sizes.len() < MAX_BLOCK_SIZES
            {
                self.block_sizes.push(store.block_size);
            }
            (outcome.conflicting, confirmed) = self.lay_all(store, group, cursor, out);
            if !self.orphans.is_empty() {
                placed.extend_from_slice(store.keys);
            }
            outcome.placed = store.keys.len() as u32;
        } else {
            for &key in store.keys {
                self.bump((key, part), store.tier, out);
                if self.is_unplaced((key, part))
                    && let Some(place) = self.placed(key, part, out)
                {
                    self.lay((key, part), place, None, out);
                    placed.push(key);
                }
                if self.is_unplaced((key, part)) {
                    outcome.unplaced += 1;
                } else {
                    outcome.placed += 1;
                }
            }
            if let (true, Some(parent)) = (dense, store.parent) {
                let waits = self.orphans.push(parent, Orphan::new(store, part));
                *(if waits { &mut outcome.orphaned } else { &mut outcome.orphans_dropped }) +=
                    store.keys.len() as u32;
            }
        }
        if !placed.is_empty() {
            outcome.attached = self.attach(&placed, out);
        }
        self.touch(store.keys, part, store.tier);
        if !confirmed {
            self.confirm(store.keys, part, out);
        }
        outcome
    }

    /// Gives orphans their place whose parents now have one. Returns how many blocks.
    fn attach(&mut self, placed: &[EngineKey], out: Shared<'_>) -> u32 {
        let mut attached = 0;
        let scheme = Arc::clone(&self.spec.scheme);
        let mut scratch = Vec::new();
        let mut transient = Vec::new();
        self.orphans.wake(placed);
        while let Some((id, parent, orphan)) = self.orphans.next_awake() {
            let Some(mut cursor) = self.after(parent, orphan.part, orphan.tokens(), out) else {
                self.orphans.back_to_sleep(id, parent, orphan);
                continue;
            };
            let group = self.groups.iter().copied().find(|group| group.part == orphan.part);
            let mut newly = Vec::new();
            for (at, &key) in orphan.keys.iter().enumerate() {
                let (start, before) = (cursor.position, cursor.at);
                let laid = orphan.advance(at, &mut cursor, &scheme, &mut scratch);
                // What was removed while it waited stays removed; the path goes on over it.
                cursor.at = self.lay_down(before, &laid, cursor.position, &mut transient, out);
                if self.is_unplaced((key, orphan.part)) {
                    let (place, joint) = Place::new(start, laid, &cursor);
                    self.lay((key, orphan.part), place, joint, out);
                    if let Some(group) = group {
                        self.lay_elsewhere(key, group, out);
                    }
                    newly.push(key);
                }
            }
            self.confirm(&newly, orphan.part, out);
            attached += newly.len() as u32;
            self.orphans.wake(&newly);
        }
        self.unpin_all(transient, out);
        attached
    }

    /// Lays the blocks of a dense store behind `cursor`. Returns how many keys lay elsewhere, and
    /// whether the marks on all of its blocks have been ended.
    fn lay_all(
        &mut self,
        store: &Store<'_>,
        group: Group,
        mut cursor: Cursor,
        out: Shared<'_>,
    ) -> (u32, bool) {
        let scheme = Arc::clone(&self.spec.scheme);
        let size = scheme.block_size();
        let part = group.part;
        let mut scratch = std::mem::take(&mut self.scratch);
        let (mut done, mut conflicting) = (0, 0);
        if part == 0 && store.block_size == size && cursor.tail.tokens.is_empty() {
            let from = cursor.clone();
            let tokens = store.tokens.chunks_exact(size as usize);
            let content: Vec<RequestKey> = tokens
                .enumerate()
                .map(|(at, tokens)| {
                    let extras = store.extras.of(at);
                    cursor.advance_one(&scheme, tokens, extras, store.lora, &mut scratch)
                })
                .collect();
            let path = Path {
                after: from.at,
                position: from.position / size,
                keys: &content,
                engine: Some(store.keys),
            };
            let last;
            (done, last, conflicting) = self.store_plain(store.keys, &path, store.tier, group, out);
            if done == store.keys.len() {
                self.scratch = scratch;
                let confirmed = conflicting == 0;
                if confirmed {
                    out.marks.confirm(&content, out.runs);
                }
                return (conflicting, confirmed);
            }
            cursor = from;
            if done > 0 {
                let position = cursor.position + done as u32 * size;
                cursor = Cursor { position, ..Cursor::root(content[done - 1], None) };
                cursor.at = last;
            }
        }
        let tokens = store.tokens.chunks_exact(store.block_size as usize);
        let mut transient = Vec::new();
        for (at, (&key, tokens)) in store.keys.iter().zip(tokens).enumerate().skip(done) {
            let (start, before) = (cursor.position, cursor.at);
            let extras = store.extras.of(at);
            let laid = cursor.advance(&scheme, tokens, extras, store.lora, &mut scratch);
            cursor.at = self.lay_down(before, &laid, cursor.position, &mut transient, out);
            let (place, joint) = Place::new(start, laid, &cursor);
            conflicting += u32::from(self.store_one((key, part), place, joint, store.tier, out));
            self.lay_elsewhere(key, group, out);
        }
        self.scratch = scratch;
        self.unpin_all(transient, out);
        (conflicting, false)
    }

    /// Makes sure that the request blocks of an engine block that ends at token `end` lie
    /// somewhere, and pins them. Returns the last one's block.
    fn lay_down(
        &mut self,
        mut after: Option<Block>,
        laid: &Laid,
        end: u32,
        pinned: &mut Vec<RequestKey>,
        out: Shared<'_>,
    ) -> Option<Block> {
        let count = laid.keys().count() as u32;
        let first = end / self.spec.scheme.block_size() - count;
        for (at, key) in laid.keys().enumerate() {
            let block = if let Some(spot) = self.spots.get_mut(&key) {
                spot.users += 1;
                spot.block
            } else {
                let path = Path { after, position: first + at as u32, keys: &[key], engine: None };
                let mut segments = SmallVec::new();
                let id = LineId::new(self.seat, PIN, 0);
                let pin = |run: &mut Locked<'_>, from, to| {
                    let mut line = run.load(id);
                    line.set(from, to);
                    run.save(id, &line);
                    true
                };
                out.runs.lay(&path, self.seat, pin, &mut segments);
                let Some(segment) = segments.first() else { return after };
                self.spots.insert(key, Spot { block: segment.first, users: 1 });
                segment.first
            };
            pinned.push(key);
            after = Some(block);
        }
        after
    }

    fn pin(&mut self, key: RequestKey, block: Block, out: Shared<'_>) {
        if let Some(spot) = self.spots.get_mut(&key) {
            spot.users += 1;
            return;
        }
        self.spots.insert(key, Spot { block, users: 1 });
        let id = LineId::new(self.seat, PIN, 0);
        out.runs.change(block, id, |line, at| line.set(at, at + 1));
    }

    fn unpin(&mut self, key: RequestKey, out: Shared<'_>) {
        let hash_map::Entry::Occupied(mut spot) = self.spots.entry(key) else { return };
        spot.get_mut().users -= 1;
        if spot.get().users == 0 {
            let block = spot.remove().block;
            let id = LineId::new(self.seat, PIN, 0);
            out.runs.change(block, id, |line, at| line.unset(at, at + 1));
        }
    }

    fn unpin_all(&mut self, keys: Vec<RequestKey>, out: Shared<'_>) {
        for key in keys {
            self.unpin(key, out);
        }
    }

    fn pin_place(&mut self, place: &Place, out: Shared<'_>) {
        for &key in place.whole() {
            let known = self.spots.get(&key).map(|spot| spot.block);
            if let Some(block) = known.or(place.at) {
                self.pin(key, block, out);
            }
        }
        if let Some(block) = place.at {
            self.pin(place.key, block, out);
        }
    }

    fn unpin_place(&mut self, place: &Place, out: Shared<'_>) {
        for &key in place.whole() {
            self.unpin(key, out);
        }
        if place.at.is_some() {
            self.unpin(place.key, out);
        }
    }

    /// The common case of a store: keys that are new, over request blocks of which the row holds
    /// nothing yet. Returns how many of the leading keys are done, the last one's block, and how
    /// many keys lay elsewhere.
    fn store_plain(
        &mut self,
        keys: &[EngineKey],
        path: &Path<'_>,
        tier: TierId,
        group: Group,
        out: Shared<'_>,
    ) -> (usize, Option<Block>, u32) {
        let seat = self.seat;
        let mut look = out.runs.look();
        let fresh = {
            let names = self.names(&look, out);
            let known = |key: &EngineKey| {
                key.0 == 0
                    || (!self.entries.is_empty() && self.entries.contains_key(&(*key, 0)))
                    || self.plain.find(*key, |block| names.of(block)).is_some()
            };
            keys.iter().position(known).unwrap_or(keys.len())
        };
        let path = Path { keys: &path.keys[..fresh], engine: Some(&keys[..fresh]), ..*path };
        let id = LineId::new(seat, 0, tier.0);
        let mut segments: SmallVec<[Segment; 4]> = SmallVec::new();
        let hold = |run: &mut Locked<'_>, from, to| {
            let lines = run.lines_of(seat);
            if lines.iter().any(|&line| run.load(line).any(from, to)) {
                return false;
            }
            let mut line = run.load(id);
            line.set(from, to);
            run.save(id, &line);
            true
        };
        let done = out.runs.lay(&path, seat, hold, &mut segments);
        self.by_tier[usize::from(tier.0) % TierTable::MAX] += done as u64;
        out.runs.refresh(&mut look);
        let mut at = 0;
        for segment in &segments {
            self.name(*segment, &keys[at..], &look);
            at += segment.count as usize;
        }
        let mut again: SmallVec<[(usize, Block); 2]> = SmallVec::new();
        let blocks = segments.iter().flat_map(|it| it.first..it.first + it.count);
        {
            let names = Names { runs: out.runs, look: &look, own: &self.own };
            for (at, block) in blocks.enumerate() {
                if !self.plain.insert(keys[at], block, |block| names.of(block)) {
                    again.push((at, block));
                }
            }
        }
        for &key in &keys[..done] {
            self.lay_elsewhere(key, group, out);
        }
        let mut conflicting = 0;
        for (at, block) in again {
            // The event names two blocks alike: the later one replaces the earlier.
            let (key, content) = (keys[at], path.keys[at]);
            self.pin(content, block, out);
            out.runs.change(block, id, |line, at| line.unset(at, at + 1));
            self.by_tier[usize::from(tier.0) % TierTable::MAX] -= 1;
            self.forget_name(block, out);
            let place = self.simple_place(block, out);
            conflicting += u32::from(self.store_one((key, 0), place, None, tier, out));
            self.unpin(content, out);
        }
        let last = segments.last().map(|it| it.first + it.count - 1);
        (done, last, conflicting)
    }

    /// Notes the keys of a segment where they are not the ones beside the blocks.
    fn name(&mut self, segment: Segment, keys: &[EngineKey], look: &Look) {
        let beside = look.engine_keys(segment.first, segment.count).unwrap_or_default();
        for (at, &key) in keys.iter().take(segment.count as usize).enumerate() {
            let block = segment.first + at as u32;
            // Marks create blocks that nobody has named yet.
            let named = |name: &AtomicU64| {
                let (order, zero) = (Ordering::Relaxed, 0);
                name.load(order) == key.0
                    || (name.load(order) == zero
                        && name.compare_exchange(zero, key.0, order, order).is_ok())
            };
            if beside.get(at).is_some_and(named) {
                continue;
            }
            let Some((run, base)) = look.place_of(block) else { continue };
            let own = self.own.entry(run);
            let own = own.or_insert_with(|| Own { base, keys: Vec::new(), used: 0 });
            let at = (block - base) as usize;
            if own.keys.len() <= at {
                own.keys.reserve_exact(
                    (segment.first - base + segment.count) as usize - own.keys.len(),
                );
                own.keys.resize(at + 1, 0);
            }
            let new = own.keys[at] == 0;
            own.used += u32::from(new);
            self.named += u64::from(new);
            own.keys[at] = key.0;
        }
    }

    fn forget_name(&mut self, block: Block, out: Shared<'_>) {
        if !self.own.is_empty() {
            self.forget_name_in(out.runs.owner(block), block);
        }
    }

    fn forget_name_in(&mut self, run: RunId, block: Block) {
        if let Some(own) = self.own.get_mut(&run)
            && let Some(key) = own.keys.get_mut((block - own.base) as usize)
            && *key != 0
        {
            *key = 0;
            own.used -= 1;
            self.named -= 1;
            if own.used == 0 {
                self.own.remove(&run);
            }
        }
    }

    fn note_removed(&mut self, key: RequestKey, sequence: u64) {
        if self.removed.len() == REMOVED_HISTORY {
            self.removed.pop_front();
        }
        self.removed.push_back((key, sequence));
    }

    /// Counts and places one engine block. Returns whether its key lay elsewhere.
    fn store_one(
        &mut self,
        at: EntryKey,
        place: Place,
        joint: Option<Completed>,
        tier: TierId,
        out: Shared<'_>,
    ) -> bool {
        if let (0, None, Some(block)) = (at.1, &place.odd, place.at) {
            match self.find_plain(at.0, out) {
                Some(known) if known == block => {
                    self.count_plain(block, tier, out);
                    return false;
                }
                Some(known) => self.demote(at.0, known, out),
                None if at.0.0 != 0 && !self.entries.contains_key(&at) => {
                    if let Some(other) = self.plain_of(block, out) {
                        self.demote(other, block, out);
                    } else if !self.has_facts(block, out) {
                        let look = out.runs.look();
                        self.name(Segment { first: block, count: 1 }, &[at.0], &look);
                        let names = Names { runs: out.runs, look: &look, own: &self.own };
                        self.plain.insert(at.0, block, |block| names.of(block));
                        let id = LineId::new(self.seat, 0, tier.0);
                        out.runs.change(block, id, |line, at| line.set(at, at + 1));
                        self.by_tier[usize::from(tier.0) % TierTable::MAX] += 1;
                        return false;
                    }
                }
                None => {}
            }
        } else if at.1 == 0
            && let Some(known) = self.find_plain(at.0, out)
        {
            self.demote(at.0, known, out);
        }
        self.bump(at, tier, out);
        self.lay(at, place, joint, out)
    }

    /// Does the row hold the block in part 0, in whatever tier?
    fn has_facts(&self, block: Block, out: Shared<'_>) -> bool {
        !self.tiers_of(block, out).is_empty()
    }

    /// The tags of part 0 in which the row holds a block.
    fn tiers_of(&self, block: Block, out: Shared<'_>) -> SmallVec<[u8; 4]> {
        let seat = self.seat;
        let tags = out.runs.with(block, |run, at| {
            let lines = run.lines_of(seat);
            let held = lines.iter().filter(|&&id| id.part() == 0 && run.load(id).holds(at));
            held.map(|id| id.tag()).collect()
        });
        tags.unwrap_or_default()
    }

    /// Makes an entry of a plain key.
    fn demote(&mut self, key: EngineKey, block: Block, out: Shared<'_>) {
        let tags = self.tiers_of(block, out);
        let counts: Counts = tags
            .iter()
            .map(|&tag| (TierId(tag), 1 + self.more.remove(&(block, tag)).unwrap_or(0)))
            .collect();
        self.plain.remove(key, block);
        self.forget_name(block, out);
        let place = self.simple_place(block, out);
        self.pin_place(&place, out);
        self.entries.insert((key, 0), Entry { counts, place: Some(place) });
    }

    /// Counts one more copy of a plain key.
    fn count_plain(&mut self, block: Block, tier: TierId, out: Shared<'_>) {
        let id = LineId::new(self.seat, 0, tier.0);
        let held = out.runs.change(block, id, |line, at| {
            let held = line.holds(at);
            if !held {
                line.set(at, at + 1);
            }
            held
        });
        if held != Some(true) {
            self.by_tier[usize::from(tier.0) % TierTable::MAX] += 1;
        } else if self.mode == CountMode::Counted {
            let more = self.more.entry((block, tier.0)).or_default();
            self.repeated += u64::from(*more == 0);
            *more = more.saturating_add(1);
        } else if self.more.remove(&(block, tier.0)).is_some() {
            self.repeated -= 1;
        }
    }

    /// Counts one store; a tier that is new to a placed entry becomes visible.
    fn bump(&mut self, at: EntryKey, tier: TierId, out: Shared<'_>) {
        if at.1 == 0
            && let Some(block) = self.find_plain(at.0, out)
        {
            self.count_plain(block, tier, out);
            return;
        }
        let entry =
            self.entries.entry(at).or_insert_with(|| Entry { counts: Counts::new(), place: None });
        if let Some((_, count)) = entry.counts.iter_mut().find(|(held, _)| *held == tier) {
            if self.mode == CountMode::Counted {
                self.repeated += u64::from(*count == 1);
                *count = count.saturating_add(1);
            } else {
                self.repeated -= u64::from(*count > 1);
                *count = 1;
            }
            return;
        }
        entry.counts.push((tier, 1));
        self.by_tier[usize::from(tier.0) % TierTable::MAX] += 1;
        if entry.place.is_some() {
            self.show(at, tier, out);
        }
    }

    pub(crate) fn remove(&mut self, remove: &Remove<'_>, out: Shared<'_>) {
        let Some(group) = self.group(remove.group) else { return };
        if group.part != 0 {
            for &key in remove.keys {
                self.remove_entry((key, group.part), remove, out);
            }
            return;
        }
        // Plain keys of one run go together.
        let mut batch: SmallVec<[(EngineKey, Block); 32]> = SmallVec::new();
        let mut keys = remove.keys;
        while !keys.is_empty() {
            batch.clear();
            {
                let look = out.runs.look();
                let names = self.names(&look, out);
                let mut run = None;
                for &key in keys {
                    let Some(block) = self.plain.find(key, |block| names.of(block)) else { break };
                    let owner = Some(names.run_of(block));
                    if run.is_some() && owner != run {
                        break;
                    }
                    run = owner;
                    batch.push((key, block));
                }
            }
            let (now, later) = keys.split_at(batch.len().max(1));
            if batch.is_empty() {
                self.remove_entry((now[0], 0), remove, out);
            } else {
                self.remove_plain(&batch, remove, out);
            }
            keys = later;
        }
    }

    /// Removes one copy of each key; their blocks are in one run.
    fn remove_plain(&mut self, batch: &[(EngineKey, Block)], remove: &Remove<'_>, out: Shared<'_>) {
        let Some(&(_, first)) = batch.first() else { return };
        let id = LineId::new(self.seat, 0, remove.tier.0);
        out.runs.with(first, |run, at| {
            let base = first - at;
            let mut line = run.load(id);
            let others: SmallVec<[Line; 2]> = run
                .lines_of(id.seat())
                .iter()
                .filter(|&&other| other.part() == 0 && other != id)
                .map(|&other| run.load(other))
                .collect();
            for &(key, block) in batch {
                let at = block - base;
                if !line.holds(at) {
                    continue;
                }
                if !self.more.is_empty()
                    && let Some(more) = self.more.get_mut(&(block, id.tag()))
                {
                    *more -= 1;
                    let last = *more == 0 || self.mode == CountMode::Set;
                    if last {
                        self.more.remove(&(block, id.tag()));
                        self.repeated -= 1;
                    }
                    if self.mode == CountMode::Counted {
                        continue;
                    }
                }
                line.unset(at, at + 1);
                self.by_tier[usize::from(id.tag()) % TierTable::MAX] -= 1;
                if let Some(doubt) = &mut self.doubt {
                    doubt.forget((key, 0), remove.tier);
                }
                if others.iter().any(|other| other.holds(at)) {
                    continue;
                }
                // Before the block may go: its name is how the map knows the key.
                self.plain.remove(key, block);
                self.forget_name_in(run.id(), block);
                self.note_removed(run.key(at), remove.sequence);
            }
            run.save(id, &line);
        });
    }

    fn remove_entry(&mut self, at: EntryKey, remove: &Remove<'_>, out: Shared<'_>) {
        let hash_map::Entry::Occupied(mut occupied) = self.entries.entry(at) else { return };
        let entry = occupied.get_mut();
        let Some(held) = entry.counts.iter().position(|(tier, _)| *tier == remove.tier) else {
            return;
        };
        let count = &mut entry.counts[held].1;
        *count -= 1;
        // The last copy but one goes, or in a mode that was not there at first all of them.
        self.repeated -= u64::from(*count == 1 || (*count > 1 && self.mode == CountMode::Set));
        if *count > 0 && self.mode == CountMode::Counted {
            return;
        }
        self.by_tier[usize::from(remove.tier.0) % TierTable::MAX] -= 1;
        if let Some(doubt) = &mut self.doubt {
            doubt.forget(at, remove.tier);
        }
        if entry.counts.len() > 1 {
            entry.counts.swap_remove(held);
            if entry.place.is_some() {
                self.hide(at, remove.tier, out);
            }
            return;
        }
        if let Some(place) = occupied.remove().place {
            for &key in place.whole() {
                self.note_removed(key, remove.sequence);
            }
            self.lift(at, &place, &[(remove.tier, 1)], out);
        }
    }

    /// Gives an entry its place; returns whether that replaces another one.
    fn lay(
        &mut self,
        at: EntryKey,
        place: Place,
        joint: Option<Completed>,
        out: Shared<'_>,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(&at) else { return false };
        let old = match &entry.place {
            Some(old) if old.same(&place) => return false,
            _ => entry.place.take(),
        };
        let counts = entry.counts.clone();
        self.pin_place(&place, out);
        if let Some(old) = &old {
            self.lift(at, old, &counts, out);
        }
        for prefix in place.prefixes() {
            self.joints.enter(prefix, at, place.start);
        }
        if let Some(joint) = joint {
            let key = joint.key;
            if self.joints.join(joint)
                && let Some(block) = self.spots.get(&key).map(|spot| spot.block)
            {
                self.pin(key, block, out);
            }
        }
        self.odd_bytes += place.odd_bytes();
        let prefixes = place.prefixes();
        let whole: SmallVec<[RequestKey; 1]> = place.whole().into();
        if let Some(entry) = self.entries.get_mut(&at) {
            entry.place = Some(place);
        }
        for key in whole {
            for &(tier, _) in &counts {
                self.set(key, at.1, tier.0, out);
            }
        }
        for prefix in prefixes {
            self.review(prefix, out);
        }
        old.is_some()
    }

    /// Copies the place of a key in a full-attention part to what waits for it in other parts.
    fn lay_elsewhere(&mut self, key: EngineKey, group: Group, out: Shared<'_>) {
        if self.groups.len() < 2 || group.kind != GroupKind::Full {
            return;
        }
        let parts: SmallVec<[Part; 4]> = self.groups.iter().map(|group| group.part).collect();
        for part in parts {
            if part != group.part
                && self.is_unplaced((key, part))
                && let Some(place) = self.place_in((key, group.part), out)
            {
                self.lay((key, part), place, None, out);
            }
        }
    }

    fn is_unplaced(&self, at: EntryKey) -> bool {
        self.entries.get(&at).is_some_and(|entry| entry.place.is_none())
    }

    /// Takes back what a place that is no longer the entry's made visible.
    fn lift(&mut self, at: EntryKey, place: &Place, counts: &[(TierId, u32)], out: Shared<'_>) {
        self.odd_bytes -= place.odd_bytes();
        for &key in place.whole() {
            for &(tier, _) in counts {
                self.unset(key, at.1, tier.0, out);
            }
        }
        for prefix in place.prefixes() {
            self.joints.leave(prefix, at);
            self.review(prefix, out);
        }
        self.unpin_place(place, out);
    }

    fn show(&mut self, at: EntryKey, tier: TierId, out: Shared<'_>) {
        self.retier(at, out, |ledger, key| ledger.set(key, at.1, tier.0, out));
    }

    fn hide(&mut self, at: EntryKey, tier: TierId, out: Shared<'_>) {
        self.retier(at, out, |ledger, key| ledger.unset(key, at.1, tier.0, out));
    }

    fn retier(&mut self, at: EntryKey, out: Shared<'_>, each: impl Fn(&mut Self, RequestKey)) {
        let Some(place) = self.entries.get(&at).and_then(|entry| entry.place.as_ref()) else {
            return;
        };
        let whole: SmallVec<[RequestKey; 1]> = place.whole().into();
        let prefixes = place.prefixes();
        for key in whole {
            each(self, key);
        }
        for prefix in prefixes {
            self.review(prefix, out);
        }
    }

    fn set(&mut self, key: RequestKey, part: Part, tag: u8, out: Shared<'_>) {
        let Some(block) = self.spots.get(&key).map(|spot| spot.block) else { return };
        if part == 0
            && self.plain.len() > 0
            && let Some(plain) = self.plain_of(block, out)
        {
            self.demote(plain, block, out);
        }
        let id = LineId::new(self.seat, part, tag);
        let before = out.runs.change(block, id, |line, at| {
            let before = line.holds(at);
            if !before {
                line.set(at, at + 1);
            }
            before
        });
        if before == Some(true) {
            *self.again.entry((key, part, tag)).or_default() += 1;
        }
    }

    fn unset(&mut self, key: RequestKey, part: Part, tag: u8, out: Shared<'_>) {
        if !self.again.is_empty()
            && let Some(again) = self.again.get_mut(&(key, part, tag))
        {
            *again -= 1;
            if *again == 0 {
                self.again.remove(&(key, part, tag));
            }
            return;
        }
        let Some(block) = self.spots.get(&key).map(|spot| spot.block) else { return };
        let id = LineId::new(self.seat, part, tag);
        out.runs.change(block, id, |line, at| line.unset(at, at + 1));
    }

    /// Ends the speculative marks on the request blocks that stored engine blocks end or contain.
    fn confirm(&self, keys: &[EngineKey], part: Part, out: Shared<'_>) {
        if !out.marks.any() {
            return;
        }
        let mut held: Vec<RequestKey> = Vec::new();
        for place in keys.iter().filter_map(|&key| self.place_in((key, part), out)) {
            held.extend_from_slice(place.whole());
            let head = place.odd.as_ref().and_then(|odd| odd.head).map(RequestKey);
            held.extend(head.filter(|&head| self.joints.is_held(head)));
        }
        out.marks.confirm(&held, out.runs);
    }

    /// Brings the facts of the joints that a prefix is part of up to date.
    fn review(&mut self, prefix: PrefixId, out: Shared<'_>) {
        let entries = &self.entries;
        let changes = self.joints.review(
            prefix,
            &|at| entries.get(&at).map_or(&[][..], |entry| &entry.counts),
            self.spec.scheme.block_size(),
            &self.tiers,
        );
        for change in changes {
            match change {
                Change::Set(key, part, tag) => self.set(key, part, tag, out),
                Change::Unset(key, part, tag) => self.unset(key, part, tag, out),
                Change::Drop(key) => self.unpin(key, out),
            }
        }
    }

    pub(crate) fn orphans(&mut self) -> &mut Orphans {
        &mut self.orphans
    }

    pub(crate) fn removed_at(&self, key: RequestKey) -> Option<u64> {
        self.removed.iter().rev().find(|(removed, _)| *removed == key).map(|(_, at)| *at)
    }

    /// Estimated bytes of the row's own maps.
    pub(crate) fn bytes(&self) -> u64 {
        let pairs = (self.more.len() + self.spots.len() + self.again.len()) as u64 * 32;
        self.plain.len() as u64 * Self::PLAIN_BYTES
            + self.entries.len() as u64 * Self::ENTRY_BYTES
            + self.named * 8
            + self.own.len() as u64 * 64
            + pairs
            + self.odd_bytes
            + self.joints.bytes()
            + self.orphans.bytes()
            + self.doubt_bytes()
    }

    pub(crate) fn usage(&self) -> PodUsage {
        PodUsage {
            blocks: (self.plain.len() + self.entries.len()) as u64,
            blocks_by_tier: self.by_tier.to_vec(),
            orphans: self.orphans.blocks() as u64,
            bytes: self.bytes(),
            hybrid_unsupported: self.groups.iter().any(|g| g.kind == GroupKind::Unsupported),
            loras: self.roots.iter().skip(1).map(|(name, _)| Arc::clone(name)).collect(),
            block_sizes: self.block_sizes.clone(),
            repeated: self.repeated,
            unconfirmed: self.unconfirmed(),
        }
    }
}
