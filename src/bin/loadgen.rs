//! `loadgen`: plays recorded KV-event streams; without a subcommand, a demo of the indexer.

use std::{
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Result;
use clap::{Parser, Subcommand};
use kv_indexer::loadgen::{
    demo::{self, DemoOptions},
    play::{self, PlayOptions},
};

/// Plays recorded KV-event streams over real sockets. Without a command: shows, in a few seconds, what
/// the indexer makes of three recorded engines.
#[derive(Debug, Parser)]
#[command(name = "loadgen", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Demo: use this running indexer (gRPC) instead of starting one.
    #[arg(long, value_name = "http://HOST:PORT")]
    indexer: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Publishes recorded streams as the engines that sent them.
    Replay(PlayOptions),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.command {
        Some(Command::Replay(options)) => replay(options),
        None => show(arguments.indexer),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the program's last words")]
            {
                eprintln!("loadgen: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Plays files until they are through or SIGINT comes.
fn replay(options: PlayOptions) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = Arc::new(AtomicBool::new(false));
    runtime.block_on(async {
        let flag = Arc::clone(&stop);
        let mut job = tokio::task::spawn_blocking(move || {
            play::run(&options, &flag, &mut io::stdout(), &mut io::stderr())
        });
        tokio::select! {
            outcome = &mut job => outcome?,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                stop.store(true, Ordering::Relaxed);
                job.await?
            }
        }
    })
}

/// Runs the demo, against a given indexer or one of its own.
fn show(indexer: Option<String>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let indexer = match indexer {
            Some(address) => address,
            None => start_indexer().await?,
        };
        demo::run(&DemoOptions { indexer, ..DemoOptions::default() }, &mut io::stdout()).await
    })
}

// ---- the indexer in this process ---------------------------------------------------------------

/// Starts an indexer in this process and returns its gRPC address, `http://host:port`.
async fn start_indexer() -> Result<String> {
    anyhow::bail!("no indexer is built into this program yet: give --indexer http://HOST:PORT")
}
