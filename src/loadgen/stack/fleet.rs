//! `loadgen fleet`: engines in one process.

use crate::loadgen::engine::Pace;

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
