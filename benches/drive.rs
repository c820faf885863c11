//! What sending a request costs: CPU and requests a second of one thread against a pod that streams 16
//! pieces, each a write of its own, and memory with 1000 in flight against one that never answers.
//!
//! `drive pod` serves (it prints its address), `drive silent` accepts and says nothing, `drive run URL
//! CONCURRENCY SECONDS` prints one line; without arguments all of it, with the pod in a process of its
//! own.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark may stop at the first fault"
)]

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kv_indexer::loadgen::{
    drive::{Drive, Driven, Ended, HttpOptions, Pacing, Target, run_with},
    null_pod,
    progress::Progress,
    workload::{BodyForm, Part, Plan, Planned, Prompt},
};
use tokio_util::sync::CancellationToken;

const BODY: &str = r#"{"model":"bench-model","prompt":"PROMPT","max_tokens":16,"stream":true,"stream_options":{"include_usage":true}}"#;

fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["pod"] => serve(true),
        ["silent"] => serve(false),
        ["run", url, concurrency, seconds] => {
            let seconds = Duration::from_secs_f64(seconds.parse().unwrap());
            println!("{}", measure(url, concurrency.parse().unwrap(), seconds));
        }
        _ => all(),
    }
}

fn all() {
    let begun = Instant::now();
    let quick = std::env::args().any(|argument| argument == "--test");
    let seconds = Duration::from_secs_f64(if quick { 0.2 } else { 5.0 });
    let (mut pod, url) = start("pod");
    for concurrency in [1, 32, 128] {
        println!("{}", measure(&url, concurrency, seconds));
    }
    pod.kill().unwrap();
    pod.wait().unwrap();
    let (mut pod, url) = start("silent");
    let before = rss_kib();
    let concurrency = if quick { 50 } else { 1000 };
    let driven = drive(&url, concurrency, Duration::from_millis(500));
    println!(
        "{concurrency} in flight (seen: {}): RSS {} KiB at most, {before} KiB before",
        driven.in_flight.max(),
        peak_rss_kib(),
    );
    pod.kill().unwrap();
    pod.wait().unwrap();
    println!("all of it took {:?}", begun.elapsed());
}

fn start(what: &str) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg(what)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (child, line.trim().to_owned())
}

fn serve(answers: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("http://{}", listener.local_addr().unwrap());
        if answers {
            null_pod::serve_streams(listener, 16, CancellationToken::new()).await.unwrap();
        } else {
            let mut open = Vec::new();
            loop {
                open.push(listener.accept().await.unwrap());
            }
        }
    });
}

fn drive(url: &str, concurrency: usize, duration: Duration) -> Driven {
    let part = Part { seed: 1, tokens: 128 };
    let planned = Planned {
        at: None,
        burst: None,
        prompt: Prompt { parts: [part].into() },
        max_tokens: 16,
        group: 0,
        after: None,
    };
    let requests = (duration.as_secs_f64() * 20_000.0) as usize + concurrency;
    let drive = Drive {
        plan: Plan::closed(vec![planned; requests]),
        target: Target::Gateway(url.to_owned()),
        pacing: Pacing::Closed { concurrency },
        model: "bench-model".to_owned(),
        form: BodyForm::Text,
        http: HttpOptions::default(),
        duration: Some(duration),
        grace: Duration::from_millis(100),
        timeout: Duration::from_secs(10),
        threads: 1,
        progress: Arc::new(Progress::default()),
        cancel: CancellationToken::new(),
    };
    let body = Bytes::from(BODY.replace("PROMPT", &"word ".repeat(128)));
    run_with(&drive, || {
        let body = body.clone();
        move |_: &Planned| vec![body.clone()]
    })
    .unwrap()
}

fn measure(url: &str, concurrency: usize, duration: Duration) -> String {
    let driven = drive(url, concurrency, duration);
    let mut complete: Vec<_> =
        driven.exchanges.iter().filter(|exchange| exchange.ended == Ended::Complete).collect();
    complete.sort_by_key(|exchange| exchange.first_token_ns.unwrap_or(0) - exchange.sent_ns);
    let n = complete.len().max(1);
    let p95 = complete
        .get((n * 95).div_ceil(100).saturating_sub(1))
        .map_or(0, |exchange| exchange.first_token_ns.unwrap_or_default() - exchange.sent_ns);
    let pieces: u64 = complete.iter().map(|exchange| u64::from(exchange.pieces)).sum();
    format!(
        "concurrency {concurrency}: {:.0} req/s, {:.4} CPU-ms per request, TTFT p95 {:.3} ms, {:.1} pieces each, {} complete of {}, in flight {:.1}",
        complete.len() as f64 / driven.elapsed.as_secs_f64(),
        driven.cpu.as_secs_f64() * 1e3 / n as f64,
        p95 as f64 / 1e6,
        pieces as f64 / n as f64,
        complete.len(),
        driven.exchanges.len(),
        driven.in_flight.mean(),
    )
}

fn rss_kib() -> u64 {
    status("VmRSS:")
}

fn peak_rss_kib() -> u64 {
    status("VmHWM:")
}

fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}
