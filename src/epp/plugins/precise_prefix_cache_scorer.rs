//! `precise-prefix-cache-scorer` and `precise-prefix-cache-producer`: what endpoints really hold, from the
//! events of their engines.
//!
//! # Formula
//!
//! Without an index of events every endpoint scores 0, and no prefix matches are published; a warning at
//! start says so. Scores come with the indexer:
//!
//! ```text
//! match = leading blocks that the endpoint holds, each weighed by the best tier that has it
//! score = match / total                            scoreNormalization: absolute
//!       = (match − min) / (max − min), or 1        scoreNormalization: minmax, over endpoints with a hit
//! ```
//!
//! # Parameters
//!
//! Those of llm-d, of both generations: `tokenProcessorConfig` at the top or within `indexerConfig`;
//! `indexerConfig` with `kvBlockIndexConfig` and `kvCacheBackendConfigs`; `kvEventsConfig`;
//! `speculativeIndexing`, `speculativeTTL`. All of them are checked now, so that a configuration that
//! starts today starts then, too. `tokenizersPoolConfig` and `prefixStoreConfig` load and are warned about.
//! `scoreNormalization` is ours: older releases normalized over the endpoints with a hit, newer ones do not, and one
//! of the two is what a configuration relies on.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    epp::{
        datalayer::Endpoint,
        plugins::{Building, Registration, Stability},
        request::InferenceRequest,
        scheduling::{BoxFuture, Cycle, DataKey, DataProducer, Plugin, Produced, Scorer},
    },
    support::{fields::Fields, units},
};

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &["precise-prefix-cache-producer"],
    stability: Stability::Beta,
    factory: Some(build),
};

const TYPE: &str = "precise-prefix-cache-scorer";

const TOKEN_PROCESSOR: &str = "tokenProcessorConfig";
const GIVEN_TWICE: &str = "is also at the top of the parameters; give one of them";
const TOKENIZER: &str = "has no effect: tokens come from a token producer";
/// Largest number of tokens in a block.
const MAX_BLOCK: u64 = 65_536;

/// See the [module](self).
#[derive(Debug)]
pub struct PrecisePrefixCacheScorer {
    _private: (),
}

/// What it says at start.
const NO_SCORES: &str = "precise prefix scores need an index of engine events, which this release does \
                         not have: all endpoints score 0; prefix-cache-scorer with an \
                         approx-prefix-cache-producer works";

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    read(params);
    params.warn("", NO_SCORES);
    Some(Arc::new(PrecisePrefixCacheScorer { _private: () }))
}

fn read(params: &Fields<'_>) {
    params.one_of("scoreNormalization", &[("absolute", ()), ("minmax", ())]);
    params.boolean("speculativeIndexing");
    params.parsed("speculativeTTL", |text| match text {
        "" => Ok(()),
        text => units::signed_nanos(text).map(drop),
    });
    let indexer = params.mapping("indexerConfig");
    if params.has(TOKEN_PROCESSOR) && indexer.has(TOKEN_PROCESSOR) {
        indexer.fault(TOKEN_PROCESSOR, GIVEN_TWICE);
    }
    for fields in [params, &indexer] {
        read_token_processor(fields.mapping(TOKEN_PROCESSOR));
        fields.ignored("tokenizersPoolConfig", TOKENIZER);
        fields.ignored("prefixStoreConfig", TOKENIZER);
    }
    read_index(indexer.mapping("kvBlockIndexConfig"));
    for tier in indexer.each("kvCacheBackendConfigs") {
        tier.required("name", Fields::nonempty);
        tier.required("weight", |fields, name| fields.number(name, 0.0));
        tier.finish();
    }
    indexer.finish();
    read_events(params.mapping("kvEventsConfig"));
}

fn read_token_processor(fields: Fields<'_>) {
    // Zero is an absent size, as in llm-d.
    fields.integer::<u32>("blockSizeTokens", 0..=MAX_BLOCK);
    if fields.integer::<u32>("blockSize", 0..=MAX_BLOCK).is_some() {
        fields.warn("blockSize", "is deprecated; use `blockSizeTokens`");
    }
    fields.string("hashSeed");
    fields.one_of("hashAlgorithm", &[("cbor-fnv", ()), ("xxh64", ()), ("xxh3", ()), ("", ())]);
    fields.finish();
}

fn read_index(fields: Fields<'_>) {
    let memory = fields.mapping("inMemoryConfig");
    memory.integer::<u64>("size", 1..=1 << 50);
    memory.integer::<u64>("podCacheSize", 1..=u64::from(u32::MAX));
    memory.finish();
    let cost = fields.mapping("costAwareMemoryConfig");
    units::bytes::<u64>(&cost, "size", 1..=1 << 50);
    cost.finish();
    for name in ["redisConfig", "valkeyConfig"] {
        let redis = fields.mapping(name);
        redis.string("address");
        redis.one_of("backendType", &[("redis", ()), ("valkey", ()), ("", ())]);
        redis.boolean("enableRDMA");
        redis.finish();
    }
    fields.boolean("enableMetrics");
    fields.take("metricsLoggingInterval", |value| match value {
        Value::String(text) => units::signed_nanos(text).map(drop),
        // Nanoseconds, which is how Go writes a duration as JSON.
        Value::Number(number) if number.is_i64() || number.is_u64() => Ok(()),
        _ => Err("expected an integer in nanoseconds, or a duration such as `1m0s`".to_owned()),
    });
    fields.finish();
}

fn read_events(fields: Fields<'_>) {
    fields.string("zmqEndpoint");
    fields.string("topicFilter");
    fields.integer::<u32>("concurrency", 0..=1024);
    fields.one_of("engineType", &[("vllm", ()), ("sglang", ()), ("", ())]);
    fields.boolean("discoverPods");
    let discovery = fields.mapping("podDiscoveryConfig");
    discovery.string("podLabelSelector");
    discovery.string("podNamespace");
    discovery.integer::<u16>("socketPort", 1..=65_535);
    // Zero and less switch it off.
    discovery.signed("replaySocketPort", -65_535..=65_535);
    discovery.finish();
    fields.finish();
}

impl Plugin for PrecisePrefixCacheScorer {
    fn type_name(&self) -> &'static str {
        TYPE
    }

    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }

    fn producer(&self) -> Option<&dyn DataProducer> {
        Some(self)
    }
}

impl Scorer for PrecisePrefixCacheScorer {
    fn score(&self, _cycle: &Cycle<'_>, _among: &[usize], _scores: &mut [f64]) {}
}

impl DataProducer for PrecisePrefixCacheScorer {
    fn produces(&self, name: &Arc<str>) -> Vec<DataKey> {
        vec![DataKey::Prefix(Arc::clone(name))]
    }

    fn produce<'a>(
        &'a self,
        _request: &'a InferenceRequest,
        _endpoints: &'a [Arc<Endpoint>],
        _produced: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::plugins::{
        prefix::testing::{Bench, Run, text},
        prefix_cache_scorer,
    };

    #[track_caller]
    fn warnings(parameters: &str) -> Vec<String> {
        let bench = Bench::new("precise", 0);
        let built = bench.try_build(REGISTRATION.factory, parameters);
        let (_, mut warnings) = built.unwrap_or_else(|faults| panic!("{parameters}: {faults:?}"));
        let scores = warnings.iter().position(|warning| warning.contains(NO_SCORES));
        warnings.remove(scores.expect("it says that it scores nothing"));
        warnings
    }

    #[test]
    fn llmds_parameters_load() {
        #[track_caller]
        fn check(parameters: &str) {
            assert_eq!(warnings(parameters), [""; 0], "{parameters}");
        }
        check("{}");
        check(
            "{tokenProcessorConfig: {blockSizeTokens: 64, hashSeed: '42', hashAlgorithm: xxh64}}",
        );
        check("{speculativeIndexing: true, speculativeTTL: 2s, scoreNormalization: minmax}");
        check(
            "{indexerConfig: {kvBlockIndexConfig: {enableMetrics: true, \
             inMemoryConfig: {size: 1e8, podCacheSize: 10}, metricsLoggingInterval: 60000000000}, \
             kvCacheBackendConfigs: [{name: gpu, weight: 1.0}, {name: cpu, weight: 0.8}]}}",
        );
        check("{indexerConfig: {kvBlockIndexConfig: {costAwareMemoryConfig: {size: 2GiB}}}}");
        check(
            "{indexerConfig: {kvBlockIndexConfig: {valkeyConfig: {address: 'valkey://a:6379'}}}}",
        );
        check(
            "{kvEventsConfig: {zmqEndpoint: 'tcp://*:5557', topicFilter: 'kv@', concurrency: 4, \
             engineType: vllm, discoverPods: true, podDiscoveryConfig: {socketPort: 5556, \
             podLabelSelector: 'a=b', podNamespace: '', replaySocketPort: 0}}}",
        );
    }

    #[test]
    fn old_parameters_are_warned_about() {
        #[track_caller]
        fn check(parameters: &str, want: &[&str]) {
            let warnings = warnings(parameters);
            assert_eq!(warnings.len(), want.len(), "{warnings:?}");
            for (got, want) in warnings.iter().zip(want) {
                assert!(got.starts_with(want), "{got}");
            }
        }
        // The sample of llm-d-inference-scheduler 0.3.
        check(
            "{indexerConfig: {tokenProcessorConfig: {blockSize: 64, hashSeed: '42'}, \
             kvBlockIndexConfig: {enableMetrics: true}}}",
            &["indexerConfig.tokenProcessorConfig.blockSize: is deprecated"],
        );
        check(
            "{indexerConfig: {prefixStoreConfig: {blockSize: 256}, \
             tokenizersPoolConfig: {workersCount: 8, hf: {tokenizersCacheDir: /tmp}}}}",
            &["indexerConfig.prefixStoreConfig: has no", "indexerConfig.tokenizersPoolConfig: has"],
        );
        check("{tokenizersPoolConfig: {modelName: m}}", &["tokenizersPoolConfig: has no effect"]);
    }

    #[test]
    fn wrong_parameters_are_named() {
        let bench = Bench::new("precise-wrong", 0);
        let check = |parameters, want| bench.refuses(REGISTRATION.factory, parameters, want);
        check("{kvEventConfig: {}}", "did you mean `kvEventsConfig`?");
        check(
            "{tokenProcessorConfig: {}, indexerConfig: {tokenProcessorConfig: {}}}",
            "indexerConfig.tokenProcessorConfig: is also at the top",
        );
        check(
            "{tokenProcessorConfig: {hashSeed: 42}}",
            "tokenProcessorConfig.hashSeed: expected a",
        );
        check("{speculativeTTL: soon}", "speculativeTTL: \"soon\" is no duration");
        check("{scoreNormalization: relative}", "scoreNormalization: \"relative\" is not one of");
        check("{indexerConfig: {kvCacheBackendConfigs: [{name: gpu}]}}", "[0].weight: missing");
        check(
            "{kvEventsConfig: {podDiscoveryConfig: {port: 1}}}",
            "podDiscoveryConfig.port: unknown",
        );
        check("{kvEventsConfig: {engineType: trt}}", "kvEventsConfig.engineType: \"trt\" is not");
    }

    #[test]
    fn it_scores_nothing_and_can_be_named() {
        let mut bench = Bench::new("precise-producer", 2);
        let precise = bench.build(REGISTRATION.factory, "{}").unwrap();
        let mut run = Run::new(&bench.endpoints, text("x"));
        run.produce(&*precise);
        assert_eq!(run.score(&*precise), [0.0, 0.0]);
        bench.others.push((Arc::from("precise-prefix-cache-producer"), precise));
        let named = "{prefixMatchInfoProducerName: precise-prefix-cache-producer}";
        let scorer = bench.build(prefix_cache_scorer::REGISTRATION.factory, named).unwrap();
        assert_eq!(run.score(&*scorer), [0.0, 0.0]);
    }
}
