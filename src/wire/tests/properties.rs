//! What holds for every batch, and for all bytes.

use super::*;
use crate::wire::{encode, fuzz};

fn hash() -> impl Strategy<Value = Hash> {
    prop_oneof![
        any::<u64>().prop_map(Hash::Unsigned),
        any::<i64>().prop_map(Hash::Signed),
        (0u64..200).prop_map(Hash::Unsigned),
        prop::collection::vec(any::<u8>(), 1..40).prop_map(Hash::Bytes),
    ]
}

fn token() -> impl Strategy<Value = u32> {
    prop_oneof![0..300u32, 0..200_000u32, any::<u32>()]
}

fn text() -> impl Strategy<Value = Option<String>> {
    prop::option::of(".{0,40}")
}

fn extra() -> impl Strategy<Value = Extra> {
    prop_oneof![
        ".{0,40}".prop_map(Extra::Text),
        (".{0,40}", any::<i64>()).prop_map(|(id, offset)| Extra::Item(id, offset)),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Extra::Bytes),
    ]
}

fn extra_keys(blocks: usize) -> impl Strategy<Value = Option<Vec<Option<Vec<Extra>>>>> {
    let block = prop::option::of(prop::collection::vec(extra(), 0..4));
    prop::option::of(prop::collection::vec(block, blocks))
}

prop_compose! {
    fn stored()(hashes in prop::collection::vec(hash(), 0..20))(
        extra_keys in extra_keys(hashes.len()),
        block_hashes in Just(hashes),
        parent_block_hash in prop::option::of(hash()),
        token_ids in prop_oneof![
            prop::collection::vec(token(), 0..100).prop_map(Tokens::Plain),
            prop::collection::vec((token(), token()), 0..100).prop_map(Tokens::Pairs),
        ],
        block_size in 0..=i64::from(u32::MAX),
        lora_id in prop::option::of(any::<u64>()),
        names in (text(), text(), text(), text()),
        group in prop::option::of(any::<(u32, u32)>()),
        kind in text(),
        session_id in text(),
    ) -> encode::BlockStored {
        let (medium, lora_name, locality, cache_salt) = names;
        encode::BlockStored {
            block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name,
            extra_keys, group_idx: group.map(|(index, _)| index), kv_cache_spec_kind: kind,
            kv_cache_spec_sliding_window: group.map(|(_, window)| window), locality,
            ownership: session_id.clone(), session_id, cache_salt,
            lookahead_token_ids: group.map(|(a, b)| vec![vec![a, b]]),
        }
    }
}

prop_compose! {
    fn removed()(
        block_hashes in prop::collection::vec(hash(), 0..20),
        medium in text(),
        group_idx in prop::option::of(any::<u32>()),
        locality in text(),
        session_id in text(),
    ) -> encode::BlockRemoved {
        encode::BlockRemoved {
            block_hashes, medium, group_idx, locality, ownership: session_id.clone(), session_id,
        }
    }
}

fn event() -> impl Strategy<Value = encode::Event> {
    prop_oneof![
        4 => stored().prop_map(encode::Event::BlockStored),
        2 => removed().prop_map(encode::Event::BlockRemoved),
        1 => Just(encode::Event::AllBlocksCleared),
    ]
}

prop_compose! {
    fn any_batch()(
        timestamp in -1e12..1e12,
        events in prop::collection::vec(event(), 0..8),
        rank in prop::option::of(any::<u32>()),
    ) -> encode::Batch {
        encode::Batch { timestamp, events, rank }
    }
}

fn form() -> impl Strategy<Value = Form> {
    prop_oneof![Just(Form::Array), Just(Form::Map)]
}

fn key(hash: &Hash) -> EngineKey {
    EngineKey(match hash {
        Hash::Unsigned(hash) => *hash,
        Hash::Signed(hash) => *hash as u64,
        Hash::Bytes(bytes) => {
            let padded = [&[0; 8], bytes.as_slice()].concat();
            u64::from_be_bytes(*padded.last_chunk().unwrap())
        }
    })
}

fn keys(hashes: &[Hash]) -> Vec<EngineKey> {
    hashes.iter().map(key).collect()
}

/// Whether `got` is what `sent` means after a journey in `form`.
fn same(got: &Event<'_>, sent: &encode::Event, form: Form) -> Result<(), TestCaseError> {
    let is_map = form == Form::Map;
    match (got, sent) {
        (Event::Cleared, encode::Event::AllBlocksCleared) => {}
        (Event::Removed(got), encode::Event::BlockRemoved(sent)) => {
            prop_assert_eq!(got.block_hashes, keys(&sent.block_hashes));
            prop_assert_eq!(got.medium, sent.medium.as_deref());
            prop_assert_eq!(got.group, sent.group_idx);
            prop_assert_eq!(got.locality, sent.locality.as_deref().filter(|_| is_map));
        }
        (Event::Stored(got), encode::Event::BlockStored(sent)) => {
            prop_assert_eq!(got.block_hashes, keys(&sent.block_hashes));
            prop_assert_eq!(got.parent, sent.parent_block_hash.as_ref().map(key));
            let tokens: Vec<u32> = match &sent.token_ids {
                Tokens::Plain(tokens) => tokens.clone(),
                Tokens::Pairs(pairs) => pairs.iter().map(|(first, _)| *first).collect(),
            };
            prop_assert_eq!(got.tokens, tokens);
            prop_assert_eq!(i64::from(got.block_size), sent.block_size);
            prop_assert_eq!(got.lora_id, sent.lora_id);
            let has_name = is_map || sent.cache_salt.is_none();
            prop_assert_eq!(got.lora_name, sent.lora_name.as_deref().filter(|_| has_name));
            prop_assert_eq!(got.medium, sent.medium.as_deref());
            prop_assert_eq!(got.cache_salt, sent.cache_salt.as_deref());
            prop_assert_eq!(got.group, sent.group_idx);
            prop_assert_eq!(got.kind, sent.kv_cache_spec_kind.as_deref());
            prop_assert_eq!(got.sliding_window, sent.kv_cache_spec_sliding_window);
            prop_assert_eq!(got.locality, sent.locality.as_deref().filter(|_| is_map));
            let want = sent.extra_keys.clone().filter(|blocks| blocks.iter().any(Option::is_some));
            let got: Option<Vec<Vec<Extra>>> = got
                .extra_keys
                .map(|extra| extra.blocks().map(|block| block.map(owned).collect()).collect());
            let want = want.map(|b| b.into_iter().map(Option::unwrap_or_default).collect());
            prop_assert_eq!(got, want);
        }
        (got, sent) => prop_assert!(false, "{:?} for {:?}", got, sent),
    }
    Ok(())
}

fn owned(key: ExtraKey<'_>) -> Extra {
    match key {
        ExtraKey::Text(text) => Extra::Text(text.to_owned()),
        ExtraKey::Item { id, offset } => Extra::Item(id.to_owned(), offset),
        ExtraKey::Bytes(bytes) => Extra::Bytes(bytes.to_vec()),
    }
}

proptest! {
    #[test]
    fn decoding_inverts_encoding(batch in any_batch(), form in form()) {
        let payload = batch.encode(form).unwrap();
        let mut reader = BatchReader::new(&payload, &Limits::default()).unwrap();
        let BatchHeader { timestamp, rank, events } = *reader.header();
        prop_assert_eq!((timestamp, rank, events), (batch.timestamp, batch.rank, batch.events.len()));
        let mut scratch = Scratch::default();
        for sent in &batch.events {
            same(&reader.next_event(&mut scratch).unwrap().unwrap(), sent, form)?;
        }
        prop_assert_eq!(reader.next_event(&mut scratch), None);
    }

    #[test]
    fn no_prefix_of_a_batch_is_a_batch(batch in any_batch(), form in form()) {
        let payload = batch.encode(form).unwrap();
        for cut in 0..payload.len() {
            prop_assert!(header(&payload[..cut], &Limits::default()).is_err(), "cut at {}", cut);
        }
    }

    #[test]
    fn one_wrong_byte_is_survived(
        batch in any_batch(), form in form(), at in any::<prop::sample::Index>(), byte: u8,
    ) {
        let mut payload = batch.encode(form).unwrap();
        let at = at.index(payload.len());
        payload[at] = byte;
        fuzz::decode_is_total(&payload);
    }

    #[test]
    fn any_bytes_are_survived(
        data in prop::collection::vec(any::<u8>(), 0..300), events in 0u8..16,
    ) {
        fuzz::decode_is_total(&data);
        fuzz::topic_is_total(&data);
        fuzz::replay_reply_is_total(&data);
        // The same bytes where events are expected.
        let head = [0x92, 0x01, 0x90 | events];
        fuzz::decode_is_total(&[&head, data.as_slice()].concat());
    }

    #[test]
    fn any_topic_is_survived(topic in "([a-z0-9:.]{0,20}@){0,4}.{0,20}") {
        fuzz::topic_is_total(topic.as_bytes());
    }

    #[test]
    fn scratch_stays_within_the_limits(batch in any_batch(), blocks in 0usize..20, tokens in 0usize..100) {
        let limits = Limits { blocks, tokens, ..Limits::default() };
        let payload = batch.encode(Form::Map).unwrap();
        let mut reader = BatchReader::new(&payload, &limits).unwrap();
        let mut scratch = Scratch::default();
        while reader.next_event(&mut scratch).is_some() {}
        prop_assert!(scratch.hashes.capacity() <= (2 * blocks).max(4));
        prop_assert!(scratch.tokens.capacity() <= (2 * tokens).max(4));
    }
}
