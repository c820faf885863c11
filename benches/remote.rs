//! `cargo bench --bench remote`: a score over the `kv-indexer` service, as a request of the endpoint
//! picker waits for it.
//!
//! Measures: `PrefixIndex::score` over loopback gRPC, at 500 questions a second that are sent on time
//! whether or not the ones before are answered, and as fast as one caller can.
//! Model: a 512-block prompt that 64 pods hold in full; service and picker in one process.
//! Reads as: percentiles of the wait; CPU time of the whole process a question, the service's included.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a bench tells its user")]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kv_indexer::{
    epp::{
        datalayer::{EndpointInfo, EndpointName, Endpoints},
        precise::{
            Addressing, PrefixIndex, Query,
            remote::{RemoteConfig, connect},
        },
    },
    indexer::server::serve,
};
use prometheus::Registry;
use tokio::{net::TcpListener, runtime::Runtime, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

const PODS: u8 = 64;
const BLOCKS: u32 = 512;
const RATE: u32 = 500;

fn threads(name: &str) -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).thread_name(name).enable_all().build().expect("threads")
}

/// Serves an index in which all pods hold one prompt; returns where, and the prompt.
fn service(runtime: &Runtime) -> (String, Vec<u32>) {
    let (service, tokens) = common::service::filled(PODS.into(), BLOCKS);
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let (_, ready) = watch::channel(true);
    runtime.spawn(serve(listener, None, service, ready, CancellationToken::new(), Duration::ZERO));
    (address, tokens)
}

fn endpoints() -> Arc<Endpoints> {
    let endpoints = Arc::<Endpoints>::default();
    let info = |pod: u8| {
        let address = ([10, 0, 0, pod], 8000).into();
        EndpointInfo {
            name: EndpointName { namespace: "default".to_owned(), name: format!("pod-{pod}") },
            address,
            metrics_address: address,
            labels: Default::default(),
        }
    };
    endpoints.set((0..PODS).map(info).collect());
    endpoints
}

/// CPU time of this process, in seconds.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> =
        stat.split_whitespace().skip(13).take(2).filter_map(|ticks| ticks.parse().ok()).collect();
    fields.iter().sum::<f64>() / 100.0
}

fn report(name: &str, mut waits: Vec<Duration>, cpu: f64) {
    waits.sort_unstable();
    let at = |part: f64| waits[((waits.len() - 1) as f64 * part) as usize];
    println!(
        "{name}: {} answers, p50 {:?}, p90 {:?}, p99 {:?}, max {:?}, {:.0} µs of CPU each",
        waits.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0),
        cpu * 1e6 / waits.len() as f64
    );
}

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let seconds = if std::env::args().any(|arg| arg == "--bench") { 10 } else { 1 };
    let (servers, pickers) = (threads("service"), threads("picker"));
    let (address, tokens) = service(&servers);
    let endpoints = endpoints();
    let config = RemoteConfig {
        address,
        deadline: Duration::from_secs(1),
        tls: None,
        failures: 5,
        half_open: Duration::from_millis(250),
    };
    let (index, task) = connect(config, &endpoints, &Registry::new()).expect("an address");
    pickers.spawn(task(CancellationToken::new()));
    let addressing =
        Addressing { model: "model".into(), lora: "".into(), scheme: common::scheme() };
    let query = Query { addressing, prompts: vec![common::keys(&tokens)].into() };
    let list = endpoints.list();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        while index.score(&query, &list).await.is_err() {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let ask = |index: Arc<dyn PrefixIndex>, due: Instant| {
            let (query, list) = (query.clone(), Arc::clone(&list));
            async move {
                // A machine that cannot keep up has fewer answers.
                let found = index.score(&query, &list).await.ok()?;
                assert!(found.iter().all(|found| found.depth == BLOCKS));
                Some(due.elapsed())
            }
        };
        let (used, mut calls) = (cpu(), JoinSet::new());
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE);
        for _ in 0..RATE * seconds {
            let due = ticks.tick().await;
            calls.spawn(ask(Arc::clone(&index), due.into_std()));
        }
        let waits = calls.join_all().await.into_iter().flatten().collect();
        report("500/s", waits, cpu() - used);

        let (used, start, mut waits) = (cpu(), Instant::now(), Vec::new());
        while start.elapsed() < Duration::from_secs(seconds.into()) {
            waits.extend(ask(Arc::clone(&index), Instant::now()).await);
        }
        report("one after the other", waits, cpu() - used);
    });
    servers.shutdown_background();
    pickers.shutdown_background();
}
