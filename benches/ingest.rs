//! `cargo bench --bench ingest`: msgpack bytes → visible to lookups, on one core.
//!
//! Measures: decode + hash + apply of whole batches, as a lane does it; sockets excluded.
//! Model: an engine in steady state that holds 16 384 blocks: every step stores 1, 8 or 32 blocks of a
//! prompt that goes on and removes as many, one removal event per block. Map form (vLLM ≥ 0.24) and
//! array form.
//! Reads as: throughput in stored blocks per second (each with its removal). The target of this
//! release: at least 1 M blocks/s per core, map form.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use std::{sync::Arc, time::Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::{
    index::{IndexConfig, runs::RunIndex},
    ingest::{IngestConfig, bench::Lane},
    wire::encode::Form,
};

fn ingest(c: &mut Criterion) {
    const CACHED: usize = 16_384;
    let mut group = c.benchmark_group("ingest/bytes_to_visible");
    group.sample_size(20);
    for (name, form) in [("map", Form::Map), ("array", Form::Array)] {
        for blocks in [1, 8, 32] {
            let steps = 4 * CACHED / blocks;
            let stream = common::steady_stream(steps, blocks, CACHED, form);
            let warm = CACHED / blocks;
            let measured = steps - warm;
            group.throughput(Throughput::Elements((measured * blocks) as u64));
            group.bench_function(BenchmarkId::new(name, format!("{blocks}-block-steps")), |b| {
                b.iter_custom(|rounds| {
                    let mut spent = std::time::Duration::ZERO;
                    for _ in 0..rounds {
                        let index = Arc::new(RunIndex::new(IndexConfig::default()));
                        let mut lane = Lane::new(index, &IngestConfig::default());
                        for (sequence, payload) in stream[..warm].iter().enumerate() {
                            lane.batch(sequence as u64, payload);
                        }
                        let start = Instant::now();
                        for (sequence, payload) in stream.iter().enumerate().skip(warm) {
                            lane.batch(sequence as u64, payload);
                        }
                        spent += start.elapsed();
                        assert!(lane.blocks() >= CACHED as u64, "the cache stays full");
                    }
                    spent
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, ingest);
criterion_main!(benches);
