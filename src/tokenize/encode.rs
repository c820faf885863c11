//! Text → token ids, with a prefix-aware cache.
//!
//! # Model
//!
//! A tokenizer works in steps that split: added tokens are taken out first, each text between them is
//! normalized and pre-tokenized by itself, each pre-token goes through the model by itself. So the ids
//! of a text are those of its parts one after the other, if it is parted where these steps split anyway.
//! `plan` finds out where that is proved for a given tokenizer:
//!
//! ```text
//! <|im_start|>user\nTell me about …, please. And …<|im_end|>\n<|im_start|>assistant\n
//! └── added ─┘└──────────── text ───────────────┘└─ added ┘└t┘└── added ─┘└─ text ──┘
//!             └─ chunk ──┘└─ chunk ─┘└─ chunk ──┘          only where the pre-tokenizer is known
//!             └w┘└w┘└─w──┘                                 words of a chunk that was never seen
//! ```
//!
//! * Chunks are remembered with their ids (`cache::Chunks`). A conversation that grows by one turn finds
//!   all of its older turns, and so does another one with the same system prompt or document.
//! * Words are the shortest parts that may be cut (`cuts`). Text has few different ones, so that text
//!   never seen before is mostly looked up too (`cache::Words`).
//! * A tokenizer for which nothing is proved encodes whole texts and remembers nothing.
//!
//! # Invariants
//!
//! * [`Encoder::encode`] gives the ids of `tokenizer.encode`, always. What is remembered is found by its
//!   bytes, not by a hash of them.
//! * What is remembered stays below [`CacheConfig::bytes`].
//!
//! # Concurrency
//!
//! Locks are held for one lookup or one insertion, never while the tokenizer works. Threads that encode
//! the same new text at the same time all encode it; the last one's result stays.
//!
//! # Cost
//!
//! Text that is remembered: reading, hashing and comparing its bytes, copying its ids. Memory: text and
//! ids, about two bytes for each byte of text.

use std::sync::{
    Arc, Mutex, Weak,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use prometheus::{
    IntCounterVec, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use self::{
    cache::{Chunks, Words},
    plan::{Part, Plan},
};

use crate::support::{metrics::family, sync::lock};

mod added;
mod cache;
mod cuts;
mod plan;

/// Bytes of a chunk at least, where text allows cuts. What a growing text has to encode anew is its
/// last chunk, so small ones save time; each costs a lookup and about 100 bytes.
const CHUNK_BYTES: usize = 1024;

/// Chunks shorter than this are looked up word by word, if the tokenizer has words.
const SHORT_BYTES: usize = 64;

/// What [`Encoder`] may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Bytes of texts and ids at most, over all entries of one encoder; 0 = no cache.
    pub bytes: usize,
}

impl Default for CacheConfig {
    /// 64 MiB.
    fn default() -> Self {
        Self { bytes: 64 << 20 }
    }
}

/// What an [`Encoder`] did since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Chunks of text whose ids were remembered.
    pub hits: u64,
    /// Chunks that were not.
    pub misses: u64,
    /// Token ids that were remembered, of chunks.
    pub reused_tokens: u64,
    /// Token ids that were not: made by the tokenizer, or put together from words.
    pub encoded_tokens: u64,
    /// Chunks that were forgotten for want of room.
    pub evictions: u64,
    /// Bytes that are kept now.
    pub bytes: u64,
}

/// A tokenizer that remembers what it encoded.
pub struct Encoder {
    tokenizer: Arc<tokenizers::Tokenizer>,
    cached: Option<Cached>,
    counters: Counters,
}

struct Cached {
    plan: Plan,
    chunks: Chunks,
    words: Words,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    reused: AtomicU64,
    encoded: AtomicU64,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("cuts", &self.cuts()).finish_non_exhaustive()
    }
}

/// Where an [`Encoder`] may part a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cuts {
    /// Nowhere: every text is encoded whole.
    None,
    /// Around added tokens.
    Added,
    /// Around added tokens, and between words.
    Words,
}

impl Encoder {
    /// An encoder around a tokenizer.
    #[must_use]
    pub fn new(tokenizer: Arc<tokenizers::Tokenizer>, cache: CacheConfig) -> Self {
        let plan = if cache.bytes == 0 { None } else { Plan::of(&tokenizer) };
        let cached = plan.map(|plan| {
            let words = if plan.words { cache.bytes / 8 } else { 0 };
            let chunks = Chunks::new(cache.bytes - words);
            Cached { plan, chunks, words: Words::new(words) }
        });
        Self { tokenizer, cached, counters: Counters::default() }
    }

    /// Where texts may be parted.
    #[must_use]
    pub fn cuts(&self) -> Cuts {
        match &self.cached {
            None => Cuts::None,
            Some(cached) if cached.plan.words => Cuts::Words,
            Some(_) => Cuts::Added,
        }
    }

    /// Token ids of a text: those of `tokenizer.encode`, exactly.
    ///
    /// # Errors
    ///
    /// What the tokenizer says.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let Some(cached) = &self.cached else {
            let ids = self.whole(text, add_special_tokens)?;
            self.counters.encoded.fetch_add(ids.len() as u64, Relaxed);
            return Ok(ids);
        };
        let plan = &cached.plan;
        let mut ids = Vec::with_capacity(text.len() / 4 + 8);
        if add_special_tokens {
            ids.extend_from_slice(&plan.before);
        }
        for part in plan.parts(text) {
            match part {
                Part::Added(id) => ids.push(id),
                Part::Text(text) => {
                    for chunk in plan.chunks(text, CHUNK_BYTES) {
                        self.chunk(cached, chunk, &mut ids)?;
                    }
                }
            }
        }
        if add_special_tokens {
            ids.extend_from_slice(&plan.after);
        }
        Ok(ids)
    }

    /// How much of a text is not remembered, in bytes: what [`Self::encode`] would take its time for.
    /// Costs as much as encoding a text that is remembered.
    #[must_use]
    pub fn cold_bytes(&self, text: &str) -> usize {
        let Some(Cached { plan, chunks, .. }) = &self.cached else { return text.len() };
        let texts = plan.parts(text).filter_map(|part| match part {
            Part::Added(_) => None,
            Part::Text(text) => Some(text),
        });
        texts
            .flat_map(|text| plan.chunks(text, CHUNK_BYTES))
            .filter(|chunk| !chunks.contains(chunk))
            .map(str::len)
            .sum()
    }

    /// What it did so far.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let Counters { hits, misses, reused, encoded } = &self.counters;
        let kept = self.cached.as_ref().map(|cached| (&cached.chunks, cached.words.bytes()));
        CacheStats {
            hits: hits.load(Relaxed),
            misses: misses.load(Relaxed),
            reused_tokens: reused.load(Relaxed),
            encoded_tokens: encoded.load(Relaxed),
            evictions: kept.map_or(0, |(chunks, _)| chunks.evictions()),
            bytes: kept.map_or(0, |(chunks, words)| chunks.bytes() + words) as u64,
        }
    }

    fn whole(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoded = self.tokenizer.encode_fast(text, add_special_tokens);
        Ok(encoded.map_err(|error| error.to_string())?.get_ids().to_vec())
    }

    fn chunk(&self, cached: &Cached, chunk: &str, ids: &mut Vec<u32>) -> Result<(), String> {
        let counters = &self.counters;
        let words = cached.plan.words;
        let short = words && chunk.len() < SHORT_BYTES;
        if !short && let Some(known) = cached.chunks.get(chunk) {
            counters.hits.fetch_add(1, Relaxed);
            counters.reused.fetch_add(known.len() as u64, Relaxed);
            ids.extend_from_slice(&known);
            return Ok(());
        }
        let start = ids.len();
        if words {
            for word in cuts::words(chunk) {
                if !cached.words.get(word, ids) {
                    let made = self.whole(word, false)?;
                    ids.extend_from_slice(&made);
                    cached.words.insert(word, &made);
                }
            }
        } else {
            ids.extend(self.whole(chunk, false)?);
        }
        let made = ids.get(start..).unwrap_or_default();
        counters.encoded.fetch_add(made.len() as u64, Relaxed);
        if !short {
            counters.misses.fetch_add(1, Relaxed);
            cached.chunks.insert(chunk, made);
        }
        Ok(())
    }
}

/// Adds encoders, by model, to the metrics `{prefix}_token_cache_…`. Whoever asks again adds to those that
/// are there; encoders that are gone do not count any more.
///
/// # Errors
///
/// When a name is illegal, or taken by another metric.
pub fn register(
    registry: &Registry,
    prefix: &str,
    encoders: Vec<(String, Arc<Encoder>)>,
) -> prometheus::Result<()> {
    let shape = Arc::new(Series::new(prefix)?);
    let collector = StatsCollector { prefix: prefix.to_owned(), shape, encoders: Arc::default() };
    let known = family(registry, collector)?.encoders;
    let mut known = lock(&known);
    known.retain(|(_, encoder)| encoder.strong_count() > 0);
    known.extend(encoders.into_iter().map(|(model, encoder)| (model, Arc::downgrade(&encoder))));
    Ok(())
}

/// An encoder and its model.
type Registered = (String, Weak<Encoder>);

/// Reads the encoders' numbers when it is asked for them.
#[derive(Clone)]
struct StatsCollector {
    prefix: String,
    /// Describes the series; never filled.
    shape: Arc<Series>,
    encoders: Arc<Mutex<Vec<Registered>>>,
}

impl Collector for StatsCollector {
    fn desc(&self) -> Vec<&Desc> {
        let counters = self.shape.counters.iter().flat_map(Collector::desc);
        counters.chain(self.shape.bytes.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Ok(series) = Series::new(&self.prefix) else { return Vec::new() };
        for (model, encoder) in &*lock(&self.encoders) {
            let Some(encoder) = encoder.upgrade() else { continue };
            let stats = encoder.stats();
            let values = [
                stats.hits,
                stats.misses,
                stats.reused_tokens,
                stats.encoded_tokens,
                stats.evictions,
            ];
            for (counter, value) in series.counters.iter().zip(values) {
                counter.with_label_values(&[model]).inc_by(value);
            }
            let bytes = i64::try_from(stats.bytes).unwrap_or(i64::MAX);
            series.bytes.with_label_values(&[model]).add(bytes);
        }
        let counters = series.counters.iter().flat_map(Collector::collect);
        counters.chain(series.bytes.collect()).collect()
    }
}

struct Series {
    counters: [IntCounterVec; 5],
    bytes: IntGaugeVec,
}

impl Series {
    fn new(prefix: &str) -> prometheus::Result<Self> {
        let opts = |name: &str, help: &str| Opts::new(format!("{prefix}_{name}"), help);
        let counter = |name, help| IntCounterVec::new(opts(name, help), &["model"]);
        let bytes = opts("token_cache_bytes", "Bytes of texts and token ids.");
        Ok(Self {
            counters: [
                counter(
                    "token_cache_hits_total",
                    "Chunks of text whose token ids were remembered.",
                )?,
                counter("token_cache_misses_total", "Chunks of text that had to be tokenized.")?,
                counter("token_cache_reused_tokens_total", "Token ids that were remembered.")?,
                counter("token_cache_encoded_tokens_total", "Token ids that had to be made.")?,
                counter("token_cache_evictions_total", "Chunks forgotten for want of room.")?,
            ],
            bytes: IntGaugeVec::new(bytes, &["model"])?,
        })
    }
}
