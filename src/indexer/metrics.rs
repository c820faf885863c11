//! Prometheus metrics of the score path and of the fleet.
//!
//! [`ScoreMetrics`] is written by calls; its handles are resolved once. [`FleetCollector`] reads
//! rows and index when it is scraped, so that a pod's series vanish with the pod. Label values are
//! enums, tier names (at most 16) and the ids of registered rows (at most `maxPods`). What the
//! ingest path counts is in `ingest`.
//!
//! # llm-d's names
//!
//! With `llmd`, the series of llm-d's indexer that mean the same here exist under their full names,
//! `llm_d_epp_kv_cache_index_*`, so that its dashboards keep working. Those of ingest come with
//! [`llmd::register`].

pub mod llmd;
pub mod snapshot;

use std::{sync::Arc, time::Duration};

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use tonic::Code;

pub use crate::ingest::metrics::FleetCollector;
use crate::{indexer::server::gate::Refusal, support::tls::ReloadMetrics};

/// A call takes some 20 µs for a short prompt and milliseconds for 100 000 tokens or a batch; what
/// takes longer is a tokenizer or a stall. Prometheus' default buckets start at 5 ms.
const CALL_SECONDS: [f64; 13] =
    [1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 2.5e-2, 0.25];

/// One prompt in the index: below a microsecond when nothing matches, some 10 ns a block otherwise.
const LOOKUP_SECONDS: [f64; 10] = [5e-7, 1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 1e-4, 5e-4, 1e-3, 1e-2];

/// What is counted of the gRPC listener's certificate.
///
/// # Errors
///
/// When the registry has it already.
pub fn reload_metrics(registry: &Registry) -> prometheus::Result<ReloadMetrics> {
    let help = "Changed certificate files: in use, or not usable.";
    let opts = Opts::new("kv_certificate_reloads_total", help);
    let reloads = add(registry, IntCounterVec::new(opts, &["outcome"])?)?;
    let outcome = |name| reloads.with_label_values(&[name]);
    Ok(ReloadMetrics { loaded: outcome("loaded"), failed: outcome("failed") })
}

/// Connections of the gRPC listener, and who was refused at either listener. Clones share one state.
#[derive(Clone, Debug)]
pub struct ServerMetrics {
    /// Connections of the gRPC listener.
    pub connections: IntGauge,
    refused: IntCounterVec,
}

impl ServerMetrics {
    /// Creates the metrics and registers them.
    ///
    /// # Errors
    ///
    /// When the registry has one already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let opts = Opts::new("kv_refused_total", "What callers were refused, by reason.");
        let refused = add(registry, IntCounterVec::new(opts, &["reason"])?)?;
        let denials = ["no_token", "wrong_token", "closed"];
        for reason in denials.into_iter().chain(Refusal::ALL.map(Refusal::reason)) {
            refused.with_label_values(&[reason]);
        }
        let connections =
            IntGauge::new("kv_grpc_connections", "Open connections of the gRPC API.")?;
        Ok(Self { connections: add(registry, connections)?, refused })
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }
}

/// The calls that score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rpc {
    /// `kvindexer.v1.KvIndexer/Score`.
    Score,
    /// One request of `kvindexer.v1.KvIndexer/ScoreStream`.
    ScoreStream,
    /// `indexer.v1.IndexerService/GetPodScores`.
    GetPodScores,
}

impl Rpc {
    /// Every call, in the order of its label.
    pub const ALL: [Self; 3] = [Self::Score, Self::ScoreStream, Self::GetPodScores];

    /// Label value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Score => "score",
            Self::ScoreStream => "score_stream",
            Self::GetPodScores => "get_pod_scores",
        }
    }
}

/// Codes that a scoring call ends with; others count as `unknown`.
const CODES: [(Code, &str); 8] = [
    (Code::Ok, "ok"),
    (Code::InvalidArgument, "invalid_argument"),
    (Code::FailedPrecondition, "failed_precondition"),
    (Code::Unimplemented, "unimplemented"),
    (Code::DeadlineExceeded, "deadline_exceeded"),
    (Code::ResourceExhausted, "resource_exhausted"),
    (Code::Unavailable, "unavailable"),
    (Code::Unknown, "unknown"),
];

/// Counters and histograms of the score path; clones share them.
#[derive(Clone, Debug)]
pub struct ScoreMetrics {
    calls: Arc<[CallMetrics; 3]>,
    prompts: IntCounter,
    blocks: IntCounter,
    hit_blocks: IntCounter,
    lookups: Histogram,
    llmd: Option<LlmdLookups>,
}

#[derive(Debug)]
struct CallMetrics {
    seconds: Histogram,
    by_code: [IntCounter; CODES.len()],
}

/// llm-d's lookup series.
#[derive(Clone, Debug)]
struct LlmdLookups {
    requests: IntCounter,
    hits: IntCounter,
    best: IntCounter,
    seconds: Histogram,
}

impl ScoreMetrics {
    /// Creates the metrics and registers them; `llmd` adds llm-d's names.
    ///
    /// # Errors
    ///
    /// When `registry` already holds a metric of the same name.
    pub fn register(registry: &Registry, llmd: bool) -> prometheus::Result<Self> {
        let seconds = add(
            registry,
            HistogramVec::new(
                HistogramOpts::new(
                    "kv_score_seconds",
                    "Time from a request's arrival to its answer.",
                )
                .buckets(CALL_SECONDS.to_vec()),
                &["rpc"],
            )?,
        )?;
        let requests = add(
            registry,
            IntCounterVec::new(
                Opts::new("kv_score_requests_total", "Score requests answered, by status code."),
                &["rpc", "code"],
            )?,
        )?;
        let call = |rpc: Rpc| CallMetrics {
            seconds: seconds.with_label_values(&[rpc.as_str()]),
            by_code: CODES.map(|(_, code)| requests.with_label_values(&[rpc.as_str(), code])),
        };
        let counter = |name: &str, help: &str| add(registry, IntCounter::new(name, help)?);
        let blocks =
            counter("kv_score_blocks_total", "Full blocks of the prompts that were scored.")?;
        let hit_blocks = counter(
            "kv_score_hit_blocks_total",
            "Leading blocks that the best pod of each answer holds, speculative ones included.",
        )?;
        registry.register(Box::new(HitRatio::new(blocks.clone(), hit_blocks.clone())?))?;
        Ok(Self {
            calls: Arc::new(Rpc::ALL.map(call)),
            prompts: counter("kv_score_prompts_total", "Prompts scored.")?,
            blocks,
            hit_blocks,
            lookups: add(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "kv_index_lookup_seconds",
                        "Time of one prompt's lookup in the index, hashing excluded.",
                    )
                    .buckets(LOOKUP_SECONDS.to_vec()),
                )?,
            )?,
            llmd: llmd.then(|| LlmdLookups::register(registry)).transpose()?,
        })
    }

    /// Counts the answer to one request, `took` after its arrival.
    pub fn answered(&self, rpc: Rpc, code: Code, took: Duration) {
        let Some(call) = self.calls.get(rpc as usize) else { return };
        call.seconds.observe(took.as_secs_f64());
        let known = CODES.iter().position(|&(known, _)| known == code);
        if let Some(counter) = call.by_code.get(known.unwrap_or(CODES.len() - 1)) {
            counter.inc();
        }
    }

    /// Counts one scored prompt of `blocks` blocks, of which the best pod holds the first `best`.
    pub fn prompt(&self, blocks: usize, best: u32) {
        self.prompts.inc();
        self.blocks.inc_by(blocks as u64);
        self.hit_blocks.inc_by(best.into());
        if let Some(llmd) = &self.llmd {
            llmd.requests.inc();
            llmd.hits.inc_by(best.into());
            llmd.best.inc_by(best.into());
        }
    }

    /// Counts the index's part of one prompt.
    pub fn looked_up(&self, took: Duration) {
        self.lookups.observe(took.as_secs_f64());
        if let Some(llmd) = &self.llmd {
            llmd.seconds.observe(took.as_secs_f64());
        }
    }
}

impl LlmdLookups {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            add(registry, IntCounter::new(llmd::PREFIX.to_owned() + name, help)?)
        };
        Ok(Self {
            requests: counter("index_lookup_requests_total", "Prompts looked up.")?,
            hits: counter("index_lookup_hits_total", "Leading blocks held by the best pod.")?,
            best: counter("index_max_pod_hit_count_total", "Leading blocks held by the best pod.")?,
            seconds: add(
                registry,
                Histogram::with_opts(
                    // llm-d's bounds, which its dashboards may name, and ours below them.
                    HistogramOpts::new(
                        llmd::PREFIX.to_owned() + "index_lookup_latency_seconds",
                        "Time of one prompt's lookup in the index.",
                    )
                    .buckets(
                        [&[1e-6, 1e-5, 1e-4, 1e-3][..], &prometheus::DEFAULT_BUCKETS[..]].concat(),
                    ),
                )?,
            )?,
        })
    }
}

/// Registers a metric and hands it back.
pub(crate) fn add<M: Collector + Clone + 'static>(
    registry: &Registry,
    metric: M,
) -> prometheus::Result<M> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// `kv_score_hit_ratio`: hit blocks over blocks since start; 0 before the first block. For other
/// spans of time, divide the rates of the counters.
#[derive(Debug)]
struct HitRatio {
    gauge: prometheus::Gauge,
    blocks: IntCounter,
    hits: IntCounter,
}

impl HitRatio {
    fn new(blocks: IntCounter, hits: IntCounter) -> prometheus::Result<Self> {
        let help = "Share of the asked blocks that the best pod held, since start.";
        Ok(Self { gauge: prometheus::Gauge::new("kv_score_hit_ratio", help)?, blocks, hits })
    }
}

impl Collector for HitRatio {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let blocks = self.blocks.get();
        let ratio = if blocks == 0 { 0.0 } else { self.hits.get() as f64 / blocks as f64 };
        self.gauge.set(ratio);
        self.gauge.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_hits_are_counted_under_both_names() {
        let registry = Registry::new();
        let metrics = ScoreMetrics::register(&registry, true).unwrap();
        metrics.answered(Rpc::Score, Code::Ok, Duration::from_micros(20));
        metrics.answered(Rpc::ScoreStream, Code::DataLoss, Duration::from_micros(20));
        metrics.prompt(8, 6);
        metrics.looked_up(Duration::from_micros(3));
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "kv_score_requests_total{code=\"ok\",rpc=\"score\"} 1",
            "kv_score_requests_total{code=\"unknown\",rpc=\"score_stream\"} 1",
            "kv_score_seconds_bucket{rpc=\"score\",le=\"0.000025\"} 1",
            "kv_score_blocks_total 8",
            "kv_score_hit_blocks_total 6",
            "kv_score_hit_ratio 0.75",
            "llm_d_epp_kv_cache_index_lookup_requests_total 1",
            "llm_d_epp_kv_cache_index_lookup_hits_total 6",
            "llm_d_epp_kv_cache_index_max_pod_hit_count_total 6",
            "llm_d_epp_kv_cache_index_lookup_latency_seconds_count 1",
        ] {
            assert!(text.lines().any(|has| has == line), "no {line:?} in\n{text}");
        }
        assert!(ScoreMetrics::register(&Registry::new(), false).is_ok());
        assert!(ScoreMetrics::register(&registry, false).is_err(), "names are taken");
    }
}
