//! Malformed input: hand-written cases with the verdict that each must get.

use std::{collections::BTreeMap, fs, path::Path};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use kv_indexer::wire::{BatchReader, Event, Frames, Limits, Scratch};
use serde_json::Value;

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Refused as a whole, for this reason.
    Refused(&'static str),
    /// This many events decoded, and these others refused.
    Batch(usize, &'static [&'static str]),
}

use Verdict::{Batch, Refused};

/// The verdict on each case that is not simply accepted.
const VERDICTS: &[(&str, Verdict)] = &[
    ("truncated_0", Refused("truncated")),
    ("truncated_1", Refused("truncated")),
    ("truncated_5", Refused("truncated")),
    ("truncated_20", Refused("truncated")),
    ("truncated_84", Refused("truncated")),
    ("truncated_168", Refused("truncated")),
    ("trailing_garbage", Refused("trailing_bytes")),
    ("not_msgpack", Refused("malformed")),
    ("json_payload", Refused("not_a_batch")),
    ("batch_is_map", Refused("not_a_batch")),
    ("batch_empty_array", Refused("batch_length")),
    ("batch_one", Refused("batch_length")),
    ("batch_ts_string", Refused("timestamp")),
    ("batch_rank_string", Refused("rank")),
    ("batch_rank_negative", Refused("rank")),
    ("batch_rank_huge", Refused("rank")),
    ("ext_type", Refused("rank")),
    ("events_not_list", Refused("events")),
    ("deep_nesting", Refused("batch_length")),
    ("huge_array_header", Refused("truncated")),
    ("huge_bin_header", Refused("truncated")),
    ("unknown_tag_map", Batch(1, &["unknown_tag"])),
    ("unknown_tag_array", Batch(1, &["unknown_tag"])),
    ("missing_tag", Batch(0, &["missing_tag"])),
    ("tag_not_string", Batch(0, &["tag_type"])),
    ("event_is_int", Batch(0, &["not_an_event"])),
    ("event_empty_array", Batch(0, &["missing_tag"])),
    ("event_null", Batch(0, &["not_an_event"])),
    ("map_missing_block_size", Batch(0, &["missing_field"])),
    ("array_short", Batch(0, &["missing_field"])),
    ("hash_wrong_type_str", Batch(0, &["field_type"])),
    ("hash_float", Batch(0, &["field_type"])),
    ("hash_null", Batch(0, &["field_type"])),
    ("hash_bool", Batch(0, &["field_type"])),
    ("hash_empty_bytes", Batch(0, &["empty_hash"])),
    ("hashes_not_list", Batch(0, &["field_type"])),
    ("parent_wrong_type", Batch(0, &["field_type"])),
    ("tokens_negative", Batch(0, &["token"])),
    ("tokens_float", Batch(0, &["token"])),
    ("tokens_gt_u32", Batch(0, &["token"])),
    ("block_size_negative", Batch(0, &["field_range"])),
    ("medium_int", Batch(0, &["field_type"])),
    ("lora_name_bytes", Batch(0, &["field_type"])),
    ("duplicate_keys", Batch(0, &["duplicate_key"])),
    // One list of extra keys too many for a dense store.
    ("extra_keys_len_mismatch", Batch(0, &["extra_keys_length"])),
    // The rest of "partial" is accepted: opaque bytes of any length, fewer tokens than blocks
    // (whoever indexes decides), and a block size that fits 32 bits.
    ("hash_33_bytes", Batch(1, &[])),
    ("tokens_short", Batch(1, &[])),
    ("block_size_huge", Batch(1, &[])),
    ("frames_one_frame", Refused("frame_count")),
    ("frames_two_frames", Refused("frame_count")),
    ("frames_four_frames", Refused("frame_count")),
    ("frames_zero_frames", Refused("frame_count")),
    ("frames_seq_4_bytes", Refused("sequence")),
    ("frames_seq_9_bytes", Refused("sequence")),
    ("frames_seq_minus_1", Refused("end_marker")),
    ("frames_empty_payload", Refused("empty_payload")),
];

fn fixtures() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures"))
}

fn bytes(value: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap()
}

/// The message's verdict: reason if refused, else events decoded and reasons of those refused.
fn judge(payload: &[u8]) -> Result<(usize, Vec<&'static str>), &'static str> {
    let mut reader =
        BatchReader::new(payload, &Limits::default()).map_err(|error| error.reason())?;
    let mut scratch = Scratch::default();
    let mut decoded = 0;
    let mut refused = Vec::new();
    while let Some(event) = reader.next_event(&mut scratch) {
        match event {
            Ok(_) => decoded += 1,
            Err(error) => refused.push(error.reason()),
        }
    }
    Ok((decoded, refused))
}

#[test]
fn malformed_messages_get_their_verdict() {
    let mut verdicts: BTreeMap<&str, Verdict> = VERDICTS.iter().copied().collect();
    assert_eq!(verdicts.len(), VERDICTS.len());
    let cases = fs::read_to_string(fixtures().join("malformed/malformed.jsonl")).unwrap();
    for line in cases.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let name = case["name"].as_str().unwrap();
        let got = match case["frames_b64"].as_array() {
            None => judge(&bytes(&case["payload_b64"])),
            Some(frames) => {
                let frames: Vec<Vec<u8>> = frames.iter().map(bytes).collect();
                Frames::split(&frames)
                    .map_err(|error| error.reason())
                    .and_then(|frames| judge(frames.payload))
            }
        };
        let verdict = verdicts.remove(name);
        match (case["expect"].as_str().unwrap(), &got) {
            ("accept", Ok((_, refused))) => assert!(refused.is_empty(), "{name}: {got:?}"),
            ("reject", Ok((decoded, refused))) => {
                assert!(*decoded == 0 && !refused.is_empty(), "{name}: {got:?}");
            }
            ("reject", Err(_)) | ("partial", _) => assert!(verdict.is_some(), "{name}: {got:?}"),
            _ => panic!("{name}: {got:?}"),
        }
        match verdict {
            None => {}
            Some(Refused(reason)) => assert_eq!(got, Err(reason), "{name}"),
            Some(Batch(decoded, refused)) => {
                assert_eq!(got, Ok((decoded, refused.to_vec())), "{name}");
            }
        }
    }
    assert!(verdicts.is_empty(), "cases that are gone: {verdicts:?}");
}

/// What is accepted although it looks odd keeps its meaning.
#[test]
fn odd_stores_keep_their_meaning() {
    let cases = fs::read_to_string(fixtures().join("malformed/malformed.jsonl")).unwrap();
    let check = |name: &str, block_size, tokens: usize, hash: u64| {
        let case = cases
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .find(|case| case["name"] == name)
            .unwrap();
        let payload = bytes(&case["payload_b64"]);
        let mut reader = BatchReader::new(&payload, &Limits::default()).unwrap();
        let mut scratch = Scratch::default();
        let Some(Ok(Event::Stored(stored))) = reader.next_event(&mut scratch) else {
            panic!("{name}");
        };
        assert_eq!((stored.block_size, stored.tokens.len()), (block_size, tokens), "{name}");
        assert_eq!(stored.block_hashes.first().map(|key| key.0), Some(hash), "{name}");
    };
    check("block_size_huge", 1 << 31, 16, 0x1819_1a1b_1c1d_1e1f);
    check("hash_33_bytes", 16, 16, 0x7878_7878_7878_7878);
    check("tokens_short", 16, 16, 0x6565_6565_6565_6565);
    check("tokens_pairs", 16, 16, 7);
    check("placeholder_offload", 0, 0, 0x6868_6868_6868_6868);
}
