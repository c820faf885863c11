//! What a configuration becomes.

use kv_indexer::epp::{
    args::{Args, EX_USAGE, Start},
    config::{DEFAULT_CONFIG, Loaded, Parts},
    datalayer::Endpoints,
    request::{DEFAULT_PARSERS, ParserKind},
    scheduling::{Configured, DataKey},
};
use prometheus::Registry;
use serde_json::{Value, json};

use super::{
    fakes::{Fake, release, with_test_types},
    load_flagged, load_with,
};

#[track_caller]
fn loaded(text: &str) -> Loaded {
    match load_with(&with_test_types(), text) {
        Ok(loaded) => loaded,
        Err(faults) => panic!("{faults:#?}\n{text}"),
    }
}

fn names(plugins: &[Configured]) -> Vec<&str> {
    plugins.iter().map(|plugin| &*plugin.name).collect()
}

/// Filters, scorers with weights, picker.
#[track_caller]
fn check_profile(loaded: &Loaded, at: usize, want: (&str, &[&str], &[(&str, f64)], &str)) {
    let profile = &loaded.profiles[at];
    let scorers: Vec<(&str, f64)> =
        profile.scorers.iter().map(|(scorer, weight)| (&*scorer.name, *weight)).collect();
    let got = (&*profile.name, names(&profile.filters), scorers, &*profile.picker.name);
    assert_eq!(got, (want.0, want.1.to_vec(), want.2.to_vec(), want.3));
}

#[track_caller]
fn check_warnings(loaded: &Loaded, want: &[&str]) {
    assert_eq!(loaded.warnings.len(), want.len(), "{:#?}", loaded.warnings);
    for (warning, part) in loaded.warnings.iter().zip(want) {
        assert!(warning.contains(part), "{part} is not in {warning}");
    }
}

#[test]
fn nothing_is_the_default() {
    for text in ["", "# nothing\n", DEFAULT_CONFIG] {
        let loaded = loaded(text);
        let scorers = [
            ("queue-scorer", 2.0),
            ("kv-cache-utilization-scorer", 2.0),
            ("prefix-cache-scorer", 3.0),
        ];
        check_profile(&loaded, 0, ("default", &[], &scorers, "max-score-picker"));
        assert_eq!(&*loaded.handler.name, "single-profile-handler");
        assert_eq!(names(&loaded.producers), ["approx-prefix-cache-producer"]);
        assert_eq!(names(&loaded.pre_requests), ["approx-prefix-cache-producer"]);
        assert_eq!(loaded.parsers, DEFAULT_PARSERS);
        assert_eq!(loaded.metrics.len(), 1);
        assert_eq!(&*loaded.metrics[0].source.name, "metrics-data-source");
        assert_eq!(names(&loaded.metrics[0].extractors), ["core-metrics-extractor"]);
        assert_eq!(&*loaded.saturation.name, "utilization-detector");
        assert!(loaded.discovery.is_none() && loaded.admitters.is_empty());
        check_warnings(&loaded, &[]);
    }
}

#[test]
fn json_loads_and_says_what_is_in_force() {
    let text = r#"{"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig",
        "plugins": [{"type": "queue-scorer", "name": "q"}, {"type": "random-picker"},
                    {"type": "decode-filter"}, {"type": "file-discovery"}],
        "dataLayer": {"discovery": {"pluginRef": "file-discovery"}},
        "schedulingProfiles": [{"name": "p", "plugins": [{"pluginRef": "q", "weight": 1.5},
                                {"pluginRef": "decode-filter"}]}]}"#;
    let shown = loaded(text).to_json();
    assert_eq!(
        shown["profiles"],
        json!([{
            "name": "p", "filters": ["decode-filter"], "picker": "random-picker",
            "scorers": [{"name": "q", "weight": 1.5}],
        }])
    );
    assert_eq!(shown["plugins"][0], json!({"name": "q", "type": "queue-scorer"}));
    assert_eq!(shown["discovery"], json!("file-discovery"));
    assert_eq!(shown["profileHandler"], json!("single-profile-handler"));
    assert_eq!(
        shown["metricsSources"],
        json!([{"name": "metrics-data-source", "extractors": ["core-metrics-extractor"]}])
    );
}

#[test]
fn without_profiles_one_holds_all_plugins_in_their_order() {
    let loaded = loaded(
        "plugins: [{type: queue-scorer}, {type: test-filter, name: b}, {type: test-filter, name: a},\
         {type: random-picker}, {type: prefix-cache-scorer}, {type: test-nothing},\
         {type: utilization-detector}]",
    );
    let scorers = [("queue-scorer", 1.0), ("prefix-cache-scorer", 1.0)];
    let filters = ["b", "a", "utilization-detector"];
    check_profile(&loaded, 0, ("default", &filters, &scorers, "random-picker"));
    assert_eq!(loaded.profiles.len(), 1);
    check_warnings(&loaded, &[]);
}

#[test]
fn an_unconfigured_detector_filters_nothing() {
    check_profile(&loaded("plugins: []"), 0, ("default", &[], &[], "max-score-picker"));
}

#[test]
fn a_profile_without_a_picker_has_the_first_one() {
    let loaded = loaded(
        "plugins: [{type: queue-scorer}, {type: weighted-random-picker}, {type: random-picker},\
         {type: test-handler}]\n\
         schedulingProfiles:\n\
         - {name: one, plugins: [{pluginRef: queue-scorer, weight: 0}]}\n\
         - {name: two, plugins: [{pluginRef: random-picker}, {pluginRef: queue-scorer}]}\n\
         - {name: three, plugins: [{pluginRef: queue-scorer, weight: null}]}\n",
    );
    check_profile(&loaded, 0, ("one", &[], &[("queue-scorer", 0.0)], "weighted-random-picker"));
    check_profile(&loaded, 1, ("two", &[], &[("queue-scorer", 1.0)], "random-picker"));
    check_profile(&loaded, 2, ("three", &[], &[("queue-scorer", 1.0)], "weighted-random-picker"));
    assert_eq!(&*loaded.handler.name, "test-handler");
}

#[test]
fn a_plugin_is_in_a_profile_all_that_it_can_be() {
    let loaded = loaded(
        "plugins: [{type: test-all, name: x}, {type: test-filter}]\n\
         schedulingProfiles:\n\
         - name: p\n\
         \x20 plugins: [{pluginRef: test-filter}, {pluginRef: x, weight: 2}]\n",
    );
    check_profile(&loaded, 0, ("p", &["test-filter", "x"], &[("x", 2.0)], "x"));
}

#[test]
fn hooks_run_for_every_plugin_whether_or_not_a_profile_names_it() {
    let loaded = loaded(
        "plugins: [{type: test-admitter}, {type: prefill-header-handler}, {type: test-all},\
         {type: random-picker}]\n\
         schedulingProfiles: [{name: p, plugins: [{pluginRef: random-picker}]}]\n",
    );
    assert_eq!(names(&loaded.admitters), ["test-admitter", "test-all"]);
    assert_eq!(names(&loaded.pre_requests), ["prefill-header-handler", "test-all"]);
    check_profile(&loaded, 0, ("p", &[], &[], "random-picker"));
}

#[test]
fn references_may_go_forwards() {
    let loaded = loaded(
        "plugins:\n\
         - {type: test-refers, name: a, parameters: {one: b, two: c}}\n\
         - {type: test-refers, name: b, parameters: {one: c}}\n\
         - {type: test-filter, name: c}\n",
    );
    assert_eq!(names(&loaded.plugins)[..3], ["a", "b", "c"]);
}

#[test]
fn missing_producers_are_added() {
    // One asks for its default by name, the other leaves it to the loader; both get the same.
    let loaded = loaded("plugins: [{type: active-request-scorer}, {type: token-load-scorer}]");
    assert_eq!(names(&loaded.producers), ["inflight-load-producer"]);

    // A producer that has another name is not taken for the default one.
    let text = "plugins:\n\
                - {type: approx-prefix-cache-producer, name: cpu, parameters: {autoTune: false}}\n\
                - {type: prefix-cache-scorer, name: gpu-scorer}\n\
                - type: prefix-cache-scorer\n\
                \x20 name: cpu-scorer\n\
                \x20 parameters: {prefixMatchInfoProducerName: cpu}\n";
    let loaded = self::loaded(text);
    assert_eq!(names(&loaded.producers), ["cpu", "approx-prefix-cache-producer"]);

    // One that indexes itself needs none.
    let text = "plugins: [{type: prefix-cache-scorer, parameters: {hashBlockSize: 5}}]";
    assert_eq!(names(&self::loaded(text).producers), ["prefix-cache-scorer"]);
}

#[test]
fn a_threshold_goes_by_the_matches_that_its_scorer_goes_by() {
    #[track_caller]
    fn check(plugins: &str, producer: &str) {
        let text = format!(
            "plugins: [{plugins}{{type: pd-profile-handler, parameters: {{threshold: 10}}}}]\n\
             schedulingProfiles: [{{name: decode}}, {{name: prefill}}]\n"
        );
        let loaded = load_with(&release(), &text).unwrap();
        let producers = names(&loaded.producers);
        assert_eq!(producers, [producer], "{plugins}");
        assert_eq!(loaded.handler.plugin.consumes(), [DataKey::Prefix(producer.into())]);
    }
    check("{type: prefix-cache-scorer, parameters: {blockSize: 5}}, ", "prefix-cache-scorer");
    check("{type: prefix-cache-scorer}, ", "approx-prefix-cache-producer");
    check("", "approx-prefix-cache-producer");
}

#[test]
fn who_reads_token_ids_gets_their_producer() {
    let text = "plugins: [{type: test-producer, name: x, parameters: {tokens: true}}]";
    assert_eq!(names(&loaded(text).producers), ["token-producer", "x"]);
    // Whoever writes them is enough.
    let both = "plugins: [{type: test-producer, name: x, parameters: {tokens: true}}, {type: test-tokens}]";
    assert_eq!(names(&loaded(both).producers), ["test-tokens", "x"]);
}

#[test]
fn what_may_be_read_is_ordered_and_not_missed() {
    let loaded = loaded(
        "plugins: [{type: test-producer, name: x, parameters: {mayRead: y}},\
         {type: test-producer, name: y, parameters: {mayRead: nobody}}]",
    );
    assert_eq!(names(&loaded.producers), ["y", "x"]);
}

#[test]
fn load_in_flight_is_counted_after_the_prefix_matches_that_it_may_read() {
    #[track_caller]
    fn check(plugins: &[&str], want: &[&str]) {
        let plugins: Vec<String> =
            plugins.iter().map(|plugin| format!("{{type: {plugin}}}")).collect();
        let text = format!("plugins: [{}]", plugins.join(", "));
        assert_eq!(names(&load_with(&release(), &text).unwrap().producers), want, "{text}");
    }
    const LOAD: &str = "inflight-load-producer";
    const PREFIX: &str = "approx-prefix-cache-producer";
    check(&[LOAD, PREFIX], &[PREFIX, LOAD]);
    check(&[PREFIX, LOAD], &[PREFIX, LOAD]);
    // Nobody needs the matches, so nobody makes them.
    check(&[LOAD], &[LOAD]);
}

#[test]
fn producers_run_after_those_they_read() {
    let loaded = loaded(
        "plugins:\n\
         - {type: test-producer, name: c, parameters: {reads: b}}\n\
         - {type: test-producer, name: a, parameters: {tokens: true}}\n\
         - {type: test-producer, name: b, parameters: {reads: a}}\n\
         - {type: test-producer, name: z, parameters: {reads: z}}\n\
         - {type: test-tokens}\n",
    );
    assert_eq!(names(&loaded.producers), ["z", "test-tokens", "a", "b", "c"]);
}

#[test]
fn old_names_and_sections_load_with_a_warning() {
    let loaded = loaded(
        "apiVersion: inference.networking.x-k8s.io/v1alpha1\n\
         kind: EndpointPickerConfig\n\
         featureGates: [dataLayer, flowControl=False, haPopulateNonLeaderDatastore=true]\n\
         plugins: [{type: kv-cache-scorer}, {type: test-old}, {type: test-old, name: again},\
         {type: file-discovery}, {type: random-picker}]\n\
         data: {discovery: {pluginRef: file-discovery}}\n\
         parser: {pluginRef: openai-parser}\n\
         saturationDetector: {pluginRef: utilization-detector}\n\
         flowControl: {maxRequests: 1k, priorityBands: [{priority: 1, maxBytes: 1Gi}]}\n\
         schedulingProfiles:\n\
         - {name: p, plugins: [{pluginRef: kv-cache-scorer}, {pluginRef: test-old, weight: 2},\
         {pluginRef: file-discovery}]}\n",
    );
    check_profile(&loaded, 0, ("p", &["test-old"], &[("kv-cache-scorer", 1.0)], "random-picker"));
    assert_eq!(loaded.plugins[0].plugin.type_name(), "kv-cache-utilization-scorer");
    assert_eq!(loaded.parsers, [ParserKind::OpenAi]);
    assert_eq!(loaded.discovery.as_ref().map(|it| &*it.name), Some("file-discovery"));
    check_warnings(
        &loaded,
        &[
            "apiVersion: DEPRECATION",
            "featureGates[0]: the data layer is always on",
            "featureGates[2]: has no effect",
            "plugins[0].type: DEPRECATION: type 'kv-cache-scorer' is deprecated: use kv-cache-util",
            "plugins[1].type: DEPRECATION: type 'test-old' is deprecated: use test-filter",
            "data: DEPRECATION",
            "parser: DEPRECATION",
            "saturationDetector: DEPRECATION",
            "flowControl: has no effect while the feature gate flowControl is off",
            "schedulingProfiles[0].plugins[1].pluginRef: 'test-old' is no scorer",
            "schedulingProfiles[0].plugins[2].pluginRef: 'file-discovery' is no filter",
        ],
    );
}

#[test]
fn saturation_is_said_in_three_ways() {
    #[track_caller]
    fn check(text: &str, want: &str, warnings: usize) {
        let loaded = loaded(text);
        assert_eq!(&*loaded.saturation.name, want, "{text}");
        assert_eq!(loaded.warnings.len(), warnings, "{:#?}", loaded.warnings);
    }
    let plugin = "plugins: [{type: utilization-detector, name: mine}]\n";
    check(
        "flowControl: {saturationDetector: {pluginRef: utilization-detector}}",
        "utilization-detector",
        0,
    );
    check(&format!("{plugin}flowControl: {{saturationDetector: {{pluginRef: mine}}}}"), "mine", 0);
    check(&format!("{plugin}saturationDetector: {{pluginRef: mine}}"), "mine", 1);
    check(
        &format!(
            "{plugin}saturationDetector: {{pluginRef: utilization-detector}}\n\
             flowControl: {{saturationDetector: {{pluginRef: mine}}}}"
        ),
        "mine",
        1,
    );
    check(
        "saturationDetector: {queueDepthThreshold: 7, kvCacheUtilThreshold: 0.5}",
        "utilization-detector",
        1,
    );
    check("saturationDetector: {}", "utilization-detector", 1);
}

#[test]
fn parsers_are_taken_in_order_and_nothing_is_added() {
    let loaded = loaded(
        "plugins: [{type: passthrough-parser, name: raw}]\n\
         parser: {pluginRef: anthropic-parser}\n\
         requestHandler: {parsers: [{pluginRef: sglanghttp-parser}, {pluginRef: raw}]}\n",
    );
    assert_eq!(loaded.parsers, [ParserKind::SglangHttp, ParserKind::Passthrough]);
}

#[test]
fn metrics_are_scraped_unless_told_otherwise() {
    #[track_caller]
    fn check(text: &str, want: &[(&str, &[&str])]) {
        let loaded = loaded(text);
        let got: Vec<(&str, Vec<&str>)> = loaded
            .metrics
            .iter()
            .map(|metrics| (&*metrics.source.name, names(&metrics.extractors)))
            .collect();
        let want: Vec<_> = want.iter().map(|(name, list)| (*name, list.to_vec())).collect();
        assert_eq!(got, want, "{text}");
    }
    let plugins =
        "plugins: [{type: metrics-data-source, name: s}, {type: core-metrics-extractor}]\n";
    check("plugins: []", &[("metrics-data-source", &["core-metrics-extractor"])]);
    check(
        "dataLayer: {injectDefaults: true}",
        &[("metrics-data-source", &["core-metrics-extractor"])],
    );
    check("dataLayer: {injectDefaults: false}", &[]);
    check(&format!("{plugins}dataLayer: {{sources: [{{pluginRef: s}}]}}"), &[("s", &[])]);
    check(
        &format!(
            "{plugins}dataLayer:\n  injectDefaults: false\n  sources:\n  - pluginRef: s\n    \
             extractors: [{{pluginRef: core-metrics-extractor}}]\n"
        ),
        &[("s", &["core-metrics-extractor"])],
    );
    check(plugins, &[("metrics-data-source", &["core-metrics-extractor"])]);
}

#[test]
fn alpha_plugins_need_their_flag() {
    let text = "plugins: [{type: test-alpha-alias, name: x}]";
    let loaded = load_flagged(&with_test_types(), text, true, &[]).unwrap();
    assert_eq!(loaded.plugins[0].plugin.type_name(), "test-alpha");
}

#[test]
fn flags_speak_for_plugins_without_parameters() {
    fn value(loaded: &Loaded) -> Option<u64> {
        let plugin: &dyn std::any::Any = &*loaded.plugins[0].plugin;
        plugin.downcast_ref::<Fake>().unwrap().value
    }
    let types = with_test_types();
    let flags = [("test-value", json!({"value": 7}))];
    let load = |text, flags: &[(&'static str, Value)]| load_flagged(&types, text, false, flags);
    assert_eq!(value(&load("plugins: [{type: test-value}]", &flags).unwrap()), Some(7));
    let text = "plugins: [{type: test-value, parameters: {value: 9}}]";
    let loaded = load(text, &flags).unwrap();
    assert_eq!(value(&loaded), Some(9));
    check_warnings(&loaded, &["plugins[0].parameters: these go before what flags say"]);

    let faults = load("plugins: [{type: test-value}]", &[("test-value", json!({"value": 700}))]);
    let text = faults.unwrap_err()[0].to_string();
    assert!(text.contains("flags: plugin 'test-value': 700 is out of range"), "{text}");
}

/// Status (`None`: it would run), standard output and error.
fn start(line: &[&str]) -> (Option<u8>, String, String) {
    let args = Args::from_command_line([&["epp"], line].concat()).unwrap();
    let (types, metrics) = (with_test_types(), Registry::new());
    let endpoints = std::sync::Arc::new(Endpoints::new());
    let parts = Parts {
        types: &types,
        endpoints: &endpoints,
        metrics: &metrics,
        allow_experimental: false,
        defaults: &[],
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = match args.start(&parts, &mut out, &mut err) {
        Start::Run(_) => None,
        Start::Exit(status) => Some(status),
    };
    (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

#[test]
fn check_says_valid_and_warns() {
    let endpoint = "--endpoint=a=127.0.0.1:8000";
    assert_eq!(start(&[endpoint]).0, None);
    let valid = (Some(0), "configuration is valid\n".to_owned(), String::new());
    assert_eq!(start(&["--check", endpoint]), valid);
    let (status, out, err) =
        start(&["--check", endpoint, "--tracing", "--config-text", "featureGates: [dataLayer]"]);
    assert_eq!((status, err.as_str()), (Some(0), ""));
    assert!(
        out.starts_with("configuration is valid\nwarning: --tracing: ")
            && out.contains("\nwarning: featureGates[0]: "),
        "{out}"
    );
}

#[test]
fn every_fault_is_said_with_or_without_check() {
    let text = "plugins: [{type: queue-scorre}]\nbanana: 1\n";
    for more in [&["--check"][..], &[]] {
        let line =
            [&["--config-text", text, "--endpoint=x", "--metrics-client-ca-file=y"], more].concat();
        let (status, out, err) = start(&line);
        assert_eq!((status, out.as_str()), (Some(EX_USAGE), ""));
        for part in [
            "4 faults",
            "--metrics-client-ca-file",
            "--endpoint: \"x\"",
            "line 1: plugins[0].type: plugin type 'queue-scorre' is not registered; did you mean",
            "line 2: banana: unknown field",
        ] {
            assert!(err.contains(part), "{part} is not in {err}");
        }
    }
    let (status, _, err) = start(&["--config-file", "/nonexistent/epp.yaml"]);
    assert_eq!(status, Some(EX_USAGE));
    assert!(err.contains("reading /nonexistent/epp.yaml"), "{err}");
}

#[test]
fn endpoints_have_to_come_from_one_place() {
    let file = "plugins: [{type: file-discovery, name: f, parameters: {path: x}}]\n";
    let named = format!("{file}dataLayer: {{discovery: {{pluginRef: f}}}}");
    #[track_caller]
    fn check(line: &[&str], part: &str) {
        let (status, _, err) = start(line);
        assert_eq!(status, Some(EX_USAGE));
        assert!(err.contains(part), "{part} is not in {err}");
    }
    check(&[], "discovery from Kubernetes is not built yet; add a plugin of type file-discovery");
    check(&["--pool-name=p"], "or give --endpoint NAME=IP:PORT");
    check(
        &["--config-text", file],
        "'f' is configured and nothing refers to it; add `dataLayer: {discovery: {pluginRef: f}}`",
    );
    check(
        &["--config-text", &named, "--endpoint=a=127.0.0.1:1"],
        "endpoints come from 'f' of dataLayer.discovery already",
    );
    assert_eq!(start(&["--check", "--config-text", &named]).0, Some(0));
    assert_eq!(start(&["--check", "--config-text", file, "--endpoint=a=127.0.0.1:1"]).0, Some(0));
}
