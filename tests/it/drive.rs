//! The load driver's sending: against mock engines, and against servers that misbehave.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kv_indexer::loadgen::{
    drive::{Drive, Driven, Ended, Exchange, Failure, HttpOptions, Pacing, Target, run_with},
    engine::{Engine, EngineHandle, EngineOptions, Pace},
    progress::Progress,
    workload::{After, BodyForm, Part, Plan, Planned, Prompt},
};
use tokio_util::sync::CancellationToken;

/// A request of `tokens` token ids that depend on `group`.
fn planned(group: u32, tokens: u32) -> Planned {
    let part = Part { seed: group.into(), tokens };
    let prompt = Prompt { parts: [part].into() };
    Planned { at: None, burst: None, prompt, max_tokens: 4, group, after: None }
}

fn at(ms: u64, burst: Option<u32>) -> Planned {
    Planned { at: Some(Duration::from_millis(ms)), burst, ..planned(0, 32) }
}

fn body(request: &Planned) -> Vec<Bytes> {
    let ids: Vec<u32> =
        (0..request.prompt.tokens() as u32).map(|n| 10 + n + 1000 * request.group).collect();
    let json = serde_json::json!({
        "model": "mock", "prompt": ids, "max_tokens": request.max_tokens, "stream": true,
        "stream_options": {"include_usage": true}, "ignore_eos": true,
    });
    // In two pieces, as bodies come.
    let text = Bytes::from(json.to_string());
    vec![text.slice(..10), text.slice(10..)]
}

fn drive(target: Target, pacing: Pacing, requests: Vec<Planned>) -> Drive {
    Drive {
        plan: Plan { requests: requests.into() },
        target,
        pacing,
        model: "mock".to_owned(),
        form: BodyForm::Ids,
        http: HttpOptions::default(),
        duration: None,
        grace: Duration::from_secs(20),
        timeout: Duration::from_secs(20),
        threads: 2,
        progress: Arc::new(Progress::default()),
        cancel: CancellationToken::new(),
    }
}

fn send(drive: &Drive) -> Driven {
    run_with(drive, || body).unwrap()
}

fn to(address: SocketAddr) -> Target {
    Target::Gateway(format!("http://{address}"))
}

fn with_engine(options: EngineOptions, test: impl FnOnce(&EngineHandle)) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let engine = runtime.block_on(Engine::start(options)).unwrap();
    test(&engine);
    runtime.block_on(engine.stop());
}

fn quick() -> EngineOptions {
    EngineOptions { events: None, replay: None, ..EngineOptions::default() }
}

/// Steps of some 20 ms.
fn slow() -> EngineOptions {
    let pace = Pace { step_us: 20_000.0, ..Pace::default() };
    EngineOptions { pace, ..quick() }
}

/// A server that does `answer` with each connection once a request's head is there.
fn server(answer: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), Arc::clone(&answer));
            thread::spawn(move || {
                let mut buffer = [0; 8192];
                if stream.read(&mut buffer).is_ok_and(|read| read > 0) {
                    answer(&mut stream);
                }
            });
        }
    });
    address
}

/// One request to a server that says this and closes.
#[track_caller]
fn check(answer: &'static str, expected: &Ended) -> Exchange {
    let address = server(move |stream| {
        stream.write_all(answer.as_bytes()).ok();
    });
    one(address, expected)
}

#[track_caller]
fn one(address: SocketAddr, expected: &Ended) -> Exchange {
    let pacing = Pacing::Closed { concurrency: 1 };
    let begun = Instant::now();
    let driven = send(&Drive {
        timeout: Duration::from_millis(500),
        ..drive(to(address), pacing, vec![planned(0, 8)])
    });
    assert!(begun.elapsed() < Duration::from_secs(10), "took {:?}", begun.elapsed());
    let [exchange] = &driven.exchanges[..] else { panic!("{driven:?}") };
    assert_eq!(&exchange.ended, expected);
    exchange.clone()
}

const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";

#[test]
fn what_goes_wrong_is_told_apart() {
    let failed = Ended::Failed;
    check("", &failed(Failure::Closed));
    check("HTTP/1.1 200 OK\r\ncontent-type: text/ev", &failed(Failure::Closed));
    check("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", &failed(Failure::Closed));
    check("hello\r\n\r\n", &failed(Failure::Garbled));
    check("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", &failed(Failure::Garbled));
    check("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", &failed(Failure::Status(503)));
    let bodies = [
        ("data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"choi", Failure::Closed, 1),
        ("data: {\"choices\":[{\"text\":\"a\"}]}\n\n", Failure::Closed, 1),
        ("data: hello\n\n", Failure::Garbled, 0),
        ("data: {\"error\":{\"message\":\"no\"}}\n\n", Failure::Stream, 0),
    ];
    for (events, failure, pieces) in bodies {
        let answer: &str = Box::leak(format!("{STREAM}{events}").into_boxed_str());
        assert_eq!(check(answer, &failed(failure)).pieces, pieces);
    }
    let silent = server(|_| thread::park());
    let exchange = one(silent, &failed(Failure::Timeout));
    assert!(exchange.ended_ns - exchange.intended_ns >= 490_000_000);
    // Nobody listens on a port that was just given back.
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    one(free, &failed(Failure::Connect));
}

#[test]
fn whole_answers_count_too() {
    let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 104\r\n\r\n\
        {\"choices\":[{\"message\":{\"content\":\"ok\"}}],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":2,\"x\":\"yyyyyyy\"}}";
    let (head, json) = answer.split_once("\r\n\r\n").unwrap();
    let answer = format!("{}\r\n\r\n{json}", head.replace("104", &json.len().to_string()));
    let exchange = check(Box::leak(answer.into_boxed_str()), &Ended::Complete);
    assert_eq!((exchange.pieces, exchange.output_tokens, exchange.prompt_tokens), (1, 2, Some(8)));
}

#[test]
fn a_kept_connection_that_was_closed_is_replaced() {
    const WHOLE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 41\r\n\r\n\
                         {\"choices\":[{\"message\":{\"content\":\"a\"}}]}";
    // One answer for each connection, which says that it stays, and does not.
    let address = server(|stream| stream.write_all(WHOLE.as_bytes()).unwrap());
    let requests = vec![planned(0, 8); 20];
    let driven = send(&drive(to(address), Pacing::Closed { concurrency: 1 }, requests));
    assert!(
        driven.exchanges.iter().all(|exchange| exchange.ended == Ended::Complete),
        "{driven:?}"
    );
}

#[test]
fn usage_tokens_and_pods_are_read() {
    with_engine(quick(), |engine| {
        let requests = vec![planned(1, 64); 3];
        let closed = Pacing::Closed { concurrency: 1 };
        let drive = drive(to(engine.http()), closed, requests);
        let driven = send(&drive);
        assert_eq!((driven.exchanges.len(), driven.unsent), (3, 0));
        for exchange in &driven.exchanges {
            assert_eq!(exchange.ended, Ended::Complete);
            assert_eq!((exchange.pieces, exchange.output_tokens), (4, 4));
            assert_eq!(exchange.prompt_tokens, Some(64));
            assert_eq!(exchange.pod.as_deref(), Some(&*engine.http().to_string()));
            let first = exchange.first_token_ns.unwrap();
            let last = exchange.last_token_ns.unwrap();
            assert!(exchange.intended_ns <= exchange.sent_ns && exchange.sent_ns < first);
            assert!(first < last && last <= exchange.ended_ns, "{exchange:?}");
        }
        let cached: Vec<_> =
            driven.exchanges.iter().map(|exchange| exchange.cached_tokens.unwrap()).collect();
        assert_eq!(cached, [0, 48, 48]);
        assert_eq!(driven.gaps.len(), 9);
        assert_eq!(drive.progress.complete.load(Relaxed), 3);
        assert_eq!(drive.progress.tokens.load(Relaxed), 12);
        assert_eq!(drive.progress.in_flight(), 0);
    });
}

#[test]
fn a_closed_loop_holds_its_concurrency() {
    with_engine(slow(), |engine| {
        let requests = (0..60).map(|group| planned(group, 16)).collect();
        let driven = send(&Drive {
            threads: 2,
            ..drive(to(engine.http()), Pacing::Closed { concurrency: 5 }, requests)
        });
        assert_eq!(driven.exchanges.len(), 60);
        assert_eq!(driven.in_flight.max(), 5);
        assert!(driven.in_flight.mean() > 4.5, "{}", driven.in_flight.mean());
    });
}

#[test]
fn an_open_loop_waits_for_no_answer_and_a_burst_is_one() {
    with_engine(slow(), |engine| {
        let mut requests: Vec<_> = (0..20).map(|n| at(10 * n, None)).collect();
        requests.extend((0..50).map(|_| at(300, Some(0))));
        let pods = Target::Direct(vec![engine.http()]);
        let driven = send(&drive(pods, Pacing::Open, requests));
        assert_eq!(driven.exchanges.len(), 70);
        let late = |exchange: &Exchange| exchange.sent_ns - exchange.intended_ns;
        let worst = driven.exchanges.iter().map(late).max().unwrap();
        // Answers take 80 ms and more; slow machines may be late themselves.
        assert!(worst < 60_000_000, "{worst} ns late");
        let [release] = driven.releases[..] else { panic!("{:?}", driven.releases) };
        println!("burst: {release:?}");
        assert_eq!((release.requests, release.intended_ns), (50, 300_000_000));
        // 1 ms where the machine is not shared.
        assert!(release.spread_ns < 50_000_000, "{release:?}");
    });
}

#[test]
fn turns_follow_their_answers_after_their_think_time() {
    with_engine(quick(), |engine| {
        let think = Duration::from_millis(60);
        let turn =
            |after| Planned { after: Some(After { request: after, think }), ..planned(7, 48) };
        let requests = vec![planned(7, 32), turn(0), turn(1), planned(8, 32), planned(9, 32)];
        for pacing in [Pacing::Closed { concurrency: 1 }, Pacing::Open] {
            let driven = send(&drive(to(engine.http()), pacing, requests.clone()));
            assert_eq!(driven.exchanges.len(), 5, "{pacing:?}");
            for turn in [1, 2] {
                let (before, after) = (&driven.exchanges[turn - 1], &driven.exchanges[turn]);
                assert!(after.sent_ns >= before.ended_ns + 60_000_000, "{before:?} {after:?}");
            }
            // One that is not due blocks no place.
            assert!(driven.exchanges[4].sent_ns < driven.exchanges[2].sent_ns);
        }
    });
    let address = server(|_| {});
    let after = After { request: 0, think: Duration::ZERO };
    let requests = vec![planned(0, 8), Planned { after: Some(after), ..planned(0, 8) }];
    let driven = send(&drive(to(address), Pacing::Closed { concurrency: 2 }, requests));
    assert_eq!((driven.exchanges.len(), driven.unsent), (1, 1));
}

#[test]
fn a_cancelled_run_gives_what_it_measured() {
    with_engine(slow(), |engine| {
        let requests = vec![planned(0, 16); 10_000];
        let drive = drive(to(engine.http()), Pacing::Closed { concurrency: 4 }, requests);
        let driven = thread::scope(|scope| {
            let driven = scope.spawn(|| send(&drive));
            crate::support::eventually("some answers", || {
                let complete = drive.progress.complete.load(Relaxed);
                if complete < 8 { Err(format!("{complete} so far")) } else { Ok(()) }
            });
            drive.cancel.cancel();
            driven.join().unwrap()
        });
        let count = |ended| driven.exchanges.iter().filter(|it| it.ended == ended).count();
        assert!(count(Ended::Complete) >= 8);
        assert!((1..=4).contains(&count(Ended::Incomplete)), "{:?}", driven.exchanges);
        assert_eq!(driven.unsent + driven.exchanges.len(), 10_000);
    });
}

#[test]
fn the_end_of_the_grace_cuts_what_is_open() {
    let silent = server(|_| thread::park());
    let begun = Instant::now();
    let driven = send(&Drive {
        grace: Duration::from_millis(200),
        duration: Some(Duration::from_millis(100)),
        ..drive(to(silent), Pacing::Open, (0..40).map(|n| at(10 * n, None)).collect())
    });
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(driven.unsent >= 29, "{}", driven.unsent);
    for exchange in &driven.exchanges {
        assert_eq!(exchange.ended, Ended::Incomplete);
        assert!(exchange.ended_ns > exchange.sent_ns);
    }
}

#[test]
fn targets_that_are_none_are_refused() {
    let closed = Pacing::Closed { concurrency: 1 };
    for url in ["127.0.0.1:80", "ftp://localhost", "http://", "http://no.such.host.invalid:1"] {
        let target = Target::Gateway(url.to_owned());
        assert!(run_with(&drive(target, closed, vec![planned(0, 8)]), || body).is_err(), "{url}");
    }
    assert!(run_with(&drive(Target::Direct(vec![]), closed, vec![]), || body).is_err());
}
