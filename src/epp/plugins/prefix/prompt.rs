//! The bytes of a prompt, in the order in which they count.

use std::ops::Range;

use super::hashing::BlockHasher;
use crate::epp::{
    request::{InferenceRequest, PromptForm},
    scheduling::Produced,
};

/// Bytes of text that are taken for a token, as in the Go EPP.
pub(in crate::epp::plugins) const BYTES_PER_TOKEN: usize = 4;

/// What goes into the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Tokens: real ones if there are any, else four bytes of tools and prompt for each.
    Tokens,
    /// The bytes of the prompt.
    Bytes,
}

/// Feeds the prompts of a request to a hasher.
pub(super) fn hash(
    request: &InferenceRequest,
    produced: &Produced,
    content: Content,
    hasher: &mut BlockHasher,
) {
    if let (Content::Tokens, Some(tokens)) = (content, &produced.tokens) {
        hasher.expect(tokens.len() * BYTES_PER_TOKEN);
        hasher.push(bytemuck::cast_slice(tokens));
        hasher.end();
        return;
    }
    hasher.expect(request.parsed.prompt.iter().map(|prompt| prompt.span.len()).sum());
    if let (Content::Tokens, Some(tools)) = (content, &request.parsed.tools) {
        hasher.push(slice(request, tools));
    }
    for prompt in &request.parsed.prompt {
        let value = slice(request, &prompt.span);
        match prompt.form {
            PromptForm::Text => hasher.push(unquoted(value)),
            PromptForm::Messages | PromptForm::Blocks | PromptForm::Json => hasher.push(value),
            PromptForm::Texts => strings(value, |text| {
                hasher.push(text);
                hasher.end();
            }),
            PromptForm::Tokens | PromptForm::TokenLists => integers(value, |token| match token {
                Some(token) => hasher.push(&token.to_le_bytes()),
                None => hasher.end(),
            }),
        }
    }
    hasher.end();
}

/// Tokens of the prompts of a request: real ones if known, else estimated.
pub(in crate::epp::plugins) fn input_tokens(
    request: &InferenceRequest,
    produced: &Produced,
) -> u64 {
    if let Some(tokens) = &produced.tokens {
        return tokens.len() as u64;
    }
    let mut tokens = 0;
    let mut bytes = request.parsed.tools.as_ref().map_or(0, Range::len);
    for prompt in &request.parsed.prompt {
        let value = slice(request, &prompt.span);
        match prompt.form {
            PromptForm::Tokens | PromptForm::TokenLists => {
                integers(value, |token| tokens += u64::from(token.is_some()));
            }
            PromptForm::Text
            | PromptForm::Texts
            | PromptForm::Messages
            | PromptForm::Blocks
            | PromptForm::Json => {
                bytes += unquoted(value).len();
            }
        }
    }
    tokens + bytes.div_ceil(BYTES_PER_TOKEN) as u64
}

fn slice<'a>(request: &'a InferenceRequest, span: &Range<usize>) -> &'a [u8] {
    request.body.get(span.clone()).unwrap_or_default()
}

/// A JSON string without its quotes. Escapes stay: equal prompts of one client are escaped equally.
fn unquoted(value: &[u8]) -> &[u8] {
    match value {
        [b'"', inner @ .., b'"'] => inner,
        other => other,
    }
}

/// The strings of a JSON list of strings.
fn strings(list: &[u8], mut each: impl FnMut(&[u8])) {
    let mut rest = list;
    while let Some(open) = memchr::memchr(b'"', rest) {
        rest = &rest[open + 1..];
        let mut end = 0;
        while let Some(at) = memchr::memchr2(b'"', b'\\', &rest[end..]) {
            end += at;
            if rest[end] == b'"' {
                break;
            }
            // A backslash and what it escapes.
            end = (end + 2).min(rest.len());
        }
        let end = end.min(rest.len());
        each(&rest[..end]);
        rest = rest.get(end + 1..).unwrap_or_default();
    }
}

/// The integers of a JSON list of integers, or of lists of such; `None` ends a list.
fn integers(list: &[u8], mut each: impl FnMut(Option<u32>)) {
    let mut number: Option<u32> = None;
    for &byte in list {
        if byte.is_ascii_digit() {
            let digit = u32::from(byte - b'0');
            number = Some(number.unwrap_or(0).wrapping_mul(10).wrapping_add(digit));
            continue;
        }
        if number.is_some() {
            each(number.take());
        }
        if byte == b']' {
            each(None);
        }
    }
}
