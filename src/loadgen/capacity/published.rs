//! Published tables: llm-d-kv-cache, `benchmarking/73-capacity` and `benchmarking/37-capacity`, written by
//! inference-perf with its `shared_prefix` data. Each is one run without intervals.
//!
//! What has to be known to read them: the policies' weights differ, so that precise against approximate is
//! not a comparison of the prefix scores alone; a stage lasts until its last answer, and throughput is
//! over that time.

use std::{fmt, str::FromStr};

use crate::loadgen::stack::policy::Policy;

/// Parameters per GPU of the first table's fleet, billions.
const FIRST_PER_GPU: f64 = 32.8 / 2.0;

/// Requests at one rate.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Stage {
    /// Requests per second, on average.
    pub rate: f64,
    /// For how long they are sent, seconds.
    pub seconds: f64,
}

/// A published table and some of its stages.
#[derive(Clone, Debug)]
pub struct Stages {
    /// The table.
    pub study: &'static Study,
    /// At least one, in the order of the table.
    pub stages: Vec<Stage>,
}

impl FromStr for Stages {
    type Err = String;

    /// `73`, `37`, or either with rates of its stages: `73:3,15,60`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rates) = text.split_once(':').map_or((text, None), |(a, b)| (a, Some(b)));
        let study = [&STUDY_73, &STUDY_37].into_iter().find(|study| study.name == name);
        let study = study.ok_or_else(|| format!("{name:?} is no published table: 73 or 37"))?;
        let Some(rates) = rates else { return Ok(Self { study, stages: study.stages.to_vec() }) };
        let stage = |rate: &str| {
            let found = study.stages.iter().find(|it| rate.trim().parse() == Ok(it.rate));
            found.copied().ok_or_else(|| {
                let there: Vec<_> = study.stages.iter().map(|it| it.rate.to_string()).collect();
                format!("{rate:?} is the rate of no stage of it: {}", there.join(", "))
            })
        };
        Ok(Self { study, stages: rates.split(',').map(stage).collect::<Result<_, _>>()? })
    }
}

/// What the scorers count in a policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// Share of the prompt that is expected in the pod's cache.
    pub prefix: f64,
    /// Requests that wait there.
    pub queue: f64,
    /// Share of its cache in use.
    pub usage: f64,
}

/// A row of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Who decided.
    pub policy: Policy,
    /// The stage; `None` = the whole run.
    pub rate: Option<u32>,
    /// 90th percentile of the time to first token, seconds.
    pub ttft_p90_s: f64,
    /// Its mean, seconds.
    pub ttft_mean_s: Option<f64>,
    /// Output tokens per second.
    pub output_tps: Option<f64>,
}

/// A published measurement.
#[derive(Clone, Debug)]
pub struct Study {
    /// `73` or `37`: how much of the fleet's cache the prompts need, per cent.
    pub name: &'static str,
    /// Where it is from.
    pub source: &'static str,
    /// Engines.
    pub pods: usize,
    /// Cache of each, tokens.
    pub kv_tokens: u32,
    /// Parameters per GPU, billions.
    pub per_gpu: f64,
    /// Groups with a system prompt in common.
    pub groups: u32,
    /// Prompts of each.
    pub prompts: u32,
    /// Tokens of a system prompt.
    pub system: u32,
    /// Tokens of a question.
    pub question: u32,
    /// Tokens of an answer.
    pub output: u32,
    /// Are arrivals irregular (Poisson), or even?
    pub poisson: bool,
    /// Before the first stage.
    pub warm_up: Stage,
    /// The stages, in order.
    pub stages: &'static [Stage],
    /// Between stages, seconds.
    pub gap_s: f64,
    /// Weights of `approximate`.
    pub approximate: Weights,
    /// What it says.
    pub rows: &'static [Row],
}

/// Weights of `precise`.
pub const PRECISE: Weights = Weights { prefix: 3.0, queue: 2.0, usage: 2.0 };
/// Weights of `least-load`.
pub const LOAD: Weights = Weights { prefix: 0.0, queue: 1.0, usage: 1.0 };

impl Study {
    /// How many times as many parameters a GPU has as in the study that the constants are from.
    #[must_use]
    pub fn factor(&self) -> f64 {
        self.per_gpu / FIRST_PER_GPU
    }

    /// The row of a policy at a rate, or of the whole run.
    #[must_use]
    pub fn row(&self, policy: &Policy, rate: Option<f64>) -> Option<&Row> {
        self.rows.iter().find(|row| row.policy == *policy && row.rate.map(f64::from) == rate)
    }
}

impl fmt::Display for Study {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, pods, kv_tokens, groups, prompts, .. } = self;
        let Self { system, question, output, .. } = self;
        write!(
            f,
            "{name} %: {pods} pods with {kv_tokens} tokens of cache each; {groups} groups x {prompts} \
             prompts, {system} + {question} tokens, {output} out"
        )
    }
}

const fn stage(rate: f64, seconds: f64) -> Stage {
    Stage { rate, seconds }
}

const fn overall(policy: Policy, output_tps: f64, ttft_p90_s: f64, ttft_mean_s: f64) -> Row {
    Row {
        policy,
        rate: None,
        ttft_p90_s,
        ttft_mean_s: Some(ttft_mean_s),
        output_tps: Some(output_tps),
    }
}
const fn at(policy: Policy, rate: u32, ttft_p90_s: f64, output_tps: Option<f64>) -> Row {
    Row { policy, rate: Some(rate), ttft_p90_s, ttft_mean_s: None, output_tps }
}
use Policy::{Approximate, LeastLoad, Precise, Random};

/// The 73 % table: Qwen3-32B on 8 pods with two H100 each.
pub static STUDY_73: Study = Study {
    name: "73",
    source: "llm-d-kv-cache benchmarking/73-capacity",
    pods: 8,
    kv_tokens: 307_328,
    per_gpu: FIRST_PER_GPU,
    groups: 150,
    prompts: 5,
    system: 6_000,
    question: 1_200,
    output: 1_000,
    poisson: true,
    warm_up: stage(15.0, 50.0),
    stages: &[
        stage(3.0, 20.0),
        stage(10.0, 20.0),
        stage(15.0, 20.0),
        stage(20.0, 38.0),
        stage(22.0, 34.0),
        stage(25.0, 30.0),
        stage(30.0, 25.0),
        stage(35.0, 21.0),
        stage(40.0, 38.0),
        stage(43.0, 36.0),
        stage(46.0, 33.0),
        stage(49.0, 30.0),
        stage(52.0, 29.0),
        stage(55.0, 27.0),
        stage(57.0, 26.0),
        stage(60.0, 25.0),
    ],
    gap_s: 30.0,
    approximate: Weights { prefix: 1.0, queue: 1.0, usage: 1.0 },
    rows: &[
        overall(Approximate, 6944.4, 31.083, 13.316),
        overall(LeastLoad, 4266.4, 94.865, 46.987),
        overall(Precise, 8730.0, 0.542, 0.298),
        overall(Random, 4428.7, 92.551, 45.281),
        at(Precise, 3, 0.5, Some(1219.0)),
        at(Approximate, 3, 0.5, Some(1311.0)),
        at(Random, 3, 0.82, Some(1314.0)),
        at(LeastLoad, 3, 1.61, Some(1275.0)),
        at(Precise, 10, 0.6, Some(3902.0)),
        at(Approximate, 10, 0.5, Some(3842.0)),
        at(Random, 10, 1.4, Some(3569.0)),
        at(LeastLoad, 10, 4.12, Some(3607.0)),
        at(Precise, 15, 0.4, Some(5761.0)),
        at(Approximate, 15, 0.4, Some(5153.0)),
        at(Random, 15, 2.3, Some(3791.0)),
        at(LeastLoad, 15, 7.0, Some(3348.0)),
        at(Precise, 20, 0.6, Some(9185.0)),
        at(Approximate, 20, 0.6, Some(8083.0)),
        at(Random, 20, 70.3, Some(4933.0)),
        at(LeastLoad, 20, 77.7, Some(4903.0)),
        at(Precise, 22, 0.5, None),
        at(Approximate, 22, 0.7, None),
        at(Random, 22, 78.4, None),
        at(LeastLoad, 22, 73.0, None),
        at(Precise, 25, 0.58, None),
        at(Approximate, 25, 0.61, None),
        at(Random, 25, 82.9, None),
        at(LeastLoad, 25, 86.0, None),
        at(Precise, 30, 0.51, Some(9222.0)),
        at(Approximate, 30, 0.71, Some(8436.0)),
        at(Random, 30, 86.2, Some(4636.0)),
        at(LeastLoad, 30, 83.8, Some(4889.0)),
        at(Precise, 35, 0.5, Some(9781.0)),
        at(Approximate, 35, 2.46, Some(7444.0)),
        at(Random, 35, 91.5, Some(4333.0)),
        at(LeastLoad, 35, 88.1, Some(4661.0)),
        at(Precise, 40, 0.49, Some(10271.0)),
        at(Approximate, 40, 43.0, Some(8046.0)),
        at(Random, 40, 101.3, Some(4774.0)),
        at(LeastLoad, 40, 100.9, Some(4946.0)),
        at(Precise, 43, 0.5, None),
        at(Approximate, 43, 43.5, None),
        at(Random, 43, 101.1, None),
        at(LeastLoad, 43, 101.5, None),
        at(Precise, 46, 0.59, None),
        at(Approximate, 46, 44.9, None),
        at(Random, 46, 101.3, None),
        at(LeastLoad, 46, 105.9, None),
        at(Precise, 49, 0.6, None),
        at(Approximate, 49, 46.3, None),
        at(Random, 49, 103.5, None),
        at(LeastLoad, 49, 105.0, None),
        at(Precise, 52, 0.51, None),
        at(Approximate, 52, 47.3, None),
        at(Random, 52, 105.0, None),
        at(LeastLoad, 52, 108.6, None),
        at(Precise, 55, 0.6, None),
        at(Approximate, 55, 50.1, None),
        at(Random, 55, 104.3, None),
        at(LeastLoad, 55, 110.7, None),
        at(Precise, 57, 0.6, None),
        at(Approximate, 57, 49.9, None),
        at(Random, 57, 106.8, None),
        at(LeastLoad, 57, 113.3, None),
        at(Precise, 60, 0.5, Some(10497.0)),
        at(Approximate, 60, 50.2, Some(7248.0)),
        at(Random, 60, 106.0, Some(4835.0)),
        at(LeastLoad, 60, 110.2, Some(4745.0)),
    ],
};

/// The 37 % table: Llama-3.1-70B on 4 pods with four H100 each. Of its stages only the last one is known
/// by policy. The published weights of its approximate policy, 1/1/2, are taken for queue, cache use and
/// prefix.
pub static STUDY_37: Study = Study {
    name: "37",
    source: "llm-d-kv-cache benchmarking/37-capacity",
    pods: 4,
    kv_tokens: 461_376,
    per_gpu: 70.6 / 4.0,
    groups: 83,
    prompts: 3,
    system: 8_000,
    question: 1_000,
    output: 1_000,
    poisson: false,
    warm_up: stage(9.0, 30.0),
    stages: &[
        stage(3.0, 210.0),
        stage(4.0, 180.0),
        stage(5.0, 120.0),
        stage(6.0, 120.0),
        stage(8.0, 90.0),
        stage(10.0, 70.0),
        stage(12.0, 60.0),
        stage(15.0, 50.0),
        stage(20.0, 50.0),
    ],
    gap_s: 30.0,
    approximate: Weights { prefix: 2.0, queue: 1.0, usage: 1.0 },
    rows: &[
        overall(Precise, 5650.0, 0.275, 0.193),
        overall(Approximate, 5096.2, 7.536, 1.549),
        overall(LeastLoad, 3018.3, 78.303, 41.058),
        overall(Random, 2895.4, 84.623, 42.011),
        at(Precise, 20, 0.29, Some(9295.0)),
        at(Approximate, 20, 43.6, Some(6748.0)),
        at(LeastLoad, 20, 173.5, Some(3206.0)),
        at(Random, 20, 177.0, Some(3099.0)),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_named_by_table_and_rate() {
        #[track_caller]
        fn check(text: &str, want: Result<(&str, &[f64]), &str>) {
            match (text.parse::<Stages>(), want) {
                (Ok(got), Ok((name, rates))) => {
                    assert_eq!(got.study.name, name);
                    let found: Vec<f64> = got.stages.iter().map(|stage| stage.rate).collect();
                    assert_eq!(found, rates);
                }
                (Err(got), Err(part)) => assert!(got.contains(part), "{got}"),
                (got, want) => panic!("{text}: {got:?}, not {want:?}"),
            }
        }
        check("37", Ok(("37", &[3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0])));
        check("73:60, 3", Ok(("73", &[60.0, 3.0])));
        check("73:61", Err("\"61\" is the rate of no stage of it: 3, 10, 15"));
        check("73:", Err("no stage"));
        check("74:3", Err("no published table"));
    }
}
