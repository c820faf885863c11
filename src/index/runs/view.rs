//! What lookups need to know of the rows beside their blocks.

use std::sync::Arc;

use smallvec::SmallVec;

use super::cover::Seat;
use crate::{
    index::ledger::{Group, Part},
    model::{GroupKind, PodSlot},
};

/// A set of seats.
pub(super) type Seats = SmallVec<[u64; 16]>;

/// One row.
#[derive(Clone, Debug)]
pub(super) struct RowView {
    pub(super) seat: Seat,
    pub(super) block_size: u32,
    pub(super) muted: bool,
    pub(super) parts: Arc<Parts>,
}

/// All rows, as of one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    rows: Vec<Option<RowView>>,
    /// Seats of rows that are scored, and whose only attention group is full attention.
    pub(super) simple: Seats,
    /// By seat.
    slots: Vec<PodSlot>,
    /// Every seat has the number of its slot.
    pub(super) in_order: bool,
    /// Slots of rows that are scored and have more groups.
    pub(super) hybrid: Vec<PodSlot>,
}

impl View {
    pub(super) fn rows(&self) -> usize {
        self.rows.iter().flatten().count()
    }

    pub(super) fn row(&self, slot: PodSlot) -> Option<&RowView> {
        self.rows.get(slot.0 as usize)?.as_ref()
    }

    /// The row that sits on a seat.
    #[inline]
    pub(super) fn slot(&self, seat: Seat) -> PodSlot {
        self.slots.get(usize::from(seat)).copied().unwrap_or(PodSlot(u32::MAX))
    }

    pub(super) fn put(&mut self, slot: PodSlot, row: Option<RowView>) {
        let at = slot.0 as usize;
        if self.rows.len() <= at {
            self.rows.resize(at + 1, None);
        }
        self.rows[at] = row;
        self.digest();
    }

    pub(super) fn change(&mut self, slot: PodSlot, change: impl FnOnce(&mut RowView)) {
        if let Some(row) = self.rows.get_mut(slot.0 as usize).and_then(Option::as_mut) {
            change(row);
            self.digest();
        }
    }

    fn digest(&mut self) {
        self.simple.clear();
        self.slots.clear();
        self.hybrid.clear();
        self.in_order = true;
        for (slot, row) in self.rows.iter().enumerate() {
            let Some(row) = row else { continue };
            let (slot, seat) = (PodSlot(slot as u32), usize::from(row.seat));
            if self.slots.len() <= seat {
                self.slots.resize(seat + 1, PodSlot(u32::MAX));
                self.simple.resize(seat / 64 + 1, 0);
            }
            self.slots[seat] = slot;
            self.in_order &= seat == slot.0 as usize;
            if !row.muted && row.parts.simple {
                self.simple[seat / 64] |= 1 << (seat % 64);
            } else if !row.muted {
                self.hybrid.push(slot);
            }
        }
    }
}

/// What a row's groups ask of a prefix.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    /// The part of events without a group, if it is full attention.
    pub(super) ungrouped: Option<Part>,
    pub(super) full: SmallVec<[Part; 2]>,
    /// Part and window in tokens.
    pub(super) windows: SmallVec<[(Part, u32); 2]>,
    simple: bool,
}

impl Default for Parts {
    /// Of a row that has told nothing yet.
    fn default() -> Self {
        Self { ungrouped: Some(0), full: SmallVec::new(), windows: SmallVec::new(), simple: true }
    }
}

impl Parts {
    pub(super) fn new(groups: &[Group]) -> Self {
        let mut parts = Self { ungrouped: None, simple: false, ..Self::default() };
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

    pub(super) fn any_full(&self) -> bool {
        self.ungrouped.is_some() || !self.full.is_empty()
    }

    pub(super) fn windows_only(&self) -> bool {
        !self.any_full() && !self.windows.is_empty()
    }
}
