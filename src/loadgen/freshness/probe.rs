//! Blocks of our own, published and looked for.
//!
//! # Model
//!
//! A probe is a block that nobody else has. It is published as an engine does, by a pod that is
//! registered for this; time runs from just before the send until the first answer of `Score` that
//! shows it. Later its removal is published and looked for in the same way. Probes come at irregular
//! times, whether earlier ones are visible or not, so that a slow indexer is not asked less.
//!
//! # Cost
//!
//! All probes that are out are asked for in one request, and only one request is on its way at a time.
//! None is while no probe is out. An answer is therefore late by up to one round trip: the time between
//! two answers is reported as the resolution.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::{
    Board, CALL, Client, PROBE_TIMEOUT, PodHandle, WatchOptions, Watched, call, confirmed_depth,
    delay::{Delay, DelayProxy},
    micros, percentiles,
    picks::Picked,
    prompt,
    publisher::{Publisher, Sent, removed, stored},
    steps::Steps,
    storm::cache::mix,
};
use crate::{
    proto::kvindexer::{ScoreRequest, ScoreResponse},
    wire::encode::Event,
};

/// Probes that are out at a time; beyond that none is published.
const MOST_OUT: usize = 256;
/// Comparisons with `WaitVisible` that wait at most.
const MOST_CHECKS: usize = 1_024;
/// Probes kept one by one; percentiles are of these.
const MOST_SAMPLES: usize = 1_000_000;

/// A stream of `Score` calls, one at a time.
pub(super) struct Poller {
    asks: mpsc::Sender<ScoreRequest>,
    answers: Streaming<ScoreResponse>,
    last: Option<Instant>,
    /// Time between two answers while there is something to look for, nanoseconds.
    gaps: Histogram<u64>,
}

impl Poller {
    pub(super) async fn open(client: &mut Client) -> anyhow::Result<Self> {
        let (asks, requests) = mpsc::channel(1);
        // To a minute.
        let gaps = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        let answers = client.score_stream(ReceiverStream::new(requests));
        let answers = call("ScoreStream", answers).await?;
        Ok(Self { asks, answers, last: None, gaps })
    }

    /// Asks. `fresh` = there was nothing to look for before.
    pub(super) fn ask(&mut self, request: ScoreRequest, fresh: bool) -> anyhow::Result<()> {
        if fresh {
            self.last = Some(Instant::now());
        }
        self.asks.try_send(request).context("the indexer ended ScoreStream")
    }

    /// The answer and when it came. May be dropped and called again.
    pub(super) async fn answer(&mut self) -> anyhow::Result<(ScoreResponse, Instant)> {
        let answer = self.answers.message().await.context("ScoreStream")?;
        let now = Instant::now();
        let answer = answer.context("the indexer ended ScoreStream")?;
        if let Some(error) = &answer.error {
            bail!("Score refuses a probe: {}", error.message);
        }
        if let Some(last) = self.last.replace(now) {
            self.gaps.saturating_record((now - last).as_nanos() as u64);
        }
        Ok((answer, now))
    }

    fn resolution_us(&self) -> Option<f64> {
        (!self.gaps.is_empty()).then(|| self.gaps.value_at_quantile(0.5) as f64 / 1e3)
    }
}

/// An event that is looked for.
#[derive(Debug)]
struct Probe {
    tokens: Vec<u32>,
    hash: u64,
    store: bool,
    sent: Sent,
    /// A burst was not drained then.
    in_burst: bool,
    /// Bursts that had begun then.
    bursts: u64,
}

/// A probe that became visible, for the comparison.
#[derive(Debug)]
struct Check {
    sent: Sent,
    ours_us: f64,
}

/// Publishes probes and looks for them.
pub(super) struct Probes {
    publisher: Publisher,
    // Between its sockets and the indexer.
    _proxy: Option<DelayProxy>,
    client: Client,
    poller: Poller,
    board: Arc<Board>,
    origin: Instant,
    condition: String,
    gap: Duration,
    block_size: usize,
    random: fastrand::Rng,
    salt: u64,
    made: u64,
    /// Published and not seen yet.
    out: Vec<Probe>,
    /// Visible and not removed yet.
    resident: VecDeque<Probe>,
    checks: VecDeque<Check>,
    /// Kind and microseconds.
    samples: Vec<(&'static str, String, f64)>,
    series: Vec<[f64; 2]>,
    theirs: Vec<f64>,
    differences: Vec<f64>,
    lost: u64,
}

impl Probes {
    /// Binds and registers the pod, and waits until the indexer follows it.
    pub(super) async fn start(
        options: &WatchOptions,
        pod: PodHandle,
        at: &str,
        (mut client, block_size): (Client, usize),
        (origin, board): (Instant, Arc<Board>),
        pods: &mut Vec<PodHandle>,
    ) -> anyhow::Result<Self> {
        let mut publisher = Publisher::bind(pod, at)?;
        let (mut proxy, mut condition) = (None, options.condition.clone());
        if options.delayed {
            let target = publisher.pod.endpoint.trim_start_matches("tcp://").parse()?;
            let new =
                DelayProxy::start(std::net::SocketAddr::ip(&target), target, Delay::default())
                    .context("the delaying proxy cannot be started")?;
            publisher.pod.endpoint = format!("tcp://{}", new.address());
            proxy = Some(new);
            condition = "delayed".to_owned();
        }
        publisher.start(&mut client, pods).await?;
        let poller = Poller::open(&mut client).await?;
        let per_s = options.probes_per_s.clamp(0.1, 5_000.0);
        Ok(Self {
            publisher,
            _proxy: proxy,
            client,
            poller,
            board,
            origin,
            condition,
            // Stores and removes.
            gap: Duration::from_secs_f64(0.5 / per_s),
            block_size,
            random: fastrand::Rng::with_seed(1),
            salt: fastrand::u64(..),
            made: 0,
            out: Vec::new(),
            resident: VecDeque::new(),
            checks: VecDeque::new(),
            samples: Vec::new(),
            series: Vec::new(),
            theirs: Vec::new(),
            differences: Vec::new(),
            lost: 0,
        })
    }

    /// Runs until `stop`, and until what is out then is seen or lost. What is out when the indexer does not
    /// answer is lost.
    pub(super) async fn run(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let outcome = self.probe(stop).await;
        self.lost += self.out.len() as u64;
        outcome
    }

    async fn probe(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut next = tokio::time::Instant::now();
        let mut asked: Option<Vec<u64>> = None;
        let mut give_up = next;
        loop {
            if asked.is_none() && !self.out.is_empty() {
                asked = Some(self.ask(true)?);
                give_up = tokio::time::Instant::now() + PROBE_TIMEOUT;
            }
            if asked.is_none() {
                self.compare().await?;
                if stop.is_cancelled() {
                    return Ok(());
                }
            }
            let stopping = stop.is_cancelled();
            tokio::select! {
                biased;
                () = stop.cancelled(), if !stopping => {}
                answer = self.poller.answer(), if asked.is_some() => {
                    let (answer, now) = answer?;
                    self.look(&asked.take().unwrap_or_default(), &answer, now);
                    if !self.out.is_empty() {
                        asked = Some(self.ask(false)?);
                        give_up = tokio::time::Instant::now() + PROBE_TIMEOUT;
                    }
                }
                () = tokio::time::sleep_until(next), if !stopping => {
                    next += self.gap.mul_f64(self.random.f64() * 1.5 + 0.25);
                    // What could not be sent in time is not sent in a heap.
                    next = next.max(tokio::time::Instant::now());
                    if self.out.len() < MOST_OUT {
                        match self.resident.pop_front() {
                            Some(probe) => self.remove(probe)?,
                            None => self.store()?,
                        }
                    }
                }
                // An answer that does not come must not keep probes from being lost.
                () = tokio::time::sleep_until(give_up), if asked.is_some() => {
                    bail!("the indexer does not answer ScoreStream within {PROBE_TIMEOUT:?}");
                }
            }
        }
    }

    /// Asks for all that is out; their sequences.
    fn ask(&mut self, fresh: bool) -> anyhow::Result<Vec<u64>> {
        let prompts = self.out.iter().map(|probe| prompt(&probe.tokens)).collect();
        self.poller.ask(self.publisher.pod.score(prompts), fresh)?;
        Ok(self.out.iter().map(|probe| probe.sent.sequence).collect())
    }

    fn store(&mut self) -> anyhow::Result<()> {
        self.made += 1;
        let hash = mix(self.salt ^ self.made);
        let tokens: Vec<u32> = (0..self.block_size as u64)
            .map(|at| (mix(hash.wrapping_add(at)) % 100_000) as u32)
            .collect();
        self.publish(stored(&[hash], &tokens), tokens, hash, true)
    }

    fn remove(&mut self, probe: Probe) -> anyhow::Result<()> {
        self.publish(removed(&[probe.hash]), probe.tokens, probe.hash, false)
    }

    fn publish(
        &mut self,
        event: Event,
        tokens: Vec<u32>,
        hash: u64,
        store: bool,
    ) -> anyhow::Result<()> {
        let (bursts, in_burst) = self.board.bursts();
        let sent = self.publisher.publish(vec![event])?;
        self.out.push(Probe { tokens, hash, store, sent, in_burst, bursts });
        Ok(())
    }

    /// Takes from what is out what the answer shows, and what is lost.
    fn look(&mut self, asked: &[u64], answer: &ScoreResponse, now: Instant) {
        for (sequence, scores) in asked.iter().zip(&answer.prompts) {
            let Some(at) = self.out.iter().position(|probe| probe.sent.sequence == *sequence)
            else {
                continue;
            };
            if self.out[at].store == (confirmed_depth(scores) > 0) {
                let probe = self.out.swap_remove(at);
                self.note(probe, now);
            }
        }
        let before = self.out.len();
        self.out.retain(|probe| now.saturating_duration_since(probe.sent.at) < PROBE_TIMEOUT);
        self.lost += (before - self.out.len()) as u64;
    }

    fn note(&mut self, probe: Probe, now: Instant) {
        let us = micros(now.saturating_duration_since(probe.sent.at));
        let overtaken = probe.in_burst || self.board.bursts().0 > probe.bursts;
        let condition = if overtaken { "burst".to_owned() } else { self.condition.clone() };
        let kind = if probe.store { "store" } else { "remove" };
        if self.samples.len() < MOST_SAMPLES {
            self.samples.push((kind, condition, us));
            self.series.push([(now - self.origin).as_secs_f64(), us]);
        }
        if self.checks.len() < MOST_CHECKS {
            self.checks.push_back(Check { sent: probe.sent, ours_us: us });
        }
        if probe.store {
            self.resident.push_back(probe);
        }
    }

    /// Asks the indexer when it made visible what we saw; only while nothing is out.
    async fn compare(&mut self) -> anyhow::Result<()> {
        while let Some(check) = self.checks.pop_front() {
            let until = Instant::now() + CALL;
            let pod = &self.publisher.pod;
            let answer = pod.wait(&mut self.client, check.sent.sequence, until).await?;
            if answer.visible_unix_ns > 0 && self.theirs.len() < MOST_SAMPLES {
                // A clock that was set back meanwhile gives a negative one.
                let ns = answer.visible_unix_ns as i64 - check.sent.unix_ns as i64;
                let theirs = ns as f64 / 1e3;
                self.theirs.push(theirs);
                self.differences.push(check.ours_us - theirs);
            }
        }
        Ok(())
    }

    /// Writes down what was measured.
    pub(super) fn report(self, steps: Steps, picks: Picked, watched: &mut Watched) {
        let all = percentiles(self.samples.iter().map(|(_, _, us)| *us));
        let freshness = &mut watched.freshness;
        (freshness.p50, freshness.p95) = (all.p50, all.p95);
        (freshness.p99, freshness.max, freshness.n) = (all.p99, all.max, all.n);
        freshness.lost = self.lost;
        let mut kinds = std::collections::BTreeMap::<String, Vec<f64>>::new();
        for (kind, condition, us) in self.samples {
            kinds.entry(format!("{kind}.{condition}")).or_default().push(us);
        }
        if !steps.us.is_empty() {
            kinds.insert(format!("engine_step.{}", self.condition), steps.us);
        }
        for (condition, us) in picks.samples {
            kinds.entry(format!("endpoint_picker.{condition}")).or_default().push(us);
        }
        freshness.lost += steps.lost + picks.lost;
        freshness.kinds =
            kinds.into_iter().map(|(kind, values)| (kind, percentiles(values))).collect();
        freshness.routed_elsewhere = picks.elsewhere;
        freshness.pick_resolution_us = picks.resolution_us;
        freshness.resolution_us = self.poller.resolution_us();
        freshness.wait_visible = (!self.theirs.is_empty()).then(|| percentiles(self.theirs));
        freshness.difference =
            (!self.differences.is_empty()).then(|| percentiles(self.differences));
        watched.probes = self.series;
    }
}
