//! `inflight-load-producer`: counts requests and tokens that were sent to endpoints and are not done.
//!
//! # Formula
//!
//! For the first endpoint of each profile's result, from the routing of a request on:
//!
//! ```text
//! requests += 1
//! tokens   += (total − match) · block + max(0, input − total · block)
//!           + (addEstimatedOutputTokens ? min(round(input · outputRatio), the client's limit,
//!                                             maxEstimatedOutputTokens) : 0)
//! ```
//!
//! `input` is the number of tokens of the prompt, or a quarter of its bytes where tokens are not known. `total`,
//! `match` and `block` (tokens) are what the producer `prefixMatchInfoProducerName` found
//! (`approx-prefix-cache-producer` unless named); without it all of `input` is to be computed.
//!
//! The first byte of a response says that the prompt has been computed: it frees the tokens, unless
//! output is estimated; and it frees all that the profile `prefill` holds. The end of the exchange,
//! however it comes, frees the rest.
//!
//! # Failure
//!
//! What a request holds is released when it is dropped, so nothing can leak, and nothing has to be
//! swept. An endpoint that is removed takes its counts with it; its successor of the same name starts
//! at 0 and is not touched by requests of the former life.
//!
//! # Differences to the Go EPP
//!
//! * Requests without an id are counted, too.
//! * `syncCrossReplicaState` is accepted and has no effect.
//! * At most 1000 flows have metrics of their own; the others share `other`. Series of a removed
//!   endpoint go.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use smallvec::SmallVec;

use crate::{
    epp::{
        datalayer::{Endpoint, EndpointInfo},
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        plugins::{
            Building, Registration, Stability, approx_prefix_cache_producer, lives::Lives, prefix,
            prefix_cache_scorer::match_producer,
        },
        request::InferenceRequest,
        scheduling::{
            BoxFuture, Cycle, DataKey, DataProducer, Flight, InFlight, Plugin, PreRequest,
            PrefixMatches, Produced, SchedulingResult,
        },
    },
    support::{fields::Fields, metrics::family, sync::lock},
};

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

const TYPE: &str = "inflight-load-producer";
/// The profile whose endpoint is done when the response starts.
const PREFILL: &str = "prefill";
const DEFAULT_OUTPUT_RATIO: f64 = 1.5;
/// Flows that have metrics of their own.
const MAX_FLOWS: usize = 1000;
const OTHER_FLOWS: &str = "other";

/// See the [module](self).
#[derive(Debug)]
pub struct InFlightLoadProducer {
    name: Arc<str>,
    output: Option<OutputEstimate>,
    prefix: Arc<str>,
    /// The configuration names `prefix`.
    prefix_is_named: bool,
    counters: Lives<Counters>,
    gauges: Gauges,
}

#[derive(Clone, Copy, Debug)]
struct OutputEstimate {
    ratio: f64,
    most: u64,
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let add = params.boolean("addEstimatedOutputTokens").unwrap_or(false);
    let ratio = params.number("outputRatio", 0.0).unwrap_or(DEFAULT_OUTPUT_RATIO);
    let most = params.integer("maxEstimatedOutputTokens", 0..=u64::MAX).unwrap_or(u64::MAX);
    for name in ["outputRatio", "maxEstimatedOutputTokens"] {
        if !add && params.has(name) {
            params.warn(name, "has no effect unless addEstimatedOutputTokens is true");
        }
    }
    if params.boolean("syncCrossReplicaState") == Some(true) {
        params.warn("syncCrossReplicaState", "has no effect: replicas do not share their load");
    }
    const PREFIX: &str = "prefixMatchInfoProducerName";
    let named = params.string(PREFIX).filter(|name| !name.is_empty());
    let prefix = match &named {
        Some(name) => match_producer(params, building, PREFIX, Some(name))?,
        None => Arc::from(approx_prefix_cache_producer::TYPE),
    };
    let name = Arc::clone(building.name());
    let gauges = match Gauges::new(building.registry(), &name) {
        Ok(gauges) => gauges,
        Err(error) => {
            params.fault("", error.to_string());
            return None;
        }
    };
    Some(Arc::new(InFlightLoadProducer {
        name,
        output: add.then_some(OutputEstimate { ratio, most }),
        prefix,
        prefix_is_named: named.is_some(),
        counters: Lives::new(building.endpoints()),
        gauges,
    }))
}

/// The producer that `inFlightLoadProducerName` names, or else the default one. `None`, with a fault,
/// if it does not exist or counts no load.
pub(super) fn load_producer(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<str>> {
    const FIELD: &str = "inFlightLoadProducerName";
    let named = params.string(FIELD).filter(|name| !name.is_empty());
    if named.as_deref().is_none_or(|name| name == TYPE) {
        let default = building.default_of(TYPE);
        if named.is_none_or(|named| *named == *default) {
            return Some(default);
        }
        return load_producer_named(params, building, FIELD, TYPE);
    }
    load_producer_named(params, building, FIELD, &named?)
}

fn load_producer_named(
    params: &Fields<'_>,
    building: &dyn Building,
    field: &str,
    name: &str,
) -> Option<Arc<str>> {
    let name: Arc<str> = Arc::from(name);
    let plugin = building.plugin(params, field, &name)?;
    let key = DataKey::InFlight(Arc::clone(&name));
    if plugin.producer().is_none_or(|producer| !producer.produces(&name).contains(&key)) {
        let text = format!("plugin {name:?} ({}) counts no load in flight", plugin.type_name());
        params.fault(field, text);
        return None;
    }
    Some(name)
}

/// What is in flight to one endpoint.
#[derive(Debug)]
struct Counters {
    requests: AtomicU64,
    tokens: AtomicU64,
    series: Mutex<SeriesMap>,
}

/// Handles of the endpoint's series, by flow and priority.
#[derive(Debug, Default)]
struct SeriesMap {
    by_flow: HashMap<Arc<str>, SmallVec<[(i32, Series); 1]>>,
    /// The endpoint is gone: no new series.
    closed: bool,
}

#[derive(Clone, Debug)]
struct Series {
    requests: IntGauge,
    tokens: IntGauge,
}

impl SeriesMap {
    fn get(&self, flow: &str, priority: i32) -> Option<Series> {
        let mut series = self.by_flow.get(flow)?.iter();
        series.find(|(known, _)| *known == priority).map(|(_, series)| series.clone())
    }
}

#[derive(Debug)]
struct Gauges {
    requests: IntGaugeVec,
    tokens: IntGaugeVec,
    flows: Mutex<HashSet<Arc<str>>>,
}

impl Gauges {
    fn new(registry: &Registry, name: &str) -> prometheus::Result<Self> {
        let gauge = |metric: &str, help: &str| {
            let opts = Opts::new(metric, format!("[ALPHA] {help}"));
            let opts = opts.const_label("producer_name", name);
            let labels = ["endpoint_name", "namespace", "fairness_id", "priority"];
            family(registry, IntGaugeVec::new(opts, &labels)?)
        };
        let requests = gauge(
            "llm_d_epp_inflight_requests",
            "Current number of in-flight requests per endpoint, as tracked by the in-flight load \
             producer.",
        )?;
        let tokens = gauge(
            "llm_d_epp_inflight_tokens",
            "Current number of in-flight tokens per endpoint (uncached prompt tokens, optionally \
             plus estimated output), as tracked by the in-flight load producer.",
        )?;
        Ok(Self { requests, tokens, flows: Mutex::default() })
    }

    /// The series of an endpoint, flow and priority; `None` if the endpoint is gone.
    fn series(
        &self,
        map: &Mutex<SeriesMap>,
        info: &EndpointInfo,
        flow: &Arc<str>,
        priority: i32,
    ) -> Option<Series> {
        let mut map = lock(map);
        if let Some(series) = map.get(flow, priority) {
            return Some(series);
        }
        if map.closed {
            return None;
        }
        let flow = self.flow(flow);
        if let Some(series) = map.get(&flow, priority) {
            return Some(series);
        }
        let text = priority.to_string();
        let labels = [info.name.name.as_str(), &info.name.namespace, &flow, &text];
        let series = Series {
            requests: self.requests.with_label_values(&labels),
            tokens: self.tokens.with_label_values(&labels),
        };
        map.by_flow.entry(flow).or_default().push((priority, series.clone()));
        Some(series)
    }

    /// The flow's label.
    fn flow(&self, flow: &Arc<str>) -> Arc<str> {
        let mut flows = lock(&self.flows);
        if flows.contains(flow) || flows.len() < MAX_FLOWS {
            flows.insert(Arc::clone(flow));
            return Arc::clone(flow);
        }
        Arc::from(OTHER_FLOWS)
    }

    fn remove(&self, map: &Mutex<SeriesMap>, info: &EndpointInfo) {
        let mut map = lock(map);
        map.closed = true;
        for (flow, series) in map.by_flow.drain() {
            for (priority, _) in series {
                let text = priority.to_string();
                let labels = [info.name.name.as_str(), &info.name.namespace, &*flow, &text];
                // They are there, and it does not matter if they are not.
                drop(self.requests.remove_label_values(&labels));
                drop(self.tokens.remove_label_values(&labels));
            }
        }
    }
}

impl OutputEstimate {
    fn tokens(&self, input: u64, client_limit: Option<u64>) -> u64 {
        // A float becomes the nearest integer there is.
        let tokens = (input as f64 * self.ratio).round() as u64;
        tokens.min(client_limit.unwrap_or(u64::MAX)).min(self.most)
    }
}

/// Tokens of a prompt of `input` tokens that an endpoint has to compute.
fn uncached(matches: Option<&PrefixMatches>, endpoint: usize, input: u64) -> u64 {
    let Some(matches) = matches.filter(|matches| matches.block > 0) else { return input };
    let matched = matches.matched.get(endpoint).copied().unwrap_or(0);
    let tokens = |blocks: u32| u64::from(blocks) * u64::from(matches.block);
    let beyond = input.saturating_sub(tokens(matches.total));
    tokens(matches.total.saturating_sub(matched)) + beyond
}

impl InFlightLoadProducer {
    /// Tokens that a request would add to each endpoint.
    fn request_tokens(
        &self,
        request: &InferenceRequest,
        produced: &Produced,
        endpoints: usize,
    ) -> Vec<u64> {
        let input = prefix::input_tokens(request, produced);
        let matches = produced.prefix(&self.prefix);
        let client_limit = request.parsed.max_output_tokens;
        let output = self.output.map_or(0, |output| output.tokens(input, client_limit));
        let of = |endpoint| uncached(matches, endpoint, input).saturating_add(output);
        (0..endpoints).map(of).collect()
    }
}

impl Plugin for InFlightLoadProducer {
    fn type_name(&self) -> &'static str {
        TYPE
    }

    fn producer(&self) -> Option<&dyn DataProducer> {
        Some(self)
    }

    fn pre_request(&self) -> Option<&dyn PreRequest> {
        Some(self)
    }

    fn consumes(&self) -> Vec<DataKey> {
        let named = self.prefix_is_named.then(|| DataKey::Prefix(Arc::clone(&self.prefix)));
        named.into_iter().collect()
    }

    fn may_consume(&self) -> Vec<DataKey> {
        vec![DataKey::Tokens, DataKey::Prefix(Arc::clone(&self.prefix))]
    }

    fn endpoint_removed(&self, endpoint: &Endpoint) {
        if let Some(counters) = self.counters.remove(endpoint.id()) {
            self.gauges.remove(&counters.series, endpoint.info());
        }
    }
}

impl DataProducer for InFlightLoadProducer {
    fn produces(&self, name: &Arc<str>) -> Vec<DataKey> {
        vec![DataKey::InFlight(Arc::clone(name))]
    }

    fn produce<'a>(
        &'a self,
        request: &'a InferenceRequest,
        endpoints: &'a [Arc<Endpoint>],
        produced: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        let counters = self.counters.read();
        let of = |endpoint: &Arc<Endpoint>| match counters.get(endpoint.id()) {
            Some(counters) => (counters.requests.load(Relaxed), counters.tokens.load(Relaxed)),
            None => (0, 0),
        };
        let (requests, tokens) = endpoints.iter().map(of).unzip();
        let request_tokens = self.request_tokens(request, produced, endpoints.len());
        produced.set_in_flight(&self.name, InFlight { requests, tokens, request_tokens });
        None
    }
}

impl PreRequest for InFlightLoadProducer {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        _headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        let request = cycle.request;
        let known = cycle.produced.in_flight(&self.name).map(|load| &load.request_tokens);
        let mut held = SmallVec::new();
        for (profile, pod) in result.firsts() {
            let Some(endpoint) = cycle.endpoints.get(pod) else { continue };
            let make = || Counters {
                requests: AtomicU64::new(0),
                tokens: AtomicU64::new(0),
                series: Mutex::default(),
            };
            let Some(counters) = self.counters.get_or_make(endpoint.id(), make) else { continue };
            let tokens = known.and_then(|tokens| tokens.get(pod)).copied().unwrap_or(0);
            let (flow, priority) = (&request.fairness_id, request.priority);
            let series = self.gauges.series(&counters.series, endpoint.info(), flow, priority);
            held.push(Held::new(counters, series, tokens, **profile == *PREFILL));
        }
        let frees_tokens = self.output.is_none();
        Ok(Some(Box::new(InFlightRequest { held, frees_tokens })))
    }
}

/// What one request holds.
struct InFlightRequest {
    held: SmallVec<[Held; 2]>,
    /// The first byte frees tokens.
    frees_tokens: bool,
}

/// What one request holds of one endpoint, until it is dropped.
struct Held {
    counters: Arc<Counters>,
    series: Option<Series>,
    tokens: u64,
    request: bool,
    prefill: bool,
}

impl Held {
    fn new(counters: Arc<Counters>, series: Option<Series>, tokens: u64, prefill: bool) -> Self {
        counters.requests.fetch_add(1, Relaxed);
        counters.tokens.fetch_add(tokens, Relaxed);
        if let Some(series) = &series {
            series.requests.inc();
            series.tokens.add(tokens as i64);
        }
        Self { counters, series, tokens, request: true, prefill }
    }

    fn release_tokens(&mut self) {
        let tokens = std::mem::take(&mut self.tokens);
        self.counters.tokens.fetch_sub(tokens, Relaxed);
        if let Some(series) = &self.series {
            series.tokens.sub(tokens as i64);
        }
    }

    fn release(&mut self) {
        self.release_tokens();
        if std::mem::take(&mut self.request) {
            self.counters.requests.fetch_sub(1, Relaxed);
            if let Some(series) = &self.series {
                series.requests.dec();
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

impl Flight for InFlightRequest {
    fn response_started(&mut self) {
        for held in &mut self.held {
            if held.prefill {
                held.release();
            } else if self.frees_tokens {
                held.release_tokens();
            }
        }
    }
}

#[cfg(test)]
mod tests;
