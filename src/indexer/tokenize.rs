//! Where tokenizers plug in: text and chat messages → token ids.

use std::fmt;

/// Turns text into the token ids that the engines of a model see.
#[tonic::async_trait]
pub trait Tokenize: Send + Sync + fmt::Debug {
    /// Tokens of a plain prompt. `model` is the canonical name.
    ///
    /// # Errors
    ///
    /// [`TokenizeError`].
    async fn text(&self, model: &str, text: &str) -> Result<Vec<u32>, TokenizeError>;

    /// Tokens of the JSON body of an OpenAI chat completion request.
    ///
    /// # Errors
    ///
    /// [`TokenizeError`].
    async fn chat(&self, model: &str, body: &str) -> Result<Vec<u32>, TokenizeError>;
}

/// Why text has no tokens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizeError {
    /// The model has no tokenizer, or no chat template.
    #[error("not configured for this model")]
    NotConfigured,
    /// The input cannot be tokenized.
    #[error("{0}")]
    Invalid(String),
}
