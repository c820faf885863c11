//! The cases of the Go EPP's own integration tests (`test/integration/epp` of llm-d-router), against the
//! real program: the proxy is a plain gRPC client, the pods are engines that show a fixed load.
//!
//! Differences that are meant: of headers only those that change are set, `Content-Length` only with a
//! rewritten body, and a body may end with trailers.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use kv_indexer::{
    loadgen::engine::{Engine, EngineOptions},
    proto::ext_proc::{ProcessingRequest, ProcessingResponse},
};
use serde_json::Value;
use tonic::codec::CompressionEncoding;

use super::{
    path::Pods,
    proxy::{
        self, Client, Said, Talk, body, headers, hinted, response_body, response_headers,
        response_trailers, trailers,
    },
    rig::Epp,
};
use crate::support::{eventually, http_get, yaml_file};

/// Queue, cache, prefix and adapters, of equal weight.
const ALL: &str = "
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: lora-affinity-scorer
- type: max-score-picker
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 1}
  - {pluginRef: kv-cache-utilization-scorer, weight: 1}
  - {pluginRef: prefix-cache-scorer, weight: 1}
  - {pluginRef: lora-affinity-scorer, weight: 1}
  - pluginRef: max-score-picker
";

/// What a pod shows: queue, used share of its cache, active adapters.
type Load = (usize, f64, &'static [&'static str]);

const THREE: [Load; 3] = [(3, 0.2, &[]), (0, 0.1, &[]), (10, 0.2, &[])];
const TARGET: &str = "sql-lora-1fdg2";

/// The program, its pods, and a proxy.
pub(super) struct Scene {
    pub(super) epp: Epp,
    pub(super) pods: Pods,
    client: Client,
}

impl Scene {
    /// Starts it, and waits until every pod's load is known.
    pub(super) fn start(config: &str, loads: &[Load], flags: &[&str]) -> Self {
        let mut pods = Pods::start(0);
        for (at, &(queue, kv, loras)) in loads.iter().enumerate() {
            // Subsets go by address alone.
            let address = Ipv4Addr::new(127, 0, 0, at as u8 + 1);
            let options = EngineOptions {
                listen: (address, 0).into(),
                // No room beside those that are active.
                max_loras: 1,
                events: None,
                replay: None,
                ..EngineOptions::default()
            };
            let engine = pods.runtime.block_on(Engine::start(options)).unwrap();
            engine.pin_load(0, queue, kv);
            let loras = loras.iter().map(|&lora| lora.to_owned()).collect();
            engine.pin_loras(Some([loras, Vec::new()]));
            pods.engines.push(engine);
        }
        let mut arguments = pods.flags();
        arguments.extend(["--debug-listen=127.0.0.1:0", "-v=4"].map(str::to_owned));
        arguments.extend(flags.iter().map(|&flag| flag.to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut epp = Epp::start(config, &arguments);
        let debug = epp.program.announced("debug listening on ");
        eventually("the loads are known", || {
            let (_, page) = http_get(debug, "/debug/endpoints").map_err(|e| e.to_string())?;
            let page: Value = serde_json::from_str(&page).map_err(|e| e.to_string())?;
            let known = loads.iter().zip(page["endpoints"].as_array().unwrap()).all(
                |(&(queue, kv, loras), endpoint)| {
                    let metrics = &endpoint["metrics"];
                    let active = metrics["lora"]["active"].as_array().map_or(0, Vec::len);
                    metrics["waiting"] == queue
                        && (metrics["kvUsage"].as_f64().unwrap() - kv).abs() < 0.01
                        && active == loras.len()
                },
            );
            if known { Ok(()) } else { Err(page.to_string()) }
        });
        let client = pods.runtime.block_on(proxy::connect(epp.grpc));
        Self { epp, pods, client }
    }

    pub(super) fn pod(&self, at: usize) -> String {
        self.pods.addresses()[at].to_string()
    }

    #[track_caller]
    pub(super) fn replies(&self, messages: Vec<ProcessingRequest>) -> Vec<ProcessingResponse> {
        self.pods.runtime.block_on(proxy::replies(&self.client, messages)).unwrap()
    }

    #[track_caller]
    pub(super) fn say(&self, messages: Vec<ProcessingRequest>) -> Vec<Said> {
        self.replies(messages).into_iter().map(proxy::said).collect()
    }

    /// Checks that these messages are routed to a pod, and nothing is changed.
    #[track_caller]
    fn check(&self, messages: Vec<ProcessingRequest>, pod: usize, body: &str) {
        assert_eq!(self.say(messages), unchanged(&self.pod(pod), body));
    }

    /// The number of a family's series with all of `labels`, and no error.
    #[track_caller]
    fn counted(&self, model: &str, target: &str) {
        let page = self.epp.scrape();
        let labels =
            format!("model_name=\"{model}\",priority=\"0\",target_model_name=\"{target}\"");
        let sum = |name| super::rig::sum_of(&page, name, &labels);
        assert_eq!(sum("llm_d_epp_request_total"), 1.0, "{labels}\n{page}");
        assert_eq!(sum("inference_objective_request_total"), 1.0, "{labels}");
        assert_eq!(self.epp.metric("llm_d_epp_request_error_total", ""), 0.0);
        let pods = self.pods.engines.len() as f64;
        for name in ["inference_pool_ready_pods", "llm_d_epp_ready_endpoints"] {
            assert_eq!(self.epp.metric(name, r#"name="epp""#), pods, "{name}");
        }
    }

    #[track_caller]
    fn refused(&self, code: &str, times: f64) {
        let label = format!("error_code=\"{code}\"");
        for name in ["llm_d_epp_request_error_total", "inference_objective_request_error_total"] {
            assert_eq!(self.epp.metric(name, &label), times, "{name} {label}");
        }
        assert_eq!(self.epp.metric("llm_d_epp_request_total", ""), 0.0);
    }

    pub(super) fn stop(self) -> String {
        drop(self.client);
        let log = self.epp.program.finish();
        assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
        self.pods.stop();
        log
    }
}

fn pair(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

fn routed(to: &str, more: &[(&str, &str)], removed: &[&str]) -> Said {
    let mut set = vec![pair("x-gateway-destination-endpoint", to)];
    set.extend(more.iter().map(|&(name, value)| pair(name, value)));
    set.sort();
    let removed = removed.iter().map(|&name| name.to_owned()).collect();
    Said::Headers(set, removed, Some(to.to_owned()))
}

fn unchanged(to: &str, body: &str) -> Vec<Said> {
    vec![routed(to, &[], &[]), Said::Body(Bytes::copy_from_slice(body.as_bytes()), true)]
}

fn completion(model: &str, prompt: &str) -> String {
    format!(r#"{{"max_tokens":100,"model":"{model}","prompt":"{prompt}","temperature":0}}"#)
}

/// As the Go tests do: the objective and the target in headers.
fn llm(model: &str, target: &str, prompt: &str) -> Vec<ProcessingRequest> {
    let head = [
        ("hi", "mom"),
        ("x-request-id", "test-request-id"),
        ("x-llm-d-inference-objective", model),
        ("x-llm-d-model-name-rewrite", target),
    ];
    vec![headers(&head, false), body(completion(model, prompt), true)]
}

/// Headers without meaning to us.
fn plain() -> ProcessingRequest {
    headers(&[("hi", "mom"), ("x-request-id", "test-request-id")], false)
}

#[test]
fn the_load_chooses_the_pod() {
    #[track_caller]
    fn check(loads: &[Load], target: &str, pod: usize) {
        let scene = Scene::start(ALL, loads, &[]);
        // The model's own name, so that the body stays as it is.
        scene.check(llm(target, target, "test1"), pod, &completion(target, "test1"));
        scene.counted(target, target);
        let log = scene.stop();
        assert!(log.contains("test-request-id"), "{log}");
    }
    // Select lower queue and kv cache.
    check(&THREE, "my-model-12345", 1);
    // Select active lora, low queue.
    let loads: [Load; 3] =
        [(0, 0.2, &["foo", "bar"]), (0, 0.1, &["foo", TARGET]), (10, 0.2, &["foo", "bar"])];
    check(&loads, TARGET, 1);
    // Select lora despite higher kv.
    let loads: [Load; 3] =
        [(10, 0.2, &["foo", "bar"]), (10, 0.4, &["foo", TARGET]), (10, 0.3, &["foo"])];
    check(&loads, TARGET, 1);
    // Do not shed requests by default.
    let loads: [Load; 3] =
        [(6, 0.2, &["foo", "bar", TARGET]), (0, 0.85, &["foo"]), (10, 0.9, &["foo"])];
    check(&loads, TARGET, 0);
}

#[test]
fn a_body_is_found_wherever_it_ends() {
    let loads: [Load; 3] =
        [(4, 0.2, &["foo", "bar", TARGET]), (4, 0.85, &["foo", TARGET]), (10, 0.9, &["foo"])];
    let scene = Scene::start(ALL, &loads, &[]);
    let text = completion(TARGET, "test3");
    let (first, second) = text.split_at(40);
    let split =
        |end: bool| vec![plain(), body(first.to_owned(), false), body(second.to_owned(), end)];
    scene.check(split(true), 0, &text);
    // By an empty message, as Envoy 1.40 does.
    let mut messages = split(false);
    messages.push(body("", true));
    scene.check(messages, 0, &text);
    // By trailers, which the Go EPP never answers.
    let mut messages = split(false);
    messages.push(trailers());
    let said = scene.say(messages);
    let [head, Said::Body(whole, false), Said::Trailers] = &said[..] else { panic!("{said:?}") };
    assert_eq!(head, &routed(&scene.pod(0), &[], &[]));
    assert_eq!(*whole, text.as_bytes());
    // A second end, which Envoy sends for large bodies now and then.
    let mut messages = split(true);
    messages.push(body("", true));
    scene.check(messages, 0, &text);
    scene.stop();
}

#[test]
fn compressed_messages_are_read() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let text = completion("m", &"test ".repeat(1000));
    let messages = vec![plain(), body(text.clone(), true)];
    let client = scene.client.clone().send_compressed(CompressionEncoding::Gzip);
    let replies = scene.pods.runtime.block_on(proxy::replies(&client, messages)).unwrap();
    let said: Vec<Said> = replies.into_iter().map(proxy::said).collect();
    assert_eq!(said, unchanged(&scene.pod(1), &text));
    drop(client);
    scene.stop();
}

#[test]
fn a_large_body_comes_back_in_pieces() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let text = completion("m", &"x".repeat(130_025 - completion("m", "").len()));
    assert_eq!(text.len(), 130_025);
    let said = scene.say(vec![plain(), body(text.clone(), true)]);
    assert_eq!(said[0], routed(&scene.pod(1), &[], &[]));
    let parts: Vec<(usize, bool)> = said[1..]
        .iter()
        .map(|said| match said {
            Said::Body(part, end) => (part.len(), *end),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(parts, [(62_000, false), (62_000, false), (6025, true)]);
    let whole: Vec<u8> = said[1..]
        .iter()
        .flat_map(|said| match said {
            Said::Body(part, _) => part.to_vec(),
            _ => Vec::new(),
        })
        .collect();
    assert!(whole == text.as_bytes());
    assert_eq!(scene.epp.metric("llm_d_epp_request_size_bytes_sum", ""), 130_025.0);
    scene.stop();
}

#[test]
fn what_nobody_can_read_is_passed_through() {
    let config = ALL
        .replace("plugins:\n- type: queue", "plugins:\n- type: passthrough-parser\n- type: queue")
        + "requestHandler: {parsers: [{pluginRef: passthrough-parser}]}\n";
    let scene = Scene::start(&config, &THREE, &[]);
    scene.check(vec![plain(), body("passthrough-parser", true)], 1, "passthrough-parser");
    scene.counted("", "");
    scene.stop();
    // Of the usual parsers none claims the path.
    let scene = Scene::start(ALL, &THREE, &[]);
    let head = [(":path", "/v1/foo"), ("x-request-id", "r"), ("x-gateway-model-name-rewrite", "t")];
    scene.check(vec![headers(&head, false), body(r#"{"a":1}"#, true)], 1, r#"{"a":1}"#);
    scene.counted("", "");
    scene.stop();
}

#[test]
fn an_objective_that_nobody_knows_is_no_fault() {
    let loads: [Load; 3] = [(6, 0.2, &["foo", "bar"]), (0, 0.85, &["foo"]), (10, 0.9, &["foo"])];
    let scene = Scene::start(ALL, &loads, &[]);
    scene.check(llm("direct", "direct", "test6"), 0, &completion("direct", "test6"));
    scene.counted("direct", "direct");
    scene.stop();
}

#[test]
fn bodies_that_are_wrong_are_refused() {
    const UNREAD: &str = "inference error: BadRequest - error unmarshaling request bodyMap: ";
    let scene = Scene::start(ALL, &THREE, &[]);
    let cases = [
        (
            "/v1/completions",
            "no healthy upstream",
            format!("{UNREAD}invalid character 'o' in literal null (expecting 'u')"),
        ),
        (
            "/v1/completions",
            "[1,2]",
            format!(
                "{UNREAD}json: cannot unmarshal array into Go value of type map[string]interface {{}}"
            ),
        ),
        ("/v1/completions", "", format!("{UNREAD}unexpected end of JSON input")),
        (
            "/v1/completions",
            r#"{"prompt":"hello world"}"#,
            "inference error: BadRequest - model not found in request body".to_owned(),
        ),
        (
            "/v1/completions",
            r#"{"model":"m"}"#,
            "inference error: BadRequest - invalid completions request: must have prompt field"
                .to_owned(),
        ),
        (
            "/v1/chat/completions",
            r#"{"model":"m","messages":[]}"#,
            "inference error: BadRequest - invalid chat completions request: must have valid messages field"
                .to_owned(),
        ),
    ];
    for (path, text, answer) in &cases {
        let messages = vec![headers(&[(":path", path)], false), body(text.to_owned(), true)];
        let expected = vec![Said::Immediate(400, answer.clone(), Vec::new())];
        assert_eq!(scene.say(messages), expected, "{text}");
    }
    scene.refused("BadRequest", cases.len() as f64);
    let none = r#"model_name="",priority="0""#;
    let errors = scene.epp.metric("llm_d_epp_request_error_total", none);
    assert_eq!(errors, cases.len() as f64);
    scene.stop();
}

#[test]
fn an_empty_pool_refuses() {
    const CONFIG: &str = "
- type: file-discovery
  parameters: {path: ENDPOINTS, watchFile: true}
";
    let file = yaml_file("endpoints: []\n");
    let discovery = CONFIG.replace("ENDPOINTS", file.path().to_str().unwrap());
    let config = ALL
        .replace("plugins:\n- type: queue", &format!("plugins:{discovery}- type: queue"))
        + "dataLayer:\n  discovery: {pluginRef: file-discovery}\n";
    let scene = Scene::start(&config, &[], &[]);
    let missing = "inference error: BadRequest - model not found in request body";
    assert_eq!(
        scene.say(vec![plain(), body(r#"{"prompt":"hello world"}"#, true)]),
        [Said::Immediate(400, missing.to_owned(), Vec::new())]
    );
    let nobody = "inference error: Internal - no pods available in datastore";
    assert_eq!(
        scene.say(vec![headers(&[("content-type", "application/json")], true)]),
        [Said::Immediate(500, nobody.to_owned(), Vec::new())]
    );
    let nobody = "inference error: ServiceUnavailable - failed to find endpoint candidates for serving the request";
    let reason = vec![pair("x-llm-d-request-dropped-reason", "rejected-no-endpoints")];
    assert_eq!(scene.say(llm("m", "m", "test")), [Said::Immediate(503, nobody.to_owned(), reason)]);
    for code in ["BadRequest", "Internal", "ServiceUnavailable"] {
        scene.refused(code, 1.0);
    }
    scene.stop();
}

#[test]
fn the_proxy_may_hint_at_a_subset() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let all: Vec<String> = scene.pods.addresses().iter().map(SocketAddr::to_string).collect();
    let text = completion("m", "test");
    let hint = |subset: &[String]| vec![plain(), hinted(body(text.clone(), true), subset)];
    // Select best, partial, none.
    scene.check(hint(&all), 1, &text);
    scene.check(hint(&[all[2].clone(), "127.0.0.77:8000".to_owned()]), 2, &text);
    let nobody = "inference error: ServiceUnavailable - failed to find endpoint candidates for serving the request";
    let reason = vec![pair("x-llm-d-request-dropped-reason", "rejected-no-endpoints")];
    let refused = [Said::Immediate(503, nobody.to_owned(), reason)];
    assert_eq!(scene.say(hint(&["127.0.0.77:8000".to_owned()])), refused);
    assert_eq!(scene.say(hint(&[])), refused);
    // With the headers, as Envoy sends it when it knows it then.
    let early = vec![hinted(plain(), &all[2..]), body(text.clone(), true)];
    scene.check(early, 2, &text);
    let get = [("x-request-id", "r")];
    let get = || vec![hinted(headers(&get, true), &all[..1])];
    assert!((0..10).all(|_| scene.say(get()) == [routed(&all[0], &[], &[])]));
    scene.stop();

    let scene = Scene::start(ALL, &THREE, &["--disable-endpoint-subset-filter"]);
    let messages = vec![plain(), hinted(body(text.clone(), true), &["127.0.0.1:1".to_owned()])];
    scene.check(messages, 1, &text);
    scene.stop();
}

#[test]
fn only_headers_that_change_are_set() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let best = scene.pod(1);
    let text = completion("m", "test");
    let head = [
        (":method", "POST"),
        (":path", "/v1/completions"),
        (":authority", "pool"),
        ("content-type", "application/json"),
        ("content-length", "74"),
        ("x-llm-d-inference-fairness-id", "tenant"),
        ("x-gateway-destination-endpoint", "6.6.6.6:1"),
        ("x-prefiller-host-port", "6.6.6.6:1"),
        ("x-encoder-hosts-ports", "6.6.6.6:1"),
        ("x-data-parallel-host-port", "6.6.6.6:1"),
        ("x-kv-cache-source-host-port", "6.6.6.6:1"),
        ("x-request-id", "r"),
    ];
    let removed = [
        "x-prefiller-host-port",
        "x-encoder-hosts-ports",
        "x-data-parallel-host-port",
        "x-kv-cache-source-host-port",
    ];
    let said = scene.say(vec![headers(&head, false), body(text.clone(), true)]);
    assert_eq!(said[0], routed(&best, &[], &removed));
    assert_eq!(scene.epp.metric("llm_d_epp_request_total", r#"fairness_id="tenant""#), 1.0);

    // An identity is made where there is none.
    let said = scene.say(vec![headers(&[], false), body(text, true)]);
    let Said::Headers(set, ..) = &said[0] else { panic!("{said:?}") };
    let [destination, (name, id)] = &set[..] else { panic!("{set:?}") };
    assert_eq!(*destination, pair("x-gateway-destination-endpoint", &best));
    assert_eq!((&**name, id.len(), id.split('-').count()), ("x-request-id", 36, 5));
    scene.stop();
}

#[test]
fn a_model_is_rewritten_by_its_header() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let text = r#"{ "seed" : 12345678901234567890, "model" : "m", "prompt":"hello world <b>","temperature":0}"#;
    let rewritten = text.replace(r#""m""#, r#""m2""#);
    let length = rewritten.len().to_string();
    let head = [("x-gateway-model-name-rewrite", "m2"), ("x-request-id", "r")];
    let event =
        |model: &str| format!("data: {{\"id\":1,\"model\":\"{model}\",\"choices\":[]}}\n\n");
    let messages = vec![
        headers(&head, false),
        body(text, true),
        response_headers(&[(":status", "200"), ("content-type", "text/event-stream")], false),
        response_body(event("m2"), false),
        response_body("data: [DONE]\n\n", false),
        response_body("", true),
    ];
    let said = scene.say(messages);
    let expected = [
        routed(&scene.pod(1), &[("Content-Length", &length)], &[]),
        Said::Body(rewritten.into(), true),
        Said::ResponseHeaders(vec![pair("x-went-into-resp-headers", "true")]),
        Said::ResponseBody(event("m").into(), false),
        Said::ResponseBody("data: [DONE]\n\n".into(), false),
        Said::ResponseBody(Bytes::new(), true),
    ];
    assert_eq!(said, expected);
    scene.counted("m", "m2");
    scene.stop();
}

#[test]
fn requests_without_a_body_go_to_any_pod() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let mut seen = [0; 3];
    for _ in 0..60 {
        let said =
            scene.say(vec![headers(&[(":path", "/v1/models"), ("x-request-id", "r")], true)]);
        let to = (0..3).find(|&at| said == [routed(&scene.pod(at), &[], &[])]);
        seen[to.unwrap_or_else(|| panic!("{said:?}"))] += 1;
    }
    assert!(seen.iter().all(|&count| count > 2), "{seen:?}");
    let said = scene.say(vec![headers(&[(":path", "/v1/models")], true)]);
    let Said::Headers(set, removed, _) = &said[0] else { panic!("{said:?}") };
    assert_eq!((set.len(), removed.len(), said.len()), (2, 0, 1));
    assert_eq!(set[1].0, "x-request-id");
    scene.stop();
}

#[test]
fn streams_may_be_of_a_response_alone() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let went = || Said::ResponseHeaders(vec![pair("x-went-into-resp-headers", "true")]);
    let json = [("content-type", "application/json")];
    // JSON in several parts is passed on in one.
    let [first, second] =
        [r#"{"max_tokens":100,"model":"model-sheddable","#, r#""prompt":"test6","temperature":0}"#];
    let said = scene.say(vec![
        response_headers(&json, false),
        response_body(first, false),
        response_body(second, true),
    ]);
    let whole = || Said::ResponseBody(format!("{first}{second}").into(), true);
    assert_eq!(said, [went(), whole()]);
    // What is no JSON stays as it is.
    let said =
        scene.say(vec![response_headers(&json, false), response_body("no healthy upstream", true)]);
    assert_eq!(said, [went(), Said::ResponseBody("no healthy upstream".into(), true)]);
    // An empty last part.
    let said = scene.say(vec![
        response_headers(&json, false),
        response_body(format!("{first}{second}"), false),
        response_body("", true),
    ]);
    assert_eq!(said, [went(), whole()]);
    // Nothing but headers, and trailers.
    assert_eq!(scene.say(vec![response_headers(&json, true)]), [went()]);
    let said = scene.say(vec![
        response_headers(&json, false),
        response_body("text", false),
        response_trailers(),
    ]);
    let expected = [went(), Said::ResponseBody("text".into(), false), Said::ResponseTrailers];
    assert_eq!(said, expected);
    scene.stop();
}

#[test]
fn tokens_of_events_are_counted() {
    let scene = Scene::start(ALL, &THREE, &[]);
    let usage = r#"data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":17,"completion_tokens":10}}"#;
    let chunks = ["data: {}\n\n".to_owned(), format!("{usage}\n\ndata: [DONE]\n\n"), String::new()];
    let mut messages =
        vec![response_headers(&[("content-type", "text/event-stream"), ("status", "200")], false)];
    messages.extend(chunks.iter().map(|chunk| response_body(chunk.clone(), chunk.is_empty())));
    let said = scene.say(messages);
    let mut expected = vec![Said::ResponseHeaders(vec![pair("x-went-into-resp-headers", "true")])];
    let part = |chunk: &String| Said::ResponseBody(chunk.clone().into(), chunk.is_empty());
    expected.extend(chunks.iter().map(part));
    assert_eq!(said, expected);
    let page = scene.epp.scrape();
    let sum = |name, labels| super::rig::sum_of(&page, name, labels);
    let nobody = r#"model_name="",target_model_name="""#;
    assert_eq!(sum("inference_objective_input_tokens_sum", nobody), 7.0, "{page}");
    assert_eq!(sum("llm_d_epp_request_input_tokens_sum", r#"model_name="""#), 7.0);
    assert_eq!(sum("llm_d_epp_request_output_tokens_sum", ""), 10.0);
    scene.stop();
}

#[test]
fn a_whole_exchange_is_accounted_for() {
    let scene = Scene::start(ALL, &THREE, &["--emit-endpoint-scores"]);
    let text = completion("m", "test");
    let answer = r#"{"id":"1","model":"m","usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8,"prompt_tokens_details":{"cached_tokens":4}}}"#;
    let (first, second) = answer.split_at(70);
    let replies = scene.replies(vec![
        plain(),
        body(text, true),
        response_headers(&[(":status", "200"), ("content-type", "application/json")], false),
        response_body(first.to_owned(), false),
        response_body(second.to_owned(), true),
    ]);
    let scores = proxy::scores(replies[0].dynamic_metadata.as_ref().unwrap()).unwrap();
    let score = |at: usize| {
        let found = scores.iter().find(|(address, _)| *address == scene.pod(at));
        found.map(|(_, score)| *score).unwrap()
    };
    // (10 − q) / 10 + (1 − kv) + room for an adapter.
    for (at, expected) in
        [0.7 + 0.8 + 0.8, 1.0 + 0.9 + 0.8, 0.0 + 0.8 + 0.8].into_iter().enumerate()
    {
        assert!((score(at) - expected).abs() < 0.01, "{at}: {scores:?}");
    }
    let said: Vec<Said> = replies.into_iter().map(proxy::said).collect();
    assert_eq!(said[3..], [Said::ResponseBody(answer.to_owned().into(), true)]);
    let page = scene.epp.scrape();
    let model = r#"model_name="m""#;
    for (name, expected) in [
        ("llm_d_epp_request_total", 1.0),
        ("llm_d_epp_request_input_tokens_sum", 5.0),
        ("llm_d_epp_request_output_tokens_sum", 3.0),
        ("llm_d_epp_request_cached_tokens_sum", 4.0),
        ("llm_d_epp_response_size_bytes_sum", answer.len() as f64),
        ("llm_d_epp_request_duration_seconds_count", 1.0),
        ("llm_d_epp_request_ttft_seconds_count", 1.0),
        ("llm_d_epp_request_ntpot_seconds_count", 1.0),
        ("llm_d_epp_request_running", 0.0),
    ] {
        assert_eq!(super::rig::sum_of(&page, name, model), expected, "{name}\n{page}");
    }
    scene.stop();
}

#[test]
fn what_plugins_count_of_a_request_ends_with_it() {
    // No profile names the plugin.
    let config = ALL.replace(
        "plugins:\n- type: queue",
        "plugins:\n- type: inflight-load-producer\n- type: queue",
    );
    let scene = Scene::start(&config, &THREE, &[]);
    let counted = |requests: f64, tokens: bool| {
        eventually("in flight", || {
            let held = scene.epp.metric("llm_d_epp_inflight_requests", "pod-1");
            let held_tokens = scene.epp.metric("llm_d_epp_inflight_tokens", "pod-1");
            if held == requests && (held_tokens > 0.0) == tokens {
                Ok(())
            } else {
                Err(format!("{held} requests, {held_tokens} tokens"))
            }
        });
    };
    let runtime = &scene.pods.runtime;
    // Prompts of their own, since what is cached costs no tokens.
    let begin = |prompt: &str| {
        let text = completion("m", &prompt.repeat(50));
        runtime.block_on(async {
            let mut talk = Talk::begin(&scene.client).await;
            talk.send(plain()).await;
            talk.send(body(text.clone(), true)).await;
            assert!(matches!(talk.reply().await, Said::Headers(..)));
            assert!(matches!(talk.reply().await, Said::Body(_, true)));
            talk
        })
    };
    let mut talk = begin("first ");
    counted(1.0, true);
    // The first byte says that the prompt is computed, later ones say nothing.
    for chunk in ["data: 1\n\n", "data: 2\n\n"] {
        runtime.block_on(async {
            if chunk.contains('1') {
                let head = [(":status", "200"), ("content-type", "text/event-stream")];
                talk.send(response_headers(&head, false)).await;
                talk.reply().await;
            }
            talk.send(response_body(chunk, false)).await;
            talk.reply().await;
        });
        counted(1.0, false);
    }
    runtime.block_on(async {
        talk.send(response_body("", true)).await;
        talk.reply().await;
        talk.finish().await;
    });
    counted(0.0, false);
    // The client goes away, before the response or in the midst of it; our side is closed.
    let talk = begin("second ");
    counted(1.0, true);
    drop(talk);
    counted(0.0, false);
    let mut talk = begin("third ");
    runtime.block_on(async {
        talk.send(response_headers(&[(":status", "200")], false)).await;
        talk.reply().await;
    });
    counted(1.0, true);
    runtime.block_on(talk.finish());
    counted(0.0, false);
    scene.stop();
}

#[test]
fn a_failed_response_counts_as_the_models_error() {
    let scene = Scene::start(ALL, &THREE, &[]);
    for (name, count) in [(":status", 1.0), ("status", 2.0)] {
        scene.say(vec![
            plain(),
            body(completion("m", "test"), true),
            response_headers(&[(name, "500"), ("content-type", "application/json")], false),
            response_body("{}", true),
        ]);
        let label = r#"error_code="ModelServerError""#;
        assert_eq!(scene.epp.metric("llm_d_epp_request_error_total", label), count, "{name}");
    }
    assert_eq!(scene.epp.metric("llm_d_epp_request_total", ""), 2.0);
    scene.stop();
}

#[test]
fn filters_that_leave_nobody_refuse() {
    let config = ALL
        .replace("plugins:\n- type: queue", "plugins:\n- type: prefill-filter\n- type: queue")
        .replace("  plugins:\n", "  plugins:\n  - pluginRef: prefill-filter\n");
    let scene = Scene::start(&config, &THREE, &[]);
    let nobody =
        "inference error: ResourceExhausted - no endpoints available for the given request";
    let reason = vec![pair("x-llm-d-request-dropped-reason", "rejected-saturated")];
    let said = scene.say(llm("m", "m", "test"));
    assert_eq!(said, [Said::Immediate(429, nobody.to_owned(), reason)]);
    scene.refused("ResourceExhausted", 1.0);
    // Filters do not hold for what has no body.
    let said = scene.say(vec![headers(&[], true)]);
    assert!(matches!(said[..], [Said::Headers(..)]), "{said:?}");
    scene.stop();
}

#[test]
fn a_body_that_is_too_large_is_refused() {
    let scene = Scene::start(ALL, &THREE, &["--grpc-max-recv-msg-size=100Ki"]);
    let half = || body(vec![b' '; 60_000], false);
    let said = scene.say(vec![plain(), half(), half(), body("", true)]);
    let text = "inference error: PayloadTooLarge - request body is larger than 102400 bytes";
    assert_eq!(said, [Said::Immediate(413, text.to_owned(), Vec::new())]);
    scene.refused("PayloadTooLarge", 1.0);
    assert_eq!(scene.epp.metric("epp_immediate_responses_total", r#"code="413""#), 1.0);
    scene.stop();
}
