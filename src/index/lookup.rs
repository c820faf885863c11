//! One lookup's walk along the keys: bitsets for simple rows, a record per block for hybrid ones.
//!
//! A row is *simple* when its only attention group is full attention: then its depth is the number
//! of leading blocks whose part-0 bitsets contain it, and all simple rows are walked together,
//! one AND per word. Rows with more groups are *hybrid*: what they hold of each block is recorded,
//! and [`Parts`] decides afterwards.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use smallvec::SmallVec;

use crate::{
    index::{
        IndexConfig, Match,
        dash::Held,
        ledger::{Group, MIXED, Part},
        slots::{KeyHash, SlotSet, ones},
    },
    model::{GroupKind, PodSlot, TierId, TierTable},
};

/// What lookups need to know of the rows beside their blocks.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    rows: HashMap<PodSlot, u32>,
    words: usize,
    muted: SlotSet,
    hybrid: Vec<(PodSlot, Arc<Parts>)>,
    /// Hybrid rows as a set, to keep them out of the simple walk.
    not_simple: SlotSet,
}

/// What a hybrid row's groups ask of a prefix.
#[derive(Clone, Debug, Default)]
pub(super) struct Parts {
    /// The part of events without a group, if it is full attention.
    ungrouped: Option<Part>,
    full: SmallVec<[Part; 2]>,
    /// Part and window in tokens.
    windows: SmallVec<[(Part, u32); 2]>,
    simple: bool,
}

impl Parts {
    pub(super) fn new(groups: &[Group]) -> Self {
        let mut parts = Self::default();
        for group in groups {
            match (group.kind, group.id) {
                (GroupKind::Full, None) => parts.ungrouped = Some(group.part),
                (GroupKind::Full, Some(_)) => parts.full.push(group.part),
                (GroupKind::Sliding { window }, _) => parts.windows.push((group.part, window)),
                (GroupKind::Unsupported, _) => {}
            }
        }
        let only_full = parts.ungrouped.into_iter().chain(parts.full.iter().copied());
        parts.simple = parts.windows.is_empty() && only_full.eq([0]);
        parts
    }

    fn any_full(&self) -> bool {
        self.ungrouped.is_some() || !self.full.is_empty()
    }

    fn windows_only(&self) -> bool {
        !self.any_full() && !self.windows.is_empty()
    }
}

impl View {
    pub(super) fn rows(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn add(&mut self, slot: PodSlot, block_size: u32) {
        self.rows.insert(slot, block_size);
        self.words = self.words.max(slot.0 as usize / 64 + 1);
    }

    pub(super) fn forget(&mut self, slot: PodSlot) {
        self.rows.remove(&slot);
        self.muted.remove(slot);
        self.hybrid.retain(|(hybrid, _)| *hybrid != slot);
        self.not_simple.remove(slot);
    }

    pub(super) fn mute(&mut self, slot: PodSlot, muted: bool) {
        if muted && self.rows.contains_key(&slot) {
            self.muted.insert(slot);
        } else {
            self.muted.remove(slot);
        }
    }

    pub(super) fn learn(&mut self, slot: PodSlot, parts: Parts) {
        self.hybrid.retain(|(hybrid, _)| *hybrid != slot);
        self.not_simple.remove(slot);
        if !parts.simple && self.rows.contains_key(&slot) {
            self.not_simple.insert(slot);
            self.hybrid.push((slot, Arc::new(parts)));
        }
    }
}

type Bits = SmallVec<[u64; 16]>;
type Weights = [f64; TierTable::MAX];

/// Tiers that hold one block of one part: bit `t` = tier `t`, bit `16 + t` = several tiers
/// together, the lightest of them `t`.
type Tags = u32;

/// See the module's documentation.
pub(super) struct Walk<'a> {
    view: &'a View,
    config: &'a IndexConfig,
    weights: Weights,
    tiers: bool,
    keys: usize,
    walked: usize,
    /// Simple rows whose prefix is unbroken, speculative marks included.
    active: Bits,
    /// The same by events alone.
    confirmed: Bits,
    /// The same by marks alone.
    marked: Bits,
    /// The same tier by tier; only when asked for.
    by_tier: SmallVec<[(TierId, Bits); 2]>,
    /// Score of a row that has the heaviest tier of every block so far.
    base: f64,
    /// What a row's score lacks to `base`.
    less: HashMap<PodSlot, f64>,
    found: Vec<Match>,
    hybrid: SmallVec<[Hybrid<'a>; 4]>,
}

struct Hybrid<'a> {
    slot: PodSlot,
    block_size: u32,
    parts: &'a Parts,
    /// Still worth recording.
    alive: bool,
    blocks: Vec<Seen>,
}

/// What a hybrid row holds of one block.
struct Seen {
    /// The tags of each part that holds it.
    tags: SmallVec<[(Part, Tags); 2]>,
    marked: bool,
}

fn heaviest(tags: Tags, weights: &Weights) -> f64 {
    let whole = tags & 0xffff;
    let ids = |mask: u32| (0..TierTable::MAX).filter(move |tier| mask & (1 << tier) != 0);
    if whole != 0 {
        return ids(whole).map(|tier| weights[tier]).fold(0.0, f64::max);
    }
    ids(tags >> MIXED).map(|tier| weights[tier]).fold(0.0, f64::max)
}

impl<'a> Walk<'a> {
    pub(super) fn new(view: &'a View, config: &'a IndexConfig, keys: usize, tiers: bool) -> Self {
        let muted = |slot: PodSlot| view.muted.contains(slot);
        let hybrid = view
            .hybrid
            .iter()
            .filter(|(slot, _)| !muted(*slot))
            .map(|(slot, parts)| Hybrid {
                slot: *slot,
                block_size: view.rows.get(slot).copied().unwrap_or(1).max(1),
                parts,
                alive: true,
                blocks: Vec::new(),
            })
            .collect();
        Self {
            view,
            config,
            weights: config.tiers.weights(),
            tiers,
            keys,
            walked: 0,
            active: Bits::new(),
            confirmed: Bits::new(),
            marked: Bits::new(),
            by_tier: SmallVec::new(),
            base: 0.0,
            less: HashMap::new(),
            found: Vec::new(),
            hybrid,
        }
    }

    /// Takes in block `block`; `false` when no row can get any deeper.
    pub(super) fn step(
        &mut self,
        block: usize,
        sets: &[Held],
        marks: &[(PodSlot, HashSet<u64, KeyHash>)],
    ) -> bool {
        let simple = self.step_simple(block, sets, marks);
        let mut hybrid = false;
        for row in &mut self.hybrid {
            hybrid |= row.step(sets, marks);
        }
        self.walked = block + 1;
        simple || hybrid
    }

    fn step_simple(
        &mut self,
        block: usize,
        sets: &[Held],
        marks: &[(PodSlot, HashSet<u64, KeyHash>)],
    ) -> bool {
        let words = self.view.words;
        if block > 0 && self.active.iter().all(|&word| word == 0) {
            return false;
        }
        let mut held: Bits = SmallVec::from_elem(0, words);
        let mut tags: Tags = 0;
        for set in sets.iter().filter(|set| set.part == 0) {
            set.slots.or_into(&mut held);
            tags |= 1 << set.tag;
        }
        let mut noted: Bits = SmallVec::new();
        if !marks.is_empty() {
            noted.resize(words, 0);
            for &(slot, _) in marks {
                if let Some(word) = noted.get_mut(slot.0 as usize / 64) {
                    *word |= 1 << (slot.0 % 64);
                }
            }
        }
        let noted_at = |word: usize| noted.get(word).copied().unwrap_or(0);
        if block == 0 {
            let mut out: Bits = SmallVec::from_elem(0, words);
            self.view.not_simple.or_into(&mut out);
            self.view.muted.or_into(&mut out);
            let seen =
                |bits: &Bits| -> Bits { bits.iter().zip(&out).map(|(b, o)| b & !o).collect() };
            self.confirmed = seen(&held);
            noted.resize(words, 0);
            self.marked = seen(&noted);
            self.active = self.confirmed.iter().zip(&self.marked).map(|(a, b)| a | b).collect();
            for slot in ones(&self.active) {
                self.found.push(Match {
                    slot,
                    depth: 0,
                    confirmed: 0,
                    score: 0.0,
                    tiers: Vec::new(),
                    speculative: 0,
                });
            }
            if self.tiers {
                for set in sets.iter().filter(|set| set.part == 0 && set.tag < MIXED) {
                    let mut bits: Bits = SmallVec::from_elem(0, words);
                    set.slots.or_into(&mut bits);
                    let bits = bits.iter().zip(&out).map(|(b, o)| b & !o).collect();
                    self.by_tier.push((TierId(set.tag), bits));
                }
            }
            self.found.sort_unstable_by_key(|found| found.slot);
        } else {
            for word in 0..words {
                let gone = self.active[word] & !(held[word] | noted_at(word));
                if gone != 0 {
                    self.active[word] &= !gone;
                    self.leave(word, gone, |found, base, less| {
                        found.depth = block as u32;
                        found.score = base - less;
                    });
                }
                let gone = self.confirmed[word] & !held[word];
                if gone != 0 {
                    self.confirmed[word] &= !gone;
                    self.leave(word, gone, |found, _, _| found.confirmed = block as u32);
                }
                let gone = self.marked[word] & !noted_at(word);
                if gone != 0 {
                    self.marked[word] &= !gone;
                    self.leave(word, gone, |found, _, _| found.speculative = block as u32);
                }
            }
            for at in 0..self.by_tier.len() {
                let tier = self.by_tier[at].0;
                let mut now: Bits = SmallVec::from_elem(0, words);
                if let Some(set) = sets.iter().find(|set| set.part == 0 && set.tag == tier.0) {
                    set.slots.or_into(&mut now);
                }
                for word in 0..words {
                    let gone = self.by_tier[at].1[word] & !now[word];
                    if gone != 0 {
                        self.by_tier[at].1[word] &= !gone;
                        self.leave(word, gone, |found, _, _| {
                            found.tiers.push((tier, block as u32));
                        });
                    }
                }
            }
        }
        self.weigh(sets, tags, &noted);
        self.active.iter().any(|&word| word != 0)
    }

    /// Adds the block's weight to every active row.
    fn weigh(&mut self, sets: &[Held], tags: Tags, noted: &Bits) {
        let speculative = self.config.speculative_weight;
        let any_noted = noted.iter().any(|&word| word != 0);
        if tags.count_ones() == 1 && !any_noted {
            self.base += heaviest(tags, &self.weights);
            return;
        }
        let top = (0..32)
            .filter(|tag| tags & (1 << tag) != 0)
            .map(|tag| heaviest(1 << tag, &self.weights))
            .fold(if any_noted { speculative } else { 0.0 }, f64::max);
        self.base += top;
        for slot in ones(&self.active) {
            let mut own: Tags = 0;
            for set in sets.iter().filter(|set| set.part == 0 && set.slots.contains(slot)) {
                own |= 1 << set.tag;
            }
            let mut weight = heaviest(own, &self.weights);
            if noted.get(slot.0 as usize / 64).is_some_and(|word| word & (1 << (slot.0 % 64)) != 0)
            {
                weight = weight.max(speculative);
            }
            if weight < top {
                *self.less.entry(slot).or_default() += top - weight;
            }
        }
    }

    fn leave(&mut self, word: usize, gone: u64, note: impl Fn(&mut Match, f64, f64)) {
        for slot in ones(&[gone]) {
            let slot = PodSlot(slot.0 + word as u32 * 64);
            if let Ok(at) = self.found.binary_search_by_key(&slot, |found| found.slot) {
                let less = self.less.get(&slot).copied().unwrap_or(0.0);
                note(&mut self.found[at], self.base, less);
            }
        }
    }

    /// Closes the books on what is still unbroken and writes the matches in slot order.
    pub(super) fn finish(mut self, out: &mut Vec<Match>) {
        let end = self.walked as u32;
        for word in 0..self.active.len() {
            self.leave(word, self.active[word], |found, base, less| {
                found.depth = end;
                found.score = base - less;
            });
            self.leave(word, self.confirmed[word], |found, _, _| found.confirmed = end);
            self.leave(word, self.marked[word], |found, _, _| found.speculative = end);
        }
        for (tier, bits) in std::mem::take(&mut self.by_tier) {
            for (word, &left) in bits.iter().enumerate() {
                self.leave(word, left, |found, _, _| found.tiers.push((tier, end)));
            }
        }
        for found in &mut self.found {
            found.tiers.sort_unstable_by_key(|(tier, _)| *tier);
        }
        out.append(&mut self.found);
        for row in &self.hybrid {
            out.extend(row.matched(self.keys, self.tiers, &self.weights, self.config));
        }
        if !self.hybrid.is_empty() {
            out.sort_unstable_by_key(|found| found.slot);
        }
    }
}

impl Hybrid<'_> {
    fn step(&mut self, sets: &[Held], marks: &[(PodSlot, HashSet<u64, KeyHash>)]) -> bool {
        if !self.alive {
            return false;
        }
        let mut tags: SmallVec<[(Part, Tags); 2]> = SmallVec::new();
        for set in sets.iter().filter(|set| set.slots.contains(self.slot)) {
            match tags.iter_mut().find(|(part, _)| *part == set.part) {
                Some((_, tags)) => *tags |= 1 << set.tag,
                None => tags.push((set.part, 1 << set.tag)),
            }
        }
        let marked = marks.iter().any(|(slot, _)| *slot == self.slot);
        self.blocks.push(Seen { tags, marked });
        let at = self.blocks.len() - 1;
        // Windows can hold again after a hole; full attention cannot.
        self.alive = marked || self.parts.windows_only() || self.full(at, u32::MAX);
        self.alive
    }

    fn tags(&self, block: usize, part: Part) -> Tags {
        self.blocks
            .get(block)
            .and_then(|seen| seen.tags.iter().find(|(held, _)| *held == part))
            .map_or(0, |(_, tags)| *tags)
    }

    fn full(&self, block: usize, mask: Tags) -> bool {
        let holds = |part: Part| self.tags(block, part) & mask != 0;
        self.parts.ungrouped.is_some_and(holds)
            || (!self.parts.full.is_empty() && self.parts.full.iter().all(|&part| holds(part)))
    }

    /// The largest L that every group is satisfied with, of `keys` blocks.
    fn depth(&self, keys: usize, mask: Tags, marks: bool) -> usize {
        let marked = |block: usize| marks && self.blocks.get(block).is_some_and(|seen| seen.marked);
        let unbroken = |holds: &dyn Fn(usize) -> bool| {
            (0..keys.min(self.blocks.len())).take_while(|&b| marked(b) || holds(b)).count()
        };
        if !self.parts.any_full() && self.parts.windows.is_empty() {
            return unbroken(&|_| false);
        }
        let most = if self.parts.windows_only() {
            self.blocks.len().min(keys)
        } else {
            unbroken(&|block| self.full(block, mask))
        };
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

    fn matched(
        &self,
        keys: usize,
        tiers: bool,
        weights: &Weights,
        config: &IndexConfig,
    ) -> Option<Match> {
        let depth = self.depth(keys, u32::MAX, true);
        if depth == 0 {
            return None;
        }
        let mut score = 0.0;
        for block in 0..depth {
            let marked = self.blocks.get(block).is_some_and(|seen| seen.marked);
            score += if marked {
                self.weight(block, weights).max(config.speculative_weight)
            } else if self.parts.any_full() {
                self.weight(block, weights)
            } else {
                // No full-attention group asks for the block: it weighs as if on the GPU.
                weights[0]
            };
        }
        let mut by_tier = Vec::new();
        if tiers {
            for tier in 0..TierTable::MAX as u8 {
                let depth = self.depth(keys, 1 << tier, false);
                if depth > 0 {
                    by_tier.push((TierId(tier), depth as u32));
                }
            }
        }
        Some(Match {
            slot: self.slot,
            depth: depth as u32,
            confirmed: self.depth(keys, u32::MAX, false) as u32,
            score,
            tiers: by_tier,
            speculative: self.blocks.iter().take_while(|seen| seen.marked).count() as u32,
        })
    }
}
