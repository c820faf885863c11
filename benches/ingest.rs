//! `cargo bench --bench ingest`: msgpack bytes → visible to lookups, on one core.
//!
//! Measures: decode + hash + apply of whole batches, as a lane does it; sockets excluded.
//! Model, of 16-token blocks, map form (vLLM ≥ 0.24) and array form:
//! *stores*: events of 32 blocks of prompts of 64, into an index that fills up to 131 072 blocks;
//! *steps*: an engine in steady state that holds 16 384 blocks: every step stores 1, 8 or 32 blocks
//! of a prompt that goes on and removes as many, one removal event per block;
//! *recorded*: the large recorded stream, rank 0, from its first batch to its last: 25 000 stores and
//! 17 000 removals.
//! Reads as: throughput in stored blocks per second (each with its removal). The target: at least
//! 3 M blocks/s for *stores*.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::{
    index::{IndexConfig, runs::RunIndex},
    ingest::{IngestConfig, bench::Lane},
    wire::{BatchReader, Event, Limits, Scratch, encode::Form},
};

/// Time for `stream` from batch `warm` on, each of the `rounds` on an index of its own.
fn play(stream: &[Vec<u8>], warm: usize, rounds: u64) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..rounds {
        let index = Arc::new(RunIndex::new(IndexConfig::default()));
        let mut lane = Lane::new(index, &IngestConfig::default());
        for (sequence, payload) in stream.iter().enumerate().take(warm) {
            lane.batch(sequence as u64, payload);
        }
        let start = Instant::now();
        for (sequence, payload) in stream.iter().enumerate().skip(warm) {
            lane.batch(sequence as u64, payload);
        }
        spent += start.elapsed();
        assert!(lane.blocks() > 0, "what was stored is held");
    }
    spent
}

/// Blocks that the batches store.
fn stored(stream: &[Vec<u8>]) -> u64 {
    let (limits, mut scratch, mut blocks) = (Limits::default(), Scratch::default(), 0);
    for payload in stream {
        let mut reader = BatchReader::new(payload, &limits).expect("a valid batch");
        while let Some(event) = reader.next_event(&mut scratch) {
            if let Event::Stored(store) = event.expect("a valid event") {
                blocks += store.block_hashes.len();
            }
        }
    }
    blocks as u64
}

fn ingest(c: &mut Criterion) {
    const CACHED: usize = 16_384;
    let mut group = c.benchmark_group("ingest/bytes_to_visible");
    group.sample_size(20);
    let mut bench = |name: &str, shape: &str, stream: &[Vec<u8>], warm: usize| {
        group.throughput(Throughput::Elements(stored(&stream[warm..])));
        group.bench_function(BenchmarkId::new(name, shape), |b| {
            b.iter_custom(|rounds| play(stream, warm, rounds));
        });
    };
    for (name, form) in [("map", Form::Map), ("array", Form::Array)] {
        bench(name, "32-block-stores", &common::stores(4096, 32, 57, form), 0);
        for blocks in [1, 8, 32] {
            let stream = common::steady_stream(4 * CACHED / blocks, blocks, CACHED, form);
            bench(name, &format!("{blocks}-block-steps"), &stream, CACHED / blocks);
        }
    }
    bench("recorded", "big_int_50k", &common::recorded(0), 0);
    group.finish();
}

criterion_group!(benches, ingest);
criterion_main!(benches);
