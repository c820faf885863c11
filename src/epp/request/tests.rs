//! Bodies and what is found in them.

use bytes::Bytes;

use super::{
    Api, Changes, ParseError, Parsed, ParserKind, Parsers, PromptForm, Route, estimate_tokens,
    fuzz, request_path, splice,
};
use crate::epp::ext_proc::headers::HeaderList;

mod go;
mod prompts;
mod properties;

/// All parsers that are built, but for the one that takes the rest.
const ALL: [ParserKind; 4] =
    [ParserKind::OpenAi, ParserKind::Anthropic, ParserKind::VllmHttp, ParserKind::SglangHttp];

fn headers(path: &str) -> HeaderList {
    HeaderList::from_pairs([(":path".to_owned(), Bytes::copy_from_slice(path.as_bytes()))])
}

/// Reads a body as the API of a path.
fn parse(path: &str, body: &[u8]) -> Result<Parsed, ParseError> {
    Parsers::new(&ALL).parse(&headers(path), body)
}

#[track_caller]
fn parsed(path: &str, body: &str) -> Parsed {
    parse(path, body.as_bytes()).unwrap()
}

#[test]
fn paths_lead_to_apis() {
    #[track_caller]
    fn check(parsers: &[ParserKind], path: &str, want: Result<(ParserKind, Api), &str>) {
        let route = Parsers::new(parsers).route(path).map_err(|error| error.to_string());
        let want = want.map(|(parser, api)| Route { parser, api }).map_err(str::to_owned);
        assert_eq!(route, want, "{path}");
    }
    use Api::{
        ChatCompletions, Completions, Conversations, CountTokens, Embeddings, Generate, Images,
        Messages, Raw, Responses, SglangGenerate,
    };
    use ParserKind::{Anthropic, OpenAi, Passthrough, SglangHttp, VllmHttp};
    let default = super::DEFAULT_PARSERS.as_slice();
    assert_eq!(Parsers::new(default), Parsers::default());
    for (path, parser, api) in [
        ("/v1/completions", OpenAi, Completions),
        ("completions", OpenAi, Completions),
        ("/v1/completions/", OpenAi, Completions),
        ("/v1/completions?stream=true&x=/embeddings", OpenAi, Completions),
        ("/v1/completions/render", OpenAi, Completions),
        ("/v1/chat/completions", OpenAi, ChatCompletions),
        ("/v1/projects/p/locations/l/chat/completions", OpenAi, ChatCompletions),
        ("/v1/chat/completions/render", OpenAi, ChatCompletions),
        ("/v1/embeddings", OpenAi, Embeddings),
        ("/v1/responses", OpenAi, Responses),
        ("/v1/conversations", OpenAi, Conversations),
        ("/v1/images/generations", OpenAi, Images),
        ("/v1/messages", Anthropic, Messages),
        ("/v1/messages/count_tokens", Anthropic, CountTokens),
        ("/inference/v1/generate", VllmHttp, Generate),
        ("/generate", Passthrough, Raw),
        ("/v1/foo", Passthrough, Raw),
        ("/v1/mycompletions", Passthrough, Raw),
        ("/v1/completions/x", Passthrough, Raw),
        ("/", Passthrough, Raw),
        ("", Passthrough, Raw),
    ] {
        check(default, path, Ok((parser, api)));
    }
    check(&ALL, "/generate", Ok((SglangHttp, SglangGenerate)));
    check(&ALL, "/generate/", Ok((SglangHttp, SglangGenerate)));
    // The longest end wins, whatever the order.
    check(&[SglangHttp, VllmHttp], "/inference/v1/generate", Ok((VllmHttp, Generate)));
    check(
        &[Anthropic],
        "/v1/completions",
        Err("no parser registered matching path suffix for: /v1/completions"),
    );
    check(&ALL, "/v1/foo?a=b", Err("no parser registered matching path suffix for: /v1/foo"));
    check(
        &[],
        "/v1/completions",
        Err("no parser registered matching path suffix for: /v1/completions"),
    );
    check(&ALL, "/v1/generate", Err("unsupported path: /v1/generate"));
    check(&ALL, "/inference/v1/generate/", Err("unsupported path: /inference/v1/generate/"));
    check(&ALL, "/v1/messages/", Err("unsupported API endpoint: /v1/messages/"));
    // Nothing counts after the parser that takes the rest, or a second time.
    check(&[Passthrough, OpenAi], "/v1/completions", Ok((Passthrough, Raw)));
    check(&[OpenAi, OpenAi], "/v1/completions", Ok((OpenAi, Completions)));
}

#[test]
fn parsers_are_found_by_their_types() {
    for kind in ParserKind::ALL {
        assert_eq!(ParserKind::of_type(kind.type_name()), Some(kind));
    }
    for name in ["queue-scorer", "vllmgrpc-parser", "vertexai-parser", ""] {
        assert_eq!(ParserKind::of_type(name), None, "{name}");
    }
}

#[test]
fn the_path_is_found_in_the_headers() {
    #[track_caller]
    fn check(pairs: &[(&str, &str)], want: &str) {
        let pairs = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), Bytes::copy_from_slice(value.as_bytes())));
        assert_eq!(request_path(&HeaderList::from_pairs(pairs)), want);
    }
    check(&[], "/v1/completions");
    check(&[("x-forwarded-path", "/f"), ("x-original-path", "/o"), (":path", "/p?q")], "/p");
    check(&[("x-forwarded-path", "/f"), ("X-Original-Path", "/o?q?r")], "/o");
    check(&[("x-forwarded-path", "/f"), ("x-original-path", ""), (":path", "")], "/f");
}

#[test]
fn bodies_nobody_reads_are_routed() {
    for path in ["/v1/messages/count_tokens", "/v1/foo"] {
        let found = Parsers::default().parse(&headers(path), b"no JSON").unwrap();
        assert!(!found.api.has_model() && found.model.is_empty() && found.prompt.is_empty());
        assert_eq!(found.prompt_bytes(b"no JSON").len(), 0);
        assert_eq!(found.api.has_response(), found.api == Api::Raw);
    }
}

#[test]
fn models_are_spliced() {
    #[track_caller]
    fn check(path: &str, body: &str, target: &str, want: &str) {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let found = parse(path, &body).unwrap();
        let parts = splice(&found, &body, Changes { model: Some(target), usage: false });
        assert_eq!(String::from_utf8(parts.concat()).unwrap(), want);
        for outer in parts.iter().step_by(2) {
            let range = body.as_ptr_range();
            assert!(outer.is_empty() || range.contains(&outer.as_ptr()), "a slice, no copy");
        }
    }
    let c = "/v1/completions";
    check(
        c,
        r#"{"temperature":0, "model" : "m" ,"seed":12345678901234567890,"prompt":"<b>"}"#,
        "m2",
        r#"{"temperature":0, "model" : "m2" ,"seed":12345678901234567890,"prompt":"<b>"}"#,
    );
    check(
        c,
        r#"{"model":"","prompt":"x"}"#,
        "a\"\\\n\u{1}é",
        r#"{"model":"a\"\\\n\u0001é","prompt":"x"}"#,
    );
    check(c, r#"{"model":["m"],"prompt":"x"}"#, "m2", r#"{"model":"m2","prompt":"x"}"#);
    check(
        c,
        r#"{"model":"a","model":"b","prompt":"x"}"#,
        "c",
        r#"{"model":"a","model":"c","prompt":"x"}"#,
    );
    check(c, r#" { "prompt":"x"}"#, "m", r#" {"model":"m", "prompt":"x"}"#);
    // A key in another case is not Go's `model`, nor the engine's.
    check(c, r#"{"Model":"a","prompt":"x"}"#, "m", r#"{"model":"m","Model":"a","prompt":"x"}"#);
    check("/generate", r#"{"input_ids":[1],"model":"a"}"#, "m", r#"{"input_ids":[1],"model":"a"}"#);
    check("/v1/messages/count_tokens", r#"{"model":"a"}"#, "m", r#"{"model":"a"}"#);
    // Another body than the one that was read.
    let body = Bytes::from_static(b"{}");
    let found = parsed(c, r#"{"prompt":"x","model":"m"}"#);
    assert_eq!(splice(&found, &body, Changes { model: Some("m2"), usage: true }).concat(), b"{}");
}

#[test]
fn streams_are_asked_for_their_usage() {
    #[track_caller]
    fn check(path: &str, body: &str, want: Option<&str>) {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let found = parse(path, &body).unwrap();
        let changed = splice(&found, &body, Changes { model: None, usage: true }).concat();
        assert_eq!(String::from_utf8(changed.clone()).unwrap(), want.unwrap_or(str(&body)));
        assert_eq!(found.usage_edit.is_some(), want.is_some());
        assert_eq!(splice(&found, &body, Changes::default()).concat(), body);
        let again = parse(path, &changed).unwrap();
        assert_eq!(again.usage_edit, None, "once is enough");
        assert_eq!(again.prompt_bytes(&changed), found.prompt_bytes(&body));
    }
    fn str(body: &[u8]) -> &str {
        std::str::from_utf8(body).unwrap()
    }
    let c = "/v1/completions";
    check(
        c,
        r#" { "prompt":"x", "stream" : true}"#,
        Some(r#" {"stream_options":{"include_usage":true}, "prompt":"x", "stream" : true}"#),
    );
    check(
        "/v1/chat/completions",
        r#"{"messages":[{"role":"user","content":"x"}],"stream":true}"#,
        Some(
            r#"{"stream_options":{"include_usage":true},"messages":[{"role":"user","content":"x"}],"stream":true}"#,
        ),
    );
    // Behind the prompt and the stream: where the options stand does not matter.
    let with =
        |options: &str| format!(r#"{{"stream_options":{options},"prompt":"x","stream":true}}"#);
    for (options, want) in [
        ("null", Some(r#"{"include_usage":true}"#)),
        ("{}", Some(r#"{"include_usage":true}"#)),
        ("{ }", Some(r#"{"include_usage":true }"#)),
        (r#"{"a": 1}"#, Some(r#"{"include_usage":true,"a": 1}"#)),
        (r#"{"include_usage" : false}"#, Some(r#"{"include_usage" : true}"#)),
        (r#"{"a":1,"include_usage":null,"b":{}}"#, Some(r#"{"a":1,"include_usage":true,"b":{}}"#)),
        (r#"{"include_\u0075sage":false}"#, Some(r#"{"include_\u0075sage":true}"#)),
        (
            r#"{"include_usage":true,"include_usage":false}"#,
            Some(r#"{"include_usage":true,"include_usage":true}"#),
        ),
        (
            r#"{"continuous_usage_stats":false}"#,
            Some(r#"{"include_usage":true,"continuous_usage_stats":false}"#),
        ),
        (r#"{"include_usage":true}"#, None),
        (r#"{"include_usage":false,"include_usage":true,"a":2}"#, None),
        (r#"{"include_usage":"yes"}"#, None),
        (r#"{"include_usage":false,"continuous_usage_stats":true}"#, None),
        (r#"{"continuous_usage_stats":true,"a":1}"#, None),
        ("[]", None),
        ("true", None),
    ] {
        check(c, &with(options), want.map(with).as_deref());
    }
    // The last one counts.
    check(
        c,
        r#"{"stream_options":{"include_usage":true},"stream_options":null,"prompt":"x","stream":true}"#,
        Some(
            r#"{"stream_options":{"include_usage":true},"stream_options":{"include_usage":true},"prompt":"x","stream":true}"#,
        ),
    );
    for no_stream in [r#"{"prompt":"x"}"#, r#"{"prompt":"x","stream":false,"stream_options":null}"#]
    {
        check(c, no_stream, None);
    }
    check("/v1/responses", r#"{"input":"x","stream":true}"#, None);
    let messages = r#"{"model":"m","messages":[{"role":"user","content":"x"}],"stream":true}"#;
    check("/v1/messages", messages, None);
    check("/generate", r#"{"input_ids":[1],"stream":true}"#, None);
}

#[test]
fn a_model_and_the_demand_for_usage_go_together() {
    #[track_caller]
    fn check(body: &str, want: &str) {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let found = parse("/v1/completions", &body).unwrap();
        let changed = splice(&found, &body, Changes { model: Some("t"), usage: true });
        assert_eq!(String::from_utf8(changed.concat()).unwrap(), want);
    }
    check(
        r#"{"prompt":"x","stream":true}"#,
        r#"{"model":"t","stream_options":{"include_usage":true},"prompt":"x","stream":true}"#,
    );
    check(
        r#"{"stream_options":{},"model":"m","prompt":"x","stream":true}"#,
        r#"{"stream_options":{"include_usage":true},"model":"t","prompt":"x","stream":true}"#,
    );
    check(
        r#"{"model":"m","prompt":"x","stream_options":{"include_usage":false},"stream":true}"#,
        r#"{"model":"t","prompt":"x","stream_options":{"include_usage":true},"stream":true}"#,
    );
}
