//! A file that lists pods, looked at again and again.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use serde::Deserialize;

use super::{EndpointUse, MAX_BLOCK_SIZE, MAX_POD_ID_BYTES, MAX_RANK};
use crate::{
    ingest::{fleet::PodDeclaration, loss::LossPolicy},
    model::CountMode,
    support::watched::WatchedFile,
};

/// Longest file that is read, bytes: tens of thousands of pods.
const MAX_FILE: u64 = 8 << 20;

/// A pod in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Entry {
    id: String,
    #[serde(default)]
    endpoint: String,
    replay_endpoint: Option<String>,
    model: Option<String>,
    rank: Option<u32>,
    #[serde(default)]
    topic_filter: String,
    #[serde(default)]
    engine: String,
    engine_version: Option<String>,
    #[serde(default)]
    trust_unchained: bool,
    #[serde(default)]
    count_mode: CountModeName,
    block_size: Option<u32>,
    #[serde(default)]
    first_sequence: u64,
    loss_policy: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
enum CountModeName {
    #[default]
    Counted,
    Set,
}

/// A YAML or JSON list of pods, re-read when it changes.
///
/// Fields of a pod, as under `pods` of the configuration: `id` (required), `endpoint` (required if
/// there is no bound socket that the pod could connect to), `replayEndpoint`, `model`, `rank`,
/// `topicFilter`, `engine` (`vllm`, `sglang`), `engineVersion`, `trustUnchained`, `countMode`
/// (`counted`, `set`), `blockSize`, `firstSequence`, `lossPolicy` (`keep`, `age-out`, `clear`); their meaning is that of [`PodDeclaration`].
#[derive(Debug)]
pub struct PodsFile {
    file: WatchedFile,
    bound: bool,
}

impl PodsFile {
    /// Watches `path`. Nothing is read yet. With `bound` there is a socket that pods without endpoint
    /// may connect to.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, bound: bool) -> Self {
        Self { file: WatchedFile::new(path, MAX_FILE), bound }
    }

    /// The path given.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The pods if the file changed since the last call, none if not. The first call reads it.
    ///
    /// Blocks for as long as the file system takes.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is wrong: once per change, so that a caller that polls can
    /// log every error and keep its last good list.
    pub fn changed(&mut self) -> anyhow::Result<Option<Vec<PodDeclaration>>> {
        let bound = self.bound;
        let place = format!("reading {}", self.file.path().display());
        let content = self.file.changed().with_context(|| place.clone())?;
        content.map(|content| parse(content, bound)).transpose().context(place)
    }
}

/// Reads a list of pods.
fn parse(content: &str, bound: bool) -> anyhow::Result<Vec<PodDeclaration>> {
    // A file cut short by its writer is not a fleet without pods; that is `[]`.
    ensure!(!content.trim().is_empty(), "empty; a list without pods is []");
    let entries: Vec<Entry> = serde_saphyr::from_str(content)?;
    let mut known = HashSet::new();
    for (at, entry) in entries.iter().enumerate() {
        let place = || format!("pod {at} ({:?})", entry.id);
        check(entry, bound).map_err(anyhow::Error::msg).with_context(place)?;
        ensure!(known.insert((&entry.id, entry.rank)), "{}: listed twice", place());
    }
    Ok(entries.into_iter().map(PodDeclaration::from).collect())
}

/// The rules of `pods` in the configuration.
fn check(entry: &Entry, bound: bool) -> Result<(), String> {
    match entry.id.len() {
        0 => return Err("id is empty".to_owned()),
        1..=MAX_POD_ID_BYTES => {}
        len => return Err(format!("id has {len} bytes; at most {MAX_POD_ID_BYTES} are legal")),
    }
    if !(bound && entry.endpoint.is_empty()) {
        super::check("endpoint", &entry.endpoint, EndpointUse::ConnectOrAsk)?;
    }
    if let Some(replay) = &entry.replay_endpoint {
        super::check("replayEndpoint", replay, EndpointUse::Connect)?;
    }
    for (name, text) in [("model", &entry.model), ("engineVersion", &entry.engine_version)] {
        if text.as_ref().is_some_and(String::is_empty) {
            return Err(format!("{name} is empty"));
        }
    }
    if let Some(rank) = entry.rank.filter(|&rank| rank > MAX_RANK) {
        return Err(format!("rank {rank} is over {MAX_RANK}"));
    }
    if let Some(size) = entry.block_size.filter(|&s| !(1..=MAX_BLOCK_SIZE).contains(&s.into())) {
        return Err(format!("blockSize {size} is not in 1..={MAX_BLOCK_SIZE}"));
    }
    if let Some(name) = entry.loss_policy.as_deref().filter(|name| policy(name).is_none()) {
        return Err(format!("lossPolicy {name:?} is none of keep, age-out and clear"));
    }
    if !matches!(entry.engine.as_str(), "" | "vllm" | "sglang") {
        return Err(format!("engine {:?} is neither vllm nor sglang", entry.engine));
    }
    Ok(())
}

fn policy(name: &str) -> Option<LossPolicy> {
    LossPolicy::NAMES.iter().find(|(known, _)| *known == name).map(|(_, policy)| *policy)
}

impl From<Entry> for PodDeclaration {
    fn from(entry: Entry) -> Self {
        Self {
            pod: entry.id,
            endpoint: entry.endpoint,
            replay_endpoint: entry.replay_endpoint,
            model: entry.model,
            rank: entry.rank,
            topic_filter: entry.topic_filter,
            engine: entry.engine,
            engine_version: entry.engine_version,
            trust_unchained: entry.trust_unchained,
            count_mode: match entry.count_mode {
                CountModeName::Counted => CountMode::Counted,
                CountModeName::Set => CountMode::Set,
            },
            block_size: entry.block_size,
            first_sequence: entry.first_sequence,
            loss_policy: entry.loss_policy.as_deref().and_then(policy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = "
- id: 10.0.0.1:8000
  endpoint: tcp://10.0.0.1:5557
  replayEndpoint: tcp://10.0.0.1:5558
  model: meta/llama
  rank: 1
  topicFilter: kv@
  engine: sglang
  engineVersion: 0.5.23
  trustUnchained: true
  countMode: set
  lossPolicy: age-out
  blockSize: 16
  firstSequence: 1
- id: b
  endpoint: http://b:8000
";

    #[test]
    fn every_field_is_read() {
        let pods = parse(FULL, false).unwrap();
        assert_eq!(
            pods[0],
            PodDeclaration {
                pod: "10.0.0.1:8000".to_owned(),
                endpoint: "tcp://10.0.0.1:5557".to_owned(),
                replay_endpoint: Some("tcp://10.0.0.1:5558".to_owned()),
                model: Some("meta/llama".to_owned()),
                rank: Some(1),
                topic_filter: "kv@".to_owned(),
                engine: "sglang".to_owned(),
                engine_version: Some("0.5.23".to_owned()),
                trust_unchained: true,
                count_mode: CountMode::Set,
                block_size: Some(16),
                first_sequence: 1,
                loss_policy: Some(LossPolicy::AgeOut),
            }
        );
        let json = r#"[{"id": "b", "endpoint": "http://b:8000"}]"#;
        assert_eq!(parse(json, false).unwrap(), pods[1..]);
        assert_eq!(parse("[]", false).unwrap(), []);
        let ipc = "- {id: a, endpoint: 'ipc:///tmp/kv', replayEndpoint: 'ipc:///tmp/replay'}";
        assert_eq!(parse(ipc, false).unwrap()[0].endpoint, "ipc:///tmp/kv");
        // Unquoted, they look like numbers.
        let plain = parse("- {id: 7, endpoint: 'tcp://a:1', engineVersion: 0.30}", false).unwrap();
        assert_eq!(
            (plain[0].pod.as_str(), plain[0].engine_version.as_deref()),
            ("7", Some("0.30"))
        );
    }

    #[test]
    fn an_endpoint_is_needed_unless_there_is_a_bound_socket() {
        for content in ["- id: a", "- {id: a, endpoint: ''}"] {
            assert_eq!(parse(content, true).unwrap()[0].endpoint, "");
            let error = format!("{:#}", parse(content, false).unwrap_err());
            assert!(error.contains("endpoint"), "{error}");
        }
        assert!(parse("- {id: a, endpoint: 'a:1'}", true).is_err());
    }

    #[test]
    fn mistakes_are_named() {
        for (content, why) in [
            ("", "empty"),
            ("id: a", "sequence"),
            ("- id: a", "endpoint"),
            ("- {id: a, endpoint: 'tcp://a:1', port: 1}", "port"),
            ("- {id: '', endpoint: 'tcp://a:1'}", "id is empty"),
            ("- {id: a, endpoint: 'a:1'}", "pod 0 (\"a\"): endpoint \"a:1\": no scheme"),
            ("- {id: a, endpoint: 'tcp://*:1'}", "to bind"),
            (&format!("- {{id: {}, endpoint: 'tcp://a:1'}}", "a".repeat(513)), "513 bytes"),
            ("- {id: a, endpoint: 'tcp://a:1', rank: 65536}", "rank"),
            ("- {id: a, endpoint: 'tcp://a:1', engineVersion: ''}", "engineVersion"),
            ("- {id: a, endpoint: 'tcp://a:1', blockSize: 65537}", "blockSize"),
            ("- {id: a, endpoint: 'tcp://a:1', engine: trt}", "neither vllm nor sglang"),
            ("- {id: a, endpoint: 'tcp://a:1', countMode: both}", "both"),
            ("- {id: a, endpoint: 'tcp://a:1', lossPolicy: never}", "never"),
            ("- {id: a, endpoint: 'tcp://a:1', blockSize: 0}", "blockSize"),
            ("- {id: a, endpoint: 'tcp://a:1', replayEndpoint: 'http://a:2'}", "replayEndpoint"),
            ("[{id: a, endpoint: 'tcp://a:1'}, {id: a, endpoint: 'tcp://a:2'}]", "pod 1"),
        ] {
            let error = format!("{:#}", parse(content, false).unwrap_err());
            assert!(error.contains(why), "{content}: {error}");
        }
    }

    #[test]
    fn changes_are_noticed_and_errors_reported_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pods.yaml");
        let mut file = PodsFile::new(&path, false);
        assert!(file.changed().is_err());
        assert_eq!(file.changed().unwrap(), None);
        std::fs::write(&path, FULL).unwrap();
        assert_eq!(file.changed().unwrap().unwrap().len(), 2);
        assert_eq!(file.changed().unwrap(), None);
        // The same length, and maybe the same timestamp.
        std::fs::write(&path, FULL.replace("id: b", "id: c")).unwrap();
        assert_eq!(file.changed().unwrap().unwrap()[1].pod, "c");
        std::fs::write(&path, "- id: [").unwrap();
        let error = format!("{:#}", file.changed().unwrap_err());
        assert!(error.contains("pods.yaml"), "{error}");
        assert_eq!(file.changed().unwrap(), None);
        std::fs::write(&path, FULL).unwrap();
        assert_eq!(file.changed().unwrap().unwrap().len(), 2);
        std::fs::remove_file(&path).unwrap();
        assert!(file.changed().is_err());
        std::fs::write(&path, FULL).unwrap();
        assert_eq!(file.changed().unwrap().unwrap().len(), 2);
    }
}
