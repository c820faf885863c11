//! The cache against recorded engines: the requests behind a stream, played into it, have to give that
//! stream again, event by event and batch by batch, with one of our hashes for each of theirs.

mod inferred;
mod naive;
mod recorded;
mod script;

use std::collections::HashMap;

use self::recorded::{Stored, Stream, Told};
use super::{CacheOptions, EventFields, Fault};
use crate::wire::encode::{self, Event, Extra, Form, Hash, Tokens};

/// Recorded files, who wrote them, and the script of their requests.
const BASIC: [(&str, u32); 12] = [
    ("vllm-0.9.2/basic_builtin", 9),
    ("vllm-0.10.2/basic_int", 10),
    ("vllm-0.10.2/basic_bytes", 10),
    ("vllm-0.16.0/basic_int", 16),
    ("vllm-0.16.0/basic_bytes", 16),
    ("vllm-0.23.0/basic_int", 23),
    ("vllm-0.23.0/basic_bytes", 23),
    ("vllm-0.24.0/basic_int", 24),
    ("vllm-0.24.0/basic_bytes", 24),
    ("vllm-0.30.0/basic_int", 30),
    ("vllm-0.33.0/basic_int_sha256", 33),
    ("vllm-0.33.0/basic_bytes_sha256", 33),
];
const EXTRA: [(&str, u32); 6] = [
    ("vllm-0.9.2/extra_int", 9),
    ("vllm-0.10.2/extra_int", 10),
    ("vllm-0.16.0/extra_int", 16),
    ("vllm-0.23.0/extra_int", 23),
    ("vllm-0.30.0/extra_int", 30),
    ("vllm-0.33.0/extra_int", 33),
];
const SERVE: (&str, u32) = ("vllm-0.32.0-serve/serve_int_lora_restart", 32);

/// The cache of vLLM 0.`minor`.
fn options(minor: u32, block_size: usize) -> CacheOptions {
    CacheOptions {
        num_gpu_blocks: 64,
        block_size,
        fields: EventFields {
            medium: minor >= 10,
            lora_name: minor >= 14,
            extra_keys: minor >= 17,
            group: minor >= 20,
            kind: minor >= 22,
        },
        unhashed_first: minor >= 24,
    }
}

/// The first difference, if there is one.
fn compare(stream: &Stream, played: &[Vec<Event>], minor: u32) -> Result<(), String> {
    // Ours by theirs and the reverse: one each.
    let mut ours: HashMap<usize, u64> = HashMap::new();
    let mut theirs: HashMap<u64, usize> = HashMap::new();
    for (at, (want, got)) in stream.batches.iter().zip(played).enumerate() {
        let pairs = want.iter().zip(got).enumerate();
        for (number, (want, got)) in pairs {
            let same = match (want, got) {
                (Told::Cleared, Event::AllBlocksCleared) => true,
                (Told::Removed(block), Event::BlockRemoved(got)) => {
                    let hashes: Vec<Hash> =
                        ours.get(block).map(|h| Hash::Unsigned(*h)).into_iter().collect();
                    got.block_hashes == hashes
                }
                (Told::Stored(want), Event::BlockStored(got)) => {
                    for (block, hash) in want.blocks.iter().zip(&got.block_hashes) {
                        let Hash::Unsigned(hash) = hash else { panic!("{hash:?}") };
                        let one = *ours.entry(*block).or_insert(*hash) == *hash
                            && *theirs.entry(*hash).or_insert(*block) == *block;
                        if !one {
                            return Err(format!(
                                "batch {at} event {number}: block {block} is not one of ours"
                            ));
                        }
                    }
                    *want == stored(got, &theirs)
                }
                _ => false,
            };
            if !same {
                return Err(format!("batch {at} event {number}:\n  {want:?}\n  {got:?}"));
            }
        }
        if want.len() != got.len() {
            return Err(format!("batch {at} has {} events: {want:?}\n  {got:?}", want.len()));
        }
    }
    if stream.batches.len() != played.len() {
        return Err(format!("{} batches, not {}", played.len(), stream.batches.len()));
    }
    // The map form has the same fields in the same order, with their hashes in them. (Not the same
    // bytes: 0.33 writes a longer header than a map of this size needs. 0.23 writes the unset width of
    // the window, which our encoder leaves out.) Of a long stream, a sample.
    if minor >= 24 {
        let few = played.iter().enumerate().filter(|(at, _)| *at < 100 || at % 16 == 0);
        for (at, events) in few {
            let payload = payload(stream, at, events, &theirs);
            if value(&payload) != value(&stream.payloads[at]) {
                return Err(format!("batch {at} is written otherwise"));
            }
        }
    }
    Ok(())
}

fn stored(got: &encode::BlockStored, theirs: &HashMap<u64, usize>) -> Stored {
    let block = |hash: &Hash| match hash {
        Hash::Unsigned(hash) => theirs.get(hash).copied().unwrap_or(usize::MAX),
        _ => usize::MAX,
    };
    let text = |extra: &Extra| match extra {
        Extra::Text(text) => rmpv::Value::from(text.as_str()).to_string(),
        Extra::Item(id, offset) => {
            rmpv::Value::Array(vec![id.as_str().into(), (*offset).into()]).to_string()
        }
        Extra::Bytes(bytes) => format!("{bytes:?}"),
    };
    let Tokens::Plain(tokens) = got.token_ids.clone() else { panic!("pairs") };
    Stored {
        blocks: got.block_hashes.iter().map(block).collect(),
        parent: got.parent_block_hash.as_ref().map(block),
        tokens,
        lora: (got.lora_id, got.lora_name.clone()),
        extras: got.extra_keys.as_ref().map(|keys| {
            let of =
                |keys: &Option<Vec<Extra>>| keys.as_ref().map(|it| it.iter().map(text).collect());
            keys.iter().map(of).collect()
        }),
    }
}

fn value(mut payload: &[u8]) -> rmpv::Value {
    rmpv::decode::read_value(&mut payload).unwrap()
}

/// Our batch with their hashes, timestamp and rank.
fn payload(stream: &Stream, at: usize, events: &[Event], theirs: &HashMap<u64, usize>) -> Vec<u8> {
    let recorded = value(&stream.payloads[at]);
    let recorded = recorded.as_array().unwrap();
    let swap = |hash: &mut Hash| {
        let Hash::Unsigned(ours) = hash else { panic!("{hash:?}") };
        let wire = &stream.hashes[theirs[ours]];
        *hash = match wire.as_slice() {
            Some(bytes) => Hash::Bytes(bytes.to_vec()),
            None => Hash::Unsigned(wire.as_u64().unwrap()),
        };
    };
    let mut events = events.to_vec();
    for event in &mut events {
        match event {
            Event::BlockStored(it) => {
                it.block_hashes.iter_mut().chain(&mut it.parent_block_hash).for_each(swap);
            }
            Event::BlockRemoved(it) => it.block_hashes.iter_mut().for_each(swap),
            Event::AllBlocksCleared => {}
        }
    }
    let batch = encode::Batch {
        timestamp: recorded[0].as_f64().unwrap(),
        events,
        rank: recorded.get(2).and_then(rmpv::Value::as_u64).map(|rank| rank as u32),
    };
    batch.encode(Form::Map).unwrap()
}

/// Plays the script into a cache of vLLM 0.`minor` and compares every rank.
fn reproduce(
    file: &str,
    script: &str,
    options: CacheOptions,
    minor: u32,
    fault: Fault,
) -> Result<(), String> {
    let script = std::fs::read_to_string(recorded::fixture("engine").join(script)).unwrap();
    for stream in recorded::streams(&format!("{file}.jsonl")) {
        let played = script::play(&script, stream.rank, &stream.tokens, options, fault);
        compare(&stream, &played, minor)
            .map_err(|difference| format!("{file} rank {}: {difference}", stream.rank))?;
    }
    Ok(())
}

#[test]
fn basic_streams_are_reproduced() {
    for (file, minor) in BASIC {
        reproduce(file, "basic.script", options(minor, 16), minor, Fault::None).unwrap();
    }
}

#[test]
fn streams_with_adapters_salts_and_items_are_reproduced() {
    for (file, minor) in EXTRA {
        reproduce(file, "extra.script", options(minor, 16), minor, Fault::None).unwrap();
    }
}

#[test]
fn the_real_server_is_reproduced() {
    let (file, minor) = SERVE;
    reproduce(file, "serve.script", options(minor, 32), minor, Fault::None).unwrap();
}

/// 50 000 stores, 34 000 evictions, and clears.
const BIG: (&str, u32) = ("vllm-0.33.0/big_int_50k.jsonl.gz", 33);

fn infer(stream: &Stream, options: CacheOptions, fault: Fault) -> Result<(), String> {
    compare(stream, &inferred::play(stream, options, fault)?, BIG.1)
}

#[test]
fn the_long_stream_is_reproduced() {
    let right = CacheOptions { num_gpu_blocks: 4097, ..options(BIG.1, 16) };
    for stream in recorded::streams(BIG.0) {
        infer(&stream, right, Fault::None).unwrap();
        if stream.rank == 0 {
            infer(&stream, right, Fault::ForwardFree).unwrap_err();
            infer(&stream, CacheOptions { num_gpu_blocks: 4096, ..right }, Fault::None)
                .unwrap_err();
            infer(&stream, CacheOptions { unhashed_first: false, ..right }, Fault::None)
                .unwrap_err();
        }
    }
}

#[test]
fn planted_errors_are_found() {
    for (file, minor) in [BASIC[0], BASIC[5], BASIC[7], BASIC[11]] {
        let with = |options, fault| reproduce(file, "basic.script", options, minor, fault);
        let right = options(minor, 16);
        for fault in [Fault::ForwardFree, Fault::Fifo, Fault::StoresOnce] {
            assert!(with(right, fault).is_err(), "{file} {fault:?}");
        }
        let other = CacheOptions { unhashed_first: !right.unhashed_first, ..right };
        assert!(with(other, Fault::None).is_err(), "{file}: the other order of eviction");
        for blocks in [63, 65] {
            let other = CacheOptions { num_gpu_blocks: blocks, ..right };
            assert!(with(other, Fault::None).is_err(), "{file}: {blocks} blocks");
        }
    }
}
