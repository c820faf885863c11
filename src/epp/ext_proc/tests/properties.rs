//! Where messages end changes nothing.

use proptest::{collection::vec, prelude::*, sample::Index};

use super::{dialect::*, *};
use crate::proto::ext_proc::{body_mutation::Mutation, processing_response::Response};

/// A text cut at these places.
fn cut(text: &Bytes, places: &[Index]) -> Vec<Bytes> {
    let mut places: Vec<usize> = places.iter().map(|place| place.index(text.len() + 1)).collect();
    places.sort_unstable();
    let mut rest = text.clone();
    let mut at = 0;
    let mut parts: Vec<Bytes> = Vec::new();
    for place in places {
        parts.push(rest.split_to(place - at));
        at = place;
    }
    parts.push(rest);
    parts
}

/// What the pod and the client get, and what is known afterwards.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    inbound: Option<Inbound>,
    request: Vec<u8>,
    response: Vec<u8>,
    facts: Facts,
}

fn outcome(messages: Vec<ProcessingRequest>) -> Outcome {
    let mut exchange = Exchange::new(&Arc::default());
    let mut replies = Replies::new();
    let mut outcome = Outcome::default();
    for message in messages {
        match exchange.receive(message, &mut replies) {
            Some(Ask::Route(inbound)) => {
                let new = Bytes::from_static(b"target");
                let half = inbound.body.len() / 2;
                let body = [inbound.body.slice(..half), new, inbound.body.slice(half..)];
                let answer = Routed {
                    body: Some(body.into()),
                    incoming_model: "client".to_owned(),
                    target_model: "target".to_owned(),
                    ..Routed::to("a:1")
                };
                outcome.inbound = Some(inbound);
                exchange.routed(Ok(answer), &mut replies);
            }
            Some(Ask::ResponseHeaders(_)) => {
                exchange.response_headers(HeaderEdits::new(), &mut replies);
            }
            None => {}
        }
        while let Some(reply) = replies.pop() {
            let (reply, to) = match reply.response {
                Some(Response::RequestBody(reply)) => (reply, &mut outcome.request),
                Some(Response::ResponseBody(reply)) => (reply, &mut outcome.response),
                _ => continue,
            };
            let mutation = reply.response.unwrap().body_mutation.unwrap().mutation;
            let Some(Mutation::StreamedResponse(part)) = mutation else { panic!("{mutation:?}") };
            to.extend_from_slice(&part.body);
        }
    }
    outcome.facts = exchange.finish().clone();
    // How many messages there were is the one thing that may differ.
    outcome.facts.response_chunks = 0;
    outcome
}

fn exchange_of(request: Vec<Bytes>, response: Vec<Bytes>, events: bool) -> Outcome {
    let kind = if events { "text/event-stream" } else { "application/json" };
    let mut messages = vec![request_headers(&[("a", "b")])];
    messages.extend(request.into_iter().map(request_body));
    messages.push(request_end(""));
    messages.push(response_headers(&[("content-type", kind)]));
    messages.extend(response.into_iter().map(response_body));
    messages.push(response_end(""));
    outcome(messages)
}

/// Text of which a good part is names and usages, whole and broken.
fn text() -> impl Strategy<Value = Bytes> {
    let part = prop_oneof![
        Just("data: {\"model\":\"target\",\"choices\":[]}\n\n".to_owned()),
        Just("{\"model\": \"target\"}".to_owned()),
        Just("\"model\":".to_owned()),
        Just("\"usage\":{\"prompt_tokens\":3,\"total_tokens\":5}".to_owned()),
        Just("\"usage\" : {\"output_tokens\":4}".to_owned()),
        Just("\"usage\":null".to_owned()),
        Just("\"".to_owned()),
        "[a-z\"{}: ]{0,12}",
    ];
    vec(part, 0..40).prop_map(|parts| Bytes::from(parts.concat()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_cuts_give_the_same(
        request in text(),
        response in text(),
        request_cuts in vec(any::<Index>(), 0..90),
        response_cuts in vec(any::<Index>(), 0..20),
        events in any::<bool>(),
    ) {
        let whole = exchange_of(vec![request.clone()], vec![response.clone()], events);
        let restored = String::from_utf8(response.to_vec()).unwrap()
            .replace("\"model\":\"target\"", "\"model\":\"client\"")
            .replace("\"model\": \"target\"", "\"model\": \"client\"");
        prop_assert_eq!(&whole.response, restored.as_bytes());
        prop_assert_eq!(&whole.inbound.as_ref().unwrap().body, &request);
        let parts = exchange_of(cut(&request, &request_cuts), cut(&response, &response_cuts), events);
        prop_assert_eq!(parts, whole);
    }
}
