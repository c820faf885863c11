//! A report as a run of some minutes could have made it, from a few numbers by policy.

use std::collections::BTreeMap;

use kv_indexer::loadgen::report::{
    Bursts, Environment, Freshness, Goodput, Hits, InFlight, LoopKind, Moment, Percentiles,
    PodShare, Report, Resources, SCHEMA, Scenario, Storm,
};
use serde_json::json;

/// Policies: name, factor of waiting, share of hits.
const POLICIES: [(&str, f64, f64); 5] = [
    ("random", 30.0, 0.31),
    ("round-robin", 28.0, 0.30),
    ("least-load", 26.0, 0.29),
    ("approximate", 3.0, 0.78),
    ("precise", 1.0, 0.91),
];
/// Scenarios: name, levels.
const SCENARIOS: [(&str, &[f64]); 3] =
    [("steady", &[]), ("throughput", &[1.0, 8.0, 32.0]), ("sweep", &[])];
const REPEATS: u32 = 2;

/// Builds the whole report.
pub(crate) fn sample() -> Report {
    let mut scenarios = Vec::new();
    for repeat in 0..REPEATS {
        for (name, levels) in SCENARIOS {
            let asked: Vec<Option<f64>> = if levels.is_empty() {
                vec![None]
            } else {
                levels.iter().copied().map(Some).collect()
            };
            for level in asked {
                for policy in POLICIES {
                    scenarios.push(scenario(name, level, policy, repeat));
                }
            }
        }
    }
    // A workload on which precise routing has nothing to gain.
    for repeat in 0..REPEATS {
        for (policy, waiting) in [("random", 1.0), ("precise", 1.2)] {
            scenarios.push(scenario("unique-prompts", None, (policy, waiting, 0.0), repeat));
        }
    }
    let mut report = Report {
        schema: SCHEMA.to_owned(),
        valid: false,
        warnings: vec!["load average was 1.4 on 2 cores before the run".to_owned()],
        started_unix_ns: 1_790_000_000_000_000_000,
        duration_s: 412.5,
        interrupted: false,
        environment: Environment {
            version: "0.1.0".to_owned(),
            git_sha: Some("0123456789abcdef0123456789abcdef01234567".to_owned()),
            kernel: "Linux 6.12.0".to_owned(),
            cpu: "AMD EPYC 9B14".to_owned(),
            cores: 2.0,
            load_before: 1.4,
            load_after: 2.1,
            memory_bytes: 8 << 30,
            cgroup: BTreeMap::from([("cpu.max".to_owned(), "200000 100000".to_owned())]),
        },
        config: json!({ "args": ["loadgen", "--json", "report.json"], "seed": 7 }),
        scenarios,
        summaries: Vec::new(),
        comparisons: Vec::new(),
    };
    report.summarise();
    report.compare_policies();
    report
}

/// A distribution around `p50` with a long tail.
fn percentiles(p50: f64, n: u64) -> Percentiles {
    let mut doubtful = Vec::new();
    for (name, wanted) in [("p95", 200), ("p99", 1_000), ("p999", 10_000)] {
        if n < wanted {
            doubtful.push(name.to_owned());
        }
    }
    Percentiles {
        n,
        mean: Some(p50 * 1.2),
        stddev: Some(p50 * 0.5),
        min: Some(p50 * 0.5),
        p50: Some(p50),
        p90: Some(p50 * 1.8),
        p95: Some(p50 * 2.5),
        p99: Some(p50 * 4.0),
        p999: Some(p50 * 6.0),
        max: Some(p50 * 8.0),
        doubtful,
    }
}

fn scenario(
    name: &str,
    level: Option<f64>,
    (policy, waiting, hits): (&str, f64, f64),
    repeat: u32,
) -> Scenario {
    let drift = 1.0 + f64::from(repeat) * 0.02;
    let closed = name == "throughput" || name == "steady";
    let places = level.unwrap_or(if closed { 1.0 } else { 20.0 });
    let requests = 400 + 100 * places as u64;
    let errors = if policy == "random" && name == "sweep" { 6 } else { 0 };
    let incomplete = if policy == "random" && name == "sweep" { 3 } else { 0 };
    let ttft = 24.0 * waiting * drift * places.sqrt();
    let rate = places * 1_000.0 / (ttft + 180.0);
    let precise = policy == "precise";
    let is_sweep = name == "sweep";
    Scenario {
        name: name.to_owned(),
        policy: policy.to_owned(),
        repeat,
        level,
        pacing: if closed { LoopKind::Closed } else { LoopKind::Open },
        workload: "shared-prefix:groups=150,prompts=5,system=600,question=120,output=100"
            .to_owned(),
        seed: 7 + u64::from(repeat),
        valid: !(is_sweep && policy == "random"),
        warnings: if is_sweep && policy == "random" {
            vec!["sent 97.1% of the asked rate".to_owned()]
        } else {
            Vec::new()
        },
        duration_s: requests as f64 / rate,
        requests,
        errors,
        errors_by_label: (errors > 0)
            .then(|| ("http_503".to_owned(), errors))
            .into_iter()
            .collect(),
        incomplete,
        asked_rps: (!closed).then_some(20.0),
        sent_rps: rate,
        throughput_rps: rate,
        output_tokens_per_s: rate * 100.0,
        prompt_tokens_per_s: rate * 720.0,
        in_flight: InFlight {
            asked: closed.then_some(places as u64),
            mean: places * 0.98,
            p95: places,
            max: places as u64,
        },
        ttft_ms: percentiles(ttft * 1.01, requests),
        ttft_from_send_ms: percentiles(ttft, requests),
        dispatch_delay_ms: percentiles(0.08, requests),
        pick_ms: Some(percentiles(0.35, requests)),
        itl_ms: percentiles(11.4, requests * 99),
        tpot_ms: percentiles(11.9, requests),
        latency_ms: percentiles(ttft + 1_150.0, requests),
        goodput: Some(Goodput {
            objectives: "ttft=200ms".to_owned(),
            met: requests - 40,
            share: (requests - 40) as f64 / requests as f64,
            interval: [0.88, 0.96],
            rps: rate * 0.92,
        }),
        dispersion: BTreeMap::from([("0.1".to_owned(), 1.05), ("1".to_owned(), 2.4)]),
        bursts: is_sweep.then(|| Bursts {
            count: 6,
            size: 50,
            release_ms: percentiles(0.1, 6),
            ttft_ms: percentiles(ttft * 3.0, 300),
            recovery_s: percentiles(0.02 * ttft.sqrt(), 6),
        }),
        freshness_us: precise.then(freshness),
        storm: (is_sweep && precise).then(|| Storm {
            options: "publishers=4,rate=20000,burst=50000,interval=5s".to_owned(),
            publishers: 4,
            batches: 6_000,
            blocks: 300_000,
            bursts: 6,
            undrained: 0,
            blocks_per_s: 21_400.0,
            backlog_max_batches: 812,
            backlog_max_ms: 61.0,
            drain_ms: percentiles(48.0, 6),
            lost_batches: 0,
            gaps: 0,
            replays: 0,
            wrong_pods: vec!["127.0.0.1:9003".to_owned()],
            indexer_ns_per_block: Some(640.0),
        }),
        hits: Some(Hits {
            requests,
            predicted_tokens: precise.then_some(requests * 655),
            actual_tokens: (requests as f64 * 720.0 * hits) as u64,
            prompt_tokens: requests * 720,
            mean_abs_error_tokens: precise.then_some(0.8),
            over: 2,
            under: 5,
            exact: requests - 7,
            hit_ratio: hits,
            ideal_hit_ratio: Some(0.94),
            regret_tokens: Some((requests as f64 * (0.94 - hits) * 100.0) as u64),
            source: "x-kv-predicted-tokens of the endpoint picker".to_owned(),
        }),
        resources: [
            ("epp", 0.21, 41),
            ("indexer", 0.09, 88),
            ("engines", 1.9, 120),
            ("loadgen", 0.12, 32),
        ]
        .into_iter()
        .map(|(component, cpu_ms, mib)| {
            (component.to_owned(), resources(cpu_ms * drift, mib, requests))
        })
        .collect(),
        gateway: "no gateway in this run".to_owned(),
        pods: (0..4_u64)
            .map(|pod| {
                let served = requests / 4;
                let share = PodShare {
                    requests: served,
                    share: 0.25,
                    prompt_tokens: served * 720,
                    cached_tokens: (served as f64 * 720.0 * hits) as u64,
                };
                (format!("127.0.0.1:900{pod}"), share)
            })
            .collect(),
        imbalance: Some(1.08),
        ttft_cdf: vec![[ttft * 0.5, 0.0], [ttft, 0.5], [ttft * 4.0, 0.99], [ttft * 8.0, 1.0]],
        predictions: if precise { vec![[640.0, 640.0], [656.0, 640.0]] } else { Vec::new() },
        timeline: (0..3).map(|slice| moment(slice, ttft, is_sweep)).collect(),
    }
}

fn freshness() -> Freshness {
    Freshness {
        p50: Some(212.0),
        p95: Some(410.0),
        p99: Some(733.0),
        max: Some(1_904.0),
        n: 2_000,
        lost: 0,
        routed_elsewhere: 1,
        kinds: BTreeMap::from([
            ("store.idle".to_owned(), percentiles(190.0, 500)),
            ("store.steady".to_owned(), percentiles(215.0, 500)),
            ("remove.steady".to_owned(), percentiles(220.0, 500)),
            ("store.burst".to_owned(), percentiles(480.0, 500)),
            ("endpoint_picker.steady".to_owned(), percentiles(690.0, 60)),
        ]),
        resolution_us: Some(90.0),
        pick_resolution_us: Some(340.0),
        wait_visible: Some(percentiles(150.0, 2_000)),
        difference: Some(percentiles(62.0, 2_000)),
    }
}

fn resources(cpu_ms: f64, mib: u64, requests: u64) -> Resources {
    let mut cost = Resources {
        cpu_ms_per_request: None,
        cpu_s: cpu_ms * requests as f64 / 1e3,
        cores: 0.2,
        rss_peak_bytes: mib << 20,
        voluntary_switches: 12_000,
        involuntary_switches: 310,
        fds_peak: 48,
        threads_peak: 6,
    };
    cost.per_request(requests);
    cost
}

fn moment(slice: u64, ttft: f64, is_sweep: bool) -> Moment {
    Moment {
        at_s: slice as f64,
        span_s: 1.0,
        arrivals: 20,
        complete: 19,
        errors: 0,
        in_flight: 12,
        ttft_p50_ms: Some(ttft),
        ttft_p95_ms: Some(ttft * 2.5),
        burst: is_sweep && slice == 1,
        event_burst: is_sweep && slice == 2,
        freshness_max_us: Some(900.0),
        backlog_batches: Some(12),
        cores: BTreeMap::from([("epp".to_owned(), 0.2), ("indexer".to_owned(), 0.1)]),
        rss_bytes: BTreeMap::from([("epp".to_owned(), 40 << 20), ("indexer".to_owned(), 80 << 20)]),
    }
}
