//! `cargo bench --bench score`: cost of one score in process, tokens to rows.
//!
//! Measures: prompt → request keys → lookup, tiers included; what `Score` does between decoding
//! the request and encoding the answer.
//! Model: a 512-block prompt that 8, 64 or 256 pods hold in full.
//! Reads as: time per score. The target of this release: at most 60 µs at 64 pods.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kv_indexer::index::{BlockIndex, IndexConfig, runs::RunIndex};
use std::hint::black_box;

fn score(c: &mut Criterion) {
    let mut group = c.benchmark_group("score/tokens_to_rows");
    for pods in [8, 64, 256] {
        let index = RunIndex::new(IndexConfig::default());
        let tokens = common::shared_prompt(&index, pods, 512);
        let mut out = Vec::new();
        for (name, tiers) in [("depths", false), ("tiers", true)] {
            group.bench_function(BenchmarkId::new(name, format!("512x{pods}")), |b| {
                b.iter(|| {
                    let keys = common::keys(black_box(&tokens));
                    index.lookup(&keys, tiers, &mut out);
                    assert_eq!(out.len(), pods as usize);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, score);
criterion_main!(benches);
