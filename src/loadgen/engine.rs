//! A mock inference engine: vLLM's prefix cache, scheduling, KV events, OpenAI API and metrics, without
//! a model.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`sequence`] | a request's tokens and the chained hashes of its blocks |
//! | [`cache`] | block pool and prefix cache; pure |
//! | [`scheduler`] | continuous batching in steps; pure, time is an output |
//! | [`tokenizer`] | prompts to tokens: a model's tokenizer, or a deterministic stand-in |
//! | [`rank`] | one data-parallel rank: scheduler, publisher, thread |
//! | [`server`] | the HTTP API |
//! | [`metrics`] | the metrics page |
//! | [`command`] | `loadgen engine` |
//!
//! # Model
//!
//! ```text
//!             ┌ Engine ─────────────────────────────────────────────┐
//!  HTTP ────▶ │ server ─▶ rank 0: Scheduler(Cache) ─ step ─▶ XPUB   │ ────▶ [topic, sequence, batch]
//!  tokens ◀── │       └▶ rank 1: …                         ROUTER   │ ◀───▶ replay
//!             └─────────────────────────────────────────────────────┘
//! ```
//!
//! What the cache does is compared with recorded streams of real engines; how long things take is
//! [`Pace`], and the text is made up. With a model's files, prompts are tokenized by
//! [`tokenize`](crate::tokenize), whose ids are compared with those of `transformers`.
//!
//! # Concurrency
//!
//! A rank is a thread; the server is one task that owns those of its connections. [`EngineHandle`]
//! owns both: [`stop`](EngineHandle::stop) lets answers end, [`kill`](EngineHandle::kill) does not, and
//! dropping it is a kill that does not wait.

pub mod cache;
pub mod command;
pub mod metrics;
pub mod rank;
pub mod scheduler;
pub mod sequence;
pub mod server;
pub mod tokenizer;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::{net::TcpListener, sync::watch, task::JoinSet};

use self::{
    cache::{Cache, CacheOptions, EventFields},
    rank::{Live, Rank},
    server::{Faults, Server},
    tokenizer::{Pieces, Tokenizer, Words, pieces},
};
pub use self::{
    metrics::Load,
    rank::{CacheContents, EventSource},
    scheduler::{Pace, Totals},
    server::{MetricsFault, RequestHead},
};
use crate::{
    loadgen::replay::{PublishError, PublisherOptions, ReplayForm, sockets::Sockets},
    wire::encode::Form,
};

/// How long connections may still end their answers when the engine stops.
const GRACE: Duration = Duration::from_secs(2);
/// How long a start waits for ports that an engine before it is giving back.
const BIND_PATIENCE: Duration = Duration::from_secs(2);
/// How often a wait looks again.
const SLICE: Duration = Duration::from_millis(1);

/// Whose events and replay answers it writes, and whose order of eviction it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EventForm {
    /// Maps, and the topic in replay answers: vLLM 0.26 and later.
    #[default]
    Map,
    /// Arrays, and no topic in replay answers: vLLM 0.23.
    Array,
}

impl EventForm {
    fn wire(self) -> Form {
        match self {
            Self::Map => Form::Map,
            Self::Array => Form::Array,
        }
    }

    fn replay(self) -> ReplayForm {
        match self {
            Self::Map => ReplayForm::ThreeFrames,
            Self::Array => ReplayForm::TwoFrames,
        }
    }
}

/// What an engine is like.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// Where it serves HTTP; port 0 = a free one.
    pub listen: SocketAddr,
    /// Served model name.
    pub model: String,
    /// Served names of adapters.
    pub loras: Vec<String>,
    /// Adapters that run at once at most.
    pub max_loras: usize,
    /// Tokens per block, at least 1.
    pub block_size: usize,
    /// Blocks of each rank, the null block among them; at least 2.
    pub num_gpu_blocks: u32,
    /// Tokens of prompt and answer at most; what the cache cannot hold is refused in any case.
    pub max_model_len: usize,
    /// Tokens computed in one step at most.
    pub max_num_batched_tokens: usize,
    /// Requests that run at once at most, per rank.
    pub max_num_seqs: usize,
    /// May a prompt be computed in several steps?
    pub chunked_prefill: bool,
    /// Requests that wait at most, per rank; further ones are answered with 503.
    pub max_waiting: usize,
    /// Tokens of an answer to a request that does not say.
    pub default_max_tokens: usize,
    /// Ranks, each with a cache and a publisher of its own; at least 1.
    pub data_parallel_size: u32,
    /// Where rank 0 publishes events, `tcp://host:port`; port `*` = each rank takes a free one,
    /// otherwise rank r takes port + r. `None` = it does not.
    pub events: Option<String>,
    /// Where its replay socket binds, likewise.
    pub replay: Option<String>,
    /// Layout of events and replay answers.
    pub form: EventForm,
    /// Topic; `None` = `kv@ip:port@model` with the address of the HTTP server.
    pub topic: Option<String>,
    /// Batches that can be asked for again, per rank.
    pub buffer_steps: usize,
    /// How long steps take.
    pub pace: Pace,
    /// Directory of the model whose tokenizer and chat template make tokens of prompts; answers are
    /// English words then. `None` = a pseudo-tokenizer.
    pub model_dir: Option<PathBuf>,
    /// Does it serve `/v1/completions/render` and `/v1/chat/completions/render`, as vLLM with
    /// `--enable-scale-out`?
    pub scale_out: bool,
    /// Does the usage tell how many tokens were cached, as vLLM's with
    /// `--enable-prompt-tokens-details`?
    pub prompt_tokens_details: bool,
    /// Bytes of further families on the metrics page, about; a real page has some 90 000 of them.
    pub metrics_padding: usize,
}

impl Default for EngineOptions {
    /// A small and quick engine on free loopback ports, with events and replay.
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            model: "mock".to_owned(),
            loras: Vec::new(),
            max_loras: 4,
            block_size: 16,
            num_gpu_blocks: 1024,
            max_model_len: 131_072,
            max_num_batched_tokens: 8192,
            max_num_seqs: 256,
            chunked_prefill: true,
            max_waiting: 10_000,
            default_max_tokens: 16,
            data_parallel_size: 1,
            events: Some("tcp://127.0.0.1:*".to_owned()),
            replay: Some("tcp://127.0.0.1:*".to_owned()),
            form: EventForm::default(),
            topic: None,
            buffer_steps: 10_000,
            pace: Pace::default(),
            model_dir: None,
            scale_out: true,
            prompt_tokens_details: true,
            metrics_padding: 0,
        }
    }
}

/// Why an engine cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The HTTP address cannot be bound.
    #[error("cannot listen on {address}")]
    Listen {
        /// As asked for.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// A publisher cannot be bound.
    #[error("cannot publish events")]
    Publish(#[from] PublishError),
    /// A fixed endpoint has no port to count from.
    #[error("{0:?} is not tcp://host:port")]
    Endpoint(String),
    /// The model's directory cannot be used.
    #[error("{0}")]
    ModelDir(String),
    /// A thread cannot be started.
    #[error("cannot start a rank's thread")]
    Thread(#[source] io::Error),
}

/// A mock engine. See the module's page.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Starts an engine; it serves when this returns. Needs a tokio runtime with time and I/O.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(options: EngineOptions) -> Result<EngineHandle, StartError> {
        let tokenizer: Arc<dyn Tokenizer> = match &options.model_dir {
            None => Arc::new(Pieces),
            Some(directory) => {
                let words = Words::load(&options.model, directory);
                Arc::new(words.map_err(|error| StartError::ModelDir(format!("{error:#}")))?)
            }
        };
        let listener = listen(options.listen).await?;
        let failed = |source| StartError::Listen { address: options.listen, source };
        let http = listener.local_addr().map_err(failed)?;
        let options = Arc::new(EngineOptions { listen: http, ..options });
        let ranks = ranks(&options)?;
        let mut threads = Vec::new();
        for rank in &ranks {
            threads.push(rank.start().map_err(StartError::Thread)?);
        }
        let (faults, watched) = watch::channel(Faults::default());
        let server = Arc::new(Server::new(Arc::clone(&options), ranks.clone(), watched, tokenizer));
        let (stop, stopping) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(server::serve(Arc::clone(&server), listener, stopping));
        Ok(EngineHandle { http, options, ranks, threads, server, faults, stop, tasks })
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    let deadline = Instant::now() + BIND_PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                tokio::time::sleep(SLICE).await;
            }
            Err(source) => return Err(StartError::Listen { address, source }),
        }
    }
}

fn ranks(options: &EngineOptions) -> Result<Vec<Arc<Rank>>, StartError> {
    let topic =
        options.topic.clone().unwrap_or_else(|| format!("kv@{}@{}", options.listen, options.model));
    let mut ranks = Vec::new();
    for number in 0..options.data_parallel_size.max(1) {
        let cache = Cache::new(CacheOptions {
            num_gpu_blocks: options.num_gpu_blocks,
            block_size: options.block_size,
            fields: EventFields::default(),
            unhashed_first: options.form == EventForm::Map,
        });
        let limits = scheduler::Limits {
            max_num_batched_tokens: options.max_num_batched_tokens.max(1),
            max_num_seqs: options.max_num_seqs.max(1),
            chunked_prefill: options.chunked_prefill,
            max_loras: options.max_loras.max(1),
        };
        let scheduler = scheduler::Scheduler::new(cache, limits, options.pace, pieces::VOCABULARY);
        let live = match &options.events {
            None => None,
            Some(events) => {
                let publisher = PublisherOptions {
                    replay: options.replay.as_deref().map(|at| of_rank(at, number)).transpose()?,
                    form: options.form.replay(),
                    buffer_steps: options.buffer_steps,
                    ..PublisherOptions::default()
                };
                let sockets = Sockets::bind(&of_rank(events, number)?, publisher, BIND_PATIENCE)?;
                Some(Live::new(sockets, topic.clone(), options.form.wire()))
            }
        };
        ranks.push(Rank::new(number, scheduler, live, options.max_waiting));
    }
    Ok(ranks)
}

/// The endpoint of a rank: port + rank, or again any.
fn of_rank(endpoint: &str, rank: u32) -> Result<String, StartError> {
    let wrong = || StartError::Endpoint(endpoint.to_owned());
    let (host, port) = endpoint.rsplit_once(':').ok_or_else(wrong)?;
    if port == "*" || port == "0" {
        return Ok(format!("{host}:*"));
    }
    let port: u32 = port.parse().map_err(|_| wrong())?;
    Ok(format!("{host}:{}", port + rank))
}

/// A running engine.
#[derive(Debug)]
pub struct EngineHandle {
    http: SocketAddr,
    options: Arc<EngineOptions>,
    ranks: Vec<Arc<Rank>>,
    threads: Vec<JoinHandle<()>>,
    server: Arc<Server>,
    faults: watch::Sender<Faults>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl EngineHandle {
    /// Where it serves HTTP, with the real port.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Its options, `listen` with the real port.
    #[must_use]
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Options with which the same engine starts again at the same ports, after this one has stopped.
    /// With several ranks on free ports only HTTP stays where it is.
    #[must_use]
    pub fn same_ports(&self) -> EngineOptions {
        let mut options = (*self.options).clone();
        if let [source] = self.event_sources().as_slice() {
            options.events = Some(source.endpoint.clone());
            options.replay.clone_from(&source.replay_endpoint);
        }
        options
    }

    /// Where its ranks publish, by rank; empty if they do not.
    #[must_use]
    pub fn event_sources(&self) -> Vec<EventSource> {
        self.ranks.iter().filter_map(|rank| rank.source()).collect()
    }

    /// What a rank's cache holds now; empty for a rank that there is not.
    #[must_use]
    pub fn cache_contents(&self, rank: u32) -> CacheContents {
        self.ranks.get(rank as usize).map(|rank| rank.contents()).unwrap_or_default()
    }

    /// A rank's sums since the start; zero for a rank that there is not.
    #[must_use]
    pub fn totals(&self, rank: u32) -> Totals {
        self.ranks.get(rank as usize).map(|rank| rank.totals()).unwrap_or_default()
    }

    /// HTTP requests with a complete head so far, scrapes and probes included.
    #[must_use]
    pub fn requests_seen(&self) -> u64 {
        self.server.heads().seen()
    }

    /// The last completion requests, oldest first; 256 at most.
    #[must_use]
    pub fn request_heads(&self) -> Vec<RequestHead> {
        self.server.heads().last()
    }

    /// Forgets what is cached on every rank, as `POST /reset_prefix_cache`. `false` if one has blocks
    /// in use.
    pub fn reset_prefix_cache(&self) -> bool {
        reset_all(&self.ranks)
    }

    /// Shows a fixed load on the metrics page, on every rank, until [`unpin_load`](Self::unpin_load).
    /// `kv_usage` is a share, 0 to 1.
    pub fn pin_load(&self, running: usize, waiting: usize, kv_usage: f64) {
        let load = Load { running, waiting, kv_usage };
        self.faults.send_modify(|faults| faults.load = Some(load));
    }

    /// Shows the real load again.
    pub fn unpin_load(&self) {
        self.faults.send_modify(|faults| faults.load = None);
    }

    /// Shows fixed adapters in `vllm:lora_requests_info`, on every rank; `None` = the real ones.
    pub fn pin_loras(&self, running_and_waiting: Option<[Vec<String>; 2]>) {
        self.faults.send_modify(|faults| faults.loras = running_and_waiting);
    }

    /// How the metrics page fails; `None` = it does not.
    pub fn fail_metrics(&self, fault: Option<MetricsFault>) {
        self.faults.send_modify(|faults| faults.metrics = fault);
    }

    /// Closes the HTTP port and all connections, or opens it again. Takes effect soon after.
    pub fn refuse_connections(&self, refuse: bool) {
        self.faults.send_modify(|faults| faults.refuse = refuse);
    }

    /// Waits until every rank has a subscriber for its topic, at most `timeout`; tells whether.
    pub async fn wait_for_subscribers(&self, timeout: Duration) -> bool {
        let subscribed = || self.ranks.iter().all(|rank| rank.has_subscriber().unwrap_or(false));
        wait(timeout, subscribed).await
    }

    /// Waits until no request runs or waits and all events of steps are published, at most `timeout`;
    /// tells whether.
    pub async fn wait_idle(&self, timeout: Duration) -> bool {
        wait(timeout, || self.ranks.iter().all(|rank| rank.is_idle())).await
    }

    /// Why it stopped by itself, if it did.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        self.ranks.iter().find_map(|rank| rank.fault())
    }

    /// Stops: no new connections, answers end within two seconds or are cut, queued events are flushed
    /// for two seconds at most.
    pub async fn stop(mut self) {
        // Without a receiver the server has ended already.
        self.stop.send(true).ok();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // The server bounds its own end; this bounds a server that does not.
        drop(tokio::time::timeout(GRACE * 2, ended).await);
        self.end(false).await;
    }

    /// Stops as a killed process does: connections break, queued events are lost.
    pub async fn kill(mut self) {
        self.tasks.shutdown().await;
        self.end(true).await;
    }

    async fn end(&mut self, abruptly: bool) {
        for rank in &self.ranks {
            rank.stop();
        }
        let threads = std::mem::take(&mut self.threads);
        let ranks = self.ranks.clone();
        let closing = tokio::task::spawn_blocking(move || {
            for thread in threads {
                // A panic there has been printed.
                drop(thread.join());
            }
            for rank in ranks {
                rank.close(abruptly);
            }
        });
        drop(closing.await);
    }
}

impl Drop for EngineHandle {
    fn drop(&mut self) {
        for rank in &self.ranks {
            rank.stop();
            // Has nothing left to close after `stop` and `kill`.
            rank.close(true);
        }
    }
}

/// Resets every rank's cache, also behind one that cannot; tells whether all could.
fn reset_all(ranks: &[Arc<Rank>]) -> bool {
    let kept = ranks.iter().filter(|rank| !rank.reset_cache()).count();
    kept == 0
}

/// Looks until `done`, at most `timeout`.
async fn wait(timeout: Duration, done: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(SLICE).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_count_ports_from_the_first() {
        let of = |endpoint, rank| of_rank(endpoint, rank).ok();
        assert_eq!(of("tcp://127.0.0.1:5557", 2).as_deref(), Some("tcp://127.0.0.1:5559"));
        assert_eq!(of("tcp://*:0", 2).as_deref(), Some("tcp://*:*"));
        assert_eq!(of("tcp://h:*", 1).as_deref(), Some("tcp://h:*"));
        assert_eq!((of("tcp://h:x", 0), of("x", 0)), (None, None));
    }
}
