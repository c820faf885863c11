use super::*;
use crate::hash::Algorithm;

fn parse(text: &str) -> Result<IndexerConfig, Vec<Fault>> {
    IndexerConfig::parse(text, &Flags::default())
}

#[track_caller]
fn good(text: &str) -> IndexerConfig {
    parse(text).unwrap_or_else(|faults| panic!("{text}: {faults:#?}"))
}

/// The only fault of `text` has these words.
#[track_caller]
fn bad(text: &str, path: &str, part: &str) {
    let faults = parse(text).unwrap_err();
    assert_eq!(faults.len(), 1, "{text}: {faults:#?}");
    assert_eq!(faults[0].path, path, "{text}: {faults:#?}");
    assert!(faults[0].message.contains(part), "{text}: {faults:#?}");
}

#[test]
fn an_empty_document_gives_the_defaults() {
    let want = format!("{:?}", IndexerConfig::default());
    for text in ["", "{}", "kvEventsConfig:\npods: ~\nmodels: null\n"] {
        assert_eq!(format!("{:?}", good(text)), want, "{text}");
    }
}

#[test]
fn the_effective_configuration_loads_again() {
    for text in [
        "",
        "models: [{name: m, hashAlgorithm: xxh64, hashSeed: s}, {name: a}]\n\
         modelAliases: {served: m}\nkvBlockIndexConfig: {capBytes: 1GiB}\n\
         kvCacheBackendConfigs: [{name: CPU, weight: 0.7}]\npodsFile: /p\n\
         kvEventsConfig: {zmqEndpoint: 'tcp://*:5557', queueBytes: 512MiB, \
         loss: {policy: clear, ageOutMs: 5}}\n\
         pods: [{id: a, endpoint: 'tcp://h:1', rank: 3, countMode: set, engine: sglang, \
         firstSequence: 1, lossPolicy: age-out}]",
        "grpcTls: {selfSigned: true, minVersion: VersionTLS13, clientCa: /ca, reload: false}\n\
         tokenizers: {models: {m: /m, n: {dir: /n}}, modelsDir: /d, aliases: {x: m}, default: m, \
         threads: 3, queue: 9, budgetMs: 50, cacheBytes: 1MiB, render: {url: 'http://h:1'}}",
        "grpcTls: {selfSigned: true, clientCa: /ca, clientAuth: optional}\n\
         auth: {tokenFile: /t}\napi: {maxConnections: 9, idleTimeoutMs: 8, maxPendingBytes: 7MiB, \
         messageTimeoutMs: 6}\nkvEventsConfig: {zmqEndpoint: 'tcp://*:5557', checkPeerAddress: true, \
         curve: {publicKey: 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7', secretKeyFile: /k}}",
        "auth: {allowWithoutToken: true}",
        "indexerConfig: {}",
    ] {
        let json = good(text).to_json();
        let again = good(&json.to_string());
        assert_eq!(again.to_json(), json);
        assert!(again.warnings.is_empty(), "{:?}", again.warnings);
    }
}

#[test]
fn what_is_not_for_everybody_is_closed_unless_a_setting_opens_it() {
    #[track_caller]
    fn check(text: &str, at: &str, proved: bool, open: bool) {
        let access = good(text).auth.access(None, at.parse().unwrap(), proved);
        match access.check(None) {
            Ok(()) => assert!(open, "{text} {at}"),
            Err(denied) => {
                assert!(!open && denied.to_string().contains("auth.tokenFile"), "{text} {at}");
            }
        }
    }
    for loopback in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        check("", loopback, false, true);
    }
    for any in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[::ffff:10.0.0.1]:1"] {
        check("", any, false, false);
        check("", any, true, true);
        check("auth: {allowWithoutToken: true}", any, false, true);
    }
    let both = "auth: {allowWithoutToken: true, tokenFile: /t}";
    bad(both, "auth.allowWithoutToken", "give one of them");
    let alone = "grpcTls: {selfSigned: true, clientAuth: optional}";
    bad(alone, "grpcTls.clientAuth", "optional needs a clientCa");
    let mode = "grpcTls: {selfSigned: true, clientCa: /ca, clientAuth: maybe}";
    bad(mode, "grpcTls.clientAuth", "`required`, `optional`");
    let ipc = "kvEventsConfig: {zmqEndpoint: 'ipc:///x', checkPeerAddress: true}";
    bad(ipc, "kvEventsConfig.checkPeerAddress", "no addresses");
    let key = "kvEventsConfig: {curve: {publicKey: secret, secretKeyFile: /k}}";
    bad(key, "kvEventsConfig.curve.publicKey", "no key in Z85");
}

#[test]
fn capacities_become_bytes() {
    let cap = |text: &str| good(&format!("kvBlockIndexConfig: {{{text}}}")).index_cap_bytes;
    assert_eq!(cap(""), 4 << 30);
    assert_eq!(cap("inMemoryConfig: {size: 1e8}"), 3_200_000_000);
    assert_eq!(cap("inMemoryConfig: {size: 100000000, podCacheSize: 10}"), 3_200_000_000);
    assert_eq!(cap("costAwareMemoryConfig: {size: 500MiB}"), 500 << 20);
    assert_eq!(cap("costAwareMemoryConfig: {}"), 2 << 30);
    assert_eq!(cap("costAwareMemoryConfig: {size: 1GB}, inMemoryConfig: {size: 5}"), 1_000_000_000);
    assert_eq!(cap("capBytes: 8GiB, costAwareMemoryConfig: {size: 1GB}"), 8 << 30);
    let small = good("kvBlockIndexConfig: {inMemoryConfig: {size: 10}}");
    assert_eq!(small.index_cap_bytes, 1 << 20);
    assert!(small.warnings[0].contains("raised"), "{:?}", small.warnings);
    bad("kvBlockIndexConfig: {capBytes: 1}", "kvBlockIndexConfig.capBytes", "1048576..=");
    let path = "kvBlockIndexConfig.costAwareMemoryConfig.size";
    bad("kvBlockIndexConfig: {costAwareMemoryConfig: {size: 2 gigs}}", path, "no size");
}

#[test]
fn hash_settings_follow_the_rules() {
    let scheme = |text: &str| (*good(text).api.models.default).clone();
    assert_eq!(scheme("").algorithm(), Algorithm::Xxh3);
    assert_eq!(scheme("indexerConfig: {}").algorithm(), Algorithm::Xxh3);
    let redis = "kvBlockIndexConfig: {redisConfig: {address: 'redis://me:secret@h:6379'}}";
    assert_eq!(scheme(redis).algorithm(), Algorithm::CborFnv);
    let named = format!("{redis}\ntokenProcessorConfig: {{hashAlgorithm: xxh64}}");
    assert_eq!(scheme(&named).algorithm(), Algorithm::Xxh64);
    assert!(!format!("{:?}{}", good(redis), good(redis).to_json()).contains("secret"));

    let size = |text: &str| scheme(&format!("tokenProcessorConfig: {{{text}}}")).block_size();
    assert_eq!(size("blockSize: 64"), 64);
    assert_eq!(size("blockSize: 64, blockSizeTokens: 0"), 64);
    assert_eq!(size("blockSize: 64, blockSizeTokens: 32"), 32);
    assert_eq!(size("blockSize: 0"), 16);
    for wrong in ["-1", "65537"] {
        let text = format!("tokenProcessorConfig: {{blockSizeTokens: {wrong}}}");
        bad(&text, "tokenProcessorConfig.blockSizeTokens", "out of range");
    }
    let text = "tokenProcessorConfig: {hashSeed: 42}";
    bad(text, "tokenProcessorConfig.hashSeed", "put it in quotes");
    let text = "tokenProcessorConfig: {hashAlgorithm: xxhash}";
    bad(text, "tokenProcessorConfig.hashAlgorithm", "`xxh3`, `xxh64`, `cbor-fnv`");
}

#[test]
fn models_inherit_and_are_checked() {
    let models = good(
        "tokenProcessorConfig: {blockSizeTokens: 32, hashSeed: s, hashAlgorithm: xxh64}\n\
         models: [{name: a, blockSizeTokens: 64}, {name: b, hashAlgorithm: xxh3, hashSeed: ''}]\n\
         modelAliases: {served: a}",
    )
    .api
    .models;
    let scheme = |name: &str| models.scheme(models.canonical(name)).as_ref().clone();
    assert_eq!(scheme("served"), crate::hash::Scheme::new(Algorithm::Xxh64, "s", 64));
    assert_eq!(scheme("b"), crate::hash::Scheme::new(Algorithm::Xxh3, "", 32));
    bad("models: [{name: a}, {name: a}]", "models[1].name", "twice");
    bad("models: [{blockSizeTokens: 1}]", "models[0].name", "required");
    bad("models: [{name: a, blockSizeTokens: 0}]", "models[0].blockSizeTokens", "1..=65536");
    bad("modelAliases: {a: b, b: c}", "modelAliases.a", "alias itself");
    bad("modelAliases: {a: a}", "modelAliases.a", "alias itself");
}

#[test]
fn weights_depend_on_whose_document_it_is() {
    let weight = |text: &str, tier: &str| {
        let table = good(text).tiers.table();
        let id = table.id(Some(tier));
        table.weights()[usize::from(id.0)]
    };
    let ours = "kvCacheBackendConfigs: [{name: CPU, weight: 0.25}]";
    let theirs = format!("indexerConfig: {{{ours}}}");
    for (tier, own, llmd) in
        [("gpu", 1.0, 1.0), ("cpu", 0.25, 0.25), ("disk", 0.5, 1.0), ("x", 0.5, 1.0)]
    {
        assert!((weight(ours, tier) - own).abs() < 1e-6, "{tier}");
        assert!((weight(&theirs, tier) - llmd).abs() < 1e-6, "{tier}");
    }
    assert!((weight("speculativeIndexing: true", "cpu") - 0.8).abs() < 1e-6);
    assert!((weight("speculativeIndexing: true", "disk") - 1.0).abs() < 1e-6);
    let text = "indexerConfig: {kvCacheBackendConfigs: [{name: gpu, weight: 1}]}";
    assert!((weight(text, "cpu") - 1.0).abs() < 1e-6, "llm-d's list replaces its default");
    let told = format!("{theirs}\nunlistedTierWeight: 0.1");
    assert!((weight(&told, "x") - 0.1).abs() < 1e-6);
    assert!((weight(&told, "disk") - 0.5).abs() < 1e-6);
    assert!(good(&theirs).warnings.iter().any(|w| w.contains("weigh 1.0")));
    assert!(!good(&told).warnings.iter().any(|w| w.contains("weigh 1.0")));

    let path = "kvCacheBackendConfigs[0].weight";
    bad("kvCacheBackendConfigs: [{name: gpu, weight: -1}]", path, "at least 0");
    bad("kvCacheBackendConfigs: [{name: gpu}]", path, "required");
    bad("kvCacheBackendConfigs: [{name: gpu, weight: .inf}]", "", "finite");
    let twice = "kvCacheBackendConfigs: [{name: gpu, weight: 1}, {name: GPU, weight: 2}]";
    bad(twice, "kvCacheBackendConfigs[1].name", "twice");
    bad(&format!("{theirs}\n{ours}"), "indexerConfig.kvCacheBackendConfigs", "top of the document");
}

#[test]
fn pods_that_nobody_configured_are_welcome_where_nobody_configured_any() {
    let bound = "kvEventsConfig: {zmqEndpoint: 'tcp://*:5557'}\n";
    let pods = "pods: [{id: a, endpoint: 'tcp://h:1'}]\n";
    let allowed = |text: &str| good(text).ingest.allow_unconfigured_pods;
    assert!(allowed(bound));
    assert!(!allowed(""));
    assert!(!allowed(&format!("{bound}{pods}")));
    assert!(!allowed(&format!("{bound}podsFile: p.yaml")));
    let told = bound.replace('}', ", allowUnconfiguredPods: true}");
    assert!(allowed(&format!("{told}{pods}")));
    let flags = Flags {
        pods: vec![PodDeclaration {
            pod: "a".to_owned(),
            endpoint: "tcp://h:1".to_owned(),
            ..PodDeclaration::default()
        }],
        ..Flags::default()
    };
    let config = IndexerConfig::parse(bound, &flags).unwrap();
    assert!(!config.ingest.allow_unconfigured_pods);
    assert_eq!(config.ingest.topic_filter, "kv@");
    assert_eq!(config.ingest.pods[0].topic_filter, "");
}

#[test]
fn pods_are_read_and_checked() {
    let config = good(
        "kvEventsConfig: {engineType: sglang}\npods:\n\
         - {id: a, endpoint: 'tcp://10.0.0.1:5557', replayEndpoint: 'tcp://10.0.0.1:5558', \
            model: m, rank: 0, topicFilter: kv, engine: vllm, engineVersion: 0.30.0, \
            trustUnchained: true, countMode: set, blockSize: 16, firstSequence: 1, \
            lossPolicy: clear}\n\
         - {id: a, rank: 1, endpoint: 'http://10.0.0.1:8000'}\n",
    );
    assert_eq!(
        config.ingest.pods[0],
        PodDeclaration {
            pod: "a".to_owned(),
            endpoint: "tcp://10.0.0.1:5557".to_owned(),
            replay_endpoint: Some("tcp://10.0.0.1:5558".to_owned()),
            model: Some("m".to_owned()),
            rank: Some(0),
            topic_filter: "kv".to_owned(),
            engine: "vllm".to_owned(),
            engine_version: Some("0.30.0".to_owned()),
            trust_unchained: true,
            count_mode: crate::model::CountMode::Set,
            block_size: Some(16),
            first_sequence: 1,
            loss_policy: Some(crate::ingest::loss::LossPolicy::Clear),
        }
    );
    assert_eq!(config.ingest.pods[1].engine, "sglang");

    let pod = |text: &str| format!("pods: [{{id: a, endpoint: 'tcp://h:1'}}, {{{text}}}]");
    bad(&pod("id: a, endpoint: 'tcp://h:2'"), "pods[1].id", "declared twice");
    bad(&pod("endpoint: 'tcp://h:2'"), "pods[1].id", "required");
    bad(&pod("id: '', endpoint: 'tcp://h:2'"), "pods[1].id", "empty");
    let long = "x".repeat(513);
    bad(&pod(&format!("id: {long}, endpoint: 'tcp://h:2'")), "pods[1].id", "513");
    bad(&pod("id: b"), "pods[1].endpoint", "required");
    bad(&pod("id: b, endpoint: 'h:2'"), "pods[1].endpoint", "tcp://host:port");
    let replay = "id: b, endpoint: 'tcp://h:2', replayEndpoint: 'http://h:3'";
    bad(&pod(replay), "pods[1].replayEndpoint", "not supported");
    bad(&pod("id: b, endpoint: 'tcp://h:2', engine: tgi"), "pods[1].engine", "`vllm`");
    bad(
        &format!("{}\nkvEventsConfig: {{maxPods: 1}}", pod("id: b, endpoint: 'tcp://h:2'")),
        "pods",
        "maxPods",
    );
}

#[test]
fn tls_is_off_unless_there_is_a_certificate() {
    assert_eq!(good("grpcTls: {reload: true, minVersion: VersionTLS13}").grpc_tls, None);
    let tls = good("grpcTls: {certPath: /c, clientCa: /ca}").grpc_tls.unwrap();
    assert_eq!(tls.options.cert_path, Some("/c".into()));
    assert_eq!((tls.options.client_ca, tls.reload), (Some("/ca".into()), true));
    let tls = good("grpcTls: {selfSigned: true, reload: false}").grpc_tls.unwrap();
    assert_eq!((tls.options.cert_path, tls.reload), (None, false));
    bad("grpcTls: {selfSigned: true, certPath: /c}", "grpcTls.selfSigned", "one of them");
    bad("grpcTls: {clientCa: /ca}", "grpcTls.clientCa", "certPath");
    bad("grpcTls: {minVersion: '1.2'}", "grpcTls.minVersion", "VersionTLS12");
}

#[test]
fn tokenizers_have_directories_or_an_engine() {
    assert!(!good("tokenizers: {threads: 2}").tokenizers.has_local());
    let tokenizers =
        good("tokenizers: {models: {a: /a, b: {dir: /b}}, aliases: {c: a}}").tokenizers;
    let dirs: Vec<_> = tokenizers.local.models.values().map(|dir| dir.to_str().unwrap()).collect();
    assert_eq!((dirs, tokenizers.render), (vec!["/a", "/b"], None));
    let render =
        good("tokenizers: {render: {url: 'http://h:8000', timeoutMs: 7}}").tokenizers.render;
    let render = render.unwrap();
    assert_eq!((render.url.as_str(), render.timeout.as_millis()), ("http://h:8000", 7));
    bad("tokenizers: {models: {a: 1}}", "tokenizers.models", "model \"a\" needs its directory");
    bad("tokenizers: {models: {a: {path: /a}}}", "tokenizers.models", "{dir: text}");
    bad("tokenizers: {models: [/a]}", "tokenizers.models", "mapping");
    bad("tokenizers: {aliases: {a: b}}", "tokenizers.aliases", "modelsDir");
    bad("tokenizers: {default: a}", "tokenizers.default", "modelsDir");
    bad("tokenizers: {render: {model: a}}", "tokenizers.render.url", "required");
    bad("tokenizers: {queue: 0}", "tokenizers.queue", "1..=1048576");
}

#[test]
fn rules_between_fields_hold() {
    bad("adminListen: 127.0.0.1:50051", "adminListen", "differ");
    good("grpcListen: 127.0.0.1:0\nadminListen: 127.0.0.1:0");
    bad("grpcListen: ':50051'", "grpcListen", "127.0.0.1:50051");
    let events = |text: &str| format!("kvEventsConfig: {{{text}}}");
    bad(&events("reconnectMs: 6000"), "kvEventsConfig.reconnectMaxMs", "reconnectMs");
    bad(&events("queueBytes: 1MiB"), "kvEventsConfig.queueBytes", "payloadBytes");
    bad(&events("replay: {heldBytes: 1MiB}"), "kvEventsConfig.replay.heldBytes", "payloadBytes");
    bad(&events("engineType: trt"), "kvEventsConfig.engineType", "`vllm`, `sglang`");
    bad(&events("zmqEndpoint: 'http://h:1'"), "kvEventsConfig.zmqEndpoint", "not supported");
    let port = "kvEventsConfig.podDiscoveryConfig.socketPort";
    bad(&events("podDiscoveryConfig: {socketPort: 70000}"), port, "1..=65535");
    bad("log: {level: loud}", "log.level", "no log level");
}

#[test]
fn what_is_not_ours_is_refused_in_plain_words() {
    bad("indexerConfig: ~", "indexerConfig", "indexerConfig is required");
    bad("kind: EndpointPickerConfig\nplugins: []", "kind", "parameters");
    let text = "podDiscoveryConfig: {socketPort: 1}";
    bad(text, "podDiscoveryConfig", "belongs at `kvEventsConfig.podDiscoveryConfig`");
    bad("blockSize: 16", "blockSize", "belongs at");
    bad("speculativeTTL: 2 seconds", "speculativeTTL", "no duration");
}
