//! `cargo bench --bench hash`: cost of turning a prompt into request keys.
//!
//! Measures: `Prompt::keys` for each algorithm, 512 blocks of 16 random tokens.
//! Reads as: time per prompt; throughput in blocks per second. `floor` is XXH3 over the same bytes
//! in one call: what no chained hash can beat.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::hash::{Algorithm, Prompt, Scheme};
use std::hint::black_box;

fn keys(c: &mut Criterion) {
    const BLOCKS: u32 = 512;
    let tokens = common::Random(1).tokens(BLOCKS * common::BLOCK);
    let mut group = c.benchmark_group("hash/prompt_keys");
    group.throughput(Throughput::Elements(u64::from(BLOCKS)));
    for algorithm in [Algorithm::Xxh3, Algorithm::Xxh64, Algorithm::CborFnv] {
        let scheme = Scheme::new(algorithm, "", common::BLOCK);
        let prompt = Prompt { model: "model", tokens: &tokens, ..Prompt::default() };
        group.bench_function(algorithm.as_str(), |b| {
            b.iter(|| black_box(&prompt).keys(&scheme).expect("no items"));
        });
    }
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    group.bench_function("floor", |b| {
        b.iter(|| xxhash_rust::xxh3::xxh3_64(black_box(&bytes)));
    });
    group.finish();
}

criterion_group!(benches, keys);
criterion_main!(benches);
