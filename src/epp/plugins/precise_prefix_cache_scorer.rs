//! `precise-prefix-cache-scorer`: what endpoints really hold, from the events of their engines.
//!
//! # Formula
//!
//! ```text
//! match    = leading blocks that the endpoint holds, speculative ones included; summed over prompts
//! weighted = the same, each block weighed by the best tier that has it
//! score    = state weight · (w · min(1, match · block / S)² + (1 − w) · weighted / total)
//! ```
//!
//! with `w` = `matchLengthWeight` (0), `S` = `matchLengthScaleTokens` (8192), `block` in tokens and
//! `total` the full blocks of the prompts. A match of less than `minMatchTokens` (0) tokens counts as
//! none. That is `scoreNormalization: absolute`. With `minmax` the scores of the candidates that the
//! filters left become `(score − min) / (max − min)`; a miss is a score of 0 as any other, so that a
//! lone hit is 1. All equal: 1 if there is a hit, else 0.
//!
//! `stateWeights` say what a row is worth: live 1, partial 1 (scores may be low, never high), degraded
//! 0.7 (they may be high), replaying 0.7 (blocks that the rest of the replay removes are still there),
//! connecting 1 (nothing is claimed but what we expect ourselves). `stale` (0) stands in for whatever
//! the state is: disconnected, or traffic without events. An endpoint that nobody indexes scores 0.
//!
//! # Who knows
//!
//! With `indexerService` the `kv-indexer` there, whose hash settings, tiers and subscriptions hold. Else an
//! index in this process, whose subscriptions follow the endpoints: `tokenProcessorConfig` (16 tokens a
//! block; XXH3 unless `hashAlgorithm` names llm-d's, since keys never leave the process),
//! `kvCacheBackendConfigs` (gpu 1, cpu 0.8, others 1), `kvEventsConfig`.
//!
//! # Matches for others
//!
//! `match` is published under the plugin's name for `prefix-cache-scorer`, the deciders and the load
//! producers, and is the same for all profiles of a request. Endpoints whose state weighs 0 have none.
//!
//! # Failure
//!
//! A request without exact tokens, or without an answer in time, is scored by approximate matches:
//! where prompts were sent, by the bytes of their text, as `prefix-cache-scorer` does by itself. Every
//! routed request is remembered, whatever scored it, and tokens are not needed for it, so that they
//! are of use at once. Counted by reason in `epp_precise_fallback_total`; what keeps scores from being
//! right and will not go away by itself is said once per model.
//!
//! # Cost
//!
//! A prompt is hashed once into block keys before the pick, and once by its bytes after it, for the
//! endpoints that get it. Candidates are looked up by bytes only where a request falls back.
//!
//! # Hot prefixes, speculation
//!
//! See modules `hot` (`hotPrefix: true`, or `{marginTokens: 0}`; as a filter it runs after all others) and
//! `speculation` (`speculativeIndexing`, `speculativeTTL` 2s, `speculativeWeight` 0.5). Both look at the first
//! endpoint of the primary profile and of the profile `prefill`; if there is one, it computes the
//! prompt.
//!
//! # Differences to the Go EPP
//!
//! * Both forms of its parameters are read: `tokenProcessorConfig` at the top or within
//!   `indexerConfig`. Redis and Valkey are not used.
//! * Older releases normalized over the endpoints with a hit, so that the weakest hit scored as a miss.
//! * Blocks are not cut off to whole numbers once weighted.

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use smallvec::SmallVec;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use self::{
    fallback::{Fallbacks, NO_TOKENS, NOT_INDEXED, UNKNOWN_MODEL},
    hot::{Held, Hot},
    params::{Expected, Index, Params},
    score::Scoring,
    speculation::{Entry, Speculation},
};
use crate::{
    epp::{
        datalayer::{Endpoint, Endpoints},
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        plugins::{
            Building, Registration, Stability,
            prefix::{BYTES_PER_TOKEN, DEFAULT_CAPACITY, Limit, Matcher, Sizing, input_tokens},
        },
        precise::{
            EndpointMatch, IndexError, PrefixIndex, Query,
            accuracy::{Accuracy, ESTIMATED, Observation, Prediction, Source},
            embedded, remote,
        },
        request::InferenceRequest,
        scheduling::{
            BoxFuture, Cycle, DataKey, DataProducer, Ending, Filter, Flight, Plugin, PreRequest,
            PrefixMatches, Produced, Report, SchedulingResult, Scorer, Task,
        },
    },
    hash::Prompt,
    support::{fields::Fields, metrics::family, sync::lock},
    tokenize::TokenizeError,
};

mod fallback;
mod hot;
mod params;
mod score;
mod speculation;

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

const TYPE: &str = "precise-prefix-cache-scorer";
/// The profile whose endpoint computes the prompt.
const PREFILL: &str = "prefill";
/// How often the index is asked why nothing can match.
const LOOK: Duration = Duration::from_secs(10);
/// Longer than any index keeps a question, so that a request always hears why there is no answer.
const DEADLINE: Duration = Duration::from_millis(500);
/// Approximate matches: blocks of so many tokens, of prompts up to so many.
const APPROXIMATE_BLOCK: usize = 64;
const APPROXIMATE_TOKENS: usize = 131_072;

/// See the [module](self). Under the type `precise-prefix-cache-producer` it ranks nobody.
#[derive(Debug)]
pub struct PrecisePrefixCache {
    kind: &'static str,
    name: Arc<str>,
    index: Arc<dyn PrefixIndex>,
    /// Runs the index until the program ends; taken once.
    index_task: Once,
    expected: Expected,
    scoring: Scoring,
    approximate: Matcher,
    hot: Option<Hot>,
    replications: IntCounter,
    speculation: Option<Arc<Speculation>>,
    fallbacks: Arc<Fallbacks>,
    accuracy: Accuracy,
    metadata: bool,
    include_usage: bool,
}

/// A task that is taken once.
struct Once(Mutex<Option<Task>>);

impl fmt::Debug for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Once")
    }
}

/// Makes the index that is configured.
type Start = fn(
    &Index,
    endpoints: &Arc<Endpoints>,
    registry: &Registry,
) -> anyhow::Result<(Arc<dyn PrefixIndex>, Task)>;

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    build_as(TYPE, params, building)
}

/// Builds the plugin under one of its types.
pub(super) fn build_as(
    kind: &'static str,
    params: &Fields<'_>,
    building: &dyn Building,
) -> Option<Arc<dyn Plugin>> {
    build_on(start, kind, params, building)
}

fn start(
    index: &Index,
    endpoints: &Arc<Endpoints>,
    registry: &Registry,
) -> anyhow::Result<(Arc<dyn PrefixIndex>, Task)> {
    match index {
        Index::Service(config, _) => remote::connect(config.clone(), endpoints, registry),
        Index::Embedded(config) => embedded::start(config.clone(), endpoints, registry),
    }
}

fn build_on(
    start: Start,
    kind: &'static str,
    params: &Fields<'_>,
    building: &dyn Building,
) -> Option<Arc<dyn Plugin>> {
    let read = params::read(params)?;
    if kind != TYPE {
        for name in ["scoreNormalization", "matchLengthWeight", "matchLengthScaleTokens"] {
            if params.has(name) {
                params.warn(name, "has no effect: this type ranks nobody");
            }
        }
    }
    let at = match &read.index {
        Index::Service(..) => "indexerService",
        Index::Embedded(_) => "",
    };
    let made = start(&read.index, building.endpoints(), building.registry());
    let (index, task) = made.map_err(|error| params.fault(at, format!("{error:#}"))).ok()?;
    match PrecisePrefixCache::new(kind, read, index, task, building) {
        Ok(plugin) => Some(Arc::new(plugin)),
        Err(error) => {
            params.fault("", error.to_string());
            None
        }
    }
}

/// What is known of a request between its producer and its end.
#[derive(Debug)]
struct Answer {
    query: Option<Query>,
    source: Source,
    /// By endpoint; empty where matches are approximate.
    rows: Vec<EndpointMatch>,
    /// Candidates that the filter kept in place of a busy holder, and the blocks of that holder. Each
    /// profile has candidates of its own.
    left_out: Mutex<SmallVec<[(usize, u32); 4]>>,
}

impl Answer {
    fn approximate(query: Option<Query>, source: Source) -> Self {
        Self { query, source, rows: Vec::new(), left_out: Mutex::default() }
    }

    /// Blocks of the holder in whose place this candidate was kept, else 0.
    fn left_out_for(&self, candidate: usize) -> u32 {
        let left_out = lock(&self.left_out);
        let mut latest = left_out.iter().rev();
        latest.find(|(kept, _)| *kept == candidate).map_or(0, |&(_, blocks)| blocks)
    }
}

impl PrecisePrefixCache {
    fn new(
        kind: &'static str,
        params: Params,
        index: Arc<dyn PrefixIndex>,
        task: Task,
        building: &dyn Building,
    ) -> prometheus::Result<Self> {
        let registry = building.registry();
        let counter = |name: &str, help: &str, label: &str| {
            family(registry, IntCounterVec::new(Opts::new(name, help), &[label])?)
        };
        let outcomes = counter(
            "epp_precise_speculative_total",
            "Speculative entries of the precise prefix scorer, and what became of them.",
            "outcome",
        )?;
        let reasons = counter(
            "epp_precise_fallback_total",
            "Requests that the precise prefix scorer scored by approximate matches.",
            "reason",
        )?;
        let replications = family(
            registry,
            IntCounter::new(
                "epp_precise_replications_total",
                "Requests sent to an endpoint that holds less, since the best holder is busy.",
            )?,
        )?;
        let sizing = Sizing {
            auto_tune: true,
            block_bytes: APPROXIMATE_BLOCK * BYTES_PER_TOKEN,
            least_block_bytes: APPROXIMATE_BLOCK * BYTES_PER_TOKEN,
            limit: Limit::Bytes(APPROXIMATE_TOKENS * BYTES_PER_TOKEN),
            // The text is there whether or not its tokens are.
            tokens: false,
            capacity: DEFAULT_CAPACITY,
        };
        let name = Arc::clone(building.name());
        let approximate = Arc::from(format!("{name}/approximate"));
        let expected = match params.index {
            Index::Service(_, expected) => expected,
            Index::Embedded(_) => Expected::default(),
        };
        let speculation = |ttl| Arc::new(Speculation::new(Arc::clone(&index), ttl, &outcomes));
        Ok(Self {
            kind,
            speculation: params.speculation.map(speculation),
            index,
            index_task: Once(Mutex::new(Some(task))),
            expected,
            scoring: params.scoring,
            approximate: Matcher::named(approximate, building, kind, sizing)?,
            hot: params.hot.map(|config| Hot::new(config, building.endpoints())),
            replications,
            fallbacks: Arc::new(Fallbacks::new(Arc::clone(&name), reasons)),
            accuracy: Accuracy::register(registry)?,
            metadata: params.metadata,
            include_usage: params.include_usage,
            name,
        })
    }

    /// The block keys of a request, or why it has none.
    fn query(
        &self,
        request: &InferenceRequest,
        produced: &Produced,
    ) -> Result<Query, &'static str> {
        let why = || produced.no_tokens.as_ref().map_or(NO_TOKENS, TokenizeError::reason);
        let tokens = produced.tokens.as_ref().ok_or_else(why)?;
        if !tokens.exact {
            return Err(produced.no_tokens.as_ref().map_or(ESTIMATED, TokenizeError::reason));
        }
        let addressing = self.index.addressing(&request.target_model).ok_or(UNKNOWN_MODEL)?;
        let keys = tokens.prompts.iter().map(|prompt| {
            let prompt = Prompt {
                model: &addressing.model,
                lora: &addressing.lora,
                tokens: &prompt.ids,
                cache_salt: request.parsed.cache_salt.as_deref().unwrap_or_default(),
                multimodal: &prompt.items,
            };
            prompt.keys(&addressing.scheme)
        });
        let prompts: Result<Vec<_>, _> = keys.collect();
        Ok(Query { prompts: prompts.map_err(|_| "invalid")?.into(), addressing })
    }

    /// Takes over the index's answer; gives why not.
    fn answer(
        &self,
        query: Query,
        rows: Result<Vec<EndpointMatch>, IndexError>,
        endpoints: usize,
        produced: &mut Produced,
    ) -> Result<(), (Query, Source)> {
        let rows = match rows {
            Ok(rows) if rows.len() == endpoints => rows,
            Ok(rows) => {
                let text = format!("{} rows for {endpoints} endpoints", rows.len());
                return Err((query, Source::NoAnswer(IndexError::Garbage(text))));
            }
            Err(error) => return Err((query, Source::NoAnswer(error))),
        };
        if rows.iter().all(|row| row.state.is_none()) {
            return Err((query, Source::NoTokens(NOT_INDEXED)));
        }
        let block = query.addressing.scheme.block_size();
        let matches = PrefixMatches {
            total: blocks(&query),
            block,
            matched: rows.iter().map(|row| self.scoring.counted(row, block)).collect(),
        };
        produced.set_prefix(&self.name, matches);
        let source = Source::Precise;
        let answer = Answer { rows, ..Answer::approximate(Some(query), source) };
        produced.keep(&self.name, answer);
        Ok(())
    }

    fn fall_back(
        &self,
        request: &InferenceRequest,
        endpoints: &[Arc<Endpoint>],
        (query, source): (Option<Query>, Source),
        produced: &mut Produced,
    ) {
        match &source {
            Source::Precise => {}
            Source::NoTokens(reason) => self.fallbacks.count(&request.target_model, reason),
            Source::NoAnswer(error) => {
                self.fallbacks.count(&request.target_model, error.reason());
            }
        }
        self.approximate.produce(request, endpoints, produced);
        if let Some(mut matches) = produced.prefix(self.approximate.name()).cloned() {
            for matched in &mut matches.matched {
                *matched = self.scoring.long_enough(*matched, matches.block);
            }
            produced.set_prefix(&self.name, matches);
        }
        produced.keep(&self.name, Answer::approximate(query, source));
    }

    /// What is predicted for the endpoint that serves.
    fn prediction(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        target: usize,
        answer: &Answer,
        matches: &PrefixMatches,
    ) -> Option<Prediction> {
        let scored = result.results.get(&result.primary).map_or(&[][..], |run| &run.scored);
        let counted = |at: usize| matches.matched.get(at).copied().unwrap_or(0);
        let depth = |at: usize| answer.rows.get(at).map_or_else(|| counted(at), |row| row.depth);
        let left_out = answer.left_out_for(target);
        let row = answer.rows.get(target);
        // As they were scored: what a row claims that nobody trusts is no loss.
        let all = scored.iter().map(|scored| counted(scored.endpoint));
        let prefilled = result.results.get(PREFILL).and_then(|run| run.picked.first());
        Some(Prediction {
            endpoint: Arc::clone(cycle.endpoints.get(target)?),
            prompt_tokens: input_tokens(cycle.request, cycle.produced),
            prompts: cycle.produced.tokens.as_ref().map_or(1, |tokens| tokens.prompts.len()),
            block: matches.block,
            depth: depth(target),
            confirmed: row.map_or(0, |row| row.confirmed),
            best: all.chain([depth(target), left_out]).max().unwrap_or(0),
            state: row.and_then(|row| row.state),
            decided: score::decided(scored, target, counted, left_out),
            disaggregated: prefilled.is_some_and(|&prefill| prefill != target),
            source: answer.source.clone(),
        })
    }
}

/// Blocks of all prompts.
fn blocks(query: &Query) -> u32 {
    query.prompts.iter().map(|keys| keys.len() as u32).sum()
}

impl Plugin for PrecisePrefixCache {
    fn type_name(&self) -> &'static str {
        self.kind
    }

    fn filter(&self) -> Option<&dyn Filter> {
        self.hot.as_ref().map(|_| self as &dyn Filter)
    }

    fn scorer(&self) -> Option<&dyn Scorer> {
        (self.kind == TYPE).then_some(self as &dyn Scorer)
    }

    fn producer(&self) -> Option<&dyn DataProducer> {
        Some(self)
    }

    fn pre_request(&self) -> Option<&dyn PreRequest> {
        Some(self)
    }

    fn consumes(&self) -> Vec<DataKey> {
        vec![DataKey::Tokens]
    }

    fn task(&self) -> Option<Task> {
        let index_task = lock(&self.index_task.0).take()?;
        let upkeep = Upkeep {
            index: Arc::clone(&self.index),
            fallbacks: Arc::clone(&self.fallbacks),
            speculation: self.speculation.clone(),
            expected: self.expected.clone(),
        };
        Some(Box::new(move |stop: CancellationToken| {
            Box::pin(async move {
                let upkeep = async {
                    upkeep.run(stop.clone()).await;
                    Ok(())
                };
                tokio::try_join!(index_task(stop.clone()), upkeep).map(drop)
            })
        }))
    }

    fn wants_usage(&self) -> bool {
        self.include_usage
    }

    fn endpoint_removed(&self, endpoint: &Endpoint) {
        self.approximate.remove(endpoint);
        self.accuracy.endpoint_removed(endpoint);
        if let Some(hot) = &self.hot {
            hot.remove(endpoint);
        }
    }
}

/// What has to be done beside requests.
struct Upkeep {
    index: Arc<dyn PrefixIndex>,
    fallbacks: Arc<Fallbacks>,
    speculation: Option<Arc<Speculation>>,
    expected: Expected,
}

impl Upkeep {
    async fn run(self, stop: CancellationToken) {
        let every = |period| {
            let mut interval = interval_at(Instant::now() + period, period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let mut looks = every(LOOK);
        let mut ticks = every(self.speculation.as_ref().map_or(LOOK, |it| it.tick_interval()));
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = looks.tick() => self.fallbacks.look(&*self.index, &self.expected),
                _ = ticks.tick() => if let Some(speculation) = &self.speculation {
                    speculation.tick().await;
                },
            }
        }
    }
}

impl Scorer for PrecisePrefixCache {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let Some(matches) = cycle.produced.prefix(&self.name) else { return };
        let rows = cycle.produced.kept::<Answer>(&self.name).map_or(&[][..], |it| &it.rows);
        self.scoring.score(matches, rows, among, scores);
    }
}

impl Filter for PrecisePrefixCache {
    fn filter(&self, cycle: &Cycle<'_>, keep: &mut Vec<usize>) {
        let Some(hot) = &self.hot else { return };
        let Some(matches) = cycle.produced.prefix(&self.name) else { return };
        let tokens = input_tokens(cycle.request, cycle.produced);
        let left_out = hot.narrow(matches, tokens, cycle.endpoints, keep);
        if left_out > 0
            && let Some(answer) = cycle.produced.kept::<Answer>(&self.name)
        {
            lock(&answer.left_out).extend(keep.iter().map(|&kept| (kept, left_out)));
        }
    }

    fn last(&self) -> bool {
        true
    }
}

impl DataProducer for PrecisePrefixCache {
    fn produces(&self, name: &Arc<str>) -> Vec<DataKey> {
        vec![DataKey::Prefix(Arc::clone(name))]
    }

    fn produce<'a>(
        &'a self,
        request: &'a InferenceRequest,
        endpoints: &'a [Arc<Endpoint>],
        produced: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        self.fallbacks.seen(&request.target_model);
        let query = match self.query(request, produced) {
            Ok(query) => query,
            Err(reason) => {
                let why = (None, Source::NoTokens(reason));
                self.fall_back(request, endpoints, why, produced);
                return None;
            }
        };
        if blocks(&query) == 0 {
            // There is nothing to ask for, and nothing that could match.
            let block = query.addressing.scheme.block_size();
            let matched = vec![0; endpoints.len()];
            produced.set_prefix(&self.name, PrefixMatches { total: 0, block, matched });
            produced.keep(&self.name, Answer::approximate(None, Source::Precise));
            return None;
        }
        Some(Box::pin(async move {
            let rows = self.index.score(&query, endpoints).await;
            if let Err((query, source)) = self.answer(query, rows, endpoints.len(), produced) {
                self.fall_back(request, endpoints, (Some(query), source), produced);
            }
        }))
    }

    fn deadline(&self) -> Duration {
        DEADLINE
    }
}

impl PreRequest for PrecisePrefixCache {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        _headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        self.approximate.pre_request(cycle, result);
        let (Some(&target), Some(answer), Some(matches)) = (
            result.targets().first(),
            cycle.produced.kept::<Answer>(&self.name),
            cycle.produced.prefix(&self.name),
        ) else {
            return Ok(None);
        };
        let prefill = result.results.get(PREFILL).and_then(|run| run.picked.first().copied());
        let prefill = prefill.filter(|&prefill| prefill != target);
        let computes = prefill.unwrap_or(target);
        let mut held = None;
        if let (Some(hot), Some(endpoint)) = (&self.hot, cycle.endpoints.get(computes)) {
            let tokens = input_tokens(cycle.request, cycle.produced);
            let has = matches.matched.get(computes).copied().unwrap_or(0);
            // What is only expected is still to be computed, and whoever shares it waits for it.
            let confirmed = answer.rows.get(computes).map_or(has, |row| row.confirmed.min(has));
            held = hot.hold(endpoint, hot::uncached(tokens, confirmed, matches.block));
            if answer.left_out_for(computes) > has {
                self.replications.inc();
            }
        }
        let mut entries = SmallVec::new();
        if let (Some(speculation), Some(query)) = (&self.speculation, &answer.query) {
            for at in [Some(target), prefill].into_iter().flatten() {
                let Some(endpoint) = cycle.endpoints.get(at) else { continue };
                let confirmed = answer.rows.get(at).map_or(0, |row| row.confirmed);
                // What events say already needs no guess.
                if confirmed < blocks(query) {
                    entries.extend(speculation.claim(query, endpoint, confirmed));
                }
            }
        }
        let prediction = self.prediction(cycle, result, target, answer, matches);
        Ok(Some(Box::new(OnItsWay {
            held,
            entries,
            observation: prediction.map(|prediction| self.accuracy.predicted(prediction)),
            metadata: self.metadata,
            started: false,
        })))
    }
}

/// One routed request.
struct OnItsWay {
    held: Option<Held>,
    entries: SmallVec<[Entry; 2]>,
    observation: Option<Observation>,
    metadata: bool,
    started: bool,
}

impl Flight for OnItsWay {
    fn response_started(&mut self) {
        self.started = true;
        self.held = None;
        self.entries.iter_mut().for_each(Entry::started);
    }

    fn ended(&mut self, ending: &Ending<'_>, report: &mut Report) {
        self.held = None;
        let refused = ending.status.is_some_and(|status| status >= 400);
        // Whoever gives up once the response runs leaves the prompt's blocks behind.
        let failed = refused || (!ending.completed && !self.started);
        self.entries.iter_mut().for_each(|entry| entry.ended(failed));
        if let Some(observation) = self.observation.take() {
            observation.ended(ending, self.metadata, report);
        }
    }
}

#[cfg(test)]
mod tests;
