//! Reports as a run would write them, with numbers from a small model of a fleet.

use std::collections::BTreeMap;

use kv_indexer::loadgen::report::{
    Bursts, Comparison, Difference, Environment, Freshness, Hits, InFlight, LoopKind, Moment,
    Percentiles, PodShare, Report, Resources, SCHEMA, Scenario, Storm,
};

/// (name, time to the first token on an idle fleet in ms, requests per second that it bears, share of tokens
/// found).
const POLICIES: [(&str, f64, f64, f64); 5] = [
    ("random", 270.0, 17.0, 0.27),
    ("round-robin", 260.0, 18.0, 0.26),
    ("least-load", 240.0, 19.0, 0.30),
    ("approximate", 180.0, 36.0, 0.72),
    ("precise", 160.0, 75.0, 0.88),
];
const COMPONENTS: [(&str, f64, u64); 4] = [
    ("endpoint picker", 0.41, 31),
    ("indexer", 0.17, 58),
    ("engines", 0.66, 120),
    ("loadgen", 0.13, 44),
];
const RATES: [f64; 7] = [3.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0];
const REPEATS: u32 = 3;

/// Quantiles of a log-normal distribution.
fn percentiles(n: u64, median: f64, spread: f64) -> Percentiles {
    let at = |z: f64| Some(median * (spread * z).exp());
    let doubtful = if n < 1_000 { vec!["p99".to_owned(), "p999".to_owned()] } else { Vec::new() };
    Percentiles {
        n,
        mean: at(spread / 2.0),
        stddev: Some(median * spread),
        min: at(-2.6),
        p50: at(0.0),
        p90: at(1.2816),
        p95: at(1.6449),
        p99: at(2.3263),
        p999: at(3.0902),
        max: at(3.4),
        doubtful,
    }
}

fn cdf(median: f64, spread: f64) -> Vec<[f64; 2]> {
    (0..=400)
        .map(|n| {
            let z = -3.0 + 6.0 * f64::from(n) / 400.0;
            // Logistic stands in for the normal distribution.
            [median * (spread * z).exp(), 1.0 / (1.0 + (-1.702 * z).exp())]
        })
        .collect()
}

/// One run of a policy at a rate.
fn run(
    name: &str,
    policy: usize,
    rate: Option<f64>,
    repeat: u32,
    rng: &mut fastrand::Rng,
) -> Scenario {
    let (label, idle, bears, hits) = POLICIES[policy];
    let asked = rate.unwrap_or(12.0);
    let load = asked / bears;
    let noise = 0.95 + 0.1 * rng.f64();
    // Past what it bears, the queue grows as long as the run lasts.
    let median = noise
        * if load < 1.0 { idle / (1.0 - 0.7 * load) } else { idle * 4.0 + 9e4 * (load - 1.0) };
    let spread = if load < 1.0 { 0.45 } else { 0.7 };
    let requests = (asked * 30.0) as u64;
    let throughput = asked.min(bears) * noise;
    let prompt = 720 * requests;
    let found = (prompt as f64 * hits) as u64;
    let predicts = policy >= 3;
    let blurred = if policy == 3 { 90.0 } else { 6.0 };
    let predictions = (0..requests.min(400)).filter(|_| predicts).map(|_| {
        let truth = if rng.f64() < hits { 592.0 } else { 16.0 * f64::from(rng.u32(0..37)) };
        let error = if rng.f64() < 0.2 { (rng.f64() - 0.4) * blurred * 3.0 } else { 0.0 };
        [(truth + error).clamp(0.0, 720.0).round(), truth]
    });
    let predictions = predictions.collect();
    let pods = (0..8).map(|pod| {
        let uneven = if predicts { 0.7 + 0.6 * rng.f64() } else { 0.94 + 0.12 * rng.f64() };
        let requests = (requests as f64 / 8.0 * uneven) as u64;
        let share = uneven / 8.0;
        let pod_tokens = requests * 720;
        let cached_tokens = (pod_tokens as f64 * hits) as u64;
        (
            format!("pod-{pod}"),
            PodShare { requests, share, prompt_tokens: pod_tokens, cached_tokens },
        )
    });
    let resources = COMPONENTS.iter().filter(|(component, ..)| predicts || *component != "indexer");
    let resources = resources.map(|(component, ms, mib)| {
        let mut cost = Resources {
            cpu_s: ms * noise * requests as f64 / 1e3,
            cores: ms * noise * asked / 1e3,
            rss_peak_bytes: mib << 20,
            voluntary_switches: requests * 9,
            ..Resources::default()
        };
        cost.per_request(requests);
        ((*component).to_owned(), cost)
    });
    Scenario {
        name: name.to_owned(),
        policy: label.to_owned(),
        repeat,
        level: rate,
        pacing: LoopKind::Open,
        workload: "shared-prefix:groups=150,prompts=5,system=600,question=120,output=100"
            .to_owned(),
        seed: 7 + u64::from(repeat),
        valid: true,
        duration_s: 30.0,
        requests,
        asked_rps: Some(asked),
        sent_rps: asked,
        throughput_rps: throughput,
        in_flight: InFlight {
            asked: None,
            mean: throughput * 1.7,
            p95: throughput * 3.0,
            max: 200,
        },
        ttft_ms: percentiles(requests, median, spread),
        itl_ms: percentiles(requests * 99, 13.0, 0.2),
        hits: Some(Hits {
            requests,
            predicted_tokens: predicts.then_some(found),
            actual_tokens: found,
            prompt_tokens: prompt,
            mean_abs_error_tokens: predicts.then_some(blurred / 3.0),
            over: requests / 9,
            under: requests / 20,
            exact: requests - requests / 9 - requests / 20,
            hit_ratio: hits,
            ideal_hit_ratio: Some(0.93),
            regret_tokens: Some(requests * 3),
            source: "x-kv-predicted-tokens".to_owned(),
        }),
        resources: resources.collect(),
        gateway: "no gateway in this run".to_owned(),
        pods: pods.collect(),
        imbalance: Some(1.2),
        ttft_cdf: cdf(median, spread),
        predictions,
        freshness_us: (policy == 4).then(|| freshness(noise)),
        ..Scenario::default()
    }
}

fn freshness(noise: f64) -> Freshness {
    let mut kinds = BTreeMap::new();
    for (kind, median) in
        [("store", 210.0), ("remove", 230.0), ("engine_step", 420.0), ("endpoint_picker", 900.0)]
    {
        for (condition, factor) in
            [("idle", 1.0), ("steady", 1.4), ("burst", 9.0), ("delayed", 11.0)]
        {
            let kind = format!("{kind}.{condition}");
            kinds.insert(kind, percentiles(2_000, median * factor * noise, 0.4));
        }
    }
    Freshness {
        p50: Some(210.0),
        p95: Some(480.0),
        p99: Some(720.0),
        max: Some(9_000.0),
        n: 32_000,
        lost: 0,
        routed_elsewhere: 2,
        kinds,
        resolution_us: Some(60.0),
        pick_resolution_us: Some(310.0),
        wait_visible: Some(percentiles(2_000, 160.0, 0.3)),
        difference: Some(percentiles(2_000, 45.0, 0.3)),
    }
}

/// Sixty seconds in slices of 100 ms, with bursts of requests and of events.
fn timeline(policy: usize, rng: &mut fastrand::Rng) -> Vec<Moment> {
    let (_, idle, bears, _) = POLICIES[policy];
    let (mut queue, mut backlog) = (0.0_f64, 0.0_f64);
    (0..600)
        .map(|n| {
            let at_s = f64::from(n) / 10.0;
            let (burst, event_burst) = (n % 150 == 75, n % 200 == 130);
            let arrivals = f64::from(rng.u8(0..4)) + if burst { 100.0 } else { 0.0 };
            queue += arrivals;
            let complete = queue.min(bears.min(40.0) / 10.0 * 2.0).floor();
            queue -= complete;
            backlog = (backlog * 0.6).floor() + if event_burst { 1_500.0 } else { 0.0 };
            let ttft = idle * (1.0 + queue / 12.0) * (0.9 + 0.2 * rng.f64());
            let cores = COMPONENTS.iter().filter(|c| policy >= 3 || c.0 != "indexer").map(
                |(component, ms, _)| {
                    let extra = if *component == "indexer" { backlog / 2_000.0 } else { 0.0 };
                    ((*component).to_owned(), ms * (complete + 2.0) / 10.0 + extra)
                },
            );
            let rss = COMPONENTS.iter().filter(|c| policy >= 3 || c.0 != "indexer").map(
                |(component, _, mib)| {
                    let grown = *mib as f64 * (0.6 + 0.4 * (at_s / 20.0).min(1.0));
                    ((*component).to_owned(), (grown * f64::from(1 << 20)) as u64)
                },
            );
            Moment {
                at_s,
                span_s: 0.1,
                arrivals: arrivals as u64,
                complete: complete as u64,
                errors: u64::from(policy == 0 && n % 150 == 80) * 4,
                in_flight: queue as u64 + 4,
                ttft_p50_ms: Some(ttft),
                ttft_p95_ms: Some(ttft * 1.8),
                burst,
                event_burst,
                freshness_max_us: (policy == 4)
                    .then(|| (220.0 + backlog * 9.0) * (0.8 + 0.5 * rng.f64())),
                backlog_batches: (policy == 4).then_some(backlog as u64),
                cores: cores.collect(),
                rss_bytes: rss.collect(),
            }
        })
        .collect()
}

fn difference(ratio: f64, smaller_is_better: bool, lost: bool) -> Difference {
    Difference { ratio, interval: Some([ratio * 0.93, ratio * 1.08]), smaller_is_better, lost }
}

/// What the default command could have written: three scenarios and the workloads at which prefix routing
/// may lose, five policies.
pub(crate) fn full() -> Report {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut scenarios = Vec::new();
    let mut comparisons = Vec::new();
    for repeat in 0..REPEATS {
        for policy in 0..POLICIES.len() {
            scenarios.push(run("steady", policy, None, repeat, &mut rng));
            scenarios.push(run("unique prompts", policy, None, repeat, &mut rng));
            for rate in RATES {
                scenarios.push(run("throughput", policy, Some(rate), repeat, &mut rng));
            }
            let mut sweep = run("sweep", policy, None, repeat, &mut rng);
            sweep.timeline = timeline(policy, &mut rng);
            sweep.bursts = Some(Bursts { count: 4, size: 100, ..Bursts::default() });
            sweep.storm = (policy == 4).then(|| Storm {
                options: "3 bursts of 50 000 blocks, 32 in a batch".to_owned(),
                publishers: 8,
                batches: 4_689,
                blocks: 150_000,
                bursts: 3,
                blocks_per_s: 1_210_000.0,
                backlog_max_batches: 1_500,
                backlog_max_ms: 38.0,
                drain_ms: percentiles(3, 41.0, 0.1),
                indexer_ns_per_block: Some(310.0),
                ..Storm::default()
            });
            scenarios.push(sweep);
        }
    }
    for name in ["steady", "sweep", "unique prompts"] {
        for (at, (against, ..)) in POLICIES.into_iter().take(4).enumerate() {
            let gain = [1.9, 1.8, 1.7, 1.12][at];
            let lost = name == "unique prompts" && against == "least-load";
            let gain = if name == "unique prompts" { 1.0 } else { gain };
            let p95 = if lost { 1.31 } else { 1.0 / (gain * gain * gain) };
            comparisons.push(Comparison {
                name: name.to_owned(),
                level: None,
                policy: "precise".to_owned(),
                against: against.to_owned(),
                quantities: BTreeMap::from([
                    ("throughput_rps".to_owned(), difference(gain, false, false)),
                    ("ttft_ms.p95".to_owned(), difference(p95, true, lost)),
                    ("goodput.share".to_owned(), difference(gain.sqrt(), false, false)),
                ]),
            });
        }
    }
    Report {
        schema: SCHEMA.to_owned(),
        valid: true,
        warnings: vec![
            "the machine was busy before the run: load average 1.4 on 2 cores".to_owned(),
        ],
        started_unix_ns: 1_790_000_000_000_000_000,
        duration_s: 1_843.0,
        interrupted: false,
        environment: Environment {
            version: "0.1.0".to_owned(),
            git_sha: Some("cdbed52".to_owned()),
            kernel: "Linux 6.1.0 x86_64".to_owned(),
            cpu: "AMD EPYC 7B13".to_owned(),
            cores: 2.0,
            load_before: 1.4,
            load_after: 2.3,
            memory_bytes: 8 << 30,
            cgroup: BTreeMap::from([("cpu.max".to_owned(), "200000 100000".to_owned())]),
        },
        config: serde_json::json!({
            "command": "loadgen --policies random,round-robin,least-load,approximate,precise --repeats 3 --seed 7",
            "engines": 8, "repeats": 3, "kv_blocks": 1_920, "block_size": 16,
        }),
        scenarios,
        summaries: Vec::new(),
        comparisons,
    }
}

/// The full report, with names that try to be markup.
pub(crate) fn hostile() -> Report {
    let evil = |text: &str| {
        format!(
            "{text}<script>hijacked=true</script>\"'><img src=x onerror=hijacked=true>&lt;</svg></style>\u{202e}"
        )
    };
    let long = "W".repeat(5_000);
    let mut report = full();
    report.warnings = vec![evil("warning"), long.clone()];
    report.schema = evil("schema");
    let e = &mut report.environment;
    (e.version, e.kernel, e.cpu) = (evil("0"), evil("Linux"), long.clone());
    e.git_sha = Some(evil("sha"));
    e.cgroup = BTreeMap::from([(evil("cpu"), evil("max"))]);
    report.config =
        serde_json::json!({"command": evil("loadgen"), evil("key"): [evil("value"), long]});
    for scenario in &mut report.scenarios {
        for text in [&mut scenario.name, &mut scenario.workload, &mut scenario.gateway] {
            *text = evil(text);
        }
        if scenario.policy == "least-load" {
            scenario.policy = "external:".to_owned() + &"W".repeat(300);
        }
        scenario.policy = evil(&scenario.policy);
        scenario.warnings = vec![evil("doubt")];
        if let Some(storm) = &mut scenario.storm {
            storm.options = evil("storm");
            storm.wrong_pods = (0..20).map(|pod| evil(&format!("wrong-{pod}"))).collect();
        }
        if let Some(freshness) = &mut scenario.freshness_us {
            freshness.kinds = rename(&freshness.kinds, evil);
        }
        scenario.resources = rename(&scenario.resources, evil);
        scenario.pods = rename(&scenario.pods, evil);
        for moment in &mut scenario.timeline {
            moment.cores = rename(&moment.cores, evil);
            moment.rss_bytes = rename(&moment.rss_bytes, evil);
        }
    }
    for comparison in &mut report.comparisons {
        for text in [&mut comparison.name, &mut comparison.policy, &mut comparison.against] {
            *text = evil(text);
        }
        comparison.quantities = rename(&comparison.quantities, evil);
    }
    report
}

fn rename<V: Clone>(of: &BTreeMap<String, V>, by: impl Fn(&str) -> String) -> BTreeMap<String, V> {
    of.iter().map(|(name, value)| (by(name), value.clone())).collect()
}

/// Many times as much of everything.
pub(crate) fn big() -> Report {
    let mut report = full();
    let small = report.scenarios.clone();
    let mut rng = fastrand::Rng::with_seed(8);
    for round in 0..15 {
        for scenario in &small {
            let mut scenario = scenario.clone();
            scenario.name = format!("{} {round}", scenario.name);
            scenario.predictions =
                (0..2_000).map(|_| [rng.f64() * 700.0, rng.f64() * 700.0]).collect();
            scenario.ttft_cdf =
                (0..5_000).map(|n| [f64::from(n + 1), f64::from(n) / 5_000.0]).collect();
            scenario.warnings = vec!["late".repeat(200)];
            report.scenarios.push(scenario);
        }
    }
    for scenario in report.scenarios.iter_mut().filter(|s| s.timeline.len() > 1) {
        let short = scenario.timeline.clone();
        for round in 1..10 {
            scenario.timeline.extend(short.iter().cloned().map(|mut moment| {
                moment.at_s += 60.0 * f64::from(round);
                moment
            }));
        }
    }
    report
}

/// Zeros, negatives and values that are no numbers.
pub(crate) fn odd() -> Report {
    let mut report = full();
    for (at, scenario) in report.scenarios.iter_mut().enumerate() {
        let wild = [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e300, 1e-300][at % 6];
        scenario.level = scenario.level.map(|_| wild);
        scenario.throughput_rps = wild;
        scenario.ttft_ms =
            Percentiles { p50: Some(wild), p95: Some(wild), ..Percentiles::default() };
        scenario.ttft_cdf = vec![[wild, wild], [1.0, wild]];
        scenario.predictions = vec![[wild, 1.0]];
        scenario.pods.values_mut().for_each(|pod| pod.requests = 0);
        for moment in &mut scenario.timeline {
            (moment.span_s, moment.ttft_p95_ms) = (0.0, Some(wild));
            moment.cores.values_mut().for_each(|cores| *cores = wild);
        }
        scenario.resources.values_mut().for_each(|cost| cost.cpu_ms_per_request = Some(wild));
    }
    for comparison in &mut report.comparisons {
        for (at, difference) in comparison.quantities.values_mut().enumerate() {
            let wild = [f64::NAN, f64::INFINITY, 0.0][at % 3];
            (difference.ratio, difference.interval) = (wild, Some([wild, 0.0]));
        }
    }
    report
}
