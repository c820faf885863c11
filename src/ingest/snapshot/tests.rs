//! The format: round trips, every cut, every flipped bit, other settings.

use std::io::Cursor;

use super::{fuzz, *};
use crate::{
    hash::{Algorithm, Scheme},
    index::{IndexConfig, Remove, Store, runs::RunIndex},
    model::{EngineKey, GroupKind},
};

fn fleet() -> Fleet {
    Fleet::new(Arc::new(RunIndex::new(IndexConfig::default())))
}

fn mark(pod: &str, rank: Option<u32>, models: &Models) -> RowMark {
    RowMark {
        id: RowId { pod: Arc::from(pod), rank },
        lead: true,
        endpoint: Arc::from("tcp://127.0.0.1:1"),
        model: Arc::from("m"),
        fingerprint: models.scheme("m").fingerprint(),
        epoch: 3,
        sequence: 17,
        payload_hash: 0x1234,
        newest: 1.5,
        trust: PodState::Live,
        damaged: None,
        muted: false,
        capped: false,
    }
}

/// Two rows of 16-token blocks that share a prefix, with what is not plain: another tier, a second
/// copy, odd sizes, an orphan, a hole.
fn sample(models: &Models) -> Vec<u8> {
    let (fleet, tiers) = (fleet(), TierTable::default());
    let cpu = tiers.id(Some("cpu"));
    let tokens: Vec<u32> = (0..96).collect();
    let mut out = Vec::new();
    let mut writer = SnapshotWriter::begin(&mut out, &tiers).unwrap();
    for (at, pod) in ["a", "b"].into_iter().enumerate() {
        let mark = mark(pod, Some(at as u32), models);
        let (scheme, model) = (models.scheme("m"), Arc::from("m"));
        let row = fleet.add(mark.id.clone(), "", scheme, &model, CountMode::Counted).unwrap();
        let index = fleet.index();
        let keys: Vec<EngineKey> = (1..7).map(EngineKey).collect();
        index.store(row.slot, &Store::simple(&keys, None, &tokens, 16));
        index.store(
            row.slot,
            &Store { tier: cpu, ..Store::simple(&keys[..2], None, &tokens[..32], 16) },
        );
        index.store(row.slot, &Store::simple(&keys[..1], None, &tokens[..16], 16));
        let small = [EngineKey(50), EngineKey(51), EngineKey(52)];
        index.store(
            row.slot,
            &Store { lora: Some("l"), ..Store::simple(&small, Some(keys[1]), &tokens[..24], 8) },
        );
        let orphan = [EngineKey(60)];
        index.store(row.slot, &Store::simple(&orphan, Some(EngineKey(61)), &tokens[..16], 16));
        let window = Store {
            group: Some(1),
            kind: Some(GroupKind::Sliding { window: 32 }),
            ..Store::simple(&keys[..2], None, &tokens[..32], 16)
        };
        index.store(row.slot, &window);
        let tier = TierTable::GPU;
        let removed = [keys[3]];
        index.remove(row.slot, &Remove { keys: &removed, group: None, tier, sequence: 9 });
        writer.row(&mark, &index.export(row.slot).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    out
}

fn loads(bytes: &[u8], models: &Models) -> Result<(Fleet, Loaded), SnapshotError> {
    let fleet = fleet();
    let loaded = load(Cursor::new(bytes), &fleet, models, &TierTable::default())?;
    Ok((fleet, loaded))
}

#[test]
fn what_is_written_is_what_is_loaded() {
    let models = Models::default();
    let bytes = sample(&models);
    let (fleet, loaded) = loads(&bytes, &models).unwrap();
    assert_eq!((loaded.rows, loaded.refused.len()), (2, 0));
    // Five plain ones, three small ones, two of a window, one that waits.
    assert_eq!(loaded.blocks, 22);
    for (row, mark) in fleet.unclaimed() {
        assert_eq!(mark, self::mark(&mark.id.pod, mark.id.rank, &models));
        let usage = fleet.index().pod_usage(row.slot);
        assert_eq!((usage.blocks, usage.orphans, usage.repeated), (11, 1, 1));
        assert_eq!(usage.loras.len(), 1);
        assert_eq!(row.trust(), (PodState::Replaying, true));
        assert_eq!(row.now().applied, Some(17));
    }
    fuzz::is_total(&bytes);
    assert_eq!(fuzz::sealed(&fuzz::unsealed(&bytes)), bytes);
    assert!(fleet.drop_unclaimed(|mark| &*mark.id.pod == "a").len() == 1);
    assert_eq!(fleet.table().rows.len(), 1);
}

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    let models = Models::default();
    let bytes = sample(&models);
    for length in 0..bytes.len() {
        let error = loads(&bytes[..length], &models).unwrap_err();
        let cut = matches!(error, SnapshotError::Cut(_))
            || (length < 8 && matches!(error, SnapshotError::Foreign));
        assert!(cut, "{length} bytes: {error}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let error = loads(&flipped, &models).unwrap_err();
            assert!(!matches!(error, SnapshotError::Read(_)), "byte {at}: {error}");
        }
    }
    let longer = [&bytes[..], b"x"].concat();
    assert!(matches!(loads(&longer, &models), Err(SnapshotError::Damaged(_))));
    let twice = [&bytes[..], &bytes[..]].concat();
    assert!(matches!(loads(&twice, &models), Err(SnapshotError::Damaged(_))));
}

#[test]
fn other_settings_and_names_are_refused_row_by_row() {
    let models = Models::default();
    let bytes = sample(&models);
    let mut other = Models::default();
    other.listed.insert("m".into(), Arc::new(Scheme::new(Algorithm::Xxh3, "seed", 16)));
    let (fleet, loaded) = loads(&bytes, &other).unwrap();
    assert_eq!((loaded.rows, loaded.refused.len()), (0, 2));
    assert!(loaded.refused[0].1.contains("other settings"), "{:?}", loaded.refused);
    assert!(fleet.table().rows.is_empty());
    let mut renamed = Models::default();
    renamed.aliases.insert("m".into(), "n".into());
    assert_eq!(loads(&bytes, &renamed).unwrap().1.refused.len(), 2);
    let version = [&MAGIC[..], &9u32.to_le_bytes()].concat();
    assert!(matches!(loads(&version, &models), Err(SnapshotError::Version(9))));
    assert!(matches!(loads(b"", &models), Err(SnapshotError::Foreign)));
}

#[test]
fn a_length_does_not_make_it_allocate() {
    let models = Models::default();
    // A section that claims 255 MiB, and a chain that claims four billion blocks.
    let mut claims = [&MAGIC[..], &VERSION.to_le_bytes(), &START.to_le_bytes()].concat();
    claims.extend_from_slice(&(255u32 << 20).to_le_bytes());
    claims.extend_from_slice(&[0; 8]);
    assert!(matches!(loads(&claims, &models), Err(SnapshotError::Cut(0))));
    let mut builder = ImageBuilder::default();
    let part =
        [&[2u8][..], &1u32.to_le_bytes(), &0u32.to_le_bytes(), &[0xff; 4], &[0; 64]].concat();
    assert_eq!(builder.add(&part), Err(ImageError::Truncated));
}

/// Sections that are consistent in themselves and say what no index would: `SNAPSHOT_ROUNDS` of them
/// make it a soak.
#[test]
fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let rounds = std::env::var("SNAPSHOT_ROUNDS").ok().map_or(300, |text| text.parse().unwrap());
    let sample = fuzz::unsealed(&sample(&Models::default()));
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..rounds {
        let mut bytes = sample.clone();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len());
            match random.u8(..6) {
                0 => bytes[at] = random.u8(..),
                1 => bytes[at] ^= 1 << random.u8(..8),
                2 => bytes[at] = bytes[at].wrapping_add(1),
                3 => bytes[at] = 0,
                4 => {
                    let from = random.usize(..bytes.len());
                    let count = random.usize(..24).min(bytes.len() - at.max(from));
                    bytes.copy_within(from..from + count, at);
                }
                _ => drop(bytes.drain(at..(at + random.usize(..12)).min(bytes.len()))),
            }
        }
        fuzz::is_total(&bytes);
    }
}
