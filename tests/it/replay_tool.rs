//! `loadgen replay` and its `Publisher`, seen by a plain SUB and a plain DEALER: every byte is as
//! recorded.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use kv_indexer::loadgen::{
    recording::{RankStream, Recording},
    replay::{END_OF_REPLAY, Publisher, PublisherOptions, ReplayForm},
};

use crate::support::{fixture, interrupt, patience};

type Frames = Vec<Vec<u8>>;

const SERVE: &str = "vllm-0.32.0-serve/serve_int_lora_restart.jsonl";

/// A SUB and a DEALER, as small as a consumer can be.
struct Consumer {
    context: zmq::Context,
}

impl Consumer {
    fn new() -> Self {
        Self { context: zmq::Context::new() }
    }

    fn socket(&self, kind: zmq::SocketType, endpoint: &str) -> zmq::Socket {
        let socket = self.context.socket(kind).unwrap();
        socket.set_linger(0).unwrap();
        socket.set_rcvhwm(0).unwrap();
        socket.set_rcvtimeo(patience().as_millis() as i32).unwrap();
        socket.set_reconnect_ivl(10).unwrap();
        if kind == zmq::SUB {
            socket.set_subscribe(b"").unwrap();
        }
        socket.connect(endpoint).unwrap();
        socket
    }

    fn replay(&self, endpoint: &str, start: u64) -> Vec<Frames> {
        self.request(endpoint, &[b"", &start.to_be_bytes()])
    }

    /// Everything that the replay socket answers, end marker included.
    fn request(&self, endpoint: &str, frames: &[&[u8]]) -> Vec<Frames> {
        let dealer = self.socket(zmq::DEALER, endpoint);
        dealer.send_multipart(frames, 0).unwrap();
        let mut answers = Vec::new();
        loop {
            let answer = dealer.recv_multipart(0).unwrap();
            let end = answer[answer.len() - 2] == END_OF_REPLAY;
            answers.push(answer);
            if end {
                return answers;
            }
        }
    }
}

fn live(stream: &RankStream) -> Vec<Frames> {
    let frames = |batch: &kv_indexer::loadgen::recording::Batch| {
        vec![
            batch.topic.clone().into_bytes(),
            batch.sequence.to_be_bytes().to_vec(),
            batch.payload.clone(),
        ]
    };
    stream.batches.iter().map(frames).collect()
}

/// What a replay of `live` batches must look like.
fn replayed(live: &[Frames], form: ReplayForm) -> Vec<Frames> {
    let end = vec![Vec::new(), END_OF_REPLAY.to_vec(), Vec::new()];
    let with_end = live.iter().chain(std::iter::once(&end));
    with_end
        .map(|frames| match form {
            ReplayForm::TwoFrames => vec![Vec::new(), frames[1].clone(), frames[2].clone()],
            ReplayForm::ThreeFrames => {
                std::iter::once(Vec::new()).chain(frames.iter().cloned()).collect()
            }
        })
        .collect()
}

fn recording(name: &str) -> Recording {
    Recording::open(&fixture(name)).unwrap()
}

fn options(form: ReplayForm) -> PublisherOptions {
    PublisherOptions {
        replay: Some("tcp://127.0.0.1:*".to_owned()),
        form,
        ..PublisherOptions::default()
    }
}

fn bind(stream: &Arc<RankStream>, options: PublisherOptions) -> Publisher {
    Publisher::bind(Arc::clone(stream), "tcp://127.0.0.1:*", options).unwrap()
}

/// The replay socket of the real server said, byte for byte, what ours says.
#[test]
fn replays_are_those_of_the_real_server() {
    let text = std::fs::read_to_string(fixture(&SERVE.replace(".jsonl", ".replay.rank0.jsonl")));
    let decode = |frame: &serde_json::Value| STANDARD.decode(frame.as_str().unwrap()).unwrap();
    let recorded: Vec<Frames> = text
        .unwrap()
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["frames_b64"].as_array().unwrap().iter().map(decode).collect()
        })
        .collect();
    let stream = &recording(SERVE).ranks[0];
    let mut publisher = bind(stream, options(ReplayForm::ThreeFrames));
    assert_eq!(publisher.publish_until(37).unwrap().len(), 38);
    let ours = Consumer::new().replay(publisher.replay_endpoint().unwrap(), 0);
    assert!(ours == recorded, "{} and {} messages", ours.len(), recorded.len());
}

/// The excerpts of replays in the truth files, both forms, as their engines sent them.
#[test]
fn replay_excerpts_of_the_truth_files_are_reproduced() {
    let mut checked = 0;
    for name in [
        "vllm-0.9.2/basic_builtin",
        "vllm-0.23.0/extra_int",
        "vllm-0.30.0/extra_int",
        "vllm-0.33.0/hybrid_int",
        "sglang-0.5.23/radix_default",
    ] {
        let truth = std::fs::read(fixture(&format!("{name}.truth.json"))).unwrap();
        let truth: serde_json::Value = serde_json::from_slice(&truth).unwrap();
        let recording = recording(&format!("{name}.jsonl"));
        for replay in truth["replays"].as_array().unwrap() {
            let expected: Vec<Frames> = replay["frames_b64"]
                .as_array()
                .unwrap()
                .iter()
                .map(|message| {
                    let frames = message.as_array().unwrap().iter();
                    frames.map(|frame| STANDARD.decode(frame.as_str().unwrap()).unwrap()).collect()
                })
                .collect();
            let form = match expected[0].len() {
                3 => ReplayForm::TwoFrames,
                _ => ReplayForm::ThreeFrames,
            };
            let rank = replay["rank"].as_u64().unwrap() as usize;
            let mut publisher = bind(&recording.ranks[rank], options(form));
            while publisher.publish_next().unwrap().is_some() {}
            let start = replay["start_seq"].as_u64().unwrap();
            let ours = Consumer::new().replay(publisher.replay_endpoint().unwrap(), start);
            assert!(ours == expected, "{name} rank {rank} from {start}");
            checked += 1;
        }
    }
    assert_eq!(checked, 10);
}

#[test]
fn odd_requests_are_treated_as_the_engine_treats_them() {
    let stream = &recording("vllm-0.9.2/basic_builtin.jsonl").ranks[0];
    let form = ReplayForm::TwoFrames;
    let mut publisher = bind(stream, PublisherOptions { buffer_steps: 5, ..options(form) });
    while publisher.publish_next().unwrap().is_some() {}
    let all = live(stream);
    let at = publisher.replay_endpoint().unwrap();
    let consumer = Consumer::new();
    // The buffer holds the last five only.
    assert_eq!(consumer.replay(at, 0), replayed(&all[all.len() - 5..], form));
    assert_eq!(consumer.replay(at, 1 << 40), replayed(&[], form));
    // A number of another length is a number all the same.
    assert_eq!(consumer.request(at, &[b"", &[0, 25]]), replayed(&all[25..], form));
    // Without the delimiter: no answer to the first request, and the socket goes on.
    let dealer = consumer.socket(zmq::DEALER, at);
    dealer.send_multipart([&0_u64.to_be_bytes()[..]], 0).unwrap();
    dealer.send_multipart([b"", b"", &0_u64.to_be_bytes()[..]], 0).unwrap();
    dealer.send_multipart([b"", &u64::MAX.to_be_bytes()[..]], 0).unwrap();
    assert_eq!(dealer.recv_multipart(0).unwrap(), replayed(&[], form)[0]);
    dealer.set_rcvtimeo(50).unwrap();
    assert_eq!(dealer.recv_multipart(0), Err(zmq::Error::EAGAIN));
}

#[test]
fn a_restart_keeps_the_ports_and_forgets_the_buffer() {
    let stream = &recording(SERVE).ranks[0];
    let mut publisher = bind(stream, options(ReplayForm::ThreeFrames));
    let (at, replay_at) =
        (publisher.endpoint().to_owned(), publisher.replay_endpoint().unwrap().to_owned());
    let consumer = Consumer::new();
    let sub = consumer.socket(zmq::SUB, &at);
    assert!(publisher.wait_for_subscriber(patience()).unwrap());
    publisher.publish_until(37).unwrap();
    let all = live(stream);
    for expected in &all[..38] {
        assert_eq!(sub.recv_multipart(0).unwrap(), *expected);
    }
    publisher.restart().unwrap();
    assert_eq!(publisher.endpoint(), at);
    assert_eq!(publisher.replay_endpoint(), Some(replay_at.as_str()));
    assert_eq!(consumer.replay(&replay_at, 0), replayed(&[], ReplayForm::ThreeFrames));
    let deadline = Instant::now() + patience();
    while !publisher.has_subscriber().unwrap() {
        assert!(Instant::now() < deadline, "the SUB reconnects");
        // It announces its subscriptions again on the thread that uses it.
        sub.poll(zmq::POLLIN, 5).unwrap();
    }
    publisher.skip_next().unwrap();
    publisher.publish_until(37).unwrap();
    for expected in &all[39..] {
        assert_eq!(sub.recv_multipart(0).unwrap(), *expected);
    }
    assert_eq!(
        consumer.replay(&replay_at, 0),
        replayed(&all[38..], ReplayForm::ThreeFrames),
        "what was skipped can be asked for",
    );
    drop(sub);
    let deadline = Instant::now() + patience();
    while publisher.has_subscriber().unwrap() {
        assert!(Instant::now() < deadline, "the subscriber's leaving is noticed");
        std::thread::sleep(Duration::from_millis(5));
    }
    publisher.close();
}

/// A running `loadgen replay`, killed on drop.
struct Tool {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Tool {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_loadgen"))
            .arg("replay")
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Endpoint and replay endpoint of the next `publishing` line.
    fn publisher(&mut self, file: &Path, rank: u32) -> (String, String) {
        let Some(Ok(line)) = self.lines.next() else {
            let mut errors = String::new();
            self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
            panic!("loadgen ended: {errors}");
        };
        let start = format!("publishing {} rank {rank} on ", file.display());
        let rest = line.strip_prefix(&start).unwrap_or_else(|| panic!("{line:?}"));
        let (live, replay) = rest.split_once(" (replay ").unwrap();
        (live.to_owned(), replay.trim_end_matches(')').to_owned())
    }

    fn finish(mut self) -> Vec<String> {
        let rest = self.lines.by_ref().map(Result::unwrap).collect();
        assert!(self.child.wait().unwrap().success());
        rest
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // Gone already after `finish`.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[track_caller]
fn check_tool(file: &str, form: ReplayForm, flag: &str) {
    let path = fixture(file);
    let mut tool = Tool::start(&[
        path.to_str().unwrap(),
        "--publish=tcp://127.0.0.1:*",
        "--wait-subscriber=60",
        "--serve-after=600",
        "--replay-form",
        flag,
    ]);
    let recording = Recording::open(&path).unwrap();
    let addresses: Vec<_> =
        recording.ranks.iter().map(|stream| tool.publisher(&path, stream.rank)).collect();
    let consumer = Consumer::new();
    let subs: Vec<_> = addresses.iter().map(|(live, _)| consumer.socket(zmq::SUB, live)).collect();
    for ((stream, sub), (_, replay)) in recording.ranks.iter().zip(&subs).zip(&addresses) {
        let all = live(stream);
        for (at, expected) in all.iter().enumerate() {
            let got = sub.recv_multipart(0).unwrap();
            assert!(got == *expected, "{file} rank {} message {at}", stream.rank);
        }
        let is_start = |at: &usize| *at == 0 || stream.batches[*at].sequence == 0;
        let last_life = (0..all.len()).rev().find(is_start).unwrap();
        let got = consumer.replay(replay, 0);
        assert!(got == replayed(&all[last_life..], form), "{file} rank {}", stream.rank);
    }
    // It would serve for ten minutes more.
    interrupt(&tool.child);
    let summary = tool.finish();
    assert_eq!(summary.len(), recording.ranks.len() + 1, "{summary:?}");
    let total: usize = recording.ranks.iter().map(|stream| stream.batches.len()).sum();
    assert!(summary.last().unwrap().starts_with(&format!("total: {total} batches, ")));
}

#[test]
fn the_tool_sends_exactly_what_was_recorded() {
    check_tool("vllm-0.23.0/basic_int.jsonl", ReplayForm::TwoFrames, "two");
    check_tool("vllm-0.33.0/extra_int.jsonl", ReplayForm::ThreeFrames, "three");
}

#[test]
fn the_tool_restarts_where_the_engine_was_restarted() {
    check_tool(SERVE, ReplayForm::ThreeFrames, "three");
}

#[test]
fn the_tool_reads_compressed_files() {
    check_tool("vllm-0.33.0/big_int_50k.jsonl.gz", ReplayForm::ThreeFrames, "three");
}

#[test]
fn the_tool_keeps_the_recorded_pace() {
    // 27 batches, one second apart: at a hundred times the pace 260 ms.
    let path = fixture("vllm-0.33.0/basic_int_sha256.jsonl");
    let began = Instant::now();
    let mut tool = Tool::start(&[
        path.to_str().unwrap(),
        "--publish=tcp://127.0.0.1:*",
        "--replay-bind=off",
        "--speed=100",
    ]);
    assert_eq!(tool.publisher(&path, 0).1, "none");
    assert_eq!(tool.publisher(&path, 1).1, "none");
    tool.finish();
    assert!(began.elapsed() >= Duration::from_millis(260), "{:?}", began.elapsed());
}

#[test]
fn the_tool_gives_up_without_a_subscriber() {
    let path = fixture("vllm-0.33.0/basic_int_sha256.jsonl");
    let output = Command::new(env!("CARGO_BIN_EXE_loadgen"))
        .args(["replay", path.to_str().unwrap()])
        .args(["--publish=tcp://127.0.0.1:*", "--wait-subscriber=0.05"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("no subscriber on tcp://127.0.0.1:"), "{error}");
}
