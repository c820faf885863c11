//! A real service over a real index, and an endpoint picker's side of it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use kv_indexer::{
    epp::{
        datalayer::{Endpoint, EndpointInfo, EndpointName, Endpoints},
        precise::{
            EndpointMatch, IndexError, PrefixIndex, Query,
            remote::{RemoteConfig, RemoteTls, connect},
        },
    },
    hash::{Algorithm, Prompt, Scheme},
    index::{IndexConfig, Store, runs::RunIndex},
    indexer::{
        ApiConfig,
        metrics::ScoreMetrics,
        registry::{PodRegistry, RegistryError},
        server::serve,
        service::{Parts, Service},
        speculation::Speculations,
    },
    ingest::fleet::{Fleet, PodDeclaration, Row},
    model::{CountMode, EngineKey, PodState, RowId, TierTable},
};
use prometheus::Registry;
use tokio::{net::TcpListener, runtime::Runtime, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::support::eventually;

pub(crate) const MODEL: &str = "llama";

/// Tokens per block of engine and request.
pub(crate) const BLOCK: u32 = 4;

#[derive(Debug)]
struct NoRegistry;

impl PodRegistry for NoRegistry {
    fn register(&self, _: PodDeclaration) -> Result<(), RegistryError> {
        Ok(())
    }

    fn unregister(&self, _: &str, _: Option<u32>) -> Result<bool, RegistryError> {
        Ok(false)
    }
}

fn threads(name: &str) -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(name)
        .enable_all()
        .build()
        .unwrap()
}

/// The service, in a runtime of its own, so that it can be killed.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) fleet: Arc<Fleet>,
    scheme: Arc<Scheme>,
    runtime: Option<Runtime>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::at(SocketAddr::from(([127, 0, 0, 1], 0)), BLOCK)
    }

    /// At an address, with blocks of this many tokens.
    pub(crate) fn at(address: SocketAddr, block: u32) -> Self {
        let tiers = Arc::new(TierTable::default());
        let index = RunIndex::new(IndexConfig {
            tiers: Arc::clone(&tiers),
            speculative_weight: 0.5,
            ..IndexConfig::default()
        });
        let fleet = Arc::new(Fleet::new(Arc::new(index)));
        let mut config = ApiConfig::default();
        let scheme = Arc::new(Scheme::new(Algorithm::Xxh3, "", block));
        config.models.default = Arc::clone(&scheme);
        let speculations =
            Arc::new(Speculations::new(Arc::clone(fleet.index()), config.max_speculations));
        let service = Service::new(Parts {
            fleet: Arc::clone(&fleet),
            tiers,
            config: Arc::new(config),
            registry: Arc::new(NoRegistry),
            speculations: Arc::clone(&speculations),
            metrics: ScoreMetrics::register(&Registry::new(), false).unwrap(),
            tokenizer: None,
            stop: CancellationToken::new(),
        });
        let runtime = threads("server");
        let listener = eventually("the address is free", || {
            runtime.block_on(TcpListener::bind(address)).map_err(|error| error.to_string())
        });
        let address = listener.local_addr().unwrap();
        let (_, ready) = watch::channel(true);
        let stop = CancellationToken::new();
        runtime.spawn(serve(listener, None, service, ready, stop.clone(), Duration::from_secs(1)));
        runtime.spawn(async move { speculations.run(stop).await });
        Self { address, fleet, scheme, runtime: Some(runtime) }
    }

    /// Ends it as SIGKILL does: its sockets close, and nobody says goodbye.
    pub(crate) fn kill(mut self) -> SocketAddr {
        self.runtime.take().unwrap().shutdown_timeout(Duration::from_secs(1));
        self.address
    }

    /// A live row.
    pub(crate) fn row(&self, pod: &str, rank: Option<u32>) -> Arc<Row> {
        let id = RowId { pod: pod.into(), rank };
        let model = Arc::from(MODEL);
        let row =
            self.fleet.add(id, "tcp://a:1", &self.scheme, &model, CountMode::Counted).unwrap();
        row.update(|status| {
            status.state = PodState::Live;
            status.connected = true;
        });
        self.fleet.changed();
        row
    }

    /// The row's engine stores a prompt.
    pub(crate) fn store(&self, row: &Row, tokens: &[u32]) {
        let keys: Vec<EngineKey> =
            query(tokens).prompts[0].iter().map(|k| EngineKey(k.0)).collect();
        let tokens = &tokens[..keys.len() * BLOCK as usize];
        let store = Store::simple(&keys, None, tokens, BLOCK);
        assert_eq!(self.fleet.index().store(row.slot, &store).placed as usize, keys.len());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Tokens of the prompt of this number, which shares none with others.
pub(crate) fn tokens(prompt: u32, blocks: u32) -> Vec<u32> {
    (0..blocks * BLOCK).map(|at| prompt * 1_000_000 + at).collect()
}

/// As it is asked with the usual settings.
pub(crate) fn query(tokens: &[u32]) -> Query {
    let scheme = Arc::new(Scheme::new(Algorithm::Xxh3, "", BLOCK));
    let prompt = Prompt { model: MODEL, tokens, ..Prompt::default() };
    let keys = prompt.keys(&scheme).unwrap();
    let addressing =
        kv_indexer::epp::precise::Addressing { model: MODEL.into(), lora: "".into(), scheme };
    Query { addressing, prompts: vec![keys].into() }
}

/// An endpoint picker's side: endpoints, the index, and the thread that keeps its connection.
pub(crate) struct Picker {
    pub(crate) endpoints: Arc<Endpoints>,
    pub(crate) index: Arc<dyn PrefixIndex>,
    registry: Registry,
    stop: CancellationToken,
    runtime: Runtime,
    task: Option<tokio::task::JoinHandle<anyhow::Result<()>>>,
}

/// Patience enough for a machine that does something else.
pub(crate) fn config(address: SocketAddr) -> RemoteConfig {
    RemoteConfig {
        address: address.to_string(),
        deadline: Duration::from_secs(2),
        tls: None,
        failures: 5,
        half_open: Duration::from_millis(250),
    }
}

impl Picker {
    pub(crate) fn new(config: RemoteConfig) -> Self {
        let (endpoints, registry) = (Arc::<Endpoints>::default(), Registry::new());
        let (index, task) = connect(config, &endpoints, &registry).unwrap();
        let (runtime, stop) = (threads("picker"), CancellationToken::new());
        let task = Some(runtime.spawn(task(stop.clone())));
        Self { endpoints, index, registry, stop, runtime, task }
    }

    /// A picker that has met the service.
    pub(crate) fn connected(config: RemoteConfig) -> Self {
        let picker = Self::new(config);
        picker.until("epp_indexer_connected", |connected| connected == 1.0);
        picker
    }

    pub(crate) fn tls(address: SocketAddr, tls: RemoteTls) -> Self {
        Self::new(RemoteConfig { tls: Some(tls), ..config(address) })
    }

    /// Endpoints of these names, at addresses of no consequence.
    pub(crate) fn set(&self, names: &[&str]) {
        let info = |(at, name): (u8, &&str)| {
            let address = SocketAddr::from(([10, 0, 0, at], 8000));
            EndpointInfo {
                name: EndpointName { namespace: "default".into(), name: (*name).into() },
                address,
                metrics_address: address,
                labels: Default::default(),
            }
        };
        self.endpoints.set((1..).zip(names).map(info).collect());
    }

    pub(crate) fn endpoint(&self, name: &str) -> Arc<Endpoint> {
        let list = self.endpoints.list();
        Arc::clone(list.iter().find(|endpoint| endpoint.info().name.name == name).unwrap())
    }

    /// What all endpoints hold, in order of their names. Asked from a thread with a runtime of its own.
    pub(crate) fn score(&self, query: &Query) -> Result<Vec<EndpointMatch>, IndexError> {
        let list = self.endpoints.list();
        crate::support::runtime().block_on(self.index.score(query, &list))
    }

    pub(crate) fn depths(&self, query: &Query) -> Result<Vec<u32>, IndexError> {
        Ok(self.score(query)?.iter().map(|found| found.depth).collect())
    }

    /// Waits until the endpoints hold this much. Answers that are none are no fault on the way.
    #[track_caller]
    pub(crate) fn until_depths(&self, query: &Query, want: &[u32]) {
        eventually(&format!("depths {want:?}"), || match self.depths(query) {
            Ok(depths) if depths == want => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    /// The sum of a metric's values, over labels; of those with a label, if it is named.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (name, label) = name.split_once('{').unwrap_or((name, ""));
        let label = label.trim_end_matches('}');
        let text =
            prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix(name));
        let lines = lines.filter(|line| line.starts_with('{') && line.contains(label));
        lines.filter_map(|line| line.split(' ').next_back()?.parse::<f64>().ok()).sum()
    }

    #[track_caller]
    pub(crate) fn until(&self, metric: &str, is: impl Fn(f64) -> bool) {
        eventually(metric, || match self.metric(metric) {
            value if is(value) => Ok(()),
            value => Err(value.to_string()),
        });
    }
}

impl Drop for Picker {
    fn drop(&mut self) {
        self.stop.cancel();
        let task = self.task.take().unwrap();
        let ended = self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap()
        });
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}
