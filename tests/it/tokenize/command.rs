//! `kv-indexer tokenize` as a process.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

/// A word-level tokenizer and a template, in a new directory.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
        "normalizer":null,"pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
        "model":{"type":"WordLevel","vocab":{"?":0,"one":1,"two":2,"user":3},"unk_token":"?"}}"#;
    fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    let template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}";
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    folder
}

fn tokenize(folder: &Path, arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kv-indexer"))
        .args(["tokenize", "--model-dir"])
        .arg(folder)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that ends early closes its input.
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap_or_default();
    child.wait_with_output().unwrap()
}

#[track_caller]
fn check(arguments: &[&str], input: &str, status: i32, out: &str, err: &str) {
    let output = tokenize(model().path(), arguments, input);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), out, "{said}");
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.contains(err) && (!err.is_empty() || said.is_empty()), "{err:?} is not in {said}");
}

#[test]
fn ids_are_printed_line_by_line() {
    check(&["-"], "{\"text\":\"one two\"}\n\n{\"prompt\":\"two\"}", 0, "[1,2]\n[2]\n", "");
    let chat = r#"{"model":"any","messages":[{"role":"user","content":"two one"}]}"#;
    check(&["--chat", "-"], chat, 0, "[3,2,1]\n", "");
}

#[test]
fn the_first_bad_line_ends_it() {
    check(
        &["-"],
        "{\"text\":\"one\"}\n{\"text\":1}\n{\"text\":\"two\"}",
        1,
        "[1]\n",
        "-:2: invalid type",
    );
    check(&["-"], "{}", 1, "", "-:1: no text");
    check(&["--chat", "-"], r#"{"messages":[]}"#, 1, "", "-:1: messages: there is none");
    check(&["/nonexistent.jsonl"], "", 1, "", "/nonexistent.jsonl: No such file");
}

#[test]
fn bad_models_are_named() {
    for (file, text, reason) in [
        ("tokenizer.json", "{\"version\":", "tokenizer.json: not a tokenizer: EOF"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not usable: EOF"),
        ("chat_template.jinja", "a\n{% if %}", "chat_template.jinja: chat template, line 2: "),
        ("chat_template.jinja", "{{ x | nonsense }}", "nonsense"),
    ] {
        let folder = model();
        fs::write(folder.path().join(file), text).unwrap();
        let output = tokenize(folder.path(), &["--chat", "-"], r#"{"messages":[{"role":"user"}]}"#);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{file}: {text}");
        assert!(said.contains(reason), "{reason} is not in {said}");
    }
}
