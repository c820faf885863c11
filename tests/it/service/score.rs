//! `Score`: rows, filters, details, refusals.

use std::sync::Arc;

use kv_indexer::{
    model::PodState,
    proto::kvindexer::{self as pb, kv_indexer_server::KvIndexer, prompt::Input},
};
use tonic::Code;

use super::{
    fake::{MODEL, World, config, keys, keys_of, prompt, request, scheme, tokens},
    refused,
};

async fn score(world: &World, request: pb::ScoreRequest) -> pb::ScoreResponse {
    world.client().score(request).await.unwrap().into_inner()
}

fn names(scores: &pb::PromptScores) -> Vec<(&str, u32)> {
    scores.pods.iter().map(|pod| (pod.pod.as_str(), pod.depth)).collect()
}

#[tokio::test]
async fn best_pods_first_one_answer_per_prompt() {
    let world = World::start().await;
    let (a, b, c) = (world.row("a", None), world.row("b", None), world.row("c", None));
    let long = keys(&tokens(8));
    world.index.hold(a.slot, &long[..3], 0);
    world.index.hold(b.slot, &long[..6], 0);
    world.index.hold(c.slot, &long[1..], 0);

    let other: Vec<u32> = (1000..1008).collect();
    let mut ask = request(vec![prompt(&tokens(8)), prompt(&other), prompt(&[1, 2, 3])]);
    ask.request_id = 77;
    let answer = score(&world, ask.clone()).await;
    assert_eq!(answer.request_id, 77);
    assert_eq!(answer.hash_fingerprint, scheme().fingerprint());
    assert_eq!(answer.slot_table_version, world.fleet.table().version);
    assert_eq!(answer.error, None);
    let [first, second, third] = answer.prompts.as_slice() else { panic!("{answer:?}") };
    assert_eq!(names(first), [("b", 6), ("a", 3)], "c lacks the first block");
    assert_eq!((first.total_blocks, first.block_size), (8, 4));
    assert_eq!((second.total_blocks, second.pods.len()), (2, 0));
    assert_eq!((third.total_blocks, third.pods.len()), (0, 0), "shorter than a block");

    ask.max_pods = 1;
    assert_eq!(names(&score(&world, ask).await.prompts[0]), [("b", 6)]);
    assert_eq!(score(&world, request(vec![])).await.prompts, []);
}

#[tokio::test]
async fn every_input_form_gives_the_same_keys() {
    let world = World::start().await;
    let row = world.row("a", None);
    let tokens = tokens(4);
    world.index.hold(row.slot, &keys(&tokens), 0);
    let ids = pb::TokenIds { ids: tokens.clone() };
    let block_keys = pb::BlockKeys { keys: keys(&tokens).iter().map(|key| key.0).collect() };
    for input in [Input::TokenIds(ids), Input::BlockKeys(block_keys)] {
        let prompt = pb::Prompt { input: Some(input), ..pb::Prompt::default() };
        assert_eq!(names(&score(&world, request(vec![prompt])).await.prompts[0]), [("a", 4)]);
    }
    let mut alias = request(vec![prompt(&tokens)]);
    alias.model = "llama-alias".to_owned();
    assert_eq!(names(&score(&world, alias).await.prompts[0]), [("a", 4)]);
}

#[tokio::test]
async fn lora_salt_and_multimodal_enter_the_keys() {
    let world = World::start().await;
    let row = world.row("a", None);
    world.index.hold(row.slot, &keys_of(MODEL, "sql", "tenant", &tokens(4)), 0);
    let mut ask = request(vec![pb::Prompt { cache_salt: "tenant".into(), ..prompt(&tokens(4)) }]);
    ask.lora = "sql".to_owned();
    assert_eq!(names(&score(&world, ask.clone()).await.prompts[0]), [("a", 4)]);
    ask.prompts[0].multimodal =
        vec![pb::MultimodalItem { hash: "img".into(), offset: 9, length: 2 }];
    assert_eq!(names(&score(&world, ask.clone()).await.prompts[0]), [("a", 2)]);
    ask.lora.clear();
    assert_eq!(names(&score(&world, ask).await.prompts[0]), []);
}

#[tokio::test]
async fn requested_pods_have_a_row_each_in_order() {
    let world = World::start().await;
    let plain = world.row("plain", None);
    let (rank0, rank1) = (world.row("dp", Some(0)), world.row("dp", Some(1)));
    world.row_of("elsewhere", None, "mistral");
    let blocks = keys(&tokens(4));
    world.index.hold(rank1.slot, &blocks[..2], 1);
    world.index.hold(plain.slot, &blocks, 0);
    rank0.update(|status| status.stale = true);

    let pods = ["dp", "ghost", "elsewhere", "plain"].map(str::to_owned).to_vec();
    let mut ask = pb::ScoreRequest { pods, ..request(vec![prompt(&tokens(4))]) };
    let rows = score(&world, ask.clone()).await.prompts.remove(0).pods;
    let short: Vec<_> =
        rows.iter().map(|row| (row.pod.as_str(), row.dp_rank, row.depth, row.state())).collect();
    assert_eq!(
        short,
        [
            ("dp", Some(0), 0, pb::PodState::Stale),
            ("dp", Some(1), 2, pb::PodState::Live),
            ("ghost", None, 0, pb::PodState::Unspecified),
            ("elsewhere", None, 0, pb::PodState::Live),
            ("plain", None, 4, pb::PodState::Live),
        ]
    );
    assert!((rows[1].score - 1.6).abs() < 1e-9, "cpu blocks weigh 0.8");

    ask.set_detail(pb::ScoreDetail::Compact);
    let compact = score(&world, ask.clone()).await.prompts.remove(0).compact.unwrap();
    let elsewhere = world.fleet.table().pod("elsewhere")[0].slot;
    let slots = [rank0.slot, rank1.slot, elsewhere, plain.slot].map(|slot| slot.0);
    assert_eq!(compact.slots, slots, "an unknown pod has no slot");
    assert_eq!(compact.depths, [0, 2, 0, 4]);
    assert_eq!(compact.scores, [0.0, 1.6, 0.0, 4.0]);

    ask.set_detail(pb::ScoreDetail::Pods);
    ask.max_pods = 2;
    assert_eq!(names(&score(&world, ask).await.prompts[0]), [("plain", 4), ("dp", 2)]);
}

#[tokio::test]
async fn details_differ_in_what_they_carry() {
    let world = World::start().await;
    let (a, b) = (world.row("a", None), world.row("b", None));
    let blocks = keys(&tokens(6));
    world.index.hold(a.slot, &blocks[..4], 0);
    world.index.hold(a.slot, &blocks[..1], 1);
    world.index.hold(b.slot, &blocks[..2], 0);
    let mut ask = request(vec![prompt(&tokens(6))]);
    let speculate = pb::SpeculateRequest {
        request: Some(ask.clone()),
        pod: "b".to_owned(),
        ttl_ms: 10_000,
        ..pb::SpeculateRequest::default()
    };
    world.client().speculate(speculate).await.unwrap();

    let rows = score(&world, ask.clone()).await.prompts.remove(0);
    assert_eq!(rows.compact, None);
    let tier = |tier: &str, depth| pb::TierDepth { tier: tier.to_owned(), depth };
    let [second, first] = rows.pods.as_slice() else { panic!("{rows:?}") };
    assert_eq!(
        (first.pod.as_str(), first.tiers.clone()),
        ("a", vec![tier("gpu", 4), tier("cpu", 1)])
    );
    assert_eq!((first.depth, first.confirmed_depth), (4, 4));
    assert_eq!((second.depth, second.confirmed_depth, second.score), (6, 2, 4.0));
    assert_eq!(second.tiers, [tier("gpu", 2), tier("speculative", 6)]);

    ask.set_detail(pb::ScoreDetail::Pods);
    let rows = score(&world, ask.clone()).await.prompts.remove(0);
    assert!(rows.compact.is_none() && rows.pods.iter().all(|pod| pod.tiers.is_empty()));
    assert_eq!(names(&rows), [("b", 6), ("a", 4)], "equal scores: the deeper one first");

    ask.set_detail(pb::ScoreDetail::Compact);
    let rows = score(&world, ask.clone()).await.prompts.remove(0);
    assert_eq!(rows.pods, []);
    let compact = rows.compact.unwrap();
    assert_eq!((compact.slots, compact.depths), (vec![b.slot.0, a.slot.0], vec![6, 4]));
    assert_eq!(compact.scores, [4.0, 4.0]);
    ask.max_pods = 1;
    ask.prompts = vec![prompt(&tokens(1))];
    let compact = score(&world, ask).await.prompts.remove(0).compact.unwrap();
    assert_eq!((compact.depths, compact.scores), (vec![1], vec![]), "scores equal to depths");
}

#[tokio::test]
async fn compact_scores_tell_what_is_confirmed() {
    let world = World::start().await;
    let (a, b) = (world.row("a", None), world.row("b", None));
    let blocks = keys(&tokens(4));
    world.index.hold(a.slot, &blocks[..2], 0);
    let ask = pb::ScoreRequest {
        detail: pb::ScoreDetail::Compact.into(),
        pods: vec!["a".into(), "b".into()],
        ..request(vec![prompt(&tokens(4))])
    };
    let compact = score(&world, ask.clone()).await.prompts.remove(0).compact.unwrap();
    assert_eq!((compact.depths, compact.confirmed), (vec![2, 0], vec![]), "equal to depths");
    world.fleet.index().speculate(a.slot, &blocks[2..3], 1);
    world.fleet.index().speculate(b.slot, &blocks[..1], 1);
    let compact = score(&world, ask).await.prompts.remove(0).compact.unwrap();
    assert_eq!((compact.depths, compact.confirmed), (vec![3, 1], vec![2, 0]));
}

#[tokio::test]
async fn every_state_has_its_name() {
    let world = World::start().await;
    let row = world.row("a", None);
    world.index.hold(row.slot, &keys(&tokens(1)), 0);
    for (state, stale, want) in [
        (PodState::Connecting, false, pb::PodState::Connecting),
        (PodState::Replaying, false, pb::PodState::Replaying),
        (PodState::Live, false, pb::PodState::Live),
        (PodState::Partial, false, pb::PodState::Partial),
        (PodState::Degraded, false, pb::PodState::Degraded),
        (PodState::Degraded, true, pb::PodState::Stale),
    ] {
        row.update(|status| (status.state, status.stale) = (state, stale));
        let answer = score(&world, request(vec![prompt(&tokens(1))])).await;
        assert_eq!(answer.prompts[0].pods[0].state(), want);
    }
}

#[tokio::test]
async fn a_pod_of_another_model_is_not_credited() {
    let world = World::start().await;
    let row = world.row_of("a", None, "mistral");
    // As with llm-d's algorithms, where an adapter's name replaces the model's.
    world.index.hold(row.slot, &keys(&tokens(4)), 0);
    assert_eq!(score(&world, request(vec![prompt(&tokens(4))])).await.prompts[0].pods, []);
    let mut nobody = request(vec![prompt(&tokens(4))]);
    nobody.model = "nobody-serves-this".to_owned();
    assert_eq!(score(&world, nobody).await.prompts[0].pods, []);
}

#[tokio::test]
async fn a_pod_that_takes_the_slot_during_a_lookup_is_not_credited() {
    let world = World::start().await;
    let (old, kept) = (world.row("old", None), world.row("kept", None));
    world.index.hold(old.slot, &keys(&tokens(4)), 0);
    world.index.hold(kept.slot, &keys(&tokens(4)), 0);
    let (fleet, slot) = (Arc::clone(&world.fleet), old.slot);
    world.index.during_lookup(move || {
        fleet.remove(slot);
        let id = kv_indexer::model::RowId { pod: "new".into(), rank: None };
        let new = fleet.add(id, "tcp://new:1", &scheme(), &MODEL.into(), Default::default());
        assert_eq!(new.unwrap().slot, slot);
    });
    let pods = ["old", "new", "kept"].map(str::to_owned).to_vec();
    let ask = pb::ScoreRequest { pods, ..request(vec![prompt(&tokens(4)); 2]) };
    let answer = score(&world, ask.clone()).await;
    for scores in &answer.prompts {
        assert_eq!(names(scores), [("old", 0), ("new", 0), ("kept", 4)]);
    }
    let later = score(&world, ask).await;
    assert!(later.slot_table_version > answer.slot_table_version);
}

#[tokio::test]
async fn illegal_fields_are_named() {
    let world = World::start().await;
    let check = |start: &'static str, change: &dyn Fn(&mut pb::ScoreRequest)| {
        let mut ask = request(vec![prompt(&tokens(4)); 4]);
        change(&mut ask);
        let mut client = world.client();
        async move {
            let status = client.score(ask).await.unwrap_err();
            let field = start.split(':').next().unwrap();
            assert!(
                status.details().windows(field.len()).any(|window| window == field.as_bytes()),
                "{field} in the details"
            );
            refused::<()>(Err(status), Code::InvalidArgument, start);
        }
    };
    let input = |input| move |ask: &mut pb::ScoreRequest| ask.prompts[3].input = input;
    check("model: ", &|ask| ask.model.clear()).await;
    check("prompts: 65 prompts, at most 64", &|ask| ask.prompts = vec![prompt(&[]); 65]).await;
    check("detail: 9", &|ask| ask.detail = 9).await;
    check("pods[1]: must not be empty", &|ask| ask.pods = vec!["a".into(), String::new()]).await;
    check("pods: 41 pods, at most 40", &|ask| ask.pods = vec!["a".into(); 41]).await;
    check("pods[0]: 65 bytes", &|ask| ask.pods = vec!["x".repeat(65)]).await;
    check("prompts[3].token_ids_le: length 7 is not a multiple of 4", &|ask| {
        ask.prompts[3].input = Some(Input::TokenIdsLe(vec![0; 7]));
    })
    .await;
    check("prompts[3]: one of", &|ask| input(None)(ask)).await;
    check("prompts[2].token_ids_le: 100001 tokens, at most 100000", &|ask| {
        ask.prompts[2] = prompt(&vec![1; 100_001]);
    })
    .await;
    check("prompts[2].token_ids: 100001 tokens", &|ask| {
        let ids = pb::TokenIds { ids: vec![1; 100_001] };
        ask.prompts[2].input = Some(Input::TokenIds(ids));
    })
    .await;
    check("prompts[3].block_keys: 25001 keys", &|ask| {
        let keys = pb::BlockKeys { keys: vec![1; 25_001] };
        ask.prompts[3].input = Some(Input::BlockKeys(keys));
    })
    .await;
    let item =
        |hash: &str, offset, length| pb::MultimodalItem { hash: hash.into(), offset, length };
    check("prompts[0].multimodal: 4 items, at most 3", &|ask| {
        ask.prompts[0].multimodal = vec![item("a", 0, 1); 4];
    })
    .await;
    check("prompts[0].multimodal[2]: multimodal item 2 covers tokens 15..17", &|ask| {
        ask.prompts[0].multimodal = vec![item("a", 0, 1), item("b", 1, 1), item("c", 15, 2)];
    })
    .await;
    check("prompts[1].multimodal: multimodal items touch ", &|ask| {
        ask.prompts[1] = prompt(&tokens(64));
        ask.prompts[1].multimodal = vec![item(&"x".repeat(1 << 18), 0, 256)];
    })
    .await;
    check("prompts[1].multimodal[0].length: ", &|ask| {
        ask.prompts[1].multimodal = vec![item("a", 0, 0)];
    })
    .await;
    check("prompts[1].multimodal[1].hash: ", &|ask| {
        ask.prompts[1].multimodal = vec![item("a", 0, 1), item("", 0, 1)];
    })
    .await;
}

#[tokio::test]
async fn another_fingerprint_is_refused_and_both_are_named() {
    let world = World::start().await;
    let mut ask = request(vec![prompt(&tokens(4))]);
    ask.hash_fingerprint = scheme().fingerprint();
    assert_eq!(score(&world, ask.clone()).await.prompts.len(), 1);
    ask.model = "coarse".to_owned();
    let status = world.client().score(ask).await.unwrap_err();
    let coarse = config().models.scheme("coarse").fingerprint();
    for fingerprint in [coarse, scheme().fingerprint()] {
        let shown = format!("{fingerprint:#018x}");
        assert!(status.message().contains(&shown), "{shown} in {}", status.message());
    }
    refused::<()>(Err(status), Code::FailedPrecondition, "hash_fingerprint: ");
}

#[tokio::test]
async fn text_needs_a_tokenizer() {
    let text = |body: &str| pb::Prompt {
        input: Some(Input::Text(body.to_owned())),
        ..pb::Prompt::default()
    };
    let chat = pb::Prompt { input: Some(Input::ChatJson("{}".into())), ..pb::Prompt::default() };
    let world = World::start().await;
    let answer = world.client().score(request(vec![prompt(&[1]), text("hi")])).await;
    refused(answer, Code::FailedPrecondition, "prompts[1].text: no tokenizer is configured");
    let answer = world.client().score(request(vec![chat.clone()])).await;
    refused(answer, Code::FailedPrecondition, "prompts[0].chat_json: ");

    let world = World::with(config(), Some(Arc::new(super::fake::WordLengths))).await;
    let row = world.row("a", None);
    world.index.hold(row.slot, &keys(&[1, 2, 3, 4]), 0);
    let answer = score(&world, request(vec![text("a bb ccc dddd")])).await;
    assert_eq!(names(&answer.prompts[0]), [("a", 1)]);
    let answer = world.client().score(request(vec![chat])).await;
    refused(answer, Code::InvalidArgument, "prompts[0].chat_json: no messages");
    let other = pb::ScoreRequest { model: "other".into(), ..request(vec![text("a")]) };
    refused(world.client().score(other).await, Code::FailedPrecondition, "prompts[0].text: ");
}

#[tokio::test]
async fn deadlines_end_a_request_between_prompts() {
    let world = World::start().await;
    world.row("a", None);
    world.index.slow(5);
    let prompts = vec![prompt(&tokens(1)); 60];
    let ask = pb::ScoreRequest { timeout_ms: 20, ..request(prompts.clone()) };
    refused(world.client().score(ask).await, Code::DeadlineExceeded, "deadline passed after ");

    // The header of the call.
    let mut ask = tonic::Request::new(request(prompts));
    ask.metadata_mut().insert("grpc-timeout", "20m".parse().unwrap());
    let status = KvIndexer::score(&world.service, ask).await.unwrap_err();
    refused::<()>(Err(status), Code::DeadlineExceeded, "deadline passed after ");
}

#[tokio::test]
async fn messages_over_the_limit_are_refused() {
    let world = World::start().await;
    let ten_million = prompt(&vec![7; 10_000_000]);
    let status = world.client().score(request(vec![ten_million])).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert!(status.message().contains("1048576"), "{status}");

    // The answer is limited as well.
    let mut config = config();
    config.max_message_bytes = 4096;
    let world = World::with(config, None).await;
    for at in 0..40 {
        let row = world.row(&format!("pod-{at}"), None);
        world.index.hold(row.slot, &keys(&tokens(1)), 0);
    }
    let ask = request(vec![prompt(&tokens(1)); 8]);
    refused(world.client().score(ask.clone()).await, Code::ResourceExhausted, "the answer has ");
    let looked_up = world.metrics();
    let looked_up = looked_up.lines().find(|line| line.starts_with("kv_score_prompts_total "));
    let looked_up: u32 = looked_up.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!((2..8).contains(&looked_up), "{looked_up} of 8 prompts: it ends where it is too large");
    let fewer = pb::ScoreRequest { max_pods: 2, ..ask };
    assert_eq!(score(&world, fewer).await.prompts.len(), 8);
}
