//! Stores whose parent is not known yet: bounded, timed, attached when the parent gets a place.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Instant,
};

use crate::{
    hash::Scheme,
    index::{
        Store,
        place::{Cursor, Laid},
        slots::KeyHash,
    },
    model::{EngineKey, ExtraKey},
};

/// A store that waits: its keys are counted already, only their places are missing.
#[derive(Clone, Debug)]
pub(crate) struct Orphan {
    pub(crate) part: u8,
    pub(crate) keys: Box<[EngineKey]>,
    pub(crate) tokens: Box<[u32]>,
    pub(crate) block_size: usize,
    pub(crate) extras: Box<[Box<[OwnedExtra]>]>,
    pub(crate) lora: Option<Box<str>>,
    pub(crate) at: Instant,
}

/// An [`ExtraKey`] of its own.
#[derive(Clone, Debug)]
pub(crate) enum OwnedExtra {
    Text(Box<str>),
    Item(Box<str>, i64),
    Bytes(Box<[u8]>),
}

impl OwnedExtra {
    fn new(extra: &ExtraKey<'_>) -> Self {
        match *extra {
            ExtraKey::Text(text) => Self::Text(text.into()),
            ExtraKey::Item { id, offset } => Self::Item(id.into(), offset),
            ExtraKey::Bytes(bytes) => Self::Bytes(bytes.into()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Text(text) | Self::Item(text, _) => text.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    fn borrow(&self) -> ExtraKey<'_> {
        match self {
            Self::Text(text) => ExtraKey::Text(text),
            Self::Item(id, offset) => ExtraKey::Item { id, offset: *offset },
            Self::Bytes(bytes) => ExtraKey::Bytes(bytes),
        }
    }
}

impl Orphan {
    pub(crate) fn new(store: &Store<'_>, part: u8) -> Self {
        let extras = if store.extras.ends.is_empty() { 0 } else { store.keys.len() };
        let extras = (0..extras)
            .map(|at| store.extras.of(at).iter().map(OwnedExtra::new).collect())
            .collect();
        Self {
            part,
            keys: store.keys.into(),
            tokens: store.tokens.into(),
            block_size: store.block_size as usize,
            extras,
            lora: store.lora.map(Into::into),
            at: store.at,
        }
    }

    /// Tokens in all.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Moves the cursor over block `at`.
    pub(crate) fn advance(
        &self,
        at: usize,
        cursor: &mut Cursor,
        scheme: &Scheme,
        scratch: &mut Vec<u8>,
    ) -> Laid {
        let tokens = self.tokens.chunks_exact(self.block_size).nth(at).unwrap_or_default();
        let extras = self.extras.get(at).map(|extras| &**extras).unwrap_or_default();
        let extras: Vec<ExtraKey<'_>> = extras.iter().map(OwnedExtra::borrow).collect();
        cursor.advance(scheme, tokens, &extras, self.lora.as_deref(), scratch)
    }

    fn bytes(&self) -> u64 {
        let extras: usize =
            self.extras.iter().flatten().map(|extra| size_of::<OwnedExtra>() + extra.len()).sum();
        (size_of::<Self>() + 8 * self.keys.len() + 4 * self.tokens.len() + extras) as u64
    }
}

/// The buffer. Orphans wake in order of arrival.
#[derive(Debug)]
pub(crate) struct Orphans {
    limit: usize,
    blocks: usize,
    bytes: u64,
    next: u64,
    waiting: BTreeMap<u64, (EngineKey, Orphan)>,
    by_parent: HashMap<EngineKey, Vec<u64>, KeyHash>,
    awake: BTreeSet<u64>,
}

impl Orphans {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            blocks: 0,
            bytes: 0,
            next: 0,
            waiting: BTreeMap::new(),
            by_parent: HashMap::default(),
            awake: BTreeSet::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Lets a store wait; `false` when the buffer is full.
    pub(crate) fn push(&mut self, parent: EngineKey, orphan: Orphan) -> bool {
        if self.blocks + orphan.keys.len() > self.limit {
            return false;
        }
        let id = self.next;
        self.next += 1;
        self.insert(id, parent, orphan);
        true
    }

    fn insert(&mut self, id: u64, parent: EngineKey, orphan: Orphan) {
        self.blocks += orphan.keys.len();
        self.bytes += orphan.bytes();
        self.by_parent.entry(parent).or_default().push(id);
        self.waiting.insert(id, (parent, orphan));
    }

    fn take(&mut self, id: u64) -> Option<(EngineKey, Orphan)> {
        let (parent, orphan) = self.waiting.remove(&id)?;
        self.blocks -= orphan.keys.len();
        self.bytes -= orphan.bytes();
        if let Some(ids) = self.by_parent.get_mut(&parent) {
            ids.retain(|known| *known != id);
            if ids.is_empty() {
                self.by_parent.remove(&parent);
            }
        }
        Some((parent, orphan))
    }

    /// What waits and for which parent, in order of arrival.
    pub(crate) fn list(&self) -> impl Iterator<Item = (EngineKey, &Orphan)> + '_ {
        self.waiting.values().map(|(parent, orphan)| (*parent, orphan))
    }

    /// Wakes what waits for any of `parents`.
    pub(crate) fn wake(&mut self, parents: &[EngineKey]) {
        for parent in parents {
            self.awake.extend(self.by_parent.get(parent).into_iter().flatten());
        }
    }

    /// The next one that was woken, in order of arrival.
    pub(crate) fn next_awake(&mut self) -> Option<(u64, EngineKey, Orphan)> {
        let id = self.awake.pop_first()?;
        let (parent, orphan) = self.take(id)?;
        Some((id, parent, orphan))
    }

    /// Puts back one whose parent has no place that it may use.
    pub(crate) fn back_to_sleep(&mut self, id: u64, parent: EngineKey, orphan: Orphan) {
        self.insert(id, parent, orphan);
    }

    /// Drops what arrived before `before`; returns how many blocks.
    pub(crate) fn expire(&mut self, before: Instant) -> usize {
        let old: Vec<u64> = self
            .waiting
            .iter()
            .filter(|(_, (_, orphan))| orphan.at < before)
            .map(|(id, _)| *id)
            .collect();
        old.into_iter().filter_map(|id| self.take(id)).map(|(_, orphan)| orphan.keys.len()).sum()
    }
}
