use std::sync::Arc;

use hdrhistogram::Histogram;

use super::*;
use crate::loadgen::{
    drive::Release,
    report::Resources,
    workload::{Part, Planned, Prompt},
};

const MILLI: u64 = 1_000_000;

fn planned(at_ms: u64, burst: Option<u32>) -> Planned {
    Planned {
        at: Some(Duration::from_millis(at_ms)),
        burst,
        prompt: Prompt { parts: [Part { seed: 1, tokens: 100 }].into() },
        max_tokens: 11,
        group: 0,
        after: None,
    }
}

/// Sent in time; first token after `ttft_ms`, ten more 10 ms apart.
fn exchange(request: u32, at_ms: u64, ttft_ms: u64) -> Exchange {
    let (at, first) = (at_ms * MILLI, (at_ms + ttft_ms) * MILLI);
    Exchange {
        request,
        intended_ns: at,
        sent_ns: at,
        picked_ns: None,
        first_token_ns: Some(first),
        last_token_ns: Some(first + 100 * MILLI),
        ended_ns: first + 100 * MILLI,
        pieces: 11,
        output_tokens: 11,
        prompt_tokens: None,
        cached_tokens: None,
        predicted_tokens: None,
        pod: None,
        ended: Ended::Complete,
    }
}

fn unanswered(request: u32, at_ms: u64, waited_ms: u64, ended: Ended) -> Exchange {
    Exchange {
        first_token_ns: None,
        last_token_ns: None,
        ended_ns: (at_ms + waited_ms) * MILLI,
        pieces: 0,
        output_tokens: 0,
        ended,
        ..exchange(request, at_ms, 0)
    }
}

fn driven(exchanges: Vec<Exchange>) -> Driven {
    let last = exchanges.iter().map(|exchange| exchange.sent_ns).max().unwrap_or(0);
    let end = exchanges.iter().map(|exchange| exchange.ended_ns).max().unwrap_or(0);
    Driven {
        started: Instant::now(),
        started_unix_ns: unix_ns(),
        elapsed: Duration::from_nanos(end),
        sending: Duration::from_nanos(last),
        exchanges,
        gaps: Histogram::new(3).unwrap(),
        in_flight: Histogram::new(3).unwrap(),
        releases: Vec::new(),
        cpu: Duration::ZERO,
        unsent: 0,
    }
}

/// Every 10 ms from 0, all answered after 20 ms.
fn steady(requests: u32) -> (Driven, Plan) {
    let exchanges = (0..requests).map(|at| exchange(at, u64::from(at) * 10, 20)).collect();
    let plan = (0..requests).map(|at| planned(u64::from(at) * 10, None)).collect::<Vec<_>>();
    (driven(exchanges), Plan { requests: plan.into() })
}

#[test]
fn a_steady_run_in_numbers() {
    let (driven, plan) = steady(100);
    let options =
        MeasureOptions { name: "steady", asked_rps: Some(100.0), ..MeasureOptions::default() };
    let scenario = scenario(&driven, &plan, &options);
    assert!(scenario.valid, "{:?}", scenario.warnings);
    assert_eq!(scenario.warnings, Vec::<String>::new());
    assert_eq!((scenario.requests, scenario.errors, scenario.incomplete), (100, 0, 0));
    // The last one is sent at 990 ms and answered 120 ms later.
    assert!((scenario.duration_s - 1.11).abs() < 1e-9, "{}", scenario.duration_s);
    assert!((scenario.throughput_rps - 100.0 / 1.11).abs() < 1e-6);
    assert!((scenario.output_tokens_per_s - 1_100.0 / 1.11).abs() < 1e-6);
    assert!((scenario.prompt_tokens_per_s - 10_000.0 / 1.11).abs() < 1e-6);
    assert!((scenario.sent_rps - 100.0 / 0.99).abs() < 1e-6);
    assert_eq!(scenario.ttft_ms.p95, Some(20.0));
    assert_eq!(scenario.ttft_from_send_ms.p95, Some(20.0));
    assert_eq!(scenario.dispatch_delay_ms.max, Some(0.0));
    assert_eq!(scenario.tpot_ms.p50, Some(10.0));
    assert_eq!(scenario.latency_ms.p50, Some(120.0));
    assert_eq!(scenario.pick_ms, None);
    assert_eq!(scenario.hits, None);
    assert_eq!(scenario.goodput, None);
    assert_eq!(scenario.bursts, None);
    assert_eq!(scenario.imbalance, None);
    assert_eq!(scenario.ttft_cdf.len(), 100);
    assert_eq!(scenario.ttft_cdf.last(), Some(&[20.0, 1.0]));
    let arrivals: u64 = scenario.timeline.iter().map(|moment| moment.arrivals).sum();
    let complete: u64 = scenario.timeline.iter().map(|moment| moment.complete).sum();
    assert_eq!((arrivals, complete), (100, 100));
    assert_eq!(scenario.timeline.len(), 12);
    // One each 10 ms for 120 ms.
    assert_eq!(scenario.timeline[5].in_flight, 12);
    assert_eq!(scenario.timeline[5].ttft_p95_ms, Some(20.0));
}

#[test]
fn latency_counts_from_the_intended_arrival() {
    let (mut driven, plan) = steady(100);
    for exchange in &mut driven.exchanges {
        exchange.sent_ns += 5 * MILLI;
    }
    let scenario = scenario(&driven, &plan, &MeasureOptions::default());
    assert_eq!(scenario.ttft_ms.p50, Some(20.0));
    assert_eq!(scenario.ttft_from_send_ms.p50, Some(15.0));
    assert_eq!(scenario.dispatch_delay_ms.p99, Some(5.0));
    assert!(!scenario.valid);
    assert!(scenario.warnings[0].contains("dispatch delay p99 5.00 ms"), "{:?}", scenario.warnings);
}

#[test]
fn what_did_not_end_counts_with_what_it_waited() {
    let (mut driven, plan) = steady(100);
    for at in 80..90 {
        driven.exchanges[at as usize] = unanswered(at, 10 * u64::from(at), 500, Ended::Incomplete);
    }
    for at in 90..95 {
        let gave_up = Ended::Failed(Failure::Timeout);
        driven.exchanges[at as usize] = unanswered(at, 10 * u64::from(at), 700, gave_up);
    }
    for at in 95..100 {
        let refused = Ended::Failed(Failure::Status(503));
        driven.exchanges[at as usize] = unanswered(at, 10 * u64::from(at), 1, refused);
    }
    let options = MeasureOptions {
        objectives: Some("ttft=50ms".parse().unwrap()),
        ..MeasureOptions::default()
    };
    let scenario = scenario(&driven, &plan, &options);
    assert!(scenario.valid, "a system that fails makes no run invalid: {:?}", scenario.warnings);
    assert!(scenario.warnings[0].contains("10 of 100 requests failed"), "{:?}", scenario.warnings);
    assert_eq!((scenario.errors, scenario.incomplete), (10, 10));
    let labels = BTreeMap::from([("http_503".to_owned(), 5), ("timeout".to_owned(), 5)]);
    assert_eq!(scenario.errors_by_label, labels);
    // Refusals have no time; the others had waited 500 and 700 ms.
    assert_eq!(scenario.ttft_ms.n, 95);
    assert_eq!(scenario.ttft_ms.p50, Some(20.0));
    assert_eq!((scenario.ttft_ms.p90, scenario.ttft_ms.p95), (Some(500.0), Some(700.0)));
    assert_eq!(scenario.ttft_ms.doubtful, ["p90", "p95", "p99", "p999"]);
    assert_eq!(scenario.latency_ms.n, 95);
    assert_eq!(scenario.tpot_ms.n, 80);
    let goodput = scenario.goodput.unwrap();
    assert_eq!((goodput.met, goodput.share), (80, 0.8));
    assert_eq!(goodput.interval, stats::wilson(80, 100));
    assert_eq!(goodput.objectives, "ttft=50ms");
}

#[test]
fn objectives_are_read_and_written() {
    #[track_caller]
    fn refused(text: &str, expected: &str) {
        let error = text.parse::<Objectives>().unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let objectives: Objectives = "latency=1.5s,ttft=200ms, tpot=30ms,itl=250us".parse().unwrap();
    assert_eq!(objectives.to_string(), "ttft=200ms,tpot=30ms,itl=0.25ms,latency=1500ms");
    assert_eq!(objectives.to_string().parse(), Ok(objectives));
    refused("", "`` is not NAME=DURATION");
    refused("ttft", "`ttft` is not NAME=DURATION");
    refused("p95=1s", "unknown objective `p95`");
    refused("ttft=1s,ttft=2s", "given twice");
    for duration in ["0ms", "-1ms", "5", "ms", "1e400s", "NaNs", "infs"] {
        refused(&format!("ttft={duration}"), "is not a duration");
    }
}

#[test]
fn every_objective_is_judged() {
    #[track_caller]
    fn check(objectives: &str, met: bool) {
        let objectives: Objectives = objectives.parse().unwrap();
        assert_eq!(objectives.met(&exchange(0, 5, 20)), met, "{objectives}");
        let mut open = exchange(0, 5, 20);
        open.ended = Ended::Incomplete;
        assert!(!objectives.met(&open), "{objectives}");
    }
    check("ttft=20ms,tpot=10ms,itl=10ms,latency=120ms", true);
    check("ttft=19ms", false);
    check("tpot=9ms", false);
    check("itl=9ms", false);
    check("latency=119ms", false);
}

#[test]
fn promised_and_found_tokens() {
    let (mut driven, plan) = steady(5);
    let seen = [(Some(64), Some(64)), (Some(80), Some(64)), (Some(96), Some(64)), (None, Some(32))];
    for (exchange, (predicted, cached)) in driven.exchanges.iter_mut().zip(seen) {
        (exchange.predicted_tokens, exchange.cached_tokens) = (predicted, cached);
    }
    driven.exchanges[3].prompt_tokens = Some(120);
    let options = MeasureOptions {
        block_size: 16,
        ideal_hit_ratio: Some(0.9),
        prediction_source: "endpoint picker",
        ..MeasureOptions::default()
    };
    let hits = scenario(&driven, &plan, &options).hits.unwrap();
    let expected = Hits {
        requests: 3,
        predicted_tokens: Some(240),
        actual_tokens: 192,
        prompt_tokens: 300,
        mean_abs_error_tokens: Some(16.0),
        over: 1,
        under: 0,
        exact: 2,
        hit_ratio: 0.64,
        ideal_hit_ratio: Some(0.9),
        regret_tokens: None,
        source: "endpoint picker".to_owned(),
    };
    assert_eq!(hits, expected);

    driven.exchanges.iter_mut().for_each(|exchange| exchange.predicted_tokens = None);
    let scenario = scenario(&driven, &plan, &options);
    let hits = scenario.hits.unwrap();
    assert_eq!((hits.requests, hits.predicted_tokens, hits.actual_tokens), (4, None, 224));
    assert_eq!((hits.prompt_tokens, hits.mean_abs_error_tokens), (420, None));
    assert_eq!(scenario.predictions, Vec::<[f64; 2]>::new());
}

#[test]
fn shares_of_pods() {
    let (mut driven, plan) = steady(10);
    let names: [Arc<str>; 2] = ["a".into(), "b".into()];
    for (at, exchange) in driven.exchanges.iter_mut().enumerate().skip(2) {
        exchange.pod = Some(Arc::clone(&names[usize::from(at > 7)]));
        exchange.cached_tokens = Some(16);
    }
    let of = |pods| {
        let options = MeasureOptions { pods, ..MeasureOptions::default() };
        scenario(&driven, &plan, &options)
    };
    let seen = of(0);
    let a = PodShare { requests: 6, share: 0.75, prompt_tokens: 600, cached_tokens: 96 };
    assert_eq!(seen.pods["a"], a);
    assert_eq!(seen.imbalance, Some(1.5));
    assert_eq!(of(4).imbalance, Some(3.0), "two pods that served nothing");
}

#[test]
fn many_values_are_thinned_evenly() {
    assert_eq!(thinned(&[1, 2, 3], 5), [1, 2, 3]);
    assert_eq!(thinned::<u8>(&[], 5), Vec::<u8>::new());
    let values: Vec<u32> = (0..10_000).collect();
    let kept = thinned(&values, 2_000);
    assert_eq!((kept.len(), kept[1], kept[1_999]), (2_000, 5, 9_995));
    let (driven, _) = steady(1_000);
    let points = cdf(&driven.exchanges);
    assert_eq!((points.len(), points[0][1], points[199][1]), (200, 0.005, 1.0));
}

#[test]
fn slices_are_round_and_few() {
    #[track_caller]
    fn check(duration_s: f64, expected: f64) {
        assert!((slice(duration_s) / expected - 1.0).abs() < 1e-9, "{}", slice(duration_s));
    }
    check(0.5, 0.1);
    check(30.0, 0.1);
    check(31.0, 0.2);
    check(100.0, 0.5);
    check(300.0, 1.0);
    check(3_000.0, 10.0);
}

/// A burst of 10 at 1 s; those that arrive in the next 200 ms wait 300 ms.
fn with_burst(recovers: bool) -> (Driven, Plan) {
    let mut plan: Vec<_> = (0..200).map(|at| planned(at * 10, None)).collect();
    let slow = |at| (1_000..if recovers { 1_200 } else { 2_000 }).contains(&at);
    let mut exchanges: Vec<_> = (0..200u32)
        .map(|at| (at, u64::from(at) * 10))
        .map(|(at, ms)| exchange(at, ms, if slow(ms) { 300 } else { 20 }))
        .collect();
    for at in 200..210 {
        plan.push(planned(1_000, Some(0)));
        exchanges.push(exchange(at, 1_000, 400));
    }
    let mut driven = driven(exchanges);
    driven.releases =
        vec![Release { burst: 0, intended_ns: 1_000 * MILLI, requests: 10, spread_ns: MILLI / 5 }];
    (driven, Plan { requests: plan.into() })
}

#[test]
fn a_burst_is_over_when_arrivals_are_served_as_before() {
    let (driven, plan) = with_burst(true);
    let scenario = scenario(&driven, &plan, &MeasureOptions::default());
    assert!(scenario.valid, "{:?}", scenario.warnings);
    let bursts = scenario.bursts.unwrap();
    assert_eq!((bursts.count, bursts.size), (1, 10));
    assert_eq!(bursts.release_ms.max, Some(0.2));
    assert_eq!((bursts.ttft_ms.n, bursts.ttft_ms.p50), (10, Some(400.0)));
    // The first five with three quick ones among them begin at 1 180 ms.
    assert_eq!(bursts.recovery_s.max, Some(0.18));
    let begins: Vec<_> = scenario.timeline.iter().filter(|moment| moment.burst).collect();
    assert_eq!(begins.len(), 1);
    assert!((begins[0].at_s - 1.0).abs() < 1e-9);
    assert_eq!(begins[0].arrivals, 20);
}

#[test]
fn a_burst_that_is_not_over_is_a_lower_bound() {
    let (driven, plan) = with_burst(false);
    let recovery = scenario(&driven, &plan, &MeasureOptions::default()).bursts.unwrap().recovery_s;
    assert_eq!((recovery.n, recovery.max), (1, Some(0.99)));
    assert!(recovery.doubtful.contains(&"p50".to_owned()), "{recovery:?}");
}

#[test]
fn series_of_others_are_put_into_slices() {
    let (driven, plan) = steady(100);
    let ms = Duration::from_millis;
    // Half a core from the beginning of the sampling, 250 ms before the run.
    let samples = (0..30).map(|at| Sample { at: ms(at * 50), cpu: ms(at * 25), rss: at });
    let used = Resources { cpu_s: 0.725, cores: 0.5, ..Resources::default() };
    let sampled = Sampled {
        started: driven.started.checked_sub(ms(250)),
        totals: BTreeMap::from([("indexer".to_owned(), used)]),
        series: BTreeMap::from([("indexer".to_owned(), samples.collect())]),
        warnings: vec!["indexer went away".to_owned()],
        ..Sampled::default()
    };
    let options = MeasureOptions {
        resources: Some(&sampled),
        origin: Some(driven.started + ms(100)),
        probes: &[[0.05, 700.0], [0.06, 300.0], [50.0, 9_000.0], [-1.0, 9_000.0]],
        backlog: &[[0.15, 4.0], [0.16, 9.0]],
        event_bursts: &[[0.25, 0.3]],
        ..MeasureOptions::default()
    };
    let scenario = scenario(&driven, &plan, &options);
    assert!(scenario.valid);
    assert_eq!(scenario.warnings, ["indexer went away"]);
    assert_eq!(scenario.resources["indexer"].cpu_ms_per_request, Some(7.25));
    let moments = &scenario.timeline;
    assert_eq!(moments[1].freshness_max_us, Some(700.0));
    assert_eq!(moments.iter().filter(|moment| moment.freshness_max_us.is_some()).count(), 1);
    assert_eq!(moments[2].backlog_batches, Some(9));
    assert!(moments[3].event_burst);
    for moment in moments {
        assert!((moment.cores["indexer"] - 0.5).abs() < 1e-9, "{moment:?}");
    }
    // From 250 to 350 ms of the sampling.
    assert_eq!(moments[0].rss_bytes["indexer"], 7);
}

#[test]
fn runs_that_may_not_be_trusted() {
    type Spoil = fn(&mut Driven, &mut MeasureOptions<'_>);
    #[track_caller]
    fn check(spoil: Spoil, expected: &str) {
        let (mut driven, plan) = steady(300);
        let mut options = MeasureOptions { cores: 2.0, threads: 1, ..MeasureOptions::default() };
        assert!(scenario(&driven, &plan, &options).valid);
        spoil(&mut driven, &mut options);
        let scenario = scenario(&driven, &plan, &options);
        assert!(!scenario.valid, "want: {expected}");
        assert_eq!(scenario.warnings.len(), 1, "{:?}", scenario.warnings);
        assert!(scenario.warnings[0].contains(expected), "{:?}", scenario.warnings);
    }
    check(|driven, _| driven.exchanges.clear(), "nothing was sent");
    check(
        |driven, _| driven.exchanges.iter_mut().for_each(|e| e.ended = Ended::Incomplete),
        "no request completed",
    );
    // Every tenth one is missing though it was due.
    check(
        |driven, _| driven.exchanges.retain(|e| e.request % 10 != 5),
        "only 90.0 % of the planned",
    );
    check(|driven, _| driven.cpu = driven.sending.mul_f64(0.81), "used 81 % of their cores");
    check(|driven, _| driven.started_unix_ns -= 50 * MILLI, "parted by 50");
    check(|driven, _| driven.started_unix_ns += 50 * MILLI, "parted by -50");
    check(
        |driven, _| {
            let release = Release { burst: 0, intended_ns: 0, requests: 2, spread_ns: 999_999 };
            driven.releases = vec![release, Release { spread_ns: 2 * MILLI, ..release }];
        },
        "1 of 2 bursts took longer than 1 ms to release, the slowest 2.00 ms",
    );
    check(
        |driven, options| {
            options.pacing = Some(Pacing::Closed { concurrency: 20 });
            driven.in_flight.record_n(18, 10).unwrap();
        },
        "18.0 requests were in flight on average, 20 were asked for",
    );
}

#[test]
fn the_load_drivers_own_cpu_is_judged_and_that_of_all_doubted() {
    let (driven, plan) = steady(100);
    let of = |cores: &[(&str, f64)]| {
        let used = |cores| Resources { cores, ..Resources::default() };
        let totals = cores.iter().map(|(name, cores)| ((*name).to_owned(), used(*cores)));
        let sampled = Sampled { totals: totals.collect(), ..Sampled::default() };
        let options = MeasureOptions {
            cores: 2.0,
            resources: Some(&sampled),
            load_before: 1.5,
            ..MeasureOptions::default()
        };
        let scenario = scenario(&driven, &plan, &options);
        (scenario.valid, scenario.warnings.join("; "))
    };
    let (valid, warnings) = of(&[("loadgen", 0.5), ("engines", 1.0)]);
    assert!(valid && !warnings.contains("all components"), "{warnings}");
    assert!(warnings.contains("load average 1.50 on 2.0 cores"), "{warnings}");
    let (valid, warnings) = of(&[("loadgen", 0.5), ("engines", 1.45)]);
    assert!(valid && warnings.contains("all components together used 1.95 of 2.0"), "{warnings}");
    let (valid, warnings) = of(&[("loadgen", 1.7)]);
    assert!(!valid && warnings.contains("the load driver used 1.70 of 2.0 cores"), "{warnings}");
}

#[test]
fn closed_loops_that_are_full_are_valid() {
    let (mut driven, plan) = steady(100);
    driven.in_flight.record_n(20, 10).unwrap();
    let closed = |concurrency| MeasureOptions {
        pacing: Some(Pacing::Closed { concurrency }),
        level: Some(concurrency as f64),
        ..MeasureOptions::default()
    };
    let scenario = scenario(&driven, &plan, &closed(20));
    assert!(scenario.valid, "{:?}", scenario.warnings);
    assert_eq!(scenario.pacing, LoopKind::Closed);
    assert_eq!((scenario.in_flight.asked, scenario.in_flight.mean), (Some(20), 20.0));
}

#[test]
fn a_last_send_that_is_late_lowers_the_rate() {
    let (mut driven, plan) = steady(100);
    driven.exchanges[99].sent_ns += 60 * MILLI;
    driven.sending += Duration::from_millis(60);
    let (share, due) = achieved(&driven, &plan);
    assert_eq!(due, 100);
    assert!((0.94..0.96).contains(&share), "{share}");
}
