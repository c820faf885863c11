//! What is counted about a prefix store, under its new and its old name.

use prometheus::{Histogram, HistogramOpts, IntGauge, Opts, Registry};

use crate::support::metrics::family;

/// Names of the families, new and old.
const SIZE: [&str; 2] =
    ["llm_d_epp_prefix_indexer_size", "inference_extension_prefix_indexer_size"];
const HIT_RATIO: [&str; 2] =
    ["llm_d_epp_prefix_indexer_hit_ratio", "inference_extension_prefix_indexer_hit_ratio"];
const HIT_BYTES: [&str; 2] =
    ["llm_d_epp_prefix_indexer_hit_bytes", "inference_extension_prefix_indexer_hit_bytes"];

const RATIO: [f64; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
const BYTES: [f64; 14] = [
    0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0,
];

/// Metrics of one plugin. Those of the old names are common to all plugins.
#[derive(Debug)]
pub(super) struct Metrics {
    size: [IntGauge; 2],
    hit_ratio: [Histogram; 2],
    hit_bytes: [Histogram; 2],
}

impl Metrics {
    pub(super) fn new(registry: &Registry, name: &str, kind: &str) -> prometheus::Result<Self> {
        let opts = |[new, old]: [&str; 2], help: &str| {
            let old = Opts::new(old, format!("[ALPHA] [Deprecated: Use {new}] {help}"));
            let new = Opts::new(new, format!("[ALPHA] {help}"))
                .const_label("plugin_name", name)
                .const_label("plugin_type", kind);
            [new, old]
        };
        let histogram = |opts: Opts, buckets: &[f64]| {
            let mut opts = HistogramOpts::from(opts);
            opts.buckets = buckets.to_vec();
            family(registry, Histogram::with_opts(opts)?)
        };
        let [new, old] = opts(SIZE, "Size of the prefix indexer.");
        let size = [
            family(registry, IntGauge::with_opts(new)?)?,
            family(registry, IntGauge::with_opts(old)?)?,
        ];
        let help = "Ratio of prefix length matched to total prefix length in the cache lookup.";
        let [new, old] = opts(HIT_RATIO, help);
        let hit_ratio = [histogram(new, &RATIO)?, histogram(old, &RATIO)?];
        let help = "Length of the prefix match in number of bytes in the cache lookup.";
        let [new, old] = opts(HIT_BYTES, help);
        let hit_bytes = [histogram(new, &BYTES)?, histogram(old, &BYTES)?];
        Ok(Self { size, hit_ratio, hit_bytes })
    }

    /// The store has grown or shrunk by so many blocks.
    pub(super) fn resized(&self, by: i64) {
        if by != 0 {
            self.size.iter().for_each(|size| size.add(by));
        }
    }

    /// A request went to an endpoint that held `matched` of its `total` blocks.
    pub(super) fn routed(&self, matched: u32, total: u32, block_bytes: usize) {
        let bytes = f64::from(matched) * block_bytes as f64;
        self.hit_bytes.iter().for_each(|hits| hits.observe(bytes));
        if total > 0 {
            let ratio = f64::from(matched) / f64::from(total);
            self.hit_ratio.iter().for_each(|hits| hits.observe(ratio));
        }
    }
}
