//! Mock engines as other people's applications see them: driven by the real `openai` package of Python,
//! which `tests/run` installs.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::Program;

/// Names the Python that has `openai`, in place of the installed one.
const PYTHON_VARIABLE: &str = "KV_INDEXER_OPENAI_PYTHON";

/// What the variable names, or else what `tests/run` put below the target folder.
#[track_caller]
pub(crate) fn python() -> PathBuf {
    let named = env::var_os(PYTHON_VARIABLE).map(PathBuf::from);
    let installed = Path::new(env!("CARGO_BIN_EXE_loadgen"))
        .ancestors()
        .map(|folder| folder.join("tools/openai/bin/python"))
        .find(|path| path.exists());
    match named.or(installed) {
        Some(path) => path,
        None => panic!("no tools/openai: run tests/run, or name a Python in {PYTHON_VARIABLE}"),
    }
}

#[test]
fn the_openai_package_gets_on_with_an_engine() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadgen"));
    command.args(["engine", "--model", "mock", "--lora", "tuned", "--block-size", "4"]);
    let mut engine = Program::start("engine", command);
    let http = engine.announced("http listening on ");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/openai_client.py");
    let ran = Command::new(python()).arg(script).arg(format!("http://{http}")).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}\n{}", String::from_utf8_lossy(&ran.stderr));
    assert!(said.starts_with("ok"), "{said}");
    engine.finish();
}
