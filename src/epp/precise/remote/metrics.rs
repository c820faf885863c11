//! What is counted of the conversation with the service.

use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::{
    epp::precise::{IndexError, remote::breaker::State},
    support::metrics::family,
};

/// From a question to its answer or to the end of patience: 50 µs to 100 ms.
const CALL_SECONDS: [f64; 14] = [
    50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 750e-6, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 10e-3, 25e-3,
    100e-3,
];

/// What became of an entry or of a change to one.
#[derive(Clone, Copy, Debug)]
pub(super) enum Speculated {
    /// The service took it.
    Done,
    /// The service refused it, or did not answer.
    Failed,
    /// It was not sent: too many are open or wait.
    Dropped,
}

/// Handles of all metrics.
#[derive(Clone, Debug)]
pub(super) struct RemoteMetrics {
    calls: Histogram,
    /// By the word of the reason; so few that a search is no cost.
    failures: Vec<(&'static str, IntCounter)>,
    late: IntCounter,
    in_flight: IntGauge,
    state: IntGauge,
    transitions: IntCounterVec,
    connected: IntGauge,
    connections: IntCounterVec,
    speculated: [IntCounter; 3],
}

impl RemoteMetrics {
    /// The metrics of the service at this address.
    pub(super) fn register(registry: &Registry, indexer: &str) -> prometheus::Result<Self> {
        let opts = |name, help| Opts::new(name, help).const_label("indexer", indexer);
        let counter = |name, help| family(registry, IntCounter::with_opts(opts(name, help))?);
        let gauge = |name, help| family(registry, IntGauge::with_opts(opts(name, help))?);
        let counters =
            |name, help, label| family(registry, IntCounterVec::new(opts(name, help), &[label])?);
        let calls = HistogramOpts::new(
            "epp_indexer_call_seconds",
            "Time from a question to the indexer to its answer, or to the end of patience.",
        )
        .const_label("indexer", indexer);
        let speculated = counters(
            "epp_indexer_speculations_total",
            "Speculative entries, extensions and withdrawals, by result.",
            "result",
        )?;
        let failures = counters(
            "epp_indexer_failures_total",
            "Questions to the indexer without an answer, by reason.",
            "reason",
        )?;
        let reasons = [
            IndexError::Open,
            IndexError::Disconnected,
            IndexError::Deadline,
            IndexError::Busy,
            IndexError::Garbage(String::new()),
            IndexError::Refused(String::new()),
            IndexError::Settings,
        ];
        let failures =
            reasons.map(|error| (error.reason(), failures.with_label_values(&[error.reason()])));
        Ok(Self {
            calls: family(registry, Histogram::with_opts(calls.buckets(CALL_SECONDS.to_vec()))?)?,
            failures: failures.into(),
            late: counter(
                "epp_indexer_late_answers_total",
                "Answers of the indexer that came when nobody waited for them any more.",
            )?,
            in_flight: gauge(
                "epp_indexer_questions_in_flight",
                "Questions that the indexer has not answered, those included for which nobody waits.",
            )?,
            state: gauge(
                "epp_indexer_breaker_state",
                "Circuit breaker of the indexer: 0 closed, 1 half open, 2 open.",
            )?,
            transitions: counters(
                "epp_indexer_breaker_transitions_total",
                "Changes of the circuit breaker, by its new state.",
                "to",
            )?,
            connected: gauge(
                "epp_indexer_connected",
                "1 while there is a connection to the indexer that answers questions.",
            )?,
            connections: counters(
                "epp_indexer_connections_total",
                "Connections to the indexer that were made, and attempts that failed, by result.",
                "result",
            )?,
            speculated: ["done", "failed", "dropped"]
                .map(|result| speculated.with_label_values(&[result])),
        })
    }

    pub(super) fn called(&self, took: Duration) {
        self.calls.observe(took.as_secs_f64());
    }

    pub(super) fn failed(&self, error: &IndexError) {
        let reason = error.reason();
        if let Some((_, counter)) = self.failures.iter().find(|(word, _)| *word == reason) {
            counter.inc();
        }
    }

    pub(super) fn late(&self) {
        self.late.inc();
    }

    /// A gauge that is up while the returned value lives.
    pub(super) fn in_flight(&self) -> Up {
        Up::new(&self.in_flight)
    }

    pub(super) fn connected(&self) -> Up {
        self.connections.with_label_values(&["made"]).inc();
        Up::new(&self.connected)
    }

    pub(super) fn not_connected(&self) {
        self.connections.with_label_values(&["failed"]).inc();
    }

    pub(super) fn breaker(&self, began: Option<State>) {
        if let Some(state) = began {
            let (number, word) = state.kind();
            self.state.set(number);
            self.transitions.with_label_values(&[word]).inc();
        }
    }

    pub(super) fn speculated(&self, what: Speculated) {
        self.speculated[what as usize].inc();
    }
}

/// One more in a gauge, until it is dropped.
#[derive(Debug)]
pub(super) struct Up(IntGauge);

impl Up {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.dec();
    }
}
