//! `ScoreStream`: order, errors inside the stream, back-pressure, ends.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use kv_indexer::proto::kvindexer::{self as pb, prompt::Input};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::Code;

use super::{
    PATIENCE,
    fake::{World, config, keys, prompt, request, tokens},
};

fn numbered(request_id: u64) -> pb::ScoreRequest {
    pb::ScoreRequest { request_id, ..request(vec![prompt(&tokens(4))]) }
}

#[tokio::test]
async fn answers_keep_the_order_and_bad_requests_do_not_end_the_stream() {
    let world = World::start().await;
    let row = world.row("a", None);
    world.index.hold(row.slot, &keys(&tokens(4)), 0);
    let text = |input| pb::Prompt { input: Some(input), ..pb::Prompt::default() };
    let requests = (0..1000).map(move |id| {
        let mut request = numbered(id);
        match id % 10 {
            3 => request.model.clear(),
            5 => request.prompts.push(text(Input::Text("hello".to_owned()))),
            6 => request.prompts[0] = text(Input::ChatJson("{}".to_owned())),
            7 => request.hash_fingerprint = 1,
            _ => {}
        }
        request
    });
    let stream = world.client().score_stream(tokio_stream::iter(requests)).await.unwrap();
    let answers: Vec<_> = timeout(PATIENCE, stream.into_inner().collect::<Vec<_>>()).await.unwrap();
    assert_eq!(answers.len(), 1000);
    for (id, answer) in (0..).zip(answers) {
        let answer = answer.unwrap();
        assert_eq!(answer.request_id, id);
        let (code, field) = match id % 10 {
            3 => (Code::InvalidArgument, "model"),
            5 => (Code::Unimplemented, "prompts[1].text"),
            6 => (Code::Unimplemented, "prompts[0].chat_json"),
            7 => (Code::FailedPrecondition, "hash_fingerprint"),
            _ => {
                assert_eq!(answer.error, None);
                assert_eq!(answer.prompts[0].pods[0].depth, 4);
                continue;
            }
        };
        let error = answer.error.unwrap();
        assert_eq!((error.code, error.field.as_str()), (code.into(), field));
        assert!(error.message.starts_with(field), "{}", error.message);
        assert_eq!(answer.prompts, []);
    }
    let metrics = world.metrics();
    assert!(
        metrics.contains("kv_score_requests_total{code=\"ok\",rpc=\"score_stream\"} 600\n"),
        "{metrics}"
    );
}

/// How many requests go out when nobody reads the answers, and the stream.
async fn stalled(
    world: &World,
    second_prompt: Vec<u32>,
) -> (usize, tonic::Streaming<pb::ScoreResponse>) {
    // Large answers, so that the transport cannot hold many of them.
    for at in 0..200 {
        let row = world.row(&format!("pod-with-a-long-name-{at:040}"), None);
        world.index.hold(row.slot, &keys(&tokens(1)), 0);
    }
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&sent);
    let requests = (0..3000).map(move |request_id| {
        counter.fetch_add(1, Ordering::Relaxed);
        let prompts = vec![prompt(&tokens(1)), prompt(&second_prompt)];
        pb::ScoreRequest { request_id, ..request(prompts) }
    });
    let stream = world.client().score_stream(tokio_stream::iter(requests)).await.unwrap();
    // The client stands still when the number has not moved for a while.
    let still = async {
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = sent.load(Ordering::Relaxed);
            if now == before && now > 0 {
                return now;
            }
            before = now;
        }
    };
    (timeout(PATIENCE, still).await.unwrap(), stream.into_inner())
}

#[tokio::test]
async fn a_client_that_does_not_read_is_not_read_beyond_the_limit() {
    let mut config = config();
    config.max_message_bytes = 4 << 20;
    let world = World::with(config, None).await;
    // 256 unanswered, 256 of 4 KiB in the stream's window of 1 MiB, some in the client's buffers.
    let (sent, mut answers) = stalled(&world, vec![7; 1024]).await;
    assert!((256..700).contains(&sent), "{sent} requests went out unanswered");
    for id in 0..400 {
        let answer = timeout(PATIENCE, answers.next()).await.unwrap().unwrap().unwrap();
        assert_eq!((answer.request_id, answer.prompts[0].pods.len()), (id, 200));
    }
}

#[tokio::test]
async fn unanswered_bytes_are_bounded_as_well() {
    let world = World::start().await;
    // A budget of 1 MiB and a window of 1 MiB hold four of 256 KiB each.
    let (sent, _answers) = stalled(&world, vec![7; 65_536]).await;
    assert!(sent < 32, "{sent} requests went out unanswered");
}

#[tokio::test]
async fn requests_may_all_be_sent_before_the_first_answer_is_read() {
    let world = World::start().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let outbound = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let stream = world.client().score_stream(outbound).await.unwrap();
    for id in 0..256 {
        timeout(PATIENCE, sender.send(numbered(id))).await.unwrap().unwrap();
    }
    drop(sender);
    let answers: Vec<_> = timeout(PATIENCE, stream.into_inner().collect()).await.unwrap();
    assert_eq!(answers.len(), 256);
}

#[tokio::test]
async fn the_deadline_of_a_request_counts_from_its_arrival() {
    let world = World::start().await;
    world.index.slow(10);
    let requests = (0..20)
        .map(|id| pb::ScoreRequest { timeout_ms: if id == 0 { 0 } else { 40 }, ..numbered(id) });
    let stream = world.client().score_stream(tokio_stream::iter(requests)).await.unwrap();
    let answers: Vec<pb::ScoreResponse> =
        timeout(PATIENCE, stream.into_inner().map(Result::unwrap).collect()).await.unwrap();
    assert_eq!(answers.first().unwrap().error, None);
    let late = answers.iter().filter_map(|answer| answer.error.as_ref());
    let late: Vec<i32> = late.map(|error| error.code).collect();
    assert!(!late.is_empty() && late.iter().all(|&code| code == i32::from(Code::DeadlineExceeded)));
}

#[tokio::test]
async fn an_oversize_message_ends_the_stream() {
    let world = World::start().await;
    let requests = vec![numbered(1), request(vec![prompt(&vec![7; 1 << 20])]), numbered(3)];
    let stream = world.client().score_stream(tokio_stream::iter(requests)).await.unwrap();
    let mut answers = stream.into_inner();
    assert_eq!(answers.next().await.unwrap().unwrap().request_id, 1);
    let status = timeout(PATIENCE, answers.next()).await.unwrap().unwrap().unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
}

#[tokio::test]
async fn shutdown_ends_streams_and_the_drain() {
    let mut world = World::start().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let outbound = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = world.client().score_stream(outbound).await.unwrap().into_inner();
    sender.send(numbered(1)).await.unwrap();
    assert_eq!(answers.next().await.unwrap().unwrap().request_id, 1);
    let mut watch = world.client().watch_pods(pb::WatchPodsRequest {}).await.unwrap().into_inner();
    assert!(watch.next().await.unwrap().unwrap().initial_end);

    world.stop.cancel();
    for end in [
        timeout(PATIENCE, answers.next()).await.unwrap().unwrap().unwrap_err(),
        timeout(PATIENCE, watch.next()).await.unwrap().unwrap().unwrap_err(),
    ] {
        assert_eq!(end.code(), Code::Unavailable, "{end}");
    }
    timeout(PATIENCE, world.shut_down()).await.unwrap().unwrap();
}
