//! Scenarios: what is run against what, in which order, and how it becomes a report.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`command`] | `loadgen steady`, `throughput`, `sweep`, `trace run`: their flags |
//! | [`quick`] | `loadgen` alone: a short version of all of it |
//! | [`arm`] | one policy, once: fresh stack, first probe, warm-up, levels |
//!
//! # Model
//!
//! ```text
//! Spec ─▶ arms (policy × repeat, in random order) ─▶ levels ─▶ report::Scenario
//!            └ stack started anew ─ probe ─ warm-up ─┴ drive ∥ sampler ∥ freshness
//! ```
//!
//! Arms of a repeat share seed, plan and warm-up; what differs is the policy alone. Each has processes of its own, so
//! nothing that an engine, an index or an endpoint picker remembers is left of another one. Repeats are
//! interleaved: all policies once, in a random order, then all again.

pub mod arm;
pub mod command;
pub mod quick;

use std::{
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio_util::sync::CancellationToken;

use crate::support::clock::unix_ns;

use super::{
    drive::HttpOptions,
    environment,
    freshness::StormOptions,
    measure::Objectives,
    progress,
    report::{self, Report},
    resources::Component,
    stack::{FleetOptions, Launch, Policy},
    workload::{Arrivals, BodyForm, Planned, Workload},
};

/// How requests come, and at which levels.
#[derive(Clone, Debug, PartialEq)]
pub enum Load {
    /// Closed loops: so many in flight, one level after the other.
    Concurrency(Vec<usize>),
    /// Open loops, one after the other.
    Arrivals(Vec<Arrivals>),
    /// Requests with times of their own.
    Recorded {
        /// Where they come from.
        source: String,
        /// The requests, by their times.
        requests: Vec<Planned>,
    },
}

/// What the requests of a scenario are made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Its name in the report.
    pub name: String,
    /// What is asked; `None` if the requests are recorded.
    pub workload: Option<Workload>,
    /// When.
    pub load: Load,
    /// How long each level lasts.
    pub duration: Duration,
    /// Requests of each level at most.
    pub requests: Option<usize>,
    /// Events that are injected beside it.
    pub storm: Option<StormOptions>,
    /// Ask the index how late it is, where there is one.
    pub freshness: bool,
    /// Send everything that the workload asks for again and again once before.
    pub warm: bool,
    /// Who routes, one arm each.
    pub policies: Vec<Policy>,
    /// How often.
    pub repeats: u32,
}

impl Spec {
    /// What is asked, as text.
    #[must_use]
    pub fn described(&self) -> String {
        match (&self.load, &self.workload) {
            (Load::Recorded { source, .. }, _) => source.clone(),
            (_, Some(workload)) => workload.to_string(),
            (_, None) => String::new(),
        }
    }
}

/// Something that runs already and is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// Where requests go: `http://host:port` or `https://host:port`.
    pub url: String,
    /// The indexer, for freshness.
    pub indexer: Option<std::net::SocketAddr>,
    /// What is sampled.
    pub components: Vec<Component>,
}

/// What all scenarios of a run have in common.
#[derive(Clone, Debug)]
pub struct Common {
    /// A deployment to run against; `None` = processes of our own.
    pub elsewhere: Option<Elsewhere>,
    /// The engines that we start.
    pub fleet: FleetOptions,
    /// How they are started.
    pub launch: Launch,
    /// Envoy's binary; `None` = we play its part.
    pub envoy: Option<PathBuf>,
    /// How connections are made.
    pub http: HttpOptions,
    /// Served model name.
    pub model: String,
    /// What bodies look like.
    pub form: BodyForm,
    /// Seed of plans, arrivals and the order of arms.
    pub seed: u64,
    /// Threads that send.
    pub threads: usize,
    /// How long answers may take after the last send.
    pub grace: Duration,
    /// How long one request may take.
    pub timeout: Duration,
    /// Probes of freshness per second.
    pub probes_per_s: f64,
    /// Publish the probes through a proxy that delays.
    pub delayed: bool,
    /// What a good request is.
    pub objectives: Option<Objectives>,
    /// How to show live numbers.
    pub display: progress::Options,
}

/// Runs the scenarios and returns the report; a cancelled run gives the report of what was measured.
///
/// # Errors
///
/// What cannot be started or reached. What requests run into is in the report.
pub async fn run(specs: &[Spec], common: &Common, cancel: &CancellationToken) -> Result<Report> {
    let started = Instant::now();
    let mut report = Report {
        schema: report::SCHEMA.to_owned(),
        started_unix_ns: unix_ns(),
        environment: environment::read(),
        ..Report::default()
    };
    let arms = order(specs, common.seed);
    let total = arms.len();
    for (at, (spec, policy, repeat)) in arms.into_iter().enumerate() {
        if cancel.is_cancelled() {
            break;
        }
        let arm = arm::Arm { spec, policy, repeat, place: (at + 1, total) };
        let measured = arm::run(&arm, common, cancel).await;
        let measured = measured.with_context(|| format!("{} with policy {policy}", spec.name));
        match measured {
            Ok(scenarios) => report.scenarios.extend(scenarios),
            // A signal may have ended what we were waiting for.
            Err(_) if cancel.is_cancelled() => break,
            // What was measured before is not lost.
            Err(error) if !report.scenarios.is_empty() => {
                report.warnings.push(format!("{error:#}"));
            }
            Err(error) => return Err(error),
        }
    }
    report.interrupted = cancel.is_cancelled();
    report.duration_s = started.elapsed().as_secs_f64();
    report.environment.load_after = environment::load_average();
    report.valid = report.warnings.is_empty()
        && !report.scenarios.is_empty()
        && report.scenarios.iter().all(|scenario| scenario.valid);
    let at_start = &report.environment;
    report.warnings.extend(environment::busy(at_start.load_before, at_start.cores));
    report.summarise();
    report.compare_policies();
    Ok(report)
}

/// All arms: scenarios after one another, within each the repeats, within each the policies at random.
fn order(specs: &[Spec], seed: u64) -> Vec<(&Spec, &Policy, u32)> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut arms = Vec::new();
    for spec in specs {
        for repeat in 0..spec.repeats.max(1) {
            let mut policies: Vec<_> = spec.policies.iter().collect();
            random.shuffle(&mut policies);
            arms.extend(policies.into_iter().map(|policy| (spec, policy, repeat)));
        }
    }
    arms
}

/// Where reports are written.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Outputs {
    /// The report as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// One page with plots.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// llm-d Benchmark Reports v0.2.1, a file for each scenario, policy and level.
    #[arg(long, value_name = "DIR")]
    pub llmd: Option<PathBuf>,
    /// In the shape of GuideLLM's benchmarks.json.
    #[arg(long, value_name = "FILE")]
    pub guidellm: Option<PathBuf>,
    /// One line for each scenario, policy and level.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
}

impl Outputs {
    /// Writes the tables to `out`, and everything that was asked for.
    ///
    /// # Errors
    ///
    /// Files that cannot be written, by name.
    pub fn write(&self, report: &Report, out: &mut dyn Write) -> Result<()> {
        report::text::write(report, out)?;
        let save = |path: &PathBuf, text: String| {
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        if let Some(path) = &self.json {
            save(path, serde_json::to_string_pretty(report)?)?;
        }
        if let Some(path) = &self.html {
            save(path, report::html::page(report))?;
        }
        if let Some(path) = &self.guidellm {
            save(path, serde_json::to_string_pretty(&report::guidellm::document(report))?)?;
        }
        if let Some(path) = &self.csv {
            let file = std::fs::File::create(path);
            let mut file = file.with_context(|| format!("cannot write {}", path.display()))?;
            report::csv::write(report, &mut file)?;
        }
        if let Some(folder) = &self.llmd {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
            for (at, document) in report::llmd::documents(report).iter().enumerate() {
                let path = folder.join(format!("benchmark_report_v0.2.1-{at:03}.json"));
                save(&path, serde_json::to_string_pretty(document)?)?;
            }
        }
        out.flush()?;
        Ok(())
    }
}
