//! What the ingest path counts. Per-pod numbers live in the rows and vanish with them.

mod fleet;

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

pub use self::fleet::FleetCollector;
use crate::ingest::{fleet::Row, sequencer::Counter};
use crate::support::metrics::add;

/// Lag from an engine's batch timestamp to its visibility: tens of microseconds on one host,
/// seconds when a queue backs up or clocks differ.
const LAG_SECONDS: &[f64] = &[
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5,
    1.0, 5.0, 30.0,
];

/// Metrics of the ingest path.
#[derive(Clone, Debug)]
pub struct IngestMetrics {
    /// Live messages received.
    pub messages: IntCounter,
    /// Batches applied.
    pub batches: IntCounter,
    /// Events applied, by type.
    pub stored_events: IntCounter,
    /// Events applied, by type.
    pub removed_events: IntCounter,
    /// Events applied, by type.
    pub cleared_events: IntCounter,
    /// Engine blocks stored.
    pub stored_blocks: IntCounter,
    /// Engine blocks removed.
    pub removed_blocks: IntCounter,
    /// Batches and events that could not be used, by reason.
    pub rejected: IntCounterVec,
    /// Messages dropped before they were ordered, by reason.
    pub dropped: IntCounterVec,
    /// Publishers refused, by reason.
    pub refused_publishers: IntCounterVec,
    /// What the sequencers noticed, by event.
    pub sequencer: IntCounterVec,
    /// Blocks that waited for an unknown parent, by what became of them.
    pub orphans: IntCounterVec,
    /// Live engine keys stored again with other tokens or another parent.
    pub conflicting_stores: IntCounter,
    /// Losses of events that may have been removals, by reason.
    pub losses: IntCounterVec,
    /// Blocks dropped because the engine did not name them in time after a loss.
    pub aged_out_blocks: IntCounter,
    /// Blocks refused because the index is at its cap.
    pub refused_blocks: IntCounter,
    /// Blocks that are held but have no position yet.
    pub unplaced_blocks: IntCounter,
    /// Connections of subscriptions lost and made again.
    pub reconnections: IntCounter,
    /// Batch timestamp to visibility, seconds. Negative lags (clocks differ) count as 0.
    pub lag: Histogram,
}

impl IngestMetrics {
    /// Creates the metrics and registers them.
    ///
    /// # Errors
    ///
    /// When `registry` already holds a metric of the same name.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| add(registry, IntCounter::new(name, help)?);
        let vec = |name: &str, help: &str, label: &str| {
            add(registry, IntCounterVec::new(Opts::new(name, help), &[label])?)
        };
        let events = vec("kv_events_total", "KV events applied, by type.", "type")?;
        let sequencer =
            vec("kv_events_sequencer_total", "What sequencing noticed, by event.", "event")?;
        for event in Counter::ALL {
            sequencer.with_label_values(&[event.as_str()]);
        }
        let orphans = vec(
            "kv_events_orphan_blocks_total",
            "Blocks with an unknown parent, by outcome.",
            "outcome",
        )?;
        for outcome in ["waiting", "attached", "expired", "dropped"] {
            orphans.with_label_values(&[outcome]);
        }
        Ok(Self {
            messages: counter("kv_events_messages_total", "Messages received from engines.")?,
            batches: counter("kv_events_batches_total", "Batches applied to the index.")?,
            stored_events: events.with_label_values(&["BlockStored"]),
            removed_events: events.with_label_values(&["BlockRemoved"]),
            cleared_events: events.with_label_values(&["AllBlocksCleared"]),
            stored_blocks: counter("kv_events_stored_blocks_total", "Engine blocks stored.")?,
            removed_blocks: counter("kv_events_removed_blocks_total", "Engine blocks removed.")?,
            rejected: vec(
                "kv_events_rejected_total",
                "Batches and events that could not be used, by reason.",
                "reason",
            )?,
            dropped: vec(
                "kv_events_dropped_total",
                "Messages dropped before they were ordered, by reason.",
                "reason",
            )?,
            refused_publishers: vec(
                "kv_events_refused_publishers_total",
                "Messages of publishers that are not admitted, by reason.",
                "reason",
            )?,
            sequencer,
            orphans,
            conflicting_stores: counter(
                "kv_events_conflicting_stores_total",
                "Live engine keys stored again with other tokens or another parent.",
            )?,
            losses: vec(
                "kv_events_losses_total",
                "Losses of events that may have been removals, by reason.",
                "reason",
            )?,
            aged_out_blocks: counter(
                "kv_events_aged_out_blocks_total",
                "Blocks dropped because the engine did not name them in time after a loss.",
            )?,
            refused_blocks: counter(
                "kv_events_refused_blocks_total",
                "Blocks refused because the index is at its cap.",
            )?,
            unplaced_blocks: counter(
                "kv_events_unplaced_blocks_total",
                "Blocks stored without a known position.",
            )?,
            reconnections: counter(
                "kv_events_reconnections_total",
                "Subscriptions that were connected again.",
            )?,
            lag: add(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "kv_events_lag_seconds",
                        "From a batch's timestamp at the engine to its visibility to lookups.",
                    )
                    .buckets(LAG_SECONDS.to_vec()),
                )?,
            )?,
        })
    }

    /// Counts a batch or event that cannot be used.
    pub(crate) fn reject(&self, reason: &str) {
        self.rejected.with_label_values(&[reason]).inc();
    }

    /// Counts a message of a publisher that is not admitted.
    pub(crate) fn refuse(&self, reason: &str) {
        self.refused_publishers.with_label_values(&[reason]).inc();
    }

    /// Counts what a sequencer noticed, in all and for the row.
    pub(crate) fn notice(&self, counter: Counter, row: &Row) {
        self.sequencer.with_label_values(&[counter.as_str()]).inc();
        row.update(|status| match counter {
            Counter::Gap => status.gaps += 1,
            Counter::Replay => status.replays += 1,
            _ => {}
        });
    }
}
