//! Prompts to tokens, and tokens to the text of answers.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`pieces`] | a deterministic stand-in, for engines without a model's files |
//! | [`words`] | a model's own tokenizer and chat template |

pub mod pieces;
pub mod words;

pub use self::{pieces::Pieces, words::Words};
use super::sequence::Item;

/// Turns prompts into token ids, and tokens of answers into text.
pub trait Tokenizer: Send + Sync {
    /// Tokens of the prompt of a completion. `add_special_tokens`: with those that the tokenizer puts
    /// around a text.
    ///
    /// # Errors
    ///
    /// Why it has none, for the client.
    fn text(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String>;

    /// Tokens of the JSON body of a chat completion, and where pictures lie among them.
    ///
    /// # Errors
    ///
    /// Why it has none, for the client.
    fn chat(&self, body: &[u8]) -> Result<(Vec<u32>, Vec<Item>), String>;

    /// The answer to a prompt: that many tokens, the same ones for the same `state`. Empty: it has no
    /// opinion, any ids below [`pieces::VOCABULARY`] will do.
    fn answer(&self, chat: bool, state: u64, tokens: usize) -> Vec<u32>;

    /// Text of one token of an answer, such that texts can be joined.
    fn decode(&self, token: u32) -> String;
}
