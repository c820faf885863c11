//! What ARCHITECTURE.md says about the source, held by reading the source: who imports whom, which
//! modules know which crate, and that docs/metrics.md lists the metrics that exist.
//!
//! A new edge between modules is a line in [`MAY_IMPORT`], so that it is seen in review.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Every module of the library, and the modules that it may name.
const MAY_IMPORT: [(&str, &[&str]); 11] = [
    ("epp", &["hash", "index", "ingest", "model", "proto", "support", "tokenize"]),
    ("indexer", &["hash", "index", "ingest", "model", "proto", "support", "tokenize"]),
    ("loadgen", &["proto", "support", "tokenize", "wire"]),
    ("tokenize", &["hash", "support"]),
    ("ingest", &["hash", "index", "model", "support", "wire"]),
    ("index", &["hash", "model"]),
    ("wire", &["model"]),
    ("hash", &["model"]),
    ("model", &[]),
    ("proto", &[]),
    ("support", &[]),
];

/// Crates that do I/O or stand for a protocol, and the modules that may know them. The binaries may
/// know all of them.
const MAY_KNOW: [(&str, &[&str]); 6] = [
    ("hyper", &["epp", "indexer", "ingest", "loadgen", "support", "tokenize"]),
    ("prometheus", &["epp", "indexer", "ingest", "support", "tokenize"]),
    ("tokio", &["epp", "indexer", "ingest", "loadgen", "support", "tokenize"]),
    ("tonic", &["epp", "indexer", "loadgen", "proto", "tokenize"]),
    ("tracing", &["epp", "indexer", "ingest", "loadgen", "support", "tokenize"]),
    ("zmq", &["ingest", "loadgen"]),
];

/// One file of `src`.
struct Source {
    path: PathBuf,
    /// `ingest` for `ingest.rs` and everything below `ingest/`; `bin`; `lib`.
    module: String,
    /// Its text without comments.
    code: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let mut found = Vec::new();
    let mut folders = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(&src).unwrap();
                let module = inside.with_extension("").iter().next().unwrap().to_owned();
                let code = without_comments(&fs::read_to_string(&path).unwrap());
                found.push(Source { module: module.into_string().unwrap(), code, path });
            }
        }
    }
    assert!(found.len() > 50, "only {} files below {}", found.len(), src.display());
    found
}

/// Drops `//` comments; what follows a URL in the same line goes with them.
fn without_comments(text: &str) -> String {
    text.lines().flat_map(|line| [line.split("//").next().unwrap_or_default(), "\n"]).collect()
}

/// Is this part of a name?
fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn first_word(text: &str) -> &str {
    text.split(|c| !is_word(c)).next().unwrap_or_default()
}

/// The modules named by `crate::…` paths, those of `crate::{…}` groups included.
fn modules_named(code: &str) -> BTreeSet<&str> {
    let mut named = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        // `$crate::` and `other_crate::` are not ours to judge.
        if code[..at].ends_with(|c| is_word(c) || c == '$') {
            continue;
        }
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            None => _ = named.insert(first_word(rest)),
            Some(group) => named.extend(group_heads(group)),
        }
    }
    named.remove("");
    named
}

/// The first word of each element of a `use` group, whose opening brace is gone.
fn group_heads(group: &str) -> Vec<&str> {
    let mut heads = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, c) in group.char_indices() {
        let ends = c == ',' || c == '}';
        if ends && depth == 0 {
            heads.push(first_word(group[start..at].trim_start()));
            start = at + 1;
        }
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            _ => {}
        }
    }
    heads
}

/// Does the code use this crate, as `name::…`?
fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(&format!("{name}::")).any(|(at, _)| {
        let before = &code[..at];
        // `a::name::b` is a module of that name; `::name::b` is the crate.
        let part_of_a_path = before.strip_suffix("::").is_some_and(|b| b.ends_with(is_word));
        !before.ends_with(is_word) && !part_of_a_path
    })
}

#[test]
fn modules_import_downwards_only() {
    let table: BTreeMap<&str, &[&str]> = MAY_IMPORT.into_iter().collect();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.module != "bin" && source.module != "lib")
    {
        let Some(allowed) = table.get(source.module.as_str()) else {
            wrong.push(format!("{}: no row for {}", source.path.display(), source.module));
            continue;
        };
        for named in modules_named(&source.code) {
            if named != source.module && !allowed.contains(&named) {
                wrong.push(format!("{}: names crate::{named}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "not in the table of imports:\n{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    let mut done: BTreeSet<&str> = BTreeSet::new();
    while done.len() < MAY_IMPORT.len() {
        let next = MAY_IMPORT.iter().find(|(module, below)| {
            !done.contains(module) && below.iter().all(|below| done.contains(below))
        });
        done.insert(next.expect("a cycle, or a module without a row").0);
    }
}

#[test]
fn only_some_modules_know_sockets_and_runtimes() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.module != "bin") {
        for (name, allowed) in MAY_KNOW {
            if names_crate(&source.code, name) && !allowed.contains(&source.module.as_str()) {
                wrong.push(format!("{}: uses {name}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "crates where they do not belong:\n{}", wrong.join("\n"));
}

#[test]
fn imports_are_read_as_the_compiler_reads_them() {
    #[track_caller]
    fn check(code: &str, want: &[&str]) {
        let code = without_comments(code);
        assert_eq!(modules_named(&code), want.iter().copied().collect(), "{code}");
    }
    check("use crate::wire::Event;", &["wire"]);
    check("use crate::{model, hash::Scheme};", &["hash", "model"]);
    check("use crate::{\n    index::{BlockIndex, Store},\n    wire,\n};", &["index", "wire"]);
    check("use crate::{a::{b::{c, d}, e}, f::{g}}; fn h(_: crate::i::J) {}", &["a", "f", "i"]);
    check("fn f() -> &'static str { crate::model::name() } // crate::wire", &["model"]);
    check("/// See [`Scheme`](crate::hash::Scheme).\nstruct A;", &[]);
    check("macro_rules! m { () => { $crate::index::x() } } my_crate::y();", &[]);

    assert!(names_crate("use zmq;\nlet a: zmq::Socket;", "zmq"));
    assert!(names_crate("use {tokio::sync, zmq::Context};", "zmq"));
    assert!(names_crate("::zmq::poll()", "zmq"));
    assert!(!names_crate("use crate::zmq::Socket; libzmq::x()", "zmq"));
}

/// How the names of metrics begin: the indexer's, every process's, the endpoint picker's own, and
/// those that it has from the Go EPP, new and old.
const PREFIXES: [&str; 8] = [
    "kv_",
    "process_",
    "epp_",
    "llm_d_epp_",
    "inference_objective_",
    "inference_pool_",
    "inference_extension_",
    "llm_d_inference_scheduler_",
];

/// Names of metrics as the sources register them.
fn registered() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for source in sources() {
        let path = source.path.to_string_lossy().replace('\\', "/");
        let registers = path.contains("/metrics")
            || path.contains("/epp/plugins/")
            || path.contains("/epp/precise/")
            || path.contains("/tokenize/")
            || path.ends_with("/indexer/run.rs");
        if !registers || path.ends_with("/tests.rs") {
            continue;
        }
        let code = source.code.split("#[cfg(test)]").next().unwrap_or_default();
        for literal in code.split('"').skip(1).step_by(2).filter(|text| text.chars().all(is_word)) {
            if literal.starts_with("tokenize_") || literal.starts_with("token_cache_") {
                names.extend(["kv", "epp"].map(|process| format!("{process}_{literal}")));
                continue;
            }
            let ours = PREFIXES.iter().any(|prefix| literal.starts_with(prefix));
            if ours && !literal.ends_with('_') {
                names.insert(literal.to_owned());
            } else if literal.starts_with("index_") || literal.starts_with("events_") {
                names.insert(format!("llm_d_epp_kv_cache_{literal}"));
            }
        }
    }
    names
}

/// Names of metrics in docs/metrics.md.
fn documented(text: &str) -> BTreeSet<String> {
    let words = text.split(|c| !is_word(c));
    let names =
        words.filter(|word| PREFIXES.iter().any(|p| word.len() > p.len() && word.starts_with(p)));
    names.map(|name| name.trim_end_matches("_bucket").to_owned()).collect()
}

#[test]
fn every_metric_is_documented_and_exists() {
    let page: &Path = &root().join("docs/metrics.md");
    let (code, docs) = (registered(), documented(&fs::read_to_string(page).unwrap()));
    assert!(code.len() > 40, "only found {code:?}");
    let missing: Vec<_> = code.difference(&docs).collect();
    let invented: Vec<_> = docs.difference(&code).collect();
    assert!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
    assert!(invented.is_empty(), "in docs/metrics.md, but nothing registers them: {invented:?}");
}
