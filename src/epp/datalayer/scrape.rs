//! Asks every endpoint for its metrics page, again and again.
//!
//! # Model
//!
//! A [`Scraper`] follows a set of [`Endpoints`]. Each endpoint has one kept-alive HTTP/1.1
//! connection, one [`PageReader`] and one [`Pace`]. What a page says is published as that endpoint's
//! [`Metrics`]; what it lacks keeps its last value. Whoever routes a request calls
//! [`Scraper::touch`]: without requests the pace slows down to save both sides the work, and the first
//! request wakes it.
//!
//! Endpoints are spread over the interval by their number, so that they are not all asked at once.
//!
//! # Concurrency
//!
//! A task per endpoint, which also drives its connection; [`Scraper::run`] owns them all. On a
//! runtime of its own ([`Scraper::run_blocking`]) nothing of this competes with requests.
//!
//! # Failure
//!
//! An endpoint that does not answer keeps its last metrics, of which the age tells; it is asked with
//! growing pauses, and on a new connection. Faults are counted by kind, and logged when they begin
//! and end.
//!
//! # Cost
//!
//! Per page some ten system calls and one pass over the page; memory is a line per endpoint, and
//! hyper's read buffer of at most 64 KiB.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::Notify,
    task::{AbortHandle, Id, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    Endpoint, EndpointId, EndpointWatcher, Endpoints, Metrics,
    engines::{Engines, PageReader},
};
use crate::support::{sync::lock, tls::TlsError};

mod client;
mod pace;
mod tls;

use self::client::Client;
pub use self::{
    client::PollError,
    pace::{Outcome, Pace},
    tls::TlsConfig,
};

/// Shortest legal [`ScrapeConfig::floor`] of a configuration, as in Go.
pub const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// How pages are fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrapeConfig {
    /// Path of the page, with its query if it has one.
    pub path: String,
    /// Port of all endpoints' pages, when it is not the one that requests go to.
    pub port: Option<u16>,
    /// `https`, and how; none = `http`.
    pub tls: Option<TlsConfig>,
    /// Time between two scrapes of an endpoint under traffic.
    pub floor: Duration,
    /// The same without any.
    pub ceiling: Duration,
    /// For one scrape, connecting included.
    pub timeout: Duration,
}

impl Default for ScrapeConfig {
    fn default() -> Self {
        Self {
            path: "/metrics".to_owned(),
            port: None,
            tls: None,
            floor: MIN_INTERVAL,
            // Half of what --metrics-staleness-threshold allows.
            ceiling: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
        }
    }
}

/// Why a scraper cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScrapeError {
    /// The path is none.
    #[error("{0:?} is no path of a metrics page; it must begin with /")]
    Path(String),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What was scraped, since the start.
#[derive(Debug, Default)]
pub struct ScrapeStats {
    scrapes: AtomicU64,
    poll_errors: [AtomicU64; PollError::REASONS.len()],
    extract_errors: AtomicU64,
    connections: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl ScrapeStats {
    /// Pages asked for.
    #[must_use]
    pub fn scrapes(&self) -> u64 {
        self.scrapes.load(Ordering::Relaxed)
    }

    /// Pages that did not come, by [`PollError::reason`].
    pub fn poll_errors(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.poll_errors.iter().map(|count| count.load(Ordering::Relaxed));
        PollError::REASONS.into_iter().zip(counts)
    }

    /// Pages that lacked something, or had it in a form that cannot be used.
    #[must_use]
    pub fn extract_errors(&self) -> u64 {
        self.extract_errors.load(Ordering::Relaxed)
    }

    /// Connections opened.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Bytes of pages read.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Time spent on all scrapes together, most of it waiting; with [`scrapes`](Self::scrapes) a mean.
    #[must_use]
    pub fn total_time(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }
}

/// Whether requests are routed, for those who sleep when none are.
#[derive(Debug, Default)]
struct Activity {
    picks: AtomicU64,
    /// Somebody waits for `wake`.
    asleep: AtomicBool,
    wake: Notify,
}

impl Activity {
    /// Sequentially consistent, like the order in [`sleep`](Self::sleep): of "picked" and "asleep"
    /// at least one side sees the other's.
    fn touch(&self) {
        self.picks.fetch_add(1, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.wake.notify_waiters();
        }
    }

    fn picks(&self) -> u64 {
        self.picks.load(Ordering::SeqCst)
    }

    /// Waits for a pick later than `seen`.
    async fn sleep(&self, seen: u64) {
        let wake = self.wake.notified();
        tokio::pin!(wake);
        wake.as_mut().enable();
        self.asleep.store(true, Ordering::SeqCst);
        if self.picks() == seen {
            wake.await;
        }
    }
}

/// Keeps the metrics of endpoints current. One per set of endpoints.
pub struct Scraper {
    config: ScrapeConfig,
    engines: Engines,
    connector: Option<tokio_rustls::TlsConnector>,
    activity: Activity,
    /// The lives to follow, of which `news` tells that they changed.
    targets: Mutex<HashMap<EndpointId, Arc<Endpoint>>>,
    news: Notify,
    stats: ScrapeStats,
}

impl fmt::Debug for Scraper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let targets = lock(&self.targets).len();
        f.debug_struct("Scraper")
            .field("config", &self.config)
            .field("targets", &targets)
            .finish_non_exhaustive()
    }
}

impl EndpointWatcher for Scraper {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        lock(&self.targets).insert(endpoint.id(), Arc::clone(endpoint));
        self.news.notify_one();
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        lock(&self.targets).remove(&endpoint.id());
        self.news.notify_one();
    }
}

impl Scraper {
    /// A scraper that follows nothing yet.
    ///
    /// # Errors
    ///
    /// When the path or the certificates cannot be used.
    pub fn new(config: ScrapeConfig, engines: Engines) -> Result<Self, ScrapeError> {
        if !client::is_path(&config.path) {
            return Err(ScrapeError::Path(config.path));
        }
        let connector = config.tls.as_ref().map(TlsConfig::connector).transpose()?;
        Ok(Self {
            config,
            engines,
            connector,
            activity: Activity::default(),
            targets: Mutex::default(),
            news: Notify::new(),
            stats: ScrapeStats::default(),
        })
    }

    /// A request is being routed: load has to be fresh now. Some nanoseconds.
    pub fn touch(&self) {
        self.activity.touch();
    }

    /// What was scraped.
    #[must_use]
    pub fn stats(&self) -> &ScrapeStats {
        &self.stats
    }

    /// The longest time for which metrics of a healthy endpoint are not looked at: when there are no
    /// requests. Who calls metrics stale has to allow for it.
    #[must_use]
    pub fn longest_interval(&self) -> Duration {
        self.config.ceiling.max(self.config.floor)
    }

    /// Follows `endpoints` until `stop` is cancelled. To be called once.
    pub async fn run(self: Arc<Self>, endpoints: Arc<Endpoints>, stop: CancellationToken) {
        endpoints.watch(Arc::clone(&self) as Arc<dyn EndpointWatcher>);
        let mut tasks = JoinSet::new();
        let mut following: HashMap<EndpointId, AbortHandle> = HashMap::new();
        let mut names: HashMap<Id, EndpointId> = HashMap::new();
        loop {
            {
                let targets = lock(&self.targets);
                following.retain(|id, task| {
                    let keep = targets.contains_key(id);
                    if !keep {
                        task.abort();
                    }
                    keep
                });
                for (&id, endpoint) in targets.iter() {
                    following.entry(id).or_insert_with(|| {
                        let scraper = Arc::clone(&self);
                        let task = tasks.spawn(scraper.follow(Arc::clone(endpoint)));
                        names.insert(task.id(), id);
                        task
                    });
                }
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.news.notified() => {}
                Some(ended) = tasks.join_next_with_id() => {
                    let task = ended.as_ref().map_or_else(tokio::task::JoinError::id, |(id, ())| *id);
                    let name = names.remove(&task);
                    if let Err(fault) = ended && fault.is_panic() {
                        error!(error = %fault, "Scraping an endpoint failed; starting over.");
                        // Not at once: it may well fail again.
                        tokio::time::sleep(self.config.ceiling).await;
                        name.and_then(|name| following.remove(&name));
                    }
                }
            }
        }
    }

    /// [`run`](Self::run) on the calling thread, on a runtime of its own: no other thread is woken
    /// for a scrape, and none that serves requests does one.
    ///
    /// # Errors
    ///
    /// When the system gives no event queue.
    pub fn run_blocking(
        self: Arc<Self>,
        endpoints: Arc<Endpoints>,
        stop: CancellationToken,
    ) -> std::io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.run(endpoints, stop));
        Ok(())
    }

    /// Scrapes one endpoint until the task is aborted.
    async fn follow(self: Arc<Self>, endpoint: Arc<Endpoint>) {
        let mut target = Target {
            client: Client::new(self.address(&endpoint), &self.config.path, self.connector.clone()),
            reader: self.engines.reader(&endpoint),
            endpoint,
            polls: true,
            extracts: true,
        };
        let mut pace = Pace::new(self.config.floor, self.config.ceiling);
        let spread = self.config.floor.mul_f64(spread(target.endpoint.id()));
        let mut seen = self.activity.picks();
        tokio::time::sleep(spread).await;
        loop {
            let start = tokio::time::Instant::now();
            let picks = self.activity.picks();
            let outcome = self.scrape(&mut target).await;
            let due = start + pace.next(outcome, picks != seen);
            seen = picks;
            // A failed endpoint is not to be asked more often because the others have work.
            let wakes = pace.is_slow() && outcome != Outcome::Failed;
            let wake = async {
                if !wakes {
                    std::future::pending::<()>().await;
                }
                self.activity.sleep(seen).await;
                tokio::time::sleep(spread).await;
            };
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = wake => pace.wake(),
                () = target.client.watch() => {}
            }
        }
    }

    fn address(&self, endpoint: &Endpoint) -> SocketAddr {
        match self.config.port {
            Some(port) => SocketAddr::new(endpoint.ip(), port),
            None => endpoint.info().metrics_address,
        }
    }

    async fn scrape(&self, target: &mut Target) -> Outcome {
        let stats = &self.stats;
        let start = Instant::now();
        target.reader.begin();
        let (client, reader) = (&mut target.client, &mut target.reader);
        let get = client.get(stats, |chunk| {
            stats.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            reader.feed(chunk);
        });
        let polled = match tokio::time::timeout(self.config.timeout, get).await {
            Ok(polled) => polled,
            Err(_) => Err(PollError::Timeout(self.config.timeout)),
        };
        let outcome = match polled {
            Ok(()) => target.take_over(stats),
            Err(error) => {
                target.client.disconnect();
                stats.poll_errors[error.index()].fetch_add(1, Ordering::Relaxed);
                if std::mem::take(&mut target.polls) {
                    let name = &target.endpoint.info().name;
                    let error = format!("{:#}", anyhow::Error::new(error));
                    warn!(endpoint = %name, error, "No metrics from an endpoint.");
                }
                Outcome::Failed
            }
        };
        stats.scrapes.fetch_add(1, Ordering::Relaxed);
        stats.nanoseconds.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        outcome
    }
}

/// An endpoint that is followed.
struct Target {
    endpoint: Arc<Endpoint>,
    client: Client,
    reader: PageReader,
    /// Its last page came.
    polls: bool,
    /// Its last page had everything.
    extracts: bool,
}

impl Target {
    /// Publishes what the page had.
    fn take_over(&mut self, stats: &ScrapeStats) -> Outcome {
        let name = &self.endpoint.info().name;
        if !std::mem::replace(&mut self.polls, true) {
            info!(endpoint = %name, "Metrics of an endpoint are back.");
        }
        let before = self.endpoint.metrics();
        let mut metrics = Metrics::clone(&before);
        let extraction = self.reader.finish(&mut metrics);
        if extraction.faults > 0 {
            stats.extract_errors.fetch_add(1, Ordering::Relaxed);
        }
        if std::mem::replace(&mut self.extracts, extraction.faults == 0) && !self.extracts {
            let (engine, error) = (self.reader.engine().name(), self.reader.complaint());
            warn!(endpoint = %name, engine, error, "Metrics page lacks something.");
        }
        if extraction.found == 0 {
            return Outcome::Failed;
        }
        let changed = metrics != *before;
        metrics.updated = Some(Instant::now());
        self.endpoint.set_metrics(metrics);
        if changed { Outcome::Changed } else { Outcome::Same }
    }
}

/// Where in an interval an endpoint has its turn, 0 to 1: neighbours are far apart.
fn spread(id: EndpointId) -> f64 {
    const GOLDEN: f64 = 0.618_033_988_749_895;
    (id.0 as f64 * GOLDEN).fract()
}

#[cfg(test)]
mod tests;
