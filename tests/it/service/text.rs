//! Prompts as text: tokenized where a tokenizer is configured, and what its refusals become.

use std::sync::Arc;

use kv_indexer::{
    hash::{MultimodalItem, Prompt},
    proto::kvindexer::{self as pb, prompt::Input},
};
use tonic::Code;

use super::{
    fake::{MODEL, WordLengths, World, config, request, scheme},
    refused,
};

fn text(text: &str) -> pb::Prompt {
    pb::Prompt { input: Some(Input::Text(text.to_owned())), ..pb::Prompt::default() }
}

#[tokio::test]
async fn each_refusal_of_a_tokenizer_has_its_status() {
    let world = World::with(config(), Some(Arc::new(WordLengths))).await;
    let check = async |body: &str, code, part: &str| {
        let status = world.client().score(request(vec![text(body)])).await.unwrap_err();
        assert_eq!(status.code(), code, "{body}: {status}");
        assert!(status.message().starts_with("prompts[0].text: "), "{body}: {status}");
        assert!(status.message().contains(part), "{body}: {status}");
    };
    check("busy", Code::ResourceExhausted, "queue is full").await;
    check("late", Code::DeadlineExceeded, "longer than allowed").await;
    check("template", Code::FailedPrecondition, "no chat template").await;
    check("picture", Code::FailedPrecondition, "multimodal").await;
    check("gone", Code::Unavailable, "no answer").await;
    let slow = pb::ScoreRequest { timeout_ms: 50, ..request(vec![text("forever")]) };
    refused(world.client().score(slow).await, Code::DeadlineExceeded, "prompts[0].text: ");
    let ask = pb::ExplainRequest { request: Some(request(vec![text("busy")])), pod: "a".into() };
    let status = world.client().explain(ask).await;
    refused(status, Code::ResourceExhausted, "request.prompts[0].text: ");
}

#[tokio::test]
async fn items_that_the_tokenizer_found_are_added_to_those_of_the_request() {
    let world = World::with(config(), Some(Arc::new(WordLengths))).await;
    let row = world.row("a", None);
    let body = "a bb ccc image d";
    let item = |hash: &str, offset| MultimodalItem { hash: hash.to_owned(), offset, length: 1 };
    let tokens = [1, 2, 3, 5, 1];
    let keys_with = |items: &[MultimodalItem]| {
        let prompt =
            Prompt { model: MODEL, lora: "", tokens: &tokens, cache_salt: "", multimodal: items };
        prompt.keys(&scheme()).unwrap()
    };
    let depth = async |prompt: pb::Prompt| {
        let answer = world.client().score(request(vec![prompt])).await.unwrap().into_inner();
        answer.prompts[0].pods.first().map_or(0, |pod| pod.depth)
    };
    world.index.hold(row.slot, &keys_with(&[item("pixels", 3)]), 0);
    assert_eq!(depth(text(body)).await, 1);
    let own = pb::MultimodalItem { hash: "own".into(), offset: 0, length: 1 };
    let both = pb::Prompt { multimodal: vec![own], ..text(body) };
    assert_eq!(depth(both.clone()).await, 0);
    world.index.hold(row.slot, &keys_with(&[item("own", 0), item("pixels", 3)]), 0);
    assert_eq!(depth(both).await, 1);

    let ask = pb::ExplainRequest { request: Some(request(vec![text(body)])), pod: "a".into() };
    let answer = world.client().explain(ask).await.unwrap().into_inner();
    assert_eq!(answer.first_missing_block, 1, "{answer:?}");
    let speculate = pb::SpeculateRequest {
        request: Some(request(vec![text("p q r s")])),
        pod: "a".into(),
        ttl_ms: 1000,
        ..pb::SpeculateRequest::default()
    };
    world.client().speculate(speculate).await.unwrap();
    assert_eq!(depth(text("p q r s")).await, 1);
}
