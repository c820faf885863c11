//! What is counted of endpoints: how often each was picked, and what is known of the pool.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use prometheus::proto::{MetricFamily, MetricType};

use super::{family::Family, requests::RequestMetrics};
use crate::{
    epp::datalayer::{Endpoint, EndpointId, EndpointWatcher, Endpoints, Metrics},
    support::sync::lock,
};

const ATTEMPTS: Family = Family::new(
    "llm_d_epp_scheduler_attempts_total",
    MetricType::COUNTER,
    &["endpoint_name", "namespace", "port", "status", "target_model_name"],
    "Total number of scheduling attempts.",
);
const ATTEMPTS_OLD: Family = Family::old(
    "inference_extension_scheduler_attempts_total",
    &ATTEMPTS,
    &["namespace", "pod_name", "port", "status", "target_model_name"],
    "Total number of scheduling attempts.",
);
const PICKS: Family = Family::new(
    "epp_picks_total",
    MetricType::COUNTER,
    &["endpoint"],
    "Requests routed to the endpoint.",
);
const SCRAPE_AGE: Family = Family::new(
    "epp_scrape_age_seconds",
    MetricType::GAUGE,
    &["endpoint"],
    "Age of what is known of the endpoint's load; absent if nothing ever was.",
);

const PREFIX_QUERIES: Family = Family::new(
    "epp_engine_prefix_cache_queries_tokens_total",
    MetricType::COUNTER,
    &["endpoint"],
    "Prompt tokens that the endpoint's engine looked up in its prefix cache, by its own metrics.",
);
const PREFIX_HITS: Family = Family::new(
    "epp_engine_prefix_cache_hits_tokens_total",
    MetricType::COUNTER,
    &["endpoint"],
    "Prompt tokens that the endpoint's engine found in its prefix cache, by its own metrics.",
);

const POOL: &[&str] = &["name"];

const READY: Family = Family::new(
    "llm_d_epp_ready_endpoints",
    MetricType::GAUGE,
    POOL,
    "The number of ready endpoints in the inference server pool.",
);
const READY_OLD: Family = Family::old(
    "inference_pool_ready_pods",
    &READY,
    POOL,
    "The number of ready pods in the inference server pool.",
);
const QUEUE: Family = Family::new(
    "llm_d_epp_per_endpoint_queue_size",
    MetricType::GAUGE,
    &["model_server_endpoint", "name"],
    "The total number of requests pending in the model server queue for each underlying endpoint.",
);
const QUEUE_OLD: Family = Family::old(
    "inference_pool_per_pod_queue_size",
    &QUEUE,
    &["model_server_pod", "name"],
    "The total number of requests pending in the model server queue for each underlying pod.",
);
const MEAN_KV: Family = Family::new(
    "llm_d_epp_average_kv_cache_utilization",
    MetricType::GAUGE,
    POOL,
    "The average kv cache utilization for an inference server pool.",
);
const MEAN_KV_OLD: Family =
    Family::old("inference_pool_average_kv_cache_utilization", &MEAN_KV, POOL, MEAN_KV.help);
const MEAN_QUEUE: Family = Family::new(
    "llm_d_epp_average_queue_size",
    MetricType::GAUGE,
    POOL,
    "The average number of requests pending in the model server queue.",
);
const MEAN_QUEUE_OLD: Family =
    Family::old("inference_pool_average_queue_size", &MEAN_QUEUE, POOL, MEAN_QUEUE.help);
const MEAN_RUNNING: Family = Family::new(
    "llm_d_epp_average_running_requests",
    MetricType::GAUGE,
    POOL,
    "The average number of running requests across model servers in the pool.",
);
const MEAN_RUNNING_OLD: Family =
    Family::old("inference_pool_average_running_requests", &MEAN_RUNNING, POOL, MEAN_RUNNING.help);
const DEVIATION_KV: Family = Family::new(
    "llm_d_epp_std_dev_kv_cache_utilization",
    MetricType::GAUGE,
    POOL,
    "The standard deviation kv cache utilization for an inference server pool.",
);
const DEVIATION_QUEUE: Family = Family::new(
    "llm_d_epp_std_dev_queue_size",
    MetricType::GAUGE,
    POOL,
    "The standard deviation number of requests pending in the model server queue.",
);
const DEVIATION_RUNNING: Family = Family::new(
    "llm_d_epp_std_dev_running_requests",
    MetricType::GAUGE,
    POOL,
    "The standard deviation number of running requests across model servers in the pool.",
);

/// A value of an endpoint: its mean over the pool, under its old name too, and its deviation.
type Averaged = (&'static Family, &'static Family, &'static Family, fn(&Metrics) -> f64);

const AVERAGED: [Averaged; 3] = [
    (&MEAN_KV, &MEAN_KV_OLD, &DEVIATION_KV, |metrics| metrics.kv_usage),
    (&MEAN_QUEUE, &MEAN_QUEUE_OLD, &DEVIATION_QUEUE, |metrics| metrics.waiting as f64),
    (&MEAN_RUNNING, &MEAN_RUNNING_OLD, &DEVIATION_RUNNING, |metrics| metrics.running as f64),
];

/// A counter of an engine's.
type EngineCount = (&'static Family, fn(&Metrics) -> u64);

/// What engines say of their prefix caches.
const PREFIX_CACHE: [EngineCount; 2] = [
    (&PREFIX_QUERIES, |metrics| metrics.prefix_queries),
    (&PREFIX_HITS, |metrics| metrics.prefix_hits),
];

/// All families of this file.
pub(super) fn families(old_names: bool) -> Vec<&'static Family> {
    let mut families =
        vec![&ATTEMPTS, &PICKS, &SCRAPE_AGE, &PREFIX_QUERIES, &PREFIX_HITS, &READY, &QUEUE];
    families.extend(AVERAGED.iter().flat_map(|(mean, _, deviation, _)| [*mean, *deviation]));
    if old_names {
        families.extend([&ATTEMPTS_OLD, &READY_OLD, &QUEUE_OLD]);
        families.extend(AVERAGED.iter().map(|(_, old, ..)| *old));
    }
    families
}

/// What is counted of one endpoint.
#[derive(Debug)]
struct Picked {
    endpoint: Arc<Endpoint>,
    picks: AtomicU64,
    /// By the value of `target_model_name`, of which there are not many.
    by_target: RwLock<HashMap<String, AtomicU64>>,
}

/// Counts picks by endpoint, for the endpoints that there are.
#[derive(Debug, Default)]
pub(super) struct Picks {
    endpoints: ArcSwap<HashMap<EndpointId, Arc<Picked>>>,
    /// Held while the map is replaced.
    changing: Mutex<()>,
}

impl Picks {
    /// Counts a pick of `endpoint`; one that is gone already is not counted.
    pub(super) fn picked(&self, row: &RequestMetrics, endpoint: &Endpoint) {
        let endpoints = self.endpoints.load();
        let Some(picked) = endpoints.get(&endpoint.id()) else { return };
        picked.picks.fetch_add(1, Ordering::Relaxed);
        let known = picked.by_target.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = known.get(row.target()) {
            count.fetch_add(1, Ordering::Relaxed);
            return;
        }
        drop(known);
        let mut known = picked.by_target.write().unwrap_or_else(PoisonError::into_inner);
        known.entry(row.target().to_owned()).or_default().fetch_add(1, Ordering::Relaxed);
    }

    fn change(&self, change: impl FnOnce(&mut HashMap<EndpointId, Arc<Picked>>)) {
        let _changing = lock(&self.changing);
        let mut endpoints = HashMap::clone(&self.endpoints.load());
        change(&mut endpoints);
        self.endpoints.store(Arc::new(endpoints));
    }

    pub(super) fn collect(
        &self,
        rows: &[Arc<RequestMetrics>],
        old_names: bool,
        into: &mut Vec<MetricFamily>,
    ) {
        let mut picks = BTreeMap::<_, u64>::new();
        let mut attempts = BTreeMap::<[String; 5], u64>::new();
        for picked in self.endpoints.load().values() {
            let info = picked.endpoint.info();
            *picks.entry(info.name.to_string()).or_default() +=
                picked.picks.load(Ordering::Relaxed);
            let port = info.address.port().to_string();
            let by_target = picked.by_target.read().unwrap_or_else(PoisonError::into_inner);
            for (target, count) in by_target.iter() {
                let (name, namespace) = (info.name.name.clone(), info.name.namespace.clone());
                let key = [name, namespace, port.clone(), "success".to_owned(), target.clone()];
                *attempts.entry(key).or_default() += count.load(Ordering::Relaxed);
            }
        }
        for row in rows {
            let failed = row.failed_attempts.load(Ordering::Relaxed);
            if failed > 0 {
                let nobody = String::new;
                let status = "failure".to_owned();
                let key = [nobody(), nobody(), nobody(), status, row.target().to_owned()];
                *attempts.entry(key).or_default() += failed;
            }
        }
        into.push(
            PICKS.with(picks.iter().map(|(name, picks)| PICKS.series(&[name], *picks)).collect()),
        );
        let series = |family: &Family, pod_second: bool| {
            let one = |(key, count): (&[String; 5], &u64)| {
                let [name, namespace, rest @ ..] = key.each_ref().map(String::as_str);
                let [first, second] =
                    if pod_second { [namespace, name] } else { [name, namespace] };
                let [port, status, target] = rest;
                family.series(&[first, second, port, status, target], *count)
            };
            family.with(attempts.iter().map(one).collect())
        };
        into.push(series(&ATTEMPTS, false));
        if old_names {
            into.push(series(&ATTEMPTS_OLD, true));
        }
    }
}

impl EndpointWatcher for Picks {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        let picked = Picked {
            endpoint: Arc::clone(endpoint),
            picks: AtomicU64::new(0),
            by_target: RwLock::default(),
        };
        self.change(|endpoints| _ = endpoints.insert(endpoint.id(), Arc::new(picked)));
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        self.change(|endpoints| _ = endpoints.remove(&endpoint.id()));
    }
}

/// The pool as it is when metrics are read.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) name: String,
    pub(super) endpoints: Arc<Endpoints>,
    /// Older metrics do not count for averages.
    pub(super) stale: Duration,
}

impl Pool {
    pub(super) fn collect(&self, old_names: bool, into: &mut Vec<MetricFamily>) {
        let now = Instant::now();
        let endpoints = self.endpoints.list();
        let known: Vec<(&Endpoint, Arc<Metrics>, Option<Duration>)> = endpoints
            .iter()
            .map(|endpoint| {
                let metrics = endpoint.metrics();
                let age = metrics.updated.map(|updated| now.saturating_duration_since(updated));
                (&**endpoint, metrics, age)
            })
            .collect();
        let is_fresh = |age: Option<Duration>| age.is_some_and(|age| age <= self.stale);
        let fresh: Vec<&Metrics> = known
            .iter()
            .filter(|(.., age)| is_fresh(*age))
            .map(|(_, metrics, _)| &**metrics)
            .collect();

        let pool = &*self.name;
        let mut both = |family: &Family, old: Option<&Family>, value: f64| {
            into.push(family.with(vec![family.series(&[pool], value)]));
            if let Some(old) = old.filter(|_| old_names) {
                into.push(old.with(vec![old.series(&[pool], value)]));
            }
        };
        both(&READY, Some(&READY_OLD), fresh.len() as f64);
        if !fresh.is_empty() {
            for (mean, mean_old, deviation, value) in AVERAGED {
                let values = || fresh.iter().map(|metrics| value(metrics));
                let average = values().sum::<f64>() / fresh.len() as f64;
                let squares: f64 = values().map(|value| (value - average).powi(2)).sum();
                let samples = fresh.len().saturating_sub(1).max(1);
                both(mean, Some(mean_old), rounded(average));
                both(deviation, None, rounded((squares / samples as f64).sqrt()));
            }
        }

        // Two namespaces may have pods of one name, and a series must not come twice.
        let mut seen = HashSet::new();
        let shown: Vec<(String, f64)> = known
            .iter()
            .map(|(endpoint, metrics, _)| {
                let name = &endpoint.info().name;
                let unique = seen.insert(name.name.clone());
                let shown = if unique { name.name.clone() } else { name.to_string() };
                (shown, metrics.waiting as f64)
            })
            .collect();
        for family in [Some(&QUEUE), old_names.then_some(&QUEUE_OLD)].into_iter().flatten() {
            let series = |(name, waiting): &(String, f64)| family.series(&[name, pool], *waiting);
            into.push(family.with(shown.iter().map(series).collect()));
        }
        let age = |(endpoint, _, age): &(&Endpoint, _, Option<Duration>)| {
            let name = endpoint.info().name.to_string();
            age.map(|age| SCRAPE_AGE.series(&[&name], age.as_secs_f64()))
        };
        into.push(SCRAPE_AGE.with(known.iter().filter_map(age).collect()));
        for (family, read) in PREFIX_CACHE {
            let tokens = |(endpoint, metrics, _): &(&Endpoint, Arc<Metrics>, _)| {
                family.series(&[&endpoint.info().name.to_string()], read(metrics))
            };
            // Engines without such metrics have no series.
            let reports = known.iter().filter(|(_, metrics, _)| metrics.prefix_queries > 0);
            into.push(family.with(reports.map(tokens).collect()));
        }
    }
}

/// To two decimal places.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
