//! Properties of the loader over arbitrary bytes, shared by the fuzz target in `tests/fuzz` and by the
//! replay of its corpus on a stable compiler. For tests only: a broken property panics.

use std::{io::Cursor, sync::Arc};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{MAGIC, RowMark, SnapshotWriter, VERSION, load, seed};
use crate::{
    hash::Models,
    index::{IndexConfig, runs::RunIndex},
    ingest::fleet::{Fleet, Row},
    model::TierTable,
};

fn fleet() -> Fleet {
    let config =
        IndexConfig { orphan_blocks: 64, cap_bytes: 32 << 20, max_pods: 8, ..Default::default() };
    Fleet::new(Arc::new(RunIndex::new(config)))
}

/// Loading returns, whatever the bytes; what it does not refuse can be written and loaded again, and
/// rows that are dropped leave nothing.
///
/// `data` is taken as a file as it is, and as sections without checksums (a byte with the kind, two
/// with the length, the payload), which then are given the right ones: otherwise a fuzzer would see
/// nothing but damaged files.
///
/// # Panics
///
/// If a property does not hold.
pub fn is_total(data: &[u8]) {
    check(data);
    check(&sealed(data));
}

/// A file of the sections in `data`, with checksums that hold.
#[must_use]
pub fn sealed(data: &[u8]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend_from_slice(&VERSION.to_le_bytes());
    let (mut rest, mut number) = (data, 0);
    while let [kind, low, high, tail @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(tail.len());
        let (payload, tail) = tail.split_at(length);
        let (kind, length) = (u32::from(*kind), length as u32);
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&length.to_le_bytes());
        let checksum = xxh3_64_with_seed(payload, seed(number, kind, length));
        file.extend_from_slice(&checksum.to_le_bytes());
        file.extend_from_slice(payload);
        number += 1;
        rest = tail;
    }
    file
}

/// The sections of a file without what [`sealed`] adds; for making a corpus.
#[must_use]
pub fn unsealed(file: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = file.get(12..).unwrap_or_default();
    while let [kind, _, _, _, a, b, c, d, _, _, _, _, _, _, _, _, tail @ ..] = rest {
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        let Some((payload, tail)) = tail.split_at_checked(length) else { break };
        let Ok(short) = u16::try_from(length) else { break };
        out.push(*kind);
        out.extend_from_slice(&short.to_le_bytes());
        out.extend_from_slice(payload);
        rest = tail;
    }
    out
}

fn check(file: &[u8]) {
    let (fleet, models) = (fleet(), Models::default());
    let tiers = TierTable::default();
    let loaded = match load(Cursor::new(file), &fleet, &models, &tiers) {
        Ok(loaded) => loaded,
        Err(error) => {
            assert!(!error.to_string().is_empty() && !error.reason().is_empty());
            assert!(fleet.table().rows.is_empty(), "{error}, and there are rows");
            assert_eq!(fleet.index().usage().keys, 0, "{error}, and something is left");
            return;
        }
    };
    let mut out = Vec::new();
    write(&fleet, &tiers, &mut out);
    let again = self::fleet();
    let reloaded = load(Cursor::new(&out), &again, &models, &tiers);
    let reloaded = reloaded.unwrap_or_else(|error| unreachable!("what was written: {error}"));
    assert_eq!((reloaded.rows, reloaded.blocks), (loaded.rows, loaded.blocks));
    assert!(reloaded.refused.is_empty(), "{:?}", reloaded.refused);
    assert_eq!(again.index().usage().keys, fleet.index().usage().keys);
    for ((row, mark), (new, again_mark)) in in_order(&fleet).iter().zip(in_order(&again)) {
        assert_eq!(*mark, again_mark);
        let (old, new) = (fleet.index().pod_usage(row.slot), again.index().pod_usage(new.slot));
        assert_eq!(old, new, "{}", row.id);
    }
    let count = fleet.table().rows.len();
    assert_eq!(fleet.drop_unclaimed(|_| true).len(), count);
    assert_eq!(fleet.index().usage().keys, 0, "rows leave something");
}

/// The restored rows in the order in which they were. On it depends which blocks lie in one run, and
/// so which of those that nobody holds any more are kept for what comes behind them.
fn in_order(fleet: &Fleet) -> Vec<(Arc<Row>, RowMark)> {
    let mut rows = fleet.unclaimed();
    rows.sort_unstable_by_key(|(row, _)| row.slot);
    rows
}

/// Writes the restored rows.
fn write(fleet: &Fleet, tiers: &TierTable, out: &mut Vec<u8>) {
    let wrote = (|| {
        let mut writer = SnapshotWriter::begin(out, tiers)?;
        for (row, mark) in in_order(fleet) {
            if let Some(image) = fleet.index().export(row.slot) {
                writer.row(&mark, &image)?;
            }
        }
        writer.finish()
    })();
    assert!(wrote.is_ok(), "{wrote:?}");
}
