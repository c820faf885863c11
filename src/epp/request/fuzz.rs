//! Properties of request parsing over arbitrary bytes, shared by the fuzz target in `tests/fuzz` and
//! by the replay of its corpus on a stable compiler. For tests only: a broken property panics.

use bytes::Bytes;

use super::{Api, Changes, Parsed, ParserKind, Parsers, Route, estimate_tokens, splice};

/// APIs by the first byte of the fuzzer's data.
const APIS: [&str; 10] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/conversations",
    "/v1/images/generations",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/inference/v1/generate",
    "/generate",
];

/// Reading returns, for the API that the first byte chooses; and what it finds holds together.
///
/// # Panics
///
/// If it does not.
pub fn body_is_total(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else { return };
    // All but the one that takes every path.
    let parsers = Parsers::new(&ParserKind::ALL[..4]);
    let path = APIS[usize::from(*choice) % APIS.len()];
    let route = parsers.route(path).ok();
    assert!(route.is_some(), "{path} is served");
    let Some(route) = route else { return };
    let body = Bytes::copy_from_slice(body);
    match route.read(&body) {
        Ok(parsed) => holds_together(&parsed, &body, route),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn holds_together(parsed: &Parsed, body: &Bytes, route: Route) {
    assert_eq!(parsed.api, route.api);
    if !matches!(parsed.api, Api::CountTokens | Api::Raw) {
        assert!(!parsed.prompt.is_empty(), "a prompt is found or missed");
    }
    for part in &parsed.prompt {
        assert!(body.get(part.span.clone()).is_some_and(|value| !value.is_empty()));
        part.visit_text(body, &mut |piece| assert!(!piece.is_empty()));
    }
    assert_eq!(parsed.prompt_bytes(body).len(), parsed.prompt_len(body));
    let ids = parsed.token_ids(body);

    let mut tokens = vec![7];
    estimate_tokens(parsed, body, &mut tokens, 64);
    assert!(tokens.len() <= 65 && tokens[0] == 7);
    if let Some(ids) = ids {
        assert_eq!(&tokens[1..], &ids[..ids.len().min(64)]);
    }

    let changes = Changes { model: Some("a \"target\""), usage: true };
    let spliced = splice(parsed, body, changes).concat();
    if parsed.api.has_model() {
        let again = route.read(&spliced);
        assert!(again.is_ok(), "a spliced body is read as before: {again:?}");
        let Ok(again) = again else { return };
        assert_eq!(again.model, "a \"target\"");
        assert_eq!(again.usage_edit, None, "asked for once");
        assert_eq!(again.prompt.len(), parsed.prompt.len());
        assert_eq!(again.prompt_bytes(&spliced), parsed.prompt_bytes(body));
        assert_eq!(
            (again.stream, again.max_output_tokens),
            (parsed.stream, parsed.max_output_tokens)
        );
    } else {
        assert_eq!(&spliced, body);
    }
}
