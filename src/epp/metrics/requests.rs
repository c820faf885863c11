//! What is counted of requests, by model, target model, fairness id and priority.
//!
//! # Model
//!
//! One row holds everything of one combination of labels. The new families are the rows; the old
//! families, whose labels are fewer, are sums of rows, made when metrics are read. So each thing is
//! counted once.
//!
//! # Bounds
//!
//! Model and fairness id are text that clients chose. Each has at most
//! [`MetricsOptions::label_values`](super::MetricsOptions) distinct values, and there are at most
//! [`MetricsOptions::rows`](super::MetricsOptions) rows; whatever is beyond that, or longer than 200
//! bytes, is counted as `other`. Rows are never removed.
//!
//! # Concurrency
//!
//! Looking a row up takes no lock; a new row replaces the whole table.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap, HashSet},
    hash::{Hash, Hasher},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use prometheus::proto::{Metric, MetricFamily, MetricType};

use super::{
    family::Family,
    histogram::{self, Counts, Histogram},
};
use crate::{
    epp::{director::RefusalCode, ext_proc::Usage},
    support::sync::lock,
};

/// The value of a label that stands for all that had no room.
const OTHER: &str = "other";

/// Longest value of a label that a client chose, in bytes.
const LABEL_BYTES: usize = 200;

const ROW: &[&str] = &["fairness_id", "model_name", "priority", "target_model_name"];
const MODELS: &[&str] = &["model_name", "target_model_name"];

const TOTAL: Family = Family::new(
    "llm_d_epp_request_total",
    MetricType::COUNTER,
    ROW,
    "Total number of processed requests.",
);
const TOTAL_OLD: Family = Family::old(
    "inference_objective_request_total",
    &TOTAL,
    &["model_name", "priority", "target_model_name"],
    "Counter of inference objective requests broken out for each model and target model.",
);
const ERRORS: Family = Family::new(
    "llm_d_epp_request_error_total",
    MetricType::COUNTER,
    &["error_code", "fairness_id", "model_name", "priority", "target_model_name"],
    "Total number of request errors.",
);
const ERRORS_OLD: Family = Family::old(
    "inference_objective_request_error_total",
    &ERRORS,
    &["error_code", "model_name", "target_model_name"],
    "Counter of inference objective requests errors broken out for each model and target model.",
);
const RUNNING: Family = Family::new(
    "llm_d_epp_request_running",
    MetricType::GAUGE,
    ROW,
    "Current number of active running requests.",
);
const RUNNING_OLD: Family = Family::old(
    "inference_objective_running_requests",
    &RUNNING,
    &["model_name"],
    "Inference objective number of running requests in each model.",
);
const TTFT: Family = Family::new(
    "llm_d_epp_request_ttft_seconds",
    MetricType::HISTOGRAM,
    &["fairness_id", "model_name", "priority", "streaming", "target_model_name"],
    "Time to first token in seconds, measured from request received to first response byte. For non-streaming requests, this equals total request duration.",
);

const DURATION: Family = Family::new(
    "llm_d_epp_request_duration_seconds",
    MetricType::HISTOGRAM,
    ROW,
    "End-to-end request latency distribution in seconds.",
);
const DURATION_OLD: Family = Family::old(
    "inference_objective_request_duration_seconds",
    &DURATION,
    MODELS,
    "Inference objective response latency distribution in seconds for each model and target model.",
);
const REQUEST_BYTES: Family = Family::new(
    "llm_d_epp_request_size_bytes",
    MetricType::HISTOGRAM,
    ROW,
    "Incoming request body size distribution in bytes.",
);
const REQUEST_BYTES_OLD: Family = Family::old(
    "inference_objective_request_sizes",
    &REQUEST_BYTES,
    MODELS,
    "Inference objective requests size distribution in bytes for each model and target model.",
);
const RESPONSE_BYTES: Family = Family::new(
    "llm_d_epp_response_size_bytes",
    MetricType::HISTOGRAM,
    ROW,
    "Outgoing response body size distribution in bytes.",
);
const RESPONSE_BYTES_OLD: Family = Family::old(
    "inference_objective_response_sizes",
    &RESPONSE_BYTES,
    MODELS,
    "Inference objective responses size distribution in bytes for each model and target model.",
);
const INPUT_TOKENS: Family = Family::new(
    "llm_d_epp_request_input_tokens",
    MetricType::HISTOGRAM,
    ROW,
    "Input token count distribution per request.",
);
const INPUT_TOKENS_OLD: Family = Family::old(
    "inference_objective_input_tokens",
    &INPUT_TOKENS,
    MODELS,
    "Inference objective input token count distribution for requests in each model.",
);
const OUTPUT_TOKENS: Family = Family::new(
    "llm_d_epp_request_output_tokens",
    MetricType::HISTOGRAM,
    ROW,
    "Output token count distribution per request.",
);
const OUTPUT_TOKENS_OLD: Family = Family::old(
    "inference_objective_output_tokens",
    &OUTPUT_TOKENS,
    MODELS,
    "Inference objective output token count distribution for requests in each model.",
);
const CACHED_TOKENS: Family = Family::new(
    "llm_d_epp_request_cached_tokens",
    MetricType::HISTOGRAM,
    ROW,
    "Distribution of prompt tokens read from cache per request, as reported by the model server in the response.",
);
const CACHED_TOKENS_OLD: Family = Family::old(
    "inference_objective_prompt_cached_tokens",
    &CACHED_TOKENS,
    MODELS,
    "Inference objective prompt cached token count distribution for requests in each model.",
);
const NTPOT: Family = Family::new(
    "llm_d_epp_request_ntpot_seconds",
    MetricType::HISTOGRAM,
    ROW,
    "Normalized time per output token in seconds (end-to-end latency divided by output token count).",
);
const NTPOT_OLD: Family = Family::old(
    "inference_objective_normalized_time_per_output_token_seconds",
    &NTPOT,
    MODELS,
    "Inference objective latency divided by number of output tokens in seconds for each model and target model.",
);
const TPOT: Family = Family::new(
    "llm_d_epp_request_streaming_tpot_seconds",
    MetricType::HISTOGRAM,
    ROW,
    "Average time per output token in seconds for streaming requests, computed as (e2e - TTFT) / (output_tokens - 1).",
);
const ITL: Family = Family::new(
    "llm_d_epp_request_streaming_itl_seconds",
    MetricType::HISTOGRAM,
    ROW,
    "Inter-token latency in seconds for streaming requests, measured as the time between consecutive response body chunks.",
);

/// A histogram of a row under its name, and its old one if it has one.
type Named = (&'static Family, Option<&'static Family>, fn(&RequestMetrics) -> &Histogram);

const HISTOGRAMS: [Named; 9] = [
    (&DURATION, Some(&DURATION_OLD), |row| &row.duration),
    (&REQUEST_BYTES, Some(&REQUEST_BYTES_OLD), |row| &row.request_bytes),
    (&RESPONSE_BYTES, Some(&RESPONSE_BYTES_OLD), |row| &row.response_bytes),
    (&INPUT_TOKENS, Some(&INPUT_TOKENS_OLD), |row| &row.input_tokens),
    (&OUTPUT_TOKENS, Some(&OUTPUT_TOKENS_OLD), |row| &row.output_tokens),
    (&CACHED_TOKENS, Some(&CACHED_TOKENS_OLD), |row| &row.cached_tokens),
    (&NTPOT, Some(&NTPOT_OLD), |row| &row.ntpot),
    (&TPOT, None, |row| &row.tpot),
    (&ITL, None, |row| &row.itl),
];

/// All families of this file.
pub(super) fn families(old_names: bool) -> Vec<&'static Family> {
    let mut families = vec![&TOTAL, &ERRORS, &RUNNING, &TTFT];
    families.extend(HISTOGRAMS.iter().map(|(family, ..)| *family));
    if old_names {
        families.extend([&TOTAL_OLD, &ERRORS_OLD, &RUNNING_OLD]);
        families.extend(HISTOGRAMS.iter().filter_map(|(_, old, _)| *old));
    }
    families
}

/// What a request is counted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLabels<'a> {
    /// The model that the client asked for; empty if there is none.
    pub model: &'a str,
    /// The model that serves it.
    pub target: &'a str,
    /// Flow of the request.
    pub fairness: &'a str,
    /// Priority of its objective.
    pub priority: i32,
}

/// Value of the label `error_code`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// We refused it.
    Refused(RefusalCode),
    /// The model server answered with another status than 200.
    ModelServer,
    /// The exchange ended with a fault of the protocol or of ours.
    Unknown,
}

/// The values of `error_code`, by [`ErrorCode::index`].
const ERROR_CODES: usize = RefusalCode::ALL.len() + 2;

impl ErrorCode {
    fn index(self) -> usize {
        match self {
            Self::Refused(code) => code as usize,
            Self::ModelServer => ERROR_CODES - 2,
            Self::Unknown => ERROR_CODES - 1,
        }
    }

    fn name(index: usize) -> &'static str {
        match RefusalCode::ALL.get(index) {
            Some(code) => code.as_str(),
            None if index == Self::ModelServer.index() => "ModelServerError",
            None => "Unknown",
        }
    }
}

/// How a response that came to its end went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// From the request's headers to the end of the response.
    pub duration: Duration,
    /// From the request's headers to the first bytes of the response's body; `None` = it was empty.
    pub ttft: Option<Duration>,
    /// Did the client ask for a stream?
    pub streaming: bool,
    /// What the model server reported; zeros were not reported.
    pub usage: Usage,
    /// Bytes of the response's body.
    pub response_bytes: u64,
}

/// What is counted of the requests of one combination of labels.
#[derive(Debug)]
pub struct RequestMetrics {
    labels: Labels,
    total: AtomicU64,
    running: AtomicI64,
    /// Was `running` ever touched?
    ran: AtomicBool,
    errors: [AtomicU64; ERROR_CODES],
    pub(super) failed_attempts: AtomicU64,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
    input_tokens: Histogram,
    output_tokens: Histogram,
    cached_tokens: Histogram,
    ntpot: Histogram,
    /// Not streaming, streaming.
    ttft: [Histogram; 2],
    tpot: Histogram,
    itl: Histogram,
}

impl RequestMetrics {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            total: AtomicU64::new(0),
            running: AtomicI64::new(0),
            ran: AtomicBool::new(false),
            errors: Default::default(),
            failed_attempts: AtomicU64::new(0),
            duration: Histogram::new(&histogram::LATENCY),
            request_bytes: Histogram::new(&histogram::REQUEST_BYTES),
            response_bytes: Histogram::new(&histogram::RESPONSE_BYTES),
            input_tokens: Histogram::new(&histogram::INPUT_TOKENS),
            output_tokens: Histogram::new(&histogram::OUTPUT_TOKENS),
            cached_tokens: Histogram::new(&histogram::INPUT_TOKENS),
            ntpot: Histogram::new(&histogram::NTPOT),
            ttft: [Histogram::new(&histogram::TTFT), Histogram::new(&histogram::TTFT)],
            tpot: Histogram::new(&histogram::TPOT),
            itl: Histogram::new(&histogram::ITL),
        }
    }

    /// The value of `target_model_name`.
    pub(super) fn target(&self) -> &str {
        &self.labels.target
    }

    /// A request was routed; its body had so many bytes. It runs until what is returned is dropped.
    /// Requests without a model count as routed, not as running, as in the Go EPP.
    #[must_use]
    pub fn routed(self: &Arc<Self>, request_bytes: u64) -> Running {
        self.total.fetch_add(1, Ordering::Relaxed);
        self.request_bytes.observe(request_bytes);
        let running = !self.labels.model.is_empty();
        if running {
            self.running.fetch_add(1, Ordering::Relaxed);
            self.ran.store(true, Ordering::Relaxed);
        }
        Running(running.then(|| Arc::clone(self)))
    }

    /// A request was not routed, or went wrong after that.
    pub fn failed(&self, code: ErrorCode) {
        self.errors[code.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// A request was refused.
    pub fn refused(&self, code: RefusalCode) {
        self.failed(ErrorCode::Refused(code));
    }

    /// A chunk of a streamed response's body came so long after the one before.
    pub fn inter_token(&self, gap: Duration) {
        self.itl.observe_duration(gap);
    }

    /// A response came to its end. Not to be called for one that broke off.
    pub fn finished(&self, outcome: &Outcome) {
        let Outcome { duration, ttft, streaming, usage, response_bytes } = *outcome;
        self.duration.observe_duration(duration);
        self.response_bytes.observe(response_bytes);
        if usage.prompt > 0 {
            self.input_tokens.observe(usage.prompt);
        }
        if let Some(cached) = usage.cached {
            self.cached_tokens.observe(cached);
        }
        if usage.completion > 0 {
            self.output_tokens.observe(usage.completion);
            self.ntpot.observe(micros(duration) / usage.completion);
        }
        if let Some(ttft) = ttft {
            self.ttft[usize::from(streaming)].observe_duration(ttft);
            if streaming && usage.completion > 1 {
                let rest = micros(duration.saturating_sub(ttft));
                self.tpot.observe(rest / (usage.completion - 1));
            }
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A request that is counted as running, until it is dropped.
#[derive(Debug)]
pub struct Running(Option<Arc<RequestMetrics>>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(row) = &self.0 {
            row.running.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The labels of a row as they are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Labels {
    model: Arc<str>,
    target: Arc<str>,
    fairness: Arc<str>,
    priority: i32,
    priority_text: String,
}

/// Lets rows be found by borrowed labels.
trait Key {
    fn labels(&self) -> RequestLabels<'_>;
}

impl Key for Labels {
    fn labels(&self) -> RequestLabels<'_> {
        RequestLabels {
            model: &self.model,
            target: &self.target,
            fairness: &self.fairness,
            priority: self.priority,
        }
    }
}

impl Key for RequestLabels<'_> {
    fn labels(&self) -> RequestLabels<'_> {
        *self
    }
}

impl<'a> Borrow<dyn Key + 'a> for Labels {
    fn borrow(&self) -> &(dyn Key + 'a) {
        self
    }
}

impl Hash for dyn Key + '_ {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let RequestLabels { model, target, fairness, priority } = self.labels();
        (model, target, fairness, priority).hash(state);
    }
}

impl PartialEq for dyn Key + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.labels() == other.labels()
    }
}

impl Eq for dyn Key + '_ {}

impl Hash for Labels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self as &dyn Key).hash(state);
    }
}

/// All rows.
#[derive(Debug)]
pub(super) struct Requests {
    table: ArcSwap<Table>,
    /// Held while the table is replaced.
    changing: Mutex<()>,
    label_values: usize,
    rows: usize,
}

#[derive(Clone, Debug, Default)]
struct Table {
    rows: HashMap<Labels, Arc<RequestMetrics>>,
    models: HashSet<Arc<str>>,
    fairness: HashSet<Arc<str>>,
}

impl Table {
    fn get(&self, labels: &RequestLabels<'_>) -> Option<&Arc<RequestMetrics>> {
        self.rows.get(labels as &dyn Key)
    }
}

/// The value under which `value` is shown; takes it up if there is room.
fn admit(known: &mut HashSet<Arc<str>>, value: &str, limit: usize) -> Arc<str> {
    if let Some(known) = known.get(value) {
        return Arc::clone(known);
    }
    if value.is_empty() || value == OTHER {
        return value.into();
    }
    if value.len() > LABEL_BYTES || known.len() >= limit {
        return OTHER.into();
    }
    let value: Arc<str> = value.into();
    known.insert(Arc::clone(&value));
    value
}

/// The value under which `value` would be shown, if the table has all that it may have.
fn fold<'a>(known: &HashSet<Arc<str>>, value: &'a str, limit: usize) -> &'a str {
    let full = value.len() > LABEL_BYTES || known.len() >= limit;
    if full && !value.is_empty() && !known.contains(value) { OTHER } else { value }
}

impl Requests {
    pub(super) fn new(label_values: usize, rows: usize) -> Self {
        Self { table: ArcSwap::default(), changing: Mutex::default(), label_values, rows }
    }

    /// The row of these labels, or of those under which they are counted.
    pub(super) fn row(&self, labels: &RequestLabels<'_>) -> Arc<RequestMetrics> {
        let table = self.table.load();
        if let Some(row) = table.get(labels) {
            return Arc::clone(row);
        }
        // A flood of invented names must not take the lock each time.
        let folded = RequestLabels {
            model: fold(&table.models, labels.model, self.label_values),
            target: fold(&table.models, labels.target, self.label_values),
            fairness: fold(&table.fairness, labels.fairness, self.label_values),
            priority: labels.priority,
        };
        let everything =
            RequestLabels { model: OTHER, target: OTHER, fairness: OTHER, priority: 0 };
        let full = (table.rows.len() >= self.rows).then_some(&everything);
        let found = table.get(&folded).or_else(|| full.and_then(|all| table.get(all)));
        match found {
            Some(row) => Arc::clone(row),
            None => self.add(labels),
        }
    }

    fn add(&self, labels: &RequestLabels<'_>) -> Arc<RequestMetrics> {
        let _changing = lock(&self.changing);
        let mut table = Table::clone(&self.table.load());
        let shown = if table.rows.len() < self.rows {
            Labels {
                model: admit(&mut table.models, labels.model, self.label_values),
                target: admit(&mut table.models, labels.target, self.label_values),
                fairness: admit(&mut table.fairness, labels.fairness, self.label_values),
                priority: labels.priority,
                priority_text: labels.priority.to_string(),
            }
        } else {
            Labels {
                model: OTHER.into(),
                target: OTHER.into(),
                fairness: OTHER.into(),
                priority: 0,
                priority_text: "0".to_owned(),
            }
        };
        let new = || Arc::new(RequestMetrics::new(shown.clone()));
        let row = Arc::clone(table.rows.entry(shown.clone()).or_insert_with(new));
        self.table.store(Arc::new(table));
        row
    }

    /// All rows.
    pub(super) fn rows(&self) -> Vec<Arc<RequestMetrics>> {
        self.table.load().rows.values().map(Arc::clone).collect()
    }

    /// The families with their series.
    pub(super) fn collect(&self, old_names: bool, into: &mut Vec<MetricFamily>) {
        let rows = self.rows();
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let counted = rows.iter().filter(|row| load(&row.total) > 0);
        into.push(TOTAL.with(
            counted.clone().map(|row| TOTAL.series(&row.values(), load(&row.total))).collect(),
        ));
        let ran = rows.iter().filter(|row| row.ran.load(Ordering::Relaxed));
        let running = |row: &RequestMetrics| row.running.load(Ordering::Relaxed);
        into.push(
            RUNNING
                .with(ran.clone().map(|row| RUNNING.series(&row.values(), running(row))).collect()),
        );
        let errors = rows.iter().flat_map(|row| {
            let of_code =
                move |(at, count): (usize, &AtomicU64)| (row, ErrorCode::name(at), load(count));
            row.errors.iter().enumerate().map(of_code).filter(|(.., count)| *count > 0)
        });
        into.push(
            ERRORS.with(
                errors
                    .clone()
                    .map(|(row, code, count)| {
                        let [fairness, model, priority, target] = row.values();
                        ERRORS.series(&[code, fairness, model, priority, target], count)
                    })
                    .collect(),
            ),
        );
        into.push(
            TTFT.with(
                rows.iter()
                    .flat_map(|row| {
                        let [fairness, model, priority, target] = row.values();
                        let series = move |(streaming, histogram): (&str, &Histogram)| {
                            let counts = histogram.counts();
                            let values = [fairness, model, priority, streaming, target];
                            (!counts.is_empty()).then(|| TTFT.series(&values, counts.to_proto()))
                        };
                        ["false", "true"].into_iter().zip(&row.ttft).filter_map(series)
                    })
                    .collect(),
            ),
        );
        if old_names {
            let mut total = BTreeMap::<_, u64>::new();
            for row in counted {
                let Labels { model, target, priority_text, .. } = &row.labels;
                *total.entry([&**model, priority_text, target]).or_default() += load(&row.total);
            }
            into.push(summed(&TOTAL_OLD, total));
            let mut running_old = BTreeMap::<_, i64>::new();
            for row in ran {
                *running_old.entry([&*row.labels.model]).or_default() += running(row);
            }
            into.push(summed(&RUNNING_OLD, running_old));
            let mut errors_old = BTreeMap::<_, u64>::new();
            for (row, code, count) in errors {
                let key = [code, &*row.labels.model, &*row.labels.target];
                *errors_old.entry(key).or_default() += count;
            }
            into.push(summed(&ERRORS_OLD, errors_old));
        }
        for (family, old, histogram) in HISTOGRAMS {
            let mut series = Vec::new();
            let mut sums = BTreeMap::<_, Counts>::new();
            for row in &rows {
                let counts = histogram(row).counts();
                if counts.is_empty() {
                    continue;
                }
                series.push(family.series(&row.values(), counts.to_proto()));
                if old_names && old.is_some() {
                    let models = [&*row.labels.model, &*row.labels.target];
                    histogram(row).add_to(sums.entry(models).or_default());
                }
            }
            into.push(family.with(series));
            if let Some(old) = old.filter(|_| old_names) {
                let series =
                    |(models, counts): ([&str; 2], Counts)| old.series(&models, counts.to_proto());
                into.push(old.with(sums.into_iter().map(series).collect()));
            }
        }
    }
}

impl RequestMetrics {
    /// The values of [`ROW`].
    fn values(&self) -> [&str; 4] {
        let Labels { model, target, fairness, priority_text, .. } = &self.labels;
        [fairness, model, priority_text, target]
    }
}

fn summed<const N: usize, V: Into<super::family::Value>>(
    family: &Family,
    sums: BTreeMap<[&str; N], V>,
) -> MetricFamily {
    let series: Vec<Metric> =
        sums.into_iter().map(|(values, sum)| family.series(&values, sum)).collect();
    family.with(series)
}
