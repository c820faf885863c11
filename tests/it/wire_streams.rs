//! Recorded streams, decoded by us and by `rmpv` with another reading of the wire: every field of
//! every event must agree.
//!
//! Walks `tests/fixtures/**/*.jsonl` and `*.jsonl.gz`; `WIRE_STREAMS=/some/dir` walks that instead.

#![expect(
    clippy::panic,
    reason = "helpers of tests; allow-panic-in-tests sees only #[test] bodies"
)]

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use kv_indexer::{
    model::ExtraKey,
    wire::{BatchReader, Event, Frames, Limits, ReplayReply, Scratch, Topic},
};
use rmpv::Value;

/// Streams below `dir`, without the malformed cases.
fn streams(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if name != "malformed" {
                streams(&path, found);
            }
        } else if name.ends_with(".jsonl") || name.ends_with(".jsonl.gz") {
            found.push(path);
        }
    }
}

fn read(path: &Path) -> String {
    let mut text = String::new();
    let mut file = fs::File::open(path).unwrap();
    if path.extension().is_some_and(|extension| extension == "gz") {
        flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    } else {
        file.read_to_string(&mut text).unwrap();
    }
    text
}

fn bytes(value: &serde_json::Value) -> Vec<u8> {
    BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap()
}

#[test]
fn recorded_streams_agree_with_another_decoder() {
    let root = std::env::var_os("WIRE_STREAMS").map_or_else(
        || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).to_path_buf(),
        PathBuf::from,
    );
    let mut paths = Vec::new();
    streams(&root, &mut paths);
    assert!(!paths.is_empty());
    let mut scratch = Scratch::default();
    for path in paths {
        let (mut batches, mut events, mut ends) = (0, 0, 0);
        let is_replay = path.to_str().unwrap().contains(".replay.");
        for line in read(&path).lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let frames: Vec<Vec<u8>> = match line["frames_b64"].as_array() {
                Some(frames) => frames.iter().map(bytes).collect(),
                None => vec![
                    line["topic"].as_str().unwrap().into(),
                    line["seq"].as_u64().unwrap().to_be_bytes().into(),
                    bytes(&line["payload_b64"]),
                ],
            };
            let payload = if is_replay {
                match ReplayReply::parse(&frames).unwrap() {
                    ReplayReply::Batch { payload, .. } => payload,
                    ReplayReply::End => {
                        ends += 1;
                        continue;
                    }
                }
            } else {
                let live = Frames::split(&frames).unwrap();
                Topic::parse(live.topic, 256).unwrap();
                assert_eq!(Some(live.sequence), line["seq"].as_u64());
                live.payload
            };
            events += compare(payload, line["rank"].as_u64(), &mut scratch, &path);
            batches += 1;
        }
        assert!(batches > 0 && events > 0, "{}", path.display());
        assert_eq!(ends > 0, is_replay, "{}", path.display());
    }
}

/// Checks one batch; returns how many events it has.
fn compare(payload: &[u8], rank: Option<u64>, scratch: &mut Scratch, path: &Path) -> usize {
    let value = rmpv::decode::read_value(&mut &*payload).unwrap();
    let batch = value.as_array().unwrap();
    let mut reader = BatchReader::new(payload, &Limits::default()).unwrap();
    let header = *reader.header();
    assert_eq!(Some(header.timestamp), batch[0].as_f64());
    let on_wire = batch.get(2).and_then(Value::as_u64);
    assert_eq!(header.rank.map(u64::from), on_wire);
    if on_wire.is_some() && rank.is_some() {
        assert_eq!(on_wire, rank);
    }
    let events = batch[1].as_array().unwrap();
    assert_eq!(header.events, events.len());
    for (number, event) in events.iter().enumerate() {
        let got = reader.next_event(scratch).unwrap();
        let got = got.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let wire = Wire(event);
        match (wire.tag(), &got) {
            ("AllBlocksCleared", Event::Cleared) => {}
            ("BlockRemoved", Event::Removed(removed)) => {
                assert!(removed.block_hashes.iter().map(|key| key.0).eq(wire.hashes(1)));
                assert_eq!(removed.medium, wire.text(2, "medium"));
                assert_eq!(removed.group.map(u64::from), wire.int(3, "group_idx"));
                assert_eq!(removed.locality, wire.text(usize::MAX, "locality"));
            }
            ("BlockStored", Event::Stored(stored)) => {
                assert!(stored.block_hashes.iter().map(|key| key.0).eq(wire.hashes(1)));
                let parent = wire.get(2, "parent_block_hash").map(hash);
                assert_eq!(stored.parent.map(|key| key.0), parent);
                let tokens = wire.get(3, "token_ids").unwrap().as_array().unwrap();
                assert!(stored.tokens.iter().map(|&token| u64::from(token)).eq(tokens.iter().map(
                    |token| match token {
                        Value::Array(pair) => pair[0].as_u64().unwrap(),
                        token => token.as_u64().unwrap(),
                    }
                )));
                assert_eq!(Some(u64::from(stored.block_size)), wire.int(4, "block_size"));
                assert_eq!(stored.lora_id, wire.int(5, "lora_id"));
                assert_eq!(stored.medium, wire.text(6, "medium"));
                assert_eq!(stored.lora_name, wire.text(7, "lora_name"));
                assert_eq!(stored.group.map(u64::from), wire.int(9, "group_idx"));
                assert_eq!(stored.kind, wire.text(10, "kv_cache_spec_kind"));
                let window = wire.int(11, "kv_cache_spec_sliding_window");
                assert_eq!(stored.sliding_window.map(u64::from), window);
                assert_eq!(stored.locality, wire.text(usize::MAX, "locality"));
                assert_eq!(stored.cache_salt, wire.salt());
                let extra = stored.extra_keys.map(|extra| {
                    extra.blocks().map(|block| block.map(extra_value).collect()).collect()
                });
                assert_eq!(extra, wire.extra());
            }
            (tag, got) => panic!("{}: event {number} {tag}: {got:?}", path.display()),
        }
    }
    assert_eq!(reader.next_event(scratch), None);
    events.len()
}

fn hash(value: &Value) -> u64 {
    match value {
        Value::Binary(bytes) => {
            u64::from_str_radix(&hex(&bytes[bytes.len().saturating_sub(8)..]), 16).unwrap()
        }
        value => value.as_u64().or(value.as_i64().map(|hash| hash as u64)).unwrap(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Our view of an input as `rmpv` would show it.
fn extra_value(key: ExtraKey<'_>) -> Value {
    match key {
        ExtraKey::Text(text) => text.into(),
        ExtraKey::Item { id, offset } => Value::Array(vec![id.into(), offset.into()]),
        ExtraKey::Bytes(bytes) => bytes.into(),
    }
}

/// An event of either form, read by position or by key.
struct Wire<'a>(&'a Value);

impl<'a> Wire<'a> {
    /// The field, unless it is absent or nil.
    fn get(&self, position: usize, key: &str) -> Option<&'a Value> {
        let value = match self.0 {
            Value::Array(fields) => fields.get(position)?,
            Value::Map(pairs) => &pairs.iter().find(|(known, _)| known.as_str() == Some(key))?.1,
            other => panic!("{other:?}"),
        };
        Some(value).filter(|value| !value.is_nil())
    }

    fn tag(&self) -> &'a str {
        self.get(0, "type").unwrap().as_str().unwrap()
    }

    fn hashes(&self, position: usize) -> impl Iterator<Item = u64> {
        self.get(position, "block_hashes").unwrap().as_array().unwrap().iter().map(hash)
    }

    fn text(&self, position: usize, key: &str) -> Option<&'a str> {
        self.get(position, key).filter(|value| !value.is_map()).map(|text| text.as_str().unwrap())
    }

    fn int(&self, position: usize, key: &str) -> Option<u64> {
        self.get(position, key).map(|value| value.as_u64().unwrap())
    }

    /// SGLang's salt: a key, or in a map at the end of an array.
    fn salt(&self) -> Option<&'a str> {
        match self.0 {
            Value::Array(fields) => Wire(fields.get(7).filter(|last| last.is_map())?).salt(),
            _ => self.text(usize::MAX, "cache_salt"),
        }
    }

    fn extra(&self) -> Option<Vec<Vec<Value>>> {
        let blocks = self.get(8, "extra_keys")?.as_array().unwrap();
        let keys = |block: &Value| block.as_array().cloned().unwrap_or_default();
        blocks.iter().any(Value::is_array).then(|| blocks.iter().map(keys).collect())
    }
}
