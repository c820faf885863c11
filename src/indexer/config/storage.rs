//! `kvBlockIndexConfig` and the tiers: how much is kept, and what it is worth.

use serde_json::Value;

use super::{GIVEN_TWICE, IndexerConfig};
use crate::{
    model::TierTable,
    support::{
        fields::{Fields, set},
        units,
    },
};

/// Bytes per key by which llm-d's capacity in keys becomes ours in bytes: what an entry of this
/// index takes, generously.
const BYTES_PER_KEY: u64 = 32;
/// Below this an index could not hold one long prompt.
const MIN_CAP: u64 = 1 << 20;
const MAX_CAP: u64 = 1 << 50;

/// Tiers other than gpu and cpu that have a weight of their own here, and 1.0 in llm-d.
const OWN_WEIGHT: [&str; 5] = ["disk", "fs", "storage", "object", "external"];

impl IndexerConfig {
    /// Reads `kvBlockIndexConfig`; does it name Redis?
    pub(super) fn read_storage(&mut self, fields: Fields<'_>) -> bool {
        let cap = units::bytes(&fields, "capBytes", MIN_CAP..=MAX_CAP);

        let memory = fields.mapping("inMemoryConfig");
        let keys: Option<u64> = memory.integer("size", 1..=MAX_CAP / BYTES_PER_KEY);
        if memory.integer::<u64>("podCacheSize", 1..=u64::from(u32::MAX)).is_some() {
            memory.warn("podCacheSize", "has no effect: a block knows all its pods");
        }
        memory.finish();

        let cost = fields.mapping("costAwareMemoryConfig");
        let bytes = units::bytes(&cost, "size", 1..=MAX_CAP);
        let bytes = bytes.or(cost.is_present().then_some(2 << 30));
        cost.finish();

        let redis = fields.mapping("redisConfig");
        redis.string("address");
        redis.one_of("backendType", &[("redis", ()), ("valkey", ()), ("", ())]);
        redis.boolean("enableRDMA");
        let has_redis = redis.is_present();
        redis.finish();
        if has_redis {
            let text = "no Redis is used: the index is in this process; `cbor-fnv` is the hash \
                        algorithm unless one is named";
            fields.warn("redisConfig", text);
        }

        let derived = bytes.or(keys.map(|keys| keys * BYTES_PER_KEY));
        if let (None, Some(derived)) = (cap, derived.filter(|&derived| derived < MIN_CAP)) {
            let name = if bytes.is_some() { "costAwareMemoryConfig" } else { "inMemoryConfig" };
            fields.warn(name, format!("gives {derived} bytes; raised to {MIN_CAP}"));
        }
        set(&mut self.index_cap_bytes, cap.or(derived.map(|derived| derived.max(MIN_CAP))));

        if fields.boolean("enableMetrics").is_some() {
            fields.warn("enableMetrics", "has no effect: metrics are always on");
        }
        let interval = fields.take("metricsLoggingInterval", |value| match value {
            Value::String(text) => units::signed_nanos(text).map(drop),
            // Nanoseconds, which is how Go writes a duration as JSON.
            Value::Number(number) if number.is_i64() || number.is_u64() => Ok(()),
            _ => Err("expected an integer in nanoseconds, or a duration such as `1m0s`".to_owned()),
        });
        if interval.is_some() {
            let text = "has no effect: metrics are served at /metrics and not logged";
            fields.warn("metricsLoggingInterval", text);
        }
        fields.finish();
        has_redis
    }

    /// Reads the tiers' weights, of a llm-d document with llm-d's meaning.
    pub(super) fn read_tiers(&mut self, root: &Fields<'_>, indexer: &Fields<'_>, llmd: bool) {
        const LIST: &str = "kvCacheBackendConfigs";
        let listed = root.has(LIST) || indexer.has(LIST);
        let mut entries = root.each(LIST);
        if entries.is_empty() {
            entries = indexer.each(LIST);
        } else {
            indexer.take(LIST, |_| Err::<(), _>(GIVEN_TWICE.to_owned()));
        }
        for fields in entries {
            let name = fields.required("name", Fields::nonempty).map(|name| name.to_lowercase());
            let weight = fields.required("weight", |fields, name| fields.number(name, 0.0));
            let Some((name, weight)) = name.zip(weight) else {
                fields.finish();
                continue;
            };
            if self.tiers.weights.iter().any(|(known, _)| *known == name) {
                fields.fault("name", format!("tier {name:?} is listed twice"));
            } else {
                self.tiers.weights.push((name, weight));
            }
            fields.finish();
        }
        // One name is always left for the tiers that do not fit.
        if self.tiers.weights.len() >= TierTable::MAX {
            root.fault(LIST, format!("lists more than {} tiers", TierTable::MAX - 1));
        }
        let unlisted = root.number("unlistedTierWeight", 0.0);
        if llmd && unlisted.is_none() {
            self.weigh_like_llmd(listed);
            let text = "unlisted tiers weigh 1.0, as in llm-d; set `unlistedTierWeight` (0.5 is \
                        this indexer's own default) to prefer the gpu's blocks";
            root.warn(LIST, text);
        }
        set(&mut self.tiers.unlisted, unlisted);
        let speculative = root.number("speculativeWeight", 0.0);
        set(&mut self.tiers.speculative, speculative);
    }

    /// In llm-d, a given list replaces the default one (gpu 1.0, cpu 0.8), and what is in neither
    /// weighs 1.0.
    fn weigh_like_llmd(&mut self, listed: bool) {
        self.tiers.unlisted = 1.0;
        let replaced = if listed { &["gpu", "cpu"][..] } else { &[] };
        for name in replaced.iter().chain(&OWN_WEIGHT) {
            if self.tiers.weights.iter().all(|(known, _)| known != name) {
                self.tiers.weights.push(((*name).to_owned(), 1.0));
            }
        }
    }
}
