//! `config/epp-precise.yaml`: it loads as it is, with a kv-indexer and without, and nothing is amiss.

use std::{fs, path::Path};

use kv_indexer::epp::{config::Loaded, plugins};

use super::load_with;

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
    "normalizer":null,"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,
    "model":{"type":"WordLevel","vocab":{"?":0,"a":1},"unk_token":"?"}}"#;
const SERVICE: &str = "    indexerService:\n      address: 127.0.0.1:50051\n";

/// The file with tokenizers that are there.
fn text(models: &Path) -> String {
    fs::create_dir_all(models.join("m")).unwrap();
    fs::write(models.join("m/tokenizer.json"), TOKENIZER).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/epp-precise.yaml");
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(SERVICE) && text.contains("modelsDir: /mnt/models"), "{text}");
    text.replace("modelsDir: /mnt/models", &format!("modelsDir: {}", models.display()))
}

#[track_caller]
fn check(text: &str) -> Loaded {
    let loaded = load_with(&plugins::types(), text).unwrap_or_else(|faults| panic!("{faults:#?}"));
    assert!(loaded.warnings.is_empty(), "{:#?}", loaded.warnings);
    let [profile] = &loaded.profiles[..] else { panic!("{:#?}", loaded.profiles) };
    let filters: Vec<&str> = profile.filters.iter().map(|it| &*it.name).collect();
    assert_eq!(filters, ["decode-filter", "overload-filter", "precise-prefix-cache-scorer"]);
    let scorers: Vec<_> = profile.scorers.iter().map(|(it, weight)| (&*it.name, *weight)).collect();
    assert_eq!(
        scorers,
        [
            ("precise-prefix-cache-scorer", 3.0),
            ("token-load-scorer", 2.0),
            ("kv-cache-utilization-scorer", 1.0),
            ("queue-scorer", 1.0),
            ("no-hit-lru-scorer", 1.0),
        ]
    );
    // Ids first, then matches, then what they leave to be computed; nothing approximate beside them.
    let producers: Vec<&str> = loaded.producers.iter().map(|it| &*it.name).collect();
    assert_eq!(
        producers,
        ["token-producer", "precise-prefix-cache-scorer", "inflight-load-producer"]
    );
    loaded
}

#[test]
fn it_loads_with_the_service_and_without() {
    let models = tempfile::tempdir().unwrap();
    let text = text(models.path());
    check(&text);
    check(&text.replace(SERVICE, ""));
}

#[test]
fn what_reads_ids_gets_a_producer_that_makes_none() {
    let text = "plugins:\n- type: prefix-based-pd-decider\n";
    let loaded = load_with(&plugins::types(), text).unwrap_or_else(|faults| panic!("{faults:#?}"));
    let producers: Vec<&str> = loaded.producers.iter().map(|it| &*it.name).collect();
    assert!(producers.contains(&"token-producer"), "{producers:?}");
}
