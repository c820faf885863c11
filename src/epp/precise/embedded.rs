//! An index in this process as a [`PrefixIndex`]: subscriptions follow the endpoints, one per pod and
//! rank.
//!
//! # Model
//!
//! A publisher is declared for each life of an endpoint, under the endpoint's `ip:port`, whatever pod its
//! topic names. Its ports are the configured ones plus the endpoint's rank, the `N` of a name that
//! ends in `-rank-N`. Engines that connect to a bound socket are known by what their topics say, and
//! their rows are matched to endpoints as [`precise`](super) says.
//!
//! A declared publisher's rows belong to the life that it was declared for, and to no other at the
//! same address: what an engine held before says nothing of the one that took its place.
//!
//! # Concurrency
//!
//! Questions are answered on the thread that asks. Which rows are an endpoint's is worked out anew
//! when rows or endpoints have changed, by whoever asks next. Declaring a publisher blocks for a few
//! system calls; it is done on a blocking thread, which compares what there is with what there should be.
//! So no queue of changes can grow.
//!
//! Sockets and threads begin with the task that [`start`] returns. Before that the index is empty.
//!
//! # Failure
//!
//! A publisher that cannot be had is logged, and tried again each second. A bind address that cannot be
//! had, or a thread that ends, ends the task.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use prometheus::Registry;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    epp::{
        datalayer::{Endpoint, EndpointId, EndpointWatcher, Endpoints},
        precise::{
            Addressing, EndpointMatch, IndexError, PrefixIndex, Query, RowState, SpeculationId,
        },
        scheduling::{BoxFuture, Task},
    },
    hash::Models,
    index::{IndexConfig, Match, PodUsage, runs::RunIndex},
    ingest::{
        Ingest, IngestConfig,
        fleet::{Fleet, PodDeclaration, Row, Table},
        metrics::{FleetCollector, IngestMetrics},
        speculation::Speculations,
    },
    model::TierTable,
};

/// Speculative entries at most.
const MAX_SPECULATIONS: usize = 65_536;
/// How often it is looked whether the threads of ingest still run, and refused publishers are tried
/// again.
const CHECK: Duration = Duration::from_secs(1);
/// How long it is waited at the end until what has been received is applied. Nobody asks any more, so
/// this is for threads to end in good order, and well within what a drain leaves for it.
const DRAIN: Duration = Duration::from_secs(1);
/// Names in one finding at most.
const NAMED: usize = 8;
/// What precedes the rank in the name of an endpoint.
const RANK_SUFFIX: &str = "-rank-";

/// What is indexed, and how.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// Hash settings and aliases.
    pub models: Models,
    /// Tier names and weights.
    pub tiers: Vec<(String, f64)>,
    /// Weight of a tier that is not listed.
    pub unlisted_weight: f64,
    /// Weight of a block that only a speculative entry claims.
    pub speculative_weight: f64,
    /// Estimated bytes beyond which stores are refused.
    pub cap_bytes: u64,
    /// Subscribe to each endpoint, at its IP and `socket_port` plus its rank.
    pub discover_pods: bool,
    /// Port of the engines' PUB sockets.
    pub socket_port: u16,
    /// Port of the engines' replay sockets; `None` = none.
    pub replay_port: Option<u16>,
    /// Topic prefix.
    pub topic_filter: String,
    /// Bind address of a central SUB socket, if engines connect to us.
    pub bind: Option<String>,
    /// `vllm`, `sglang` or empty: by content.
    pub engine: String,
    /// Writer threads; 0 = by the number of cores.
    pub lanes: usize,
}

/// Makes the index and the task that feeds it.
///
/// Several indexes in one process work beside each other; the metrics are those of the first.
///
/// # Errors
///
/// When metrics cannot be registered.
pub fn start(
    config: EmbeddedConfig,
    endpoints: &Arc<Endpoints>,
    registry: &Registry,
) -> anyhow::Result<(Arc<dyn PrefixIndex>, Task)> {
    let mut ingest_config = IngestConfig {
        bind: config.bind.clone(),
        topic_filter: config.topic_filter.clone(),
        allow_unconfigured_pods: config.bind.is_some(),
        ..IngestConfig::default()
    };
    if config.lanes > 0 {
        ingest_config.lanes = config.lanes;
    }
    let tiers = Arc::new(TierTable::new(&config.tiers, config.unlisted_weight));
    let index = Arc::new(RunIndex::new(IndexConfig {
        tiers: Arc::clone(&tiers),
        speculative_weight: config.speculative_weight,
        cap_bytes: config.cap_bytes,
        orphan_blocks: ingest_config.orphan_blocks,
        max_pods: ingest_config.max_pods,
    }));
    let fleet = Arc::new(Fleet::new(index));
    let speculations = Arc::new(Speculations::new(Arc::clone(fleet.index()), MAX_SPECULATIONS));
    let metrics = register(registry, &fleet, &tiers, &speculations)?;
    let lives: Arc<ArcSwap<Lives>> = Arc::default();
    let embedded = Arc::new(Embedded {
        models: config.models.clone(),
        binds: config.bind.is_some(),
        fleet: Arc::clone(&fleet),
        endpoints: Arc::clone(endpoints),
        lives: Arc::clone(&lives),
        speculations: Arc::clone(&speculations),
        matching: ArcSwap::from_pointee(Matching::default()),
    });
    let (endpoints, models) = (Arc::clone(endpoints), config.models.clone());
    let feed = move || Ingest::start(ingest_config, models, tiers, fleet, metrics);
    let task: Task = Box::new(move |stop| {
        Box::pin(async move {
            let ingest = tokio::task::spawn_blocking(feed).await?;
            let ingest = Arc::new(ingest.context("the embedded index cannot be fed")?);
            let wake = Arc::default();
            let follower = Follower { ingest: Arc::clone(&ingest), endpoints, lives, wake, config };
            let run =
                async { tokio::try_join!(follower.run(&stop), speculations.run(stop.clone())) };
            let ended = run.await.map(drop);
            let stopped = tokio::task::spawn_blocking(move || ingest.stop(DRAIN)).await?;
            if let Err(error) = stopped {
                tracing::warn!(%error, "Not all KV events were applied at the end.");
            }
            ended
        })
    });
    Ok((embedded, task))
}

/// The metrics of an index. A second one in a process counts where nobody looks, since its series
/// would be the first one's.
fn register(
    registry: &Registry,
    fleet: &Arc<Fleet>,
    tiers: &Arc<TierTable>,
    speculations: &Arc<Speculations>,
) -> prometheus::Result<IngestMetrics> {
    let (of_rows, live) = (Arc::clone(fleet), Arc::clone(speculations));
    let collector = FleetCollector::new(of_rows, Arc::clone(tiers), Some(live))?;
    match registry.register(Box::new(collector)) {
        Ok(()) => IngestMetrics::register(registry),
        Err(prometheus::Error::AlreadyReg) => {
            tracing::warn!("There are several embedded indexes; metrics show the first one.");
            IngestMetrics::register(&Registry::new())
        }
        Err(error) => Err(error),
    }
}

/// Keeps subscriptions as the endpoints are.
#[derive(Debug)]
struct Follower {
    ingest: Arc<Ingest>,
    endpoints: Arc<Endpoints>,
    lives: Arc<ArcSwap<Lives>>,
    wake: Arc<Wake>,
    config: EmbeddedConfig,
}

/// Says that endpoints have changed.
#[derive(Debug, Default)]
struct Wake(Notify);

impl EndpointWatcher for Wake {
    fn added(&self, _: &Arc<Endpoint>) {
        self.0.notify_one();
    }

    fn removed(&self, _: &Arc<Endpoint>) {
        self.0.notify_one();
    }
}

/// Pods, and the lives of endpoints that they are declared for.
type Lives = HashMap<String, EndpointId>;

impl Follower {
    async fn run(self, stop: &CancellationToken) -> anyhow::Result<()> {
        if self.config.discover_pods {
            self.endpoints.watch(Arc::<Wake>::clone(&self.wake));
        }
        let follower = Arc::new(self);
        let mut declared = Lives::new();
        loop {
            follower.ingest.check()?;
            if follower.config.discover_pods {
                let at_work = Arc::clone(&follower);
                let reconcile = move || at_work.reconcile(declared);
                declared = tokio::task::spawn_blocking(reconcile).await?;
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = follower.wake.0.notified() => {}
                () = tokio::time::sleep(CHECK) => {}
            }
        }
    }

    /// Ends the publishers of lives that are over, and declares those of new ones.
    fn reconcile(&self, declared: Lives) -> Lives {
        let list = self.endpoints.list();
        let wanted: HashMap<&str, &Arc<Endpoint>> =
            list.iter().map(|endpoint| (endpoint.address(), endpoint)).collect();
        let mut now = Lives::with_capacity(wanted.len());
        for (pod, life) in declared {
            if wanted.get(pod.as_str()).is_some_and(|endpoint| endpoint.id() == life) {
                now.insert(pod, life);
            } else {
                self.ingest.remove(&pod, None);
            }
        }
        // Between the end of the old rows and the beginning of the new ones, so that none is ever
        // another life's.
        let lives: Lives =
            wanted.iter().map(|(pod, endpoint)| ((*pod).to_owned(), endpoint.id())).collect();
        if **self.lives.load() != lives {
            self.lives.store(Arc::new(lives));
        }
        for (pod, endpoint) in wanted {
            if now.contains_key(pod) {
                continue;
            }
            let name = &endpoint.info().name;
            let Some(declaration) = declaration(&self.config, endpoint) else {
                tracing::warn!(endpoint = %name, "There is no port for the events of its rank.");
                now.insert(pod.to_owned(), endpoint.id());
                continue;
            };
            match self.ingest.add(declaration) {
                Ok(()) => _ = now.insert(pod.to_owned(), endpoint.id()),
                Err(error) => tracing::warn!(endpoint = %name, %error, "Not subscribed yet."),
            }
        }
        now
    }
}

/// The publisher of an endpoint; `None` if its ports would be beyond the last one.
fn declaration(config: &EmbeddedConfig, endpoint: &Endpoint) -> Option<PodDeclaration> {
    let name = &endpoint.info().name.name;
    let rank = split_rank(name).map_or(0, |(_, rank)| rank);
    let at = |port: u16| {
        let port = port.checked_add(rank)?;
        Some(format!("tcp://{}", std::net::SocketAddr::new(endpoint.ip(), port)))
    };
    let replay_endpoint = match config.replay_port {
        Some(port) => Some(at(port)?),
        None => None,
    };
    Some(PodDeclaration {
        pod: endpoint.address().to_owned(),
        endpoint: at(config.socket_port)?,
        replay_endpoint,
        topic_filter: config.topic_filter.clone(),
        engine: config.engine.clone(),
        ..PodDeclaration::default()
    })
}

/// Pod and rank of an endpoint's name, if it has both.
fn split_rank(name: &str) -> Option<(&str, u16)> {
    let (pod, rank) = name.rsplit_once(RANK_SUFFIX)?;
    Some((pod, rank.parse().ok()?))
}

/// See the module's page.
#[derive(Debug)]
struct Embedded {
    models: Models,
    binds: bool,
    fleet: Arc<Fleet>,
    endpoints: Arc<Endpoints>,
    lives: Arc<ArcSwap<Lives>>,
    speculations: Arc<Speculations>,
    matching: ArcSwap<Matching>,
}

/// Which rows are an endpoint's.
#[derive(Debug, Default)]
struct Matching {
    table: Arc<Table>,
    list: Arc<Vec<Arc<Endpoint>>>,
    lives: Arc<Lives>,
    rows: HashMap<EndpointId, Vec<Arc<Row>>>,
    /// Models of rows.
    models: BTreeSet<Arc<str>>,
}

impl Matching {
    fn new(table: Arc<Table>, list: Arc<Vec<Arc<Endpoint>>>, lives: Arc<Lives>) -> Self {
        let mut by_name: HashMap<&str, Option<EndpointId>> = HashMap::new();
        let mut claim = |name, id| {
            // What names two endpoints names none.
            by_name.entry(name).and_modify(|known| *known = None).or_insert(Some(id));
        };
        for endpoint in list.iter() {
            let name = endpoint.info().name.name.as_str();
            claim(name, endpoint.id());
            // A pod with one port is one endpoint: its name without the rank is the pod's.
            if let Some((pod, _)) = split_rank(name) {
                claim(pod, endpoint.id());
            }
        }
        let mut by_ip: HashMap<String, Option<EndpointId>> = HashMap::new();
        let mut by_address = HashMap::new();
        for endpoint in list.iter() {
            by_address.insert(endpoint.address(), endpoint.id());
            let ip = by_ip.entry(endpoint.ip().to_string());
            ip.and_modify(|known| *known = None).or_insert(Some(endpoint.id()));
        }
        let here: HashSet<EndpointId> = list.iter().map(|endpoint| endpoint.id()).collect();
        let mut rows: HashMap<EndpointId, Vec<Arc<Row>>> = HashMap::new();
        let mut models = BTreeSet::new();
        for row in &table.rows {
            let pod = &*row.id.pod;
            let endpoint = match lives.get(pod) {
                Some(life) => here.contains(life).then_some(*life),
                None => by_address
                    .get(pod)
                    .copied()
                    .or_else(|| by_name.get(pod).copied().flatten())
                    .or_else(|| by_ip.get(pod).copied().flatten()),
            };
            if let Some(endpoint) = endpoint {
                rows.entry(endpoint).or_default().push(Arc::clone(row));
            }
            if !row.model.is_empty() {
                models.insert(Arc::clone(&row.model));
            }
        }
        Self { table, list, lives, rows, models }
    }

    fn rows(&self, endpoint: &Endpoint) -> &[Arc<Row>] {
        self.rows.get(&endpoint.id()).map_or(&[], Vec::as_slice)
    }
}

impl Embedded {
    /// The matching of this moment.
    fn matching(&self) -> Arc<Matching> {
        let matching = self.matching.load();
        // Lives before rows: the rows of a life that is over have gone before its successor is
        // named here.
        let lives = self.lives.load();
        let (table, list) = (self.fleet.table(), self.endpoints.list());
        if matching.table.version == table.version
            && Arc::ptr_eq(&matching.list, &list)
            && Arc::ptr_eq(&matching.lives, &lives)
        {
            return Arc::clone(&matching);
        }
        let matching = Arc::new(Matching::new(table, list, Arc::clone(&lives)));
        self.matching.store(Arc::clone(&matching));
        matching
    }

    fn answer(&self, query: &Query, endpoints: &[Arc<Endpoint>]) -> Vec<EndpointMatch> {
        let matching = self.matching();
        let model = &query.addressing.model;
        let found: Vec<Vec<Match>> = query
            .prompts
            .iter()
            .filter(|keys| !keys.is_empty())
            .map(|keys| {
                let mut found = Vec::new();
                self.fleet.look_up(&matching.table, model, keys, false, &mut found);
                found
            })
            .collect();
        let of_row = |row: &Arc<Row>| {
            let (state, stale) = row.trust();
            let mut sum = EndpointMatch {
                state: Some(RowState { state, stale }),
                ..EndpointMatch::default()
            };
            for found in &found {
                let at = found.binary_search_by_key(&row.slot, |found| found.slot).ok();
                if let Some(found) = at.and_then(|at| found.get(at)) {
                    sum.depth += found.depth;
                    sum.confirmed += found.confirmed;
                    sum.score += found.score;
                }
            }
            sum
        };
        let best = |endpoint: &Arc<Endpoint>| {
            let rows = matching.rows(endpoint).iter();
            // A row without a model holds nothing, of this model or another.
            let rows = rows.filter(|row| row.model == *model || row.model.is_empty());
            let best = rows
                .map(of_row)
                .max_by(|a, b| a.score.total_cmp(&b.score).then(a.depth.cmp(&b.depth)));
            best.unwrap_or_default()
        };
        endpoints.iter().map(best).collect()
    }
}

impl Embedded {
    /// What ails the rows of a model.
    fn about_the_model(
        &self,
        matching: &Matching,
        addressing: &Addressing,
        found: &mut Vec<String>,
    ) {
        let rows = matching.table.rows.iter().filter(|row| row.model == addressing.model);
        let rows: Vec<_> = rows.map(|row| (row, self.fleet.index().pod_usage(row.slot))).collect();
        if rows.iter().all(|(_, usage)| usage.hybrid_unsupported) {
            found.push("the model has attention groups that are not scored".to_owned());
        }
        let matched: HashSet<_> = matching.rows.values().flatten().map(|row| row.slot).collect();
        if !rows.iter().any(|(row, _)| matched.contains(&row.slot)) {
            found.push(format!(
                "the pods of the engines' topics are no endpoints': {}",
                some_of(rows.iter().map(|(row, _)| &*row.id.pod))
            ));
        }
        let (model, lora) = (&addressing.model, &addressing.lora);
        let adapters = || rows.iter().flat_map(|(_, usage)| &usage.loras).map(|name| &**name);
        // Of rows that remember no more names, one may have seen it.
        let unsure = rows.iter().any(|(_, usage)| usage.loras.len() >= PodUsage::MAX_LORAS);
        if !lora.is_empty() && !unsure && !adapters().any(|name| *name == **lora) {
            found.push(format!(
                "{lora:?} is taken for an adapter of {model}, the one model of the engines' events, \
                 but none has stored blocks under that name (adapters: {}); if it is the model, an \
                 alias would join the names",
                some_of(adapters())
            ));
        }
        if rows.iter().any(|(_, usage)| usage.reannounces()) {
            // Without names: it is said once, whatever pods come and go.
            found.push(
                "engines announce blocks again that they hold already, so that one removal does not \
                 end them and matches are too long; pods of the kv-indexer service can have \
                 countMode: set"
                    .to_owned(),
            );
        }
    }
}

/// The first few of these names, in order.
fn some_of<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: BTreeSet<&str> = names.collect();
    if names.is_empty() {
        return "none".to_owned();
    }
    let names: Vec<&str> = names.into_iter().take(NAMED).collect();
    names.join(", ")
}

impl PrefixIndex for Embedded {
    fn addressing(&self, served: &str) -> Option<Addressing> {
        let canonical = self.models.canonical(served);
        let matching = self.matching();
        let known = matching.models.contains(canonical)
            || self.models.aliases.contains_key(served)
            || self.models.listed.contains_key(canonical);
        let (model, lora): (Arc<str>, Arc<str>) = if known {
            (canonical.into(), "".into())
        } else {
            let mut models = matching.models.iter();
            let (Some(only), None) = (models.next(), models.next()) else { return None };
            (Arc::clone(only), served.into())
        };
        let scheme = Arc::clone(self.models.scheme(&model));
        Some(Addressing { model, lora, scheme })
    }

    fn score<'a>(
        &'a self,
        query: &'a Query,
        endpoints: &'a [Arc<Endpoint>],
    ) -> BoxFuture<'a, Result<Vec<EndpointMatch>, IndexError>> {
        let answer = self.answer(query, endpoints);
        Box::pin(std::future::ready(Ok(answer)))
    }

    fn speculate(
        &self,
        query: &Query,
        endpoint: &Endpoint,
        ttl: Duration,
    ) -> Option<SpeculationId> {
        let matching = self.matching();
        let model = &query.addressing.model;
        let rows = matching.rows(endpoint).iter();
        // One without a model may turn out to be of this one; marks stay.
        let rows: Vec<_> = rows.filter(|row| row.model == *model || row.model.is_empty()).collect();
        if rows.is_empty() {
            return None;
        }
        let slots: Vec<_> = rows.iter().map(|row| row.slot).collect();
        let entry = self.speculations.add(&slots, query.prompts.to_vec(), ttl).ok()?;
        // A row that went meanwhile may have left its slot to another pod.
        let table = self.fleet.table();
        let is_here =
            |row: &&Arc<Row>| table.slot(row.slot).is_some_and(|now| Arc::ptr_eq(now, row));
        if !rows.iter().all(is_here) {
            self.speculations.take_back(entry);
            return None;
        }
        Some(SpeculationId(entry))
    }

    fn extend(&self, entry: SpeculationId, ttl: Duration) {
        self.speculations.extend(entry.0, ttl);
    }

    fn take_back(&self, entry: SpeculationId) {
        self.speculations.take_back(entry.0);
    }

    fn impediments(&self, served: &str) -> Vec<String> {
        let matching = self.matching();
        let rows = &matching.table.rows;
        if rows.is_empty() {
            return vec![if self.binds {
                "no engine has connected to zmqEndpoint".to_owned()
            } else {
                "no engine's events are subscribed to".to_owned()
            }];
        }
        let statuses: Vec<_> = rows.iter().map(|row| row.status()).collect();
        if !statuses.iter().any(|status| status.connected) {
            return vec![format!(
                "no engine's event socket can be reached: KV events are off, or the port is another \
                 (tried: {})",
                some_of(rows.iter().map(|row| &*row.endpoint))
            )];
        }
        if statuses.iter().all(|status| status.messages == 0 && status.last_applied_unix_ns == 0) {
            return vec![
                "no engine has sent a KV event yet: events are off, or topics differ from \
                 topicFilter"
                    .to_owned(),
            ];
        }
        let mut found = Vec::new();
        let canonical = self.models.canonical(served);
        match self.addressing(served) {
            None if matching.models.is_empty() => {
                found.push("the engines' topics name no model, so nothing is indexed".to_owned());
            }
            Some(addressing) if matching.models.contains(&addressing.model) => {
                self.about_the_model(&matching, &addressing, &mut found);
            }
            _ => {
                found.push(format!(
                    "the engines' events are of {}, and none is {canonical:?}; an alias would join them",
                    some_of(matching.models.iter().map(|name| &**name))
                ));
            }
        }
        found
    }
}
