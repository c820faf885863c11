//! Runs in memory: blocks that follow one another, stored once, and who holds them.
//!
//! # Layout
//!
//! A request key names its whole prefix, so each key lies in one place at most: at some offset of
//! one run. A run's keys are consecutive words of the block storage; beside each lies the engine
//! key with which it was first stored. What follows a run's block is the next block of the run, or
//! the first block of another run, which [`heads`](super::heads) finds by its key. Runs do not
//! know one another: a prompt that leaves a run halfway cuts nothing.
//!
//! ```text
//! heads   key of first block ─▶ run
//! header  version │ base, length │ first key │ last key │ room, position │ lines │ set or lines
//! blocks  [ key key key … ]   [ engine key … ]          owner: grain ─▶ run
//! words   lists of lines, bitmaps, sets
//! ```
//!
//! Many rows that hold all of a run are members of its *set*, a bitset of seats; everybody else
//! has a [line](super::cover) in the run's list (the first two are in the header itself).
//!
//! # Invariants
//!
//! * A key is created only while the run of its predecessor is locked, or together with it, and
//!   only where no run begins with it: so never twice.
//! * A run's last block is in some line or in the set; a run without lines is freed.
//! * Blocks never move while anybody holds them: ledgers keep their numbers.
//!
//! # Concurrency
//!
//! A header's version guards everything of its run ([`seqlock`]). Storage is
//! chunked; chunks appear and go by swapping the [`Snapshot`].

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
};

use arc_swap::{ArcSwap, Guard};
use smallvec::SmallVec;

use super::{
    cover::{Line, LineId, Seat, Word, leading},
    heads::{self, Load, SHARDS, Table},
    lock, seqlock,
    space::{GRAINS, Space, Taken},
    view::View,
};
use crate::{
    index::{ledger::Part, slots::ones},
    model::{EngineKey, RequestKey},
};

/// Number of a block in the storage, stable while somebody holds the block.
pub(crate) type Block = u32;
/// Number of a run.
pub(crate) type RunId = u32;

/// Blocks, or words, per grain.
const GRAIN: u32 = 4;
/// Blocks, or words, per chunk.
const CHUNK: u32 = GRAINS * GRAIN;
/// Headers per chunk.
const HEADERS: usize = 1 << 12;
/// Blocks of a run at most.
const LONGEST: u32 = 1 << 12;
/// A set begins with more full rows than this.
const FEW: usize = 8;
/// Part of lines that only keep blocks where they are; lookups do not see it.
pub(crate) const PIN: Part = Part::MAX;
/// Part of lines that speculative marks make; only mark seats have them, and nothing else.
pub(crate) const MARK: Part = Part::MAX - 1;

/// Words of a header.
const HEADER: usize = 8;
const VERSION: usize = 0;
/// First block number, and length in blocks.
const SPAN: usize = 1;
const FIRST: usize = 2;
const LAST: usize = 3;
/// Blocks that fit, and number of the first block in its prompt.
const ROOM: usize = 4;
/// Number of lines, and where they are.
const LINES: usize = 5;
/// Set: where it is, and its words. Or the first line.
const SET: usize = 6;
/// Lines that fit into the header.
const INLINE: u32 = 2;
const NOWHERE: u32 = u32::MAX;

fn pack(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn split(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

type Words = Arc<[AtomicU64]>;

fn zeros(count: usize) -> Words {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

/// What readers hold on to during a lookup.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// A chunk's keys, and behind them its engine keys.
    blocks: Vec<Option<Words>>,
    owners: Vec<Option<Arc<[AtomicU32]>>>,
    words: Vec<Option<Words>>,
    headers: Vec<Words>,
    heads: Vec<Arc<Table>>,
    pub(super) view: Arc<View>,
}

impl Snapshot {
    /// The key of a block that is held, and its number in its prompt; absent when the chunk is
    /// newer than the snapshot.
    pub(crate) fn describe(&self, block: Block) -> Option<(RequestKey, u32)> {
        let key = self.key(block)?.load(Ordering::Relaxed);
        let header = self.header(self.run_of(block)?)?;
        let base = split(header[SPAN].load(Ordering::Relaxed)).0;
        let first = split(header[ROOM].load(Ordering::Relaxed)).1;
        Some((RequestKey(key), first + (block - base)))
    }

    /// The run of a block that is held, and that run's first block.
    pub(crate) fn place_of(&self, block: Block) -> Option<(RunId, Block)> {
        let run = self.run_of(block)?;
        Some((run, split(self.header(run)?[SPAN].load(Ordering::Relaxed)).0))
    }

    fn header(&self, run: RunId) -> Option<&[AtomicU64]> {
        let chunk = self.headers.get(run as usize / HEADERS)?;
        chunk.get(run as usize % HEADERS * HEADER..)?.get(..HEADER)
    }

    fn key(&self, block: Block) -> Option<&AtomicU64> {
        self.keys(block, 1)?.first()
    }

    /// The engine keys beside blocks of one run; absent when the chunk is newer than the snapshot.
    pub(crate) fn engine_keys(&self, first: Block, count: u32) -> Option<&[AtomicU64]> {
        let chunk = self.blocks.get((first / CHUNK) as usize)?.as_ref()?;
        chunk.get((CHUNK + first % CHUNK) as usize..)?.get(..count as usize)
    }

    fn keys(&self, base: Block, length: u32) -> Option<&[AtomicU64]> {
        let chunk = self.blocks.get((base / CHUNK) as usize)?.as_ref()?;
        chunk.get((base % CHUNK) as usize..)?.get(..length as usize)
    }

    /// The engine key beside a block; absent when the chunk is newer than the snapshot.
    pub(crate) fn engine_key(&self, block: Block) -> Option<EngineKey> {
        let key = self.engine_keys(block, 1)?.first()?;
        Some(EngineKey(key.load(Ordering::Relaxed)))
    }

    /// The run of a block that is held; absent when the chunk is newer than the snapshot.
    pub(crate) fn run_of(&self, block: Block) -> Option<RunId> {
        self.owner(block).map(|owner| owner.load(Ordering::Relaxed))
    }

    fn owner(&self, block: Block) -> Option<&AtomicU32> {
        let chunk = self.owners.get((block / CHUNK) as usize)?.as_ref()?;
        chunk.get((block % CHUNK / GRAIN) as usize)
    }

    fn words(&self, address: u32) -> Option<&[AtomicU64]> {
        let chunk = self.words.get((address / CHUNK) as usize)?.as_ref()?;
        chunk.get((address % CHUNK) as usize..)
    }

    /// How many leading keys, the first one included, may follow one another in a run that nobody
    /// has yet: up to the next one that is the first of another run.
    fn strangers(&self, keys: &[RequestKey]) -> usize {
        let known = keys.iter().skip(1).position(|&key| self.head(key).is_some());
        known.map_or(keys.len(), |at| at + 1)
    }

    /// The run that begins with `key`, as far as its header tells at this moment.
    fn head(&self, key: RequestKey) -> Option<RunId> {
        let (shard, tag) = heads::place(key);
        self.heads[shard].candidates(tag).find(|&run| {
            self.header(run).is_some_and(|header| {
                header[FIRST].load(Ordering::Relaxed) == key.0
                    && split(header[SPAN].load(Ordering::Relaxed)).1 > 0
            })
        })
    }
}

/// How far a run goes along with the keys asked for, and where it was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    header: &'a [AtomicU64],
    version: u64,
    /// Leading blocks of the run that are the leading keys asked for, at least 1.
    pub(super) common: u32,
}

/// The snapshot is older than what was read: chunks have been added since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outdated;

/// A set and a list of lines, as a reader sees them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holders<'a> {
    pub(super) set: &'a [AtomicU64],
    pub(super) lines: &'a [AtomicU64],
}

impl<'a> Holders<'a> {
    /// The lines of held blocks and those of marked ones, which come last.
    pub(super) fn split(&self) -> (&'a [AtomicU64], &'a [AtomicU64]) {
        let is_mark = |line: &AtomicU64| line.load(Ordering::Relaxed) >> 63 != 0;
        let marks = self.lines.iter().rev().take_while(|line| is_mark(line)).count();
        self.lines.split_at(self.lines.len() - marks)
    }

    pub(super) fn is_member(&self, seat: Seat) -> bool {
        let word = self.set.get(usize::from(seat) / 64);
        word.is_some_and(|set| set.load(Ordering::Relaxed) >> (seat % 64) & 1 == 1)
    }
}

impl Snapshot {
    /// Begins to read the run that begins with `keys[0]`.
    pub(super) fn find(&self, keys: &[RequestKey]) -> Result<Option<Found<'_>>, Outdated> {
        let Some(&first) = keys.first() else { return Ok(None) };
        let (shard, tag) = heads::place(first);
        for run in self.heads[shard].candidates(tag) {
            let header = self.header(run).ok_or(Outdated)?;
            loop {
                let version = seqlock::begin(&header[VERSION]);
                let (base, length) = split(header[SPAN].load(Ordering::Relaxed));
                let is_it = header[FIRST].load(Ordering::Relaxed) == first.0 && length > 0;
                if !is_it {
                    if seqlock::unchanged(&header[VERSION], version) {
                        break;
                    }
                    continue;
                }
                let last = header[LAST].load(Ordering::Relaxed);
                let common = match keys.get(length as usize - 1) {
                    Some(key) if key.0 == last => Some(length),
                    _ => self.keys(base, length).map(|run| common(run, keys)),
                };
                match common {
                    Some(common) => return Ok(Some(Found { header, version, common })),
                    None if seqlock::unchanged(&header[VERSION], version) => return Err(Outdated),
                    None => {}
                }
            }
        }
        Ok(None)
    }

    /// Who holds blocks of it.
    pub(super) fn holders<'a>(&'a self, found: &Found<'a>) -> Option<Holders<'a>> {
        let (count, address) = split(found.header[LINES].load(Ordering::Relaxed));
        if address == NOWHERE {
            let lines = found.header.get(SET..SET + count as usize)?;
            return Some(Holders { set: &[], lines });
        }
        let lines = self.words(address)?.get(1..)?.get(..count as usize)?;
        let (set, width) = split(found.header[SET].load(Ordering::Relaxed));
        let set = if width == 0 { &[] } else { self.words(set)?.get(..width as usize)? };
        Some(Holders { set, lines })
    }

    /// Leading blocks of a bitmap, and its words.
    pub(super) fn bitmap(&self, address: u32) -> Option<(u32, &[AtomicU64])> {
        let words = self.words(address)?;
        let (count, leading) = split(words.first()?.load(Ordering::Relaxed));
        Some((leading, words.get(1..)?.get(..count as usize)?))
    }

    /// Does everything that was read since [`find`](Self::find) belong together?
    pub(super) fn is_consistent(found: &Found<'_>) -> bool {
        seqlock::unchanged(&found.header[VERSION], found.version)
    }
}

impl Snapshot {
    /// The seats that hold `keys[block]` in any part and tier.
    pub(super) fn holders_of(
        &self,
        keys: &[RequestKey],
        block: usize,
    ) -> Result<Vec<Seat>, Outdated> {
        let mut at = 0;
        while at <= block.min(keys.len()) {
            let Some(found) = self.find(&keys[at.min(keys.len())..])? else {
                at += 1;
                continue;
            };
            let common = found.common as usize;
            if at + common <= block {
                at += common;
                continue;
            }
            let read = || {
                let holders = self.holders(&found)?;
                let offset = (block - at) as u32;
                let mut seats: Vec<Seat> = Vec::new();
                for (word, set) in holders.set.iter().enumerate() {
                    let bits = [set.load(Ordering::Relaxed)];
                    seats.extend(ones(&bits).map(|bit| (word as u32 * 64 + bit.0) as Seat));
                }
                for line in holders.lines {
                    let line = Word(line.load(Ordering::Relaxed));
                    let held = match line.value() {
                        Ok((from, to)) => (from..to).contains(&offset),
                        Err(address) => {
                            let bits = self.bitmap(address)?.1;
                            bits.get(offset as usize / 64).is_some_and(|word| {
                                word.load(Ordering::Relaxed) >> (offset % 64) & 1 == 1
                            })
                        }
                    };
                    if held && line.id().part() < MARK {
                        seats.push(line.id().seat());
                    }
                }
                Some(seats)
            };
            match read() {
                Some(seats) if Self::is_consistent(&found) => return Ok(seats),
                None if Self::is_consistent(&found) => return Err(Outdated),
                _ => {}
            }
        }
        Ok(Vec::new())
    }
}

/// How many leading blocks of a run are the leading keys. Keys are chained: where two are equal,
/// so is everything before, and the end can be searched for.
fn common(run: &[AtomicU64], keys: &[RequestKey]) -> u32 {
    let most = run.len().min(keys.len());
    let same = |at: usize| run[at].load(Ordering::Relaxed) == keys[at].0;
    if most == 0 || same(most - 1) {
        return most as u32;
    }
    let (mut low, mut high) = (0, most - 1);
    while low < high {
        let middle = usize::midpoint(low, high);
        if same(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low as u32
}

/// A snapshot that a writer goes on using while it is the newest one: a look at the count of
/// changes costs less than another snapshot.
pub(crate) struct Look {
    snapshot: Guard<Arc<Snapshot>>,
    changes: u64,
}

impl Deref for Look {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Runs {
    snapshot: ArcSwap<Snapshot>,
    /// Snapshots before the newest one.
    changes: AtomicU64,
    /// Serializes changes of the snapshot.
    changing: Mutex<()>,
    blocks: Mutex<Space>,
    words: Mutex<Space>,
    free: Mutex<Free>,
    heads: [Mutex<Load>; SHARDS],
    /// Changes before a chunk comes into use where an older one was.
    moment: AtomicU64,
}

/// Numbers of runs that are not in use.
#[derive(Debug, Default)]
struct Free {
    freed: Vec<RunId>,
    /// Never used yet from here on.
    next: RunId,
}

/// A row of blocks to be laid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path<'a> {
    /// The block before the first one; absent at the start of a prompt.
    pub(crate) after: Option<Block>,
    /// Number of the first block in its prompt.
    pub(crate) position: u32,
    pub(crate) keys: &'a [RequestKey],
    /// Absent: nobody has named the blocks.
    pub(crate) engine: Option<&'a [EngineKey]>,
}

/// Blocks of a path that lie one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) first: Block,
    pub(crate) count: u32,
}

impl Runs {
    pub(super) fn new() -> Self {
        let snapshot = Snapshot {
            blocks: Vec::new(),
            owners: Vec::new(),
            words: Vec::new(),
            headers: Vec::new(),
            heads: (0..SHARDS).map(|_| Arc::new(Table::new(8))).collect(),
            view: Arc::default(),
        };
        Self {
            snapshot: ArcSwap::from_pointee(snapshot),
            changes: AtomicU64::new(0),
            changing: Mutex::default(),
            blocks: Mutex::default(),
            words: Mutex::default(),
            free: Mutex::default(),
            heads: std::array::from_fn(|_| Mutex::default()),
            moment: AtomicU64::new(0),
        }
    }

    pub(crate) fn load(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    pub(crate) fn look(&self) -> Look {
        // In this order the snapshot is as new as the count says, or newer.
        let changes = self.changes.load(Ordering::Acquire);
        Look { changes, snapshot: self.load() }
    }

    /// Makes it the newest snapshot.
    pub(crate) fn refresh(&self, look: &mut Look) {
        if self.changes.load(Ordering::Acquire) != look.changes {
            *look = self.look();
        }
    }

    /// Equal moments: an older snapshot has no chunk in whose place there is another one by now.
    pub(super) fn moment(&self) -> u64 {
        self.moment.load(Ordering::SeqCst)
    }

    /// Swaps the snapshot for a changed one.
    pub(super) fn replace(&self, change: impl FnOnce(&mut Snapshot)) {
        let _changing = lock(&self.changing);
        let mut snapshot = Snapshot::clone(&self.snapshot.load());
        change(&mut snapshot);
        self.snapshot.store(Arc::new(snapshot));
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Distinct keys. Costs a look at every run.
    pub(super) fn keys(&self) -> u64 {
        let snapshot = self.load();
        let headers = snapshot.headers.iter().flat_map(|chunk| chunk.chunks_exact(HEADER));
        headers.map(|header| u64::from(split(header[SPAN].load(Ordering::Relaxed)).1)).sum()
    }

    /// Bytes in use, without the rows' own maps.
    pub(super) fn bytes(&self) -> u64 {
        let snapshot = self.load();
        let heads: u64 = snapshot.heads.iter().map(|table| table.bytes()).sum();
        let runs = {
            let free = lock(&self.free);
            u64::from(free.next) - free.freed.len() as u64
        };
        let grains = lock(&self.blocks).taken();
        let words = lock(&self.words).taken();
        grains * u64::from(16 * GRAIN + 4)
            + words * u64::from(8 * GRAIN)
            + runs * (HEADER * 8) as u64
            + if runs == 0 { 0 } else { heads }
    }

    /// Where the blocks of a prompt lie that somebody holds, as far as is known at this moment.
    pub(crate) fn trace(&self, keys: &[RequestKey]) -> Vec<(RequestKey, Block)> {
        let mut blocks = Vec::new();
        let mut at = 0;
        let mut snapshot = self.load();
        while at < keys.len() {
            match snapshot.find(&keys[at..]) {
                Ok(Some(found)) => {
                    let base = split(found.header[SPAN].load(Ordering::Relaxed)).0;
                    if Snapshot::is_consistent(&found) {
                        let run = &keys[at..at + found.common as usize];
                        blocks.extend(run.iter().copied().zip(base..));
                        at += run.len();
                    }
                }
                Ok(None) => at += 1,
                Err(Outdated) => snapshot = self.load(),
            }
        }
        blocks
    }

    /// Changes what a row holds of one block, which somebody of the row's holds or pins. `change`
    /// gets the line and the block's offset.
    pub(crate) fn change<T>(
        &self,
        block: Block,
        id: LineId,
        change: impl FnOnce(&mut Line, u32) -> T,
    ) -> Option<T> {
        self.with(block, |run, at| {
            let before = run.load(id);
            let mut line = before.clone();
            let result = change(&mut line, at);
            if line != before {
                run.save(id, &line);
            }
            result
        })
    }

    pub(crate) fn owner(&self, block: Block) -> RunId {
        self.load().owner(block).map_or(NOWHERE, |owner| owner.load(Ordering::Relaxed))
    }

    fn take_words(&self, count: u32) -> u32 {
        let mut words = lock(&self.words);
        let Taken { grain, chunk_is_new } = words.take(count.div_ceil(GRAIN));
        if chunk_is_new {
            // Under the lock: whoever gets the next grain finds its chunk.
            let chunk = zeros(CHUNK as usize);
            self.replace(|snapshot| put(&mut snapshot.words, grain / GRAINS, chunk));
            self.moment.fetch_add(1, Ordering::SeqCst);
        }
        taken_over();
        grain * GRAIN
    }

    fn give_words(&self, address: u32, count: u32) {
        let mut words = lock(&self.words);
        if let Some(chunk) = words.give(address / GRAIN, count.div_ceil(GRAIN)) {
            self.replace(|snapshot| drop_chunk(&mut snapshot.words, chunk));
        }
    }

    fn take_blocks(&self, count: u32) -> Block {
        let mut blocks = lock(&self.blocks);
        let Taken { grain, chunk_is_new } = blocks.take(count.div_ceil(GRAIN));
        if chunk_is_new {
            let chunk = zeros(2 * CHUNK as usize);
            let owners = (0..GRAINS).map(|_| AtomicU32::new(NOWHERE)).collect();
            self.replace(|snapshot| {
                put(&mut snapshot.owners, grain / GRAINS, owners);
                put(&mut snapshot.blocks, grain / GRAINS, chunk);
            });
            self.moment.fetch_add(1, Ordering::SeqCst);
        }
        taken_over();
        grain * GRAIN
    }

    fn give_blocks(&self, block: Block, grains: u32) {
        let mut blocks = lock(&self.blocks);
        if let Some(chunk) = blocks.give(block / GRAIN, grains) {
            self.replace(|snapshot| {
                drop_chunk(&mut snapshot.blocks, chunk);
                drop_chunk(&mut snapshot.owners, chunk);
            });
        }
    }

    fn take_run(&self) -> RunId {
        let mut free = lock(&self.free);
        if let Some(run) = free.freed.pop() {
            return run;
        }
        let run = free.next;
        free.next += 1;
        if (run as usize).is_multiple_of(HEADERS) {
            let chunk = zeros(HEADERS * HEADER);
            self.replace(|snapshot| snapshot.headers.push(chunk));
        }
        run
    }

    fn locked(&self, run: RunId) -> Option<Locked<'_>> {
        self.locked_in(self.look(), run)
    }

    fn locked_in(&self, mut look: Look, run: RunId) -> Option<Locked<'_>> {
        let version = seqlock::lock(&look.header(run)?[VERSION]);
        // Only now: who had the turn before may have put lines into a new chunk.
        self.refresh(&mut look);
        Some(Locked { runs: self, look, run, version, freed: false })
    }

    /// Locks the run of a block that the caller's row holds.
    fn locked_owner(&self, block: Block) -> Option<Locked<'_>> {
        let look = self.look();
        // The owner cannot change while the block is held.
        let run = look.run_of(block)?;
        self.locked_in(look, run)
    }

    /// Makes sure that every key of a path lies somewhere. `cover` is called for each segment,
    /// under its run's lock, and makes somebody hold it; when it returns `false`, the rest of the
    /// path is left alone. Returns the keys laid.
    pub(crate) fn lay(
        &self,
        path: &Path<'_>,
        seat: Seat,
        mut cover: impl FnMut(&mut Locked<'_>, u32, u32) -> bool,
        segments: &mut SmallVec<[Segment; 4]>,
    ) -> usize {
        let (mut after, mut done) = (path.after, 0);
        let mut look = None;
        while let Some(&key) = path.keys.get(done) {
            let rest = &path.keys[done..];
            let engine = path.engine.map(|engine| &engine[done..]);
            let mut parent = None;
            if let Some(block) = after {
                parent = self.locked_owner(block);
                if parent.is_none() {
                    return done;
                }
            }
            let offset = match (&parent, after) {
                (Some(run), Some(block)) => block + 1 - run.base(),
                _ => 0,
            };
            let found = match &mut parent {
                Some(run) if offset < run.length() && run.key(offset) == key => {
                    let count = run.common(offset, rest);
                    parent.take().map(|run| (run, offset, count))
                }
                _ => None,
            };
            let (mut run, offset, count) = if let Some(found) = found {
                found
            } else if let Some(child) = self.newest(&mut parent, &mut look).head(key) {
                drop(parent);
                let Some(run) = self.locked(child) else { continue };
                if run.get(FIRST) != key.0 || run.length() == 0 {
                    continue;
                }
                let count = run.common(0, rest);
                (run, 0, count)
            } else {
                // The parent stays locked until the key is somewhere: nobody else may create it.
                // A later key may be the first of a run that has outlived the block before it.
                let rest = &rest[..self.newest(&mut parent, &mut look).strangers(rest)];
                let appended = match &mut parent {
                    Some(run) if offset == run.length() => run.append(seat, rest, engine),
                    _ => 0,
                };
                match parent.take_if(|_| appended > 0) {
                    Some(run) => (run, offset, appended),
                    None => {
                        let mut run = self.new_run(path.position + done as u32, rest, engine);
                        if !self.publish(&mut run, key) {
                            continue;
                        }
                        let count = run.length();
                        (run, 0, count)
                    }
                }
            };
            let first = run.base() + offset;
            let goes_on = cover(&mut run, offset, offset + count);
            run.trim();
            if !goes_on {
                return done;
            }
            segments.push(Segment { first, count });
            done += count as usize;
            after = Some(first + count - 1);
        }
        done
    }

    /// The newest snapshot: what a locked run looks at, or `own`.
    fn newest<'l>(
        &self,
        run: &'l mut Option<Locked<'_>>,
        own: &'l mut Option<Look>,
    ) -> &'l Snapshot {
        let look = match run {
            Some(run) => &mut run.look,
            None => own.get_or_insert_with(|| self.look()),
        };
        self.refresh(look);
        look
    }

    /// A run of as many of the keys as fit. It is locked and nobody can find it yet.
    fn new_run(
        &self,
        position: u32,
        keys: &[RequestKey],
        engine: Option<&[EngineKey]>,
    ) -> Locked<'_> {
        let count = (keys.len() as u32).min(LONGEST);
        let base = self.take_blocks(count);
        let run = self.take_run();
        let mut look = self.look();
        // A number is published with its chunk, so the header is there.
        let version = look.header(run).map_or(0, |header| seqlock::lock(&header[VERSION]));
        self.refresh(&mut look);
        let locked = Locked { runs: self, look, run, version, freed: false };
        let room = count.div_ceil(GRAIN) * GRAIN;
        locked.put(SPAN, pack(base, 0));
        locked.put(ROOM, pack(room, position));
        locked.put(LINES, pack(0, NOWHERE));
        locked.put(SET, 0);
        locked.put(FIRST, keys.first().map_or(0, |key| key.0));
        locked.own(base, room);
        locked.write(0, &keys[..count as usize], engine);
        locked
    }

    /// Lets readers find a new run; `false` when another one begins with the same key.
    fn publish(&self, run: &mut Locked<'_>, key: RequestKey) -> bool {
        let (shard, tag) = heads::place(key);
        let mut load = lock(&self.heads[shard]);
        run.refresh();
        if run.look.head(key).is_some_and(|other| other != run.run) {
            drop(load);
            run.free(false);
            return false;
        }
        let new = load.insert(&run.look.heads[shard], tag, run.run);
        if let Some(table) = new {
            self.replace(|snapshot| snapshot.heads[shard] = Arc::new(table));
        }
        true
    }

    fn unpublish(&self, run: RunId, key: RequestKey) {
        let (shard, tag) = heads::place(key);
        let mut load = lock(&self.heads[shard]);
        load.remove(&self.load().heads[shard], tag, run);
    }

    /// Runs `change` on the run of a block that the caller's row holds.
    pub(crate) fn with<T>(
        &self,
        block: Block,
        change: impl FnOnce(&mut Locked<'_>, u32) -> T,
    ) -> Option<T> {
        let mut run = self.locked_owner(block)?;
        let offset = block - run.base();
        let result = change(&mut run, offset);
        run.trim();
        Some(result)
    }

    /// Takes every line of a seat out of a run.
    pub(crate) fn sweep(&self, run: RunId, seat: Seat) {
        let Some(mut run) = self.locked(run) else { return };
        if run.length() > 0 {
            run.sweep(seat);
            run.trim();
        }
    }
}

/// What is written from now on into storage that was another run's: a reader of that run who sees
/// it sees the run's newer version, too. The fence of [`seqlock::lock`] came before the taking.
fn taken_over() {
    fence(Ordering::Release);
}

fn put<T>(chunks: &mut Vec<Option<T>>, at: u32, chunk: T) {
    let at = at as usize;
    if chunks.len() <= at {
        chunks.resize_with(at + 1, || None);
    }
    chunks[at] = Some(chunk);
}

fn drop_chunk<T>(chunks: &mut [Option<T>], at: usize) {
    if let Some(chunk) = chunks.get_mut(at) {
        *chunk = None;
    }
}

/// A run whose turn to be written it is.
pub(crate) struct Locked<'a> {
    runs: &'a Runs,
    look: Look,
    run: RunId,
    version: u64,
    freed: bool,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Some(header) = self.look.header(self.run) {
            seqlock::unlock(&header[VERSION], self.version);
        }
        if self.freed {
            lock(&self.runs.free).freed.push(self.run);
        }
    }
}

impl Locked<'_> {
    fn get(&self, word: usize) -> u64 {
        self.look.header(self.run).map_or(0, |header| header[word].load(Ordering::Relaxed))
    }

    fn put(&self, word: usize, value: u64) {
        if let Some(header) = self.look.header(self.run) {
            header[word].store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn id(&self) -> RunId {
        self.run
    }

    fn base(&self) -> Block {
        split(self.get(SPAN)).0
    }

    /// Blocks.
    pub(crate) fn length(&self) -> u32 {
        split(self.get(SPAN)).1
    }

    pub(crate) fn key(&self, offset: u32) -> RequestKey {
        let key = self.look.key(self.base() + offset);
        RequestKey(key.map_or(0, |key| key.load(Ordering::Relaxed)))
    }

    fn common(&self, offset: u32, keys: &[RequestKey]) -> u32 {
        let run = self.look.keys(self.base() + offset, self.length() - offset);
        run.map_or(0, |run| common(run, keys))
    }

    /// Claims the grains of `room` blocks.
    fn own(&self, base: Block, room: u32) {
        for block in (base..base + room).step_by(GRAIN as usize) {
            if let Some(owner) = self.look.owner(block) {
                owner.store(self.run, Ordering::Relaxed);
            }
        }
    }

    /// Writes blocks from `offset` on, which become the last ones.
    fn write(&self, offset: u32, keys: &[RequestKey], engine: Option<&[EngineKey]>) {
        let base = self.base();
        let first = base + offset;
        for (word, key) in self.look.keys(first, keys.len() as u32).into_iter().flatten().zip(keys)
        {
            word.store(key.0, Ordering::Relaxed);
        }
        let names = self.look.engine_keys(first, keys.len() as u32).into_iter().flatten();
        for (at, name) in names.enumerate() {
            name.store(engine.map_or(0, |engine| engine[at].0), Ordering::Relaxed);
        }
        let length = offset + keys.len() as u32;
        self.put(SPAN, pack(base, length));
        self.put(LAST, keys.last().map_or(0, |key| key.0));
    }

    /// Appends as many of the keys as may and fit. Nobody else may be a member of the set, who
    /// would hold the new blocks too.
    fn append(&mut self, seat: Seat, keys: &[RequestKey], engine: Option<&[EngineKey]>) -> u32 {
        let (base, length) = split(self.get(SPAN));
        let (mut room, position) = split(self.get(ROOM));
        if self.members().any(|member| member != seat) || length >= LONGEST {
            return 0;
        }
        let wanted = (length + keys.len() as u32).min(LONGEST);
        if wanted > room {
            let needed = (wanted - room).div_ceil(GRAIN);
            // A chain that grows by the block gets room for some more.
            let more = needed.max(length / 8 / GRAIN);
            if lock(&self.runs.blocks).take_at((base + room) / GRAIN, more) {
                taken_over();
                self.own(base + room, more * GRAIN);
                room += more * GRAIN;
                self.put(ROOM, pack(room, position));
            }
        }
        let count = wanted.min(room) - length;
        if count > 0 {
            self.leave_set(seat);
            let count = count as usize;
            self.write(length, &keys[..count], engine.map(|engine| &engine[..count]));
        }
        count
    }

    // Lines.

    fn refresh(&mut self) {
        self.runs.refresh(&mut self.look);
    }

    fn word(&self, address: u32, at: u32) -> u64 {
        let word = self.look.words(address).and_then(|words| words.get(at as usize));
        word.map_or(0, |word| word.load(Ordering::Relaxed))
    }

    fn put_word(&self, address: u32, at: u32, value: u64) {
        if let Some(word) = self.look.words(address).and_then(|words| words.get(at as usize)) {
            word.store(value, Ordering::Relaxed);
        }
    }

    fn line(&self, at: u32) -> Word {
        let address = split(self.get(LINES)).1;
        Word(if address == NOWHERE {
            self.get(SET + at as usize)
        } else {
            self.word(address, 1 + at)
        })
    }

    fn put_line(&self, at: u32, line: Word) {
        let address = split(self.get(LINES)).1;
        if address == NOWHERE {
            self.put(SET + at as usize, line.0);
        } else {
            self.put_word(address, 1 + at, line.0);
        }
    }

    /// Where a line is, or would be.
    fn search(&self, id: LineId) -> Result<u32, u32> {
        let (mut low, mut high) = (0, split(self.get(LINES)).0);
        while low < high {
            let middle = u32::midpoint(low, high);
            match self.line(middle).id().cmp(&id) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Ok(middle),
            }
        }
        Err(low)
    }

    fn insert(&mut self, at: u32, line: Word) {
        let (count, address) = split(self.get(LINES));
        let room = if address == NOWHERE { INLINE } else { self.word(address, 0) as u32 };
        if count == room {
            self.relocate((2 * room).next_multiple_of(GRAIN).max(2 * GRAIN) - 1);
        }
        for from in (at..count).rev() {
            self.put_line(from + 1, self.line(from));
        }
        self.put_line(at, line);
        let address = split(self.get(LINES)).1;
        self.put(LINES, pack(count + 1, address));
    }

    /// Moves the list to a place with room for `room` lines.
    fn relocate(&mut self, room: u32) {
        let (count, old) = split(self.get(LINES));
        let lines: SmallVec<[Word; 8]> = (0..count).map(|at| self.line(at)).collect();
        let new = self.runs.take_words(room + 1);
        self.refresh();
        self.put_word(new, 0, u64::from(room));
        for (at, line) in lines.iter().enumerate() {
            self.put_word(new, 1 + at as u32, line.0);
        }
        if old == NOWHERE {
            self.put(SET, 0);
        } else {
            let old_room = self.word(old, 0) as u32;
            self.runs.give_words(old, old_room + 1);
        }
        self.put(LINES, pack(count, new));
    }

    fn take(&mut self, at: u32) {
        let (count, address) = split(self.get(LINES));
        for from in at + 1..count {
            self.put_line(from - 1, self.line(from));
        }
        self.put(LINES, pack(count - 1, address));
        self.come_home();
    }

    /// Moves a short list back into the header.
    fn come_home(&mut self) {
        let (count, address) = split(self.get(LINES));
        if address == NOWHERE || count > INLINE || split(self.get(SET)).1 > 0 {
            return;
        }
        let lines: SmallVec<[Word; 2]> = (0..count).map(|at| self.line(at)).collect();
        let room = self.word(address, 0) as u32;
        self.put(LINES, pack(count, NOWHERE));
        for (at, line) in lines.iter().enumerate() {
            self.put_line(at as u32, *line);
        }
        self.runs.give_words(address, room + 1);
    }

    // The set.

    fn set(&self) -> (u32, u32) {
        if split(self.get(LINES)).1 == NOWHERE { (NOWHERE, 0) } else { split(self.get(SET)) }
    }

    fn members(&self) -> impl Iterator<Item = Seat> + '_ {
        let (address, width) = self.set();
        (0..width).flat_map(move |at| {
            let mut left = self.word(address, at);
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                (left != 0).then(|| {
                    left &= left - 1;
                    (at * 64 + bit) as Seat
                })
            })
        })
    }

    fn is_member(&self, seat: Seat) -> bool {
        let (address, width) = self.set();
        let at = u32::from(seat) / 64;
        at < width && self.word(address, at) >> (seat % 64) & 1 == 1
    }

    fn join_set(&mut self, seat: Seat) {
        let (mut address, width) = self.set();
        let at = u32::from(seat) / 64;
        if at >= width {
            let wider = (at + 1).next_multiple_of(GRAIN);
            let new = self.runs.take_words(wider);
            self.refresh();
            for word in 0..wider {
                let value = if word < width { self.word(address, word) } else { 0 };
                self.put_word(new, word, value);
            }
            if width > 0 {
                self.runs.give_words(address, width);
            }
            self.put(SET, pack(new, wider));
            address = new;
        }
        self.put_word(address, at, self.word(address, at) | 1 << (seat % 64));
    }

    /// Makes a member's line explicit.
    fn leave_set(&mut self, seat: Seat) {
        if !self.is_member(seat) {
            return;
        }
        let (address, width) = self.set();
        let at = u32::from(seat) / 64;
        self.put_word(address, at, self.word(address, at) & !(1 << (seat % 64)));
        if self.members().next().is_none() {
            self.runs.give_words(address, width);
            self.put(SET, 0);
        }
        let id = LineId::new(seat, 0, 0);
        if let Err(at) = self.search(id) {
            self.insert(at, Word::span(id, 0, self.length()));
        }
    }

    /// Puts the rows that hold everything into the set, if they are many.
    fn gather(&mut self) {
        let length = self.length();
        let (count, address) = split(self.get(LINES));
        let full = |line: &Word| line.id().is_plain() && line.is_full(length);
        let lines: Vec<Word> = (0..count).map(|at| self.line(at)).collect();
        if address == NOWHERE || lines.iter().filter(|line| full(line)).count() <= FEW {
            return;
        }
        let mut kept = 0;
        for line in lines {
            if full(&line) {
                self.join_set(line.id().seat());
            } else {
                self.put_line(kept, line);
                kept += 1;
            }
        }
        self.put(LINES, pack(kept, address));
    }

    // What the ledgers need.

    /// What a row holds of the run in one part and tier.
    pub(crate) fn load(&self, id: LineId) -> Line {
        if id.is_plain() && self.is_member(id.seat()) {
            return Line::Span(0, self.length());
        }
        let Ok(at) = self.search(id) else { return Line::NONE };
        match self.line(at).value() {
            Ok((from, to)) => Line::Span(from, to),
            Err(address) => {
                let count = (self.word(address, 0) >> 32) as u32;
                Line::Bits((1..=count).map(|at| self.word(address, at)).collect())
            }
        }
    }

    /// Changes what a row holds of the run in one part and tier.
    pub(crate) fn save(&mut self, id: LineId, line: &Line) {
        let length = self.length();
        if id.is_plain() && self.set().1 > 0 {
            if *line == Line::Span(0, length) {
                if let Ok(at) = self.search(id) {
                    self.drop_bitmap(self.line(at));
                    self.take(at);
                }
                self.join_set(id.seat());
                return;
            }
            self.leave_set(id.seat());
        }
        let found = self.search(id);
        if let Ok(at) = found {
            self.drop_bitmap(self.line(at));
        }
        let word = match line {
            Line::Span(_, 0) => {
                if let Ok(at) = found {
                    self.take(at);
                }
                return;
            }
            Line::Span(from, to) => Word::span(id, *from, *to),
            Line::Bits(bits) => {
                let count = bits.len() as u32;
                let address = self.runs.take_words(count + 1);
                self.refresh();
                self.put_word(address, 0, pack(count, leading(bits.iter().copied())));
                for (at, bits) in bits.iter().enumerate() {
                    self.put_word(address, 1 + at as u32, *bits);
                }
                Word::bitmap(id, address)
            }
        };
        match found {
            Ok(at) => self.put_line(at, word),
            Err(at) => self.insert(at, word),
        }
        let many = split(self.get(LINES)).0 as usize > FEW;
        if many && id.is_plain() && word.is_full(length) {
            self.gather();
        }
    }

    fn drop_bitmap(&self, line: Word) {
        if let Err(address) = line.value() {
            let count = (self.word(address, 0) >> 32) as u32;
            self.runs.give_words(address, count + 1);
        }
    }

    /// Parts and tags in which a row holds something of the run.
    pub(crate) fn lines_of(&self, seat: Seat) -> SmallVec<[LineId; 4]> {
        let mut lines = SmallVec::new();
        if self.is_member(seat) {
            lines.push(LineId::new(seat, 0, 0));
        }
        let from = self.search(LineId::new(seat, 0, 0)).unwrap_or_else(|at| at);
        let of_seat = (from..split(self.get(LINES)).0)
            .map(|at| self.line(at).id())
            .take_while(|id| id.seat() == seat);
        lines.extend(of_seat);
        lines
    }

    fn sweep(&mut self, seat: Seat) {
        for id in self.lines_of(seat) {
            self.save(id, &Line::NONE);
        }
    }

    /// Gives back what nobody holds at the end of the run, or all of it.
    fn trim(&mut self) {
        let (base, length) = split(self.get(SPAN));
        if length == 0 || self.freed || self.set().1 > 0 {
            return;
        }
        let end = (0..split(self.get(LINES)).0)
            .map(|at| match self.line(at).value() {
                Ok((_, to)) => to,
                Err(_) => self.load(self.line(at).id()).end(),
            })
            .max()
            .unwrap_or(0);
        if end >= length {
            return;
        }
        if end == 0 {
            self.free(true);
            return;
        }
        let (room, position) = split(self.get(ROOM));
        let needed = end.div_ceil(GRAIN) * GRAIN;
        self.put(SPAN, pack(base, end));
        self.put(LAST, self.key(end - 1).0);
        if needed < room {
            self.put(ROOM, pack(needed, position));
            self.runs.give_blocks(base + needed, (room - needed) / GRAIN);
        }
    }

    fn free(&mut self, published: bool) {
        let base = split(self.get(SPAN)).0;
        let room = split(self.get(ROOM)).0;
        if published {
            self.runs.unpublish(self.run, RequestKey(self.get(FIRST)));
        }
        let (count, address) = split(self.get(LINES));
        for at in 0..count {
            self.drop_bitmap(self.line(at));
        }
        let (set, width) = self.set();
        if width > 0 {
            self.runs.give_words(set, width);
        }
        if address != NOWHERE {
            let room = self.word(address, 0) as u32;
            self.runs.give_words(address, room + 1);
        }
        self.put(SPAN, 0);
        self.put(FIRST, 0);
        self.put(LINES, pack(0, NOWHERE));
        self.runs.give_blocks(base, room / GRAIN);
        self.freed = true;
    }
}

#[cfg(test)]
impl Runs {
    /// Panics where an invariant does not hold; nobody may be writing.
    pub(super) fn verify(&self) {
        let snapshot = self.load();
        let free: std::collections::BTreeSet<RunId> =
            lock(&self.free).freed.iter().copied().collect();
        let next = lock(&self.free).next;
        let (mut keys, mut blocks) = (std::collections::BTreeMap::new(), 0);
        for id in (0..next).filter(|id| !free.contains(id)) {
            let run = self.locked(id).unwrap();
            let (base, length) = split(run.get(SPAN));
            let room = split(run.get(ROOM)).0;
            assert!(length > 0 && length <= room, "run {id}: {length} of {room}");
            blocks += u64::from(room / GRAIN);
            assert_eq!(run.get(FIRST), run.key(0).0, "first key of run {id}");
            assert_eq!(run.get(LAST), run.key(length - 1).0, "last key of run {id}");
            assert_eq!(snapshot.head(run.key(0)), Some(id), "head of run {id}");
            for at in 0..length {
                let twice = keys.insert(run.key(at), (id, at));
                assert_eq!(twice, None, "key in two places: run {id} block {at}");
                assert_eq!(self.owner(base + at), id, "owner of run {id} block {at}");
            }
            let lines: Vec<Word> = (0..split(run.get(LINES)).0).map(|at| run.line(at)).collect();
            assert!(lines.is_sorted_by_key(|line| line.id()), "lines of run {id}");
            let ends = lines.iter().map(|line| run.load(line.id()).end());
            let end = if run.set().1 > 0 { length } else { ends.max().unwrap_or(0) };
            assert_eq!(end, length, "run {id} keeps what nobody holds");
        }
        assert_eq!(keys.len() as u64, self.keys());
        assert_eq!(blocks, lock(&self.blocks).taken());
    }
}
