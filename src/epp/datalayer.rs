//! The endpoints and what is known of their load.
//!
//! # Model
//!
//! A [`Discovery`](discovery::Discovery) puts [`EndpointInfo`]s into [`Endpoints`] and takes them
//! out; a [`Scraper`](scrape::Scraper) asks each endpoint for its metrics page, picks the few values
//! that its [engine](engines) reports out of the [page], and publishes them as [`Metrics`]. Readers
//! take one immutable list per request.
//!
//! # Concurrency
//!
//! Reads take no lock: the list and every endpoint's metrics are swapped whole.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use crate::support::sync::lock;

pub mod discovery;
pub mod engines;
pub mod page;
pub mod scrape;

/// The label that says whether a pod prefills, decodes or does both.
pub const ROLE_LABEL: &str = "llm-d.ai/role";

/// Identity of an endpoint: namespace and name, written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointName {
    /// Kubernetes namespace, or `default`.
    pub namespace: String,
    /// Name within the namespace; with several ports `<pod>-rank-<index>`.
    pub name: String,
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What a discovery source says of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointInfo {
    /// Who it is.
    pub name: EndpointName,
    /// Where requests go.
    pub address: SocketAddr,
    /// Where its metrics are scraped; usually the same.
    pub metrics_address: SocketAddr,
    /// Labels of the pod.
    pub labels: BTreeMap<String, String>,
}

/// Number of one life of an endpoint: never reused in a process, so that state kept for a removed
/// endpoint cannot be taken for that of its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub u64);

/// The load that an engine reported last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Requests waiting in the engine.
    pub waiting: u64,
    /// Requests running in the engine.
    pub running: u64,
    /// Used fraction of the KV cache, 0 to 1.
    pub kv_usage: f64,
    /// LoRA adapters in use, and how many may be.
    pub lora: LoraMetrics,
    /// Tokens per KV-cache block; 0 = not reported.
    pub cache_block_tokens: u64,
    /// Blocks of the KV cache; 0 = not reported.
    pub cache_blocks: u64,
    /// Prompt tokens that the engine looked up in its prefix cache since we follow the endpoint. What it
    /// counted before, and what it forgets when it starts over, changes nothing.
    pub prefix_queries: u64,
    /// The part of them that it found.
    pub prefix_hits: u64,
    /// Values of the extractor's `customMetrics`, by attribute key.
    pub custom: BTreeMap<String, f64>,
    /// When a scrape last gave any of these; `None` = never, and all of the above are defaults.
    pub updated: Option<Instant>,
}

impl Metrics {
    /// Did the endpoint ever say anything? If not, all values are defaults that look like an idle
    /// engine; see [`UnknownMetrics`].
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.updated.is_some()
    }

    /// How old the values are; `None` = never reported.
    #[must_use]
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.updated.map(|updated| now.saturating_duration_since(updated))
    }
}

/// How scorers read an endpoint whose metrics nobody has seen yet: it has just started, or its metrics
/// page does not work. Written in the configuration as one of [`WORDS`](Self::WORDS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownMetrics {
    /// It counts as the busiest of the known candidates; where none is known all are equal. So a pod
    /// that just started, or whose metrics cannot be read, draws no rush of requests.
    #[default]
    AsWorst,
    /// It counts as idle, as in the Go EPP: no queue, empty cache.
    AsIdle,
}

impl UnknownMetrics {
    /// The words of the configuration and of `--unknown-metrics`.
    pub const WORDS: [(&'static str, Self); 2] = [("worst", Self::AsWorst), ("idle", Self::AsIdle)];
}

impl FromStr for UnknownMetrics {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::WORDS.iter().find(|(word, _)| *word == text);
        let known = known.map(|&(_, unknown)| unknown);
        known.ok_or_else(|| {
            format!("{text:?} is not one of {}", Self::WORDS.map(|(word, _)| word).join(", "))
        })
    }
}

/// `vllm:lora_requests_info`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoraMetrics {
    /// Adapters with running requests.
    pub active: Vec<String>,
    /// Adapters with waiting requests.
    pub waiting: Vec<String>,
    /// Adapters that fit at once; 0 = not reported.
    pub max_active: usize,
}

/// One endpoint in one of its lives.
#[derive(Debug)]
pub struct Endpoint {
    id: EndpointId,
    info: EndpointInfo,
    /// `info.address` as text, formatted once.
    address: String,
    metrics: ArcSwap<Metrics>,
}

impl Endpoint {
    /// An endpoint outside of any store, for tests and benches.
    #[must_use]
    pub fn new(id: EndpointId, info: EndpointInfo) -> Self {
        let address = info.address.to_string();
        Self { id, info, address, metrics: ArcSwap::from_pointee(Metrics::default()) }
    }

    /// The number of this life.
    #[must_use]
    pub fn id(&self) -> EndpointId {
        self.id
    }

    /// What discovery said.
    #[must_use]
    pub fn info(&self) -> &EndpointInfo {
        &self.info
    }

    /// `ip:port`, as it goes into `x-gateway-destination-endpoint`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The address without its port.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.info.address.ip()
    }

    /// A label of the pod.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.info.labels.get(key).map(String::as_str)
    }

    /// The newest metrics.
    #[must_use]
    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.load_full()
    }

    /// Publishes newer metrics.
    pub fn set_metrics(&self, metrics: Metrics) {
        self.metrics.store(Arc::new(metrics));
    }
}

/// Hears about the lives of endpoints.
pub trait EndpointWatcher: fmt::Debug + Send + Sync {
    /// A new life began.
    fn added(&self, endpoint: &Arc<Endpoint>);
    /// A life ended: the endpoint is gone or was replaced. No later list has it.
    fn removed(&self, endpoint: &Arc<Endpoint>);
}

/// All endpoints that are ready, as discovery sees them.
#[derive(Debug, Default)]
pub struct Endpoints {
    list: ArcSwap<Vec<Arc<Endpoint>>>,
    next_id: AtomicU64,
    /// Held through every change, so that watchers hear changes in order.
    watchers: Mutex<Vec<Arc<dyn EndpointWatcher>>>,
}

impl Endpoints {
    /// No endpoints.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The endpoints of this moment, ordered by name.
    #[must_use]
    pub fn list(&self) -> Arc<Vec<Arc<Endpoint>>> {
        self.list.load_full()
    }

    /// Tells `watcher` of every endpoint there is and of every later change.
    pub fn watch(&self, watcher: Arc<dyn EndpointWatcher>) {
        let mut watchers = lock(&self.watchers);
        for endpoint in self.list().iter() {
            watcher.added(endpoint);
        }
        watchers.push(watcher);
    }

    /// Adds an endpoint, or replaces the one of its name if anything about it changed. A change of
    /// labels alone keeps no state either: it is a new life.
    pub fn upsert(&self, info: EndpointInfo) {
        let watchers = lock(&self.watchers);
        let mut list = Vec::clone(&self.list());
        let found = list.binary_search_by(|known| known.info.name.cmp(&info.name));
        if found.is_ok_and(|at| list[at].info == info) {
            return;
        }
        let id = EndpointId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let endpoint = Arc::new(Endpoint::new(id, info));
        let replaced = match found {
            Ok(at) => Some(std::mem::replace(&mut list[at], Arc::clone(&endpoint))),
            Err(at) => {
                list.insert(at, Arc::clone(&endpoint));
                None
            }
        };
        self.list.store(Arc::new(list));
        for watcher in watchers.iter() {
            if let Some(replaced) = &replaced {
                watcher.removed(replaced);
            }
            watcher.added(&endpoint);
        }
    }

    /// Makes `infos` all the endpoints there are. Of entries of one name the last counts. Lives of
    /// endpoints about which nothing changed go on. Readers see the old list or the new one.
    pub fn set(&self, infos: Vec<EndpointInfo>) {
        let watchers = lock(&self.watchers);
        let mut gone: BTreeMap<EndpointName, Arc<Endpoint>> = self
            .list()
            .iter()
            .map(|endpoint| (endpoint.info.name.clone(), Arc::clone(endpoint)))
            .collect();
        let infos: BTreeMap<EndpointName, EndpointInfo> =
            infos.into_iter().map(|info| (info.name.clone(), info)).collect();
        let mut added = Vec::new();
        let mut list = Vec::with_capacity(infos.len());
        for (name, info) in infos {
            if let Some(known) = gone.remove(&name) {
                if known.info == info {
                    list.push(known);
                    continue;
                }
                gone.insert(name, known);
            }
            let id = EndpointId(self.next_id.fetch_add(1, Ordering::Relaxed));
            let endpoint = Arc::new(Endpoint::new(id, info));
            added.push(Arc::clone(&endpoint));
            list.push(endpoint);
        }
        self.list.store(Arc::new(list));
        for watcher in watchers.iter() {
            for endpoint in gone.values() {
                watcher.removed(endpoint);
            }
            for endpoint in &added {
                watcher.added(endpoint);
            }
        }
    }

    /// Removes an endpoint; unknown names are no fault.
    pub fn remove(&self, name: &EndpointName) {
        let watchers = lock(&self.watchers);
        let mut list = Vec::clone(&self.list());
        let Ok(at) = list.binary_search_by(|known| known.info.name.cmp(name)) else { return };
        let removed = list.remove(at);
        self.list.store(Arc::new(list));
        for watcher in watchers.iter() {
            watcher.removed(&removed);
        }
    }
}
