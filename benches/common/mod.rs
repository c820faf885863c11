//! Seeded corpora that the benches share.

#![allow(dead_code, reason = "each bench uses its part")]

pub(crate) mod baseline;
pub(crate) mod service;

use std::sync::Arc;

use kv_indexer::{
    hash::{Algorithm, Prompt, Scheme},
    index::{BlockIndex, PodSpec, Remove, Store},
    model::{CountMode, EngineKey, PodSlot, RequestKey, TierTable},
    wire::encode::{Batch, BlockRemoved, BlockStored, Event, Form, Hash, Tokens},
};

/// Tokens per block, engine's and ours.
pub(crate) const BLOCK: u32 = 16;

/// A small generator (SplitMix64): the same corpus on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Token ids of a vocabulary of 150 000.
    pub(crate) fn tokens(&mut self, count: u32) -> Vec<u32> {
        (0..count).map(|_| (self.next() % 150_000) as u32).collect()
    }

    /// Token ids of which so many percent take five bytes on the wire, and nearly all others three.
    pub(crate) fn wide_tokens(&mut self, count: u32, percent: u64) -> Vec<u32> {
        let token = |bits: u64| {
            let wide = (bits >> 32) % 100 < percent;
            u32::from(bits as u16) | u32::from(wide) << 16
        };
        (0..count).map(|_| token(self.next())).collect()
    }
}

pub(crate) fn scheme() -> Arc<Scheme> {
    Arc::new(Scheme::new(Algorithm::Xxh3, "", BLOCK))
}

pub(crate) fn spec() -> PodSpec {
    PodSpec { scheme: scheme(), model: Arc::from("model"), count_mode: CountMode::Counted }
}

pub(crate) fn keys(tokens: &[u32]) -> Vec<RequestKey> {
    Prompt { model: "model", tokens, ..Prompt::default() }.keys(&scheme()).expect("no items")
}

/// Stores a prompt from its first block on; engine keys are made from `salt`.
pub(crate) fn store_prompt(index: &dyn BlockIndex, slot: PodSlot, tokens: &[u32], salt: u64) {
    let blocks = tokens.len() / BLOCK as usize;
    let mut random = Random(salt);
    let engine: Vec<EngineKey> = (0..blocks).map(|_| EngineKey(random.next())).collect();
    store(index, slot, &engine, None, tokens);
}

pub(crate) fn store(
    index: &dyn BlockIndex,
    slot: PodSlot,
    keys: &[EngineKey],
    parent: Option<EngineKey>,
    tokens: &[u32],
) {
    index.store(slot, &Store::simple(keys, parent, tokens, BLOCK));
}

pub(crate) fn remove(index: &dyn BlockIndex, slot: PodSlot, keys: &[EngineKey]) {
    index.remove(slot, &Remove { keys, group: None, tier: TierTable::GPU, sequence: 0 });
}

/// Index with `pods` pods that hold one prompt of `blocks` blocks, and the prompt.
pub(crate) fn shared_prompt(index: &dyn BlockIndex, pods: u32, blocks: u32) -> Vec<u32> {
    let tokens = Random(7).tokens(blocks * BLOCK);
    for pod in 0..pods {
        let slot = index.register(spec()).expect("room for the pods");
        store_prompt(index, slot, &tokens, 1000 + u64::from(pod));
    }
    tokens
}

/// Map-form batches of an engine in steady state: every step stores `blocks` blocks of a prompt
/// that goes on, and removes as many old ones, one event each, as vLLM does. `cached` blocks are
/// held at a time. Returns the payloads of `steps` steps.
pub(crate) fn steady_stream(
    steps: usize,
    blocks: usize,
    cached: usize,
    form: Form,
) -> Vec<Vec<u8>> {
    let mut random = Random(42);
    let mut held = std::collections::VecDeque::new();
    let mut parent = None;
    let mut length = 0;
    (0..steps)
        .map(|step| {
            let mut events = Vec::new();
            while held.len() > cached {
                let hash: u64 = held.pop_front().expect("more than `cached` are held");
                events.push(Event::BlockRemoved(BlockRemoved {
                    block_hashes: vec![Hash::Unsigned(hash)],
                    medium: Some("GPU".to_owned()),
                    group_idx: Some(0),
                    ..BlockRemoved::default()
                }));
            }
            // Prompts of about 64 blocks.
            if length >= 64 {
                (parent, length) = (None, 0);
            }
            let hashes: Vec<u64> = (0..blocks).map(|_| random.next()).collect();
            let tokens = random.tokens(blocks as u32 * BLOCK);
            events.push(stored(&hashes, parent, tokens));
            parent = hashes.last().copied();
            length += blocks;
            held.extend(hashes);
            let batch = Batch { timestamp: 1.7e9 + step as f64, events, rank: Some(0) };
            batch.encode(form).expect("encoding to memory")
        })
        .collect()
}

/// A store on the GPU as vLLM announces it.
fn stored(hashes: &[u64], parent: Option<u64>, tokens: Vec<u32>) -> Event {
    Event::BlockStored(BlockStored {
        block_hashes: hashes.iter().map(|&hash| Hash::Unsigned(hash)).collect(),
        parent_block_hash: parent.map(Hash::Unsigned),
        token_ids: Tokens::Plain(tokens),
        block_size: i64::from(BLOCK),
        medium: Some("GPU".to_owned()),
        extra_keys: Some(vec![None; hashes.len()]),
        group_idx: Some(0),
        kv_cache_spec_kind: Some("full_attention".to_owned()),
        ..BlockStored::default()
    })
}

/// Batches of one store of `blocks` blocks each, which go on with prompts of 64 blocks; `percent` of
/// the tokens take five bytes.
pub(crate) fn stores(count: usize, blocks: usize, percent: u64, form: Form) -> Vec<Vec<u8>> {
    let mut random = Random(43);
    let (mut parent, mut length) = (None, 0);
    (0..count)
        .map(|at| {
            if length >= 64 {
                (parent, length) = (None, 0);
            }
            let hashes: Vec<u64> = (0..blocks).map(|_| random.next()).collect();
            let tokens = random.wide_tokens(blocks as u32 * BLOCK, percent);
            let events = vec![stored(&hashes, parent, tokens)];
            (parent, length) = (hashes.last().copied(), length + blocks);
            let batch = Batch { timestamp: 1.7e9 + at as f64, events, rank: Some(0) };
            batch.encode(form).expect("encoding to memory")
        })
        .collect()
}

/// The payloads of a rank of the recorded stream that is large, in order.
pub(crate) fn recorded(rank: u64) -> Vec<Vec<u8>> {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    use std::io::BufRead;
    const FILE: &str =
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/vllm-0.33.0/big_int_50k.jsonl.gz");
    let file = flate2::read::GzDecoder::new(std::fs::File::open(FILE).expect("the fixture"));
    std::io::BufReader::new(file)
        .lines()
        .map(|line| serde_json::from_str(&line.expect("text")).expect("a line of JSON"))
        .filter(|line: &serde_json::Value| line["rank"] == rank)
        .map(|line| {
            let payload = line["payload_b64"].as_str().expect("a payload");
            BASE64_STANDARD.decode(payload).expect("base64")
        })
        .collect()
}
