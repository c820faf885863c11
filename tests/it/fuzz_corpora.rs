//! Everything that fuzzers were seeded with, or have found, on a stable compiler.

use std::{fs, path::Path};

use kv_indexer::{epp, ingest, wire};

#[test]
fn fuzz_corpora_hold() {
    let corpora = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus"));
    // With the least number of files, so that a lost corpus is noticed.
    let targets = [
        ("decode", 1, wire::fuzz::decode_is_total as fn(&[u8])),
        ("topic", 1, wire::fuzz::topic_is_total),
        ("replay_reply", 1, wire::fuzz::replay_reply_is_total),
        ("sequencer", 20, ingest::sequencer::fuzz::is_total),
        ("body", 20, epp::request::fuzz::body_is_total),
        ("exchange", 12, epp::ext_proc::fuzz::is_total),
        ("scrape", 1, epp::datalayer::page::fuzz::scrape_is_total),
        ("snapshot", 6, ingest::snapshot::fuzz::is_total),
    ];
    for (target, least, holds) in targets {
        let mut files = 0;
        for entry in fs::read_dir(corpora.join(target)).unwrap() {
            holds(&fs::read(entry.unwrap().path()).unwrap());
            files += 1;
        }
        assert!(files >= least, "{files} files of {target}");
    }
    let known = fs::read_dir(corpora).unwrap().count();
    assert_eq!(known, targets.len(), "a corpus of no target");
}
