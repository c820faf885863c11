//! What repeats of a scenario say together, and one policy against another.
//!
//! # Model
//!
//! A scenario comes down to named [`quantities`]. Repeats are taken together by their median. Two
//! policies are compared by the ratio of repeats with the same number and seed, which saw the same
//! schedule; the interval is that of the median of these ratios, by bootstrap over the pairs.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, btree_map::Entry},
};

use super::{Comparison, Difference, Percentiles, Report, Scenario, Summary};
use crate::loadgen::stats;

/// The policy that is judged.
const JUDGED: &str = "precise";
/// What a policy may be worse than another by before it counts as lost.
const TOLERANCE: f64 = 0.05;
/// Seed of the bootstrap: equal reports give equal intervals.
const SEED: u64 = 0x6c6f_6164;
/// The quantities in which policies are compared: what a client sees. Cost is not among them, since
/// policies that look at nothing cost nothing.
const COMPARED: [&str; 9] = [
    "throughput_rps",
    "success_share",
    "ttft_ms.p50",
    "ttft_ms.p90",
    "ttft_ms.p95",
    "ttft_ms.p99",
    "itl_ms.p99",
    "goodput.share",
    "hits.hit_ratio",
];

/// What a scenario comes down to, by name. What was not measured is absent.
#[must_use]
pub fn quantities(scenario: &Scenario) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    let mut put = |name: &str, value: Option<f64>| {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            found.insert(name.to_owned(), value);
        }
    };
    let share = (scenario.requests > 0).then(|| scenario.errors as f64 / scenario.requests as f64);
    put("throughput_rps", Some(scenario.throughput_rps));
    put("output_tokens_per_s", Some(scenario.output_tokens_per_s));
    put("errors_share", share);
    put("success_share", share.map(|share| 1.0 - share));
    for (name, of) in [
        ("ttft_ms", &scenario.ttft_ms),
        ("ttft_from_send_ms", &scenario.ttft_from_send_ms),
        ("itl_ms", &scenario.itl_ms),
        ("latency_ms", &scenario.latency_ms),
    ] {
        for (percentile, value) in percentiles(of) {
            put(&format!("{name}.{percentile}"), value);
        }
    }
    put("goodput.share", scenario.goodput.as_ref().map(|goodput| goodput.share));
    if let Some(freshness) = &scenario.freshness_us {
        put("freshness_us.p50", freshness.p50);
        put("freshness_us.p95", freshness.p95);
        put("freshness_us.p99", freshness.p99);
    }
    if let Some(hits) = &scenario.hits {
        put("hits.hit_ratio", Some(hits.hit_ratio));
        put("hits.mean_abs_error_tokens", hits.mean_abs_error_tokens);
    }
    put("bursts.recovery_s.p50", scenario.bursts.as_ref().and_then(|bursts| bursts.recovery_s.p50));
    put("storm.drain_ms.p50", scenario.storm.as_ref().and_then(|storm| storm.drain_ms.p50));
    put("imbalance", scenario.imbalance);
    for (component, cost) in &scenario.resources {
        put(&format!("resources.{component}.cpu_ms_per_request"), cost.cpu_ms_per_request);
        // A process without memory is one that was not seen.
        let memory = (cost.rss_peak_bytes > 0).then_some(cost.rss_peak_bytes as f64);
        put(&format!("resources.{component}.rss_peak_bytes"), memory);
    }
    found
}

fn percentiles(of: &Percentiles) -> [(&'static str, Option<f64>); 4] {
    [("p50", of.p50), ("p90", of.p90), ("p95", of.p95), ("p99", of.p99)]
}

/// Is less of it better?
#[must_use]
pub fn smaller_is_better(quantity: &str) -> bool {
    let larger = [
        "throughput_rps",
        "output_tokens_per_s",
        "success_share",
        "goodput.share",
        "hits.hit_ratio",
    ];
    !larger.contains(&quantity)
}

/// Groups scenarios by name, policy and level, in the order in which they first occur.
#[must_use]
pub fn grouped(report: &Report) -> Vec<Vec<&Scenario>> {
    let mut groups: Vec<Vec<&Scenario>> = Vec::new();
    let mut places: BTreeMap<_, usize> = BTreeMap::new();
    for scenario in &report.scenarios {
        let level = scenario.level.map(f64::to_bits);
        match places.entry((&scenario.name, &scenario.policy, level)) {
            Entry::Occupied(place) => groups[*place.get()].push(scenario),
            Entry::Vacant(place) => {
                place.insert(groups.len());
                groups.push(vec![scenario]);
            }
        }
    }
    groups
}

impl Report {
    /// Fills `summaries` from `scenarios`: one for each name, policy and level.
    pub fn summarise(&mut self) {
        let summaries = grouped(self).into_iter().map(|repeats| {
            let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
            for scenario in &repeats {
                for (name, value) in quantities(scenario) {
                    values.entry(name).or_default().push(value);
                }
            }
            Summary {
                name: repeats[0].name.clone(),
                policy: repeats[0].policy.clone(),
                level: repeats[0].level,
                repeats: repeats.len() as u32,
                quantities: values
                    .into_iter()
                    .filter_map(|(name, values)| Some((name, stats::spread(&values)?)))
                    .collect(),
            }
        });
        self.summaries = summaries.collect();
    }

    /// Fills `comparisons` from `scenarios`: `precise` against every other policy of the same name and
    /// level.
    pub fn compare_policies(&mut self) {
        let groups = grouped(self);
        let mut comparisons = Vec::new();
        for judged in groups.iter().filter(|group| group[0].policy == JUDGED) {
            let same = |other: &&Vec<&Scenario>| {
                other[0].name == judged[0].name
                    && other[0].level == judged[0].level
                    && other[0].policy != JUDGED
            };
            for other in groups.iter().filter(same) {
                comparisons.push(compared(judged, other));
            }
        }
        self.comparisons = comparisons;
    }
}

/// One policy's repeats against another's.
fn compared(judged: &[&Scenario], other: &[&Scenario]) -> Comparison {
    let mut ratios: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for ours in judged {
        let same = |theirs: &&&Scenario| theirs.repeat == ours.repeat && theirs.seed == ours.seed;
        let Some(theirs) = other.iter().find(same) else { continue };
        let (ours, theirs) = (quantities(ours), quantities(theirs));
        for name in COMPARED {
            let pair = ours.get(name).zip(theirs.get(name));
            if let Some(ratio) = pair.and_then(|(ours, theirs)| ratio(*ours, *theirs)) {
                ratios.entry(name).or_default().push(ratio);
            }
        }
    }
    let quantities = ratios
        .into_iter()
        .filter_map(|(name, ratios)| Some((name.to_owned(), difference(name, &ratios)?)))
        .collect();
    Comparison {
        name: judged[0].name.clone(),
        level: judged[0].level,
        policy: judged[0].policy.clone(),
        against: other[0].policy.clone(),
        quantities,
    }
}

/// Two nothings are equal; nothing else can be compared with nothing.
fn ratio(ours: f64, theirs: f64) -> Option<f64> {
    if ours == theirs {
        return Some(1.0);
    }
    Some(ours / theirs).filter(|ratio| ratio.is_finite())
}

/// What the ratios of the pairs say. Where there are too few for an interval, a loss is what the ratio
/// alone says: a loss is not hidden by few repeats.
fn difference(name: &str, ratios: &[f64]) -> Option<Difference> {
    let smaller_is_better = smaller_is_better(name);
    let interval = stats::bootstrap_median(ratios, SEED);
    let ratio = stats::median(ratios)?;
    let worse = |value: f64, than: f64| {
        value.partial_cmp(&than)
            == Some(if smaller_is_better { Ordering::Greater } else { Ordering::Less })
    };
    let limit = if smaller_is_better { 1.0 + TOLERANCE } else { 1.0 - TOLERANCE };
    let apart = interval.is_none_or(|ends| ends.iter().all(|end| worse(*end, 1.0)));
    Some(Difference { ratio, interval, smaller_is_better, lost: worse(ratio, limit) && apart })
}
