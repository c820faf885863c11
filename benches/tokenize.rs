//! `cargo bench --bench tokenize`: tokenizing prompts, beside the plain `tokenizers` crate.
//!
//! Measures: (a) chats that grow by one turn, with what is remembered of the turns before; (b) text that
//! was never seen; (c) the pool: requests that are sent on time, with and without some that are long
//! and never seen before.
//! Model: Qwen 3's tokenizer and template, and that of Llama 3.1, from the directory that
//! `KV_INDEXER_TOKENIZERS` names or `tools/tokenizers` of the target directory (`tests/run` fills it); or
//! else a tokenizer made here, with Qwen's pattern and few merges. Texts are this repository's own source
//! and pages, with numbers put in so that no two are alike.
//! Reads as: time a prompt and tokens a second of one thread; percentiles of the wait.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a bench tells its user")]

mod common;

use std::{
    env, fs,
    hint::black_box,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kv_indexer::tokenize::{
    Input, Local, Tokenize,
    encode::{CacheConfig, Encoder},
    models::LocalConfig,
    pool::PoolConfig,
};
use prometheus::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::Tokenizer;
use tokio::task::JoinSet;

const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
/// Requests a second.
const RATE: u32 = 500;
const SECONDS: u32 = 6;

/// A directory with models' directories, and the names of those in it that are measured.
fn models() -> (PathBuf, Option<TempDir>, Vec<&'static str>) {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    let folder = env::var_os("KV_INDEXER_TOKENIZERS")
        .map_or_else(|| target.join("tools/tokenizers"), PathBuf::from);
    let there = |name: &&str| folder.join(name).join("tokenizer.json").is_file();
    let found: Vec<_> = ["qwen3", "llama3_1"].into_iter().filter(there).collect();
    if !found.is_empty() {
        return (folder, None, found);
    }
    println!("no tokenizers in {}: one made here, which says less", folder.display());
    let made = tempfile::tempdir().expect("a directory");
    let model = made.path().join("synthetic");
    fs::create_dir(&model).expect("a directory");
    fs::write(model.join("tokenizer.json"), synthetic().to_string()).expect("writable");
    let settings = json!({"chat_template": TEMPLATE});
    fs::write(model.join("tokenizer_config.json"), settings.to_string()).expect("writable");
    (made.path().to_owned(), Some(made), vec!["synthetic"])
}

/// Byte-level BPE that knows the words of our own text.
fn synthetic() -> Value {
    let byte_char = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap_or('?'),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte) - 0x7f).unwrap_or('?'),
        0xad => '\u{143}',
    };
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..=255 {
        vocabulary.insert(byte_char(byte).to_string(), json!(byte));
    }
    let mut merges = Vec::new();
    for word in source().split_ascii_whitespace().take(20_000) {
        let letters: Vec<String> = word.bytes().map(|byte| byte_char(byte).to_string()).collect();
        let mut joined = letters.first().cloned().unwrap_or_default();
        for letter in letters.iter().skip(1).take(8) {
            let longer = format!("{joined}{letter}");
            if !vocabulary.contains_key(&longer) {
                merges.push(json!([joined, letter]));
                vocabulary.insert(longer.clone(), json!(vocabulary.len()));
            }
            joined = longer;
        }
    }
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
                       "invert": false});
    let first = vocabulary.len();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(first, "<|im_start|>"), special(first + 1, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    })
}

/// English and Rust: pages and source of this repository.
fn source() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = String::new();
    for folder in ["docs", "src/epp", "src/indexer", "src/ingest", "src/index", "tests/it"] {
        let mut files: Vec<_> = fs::read_dir(root.join(folder))
            .expect("a folder of the repository")
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_file())
            .collect();
        files.sort();
        for file in files {
            all.push_str(&fs::read_to_string(file).unwrap_or_default());
        }
    }
    all
}

/// Makes texts of which no two are alike.
struct Texts {
    lines: Vec<String>,
    random: common::Random,
}

impl Texts {
    fn new(seed: u64) -> Self {
        let lines = source().lines().filter(|line| line.len() > 20).map(str::to_owned).collect();
        Self { lines, random: common::Random(seed) }
    }

    /// A text of so many bytes and a few more.
    fn text(&mut self, bytes: usize) -> String {
        let mut text = String::with_capacity(bytes + 200);
        while text.len() < bytes {
            let at = self.random.next() as usize;
            text.push_str(&self.lines[at % self.lines.len()]);
            text.push_str(&format!(" {:x}\n", at as u16));
        }
        text
    }

    fn message(&mut self, role: &str, bytes: usize) -> Value {
        json!({"role": role, "content": self.text(bytes)})
    }
}

fn chat(messages: &[Value]) -> Input {
    let body = json!({"model": "m", "messages": messages, "add_generation_prompt": true});
    Input::Chat(Bytes::from(body.to_string()))
}

fn load(folder: &Path, name: &str, cache: usize) -> Local {
    let config = LocalConfig {
        models: [(name.to_owned(), folder.join(name))].into(),
        cache: CacheConfig { bytes: cache },
        pool: PoolConfig::default(),
        ..LocalConfig::default()
    };
    Local::load(&config, &Registry::new(), "epp").expect("the tokenizer can be used")
}

fn tokenizer(folder: &Path, name: &str) -> Tokenizer {
    Tokenizer::from_file(folder.join(name).join("tokenizer.json")).expect("a tokenizer")
}

/// Bytes a token takes in texts like ours, about.
fn bytes_per_token(tokenizer: &Tokenizer) -> f64 {
    let text = Texts::new(1).text(100_000);
    let ids = tokenizer.encode_fast(text.as_str(), false).expect("ids").len();
    text.len() as f64 / ids as f64
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// (a) A chat of so many tokens gets one turn after the other.
fn growing(folder: &Path, name: &str) {
    const TURN_TOKENS: f64 = 400.0;
    let per_token = bytes_per_token(&tokenizer(folder, name));
    let (cached, whole) = (load(folder, name, 64 << 20), load(folder, name, 0));
    println!("{name}: a chat grows by {TURN_TOKENS} tokens (one turn); time of one prompt");
    for tokens in [8_000.0, 32_000.0, 128_000.0] {
        let mut texts = Texts::new(2);
        let turn = (TURN_TOKENS * per_token) as usize;
        let mut messages: Vec<Value> = (0..(tokens / TURN_TOKENS) as usize)
            .map(|at| texts.message(if at % 2 == 0 { "user" } else { "assistant" }, turn))
            .collect();
        cached.tokenize_now(name, &chat(&messages)).expect("ids");
        let (mut short, mut long, mut count) = (Vec::new(), Vec::new(), 0);
        for at in 0..12 {
            messages.push(texts.message(if at % 2 == 0 { "user" } else { "assistant" }, turn));
            let input = chat(&messages);
            let start = Instant::now();
            let ids = cached.tokenize_now(name, &input).expect("ids").ids;
            short.push(start.elapsed());
            if at % 2 == 1 {
                let start = Instant::now();
                let want = whole.tokenize_now(name, &input).expect("ids").ids;
                long.push(start.elapsed());
                assert_eq!(ids, want, "ids do not depend on what is remembered");
            }
            count = ids.len();
        }
        let (short, long) = (median(short), median(long));
        let ratio = long.as_secs_f64() / short.as_secs_f64();
        println!("  {count:>7} tokens: cached {short:>9.1?}, whole {long:>9.1?}, ratio {ratio:.1}");
    }
}

/// (b) Texts that were never seen, of 8 000 tokens each.
fn first_time(folder: &Path, name: &str) {
    const TEXTS: usize = 40;
    let plain = tokenizer(folder, name);
    let bytes = (8_000.0 * bytes_per_token(&plain)) as usize;
    let shared = Arc::new(tokenizer(folder, name));
    let encoder = Encoder::new(Arc::clone(&shared), CacheConfig { bytes: 64 << 20 });
    let mut texts = Texts::new(3);
    let (mut ours, mut theirs, mut tokens) = (Duration::ZERO, Duration::ZERO, 0);
    for _ in 0..TEXTS {
        let text = texts.text(bytes);
        let start = Instant::now();
        let ids = encoder.encode(&text, false).expect("ids");
        ours += start.elapsed();
        let start = Instant::now();
        let want = plain.encode_fast(text.as_str(), false).expect("ids");
        theirs += start.elapsed();
        assert_eq!(ids, want.get_ids(), "ids are the tokenizer's");
        tokens += ids.len();
    }
    let rate = |time: Duration| tokens as f64 / time.as_secs_f64() / 1e6;
    println!(
        "{name}: first time, {TEXTS} texts of {} tokens: {:.2} M tokens/s, plain `encode_fast` {:.2}, \
         ratio {:.1}",
        tokens / TEXTS,
        rate(ours),
        rate(theirs),
        rate(ours) / rate(theirs),
    );
}

/// What a trip to a pool's thread and back costs a small prompt.
fn hop(folder: &Path, name: &str) {
    const ROUNDS: u32 = 5_000;
    let local = load(folder, name, 64 << 20);
    let mut texts = Texts::new(4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    for bytes in [500, 3_000, 32_000] {
        let input = chat(&[texts.message("user", bytes)]);
        local.tokenize_now(name, &input).expect("ids");
        let (start, before) = (Instant::now(), cpu());
        for _ in 0..ROUNDS {
            black_box(local.tokenize_now(name, &input).expect("ids"));
        }
        let (here, here_cpu) = (start.elapsed() / ROUNDS, (cpu() - before) / f64::from(ROUNDS));
        let (start, before) = (Instant::now(), cpu());
        runtime.block_on(async {
            for _ in 0..ROUNDS {
                black_box(local.tokenize(name, input.clone()).await.expect("ids"));
            }
        });
        let (there, there_cpu) = (start.elapsed() / ROUNDS, (cpu() - before) / f64::from(ROUNDS));
        println!(
            "{name}: a known chat of {bytes} bytes: here {here:.1?} ({:.1} µs of CPU), over the pool \
             {there:.1?} ({:.1} µs of CPU)",
            here_cpu * 1e6,
            there_cpu * 1e6,
        );
    }
}

/// (c) Conversations of about 2 000 tokens with known turns; of `cold` a hundred requests, so many are of
/// 100 000 tokens that nobody has seen.
fn pool(folder: &Path, name: &'static str, cold: u32) -> Duration {
    let per_token = bytes_per_token(&tokenizer(folder, name));
    let local = Arc::new(load(folder, name, 64 << 20));
    let mut texts = Texts::new(5);
    let warm: Vec<Input> = (0..64)
        .map(|_| chat(&[texts.message("user", (2_000.0 * per_token) as usize)]))
        .inspect(|input| _ = local.tokenize_now(name, input).expect("ids"))
        .collect();
    let requests = RATE * SECONDS;
    let is_cold = move |at: u32| cold > 0 && at % (100 / cold) == 7;
    let mut inputs: Vec<Input> = (0..requests)
        .map(|at| {
            if is_cold(at) {
                chat(&[texts.message("user", (100_000.0 * per_token) as usize)])
            } else {
                warm[at as usize % warm.len()].clone()
            }
        })
        .collect();
    inputs.reverse();

    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let before = cpu();
    let (mut waits, mut ended, mut failed) = (Vec::new(), 0_u32, 0_u32);
    runtime.expect("a runtime").block_on(async {
        let mut tasks = JoinSet::new();
        let start = Instant::now();
        for at in 0..requests {
            let due = start + Duration::from_secs(1) * at / RATE;
            tokio::time::sleep_until(due.into()).await;
            let (local, input) = (Arc::clone(&local), inputs.pop().expect("one for each"));
            // Waiting begins now: that timers are late is no matter of the pool.
            let sent = Instant::now();
            tasks.spawn(async move {
                let result = local.tokenize(name, input).await;
                (is_cold(at), result.is_ok(), sent.elapsed())
            });
        }
        while let Some(done) = tasks.join_next().await {
            let (cold, ok, wait) = done.expect("requests do not panic");
            match (cold, ok) {
                (true, _) => ended += u32::from(ok),
                (false, true) => waits.push(wait),
                (false, false) => failed += 1,
            }
        }
    });
    let used = cpu() - before;
    waits.sort_unstable();
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize];
    println!(
        "{name}: {RATE} requests/s, {cold} % cold of 100k tokens: others p50 {:.1?}, p99 {:.1?}, p99.9 \
         {:.1?}, {failed} of {} without tokens; {ended} cold ones in time; {:.2} cores",
        at(0.5),
        at(0.99),
        at(0.999),
        waits.len() + failed as usize,
        used / f64::from(SECONDS),
    );
    at(0.99)
}

/// CPU time of this process, in seconds.
fn cpu() -> f64 {
    let usage = kv_indexer::support::metrics::Usage::now();
    usage.cpu.unwrap_or_default().as_secs_f64()
}

fn main() {
    let (folder, _made, names) = models();
    let wanted = env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let runs = |part: &str| wanted.as_deref().is_none_or(|wanted| part.contains(wanted));
    for name in names {
        if runs("growing") {
            growing(&folder, name);
        }
        if runs("first") {
            first_time(&folder, name);
        }
        if runs("hop") {
            hop(&folder, name);
        }
        if runs("pool") {
            let alone = pool(&folder, name, 0);
            let mixed = pool(&folder, name, 5);
            let moved = mixed.as_secs_f64() - alone.as_secs_f64();
            println!("{name}: cold prompts move the others' p99 by {:.2} ms", moved * 1e3);
        }
    }
}
