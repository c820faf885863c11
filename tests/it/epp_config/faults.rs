//! What is refused, and how that is said.

use super::{
    fakes::{release, with_test_types},
    load_with,
};

/// All faults, as they are printed.
#[track_caller]
fn check(text: &str, want: &[&str]) {
    let faults = match load_with(&with_test_types(), text) {
        Ok(loaded) => panic!("it loads: {loaded:#?}\n{text}"),
        Err(faults) => faults,
    };
    let got: Vec<String> = faults.iter().map(ToString::to_string).collect();
    assert_eq!(got, want, "\n{got:#?}\n{text}");
}

const PROFILE: &str = "schedulingProfiles: [{name: p, plugins: []}]\n";

#[test]
fn documents_that_are_none() {
    for (text, part) in [
        ("plugins: [\n", "failed to decode configuration JSON/YAML"),
        ("plugins: []\nplugins: []\n", "duplicate"),
        ("- a\n", "expected a mapping at the top, got a list"),
    ] {
        let faults = load_with(&with_test_types(), text).unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:#?}");
        assert!(faults[0].to_string().contains(part), "{}", faults[0]);
    }
}

#[test]
fn the_envelope_is_strict() {
    check(
        "apiVersion: llm-d.ai/v2\nkind: Pod\nunknownField: 1\npulgins: []\n",
        &[
            "line 1: apiVersion: \"llm-d.ai/v2\" is not one of `llm-d.ai/v1alpha1`, \
             `inference.networking.x-k8s.io/v1alpha1`",
            "line 2: kind: \"Pod\" is not one of `EndpointPickerConfig`",
            "line 3: unknownField: unknown field",
            "line 4: pulgins: unknown field; did you mean `plugins`?",
        ],
    );
    check("plugins: {}\n", &["line 1: plugins: expected a list, got a mapping"]);
    check(
        "plugins:\n- testing 1 2 3\n",
        &["line 1: plugins[0]: expected a mapping, got the string \"testing 1 2 3\""],
    );
    check(
        "plugins:\n- type: queue-scorer\n  paramaters: {}\n",
        &["line 3: plugins[0].paramaters: unknown field; did you mean `parameters`?"],
    );
    check(
        "schedulingProfiles: [{name: p, plugins: [{ref: x, pluginRef: y}]}]\n",
        &[
            "line 1: schedulingProfiles[0].plugins[0].ref: unknown field",
            "line 1: schedulingProfiles[0].plugins[0].pluginRef: schedulingProfiles[p] references \
             undefined plugin 'y'",
        ],
    );
    check(
        "dataLayer: {sorces: [], discovery: {ref: x}}\n",
        &[
            "line 1: dataLayer.sorces: unknown field; did you mean `sources`?",
            "line 1: dataLayer.discovery.pluginRef: missing 'pluginRef'",
            "line 1: dataLayer.discovery.ref: unknown field",
        ],
    );
    check(
        "data: {}\ndataLayer: {}\n",
        &["line 1: data: is the old name of dataLayer; give one of them"],
    );
}

#[test]
fn too_much_is_a_mistake() {
    let many = "{type: test-filter},".repeat(257);
    let faults = load_with(&with_test_types(), &format!("plugins: [{many}]")).unwrap_err();
    let text = faults[0].to_string();
    assert!(text.contains("has 257 entries; 256 are the most"), "{text}");
}

#[test]
fn gates() {
    check(
        "featureGates: [unknown-gate, flowControl=qwerty, 'x=false', 7]\n",
        &[
            "line 1: featureGates[0]: feature gate 'unknown-gate' is unknown or unregistered",
            "line 1: featureGates[1]: qwerty is not a valid value for the feature gate flowControl",
            "line 1: featureGates[2]: feature gate 'x' is unknown or unregistered",
            "line 1: featureGates[3]: expected a string, got the number 7",
        ],
    );
    check(
        "featureGates: [flowControl]\n",
        &["line 1: featureGates[0]: feature gate 'flowControl' is not built yet; leave it out"],
    );
}

#[test]
fn plugins() {
    check(
        "plugins: [{parameters: {a: 1}}]\n",
        &["line 1: plugins[0]: plugin '' is missing a type"],
    );
    check(
        "plugins: [{name: x, type: ''}]\n",
        &["line 1: plugins[0].type: plugin 'x' is missing a type"],
    );
    check(
        "plugins:\n- {name: a, type: test-filter}\n- {name: a, type: test-filter}\n",
        &["line 3: plugins[1]: duplicate plugin name 'a'"],
    );
    check(
        "plugins: [{type: test-filter}, {type: test-filter}]\n",
        &["line 1: plugins[1]: duplicate plugin name 'test-filter'"],
    );
    check(
        "plugins: [{type: banana}, {type: max-score-piker}]\n",
        &[
            "line 1: plugins[0].type: plugin type 'banana' is not registered",
            "line 1: plugins[1].type: plugin type 'max-score-piker' is not registered; did you mean \
             `max-score-picker`?",
        ],
    );
    check(
        "plugins: [{type: context-length-aware, name: x, parameters: {label: l}}, {type: vllmgrpc-parser}]\n",
        &[
            "line 1: plugins[0].type: plugin type 'context-length-aware' is not built yet (plugin 'x')",
            "line 1: plugins[1].type: plugin type 'vllmgrpc-parser' is not built yet (plugin 'vllmgrpc-parser')",
        ],
    );
    check(
        "plugins: [{type: test-alpha, name: x}]\n",
        &[
            "line 1: plugins[0].type: plugin 'x' (type: 'test-alpha') has Alpha stability level, but \
             command line flag --allow-experimental-plugins is not set",
        ],
    );
    check("plugins: [{type: test-silent}]\n", &["a plugin could not be created"]);
}

#[test]
fn parameters() {
    check(
        "plugins:\n- type: test-value\n  name: v\n  parameters:\n    value: asdf\n    vallue: 3\n    \
         inner:\n      deeep: 1\n",
        &[
            "line 5: plugins[0].parameters.value: failed to create plugin 'v' (type: test-value): \
             expected an integer, got the string \"asdf\"",
            "line 6: plugins[0].parameters.vallue: failed to create plugin 'v' (type: test-value): \
             unknown field; did you mean `value`?",
            "line 8: plugins[0].parameters.inner.deeep: failed to create plugin 'v' (type: \
             test-value): unknown field; did you mean `deep`?",
        ],
    );
    check(
        "plugins: [{type: test-value, parameters: 3}]\n",
        &[
            "line 1: plugins[0].parameters: failed to create plugin 'test-value' (type: test-value): \
             expected a mapping, got the number 3",
        ],
    );
    // Of ten plugins and more, the right one is named.
    let filler: String =
        (0..10).map(|n| format!("- {{type: test-filter, name: f{n}}}\n")).collect();
    check(
        &format!("plugins:\n{filler}- {{type: test-value, parameters: {{value: 0}}}}\n"),
        &["line 12: plugins[10].parameters.value: failed to create plugin 'test-value' (type: \
             test-value): 0 is out of range; must be in 1..=100"],
    );
}

#[test]
fn references_between_plugins() {
    check(
        "plugins: [{type: test-refers, name: a, parameters: {one: abc}}, {type: test-filter, name: abd}]\n",
        &["line 1: plugins[0].parameters.one: failed to create plugin 'a' (type: test-refers): a \
             plugin has a dependency on the unregistered plugin abc; did you mean `abd`?"],
    );
    check(
        "plugins: [{type: test-refers, name: a, parameters: {one: a}}]\n",
        &["line 1: plugins[0].parameters.one: failed to create plugin 'a' (type: test-refers): \
             plugins refer to each other in a loop: a -> a"],
    );
    check(
        "plugins:\n\
         - {type: test-refers, name: x, parameters: {one: a}}\n\
         - {type: test-refers, name: a, parameters: {one: b}}\n\
         - {type: test-refers, name: b, parameters: {two: c}}\n\
         - {type: test-refers, name: c, parameters: {one: a}}\n",
        &["line 5: plugins[3].parameters.one: failed to create plugin 'c' (type: test-refers): \
             plugins refer to each other in a loop: a -> b -> c -> a"],
    );
    // What a failed plugin leads to is not said again.
    check(
        "plugins: [{type: test-refers, name: a, parameters: {one: b}}, {type: banana, name: b}]\n\
         schedulingProfiles: [{name: p, plugins: [{pluginRef: a}, {pluginRef: b}]}]\n",
        &["line 1: plugins[1].type: plugin type 'banana' is not registered"],
    );
}

#[test]
fn profiles() {
    check(
        "schedulingProfiles: [{plugins: []}]\n",
        &["line 1: schedulingProfiles[0]: schedulingProfiles[0] is missing a name"],
    );
    check(
        "plugins: [{type: test-handler}]\nschedulingProfiles: [{name: p}, {name: p}]\n",
        &["line 2: schedulingProfiles[1].name: schedulingProfiles[1] has duplicate name 'p'"],
    );
    check(
        "schedulingProfiles: [{name: default, plugins: [{weight: 10}]}]\n",
        &["line 1: schedulingProfiles[0].plugins[0].pluginRef: schedulingProfiles[default].\
             plugins[0] is missing a 'pluginRef'"],
    );
    check(
        "plugins: [{type: queue-scorer}]\n\
         schedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorrer}]}]\n",
        &["line 2: schedulingProfiles[0].plugins[0].pluginRef: schedulingProfiles[p] references \
             undefined plugin 'queue-scorrer'; did you mean `queue-scorer`?"],
    );
    check(
        "plugins: [{type: queue-scorer}]\n\
         schedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: -1},\
         {pluginRef: queue-scorer, weight: heavy}]}]\n",
        &[
            "line 2: schedulingProfiles[0].plugins[0].weight: -1 is negative; a weight is at least 0",
            "line 2: schedulingProfiles[0].plugins[1].weight: expected a number, got \"heavy\"",
        ],
    );
    check(
        "plugins: [{type: max-score-picker, name: A}, {type: random-picker, name: B}]\n\
         schedulingProfiles: [{name: p, plugins: [{pluginRef: A}, {pluginRef: B}]}]\n",
        &[
            "line 2: schedulingProfiles[0].plugins[1].pluginRef: failed to add plugin 'B' to profile \
             'p': failed to set 'B' as picker, already have a registered picker plugin 'A'",
        ],
    );
    check(
        "plugins: [{type: max-score-picker, name: A}, {type: random-picker, name: B}]\n",
        &[
            "schedulingProfiles: failed to add plugin 'B' to profile 'default': failed to set 'B' as \
             picker, already have a registered picker plugin 'A'",
        ],
    );
}

#[test]
fn handlers() {
    check(
        "plugins: [{type: single-profile-handler, name: a}, {type: test-handler, name: b}]\n",
        &["line 1: plugins: multiple profile handlers found ('a', 'b'); only one is allowed"],
    );
    check(
        "schedulingProfiles: [{name: a}, {name: b}]\n",
        &["plugins: no profile handler configured"],
    );
    check(
        "plugins: [{type: single-profile-handler}]\nschedulingProfiles: [{name: a}, {name: b}]\n",
        &["line 2: schedulingProfiles: SingleProfileHandler cannot support multiple scheduling \
             profiles"],
    );
    check(
        "plugins: [{type: queue-scorer, name: single-profile-handler}]\n",
        &["line 1: plugins: the name 'single-profile-handler' is taken by a plugin of type \
             'queue-scorer', and there is no profile handler"],
    );
}

#[test]
fn profiles_that_handlers_need() {
    let handlers = ["pd-profile-handler", "disagg-profile-handler"];
    for handler in handlers {
        let load = |parameters: &str, profile: &str| {
            let text = format!(
                "plugins: [{{type: {handler}, parameters: {{{parameters}}}}}]\n\
                 schedulingProfiles: [{{name: {profile}}}, {{name: prefill}}]\n"
            );
            load_with(&release(), &text).map(|_| ())
        };
        let faults = |parameters, profile| -> Vec<String> {
            let faults = load(parameters, profile).unwrap_err();
            faults.iter().map(ToString::to_string).collect()
        };
        let lacks = |name: &str| {
            format!(
                "line 2: schedulingProfiles: profile handler '{handler}' needs a profile '{name}', and \
                 there is none"
            )
        };
        assert_eq!(load("", "decode"), Ok(()));
        assert_eq!(load("decodeProfile: d", "d"), Ok(()));
        assert_eq!(faults("", "d"), [lacks("decode")]);
        assert_eq!(faults("decodeProfile: decod", "decode"), [lacks("decod")]);
    }
    for (parameters, good) in [("decodeProfile: default", true), ("", false)] {
        let text = format!("plugins: [{{type: pd-profile-handler, parameters: {{{parameters}}}}}]");
        assert_eq!(load_with(&release(), &text).is_ok(), good, "{text}");
    }
}

#[test]
fn producers() {
    check(
        "plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: aprox}},\
         {type: approx-prefix-cache-producer, name: approx}]\n",
        &["line 1: plugins[0]: no default producer found for missing data key: plugin \
             'prefix-cache-scorer' reads prefix matches of 'aprox', and there is no such plugin; did \
             you mean `approx`?"],
    );
    check(
        "plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: q}},\
         {type: queue-scorer, name: q}]\n",
        &["line 1: plugins[0]: plugin 'prefix-cache-scorer' reads prefix matches of plugin 'q' \
             (type: queue-scorer), which has none"],
    );
    check(
        "plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: \
         inflight-load-producer}}]\n",
        &["line 1: plugins[0]: plugin 'prefix-cache-scorer' reads prefix matches of plugin \
             'inflight-load-producer', which has none"],
    );
    check(
        "plugins:\n\
         - {type: test-producer, name: in, parameters: {reads: b}}\n\
         - {type: test-producer, name: a, parameters: {reads: b}}\n\
         - {type: test-producer, name: b, parameters: {reads: a}}\n",
        &["line 1: plugins: data producers wait for each other: b -> a -> b"],
    );
}

#[test]
fn parsers() {
    check(
        "plugins: [{type: max-score-picker, name: p}]\n\
         requestHandler: {parsers: [{pluginRef: p}, {pluginRef: openai-praser}, {}]}\n",
        &[
            "line 2: requestHandler.parsers[0].pluginRef: the plugin \"p\" is not a parser plugin",
            "line 2: requestHandler.parsers[1].pluginRef: plugin type 'openai-praser' not found in \
             registry; did you mean `openai-parser`?",
            "line 2: requestHandler.parsers[2].pluginRef: missing 'pluginRef'",
        ],
    );
    check(
        "requestHandler: {parsers: [{pluginRef: vertexai-parser}]}\n",
        &[
            "line 1: requestHandler.parsers[0].pluginRef: plugin type 'vertexai-parser' is not built \
             yet (a parser is referred to by its type)",
        ],
    );
    check(
        "requestHandler: {parsers: [{pluginRef: queue-scorer}]}\n",
        &[
            "line 1: requestHandler.parsers[0].pluginRef: the plugin \"queue-scorer\" is not a parser \
             plugin",
        ],
    );
}

#[test]
fn saturation() {
    check(
        "flowControl: {saturationDetector: {pluginRef: x}}\n",
        &["line 1: flowControl.saturationDetector.pluginRef: saturation detector references \
             undefined plugin 'x'"],
    );
    check(
        "plugins: [{type: queue-scorer}]\nsaturationDetector: {pluginRef: queue-scorer}\n",
        &["line 2: saturationDetector.pluginRef: plugin 'queue-scorer' is not a \
             fwkfc.SaturationDetector"],
    );
    check(
        "saturationDetector: {pluginRef: utilization-detector, queueDepthThreshold: 5}\n",
        &["line 1: saturationDetector.queueDepthThreshold: unknown field"],
    );
    check(
        "saturationDetector: {queueDepthTreshold: 5}\n",
        &["line 1: saturationDetector.queueDepthTreshold: failed to create plugin \
             'utilization-detector' (type: utilization-detector): unknown field; did you mean \
             `queueDepthThreshold`?"],
    );
    check(
        "plugins: [{type: utilization-detector}]\nsaturationDetector: {queueDepthThreshold: 5}\n",
        &["line 2: saturationDetector: 'utilization-detector' is among the plugins: set it there"],
    );
    check(
        "plugins: [{type: concurrency-detector}]\n\
         flowControl: {saturationDetector: {pluginRef: concurrency-detector}}\n",
        &["line 1: plugins[0].type: plugin type 'concurrency-detector' is not built yet (plugin \
             'concurrency-detector')"],
    );
}

#[test]
fn the_data_layer() {
    check(
        "plugins: [{type: test-filter}, {type: metrics-data-source}]\n\
         dataLayer:\n\
         \x20 sources:\n\
         \x20 - pluginRef: test-filter\n\
         \x20 - pluginRef: metrics-data-sorce\n\
         \x20 - pluginRef: metrics-data-source\n\
         \x20   extractors: [{pluginRef: test-filter}, {pluginRef: other}, test-filter]\n\
         \x20 - extractors: []\n\
         \x20 discovery: {pluginRef: test-filter}\n",
        &[
            "line 4: dataLayer.sources[0].pluginRef: the plugin test-filter is not a \
             fwkdl.DataSource",
            "line 5: dataLayer.sources[1].pluginRef: the plugin metrics-data-sorce is not a \
             fwkdl.DataSource; did you mean `metrics-data-source`?",
            "line 7: dataLayer.sources[2].extractors[0].pluginRef: the plugin test-filter does not \
             read metrics",
            "line 7: dataLayer.sources[2].extractors[1].pluginRef: the plugin other is not \
             registered",
            "line 7: dataLayer.sources[2].extractors[2]: expected a mapping, got the string \
             \"test-filter\"",
            "line 8: dataLayer.sources[3].pluginRef: missing 'pluginRef'",
            "line 9: dataLayer.discovery.pluginRef: discovery: plugin \"test-filter\" does not \
             implement EndpointDiscovery",
        ],
    );
    check(
        "dataLayer: {discovery: {pluginRef: file-discovery}}\n",
        &["line 1: dataLayer.discovery.pluginRef: discovery: no plugin found with name \
             \"file-discovery\""],
    );
}

#[test]
fn flow_control_has_to_be_right_even_if_it_is_off() {
    check(
        "flowControl:\n\
         \x20 maxBytes: -1\n\
         \x20 maxRequests: many\n\
         \x20 defaultRequestTTL: 60\n\
         \x20 noEndpointRequestTTL: 5x\n\
         \x20 enableEviction: maybe\n\
         \x20 priorityBands:\n\
         \x20 - {priority: high, maxBytes: 1GiB}\n",
        &[
            "line 2: flowControl.maxBytes: must be non-negative, got -1",
            "line 3: flowControl.maxRequests: \"many\" is no quantity such as 1Gi, 10k or 500",
            "line 4: flowControl.defaultRequestTTL: expected a duration such as \"60s\", got 60",
            "line 5: flowControl.noEndpointRequestTTL: \"5x\" is no duration such as 50ms or 1m30s: \
             unknown unit",
            "line 6: flowControl.enableEviction: expected true or false, got the string \"maybe\"",
            "line 8: flowControl.priorityBands[0].priority: expected an integer, got the string \
             \"high\"",
            "line 8: flowControl.priorityBands[0].maxBytes: \"1GiB\" is no quantity such as 1Gi, 10k \
             or 500",
        ],
    );
    let gate = "feature gate 'flowControl' is not built yet; leave it out";
    check(
        "plugins: [{type: queue-scorer}, {type: fcfs-ordering-policy, name: fifo}]\n\
         featureGates: [flowControl]\n\
         flowControl:\n\
         \x20 priorityBands:\n\
         \x20 - {orderingPolicyRef: non-existent, fairnessPolicyRef: queue-scorer}\n\
         \x20 - {orderingPolicyRef: fifo, fairnessPolicyRef: global-strict-fairness-policy}\n",
        &[
            &format!("line 2: featureGates[0]: {gate}"),
            "line 5: flowControl.priorityBands[0].orderingPolicyRef: plugin \"non-existent\" not found",
            "line 5: flowControl.priorityBands[0].fairnessPolicyRef: plugin \"queue-scorer\" is no \
             policy of flow control",
        ],
    );
}

#[test]
fn all_faults_come_at_once_in_the_documents_order() {
    check(
        &format!(
            "featureGates: [nope]\nplugins: [{{type: banana}}]\n{PROFILE}dataLayer: {{x: 1}}\n"
        ),
        &[
            "line 1: featureGates[0]: feature gate 'nope' is unknown or unregistered",
            "line 2: plugins[0].type: plugin type 'banana' is not registered",
            "line 4: dataLayer.x: unknown field",
        ],
    );
}
