//! What each inference engine calls its metrics.
//!
//! # Model
//!
//! An [`EngineConfig`] says in which metric of the page a value is; a [`PageReader`] holds one
//! endpoint's engine and reads its pages. Which engine an endpoint runs says a label of its pod.
//!
//! | value | vllm | sglang | trtllm-serve | triton-tensorrt-llm |
//! | --- | --- | --- | --- | --- |
//! | waiting | `vllm:num_requests_waiting` | `sglang:num_queue_reqs` | `trtllm_num_requests_waiting` | `nv_trt_llm_request_metrics{request_type=waiting}` |
//! | running | `vllm:num_requests_running` | `sglang:num_running_reqs` | `trtllm_num_requests_running` | `…{request_type=scheduled}` |
//! | KV usage | `vllm:kv_cache_usage_perc` | `sglang:token_usage` | `trtllm_kv_cache_utilization` | `nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}` |
//! | LoRA | `vllm:lora_requests_info` | – | – | – |
//! | prefix cache | `vllm:prefix_cache_queries_total`, `…_hits_total` | – | – | – |
//! | block size, blocks | labels of `vllm:cache_config_info` | labels of `sglang:cache_config_info` | `trtllm_kv_cache_tokens_per_block`, `…_max_blocks` | `…{kv_cache_block_type=tokens_per}`, `{…=max}` |
//!
//! `triton`, without an LLM behind it, has `nv_inference_pending_request_count` and
//! `nv_inference_exec_count`. vLLM until 0.9 calls its KV usage `vllm:gpu_cache_usage_perc`, which is
//! read when the other is not there; and its prefix cache `vllm:gpu_prefix_cache_queries_total` and
//! `…_hits_total`. SGLang shows its hits as a ratio alone (`sglang:cache_hit_rate`), of which nothing can
//! be summed.
//!
//! # Several series
//!
//! Of several series that match, the one with the latest timestamp counts, and the first of equals. So
//! of an engine that shows all its data-parallel ranks on one page, the first rank stands for all;
//! a specification with a label (`{engine=1}`) chooses another one. LoRA lines carry their time as
//! their value: the greatest counts. Series of the prefix cache are added up, since they are counters: of
//! them only what is added from page to page counts, and one that has become smaller began at 0 again.

use std::{collections::BTreeMap, fmt, sync::Arc};

use super::{
    Endpoint, LoraMetrics, Metrics,
    page::{Found, Labels, Names, Sample, Scanner},
};

/// The pod label that names the engine.
pub const ENGINE_LABEL: &str = "llm-d.ai/engine-type";
/// The label of older charts, read when the other one is not there.
pub const LEGACY_ENGINE_LABEL: &str = "inference.networking.k8s.io/engine-type";
/// The engine of pods that have neither label, or one that nobody configured.
pub const DEFAULT_ENGINE: &str = "vllm";
/// No engine may be called that: it stands for the default one.
const RESERVED: &str = "default";

/// A metric, and labels that its series must have: `metric` or `metric{label=value,…}`, values in
/// double quotes or without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricSpec {
    /// Name of the family.
    pub name: String,
    /// Labels and their values, all of which must match.
    pub labels: Vec<(String, String)>,
}

impl MetricSpec {
    /// Reads a specification; none of an empty text, which says that the engine has no such metric.
    ///
    /// # Errors
    ///
    /// A sentence that names the part that is wrong.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        if text.is_empty() {
            return Ok(None);
        }
        let wrong = |what: &str| Err(format!("{text:?} is no metric specification: {what}"));
        let (name, labels) = match text.trim().split_once('{') {
            None => (text.trim(), ""),
            Some((name, labels)) => match labels.strip_suffix('}') {
                Some(labels) => (name.trim_end(), labels.trim()),
                None => return wrong("no } at the end"),
            },
        };
        if !is_metric_name(name) {
            return wrong(&format!("{name:?} is no name of a metric"));
        }
        let mut pairs = Vec::new();
        for pair in labels.split(',').filter(|_| !labels.is_empty()) {
            let Some((label, value)) = pair.split_once('=') else {
                return wrong(&format!("{:?} is not label=value", pair.trim()));
            };
            let (label, value) = (label.trim(), value.trim());
            if !is_label_name(label) {
                return wrong(&format!("{label:?} is no name of a label"));
            }
            let quoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            let bad = |value: &str| value.contains(['"', '{', '}']);
            match quoted {
                Some(value) if !bad(value) => pairs.push((label.to_owned(), value.to_owned())),
                None if !value.is_empty()
                    && !bad(value)
                    && !value.contains(char::is_whitespace) =>
                {
                    pairs.push((label.to_owned(), value.to_owned()));
                }
                _ => return wrong(&format!("the value of {label} is {value:?}")),
            }
        }
        Ok(Some(Self { name: name.to_owned(), labels: pairs }))
    }

    fn matches(&self, labels: Labels<'_>) -> bool {
        self.labels
            .iter()
            .all(|(name, value)| labels.get(name).is_some_and(|found| *found == *value.as_bytes()))
    }
}

impl fmt::Display for MetricSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for (at, (label, value)) in self.labels.iter().enumerate() {
            write!(f, "{}{label}={value:?}", if at == 0 { '{' } else { ',' })?;
        }
        if self.labels.is_empty() { Ok(()) } else { f.write_str("}") }
    }
}

fn is_metric_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == ':')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
}

fn is_label_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Where an engine's page has its values. An absent one is not looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineConfig {
    /// What the pod label calls the engine.
    pub name: String,
    /// Waiting requests.
    pub queued: Option<MetricSpec>,
    /// Running requests.
    pub running: Option<MetricSpec>,
    /// Used fraction of the KV cache.
    pub kv_usage: Option<MetricSpec>,
    /// The same of older versions, looked for on the same page.
    pub old_kv_usage: Option<MetricSpec>,
    /// LoRA adapters, in labels.
    pub lora: Option<MetricSpec>,
    /// Block size and number of blocks, in labels.
    pub cache_info: Option<MetricSpec>,
    /// Label of `cache_info` with the block size; none = `block_size`.
    pub block_size_label: Option<String>,
    /// Label of `cache_info` with the number of blocks; none = `num_gpu_blocks`.
    pub blocks_label: Option<String>,
    /// Block size as a value.
    pub block_size: Option<MetricSpec>,
    /// Number of blocks as a value.
    pub blocks: Option<MetricSpec>,
    /// Prompt tokens looked up in the prefix cache, a counter: the newest name first. The first one that is
    /// on a page counts.
    pub prefix_queries: Vec<MetricSpec>,
    /// The same of those that were found.
    pub prefix_hits: Vec<MetricSpec>,
    /// Further values, by attribute key.
    pub custom: Vec<(String, MetricSpec)>,
}

/// The engines that need no configuration.
#[must_use]
pub fn builtin() -> Vec<EngineConfig> {
    let spec = |text: &str| MetricSpec::parse(text).ok().flatten();
    let specs = |texts: [&str; 2]| texts.into_iter().filter_map(spec).collect::<Vec<_>>();
    let engine = |name: &str, queued, running, kv_usage| EngineConfig {
        name: name.to_owned(),
        queued: spec(queued),
        running: spec(running),
        kv_usage: spec(kv_usage),
        ..EngineConfig::default()
    };
    let vllm = EngineConfig {
        old_kv_usage: spec("vllm:gpu_cache_usage_perc"),
        lora: spec("vllm:lora_requests_info"),
        cache_info: spec("vllm:cache_config_info"),
        prefix_queries: specs([
            "vllm:prefix_cache_queries_total",
            "vllm:gpu_prefix_cache_queries_total",
        ]),
        prefix_hits: specs(["vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"]),
        ..engine(
            "vllm",
            "vllm:num_requests_waiting",
            "vllm:num_requests_running",
            "vllm:kv_cache_usage_perc",
        )
    };
    let sglang = EngineConfig {
        cache_info: spec("sglang:cache_config_info"),
        block_size_label: Some("page_size".to_owned()),
        blocks_label: Some("num_pages".to_owned()),
        ..engine("sglang", "sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:token_usage")
    };
    let trtllm = EngineConfig {
        block_size: spec("trtllm_kv_cache_tokens_per_block"),
        blocks: spec("trtllm_kv_cache_max_blocks"),
        ..engine(
            "trtllm-serve",
            "trtllm_num_requests_waiting",
            "trtllm_num_requests_running",
            "trtllm_kv_cache_utilization",
        )
    };
    let triton_trtllm = EngineConfig {
        block_size: spec("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}"),
        blocks: spec("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}"),
        ..engine(
            "triton-tensorrt-llm",
            "nv_trt_llm_request_metrics{request_type=waiting}",
            "nv_trt_llm_request_metrics{request_type=scheduled}",
            "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
        )
    };
    let triton =
        engine("triton", "nv_inference_pending_request_count", "nv_inference_exec_count", "");
    vec![vllm, sglang, trtllm, triton_trtllm, triton]
}

/// How pages are read: the parameters of `core-metrics-extractor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnginesConfig {
    /// The pod label that names the engine; [`LEGACY_ENGINE_LABEL`] is looked at after it.
    pub label: String,
    /// The engine of other pods.
    pub default: String,
    /// Engines; one replaces the built-in one of its name.
    pub engines: Vec<EngineConfig>,
}

impl Default for EnginesConfig {
    fn default() -> Self {
        Self { label: ENGINE_LABEL.to_owned(), default: DEFAULT_ENGINE.to_owned(), engines: vec![] }
    }
}

/// Why engines cannot be used as configured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum EngineError {
    /// An engine without a name.
    #[error("an engine has no name")]
    NoName,
    /// `default` is no name.
    #[error("no engine may be named {RESERVED:?}; defaultEngine says which one that is")]
    Reserved,
    /// Two of one name.
    #[error("engine {0:?} is configured twice")]
    Twice(String),
    /// A default that does not exist.
    #[error("default engine {0:?} is not configured; there are {1}")]
    NoDefault(String, String),
    /// Two custom values of one key.
    #[error("engine {engine:?} has two custom metrics for {key:?}")]
    CustomTwice {
        /// The engine.
        engine: String,
        /// The attribute key.
        key: String,
    },
}

/// All engines, compiled.
#[derive(Debug)]
pub struct Engines {
    label: String,
    by_name: BTreeMap<String, Arc<Engine>>,
    default: Arc<Engine>,
}

impl Engines {
    /// Compiles the configured engines and the built-in ones.
    ///
    /// # Errors
    ///
    /// The first thing about `config` that makes no sense.
    pub fn new(config: &EnginesConfig) -> Result<Self, EngineError> {
        let mut by_name = BTreeMap::new();
        for engine in &config.engines {
            match engine.name.as_str() {
                "" => return Err(EngineError::NoName),
                RESERVED => return Err(EngineError::Reserved),
                _ => {}
            }
            for (at, (key, _)) in engine.custom.iter().enumerate() {
                if engine.custom[..at].iter().any(|(other, _)| other == key) {
                    let (engine, key) = (engine.name.clone(), key.clone());
                    return Err(EngineError::CustomTwice { engine, key });
                }
            }
            let compiled = Arc::new(Engine::new(engine));
            if by_name.insert(engine.name.clone(), compiled).is_some() {
                return Err(EngineError::Twice(engine.name.clone()));
            }
        }
        for engine in builtin() {
            by_name.entry(engine.name.clone()).or_insert_with(|| Arc::new(Engine::new(&engine)));
        }
        let Some(default) = by_name.get(&config.default) else {
            let names: Vec<&str> = by_name.keys().map(String::as_str).collect();
            return Err(EngineError::NoDefault(config.default.clone(), names.join(", ")));
        };
        let default = Arc::clone(default);
        Ok(Self { label: config.label.clone(), by_name, default })
    }

    /// The engine that an endpoint runs. A label with an unknown value counts as none.
    #[must_use]
    pub fn of(&self, endpoint: &Endpoint) -> &Arc<Engine> {
        [self.label.as_str(), LEGACY_ENGINE_LABEL]
            .into_iter()
            .filter_map(|label| endpoint.label(label))
            .find(|name| !name.is_empty())
            .and_then(|name| self.by_name.get(name))
            .unwrap_or(&self.default)
    }

    /// A reader for an endpoint's pages.
    #[must_use]
    pub fn reader(&self, endpoint: &Endpoint) -> PageReader {
        PageReader::new(Arc::clone(self.of(endpoint)))
    }
}

impl Default for Engines {
    fn default() -> Self {
        let by_name: BTreeMap<String, Arc<Engine>> = builtin()
            .iter()
            .map(|engine| (engine.name.clone(), Arc::new(Engine::new(engine))))
            .collect();
        let default = by_name.get(DEFAULT_ENGINE).cloned().unwrap_or_default();
        Self { label: ENGINE_LABEL.to_owned(), by_name, default }
    }
}

/// One engine's page, ready to be read.
#[derive(Debug, Default)]
pub struct Engine {
    name: String,
    names: Names,
    wanted: Vec<Wanted>,
    block_size_label: String,
    blocks_label: String,
}

#[derive(Debug)]
struct Wanted {
    name: usize,
    spec: MetricSpec,
    what: What,
}

#[derive(Clone, Debug, PartialEq)]
enum What {
    Waiting,
    Running,
    KvUsage,
    OldKvUsage,
    Lora,
    CacheInfo,
    BlockSize,
    Blocks,
    PrefixQueries,
    PrefixHits,
    Custom(String),
}

impl What {
    /// Does it only ever grow, so that series add up and only differences count?
    fn is_counter(&self) -> bool {
        matches!(self, Self::PrefixQueries | Self::PrefixHits)
    }
}

impl Slot {
    /// How much a counter has grown since the last page that had it; nothing on the first one.
    fn grown(&mut self, faults: &mut u32) -> u64 {
        if !self.value.is_finite() {
            *faults += 1;
            return 0;
        }
        match self.last.replace(self.value) {
            None => 0,
            Some(last) if self.value >= last => count(self.value - last),
            // It began at 0 again.
            Some(_) => count(self.value),
        }
    }
}

impl Default for Names {
    fn default() -> Self {
        Self::new([])
    }
}

impl Engine {
    /// Compiles a configuration.
    #[must_use]
    pub fn new(config: &EngineConfig) -> Self {
        let mut names: Vec<&str> = Vec::new();
        let mut wanted = Vec::new();
        let standard = [
            (What::Waiting, &config.queued),
            (What::Running, &config.running),
            // The older name first: the newer one overwrites it.
            (What::OldKvUsage, &config.old_kv_usage),
            (What::KvUsage, &config.kv_usage),
            (What::Lora, &config.lora),
            (What::CacheInfo, &config.cache_info),
            (What::BlockSize, &config.block_size),
            (What::Blocks, &config.blocks),
        ];
        let standard = standard.into_iter().filter_map(|(what, spec)| Some((what, spec.as_ref()?)));
        let queries = config.prefix_queries.iter().map(|spec| (What::PrefixQueries, spec));
        let hits = config.prefix_hits.iter().map(|spec| (What::PrefixHits, spec));
        let custom = config.custom.iter().map(|(key, spec)| (What::Custom(key.clone()), spec));
        for (what, spec) in standard.chain(queries).chain(hits).chain(custom) {
            let name = names.iter().position(|name| *name == spec.name).unwrap_or_else(|| {
                names.push(&spec.name);
                names.len() - 1
            });
            wanted.push(Wanted { name, spec: spec.clone(), what });
        }
        let label = |label: &Option<String>, default: &str| {
            label.as_deref().filter(|label| !label.is_empty()).unwrap_or(default).to_owned()
        };
        Self {
            name: config.name.clone(),
            names: Names::new(names),
            wanted,
            block_size_label: label(&config.block_size_label, "block_size"),
            blocks_label: label(&config.blocks_label, "num_gpu_blocks"),
        }
    }

    /// What the pod label calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What a page had of the values that were wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extraction {
    /// Values found.
    pub found: u32,
    /// Values that are missing or cannot be read; they keep what they were.
    pub faults: u32,
}

/// Reads one endpoint's pages, one after another, and keeps its memory between them.
#[derive(Debug)]
pub struct PageReader {
    engine: Arc<Engine>,
    scanner: Scanner,
    slots: Vec<Slot>,
}

/// The best series so far of one wanted value.
#[derive(Debug, Default)]
struct Slot {
    seen: bool,
    /// Timestamp, or value for LoRA.
    rank: f64,
    value: f64,
    /// Labels of an info metric.
    labels: Vec<u8>,
    /// Of a counter, its value in the last page that had it.
    last: Option<f64>,
    /// A line could not be read, or the metric is none that has a value.
    malformed: bool,
    not_scalar: bool,
}

impl PageReader {
    /// A reader of this engine's pages.
    #[must_use]
    pub fn new(engine: Arc<Engine>) -> Self {
        let slots = engine.wanted.iter().map(|_| Slot::default()).collect();
        Self { engine, scanner: Scanner::default(), slots }
    }

    /// The engine.
    #[must_use]
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Begins a page, whatever became of the last one.
    pub fn begin(&mut self) {
        self.scanner.abandon();
        for slot in &mut self.slots {
            let mut labels = std::mem::take(&mut slot.labels);
            labels.clear();
            *slot = Slot { labels, last: slot.last, ..Slot::default() };
        }
    }

    /// Reads on in the page.
    pub fn feed(&mut self, chunk: &[u8]) {
        let Self { engine, scanner, slots } = self;
        scanner.feed(&engine.names, chunk, |found| note(engine, slots, &found));
    }

    /// Ends the page and puts what it had into `metrics`; the rest stays as it was. The time of the
    /// update is the caller's to note, if anything was [found](Extraction::found).
    pub fn finish(&mut self, metrics: &mut Metrics) -> Extraction {
        let Self { engine, scanner, slots } = self;
        scanner.finish(&engine.names, |found| note(engine, slots, &found));
        let mut done = Extraction::default();
        let mut old_kv_usage = false;
        let mut counted = None;
        for (wanted, slot) in engine.wanted.iter().zip(slots.iter_mut()) {
            // A wrong line counts even if another one could be read.
            let mut faults = u32::from(slot.malformed);
            if slot.seen && wanted.what.is_counter() {
                let more = slot.grown(&mut faults);
                // Further names of the same are followed, for the page on which they are alone.
                if counted.replace(&wanted.what) != Some(&wanted.what) {
                    match wanted.what {
                        What::PrefixQueries => metrics.prefix_queries += more,
                        _ => metrics.prefix_hits += more,
                    }
                    done.found += 1;
                }
            } else if slot.seen {
                let good = engine.put(wanted, slot, metrics, &mut faults);
                done.found += u32::from(good);
                old_kv_usage |= good && wanted.what == What::OldKvUsage;
            } else {
                let may_lack = match wanted.what {
                    // vLLM shows none until it has loaded an adapter.
                    What::Lora | What::OldKvUsage => true,
                    // Not all engines have a prefix cache.
                    What::PrefixQueries | What::PrefixHits => true,
                    What::KvUsage => old_kv_usage,
                    _ => false,
                };
                faults = faults.max(u32::from(!may_lack || slot.not_scalar));
            }
            done.faults += faults;
        }
        done
    }

    /// What the last page lacked, in words, for a log line.
    #[must_use]
    pub fn complaint(&self) -> String {
        let mut texts = Vec::new();
        for (wanted, slot) in self.engine.wanted.iter().zip(&self.slots) {
            let optional =
                matches!(wanted.what, What::Lora | What::OldKvUsage) || wanted.what.is_counter();
            let text = match slot {
                Slot { malformed: true, .. } => "malformed",
                Slot { not_scalar: true, seen: false, .. } => "a histogram or summary",
                Slot { seen: false, .. } if !optional => "not there",
                _ if slot.seen && !slot.value.is_finite() => "not finite",
                _ => continue,
            };
            texts.push(format!("{} is {text}", wanted.spec));
        }
        if texts.is_empty() { "a label is no number".to_owned() } else { texts.join("; ") }
    }
}

/// Puts a find into the slots that it belongs to.
fn note(engine: &Engine, slots: &mut [Slot], found: &Found<'_>) {
    let name = match found {
        Found::Sample(Sample { name, .. })
        | Found::NotScalar { name }
        | Found::Malformed { name } => *name,
    };
    for (wanted, slot) in engine.wanted.iter().zip(slots).filter(|(wanted, _)| wanted.name == name)
    {
        match found {
            Found::NotScalar { .. } => slot.not_scalar = true,
            Found::Malformed { .. } => slot.malformed = true,
            Found::Sample(_) if slot.not_scalar => {}
            Found::Sample(sample) if wanted.what.is_counter() => {
                if wanted.spec.matches(sample.labels) {
                    slot.seen = true;
                    slot.value += sample.value;
                }
            }
            Found::Sample(sample) => {
                let info = matches!(wanted.what, What::Lora | What::CacheInfo);
                let lora = wanted.what == What::Lora;
                let rank = if lora { sample.value } else { sample.timestamp };
                // As in Go, what is before 1970 does not count, nor does NaN.
                let best = if slot.seen { slot.rank } else { -1.0 };
                if rank > best && wanted.spec.matches(sample.labels) {
                    (slot.seen, slot.rank, slot.value) = (true, rank, sample.value);
                    if info {
                        slot.labels.clear();
                        slot.labels.extend_from_slice(sample.labels.as_bytes());
                    }
                }
            }
        }
    }
}

impl Engine {
    /// Puts one value into `metrics`. False, and a fault, when it is unfit.
    fn put(&self, wanted: &Wanted, slot: &Slot, metrics: &mut Metrics, faults: &mut u32) -> bool {
        let labels = Labels::from_bytes(&slot.labels);
        match &wanted.what {
            What::Lora => return put_lora(labels, &mut metrics.lora, faults),
            What::CacheInfo => {
                metrics.cache_block_tokens = 0;
                number_label(
                    labels,
                    &self.block_size_label,
                    &mut metrics.cache_block_tokens,
                    faults,
                );
                number_label(labels, &self.blocks_label, &mut metrics.cache_blocks, faults);
                return true;
            }
            _ if !slot.value.is_finite() => {
                *faults += 1;
                return false;
            }
            What::Waiting => metrics.waiting = count(slot.value),
            What::Running => metrics.running = count(slot.value),
            What::KvUsage | What::OldKvUsage => metrics.kv_usage = slot.value.clamp(0.0, 1.0),
            What::BlockSize => metrics.cache_block_tokens = count(slot.value),
            What::Blocks => metrics.cache_blocks = count(slot.value),
            // Read where their last value is.
            What::PrefixQueries | What::PrefixHits => {}
            What::Custom(key) => match metrics.custom.get_mut(key) {
                Some(value) => *value = slot.value,
                None => _ = metrics.custom.insert(key.clone(), slot.value),
            },
        }
        true
    }
}

/// A number of things: what is negative is none, fractions are cut off.
fn count(value: f64) -> u64 {
    value as u64
}

fn put_lora(labels: Labels<'_>, lora: &mut LoraMetrics, faults: &mut u32) -> bool {
    lora.active = adapters(labels, "running_lora_adapters");
    lora.waiting = adapters(labels, "waiting_lora_adapters");
    let mut max = lora.max_active as u64;
    number_label(labels, "max_lora", &mut max, faults);
    lora.max_active = usize::try_from(max).unwrap_or(usize::MAX);
    true
}

/// A comma-separated list: sorted, each once.
fn adapters(labels: Labels<'_>, label: &str) -> Vec<String> {
    let Some(list) = labels.get(label) else { return Vec::new() };
    let mut names: Vec<String> = String::from_utf8_lossy(&list)
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// A label that holds a number. One that is absent or empty changes nothing.
fn number_label(labels: Labels<'_>, label: &str, value: &mut u64, faults: &mut u32) {
    let Some(text) = labels.get(label).filter(|text| !text.is_empty()) else { return };
    match std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok()) {
        Some(number) => *value = number,
        None => *faults += 1,
    }
}

#[cfg(test)]
mod tests;
