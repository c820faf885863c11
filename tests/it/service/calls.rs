//! `RegisterPod`, `UnregisterPod`, `Speculate`, `Unspeculate`, `Snapshot`, and llm-d's service.

use std::{sync::Arc, time::Duration};

use kv_indexer::{
    ingest::{
        fleet::PodDeclaration,
        speculation::{Speculations, TooMany},
    },
    model::{CountMode, PodSlot},
    proto::{kvindexer as pb, llmd},
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    fake::{FakeIndex, MODEL, WordLengths, World, config, keys, prompt, request, tokens},
    refused,
};

fn register(pod: &str) -> pb::RegisterPodRequest {
    pb::RegisterPodRequest {
        pod: pod.to_owned(),
        endpoint: "tcp://10.0.0.1:5557".to_owned(),
        ..pb::RegisterPodRequest::default()
    }
}

#[tokio::test]
async fn register_and_unregister_go_to_the_registry() {
    let world = World::start().await;
    let mut client = world.client();
    let full = pb::RegisterPodRequest {
        replay_endpoint: "tcp://10.0.0.1:5558".into(),
        model: "llama-alias".into(),
        dp_rank: Some(1),
        engine: "vllm".into(),
        topic_filter: "kv@".into(),
        count_mode: pb::CountMode::Set.into(),
        block_size: 16,
        loss_policy: pb::LossPolicy::AgeOut.into(),
        ..register("a")
    };
    client.register_pod(full).await.unwrap();
    let want = PodDeclaration {
        pod: "a".into(),
        endpoint: "tcp://10.0.0.1:5557".into(),
        replay_endpoint: Some("tcp://10.0.0.1:5558".into()),
        model: Some(MODEL.into()),
        rank: Some(1),
        engine: "vllm".into(),
        topic_filter: "kv@".into(),
        count_mode: CountMode::Set,
        block_size: Some(16),
        loss_policy: Some(kv_indexer::ingest::loss::LossPolicy::AgeOut),
        ..PodDeclaration::default()
    };
    assert_eq!(*world.registry.declared.lock().unwrap(), [want]);
    client.register_pod(register("b")).await.unwrap();
    refused(client.register_pod(register("c")).await, Code::ResourceExhausted, "2 pods");

    let unregister = |pod: &str, dp_rank| pb::UnregisterPodRequest { pod: pod.into(), dp_rank };
    refused(client.unregister_pod(unregister("a", Some(0))).await, Code::NotFound, "pod: a#0 ");
    client.unregister_pod(unregister("a", Some(1))).await.unwrap();
    client.unregister_pod(unregister("b", None)).await.unwrap();
    refused(client.unregister_pod(unregister("b", None)).await, Code::NotFound, "pod: b ");
    let answer = client.unregister_pod(unregister("fixed", None)).await;
    refused(answer, Code::FailedPrecondition, "pod: fixed is declared by the configuration");
    refused(client.unregister_pod(unregister("", None)).await, Code::InvalidArgument, "pod: ");
}

#[tokio::test]
async fn illegal_registrations_are_named() {
    let world = World::start().await;
    let check = |start: &'static str, request: pb::RegisterPodRequest| {
        let mut client = world.client();
        async move { refused(client.register_pod(request).await, Code::InvalidArgument, start) }
    };
    let ok = || register("a");
    check("pod: must not be empty", register("")).await;
    check("pod: 65 bytes, at most 64", register(&"x".repeat(65))).await;
    check("endpoint: ", pb::RegisterPodRequest { endpoint: String::new(), ..ok() }).await;
    check("endpoint: ", pb::RegisterPodRequest { endpoint: "udp://a:1".into(), ..ok() }).await;
    for endpoint in ["tcp://*:5557", "http://10.0.0.1", "http://10.0.0.1:8000/v1"] {
        check("endpoint: ", pb::RegisterPodRequest { endpoint: endpoint.into(), ..ok() }).await;
    }
    let http = "http://10.0.0.1:8000".to_owned();
    check("replay_endpoint: ", pb::RegisterPodRequest { replay_endpoint: http, ..ok() }).await;
    check("engine: ", pb::RegisterPodRequest { engine: "tgi".into(), ..ok() }).await;
    check("count_mode: ", pb::RegisterPodRequest { count_mode: 5, ..ok() }).await;
    check("block_size: ", pb::RegisterPodRequest { block_size: 65_537, ..ok() }).await;
    check("model: ", pb::RegisterPodRequest { model: "m".repeat(1025), ..ok() }).await;
    check("topic_filter: ", pb::RegisterPodRequest { topic_filter: "m".repeat(1025), ..ok() })
        .await;
    assert!(world.registry.declared.lock().unwrap().is_empty());
}

fn speculate(pod: &str, ttl_ms: u32) -> pb::SpeculateRequest {
    pb::SpeculateRequest {
        request: Some(request(vec![prompt(&tokens(4))])),
        pod: pod.to_owned(),
        ttl_ms,
        ..pb::SpeculateRequest::default()
    }
}

async fn depth(world: &World) -> u32 {
    let ask = request(vec![prompt(&tokens(4))]);
    let answer = world.client().score(ask).await.unwrap().into_inner();
    answer.prompts[0].pods.first().map_or(0, |pod| pod.depth)
}

#[tokio::test]
async fn speculative_entries_end_when_taken_back_or_in_time() {
    let world = World::start().await;
    world.row("a", None);
    let mut client = world.client();
    let first = client.speculate(speculate("a", 60_000)).await.unwrap().into_inner().handle;
    let second = client.speculate(speculate("a", 60_000)).await.unwrap().into_inner().handle;
    assert!(first != 0 && second != 0 && first != second);
    assert_eq!(depth(&world).await, 4);
    let take_back = |handle| pb::UnspeculateRequest { handle, extend_ms: 0 };
    client.unspeculate(take_back(first)).await.unwrap();
    assert_eq!(depth(&world).await, 4, "the second still covers the blocks");
    let shorten = pb::UnspeculateRequest { handle: second, extend_ms: 40 };
    client.unspeculate(shorten).await.unwrap();
    let start = Instant::now();
    while depth(&world).await > 0 {
        assert!(start.elapsed() < Duration::from_secs(5), "it never expires");
        sleep(Duration::from_millis(2)).await;
    }
    assert!(start.elapsed() >= Duration::from_millis(30), "{:?}", start.elapsed());
    refused(client.unspeculate(shorten).await, Code::NotFound, "handle: ");
    client.unspeculate(take_back(second)).await.unwrap();
    assert_eq!(world.index.marks(), 0);
}

#[tokio::test]
async fn speculation_without_a_rank_covers_all_ranks() {
    let world = World::start().await;
    world.row("dp", Some(0));
    world.row("dp", Some(1));
    world.client().speculate(speculate("dp", 60_000)).await.unwrap();
    let ask = request(vec![prompt(&tokens(4))]);
    let rows = world.client().score(ask).await.unwrap().into_inner().prompts.remove(0).pods;
    assert_eq!(rows.iter().map(|row| row.depth).collect::<Vec<_>>(), [4, 4]);
    let one = pb::SpeculateRequest { dp_rank: Some(1), ..speculate("dp", 60_000) };
    world.client().speculate(one).await.unwrap();
    assert_eq!(world.index.marks(), 12);
}

#[tokio::test]
async fn illegal_speculations_are_refused() {
    let world = World::start().await;
    world.row("a", None);
    let mut client = world.client();
    let mut check = async |code, start: &str, request: pb::SpeculateRequest| {
        refused(client.speculate(request).await, code, start);
    };
    let ok = || speculate("a", 1000);
    let invalid = Code::InvalidArgument;
    check(invalid, "ttl_ms: 0 is not between 1 and 60000", speculate("a", 0)).await;
    check(invalid, "ttl_ms: 60001", speculate("a", 60_001)).await;
    check(invalid, "request: is missing", pb::SpeculateRequest { request: None, ..ok() }).await;
    let none = Some(request(vec![]));
    check(invalid, "request.prompts: ", pb::SpeculateRequest { request: none, ..ok() }).await;
    let bad = Some(request(vec![pb::Prompt::default()]));
    check(invalid, "request.prompts[0]: ", pb::SpeculateRequest { request: bad, ..ok() }).await;
    let other = Some(pb::ScoreRequest { hash_fingerprint: 1, ..ok().request.unwrap() });
    let other = pb::SpeculateRequest { request: other, ..ok() };
    check(Code::FailedPrecondition, "request.hash_fingerprint: ", other).await;
    check(Code::NotFound, "pod: ghost ", speculate("ghost", 1000)).await;
    let rank = pb::SpeculateRequest { dp_rank: Some(3), ..ok() };
    check(Code::NotFound, "pod: a#3 ", rank).await;
    for _ in 0..3 {
        client.speculate(speculate("a", 60_000)).await.unwrap();
    }
    refused(client.speculate(ok()).await, Code::ResourceExhausted, "calls of speculative entries");
    let zero = pb::UnspeculateRequest { handle: 0, extend_ms: 0 };
    refused(client.unspeculate(zero).await, invalid, "handle: ");
    let far = pb::UnspeculateRequest { handle: 1, extend_ms: 60_001 };
    refused(client.unspeculate(far).await, invalid, "extend_ms: ");
}

#[tokio::test(start_paused = true)]
async fn expiry_is_precise_and_caps_hold() {
    let index = Arc::new(FakeIndex::default());
    let slot = kv_indexer::index::BlockIndex::register(
        &*index,
        kv_indexer::index::PodSpec {
            scheme: super::fake::scheme(),
            model: MODEL.into(),
            count_mode: CountMode::Counted,
        },
    )
    .unwrap();
    let live = Arc::new(Speculations::new(index.clone(), 2));
    let (stop, mut tasks) = (CancellationToken::new(), tokio::task::JoinSet::new());
    let (runs, token) = (Arc::clone(&live), stop.clone());
    tasks.spawn(async move { runs.run(token).await });

    let blocks = keys(&tokens(4));
    let ms = Duration::from_millis;
    let add = |ttl| live.add(&[slot], vec![blocks.clone(), blocks[..2].to_vec()], ms(ttl)).unwrap();
    let (late, early) = (add(1000), add(100));
    assert_eq!((live.len(), index.marks()), (2, 12));
    let full = live.add(&[slot], vec![blocks.clone()], ms(1));
    assert_eq!(full, Err(TooMany { what: "calls", limit: 2 }));
    sleep(ms(99)).await;
    assert_eq!(live.len(), 2);
    sleep(ms(11)).await;
    assert_eq!((live.len(), index.marks()), (1, 6), "within 10 ms");
    assert!(!live.extend(early, ms(1)) && !live.take_back(early));

    // Extended again and again: the last word counts.
    for _ in 0..500 {
        sleep(ms(10)).await;
        assert!(live.extend(late, ms(1000)));
    }
    sleep(ms(995)).await;
    assert_eq!(live.len(), 1);
    sleep(ms(10)).await;
    assert!(live.is_empty());
    assert_eq!(index.marks(), 0);

    let many = vec![keys(&tokens(300))];
    let full = live.add(&[slot], many, ms(1));
    assert_eq!(full, Err(TooMany { what: "blocks", limit: 256 }));
    assert!(live.add(&[PodSlot(77)], vec![blocks], ms(1)).is_ok(), "unknown slots are ignored");
    stop.cancel();
    tasks.join_next().await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn snapshot_is_not_built() {
    let world = World::start().await;
    let answer = world.client().snapshot(pb::SnapshotRequest {}).await.map(|_| ());
    refused(answer, Code::Unimplemented, "Snapshot");
}

#[tokio::test]
async fn llmd_scores_pods_by_their_best_rank() {
    let ask = |pods: &[&str]| llmd::GetPodScoresRequest {
        prompt: "a bb ccc dddd eeeee ffffff ggggggg hhhhhhhh tail".into(),
        model_name: MODEL.into(),
        pod_identifiers: pods.iter().map(|pod| (*pod).to_owned()).collect(),
    };
    let world = World::start().await;
    let answer = world.llmd().get_pod_scores(ask(&[])).await;
    refused(answer, Code::FailedPrecondition, "prompt: no tokenizer is configured for model llama");
    let unnamed = llmd::GetPodScoresRequest { model_name: String::new(), ..ask(&[]) };
    let answer = world.llmd().get_pod_scores(unnamed).await;
    refused(answer, Code::InvalidArgument, "model_name: ");

    let world = World::with(config(), Some(Arc::new(WordLengths))).await;
    let (zero, one, plain) =
        (world.row("dp", Some(0)), world.row("dp", Some(1)), world.row("plain", None));
    world.row("idle", None);
    let blocks = keys(&[1, 2, 3, 4, 5, 6, 7, 8]);
    world.index.hold(zero.slot, &blocks[..1], 0);
    world.index.hold(one.slot, &blocks, 0);
    world.index.hold(plain.slot, &blocks[..1], 1);
    let scores = async |pods: &[&str]| {
        let answer = world.llmd().get_pod_scores(ask(pods)).await.unwrap().into_inner();
        let mut scores: Vec<_> = answer.scores.into_iter().map(|s| (s.pod, s.score)).collect();
        scores.sort_by(|a, b| a.0.cmp(&b.0));
        scores
    };
    let cpu = 0.8;
    assert_eq!(scores(&[]).await, [("dp".to_owned(), 2.0), ("plain".to_owned(), cpu)]);
    assert_eq!(scores(&["plain", "idle", "ghost"]).await, [("plain".to_owned(), cpu)]);
    let empty = world.llmd().get_pod_scores(ask(&[""])).await;
    refused(empty, Code::InvalidArgument, "pod_identifiers[0]: ");
    let many = world.llmd().get_pod_scores(ask(&["a"; 41])).await;
    refused(many, Code::InvalidArgument, "pod_identifiers: 41 pods, at most 40");
}
