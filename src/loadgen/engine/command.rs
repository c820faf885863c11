//! `loadgen engine`: one mock engine as a process.

use std::{io::Write, net::SocketAddr, path::PathBuf};

use anyhow::Result;
use tokio_util::sync::CancellationToken;

use super::{Engine, EngineOptions, EventForm, Pace};

/// How long steps take, as flags.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct PaceArguments {
    /// Microseconds that a request needs before it is queued.
    #[arg(long, value_name = "US", default_value_t = Pace::default().request_us)]
    request_us: f64,
    /// Microseconds of every step.
    #[arg(long, value_name = "US", default_value_t = Pace::default().step_us)]
    step_us: f64,
    /// Microseconds per prompt token that is not cached.
    #[arg(long, value_name = "US", default_value_t = Pace::default().prefill_us_per_token)]
    prefill_us_per_token: f64,
    /// Microseconds of every step that makes further tokens.
    #[arg(long, value_name = "US", default_value_t = Pace::default().decode_us_per_step)]
    decode_us_per_step: f64,
    /// Further microseconds of such a step for each request in it that makes one.
    #[arg(long, value_name = "US", default_value_t = Pace::default().decode_us_per_sequence)]
    decode_us_per_sequence: f64,
    /// Factor of all five; 0 = as fast as possible.
    #[arg(long, value_name = "FACTOR", default_value_t = Pace::default().scale)]
    time_scale: f64,
}

impl From<PaceArguments> for Pace {
    fn from(flags: PaceArguments) -> Self {
        Self {
            request_us: flags.request_us,
            step_us: flags.step_us,
            prefill_us_per_token: flags.prefill_us_per_token,
            decode_us_per_step: flags.decode_us_per_step,
            decode_us_per_sequence: flags.decode_us_per_sequence,
            scale: flags.time_scale,
        }
    }
}

impl Pace {
    /// The flags that mean this.
    #[must_use]
    pub fn arguments(&self) -> [String; 6] {
        [
            format!("--request-us={}", self.request_us),
            format!("--step-us={}", self.step_us),
            format!("--prefill-us-per-token={}", self.prefill_us_per_token),
            format!("--decode-us-per-step={}", self.decode_us_per_step),
            format!("--decode-us-per-sequence={}", self.decode_us_per_sequence),
            format!("--time-scale={}", self.scale),
        ]
    }
}

/// Arguments of `loadgen engine`.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineArguments {
    /// Where to serve HTTP; port 0 = a free one.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Served model name.
    #[arg(long, value_name = "NAME", default_value = "mock")]
    model: String,
    /// Directory with the tokenizer.json and the chat template of a model, to tokenize as its engines
    /// do; answers are English words then. Default: a pseudo-tokenizer.
    #[arg(long, value_name = "DIR")]
    model_dir: Option<PathBuf>,
    /// Served name of an adapter; may be repeated.
    #[arg(long, value_name = "NAME")]
    lora: Vec<String>,
    /// Adapters that run at once at most.
    #[arg(long, value_name = "N", default_value_t = 4)]
    max_loras: usize,
    /// Tokens per block.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    block_size: usize,
    /// Blocks of each rank, the null block among them.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..))]
    num_gpu_blocks: u32,
    /// Tokens of prompt and answer at most.
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    max_model_len: usize,
    /// Tokens computed in one step at most.
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = at_least_one)]
    max_num_batched_tokens: usize,
    /// Requests that run at once at most, per rank.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    max_num_seqs: usize,
    /// Ranks, each with a cache and a publisher of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    data_parallel_size: u32,
    /// Where rank 0 publishes events; rank r takes port + r. Port * = each takes a free one; `off` =
    /// no events.
    #[arg(long, value_name = "ENDPOINT", default_value = "tcp://127.0.0.1:*")]
    events: String,
    /// Where its replay socket binds, likewise; `off` = no replay.
    #[arg(long, value_name = "ENDPOINT", default_value = "tcp://127.0.0.1:*")]
    replay: String,
    /// Layout of events and replay answers.
    #[arg(long, value_enum, default_value = "map")]
    form: EventForm,
    /// Topic of the events; default: kv@IP:PORT@MODEL.
    #[arg(long, value_name = "TEXT")]
    topic: Option<String>,
    #[command(flatten)]
    pace: PaceArguments,
    /// Refuse the render endpoints, as vLLM without --enable-scale-out.
    #[arg(long)]
    no_scale_out: bool,
    /// Do not report cached tokens, as vLLM without --enable-prompt-tokens-details.
    #[arg(long)]
    no_prompt_tokens_details: bool,
    /// Bytes of further families on the metrics page, about.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    metrics_padding: usize,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1".to_owned()),
        other => other.map_err(|error: std::num::ParseIntError| error.to_string()),
    }
}

impl EngineArguments {
    /// The engine that they describe.
    #[must_use]
    pub fn options(self) -> EngineOptions {
        let unless_off = |endpoint: String| (endpoint != "off").then_some(endpoint);
        EngineOptions {
            listen: self.listen,
            model: self.model,
            loras: self.lora,
            max_loras: self.max_loras,
            block_size: self.block_size,
            num_gpu_blocks: self.num_gpu_blocks,
            max_model_len: self.max_model_len,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_num_seqs: self.max_num_seqs,
            data_parallel_size: self.data_parallel_size,
            events: unless_off(self.events),
            replay: unless_off(self.replay),
            form: self.form,
            topic: self.topic,
            pace: self.pace.into(),
            model_dir: self.model_dir,
            scale_out: !self.no_scale_out,
            prompt_tokens_details: !self.no_prompt_tokens_details,
            metrics_padding: self.metrics_padding,
            ..EngineOptions::default()
        }
    }
}

/// Runs an engine until `stop`; writes where it listens to `out`, an address a line.
///
/// # Errors
///
/// Addresses that cannot be bound, a model directory that cannot be used.
pub async fn run(
    options: EngineOptions,
    stop: CancellationToken,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let engine = Engine::start(options).await?;
    writeln!(out, "http listening on {}", engine.http())?;
    for source in engine.event_sources() {
        let replay = source.replay_endpoint.as_deref().unwrap_or("none");
        writeln!(out, "rank {} publishes on {} (replay {replay})", source.rank, source.endpoint)?;
    }
    out.flush()?;
    stop.cancelled().await;
    engine.stop().await;
    Ok(())
}
