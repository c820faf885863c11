//! How bodies are sent, how they end, and what becomes of headers.

use super::{dialect::*, *};
use crate::epp::{director::RefusalCode, ext_proc::Phase};

const HEAD: [(&str, &str); 3] =
    [(":path", "/v1/completions"), (":method", "POST"), ("content-length", "3")];
/// The reply to headers that change nothing but the destination.
const TO_POD_2: &str = "request headers clear x-gateway-destination-endpoint=192.168.1.2:8000 \
                        {envoy.lb: {x-gateway-destination-endpoint: 192.168.1.2:8000}}";

#[test]
fn a_duplex_body_ends_in_three_ways() {
    let head = || first(request_headers(&HEAD), Mode::FullDuplexStreamed, Mode::FullDuplexStreamed);
    // By the flag, on the last bytes or on an empty message, which Envoy 1.40 always sends.
    let one = talk(vec![head(), request_end("abc")]);
    check(&one, &[TO_POD_2, "request body `abc` end"]);
    let two = talk(vec![head(), request_body("abc"), request_end("")]);
    check(&two, &[TO_POD_2, "request body `abc` end"]);
    assert_eq!(two.after, [0, 0, 2]);
    // By trailers: no end is said in the body, the trailers say it.
    let three = talk(vec![head(), request_body("abc"), request_trailers()]);
    check(&three, &[TO_POD_2, "request body `abc`", "request trailers"]);
    assert_eq!(three.inbound[0].body, "abc");
    // An empty body is a body; without any message about it there must be no reply about it.
    check(&talk(vec![head(), request_end("")]), &[TO_POD_2, "request body `` end"]);
    let talk_5 = talk(vec![head(), request_body(""), request_trailers()]);
    check(&talk_5, &[TO_POD_2, "request trailers"]);
    check(&talk(vec![head(), request_trailers()]), &[TO_POD_2, "request trailers"]);
    // An Envoy that does not say how it sends bodies does it so.
    let silent = talk(vec![request_headers(&HEAD), request_body("abc"), request_end("")]);
    check(&silent, &[TO_POD_2, "request body `abc` end"]);
    // Only the first message counts.
    let late = first(request_end("abc"), Mode::Buffered, Mode::Buffered);
    check(&talk(vec![head(), late]), &[TO_POD_2, "request body `abc` end"]);
}

#[test]
fn what_follows_the_end_is_ignored() {
    let messages = vec![
        request_headers(&HEAD),
        request_end("abc"),
        request_end(""),
        request_body("more"),
        request_trailers(),
        request_headers(&HEAD),
    ];
    let talk = talk(messages);
    check(&talk, &[TO_POD_2, "request body `abc` end"]);
    assert_eq!((talk.inbound.len(), talk.facts.request_bytes), (1, 3));
}

#[test]
fn long_bodies_go_out_in_chunks() {
    let talk_1 = talk(vec![request_headers(&HEAD), request_body(long(130_025)), request_end("")]);
    let chunks = ["request body <62000 bytes>"; 2];
    check(&talk_1, &[TO_POD_2, chunks[0], chunks[1], "request body <6025 bytes> end"]);
    let messages = vec![request_headers(&HEAD), request_body(long(62_300)), request_trailers()];
    let talk_2 = talk(messages);
    check(&talk_2, &[TO_POD_2, chunks[0], "request body <300 bytes>", "request trailers"]);
}

#[test]
fn a_body_of_one_message_is_not_copied() {
    let body = long(300_072);
    let talk = talk(vec![request_headers(&HEAD), request_body(body.clone()), request_end("")]);
    assert_eq!(talk.inbound[0].body.as_ptr(), body.as_ptr());
    let body = long(100);
    let parts =
        vec![request_headers(&HEAD), request_body(body.slice(..50)), request_end(body.slice(50..))];
    assert_eq!(super::talk(parts).inbound[0].body, body);
}

#[test]
fn a_body_beyond_the_limit_is_refused() {
    let config = ExchangeConfig { max_body_bytes: 100, ..ExchangeConfig::default() };
    let want =
        "answer 413 inference error: PayloadTooLarge - request body is larger than 100 bytes";
    let head = || request_headers(&HEAD);
    let messages = vec![head(), request_body(long(60)), request_body(long(41)), request_end("")];
    let talk_1 = talk_with(&config, messages, to_pod_2);
    check(&talk_1, &[want]);
    assert_eq!(talk_1.facts.refused, Some(RefusalCode::PayloadTooLarge));
    assert!(talk_1.finished && talk_1.inbound.is_empty() && talk_1.facts.phase == Phase::Refused);
    let fits = talk_with(&config, vec![head(), request_end(long(100))], to_pod_2);
    assert!(fits.facts.routed);
    let head = first(head(), Mode::Buffered, Mode::Buffered);
    let talk_2 = talk_with(&config, vec![head, request_end(long(101))], to_pod_2);
    check(&talk_2, &["request headers", want]);
}

#[test]
fn a_buffered_body_is_answered_with_the_routing() {
    let head = || first(request_headers(&HEAD), Mode::Buffered, Mode::Buffered);
    let want = "request body clear x-gateway-destination-endpoint=192.168.1.2:8000 \
                {envoy.lb: {x-gateway-destination-endpoint: 192.168.1.2:8000}}";
    let talk_1 = talk(vec![head(), request_end("abc")]);
    check(&talk_1, &["request headers", want]);
    assert_eq!(talk_1.after, [1, 2]);
    // Trailers follow: the body is whole without the flag.
    let talk_2 = talk(vec![head(), request_body("abc"), request_trailers(), request_trailers()]);
    check(&talk_2, &["request headers", want, "request trailers"]);
    // Trailers only: too late for the headers.
    let talk_3 = talk(vec![head(), request_trailers()]);
    let metadata = "{envoy.lb: {x-gateway-destination-endpoint: 192.168.1.2:8000}}";
    check(&talk_3, &["request headers", &format!("request trailers {metadata}")]);

    let rewrite = |inbound: &Inbound| {
        let body =
            Some([inbound.body.slice(..1), Bytes::from_static(b"new")].into_iter().collect());
        Ok(Routed { body, ..Routed::to("192.168.1.2:8000") })
    };
    let talk_4 = routed(vec![head(), request_end("abc")], rewrite);
    let want = "request body clear x-gateway-destination-endpoint=192.168.1.2:8000 \
                Content-Length=4 replaced by `anew` \
                {envoy.lb: {x-gateway-destination-endpoint: 192.168.1.2:8000}}";
    check(&talk_4, &["request headers", want]);
    let head = first(request_headers_only(&HEAD), Mode::Buffered, Mode::Buffered);
    check(&talk(vec![head]), &[TO_POD_2]);
}

#[test]
fn without_a_body_in_time_the_headers_decide() {
    for mode in [Mode::None, Mode::Streamed] {
        let head = first(request_headers(&HEAD), mode, Mode::None);
        let talk = talk(vec![
            head,
            request_body("abc"),
            request_end(""),
            request_end(""),
            request_trailers(),
            response_headers(&[(":status", "200")]),
        ]);
        let went = "response headers x-went-into-resp-headers=true";
        check(&talk, &[TO_POD_2, "request body", "request body", went]);
        let inbound = &talk.inbound[0];
        assert!(inbound.body_hidden && !inbound.header_only && inbound.body.is_empty());
        assert_eq!((talk.facts.request_bytes, talk.facts.response_status), (3, Some(200)));
        assert!(talk.facts.ended, "its body is not ours to see");
    }
    let head = first(request_headers(&HEAD), Mode::Streamed, Mode::Streamed);
    let talk = talk(vec![head, request_body("abc"), request_trailers(), request_end("")]);
    check(&talk, &[TO_POD_2, "request body", "request trailers"]);
}

#[test]
fn only_headers_that_change_are_named() {
    let sidecar = [
        ("X-Prefiller-Host-Port", "6.6.6.6:1"),
        ("x-encoder-hosts-ports", "6.6.6.6:2"),
        ("x-data-parallel-host-port", "6.6.6.6:3"),
        ("x-gateway-destination-endpoint", "6.6.6.6:4"),
    ];
    // A client's hop headers go, unless the picker sets them; its destination is overwritten.
    let talk_1 = routed(vec![request_headers(&sidecar), request_end("abc")], |_| {
        let mut routed = Routed::to("192.168.1.2:8000");
        routed.edits.set("x-encoder-hosts-ports", "192.168.1.3:8000");
        routed.edits.remove("x-prefiller-host-port");
        routed.edits.remove("x-kv-cache-source-host-port");
        routed.edits.remove("x-other");
        // What is not ours to leave to plugins, and what Envoy would refuse the reply for.
        routed.edits.set("X-Gateway-Destination-Endpoint", "6.6.6.6:5");
        routed.edits.set("content-length", "99");
        routed.edits.set("x-bad-value", "a\nb");
        routed.edits.set("bad name", "a");
        routed.edits.set("x-tab", "a\tb\u{e9}");
        Ok(routed)
    });
    let want = "request headers clear x-gateway-destination-endpoint=192.168.1.2:8000 \
                x-encoder-hosts-ports=192.168.1.3:8000 x-tab=a\tb\u{e9} \
                -x-other -x-prefiller-host-port -x-data-parallel-host-port \
                {envoy.lb: {x-gateway-destination-endpoint: 192.168.1.2:8000}}";
    check(&talk_1, &[want, "request body `abc` end"]);
    assert_eq!(talk_1.inbound[0].headers.get("x-prefiller-host-port"), Some("6.6.6.6:1"));

    // Buffered: at once, as there may be no body to set the others with.
    let head = || first(request_headers(&sidecar), Mode::Buffered, Mode::Buffered);
    let without = "request headers -x-prefiller-host-port -x-encoder-hosts-ports \
                   -x-data-parallel-host-port -x-gateway-destination-endpoint";
    let talk_3 = talk(vec![head(), request_trailers()]);
    let metadata = "{envoy.lb: {x-gateway-destination-endpoint: 192.168.1.2:8000}}";
    check(&talk_3, &[without, &format!("request trailers {metadata}")]);

    // Without a body too.
    let talk_2 = talk(vec![request_headers_only(&sidecar[..1])]);
    let want = "request headers clear x-gateway-destination-endpoint=192.168.1.2:8000 \
                -x-prefiller-host-port \
                {envoy.lb: {x-gateway-destination-endpoint: 192.168.1.2:8000}}";
    check(&talk_2, &[want]);
}

#[test]
fn scores_are_told_on_request() {
    let talk = routed(vec![request_headers(&HEAD), request_end("abc")], |_| {
        let score = |pod: &str, score| (pod.to_owned(), score);
        let scores = [score("192.168.1.1:8000", 0.5), score("a", f64::NAN), score("b", 2.0)];
        Ok(Routed { scores: Some(scores.into()), ..Routed::to("a:1,b:2") })
    });
    let want = "request headers clear x-gateway-destination-endpoint=a:1,b:2 \
                {envoy.lb: {x-gateway-destination-endpoint: a:1,b:2, \
                x-gateway-destination-endpoint-scores: {192.168.1.1:8000: 0.5, b: 2}}}";
    check(&talk, &[want, "request body `abc` end"]);
}

#[test]
fn values_may_come_in_either_field() {
    let mut message = request_headers(&[("raw", "1"), ("TEXT", "")]);
    let Some(crate::proto::ext_proc::processing_request::Request::RequestHeaders(headers)) =
        &mut message.request
    else {
        unreachable!("headers");
    };
    headers.headers.as_mut().unwrap().headers[1].value = "2".to_owned();
    let talk = talk(vec![message, request_end("")]);
    let headers = &talk.inbound[0].headers;
    assert_eq!((headers.get("raw"), headers.get("text")), (Some("1"), Some("2")));
}

#[test]
fn a_response_nobody_looks_at_ends_the_exchange() {
    let messages = vec![request_headers(&HEAD), request_end("abc"), response_headers(&[])];
    let talk =
        routed(messages, |_| Ok(Routed { skip_response: true, ..Routed::to("192.168.1.2:8000") }));
    check(&talk, &[TO_POD_2, "request body `abc` end"]);
    assert!(talk.finished && talk.facts.routed && !talk.facts.ended);
}

#[test]
fn senseless_messages_are_ignored() {
    let watching = ProcessingRequest { observability_mode: true, ..request_headers_only(&HEAD) };
    let messages = vec![
        ProcessingRequest::default(),
        watching,
        request_body("lost"),
        request_trailers(),
        request_headers(&HEAD),
        request_end("abc"),
    ];
    let talk = talk(messages);
    check(&talk, &[TO_POD_2, "request body `abc` end"]);
    assert!(!talk.finished);
}

#[test]
fn questions_want_their_own_answers() {
    let mut replies = Replies::new();
    let mut exchange = Exchange::new(&Arc::default());
    // Answers that nobody asked for.
    exchange.routed(Ok(Routed::to("a:1")), &mut replies);
    exchange.response_headers(HeaderEdits::new(), &mut replies);
    assert!(replies.is_empty() && exchange.facts() == &Facts::default());
    let ask = exchange.receive(request_headers_only(&HEAD), &mut replies);
    assert!(matches!(ask, Some(Ask::Route(_))));
    exchange.response_headers(HeaderEdits::new(), &mut replies);
    // A message that could not wait.
    assert_eq!(exchange.receive(response_headers(&[]), &mut replies), None);
    assert!(replies.is_empty());
    exchange.routed(Ok(Routed::to("a:1")), &mut replies);
    exchange.routed(Ok(Routed::to("b:1")), &mut replies);
    assert_eq!((replies.len(), replies.iter().count()), (1, 1));
    exchange.finish();
    assert_eq!(exchange.receive(response_headers(&[]), &mut replies), None);
}
