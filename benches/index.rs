//! `cargo bench --bench index`: cost of storing, removing and looking up blocks.
//!
//! Measures: `RunIndex` alone, and beside it as `dashmap` the map that one would write first
//! (benches/common/baseline.rs); hashing on the store side included, RPC excluded.
//! Model: `lookup`: `pods` pods hold one prompt in full; `half`: they stop at half; `miss`: nobody
//! has its first block. `store`/`remove`: one pod, prompts of 64 blocks, removed one by one.
//! Reads as: time per call; throughput in blocks per second.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::{
    index::{BlockIndex, IndexConfig, runs::RunIndex},
    model::{EngineKey, PodSlot, RequestKey},
};
use std::hint::black_box;

use self::common::baseline::MapIndex;

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("index/lookup");
    for blocks in [128, 512, 4096] {
        for pods in [8, 64, 256] {
            let index = RunIndex::new(IndexConfig::default());
            let tokens = common::shared_prompt(&index, pods, blocks);
            let keys = common::keys(&tokens);
            let map = MapIndex::new(pods);
            for pod in 0..pods {
                let engine = engine_keys(1000 + u64::from(pod), blocks as usize);
                map.store(PodSlot(pod), &engine, None, &tokens);
            }
            let (half, other) = keys.split_at(keys.len() / 2);
            let diverging: Vec<RequestKey> =
                half.iter().copied().chain(other.iter().map(|key| RequestKey(!key.0))).collect();
            group.throughput(Throughput::Elements(u64::from(blocks)));
            for (case, keys) in [("full", &*keys), ("half", &diverging), ("miss", other)] {
                let (mut matches, mut want, mut got) = (Vec::new(), Vec::new(), Vec::new());
                index.depths(keys, &mut want);
                map.depths(keys, &mut got);
                assert_eq!(got, want, "both answer alike");
                let of = |case: String| BenchmarkId::new(case, format!("{blocks}x{pods}"));
                group.bench_function(of(case.to_owned()), |b| {
                    b.iter(|| index.lookup(black_box(keys), false, &mut matches));
                });
                group.bench_function(of(format!("{case}/dashmap")), |b| {
                    b.iter(|| map.depths(black_box(keys), &mut got));
                });
            }
        }
    }
    group.finish();
}

fn engine_keys(seed: u64, count: usize) -> Vec<EngineKey> {
    let mut random = common::Random(seed);
    (0..count).map(|_| EngineKey(random.next())).collect()
}

fn write(c: &mut Criterion) {
    const PROMPTS: usize = 64;
    const BLOCKS: usize = 64;
    let mut random = common::Random(3);
    let prompts: Vec<(Vec<EngineKey>, Vec<u32>)> = (0..PROMPTS)
        .map(|_| {
            let keys = engine_keys(random.next(), BLOCKS);
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
    let fill = |map: MapIndex| {
        for (keys, tokens) in &prompts {
            map.store(PodSlot(0), keys, None, tokens);
        }
        map
    };
    group.bench_function("store/dashmap", |b| {
        b.iter_batched(|| MapIndex::new(1), fill, BatchSize::SmallInput);
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
    group.bench_function("remove/dashmap", |b| {
        b.iter_batched(
            || fill(MapIndex::new(1)),
            |map| {
                for key in prompts.iter().flat_map(|(keys, _)| keys.iter().rev()) {
                    map.remove(PodSlot(0), &[*key]);
                }
                map
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, lookup, write);
criterion_main!(benches);
