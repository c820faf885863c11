//! Another model name in a body that stays as it is.

use bytes::Bytes;

use super::Parsed;

/// A body with another model: what is before its name, the name, what is after it. The outer parts
/// are slices of `body`; not a byte of them changes, so that the order of keys, numbers beyond 2⁵³
/// and escapes reach the pod as the client wrote them (Go decodes and re-encodes: sorted keys,
/// `\u003c`, digits lost).
///
/// - Of several `model` keys the last is replaced: the one that Go and the engines read.
/// - A `model` that is no string is replaced, too.
/// - A body without `model` gets one as its first key, as Go would add it.
/// - A body that is not read (see [`Api::has_model`](super::Api::has_model)), or is no object, stays
///   as it is.
#[must_use]
pub fn splice_model(parsed: &Parsed, body: &Bytes, target: &str) -> [Bytes; 3] {
    let unchanged = || [body.clone(), Bytes::new(), Bytes::new()];
    if !parsed.api.has_model() {
        return unchanged();
    }
    let name = serde_json::Value::from(target).to_string();
    let (before, name, after) = match &parsed.model_span {
        Some(span) => (span.start, name, span.end),
        None => {
            let Some(brace) = body.iter().position(|byte| !byte.is_ascii_whitespace()) else {
                return unchanged();
            };
            if body.get(brace) != Some(&b'{') {
                return unchanged();
            }
            let start = brace + 1;
            let next = body.iter().skip(start).find(|byte| !byte.is_ascii_whitespace());
            let comma = if next == Some(&b'}') { "" } else { "," };
            (start, format!("\"model\":{name}{comma}"), start)
        }
    };
    if before > after || after > body.len() {
        return unchanged();
    }
    [body.slice(..before), Bytes::from(name), body.slice(after..)]
}
