//! `kv-indexer tokenize`: prints the token ids of prompts, to be compared with an engine's.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    path::PathBuf,
    sync::Arc,
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use prometheus::Registry;
use serde::Deserialize;

use super::{Input, Local, encode::CacheConfig, models::LocalConfig, pool::PoolConfig};

/// Prints the token ids of each line of a file as a JSON array in a line.
///
/// Ends with status 1 at the first line that has none, naming it.
#[derive(Clone, Debug, Args)]
pub struct TokenizeArgs {
    /// Directory with the tokenizer.json of a model, or of directories of models.
    #[arg(long, value_name = "DIR")]
    pub model_dir: PathBuf,
    /// Name of the model, if the directory has several; by default the `model` of each line.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Lines are bodies of OpenAI chat completions rather than {"text": …} or bodies of completions
    /// with a `prompt`.
    #[arg(long)]
    pub chat: bool,
    /// File with a JSON object in each line; - reads standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// What of a line matters here.
#[derive(Debug, Deserialize)]
struct Line {
    #[serde(default)]
    model: String,
    #[serde(alias = "prompt")]
    text: Option<String>,
    #[serde(default = "yes")]
    add_special_tokens: bool,
}

fn yes() -> bool {
    true
}

/// Runs the command: ids go to `out`.
///
/// # Errors
///
/// A tokenizer or template that cannot be used; the first line that has no ids, by file and number.
pub fn run(args: &TokenizeArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let config = LocalConfig {
        models_dir: Some(args.model_dir.clone()),
        cache: CacheConfig { bytes: 0 },
        pool: PoolConfig { threads: 1, ..PoolConfig::default() },
        ..LocalConfig::default()
    };
    let tokenizers = Local::load(&config, &Registry::new(), "kv")?;
    let name = args.file.display();
    let lines: Box<dyn BufRead> = if args.file.as_os_str() == "-" {
        Box::new(io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(&args.file).with_context(|| format!("{name}"))?))
    };
    for (index, line) in lines.lines().enumerate() {
        let line = line.with_context(|| format!("{name}"))?;
        if line.trim().is_empty() {
            continue;
        }
        let ids = ids(&tokenizers, args, line).with_context(|| format!("{name}:{}", index + 1))?;
        serde_json::to_writer(&mut *out, &ids[..])?;
        writeln!(out)?;
    }
    Ok(out.flush()?)
}

fn ids(tokenizers: &Local, args: &TokenizeArgs, text: String) -> anyhow::Result<Arc<[u32]>> {
    let line: Line = serde_json::from_str(&text)?;
    let input = if args.chat {
        Input::Chat(Bytes::from(text))
    } else {
        let text = line.text.context("no text")?;
        Input::Text { text: text.into(), add_special_tokens: line.add_special_tokens }
    };
    let model = args.model.as_deref().unwrap_or(&line.model);
    Ok(tokenizers.tokenize_now(model, &input)?.ids)
}
