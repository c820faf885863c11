//! `loadgen`: plays recorded KV-event streams or a mock engine, and drives load; without a subcommand, a
//! demo of the indexer.

use std::{
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Result;
use clap::{Parser, Subcommand};
use kv_indexer::{
    epp::server::{self, ConnectionMetrics, GrpcOptions, ServerOptions, Services, null::Null},
    indexer::{self, IndexerConfig},
    loadgen::{
        demo::{self, DemoOptions},
        engine::command::{self, EngineArguments},
        ext_proc::{self, ExtProcOptions},
        null_pod,
        play::{self, PlayOptions},
        report::compare::{self, CompareOptions},
    },
    support::signal::cancel_on_terminate,
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Plays recorded KV-event streams over real sockets, and drives load. Without a command: shows, in a few seconds, what
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
    /// Plays Envoy's part towards an endpoint picker and reports its speed and cost.
    ExtProc(ExtProcOptions),
    /// Runs the yardsticks until SIGINT or SIGTERM: an ext_proc server that decides nothing, and a pod
    /// that computes nothing.
    Null(NullArguments),
    /// Runs a mock inference engine until SIGINT or SIGTERM.
    Engine(EngineArguments),
    /// Tells what changed between two reports.
    Compare(CompareOptions),
}

#[derive(Debug, clap::Args)]
struct NullArguments {
    /// Where the pod listens.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    pod: SocketAddr,
    /// Where the ext_proc server listens; it sends every request to the pod.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    ext_proc: SocketAddr,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.command {
        Some(Command::Replay(options)) => replay(options),
        Some(Command::ExtProc(options)) => drive(&options),
        Some(Command::Null(arguments)) => null(&arguments),
        Some(Command::Engine(arguments)) => engine(arguments),
        Some(Command::Compare(options)) => match compare::run(&options, &mut io::stdout()) {
            Ok(true) => return ExitCode::from(2),
            outcome => outcome.map(drop),
        },
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

/// Loads an endpoint picker.
fn drive(options: &ExtProcOptions) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(ext_proc::run(options, &mut io::stdout()))
}

/// Runs the yardsticks until a signal.
fn null(arguments: &NullArguments) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let _signals = cancel_on_terminate(stop.clone())?;
        let pod = TcpListener::bind(arguments.pod).await?;
        let ext_proc = TcpListener::bind(arguments.ext_proc).await?;
        let destination = pod.local_addr()?;
        let mut out = io::stdout();
        writeln!(out, "pod listening on {destination}")?;
        writeln!(out, "ext_proc listening on {}", ext_proc.local_addr()?)?;
        out.flush()?;
        let service =
            Services::new(Null::new(destination.to_string()), GrpcOptions::default(), None);
        let (options, counters) = (ServerOptions::default(), ConnectionMetrics::default());
        let (served, ran) = tokio::join!(
            null_pod::serve(pod, stop.clone()),
            server::serve(ext_proc, options, service, counters, stop.clone()),
        );
        served?;
        ran
    })
}

/// Runs a mock engine until a signal.
fn engine(arguments: EngineArguments) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let _signals = cancel_on_terminate(stop.clone())?;
        command::run(arguments.options(), stop, &mut io::stdout()).await
    })
}

/// Runs the demo, against a given indexer or one in this process.
fn show(indexer: Option<String>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let mut out = io::stdout();
        let Some(address) = indexer else { return embedded(&mut out).await };
        demo::run(&DemoOptions { indexer: address, ..DemoOptions::default() }, &mut out).await
    })
}

/// Starts an indexer on free loopback ports, runs the demo against it and stops it.
async fn embedded(out: &mut io::Stdout) -> Result<()> {
    let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let config = IndexerConfig { grpc_listen: any, admin_listen: any, ..IndexerConfig::default() };
    let stop = CancellationToken::new();
    let (bound, listens) = oneshot::channel();
    let requested = stop.clone();
    let mut running = JoinSet::new();
    running.spawn(indexer::run(config, requested, |addresses| {
        // The demo may have given up already.
        bound.send(addresses).ok();
    }));
    let shown = match listens.await {
        Ok(addresses) => {
            let indexer = format!("http://{}", addresses.grpc);
            demo::run(&DemoOptions { indexer, ..DemoOptions::default() }, out).await
        }
        // It ended before it listened; its own error says why.
        Err(_) => Ok(()),
    };
    stop.cancel();
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    shown
}
