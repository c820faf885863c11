//! Tokens from an engine: vLLM's `/v1/completions/render` and `/v1/chat/completions/render`.

use std::time::Duration;

use super::{Input, Tokenize, TokenizeError, Tokenized};

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderConfig {
    /// `http://host:port` of the engine or of `vllm launch render`.
    pub url: String,
    /// The model's name there; empty: that of the request.
    pub model: String,
    /// For text.
    pub timeout: Duration,
    /// For chats with pictures and such.
    pub multimodal_timeout: Duration,
}

/// Asks an engine.
#[derive(Debug)]
pub struct Render {
    _private: (),
}

impl Render {
    /// A client; nothing is asked yet.
    ///
    /// # Errors
    ///
    /// A URL that is none, in words.
    pub fn new(_config: RenderConfig) -> Result<Self, String> {
        Ok(Self { _private: () })
    }
}

#[tonic::async_trait]
impl Tokenize for Render {
    async fn tokenize(&self, _model: &str, _input: Input) -> Result<Tokenized, TokenizeError> {
        Err(TokenizeError::NotConfigured)
    }
}
