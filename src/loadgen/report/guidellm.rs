//! The shape of GuideLLM's `benchmarks.json`, report schema 2 of GuideLLM 0.8, so that tools and
//! notebooks made for it can read a run: one benchmark for each scenario.
//!
//! What differs in meaning: `time_to_first_token_ms` is from the **send**, as there; `request_latency` is
//! in seconds, as there, and from the intended arrival, as is `request_scheduled_latency`. Percentiles
//! that our report does not hold repeat the next lower one that it holds. Only the mean is known of
//! rates and lengths, which then stands for all of their percentiles. Single requests are not listed.

use serde_json::{Value, json};

use super::{LoopKind, Percentiles, Report, Scenario};

/// Version of the report schema that is written.
const VERSION: u32 = 2;

/// The document.
#[must_use]
pub fn document(report: &Report) -> Value {
    let mut begin = report.started_unix_ns as f64 / 1e9;
    let benchmarks: Vec<Value> = report
        .scenarios
        .iter()
        .enumerate()
        .map(|(index, scenario)| {
            let benchmark = benchmark(report, scenario, index, begin);
            begin += scenario.duration_s;
            benchmark
        })
        .collect();
    let first = report.scenarios.first();
    json!({
        "metadata": {
            "version": VERSION,
            "guidellm_version": format!("loadgen {}", report.environment.version),
            "python_version": "",
            "platform": report.environment.kernel,
        },
        "config": {
            "metadata": { "labels": { "tool": "loadgen", "schema": report.schema } },
            "spec": {
                "backend": backend(),
                "profile": first.map_or(Value::Null, profile),
                "constraints": [],
                "data": [first.map_or(Value::Null, data)],
            },
            "benchmarks": [],
        },
        "benchmarks": benchmarks,
        "conclusions": [],
    })
}

fn backend() -> Value {
    json!({ "kind": "openai_http", "target": "http://127.0.0.1", "model": "loadgen" })
}

/// Closed loops are streams; open ones with a rate are constant, since a schedule of our own has no
/// name there.
fn profile(of: &Scenario) -> Value {
    match of.pacing {
        LoopKind::Closed => json!({ "kind": "concurrent", "streams": [streams(of)] }),
        LoopKind::Open => json!({ "kind": "constant", "rate": [rate(of)] }),
    }
}

fn strategy(of: &Scenario) -> Value {
    match of.pacing {
        LoopKind::Closed => json!({
            "type_": "concurrent", "worker_count": 1, "max_concurrency": streams(of),
            "streams": streams(of), "rampup_duration": 0.0,
        }),
        LoopKind::Open => json!({
            "type_": "constant", "worker_count": 1, "max_concurrency": null, "rate": rate(of),
            "rampup_duration": 0.0,
        }),
    }
}

fn streams(of: &Scenario) -> u64 {
    of.in_flight.asked.unwrap_or(1).max(1)
}

/// A rate of 0 is refused there.
fn rate(of: &Scenario) -> f64 {
    of.asked_rps.unwrap_or(of.sent_rps).max(f64::MIN_POSITIVE)
}

fn data(of: &Scenario) -> Value {
    json!({
        "kind": "synthetic_text",
        "prompt_tokens": (by_request(of, of.prompt_tokens_per_s).round() as u64).max(1),
        "output_tokens": (by_request(of, of.output_tokens_per_s).round() as u64).max(1),
    })
}

fn by_request(of: &Scenario, per_s: f64) -> f64 {
    if of.throughput_rps > 0.0 { per_s / of.throughput_rps } else { 0.0 }
}

fn benchmark(report: &Report, of: &Scenario, index: usize, begin: f64) -> Value {
    let end = begin + of.duration_s;
    let phase = json!({ "percent": null, "value": null, "mode": "prefer_duration" });
    let totals = json!({
        "successful": complete(of), "errored": of.errors, "incomplete": of.incomplete,
        "total": of.requests,
    });
    let run = format!("loadgen-{}", report.started_unix_ns);
    json!({
        "type_": "generative_benchmark",
        "config": {
            "id_": format!("{run}-{index}"),
            "run_id": run,
            "run_index": index,
            "strategy": strategy(of),
            "constraints": {},
            "sample_size": 0,
            "warmup": phase,
            "cooldown": phase,
            "prefer_response_metrics": true,
            "profile": profile(of),
            "requests": { "workload": of.workload, "seed": of.seed },
            "backend": backend(),
            "environment": {
                "scenario": of.name, "policy": of.policy, "repeat": of.repeat, "valid": of.valid,
            },
        },
        "scheduler_state": {
            "node_id": 0, "num_processes": 1, "start_time": begin, "end_time": end,
            "created_requests": of.requests, "processed_requests": of.requests,
            "successful_requests": complete(of), "errored_requests": of.errors,
            "cancelled_requests": of.incomplete,
        },
        "scheduler_metrics": scheduler_metrics(of, begin, end, &totals),
        "metrics": metrics(of, &totals),
        "requests": { "successful": [], "errored": [], "incomplete": [], "total": null },
        "warnings": [],
        "start_time": begin,
        "end_time": end,
        "duration": of.duration_s,
        "warmup_duration": 0.0,
        "cooldown_duration": 0.0,
    })
}

fn complete(of: &Scenario) -> u64 {
    of.requests.saturating_sub(of.errors + of.incomplete)
}

fn scheduler_metrics(of: &Scenario, begin: f64, end: f64, totals: &Value) -> Value {
    let seconds = |ms: Option<f64>| ms.unwrap_or(0.0) / 1e3;
    let delay = seconds(of.dispatch_delay_ms.mean);
    json!({
        "start_time": begin, "request_start_time": begin, "measure_start_time": begin,
        "measure_end_time": end, "request_end_time": end, "end_time": end,
        "requests_made": totals,
        "generation_delay": summary(&of.dispatch_delay_ms, 1e-3),
        "queued_time_avg": delay,
        "resolve_start_delay_avg": 0.0,
        "resolve_targeted_start_delay_avg": delay,
        "request_start_delay_avg": 0.0,
        "request_targeted_start_delay_avg": delay,
        "request_time_avg": seconds(of.latency_ms.mean),
        "resolve_end_delay_avg": 0.0,
        "resolve_time_avg": seconds(of.latency_ms.mean),
        "finalized_delay_avg": 0.0,
        "processed_delay_avg": 0.0,
        "dataset_incomplete": false,
        "strategy_type": match of.pacing {
            LoopKind::Closed => "concurrent",
            LoopKind::Open => "constant",
        },
    })
}

fn metrics(of: &Scenario, totals: &Value) -> Value {
    let n = complete(of);
    let zero = || statuses(&fixed(0.0, 0));
    let mean = |value: f64| statuses(&fixed(value, n));
    let (prompt, output) =
        (by_request(of, of.prompt_tokens_per_s), by_request(of, of.output_tokens_per_s));
    let open = of.pacing == LoopKind::Open;
    let planned = |of: &Percentiles| if open { statuses(&summary(of, 1e-3)) } else { Value::Null };
    json!({
        "request_totals": totals,
        "requests_per_second": mean(of.throughput_rps),
        "request_concurrency": mean(of.in_flight.mean),
        "request_latency": statuses(&summary(&of.latency_ms, 1e-3)),
        "request_dispatch_delay": planned(&of.dispatch_delay_ms),
        "request_scheduled_latency": planned(&of.latency_ms),
        "request_streaming_iterations_count": mean(output),
        "prompt_token_count": mean(prompt),
        "output_token_count": mean(output),
        "total_token_count": mean(prompt + output),
        "time_to_first_token_ms": statuses(&summary(&of.ttft_from_send_ms, 1.0)),
        "time_to_first_output_token_ms": statuses(&summary(&of.ttft_from_send_ms, 1.0)),
        "time_per_output_token_ms": statuses(&summary(&of.tpot_ms, 1.0)),
        "inter_token_latency_ms": statuses(&summary(&of.itl_ms, 1.0)),
        "time_to_last_round_trip_ms": zero(),
        "avg_round_trip_time_ms": zero(),
        "prompt_tokens_per_second": mean(of.prompt_tokens_per_s),
        "output_tokens_per_second": mean(of.output_tokens_per_s),
        "tokens_per_second": mean(of.prompt_tokens_per_s + of.output_tokens_per_s),
        "output_tokens_per_iteration": zero(),
        "iter_tokens_per_iteration": zero(),
        "text": {}, "image": {}, "video": {}, "audio": {}, "tool_call": {},
    })
}

/// Our distributions are of what was successful, and stand for the total.
fn statuses(summary: &Value) -> Value {
    json!({
        "successful": summary, "errored": fixed(0.0, 0), "incomplete": fixed(0.0, 0),
        "total": summary,
    })
}

/// A distribution of which only one value is known.
fn fixed(value: f64, n: u64) -> Value {
    let known = Some(value);
    let of = Percentiles { n, mean: known, min: known, max: known, ..Percentiles::default() };
    summary(&of, 1.0)
}

/// A distribution, times `scale`.
fn summary(of: &Percentiles, scale: f64) -> Value {
    let min = of.min.or(of.p50).unwrap_or(0.0);
    // Each percentile that is not known is at least the one before.
    let p50 = of.p50.unwrap_or(min);
    let p90 = of.p90.unwrap_or(p50);
    let p95 = of.p95.unwrap_or(p90);
    let p99 = of.p99.unwrap_or(p95);
    let p999 = of.p999.unwrap_or(p99);
    let max = of.max.unwrap_or(p999);
    let mean = of.mean.unwrap_or(p50);
    let deviation = of.stddev.unwrap_or(0.0) * scale;
    let [low, p50, p90, p95, p99, p999] =
        [min, p50, p90, p95, p99, p999].map(|value| value * scale);
    json!({
        "mean": mean * scale, "median": p50, "mode": p50,
        "variance": deviation * deviation, "std_dev": deviation,
        "min": low, "max": max * scale, "count": of.n,
        "total_sum": mean * scale * of.n as f64,
        "percentiles": {
            "p001": low, "p01": low, "p05": low, "p10": low, "p25": low, "p50": p50, "p75": p50,
            "p90": p90, "p95": p95, "p99": p99, "p999": p999,
        },
        "pdf": null,
    })
}
