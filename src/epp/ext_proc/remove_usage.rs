//! Takes the chunk with the usage out of a stream whose client did not ask for it.
//!
//! # Model
//!
//! An engine that is asked for usage sends one event more before `data: [DONE]`: its `choices` are empty
//! and its `usage` is an object. That event goes; every other byte passes as it came. Events end with an
//! empty line, of `\n` or `\r\n`.
//!
//! OpenAI's own servers also write `"usage":null` into every other chunk, vLLM does not. These stay: a
//! client reads null as nothing, and every chunk would have to be written anew.
//!
//! # Invariants
//!
//! * Where chunks end changes nothing, as long as what is held back may stay here.
//! * Only the beginning of an event that may still turn out to be the one is held back, at most
//!   [`EVENT_BYTES`]. In the streams of engines that is clear once `choices` begin.
//!
//! # Cost
//!
//! One search for line ends per chunk and one for `choices` per event; what passes is not copied, unless
//! an event that was held back goes on in the next chunk. The event that goes is parsed.

use std::{collections::HashMap, sync::LazyLock};

use bytes::{Bytes, BytesMut};
use memchr::{memchr, memmem::Finder};
use serde::{Deserialize, de::IgnoredAny};

use super::body::Pieces;

/// Longer events are passed on; those with usage have a few hundred bytes.
pub(super) const EVENT_BYTES: usize = 8 << 10;
const FIELD: &[u8] = b"data:";
const CHOICES: &[u8] = b"\"choices\"";
static FIND_CHOICES: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(CHOICES));

/// What the last byte was, for finding empty lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    /// Nothing that matters.
    Text,
    /// A line's end, or the beginning of the stream.
    Newline,
    /// A carriage return behind a line's end.
    Return,
}

/// A filter of one stream.
#[derive(Debug)]
pub(super) struct UsageRemover {
    last: Last,
    /// The current event may be the one. If not, the rest of it passes.
    open: bool,
    /// The beginning of the current event, while it is open.
    held: Bytes,
}

/// A chunk, as far as it matters.
#[derive(Deserialize)]
struct Chunk {
    choices: Vec<IgnoredAny>,
    #[serde(rename = "usage")]
    _usage: HashMap<String, IgnoredAny>,
}

impl UsageRemover {
    pub(super) fn new() -> Self {
        Self { last: Last::Newline, open: true, held: Bytes::new() }
    }

    /// Appends what is left of the next chunk to `out`; returns whether that is something else than the
    /// chunk. With `hold` the beginning of an event may stay here.
    pub(super) fn push(&mut self, chunk: Bytes, hold: bool, out: &mut Pieces) -> bool {
        let mut scanned = self.held.len();
        let mut changed = scanned > 0;
        let text = self.with_held(chunk);
        // Where the current event begins, and what is not yet passed on.
        let (mut event, mut rest) = (0, 0);
        while let Some(length) = self.event_end(&text[scanned..]) {
            scanned += length;
            if self.open && is_usage(&text[event..scanned]) {
                pass(&text, rest, event, out);
                rest = scanned;
                changed = true;
            }
            self.open = true;
            event = scanned;
        }
        let mut end = text.len();
        if self.open && event < end {
            if hold && may_be_usage(&text[event..]) {
                self.held = text.slice(event..);
                end = event;
                changed = true;
            } else {
                self.open = false;
                if !hold && is_usage(&text[event..]) {
                    end = event;
                    changed = true;
                }
            }
        }
        pass(&text, rest, end, out);
        changed
    }

    /// What is held back; the stream is over.
    pub(super) fn rest(&mut self) -> Bytes {
        let held = std::mem::take(&mut self.held);
        if is_usage(&held) { Bytes::new() } else { held }
    }

    /// Length of what is held back, in bytes.
    pub(super) fn held_bytes(&self) -> usize {
        self.held.len()
    }

    fn with_held(&mut self, chunk: Bytes) -> Bytes {
        if self.held.is_empty() {
            return chunk;
        }
        let held = std::mem::take(&mut self.held);
        let mut text = BytesMut::with_capacity(held.len() + chunk.len());
        text.extend_from_slice(&held);
        text.extend_from_slice(&chunk);
        text.freeze()
    }

    /// Where in `text`, which goes on behind what was read, the current event ends.
    fn event_end(&mut self, text: &[u8]) -> Option<usize> {
        let mut at = 0;
        loop {
            match (self.last, *text.get(at)?) {
                (Last::Newline | Last::Return, b'\n') => {
                    self.last = Last::Newline;
                    return Some(at + 1);
                }
                (Last::Newline, b'\r') => {
                    self.last = Last::Return;
                    at += 1;
                }
                _ => {
                    let Some(newline) = memchr(b'\n', &text[at..]) else {
                        self.last = Last::Text;
                        return None;
                    };
                    self.last = Last::Newline;
                    at += newline + 1;
                }
            }
        }
    }
}

fn pass(text: &Bytes, from: usize, to: usize, out: &mut Pieces) {
    if from < to {
        out.push(text.slice(from..to));
    }
}

/// Can an event that begins so be the one? What is true of an event is true of its beginnings.
fn may_be_usage(event: &[u8]) -> bool {
    let common = FIELD.len().min(event.len());
    if event.len() > EVENT_BYTES || event[..common] != FIELD[..common] {
        return false;
    }
    let Some(key) = FIND_CHOICES.find(event) else { return true };
    let mut behind = event[key + CHOICES.len()..].iter().filter(|byte| !byte.is_ascii_whitespace());
    b":[]".iter().all(|wanted| behind.next().is_none_or(|byte| byte == wanted))
}

/// Is this whole event the one?
fn is_usage(event: &[u8]) -> bool {
    let Some(data) = event.strip_prefix(FIELD).filter(|_| may_be_usage(event)) else {
        return false;
    };
    serde_json::from_slice::<Chunk>(data).is_ok_and(|chunk| chunk.choices.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    const TEXT: &str = "data: {\"id\":\"a\",\"choices\":[{\"index\":0,\"text\":\"hi\"}]}\n\n";
    const USAGE: &str =
        "data: {\"id\":\"a\",\"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":3}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    /// What is left of chunks; all that is held comes out at the end.
    fn filtered<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> String {
        let mut remover = UsageRemover::new();
        let mut out = Pieces::new();
        for chunk in chunks {
            remover.push(Bytes::copy_from_slice(chunk), true, &mut out);
            assert!(remover.held_bytes() <= EVENT_BYTES);
        }
        out.push(remover.rest());
        String::from_utf8(out.concat()).unwrap()
    }

    #[test]
    fn the_usage_goes_and_nothing_else() {
        #[track_caller]
        fn check(text: &str, want: &str) {
            let bytes = text.as_bytes();
            assert_eq!(filtered([bytes]), want);
            for cut in 0..=bytes.len() {
                let (one, two) = bytes.split_at(cut);
                assert_eq!(filtered([one, two]), want, "cut at {cut}");
            }
            assert_eq!(filtered(bytes.chunks(1)), want, "byte by byte");
            let mut out = Pieces::new();
            let changed = UsageRemover::new().push(Bytes::copy_from_slice(bytes), false, &mut out);
            assert_eq!((out.concat(), changed), (want.into(), text != want), "in one piece");
        }
        check(&format!("{TEXT}{TEXT}{USAGE}{DONE}"), &format!("{TEXT}{TEXT}{DONE}"));
        check(&format!("{USAGE}{DONE}"), DONE);
        check(&USAGE.replace('\n', "\r\n"), "");
        let crlf = |text: &str| text.replace('\n', "\r\n");
        check(&crlf(&format!("{TEXT}{USAGE}{DONE}")), &crlf(&format!("{TEXT}{DONE}")));
        // Without the empty line at the end.
        check(&format!("{TEXT}{}", USAGE.trim_end()), TEXT);
        check("data:{\"usage\":{},\"choices\" : [ ] }\n\nx", "x");
        for stays in [
            TEXT,
            DONE,
            "",
            "\n\n",
            ": ping\n\n",
            "data: {\"choices\":[],\"usage\":null}\n\n",
            "data: {\"choices\":[],\"usage\":[]}\n\n",
            "data: {\"choices\":[{}],\"usage\":{\"prompt_tokens\":3}}\n\n",
            "data: {\"choices\":null,\"usage\":{}}\n\n",
            "data: {\"choices\":[]}\n\n",
            "data: {\"usage\":{}}\n\n",
            "data: {\"a\":{\"choices\":[],\"usage\":{}}}\n\n",
            "id: 1\ndata: {\"choices\":[],\"usage\":{}}\n\n",
            "data: {\"choices\":[],\ndata: \"usage\":{}}\n\n",
            "{\"choices\":[],\"usage\":{\"prompt_tokens\":3}}",
            "data: {\"choices\":[],\"usage\":{}",
            "dat",
        ] {
            check(stays, stays);
        }
    }

    #[test]
    fn an_event_that_is_too_long_passes() {
        let long = |fill: usize| {
            format!("data: {{\"a\":\"{}\",\"choices\":[],\"usage\":{{}}}}\n\n", "x".repeat(fill))
        };
        let around = EVENT_BYTES - long(0).len();
        for (fill, stays) in [(around, false), (around + 1, true), (3 * EVENT_BYTES, true)] {
            let text = long(fill);
            for size in [1000, usize::MAX] {
                let left = filtered(text.as_bytes().chunks(size));
                assert_eq!(left == text, stays, "{fill} in chunks of {size}");
                assert!(stays || left.is_empty());
            }
        }
    }

    #[test]
    fn what_passes_is_the_same_bytes_and_does_not_wait() {
        let mut remover = UsageRemover::new();
        let whole = Bytes::from(format!("{TEXT}{TEXT}"));
        let mut out = Pieces::new();
        assert!(!remover.push(whole.clone(), true, &mut out));
        assert_eq!((out.len(), out[0].as_ptr(), out[0].len()), (1, whole.as_ptr(), whole.len()));

        // An event is passed on as soon as it has a choice, wherever it ends.
        let begins = Bytes::from_static(b"data: {\"choices\":[{\"text\":\"a long");
        out.clear();
        assert!(!remover.push(begins.clone(), true, &mut out));
        assert_eq!((&out[0], remover.held_bytes()), (&begins, 0));
        out.clear();
        assert!(!remover.push(Bytes::from_static(b" text\"}]}\n"), true, &mut out));
        assert_eq!(remover.held_bytes(), 0);

        let both = Bytes::from(format!("\n{USAGE}{DONE}"));
        out.clear();
        assert!(remover.push(both.clone(), true, &mut out));
        assert_eq!(out[0].as_ptr(), both.as_ptr());
        assert_eq!(out.concat(), format!("\n{DONE}").into_bytes());
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 500, failure_persistence: None, ..Default::default()
        })]
        #[test]
        fn any_cuts_give_the_same(
            parts in vec(prop_oneof![
                Just(TEXT.to_owned()),
                Just(USAGE.to_owned()),
                Just(USAGE.replace('\n', "\r\n")),
                Just(DONE.to_owned()),
                Just("data: {\"choices\":[".to_owned()),
                Just("],\"usage\":{}}".to_owned()),
                Just("\n".to_owned()),
                Just("\r\n".to_owned()),
                "[a-z\"{}: \r\n]{0,12}",
            ], 0..30),
            cuts in vec(any::<Index>(), 0..30),
        ) {
            let text = parts.concat();
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            places.sort_unstable();
            let mut from = 0;
            let mut chunks: Vec<&[u8]> = Vec::new();
            for place in places.into_iter().chain([text.len()]) {
                chunks.push(&text.as_bytes()[from..place]);
                from = place;
            }
            prop_assert_eq!(filtered(chunks), filtered([text.as_bytes()]));
        }
    }
}
