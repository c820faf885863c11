//! A row's engine keys → blocks, in five bytes a slot.
//!
//! The table holds block numbers only; the keys lie beside the blocks, where the caller finds
//! them. It is cut into shards that grow one at a time: the copy that a growing table needs is
//! never larger than a shard.

use hashbrown::{HashTable, hash_table::Entry};

use crate::{index::runs::Block, model::EngineKey};

/// Parts of the table.
pub(crate) const SHARDS: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct KeyMap {
    shards: Box<[HashTable<Block>; SHARDS]>,
    len: usize,
}

fn hash(key: EngineKey) -> u64 {
    // Engine keys may be small integers; the table takes both ends of the hash.
    let product = u128::from(key.0 ^ 0x5851_f42d_4c95_7f2d) * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

fn shard(hash: u64) -> usize {
    (hash >> 40) as usize % SHARDS
}

impl Default for KeyMap {
    fn default() -> Self {
        Self { shards: Box::new(std::array::from_fn(|_| HashTable::new())), len: 0 }
    }
}

impl KeyMap {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The block that `key` names; `name` tells the key of a block.
    pub(crate) fn find(&self, key: EngineKey, name: impl Fn(Block) -> EngineKey) -> Option<Block> {
        let hash = hash(key);
        self.shards[shard(hash)].find(hash, |&block| name(block) == key).copied()
    }

    /// Adds a key; `false` when it is there.
    pub(crate) fn insert(
        &mut self,
        key: EngineKey,
        block: Block,
        name: impl Fn(Block) -> EngineKey,
    ) -> bool {
        let hash = hash(key);
        let known = |block: Block| hash_of(&name, block);
        match self.shards[shard(hash)].entry(hash, |&at| name(at) == key, |&at| known(at)) {
            Entry::Occupied(_) => false,
            Entry::Vacant(vacant) => {
                vacant.insert(block);
                self.len += 1;
                true
            }
        }
    }

    /// Takes a key out that names `block`.
    pub(crate) fn remove(&mut self, key: EngineKey, block: Block) {
        let hash = hash(key);
        if let Ok(found) = self.shards[shard(hash)].find_entry(hash, |&at| at == block) {
            found.remove();
            self.len -= 1;
        }
    }

    /// Every block that has a key.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Block> + '_ {
        self.shards.iter().flat_map(|shard| shard.iter().copied())
    }

    /// Those of one shard; none beyond the last.
    pub(crate) fn blocks_of(&self, shard: usize) -> impl Iterator<Item = Block> + '_ {
        self.shards.get(shard).into_iter().flat_map(|shard| shard.iter().copied())
    }
}

fn hash_of(name: &impl Fn(Block) -> EngineKey, block: Block) -> u64 {
    hash(name(block))
}
