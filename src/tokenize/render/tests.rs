use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    sync::mpsc,
    thread,
};

use super::*;

/// Answers as vLLM 0.32.0 gives them.
const CHAT: &str = r#"{"request_id":"chatcmpl-9a","token_ids":[1,2,3],"token_offsets":null,
    "features":null,"content_parts":null,"sampling_params":{"n":1,"temperature":0.7},"model":"tiny",
    "stream":false,"cache_salt":null,"priority":0}"#;
const COMPLETION: &str = r#"[{"request_id":"cmpl-9b-0","token_ids":[4,5],"token_offsets":null,
    "features":null,"sampling_params":{"n":1},"model":"tiny","cache_salt":null}]"#;
const DISABLED: &str = r#"{"error":{"message":"Scale-out endpoints are disabled. Start the server with --enable-scale-out.","type":"Forbidden","code":403}}"#;

/// Answers one request; what it was goes to the receiver, head and body.
fn server(status: &str, answer: &str) -> (String, mpsc::Receiver<(String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (asked, asks) = mpsc::channel();
    let response = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{answer}", answer.len());
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
            head += &line;
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        _ = asked.send((head, String::from_utf8(body).unwrap()));
        stream.write_all(response.as_bytes()).unwrap();
    });
    (url, asks)
}

fn client(url: &str, model: &str) -> Render {
    let timeout = Duration::from_secs(20);
    let model = model.to_owned();
    let config = RenderConfig { url: url.to_owned(), model, timeout, multimodal_timeout: timeout };
    Render::new(config).unwrap()
}

fn text(text: &str) -> Input {
    Input::Text { text: text.into(), add_special_tokens: false }
}

fn chat(body: &str) -> Input {
    Input::Chat(Bytes::copy_from_slice(body.as_bytes()))
}

/// Asks a server that gives this answer.
async fn ask(status: &str, answer: &str, input: Input) -> Result<Tokenized, TokenizeError> {
    let (url, _asks) = server(status, answer);
    client(&url, "").tokenize("m", input).await
}

#[tokio::test]
async fn a_text_is_asked_for_under_the_model_of_the_renderer() {
    let (url, asks) = server("200 OK", COMPLETION);
    let tokens = client(&format!("{url}/base/"), "tiny").tokenize("served", text("a \"b\"")).await;
    assert_eq!(tokens, Ok(vec![4, 5].into()));
    let (head, body) = asks.recv().unwrap();
    assert!(head.starts_with("POST /base/v1/completions/render HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("connection: close"), "{head}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let want =
        serde_json::json!({"model": "tiny", "prompt": "a \"b\"", "add_special_tokens": false});
    assert_eq!(body, want);
}

#[tokio::test]
async fn a_chat_goes_as_it_is_but_for_its_model() {
    let (url, asks) = server("200 OK", CHAT);
    let body = r#"{"messages":[{"role":"user","content":"x"}], "model" : "theirs","tools":[{"z":1,"a":{"model":2}}]}"#;
    let tokens = client(&url, "").tokenize("ours", chat(body)).await;
    assert_eq!(tokens, Ok(vec![1, 2, 3].into()));
    let (head, asked) = asks.recv().unwrap();
    assert!(head.starts_with("POST /v1/chat/completions/render HTTP/1.1\r\n"), "{head}");
    assert_eq!(asked, body.replace(r#" "theirs""#, r#""ours""#));
}

#[tokio::test]
async fn features_are_where_pictures_lie() {
    let with = |features: &str| CHAT.replace(r#""features":null"#, features);
    let answer = with(
        r#""features":{"mm_hashes":{"audio":["h3"],"image":["h1","h2"]},
        "mm_placeholders":{"image":[{"offset":1,"length":4},{"offset":9,"length":2}],
        "audio":[{"offset":20,"length":1}]},"kwargs_data":{"image":["AAAA",null]}}"#,
    );
    let tokens = ask("200 OK", &answer, chat("{}")).await.unwrap();
    let item =
        |hash: &str, offset, length| MultimodalItem { hash: hash.to_owned(), offset, length };
    assert_eq!(tokens.items[..], [item("h3", 20, 1), item("h1", 1, 4), item("h2", 9, 2)]);
    let answer = with(r#""features":{"mm_hashes":{"image":["h1"]},"mm_placeholders":{}}"#);
    let error = ask("200 OK", &answer, chat("{}")).await.unwrap_err();
    assert!(error.to_string().contains("1 hashes and 0 places of \"image\""), "{error}");
}

#[tokio::test]
async fn refusals_and_nonsense_have_reasons() {
    async fn check(status: &str, answer: &str, want: (&str, &str)) {
        let error = ask(status, answer, text("x")).await.unwrap_err();
        assert_eq!(error.reason(), want.0, "{error}");
        assert!(error.to_string().contains(want.1), "{error}");
    }
    check("403 Forbidden", DISABLED, ("unavailable", "Scale-out endpoints are disabled")).await;
    check("404 Not Found", r#"{"detail":"Not Found"}"#, ("unavailable", "Not Found")).await;
    check("500 Internal Server Error", "oops", ("unavailable", "oops")).await;
    let long = r#"{"error":{"message":"The prompt is too long.","code":400}}"#;
    check("400 Bad Request", long, ("invalid", "The prompt is too long.")).await;
    check("200 OK", "[]", ("unavailable", "0 prompts came back of one")).await;
    check("200 OK", CHAT, ("unavailable", "expected a sequence")).await;
    check("200 OK", "[{\"token_ids\":[-1]}]", ("unavailable", "invalid value")).await;
}

#[tokio::test]
async fn nobody_and_silence() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut render = client(&url, "");
    render.config.timeout = Duration::from_millis(20);
    // It is connected by the backlog, and nothing answers.
    assert_eq!(render.tokenize("m", text("x")).await, Err(TokenizeError::Late));
    render.config.timeout = Duration::from_secs(20);
    render.config.multimodal_timeout = Duration::from_millis(20);
    let picture = chat(r#"{"messages":[{"content":[{"type":"image_url","image_url":{}}]}]}"#);
    assert_eq!(render.tokenize("m", picture).await, Err(TokenizeError::Late));
    drop(listener);
    let error = render.tokenize("m", text("x")).await.unwrap_err();
    assert_eq!(error.reason(), "unavailable");
}

#[test]
fn urls() {
    #[track_caller]
    fn check(url: &str, want: Result<(&str, u16, &str), &str>) {
        let timeout = Duration::from_secs(1);
        let model = String::new();
        let config =
            RenderConfig { url: url.to_owned(), model, timeout, multimodal_timeout: timeout };
        match (Render::new(config), want) {
            (Ok(got), Ok(want)) => assert_eq!((&*got.host, got.port, &*got.base), want),
            (Err(got), Err(want)) => assert!(got.contains(want), "{got}"),
            (got, want) => panic!("{url}: {got:?}, want {want:?}"),
        }
    }
    check("http://localhost:8000", Ok(("localhost", 8000, "")));
    check("http://render/", Ok(("render", 80, "")));
    check("http://[::1]:81/a/b/", Ok(("::1", 81, "/a/b")));
    check("https://render", Err("does not begin with http://"));
    check("localhost:8000", Err("does not begin with http://"));
    check("http://a/?b=c", Err("more than host, port and path"));
    check("http://u@a/", Err("more than host, port and path"));
    check("http://a b", Err("is no URL"));
}

#[test]
fn only_the_model_at_the_top_is_replaced() {
    #[track_caller]
    fn check(body: &str, want: &str) {
        assert_eq!(String::from_utf8(with_model(body.as_bytes(), "new")).unwrap(), want);
    }
    check(r#"{"model":"a"}"#, r#"{"model":"new"}"#);
    check(
        r#"{"b":[1,{"model":"x"}],"model":"a\"}","c":2}"#,
        r#"{"b":[1,{"model":"x"}],"model":"new","c":2}"#,
    );
    check(r#"{"model":{"model":[1]},"c":"model"}"#, r#"{"model":"new","c":"model"}"#);
    check(r#"{"model":1,"model":null}"#, r#"{"model":"new","model":"new"}"#);
    check(r#"{"c":"model","d":3}"#, r#"{"c":"model","d":3}"#);
    // No JSON, and no panic.
    for nonsense in [
        "",
        "{",
        "}",
        "{\"model",
        "{\"model\\",
        "{\"model\":",
        "]]],:\"\\",
        "{:,\"",
        "[\"model\":1]",
    ] {
        with_model(nonsense.as_bytes(), "new");
    }
}
