//! `loadgen storm`: freshness of a running indexer, idle, under bursts of events, and late on purpose.

use std::{
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio_util::sync::CancellationToken;

use super::{StormOptions, WatchOptions, Watched, report::Percentiles, watch};

/// What `loadgen storm` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct StormArguments {
    /// gRPC address of a running indexer; without it, one is started in this process.
    #[arg(long, value_name = "IP:PORT")]
    pub indexer: Option<SocketAddr>,
    /// Process id of that indexer, for its CPU per block.
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// Events to inject: publishers=4,rate=20000,burst=50000,interval=5s,batch=32,events=1,removes=0.3,
    /// form=map|array,hashes=int|bytes,cap=200000,seed=1,faults=gap:0.01,duplicate:0.01,reorder:…,
    /// restart:…,clear:…
    #[arg(long, value_name = "OPTIONS", default_value_t)]
    pub storm: StormOptions,
    /// Probes without a storm before it, for so many seconds; and through a proxy that delays by
    /// 2 ms ± 1 ms after it.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    pub quiet: f64,
    /// How long the storm lasts, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    pub duration: f64,
    /// Probes per second, stores and removes each.
    #[arg(long, value_name = "N", default_value_t = 100.0)]
    pub probes: f64,
    /// Also write what was measured as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Measures an indexer idle, in a storm and through a proxy that delays, and writes tables to `out`.
/// What is under way when `stop` is cancelled is ended and still written.
///
/// # Errors
///
/// Those of [`watch`], and files that cannot be written.
pub async fn run(
    arguments: &StormArguments,
    indexer: SocketAddr,
    stop: CancellationToken,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let quiet = arguments.quiet;
    let phases = [
        ("idle", quiet, None, false),
        ("steady", arguments.duration, Some(arguments.storm.clone()), false),
        ("delayed", quiet, None, true),
    ];
    let mut parts = Vec::new();
    for (condition, seconds, storm, delayed) in phases {
        let seconds = Duration::try_from_secs_f64(seconds).context("a time is out of range")?;
        if seconds.is_zero() || stop.is_cancelled() {
            continue;
        }
        let options = WatchOptions {
            indexer,
            indexer_pid: arguments.pid,
            model: "loadgen-storm".to_owned(),
            probes_per_s: arguments.probes,
            condition: condition.to_owned(),
            engines: Vec::new(),
            picker: None,
            storm,
            progress: None,
            delayed,
        };
        let end = stop.child_token();
        let watching = watch(options, Instant::now(), end.clone());
        let timer = async {
            tokio::select! {
                () = tokio::time::sleep(seconds) => end.cancel(),
                () = end.cancelled() => {}
            }
        };
        let (watched, ()) = tokio::join!(watching, timer);
        let watched = watched?;
        write(condition, &watched, out)?;
        parts.push(serde_json::json!({
            "condition": condition,
            "freshness_us": watched.freshness,
            "storm": watched.storm,
            "event_bursts": watched.event_bursts,
            "warnings": watched.warnings,
        }));
    }
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&parts)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn write(condition: &str, watched: &Watched, out: &mut (dyn Write + Send)) -> Result<()> {
    let freshness = &watched.freshness;
    writeln!(out, "{condition}: {} probes, {} lost", freshness.n, freshness.lost)?;
    writeln!(
        out,
        "  {:<18} {:>7} {:>9} {:>9} {:>9} {:>9}",
        "microseconds", "n", "p50", "p95", "p99", "max"
    )?;
    for (kind, values) in &freshness.kinds {
        row(kind, values, out)?;
    }
    for (name, values) in
        [("WaitVisible", &freshness.wait_visible), ("ours - theirs", &freshness.difference)]
    {
        if let Some(values) = values {
            row(name, values, out)?;
        }
    }
    if let Some(resolution) = freshness.resolution_us {
        writeln!(out, "  resolution {resolution:.0} us")?;
    }
    if let Some(storm) = &watched.storm {
        writeln!(
            out,
            "  storm {}\n  {} blocks in {} batches ({:.0} blocks/s), {} bursts, {} not drained\n  \
             backlog at most {} batches, {:.1} ms; {} batches lost; {} gaps, {} replays",
            storm.options,
            storm.blocks,
            storm.batches,
            storm.blocks_per_s,
            storm.bursts,
            storm.undrained,
            storm.backlog_max_batches,
            storm.backlog_max_ms,
            storm.lost_batches,
            storm.gaps,
            storm.replays,
        )?;
        row("drain, ms", &storm.drain_ms, out)?;
        if let Some(ns) = storm.indexer_ns_per_block {
            writeln!(out, "  indexer {ns:.0} ns of CPU per block, probes included")?;
        }
        writeln!(out, "  wrong pods: {}", storm.wrong_pods.len())?;
    }
    for warning in &watched.warnings {
        writeln!(out, "  warning: {warning}")?;
    }
    Ok(())
}

fn row(name: &str, values: &Percentiles, out: &mut (dyn Write + Send)) -> Result<()> {
    let text = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.1}"));
    writeln!(
        out,
        "  {name:<18} {:>7} {:>9} {:>9} {:>9} {:>9}",
        values.n,
        text(values.p50),
        text(values.p95),
        text(values.p99),
        text(values.max),
    )?;
    Ok(())
}
