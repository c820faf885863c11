//! Predictions, and what became of them.

use std::collections::BTreeMap;

use super::*;
use crate::{
    epp::datalayer::{EndpointInfo, EndpointName, Metrics},
    support::metrics::encode,
};

fn endpoint(life: u64, engine_block: u64) -> Arc<Endpoint> {
    let address = "10.0.0.1:8000".parse().unwrap();
    let endpoint = Endpoint::new(
        EndpointId(life),
        EndpointInfo {
            name: EndpointName { namespace: "ns".to_owned(), name: "a".to_owned() },
            address,
            metrics_address: address,
            labels: BTreeMap::new(),
        },
    );
    endpoint.set_metrics(Metrics { cache_block_tokens: engine_block, ..Metrics::default() });
    Arc::new(endpoint)
}

/// A live row, 1000 tokens in blocks of 16, of which so many are held.
fn held(depth: u32) -> Prediction {
    Prediction {
        endpoint: endpoint(1, 16),
        prompt_tokens: 1000,
        prompts: 1,
        block: 16,
        depth,
        confirmed: depth,
        best: depth,
        state: Some(RowState { state: PodState::Live, stale: false }),
        decided: DecidedBy::Prefix,
        disaggregated: false,
        source: Source::Precise,
    }
}

fn usage(cached: impl Into<Option<u64>>) -> Ending<'static> {
    let usage = Usage { prompt: 1000, completion: 1, total: 1001, cached: cached.into() };
    Ending { completed: true, status: Some(200), usage: Some(usage), served: None }
}

struct Bench {
    accuracy: Accuracy,
    registry: Registry,
}

impl Bench {
    fn new() -> Self {
        let (accuracy, registry) = (Accuracy::new().unwrap(), Registry::new());
        // Not shared with other tests.
        registry.register(Box::new(accuracy.clone())).unwrap();
        Self { accuracy, registry }
    }

    /// The numbers that are reported.
    fn observe(&self, prediction: Prediction, ending: &Ending<'_>) -> Vec<(&'static str, f64)> {
        let mut report = Report::default();
        self.accuracy.predicted(prediction).ended(ending, true, &mut report);
        report.numbers
    }

    /// The series that are not 0, without histograms' buckets.
    fn series(&self) -> Vec<String> {
        let text = encode(&self.registry).unwrap();
        let shown = |line: &&str| {
            !line.starts_with('#') && !line.ends_with(" 0") && !line.contains("_bucket")
        };
        let short = |line: &str| line.trim_start_matches("epp_prefix_").replace('"', "");
        text.lines().filter(shown).map(short).collect()
    }
}

/// What one request adds to the series that tell of errors.
#[track_caller]
fn check(prediction: Prediction, ending: &Ending<'_>, want: &[&str]) {
    let bench = Bench::new();
    bench.observe(prediction, ending);
    let tells = ["predictions", "over", "under", "unobserved", "prompt_mismatches"];
    let told: Vec<String> = bench
        .series()
        .into_iter()
        .filter(|line| tells.iter().any(|start| line.starts_with(start)))
        .collect();
    assert_eq!(told, want);
}

#[test]
fn within_a_block_is_exact() {
    const EXACT: &[&str] = &["predictions_total{outcome=exact} 1"];
    check(held(10), &usage(160), EXACT);
    check(held(10), &usage(176), EXACT);
    check(held(10), &usage(144), EXACT);
    // 62 whole blocks, and at least one token to compute.
    check(held(62), &usage(992), EXACT);
    let full = Prediction { prompt_tokens: 64, ..held(4) };
    check(full.clone(), &usage(48), &[EXACT[0], "prompt_mismatches_total 1"]);
    // Engine blocks of 64: of 10 · 16 tokens two are whole.
    let large = |depth| Prediction { endpoint: endpoint(1, 64), ..held(depth) };
    check(large(10), &usage(128), EXACT);
    check(large(10), &usage(192), EXACT);
    // An engine that does not say.
    check(Prediction { endpoint: endpoint(1, 0), ..held(10) }, &usage(160), EXACT);
}

#[test]
fn what_engines_can_reuse_caps_the_prediction() {
    #[track_caller]
    fn check(prediction: &Prediction, want: u64) {
        let unit = prediction.unit();
        assert_eq!(prediction.reused(prediction.depth, unit), want);
    }
    check(&Prediction { prompt_tokens: 64, ..held(4) }, 48);
    check(&Prediction { prompt_tokens: 65, ..held(4) }, 64);
    check(&Prediction { prompt_tokens: 0, ..held(0) }, 0);
    check(&Prediction { prompt_tokens: 16, ..held(1) }, 0);
    check(&Prediction { endpoint: endpoint(1, 32), ..held(3) }, 32);
    check(&Prediction { block: 0, endpoint: endpoint(1, 0), ..held(3) }, 0);
    check(&Prediction { block: u32::MAX, ..held(u32::MAX) }, 992);
}

#[test]
fn errors_have_causes() {
    let row = |state, stale| Some(RowState { state, stale });
    let over =
        |cause: &str, tokens: u64| format!("overpredicted_tokens_total{{cause={cause}}} {tokens}");
    let under =
        |cause: &str, tokens: u64| format!("underpredicted_tokens_total{{cause={cause}}} {tokens}");
    let (too_much, too_little) =
        ("predictions_total{outcome=over} 1", "predictions_total{outcome=under} 1");

    check(held(20), &usage(160), &[&over("evicted", 160), too_much]);
    let speculative = |confirmed| Prediction { confirmed, ..held(20) };
    check(speculative(5), &usage(80), &[&over("speculative", 240), too_much]);
    check(speculative(5), &usage(112), &[&over("speculative", 208), too_much]);
    check(speculative(5), &usage(0), &[&over("evicted", 80), &over("speculative", 240), too_much]);
    let degraded = |stale| {
        let state = if stale { PodState::Live } else { PodState::Degraded };
        Prediction { state: row(state, stale), confirmed: 5, ..held(20) }
    };
    check(degraded(false), &usage(80), &[&over("degraded", 240), too_much]);
    check(degraded(true), &usage(80), &[&over("degraded", 240), too_much]);

    check(held(5), &usage(320), &[too_little, &under("stored_since", 240)]);
    check(degraded(false), &usage(640), &[too_little, &under("degraded", 320)]);
    let partial = Prediction { state: row(PodState::Partial, false), ..held(5) };
    check(partial, &usage(320), &[too_little, &under("partial", 240)]);
    let replaying = Prediction { state: row(PodState::Replaying, false), ..held(5) };
    check(replaying, &usage(320), &[too_little, &under("partial", 240)]);
    check(
        Prediction { state: None, ..held(0) },
        &usage(320),
        &[too_little, &under("unindexed", 320)],
    );
    // All that can be reused by our rule was promised.
    let large = Prediction { endpoint: endpoint(1, 256), ..held(62) };
    let ending = usage(999);
    check(large.clone(), &ending, &["predictions_total{outcome=exact} 1"]);
    let huge = Prediction { endpoint: endpoint(1, 400), ..large };
    let ending = Ending { usage: usage(1500).usage, ..ending };
    check(huge, &ending, &[too_little, &under("capped", 700)]);
}

#[test]
fn what_cannot_be_observed_is_counted() {
    #[track_caller]
    fn unobserved(prediction: Prediction, ending: &Ending<'_>, reason: &str) {
        check(prediction, ending, &[&format!("unobserved_total{{reason={reason}}} 1")]);
    }
    let good = usage(160);
    unobserved(held(10), &Ending { status: Some(500), ..good }, "error_status");
    unobserved(held(10), &Ending { completed: false, ..good }, "aborted");
    unobserved(held(10), &Ending::default(), "aborted");
    unobserved(held(10), &Ending { served: Some("10.0.0.2:8000"), ..good }, "other_endpoint");
    unobserved(held(10), &Ending { usage: None, ..good }, "no_usage");
    unobserved(held(10), &usage(None), "no_details");
    unobserved(Prediction { prompts: 2, ..held(10) }, &good, "several_prompts");
    let from = |source| Prediction { source, ..held(10) };
    unobserved(from(Source::NoTokens(ESTIMATED)), &good, "estimated");
    unobserved(from(Source::NoTokens("late")), &good, "fallback");
    unobserved(from(Source::NoAnswer(IndexError::Open)), &good, "fallback");
    unobserved(held(10), &Ending { served: Some("10.0.0.2"), ..good }, "other_endpoint");
    unobserved(Prediction { disaggregated: true, ..held(10) }, &good, "disaggregated");
    // The second is the port of all ranks.
    for served in ["10.0.0.1:8000", "10.0.0.1:9000"] {
        let same = Ending { served: Some(served), ..good };
        check(held(10), &same, &["predictions_total{outcome=exact} 1"]);
    }
}

#[test]
fn details_that_an_endpoint_leaves_out_mean_nothing_was_cached() {
    let bench = Bench::new();
    let reported = |prediction, ending: &Ending<'_>| {
        let numbers = bench.observe(prediction, ending);
        numbers.into_iter().find(|(name, _)| *name == "actual_cached_tokens").map(|(_, n)| n)
    };
    assert_eq!(reported(held(10), &usage(None)), None);
    assert_eq!(reported(held(10), &usage(160)), Some(160.0));
    assert_eq!(reported(held(10), &usage(None)), Some(0.0));
    let other = Prediction { endpoint: endpoint(2, 16), ..held(10) };
    assert_eq!(reported(other, &usage(None)), None, "another engine");
    let series = bench.series();
    for line in [
        "cached_tokens_total{endpoint=ns/a} 160",
        "prompt_tokens_total{endpoint=ns/a} 2000",
        "overpredicted_tokens_total{cause=evicted} 160",
        "unobserved_total{reason=no_details} 2",
        "predicted_tokens_sum 320",
        "actual_tokens_sum 160",
        "difference_tokens_sum 160",
        "difference_tokens_count 2",
        "picks_total{decided_by=prefix} 4",
    ] {
        assert!(series.iter().any(|known| known == line), "{line} is not in {series:#?}");
    }
}

#[test]
fn what_load_cost_is_counted() {
    let bench = Bench::new();
    let pick = |decided, best, depth| Prediction { decided, best, ..held(depth) };
    for prediction in [
        pick(DecidedBy::Prefix, 5, 5),
        pick(DecidedBy::Load, 30, 10),
        pick(DecidedBy::Tie, 0, 0),
        Prediction { source: Source::NoTokens("late"), ..pick(DecidedBy::Load, 9, 0) },
    ] {
        // Dropped without an end: what is counted at the pick stays.
        drop(bench.accuracy.predicted(prediction));
    }
    let want = [
        "picks_total{decided_by=load} 2",
        "picks_total{decided_by=prefix} 1",
        "picks_total{decided_by=tie} 1",
        "regret_tokens_total{decided_by=load} 320",
    ];
    assert_eq!(bench.series(), want);
}

#[test]
fn numbers_are_reported_if_they_are_asked_for() {
    let bench = Bench::new();
    let mut report = Report::default();
    bench.accuracy.predicted(held(10)).ended(&usage(144), false, &mut report);
    assert_eq!(report, Report::default());
    let all = [
        ("predicted_cached_tokens", 160.0),
        ("actual_cached_tokens", 144.0),
        ("prompt_tokens", 1000.0),
    ];
    assert_eq!(bench.observe(held(10), &usage(144)), all);
    let aborted = Ending { completed: false, usage: None, ..usage(None) };
    assert_eq!(bench.observe(held(10), &aborted), [all[0], all[2]]);
    let fallback = Prediction { source: Source::NoTokens("late"), ..held(10) };
    assert_eq!(bench.observe(fallback, &usage(144)), all[1..]);
}

#[test]
fn series_end_with_their_endpoint() {
    let bench = Bench::new();
    let of = |life| Prediction { endpoint: endpoint(life, 16), ..held(10) };
    let on_its_way = bench.accuracy.predicted(of(1));
    bench.observe(of(1), &usage(160));
    // A second plugin counts into the same series.
    let second = bench.accuracy.clone();
    second.predicted(of(1)).ended(&usage(160), false, &mut Report::default());
    let prompts = || {
        let series = bench.series().into_iter();
        series.filter(|line| line.starts_with("prompt_tokens")).collect::<Vec<_>>()
    };
    assert_eq!(prompts(), ["prompt_tokens_total{endpoint=ns/a} 2000"]);
    // The next life of the same name may be seen before the end of the last one is told.
    bench.observe(of(2), &usage(160));
    bench.accuracy.endpoint_removed(&endpoint(1, 16));
    second.endpoint_removed(&endpoint(1, 16));
    assert_eq!(prompts(), ["prompt_tokens_total{endpoint=ns/a} 1000"]);
    on_its_way.ended(&usage(160), false, &mut Report::default());
    bench.observe(of(1), &usage(160));
    assert_eq!(prompts(), ["prompt_tokens_total{endpoint=ns/a} 1000"]);
    bench.accuracy.endpoint_removed(&endpoint(2, 16));
    assert_eq!(prompts(), [""; 0]);
}

#[test]
fn plugins_share_their_series() {
    let registry = Registry::new();
    let [first, second] = [(); 2].map(|()| Accuracy::register(&registry).unwrap());
    assert!(Arc::ptr_eq(&first.0, &second.0));
    assert!(encode(&registry).unwrap().contains("epp_prefix_predictions_total"));
}
