//! `ListPods`, `WatchPods`, `WaitVisible`.

use std::time::{Duration, Instant};

use kv_indexer::{
    model::{CountMode, PodState, RowId},
    proto::kvindexer::{self as pb, kv_indexer_server::KvIndexer},
};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::{Code, Streaming};

use super::{
    PATIENCE,
    fake::{MODEL, World, keys, scheme, tokens},
    refused,
};

#[tokio::test]
async fn list_pods_shows_rows_and_hash_settings() {
    let world = World::start().await;
    let row = world.row("a", Some(2));
    world.index.hold(row.slot, &keys(&tokens(5)), 0);
    row.update(|status| {
        status.state = PodState::Degraded;
        status.reason = "gap".to_owned();
        status.seen = Some(12);
        status.gaps = 3;
        status.lag_us = -7;
    });
    row.applied(2, 9, 1);
    let answer = world.client().list_pods(pb::ListPodsRequest {}).await.unwrap().into_inner();
    assert_eq!(answer.slot_table_version, world.fleet.table().version);
    assert_eq!(answer.aliases, [("llama-alias".to_owned(), MODEL.to_owned())].into());
    let [status] = answer.pods.as_slice() else { panic!("{answer:?}") };
    let want = pb::PodStatus {
        pod: "a".into(),
        dp_rank: Some(2),
        model: MODEL.into(),
        endpoint: "tcp://a:5557".into(),
        state: pb::PodState::Degraded.into(),
        reason: "gap".into(),
        applied_sequence: Some(9),
        seen_sequence: Some(12),
        epoch: 2,
        lag_us: -7,
        blocks: 5,
        blocks_by_tier: vec![pb::TierBlocks { tier: "gpu".into(), blocks: 5 }],
        gaps: 3,
        slot: row.slot.0,
        slot_table_version: answer.slot_table_version,
        may_undercount: true,
        may_overcount: true,
        ..pb::PodStatus::default()
    };
    assert_eq!(*status, want);
    let hash = answer.hash.unwrap();
    assert_eq!((hash.algorithm.as_str(), hash.block_size), ("xxh3", 4));
    assert_eq!(hash.fingerprint, scheme().fingerprint());
    let [listed] = answer.models.as_slice() else { panic!("{:?}", answer.models) };
    let hash = listed.hash.clone().unwrap();
    assert_eq!((listed.model.as_str(), hash.algorithm.as_str()), ("coarse", "xxh64"));
    assert_eq!((hash.block_size, hash.seed.as_str()), (8, "seed"));
}

async fn watch(world: &World) -> Streaming<pb::PodStatus> {
    world.client().watch_pods(pb::WatchPodsRequest {}).await.unwrap().into_inner()
}

async fn next(watch: &mut Streaming<pb::PodStatus>) -> pb::PodStatus {
    timeout(PATIENCE, watch.next()).await.unwrap().unwrap().unwrap()
}

#[tokio::test]
async fn watch_pods_sends_the_state_then_changes() {
    let world = World::start().await;
    let mut empty = watch(&world).await;
    let first = next(&mut empty).await;
    assert_eq!((first.pod.as_str(), first.initial_end), ("", true));
    drop(empty);

    let (a, b) = (world.row("a", None), world.row("b", None));
    let mut watch = watch(&world).await;
    let initial = [next(&mut watch).await, next(&mut watch).await];
    let short = initial.each_ref().map(|status| (status.pod.as_str(), status.initial_end));
    assert_eq!(short, [("a", false), ("b", true)]);

    a.update(|status| status.state = PodState::Replaying);
    world.fleet.changed();
    let change = next(&mut watch).await;
    assert_eq!((change.pod.as_str(), change.state()), ("a", pb::PodState::Replaying));
    assert!(!change.initial_end && !change.removed);

    world.fleet.remove(b.slot);
    let c = world.row("c", None);
    assert_eq!(c.slot, b.slot, "the slot has a new owner");
    let (gone, come) = (next(&mut watch).await, next(&mut watch).await);
    assert_eq!((gone.pod.as_str(), gone.removed, gone.slot), ("b", true, b.slot.0));
    assert_eq!((come.pod.as_str(), come.removed, come.slot), ("c", false, b.slot.0));
    assert_eq!(come.slot_table_version, world.fleet.table().version);

    // Again under the same name: the old life ends, a new one begins.
    world.fleet.remove(c.slot);
    world.row("c", None);
    let (gone, come) = (next(&mut watch).await, next(&mut watch).await);
    assert_eq!((gone.pod.as_str(), gone.removed), ("c", true));
    assert_eq!((come.pod.as_str(), come.removed), ("c", false));
}

#[tokio::test]
async fn watch_pods_coalesces() {
    let world = World::start().await;
    let row = world.row("a", None);
    let mut watch = watch(&world).await;
    next(&mut watch).await;
    let start = Instant::now();
    let mut round = 0_u64;
    while start.elapsed() < Duration::from_millis(400) {
        round += 1;
        row.update(|status| status.reason = round.to_string());
        world.fleet.changed();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut received = 0;
    loop {
        received += 1;
        if next(&mut watch).await.reason == round.to_string() {
            break;
        }
    }
    let most = start.elapsed().as_millis() / 50 + 2;
    assert!(received <= most, "{received} messages for {round} changes, at most {most}");

    // Fast counters alone are no change.
    row.update(|status| status.seen = Some(99));
    world.fleet.changed();
    assert!(timeout(Duration::from_millis(200), watch.next()).await.is_err());
}

fn wait(pod: &str, sequence: u64, timeout_ms: u32) -> pb::WaitVisibleRequest {
    pb::WaitVisibleRequest { pod: pod.to_owned(), sequence, timeout_ms, ..Default::default() }
}

#[tokio::test]
async fn wait_visible_returns_when_the_sequence_is_applied() {
    let world = World::start().await;
    let row = world.row("a", None);
    let mut client = world.client();
    row.applied(1, 4, 44);
    let answer = client.wait_visible(wait("a", 4, 0)).await.unwrap().into_inner();
    let want = |applied_sequence, visible_unix_ns, reached, epoch| pb::WaitVisibleResponse {
        applied_sequence,
        visible_unix_ns,
        reached,
        epoch,
    };
    assert_eq!(answer, want(4, 44, true, 1));
    let answer = client.wait_visible(wait("a", 5, 0)).await.unwrap().into_inner();
    assert_eq!(answer, want(4, 0, false, 1), "0 ms: answered at once");
    let start = Instant::now();
    let answer = client.wait_visible(wait("a", 5, 60)).await.unwrap().into_inner();
    assert_eq!(answer, want(4, 0, false, 1));
    assert!(start.elapsed() >= Duration::from_millis(60));

    let waits = {
        let mut client = client.clone();
        async move { client.wait_visible(wait("a", 6, 10_000)).await.unwrap().into_inner() }
    };
    let applies = async {
        for sequence in 5..9 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            row.applied(1, sequence, 40 + sequence);
        }
    };
    let (answer, ()) = tokio::join!(waits, applies);
    assert!(answer.reached && answer.applied_sequence >= 6, "{answer:?}");
    assert_eq!(answer.visible_unix_ns, 46);
}

#[tokio::test]
async fn wait_visible_knows_epochs() {
    let world = World::start().await;
    let row = world.row("a", None);
    let mut client = world.client();
    row.applied(1, 7, 1);
    row.new_epoch(2);
    let old = pb::WaitVisibleRequest { epoch: Some(1), ..wait("a", 3, 10_000) };
    let answer = client.wait_visible(old).await.unwrap().into_inner();
    assert_eq!((answer.reached, answer.epoch), (false, 2), "an older life is not remembered");

    // The life that is current on arrival ends during the wait.
    let waits = {
        let mut client = client.clone();
        async move { client.wait_visible(wait("a", 3, 10_000)).await.unwrap().into_inner() }
    };
    let restart = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        row.new_epoch(3);
        row.applied(3, 3, 9);
    };
    let (answer, ()) = tokio::join!(waits, restart);
    assert_eq!((answer.reached, answer.epoch), (false, 3));

    // A life that has yet to come is waited for.
    let coming = pb::WaitVisibleRequest { epoch: Some(4), ..wait("a", 0, 10_000) };
    let waits = async { client.wait_visible(coming).await.unwrap().into_inner() };
    let restart = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        row.new_epoch(4);
        row.applied(4, 0, 5);
    };
    let (answer, ()) = tokio::join!(waits, restart);
    assert_eq!((answer.reached, answer.epoch, answer.visible_unix_ns), (true, 4, 5));
}

#[tokio::test]
async fn wait_visible_outlives_a_provisional_row() {
    let world = World::start().await;
    let add = |pod: &str, model: &str| {
        let id = RowId { pod: pod.into(), rank: None };
        let model = std::sync::Arc::from(model);
        world.fleet.add(id, "tcp://a:5557", &scheme(), &model, CountMode::Counted).unwrap()
    };
    let provisional = add("a", "");
    let mut client = world.client();
    let settles = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        let id = RowId { pod: "a".into(), rank: Some(0) };
        let model = std::sync::Arc::from(MODEL);
        let counted = CountMode::Counted;
        let row = world.fleet.replace(&provisional, id, &scheme(), &model, counted).unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
        row.applied(1, 3, 9);
    };
    let (answer, ()) = tokio::join!(client.wait_visible(wait("a", 3, 10_000)), settles);
    let answer = answer.unwrap().into_inner();
    assert_eq!((answer.reached, answer.applied_sequence, answer.visible_unix_ns), (true, 3, 9));

    let provisional = add("b", "");
    let removal = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        world.fleet.remove(provisional.slot);
    };
    let (answer, ()) = tokio::join!(client.wait_visible(wait("b", 3, 10_000)), removal);
    refused(answer, Code::NotFound, "pod: b is not registered");
}

#[tokio::test]
async fn wait_visible_refuses_and_gives_up() {
    let world = World::start().await;
    let (zero, _one) = (world.row("dp", Some(0)), world.row("dp", Some(1)));
    let mut client = world.client();
    let answer = client.wait_visible(wait("ghost", 0, 1000)).await;
    refused(answer, Code::NotFound, "pod: ghost is not registered");
    let answer = client.wait_visible(wait("dp", 0, 0)).await;
    refused(answer, Code::InvalidArgument, "dp_rank: the pod has several rows, name one: 0, 1");
    let answer = client.wait_visible(wait("", 0, 0)).await;
    refused(answer, Code::InvalidArgument, "pod: ");
    let rank = |rank| pb::WaitVisibleRequest { dp_rank: Some(rank), ..wait("dp", 0, 0) };
    refused(client.wait_visible(rank(7)).await, Code::NotFound, "pod: dp#7 ");
    assert!(client.wait_visible(rank(1)).await.unwrap().into_inner().reached);

    let mut ask =
        tonic::Request::new(pb::WaitVisibleRequest { sequence: 99, timeout_ms: 10_000, ..rank(0) });
    ask.metadata_mut().insert("grpc-timeout", "50m".parse().unwrap());
    let answer = KvIndexer::wait_visible(&world.service, ask).await;
    refused(answer, Code::DeadlineExceeded, "deadline passed");

    let ask = pb::WaitVisibleRequest { sequence: 99, timeout_ms: 10_000, ..rank(0) };
    let removal = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        world.fleet.remove(zero.slot);
    };
    let (answer, ()) = tokio::join!(client.wait_visible(ask), removal);
    refused(answer, Code::NotFound, "pod: dp#0 is not registered");
}
