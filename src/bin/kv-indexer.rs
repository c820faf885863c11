//! `kv-indexer`: indexes the KV-cache events of an LLM fleet and serves prefix scores.

use std::{io::Write as _, process::ExitCode};

use kv_indexer::{
    indexer::{
        self, Addresses, IndexerConfig,
        args::{Args, Start},
    },
    ingest::discovery::parse_pod_flag,
    support::{signal, telemetry},
};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let args = match Args::from_command_line(std::env::args_os()) {
        Ok(args) => args,
        Err(status) => return ExitCode::from(status),
    };
    match args.start(parse_pod_flag, &mut std::io::stdout(), &mut std::io::stderr()) {
        Start::Exit(status) => ExitCode::from(status),
        Start::Run(config) => match run(*config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "Exiting on a fault.");
                ExitCode::FAILURE
            }
        },
    }
}

fn run(config: IndexerConfig) -> anyhow::Result<()> {
    telemetry::init(config.log_format, &config.log_level)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let requested = CancellationToken::new();
        let signals = signal::cancel_on_terminate(requested.clone())?;
        let ended = indexer::run(config, requested, announce).await;
        drop(signals);
        ended
    })
}

/// Tells on standard output where we listen, one line each, for whoever let the kernel choose.
fn announce(addresses: Addresses) {
    let mut out = std::io::stdout();
    let said = writeln!(out, "grpc listening on {}", addresses.grpc)
        .and_then(|()| writeln!(out, "admin listening on {}", addresses.admin))
        .and_then(|()| out.flush());
    // Nobody has to read it.
    said.unwrap_or_default();
}
