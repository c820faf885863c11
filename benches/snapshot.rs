//! `cargo bench --bench snapshot`: what a snapshot costs, and for how long it stops a row's stream.
//!
//! Measures: export (the row's stream stands still, lookups go on), encoding into memory, and restoring
//! into an empty index.
//! Model: a row of a million blocks in prompts of 256; alone, and as the second of two rows that share
//! every block under engine keys of their own.
//! Reads as: milliseconds per million blocks; a row's pause is its share of them.

#![expect(clippy::print_stdout, clippy::expect_used, reason = "a bench tells its user")]

use std::{convert::Infallible, sync::Arc, time::Instant};

use kv_indexer::{
    hash::{Algorithm, Scheme},
    index::{Anchors, BlockIndex, ImageBuilder, IndexConfig, PodSpec, Store, runs::RunIndex},
    model::{CountMode, EngineKey, PodSlot},
};

const BLOCKS: u64 = 1_000_000;
const PROMPT: u64 = 256;

fn row(index: &RunIndex, salt: u64) -> PodSlot {
    let spec = PodSpec {
        scheme: Arc::new(Scheme::new(Algorithm::Xxh3, "", 16)),
        model: Arc::from("m"),
        count_mode: CountMode::Counted,
    };
    let slot = index.register(spec).expect("room");
    for prompt in 0..BLOCKS / PROMPT {
        let key = |at: u64| {
            EngineKey((prompt * PROMPT + at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt)
        };
        let keys: Vec<EngineKey> = (0..PROMPT).map(key).collect();
        let tokens: Vec<u32> =
            (0..PROMPT as u32 * 16).map(|at| at ^ (prompt as u32) << 12).collect();
        index.store(slot, &Store::simple(&keys, None, &tokens, 16));
    }
    slot
}

fn main() {
    let index = RunIndex::new(IndexConfig::default());
    println!("| row | export = pause, ms | encode, ms | bytes | bytes/block | restore, ms |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for (name, salt) in [("alone", 0), ("shared, own engine keys", 1 << 40)] {
        let slot = row(&index, salt);
        let mut best = f64::MAX;
        let mut image = None;
        for _ in 0..5 {
            let begun = Instant::now();
            image = index.export(slot);
            best = best.min(begun.elapsed().as_secs_f64());
        }
        let image = image.expect("a row");
        let blocks = image.blocks() as f64;
        let begun = Instant::now();
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let encoded: Result<(), Infallible> = image.encode(256 << 10, |part| {
            parts.push(part.to_vec());
            Ok(())
        });
        encoded.expect("memory");
        let encoding = begun.elapsed().as_secs_f64();
        let bytes: usize = parts.iter().map(Vec::len).sum();
        let begun = Instant::now();
        let mut builder = ImageBuilder::default();
        parts.iter().for_each(|part| builder.add(part).expect("what was encoded"));
        let new = RunIndex::new(IndexConfig::default());
        let spec = PodSpec {
            scheme: Arc::new(Scheme::new(Algorithm::Xxh3, "", 16)),
            model: Arc::from("m"),
            count_mode: CountMode::Counted,
        };
        let slot = new.register(spec).expect("room");
        new.restore(slot, &builder.finish(), &mut Anchors::default()).expect("what was exported");
        let restoring = begun.elapsed().as_secs_f64();
        assert_eq!(new.pod_usage(slot).blocks as f64, blocks);
        println!(
            "| {name} | {:.1} | {:.1} | {bytes} | {:.1} | {:.1} |",
            best * 1e3,
            encoding * 1e3,
            bytes as f64 / blocks,
            restoring * 1e3,
        );
    }
}
