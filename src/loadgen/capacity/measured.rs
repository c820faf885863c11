//! Reports of `loadgen steady --published`, in the units of the published tables.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{command::Check, simulation::StageOutcome};
use crate::loadgen::{
    report::{Report, Scenario},
    stack::policy::Policy,
    workload::Workload,
};

/// What some reports say together.
#[derive(Debug, Default)]
pub(super) struct Measured {
    /// All repeats, by policy and rate.
    pub(super) stages: Vec<(Policy, f64, Vec<StageOutcome>)>,
    /// Of requests and runs, beside those of the shape.
    pub(super) checks: Vec<Check>,
}

/// Reads reports of engines that were `speed` times as fast as real ones.
///
/// # Errors
///
/// Files that are no such reports, by name.
pub(super) fn read(files: &[PathBuf], speed: f64) -> Result<Measured> {
    // Rates are positive, so their bits are in their order.
    let mut found: BTreeMap<(String, u64), Vec<StageOutcome>> = BTreeMap::new();
    let (mut sent, mut unanswered, mut runs, mut doubtful) = (0, 0, 0, Vec::new());
    for file in files {
        let named = || format!("{}: not a report of steady --published", file.display());
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let report: Report = serde_json::from_slice(&text).with_context(named)?;
        for scenario in &report.scenarios {
            let stage = stage(scenario, speed).with_context(named)?;
            let place = (scenario.policy.clone(), stage.rate.to_bits());
            found.entry(place).or_default().push(stage);
            sent += scenario.requests;
            unanswered += scenario.errors + scenario.incomplete;
            runs += 1;
            if !scenario.valid {
                doubtful.push(format!("{} at {}", scenario.policy, stage.rate));
            }
        }
    }
    ensure!(runs > 0, "there is no scenario in these reports");
    let stages = found
        .into_iter()
        .map(|((policy, rate), stages)| {
            let policy: Policy = policy.parse().map_err(anyhow::Error::msg)?;
            Ok((policy, f64::from_bits(rate), stages))
        })
        .collect::<Result<Vec<_>>>()?;
    let checks = vec![
        Check {
            name: "every request of every policy was answered".to_owned(),
            found: format!("all but {unanswered} of {sent}"),
            holds: unanswered == 0,
        },
        Check {
            name: "every stage of every policy passed its own checks".to_owned(),
            found: match doubtful.as_slice() {
                [] => format!("all {runs}"),
                some => format!("all but {} of {runs}: {}", some.len(), some.join(", ")),
            },
            holds: doubtful.is_empty(),
        },
    ];
    Ok(Measured { stages, checks })
}

fn stage(scenario: &Scenario, speed: f64) -> Result<StageOutcome> {
    let level = scenario.level.context("it has one level")?;
    let workload: Workload = scenario.workload.parse().map_err(anyhow::Error::msg)?;
    let seconds = |ms: Option<f64>| ms.unwrap_or_default() / 1e3 * speed;
    let ttft = &scenario.ttft_ms;
    // What was multiplied by the speed is off by a rounding.
    let rate = (level / speed * 1e6).round() / 1e6;
    Ok(StageOutcome {
        rate,
        requests: usize::try_from(scenario.requests)?,
        ttft_p50_s: seconds(ttft.p50),
        ttft_p90_s: seconds(ttft.p90),
        ttft_mean_s: seconds(ttft.mean),
        output_tps: scenario.output_tokens_per_s / workload.scale / speed,
        hit_ratio: scenario.hits.as_ref().map_or(0.0, |hits| hits.hit_ratio),
        seconds: scenario.duration_s * speed,
        ..StageOutcome::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loadgen::report::Percentiles;

    #[test]
    fn reports_are_read_in_published_units() {
        let scenario = Scenario {
            policy: "precise".to_owned(),
            level: Some(30.0 * 1.1),
            workload: "capacity-73:scale=0.1".to_owned(),
            valid: true,
            requests: 10,
            output_tokens_per_s: 1_100.0,
            ttft_ms: Percentiles { p90: Some(1_000.0), ..Percentiles::default() },
            ..Scenario::default()
        };
        let late = Scenario { valid: false, errors: 1, ..scenario.clone() };
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, scenarios: Vec<Scenario>| {
            let path = folder.path().join(name);
            let report = Report { scenarios, ..Report::default() };
            fs::write(&path, serde_json::to_string(&report).unwrap()).unwrap();
            path
        };
        let files = [write("a", vec![scenario.clone()]), write("b", vec![late])];
        let measured = read(&files, 1.1).unwrap();
        let [(Policy::Precise, rate, stages)] = measured.stages.as_slice() else {
            panic!("{measured:?}")
        };
        assert_eq!((*rate, stages.len()), (30.0, 2));
        assert!((stages[0].ttft_p90_s - 1.1).abs() < 1e-9, "{stages:?}");
        assert!((stages[0].output_tps - 10_000.0).abs() < 1e-6, "{stages:?}");
        assert!(measured.checks.iter().all(|check| !check.holds), "{measured:?}");
        let one = Scenario { level: None, ..scenario };
        let error = read(&[write("c", vec![one])], 1.1).unwrap_err();
        assert!(format!("{error:#}").contains("it has one level"), "{error:#}");
        assert!(read(&[write("d", vec![])], 1.0).is_err());
    }
}
