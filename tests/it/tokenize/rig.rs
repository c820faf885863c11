//! What `tests/run` installs for these tests, and directories of models made of it.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use kv_indexer::tokenize::{Local, models::LocalConfig};
use prometheus::Registry;
use tempfile::TempDir;

/// Names the folder of tokenizers to use in place of the installed ones.
const TOKENIZERS_VARIABLE: &str = "KV_INDEXER_TOKENIZERS";
/// Names the Python that has `transformers`, in place of the installed one.
const PYTHON_VARIABLE: &str = "KV_INDEXER_TRANSFORMERS_PYTHON";
/// 5 August 2025, noon: the time of `make.py`.
const NOON: u64 = 1_754_395_200;

/// Model, folder of its tokenizer, template of ours: as in `make.py`.
const MODELS: [(&str, &str, Option<&str>); 5] = [
    ("qwen3", "qwen3", None),
    ("llama3_1", "llama3_1", None),
    ("deepseek_v3", "deepseek_v3", None),
    ("gptoss", "gptoss", Some("harmony")),
    ("llama-parts", "llama3_1", Some("parts")),
];

/// The folder of this test's fixtures.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenize")
}

/// The folder with a directory for each tokenizer.
#[track_caller]
pub(crate) fn tokenizers() -> PathBuf {
    installed(TOKENIZERS_VARIABLE, "tokenizers")
}

/// The Python that has `transformers`.
#[track_caller]
pub(crate) fn python() -> PathBuf {
    installed(PYTHON_VARIABLE, "transformers/bin/python")
}

/// What the variable names, or else what `tests/run` put below the target folder.
#[track_caller]
fn installed(variable: &str, path: &str) -> PathBuf {
    let named = env::var_os(variable).map(PathBuf::from);
    let installed = Path::new(env!("CARGO_BIN_EXE_kv-indexer"))
        .ancestors()
        .map(|folder| folder.join("tools").join(path))
        .find(|path| path.exists());
    match named.or(installed) {
        Some(path) => path,
        None => panic!("no tools/{path}: run tests/run, or name it in {variable}"),
    }
}

/// A folder with a directory for each model.
pub(crate) fn models() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, tokenizer, template) in MODELS {
        let directory = folder.path().join(name);
        fs::create_dir(&directory).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let from = tokenizers().join(tokenizer).join(file);
            assert!(from.is_file(), "{} is missing; run tests/run", from.display());
            symlink(from, directory.join(file)).unwrap();
        }
        if let Some(template) = template {
            let from = fixtures().join("templates").join(format!("{template}.jinja"));
            symlink(from, directory.join("chat_template.jinja")).unwrap();
        }
    }
    folder
}

/// All models, at [`NOON`]; loaded once.
pub(crate) fn local() -> &'static Local {
    static LOCAL: LazyLock<Local> = LazyLock::new(|| {
        let folder = models();
        let config =
            LocalConfig { models_dir: Some(folder.path().to_owned()), ..LocalConfig::default() };
        let clock: kv_indexer::tokenize::template::Clock = Arc::new(|| NOON);
        Local::load_with_clock(&config, &Registry::new(), "test", &clock).unwrap()
    });
    &LOCAL
}
