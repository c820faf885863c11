//! A server in process over a fake index: a set of keys per slot and tier, told what to hold.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kv_indexer::{
    hash::{Algorithm, MultimodalItem, Scheme},
    index::{
        BlockIndex, Dropped, IndexUsage, Match, PodSpec, PodUsage, Remove, Store, StoreOutcome,
    },
    indexer::{
        ApiConfig,
        metrics::ScoreMetrics,
        registry::{PodRegistry, RegistryError},
        server::serve,
        service::{Parts, Service},
        speculation::Speculations,
    },
    ingest::fleet::{Fleet, PodDeclaration, Row},
    model::{CountMode, PodSlot, PodState, RequestKey, RowId, TierId, TierTable},
    proto::{
        kvindexer::{self as pb, kv_indexer_client::KvIndexerClient},
        llmd::indexer_service_client::IndexerServiceClient,
    },
    support::tls::{Certificate, TlsOptions, server_config},
    tokenize::{Input, Tokenize, TokenizeError, Tokenized},
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub(crate) const MODEL: &str = "llama";

#[derive(Debug, Default)]
struct Held {
    tiers: HashMap<RequestKey, HashSet<TierId>>,
    marks: HashMap<RequestKey, HashSet<u64>>,
    removed: HashMap<RequestKey, u64>,
    usage: PodUsage,
}

/// Holds what it is told to hold.
#[derive(Default)]
pub(crate) struct FakeIndex {
    pods: Mutex<BTreeMap<PodSlot, Held>>,
    lookup_ms: AtomicU64,
    hook: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for FakeIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeIndex")
    }
}

impl FakeIndex {
    pub(crate) fn hold(&self, slot: PodSlot, keys: &[RequestKey], tier: u8) {
        let mut pods = self.pods.lock().unwrap();
        let pod = pods.get_mut(&slot).unwrap();
        for &key in keys {
            pod.tiers.entry(key).or_default().insert(TierId(tier));
            pod.marks.remove(&key);
            pod.removed.remove(&key);
        }
        pod.usage.blocks = pod.tiers.len() as u64;
        pod.usage.blocks_by_tier = vec![pod.tiers.len() as u64];
    }

    pub(crate) fn drop_key(&self, slot: PodSlot, key: RequestKey, sequence: u64) {
        let mut pods = self.pods.lock().unwrap();
        let pod = pods.get_mut(&slot).unwrap();
        pod.tiers.remove(&key);
        pod.removed.insert(key, sequence);
    }

    pub(crate) fn usage_of(&self, slot: PodSlot, change: impl FnOnce(&mut PodUsage)) {
        change(&mut self.pods.lock().unwrap().get_mut(&slot).unwrap().usage);
    }

    /// Every lookup takes this long.
    pub(crate) fn slow(&self, ms: u64) {
        self.lookup_ms.store(ms, Ordering::Relaxed);
    }

    /// Runs once, after the next lookup has read what it answers.
    pub(crate) fn during_lookup(&self, hook: impl FnOnce() + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    pub(crate) fn marks(&self) -> usize {
        let pods = self.pods.lock().unwrap();
        pods.values().flat_map(|pod| pod.marks.values()).map(HashSet::len).sum()
    }
}

fn leading(keys: &[RequestKey], holds: impl Fn(&RequestKey) -> bool) -> u32 {
    keys.iter().take_while(|key| holds(key)).count() as u32
}

impl BlockIndex for FakeIndex {
    fn register(&self, _: PodSpec) -> Option<PodSlot> {
        let mut pods = self.pods.lock().unwrap();
        let slot = (0..).map(PodSlot).find(|slot| !pods.contains_key(slot))?;
        pods.insert(slot, Held::default());
        Some(slot)
    }

    fn respec(&self, slot: PodSlot, _: PodSpec) {
        self.pods.lock().unwrap().insert(slot, Held::default());
    }

    fn unregister(&self, slot: PodSlot) {
        self.pods.lock().unwrap().remove(&slot);
    }

    fn lookup(&self, keys: &[RequestKey], tiers: bool, out: &mut Vec<Match>) {
        std::thread::sleep(Duration::from_millis(self.lookup_ms.load(Ordering::Relaxed)));
        out.clear();
        for (&slot, pod) in self.pods.lock().unwrap().iter() {
            let depth = leading(keys, |k| pod.tiers.contains_key(k) || pod.marks.contains_key(k));
            if depth == 0 {
                continue;
            }
            let by_tier = |tier: u8| {
                let holds =
                    |k: &RequestKey| pod.tiers.get(k).is_some_and(|t| t.contains(&TierId(tier)));
                (TierId(tier), leading(keys, holds))
            };
            let weight = |k: &RequestKey| match pod.tiers.get(k) {
                Some(tiers) if tiers.contains(&TierId(0)) => 1.0,
                Some(_) => 0.8,
                None => 0.5,
            };
            out.push(Match {
                slot,
                depth,
                confirmed: leading(keys, |k| pod.tiers.contains_key(k)),
                score: keys[..depth as usize].iter().map(weight).sum(),
                tiers: (0..if tiers { 2 } else { 0 })
                    .map(by_tier)
                    .filter(|(_, depth)| *depth > 0)
                    .collect(),
                speculative: leading(keys, |k| pod.marks.contains_key(k)),
            });
        }
        let hook = self.hook.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
    }

    fn speculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        if let Some(pod) = self.pods.lock().unwrap().get_mut(&slot) {
            for key in keys {
                pod.marks.entry(*key).or_default().insert(mark);
            }
        }
    }

    fn unspeculate(&self, slot: PodSlot, keys: &[RequestKey], mark: u64) {
        if let Some(pod) = self.pods.lock().unwrap().get_mut(&slot) {
            for key in keys {
                if let Some(marks) = pod.marks.get_mut(key) {
                    marks.remove(&mark);
                }
            }
            pod.marks.retain(|_, marks| !marks.is_empty());
        }
    }

    fn holders(&self, keys: &[RequestKey], block: usize) -> Vec<PodSlot> {
        let Some(key) = keys.get(block) else { return Vec::new() };
        let pods = self.pods.lock().unwrap();
        pods.iter().filter(|(_, pod)| pod.tiers.contains_key(key)).map(|(&slot, _)| slot).collect()
    }

    fn removed_at(&self, slot: PodSlot, key: RequestKey) -> Option<u64> {
        self.pods.lock().unwrap().get(&slot)?.removed.get(&key).copied()
    }

    fn pod_usage(&self, slot: PodSlot) -> PodUsage {
        self.pods.lock().unwrap().get(&slot).map(|pod| pod.usage.clone()).unwrap_or_default()
    }

    fn usage(&self) -> IndexUsage {
        let pods = self.pods.lock().unwrap();
        let keys = pods.values().flat_map(|pod| pod.tiers.keys()).collect::<HashSet<_>>();
        IndexUsage { keys: keys.len() as u64, bytes: 1234, cap_bytes: 1 << 30 }
    }

    fn store(&self, _: PodSlot, _: &Store<'_>) -> StoreOutcome {
        StoreOutcome::default()
    }
    fn remove(&self, _: PodSlot, _: &Remove<'_>) {}
    fn clear(&self, _: PodSlot) {}
    fn doubt(&self, _: PodSlot) -> u64 {
        0
    }
    fn drop_unconfirmed(&self, _: PodSlot, _: u64) -> Dropped {
        Dropped::default()
    }
    fn confirm(&self, _: PodSlot, _: &[RequestKey]) {}
    fn set_count_mode(&self, _: PodSlot, _: CountMode) {}
    fn set_muted(&self, _: PodSlot, _: bool) {}
    fn expire_orphans(&self, _: PodSlot, _: Instant) -> usize {
        0
    }
}

/// Remembers declarations; a pod named `fixed` belongs to the configuration.
#[derive(Debug, Default)]
pub(crate) struct FakeRegistry {
    pub(crate) declared: Mutex<Vec<PodDeclaration>>,
}

impl PodRegistry for FakeRegistry {
    fn register(&self, declaration: PodDeclaration) -> Result<(), RegistryError> {
        let mut declared = self.declared.lock().unwrap();
        if declared.len() == 2 {
            return Err(RegistryError::Full { limit: 2 });
        }
        declared.push(declaration);
        Ok(())
    }

    fn unregister(&self, pod: &str, rank: Option<u32>) -> Result<bool, RegistryError> {
        if pod == "fixed" {
            let (pod, source_name) = (pod.to_owned(), "the configuration".to_owned());
            return Err(RegistryError::Fixed { pod, source_name });
        }
        let mut declared = self.declared.lock().unwrap();
        let before = declared.len();
        declared.retain(|d| d.pod != pod || (rank.is_some() && d.rank != rank));
        Ok(declared.len() < before)
    }
}

/// A token per word: its length.
#[derive(Debug)]
pub(crate) struct WordLengths;

#[tonic::async_trait]
impl Tokenize for WordLengths {
    async fn tokenize(&self, model: &str, input: Input) -> Result<Tokenized, TokenizeError> {
        if model != MODEL {
            return Err(TokenizeError::NotConfigured);
        }
        let Input::Text { text, .. } = input else {
            return Err(TokenizeError::Invalid("no messages".to_owned()));
        };
        match &*text {
            "busy" => return Err(TokenizeError::Busy),
            "late" => return Err(TokenizeError::Late),
            "template" => return Err(TokenizeError::NoChatTemplate),
            "picture" => return Err(TokenizeError::Multimodal),
            "gone" => return Err(TokenizeError::Unavailable("no answer".to_owned())),
            "forever" => std::future::pending().await,
            _ => {}
        }
        let ids = text.split_whitespace().map(|word| word.len() as u32);
        // `image` is one.
        let items = text
            .split_whitespace()
            .zip(0..)
            .filter(|(word, _)| *word == "image")
            .map(|(_, offset)| MultimodalItem { hash: "pixels".to_owned(), offset, length: 1 });
        Ok(Tokenized { ids: ids.collect(), items: items.collect() })
    }
}

/// Everything a test touches; the server ends with it.
pub(crate) struct World {
    pub(crate) index: Arc<FakeIndex>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) registry: Arc<FakeRegistry>,
    pub(crate) registry_of_metrics: prometheus::Registry,
    pub(crate) ready: watch::Sender<bool>,
    pub(crate) stop: CancellationToken,
    pub(crate) channel: Channel,
    /// Without the transport, whose client has a timer of its own.
    pub(crate) service: Service,
    tasks: JoinSet<anyhow::Result<()>>,
    server: JoinSet<anyhow::Result<()>>,
}

/// Block size 4, so that prompts stay short.
pub(crate) fn scheme() -> Arc<Scheme> {
    Arc::new(Scheme::new(Algorithm::Xxh3, "", 4))
}

/// Limits that tests can reach.
pub(crate) fn config() -> ApiConfig {
    let mut config = ApiConfig {
        max_message_bytes: 1 << 20,
        max_tokens: 100_000,
        max_prompts: 64,
        max_multimodal: 3,
        max_pods_asked: 40,
        max_pod_id_bytes: 64,
        max_speculations: 3,
        max_speculation_ttl: Duration::from_secs(60),
        ..ApiConfig::default()
    };
    config.models.default = scheme();
    config.models.aliases.insert("llama-alias".to_owned(), MODEL.to_owned());
    let coarse = Arc::new(Scheme::new(Algorithm::Xxh64, "seed", 8));
    config.models.listed.insert("coarse".to_owned(), coarse);
    config
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::with(config(), None).await
    }

    pub(crate) async fn with(config: ApiConfig, tokenizer: Option<Arc<dyn Tokenize>>) -> Self {
        let index = Arc::new(FakeIndex::default());
        let fleet = Arc::new(Fleet::new(Arc::clone(&index) as Arc<dyn BlockIndex>));
        let registry = Arc::new(FakeRegistry::default());
        let speculations =
            Arc::new(Speculations::new(Arc::clone(fleet.index()), config.max_speculations));
        let metrics = prometheus::Registry::new();
        let tiers = Arc::new(TierTable::default());
        assert_eq!(tiers.id(Some("cpu")), TierId(1));
        let collector = kv_indexer::indexer::metrics::FleetCollector::new(
            Arc::clone(&fleet),
            Arc::clone(&tiers),
            Some(Arc::clone(&speculations)),
        )
        .unwrap();
        metrics.register(Box::new(collector)).unwrap();
        let stop = CancellationToken::new();
        let service = Service::new(Parts {
            fleet: Arc::clone(&fleet),
            tiers,
            config: Arc::new(config),
            registry: Arc::clone(&registry) as Arc<dyn PodRegistry>,
            speculations: Arc::clone(&speculations),
            metrics: ScoreMetrics::register(&metrics, true).unwrap(),
            tokenizer,
            stop: CancellationToken::new(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ready, readiness) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let expiry = stop.clone();
        tasks.spawn(async move { speculations.run(expiry).await });
        let mut server = JoinSet::new();
        let drain = Duration::from_secs(2);
        server.spawn(serve(listener, None, service.clone(), readiness, stop.clone(), drain));
        // A stream's window is HTTP/2's default, so that little hides between client and server;
        // the connection's must be larger, or h2 takes many small unread answers for an attack.
        let channel = Channel::from_shared(format!("http://{address}"))
            .unwrap()
            .initial_stream_window_size(65_535)
            .initial_connection_window_size(4 << 20)
            .connect()
            .await
            .unwrap();
        Self {
            index,
            fleet,
            registry,
            registry_of_metrics: metrics,
            ready,
            stop,
            channel,
            service,
            tasks,
            server,
        }
    }

    /// Serves the same over TLS, on another port.
    pub(crate) async fn listen_tls(
        &mut self,
        options: &TlsOptions,
        certificate: Certificate,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = Some(server_config(options, certificate).unwrap());
        let (service, ready) = (self.service.clone(), self.ready.subscribe());
        let drain = Duration::from_secs(2);
        self.server.spawn(serve(listener, tls, service, ready, self.stop.clone(), drain));
        address
    }

    /// Stops the server and says how it ended.
    pub(crate) async fn shut_down(&mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.tasks.join_next().await.unwrap().unwrap()?;
        self.server.join_next().await.unwrap().unwrap()
    }

    pub(crate) fn client(&self) -> KvIndexerClient<Channel> {
        KvIndexerClient::new(self.channel.clone()).max_encoding_message_size(64 << 20)
    }

    pub(crate) fn llmd(&self) -> IndexerServiceClient<Channel> {
        IndexerServiceClient::new(self.channel.clone())
    }

    /// A live row that has shown events.
    pub(crate) fn row(&self, pod: &str, rank: Option<u32>) -> Arc<Row> {
        self.row_of(pod, rank, MODEL)
    }

    pub(crate) fn row_of(&self, pod: &str, rank: Option<u32>, model: &str) -> Arc<Row> {
        let id = RowId { pod: pod.into(), rank };
        let endpoint = format!("tcp://{pod}:5557");
        let row = self
            .fleet
            .add(id, &endpoint, &scheme(), &Arc::from(model), CountMode::Counted)
            .unwrap();
        row.update(|status| {
            status.state = PodState::Live;
            status.connected = true;
            status.last_applied_unix_ns = 1;
        });
        row.applied(1, 0, 1);
        row
    }

    pub(crate) fn metrics(&self) -> String {
        prometheus::TextEncoder::new().encode_to_string(&self.registry_of_metrics.gather()).unwrap()
    }
}

/// Keys of `tokens` for the base model.
pub(crate) fn keys(tokens: &[u32]) -> Vec<RequestKey> {
    keys_of(MODEL, "", "", tokens)
}

pub(crate) fn keys_of(
    model: &str,
    lora: &str,
    cache_salt: &str,
    tokens: &[u32],
) -> Vec<RequestKey> {
    kv_indexer::hash::Prompt { model, lora, tokens, cache_salt, multimodal: &[] }
        .keys(&scheme())
        .unwrap()
}

/// `blocks` blocks of 4 tokens.
pub(crate) fn tokens(blocks: u32) -> Vec<u32> {
    (0..blocks * 4).collect()
}

pub(crate) fn prompt(tokens: &[u32]) -> pb::Prompt {
    let bytes = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    pb::Prompt { input: Some(pb::prompt::Input::TokenIdsLe(bytes)), ..pb::Prompt::default() }
}

pub(crate) fn request(prompts: Vec<pb::Prompt>) -> pb::ScoreRequest {
    pb::ScoreRequest { model: MODEL.to_owned(), prompts, ..pb::ScoreRequest::default() }
}
