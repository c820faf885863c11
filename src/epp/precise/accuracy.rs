//! Predicted against actual: how right the precise scorer was.
//!
//! # Model
//!
//! At the pick a [`Prediction`] becomes an [`Observation`], which waits for what the engine itself says
//! at the response's end: `usage.prompt_tokens_details.cached_tokens`. All counts are in tokens of the
//! prompt.
//!
//! ```text
//! unit      = block size of the engine, or of the request's blocks if it does not report one
//! reusable  = (prompt − 1) rounded down to whole units
//! predicted = min(depth · block, reusable) rounded down to whole units
//! exact     ⇔ |predicted − actual| ≤ max(unit, block)
//! ```
//!
//! An engine has to compute at least one token, so of a prompt that it holds as a whole it computes the
//! last block again.
//!
//! # Causes
//!
//! Tokens that were promised and not there:
//!
//! | cause | when |
//! | --- | --- |
//! | `degraded` | removals may have been lost (the row is degraded or stale) |
//! | `speculative` | the part of the promise that no event had confirmed |
//! | `evicted` | the rest: the engine removed them between the pick and the prefill |
//!
//! Tokens that were there and not promised:
//!
//! | cause | when |
//! | --- | --- |
//! | `unindexed` | nobody indexes the endpoint |
//! | `partial` | the row lacks what the engine stored before we joined (also while it is being rebuilt) |
//! | `degraded` | the row is degraded or stale: it may lack stores, too |
//! | `capped` | the engine reused more than `reusable`, and all of that was promised |
//! | `stored_since` | the rest: stored between the pick and the prefill, by a request that was in flight |
//!
//! # What cannot be observed
//!
//! vLLM leaves the details out if nothing was cached, even when told to report them
//! (`--enable-prompt-tokens-details`). So once an endpoint has reported details, a usage without them
//! says 0; before that it says nothing (`no_details`). Without that rule the worst predictions would be
//! those that nobody sees.
//!
//! Where another endpoint prefills, the blocks that it hands over count as cached for the one that
//! answers (`disaggregated`): what that one held before is in nobody's report.
//!
//! # Concurrency
//!
//! Handles of an endpoint are looked up without a lock, in a table that is replaced when endpoints come
//! and go; its series end with [`Accuracy::endpoint_removed`].

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use arc_swap::ArcSwap;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    core::{Collector, Desc},
    proto::{MetricFamily, MetricType},
};

use crate::{
    epp::{
        datalayer::{Endpoint, EndpointId},
        ext_proc::Usage,
        metrics::Family,
        precise::{IndexError, RowState},
        scheduling::{Ending, Report},
    },
    model::PodState,
    support::{metrics::family, sync::lock},
};

/// Bounds of histograms of tokens.
const TOKENS: [f64; 14] = [
    0.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0, 131_072.0,
];
/// Endpoints that are remembered as gone, so that a request that was routed just before does not bring
/// their series back. Numbers of lives are never used again.
const GONE: usize = 256;

const PROMPT_TOKENS: Family = Family::new(
    "epp_prefix_prompt_tokens_total",
    MetricType::COUNTER,
    &["endpoint"],
    "Prompt tokens of responses that report how many of them were cached.",
);
const CACHED_TOKENS: Family = Family::new(
    "epp_prefix_cached_tokens_total",
    MetricType::COUNTER,
    &["endpoint"],
    "Prompt tokens that were cached, as the endpoint reports them.",
);

/// What decided a pick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// The picked endpoint holds more than another candidate, and none holds more.
    Prefix,
    /// Load: another one holds more, or all hold the same and the sums of scores differ.
    Load,
    /// All hold the same, and the best sum of scores was that of several.
    Tie,
}

impl DecidedBy {
    const ALL: [Self; 3] = [Self::Prefix, Self::Load, Self::Tie];

    fn label(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::Load => "load",
            Self::Tie => "tie",
        }
    }
}

/// Why there are no tokens that count: those that there are were estimated.
pub const ESTIMATED: &str = "estimated";

/// Where the scores of a request came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The index.
    Precise,
    /// The approximate matches, since there were no tokens; the reason is
    /// [`TokenizeError::reason`](crate::tokenize::TokenizeError::reason) or `no_tokens`, or
    /// [`ESTIMATED`].
    NoTokens(&'static str),
    /// The approximate matches, since the index gave no answer.
    NoAnswer(IndexError),
}

/// What was predicted for the endpoint that got a request.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// Who got it.
    pub endpoint: Arc<Endpoint>,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Number of prompts; what engines report is only comparable if it is 1.
    pub prompts: usize,
    /// Tokens per request block.
    pub block: u32,
    /// Leading blocks that it holds, speculative ones included.
    pub depth: u32,
    /// The same by events alone.
    pub confirmed: u32,
    /// The most that a candidate holds, of what counts in scores; at least `depth`.
    pub best: u32,
    /// Trust in its row.
    pub state: Option<RowState>,
    /// What decided.
    pub decided: DecidedBy,
    /// Another endpoint computes the prompt.
    pub disaggregated: bool,
    /// Where the scores came from.
    pub source: Source,
}

impl Prediction {
    /// Tokens per block of the engine.
    fn unit(&self) -> u64 {
        match self.endpoint.metrics().cache_block_tokens {
            0 => u64::from(self.block).max(1),
            tokens => tokens,
        }
    }

    /// Is this `ip:port` the endpoint's? The IP says it: ranks of one pod may be behind one port.
    fn is_of(&self, served: &str) -> bool {
        match served.parse::<SocketAddr>() {
            Ok(served) => served.ip() == self.endpoint.ip(),
            Err(_) => served == self.endpoint.address(),
        }
    }

    /// Tokens that an engine of this unit reuses of so many leading blocks.
    fn reused(&self, blocks: u32, unit: u64) -> u64 {
        let tokens = u64::from(blocks) * u64::from(self.block);
        whole(tokens.min(self.prompt_tokens.saturating_sub(1)), unit)
    }
}

/// The tokens of whole units.
fn whole(tokens: u64, unit: u64) -> u64 {
    tokens - tokens % unit.max(1)
}

/// Why a prediction cannot be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unobserved {
    ErrorStatus,
    Aborted,
    OtherEndpoint,
    Disaggregated,
    NoUsage,
    NoDetails,
    Estimated,
    Fallback,
    SeveralPrompts,
}

impl Unobserved {
    const ALL: [Self; 9] = [
        Self::ErrorStatus,
        Self::Aborted,
        Self::OtherEndpoint,
        Self::Disaggregated,
        Self::NoUsage,
        Self::NoDetails,
        Self::Estimated,
        Self::Fallback,
        Self::SeveralPrompts,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::ErrorStatus => "error_status",
            Self::Aborted => "aborted",
            Self::OtherEndpoint => "other_endpoint",
            Self::Disaggregated => "disaggregated",
            Self::NoUsage => "no_usage",
            Self::NoDetails => "no_details",
            Self::Estimated => "estimated",
            Self::Fallback => "fallback",
            Self::SeveralPrompts => "several_prompts",
        }
    }
}

/// Causes of too much promised, and of too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Degraded,
    Speculative,
    Evicted,
    Unindexed,
    Partial,
    Capped,
    StoredSince,
}

impl Cause {
    const OVER: [Self; 3] = [Self::Degraded, Self::Speculative, Self::Evicted];
    const UNDER: [Self; 5] =
        [Self::Unindexed, Self::Partial, Self::Degraded, Self::Capped, Self::StoredSince];

    fn label(self) -> &'static str {
        match self {
            Self::Degraded => "degraded",
            Self::Speculative => "speculative",
            Self::Evicted => "evicted",
            Self::Unindexed => "unindexed",
            Self::Partial => "partial",
            Self::Capped => "capped",
            Self::StoredSince => "stored_since",
        }
    }
}

/// Counters of one label, each found by its value.
#[derive(Debug)]
struct Counters<K> {
    vec: IntCounterVec,
    series: Vec<(K, IntCounter)>,
}

impl<K: Copy + PartialEq> Counters<K> {
    /// All series are there from the start, so that a rate is one from the first event on.
    fn new(
        (name, label, help): (&str, &str, &str),
        values: &[K],
        text: fn(K) -> &'static str,
    ) -> prometheus::Result<Self> {
        let vec = IntCounterVec::new(Opts::new(name, help), &[label])?;
        let series = values.iter().map(|&value| (value, vec.with_label_values(&[text(value)])));
        Ok(Self { series: series.collect(), vec })
    }

    fn add(&self, value: K, by: u64) {
        if let Some((_, counter)) = self.series.iter().find(|(known, _)| *known == value) {
            counter.inc_by(by);
        }
    }
}

/// The metrics of predictions. Clones count into the same series.
#[derive(Clone, Debug)]
pub struct Accuracy(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    predicted: Histogram,
    actual: Histogram,
    difference: Histogram,
    outcomes: Counters<Outcome>,
    over: Counters<Cause>,
    under: Counters<Cause>,
    decided: Counters<DecidedBy>,
    regret: Counters<DecidedBy>,
    unobserved: Counters<Unobserved>,
    mismatches: IntCounter,
    pods: Pods,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Exact,
    Over,
    Under,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Exact, Self::Over, Self::Under];

    fn label(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Over => "over",
            Self::Under => "under",
        }
    }
}

/// What one endpoint reported.
#[derive(Debug)]
struct Pod {
    name: String,
    prompt: AtomicU64,
    cached: AtomicU64,
    /// It has reported how many tokens were cached.
    details: AtomicBool,
}

impl Pod {
    /// How many tokens the endpoint says were cached; see the [module](self).
    fn cached(&self, usage: Usage) -> Option<u64> {
        if usage.cached.is_some() {
            self.details.store(true, Relaxed);
        }
        usage.cached.or_else(|| self.details.load(Relaxed).then_some(0))
    }
}

/// What endpoints reported, for those that there are.
#[derive(Debug)]
struct Pods {
    descs: [Desc; 2],
    table: ArcSwap<HashMap<EndpointId, Arc<Pod>>>,
    /// The latest that went. Held while the table is replaced.
    gone: Mutex<VecDeque<EndpointId>>,
}

impl Pods {
    fn new() -> prometheus::Result<Self> {
        let descs = [PROMPT_TOKENS.desc()?, CACHED_TOKENS.desc()?];
        Ok(Self { descs, table: ArcSwap::default(), gone: Mutex::default() })
    }

    /// The endpoint's counters; of one that is gone they are nobody's.
    fn of(&self, endpoint: &Endpoint) -> Arc<Pod> {
        if let Some(pod) = self.table.load().get(&endpoint.id()) {
            return Arc::clone(pod);
        }
        let gone = lock(&self.gone);
        let mut table = HashMap::clone(&self.table.load());
        if let Some(pod) = table.get(&endpoint.id()) {
            return Arc::clone(pod);
        }
        let pod = Arc::new(Pod {
            name: endpoint.info().name.to_string(),
            prompt: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            details: AtomicBool::new(false),
        });
        if !gone.contains(&endpoint.id()) {
            table.insert(endpoint.id(), Arc::clone(&pod));
            self.table.store(Arc::new(table));
        }
        pod
    }

    fn remove(&self, endpoint: EndpointId) {
        let mut gone = lock(&self.gone);
        // Another plugin that shares the series may have said so already.
        if gone.contains(&endpoint) {
            return;
        }
        if gone.len() == GONE {
            gone.pop_front();
        }
        gone.push_back(endpoint);
        let mut table = HashMap::clone(&self.table.load());
        table.remove(&endpoint);
        self.table.store(Arc::new(table));
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // Two lives of one name may overlap for a moment, and a series must not come twice.
        let mut sums = BTreeMap::<&str, [u64; 2]>::new();
        let table = self.table.load();
        for pod in table.values() {
            let [prompt, cached] = sums.entry(&pod.name).or_default();
            *prompt += pod.prompt.load(Relaxed);
            *cached += pod.cached.load(Relaxed);
        }
        let all = |family: &Family, which: usize| {
            family.with(sums.iter().map(|(pod, sum)| family.series(&[pod], sum[which])).collect())
        };
        vec![all(&PROMPT_TOKENS, 0), all(&CACHED_TOKENS, 1)]
    }
}

impl Accuracy {
    /// All plugins with one registry count into the same series.
    ///
    /// # Errors
    ///
    /// When metrics cannot be registered.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        family(registry, Self::new()?)
    }

    fn new() -> prometheus::Result<Self> {
        let histogram = |name: &str, help: &str| {
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(TOKENS.to_vec()))
        };
        Ok(Self(Arc::new(Inner {
            predicted: histogram(
                "epp_prefix_predicted_tokens",
                "Prompt tokens that the endpoint was predicted to reuse, of comparable requests.",
            )?,
            actual: histogram(
                "epp_prefix_actual_tokens",
                "Prompt tokens that the endpoint says it reused, of the same requests.",
            )?,
            difference: histogram(
                "epp_prefix_difference_tokens",
                "Distance of the two, of the same requests.",
            )?,
            outcomes: Counters::new(
                (
                    "epp_prefix_predictions_total",
                    "outcome",
                    "Predictions compared with what the endpoint reports; exact is within one block.",
                ),
                &Outcome::ALL,
                Outcome::label,
            )?,
            over: Counters::new(
                (
                    "epp_prefix_overpredicted_tokens_total",
                    "cause",
                    "Tokens that were predicted and not reused, of predictions that were not exact.",
                ),
                &Cause::OVER,
                Cause::label,
            )?,
            under: Counters::new(
                (
                    "epp_prefix_underpredicted_tokens_total",
                    "cause",
                    "Tokens that were reused and not predicted, of predictions that were not exact.",
                ),
                &Cause::UNDER,
                Cause::label,
            )?,
            decided: Counters::new(
                ("epp_prefix_picks_total", "decided_by", "Picks by what decided them."),
                &DecidedBy::ALL,
                DecidedBy::label,
            )?,
            regret: Counters::new(
                (
                    "epp_prefix_regret_tokens_total",
                    "decided_by",
                    "Tokens that the best candidate was predicted to hold more than the picked one.",
                ),
                &DecidedBy::ALL,
                DecidedBy::label,
            )?,
            unobserved: Counters::new(
                (
                    "epp_prefix_unobserved_total",
                    "reason",
                    "Picks whose prediction could not be compared.",
                ),
                &Unobserved::ALL,
                Unobserved::label,
            )?,
            mismatches: IntCounter::new(
                "epp_prefix_prompt_mismatches_total",
                "Comparable requests whose endpoint counts another number of prompt tokens.",
            )?,
            pods: Pods::new()?,
        })))
    }

    /// Counts what is known at the pick.
    #[must_use]
    pub fn predicted(&self, prediction: Prediction) -> Observation {
        let inner = &self.0;
        inner.decided.add(prediction.decided, 1);
        if prediction.source == Source::Precise {
            let missed = prediction.best.saturating_sub(prediction.depth);
            let tokens = u64::from(missed) * u64::from(prediction.block);
            inner.regret.add(prediction.decided, tokens.min(prediction.prompt_tokens));
        }
        let pod = inner.pods.of(&prediction.endpoint);
        Observation { inner: Arc::clone(inner), pod, prediction }
    }

    /// Ends the series of an endpoint that is gone.
    pub fn endpoint_removed(&self, endpoint: &Endpoint) {
        self.0.pods.remove(endpoint.id());
    }
}

impl Inner {
    fn parts(&self) -> [&dyn Collector; 10] {
        [
            &self.predicted,
            &self.actual,
            &self.difference,
            &self.outcomes.vec,
            &self.over.vec,
            &self.under.vec,
            &self.decided.vec,
            &self.regret.vec,
            &self.unobserved.vec,
            &self.mismatches,
        ]
    }
}

impl Collector for Accuracy {
    fn desc(&self) -> Vec<&Desc> {
        let inner = &self.0;
        inner.parts().into_iter().flat_map(Collector::desc).chain(&inner.pods.descs).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let inner = &self.0;
        inner.parts().into_iter().flat_map(Collector::collect).chain(inner.pods.collect()).collect()
    }
}

/// One prediction that waits for the engine's own number.
#[derive(Debug)]
pub struct Observation {
    inner: Arc<Inner>,
    pod: Arc<Pod>,
    prediction: Prediction,
}

impl Observation {
    /// Compares with what the response says, and reports both if `metadata` is asked for:
    /// `predicted_cached_tokens`, `actual_cached_tokens` and `prompt_tokens`, each if it is known.
    pub fn ended(self, ending: &Ending<'_>, metadata: bool, report: &mut Report) {
        let Self { inner, pod, prediction } = &self;
        let comparable = match &prediction.source {
            Source::NoTokens(ESTIMATED) => Err(Unobserved::Estimated),
            Source::NoTokens(_) | Source::NoAnswer(_) => Err(Unobserved::Fallback),
            Source::Precise if prediction.prompts != 1 => Err(Unobserved::SeveralPrompts),
            Source::Precise => Ok(prediction.unit()),
        };
        let predicted = comparable.map(|unit| (prediction.reused(prediction.depth, unit), unit));
        let actual = self.actual(ending);
        if let Ok((usage, cached)) = actual {
            pod.prompt.fetch_add(usage.prompt, Relaxed);
            pod.cached.fetch_add(cached, Relaxed);
        }
        match (actual, predicted) {
            (Ok((usage, cached)), Ok((predicted, unit))) => {
                inner.mismatches.inc_by(u64::from(usage.prompt != prediction.prompt_tokens));
                self.compare(predicted, cached, unit);
            }
            (Err(why), _) | (_, Err(why)) => inner.unobserved.add(why, 1),
        }
        if metadata {
            let prompt = ending.usage.map(|usage| usage.prompt);
            let known = comparable.is_ok().then_some(prediction.prompt_tokens);
            let numbers = [
                ("predicted_cached_tokens", predicted.ok().map(|(tokens, _)| tokens)),
                ("actual_cached_tokens", actual.ok().map(|(_, cached)| cached)),
                ("prompt_tokens", prompt.or(known)),
            ];
            let known = numbers.into_iter().filter_map(|(name, n)| Some((name, n? as f64)));
            report.numbers.extend(known);
        }
    }

    /// What the endpoint says it reused.
    fn actual(&self, ending: &Ending<'_>) -> Result<(Usage, u64), Unobserved> {
        if ending.status.is_some_and(|status| status != 200) {
            return Err(Unobserved::ErrorStatus);
        }
        if !ending.completed {
            return Err(Unobserved::Aborted);
        }
        if ending.served.is_some_and(|served| !self.prediction.is_of(served)) {
            return Err(Unobserved::OtherEndpoint);
        }
        if self.prediction.disaggregated {
            return Err(Unobserved::Disaggregated);
        }
        let usage = ending.usage.ok_or(Unobserved::NoUsage)?;
        let cached = self.pod.cached(usage).ok_or(Unobserved::NoDetails)?;
        Ok((usage, cached))
    }

    fn compare(&self, predicted: u64, actual: u64, unit: u64) {
        let Self { inner, prediction, .. } = self;
        let difference = predicted.abs_diff(actual);
        inner.predicted.observe(predicted as f64);
        inner.actual.observe(actual as f64);
        inner.difference.observe(difference as f64);
        if difference <= unit.max(u64::from(prediction.block)) {
            inner.outcomes.add(Outcome::Exact, 1);
            return;
        }
        let untrusted =
            prediction.state.is_some_and(|row| row.stale || row.state == PodState::Degraded);
        if predicted > actual {
            inner.outcomes.add(Outcome::Over, 1);
            if untrusted {
                inner.over.add(Cause::Degraded, difference);
                return;
            }
            let confirmed = prediction.reused(prediction.confirmed, unit).min(predicted);
            let speculative = predicted - confirmed.max(actual);
            inner.over.add(Cause::Speculative, speculative);
            inner.over.add(Cause::Evicted, difference - speculative);
            return;
        }
        inner.outcomes.add(Outcome::Under, 1);
        let reusable = whole(prediction.prompt_tokens.saturating_sub(1), unit);
        let cause = match prediction.state {
            None => Cause::Unindexed,
            Some(_) if untrusted => Cause::Degraded,
            _ if predicted == reusable => Cause::Capped,
            Some(RowState { state: PodState::Live, .. }) => Cause::StoredSince,
            Some(_) => Cause::Partial,
        };
        inner.under.add(cause, difference);
    }
}

#[cfg(test)]
mod tests;
