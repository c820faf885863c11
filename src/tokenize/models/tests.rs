use super::*;

const TOKENIZER: &str = r#"{"version":"1.0","truncation":{"direction":"Right","max_length":2,
    "strategy":"LongestFirst","stride":0},"padding":null,"added_tokens":[],"normalizer":null,
    "pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,
    "model":{"type":"WordLevel","vocab":{"?":0,"a":1,"b":2,"<s>":3,"tools":4,"c":5},"unk_token":"?"}}"#;

fn write(file: &Path, text: &str) {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, text).unwrap();
}

fn load(config: &LocalConfig) -> Result<Local, String> {
    Local::load(config, &Registry::new(), "test").map_err(|error| format!("{error:#}"))
}

fn below(folder: &Path) -> LocalConfig {
    LocalConfig { models_dir: Some(folder.to_owned()), ..LocalConfig::default() }
}

#[test]
fn directories_have_the_names_of_models() {
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "plain",
        "org/name",
        "models--meta--llama/snapshots/r1",
        "models--meta--llama/snapshots/r2",
    ] {
        write(&folder.path().join(name).join("tokenizer.json"), TOKENIZER);
    }
    write(&folder.path().join("other/readme.md"), "");
    let mut config = below(folder.path());
    config.aliases.insert("served".into(), "org/name".into());
    let local = load(&config).unwrap();
    assert_eq!(local.names().collect::<Vec<_>>(), ["meta/llama", "org/name", "plain", "served"]);
    assert_eq!(local.count(), 4);
    let text = Input::Text { text: "a b c".into(), add_special_tokens: true };
    assert_eq!(local.tokenize_now("served", &text).unwrap().ids[..], [1, 2, 5]);
    assert_eq!(local.tokenize_now("lora", &text), Err(TokenizeError::NotConfigured));
    config.default = Some("plain".into());
    assert_eq!(load(&config).unwrap().tokenize_now("lora", &text).unwrap().ids.len(), 3);
    let one = load(&below(&folder.path().join("plain"))).unwrap();
    assert_eq!(one.names().collect::<Vec<_>>(), ["plain"]);
    assert_eq!(one.tokenize_now("any", &text).unwrap().ids.len(), 3);
}

#[test]
fn faults_of_the_configuration_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert!(load(&below(path)).unwrap_err().contains("no directory with a tokenizer.json"));
    assert!(load(&below(&path.join("x"))).unwrap_err().contains("x: not a directory"));
    write(&path.join("m/tokenizer.json"), TOKENIZER);
    let aliases = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
    let error = load(&LocalConfig { aliases, ..below(path) }).unwrap_err();
    assert!(error.contains("\"a\" stands for \"b\""), "{error}");
    let error = load(&LocalConfig { default: Some("q".into()), ..below(path) }).unwrap_err();
    assert!(error.contains("default model \"q\""), "{error}");
    let models = BTreeMap::from([("m".to_owned(), path.join("nowhere"))]);
    let error = load(&LocalConfig { models, ..LocalConfig::default() }).unwrap_err();
    assert!(error.contains("reading ") && error.contains("nowhere/tokenizer.json"), "{error}");
}

#[track_caller]
fn check(files: &[(&str, &str)], body: &str, expected: Result<&[u32], &str>) {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("tokenizer.json"), TOKENIZER);
    for (file, text) in files {
        write(&folder.path().join(file), text);
    }
    let local = load(&below(folder.path())).unwrap();
    let ids = local.tokenize_now("m", &Input::Chat(body.to_owned().into()));
    match (ids, expected) {
        (Ok(ids), Ok(expected)) => assert_eq!(ids.ids[..], *expected),
        (Err(error), Err(expected)) => {
            let error = format!("{}: {error}", error.reason());
            assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        }
        (ids, _) => panic!("{ids:?} for {expected:?}"),
    }
}

const USER: &str = r#"{"messages":[{"role":"user","content":"a"}]}"#;
const TOOLS: &str =
    r#"{"messages":[{"role":"user","content":"a"}],"tools":[{"function":{"name":"f"}}]}"#;

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let settings = "tokenizer_config.json";
    let inline = (
        settings,
        r#"{"chat_template":"{{ bos_token }} {{ messages[0].content }}",
        "bos_token":{"__type":"AddedToken","content":"<s>"}}"#,
    );
    check(&[], USER, Err("no_chat_template"));
    check(&[inline], USER, Ok(&[3, 1]));
    check(&[inline, ("chat_template.jinja", "b")], USER, Ok(&[2]));
    let named = (
        settings,
        r#"{"chat_template":[{"name":"default","template":"a"},
        {"name":"tool_use","template":"tools"}]}"#,
    );
    check(&[named], USER, Ok(&[1]));
    check(&[named], TOOLS, Ok(&[4]));
    let files = [("chat_template.jinja", "b"), ("chat_templates/tool_use.jinja", "tools")];
    check(&files, USER, Ok(&[2]));
    check(&files, TOOLS, Ok(&[4]));
}

#[test]
fn bodies_that_engines_refuse_are_refused() {
    let template = [("chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")];
    let message = |json: &str| format!(r#"{{"messages":[{json}]}}"#);
    let with = |json: &str| format!(r#"{{"messages":[{{"role":"user","content":"a"}}],{json}}}"#);
    for (body, reason) in [
        ("[1".to_owned(), "invalid: chat: "),
        ("{}".to_owned(), "missing field `messages`"),
        (r#"{"messages":[]}"#.to_owned(), "messages: there is none"),
        (r#"{"messages":"a"}"#.to_owned(), "invalid type"),
        (message("1"), "messages[0].not an object"),
        (message("{}"), "messages[0].role: not a string"),
        (message(r#"{"role":"user","content":1}"#), "messages[0].content: neither"),
        (message(r#"{"role":"user","content":[1]}"#), "messages[0].content[0].neither"),
        (message(r#"{"role":"user","content":[{"type":"text","text":1}]}"#), "text: not a string"),
        (message(r#"{"role":"user","content":[{"type":"smell"}]}"#), "\"smell\" are not known"),
        (
            message(r#"{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}"#),
            "multimodal",
        ),
        (message(r#"{"role":"user","content":[{"image_url":"x"}]}"#), "multimodal"),
        (message(r#"{"role":"assistant","tool_calls":1}"#), "messages[0].tool_calls: not a list"),
        (
            message(r#"{"role":"assistant","tool_calls":[1]}"#),
            "tool_calls[0].function: not an object",
        ),
        (message(r#"{"role":"assistant","reasoning":1}"#), "reasoning: not a string"),
        (with(r#""tools":[]"#), "tools: an empty list"),
        (with(r#""tools":[{}]"#), "tools[0].function: not an object"),
        (with(r#""chat_template":"x""#), "not trusted"),
        (with(r#""chat_template_kwargs":[]"#), "chat_template_kwargs: not an object"),
        (with(r#""chat_template_kwargs":{"tokenize":true}"#), "chat_template_kwargs.tokenize"),
        (with(r#""continue_final_message":true"#), "not with add_generation_prompt"),
        (with(r#""add_generation_prompt":"yes""#), "invalid type"),
    ] {
        check(&template, &body, Err(reason));
    }
}

#[test]
fn many_keys_take_little_time_and_long_prompts_are_refused() {
    let began = std::time::Instant::now();
    let keys: Vec<String> = (0..100_000).map(|key| format!("\"k{key}\":0")).collect();
    let keys = keys.join(",");
    let body = format!(
        r#"{{"messages":[{{"role":"assistant","tool_calls":[{{{keys},"function":{{"name":"f",{keys}}}}}]}}],
        "chat_template_kwargs":{{{keys},"k1":"c"}}}}"#
    );
    check(&[("chat_template.jinja", "a {{ k1 }}")], &body, Ok(&[1, 5]));
    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());

    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("m/tokenizer.json"), TOKENIZER);
    let local = Local::load(&below(folder.path()), &Registry::new(), "test").unwrap();
    let text = Input::Text { text: "a".repeat(MAX_PROMPT + 1).into(), add_special_tokens: false };
    let said = local.tokenize_now("m", &text).unwrap_err().to_string();
    assert_eq!(said, "the prompt is longer than 8388608 bytes");
}

#[test]
fn truncation_keeps_the_end_unless_told_otherwise() {
    let template = [("chat_template.jinja", "a b c")];
    let with = |json: &str| USER.replace("]}", &format!("],{json}}}"));
    check(&template, &with(r#""truncate_prompt_tokens":2"#), Ok(&[2, 5]));
    let right = r#""truncate_prompt_tokens":2,"truncation_side":"right""#;
    check(&template, &with(right), Ok(&[1, 2]));
    check(&template, &with(r#""truncate_prompt_tokens":-1"#), Ok(&[1, 2, 5]));
    check(&template, &with(r#""truncate_prompt_tokens":0"#), Ok(&[]));
}

#[tokio::test]
async fn threads_give_the_ids_that_the_caller_would_make() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("m/tokenizer.json"), TOKENIZER);
    let pool = PoolConfig { budget: std::time::Duration::MAX, ..PoolConfig::default() };
    let registry = Registry::new();
    let load = || {
        let config = LocalConfig { pool, ..below(folder.path()) };
        Local::load(&config, &registry, "models_test").unwrap()
    };
    let (local, other) = (load(), load());
    for words in [0, 1, SMALL_BYTES / 2, SMALL_BYTES] {
        let text = Input::Text { text: "a b ".repeat(words).into(), add_special_tokens: true };
        for _ in 0..2 {
            let ids = local.tokenize("m", text.clone()).await.unwrap().ids;
            assert_eq!(ids.len(), words * 2);
            assert_eq!(Ok(ids), other.tokenize_now("m", &text).map(|tokenized| tokenized.ids));
        }
    }
    for spaces in [0, LARGE_INPUT] {
        let chat = Input::Chat(format!("{{}}{}", " ".repeat(spaces)).into());
        let said = local.tokenize("m", chat.clone()).await.err();
        assert!(said.is_some());
        assert_eq!(said, local.tokenize_now("m", &chat).err());
    }
    let text = crate::support::metrics::encode(&registry).unwrap();
    assert!(text.contains("models_test_tokenize_seconds_count 10"), "{text}");
    let count = "models_test_token_cache_hits_total{model=\"m\"} ";
    let hits = text.lines().find_map(|line| line.strip_prefix(count)).map(str::to_owned);
    assert!(hits.as_ref().is_some_and(|hits| hits != "0"), "{text}");
}
