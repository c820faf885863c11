//! `prefix-cache-scorer`: prefers endpoints that hold much of the prompt.
//!
//! # Formula
//!
//! ```text
//! score = w · min(1, match · block / S)² + (1 − w) · match / total
//! ```
//!
//! with `w` = `matchLengthWeight` (0), `S` = `matchLengthScaleTokens` (8192) and `block` in tokens. No
//! matches, or a prompt of no blocks: 0.
//!
//! # Two forms
//!
//! Matches come from the producer named by `prefixMatchInfoProducerName`, or from the first
//! `approx-prefix-cache-producer`.
//!
//! Any of `hashBlockSize`, `blockSize`, `blockSizeTokens`, `autoTune`, `maxPrefixBlocksToMatch`,
//! `maxPrefixTokensToMatch` and `lruCapacityPerServer` makes the scorer **self-contained**, as it was
//! until GIE 1.3: it keeps a store of its own and publishes its matches under its own name.
//!
//! ```text
//! h₀ = H(H(model), H(cache_salt));  hᵢ = H(H(bytes of block i), hᵢ₋₁)   a rest is no block
//! ```
//!
//! Blocks are of `blockSize` **bytes** of the prompt (64; `hashBlockSize` is its older name) or of four
//! times `blockSizeTokens`; at most `maxPrefixBlocksToMatch` (256) count, or
//! `maxPrefixTokensToMatch` tokens. With `autoTune`, block size and capacity are what the engine
//! reports.
//!
//! # Differences to the Go EPP
//!
//! * Go knows one form in one release; here the parameters decide. A producer's name beside parameters
//!   of the self-contained form is a contradiction and refused.
//! * `autoTune` is off where a block size is given: it would have been of no effect otherwise, and
//!   before GIE 1.2 there was no such thing.
//! * A producer that does not exist, or produces no matches, is refused at start; with Go's EPP the
//!   score is silently 0 (llm-d-router #2274).
//! * What the [producer](super::approx_prefix_cache_producer) does otherwise, this does as well.

use std::sync::Arc;

use crate::{
    epp::{
        datalayer::Endpoint,
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        plugins::{
            Building, Registration, Stability, approx_prefix_cache_producer,
            prefix::{
                BYTES_PER_TOKEN, DEFAULT_CAPACITY, Limit, MAX_CAPACITY, MatchLength, Matcher,
                Sizing,
            },
        },
        request::InferenceRequest,
        scheduling::{
            BoxFuture, Cycle, DataKey, DataProducer, Flight, Plugin, PreRequest, Produced,
            SchedulingResult, Scorer,
        },
    },
    support::fields::Fields,
};

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

const TYPE: &str = "prefix-cache-scorer";
const PRODUCER: &str = "prefixMatchInfoProducerName";
/// Parameters that make the scorer self-contained.
const OWN: [&str; 7] = [
    "hashBlockSize",
    "blockSize",
    "blockSizeTokens",
    "autoTune",
    "maxPrefixBlocksToMatch",
    "maxPrefixTokensToMatch",
    "lruCapacityPerServer",
];

/// Bytes of a block of the self-contained form.
const DEFAULT_BLOCK_BYTES: usize = 64;
const DEFAULT_MAX_BLOCKS: usize = 256;
/// Largest block and longest prompt that can be configured.
const MAX_LENGTH: u64 = 1 << 30;

/// See the [module](self).
#[derive(Debug)]
pub struct PrefixCacheScorer {
    source: Source,
    length: MatchLength,
}

#[derive(Debug)]
enum Source {
    /// The self-contained form.
    Own(Box<Matcher>),
    /// Matches of the producer of this name.
    Producer(Arc<str>),
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let own = OWN.iter().find(|name| params.has(name));
    let sizing = read(params);
    let length = MatchLength::read(params);
    let named = params.string(PRODUCER).filter(|name| !name.is_empty());
    let source = match (own, named) {
        (Some(own), Some(_)) => {
            let text = format!(
                "contradicts `{own}`: with that the scorer matches by itself; give the parameters of \
                 blocks to the producer"
            );
            params.fault(PRODUCER, text);
            return None;
        }
        (Some(_), None) => match Matcher::new(building, TYPE, sizing) {
            Ok(matcher) => Source::Own(Box::new(matcher)),
            Err(error) => {
                params.fault("", error.to_string());
                return None;
            }
        },
        (None, named) => {
            Source::Producer(match_producer(params, building, PRODUCER, named.as_deref())?)
        }
    };
    Some(Arc::new(PrefixCacheScorer { source, length }))
}

/// The producer of matches that `field` names, or else the default one. `None`, with a fault, if it
/// does not exist or produces no matches.
pub(super) fn match_producer(
    params: &Fields<'_>,
    building: &dyn Building,
    field: &str,
    named: Option<&str>,
) -> Option<Arc<str>> {
    let by_default = |name: &str| name == approx_prefix_cache_producer::TYPE;
    if named.is_none_or(by_default) {
        let default = building.default_of(approx_prefix_cache_producer::TYPE);
        if named.is_none_or(|named| *named == *default) {
            return Some(default);
        }
    }
    let name: Arc<str> = Arc::from(named?);
    let plugin = building.plugin(params, field, &name)?;
    let key = DataKey::Prefix(Arc::clone(&name));
    if plugin.producer().is_none_or(|producer| !producer.produces(&name).contains(&key)) {
        let text = format!("plugin {name:?} ({}) produces no prefix matches", plugin.type_name());
        params.fault(field, text);
        return None;
    }
    Some(name)
}

fn read(params: &Fields<'_>) -> Sizing {
    let positive = |name: &'static str, most: u64| {
        let value: Option<i64> = params.signed(name, i64::from(i32::MIN)..=most as i64);
        if value.is_some_and(|value| value <= 0) {
            params.warn(name, "is not greater than 0: the default is used");
        }
        value.and_then(|value| usize::try_from(value).ok()).filter(|&value| value > 0)
    };
    let older = positive("hashBlockSize", MAX_LENGTH);
    let bytes = positive("blockSize", MAX_LENGTH);
    let tokens = positive("blockSizeTokens", MAX_LENGTH);
    let given: Vec<&str> = OWN[..3].iter().copied().filter(|name| params.has(name)).collect();
    if let [_, second, ..] = given[..] {
        params.fault(second, format!("is also given as `{}`; give one of them", given[0]));
    }
    let auto_tune = params.boolean("autoTune").unwrap_or(given.is_empty());
    let blocks = positive("maxPrefixBlocksToMatch", MAX_LENGTH);
    let limit = match positive("maxPrefixTokensToMatch", MAX_LENGTH) {
        Some(tokens) => {
            if blocks.is_some() {
                let text = "has no effect beside `maxPrefixTokensToMatch`";
                params.warn("maxPrefixBlocksToMatch", text);
            }
            Limit::Bytes(tokens * BYTES_PER_TOKEN)
        }
        None => Limit::Blocks(blocks.unwrap_or(DEFAULT_MAX_BLOCKS)),
    };
    let block = bytes.or(older).or(tokens.map(|tokens| tokens * BYTES_PER_TOKEN));
    Sizing {
        auto_tune,
        block_bytes: block.unwrap_or(DEFAULT_BLOCK_BYTES),
        least_block_bytes: 1,
        limit,
        tokens: false,
        capacity: positive("lruCapacityPerServer", MAX_CAPACITY as u64).unwrap_or(DEFAULT_CAPACITY),
    }
}

impl PrefixCacheScorer {
    /// The self-contained form's store.
    fn own(&self) -> Option<&Matcher> {
        match &self.source {
            Source::Own(matcher) => Some(matcher),
            Source::Producer(_) => None,
        }
    }
}

impl Plugin for PrefixCacheScorer {
    fn type_name(&self) -> &'static str {
        TYPE
    }

    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }

    fn producer(&self) -> Option<&dyn DataProducer> {
        self.own().map(|_| self as &dyn DataProducer)
    }

    fn pre_request(&self) -> Option<&dyn PreRequest> {
        self.own().map(|_| self as &dyn PreRequest)
    }

    fn consumes(&self) -> Vec<DataKey> {
        match &self.source {
            Source::Own(_) => Vec::new(),
            Source::Producer(name) => vec![DataKey::Prefix(Arc::clone(name))],
        }
    }

    fn endpoint_removed(&self, endpoint: &Endpoint) {
        if let Some(matcher) = self.own() {
            matcher.remove(endpoint);
        }
    }
}

impl Scorer for PrefixCacheScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let producer = match &self.source {
            Source::Own(matcher) => matcher.name(),
            Source::Producer(name) => name,
        };
        let Some(matches) = cycle.produced.prefix(producer) else { return };
        if matches.total == 0 {
            return;
        }
        for (&endpoint, score) in among.iter().zip(scores) {
            let matched = f64::from(matches.matched.get(endpoint).copied().unwrap_or(0));
            let tokens = matched * f64::from(matches.block);
            *score = self.length.score(tokens, matched / f64::from(matches.total));
        }
    }
}

impl DataProducer for PrefixCacheScorer {
    fn produces(&self, name: &Arc<str>) -> Vec<DataKey> {
        self.own().map(|_| DataKey::Prefix(Arc::clone(name))).into_iter().collect()
    }

    fn produce<'a>(
        &'a self,
        request: &'a InferenceRequest,
        endpoints: &'a [Arc<Endpoint>],
        produced: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        if let Some(matcher) = self.own() {
            matcher.produce(request, endpoints, produced);
        }
        None
    }
}

impl PreRequest for PrefixCacheScorer {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        _headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        if let Some(matcher) = self.own() {
            matcher.pre_request(cycle, result);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        epp::{
            datalayer::Metrics,
            plugins::prefix::testing::{Bench, Run, request, text},
            request::PromptForm,
            scheduling::PrefixMatches,
        },
        support::fields::Reader,
    };

    #[track_caller]
    fn fault(bench: &Bench, parameters: &str, want: &str) {
        bench.refuses(REGISTRATION.factory, parameters, want);
    }

    #[test]
    fn scores_are_the_formulas() {
        #[track_caller]
        fn check(parameters: &str, matches: Option<(u32, u32, &[u32])>, want: &[f64]) {
            let bench = Bench::new("prefix-formula", want.len() as u8);
            let scorer = bench.build(REGISTRATION.factory, parameters).unwrap();
            let producer = Arc::from("approx-prefix-cache-producer");
            assert_eq!(scorer.consumes(), [DataKey::Prefix(Arc::clone(&producer))]);
            assert!(scorer.producer().is_none() && scorer.pre_request().is_none());
            let mut run = Run::new(&bench.endpoints, text("x"));
            if let Some((total, block, matched)) = matches {
                let matches = PrefixMatches { total, block, matched: matched.to_vec() };
                run.produced.set_prefix(&producer, matches);
            }
            for (got, want) in run.score(&*scorer).iter().zip(want) {
                assert!((got - want).abs() < 1e-9, "{got} is not {want}");
            }
        }
        check("{}", Some((10, 1, &[5, 2])), &[0.5, 0.2]);
        check("{}", None, &[0.0, 0.0, 0.0]);
        check("{}", Some((10, 1, &[5])), &[0.5, 0.0, 0.0]);
        check("{}", Some((0, 64, &[0, 0])), &[0.0, 0.0]);
        check("{}", Some((4, 64, &[4])), &[1.0]);
        let weighted = "{matchLengthWeight: 0.5, matchLengthScaleTokens: 100}";
        check(weighted, Some((10, 1, &[5])), &[0.25125]);
        check(weighted, Some((100, 1, &[50])), &[0.375]);
        check(weighted, Some((100, 16, &[50])), &[0.75]);
        check("{matchLengthWeight: 1}", Some((128, 64, &[128, 64])), &[1.0, 0.25]);
        check("{matchLengthWeight: 0, matchLengthScaleTokens: 0}", Some((2, 1, &[1])), &[0.5]);
    }

    #[test]
    fn wrong_parameters_are_named() {
        let bench = Bench::new("prefix-wrong", 0);
        let fault = |parameters, want| fault(&bench, parameters, want);
        fault("{matchLengthWeight: -0.1}", "matchLengthWeight: must be a number between 0 and 1");
        fault("{matchLengthWeight: 1.1}", "matchLengthWeight: must be");
        fault(
            "{matchLengthWeight: 0.5, matchLengthScaleTokens: 0}",
            "matchLengthScaleTokens: must",
        );
        fault("{prefixMatchInfoProducer: a}", "did you mean `prefixMatchInfoProducerName`?");
        fault("{blockSize: 64, hashBlockSize: 32}", "blockSize: is also given as `hashBlockSize`");
        fault(
            "{lruCapacityPerServer: 10, prefixMatchInfoProducerName: a}",
            "prefixMatchInfoProducerName: contradicts `lruCapacityPerServer`",
        );
        fault("{prefixMatchInfoProducerName: nobody}", "prefixMatchInfoProducerName: there is no");
    }

    #[test]
    fn the_producer_has_to_produce_matches() {
        let mut bench = Bench::new("prefix-producers", 0);
        let approx = approx_prefix_cache_producer::REGISTRATION.factory;
        let other = bench.build(approx, "{}").unwrap();
        bench.others.push((Arc::from("mine"), other));
        let consumer = bench.build(REGISTRATION.factory, "{}").unwrap();
        assert_eq!(consumer.consumes(), [DataKey::Prefix(Arc::from("mine"))]);
        bench.others.push((Arc::from("consumer"), consumer));
        let named = "{prefixMatchInfoProducerName: mine}";
        let scorer = bench.build(REGISTRATION.factory, named).unwrap();
        assert_eq!(scorer.consumes(), [DataKey::Prefix(Arc::from("mine"))]);
        fault(
            &bench,
            "{prefixMatchInfoProducerName: consumer}",
            "prefixMatchInfoProducerName: plugin \"consumer\" (prefix-cache-scorer) produces no",
        );
    }

    #[test]
    fn old_parameters_make_it_self_contained() {
        let bench = Bench::new("prefix-own", 3);
        let parameters =
            "{hashBlockSize: 5, maxPrefixBlocksToMatch: 256, lruCapacityPerServer: 31250}";
        let scorer = bench.build(REGISTRATION.factory, parameters).unwrap();
        assert_eq!(scorer.consumes(), []);
        let name = Arc::from("prefix-own");
        let produces = scorer.producer().unwrap().produces(&name);
        assert_eq!(produces, [DataKey::Prefix(Arc::clone(&name))]);

        let run = |prompt: &str| {
            let mut run = Run::new(&bench.endpoints, text(prompt));
            run.produce(&*scorer);
            run
        };
        let first = run("aaaaabbbbbcc");
        assert_eq!(first.score(&*scorer), [0.0; 3]);
        let matches = first.produced.prefix(&name).unwrap();
        assert_eq!((matches.total, matches.block), (2, 2), "the rest is no block");
        first.route(&*scorer, &[("decode", 1), ("prefill", 2)]);
        assert_eq!(run("aaaaabbbbb").score(&*scorer), [0.0, 1.0, 1.0]);
        assert_eq!(run("aaaaabbbbbcccccddddd").score(&*scorer), [0.0, 0.5, 0.5]);
        assert_eq!(run("aaaaaxxxxx").score(&*scorer), [0.0, 0.5, 0.5]);
        assert_eq!(run("aaaa").score(&*scorer), [0.0; 3], "shorter than a block");

        let removed = Arc::clone(&bench.endpoints.list()[1]);
        scorer.endpoint_removed(&removed);
        assert_eq!(run("aaaaabbbbb").score(&*scorer), [0.0, 0.0, 1.0]);
    }

    #[test]
    fn messages_are_hashed_as_they_are_written() {
        let bench = Bench::new("prefix-messages", 1);
        let scorer = bench.build(REGISTRATION.factory, "{blockSize: 8}").unwrap();
        let run = |messages: &str| {
            let mut run = Run::new(&bench.endpoints, request(PromptForm::Messages, messages));
            run.produce(&*scorer);
            run
        };
        let first = r#"[{"role":"user","content":"hi there, who are you?"}]"#;
        run(first).route(&*scorer, &[("default", 0)]);
        let longer = first.replace("}]", r#"},{"role":"assistant","content":"me"}]"#);
        let matches = run(&longer).produced.prefix("prefix-messages").cloned().unwrap();
        assert_eq!(matches.matched, [(first.len() - 1) as u32 / 8]);
        assert_eq!(matches.total, longer.len() as u32 / 8);
    }

    #[test]
    fn sizes_of_the_self_contained_form() {
        #[track_caller]
        fn check(
            parameters: &str,
            reported: u64,
            block_bytes: usize,
            max_blocks: usize,
            capacity: usize,
        ) {
            let bench = Bench::new("prefix-sizes", 1);
            let reader = Reader::new(crate::support::fields::Document::parse(parameters).unwrap());
            let sizing = read(&reader.root());
            assert_eq!(reader.finish().faults, []);
            let metrics = Metrics {
                cache_block_tokens: reported,
                cache_blocks: 10 * reported,
                ..Metrics::default()
            };
            bench.endpoints.list()[0].set_metrics(metrics);
            let block = sizing.block_bytes(&bench.endpoints.list());
            let got = (block, sizing.max_blocks(block), sizing.capacity(10 * reported));
            assert_eq!(got, (block_bytes, max_blocks, capacity), "{parameters} {reported}");
        }
        check("{lruCapacityPerServer: 100}", 0, 64, 256, 100);
        check("{lruCapacityPerServer: 100}", 16, 64, 256, 160);
        check("{lruCapacityPerServer: 100}", 128, 512, 256, 1280);
        check("{autoTune: false}", 128, 64, 256, 31_250);
        check("{blockSize: 100}", 128, 100, 256, 31_250);
        check("{blockSize: 100, autoTune: true}", 128, 512, 256, 1280);
        check("{hashBlockSize: 5}", 128, 5, 256, 31_250);
        check("{blockSizeTokens: 16}", 0, 64, 256, 31_250);
        check("{blockSize: 0}", 0, 64, 256, 31_250);
        check("{blockSize: -1, autoTune: false}", 0, 64, 256, 31_250);
        check("{maxPrefixBlocksToMatch: 10}", 0, 64, 10, 31_250);
        check("{maxPrefixTokensToMatch: 160, maxPrefixBlocksToMatch: 3}", 0, 64, 10, 31_250);
    }
}
