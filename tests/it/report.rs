//! Reports: the document and its schema, tables, exports, and `loadgen compare`.
//!
//! With `UPDATE_REPORT=1` the sample and its tables are written instead of compared.

mod sample;

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use kv_indexer::loadgen::report::{
    LoadError, Report, Scenario, Summary, compare, csv, guidellm, llmd, text,
};
use serde_json::{Value, json};

use self::sample::sample;
use crate::support::fixture;

/// Compares with a file, or writes it.
#[track_caller]
fn golden(name: &str, text: &str) {
    let path = fixture(&format!("report/{name}"));
    if std::env::var_os("UPDATE_REPORT").is_some() {
        fs::write(&path, text).unwrap();
    }
    let wanted = fs::read_to_string(&path).unwrap();
    assert!(wanted == text, "{name} is not what is made now; UPDATE_REPORT=1 writes it:\n{text}");
}

fn saved(report: &Value) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), report.to_string()).unwrap();
    file
}

#[test]
fn the_sample_is_what_the_fixture_holds_and_comes_back() {
    let report = sample();
    golden("sample.json", &format!("{}\n", serde_json::to_string(&report).unwrap()));
    assert_eq!(Report::load(&fixture("report/sample.json")).unwrap(), report);
}

/// Says the whole chain of causes.
fn told(error: &LoadError) -> String {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

#[test]
fn a_bad_document_is_refused_by_file_place_and_version() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut Value), wanted: &[&str]) {
        let mut document = serde_json::to_value(sample()).unwrap();
        change(&mut document);
        let file = saved(&document);
        let error = told(&Report::load(file.path()).unwrap_err());
        assert!(error.contains(file.path().to_str().unwrap()), "{error}");
        for wanted in wanted {
            assert!(error.contains(wanted), "{wanted:?} is not in {error}");
        }
    }
    check(|of| of["schema"] = json!("kv-indexer.loadgen.report/2"), &["report/2", "report/1"]);
    check(|of| *of = json!([1, 2]), &["schema is \"\""]);
    check(|of| of["scenarios"][3]["requests"] = json!("many"), &["scenarios[3]", "many"]);
    check(
        |of| drop(of["scenarios"][5].as_object_mut().unwrap().remove("ttft_ms")),
        &["scenarios[5]", "ttft_ms"],
    );
    check(|of| of["valid"] = json!(1), &["document", "boolean"]);
    let missing = Report::load(Path::new("/does/not/exist.json")).unwrap_err();
    assert!(told(&missing).contains("/does/not/exist.json"));
    let broken = tempfile::NamedTempFile::new().unwrap();
    fs::write(broken.path(), "{\"schema\": ").unwrap();
    assert!(told(&Report::load(broken.path()).unwrap_err()).contains("not JSON"));
}

#[test]
fn unknown_fields_are_passed_over() {
    let mut document = serde_json::to_value(sample()).unwrap();
    document["later"] = json!(1);
    document["scenarios"][0]["later"] = json!(1);
    assert_eq!(Report::load(saved(&document).path()).unwrap(), sample());
}

/// Follows `$ref`.
fn resolved<'a>(root: &'a Value, mut schema: &'a Value) -> &'a Value {
    while let Some(reference) = schema["$ref"].as_str() {
        schema = root.pointer(reference.trim_start_matches('#')).unwrap();
    }
    schema
}

/// Every object of the document has exactly the properties that its schema lists, all of them required
/// but those that may be null.
fn same_fields(root: &Value, schema: &Value, value: &Value, at: &str, seen: &mut BTreeSet<String>) {
    let mut schema = resolved(root, schema);
    if let Some(choices) = schema["anyOf"].as_array() {
        let some = choices.iter().find(|choice| choice["type"] != "null").unwrap();
        schema = resolved(root, some);
    }
    match value {
        Value::Object(fields) if schema.get("properties").is_some() => {
            let listed: BTreeSet<&String> =
                schema["properties"].as_object().unwrap().keys().collect();
            assert_eq!(fields.keys().collect::<BTreeSet<_>>(), listed, "{at}");
            for (name, value) in fields {
                seen.insert(format!("{at}.{name}"));
                let of = &schema["properties"][name];
                assert!(of["description"].is_string(), "{at}.{name} is not described");
                same_fields(root, of, value, &format!("{at}.{name}"), seen);
            }
        }
        Value::Object(fields) => {
            for value in fields.values() {
                let of = &schema["additionalProperties"];
                same_fields(root, of, value, &format!("{at}{{}}"), seen);
            }
        }
        Value::Array(entries) => {
            for value in entries {
                same_fields(root, &schema["items"], value, &format!("{at}[]"), seen);
            }
        }
        _ => {}
    }
}

fn schema_path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/loadgen-report.schema.json")
}

#[test]
fn the_schema_lists_the_fields_that_are_written() {
    let schema: Value = serde_json::from_slice(&fs::read(schema_path()).unwrap()).unwrap();
    let mut seen = BTreeSet::new();
    same_fields(&schema, &schema, &serde_json::to_value(sample()).unwrap(), "report", &mut seen);
    for path in ["report.scenarios[].storm.drain_ms.p999", "report.comparisons[].quantities{}.lost"]
    {
        assert!(seen.contains(path), "{path} was not reached");
    }
}

/// By Python's `jsonschema`.
#[test]
fn reports_pass_the_schema() {
    const SCRIPT: &str = "
import json, sys
import jsonschema
schema, *documents = (json.load(open(path)) for path in sys.argv[1:])
jsonschema.Draft202012Validator.check_schema(schema)
for document in documents:
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(document))
    print(*(f'{e.json_path}: {e.message}' for e in errors), sep='\\n')
    print(len(errors))
";
    let empty = Report {
        schema: sample().schema,
        scenarios: vec![Scenario::default()],
        summaries: vec![Summary::default()],
        ..Report::default()
    };
    let empty = saved(&serde_json::to_value(empty).unwrap());
    let mut wrong = serde_json::to_value(sample()).unwrap();
    wrong["scenarios"][0]["requests"] = json!(-1);
    wrong["scenarios"][1]["loop"] = json!("ajar");
    wrong["schema"] = json!("other");
    let wrong = saved(&wrong);
    let full = fixture("report/sample.json");
    let mut command = Command::new(crate::openai_client::python());
    command.args(["-c", SCRIPT]).arg(schema_path()).arg(&full).args([empty.path(), wrong.path()]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let counts: Vec<&str> = said.lines().filter(|line| line.parse::<u32>().is_ok()).collect();
    assert_eq!(counts, ["0", "0", "3"], "{said}{}", String::from_utf8_lossy(&output.stderr));
}

fn tables(report: &Report) -> String {
    let mut out = Vec::new();
    text::write(report, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn tables_are_ascii_of_at_most_120_columns() {
    let mut odd = sample();
    odd.warnings.push("ä\u{1b}[31m".to_owned() + &"word ".repeat(60) + &"x".repeat(300));
    odd.scenarios[0].policy = "external:".to_owned() + &"é".repeat(150);
    odd.scenarios[0].resources.insert("c".repeat(200), Default::default());
    odd.scenarios.push(Scenario::default());
    for report in [sample(), odd, Report::default()] {
        let tables = tables(&report);
        for line in tables.lines() {
            assert!(line.len() <= text::WIDTH && line.is_ascii(), "{} in {line}", line.len());
            assert!(!line.contains('\u{1b}'));
        }
    }
}

#[test]
fn tables_say_what_the_report_holds() {
    let tables = tables(&sample());
    golden("sample.txt", &tables);
    for wanted in [
        "no gateway in this run",
        "NOT VALID",
        "http_503 6",
        "LOST",
        "unique-prompts: precise / random ttft_ms.p95 1.20",
        "knee: random",
        "TTFT is from the intended arrival",
        "~",
    ] {
        assert!(tables.contains(wanted), "{wanted:?} is missing in\n{tables}");
    }
}

#[test]
fn a_lost_comparison_is_one_beyond_tolerance_and_interval() {
    #[track_caller]
    fn check(ttfts: &[(f64, f64)], wanted_ratio: f64, lost: bool) {
        let mut report = Report::default();
        for (repeat, (precise, random)) in ttfts.iter().enumerate() {
            for (policy, p50) in [("precise", precise), ("random", random)] {
                let mut of = Scenario {
                    policy: policy.to_owned(),
                    repeat: repeat as u32,
                    ..Scenario::default()
                };
                of.ttft_ms.p50 = Some(*p50);
                report.scenarios.push(of);
            }
        }
        report.compare_policies();
        let [comparison] = report.comparisons.as_slice() else {
            panic!("{:?}", report.comparisons)
        };
        let difference = comparison.quantities["ttft_ms.p50"];
        assert!((difference.ratio - wanted_ratio).abs() < 1e-9, "{difference:?}");
        assert_eq!(difference.lost, lost, "{difference:?}");
        assert_eq!(difference.interval.is_some(), ttfts.len() >= 3);
        if let Some([low, high]) = difference.interval {
            assert!(low <= difference.ratio && difference.ratio <= high, "{difference:?}");
        }
    }
    check(&[(2.0, 1.0), (2.2, 1.0), (1.9, 1.0), (2.1, 1.0), (2.0, 1.0)], 2.0, true);
    check(&[(1.04, 1.0), (1.04, 1.0), (1.04, 1.0)], 1.04, false);
    check(&[(0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], 0.5, false);
    check(&[(0.5, 1.0), (1.1, 1.0), (1.5, 1.0)], 1.1, false);
    check(&[(1.2, 1.0), (1.2, 1.0)], 1.2, true);
    check(&[(3.0, 3.0)], 1.0, false);
}

#[test]
fn summaries_are_medians_with_their_range() {
    let report = sample();
    let steady =
        report.summaries.iter().find(|of| of.name == "steady" && of.policy == "precise").unwrap();
    assert_eq!(steady.repeats, 2);
    let spread = steady.quantities["ttft_ms.p50"];
    assert!((spread.median - 24.0 * 1.01 * 1.01).abs() < 1e-9, "{spread:?}");
    assert!(spread.min < spread.median && spread.median < spread.max && spread.cv.is_some());
    assert!(steady.quantities.contains_key("resources.epp.cpu_ms_per_request"));
    let random = report.summaries.iter().find(|of| of.policy == "random").unwrap();
    assert!(!random.quantities.contains_key("freshness_us.p99"));
}

/// What `compare` says of the sample and of a changed one, with a limit of 5 %.
fn compared(change: impl FnOnce(&mut Report)) -> (bool, String) {
    let before = sample();
    let mut after = before.clone();
    change(&mut after);
    after.summarise();
    let mut out = Vec::new();
    let failed = compare::write(&before, &after, Some(0.05), &mut out).unwrap();
    (failed, String::from_utf8(out).unwrap())
}

/// Every repeat of precise routing in the steady scenario.
fn precise(report: &mut Report) -> impl Iterator<Item = &mut Scenario> {
    report.scenarios.iter_mut().filter(|of| of.name == "steady" && of.policy == "precise")
}

#[test]
fn only_what_became_worse_beyond_limit_and_noise_fails() {
    #[track_caller]
    fn check(change: impl FnOnce(&mut Report), wanted: Option<&str>) {
        let (failed, said) = compared(change);
        assert_eq!(failed, wanted.is_some(), "{said}");
        assert!(said.lines().all(|line| line.len() <= text::WIDTH), "{said}");
        if let Some(wanted) = wanted {
            let failures: Vec<&str> =
                said.lines().filter_map(|line| line.trim().strip_prefix("FAILED ")).collect();
            assert_eq!(failures, [wanted], "{said}");
        }
    }
    let scaled = |factor: f64| {
        move |report: &mut Report| {
            for of in precise(report) {
                of.ttft_ms.p95 = of.ttft_ms.p95.map(|p95| p95 * factor);
            }
        }
    };
    check(|_| {}, None);
    check(scaled(1.10), Some("steady / precise: ttft_ms.p95"));
    check(scaled(1.04), None);
    check(scaled(0.5), None);
    // Twice as slow once, but repeats differ as much.
    check(
        |report| {
            let p95 = &mut precise(report).last().unwrap().ttft_ms.p95;
            *p95 = p95.map(|p95| p95 * 2.0);
        },
        None,
    );
    check(
        |report| precise(report).for_each(|of| of.throughput_rps *= 0.8),
        Some("steady / precise: throughput_rps"),
    );
    check(|report| precise(report).for_each(|of| of.throughput_rps *= 2.0), None);
    check(
        |report| precise(report).for_each(|of| of.errors = 5),
        Some("steady / precise: errors_share"),
    );
    check(
        |report| {
            for of in precise(report) {
                of.resources.get_mut("epp").unwrap().rss_peak_bytes *= 2;
            }
        },
        Some("steady / precise: resources.epp.rss_peak_bytes"),
    );
    check(
        |report| report.scenarios.retain(|of| of.name != "steady" || of.policy != "precise"),
        Some("steady / precise: vanished"),
    );
}

#[test]
fn compare_points_out_invalid_reports_and_other_machines() {
    let (failed, said) = compared(|report| {
        report.environment.cpu = "Xeon".to_owned();
        report.valid = true;
    });
    assert!(!failed);
    assert!(said.contains("the report of before is not valid"), "{said}");
    assert!(!said.contains("the report of after is not valid"), "{said}");
    assert!(said.contains("not the same machine: CPU was"), "{said}");
}

#[test]
fn compare_as_a_program_ends_with_0_1_or_2() {
    #[track_caller]
    fn check(arguments: &[&str], code: i32, wanted: &str) {
        let output = Command::new(env!("CARGO_BIN_EXE_loadgen"))
            .arg("compare")
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(wanted), "{said}");
    }
    let before = fixture("report/sample.json");
    let before = before.to_str().unwrap();
    let mut slow = sample();
    precise(&mut slow).for_each(|of| of.throughput_rps /= 2.0);
    slow.summarise();
    let slow = saved(&serde_json::to_value(slow).unwrap());
    let slow = slow.path().to_str().unwrap();
    check(&[before, before, "--fail-over", "5%"], 0, "0 worse");
    check(&[before, slow, "--fail-over", "5%"], 2, "FAILED steady / precise: throughput_rps");
    check(&[before, slow], 0, "no limit was given");
    check(&[before, slow, "--fail-over", "0.6"], 0, "0 worse");
    check(&[before, "/does/not/exist.json"], 1, "/does/not/exist.json");
    check(&[before, slow, "--fail-over", "5"], 64, "write 5% for a percentage");
}

#[test]
fn csv_has_a_line_for_each_scenario() {
    let report = sample();
    let mut out = Vec::new();
    csv::write(&report, &mut out).unwrap();
    let text = String::from_utf8(out).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), report.scenarios.len() + 1);
    let fields = lines[0].split(',').count();
    assert!(lines.iter().all(|line| line.split(',').count() == fields));
    assert!(lines[0].contains("ttft_ms.p95") && lines[0].contains("resources.epp.rss_peak_bytes"));
}

#[test]
fn llmd_documents_keep_to_benchmark_report_0_2_1() {
    /// Groups of units that one field may have.
    const UNITS: [(&str, &[&str]); 12] = [
        ("input_length", &["count"]),
        ("output_length", &["count"]),
        ("time_to_first_token", &["ms", "s"]),
        ("request_latency", &["ms", "s"]),
        ("time_per_output_token", &["ms/token", "s/token"]),
        ("inter_token_latency", &["ms/token", "s/token"]),
        ("request_rate", &["queries/s"]),
        ("input_token_rate", &["tokens/s"]),
        ("output_token_rate", &["tokens/s"]),
        ("total_token_rate", &["tokens/s"]),
        ("cpu_utilization", &["percent", "fraction"]),
        ("cpu_memory_usage", &["bytes", "MB", "GB", "TB", "MiB", "GiB", "TiB"]),
    ];
    /// What a statistic may hold, besides the obligatory units and mean.
    const STATISTICS: [&str; 17] = [
        "units", "mean", "mode", "stddev", "min", "p0p1", "p1", "p5", "p10", "p25", "p50", "p75",
        "p90", "p95", "p99", "p99p9", "max",
    ];
    #[track_caller]
    fn keys(value: &Value, allowed: &[&str], required: &[&str]) {
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert!(keys.iter().all(|key| allowed.contains(key)), "{keys:?}");
        assert!(required.iter().all(|key| keys.contains(key)), "{keys:?}");
    }
    #[track_caller]
    fn units(part: &Value) {
        for (name, of) in part.as_object().unwrap() {
            let Some((_, units)) = UNITS.iter().find(|(known, _)| known == name) else {
                assert!(of.is_u64(), "{name}: {of}");
                continue;
            };
            assert!(units.contains(&of["units"].as_str().unwrap()), "{name}: {of}");
            if of.get("series").is_none() {
                keys(of, &STATISTICS, &["units", "mean"]);
            }
        }
    }
    let mut report = sample();
    report.scenarios.push(Scenario::default());
    let documents = llmd::documents(&report);
    assert_eq!(documents.len(), report.scenarios.len());
    let uids: BTreeSet<&str> =
        documents.iter().map(|of| of["run"]["uid"].as_str().unwrap()).collect();
    assert_eq!(uids.len(), documents.len());
    for of in &documents {
        keys(of, &["version", "run", "scenario", "results"], &["version", "run", "results"]);
        assert_eq!(of["version"], "0.2.1");
        let load = &of["scenario"]["load"];
        keys(
            load,
            &["metadata", "standardized", "native"],
            &["metadata", "standardized", "native"],
        );
        let standardized = &load["standardized"];
        let allowed = [
            "tool",
            "tool_version",
            "source",
            "stage",
            "input_seq_len",
            "output_seq_len",
            "rate_qps",
            "concurrency",
        ];
        keys(standardized, &allowed, &["tool", "tool_version", "source", "input_seq_len"]);
        assert!(standardized["rate_qps"].as_f64().is_none_or(|rate| rate > 0.0));
        assert!(standardized["concurrency"].as_f64().is_none_or(|places| places >= 1.0));
        for component in of["scenario"]["stack"].as_array().unwrap() {
            let all = ["metadata", "standardized", "native"];
            keys(component, &all, &all);
            keys(&component["metadata"], &["label", "cfg_id"], &["label", "cfg_id"]);
            let all = ["kind", "tool", "tool_version"];
            keys(&component["standardized"], &all, &all);
        }
        let performance = &of["results"]["request_performance"];
        for part in ["requests", "latency", "throughput"] {
            units(&performance["aggregate"][part]);
        }
        for part in ["latency", "throughput"] {
            units(&performance["time_series"][part]);
        }
        for component in of["results"]["observability"]["components"].as_array().unwrap() {
            keys(component, &["component_label", "aggregate"], &["component_label", "aggregate"]);
            units(&component["aggregate"]);
        }
    }
    let last = report.scenarios.iter().position(|of| of.policy == "precise").unwrap();
    let observability = &documents[last]["results"]["observability"];
    let labels: Vec<&Value> = observability["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|component| &component["component_label"])
        .collect();
    assert!(labels.contains(&&json!("epp-0")), "{labels:?}");
    assert!(observability["metadata"]["freshness_us"]["p99"].is_f64());
    assert!(observability["metadata"]["hits"]["predicted_tokens"].is_u64());
    let picks = &observability["epp_dispatch_latency"]["statistics"];
    assert_eq!((picks["units"].as_str(), picks["p50"].as_f64()), (Some("seconds"), Some(0.000_35)));
    let pods = observability["epp_request_distribution"]["components"].as_array().unwrap();
    assert_eq!(pods.len(), 4);
    let rate = &observability["vllm_prefix_cache_hit_rate"]["components"][0]["statistics"]["mean"];
    assert!((rate.as_f64().unwrap() - 91.0).abs() < 0.1, "{rate}");
}

#[test]
fn guidellm_documents_hold_what_its_readers_want() {
    let report = sample();
    let document = guidellm::document(&report);
    assert_eq!(document["metadata"]["version"], 2);
    let benchmarks = document["benchmarks"].as_array().unwrap();
    assert_eq!(benchmarks.len(), report.scenarios.len());
    for (benchmark, of) in benchmarks.iter().zip(&report.scenarios) {
        let metrics = &benchmark["metrics"];
        assert_eq!(metrics["request_totals"]["total"], of.requests);
        assert_eq!(metrics["request_totals"]["errored"], of.errors);
        // From the send, and seconds where all else is milliseconds.
        let ttft = &metrics["time_to_first_token_ms"]["successful"];
        assert_eq!(ttft["percentiles"]["p95"].as_f64(), of.ttft_from_send_ms.p95);
        let latency = metrics["request_latency"]["successful"]["mean"].as_f64().unwrap();
        assert!((latency * 1e3 - of.latency_ms.mean.unwrap()).abs() < 1e-6);
        let percentiles = ttft["percentiles"].as_object().unwrap();
        let order = ["p001", "p01", "p05", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "p999"];
        let values: Vec<f64> =
            order.iter().map(|name| percentiles[*name].as_f64().unwrap()).collect();
        assert!(values.is_sorted() && percentiles.len() == order.len(), "{values:?}");
        let closed = benchmark["config"]["strategy"]["type_"] == "concurrent";
        assert_eq!(closed, of.in_flight.asked.is_some());
    }
}
