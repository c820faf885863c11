//! The integration tests: one binary, one link.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests; allow-…-in-tests sees only #[test] bodies"
)]

mod architecture;
mod config;
mod differential;
mod discovery;
mod drive;
mod engine;
mod epp;
mod epp_config;
mod exactness;
mod freshness;
mod fuzz_corpora;
mod html_report;
mod ingest;
mod openai_client;
mod precise_embedded;
mod precise_remote;
mod replay_tool;
mod replicas;
mod report;
mod resources;
mod scenarios;
mod security;
mod service;
mod stack;
mod streams;
mod support;
mod tokenize;
mod tokenize_cache;
mod wire;
