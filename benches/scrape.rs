//! `cargo bench --bench scrape`: cost of reading metrics pages.
//!
//! Measures: `PageReader`, begin to finish, over a page in chunks of the size in which it comes.
//! Model: a vLLM page of 100 kB, nearly all of it histograms, and one with nothing but what is wanted.
//! Reads as: time per page. The target of this release: at most 15 µs for 100 kB.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::epp::datalayer::{
    Metrics,
    engines::{Engine, PageReader, builtin},
};
use std::{hint::black_box, sync::Arc};

const PAGE: &str = include_str!("../tests/fixtures/metrics/vllm-100k.prom");

fn scrape(c: &mut Criterion) {
    let wanted = ["num_requests", "kv_cache_usage", "cache_config", "lora_requests"];
    let tiny: Vec<&str> = PAGE
        .lines()
        .filter(|line| wanted.iter().any(|name| line.contains(&format!("vllm:{name}"))))
        .collect();
    let tiny = tiny.join("\n") + "\n";
    let vllm = builtin().into_iter().find(|engine| engine.name == "vllm");
    let engine = Arc::new(Engine::new(&vllm.expect("it is built in")));
    let mut group = c.benchmark_group("scrape/page");
    for (name, page) in [("vllm_100k", PAGE), ("tiny", &tiny)] {
        group.throughput(Throughput::Bytes(page.len() as u64));
        let mut reader = PageReader::new(Arc::clone(&engine));
        let mut metrics = Metrics::default();
        group.bench_function(name, |b| {
            b.iter(|| {
                reader.begin();
                for chunk in black_box(page).as_bytes().chunks(64 << 10) {
                    reader.feed(chunk);
                }
                assert_eq!(reader.finish(&mut metrics).faults, 0);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, scrape);
criterion_main!(benches);
