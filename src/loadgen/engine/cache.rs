//! vLLM v1's block pool and prefix cache (`v1/core/block_pool.py`, `kv_cache_manager.py`, one
//! full-attention group), without the memory behind them.
//!
//! # Model
//!
//! There are `num_gpu_blocks` physical blocks; block 0 is the null block, which is never given out. A
//! block is used by one or more requests, or it is in the *free queue*. A full block carries a hash,
//! under which a later request finds it: used or free. It loses the hash when it is given out anew,
//! and that, not its release, is what a `BlockRemoved` tells of.
//!
//! * [`lookup`](Cache::lookup) finds the leading full blocks of a prompt, but never its last token,
//!   which has to be computed for its logits.
//! * [`allocate`](Cache::allocate) takes these hits out of the free queue, takes new blocks from its
//!   front, evicting, and announces every block that is full when the step's tokens are computed, in
//!   one `BlockStored`.
//! * [`free`](Cache::free) releases a request's blocks in reverse order, so that its tail is evicted
//!   first, and its beginning, which others may share, last. A block that never became full goes to
//!   the front instead, from vLLM 0.24: it is worth nothing.
//!
//! Several blocks may carry one hash: equal prompts that were looked up before any of them was
//! allocated, and the last block of a prompt that ends with it. Each is announced; a hit takes the
//! one that has carried the hash longest.
//!
//! Events are collected and [taken](Cache::take_events) by whoever ends the step.

mod queue;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, sync::Arc};

use self::queue::FreeQueue;
use super::sequence::{Lora, Sequence};
use crate::wire::encode::{BlockRemoved, BlockStored, Event, Extra, Hash, Tokens};

/// Names a request within one cache.
pub type RequestId = u64;
/// Number of a physical block.
type Block = u32;

/// The tier that its events name.
const MEDIUM: &str = "GPU";
/// The kind of its only group.
const KIND: &str = "full_attention";

/// Which optional fields of events are written: they came with engine versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventFields {
    /// `medium`, from vLLM 0.10.2.
    pub medium: bool,
    /// `lora_name`, from 0.14.
    pub lora_name: bool,
    /// `extra_keys`, from 0.17.
    pub extra_keys: bool,
    /// `group_idx`, from 0.20.
    pub group: bool,
    /// `kv_cache_spec_kind`, from 0.22.
    pub kind: bool,
}

impl Default for EventFields {
    /// All of them.
    fn default() -> Self {
        Self { medium: true, lora_name: true, extra_keys: true, group: true, kind: true }
    }
}

/// What a cache is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Physical blocks, the null block among them; at least 2.
    pub num_gpu_blocks: u32,
    /// Tokens per block, at least 1.
    pub block_size: usize,
    /// Fields of its events.
    pub fields: EventFields,
    /// Are released blocks without a hash given out before all others, as from vLLM 0.24? Up to 0.23
    /// they wait their turn.
    pub unhashed_first: bool,
}

/// There are not enough free blocks; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not enough free blocks")]
pub struct NoRoom;

/// Leading blocks of a prompt that are cached. Valid until the next allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    blocks: Vec<Block>,
}

impl Hits {
    /// How many blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Is none cached?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Only the first `blocks` of them, as if the others were not cached.
    #[must_use]
    pub fn first(mut self, blocks: usize) -> Self {
        self.blocks.truncate(blocks);
        self
    }
}

/// A hash that the cache holds.
#[derive(Clone, Debug, PartialEq)]
pub struct CachedBlock {
    /// The hash that events name.
    pub hash: u64,
    /// That of the block before; `None` at the start.
    pub parent: Option<u64>,
    /// Its tokens.
    pub tokens: Arc<[u32]>,
    /// Adapter.
    pub lora: Option<Lora>,
    /// Extra hash inputs.
    pub extras: Option<Vec<Extra>>,
    /// Physical blocks that carry it, at least 1.
    pub copies: usize,
}

/// What is known under one hash.
#[derive(Clone, Debug)]
struct Entry {
    parent: Option<u64>,
    tokens: Arc<[u32]>,
    lora: Option<Lora>,
    extras: Option<Vec<Extra>>,
    // In the order in which they got the hash; never empty.
    blocks: Vec<Block>,
}

#[derive(Clone, Debug, Default)]
struct State {
    users: u32,
    hash: Option<u64>,
}

/// Blocks of one request, in order.
#[derive(Clone, Debug, Default)]
struct Held {
    blocks: Vec<Block>,
    // How many of them are announced or were hits.
    announced: usize,
}

/// Errors to plant, so that the comparison with recorded engines can be seen to fail.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fault {
    #[default]
    None,
    /// Requests release their first block first.
    ForwardFree,
    /// Blocks are evicted in the order in which they were filled, however lately they were used.
    Fifo,
    /// A hit takes the youngest of several copies.
    YoungestCopy,
    /// A hash that is cached already is not announced again.
    StoresOnce,
}

/// See the module's page.
#[derive(Clone, Debug)]
pub struct Cache {
    options: CacheOptions,
    blocks: Vec<State>,
    free: FreeQueue,
    entries: HashMap<u64, Entry>,
    requests: HashMap<RequestId, Held>,
    events: Vec<Event>,
    #[cfg(test)]
    fault: Fault,
    // When each block was given out last; for the planted FIFO.
    #[cfg(test)]
    given: (u64, Vec<u64>),
}

impl Cache {
    /// An empty cache. Options below their least values are taken for these.
    #[must_use]
    pub fn new(options: CacheOptions) -> Self {
        let count = options.num_gpu_blocks.max(2);
        let options = CacheOptions { block_size: options.block_size.max(1), ..options };
        let mut free = FreeQueue::full(count);
        free.remove(0);
        Self {
            options,
            blocks: vec![State::default(); count as usize],
            free,
            entries: HashMap::new(),
            requests: HashMap::new(),
            events: Vec::new(),
            #[cfg(test)]
            fault: Fault::None,
            #[cfg(test)]
            given: (0, vec![0; count as usize]),
        }
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.options.block_size
    }

    /// Blocks that can be given out, hashed or not.
    #[must_use]
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Blocks that there are to give out at all: the null block is not among them.
    #[must_use]
    pub fn usable_blocks(&self) -> usize {
        self.blocks.len() - 1
    }

    /// Share of the blocks that requests use, 0 to 1: vLLM's `kv_cache_usage_perc`.
    #[must_use]
    pub fn usage(&self) -> f64 {
        1.0 - self.free.len() as f64 / self.usable_blocks() as f64
    }

    /// The leading full blocks that are cached, without the one that has the last token.
    #[must_use]
    pub fn lookup(&self, sequence: &Sequence) -> Hits {
        let most = sequence.tokens().len().saturating_sub(1) / self.options.block_size;
        let blocks =
            sequence.hashes().iter().take(most).map_while(|hash| self.carrier(*hash)).collect();
        Hits { blocks }
    }

    /// Gives `request` the blocks for `new_tokens` more tokens behind the first `computed`, and
    /// announces those that are full then. `hits` come before its first own block: they are for a
    /// request that has none, and `computed` counts them.
    ///
    /// # Errors
    ///
    /// [`NoRoom`].
    pub fn allocate(
        &mut self,
        request: RequestId,
        sequence: &Sequence,
        hits: &Hits,
        computed: usize,
        new_tokens: usize,
    ) -> Result<(), NoRoom> {
        let held = self.requests.get(&request).map_or(0, |held| held.blocks.len());
        let needed = (computed + new_tokens)
            .div_ceil(self.options.block_size)
            .saturating_sub(hits.blocks.len() + held);
        let idle = hits.blocks.iter().filter(|hit| self.state(**hit).users == 0).count();
        if needed + idle > self.free.len() {
            return Err(NoRoom);
        }
        let mut held = self.requests.remove(&request).unwrap_or_default();
        for &hit in &hits.blocks {
            self.free.remove(hit);
            self.state_mut(hit).users += 1;
        }
        if !hits.blocks.is_empty() {
            held.blocks.extend(&hits.blocks);
            held.announced = held.blocks.len();
        }
        for _ in 0..needed {
            let block = self.take().ok_or(NoRoom)?;
            held.blocks.push(block);
        }
        let full = sequence.tokens().len().min(computed + new_tokens) / self.options.block_size;
        self.announce(sequence, &held, full);
        held.announced = held.announced.max(full);
        self.requests.insert(request, held);
        Ok(())
    }

    /// Releases all blocks of a request; does nothing for an unknown one.
    pub fn free(&mut self, request: RequestId) {
        let Some(mut held) = self.requests.remove(&request) else { return };
        held.blocks.reverse();
        #[cfg(test)]
        if self.fault == Fault::ForwardFree {
            held.blocks.reverse();
        }
        let mut without_hash = Vec::new();
        for &block in &held.blocks {
            let state = self.state_mut(block);
            state.users -= 1;
            if state.users > 0 {
                continue;
            }
            if state.hash.is_none() && self.options.unhashed_first {
                without_hash.push(block);
            } else {
                self.append(block);
            }
        }
        for block in without_hash.into_iter().rev() {
            self.free.push_front(block);
        }
    }

    /// Forgets every hash, unless a block is in use; tells whether it did.
    pub fn reset(&mut self) -> bool {
        if self.free.len() != self.usable_blocks() {
            return false;
        }
        self.entries.clear();
        for block in &mut self.blocks {
            block.hash = None;
        }
        self.events.push(Event::AllBlocksCleared);
        true
    }

    /// Events since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// How many events wait to be taken.
    #[must_use]
    pub fn pending_events(&self) -> usize {
        self.events.len()
    }

    /// Everything that a lookup could find, in no order.
    pub fn contents(&self) -> impl Iterator<Item = CachedBlock> + '_ {
        self.entries.iter().map(|(&hash, entry)| CachedBlock {
            hash,
            parent: entry.parent,
            tokens: Arc::clone(&entry.tokens),
            lora: entry.lora.clone(),
            extras: entry.extras.clone(),
            copies: entry.blocks.len(),
        })
    }

    /// The block that a hit on `hash` uses.
    fn carrier(&self, hash: u64) -> Option<Block> {
        let blocks = &self.entries.get(&hash)?.blocks;
        #[cfg(test)]
        if self.fault == Fault::YoungestCopy {
            return blocks.last().copied();
        }
        blocks.first().copied()
    }

    /// Gives out the block in front of the queue.
    fn take(&mut self) -> Option<Block> {
        let block = self.free.pop()?;
        let state = self.state_mut(block);
        state.users = 1;
        if let Some(hash) = state.hash.take() {
            self.evict(hash, block);
        }
        #[cfg(test)]
        {
            self.given.0 += 1;
            self.given.1[block as usize] = self.given.0;
        }
        Some(block)
    }

    fn evict(&mut self, hash: u64, block: Block) {
        if let Some(entry) = self.entries.get_mut(&hash) {
            entry.blocks.retain(|other| *other != block);
            if entry.blocks.is_empty() {
                self.entries.remove(&hash);
            }
        }
        self.events.push(Event::BlockRemoved(BlockRemoved {
            block_hashes: vec![Hash::Unsigned(hash)],
            medium: self.options.fields.medium.then(|| MEDIUM.to_owned()),
            group_idx: self.options.fields.group.then_some(0),
            ..BlockRemoved::default()
        }));
    }

    /// Puts a block at the end of the free queue.
    fn append(&mut self, block: Block) {
        #[cfg(test)]
        if self.fault == Fault::Fifo {
            let given = &self.given.1;
            let stamp = given[block as usize];
            let next = self.free.iter().find(|other| given[*other as usize] > stamp);
            let next = next.unwrap_or_else(|| self.free.sentinel());
            self.free.insert_before(next, block);
            return;
        }
        self.free.push(block);
    }

    /// Gives the blocks up to the `full`-th their hashes and tells of those that had none.
    fn announce(&mut self, sequence: &Sequence, held: &Held, full: usize) {
        let first = held.announced;
        if first >= full {
            return;
        }
        let hashes = sequence.hashes();
        let lora = &sequence.identity().lora;
        #[cfg(test)]
        let known = self.entries.contains_key(&hashes[first]);
        for (at, &block) in held.blocks.iter().enumerate().take(full).skip(first) {
            self.state_mut(block).hash = Some(hashes[at]);
            let entry = self.entries.entry(hashes[at]).or_insert_with(|| Entry {
                parent: at.checked_sub(1).map(|before| hashes[before]),
                tokens: sequence.block(at).into(),
                lora: lora.clone(),
                extras: sequence.extras(at),
                blocks: Vec::new(),
            });
            entry.blocks.push(block);
        }
        #[cfg(test)]
        if self.fault == Fault::StoresOnce && known {
            return;
        }
        let extras = || (first..full).map(|at| sequence.extras(at)).collect();
        self.events.push(Event::BlockStored(BlockStored {
            block_hashes: hashes[first..full].iter().map(|hash| Hash::Unsigned(*hash)).collect(),
            parent_block_hash: first.checked_sub(1).map(|before| Hash::Unsigned(hashes[before])),
            token_ids: Tokens::Plain(
                sequence.tokens()[first * self.options.block_size..full * self.options.block_size]
                    .to_vec(),
            ),
            block_size: self.options.block_size as i64,
            lora_id: lora.as_ref().map(|lora| lora.id),
            medium: self.options.fields.medium.then(|| MEDIUM.to_owned()),
            lora_name: lora
                .as_ref()
                .filter(|_| self.options.fields.lora_name)
                .map(|lora| lora.name.to_string()),
            extra_keys: self.options.fields.extra_keys.then(extras),
            group_idx: self.options.fields.group.then_some(0),
            kv_cache_spec_kind: self.options.fields.kind.then(|| KIND.to_owned()),
            ..BlockStored::default()
        }));
    }

    fn state(&self, block: Block) -> &State {
        &self.blocks[block as usize]
    }

    fn state_mut(&mut self, block: Block) -> &mut State {
        &mut self.blocks[block as usize]
    }
}
