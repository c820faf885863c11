//! What a run says at its end. This is the JSON document, version [`SCHEMA`]; everything else is made
//! from it.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`text`] | tables for people |
//! | [`html`] | one page with plots, without a network |
//! | [`llmd`] | llm-d's Benchmark Report v0.2.1 |
//! | [`guidellm`] | the shape of GuideLLM's `benchmarks.json` |
//! | [`csv`] | one line for each scenario |
//! | [`compare`] | two reports against each other |
//! | [`repeats`] | what repeats say together, and policies against each other |
//!
//! Times in names: `_ms` milliseconds, `_us` microseconds, `_s` seconds. A quantity that was not measured
//! is `null` or left out, never 0.

pub mod compare;
pub mod csv;
pub mod guidellm;
pub mod html;
pub mod llmd;
pub mod repeats;
pub mod text;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Name and version of the document.
pub const SCHEMA: &str = "kv-indexer.loadgen.report/1";
/// Bytes of a document that is read. A million points of timelines and distributions fit.
const MAX_BYTES: u64 = 256 << 20;

/// Why a document could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file cannot be opened or read.
    #[error("reading {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than what is read.
    #[error("{}: larger than {limit} bytes", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The limit, bytes.
        limit: u64,
    },
    /// The file is not JSON.
    #[error("{}: not JSON", path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The document is none of ours, or of a version that is not known here.
    #[error("{}: schema is {found:?}, this program reads {SCHEMA:?}", path.display())]
    Version {
        /// Which.
        path: PathBuf,
        /// What it says it is; empty if it does not say.
        found: String,
    },
    /// A field is missing or of another type.
    #[error("{}: {field}", path.display())]
    Field {
        /// Which.
        path: PathBuf,
        /// Where in the document.
        field: String,
        /// Why.
        source: serde_json::Error,
    },
}

impl Report {
    /// Reads the document at `path`. Fields that are not known are passed over, so that later programs
    /// can add some.
    ///
    /// # Errors
    ///
    /// [`LoadError`], which names the file and the place in it.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let named = || path.to_owned();
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(|source| LoadError::Read { path: named(), source })?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(LoadError::TooLarge { path: named(), limit: MAX_BYTES });
        }
        let document: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|source| LoadError::Json { path: named(), source })?;
        let found = document["schema"].as_str().unwrap_or_default();
        if found != SCHEMA {
            return Err(LoadError::Version { path: named(), found: found.to_owned() });
        }
        Self::deserialize(&document).map_err(|source| {
            let (field, source) = place(&document).unwrap_or(("document".to_owned(), source));
            LoadError::Field { path: named(), field, source }
        })
    }
}

/// The first entry of a list that is at fault: serde names the field, not the entry.
fn place(document: &serde_json::Value) -> Option<(String, serde_json::Error)> {
    fn first<T: serde::de::DeserializeOwned>(
        document: &serde_json::Value,
        list: &str,
    ) -> Option<(String, serde_json::Error)> {
        document[list].as_array()?.iter().enumerate().find_map(|(i, entry)| {
            T::deserialize(entry).err().map(|error| (format!("{list}[{i}]"), error))
        })
    }
    first::<Scenario>(document, "scenarios")
        .or_else(|| first::<Summary>(document, "summaries"))
        .or_else(|| first::<Comparison>(document, "comparisons"))
}

/// A whole document.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// Did every scenario pass its own checks?
    pub valid: bool,
    /// Faults and doubts that concern the whole run.
    pub warnings: Vec<String>,
    /// When it began, nanoseconds since the Unix epoch.
    pub started_unix_ns: u64,
    /// How long it took.
    pub duration_s: f64,
    /// Was it ended by a signal?
    pub interrupted: bool,
    /// What it ran on.
    pub environment: Environment,
    /// What was asked for: the command line, and what it came to.
    pub config: serde_json::Value,
    /// One for each scenario, policy, level and repeat, in the order in which they ran.
    pub scenarios: Vec<Scenario>,
    /// Repeats of the same taken together.
    pub summaries: Vec<Summary>,
    /// Policies against each other.
    pub comparisons: Vec<Comparison>,
}

/// What the run ran on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of the package.
    pub version: String,
    /// Commit of the checkout, if there is one.
    pub git_sha: Option<String>,
    /// As `uname` says it.
    pub kernel: String,
    /// Model of the CPU.
    pub cpu: String,
    /// Cores that may be used.
    pub cores: f64,
    /// Load average of the last minute, before.
    pub load_before: f64,
    /// The same after.
    pub load_after: f64,
    /// Memory of the machine, bytes.
    pub memory_bytes: u64,
    /// Limits of our cgroup, by file name.
    pub cgroup: BTreeMap<String, String>,
}

/// How requests were paced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoopKind {
    /// The next one when there is a place.
    #[default]
    Closed,
    /// At its time.
    Open,
}

/// One scenario with one policy, at one level, once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// `steady`, `throughput`, `sweep`, `trace`, `storm`, or that of a workload in the default report.
    pub name: String,
    /// `random`, `round-robin`, `least-load`, `approximate`, `precise`, `constant`, `gateway`, or the name of
    /// an external endpoint picker.
    pub policy: String,
    /// Which repeat, from 0.
    pub repeat: u32,
    /// Which level, if there are several: concurrency or requests per second.
    pub level: Option<f64>,
    /// How requests were paced.
    #[serde(rename = "loop")]
    pub pacing: LoopKind,
    /// The workload, as its own text.
    pub workload: String,
    /// Seed of plan and arrivals.
    pub seed: u64,
    /// Did it pass its own checks?
    pub valid: bool,
    /// Why not, and other doubts.
    pub warnings: Vec<String>,
    /// From the first intended arrival to the last answer.
    pub duration_s: f64,
    /// Requests sent.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The same by label.
    pub errors_by_label: BTreeMap<String, u64>,
    /// Requests without an end when the run ended.
    pub incomplete: u64,
    /// Requests per second: asked for, in open loops with a rate.
    pub asked_rps: Option<f64>,
    /// Requests per second: sent.
    pub sent_rps: f64,
    /// Complete answers per second.
    pub throughput_rps: f64,
    /// Tokens of answers per second.
    pub output_tokens_per_s: f64,
    /// Tokens of prompts per second.
    pub prompt_tokens_per_s: f64,
    /// Requests in flight while requests were sent.
    pub in_flight: InFlight,
    /// To the first token from the intended arrival; incomplete ones count with what they had waited.
    pub ttft_ms: Percentiles,
    /// To the first token from the send.
    pub ttft_from_send_ms: Percentiles,
    /// From the intended arrival to the send.
    pub dispatch_delay_ms: Percentiles,
    /// To the endpoint picker's answer.
    pub pick_ms: Option<Percentiles>,
    /// All gaps between pieces of answers.
    pub itl_ms: Percentiles,
    /// (last − first token) ÷ (tokens − 1), by request.
    pub tpot_ms: Percentiles,
    /// To the end of the answer from the intended arrival.
    pub latency_ms: Percentiles,
    /// Share of requests that met the objectives.
    pub goodput: Option<Goodput>,
    /// Index of dispersion of the realised arrivals (1 = Poisson, 0 = constant), by window in seconds.
    pub dispersion: BTreeMap<String, f64>,
    /// Bursts of requests.
    pub bursts: Option<Bursts>,
    /// How late the index is; `null` without an index.
    pub freshness_us: Option<Freshness>,
    /// Bursts of events and how the index came through.
    pub storm: Option<Storm>,
    /// Promised and found tokens.
    pub hits: Option<Hits>,
    /// Cost by component.
    pub resources: BTreeMap<String, Resources>,
    /// Says that there was no gateway, where there was none.
    pub gateway: String,
    /// Requests by pod.
    pub pods: BTreeMap<String, PodShare>,
    /// Largest share ÷ mean share.
    pub imbalance: Option<f64>,
    /// Points of the distribution of `ttft_ms`: (milliseconds, share), rising.
    pub ttft_cdf: Vec<[f64; 2]>,
    /// (predicted, actual) tokens of at most 2 000 requests.
    pub predictions: Vec<[f64; 2]>,
    /// What happened when.
    pub timeline: Vec<Moment>,
}

/// Quantiles of one quantity. One that is not backed by enough samples is still given, and named in
/// `doubtful`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Samples.
    pub n: u64,
    /// Arithmetic mean.
    pub mean: Option<f64>,
    /// Standard deviation.
    pub stddev: Option<f64>,
    /// Smallest.
    pub min: Option<f64>,
    /// Median.
    pub p50: Option<f64>,
    /// 90th percentile.
    pub p90: Option<f64>,
    /// 95th; wants 200 samples.
    pub p95: Option<f64>,
    /// 99th; wants 1 000 samples.
    pub p99: Option<f64>,
    /// 99.9th; wants 10 000 samples.
    pub p999: Option<f64>,
    /// Largest.
    pub max: Option<f64>,
    /// Percentiles with too few samples, by name.
    pub doubtful: Vec<String>,
}

/// Requests in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InFlight {
    /// Asked for, in closed loops.
    pub asked: Option<u64>,
    /// Mean.
    pub mean: f64,
    /// 95th percentile.
    pub p95: f64,
    /// Largest.
    pub max: u64,
}

/// How many requests met the objectives; failed and incomplete ones did not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Goodput {
    /// The objectives, as text.
    pub objectives: String,
    /// Requests that met all.
    pub met: u64,
    /// Share of all requests sent.
    pub share: f64,
    /// Wilson's 95 % interval of the share.
    pub interval: [f64; 2],
    /// Requests per second that met all.
    pub rps: f64,
}

/// Bursts of requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bursts {
    /// How many.
    pub count: u64,
    /// Requests in each.
    pub size: u64,
    /// From first to last send of a burst, milliseconds; the promise is 1.
    pub release_ms: Percentiles,
    /// To the first token from the intended arrival, of requests in bursts.
    pub ttft_ms: Percentiles,
    /// From a burst until the time to the first token is back below twice its median before, seconds.
    pub recovery_s: Percentiles,
}

/// From publishing an event to the first score that shows it, as an outside client sees it,
/// microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Freshness {
    /// Stores and removes together: median.
    pub p50: Option<f64>,
    /// 95th percentile.
    pub p95: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
    /// Largest.
    pub max: Option<f64>,
    /// Probes.
    pub n: u64,
    /// Probes that were not visible in time.
    pub lost: u64,
    /// Series of picks that were visible and that the endpoint picker did not follow in time, because of
    /// load; they are not `lost`.
    #[serde(default)]
    pub routed_elsewhere: u64,
    /// By kind: `store`, `remove`, `engine_step` (from the end of an engine's step), `endpoint_picker` (until
    /// the endpoint picker routes by a store), each under `idle`, `steady`, `burst` or `delayed`:
    /// `store.idle`.
    pub kinds: BTreeMap<String, Percentiles>,
    /// Time between two polls, microseconds: what the numbers may be too large by.
    pub resolution_us: Option<f64>,
    /// Time between two picks, microseconds: what `endpoint_picker` may be too large by.
    pub pick_resolution_us: Option<f64>,
    /// What the indexer's own `WaitVisible` says of the same events.
    pub wait_visible: Option<Percentiles>,
    /// Ours − the indexer's, microseconds.
    pub difference: Option<Percentiles>,
}

/// Injected events.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Storm {
    /// What was injected, as text.
    pub options: String,
    /// Publishers.
    pub publishers: u64,
    /// Batches sent.
    pub batches: u64,
    /// Blocks stored and removed.
    pub blocks: u64,
    /// Bursts.
    pub bursts: u64,
    /// Bursts that were not seen to be drained within 10 s; `drain_ms` is of the others.
    #[serde(default)]
    pub undrained: u64,
    /// Blocks per second between first and last send.
    pub blocks_per_s: f64,
    /// Batches sent and not yet applied, largest.
    pub backlog_max_batches: u64,
    /// Age of the oldest batch that was sent and not applied, largest, milliseconds.
    pub backlog_max_ms: f64,
    /// From the last send of a burst until all of it is applied, milliseconds.
    pub drain_ms: Percentiles,
    /// Batches that were never applied.
    pub lost_batches: u64,
    /// Gaps that the indexer noticed.
    pub gaps: u64,
    /// Replays that it asked for.
    pub replays: u64,
    /// Pods that were not back to what they were sent at the end, by name.
    pub wrong_pods: Vec<String>,
    /// CPU of the indexer per block, nanoseconds.
    pub indexer_ns_per_block: Option<f64>,
}

/// Promised and found tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hits {
    /// Requests of which both are known, or only what was found if nothing was promised.
    pub requests: u64,
    /// Tokens that were promised; `null` where nobody promised.
    pub predicted_tokens: Option<u64>,
    /// Tokens that were found.
    pub actual_tokens: u64,
    /// Tokens of these prompts.
    pub prompt_tokens: u64,
    /// Mean distance of the two.
    pub mean_abs_error_tokens: Option<f64>,
    /// Requests with more promised than found.
    pub over: u64,
    /// Requests with less promised than found.
    pub under: u64,
    /// Requests with a distance of at most one block.
    pub exact: u64,
    /// Found ÷ asked.
    pub hit_ratio: f64,
    /// What one cache of infinite size would have found ÷ asked.
    pub ideal_hit_ratio: Option<f64>,
    /// Tokens that the best pod held and the chosen one did not.
    pub regret_tokens: Option<u64>,
    /// Where the prediction comes from.
    pub source: String,
}

/// Cost of one component.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// CPU, milliseconds per request sent; `null` without requests.
    pub cpu_ms_per_request: Option<f64>,
    /// CPU, seconds.
    pub cpu_s: f64,
    /// CPU ÷ time.
    pub cores: f64,
    /// Largest resident memory, bytes.
    pub rss_peak_bytes: u64,
    /// Context switches that it made by itself.
    pub voluntary_switches: u64,
    /// Context switches that it was made to do.
    pub involuntary_switches: u64,
    /// Largest number of descriptors.
    pub fds_peak: u64,
    /// Largest number of threads.
    pub threads_peak: u64,
}

impl Resources {
    /// Sets the cost per request.
    pub fn per_request(&mut self, requests: u64) {
        self.cpu_ms_per_request = (requests > 0).then(|| self.cpu_s * 1e3 / requests as f64);
    }
}

/// A pod's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PodShare {
    /// Requests that it served.
    pub requests: u64,
    /// Share of all.
    pub share: f64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Of these, found in its cache.
    pub cached_tokens: u64,
}

/// A slice of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Its begin, seconds from the start.
    pub at_s: f64,
    /// Its length, seconds.
    pub span_s: f64,
    /// Requests meant to be sent in it.
    pub arrivals: u64,
    /// Answers completed in it.
    pub complete: u64,
    /// Requests that failed in it.
    pub errors: u64,
    /// Largest number in flight.
    pub in_flight: u64,
    /// Median time to the first token of those that arrived in it.
    pub ttft_p50_ms: Option<f64>,
    /// The 95th percentile.
    pub ttft_p95_ms: Option<f64>,
    /// Did a burst of requests begin in it?
    pub burst: bool,
    /// Did a burst of events begin in it?
    pub event_burst: bool,
    /// Largest freshness probe in it, microseconds.
    pub freshness_max_us: Option<f64>,
    /// Largest backlog, batches.
    pub backlog_batches: Option<u64>,
    /// Cores in use, by component.
    pub cores: BTreeMap<String, f64>,
    /// Resident memory, by component, bytes.
    pub rss_bytes: BTreeMap<String, u64>,
}

/// Repeats of one scenario, policy and level taken together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// As in [`Scenario`].
    pub name: String,
    /// As in [`Scenario`].
    pub policy: String,
    /// As in [`Scenario`].
    pub level: Option<f64>,
    /// Repeats.
    pub repeats: u32,
    /// By name of the quantity, such as `throughput_rps` and `ttft_ms.p95`.
    pub quantities: BTreeMap<String, Spread>,
}

/// One quantity over repeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Median of the repeats.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Standard deviation ÷ mean; `null` for a single repeat.
    pub cv: Option<f64>,
}

/// One policy against another in the same scenario.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// As in [`Scenario`].
    pub name: String,
    /// As in [`Scenario`].
    pub level: Option<f64>,
    /// The policy that is judged.
    pub policy: String,
    /// What it is judged against.
    pub against: String,
    /// By name of the quantity.
    pub quantities: BTreeMap<String, Difference>,
}

/// `policy ÷ against`, of repeats with the same seed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Median of the pairs' ratios.
    pub ratio: f64,
    /// 95 % bootstrap interval of it; `null` for fewer than three pairs.
    pub interval: Option<[f64; 2]>,
    /// Is a smaller value the better one?
    pub smaller_is_better: bool,
    /// Did `policy` lose, beyond the interval?
    pub lost: bool,
}
