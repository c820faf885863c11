//! Fields of llm-d's documents that mean the same to every program with an index: the service's
//! configuration and the parameters of the endpoint picker's plugin have them.

use serde_json::Value;

use crate::support::{fields::Fields, units};

/// Bytes per key by which llm-d's capacity in keys becomes ours in bytes: what an entry of this
/// index takes, generously.
const BYTES_PER_KEY: u64 = 32;
/// Below this an index could not hold one long prompt, bytes.
pub const MIN_CAP: u64 = 1 << 20;
/// Largest cap that can be configured, bytes.
pub const MAX_CAP: u64 = 1 << 50;

/// Reads `inMemoryConfig` and `costAwareMemoryConfig` of a `kvBlockIndexConfig`: the cap that they ask
/// for, in bytes, and which of them does. It may be less than [`MIN_CAP`].
pub fn read_memory(fields: &Fields<'_>) -> Option<(u64, &'static str)> {
    const MEMORY: &str = "inMemoryConfig";
    const COST: &str = "costAwareMemoryConfig";
    let memory = fields.mapping(MEMORY);
    let keys: Option<u64> = memory.integer("size", 1..=MAX_CAP / BYTES_PER_KEY);
    if memory.integer::<u64>("podCacheSize", 1..=u64::from(u32::MAX)).is_some() {
        memory.warn("podCacheSize", "has no effect: a block knows all its pods");
    }
    memory.finish();
    let cost = fields.mapping(COST);
    let bytes = units::bytes(&cost, "size", 1..=MAX_CAP);
    let bytes = bytes.or(cost.is_present().then_some(2 << 30));
    cost.finish();
    let by_keys = || keys.map(|keys| (keys * BYTES_PER_KEY, MEMORY));
    bytes.map(|bytes| (bytes, COST)).or_else(by_keys)
}

/// Reads a `redisConfig` or `valkeyConfig`; is it there?
pub fn read_redis(fields: &Fields<'_>, name: &'static str) -> bool {
    let redis = fields.mapping(name);
    redis.string("address");
    redis.one_of("backendType", &[("redis", ()), ("valkey", ()), ("", ())]);
    redis.boolean("enableRDMA");
    let present = redis.is_present();
    redis.finish();
    present
}

/// Reads `metricsLoggingInterval`; is it there?
pub fn read_logging_interval(fields: &Fields<'_>) -> bool {
    let interval = fields.take("metricsLoggingInterval", |value| match value {
        Value::String(text) => units::signed_nanos(text).map(drop),
        // Nanoseconds, which is how Go writes a duration as JSON.
        Value::Number(number) if number.is_i64() || number.is_u64() => Ok(()),
        _ => Err("expected an integer in nanoseconds, or a duration such as `1m0s`".to_owned()),
    });
    interval.is_some()
}

/// Adds the tier of an entry of `kvCacheBackendConfigs`, lower-cased, with its weight. One that is
/// listed twice is a fault.
pub fn read_tier(fields: Fields<'_>, tiers: &mut Vec<(String, f64)>) {
    let name = fields.required("name", Fields::nonempty).map(|name| name.to_lowercase());
    let weight = fields.required("weight", |fields, name| fields.number(name, 0.0));
    if let Some((name, weight)) = name.zip(weight) {
        if tiers.iter().any(|(known, _)| *known == name) {
            fields.fault("name", format!("tier {name:?} is listed twice"));
        } else {
            tiers.push((name, weight));
        }
    }
    fields.finish();
}
