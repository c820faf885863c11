//! What a request asks for: one lazy scan of its body.
//!
//! # Model
//!
//! The parser is chosen by the request's path. It scans the JSON body once, checks that it is JSON,
//! and keeps **spans**: nothing is copied, nothing is built, the body goes on byte for byte. Only a
//! model rewrite and the demand for a stream's usage change it, by replacing a span. Whoever wants the prompt
//! reads it out of the body by its spans, in pieces.
//!
//! | module | what it is for |
//! | --- | --- |
//! | `parsers` | path → API; the errors |
//! | `fields` | which fields matter to which API |
//! | `shapes` | the shapes of Go's structs, and whether a value has one |
//! | `json` | the scanner, with the verdicts of Go's `encoding/json` |
//! | `read` | the prompt as text, bytes or token ids |
//! | `estimate` | the prompt as pseudo tokens, without a tokenizer |
//! | `splice` | another model name, and the demand for usage |
//! | [`fuzz`] | what holds for every body |
//!
//! # Failure
//!
//! What Go's parsers refuse is refused with their texts. Spans are into the body that was parsed;
//! read with another body they give nonsense or nothing, never a panic.
//!
//! # Cost
//!
//! One pass over the body, gigabytes a second through long strings; no allocation but for the
//! model's name, the cache salt, and what is nested more than 64 deep.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::Bytes;
use smallvec::SmallVec;

use crate::epp::ext_proc::headers::HeaderList;

mod estimate;
mod fields;
pub mod fuzz;
mod image;
mod json;
mod parsers;
mod read;
mod shapes;
mod splice;
#[cfg(test)]
mod tests;

pub use self::{
    estimate::estimate_tokens,
    json::JsonError,
    parsers::{DEFAULT_PARSERS, ParseError, ParserKind, Parsers, Route, request_path},
    splice::{Changes, splice},
};

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
    /// SGLang's own `generate`.
    SglangGenerate,
    /// Nobody's: passed through unread.
    Raw,
}

impl Api {
    /// Has its body to name a model, and may the model be rewritten? Not where the body is passed
    /// through unread, nor in SGLang's own API, which has no models.
    #[must_use]
    pub fn has_model(self) -> bool {
        !matches!(self, Self::CountTokens | Self::SglangGenerate | Self::Raw)
    }

    /// Is the response looked at?
    #[must_use]
    pub fn has_response(self) -> bool {
        self != Self::CountTokens
    }
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
    /// A list of blocks of a content.
    Blocks,
    /// Something else: read as the JSON that it is.
    Json,
}

/// A part of the prompt: a JSON value inside the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptSpan {
    /// How to read it.
    pub form: PromptForm,
    /// The bytes of the value, brackets and quotes included.
    pub span: Range<usize>,
}

/// A change to a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The bytes that go; an empty range is a place.
    pub span: Range<usize>,
    /// What comes in their place.
    pub text: &'static str,
}

/// What the scan of a body found.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// Which API.
    pub api: Api,
    /// `model`, unescaped; empty if the API has none.
    pub model: String,
    /// The bytes of the value of `model`, quotes included; of the last one if there are several. It
    /// may be there although [`model`](Self::model) is empty: then it is no string, or an empty one.
    pub model_span: Option<Range<usize>>,
    /// Will the response be a stream of events?
    pub stream: bool,
    /// Limit of output tokens, if the client set one.
    pub max_output_tokens: Option<u64>,
    /// `cache_salt` (SGLang: `extra_key`), unescaped; not empty.
    pub cache_salt: Option<String>,
    /// The prompt, in the order in which a chat template would put it.
    pub prompt: SmallVec<[PromptSpan; 2]>,
    /// The bytes of the value of `tools`, unless it is null or empty.
    pub tools: Option<Range<usize>>,
    /// What has to change so that a stream reports its tokens; `None`: it is no stream of completions, or
    /// does already, or would not.
    pub usage_edit: Option<Edit>,
    /// Does a message have an image, video or audio part? Known for chat completions and messages.
    pub multimodal: bool,
}

impl Parsed {
    /// What is known of a body that is not read.
    #[must_use]
    pub fn unread(api: Api) -> Self {
        Self {
            api,
            model: String::new(),
            model_span: None,
            stream: false,
            max_output_tokens: None,
            cache_salt: None,
            prompt: SmallVec::new(),
            tools: None,
            usage_edit: None,
            multimodal: false,
        }
    }
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
