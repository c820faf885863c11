//! What a response says of its tokens, found in its bytes as they pass.
//!
//! # Model
//!
//! The scan looks for `"usage"` as an object key, wherever it stands: at the top of a unary answer,
//! in an event of a stream, in `response` of the responses API, in `message` of Anthropic's
//! `message_start`. Inside a JSON string the quotes are escaped, so that text about usage is none. A
//! later object replaces what it names of an earlier one, which is the last one of OpenAI's streams
//! and the merge of Anthropic's `message_start` and `message_delta`.
//!
//! Chunks may end anywhere, inside the key or the object too; of what is open at most
//! [`OBJECT_BYTES`] are kept.
//!
//! # Cost
//!
//! One substring search per chunk. The object itself, once there, is parsed; nothing else is.

use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem::Finder;
use serde::Deserialize;

/// The longest object that is read, in bytes; usages have a few hundred.
const OBJECT_BYTES: usize = 16 << 10;
const KEY: &[u8] = b"\"usage\"";
static FIND_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));

/// Tokens of one response, as the model server counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Tokens generated.
    pub completion: u64,
    /// Both; the server's own sum if it gives one.
    pub total: u64,
    /// Tokens of the prompt that came out of a cache, if the server says so.
    pub cached: Option<u64>,
}

/// A usage object of any of the APIs.
#[derive(Debug, Default, Deserialize)]
struct Object {
    prompt_tokens: Option<u64>,
    input_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    output_tokens: Option<u64>,
    total_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens_details: Option<Details>,
    cache_read_input_tokens: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

/// Where in the text of a usage the scan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Looking for the key, of which the last chunk's end may be the first `matched` bytes.
    Key { matched: usize },
    /// Behind the key.
    Colon,
    /// Behind the colon.
    Value,
    /// Inside the object, at this depth of braces.
    Object { depth: usize, string: bool, escaped: bool },
}

/// Finds usages in a body that comes in chunks.
#[derive(Debug)]
pub(super) struct UsageScan {
    at: At,
    /// The object's part in earlier chunks.
    open: Vec<u8>,
    prompt: Option<u64>,
    completion: Option<u64>,
    total: Option<u64>,
    cached: Option<u64>,
}

impl Default for UsageScan {
    fn default() -> Self {
        Self {
            at: At::Key { matched: 0 },
            open: Vec::new(),
            prompt: None,
            completion: None,
            total: None,
            cached: None,
        }
    }
}

impl UsageScan {
    /// What was found so far.
    pub(super) fn usage(&self) -> Option<Usage> {
        self.prompt.or(self.completion).or(self.total)?;
        let (prompt, completion) = (self.prompt.unwrap_or(0), self.completion.unwrap_or(0));
        let total = self.total.unwrap_or(prompt.saturating_add(completion));
        Some(Usage { prompt, completion, total, cached: self.cached })
    }

    /// Looks at the next chunk.
    pub(super) fn scan(&mut self, chunk: &Bytes) {
        let mut rest: &[u8] = chunk;
        while !rest.is_empty() {
            rest = match self.at {
                At::Key { matched } => self.key(rest, matched),
                At::Colon => self.after_space(rest, b':', At::Value),
                At::Value => {
                    let object = At::Object { depth: 0, string: false, escaped: false };
                    // The brace itself is read again, as a part of the object.
                    self.after_space(rest, b'{', object)
                }
                At::Object { .. } => self.object(rest),
            };
        }
    }

    /// Finds the key; returns what is behind it.
    fn key<'a>(&mut self, text: &'a [u8], matched: usize) -> &'a [u8] {
        if matched > 0 {
            let wanted = &KEY[matched..];
            let common = wanted.len().min(text.len());
            if wanted[..common] == text[..common] {
                let now = matched + common;
                self.at = if now == KEY.len() { At::Colon } else { At::Key { matched: now } };
                return &text[common..];
            }
            // No end of a part of the key is a beginning of it, so that nothing is lost.
            self.at = At::Key { matched: 0 };
        }
        if let Some(found) = FIND_KEY.find(text) {
            self.at = At::Colon;
            return &text[found + KEY.len()..];
        }
        let matched = (1..KEY.len()).rev().find(|len| text.ends_with(&KEY[..*len]));
        self.at = At::Key { matched: matched.unwrap_or(0) };
        &[]
    }

    /// Skips white space; goes on to `next` if `wanted` follows, else back to looking for the key.
    fn after_space<'a>(&mut self, text: &'a [u8], wanted: u8, next: At) -> &'a [u8] {
        let Some(at) = text.iter().position(|byte| !byte.is_ascii_whitespace()) else {
            return &[];
        };
        if text[at] != wanted {
            self.at = At::Key { matched: 0 };
            return &text[at..];
        }
        self.at = next;
        if wanted == b'{' { &text[at..] } else { &text[at + 1..] }
    }

    /// Reads on to the end of the object; returns what is behind it.
    fn object<'a>(&mut self, text: &'a [u8]) -> &'a [u8] {
        let At::Object { mut depth, mut string, mut escaped } = self.at else { return text };
        for (at, byte) in text.iter().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if string => escaped = true,
                b'"' => string = !string,
                b'{' if !string => depth += 1,
                b'}' if !string => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                let (object, rest) = text.split_at(at + 1);
                self.at = At::Key { matched: 0 };
                if self.open.is_empty() {
                    self.read(object);
                } else if self.open.len() + object.len() <= OBJECT_BYTES {
                    let mut open = std::mem::take(&mut self.open);
                    open.extend_from_slice(object);
                    self.read(&open);
                }
                self.open = Vec::new();
                return rest;
            }
        }
        if self.open.len() + text.len() > OBJECT_BYTES {
            self.open = Vec::new();
            self.at = At::Key { matched: 0 };
        } else {
            self.open.extend_from_slice(text);
            self.at = At::Object { depth, string, escaped };
        }
        &[]
    }

    /// Takes over what an object says; one that is no usage says nothing.
    fn read(&mut self, object: &[u8]) {
        let Ok(object) = serde_json::from_slice::<Object>(object) else { return };
        let cached = |details: Option<Details>| details.and_then(|details| details.cached_tokens);
        let merge = |to: &mut Option<u64>, value: Option<u64>| *to = value.or(*to);
        merge(&mut self.prompt, object.prompt_tokens.or(object.input_tokens));
        merge(&mut self.completion, object.completion_tokens.or(object.output_tokens));
        merge(&mut self.total, object.total_tokens);
        let details = cached(object.prompt_tokens_details).or(cached(object.input_tokens_details));
        merge(&mut self.cached, details.or(object.cache_read_input_tokens));
    }
}
