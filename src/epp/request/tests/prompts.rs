//! Prompts as text, bytes and tokens.

use super::{PromptForm, estimate_tokens, parsed};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MESSAGES: &str = "/v1/messages";

/// Bytes as tokens, as the estimate packs them.
fn packed(text: &[u8]) -> Vec<u32> {
    text.chunks(4)
        .map(|chunk| {
            let mut token = [0; 4];
            token[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(token)
        })
        .collect()
}

#[track_caller]
fn estimate(path: &str, body: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    estimate_tokens(&parsed(path, body), body.as_bytes(), &mut tokens, usize::MAX);
    tokens
}

#[test]
fn prompts_are_bytes() {
    #[track_caller]
    fn check(path: &str, body: &str, want: &str) {
        let found = parsed(path, body);
        assert_eq!(found.prompt_bytes(body.as_bytes()), want.as_bytes());
        assert_eq!(found.prompt_len(body.as_bytes()), want.len());
    }
    check(COMPLETIONS, r#"{"prompt":"hello world"}"#, "hello world");
    check(COMPLETIONS, r#"{"prompt":"a\nb\u00e9 \ud83d\ude00"}"#, "a\nbé 😀");
    check(COMPLETIONS, r#"{"prompt":["a\n", "b"]}"#, r#"["a\n", "b"]"#);
    check(COMPLETIONS, r#"{"prompt":[1, 2]}"#, "[1, 2]");
    check(CHAT, r#"{"messages": [{"role":"user"}] }"#, r#"[{"role":"user"}]"#);
    // What comes first in the prompt comes first, wherever it stands in the body.
    check(MESSAGES, r#"{"messages":[{"role":"u"}],"system":"be\n"}"#, "be\n[{\"role\":\"u\"}]");
    check("/v1/responses", r#"{"input":"x","instructions":{"a":1}}"#, r#"{"a":1}x"#);
    let plain = r#"{"prompt":"hello"}"#;
    let found = parsed(COMPLETIONS, plain);
    assert!(matches!(found.prompt_bytes(plain.as_bytes()), std::borrow::Cow::Borrowed(_)));
}

#[test]
fn another_body_reads_as_nothing() {
    let found = parsed(COMPLETIONS, r#"{"model":"m","prompt":"hello"}"#);
    assert_eq!(found.prompt_bytes(b"{}").len(), 0);
    assert_eq!(found.token_ids(b"{}"), None);
    let tokens = parsed(COMPLETIONS, r#"{"model":"m","prompt":[1,2,3]}"#);
    assert_eq!(tokens.token_ids(br#"{"model":"m","prompt":"hello world"}"#), None);
}

#[test]
fn token_ids_are_read() {
    #[track_caller]
    fn check(path: &str, body: &str, want: &[u32]) {
        let found = parsed(path, body);
        assert_eq!(found.token_ids(body.as_bytes()).as_deref(), Some(want));
        assert_eq!(estimate(path, body), want);
    }
    check(COMPLETIONS, r#"{"prompt":[1, 2 ,4294967295,3.0,1e2,0]}"#, &[1, 2, u32::MAX, 3, 100, 0]);
    check("/v1/embeddings", r#"{"input":[7]}"#, &[7]);
    check("/inference/v1/generate", r#"{"token_ids":[7,null]}"#, &[7, 0]);
    check("/generate", r#"{"input_ids":[7,8]}"#, &[7, 8]);
    assert_eq!(parsed(COMPLETIONS, r#"{"prompt":"x"}"#).token_ids(br#"{"prompt":"x"}"#), None);
}

#[test]
fn text_is_packed_four_bytes_to_a_token() {
    #[track_caller]
    fn check(path: &str, body: &str, want: &str) {
        assert_eq!(estimate(path, body), packed(want.as_bytes()), "{body}");
    }
    check(COMPLETIONS, r#"{"prompt":"hello world"}"#, "hello world");
    check(COMPLETIONS, r#"{"prompt":"a\n\u00e9\n\nbcdefgh\t"}"#, "a\né\n\nbcdefgh\t");
    // Each of several prompts begins a new token.
    check(COMPLETIONS, r#"{"prompt":["abcde","f"]}"#, "abcde\0\0\0f");
    check("/v1/embeddings", r#"{"input":"hello"}"#, "hello");
    check(
        CHAT,
        r#"{"messages":[{"content":"hi","role":"user"},{"role":"tool","content":[{"type":"text","text":"a"},{"text":"b","type":"text"}]}],"tools":[{"a": 1}]}"#,
        r#"[{"a": 1}]userhitoolab"#,
    );
    check(CHAT, r#"{"messages":[{"role":"user","content":null}],"tools":[]}"#, "user");
    check(
        MESSAGES,
        r#"{"messages":[{"role":"user","content":[{"type":"tool_result","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}],"system":[{"type":"text","text":"x-anthropic-billing-header: 7"},{"type":"text","text":"be"}],"tools":[{}]}"#,
        "[{}]beusera\nb",
    );
    check(
        "/v1/responses",
        r#"{"input":[{"role":"u"}],"instructions":"be","tools":[1]}"#,
        r#""be"[1][{"role":"u"}]"#,
    );
    check("/v1/conversations", r#"{"items":[{"type":"call"}]}"#, r#"[{"type":"call"}]"#);
    check("/v1/images/generations", r#"{"prompt":"a cat"}"#, "");
}

#[test]
fn an_estimate_has_a_limit() {
    #[track_caller]
    fn check(path: &str, body: &str, limit: usize, want: &[u32]) {
        let mut tokens = vec![9];
        estimate_tokens(&parsed(path, body), body.as_bytes(), &mut tokens, limit);
        assert_eq!(tokens.split_first(), Some((&9, want)));
    }
    let all = packed(b"abcdefghij");
    let body = r#"{"prompt":"abcdefghij"}"#;
    check(COMPLETIONS, body, 0, &[]);
    check(COMPLETIONS, body, 1, &all[..1]);
    check(COMPLETIONS, body, 2, &all[..2]);
    check(COMPLETIONS, body, 3, &all);
    check(COMPLETIONS, r#"{"prompt":[1,2,3]}"#, 2, &[1, 2]);
    check(COMPLETIONS, r#"{"prompt":[[1,2],[3]]}"#, 2, &[1, 2]);
    check(CHAT, r#"{"messages":[{"role":"abcd","content":"efgh"},{"role":"ijkl"}]}"#, 2, &all[..2]);
}

#[test]
fn media_are_so_many_times_their_hash() {
    #[track_caller]
    fn check(path: &str, content: &str, name: &str, count: usize) {
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":[{content},{{"type":"text","text":"x"}}]}}]}}"#
        );
        assert!(parsed(path, &body).multimodal);
        let hash = xxhash_rust::xxh64::xxh64(name.as_bytes(), 0) as u32;
        let mut want = packed(b"user");
        want.extend(std::iter::repeat_n(hash, count));
        want.extend(packed(b"x"));
        let got = estimate(path, &body);
        assert_eq!((got.len(), got), (want.len(), want));
    }
    let url = |url: &str| format!(r#"{{"type":"image_url","image_url":{{"url":"{url}"}}}}"#);
    check(CHAT, &url("http://a/b.png"), "http://a/b.png", 225);
    check(CHAT, &url(r"http:\/\/a\/b.png"), "http://a/b.png", 225);
    // A PNG of 64 × 48, a GIF of 320 × 200 and a JPEG of 1024 × 768, all without their pixels.
    let png = "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAYAAAA=";
    check(
        CHAT,
        &url(&format!("data:image/png;base64,{png}")),
        &format!("data:image/png;base64,{png}"),
        3,
    );
    let gif = "R0lGODlhQAHIAAAA";
    check(
        CHAT,
        &url(&format!("data:image/gif;base64,{gif}")),
        &format!("data:image/gif;base64,{gif}"),
        62,
    );
    let jpeg = "/9j/4AAEAAD/wAARCAMABAADASIAAhEBAxEB";
    let escaped = jpeg.replace('/', r"\/");
    check(
        CHAT,
        &url(&format!("data:image/jpeg;base64,{escaped}")),
        &format!("data:image/jpeg;base64,{jpeg}"),
        768,
    );
    check(CHAT, r#"{"type":"video_url","video_url":{"url":"v"}}"#, "v", 4500);
    check(
        CHAT,
        r#"{"type":"input_audio","input_audio":{"format":"wav","data":"AAAAAA"}}"#,
        "AAAAAAwav",
        3,
    );
    let source = |source: &str| format!(r#"{{"type":"image","source":{{{source}}}}}"#);
    check(MESSAGES, &source(r#""type":"url","url":"http://a""#), "http://a", 225);
    check(MESSAGES, &source(&format!(r#""type":"base64","data":"{png}""#)), png, 3);
}

#[test]
fn media_have_bounds() {
    // A PNG that says it is 2³²−1 wide and high.
    let png = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUv//////////";
    let image = format!(r#"{{"type":"image_url","image_url":{{"url":"{png}"}}}}"#);
    let body = format!(r#"{{"messages":[{{"content":[{image}]}}]}}"#);
    assert_eq!(estimate(CHAT, &body).len(), 16_384);
    let videos = vec![r#"{"type":"video_url","video_url":{"url":"v"}}"#; 300].join(",");
    let body = format!(r#"{{"messages":[{{"content":[{videos}]}}]}}"#);
    assert_eq!(estimate(CHAT, &body).len(), 1 << 20);
}

#[test]
fn only_media_are_multimodal() {
    let body = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"image_url"}]}]}"#;
    assert!(!parsed(CHAT, body).multimodal);
    let body = r#"{"messages":[{"role":"user","type":"image_url","content":"x"}]}"#;
    assert!(!parsed(CHAT, body).multimodal);
}

#[test]
fn prompts_have_forms() {
    #[track_caller]
    fn check(path: &str, body: &str, want: &[PromptForm]) {
        let found = parsed(path, body);
        let forms: Vec<PromptForm> = found.prompt.iter().map(|part| part.form).collect();
        assert_eq!(forms, want);
    }
    use PromptForm::{Blocks, Json, Messages, Text, Texts, Tokens};
    check(COMPLETIONS, r#"{"prompt":"x"}"#, &[Text]);
    check(COMPLETIONS, r#"{"prompt":["x"]}"#, &[Texts]);
    check("/v1/embeddings", r#"{"input":[1]}"#, &[Tokens]);
    check(CHAT, r#"{"messages":[{}]}"#, &[Messages]);
    check(MESSAGES, r#"{"messages":[{}],"system":"x"}"#, &[Text, Messages]);
    check(MESSAGES, r#"{"messages":[{}],"system":[]}"#, &[Blocks, Messages]);
    check("/v1/responses", r#"{"input":"x","instructions":[]}"#, &[Json, Text]);
    check("/v1/responses", r#"{"input":5}"#, &[Json]);
    check("/v1/responses", r#"{"input":[]}"#, &[Messages]);
}
