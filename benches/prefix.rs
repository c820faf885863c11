//! `cargo bench --bench prefix`: cost of approximate prefix matching for one request.
//!
//! Measures: hashing a prompt of 2, 32 and 256 KiB into blocks of 256 bytes; matching it against 8 and
//! 64 endpoints whose stores are full (31 250 blocks each), where all hold half of it (`half`) or
//! nobody any of it (`cold`); remembering it for one endpoint, new to it (`new`) or not (`known`).
//! Reads as: time per request.

use std::{
    collections::BTreeMap,
    hint::black_box,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::epp::{
    datalayer::{EndpointInfo, EndpointName, Endpoints},
    plugins::prefix::{BlockHasher, Chains, PrefixStore},
};

const BLOCK: usize = 256;
const CAPACITY: usize = 31_250;
const SIZES: [usize; 3] = [2 << 10, 32 << 10, 256 << 10];

fn endpoints(count: u8) -> Arc<Endpoints> {
    let endpoints = Arc::new(Endpoints::new());
    for number in 0..count {
        let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, number), 8000));
        endpoints.upsert(EndpointInfo {
            name: EndpointName { namespace: "default".to_owned(), name: format!("pod-{number}") },
            address,
            metrics_address: address,
            labels: BTreeMap::new(),
        });
    }
    endpoints
}

/// A text of which every block is unlike those of other seeds.
fn prompt(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..bytes).map(|_| random.alphanumeric() as u8).collect()
}

fn hash(text: &[u8]) -> Chains {
    let mut hasher = BlockHasher::new("model", "", BLOCK, usize::MAX, true);
    hasher.expect(text.len());
    hasher.push(text);
    hasher.finish()
}

/// Chains of made-up hashes, which cost nothing to make.
fn filler(random: &mut fastrand::Rng, blocks: usize) -> Chains {
    let hashes: Vec<u64> = (0..blocks).map(|_| random.u64(..)).collect();
    let mut chains = Chains::default();
    chains.push(&hashes);
    chains
}

fn hashing(c: &mut Criterion) {
    let mut group = c.benchmark_group("prefix/hash");
    for bytes in SIZES {
        let text = prompt(1, bytes);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |b| {
            b.iter(|| hash(black_box(&text)));
        });
    }
    group.finish();
}

fn matching(c: &mut Criterion) {
    let mut group = c.benchmark_group("prefix/match");
    for count in [8, 64] {
        let endpoints = endpoints(count);
        let list = endpoints.list();
        for bytes in SIZES {
            let store = PrefixStore::new(&endpoints);
            let mut random = fastrand::Rng::with_seed(2);
            let text = prompt(3, bytes);
            for endpoint in list.iter() {
                for _ in 0..CAPACITY / 500 {
                    store.insert(endpoint.id(), &filler(&mut random, 500), CAPACITY);
                }
                store.insert(endpoint.id(), &hash(&text[..bytes / 2]), CAPACITY);
            }
            let (half, cold) = (hash(&text), hash(&prompt(4, bytes)));
            for (name, chains) in [("half", &half), ("cold", &cold)] {
                let id = BenchmarkId::new(format!("{count}_endpoints/{name}"), bytes);
                group.bench_function(id, |b| b.iter(|| store.matches(black_box(chains), &list)));
            }
        }
    }
    group.finish();
}

fn remembering(c: &mut Criterion) {
    let mut group = c.benchmark_group("prefix/insert");
    let endpoints = endpoints(64);
    let list = endpoints.list();
    for bytes in SIZES {
        let store = PrefixStore::new(&endpoints);
        let mut random = fastrand::Rng::with_seed(5);
        for endpoint in list.iter() {
            for _ in 0..CAPACITY / 500 + 1 {
                store.insert(endpoint.id(), &filler(&mut random, 500), CAPACITY);
            }
        }
        let blocks = bytes.div_ceil(BLOCK);
        let fresh: Vec<Chains> = (0..256).map(|_| filler(&mut random, blocks)).collect();
        let mut turn = 0;
        group.bench_function(BenchmarkId::new("new", bytes), |b| {
            b.iter(|| {
                turn += 1;
                // 64 endpoints in turn, so that none has a prompt twice before it was evicted.
                let endpoint = &list[turn % 64];
                store.insert(endpoint.id(), &fresh[turn / 64 % 256], CAPACITY)
            });
        });
        let known = hash(&prompt(6, bytes));
        group.bench_function(BenchmarkId::new("known", bytes), |b| {
            b.iter(|| {
                turn += 1;
                store.insert(list[turn % 64].id(), black_box(&known), CAPACITY)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, hashing, matching, remembering);
criterion_main!(benches);
