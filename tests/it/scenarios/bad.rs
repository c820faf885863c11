//! Targets that misbehave: counted by label, in bounded time.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use super::Run;

/// What a server does with a connection after the first bytes of a request.
type Behaviour = fn(&mut TcpStream);

/// A server on a free port that serves each connection so; its threads end with the test's process.
fn server(behaviour: Behaviour) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            thread::spawn(move || {
                let mut buffer = [0; 16 << 10];
                if stream.read(&mut buffer).is_ok_and(|read| read > 0) {
                    behaviour(&mut stream);
                }
            });
        }
    });
    address
}

const HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";

fn say(stream: &mut TcpStream, text: &str) {
    // A client that went away has said enough.
    stream.write_all(text.as_bytes()).ok();
}

/// Sends ten requests at a rate to a server; all fail with the label.
#[track_caller]
fn check(behaviour: Behaviour, label: &str) {
    check_target(&format!("http://{}", server(behaviour)), label);
}

#[track_caller]
fn check_target(target: &str, label: &str) {
    let begun = Instant::now();
    let run = Run::of(&[
        "steady",
        "--target",
        target,
        "--rate=20",
        "--requests=10",
        "--duration=2s",
        "--timeout=1s",
        "--grace=2s",
        "--cold",
        "--workload=unique:prompt=64,output=4",
    ]);
    assert!(begun.elapsed() < Duration::from_secs(20), "{}", run.said());
    let report = run.report();
    let scenario = &report["scenarios"][0];
    assert_eq!(scenario["requests"], 10, "{}", run.said());
    assert_eq!(scenario["errors"], 10, "{scenario:#}");
    assert_eq!(scenario["errors_by_label"][label], 10, "{:#}", scenario["errors_by_label"]);
    assert_eq!(report["valid"], false, "a run without an answer is not valid");
}

#[test]
fn a_target_that_nobody_listens_at() {
    // Bound and not listened at for connections that stay: freed at once.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    check_target(&format!("http://{address}"), "connect");
}

#[test]
fn a_server_that_never_answers() {
    check(|_| thread::sleep(Duration::from_secs(30)), "timeout");
}

#[test]
fn a_server_that_stops_in_the_middle_of_a_line() {
    check(
        |stream| {
            say(stream, HEAD);
            say(stream, "data: {\"choices\":[{\"text\":\" a\"}]}\n\ndata: {\"choi");
        },
        "closed_early",
    );
}

#[test]
fn a_server_that_closes_before_the_answer() {
    check(|_| {}, "closed_early");
}

#[test]
fn a_server_that_speaks_something_else() {
    check(|stream| say(stream, "220 smtp.example.org ESMTP\r\n"), "garbled");
}

#[test]
fn a_server_that_refuses() {
    check(
        |stream| {
            say(
                stream,
                "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            );
        },
        "http_503",
    );
}

#[test]
fn an_error_inside_the_stream() {
    check(
        |stream| {
            say(stream, HEAD);
            say(
                stream,
                "data: {\"error\":{\"message\":\"out of memory\",\"code\":500}}\n\ndata: [DONE]\n\n",
            );
        },
        "error_in_stream",
    );
}

#[test]
fn commands_that_do_not_exist_and_flags_that_are_wrong() {
    for (arguments, expected) in [
        (&["stady"][..], "stady"),
        (&["steady", "--workload=shared-prefix:gruops=3"], "gruops"),
        (&["steady", "--target=ftp://x"], "ftp"),
        (&["steady", "--policies=fastest"], "fastest"),
        (&["sweep", "--storm=publishers=x"], "publishers"),
        (&["throughput", "--concurrency=0"], "concurrency"),
        (&["steady", "--pid=gateway=1"], "--target"),
        (&["compare", "/nowhere/a.json", "/nowhere/b.json"], "/nowhere/a.json"),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_loadgen"))
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}

/// With `--strict`, a report that is not valid is an exit status.
#[test]
fn strict_runs_tell_by_their_exit_status() {
    let address = server(|_| {});
    let target = format!("--target=http://{address}");
    let run = Run::of(&[
        "steady",
        &target,
        "--rate=20",
        "--requests=5",
        "--duration=1s",
        "--cold",
        "--strict",
    ]);
    assert_eq!(run.output.status.code(), Some(3), "{}", run.said());
    assert_eq!(run.written()["valid"], false);
}
