//! Makes the negative controls: the engine's own source with one thing broken each. A change of
//! the source that leaves a control without its place fails the build.

use std::{env, fs, path::Path};

/// Module, what is broken, and by what it is replaced.
const SEQLOCK: &[(&str, &str, &str)] = &[
    ("lock_has_no_fence", "fence(Ordering::Release);", ""),
    ("lock_is_relaxed", "version + 1, Ordering::Acquire", "version + 1, Ordering::Relaxed"),
    ("lock_does_not_wait", "let free = version & 1 == 0;", "let free = true;"),
    ("unlock_is_relaxed", "(version + 2, Ordering::Release)", "(version + 2, Ordering::Relaxed)"),
    ("begin_is_relaxed", "word.load(Ordering::Acquire)", "word.load(Ordering::Relaxed)"),
    ("begin_does_not_wait", "if version & 1 == 0 {", "if true {"),
    ("unchanged_has_no_fence", "fence(Ordering::Acquire);", ""),
    ("version_is_not_compared", "word.load(Ordering::Relaxed) == version", "true"),
];

const HEADS: &[(&str, &str, &str)] = &[
    ("insert_is_relaxed", "store(word, Ordering::Release)", "store(word, Ordering::Relaxed)"),
    ("search_is_relaxed", "slot.load(Ordering::Acquire)", "slot.load(Ordering::Relaxed)"),
    ("search_ends_at_tombstones", "|&word| word != EMPTY", "|&word| word as u32 + 1 > 1"),
    ("remove_leaves_no_tombstone", "slot.store(TOMBSTONE,", "slot.store(EMPTY,"),
    ("copy_is_empty", "new.insert((word >> 32) as u32, word as u32 - 1);", ""),
];

fn main() {
    let runs = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../src/index/runs");
    let mut broken = String::new();
    for (file, controls) in [("seqlock.rs", SEQLOCK), ("heads.rs", HEADS)] {
        let path = runs.join(file);
        println!("cargo::rerun-if-changed={}", path.display());
        let source = fs::read_to_string(&path).unwrap();
        let source = source.split("#[cfg(all(test").next().unwrap();
        for (name, from, to) in controls {
            assert_eq!(
                source.matches(from).count(),
                1,
                "{file}, {name}: {from:?} is not there once"
            );
            broken += &format!("#[allow(warnings)]\nmod {name} {{\n");
            for line in source.replace(from, to).lines().filter(|line| !line.starts_with("//!")) {
                broken += line;
                broken.push('\n');
            }
            broken += "}\n";
        }
    }
    fs::write(Path::new(&env::var("OUT_DIR").unwrap()).join("broken.rs"), broken).unwrap();
}
