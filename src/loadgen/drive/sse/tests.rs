use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// The events of a stream that comes in these pieces.
fn events<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Vec<u8>>, Garbled> {
    let (mut parser, mut found) = (Events::default(), Vec::new());
    for piece in pieces {
        parser.feed(piece, |event| {
            found.push(event.to_owned());
            Ok(())
        })?;
    }
    Ok(found)
}

#[test]
fn events_are_cut_wherever_the_stream_is() {
    #[track_caller]
    fn check(stream: &str, expected: &[&str]) {
        let stream = stream.as_bytes();
        let expected: Vec<Vec<u8>> = expected.iter().map(|event| event.as_bytes().into()).collect();
        assert_eq!(events([stream]).unwrap(), expected, "in one piece");
        assert_eq!(events(stream.chunks(1)).unwrap(), expected, "byte by byte");
        for cut in 0..stream.len() {
            let (a, b) = stream.split_at(cut);
            assert_eq!(events([a, b]).unwrap(), expected, "cut at {cut}");
        }
    }
    check("data: a\n\ndata: b\n\n", &["a", "b"]);
    check("data:a\r\n\r\ndata:  b\r\n\r\n", &["a", " b"]);
    check("data: a\r\rdata: b\r\r", &["a", "b"]);
    check("data: a\ndata: b\n\n", &["a\nb"]);
    check("data\ndata\n\n", &["\n"]);
    check(": ping\n\nevent: x\nid: 1\ndata: a\nretry: 5\n\n", &["a"]);
    check("database: no\n\n\n\ndata: a\n\n", &["a"]);
    check("data: whole\n\ndata: half", &["whole"]);
    check("data: whole\n\ndata: line\n", &["whole"]);
    check("", &[]);
}

#[test]
fn events_are_bounded() {
    let long = vec![b'x'; MAX_EVENT_BYTES / 2];
    assert_eq!(events([&b"data: "[..], &long, b"\n\n"]).unwrap().len(), 1);
    assert_eq!(events([&b"data: "[..], &long, &long]), Err(Garbled));
    assert_eq!(events([&b"data: "[..], &long, b"\ndata: ", &long, b"\n"]), Err(Garbled));
}

#[test]
fn an_event_says() {
    #[track_caller]
    fn check(event: &str, expected: Result<Said, Garbled>) {
        assert_eq!(Said::of(event.as_bytes()), expected);
        if event != "[DONE]" {
            assert_eq!(Said::by_serde(event.as_bytes()), expected, "by serde_json");
        }
    }
    let nothing = Said::default();
    let content = Said { content: true, ..nothing };
    check(r#"{"choices":[{"index":0,"text":"a"}]}"#, Ok(content));
    check(r#"{"choices":[{"index":0,"text":"\""}]}"#, Ok(content));
    check(r#"{"choices":[{"text":"","finish_reason":"stop"}]}"#, Ok(nothing));
    check(r#"{"id":"\"choices\":[{\"text\":\"a\"}]"}"#, Ok(nothing));
    check(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#, Ok(nothing));
    check(r#"{"choices":[{"delta":{"role":"assistant"}}]}"#, Ok(nothing));
    check(r#"{"choices":[{"delta":{"content":null,"reasoning_content":"a"}}]}"#, Ok(content));
    check(r#"{"choices":[{"delta":{"reasoning":"a"}}]}"#, Ok(content));
    check(
        r#"{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{"}}]}}]}"#,
        Ok(content),
    );
    check(r#"{"choices":[{"delta":{"tool_calls":[{"function":{"name":"f"}}]}}]}"#, Ok(nothing));
    check(r#"{"choices":[{"message":{"content":"whole"}}]}"#, Ok(content));
    check(r#"{"choices":[],"usage":null}"#, Ok(nothing));
    check(r#"{"error":{"message":"no","code":500}}"#, Ok(Said { error: true, ..nothing }));
    check(r#"{"object":"error","message":"no"}"#, Ok(Said { error: true, ..nothing }));
    check(r#"{"error":null}"#, Ok(nothing));
    let usage =
        Usage { prompt_tokens: Some(70), completion_tokens: Some(16), cached_tokens: Some(64) };
    check(
        r#"{"choices":[],"usage":{"prompt_tokens":70,"total_tokens":86,"completion_tokens":16,"prompt_tokens_details":{"cached_tokens":64}}}"#,
        Ok(Said { usage: Some(usage), ..nothing }),
    );
    check(
        r#"{"usage":{"prompt_tokens":70,"completion_tokens":16,"prompt_tokens_details":null}}"#,
        Ok(Said { usage: Some(Usage { cached_tokens: None, ..usage }), ..nothing }),
    );
    check("[DONE]", Ok(Said { done: true, ..nothing }));
    for garbled in
        ["", "hello", "5", "[]", "{", r#"{"choices":[{"text":"a"#, r#"{"a":1}}"#, "{\"a\" 1}"]
    {
        check(garbled, Err(Garbled));
    }
}

/// Any JSON, small.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_u32..2000).prop_map(Value::from),
        (-1e9..1e9_f64).prop_map(Value::from),
        text(),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((name(), inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn text() -> impl Strategy<Value = Value> {
    prop_oneof![Just(String::new()), "\\PC{0,6}", "[\"\\\\{}\\[\\]:,a\n]{0,8}"]
        .prop_map(Value::from)
}

/// Names that matter, and others.
fn name() -> impl Strategy<Value = String> {
    const KNOWN: [&str; 18] = [
        "choices",
        "usage",
        "error",
        "object",
        "text",
        "delta",
        "message",
        "content",
        "reasoning",
        "reasoning_content",
        "tool_calls",
        "function",
        "arguments",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "prompt_tokens_details",
        "id",
    ];
    prop_oneof![4 => prop::sample::select(&KNOWN[..]).prop_map(str::to_owned), 1 => "[a\"\\\\]{0,3}"]
}

fn object(of: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    prop::collection::vec((name(), of), 0..5)
        .prop_map(|members| Value::Object(members.into_iter().collect()))
}

/// Events that look like completions', more or less.
fn event() -> impl Strategy<Value = Value> {
    let delta = prop_oneof![object(text()), object(value())];
    let choice =
        (prop_oneof![text(), value()], delta, any::<u8>()).prop_map(|(text, delta, which)| {
            match which % 4 {
                0 => json!({"index": 0, "text": text, "logprobs": null}),
                1 => json!({"index": 0, "delta": delta, "finish_reason": null}),
                2 => json!({"message": delta, "text": text}),
                _ => delta,
            }
        });
    let usage = prop_oneof![
        Just(Value::Null),
        object(value()),
        (0_u64..5_000_000_000, 0_u32..99, value()).prop_map(|(prompt, made, details)| {
            json!({"prompt_tokens": prompt, "completion_tokens": made,
                   "prompt_tokens_details": {"cached_tokens": made, "audio": details}})
        }),
    ];
    prop_oneof![
        (prop::collection::vec(choice, 0..3), usage, value()).prop_map(
            |(choices, usage, other)| {
                json!({"id": "cmpl-1", "object": "text_completion", "x": other,
                   "choices": choices, "usage": usage})
            }
        ),
        object(value()),
        value(),
    ]
}

proptest! {
    #[test]
    fn the_scan_agrees_with_serde_json(event in event(), pretty in any::<bool>()) {
        let data = if pretty {
            serde_json::to_vec_pretty(&event).unwrap()
        } else {
            serde_json::to_vec(&event).unwrap()
        };
        prop_assert_eq!(Said::of(&data), Said::by_serde(&data));
        // A part of it is never taken for the whole.
        let part = &data[..data.len() - 1];
        prop_assert!(scan::scan(part).is_none());
    }

    #[test]
    fn nothing_panics(data in prop::collection::vec(any::<u8>(), 0..200), cut in any::<prop::sample::Index>()) {
        let _said = Said::of(&data);
        let (a, b) = data.split_at(cut.index(data.len() + 1));
        prop_assert_eq!(events([a, b]), events([&data[..]]));
    }

    #[test]
    fn random_cuts_change_nothing(
        list in prop::collection::vec(event(), 1..5),
        ends in prop::sample::select(vec!["\n", "\r\n", "\r"]),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let list: Vec<String> = list.iter().map(Value::to_string).collect();
        let stream: String = list.iter().map(|data| format!("data: {data}{ends}{ends}")).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len())).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|cut| &stream.as_bytes()[cut[0]..cut[1]]);
        let found = events(pieces).unwrap();
        let expected: Vec<Vec<u8>> = list.into_iter().map(String::into_bytes).collect();
        prop_assert_eq!(found, expected);
    }
}
