//! How late the index is, as an outside client sees it through `Score`.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`probe`] | blocks of our own, published and looked for |
//! | [`steps`] | blocks of engines, looked for since the end of their step |
//! | [`storm`] | bursts of events without engines |
//! | [`backlog`] | what was published and is not applied yet |
//! | [`delay`] | a proxy that delays, to show that delays are seen |
//! | [`command`] | `loadgen storm` |
//!
//! # Concurrency
//!
//! [`watch`] has a thread with a runtime of its own, so that answers are timed when they come, whatever
//! the caller's runtime does; a storm is published by one more thread.

pub mod backlog;
pub mod command;
pub mod delay;
pub mod probe;
pub mod steps;
pub mod storm;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

pub use self::storm::StormOptions;
use self::storm::play::{Source, Storm, Totals};
use super::{report, stack::EngineAddress, stats::percentiles};
use crate::proto::kvindexer::{
    ListPodsRequest, Prompt, RegisterPodRequest, ScoreDetail, ScoreRequest, UnregisterPodRequest,
    WaitVisibleRequest, WaitVisibleResponse, kv_indexer_client::KvIndexerClient, prompt::Input,
};

/// How long the indexer may take to answer a connection, to subscribe, and to apply what is left at
/// the end.
const PATIENCE: Duration = Duration::from_secs(10);
/// After this time a probe is lost.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Chains that are held, and chains that are gone, looked at per pod at the end.
const SAMPLES: usize = 64;

type Client = KvIndexerClient<Channel>;

/// What is measured, beside whatever load there is.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// The indexer.
    pub indexer: SocketAddr,
    /// Its process, for its cost per block.
    pub indexer_pid: Option<u32>,
    /// Served model name of the probes; that of no engine, so that nothing else is moved.
    pub model: String,
    /// Probes per second, stores and removes each.
    pub probes_per_s: f64,
    /// Under which name the probes are reported: `idle`, `steady`, `burst`, `delayed`. With a storm, those
    /// that were published while a burst was not drained count as `burst` by themselves.
    pub condition: String,
    /// Engines whose own events are timed from the end of the step; may be empty.
    pub engines: Vec<EngineAddress>,
    /// Injected events.
    pub storm: Option<StormOptions>,
    /// Publish through a proxy that delays by 2 ms ± 1 ms.
    pub delayed: bool,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// The probes.
    pub freshness: report::Freshness,
    /// The storm.
    pub storm: Option<report::Storm>,
    /// Probes by time: seconds from the origin, microseconds until visible.
    pub probes: Vec<[f64; 2]>,
    /// Backlog by time: seconds from the origin, batches.
    pub backlog: Vec<[f64; 2]>,
    /// Begin and end of bursts of events, seconds from the origin; the end is when it was drained.
    pub event_bursts: Vec<[f64; 2]>,
}

/// Measures until `stop` is cancelled; times count from `origin`. Then what is under way is waited for,
/// some 20 s at most. Dropping the future stops it, too.
///
/// # Errors
///
/// An indexer that is not there, or that does not follow our publisher.
pub async fn watch(
    options: WatchOptions,
    origin: Instant,
    stop: CancellationToken,
) -> anyhow::Result<Watched> {
    let stop = stop.child_token();
    let _stopped_when_dropped = stop.clone().drop_guard();
    let (done, outcome) = oneshot::channel();
    thread::Builder::new().name("freshness".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let watched = match runtime {
            Ok(runtime) => runtime.block_on(run(options, origin, stop)),
            Err(error) => Err(error.into()),
        };
        // Nobody waits for it if the future was dropped.
        done.send(watched).unwrap_or_default();
    })?;
    outcome.await.context("the thread that measures freshness ended")?
}

async fn run(
    options: WatchOptions,
    origin: Instant,
    stop: CancellationToken,
) -> anyhow::Result<Watched> {
    let channel = connect(options.indexer).await?;
    let mut client = KvIndexerClient::new(channel);
    let block_size = block_size(&mut client, &options.model).await?;
    let board = Arc::new(Board::default());
    let mut pods = Vec::new();
    let measured =
        measure(&options, origin, &stop, (client.clone(), block_size), &board, &mut pods).await;
    // A storm that still runs ends with us.
    stop.cancel();
    for pod in pods {
        // The indexer may be gone.
        drop(client.unregister_pod(pod.unregistration()).await);
    }
    measured
}

async fn measure(
    options: &WatchOptions,
    origin: Instant,
    stop: &CancellationToken,
    (mut client, block_size): (Client, usize),
    board: &Arc<Board>,
    pods: &mut Vec<PodHandle>,
) -> anyhow::Result<Watched> {
    let at = local_endpoint(options.indexer)?;
    let nonce = fastrand::u32(..);
    let handle =
        |name: String| PodHandle { name, model: options.model.clone(), ..PodHandle::default() };
    let mut probes = probe::Probes::start(
        options,
        handle(format!("freshness-{nonce:08x}")),
        &at,
        (client.clone(), block_size),
        (origin, Arc::clone(board)),
        pods,
    )
    .await?;
    let mut sources = Vec::new();
    if let Some(storm) = &options.storm {
        for number in 0..storm.publishers {
            let pod = handle(format!("storm-{nonce:08x}-{number}"));
            let mut source = Source::bind(storm, pod, &at, block_size, number)?;
            let pod = source.pod.clone();
            pods.push(pod.clone());
            pod.register(&mut client).await?;
            followed(&pod, || source.has_subscriber()).await?;
            sources.push(source);
        }
    }
    let steps = steps::watch(options, client.clone(), stop.clone());
    let storm = play(options, sources, origin, stop, client, board);
    let ((), steps, storm) = tokio::try_join!(probes.run(stop), steps, storm)?;
    let mut watched = storm;
    probes.report(steps, &mut watched);
    Ok(watched)
}

/// Runs the storm, if there is one, and looks at what the indexer makes of it.
async fn play(
    options: &WatchOptions,
    sources: Vec<Source>,
    origin: Instant,
    stop: &CancellationToken,
    mut client: Client,
    board: &Arc<Board>,
) -> anyhow::Result<Watched> {
    let Some(storm) = &options.storm else { return Ok(Watched::default()) };
    let targets: Vec<_> =
        sources.iter().map(|source| (source.pod.clone(), Arc::clone(&source.ledger))).collect();
    let cpu_before = options.indexer_pid.and_then(cpu_ns);
    let (bursts, sent) = mpsc::channel(64);
    let storm = Storm { options: storm.clone(), sources, board: Arc::clone(board), bursts };
    let written = storm.options.to_string();
    let quiet = CancellationToken::new();
    let backlog = backlog::watch(&targets, origin, client.clone(), &quiet);
    let drains = backlog::drains(&targets, sent, origin, client.clone(), board);
    let played = async {
        let _quiet_when_done = quiet.clone().drop_guard();
        let (done, outcome) = oneshot::channel();
        let stop = stop.clone();
        thread::Builder::new().name("storm".to_owned()).spawn(move || {
            // Nobody waits for it if something else failed.
            drop(done.send(storm.play(&stop)));
        })?;
        let (sources, totals) = outcome.await.context("the thread of the storm ended")??;
        settle(sources, totals, client.clone()).await
    };
    let (seen, drains, settled) = tokio::try_join!(backlog, drains, played)?;
    let Settled { totals, lost_batches, wrong_pods } = settled;
    let cpu = options.indexer_pid.and_then(cpu_ns).zip(cpu_before);
    let rows = client.list_pods(ListPodsRequest {}).await?.into_inner().pods;
    let ours = || rows.iter().filter(|row| targets.iter().any(|(pod, _)| pod.name == row.pod));
    let report = report::Storm {
        options: written,
        publishers: targets.len() as u64,
        batches: totals.batches,
        blocks: totals.blocks,
        bursts: totals.bursts,
        blocks_per_s: totals.blocks as f64 / totals.span.as_secs_f64().max(1e-9),
        backlog_max_batches: seen.most_batches,
        backlog_max_ms: seen.oldest.as_secs_f64() * 1e3,
        drain_ms: percentiles(drains.ms),
        lost_batches,
        gaps: ours().map(|row| row.gaps).sum(),
        replays: ours().map(|row| row.replays).sum(),
        wrong_pods,
        indexer_ns_per_block: cpu
            .map(|(after, before)| after.saturating_sub(before) as f64 / totals.blocks as f64),
    };
    Ok(Watched {
        storm: Some(report),
        backlog: seen.series,
        event_bursts: drains.bursts,
        ..Watched::default()
    })
}

struct Settled {
    totals: Totals,
    lost_batches: u64,
    wrong_pods: Vec<String>,
}

/// Waits until everything is applied, and compares the pods with what they were sent.
async fn settle(
    sources: Vec<Source>,
    totals: Totals,
    mut client: Client,
) -> anyhow::Result<Settled> {
    let deadline = Instant::now() + PATIENCE;
    let (mut lost_batches, mut wrong_pods) = (0, Vec::new());
    for mut source in sources {
        let last = crate::support::sync::lock(&source.ledger).next.saturating_sub(1);
        let applied = loop {
            let answer = source.pod.wait(&mut client, last).await?;
            // A publisher that started again has its old sequences until that is noticed.
            if answer.reached && answer.applied_sequence == last {
                break Some(last);
            }
            if Instant::now() >= deadline {
                break (answer.applied_sequence < last).then_some(answer.applied_sequence);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        lost_batches += last.saturating_sub(applied.unwrap_or_default());
        let samples = source.cache.sample(SAMPLES);
        let prompts = samples.iter().map(|(tokens, _)| prompt(tokens)).collect();
        let answer = client.score(source.pod.score(prompts)).await?.into_inner();
        let depths = answer.prompts.iter().map(confirmed_depth);
        let expected = samples.iter().map(|(_, depth)| *depth);
        if applied != Some(last) || !depths.eq(expected) {
            wrong_pods.push(source.pod.name.clone());
        }
    }
    Ok(Settled { totals, lost_batches, wrong_pods })
}

/// What probes and storm know of each other.
#[derive(Debug, Default)]
pub(super) struct Board {
    /// Bursts that began.
    begun: AtomicU64,
    /// Bursts of which everything is applied, or given up.
    drained: AtomicU64,
}

impl Board {
    /// Bursts that began, and whether one of them is not drained.
    fn bursts(&self) -> (u64, bool) {
        let drained = self.drained.load(Ordering::SeqCst);
        let begun = self.begun.load(Ordering::SeqCst);
        (begun, begun > drained)
    }
}

/// A pod of ours.
#[derive(Clone, Debug, Default)]
pub(super) struct PodHandle {
    name: String,
    model: String,
    endpoint: String,
    replay: String,
}

impl PodHandle {
    fn topic(&self) -> String {
        format!("kv@{}@{}", self.name, self.model)
    }

    async fn register(&self, client: &mut Client) -> anyhow::Result<()> {
        let request = RegisterPodRequest {
            pod: self.name.clone(),
            dp_rank: Some(0),
            model: self.model.clone(),
            endpoint: self.endpoint.clone(),
            replay_endpoint: self.replay.clone(),
            ..RegisterPodRequest::default()
        };
        client.register_pod(request).await.context("RegisterPod")?;
        Ok(())
    }

    fn unregistration(&self) -> UnregisterPodRequest {
        UnregisterPodRequest { pod: self.name.clone(), dp_rank: Some(0) }
    }

    /// Waits for a sequence, a second at most.
    async fn wait(
        &self,
        client: &mut Client,
        sequence: u64,
    ) -> Result<WaitVisibleResponse, tonic::Status> {
        let request = WaitVisibleRequest {
            pod: self.name.clone(),
            dp_rank: Some(0),
            sequence,
            epoch: None,
            timeout_ms: 1_000,
        };
        Ok(client.wait_visible(request).await?.into_inner())
    }

    fn score(&self, prompts: Vec<Prompt>) -> ScoreRequest {
        ScoreRequest {
            model: self.model.clone(),
            prompts,
            pods: vec![self.name.clone()],
            detail: ScoreDetail::Pods.into(),
            ..ScoreRequest::default()
        }
    }
}

fn prompt(tokens: &[u32]) -> Prompt {
    let bytes = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    Prompt { input: Some(Input::TokenIdsLe(bytes)), ..Prompt::default() }
}

fn confirmed_depth(scores: &crate::proto::kvindexer::PromptScores) -> u32 {
    scores.pods.iter().map(|row| row.confirmed_depth).max().unwrap_or_default()
}

async fn connect(indexer: SocketAddr) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{indexer}"))?
        .connect_timeout(PATIENCE)
        .tcp_nodelay(true);
    endpoint.connect().await.with_context(|| format!("no indexer at {indexer}"))
}

/// Tokens per block in the index.
async fn block_size(client: &mut Client, model: &str) -> anyhow::Result<usize> {
    let request = async { client.list_pods(ListPodsRequest {}).await };
    let listed = tokio::time::timeout(PATIENCE, request)
        .await
        .context("the indexer does not answer")?
        .context("ListPods")?
        .into_inner();
    let of_model = listed.models.into_iter().find(|of| of.model == model).and_then(|of| of.hash);
    let size = of_model.or(listed.hash).map_or(0, |hash| hash.block_size);
    anyhow::ensure!(size > 0, "the indexer does not say its block size");
    Ok(size as usize)
}

/// Where a socket of ours binds so that the indexer reaches it.
fn local_endpoint(indexer: SocketAddr) -> anyhow::Result<String> {
    let any: IpAddr = match indexer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Sends nothing; the system says from where it would.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(indexer).with_context(|| format!("no way to {indexer}"))?;
    Ok(match socket.local_addr()?.ip() {
        IpAddr::V4(ip) => format!("tcp://{ip}:*"),
        IpAddr::V6(ip) => format!("tcp://[{ip}]:*"),
    })
}

/// Waits until the indexer subscribes.
async fn followed(
    pod: &PodHandle,
    mut has_subscriber: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !has_subscriber()? {
        if Instant::now() >= deadline {
            bail!("the indexer does not subscribe to {} at {}", pod.name, pod.endpoint);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// CPU of a process's threads so far, nanoseconds; absent where the system does not tell.
fn cpu_ns(pid: u32) -> Option<u64> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let on_cpu = threads.flatten().filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    Some(on_cpu.sum())
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
