//! `kvBlockIndexConfig` and the tiers: how much is kept, and what it is worth.

use super::{GIVEN_TWICE, IndexerConfig};
use crate::{
    ingest::llmd::{self, MAX_CAP, MIN_CAP},
    model::TierTable,
    support::{
        fields::{Fields, set},
        units,
    },
};

/// Tiers other than gpu and cpu that have a weight of their own here, and 1.0 in llm-d.
const OWN_WEIGHT: [&str; 5] = ["disk", "fs", "storage", "object", "external"];

impl IndexerConfig {
    /// Reads `kvBlockIndexConfig`; does it name Redis?
    pub(super) fn read_storage(&mut self, fields: Fields<'_>) -> bool {
        let cap = units::bytes(&fields, "capBytes", MIN_CAP..=MAX_CAP);

        let derived = llmd::read_memory(&fields);
        let has_redis = llmd::read_redis(&fields, "redisConfig");
        if has_redis {
            let text = "no Redis is used: the index is in this process; `cbor-fnv` is the hash \
                        algorithm unless one is named";
            fields.warn("redisConfig", text);
        }

        if let (None, Some((bytes, name))) = (cap, derived.filter(|&(bytes, _)| bytes < MIN_CAP)) {
            fields.warn(name, format!("gives {bytes} bytes; raised to {MIN_CAP}"));
        }
        let derived = derived.map(|(bytes, _)| bytes.max(MIN_CAP));
        set(&mut self.index_cap_bytes, cap.or(derived));

        if fields.boolean("enableMetrics").is_some() {
            fields.warn("enableMetrics", "has no effect: metrics are always on");
        }
        if llmd::read_logging_interval(&fields) {
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
            llmd::read_tier(fields, &mut self.tiers.weights);
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
