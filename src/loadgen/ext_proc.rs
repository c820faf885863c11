//! `loadgen ext-proc`: plays Envoy's part towards an endpoint picker, and measures it.
//!
//! # What is sent
//!
//! What Envoy 1.40 sends in `FULL_DUPLEX_STREAMED` mode: one gRPC stream for each HTTP request; request
//! headers with raw values and the protocol configuration; the whole body in **one** message; a
//! separate empty message that ends it; after the routing answer the response headers, the response
//! body and an empty end; and then the stream is reset.
//!
//! # What is measured
//!
//! The time of a pick runs from the first message to the answer with the header mutation; in an open
//! loop (`--rate`) from the **scheduled** time, so that a server that falls behind is seen to. Each
//! stream slot keeps a histogram of its own; they are merged at the end. CPU and memory of the server
//! come from `/proc` by `--pid`, from the end of the warm-up to the end of the run.

pub(super) mod messages;
pub(super) mod session;
mod traffic;

use std::{
    collections::BTreeMap,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

pub use self::traffic::ResponseShape;
use self::{
    session::{Failure, Session},
    traffic::{Prompts, Traffic},
};
use crate::{
    proto::ext_proc::external_processor_client::ExternalProcessorClient, support::metrics::Usage,
};

/// Longest time of a pick that is told apart, microseconds.
const LONGEST_US: u64 = 60_000_000;

/// Arguments of `loadgen ext-proc`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExtProcOptions {
    /// The endpoint picker's gRPC address (plaintext HTTP/2).
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9002")]
    pub target: String,
    /// Exchanges under way at once. With --rate: the most that may be.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub streams: usize,
    /// HTTP/2 connections; Envoy has one per thread.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub connections: usize,
    /// Exchanges per second, evenly spaced; without it each stream begins the next exchange when the
    /// last one ended.
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// Measured time, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub duration: f64,
    /// Time before it that is not measured, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub warmup: f64,
    /// Size of the request body, bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 2048)]
    pub body: usize,
    /// Groups of prompts; three quarters of a prompt are the same within a group.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub groups: usize,
    /// Send conversations of so many turns instead of single messages: `groups` of them at a time, each growing by
    /// one turn, to `body` bytes, then beginning anew with another text.
    #[arg(long, value_name = "N")]
    pub turns: Option<usize>,
    /// Model that the requests name.
    #[arg(long, value_name = "NAME", default_value = "bench-model")]
    pub model: String,
    /// What comes back from the pod: none, unary, or sse:CHUNKS.
    #[arg(long, value_name = "SHAPE", default_value = "unary")]
    pub response: ResponseShape,
    /// The server's process, whose CPU time and memory are reported.
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
}

/// What one stream slot saw.
struct Slot {
    picks: Histogram<u64>,
    failures: BTreeMap<String, u64>,
}

impl Slot {
    fn new() -> Result<Self> {
        Ok(Self { picks: Histogram::new_with_bounds(1, LONGEST_US, 3)?, failures: BTreeMap::new() })
    }

    fn count(&mut self, outcome: Result<Instant, Failure>, began: Instant) {
        match outcome {
            Ok(answered) => {
                let took = answered.saturating_duration_since(began).as_micros();
                self.picks.saturating_record(u64::try_from(took).unwrap_or(LONGEST_US).max(1));
            }
            Err(failure) => *self.failures.entry(failure.to_string()).or_default() += 1,
        }
    }
}

/// The times between which exchanges count.
#[derive(Clone, Copy)]
struct Window {
    begin: Instant,
    end: Instant,
}

/// When exchanges begin.
enum Pace {
    /// When the last one of the slot ended.
    Closed,
    /// At the next free place of one schedule that all slots share.
    Open { first: Instant, every: Duration, next: AtomicU64 },
}

impl Pace {
    /// The scheduled time of the next exchange.
    async fn next(&self) -> Instant {
        match self {
            Self::Closed => Instant::now(),
            Self::Open { first, every, next } => {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let at = *first + every.mul_f64(n as f64);
                tokio::time::sleep_until(at.into()).await;
                at
            }
        }
    }
}

/// Drives load and writes one line of results.
///
/// # Errors
///
/// If the options make no sense, the server cannot be reached, or no exchange succeeded.
pub async fn run(options: &ExtProcOptions, out: &mut impl Write) -> Result<()> {
    ensure!(options.streams > 0 && options.connections > 0, "at least one stream and connection");
    ensure!(options.duration > 0.0 && options.warmup >= 0.0, "--duration and --warmup are seconds");
    if options.rate.is_some_and(|rate| rate.is_nan() || rate <= 0.0) {
        bail!("--rate must be positive");
    }
    ensure!(options.turns != Some(0), "--turns must be positive");
    let prompts = Prompts {
        model: &options.model,
        bytes: options.body,
        groups: options.groups,
        turns: options.turns,
    };
    let traffic = Arc::new(Traffic::new(&prompts, options.response));
    let channels = connect(&options.target, options.connections).await?;

    let start = Instant::now();
    let begin = start + Duration::from_secs_f64(options.warmup);
    let window = Window { begin, end: begin + Duration::from_secs_f64(options.duration) };
    let pace = Arc::new(match options.rate {
        None => Pace::Closed,
        Some(rate) => Pace::Open {
            first: start,
            every: Duration::from_secs_f64(1.0 / rate),
            next: AtomicU64::new(0),
        },
    });
    let mut slots = JoinSet::new();
    for slot in 0..options.streams {
        let channel = channels[slot % channels.len()].clone();
        slots.spawn(drive(channel, Arc::clone(&traffic), Arc::clone(&pace), window, slot));
    }
    let usage = options.pid.map(|pid| measure(pid, window));
    let usage = match usage {
        None => None,
        Some(usage) => Some(usage.await?),
    };
    let mut total = Slot::new()?;
    while let Some(slot) = slots.join_next().await {
        let slot = slot??;
        total.picks.add(slot.picks)?;
        for (failure, times) in slot.failures {
            *total.failures.entry(failure).or_default() += times;
        }
    }
    report(options, &total, usage, out)?;
    ensure!(!total.picks.is_empty(), "no exchange succeeded: {:?}", total.failures);
    Ok(())
}

async fn connect(target: &str, connections: usize) -> Result<Vec<Channel>> {
    /// Envoy's circuit breakers and HTTP/2 windows for the endpoint picker's cluster are as large.
    const WINDOW_BYTES: u32 = 16 << 20;
    let mut channels = Vec::with_capacity(connections);
    for _ in 0..connections {
        let channel = Endpoint::from_shared(format!("http://{target}"))?
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .tcp_nodelay(true)
            .connect_timeout(Duration::from_secs(5))
            .connect()
            .await
            .with_context(|| format!("cannot reach the endpoint picker at {target}"))?;
        channels.push(channel);
    }
    Ok(channels)
}

/// One stream slot: exchange after exchange until the window closes.
async fn drive(
    channel: Channel,
    traffic: Arc<Traffic>,
    pace: Arc<Pace>,
    window: Window,
    slot: usize,
) -> Result<Slot> {
    let mut client = ExternalProcessorClient::new(channel).max_decoding_message_size(usize::MAX);
    let mut seen = Slot::new()?;
    let mut serial = slot as u64;
    loop {
        let began = pace.next().await;
        if began >= window.end || Instant::now() >= window.end {
            return Ok(seen);
        }
        let outcome = Session::new(&traffic, serial).run(&mut client).await;
        serial = serial.wrapping_add(0x9e37_79b9);
        if began >= window.begin {
            seen.count(outcome, began);
        }
    }
}

/// What the server's process used in the window.
struct Used {
    cpu: Duration,
    resident_bytes: u64,
}

async fn measure(pid: u32, window: Window) -> Result<Used> {
    let read = move || {
        let usage = Usage::of(pid);
        let cpu = usage.cpu.with_context(|| format!("cannot read /proc/{pid}/stat"))?;
        anyhow::Ok((cpu, usage.resident_bytes.unwrap_or_default()))
    };
    tokio::time::sleep_until(window.begin.into()).await;
    let (before, _) = read()?;
    // Memory is read while the load is on.
    tokio::time::sleep_until(window.end.into()).await;
    let (after, resident_bytes) = read()?;
    Ok(Used { cpu: after.saturating_sub(before), resident_bytes })
}

fn report(
    options: &ExtProcOptions,
    total: &Slot,
    used: Option<Used>,
    out: &mut impl Write,
) -> Result<()> {
    let picks = total.picks.len();
    let at = |quantile| total.picks.value_at_quantile(quantile);
    write!(
        out,
        "body={} streams={} response={}{}: {:.0} picks/s, p50 {} us, p95 {} us, p99 {} us, max {} us",
        options.body,
        options.streams,
        options.response,
        options.rate.map(|rate| format!(" rate={rate}")).unwrap_or_default(),
        picks as f64 / options.duration,
        at(0.5),
        at(0.95),
        at(0.99),
        total.picks.max(),
    )?;
    if let Some(used) = used {
        write!(
            out,
            ", server CPU {:.1} ms per 1000 picks ({:.1} % of a core), RSS {:.1} MB",
            used.cpu.as_secs_f64() * 1e6 / picks.max(1) as f64,
            used.cpu.as_secs_f64() * 100.0 / options.duration,
            used.resident_bytes as f64 / 1e6,
        )?;
    }
    writeln!(out, ", {} errors", total.failures.values().sum::<u64>())?;
    for (failure, times) in &total.failures {
        writeln!(out, "  {times} x {failure}")?;
    }
    Ok(())
}
