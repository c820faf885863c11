//! `Explain`: each finding by name.

use kv_indexer::{
    model::PodState,
    proto::kvindexer::{self as pb, prompt::Input},
};
use tonic::Code;

use super::{
    fake::{MODEL, World, config, keys, keys_of, prompt, request, tokens},
    refused,
};

async fn explain(world: &World, pod: &str, request: pb::ScoreRequest) -> pb::ExplainResponse {
    let ask = pb::ExplainRequest { request: Some(request), pod: pod.to_owned() };
    world.client().explain(ask).await.unwrap().into_inner()
}

/// Some finding contains `text`.
#[track_caller]
fn finds(answer: &pb::ExplainResponse, text: &str) {
    let found = answer.findings.iter().any(|finding| finding.contains(text));
    assert!(found, "no {text:?} in {:#?}", answer.findings);
}

#[tokio::test]
async fn it_names_the_first_missing_block_and_who_holds_it() {
    let world = World::start().await;
    let (a, b, c) = (world.row("a", None), world.row("b", None), world.row("c", Some(1)));
    let blocks = keys(&tokens(8));
    world.index.hold(a.slot, &blocks[..5], 0);
    world.index.hold(b.slot, &blocks, 0);
    world.index.hold(c.slot, &blocks, 0);
    let answer = explain(&world, "a", request(vec![prompt(&tokens(8))])).await;
    assert_eq!(answer.first_missing_block, 5);
    assert_eq!(answer.holders, ["b", "c#1"]);
    let scores = answer.scores.clone().unwrap();
    assert_eq!((scores.total_blocks, scores.pods.len(), scores.pods[0].depth), (8, 1, 5));
    finds(&answer, "block 5 (tokens 20..24) was never stored");

    world.index.drop_key(a.slot, blocks[2], 41);
    let answer = explain(&world, "a", request(vec![prompt(&tokens(8))])).await;
    finds(&answer, "block 2 (tokens 8..12) was removed by the engine at sequence 41");
    let answer = explain(&world, "b", request(vec![prompt(&tokens(8))])).await;
    assert_eq!((answer.first_missing_block, answer.holders.len()), (8, 0));
    finds(&answer, "the pod holds all 8 blocks");
    let answer = explain(&world, "c", request(vec![prompt(&tokens(8))])).await;
    finds(&answer, "rank 1: the pod holds all 8 blocks");
    let answer = explain(&world, "a", request(vec![prompt(&tokens(0))])).await;
    finds(&answer, "shorter than one block: 0 tokens, blocks have 4");
}

#[tokio::test]
async fn it_says_what_ails_the_pod() {
    let world = World::start().await;
    let row = world.row("a", None);
    world.index.usage_of(row.slot, |usage| {
        usage.blocks = 3;
        usage.orphans = 2;
        usage.block_sizes = vec![4, 16, 6];
        usage.hybrid_unsupported = true;
    });
    row.update(|status| {
        status.state = PodState::Degraded;
        status.reason = "gap 7..9".to_owned();
        status.stale = true;
        status.rejected_events = 5;
        status.refused_blocks = 6;
        status.orphans = 9;
    });
    let answer = explain(&world, "a", request(vec![prompt(&tokens(2))])).await;
    finds(&answer, "degraded (gap 7..9)");
    finds(&answer, "stale: ");
    finds(&answer, "5 events were rejected");
    finds(&answer, "6 blocks were refused because the index is at its cap");
    finds(&answer, "2 blocks wait for a parent that was never announced, 9 ever did");
    finds(&answer, "engine blocks of 16 tokens, request blocks of 4: fine");
    finds(&answer, "engine blocks of 6 tokens, request blocks of 4: neither");
    finds(&answer, "some attention group");
    row.update(|status| (status.state, status.connected) = (PodState::Partial, false));
    let answer = explain(&world, "a", request(vec![prompt(&tokens(2))])).await;
    finds(&answer, "partial (gap 7..9)");
    finds(&answer, "not connected to tcp://a:5557");

    let new = kv_indexer::model::RowId { pod: "new".into(), rank: None };
    let row = world
        .fleet
        .add(new, "tcp://new:1", &super::fake::scheme(), &"".into(), Default::default())
        .unwrap();
    row.update(|status| status.connected = true);
    let answer = explain(&world, "new", request(vec![prompt(&tokens(2))])).await;
    finds(&answer, "no events yet from tcp://new:1");
    finds(&answer, "the pod's model is unknown");
}

#[tokio::test]
async fn it_says_which_name_would_match() {
    let world = World::start().await;
    let row = world.row("a", None);
    let salted = world.row("salted", None);
    let other = world.row_of("other", None, "mistral");
    let tokens = tokens(6);
    world.index.hold(row.slot, &keys_of(MODEL, "sql", "", &tokens), 0);
    world.index.usage_of(row.slot, |usage| usage.loras = vec!["sql".into(), "chat".into()]);
    world.index.hold(salted.slot, &keys(&tokens), 0);
    world.index.hold(other.slot, &keys_of("mistral", "", "", &tokens), 0);

    let answer = explain(&world, "a", request(vec![prompt(&tokens)])).await;
    finds(&answer, "for adapter sql, 6 blocks would match");
    assert!(!answer.findings.iter().any(|finding| finding.contains("chat")), "{answer:?}");

    let mut ask = request(vec![pb::Prompt { cache_salt: "pepper".into(), ..prompt(&tokens) }]);
    let answer = explain(&world, "salted", ask.clone()).await;
    finds(&answer, "the request is salted: without cache_salt, 6 blocks would match");
    ask.prompts[0].cache_salt.clear();
    ask.lora = "chat".to_owned();
    let answer = explain(&world, "salted", ask.clone()).await;
    finds(&answer, "for the base model instead of adapter chat, 6 blocks would match");
    ask.lora.clear();
    ask.prompts[0].multimodal =
        vec![pb::MultimodalItem { hash: "img".into(), offset: 8, length: 4 }];
    let answer = explain(&world, "salted", ask).await;
    finds(&answer, "without the multimodal items, 6 blocks would match");

    let answer = explain(&world, "other", request(vec![prompt(&tokens)])).await;
    finds(&answer, "the pod serves model mistral, the request says llama");
    finds(&answer, "under model name mistral, 6 blocks would match");

    let stranger = pb::ScoreRequest { model: "qwen".into(), ..request(vec![prompt(&tokens)]) };
    finds(
        &explain(&world, "a", stranger).await,
        "no pod serves model qwen; pods serve llama, mistral",
    );
    let alias = pb::ScoreRequest { model: "llama-alias".into(), ..request(vec![prompt(&tokens)]) };
    finds(&explain(&world, "a", alias).await, "model llama-alias is an alias of llama");

    let block_keys = pb::BlockKeys { keys: vec![1, 2] };
    let block_keys = pb::Prompt { input: Some(Input::BlockKeys(block_keys)), ..Default::default() };
    let mut ask = request(vec![block_keys]);
    ask.hash_fingerprint = config().models.scheme("coarse").fingerprint();
    let answer = explain(&world, "a", ask).await;
    finds(&answer, "the request carries block keys");
    finds(&answer, "is not that of this server");
}

/// The causes of what is found about `pod`.
async fn causes(world: &World, pod: &str) -> Vec<String> {
    let answer = explain(world, pod, request(vec![prompt(&tokens(2))])).await;
    assert_eq!(answer.causes.len(), answer.findings.len(), "{answer:?}");
    answer.causes
}

#[tokio::test]
async fn causes_name_the_engine_settings_that_break_routing() {
    let world = World::start().await;
    let quiet = world.row_of("quiet", None, "mistral");
    quiet.update(|status| (status.state, status.messages) = (PodState::Live, 0));
    let row = world.row("a", None);
    assert_eq!(causes(&world, "a").await, ["cleared", "missing", "salt"]);
    world.index.usage_of(row.slot, |usage| usage.blocks = 1);
    assert_eq!(causes(&world, "a").await, ["missing", "salt"]);
    world.index.hold(row.slot, &keys(&tokens(2)), 0);
    assert_eq!(causes(&world, "a").await, ["held"]);

    row.update(|status| (status.state, status.gaps) = (PodState::Degraded, 1));
    assert_eq!(causes(&world, "a").await, ["degraded", "no_replay", "held"]);
    row.update(|status| status.replays = 1);
    assert_eq!(causes(&world, "a").await, ["degraded", "held"]);
    row.update(|status| (status.state, status.replays) = (PodState::Partial, 0));
    assert_eq!(causes(&world, "a").await, ["partial", "no_replay", "held"]);

    // Half of them and not few.
    let repeats = |repeated, held| {
        world.index.usage_of(row.slot, |usage| {
            (usage.repeated, usage.blocks_by_tier) = (repeated, vec![held, 0]);
        });
    };
    row.update(|status| (status.state, status.gaps) = (PodState::Live, 0));
    for (repeated, held) in [(63, 64), (64, 128)] {
        repeats(repeated, held);
        assert_eq!(causes(&world, "a").await, ["held"], "{repeated} of {held}");
    }
    repeats(64, 127);
    assert_eq!(causes(&world, "a").await, ["reannounce", "held"]);
    finds(
        &explain(&world, "a", request(vec![prompt(&tokens(2))])).await,
        "64 of 127 blocks were announced again",
    );

    // The model is in use elsewhere, and this pod is connected and says nothing.
    let id = kv_indexer::model::RowId { pod: "mute".into(), rank: None };
    let scheme = super::fake::scheme();
    let mute =
        world.fleet.add(id, "tcp://mute:1", &scheme, &MODEL.into(), Default::default()).unwrap();
    assert!(!causes(&world, "mute").await.contains(&"events_off".to_owned()));
    mute.update(|status| status.connected = true);
    assert_eq!(causes(&world, "mute").await, ["no_events", "events_off", "missing", "salt"]);
    assert!(causes(&world, "quiet").await.contains(&"model_name".to_owned()));
    assert_eq!(causes(&world, "nobody").await, ["not_registered"]);
}

#[tokio::test]
async fn unknown_pods_and_illegal_requests() {
    let world = World::start().await;
    let answer = explain(&world, "vllm-0", request(vec![prompt(&tokens(2))])).await;
    finds(&answer, "pod vllm-0 is not registered: no pod is");
    world.row("vllm-10", None);
    world.row("10.0.0.7:8000", None);
    let answer = explain(&world, "vllm-1", request(vec![prompt(&tokens(2))])).await;
    finds(&answer, "pod vllm-1 is not registered; did you mean vllm-10?");
    assert_eq!((answer.first_missing_block, answer.scores.unwrap().pods.len()), (0, 0));
    let answer = explain(&world, "zzz", request(vec![prompt(&tokens(2))])).await;
    finds(&answer, "registered: 10.0.0.7:8000, vllm-10");

    let mut client = world.client();
    let mut check = async |start: &str, request, pod: &str| {
        let ask = pb::ExplainRequest { request, pod: pod.to_owned() };
        refused(client.explain(ask).await, Code::InvalidArgument, start);
    };
    let one = || Some(request(vec![prompt(&tokens(2))]));
    check("pod: ", one(), "").await;
    check("request: is missing", None, "a").await;
    check("request.prompts: exactly one prompt", Some(request(vec![])), "a").await;
    let unnamed = pb::ScoreRequest { model: String::new(), ..one().unwrap() };
    check("request.model: ", Some(unnamed), "a").await;
    check("request.prompts[0]: ", Some(request(vec![pb::Prompt::default()])), "a").await;
}
