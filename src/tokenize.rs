//! Text and chats → the token ids that an engine will make of them.
//!
//! # Model
//!
//! A [`Tokenize`] turns an [`Input`] into a [`Tokenized`] prompt: token ids, and where multimodal items
//! lie among them. [`Local`] does it in this process with the model's own `tokenizer.json` and chat
//! template, on a bounded [`pool`]; [`render`] asks an engine that does it for us.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`models`] | directories of models → tokenizers by served name |
//! | [`chat`] | the body of an OpenAI chat completion → messages, tools, options |
//! | [`command`] | `kv-indexer tokenize` |
//! | [`template`] | Jinja chat templates as `transformers` renders them |
//! | [`encode`] | text → ids, with a prefix-aware cache |
//! | [`pool`] | threads of their own, a queue with a cap, a budget per request |
//! | [`render`] | vLLM's `/v1/completions/render` and `/v1/chat/completions/render` |

use std::{fmt, sync::Arc};

use bytes::Bytes;

use crate::hash::MultimodalItem;

pub mod chat;
pub mod command;
pub mod encode;
pub mod models;
pub mod pool;
pub mod render;
pub mod template;

pub use self::models::Local;

/// Bytes of a prompt at most: two million tokens of English. The time that `tokenizers` takes grows little
/// faster than the text, but a text of one long word takes it a microsecond or two and a hundred bytes of
/// memory for each byte, and beyond ten million steps its regular expressions give up with a panic.
pub const MAX_PROMPT: usize = 8 << 20;

/// What is to be tokenized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The prompt of a completion.
    Text {
        /// The prompt.
        text: Arc<str>,
        /// Put the special tokens around it that the tokenizer wants, such as a first BOS: what engines
        /// do for completions unless the request says `add_special_tokens: false`.
        add_special_tokens: bool,
    },
    /// The JSON body of an OpenAI chat completion request.
    Chat(Bytes),
}

impl Input {
    /// Bytes of the prompt or of the body.
    fn bytes(&self) -> usize {
        match self {
            Self::Text { text, .. } => text.len(),
            Self::Chat(body) => body.len(),
        }
    }
}

/// A tokenized prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokenized {
    /// Token ids.
    pub ids: Arc<[u32]>,
    /// Where pictures and such lie, in any order; none for text.
    pub items: Arc<[MultimodalItem]>,
}

impl From<Vec<u32>> for Tokenized {
    fn from(ids: Vec<u32>) -> Self {
        Self { ids: ids.into(), items: Arc::default() }
    }
}

/// Turns text into the token ids that the engines of a model see.
#[tonic::async_trait]
pub trait Tokenize: Send + Sync + fmt::Debug {
    /// Tokenizes the prompt of a request for `model`, a served name.
    ///
    /// # Errors
    ///
    /// [`TokenizeError`].
    async fn tokenize(&self, model: &str, input: Input) -> Result<Tokenized, TokenizeError>;
}

/// Why text has no tokens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizeError {
    /// The model has no tokenizer.
    #[error("no tokenizer is configured for this model")]
    NotConfigured,
    /// The model has no chat template.
    #[error("the model has no chat template")]
    NoChatTemplate,
    /// The input cannot be tokenized: the body is no chat, the template refuses it, the prompt is longer
    /// than [`MAX_PROMPT`].
    #[error("{0}")]
    Invalid(String),
    /// The prompt has pictures or such, and nothing tells how many tokens they are.
    #[error("multimodal input of this model is not known")]
    Multimodal,
    /// Only the engine can put the prompts of this API together.
    #[error("prompts of this API are not tokenized outside of the engine")]
    Unsupported,
    /// Too much is waiting already.
    #[error("the tokenizer's queue is full")]
    Busy,
    /// It took longer than one request may.
    #[error("tokenization took longer than allowed")]
    Late,
    /// Whoever was asked does not answer, or answers nonsense.
    #[error("{0}")]
    Unavailable(String),
}

impl TokenizeError {
    /// A word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotConfigured => "no_tokenizer",
            Self::NoChatTemplate => "no_chat_template",
            Self::Invalid(_) => "invalid",
            Self::Multimodal => "multimodal",
            Self::Unsupported => "unsupported",
            Self::Busy => "queue_full",
            Self::Late => "late",
            Self::Unavailable(_) => "unavailable",
        }
    }
}
