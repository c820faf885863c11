//! llm-d's conformance cases over the wire, each in both wire forms: mapping, tiers, counting,
//! clears, weights, extras.

use std::collections::BTreeMap;

use kv_indexer::wire::encode::Form;

use super::{
    engine::Engine,
    rig::{Query, Rig},
    script,
};

/// Plays transcripts against an indexer of this block size: `a> EVENTS` is a batch of pod `a`,
/// `? TOKENS [lora L] [salt S] [item ID OFFSET LENGTH] [only POD] => a=DEPTH[:SCORE] b=…` a
/// question, for which everything sent before is waited for. Rows of rank 0 are written without it.
pub(super) fn check(config: &str, cases: &[(&str, &str)]) {
    let mut rig = Rig::start(config);
    for (case, transcript) in cases {
        for form in [Form::Map, Form::Array] {
            // Locality came after the array form.
            if form == Form::Map || !transcript.contains(" far") {
                play(&mut rig, &format!("{case}{form:?}"), form, transcript);
            }
        }
    }
    let metrics = rig.metrics();
    assert!(!metrics.contains("kv_events_rejected_total{"), "{metrics}");
    rig.finish();
}

fn play(rig: &mut Rig, case: &str, form: Form, transcript: &str) {
    let mut engines: BTreeMap<String, Engine> = BTreeMap::new();
    for line in transcript.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some((pod, events)) = line.split_once("> ").filter(|_| !line.starts_with('?')) {
            let pod = format!("{case}-{}", pod.trim());
            let engine = engines.entry(pod.clone()).or_insert_with(|| {
                let mut engine = Engine::bind(&format!("kv@{pod}@{case}"));
                engine.form = form;
                rig.register(&pod, &engine, None);
                engine
            });
            engine.send(events);
        } else {
            for (pod, engine) in &engines {
                rig.applied(pod, engine.next - 1);
            }
            let (question, wanted) = line.strip_prefix('?').unwrap().split_once("=>").unwrap();
            let scores = rig.ask(&query(case, question));
            let scored = wanted.contains(':');
            let got: Vec<String> = scores
                .iter()
                .map(|(row, (depth, score))| {
                    let row = row.trim_start_matches(&format!("{case}-")).trim_end_matches("#0");
                    if scored { format!("{row}={depth}:{score}") } else { format!("{row}={depth}") }
                })
                .collect();
            let wanted: Vec<&str> = wanted.split_whitespace().collect();
            assert_eq!(got, wanted, "{case}: {line}");
        }
    }
    for pod in engines.keys() {
        rig.unregister(pod).unwrap();
    }
}

fn query(case: &str, question: &str) -> Query {
    let mut words = question.split_whitespace();
    let tokens = words.next().unwrap();
    let mut query = Query::new(case, tokens);
    while let Some(word) = words.next() {
        let mut text = || words.next().unwrap().to_owned();
        match word {
            "lora" => query.lora = text(),
            "salt" => query.salt = text(),
            "only" => query.pods.push(format!("{case}-{}", text())),
            "item" => {
                let (id, offset, length) = (text(), text(), text());
                let item = (id, offset.parse().unwrap(), length.parse().unwrap());
                query.items.push(item);
            }
            other => panic!("{other:?} in {question:?}"),
        }
    }
    assert_eq!(query.tokens, script::tokens(tokens));
    query
}

#[test]
fn engine_and_request_blocks_of_one_size() {
    check(
        "tokenProcessorConfig: {blockSizeTokens: 16}",
        &[
            ("C40", "a> store 1-4 of 1-64\n? 1-64 => a=4\n? 1-63 => a=3\n? 2-65 =>"),
            ("C45", "a> remove 9\n? 1-64 =>\na> store 1-4 of 1-64; remove 9\n? 1-64 => a=4"),
            (
                "C73",
                "a> store 1-3 of 1-48; remove 2\n? 1-48 => a=1\na> store 2 of 17-32 after 1\n? 1-48 => a=3",
            ),
            (
                "C50",
                "a> store 1-4 of 1-64; store 1-4 on CPU\n? 1-64 => a=4:4\n\
                 a> remove 1-4\n? 1-64 => a=4:3.2\na> store 5 of 65-80 after 4\n? 1-80 => a=5:4.2\n\
                 a> remove 1-4 on CPU\n? 1-80 =>\na> store 1-4 on CPU\n? 1-80 =>",
            ),
            (
                "C51",
                "a> store 1-4 on CPU\n? 1-64 =>\na> remove 1-4 on CPU; store 1-4 of 1-64\n? 1-64 => a=4:4\na> remove 1-4\n? 1-64 =>",
            ),
            // A placeholder that comes first gets its tokens later; the copy was there all along.
            ("C51b", "a> store 1-4 on CPU; store 1-4 of 1-64; remove 1-4\n? 1-64 => a=4:3.2"),
            (
                "C52",
                "a> store 1 of 1-16\nb> store 1 of 1-16\nc> store 1 of 1-16 on CPU; store 1 of 1-16\n\
                 a> remove 1\nc> remove 1\n? 1-16 => b=1:1 c=1:0.8",
            ),
            (
                "C55",
                "a> store 1-2 of 1-32\na> store 1-2 of 1-32\na> remove 1-2\n? 1-32 => a=2\na> remove 1-2\n? 1-32 =>",
            ),
            (
                "C56",
                "a> store 1 of 1-16; store 1 on CPU; store 1 on CPU; remove 1 on CPU; remove 1 on CPU\n? 1-16 => a=1:1",
            ),
            (
                "C57",
                "a> store 1 of 1-16; store 1 of 1-16; clear; store 1 of 1-16; remove 1\n? 1-16 =>",
            ),
            (
                "C58",
                "a> store 1 of 1-16; store 1 of 1-16 on CPU; store 1 of 1-16 group 1 kind full_attention\n\
                 b> store 1 of 1-16; store 1 of 1-16\na> remove 1\nb> remove 1\n? 1-16 => a=1:1 b=1:1\n\
                 a> remove 1 on CPU; remove 1 group 1\n? 1-16 => b=1:1\na> store 1 of 1-16\n? 1-16 => a=1:1 b=1:1",
            ),
            (
                "C60",
                "a> store 1-4 of 1-64\nb> store 1-4 of 1-64\n? 1-64 => a=4 b=4\na> clear\n? 1-64 => b=4",
            ),
            (
                "C61",
                "a> store 1-2 of 1-32; store 1-2 on CPU; store 1-2 of 1-32 group 0 kind full_attention\n\
                 b> store 1-2 of 1-32\na> clear\n? 1-32 => b=2\na> store 1-2 on CPU\n? 1-32 => b=2",
            ),
            ("C62", "a> store 1-2 of 1-32\na> clear\na> store 1-2 of 1-32\n? 1-32 => a=2"),
            (
                "C71",
                "a> store 1-3 of 1-48\nb> store 1-2 of 1-32\n? 1-48 => a=3:3 b=2:2\n? 1-48 only a => a=3:3\n? 1-48 only c =>  c=0:0",
            ),
            ("C72", "a> store 1 of 1-16; store 2 of 17-32 after 1 on CPU\n? 1-32 => a=2:1.8"),
            // Remote copies are a tier of their own; counted apart from local ones.
            (
                "far",
                "a> store 1 of 1-16; store 1 on STORAGE far; remove 1 \n? 1-16 => a=1:0.5\na> remove 1 on STORAGE\n? 1-16 => a=1:0.5\na> remove 1 on STORAGE far\n? 1-16 =>",
            ),
        ],
    );
}

#[test]
fn engine_blocks_smaller_and_larger_than_request_blocks() {
    check(
        "tokenProcessorConfig: {blockSizeTokens: 64}",
        &[
            ("C41", "a> store 1-8 of 1-128\n? 1-128 => a=2"),
            (
                "C42",
                "a> store 1-8 of 1-128; remove 1\n? 1-128 =>\n? 65-128 =>\na> store 1 of 1-16\n? 1-128 => a=2",
            ),
            (
                "C43",
                "a> store 1-2 of 1-256 by 128\n? 1-256 => a=4\na> remove 1\n? 1-256 =>\na> store 1 of 1-128 by 128\n? 1-256 => a=4\na> remove 2\n? 1-256 => a=2",
            ),
            ("C44", "a> store 1-8 of 1-128\nb> store 1-4 of 1-128 by 32\n? 1-128 => a=2 b=2"),
            ("C46", "a> store 1-3 of 1-48\n? 1-64 =>\na> store 4 of 49-64 after 3\n? 1-64 => a=1"),
            (
                "C47",
                "a> store 1-8 of 1-128 extra -|-|-|-|-|-|-|-\nb> store 1-2 of 1-256 by 128 extra -|-\n? 1-256 => a=2 b=4",
            ),
            // L14: the CPU copy of a block that spans several request blocks outlives the GPU's.
            (
                "L14",
                "a> store 1-2 of 1-256 by 128; store 1-2 on CPU; remove 1-2\n? 1-256 => a=4:3.2\na> remove 2 on CPU\n? 1-256 => a=2:1.6",
            ),
            (
                "L14b",
                "a> store 1-8 of 1-128; store 1-8 on CPU; remove 1-8\n? 1-128 => a=2:1.6\na> remove 8 on CPU\n? 1-128 => a=1:0.8",
            ),
        ],
    );
}

#[test]
fn weights_can_be_configured() {
    check(
        "kvCacheBackendConfigs: [{name: gpu, weight: 1}, {name: cpu, weight: 0.5}, {name: nvme, weight: 0.25}]",
        &[
            (
                "C78",
                "a> store 1-3 of 1-48; store 3 on CPU; store 6 of 81-96\n\
                 b> store 4-5 of 49-80 on CPU\n? 1-96 => a=3:3\na> remove 3\n? 1-96 => a=3:2.5",
            ),
            (
                "cpu",
                "a> store 1 of 1-16 on CPU_PINNED; store 2 of 17-32 after 1 on NVMe; store 3 of 33-48 after 2 on tape\n? 1-48 => a=3:1.25",
            ),
            ("C79", "a> store 1-4 of 1-64; store 1-2 on CPU; store 4 on CPU\n? 1-64 => a=4:4"),
        ],
    );
}

#[test]
fn adapters_salts_and_items_are_part_of_the_prefix() {
    check(
        "tokenProcessorConfig: {blockSizeTokens: 16}",
        &[
            (
                "lora",
                "a> store 1-2 of 1-32 lora red\nb> store 1-2 of 1-32\n? 1-32 lora red => a=2\n? 1-32 => b=2\n? 1-32 lora blue =>",
            ),
            // Engines before 0.14 name adapters by number only.
            ("id", "a> store 1-2 of 1-32 id 7\n? 1-32 lora 7 => a=2\n? 1-32 =>"),
            (
                "both",
                "a> store 1-2 of 1-32 id 7 lora red\n? 1-32 lora red => a=2\n? 1-32 lora 7 =>",
            ),
            // vLLM repeats the adapter's name in the extra keys.
            (
                "extra",
                "a> store 1-2 of 1-32 lora red extra red|red\n? 1-32 lora red => a=2\na> store 3 of 33-48 after 2 lora red extra red\n? 1-48 lora red => a=3",
            ),
            (
                "salt",
                "a> store 1-2 of 1-32 extra s|-\nb> store 1-2 of 1-32\n? 1-32 salt s => a=2\n? 1-32 => b=2\n? 1-32 salt t =>",
            ),
            ("sgsalt", "a> store 1-2 of 1-32 salt s\n? 1-32 salt s => a=2\n? 1-32 =>"),
            (
                "lorasalt",
                "a> store 1-2 of 1-32 lora red extra red,s|red\n? 1-32 lora red salt s => a=2\n? 1-32 lora red =>",
            ),
            // C18: an item taints the blocks that it covers and, by the chain, those behind it.
            (
                "C18",
                "a> store 1-3 of 1-48 extra -|pic@4|pic@-12\nb> store 1-3 of 1-48\n? 1-48 item pic 20 24 => a=3 b=1\n\
                 ? 1-48 => a=1 b=3\n? 1-48 item other 20 24 => a=1 b=1",
            ),
        ],
    );
}
