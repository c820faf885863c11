//! How late the index is, as an outside client sees it through `Score`.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`probe`] | blocks of our own, published and looked for |
//! | [`steps`] | blocks of engines, looked for since the end of their step |
//! | [`picks`] | the same in the name of engines, until the endpoint picker routes by them |
//! | [`publisher`] | a publisher of ours |
//! | [`storm`] | bursts of events without engines |
//! | [`backlog`] | what was published and is not applied yet |
//! | [`delay`] | a proxy that delays, to show that delays are seen |
//! | [`command`] | `loadgen storm` |
//!
//! # Concurrency
//!
//! [`watch`] has a thread with a runtime of its own, so that answers are timed when they come, whatever
//! the caller's runtime does; a storm is published by one more thread.
//!
//! # Failure
//!
//! What is wrong at the start is an error. After that, an indexer that dies or does not answer a call
//! in five seconds ends the measurement; what was measured until then is returned, with warnings.

pub mod backlog;
pub mod command;
pub mod delay;
pub mod picks;
pub mod probe;
pub mod publisher;
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
use super::{progress::Progress, report, stack::EngineAddress, stats::percentiles};
use crate::proto::kvindexer::{
    ListPodsRequest, Prompt, RegisterPodRequest, ScoreDetail, ScoreRequest, UnregisterPodRequest,
    WaitVisibleRequest, WaitVisibleResponse, kv_indexer_client::KvIndexerClient, prompt::Input,
};

/// How long the indexer may take to answer a connection, to subscribe, and to apply what is left at
/// the end.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a call may take.
const CALL: Duration = Duration::from_secs(5);
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
    /// The endpoint picker's `ext_proc` address, if it routes by what the indexer says: it is asked until
    /// it names the one of `engines` for which blocks were published. Needs two engines, to choose from.
    pub picker: Option<SocketAddr>,
    /// Injected events.
    pub storm: Option<StormOptions>,
    /// Where the storm's backlog is told while it is looked at.
    pub progress: Option<Arc<Progress>>,
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
    /// Why this is not all, or not to be trusted; empty if nothing went wrong.
    pub warnings: Vec<String>,
}

/// Measures until `stop` is cancelled; times count from `origin`. Then what is under way is waited for,
/// some 25 s at most. Dropping the future stops it, too.
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
    let asked = (client.clone(), block_size);
    // Boxed: it is large.
    let measured = Box::pin(measure(&options, origin, &stop, asked, &board, &mut pods)).await;
    // A storm that still runs ends with us.
    stop.cancel();
    for pod in pods {
        // The indexer may be gone, or silent for good.
        let asked = client.unregister_pod(pod.unregistration());
        if tokio::time::timeout(CALL, asked).await.is_err() {
            break;
        }
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
    let listener = steps::Listener::connect(&options.engines)?;
    let mut picks = picks::Picks::start(
        options,
        handle,
        &at,
        (client.clone(), block_size),
        Arc::clone(board),
        pods,
    )
    .await?;
    let (mut steps, mut watched) = Default::default();
    // What has begun is not lost by a part that fails: all end, and what there is is written down.
    let ended = |part: anyhow::Result<()>| part.map_err(|error| failed(&error, stop)).err();
    let warnings = tokio::join!(
        async { ended(probes.run(stop).await) },
        async { ended(steps::watch(listener, client.clone(), stop, &mut steps).await) },
        async {
            // Its end is none of the others.
            picks.as_mut()?.run(stop).await.err().map(|error| in_part(&error))
        },
        play(options, sources, origin, stop, client.clone(), board, &mut watched),
    );
    watched.warnings.extend([warnings.0, warnings.1, warnings.2].into_iter().flatten());
    let picked = picks.map_or_else(Default::default, picks::Picks::end);
    probes.report(steps, picked, &mut watched);
    Ok(watched)
}

/// Ends the measurement because of a part, and says why.
fn failed(error: &anyhow::Error, stop: &CancellationToken) -> String {
    stop.cancel();
    in_part(error)
}

fn in_part(error: &anyhow::Error) -> String {
    format!("freshness was measured in part: {error:#}")
}

/// Runs the storm, if there is one, and looks at what the indexer makes of it.
async fn play(
    options: &WatchOptions,
    sources: Vec<Source>,
    origin: Instant,
    stop: &CancellationToken,
    mut client: Client,
    board: &Arc<Board>,
    watched: &mut Watched,
) {
    let Some(storm) = &options.storm else { return };
    let targets: Vec<_> =
        sources.iter().map(|source| (source.pod.clone(), Arc::clone(&source.ledger))).collect();
    let cpu_before = options.indexer_pid.and_then(cpu_ns);
    let (bursts, sent) = mpsc::channel(64);
    let storm = Storm { options: storm.clone(), sources, board: Arc::clone(board), bursts };
    let written = storm.options.to_string();
    let quiet = CancellationToken::new();
    let (mut seen, mut drains, mut settled) =
        (backlog::Seen::default(), backlog::Drains::default(), Settled::default());
    let told = options.progress.as_deref();
    let backlog = backlog::watch(&targets, (origin, told), client.clone(), &quiet, &mut seen);
    let drained = backlog::drains(&targets, sent, origin, client.clone(), board, &mut drains);
    let played = async {
        let _quiet_when_done = quiet.clone().drop_guard();
        let (done, outcome) = oneshot::channel();
        let stop = stop.clone();
        thread::Builder::new().name("storm".to_owned()).spawn(move || {
            // Nobody waits for it if something else failed.
            drop(done.send(storm.play(&stop)));
        })?;
        let (sources, totals) = outcome.await.context("the thread of the storm ended")??;
        settled.totals = totals;
        settle(sources, &mut settled, client.clone()).await
    };
    let ended = |part: anyhow::Result<()>| part.map_err(|error| failed(&error, stop)).err();
    let warnings =
        tokio::join!(async { ended(backlog.await) }, async { ended(drained.await) }, async {
            ended(played.await)
        },);
    watched.warnings.extend([warnings.0, warnings.1, warnings.2].into_iter().flatten());
    let Settled { totals, lost_batches, wrong_pods } = settled;
    let cpu = options.indexer_pid.and_then(cpu_ns).zip(cpu_before);
    let mut rows = Vec::new();
    if watched.warnings.is_empty() {
        match call("ListPods", client.list_pods(ListPodsRequest {})).await {
            Ok(answer) => rows = answer.pods,
            Err(error) => watched.warnings.push(failed(&error, stop)),
        }
    }
    let ours = || rows.iter().filter(|row| targets.iter().any(|(pod, _)| pod.name == row.pod));
    watched.storm = Some(report::Storm {
        options: written,
        publishers: targets.len() as u64,
        batches: totals.batches,
        blocks: totals.blocks,
        bursts: totals.bursts,
        undrained: totals.bursts.saturating_sub(drains.ms.len() as u64),
        blocks_per_s: totals.blocks as f64 / totals.span.as_secs_f64().max(1e-9),
        backlog_max_batches: seen.most_batches,
        backlog_max_ms: seen.oldest.as_secs_f64() * 1e3,
        drain_ms: percentiles(drains.ms),
        lost_batches,
        gaps: ours().map(|row| row.gaps).sum(),
        replays: ours().map(|row| row.replays).sum(),
        wrong_pods,
        indexer_ns_per_block: cpu
            .filter(|_| totals.blocks > 0)
            .map(|(after, before)| after.saturating_sub(before) as f64 / totals.blocks as f64),
    });
    watched.backlog = seen.series;
    watched.event_bursts = drains.bursts;
}

#[derive(Debug, Default)]
struct Settled {
    totals: Totals,
    lost_batches: u64,
    wrong_pods: Vec<String>,
}

/// Waits until everything is applied, and compares the pods with what they were sent. After a call
/// without an answer none is made; pods that could not be looked at are wrong.
async fn settle(
    sources: Vec<Source>,
    settled: &mut Settled,
    mut client: Client,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut outcome = Ok(());
    for mut source in sources {
        let name = source.pod.name.clone();
        if outcome.is_ok() {
            match settle_one(&mut source, &mut client, deadline, &mut settled.lost_batches).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => outcome = Err(error),
            }
        }
        settled.wrong_pods.push(name);
    }
    outcome
}

/// Whether a pod is what it should be.
async fn settle_one(
    source: &mut Source,
    client: &mut Client,
    deadline: Instant,
    lost_batches: &mut u64,
) -> anyhow::Result<bool> {
    let last = crate::support::sync::lock(&source.ledger).next.saturating_sub(1);
    let applied = loop {
        let answer = source.pod.wait(client, last, deadline).await?;
        // A publisher that started again has its old sequences until that is noticed.
        if answer.reached && answer.applied_sequence == last {
            break Some(last);
        }
        if Instant::now() >= deadline {
            break (answer.applied_sequence < last).then_some(answer.applied_sequence);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    *lost_batches += last.saturating_sub(applied.unwrap_or_default());
    let samples = source.cache.sample(SAMPLES);
    let prompts = samples.iter().map(|(tokens, _)| prompt(tokens)).collect();
    let answer = call("Score", client.score(source.pod.score(prompts))).await?;
    let depths = answer.prompts.iter().map(confirmed_depth);
    let expected = samples.iter().map(|(_, depth)| *depth);
    Ok(applied == Some(last) && depths.eq(expected))
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
    rank: u32,
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
            dp_rank: Some(self.rank),
            model: self.model.clone(),
            endpoint: self.endpoint.clone(),
            replay_endpoint: self.replay.clone(),
            ..RegisterPodRequest::default()
        };
        call("RegisterPod", client.register_pod(request)).await?;
        Ok(())
    }

    fn unregistration(&self) -> UnregisterPodRequest {
        UnregisterPodRequest { pod: self.name.clone(), dp_rank: Some(self.rank) }
    }

    /// Waits for a sequence until `deadline`, a second at most; what is visible already is told after it,
    /// too.
    async fn wait(
        &self,
        client: &mut Client,
        sequence: u64,
        deadline: Instant,
    ) -> anyhow::Result<WaitVisibleResponse> {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let request = WaitVisibleRequest {
            pod: self.name.clone(),
            dp_rank: Some(self.rank),
            sequence,
            epoch: None,
            timeout_ms: left.clamp(1, 1_000) as u32,
        };
        call("WaitVisible", client.wait_visible(request)).await
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

/// The answer of a call, which has its time.
async fn call<T>(
    name: &'static str,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(CALL, answer).await {
        Ok(answer) => Ok(answer.context(name)?.into_inner()),
        Err(_) => bail!("the indexer does not answer {name} within {CALL:?}"),
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
    let listed = call("ListPods", client.list_pods(ListPodsRequest {})).await?;
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
