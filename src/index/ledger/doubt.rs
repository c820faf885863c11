//! What a row holds on trust: blocks that no event has named since events were lost.
//!
//! # Model
//!
//! The unit is a *copy*: an engine key in a part and a tier. Doubts are numbered. A store *touches*
//! the copies that it names, a removal forgets them, and [`Ledger::vouch`] touches those of request
//! blocks that somebody saw in the engine's cache; what was touched remembers the doubt under which.
//! A copy is unconfirmed since a doubt if it was last touched before it, or never.
//!
//! # Cost
//!
//! Outside a doubt nothing is kept, and a store or removal pays one branch. In a doubt, about 36
//! bytes for each copy touched; it ends by itself when nothing unconfirmed is left.

use std::collections::{HashMap, HashSet};

use smallvec::SmallVec;

use super::{Counts, EntryKey, Ledger, MIXED, Part, Shared};
use crate::{
    index::{DROPPED, Dropped, Remove, keymap::SHARDS, runs::Block, slots::KeyHash},
    model::{CountMode, EngineKey, RequestKey, TierId},
};

/// Copies that one call looks at before it returns, about: a few milliseconds' work.
const SLICE: usize = 1 << 14;

/// A key, its part and its tier.
type CopyId = (EngineKey, Part, u8);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// The number of the latest one.
    number: u64,
    /// Under which all copies had been touched when the first of them began.
    settled: u64,
    /// Copies touched, and under which doubt last.
    touched: HashMap<CopyId, u64, KeyHash>,
    /// How many of them under the latest.
    fresh: u64,
    /// What is dropped at present: the doubt, and the shards of plain keys that have been gone through.
    dropping: (u64, usize),
}

impl Doubt {
    /// A copy is not held any more.
    pub(super) fn forget(&mut self, at: EntryKey, tier: TierId) {
        let under = self.touched.remove(&(at.0, at.1, tier.0));
        self.fresh -= u64::from(under == Some(self.number));
    }

    fn touch(&mut self, copy: CopyId) {
        let before = self.touched.insert(copy, self.number);
        self.fresh += u64::from(before != Some(self.number));
    }

    /// Was it touched since that doubt?
    fn knows(&self, copy: CopyId, since: u64) -> bool {
        self.touched.get(&copy).copied().unwrap_or(self.settled) >= since
    }
}

impl Ledger {
    /// From now on everything that is held is unconfirmed, until it is touched. Returns the doubt's
    /// number.
    pub(crate) fn doubt(&mut self) -> u64 {
        self.doubts += 1;
        if self.copies() > 0 {
            // Without a doubt every copy is known under the latest one.
            let settled = self.doubts - 1;
            let new = || Box::new(Doubt { settled, ..Doubt::default() });
            let doubt = self.doubt.get_or_insert_with(new);
            (doubt.number, doubt.fresh) = (self.doubts, 0);
        }
        self.doubts
    }

    /// Copies held.
    fn copies(&self) -> u64 {
        self.by_tier.iter().sum()
    }

    /// Copies held and not touched since the latest doubt.
    pub(super) fn unconfirmed(&self) -> u64 {
        self.doubt.as_deref().map_or(0, |doubt| self.copies().saturating_sub(doubt.fresh))
    }

    pub(super) fn doubt_bytes(&self) -> u64 {
        let each = (size_of::<(CopyId, u64)>() as u64 + 1) * 4 / 3;
        self.doubt.as_deref().map_or(0, |doubt| doubt.touched.len() as u64 * each)
    }

    /// A store has named these keys, which are held now.
    pub(super) fn touch(&mut self, keys: &[EngineKey], part: Part, tier: TierId) {
        if let Some(doubt) = &mut self.doubt {
            keys.iter().for_each(|&key| doubt.touch((key, part, tier.0)));
            self.end_doubt();
        }
    }

    /// Without an unconfirmed copy there is no doubt.
    fn end_doubt(&mut self) {
        if self.unconfirmed() == 0 {
            self.doubt = None;
        }
    }

    /// Drops some of what is unconfirmed since a doubt.
    pub(crate) fn drop_unconfirmed(&mut self, since: u64, out: Shared<'_>) -> Dropped {
        let (before, since) = (self.copies(), since.min(self.doubts));
        let mut looked_at = 0;
        let mut more = self.doubt.is_some();
        while more && looked_at < SLICE {
            let Some(doubt) = &mut self.doubt else { break };
            if doubt.dropping.0 != since {
                doubt.dropping = (since, 0);
            }
            let shard = doubt.dropping.1;
            if shard < SHARDS {
                doubt.dropping.1 += 1;
                looked_at += self.plain.blocks_of(shard).count();
                let copies = self.plain_in_doubt(shard, since, out);
                self.drop_copies(&copies, 0, out);
            } else {
                let copies = self.entries_in_doubt(since);
                more = !copies.is_empty();
                looked_at += SLICE;
                for (part, copies) in copies {
                    self.drop_copies(&copies, part, out);
                }
            }
        }
        if !more && let Some(doubt) = &mut self.doubt {
            doubt.dropping = (0, 0);
        }
        self.end_doubt();
        Dropped { blocks: before - self.copies(), more }
    }

    /// The untouched copies of one shard of the plain keys, those of a run together.
    fn plain_in_doubt(&self, shard: usize, since: u64, out: Shared<'_>) -> Vec<(EngineKey, u8)> {
        let Some(doubt) = &self.doubt else { return Vec::new() };
        let look = out.runs.look();
        let names = self.names(&look, out);
        let used =
            (0..).zip(&self.by_tier).filter(|(_, blocks)| **blocks > 0).map(|(tier, _)| tier);
        let used: SmallVec<[u8; 4]> = used.collect();
        let mut found: Vec<(u8, Block, EngineKey)> = Vec::new();
        for block in self.plain.blocks_of(shard) {
            let key = names.of(block);
            if used.iter().all(|&tier| doubt.knows((key, 0, tier), since)) {
                continue;
            }
            let tags = if used.len() > 1 { self.tiers_of(block, out) } else { used.clone() };
            let tags = tags.into_iter().filter(|&tag| !doubt.knows((key, 0, tag), since));
            found.extend(tags.map(|tag| (tag, block, key)));
        }
        found.sort_unstable();
        found.into_iter().map(|(tag, _, key)| (key, tag)).collect()
    }

    /// Untouched copies of entries, a slice's worth, by part.
    fn entries_in_doubt(&self, since: u64) -> Vec<(Part, Vec<(EngineKey, u8)>)> {
        let mut found: Vec<(Part, Vec<(EngineKey, u8)>)> = Vec::new();
        let Some(doubt) = &self.doubt else { return found };
        let copies = self.entries.iter().flat_map(|(&(key, part), entry)| {
            entry.counts.iter().map(move |&(tier, _)| (key, part, tier.0))
        });
        for copy in copies.filter(|copy| !doubt.knows(*copy, since)).take(SLICE) {
            let at = found.iter().position(|(part, _)| *part == copy.1).unwrap_or(found.len());
            if at == found.len() {
                found.push((copy.1, Vec::new()));
            }
            found[at].1.push((copy.0, copy.2));
        }
        found
    }

    fn drop_copies(&mut self, copies: &[(EngineKey, u8)], part: Part, out: Shared<'_>) {
        let group = self.groups.iter().find(|group| group.part == part).map(|group| group.id);
        let Some(group) = group else { return };
        // However often it was announced.
        let mode = std::mem::replace(&mut self.mode, CountMode::Set);
        for copies in copies.chunk_by(|one, next| one.1 == next.1) {
            let keys: Vec<EngineKey> = copies.iter().map(|(key, _)| *key).collect();
            let tier = copies.first().map_or(TierId(0), |&(_, tier)| TierId(tier));
            self.remove(&Remove { keys: &keys, group, tier, sequence: DROPPED }, out);
        }
        self.mode = mode;
    }

    /// Touches the copies that hold these request blocks in full-attention groups. `keys` lead
    /// from the start of a prompt.
    pub(crate) fn vouch(&mut self, keys: &[RequestKey], out: Shared<'_>) {
        if self.doubt.is_none() {
            return;
        }
        let full: SmallVec<[Part; 4]> = self.full_parts().into_iter().collect();
        let mut seen: Vec<CopyId> = Vec::new();
        if full.contains(&0) && self.plain.len() > 0 {
            let look = out.runs.look();
            for (key, block) in out.runs.trace(keys) {
                if look.describe(block).is_some_and(|(described, _)| described == key)
                    && let Some(plain) = self.plain_of(block, out)
                {
                    let tags = self.tiers_of(block, out).into_iter().filter(|&tag| tag < MIXED);
                    seen.extend(tags.map(|tag| (plain, 0, tag)));
                }
            }
        }
        if !self.entries.is_empty() {
            let counts = |counts: &Counts, at: EntryKey, seen: &mut Vec<CopyId>| {
                seen.extend(counts.iter().map(|&(tier, _)| (at.0, at.1, tier.0)));
            };
            let wanted: HashSet<RequestKey, KeyHash> = keys.iter().copied().collect();
            for (&at, entry) in self.entries.iter().filter(|(at, _)| full.contains(&at.1)) {
                let place = entry.place.as_ref();
                if place.is_some_and(|place| place.whole().iter().any(|key| wanted.contains(key))) {
                    counts(&entry.counts, at, &mut seen);
                }
            }
            for at in keys.iter().flat_map(|&key| self.joints.makers(key)) {
                if let Some(entry) = self.entries.get(&at).filter(|_| full.contains(&at.1)) {
                    counts(&entry.counts, at, &mut seen);
                }
            }
        }
        if let Some(doubt) = &mut self.doubt {
            seen.into_iter().for_each(|copy| doubt.touch(copy));
            self.end_doubt();
        }
    }
}
