//! The wire part of llm-d-router's hermetic tests (test/integration/epp), with the pick scripted:
//! what is asked, and what goes out for each answer. `Content-Length` is on, as in Go; the client's
//! own headers are not set again.

use super::{dialect::*, *};
use crate::epp::director::{DropReason, RefusalCode};

const HEADERS: [(&str, &str); 4] = [
    ("hi", "mom"),
    ("x-request-id", "test-request-id"),
    ("x-llm-d-inference-objective", "sql-lora"),
    ("x-llm-d-model-name-rewrite", "sql-lora-1fdg2"),
];
const BODY: &str =
    r#"{"max_tokens":100,"model":"sql-lora-1fdg2","prompt":"test1","temperature":0}"#;

fn like_go() -> ExchangeConfig {
    ExchangeConfig { always_content_length: true, ..ExchangeConfig::default() }
}

fn routed_to(pod: &str, content_length: usize) -> String {
    format!(
        "request headers clear x-gateway-destination-endpoint={pod} \
         Content-Length={content_length} {{envoy.lb: {{x-gateway-destination-endpoint: {pod}}}}}"
    )
}

/// ReqLLM: headers, and the body in one message.
fn req_llm(body: &'static str) -> Vec<ProcessingRequest> {
    vec![request_headers(&HEADERS), request_end(body)]
}

#[test]
fn success_is_headers_and_the_same_body() {
    // Select by queue and kv cache, by active LoRA, despite higher kv, without shedding; the
    // passthrough parser; a model that no objective names: on the wire they differ by the pod.
    for pod in ["192.168.1.1:8000", "192.168.1.2:8000", "192.168.1.3:8000"] {
        for body in [BODY, "passthrough-parser"] {
            let talk = talk_with(&like_go(), req_llm(body), |inbound| {
                assert_eq!(inbound.headers.get("x-request-id"), Some("test-request-id"));
                assert_eq!(inbound.headers.iter().count(), 4);
                assert_eq!((&inbound.body[..], &inbound.subset), (body.as_bytes(), &None));
                assert!(!inbound.header_only && !inbound.body_hidden);
                Ok(Routed::to(pod))
            });
            check(&talk, &[&routed_to(pod, body.len()), &format!("request body `{body}` end")]);
            assert_eq!(talk.after, [0, 2]);
        }
    }
}

#[test]
fn a_body_split_across_chunks_is_one() {
    let (one, two) = BODY.split_at(20);
    let messages = vec![request_headers(&HEADERS), request_body(one), request_end(two)];
    let talk = talk_with(&like_go(), messages, |inbound| {
        assert_eq!(inbound.body, BODY);
        Ok(Routed::to("192.168.1.1:8000"))
    });
    let body = format!("request body `{BODY}` end");
    check(&talk, &[&routed_to("192.168.1.1:8000", BODY.len()), &body]);
    assert_eq!(talk.after, [0, 0, 2]);
}

#[test]
fn a_rewritten_model_changes_body_and_length() {
    let talk = talk_with(&like_go(), req_llm(r#"{"model":"a","prompt":"p"}"#), |inbound| {
        let (head, tail) = (inbound.body.slice(..9), inbound.body.slice(12..));
        let body = Some([head, Bytes::from_static(b"\"bcd\""), tail].into());
        Ok(Routed { body, ..Routed::to("192.168.1.1:8000") })
    });
    let body = r#"request body `{"model":"bcd","prompt":"p"}` end"#;
    check(&talk, &[&routed_to("192.168.1.1:8000", 28), body]);
}

#[test]
fn refusals_are_immediate() {
    #[track_caller]
    fn refused(messages: Vec<ProcessingRequest>, refusal: &Refusal, want: &str) {
        let mut messages = messages;
        // Whatever Envoy has on its way is not answered.
        messages.extend([request_end(""), request_trailers(), response_headers(&[])]);
        let talk = talk_with(&like_go(), messages, |_| Err(refusal.clone()));
        check(&talk, &[want]);
        assert!(talk.finished && talk.facts.refused == Some(refusal.code) && !talk.facts.routed);
    }
    refused(
        req_llm("no healthy upstream"),
        &Refusal::new(
            RefusalCode::BadRequest,
            "error unmarshaling request bodyMap: invalid character 'o' in literal null (expecting 'u')",
        ),
        "answer 400 inference error: BadRequest - error unmarshaling request bodyMap: \
         invalid character 'o' in literal null (expecting 'u')",
    );
    refused(
        vec![request_headers_only(&HEADERS)],
        &Refusal::new(RefusalCode::Internal, "no pods available in datastore"),
        "answer 500 inference error: Internal - no pods available in datastore",
    );
    refused(
        req_llm(r#"{"prompt":"hello world"}"#),
        &Refusal::new(RefusalCode::BadRequest, "model not found in request body"),
        "answer 400 inference error: BadRequest - model not found in request body",
    );
    let none = "failed to find endpoint candidates for serving the request";
    refused(
        req_llm(BODY),
        &Refusal::new(RefusalCode::ServiceUnavailable, none)
            .because(DropReason::RejectedNoEndpoints),
        "answer 503 x-llm-d-request-dropped-reason=rejected-no-endpoints \
         inference error: ServiceUnavailable - \
         failed to find endpoint candidates for serving the request",
    );
    let none = "no endpoints available for the given request";
    refused(
        req_llm(BODY),
        &Refusal::new(RefusalCode::ResourceExhausted, none).because(DropReason::RejectedSaturated),
        "answer 429 x-llm-d-request-dropped-reason=rejected-saturated \
         inference error: ResourceExhausted - no endpoints available for the given request",
    );
}

#[test]
fn the_subset_is_the_newest_hint() {
    use prost_types::value::Kind;

    #[track_caller]
    fn subset(messages: Vec<ProcessingRequest>, want: Option<&[&str]>) {
        let talk = talk(messages);
        let found = talk.inbound[0].subset.as_deref();
        let found: Option<Vec<&str>> = found.map(|all| all.iter().map(String::as_str).collect());
        assert_eq!(found.as_deref(), want);
    }
    let head = || request_headers(&HEADERS);
    let pods = ["192.168.1.1:8000", "192.168.1.3:8000"];
    // Select best, partial and none differ in what the picker finds there.
    subset(vec![head(), hinting(request_end(BODY), &pods)], Some(&pods));
    subset(vec![head(), request_body(BODY), hinting(request_end(""), &pods)], Some(&pods));
    subset(vec![hinting(head(), &pods), request_end(BODY)], Some(&pods));
    subset(vec![hinting(head(), &["a"]), hinting(request_end(BODY), &pods)], Some(&pods));
    subset(vec![head(), hinting(request_end(BODY), &[])], Some(&[]));
    subset(vec![hinting(request_headers_only(&HEADERS), &pods)], Some(&pods));
    subset(vec![head(), request_end(BODY)], None);
    let text = |text: &str| Kind::StringValue(text.to_owned());
    let commas = hinting_as(request_end(BODY), text("192.168.1.1:8000, 192.168.1.3:8000"));
    subset(vec![head(), commas], Some(&pods));
    subset(vec![head(), hinting_as(request_end(BODY), text(" "))], None);
    subset(vec![head(), hinting_as(request_end(BODY), Kind::NumberValue(1.0))], None);
}

#[test]
fn a_request_without_body_has_no_length() {
    let talk = talk_with(&like_go(), vec![request_headers_only(&HEADERS)], |inbound| {
        assert!(inbound.header_only && !inbound.body_hidden && inbound.body.is_empty());
        let mut routed = Routed::to("192.168.1.1:8000");
        routed.edits.set("x-request-id", "new");
        Ok(routed)
    });
    let want = "request headers clear x-gateway-destination-endpoint=192.168.1.1:8000 \
                x-request-id=new {envoy.lb: {x-gateway-destination-endpoint: 192.168.1.1:8000}}";
    check(&talk, &[want]);
}

#[test]
fn a_response_alone_is_buffered() {
    const MARKED: &str = "response headers x-went-into-resp-headers=true";
    let json = || response_headers(&[("content-type", "application/json")]);
    let usage =
        r#"{"model":"m","usage":{"prompt_tokens":7,"total_tokens":17,"completion_tokens":10}}"#;
    let (one, two) = usage.split_at(30);

    let talk_1 = talk(vec![json(), response_body(one), response_end(two)]);
    check(&talk_1, &[MARKED, &format!("response body `{usage}` end")]);
    assert_eq!(talk_1.after, [1, 1, 2]);
    let found = talk_1.facts.usage.unwrap();
    assert_eq!((found.prompt, found.completion, found.total, found.cached), (7, 10, 17, None));

    let talk_2 = talk(vec![json(), response_body("no healthy "), response_end("upstream")]);
    check(&talk_2, &[MARKED, "response body `no healthy upstream` end"]);
    assert_eq!(talk_2.facts.usage, None);

    let talk_3 = talk(vec![json(), response_body(usage), response_end("")]);
    check(&talk_3, &[MARKED, &format!("response body `{usage}` end")]);
    assert!(talk_3.facts.ended && talk_3.facts.first_response_body && !talk_3.facts.streaming);
}

#[test]
fn events_are_passed_on_one_by_one() {
    let last = "data: {\"usage\":{\"prompt_tokens\":7,\"total_tokens\":17,\"completion_tokens\":10}}\n\
                data: [DONE]";
    let talk = talk(vec![
        response_headers(&[("content-type", "text/event-stream"), ("status", "200")]),
        response_body("data: {}\n\n"),
        response_body(last),
        response_end(""),
    ]);
    check(
        &talk,
        &[
            "response headers x-went-into-resp-headers=true",
            "response body `data: {}\n\n`",
            &format!("response body `{last}`"),
            "response body `` end",
        ],
    );
    assert_eq!(talk.after, [1, 2, 3, 4]);
    assert_eq!((talk.facts.response_status, talk.facts.response_chunks), (Some(200), 3));
    assert_eq!(talk.facts.usage.map(|usage| usage.prompt), Some(7));
}
