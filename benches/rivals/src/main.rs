//! Our block index beside other projects' indexes: the same streams, one run, one table.
//!
//! `cargo run --release --manifest-path benches/rivals/Cargo.toml`, about four minutes; with
//! `--quick` less than one, with fewer shapes and entries.
//!
//! # Method
//!
//! Every index gets the same seeded events and questions, in its own types and by its own hash
//! functions. Before anything is timed, each answer is compared with the truth. The indexes take
//! turns in short rounds; a figure is the median of the rounds. p50 is that of batches of 64 calls,
//! over as many distinct prompts as the entries allow; p99 that of single calls less what reading
//! the clock costs. Ratios within one run mean more than absolute times.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the report goes to a terminal")]

mod beside;
mod chain;
mod contender;
mod crtc;
mod exactness;
mod floors;
mod heap;
mod ingest;
mod lookup;
mod memory;
mod ours;
mod report;
mod sample;
mod stream;

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use crate::{
    chain::{ChainMap, ChainRaw},
    contender::Contender,
    crtc::Crtc,
    lookup::{Case, Effort, Fill, Plan, Shape, Subject},
    memory::{Holding, More},
    ours::Ours,
    report::*,
    sample::median_of,
};

/// Measures the block index beside kv-index and dynamo-kv-router.
#[derive(Debug, Parser)]
struct Args {
    /// Fewer shapes, entries and rounds.
    #[arg(long)]
    quick: bool,
    /// Writes the figures as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measures only what has this in its metric and shape, such as "lookup p50 512x64".
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
    /// (block, pod) pairs that an index grows to; one that is looked up in has twice as many at
    /// most, with `--quick` half as many.
    #[arg(long, value_name = "N")]
    entries: Option<usize>,
    /// Prints what the indexes answer to streams with known answers, and nothing else.
    #[arg(long)]
    exactness: bool,
    #[command(subcommand)]
    alone: Option<Alone>,
}

/// Measurements that have a process of their own. They print their figures on one line.
#[derive(Clone, Debug, Subcommand)]
#[command(hide = true)]
enum Alone {
    Grow {
        who: Who,
        holding: Holding,
        more: More,
        entries: usize,
    },
    Churn {
        who: Who,
        live: usize,
        #[arg(long)]
        sweep: bool,
    },
    Clear {
        who: Who,
        blocks: usize,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Who {
    Ours,
    Chain,
    Crtc,
}

impl Who {
    const ALL: [Self; 3] = [Self::Ours, Self::Chain, Self::Crtc];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => Ours::NAME,
            Self::Chain => ChainRaw::NAME,
            Self::Crtc => Crtc::NAME,
        }
    }

    fn argument(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Chain => "chain",
            Self::Crtc => "crtc",
        }
    }
}

impl Alone {
    fn measure(&self) -> Vec<f64> {
        match *self {
            Self::Grow { who, .. } | Self::Churn { who, .. } | Self::Clear { who, .. } => match who
            {
                Who::Ours => self.measure_as::<Ours>(),
                Who::Chain => self.measure_as::<ChainRaw>(),
                Who::Crtc => self.measure_as::<Crtc>(),
            },
        }
    }

    fn measure_as<C: Contender>(&self) -> Vec<f64> {
        match *self {
            Self::Grow { holding, more, entries, .. } => memory::grow::<C>(holding, more, entries),
            Self::Churn { live, sweep, .. } => memory::churn::<C>(live, sweep),
            Self::Clear { blocks, .. } => memory::clear::<C>(blocks),
        }
    }
}

/// Runs this program again for one measurement.
fn alone(arguments: &[&str]) -> anyhow::Result<Vec<f64>> {
    let output = Command::new(std::env::current_exe()?).args(arguments).output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let line = String::from_utf8(output.stdout)?;
    line.split_whitespace()
        .map(|figure| figure.parse().with_context(|| format!("{arguments:?} printed {line}")))
        .collect()
}

/// How much is done.
struct Run {
    report: Report,
    quick: bool,
    entries: usize,
    /// (block, pod) pairs of an index to look up in, at most.
    held: usize,
    rounds: usize,
    effort: Effort,
    wrong: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(alone) = &args.alone {
        heap::start();
        let figures: Vec<String> = alone.measure().iter().map(f64::to_string).collect();
        println!("{}", figures.join(" "));
        return Ok(());
    }
    let (exact, right) = exactness::table();
    println!("{exact}");
    ensure!(right, "our own answers differ from the truth");
    if args.exactness {
        return Ok(());
    }
    let budget = Duration::from_millis(if args.quick { 8 } else { 40 });
    let cold = if args.quick { 16 } else { 48 };
    let entries = args.entries.unwrap_or(if args.quick { 1_000_000 } else { 4_000_000 });
    let mut run = Run {
        report: Report::new(args.only),
        quick: args.quick,
        entries,
        held: if args.quick { entries / 2 } else { 2 * entries },
        rounds: 3,
        effort: Effort { budget, empty: sample::empty_call(), cold },
        wrong: Vec::new(),
    };
    run.lookups();
    run.ingest();
    run.beside();
    run.memory()?;
    println!("{}", run.report.table());
    if let Some(path) = args.json {
        let text = serde_json::to_string_pretty(&run.report.json())?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    ensure!(run.wrong.is_empty(), "wrong answers: {}", run.wrong.join("; "));
    Ok(())
}

impl Run {
    fn lookups(&mut self) {
        floors::measure(&mut self.report, self.effort.budget);
        let pods: &[u32] = if self.quick { &[8, 64, 256] } else { &[8, 64, 256, 1024] };
        for blocks in [128, 512, 4096] {
            for &pods in pods {
                let cases = [Case::Whole, Case::Half, Case::Miss];
                self.shape(Shape { blocks, pods, fill: Fill::Full }, &cases);
            }
        }
        for fill in [Fill::Frag, Fill::Stag] {
            for pods in [8, 64, 256] {
                self.shape(Shape { blocks: 512, pods, fill }, &[Case::Whole]);
            }
        }
        self.shape(Shape { blocks: 512, pods: 16, fill: Fill::Mix }, &[Case::Whole]);
        for pods in [8, 64] {
            self.second_tier(pods);
        }
    }

    /// Every figure of one filled shape.
    fn shape(&mut self, shape: Shape, cases: &[Case]) {
        let common = |case| shape.fill == Fill::Full && case == Case::Whole;
        let cold = |case| common(case) && (shape.blocks, shape.pods != 1024) == (512, true);
        let whole =
            |case| common(case) && (shape.pods == 64 || (shape.blocks == 512 && shape.pods <= 256));
        let wanted = |run: &Self, case| {
            let all = [P50, P99, COLD, COLD_P90, WHOLE, WHOLE_FLOOR].into_iter();
            all.filter(|metric| match *metric {
                COLD | COLD_P90 => cold(case),
                WHOLE | WHOLE_FLOOR => whole(case),
                _ => true,
            })
            .any(|metric| run.report.wants(metric, &shape.name(case)))
        };
        let cases: Vec<Case> = cases.iter().copied().filter(|case| wanted(self, *case)).collect();
        if cases.is_empty() {
            return;
        }
        let plan = shape.plan(self.held);
        let mut subjects = all_filled(&plan);
        for case in cases {
            let name = shape.name(case);
            eprintln!("lookup {name}");
            let mut note = match plan.prompts() {
                sample::BATCH => String::new(),
                prompts => format!("prompts: {prompts}"),
            };
            for subject in &mut subjects {
                if !subject.ask(case) {
                    note += &format!("; {} answers differently", subject.name());
                    if subject.name() == Ours::NAME {
                        self.wrong.push(name.clone());
                    }
                }
            }
            let effort = self.effort;
            let p50 = self.figures(&mut subjects, |subject| subject.batches(effort).median());
            self.report.add(P50, &name, &p50, &note);
            let p99 = self.figures(&mut subjects, |subject| subject.calls(effort).quantile(0.99));
            self.report.add(P99, &name, &p99, &note);
            if cold(case) {
                let mut samples: Vec<_> =
                    subjects.iter_mut().map(|one| (one.name(), one.cold(effort))).collect();
                let mut at = |q| -> Vec<_> {
                    samples.iter_mut().map(|(name, cold)| (*name, cold.quantile(q))).collect()
                };
                self.report.add(COLD, &name, &at(0.5), &note);
                self.report.add(COLD_P90, &name, &at(0.9), &note);
            }
            if whole(case) {
                let figures = self.figures(&mut subjects, |subject| subject.whole(effort).median());
                self.report.add(WHOLE, &name, &figures, &note);
                let bytes = plan.bytes();
                let floor =
                    median_of(self.rounds, || floors::chained(&bytes, effort.budget).median());
                let ratio = [(Ours::NAME, figures[0].1 / (floor + p50[0].1))];
                let note = format!("floor {floor:.0} ns, lookup {:.0} ns", p50[0].1);
                self.report.add(WHOLE_FLOOR, &name, &ratio, &note);
            }
        }
    }

    /// The subjects in turns; of each the median.
    fn figures(
        &self,
        subjects: &mut [Box<dyn Subject + '_>],
        measure: impl Fn(&mut dyn Subject) -> f64,
    ) -> Vec<(&'static str, f64)> {
        let mut all = vec![sample::Sample::default(); subjects.len()];
        for _ in 0..self.rounds {
            for (subject, sample) in subjects.iter_mut().zip(&mut all) {
                sample.push(measure(subject.as_mut()));
            }
        }
        let names = subjects.iter().map(|subject| subject.name());
        names.zip(all.iter_mut().map(sample::Sample::median)).collect()
    }

    fn second_tier(&mut self, pods: u32) {
        let shape = Shape { blocks: 512, pods, fill: Fill::Tier };
        let name = shape.name(Case::Whole);
        if !self.report.wants(TIER, &name) {
            return;
        }
        let tiered = shape.plan(self.held);
        let plain = Shape { fill: Fill::Full, ..shape }.plan(self.held);
        let mut subjects: Vec<_> =
            [&tiered, &plain].into_iter().filter_map(lookup::fill::<Ours>).collect();
        for subject in &mut subjects {
            if !subject.ask(Case::Whole) {
                self.wrong.push(name.clone());
            }
        }
        let effort = self.effort;
        let times = self.figures(&mut subjects, |subject| subject.batches(effort).median());
        let note = format!("{:.0} ns, {:.0} ns", times[0].1, times[1].1);
        self.report.add(TIER, &name, &[(Ours::NAME, times[0].1 / times[1].1)], &note);
    }

    fn ingest(&mut self) {
        for (single, events) in [(false, "tails"), (true, "1-block events")] {
            for threads in [1, 2] {
                let name =
                    format!("{events}, {threads} thread{}", if threads == 1 { "" } else { "s" });
                if ![INGEST, INGEST_TOKENS].iter().any(|metric| self.report.wants(*metric, &name)) {
                    continue;
                }
                eprintln!("ingest {name}");
                let load = ingest::load(self.entries / 4, single, threads);
                let mut all: [Vec<ingest::Rates>; 3] = Default::default();
                for _ in 0..self.rounds {
                    all[0].push(ingest::rates::<Ours>(&load));
                    all[1].push(ingest::rates::<ChainRaw>(&load));
                    all[2].push(ingest::rates::<Crtc>(&load));
                }
                let note = self.judge(&name, &all, |rates| rates.right);
                let hashed = format!("ours: measured hashing taken off{note}");
                self.report.add(INGEST, &name, &medians(&all, |rates| rates.hashed), &hashed);
                self.report.add(INGEST_TOKENS, &name, &medians(&all, |rates| rates.tokens), &note);
            }
        }
    }

    fn beside(&mut self) {
        let name = "16 pods, 512 blocks";
        let all = [BESIDE_P50, BESIDE_P99, BESIDE_READS, BESIDE_WRITES];
        if !all.iter().any(|metric| self.report.wants(*metric, name)) {
            return;
        }
        eprintln!("reader beside a writer");
        let beside = beside::Beside::new(if self.quick { 2000 } else { 8000 });
        let mut runs: [Vec<beside::Figures>; 3] = Default::default();
        for _ in 0..self.rounds {
            runs[0].push(beside.measure::<Ours>(self.effort.empty));
            runs[1].push(beside.measure::<ChainRaw>(self.effort.empty));
            runs[2].push(beside.measure::<Crtc>(self.effort.empty));
        }
        let note = self.judge(name, &runs, |run| run.right);
        let hashed = format!("ours hashes inside, rivals before{note}");
        self.report.add(BESIDE_P50, name, &medians(&runs, |run| run.p50), &note);
        self.report.add(BESIDE_P99, name, &medians(&runs, |run| run.p99), &note);
        self.report.add(BESIDE_READS, name, &medians(&runs, |run| run.reads), &note);
        self.report.add(BESIDE_WRITES, name, &medians(&runs, |run| run.writes), &hashed);
    }

    /// Says whose answers are wrong, and remembers ours.
    fn judge<T>(&mut self, what: &str, runs: &[Vec<T>; 3], right: fn(&T) -> bool) -> String {
        let mut note = String::new();
        for (who, runs) in Who::ALL.iter().zip(runs) {
            if !runs.iter().all(right) {
                note += &format!("; {} answers differently", who.name());
                if who.name() == Ours::NAME {
                    self.wrong.push(what.to_owned());
                }
            }
        }
        note
    }

    fn memory(&mut self) -> anyhow::Result<()> {
        let entries = self.entries.to_string();
        let grow = |who: Who, holding: &str, more: &str| {
            alone(&["grow", who.argument(), holding, more, &entries])
        };
        let holdings = [("unique", "unique"), ("equal", "x16,equal-keys"), ("own", "x16,own-keys")];
        for (holding, name) in holdings {
            let more = [("twice", "5 % twice"), ("tier", "30 % in a second tier")];
            let more_names = more.map(|(_, what)| format!("{name} + {what}"));
            let wants_more = more_names.iter().any(|name| self.report.wants(MEMORY_MORE, name));
            if ![MEMORY, MEMORY_RSS].iter().any(|metric| self.report.wants(*metric, name))
                && !wants_more
            {
                continue;
            }
            eprintln!("memory {name}");
            let (mut heap, mut resident) = (Vec::new(), Vec::new());
            for who in Who::ALL {
                let figures = grow(who, holding, "nothing")?;
                heap.push((who.name(), figures[0]));
                resident.push((who.name(), figures[1]));
            }
            self.report.add(MEMORY, name, &heap, "");
            self.report.add(MEMORY_RSS, name, &resident, "");
            for ((more, _), shape) in more.iter().zip(&more_names) {
                if holding != "own" && self.report.wants(MEMORY_MORE, shape) {
                    let added = grow(Who::Ours, holding, more)?[0] - heap[0].1;
                    self.report.add(MEMORY_MORE, shape, &[(Ours::NAME, added)], "");
                }
            }
        }
        let live = (self.entries / 20).to_string();
        let name = "chains of 256, tail first";
        if [CHURN_HEAP, CHURN_RSS].iter().any(|metric| self.report.wants(*metric, name)) {
            eprintln!("churn");
            let (mut heap, mut resident) = (Vec::new(), Vec::new());
            let runs = Who::ALL.map(|who| (who.name(), who, None));
            for (name, who, sweep) in runs.into_iter().chain([(
                "dynamo CRTC, swept each pass",
                Who::Crtc,
                Some("--sweep"),
            )]) {
                let arguments = ["churn", who.argument(), &live].into_iter().chain(sweep);
                let figures = alone(&arguments.collect::<Vec<_>>())?;
                heap.push((name, figures[0]));
                resident.push((name, figures[1]));
            }
            self.report.add(CHURN_HEAP, name, &heap, "");
            self.report.add(CHURN_RSS, name, &resident, "");
        }
        let blocks = self.entries / 4;
        let name = format!("{blocks} blocks");
        if [CLEAR, CLEAR_HEAP].iter().any(|metric| self.report.wants(*metric, &name)) {
            eprintln!("clear");
            let (mut invisible, mut back) = (Vec::new(), Vec::new());
            for who in Who::ALL {
                let figures = alone(&["clear", who.argument(), &blocks.to_string()])?;
                invisible.push((who.name(), figures[0]));
                back.push((who.name(), figures[1]));
            }
            self.report.add(CLEAR, &name, &invisible, "");
            self.report.add(CLEAR_HEAP, &name, &back, "2000: not within two seconds");
        }
        Ok(())
    }
}

/// Of runs in the order of [`Who::ALL`], each one's median of a figure.
fn medians<T>(runs: &[Vec<T>; 3], of: fn(&T) -> f64) -> Vec<(&'static str, f64)> {
    let median = |runs: &Vec<T>| {
        let mut figures = runs.iter().map(of);
        median_of(figures.len(), || figures.next().unwrap_or(f64::NAN))
    };
    Who::ALL.iter().map(|who| who.name()).zip(runs.iter().map(median)).collect()
}

/// Every index that can have the plan's pods, ours first, filled.
fn all_filled(plan: &Plan) -> Vec<Box<dyn Subject + '_>> {
    let fills = [
        lookup::fill::<Ours>,
        lookup::fill::<ChainRaw>,
        lookup::fill::<ChainMap>,
        lookup::fill::<Crtc>,
    ];
    fills.into_iter().filter_map(|fill| fill(plan)).collect()
}
