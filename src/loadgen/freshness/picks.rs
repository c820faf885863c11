//! Blocks of our own, published in the name of engines, until the endpoint picker routes by them.
//!
//! # Model
//!
//! Beside an engine's own publisher the indexer is told of one more of the same pod, with a rank that no
//! engine has and the model of the probes. What it publishes counts for the pod, and only for requests
//! for that model: nobody else's are moved, and no engine computes anything.
//!
//! In a series it publishes a few chains that nobody else has. Time runs from just before the send, as for
//! probes. Then the endpoint picker is asked where a prompt of one of the chains would go, one question
//! after another. It ends with so many answers in a row that name the engine that chance, at any answer,
//! gives them once in ten thousand; the first of them is what is measured. Then the chains are removed.
//!
//! A question is dropped after its answer, as Envoy does when its client goes away, and nothing is sent
//! on: neither the endpoint picker nor an engine has any load from it.
//!
//! # What it says, and what it does not
//!
//! - An upper bound: the answer is late by up to the time between two answers, which is reported as the
//!   resolution. Questions get rarer once 20 ms have passed; a larger value is late by a sixteenth more.
//! - Load decides as well. The engine is one that is not named for a prompt that nobody has; one that is
//!   much busier than others may not be named whatever it holds. Such a series is no loss if the indexer
//!   shows the chains: it is counted by itself.
//! - So is one of an endpoint picker that often has no answer of the indexer within its own deadline, as on
//!   a machine without a core to spare: it falls back, which no row of answers outlasts.
//! - Where equals are drawn, some of the answers just before the first one that knew may have named the
//!   engine by chance. With *n* pods that makes a value early by 1/(n − 1) of the resolution on average.
//! - An endpoint picker expects what it sends somewhere to be there soon, and would follow its own guess.
//!   So each question of a series takes the next chain; one comes again only after all others, when what
//!   was expected of the dropped exchange is taken back.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::bail;
use bytes::Bytes;
use hdrhistogram::Histogram;
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval_at, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{
    Board, CALL, Client, PROBE_TIMEOUT, PodHandle, WatchOptions, call, confirmed_depth, micros,
    prompt,
    publisher::{Publisher, removed, stored},
};
use crate::loadgen::{drive::picker::Picker, stack::EngineAddress};

/// Probes for one series.
const PROBES: f64 = 50.0;
/// Time between two series at least, and at most.
const EVERY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Engines that are published for.
const MOST_ENGINES: usize = 4;
/// Chains of a series; more than answers in a row.
const CHAINS: usize = 16;
/// Blocks of each.
const BLOCKS: usize = 4;
/// Chance names the engine so often at a time once in so many answers.
const BY_CHANCE: usize = 10_000;
/// Questions follow each other at once until then.
const SOON: Duration = Duration::from_millis(20);
/// Time until a question that failed is asked again.
const AFTER_FAULT: Duration = Duration::from_millis(10);
/// Where completions are.
const COMPLETIONS: &str = "/v1/completions";

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Picked {
    /// Condition, and microseconds until a pick that went there.
    pub(super) samples: Vec<(String, f64)>,
    /// Median time between two answers, microseconds.
    pub(super) resolution_us: Option<f64>,
    /// Series of which the indexer showed nothing in time.
    pub(super) lost: u64,
    /// Series that the indexer showed and the endpoint picker did not follow in time.
    pub(super) elsewhere: u64,
}

/// Asks an endpoint picker.
pub(super) struct Picks {
    publishers: Vec<(SocketAddr, Publisher)>,
    picker: Picker,
    client: Client,
    board: Arc<Board>,
    model: String,
    condition: String,
    block_size: usize,
    every: Duration,
    in_a_row: u32,
    random: fastrand::Rng,
    /// Time between two answers, nanoseconds.
    gaps: Histogram<u64>,
    picked: Picked,
}

/// A chain of blocks from the root.
struct Chain {
    hashes: [u64; BLOCKS],
    tokens: Vec<u32>,
}

impl Picks {
    /// Binds and registers a publisher for each of some engines; `None` if there is nothing to ask, or
    /// nothing to choose from.
    pub(super) async fn start(
        options: &WatchOptions,
        pod: impl Fn(String) -> PodHandle,
        at: &str,
        (mut client, block_size): (Client, usize),
        board: Arc<Board>,
        pods: &mut Vec<PodHandle>,
    ) -> anyhow::Result<Option<Self>> {
        // The proxy is measured by probes.
        let (Some(address), 2.., false) = (options.picker, options.engines.len(), options.delayed)
        else {
            return Ok(None);
        };
        let mut random = fastrand::Rng::new();
        // One that nobody else has, should two of us measure the same indexer.
        let rank = random.u32(1 << 15..1 << 16);
        let mut publishers = Vec::new();
        for EngineAddress { name, http, .. } in
            random.choose_multiple(&options.engines, MOST_ENGINES)
        {
            let pod = PodHandle { rank, ..pod(name.clone()) };
            let mut publisher = Publisher::bind(pod, at)?;
            publisher.start(&mut client, pods).await?;
            publishers.push((*http, publisher));
        }
        let every = Duration::from_secs_f64(PROBES / options.probes_per_s.clamp(0.1, 5_000.0));
        Ok(Some(Self {
            publishers,
            picker: Picker::new(address)?,
            client,
            board,
            model: options.model.clone(),
            condition: options.condition.clone(),
            block_size,
            every: every.clamp(EVERY.0, EVERY.1),
            in_a_row: in_a_row(options.engines.len()),
            random,
            gaps: Histogram::new_with_bounds(1, 60_000_000_000, 3)?,
            picked: Picked::default(),
        }))
    }

    /// Runs one series after another until `stop`; one that is under way then does not count.
    ///
    /// # Errors
    ///
    /// An endpoint picker or an indexer that does not answer.
    pub(super) async fn run(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let series = async {
            // Not at once: the endpoint picker is told of new pods.
            let first = tokio::time::Instant::now() + self.every.min(EVERY.0 * 5);
            let mut ticks = interval_at(first, self.every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                self.series().await?;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(()),
            ended = series => ended,
        }
    }

    /// What was measured.
    pub(super) fn end(mut self) -> Picked {
        let gaps = self.gaps;
        self.picked.resolution_us =
            (!gaps.is_empty()).then(|| gaps.value_at_quantile(0.5) as f64 / 1e3);
        self.picked
    }

    async fn series(&mut self) -> anyhow::Result<()> {
        // Whom the picker prefers anyway says nothing.
        let unknown = self.chain();
        let preferred = self.ask(&unknown.tokens).await?;
        let others = (0..self.publishers.len()).filter(|at| self.publishers[*at].0 != preferred);
        let Some(at) = self.random.choose_multiple(others, 1).pop() else { return Ok(()) };
        let chains: Vec<Chain> = (0..CHAINS).map(|_| self.chain()).collect();
        let (bursts, in_burst) = self.board.bursts();
        let (engine, publisher) = &mut self.publishers[at];
        let events = chains.iter().map(|chain| stored(&chain.hashes, &chain.tokens)).collect();
        let (engine, sent) = (*engine, publisher.publish(events)?.at);
        let named = self.named(engine, &chains, sent).await?;
        let publisher = &mut self.publishers[at].1;
        match named {
            Some(at) => {
                let overtaken = in_burst || self.board.bursts().0 > bursts;
                let condition = if overtaken { "burst" } else { &self.condition };
                let us = micros(at.saturating_duration_since(sent));
                self.picked.samples.push((condition.to_owned(), us));
            }
            None => {
                let prompts = chains.iter().map(|chain| prompt(&chain.tokens)).collect();
                let scores = call("Score", self.client.score(publisher.pod.score(prompts))).await?;
                let shown = scores.prompts.iter().all(|of| confirmed_depth(of) as usize == BLOCKS);
                *(if shown { &mut self.picked.elsewhere } else { &mut self.picked.lost }) += 1;
            }
        }
        publisher.publish(chains.iter().map(|chain| removed(&chain.hashes)).collect())?;
        Ok(())
    }

    /// When the first answer came of those in a row that name the engine; `None` = not in time.
    async fn named(
        &mut self,
        engine: SocketAddr,
        chains: &[Chain],
        sent: Instant,
    ) -> anyhow::Result<Option<Instant>> {
        let (mut in_a_row, mut first, mut before) = (0, sent, sent);
        for chain in chains.iter().cycle() {
            let pod = self.ask(&chain.tokens).await?;
            let now = Instant::now();
            self.gaps.saturating_record((now - before).as_nanos() as u64);
            before = now;
            if pod == engine {
                if in_a_row == 0 {
                    first = now;
                }
                in_a_row += 1;
                if in_a_row == self.in_a_row {
                    return Ok(Some(first));
                }
                continue;
            }
            in_a_row = 0;
            let waited = now - sent;
            if waited >= PROBE_TIMEOUT {
                break;
            }
            if waited >= SOON {
                sleep(waited / 16).await;
            }
        }
        Ok(None)
    }

    /// Where a prompt would go. A question that fails is asked again; one without an answer for as long
    /// as a call may take is an error.
    async fn ask(&mut self, tokens: &[u32]) -> anyhow::Result<SocketAddr> {
        let body = json!({"model": self.model, "prompt": tokens, "max_tokens": 1});
        let body = [Bytes::from(body.to_string())];
        let end = tokio::time::Instant::now() + CALL;
        loop {
            let id = format!("freshness-{:016x}", self.random.u64(..));
            match timeout_at(end, self.picker.pick(COMPLETIONS, &id, &body)).await {
                Ok(Ok(routed)) => return Ok(routed.pod),
                Ok(Err(failure)) => {
                    if timeout(AFTER_FAULT, tokio::time::sleep_until(end)).await.is_ok() {
                        bail!("the endpoint picker routes nothing: {}", failure.label());
                    }
                }
                Err(_) => bail!("the endpoint picker does not answer within {CALL:?}"),
            }
        }
    }

    fn chain(&mut self) -> Chain {
        let hashes = std::array::from_fn(|_| self.random.u64(..));
        let tokens = (0..BLOCKS * self.block_size).map(|_| self.random.u32(0..100_000)).collect();
        Chain { hashes, tokens }
    }
}

/// Answers in a row that chance gives once in [`BY_CHANCE`] with so many pods.
fn in_a_row(pods: usize) -> u32 {
    (2..=14).find(|answers| pods.saturating_pow(*answers) >= BY_CHANCE).unwrap_or(14)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_does_not_end_a_series() {
        #[track_caller]
        fn check(pods: usize, want: u32) {
            assert_eq!(in_a_row(pods), want, "{pods} pods");
            assert!((want as usize) < CHAINS);
        }
        check(2, 14);
        check(3, 9);
        check(8, 5);
        check(21, 4);
        check(22, 3);
        check(100_000, 2);
    }
}
