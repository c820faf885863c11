//! llm-d's names for what the ingest path counts.
//!
//! Read at each scrape through a closure, so that ingest need not count twice. Of llm-d's other
//! series, the dedup, kind-filter and pool ones describe mechanisms that do not exist here, and
//! `zmq_errors_total` has operations of its own client.

use std::{fmt, sync::Arc};

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// What all of llm-d's names begin with.
pub const PREFIX: &str = "llm_d_epp_kv_cache_";

/// Totals since start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IngestTotals {
    /// Request blocks stored, those that were held already included.
    pub admissions: u64,
    /// Request blocks removed.
    pub evictions: u64,
    /// Subscriptions that exist, connected or not.
    pub active_subscribers: u64,
    /// Messages received and reconnections made, by registered pod.
    pub pods: Vec<PodTotals>,
}

/// One pod's share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodTotals {
    /// The pod, without rank.
    pub pod: Arc<str>,
    /// Messages received.
    pub messages: u64,
    /// Times the subscription was connected again.
    pub reconnections: u64,
}

/// Registers llm-d's ingest series; `read` is called at each scrape.
///
/// # Errors
///
/// When `registry` already holds a metric of the same name.
pub fn register(
    registry: &Registry,
    read: impl Fn() -> IngestTotals + Send + Sync + 'static,
) -> prometheus::Result<()> {
    registry.register(Box::new(IngestCollector { read: Box::new(read), shape: Series::new()? }))
}

struct IngestCollector {
    read: Box<dyn Fn() -> IngestTotals + Send + Sync>,
    shape: Series,
}

impl fmt::Debug for IngestCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IngestCollector").finish_non_exhaustive()
    }
}

impl Collector for IngestCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.shape.all().into_iter().flat_map(|series| series.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Ok(series) = Series::new() else { return Vec::new() };
        let totals = (self.read)();
        series.admissions.inc_by(totals.admissions);
        series.evictions.inc_by(totals.evictions);
        series.subscribers.set(i64::try_from(totals.active_subscribers).unwrap_or(i64::MAX));
        for pod in &totals.pods {
            series.messages.with_label_values(&[&*pod.pod]).inc_by(pod.messages);
            series.reconnections.with_label_values(&[&*pod.pod]).inc_by(pod.reconnections);
        }
        let families = series.all().into_iter().flat_map(|series| series.collect());
        families.filter(|family| !family.get_metric().is_empty()).collect()
    }
}

#[derive(Debug)]
struct Series {
    admissions: IntCounter,
    evictions: IntCounter,
    subscribers: IntGauge,
    messages: IntCounterVec,
    reconnections: IntCounterVec,
}

impl Series {
    fn new() -> prometheus::Result<Self> {
        let opts = |name: &str, help: &str| Opts::new(PREFIX.to_owned() + name, help);
        let by_pod = ["pod_identifier"];
        Ok(Self {
            admissions: IntCounter::with_opts(opts("index_admissions_total", "Blocks stored."))?,
            evictions: IntCounter::with_opts(opts("index_evictions_total", "Blocks removed."))?,
            subscribers: IntGauge::with_opts(opts(
                "events_active_subscribers",
                "Subscriptions, connected or not.",
            ))?,
            messages: IntCounterVec::new(
                opts("events_messages_received_total", "Messages received."),
                &by_pod,
            )?,
            reconnections: IntCounterVec::new(
                opts("events_subscriber_reconnections_total", "Subscriptions connected again."),
                &by_pod,
            )?,
        })
    }

    fn all(&self) -> [&dyn Collector; 5] {
        [&self.admissions, &self.evictions, &self.subscribers, &self.messages, &self.reconnections]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_read_at_each_scrape() {
        let registry = Registry::new();
        register(&registry, || IngestTotals {
            admissions: 3,
            pods: vec![PodTotals { pod: "a".into(), messages: 7, reconnections: 0 }],
            ..IngestTotals::default()
        })
        .unwrap();
        for _ in 0..2 {
            let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
            assert!(text.contains("llm_d_epp_kv_cache_index_admissions_total 3\n"), "{text}");
            let line =
                "llm_d_epp_kv_cache_events_messages_received_total{pod_identifier=\"a\"} 7\n";
            assert!(text.contains(line), "{text}");
        }
    }
}
