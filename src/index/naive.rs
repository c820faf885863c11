//! The oracle: "Semantics" of ARCHITECTURE.md, word for word, with no thought of speed.
//!
//! Every engine block remembers the whole token path that leads to it, and every question is
//! answered token by token. Nothing here is shared with the production indexes except the hash.

mod path;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use self::path::{OwnedExtra, Path, Place, own};
use crate::{
    index::{
        Anchors, BlockIndex, DROPPED, Dropped, ImageError, IndexConfig, IndexUsage, Match, PodSpec,
        PodUsage, Remove, RowImage, Store, StoreOutcome, image::Content,
    },
    model::{CountMode, EngineKey, GroupKind, PodSlot, RequestKey, TierId},
};

type Group = Option<u32>;

/// The naive index.
#[derive(Debug, Default)]
pub struct NaiveIndex {
    config: IndexConfig,
    pods: Mutex<BTreeMap<PodSlot, Pod>>,
}

/// One row.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    spec: PodSpec,
    count_mode: CountMode,
    muted: bool,
    groups: BTreeMap<Group, GroupKind>,
    entries: BTreeMap<(EngineKey, Group), Entry>,
    orphans: Vec<Orphan>,
    marks: BTreeMap<RequestKey, BTreeSet<u64>>,
    removed: BTreeMap<RequestKey, u64>,
    /// How often events were lost.
    doubts: u64,
    /// Under which doubt each held copy was named last.
    named: BTreeMap<(EngineKey, Group, TierId), u64>,
    /// Every path that was ever laid, by the key of each of its request blocks.
    paths: BTreeMap<RequestKey, Arc<Path>>,
}

/// One engine key in one attention group.
#[derive(Clone, Debug, Default)]
struct Entry {
    counts: BTreeMap<TierId, u32>,
    place: Option<Place>,
}

#[derive(Clone, Debug)]
struct Orphan {
    parent: EngineKey,
    group: Group,
    keys: Vec<EngineKey>,
    tokens: Vec<u32>,
    block_size: usize,
    extras: Vec<Vec<OwnedExtra>>,
    lora: Option<String>,
    at: Instant,
}

impl Entry {
    fn held(&self) -> bool {
        self.counts.values().any(|&count| count > 0)
    }

    fn held_in(&self, tier: Option<TierId>) -> bool {
        match tier {
            Some(tier) => self.counts.get(&tier).is_some_and(|&count| count > 0),
            None => self.held(),
        }
    }
}

impl Pod {
    fn new(spec: PodSpec) -> Self {
        Self {
            count_mode: spec.count_mode,
            spec,
            muted: false,
            groups: BTreeMap::new(),
            entries: BTreeMap::new(),
            orphans: Vec::new(),
            marks: BTreeMap::new(),
            removed: BTreeMap::new(),
            doubts: 0,
            named: BTreeMap::new(),
            paths: BTreeMap::new(),
        }
    }

    fn is_full(&self, group: Group) -> bool {
        self.groups.get(&group) == Some(&GroupKind::Full)
    }

    /// The place of a key that is held: in the group itself, else in a full-attention group.
    fn placed(&self, key: EngineKey, group: Group) -> Option<Place> {
        let own = std::iter::once(group);
        let full = self.groups.keys().copied().filter(|&other| self.is_full(other));
        own.chain(full).find_map(|group| self.entries.get(&(key, group))?.place.clone())
    }

    fn store(&mut self, store: &Store<'_>, orphan_blocks: usize) -> StoreOutcome {
        let mut outcome = StoreOutcome::default();
        let kind = store.kind.or_else(|| self.groups.get(&store.group).copied());
        let kind = kind.unwrap_or(GroupKind::Full);
        self.groups.insert(store.group, kind);
        if kind == GroupKind::Unsupported {
            return outcome;
        }
        for key in store.keys {
            self.named.insert((*key, store.group, store.tier), self.doubts);
            let entry = self.entries.entry((*key, store.group)).or_default();
            let count = entry.counts.entry(store.tier).or_default();
            *count = if self.count_mode == CountMode::Set { 1 } else { *count + 1 };
        }
        let block_size = store.block_size as usize;
        let dense = block_size > 0 && store.tokens.len() == store.keys.len() * block_size;
        let mut touched = Vec::new();
        if dense {
            let extras: Vec<Vec<OwnedExtra>> =
                (0..store.keys.len()).map(|at| own(store.extras.of(at))).collect();
            let base = match store.parent {
                None => Some(Path {
                    lora: store.lora.unwrap_or_default().to_owned(),
                    salt: store.salt.map(|salt| salt.as_bytes().to_vec()),
                    ..Path::default()
                }),
                Some(parent) => self.placed(parent, store.group).map(|place| (*place.path).clone()),
            };
            if let Some(mut path) = base {
                for (at, key) in store.keys.iter().enumerate() {
                    let tokens = &store.tokens[at * block_size..(at + 1) * block_size];
                    let start = path.tokens.len();
                    path = path.extend(tokens, &extras[at], store.lora);
                    let place = Place { start, path: Arc::new(path.clone()) };
                    let old = self.lay(*key, store.group, place.clone());
                    if old.is_some_and(|old| !old.same(&place, &self.spec)) {
                        outcome.conflicting += 1;
                    }
                    touched.push((*key, store.group));
                }
            } else if let Some(parent) = store.parent {
                let waiting: usize = self.orphans.iter().map(|orphan| orphan.keys.len()).sum();
                if waiting + store.keys.len() > orphan_blocks {
                    outcome.orphans_dropped += store.keys.len() as u32;
                } else {
                    outcome.orphaned += store.keys.len() as u32;
                    self.orphans.push(Orphan {
                        parent,
                        group: store.group,
                        keys: store.keys.to_vec(),
                        tokens: store.tokens.to_vec(),
                        block_size,
                        extras,
                        lora: store.lora.map(str::to_owned),
                        at: store.at,
                    });
                }
            }
        }
        // A key whose tokens are not told, or not from where they go on, is where the same key is.
        for key in store.keys {
            let place = self.placed(*key, store.group);
            if let Some(entry) = self.entries.get_mut(&(*key, store.group))
                && place.is_some()
            {
                entry.place = place;
                touched.push((*key, store.group));
            }
        }
        for key in store.keys {
            let placed = self.entries.get(&(*key, store.group)).is_some_and(|e| e.place.is_some());
            *(if placed { &mut outcome.placed } else { &mut outcome.unplaced }) += 1;
        }
        while let Some((at, place)) = self
            .orphans
            .iter()
            .enumerate()
            .find_map(|(at, orphan)| Some((at, self.placed(orphan.parent, orphan.group)?)))
        {
            let orphan = self.orphans.remove(at);
            let mut path = (*place.path).clone();
            for (at, key) in orphan.keys.iter().enumerate() {
                let start = path.tokens.len();
                let tokens = &orphan.tokens[at * orphan.block_size..(at + 1) * orphan.block_size];
                path = path.extend(tokens, &orphan.extras[at], orphan.lora.as_deref());
                let entry = self.entries.get(&(*key, orphan.group));
                if entry.is_some_and(|entry| entry.place.is_none()) {
                    self.lay(*key, orphan.group, Place { start, path: Arc::new(path.clone()) });
                    outcome.attached += 1;
                    touched.push((*key, orphan.group));
                }
            }
        }
        self.confirm(&touched);
        outcome
    }

    /// Takes one copy away, or `all` of them.
    fn remove(&mut self, key: EngineKey, group: Group, tier: TierId, all: bool, sequence: u64) {
        let Some(entry) = self.entries.get_mut(&(key, group)) else { return };
        if let Some(count) = entry.counts.get_mut(&tier) {
            *count = if all { 0 } else { count.saturating_sub(1) };
            if *count == 0 {
                self.named.remove(&(key, group, tier));
            }
        }
        if entry.held() {
            return;
        }
        if let Some(place) = entry.place.take() {
            let size = self.spec.scheme.block_size() as usize;
            for key in place.path.keys(&self.spec).into_iter().skip(place.start.div_ceil(size)) {
                self.removed.insert(key, sequence);
            }
        }
        self.entries.remove(&(key, group));
    }

    /// The engine was seen to hold a request block: so it does what makes the block up.
    fn vouch(&mut self, key: RequestKey) {
        let Some(path) = self.paths.get(&key) else { return };
        let block = self.block_of(key, path);
        let groups: Vec<Group> =
            self.groups.keys().copied().filter(|&group| self.is_full(group)).collect();
        for group in groups {
            if self.holds(key, block, group, None) {
                let makers: Vec<EngineKey> =
                    self.covering(key, block, group, None).map(|(key, _)| key).collect();
                for ((key, of, _), under) in &mut self.named {
                    if *of == group && makers.contains(key) {
                        *under = self.doubts;
                    }
                }
            }
        }
    }

    /// Gives a key its place, and the same place to what waits for it in other groups.
    fn lay(&mut self, key: EngineKey, group: Group, place: Place) -> Option<Place> {
        for known in place.path.keys(&self.spec) {
            self.paths.entry(known).or_insert_with(|| Arc::clone(&place.path));
        }
        if self.is_full(group) {
            let groups: Vec<Group> = self.groups.keys().copied().collect();
            for other in groups {
                if let Some(entry) = self.entries.get_mut(&(key, other))
                    && entry.place.is_none()
                    && other != group
                {
                    entry.place = Some(place.clone());
                }
            }
        }
        self.entries.get_mut(&(key, group)).and_then(|entry| entry.place.replace(place))
    }

    /// Ends the speculative marks on the request blocks that these engine blocks end or contain.
    fn confirm(&mut self, stored: &[(EngineKey, Group)]) {
        let size = self.spec.scheme.block_size() as usize;
        let mut confirmed = Vec::new();
        for place in stored.iter().filter_map(|at| self.entries.get(at)?.place.as_ref()) {
            confirmed.extend(place.path.keys(&self.spec).into_iter().skip(place.start / size));
        }
        for key in confirmed {
            let block = self.paths.get(&key).map(|path| self.block_of(key, path));
            if block.is_some_and(|block| {
                self.groups.keys().any(|&group| self.holds(key, block, group, None))
            }) {
                self.marks.remove(&key);
            }
        }
    }

    fn block_of(&self, key: RequestKey, path: &Path) -> usize {
        path.keys(&self.spec).iter().position(|&k| k == key).unwrap_or_default()
    }

    /// Is every token of request block `block` covered by engine blocks held in `group`?
    fn holds(&self, key: RequestKey, block: usize, group: Group, tier: Option<TierId>) -> bool {
        self.covered(key, block, group, tier) == self.spec.scheme.block_size() as usize
    }

    /// How many tokens of the block are covered.
    fn covered(&self, key: RequestKey, block: usize, group: Group, tier: Option<TierId>) -> usize {
        let size = self.spec.scheme.block_size() as usize;
        let covering: Vec<&Place> =
            self.covering(key, block, group, tier).map(|(_, place)| place).collect();
        (block * size..(block + 1) * size)
            .filter(|&token| {
                covering.iter().any(|place| place.start <= token && token < place.end())
            })
            .count()
    }

    /// The engine blocks that are held and cover some of the block.
    fn covering(
        &self,
        key: RequestKey,
        block: usize,
        group: Group,
        tier: Option<TierId>,
    ) -> impl Iterator<Item = (EngineKey, &Place)> {
        let size = self.spec.scheme.block_size() as usize;
        let (from, to) = (block * size, (block + 1) * size);
        let path = self.paths.get(&key);
        self.entries
            .iter()
            .filter(move |((_, g), entry)| *g == group && entry.held_in(tier))
            .filter_map(|((key, _), entry)| Some((*key, entry.place.as_ref()?)))
            .filter(move |(_, place)| {
                let end = place.end().min(to);
                place.start < to
                    && end > from
                    && path.is_some_and(|path| {
                        place.path.identity(end, &self.spec) == path.identity(end, &self.spec)
                    })
            })
    }

    /// Does the pod hold the block as far as full attention is concerned? Copies without a group
    /// stand for every full-attention group.
    fn full(&self, key: RequestKey, block: usize, tier: Option<TierId>) -> bool {
        let mut grouped = self.groups.iter().filter(|(g, k)| g.is_some() && **k == GroupKind::Full);
        (self.is_full(None) && self.holds(key, block, None, tier))
            || (grouped.clone().next().is_some()
                && grouped.all(|(&group, _)| self.holds(key, block, group, tier)))
    }

    fn weight(&self, key: RequestKey, block: usize, config: &IndexConfig) -> f64 {
        let weights = config.tiers.weights();
        let tiers = (0..weights.len()).map(|tier| TierId(tier as u8));
        let weight = |tier: TierId| weights[usize::from(tier.0)];
        // The largest weight among the tiers that hold the block; if it is spread over tiers, the
        // smallest among those that it takes.
        let best = |group: Group| {
            let whole = tiers.clone().filter(|&tier| self.holds(key, block, group, Some(tier)));
            whole.map(weight).reduce(f64::max).unwrap_or_else(|| {
                let part = |&tier: &TierId| self.covered(key, block, group, Some(tier)) > 0;
                tiers.clone().filter(part).map(weight).reduce(f64::min).unwrap_or(0.0)
            })
        };
        let full = |group: &Group| self.is_full(*group);
        let grouped: Vec<Group> =
            self.groups.keys().copied().filter(|g| g.is_some() && full(g)).collect();
        let all = !grouped.is_empty() && grouped.iter().all(|&g| self.holds(key, block, g, None));
        let grouped =
            if all { grouped.into_iter().map(best).fold(f64::MAX, f64::min) } else { 0.0 };
        let ungrouped =
            if full(&None) && self.holds(key, block, None, None) { best(None) } else { 0.0 };
        grouped.max(ungrouped)
    }

    /// The largest L whose blocks satisfy every group, with `marked` blocks held everywhere.
    fn depth(&self, keys: &[RequestKey], tier: Option<TierId>, marked: bool) -> usize {
        let marked =
            |key: &RequestKey| marked && self.marks.get(key).is_some_and(|marks| !marks.is_empty());
        let any_full = self.groups.values().any(|&kind| kind == GroupKind::Full);
        let size = self.spec.scheme.block_size() as usize;
        let satisfied = |length: usize| {
            let full = keys[..length]
                .iter()
                .enumerate()
                .all(|(block, key)| marked(key) || self.full(*key, block, tier));
            let windows = self.groups.iter().all(|(&group, &kind)| {
                let GroupKind::Sliding { window } = kind else { return true };
                let blocks = (window as usize).saturating_sub(1).div_ceil(size);
                let blocks = blocks.max(usize::from(!any_full)).min(length);
                (length - blocks..length).all(|block| {
                    marked(&keys[block]) || self.holds(keys[block], block, group, tier)
                })
            });
            // A pod without full attention groups is asked for its windows only; one that has told
            // us of no group at all holds only what is marked.
            (full || (!any_full && !self.groups.is_empty())) && windows
        };
        let longest = (1..=keys.len()).rev();
        let usable = self.groups.values().any(|&kind| kind != GroupKind::Unsupported);
        if !usable {
            return keys.iter().take_while(|key| marked(key)).count();
        }
        longest.into_iter().find(|&length| satisfied(length)).unwrap_or(0)
    }

    fn matched(&self, keys: &[RequestKey], config: &IndexConfig) -> Option<Match> {
        if self.muted {
            return None;
        }
        let marked = |key: &RequestKey| self.marks.get(key).is_some_and(|marks| !marks.is_empty());
        let depth = self.depth(keys, None, true);
        let any_full = self.groups.values().any(|&kind| kind == GroupKind::Full);
        let mut score = 0.0;
        for (block, key) in keys[..depth].iter().enumerate() {
            let real = if any_full { self.weight(*key, block, config) } else { 0.0 };
            let spec = if marked(key) { config.speculative_weight } else { 0.0 };
            // Blocks that no full-attention group asks for weigh as if on the GPU.
            let windows_only = !any_full && !marked(key);
            score += real.max(spec).max(if windows_only { config.tiers.weights()[0] } else { 0.0 });
        }
        let tiers = (0..crate::model::TierTable::MAX)
            .map(|tier| TierId(tier as u8))
            .filter(|&tier| self.entries.values().any(|entry| entry.held_in(Some(tier))))
            .map(|tier| (tier, self.depth(keys, Some(tier), false) as u32))
            .filter(|&(_, depth)| depth > 0)
            .collect();
        (depth > 0).then(|| Match {
            slot: PodSlot(0),
            depth: depth as u32,
            confirmed: self.depth(keys, None, false) as u32,
            score,
            tiers,
            speculative: keys.iter().take_while(|key| marked(key)).count() as u32,
        })
    }
}

impl NaiveIndex {
    /// An empty index.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        Self { config, pods: Mutex::default() }
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<PodSlot, Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockIndex for NaiveIndex {
    fn register(&self, spec: PodSpec) -> Option<PodSlot> {
        let mut pods = self.pods();
        let slot = (0..self.config.max_pods as u32).map(PodSlot).find(|s| !pods.contains_key(s))?;
        pods.insert(slot, Pod::new(spec));
        Some(slot)
    }

    fn respec(&self, slot: PodSlot, spec: PodSpec) {
        if let Some(pod) = self.pods().get_mut(&slot) {
            let marks = std::mem::take(&mut pod.marks);
            *pod = Pod { marks, ..Pod::new(spec) };
        }
    }

    fn unregister(&self, slot: PodSlot) {
        self.pods().remove(&slot);
    }

    fn store(&self, slot: PodSlot, store: &Store<'_>) -> StoreOutcome {
        let mut pods = self.pods();
        pods.get_mut(&slot)
            .map_or_else(StoreOutcome::default, |pod| pod.store(store, self.config.orphan_blocks))
    }

    fn remove(&self, slot: PodSlot, remove: &Remove<'_>) {
        let mut pods = self.pods();
        let Some(pod) = pods.get_mut(&slot) else { return };
        let all = pod.count_mode == CountMode::Set;
        for key in remove.keys {
            pod.remove(*key, remove.group, remove.tier, all, remove.sequence);
        }
    }

    fn clear(&self, slot: PodSlot) {
        if let Some(pod) = self.pods().get_mut(&slot) {
            pod.entries.clear();
            pod.orphans.clear();
            pod.removed.clear();
            pod.named.clear();
        }
    }

    fn set_count_mode(&self, slot: PodSlot, mode: CountMode) {
        if let Some(pod) = self.pods().get_mut(&slot) {
            pod.count_mode = mode;
        }
    }

    fn set_muted(&self, slot: PodSlot, muted: bool) {
        if let Some(pod) = self.pods().get_mut(&slot) {
            pod.muted = muted;
        }
    }

    fn expire_orphans(&self, slot: PodSlot, before: Instant) -> usize {
        let mut pods = self.pods();
        let Some(pod) = pods.get_mut(&slot) else { return 0 };
        let (expired, kept) = pod.orphans.drain(..).partition(|orphan| orphan.at < before);
        pod.orphans = kept;
        expired.iter().map(|orphan: &Orphan| orphan.keys.len()).sum()
    }

    fn speculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        if let Some(pod) = self.pods().get_mut(&slot) {
            for key in keys {
                pod.marks.entry(*key).or_default().insert(mark);
            }
        }
    }

    fn unspeculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        if let Some(pod) = self.pods().get_mut(&slot) {
            for key in keys {
                pod.marks.entry(*key).or_default().remove(&mark);
            }
        }
    }

    fn lookup(&self, keys: &[RequestKey], tiers: bool, out: &mut Vec<Match>) {
        out.clear();
        for (slot, pod) in self.pods().iter() {
            if let Some(mut found) = pod.matched(keys, &self.config) {
                found.slot = *slot;
                if !tiers {
                    found.tiers.clear();
                }
                out.push(found);
            }
        }
    }

    fn holders(&self, keys: &[RequestKey], block: usize) -> Vec<PodSlot> {
        let Some(&key) = keys.get(block) else { return Vec::new() };
        let holds = |pod: &Pod| {
            pod.paths.get(&key).is_some_and(|path| {
                let block = pod.block_of(key, path);
                pod.groups.keys().any(|&group| pod.holds(key, block, group, None))
            })
        };
        let pods = self.pods();
        pods.iter().filter(|(_, pod)| holds(pod)).map(|(slot, _)| *slot).collect()
    }

    fn export(&self, slot: PodSlot) -> Option<RowImage> {
        let pod = self.pods().get(&slot)?.clone();
        Some(RowImage { content: Content::Oracle(Arc::new(pod)) })
    }

    fn restore(&self, slot: PodSlot, image: &RowImage, _: &mut Anchors) -> Result<(), ImageError> {
        let Content::Oracle(image) = &image.content else { return Err(ImageError::Foreign) };
        let mut pods = self.pods();
        let pod = pods.get_mut(&slot).ok_or(ImageError::Full)?;
        let marks = std::mem::take(&mut pod.marks);
        // A restored row is in no doubt.
        let named = image.named.keys().map(|&copy| (copy, 0)).collect();
        *pod = Pod { marks, named, doubts: 0, muted: false, ..Pod::clone(image) };
        Ok(())
    }

    fn removed_at(&self, slot: PodSlot, key: RequestKey) -> Option<u64> {
        self.pods().get(&slot)?.removed.get(&key).copied()
    }

    fn doubt(&self, slot: PodSlot) -> u64 {
        let mut pods = self.pods();
        let Some(pod) = pods.get_mut(&slot) else { return 0 };
        pod.doubts += 1;
        pod.doubts
    }

    fn drop_unconfirmed(&self, slot: PodSlot, doubt: u64) -> Dropped {
        let mut pods = self.pods();
        let Some(pod) = pods.get_mut(&slot) else { return Dropped::default() };
        let (before, doubt) = (pod.named.len(), doubt.min(pod.doubts));
        for ((key, group, tier), under) in pod.named.clone() {
            if under < doubt {
                pod.remove(key, group, tier, true, DROPPED);
            }
        }
        Dropped { blocks: (before - pod.named.len()) as u64, more: false }
    }

    fn confirm(&self, slot: PodSlot, keys: &[RequestKey]) {
        if let Some(pod) = self.pods().get_mut(&slot) {
            keys.iter().for_each(|&key| pod.vouch(key));
        }
    }

    fn pod_usage(&self, slot: PodSlot) -> PodUsage {
        let pods = self.pods();
        let Some(pod) = pods.get(&slot) else { return PodUsage::default() };
        let mut usage = PodUsage {
            blocks: pod.entries.len() as u64,
            blocks_by_tier: vec![0; crate::model::TierTable::MAX],
            orphans: pod.orphans.iter().map(|orphan| orphan.keys.len() as u64).sum(),
            hybrid_unsupported: pod.groups.values().any(|&kind| kind == GroupKind::Unsupported),
            unconfirmed: pod.named.values().filter(|under| **under < pod.doubts).count() as u64,
            ..PodUsage::default()
        };
        for entry in pod.entries.values() {
            for (tier, _) in entry.counts.iter().filter(|(_, count)| **count > 0) {
                usage.blocks_by_tier[usize::from(tier.0)] += 1;
            }
            usage.repeated += entry.counts.values().filter(|count| **count > 1).count() as u64;
        }
        usage
    }

    fn usage(&self) -> IndexUsage {
        IndexUsage { cap_bytes: self.config.cap_bytes, ..IndexUsage::default() }
    }
}
