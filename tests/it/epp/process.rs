//! The program: command line, TLS, health, shutdown, pages, logs, and input that makes no sense.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use bytes::Bytes;
use kv_indexer::{
    loadgen::engine::MetricsFault,
    proto::{
        ext_proc::ProcessingRequest,
        health::{
            HealthCheckRequest, HealthListRequest, health_check_response::ServingStatus,
            health_client::HealthClient,
        },
    },
};
use prost::Message as _;
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::Code;

use super::{
    path::Pods,
    proxy::{
        self, Said, Talk, body, headers, response_body, response_headers, response_trailers,
        trailers,
    },
    raw,
    rig::Epp,
};
use crate::support::{eventually, http_get, yaml_file};

const BY_QUEUE: &str = "
plugins:
- type: queue-scorer
- type: max-score-picker
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: queue-scorer
  - pluginRef: max-score-picker
";

const BODY: &str = r#"{"model":"m","prompt":"hello"}"#;
const NAMES: [&str; 4] =
    ["", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"];
/// Nobody listens there.
const NOWHERE: &str = "--endpoint=pod=127.0.0.1:1";

/// With a thread of its own, so that idle connections are looked after, too.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn request() -> Vec<ProcessingRequest> {
    vec![headers(&[("x-request-id", "the-request")], false), body(BODY, true)]
}

/// Waits until no exchange is open.
fn all_closed(epp: &Epp) {
    eventually("no stream is open", || match epp.metric("epp_open_streams", "") {
        0.0 => Ok(()),
        open => Err(format!("{open} open")),
    });
}

fn replies(runtime: &Runtime, to: SocketAddr, messages: Vec<ProcessingRequest>) -> Vec<Said> {
    runtime.block_on(async {
        let client = proxy::connect(to).await;
        let replies = proxy::replies(&client, messages).await.unwrap();
        replies.into_iter().map(proxy::said).collect()
    })
}

// TLS.

async fn routes_over_tls(to: SocketAddr) -> Vec<u8> {
    let (mut client, certificate) = raw::over_tls(to).await;
    let answer = client.process(tokio_stream::iter(request())).await.unwrap();
    let reply = answer.into_inner().message().await.unwrap().unwrap();
    assert!(matches!(proxy::said(reply), Said::Headers(..)));
    certificate.to_vec()
}

#[test]
fn tls_is_the_default() {
    // The rig's flag is the only one that turns it off.
    let epp = Epp::start(BY_QUEUE, &["--secure-serving", NOWHERE]);
    let runtime = runtime();
    let certificate = runtime.block_on(routes_over_tls(epp.grpc));
    assert!(certificate.windows(9).any(|part| part == b"localhost"));
    // Plaintext gets nowhere, and does no harm.
    let mut plain = TcpStream::connect(epp.grpc).unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    eventually("the handshake failed", || match epp.metric("epp_connections_failed_total", "") {
        1.0 => Ok(()),
        count => Err(format!("{count}")),
    });
    assert_eq!(runtime.block_on(routes_over_tls(epp.grpc)), certificate);
    // Health is never encrypted.
    assert_eq!(check(&runtime, epp.health, "readiness"), Ok(ServingStatus::Serving));
    epp.program.finish();
    let defaults = run(&["--help"]).1;
    assert!(defaults.contains("--secure-serving") && defaults.contains("[default: true]"));
}

fn write_certificate(folder: &Path) -> Vec<u8> {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let write = |name: &str, text: String| {
        let new = folder.join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, folder.join(name)).unwrap();
    };
    write("tls.key", pair.signing_key.serialize_pem());
    write("tls.crt", pair.cert.pem());
    pair.cert.der().to_vec()
}

#[test]
fn certificates_are_reloaded() {
    let folder = tempfile::tempdir().unwrap();
    let first = write_certificate(folder.path());
    let path = format!("--cert-path={}", folder.path().display());
    let epp = Epp::start(BY_QUEUE, &["--secure-serving", &path, "--enable-cert-reload", NOWHERE]);
    let runtime = runtime();
    assert_eq!(runtime.block_on(routes_over_tls(epp.grpc)), first);
    let (mut old, _) = runtime.block_on(raw::over_tls(epp.grpc));
    let second = write_certificate(folder.path());
    eventually("the new certificate is served", || {
        let served = runtime.block_on(routes_over_tls(epp.grpc));
        if served == second { Ok(()) } else { Err("still the old one".to_owned()) }
    });
    // Connections go on.
    let answer = runtime.block_on(old.process(tokio_stream::iter(request())));
    assert!(runtime.block_on(answer.unwrap().into_inner().message()).unwrap().is_some());
    // What is no certificate changes nothing.
    fs::write(folder.path().join("tls.crt"), "nonsense").unwrap();
    let reloads = |outcome: &str| epp.metric("epp_certificate_reloads_total", outcome);
    eventually("the bad file is noticed", || match reloads(r#"outcome="failed""#) {
        0.0 => Err("not yet".to_owned()),
        _ => Ok(()),
    });
    assert!(reloads(r#"outcome="loaded""#) >= 1.0);
    assert_eq!(runtime.block_on(routes_over_tls(epp.grpc)), second);
    epp.program.finish();
}

#[test]
fn a_certificate_that_is_not_there_ends_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = format!("--cert-path={}", folder.path().display());
    let config = yaml_file(BY_QUEUE);
    let file = config.path().to_str().unwrap();
    let ports = ["--bind-address=127.0.0.1", "--grpc-port=0", "--grpc-health-port=0"];
    let mut line = vec!["--config-file", file, "--metrics-port=0", NOWHERE, &path];
    line.extend(ports);
    let (status, _, err) = run(&line);
    assert_eq!(status, 1, "{err}");
    assert!(err.contains("--cert-path") && err.contains("tls.crt"), "{err}");
}

// Health.

fn check(runtime: &Runtime, at: SocketAddr, service: &str) -> Result<ServingStatus, Code> {
    runtime.block_on(async {
        let connected = HealthClient::connect(format!("http://{at}")).await;
        let mut client = connected.map_err(|_| Code::Unavailable)?;
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = client.check(request).await.map_err(|status| status.code())?;
        Ok(answer.into_inner().status())
    })
}

#[test]
fn health_is_told() {
    let runtime = runtime();
    let epp = Epp::start(BY_QUEUE, &[NOWHERE]);
    for port in [epp.health, epp.grpc] {
        for name in NAMES {
            eventually("it is serving", || match check(&runtime, port, name) {
                Ok(ServingStatus::Serving) => Ok(()),
                other => Err(format!("{name:?}: {other:?}")),
            });
        }
    }
    let listed = runtime.block_on(async {
        let mut client = HealthClient::connect(format!("http://{}", epp.health)).await.unwrap();
        client.list(HealthListRequest {}).await.unwrap().into_inner().statuses
    });
    assert_eq!(listed.len(), NAMES.len());
    assert!(NAMES.iter().all(|name| listed[*name].status() == ServingStatus::Serving));
    epp.program.finish();

    let epp = Epp::start(BY_QUEUE, &[NOWHERE, "--health-checking=false"]);
    assert_eq!(check(&runtime, epp.grpc, "readiness"), Err(Code::Unimplemented));
    assert!(check(&runtime, epp.health, "readiness").is_ok());
    epp.program.finish();
}

#[test]
fn open_exchanges_end_before_the_program_does() {
    let runtime = runtime();
    let epp = Epp::start(BY_QUEUE, &[NOWHERE]);
    eventually("it is ready", || match http_get(epp.metrics, "/readyz") {
        Ok((200, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let mut talk = runtime.block_on(async {
        let client = proxy::connect(epp.grpc).await;
        let mut talk = Talk::begin(&client).await;
        for message in request() {
            talk.send(message).await;
        }
        assert!(matches!(talk.reply().await, Said::Headers(..)));
        assert!(matches!(talk.reply().await, Said::Body(_, true)));
        talk
    });
    let ended = Command::new("kill").args(["-TERM", &epp.program.id().to_string()]).status();
    assert!(ended.unwrap().success());
    eventually("it is not ready", || match http_get(epp.metrics, "/readyz") {
        Ok((503, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    for port in [epp.health, epp.grpc] {
        let status = check(&runtime, port, "readiness");
        assert_ne!(status, Ok(ServingStatus::Serving), "{port}");
    }
    // The rest of the exchange, in its own time.
    std::thread::sleep(Duration::from_millis(300));
    runtime.block_on(async {
        talk.send(response_headers(
            &[(":status", "200"), ("content-type", "text/event-stream")],
            false,
        ))
        .await;
        assert!(matches!(talk.reply().await, Said::ResponseHeaders(_)));
        talk.send(response_body("data: [DONE]\n\n", true)).await;
        let last = talk.reply().await;
        assert_eq!(last, Said::ResponseBody(Bytes::from_static(b"data: [DONE]\n\n"), true));
        talk.finish().await;
    });
    let (status, log) = epp.program.wait();
    assert!(status.success(), "{status}: {log}");
}

// Command line and configuration.

/// Runs the program to its end.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_epp")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn configurations_can_be_checked() {
    #[track_caller]
    fn check(config: &str, flags: &[&str], status: i32, words: &[&str]) {
        let file = yaml_file(config);
        let path = file.path().to_str().unwrap();
        // With and without --check a fault is the same; a good one would run.
        let ways: &[&[&str]] = if status == 0 { &[&["--check"]] } else { &[&["--check"], &[]] };
        for way in ways {
            let line = [&["--config-file", path], *way, flags].concat();
            let (code, out, err) = run(&line);
            assert_eq!(code, status, "{line:?}: {out}{err}");
            let said = if status == 0 { out } else { err };
            for word in words {
                assert!(said.contains(word), "{word:?} is not in {said}");
            }
        }
    }
    check(BY_QUEUE, &[NOWHERE], 0, &["configuration is valid"]);
    check("", &[NOWHERE], 0, &["configuration is valid"]);
    check("", &[], 64, &["endpoints come from nowhere", "--endpoint"]);
    let unknown_field = "plugins: [{type: load-aware-scorer, parameters: {treshold: 1}}]";
    check(unknown_field, &[], 64, &["1 fault", "load-aware-scorer", "treshold", "threshold"]);
    check("plugins: [{type: kv-cache-scorrer}]", &[], 64, &["kv-cache-scorrer", "not registered"]);
    check("plugins: {", &[], 64, &["failed to decode configuration JSON/YAML"]);
    check("unknownField: 1", &[], 64, &["unknownField"]);
    // All faults at once, flags included.
    let two = "plugins: [{type: load-aware-scorer, parameters: {threshold: many}}, {type: none}]";
    let flags = ["--endpoint=nonsense"];
    check(two, &flags, 64, &["3 faults", "--endpoint", "threshold", "'none'"]);
}

#[test]
fn command_lines_are_checked() {
    #[track_caller]
    fn check(line: &[&str], status: i32, word: &str) {
        let (code, out, err) = run(line);
        assert_eq!(code, status, "{line:?}: {out}{err}");
        let said = if status == 0 { out } else { err };
        assert!(said.contains(word), "{line:?}: {word:?} is not in {said}");
    }
    check(&["--help"], 0, "--config-file");
    check(&["--version"], 0, "epp ");
    check(&["--no-such-flag"], 64, "--no-such-flag");
    check(&["--grpc-port=99999"], 64, "--grpc-port");
    check(&["--config-file=/no/such/file"], 64, "/no/such/file");
    check(&["--debug-listen=0.0.0.0:0"], 64, "loopback");
    check(&["--config-file=a", "--config-text=b"], 64, "cannot be set at the same time");
}

#[test]
fn a_port_that_is_taken_ends_the_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let line = ["--bind-address=127.0.0.1", "--grpc-port", &port, NOWHERE];
    let (status, _, err) = run(&line);
    assert_eq!(status, 1, "{err}");
    assert!(err.contains("--grpc-port") && err.contains(&port), "{err}");
}

#[test]
fn endpoints_that_cannot_be_read_end_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let endpoints = folder.path().join("endpoints.yaml");
    let config = format!(
        "plugins: [{{type: file-discovery, parameters: {{path: {}}}}}, {{type: random-picker}}]\n\
         dataLayer: {{discovery: {{pluginRef: file-discovery}}}}\n\
         schedulingProfiles: [{{name: default, plugins: [{{pluginRef: random-picker}}]}}]\n",
        endpoints.display()
    );
    let config = yaml_file(&config);
    let file = config.path().to_str().unwrap();
    for text in [None, Some("endpoints: nonsense")] {
        if let Some(text) = text {
            fs::write(&endpoints, text).unwrap();
        }
        let ports = ["--bind-address=127.0.0.1", "--grpc-port=0", "--grpc-health-port=0"];
        let line = [&["--config-file", file, "--metrics-port=0"][..], &ports].concat();
        let (status, _, err) = run(&line);
        assert_eq!(status, 1, "{text:?}: {err}");
        assert!(err.contains("endpoints.yaml"), "{text:?}: {err}");
    }
}

// Pages.

#[test]
fn pages_for_operators() {
    let mut epp = Epp::start(
        BY_QUEUE,
        &["--debug-listen=127.0.0.1:0", "--endpoint=pod=127.0.0.1:1,llm-d.ai/role=decode"],
    );
    let debug = epp.program.announced("debug listening on ");
    let page = |path: &str| http_get(debug, path).unwrap();
    let json = |path: &str| -> Value {
        let (status, text) = page(path);
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).unwrap()
    };
    let endpoints = eventually("the endpoint is known", || {
        let endpoints = json("/debug/endpoints")["endpoints"].clone();
        if endpoints[0].is_object() { Ok(endpoints) } else { Err(endpoints.to_string()) }
    });
    assert_eq!(endpoints[0]["name"], "default/pod");
    assert_eq!(endpoints[0]["address"], "127.0.0.1:1");
    assert_eq!(endpoints[0]["labels"]["llm-d.ai/role"], "decode");
    assert_eq!(endpoints[0]["metrics"]["stale"], true);
    let config = json("/debug/config");
    assert_eq!(config["profiles"][0]["scorers"][0]["name"], "queue-scorer", "{config}");
    assert_eq!(config["profiles"][0]["picker"], "max-score-picker");
    let (status, text) = page("/debug/pprof/heap");
    assert_eq!(status, 404);
    assert!(text.contains("perf"), "{text}");
    // Not for everybody.
    assert_eq!(http_get(epp.metrics, "/debug/endpoints").unwrap().0, 404);
    assert_eq!(http_get(epp.metrics, "/livez").unwrap().0, 200);
    epp.program.finish();
}

#[test]
fn ends_of_streams_and_errors_without_a_model_are_counted() {
    let pods = Pods::start(1);
    let flags = pods.flags();
    let epp = Epp::start(BY_QUEUE, &[&flags[0], "--enable-grpc-stream-metrics"]);
    let runtime = runtime();
    // An answer of ours, after which the stream is ours to end.
    replies(&runtime, epp.grpc, vec![headers(&[], false), body("nonsense", true)]);
    let models = || headers(&[(":path", "/v1/models"), (":method", "GET")], true);
    for status in ["500", "200"] {
        replies(&runtime, epp.grpc, vec![models(), response_headers(&[(":status", status)], true)]);
    }
    eventually("all is counted", || {
        let counted = [
            epp.metric("llm_d_epp_extproc_streams_total", r#"code="OK""#) == 3.0,
            epp.metric("llm_d_epp_request_error_total", r#"error_code="ModelServerError""#) == 1.0,
            epp.metric("llm_d_epp_request_duration_seconds_count", "") == 1.0,
        ];
        if counted == [true; 3] { Ok(()) } else { Err(format!("{counted:?}\n{}", epp.scrape())) }
    });
    epp.program.finish();
}

#[test]
fn metrics_have_their_old_and_new_names() {
    let pods = Pods::start(1);
    let flags = pods.flags();
    let epp =
        Epp::start(BY_QUEUE, &[&flags[0], "--enable-grpc-stream-metrics", "--pool-name=the-pool"]);
    let runtime = runtime();
    let answer = r#"{"usage":{"prompt_tokens":1,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}"#;
    let mut messages = request();
    messages.push(response_headers(&[(":status", "200")], false));
    messages.push(response_body(answer, true));
    replies(&runtime, epp.grpc, messages);
    replies(&runtime, epp.grpc, vec![headers(&[], false), body("nonsense", true)]);
    let page = eventually("the pod is scraped", || {
        let page = epp.scrape();
        if page.contains("epp_scrape_age_seconds{") { Ok(page) } else { Err(page) }
    });
    for name in ["llm_d_epp_ready_endpoints", "inference_pool_ready_pods"] {
        assert_eq!(epp.metric(name, r#"name="the-pool""#), 1.0, "{name}");
    }
    let types: Vec<&str> = page.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    for name in [
        // With the names that they replace.
        "llm_d_epp_request_total inference_objective_request_total",
        "llm_d_epp_request_error_total inference_objective_request_error_total",
        "llm_d_epp_request_duration_seconds inference_objective_request_duration_seconds",
        "llm_d_epp_request_size_bytes inference_objective_request_sizes",
        "llm_d_epp_response_size_bytes inference_objective_response_sizes",
        "llm_d_epp_request_input_tokens inference_objective_input_tokens",
        "llm_d_epp_request_output_tokens inference_objective_output_tokens",
        "llm_d_epp_request_cached_tokens inference_objective_prompt_cached_tokens",
        "llm_d_epp_request_running inference_objective_running_requests",
        "llm_d_epp_request_ntpot_seconds inference_objective_normalized_time_per_output_token_seconds",
        "llm_d_epp_average_kv_cache_utilization inference_pool_average_kv_cache_utilization",
        "llm_d_epp_average_queue_size inference_pool_average_queue_size",
        "llm_d_epp_average_running_requests inference_pool_average_running_requests",
        "llm_d_epp_ready_endpoints inference_pool_ready_pods",
        "llm_d_epp_per_endpoint_queue_size inference_pool_per_pod_queue_size",
        "llm_d_epp_scheduler_e2e_duration_seconds inference_extension_scheduler_e2e_duration_seconds",
        "llm_d_epp_scheduler_attempts_total inference_extension_scheduler_attempts_total",
        "llm_d_epp_plugin_duration_seconds inference_extension_plugin_duration_seconds",
        "llm_d_epp_info inference_extension_info",
        "llm_d_epp_datalayer_poll_errors_total llm_d_inference_scheduler_datalayer_poll_errors_total",
        "llm_d_epp_datalayer_extract_errors_total llm_d_inference_scheduler_datalayer_extract_errors_total",
        // New ones alone.
        "llm_d_epp_request_ttft_seconds",
        "llm_d_epp_std_dev_kv_cache_utilization",
        "llm_d_epp_std_dev_queue_size",
        "llm_d_epp_std_dev_running_requests",
        "llm_d_epp_request_processing_duration_seconds",
        "llm_d_epp_response_processing_duration_seconds",
        "llm_d_epp_extproc_streams_inflight",
        "llm_d_epp_extproc_stream_duration_seconds",
        "llm_d_epp_extproc_streams_total",
        // Ours.
        "epp_build_info",
        "epp_open_streams",
        "epp_immediate_responses_total",
        "epp_fallback_picks_total",
        "epp_connections",
        "epp_picks_total",
        "epp_scrape_age_seconds",
        "process_cpu_seconds_total",
    ]
    .into_iter()
    .flat_map(|names| names.split(' '))
    {
        assert!(page.contains(&format!("# TYPE {name} ")), "{name} is not in {types:#?}");
        let help = page.lines().find(|line| line.starts_with(&format!("# HELP {name} "))).unwrap();
        if name.starts_with("inference_") {
            assert!(help.contains("[Deprecated: Use llm_d_epp_"), "{help}");
        }
    }
    epp.program.finish();
    pods.stop();
}

// Logs.

#[test]
fn logs_name_the_request_and_never_tell_the_prompt() {
    const MARKER: &str = "zanzibar";
    let pods = Pods::start(1);
    let mut flags = pods.flags();
    flags.extend(
        ["-v=5", "--grpc-max-recv-msg-size=64Ki", "--emit-endpoint-scores"].map(str::to_owned),
    );
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let epp = Epp::start(BY_QUEUE, &flags);
    let runtime = runtime();
    let bodies = [
        format!(r#"{{"model":"m","prompt":"{MARKER}"}}"#),
        format!(r#"{{"model":"m","prompt":"{MARKER}""#),
        format!(r#"{{"prompt":"{MARKER}"}}"#),
        format!(r#"{{"model":"m","prompt":{{"{MARKER}":1}}}}"#),
        format!(r#"{{"model":7,"prompt":"{MARKER}"}}"#),
        format!(r#"{{"model":"m","prompt":"{MARKER}\u00"}}"#),
        format!(r#"{{"model":"m","{MARKER}":tru}}"#),
        format!(r#"["{MARKER}"]"#),
        MARKER.to_owned(),
        format!("{MARKER}{}", " ".repeat(60_000)),
    ];
    let client = runtime.block_on(proxy::connect(epp.grpc));
    let mut at = 0;
    for path in ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/unknown"] {
        for text in &bodies {
            at += 1;
            let id = format!("request-{at}");
            let head = [(":path", path), ("x-request-id", &id)];
            let messages = vec![
                headers(&head, false),
                body(text.clone(), false),
                body("", true),
                response_headers(&[(":status", "500")], false),
                response_body(format!("an error about {MARKER}"), true),
            ];
            runtime.block_on(proxy::replies(&client, messages)).unwrap();
        }
    }
    // Too large at once, too large together, and broken off.
    let large = |size: usize| body(format!("{MARKER}{}", " ".repeat(size)), false);
    for messages in [vec![large(70_000)], vec![large(50_000), large(50_000)], vec![large(5)]] {
        let messages = [vec![headers(&[("x-request-id", "large")], false)], messages].concat();
        drop(runtime.block_on(proxy::replies(&client, messages)));
    }
    let mut garbage = raw::framed(&body(MARKER, true).encode_to_vec());
    garbage.truncate(garbage.len() - 3);
    runtime.block_on(raw::process(epp.grpc, garbage));
    drop(client);
    all_closed(&epp);
    let log = epp.program.finish();
    for at in 1..=40 {
        let id = format!("x_request_id=request-{at} ");
        assert!(log.contains(&id), "{id} is not in\n{log}");
    }
    let told: Vec<&str> = log.lines().filter(|line| line.contains(MARKER)).collect();
    assert!(told.is_empty(), "{told:#?}");
    pods.stop();
}

#[test]
fn logs_may_be_json() {
    for flag in ["--log-format=json", "--zap-encoder=json"] {
        let epp = Epp::start(BY_QUEUE, &[NOWHERE, "-v=4", flag]);
        replies(&runtime(), epp.grpc, request());
        let log = epp.program.finish();
        let lines: Vec<Value> = log
            .lines()
            .filter(|line| !line.contains(" listening on "))
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
            .collect();
        let routed = lines.iter().find(|line| line["message"] == "Routed a request.");
        let routed = routed.unwrap_or_else(|| panic!("{log}"));
        assert_eq!(routed["x_request_id"], "the-request");
        assert_eq!(routed["destination"], "127.0.0.1:1");
    }
}

// Input that makes no sense.

#[test]
fn nothing_that_comes_in_stops_the_program() {
    let epp = Epp::start(BY_QUEUE, &[NOWHERE, "--grpc-max-recv-msg-size=64Ki"]);
    let runtime = runtime();
    let alive = || {
        let said = replies(&runtime, epp.grpc, request());
        assert!(matches!(said[..], [Said::Headers(..), Said::Body(_, true)]), "{said:?}");
    };
    let mut random = fastrand::Rng::with_seed(7);

    // Bytes that are no HTTP/2, on every port, and connections without any.
    for port in [epp.grpc, epp.health, epp.metrics] {
        let streams: Vec<TcpStream> = (0..20)
            .map(|n| {
                let mut stream = TcpStream::connect(port).unwrap();
                let mut bytes = vec![0; n * 50];
                random.fill(&mut bytes);
                if n % 3 == 0 {
                    bytes.splice(0..0, *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
                }
                // Closed on us, perhaps.
                stream.write_all(&bytes).unwrap_or_default();
                stream
            })
            .collect();
        drop(streams);
    }
    alive();

    // gRPC without protobuf, and protobuf without sense.
    let mut statuses = Vec::new();
    let good = headers(&[("a", "b")], false).encode_to_vec();
    let mut cut = raw::framed(&good);
    cut.pop();
    let mut compressed = raw::framed(&good);
    compressed[0] = 1;
    let mut flags = raw::framed(&good);
    flags[0] = 77;
    let mut noise = vec![0; 500];
    random.fill(&mut noise);
    let large = raw::framed(&body(vec![b' '; 140_000], true).encode_to_vec());
    let endless = [0, 255, 255, 255, 255, 1].to_vec();
    for stream in
        [raw::framed(&[255; 40]), cut, compressed, flags, raw::framed(&noise), large, endless]
    {
        statuses.push(runtime.block_on(raw::process(epp.grpc, stream)));
    }
    assert!(statuses.iter().all(|status| status.is_some_and(|code| code != 0)), "{statuses:?}");
    // Empty streams and messages without content are no fault.
    for stream in [Vec::new(), raw::framed(&[]), [raw::framed(&[]), raw::framed(&[])].concat()] {
        assert_eq!(runtime.block_on(raw::process(epp.grpc, stream)), Some(0));
    }
    alive();

    // Half of a request, and gone.
    runtime.block_on(async {
        let client = proxy::connect(epp.grpc).await;
        for n in 0..100 {
            let mut talk = Talk::begin(&client).await;
            talk.send(headers(&[], false)).await;
            if n % 2 == 0 {
                talk.send(body(r#"{"model":"m","#, false)).await;
            }
            if n % 4 == 0 {
                talk.send(body(r#""prompt":""}"#, true)).await;
                talk.reply().await;
            }
        }
    });
    all_closed(&epp);
    alive();

    // A proxy that dies with all its streams: an end like any other, not a line in the log for each.
    let dying = self::runtime();
    let mut talks = dying.block_on(async {
        let client = proxy::connect(epp.grpc).await;
        let mut talks = Vec::new();
        for _ in 0..20 {
            let mut talk = Talk::begin(&client).await;
            for message in request() {
                talk.send(message).await;
            }
            talk.reply().await;
            talks.push(talk);
        }
        talks
    });
    assert_eq!(epp.metric("llm_d_epp_request_running", ""), 20.0);
    let lines = epp.program.log().matches("broke off").count();
    drop(dying);
    talks.clear();
    all_closed(&epp);
    assert_eq!(epp.metric("llm_d_epp_request_running", ""), 0.0);
    assert_eq!(epp.program.log().matches("broke off").count(), lines);
    alive();

    // Any messages in any order.
    let all = [
        headers(&[("a", "b")], false),
        headers(&[("content-type", "\u{1}")], true),
        body(BODY, false),
        body("", true),
        body(BODY, true),
        trailers(),
        response_headers(&[(":status", "abc"), ("content-type", "text/event-stream")], false),
        response_headers(&[], true),
        response_body("data: {", false),
        response_body("", true),
        response_trailers(),
        ProcessingRequest { observability_mode: true, ..ProcessingRequest::default() },
    ];
    runtime.block_on(async {
        let client = proxy::connect(epp.grpc).await;
        for _ in 0..300 {
            let count = random.usize(1..8);
            let messages = (0..count).map(|_| all[random.usize(..all.len())].clone()).collect();
            proxy::replies(&client, messages).await.unwrap();
        }
    });
    alive();
    all_closed(&epp);
    assert_eq!(epp.metric("llm_d_epp_request_running", ""), 0.0);
    let log = epp.program.finish();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
}

#[test]
fn broken_metrics_pages_keep_nobody_from_picking() {
    let pods = Pods::start(3);
    let faults = [MetricsFault::Error, MetricsFault::Hang, MetricsFault::Garbage];
    for (engine, fault) in pods.engines.iter().zip(faults) {
        engine.fail_metrics(Some(fault));
    }
    let flags = pods.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let epp = Epp::start(BY_QUEUE, &flags);
    let runtime = runtime();
    let client = runtime.block_on(proxy::connect(epp.grpc));
    let pick = || {
        let replies = runtime.block_on(proxy::replies(&client, request())).unwrap();
        match proxy::said(replies[0].clone()) {
            Said::Headers(_, _, Some(to)) => to,
            other => panic!("{other:?}"),
        }
    };
    // All are equal, so all are picked.
    let mut seen: Vec<String> = (0..60).map(|_| pick()).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3);
    eventually("the faults are counted", || {
        pick();
        let page = epp.scrape();
        let sum = |name| super::rig::sum_of(&page, name, "");
        let polls = sum("llm_d_epp_datalayer_poll_errors_total");
        let extracts = sum("llm_d_epp_datalayer_extract_errors_total");
        if polls >= 2.0 && extracts >= 1.0 { Ok(()) } else { Err(page) }
    });
    // One that works is known, and the others are taken for as busy as it is.
    pods.engines[1].fail_metrics(None);
    pods.engines[1].pin_load(0, 3, 0.5);
    eventually("the load is known", || {
        pick();
        let queue = epp.metric("llm_d_epp_per_endpoint_queue_size", "pod-1");
        if queue == 3.0 { Ok(()) } else { Err(format!("{queue}")) }
    });
    let mut seen: Vec<String> = (0..60).map(|_| pick()).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3);
    drop(client);
    let log = epp.program.finish();
    assert!(!log.contains("panicked"), "{log}");
    pods.stop();
}
