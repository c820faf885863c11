//! Makes traces in Mooncake's format, with a stated share of tokens that a cache could reuse.
//!
//! # Model
//!
//! A prompt begins with blocks of an earlier one, and goes on with new ones. How many are reused varies
//! from prompt to prompt; what one has too few of, later ones make up for, so that the share is right
//! over the whole file: hits of an infinite cache with blocks of 512 tokens, by prompt tokens.

use std::{
    collections::VecDeque,
    io::{self, Write},
    time::Duration,
};

use fastrand::Rng;

use super::MOONCAKE_BLOCK;
use crate::loadgen::workload::{
    Arrivals, Lengths,
    random::{Role, seed_of},
};

/// Prompts that a new one can begin with: the last so many.
const RECENT: usize = 2_000;
/// Tries to find an earlier prompt that is long enough.
const TRIES: usize = 16;

/// A trace to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Generate {
    /// When requests come; times are written in whole milliseconds.
    pub arrivals: Arrivals,
    /// How long they come.
    pub duration: Duration,
    /// Share of prompt tokens that a cache could reuse at best, 0 to 0.95. Prompts of one block and less
    /// reuse nothing.
    pub cache_ratio: f64,
    /// Of prompts.
    pub input: Lengths,
    /// Of answers.
    pub output: Lengths,
    /// All draws come of it.
    pub seed: u64,
}

/// What was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// Lines.
    pub requests: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Of these, in blocks of earlier prompts.
    pub hit_tokens: u64,
}

impl Generate {
    /// Writes the file.
    ///
    /// # Errors
    ///
    /// What `out` returns.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<Generated> {
        let mut rng = Rng::with_seed(seed_of(self.seed, Role::Order, 0));
        let mut recent: VecDeque<Vec<u64>> = VecDeque::new();
        let mut next_block = 0;
        let mut made = Generated::default();
        for arrival in self.arrivals.times(self.seed, self.duration) {
            let input = self.input.draw(&mut rng, 1.0);
            made.requests += 1;
            made.prompt_tokens += u64::from(input);
            // What is missing to the share, more or less.
            let missing = self.cache_ratio * made.prompt_tokens as f64 - made.hit_tokens as f64;
            let wanted = missing * (0.5 + rng.f64()) / f64::from(MOONCAKE_BLOCK);
            // Neither the last token nor a block that is not whole can be reused.
            let most = (input - 1) / MOONCAKE_BLOCK;
            let mut blocks = reused(&recent, &mut rng, (wanted.round() as u32).min(most) as usize);
            made.hit_tokens += blocks.len() as u64 * u64::from(MOONCAKE_BLOCK);
            while blocks.len() < input.div_ceil(MOONCAKE_BLOCK) as usize {
                blocks.push(next_block);
                next_block += 1;
            }
            writeln!(
                out,
                r#"{{"timestamp": {}, "input_length": {input}, "output_length": {}, "hash_ids": {blocks:?}}}"#,
                arrival.at.as_millis(),
                self.output.draw(&mut rng, 1.0),
            )?;
            // The last block is reused only if it is whole.
            blocks.truncate((input / MOONCAKE_BLOCK) as usize);
            if recent.len() == RECENT {
                recent.pop_front();
            }
            recent.push_back(blocks);
        }
        Ok(made)
    }
}

/// So many leading blocks of an earlier prompt, or fewer if none that is looked at has as many.
fn reused(recent: &VecDeque<Vec<u64>>, rng: &mut Rng, wanted: usize) -> Vec<u64> {
    let mut best: &[u64] = &[];
    if wanted > 0 && !recent.is_empty() {
        for _ in 0..TRIES {
            let blocks = &recent[rng.usize(..recent.len())];
            if blocks.len() > best.len() {
                best = blocks;
            }
            if best.len() >= wanted {
                break;
            }
        }
    }
    best[..wanted.min(best.len())].to_vec()
}
