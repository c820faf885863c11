//! Tokens → request keys.
//!
//! A request key is a chained 64-bit hash: it names a block together with everything before it.
//! All three algorithms share one shape, `key(i) = H(key(i-1), tokens of block i, extras of block
//! i)`, rooted in seed, model and LoRA name.

mod algorithm;
mod models;
mod prompt;
#[cfg(test)]
mod tests;

pub use self::{
    algorithm::{Algorithm, Scheme},
    models::Models,
    prompt::{MultimodalItem, Prompt, PromptError},
};
