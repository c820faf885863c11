//! `kv-indexer` as a command: from the command line to the exit status.

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use tokio_util::sync::CancellationToken;

use crate::{
    indexer::{
        self, Addresses, IndexerConfig,
        args::{Args, Command, Start},
    },
    ingest::discovery::parse_pod_flag,
    support::{signal, telemetry},
    tokenize,
};

/// Runs the command of a command line, the program's name first; serving ends when `requested` is
/// cancelled, or with SIGTERM or SIGINT. What is to be said goes to standard output and error, the
/// addresses one a line. Blocks the calling thread, which must not be one of a runtime.
pub fn main(line: impl IntoIterator<Item = OsString>, requested: CancellationToken) -> ExitCode {
    let args = match Args::from_command_line(line) {
        Ok(args) => args,
        Err(status) => return ExitCode::from(status),
    };
    if let Some(Command::Tokenize(command)) = &args.command {
        return end(tokenize::command::run(command, &mut std::io::stdout().lock()));
    }
    if let Some(Command::Explain(explain)) = &args.command {
        return ExitCode::from(explain.run(&mut std::io::stdout(), &mut std::io::stderr()));
    }
    match args.start(parse_pod_flag, &mut std::io::stdout(), &mut std::io::stderr()) {
        Start::Exit(status) => ExitCode::from(status),
        Start::Run(config) => match serve(*config, requested) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "Exiting on a fault.");
                ExitCode::FAILURE
            }
        },
    }
}

/// The status of a command that ended, and what went wrong on standard error.
fn end(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // Whoever closed our output still gets the status.
    writeln!(std::io::stderr(), "kv-indexer: {error:#}").unwrap_or_default();
    ExitCode::FAILURE
}

fn serve(config: IndexerConfig, requested: CancellationToken) -> anyhow::Result<()> {
    telemetry::init(config.log_format, &config.log_level)?;
    raise_descriptors(config.ingest.max_pods);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let signals = signal::cancel_on_terminate(requested.clone())?;
        let ended = indexer::run(config, requested, announce).await;
        drop(signals);
        ended
    })
}

/// Takes as many file descriptors as the system gives: libzmq needs several for each socket.
fn raise_descriptors(max_pods: usize) {
    /// A subscription with its monitor, and a replay under way.
    const PER_POD: u64 = 10;
    /// Listeners, connections of routers, files.
    const OTHERS: u64 = 256;
    let wanted = max_pods as u64 * PER_POD + OTHERS;
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) if limit >= wanted => {}
        Ok(limit) => tracing::warn!(limit, wanted, "Too few file descriptors for maxPods pods."),
        Err(error) => tracing::warn!(%error, "The limit of file descriptors cannot be raised."),
    }
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
