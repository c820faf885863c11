//! `loadgen steady`, `throughput`, `sweep` and `trace run`: their flags.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::{Common, Elsewhere, Load, Outputs, Spec};
use crate::{
    loadgen::{
        capacity,
        drive::HttpOptions,
        engine::Pace,
        freshness::StormOptions,
        measure::Objectives,
        progress,
        resources::{Component, Watched},
        stack::{FleetOptions, FleetPorts, Launch, Policy, envoy},
        workload::{Arrivals, BodyForm, Workload, trace::command::TraceArguments},
    },
    support::{tls::ClientTls, units},
};

/// One request after another, or a constant rate.
#[derive(Clone, Debug, Args)]
pub struct Steady {
    /// Requests per second, sent at their time whatever the answers do; several, with commas, one after
    /// the other. Without it the next request is sent when the one before is answered.
    #[arg(long, value_name = "RATE[,RATE…]", value_delimiter = ',')]
    rate: Vec<f64>,
    /// Arrivals at these rates: constant, poisson, or gamma with cv 2.
    #[arg(long, value_name = "KIND", default_value = "constant")]
    arrival: String,
    #[command(flatten)]
    shared: Shared,
}

/// As many in parallel as asked, one level after the other.
#[derive(Clone, Debug, Args)]
pub struct Throughput {
    /// Requests in flight.
    #[arg(long, value_name = "N[,N…]", value_delimiter = ',', default_value = "1,8,32,128")]
    concurrency: Vec<usize>,
    #[command(flatten)]
    shared: Shared,
}

/// Irregular arrivals with bursts of requests, and bursts of events.
#[derive(Clone, Debug, Args)]
pub struct Sweep {
    /// Mean rate between bursts, requests per second.
    #[arg(long, value_name = "RATE", default_value_t = 20.0)]
    base_rate: f64,
    /// Arrivals between bursts: gamma (cv 2), poisson, onoff (1 s on, 3 s off), or a whole process such as
    /// gamma:rate=20,cv=3.
    #[arg(long, value_name = "KIND", default_value = "gamma")]
    arrival: String,
    /// Requests of a burst, released together; 0 = none.
    #[arg(long, value_name = "N", default_value_t = 100)]
    burst_size: u32,
    /// From one burst to the next.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = units::duration)]
    burst_interval: Duration,
    /// Blocks of a burst of events; 0 = none.
    #[arg(long, value_name = "BLOCKS", default_value_t = 50_000)]
    event_burst: u64,
    /// Blocks per second between bursts of events.
    #[arg(long, value_name = "RATE", default_value_t = 20_000)]
    event_rate: u64,
    /// All of what is injected, in place of the two flags above: publishers=4,rate=20000,burst=50000,…
    #[arg(long, value_name = "TEXT")]
    storm: Option<StormOptions>,
    #[command(flatten)]
    shared: Shared,
}

/// Sends a recorded trace, each request at its time.
#[derive(Clone, Debug, Args)]
pub struct RunTrace {
    #[command(flatten)]
    trace: TraceArguments,
    #[command(flatten)]
    shared: Shared,
}

impl RunTrace {
    /// Reads the trace and checks the flags.
    ///
    /// # Errors
    ///
    /// What is wrong with the file or a flag.
    pub fn asked(self) -> Result<Asked> {
        let trace = self.trace.open(self.shared.seed)?;
        let source = format!("trace:{}", self.trace.file.display());
        let load = Load::Recorded { source, requests: trace.requests };
        self.shared.asked("trace", load, None)
    }
}

/// What comes of a run, and who stands in front: for the short version, too.
#[derive(Clone, Debug, Args)]
pub(super) struct ReportFlags {
    /// Put real Envoy in front: its binary, or the one on PATH.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "envoy")]
    envoy: Option<PathBuf>,
    #[command(flatten)]
    outputs: Outputs,
    /// Exit with 3 if the report is not valid.
    #[arg(long)]
    strict: bool,
    /// No live numbers.
    #[arg(long, short)]
    quiet: bool,
}

impl ReportFlags {
    /// Envoy at the given path; a bare `envoy` is looked for on `PATH`.
    pub(super) fn envoy(&self) -> Result<Option<PathBuf>> {
        let given = self.envoy.as_deref();
        given
            .map(|path| envoy::find(Some(path).filter(|path| path.as_os_str() != "envoy")))
            .transpose()
    }

    /// Live numbers, unless they are not wanted.
    pub(super) fn display(&self) -> progress::Options {
        let shown = if self.quiet { progress::Shown::Quiet } else { progress::Shown::Auto };
        progress::Options { shown, ..progress::Options::default() }
    }

    /// What to do with the report of these scenarios.
    pub(super) fn asked(self, specs: Vec<Spec>, common: Common) -> Asked {
        Asked { specs, common, outputs: self.outputs, strict: self.strict }
    }
}

/// What all scenarios take.
#[derive(Clone, Debug, Args)]
pub struct Shared {
    /// What is asked: shared-prefix:groups=…,prompts=…,system=…,question=…,output=…, unique:…, one-prefix:…,
    /// short:…, chat:…, capacity-73, capacity-37.
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_WORKLOAD)]
    workload: Workload,
    /// How long each level lasts.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    duration: Duration,
    /// Requests of each level at most.
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Do not send everything that stays once before.
    #[arg(long)]
    cold: bool,
    /// Who routes, side by side: random, round-robin, least-load, approximate, precise, constant, all,
    /// external:NAME=HOST:PORT[,PID].
    #[arg(long, value_name = "POLICY[;POLICY…]", default_value = "precise")]
    policies: String,
    /// How often each of them; their order is drawn anew each time.
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeats: u32,
    /// A gateway or server to load, in place of processes of our own.
    #[arg(long, value_name = "URL")]
    target: Option<String>,
    /// A process to watch beside --target: gateway=123; several of one name are added.
    #[arg(long, value_name = "NAME=PID")]
    pid: Vec<String>,
    /// A directory of cgroup v2 to watch beside --target.
    #[arg(long, value_name = "NAME=DIR")]
    cgroup: Vec<String>,
    /// The indexer beside --target, for freshness.
    #[arg(long, value_name = "IP:PORT")]
    indexer: Option<SocketAddr>,
    /// Certificates that an https target is trusted by, PEM; the system's without it.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Take every certificate of an https target.
    #[arg(long)]
    insecure: bool,
    /// A header of every request, such as 'authorization: Bearer …'; may be repeated.
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// Served model name.
    #[arg(long, default_value = "mock")]
    model: String,
    /// What prompts look like.
    #[arg(long, value_enum, default_value_t)]
    form: BodyForm,
    #[command(flatten)]
    fleet: FleetFlags,
    /// Seed of requests, arrivals and the order of policies.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads that send.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// How long answers may take after the last send.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    grace: Duration,
    /// How long one request may take.
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = units::duration)]
    timeout: Duration,
    /// Probes of freshness per second, stores and removes each; 0 = none.
    #[arg(long, value_name = "RATE", default_value_t = 50.0)]
    probes: f64,
    /// Publish the probes through a proxy that delays by 2 ms ± 1 ms.
    #[arg(long)]
    delayed_probes: bool,
    /// What a good request is: ttft=200ms,tpot=30ms.
    #[arg(long, value_name = "TEXT")]
    slo: Option<Objectives>,
    #[command(flatten)]
    report: ReportFlags,
}

/// Traffic that the default fleet can take and that shows what routing is worth: 73 % of its caches.
const DEFAULT_WORKLOAD: &str =
    "shared-prefix:groups=75,prompts=5,system=600,question=120,output=16";

/// What our engines are like.
#[derive(Clone, Debug, Args)]
pub struct FleetFlags {
    /// Engines.
    #[arg(long, value_name = "N", default_value_t = 4)]
    engines: usize,
    /// Tokens per block.
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    block_size: usize,
    /// Blocks of each engine.
    #[arg(long, value_name = "N", default_value_t = 1_920)]
    blocks: u32,
    /// How many times faster than the fleet of llm-d's published benchmark the engines are; rates and
    /// times scale with it.
    #[arg(long, value_name = "FACTOR", default_value_t = 10.0)]
    speed: f64,
    /// Factor of the lengths, against those of the published benchmark: a tenth of the tokens takes as
    /// long as all of them there.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.1)]
    token_scale: f64,
    /// Where the engines listen: engine n at the port plus n; 0 = free ports. For endpoint pickers of
    /// somebody else's, which have to know.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    fleet_http: SocketAddr,
    /// Where they publish, likewise.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    fleet_events: u16,
    /// Where they answer replays, likewise.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    fleet_replay: u16,
    /// Time between two scrapes of an engine's metrics by epp, for all policies.
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = units::duration)]
    scrape_interval: Duration,
    /// Answer as fast as possible.
    #[arg(long, conflicts_with_all = ["speed", "token_scale"])]
    instant: bool,
}

impl FleetFlags {
    /// How the engines, and what belongs to them, are started.
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch {
            ports: FleetPorts {
                http: self.fleet_http,
                events: self.fleet_events,
                replay: self.fleet_replay,
            },
            scrape_interval: self.scrape_interval,
            ..Launch::default()
        }
    }

    /// As options.
    #[must_use]
    pub fn options(&self, model: &str) -> FleetOptions {
        let pace = if self.instant {
            Pace { scale: 0.0, ..Pace::default() }
        } else {
            capacity::pace(self.token_scale, self.speed)
        };
        FleetOptions {
            engines: self.engines.max(1),
            model: model.to_owned(),
            block_size: self.block_size.max(1),
            num_gpu_blocks: self.blocks.max(2),
            pace,
            ..FleetOptions::default()
        }
    }
}

/// What was asked for: what to run, and what to do with its report.
#[derive(Debug)]
pub struct Asked {
    /// The scenarios, in order.
    pub specs: Vec<Spec>,
    /// What it runs against.
    pub common: Common,
    /// Where the report goes.
    pub outputs: Outputs,
    /// Exit with 3 if it is not valid.
    pub strict: bool,
}

impl Steady {
    /// Checks the flags.
    ///
    /// # Errors
    ///
    /// What is wrong with which flag.
    pub fn asked(self) -> Result<Asked> {
        let load = if self.rate.is_empty() {
            Load::Concurrency(vec![1])
        } else {
            let at = |rate: &f64| arrivals(&self.arrival, *rate);
            Load::Arrivals(self.rate.iter().map(at).collect::<Result<_>>()?)
        };
        self.shared.asked("steady", load, None)
    }
}

impl Throughput {
    /// Checks the flags.
    ///
    /// # Errors
    ///
    /// What is wrong with which flag.
    pub fn asked(self) -> Result<Asked> {
        if self.concurrency.contains(&0) {
            bail!("--concurrency: at least 1");
        }
        self.shared.asked("throughput", Load::Concurrency(self.concurrency), None)
    }
}

impl Sweep {
    /// Checks the flags.
    ///
    /// # Errors
    ///
    /// What is wrong with which flag.
    pub fn asked(self) -> Result<Asked> {
        let mut process = arrivals(&self.arrival, self.base_rate)?;
        if self.burst_size > 0 {
            process = process.with_bursts(self.burst_size, self.burst_interval);
        }
        let storm = match self.storm {
            Some(storm) => Some(storm),
            None if self.event_burst == 0 && self.event_rate == 0 => None,
            None => {
                let text = format!(
                    "rate={},burst={},interval={:?}",
                    self.event_rate, self.event_burst, self.burst_interval
                );
                Some(text.parse().map_err(anyhow::Error::msg)?)
            }
        };
        self.shared.asked("sweep", Load::Arrivals(vec![process]), storm)
    }
}

/// A kind of arrivals at a rate, or a whole process.
pub(super) fn arrivals(kind: &str, rate: f64) -> Result<Arrivals> {
    let text = match kind {
        "constant" => format!("constant:{rate}"),
        "poisson" => format!("poisson:{rate}"),
        "gamma" => format!("gamma:rate={rate},cv=2"),
        // The mean over both.
        "onoff" => format!("onoff:rate={},on=1s,off=3s", rate * 4.0),
        whole => whole.to_owned(),
    };
    text.parse().map_err(|error| anyhow::anyhow!("arrivals {kind:?} at {rate}/s: {error}"))
}

impl Shared {
    /// What is run on, and the report's ways.
    pub(super) fn asked(
        self,
        name: &str,
        load: Load,
        storm: Option<StormOptions>,
    ) -> Result<Asked> {
        let recorded = matches!(load, Load::Recorded { .. });
        let elsewhere = self.elsewhere()?;
        let policies = match &elsewhere {
            // Somebody else decides.
            Some(_) => vec![Policy::Constant],
            None => policies(&self.policies)?,
        };
        let http = self.http()?;
        let envoy = self.report.envoy()?;
        let spec = Spec {
            name: name.to_owned(),
            workload: (!recorded).then_some(self.workload),
            load,
            duration: self.duration,
            requests: self.requests,
            storm,
            freshness: self.probes > 0.0,
            warm: !self.cold,
            policies,
            repeats: self.repeats,
        };
        let common = Common {
            elsewhere,
            fleet: self.fleet.options(&self.model),
            launch: Launch { render: self.form != BodyForm::Ids, ..self.fleet.launch() },
            envoy,
            http,
            model: self.model,
            form: self.form,
            seed: self.seed,
            threads: self.threads.max(1),
            grace: self.grace,
            timeout: self.timeout,
            probes_per_s: self.probes,
            delayed: self.delayed_probes,
            objectives: self.slo,
            display: self.report.display(),
        };
        Ok(self.report.asked(vec![spec], common))
    }

    fn http(&self) -> Result<HttpOptions> {
        let header = |text: &String| {
            let (name, value) =
                text.split_once(':').with_context(|| format!("--header {text:?}: NAME: VALUE"))?;
            Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        };
        Ok(HttpOptions {
            tls: ClientTls { ca: self.tls_ca.clone(), insecure_skip_verify: self.insecure },
            headers: self.header.iter().map(header).collect::<Result<_>>()?,
        })
    }

    fn elsewhere(&self) -> Result<Option<Elsewhere>> {
        let Some(url) = self.target.clone() else {
            if self.indexer.is_some() || !self.pid.is_empty() || !self.cgroup.is_empty() {
                bail!("--indexer, --pid and --cgroup belong to --target");
            }
            return Ok(None);
        };
        let mut components: Vec<Component> = Vec::new();
        let mut add = |name: &str, source: Watched| match components
            .iter_mut()
            .find(|component| component.name == name)
        {
            Some(component) => component.sources.push(source),
            None => components.push(Component { name: name.to_owned(), sources: vec![source] }),
        };
        for text in &self.pid {
            let (name, pid) = text.split_once('=').context("--pid: NAME=PID")?;
            let pid = pid.parse().with_context(|| format!("--pid: {pid:?} is no process id"))?;
            add(name, Watched::Pid(pid));
        }
        for text in &self.cgroup {
            let (name, folder) = text.split_once('=').context("--cgroup: NAME=DIR")?;
            add(name, Watched::Cgroup(folder.into()));
        }
        Ok(Some(Elsewhere { url, indexer: self.indexer, components }))
    }
}

/// Policies from a list with semicolons or commas; `all` are the five.
pub(super) fn policies(text: &str) -> Result<Vec<Policy>> {
    let mut found = Vec::new();
    for part in split(text) {
        match part {
            "all" => found.extend(Policy::ALL),
            name => found.push(name.parse().map_err(|e| anyhow::anyhow!("--policies: {e}"))?),
        }
    }
    let mut seen = std::collections::HashSet::new();
    found.retain(|policy| seen.insert(policy.to_string()));
    if found.is_empty() {
        bail!("--policies: name one");
    }
    Ok(found)
}

/// Parts between semicolons, or between commas where these do not precede a process id.
fn split(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
        let mut begin = 0;
        for (at, _) in part.match_indices(',') {
            let next = part[at + 1..].trim_start();
            if next.starts_with(|c: char| c.is_ascii_digit()) {
                continue;
            }
            parts.push(part[begin..at].trim());
            begin = at + 1;
        }
        parts.push(part[begin..].trim());
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        assert_eq!(split(text), expected);
    }

    #[test]
    fn policies_are_separated_by_commas_and_semicolons() {
        check("random, precise", &["random", "precise"]);
        check("external:go=127.0.0.1:9,77,random", &["external:go=127.0.0.1:9,77", "random"]);
        check("external:go=h:9;precise", &["external:go=h:9", "precise"]);
        check(" ; ,", &[]);
    }

    #[test]
    fn all_are_the_five_once() {
        let names: Vec<_> =
            policies("precise,all").unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["precise", "random", "round-robin", "least-load", "approximate"]);
        assert!(policies("fastest").is_err());
    }
}
