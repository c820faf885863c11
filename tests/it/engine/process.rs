//! `loadgen engine` as a process.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use crate::support::{
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
