//! The prompts that everybody asks for: a few roots, branches that share their beginnings.

use std::collections::HashMap;

use kv_indexer::loadgen::engine::sequence::{Identity, Sequence};

/// Tokens per block in the index.
pub(crate) const INDEX_BLOCK: usize = 8;
/// Tokens per block of engines.
pub(crate) const ENGINE_BLOCKS: [usize; 2] = [8, 16];

const ROOTS: u32 = 12;
const BRANCHES: u32 = 5;
const LEAVES: u32 = 4;

/// See the module's page.
#[derive(Debug)]
pub(crate) struct Universe {
    prompts: Vec<Vec<u32>>,
    by_block_size: HashMap<usize, Vec<Sequence>>,
}

impl Universe {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut piece = |blocks: usize| -> Vec<u32> {
            (0..blocks * ENGINE_BLOCKS[1]).map(|_| random.u32(..50_000)).collect()
        };
        let mut prompts = Vec::new();
        for root in 0..ROOTS {
            let root = piece(1 + root as usize % 4);
            for branch in 0..BRANCHES {
                let branch = [root.clone(), piece(1 + branch as usize % 3)].concat();
                for leaf in 0..LEAVES {
                    prompts.push([branch.clone(), piece(1 + leaf as usize)].concat());
                }
            }
        }
        let cut = |size: usize| {
            let cut = |tokens: &Vec<u32>| Sequence::new(tokens.clone(), Identity::default(), size);
            (size, prompts.iter().map(cut).collect())
        };
        let by_block_size = ENGINE_BLOCKS.into_iter().map(cut).collect();
        Self { prompts, by_block_size }
    }

    /// All prompts' tokens.
    pub(crate) fn prompts(&self) -> &[Vec<u32>] {
        &self.prompts
    }

    /// A prompt as an engine cuts it.
    pub(crate) fn sequence(&self, at: usize, block_size: usize) -> &Sequence {
        &self.by_block_size[&block_size][at]
    }

    /// A prompt; some are asked for more often.
    pub(crate) fn pick(&self, random: &mut fastrand::Rng) -> usize {
        let (one, other) = (random.usize(..self.prompts.len()), random.usize(..self.prompts.len()));
        one.min(other)
    }
}
