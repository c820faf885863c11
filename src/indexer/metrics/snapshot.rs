//! What is counted of snapshots.

use prometheus::{Gauge, IntCounterVec, IntGauge, Opts, Registry};

use crate::support::metrics::add;

/// Metrics of snapshots.
#[derive(Clone, Debug)]
pub struct SnapshotMetrics {
    /// When the last one was written, seconds since the Unix epoch; 0 before the first.
    pub written_at: Gauge,
    /// Its bytes.
    pub bytes: IntGauge,
    /// How long it took, seconds.
    pub duration: Gauge,
    /// For how long it stopped a row's stream at most, seconds.
    pub pause: Gauge,
    /// What failed, by operation: `write`, `load`, `bootstrap`, `stream`.
    pub failures: IntCounterVec,
    /// Rows of loaded snapshots, by what became of them: `restored`, `refused`, `dropped`.
    pub rows: IntCounterVec,
}

impl SnapshotMetrics {
    /// Creates the metrics and registers them.
    ///
    /// # Errors
    ///
    /// When `registry` already holds a metric of the same name.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| add(registry, Gauge::new(name, help)?);
        let vec = |name: &str, help: &str, label: &str, values: &[&str]| {
            let vec = add(registry, IntCounterVec::new(Opts::new(name, help), &[label])?)?;
            values.iter().for_each(|value| drop(vec.with_label_values(&[value])));
            Ok::<_, prometheus::Error>(vec)
        };
        Ok(Self {
            written_at: gauge(
                "kv_snapshot_written_timestamp_seconds",
                "When the last snapshot was written.",
            )?,
            bytes: add(
                registry,
                IntGauge::new("kv_snapshot_bytes", "Size of the last snapshot.")?,
            )?,
            duration: gauge("kv_snapshot_seconds", "How long the last snapshot took.")?,
            pause: gauge(
                "kv_snapshot_pause_seconds",
                "For how long the last snapshot stopped a row's stream at most.",
            )?,
            failures: vec(
                "kv_snapshot_failures_total",
                "Snapshots that failed, by operation.",
                "operation",
                &["write", "load", "bootstrap", "stream"],
            )?,
            rows: vec(
                "kv_snapshot_rows_total",
                "Rows of loaded snapshots, by outcome.",
                "outcome",
                &["restored", "refused", "dropped"],
            )?,
        })
    }

    /// Counts a failure.
    pub fn failed(&self, operation: &str) {
        self.failures.with_label_values(&[operation]).inc();
    }

    /// Counts rows.
    pub fn count(&self, outcome: &str, rows: usize) {
        self.rows.with_label_values(&[outcome]).inc_by(rows as u64);
    }
}
