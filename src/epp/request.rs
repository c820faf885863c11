//! What a request asks for: one lazy scan of its body.
//!
//! # Model
//!
//! The parser is chosen by the request's path. It scans the JSON body once, checks that it is JSON,
//! and keeps **spans**: nothing is copied, nothing is built, the body goes on byte for byte. Only a
//! model rewrite changes it, by replacing the span of the model's name.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::Bytes;
use smallvec::SmallVec;

use crate::epp::ext_proc::headers::HeaderList;

/// An API of an inference server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// OpenAI `completions`, and whatever the OpenAI parser gets on an unknown path.
    Completions,
    /// OpenAI `chat/completions`.
    ChatCompletions,
    /// OpenAI `embeddings`.
    Embeddings,
    /// OpenAI `responses`.
    Responses,
    /// OpenAI `conversations`.
    Conversations,
    /// OpenAI `images/generations`.
    Images,
    /// Anthropic `messages`.
    Messages,
    /// Anthropic `messages/count_tokens`: routed, and its response is not looked at.
    CountTokens,
    /// vLLM `inference/v1/generate`.
    Generate,
    /// Nobody's: passed through unread.
    Raw,
}

/// What a prompt is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptForm {
    /// A string.
    Text,
    /// A list of strings.
    Texts,
    /// A list of token ids.
    Tokens,
    /// A list of lists of token ids.
    TokenLists,
    /// A list of messages with roles and contents, or of items with such.
    Messages,
}

/// A part of the prompt: a JSON value inside the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptSpan {
    /// How to read it.
    pub form: PromptForm,
    /// The bytes of the value, brackets and quotes included.
    pub span: Range<usize>,
}

/// What the scan of a body found.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// Which API.
    pub api: Api,
    /// `model`, unescaped; empty if the API has none.
    pub model: String,
    /// The bytes of the value of `model`, quotes included.
    pub model_span: Option<Range<usize>>,
    /// Will the response be a stream of events?
    pub stream: bool,
    /// Limit of output tokens, if the client set one.
    pub max_output_tokens: Option<u64>,
    /// `cache_salt`, unescaped.
    pub cache_salt: Option<String>,
    /// The prompt, in the order in which a chat template would put it.
    pub prompt: SmallVec<[PromptSpan; 2]>,
    /// The bytes of the value of `tools`.
    pub tools: Option<Range<usize>>,
    /// Does a message have an image, video or audio part?
    pub multimodal: bool,
}

/// A request as plugins see it.
#[derive(Clone, Debug)]
pub struct InferenceRequest {
    /// `x-request-id`, the client's or ours.
    pub id: Arc<str>,
    /// Headers of the client.
    pub headers: HeaderList,
    /// What its body says.
    pub parsed: Parsed,
    /// The whole body.
    pub body: Bytes,
    /// The model that serves it: the client's, or what it was rewritten to.
    pub target_model: Arc<str>,
    /// Flow of the request; `default-flow` if nobody said.
    pub fairness_id: Arc<str>,
    /// Priority of its objective; below 0 it may be shed.
    pub priority: i32,
    /// When its headers came.
    pub received: Instant,
}
