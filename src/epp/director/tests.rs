//! The director with plugins that do what a test says.

use std::{
    fmt,
    future::pending,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use prometheus::Registry;
use serde_json::json;

use super::*;
use crate::{
    epp::{
        datalayer::{EndpointInfo, EndpointName},
        metrics::MetricsOptions,
        plugins::{max_score_picker, single_profile_handler, utilization_detector},
        scheduling::{
            Admitter, BoxFuture, DataKey, DataProducer, Filter, Picker, Plugin, PreRequest,
            SchedulingProfile, Scored, Scorer,
            testing::{build, configured},
        },
    },
    support::{metrics::encode, sync::lock},
};

type ScoreOf = dyn Fn(&Endpoint) -> f64 + Send + Sync;
type Keeps = dyn Fn(&Endpoint) -> bool + Send + Sync;
type Picks = dyn Fn(&mut [Scored]) -> Vec<usize> + Send + Sync;
type Produces = dyn Fn() -> Option<BoxFuture<'static, ()>> + Send + Sync;
type Admits = dyn Fn(&InferenceRequest) -> Result<(), Refusal> + Send + Sync;
type Hears = dyn Fn(&mut HeaderEdits) -> Result<Option<Box<dyn Flight>>, Refusal> + Send + Sync;

/// A plugin with the capabilities whose closures are set.
#[derive(Default)]
struct Fake {
    keeps: Option<Box<Keeps>>,
    score: Option<Box<ScoreOf>>,
    picks: Option<Box<Picks>>,
    produces: Option<Box<Produces>>,
    admits: Option<Box<Admits>>,
    hears: Option<Box<Hears>>,
    wants_usage: bool,
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fake")
    }
}

impl Plugin for Fake {
    fn type_name(&self) -> &'static str {
        "fake"
    }
    fn wants_usage(&self) -> bool {
        self.wants_usage
    }
    fn filter(&self) -> Option<&dyn Filter> {
        self.keeps.is_some().then_some(self as _)
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        self.score.is_some().then_some(self as _)
    }
    fn picker(&self) -> Option<&dyn Picker> {
        self.picks.is_some().then_some(self as _)
    }
    fn producer(&self) -> Option<&dyn DataProducer> {
        self.produces.is_some().then_some(self as _)
    }
    fn admitter(&self) -> Option<&dyn Admitter> {
        self.admits.is_some().then_some(self as _)
    }
    fn pre_request(&self) -> Option<&dyn PreRequest> {
        self.hears.is_some().then_some(self as _)
    }
}

impl Filter for Fake {
    fn filter(&self, cycle: &Cycle<'_>, keep: &mut Vec<usize>) {
        let keeps = self.keeps.as_ref().unwrap();
        keep.retain(|&at| keeps(&cycle.endpoints[at]));
    }
}

impl Scorer for Fake {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let score = self.score.as_ref().unwrap();
        for (&at, out) in among.iter().zip(scores) {
            *out = score(&cycle.endpoints[at]);
        }
    }
}

impl Picker for Fake {
    fn pick(&self, _: &Cycle<'_>, scored: &mut [Scored]) -> Vec<usize> {
        (self.picks.as_ref().unwrap())(scored)
    }
}

impl DataProducer for Fake {
    fn produces(&self, _: &Arc<str>) -> Vec<DataKey> {
        Vec::new()
    }
    fn produce<'a>(
        &'a self,
        _: &'a InferenceRequest,
        _: &'a [Arc<Endpoint>],
        _: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        (self.produces.as_ref().unwrap())()
    }
}

impl Admitter for Fake {
    fn admit(&self, request: &InferenceRequest, _: &[Arc<Endpoint>]) -> Result<(), Refusal> {
        (self.admits.as_ref().unwrap())(request)
    }
}

impl PreRequest for Fake {
    fn pre_request(
        &self,
        _: &Cycle<'_>,
        _: &SchedulingResult,
        headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        (self.hears.as_ref().unwrap())(headers)
    }
}

/// What happened, in order.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn say(&self, text: impl Into<String>) {
        lock(&self.0).push(text.into());
    }
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.0))
    }
}

/// Says what becomes of it.
struct Recorded {
    name: &'static str,
    log: Log,
}

impl Flight for Recorded {
    fn response_headers(&mut self, headers: &mut HeaderEdits) {
        self.log.say(format!("{} headers", self.name));
        headers.set("x-seen-by", self.name);
    }
    fn response_started(&mut self) {
        self.log.say(format!("{} started", self.name));
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.log.say(format!("{} dropped", self.name));
    }
}

#[derive(Debug)]
struct Priorities(&'static [(&'static str, i32)]);

impl Objectives for Priorities {
    fn priority(&self, objective: &str) -> Option<i32> {
        self.0.iter().find(|(name, _)| *name == objective).map(|&(_, priority)| priority)
    }
}

/// A director under construction: pods that are scored by the last number of their address, so that the
/// last one is the best.
struct Bench {
    parts: Parts,
    registry: Registry,
}

fn named(name: &str, fake: Fake) -> Configured {
    Configured { name: name.into(), plugin: Arc::new(fake) }
}

fn info(number: u8) -> EndpointInfo {
    let address = SocketAddr::from(([10, 0, 0, number], 8000));
    EndpointInfo {
        name: EndpointName { namespace: "default".to_owned(), name: format!("pod-{number}") },
        address,
        metrics_address: address,
        labels: Default::default(),
    }
}

/// `10.0.0.3` → 0.3.
fn by_number(endpoint: &Endpoint) -> f64 {
    let std::net::IpAddr::V4(ip) = endpoint.ip() else { unreachable!() };
    f64::from(ip.octets()[3]) / 10.0
}

fn scoring(score: impl Fn(&Endpoint) -> f64 + Send + Sync + 'static) -> Fake {
    Fake { score: Some(Box::new(score)), ..Fake::default() }
}

fn filtering(keeps: impl Fn(&Endpoint) -> bool + Send + Sync + 'static) -> Fake {
    Fake { keeps: Some(Box::new(keeps)), ..Fake::default() }
}

fn picking(picks: impl Fn(&mut [Scored]) -> Vec<usize> + Send + Sync + 'static) -> Fake {
    Fake { picks: Some(Box::new(picks)), ..Fake::default() }
}

fn producing(make: impl Fn() -> Option<BoxFuture<'static, ()>> + Send + Sync + 'static) -> Fake {
    Fake { produces: Some(Box::new(make)), ..Fake::default() }
}

fn admitting(
    admits: impl Fn(&InferenceRequest) -> Result<(), Refusal> + Send + Sync + 'static,
) -> Fake {
    Fake { admits: Some(Box::new(admits)), ..Fake::default() }
}

fn hearing(
    hears: impl Fn(&mut HeaderEdits) -> Result<Option<Box<dyn Flight>>, Refusal> + Send + Sync + 'static,
) -> Fake {
    Fake { hears: Some(Box::new(hears)), ..Fake::default() }
}

fn recording(name: &'static str, log: &Log) -> Fake {
    let log = log.clone();
    hearing(move |_| {
        log.say(format!("{name} heard"));
        Ok(Some(Box::new(Recorded { name, log: log.clone() })))
    })
}

impl Bench {
    fn new(pods: u8) -> Self {
        let registry = Registry::new();
        let metrics = EppMetrics::register(&registry, MetricsOptions::default()).unwrap();
        let endpoints = Arc::new(Endpoints::new());
        endpoints.set((1..=pods).map(info).collect());
        metrics.watch("pool", &endpoints);
        let detector = build(utilization_detector::REGISTRATION, json!({})).unwrap();
        let parts = Parts {
            parsers: Parsers::default(),
            scheduler: scheduler(&[], Some(scoring(by_number)), None),
            producers: Vec::new(),
            admitters: Vec::new(),
            pre_requests: Vec::new(),
            saturation: configured(&detector),
            objectives: Arc::new(NoObjectives),
            endpoints,
            unknown_metrics: UnknownMetrics::default(),
            scrapers: Vec::new(),
            metrics,
            subset_hint: true,
            emit_scores: false,
        };
        Self { parts, registry }
    }

    fn with(mut self, change: impl FnOnce(&mut Parts)) -> Self {
        change(&mut self.parts);
        self
    }

    fn ready(self) -> Ready {
        let endpoints = Arc::clone(&self.parts.endpoints);
        Ready { director: Director::new(self.parts), registry: self.registry, endpoints }
    }
}

fn scheduler(filters: &[fn() -> Fake], scorer: Option<Fake>, picker: Option<Fake>) -> Scheduler {
    let handler = build(single_profile_handler::REGISTRATION, json!({})).unwrap();
    let best = || configured(&build(max_score_picker::REGISTRATION, json!({})).unwrap());
    let profile = SchedulingProfile {
        name: "default".into(),
        filters: filters.iter().map(|filter| named("filter", filter())).collect(),
        scorers: scorer.into_iter().map(|scorer| (named("scorer", scorer), 1.0)).collect(),
        picker: picker.map_or_else(best, |picker| named("picker", picker)),
    };
    Scheduler::new(configured(&handler), vec![profile])
}

struct Ready {
    director: Director,
    registry: Registry,
    endpoints: Arc<Endpoints>,
}

/// A completion with these headers.
fn completion(headers: &[(&str, &str)]) -> Inbound {
    body(r#"{"model":"m","prompt":"hello"}"#, headers)
}

fn body(body: &'static str, headers: &[(&str, &str)]) -> Inbound {
    let pairs = headers
        .iter()
        .map(|&(name, value)| (name.to_owned(), Bytes::copy_from_slice(value.as_bytes())));
    Inbound {
        headers: HeaderList::from_pairs(pairs),
        body: Bytes::from_static(body.as_bytes()),
        ..Inbound::default()
    }
}

impl Ready {
    fn decide(&self, inbound: Inbound) -> Decision {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(self.director.route(inbound, Instant::now()))
    }

    #[track_caller]
    fn routed(&self, inbound: Inbound) -> Routed {
        self.decide(inbound).answer.unwrap()
    }

    /// The destination's number: 3 for `10.0.0.3:8000`.
    #[track_caller]
    fn pod(&self, inbound: Inbound) -> u8 {
        let routed = self.routed(inbound);
        let address: SocketAddr = routed.destination.parse().unwrap();
        let std::net::IpAddr::V4(ip) = address.ip() else { unreachable!() };
        ip.octets()[3]
    }

    #[track_caller]
    fn refused(&self, inbound: Inbound) -> Refusal {
        self.decide(inbound).answer.unwrap_err()
    }

    /// The sum of the series of `name` with all these labels.
    fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let page = encode(&self.registry).unwrap();
        page.lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|rest| rest.starts_with(['{', ' ']))
            .filter(|rest| labels.iter().all(|label| rest.contains(label)))
            .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

const NO_CANDIDATES: &str = "failed to find endpoint candidates for serving the request";

#[test]
fn what_the_client_did_wrong_is_said_before_candidates_are_looked_for() {
    #[track_caller]
    fn check(pods: u8, inbound: Inbound, code: RefusalCode, message: &str) {
        let ready = Bench::new(pods).ready();
        let refusal = ready.refused(inbound);
        assert_eq!((refusal.code, &*refusal.message, refusal.reason), (code, message, None));
        let label = format!("error_code=\"{code}\"");
        for family in ["llm_d_epp_request_error_total", "inference_objective_request_error_total"] {
            assert_eq!(ready.metric(family, &[&label, r#"model_name="""#]), 1.0, "{family}");
        }
        assert_eq!(ready.metric("llm_d_epp_request_total", &[]), 0.0);
        let status = format!("code=\"{}\"", code.status());
        assert_eq!(ready.metric("epp_immediate_responses_total", &[&status]), 1.0);
    }
    let bad = RefusalCode::BadRequest;
    for pods in [0, 2] {
        let missing = "model not found in request body";
        check(pods, body(r#"{"prompt":"hello world"}"#, &[]), bad, missing);
        // A header does not stand in for what the body lacks.
        let headers = [("x-gateway-model-name-rewrite", "t")];
        check(pods, body(r#"{"prompt":"hello world"}"#, &headers), bad, missing);
        let text = "error unmarshaling request bodyMap: invalid character 'o' in literal null (expecting 'u')";
        check(pods, body("no healthy upstream", &[]), bad, text);
        let text = "error unmarshaling request bodyMap: unexpected end of JSON input";
        check(pods, body("", &[]), bad, text);
        let text = "invalid completions request: must have prompt field";
        check(pods, body(r#"{"model":"m"}"#, &[]), bad, text);
    }
}

#[test]
fn steps_run_in_order() {
    let log = Log::default();
    let (a, b, c, d) = (log.clone(), log.clone(), log.clone(), log.clone());
    let ready = Bench::new(2)
        .with(|parts| {
            let produces = producing(move || {
                a.say("produce");
                None
            });
            let admits = admitting(move |_| {
                b.say("admit");
                Ok(())
            });
            let scores = scoring(move |_| {
                c.say("score");
                0.5
            });
            parts.producers = vec![named("p", produces)];
            parts.admitters = vec![named("a", admits)];
            parts.scheduler = scheduler(&[], Some(scores), None);
            parts.pre_requests = vec![named("h", recording("hook", &d))];
        })
        .ready();
    let decision = ready.decide(completion(&[]));
    assert!(decision.answer.is_ok());
    assert_eq!(log.take(), ["produce", "admit", "score", "score", "hook heard"]);
    drop(decision);
    // Nobody is asked when the pool is empty.
    log.take();
    ready.endpoints.set(Vec::new());
    assert_eq!(ready.refused(completion(&[])).code, RefusalCode::ServiceUnavailable);
    assert!(log.take().is_empty());
}

#[test]
fn the_subset_hint_is_obeyed() {
    #[track_caller]
    fn check(obeyed: bool, subset: Option<&[&str]>, want: Option<u8>) {
        let ready = Bench::new(3).with(|parts| parts.subset_hint = obeyed).ready();
        let subset = subset.map(|list| list.iter().map(|&text| text.to_owned()).collect());
        let inbound = Inbound { subset, ..completion(&[]) };
        match want {
            Some(pod) => assert_eq!(ready.pod(inbound), pod),
            None => {
                let refusal = ready.refused(inbound);
                assert_eq!(refusal.code, RefusalCode::ServiceUnavailable);
                assert_eq!(refusal.message, NO_CANDIDATES);
                assert_eq!(refusal.reason, Some(DropReason::RejectedNoEndpoints));
                let labels = [r#"error_code="ServiceUnavailable""#, r#"model_name="m""#];
                assert_eq!(ready.metric("llm_d_epp_request_error_total", &labels), 1.0);
            }
        }
    }
    check(true, None, Some(3));
    check(true, Some(&["10.0.0.1:8000", "10.0.0.2:8000"]), Some(2));
    // The best one, the rest unknown, the port of no matter, no port at all.
    check(true, Some(&["10.0.0.9:8000", "10.0.0.1:8000"]), Some(1));
    check(true, Some(&["10.0.0.1:1"]), Some(1));
    check(true, Some(&["10.0.0.2"]), Some(2));
    check(true, Some(&["10.0.0.9:8000"]), None);
    check(true, Some(&["nonsense"]), None);
    check(true, Some(&[]), None);
    check(false, Some(&["10.0.0.1:8000"]), Some(3));
    check(false, Some(&[]), Some(3));
}

#[test]
fn an_empty_pool_has_nobody() {
    let ready = Bench::new(0).ready();
    let refusal = ready.refused(completion(&[]));
    let expected = Refusal::new(RefusalCode::ServiceUnavailable, NO_CANDIDATES)
        .because(DropReason::RejectedNoEndpoints);
    assert_eq!(refusal, expected);
    let bare = Inbound { header_only: true, ..Inbound::default() };
    let refusal = ready.refused(bare);
    assert_eq!(refusal.to_string(), "Internal - no pods available in datastore");
    assert_eq!(refusal.reason, None);
    let labels = [r#"error_code="Internal""#, r#"model_name="""#];
    assert_eq!(ready.metric("llm_d_epp_request_error_total", &labels), 1.0);
    assert_eq!(ready.metric("epp_immediate_responses_total", &[r#"code="500""#]), 1.0);
}

#[test]
fn requests_without_a_body_go_anywhere_that_is_allowed() {
    let ready = Bench::new(3).ready();
    let bare = || Inbound { header_only: true, ..completion(&[("x-request-id", "r")]) };
    let mut seen = [0; 4];
    for _ in 0..200 {
        seen[usize::from(ready.pod(bare()))] += 1;
    }
    assert!(seen[1..].iter().all(|&count| count > 20), "{seen:?}");
    let hinted = || Inbound { subset: Some(vec!["10.0.0.2:8000".to_owned()]), ..bare() };
    assert!((0..20).all(|_| ready.pod(hinted()) == 2));
    let hidden = Inbound { body_hidden: true, ..completion(&[]) };
    let routed = ready.routed(hidden);
    assert_eq!((routed.body, &*routed.incoming_model), (None, ""));
    assert_eq!(ready.metric("llm_d_epp_request_total", &[]), 0.0);
}

#[test]
fn headers_may_name_another_model() {
    const NEW: (&str, &str) = ("x-llm-d-model-name-rewrite", "new");
    const OLD: (&str, &str) = ("x-gateway-model-name-rewrite", "old");
    #[track_caller]
    fn check(headers: &[(&str, &str)], target: &str, body: Option<&str>) {
        let ready = Bench::new(1).ready();
        let routed = ready.routed(completion(headers));
        assert_eq!((&*routed.incoming_model, &*routed.target_model), ("m", target));
        let text = routed.body.map(|pieces| pieces.concat());
        assert_eq!(text.as_deref(), body.map(str::as_bytes));
        let labels = [r#"model_name="m""#, &format!("target_model_name=\"{target}\"")];
        assert_eq!(ready.metric("llm_d_epp_request_total", &labels), 1.0);
        assert_eq!(ready.metric("inference_objective_request_total", &labels), 1.0);
    }
    check(&[], "m", None);
    check(&[OLD], "old", Some(r#"{"model":"old","prompt":"hello"}"#));
    check(&[OLD, NEW], "new", Some(r#"{"model":"new","prompt":"hello"}"#));
    check(
        &[("x-llm-d-model-name-rewrite", ""), OLD],
        "old",
        Some(r#"{"model":"old","prompt":"hello"}"#),
    );
    check(&[("x-gateway-model-name-rewrite", "m")], "m", None);
    let quoted = [("X-Gateway-Model-Name-Rewrite", r#"a"b"#)];
    let routed = Bench::new(1).ready().routed(completion(&quoted));
    assert_eq!(routed.body.unwrap().concat(), br#"{"model":"a\"b","prompt":"hello"}"#);
}

#[test]
fn streams_are_asked_for_usage_if_a_plugin_wants_it() {
    #[track_caller]
    fn check(wants_usage: bool, inbound: Inbound, want: Option<&str>) {
        let fake = Fake { wants_usage, ..hearing(|_| Ok(None)) };
        let routed = Bench::new(1)
            .with(|parts| parts.pre_requests = vec![named("a", fake)])
            .ready()
            .routed(inbound);
        let text = routed.body.map(|pieces| String::from_utf8(pieces.concat()).unwrap());
        assert_eq!(text.as_deref(), want);
        assert_eq!(routed.hides_usage, want.is_some_and(|text| text.contains("include_usage")));
    }
    let stream = |headers| body(r#"{"model":"m","prompt":"x","stream":true}"#, headers);
    let with =
        r#"{"stream_options":{"include_usage":true},"model":"m","prompt":"x","stream":true}"#;
    check(true, stream(&[]), Some(with));
    check(false, stream(&[]), None);
    check(true, completion(&[]), None);
    check(true, Inbound { response_hidden: true, ..stream(&[]) }, None);
    let other = [("x-llm-d-model-name-rewrite", "t")];
    check(true, stream(&other), Some(&with.replace("\"m\"", "\"t\"")));
    let hidden = Inbound { response_hidden: true, ..stream(&other) };
    check(true, hidden, Some(r#"{"model":"t","prompt":"x","stream":true}"#));
    let own = r#"{"model":"m","prompt":"x","stream":true,"stream_options":{"include_usage":true}}"#;
    check(true, body(own, &[]), None);
}

#[test]
fn what_is_not_read_is_not_rewritten() {
    let ready = Bench::new(1).ready();
    let headers = [(":path", "/v1/foo"), ("x-gateway-model-name-rewrite", "t")];
    let routed = ready.routed(body("passthrough", &headers));
    assert_eq!((routed.body, &*routed.target_model), (None, ""));
    let labels = [r#"model_name="""#, r#"target_model_name="""#];
    assert_eq!(ready.metric("llm_d_epp_request_total", &labels), 1.0);
}

#[test]
fn objectives_give_priorities() {
    #[track_caller]
    fn check(headers: &[(&str, &str)], priority: i32) {
        let priorities = Priorities(&[("high", 7), ("higher", 9)]);
        let ready = Bench::new(1).with(|parts| parts.objectives = Arc::new(priorities)).ready();
        ready.routed(completion(headers));
        let label = format!("priority=\"{priority}\"");
        assert_eq!(ready.metric("llm_d_epp_request_total", &[&label]), 1.0);
    }
    check(&[], 0);
    check(&[("x-gateway-inference-objective", "high")], 7);
    check(
        &[("x-gateway-inference-objective", "high"), ("x-llm-d-inference-objective", "higher")],
        9,
    );
    check(&[("x-llm-d-inference-objective", "unheard-of")], 0);
}

#[test]
fn flows_are_named_by_headers() {
    #[track_caller]
    fn check(headers: &[(&str, &str)], flow: &str) {
        let ready = Bench::new(1).ready();
        ready.routed(completion(headers));
        let label = format!("fairness_id=\"{flow}\"");
        assert_eq!(ready.metric("llm_d_epp_request_total", &[&label]), 1.0);
    }
    check(&[], "default-flow");
    check(&[("x-gateway-inference-fairness-id", "old")], "old");
    check(
        &[("x-gateway-inference-fairness-id", "old"), ("x-llm-d-inference-fairness-id", "new")],
        "new",
    );
    check(&[("x-llm-d-inference-fairness-id", "")], "default-flow");
}

#[test]
fn a_full_pool_sheds_what_may_be_shed() {
    #[track_caller]
    fn check(objective: &str, waiting: u64, shed: bool) {
        let priorities = Priorities(&[("batch", -1), ("zero", 0), ("high", 5)]);
        let ready = Bench::new(2).with(|parts| parts.objectives = Arc::new(priorities)).ready();
        for endpoint in ready.endpoints.list().iter() {
            let updated = Some(Instant::now());
            endpoint.set_metrics(Metrics { waiting, updated, ..Metrics::default() });
        }
        let decision = ready.decide(completion(&[("x-llm-d-inference-objective", objective)]));
        if shed {
            let message = "system saturated, sheddable request dropped";
            let expected = Refusal::new(RefusalCode::ResourceExhausted, message);
            assert_eq!(decision.answer, Err(expected));
            let labels = [r#"error_code="ResourceExhausted""#, r#"priority="-1""#];
            assert_eq!(ready.metric("llm_d_epp_request_error_total", &labels), 1.0);
        } else {
            assert!(decision.answer.is_ok(), "{decision:?}");
        }
    }
    // The threshold is 5.
    check("batch", 4, false);
    check("batch", 5, true);
    for objective in ["zero", "high", "unheard-of"] {
        check(objective, 500, false);
    }
}

#[test]
fn an_empty_pool_is_saturated() {
    let priorities = Priorities(&[("batch", -1)]);
    let ready = Bench::new(0).with(|parts| parts.objectives = Arc::new(priorities)).ready();
    let refusal = ready.refused(completion(&[("x-llm-d-inference-objective", "batch")]));
    assert_eq!(refusal.code, RefusalCode::ResourceExhausted);
}

#[test]
fn filters_that_leave_nobody_refuse() {
    let ready = Bench::new(3)
        .with(|parts| parts.scheduler = scheduler(&[|| filtering(|_| false)], None, None))
        .ready();
    let refusal = ready.refused(completion(&[]));
    let message = "no endpoints available for the given request";
    let expected = Refusal::new(RefusalCode::ResourceExhausted, message)
        .because(DropReason::RejectedSaturated);
    assert_eq!(refusal, expected);
    assert_eq!(ready.metric("epp_fallback_picks_total", &[]), 0.0);
    let failure = [r#"status="failure""#];
    assert_eq!(ready.metric("llm_d_epp_scheduler_attempts_total", &failure), 1.0);
    assert_eq!(ready.metric("llm_d_epp_request_total", &[]), 0.0);
}

#[test]
fn a_request_has_an_id() {
    let ready = Bench::new(1).ready();
    let id = |headers: &[(&str, &str)]| {
        let decision = ready.decide(completion(headers));
        let routed = decision.answer.unwrap();
        let set = routed.edits.sets().iter().find(|(name, _)| name == "x-request-id");
        let set = set.map(|(_, value)| String::from_utf8(value.to_vec()).unwrap());
        (decision.transit.id.to_string(), set)
    };
    assert_eq!(id(&[("x-request-id", "theirs")]), ("theirs".to_owned(), None));
    for headers in [&[][..], &[("x-request-id", "")]] {
        let (generated, set) = id(headers);
        assert_eq!(set.as_ref(), Some(&generated));
        assert_eq!(Uuid::parse_str(&generated).unwrap().get_version_num(), 4);
        assert_ne!(id(headers).0, generated);
    }
    let bare = Inbound { header_only: true, ..Inbound::default() };
    assert_eq!(ready.routed(bare).edits.sets()[0].0, "x-request-id");
}

#[test]
fn scores_are_told_if_asked_for() {
    let inbound = || Inbound {
        subset: Some(vec!["10.0.0.1".to_owned(), "10.0.0.3".to_owned()]),
        ..completion(&[])
    };
    assert_eq!(Bench::new(3).ready().routed(inbound()).scores, None);
    let ready = Bench::new(3).with(|parts| parts.emit_scores = true).ready();
    let mut scores = ready.routed(inbound()).scores.unwrap();
    scores.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(scores, [("10.0.0.1:8000".to_owned(), 0.1), ("10.0.0.3:8000".to_owned(), 0.3)]);
}

#[test]
fn several_endpoints_are_listed_best_first() {
    let ready = Bench::new(5)
        .with(|parts| {
            let params = json!({"maxNumOfEndpoints": 3});
            let picker = build(max_score_picker::REGISTRATION, params).unwrap();
            let mut profiles = parts.scheduler.profiles().to_vec();
            profiles[0].picker = configured(&picker);
            parts.scheduler = Scheduler::new(parts.scheduler.handler().clone(), profiles);
        })
        .ready();
    let routed = ready.routed(completion(&[]));
    assert_eq!(routed.destination, "10.0.0.5:8000,10.0.0.4:8000,10.0.0.3:8000");
    // The first one counts as the pick.
    assert_eq!(ready.metric("epp_picks_total", &["pod-5"]), 1.0);
    assert_eq!(ready.metric("epp_picks_total", &[]), 1.0);
}

#[test]
fn all_hooks_run_and_only_typed_refusals_refuse() {
    #[track_caller]
    fn check(refusals: &[Refusal], want: Option<&Refusal>) {
        let log = Log::default();
        let mut hooks = vec![named("first", recording("first", &log))];
        for refusal in refusals {
            let refusal = refusal.clone();
            hooks.push(named("refuser", hearing(move |_| Err(refusal.clone()))));
        }
        hooks.push(named("last", recording("last", &log)));
        let ready = Bench::new(1).with(|parts| parts.pre_requests = hooks).ready();
        let decision = ready.decide(completion(&[]));
        assert_eq!(log.take()[..2], ["first heard", "last heard"]);
        match want {
            Some(want) => {
                assert_eq!(decision.answer.as_ref(), Err(want));
                let dropped = log.take();
                assert!(dropped.is_empty(), "{dropped:?}");
                assert_eq!(ready.metric("llm_d_epp_request_total", &[]), 0.0);
            }
            None => assert!(decision.answer.is_ok()),
        }
    }
    let internal = Refusal::new(RefusalCode::Internal, "broken");
    let forbidden = Refusal::new(RefusalCode::Forbidden, "no");
    let exhausted =
        Refusal::new(RefusalCode::ResourceExhausted, "full").because(DropReason::RejectedSaturated);
    check(&[], None);
    check(std::slice::from_ref(&internal), None);
    check(std::slice::from_ref(&forbidden), Some(&forbidden));
    // The first one is said.
    check(&[internal, exhausted.clone(), forbidden], Some(&exhausted));
}

#[test]
fn flights_end_with_the_exchange() {
    let log = Log::default();
    let hooks = vec![named("a", recording("a", &log)), named("b", recording("b", &log))];
    let ready = Bench::new(1).with(|parts| parts.pre_requests = hooks).ready();
    let Decision { answer, mut transit } = ready.decide(completion(&[]));
    assert!(answer.is_ok());
    assert_eq!(log.take(), ["a heard", "b heard"]);
    let running = [r#"model_name="m""#];
    assert_eq!(ready.metric("llm_d_epp_request_running", &running), 1.0);
    let mut edits = HeaderEdits::new();
    transit.response_headers(&mut edits);
    transit.response_started();
    assert_eq!(log.take(), ["a headers", "b headers", "a started", "b started"]);
    assert_eq!(edits.sets(), [("x-seen-by".into(), Bytes::from_static(b"b"))]);
    drop(transit);
    assert_eq!(log.take(), ["a dropped", "b dropped"]);
    assert_eq!(ready.metric("llm_d_epp_request_running", &running), 0.0);
    assert_eq!(ready.metric("llm_d_epp_request_total", &running), 1.0);
}

#[test]
fn nothing_of_a_refused_request_is_kept() {
    let log = Log::default();
    let refuser = hearing(|_| Err(Refusal::new(RefusalCode::Forbidden, "no")));
    let hooks = vec![named("a", recording("a", &log)), named("refuser", refuser)];
    let ready = Bench::new(1).with(|parts| parts.pre_requests = hooks).ready();
    let decision = ready.decide(completion(&[]));
    assert_eq!(log.take(), ["a heard", "a dropped"]);
    assert!(decision.transit.metrics.is_none());
    assert_eq!(ready.metric("llm_d_epp_request_running", &[]), 0.0);
}

#[test]
fn hooks_change_headers() {
    let hook = hearing(|edits| {
        edits.set("x-prefiller-host-port", "10.0.0.2:8000");
        edits.remove("x-encoder-hosts-ports");
        Ok(None)
    });
    let ready = Bench::new(1).with(|parts| parts.pre_requests = vec![named("h", hook)]).ready();
    let routed = ready.routed(completion(&[("x-request-id", "r")]));
    let expected = ("x-prefiller-host-port".into(), Bytes::from_static(b"10.0.0.2:8000"));
    assert_eq!(routed.edits.sets(), [expected]);
    assert_eq!(routed.edits.removes(), ["x-encoder-hosts-ports"]);
}

#[test]
fn admitters_refuse() {
    let forbidden = Refusal::new(RefusalCode::Forbidden, "not you");
    let said = forbidden.clone();
    let log = Log::default();
    let ready =
        Bench::new(1)
            .with(|parts| {
                let admits = admitting(move |request| {
                    if *request.fairness_id == *"bad" { Err(said.clone()) } else { Ok(()) }
                });
                parts.admitters = vec![named("a", admits)];
                parts.pre_requests = vec![named("h", recording("hook", &log))];
            })
            .ready();
    assert!(ready.decide(completion(&[])).answer.is_ok());
    log.take();
    let bad = completion(&[("x-llm-d-inference-fairness-id", "bad")]);
    assert_eq!(ready.refused(bad), forbidden);
    assert!(log.take().is_empty());
}

/// Panics without noise.
fn fault<T>() -> T {
    std::panic::resume_unwind(Box::new("a fault of the test"))
}

#[test]
fn what_breaks_in_scheduling_is_no_outage() {
    #[track_caller]
    fn check(what: &str, scheduler: Scheduler) {
        let ready = Bench::new(3).with(|parts| parts.scheduler = scheduler).ready();
        for _ in 0..10 {
            let decision = ready.decide(completion(&[]));
            assert!(decision.answer.is_ok(), "{what}: {decision:?}");
        }
        assert_eq!(ready.metric("epp_fallback_picks_total", &[]), 10.0, "{what}");
        assert_eq!(ready.metric("llm_d_epp_request_total", &[]), 10.0, "{what}");
        assert_eq!(ready.metric("llm_d_epp_request_error_total", &[]), 0.0, "{what}");
        assert_eq!(ready.metric("epp_picks_total", &[]), 10.0, "{what}");
    }
    check("a filter", scheduler(&[|| filtering(|_| fault())], None, None));
    check("a scorer", scheduler(&[], Some(scoring(|_| fault())), None));
    check("a picker", scheduler(&[], None, Some(picking(|_| fault()))));
    check("nobody picked", scheduler(&[], None, Some(picking(|_| Vec::new()))));
    check("somebody else picked", scheduler(&[], None, Some(picking(|_| vec![17]))));
    let no_handler = Scheduler::new(named("handler", Fake::default()), Vec::new());
    check("no handler", no_handler);
}

#[test]
fn scores_that_are_no_numbers_do_no_harm() {
    for score in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -7.0, 7.0] {
        let ready = Bench::new(2)
            .with(|parts| {
                parts.scheduler = scheduler(&[], Some(scoring(move |_| score)), None);
                parts.emit_scores = true;
            })
            .ready();
        let scores = ready.routed(completion(&[])).scores.unwrap();
        assert!(scores.iter().all(|(_, score)| (0.0..=1.0).contains(score)), "{scores:?}");
        assert_eq!(ready.metric("epp_fallback_picks_total", &[]), 0.0);
    }
}

#[test]
fn what_breaks_around_scheduling_is_left_out() {
    let log = Log::default();
    let ready = Bench::new(3)
        .with(|parts| {
            parts.producers = vec![
                named("at once", producing(fault)),
                named("later", producing(|| Some(Box::pin(async { fault() })))),
            ];
            parts.admitters = vec![named("admitter", admitting(|_| fault()))];
            parts.pre_requests =
                vec![named("hook", hearing(|_| fault())), named("last", recording("last", &log))];
        })
        .ready();
    // Scheduling itself is whole.
    assert_eq!(ready.pod(completion(&[])), 3);
    assert_eq!(log.take(), ["last heard", "last dropped"]);
    assert_eq!(ready.metric("epp_fallback_picks_total", &[]), 0.0);
    assert_eq!(ready.metric("llm_d_epp_request_total", &[]), 1.0);
}

#[test]
fn what_breaks_on_the_way_back_is_left_out() {
    struct Broken;
    impl Flight for Broken {
        fn response_headers(&mut self, _: &mut HeaderEdits) {
            fault::<()>();
        }
        fn response_started(&mut self) {
            fault::<()>();
        }
    }
    impl Drop for Broken {
        fn drop(&mut self) {
            fault::<()>();
        }
    }
    let log = Log::default();
    let ready = Bench::new(1)
        .with(|parts| {
            let broken = hearing(|_| Ok(Some(Box::new(Broken))));
            parts.pre_requests =
                vec![named("broken", broken), named("whole", recording("whole", &log))];
        })
        .ready();
    let mut transit = ready.decide(completion(&[])).transit;
    transit.response_headers(&mut HeaderEdits::new());
    transit.response_started();
    assert_eq!(log.take(), ["whole heard", "whole headers", "whole started"]);
    drop(transit);
    assert_eq!(log.take(), ["whole dropped"]);
    let running = [r#"model_name="m""#];
    assert_eq!(ready.metric("llm_d_epp_request_running", &running), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_producer_that_never_ends_is_dropped() {
    struct Waiting(Arc<AtomicUsize>);
    impl Drop for Waiting {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dropped);
    let log = Log::default();
    let said = log.clone();
    let ready = Bench::new(2)
        .with(|parts| {
            let never = producing(move || {
                let waiting = Waiting(Arc::clone(&counted));
                Some(Box::pin(async move {
                    pending::<()>().await;
                    drop(waiting);
                }))
            });
            let next = producing(move || {
                said.say("next");
                None
            });
            parts.producers = vec![named("never", never), named("next", next)];
        })
        .ready();
    let began = tokio::time::Instant::now();
    let decision = ready.director.route(completion(&[]), Instant::now()).await;
    let waited = began.elapsed();
    assert!(decision.answer.is_ok());
    let deadline = crate::epp::scheduling::PRODUCER_DEADLINE;
    assert!(
        waited >= deadline && waited < deadline + std::time::Duration::from_millis(5),
        "{waited:?}"
    );
    assert_eq!(dropped.load(Ordering::Relaxed), 1);
    assert_eq!(log.take(), ["next"]);
}

#[test]
fn the_stages_are_timed() {
    let ready = Bench::new(1)
        .with(|parts| {
            parts.producers = vec![named("p", producing(|| None))];
            parts.admitters = vec![named("a", admitting(|_| Ok(())))];
            parts.pre_requests = vec![named("h", hearing(|_| Ok(None)))];
        })
        .ready();
    ready.routed(completion(&[]));
    for (point, plugin) in [("DataProducer", "p"), ("Admission", "a"), ("PreRequest", "h")] {
        let labels = [format!("extension_point=\"{point}\""), format!("plugin_name=\"{plugin}\"")];
        let labels = [&*labels[0], &*labels[1]];
        for family in ["llm_d_epp", "inference_extension"] {
            let count = ready.metric(&format!("{family}_plugin_duration_seconds_count"), &labels);
            assert_eq!(count, 1.0, "{family} {point}");
        }
    }
    assert_eq!(ready.metric("llm_d_epp_scheduler_e2e_duration_seconds_count", &[]), 1.0);
    assert_eq!(ready.metric("llm_d_epp_request_processing_duration_seconds_count", &[]), 1.0);
}
