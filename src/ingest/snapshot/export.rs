//! A running fleet as a snapshot.
//!
//! # Concurrency
//!
//! One row at a time is stopped between two batches, copied, and goes on; its lane serves the others
//! meanwhile, lookups notice nothing. What was copied is then encoded and written, at the speed of
//! whoever reads. So each row is exact as of its own (epoch, sequence), and rows are of different
//! moments, as they always are.

use std::{
    io::{self, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{RowMark, SnapshotWriter};
use crate::{
    index::RowImage,
    ingest::{
        apply::Shared,
        lane::{Lanes, Pipe},
    },
    support::sync::lock,
};

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Rows.
    pub rows: u64,
    /// Bytes.
    pub bytes: u64,
    /// For how long a row's stream waited at most.
    pub longest_pause: Duration,
}

/// Something that snapshots can be had from.
pub trait Source: Send + Sync + std::fmt::Debug {
    /// Writes one, as fast as `out` takes it. Blocks.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    fn write(&self, out: &mut dyn Write) -> io::Result<Exported>;
}

/// Writes the rows behind `lanes`, and those that were restored and wait for their publisher.
pub(crate) fn write(lanes: &Lanes, shared: &Shared, out: &mut dyn Write) -> io::Result<Exported> {
    let fleet = &shared.fleet;
    let mut exported = Exported::default();
    let mut writer = SnapshotWriter::begin(out, &shared.tiers)?;
    let mut add = |(mark, image): (RowMark, RowImage)| {
        exported.rows += 1;
        writer.row(&mark, &image)
    };
    for (row, mark) in fleet.unclaimed() {
        if let Some(image) = fleet.index().export(row.slot) {
            // Whoever claimed it meanwhile has not begun to write: it is exported below, if at all.
            let still = lock(&fleet.restored).contains_key(&row.slot);
            if still {
                add((mark, image))?;
            }
        }
    }
    for pipe in lanes.pipes() {
        let begun = Instant::now();
        let row = export(&pipe);
        exported.longest_pause = exported.longest_pause.max(begun.elapsed());
        row.map_or(Ok(()), &mut add)?;
    }
    exported.bytes = writer.finish()?;
    Ok(exported)
}

/// A row, stopped for as long as it takes to copy it; none without a batch of its present life.
fn export(pipe: &Arc<Pipe>) -> Option<(RowMark, RowImage)> {
    pipe.hold(|applier| {
        let mark = applier.mark()?;
        Some((mark, applier.image()?))
    })?
}
