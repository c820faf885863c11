//! `active-request-scorer`: prefers endpoints with few requests in flight.
//!
//! # Formula
//!
//! ```text
//! n     = requests in flight to the endpoint
//! score = n ≤ idleThreshold ? 1 : (max − n) / max · maxBusyScore
//! ```
//!
//! with `max` over the candidates, `idleThreshold` 0 and `maxBusyScore` 1 (which it also is when it is not in
//! 0 to 1). No data: 1.
//!
//! # Two forms
//!
//! `n` comes from the producer that `inFlightLoadProducerName` names, or from the first
//! `inflight-load-producer`.
//!
//! `requestTimeout` (a Go duration, such as `2m`) makes the scorer **count itself**, as it did in
//! llm-d-inference-scheduler until 0.4: the first endpoint of each profile's result has a request more until the
//! exchange ends, the response of a prefill starts, or `requestTimeout` is over. A `requestTimeout` that is no
//! duration or not above 0 is two minutes, with a warning.
//!
//! # Differences to the Go EPP
//!
//! * Newer Go releases accept `requestTimeout` and ignore it; here it does that only beside
//!   `inFlightLoadProducerName`, with a warning.
//! * Older ones took `max` over all endpoints, candidates or not, and counted a prefill until it
//!   timed out; here both forms have one formula.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use smallvec::SmallVec;

use crate::{
    epp::{
        datalayer::{Endpoint, Endpoints},
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        plugins::{
            Building, Registration, Stability, inflight_load_producer::load_producer, lives::Lives,
        },
        scheduling::{Cycle, DataKey, Flight, Plugin, PreRequest, SchedulingResult, Scorer},
    },
    support::{fields::Fields, sync::lock, units},
};

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: TYPE,
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

const TYPE: &str = "active-request-scorer";
const PREFILL: &str = "prefill";
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);

/// See the [module](self).
#[derive(Debug)]
pub struct ActiveRequestScorer {
    idle_threshold: u64,
    max_busy_score: f64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// The load that the producer of this name counts.
    Producer(Arc<str>),
    /// Counted here.
    Own(Active),
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    const TIMEOUT: &str = "requestTimeout";
    let idle = params.signed("idleThreshold", i64::MIN..=i64::MAX);
    let idle_threshold = idle.and_then(|idle| u64::try_from(idle).ok()).unwrap_or(0);
    let busy = params.take("maxBusyScore", |value| {
        value.as_f64().ok_or_else(|| format!("expected a number, got {value}"))
    });
    let in_range = busy.filter(|busy| (0.0..=1.0).contains(busy));
    if busy.is_some() && in_range.is_none() {
        params.warn("maxBusyScore", "is not between 0 and 1: 1 is used");
    }
    let timeout = params.string(TIMEOUT).filter(|text| !text.is_empty());
    let timeout = timeout.map(|text| match units::duration(&text) {
        Ok(timeout) if timeout > Duration::ZERO => timeout,
        _ => {
            params.warn(TIMEOUT, format!("{text:?} is no duration above 0: two minutes are used"));
            DEFAULT_TIMEOUT
        }
    });
    let named = params.has("inFlightLoadProducerName");
    let source = match timeout {
        Some(timeout) if !named => {
            // Asked in vain, so that its name is known.
            params.string("inFlightLoadProducerName");
            Source::Own(Active::new(building.endpoints(), timeout))
        }
        ignored => {
            if ignored.is_some() {
                params.warn(TIMEOUT, "has no effect beside `inFlightLoadProducerName`");
            }
            Source::Producer(load_producer(params, building)?)
        }
    };
    let max_busy_score = in_range.unwrap_or(1.0);
    Some(Arc::new(ActiveRequestScorer { idle_threshold, max_busy_score, source }))
}

/// Requests in flight, with an age limit.
#[derive(Debug)]
struct Active {
    timeout: Duration,
    next: AtomicU64,
    lives: Lives<Requests>,
}

/// Requests in flight to one endpoint, oldest first: when they were routed, and a number that makes
/// them differ.
type Requests = Mutex<BTreeSet<(Instant, u64)>>;

impl Active {
    fn new(endpoints: &Arc<Endpoints>, timeout: Duration) -> Self {
        Self { timeout, next: AtomicU64::new(0), lives: Lives::new(endpoints) }
    }

    /// Requests that are not too old.
    fn count(&self, requests: &Requests, now: Instant) -> u64 {
        let mut requests = lock(requests);
        while let Some(oldest) = requests.first() {
            if now.saturating_duration_since(oldest.0) < self.timeout {
                break;
            }
            requests.pop_first();
        }
        requests.len() as u64
    }
}

impl Plugin for ActiveRequestScorer {
    fn type_name(&self) -> &'static str {
        TYPE
    }

    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }

    fn pre_request(&self) -> Option<&dyn PreRequest> {
        matches!(self.source, Source::Own(_)).then_some(self as &dyn PreRequest)
    }

    fn consumes(&self) -> Vec<DataKey> {
        match &self.source {
            Source::Producer(name) => vec![DataKey::InFlight(Arc::clone(name))],
            Source::Own(_) => Vec::new(),
        }
    }

    fn endpoint_removed(&self, endpoint: &Endpoint) {
        if let Source::Own(active) = &self.source {
            active.lives.remove(endpoint.id());
        }
    }
}

impl Scorer for ActiveRequestScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let counts: SmallVec<[u64; 16]> = match &self.source {
            Source::Producer(name) => {
                let load = cycle.produced.in_flight(name);
                let of = |&endpoint: &usize| load?.requests.get(endpoint).copied();
                among.iter().map(|endpoint| of(endpoint).unwrap_or(0)).collect()
            }
            Source::Own(active) => {
                let lives = active.lives.read();
                let of = |&endpoint: &usize| {
                    let requests = lives.get(cycle.endpoints.get(endpoint)?.id())?;
                    Some(active.count(requests, cycle.now))
                };
                among.iter().map(|endpoint| of(endpoint).unwrap_or(0)).collect()
            }
        };
        let max = counts.iter().copied().max().unwrap_or(0);
        for (&count, score) in counts.iter().zip(scores) {
            *score = if count <= self.idle_threshold {
                1.0
            } else {
                (max - count) as f64 / max as f64 * self.max_busy_score
            };
        }
    }
}

impl PreRequest for ActiveRequestScorer {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        _headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        let Source::Own(active) = &self.source else { return Ok(None) };
        let mut held = SmallVec::new();
        for (profile, pod) in result.firsts() {
            let Some(endpoint) = cycle.endpoints.get(pod) else { continue };
            let requests = active.lives.get_or_make(endpoint.id(), Requests::default);
            let Some(requests) = requests else { continue };
            let key = (cycle.now, active.next.fetch_add(1, Relaxed));
            lock(&requests).insert(key);
            held.push(Held { requests, key, prefill: **profile == *PREFILL });
        }
        Ok(Some(Box::new(ActiveRequest(held))))
    }
}

/// What one request holds.
struct ActiveRequest(SmallVec<[Held; 2]>);

/// A request of one endpoint, until it is dropped.
struct Held {
    requests: Arc<Requests>,
    key: (Instant, u64),
    prefill: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.requests).remove(&self.key);
    }
}

impl Flight for ActiveRequest {
    fn response_started(&mut self) {
        self.0.retain(|held| !held.prefill);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        plugins::{
            inflight_load_producer,
            prefix::testing::{Bench, Run, info, text},
        },
        scheduling::InFlight,
    };

    #[test]
    fn scores_are_the_formulas() {
        #[track_caller]
        fn check(parameters: &str, requests: Option<&[u64]>, want: &[f64]) {
            let bench = Bench::new("active-formula", want.len() as u8);
            let scorer = bench.build(REGISTRATION.factory, parameters).unwrap();
            let producer = Arc::from("inflight-load-producer");
            assert_eq!(scorer.consumes(), [DataKey::InFlight(Arc::clone(&producer))]);
            assert!(scorer.pre_request().is_none());
            let mut run = Run::new(&bench.endpoints, text("x"));
            if let Some(requests) = requests {
                let load = InFlight { requests: requests.to_vec(), ..InFlight::default() };
                run.produced.set_in_flight(&producer, load);
            }
            for (got, want) in run.score(&*scorer).iter().zip(want) {
                assert!((got - want).abs() < 1e-3, "{got} is not {want}");
            }
        }
        check("{}", None, &[1.0, 1.0, 1.0]);
        check("{}", Some(&[3, 0, 6]), &[0.5, 1.0, 0.0]);
        check("{}", Some(&[4, 0, 1]), &[0.0, 1.0, 0.75]);
        check("{}", Some(&[3, 11]), &[0.7272, 0.0]);
        check("{}", Some(&[5]), &[0.0]);
        check("{}", Some(&[]), &[1.0]);
        check("{maxBusyScore: 0}", Some(&[1, 0]), &[0.0, 1.0]);
        check("{idleThreshold: 1, maxBusyScore: 0.5}", Some(&[1, 2, 0]), &[1.0, 0.0, 1.0]);
        check("{idleThreshold: 1, maxBusyScore: 0.5}", Some(&[2, 4, 0]), &[0.25, 0.0, 1.0]);
        check("{maxBusyScore: 1.5}", Some(&[1, 2]), &[0.5, 0.0]);
        check("{idleThreshold: -3}", Some(&[1, 2, 0]), &[0.5, 0.0, 1.0]);
        check("{requestTimeout: ''}", Some(&[1, 2]), &[0.5, 0.0]);
    }

    #[test]
    fn the_producers_count_is_followed() {
        let mut bench = Bench::new("active-producer", 2);
        let producer = bench.build(inflight_load_producer::REGISTRATION.factory, "{}").unwrap();
        let name = Arc::from("active-producer");
        bench.others.push((Arc::clone(&name), Arc::clone(&producer)));
        let named = "{inFlightLoadProducerName: active-producer, requestTimeout: 1s}";
        let (scorer, warnings) = bench.try_build(REGISTRATION.factory, named).unwrap();
        assert!(warnings[0].starts_with("requestTimeout: has no effect"), "{warnings:?}");
        assert_eq!(scorer.consumes(), [DataKey::InFlight(name)]);
        let run = || {
            let mut run = Run::new(&bench.endpoints, text("x"));
            run.produce(&*producer);
            run
        };
        let flight = run().route(&*producer, &[("default", 0)]);
        assert_eq!(run().score(&*scorer), [0.0, 1.0]);
        drop(flight);
        assert_eq!(run().score(&*scorer), [1.0, 1.0]);
    }

    #[test]
    fn with_a_timeout_it_counts_itself() {
        let bench = Bench::new("active-own", 3);
        let scorer = bench.build(REGISTRATION.factory, "{requestTimeout: 1m}").unwrap();
        assert_eq!(scorer.consumes(), []);
        let start = Run::new(&bench.endpoints, text("x"));
        let at = |seconds| {
            let mut run = Run::new(&bench.endpoints, text("x"));
            run.now = start.now + Duration::from_secs(seconds);
            run
        };
        assert_eq!(at(0).score(&*scorer), [1.0; 3]);
        let first = at(0).route(&*scorer, &[("decode", 0), ("prefill", 1)]);
        let mut second = at(30).route(&*scorer, &[("decode", 0), ("prefill", 2)]).unwrap();
        assert_eq!(at(30).score(&*scorer), [0.0, 0.5, 0.5]);
        second.response_started();
        assert_eq!(at(30).score(&*scorer), [0.0, 0.5, 1.0]);
        // The first is too old from here on, the second is not.
        assert_eq!(at(59).score(&*scorer), [0.0, 0.5, 1.0]);
        assert_eq!(at(60).score(&*scorer), [0.0, 1.0, 1.0]);
        drop(first);
        assert_eq!(at(60).score(&*scorer), [0.0, 1.0, 1.0]);
        drop(second);
        assert_eq!(at(60).score(&*scorer), [1.0; 3]);
    }

    #[test]
    fn a_new_life_has_no_requests() {
        let bench = Bench::new("active-lives", 2);
        let scorer = bench.build(REGISTRATION.factory, "{requestTimeout: 2m}").unwrap();
        let run = || Run::new(&bench.endpoints, text("x"));
        let flight = run().route(&*scorer, &[("default", 0)]);
        assert_eq!(run().score(&*scorer), [0.0, 1.0]);
        let old = Arc::clone(&bench.endpoints.list()[0]);
        bench.endpoints.remove(&old.info().name);
        scorer.endpoint_removed(&old);
        bench.endpoints.upsert(info(0));
        assert_eq!(run().score(&*scorer), [1.0, 1.0]);
        drop(flight);
        assert_eq!(run().score(&*scorer), [1.0, 1.0]);
    }

    #[test]
    fn odd_timeouts_are_the_default() {
        for text in ["invalid", "-5s", "0s", "90"] {
            let bench = Bench::new("active-timeouts", 0);
            let parameters = format!("{{requestTimeout: '{text}'}}");
            let (scorer, warnings) = bench.try_build(REGISTRATION.factory, &parameters).unwrap();
            assert_eq!(warnings.len(), 1, "{text}");
            let scorer: &dyn std::any::Any = &*scorer;
            let scorer = scorer.downcast_ref::<ActiveRequestScorer>().unwrap();
            let Source::Own(active) = &scorer.source else { panic!("it counts itself") };
            assert_eq!(active.timeout, DEFAULT_TIMEOUT);
        }
    }

    #[test]
    fn wrong_parameters_are_named() {
        let bench = Bench::new("active-wrong", 0);
        let check = |parameters, want| bench.refuses(REGISTRATION.factory, parameters, want);
        check("{requestTimeout: 5}", "requestTimeout: expected a string");
        check("{maxBusyScore: high}", "maxBusyScore: expected a number");
        check("{idleTreshold: 5}", "did you mean `idleThreshold`?");
        check("{inFlightLoadProducerName: nobody}", "inFlightLoadProducerName: there is no plugin");
    }
}
