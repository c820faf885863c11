//! What reaches a pod, and which one.

use std::net::SocketAddr;

use http::StatusCode;
use kv_indexer::loadgen::engine::{Engine, EngineHandle, EngineOptions};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::{
    http::{Answer, Call},
    rig::{Envoy, Epp, endpoints_yaml},
};
use crate::support::{eventually, yaml_file};

const CHAT: &str = "/v1/chat/completions";

/// Queue and cache decide, ties are broken at random.
const BY_LOAD: &str = "
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: max-score-picker
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: queue-scorer
  - pluginRef: kv-cache-utilization-scorer
  - pluginRef: max-score-picker
";

/// Engines on the loopback, and a runtime for them.
pub(crate) struct Pods {
    pub(crate) runtime: Runtime,
    pub(crate) engines: Vec<EngineHandle>,
}

impl Pods {
    pub(crate) fn start(count: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let engines = (0..count).map(|_| Self::engine(&runtime)).collect();
        Self { runtime, engines }
    }

    fn engine(runtime: &Runtime) -> EngineHandle {
        let options = EngineOptions { events: None, replay: None, ..EngineOptions::default() };
        runtime.block_on(Engine::start(options)).unwrap()
    }

    pub(crate) fn add(&mut self) {
        self.engines.push(Self::engine(&self.runtime));
    }

    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.engines.iter().map(EngineHandle::http).collect()
    }

    /// As arguments of `epp`.
    pub(crate) fn flags(&self) -> Vec<String> {
        let flag = |(at, address): (usize, SocketAddr)| format!("--endpoint=pod-{at}={address}");
        self.addresses().into_iter().enumerate().map(flag).collect()
    }

    pub(crate) fn stop(self) {
        for engine in self.engines {
            self.runtime.block_on(engine.stop());
        }
    }
}

/// Envoy, endpoint picker, pods.
pub(crate) struct Path {
    pub(crate) envoy: Envoy,
    pub(crate) epp: Epp,
    pub(crate) pods: Pods,
}

impl Path {
    pub(crate) fn start(envoy: &str, pods: usize) -> Self {
        let pods = Pods::start(pods);
        let flags = pods.flags();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let epp = Epp::start(BY_LOAD, &flags);
        let envoy = Envoy::start(envoy, epp.grpc, &pods.addresses());
        Self { envoy, epp, pods }
    }

    pub(crate) fn send(&self, call: &Call) -> Answer {
        let sent = self.pods.runtime.block_on(call.send(self.envoy.clients));
        sent.unwrap_or_else(|error| panic!("{call:?}: {error}\n{}", self.epp.program.log()))
    }

    pub(crate) fn stop(self) {
        let log = self.epp.program.finish();
        assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
        self.envoy.program.finish();
        self.pods.stop();
    }
}

fn chat(more: &str) -> String {
    format!(
        r#"{{"model": "mock", "messages": [{{"role": "user", "content": "one two three"}}], "max_tokens": 4{more}}}"#
    )
}

/// Which pod, by its place in the list.
#[track_caller]
fn served_by(pods: &[SocketAddr], answer: &Answer) -> usize {
    let served = answer.header("x-served-by");
    let found = pods.iter().position(|pod| pod.to_string() == served);
    found.unwrap_or_else(|| panic!("{served:?} is no pod; {answer:?}"))
}

#[test]
fn requests_of_every_form_reach_a_pod() {
    for envoy in ["parity.yaml", "recommended.yaml"] {
        let path = Path::start(envoy, 2);
        let pods = path.pods.addresses();

        let answer = path.send(&Call::post(CHAT, chat("")));
        served_by(&pods, &answer);
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        assert_eq!(answer.header("x-went-into-resp-headers"), "true");
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["usage"]["completion_tokens"], 4, "{body}");

        let streamed = chat(r#", "stream": true, "stream_options": {"include_usage": true}"#);
        let answer = path.send(&Call::post(CHAT, streamed));
        assert_eq!(answer.header("content-type").split(';').next(), Some("text/event-stream"));
        assert!(answer.text().trim_end().ends_with("data: [DONE]"), "{}", answer.text());

        // Larger than any buffer of Envoy's; the second is beyond gRPC's usual limit of 4 MB.
        for size in [300_000, 8 << 20] {
            let padding = format!(r#", "user": "{}""#, "x".repeat(size));
            let answer = path.send(&Call::post(CHAT, chat(&padding)));
            assert_eq!(answer.status, StatusCode::OK, "{size} bytes: {}", answer.text());
        }

        let answer = path.send(&Call::get("/v1/models"));
        served_by(&pods, &answer);
        assert_eq!(answer.status, StatusCode::OK);

        let heads = |pods: &Pods| -> usize {
            pods.engines.iter().map(|engine| engine.request_heads().len()).sum()
        };
        let requests = heads(&path.pods);
        let refused = [
            (
                "nothing",
                "inference error: BadRequest - error unmarshaling request bodyMap: invalid character 'o' in literal null (expecting 'u')",
            ),
            (
                r#"{"messages": [{}]}"#,
                "inference error: BadRequest - model not found in request body",
            ),
            (
                r#"{"model": "mock"}"#,
                "inference error: BadRequest - invalid chat completions request: must have valid messages field",
            ),
        ];
        for (body, text) in refused {
            let answer = path.send(&Call::post(CHAT, body));
            assert_eq!((answer.status.as_u16(), &*answer.text()), (400, text), "{body}");
        }
        assert_eq!(heads(&path.pods), requests, "refused requests reached a pod");

        assert_eq!(path.epp.metric("llm_d_epp_request_total", ""), 4.0);
        assert_eq!(path.epp.metric("inference_objective_request_total", ""), 4.0);
        assert_eq!(path.epp.metric("llm_d_epp_request_error_total", "BadRequest"), 3.0);
        assert_eq!(path.epp.metric("epp_immediate_responses_total", "400"), 3.0);
        assert_eq!(path.epp.metric("llm_d_epp_request_output_tokens_sum", ""), 16.0);
        eventually("nothing is under way", || {
            let open = path.epp.metric("epp_open_streams", "");
            let running = path.epp.metric("llm_d_epp_request_running", "");
            if open + running == 0.0 {
                Ok(())
            } else {
                Err(format!("{open} open, {running} running"))
            }
        });
        // The Go EPP echoes pseudo headers, which Envoy refuses to set.
        assert_eq!(path.envoy.stat("http.clients.ext_proc.rejected_header_mutations"), 0);
        path.stop();
    }
}

#[test]
fn picks_follow_the_load_that_pods_report() {
    let path = Path::start("recommended.yaml", 3);
    let pods = path.pods.addresses();
    for idle in [2, 0, 1] {
        for (at, engine) in path.pods.engines.iter().enumerate() {
            if at == idle {
                engine.pin_load(0, 0, 0.1);
            } else {
                engine.pin_load(8, 5, 0.9);
            }
        }
        // The first request after a pause also wakes the scraper.
        eventually("the idle pod gets them all", || {
            for _ in 0..10 {
                let at = served_by(&pods, &path.send(&Call::post(CHAT, chat(""))));
                if at != idle {
                    return Err(format!("pod {at}"));
                }
            }
            Ok(())
        });
    }
    path.stop();
}

#[test]
fn a_client_that_goes_away_leaves_nothing_behind() {
    let path = Path::start("recommended.yaml", 1);
    let engine = &path.pods.engines[0];
    let long = chat(r#", "stream": true"#).replace(r#""max_tokens": 4"#, r#""max_tokens": 10000"#);
    let call = Call::post(CHAT, long);
    let mut open = path.pods.runtime.block_on(call.open(path.envoy.clients)).unwrap();
    let piece = path.pods.runtime.block_on(open.piece()).unwrap().unwrap();
    assert_eq!(open.status, StatusCode::OK, "{piece:?}");
    assert_eq!(path.epp.metric("llm_d_epp_request_running", r#"model_name="mock""#), 1.0);
    assert!(open.headers.contains_key("x-went-into-resp-headers"));
    drop(open);
    eventually("the exchange is over", || {
        let running = path.epp.metric("llm_d_epp_request_running", "");
        let open = path.epp.metric("epp_open_streams", "");
        if running + open == 0.0 { Ok(()) } else { Err(format!("{running} running, {open} open")) }
    });
    assert!(path.pods.runtime.block_on(engine.wait_idle(crate::support::patience())));
    // Neither an error nor a finished request.
    assert_eq!(path.epp.metric("llm_d_epp_request_error_total", ""), 0.0);
    assert_eq!(path.epp.metric("llm_d_epp_request_duration_seconds_count", ""), 0.0);
    path.stop();
}

#[test]
fn clients_cannot_choose_where_a_request_goes() {
    // Somebody who is no pod.
    let outsider = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = outsider.local_addr().unwrap().to_string();
    outsider.set_nonblocking(true).unwrap();
    for envoy in ["parity.yaml", "recommended.yaml"] {
        let path = Path::start(envoy, 1);
        let pods = path.pods.addresses();
        let forged = |call: Call| {
            call.header("x-gateway-destination-endpoint", &address)
                .header("x-prefiller-host-port", &address)
                .header("x-encoder-hosts-ports", &address)
                .header("x-data-parallel-host-port", &address)
        };
        for call in [Call::post(CHAT, chat("")), Call::get("/v1/models")] {
            let answer = path.send(&forged(call));
            served_by(&pods, &answer);
        }
        for head in path.pods.engines[0].request_heads() {
            for name in
                ["x-prefiller-host-port", "x-encoder-hosts-ports", "x-data-parallel-host-port"]
            {
                assert_eq!(head.header(name), None, "{name} reached the pod");
            }
        }
        // With the endpoint picker gone, too.
        path.epp.program.kill();
        let sent =
            path.pods.runtime.block_on(forged(Call::post(CHAT, chat(""))).send(path.envoy.clients));
        let status = sent.unwrap().status;
        assert_eq!(status.is_success(), envoy == "recommended.yaml", "{envoy}: {status}");
        assert!(outsider.accept().is_err(), "{envoy}: the outsider was called");
        path.envoy.program.finish();
        path.pods.stop();
    }
}

#[test]
fn a_model_is_rewritten_and_nothing_else() {
    let options = EngineOptions {
        loras: vec!["adapter".to_owned()],
        events: None,
        replay: None,
        ..EngineOptions::default()
    };
    let pods = Pods::start(0);
    let engine = pods.runtime.block_on(Engine::start(options)).unwrap();
    let epp = Epp::start(BY_LOAD, &[&format!("--endpoint=pod={}", engine.http())]);
    let envoy = Envoy::start("recommended.yaml", epp.grpc, &[engine.http()]);
    let body = r#"{ "seed" : 12345678901234567890, "model" : "public", "messages": [{"role": "user", "content": "<b>"}], "max_tokens": 2 }"#;
    for stream in [false, true] {
        let body =
            if stream { body.replacen('{', r#"{"stream": true,"#, 1) } else { body.to_owned() };
        let call = Call::post(CHAT, body).header("x-gateway-model-name-rewrite", "adapter");
        let answer = pods.runtime.block_on(call.send(envoy.clients)).unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        let text = answer.text();
        assert!(text.contains(r#""public""#) && !text.contains(r#""adapter""#), "{text}");
    }
    let labels = r#"target_model_name="adapter""#;
    assert_eq!(epp.metric("llm_d_epp_request_total", labels), 2.0);
    epp.program.finish();
    envoy.program.finish();
    pods.runtime.block_on(engine.stop());
}

/// Prefill by uncached characters, as configured for the Go EPP's first releases.
const BY_THRESHOLD: &str = "
plugins:
- type: file-discovery
  parameters: {path: ENDPOINTS}
- type: prefill-header-handler
- type: prefix-cache-scorer
  parameters: {hashBlockSize: 5, maxPrefixBlocksToMatch: 256, lruCapacityPerServer: 31250}
- type: prefill-filter
- type: decode-filter
- type: max-score-picker
- type: pd-profile-handler
  parameters: {threshold: 60, hashBlockSize: 5}
PROFILES
";

/// The same by uncached tokens, as configured for the newest.
const BY_DECIDER: &str = "
plugins:
- type: file-discovery
  parameters: {path: ENDPOINTS}
- type: approx-prefix-cache-producer
  parameters: {maxPrefixTokensToMatch: 16384}
- type: prefix-cache-scorer
- type: prefill-filter
- type: decode-filter
- type: max-score-picker
- type: prefix-based-pd-decider
  parameters: {nonCachedTokens: 16}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: prefix-based-pd-decider}}
PROFILES
";

const PROFILES: &str = "
dataLayer:
  discovery: {pluginRef: file-discovery}
schedulingProfiles:
- name: prefill
  plugins:
  - pluginRef: prefill-filter
  - pluginRef: max-score-picker
  - {pluginRef: prefix-cache-scorer, weight: 2}
- name: decode
  plugins:
  - pluginRef: decode-filter
  - pluginRef: max-score-picker
  - {pluginRef: prefix-cache-scorer, weight: 2}
";

#[test]
fn prefill_and_decode_are_picked_apart_by_characters() {
    check_prefill_and_decode(
        BY_THRESHOLD,
        &["llm_d_epp_pd_decision_total", "llm_d_inference_scheduler_pd_decision_total"],
    );
}

#[test]
fn prefill_and_decode_are_picked_apart_by_tokens() {
    check_prefill_and_decode(
        BY_DECIDER,
        &["llm_d_epp_disagg_decision_total", "llm_d_inference_scheduler_disagg_decision_total"],
    );
}

#[track_caller]
fn check_prefill_and_decode(config: &str, decisions: &[&str]) {
    let config = config.replace("PROFILES", PROFILES);
    let pods = Pods::start(3);
    let addresses = pods.addresses();
    let role = |role| [("llm-d.ai/role", role)];
    let endpoints = yaml_file(&endpoints_yaml(&[
        ("prefill-0", addresses[0], &role("prefill")),
        ("decode-0", addresses[1], &role("decode")),
        ("decode-1", addresses[2], &role("decode")),
    ]));
    let epp = Epp::start(&config.replace("ENDPOINTS", endpoints.path().to_str().unwrap()), &[]);
    let envoy = Envoy::start("recommended.yaml", epp.grpc, &addresses);
    let send = |words: &str| {
        let body = format!(r#"{{"model": "mock", "prompt": "{words}", "max_tokens": 2}}"#);
        let call = Call::post("/v1/completions", body).header("x-prefiller-host-port", "6.6.6.6:1");
        let answer = pods.runtime.block_on(call.send(envoy.clients)).unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        let at = served_by(&addresses, &answer);
        let heads = pods.engines[at].request_heads();
        let prefiller = heads.last().unwrap().header("x-prefiller-host-port").map(str::to_owned);
        (at, prefiller)
    };
    let long = "new words ".repeat(52)[..512].to_owned();
    let (first, prefiller) = send(&long);
    assert_ne!(first, 0, "a prefill pod decodes");
    assert_eq!(prefiller, Some(addresses[0].to_string()));
    // Known by now, so its decode pod computes the rest itself; and what the client forged is gone.
    let (again, prefiller) = send(&format!("{long} and some"));
    assert_eq!((again, prefiller), (first, None));
    let (_, prefiller) = send("short");
    assert_eq!(prefiller, None);
    for family in decisions {
        assert_eq!(epp.metric(family, r#"decision_type="prefill-decode""#), 1.0, "{family}");
        assert_eq!(epp.metric(family, r#"decision_type="decode-only""#), 2.0, "{family}");
    }
    epp.program.finish();
    envoy.program.finish();
    pods.stop();
}
