//! `loadgen engine` as a process.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use crate::support::{
    fixture,
    http::{get, post},
    interrupt, terminate,
};

#[test]
fn it_prints_its_addresses_and_stops_on_signals() {
    for stop in [terminate, interrupt] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_loadgen"))
            .args(["engine", "--model", "m", "--lora", "a", "--lora", "b", "--block-size", "4"])
            .args(["--data-parallel-size", "2", "--form", "array", "--metrics-padding", "1000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let http = lines.next().unwrap();
        let http = http.strip_prefix("http listening on ").unwrap().parse().unwrap();
        for rank in 0..2 {
            let line = lines.next().unwrap();
            assert!(
                line.starts_with(&format!("rank {rank} publishes on tcp://127.0.0.1:")),
                "{line}"
            );
        }
        let body = r#"{"model": "b", "prompt": "some words to begin with", "max_tokens": 2}"#;
        assert_eq!(post(http, "/v1/completions", body).status, 200);
        assert!(get(http, "/metrics").body.contains("block_size=\"4\""));
        stop(&child);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn it_tokenizes_as_a_model_does() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_loadgen"))
        .args(["engine", "--no-scale-out", "--no-prompt-tokens-details", "--model-dir"])
        .arg(fixture("tokenize-tiny"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let http = lines.next().unwrap();
    let http = http.strip_prefix("http listening on ").unwrap().parse().unwrap();
    let body = r#"{"messages": [{"role": "user", "content": "the time"}], "max_tokens": 1}"#;
    let reply = post(http, "/v1/chat/completions", body).json();
    // Seven of the template, one for each word, and a line break.
    assert_eq!(reply["usage"]["prompt_tokens"], 10);
    assert!(reply["usage"]["prompt_tokens_details"].is_null());
    assert_eq!(post(http, "/v1/completions/render", "{}").status, 403);
    terminate(&child);
    assert!(child.wait().unwrap().success());

    let wrong = Command::new(env!("CARGO_BIN_EXE_loadgen"))
        .args(["engine", "--model-dir", "/nowhere"])
        .output()
        .unwrap();
    assert!(!wrong.status.success());
    let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(said.contains("/nowhere/tokenizer.json"), "{said}");
}
