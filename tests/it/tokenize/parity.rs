//! Our ids are those of `transformers`: of committed cases, and of cases made at random now.

use std::{collections::BTreeSet, fs::File, io::Read, process::Command};

use flate2::read::GzDecoder;
use kv_indexer::tokenize::{Input, TokenizeError};
use serde::Deserialize;

use super::rig::{fixtures, local, python, tokenizers};

/// A line of `make.py`.
#[derive(Debug, Deserialize)]
struct Case {
    model: String,
    text: Option<String>,
    #[serde(default)]
    special: bool,
    body: Option<String>,
    /// `None` when `transformers` refuses the chat.
    ids: Option<Vec<u32>>,
}

impl Case {
    fn input(&self) -> Input {
        match (&self.text, &self.body) {
            (Some(text), None) => {
                Input::Text { text: text.as_str().into(), add_special_tokens: self.special }
            }
            (None, Some(body)) => Input::Chat(body.clone().into_bytes().into()),
            other => panic!("neither text nor chat: {other:?}"),
        }
    }

    /// What differs, in words.
    fn mismatch(&self) -> Option<String> {
        let prompt = self.text.as_ref().or(self.body.as_ref()).unwrap();
        match (local().tokenize_now(&self.model, &self.input()), &self.ids) {
            (Ok(ours), Some(theirs)) if ours.ids[..] == theirs[..] => None,
            (Err(TokenizeError::Invalid(_)), None) => None,
            (Ok(ours), Some(theirs)) => {
                let at = ours.ids.iter().zip(theirs).take_while(|(a, b)| a == b).count();
                let near = |ids: &[u32]| format!("{:?}", &ids[at..ids.len().min(at + 8)]);
                let (ours, theirs) = (near(&ours.ids), near(theirs));
                Some(format!("{}: id {at}: {ours} for {theirs} in {prompt}", self.model))
            }
            (ours, theirs) => {
                let theirs = theirs.as_ref().map(Vec::len);
                Some(format!("{}: {ours:?} for {theirs:?} ids in {prompt}", self.model))
            }
        }
    }
}

#[track_caller]
fn check(lines: &str, least: usize) {
    let cases: Vec<Case> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(cases.len() >= least, "{} cases", cases.len());
    let models: BTreeSet<_> = cases.iter().map(|case| case.model.as_str()).collect();
    assert_eq!(models.len(), 5, "{models:?}");
    let mismatches: Vec<_> = cases.iter().filter_map(Case::mismatch).collect();
    let (first, count) = (mismatches.iter().take(5).cloned().collect::<Vec<_>>(), mismatches.len());
    assert_eq!(count, 0, "{count} of {} differ:\n{}", cases.len(), first.join("\n"));
}

#[test]
fn golden_ids_are_ours() {
    let mut lines = String::new();
    let file = File::open(fixtures().join("golden.jsonl.gz")).unwrap();
    GzDecoder::new(file).read_to_string(&mut lines).unwrap();
    check(&lines, 750);
}

#[test]
fn ids_of_random_prompts_are_those_of_transformers() {
    let seed = fastrand::u32(..).to_string();
    println!("make.py --sample {seed} 30");
    let output = Command::new(python())
        .arg(fixtures().join("make.py"))
        .arg(tokenizers())
        .args(["--sample", &seed, "30"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check(&String::from_utf8(output.stdout).unwrap(), 150);
}
