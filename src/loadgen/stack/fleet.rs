//! `loadgen fleet`: engines in one process.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::EngineAddress;
use crate::loadgen::engine::{Engine, EngineOptions, Pace, command::PaceArguments};

/// What the engines are like.
#[derive(Clone, Debug, PartialEq)]
pub struct FleetOptions {
    /// How many, at least 1.
    pub engines: usize,
    /// Served model name.
    pub model: String,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks of each engine.
    pub num_gpu_blocks: u32,
    /// Requests that run at once at most, per engine.
    pub max_num_seqs: usize,
    /// Tokens computed in one step at most: the prefill budget that all requests of an engine share.
    pub max_num_batched_tokens: usize,
    /// How long steps take.
    pub pace: Pace,
}

impl Default for FleetOptions {
    /// Four small and quick engines.
    fn default() -> Self {
        Self {
            engines: 4,
            model: "mock".to_owned(),
            block_size: 16,
            num_gpu_blocks: 1_920,
            max_num_seqs: 256,
            max_num_batched_tokens: 8_192,
            pace: Pace::default(),
        }
    }
}

/// The ports of a fleet's first engine; the one after it takes the next ones. 0 = any free one, for all
/// of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FleetPorts {
    /// The address of all engines, and the port of HTTP.
    pub http: SocketAddr,
    /// Events.
    pub events: u16,
    /// Replays.
    pub replay: u16,
}

impl Default for FleetPorts {
    /// Free ports of loopback.
    fn default() -> Self {
        Self { http: (Ipv4Addr::LOCALHOST, 0).into(), events: 0, replay: 0 }
    }
}

/// Arguments of `loadgen fleet`.
#[derive(Clone, Debug, clap::Args)]
pub struct FleetArguments {
    /// Engines.
    #[arg(long, value_name = "N", default_value_t = FleetOptions::default().engines, value_parser = up_to(MOST_ENGINES))]
    engines: usize,
    /// Where the first engine serves HTTP, the others at the ports after it; port 0 = free ones.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where the first engine publishes events, the others at the ports after it; 0 = free ones.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    events_port: u16,
    /// Where the first engine answers replays, likewise.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    replay_port: u16,
    /// Served model name.
    #[arg(long, value_name = "NAME", default_value_t = FleetOptions::default().model)]
    model: String,
    /// Directory with the tokenizer.json and the chat template of a model. Default: a pseudo-tokenizer.
    #[arg(long, value_name = "DIR")]
    model_dir: Option<PathBuf>,
    /// Tokens per block.
    #[arg(long, value_name = "N", default_value_t = FleetOptions::default().block_size, value_parser = up_to(65_536))]
    block_size: usize,
    /// Blocks of each engine, the null block among them.
    #[arg(long, value_name = "N", default_value_t = FleetOptions::default().num_gpu_blocks, value_parser = clap::value_parser!(u32).range(2..))]
    num_gpu_blocks: u32,
    /// Requests that run at once at most, per engine.
    #[arg(long, value_name = "N", default_value_t = FleetOptions::default().max_num_seqs, value_parser = up_to(1 << 20))]
    max_num_seqs: usize,
    /// Tokens computed in one step at most: the prefill budget that all requests of an engine share.
    #[arg(long, value_name = "N", default_value_t = FleetOptions::default().max_num_batched_tokens, value_parser = up_to(1 << 30))]
    max_num_batched_tokens: usize,
    #[command(flatten)]
    pace: PaceArguments,
    /// Print a JSON object a line instead of text.
    #[arg(long)]
    json: bool,
}

/// Engines of a fleet at most: each one is a thread and two sockets more.
const MOST_ENGINES: usize = 1_024;

/// Numbers from 1.
fn up_to(most: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        Ok(_) => Err(format!("1 to {most}")),
        Err(error) => Err(format!("{error}")),
    }
}

impl FleetArguments {
    /// What the engines are like, and where they are.
    #[must_use]
    pub fn options(&self) -> (FleetOptions, FleetPorts) {
        let options = FleetOptions {
            engines: self.engines,
            model: self.model.clone(),
            block_size: self.block_size,
            num_gpu_blocks: self.num_gpu_blocks,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            pace: self.pace.into(),
        };
        let ports =
            FleetPorts { http: self.listen, events: self.events_port, replay: self.replay_port };
        (options, ports)
    }
}

impl FleetOptions {
    /// The arguments of `loadgen fleet` for these engines.
    #[must_use]
    pub fn arguments(&self, ports: &FleetPorts) -> Vec<String> {
        let Self { engines, model, block_size, num_gpu_blocks, pace, .. } = self;
        let mut arguments = vec![
            format!("--engines={engines}"),
            format!("--model={model}"),
            format!("--block-size={block_size}"),
            format!("--num-gpu-blocks={num_gpu_blocks}"),
            format!("--max-num-seqs={}", self.max_num_seqs),
            format!("--max-num-batched-tokens={}", self.max_num_batched_tokens),
            format!("--listen={}", ports.http),
            format!("--events-port={}", ports.events),
            format!("--replay-port={}", ports.replay),
        ];
        arguments.extend(pace.arguments());
        arguments
    }
}

/// An engine in the output of `loadgen fleet --json`.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    name: String,
    http: SocketAddr,
    events: String,
    replay: String,
}

impl FromStr for EngineAddress {
    type Err = serde_json::Error;

    /// From a line of `loadgen fleet --json`.
    fn from_str(line: &str) -> Result<Self, serde_json::Error> {
        let Line { name, http, events, replay } = serde_json::from_str(line)?;
        Ok(Self { name, http, events, replay })
    }
}

/// Runs engines until `stop`; writes where each one is to `out`, a line each.
///
/// # Errors
///
/// Addresses that cannot be bound, a model directory that cannot be used.
pub async fn run(
    arguments: FleetArguments,
    stop: CancellationToken,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let (options, ports) = arguments.options();
    let mut engines = Vec::new();
    for number in 0..options.engines {
        let engine = engine(&options, &ports, number, arguments.model_dir.clone());
        let engine = engine.with_context(|| format!("engine {number}: ports beyond 65535"))?;
        let engine = Engine::start(engine).await;
        engines.push(engine.with_context(|| format!("engine {number}"))?);
    }
    for engine in &engines {
        let source = engine.event_sources().into_iter().next();
        let source = source.context("an engine without events")?;
        let line = Line {
            name: engine.http().to_string(),
            http: engine.http(),
            events: source.endpoint,
            replay: source.replay_endpoint.unwrap_or_default(),
        };
        if arguments.json {
            writeln!(out, "{}", serde_json::to_string(&line)?)?;
        } else {
            let Line { http, events, replay, .. } = line;
            writeln!(out, "http://{http} events {events} replay {replay}")?;
        }
    }
    out.flush()?;
    stop.cancelled().await;
    for engine in engines {
        engine.stop().await;
    }
    Ok(())
}

/// The engine of this number; `None` where its ports end.
fn engine(
    options: &FleetOptions,
    ports: &FleetPorts,
    number: usize,
    model_dir: Option<PathBuf>,
) -> Option<EngineOptions> {
    let port = |first: u16| match first {
        0 => Some(0),
        first => first.checked_add(u16::try_from(number).ok()?),
    };
    let zmq = |first| {
        let host = match ports.http.ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let port = port(first)?;
        Some(if port == 0 { format!("tcp://{host}:*") } else { format!("tcp://{host}:{port}") })
    };
    Some(EngineOptions {
        listen: SocketAddr::new(ports.http.ip(), port(ports.http.port())?),
        model: options.model.clone(),
        block_size: options.block_size,
        num_gpu_blocks: options.num_gpu_blocks,
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
        events: Some(zmq(ports.events)?),
        replay: Some(zmq(ports.replay)?),
        pace: options.pace,
        model_dir,
        ..EngineOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        fleet: FleetArguments,
    }

    #[test]
    fn every_option_has_a_flag() {
        #[track_caller]
        fn check(options: &FleetOptions, ports: FleetPorts) {
            let words = options.arguments(&ports);
            let line = Line::try_parse_from(std::iter::once("fleet".to_owned()).chain(words));
            assert_eq!(line.unwrap().fleet.options(), (options.clone(), ports));
        }
        check(&FleetOptions::default(), FleetPorts::default());
        let pace = Pace {
            step_us: 1.5,
            prefill_us_per_token: 0.25,
            decode_us_per_step: 7.0,
            decode_us_per_sequence: 8.0,
            request_us: 9.0,
            scale: 0.125,
        };
        let options = FleetOptions {
            engines: 7,
            model: "a b".to_owned(),
            block_size: 64,
            num_gpu_blocks: 99,
            max_num_seqs: 3,
            max_num_batched_tokens: 512,
            pace,
        };
        let http = "[::1]:8000".parse().unwrap();
        check(&options, FleetPorts { http, events: 5557, replay: 5657 });
    }

    #[test]
    fn ports_count_from_the_first() {
        let options = FleetOptions::default();
        let of = |http: &str, events, number| {
            let ports = FleetPorts { http: http.parse().unwrap(), events, replay: 0 };
            let engine = engine(&options, &ports, number, None)?;
            Some((engine.listen.to_string(), engine.events?, engine.replay?))
        };
        let want = |http: &str, events: &str, replay: &str| {
            Some((http.to_owned(), events.to_owned(), replay.to_owned()))
        };
        let any = "tcp://127.0.0.1:*";
        assert_eq!(of("127.0.0.1:0", 0, 3), want("127.0.0.1:0", any, any));
        assert_eq!(of("127.0.0.1:80", 50, 3), want("127.0.0.1:83", "tcp://127.0.0.1:53", any));
        assert_eq!(of("[::1]:0", 50, 1), want("[::1]:0", "tcp://[::1]:51", "tcp://[::1]:*"));
        assert_eq!(of("127.0.0.1:65535", 0, 1), None);
    }
}
