//! The bytes of a prompt, in the order in which they count.

use std::ops::Range;

use super::hashing::BlockHasher;
use crate::epp::{
    request::{Api, InferenceRequest, PromptForm, PromptSpan, estimate_tokens},
    scheduling::Produced,
};

/// Bytes of text that are taken for a token, as in the Go EPP.
pub(in crate::epp::plugins) const BYTES_PER_TOKEN: usize = 4;

/// What goes into the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Tokens: real ones if there are any, else four bytes of tools and text for each.
    Tokens,
    /// The bytes of the prompt: the text of a string, the JSON of anything else.
    Bytes,
}

/// Feeds the prompts of a request to a hasher. A prompt of several texts, or lists of tokens, is as
/// many prompts.
pub(super) fn hash(
    request: &InferenceRequest,
    produced: &Produced,
    content: Content,
    hasher: &mut BlockHasher,
) {
    let parsed = &request.parsed;
    if content == Content::Tokens {
        if let Some(tokens) = &produced.tokens {
            return tokens.prompts.iter().for_each(|prompt| hash_tokens(&prompt.ids, hasher));
        }
        if parsed.multimodal {
            // Pictures count as their tokens, not as the bytes of their data.
            let mut tokens = Vec::new();
            estimate_tokens(parsed, &request.body, &mut tokens, hasher.room() / BYTES_PER_TOKEN);
            return hash_tokens(&tokens, hasher);
        }
    }
    let raw = content == Content::Bytes || items(request);
    hasher.expect(parsed.prompt.iter().map(|part| part.span.len()).sum());
    let tools = parsed.tools.as_ref().filter(|_| content == Content::Tokens);
    hasher.push(tools.map_or(&[], |tools| slice(request, tools)));
    for part in &parsed.prompt {
        let value = slice(request, &part.span);
        match part.form {
            PromptForm::Tokens | PromptForm::TokenLists => integers(value, |token| match token {
                Some(token) => hasher.push(&token.to_le_bytes()),
                None => hasher.end(),
            }),
            PromptForm::Texts => strings(value, |string| {
                let span = part.span.start + string.start..part.span.start + string.end;
                let text = PromptSpan { form: PromptForm::Text, span };
                text.visit_text(&request.body, &mut |piece| hasher.push(piece));
                hasher.end();
            }),
            PromptForm::Text => part.visit_text(&request.body, &mut |piece| hasher.push(piece)),
            _ if raw => hasher.push(value),
            _ => part.visit_text(&request.body, &mut |piece| hasher.push(piece)),
        }
    }
    hasher.end();
}

fn hash_tokens(tokens: &[u32], hasher: &mut BlockHasher) {
    hasher.expect(tokens.len() * BYTES_PER_TOKEN);
    hasher.push(bytemuck::cast_slice(tokens));
    hasher.end();
}

/// Tokens of the prompts of a request: real ones if known, else estimated, once for all who ask.
pub(in crate::epp::plugins) fn input_tokens(
    request: &InferenceRequest,
    produced: &Produced,
) -> u64 {
    match &produced.tokens {
        Some(tokens) => tokens.count(),
        None => produced.estimated_tokens(|| estimated(request)),
    }
}

fn estimated(request: &InferenceRequest) -> u64 {
    let parsed = &request.parsed;
    if parsed.multimodal {
        let mut tokens = Vec::new();
        estimate_tokens(parsed, &request.body, &mut tokens, usize::MAX);
        return tokens.len() as u64;
    }
    let mut tokens = 0;
    let mut bytes = parsed.tools.as_ref().map_or(0, Range::len);
    for part in &parsed.prompt {
        match part.form {
            PromptForm::Tokens | PromptForm::TokenLists => {
                let value = slice(request, &part.span);
                integers(value, |token| tokens += u64::from(token.is_some()));
            }
            _ if items(request) => bytes += part.span.len(),
            _ => part.visit_text(&request.body, &mut |piece| bytes += piece.len()),
        }
    }
    tokens + bytes.div_ceil(BYTES_PER_TOKEN) as u64
}

/// Is the prompt a list of items, whose calls and results are no text? Their JSON counts.
fn items(request: &InferenceRequest) -> bool {
    matches!(request.parsed.api, Api::Responses | Api::Conversations)
}

fn slice<'a>(request: &'a InferenceRequest, span: &Range<usize>) -> &'a [u8] {
    request.body.get(span.clone()).unwrap_or_default()
}

/// The places of the strings of a JSON list of strings, quotes included.
fn strings(list: &[u8], mut each: impl FnMut(Range<usize>)) {
    let mut at = 0;
    let find = |at: usize| {
        let rest = list.get(at..)?;
        memchr::memchr2(b'"', b'\\', rest).map(|found| at + found)
    };
    while let Some(open) = find(at) {
        let mut close = open + 1;
        while let Some(found) = find(close) {
            close = found;
            if list[close] == b'"' {
                break;
            }
            // A backslash and what it escapes.
            close += 2;
        }
        at = close + 1;
        each(open..at.min(list.len()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::plugins::prefix::{Chains, testing::request};

    /// The chains of a prompt, in blocks of one byte, so that equal chains are equal bytes.
    fn chains(form: PromptForm, prompt: &str, content: Content) -> Chains {
        let mut hasher = BlockHasher::new("m", "", 1, usize::MAX, true);
        hash(&request(form, prompt), &Produced::new(), content, &mut hasher);
        hasher.finish()
    }

    #[track_caller]
    fn check(form: PromptForm, prompt: &str, content: Content, want: &[&[u8]]) {
        let mut hasher = BlockHasher::new("m", "", 1, usize::MAX, true);
        for text in want {
            hasher.push(text);
            hasher.end();
        }
        assert_eq!(chains(form, prompt, content), hasher.finish(), "{prompt}");
    }

    #[test]
    fn text_is_hashed_without_its_escapes() {
        for content in [Content::Tokens, Content::Bytes] {
            check(PromptForm::Text, r#""a\n\u00e9""#, content, &["a\né".as_bytes()]);
            let texts = r#"["a\"]", "", "b\\","c"]"#;
            check(PromptForm::Texts, texts, content, &[b"a\"]", b"b\\", b"c"]);
            let tokens: Vec<u8> = [7_u32, 300].iter().flat_map(|id| id.to_le_bytes()).collect();
            check(PromptForm::Tokens, "[7, 300]", content, &[&tokens]);
            let lists = "[[7],[300]]";
            check(PromptForm::TokenLists, lists, content, &[&tokens[..4], &tokens[4..]]);
        }
        let messages = r#"[{"role":"user","content":"a\tb"},{"role":"x","content":"c"}]"#;
        check(PromptForm::Messages, messages, Content::Tokens, &[b"usera\tbxc"]);
        check(PromptForm::Messages, messages, Content::Bytes, &[messages.as_bytes()]);
    }

    #[test]
    fn spans_of_other_bodies_are_nothing() {
        for form in [PromptForm::Text, PromptForm::Texts, PromptForm::Tokens, PromptForm::Messages]
        {
            for content in [Content::Tokens, Content::Bytes] {
                let mut request = request(form, "\"a\"");
                request.parsed.prompt[0].span = 100..200;
                let mut hasher = BlockHasher::new("m", "", 1, usize::MAX, true);
                hash(&request, &Produced::new(), content, &mut hasher);
                assert_eq!(hasher.finish().total(), 0);
                assert_eq!(input_tokens(&request, &Produced::new()), 0);
            }
            for cut in ["[\"a", "[\"a\\", "[\"", "[1,2", "]]1", ""] {
                chains(form, cut, Content::Tokens);
            }
        }
    }

    #[test]
    fn pictures_count_as_tokens() {
        let picture = format!(
            r#"[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"{}"}}}}]}}]"#,
            "x".repeat(100_000)
        );
        let mut request = request(PromptForm::Messages, &picture);
        request.parsed.api = Api::ChatCompletions;
        request.parsed.multimodal = true;
        let tokens = input_tokens(&request, &Produced::new());
        assert!((200..300).contains(&tokens), "{tokens}");
        let mut hasher = BlockHasher::new("m", "", 256, usize::MAX, true);
        hash(&request, &Produced::new(), Content::Tokens, &mut hasher);
        assert_eq!(hasher.finish().total() as u64, tokens.div_ceil(64));
    }
}
