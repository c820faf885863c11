//! A line notation for event batches: what a test says, in the order in which it happens.
//!
//! `;` separates events. Ranges include both ends.
//!
//! ```text
//! store 1-4 of 1-64 by 16      hashes 1 to 4 over tokens 1 to 64, blocks of 16
//! store 5 of 65-80 after 4     16 is the default block size; 4 is the parent
//! store 1-4 on CPU             no tokens: a placeholder
//! remove 1-2 on CPU
//! clear
//! ```
//!
//! More words of a store: `group 1`, `kind sliding_window`, `window 32`, `lora NAME`, `id 7`, `far`
//! (locality REMOTE), `salt S` (SGLang's), `extra a|b@3,c|-` (per block, `|` between blocks, `@` an
//! offset, `-` none).

use std::ops::RangeInclusive;

use kv_indexer::wire::encode::{BlockRemoved, BlockStored, Event, Extra, Hash, Tokens};

/// `3` or `3-7`.
pub(crate) fn range(text: &str) -> RangeInclusive<u32> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{text:?} is no number"));
    number(first)..=number(last)
}

/// `1-64` or `1-16,33-48`.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    text.split(',').flat_map(range).collect()
}

/// The events of one batch.
pub(crate) fn events(text: &str) -> Vec<Event> {
    let events = text.split(';').map(str::trim).filter(|event| !event.is_empty());
    events.map(event).collect()
}

fn hashes(text: &str) -> Vec<Hash> {
    if text == "none" {
        return Vec::new();
    }
    tokens(text).into_iter().map(|hash| Hash::Unsigned(hash.into())).collect()
}

fn event(text: &str) -> Event {
    let mut words = text.split_whitespace();
    let mut word = || words.next();
    match word() {
        Some("clear") => Event::AllBlocksCleared,
        Some("remove") => {
            let mut event =
                BlockRemoved { block_hashes: hashes(word().unwrap()), ..BlockRemoved::default() };
            while let Some(name) = word() {
                match name {
                    "far" => event.locality = Some("REMOTE".to_owned()),
                    "on" => event.medium = word().map(str::to_owned),
                    "group" => event.group_idx = word().map(|n| n.parse().unwrap()),
                    other => panic!("{other:?} in {text:?}"),
                }
            }
            Event::BlockRemoved(event)
        }
        Some("store") => {
            let mut event = BlockStored {
                block_hashes: hashes(word().unwrap()),
                medium: Some("GPU".to_owned()),
                ..BlockStored::default()
            };
            while let Some(name) = word() {
                let text_value = |value: Option<&str>| value.map(str::to_owned);
                match name {
                    "far" => event.locality = Some("REMOTE".to_owned()),
                    "of" => {
                        event.token_ids = Tokens::Plain(tokens(word().unwrap()));
                        event.block_size = 16;
                    }
                    "by" => event.block_size = word().unwrap().parse().unwrap(),
                    "after" => {
                        let parent = word().unwrap().parse().unwrap();
                        event.parent_block_hash = Some(Hash::Unsigned(parent));
                    }
                    "on" => event.medium = text_value(word()),
                    "group" => event.group_idx = word().map(|n| n.parse().unwrap()),
                    "kind" => event.kv_cache_spec_kind = text_value(word()),
                    "window" => {
                        event.kv_cache_spec_sliding_window = word().map(|n| n.parse().unwrap());
                    }
                    "lora" => event.lora_name = text_value(word()),
                    "id" => event.lora_id = word().map(|n| n.parse().unwrap()),
                    "salt" => event.cache_salt = text_value(word()),
                    "extra" => event.extra_keys = Some(extras(word().unwrap())),
                    other => panic!("{other:?} in {text:?}"),
                }
            }
            Event::BlockStored(event)
        }
        other => panic!("{other:?} in {text:?}"),
    }
}

fn extras(text: &str) -> Vec<Option<Vec<Extra>>> {
    let extra = |text: &str| match text.split_once('@') {
        Some((id, offset)) => Extra::Item(id.to_owned(), offset.parse().unwrap()),
        None => Extra::Text(text.to_owned()),
    };
    text.split('|')
        .map(|block| (block != "-").then(|| block.split(',').map(extra).collect()))
        .collect()
}
