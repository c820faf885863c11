//! A whole request → a routing answer or a refusal.
//!
//! # Order
//!
//! read the body → model, priority, flow → shedding → candidates → data producers → admitters →
//! scheduling → hooks of every plugin → answer.
//!
//! # Failure
//!
//! What the client did wrong, and what the protocol demands (nobody there, nobody left, no capacity), is
//! a [`Refusal`]. A fault of ours is none: a plugin that panics is left out, and where scheduling gives
//! no result the answer is a random candidate, counted in `epp_fallback_picks_total`.

mod refusal;

use std::{
    fmt,
    future::poll_fn,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    task::Poll,
    time::Instant,
};

use bytes::Bytes;
use smallvec::SmallVec;
use uuid::Uuid;

pub use self::refusal::{DropReason, Refusal, RefusalCode};
use crate::epp::{
    datalayer::{Endpoint, Endpoints, Metrics, UnknownMetrics, scrape::Scraper},
    ext_proc::{
        Inbound, Routed,
        headers::{self, HeaderEdits, HeaderList},
    },
    metrics::{EppMetrics, ExtensionPoint, PluginTimer, RequestLabels, RequestMetrics, Running},
    plugins::utilization_detector::UtilizationDetector,
    request::{Changes, InferenceRequest, Parsers, splice},
    scheduling::{
        Configured, Cycle, Ending, Flight, Produced, Report, Scheduler, SchedulingResult,
    },
};

/// Headers whose value is the objective of a request, the preferred one first.
const OBJECTIVE: [&str; 2] = ["x-llm-d-inference-objective", "x-gateway-inference-objective"];
/// Headers that name the flow of a request, the preferred one first.
const FAIRNESS: [&str; 2] = ["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"];
/// Headers that name the model to ask for instead of the body's, the preferred one first.
const REWRITE: [&str; 2] = ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"];
/// Flow of requests that name none.
const DEFAULT_FLOW: &str = "default-flow";

/// Labels of requests of which nothing is known.
pub(super) const NOBODY: RequestLabels<'_> =
    RequestLabels { model: "", target: "", fairness: "", priority: 0 };

/// Priorities of objectives.
pub trait Objectives: fmt::Debug + Send + Sync {
    /// The priority of the objective of this name; `None` if there is none such.
    fn priority(&self, objective: &str) -> Option<i32>;
}

/// No objectives: every request has priority 0. What there is without Kubernetes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObjectives;

impl Objectives for NoObjectives {
    fn priority(&self, _objective: &str) -> Option<i32> {
        None
    }
}

/// What the director is made of.
#[derive(Debug)]
pub struct Parts {
    /// How bodies are read.
    pub parsers: Parsers,
    /// The profiles.
    pub scheduler: Scheduler,
    /// Plugins with a data producer, in the order in which they need each other.
    pub producers: Vec<Configured>,
    /// Plugins with an admitter.
    pub admitters: Vec<Configured>,
    /// Plugins that hear of routed requests.
    pub pre_requests: Vec<Configured>,
    /// The plugin that says whether the pool is saturated, a
    /// [`UtilizationDetector`]; another one never sheds.
    pub saturation: Configured,
    /// Priorities.
    pub objectives: Arc<dyn Objectives>,
    /// The endpoints.
    pub endpoints: Arc<Endpoints>,
    /// How an endpoint without metrics is seen.
    pub unknown_metrics: UnknownMetrics,
    /// Who keeps the endpoints' metrics current, as long as somebody needs them.
    pub scrapers: Vec<Arc<Scraper>>,
    /// What is counted.
    pub metrics: EppMetrics,
    /// Does the hint of candidates in the proxy's metadata count?
    pub subset_hint: bool,
    /// Are the scores told to the proxy?
    pub emit_scores: bool,
}

/// Turns whole requests into routing answers.
#[derive(Debug)]
pub struct Director {
    parts: Parts,
    /// Of each producer, admitter and pre-request hook, in the order of `parts`.
    timers: Timers,
    /// A plugin that hears how requests end wants every response to report its tokens.
    wants_usage: bool,
}

#[derive(Debug)]
struct Timers {
    parsing: PluginTimer,
    producers: Vec<PluginTimer>,
    admitters: Vec<PluginTimer>,
    pre_requests: Vec<PluginTimer>,
}

/// A routing answer or a refusal, and what has to be kept until the exchange ends.
#[derive(Debug)]
pub struct Decision {
    /// What is said to the proxy.
    pub answer: Result<Routed, Refusal>,
    /// What goes with the exchange.
    pub transit: Transit,
}

/// A request on its way: what plugins and metrics keep until its exchange ends, however it ends.
pub struct Transit {
    /// `x-request-id`.
    pub id: Arc<str>,
    /// Its metrics and its place among the running ones; `None` for what was not scheduled.
    pub metrics: Option<(Arc<RequestMetrics>, Running)>,
    flights: Vec<(Arc<str>, Box<dyn Flight>)>,
}

impl fmt::Debug for Transit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transit").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Transit {
    fn new(id: Arc<str>) -> Self {
        Self { id, metrics: None, flights: Vec::new() }
    }

    /// Lets go of what plugins keep.
    fn release(&mut self) {
        for (name, flight) in self.flights.drain(..) {
            guarded(&self.id, &name, || drop(flight));
        }
    }

    /// Response headers are about to be passed on.
    pub fn response_headers(&mut self, edits: &mut HeaderEdits) {
        for (name, flight) in &mut self.flights {
            guarded(&self.id, name, || flight.response_headers(edits));
        }
    }

    /// The first bytes of the response's body came.
    pub fn response_started(&mut self) {
        for (name, flight) in &mut self.flights {
            guarded(&self.id, name, || flight.response_started());
        }
    }
}

impl Transit {
    /// The exchange ended: tells plugins, and lets go of what they keep.
    pub fn ended(&mut self, ending: &Ending<'_>) -> Report {
        let mut report = Report::default();
        for (name, flight) in &mut self.flights {
            guarded(&self.id, name, || flight.ended(ending, &mut report));
        }
        self.release();
        report
    }
}

impl Drop for Transit {
    fn drop(&mut self) {
        self.release();
    }
}

impl Director {
    /// A director of these parts.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let timer = |point| {
            let metrics = parts.metrics.clone();
            move |plugin: &Configured| {
                metrics.plugin_timer(point, plugin.plugin.type_name(), &plugin.name)
            }
        };
        let timers = Timers {
            parsing: parts.metrics.plugin_timer(
                ExtensionPoint::RequestParsing,
                "request-parser",
                "request-parser",
            ),
            producers: parts.producers.iter().map(timer(ExtensionPoint::DataProducer)).collect(),
            admitters: parts.admitters.iter().map(timer(ExtensionPoint::Admission)).collect(),
            pre_requests: parts
                .pre_requests
                .iter()
                .map(timer(ExtensionPoint::PreRequest))
                .collect(),
        };
        let wants_usage = parts.pre_requests.iter().any(|hook| hook.plugin.wants_usage());
        Self { parts, timers, wants_usage }
    }

    /// Routes a request whose headers came at `received`.
    pub async fn route(&self, inbound: Inbound, received: Instant) -> Decision {
        self.parts.scrapers.iter().for_each(|scraper| scraper.touch());
        let known = inbound.headers.get(headers::REQUEST_ID).filter(|id| !id.is_empty());
        let generated = known.is_none();
        let id = known.map_or_else(|| Arc::from(Uuid::new_v4().to_string()), Arc::from);
        let mut transit = Transit::new(id);
        let mut answer = if inbound.header_only || inbound.body_hidden {
            self.any_endpoint(inbound.subset.as_deref())
        } else {
            self.route_whole(inbound, received, &mut transit).await
        };
        match &mut answer {
            Ok(routed) => {
                if generated {
                    routed.edits.set(headers::REQUEST_ID, transit.id.to_string());
                }
                tracing::debug!(x_request_id = %transit.id, destination = routed.destination, "Routed a request.");
            }
            Err(refusal) => {
                self.parts.metrics.immediate_response(refusal.code);
                // The text has no more of a body than the character that is wrong in it.
                tracing::debug!(x_request_id = %transit.id, refusal = %refusal, "Refused a request.");
            }
        }
        self.parts.metrics.request_processed(received.elapsed());
        Decision { answer, transit }
    }

    /// Any endpoint will do: a request without a body, such as `GET /v1/models`, or one that we failed to
    /// read.
    fn any_endpoint(&self, subset: Option<&[String]>) -> Result<Routed, Refusal> {
        let candidates = self.candidates(subset);
        let Some(endpoint) = fastrand::choice(candidates.iter()) else {
            self.parts.metrics.request(&NOBODY).refused(RefusalCode::Internal);
            return Err(Refusal::new(RefusalCode::Internal, "no pods available in datastore"));
        };
        Ok(Routed::to(endpoint.address()))
    }

    async fn route_whole(
        &self,
        inbound: Inbound,
        received: Instant,
        transit: &mut Transit,
    ) -> Result<Routed, Refusal> {
        let Inbound { headers, body, subset, response_hidden, .. } = inbound;
        let read = || self.timers.parsing.time(|| self.read(&transit.id, headers, body, received));
        let Some(read) = guarded(&transit.id, "request-parser", read) else {
            self.parts.metrics.fallback_pick();
            return self.any_endpoint(subset.as_deref());
        };
        let request = read.inspect_err(|refusal| {
            self.parts.metrics.request(&NOBODY).refused(refusal.code);
        })?;
        let metrics = self.parts.metrics.request(&RequestLabels {
            model: &request.parsed.model,
            target: &request.target_model,
            fairness: &request.fairness_id,
            priority: request.priority,
        });
        let mut outcome = self.direct(&request, subset.as_deref(), &metrics, transit).await;
        match &mut outcome {
            Ok(routed) => {
                self.rewrite(&request, response_hidden, routed);
                let running = metrics.routed(request.body.len() as u64);
                transit.metrics = Some((metrics, running));
            }
            Err(refusal) => {
                // Nothing of it is on its way.
                transit.release();
                metrics.refused(refusal.code);
            }
        }
        outcome
    }

    /// Headers and body → request.
    fn read(
        &self,
        id: &Arc<str>,
        headers: HeaderList,
        body: Bytes,
        received: Instant,
    ) -> Result<InferenceRequest, Refusal> {
        let bad = |message: String| Refusal::new(RefusalCode::BadRequest, message);
        let parsed =
            self.parts.parsers.parse(&headers, &body).map_err(|error| bad(error.to_string()))?;
        if parsed.model.is_empty() && parsed.api.has_model() {
            return Err(bad("model not found in request body".to_owned()));
        }
        let first = |names: [&str; 2]| {
            names.into_iter().filter_map(|name| headers.get(name)).find(|value| !value.is_empty())
        };
        // A body that is not read cannot be rewritten.
        let rewrite = first(REWRITE).filter(|_| parsed.api.has_model());
        let priority = first(OBJECTIVE).and_then(|name| self.parts.objectives.priority(name));
        Ok(InferenceRequest {
            id: Arc::clone(id),
            target_model: Arc::from(rewrite.unwrap_or(&parsed.model)),
            fairness_id: Arc::from(first(FAIRNESS).unwrap_or(DEFAULT_FLOW)),
            priority: priority.unwrap_or(0),
            parsed,
            body,
            received,
            headers,
        })
    }

    /// Admission, candidates, data, scheduling, hooks.
    async fn direct(
        &self,
        request: &InferenceRequest,
        subset: Option<&[String]>,
        row: &RequestMetrics,
        transit: &mut Transit,
    ) -> Result<Routed, Refusal> {
        self.shed(request)?;
        let candidates = self.candidates(subset);
        if candidates.is_empty() {
            let message = "failed to find endpoint candidates for serving the request";
            return Err(Refusal::new(RefusalCode::ServiceUnavailable, message)
                .because(DropReason::RejectedNoEndpoints));
        }
        let produced = self.produce(request, &candidates).await;
        for (configured, timer) in self.parts.admitters.iter().zip(&self.timers.admitters) {
            let Some(admitter) = configured.plugin.admitter() else { continue };
            let admit = || timer.time(|| admitter.admit(request, &candidates));
            guarded(&request.id, &configured.name, admit).unwrap_or(Ok(()))?;
        }
        let metrics: SmallVec<[Arc<Metrics>; 16]> =
            candidates.iter().map(|endpoint| endpoint.metrics()).collect();
        let cycle = Cycle {
            request,
            endpoints: &candidates,
            metrics: &metrics,
            produced: &produced,
            unknown_metrics: self.parts.unknown_metrics,
            now: Instant::now(),
        };
        let result = self.schedule(&cycle, row)?;
        let mut edits = HeaderEdits::new();
        self.pre_requests(&cycle, &result, &mut edits, transit)?;
        Ok(self.routed(&cycle, &result, edits))
    }

    /// The legacy rule of admission: a request of priority below 0 is refused while the pool is
    /// saturated; every other one is let through.
    fn shed(&self, request: &InferenceRequest) -> Result<(), Refusal> {
        if request.priority >= 0 {
            return Ok(());
        }
        let detector = UtilizationDetector::of(&*self.parts.saturation.plugin);
        let Some(detector) = detector else { return Ok(()) };
        let list = self.parts.endpoints.list();
        let metrics: Vec<_> = list.iter().map(|endpoint| endpoint.metrics()).collect();
        if detector.saturation(&metrics, Instant::now()) < 1.0 {
            return Ok(());
        }
        let message = "system saturated, sheddable request dropped";
        Err(Refusal::new(RefusalCode::ResourceExhausted, message))
    }

    /// The endpoints that the proxy allows, all if it does not say. They are told by address alone,
    /// whatever the port.
    fn candidates(&self, subset: Option<&[String]>) -> Candidates {
        let all = self.parts.endpoints.list();
        let Some(allowed) = subset.filter(|_| self.parts.subset_hint) else {
            return Candidates::All(all);
        };
        let ip = |text: &String| {
            let socket = text.parse().map(|socket: SocketAddr| socket.ip());
            socket.or_else(|_| text.parse()).ok()
        };
        let allowed: Vec<_> = allowed.iter().filter_map(ip).collect();
        let some = all.iter().filter(|endpoint| allowed.contains(&endpoint.ip()));
        Candidates::Some(some.cloned().collect())
    }

    /// Asks every producer in turn; one that fails or is late leaves its data out.
    async fn produce(&self, request: &InferenceRequest, candidates: &Candidates) -> Produced {
        let mut produced = Produced::new();
        for (configured, timer) in self.parts.producers.iter().zip(&self.timers.producers) {
            let Some(producer) = configured.plugin.producer() else { continue };
            let began = Instant::now();
            let data = &mut produced;
            let name = &*configured.name;
            let waiting =
                guarded(&request.id, name, || producer.produce(request, candidates, data));
            if let Some(Some(mut waiting)) = waiting
                && let waiting = poll_fn(|context| {
                    let poll = || waiting.as_mut().poll(context);
                    guarded(&request.id, name, poll).unwrap_or(Poll::Ready(()))
                })
                && tokio::time::timeout(producer.deadline(), waiting).await.is_err()
            {
                tracing::warn!(
                    plugin = %configured.name,
                    x_request_id = %request.id,
                    "A data producer was too late; the request goes on without its data."
                );
            }
            timer.observe(began.elapsed());
        }
        produced
    }

    /// Schedules; where that fails by a fault of ours, anybody serves the request.
    fn schedule(
        &self,
        cycle: &Cycle<'_>,
        row: &RequestMetrics,
    ) -> Result<SchedulingResult, Refusal> {
        let Parts { scheduler, metrics, .. } = &self.parts;
        let result = guarded(&cycle.request.id, "scheduler", || scheduler.schedule(cycle));
        metrics.scheduled(cycle.now.elapsed());
        let result = match result {
            Some(Ok(result)) => result,
            Some(Err(refusal)) if refusal.code != RefusalCode::Internal => {
                metrics.not_picked(row);
                return Err(refusal);
            }
            fault => {
                metrics.fallback_pick();
                if let Some(Err(fault)) = fault {
                    tracing::error!(x_request_id = %cycle.request.id, %fault, "Scheduling failed; a random endpoint serves the request.");
                }
                let nobody =
                    || Refusal::new(RefusalCode::Internal, "no pods available in datastore");
                scheduler.fallback(cycle).ok_or_else(nobody)?
            }
        };
        if let Some(endpoint) = result.targets().first().and_then(|&at| cycle.endpoints.get(at)) {
            metrics.picked(row, endpoint);
        }
        Ok(result)
    }

    /// Tells every plugin that wants to know. All are told, whatever one of them says; a fault of ours
    /// refuses nothing.
    fn pre_requests(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        edits: &mut HeaderEdits,
        transit: &mut Transit,
    ) -> Result<(), Refusal> {
        let mut refused = Ok(());
        for (configured, timer) in self.parts.pre_requests.iter().zip(&self.timers.pre_requests) {
            let Some(hook) = configured.plugin.pre_request() else { continue };
            let call = || timer.time(|| hook.pre_request(cycle, result, edits));
            match guarded(&cycle.request.id, &configured.name, call) {
                Some(Ok(Some(flight))) => {
                    transit.flights.push((Arc::clone(&configured.name), flight));
                }
                Some(Ok(None)) | None => {}
                Some(Err(fault)) if fault.code == RefusalCode::Internal => {
                    tracing::error!(plugin = %configured.name, x_request_id = %cycle.request.id, %fault, "A plugin failed after scheduling; the request goes on.");
                }
                Some(Err(refusal)) => refused = refused.and(Err(refusal)),
            }
        }
        refused
    }

    /// Changes the body: its model, and the demand for usage where it can be taken out of the response
    /// again.
    fn rewrite(&self, request: &InferenceRequest, response_hidden: bool, routed: &mut Routed) {
        let parsed = &request.parsed;
        let rewritten = *request.target_model != *parsed.model;
        let model = rewritten.then_some(&*request.target_model);
        let usage = self.wants_usage && !response_hidden && parsed.usage_edit.is_some();
        if model.is_some() || usage {
            let body = splice(parsed, &request.body, Changes { model, usage });
            routed.body = Some(body);
        }
        routed.hides_usage = usage;
    }

    fn routed(&self, cycle: &Cycle<'_>, result: &SchedulingResult, edits: HeaderEdits) -> Routed {
        let request = cycle.request;
        let scores = self.parts.emit_scores.then(|| {
            let run = result.results.get(&result.primary);
            let scored = run.map_or(&[][..], |run| &run.scored);
            let named = scored.iter().filter_map(|scored| {
                Some((cycle.endpoints.get(scored.endpoint)?.address().to_owned(), scored.score))
            });
            named.collect()
        });
        Routed {
            destination: self.parts.scheduler.destination(cycle, result),
            edits,
            body: None,
            scores,
            incoming_model: request.parsed.model.clone(),
            target_model: request.target_model.to_string(),
            stream: request.parsed.stream,
            skip_response: !request.parsed.api.has_response(),
            hides_usage: false,
        }
    }
}

/// The candidates of a request.
enum Candidates {
    All(Arc<Vec<Arc<Endpoint>>>),
    Some(Vec<Arc<Endpoint>>),
}

impl std::ops::Deref for Candidates {
    type Target = [Arc<Endpoint>];

    fn deref(&self) -> &[Arc<Endpoint>] {
        match self {
            Self::All(list) => list,
            Self::Some(list) => list,
        }
    }
}

/// Runs a piece of a plugin for a request. A panic of it is logged and gives `None`.
fn guarded<T>(id: &str, plugin: &str, run: impl FnOnce() -> T) -> Option<T> {
    let outcome = catch_unwind(AssertUnwindSafe(run));
    if outcome.is_err() {
        tracing::error!(
            plugin,
            x_request_id = id,
            "A plugin panicked; the request goes on without it."
        );
    }
    outcome.ok()
}

#[cfg(test)]
mod tests;
