//! Prompts of our own that an engine computed, and the endpoint picker's answers until it knows of them.
//!
//! # Model
//!
//! A series sends a few prompts that nobody else has straight to one engine, in one request for one token
//! each. An engine publishes what it stored before it answers, so time runs from the first byte of the
//! answer. From then on the endpoint picker is asked where such a prompt would go, with a suffix of its
//! own each time; three answers in a row that name the engine end the series, and the first of the three
//! is what is measured. The exchange is dropped after the answer, as Envoy does when its client goes
//! away, and nothing is sent on.
//!
//! # What it says, and what it does not
//!
//! - A pick takes time, and is part of the number: this is when a request could have been routed by what
//!   was stored, not when the index had it.
//! - Time begins when the client sees the answer, later than the publication. What is visible by then
//!   counts with the time of one pick.
//! - With *n* pods that are equally loaded, an answer names the engine by chance with 1/n. A series ends
//!   with nothing visible by (1/n)³ at any pick: 1 of 27 with three pods, 1 of 512 with eight. A value can
//!   also be early: by j picks with (1/n)ʲ, since the last answers of three may be by knowledge.
//! - Load decides as well: an engine that is much busier than the others is not named however much it
//!   holds. Under load, late and lost are of the routing, not of the index alone.
//! - An endpoint picker expects what it sends somewhere to be there soon, and would follow its own guess.
//!   So each pick of a series takes the next of the prompts; one comes again only after all others, when
//!   what was expected of the dropped exchange is taken back.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Board, CALL, PROBE_TIMEOUT, WatchOptions, micros};
use crate::loadgen::{drive::picker::Picker, stack::EngineAddress};

/// Time between two series at least.
const EVERY: Duration = Duration::from_millis(500);
/// Prompts of a series.
const PROMPTS: usize = 4;
/// Blocks of each.
const BLOCKS: usize = 3;
/// Answers in a row that must name the engine.
const IN_A_ROW: usize = 3;
/// Picks of a series at most.
const MOST_PICKS: usize = 5_000;
/// Time until the next pick after one that failed.
const AFTER_FAULT: Duration = Duration::from_millis(10);
/// Bytes of an engine's answer that are read.
const ANSWER_BYTES: u64 = 1 << 20;
/// Where completions are.
const COMPLETIONS: &str = "/v1/completions";

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Picks {
    /// Condition, and microseconds from an engine's answer to the pick that went there.
    pub(super) samples: Vec<(String, f64)>,
    /// Series that did not end in time.
    pub(super) lost: u64,
    /// Series that no engine answered.
    pub(super) unanswered: u64,
}

/// Runs one series after another until `stop`; one that is under way then does not count.
///
/// # Errors
///
/// Engines that do not say their model.
pub(super) async fn watch(
    options: &WatchOptions,
    block_size: usize,
    board: &Board,
    stop: &CancellationToken,
    picks: &mut Picks,
) -> anyhow::Result<()> {
    // Events of engines do not pass the proxy.
    let (Some(address), Some(engine), false) =
        (options.picker, options.engines.first(), options.delayed)
    else {
        return Ok(());
    };
    let series = async {
        let picker = Picker::new(address)?;
        let model = timeout(CALL, model(engine.http))
            .await
            .map_err(io::Error::from)
            .context("the models of an engine")?
            .with_context(|| format!("the models of {}", engine.http))?;
        let mut random = fastrand::Rng::new();
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Some(engine) = random.choice(&options.engines) else { return Ok(()) };
            let prompts = (0..PROMPTS).map(|_| tokens(&mut random, BLOCKS * block_size)).collect();
            let mut series =
                Series { picker: &picker, model: &model, prompts, random: &mut random };
            let (bursts, in_burst) = board.bursts();
            let Some(answered) = series.compute(engine).await else {
                picks.unanswered += 1;
                continue;
            };
            match series.named(engine.http, answered, block_size).await {
                Some(at) => {
                    let overtaken = in_burst || board.bursts().0 > bursts;
                    let condition = if overtaken { "burst" } else { &options.condition };
                    let us = micros(at.saturating_duration_since(answered));
                    picks.samples.push((condition.to_owned(), us));
                }
                None => picks.lost += 1,
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(()),
        ended = series => ended,
    }
}

/// Prompts on their way from an engine to the endpoint picker.
struct Series<'a> {
    picker: &'a Picker,
    model: &'a str,
    prompts: Vec<Vec<u32>>,
    random: &'a mut fastrand::Rng,
}

impl Series<'_> {
    /// Has the engine compute all prompts; when its answer came, if it is one.
    async fn compute(&self, engine: &EngineAddress) -> Option<Instant> {
        let body = self.body(json!(self.prompts));
        let request = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            engine.http,
            body.len()
        );
        let answer = timeout(PROBE_TIMEOUT, exchange(engine.http, &request)).await;
        let (first_byte, answer) = answer.ok()?.ok()?;
        is_ok(&answer).then_some(first_byte)
    }

    /// When the first answer came of those in a row that name the engine; `None` = not in time.
    async fn named(
        &mut self,
        engine: SocketAddr,
        since: Instant,
        block_size: usize,
    ) -> Option<Instant> {
        let end = tokio::time::Instant::from_std(since + PROBE_TIMEOUT);
        let (mut in_a_row, mut first) = (0, since);
        for prompt in self.prompts.clone().iter().cycle().take(MOST_PICKS) {
            let suffix = tokens(self.random, block_size);
            let body = self.body(json!([prompt.as_slice(), &suffix].concat()));
            let id = format!("freshness-{:016x}", self.random.u64(..));
            let body = [Bytes::from(body)];
            let pick = self.picker.pick(COMPLETIONS, &id, &body);
            let Ok(routed) = tokio::time::timeout_at(end, pick).await else { return None };
            let now = Instant::now();
            match routed {
                Ok(routed) if routed.pod == engine => {
                    if in_a_row == 0 {
                        first = now;
                    }
                    in_a_row += 1;
                    if in_a_row == IN_A_ROW {
                        return Some(first);
                    }
                }
                Ok(_) => in_a_row = 0,
                Err(_) => {
                    in_a_row = 0;
                    tokio::time::sleep(AFTER_FAULT).await;
                }
            }
        }
        None
    }

    fn body(&self, prompt: Value) -> String {
        json!({"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0})
            .to_string()
    }
}

fn tokens(random: &mut fastrand::Rng, count: usize) -> Vec<u32> {
    (0..count).map(|_| random.u32(0..100_000)).collect()
}

/// The first model that an engine serves.
async fn model(engine: SocketAddr) -> anyhow::Result<String> {
    let request = format!("GET /v1/models HTTP/1.1\r\nhost: {engine}\r\nconnection: close\r\n\r\n");
    let (_, answer) = exchange(engine, &request).await?;
    ensure!(is_ok(&answer), "it does not answer with 200");
    let body = answer.iter().position(|byte| *byte == b'{').and_then(|at| answer.get(at..));
    let body = body.context("its answer is not JSON")?;
    // Behind it may be what is left of a chunk.
    let value = serde_json::Deserializer::from_slice(body).into_iter::<Value>().next();
    let value = value.context("its answer is empty")??;
    let id = value.pointer("/data/0/id").and_then(Value::as_str).context("it names no model")?;
    Ok(id.to_owned())
}

fn is_ok(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.1 200")
}

/// Sends a request on a connection of its own; when the answer began, and all of it.
async fn exchange(to: SocketAddr, request: &str) -> io::Result<(Instant, Vec<u8>)> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = vec![stream.read_u8().await?];
    let first_byte = Instant::now();
    stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
    Ok((first_byte, answer))
}
