//! `loadgen` alone: a short version of the three scenarios, and the workloads on which routing by prefix
//! has nothing to win.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::{
    Common, Load, Spec,
    command::{self, Asked, ReportFlags},
};
use crate::loadgen::{
    capacity,
    drive::HttpOptions,
    stack::{FleetOptions, Launch, Policy},
    workload::BodyForm,
};

/// How many times faster than the fleet of the published benchmark the engines are.
const SPEED: f64 = 25.0;
/// Factor of lengths.
const TOKEN_SCALE: f64 = 0.1;
/// 73 % of the fleet's caches, over and over.
const SHARED: &str = "shared-prefix:groups=30,prompts=5,system=600,question=120,output=8";
/// Workloads on which prefixes are worth little or nothing: name, workload, requests per second.
const LOSING: [(&str, &str, f64); 5] = [
    ("unique", "unique:prompt=720,output=8", 60.0),
    ("one-prefix", "one-prefix:system=600,question=120,output=8", 120.0),
    (
        "zipf-1.2",
        "shared-prefix:groups=30,prompts=5,system=600,question=120,output=8,zipf=1.2",
        100.0,
    ),
    ("short", "short:prompt=32,output=8", 150.0),
    ("under-used", SHARED, 15.0),
];

/// Flags of `loadgen` alone.
#[derive(Clone, Debug, Args)]
pub struct Quick {
    /// Seed of everything.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How often each workload of the second part is run with each policy.
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeats: u32,
    #[command(flatten)]
    report: ReportFlags,
}

impl Quick {
    /// The scenarios.
    ///
    /// # Errors
    ///
    /// An Envoy that is not there.
    pub fn asked(self) -> Result<Asked> {
        let common = Common {
            elsewhere: None,
            fleet: FleetOptions {
                engines: 4,
                num_gpu_blocks: 768,
                pace: capacity::pace(TOKEN_SCALE, SPEED),
                ..FleetOptions::default()
            },
            launch: Launch::default(),
            envoy: self.report.envoy()?,
            http: HttpOptions::default(),
            model: "mock".to_owned(),
            form: BodyForm::Ids,
            seed: self.seed,
            threads: 1,
            grace: Duration::from_secs(5),
            timeout: Duration::from_secs(30),
            probes_per_s: 50.0,
            delayed: false,
            objectives: Some("ttft=100ms".parse().map_err(anyhow::Error::msg)?),
            display: self.report.display(),
        };
        let specs = specs(self.repeats)?;
        Ok(self.report.asked(specs, common))
    }
}

fn specs(repeats: u32) -> Result<Vec<Spec>> {
    let few = [Policy::Random, Policy::Approximate, Policy::Precise];
    let base = Spec {
        name: "steady".to_owned(),
        workload: Some(workload(SHARED)?),
        load: Load::Concurrency(vec![1]),
        duration: Duration::from_secs(2),
        requests: None,
        storm: None,
        freshness: true,
        warm: true,
        policies: few.to_vec(),
        repeats: 1,
    };
    let throughput = Spec {
        name: "throughput".to_owned(),
        load: Load::Concurrency(vec![1, 16, 64]),
        duration: Duration::from_secs(2),
        ..base.clone()
    };
    let process = command::arrivals("gamma", 80.0)?.with_bursts(40, Duration::from_secs(2));
    let storm = "rate=10000,burst=20000,interval=2s".parse().map_err(anyhow::Error::msg)?;
    let sweep = Spec {
        name: "sweep".to_owned(),
        load: Load::Arrivals(vec![process]),
        duration: Duration::from_secs(6),
        storm: Some(storm),
        ..base.clone()
    };
    let mut specs = vec![base.clone(), throughput, sweep];
    for (name, text, rate) in LOSING {
        specs.push(Spec {
            name: name.to_owned(),
            workload: Some(workload(text)?),
            load: Load::Arrivals(vec![command::arrivals("poisson", rate)?]),
            duration: Duration::from_secs(2),
            freshness: false,
            policies: Policy::ALL.to_vec(),
            repeats,
            ..base.clone()
        });
    }
    Ok(specs)
}

fn workload(text: &str) -> Result<super::Workload> {
    text.parse().map_err(|error| anyhow::anyhow!("workload {text:?}: {error}"))
}
