//! Configurations that others ship: each loads, or is refused with the names of what is missing.

use std::{collections::BTreeSet, fs, path::PathBuf};

use kv_indexer::epp::config::Loaded;

use super::{fakes::release, load_flagged};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/epp-config")
}

/// What becomes of one.
enum Becomes {
    /// It loads with so many warnings, those of plugins about their parameters not counted.
    Loads(usize),
    /// It needs these types of a later release, and nothing else is wrong with it.
    Needs(&'static [&'static str]),
    /// It needs flow control and these types of a later release.
    NeedsFlowControlAnd(&'static [&'static str]),
    /// It is refused in these words.
    Says(&'static str),
}
use Becomes::{Loads, Needs, NeedsFlowControlAnd, Says};

const EXAMPLES: [(&str, Becomes); 36] = [
    // apiVersion, kv-cache-scorer.
    ("old-precise-prefix-cache", Loads(2)),
    // apiVersion, prefill-header-handler, pd-profile-handler.
    ("old-sim-pd", Loads(3)),
    // apiVersion, dataLayer, saturationDetector.
    ("old-gie-v1.2", Loads(3)),
    // apiVersion, data, parser.
    ("old-gie-v1.4", Loads(3)),
    ("epp", Loads(0)),
    ("pd", Loads(0)),
    ("dp", Needs(&["data-parallel-profile-handler"])),
    ("precise-prefix-cache", Needs(&["endpoint-notification-source"])),
    ("sim-kvcache", Loads(0)),
    ("sim-e-p-d", Needs(&["always-disagg-multimodal-decider"])),
    ("sim-e-pd", Needs(&["always-disagg-multimodal-decider"])),
    ("sim-no-hit-lru", Loads(0)),
    ("sim-tokenizer-vllm-http", Loads(0)),
    ("sim-program-aware", NeedsFlowControlAnd(&["program-aware-fairness"])),
    (
        "sim-gpu",
        Needs(&[
            "dcgm-data-source",
            "dcgm-extractor",
            "endpoint-attribute-filter",
            "endpoint-attribute-scorer",
        ]),
    ),
    ("probabilistic-admitter", Needs(&["probabilistic-admitter"])),
    ("soft-reflective-ceiling", NeedsFlowControlAnd(&["soft-reflective-ceiling-policy"])),
    ("burst-prefix-cache", Needs(&["burst-prefix-cache-producer"])),
    (
        "mm-embeddings-cache",
        Needs(&[
            "endpoint-notification-source",
            "mm-embeddings-cache-producer",
            "mm-embeddings-cache-scorer",
        ]),
    ),
    ("estimate-prefix-cache", Loads(0)),
    (
        "pd-topology",
        Needs(&["topology-extractor", "topology-affinity-filter", "topology-affinity-scorer"]),
    ),
    ("it-default", Loads(1)),
    ("it-datalayer", Says("plugin type 'mock-metrics-source' is not registered")),
    ("it-request-attribute-reporter", Needs(&["request-attribute-reporter"])),
    ("perf-optimized-baseline", Loads(0)),
    ("perf-precise-prefix", Needs(&["endpoint-notification-source"])),
    ("perf-random-passthrough", Loads(0)),
    ("known-tiered-prefix-cache", Loads(0)),
    // disagg-headers-handler.
    ("known-pd-disaggregation", Loads(1)),
    // prefill-header-handler, pd-profile-handler.
    ("known-dp-aware", Loads(2)),
    (
        "known-flow-control",
        NeedsFlowControlAnd(&["round-robin-fairness-policy", "concurrency-detector"]),
    ),
    (
        "known-predicted-latency",
        Needs(&[
            "predicted-latency-producer",
            "prefix-cache-affinity-filter",
            "latency-scorer",
            "slo-headroom-tier-filter",
            "latency-slo-admitter",
        ]),
    ),
    ("known-payload-agnostic", Needs(&["session-affinity-scorer"])),
    ("known-decode-only", Loads(0)),
    // prefill-header-handler, pd-profile-handler.
    ("known-deprecated-pd", Loads(2)),
    ("standalone", Loads(0)),
];

/// Loads a file; what is wrong in words without path and line.
fn load_file(name: &str) -> Result<Loaded, Vec<String>> {
    let path = folder().join(format!("{name}.yaml"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
    // Tests run beside each other: any port will do.
    let text = text.replace("tcp://0.0.0.0:5557", "tcp://127.0.0.1:*");
    load_flagged(&release(), &text, false, &[])
        .map_err(|faults| faults.into_iter().map(|fault| fault.message).collect())
}

#[track_caller]
fn check(name: &str, want: &Becomes) {
    const FLOW_CONTROL: &str = "feature gate 'flowControl' is not built yet; leave it out";
    let found = load_file(name);
    let not_built = |types: &[&str]| -> BTreeSet<String> {
        types.iter().map(|name| format!("plugin type '{name}' is not built yet")).collect()
    };
    let faults: BTreeSet<String> = match &found {
        Ok(loaded) => {
            let of_plugins = |warning: &&String| warning.contains("].parameters");
            let count = loaded.warnings.iter().filter(|warning| !of_plugins(warning)).count();
            assert!(matches!(want, Loads(want) if *want == count), "{name}: {loaded:#?}");
            return;
        }
        // The plugin that is named after the type may have any name.
        Err(faults) => faults
            .iter()
            .map(|text| text.split(" (plugin ").next().unwrap_or_default().to_owned())
            .collect(),
    };
    let expected = match want {
        Loads(_) => BTreeSet::new(),
        Needs(types) => not_built(types),
        NeedsFlowControlAnd(types) => {
            not_built(types).into_iter().chain([FLOW_CONTROL.to_owned()]).collect()
        }
        Says(text) => BTreeSet::from([(*text).to_owned()]),
    };
    assert_eq!(faults, expected, "{name}");
}

#[test]
fn each_loads_or_names_what_is_missing() {
    for (name, want) in &EXAMPLES {
        check(name, want);
    }
}

#[test]
fn the_table_lists_every_file() {
    let files: BTreeSet<String> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    let listed = EXAMPLES.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(files, listed);
}

#[test]
fn the_old_ones_are_what_they_were() {
    let loaded = load_file("old-precise-prefix-cache").unwrap();
    let profile = &loaded.profiles[0];
    let scorers: Vec<(&str, f64)> =
        profile.scorers.iter().map(|(scorer, weight)| (&*scorer.name, *weight)).collect();
    assert_eq!(
        scorers,
        [("precise-prefix-cache-scorer", 2.0), ("kv-cache-scorer", 1.0), ("queue-scorer", 1.0)]
    );
    assert_eq!(&*profile.filters[0].name, "decode-filter");

    let loaded = load_file("old-sim-pd").unwrap();
    let names: Vec<&str> = loaded.profiles.iter().map(|profile| &*profile.name).collect();
    assert_eq!(names, ["prefill", "decode"]);
    assert_eq!(&*loaded.handler.name, "pd-profile-handler");
    // Named by no profile, and heard all the same.
    assert!(loaded.pre_requests.iter().any(|it| &*it.name == "prefill-header-handler"));

    let loaded = load_file("known-tiered-prefix-cache").unwrap();
    let names: Vec<&str> = loaded.producers.iter().map(|it| &*it.name).collect();
    assert_eq!(names, ["cpu-prefix-cache-producer", "approx-prefix-cache-producer"]);

    let loaded = load_file("known-dp-aware").unwrap();
    assert!(loaded.producers.iter().any(|it| &*it.name == "inflight-load-producer"));

    let loaded = load_file("standalone").unwrap();
    assert_eq!(loaded.discovery.as_ref().map(|it| &*it.name), Some("file-discovery"));
}
