//! Everything that a run is made against, as processes of its own: engines, indexer, endpoint picker and
//! gateway, so that each one's cost can be told.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`fleet`] | `loadgen fleet`: engines in one process |
//! | [`child`] | a process that says where it listens |
//! | [`guard`] | the child's side: it ends when its parent does |
//! | [`policy`] | the endpoint picker's configuration for each routing policy |
//! | [`envoy`] | real Envoy |
//!
//! A process is this program again (`loadgen component …`), so that nothing else has to be built or
//! found.
//!
//! # Model
//!
//! ```text
//! engines ─▶ indexer, which follows them ─▶ endpoint picker, which knows them ─▶ Envoy
//! ```
//!
//! in this order, each one ready before the next one starts, all on free ports of loopback.
//!
//! # Reset
//!
//! A stack is made for one arm of a comparison and ends with it. What an arm could leave to the next
//! one (blocks in engines, the index, what the endpoint picker remembers of requests or expects of
//! engines) is gone with the processes. Somebody else's endpoint picker keeps what it has: to reset
//! that one is up to whoever runs it.

pub mod child;
pub mod envoy;
pub mod fleet;
pub mod guard;
pub mod policy;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{child::Child, envoy::Envoy, policy::Surroundings};
pub use self::{
    fleet::{FleetOptions, FleetPorts},
    policy::{ApproximateLimits, Policy},
};
use super::{
    drive::Target,
    resources::{Component, Watched},
};
use crate::proto::kvindexer::{
    ListPodsRequest, PodState, PodStatus, kv_indexer_client::KvIndexerClient,
};

/// How often we look whether something is ready.
const LOOK: Duration = Duration::from_millis(5);
/// Bytes of a page at most.
const PAGE_BYTES: u64 = 16 << 20;

/// What is started.
#[derive(Clone, Debug)]
pub struct StackOptions {
    /// The engines.
    pub fleet: FleetOptions,
    /// Who routes.
    pub policy: Policy,
    /// Envoy's binary; `None` = we play its part.
    pub envoy: Option<PathBuf>,
    /// Let the endpoint picker tell what it predicted.
    pub want_hits: bool,
    /// Start an indexer even if the policy does not ask one, for freshness.
    pub indexer: bool,
}

/// How it is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The `loadgen` whose `component` command the processes are; `None` = this program.
    pub program: Option<PathBuf>,
    /// Where the engines are. An endpoint picker of somebody else's has to know.
    pub ports: FleetPorts,
    /// Time between scrapes of an engine's metrics by `epp`, the same for all policies; at least 50 ms.
    pub scrape_interval: Duration,
    /// Let policies that know prefixes ask the first engine for the token ids of prompts that are text;
    /// prompts that are ids need nobody.
    pub render: bool,
    /// What the approximate policy looks at and remembers.
    pub approximate: ApproximateLimits,
    /// How long each part may take until it is ready.
    pub patience: Duration,
}

impl Default for Launch {
    /// This program, free ports, scrapes as often as `epp` can.
    fn default() -> Self {
        Self {
            program: None,
            ports: FleetPorts::default(),
            scrape_interval: Duration::from_millis(50),
            render: false,
            approximate: ApproximateLimits::default(),
            patience: Duration::from_secs(20),
        }
    }
}

/// Where an engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineAddress {
    /// Its name for the indexer and the endpoint picker: the address of its HTTP server.
    pub name: String,
    /// HTTP.
    pub http: SocketAddr,
    /// Where it publishes, `tcp://host:port`.
    pub events: String,
    /// Where it answers replays.
    pub replay: String,
}

/// What the endpoint picker says of its predictions since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Predictions {
    /// Predictions compared that were right within a block.
    pub exact: u64,
    /// Those that promised more than there was.
    pub over: u64,
    /// Those that promised less.
    pub under: u64,
    /// Tokens promised of compared requests.
    pub predicted_tokens: f64,
    /// Tokens that the engines reported for them.
    pub actual_tokens: f64,
    /// Sum of the distances between the two.
    pub difference_tokens: f64,
    /// Tokens that the best candidates held more than the picked ones.
    pub regret_tokens: f64,
    /// Requests that were routed without the indexer's answer.
    pub fallbacks: u64,
}

impl Predictions {
    /// Predictions that were compared.
    #[must_use]
    pub fn compared(&self) -> u64 {
        self.exact + self.over + self.under
    }

    fn of(page: &str) -> Self {
        let sum = |name: &str, labels: &str| sum_of(page, name, labels);
        let outcome = |outcome: &str| {
            sum("epp_prefix_predictions_total", &format!("outcome=\"{outcome}\"")) as u64
        };
        Self {
            exact: outcome("exact"),
            over: outcome("over"),
            under: outcome("under"),
            predicted_tokens: sum("epp_prefix_predicted_tokens_sum", ""),
            actual_tokens: sum("epp_prefix_actual_tokens_sum", ""),
            difference_tokens: sum("epp_prefix_difference_tokens_sum", ""),
            regret_tokens: sum("epp_prefix_regret_tokens_total", ""),
            fallbacks: sum("epp_precise_fallback_total", "") as u64,
        }
    }
}

/// What an engine says of its prefix cache since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheTotals {
    /// Prompt tokens that were looked up.
    pub queries: u64,
    /// Of these, found.
    pub hits: u64,
}

/// A running stack; its processes end with it.
#[derive(Debug)]
pub struct Stack {
    engines: Vec<EngineAddress>,
    fleet: Child,
    indexer: Option<(Child, SocketAddr)>,
    picker: Picker,
    gateway: Option<Envoy>,
    patience: Duration,
}

/// Who routes.
#[derive(Debug)]
struct Picker {
    ext_proc: SocketAddr,
    /// Of `epp` only.
    metrics: Option<SocketAddr>,
    /// Somebody else's may be unknown.
    pid: Option<u32>,
    /// Ours.
    child: Option<Child>,
}

impl Stack {
    /// Starts everything and waits until requests can be sent, and until the indexer, if there is one,
    /// follows all engines.
    ///
    /// # Errors
    ///
    /// What did not start, with the last lines that it said.
    pub async fn start(options: StackOptions) -> Result<Self> {
        Self::start_with(options, &Launch::default()).await
    }

    /// As [`start`](Self::start), with another program or other ports.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn start_with(options: StackOptions, launch: &Launch) -> Result<Self> {
        ensure!(options.fleet.engines > 0, "a fleet has at least one engine");
        let program = match &launch.program {
            Some(program) => program.clone(),
            None => std::env::current_exe().context("the path of this program")?,
        };
        let (fleet, engines) = fleet(&program, &options.fleet, launch).await?;
        let indexer = match options.indexer || options.policy == Policy::Precise {
            true => Some(indexer(&program, &options.fleet, &engines, launch).await?),
            false => None,
        };
        let asked = indexer.as_ref().map(|(_, address)| *address);
        let picker = picker(&program, &options, &engines, asked, launch).await?;
        let gateway = match &options.envoy {
            None => None,
            Some(path) => {
                let pods: Vec<_> = engines.iter().map(|engine| engine.http).collect();
                let patience = launch.patience;
                Some(Envoy::start(&program, path, picker.ext_proc, &pods, patience).await?)
            }
        };
        Ok(Self { engines, fleet, indexer, picker, gateway, patience: launch.patience })
    }

    /// Where requests go.
    #[must_use]
    pub fn target(&self) -> Target {
        match &self.gateway {
            Some(envoy) => Target::Gateway(format!("http://{}", envoy.clients)),
            None => Target::Picker(self.picker.ext_proc),
        }
    }

    /// The engines.
    #[must_use]
    pub fn engines(&self) -> &[EngineAddress] {
        &self.engines
    }

    /// The indexer's gRPC address.
    #[must_use]
    pub fn indexer(&self) -> Option<SocketAddr> {
        self.indexer.as_ref().map(|(_, address)| *address)
    }

    /// The indexer's process.
    #[must_use]
    pub fn indexer_pid(&self) -> Option<u32> {
        self.indexer.as_ref().map(|(child, _)| child.pid())
    }

    /// The endpoint picker's `ext_proc` address.
    #[must_use]
    pub fn ext_proc(&self) -> Option<SocketAddr> {
        Some(self.picker.ext_proc)
    }

    /// The endpoint picker's metrics page; `None` if it is not `epp`.
    #[must_use]
    pub fn epp_metrics(&self) -> Option<SocketAddr> {
        self.picker.metrics
    }

    /// Its processes, for the sampler; ours is not among them.
    #[must_use]
    pub fn components(&self) -> Vec<Component> {
        let processes = [
            ("engines", Some(self.fleet.pid())),
            ("indexer", self.indexer_pid()),
            ("epp", self.picker.pid),
            ("gateway", self.gateway.as_ref().map(|envoy| envoy.pid)),
        ];
        let known = processes.into_iter().filter_map(|(name, pid)| Some((name, pid?)));
        known
            .map(|(name, pid)| Component {
                name: name.to_owned(),
                sources: vec![Watched::Pid(pid)],
            })
            .collect()
    }

    /// What `epp` says of its predictions since its start; `None` if another endpoint picker decides. All
    /// is zero for policies that promise nothing.
    ///
    /// # Errors
    ///
    /// When its page cannot be read.
    pub async fn scrape_predictions(&self) -> Result<Option<Predictions>> {
        let Some(metrics) = self.picker.metrics else { return Ok(None) };
        let page = page(metrics, "/metrics").await.context("the endpoint picker's metrics")?;
        Ok(Some(Predictions::of(&page)))
    }

    /// What the engines say of their prefix caches since their start, in their order.
    ///
    /// # Errors
    ///
    /// An engine whose page cannot be read, by address.
    pub async fn engine_totals(&self) -> Result<Vec<CacheTotals>> {
        let mut totals = Vec::with_capacity(self.engines.len());
        for EngineAddress { http, .. } in &self.engines {
            let page = page(*http, "/metrics").await.with_context(|| format!("engine {http}"))?;
            totals.push(CacheTotals {
                queries: sum_of(&page, "vllm:prefix_cache_queries_total", "") as u64,
                hits: sum_of(&page, "vllm:prefix_cache_hits_total", "") as u64,
            });
        }
        Ok(totals)
    }

    /// A process that ended by itself, and what it said last.
    pub fn fault(&mut self) -> Option<String> {
        self.children().find_map(Child::fault)
    }

    /// Ends all processes; returns when they are gone.
    pub async fn stop(mut self) {
        self.children().for_each(Child::ask_to_end);
        let until = Instant::now() + self.patience;
        for child in self.children() {
            child.ended(until.saturating_duration_since(Instant::now())).await;
        }
    }

    fn children(&mut self) -> impl Iterator<Item = &mut Child> {
        let gateway = self.gateway.as_mut().map(|envoy| &mut envoy.child);
        let indexer = self.indexer.as_mut().map(|(child, _)| child);
        gateway.into_iter().chain(&mut self.picker.child).chain(indexer).chain([&mut self.fleet])
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // All at once; each one waits for itself then.
        self.children().for_each(Child::ask_to_end);
    }
}

/// A part of the stack: this program again.
fn component(program: &Path, name: &'static str, arguments: Vec<String>) -> Result<Child> {
    let line = ["component", name, "--"].into_iter().map(str::to_owned).chain(arguments);
    Child::start(name, program, line)
}

async fn fleet(
    program: &Path,
    options: &FleetOptions,
    launch: &Launch,
) -> Result<(Child, Vec<EngineAddress>)> {
    let mut arguments = options.arguments(&launch.ports);
    arguments.push("--json".to_owned());
    let mut child = component(program, "fleet", arguments)?;
    let all = |lines: &[String]| {
        let engines: Vec<EngineAddress> =
            lines.iter().filter_map(|line| line.parse().ok()).collect();
        (engines.len() >= options.engines).then_some(engines)
    };
    let engines = child.heard("where the engines are", launch.patience, all).await?;
    Ok((child, engines))
}

async fn indexer(
    program: &Path,
    fleet: &FleetOptions,
    engines: &[EngineAddress],
    launch: &Launch,
) -> Result<(Child, SocketAddr)> {
    let mut arguments = vec![
        "--grpc-listen=127.0.0.1:0".to_owned(),
        "--admin-listen=127.0.0.1:0".to_owned(),
        "--log-level=warn".to_owned(),
        format!("--block-size={}", fleet.block_size),
    ];
    for EngineAddress { name, events, replay, .. } in engines {
        arguments.push(format!("--pod={name}={events},replay={replay},model={}", fleet.model));
    }
    let mut child = component(program, "kv-indexer", arguments)?;
    let grpc = child.announced("grpc listening on ", launch.patience).await?;
    let mut client = KvIndexerClient::connect(format!("http://{grpc}")).await?;
    let deadline = Instant::now() + launch.patience;
    loop {
        let pods =
            client.list_pods(ListPodsRequest {}).await.context("ListPods")?.into_inner().pods;
        let live = pods.iter().filter(|pod| pod.state() == PodState::Live).count();
        if live == engines.len() {
            return Ok((child, grpc));
        }
        if let Some(last_words) = child.last_words().await {
            bail!(last_words);
        }
        if Instant::now() >= deadline {
            let states: Vec<_> = pods.iter().map(PodStatus::state).collect();
            bail!("the indexer follows {live} of {} engines: {states:?}", engines.len());
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn picker(
    program: &Path,
    options: &StackOptions,
    engines: &[EngineAddress],
    indexer: Option<SocketAddr>,
    launch: &Launch,
) -> Result<Picker> {
    if let Policy::External { address, pid, .. } = options.policy {
        return Ok(Picker { ext_proc: address, metrics: None, pid, child: None });
    }
    let around = Surroundings {
        block_size: options.fleet.block_size,
        approximate: launch.approximate,
        indexer,
        want_hits: options.want_hits,
        model: &options.fleet.model,
        render: engines.first().filter(|_| launch.render).map(|engine| engine.http),
    };
    let Some(document) = options.policy.document(&around) else {
        let picked = match options.policy {
            Policy::Constant => 1,
            _ => engines.len(),
        };
        let destinations = engines.iter().take(picked);
        let arguments = destinations.map(|engine| format!("--destination={}", engine.http));
        let mut child = component(program, "null", arguments.collect())?;
        let ext_proc = child.announced("ext_proc listening on ", launch.patience).await?;
        let pid = Some(child.pid());
        return Ok(Picker { ext_proc, metrics: None, pid, child: Some(child) });
    };
    let mut arguments = vec![
        format!("--config-text={document}"),
        "--bind-address=127.0.0.1".to_owned(),
        "--grpc-port=0".to_owned(),
        "--grpc-health-port=0".to_owned(),
        "--metrics-port=0".to_owned(),
        "--secure-serving=false".to_owned(),
        "--health-checking=true".to_owned(),
        "--drain-timeout=1s".to_owned(),
        format!("--refresh-metrics-interval={}us", launch.scrape_interval.as_micros()),
        "-v=0".to_owned(),
    ];
    for (number, engine) in engines.iter().enumerate() {
        arguments.push(format!("--endpoint=pod-{number}={}", engine.http));
    }
    let mut child = component(program, "epp", arguments)?;
    let ext_proc = child.announced("ext_proc listening on ", launch.patience).await?;
    let metrics = child.announced("metrics listening on ", launch.patience).await?;
    let deadline = Instant::now() + launch.patience;
    let asks = usize::from(options.policy == Policy::Precise);
    loop {
        let page = page(metrics, "/metrics").await.unwrap_or_default();
        let seen = sum_of(&page, "llm_d_epp_ready_endpoints", "") as usize;
        let connected = sum_of(&page, "epp_indexer_connected", "") as usize;
        if (seen, connected) == (engines.len(), asks) {
            let pid = Some(child.pid());
            return Ok(Picker { ext_proc, metrics: Some(metrics), pid, child: Some(child) });
        }
        if let Some(last_words) = child.last_words().await {
            bail!(last_words);
        }
        if Instant::now() >= deadline {
            bail!(
                "epp knows {seen} of {} engines, {connected} of {asks} indexers{}",
                engines.len(),
                child.quote()
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The body of `GET path` with status 200.
async fn page(address: SocketAddr, path: &str) -> Result<String> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || read_page(address, &path)).await?
}

/// A connection for each page: they are read a few times in a run.
fn read_page(address: SocketAddr, path: &str) -> Result<String> {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream.take(PAGE_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP response")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.split(' ').nth(1) == Some("200"), "{status}");
    let chunked = head.to_ascii_lowercase().contains("\r\ntransfer-encoding: chunked");
    Ok(if chunked { unchunked(body) } else { body.to_owned() })
}

/// A body without the sizes of its chunks, up to what does not look like one.
fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let Some((chunk, rest)) = rest.split_at_checked(size).filter(|_| size > 0) else { break };
        whole.push_str(chunk);
        body = rest.strip_prefix("\r\n").unwrap_or(rest);
    }
    whole
}

/// The sum of the series of `name` whose labels contain `labels`; 0 if there is none.
fn sum_of(page: &str, name: &str, labels: &str) -> f64 {
    page.lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']) && rest.contains(labels))
        .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined() {
        assert_eq!(unchunked("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), "abcde");
        assert_eq!(unchunked("9\r\nabc"), "");
        assert_eq!(unchunked("x"), "");
    }

    #[test]
    fn predictions_are_read_from_the_page() {
        let page = "# TYPE epp_prefix_predictions_total counter\n\
                    epp_prefix_predictions_total{outcome=\"exact\"} 7\n\
                    epp_prefix_predictions_total{outcome=\"over\"} 2\n\
                    epp_prefix_predicted_tokens_sum 900\n\
                    epp_prefix_predicted_tokens_summary 1\n\
                    epp_prefix_actual_tokens_sum 880\n\
                    epp_prefix_regret_tokens_total{decided_by=\"load\"} 16\n\
                    epp_prefix_regret_tokens_total{decided_by=\"tie\"} 32\n";
        let read = Predictions::of(page);
        let want = Predictions {
            exact: 7,
            over: 2,
            predicted_tokens: 900.0,
            actual_tokens: 880.0,
            regret_tokens: 48.0,
            ..Predictions::default()
        };
        assert_eq!((read, read.compared()), (want, 9));
        assert_eq!(Predictions::of(""), Predictions::default());
    }
}
