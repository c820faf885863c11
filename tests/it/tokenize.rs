//! Tokenization against `transformers`, with the tokenizers of four model families.

mod command;
mod parity;
pub(crate) mod rig;
