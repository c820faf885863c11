//! Speculative marks: which router expects which block on which row.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicUsize, Ordering},
};

use dashmap::{DashMap, Entry};
use smallvec::SmallVec;

use crate::{
    index::slots::KeyHash,
    model::{PodSlot, RequestKey},
};

/// The rows on which a block is expected, each with the marks that say so. A hot prefix has few
/// rows and may have thousands of marks.
type Expected = SmallVec<[(PodSlot, HashSet<u64, KeyHash>); 1]>;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    blocks: DashMap<RequestKey, Expected, KeyHash>,
    count: AtomicUsize,
}

/// The blocks of a prompt that are expected on a row.
#[derive(Clone, Debug)]
pub(crate) struct Marked {
    pub(crate) slot: PodSlot,
    /// Bit by block of the prompt.
    pub(crate) blocks: Vec<u64>,
}

impl Marks {
    pub(crate) fn any(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn mark(&self, key: RequestKey, slot: PodSlot, mark: u64) {
        let mut rows = self.blocks.entry(key).or_default();
        let at = rows.iter().position(|(marked, _)| *marked == slot).unwrap_or_else(|| {
            rows.push((slot, HashSet::default()));
            rows.len() - 1
        });
        if rows[at].1.insert(mark) {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes one mark off a row's expectation of a block, or all of them.
    pub(crate) fn unmark(&self, key: RequestKey, slot: PodSlot, mark: Option<u64>) {
        let Entry::Occupied(mut marks) = self.blocks.entry(key) else { return };
        let rows = marks.get_mut();
        let Some(at) = rows.iter().position(|(marked, _)| *marked == slot) else { return };
        let own = &mut rows[at].1;
        let before = own.len();
        match mark {
            Some(mark) => {
                own.remove(&mark);
            }
            None => own.clear(),
        }
        self.count.fetch_sub(before - own.len(), Ordering::Relaxed);
        if own.is_empty() {
            rows.swap_remove(at);
        }
        if rows.is_empty() {
            marks.remove();
        }
    }

    /// Takes every mark off a row.
    pub(crate) fn forget(&self, slot: PodSlot) {
        let keys: Vec<RequestKey> = self
            .blocks
            .iter()
            .filter(|marks| marks.iter().any(|(marked, _)| *marked == slot))
            .map(|marks| *marks.key())
            .collect();
        for key in keys {
            self.unmark(key, slot, None);
        }
    }

    /// The rows on which blocks of a prompt are expected.
    pub(crate) fn of(&self, keys: &[RequestKey]) -> Vec<Marked> {
        let mut found: Vec<Marked> = Vec::new();
        if !self.any() {
            return found;
        }
        for (block, key) in keys.iter().enumerate() {
            let Some(rows) = self.blocks.get(key) else { continue };
            for &(slot, _) in rows.iter() {
                let at = found.iter().position(|marked| marked.slot == slot);
                let at = at.unwrap_or_else(|| {
                    found.push(Marked { slot, blocks: vec![0; keys.len().div_ceil(64)] });
                    found.len() - 1
                });
                found[at].blocks[block / 64] |= 1 << (block % 64);
            }
        }
        found
    }
}
