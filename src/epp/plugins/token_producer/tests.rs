use std::{fs, net::TcpListener, path::Path};

use bytes::Bytes;
use serde_json::json;

use super::*;
use crate::epp::{
    ext_proc::headers::HeaderList,
    request::Parsers,
    scheduling::testing::{Site, build, request},
};

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
    "normalizer":null,"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,
    "model":{"type":"WordLevel","vocab":{"?":0,"a":1,"b":2,"user":3},"unk_token":"?"}}"#;
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}";

fn model(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("tokenizer.json"), TOKENIZER).unwrap();
    fs::write(directory.join("chat_template.jinja"), TEMPLATE).unwrap();
}

/// The plugin, and where its metrics are.
fn made(params: Value) -> (Arc<dyn Plugin>, Site) {
    let mut site = Site::default();
    let plugin = site.build(REGISTRATION, params).unwrap();
    (plugin, site)
}

fn asked(path: &str, body: &str) -> InferenceRequest {
    let body = Bytes::copy_from_slice(body.as_bytes());
    let path = (":path".to_owned(), Bytes::copy_from_slice(path.as_bytes()));
    let parsed = Parsers::default().parse(&HeaderList::from_pairs([path]), &body).unwrap();
    InferenceRequest { parsed, body, ..request("m", "") }
}

async fn produce(plugin: &dyn Plugin, request: &InferenceRequest) -> Produced {
    let mut produced = Produced::new();
    if let Some(waiting) = plugin.producer().unwrap().produce(request, &[], &mut produced) {
        waiting.await;
    }
    produced
}

fn ids(produced: &Produced) -> Option<Vec<Vec<u32>>> {
    let tokens = produced.tokens.as_ref()?;
    assert!(tokens.exact);
    Some(tokens.prompts.iter().map(|prompt| prompt.ids.to_vec()).collect())
}

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn prompts_of_ids_need_no_tokenizer() {
    async fn check(path: &str, body: &str, want: Option<&[&[u32]]>) {
        let (plugin, _) = made(json!({}));
        let produced = produce(&*plugin, &asked(path, body)).await;
        let want = want.map(|lists| lists.iter().map(|list| list.to_vec()).collect());
        assert_eq!(ids(&produced), want, "{body}");
        assert_eq!(produced.no_tokens, None);
    }
    check(COMPLETIONS, r#"{"prompt":[5,6,12345678]}"#, Some(&[&[5, 6, 12_345_678]])).await;
    check(COMPLETIONS, r#"{"prompt":[[5, 6],[7],[8,9,10]]}"#, Some(&[&[5, 6], &[7], &[8, 9, 10]]))
        .await;
    check("/inference/v1/generate", r#"{"token_ids":[1,2]}"#, Some(&[&[1, 2]])).await;
    // What is estimated is left to those who want it.
    check(COMPLETIONS, r#"{"prompt":"a b"}"#, None).await;
    check(CHAT, r#"{"messages":[{"role":"user","content":"a"}]}"#, None).await;
}

#[tokio::test]
async fn texts_and_chats_are_tokenized_here() {
    let folder = tempfile::tempdir().unwrap();
    model(&folder.path().join("m"));
    let (plugin, site) = made(json!({"local": {"modelsDir": folder.path(), "budget": "10s"}}));
    assert_eq!(plugin.producer().unwrap().deadline(), Duration::from_millis(10_050));
    let check = async |path: &str, body: &str, want: Result<&[&[u32]], &str>| {
        let produced = produce(&*plugin, &asked(path, body)).await;
        match want {
            Ok(want) => assert_eq!(ids(&produced).unwrap(), want, "{body}"),
            Err(reason) => {
                assert_eq!(ids(&produced), None, "{body}");
                assert_eq!(produced.no_tokens.map(|error| error.reason()), Some(reason), "{body}");
            }
        }
    };
    check(COMPLETIONS, r#"{"prompt":"a \u0062","add_special_tokens":false}"#, Ok(&[&[1, 2]])).await;
    check(COMPLETIONS, r#"{"prompt":["a","b a","c"]}"#, Ok(&[&[1], &[2, 1], &[0]])).await;
    check(COMPLETIONS, r#"{"prompt":[[7]]}"#, Ok(&[&[7]])).await;
    check(CHAT, r#"{"messages":[{"role":"user","content":"b"}]}"#, Ok(&[&[3, 2]])).await;
    check(
        CHAT,
        r#"{"messages":[{"role":"user","content":"b"}],"chat_template":"x"}"#,
        Err("invalid"),
    )
    .await;
    check("/v1/embeddings", r#"{"input":"a"}"#, Err("unsupported")).await;
    check("/v1/responses", r#"{"input":"a"}"#, Err("unsupported")).await;
    let text = crate::support::metrics::encode(&site.registry).unwrap();
    assert!(text.contains("epp_tokenize_failures_total{reason=\"unsupported\"} 2"), "{text}");
    assert!(text.contains("epp_tokenize_failures_total{reason=\"invalid\"} 1"), "{text}");
}

#[tokio::test]
async fn a_request_that_is_dropped_counts_as_late() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (plugin, site) = made(json!({"modelName": "m", "vllm": {"url": url, "mmTimeout": "1s"}}));
    let producer = plugin.producer().unwrap();
    assert_eq!(producer.deadline(), Duration::from_millis(5050));
    let (request, mut produced) = (asked(COMPLETIONS, r#"{"prompt":"a"}"#), Produced::new());
    let waiting = producer.produce(&request, &[], &mut produced).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(10), waiting).await.is_err());
    assert_eq!(produced.no_tokens, Some(TokenizeError::Late));
    let text = crate::support::metrics::encode(&site.registry).unwrap();
    assert!(text.contains("epp_tokenize_failures_total{reason=\"late\"} 1"), "{text}");
}

#[test]
fn parameters() {
    #[track_caller]
    fn check(params: &Value, want: Option<&str>) {
        let said = build(REGISTRATION, params.clone()).map_err(|faults| faults.join("\n"));
        match want {
            None => assert!(said.is_ok(), "{params}: {said:?}"),
            Some(want) => {
                let said = said.map(drop).unwrap_err();
                assert!(said.contains(want), "{params}: {said}");
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().join("org/m");
    model(&here);
    check(&json!({}), None);
    check(&json!({"estimate": {}}), None);
    check(&json!({"estimate": {}, "modelName": "m"}), None);
    check(&json!({"modelName": "m", "vllm": {}}), None);
    check(&json!({"vllm": {}}), Some("modelName: is required with `vllm`"));
    check(
        &json!({"modelName": "m", "vllm": {"url": "https://x"}}),
        Some("vllm.url: \"https://x\""),
    );
    check(&json!({"modelName": "m", "vllm": {"timeout": "0s"}}), Some("vllm.timeout: "));
    check(&json!({"vllm": {}, "estimate": {}}), Some("vllm: is given beside `estimate`"));
    check(
        &json!({"modelName": "m", "udsTokenizerConfig": {"socketFile": "/x"}}),
        Some("use `local:"),
    );
    check(&json!({"locale": {}}), Some("did you mean `local`?"));
    check(&json!({"local": {}}), Some("local: needs `modelDir`, `models` or `modelsDir`"));
    check(&json!({"local": {"modelDir": here}}), Some("local.modelDir: needs `modelName`"));
    check(&json!({"modelName": "m", "local": {"modelDir": here}}), None);
    let all = json!({"models": {"x": here}, "modelsDir": folder.path(), "aliases": {"y": "x"},
        "default": "org/m", "threads": 2, "queue": 8, "budget": "20ms", "cacheSize": "64Mi"});
    check(&json!({"local": all}), None);
    check(&json!({"local": {"modelsDir": "/nowhere"}}), Some("/nowhere"));
    check(
        &json!({"local": {"models": {"m": here}, "cacheSize": "64Qi"}}),
        Some("local.cacheSize: "),
    );
    fs::write(here.join("tokenizer.json"), "{").unwrap();
    check(&json!({"local": {"models": {"m": here}}}), Some("tokenizer.json: not a tokenizer"));
}

/// Takes 15 ms for whatever it is given.
#[derive(Debug)]
struct Slow;

#[tonic::async_trait]
impl Tokenize for Slow {
    async fn tokenize(&self, _: &str, _: Input) -> Result<Tokenized, TokenizeError> {
        tokio::time::sleep(Duration::from_millis(15)).await;
        Ok(vec![1].into())
    }
}

#[tokio::test(start_paused = true)]
async fn all_prompts_of_a_request_share_its_budget() {
    let failures = Opts::new("failures", "of this test");
    let plugin = TokenProducer {
        tokenizer: Some(Arc::new(Slow)),
        budget: Duration::from_millis(20),
        failures: IntCounterVec::new(failures, &["reason"]).unwrap(),
    };
    let one = produce(&plugin, &asked(COMPLETIONS, r#"{"prompt":["a"]}"#)).await;
    assert_eq!(ids(&one), Some(vec![vec![1]]));
    let began = tokio::time::Instant::now();
    let two = produce(&plugin, &asked(COMPLETIONS, r#"{"prompt":["a","b"]}"#)).await;
    assert_eq!((ids(&two), two.no_tokens), (None, Some(TokenizeError::Late)));
    assert!(began.elapsed() < Duration::from_millis(25));
    assert_eq!(plugin.failures.with_label_values(&["late"]).get(), 1);
}
