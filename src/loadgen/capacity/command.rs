//! `loadgen capacity`: published tables beside what the model says.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use super::{
    Constants,
    measured::{self, Measured},
    published::{PRECISE, STUDY_37, STUDY_73, Stage, Study},
    simulation::{Assumptions, StageOutcome, simulate},
};
use crate::{loadgen::stack::policy::Policy, support::sync::lock};

/// A TTFT p90 above this, seconds, is past the knee.
const BROKEN_S: f64 = 10.0;
/// Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; then about the last one.
const STUDENT: [f64; 12] =
    [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18];

/// A published measurement by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Table {
    /// Prompts that need 73 % of the fleet's cache.
    #[value(name = "73")]
    Of73,
    /// Prompts that need 37 % of it.
    #[value(name = "37")]
    Of37,
}

impl Table {
    /// What it names.
    #[must_use]
    pub fn study(self) -> &'static Study {
        match self {
            Self::Of73 => &STUDY_73,
            Self::Of37 => &STUDY_37,
        }
    }
}

/// Arguments of `loadgen capacity`.
#[derive(Clone, Debug, clap::Args)]
pub struct CapacityOptions {
    /// Which published measurement.
    #[arg(long, value_enum, default_value = "73")]
    table: Table,
    /// Runs with different seeds.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Stages as RATE:SECONDS, separated by commas. Default: as published.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = stage)]
    stages: Vec<Stage>,
    /// Policies, separated by commas: random, round-robin, least-load, approximate, precise.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    policies: Vec<Policy>,
    /// Factor of all lengths and caches: 0.1 is ten times as fast, and coarser.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    scale_tokens: f64,
    /// Milliseconds that a request needs before it is queued.
    #[arg(long, value_name = "MS", default_value_t = Constants::default().request_ms)]
    request_ms: f64,
    /// Milliseconds of prefill per token, in the 73 % table's fleet.
    #[arg(long, value_name = "MS", default_value_t = Constants::default().prefill_ms_per_token)]
    prefill_ms: f64,
    /// Milliseconds of a step that decodes, likewise.
    #[arg(long, value_name = "MS", default_value_t = Constants::default().decode_ms_per_step)]
    decode_ms: f64,
    /// Further milliseconds for each request in it, likewise.
    #[arg(long, value_name = "MS", default_value_t = Constants::default().decode_ms_per_sequence)]
    decode_ms_per_sequence: f64,
    /// Let approximate weigh as precise does, as in `loadgen steady --published`, not as published.
    #[arg(long)]
    equal_weights: bool,
    /// From one scrape of the pods' loads to the next, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = Assumptions::default().scrape_ms)]
    scrape_ms: f64,
    /// From a step's end until its events are in the index, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = Assumptions::default().events_ms)]
    events_ms: f64,
    /// In place of the model: reports of `loadgen steady --published`, separated by commas.
    #[arg(
        long,
        value_name = "FILE[,FILE…]",
        value_delimiter = ',',
        conflicts_with_all = ["seeds", "stages", "policies", "scale_tokens", "request_ms", "prefill_ms", "decode_ms",
            "decode_ms_per_sequence", "equal_weights", "scrape_ms", "events_ms"]
    )]
    measured: Vec<PathBuf>,
    /// The --speed that they were measured at.
    #[arg(long, value_name = "FACTOR", default_value_t = 10.0, requires = "measured")]
    speed: f64,
    /// Write the results there too, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn stage(text: &str) -> Result<Stage, String> {
    let wrong = || format!("{text:?} is not RATE:SECONDS with positive numbers");
    let (rate, seconds) = text.split_once(':').ok_or_else(wrong)?;
    let number = |text: &str| text.parse().ok().filter(|it: &f64| it.is_finite() && *it > 0.0);
    match (number(rate), number(seconds)) {
        (Some(rate), Some(seconds)) if rate * seconds <= 1e6 => Ok(Stage { rate, seconds }),
        _ => Err(wrong()),
    }
}

/// A mean over seeds and half of its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Half of the interval's width; `None` with one seed.
    pub half: Option<f64>,
}

impl Estimate {
    fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let half = values.len().checked_sub(2).map(|at| {
            STUDENT[at.min(STUDENT.len() - 1)] * (squares / (count - 1.0)).sqrt() / count.sqrt()
        });
        Self { mean, half }
    }
}

/// One policy at one rate, or (`rate` = `None`) over all stages.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// Who decided.
    pub policy: String,
    /// Requests per second.
    pub rate: Option<f64>,
    /// 90th percentile of the time to first token, seconds.
    pub ttft_p90_s: Estimate,
    /// Its median.
    pub ttft_p50_s: Estimate,
    /// Its mean.
    pub ttft_mean_s: Estimate,
    /// Output tokens per second.
    pub output_tps: Estimate,
    /// Share of the prompts' tokens that was found in a cache.
    pub hit_ratio: f64,
    /// Requests that wait in a pod; the model's only.
    pub waiting_mean: Option<f64>,
    /// The most of them.
    pub waiting_max: Option<usize>,
    /// What was published: TTFT p90 in seconds.
    pub published_ttft_p90_s: Option<f64>,
    /// What was published: output tokens per second.
    pub published_output_tps: Option<f64>,
}

impl Cell {
    fn of(study: &Study, policy: &Policy, rate: Option<f64>, seeds: &[StageOutcome]) -> Self {
        let estimate =
            |of: fn(&StageOutcome) -> f64| Estimate::of(&seeds.iter().map(of).collect::<Vec<_>>());
        let row = study.row(policy, rate);
        Self {
            policy: policy.to_string(),
            rate,
            ttft_p90_s: estimate(|it| it.ttft_p90_s),
            ttft_p50_s: estimate(|it| it.ttft_p50_s),
            ttft_mean_s: estimate(|it| it.ttft_mean_s),
            output_tps: estimate(|it| it.output_tps),
            hit_ratio: estimate(|it| it.hit_ratio).mean,
            waiting_mean: Some(estimate(|it| it.waiting_mean).mean),
            waiting_max: seeds.iter().map(|it| it.waiting_max).max(),
            published_ttft_p90_s: row.map(|row| row.ttft_p90_s),
            published_output_tps: row.and_then(|row| row.output_tps),
        }
    }
}

/// What is expected of the shape, and whether it is so.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What is expected.
    pub name: String,
    /// What there is.
    pub found: String,
    /// Does it hold?
    pub holds: bool,
}

/// Everything that `--json` writes.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Name and version of the document.
    pub schema: &'static str,
    /// Which table.
    pub table: &'static str,
    /// Where it is from.
    pub source: &'static str,
    /// What the model assumed; `None` = measured.
    pub assumed: Option<Assumptions>,
    /// Factor of what computes, for the table's model.
    pub factor: f64,
    /// How many seeds, or repeats.
    pub seeds: u64,
    /// By policy and rate.
    pub cells: Vec<Cell>,
    /// Of the shape.
    pub checks: Vec<Check>,
}

/// Compares reports with a table.
fn compare_measured(options: &CapacityOptions) -> Result<Comparison> {
    let study = options.table.study();
    let Measured { stages, checks: mut more } = measured::read(&options.measured, options.speed)?;
    let cells: Vec<Cell> = stages
        .iter()
        .map(|(policy, rate, repeats)| Cell {
            waiting_mean: None,
            waiting_max: None,
            ..Cell::of(study, policy, Some(*rate), repeats)
        })
        .collect();
    let mut checks = checks(&cells);
    checks.append(&mut more);
    let repeats = stages.iter().map(|(_, _, repeats)| repeats.len()).min().unwrap_or_default();
    Ok(Comparison {
        schema: "kv-indexer.loadgen.capacity/1",
        table: study.name,
        source: study.source,
        assumed: None,
        factor: study.factor(),
        seeds: repeats as u64,
        cells,
        checks,
    })
}

/// Runs the model, or reads reports, and compares that with a table.
///
/// # Errors
///
/// Policies that have no model, a factor that is not positive, threads that cannot be started.
pub fn compare(options: &CapacityOptions) -> Result<Comparison> {
    if !options.measured.is_empty() {
        return compare_measured(options);
    }
    let study = options.table.study();
    let equal = Study { approximate: PRECISE, ..study.clone() };
    let study = if options.equal_weights { &equal } else { study };
    let scale_tokens = options.scale_tokens;
    ensure!(
        (0.01..=1.0).contains(&scale_tokens),
        "--scale-tokens is {scale_tokens}: it has to be from 0.01 to 1"
    );
    let policies =
        if options.policies.is_empty() { Policy::ALL.to_vec() } else { options.policies.clone() };
    if let Some(policy) = policies.iter().find(|policy| !Policy::ALL.contains(policy)) {
        anyhow::bail!("there is no model of the policy {policy}");
    }
    let stages = if options.stages.is_empty() { study.stages } else { &options.stages };
    let assumed = Assumptions {
        constants: Constants {
            request_ms: options.request_ms,
            prefill_ms_per_token: options.prefill_ms,
            decode_ms_per_step: options.decode_ms,
            decode_ms_per_sequence: options.decode_ms_per_sequence,
        },
        scale_tokens,
        scrape_ms: options.scrape_ms,
        events_ms: options.events_ms,
    };
    let outcomes = all(study, stages, &policies, options.seeds, &assumed)?;
    let mut cells = Vec::new();
    for (at, policy) in policies.iter().enumerate() {
        let runs: Vec<_> = (0..options.seeds).map(|seed| &outcomes[&(at, seed)]).collect();
        for stage in 0..=stages.len() {
            let seeds: Vec<StageOutcome> = runs.iter().map(|run| run[stage]).collect();
            let rate = stages.get(stage).map(|stage| stage.rate);
            cells.push(Cell::of(study, policy, rate, &seeds));
        }
    }
    let checks = checks(&cells);
    Ok(Comparison {
        schema: "kv-indexer.loadgen.capacity/1",
        table: study.name,
        source: study.source,
        assumed: Some(assumed),
        factor: study.factor(),
        seeds: options.seeds,
        cells,
        checks,
    })
}

/// All policies with all seeds, as many at once as there are cores; by policy and seed.
fn all(
    study: &Study,
    stages: &[Stage],
    policies: &[Policy],
    seeds: u64,
    assumed: &Assumptions,
) -> Result<BTreeMap<(usize, u64), Vec<StageOutcome>>> {
    let jobs: Vec<(usize, u64)> =
        (0..policies.len()).flat_map(|at| (0..seeds).map(move |seed| (at, seed))).collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    let work = || {
        while let Some(&(at, seed)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = simulate(study, stages, &policies[at], seed, assumed);
            lock(&done).insert((at, seed), outcome);
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    thread::scope(|scope| -> Result<()> {
        for number in 0..threads {
            let named = thread::Builder::new().name(format!("capacity-{number}"));
            named.spawn_scoped(scope, work).context("cannot start a thread")?;
        }
        Ok(())
    })?;
    Ok(std::mem::take(&mut *lock(&done)))
}

/// The shape that the 73 % table has.
fn checks(cells: &[Cell]) -> Vec<Check> {
    let of = |policy: &Policy| -> Vec<&Cell> {
        let name = policy.to_string();
        cells.iter().filter(|it| it.policy == name && it.rate.is_some()).collect()
    };
    let (random, precise) = (of(&Policy::Random), of(&Policy::Precise));
    let approximate = of(&Policy::Approximate);
    let mut checks = Vec::new();
    let mut check = |name: &str, holds: bool, found: String| {
        checks.push(Check { name: name.to_owned(), found, holds });
    };
    if let Some(breaks) = random.iter().find(|cell| cell.ttft_p90_s.mean > BROKEN_S) {
        let rate = breaks.rate.unwrap_or_default();
        let name = "random breaks (TTFT p90 > 10 s) at 12 to 22 requests per second";
        check(name, (12.0..=22.0).contains(&rate), format!("{rate}"));
    }
    let worst = precise.iter().map(|cell| cell.ttft_p90_s.mean).fold(0.0, f64::max);
    check("precise stays flat: TTFT p90 < 1 s at every rate", worst < 1.0, format!("{worst:.2} s"));
    if let (Some(random), Some(precise)) = (random.last(), precise.last()) {
        let more = precise.output_tps.mean / random.output_tps.mean;
        check(
            "precise / random, output tokens at the top >= 1.8",
            more >= 1.8,
            format!("{more:.2}"),
        );
        let sooner = random.ttft_p90_s.mean / precise.ttft_p90_s.mean;
        check(
            "random / precise, TTFT p90 at the top >= 20",
            sooner >= 20.0,
            format!("{sooner:.0}"),
        );
    }
    let unordered: Vec<String> = random
        .iter()
        .filter(|cell| cell.ttft_p90_s.mean > BROKEN_S)
        .filter_map(|random| {
            let at = |cells: &[&Cell]| {
                cells.iter().find(|it| it.rate == random.rate).map(|it| it.ttft_p90_s.mean)
            };
            let (precise, approximate) = (at(&precise)?, at(&approximate)?);
            let ordered = precise <= approximate && approximate <= random.ttft_p90_s.mean;
            (!ordered).then(|| format!("{}", random.rate.unwrap_or_default()))
        })
        .collect();
    check(
        "precise <= approximate <= random in TTFT p90 wherever random has broken",
        unordered.is_empty(),
        if unordered.is_empty() {
            "yes".to_owned()
        } else {
            format!("not at {}", unordered.join(", "))
        },
    );
    checks
}

/// Runs `loadgen capacity`.
///
/// # Errors
///
/// Those of [`compare`], and output that cannot be written.
pub fn run(options: &CapacityOptions, out: &mut dyn Write) -> Result<()> {
    let compared = compare(options)?;
    let study = options.table.study();
    writeln!(out, "{study}")?;
    let Comparison { source, seeds, factor, .. } = &compared;
    let mut from = "measured";
    if let Some(assumed) = &compared.assumed {
        from = "model";
        writeln!(out, "published: {source}; model: mean of {seeds} seeds")?;
        let Constants {
            request_ms,
            prefill_ms_per_token,
            decode_ms_per_step,
            decode_ms_per_sequence,
        } = assumed.constants;
        writeln!(
            out,
            "constants: {request_ms} ms per request; prefill {prefill_ms_per_token} ms per token, decode \
             {decode_ms_per_step} + {decode_ms_per_sequence} n ms, both x {factor:.3} for this model; tokens x {}",
            assumed.scale_tokens
        )?;
    } else {
        writeln!(out, "published: {source}; measured: mean of {seeds} repeats, real time")?;
    }
    let mut policy = "";
    for cell in &compared.cells {
        if cell.policy != policy {
            policy = &cell.policy;
            writeln!(out, "\n{policy}")?;
            writeln!(
                out,
                "{:>5} | {:>9} {:>16} {:>7} | {:>9} {:>15} {:>7} | {:>7} {:>7} {:>5} {:>7} {:>5}",
                "rate",
                "TTFT p90",
                format!("{from} s"),
                "error",
                "out tok/s",
                from,
                "error",
                "p50 s",
                "mean s",
                "hits",
                "waiting",
                "max",
            )?;
        }
        writeln!(out, "{}", line(cell))?;
    }
    writeln!(out)?;
    for Check { name, found, holds } in &compared.checks {
        writeln!(out, "{} {name}: {found}", if *holds { "ok  " } else { "NOT " })?;
    }
    if let Some(path) = &options.json {
        let named = || format!("cannot write {}", path.display());
        let file = File::create(path).with_context(named)?;
        serde_json::to_writer_pretty(file, &compared).with_context(named)?;
    }
    Ok(())
}

fn line(cell: &Cell) -> String {
    let pair = |published: Option<f64>, model: Estimate, digits: usize, width: usize| {
        let shown = published.map_or_else(|| "-".to_owned(), |it| format!("{it:.digits$}"));
        let half = model.half.map_or_else(String::new, |half| format!(" ±{half:.digits$}"));
        let error = published
            .map_or_else(String::new, |it| format!("{:+.0} %", (model.mean / it - 1.0) * 100.0));
        let model = format!("{:.digits$}{half}", model.mean);
        format!("{shown:>9} {model:>width$} {error:>7}")
    };
    let waiting = cell.waiting_mean.map_or_else(|| "-".to_owned(), |it| format!("{it:.1}"));
    let most = cell.waiting_max.map_or_else(|| "-".to_owned(), |it| it.to_string());
    format!(
        "{:>5} | {} | {} | {:>7.2} {:>7.2} {:>5.2} {waiting:>7} {most:>5}",
        cell.rate.map_or_else(|| "all".to_owned(), |rate| format!("{rate}")),
        pair(cell.published_ttft_p90_s, cell.ttft_p90_s, 2, 16),
        pair(cell.published_output_tps, cell.output_tps, 0, 15),
        cell.ttft_p50_s.mean,
        cell.ttft_mean_s.mean,
        cell.hit_ratio,
    )
}
