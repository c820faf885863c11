//! What a scrape shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use super::*;
use crate::{
    epp::{
        datalayer::{EndpointInfo, EndpointName, Metrics},
        ext_proc::Usage,
    },
    support::metrics::encode,
};

const ONE_OF_EACH: ScrapeFaults = ScrapeFaults { polls: 1, extracts: 1 };

const LABELS: RequestLabels<'static> =
    RequestLabels { model: "m", target: "t", fairness: "f", priority: 2 };

fn metrics(options: MetricsOptions) -> (Registry, EppMetrics) {
    let registry = Registry::new();
    let metrics = EppMetrics::register(&registry, options).unwrap();
    (registry, metrics)
}

#[track_caller]
fn check(registry: &Registry, lines: &[&str]) {
    let text = encode(registry).unwrap();
    for line in lines {
        assert!(text.lines().any(|known| known == *line), "{line} is not in\n{text}");
    }
}

#[track_caller]
fn check_absent(registry: &Registry, parts: &[&str]) {
    let text = encode(registry).unwrap();
    for part in parts {
        assert!(!text.contains(part), "{part} is in\n{text}");
    }
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn outcome() -> Outcome {
    Outcome {
        duration: millis(2100),
        ttft: Some(millis(100)),
        streaming: true,
        usage: Usage { prompt: 1000, completion: 21, total: 1021, cached: Some(512) },
        response_bytes: 32_778,
    }
}

#[test]
fn a_request_is_counted_once_under_both_names() {
    let (registry, metrics) = metrics(MetricsOptions::default());
    let row = metrics.request(&LABELS);
    let running = row.routed(2048);
    check(
        &registry,
        &[
            r#"llm_d_epp_request_total{fairness_id="f",model_name="m",priority="2",target_model_name="t"} 1"#,
            r#"inference_objective_request_total{model_name="m",priority="2",target_model_name="t"} 1"#,
            r#"llm_d_epp_request_running{fairness_id="f",model_name="m",priority="2",target_model_name="t"} 1"#,
            r#"inference_objective_running_requests{model_name="m"} 1"#,
            r#"llm_d_epp_request_size_bytes_bucket{fairness_id="f",model_name="m",priority="2",target_model_name="t",le="2048"} 1"#,
            r#"llm_d_epp_request_size_bytes_bucket{fairness_id="f",model_name="m",priority="2",target_model_name="t",le="1024"} 0"#,
            r#"inference_objective_request_sizes_bucket{model_name="m",target_model_name="t",le="2048"} 1"#,
            "# HELP llm_d_epp_request_total [ALPHA] Total number of processed requests.",
            "# HELP inference_objective_request_total [ALPHA] [Deprecated: Use llm_d_epp_request_total] Counter of inference objective requests broken out for each model and target model.",
            "# TYPE inference_objective_request_total counter",
            "# TYPE llm_d_epp_request_size_bytes histogram",
            "# TYPE inference_objective_running_requests gauge",
        ],
    );
    check_absent(&registry, &["request_duration_seconds{", "request_error_total{"]);
    row.finished(&outcome());
    row.inter_token(millis(15));
    drop(running);
    let of_row = r#"{fairness_id="f",model_name="m",priority="2",target_model_name="t"}"#;
    let of_models = r#"{model_name="m",target_model_name="t"}"#;
    let lines: Vec<String> = [
        ("llm_d_epp_request_running", of_row, "0"),
        ("inference_objective_running_requests", r#"{model_name="m"}"#, "0"),
        ("llm_d_epp_request_duration_seconds_sum", of_row, "2.1"),
        ("inference_objective_request_duration_seconds_sum", of_models, "2.1"),
        ("llm_d_epp_response_size_bytes_sum", of_row, "32778"),
        ("inference_objective_response_sizes_count", of_models, "1"),
        ("llm_d_epp_request_input_tokens_sum", of_row, "1000"),
        ("inference_objective_input_tokens_sum", of_models, "1000"),
        ("llm_d_epp_request_output_tokens_sum", of_row, "21"),
        ("inference_objective_output_tokens_sum", of_models, "21"),
        ("llm_d_epp_request_cached_tokens_sum", of_row, "512"),
        ("inference_objective_prompt_cached_tokens_sum", of_models, "512"),
        ("llm_d_epp_request_ntpot_seconds_sum", of_row, "0.1"),
        (
            "inference_objective_normalized_time_per_output_token_seconds_sum",
            of_models,
            "0.1",
        ),
        (
            "llm_d_epp_request_ttft_seconds_sum",
            r#"{fairness_id="f",model_name="m",priority="2",streaming="true",target_model_name="t"}"#,
            "0.1",
        ),
        ("llm_d_epp_request_streaming_tpot_seconds_sum", of_row, "0.1"),
        ("llm_d_epp_request_streaming_itl_seconds_sum", of_row, "0.015"),
    ]
    .map(|(name, labels, value)| format!("{name}{labels} {value}"))
    .to_vec();
    check(&registry, &lines.iter().map(String::as_str).collect::<Vec<_>>());
    check_absent(&registry, &[r#"streaming="false""#]);
}

#[test]
fn old_families_are_sums_over_the_labels_that_they_lack() {
    let (registry, metrics) = metrics(MetricsOptions::default());
    for (fairness, priority, bytes) in [("a", 0, 100), ("b", 0, 200), ("b", -1, 5000)] {
        let row = metrics.request(&RequestLabels { fairness, priority, ..LABELS });
        let _running = row.routed(bytes);
        row.refused(RefusalCode::ResourceExhausted);
        row.finished(&Outcome { streaming: false, ..outcome() });
    }
    metrics.request(&LABELS).failed(ErrorCode::ModelServer);
    check(
        &registry,
        &[
            r#"inference_objective_request_total{model_name="m",priority="0",target_model_name="t"} 2"#,
            r#"inference_objective_request_total{model_name="m",priority="-1",target_model_name="t"} 1"#,
            r#"inference_objective_request_sizes_sum{model_name="m",target_model_name="t"} 5300"#,
            r#"inference_objective_request_sizes_bucket{model_name="m",target_model_name="t",le="256"} 2"#,
            r#"inference_objective_request_sizes_bucket{model_name="m",target_model_name="t",le="+Inf"} 3"#,
            r#"inference_objective_request_error_total{error_code="ResourceExhausted",model_name="m",target_model_name="t"} 3"#,
            r#"inference_objective_request_error_total{error_code="ModelServerError",model_name="m",target_model_name="t"} 1"#,
            r#"llm_d_epp_request_error_total{error_code="ResourceExhausted",fairness_id="b",model_name="m",priority="-1",target_model_name="t"} 1"#,
            r#"llm_d_epp_request_ttft_seconds_count{fairness_id="a",model_name="m",priority="0",streaming="false",target_model_name="t"} 1"#,
        ],
    );
    // A time for each token is only known of streams.
    check_absent(&registry, &["streaming_tpot_seconds_count{", r#"streaming="true""#]);
}

#[test]
fn old_names_can_be_switched_off() {
    let options = MetricsOptions { old_names: false, ..MetricsOptions::default() };
    let (registry, metrics) = metrics(options);
    let row = metrics.request(&LABELS);
    let _running = row.routed(1);
    row.finished(&outcome());
    metrics.scheduled(millis(1));
    metrics.plugin_timer(ExtensionPoint::Scorer, "queue-scorer", "q").observe(millis(1));
    metrics.watch_scraper("metrics-data-source", "core-metrics-extractor", || ONE_OF_EACH);
    metrics.watch("pool", &Arc::new(Endpoints::new()));
    check_absent(&registry, &["inference_", "Deprecated"]);
}

#[test]
fn what_was_not_reported_is_not_counted() {
    let (registry, metrics) = metrics(MetricsOptions::default());
    let row = metrics.request(&RequestLabels { model: "", target: "", ..LABELS });
    let _running = row.routed(10);
    row.finished(&Outcome { duration: millis(5), ..Outcome::default() });
    check(
        &registry,
        &[
            r#"llm_d_epp_request_total{fairness_id="f",model_name="",priority="2",target_model_name=""} 1"#,
        ],
    );
    check_absent(
        &registry,
        &["request_running{", "running_requests{", "tokens", "ntpot", "ttft", "tpot", "normalized"],
    );
}

#[test]
fn what_clients_choose_is_bounded_and_quoted() {
    let options = MetricsOptions { label_values: 3, rows: 6, ..MetricsOptions::default() };
    let (registry, metrics) = metrics(options);
    let odd = "a\"b\\c\nd";
    let _running = metrics.request(&RequestLabels { model: odd, target: odd, ..LABELS }).routed(1);
    let long = "x".repeat(201);
    let _long = metrics.request(&RequestLabels { model: &long, target: odd, ..LABELS }).routed(1);
    for number in 0..100 {
        let model = format!("model-{number}");
        let labels = RequestLabels { model: &model, target: &model, ..LABELS };
        let row = metrics.request(&labels);
        _ = row.routed(1);
        assert!(Arc::ptr_eq(&row, &metrics.request(&labels)), "{model} has one row");
        _ = metrics.request(&RequestLabels { fairness: &model, ..LABELS }).routed(1);
    }
    check(
        &registry,
        &[
            r#"inference_objective_running_requests{model_name="a\"b\\c\nd"} 1"#,
            r#"inference_objective_running_requests{model_name="other"} 1"#,
            r#"inference_objective_running_requests{model_name="model-0"} 0"#,
            r#"llm_d_epp_request_total{fairness_id="f",model_name="other",priority="2",target_model_name="other"} 99"#,
            // No room for another row.
            r#"llm_d_epp_request_total{fairness_id="other",model_name="other",priority="0",target_model_name="other"} 98"#,
        ],
    );
    check_absent(&registry, &["model-2", "xxx"]);
    let text = encode(&registry).unwrap();
    let total: u64 = text
        .lines()
        .filter(|line| line.starts_with("llm_d_epp_request_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert_eq!(total, 202, "nothing is lost");
}

#[test]
fn rows_may_be_made_by_many_threads() {
    let (_registry, metrics) = metrics(MetricsOptions::default());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for number in 0..200 {
                    let model = format!("model-{}", number % 50);
                    _ = metrics.request(&RequestLabels { model: &model, ..LABELS }).routed(1);
                }
            });
        }
    });
    let rows = metrics.state.requests.rows();
    assert_eq!(rows.len(), 50);
    for number in 0..50 {
        let model = format!("model-{number}");
        let row = metrics.request(&RequestLabels { model: &model, ..LABELS });
        assert!(rows.iter().any(|known| Arc::ptr_eq(known, &row)));
    }
}

fn info(namespace: &str, name: &str, port: u16) -> EndpointInfo {
    let address = SocketAddr::from(([10, 0, 0, 1], port));
    let name = EndpointName { namespace: namespace.to_owned(), name: name.to_owned() };
    EndpointInfo { name, address, metrics_address: address, labels: BTreeMap::new() }
}

#[test]
fn the_pool_is_averaged_over_endpoints_with_fresh_metrics() {
    let (registry, metrics) = metrics(MetricsOptions::default());
    let endpoints = Arc::new(Endpoints::new());
    metrics.watch("pool", &endpoints);
    check(
        &registry,
        &[
            r#"llm_d_epp_ready_endpoints{name="pool"} 0"#,
            r#"inference_pool_ready_pods{name="pool"} 0"#,
        ],
    );
    check_absent(&registry, &["average", "std_dev"]);
    for (name, port) in [("a", 1), ("b", 2), ("c", 3), ("d", 4)] {
        endpoints.upsert(info("ns", name, port));
    }
    endpoints.upsert(info("other", "a", 5));
    let now = Instant::now();
    let long_ago = now.checked_sub(Duration::from_secs(5));
    let reported = [(1, 0.1, now), (2, 0.35, now), (6, 0.7, now), (99, 1.0, now)];
    for (endpoint, (waiting, kv_usage, updated)) in endpoints.list().iter().zip(reported) {
        let stale = waiting == 99;
        let updated = if stale { long_ago } else { Some(updated) };
        endpoint.set_metrics(Metrics {
            waiting,
            running: 2 * waiting,
            kv_usage,
            updated,
            prefix_queries: 100 * (waiting % 2),
            prefix_hits: 40 * (waiting % 2),
            ..Metrics::default()
        });
    }
    check(
        &registry,
        &[
            r#"epp_engine_prefix_cache_queries_tokens_total{endpoint="ns/a"} 100"#,
            r#"epp_engine_prefix_cache_hits_tokens_total{endpoint="ns/a"} 40"#,
        ],
    );
    check_absent(&registry, &[r#"epp_engine_prefix_cache_hits_tokens_total{endpoint="ns/b"}"#]);
    check(
        &registry,
        &[
            r#"llm_d_epp_ready_endpoints{name="pool"} 3"#,
            r#"llm_d_epp_average_queue_size{name="pool"} 3"#,
            r#"inference_pool_average_queue_size{name="pool"} 3"#,
            r#"llm_d_epp_average_running_requests{name="pool"} 6"#,
            r#"llm_d_epp_average_kv_cache_utilization{name="pool"} 0.38"#,
            r#"inference_pool_average_kv_cache_utilization{name="pool"} 0.38"#,
            r#"llm_d_epp_std_dev_queue_size{name="pool"} 2.65"#,
            r#"llm_d_epp_std_dev_running_requests{name="pool"} 5.29"#,
            r#"llm_d_epp_std_dev_kv_cache_utilization{name="pool"} 0.3"#,
            r#"llm_d_epp_per_endpoint_queue_size{model_server_endpoint="b",name="pool"} 2"#,
            r#"inference_pool_per_pod_queue_size{model_server_pod="d",name="pool"} 99"#,
            r#"inference_pool_per_pod_queue_size{model_server_pod="other/a",name="pool"} 0"#,
        ],
    );
    // The one that never reported has no age.
    let text = encode(&registry).unwrap();
    let ages: Vec<&str> =
        text.lines().filter(|line| line.starts_with("epp_scrape_age_seconds{")).collect();
    assert_eq!(ages.len(), 4, "{ages:?}");
    assert!(ages[3].starts_with("epp_scrape_age_seconds{endpoint=\"ns/d\"} 5."), "{ages:?}");
}

#[test]
fn picks_are_counted_by_endpoint_and_go_with_it() {
    let (registry, metrics) = metrics(MetricsOptions::default());
    let endpoints = Arc::new(Endpoints::new());
    endpoints.upsert(info("ns", "a", 8000));
    metrics.watch("pool", &endpoints);
    endpoints.upsert(info("ns", "b", 8001));
    let list = endpoints.list();
    let row = metrics.request(&LABELS);
    for at in [0, 1, 1] {
        metrics.picked(&row, &list[at]);
    }
    metrics.not_picked(&row);
    let other = metrics.request(&RequestLabels { fairness: "g", target: "u", ..LABELS });
    metrics.picked(&other, &list[1]);
    check(
        &registry,
        &[
            r#"epp_picks_total{endpoint="ns/a"} 1"#,
            r#"epp_picks_total{endpoint="ns/b"} 3"#,
            r#"llm_d_epp_scheduler_attempts_total{endpoint_name="b",namespace="ns",port="8001",status="success",target_model_name="t"} 2"#,
            r#"llm_d_epp_scheduler_attempts_total{endpoint_name="b",namespace="ns",port="8001",status="success",target_model_name="u"} 1"#,
            r#"inference_extension_scheduler_attempts_total{namespace="ns",pod_name="a",port="8000",status="success",target_model_name="t"} 1"#,
            r#"llm_d_epp_scheduler_attempts_total{endpoint_name="",namespace="",port="",status="failure",target_model_name="t"} 1"#,
            r#"inference_extension_scheduler_attempts_total{namespace="",pod_name="",port="",status="failure",target_model_name="t"} 1"#,
        ],
    );
    endpoints.remove(&list[1].info().name);
    metrics.picked(&row, &list[1]);
    check(&registry, &[r#"epp_picks_total{endpoint="ns/a"} 1"#]);
    check_absent(&registry, &["ns/b", "8001"]);
}

#[test]
fn our_own_times_and_errors_have_both_names() {
    let options = MetricsOptions { streams: true, ..MetricsOptions::default() };
    let (registry, metrics) = metrics(options);
    metrics.scheduled(Duration::from_micros(150));
    metrics.request_processed(millis(3));
    metrics.response_processed(millis(4));
    let timer = metrics.plugin_timer(ExtensionPoint::Filter, "decode-filter", "d");
    assert_eq!(timer.time(|| 7), 7);
    metrics.plugin_timer(ExtensionPoint::Filter, "decode-filter", "d").observe(millis(1));
    metrics.watch_scraper("metrics-data-source", "core-metrics-extractor", || ONE_OF_EACH);
    metrics.immediate_response(RefusalCode::ServiceUnavailable);
    metrics.fallback_pick();
    metrics.reloads().failed.inc();
    metrics.connections().accepted.inc();
    let open = metrics.stream();
    let mut ended = metrics.stream();
    ended.set_code(tonic::Code::Ok);
    drop(ended);
    drop(metrics.stream());
    check(
        &registry,
        &[
            r#"llm_d_epp_scheduler_e2e_duration_seconds_bucket{le="0.0002"} 1"#,
            r#"inference_extension_scheduler_e2e_duration_seconds_bucket{le="0.0001"} 0"#,
            "llm_d_epp_request_processing_duration_seconds_sum 0.003",
            "llm_d_epp_response_processing_duration_seconds_sum 0.004",
            r#"llm_d_epp_plugin_duration_seconds_count{extension_point="Filter",plugin_name="d",plugin_type="decode-filter"} 2"#,
            r#"inference_extension_plugin_duration_seconds_count{extension_point="Filter",plugin_name="d",plugin_type="decode-filter"} 2"#,
            r#"llm_d_epp_datalayer_poll_errors_total{source_type="metrics-data-source"} 1"#,
            r#"llm_d_inference_scheduler_datalayer_poll_errors_total{source_type="metrics-data-source"} 1"#,
            r#"llm_d_epp_datalayer_extract_errors_total{extractor_type="core-metrics-extractor",source_type="metrics-data-source"} 1"#,
            r#"epp_immediate_responses_total{code="503"} 1"#,
            "epp_fallback_picks_total 1",
            r#"epp_certificate_reloads_total{outcome="failed"} 1"#,
            "epp_connections_total 1",
            "epp_open_streams 1",
            "llm_d_epp_extproc_streams_inflight 1",
            "llm_d_epp_extproc_stream_duration_seconds_count 2",
            r#"llm_d_epp_extproc_streams_total{code="OK"} 1"#,
            r#"llm_d_epp_extproc_streams_total{code="Canceled"} 1"#,
            "# HELP epp_open_streams HTTP exchanges in progress.",
        ],
    );
    drop(open);
    check(&registry, &["epp_open_streams 0"]);
    let text = encode(&registry).unwrap();
    let info = format!(
        "llm_d_epp_info{{build_ref=\"{}\",commit=\"unknown\"}} 1",
        env!("CARGO_PKG_VERSION")
    );
    assert!(text.contains(&info), "{text}");
}

#[test]
fn families_are_declared_as_they_are_reported() {
    for (old_names, streams) in [(true, true), (false, false)] {
        let options = MetricsOptions { old_names, streams, ..MetricsOptions::default() };
        let declared: BTreeSet<&str> =
            families(&options).iter().map(|family| family.name).collect();
        let (registry, metrics) = metrics(options);
        let endpoints = Arc::new(Endpoints::new());
        endpoints.upsert(info("ns", "a", 1));
        let endpoint = Arc::clone(&endpoints.list()[0]);
        let updated = Some(Instant::now());
        endpoint.set_metrics(Metrics { updated, prefix_queries: 1, ..Metrics::default() });
        metrics.watch("pool", &endpoints);
        let row = metrics.request(&LABELS);
        _ = row.routed(1);
        row.finished(&outcome());
        row.inter_token(millis(1));
        row.refused(RefusalCode::NotFound);
        metrics.picked(&row, &endpoint);
        metrics.scheduled(millis(1));
        metrics.request_processed(millis(1));
        metrics.response_processed(millis(1));
        metrics.plugin_timer(ExtensionPoint::Scorer, "s", "s").observe(millis(1));
        metrics.watch_scraper("s", "e", || ONE_OF_EACH);
        drop(metrics.stream());
        let gathered = registry.gather();
        let reported: BTreeSet<&str> = gathered
            .iter()
            .map(prometheus::proto::MetricFamily::name)
            .filter(|name| {
                let apart = ["epp_connections", "epp_fallback", "epp_certificate", "epp_immediate"];
                !apart.iter().any(|prefix| name.starts_with(prefix))
            })
            .collect();
        assert_eq!(reported, declared);
        for family in &gathered {
            let labels: BTreeSet<Vec<&str>> = family
                .get_metric()
                .iter()
                .map(|metric| metric.get_label().iter().map(|label| label.value()).collect())
                .collect();
            assert_eq!(labels.len(), family.get_metric().len(), "twice in {}", family.name());
            for metric in family.get_metric() {
                let names: Vec<&str> = metric.get_label().iter().map(|l| l.name()).collect();
                assert!(names.is_sorted(), "{names:?} of {}", family.name());
            }
        }
    }
}

#[test]
fn every_refusal_has_its_error_code() {
    let (registry, metrics) = metrics(MetricsOptions::default());
    let row = metrics.request(&LABELS);
    for code in RefusalCode::ALL {
        row.refused(code);
    }
    row.failed(ErrorCode::ModelServer);
    row.failed(ErrorCode::Unknown);
    let names = RefusalCode::ALL.iter().map(|code| code.as_str());
    for name in names.chain(["ModelServerError", "Unknown"]) {
        let line = format!(
            r#"inference_objective_request_error_total{{error_code="{name}",model_name="m",target_model_name="t"}} 1"#
        );
        check(&registry, &[&line]);
    }
}
