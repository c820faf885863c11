//! `loadgen`'s scenarios from the command line to the report: processes of its own, real sockets.
//!
//! What a machine makes of the load is not judged here: reports are looked at for what has to be true at
//! any speed.

mod bad;

use std::{
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

/// A run of `loadgen` that has ended.
pub(crate) struct Run {
    output: Output,
    folder: TempDir,
}

impl Run {
    /// Runs it with `--json` and `--quiet`.
    #[track_caller]
    fn of(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(&folder, arguments);
        Self { output: command.output().unwrap(), folder }
    }

    /// Its report; panics with all that it said if it did not end well.
    #[track_caller]
    fn report(&self) -> Value {
        assert!(self.output.status.success(), "{}", self.said());
        self.written()
    }

    /// The report, however it ended.
    #[track_caller]
    fn written(&self) -> Value {
        let text = std::fs::read_to_string(self.folder.path().join("report.json"));
        let text = text.unwrap_or_else(|error| panic!("no report: {error}\n{}", self.said()));
        serde_json::from_str(&text).unwrap()
    }

    fn out(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    fn said(&self) -> String {
        format!("{}\n{}", self.out(), String::from_utf8_lossy(&self.output.stderr))
    }
}

fn command(folder: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadgen"));
    command
        .args(arguments)
        .arg("--json")
        .arg(folder.path().join("report.json"))
        .arg("--quiet")
        .stdin(Stdio::null());
    command
}

/// A small fleet and a workload that fits it.
const SMALL: [&str; 6] = [
    "--engines=2",
    "--speed=50",
    "--workload=shared-prefix:groups=6,prompts=3,system=320,question=64,output=8",
    "--duration=2s",
    "--probes=20",
    "--seed=7",
];

/// These arguments, and those of [`SMALL`] that they do not give.
fn with<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let name = |argument: &str| argument.split('=').next().map(str::to_owned);
    let given: Vec<_> = arguments.iter().map(|argument| name(argument)).collect();
    let missing = SMALL.iter().filter(|argument| !given.contains(&name(argument)));
    arguments.iter().chain(missing).copied().collect()
}

#[track_caller]
fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).unwrap_or_else(|| panic!("no {path} in {value:#}"));
    found.as_f64().unwrap_or_else(|| panic!("{path} is {found}"))
}

#[track_caller]
fn scenarios(report: &Value) -> &Vec<Value> {
    report["scenarios"].as_array().unwrap()
}

/// The fields that consumers rely on.
#[track_caller]
fn check_fields(scenario: &Value) {
    for path in
        ["/requests", "/errors", "/throughput_rps", "/ttft_ms/p50", "/ttft_ms/p95", "/ttft_ms/p99"]
    {
        number(scenario, path);
    }
    for name in ["loadgen", "epp", "engines"] {
        assert!(number(scenario, &format!("/resources/{name}/cpu_ms_per_request")) >= 0.0);
        assert!(number(scenario, &format!("/resources/{name}/rss_peak_bytes")) > 1e6);
    }
    assert_eq!(scenario["errors"], 0, "{scenario:#}");
}

#[test]
fn steady_one_after_another_with_precise_routing() {
    let run = Run::of(&with(&["steady"]));
    let report = run.report();
    let [scenario] = scenarios(&report).as_slice() else { panic!("{report:#}") };
    check_fields(scenario);
    assert_eq!((&scenario["name"], &scenario["policy"]), (&"steady".into(), &"precise".into()));
    assert_eq!(scenario["loop"], "closed");
    assert!(number(scenario, "/requests") >= 20.0);
    assert!(number(scenario, "/resources/indexer/rss_peak_bytes") > 1e6);
    for quantile in ["p50", "p95", "p99", "max"] {
        assert!(number(scenario, &format!("/freshness_us/{quantile}")) > 0.0);
    }
    assert_eq!(scenario["freshness_us"]["lost"], 0);
    // Everything was sent once before, and nothing had to go.
    let (predicted, actual) =
        (number(scenario, "/hits/predicted_tokens"), number(scenario, "/hits/actual_tokens"));
    assert!(actual > 0.9 * number(scenario, "/hits/prompt_tokens") * 320.0 / 384.0, "{scenario:#}");
    assert!((predicted - actual).abs() <= 0.01 * actual, "{predicted} {actual}");
    assert!(number(scenario, "/hits/mean_abs_error_tokens") <= 16.0);
    assert!(run.out().contains("no gateway in this run"), "{}", run.out());
}

#[test]
fn throughput_prints_what_was_in_flight_beside_what_was_asked() {
    let run = Run::of(&with(&["throughput", "--concurrency=1,6", "--policies=random,round-robin"]));
    let report = run.report();
    let all = scenarios(&report);
    assert_eq!(all.len(), 4);
    for scenario in all {
        check_fields(scenario);
        let asked = number(scenario, "/in_flight/asked");
        assert_eq!(asked, number(scenario, "/level"));
        assert!(number(scenario, "/in_flight/max") <= asked, "{scenario:#}");
        assert!(number(scenario, "/in_flight/mean") > 0.5 * asked, "{scenario:#}");
        // Nobody promised anything, and hits are still known.
        assert_eq!(scenario["hits"]["predicted_tokens"], Value::Null);
        assert!(number(scenario, "/hits/actual_tokens") > 0.0);
    }
    let even = all.iter().filter(|scenario| scenario["policy"] == "round-robin");
    for scenario in even {
        assert!(number(scenario, "/imbalance") < 1.1, "{scenario:#}");
    }
}

#[test]
fn sweep_has_bursts_of_requests_and_of_events() {
    let run = Run::of(&with(&[
        "sweep",
        "--base-rate=30",
        "--burst-size=20",
        "--burst-interval=1s",
        "--event-burst=4000",
        "--event-rate=2000",
    ]));
    let report = run.report();
    let [scenario] = scenarios(&report).as_slice() else { panic!("{report:#}") };
    check_fields(scenario);
    assert_eq!(scenario["loop"], "open");
    assert!(number(scenario, "/bursts/count") >= 1.0);
    assert_eq!(number(scenario, "/bursts/size"), 20.0);
    let storm = &scenario["storm"];
    assert!(number(storm, "/bursts") >= 1.0, "{storm:#}");
    assert!(number(storm, "/blocks") >= 4000.0);
    assert_eq!((&storm["lost_batches"], &storm["wrong_pods"]), (&0.into(), &Value::Array(vec![])));
    assert!(number(storm, "/drain_ms/p50") > 0.0);
    assert!(
        scenario["timeline"].as_array().unwrap().iter().any(|moment| moment["event_burst"] == true)
    );
    assert!(scenario["timeline"].as_array().unwrap().iter().any(|moment| moment["burst"] == true));
}

/// Every policy, twice, in one run: each starts from nothing, and the same requests are sent.
#[test]
fn policies_side_by_side() {
    let run = Run::of(&with(&[
        "steady",
        "--rate=40",
        "--policies=all,constant",
        "--repeats=2",
        "--slo=ttft=10s",
        "--html=/dev/null",
    ]));
    let report = run.report();
    let all = scenarios(&report);
    assert_eq!(all.len(), 12);
    let sent: std::collections::BTreeSet<_> =
        all.iter().map(|it| (it["repeat"].to_string(), it["requests"].to_string())).collect();
    assert_eq!(sent.len(), 2, "the same requests in every arm of a repeat: {sent:?}");
    for scenario in all {
        check_fields(scenario);
        assert_eq!(number(scenario, "/goodput/share"), 1.0);
    }
    let against: std::collections::BTreeSet<_> = report["comparisons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["against"].as_str().unwrap().to_owned())
        .collect();
    assert!(against.contains("random") && against.contains("least-load"), "{against:?}");
}

#[test]
fn with_envoy_in_front_the_gateway_is_in_the_report() {
    let envoy = crate::epp::rig::envoy_binary();
    let flag = format!("--envoy={}", envoy.display());
    let run = Run::of(&with(&["steady", "--rate=30", &flag]));
    let report = run.report();
    let [scenario] = scenarios(&report).as_slice() else { panic!("{report:#}") };
    check_fields(scenario);
    assert!(number(scenario, "/resources/gateway/cpu_s") > 0.0);
    assert!(number(scenario, "/hits/actual_tokens") > 0.0);
    assert!(number(scenario, "/hits/predicted_tokens") > 0.0, "{:#}", scenario["hits"]);
    assert!(!run.out().contains("no gateway in this run"));
}

/// A trace that the generator made, sent five times as fast.
#[test]
fn traces_are_generated_and_sent() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("made.jsonl");
    let made = Command::new(env!("CARGO_BIN_EXE_loadgen"))
        .args([
            "trace",
            "generate",
            "--arrivals=poisson:10",
            "--duration=6s",
            "--prompt-tokens=uniform(600,3000)",
            "--output-tokens=8",
            "--seed=3",
        ])
        .arg("--output")
        .arg(&file)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let requests = std::fs::read_to_string(&file).unwrap().lines().count();
    let file = file.to_str().unwrap();
    let run = Run::of(&[
        "trace",
        "run",
        file,
        "--time-scale=0.2",
        "--engines=2",
        "--blocks=20000",
        "--speed=1000",
    ]);
    let report = run.report();
    let [scenario] = scenarios(&report).as_slice() else { panic!("{report:#}") };
    assert_eq!(
        (&scenario["name"], number(scenario, "/requests")),
        (&"trace".into(), requests as f64)
    );
    assert!(number(scenario, "/hits/ideal_hit_ratio") > 0.0);
}

/// Ctrl-C: what was measured is written.
#[test]
fn an_interrupted_run_reports_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(&folder, &with(&["steady", "--rate=50", "--duration=60s"]));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Long enough for a start, and for some requests on any machine.
    std::thread::sleep(Duration::from_secs(6));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    crate::support::eventually("it ends", || {
        child.try_wait().unwrap().map(drop).ok_or_else(|| "it runs".to_owned())
    });
    let run = Run { output: child.wait_with_output().unwrap(), folder };
    let report = run.written();
    assert_eq!(report["interrupted"], true);
    let [scenario] = scenarios(&report).as_slice() else { panic!("{report:#}") };
    assert!(number(scenario, "/requests") > 10.0, "{scenario:#}");
    assert!(number(scenario, "/ttft_ms/p50") > 0.0);
}

/// `loadgen` has to find its way to `PATH`'s Envoy, and says so if there is none.
#[test]
fn an_envoy_that_is_not_there_is_named() {
    let run = Run::of(&with(&["steady", "--envoy=/nowhere/envoy"]));
    assert!(!run.output.status.success());
    assert!(run.said().contains("/nowhere/envoy"), "{}", run.said());
}
