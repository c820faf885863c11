use super::*;
use crate::{
    epp::{
        plugins::prefix::testing::{Bench, Run, info, text},
        request::PromptForm,
    },
    support::metrics::encode,
};

/// A request of so many tokens.
fn tokens(count: usize) -> InferenceRequest {
    text(&"abcd".repeat(count))
}

/// What the producer says now: requests and tokens in flight, and tokens of the request.
#[track_caller]
fn load(bench: &Bench, plugin: &dyn Plugin, request: InferenceRequest) -> InFlight {
    let mut run = Run::new(&bench.endpoints, request);
    run.produce(plugin);
    run.produced.in_flight(bench.name()).cloned().unwrap()
}

struct Scene {
    bench: Bench,
    plugin: Arc<dyn Plugin>,
}

impl Scene {
    fn new(name: &str, parameters: &str) -> Self {
        let bench = Bench::new(name, 3);
        let plugin = bench.build(REGISTRATION.factory, parameters).unwrap();
        Self { bench, plugin }
    }

    fn route(&self, request: InferenceRequest, picks: &[(&str, usize)]) -> Box<dyn Flight> {
        let mut run = Run::new(&self.bench.endpoints, request);
        run.produce(&*self.plugin);
        run.route(&*self.plugin, picks).unwrap()
    }

    #[track_caller]
    fn check(&self, requests: &[u64], tokens: &[u64]) {
        let load = load(&self.bench, &*self.plugin, text(""));
        assert_eq!((&load.requests[..], &load.tokens[..]), (requests, tokens));
    }
}

#[test]
fn the_first_byte_frees_tokens_and_the_end_the_request() {
    let scene = Scene::new("inflight-first-byte", "{}");
    let mut flight = scene.route(tokens(4), &[("default", 1)]);
    scene.check(&[0, 1, 0], &[0, 4, 0]);
    flight.response_started();
    scene.check(&[0, 1, 0], &[0, 0, 0]);
    flight.response_started();
    drop(flight);
    scene.check(&[0, 0, 0], &[0, 0, 0]);
}

#[test]
fn an_end_without_a_byte_frees_all() {
    let scene = Scene::new("inflight-no-byte", "{}");
    let flights = [scene.route(tokens(4), &[("default", 1)]), scene.route(tokens(3), &[("d", 1)])];
    scene.check(&[0, 2, 0], &[0, 7, 0]);
    let [first, _second] = flights;
    drop(first);
    scene.check(&[0, 1, 0], &[0, 3, 0]);
}

#[test]
fn prefill_is_done_when_the_response_starts() {
    for (parameters, decode) in [("{}", 0), ("{addEstimatedOutputTokens: true}", 10)] {
        let scene = Scene::new("inflight-prefill", parameters);
        let held = if decode == 0 { 4 } else { 10 };
        let mut flight = scene.route(tokens(4), &[("decode", 0), ("prefill", 2)]);
        scene.check(&[1, 0, 1], &[held, 0, held]);
        flight.response_started();
        scene.check(&[1, 0, 0], &[decode, 0, 0]);
        drop(flight);
        scene.check(&[0, 0, 0], &[0, 0, 0]);
    }
}

#[test]
fn profiles_of_one_endpoint_count_each() {
    let scene = Scene::new("inflight-shared", "{addEstimatedOutputTokens: true}");
    let mut flight = scene.route(tokens(4), &[("prefill", 0), ("decode", 0)]);
    scene.check(&[2, 0, 0], &[20, 0, 0]);
    flight.response_started();
    scene.check(&[1, 0, 0], &[10, 0, 0]);
    drop(flight);
    scene.check(&[0, 0, 0], &[0, 0, 0]);
}

#[test]
fn tokens_are_the_formulas() {
    #[track_caller]
    fn check(
        parameters: &str,
        input: usize,
        limit: Option<u64>,
        matches: Option<(u32, u32, u32)>,
        want: u64,
    ) {
        let bench = Bench::new("inflight-formula", 1);
        let plugin = bench.build(REGISTRATION.factory, parameters).unwrap();
        let mut request = tokens(input);
        request.parsed.max_output_tokens = limit;
        let mut run = Run::new(&bench.endpoints, request);
        if let Some((matched, total, block)) = matches {
            let matches = PrefixMatches { total, block, matched: vec![matched] };
            run.produced.set_prefix(&Arc::from("approx-prefix-cache-producer"), matches);
        }
        run.produce(&*plugin);
        let load = run.produced.in_flight(bench.name()).unwrap();
        assert_eq!(load.request_tokens, [want], "{parameters} {input} {limit:?} {matches:?}");
    }
    check("{}", 8, None, None, 8);
    check("{}", 0, None, None, 0);
    let output = "{addEstimatedOutputTokens: true}";
    check(output, 8, None, None, 8 + 12);
    check(output, 8, None, Some((1, 2, 4)), 4 + 12);
    check(output, 8, None, Some((2, 2, 4)), 12);
    check(output, 8, None, Some((0, 2, 4)), 8 + 12);
    check(output, 8, Some(5), None, 8 + 5);
    check(output, 8, Some(0), None, 8);
    check(output, 0, None, None, 0);
    check("{addEstimatedOutputTokens: true, outputRatio: 0}", 8, None, None, 8);
    check("{addEstimatedOutputTokens: true, outputRatio: 0.3}", 5, None, None, 5 + 2);
    let capped = "{addEstimatedOutputTokens: true, maxEstimatedOutputTokens: 7}";
    check(capped, 8, None, None, 8 + 7);
    check(capped, 8, Some(3), None, 8 + 3);
    // Beyond what the index looks at, nothing is cached.
    check("{}", 100, None, Some((2, 2, 4)), 92);
    // A last block that is short counts whole.
    check("{}", 5, None, Some((0, 2, 4)), 8);
    // More matched than there is, and matches of nothing.
    check("{}", 8, None, Some((3, 2, 4)), 0);
    check("{}", 8, None, Some((1, 2, 0)), 8);
    check("{}", 8, None, Some((0, 0, 64)), 8);
}

#[test]
fn real_tokens_are_counted() {
    let bench = Bench::new("inflight-tokens", 1);
    let plugin = bench.build(REGISTRATION.factory, "{}").unwrap();
    for (form, prompt, want) in [
        (PromptForm::Tokens, "[1, 22,333]", 3),
        (PromptForm::TokenLists, "[[1,2],[3]]", 3),
        (PromptForm::Texts, r#"["ab","cd"]"#, 1),
        (PromptForm::Text, r#""12345""#, 2),
    ] {
        let request = crate::epp::plugins::prefix::testing::request(form, prompt);
        assert_eq!(load(&bench, &*plugin, request).request_tokens, [want], "{prompt}");
    }
    let mut run = Run::new(&bench.endpoints, tokens(100));
    run.produced.tokens = Some(crate::epp::scheduling::testing::exact_tokens(&[1, 2, 3]));
    run.produce(&*plugin);
    assert_eq!(run.produced.in_flight("inflight-tokens").unwrap().request_tokens, [3]);
}

#[test]
fn a_new_life_starts_at_zero() {
    let scene = Scene::new("inflight-lives", "{}");
    let flight = scene.route(tokens(4), &[("default", 0)]);
    let old = Arc::clone(&scene.bench.endpoints.list()[0]);
    let series = "llm_d_epp_inflight_requests{endpoint_name=\"pod-0\",fairness_id=\"default-flow\",\
                  namespace=\"default\",priority=\"0\",producer_name=\"inflight-lives\"}";
    let text = || encode(&scene.bench.registry).unwrap();
    assert!(text().contains(&format!("{series} 1\n")), "{}", text());
    let stale = {
        let mut run = Run::new(&scene.bench.endpoints, tokens(4));
        run.produce(&*scene.plugin);
        run
    };
    scene.bench.endpoints.remove(&old.info().name);
    scene.plugin.endpoint_removed(&old);
    assert!(!text().contains(series));
    // Was scheduled before the removal and is routed after it.
    drop(stale.route(&*scene.plugin, &[("default", 0)]));
    assert_eq!(scene_len(&scene), 0);

    scene.bench.endpoints.upsert(info(0));
    scene.check(&[0, 0, 0], &[0, 0, 0]);
    let second = scene.route(tokens(5), &[("default", 0)]);
    drop(flight);
    scene.check(&[1, 0, 0], &[5, 0, 0]);
    assert!(text().contains(&format!("{series} 1\n")), "{}", text());
    drop(second);
    scene.check(&[0, 0, 0], &[0, 0, 0]);
    assert!(text().contains(&format!("{series} 0\n")), "{}", text());
}

/// Endpoints with counters.
fn scene_len(scene: &Scene) -> usize {
    let plugin: &dyn std::any::Any = &*scene.plugin;
    plugin.downcast_ref::<InFlightLoadProducer>().unwrap().counters.read().all().count()
}

#[test]
fn flows_without_end_share_a_series() {
    let scene = Scene::new("inflight-flows", "{}");
    let mut flights = Vec::new();
    for flow in 0..1010 {
        let mut request = tokens(1);
        request.fairness_id = Arc::from(format!("flow-{flow}"));
        flights.push(scene.route(request, &[("default", 0)]));
    }
    let text = encode(&scene.bench.registry).unwrap();
    let own = text.lines().filter(|line| line.contains("_requests{") && line.contains("flow-"));
    assert_eq!(own.count(), MAX_FLOWS);
    let other = "_requests{endpoint_name=\"pod-0\",fairness_id=\"other\",namespace=\"default\",\
                 priority=\"0\",producer_name=\"inflight-flows\"} 10\n";
    assert!(text.contains(other), "{text}");
    scene.check(&[1010, 0, 0], &[1010, 0, 0]);
    drop(flights);
    scene.check(&[0, 0, 0], &[0, 0, 0]);
}

#[test]
fn threads_leave_nothing_behind() {
    let scene = Scene::new("inflight-threads", "{}");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let scene = &scene;
            scope.spawn(move || {
                for round in 0..300 {
                    let mut flight =
                        scene.route(tokens(round), &[("decode", thread % 3), ("prefill", 1)]);
                    if round % 2 == 0 {
                        flight.response_started();
                    }
                }
            });
        }
    });
    scene.check(&[0, 0, 0], &[0, 0, 0]);
}

#[test]
fn wrong_parameters_are_named() {
    let bench = Bench::new("inflight-wrong", 0);
    let check = |parameters, want| bench.refuses(REGISTRATION.factory, parameters, want);
    check("{outputRatio: -1}", "outputRatio: -1 is out of range");
    check("{maxEstimatedOutputTokens: -1}", "maxEstimatedOutputTokens: -1 is out of range");
    check("{prefixMatchInfoProducerName: nobody}", "prefixMatchInfoProducerName: there is no");
    check("{outputRation: 1}", "did you mean `outputRatio`?");
}

#[test]
fn what_it_reads_goes_first() {
    let scene = Scene::new("inflight-consumes", "{}");
    assert_eq!(scene.plugin.consumes(), []);
    let approx = DataKey::Prefix(Arc::from("approx-prefix-cache-producer"));
    assert_eq!(scene.plugin.may_consume(), [DataKey::Tokens, approx]);

    let mut bench = Bench::new("inflight-consumes-named", 1);
    let own = crate::epp::plugins::prefix_cache_scorer::REGISTRATION.factory;
    let scorer = bench.build(own, "{blockSize: 64}").unwrap();
    bench.others.push((Arc::from("mine"), scorer));
    let named = "{prefixMatchInfoProducerName: mine}";
    let plugin = bench.build(REGISTRATION.factory, named).unwrap();
    assert_eq!(plugin.consumes(), [DataKey::Prefix(Arc::from("mine"))]);
}
