//! A ledger as an image, and back.
//!
//! # Cost
//!
//! An export looks at each run that knows the row once, under that run's lock, and copies sixteen
//! bytes a block: it runs at the speed of memory, and the caller may stop the row for its time.

use std::{
    collections::{HashSet, hash_map},
    sync::Arc,
    time::Instant,
};

use smallvec::SmallVec;

use super::{Counts, Entry, Ledger, MAX_BLOCK_SIZES, MAX_PARTS, MIXED, NO_PART, Shared};
use crate::{
    index::{
        image::{Anchors, Chain, EntryImage, ImageError, LedgerImage, Spans},
        orphans::Orphan,
        place::{Completed, Place},
        runs::{Block, Line, LineId, Locked, PIN, Path, Segment},
        slots::KeyHash,
    },
    model::{EngineKey, GroupKind, RequestKey, TierId, TierTable},
};

/// Blocks of a chain at most.
const LONGEST: usize = 1 << 16;

type Wanted = HashSet<RequestKey, KeyHash>;

fn refuse<T>(why: &'static str) -> Result<T, ImageError> {
    Err(ImageError::Inconsistent(why))
}

impl Ledger {
    /// What later events need to go on from here.
    pub(crate) fn export(&self, out: Shared<'_>) -> LedgerImage {
        let now = Instant::now();
        let mut image = LedgerImage {
            mode: self.mode,
            groups: self.groups.to_vec(),
            loras: self.roots.iter().skip(1).map(|(name, _)| Arc::clone(name)).collect(),
            block_sizes: self.block_sizes.clone(),
            joints: self.joints.list().collect(),
            removed: self.removed.iter().copied().collect(),
            ..LedgerImage::default()
        };
        let mut known: Vec<u64> = Vec::new();
        let spots = self.spots.values().map(|spot| spot.block);
        {
            let snapshot = out.runs.load();
            let mut firsts: Vec<Block> = Vec::new();
            for block in self.plain.blocks().chain(spots) {
                let run = snapshot.run_of(block).unwrap_or_else(|| out.runs.owner(block));
                let (word, bit) = (run as usize / 64, 1 << (run % 64));
                if known.len() <= word {
                    known.resize(word + 1, 0);
                }
                if known[word] & bit == 0 {
                    known[word] |= bit;
                    firsts.push(block);
                }
            }
            drop(snapshot);
            image.chains.extend(firsts.into_iter().filter_map(|block| self.chain(block, out)));
        }
        let entries = self.entries.iter().map(|(&at, entry)| EntryImage {
            at,
            counts: entry.counts.clone(),
            place: entry.place.clone(),
        });
        image.entries.extend(entries);
        image.orphans.extend(self.orphans.list().map(|(parent, orphan)| {
            let age = now.saturating_duration_since(orphan.at).as_millis();
            (parent, u64::try_from(age).unwrap_or(u64::MAX), orphan.clone())
        }));
        image
    }

    /// The run of a block, as far as the row needs it.
    fn chain(&self, block: Block, out: Shared<'_>) -> Option<Chain> {
        let look = out.runs.look();
        let (_, number) = look.describe(block)?;
        let (base, keys, lines) = out.runs.with(block, |run, at| {
            let lines: SmallVec<[(LineId, Line); 4]> =
                run.lines_of(self.seat).into_iter().map(|id| (id, run.load(id))).collect();
            let needed = |at: &u32| lines.iter().any(|(_, line)| line.holds(*at));
            let end = (0..run.length()).rev().find(needed).map_or(0, |last| last + 1);
            let keys: Vec<RequestKey> = (0..end).map(|at| run.key(at)).collect();
            (block - at, keys, lines)
        })?;
        let names = self.names(&look, out);
        let mut engine = vec![EngineKey(0); keys.len()];
        let mut chain_lines: Vec<(TierId, Spans)> = Vec::new();
        let held = |at: u32| {
            lines.iter().any(|(id, line)| id.part() == 0 && id.tag() < MIXED && line.holds(at))
        };
        for (at, name) in engine.iter_mut().enumerate() {
            if !held(at as u32) {
                continue;
            }
            let block = base + at as u32;
            let key = names.of(block);
            // Only pinned blocks can be those of entries.
            let plain = !self.spots.contains_key(&keys[at])
                || self.plain.find(key, |block| names.of(block)) == Some(block);
            if plain {
                *name = key;
            }
        }
        let mut copies = Vec::new();
        for (id, line) in &lines {
            if id.part() != 0 || id.tag() >= MIXED {
                continue;
            }
            let tier = TierId(id.tag());
            let mut spans = Spans::new();
            for at in 0..keys.len() as u32 {
                if engine[at as usize].0 == 0 || !line.holds(at) {
                    continue;
                }
                match spans.last_mut() {
                    Some((_, to)) if *to == at => *to += 1,
                    _ => spans.push((at, at + 1)),
                }
                if !self.more.is_empty()
                    && let Some(&more) = self.more.get(&(base + at, tier.0))
                {
                    copies.push((at, tier, more));
                }
            }
            if !spans.is_empty() {
                chain_lines.push((tier, spans));
            }
        }
        let at = block - base;
        Some(Chain { position: number - at, keys, engine, lines: chain_lines, copies })
    }

    /// Takes in an image; the ledger is new. After an error it is of no use, and no run knows it.
    pub(crate) fn restore(
        &mut self,
        image: &LedgerImage,
        anchors: &mut Anchors,
        out: Shared<'_>,
    ) -> Result<(), ImageError> {
        let mut laid = Vec::new();
        let restored = self.restore_all(image, anchors, &mut laid, out);
        let pin = LineId::new(self.seat, PIN, 0);
        for segment in laid {
            if restored.is_err() {
                out.runs.sweep(out.runs.owner(segment.first), self.seat);
                continue;
            }
            // What was pinned only to be found is let go.
            out.runs.with(segment.first, |run, at| {
                let mut line = run.load(pin);
                if self.spots.is_empty() {
                    line.unset(at, at + segment.count);
                } else {
                    for at in at..at + segment.count {
                        if !self.spots.contains_key(&run.key(at)) {
                            line.unset(at, at + 1);
                        }
                    }
                }
                run.save(pin, &line);
            });
        }
        restored
    }

    fn restore_all(
        &mut self,
        image: &LedgerImage,
        anchors: &mut Anchors,
        laid: &mut Vec<Segment>,
        out: Shared<'_>,
    ) -> Result<(), ImageError> {
        self.restore_groups(image)?;
        self.mode = image.mode;
        image.loras.iter().for_each(|name| {
            self.root(name);
        });
        self.block_sizes = image.block_sizes.iter().copied().take(MAX_BLOCK_SIZES).collect();

        let mut wanted = Wanted::default();
        for place in image.entries.iter().filter_map(|entry| entry.place.as_ref()) {
            wanted.extend(place.at.is_some().then_some(place.key));
            wanted.extend(place.whole());
        }
        wanted.extend(image.joints.iter().map(|joint| joint.key));
        let mut transient = Vec::new();
        for chain in &image.chains {
            let before = laid.len();
            self.restore_chain(chain, anchors, laid, out)?;
            if wanted.is_empty() {
                continue;
            }
            let blocks = laid[before..].iter().flat_map(|it| it.first..it.first + it.count);
            for (block, key) in blocks.zip(&chain.keys).filter(|(_, key)| wanted.contains(*key)) {
                self.pin(*key, block, out);
                transient.push(*key);
            }
        }
        self.restore_joints(&image.joints, out)?;
        for entry in &image.entries {
            self.restore_entry(entry, out)?;
        }
        for (parent, _, orphan) in &image.orphans {
            self.restore_orphan(*parent, orphan)?;
        }
        for &(key, sequence) in &image.removed {
            self.note_removed(key, sequence);
        }
        for key in transient {
            if let hash_map::Entry::Occupied(mut spot) = self.spots.entry(key) {
                spot.get_mut().users -= 1;
                if spot.get().users == 0 {
                    spot.remove();
                }
            }
        }
        Ok(())
    }

    fn restore_groups(&mut self, image: &LedgerImage) -> Result<(), ImageError> {
        if image.groups.len() > MAX_PARTS + 1 {
            return refuse("too many attention groups");
        }
        for (at, group) in image.groups.iter().enumerate() {
            let before = &image.groups[..at];
            let twice = before.iter().any(|other| {
                other.id == group.id || (other.part == group.part && group.part != NO_PART)
            });
            let fits = usize::from(group.part) < MAX_PARTS
                || (group.part == NO_PART && group.kind == GroupKind::Unsupported);
            if twice || !fits {
                return refuse("attention groups");
            }
        }
        self.groups = image.groups.iter().copied().collect();
        Ok(())
    }

    fn has_part(&self, part: u8) -> bool {
        part != NO_PART && self.groups.iter().any(|group| group.part == part)
    }

    /// Lays a chain, all of it pinned, and makes the row hold what it held of it.
    fn restore_chain(
        &mut self,
        chain: &Chain,
        anchors: &mut Anchors,
        laid: &mut Vec<Segment>,
        out: Shared<'_>,
    ) -> Result<(), ImageError> {
        let count = chain.keys.len();
        let end = (u64::from(chain.position) + count as u64 + 1)
            * u64::from(self.spec.scheme.block_size());
        if count == 0 || count > LONGEST || chain.engine.len() != count || end > u64::from(u32::MAX)
        {
            return refuse("the length of a chain");
        }
        self.check_lines(chain)?;
        let first = chain.keys[0];
        let after = if chain.position == 0 { None } else { anchors.block(first) };
        let path = Path {
            after: after.and_then(|block| block.checked_sub(1)),
            position: chain.position,
            keys: &chain.keys,
            engine: Some(&chain.engine),
        };
        let (seat, pin) = (self.seat, LineId::new(self.seat, PIN, 0));
        let mut segments = SmallVec::new();
        let hold = |run: &mut Locked<'_>, from, to| {
            let mut line = run.load(pin);
            let new = !line.any(from, to);
            if new {
                line.set(from, to);
                run.save(pin, &line);
            }
            new
        };
        let done = out.runs.lay(&path, seat, hold, &mut segments);
        laid.extend_from_slice(&segments);
        if done != count {
            return refuse("a block twice");
        }
        let mut at = 0;
        for &segment in &segments {
            let keys = &chain.keys[at..at + segment.count as usize];
            if !anchors.is_empty() {
                for (nth, (block, &key)) in (segment.first..).zip(keys).enumerate() {
                    // What begins a run is found by itself.
                    let inside = nth > 0
                        || (at > 0
                            && block > 0
                            && out.runs.owner(block - 1) == out.runs.owner(block));
                    if inside {
                        anchors.found(key, block);
                    }
                }
            }
            self.hold_segment(chain, segment, at as u32, out)?;
            at += segment.count as usize;
        }
        Ok(())
    }

    fn check_lines(&self, chain: &Chain) -> Result<(), ImageError> {
        let count = chain.keys.len() as u32;
        if !chain.lines.is_empty() && !self.has_part(0) {
            return refuse("blocks of no attention group");
        }
        let mut held = vec![false; chain.keys.len()];
        for (at, (tier, spans)) in chain.lines.iter().enumerate() {
            let twice = chain.lines[..at].iter().any(|(other, _)| other == tier);
            if twice || usize::from(tier.0) >= TierTable::MAX {
                return refuse("tiers of a chain");
            }
            let mut before = 0;
            for &(from, to) in spans {
                if from < before || from >= to || to > count {
                    return refuse("spans of a chain");
                }
                before = to;
                held[from as usize..to as usize].fill(true);
            }
        }
        if chain.engine.iter().zip(held).any(|(key, held)| (key.0 != 0) != held) {
            return refuse("keys of a chain");
        }
        Ok(())
    }

    fn hold_segment(
        &mut self,
        chain: &Chain,
        segment: Segment,
        skipped: u32,
        out: Shared<'_>,
    ) -> Result<(), ImageError> {
        let seat = self.seat;
        let engine = &chain.engine[skipped as usize..][..segment.count as usize];
        // Spans of blocks with a plain key.
        let mut plain = Spans::new();
        for (at, key) in (0..).zip(engine) {
            match plain.last_mut() {
                _ if key.0 == 0 => {}
                Some((_, to)) if *to == at => *to += 1,
                _ => plain.push((at, at + 1)),
            }
        }
        let held = out.runs.with(segment.first, |run, at| {
            let taken = run.lines_of(seat).iter().any(|&id| {
                id.part() == 0
                    && plain.iter().any(|&(from, to)| run.load(id).any(at + from, at + to))
            });
            if taken {
                return None;
            }
            let mut by_tier = [0; TierTable::MAX];
            for (tier, spans) in &chain.lines {
                let id = LineId::new(seat, 0, tier.0);
                let mut line = run.load(id);
                for &(from, to) in spans {
                    let from = from.max(skipped);
                    let to = to.min(skipped + segment.count);
                    if from < to {
                        line.set(at + from - skipped, at + to - skipped);
                        by_tier[usize::from(tier.0)] += u64::from(to - from);
                    }
                }
                run.save(id, &line);
            }
            Some(by_tier)
        });
        let Some(by_tier) = held.flatten() else { return refuse("a block twice") };
        for (sum, more) in self.by_tier.iter_mut().zip(by_tier) {
            *sum += more;
        }
        let look = out.runs.look();
        for (from, to) in plain {
            let part = Segment { first: segment.first + from, count: to - from };
            let keys = &engine[from as usize..to as usize];
            self.name(part, keys, &look);
            let names = super::Names { runs: out.runs, look: &look, own: &self.own };
            for (block, &key) in (part.first..).zip(keys) {
                if !self.plain.insert(key, block, |block| names.of(block)) {
                    return refuse("an engine key twice");
                }
            }
        }
        for &(offset, tier, more) in &chain.copies {
            let Some(at) = offset.checked_sub(skipped).filter(|&at| at < segment.count) else {
                continue;
            };
            let id = LineId::new(seat, 0, tier.0);
            let block = segment.first + at;
            let held = out.runs.with(block, |run, at| run.load(id).holds(at));
            if held != Some(true) || more == 0 || self.more.insert((block, tier.0), more).is_some()
            {
                return refuse("copies of a block");
            }
            self.repeated += 1;
        }
        Ok(())
    }

    fn restore_joints(&mut self, joints: &[Completed], out: Shared<'_>) -> Result<(), ImageError> {
        for joint in joints {
            let Some(block) = self.spots.get(&joint.key).map(|spot| spot.block) else {
                return refuse("a joint that lies nowhere");
            };
            if self.joints.join(joint.clone()) {
                self.pin(joint.key, block, out);
            }
        }
        Ok(())
    }

    fn restore_entry(&mut self, image: &EntryImage, out: Shared<'_>) -> Result<(), ImageError> {
        let at = image.at;
        let mut seen = 0u32;
        for &(tier, count) in &image.counts {
            if usize::from(tier.0) >= TierTable::MAX || count == 0 || seen >> tier.0 & 1 == 1 {
                return refuse("counts of a key");
            }
            seen |= 1 << tier.0;
        }
        let known =
            self.entries.contains_key(&at) || (at.1 == 0 && self.find_plain(at.0, out).is_some());
        if known || image.counts.is_empty() || !self.has_part(at.1) {
            return refuse("a key that is not plain");
        }
        let place = image.place.as_ref().map(|place| self.resolve(place)).transpose()?;
        for &(tier, count) in &image.counts {
            self.by_tier[usize::from(tier.0)] += 1;
            self.repeated += u64::from(count > 1);
        }
        let counts: Counts = image.counts.clone();
        self.entries.insert(at, Entry { counts, place: None });
        if let Some(place) = place {
            self.lay(at, place, None, out);
        }
        Ok(())
    }

    /// The place with the number of its block in this index.
    fn resolve(&self, place: &Place) -> Result<Place, ImageError> {
        let size = self.spec.scheme.block_size();
        let mut place = place.clone();
        let end = place.end.checked_add(size);
        let tail = place.odd.as_ref().map_or(0, |odd| odd.rest.tokens.len());
        let simple = place.odd.is_some()
            || (place.at.is_some() && place.start.checked_add(size) == Some(place.end));
        let begins = place.at.is_some() == (place.end >= size);
        if end.is_none()
            || place.start >= place.end
            || tail != (place.end % size) as usize
            || !simple
            || !begins
        {
            return refuse("where a key lies");
        }
        if place.at.is_some() {
            let Some(spot) = self.spots.get(&place.key) else {
                return refuse("a block that lies nowhere");
            };
            place.at = Some(spot.block);
        }
        if place.whole().iter().any(|key| !self.spots.contains_key(key)) {
            return refuse("a block that lies nowhere");
        }
        Ok(place)
    }

    fn restore_orphan(&mut self, parent: EngineKey, orphan: &Orphan) -> Result<(), ImageError> {
        let tokens = orphan.keys.len().checked_mul(orphan.block_size);
        let extras = orphan.extras.len();
        if orphan.block_size == 0
            || tokens != Some(orphan.tokens.len())
            || (extras != 0 && extras != orphan.keys.len())
            || !self.has_part(orphan.part)
        {
            return refuse("a store that waits");
        }
        // A buffer that has become smaller drops the rest, as if it had been full.
        self.orphans.push(parent, orphan.clone());
        Ok(())
    }

    pub(crate) fn spec(&self) -> &crate::index::PodSpec {
        &self.spec
    }
}
