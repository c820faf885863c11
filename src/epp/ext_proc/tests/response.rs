//! Responses: streams, whole ones, usage, names written back.

use super::{dialect::*, *};
use crate::{
    epp::ext_proc::{Phase, Usage},
    proto::ext_proc::BodySendMode,
};

const MARKED: &str = "response headers x-went-into-resp-headers=true";

fn json() -> ProcessingRequest {
    response_headers(&[(":status", "200"), ("content-type", "application/json")])
}

fn events() -> ProcessingRequest {
    response_headers(&[(":status", "200"), ("content-type", "Text/Event-Stream; charset=utf-8")])
}

/// A request that was routed to another model, and what follows; without the request's replies.
fn renamed(messages: Vec<ProcessingRequest>) -> Talk {
    let request = vec![request_headers(&[]), request_end("{}")];
    let mut talk = routed(request.into_iter().chain(messages).collect(), |_| {
        let (incoming_model, target_model) = ("m".to_owned(), "m2".to_owned());
        Ok(Routed { incoming_model, target_model, ..Routed::to("192.168.1.2:8000") })
    });
    talk.said.drain(..2);
    talk
}

#[test]
fn the_clients_model_is_written_back() {
    let event = "data: {\"model\":\"m2\"}\n\n";
    let talk_1 = renamed(vec![events(), response_body(event), response_end("")]);
    check(
        &talk_1,
        &[MARKED, "response body `data: {\"model\":\"m\"}\n\n`", "response body `` end"],
    );
    let parts = [response_body("data: {\"mod"), response_body("el\": \"m2"), response_end("\"}")];
    let talk_2 = renamed([events()].into_iter().chain(parts).collect());
    check(
        &talk_2,
        &[
            MARKED,
            "response body `data: {`",
            "response body ``",
            "response body `\"model\": \"m\"}` end",
        ],
    );
    let parts = vec![json(), response_body("{\"model\":\"m"), response_end("2\"}")];
    check(&renamed(parts), &[MARKED, "response body `{\"model\":\"m\"}` end"]);
    let trailers = vec![events(), response_body("{\"model\":"), response_trailers()];
    let said = ["response body `{`", "response body `\"model\":`", "response trailers"];
    check(&renamed(trailers), &[MARKED, said[0], said[1], said[2]]);
}

#[test]
fn a_stream_is_what_the_client_asked_for_too() {
    let messages = vec![request_headers(&[]), request_end(""), json(), response_body("a")];
    let talk = routed(messages, |_| Ok(Routed { stream: true, ..Routed::to("a:1") }));
    assert_eq!(talk.said[2..], [MARKED, "response body `a`"]);
    assert!(talk.facts.streaming && !talk.facts.ended && talk.facts.phase == Phase::Responding);
}

/// A stream whose usage nobody asked for, in this mode, and the report at its end.
fn hidden(mode: i32, messages: Vec<ProcessingRequest>) -> Talk {
    let mut first = request_headers(&[]);
    first.protocol_config = Some(crate::proto::ext_proc::ProtocolConfiguration {
        request_body_mode: BodySendMode::FullDuplexStreamed as i32,
        response_body_mode: mode,
    });
    let messages = [first, request_end("{}")].into_iter().chain(messages).collect();
    let mut talk = routed(messages, |_| {
        Ok(Routed { stream: true, hides_usage: true, ..Routed::to("192.168.1.2:8000") })
    });
    talk.said.drain(..2);
    talk
}

#[test]
fn usage_that_nobody_asked_for_is_taken_out() {
    const FIRST: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
    const LAST: &str =
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"total_tokens\":5}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";
    let usage = Some(Usage { prompt: 3, completion: 0, total: 5, cached: None });
    let parts = || {
        let (one, two) = LAST.split_at(20);
        let tail = format!("{two}{DONE}");
        let first = format!("{FIRST}{one}");
        vec![events(), response_body(first), response_body(tail), response_end("")]
    };
    let talk = hidden(BodySendMode::FullDuplexStreamed as i32, parts());
    let (first, done) = (format!("response body `{FIRST}`"), format!("response body `{DONE}`"));
    check(&talk, &[MARKED, &first, &done, "response body `` end"]);
    assert_eq!(talk.facts.usage, usage);

    // Nothing is said while all of it is held back.
    let whole = vec![events(), response_body(&LAST[..20]), response_end(&LAST[20..])];
    let talk = hidden(BodySendMode::FullDuplexStreamed as i32, whole);
    check(&talk, &[MARKED, "response body `` end"]);
    let trailers = vec![events(), response_body(&FIRST[..9]), response_trailers()];
    let talk = hidden(BodySendMode::FullDuplexStreamed as i32, trailers);
    check(&talk, &[MARKED, "response body `data: {\"c`", "response trailers"]);

    // One reply per chunk.
    let talk = hidden(BodySendMode::Streamed as i32, parts());
    assert_eq!((talk.said.len(), talk.facts.usage), (4, usage), "{:?}", talk.said);
    assert!(talk.said[1].contains(FIRST) && !talk.said[1].contains("\"choices\":[]"));
    assert!(talk.said[2].contains(DONE) && !talk.said[2].contains("usage"), "{:?}", talk.said);

    let buffered = vec![events(), response_end(format!("{FIRST}{LAST}{DONE}"))];
    let talk = hidden(BodySendMode::Buffered as i32, buffered);
    assert_eq!((talk.said.len(), talk.facts.usage), (2, usage));
    assert!(talk.said[1].contains(&format!("{FIRST}{DONE}")), "{:?}", talk.said);
    let length = format!("Content-Length={}", FIRST.len() + DONE.len());
    assert!(talk.said[1].to_lowercase().contains(&length.to_lowercase()), "{:?}", talk.said);
}

#[test]
fn a_report_goes_out_with_the_last_reply() {
    let mut replies = Replies::new();
    replies.report(&[("a", 1.0)]);
    assert!(replies.is_empty(), "there is nothing to go with");
    let mut exchange = Exchange::new(&Arc::default());
    exchange.receive(events(), &mut replies);
    exchange.response_headers(HeaderEdits::new(), &mut replies);
    exchange.receive(response_end("a"), &mut replies);
    replies.report(&[]);
    assert!(replies.iter().all(|reply| reply.dynamic_metadata.is_none()));
    replies.report(&[("actual", 48.0), ("predicted", f64::NAN)]);
    let first = replies.pop().unwrap();
    assert_eq!(first.dynamic_metadata, None);
    let metadata = replies.pop().unwrap().dynamic_metadata.unwrap();
    let text = format!("{metadata:?}");
    assert!(text.contains("\"kv-indexer\"") && text.contains("\"actual\""), "{text}");
    assert!(text.contains("48.0") && !text.contains("predicted"), "{text}");
}

#[test]
fn an_untouched_event_is_the_same_bytes() {
    use crate::proto::ext_proc::{body_mutation::Mutation, processing_response::Response};

    let mut exchange = Exchange::new(&Arc::default());
    let mut replies = Replies::new();
    exchange.receive(events(), &mut replies);
    exchange.response_headers(HeaderEdits::new(), &mut replies);
    replies.pop();
    let event = Bytes::from_static(b"data: {\"choices\":[]}\n\n");
    exchange.receive(response_body(event.clone()), &mut replies);
    let Some(Response::ResponseBody(reply)) = replies.pop().unwrap().response else {
        unreachable!("a body");
    };
    let Some(Mutation::StreamedResponse(part)) =
        reply.response.unwrap().body_mutation.unwrap().mutation
    else {
        unreachable!("a chunk");
    };
    assert_eq!((part.body.as_ptr(), part.body.len()), (event.as_ptr(), event.len()));
}

#[test]
fn hooks_may_set_response_headers() {
    let mut exchange = Exchange::new(&Arc::default());
    let mut replies = Replies::new();
    let message = served_by(response_headers_only(&[(":status", "204"), ("a", "b")]), "10.0.0.9:1");
    let Some(Ask::ResponseHeaders(headers)) = exchange.receive(message, &mut replies) else {
        unreachable!("headers are asked about");
    };
    assert_eq!(headers.get("a"), Some("b"));
    let mut edits = HeaderEdits::new();
    edits.set("x-session-token", "dG9rZW4=");
    edits.remove("server");
    exchange.response_headers(edits, &mut replies);
    let want = "response headers x-went-into-resp-headers=true x-session-token=dG9rZW4= -server";
    assert_eq!(dialect::written(&replies.pop().unwrap()), want);
    let facts = exchange.facts();
    assert_eq!((facts.response_status, facts.phase), (Some(204), Phase::Ended));
    assert_eq!(facts.served.as_deref(), Some("10.0.0.9:1"));
    assert!(!facts.first_response_body);
}

#[test]
fn trailers_end_a_response() {
    let grpc = || response_headers(&[(":status", "200"), ("content-type", "application/grpc")]);
    let talk_1 = talk(vec![grpc(), response_body("a"), response_body("b"), response_trailers()]);
    check(&talk_1, &[MARKED, "response body `ab`", "response trailers"]);
    assert_eq!(talk_1.after, [1, 1, 1, 3]);
    assert!(talk_1.facts.ended);
    let talk_2 = talk(vec![events(), response_body("a"), response_trailers(), response_end("")]);
    check(&talk_2, &[MARKED, "response body `a`", "response trailers"]);
    check(&talk(vec![grpc(), response_trailers()]), &[MARKED, "response trailers"]);
    check(&talk(vec![response_trailers(), response_trailers()]), &["response trailers"]);
}

#[test]
fn a_whole_response_is_held_within_limits() {
    let config = ExchangeConfig { max_response_bytes: 100, ..ExchangeConfig::default() };
    let usage = "{\"usage\":{\"prompt_tokens\":1}}";
    let messages = vec![
        json(),
        response_body(long(60)),
        response_body(long(60)),
        response_body("c"),
        response_end(usage),
    ];
    let talk_1 = talk_with(&config, messages, to_pod_2);
    let two = format!("response body `{0}{0}`", String::from_utf8_lossy(&long(60)));
    check(&talk_1, &[MARKED, &two, "response body `c`", &format!("response body `{usage}` end")]);
    assert_eq!(talk_1.after, [1, 1, 2, 3, 4]);
    assert_eq!(talk_1.facts.usage.map(|usage| usage.prompt), Some(1));

    let talk_2 = talk(vec![json(), response_body(long(124_300)), response_end("")]);
    let chunk = "response body <62000 bytes>";
    check(&talk_2, &[MARKED, chunk, chunk, "response body <300 bytes> end"]);
}

#[test]
fn the_other_modes_get_a_reply_per_message() {
    let said = |mode, messages: Vec<ProcessingRequest>| {
        let mut all = vec![first(request_headers_only(&[]), Mode::FullDuplexStreamed, mode)];
        all.extend(messages);
        let mut talk = routed(all, |_| {
            let (incoming_model, target_model) = ("m".to_owned(), "m2".to_owned());
            Ok(Routed { incoming_model, target_model, ..Routed::to("a:1") })
        });
        talk.said.drain(..1);
        talk
    };
    let model = r#"{"model":"m2","usage":{"input_tokens":5,"output_tokens":6}}"#;
    let talk_1 = said(Mode::Buffered, vec![json(), response_end(model)]);
    let replaced = r#"replaced by `{"model":"m","usage":{"input_tokens":5,"output_tokens":6}}`"#;
    check(&talk_1, &[MARKED, &format!("response body Content-Length=58 {replaced}")]);
    assert_eq!(talk_1.facts.usage.map(|usage| usage.total), Some(11));
    check(&said(Mode::Buffered, vec![json(), response_end("{}")]), &[MARKED, "response body"]);

    let parts =
        vec![events(), response_body("data: \""), response_body(model), response_trailers()];
    let talk_2 = said(Mode::Streamed, parts);
    let replaced = format!("response body {replaced}");
    check(&talk_2, &[MARKED, "response body", &replaced, "response trailers"]);
    assert!(talk_2.facts.ended);

    let none = said(Mode::None, vec![json()]);
    check(&none, &[MARKED]);
    assert!(none.facts.ended);
}

#[test]
fn a_response_before_the_routing_is_envoys_own() {
    // Envoy gave up on the client while we had half of its body: nothing is routed for it.
    let talk_1 = talk(vec![
        request_headers(&[]),
        request_body("a"),
        json(),
        request_end("b"),
        response_end("c"),
    ]);
    check(&talk_1, &[MARKED, "response body `c` end"]);
    assert!(talk_1.inbound.is_empty() && !talk_1.facts.routed && talk_1.facts.ended);
}

#[test]
fn response_headers_may_be_skipped() {
    let talk_1 =
        talk(vec![request_headers_only(&[]), response_body("a"), response_end("b"), json()]);
    assert_eq!(talk_1.said[1..], ["response body `ab` end"]);
    assert!(talk_1.facts.ended);
}

#[test]
fn usage_of_every_api_is_found() {
    #[track_caller]
    fn check(body: &str, want: Option<(u64, u64, u64, Option<u64>)>) {
        let want = want.map(|(prompt, completion, total, cached)| Usage {
            prompt,
            completion,
            total,
            cached,
        });
        let parts = |size| body.as_bytes().chunks(size).map(Bytes::copy_from_slice);
        for size in [1, 2, 3, 7, 64, usize::MAX] {
            let mut messages = vec![events()];
            messages.extend(parts(size).map(response_body));
            messages.push(response_end(""));
            assert_eq!(talk(messages).facts.usage, want, "in parts of {size}");
        }
    }
    // OpenAI: null until the last event; unary; pretty.
    check(
        "data: {\"choices\":[{}],\"usage\":null}\n\n\
         data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":10,\"total_tokens\":17,\
         \"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\ndata: [DONE]\n\n",
        Some((7, 10, 17, Some(4))),
    );
    check(
        "{\"choices\": [ ],\n  \"usage\" :\n {\n \"prompt_tokens\": 7,\n \"total_tokens\": 7,\
         \"completion_tokens\": null, \"prompt_tokens_details\": null } }",
        Some((7, 0, 7, None)),
    );
    // Continuous usage: the last one counts.
    check(
        "data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":1,\"total_tokens\":8}}\n\n\
         data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2,\"total_tokens\":9}}\n\n",
        Some((7, 2, 9, None)),
    );
    // Responses.
    check(
        "event: response.created\ndata: {\"response\":{\"usage\":null}}\n\n\
         event: response.completed\ndata: {\"response\":{\"usage\":{\"input_tokens\":36,\
         \"input_tokens_details\":{\"cached_tokens\":3},\"output_tokens\":87,\
         \"output_tokens_details\":{\"reasoning_tokens\":0},\"total_tokens\":123}}}\n\n",
        Some((36, 87, 123, Some(3))),
    );
    // Anthropic: start and delta.
    check(
        "event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":25,\
         \"cache_read_input_tokens\":5,\"output_tokens\":1}}}\n\n\
         event: message_delta\ndata: {\"delta\":{},\"usage\":{\"output_tokens\":15}}\n\n",
        Some((25, 15, 40, Some(5))),
    );
    // Text about usage is none, nor is what is no usage.
    check("{\"content\":\"say \\\"usage\\\":{\\\"prompt_tokens\\\":1}\"}", None);
    check("{\"content\":\"usage\",\"usage\":\"none\"}", None);
    check("{\"usage\":{}}", None);
    check("{\"usage\":{\"prompt_tokens\":-1}}", None);
    check("{\"usage\":{\"prompt_tokens\":1", None);
    check("{\"usage\":{\"note\":\"}\\\"{\",\"prompt_tokens\":1}}", Some((1, 0, 1, None)));
    check("\"usage\":\"usage\":{\"prompt_tokens\":2}", Some((2, 0, 2, None)));
    let huge = format!("{{\"usage\":{{\"note\":\"{}\"", "x".repeat(20_000));
    check(&format!("{huge}}}}}"), None);
}
