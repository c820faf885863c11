//! Batches as engines write them, for mock engines, benches and tests: owned values and both wire
//! forms. The decoder shares no code with this module.

use rmp_serde::encode::Error;
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};

/// How events are laid out. The batch around them is an array in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `["BlockStored", …]`, as vLLM 0.22 and 0.23 write it: fields up to the LoRA name always,
    /// later ones up to the last that is set. Fields that came after the array form (`locality`,
    /// `ownership`, `session_id`, `lookahead_token_ids`) are not written. A cache salt is written
    /// as SGLang 0.5.18 does, a map in the place of the LoRA name.
    Array,
    /// `{"type": "BlockStored", …}`, as vLLM 0.33 and SGLang 0.5.23 write it: fields that the
    /// engine declares without a default always, nil if need be; others if set.
    Map,
}

/// One message's payload: `[timestamp, events, rank]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Seconds since the Unix epoch.
    pub timestamp: f64,
    /// Events, in order.
    pub events: Vec<Event>,
    /// Data-parallel rank; written as nil if absent.
    pub rank: Option<u32>,
}

impl Batch {
    /// The batch as msgpack.
    ///
    /// # Errors
    ///
    /// If a list is longer than msgpack can say (2³² − 1).
    pub fn encode(&self, form: Form) -> Result<Vec<u8>, Error> {
        let mut payload = Vec::new();
        self.encode_into(form, &mut payload)?;
        Ok(payload)
    }

    /// Appends the batch as msgpack to `payload`.
    ///
    /// # Errors
    ///
    /// If a list is longer than msgpack can say (2³² − 1).
    pub fn encode_into(&self, form: Form, payload: &mut Vec<u8>) -> Result<(), Error> {
        let mut out = rmp_serde::Serializer::new(payload).with_struct_map();
        match form {
            Form::Map => (self.timestamp, &self.events, self.rank).serialize(&mut out),
            Form::Array => {
                (self.timestamp, Positional(&self.events), self.rank).serialize(&mut out)
            }
        }
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(tag = "type")]
pub enum Event {
    /// Blocks were stored.
    BlockStored(BlockStored),
    /// Blocks were removed.
    BlockRemoved(BlockRemoved),
    /// Every block of the publisher is gone.
    AllBlocksCleared,
}

/// `BlockStored`; see [`wire::BlockStored`](super::BlockStored) for what the fields mean.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct BlockStored {
    /// Hashes, in prefix order.
    pub block_hashes: Vec<Hash>,
    /// The block before the first one.
    pub parent_block_hash: Option<Hash>,
    /// Tokens of the whole span.
    pub token_ids: Tokens,
    /// Tokens per block. Signed, so that tests can write what must be refused.
    pub block_size: i64,
    /// Deprecated numeric adapter id.
    pub lora_id: Option<u64>,
    /// The tier's name.
    pub medium: Option<String>,
    /// Adapter name.
    pub lora_name: Option<String>,
    /// Extra hash inputs, per block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extra_keys: Option<Vec<Option<Vec<Extra>>>>,
    /// Attention group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_idx: Option<u32>,
    /// Kind of the group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_spec_kind: Option<String>,
    /// Sliding window in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_spec_sliding_window: Option<u32>,
    /// `LOCAL` or `REMOTE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locality: Option<String>,
    /// Id of a secondary tier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ownership: Option<String>,
    /// The session that the request names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// EAGLE: the tokens after each block that its hash covers too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lookahead_token_ids: Option<Vec<Vec<u32>>>,
    /// SGLang's cache salt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_salt: Option<String>,
}

/// `BlockRemoved`; see [`wire::BlockRemoved`](super::BlockRemoved) for what the fields mean.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct BlockRemoved {
    /// Hashes.
    pub block_hashes: Vec<Hash>,
    /// The tier's name.
    pub medium: Option<String>,
    /// Attention group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_idx: Option<u32>,
    /// `LOCAL` or `REMOTE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locality: Option<String>,
    /// Id of a secondary tier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ownership: Option<String>,
    /// The session that the request names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
}

/// A block hash as an engine writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hash {
    /// vLLM's default.
    Unsigned(u64),
    /// SGLang, and vLLM up to 0.10.1.
    Signed(i64),
    /// The whole digest.
    Bytes(Vec<u8>),
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Unsigned(hash) => out.serialize_u64(*hash),
            Self::Signed(hash) => out.serialize_i64(*hash),
            Self::Bytes(hash) => out.serialize_bytes(hash),
        }
    }
}

/// Tokens as an engine writes them.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum Tokens {
    /// One integer per position.
    Plain(Vec<u32>),
    /// SGLang with EAGLE: each token with its successor.
    Pairs(Vec<(u32, u32)>),
}

impl Default for Tokens {
    fn default() -> Self {
        Self::Plain(Vec::new())
    }
}

/// One extra hash input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extra {
    /// A bare string.
    Text(String),
    /// Multimodal identifier and offset.
    Item(String, i64),
    /// Digest of prompt embeddings.
    Bytes(Vec<u8>),
}

impl Serialize for Extra {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => out.serialize_str(text),
            Self::Item(id, offset) => (id, offset).serialize(out),
            Self::Bytes(bytes) => out.serialize_bytes(bytes),
        }
    }
}

/// Something in the array form.
struct Positional<'a, T: ?Sized>(&'a T);

impl Serialize for Positional<'_, Vec<Event>> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_seq(self.0.iter().map(Positional))
    }
}

impl Serialize for Positional<'_, Event> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Event::BlockStored(event) => stored(event, out),
            Event::BlockRemoved(event) => {
                let elements = 3 + usize::from(event.group_idx.is_some());
                let mut seq = out.serialize_seq(Some(elements))?;
                seq.serialize_element("BlockRemoved")?;
                seq.serialize_element(&event.block_hashes)?;
                seq.serialize_element(&event.medium)?;
                if event.group_idx.is_some() {
                    seq.serialize_element(&event.group_idx)?;
                }
                seq.end()
            }
            Event::AllBlocksCleared => {
                let mut seq = out.serialize_seq(Some(1))?;
                seq.serialize_element("AllBlocksCleared")?;
                seq.end()
            }
        }
    }
}

fn stored<S: Serializer>(event: &BlockStored, out: S) -> Result<S::Ok, S::Error> {
    let defaulted = [
        event.extra_keys.is_some(),
        event.group_idx.is_some(),
        event.kv_cache_spec_kind.is_some(),
        event.kv_cache_spec_sliding_window.is_some(),
    ];
    let written = defaulted.iter().rposition(|set| *set).map_or(0, |last| last + 1);
    let mut seq = out.serialize_seq(Some(8 + written))?;
    seq.serialize_element("BlockStored")?;
    seq.serialize_element(&event.block_hashes)?;
    seq.serialize_element(&event.parent_block_hash)?;
    seq.serialize_element(&event.token_ids)?;
    seq.serialize_element(&event.block_size)?;
    seq.serialize_element(&event.lora_id)?;
    seq.serialize_element(&event.medium)?;
    match &event.cache_salt {
        Some(salt) => seq.serialize_element(&Metadata(salt))?,
        None => seq.serialize_element(&event.lora_name)?,
    }
    if written > 0 {
        seq.serialize_element(&event.extra_keys)?;
    }
    if written > 1 {
        seq.serialize_element(&event.group_idx)?;
    }
    if written > 2 {
        seq.serialize_element(&event.kv_cache_spec_kind)?;
    }
    if written > 3 {
        seq.serialize_element(&event.kv_cache_spec_sliding_window)?;
    }
    seq.end()
}

/// SGLang's trailing map of a salted store.
struct Metadata<'a>(&'a str);

impl Serialize for Metadata<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(Some(1))?;
        map.serialize_entry("cache_salt", self.0)?;
        map.end()
    }
}
