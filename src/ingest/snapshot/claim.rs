//! Restored rows between their restoration and their publisher.

use std::sync::Arc;

use super::RowMark;
use crate::{
    ingest::fleet::{Fleet, PodDeclaration, Row},
    model::RowId,
    support::sync::lock,
};

impl Fleet {
    /// Remembers that a row waits for its publisher.
    pub(super) fn keep(&self, row: &Row, mark: RowMark) {
        lock(&self.restored).insert(row.slot, mark);
    }

    /// The restored row of a publisher that is declared so, if there is one, and how far it is.
    /// `model` is the canonical name of the declared one, empty if none is.
    ///
    /// A row of another model is dropped. So is one of another address that has no replay socket to
    /// prove whose life it is.
    pub(crate) fn claim(
        &self,
        declaration: &PodDeclaration,
        model: &str,
    ) -> Option<(Arc<Row>, RowMark)> {
        let (slot, mark) = {
            let mut restored = lock(&self.restored);
            let (&slot, _) = restored.iter().find(|(_, mark)| {
                let rank = match declaration.rank {
                    None => mark.lead || mark.id.rank.is_none(),
                    rank => mark.id.rank == rank,
                };
                rank && *mark.id.pod == *declaration.pod
            })?;
            (slot, restored.remove(&slot)?)
        };
        let moved = *mark.endpoint != *declaration.endpoint;
        if (!model.is_empty() && *model != *mark.model)
            || (moved && declaration.replay_endpoint.is_none())
        {
            self.remove(slot);
            return None;
        }
        let row = self.table().slot(slot).cloned()?;
        let row = if moved { self.readdress(&row, &declaration.endpoint)? } else { row };
        row.update(|status| status.restored = false);
        Some((row, mark))
    }

    /// Drops a restored row of this identity that nobody has claimed: somebody else is it.
    pub(crate) fn drop_restored(&self, id: &RowId) {
        self.drop_unclaimed(|mark| mark.id == *id);
    }

    /// Drops restored rows that nobody has claimed; returns which.
    pub fn drop_unclaimed(&self, which: impl Fn(&RowMark) -> bool) -> Vec<RowId> {
        let dropped: Vec<_> = lock(&self.restored).extract_if(|_, mark| which(mark)).collect();
        let drop = |(slot, mark): (_, RowMark)| {
            self.remove(slot);
            mark.id
        };
        dropped.into_iter().map(drop).collect()
    }

    /// Restored rows that wait for their publisher.
    #[must_use]
    pub fn unclaimed(&self) -> Vec<(Arc<Row>, RowMark)> {
        let restored = lock(&self.restored);
        let table = self.table();
        let rows = restored.iter();
        rows.filter_map(|(slot, mark)| Some((Arc::clone(table.slot(*slot)?), mark.clone())))
            .collect()
    }
}
