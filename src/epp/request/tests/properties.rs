//! What holds for every document, compared with another JSON reader.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{fuzz, parse, parsed};
use crate::epp::request::json::{Scanner, to_string, unescape};

/// Is it JSON by our scanner?
fn scans(body: &[u8]) -> bool {
    let mut scanner = Scanner::new(body);
    scanner.value().is_ok() && scanner.finish().is_ok()
}

/// Is it JSON by serde's, which unlike Go's minds UTF-8?
fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok()
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u32>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((text(), inner), 0..6)
                .prop_map(|pairs| Value::from(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// Text with all that a scanner may stumble over.
fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z ]{0,40}", "[\"\\\\/\u{0}-\u{20}a\u{7f}-\u{a0}é€😀]{0,20}", any::<String>(),]
}

/// A body with all the fields of interest, in any order, among others.
fn body() -> impl Strategy<Value = Vec<(String, Value)>> {
    let field = prop_oneof![
        text().prop_map(|text| ("model".to_owned(), Value::from(text))),
        any::<bool>().prop_map(|stream| ("stream".to_owned(), Value::from(stream))),
        any::<u32>().prop_map(|limit| ("max_tokens".to_owned(), Value::from(limit))),
        "[^\u{0}]{1,9}".prop_map(|text| ("prompt".to_owned(), Value::from(text))),
        text().prop_map(|text| ("cache_salt".to_owned(), Value::from(text))),
        ("[0-9 é\"\\\\]{1,9}", value()),
    ];
    prop::collection::vec(field, 0..8)
}

/// As a JSON object, with repeated keys; escaped to ASCII if wanted.
fn written(fields: &[(String, Value)], pretty: bool, ascii: bool) -> String {
    let space = if pretty { " \n" } else { "" };
    let fields: Vec<String> = fields
        .iter()
        .map(|(key, value)| {
            let value = match pretty {
                true => serde_json::to_string_pretty(value).unwrap(),
                false => value.to_string(),
            };
            format!("{space}{}{space}:{space}{value}{space}", json!(key))
        })
        .collect();
    let text = format!("{{{space}{}{space}}}", fields.join(","));
    if !ascii {
        return text;
    }
    let escape = |c: char| match c.is_ascii() {
        true => c.to_string(),
        false => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    text.chars().map(escape).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn documents_scan(value in value(), pretty: bool) {
        let text = match pretty {
            true => serde_json::to_string_pretty(&value).unwrap(),
            false => value.to_string(),
        };
        prop_assert!(scans(text.as_bytes()), "{text}");
    }

    /// A document with one byte changed is JSON for both or for none.
    #[test]
    fn broken_documents_are_found_out(value in value(), at: prop::sample::Index, byte in "[\\x00-\\x7f]") {
        let mut text = value.to_string().into_bytes();
        let at = at.index(text.len());
        text[at] = byte.as_bytes()[0];
        if std::str::from_utf8(&text).is_ok() {
            // serde refuses lone surrogates, and numbers no float64 holds.
            let lone = text.windows(3).any(|w| w.starts_with(b"\\u") && matches!(w[2], b'd' | b'D'));
            if !lone {
                prop_assert_eq!(scans(&text), is_json(&text), "{}", String::from_utf8_lossy(&text));
            }
        }
    }

    #[test]
    fn fields_are_found(fields in body(), pretty: bool, ascii: bool) {
        let text = written(&fields, pretty, ascii);
        let want: Value = serde_json::from_str(&text).unwrap();
        let found = match parse("/v1/completions", text.as_bytes()) {
            Ok(found) => found,
            Err(error) => {
                prop_assert!(want.get("prompt").is_none(), "{error}: {text}");
                return Ok(());
            }
        };
        let prompt = to_string(&found.prompt_bytes(text.as_bytes()));
        prop_assert_eq!(Some(prompt.as_str()), want["prompt"].as_str());
        prop_assert_eq!(found.model.as_str(), want["model"].as_str().unwrap_or_default());
        prop_assert_eq!(found.stream, want["stream"] == json!(true));
        prop_assert_eq!(found.max_output_tokens, want["max_tokens"].as_u64());
        prop_assert_eq!(found.cache_salt.as_deref().unwrap_or_default(), want["cache_salt"].as_str().unwrap_or_default());
    }

    #[test]
    fn messages_read_in_order(messages in prop::collection::vec((text(), text(), any::<bool>()), 1..6)) {
        let list: Vec<Value> = messages
            .iter()
            .map(|(role, content, parts)| match parts {
                true => json!({"role": role, "content": [{"type": "text", "text": content}]}),
                false => json!({"role": role, "content": content}),
            })
            .collect();
        let body = json!({"messages": list}).to_string();
        let mut got = Vec::new();
        let found = parsed("/v1/chat/completions", &body);
        found.prompt[0].visit_text(body.as_bytes(), &mut |piece| got.extend_from_slice(piece));
        let want: String = messages.iter().flat_map(|(role, content, _)| [role.as_str(), content]).collect();
        prop_assert_eq!(to_string(&got), want);
    }

    #[test]
    fn strings_unescape_as_elsewhere(text in text()) {
        let quoted = json!(text).to_string();
        let mut got = Vec::new();
        unescape(&quoted.as_bytes()[1..quoted.len() - 1], |piece| got.extend_from_slice(piece));
        prop_assert_eq!(to_string(&got), text);
    }

    /// The search for the end of a string, at every alignment and length.
    #[test]
    fn strings_end_where_they_end(before in "[^\"\\\\\u{0}-\u{1f}]{0,80}", after in "[a\"\\\\ ]{0,20}") {
        let body = format!("{before}\"{after}");
        let quoted = format!("\"{body}");
        let mut scanner = Scanner::new(quoted.as_bytes());
        prop_assert_eq!(scanner.text().unwrap().span, 1..1 + before.len());
    }

    #[test]
    fn any_bytes_hold(data in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz::body_is_total(&data);
    }

    #[test]
    fn any_brackets_hold(choice: u8, text in "[\\[\\]{}\",:\\\\a0-9 e.tu-]{0,60}") {
        fuzz::body_is_total(&[&[choice], text.as_bytes()].concat());
    }

    /// Fields of one API in a body of another, with values of any kind.
    #[test]
    fn any_fields_hold(choice: u8, fields in prop::collection::vec((NAMES, value()), 0..6)) {
        let fields: Vec<(String, Value)> = fields;
        let text = written(&fields, false, false);
        fuzz::body_is_total(&[&[choice], text.as_bytes()].concat());
    }
}

const NAMES: &str = "model|prompt|messages|input|items|system|tools|instructions|token_ids|input_ids|text|content|role|type|cache_salt|sampling_params|stream|Prompt";

#[test]
fn a_huge_string_is_one_string() {
    let text = "x".repeat(4 << 20);
    let body = format!(r#"{{"prompt":"{text}","model":"m"}}"#);
    let found = parsed("/v1/completions", &body);
    assert_eq!((found.model.as_str(), found.prompt_len(body.as_bytes())), ("m", text.len()));
}
