//! `kv-indexer`: indexes the KV-cache events of an LLM fleet and serves prefix scores.

use std::process::ExitCode;

use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    kv_indexer::indexer::command::main(std::env::args_os(), CancellationToken::new())
}
