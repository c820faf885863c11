//! `loadgen trace`: makes traces, and says what is in them.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{Trace, TraceFormat, TraceOptions, generate::Generate};
use crate::{
    loadgen::workload::{
        Arrival, Arrivals, Lengths, Planned,
        arrivals::{DISPERSION_WINDOWS, MAX_ARRIVALS, dispersion},
        hits::{distinct_blocks, ideal_hits, lru_hits},
    },
    support::units,
};

/// Commands about recorded traffic.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum TraceCommand {
    /// Makes a trace in Mooncake's format, with a stated share of tokens that a cache could reuse.
    Generate(GenerateArguments),
    /// Says what is in a trace: lengths, burstiness, and what caches could reuse of it at best.
    Analyze(AnalyzeArguments),
}

/// Arguments of `loadgen trace generate`.
#[derive(Clone, Debug, clap::Args)]
pub struct GenerateArguments {
    /// Where it goes; `-` = standard output.
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// When requests come: constant:RATE, poisson:RATE, gamma:rate=R,cv=C or onoff:rate=R,on=T,off=T, and
    /// bursts with +bursts:size=N,every=T.
    #[arg(long, value_name = "PROCESS", default_value = "gamma:rate=7,cv=2")]
    arrivals: Arrivals,
    /// How long they come.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = units::duration)]
    duration: Duration,
    /// Share of prompt tokens that a cache could reuse at best, 0 to 0.95.
    #[arg(long, value_name = "SHARE", default_value_t = 0.6)]
    cache_ratio: f64,
    /// Tokens of prompts: N, uniform(A,B), normal(MEAN,SD) or lognormal(MEAN,SD).
    #[arg(long, value_name = "LENGTHS", default_value = "lognormal(8000,6000,min=100,max=100000)")]
    prompt_tokens: Lengths,
    /// Tokens of answers, likewise.
    #[arg(long, value_name = "LENGTHS", default_value = "lognormal(200,200,max=4000)")]
    output_tokens: Lengths,
    /// Equal seeds give equal files.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Arguments that say which part of a trace is read, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct TraceArguments {
    /// The trace: JSON lines of Mooncake, JSON lines with at_ms, prompt_tokens and output_tokens, or
    /// Azure's CSV; may be gzip-compressed.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Factor of times: 0.5 is twice as fast.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub time_scale: f64,
    /// Begin so long after the file's beginning.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = units::duration)]
    pub from: Duration,
    /// End so long after the file's beginning.
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    pub to: Option<Duration>,
    /// Factor of all lengths.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub scale: f64,
}

impl TraceArguments {
    /// Reads what they name; `seed` is what tokens are made from.
    ///
    /// # Errors
    ///
    /// Those of [`Trace::open`].
    pub fn open(&self, seed: u64) -> Result<Trace> {
        let options = TraceOptions {
            time_scale: self.time_scale,
            from: self.from,
            to: self.to,
            scale: self.scale,
            seed,
        };
        Ok(Trace::open(&self.file, &options)?)
    }
}

/// Arguments of `loadgen trace analyze`.
#[derive(Clone, Debug, clap::Args)]
pub struct AnalyzeArguments {
    #[command(flatten)]
    trace: TraceArguments,
    /// Tokens of a block, one or several.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "16,64,512",
        value_parser = clap::value_parser!(u32).range(1..))]
    block_size: Vec<u32>,
    /// Blocks of finite caches, one or several, beside the infinite one.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    blocks: Vec<usize>,
}

/// Runs a command; what it has to say goes to `out`, a generated trace if there is no file for it.
///
/// # Errors
///
/// Files that cannot be read or written, traces that are wrong.
pub fn run(command: &TraceCommand, out: &mut dyn Write) -> Result<()> {
    match command {
        TraceCommand::Generate(arguments) => generate(arguments, out),
        TraceCommand::Analyze(arguments) => analyze(arguments, out),
    }
}

fn generate(arguments: &GenerateArguments, out: &mut dyn Write) -> Result<()> {
    let GenerateArguments { arrivals, duration, cache_ratio, .. } = *arguments;
    ensure!((0.0..=0.95).contains(&cache_ratio), "--cache-ratio is a share from 0 to 0.95");
    ensure!(
        arrivals.rate() * duration.as_secs_f64() < MAX_ARRIVALS as f64,
        "--arrivals and --duration make more than {MAX_ARRIVALS} requests"
    );
    let trace = Generate {
        arrivals,
        duration,
        cache_ratio,
        input: arguments.prompt_tokens,
        output: arguments.output_tokens,
        seed: arguments.seed,
    };
    if arguments.output.as_os_str() == "-" {
        trace.write(&mut BufWriter::new(out))?;
        return Ok(());
    }
    let path = arguments.output.display();
    let mut file = File::create(&arguments.output)
        .map(BufWriter::new)
        .with_context(|| format!("cannot write {path}"))?;
    let made = trace.write(&mut file).with_context(|| format!("cannot write {path}"))?;
    file.flush().with_context(|| format!("cannot write {path}"))?;
    let share = made.hit_tokens as f64 / made.prompt_tokens.max(1) as f64;
    writeln!(
        out,
        "{path}: {} requests, {} prompt tokens, of which a cache could reuse {:.1} %",
        made.requests,
        made.prompt_tokens,
        share * 100.0
    )?;
    Ok(())
}

fn analyze(arguments: &AnalyzeArguments, out: &mut dyn Write) -> Result<()> {
    let trace = arguments.trace.open(0)?;
    let requests = &trace.requests;
    let format = match trace.format {
        TraceFormat::Mooncake => "Mooncake",
        TraceFormat::Plain => "plain JSON lines",
        TraceFormat::Azure => "Azure CSV",
    };
    let last = requests.last().and_then(|request| request.at).unwrap_or_default();
    writeln!(out, "{}: {format}", arguments.trace.file.display())?;
    let count = requests.len();
    write!(out, "requests   {count} in {:.1} s", last.as_secs_f64())?;
    if last > Duration::ZERO {
        write!(out, ", {:.2}/s", count as f64 / last.as_secs_f64())?;
    }
    writeln!(out)?;
    let arrivals: Vec<Arrival> = requests
        .iter()
        .filter_map(|request| request.at)
        .map(|at| Arrival { at, burst: None })
        .collect();
    write!(out, "dispersion")?;
    for window in DISPERSION_WINDOWS {
        match dispersion(&arrivals, last, window) {
            Some(index) => write!(out, " {index:.2}")?,
            None => write!(out, " -")?,
        }
        write!(out, " in {} s;", window.as_secs_f64())?;
    }
    writeln!(out, " Poisson 1")?;
    lengths(out, "prompt    ", requests, |request| request.prompt.tokens())?;
    lengths(out, "answer    ", requests, |request| request.max_tokens.into())?;
    writeln!(out, "what a cache could reuse at best:")?;
    for &block in &arguments.block_size {
        let block = block as usize;
        let distinct = distinct_blocks(requests.iter(), block);
        let infinite = ideal_hits(requests.iter(), block).ratio() * 100.0;
        writeln!(
            out,
            "  blocks of {block:>4}: {infinite:>5.1} % with all {distinct} different blocks"
        )?;
        for &capacity in &arguments.blocks {
            let finite = lru_hits(requests.iter(), block, capacity).ratio() * 100.0;
            writeln!(out, "                 {finite:>5.1} % with {capacity}")?;
        }
    }
    Ok(())
}

/// A line about lengths.
fn lengths(
    out: &mut dyn Write,
    name: &str,
    requests: &[Planned],
    of: impl Fn(&Planned) -> u64,
) -> Result<()> {
    let mut lengths: Vec<u64> = requests.iter().map(of).collect();
    lengths.sort_unstable();
    let sum: u64 = lengths.iter().sum();
    // Rank by rounding up, from 1.
    let at = |percent: usize| {
        let rank = (lengths.len() * percent).div_ceil(100).max(1);
        lengths.get(rank - 1).copied().unwrap_or_default()
    };
    let mean = sum as f64 / lengths.len().max(1) as f64;
    writeln!(
        out,
        "{name} {sum} tokens; mean {mean:.0}, p50 {}, p95 {}, max {}",
        at(50),
        at(95),
        at(100)
    )?;
    Ok(())
}
