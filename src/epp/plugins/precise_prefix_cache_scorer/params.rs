//! The parameters: llm-d's of both generations, and ours.

use std::time::Duration;

use serde_json::Value;

use super::{hot::HotPrefix, score::Scoring};
use crate::{
    epp::precise::{
        embedded::EmbeddedConfig,
        remote::{RemoteConfig, RemoteTls},
    },
    hash::{Algorithm, Models, Scheme},
    ingest::llmd::{self, MIN_CAP},
    support::{fields::Fields, tls::Identity, units},
};

const TOKEN_PROCESSOR: &str = "tokenProcessorConfig";
const SERVICE: &str = "indexerService";
const TTL: &str = "speculativeTTL";
const WEIGHT: &str = "speculativeWeight";
const GIVEN_TWICE: &str = "is also at the top of the parameters; give one of them";
const TOKENIZER: &str = "has no effect: tokens come from a token producer";
/// Largest number of tokens in a block.
const MAX_BLOCK: u64 = 65_536;
const DEFAULT_BLOCK: u32 = 16;
const DEFAULT_DEADLINE: Duration = Duration::from_millis(5);
/// Beyond it a request waits longer for its scores than a prefill takes.
const MAX_DEADLINE: Duration = Duration::from_millis(400);
const DEFAULT_TTL: Duration = Duration::from_secs(2);
const MAX_TTL: Duration = Duration::from_secs(3600);
/// Failures in a row after which the service is taken for down, and for how long at least.
const FAILURES: u32 = 5;
const HALF_OPEN: Duration = Duration::from_millis(250);
const DEFAULT_TOPIC: &str = "kv@";
const DEFAULT_PORT: u16 = 5557;
const DEFAULT_CAP: u64 = 4 << 30;
/// Weights of the tiers where none are listed; any other tier weighs 1, as in llm-d.
const TIERS: [(&str, f64); 2] = [("gpu", 1.0), ("cpu", 0.8)];
const DEFAULT_SPECULATIVE_WEIGHT: f64 = 0.5;

/// What the parameters say.
#[derive(Clone, Debug)]
pub(super) struct Params {
    pub(super) index: Index,
    pub(super) scoring: Scoring,
    /// How long a speculative entry lives; `None`: there are none.
    pub(super) speculation: Option<Duration>,
    pub(super) hot: Option<HotPrefix>,
    /// Predicted and actual tokens go into the response's dynamic metadata.
    pub(super) metadata: bool,
    pub(super) include_usage: bool,
}

/// Who knows what endpoints hold.
#[derive(Clone, Debug)]
pub(super) enum Index {
    /// A service, and the hash settings that the configuration believes it to have.
    Service(RemoteConfig, Expected),
    Embedded(EmbeddedConfig),
}

/// Hash settings as far as they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) algorithm: Option<Algorithm>,
    pub(super) seed: Option<String>,
    pub(super) block: Option<u32>,
}

impl Expected {
    /// In what a scheme differs from these settings, in words.
    pub(super) fn contradicts(&self, scheme: &Scheme) -> Option<String> {
        let block = self.block.is_some_and(|block| block != scheme.block_size());
        let algorithm = self.algorithm.is_some_and(|algorithm| algorithm != scheme.algorithm());
        let seed = self.seed.as_deref().is_some_and(|seed| seed != scheme.seed());
        (block || algorithm || seed).then(|| {
            format!(
                "tokenProcessorConfig is not what the indexer service has; the service's settings \
                 hold: blocks of {} tokens, {}",
                scheme.block_size(),
                scheme.algorithm()
            )
        })
    }
}

/// Reads all parameters. `None`, with a fault noted, if there is no index to be made of them.
pub(super) fn read(params: &Fields<'_>) -> Option<Params> {
    let scoring = Scoring::read(params);
    let speculative = params.boolean("speculativeIndexing").unwrap_or(false);
    let ttl = params.parsed(TTL, |text| match text {
        "" => Ok(DEFAULT_TTL),
        text => match units::signed_nanos(text)? {
            nanos if nanos <= 0 => Ok(DEFAULT_TTL),
            nanos => {
                let ttl = Duration::from_nanos(nanos.unsigned_abs());
                if ttl <= MAX_TTL { Ok(ttl) } else { Err(format!("{text} is more than 1h")) }
            }
        },
    });
    let weight = params.number(WEIGHT, 0.0);
    if weight.is_some_and(|weight| weight > 1.0) {
        params.fault(WEIGHT, "must be in 0..=1");
    }
    let served = params.has(SERVICE);
    if !speculative {
        let why = "has no effect while speculativeIndexing is off";
        if ttl.is_some_and(|ttl| ttl != DEFAULT_TTL) {
            params.warn(TTL, why);
        }
        if !served && weight.is_some_and(|weight| weight != DEFAULT_SPECULATIVE_WEIGHT) {
            params.warn(WEIGHT, why);
        }
    }
    let accuracy = params.mapping("accuracy");
    let metadata = accuracy.boolean("metadata").unwrap_or(false);
    let include_usage = accuracy.boolean("includeUsage").unwrap_or(false);
    accuracy.finish();

    let indexer = params.mapping("indexerConfig");
    if params.has(TOKEN_PROCESSOR) && indexer.has(TOKEN_PROCESSOR) {
        indexer.fault(TOKEN_PROCESSOR, GIVEN_TWICE);
    }
    let mut expected = Expected::default();
    for fields in [params, &indexer] {
        read_token_processor(fields.mapping(TOKEN_PROCESSOR), &mut expected);
        fields.ignored("tokenizersPoolConfig", TOKENIZER);
        fields.ignored("prefixStoreConfig", TOKENIZER);
    }
    let cap_bytes = read_index(indexer.mapping("kvBlockIndexConfig"));
    if served {
        let why = "has no effect beside `indexerService`: the service has its own";
        for name in ["kvBlockIndexConfig", "kvCacheBackendConfigs"] {
            if indexer.has(name) {
                indexer.warn(name, why);
            }
        }
        for name in ["kvEventsConfig", WEIGHT] {
            if params.has(name) {
                params.warn(name, why);
            }
        }
    }
    let tiers = read_tiers(&indexer);
    indexer.finish();
    let hot = HotPrefix::read(params);
    let scheme = Scheme::new(
        expected.algorithm.unwrap_or_default(),
        expected.seed.as_deref().unwrap_or_default(),
        expected.block.unwrap_or(DEFAULT_BLOCK),
    );
    let mut embedded = EmbeddedConfig {
        models: Models { default: scheme.into(), ..Models::default() },
        tiers,
        unlisted_weight: 1.0,
        speculative_weight: weight.unwrap_or(DEFAULT_SPECULATIVE_WEIGHT),
        cap_bytes,
        discover_pods: true,
        socket_port: DEFAULT_PORT,
        replay_port: None,
        topic_filter: DEFAULT_TOPIC.to_owned(),
        bind: None,
        engine: String::new(),
        lanes: 0,
    };
    read_events(params.mapping("kvEventsConfig"), &mut embedded);
    let index = if served {
        Index::Service(read_service(params.mapping(SERVICE))?, expected)
    } else {
        // The name counts as known, for suggestions.
        params.mapping(SERVICE).finish();
        Index::Embedded(embedded)
    };
    Some(Params {
        index,
        scoring,
        speculation: speculative.then(|| ttl.unwrap_or(DEFAULT_TTL)),
        hot,
        metadata,
        include_usage,
    })
}

fn read_service(fields: Fields<'_>) -> Option<RemoteConfig> {
    let address = fields.required("address", Fields::nonempty);
    let deadline = fields.take("deadline", |value| match units::duration_value(value)? {
        deadline if deadline.is_zero() || deadline > MAX_DEADLINE => {
            Err(format!("{deadline:?} is out of range; must be above 0 and at most 400ms"))
        }
        deadline => Ok(deadline),
    });
    let switched = switch(&fields, "tls");
    let tls = match switched {
        Some(Some(on)) => on.then(RemoteTls::default),
        Some(None) => {
            let tls = fields.mapping("tls");
            let read = RemoteTls {
                ca: tls.nonempty("ca").map(Into::into),
                server_name: tls.nonempty("serverName"),
                insecure_skip_verify: tls.boolean("insecureSkipVerify").unwrap_or(false),
                identity: read_identity(&tls),
            };
            if read.insecure_skip_verify && read.ca.is_some() {
                tls.warn("ca", "has no effect while insecureSkipVerify is true");
            }
            tls.finish();
            Some(read)
        }
        None => None,
    };
    if switched == Some(Some(false))
        && address.iter().flat_map(|all| all.split(',')).any(|one| one.trim().starts_with("https:"))
    {
        fields.fault("tls", "is off, but the address says https");
    }
    fields.finish();
    Some(RemoteConfig {
        address: address?,
        deadline: deadline.unwrap_or(DEFAULT_DEADLINE),
        tls,
        failures: FAILURES,
        half_open: HALF_OPEN,
    })
}

/// Our certificate and its key, which belong together.
fn read_identity(tls: &Fields<'_>) -> Option<Identity> {
    let (cert, key) = (tls.nonempty("cert"), tls.nonempty("key"));
    let (missing, given) = if cert.is_none() { ("cert", "key") } else { ("key", "cert") };
    if cert.is_some() != key.is_some() {
        tls.fault(missing, format!("missing; {given} needs it"));
    }
    let (chain, key) = (cert?.into(), key?.into());
    Some(Identity { chain, key })
}

/// A field that is true, false, or a mapping with details, which is `Some(None)`.
pub(super) fn switch(fields: &Fields<'_>, name: &'static str) -> Option<Option<bool>> {
    fields.take(name, |value| match value {
        Value::Bool(on) => Ok(Some(*on)),
        Value::Object(_) => Ok(None),
        other => Err(format!("expected true, false or a mapping, got {other}")),
    })
}

fn read_token_processor(fields: Fields<'_>, into: &mut Expected) {
    // Zero is an absent size, as in llm-d.
    let block = fields.integer::<u32>("blockSizeTokens", 0..=MAX_BLOCK).filter(|&size| size > 0);
    let older = fields.integer::<u32>("blockSize", 0..=MAX_BLOCK);
    if older.is_some() {
        fields.warn("blockSize", "is deprecated; use `blockSizeTokens`");
    }
    into.block = block.or(older.filter(|&size| size > 0)).or(into.block);
    into.seed = fields.string("hashSeed").or(into.seed.take());
    let algorithms = [
        ("cbor-fnv", Some(Algorithm::CborFnv)),
        ("xxh64", Some(Algorithm::Xxh64)),
        ("xxh3", Some(Algorithm::Xxh3)),
        ("", None),
    ];
    into.algorithm = fields.one_of("hashAlgorithm", &algorithms).flatten().or(into.algorithm);
    fields.finish();
}

fn read_tiers(indexer: &Fields<'_>) -> Vec<(String, f64)> {
    let mut tiers: Vec<(String, f64)> = Vec::new();
    for tier in indexer.each("kvCacheBackendConfigs") {
        llmd::read_tier(tier, &mut tiers);
    }
    if tiers.is_empty() {
        tiers.extend(TIERS.map(|(name, weight)| (name.to_owned(), weight)));
    }
    tiers
}

/// The cap of the index, bytes.
fn read_index(fields: Fields<'_>) -> u64 {
    let asked = llmd::read_memory(&fields);
    for name in ["redisConfig", "valkeyConfig"] {
        if llmd::read_redis(&fields, name) {
            fields.warn(name, "has no effect: the index is in memory");
        }
    }
    fields.boolean("enableMetrics");
    llmd::read_logging_interval(&fields);
    fields.finish();
    asked.map_or(DEFAULT_CAP, |(bytes, _)| bytes.max(MIN_CAP))
}

fn read_events(fields: Fields<'_>, into: &mut EmbeddedConfig) {
    into.bind = fields.string("zmqEndpoint").filter(|endpoint| !endpoint.is_empty());
    if let Some(topic) = fields.string("topicFilter") {
        into.topic_filter = topic;
    }
    into.lanes = fields.integer("concurrency", 0..=1024).unwrap_or(0);
    let engines = ["vllm", "sglang", ""].map(|engine| (engine, engine));
    into.engine = fields.one_of("engineType", &engines).unwrap_or_default().to_owned();
    // Engines that connect to us do not listen as well.
    into.discover_pods = fields.boolean("discoverPods").unwrap_or(into.bind.is_none());
    if !into.discover_pods {
        for name in ["engineType", "podDiscoveryConfig"] {
            if fields.has(name) {
                fields.warn(name, "has no effect on engines that connect to `zmqEndpoint`");
            }
        }
    }
    let discovery = fields.mapping("podDiscoveryConfig");
    for name in ["podLabelSelector", "podNamespace"] {
        if discovery.string(name).is_some_and(|text| !text.is_empty()) {
            discovery.warn(name, "has no effect: endpoints are those of the pool");
        }
    }
    if let Some(port) = discovery.integer("socketPort", 1..=65_535) {
        into.socket_port = port;
    }
    // Zero and less switch it off.
    let replay = discovery.signed("replaySocketPort", -65_535..=65_535);
    into.replay_port = replay.and_then(|port| u16::try_from(port).ok()).filter(|&port| port > 0);
    discovery.finish();
    if !into.discover_pods && into.bind.is_none() {
        fields.warn("discoverPods", "is off and there is no `zmqEndpoint`: no events ever come");
    }
    fields.finish();
}
