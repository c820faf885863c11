//! Properties of the parsers over arbitrary bytes, shared by the fuzz targets in `tests/fuzz` and
//! by the replay of their corpora on a stable compiler. For tests only: a broken property panics.

use super::{BatchReader, Event, Frames, Limits, ReplayReply, Scratch, Topic, header};

/// Small enough for a fuzzer to reach each of them.
fn limits() -> Limits {
    Limits { payload_bytes: 1 << 16, events: 64, blocks: 64, tokens: 512, depth: 16 }
}

/// Decoding returns, and what it returns is within the limits and consistent in itself.
///
/// # Panics
///
/// If it is not.
pub fn decode_is_total(data: &[u8]) {
    let limits = limits();
    let scanned = header(data, &limits);
    let mut reader = match BatchReader::new(data, &limits) {
        Ok(reader) => reader,
        Err(error) => {
            assert_eq!(scanned, Err(error), "header and reader agree");
            return;
        }
    };
    assert_eq!(scanned.as_ref(), Ok(reader.header()), "header and reader agree");
    assert!(reader.header().timestamp.is_finite() && reader.header().events <= limits.events);

    let mut scratch = Scratch::default();
    let mut events = 0;
    while let Some(event) = reader.next_event(&mut scratch) {
        events += 1;
        match event {
            Ok(Event::Stored(stored)) => {
                assert!(stored.block_hashes.len() <= limits.blocks);
                assert!(stored.tokens.len() <= limits.tokens);
                if let Some(extra) = stored.extra_keys {
                    assert_eq!(extra.blocks().len(), extra.len());
                    assert_eq!(extra.blocks().count(), extra.len());
                    let keys: usize = extra.blocks().map(Iterator::count).sum();
                    assert!(keys <= data.len());
                }
            }
            Ok(Event::Removed(removed)) => assert!(removed.block_hashes.len() <= limits.blocks),
            Ok(Event::Cleared) => {}
            Err(error) => assert!(!error.to_string().is_empty() && !error.reason().is_empty()),
        }
    }
    assert_eq!(events, reader.header().events, "every event is delivered or refused");
    // A vector may double when it grows, and starts with four elements.
    assert!(scratch.hashes.capacity() <= 2 * limits.blocks);
    assert!(scratch.tokens.capacity() <= 2 * limits.tokens);
}

/// A topic parses or is refused for its length, and a pod id never outgrows the limit (three bytes
/// replace one that is not UTF-8).
///
/// # Panics
///
/// If it does.
pub fn topic_is_total(data: &[u8]) {
    const LIMIT: usize = 32;
    match Topic::parse(data, LIMIT) {
        Ok(topic) => {
            assert!(topic.pod.len() <= 3 * LIMIT && topic.model.len() <= 3 * data.len());
            if let Ok(text) = std::str::from_utf8(data) {
                assert!(
                    text == topic.pod || text.ends_with(&format!("@{}@{}", topic.pod, topic.model))
                );
            }
        }
        Err(error) => assert!(data.len() > LIMIT, "{error}"),
    }
}

/// Splitting messages returns, and a batch is never empty. `data` is frames, each of them after a
/// byte with its length; the last one takes what is left.
///
/// # Panics
///
/// If it is.
pub fn replay_reply_is_total(data: &[u8]) {
    let mut frames: Vec<&[u8]> = Vec::new();
    let mut rest = data;
    while let [len, tail @ ..] = rest {
        let (frame, tail) = tail.split_at_checked(usize::from(*len)).unwrap_or((tail, &[]));
        frames.push(frame);
        rest = tail;
    }
    match ReplayReply::parse(&frames) {
        Ok(ReplayReply::Batch { sequence, payload }) => {
            assert!(sequence != u64::MAX && !payload.is_empty());
            assert_eq!(frames.last(), Some(&payload));
        }
        Ok(ReplayReply::End) => assert_eq!(frames.last().map(|frame| frame.len()), Some(0)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if let Ok(live) = Frames::split(&frames) {
        let reply = ReplayReply::Batch { sequence: live.sequence, payload: live.payload };
        assert_eq!(ReplayReply::parse(&frames), Ok(reply), "a live message reads as a reply");
    }
}
