//! Everything that fuzzers were seeded with, or have found, on a stable compiler.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::{fs, path::Path};

use self::targets::TARGETS;

#[test]
fn fuzz_corpora_hold() {
    let corpora = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus"));
    for (target, least, holds) in TARGETS {
        let mut files = 0;
        for entry in fs::read_dir(corpora.join(target)).unwrap() {
            holds(&fs::read(entry.unwrap().path()).unwrap());
            files += 1;
        }
        assert!(files >= least, "{files} files of {target}");
    }
    let known = fs::read_dir(corpora).unwrap().count();
    assert_eq!(known, TARGETS.len(), "a corpus of no target");
}
