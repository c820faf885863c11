//! A second decoder of KV events, written from the engines' structs and independent of
//! `kv_indexer::wire`: slow, strict, and loud about everything it does not know.

use rmpv::Value;

/// A block's name on the wire: integers keep their bits, byte strings their last eight.
pub(crate) type Key = u64;

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    Stored(Stored),
    Removed { keys: Vec<Key>, group: u32, medium: String },
    Cleared,
}

/// A `BlockStored`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Stored {
    pub(crate) keys: Vec<Key>,
    pub(crate) parent: Option<Key>,
    /// EAGLE pairs: first elements.
    pub(crate) tokens: Vec<u32>,
    pub(crate) block_size: usize,
    /// Name, or the decimal id where the event has no name; empty = base model.
    pub(crate) lora: String,
    pub(crate) salt: Option<String>,
    /// Per block; empty = none has any.
    pub(crate) extras: Vec<Vec<Extra>>,
    /// 0 where the engine knows no groups.
    pub(crate) group: u32,
    /// Tokens of the sliding window; absent = full attention.
    pub(crate) window: Option<usize>,
    pub(crate) medium: String,
}

/// One extra hash input of a block.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Extra {
    Text(String),
    Item { id: String, offset: i64 },
}

impl Stored {
    /// Does every key have its tokens in this event?
    pub(crate) fn is_dense(&self) -> bool {
        !self.keys.is_empty()
            && self.block_size > 0
            && self.tokens.len() == self.keys.len() * self.block_size
    }
}

/// The batch's rank, if it has one, and its events.
pub(crate) fn batch(payload: &[u8]) -> (Option<u64>, Vec<Event>) {
    let mut rest = payload;
    let value = rmpv::decode::read_value(&mut rest).unwrap();
    assert!(rest.is_empty(), "bytes after the batch");
    let batch = value.as_array().unwrap();
    assert!(batch[0].is_f64(), "timestamp {:?}", batch[0]);
    let events = batch[1].as_array().unwrap().iter().map(event).collect();
    (batch.get(2).and_then(Value::as_u64), events)
}

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

fn event(value: &Value) -> Event {
    let fields = fields(value);
    let get = |name: &str| {
        let found = fields.iter().find(|(field, _)| field == name).map(|(_, value)| *value);
        found.filter(|value| !value.is_nil())
    };
    let text = |name: &str| get(name).map(|value| value.as_str().unwrap().to_owned());
    let number = |name: &str| get(name).map(|value| value.as_u64().unwrap());
    let keys = || get("block_hashes").unwrap().as_array().unwrap().iter().map(key).collect();
    let medium = || text("medium").unwrap_or_else(|| "GPU".to_owned());
    let group = || number("group_idx").unwrap_or_default() as u32;
    match text("type").unwrap().as_str() {
        "AllBlocksCleared" => Event::Cleared,
        "BlockRemoved" => Event::Removed { keys: keys(), group: group(), medium: medium() },
        "BlockStored" => {
            let kind = text("kv_cache_spec_kind");
            let window = number("kv_cache_spec_sliding_window").map(|window| window as usize);
            match (kind.as_deref(), window) {
                (None | Some("full_attention"), None) | (Some("sliding_window"), Some(_)) => {}
                other => panic!("unknown group {other:?}"),
            }
            let id = number("lora_id").map(|id| id.to_string());
            let extras = get("extra_keys").map_or_else(Vec::new, |extras| {
                extras.as_array().unwrap().iter().map(block_extras).collect()
            });
            Event::Stored(Stored {
                keys: keys(),
                parent: get("parent_block_hash").map(key),
                tokens: get("token_ids").unwrap().as_array().unwrap().iter().map(token).collect(),
                block_size: number("block_size").unwrap() as usize,
                lora: text("lora_name").or(id).unwrap_or_default(),
                salt: text("cache_salt"),
                extras,
                group: group(),
                window,
                medium: medium(),
            })
        }
        other => panic!("unknown event {other}"),
    }
}

/// Field names and values of either encoding; arrays are positional behind their tag.
fn fields(value: &Value) -> Vec<(String, &Value)> {
    if let Some(map) = value.as_map() {
        return map.iter().map(|(k, v)| (k.as_str().unwrap().to_owned(), v)).collect();
    }
    let array = value.as_array().unwrap();
    let names: &[&str] = match array[0].as_str().unwrap() {
        "BlockStored" => &STORED,
        "BlockRemoved" => &REMOVED,
        _ => &[],
    };
    assert!(array.len() <= names.len() + 1, "too many fields: {value}");
    let tag = std::iter::once(("type".to_owned(), &array[0]));
    tag.chain(names.iter().map(|name| (*name).to_owned()).zip(&array[1..])).collect()
}

fn key(value: &Value) -> Key {
    match value {
        Value::Integer(number) => {
            number.as_u64().unwrap_or_else(|| number.as_i64().unwrap() as u64)
        }
        Value::Binary(bytes) => u64::from_be_bytes(*bytes.last_chunk().unwrap()),
        other => panic!("not a block hash: {other}"),
    }
}

fn token(value: &Value) -> u32 {
    let id = value.as_array().map_or(value, |pair| {
        assert_eq!(pair.len(), 2, "EAGLE pair {value}");
        &pair[0]
    });
    u32::try_from(id.as_u64().unwrap()).unwrap()
}

fn block_extras(value: &Value) -> Vec<Extra> {
    let Some(extras) = value.as_array() else {
        assert!(value.is_nil(), "extras {value}");
        return Vec::new();
    };
    let extra = |extra: &Value| match extra.as_array() {
        None => Extra::Text(extra.as_str().unwrap().to_owned()),
        Some(pair) => Extra::Item {
            id: pair[0].as_str().unwrap().to_owned(),
            offset: pair[1].as_i64().unwrap(),
        },
    };
    extras.iter().map(extra).collect()
}
