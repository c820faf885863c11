//! Request blocks that several engine blocks make up.
//!
//! A *joint* is such a request block: it lists the prefixes that end inside it. Each prefix is a
//! *node* that lists the engine blocks which end there, in any attention group: several keys may
//! stand for equal tokens. The joint holds, per part, what the union of its held engine blocks
//! covers. Equal block sizes never get here.
//!
//! A joint lives as long as any engine block ends in it, held or not in full, so that a block that
//! comes back finds its place.

use std::collections::HashMap;

use smallvec::SmallVec;

use crate::{
    index::{
        ledger::{EntryKey, MIXED, Part},
        place::{Completed, Ends, PrefixId},
        slots::KeyHash,
    },
    model::{RequestKey, TierId, TierTable},
};

/// A fact that begins or ends to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Set(RequestKey, Part, u8),
    Unset(RequestKey, Part, u8),
    /// The joint is gone.
    Drop(RequestKey),
}

/// How often an engine block is held in which tier; empty when it is not.
pub(crate) type Held<'a> = &'a dyn Fn(EntryKey) -> &'a [(TierId, u32)];

type Facts = SmallVec<[(Part, u8); 1]>;
/// Part, tier, and the tokens `from..to` of the request block.
type Span = (Part, TierId, u32, u32);

/// Estimated bytes of a joint or node with its map entry.
const BYTES: u64 = 128;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Joints {
    nodes: HashMap<PrefixId, Node, KeyHash>,
    joints: HashMap<RequestKey, Joint, KeyHash>,
}

#[derive(Debug, Default)]
struct Node {
    /// Engine blocks that end here, and their first tokens.
    entries: SmallVec<[(EntryKey, u32); 1]>,
    joints: SmallVec<[RequestKey; 1]>,
}

#[derive(Debug)]
struct Joint {
    /// First token of the request block.
    begin: u32,
    ends: Ends,
    /// What is set at present.
    facts: Facts,
}

impl Joints {
    /// An engine block that begins at token `start` ends with this prefix.
    pub(crate) fn enter(&mut self, prefix: PrefixId, at: EntryKey, start: u32) {
        self.nodes.entry(prefix).or_default().entries.push((at, start));
    }

    /// It does not any more.
    pub(crate) fn leave(&mut self, prefix: PrefixId, at: EntryKey) {
        if let Some(node) = self.nodes.get_mut(&prefix) {
            node.entries.retain(|(entry, _)| *entry != at);
        }
    }

    /// Records of which prefixes a request block is made; returns whether it is a new joint.
    pub(crate) fn join(&mut self, Completed { key, begin, ends }: Completed) -> bool {
        let known = self.joints.len();
        let joint = self.joints.entry(key).or_insert_with(|| Joint {
            begin,
            ends: Ends::new(),
            facts: Facts::new(),
        });
        for (prefix, end) in ends {
            if !joint.ends.iter().any(|(known, _)| *known == prefix) {
                joint.ends.push((prefix, end));
                let node = self.nodes.entry(prefix).or_default();
                if !node.joints.contains(&key) {
                    node.joints.push(key);
                }
            }
        }
        self.joints.len() > known
    }

    /// Is the request block held in any part?
    pub(crate) fn is_held(&self, key: RequestKey) -> bool {
        self.joints.get(&key).is_some_and(|joint| !joint.facts.is_empty())
    }

    /// The engine blocks that make up a request block, in the parts that hold it.
    pub(crate) fn makers(&self, key: RequestKey) -> SmallVec<[EntryKey; 4]> {
        let Some(joint) = self.joints.get(&key) else { return SmallVec::new() };
        let nodes = joint.ends.iter().filter_map(|(prefix, _)| self.nodes.get(prefix));
        let entries = nodes.flat_map(|node| node.entries.iter().map(|(at, _)| *at));
        entries.filter(|at| joint.facts.iter().any(|(part, _)| *part == at.1)).collect()
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.joints.len() + self.nodes.len()) as u64 * BYTES
    }

    /// Works out anew every joint that a prefix is part of, and drops what nothing needs.
    pub(crate) fn review<'a>(
        &mut self,
        prefix: PrefixId,
        held: Held<'a>,
        block_size: u32,
        tiers: &TierTable,
    ) -> SmallVec<[Change; 4]> {
        let mut changes = SmallVec::new();
        let Some(node) = self.nodes.get(&prefix) else { return changes };
        if node.joints.is_empty() && node.entries.is_empty() {
            self.nodes.remove(&prefix);
            return changes;
        }
        for key in node.joints.clone() {
            let Some(joint) = self.joints.get(&key) else { continue };
            let mut spans: SmallVec<[Span; 8]> = SmallVec::new();
            let mut needed = false;
            for &(prefix, end) in &joint.ends {
                let entries = self.nodes.get(&prefix).map(|node| &node.entries);
                for &(at, start) in entries.into_iter().flatten() {
                    needed = true;
                    let from = start.saturating_sub(joint.begin);
                    spans.extend(held(at).iter().map(|&(tier, _)| (at.1, tier, from, end)));
                }
            }
            let facts = covered(&mut spans, block_size, tiers);
            let new = facts.iter().filter(|fact| !joint.facts.contains(fact));
            changes.extend(new.map(|&(part, tag)| Change::Set(key, part, tag)));
            let gone = joint.facts.iter().filter(|fact| !facts.contains(fact));
            changes.extend(gone.map(|&(part, tag)| Change::Unset(key, part, tag)));
            if !needed {
                self.drop_joint(key);
                changes.push(Change::Drop(key));
            } else if let Some(joint) = self.joints.get_mut(&key) {
                joint.facts = facts;
            }
        }
        changes
    }

    /// Every joint, as it was when it was completed.
    pub(crate) fn list(&self) -> impl Iterator<Item = Completed> + '_ {
        let joints = self.joints.iter();
        joints.map(|(&key, joint)| Completed { key, begin: joint.begin, ends: joint.ends.clone() })
    }

    fn drop_joint(&mut self, key: RequestKey) {
        for (prefix, _) in self.joints.remove(&key).into_iter().flat_map(|joint| joint.ends) {
            if let Some(node) = self.nodes.get_mut(&prefix) {
                node.joints.retain(|known| *known != key);
                if node.joints.is_empty() && node.entries.is_empty() {
                    self.nodes.remove(&prefix);
                }
            }
        }
    }
}

/// Which (part, tag) cover all of `0..size`: each tier on its own, or several tiers together.
fn covered(spans: &mut SmallVec<[Span; 8]>, size: u32, tiers: &TierTable) -> Facts {
    // Sorted by start, so that one pass per question finds the first hole.
    spans.sort_unstable_by_key(|&(_, _, from, _)| from);
    let covers = |want: &dyn Fn(Part, TierId) -> bool| {
        let mut reach = 0;
        for &(part, tier, from, to) in spans.iter() {
            if want(part, tier) && from <= reach {
                reach = reach.max(to);
            }
        }
        reach >= size
    };
    let mut facts: Facts = SmallVec::new();
    let mut parts: SmallVec<[Part; 4]> = spans.iter().map(|span| span.0).collect();
    parts.sort_unstable();
    parts.dedup();
    for part in parts {
        let mut held: SmallVec<[TierId; 4]> =
            spans.iter().filter(|span| span.0 == part).map(|span| span.1).collect();
        held.sort_unstable();
        held.dedup();
        let whole: SmallVec<[TierId; 4]> =
            held.iter().copied().filter(|&tier| covers(&|p, t| p == part && t == tier)).collect();
        if whole.is_empty() && covers(&|p, _| p == part) {
            let weights = tiers.weights();
            let weight = |tier: &TierId| weights[usize::from(tier.0) % TierTable::MAX];
            if let Some(lightest) = held.iter().min_by(|a, b| weight(a).total_cmp(&weight(b))) {
                facts.push((part, MIXED + lightest.0));
            }
        }
        facts.extend(whole.into_iter().map(|tier| (part, tier.0)));
    }
    facts
}
