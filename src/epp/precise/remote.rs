//! The `kv-indexer` service as a [`PrefixIndex`]: block keys over one `ScoreStream`, compact answers, a
//! circuit breaker.
//!
//! ```text
//!  request threads                              one task
//!  breaker ─▶ question ─▶ bounded channel ─▶ ScoreStream ─▶ kv-indexer
//!    ▲           ▲                                               │
//!    └── judge ◀─┴─ reply, within the deadline ◀─ by request_id ◀┘
//!                                        ListPods, WatchPods ─▶ rows
//! ```
//!
//! # Failure
//!
//! A question fails at once while there is no connection or the breaker is open, and never takes longer
//! than its deadline, to the timer's millisecond. An answer that breaks the protocol ends the
//! connection. The next one is made within half a second of the service's return.
//!
//! # Cost
//!
//! Keys are copied once, and once more when they are encoded. While the breaker is open a request costs
//! a load of a word and takes no lock.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use prometheus::Registry;
use tokio::sync::Notify;

use self::{
    breaker::Breaker,
    judge::{Asked, Verdict, judge},
    link::Link,
    metrics::{RemoteMetrics, Speculated},
    speculation::{Add, Command},
    table::{Joined, Rows},
    transport::Target,
};
use crate::{
    epp::{
        datalayer::{Endpoint, Endpoints},
        precise::{Addressing, EndpointMatch, IndexError, PrefixIndex, Query, SpeculationId},
        scheduling::{BoxFuture, Task},
    },
    model::RequestKey,
    proto::kvindexer::{self as pb, prompt::Input},
    support::tls::Identity,
};

mod breaker;
mod judge;
mod link;
mod metrics;
mod session;
mod speculation;
mod table;
mod transport;

/// Where the service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// `host:port`, or `http://…`, `https://…`; several, with commas between them, are replicas. So are
    /// the addresses that a name has.
    pub address: String,
    /// How long a request waits for its scores at most.
    pub deadline: Duration,
    /// TLS; `None` = plaintext.
    pub tls: Option<RemoteTls>,
    /// Failures in a row that open the breaker.
    pub failures: u32,
    /// After this long an open breaker lets one question through.
    pub half_open: Duration,
}

/// How the service's certificate is judged, and what is shown to it. Files are read for each connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteTls {
    /// PEM file of the authorities; `None`: the system's.
    pub ca: Option<std::path::PathBuf>,
    /// The name that the certificate has to have; `None`: that of the address.
    pub server_name: Option<String>,
    /// Accept any certificate.
    pub insecure_skip_verify: bool,
    /// Our own certificate, for a service that asks.
    pub identity: Option<Identity>,
}

/// Makes the index and what keeps its connection.
///
/// # Errors
///
/// An address or certificate that cannot be used; metrics that cannot be registered.
pub fn connect(
    config: RemoteConfig,
    endpoints: &Arc<Endpoints>,
    registry: &Registry,
) -> anyhow::Result<(Arc<dyn PrefixIndex>, Task)> {
    let RemoteConfig { address, deadline, tls, failures, half_open } = config;
    let target = Target::new(&address, tls.as_ref())?;
    let shared = Arc::new(Shared {
        deadline,
        endpoints: Arc::clone(endpoints),
        metrics: RemoteMetrics::register(registry, &target.to_string())?,
        target,
        breaker: Breaker::new(failures, half_open),
        rows: ArcSwapOption::empty(),
        joined: ArcSwapOption::empty(),
        link: ArcSwapOption::empty(),
        problem: ArcSwapOption::empty(),
        list_again: Notify::new(),
        requests: AtomicU64::new(1),
        entries: AtomicU64::new(1),
    });
    let index: Arc<dyn PrefixIndex> = Arc::new(Remote(Arc::clone(&shared)));
    Ok((index, Box::new(move |stop| Box::pin(session::run(shared, stop)))))
}

/// What callers and the connection's task share.
#[derive(Debug)]
struct Shared {
    target: Target,
    deadline: Duration,
    endpoints: Arc<Endpoints>,
    metrics: RemoteMetrics,
    breaker: Breaker,
    /// The rows as last listed; none before the first connection.
    rows: ArcSwapOption<Rows>,
    /// The same with the endpoints, made by the first who needs it.
    joined: ArcSwapOption<Joined>,
    /// None while there is no connection.
    link: ArcSwapOption<Link>,
    /// Why there is no connection.
    problem: ArcSwapOption<String>,
    /// The rows are not those of which answers speak.
    list_again: Notify,
    requests: AtomicU64,
    entries: AtomicU64,
}

impl Shared {
    /// The rows and the endpoints of this moment.
    fn joined(&self) -> Option<Arc<Joined>> {
        let (rows, endpoints) = (self.rows.load_full()?, self.endpoints.list());
        let known = self.joined.load_full().filter(|known| {
            Arc::ptr_eq(&known.rows, &rows) && Arc::ptr_eq(&known.endpoints, &endpoints)
        });
        // Two may do this at once, and one that comes late stores the older one: the next caller sees
        // that, and does it again.
        known.or_else(|| {
            let joined = Arc::new(Joined::new(rows, endpoints));
            self.joined.store(Some(Arc::clone(&joined)));
            Some(joined)
        })
    }

    async fn score(
        &self,
        query: &Query,
        endpoints: &[Arc<Endpoint>],
    ) -> Result<Vec<EndpointMatch>, IndexError> {
        if query.prompts.iter().all(Vec::is_empty) {
            let joined = self.joined().ok_or(IndexError::Disconnected)?;
            return Ok(Verdict::nothing(&joined).of(&joined, endpoints));
        }
        let (allowed, began) = self.breaker.ask(Instant::now());
        self.metrics.breaker(began);
        if !allowed {
            return Err(IndexError::Open);
        }
        let outcome = self.ask(query, endpoints).await;
        self.metrics.breaker(match &outcome {
            Ok(_) | Err(IndexError::Refused(_) | IndexError::Settings) => self.breaker.succeeded(),
            // Nobody was asked.
            Err(IndexError::Busy | IndexError::Open) => None,
            Err(IndexError::Disconnected | IndexError::Deadline | IndexError::Garbage(_)) => {
                self.breaker.failed(Instant::now())
            }
        });
        outcome
    }

    async fn ask(
        &self,
        query: &Query,
        endpoints: &[Arc<Endpoint>],
    ) -> Result<Vec<EndpointMatch>, IndexError> {
        let link = self.link.load_full().ok_or(IndexError::Disconnected)?;
        let joined = self.joined().ok_or(IndexError::Disconnected)?;
        let start = Instant::now();
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let answer = link.ask(|| request(id, query, self.deadline), &self.metrics)?;
        let answer = tokio::time::timeout(self.deadline, answer).await;
        self.metrics.called(start.elapsed());
        let answer =
            answer.map_err(|_| IndexError::Deadline)?.map_err(|_| IndexError::Disconnected)?;
        let blocks: Vec<usize> = query.prompts.iter().map(Vec::len).collect();
        let asked = Asked { addressing: &query.addressing, blocks: &blocks };
        let verdict = match judge(&answer, &asked, &joined) {
            // The rows may have been listed again meanwhile.
            Err(IndexError::Settings) => {
                let newer = self.joined().ok_or(IndexError::Disconnected)?;
                judge(&answer, &asked, &newer).map(|verdict| verdict.of(&newer, endpoints))
            }
            verdict => verdict.map(|verdict| verdict.of(&joined, endpoints)),
        };
        match &verdict {
            Err(IndexError::Settings) => self.list_again.notify_one(),
            Err(error @ IndexError::Garbage(_)) => {
                tracing::warn!(indexer = %self.target, %error, "An answer cannot be used.");
                link.broken.cancel();
            }
            _ => {}
        }
        verdict
    }

    /// Sends a command about an entry, if there is a connection and room.
    fn command(&self, command: Command) -> Option<()> {
        let sent = self.link.load().as_ref()?.commands.try_send(command);
        if sent.is_err() {
            self.metrics.speculated(Speculated::Dropped);
        }
        sent.ok()
    }
}

/// A question as it goes out. `deadline` zero = none.
fn request(request_id: u64, query: &Query, deadline: Duration) -> pb::ScoreRequest {
    let keys = |keys: &Vec<RequestKey>| pb::Prompt {
        input: Some(Input::BlockKeys(pb::BlockKeys {
            keys: keys.iter().map(|key| key.0).collect(),
        })),
        ..pb::Prompt::default()
    };
    let Addressing { model, lora, scheme } = &query.addressing;
    pb::ScoreRequest {
        request_id,
        model: model.as_ref().into(),
        lora: lora.as_ref().into(),
        prompts: query.prompts.iter().map(keys).collect(),
        pods: Vec::new(),
        hash_fingerprint: scheme.fingerprint(),
        detail: pb::ScoreDetail::Compact.into(),
        timeout_ms: u32::try_from(deadline.as_micros().div_ceil(1000)).unwrap_or(u32::MAX),
        max_pods: 0,
    }
}

/// The callers' side.
#[derive(Debug)]
struct Remote(Arc<Shared>);

impl PrefixIndex for Remote {
    fn addressing(&self, served: &str) -> Option<Addressing> {
        self.0.rows.load().as_ref()?.addressing(served)
    }

    fn score<'a>(
        &'a self,
        query: &'a Query,
        endpoints: &'a [Arc<Endpoint>],
    ) -> BoxFuture<'a, Result<Vec<EndpointMatch>, IndexError>> {
        Box::pin(async move {
            let outcome = self.0.score(query, endpoints).await;
            if let Err(error) = &outcome {
                self.0.metrics.failed(error);
            }
            outcome
        })
    }

    fn speculate(
        &self,
        query: &Query,
        endpoint: &Endpoint,
        ttl: Duration,
    ) -> Option<SpeculationId> {
        let shared = &*self.0;
        if query.prompts.iter().all(Vec::is_empty) {
            return None;
        }
        let joined = shared.joined()?;
        let (pod, rank) = joined.of(endpoint)?.mark.clone()?;
        let link = shared.link.load_full()?;
        if !speculation::reserve(&link.open) {
            shared.metrics.speculated(Speculated::Dropped);
            return None;
        }
        let id = SpeculationId(shared.entries.fetch_add(1, Ordering::Relaxed));
        let until = Instant::now() + ttl;
        let add = Add { id, query: query.clone(), pod, rank, until };
        if link.commands.try_send(Command::Add(add)).is_err() {
            link.open.fetch_sub(1, Ordering::Relaxed);
            shared.metrics.speculated(Speculated::Dropped);
            return None;
        }
        Some(id)
    }

    fn extend(&self, entry: SpeculationId, ttl: Duration) {
        self.0.command(Command::Extend { id: entry, until: Instant::now() + ttl }).unwrap_or(());
    }

    fn take_back(&self, entry: SpeculationId) {
        self.0.command(Command::TakeBack { id: entry }).unwrap_or(());
    }

    fn impediments(&self, served: &str) -> Vec<String> {
        let shared = &*self.0;
        if shared.link.load().is_none() {
            let why = shared.problem.load_full();
            let why = why.as_ref().map_or("not yet", |why| why.as_str());
            return vec![format!("no connection to the indexer at {}: {why}", shared.target)];
        }
        shared.joined().map(|joined| joined.impediments(served)).unwrap_or_default()
    }
}
