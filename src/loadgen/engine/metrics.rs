//! `/metrics` as vLLM writes it: names, labels and types of those that routers read, and on demand as
//! many others as a real page has.

use std::fmt::Write as _;

use super::scheduler::Totals;

/// vLLM's buckets of `time_to_first_token_seconds`.
const TTFT_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's buckets of `e2e_request_latency_seconds`.
const E2E_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];

/// Requests and blocks in use, as a scraper sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests that run.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Share of the blocks in use, 0 to 1.
    pub kv_usage: f64,
}

/// A Prometheus histogram.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
    count: u64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], sum: 0.0, count: 0 }
    }

    /// Adds a value, seconds.
    pub(super) fn observe(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
        if let Some(at) = self.bounds.iter().position(|bound| value <= *bound) {
            self.counts[at] += 1;
        }
    }

    fn write(&self, page: &mut String, name: &str, labels: &str) {
        let mut below = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            below += count;
            line(page, format_args!("{name}_bucket{{{labels},le=\"{bound:?}\"}} {below}.0"));
        }
        line(page, format_args!("{name}_bucket{{{labels},le=\"+Inf\"}} {}.0", self.count));
        line(page, format_args!("{name}_count{{{labels}}} {}.0", self.count));
        line(page, format_args!("{name}_sum{{{labels}}} {:?}", self.sum));
    }
}

/// Latencies of one rank's requests.
#[derive(Clone, Debug)]
pub(super) struct Latencies {
    /// From arrival to first token.
    pub(super) ttft: Histogram,
    /// From arrival to last token.
    pub(super) e2e: Histogram,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { ttft: Histogram::new(&TTFT_BUCKETS), e2e: Histogram::new(&E2E_BUCKETS) }
    }
}

/// What one rank shows.
#[derive(Clone, Debug)]
pub(super) struct RankPage {
    pub(super) load: Load,
    pub(super) totals: Totals,
    pub(super) latencies: Latencies,
    /// Adapters of running and of waiting requests.
    pub(super) loras: [Vec<String>; 2],
}

/// One of a rank's histograms.
type OfRank<'a> = &'a dyn Fn(&RankPage) -> &Histogram;

/// What does not change.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) model: String,
    pub(super) block_size: usize,
    pub(super) num_gpu_blocks: u32,
    /// Absent if the engine has no adapters.
    pub(super) max_loras: Option<usize>,
    /// Bytes of further families, about.
    pub(super) padding: usize,
}

/// The page. `now`: seconds since the Unix epoch.
pub(super) fn page(facts: &Facts, ranks: &[RankPage], now: f64) -> String {
    let mut page = String::with_capacity(8 * 1024 + facts.padding);
    let labels =
        |rank: usize| format!("engine=\"{rank}\",model_name=\"{}\"", escaped(&facts.model));
    let mut family = |name: &str, kind: &str, help: &str, value: &dyn Fn(&RankPage) -> f64| {
        head(&mut page, name, kind, help);
        for (rank, it) in ranks.iter().enumerate() {
            line(&mut page, format_args!("{name}{{{}}} {:?}", labels(rank), value(it)));
        }
    };
    let (gauge, counter) = ("gauge", "counter");
    family("vllm:num_requests_running", gauge, "Requests in model execution batches.", &|it| {
        it.load.running as f64
    });
    family("vllm:num_requests_waiting", gauge, "Requests waiting to be processed.", &|it| {
        it.load.waiting as f64
    });
    family("vllm:kv_cache_usage_perc", gauge, "KV-cache usage. 1 means 100 percent.", &|it| {
        it.load.kv_usage
    });
    family("vllm:prefix_cache_queries_total", counter, "Queried tokens.", &|it| {
        it.totals.queries as f64
    });
    family("vllm:prefix_cache_hits_total", counter, "Cached tokens.", &|it| it.totals.hits as f64);
    family("vllm:num_preemptions_total", counter, "Preemptions by the engine.", &|it| {
        it.totals.preemptions as f64
    });
    family("vllm:prompt_tokens_total", counter, "Prefill tokens processed.", &|it| {
        it.totals.prompt as f64
    });
    family("vllm:generation_tokens_total", counter, "Generation tokens processed.", &|it| {
        it.totals.generation as f64
    });
    let name = "vllm:request_success_total";
    head(&mut page, name, counter, "Successfully processed requests.");
    for (rank, it) in ranks.iter().enumerate() {
        let (labels, value) = (labels(rank), it.totals.finished as f64);
        line(&mut page, format_args!("{name}{{{labels},finished_reason=\"length\"}} {value:?}"));
    }
    let histograms: [(&str, OfRank<'_>); 2] = [
        ("vllm:time_to_first_token_seconds", &|it| &it.latencies.ttft),
        ("vllm:e2e_request_latency_seconds", &|it| &it.latencies.e2e),
    ];
    for (name, histogram) in histograms {
        head(&mut page, name, "histogram", "Seconds.");
        for (rank, it) in ranks.iter().enumerate() {
            histogram(it).write(&mut page, name, &labels(rank));
        }
    }
    cache_config(&mut page, facts, ranks.len());
    if let Some(max) = facts.max_loras {
        let name = "vllm:lora_requests_info";
        head(&mut page, name, gauge, "Running stats on LoRA requests.");
        for it in ranks {
            let [running, waiting] = &it.loras;
            line(
                &mut page,
                format_args!(
                    "{name}{{max_lora=\"{max}\",running_lora_adapters=\"{}\",\
                     waiting_lora_adapters=\"{}\"}} {now:?}",
                    escaped(&running.join(",")),
                    escaped(&waiting.join(",")),
                ),
            );
        }
    }
    pad(&mut page, facts, ranks.len());
    page
}

fn cache_config(page: &mut String, facts: &Facts, ranks: usize) {
    let name = "vllm:cache_config_info";
    head(page, name, "gauge", "Information of the LLMEngine CacheConfig.");
    for rank in 0..ranks {
        line(
            page,
            format_args!(
                "{name}{{block_size=\"{}\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",\
                 engine=\"{rank}\",gpu_memory_utilization=\"0.9\",num_cpu_blocks=\"None\",\
                 num_gpu_blocks=\"{}\",num_gpu_blocks_override=\"{}\",\
                 prefix_caching_hash_algo=\"sha256\",sliding_window=\"None\"}} 1.0",
                facts.block_size, facts.num_gpu_blocks, facts.num_gpu_blocks,
            ),
        );
    }
}

/// Histograms that a scraper has to skip, until the page is about `facts.padding` longer.
fn pad(page: &mut String, facts: &Facts, ranks: usize) {
    const NAMES: [&str; 6] = [
        "inter_token_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "iteration_tokens_total",
    ];
    let end = page.len() + facts.padding;
    let mut at = 0;
    while page.len() < end {
        let mut name = format!("vllm:{}", NAMES[at % NAMES.len()]);
        if at >= NAMES.len() {
            // Names stay unique, as the format demands.
            name.push_str(&format!("_{}", at / NAMES.len()));
        }
        at += 1;
        head(page, &name, "histogram", "Histogram of something, in seconds.");
        for rank in 0..ranks.max(1) {
            let labels = format!("engine=\"{rank}\",model_name=\"{}\"", escaped(&facts.model));
            Histogram::new(&E2E_BUCKETS).write(page, &name, &labels);
        }
    }
}

fn head(page: &mut String, name: &str, kind: &str, help: &str) {
    line(page, format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
}

fn line(page: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    writeln!(page, "{text}").ok();
}

/// A label value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(padding: usize) -> Facts {
        let model = "a\"b".to_owned();
        Facts { model, block_size: 16, num_gpu_blocks: 64, max_loras: Some(4), padding }
    }

    fn rank() -> RankPage {
        let mut latencies = Latencies::default();
        latencies.ttft.observe(0.003);
        latencies.ttft.observe(10_000.0);
        RankPage {
            load: Load { running: 2, waiting: 1, kv_usage: 0.25 },
            totals: Totals { queries: 10, hits: 4, ..Totals::default() },
            latencies,
            loras: [vec!["x".to_owned(), "y".to_owned()], vec![]],
        }
    }

    #[test]
    fn the_page_has_the_lines_that_routers_read() {
        let page = page(&facts(0), &[rank(), rank()], 5.0);
        let labels = r#"engine="1",model_name="a\"b""#;
        for line in [
            format!("vllm:num_requests_running{{{labels}}} 2.0"),
            format!("vllm:num_requests_waiting{{{labels}}} 1.0"),
            format!("vllm:kv_cache_usage_perc{{{labels}}} 0.25"),
            format!("vllm:prefix_cache_hits_total{{{labels}}} 4.0"),
            format!("vllm:time_to_first_token_seconds_bucket{{{labels},le=\"0.005\"}} 1.0"),
            format!("vllm:time_to_first_token_seconds_bucket{{{labels},le=\"2560.0\"}} 1.0"),
            format!("vllm:time_to_first_token_seconds_bucket{{{labels},le=\"+Inf\"}} 2.0"),
            format!("vllm:time_to_first_token_seconds_count{{{labels}}} 2.0"),
            r#"vllm:lora_requests_info{max_lora="4",running_lora_adapters="x,y",waiting_lora_adapters=""} 5.0"#
                .to_owned(),
            "# TYPE vllm:e2e_request_latency_seconds histogram".to_owned(),
        ] {
            assert!(page.lines().any(|it| it == line), "no {line}\n{page}");
        }
        assert!(page.contains("vllm:cache_config_info{block_size=\"16\","));
    }

    #[test]
    fn padding_makes_it_as_long_as_asked() {
        let short = page(&facts(0), &[rank()], 5.0).len();
        let long = page(&facts(90_000), &[rank()], 5.0);
        assert!((90_000..95_000).contains(&(long.len() - short)), "{}", long.len());
        let types: Vec<&str> = long.lines().filter(|it| it.starts_with("# TYPE ")).collect();
        let unique: std::collections::HashSet<_> = types.iter().collect();
        assert_eq!(types.len(), unique.len(), "every family once");
    }
}
