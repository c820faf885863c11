//! Configuration documents as users write them: the commented sample, llm-d's, and faulty ones.

use std::{collections::BTreeSet, fs, path::Path};

use kv_indexer::{
    hash::Algorithm,
    indexer::config::{Flags, IndexerConfig},
    support::fields::Fault,
};

use crate::support::{paths, with_examples};

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn load(path: &str) -> IndexerConfig {
    IndexerConfig::parse(&read(path), &Flags::default()).unwrap()
}

/// The sample with its examples in force, and without what an example replaces.
fn full_sample() -> String {
    let is_replaced = |line: &str| {
        let line = line.trim_start();
        [
            "models: []",
            "modelAliases: {}",
            "kvCacheBackendConfigs: []",
            "pods: []",
            "podsFile: null",
            "aliases: {}",
            "models: {}",
        ]
        .contains(&line)
    };
    with_examples(&read("config/kv-indexer.yaml"), is_replaced)
}

#[test]
fn the_sample_is_the_defaults() {
    let config = load("config/kv-indexer.yaml");
    assert_eq!(format!("{config:?}"), format!("{:?}", IndexerConfig::default()));
}

#[test]
fn the_sample_lists_every_field_and_no_other() {
    let text = full_sample();
    if let Err(faults) = IndexerConfig::parse(&text, &Flags::default()) {
        panic!("{faults:#?}\n{text}");
    }
    let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    let listed = paths(&value, &|path| {
        ["modelAliases", "tokenizers.models", "tokenizers.aliases"].contains(&path)
    });
    // What llm-d has below `indexerConfig` is described once, at the top.
    let known: BTreeSet<String> = IndexerConfig::known_fields()
        .into_iter()
        .filter(|path| !path.starts_with("indexerConfig"))
        .collect();
    let missing: Vec<_> = known.difference(&listed).collect();
    let unread: Vec<_> = listed.difference(&known).collect();
    assert!(missing.is_empty(), "not in config/kv-indexer.yaml: {missing:?}");
    assert!(unread.is_empty(), "in config/kv-indexer.yaml and not read: {unread:?}");
    assert!(known.contains("kvEventsConfig.podDiscoveryConfig.socketPort"));
    assert!(known.contains("pods[].replayEndpoint") && known.len() > 90, "{}", known.len());
}

#[test]
fn what_is_below_indexer_config_is_known_at_the_top_too() {
    let known = IndexerConfig::known_fields();
    let nested: Vec<&str> =
        known.iter().filter_map(|path| path.strip_prefix("indexerConfig.")).collect();
    for path in &nested {
        assert!(known.contains(*path), "{path}");
    }
    for path in ["kvBlockIndexConfig", "kvCacheBackendConfigs", "tokenProcessorConfig.blockSize"] {
        assert!(nested.contains(&path), "{path}");
    }
}

#[track_caller]
fn check_warnings(config: &IndexerConfig, paths: &[&str]) {
    let warned: Vec<&str> =
        config.warnings.iter().filter_map(|text| text.split(": ").next()).collect();
    assert_eq!(warned, paths, "{:#?}", config.warnings);
}

#[test]
fn llmd_top_level_document_loads() {
    let config = load("tests/fixtures/config/llmd-top-level.json");
    assert_eq!(config.index_cap_bytes, 50_000_000 * 32);
    assert_eq!(config.ingest.bind.as_deref(), Some("tcp://*:6557"));
    assert_eq!((config.ingest.topic_filter.as_str(), config.ingest.lanes), ("kv@", 8));
    assert!(config.ingest.allow_unconfigured_pods);
    let scheme = &config.api.models.default;
    assert_eq!((scheme.block_size(), scheme.seed()), (32, "7"));
    assert_eq!(scheme.algorithm(), Algorithm::Xxh3);
    check_warnings(
        &config,
        &[
            "indexerConfig.prefixStoreConfig",
            "indexerConfig.kvBlockIndexConfig.inMemoryConfig.podCacheSize",
            "indexerConfig.kvBlockIndexConfig.enableMetrics",
            "indexerConfig.kvBlockIndexConfig.metricsLoggingInterval",
            "indexerConfig.tokenizersPoolConfig",
            "tokenProcessorConfig.blockSize",
            "kvCacheBackendConfigs",
        ],
    );
    assert!(!format!("{config:?}").contains("hf_not_a_token"));
}

#[test]
fn llmd_library_document_loads() {
    let config = load("tests/fixtures/config/llmd-library.json");
    assert_eq!(config.index_cap_bytes, 750 << 20);
    assert_eq!(config.api.models.default.seed(), "abc");
    assert_eq!(config.warnings.len(), 6, "{:#?}", config.warnings);
}

#[test]
fn llmd_plugin_parameters_load() {
    let config = load("tests/fixtures/config/llmd-plugin.yaml");
    let scheme = &config.api.models.default;
    assert_eq!((scheme.block_size(), scheme.algorithm()), (64, Algorithm::Xxh64));
    assert_eq!((config.index_cap_bytes, config.ingest.lanes), (320_000_000, 32));
    assert!((config.tiers.unlisted - 1.0).abs() < 1e-6);
    assert!((config.tiers.speculative - 0.5).abs() < 1e-6);
    check_warnings(
        &config,
        &[
            "speculativeIndexing",
            "speculativeTTL",
            "indexerConfig.kvBlockIndexConfig.enableMetrics",
            "indexerConfig.kvBlockIndexConfig.metricsLoggingInterval",
            "kvCacheBackendConfigs",
        ],
    );

    let config = load("tests/fixtures/config/llmd-plugin-discovery.yaml");
    assert_eq!((&config.ingest.bind, config.ingest.allow_unconfigured_pods), (&None, false));
    assert_eq!(config.api.models.default.block_size(), 128);
    check_warnings(
        &config,
        &[
            "tokenProcessorConfig.blockSize",
            "indexerConfig.kvBlockIndexConfig.enableMetrics",
            "kvEventsConfig.discoverPods",
            "kvEventsConfig.podDiscoveryConfig.podLabelSelector",
            "kvEventsConfig.podDiscoveryConfig.podNamespace",
            "kvEventsConfig.podDiscoveryConfig.socketPort",
            "kvEventsConfig.podDiscoveryConfig.replaySocketPort",
            "kvCacheBackendConfigs",
        ],
    );

    let config = load("tests/fixtures/config/llmd-scorer.yaml");
    let scheme = &config.api.models.default;
    assert_eq!((scheme.block_size(), scheme.seed()), (48, "99"));
    assert_eq!(config.ingest.topic_filter, "kv");
}

#[test]
fn llmd_document_with_redis_keeps_its_hashes_and_no_password() {
    let config = load("tests/fixtures/config/llmd-redis.yaml");
    assert_eq!(config.api.models.default.algorithm(), Algorithm::CborFnv);
    let shown = format!("{config:?}{}", config.to_json());
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn every_fault_is_reported_at_once_in_order() {
    let text = read("tests/fixtures/config/faults.yaml");
    let faults = IndexerConfig::parse(&text, &Flags::default()).unwrap_err();
    let said: Vec<String> = faults.iter().map(Fault::to_string).collect();
    let wanted = [
        ("line 1: grpcListen: ", "127.0.0.1:50051"),
        ("line 3: tokenProcessorConfig.blockSizeTokens: ", "0..=65536"),
        ("line 4: tokenProcessorConfig.hashSeed: ", "quotes"),
        ("line 5: tokenProcessorConfig.hashAlgorithm: ", "did you mean `xxh3`?"),
        ("line 7: models[0].name: ", "required"),
        ("line 9: kvEventsConfig.zmqEndpoint: ", "no port"),
        ("line 10: kvEventsConfig.concurency: ", "did you mean `concurrency`?"),
        ("line 11: kvEventsConfig.discoverPods: ", "true or false"),
        ("line 13: kvEventsConfig.podDiscoveryConfig.socketPort: ", "1..=65535"),
        ("line 14: kvEventsConfig.limits: ", "expected a mapping"),
        ("line 18: pods[1].id: ", "declared twice"),
        ("line 20: pods[2].id: ", "required"),
        ("line 20: pods[2].endpoint: ", "scheme not supported"),
        ("line 21: pods[2].block_size: ", "did you mean `blockSize`?"),
        ("line 22: podDiscoveryConfig: ", "it belongs at `kvEventsConfig.podDiscoveryConfig`"),
        ("line 23: drainMs: ", "expected an integer"),
    ];
    assert_eq!(said.len(), wanted.len(), "{said:#?}");
    for (said, (start, part)) in said.iter().zip(wanted) {
        assert!(said.starts_with(start) && said.contains(part), "{said}: wanted {start}…{part}");
    }
}

#[test]
fn syntax_errors_name_line_and_column() {
    for (text, line) in [
        ("log:\n  level: info\n level: debug\n", 3),
        ("log: {}\npods: [{id: a\ndrainMs: 1\n", 2),
        ("drainMs: 1\nlog: {}\ndrainMs: 2\n", 3),
        ("{\"drainMs\": 1,\n \"log\": {]}}", 2),
    ] {
        let faults = IndexerConfig::parse(text, &Flags::default()).unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert_eq!(faults[0].line, Some(line), "{text}: {faults:?}");
        assert!(faults[0].message.contains("column"), "{text}: {faults:?}");
    }
}
