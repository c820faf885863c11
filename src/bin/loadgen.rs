//! `loadgen`: the load driver; without a subcommand, a short version of its scenarios on a fleet of mock
//! engines.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use clap::{Parser, Subcommand};
use kv_indexer::{
    epp::{
        self,
        server::{
            self, ConnectionMetrics, GrpcOptions, ServerOptions, Services, health::Health,
            null::Null,
        },
    },
    indexer::{self, IndexerConfig},
    loadgen::{
        capacity::command::{self as capacity, CapacityOptions},
        demo::{self, DemoOptions},
        engine::command::{self, EngineArguments},
        ext_proc::{self, ExtProcOptions},
        freshness::command::{self as storm_command, StormArguments},
        null_pod,
        play::{self, PlayOptions},
        report::compare::{self, CompareOptions},
        scenario::{
            self,
            command::{Asked, RunTrace, Steady, Sweep, Throughput},
            quick::Quick,
        },
        stack::{
            fleet::{self, FleetArguments},
            guard,
        },
        workload::trace::command::{self as trace, TraceCommand},
    },
    support::signal::cancel_on_terminate,
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// Drives load at gateways, endpoint pickers and fleets of engines, and measures what routing is worth. Without a
/// command: a short version of steady, throughput and sweep, and of workloads on which prefixes are worth little,
/// on processes of its own.
#[derive(Debug, Parser)]
#[command(name = "loadgen", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    quick: Quick,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One request after another, or a constant rate.
    Steady(Box<Steady>),
    /// As many requests in parallel as asked, one level after the other.
    Throughput(Box<Throughput>),
    /// Irregular arrivals with bursts of requests, and bursts of events.
    Sweep(Box<Sweep>),
    /// Recorded traffic: sends it, makes traces, and says what is in them.
    #[command(subcommand)]
    Trace(TraceAction),
    /// Tells what changed between two reports; exit status 2 if something became worse.
    Compare(CompareOptions),
    /// Measures how late an indexer is, idle and under bursts of events.
    Storm(StormArguments),
    /// Puts published results of routing policies beside what our model of an engine says.
    Capacity(CapacityOptions),
    /// Shows what an indexer makes of three recorded engines.
    Demo(DemoArguments),
    /// Publishes recorded streams as the engines that sent them.
    Replay(PlayOptions),
    /// Plays Envoy's part towards an endpoint picker and reports its speed and cost.
    ExtProc(ExtProcOptions),
    /// Runs the yardsticks until SIGINT or SIGTERM: an ext_proc server that decides nothing, and a pod
    /// that computes nothing.
    Null(NullArguments),
    /// Runs a mock inference engine until SIGINT or SIGTERM.
    Engine(EngineArguments),
    /// Runs several mock inference engines until SIGINT or SIGTERM, and prints where each one is.
    Fleet(FleetArguments),
    /// Runs a part of a stack, which ends with its parent: when standard input ends.
    #[command(hide = true)]
    Component(ComponentArguments),
}

/// The programs of a stack: those of this crate, and any other one.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Part {
    Epp,
    KvIndexer,
    Fleet,
    Null,
    Guard,
}

#[derive(Debug, clap::Args)]
struct ComponentArguments {
    part: Part,
    /// Its command line.
    #[arg(last = true)]
    line: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
enum TraceAction {
    /// Sends a trace, each request at its time.
    Run(Box<RunTrace>),
    #[command(flatten)]
    Tool(TraceCommand),
}

#[derive(Debug, clap::Args)]
struct DemoArguments {
    /// Use this running indexer (gRPC) instead of starting one.
    #[arg(long, value_name = "http://HOST:PORT")]
    indexer: Option<String>,
}

#[derive(Debug, clap::Args)]
struct NullArguments {
    /// Where the pod listens.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    pod: SocketAddr,
    /// Where the ext_proc server listens; it sends every request to the pod, or to the destinations.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    ext_proc: SocketAddr,
    /// Another pod, in place of the one above; may be repeated, and they are named in turn.
    #[arg(long, value_name = "IP:PORT")]
    destination: Vec<SocketAddr>,
}

/// A command line that cannot be read; `EX_USAGE` of sysexits.h.
const USAGE: u8 = 64;
/// A report that is not valid, where that was asked for.
const NOT_VALID: u8 = 3;
/// Something became worse.
const WORSE: u8 = 2;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and versions go to standard output and are no fault.
            let status = if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
            // Nobody may be reading.
            error.print().unwrap_or_default();
            return status;
        }
    };
    let stop = CancellationToken::new();
    let outcome = match arguments.command {
        None => return scenarios(arguments.quick.asked()),
        Some(Command::Steady(steady)) => return scenarios(steady.asked()),
        Some(Command::Throughput(it)) => return scenarios(it.asked()),
        Some(Command::Sweep(sweep)) => return scenarios(sweep.asked()),
        Some(Command::Trace(TraceAction::Run(it))) => return scenarios(it.asked()),
        Some(Command::Trace(TraceAction::Tool(command))) => trace::run(&command, &mut io::stdout()),
        Some(Command::Compare(options)) => match compare::run(&options, &mut io::stdout()) {
            Ok(true) => return ExitCode::from(WORSE),
            outcome => outcome.map(drop),
        },
        Some(Command::Storm(arguments)) => storm(&arguments),
        Some(Command::Capacity(options)) => capacity::run(&options, &mut io::stdout()),
        Some(Command::Demo(arguments)) => show(arguments.indexer),
        Some(Command::Replay(options)) => replay(options),
        Some(Command::ExtProc(options)) => drive(&options),
        Some(Command::Null(arguments)) => null(&arguments, stop),
        Some(Command::Engine(arguments)) => engine(arguments),
        Some(Command::Fleet(arguments)) => run_fleet(arguments, stop),
        Some(Command::Component(arguments)) => return component(arguments, stop),
    };
    end(outcome)
}

/// Runs scenarios until they are through or a signal comes, and writes their report in any case.
fn scenarios(asked: Result<Asked>) -> ExitCode {
    let run = || {
        let Asked { specs, common, outputs, strict } = asked?;
        let runtime = tokio::runtime::Runtime::new()?;
        let mut report = runtime.block_on(async {
            let stop = CancellationToken::new();
            let _signals = cancel_on_terminate(stop.clone())?;
            scenario::run(&specs, &common, &stop).await
        })?;
        let line: Vec<String> = std::env::args().skip(1).collect();
        report.config = serde_json::json!({"command": format!("loadgen {}", line.join(" "))});
        outputs.write(&report, &mut io::stdout())?;
        Ok(strict && !report.valid)
    };
    match run() {
        Ok(true) => ExitCode::from(NOT_VALID),
        outcome => end(outcome.map(drop)),
    }
}

/// The status of a command that ended, and what went wrong on standard error.
fn end(outcome: Result<()>) -> ExitCode {
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

/// Runs a part of a stack until its parent is gone.
fn component(arguments: ComponentArguments, stop: CancellationToken) -> ExitCode {
    let ComponentArguments { part, line } = arguments;
    if let Err(error) = guard::stop_with_parent(stop.clone()) {
        return end(Err(error.into()));
    }
    let named = |names: &[&str]| {
        let names: Vec<OsString> = names.iter().map(OsString::from).collect();
        names.into_iter().chain(line.clone())
    };
    match part {
        Part::Epp => epp::command::main(named(&["epp"]), stop),
        Part::KvIndexer => indexer::command::main(named(&["kv-indexer"]), stop),
        Part::Guard => end(run_guard(line, stop)),
        Part::Fleet => match Arguments::parse_from(named(&["loadgen", "fleet"])).command {
            Some(Command::Fleet(arguments)) => end(run_fleet(arguments, stop)),
            _ => ExitCode::FAILURE,
        },
        Part::Null => match Arguments::parse_from(named(&["loadgen", "null"])).command {
            Some(Command::Null(arguments)) => end(null(&arguments, stop)),
            _ => ExitCode::FAILURE,
        },
    }
}

/// Runs another program until its parent's parent is gone.
fn run_guard(line: Vec<OsString>, stop: CancellationToken) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let _signals = cancel_on_terminate(stop.clone())?;
        guard::run(line, stop, &mut io::stdout()).await
    })
}

/// Runs engines until a signal.
fn run_fleet(arguments: FleetArguments, stop: CancellationToken) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let _signals = cancel_on_terminate(stop.clone())?;
        fleet::run(arguments, stop, &mut io::stdout()).await
    })
}

/// Runs the yardsticks until a signal.
fn null(arguments: &NullArguments, stop: CancellationToken) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let _signals = cancel_on_terminate(stop.clone())?;
        let pod = TcpListener::bind(arguments.pod).await?;
        let ext_proc = TcpListener::bind(arguments.ext_proc).await?;
        let destination = pod.local_addr()?;
        let mut out = io::stdout();
        writeln!(out, "pod listening on {destination}")?;
        writeln!(out, "ext_proc listening on {}", ext_proc.local_addr()?)?;
        out.flush()?;
        let destinations = match arguments.destination.as_slice() {
            [] => &[destination],
            given => given,
        };
        let null = Null::in_turn(destinations.iter().map(|it| it.to_string().into()));
        let health = Health::new();
        health.set_synced(true);
        health.set_plugins_ready(true);
        let service = Services::new(null, GrpcOptions::default(), Some(health));
        // Nobody minds if an exchange with a yardstick ends early.
        let options = ServerOptions { drain: Duration::from_secs(1), ..ServerOptions::default() };
        let counters = ConnectionMetrics::default();
        let (served, ran) = tokio::join!(
            null_pod::serve(pod, stop.clone()),
            server::serve(ext_proc, options, service, counters, stop),
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

/// Measures freshness of a given indexer, or of one in this process.
fn storm(arguments: &StormArguments) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let _signals = cancel_on_terminate(stop.clone())?;
        let mut out = io::stdout();
        if let Some(indexer) = arguments.indexer {
            return storm_command::run(arguments, indexer, stop, &mut out).await;
        }
        with_indexer(async |indexer| {
            let pid = arguments.pid.or(Some(std::process::id()));
            let arguments = StormArguments { pid, ..arguments.clone() };
            storm_command::run(&arguments, indexer, stop, &mut out).await
        })
        .await
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
    with_indexer(async |address| {
        let indexer = format!("http://{address}");
        demo::run(&DemoOptions { indexer, ..DemoOptions::default() }, out).await
    })
    .await
}

/// Starts an indexer on free loopback ports, lets it be used and stops it.
async fn with_indexer(using: impl AsyncFnOnce(SocketAddr) -> Result<()>) -> Result<()> {
    let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let config = IndexerConfig { grpc_listen: any, admin_listen: any, ..IndexerConfig::default() };
    let stop = CancellationToken::new();
    let (bound, listens) = oneshot::channel();
    let requested = stop.clone();
    let mut running = JoinSet::new();
    running.spawn(indexer::run(config, requested, |addresses| {
        // Whoever uses it may have given up already.
        bound.send(addresses).ok();
    }));
    let used = match listens.await {
        Ok(addresses) => using(addresses.grpc).await,
        // It ended before it listened; its own error says why.
        Err(_) => Ok(()),
    };
    stop.cancel();
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    used
}
