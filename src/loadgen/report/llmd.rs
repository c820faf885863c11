//! llm-d's Benchmark Report v0.2.1, so that its dashboards can show a run.
//!
//! What that report has no place for (freshness, hits, bursts, storms, goodput, our own checks) is under
//! `results.observability.metadata`, where keys of one's own are allowed.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{LoopKind, Percentiles, Report, Scenario};

/// The version that is written.
const VERSION: &str = "0.2.1";
const MIB: f64 = (1 << 20) as f64;

/// One document for each scenario, in order. The begin of each is that of the run and the durations
/// before it, since scenarios run one after the other.
#[must_use]
pub fn documents(report: &Report) -> Vec<Value> {
    let mut begin = Duration::from_nanos(report.started_unix_ns);
    report
        .scenarios
        .iter()
        .enumerate()
        .map(|(stage, scenario)| {
            let document = document(report, scenario, stage, begin);
            begin += Duration::try_from_secs_f64(scenario.duration_s).unwrap_or_default();
            document
        })
        .collect()
}

fn document(report: &Report, scenario: &Scenario, stage: usize, begin: Duration) -> Value {
    let length = Duration::try_from_secs_f64(scenario.duration_s).unwrap_or_default();
    let level = scenario.level.map(|level| format!(" at {level}")).unwrap_or_default();
    without_null(json!({
        "version": VERSION,
        "run": {
            "uid": format!("loadgen-{}-{stage}", report.started_unix_ns),
            "eid": format!("loadgen-{}", report.started_unix_ns),
            "time": {
                "start": timestamp(begin),
                "end": timestamp(begin + length),
                "duration": format!("PT{}S", length.as_secs_f64()),
            },
            "description": format!(
                "{} / {}{level}, repeat {}", scenario.name, scenario.policy, scenario.repeat
            ),
            "keywords": [scenario.name, scenario.policy],
        },
        "scenario": { "stack": stack(report, scenario), "load": load(report, scenario, stage) },
        "results": {
            "request_performance": {
                "aggregate": aggregate(scenario),
                "time_series": time_series(scenario, begin),
            },
            "observability": observability(scenario),
        },
    }))
}

/// What a component is called there: the endpoint picker has a name of its own.
fn label(component: &str) -> &str {
    if component == "epp" { "epp-0" } else { component }
}

fn stack(report: &Report, scenario: &Scenario) -> Vec<Value> {
    let component = |name: &String| {
        json!({
            "metadata": { "label": label(name), "cfg_id": name },
            "standardized": {
                "kind": "generic", "tool": name, "tool_version": report.environment.version,
            },
            "native": {},
        })
    };
    scenario.resources.keys().map(component).collect()
}

fn load(report: &Report, scenario: &Scenario, stage: usize) -> Value {
    let concurrency = scenario.in_flight.asked.filter(|asked| *asked > 0);
    json!({
        "metadata": { "description": scenario.workload },
        "standardized": {
            "tool": "loadgen",
            "tool_version": report.environment.version,
            "source": "random",
            "stage": stage,
            "input_seq_len": {
                "distribution": "other",
                "value": by_request(scenario, scenario.prompt_tokens_per_s),
            },
            "output_seq_len": {
                "distribution": "other",
                "value": by_request(scenario, scenario.output_tokens_per_s),
            },
            "rate_qps": scenario.asked_rps.filter(|rate| *rate > 0.0),
            "concurrency": concurrency.filter(|_| scenario.pacing == LoopKind::Closed),
        },
        "native": {
            "config": { "run": report.config, "policy": scenario.policy, "seed": scenario.seed },
        },
    })
}

/// Mean of what comes at `per_s`, by request.
fn by_request(scenario: &Scenario, per_s: f64) -> f64 {
    if scenario.throughput_rps > 0.0 { per_s / scenario.throughput_rps } else { 0.0 }
}

fn aggregate(scenario: &Scenario) -> Value {
    let mean = |mean: f64, units: &str| json!({ "units": units, "mean": mean });
    json!({
        "requests": {
            "total": scenario.requests,
            "failures": scenario.errors,
            "incomplete": scenario.incomplete,
            "input_length": mean(by_request(scenario, scenario.prompt_tokens_per_s), "count"),
            "output_length": mean(by_request(scenario, scenario.output_tokens_per_s), "count"),
        },
        "latency": {
            "time_to_first_token": statistics(&scenario.ttft_ms, "ms"),
            "time_per_output_token": statistics(&scenario.tpot_ms, "ms/token"),
            "inter_token_latency": statistics(&scenario.itl_ms, "ms/token"),
            "request_latency": statistics(&scenario.latency_ms, "ms"),
        },
        "throughput": {
            "request_rate": mean(scenario.throughput_rps, "queries/s"),
            "input_token_rate": mean(scenario.prompt_tokens_per_s, "tokens/s"),
            "output_token_rate": mean(scenario.output_tokens_per_s, "tokens/s"),
            "total_token_rate":
                mean(scenario.prompt_tokens_per_s + scenario.output_tokens_per_s, "tokens/s"),
        },
    })
}

/// A distribution; nothing without a mean, which is obligatory there.
fn statistics(of: &Percentiles, units: &str) -> Value {
    let Some(mean) = of.mean else { return Value::Null };
    json!({
        "units": units, "mean": mean, "stddev": of.stddev, "min": of.min, "p50": of.p50,
        "p90": of.p90, "p95": of.p95, "p99": of.p99, "p99p9": of.p999, "max": of.max,
    })
}

fn time_series(scenario: &Scenario, begin: Duration) -> Value {
    let at = |s: f64| timestamp(begin + Duration::try_from_secs_f64(s).unwrap_or_default());
    let slices = || scenario.timeline.iter().filter(|slice| slice.span_s > 0.0);
    let latency: Vec<Value> = slices()
        .filter(|slice| slice.ttft_p50_ms.is_some())
        .map(|slice| {
            json!({ "ts": at(slice.at_s), "p50": slice.ttft_p50_ms, "p95": slice.ttft_p95_ms })
        })
        .collect();
    let rate: Vec<Value> = slices()
        .map(|slice| json!({ "ts": at(slice.at_s), "mean": slice.complete as f64 / slice.span_s }))
        .collect();
    json!({
        "latency": { "time_to_first_token": { "units": "ms", "series": latency } },
        "throughput": { "request_rate": { "units": "queries/s", "series": rate } },
    })
}

fn observability(scenario: &Scenario) -> Value {
    let components: Vec<Value> = scenario
        .resources
        .iter()
        .map(|(name, cost)| {
            let slices = || scenario.timeline.iter();
            let cores = slices().filter_map(|slice| slice.cores.get(name)).copied();
            let memory: Vec<f64> = slices()
                .filter_map(|slice| slice.rss_bytes.get(name))
                .map(|bytes| *bytes as f64 / MIB)
                .collect();
            let peak = cost.rss_peak_bytes as f64 / MIB;
            let mean = if memory.is_empty() {
                peak
            } else {
                memory.iter().sum::<f64>() / memory.len() as f64
            };
            json!({
                "component_label": label(name),
                "aggregate": {
                    "cpu_utilization": {
                        "units": "percent",
                        "mean": cost.cores * 100.0,
                        "max": cores.reduce(f64::max).map(|cores| cores * 100.0),
                    },
                    "cpu_memory_usage": { "units": "MiB", "mean": mean, "max": peak },
                },
            })
        })
        .collect();
    let share = |part: u64, of: u64| part as f64 / of.max(1) as f64 * 100.0;
    let pods = |value: &dyn Fn(&super::PodShare) -> Value| -> Value {
        let pods = scenario.pods.iter();
        pods.map(|(pod, of)| json!({ "component_id": pod, "pod": pod, "statistics": value(of) }))
            .collect()
    };
    let mut found = json!({
        "components": components,
        "drop_rate": { "units": "percent", "mean": share(scenario.errors, scenario.requests) },
        "metadata": {
            "valid": scenario.valid,
            "warnings": scenario.warnings,
            "gateway": scenario.gateway,
            "ttft_from_send_ms": scenario.ttft_from_send_ms,
            "freshness_us": scenario.freshness_us,
            "hits": scenario.hits,
            "bursts": scenario.bursts,
            "storm": scenario.storm,
            "goodput": scenario.goodput,
            "resources": scenario.resources,
        },
    });
    if let Some(picks) = &scenario.pick_ms
        && let Some(mean) = picks.mean
    {
        let seconds = |ms: Option<f64>| ms.map(|ms| ms / 1e3);
        found["epp_dispatch_latency"] = json!({ "statistics": {
            "units": "seconds", "mean": mean / 1e3, "stddev": seconds(picks.stddev),
            "p50": seconds(picks.p50), "p99": seconds(picks.p99),
        }});
    }
    if !scenario.pods.is_empty() {
        found["epp_request_distribution"] = json!({
            "components": pods(&|of| json!({ "units": "count", "count": of.requests })),
        });
        found["vllm_prefix_cache_hit_rate"] = json!({ "components": pods(&|of| {
            json!({ "units": "percent", "mean": share(of.cached_tokens, of.prompt_tokens) })
        })});
    }
    found
}

/// Leaves out what is null: most fields there may be absent but not null.
fn without_null(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(
                kept.map(|(name, value)| (name, without_null(value))).collect::<Map<_, _>>(),
            )
        }
        Value::Array(entries) => entries.into_iter().map(without_null).collect(),
        other => other,
    }
}

/// ISO 8601 in UTC, to the millisecond, of a time since the Unix epoch.
fn timestamp(since: Duration) -> String {
    let (days, of_day) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days from 1 March of year 0; a year then ends with its leap day, an era has 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(seconds: u64, text: &str) {
        assert_eq!(timestamp(Duration::from_secs(seconds)), text);
    }

    #[test]
    fn timestamps_are_dates() {
        check(0, "1970-01-01T00:00:00.000Z");
        check(951_782_399, "2000-02-28T23:59:59.000Z");
        check(951_782_400, "2000-02-29T00:00:00.000Z");
        check(1_709_251_200, "2024-03-01T00:00:00.000Z");
        check(4_107_542_400, "2100-03-01T00:00:00.000Z");
        check(1_798_761_599, "2026-12-31T23:59:59.000Z");
    }
}
