//! Series that are read from the fleet and the index at each scrape.

use std::sync::Arc;

use prometheus::{
    GaugeVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::{
    index::PodUsage,
    ingest::{
        fleet::{Fleet, Row},
        speculation::Speculations,
    },
    model::{PodState, TierId, TierTable},
    support::clock::unix_ns,
};

const ROW: [&str; 2] = ["pod", "rank"];

/// State label of the stale overlay, which hides the state beneath, as in the API.
const STALE: &str = "stale";

/// Rows, index and speculative entries → series. A scrape asks the index once a row.
#[derive(Debug)]
pub struct FleetCollector {
    fleet: Arc<Fleet>,
    tiers: Arc<TierTable>,
    speculations: Option<Arc<Speculations>>,
    /// Descriptions only: the samples of one scrape go into a fresh set.
    shape: Series,
}

impl FleetCollector {
    /// A collector to be registered once.
    ///
    /// # Errors
    ///
    /// None in practice: the names are constant.
    pub fn new(
        fleet: Arc<Fleet>,
        tiers: Arc<TierTable>,
        speculations: Option<Arc<Speculations>>,
    ) -> prometheus::Result<Self> {
        Ok(Self { fleet, tiers, speculations, shape: Series::new()? })
    }

    fn fill(&self, series: &Series) {
        let table = self.fleet.table();
        let index = self.fleet.index();
        for state in PodState::ALL.map(PodState::as_str).into_iter().chain([STALE]) {
            series.pods.with_label_values(&[state]).set(0);
        }
        let now = unix_ns();
        for row in &table.rows {
            let usage = index.pod_usage(row.slot);
            let held = (0_u8..).zip(&usage.blocks_by_tier);
            // The ids run up to the most that a server can name; most have no name yet.
            for (tier, &blocks) in held.filter(|&(tier, &blocks)| tier == 0 || blocks > 0) {
                let name = self.tiers.name(TierId(tier));
                series.tier_blocks.with_label_values(&[&*name]).add(gauge(blocks));
            }
            series.row(row, &usage, now);
        }
        let usage = index.usage();
        series.keys.set(gauge(usage.keys));
        series.bytes.set(gauge(usage.bytes));
        series.cap.set(gauge(usage.cap_bytes));
        let live = self.speculations.as_ref().map_or(0, |speculations| speculations.len());
        series.speculations.set(gauge(live as u64));
    }
}

impl Collector for FleetCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.shape.all().into_iter().flat_map(|series| series.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Ok(series) = Series::new() else { return Vec::new() };
        self.fill(&series);
        let families = series.all().into_iter().flat_map(|series| series.collect());
        families.filter(|family| !family.get_metric().is_empty()).collect()
    }
}

#[derive(Debug)]
struct Series {
    pods: IntGaugeVec,
    blocks: IntGaugeVec,
    unconfirmed: IntGaugeVec,
    backlog: IntGaugeVec,
    lag: GaugeVec,
    silent: GaugeVec,
    connected: IntGaugeVec,
    gaps: IntCounterVec,
    replays: IntCounterVec,
    orphans: IntCounterVec,
    rejected: IntCounterVec,
    refused: IntCounterVec,
    tier_blocks: IntGaugeVec,
    keys: IntGauge,
    bytes: IntGauge,
    cap: IntGauge,
    speculations: IntGauge,
}

impl Series {
    fn new() -> prometheus::Result<Self> {
        let gauges = |name, help, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let floats = |name, help| GaugeVec::new(Opts::new(name, help), &ROW);
        let counters = |name, help| IntCounterVec::new(Opts::new(name, help), &ROW);
        Ok(Self {
            pods: gauges("kv_pods", "Rows (pod and rank) by state.", &["state"])?,
            blocks: gauges("kv_pod_blocks", "Engine blocks that the pod holds.", &ROW)?,
            unconfirmed: gauges(
                "kv_pod_unconfirmed_blocks",
                "Blocks per tier that the engine has not named since events were lost.",
                &ROW,
            )?,
            backlog: gauges(
                "kv_pod_backlog_batches",
                "Batches received and not yet visible to Score.",
                &ROW,
            )?,
            lag: floats(
                "kv_pod_lag_seconds",
                "From the newest applied batch's timestamp to its visibility.",
            )?,
            silent: floats(
                "kv_pod_seconds_since_event",
                "Time since the last applied batch; absent before the first.",
            )?,
            connected: gauges("kv_pod_connected", "1 while the stream is connected.", &ROW)?,
            gaps: counters("kv_pod_gaps_total", "Gaps noticed in the pod's sequence.")?,
            replays: counters("kv_pod_replays_total", "Replays asked of the pod.")?,
            orphans: counters(
                "kv_pod_orphans_total",
                "Blocks that had to wait for an unknown parent.",
            )?,
            rejected: counters("kv_pod_rejected_events_total", "Events skipped as unusable.")?,
            refused: counters(
                "kv_pod_refused_blocks_total",
                "Blocks not stored because the index is at its cap.",
            )?,
            tier_blocks: gauges("kv_index_blocks", "Engine blocks over all pods.", &["tier"])?,
            keys: IntGauge::new("kv_index_keys", "Distinct request keys in the index.")?,
            bytes: IntGauge::new("kv_index_bytes", "Estimated memory of the index.")?,
            cap: IntGauge::new("kv_index_cap_bytes", "Memory at which the index refuses stores.")?,
            speculations: IntGauge::new("kv_speculations", "Speculate calls still in force.")?,
        })
    }

    fn all(&self) -> [&dyn Collector; 17] {
        [
            &self.pods,
            &self.blocks,
            &self.unconfirmed,
            &self.backlog,
            &self.lag,
            &self.silent,
            &self.connected,
            &self.gaps,
            &self.replays,
            &self.orphans,
            &self.rejected,
            &self.refused,
            &self.tier_blocks,
            &self.keys,
            &self.bytes,
            &self.cap,
            &self.speculations,
        ]
    }

    fn row(&self, row: &Row, usage: &PodUsage, now: u64) {
        let status = row.status();
        let applied = row.now().applied;
        let rank = row.id.rank.map_or_else(String::new, |rank| rank.to_string());
        let labels = [&*row.id.pod, rank.as_str()];
        let state = if status.stale { STALE } else { status.state.as_str() };
        self.pods.with_label_values(&[state]).inc();
        self.blocks.with_label_values(&labels).set(gauge(usage.blocks));
        self.unconfirmed.with_label_values(&labels).set(gauge(usage.unconfirmed));
        // Before the first batch is applied, how many there are behind the first seen is unknown.
        let backlog = status.seen.map_or(0, |seen| applied.map_or(1, |at| seen.saturating_sub(at)));
        self.backlog.with_label_values(&labels).set(gauge(backlog));
        self.lag.with_label_values(&labels).set(status.lag_us as f64 / 1e6);
        if status.last_applied_unix_ns > 0 {
            let silent = now.saturating_sub(status.last_applied_unix_ns);
            self.silent.with_label_values(&labels).set(silent as f64 / 1e9);
        }
        self.connected.with_label_values(&labels).set(status.connected.into());
        self.gaps.with_label_values(&labels).inc_by(status.gaps);
        self.replays.with_label_values(&labels).inc_by(status.replays);
        self.orphans.with_label_values(&labels).inc_by(status.orphans);
        self.rejected.with_label_values(&labels).inc_by(status.rejected_events);
        self.refused.with_label_values(&labels).inc_by(status.refused_blocks);
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
