//! Decoding rules as tables (C25 … C39 are llm-d's conformance cases), and properties of both
//! directions together. Frames and topics (C20 … C24) are tested in `frame`.

use proptest::prelude::*;
use rmpv::Value;

use super::encode::{Extra, Form, Hash, Tokens};
use super::*;
use crate::model::ExtraKey;

mod properties;

fn arr(values: impl IntoIterator<Item = Value>) -> Value {
    Value::Array(values.into_iter().collect())
}

fn map<const N: usize>(pairs: [(&str, Value); N]) -> Value {
    Value::Map(pairs.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

fn ints(values: impl IntoIterator<Item = u64>) -> Value {
    arr(values.into_iter().map(Value::from))
}

fn hex(text: &str) -> Vec<u8> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    text.as_bytes().chunks(2).map(byte).collect()
}

/// Stands for a string of five bytes that are not UTF-8, which `rmpv` would write as bytes.
const NOT_UTF8: &str = "<bad>";

fn bytes(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    rmpv::encode::write_value(&mut out, value).unwrap();
    while let Some(at) = out.windows(5).position(|window| window == NOT_UTF8.as_bytes()) {
        out[at] = 0xff;
    }
    out
}

fn batch(events: impl IntoIterator<Item = Value>) -> Vec<u8> {
    bytes(&arr([1.5.into(), arr(events), 0.into()]))
}

/// The debug form of every event, or the reason for which it was refused.
fn events(payload: &[u8], limits: &Limits) -> Vec<Result<String, &'static str>> {
    let mut reader = BatchReader::new(payload, limits).unwrap();
    let mut scratch = Scratch::default();
    let mut out = Vec::new();
    while let Some(event) = reader.next_event(&mut scratch) {
        out.push(event.map(|event| format!("{event:?}")).map_err(|error| error.reason()));
    }
    out
}

/// Decodes `event` between two others, which must survive, and hands it to `then`.
#[track_caller]
fn decode<T>(event: Value, then: impl FnOnce(Result<Event<'_>, EventError>) -> T) -> T {
    let payload = batch([map([("type", "AllBlocksCleared".into())]), event, removed_map()]);
    let mut reader = BatchReader::new(&payload, &Limits::default()).unwrap();
    let mut scratch = Scratch::default();
    assert_eq!(reader.next_event(&mut scratch), Some(Ok(Event::Cleared)));
    let out = then(reader.next_event(&mut scratch).unwrap());
    let want = BlockRemoved { block_hashes: &[EngineKey(9)], ..Default::default() };
    assert_eq!(reader.next_event(&mut scratch), Some(Ok(Event::Removed(want))));
    assert_eq!(reader.next_event(&mut scratch), None);
    out
}

#[track_caller]
fn check_stored(event: Value, then: impl FnOnce(BlockStored<'_>)) {
    decode(event, |event| match event {
        Ok(Event::Stored(stored)) => then(stored),
        other => panic!("{other:?}"),
    });
}

#[track_caller]
fn check_refused(event: Value, reason: &str) {
    decode(event, |event| {
        let error = event.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(EventError::REASONS.contains(&reason));
        assert!(error.to_string().contains("event 1"), "{error}");
    });
}

fn removed_map() -> Value {
    map([("block_hashes", ints([9])), ("type", "BlockRemoved".into())])
}

/// A store of one block of two tokens in array form, with `tail` from the LoRA id on.
fn stored_array(tail: impl IntoIterator<Item = Value>) -> Value {
    let head = ["BlockStored".into(), ints([7]), Value::Nil, ints([1, 300]), 2.into()];
    arr(head.into_iter().chain(tail))
}

/// A store of one block of two tokens in map form, with one field set or added.
fn stored_map(key: &str, value: Value) -> Value {
    let mut pairs = vec![
        ("type", "BlockStored".into()),
        ("block_hashes", ints([7])),
        ("parent_block_hash", Value::Nil),
        ("token_ids", ints([1, 300])),
        ("block_size", 2.into()),
    ];
    pairs.retain(|(known, _)| *known != key);
    pairs.push((key, value));
    Value::Map(pairs.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

/// The same without one field.
fn stored_without(key: &str) -> Value {
    let Value::Map(mut pairs) = stored_map(key, Value::Nil) else { unreachable!() };
    pairs.pop();
    Value::Map(pairs)
}

#[test]
fn array_form_by_age_of_the_engine() {
    // C25: five fields and the tag; C37: with the medium, as SGLang.
    check_stored(stored_array([]), |stored| {
        let want = BlockStored {
            block_hashes: &[EngineKey(7)],
            tokens: &[1, 300],
            block_size: 2,
            ..Default::default()
        };
        assert_eq!(stored, want);
    });
    check_stored(stored_array([Value::Nil, "CPU_PINNED".into()]), |stored| {
        assert_eq!(stored.medium, Some("CPU_PINNED"));
    });
    // C26: a tail that we do not know.
    let extra = arr([arr(["lora".into()])]);
    let known = ["GPU".into(), "lora".into(), extra, 3.into(), "sliding_window".into(), 128.into()];
    let unknown = [Value::from("?"), map([("x", ints([1]))])];
    check_stored(stored_array([5.into()].into_iter().chain(known).chain(unknown)), |stored| {
        assert_eq!(
            (stored.lora_id, stored.medium, stored.lora_name),
            (Some(5), Some("GPU"), Some("lora"))
        );
        assert_eq!(
            (stored.group, stored.kind, stored.sliding_window),
            (Some(3), Some("sliding_window"), Some(128))
        );
        assert_eq!(stored.extra_keys.unwrap().len(), 1);
        assert_eq!((stored.locality, stored.cache_salt), (None, None));
    });
    // SGLang 0.5.18 and 0.5.19.
    let metadata = map([("x", 1.into()), ("cache_salt", "s".into())]);
    check_stored(stored_array([Value::Nil, "GPU".into(), metadata]), |stored| {
        assert_eq!((stored.lora_name, stored.cache_salt), (None, Some("s")));
    });
    let twice = map([("cache_salt", "s".into()), ("cache_salt", "t".into())]);
    check_refused(stored_array([Value::Nil, "GPU".into(), twice]), "duplicate_key");
    // C37: four elements.
    let short = arr(["BlockStored".into(), ints([7]), Value::Nil, ints([1])]);
    check_refused(short, "missing_field");
    check_refused(arr(["BlockRemoved".into()]), "missing_field");
    check_refused(arr([]), "missing_tag");
}

#[test]
fn map_form_in_any_order() {
    let full = map([
        ("locality", "REMOTE".into()),
        ("session_id", "ignored".into()),
        ("cache_salt", "salt".into()),
        ("kv_cache_spec_sliding_window", 64.into()),
        ("kv_cache_spec_kind", "full_attention".into()),
        ("group_idx", 0.into()),
        ("extra_keys", arr([Value::Nil])),
        ("lora_name", "l".into()),
        ("medium", "CPU".into()), // C27
        ("lora_id", 1.into()),
        ("block_size", 2.into()),
        ("token_ids", ints([1, 2])),
        ("parent_block_hash", 5.into()),
        ("block_hashes", ints([6])),
        ("lookahead_token_ids", arr([ints([1])])),
        ("type", "BlockStored".into()),
    ]);
    check_stored(full, |stored| {
        let want = BlockStored {
            block_hashes: &[EngineKey(6)],
            parent: Some(EngineKey(5)),
            tokens: &[1, 2],
            block_size: 2,
            lora_id: Some(1),
            lora_name: Some("l"),
            medium: Some("CPU"),
            extra_keys: None, // every block's is nil
            cache_salt: Some("salt"),
            group: Some(0),
            kind: Some("full_attention"),
            sliding_window: Some(64),
            locality: Some("REMOTE"),
        };
        assert_eq!(stored, want);
    });
    // A field that the tag does not have is unknown, whatever its type.
    let removed = map([
        ("type", "BlockRemoved".into()),
        ("token_ids", "?".into()),
        ("block_hashes", ints([1])),
        ("group_idx", 2.into()),
        ("locality", "LOCAL".into()),
    ]);
    decode(removed, |event| {
        let want = BlockRemoved {
            block_hashes: &[EngineKey(1)],
            group: Some(2),
            locality: Some("LOCAL"),
            ..Default::default()
        };
        assert_eq!(event, Ok(Event::Removed(want)));
    });
    let Value::Map(mut pairs) = removed_map() else { unreachable!() };
    pairs.insert(0, (Value::Nil, 1.into()));
    pairs.insert(0, (ints([1]), ints([2])));
    decode(Value::Map(pairs), |event| assert!(event.is_ok(), "keys that are not strings"));
    // vLLM drops the parent only together with a default, but nil and absent mean the same.
    check_stored(stored_without("parent_block_hash"), |stored| assert_eq!(stored.parent, None));
    for field in ["block_hashes", "token_ids", "block_size"] {
        check_refused(stored_without(field), "missing_field");
        check_refused(stored_map(field, Value::Nil), "field_type");
    }
    check_refused(map([("type", "BlockRemoved".into())]), "missing_field");
    check_refused(stored_without("type"), "missing_tag"); // C30
}

#[test]
fn events_that_are_none() {
    check_refused(map([("type", 7.into())]), "tag_type"); // C30
    check_refused(arr([7.into()]), "tag_type");
    check_refused(map([]), "missing_tag");
    check_refused(5.into(), "not_an_event");
    check_refused(Value::Nil, "not_an_event");
    check_refused(arr(["BlockMoved".into(), ints([1])]), "unknown_tag"); // C29
    check_refused(map([("x", 1.into()), ("type", "BlockMoved".into())]), "unknown_tag");
    let long = "X".repeat(1000);
    decode(arr([long.as_str().into()]), |event| {
        let want = EventError::UnknownTag { event: 1, tag: "X".repeat(32).into() };
        assert_eq!(event, Err(want));
    });
    let twice = [("type", "AllBlocksCleared".into()), ("type", "AllBlocksCleared".into())];
    check_refused(map(twice), "duplicate_key");
    let twice =
        [("type", "BlockRemoved".into()), ("block_hashes", ints([])), ("block_hashes", ints([]))];
    check_refused(map(twice), "duplicate_key");
}

#[test]
fn fields_have_types_and_ranges() {
    for field in ["medium", "lora_name", "kv_cache_spec_kind", "locality", "cache_salt"] {
        check_refused(stored_map(field, 123.into()), "field_type"); // C32
        check_refused(stored_map(field, Value::Binary(b"x".to_vec())), "field_type");
        check_refused(stored_map(field, NOT_UTF8.into()), "utf8");
        check_stored(stored_map(field, Value::Nil), |_| ());
    }
    for field in ["lora_id", "group_idx", "kv_cache_spec_sliding_window", "block_size"] {
        check_refused(stored_map(field, (-1).into()), "field_range"); // C31
        check_refused(stored_map(field, 1.5.into()), "field_type");
        check_refused(stored_map(field, "1".into()), "field_type");
    }
    for field in ["group_idx", "kv_cache_spec_sliding_window", "block_size"] {
        check_refused(stored_map(field, (1u64 << 32).into()), "field_range");
        check_stored(stored_map(field, u32::MAX.into()), |_| ());
    }
    check_stored(stored_map("lora_id", u64::MAX.into()), |stored| {
        assert_eq!(stored.lora_id, Some(u64::MAX));
    });
}

#[test]
fn hashes_are_integers_or_bytes() {
    let digest: Vec<u8> = (0..32).collect();
    let good = [
        (7u64.into(), 7),
        (300.into(), 300),
        (u64::MAX.into(), u64::MAX),
        ((-1).into(), u64::MAX),
        (i64::MIN.into(), 1 << 63),
        (Value::Binary(digest.clone()), 0x1819_1a1b_1c1d_1e1f), // C34
        (Value::Binary(digest[..16].to_vec()), 0x0809_0a0b_0c0d_0e0f),
        (Value::Binary(vec![1, 2]), 0x0102),
        (Value::Binary(vec![9; 33]), 0x0909_0909_0909_0909),
    ];
    for (hash, want) in &good {
        check_stored(stored_map("parent_block_hash", hash.clone()), |stored| {
            assert_eq!(stored.parent, Some(EngineKey(*want)));
        });
    }
    let all = arr(good.iter().map(|(hash, _)| hash.clone()));
    check_stored(stored_map("block_hashes", all), |stored| {
        assert!(stored.block_hashes.iter().map(|key| key.0).eq(good.iter().map(|(_, want)| *want)));
    });
    check_refused(stored_map("block_hashes", arr([Value::Binary(vec![])])), "empty_hash"); // C35
    check_refused(stored_map("parent_block_hash", Value::Binary(vec![])), "empty_hash");
    for wrong in ["x".into(), Value::Boolean(true), 1.5.into(), ints([1])] {
        check_refused(stored_map("parent_block_hash", wrong.clone()), "field_type");
        check_refused(stored_map("block_hashes", arr([wrong])), "field_type");
    }
    check_refused(stored_map("block_hashes", arr([Value::Nil])), "field_type");
    check_refused(stored_map("block_hashes", Value::Binary(vec![1; 8])), "field_type");
}

#[test]
fn tokens_are_u32_or_pairs() {
    let pairs = arr([ints([1, 2]), ints([70_000, 3, 4]), ints([5]), 6.into()]);
    check_stored(stored_map("token_ids", pairs), |stored| {
        assert_eq!(stored.tokens, [1, 70_000, 5, 6]);
    });
    let widths = ints([0, 127, 128, 255, 256, 65_535, 65_536, u32::MAX.into()]);
    check_stored(stored_map("token_ids", widths), |stored| {
        assert_eq!(stored.tokens, [0, 127, 128, 255, 256, 65_535, 65_536, u32::MAX]);
    });
    check_stored(stored_map("token_ids", arr([])), |stored| assert!(stored.tokens.is_empty()));
    let wrong =
        [(-1).into(), 1.0.into(), (1u64 << 32).into(), arr([]), arr(["x".into()]), Value::Nil];
    for token in wrong {
        check_refused(stored_map("token_ids", arr([1.into(), token])), "token");
    }
    // Wider than it needs to be, and signed: legal msgpack.
    let raw = hex(
        "92cb3ff80000000000009195ab426c6f636b53746f7265649101c092cf0000000000000007d20000000802",
    );
    assert!(events(&raw, &Limits::default())[0].as_ref().unwrap().contains("tokens: [7, 8]"));
}

#[test]
fn extra_keys_are_a_view() {
    let blocks = arr([
        Value::Nil,
        arr([
            "lora".into(),
            arr(["mm".into(), (-3).into()]),
            arr(["one".into()]),
            arr(["a".into(), "b".into(), 4.into()]),
            arr(["id".into(), 4.into(), "more".into()]),
            Value::Binary(vec![1, 2]),
            // Shapes that no engine sends.
            5.into(),
            Value::Nil,
            arr([]),
            arr([5.into(), "x".into()]),
            map([("x", 1.into())]),
        ]),
        arr([]),
    ]);
    let item = |id, offset| ExtraKey::Item { id, offset };
    check_stored(stored_map("block_hashes", ints([1, 2, 3])), |_| ());
    let mut event = stored_map("extra_keys", blocks);
    let Value::Map(pairs) = &mut event else { unreachable!() };
    pairs[1].1 = ints([1, 2, 3]);
    check_stored(event, |stored| {
        let extra = stored.extra_keys.unwrap();
        assert_eq!((extra.len(), extra.is_empty(), extra.blocks().len()), (3, false, 3));
        let got: Vec<Vec<ExtraKey<'_>>> = extra.blocks().map(Iterator::collect).collect();
        let want = vec![
            ExtraKey::Text("lora"),
            item("mm", -3),
            item("one", 0),
            item("a", 0),
            item("id", 4),
            ExtraKey::Bytes(&[1, 2]),
        ];
        assert_eq!(got, [vec![], want, vec![]]);
    });
    check_refused(stored_map("extra_keys", arr(["str".into()])), "field_type"); // C33
    check_refused(stored_map("extra_keys", "str".into()), "field_type");
    let huge = arr([arr([arr(["id".into(), u64::MAX.into()])])]);
    check_refused(stored_map("extra_keys", huge), "field_range");
    let text = arr([arr([NOT_UTF8.into()])]);
    check_refused(stored_map("extra_keys", text), "utf8");
    // One list too many for one block of two tokens; not dense with one token more.
    let two = arr([Value::Nil, arr(["x".into()])]);
    check_refused(stored_map("extra_keys", two.clone()), "extra_keys_length");
    let mut sparse = stored_map("extra_keys", two);
    let Value::Map(pairs) = &mut sparse else { unreachable!() };
    pairs[3].1 = ints([1, 2, 3]);
    check_stored(sparse, |stored| assert_eq!(stored.extra_keys.unwrap().len(), 2));
}

#[test]
fn mixed_batches_keep_their_order() {
    // C28
    let events_in = [removed_map(), map([("type", "AllBlocksCleared".into())]), stored_array([])];
    let got = events(&batch(events_in), &Limits::default());
    let names: Vec<&str> = got.iter().map(|e| &e.as_ref().unwrap()[..6]).collect();
    assert_eq!(names, ["Remove", "Cleare", "Stored"]);
}

#[test]
fn recorded_batches_in_hex() {
    // C39
    let check = |text: &str, rank, hash| {
        let payload = hex(text);
        let mut reader = BatchReader::new(&payload, &Limits::default()).unwrap();
        assert_eq!(*reader.header(), BatchHeader { timestamp: 1.0, rank, events: 1 });
        let mut scratch = Scratch::default();
        let want = BlockRemoved { block_hashes: &[EngineKey(hash)], ..Default::default() };
        assert_eq!(reader.next_event(&mut scratch), Some(Ok(Event::Removed(want))));
    };
    let head = "93cb3ff00000000000009192ac426c6f636b52656d6f76656491";
    check(&format!("{head}cf1234567812345678c0"), None, 1_311_768_465_173_141_112);
    let digest = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    check(&format!("{head}c420{digest}03"), Some(3), 1_736_447_835_066_146_335);
}

#[track_caller]
fn check_header(payload: &[u8], want: Result<(f64, Option<u32>, usize), &str>) {
    let got = header(payload, &Limits::default());
    let got = got.map(|h| (h.timestamp, h.rank, h.events)).map_err(|error| {
        assert!(DecodeError::REASONS.contains(&error.reason()));
        error.reason()
    });
    assert_eq!(got, want);
}

#[test]
fn headers() {
    let none = || arr([]);
    check_header(&bytes(&arr([1.5.into(), none()])), Ok((1.5, None, 0))); // C38
    check_header(&bytes(&arr([2.into(), none(), Value::Nil])), Ok((2.0, None, 0)));
    check_header(&bytes(&arr([2.into(), none(), u32::MAX.into()])), Ok((2.0, Some(u32::MAX), 0)));
    let long = arr([2.into(), none(), 3.into(), "x".into(), map([("y", ints([1]))])]);
    check_header(&bytes(&long), Ok((2.0, Some(3), 0)));
    check_header(&batch([removed_map(), 5.into()]), Ok((1.5, Some(0), 2)));

    check_header(b"\xff\xff\xff", Err("not_a_batch")); // C36
    check_header(b"", Err("truncated"));
    check_header(b"\xc1", Err("malformed"));
    check_header(&bytes(&map([("x", 1.into())])), Err("not_a_batch"));
    check_header(&bytes(&arr([1.5.into()])), Err("batch_length"));
    check_header(&bytes(&arr(["1".into(), none()])), Err("timestamp"));
    check_header(&bytes(&arr([f64::NAN.into(), none()])), Err("timestamp"));
    check_header(&bytes(&arr([f64::INFINITY.into(), none()])), Err("timestamp"));
    check_header(&bytes(&arr([1.into(), "x".into()])), Err("events"));
    for rank in [(-1).into(), (1u64 << 32).into(), "0".into(), 1.5.into()] {
        check_header(&bytes(&arr([1.into(), none(), rank])), Err("rank"));
    }
    check_header(&[batch([]), vec![0]].concat(), Err("trailing_bytes"));
    check_header(&hex("92cb3ff8000000000000ddffffffff"), Err("truncated"));
    check_header(&hex("92cb3ff800000000000091c1"), Err("malformed"));
    check_header(&vec![0x91; 100_000], Err("batch_length"));
    let deep = [hex("92cb3ff800000000000091"), vec![0x91; 100_000]].concat();
    check_header(&deep, Err("nesting"));
}

#[test]
fn limits_hold_at_their_edges() {
    let exact = Limits { payload_bytes: 1 << 10, events: 2, blocks: 1, tokens: 2, depth: 4 };
    let two = batch([stored_array([]), removed_map()]);
    assert!(events(&two, &exact).iter().all(Result::is_ok));
    let reason = |limits: Limits| header(&two, &limits).unwrap_err().reason();
    assert_eq!(reason(Limits { payload_bytes: two.len() - 1, ..exact.clone() }), "payload_size");
    assert_eq!(reason(Limits { events: 1, ..exact.clone() }), "too_many_events");
    for depth in 0..4 {
        assert_eq!(reason(Limits { depth, ..exact.clone() }), "nesting");
    }
    let got = events(&two, &Limits { tokens: 1, ..exact.clone() });
    assert_eq!(got[0], Err("too_many_tokens"));
    assert!(got[1].is_ok());
    let got = events(&two, &Limits { blocks: 0, ..exact });
    assert_eq!(got, [Err("too_many_blocks"), Err("too_many_blocks")]);
}

#[test]
fn extra_keys_are_bounded() {
    let stored = |inputs: usize| {
        let extras = vec![Extra::Text("x".to_owned()); inputs];
        let stored = encode::BlockStored {
            block_hashes: vec![encode::Hash::Unsigned(1)],
            token_ids: encode::Tokens::Plain(vec![7; 16]),
            block_size: 16,
            extra_keys: Some(vec![Some(extras)]),
            ..encode::BlockStored::default()
        };
        let events = vec![encode::Event::BlockStored(stored)];
        let batch = encode::Batch { timestamp: 1.0, events, rank: None };
        let payload = batch.encode(encode::Form::Map).unwrap();
        let mut reader = BatchReader::new(&payload, &Limits::default()).unwrap();
        let mut scratch = Scratch::default();
        let event = reader.next_event(&mut scratch).unwrap();
        event.map(|_| ()).map_err(|error| error.reason())
    };
    assert_eq!(stored(256), Ok(()));
    assert_eq!(stored(257), Err("too_many_extras"));
}
