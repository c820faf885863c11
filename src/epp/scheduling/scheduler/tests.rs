use std::sync::Mutex;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::epp::{
    datalayer::{LoraMetrics, Metrics},
    director::DropReason,
    plugins::{
        kv_cache_utilization_scorer::KvCacheUtilizationScorer, lora_affinity_scorer,
        lora_affinity_scorer::LoraAffinityScorer, max_score_picker::MaxScorePicker, queue_scorer,
        queue_scorer::QueueScorer, random_picker, single_profile_handler::SingleProfileHandler,
        weighted_random_picker,
    },
    scheduling::{
        Filter, Picker, Plugin, ProfileHandler, Scorer,
        testing::{Rig, build, configured, profile, request, scraped, waiting},
    },
};

type Handle = fn(&[SchedulingProfile], &ProfileResults) -> Vec<usize>;

/// A plugin that does as it is told.
#[derive(Debug, Default)]
struct Fake {
    /// Keeps these only.
    keeps: Option<Vec<usize>>,
    /// Scores by endpoint.
    scores: Option<Vec<f64>>,
    /// Picks these.
    picks: Option<Vec<usize>>,
    handles: Option<Handle>,
    port: Option<u16>,
}

impl Plugin for Fake {
    fn type_name(&self) -> &'static str {
        "fake"
    }
    fn filter(&self) -> Option<&dyn Filter> {
        self.keeps.is_some().then_some(self)
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        self.scores.is_some().then_some(self)
    }
    fn picker(&self) -> Option<&dyn Picker> {
        self.picks.is_some().then_some(self)
    }
    fn profile_handler(&self) -> Option<&dyn ProfileHandler> {
        self.handles.is_some().then_some(self)
    }
}

impl Filter for Fake {
    fn filter(&self, _: &Cycle<'_>, keep: &mut Vec<usize>) {
        assert!(!keep.is_empty(), "a filter after the last candidate was asked");
        keep.retain(|at| self.keeps.as_ref().unwrap().contains(at));
    }
}

impl Scorer for Fake {
    fn score(&self, _: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        assert!(scores.iter().all(|score| *score == 0.0), "scores come zeroed");
        for (score, &at) in scores.iter_mut().zip(among) {
            *score = self.scores.as_ref().unwrap()[at];
        }
    }
}

impl Picker for Fake {
    fn pick(&self, _: &Cycle<'_>, _: &mut [Scored]) -> Vec<usize> {
        self.picks.clone().unwrap()
    }
}

impl ProfileHandler for Fake {
    fn pick(
        &self,
        _: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &ProfileResults,
    ) -> Vec<usize> {
        self.handles.unwrap()(profiles, results)
    }
    fn process_results(
        &self,
        _: &Cycle<'_>,
        _: &[SchedulingProfile],
        results: &mut ProfileResults,
    ) -> Result<Arc<str>, Refusal> {
        Ok(Arc::clone(&results.0[0].0))
    }
    fn primary_port(&self) -> Option<u16> {
        self.port
    }
}

fn single() -> Arc<dyn Plugin> {
    Arc::new(SingleProfileHandler)
}

fn best() -> Arc<dyn Plugin> {
    Arc::new(MaxScorePicker::default())
}

fn keeping(keeps: &[usize]) -> Arc<dyn Plugin> {
    Arc::new(Fake { keeps: Some(keeps.to_vec()), ..Fake::default() })
}

fn scoring(scores: &[f64]) -> Arc<dyn Plugin> {
    Arc::new(Fake { scores: Some(scores.to_vec()), ..Fake::default() })
}

fn picking(picks: &[usize]) -> Arc<dyn Plugin> {
    Arc::new(Fake { picks: Some(picks.to_vec()), ..Fake::default() })
}

fn handling(handles: Handle) -> Arc<dyn Plugin> {
    Arc::new(Fake { handles: Some(handles), ..Fake::default() })
}

fn scheduler(handler: &Arc<dyn Plugin>, profiles: Vec<SchedulingProfile>) -> Scheduler {
    Scheduler::new(configured(handler), profiles)
}

/// Queue, cache and LoRA adapters of one endpoint, and how many adapters fit.
fn pod(waiting: u64, kv_usage: f64, adapters: &[&str], max_active: usize) -> Metrics {
    let active = adapters.iter().map(|&name| name.to_owned()).collect();
    let lora = LoraMetrics { active, waiting: Vec::new(), max_active };
    Metrics { waiting, kv_usage, lora, ..scraped() }
}

/// With all default scorers at weight 1, the request for `model` goes to endpoint `want` and it has
/// this sum of scores.
#[track_caller]
fn routes(model: &str, pods: Vec<Metrics>, want: usize, score: f64) {
    let scorers: [(Arc<dyn Plugin>, f64); 3] = [
        (Arc::new(KvCacheUtilizationScorer), 1.0),
        (Arc::new(QueueScorer), 1.0),
        (Arc::new(LoraAffinityScorer), 1.0),
    ];
    let mut rig = Rig::new(pods);
    rig.request = request(model, "a prompt");
    let scheduler = scheduler(&single(), vec![profile("default", &[], &scorers, &best())]);
    let result = scheduler.schedule(&rig.cycle()).unwrap();
    assert_eq!((&*result.primary, result.targets()), ("default", &[want][..]));
    let run = result.results.get("default").unwrap();
    assert!((run.scored[want].score - score).abs() < 1e-9, "{:?}", run.scored);
    assert_eq!(run.scored.len(), rig.endpoints.len());
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn the_default_scorers_route_as_the_reference_does() {
    let p = |queue, kv, adapters: &[&str]| pod(queue, kv, adapters, 0);
    routes("critical", vec![pod(0, 0.2, &["foo", "bar"], 2), pod(0, 0.2, &["foo", "critical"], 2),
                            pod(10, 0.8, &["foo"], 2)], 1, 2.8);
    routes("m", vec![p(3, 0.2, &[]), p(0, 0.1, &[]), p(10, 0.2, &[])], 1, 1.9);
    routes("t", vec![p(0, 0.2, &["foo", "bar"]), p(0, 0.1, &["foo", "t"]), p(10, 0.2, &["foo", "bar"])],
           1, 2.9);
    routes("t", vec![p(10, 0.2, &["foo", "bar"]), p(10, 0.4, &["foo", "t"]), p(10, 0.3, &["foo"])],
           1, 2.6);
    routes("t", vec![p(6, 0.2, &["foo", "bar", "t"]), p(0, 0.85, &["foo"]), p(10, 0.9, &["foo"])],
           0, 2.2);
    routes("t", vec![p(4, 0.2, &["t"]), p(4, 0.85, &["t"])], 0, 2.8);
}

#[test]
fn nobody_left_is_a_refusal() {
    #[track_caller]
    fn check(count: usize, filters: &[Arc<dyn Plugin>]) {
        let rig = Rig::new(vec![scraped(); count]);
        let scheduler = scheduler(&single(), vec![profile("default", filters, &[], &best())]);
        let refusal = scheduler.schedule(&rig.cycle()).unwrap_err();
        let text = "ResourceExhausted - no endpoints available for the given request";
        assert_eq!(refusal.to_string(), text);
        assert_eq!(refusal.reason, Some(DropReason::RejectedSaturated));
        assert_eq!(refusal.code.status(), 429);
    }
    check(0, &[]);
    check(2, &[keeping(&[])]);
    check(2, &[keeping(&[0]), keeping(&[1]), keeping(&[0, 1])]);
    check(0, &[keeping(&[0])]);
}

#[test]
fn filters_narrow_and_scorers_rank_the_rest() {
    let scores = [(scoring(&[0.9, 0.1, 0.2, 0.8]), 1.0), (scoring(&[1.0, 0.6, 0.0, 1.0]), 2.0)];
    let filters = [keeping(&[0, 1, 2]), keeping(&[1, 2, 3])];
    let rig = Rig::new(vec![scraped(); 4]);
    let scheduler = scheduler(&single(), vec![profile("p", &filters, &scores, &best())]);
    let result = scheduler.schedule(&rig.cycle()).unwrap();
    let run = result.results.get("p").unwrap();
    assert_eq!(run.picked, [1]);
    let scored: Vec<_> = run.scored.iter().map(|s| (s.endpoint, s.score)).collect();
    assert_eq!(scored, [(1, 0.1 + 2.0 * 0.6), (2, 0.2)]);
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn scores_are_clamped_and_nan_is_nothing() {
    #[track_caller]
    fn check(score: f64, weight: f64, want: f64) {
        let rig = Rig::new([scraped()]);
        let profiles = vec![profile("p", &[], &[(scoring(&[score]), weight)], &best())];
        let result = scheduler(&single(), profiles).schedule(&rig.cycle()).unwrap();
        assert_eq!(result.results.get("p").unwrap().scored[0].score, want, "{score} × {weight}");
    }
    check(0.5,               3.0,  1.5);
    check(7.0,               3.0,  3.0);
    check(-7.0,              3.0,  0.0);
    check(f64::INFINITY,     3.0,  3.0);
    check(f64::NEG_INFINITY, 3.0,  0.0);
    check(f64::NAN,          3.0,  0.0);
    check(0.5,               0.0,  0.0);
    check(0.5,               -1.0, -0.5);
}

/// The cycle cannot be run, says so, and there is still somewhere to go.
#[track_caller]
fn breaks(handler: &Arc<dyn Plugin>, picker: &Arc<dyn Plugin>, want: &str) {
    let rig = Rig::new(vec![scraped(); 3]);
    let profiles = ["a", "b"].map(|name| profile(name, &[keeping(&[0, 1])], &[], picker));
    let count = if handler.type_name() == "fake" { 2 } else { 1 };
    let scheduler = scheduler(handler, profiles[..count].to_vec());
    let refusal = scheduler.schedule(&rig.cycle()).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::Internal);
    assert_eq!(refusal.message, format!("failed to find target endpoint: {want}"));
    let result = scheduler.fallback(&rig.cycle()).unwrap();
    assert_eq!(&*result.primary, "a");
    assert!(result.targets().len() == 1 && result.targets()[0] < 3);
    let nobody = Rig::new([]);
    assert_eq!(scheduler.fallback(&nobody.cycle()), None);
}

#[test]
fn broken_plugins_end_the_cycle() {
    let (ok, single) = (best(), single());
    breaks(&handling(|_, _| vec![0]), &ok, "'fake' asks again for scheduler profile 'a'");
    breaks(&handling(|_, _| vec![1, 1]), &ok, "'fake' asks again for scheduler profile 'b'");
    breaks(&handling(|_, _| vec![2]), &ok, "'fake' asks for scheduler profile 2 of 2");
    breaks(
        &handling(|_, _| Vec::new()),
        &ok,
        "failed to run any scheduler profile for request request-1",
    );
    breaks(&ok, &ok, "'max-score-picker' is no profile handler");
    let failed = "failed to run scheduler profile 'a'";
    breaks(&single, &picking(&[]), failed);
    breaks(&single, &picking(&[9]), failed);
    breaks(&single, &picking(&[2]), failed); // filtered out
    breaks(&single, &keeping(&[]), failed); // no picker
    breaks(
        &handling(|_, results| if results.0.is_empty() { vec![0] } else { vec![] }),
        &picking(&[7]),
        failed,
    );
}

#[test]
fn a_handler_can_run_profiles_one_after_the_other() {
    let handler = handling(|profiles, results| {
        (results.0.len() < profiles.len()).then_some(results.0.len()).into_iter().collect()
    });
    let rig = Rig::new(vec![scraped(); 2]);
    let profiles = vec![
        profile("a", &[keeping(&[1])], &[], &best()),
        profile("b", &[keeping(&[])], &[], &best()),
        profile("c", &[keeping(&[0])], &[], &best()),
    ];
    let result = scheduler(&handler, profiles).schedule(&rig.cycle()).unwrap();
    let ran: Vec<_> = result.results.0.iter().map(|(name, run)| (&**name, run.is_some())).collect();
    assert_eq!(ran, [("a", true), ("b", false), ("c", true)]);
    let firsts: Vec<_> = result.firsts().map(|(name, at)| (&**name, at)).collect();
    assert_eq!(firsts, [("a", 1), ("c", 0)]);
}

#[test]
fn destinations_are_joined_best_first() {
    let rig = Rig::new(vec![scraped(); 3]);
    let go = |port| {
        let handles: Handle = |_, results| if results.0.is_empty() { vec![0] } else { vec![] };
        let handler: Arc<dyn Plugin> =
            Arc::new(Fake { handles: Some(handles), port, ..Fake::default() });
        let scheduler = scheduler(&handler, vec![profile("p", &[], &[], &picking(&[2, 0]))]);
        scheduler.destination(&rig.cycle(), &scheduler.schedule(&rig.cycle()).unwrap())
    };
    assert_eq!(go(None), "10.0.0.3:8000,10.0.0.1:8000");
    assert_eq!(go(Some(9000)), "10.0.0.3:9000,10.0.0.1:9000");
}

#[derive(Debug)]
struct Noting(String, Arc<Mutex<Vec<String>>>);

impl PluginTimer for Noting {
    fn ran(&self, _: Duration) {
        self.1.lock().unwrap().push(self.0.clone());
    }
}

#[test]
fn every_call_is_timed_once() {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let scorers = [(scoring(&[1.0]), 1.0), (Arc::new(QueueScorer) as _, 1.0)];
    let profiles = vec![profile("p", &[keeping(&[0])], &scorers, &best())];
    let scheduler = scheduler(&single(), profiles).with_timers(|point, plugin| {
        let label = format!("{} {}", point.as_str(), plugin.name);
        // Nobody listens to one of them.
        (label != "Scorer fake").then(|| Arc::new(Noting(label, Arc::clone(&notes))) as _)
    });
    let rig = Rig::new([scraped()]);
    scheduler.schedule(&rig.cycle()).unwrap();
    assert_eq!(
        *notes.lock().unwrap(),
        [
            "ProfilePicker single-profile-handler",
            "Filter fake",
            "Scorer queue-scorer",
            "Picker max-score-picker",
            "ProfilePicker single-profile-handler",
            "ProcessProfilesResults single-profile-handler",
        ]
    );
}

#[test]
fn the_fallback_is_uniform() {
    let rig = Rig::new(vec![waiting(5), Metrics::default(), waiting(0)]);
    fastrand::seed(7);
    let mut counts = [0_u32; 3];
    for _ in 0..3000 {
        counts[fallback_pick(&rig.cycle()).unwrap()] += 1;
    }
    // 1000 expected, standard deviation 26.
    assert!(counts.iter().all(|count| count.abs_diff(1000) < 150), "{counts:?}");
}

/// Any metrics, also such as no engine reports.
fn any_metrics() -> impl Strategy<Value = Metrics> {
    let usage = prop_oneof![
        4 => 0.0..1.0_f64,
        1 => prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(7.0)],
    ];
    let counts = (prop_oneof![0..20_u64, any::<u64>()], 0..20_u64);
    let lora =
        (prop::collection::vec("[a-c]", 0..3), prop::collection::vec("[a-c]", 0..3), 0..4_usize);
    (counts, usage, lora, any::<bool>()).prop_map(
        |((waiting, running), kv_usage, (active, queued, max_active), known)| Metrics {
            waiting,
            running,
            kv_usage,
            lora: LoraMetrics { active, waiting: queued, max_active },
            updated: known.then(|| *crate::epp::scheduling::testing::NOW),
            ..Metrics::default()
        },
    )
}

fn built(registration: crate::epp::plugins::Registration) -> Arc<dyn Plugin> {
    build(registration, json!({})).unwrap()
}

fn all_scorers() -> Vec<Arc<dyn Plugin>> {
    use crate::epp::plugins::*;
    [
        kv_cache_utilization_scorer::REGISTRATION,
        queue_scorer::REGISTRATION,
        running_requests_size_scorer::REGISTRATION,
        load_aware_scorer::REGISTRATION,
        lora_affinity_scorer::REGISTRATION,
    ]
    .map(built)
    .into()
}

fn all_filters() -> Vec<Arc<dyn Plugin>> {
    use crate::epp::plugins::*;
    [
        decode_filter::REGISTRATION,
        prefill_filter::REGISTRATION,
        encode_filter::REGISTRATION,
        by_label_filter::REGISTRATION,
        utilization_detector::REGISTRATION,
    ]
    .map(built)
    .into()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn picks_are_candidates_and_sums_do_not_depend_on_order(
        metrics in prop::collection::vec(any_metrics(), 1..12),
        keeps in prop::collection::btree_set(0..12_usize, 0..12),
        weights in prop::collection::vec(0.0..10.0_f64, 5),
        rotation in 0..5_usize,
        max in 0..5_i64,
        picker in 0..3_usize,
    ) {
        let rig = Rig::new(metrics);
        let kept: Vec<usize> =
            (0..rig.endpoints.len()).filter(|at| keeps.contains(at)).collect();
        let registration = [
            crate::epp::plugins::max_score_picker::REGISTRATION,
            random_picker::REGISTRATION,
            weighted_random_picker::REGISTRATION,
        ][picker];
        let picker = build(registration, json!({"maxNumOfEndpoints": max})).unwrap();
        let mut scorers: Vec<_> = all_scorers().into_iter().zip(weights.clone()).collect();
        let run = |scorers: &[_]| {
            let profiles = vec![profile("p", &[keeping(&kept)], scorers, &picker)];
            scheduler(&single(), profiles).schedule(&rig.cycle())
        };
        let first = run(&scorers);
        scorers.rotate_left(rotation);
        let second = run(&scorers);
        if kept.is_empty() {
            prop_assert_eq!(first.unwrap_err().code, RefusalCode::ResourceExhausted);
            return Ok(());
        }
        let (first, second) = (first.unwrap(), second.unwrap());
        let sums = |result: &SchedulingResult| {
            let mut scored = result.results.get("p").unwrap().scored.clone();
            scored.sort_by_key(|scored| scored.endpoint);
            scored
        };
        let total: f64 = weights.iter().sum();
        prop_assert_eq!(sums(&first).len(), kept.len());
        for (a, b) in sums(&first).iter().zip(sums(&second)) {
            prop_assert_eq!(a.endpoint, b.endpoint);
            prop_assert!((a.score - b.score).abs() < 1e-9);
            prop_assert!(a.score >= 0.0 && a.score <= total + 1e-9);
        }
        let mut targets = first.targets().to_vec();
        prop_assert_eq!(targets.len(), kept.len().min(max.max(1) as usize));
        targets.sort_unstable();
        targets.dedup();
        prop_assert_eq!(targets.len(), first.targets().len(), "picked twice");
        prop_assert!(targets.iter().all(|at| kept.contains(at)));
    }

    #[test]
    fn filters_only_remove(
        roles in prop::collection::vec(
            prop::sample::select(vec!["", "decode", "prefill", "encode", "both", "prefill-decode"]),
            0..12,
        ),
        metrics in prop::collection::vec(any_metrics(), 12),
        before in prop::collection::btree_set(0..12_usize, 0..12),
    ) {
        let labels: Vec<[(&str, &str); 1]> =
            roles.iter().map(|role| [(crate::epp::datalayer::ROLE_LABEL, *role)]).collect();
        let labels: Vec<&[(&str, &str)]> =
            labels.iter().map(|l| if l[0].1.is_empty() { &[] } else { &l[..] }).collect();
        let mut rig = Rig::labelled(&labels);
        rig.metrics = metrics.into_iter().take(roles.len()).map(Arc::new).collect();
        let before: Vec<usize> = before.into_iter().filter(|at| *at < roles.len()).collect();
        for filter in all_filters() {
            let mut keep = before.clone();
            filter.filter().unwrap().filter(&rig.cycle(), &mut keep);
            prop_assert!(keep.is_sorted(), "{filter:?} reorders");
            prop_assert!(keep.iter().all(|at| before.contains(at)), "{filter:?} adds");
        }
    }

    /// No endpoint that was never scraped is preferred to all that were.
    #[test]
    fn the_unknown_never_win(metrics in prop::collection::vec(any_metrics(), 1..12)) {
        let rig = Rig::new(metrics);
        let known = |at: &usize| rig.metrics[*at].updated.is_some();
        for scorer in all_scorers() {
            // Adapters that nobody reported cannot be had; the strategy invents some.
            if scorer.type_name() == lora_affinity_scorer::REGISTRATION.type_name {
                continue;
            }
            let scores = rig.scores(&*scorer).into_iter().map(clamped).collect::<Vec<_>>();
            let best = |wanted: bool| {
                let among = (0..scores.len()).filter(|at| known(at) == wanted);
                among.map(|at| scores[at]).fold(f64::NAN, f64::max)
            };
            let worst_known = (0..scores.len()).filter(known).map(|at| scores[at]).fold(f64::NAN, f64::min);
            prop_assert!(best(true).is_nan() || best(false).is_nan() || best(false) <= worst_known);
        }
    }
}

#[test]
fn types_are_named_as_configured() {
    assert_eq!(queue_scorer::REGISTRATION.type_name, QueueScorer.type_name());
}
