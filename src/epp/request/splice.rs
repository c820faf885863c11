//! Another model name, or the demand for a stream's usage, in a body that stays as it is.

use std::ops::Range;

use bytes::Bytes;
use smallvec::SmallVec;

use super::Parsed;

/// What changes in a body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes<'a> {
    /// The model to ask for.
    pub model: Option<&'a str>,
    /// A stream is to report its tokens; see [`Parsed::usage_edit`].
    pub usage: bool,
}

/// A body with these changes: slices of `body` and what stands between them. Not a byte of the slices
/// changes, so that the order of keys, numbers beyond 2⁵³ and escapes reach the pod as the client wrote
/// them (Go decodes and re-encodes: sorted keys, `\u003c`, digits lost).
///
/// - Of several `model` keys the last is replaced: the one that Go and the engines read.
/// - A `model` that is no string is replaced, too.
/// - A body without `model` gets one as its first key, as Go would add it.
/// - The model of a body that is not read (see [`Api::has_model`](super::Api::has_model)), or is no
///   object, stays as it is.
#[must_use]
pub fn splice(parsed: &Parsed, body: &Bytes, changes: Changes<'_>) -> SmallVec<[Bytes; 3]> {
    let model = changes.model.and_then(|target| model_edit(parsed, body, target));
    let usage = parsed.usage_edit.as_ref().filter(|_| changes.usage);
    let usage = usage.map(|edit| (edit.span.clone(), Bytes::from_static(edit.text.as_bytes())));
    let mut edits: SmallVec<[_; 2]> = model.into_iter().chain(usage).collect();
    // The model goes first where both are put at one place.
    edits.sort_by_key(|(span, _)| span.start);
    let mut parts = SmallVec::new();
    let mut at = 0;
    for (span, text) in edits {
        // Spans are the body's own, unless somebody gives another body.
        if span.start < at || span.end < span.start || span.end > body.len() {
            continue;
        }
        parts.push(body.slice(at..span.start));
        parts.push(text);
        at = span.end;
    }
    parts.push(body.slice(at..));
    parts
}

fn model_edit(parsed: &Parsed, body: &Bytes, target: &str) -> Option<(Range<usize>, Bytes)> {
    if !parsed.api.has_model() {
        return None;
    }
    let name = serde_json::Value::from(target).to_string();
    if let Some(span) = &parsed.model_span {
        return Some((span.clone(), name.into()));
    }
    let brace = body.iter().position(|byte| !byte.is_ascii_whitespace())?;
    if body.get(brace) != Some(&b'{') {
        return None;
    }
    let start = brace + 1;
    let next = body.iter().skip(start).find(|byte| !byte.is_ascii_whitespace());
    let comma = if next == Some(&b'}') { "" } else { "," };
    Some((start..start, format!("\"model\":{name}{comma}").into()))
}
