//! `cargo bench --bench schedule`: cost of one scheduling cycle.
//!
//! Measures: `Scheduler::schedule` alone, for 5, 25 and 100 endpoints with random load.
//! `default` has the default scorers (queue 2, cache 2) and `max-score-picker`; `wide` four scorers;
//! `timed` is `default` with a timer on every plugin.
//! Reads as: time per request; throughput in endpoints per second.

#![expect(clippy::expect_used, reason = "a bench has nobody to tell")]

mod common;

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kv_indexer::epp::{
    datalayer::{Endpoint, EndpointId, EndpointInfo, EndpointName, Metrics, UnknownMetrics},
    ext_proc::headers::HeaderList,
    plugins::{
        kv_cache_utilization_scorer::KvCacheUtilizationScorer,
        lora_affinity_scorer::LoraAffinityScorer, max_score_picker::MaxScorePicker,
        queue_scorer::QueueScorer, running_requests_size_scorer::RunningRequestsSizeScorer,
        single_profile_handler::SingleProfileHandler,
    },
    request::{Api, InferenceRequest, Parsed},
    scheduling::{Configured, Cycle, Plugin, PluginTimer, Produced, Scheduler, SchedulingProfile},
};

fn named(plugin: impl Plugin) -> Configured {
    Configured { name: plugin.type_name().into(), plugin: Arc::new(plugin) }
}

fn scheduler(scorers: Vec<Configured>) -> Scheduler {
    let profile = SchedulingProfile {
        name: "default".into(),
        filters: Vec::new(),
        scorers: scorers.into_iter().map(|scorer| (scorer, 2.0)).collect(),
        picker: named(MaxScorePicker::default()),
    };
    Scheduler::new(named(SingleProfileHandler), vec![profile])
}

#[derive(Debug, Default)]
struct Sum(AtomicU64);

impl PluginTimer for Sum {
    fn ran(&self, took: Duration) {
        self.0.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }
}

fn fleet(count: u32) -> (Vec<Arc<Endpoint>>, Vec<Arc<Metrics>>) {
    let mut random = common::Random(1);
    let endpoint = |at: u32| {
        let address = format!("10.0.0.{at}:8000").parse().expect("an address");
        let name = EndpointName { namespace: "default".to_owned(), name: format!("pod-{at}") };
        let labels = [("llm-d.ai/role".to_owned(), "decode".to_owned())].into();
        let info = EndpointInfo { name, address, metrics_address: address, labels };
        Arc::new(Endpoint::new(EndpointId(at.into()), info))
    };
    let mut below = |limit: u64| random.next() % limit;
    let metrics = (0..count).map(|_| {
        Arc::new(Metrics {
            waiting: below(20),
            running: below(100),
            kv_usage: below(1000) as f64 / 1000.0,
            updated: Some(Instant::now()),
            ..Metrics::default()
        })
    });
    let metrics = metrics.collect();
    ((0..count).map(endpoint).collect(), metrics)
}

fn request() -> InferenceRequest {
    InferenceRequest {
        id: "request".into(),
        headers: HeaderList::default(),
        parsed: Parsed {
            api: Api::Completions,
            model: "model".to_owned(),
            model_span: None,
            stream: false,
            max_output_tokens: None,
            cache_salt: None,
            prompt: smallvec::SmallVec::new(),
            tools: None,
            usage_edit: None,
            multimodal: false,
        },
        body: bytes::Bytes::new(),
        target_model: "model".into(),
        fairness_id: "default-flow".into(),
        priority: 0,
        received: Instant::now(),
    }
}

fn schedule(c: &mut Criterion) {
    let default = || vec![named(QueueScorer), named(KvCacheUtilizationScorer)];
    let mut wide = default();
    wide.extend([named(RunningRequestsSizeScorer), named(LoraAffinityScorer)]);
    let timed = scheduler(default()).with_timers(|_, _| Some(Arc::<Sum>::default()));
    let schedulers =
        [("default", scheduler(default())), ("wide", scheduler(wide)), ("timed", timed)];
    let (request, produced) = (request(), Produced::new());
    let mut group = c.benchmark_group("epp/schedule");
    for count in [5, 25, 100] {
        let (endpoints, metrics) = fleet(count);
        let cycle = Cycle {
            request: &request,
            endpoints: &endpoints,
            metrics: &metrics,
            produced: &produced,
            unknown_metrics: UnknownMetrics::AsWorst,
            now: Instant::now(),
        };
        group.throughput(Throughput::Elements(count.into()));
        for (name, scheduler) in &schedulers {
            group.bench_with_input(BenchmarkId::new(*name, count), &cycle, |b, cycle| {
                b.iter(|| scheduler.schedule(black_box(cycle)).expect("somebody is there"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, schedule);
criterion_main!(benches);
