//! The verdicts of Go 1.26's `encoding/json` and of the structs of the Go EPP (llm-d-router v0.10),
//! recorded by running them over the bodies of `go_verdicts.json`.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

use super::{PromptForm, parse, parsed};
use crate::epp::request::json::{MAX_DEPTH, to_string};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Verdict {
    path: String,
    #[serde(default)]
    body: String,
    /// Instead of `body` if that is not UTF-8.
    base64: Option<String>,
    #[serde(default)]
    error: String,
    #[serde(default)]
    model: String,
    #[serde(default)]
    stream: bool,
    max: Option<u64>,
    #[serde(default)]
    salt: String,
    text: Option<String>,
    tokens: Option<Vec<u32>>,
}

#[test]
fn verdicts_are_those_of_go() {
    let verdicts: Vec<Verdict> = serde_json::from_str(include_str!("go_verdicts.json")).unwrap();
    assert!(verdicts.len() > 450);
    let mut wrong = Vec::new();
    for want in verdicts {
        let body = want.base64.map(|text| STANDARD.decode(text).unwrap());
        let body = body.unwrap_or(want.body.into_bytes());
        let shown = format!("{} {:?}", want.path, String::from_utf8_lossy(&body));
        let found = match parse(&want.path, &body) {
            Ok(found) => found,
            Err(error) => {
                if error.to_string() != want.error {
                    wrong.push(format!("{shown}\n  Go   {}\n  here {error}", want.error));
                }
                continue;
            }
        };
        if !want.error.is_empty() {
            wrong.push(format!("{shown}\n  Go   {}\n  here {found:?}", want.error));
            continue;
        }
        let mut text = Vec::new();
        for part in &found.prompt {
            part.visit_text(&body, &mut |piece| text.extend_from_slice(piece));
        }
        // Go joins several strings with spaces.
        let texts = found.prompt.iter().any(|part| part.form == PromptForm::Texts);
        let text_is = texts || want.text.is_none_or(|want| want == to_string(&text));
        let tokens_are = want.tokens.is_none_or(|want| Some(want) == found.token_ids(&body));
        if (&found.model, found.stream) != (&want.model, want.stream)
            || found.max_output_tokens != want.max
            || found.cache_salt.as_deref().unwrap_or_default() != want.salt
            || !text_is
            || !tokens_are
        {
            wrong.push(format!("{shown}\n  here {found:?} {:?}", to_string(&text)));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn brackets_may_be_open_ten_thousand_times() {
    #[track_caller]
    fn check(body: &str, want: Option<&str>) {
        let error = parse("/v1/completions", body.as_bytes()).err().map(|error| error.to_string());
        let want = want.map(|want| format!("error unmarshaling request bodyMap: {want}"));
        assert_eq!(error, want);
    }
    let nested = |open: &str, inner: &str, close: &str, times| {
        let (open, close) = (open.repeat(times), close.repeat(times));
        format!(r#"{{"prompt":"x","a":{open}{inner}{close}}}"#)
    };
    let bracket = Some("invalid character '[' exceeded max depth");
    let brace = Some("invalid character '{' exceeded max depth");
    check(&nested("[", "", "]", MAX_DEPTH - 1), None);
    check(&nested("[", "", "]", MAX_DEPTH), bracket);
    check(&nested(r#"{"a":"#, "1", "}", MAX_DEPTH - 1), None);
    check(&nested(r#"{"a":"#, "1", "}", MAX_DEPTH), brace);
    check(&"[".repeat(MAX_DEPTH), Some("unexpected end of JSON input"));
    check(&"[".repeat(MAX_DEPTH + 1), bracket);
    check(&r#"{"a":"#.repeat(MAX_DEPTH + 1), brace);
}

#[test]
fn contents_in_contents_are_not_followed_without_end() {
    let times = 3000;
    let open = r#"[{"type":"tool_result","content":"#.repeat(times);
    let close = "}]".repeat(times);
    let body = format!(r#"{{"messages":[{{"role":"u","content":{open}"x"{close}}}]}}"#);
    let found = parsed("/v1/messages", &body);
    let mut text = Vec::new();
    found.prompt[0].visit_text(body.as_bytes(), &mut |piece| text.extend_from_slice(piece));
    assert_eq!(text, b"u");
}

#[test]
fn sglang_takes_text_too() {
    // Go wants `input_ids`; SGLang itself does not.
    let found = parsed("/generate", r#"{"text":"hi","sampling_params":{"max_new_tokens":3}}"#);
    assert_eq!((found.prompt[0].form, found.max_output_tokens), (PromptForm::Text, Some(3)));
    let both = parsed("/generate", r#"{"text":"hi","input_ids":[1]}"#);
    assert_eq!(both.prompt[0].form, PromptForm::Tokens);
}

#[test]
fn lists_of_lists_of_token_ids_are_prompts() {
    // Go refuses them; OpenAI and vLLM do not.
    let body = r#"{"prompt":[[1,2],[3]]}"#;
    let found = parsed("/v1/completions", body);
    assert_eq!(found.prompt[0].form, PromptForm::TokenLists);
    assert_eq!(found.token_ids(body.as_bytes()), Some(vec![1, 2, 3]));
    for body in [r#"{"prompt":[[]]}"#, r#"{"prompt":[[1],2]}"#, r#"{"prompt":[["a"]]}"#] {
        assert!(parse("/v1/completions", body.as_bytes()).is_err());
    }
}
