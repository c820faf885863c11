use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use super::*;
use crate::{
    epp::{
        datalayer::EndpointId,
        plugins::{
            Factory, disagg_profile_handler, inflight_load_producer, max_score_picker,
            precise_prefix_cache_producer,
            prefix::testing::{Bench, Run, request, text},
            prefix_based_pd_decider, prefix_cache_scorer, single_profile_handler,
            token_load_scorer,
        },
        precise::{Addressing, RowState, SpeculationId, accuracy::DecidedBy},
        request::PromptForm,
        scheduling::{
            Scheduler, Scored,
            testing::{exact_tokens, profile},
        },
    },
    hash::{Algorithm, Scheme},
    model::{PodState, RequestKey},
    support::metrics::encode,
};

/// An index that holds what it is told, with blocks of 16 tokens.
#[derive(Debug, Default)]
struct Fake {
    world: Mutex<World>,
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct World {
    held: HashMap<EndpointId, HashSet<RequestKey>>,
    states: HashMap<EndpointId, RowState>,
    expected: HashMap<SpeculationId, (EndpointId, HashSet<RequestKey>)>,
    extended: usize,
    error: Option<IndexError>,
    unknown: bool,
    impediments: Vec<String>,
}

const LIVE: RowState = RowState { state: PodState::Live, stale: false };

impl Fake {
    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        lock(&self.world)
    }

    /// The endpoint holds the first blocks of these tokens.
    fn store(&self, endpoint: &Endpoint, tokens: &[u32]) {
        let scheme = Scheme::new(Algorithm::Xxh3, "", 16);
        let keys = Prompt { model: "model", tokens, ..Prompt::default() }.keys(&scheme).unwrap();
        self.world().held.entry(endpoint.id()).or_default().extend(keys);
    }

    fn row(&self, query: &Query, endpoint: &Endpoint) -> EndpointMatch {
        let world = self.world();
        let id = endpoint.id();
        let held = world.held.get(&id);
        let confirmed = |key: &RequestKey| held.is_some_and(|held| held.contains(key));
        let expected = |key: &RequestKey| {
            world.expected.values().any(|(at, keys)| *at == id && keys.contains(key))
        };
        let leading = |has: &dyn Fn(&RequestKey) -> bool| {
            query.prompts.iter().map(|p| p.iter().take_while(|key| has(key)).count()).sum::<usize>()
        };
        let depth = leading(&|key| confirmed(key) || expected(key)) as u32;
        let confirmed = leading(&confirmed) as u32;
        EndpointMatch {
            depth,
            confirmed,
            score: f64::from(confirmed) + 0.5 * f64::from(depth - confirmed),
            state: Some(world.states.get(&id).copied().unwrap_or(LIVE)),
        }
    }
}

impl PrefixIndex for Fake {
    fn addressing(&self, served: &str) -> Option<Addressing> {
        let scheme = Arc::new(Scheme::new(Algorithm::Xxh3, "", 16));
        let known = !self.world().unknown;
        known.then(|| Addressing { model: Arc::from(served), lora: Arc::from(""), scheme })
    }

    fn score<'a>(
        &'a self,
        query: &'a Query,
        endpoints: &'a [Arc<Endpoint>],
    ) -> BoxFuture<'a, Result<Vec<EndpointMatch>, IndexError>> {
        let error = self.world().error.clone();
        let rows = || endpoints.iter().map(|endpoint| self.row(query, endpoint)).collect();
        let rows = error.map_or_else(|| Ok(rows()), Err);
        Box::pin(async move { rows })
    }

    fn speculate(&self, query: &Query, endpoint: &Endpoint, _: Duration) -> Option<SpeculationId> {
        let id = SpeculationId(self.next.fetch_add(1, Relaxed));
        let keys = query.prompts.iter().flatten().copied().collect();
        self.world().expected.insert(id, (endpoint.id(), keys));
        Some(id)
    }

    fn extend(&self, _: SpeculationId, _: Duration) {
        self.world().extended += 1;
    }

    fn take_back(&self, entry: SpeculationId) {
        self.world().expected.remove(&entry);
    }

    fn impediments(&self, _: &str) -> Vec<String> {
        self.world().impediments.clone()
    }
}

thread_local! {
    static FAKE: RefCell<Arc<Fake>> = RefCell::default();
    static INDEX: RefCell<Option<Index>> = const { RefCell::new(None) };
}

fn start_fake(
    index: &Index,
    _: &Arc<Endpoints>,
    _: &Registry,
) -> anyhow::Result<(Arc<dyn PrefixIndex>, Task)> {
    INDEX.set(Some(index.clone()));
    let index = FAKE.with_borrow(Arc::clone);
    Ok((index, Box::new(|_| Box::pin(async { Ok(()) }))))
}

const SCORER: Option<Factory> =
    Some(|params, building| build_on(start_fake, TYPE, params, building));
const PRODUCER: Option<Factory> = Some(|params, building| {
    build_on(start_fake, precise_prefix_cache_producer::TYPE, params, building)
});

/// Held by tests that compare the counters, which are common to all plugins of a process.
static COUNTERS: Mutex<()> = Mutex::new(());

/// A fake index and a plugin on it.
struct Rig {
    fake: Arc<Fake>,
    bench: Bench,
    plugin: Arc<dyn Plugin>,
}

impl Rig {
    fn new(name: &str, pods: u8, parameters: &str) -> Self {
        Self::of(SCORER, name, pods, parameters)
    }

    fn of(factory: Option<Factory>, name: &str, pods: u8, parameters: &str) -> Self {
        let fake = Arc::new(Fake::default());
        FAKE.set(Arc::clone(&fake));
        let bench = Bench::new(name, pods);
        let plugin = bench.build(factory, parameters).unwrap();
        Self { fake, bench, plugin }
    }

    /// The run of a request with these exact tokens.
    fn run(&self, tokens: &[u32]) -> Run {
        let mut run = Run::new(&self.bench.endpoints, text("x"));
        run.produced.tokens = Some(exact_tokens(tokens));
        self.produce(&mut run);
        run
    }

    fn produce(&self, run: &mut Run) {
        let producer = self.plugin.producer().unwrap();
        if let Some(future) = producer.produce(&run.request, &run.endpoints, &mut run.produced) {
            block_on(future);
        }
    }

    /// The same within a runtime.
    async fn run_now(&self, tokens: &[u32]) -> Run {
        let mut run = Run::new(&self.bench.endpoints, text("x"));
        run.produced.tokens = Some(exact_tokens(tokens));
        let producer = self.plugin.producer().unwrap();
        let future = producer.produce(&run.request, &run.endpoints, &mut run.produced);
        future.unwrap().await;
        run
    }

    fn store(&self, pod: usize, tokens: &[u32]) {
        self.fake.store(&self.bench.endpoints.list()[pod], tokens);
    }

    fn state(&self, pod: usize, state: PodState, stale: bool) {
        let id = self.bench.endpoints.list()[pod].id();
        self.fake.world().states.insert(id, RowState { state, stale });
    }

    fn counted(&self, series: &str) -> u64 {
        let page = encode(&self.bench.registry).unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0, |value| value.trim().parse().unwrap())
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn tokens(count: u32) -> Vec<u32> {
    (0..count).collect()
}

#[track_caller]
fn close(got: &[f64], want: &[f64]) {
    let close = got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-9);
    assert!(close, "{got:?} is not {want:?}");
}

#[test]
fn scores_are_the_formulas() {
    /// Of 160 tokens, ten blocks, the first pod holds all, the second four blocks, the third none.
    #[track_caller]
    fn check(parameters: &str, want: &[f64]) {
        let rig = Rig::new("precise-formula", 3, parameters);
        rig.store(0, &tokens(160));
        rig.store(1, &tokens(64));
        close(&rig.run(&tokens(165)).score(&*rig.plugin), want);
    }
    check("{}", &[1.0, 0.4, 0.0]);
    check("{scoreNormalization: minmax}", &[1.0, 0.4, 0.0]);
    check("{minMatchTokens: 64}", &[1.0, 0.4, 0.0]);
    check("{minMatchTokens: 65}", &[1.0, 0.0, 0.0]);
    check("{matchLengthWeight: 1, matchLengthScaleTokens: 128}", &[1.0, 0.25, 0.0]);
    check("{matchLengthWeight: 0.5, matchLengthScaleTokens: 128}", &[1.0, 0.325, 0.0]);
}

#[test]
fn minmax_is_over_the_candidates() {
    #[track_caller]
    fn check(among: &[usize], want: &[f64]) {
        let rig = Rig::new("precise-minmax", 3, "{scoreNormalization: minmax}");
        rig.store(0, &tokens(160));
        rig.store(1, &tokens(64));
        let run = rig.run(&tokens(160));
        let matches = run.produced.prefix("precise-minmax").unwrap();
        let answer = run.produced.kept::<Answer>("precise-minmax").unwrap();
        let mut scores = vec![0.0; among.len()];
        assert_eq!((matches.total, answer.rows.len()), (10, 3));
        run.with(|cycle| rig.plugin.scorer().unwrap().score(cycle, among, &mut scores));
        close(&scores, want);
    }
    check(&[0, 1], &[1.0, 0.0]);
    check(&[1, 2], &[1.0, 0.0]);
    check(&[1], &[1.0]);
    check(&[2], &[0.0]);
    check(&[], &[]);
}

#[test]
fn rows_are_worth_what_they_can_be_trusted_for() {
    #[track_caller]
    fn check(state: PodState, stale: bool, parameters: &str, want: f64) {
        let rig = Rig::new("precise-trust", 1, parameters);
        rig.store(0, &tokens(32));
        rig.state(0, state, stale);
        let run = rig.run(&tokens(32));
        close(&run.score(&*rig.plugin), &[want]);
        let matched = &run.produced.prefix("precise-trust").unwrap().matched;
        assert_eq!(matched[..], [if want > 0.0 { 2 } else { 0 }], "{state:?}");
    }
    check(PodState::Live, false, "{}", 1.0);
    check(PodState::Partial, false, "{}", 1.0);
    check(PodState::Degraded, false, "{}", 0.7);
    check(PodState::Replaying, false, "{}", 0.7);
    check(PodState::Connecting, false, "{}", 1.0);
    check(PodState::Live, true, "{}", 0.0);
    check(PodState::Live, true, "{stateWeights: {stale: 0.2}}", 0.2);
    check(PodState::Degraded, false, "{stateWeights: {degraded: 0.5}}", 0.5);
}

#[test]
fn without_tokens_or_answer_matches_are_approximate() {
    let rig = Rig::new("precise-fallback", 2, "{}");
    let long = "word ".repeat(200);
    let run = |tokens: Option<&[u32]>, exact: bool| {
        let mut run = Run::new(&rig.bench.endpoints, text(&long));
        run.produced.tokens = tokens.map(exact_tokens);
        if let Some(tokens) = &mut run.produced.tokens {
            tokens.exact = exact;
        }
        rig.produce(&mut run);
        run
    };
    // A precise one keeps the approximate matches warm.
    let precise = run(Some(&tokens(64)), true);
    assert_eq!(precise.score(&*rig.plugin), [0.0, 0.0]);
    assert!(precise.produced.prefix("precise-fallback/approximate").is_none(), "not looked up");
    precise.route(&*rig.plugin, &[("default", 1)]);
    #[track_caller]
    fn falls_back(rig: &Rig, run: &Run, reason: &str) {
        assert_eq!(run.score(&*rig.plugin), [0.0, 1.0], "{reason}");
        let series = format!("epp_precise_fallback_total{{reason=\"{reason}\"}}");
        assert!(rig.counted(&series) > 0, "{series}");
    }
    falls_back(&rig, &run(None, true), "no_tokens");
    falls_back(&rig, &run(Some(&tokens(64)), false), "estimated");
    rig.fake.world().error = Some(IndexError::Deadline);
    falls_back(&rig, &run(Some(&tokens(64)), true), "deadline");
    rig.fake.world().unknown = true;
    falls_back(&rig, &run(Some(&tokens(64)), true), "unknown_model");
}

#[test]
fn what_can_never_match_is_said_once() {
    let fake = Fake::default();
    let counter = IntCounterVec::new(Opts::new("reasons", "help"), &["reason"]).unwrap();
    let fallbacks = Fallbacks::new(Arc::from("plugin"), counter);
    let model = Arc::from("m");
    fallbacks.count("m", "late");
    fallbacks.seen(&model);
    fallbacks.count("m", "late");
    fallbacks.look(&fake, &Expected::default());
    assert_eq!(fallbacks.said("m"), [""; 0]);
    fallbacks.count("m", "no_tokenizer");
    fallbacks.count("m", "no_tokenizer");
    assert_eq!(fallbacks.said("m"), ["no tokenizer is configured for it"]);
    fake.world().impediments = vec!["events are off".to_owned()];
    fallbacks.look(&fake, &Expected { block: Some(64), ..Expected::default() });
    let said = fallbacks.said("m");
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said.iter().any(|text| text.starts_with("tokenProcessorConfig is not")), "{said:?}");
    fake.world().impediments.clear();
    fake.world().unknown = true;
    fallbacks.look(&fake, &Expected::default());
    assert_eq!(fallbacks.said("m").len(), 4);
    for names in ["a, b", "b, c"] {
        fake.world().impediments = vec![format!("some have no pod: {names}")];
        fallbacks.look(&fake, &Expected::default());
        assert_eq!(fallbacks.said("m").len(), 5);
    }
    // No more than so many, whatever the index says.
    fake.world().impediments = (0..99).map(|number| number.to_string()).collect();
    fallbacks.look(&fake, &Expected::default());
    assert_eq!(fallbacks.said("m").len(), 16);
}

#[test]
fn speculation_ends_as_the_request_does() {
    let _alone = lock(&COUNTERS);
    const DONE: Ending<'_> =
        Ending { completed: true, status: Some(200), usage: None, served: None };
    let rig = Rig::new("precise-speculation", 2, "{speculativeIndexing: true}");
    let prompt = tokens(64);
    let route = || rig.run(&prompt).route(&*rig.plugin, &[("decode", 0), ("prefill", 1)]).unwrap();
    let open = || rig.fake.world().expected.len();
    let counted = |outcome: &str| {
        rig.counted(&format!("epp_precise_speculative_total{{outcome=\"{outcome}\"}}"))
    };
    let made = counted("made");
    let mut flight = route();
    assert_eq!((open(), counted("made") - made), (2, 2));
    close(&rig.run(&prompt).score(&*rig.plugin), &[0.5, 0.5]);
    let mut report = Report::default();
    // Another one's end does not touch it.
    drop(route());
    assert_eq!(open(), 2);
    flight.response_started();
    flight.ended(&DONE, &mut report);
    drop(flight);
    assert_eq!(open(), 2, "events are to confirm it");

    let back = counted("taken_back");
    for (started, ending, taken) in [
        (false, Ending { completed: false, ..DONE }, true),
        (true, Ending { completed: false, ..DONE }, false),
        (true, Ending { status: Some(500), ..DONE }, true),
        (false, DONE, false),
    ] {
        rig.fake.world().expected.clear();
        let mut flight = route();
        if started {
            flight.response_started();
        }
        flight.ended(&ending, &mut report);
        drop(flight);
        assert_eq!(open(), if taken { 0 } else { 2 }, "{started} {ending:?}");
    }
    assert_eq!(counted("taken_back") - back, 4);
}

#[test]
fn pending_entries_are_extended_and_ended_ones_looked_up() {
    let rig = Rig::new("precise-ticks", 2, "{speculativeIndexing: true}");
    let counter = IntCounterVec::new(Opts::new("outcomes", "help"), &["outcome"]).unwrap();
    let index: Arc<dyn PrefixIndex> = rig.fake.clone();
    let speculation = Arc::new(Speculation::new(index, Duration::from_secs(2), &counter));
    let run = rig.run(&tokens(64));
    let query = run.produced.kept::<Answer>("precise-ticks").unwrap().query.clone().unwrap();
    let count = |outcome| counter.with_label_values(&[outcome]).get();
    let mut first = speculation.claim(&query, &run.endpoints[0], 0).unwrap();
    let mut second = speculation.claim(&query, &run.endpoints[1], 0).unwrap();
    block_on(speculation.tick());
    assert_eq!(rig.fake.world().extended, 2);
    first.started();
    block_on(speculation.tick());
    assert_eq!(rig.fake.world().extended, 3);
    rig.store(0, &tokens(48));
    first.ended(false);
    second.ended(false);
    block_on(speculation.tick());
    assert_eq!((count("confirmed"), count("expired"), count("unchecked")), (1, 1, 0));
    assert_eq!(rig.fake.world().extended, 3);
    let entries: Vec<_> =
        (0..100).map(|_| speculation.claim(&query, &run.endpoints[0], 3).unwrap()).collect();
    for mut entry in entries {
        entry.ended(false);
    }
    rig.fake.world().error = Some(IndexError::Open);
    block_on(speculation.tick());
    assert_eq!(count("unchecked"), 100);
}

#[test]
fn what_decided_is_told() {
    #[track_caller]
    fn check(scores: &[f64], held: &[u32], picked: usize, beyond: u32, want: DecidedBy) {
        let scored = scores.iter().enumerate();
        let scored: Vec<_> = scored.map(|(endpoint, &score)| Scored { endpoint, score }).collect();
        assert_eq!(score::decided(&scored, picked, |at| held[at], beyond), want);
    }
    check(&[3.0, 2.0], &[5, 1], 0, 0, DecidedBy::Prefix);
    check(&[3.0, 2.0], &[5, 5], 0, 0, DecidedBy::Load);
    check(&[2.0, 2.0], &[5, 5], 0, 0, DecidedBy::Tie);
    check(&[1.0, 2.0], &[5, 1], 1, 0, DecidedBy::Load);
    check(&[2.0], &[1], 0, 5, DecidedBy::Load);
    check(&[2.0, 2.0, 1.0], &[5, 5, 1], 0, 5, DecidedBy::Prefix);
    check(&[2.0], &[1], 0, 0, DecidedBy::Tie);
}

/// How many of `requests` concurrent ones with a common prefix of 6144 tokens and tails of 64 each of eight
/// pods gets, and the replications.
fn flood(name: &str, parameters: &str, requests: u32) -> (Vec<usize>, u64) {
    let mut rig = Rig::new(name, 8, parameters);
    rig.bench.others.push((Arc::from(name), Arc::clone(&rig.plugin)));
    let named = format!("{{prefixMatchInfoProducerName: {name}}}");
    let load = rig.bench.build(inflight_load_producer::REGISTRATION.factory, &named).unwrap();
    rig.bench.others.push((Arc::from(name), Arc::clone(&load)));
    let mut site = crate::epp::scheduling::testing::Site::default();
    site.plugins.push(crate::epp::scheduling::Configured {
        name: Arc::from(name),
        plugin: Arc::clone(&load),
    });
    let threshold = serde_json::json!({
        "queueThresholdTokens": 16384, "inFlightLoadProducerName": name
    });
    let token_load = site.build(token_load_scorer::REGISTRATION, threshold).unwrap();
    let picker = site.build(max_score_picker::REGISTRATION, serde_json::json!({})).unwrap();
    let handler = site.build(single_profile_handler::REGISTRATION, serde_json::json!({})).unwrap();
    let filters: Vec<_> = rig.plugin.filter().iter().map(|_| Arc::clone(&rig.plugin)).collect();
    let scorers = [(Arc::clone(&rig.plugin), 3.0), (token_load, 2.0)];
    let profile = profile("default", &filters, &scorers, &picker);
    let scheduler =
        Scheduler::new(crate::epp::scheduling::testing::configured(&handler), vec![profile]);
    let mut shares = vec![0; 8];
    let mut flights = Vec::new();
    let before = rig.counted("epp_precise_replications_total");
    for number in 0..requests {
        let mut prompt = tokens(6144);
        prompt.extend((0..64).map(|tail| 1_000_000 + number * 64 + tail));
        let mut run = rig.run(&prompt);
        run.produce(&*load);
        let result = run.with(|cycle| scheduler.schedule(cycle)).unwrap();
        let pod = result.targets()[0];
        shares[pod] += 1;
        for plugin in [&rig.plugin, &load] {
            let mut headers = HeaderEdits::new();
            let hook = plugin.pre_request().unwrap();
            let flight = run.with(|cycle| hook.pre_request(cycle, &result, &mut headers));
            flights.extend(flight.unwrap());
        }
    }
    (shares, rig.counted("epp_precise_replications_total") - before)
}

#[test]
fn a_hot_prefix_spreads() {
    let _alone = lock(&COUNTERS);
    let share = |shares: &[usize]| *shares.iter().max().unwrap() as f64 * 8.0 / 500.0;
    let hot = "{speculativeIndexing: true, hotPrefix: true}";
    let (shares, replications) = flood("precise-hot", hot, 500);
    assert!(share(&shares) <= 1.5, "{shares:?}");
    assert!(replications >= 7, "{replications}");
    let cold = "{speculativeIndexing: true}";
    let (shares, replications) = flood("precise-cold", cold, 500);
    assert!(share(&shares) > 4.0, "{shares:?}");
    assert_eq!(replications, 0);
}

#[test]
fn in_flight_tokens_are_freed() {
    let rig = Rig::new("precise-free", 2, "{hotPrefix: {marginTokens: 10}}");
    rig.store(0, &tokens(96));
    let passing = || {
        let run = rig.run(&tokens(112));
        let mut keep = vec![0, 1];
        run.with(|cycle| rig.plugin.filter().unwrap().filter(cycle, &mut keep));
        keep
    };
    assert_eq!(passing(), [0, 1]);
    // What the match saves is 96 tokens.
    let small = Run::route(&rig.run(&[9; 106]), &*rig.plugin, &[("default", 0)]);
    assert_eq!(passing(), [0, 1]);
    let mut large = Run::route(&rig.run(&[9; 1]), &*rig.plugin, &[("default", 0)]).unwrap();
    assert_eq!(passing(), [1]);
    large.response_started();
    assert_eq!(passing(), [0, 1]);
    drop(small);
    assert_eq!(passing(), [0, 1]);
    // A prefill pod computes, and its decode pod does not.
    let split = rig.run(&[9; 500]).route(&*rig.plugin, &[("decode", 0), ("prefill", 1)]);
    assert_eq!(passing(), [0, 1]);
    drop(split);
    assert!(rig.plugin.filter().unwrap().last());
}

#[test]
fn whom_a_filter_leaves_out_counts_for_its_profile_alone() {
    let rig = Rig::new("precise-left-out", 4, "{hotPrefix: true}");
    rig.store(0, &tokens(96));
    let busy = rig.run(&[9; 500]).route(&*rig.plugin, &[("default", 0)]);
    let run = rig.run(&tokens(112));
    let filter = |keep: &[usize]| {
        let mut keep = keep.to_vec();
        run.with(|cycle| rig.plugin.filter().unwrap().filter(cycle, &mut keep));
        keep
    };
    assert_eq!(filter(&[0, 1]), [1]);
    assert_eq!(filter(&[2, 3]), [2, 3]);
    let answer = run.produced.kept::<Answer>("precise-left-out").unwrap();
    assert_eq!([0, 1, 2, 3].map(|at| answer.left_out_for(at)), [0, 6, 0, 0]);
    drop(busy);
}

#[test]
fn a_row_that_nobody_trusts_is_no_loss() {
    #[track_caller]
    fn check(stale: bool, best: u32) {
        let rig = Rig::new("precise-best", 2, "{}");
        rig.store(0, &tokens(160));
        rig.state(0, PodState::Live, stale);
        let run = rig.run(&tokens(160));
        let scored = [0, 1].map(|endpoint| Scored { endpoint, score: 0.0 });
        let picked = crate::epp::scheduling::ProfileRun { picked: vec![1], scored: scored.into() };
        let results = vec![(Arc::from("default"), Some(picked))];
        let results = crate::epp::scheduling::ProfileResults(results);
        let result = SchedulingResult { primary: Arc::from("default"), results };
        let plugin: &dyn std::any::Any = &*rig.plugin;
        let plugin = plugin.downcast_ref::<PrecisePrefixCache>().unwrap();
        let answer = run.produced.kept::<Answer>("precise-best").unwrap();
        let matches = run.produced.prefix("precise-best").unwrap();
        let made = run.with(|cycle| plugin.prediction(cycle, &result, 1, answer, matches)).unwrap();
        assert_eq!((made.best, made.depth, made.disaggregated), (best, 0, false));
    }
    check(false, 10);
    check(true, 0);
}

#[test]
fn what_is_kept_of_an_endpoint_goes_with_it() {
    let rig = Rig::new("precise-removed", 1, "{hotPrefix: true}");
    let endpoint = Arc::clone(&rig.bench.endpoints.list()[0]);
    let mut flight = rig.run(&tokens(64)).route(&*rig.plugin, &[("default", 0)]).unwrap();
    let usage = crate::epp::ext_proc::Usage { prompt: 64, cached: Some(0), ..Default::default() };
    let ending = Ending { completed: true, status: Some(200), usage: Some(usage), served: None };
    flight.ended(&ending, &mut Report::default());
    let series = format!("epp_prefix_prompt_tokens_total{{endpoint=\"{}\"}}", endpoint.info().name);
    assert!(rig.counted(&series) > 0);
    rig.plugin.endpoint_removed(&endpoint);
    assert_eq!(rig.counted(&series), 0);
}

#[test]
fn profiles_and_decider_see_the_same_matches() {
    let rig = Rig::of(PRODUCER, "precise-pd", 2, "{}");
    assert!(rig.plugin.scorer().is_none() && rig.plugin.filter().is_none());
    rig.store(0, &tokens(128));
    let mut site = crate::epp::scheduling::testing::Site::default();
    site.plugins.push(crate::epp::scheduling::Configured {
        name: Arc::from("precise-pd"),
        plugin: Arc::clone(&rig.plugin),
    });
    let named = serde_json::json!({"prefixMatchInfoProducerName": "precise-pd"});
    let scorer = site.build(prefix_cache_scorer::REGISTRATION, named).unwrap();
    let decider = serde_json::json!({
        "prefixMatchInfoProducerName": "precise-pd", "nonCachedTokens": 64
    });
    site.build(prefix_based_pd_decider::REGISTRATION, decider).unwrap();
    let stages = serde_json::json!({"deciders": {"prefill": "prefix-based-pd-decider"}});
    let handler = site.build(disagg_profile_handler::REGISTRATION, stages).unwrap();
    let picker = site.build(max_score_picker::REGISTRATION, serde_json::json!({})).unwrap();
    let both = ["decode", "prefill"]
        .map(|name| profile(name, &[], &[(Arc::clone(&scorer), 1.0)], &picker));
    let scheduler =
        Scheduler::new(crate::epp::scheduling::testing::configured(&handler), both.into());
    // Below and at the decider's threshold.
    let short = rig.run(&tokens(191)).with(|cycle| scheduler.schedule(cycle)).unwrap();
    assert!(!short.results.ran("prefill"));
    let long = rig.run(&tokens(192)).with(|cycle| scheduler.schedule(cycle)).unwrap();
    let [decode, prefill] =
        ["decode", "prefill"].map(|name| long.results.get(name).unwrap().scored.clone());
    assert_eq!(decode, prefill);
    close(&[decode[0].score, decode[1].score], &[8.0 / 12.0, 0.0]);
}

#[track_caller]
fn loads(parameters: &str) -> (Index, Vec<String>) {
    let bench = Bench::new("precise", 0);
    let built = bench.try_build(SCORER, parameters);
    let (_, warnings) = built.unwrap_or_else(|faults| panic!("{parameters}: {faults:?}"));
    (INDEX.take().unwrap(), warnings)
}

#[test]
fn llmds_parameters_load() {
    #[track_caller]
    fn check(parameters: &str) -> embedded::EmbeddedConfig {
        let (index, warnings) = loads(parameters);
        assert_eq!(warnings, [""; 0], "{parameters}");
        match index {
            Index::Embedded(config) => config,
            Index::Service(..) => panic!("no service is named"),
        }
    }
    let config = check("{}");
    assert_eq!(*config.models.default, Scheme::new(Algorithm::Xxh3, "", 16));
    assert_eq!(config.tiers, [("gpu".to_owned(), 1.0), ("cpu".to_owned(), 0.8)]);
    assert_eq!((config.socket_port, config.replay_port, config.discover_pods), (5557, None, true));
    assert_eq!((config.unlisted_weight, config.speculative_weight), (1.0, 0.5));
    let config = check(
        "{tokenProcessorConfig: {blockSizeTokens: 64, hashSeed: '42', hashAlgorithm: xxh64}, \
         speculativeIndexing: true, speculativeWeight: 0.25}",
    );
    assert_eq!(*config.models.default, Scheme::new(Algorithm::Xxh64, "42", 64));
    assert_eq!(config.speculative_weight, 0.25);
    check("{speculativeIndexing: true, speculativeTTL: 2s, scoreNormalization: minmax}");
    let config = check(
        "{indexerConfig: {kvBlockIndexConfig: {enableMetrics: true, \
         inMemoryConfig: {size: 1e8}, metricsLoggingInterval: 60000000000}, \
         kvCacheBackendConfigs: [{name: GPU, weight: 1.0}, {name: disk, weight: 0.3}]}}",
    );
    assert_eq!(config.cap_bytes, 3_200_000_000);
    assert_eq!(config.tiers, [("gpu".to_owned(), 1.0), ("disk".to_owned(), 0.3)]);
    let config = check("{indexerConfig: {kvBlockIndexConfig: {costAwareMemoryConfig: {}}}}");
    assert_eq!(config.cap_bytes, 2 << 30);
    let config = check(
        "{kvEventsConfig: {topicFilter: 'kv', concurrency: 3, engineType: sglang, \
         podDiscoveryConfig: {socketPort: 5556, replaySocketPort: 5558}}}",
    );
    assert_eq!(
        (config.socket_port, config.replay_port, config.discover_pods),
        (5556, Some(5558), true)
    );
    assert_eq!((&*config.topic_filter, &*config.engine, config.lanes), ("kv", "sglang", 3));
    let config = check("{kvEventsConfig: {zmqEndpoint: 'tcp://*:5557'}}");
    assert_eq!((config.bind.as_deref(), config.discover_pods), (Some("tcp://*:5557"), false));
}

#[test]
fn a_service_has_its_own_settings() {
    let (index, warnings) = loads(
        "{indexerService: {address: 'indexer:50051', deadline: 8ms, tls: {ca: /ca, serverName: i}}, \
         tokenProcessorConfig: {blockSizeTokens: 32}, kvEventsConfig: {concurrency: 1}, \
         indexerConfig: {kvCacheBackendConfigs: [{name: gpu, weight: 1}]}}",
    );
    let Index::Service(config, expected) = index else { panic!("a service is named") };
    assert_eq!(config.deadline, Duration::from_millis(8));
    assert_eq!((config.failures, config.half_open), (5, Duration::from_millis(250)));
    assert_eq!(config.tls.unwrap().server_name.as_deref(), Some("i"));
    assert_eq!(expected.block, Some(32));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    for (parameters, tls) in [
        ("{indexerService: {address: a, tls: true}}", true),
        ("{indexerService: {address: a, tls: false}}", false),
        ("{indexerService: {address: a}}", false),
    ] {
        let (Index::Service(config, _), _) = loads(parameters) else { panic!("{parameters}") };
        assert_eq!(config.deadline, Duration::from_millis(5));
        assert_eq!(config.tls.is_some(), tls, "{parameters}");
    }
}

#[test]
fn parameters_without_effect_are_warned_about() {
    #[track_caller]
    fn check(parameters: &str, want: &[&str]) {
        let (_, warnings) = loads(parameters);
        assert_eq!(warnings.len(), want.len(), "{warnings:?}");
        for (got, want) in warnings.iter().zip(want) {
            assert!(got.starts_with(want), "{got}");
        }
    }
    // The sample of llm-d-inference-scheduler 0.3.
    check(
        "{indexerConfig: {tokenProcessorConfig: {blockSize: 64, hashSeed: '42'}, \
         kvBlockIndexConfig: {enableMetrics: true}}}",
        &["indexerConfig.tokenProcessorConfig.blockSize: is deprecated"],
    );
    check(
        "{indexerConfig: {prefixStoreConfig: {blockSize: 256}, \
         tokenizersPoolConfig: {workersCount: 8, hf: {tokenizersCacheDir: /tmp}}}}",
        &["indexerConfig.prefixStoreConfig: has no", "indexerConfig.tokenizersPoolConfig: has"],
    );
    check("{tokenizersPoolConfig: {modelName: m}}", &["tokenizersPoolConfig: has no effect"]);
    check(
        "{indexerConfig: {kvBlockIndexConfig: {valkeyConfig: {address: 'valkey://a:6379'}}}}",
        &["indexerConfig.kvBlockIndexConfig.valkeyConfig: has no effect: the index is in memory"],
    );
    check("{kvEventsConfig: {discoverPods: false}}", &["kvEventsConfig.discoverPods: is off"]);
    check(
        "{kvEventsConfig: {zmqEndpoint: 'tcp://*:1', podDiscoveryConfig: {socketPort: 2}}}",
        &["kvEventsConfig.podDiscoveryConfig: has no effect on engines that connect"],
    );
    check(
        "{speculativeTTL: 3s, speculativeWeight: 0.7}",
        &["speculativeTTL: has no effect while", "speculativeWeight: has no effect while"],
    );
    check("{speculativeTTL: 2s, speculativeWeight: 0.5}", &[]);
    let bench = Bench::new("precise-producer", 0);
    let built = bench.try_build(PRODUCER, "{scoreNormalization: minmax, minMatchTokens: 16}");
    let (_, warnings) = built.unwrap();
    assert_eq!(warnings, ["scoreNormalization: has no effect: this type ranks nobody"]);
}

#[test]
fn wrong_parameters_are_named() {
    let bench = Bench::new("precise-wrong", 0);
    let check = |parameters, want| bench.refuses(SCORER, parameters, want);
    check("{kvEventConfig: {}}", "did you mean `kvEventsConfig`?");
    check(
        "{tokenProcessorConfig: {}, indexerConfig: {tokenProcessorConfig: {}}}",
        "indexerConfig.tokenProcessorConfig: is also at the top",
    );
    check("{tokenProcessorConfig: {hashSeed: 42}}", "tokenProcessorConfig.hashSeed: expected a");
    check("{speculativeTTL: soon}", "speculativeTTL: \"soon\" is no duration");
    check("{scoreNormalization: relative}", "scoreNormalization: \"relative\" is not one of");
    check("{indexerConfig: {kvCacheBackendConfigs: [{name: gpu}]}}", "[0].weight: missing");
    check("{kvEventsConfig: {podDiscoveryConfig: {port: 1}}}", "podDiscoveryConfig.port: unknown");
    check("{kvEventsConfig: {engineType: trt}}", "kvEventsConfig.engineType: \"trt\" is not");
    check("{indexerService: {deadline: 5ms}}", "indexerService.address: missing");
    check("{indexerService: {address: a, deadline: 5s}}", "indexerService.deadline: 5s is out of");
    check("{indexerService: {address: a, tls: 1}}", "indexerService.tls: expected true, false");
    check(
        "{indexerService: {address: 'https://a:1', tls: false}}",
        "indexerService.tls: is off, but",
    );
    check("{hotPrefix: {margin: 1}}", "hotPrefix.margin: unknown field");
    check("{stateWeights: {live: 2}}", "stateWeights.live: must be a number between 0 and 1");
    check("{accuracy: {usage: true}}", "accuracy.usage: unknown field");
    check("{speculativeWeight: 2}", "speculativeWeight: must be in 0..=1");
}

#[test]
fn token_ids_make_a_prompt_each() {
    let rig = Rig::new("precise-prompts", 1, "{}");
    rig.store(0, &tokens(32));
    let mut run = Run::new(&rig.bench.endpoints, request(PromptForm::TokenLists, "[[1],[2]]"));
    let mut both = exact_tokens(&tokens(40));
    both.prompts.push(vec![7; 20].into());
    run.produced.tokens = Some(both);
    rig.produce(&mut run);
    let matches = run.produced.prefix("precise-prompts").unwrap();
    assert_eq!((matches.total, &matches.matched[..]), (3, &[2][..]));
    // Less than a block: nothing to ask for.
    let short = rig.run(&[1; 15]);
    assert_eq!(short.produced.prefix("precise-prompts").unwrap().total, 0);
    assert_eq!(short.score(&*rig.plugin), [0.0]);
}

#[tokio::test(start_paused = true)]
async fn the_task_extends_until_it_is_told_to_stop() {
    let rig = Rig::new("precise-task", 1, "{speculativeIndexing: true, speculativeTTL: 1s}");
    let stop = CancellationToken::new();
    let task = rig.plugin.task().unwrap()(stop.clone());
    assert!(rig.plugin.task().is_none(), "asked for once");
    let run = rig.run_now(&tokens(64)).await;
    let flight = run.route(&*rig.plugin, &[("default", 0)]);
    let watch = async {
        tokio::time::sleep(Duration::from_millis(1600)).await;
        assert_eq!(rig.fake.world().extended, 3);
        drop(flight);
        tokio::time::sleep(Duration::from_millis(1600)).await;
        assert_eq!(rig.fake.world().extended, 3);
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(task, watch);
    ended.unwrap();
}

/// The first profile's filters and scorers, by type.
fn profile_of(config: &str) -> (Vec<&'static str>, Vec<&'static str>) {
    let mut types = crate::epp::plugins::types();
    types.set(Registration { factory: SCORER, ..REGISTRATION });
    types.set(Registration { factory: PRODUCER, ..precise_prefix_cache_producer::REGISTRATION });
    let parts = crate::epp::config::Parts {
        types: &types,
        endpoints: &Arc::default(),
        metrics: &Registry::new(),
        allow_experimental: false,
        defaults: &[],
    };
    let loaded = crate::epp::config::load(config, &parts).unwrap();
    let profile = &loaded.profiles[0];
    let filters = profile.filters.iter().map(|it| it.plugin.type_name());
    (filters.collect(), profile.scorers.iter().map(|(it, _)| it.plugin.type_name()).collect())
}

#[test]
fn the_filter_runs_last() {
    let config = "{plugins: [{type: precise-prefix-cache-scorer, parameters: {hotPrefix: true}}, \
                  {type: decode-filter}, {type: max-score-picker}], schedulingProfiles: [{name: p, \
                  plugins: [{pluginRef: precise-prefix-cache-scorer}, {pluginRef: decode-filter}]}]}";
    assert_eq!(profile_of(config), (vec!["decode-filter", TYPE], vec![TYPE]));
}

#[test]
fn the_producer_does_not_rank_where_all_plugins_are_the_profile() {
    let config = "{plugins: [{type: precise-prefix-cache-producer}, {type: prefix-cache-scorer, \
                  parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}]}";
    assert_eq!(profile_of(config), (vec![], vec!["prefix-cache-scorer"]));
    let config = "{plugins: [{type: precise-prefix-cache-scorer}]}";
    assert_eq!(profile_of(config), (vec![], vec![TYPE]));
}
