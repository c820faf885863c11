//! `cargo bench --bench decode`: cost of decoding event batches.
//!
//! Measures: `BatchReader::new` and every event of a batch, scratch space reused.
//! Model: an engine in steady state, 8 blocks stored per step, one removal event per stored block.
//! Reads as: time for 256 batches; throughput in stored blocks per second.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::wire::{BatchReader, Limits, Scratch, encode::Form};
use std::hint::black_box;

fn decode(c: &mut Criterion) {
    const STEPS: usize = 256;
    const BLOCKS: usize = 8;
    let limits = Limits::default();
    let mut group = c.benchmark_group("wire/decode");
    group.throughput(Throughput::Elements((STEPS * BLOCKS) as u64));
    for (name, form) in [("map", Form::Map), ("array", Form::Array)] {
        let stream = common::steady_stream(STEPS, BLOCKS, 64, form);
        let mut scratch = Scratch::default();
        group.bench_function(name, |b| {
            b.iter(|| {
                for payload in &stream {
                    let mut reader = BatchReader::new(payload, &limits).expect("a valid batch");
                    while let Some(event) = reader.next_event(&mut scratch) {
                        black_box(event).expect("a valid event");
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
