//! Server-sent events, as they come, without a copy; and what one of them says about a completion.
//!
//! # Model
//!
//! [`Events`] cuts a byte stream into events, wherever its pieces end. [`Said::of`] reads one event's
//! JSON: a scan that walks over what it does not need (without checking more of that than where it
//! ends), and serde_json for what the scan does not know, which is also what the scan is compared with.
//!
//! # Cost
//!
//! An event that lies within one piece of the stream is neither copied nor allocated. An event is
//! [`MAX_EVENT_BYTES`] long at most.

mod scan;
#[cfg(test)]
mod tests;

use memchr::memchr2;
use serde_json::Value;

/// Bytes of one event at most.
pub const MAX_EVENT_BYTES: usize = 1 << 20;

/// Not server-sent events, or not those of a completion, or longer than [`MAX_EVENT_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Garbled;

/// Cuts a stream into events.
#[derive(Debug, Default)]
pub struct Events {
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// The data of the event so far.
    data: Vec<u8>,
    has_data: bool,
    /// Did the piece before end with a carriage return? A line feed that follows belongs to it.
    after_cr: bool,
}

impl Events {
    /// Takes the next piece, of any length, and calls `event` with the data of each event that it
    /// completes.
    ///
    /// # Errors
    ///
    /// [`Garbled`] for an event that is too long, and what `event` returns.
    pub fn feed(
        &mut self,
        mut piece: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), Garbled>,
    ) -> Result<(), Garbled> {
        if self.after_cr && !piece.is_empty() {
            self.after_cr = false;
            piece = piece.strip_prefix(b"\n").unwrap_or(piece);
        }
        while let Some(end) = memchr2(b'\n', b'\r', piece) {
            let (line, rest) = piece.split_at(end);
            piece = match rest {
                [b'\r', b'\n', rest @ ..] | [_, rest @ ..] => rest,
                [] => rest,
            };
            self.after_cr = rest == b"\r";
            if self.line.is_empty() {
                // The usual event: one line, an empty one after it, all in this piece.
                if !self.has_data
                    && let Some(data) = data_of(line)
                    && let [b'\n', rest @ ..] | [b'\r', b'\n', rest @ ..] = piece
                {
                    piece = rest;
                    event(data)?;
                    continue;
                }
                self.line_ends(line, &mut event)?;
            } else {
                self.line.extend_from_slice(line);
                let line = std::mem::take(&mut self.line);
                self.line_ends(&line, &mut event)?;
                self.line = line;
                self.line.clear();
            }
        }
        self.line.extend_from_slice(piece);
        self.within_limit()
    }

    /// Is there nothing of an event that has begun?
    #[must_use]
    pub fn is_between(&self) -> bool {
        self.line.is_empty() && !self.has_data
    }

    fn line_ends(
        &mut self,
        line: &[u8],
        event: &mut impl FnMut(&[u8]) -> Result<(), Garbled>,
    ) -> Result<(), Garbled> {
        if line.is_empty() {
            if self.has_data {
                self.has_data = false;
                let outcome = event(&self.data);
                self.data.clear();
                outcome?;
            }
        } else if let Some(data) = data_of(line) {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            self.data.extend_from_slice(data);
        }
        // Comments, names, ids and unknown fields say nothing to us.
        self.within_limit()
    }

    fn within_limit(&self) -> Result<(), Garbled> {
        if self.line.len() + self.data.len() > MAX_EVENT_BYTES { Err(Garbled) } else { Ok(()) }
    }
}

/// The value of a `data` field.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    let value = line.strip_prefix(b"data")?;
    match value {
        [] => Some(value),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

/// What a completion used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer.
    pub completion_tokens: Option<u32>,
    /// Tokens of the prompt that were found in the cache.
    pub cached_tokens: Option<u32>,
}

/// What an event, or a whole answer, says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Is there text that is not empty? Reasoning and arguments of tool calls count, roles do not.
    pub content: bool,
    /// What was used.
    pub usage: Option<Usage>,
    /// Is it an error?
    pub error: bool,
    /// Is it the end mark?
    pub done: bool,
}

impl Said {
    /// Reads an event's data.
    ///
    /// # Errors
    ///
    /// [`Garbled`] for what is neither a JSON object nor the end mark.
    pub fn of(data: &[u8]) -> Result<Self, Garbled> {
        if data == b"[DONE]" {
            return Ok(Self { done: true, ..Self::default() });
        }
        scan::scan(data).map_or_else(|| Self::by_serde(data), Ok)
    }

    /// [`Said::of`] without the scan: also whole answers.
    ///
    /// # Errors
    ///
    /// [`Garbled`] for what is no JSON object.
    pub fn by_serde(data: &[u8]) -> Result<Self, Garbled> {
        let Ok(Value::Object(object)) = serde_json::from_slice(data) else {
            return Err(Garbled);
        };
        let choices = object.get("choices").and_then(Value::as_array);
        Ok(Self {
            content: choices.is_some_and(|choices| choices.iter().any(has_content)),
            usage: object.get("usage").filter(|usage| usage.is_object()).map(usage),
            error: object.get("error").is_some_and(|error| !error.is_null())
                || object.get("object").and_then(Value::as_str) == Some("error"),
            done: false,
        })
    }
}

/// Members of a delta whose text counts.
const TEXTS: [&str; 3] = ["content", "reasoning_content", "reasoning"];

fn is_text(value: Option<&Value>) -> bool {
    value.and_then(Value::as_str).is_some_and(|text| !text.is_empty())
}

fn has_content(choice: &Value) -> bool {
    let delta = choice.get("delta").or_else(|| choice.get("message"));
    let calls = delta.and_then(|delta| delta.get("tool_calls")).and_then(Value::as_array);
    is_text(choice.get("text"))
        || delta.is_some_and(|delta| TEXTS.iter().any(|name| is_text(delta.get(name))))
        || calls.is_some_and(|calls| {
            calls.iter().any(|call| {
                is_text(call.get("function").and_then(|function| function.get("arguments")))
            })
        })
}

fn usage(usage: &Value) -> Usage {
    let count = |value: Option<&Value>| {
        value.and_then(Value::as_u64).and_then(|count| u32::try_from(count).ok())
    };
    let details = usage.get("prompt_tokens_details");
    Usage {
        prompt_tokens: count(usage.get("prompt_tokens")),
        completion_tokens: count(usage.get("completion_tokens")),
        cached_tokens: count(details.and_then(|details| details.get("cached_tokens"))),
    }
}
