//! What is counted, under the names of the Go EPP: its new ones and, unless
//! [`MetricsOptions::old_names`] is off, its old ones. docs/metrics.md lists them.
//!
//! # Model
//!
//! Everything is counted once. One collector makes both families of a pair from it, with the same
//! buckets, when metrics are read; it also works out there what the Go EPP refreshes every 5 s.
//!
//! # Cost
//!
//! A request looks its row up once ([`EppMetrics::request`]) and keeps the handle; what it does with
//! that is additions to atomics. Timers of plugins are resolved at setup. On two shared cores at 200
//! models: 245 ns for the lookup, 70 for [`RequestMetrics::routed`], 165 for
//! [`RequestMetrics::finished`] with all its histograms, 13 for a chunk of a stream; one observation
//! by label of the prometheus crate's `HistogramVec` took 375 there.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    core::{Collector, Desc},
    proto::{MetricFamily, MetricType},
};

use crate::{
    epp::{
        datalayer::{Endpoint, EndpointWatcher, Endpoints},
        director::RefusalCode,
        scheduling,
        server::ConnectionMetrics,
    },
    support::{metrics::add, sync::lock, tls::ReloadMetrics},
};

mod family;
mod histogram;
mod picks;
mod requests;

pub(in crate::epp) use self::family::Family;
pub use self::requests::{ErrorCode, Outcome, RequestLabels, RequestMetrics, Running};
use self::{
    histogram::Histogram,
    picks::{Picks, Pool},
    requests::Requests,
};

const SCHEDULING: Family = Family::new(
    "llm_d_epp_scheduler_e2e_duration_seconds",
    MetricType::HISTOGRAM,
    &[],
    "End-to-end scheduling latency distribution in seconds.",
);
const SCHEDULING_OLD: Family = Family::old(
    "inference_extension_scheduler_e2e_duration_seconds",
    &SCHEDULING,
    &[],
    SCHEDULING.help,
);
const PLUGINS: Family = Family::new(
    "llm_d_epp_plugin_duration_seconds",
    MetricType::HISTOGRAM,
    &["extension_point", "plugin_name", "plugin_type"],
    "Plugin processing latency distribution in seconds for each extension point, plugin type and plugin name.",
);
const PLUGINS_OLD: Family = Family::old(
    "inference_extension_plugin_duration_seconds",
    &PLUGINS,
    PLUGINS.labels,
    PLUGINS.help,
);
const REQUEST_PROCESSING: Family = Family::new(
    "llm_d_epp_request_processing_duration_seconds",
    MetricType::HISTOGRAM,
    &[],
    "EPP request processing latency distribution in seconds, from request receipt until the request body has been handled, including admission control.",
);
const RESPONSE_PROCESSING: Family = Family::new(
    "llm_d_epp_response_processing_duration_seconds",
    MetricType::HISTOGRAM,
    &[],
    "EPP response processing latency distribution in seconds: the sum of per-chunk handler time for a streamed response, or the interval from response headers to completion for a non-streaming response.",
);
const INFO: Family = Family::new(
    "llm_d_epp_info",
    MetricType::GAUGE,
    &["build_ref", "commit"],
    "General information of the current build of Inference Extension.",
);
const INFO_OLD: Family = Family::old("inference_extension_info", &INFO, INFO.labels, INFO.help);
const POLL_ERRORS: Family = Family::new(
    "llm_d_epp_datalayer_poll_errors_total",
    MetricType::COUNTER,
    &["source_type"],
    "Data-source poll errors per source type.",
);
const POLL_ERRORS_OLD: Family = Family::old(
    "llm_d_inference_scheduler_datalayer_poll_errors_total",
    &POLL_ERRORS,
    POLL_ERRORS.labels,
    POLL_ERRORS.help,
);
const EXTRACT_ERRORS: Family = Family::new(
    "llm_d_epp_datalayer_extract_errors_total",
    MetricType::COUNTER,
    &["extractor_type", "source_type"],
    "Extract errors per source/extractor type.",
);
const EXTRACT_ERRORS_OLD: Family = Family::old(
    "llm_d_inference_scheduler_datalayer_extract_errors_total",
    &EXTRACT_ERRORS,
    EXTRACT_ERRORS.labels,
    EXTRACT_ERRORS.help,
);
const STREAMS: Family = Family::new(
    "llm_d_epp_extproc_streams_inflight",
    MetricType::GAUGE,
    &[],
    "Number of ext_proc gRPC streams currently open.",
);
const STREAM_DURATION: Family = Family::new(
    "llm_d_epp_extproc_stream_duration_seconds",
    MetricType::HISTOGRAM,
    &[],
    "Duration an ext_proc gRPC stream stays open, in seconds.",
);
const STREAMS_TOTAL: Family = Family::new(
    "llm_d_epp_extproc_streams_total",
    MetricType::COUNTER,
    &["code"],
    "Total ext_proc gRPC streams completed, by gRPC status code.",
);

/// Families with one histogram and no labels.
type Single = (&'static Family, Option<&'static Family>, fn(&State) -> &Histogram);

const SINGLES: [Single; 3] = [
    (&SCHEDULING, Some(&SCHEDULING_OLD), |state| &state.scheduling),
    (&REQUEST_PROCESSING, None, |state| &state.request_processing),
    (&RESPONSE_PROCESSING, None, |state| &state.response_processing),
];

/// What can be chosen about metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsOptions {
    /// Also under the names of before llm-d v0.8.
    pub old_names: bool,
    /// Distinct values of each label whose text clients choose; the rest is `other`.
    pub label_values: usize,
    /// Combinations of such labels.
    pub rows: usize,
    /// `--metrics-staleness-threshold`: older metrics of an endpoint do not count for the averages.
    pub stale: Duration,
    /// `--enable-grpc-stream-metrics`.
    pub streams: bool,
    /// Label `commit` of the build.
    pub commit: String,
    /// Label `build_ref` of the build.
    pub build_ref: String,
}

impl Default for MetricsOptions {
    fn default() -> Self {
        Self {
            old_names: true,
            label_values: 1000,
            rows: 4096,
            stale: Duration::from_secs(2),
            streams: false,
            commit: "unknown".to_owned(),
            build_ref: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// Where in the life of a request a plugin is timed; values of the label `extension_point`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ExtensionPoint {
    RequestParsing,
    DataProducer,
    Admission,
    ProfilePicker,
    Filter,
    Scorer,
    Picker,
    ProcessProfilesResults,
    PreRequest,
}

impl ExtensionPoint {
    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RequestParsing => "RequestParsing",
            Self::DataProducer => "DataProducer",
            Self::Admission => "Admission",
            Self::ProfilePicker => "ProfilePicker",
            Self::Filter => "Filter",
            Self::Scorer => "Scorer",
            Self::Picker => "Picker",
            Self::ProcessProfilesResults => "ProcessProfilesResults",
            Self::PreRequest => "PreRequest",
        }
    }
}

/// The metrics of the endpoint picker. Clones share one state.
#[derive(Clone, Debug)]
pub struct EppMetrics {
    state: Arc<State>,
    immediate: IntCounterVec,
    fallbacks: IntCounter,
    connections: ConnectionMetrics,
    reloads: ReloadMetrics,
}

#[derive(Debug)]
struct State {
    options: MetricsOptions,
    requests: Requests,
    picks: Arc<Picks>,
    pool: OnceLock<Pool>,
    scheduling: Histogram,
    request_processing: Histogram,
    response_processing: Histogram,
    plugins: Mutex<Vec<([String; 3], PluginTimer)>>,
    scrapers: Mutex<Vec<Watched>>,
    open_streams: AtomicI64,
    stream_duration: Histogram,
    /// By the number of the gRPC code.
    streams: [AtomicU64; CODES.len()],
}

/// What went wrong with scraping, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrapeFaults {
    /// Pages that did not come.
    pub polls: u64,
    /// Pages that lacked something.
    pub extracts: u64,
}

/// A scraper whose faults are reported.
struct Watched {
    /// Of the extractor and of the source.
    types: [String; 2],
    faults: Box<dyn Fn() -> ScrapeFaults + Send + Sync>,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watched").field(&self.types).finish()
    }
}

/// Names of gRPC codes as Go writes them, by number.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

const OPEN_STREAMS: Family =
    Family::new("epp_open_streams", MetricType::GAUGE, &[], "HTTP exchanges in progress.");

impl EppMetrics {
    /// Registers all families.
    ///
    /// # Errors
    ///
    /// When the registry has a metric of one of the names.
    pub fn register(registry: &Registry, options: MetricsOptions) -> prometheus::Result<Self> {
        let state = Arc::new(State {
            requests: Requests::new(options.label_values, options.rows),
            picks: Arc::default(),
            pool: OnceLock::new(),
            scheduling: Histogram::new(&histogram::FAST),
            request_processing: Histogram::new(&histogram::REQUEST_PROCESSING),
            response_processing: Histogram::new(&histogram::RESPONSE_PROCESSING),
            plugins: Mutex::default(),
            scrapers: Mutex::default(),
            open_streams: AtomicI64::new(0),
            stream_duration: Histogram::new(&histogram::STREAM),
            streams: Default::default(),
            options,
        });
        let descs = families(&state.options)
            .into_iter()
            .map(Family::desc)
            .collect::<prometheus::Result<Vec<_>>>()?;
        registry.register(Box::new(All { descs, state: Arc::clone(&state) }))?;
        let reloads = add(
            registry,
            IntCounterVec::new(
                Opts::new(
                    "epp_certificate_reloads_total",
                    "Changed certificates: loaded, or failed and not in use.",
                ),
                &["outcome"],
            )?,
        )?;
        let connections = connections()?;
        for collector in [
            Box::new(connections.open.clone()) as Box<dyn Collector>,
            Box::new(connections.accepted.clone()),
            Box::new(connections.refused.clone()),
            Box::new(connections.failed.clone()),
        ] {
            registry.register(collector)?;
        }
        Ok(Self {
            state,
            immediate: add(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "epp_immediate_responses_total",
                        "Requests answered by the endpoint picker itself, by HTTP status.",
                    ),
                    &["code"],
                )?,
            )?,
            fallbacks: add(
                registry,
                IntCounter::new(
                    "epp_fallback_picks_total",
                    "Requests routed without scheduling, because something failed inside.",
                )?,
            )?,
            connections,
            reloads: ReloadMetrics {
                loaded: reloads.with_label_values(&["loaded"]),
                failed: reloads.with_label_values(&["failed"]),
            },
        })
    }

    /// Metrics that nobody reads, for tests and benches.
    #[must_use]
    #[expect(clippy::expect_used, reason = "the registry is new and the names are legal")]
    pub fn unregistered() -> Self {
        Self::register(&Registry::new(), MetricsOptions::default()).expect("names are unique")
    }

    /// From now on reports about this pool and counts picks of its endpoints. Only the first call
    /// counts.
    pub fn watch(&self, pool: &str, endpoints: &Arc<Endpoints>) {
        let stale = self.state.options.stale;
        let pool = Pool { name: pool.to_owned(), endpoints: Arc::clone(endpoints), stale };
        if self.state.pool.set(pool).is_ok() {
            endpoints.watch(Arc::clone(&self.state.picks) as Arc<dyn EndpointWatcher>);
        }
    }

    /// Where the requests with these labels are counted. Look it up once a request.
    #[must_use]
    pub fn request(&self, labels: &RequestLabels<'_>) -> Arc<RequestMetrics> {
        self.state.requests.row(labels)
    }

    /// Scheduling chose `endpoint`, first of its list, for a request that is counted in `row`.
    pub fn picked(&self, row: &RequestMetrics, endpoint: &Endpoint) {
        self.state.picks.picked(row, endpoint);
    }

    /// Scheduling found no endpoint.
    pub fn not_picked(&self, row: &RequestMetrics) {
        row.failed_attempts.fetch_add(1, Ordering::Relaxed);
    }

    /// A scheduling cycle took so long.
    pub fn scheduled(&self, duration: Duration) {
        self.state.scheduling.observe_duration(duration);
    }

    /// From a request's headers to our answer, refusals included.
    pub fn request_processed(&self, duration: Duration) {
        self.state.request_processing.observe_duration(duration);
    }

    /// What the messages of a response took in all. Not called for exchanges without a response.
    pub fn response_processed(&self, duration: Duration) {
        self.state.response_processing.observe_duration(duration);
    }

    /// A client got our answer instead of a pod's.
    pub fn immediate_response(&self, code: RefusalCode) {
        self.immediate.with_label_values(&[&*code.status().to_string()]).inc();
    }

    /// A request was routed without scheduling, because something failed inside.
    pub fn fallback_pick(&self) {
        self.fallbacks.inc();
    }

    /// The timer of a plugin at an extension point; the same handle for the same names. For setup:
    /// it searches a list.
    #[must_use]
    pub fn plugin_timer(
        &self,
        point: ExtensionPoint,
        plugin_type: &str,
        plugin_name: &str,
    ) -> PluginTimer {
        let labels = [point.as_str(), plugin_name, plugin_type].map(str::to_owned);
        let new = || PluginTimer(Arc::new(Histogram::new(&histogram::FAST)));
        found_or(&mut lock(&self.state.plugins), labels, new)
    }

    /// From now on reports the faults of a scraper, as `faults` counts them, under the types of its
    /// source and extractor.
    pub fn watch_scraper(
        &self,
        source_type: &str,
        extractor_type: &str,
        faults: impl Fn() -> ScrapeFaults + Send + Sync + 'static,
    ) {
        let types = [extractor_type, source_type].map(str::to_owned);
        lock(&self.state.scrapers).push(Watched { types, faults: Box::new(faults) });
    }

    /// An `ext_proc` stream was opened; it is open until what is returned is dropped.
    #[must_use]
    pub fn stream(&self) -> StreamGuard {
        self.state.open_streams.fetch_add(1, Ordering::Relaxed);
        let opened = self.state.options.streams.then(Instant::now);
        StreamGuard { state: Arc::clone(&self.state), opened, code: tonic::Code::Cancelled }
    }

    /// For [`server::serve`](crate::epp::server::serve).
    #[must_use]
    pub fn connections(&self) -> ConnectionMetrics {
        self.connections.clone()
    }

    /// For [`Certificate::follow`](crate::support::tls::Certificate::follow).
    #[must_use]
    pub fn reloads(&self) -> ReloadMetrics {
        self.reloads.clone()
    }
}

/// The handle of `labels` in `list`, added if it is not there.
fn found_or<L: PartialEq, H: Clone>(
    list: &mut Vec<(L, H)>,
    labels: L,
    new: impl FnOnce() -> H,
) -> H {
    if let Some((_, handle)) = list.iter().find(|(known, _)| *known == labels) {
        return handle.clone();
    }
    let handle = new();
    list.push((labels, handle.clone()));
    handle
}

/// Times calls of one plugin at one extension point. Clones share one state.
#[derive(Clone, Debug)]
pub struct PluginTimer(Arc<Histogram>);

impl scheduling::PluginTimer for PluginTimer {
    fn ran(&self, took: Duration) {
        self.observe(took);
    }
}

impl PluginTimer {
    /// A call took so long.
    pub fn observe(&self, duration: Duration) {
        self.0.observe_duration(duration);
    }

    /// Times `call`.
    pub fn time<T>(&self, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = call();
        self.observe(start.elapsed());
        result
    }
}

/// An open `ext_proc` stream, until it is dropped.
#[derive(Debug)]
pub struct StreamGuard {
    state: Arc<State>,
    /// `None`: the life of streams is not measured.
    opened: Option<Instant>,
    code: tonic::Code,
}

impl StreamGuard {
    /// How the stream ends; `CANCELLED`, which is how Envoy ends most, unless told otherwise.
    pub fn set_code(&mut self, code: tonic::Code) {
        self.code = code;
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.state.open_streams.fetch_sub(1, Ordering::Relaxed);
        if let Some(opened) = self.opened {
            self.state.stream_duration.observe_duration(opened.elapsed());
            self.state.streams[self.code as usize].fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn connections() -> prometheus::Result<ConnectionMetrics> {
    Ok(ConnectionMetrics {
        open: IntGauge::new("epp_connections", "Open gRPC connections.")?,
        accepted: IntCounter::new("epp_connections_total", "Accepted gRPC connections.")?,
        refused: IntCounter::new(
            "epp_connections_refused_total",
            "gRPC connections closed because there were too many.",
        )?,
        failed: IntCounter::new(
            "epp_connections_failed_total",
            "gRPC connections that ended before HTTP/2 began: no TLS, no HTTP/2, silence.",
        )?,
    })
}

/// Connection metrics that nobody reads.
#[expect(clippy::expect_used, reason = "the names are legal")]
pub(in crate::epp) fn unregistered_connections() -> ConnectionMetrics {
    connections().expect("legal names")
}

/// The families that [`All`] reports.
fn families(options: &MetricsOptions) -> Vec<&'static Family> {
    let old = options.old_names;
    let mut families = requests::families(old);
    families.extend(picks::families(old));
    families.extend([&PLUGINS, &INFO, &POLL_ERRORS, &EXTRACT_ERRORS, &OPEN_STREAMS]);
    families.extend(SINGLES.iter().map(|(family, ..)| *family));
    if old {
        families.extend([&PLUGINS_OLD, &INFO_OLD, &POLL_ERRORS_OLD, &EXTRACT_ERRORS_OLD]);
        families.extend(SINGLES.iter().filter_map(|(_, old, _)| *old));
    }
    if options.streams {
        families.extend([&STREAMS, &STREAM_DURATION, &STREAMS_TOTAL]);
    }
    families
}

/// The collector of everything that has two names or is worked out when it is read.
struct All {
    descs: Vec<Desc>,
    state: Arc<State>,
}

impl Collector for All {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let state = &*self.state;
        let old_names = state.options.old_names;
        let mut families = Vec::new();
        state.requests.collect(old_names, &mut families);
        state.picks.collect(&state.requests.rows(), old_names, &mut families);
        if let Some(pool) = state.pool.get() {
            pool.collect(old_names, &mut families);
        }
        for (family, old, histogram) in SINGLES {
            let counts = histogram(state).counts();
            if counts.is_empty() {
                continue;
            }
            for family in [Some(family), old.filter(|_| old_names)].into_iter().flatten() {
                families.push(family.with(vec![family.series(&[], counts.to_proto())]));
            }
        }
        let mut both = |family: &Family, old: &Family, series: &dyn Fn(&Family) -> Vec<_>| {
            families.push(family.with(series(family)));
            if old_names {
                families.push(old.with(series(old)));
            }
        };
        both(&PLUGINS, &PLUGINS_OLD, &|family| {
            let timed = |(labels, timer): &([String; 3], PluginTimer)| {
                let counts = timer.0.counts();
                let values = labels.each_ref().map(String::as_str);
                (!counts.is_empty()).then(|| family.series(&values, counts.to_proto()))
            };
            lock(&state.plugins).iter().filter_map(timed).collect()
        });
        let MetricsOptions { commit, build_ref, .. } = &state.options;
        both(&INFO, &INFO_OLD, &|family| vec![family.series(&[build_ref, commit], 1.0)]);
        // Several scrapers of the same types are one series.
        let mut faults: BTreeMap<[String; 2], ScrapeFaults> = BTreeMap::new();
        for watched in lock(&state.scrapers).iter() {
            let (sum, more) =
                (faults.entry(watched.types.clone()).or_default(), (watched.faults)());
            sum.polls += more.polls;
            sum.extracts += more.extracts;
        }
        both(&POLL_ERRORS, &POLL_ERRORS_OLD, &|family| {
            let mut polls: BTreeMap<&str, u64> = BTreeMap::new();
            for ([_, source], sum) in &faults {
                *polls.entry(source).or_default() += sum.polls;
            }
            polls.iter().map(|(source, sum)| family.series(&[source], *sum)).collect()
        });
        both(&EXTRACT_ERRORS, &EXTRACT_ERRORS_OLD, &|family| {
            let series = |(types, sum): (&[String; 2], &ScrapeFaults)| {
                family.series(&types.each_ref().map(String::as_str), sum.extracts)
            };
            faults.iter().map(series).collect()
        });
        let open = state.open_streams.load(Ordering::Relaxed);
        families.push(OPEN_STREAMS.with(vec![OPEN_STREAMS.series(&[], open)]));
        if state.options.streams {
            families.push(STREAMS.with(vec![STREAMS.series(&[], open)]));
            let duration = state.stream_duration.counts().to_proto();
            families.push(STREAM_DURATION.with(vec![STREAM_DURATION.series(&[], duration)]));
            let ended = CODES.iter().zip(&state.streams).filter_map(|(code, count)| {
                let count = count.load(Ordering::Relaxed);
                (count > 0).then(|| STREAMS_TOTAL.series(&[code], count))
            });
            families.push(STREAMS_TOTAL.with(ended.collect()));
        }
        families
    }
}

#[cfg(test)]
mod tests;
