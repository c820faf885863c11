//! The requests behind a long stream, inferred from it batch by batch while they are played into a cache.
//!
//! What the stream says: a store is a request's allocation, or one more block of a request that grows;
//! its parent says what was hit. What it does not say is inferred:
//!
//! * *Is there a block behind the last full one?* Blocks without a hash are given out first, so a removal
//!   shows that there was none left: removals + free blocks without a hash = blocks taken.
//! * *Who has no full block?* A removal too many is the only block of such a request. If it fills that
//!   block later, the store's parent says what it had hit.
//! * *When did a request end?* Requests come in waves, and a wave ends before the next one begins, except
//!   for those whose blocks are removed after blocks of the next one.
//! * *In which order?* That of the removals of their blocks.
//!
//! None of this says which block is evicted, or what a lookup finds. That is the cache's own doing, and
//! what is compared.

use std::collections::HashMap;

use super::{
    super::{Cache, CacheOptions, Fault, Hits, Sequence},
    recorded::{Stored, Stream, Told},
    script::cache,
};
use crate::{loadgen::engine::sequence::Identity, wire::encode::Event};

/// A token that is in no recording.
const MADE_UP: u32 = 1 << 30;
/// Batches that are looked ahead at most.
const AHEAD: usize = 60;

struct Live {
    id: u64,
    /// Full blocks, hits included.
    blocks: Vec<usize>,
    /// Those that it announced.
    own: Vec<usize>,
    /// Is there a block behind them?
    tail: bool,
    /// Had it no full block of its own when it began?
    hidden: bool,
    /// Batches in which its wave began and in which it last announced something.
    wave: usize,
    last: usize,
}

/// What is known of a stream before it is played.
struct Foresight<'a> {
    stream: &'a Stream,
    parents: HashMap<usize, usize>,
    /// Of each block: number of the removal, batch.
    removals: HashMap<usize, Vec<(usize, usize)>>,
    /// Of each block: batches in which a new request hit it.
    hits: HashMap<usize, Vec<usize>>,
    clears: Vec<usize>,
}

impl<'a> Foresight<'a> {
    fn new(stream: &'a Stream) -> Self {
        let mut it = Self {
            stream,
            parents: HashMap::new(),
            removals: HashMap::new(),
            hits: HashMap::new(),
            clears: Vec::new(),
        };
        let mut removed = 0;
        for (at, batch) in stream.batches.iter().enumerate() {
            for told in batch {
                match told {
                    Told::Cleared => it.clears.push(at),
                    Told::Removed(block) => {
                        it.removals.entry(*block).or_default().push((removed, at));
                        removed += 1;
                    }
                    Told::Stored(stored) => {
                        let mut parent = stored.parent;
                        for block in &stored.blocks {
                            if let Some(parent) = parent {
                                it.parents.entry(*block).or_insert(parent);
                            }
                            parent = Some(*block);
                        }
                    }
                }
            }
        }
        for (at, batch) in stream.batches.iter().enumerate() {
            for parent in stores(batch).filter_map(|stored| stored.parent) {
                for block in it.chain(parent) {
                    it.hits.entry(block).or_default().push(at);
                }
            }
        }
        it
    }

    /// The blocks up to this one.
    fn chain(&self, last: usize) -> Vec<usize> {
        let mut chain: Vec<usize> =
            std::iter::successors(Some(last), |block| self.parents.get(block).copied()).collect();
        chain.reverse();
        chain
    }

    fn life(&self, batch: usize) -> usize {
        self.clears.iter().filter(|clear| **clear < batch).count()
    }

    /// The next removal of a block after a batch, in the same life.
    fn removal(&self, block: usize, after: usize) -> Option<(usize, usize)> {
        let next = self.removals.get(&block)?.iter().find(|(_, at)| *at >= after)?;
        (self.life(next.1) == self.life(after)).then_some(*next)
    }

    /// When the first of its blocks was removed; never comes last.
    fn key(&self, it: &Live) -> usize {
        let keys = it.own.iter().filter_map(|block| self.removal(*block, it.last));
        keys.map(|(number, _)| number).min().unwrap_or(usize::MAX)
    }

    /// The same of blocks that nobody hit in between.
    fn sure_key(&self, it: &Live) -> Option<usize> {
        let untouched = |block: &usize| {
            let (number, at) = self.removal(*block, it.last)?;
            let hits = self.hits.get(block).map_or(&[][..], Vec::as_slice);
            (!hits.iter().any(|hit| it.last < *hit && *hit <= at)).then_some(number)
        };
        it.own.iter().filter_map(untouched).min()
    }

    /// Parents of single blocks stored later in this wave by none of those with these last blocks; and
    /// does any of them grow?
    fn strangers(&self, after: usize, mut last: Vec<usize>) -> (Vec<Option<usize>>, bool) {
        let (mut strangers, mut grows) = (Vec::new(), false);
        for batch in self.stream.batches.iter().skip(after + 1).take(AHEAD) {
            let ends = |told: &Told| match told {
                Told::Cleared => true,
                Told::Stored(stored) => stored.blocks.len() > 1,
                Told::Removed(_) => false,
            };
            if batch.iter().any(ends) {
                break;
            }
            for stored in stores(batch) {
                match last.iter_mut().find(|block| Some(**block) == stored.parent) {
                    Some(block) => (*block, grows) = (stored.blocks[0], true),
                    None => strangers.push(stored.parent),
                }
            }
        }
        (strangers, grows)
    }
}

fn stores(batch: &[Told]) -> impl Iterator<Item = &Stored> {
    batch.iter().filter_map(|told| match told {
        Told::Stored(stored) => Some(stored),
        _ => None,
    })
}

struct Player<'a> {
    known: Foresight<'a>,
    options: CacheOptions,
    cache: Cache,
    live: Vec<Live>,
    next: u64,
    at: usize,
}

/// Plays a stream; returns the cache's batches.
pub(super) fn play(
    stream: &Stream,
    options: CacheOptions,
    fault: Fault,
) -> Result<Vec<Vec<Event>>, String> {
    let known = Foresight::new(stream);
    let cache = cache(options, fault);
    let mut player = Player { known, options, cache, live: Vec::new(), next: 0, at: 0 };
    let mut batches = Vec::new();
    for (at, batch) in stream.batches.iter().enumerate() {
        player.at = at;
        player.batch(batch).map_err(|error| format!("batch {at}: {error}"))?;
        batches.push(player.cache.take_events());
    }
    Ok(batches)
}

impl Player<'_> {
    fn batch(&mut self, batch: &[Told]) -> Result<(), String> {
        let prefill = stores(batch).any(|stored| stored.blocks.len() > 1);
        let mut hidden_wave = false;
        let mut rest = batch;
        while !rest.is_empty() {
            let removed = rest.iter().take_while(|told| matches!(told, Told::Removed(_))).count();
            let told = rest.get(removed);
            rest = rest.get(removed + 1..).unwrap_or_default();
            match told {
                Some(Told::Cleared) => {
                    self.end_all();
                    self.cache.reset();
                }
                Some(Told::Stored(stored)) if prefill => self.begin(batch, stored, removed)?,
                Some(Told::Stored(stored)) => {
                    if let Some(grows) = self.live.iter().position(|it| continues(it, stored)) {
                        self.pops(removed, Some(grows), &mut hidden_wave)?;
                        // A wave that ended meanwhile has taken it along.
                        let grows = self.live.iter().position(|it| continues(it, stored));
                        self.grow(grows.ok_or("who grows has ended")?, stored)?;
                    } else if removed == 0 && self.is_late(stored) {
                        self.appear(stored)?;
                    } else {
                        self.begin(batch, stored, removed)?;
                    }
                }
                _ if prefill => self.hidden(removed, Vec::new())?,
                _ => self.pops(removed, None, &mut hidden_wave)?,
            }
        }
        Ok(())
    }

    /// A new request with full blocks of its own.
    fn begin(&mut self, batch: &[Told], stored: &Stored, removed: usize) -> Result<(), String> {
        if self.live.iter().any(|it| it.wave != self.at) {
            self.end_wave(batch);
        }
        let hits = stored.parent.map(|parent| self.known.chain(parent)).unwrap_or_default();
        let full = stored.blocks.len();
        let free = self.unhashed();
        let mut tail = match removed {
            0 => usize::from(free > full),
            _ => (removed + free).checked_sub(full).ok_or("more blocks than were taken")?,
        };
        if tail > 1 {
            let stores = stores(batch).map(|stored| stored.blocks[stored.blocks.len() - 1]);
            self.hidden(tail - 1, stores.collect())?;
            tail = 1;
        }
        let blocks: Vec<usize> = hits.iter().chain(&stored.blocks).copied().collect();
        let tokens = full * self.options.block_size + tail;
        let (id, own) = (self.id(), stored.blocks.clone());
        self.allocate(id, &blocks, tail, hits.len(), tokens, Some(hits.len()))?;
        let (wave, last) = (self.at, self.at);
        let tail = tail == 1;
        self.live.push(Live { id, blocks, own, tail, hidden: false, wave, last });
        Ok(())
    }

    /// So many requests with a single block that is not full. `last`: blocks with which others of this
    /// batch end.
    fn hidden(&mut self, count: usize, mut last: Vec<usize>) -> Result<(), String> {
        last.extend(self.live.iter().filter_map(|it| it.blocks.last()));
        let (strangers, _) = self.known.strangers(self.at, last);
        let before = self.live.iter().filter(|it| it.hidden).count();
        for number in before..before + count {
            let parent = strangers.get(number).copied().flatten();
            let blocks = parent.map(|parent| self.known.chain(parent)).unwrap_or_default();
            let id = self.id();
            let hits = blocks.len();
            // If it is not cached any more, it was none of these.
            let blocks = if self.found(&blocks) == hits { blocks } else { Vec::new() };
            let hits = blocks.len();
            self.allocate(id, &blocks, 1, hits, 1, Some(hits))?;
            let (wave, last, own) = (self.at, self.at, Vec::new());
            self.live.push(Live { id, blocks, own, tail: true, hidden: true, wave, last });
        }
        Ok(())
    }

    /// Does a single block come from a request of this wave that had told nothing so far?
    fn is_late(&self, stored: &Stored) -> bool {
        if self.live.is_empty() {
            return false;
        }
        let last = self.live.iter().filter_map(|it| it.blocks.last().copied()).collect();
        let (_, grows) = self.known.strangers(self.at, last);
        let removal = self.known.removal(stored.blocks[0], self.at).map(|(number, _)| number);
        let keys = self.live.iter().map(|it| self.known.key(it)).filter(|key| *key < usize::MAX);
        let before = removal.zip(keys.max()).is_some_and(|(own, others)| own < others);
        grows || self.unhashed() == 0 || before
    }

    /// That request.
    fn appear(&mut self, stored: &Stored) -> Result<(), String> {
        let hits = stored.parent.map(|parent| self.known.chain(parent)).unwrap_or_default();
        let known =
            self.live.iter().position(|it| it.hidden && it.own.is_empty() && it.blocks == hits);
        if let Some(known) = known {
            return self.grow(known, stored);
        }
        let id = self.id();
        self.allocate(id, &hits, 1, hits.len(), 1, None)?;
        let (wave, last) = (self.live[0].wave, self.at);
        let (blocks, own) = (hits, Vec::new());
        self.live.push(Live { id, blocks, own, tail: true, hidden: true, wave, last });
        self.grow(self.live.len() - 1, stored)
    }

    fn grow(&mut self, at: usize, stored: &Stored) -> Result<(), String> {
        let (id, full, tail) = {
            let it = &self.live[at];
            (it.id, it.blocks.len(), usize::from(it.tail))
        };
        let mut blocks = self.live[at].blocks.clone();
        blocks.extend(&stored.blocks);
        let size = self.options.block_size;
        let computed = full * size + tail;
        self.compute(id, &blocks, 0, computed, size - tail)?;
        let it = &mut self.live[at];
        it.blocks = blocks;
        it.own.extend(&stored.blocks);
        (it.tail, it.last) = (false, self.at);
        Ok(())
    }

    /// So many requests take a block for their next token; `grows` is not one of them if there are
    /// others.
    fn pops(
        &mut self,
        removed: usize,
        grows: Option<usize>,
        hidden_wave: &mut bool,
    ) -> Result<(), String> {
        for _ in 0..removed {
            let without = |(at, it): (usize, &Live)| (!it.tail).then_some(at);
            let able: Vec<usize> = self.live.iter().enumerate().filter_map(without).collect();
            let other = able.iter().find(|at| Some(**at) != grows).or(able.first());
            if let Some(&at) = other.filter(|_| !*hidden_wave) {
                let (id, blocks) = (self.live[at].id, self.live[at].blocks.clone());
                self.compute(id, &blocks, 1, blocks.len() * self.options.block_size, 1)?;
                self.live[at].tail = true;
                continue;
            }
            // A wave in which nobody has a full block of its own.
            if !*hidden_wave {
                self.end_all();
                *hidden_wave = true;
            }
            self.hidden(self.unhashed() + 1, Vec::new())?;
        }
        Ok(())
    }

    /// Ends the wave, but for those whose blocks are removed after blocks of the next one.
    fn end_wave(&mut self, next: &[Told]) {
        let removed = stores(next)
            .flat_map(|stored| &stored.blocks)
            .filter_map(|block| {
                self.known.removals.get(block)?.iter().find(|(_, at)| *at >= self.at)
            })
            .map(|(number, _)| *number)
            .min()
            .unwrap_or(usize::MAX);
        let (mut ends, mut stays) = (Vec::new(), Vec::new());
        for mut it in std::mem::take(&mut self.live) {
            let later = self.known.sure_key(&it).is_some_and(|key| removed < key);
            if later || it.wave == self.at {
                it.wave = self.at;
                stays.push(it);
            } else {
                ends.push(it);
            }
        }
        self.end(ends);
        self.live = stays;
    }

    fn end_all(&mut self) {
        let all = std::mem::take(&mut self.live);
        self.end(all);
    }

    fn end(&mut self, mut ends: Vec<Live>) {
        ends.sort_by_key(|it| self.known.key(it));
        for it in ends {
            self.cache.free(it.id);
        }
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn sequence(&self, blocks: &[usize], made_up: usize) -> Sequence {
        let tokens = blocks.iter().flat_map(|block| &self.known.stream.tokens[*block]).copied();
        let tail = std::iter::repeat_n(MADE_UP, made_up);
        Sequence::new(tokens.chain(tail).collect(), Identity::default(), self.options.block_size)
    }

    /// Allocates a new request with this many hits, if a lookup finds as many as `expected`.
    fn allocate(
        &mut self,
        id: u64,
        blocks: &[usize],
        made_up: usize,
        hits: usize,
        tokens: usize,
        expected: Option<usize>,
    ) -> Result<(), String> {
        let sequence = self.sequence(blocks, made_up);
        let found = self.cache.lookup(&sequence);
        if expected.is_some_and(|expected| found.len() != expected) || found.len() < hits {
            return Err(format!("a lookup finds {} blocks, not {hits}", found.len()));
        }
        let computed = hits * self.options.block_size;
        self.cache
            .allocate(id, &sequence, &found.first(hits), computed, tokens)
            .map_err(|error| error.to_string())
    }

    fn compute(
        &mut self,
        id: u64,
        blocks: &[usize],
        made_up: usize,
        computed: usize,
        tokens: usize,
    ) -> Result<(), String> {
        let sequence = self.sequence(blocks, made_up);
        let allocated = self.cache.allocate(id, &sequence, &Hits::default(), computed, tokens);
        allocated.map_err(|error| error.to_string())
    }

    /// How many of these blocks a lookup finds.
    fn found(&self, blocks: &[usize]) -> usize {
        self.cache.lookup(&self.sequence(blocks, 1)).len()
    }

    /// Blocks without a hash in front of the free queue.
    fn unhashed(&self) -> usize {
        let cache = &self.cache;
        cache.free.iter().take_while(|block| cache.state(*block).hash.is_none()).count()
    }
}

/// Is this the next block of that request?
fn continues(it: &Live, stored: &Stored) -> bool {
    match it.blocks.last() {
        Some(last) => Some(*last) == stored.parent,
        None => stored.parent.is_none() && it.hidden,
    }
}
