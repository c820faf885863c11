//! `epp` as a command: from the command line to the exit status.

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use tokio_util::sync::CancellationToken;

use crate::{
    epp::{
        args::{Args, EX_USAGE, Start},
        config::{Loaded, Parts},
        plugins,
        run::{self, Addresses, Ground},
    },
    support::{signal, telemetry},
};

/// Runs the endpoint picker until `requested` is cancelled, or SIGTERM or SIGINT comes. `line` is the
/// command line, the program's name first. What is to be said goes to standard output and error, the
/// addresses one a line. Blocks the calling thread, which must not be one of a runtime.
pub fn main(line: impl IntoIterator<Item = OsString>, requested: CancellationToken) -> ExitCode {
    let args = match Args::from_command_line(line) {
        Ok(args) => args,
        Err(status) => return ExitCode::from(status),
    };
    match start(&args, requested) {
        Ok(status) => status,
        Err(error) => {
            // Before there is a log.
            writeln!(std::io::stderr(), "epp: {error:#}").unwrap_or_default();
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Args, requested: CancellationToken) -> anyhow::Result<ExitCode> {
    let ground = Ground::new()?;
    let types = plugins::types();
    let parts = Parts {
        types: &types,
        endpoints: &ground.endpoints,
        metrics: &ground.registry,
        allow_experimental: false,
        defaults: &[],
    };
    let loaded = match args.start(&parts, &mut std::io::stdout(), &mut std::io::stderr()) {
        Start::Exit(status) => return Ok(ExitCode::from(status)),
        Start::Run(loaded) => *loaded,
    };
    if let Err(error) = telemetry::init(args.log_format(), &args.log_level()) {
        writeln!(std::io::stderr(), "epp: {error:#}").unwrap_or_default();
        return Ok(ExitCode::from(EX_USAGE));
    }
    Ok(match serve(args, loaded, ground, requested) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "Exiting on a fault.");
            ExitCode::FAILURE
        }
    })
}

fn serve(
    args: &Args,
    loaded: Loaded,
    ground: Ground,
    requested: CancellationToken,
) -> anyhow::Result<()> {
    // Streams have threads of their own; what is left is little.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let signals = signal::cancel_on_terminate(requested.clone())?;
        let ended = run::run(args, loaded, ground, requested, announce).await;
        drop(signals);
        ended
    })
}

/// Tells on standard output where we listen, one line each, for whoever let the kernel choose.
fn announce(addresses: Addresses) {
    let mut out = std::io::stdout();
    let said = writeln!(out, "ext_proc listening on {}", addresses.ext_proc)
        .and_then(|()| writeln!(out, "health listening on {}", addresses.health))
        .and_then(|()| writeln!(out, "metrics listening on {}", addresses.metrics))
        .and_then(|()| match addresses.debug {
            Some(debug) => writeln!(out, "debug listening on {debug}"),
            None => Ok(()),
        })
        .and_then(|()| out.flush());
    // Nobody has to read it.
    said.unwrap_or_default();
}
