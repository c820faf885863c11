//! Wiring: configuration → running service.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use prometheus::Registry;
use tokio::{net::TcpListener, sync::watch};
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::{
    index::{IndexConfig, runs::RunIndex},
    indexer::{
        IndexerConfig,
        config::GrpcTls,
        metrics::{
            FleetCollector, ScoreMetrics, ServerMetrics,
            llmd::{self, IngestTotals, PodTotals},
            reload_metrics,
            snapshot::SnapshotMetrics,
        },
        pods::{FollowedFile, Pods},
        ready,
        server::{self, Protection},
        service::{Parts, Service},
        snapshot::{Loader, Snapshots},
        speculation::Speculations,
        tokenizers,
    },
    ingest::{Ingest, fleet::Fleet, metrics::IngestMetrics},
    model::RowId,
    support::{
        access::Access,
        admin::{self, Routes},
        metrics,
        task::{Stage, Supervisor},
        tls::{self, Certificate, ClientAuthority},
    },
};

/// How often it is looked whether the threads of ingest still run.
const THREAD_CHECK: Duration = Duration::from_millis(100);

/// Where a running indexer listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The gRPC API.
    pub grpc: SocketAddr,
    /// `/metrics`, `/livez`, `/readyz`, `/config`.
    pub admin: SocketAddr,
}

/// Runs the service until `requested` is cancelled, then drains in order. `bound` hears where it
/// listens before the first request can be answered.
///
/// # Errors
///
/// When an address cannot be bound, a thread cannot be started, a part fails, or the drain takes
/// longer than configured.
pub async fn run(
    config: IndexerConfig,
    requested: CancellationToken,
    bound: impl FnOnce(Addresses) + Send,
) -> anyhow::Result<()> {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let grpc = listen(config.grpc_listen, "grpcListen").await?;
    let http = listen(config.admin_listen, "adminListen").await?;
    let addresses = Addresses { grpc: grpc.local_addr()?, admin: http.local_addr()? };

    let tiers = Arc::new(config.tiers.table());
    let index = Arc::new(RunIndex::new(IndexConfig {
        tiers: Arc::clone(&tiers),
        speculative_weight: config.tiers.speculative,
        cap_bytes: config.index_cap_bytes,
        orphan_blocks: config.ingest.orphan_blocks,
        max_pods: config.ingest.max_pods,
    }));
    let fleet = Arc::new(Fleet::new(index));
    let speculations =
        Arc::new(Speculations::new(Arc::clone(fleet.index()), config.api.max_speculations));

    let registry = metrics::registry()?;
    metrics::build_info(&registry, "kv_build_info", env!("CARGO_PKG_VERSION"), &[])?;
    let tokenizer = tokenizers::load(&config.tokenizers, &registry)?;
    let score_metrics = ScoreMetrics::register(&registry, config.llmd_metrics)?;
    let ingest_metrics = IngestMetrics::register(&registry)?;
    let collector = FleetCollector::new(
        Arc::clone(&fleet),
        Arc::clone(&tiers),
        Some(Arc::clone(&speculations)),
    )?;
    registry.register(Box::new(collector))?;

    let mut known: Vec<RowId> = config
        .ingest
        .pods
        .iter()
        .map(|pod| RowId { pod: Arc::from(pod.pod.as_str()), rank: pod.rank })
        .collect();
    // Before anything else writes to the index.
    let snapshot_metrics = SnapshotMetrics::register(&registry)?;
    let loader = Loader {
        fleet: Arc::clone(&fleet),
        models: config.api.models.clone(),
        tiers: Arc::clone(&tiers),
        metrics: snapshot_metrics.clone(),
    };
    // A snapshot has no more than the index, whose cap counts more for each block.
    let most_bytes = config.index_cap_bytes.saturating_mul(2).saturating_add(64 << 20);
    let peer = config.bootstrap_from.as_deref();
    let store = loader.start(&config.snapshot, peer, most_bytes).await?;
    if config.ingest.bind.is_some() {
        // They come by themselves, so they are waited for as those that are declared.
        known.extend(fleet.unclaimed().into_iter().map(|(row, _)| row.id.clone()));
    }
    let ingest = Arc::new(Ingest::start(
        config.ingest.clone(),
        config.api.models.clone(),
        Arc::clone(&tiers),
        Arc::clone(&fleet),
        ingest_metrics.clone(),
    )?);
    if config.llmd_metrics {
        let (fleet, ingest) = (Arc::clone(&fleet), Arc::clone(&ingest));
        llmd::register(&registry, move || totals(&fleet, &ingest, &ingest_metrics))?;
    }
    let snapshots = Arc::new(Snapshots::new(
        Arc::clone(&ingest),
        Arc::clone(&fleet),
        store,
        config.snapshot.clone(),
        snapshot_metrics,
    ));
    let pods = Arc::new(Pods::new(Arc::clone(&ingest), config.ingest.max_pods));
    for pod in &config.ingest.pods {
        pods.add(pod.clone()).with_context(|| format!("pod {:?} of the configuration", pod.pod))?;
    }

    // Read once before readiness is judged: its pods are known at start, too.
    let binds = config.ingest.bind.is_some();
    let pods_file = config.pods_file.clone().map(|path| pods.open_file(path, binds));
    known.extend(pods_file.iter().flat_map(FollowedFile::rows));

    let mut supervisor = Supervisor::new(requested.clone());
    let (ready_sender, ready) = watch::channel(false);
    let service = Service::new(Parts {
        fleet: Arc::clone(&fleet),
        tiers,
        config: Arc::new(config.api.clone()),
        registry: Arc::<Pods>::clone(&pods),
        speculations: Arc::clone(&speculations),
        metrics: score_metrics,
        tokenizer,
        stop: supervisor.stop(Stage::Serve),
    });
    service.serve_snapshots(Arc::<Snapshots>::clone(&snapshots), config.snapshot.max_streams);
    let Secured { tls, grpc: access, admin: admin_access, metrics: server_metrics } =
        secured(&config, addresses, &registry, &mut supervisor)?;
    let protection = Protection { access, metrics: server_metrics.clone() };
    let drain = config.drain;
    let serving = ready.clone();
    supervisor.spawn(Stage::Serve, "grpc", move |stop| {
        server::serve_protected(grpc, tls, service, protection, serving, stop, drain)
    });
    // Not ready any more as soon as a shutdown is asked for, some time before it begins.
    let timeout = config.ready_timeout;
    supervisor.spawn(Stage::Serve, "readiness", move |_| {
        ready::run(fleet, known, timeout, ready_sender, requested)
    });
    supervisor.spawn(Stage::Serve, "speculation", move |stop| async move {
        speculations.run(stop).await
    });
    let discovery = Arc::clone(&pods);
    supervisor.spawn(Stage::Receive, "discovery", |stop| discovery.run_discovery(stop));
    let saving = Arc::clone(&snapshots);
    supervisor.spawn(Stage::Receive, "snapshots", |stop| saving.run(stop));
    if let Some(file) = pods_file {
        let every = config.pods_file_poll;
        supervisor.spawn(Stage::Receive, "pods file", |stop| pods.run_file(file, every, stop));
    }
    supervisor.spawn_thread(Stage::Apply, "ingest", move |stop| {
        // The threads below run by themselves; this one notices if one does not, and ends them, in
        // order.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let stopped = || tokio::time::timeout(THREAD_CHECK, stop.cancelled());
        while runtime.block_on(async { stopped().await.is_err() }) {
            ingest.check()?;
        }
        let stopped = ingest.stop(drain);
        snapshots.last();
        stopped
    })?;
    let state = ready;
    let routes = Routes::new()
        .metrics(registry)
        .readiness(move || if *state.borrow() { Ok(()) } else { Err("not ready") })
        .config(&config.to_json())
        .guarded(admin_access, move |denied| server_metrics.refused(denied.reason()));
    supervisor.spawn(Stage::Observe, "admin", move |stop| async move {
        Ok(admin::serve(http, routes, admin::Limits::default(), stop).await?)
    });
    bound(addresses);
    supervisor.run(config.readiness_grace, config.drain).await
}

/// Who may do what at both listeners.
struct Secured {
    tls: Option<Arc<ServerConfig>>,
    grpc: Access,
    admin: Access,
    metrics: ServerMetrics,
}

/// TLS of the gRPC listener and tokens of both, with tasks that follow their files.
fn secured(
    config: &IndexerConfig,
    addresses: Addresses,
    registry: &Registry,
    supervisor: &mut Supervisor,
) -> anyhow::Result<Secured> {
    let tokens = config.auth.tokens().context("auth.tokenFile")?;
    let options = config.grpc_tls.as_ref().map(|tls| &tls.options);
    let proved = options.is_some_and(|o| o.client_ca.is_some() && !o.client_optional);
    let access = |at, proved| config.auth.access(tokens.as_ref(), at, proved);
    let (grpc, admin) = (access(addresses.grpc, proved), access(addresses.admin, false));
    for (field, access) in [("grpcListen", &grpc), ("adminListen", &admin)] {
        if let Access::Nobody { setting } = access {
            tracing::warn!(field, "Not on loopback and without a token: {setting} for all of it.");
        }
    }
    let metrics = ServerMetrics::register(registry)?;
    let reload = config.grpc_tls.as_ref().is_some_and(|tls| tls.reload);
    let reload = reload && options.is_some_and(|o| o.cert_path.is_some() || o.client_ca.is_some());
    let counters = match reload || tokens.is_some() {
        true => Some(reload_metrics(registry)?),
        false => None,
    };
    if let (Some(tokens), Some(counters)) = (tokens, counters.clone()) {
        supervisor.spawn(Stage::Serve, "tokens", move |stop| tokens.follow(counters, stop));
    }
    let Some(GrpcTls { options, .. }) = &config.grpc_tls else {
        return Ok(Secured { tls: None, grpc, admin, metrics });
    };
    let certificate = Certificate::new(options).context("grpcTls.certPath")?;
    let clients = ClientAuthority::new(options).context("grpcTls.clientCa")?;
    if let Some(counters) = counters.filter(|_| reload) {
        if let Some(clients) = clients.clone() {
            let counters = counters.clone();
            supervisor
                .spawn(Stage::Serve, "clients' CA", move |stop| clients.follow(counters, stop));
        }
        let followed = certificate.clone();
        supervisor.spawn(Stage::Serve, "certificate", move |stop| followed.follow(counters, stop));
    }
    let tls = Some(tls::server_config_with(options, certificate, clients).context("grpcTls")?);
    Ok(Secured { tls, grpc, admin, metrics })
}

async fn listen(address: SocketAddr, field: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{field}: cannot listen on {address}"))
}

fn totals(fleet: &Fleet, ingest: &Ingest, metrics: &IngestMetrics) -> IngestTotals {
    let rows = fleet.table();
    let pods = rows.rows.iter().map(|row| {
        let status = row.status();
        PodTotals {
            pod: Arc::clone(&row.id.pod),
            messages: status.messages,
            reconnections: status.reconnections,
        }
    });
    IngestTotals {
        admissions: metrics.stored_blocks.get(),
        evictions: metrics.removed_blocks.get(),
        active_subscribers: ingest.subscriptions() as u64,
        pods: pods.collect(),
    }
}
