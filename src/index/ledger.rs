//! One row's book-keeping: which engine keys are held how often, and which request blocks follow.
//!
//! The ledger is owned by one writer. It turns events into *holdings*, single facts of the form
//! "this row holds this request block in this part and tier", and writes only the changes into
//! the shared map behind [`Holdings`].
//!
//! # Parts
//!
//! Each attention group of the row has a *part*, a small number. Part 0 is its first
//! full-attention group, so that a row without hybrid attention lives in part 0 alone.
//!
//! A request block that lies inside one engine block is held while that engine block is; one that
//! several engine blocks make up is a matter of [`joints`](super::joints).

use std::{
    collections::{HashMap, VecDeque, hash_map},
    sync::Arc,
};

use smallvec::SmallVec;

use crate::{
    index::{
        IndexConfig, PodSpec, PodUsage, Remove, Store, StoreOutcome,
        joints::{Change, Joints},
        orphans::{Orphan, Orphans},
        place::{Completed, Cursor, Place, PrefixId},
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

/// The shared map as one row sees it.
pub(crate) trait Holdings {
    /// Sets one fact; returns whether it was set before.
    fn set(&self, key: RequestKey, part: Part, tag: u8) -> bool;
    /// Unsets one fact.
    fn unset(&self, key: RequestKey, part: Part, tag: u8);
    /// Are there speculative marks at all?
    fn any_marks(&self) -> bool;
    /// A store was announced for a held block: ends the speculative marks on it.
    fn confirm(&self, key: RequestKey);
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

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Ledger {
    spec: PodSpec,
    mode: CountMode,
    tiers: Arc<TierTable>,
    groups: SmallVec<[Group; 1]>,
    entries: HashMap<EntryKey, Entry, KeyHash>,
    /// How often a fact is set beyond the first time.
    again: HashMap<(RequestKey, Part, u8), u32, KeyHash>,
    joints: Joints,
    orphans: Orphans,
    removed: VecDeque<(RequestKey, u64)>,
    roots: Vec<(Arc<str>, RequestKey)>,
    block_sizes: Vec<u32>,
    by_tier: [u64; TierTable::MAX],
    /// Counts above 1.
    repeated: u64,
    odd_bytes: u64,
    scratch: Vec<u8>,
}

impl Ledger {
    /// Estimated bytes of one entry: key and value at hashbrown's usual load.
    pub(crate) const ENTRY_BYTES: u64 =
        ((size_of::<EntryKey>() + size_of::<Entry>() + 1) * 4 / 3) as u64;

    pub(crate) fn new(spec: PodSpec, config: &IndexConfig) -> Self {
        let root = spec.scheme.root(&spec.model, "");
        Self {
            mode: spec.count_mode,
            roots: vec![(Arc::from(""), root)],
            spec,
            tiers: Arc::clone(&config.tiers),
            groups: SmallVec::new(),
            entries: HashMap::default(),
            again: HashMap::default(),
            joints: Joints::default(),
            orphans: Orphans::new(config.orphan_blocks),
            removed: VecDeque::new(),
            block_sizes: Vec::new(),
            by_tier: [0; TierTable::MAX],
            repeated: 0,
            odd_bytes: 0,
            scratch: Vec::new(),
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

    /// Where a held key lies: in the part itself, else in a full-attention part.
    fn placed(&self, key: EngineKey, part: Part) -> Option<&Place> {
        if let Some(place) = self.entries.get(&(key, part)).and_then(|entry| entry.place.as_ref()) {
            return Some(place);
        }
        if self.groups.len() < 2 {
            return None;
        }
        self.full_parts().iter().find_map(|&part| self.entries.get(&(key, part))?.place.as_ref())
    }

    /// The end of a held parent, if `tokens` more still have numbers.
    fn after(&self, parent: EngineKey, part: Part, tokens: usize) -> Option<Cursor> {
        let cursor = self.placed(parent, part)?.cursor();
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
    pub(crate) fn store(&mut self, store: &Store<'_>, out: &impl Holdings) -> StoreOutcome {
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
            self.after(parent, part, store.tokens.len())
        } else {
            let root = self.root(store.lora.unwrap_or_default());
            Some(Cursor::root(root, store.salt))
        };
        let mut placed = Vec::new();
        if let Some(mut cursor) = cursor {
            if !self.block_sizes.contains(&store.block_size)
                && self.block_sizes.len() < MAX_BLOCK_SIZES
            {
                self.block_sizes.push(store.block_size);
            }
            let scheme = Arc::clone(&self.spec.scheme);
            let mut scratch = std::mem::take(&mut self.scratch);
            for (at, (&key, tokens)) in
                store.keys.iter().zip(store.tokens.chunks_exact(block_size)).enumerate()
            {
                let start = cursor.position;
                let extras = store.extras.of(at);
                let laid = cursor.advance(&scheme, tokens, extras, store.lora, &mut scratch);
                let (place, joint) = Place::new(start, laid, &cursor);
                if !self.insert_new((key, part), &place, store.tier, out) {
                    self.bump((key, part), store.tier, out);
                    if self.lay((key, part), place, joint, out) {
                        outcome.conflicting += 1;
                    }
                }
                self.lay_elsewhere(key, group, out);
                if !self.orphans.is_empty() {
                    placed.push(key);
                }
            }
            self.scratch = scratch;
            outcome.placed = store.keys.len() as u32;
        } else {
            for &key in store.keys {
                self.bump((key, part), store.tier, out);
                if self.is_unplaced((key, part))
                    && let Some(place) = self.placed(key, part).cloned()
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
        self.confirm(store.keys, part, out);
        outcome
    }

    /// Gives orphans their place whose parents now have one. Returns how many blocks.
    fn attach(&mut self, placed: &[EngineKey], out: &impl Holdings) -> u32 {
        let mut attached = 0;
        let scheme = Arc::clone(&self.spec.scheme);
        let mut scratch = Vec::new();
        self.orphans.wake(placed);
        while let Some((id, parent, orphan)) = self.orphans.next_awake() {
            let Some(mut cursor) = self.after(parent, orphan.part, orphan.tokens()) else {
                self.orphans.back_to_sleep(id, parent, orphan);
                continue;
            };
            let group = self.groups.iter().copied().find(|group| group.part == orphan.part);
            let mut newly = Vec::new();
            for (at, &key) in orphan.keys.iter().enumerate() {
                let start = cursor.position;
                let laid = orphan.advance(at, &mut cursor, &scheme, &mut scratch);
                // What was removed while it waited stays removed; the path goes on over it.
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
        attached
    }

    /// The common case in one probe: a key that is new and is exactly one request block. Then
    /// the rest of the store finds everything done.
    fn insert_new(
        &mut self,
        at: EntryKey,
        place: &Place,
        tier: TierId,
        out: &impl Holdings,
    ) -> bool {
        if place.odd.is_some() {
            return false;
        }
        let hash_map::Entry::Vacant(vacant) = self.entries.entry(at) else { return false };
        let counts = Counts::from_slice(&[(tier, 1)]);
        vacant.insert(Entry { counts, place: Some(place.clone()) });
        self.by_tier[usize::from(tier.0) % TierTable::MAX] += 1;
        self.set(place.key, at.1, tier.0, out);
        true
    }

    /// Counts one store; a tier that is new to a placed entry becomes visible.
    fn bump(&mut self, at: EntryKey, tier: TierId, out: &impl Holdings) {
        let entry =
            self.entries.entry(at).or_insert_with(|| Entry { counts: Counts::new(), place: None });
        if let Some((_, count)) = entry.counts.iter_mut().find(|(held, _)| *held == tier) {
            if self.mode == CountMode::Counted {
                self.repeated += u64::from(*count == 1);
                *count = count.saturating_add(1);
            }
            return;
        }
        entry.counts.push((tier, 1));
        self.by_tier[usize::from(tier.0) % TierTable::MAX] += 1;
        if entry.place.is_some() {
            self.show(at, tier, out);
        }
    }

    pub(crate) fn remove(&mut self, remove: &Remove<'_>, out: &impl Holdings) {
        let Some(group) = self.group(remove.group) else { return };
        for &key in remove.keys {
            let at = (key, group.part);
            let hash_map::Entry::Occupied(mut occupied) = self.entries.entry(at) else { continue };
            let entry = occupied.get_mut();
            let Some(held) = entry.counts.iter().position(|(tier, _)| *tier == remove.tier) else {
                continue;
            };
            let count = &mut entry.counts[held].1;
            *count -= 1;
            // The last copy but one goes, or in a mode that was not there at first all of them.
            self.repeated -= u64::from(*count == 1 || (*count > 1 && self.mode == CountMode::Set));
            if *count > 0 && self.mode == CountMode::Counted {
                continue;
            }
            self.by_tier[usize::from(remove.tier.0) % TierTable::MAX] -= 1;
            if entry.counts.len() > 1 {
                entry.counts.swap_remove(held);
                if entry.place.is_some() {
                    self.hide(at, remove.tier, out);
                }
                continue;
            }
            if let Some(place) = occupied.remove().place {
                for &key in place.whole() {
                    if self.removed.len() == REMOVED_HISTORY {
                        self.removed.pop_front();
                    }
                    self.removed.push_back((key, remove.sequence));
                }
                self.lift(at, &place, &[(remove.tier, 1)], out);
            }
        }
    }

    /// Gives an entry its place; returns whether that replaces another one.
    fn lay(
        &mut self,
        at: EntryKey,
        place: Place,
        joint: Option<Completed>,
        out: &impl Holdings,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(&at) else { return false };
        let old = match &entry.place {
            Some(old) if old.same(&place) => return false,
            _ => entry.place.take(),
        };
        let counts = entry.counts.clone();
        if let Some(old) = &old {
            self.lift(at, old, &counts, out);
        }
        for prefix in place.prefixes() {
            self.joints.enter(prefix, at, place.start);
        }
        if let Some(joint) = joint {
            self.joints.join(joint);
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
    fn lay_elsewhere(&mut self, key: EngineKey, group: Group, out: &impl Holdings) {
        if self.groups.len() < 2 || group.kind != GroupKind::Full {
            return;
        }
        let parts: SmallVec<[Part; 4]> = self.groups.iter().map(|group| group.part).collect();
        for part in parts {
            if part != group.part
                && self.is_unplaced((key, part))
                && let Some(place) =
                    self.entries.get(&(key, group.part)).and_then(|entry| entry.place.clone())
            {
                self.lay((key, part), place, None, out);
            }
        }
    }

    fn is_unplaced(&self, at: EntryKey) -> bool {
        self.entries.get(&at).is_some_and(|entry| entry.place.is_none())
    }

    /// Takes back what a place that is no longer the entry's made visible.
    fn lift(&mut self, at: EntryKey, place: &Place, counts: &[(TierId, u32)], out: &impl Holdings) {
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
    }

    fn show(&mut self, at: EntryKey, tier: TierId, out: &impl Holdings) {
        self.retier(at, out, |ledger, key| ledger.set(key, at.1, tier.0, out));
    }

    fn hide(&mut self, at: EntryKey, tier: TierId, out: &impl Holdings) {
        self.retier(at, out, |ledger, key| ledger.unset(key, at.1, tier.0, out));
    }

    fn retier(&mut self, at: EntryKey, out: &impl Holdings, each: impl Fn(&mut Self, RequestKey)) {
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

    fn set(&mut self, key: RequestKey, part: Part, tag: u8, out: &impl Holdings) {
        if out.set(key, part, tag) {
            *self.again.entry((key, part, tag)).or_default() += 1;
        }
    }

    fn unset(&mut self, key: RequestKey, part: Part, tag: u8, out: &impl Holdings) {
        if !self.again.is_empty()
            && let Some(again) = self.again.get_mut(&(key, part, tag))
        {
            *again -= 1;
            if *again == 0 {
                self.again.remove(&(key, part, tag));
            }
            return;
        }
        out.unset(key, part, tag);
    }

    /// Ends the speculative marks on the request blocks that stored engine blocks end or contain.
    fn confirm(&self, keys: &[EngineKey], part: Part, out: &impl Holdings) {
        if !out.any_marks() {
            return;
        }
        for place in keys.iter().filter_map(|&key| self.entries.get(&(key, part))?.place.as_ref()) {
            for &key in place.whole() {
                out.confirm(key);
            }
            let head = place.odd.as_ref().and_then(|odd| odd.head).map(RequestKey);
            if let Some(head) = head.filter(|&head| self.joints.is_held(head)) {
                out.confirm(head);
            }
        }
    }

    /// Brings the facts of the joints that a prefix is part of up to date.
    fn review(&mut self, prefix: PrefixId, out: &impl Holdings) {
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
            }
        }
    }

    /// Forgets every block; groups and names stay known.
    pub(crate) fn clear(&mut self, out: &impl Holdings) {
        for ((_, part), entry) in &self.entries {
            for &key in entry.place.iter().flat_map(Place::whole) {
                for &(tier, _) in &entry.counts {
                    out.unset(key, *part, tier.0);
                }
            }
        }
        for (key, part, tag) in self.joints.facts() {
            out.unset(key, part, tag);
        }
        self.entries = HashMap::default();
        self.again = HashMap::default();
        self.joints = Joints::default();
        self.removed.clear();
        self.orphans.clear();
        self.by_tier = [0; TierTable::MAX];
        self.repeated = 0;
        self.odd_bytes = 0;
    }

    pub(crate) fn orphans(&mut self) -> &mut Orphans {
        &mut self.orphans
    }

    pub(crate) fn removed_at(&self, key: RequestKey) -> Option<u64> {
        self.removed.iter().rev().find(|(removed, _)| *removed == key).map(|(_, at)| *at)
    }

    /// Estimated bytes, the shared map's part included.
    pub(crate) fn bytes(&self) -> u64 {
        let entries = self.entries.len() as u64;
        entries * Self::ENTRY_BYTES + self.odd_bytes + self.joints.bytes() + self.orphans.bytes()
    }

    pub(crate) fn usage(&self) -> PodUsage {
        PodUsage {
            blocks: self.entries.len() as u64,
            blocks_by_tier: self.by_tier.to_vec(),
            orphans: self.orphans.blocks() as u64,
            bytes: self.bytes(),
            hybrid_unsupported: self.groups.iter().any(|g| g.kind == GroupKind::Unsupported),
            loras: self.roots.iter().skip(1).map(|(name, _)| Arc::clone(name)).collect(),
            block_sizes: self.block_sizes.clone(),
            repeated: self.repeated,
        }
    }
}
