//! Wiring: flags and configuration → running endpoint picker.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::{
    epp::{
        args::Args,
        config::{self, MetricsSource},
        datalayer::{
            Endpoint, EndpointWatcher, Endpoints, UnknownMetrics,
            discovery::{Discovery, Loaded},
            scrape::Scraper,
        },
        director::{Director, NoObjectives, Parts},
        ext_proc::ExchangeConfig,
        metrics::{EppMetrics, MetricsOptions, ScrapeFaults},
        plugins::{
            core_metrics_extractor::CoreMetricsExtractor, file_discovery::FileDiscoverySource,
            metrics_data_source::MetricsDataSource, utilization_detector::UtilizationDetector,
        },
        request::Parsers,
        scheduling::{Configured, Scheduler},
        server::{self, GrpcOptions, ServerOptions, Services, admin, health::Health},
        service::Service,
    },
    support::{
        admin as http_admin, metrics,
        task::{Stage, Supervisor},
        tls::{self, Certificate, TlsOptions},
    },
};

/// Where a running endpoint picker listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// `ext_proc`.
    pub ext_proc: SocketAddr,
    /// gRPC health.
    pub health: SocketAddr,
    /// `/metrics`.
    pub metrics: SocketAddr,
    /// `/debug/…`, if asked for.
    pub debug: Option<SocketAddr>,
}

/// What is there before the configuration is read, since plugins are built from it.
#[derive(Debug)]
pub struct Ground {
    /// The endpoints.
    pub endpoints: Arc<Endpoints>,
    /// All metrics.
    pub registry: Registry,
}

impl Ground {
    /// No endpoints; metrics of the process and the build.
    ///
    /// # Errors
    ///
    /// If metrics cannot be registered.
    pub fn new() -> prometheus::Result<Self> {
        let registry = metrics::registry()?;
        metrics::build_info(&registry, "epp_build_info", env!("CARGO_PKG_VERSION"), &[])?;
        Ok(Self { endpoints: Arc::default(), registry })
    }
}

/// Runs the endpoint picker until `requested` is cancelled, then drains. `bound` hears where it listens
/// before the first request can be answered.
///
/// # Errors
///
/// When an address cannot be bound, a certificate cannot be used, the endpoints cannot be read at
/// start, a part fails, or the drain takes longer than configured.
pub async fn run(
    args: &Args,
    loaded: config::Loaded,
    ground: Ground,
    requested: CancellationToken,
    bound: impl FnOnce(Addresses) + Send,
) -> anyhow::Result<()> {
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let Ground { endpoints, registry } = ground;
    let config = loaded.to_json();
    let grpc = listen(args, args.grpc_port, "--grpc-port").await?;
    let health_listener = listen(args, args.grpc_health_port, "--grpc-health-port").await?;
    let metrics_listener = listen(args, args.metrics_port, "--metrics-port").await?;
    let debug = match args.debug_listen {
        None => None,
        Some(address) => Some(TcpListener::bind(address).await.context("--debug-listen")?),
    };
    let addresses = Addresses {
        ext_proc: grpc.local_addr()?,
        health: health_listener.local_addr()?,
        metrics: metrics_listener.local_addr()?,
        debug: debug.as_ref().map(TcpListener::local_addr).transpose()?,
    };

    let epp_metrics = EppMetrics::register(
        &registry,
        MetricsOptions {
            stale: args.metrics_staleness_threshold,
            streams: args.enable_grpc_stream_metrics,
            ..MetricsOptions::default()
        },
    )?;
    epp_metrics.watch(args.pool_name(), &endpoints);

    let stale = args.metrics_staleness_threshold;
    let mut supervisor = Supervisor::new(requested.clone());
    let health = Health::new();
    let scraping = Scraping::new(args, &loaded.metrics, &epp_metrics)?;
    scraping.bound_staleness(&loaded.plugins);

    let discovery: Box<dyn Discovery> = match &loaded.discovery {
        None => Box::new(args.endpoints().unwrap_or_default()),
        Some(plugin) => Box::new(
            FileDiscoverySource::of(&*plugin.plugin)
                .with_context(|| format!("plugin '{}' discovers no endpoints", plugin.name))?
                .discovery(),
        ),
    };
    let synced = Loaded::default();
    let (list, set) = (Arc::clone(&endpoints), synced.clone());
    supervisor.spawn(Stage::Receive, "discovery", move |stop| async move {
        Ok(discovery.run(list, set, stop).await?)
    });
    let ready = health.clone();
    supervisor.spawn(Stage::Serve, "readiness", move |stop| async move {
        ready.set_plugins_ready(true);
        tokio::select! {
            () = synced.wait() => ready.set_synced(true),
            () = stop.cancelled() => {}
        }
        // As soon as a stop is asked for, some time before it begins.
        requested.cancelled().await;
        ready.drain();
        stop.cancelled().await;
        Ok(())
    });
    let plugins = Arc::new(PluginRemovals(loaded.plugins.clone()));
    endpoints.watch(plugins);

    for task in loaded.plugins.iter().filter_map(|configured| configured.plugin.task()) {
        supervisor.spawn(Stage::Receive, "plugin", task);
    }
    let director = Arc::new(Director::new(Parts {
        parsers: Parsers::new(&loaded.parsers),
        scheduler: Scheduler::new(loaded.handler, loaded.profiles).with_timers(|point, plugin| {
            let kind = plugin.plugin.type_name();
            Some(Arc::new(epp_metrics.plugin_timer(point, kind, &plugin.name)))
        }),
        producers: loaded.producers,
        admitters: loaded.admitters,
        pre_requests: loaded.pre_requests,
        saturation: loaded.saturation,
        objectives: Arc::new(NoObjectives),
        endpoints: Arc::clone(&endpoints),
        unknown_metrics: scraping.unknown,
        scrapers: scraping.scrapers.clone(),
        metrics: epp_metrics.clone(),
        subset_hint: !args.disable_endpoint_subset_filter,
        emit_scores: args.emit_endpoint_scores,
    }));
    for scraper in scraping.scrapers {
        let list = Arc::clone(&endpoints);
        supervisor.spawn_thread(Stage::Receive, "scraper", move |stop| {
            Ok(scraper.run_blocking(list, stop)?)
        })?;
    }

    let limits = grpc_options(args);
    let exchange =
        ExchangeConfig { max_body_bytes: max_body_bytes(args), ..ExchangeConfig::default() };
    let tls = tls(args, &epp_metrics, &mut supervisor)?;
    let options = ServerOptions { tls, drain: args.drain_timeout, ..ServerOptions::default() };
    let on_main = args.health_checking.then(|| health.clone());
    let service =
        Services::new(Service::new(director, exchange, epp_metrics.clone()), limits, on_main);
    let connections = epp_metrics.connections();
    supervisor.spawn(Stage::Serve, "ext_proc", move |stop| {
        server::serve(grpc, options, service, connections, stop)
    });
    let plain =
        ServerOptions { threads: 0, drain: Duration::from_secs(1), ..ServerOptions::default() };
    let service = Services::health(health.clone());
    // Not counted: probes come and go.
    supervisor.spawn(Stage::Serve, "health", move |stop| {
        server::serve(health_listener, plain, service, server::ConnectionMetrics::default(), stop)
    });
    let routes = admin::metrics_routes(registry, health);
    supervisor.spawn(Stage::Observe, "metrics", move |stop| async move {
        Ok(http_admin::serve(metrics_listener, routes, http_admin::Limits::default(), stop).await?)
    });
    if let Some(debug) = debug {
        let routes = admin::debug_routes(endpoints, &config, stale);
        supervisor.spawn(Stage::Observe, "debug", move |stop| async move {
            Ok(http_admin::serve(debug, routes, http_admin::Limits::default(), stop).await?)
        });
    }
    tracing::info!(
        ext_proc = %addresses.ext_proc,
        tls = args.secure_serving,
        health = %addresses.health,
        metrics = %addresses.metrics,
        "The endpoint picker serves."
    );
    bound(addresses);
    // Without Kubernetes nobody looks at readiness before it sends, so accepting ends at once.
    supervisor.run(Duration::ZERO, args.drain_timeout + DRAIN_MARGIN).await
}

/// Streams may take all of `--drain-timeout`; what comes after them takes less than this.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);

async fn listen(args: &Args, port: u16, flag: &str) -> anyhow::Result<TcpListener> {
    // Both families, as Go's listeners do.
    let ip = args.bind_address.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    let bound = TcpListener::bind((ip, port)).await;
    let bound = match bound {
        // A machine without IPv6.
        Err(_) if args.bind_address.is_none() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        bound => bound,
    };
    bound.with_context(|| format!("{flag}: cannot listen on port {port}"))
}

/// What scrapes, as configured.
struct Scraping {
    scrapers: Vec<Arc<Scraper>>,
    unknown: UnknownMetrics,
}

impl Scraping {
    fn new(args: &Args, sources: &[MetricsSource], metrics: &EppMetrics) -> anyhow::Result<Self> {
        let mut scraping = Self { scrapers: Vec::new(), unknown: args.unknown_metrics };
        for MetricsSource { source, extractors } in sources {
            let Some(data_source) = MetricsDataSource::of(&*source.plugin) else { continue };
            for extractor in extractors {
                let Some(core) = CoreMetricsExtractor::of(&*extractor.plugin) else { continue };
                let engines =
                    core.engines().with_context(|| format!("plugin '{}'", extractor.name))?;
                let config = data_source.config(args.refresh_metrics_interval);
                let scraper = Scraper::new(config, engines)
                    .with_context(|| format!("plugin '{}'", source.name))?;
                let scraper = Arc::new(scraper);
                let (source, extractor) = (source.plugin.type_name(), extractor.plugin.type_name());
                let watched = Arc::clone(&scraper);
                metrics.watch_scraper(source, extractor, move || ScrapeFaults {
                    polls: watched.stats().poll_errors().map(|(_, count)| count).sum(),
                    extracts: watched.stats().extract_errors(),
                });
                scraping.scrapers.push(scraper);
                scraping.unknown = core.unknown_metrics().unwrap_or(scraping.unknown);
            }
        }
        Ok(scraping)
    }

    /// Tells detectors of saturation how old the metrics of an idle endpoint become: as old as the
    /// longest interval, and as that once more while a scrape is late.
    fn bound_staleness(&self, plugins: &[Configured]) {
        let longest = self.scrapers.iter().map(|scraper| scraper.longest_interval()).max();
        for detector in plugins.iter().filter_map(|it| UtilizationDetector::of(&*it.plugin)) {
            detector.allow_for(2 * longest.unwrap_or_default());
        }
    }
}

/// Tells plugins of endpoints that are gone.
#[derive(Debug)]
struct PluginRemovals(Vec<Configured>);

impl EndpointWatcher for PluginRemovals {
    fn added(&self, _endpoint: &Arc<Endpoint>) {}

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        for configured in &self.0 {
            configured.plugin.endpoint_removed(endpoint);
        }
    }
}

/// The largest request body: `--grpc-max-recv-msg-size`.
fn max_body_bytes(args: &Args) -> usize {
    size(args.grpc_max_recv_msg_size, ExchangeConfig::default().max_body_bytes)
}

fn grpc_options(args: &Args) -> GrpcOptions {
    /// What a message has besides a body.
    const ENVELOPE: usize = 64 << 10;
    GrpcOptions {
        max_receive_bytes: max_body_bytes(args).saturating_add(ENVELOPE),
        max_send_bytes: size(args.grpc_max_send_msg_size, GrpcOptions::default().max_send_bytes),
    }
}

/// What a flag says, or else the default.
fn size(given: Option<u64>, default: usize) -> usize {
    given.map_or(default, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX))
}

fn tls(
    args: &Args,
    metrics: &EppMetrics,
    supervisor: &mut Supervisor,
) -> anyhow::Result<Option<Arc<ServerConfig>>> {
    if !args.secure_serving {
        return Ok(None);
    }
    let options = TlsOptions {
        cert_path: args.cert_path().map(Path::to_owned),
        min_version: args.tls_min_version,
        cipher_suites: args.tls_cipher_suites.usable.clone(),
        ..TlsOptions::default()
    };
    let certificate = Certificate::new(&options).context("--cert-path")?;
    if args.enable_cert_reload && options.cert_path.is_some() {
        let (followed, counters) = (certificate.clone(), metrics.reloads());
        supervisor.spawn(Stage::Serve, "certificate", move |stop| followed.follow(counters, stop));
    }
    Ok(Some(tls::server_config(&options, certificate)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::plugins::types;

    /// What is thought of unknown metrics, and the saturation of a pool that was looked at so many
    /// milliseconds ago, with these flags and this configuration.
    fn scraping(flags: &[&str], config: &str, age: u64) -> (UnknownMetrics, f64) {
        let line = ["epp", "--endpoint=a=127.0.0.1:1", "--config-text", config];
        let args = Args::from_command_line(line.iter().chain(flags)).unwrap();
        let Ground { endpoints, registry } = Ground::new().unwrap();
        let metrics = EppMetrics::register(&registry, MetricsOptions::default()).unwrap();
        let parts = config::Parts {
            types: &types(),
            endpoints: &endpoints,
            metrics: &registry,
            allow_experimental: false,
            defaults: &[],
        };
        let loaded = args.load(&parts).unwrap();
        let scraping = Scraping::new(&args, &loaded.metrics, &metrics).unwrap();
        scraping.bound_staleness(&loaded.plugins);
        let now = std::time::Instant::now() + Duration::from_secs(3600);
        let updated = Some(now - Duration::from_millis(age));
        let pool = [Arc::new(crate::epp::datalayer::Metrics { updated, ..Default::default() })];
        let detector = UtilizationDetector::of(&*loaded.saturation.plugin).unwrap();
        (scraping.unknown, detector.saturation(&pool, now))
    }

    #[test]
    fn the_configuration_goes_before_the_flag_for_unknown_metrics() {
        let unknown = |flags: &[&str], config: &str| scraping(flags, config, 0).0;
        let says = "plugins: [{type: core-metrics-extractor, parameters: {unknownMetrics: worst}}]";
        let other =
            "plugins: [{type: core-metrics-extractor, parameters: {defaultEngine: sglang}}]";
        let idle = &["--unknown-metrics=idle"][..];
        assert_eq!(unknown(&[], ""), UnknownMetrics::AsWorst);
        assert_eq!(unknown(idle, ""), UnknownMetrics::AsIdle);
        assert_eq!(unknown(idle, other), UnknownMetrics::AsIdle);
        assert_eq!(unknown(idle, says), UnknownMetrics::AsWorst);
    }

    #[test]
    fn an_idle_pool_is_not_saturated() {
        let saturation = |flags: &[&str], config, age| scraping(flags, config, age).1;
        assert_eq!(saturation(&[], "", 1999), 0.0);
        assert_eq!(saturation(&[], "", 2001), 1.0);
        assert_eq!(saturation(&["--refresh-metrics-interval=3s"], "", 6000), 0.0);
        let nothing = "dataLayer: {injectDefaults: false}";
        assert_eq!(saturation(&[], nothing, 200), 0.0);
        assert_eq!(saturation(&[], nothing, 201), 1.0);
    }
}
