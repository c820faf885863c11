//! Truth files: what the engine's own cache held, and the recorded streams they belong to.

use std::{collections::BTreeMap, fs::File, io::Read, path::PathBuf, sync::Arc};

use kv_indexer::loadgen::recording::{RankStream, Recording};
use serde_json::Value;

use crate::{streams::decode::Key, support::fixture};

/// The stream that takes a second to read.
pub(crate) const BIG: &str = "vllm-0.33.0/big_int_50k";

/// Physical copies by (medium, group, key).
pub(crate) type Cached = BTreeMap<(String, u32, Key), u64>;

/// A moment at which the engine's cache is known.
#[derive(Debug)]
pub(crate) struct Moment {
    pub(crate) label: String,
    /// Batches of the stream that were published by then, all lives together.
    pub(crate) published: usize,
    /// Sequence of the last of them.
    pub(crate) sequence: u64,
    /// Begins a new life right after it.
    pub(crate) restart_follows: bool,
    pub(crate) cached: Cached,
}

/// One publisher: its stream and its moments, in order.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) stream: Arc<RankStream>,
    pub(crate) moments: Vec<Moment>,
}

/// A recorded stream with its truth.
#[derive(Debug)]
pub(crate) struct Fixture {
    /// `directory/name`.
    pub(crate) name: String,
    pub(crate) engine: String,
    pub(crate) version: String,
    pub(crate) block_size: usize,
    pub(crate) ranks: Vec<Rank>,
}

impl Fixture {
    /// Stores are announced again: exact under set semantics only.
    pub(crate) fn reannounces(&self) -> bool {
        self.name.contains("report_full")
    }

    pub(crate) fn is_big(&self) -> bool {
        self.name == BIG
    }

    /// Does this version answer replays without the topic?
    pub(crate) fn two_frame_replay(&self) -> bool {
        let mut parts = self.version.split('.').map_while(|part| part.parse::<u32>().ok());
        let version: [u32; 3] = std::array::from_fn(|_| parts.next().unwrap_or_default());
        match self.engine.as_str() {
            "sglang" => version <= [0, 5, 21],
            _ => version < [0, 26, 0],
        }
    }

    pub(crate) fn load(name: &str) -> Self {
        let truth: Value = serde_json::from_slice(&read(&format!("{name}.truth.json"))).unwrap();
        let recording = Recording::open(&existing(&format!("{name}.jsonl"))).unwrap();
        let ranks = recording
            .ranks
            .into_iter()
            .map(|stream| Rank { moments: moments(&truth, &stream), stream })
            .collect();
        let text = |field: &str| truth[field].as_str().unwrap().to_owned();
        Self {
            name: name.to_owned(),
            engine: text("engine"),
            version: text("version"),
            block_size: truth["block_size"].as_u64().unwrap() as usize,
            ranks,
        }
    }

    /// Every recorded stream but the big one, by name.
    pub(crate) fn small() -> Vec<Self> {
        let names = Self::names().into_iter().filter(|name| name != BIG);
        names.map(|name| Self::load(&name)).collect()
    }

    /// Names of all recorded streams, in order.
    pub(crate) fn names() -> Vec<String> {
        let mut names = Vec::new();
        for directory in std::fs::read_dir(fixture("")).unwrap() {
            let directory = directory.unwrap();
            let version = directory.file_name().into_string().unwrap();
            if !version.starts_with("vllm-") && !version.starts_with("sglang-") {
                continue;
            }
            for file in std::fs::read_dir(directory.path()).unwrap() {
                let file = file.unwrap().file_name().into_string().unwrap();
                let file = file.trim_end_matches(".gz");
                if let Some(stem) = file.strip_suffix(".truth.json") {
                    names.push(format!("{version}/{stem}"));
                }
            }
        }
        names.sort();
        names
    }
}

fn moments(truth: &Value, stream: &RankStream) -> Vec<Moment> {
    let batches = &stream.batches;
    let lives: Vec<usize> =
        (0..batches.len()).filter(|&at| at == 0 || batches[at].sequence == 0).collect();
    // Index after the batch with this sequence in this life.
    let published = |life: usize, sequence: u64| {
        let at = lives[life] + usize::try_from(sequence).unwrap();
        assert_eq!(batches[at].sequence, sequence, "sequences have no holes");
        at + 1
    };
    let of_rank = |list: &Value| {
        let mut all = list.as_array().into_iter().flatten();
        all.find(|rank| rank["rank"] == stream.rank).cloned()
    };
    let mut moments = Vec::new();
    if let Some(before) = of_rank(&truth["truth_before_restart"]) {
        let sequence = before["final_seq"].as_u64().unwrap();
        let published = published(0, sequence);
        assert_eq!(truth["notes"][0]["restart_before_record"], published);
        moments.push(Moment {
            label: "before restart".to_owned(),
            published,
            sequence,
            restart_follows: true,
            cached: full(&before["cached"]),
        });
    }
    assert_eq!(lives.len(), moments.len() + 1, "lives in the stream and in the truth");
    let last = lives.len() - 1;
    let rank = of_rank(&truth["ranks"]).unwrap();
    for checkpoint in rank["checkpoints"].as_array().into_iter().flatten() {
        let sequence = checkpoint["after_seq"].as_u64().unwrap();
        let entry =
            |entry: &Value| (("GPU".to_owned(), 0, key(&entry[0])), entry[1].as_u64().unwrap());
        moments.push(Moment {
            label: checkpoint["label"].as_str().unwrap().to_owned(),
            published: published(last, sequence),
            sequence,
            restart_follows: false,
            cached: checkpoint["cached"].as_array().unwrap().iter().map(entry).collect(),
        });
    }
    let sequence = rank["final_seq"].as_u64().unwrap();
    moments.push(Moment {
        label: "end".to_owned(),
        published: published(last, sequence),
        sequence,
        restart_follows: false,
        cached: full(&rank["cached"]),
    });
    assert_eq!(moments.last().unwrap().published, batches.len());
    moments
}

fn full(cached: &Value) -> Cached {
    let mut all = Cached::new();
    for entry in cached.as_array().unwrap() {
        let medium = entry["medium"].as_str().unwrap_or("GPU").to_owned();
        let group = entry["group"].as_u64().unwrap_or_default() as u32;
        let count = entry["count"].as_u64().unwrap();
        let before = all.insert((medium, group, key(&entry["hash"])), count);
        assert_eq!(before, None, "twice in the truth: {entry}");
    }
    all
}

fn key(hash: &Value) -> Key {
    match hash {
        Value::String(hex) => Key::from_str_radix(&hex[hex.len() - 16..], 16).unwrap(),
        number => number.as_u64().unwrap_or_else(|| number.as_i64().unwrap() as u64),
    }
}

fn existing(name: &str) -> PathBuf {
    let plain = fixture(name);
    if plain.exists() { plain } else { fixture(&format!("{name}.gz")) }
}

fn read(name: &str) -> Vec<u8> {
    let path = existing(name);
    let mut bytes = Vec::new();
    let mut file = File::open(&path).unwrap();
    if path.extension().is_some_and(|extension| extension == "gz") {
        flate2::read::MultiGzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    } else {
        file.read_to_end(&mut bytes).unwrap();
    }
    bytes
}
