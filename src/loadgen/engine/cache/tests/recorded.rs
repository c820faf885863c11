//! Recorded streams as the comparison needs them, read by an own decoder.

use std::{collections::HashMap, path::PathBuf};

use rmpv::Value;

use crate::loadgen::recording::Recording;

/// Where the fixtures are.
pub(super) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// One event; blocks by the order in which their hashes first appear in stores.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Told {
    Stored(Stored),
    Removed(usize),
    Cleared,
}

/// A store, without what does not change within a stream.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    pub(super) blocks: Vec<usize>,
    pub(super) parent: Option<usize>,
    pub(super) tokens: Vec<u32>,
    /// Numeric adapter id and, where the version writes it, its name.
    pub(super) lora: (Option<u64>, Option<String>),
    /// As text; absent where the version does not write them.
    pub(super) extras: Option<Vec<Option<Vec<String>>>>,
}

/// One rank's stream.
pub(super) struct Stream {
    pub(super) rank: u32,
    /// Events of each batch.
    pub(super) batches: Vec<Vec<Told>>,
    /// Payloads, to be compared byte by byte.
    pub(super) payloads: Vec<Vec<u8>>,
    /// Tokens of each block.
    pub(super) tokens: Vec<Vec<u32>>,
    /// Hash of each block as it was on the wire.
    pub(super) hashes: Vec<Value>,
}

/// Fields in the order of the array form.
const STORED: [&str; 11] = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
];
const REMOVED: [&str; 3] = ["block_hashes", "medium", "group_idx"];

/// Reads all ranks of a recorded file.
pub(super) fn streams(file: &str) -> Vec<Stream> {
    let recording = Recording::open(&fixture(file)).unwrap();
    recording.ranks.iter().map(|rank| stream(rank.rank, &rank.batches)).collect()
}

fn stream(rank: u32, batches: &[crate::loadgen::recording::Batch]) -> Stream {
    let mut numbers: HashMap<String, usize> = HashMap::new();
    let mut stream = Stream {
        rank,
        batches: Vec::new(),
        payloads: batches.iter().map(|batch| batch.payload.clone()).collect(),
        tokens: Vec::new(),
        hashes: Vec::new(),
    };
    for batch in batches {
        let value = rmpv::decode::read_value(&mut batch.payload.as_slice()).unwrap();
        let mut told = Vec::new();
        for event in value.as_array().unwrap()[1].as_array().unwrap() {
            let (kind, fields) = fields(event);
            let list = |name: &str| fields[name].as_array().unwrap().clone();
            match kind.as_str() {
                "AllBlocksCleared" => told.push(Told::Cleared),
                "BlockRemoved" => {
                    for hash in list("block_hashes") {
                        told.push(Told::Removed(numbers[&hash.to_string()]));
                    }
                }
                "BlockStored" => {
                    let all: Vec<u32> =
                        list("token_ids").iter().map(|it| it.as_u64().unwrap() as u32).collect();
                    let size = fields["block_size"].as_u64().unwrap() as usize;
                    let hashes = list("block_hashes");
                    assert_eq!(all.len(), size * hashes.len());
                    let mut blocks = Vec::new();
                    for (hash, tokens) in hashes.iter().zip(all.chunks(size)) {
                        let next = numbers.len();
                        let number = *numbers.entry(hash.to_string()).or_insert(next);
                        if number == next {
                            stream.tokens.push(tokens.to_vec());
                            stream.hashes.push(hash.clone());
                        }
                        blocks.push(number);
                    }
                    let set = |name| fields.get(name).filter(|it: &&Value| !it.is_nil());
                    told.push(Told::Stored(Stored {
                        blocks,
                        parent: set("parent_block_hash").map(|hash| numbers[&hash.to_string()]),
                        tokens: all,
                        lora: (
                            set("lora_id").map(|id| id.as_u64().unwrap()),
                            set("lora_name").map(|name| name.as_str().unwrap().to_owned()),
                        ),
                        extras: set("extra_keys").map(|keys| {
                            let of = |keys: &Value| {
                                let keys = keys.as_array()?;
                                Some(keys.iter().map(Value::to_string).collect())
                            };
                            keys.as_array().unwrap().iter().map(of).collect()
                        }),
                    }));
                }
                other => panic!("{other}"),
            }
        }
        stream.batches.push(told);
    }
    stream
}

fn fields(event: &Value) -> (String, HashMap<String, Value>) {
    if let Some(map) = event.as_map() {
        let all: HashMap<String, Value> = map
            .iter()
            .map(|(name, value)| (name.as_str().unwrap().to_owned(), value.clone()))
            .collect();
        return (all["type"].as_str().unwrap().to_owned(), all);
    }
    let list = event.as_array().unwrap();
    let kind = list[0].as_str().unwrap().to_owned();
    let names: &[&str] = if kind == "BlockStored" { &STORED } else { &REMOVED };
    let all = names.iter().zip(&list[1..]).map(|(name, it)| ((*name).to_owned(), it.clone()));
    (kind, all.collect())
}
