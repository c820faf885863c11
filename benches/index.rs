//! `cargo bench --bench index`: cost of storing, removing and looking up blocks.
//!
//! Measures: `BlockIndex` alone; hashing on the store side included, RPC excluded.
//! Model: `lookup`: `pods` pods hold one prompt in full; `half`: they stop at half; `miss`: nobody
//! has its first block. `store`/`remove`: one pod, prompts of 64 blocks, removed one by one.
//! Reads as: time per call; throughput in blocks per second.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::{
    index::{BlockIndex, IndexConfig, runs::RunIndex},
    model::EngineKey,
};
use std::hint::black_box;

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("index/lookup");
    for blocks in [128, 512, 4096] {
        for pods in [8, 64, 256] {
            let index = RunIndex::new(IndexConfig::default());
            let tokens = common::shared_prompt(&index, pods, blocks);
            let keys = common::keys(&tokens);
            let mut out = Vec::new();
            group.throughput(Throughput::Elements(u64::from(blocks)));
            let id = |case: &str| BenchmarkId::new(case, format!("{blocks}x{pods}"));
            group.bench_function(id("full"), |b| {
                b.iter(|| index.lookup(black_box(&keys), false, &mut out));
            });
            let (half, other) = keys.split_at(keys.len() / 2);
            let mut diverging = half.to_vec();
            diverging.extend(other.iter().map(|key| kv_indexer::model::RequestKey(!key.0)));
            group.bench_function(id("half"), |b| {
                b.iter(|| index.lookup(black_box(&diverging), false, &mut out));
            });
            group.bench_function(id("miss"), |b| {
                b.iter(|| index.lookup(black_box(other), false, &mut out));
            });
        }
    }
    group.finish();
}

fn write(c: &mut Criterion) {
    const PROMPTS: usize = 64;
    const BLOCKS: usize = 64;
    let mut random = common::Random(3);
    let prompts: Vec<(Vec<EngineKey>, Vec<u32>)> = (0..PROMPTS)
        .map(|_| {
            let keys = (0..BLOCKS).map(|_| EngineKey(random.next())).collect();
            (keys, random.tokens(BLOCKS as u32 * common::BLOCK))
        })
        .collect();
    let mut group = c.benchmark_group("index/write");
    group.throughput(Throughput::Elements((PROMPTS * BLOCKS) as u64));
    group.bench_function("store", |b| {
        b.iter_batched(
            || {
                let index = RunIndex::new(IndexConfig::default());
                let slot = index.register(common::spec()).expect("an empty index");
                (index, slot)
            },
            |(index, slot)| {
                for (keys, tokens) in &prompts {
                    common::store(&index, slot, keys, None, tokens);
                }
                index
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("remove", |b| {
        b.iter_batched(
            || {
                let index = RunIndex::new(IndexConfig::default());
                let slot = index.register(common::spec()).expect("an empty index");
                for (keys, tokens) in &prompts {
                    common::store(&index, slot, keys, None, tokens);
                }
                (index, slot)
            },
            |(index, slot)| {
                for key in prompts.iter().flat_map(|(keys, _)| keys.iter().rev()) {
                    common::remove(&index, slot, &[*key]);
                }
                index
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, lookup, write);
criterion_main!(benches);
