//! `epp`: the endpoint picker, an Envoy `ext_proc` server.

use std::process::ExitCode;

use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    kv_indexer::epp::command::main(std::env::args_os(), CancellationToken::new())
}
