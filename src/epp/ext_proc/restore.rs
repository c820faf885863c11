//! Writes the client's model name back into a response.
//!
//! Replaces the value of `"model":"TARGET"` and `"model": "TARGET"`, as the Go EPP does; in JSON
//! text these bytes are a key and its value and nothing else. A chunk without them is passed on as
//! it is. What a chunk's end may be the beginning of one is held back for the next chunk: at most
//! the length of the longer form.

use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::{memchr_iter, memmem::Finder};

use super::body::Pieces;

const KEY: &[u8] = b"\"model\":";
static FIND_KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));

/// Puts one name in the place of another.
#[derive(Debug)]
pub(super) struct Restorer {
    /// The name to replace, as a JSON string.
    from: Vec<u8>,
    /// What replaces it.
    to: Bytes,
    /// The end of the last chunk, if a match may have begun in it.
    held: Bytes,
}

/// What stands at a place in the text.
enum Found {
    /// The value to replace, from here to there.
    Value(usize, usize),
    /// The text ends before it is clear.
    Open,
    /// Something else.
    Other,
}

impl Restorer {
    /// `None` if there is nothing to replace.
    pub(super) fn new(target: &str, incoming: &str) -> Option<Self> {
        if target == incoming || target.is_empty() || incoming.is_empty() {
            return None;
        }
        let from = serde_json::to_vec(target).ok()?;
        let to = serde_json::to_vec(incoming).ok()?.into();
        Some(Self { from, to, held: Bytes::new() })
    }

    /// Appends the rewritten chunk to `out`; returns whether anything was replaced. With `hold` an
    /// end that may be the beginning of a match stays here.
    pub(super) fn push(&mut self, chunk: Bytes, hold: bool, out: &mut Pieces) -> bool {
        let mut text = if self.held.is_empty() {
            chunk
        } else {
            let held = std::mem::take(&mut self.held);
            let mut text = BytesMut::with_capacity(held.len() + chunk.len());
            text.extend_from_slice(&held);
            text.extend_from_slice(&chunk);
            text.freeze()
        };
        let mut replaced = false;
        let mut from = 0;
        while let Some(key) = FIND_KEY.find(&text[from..]) {
            match self.found(&text[from + key..]) {
                Found::Value(start, end) => {
                    let (start, end) = (from + key + start, from + key + end);
                    out.push(text.split_to(start));
                    out.push(self.to.clone());
                    text = text.slice(end - start..);
                    replaced = true;
                    from = 0;
                }
                Found::Open | Found::Other => from += key + KEY.len(),
            }
        }
        if hold {
            // One byte less than the longer form, which has a space.
            let window = text.len().saturating_sub(KEY.len() + self.from.len());
            let open = memchr_iter(b'"', &text[window..])
                .map(|at| window + at)
                .find(|at| matches!(self.found(&text[*at..]), Found::Open));
            if let Some(open) = open {
                self.held = text.split_off(open);
            }
        }
        if !text.is_empty() {
            out.push(text);
        }
        replaced
    }

    /// What is held back, as it came; the body is over.
    pub(super) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.held)
    }

    /// Length of what is held back, in bytes.
    pub(super) fn held_bytes(&self) -> usize {
        self.held.len()
    }

    fn found(&self, text: &[u8]) -> Found {
        let key = KEY.len().min(text.len());
        if text[..key] != KEY[..key] {
            return Found::Other;
        }
        let start = KEY.len() + usize::from(text.get(KEY.len()) == Some(&b' '));
        let Some(value) = text.get(start..) else { return Found::Open };
        let common = value.len().min(self.from.len());
        match value[..common] == self.from[..common] {
            false => Found::Other,
            true if common < self.from.len() => Found::Open,
            true => Found::Value(start, start + common),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restored(restorer: &mut Restorer, chunks: &[&[u8]]) -> String {
        let mut out = Pieces::new();
        for chunk in chunks {
            restorer.push(Bytes::copy_from_slice(chunk), true, &mut out);
        }
        out.push(restorer.rest());
        String::from_utf8(out.concat()).unwrap()
    }

    #[test]
    fn names_are_written_back_wherever_chunks_end() {
        #[track_caller]
        fn check(target: &str, text: &str, want: &str) {
            let new = || Restorer::new(target, "m").unwrap();
            let bytes = text.as_bytes();
            assert_eq!(restored(&mut new(), &[bytes]), want);
            for cut in 0..=bytes.len() {
                let (one, two) = bytes.split_at(cut);
                assert_eq!(restored(&mut new(), &[one, two]), want, "cut at {cut}");
            }
            let each: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(restored(&mut new(), &each), want, "byte by byte");
        }
        check("m2", r#"{"model":"m2"}"#, r#"{"model":"m"}"#);
        check("m2", r#"{"model": "m2","a":1}"#, r#"{"model": "m","a":1}"#);
        check("m2", r#"{"model":"m2"}{"model":"m2"}"#, r#"{"model":"m"}{"model":"m"}"#);
        check("m2", r#""model":"model":"m2""#, r#""model":"model":"m""#);
        check("m2", r#"{"model":"m22"}"#, r#"{"model":"m22"}"#);
        check("m2", r#"{"model":  "m2"}"#, r#"{"model":  "m2"}"#);
        check("m2", r#"{"model""#, r#"{"model""#);
        check("m2", r#"{"text":"\"model\":\"m2\""}"#, r#"{"text":"\"model\":\"m2\""}"#);
        check("a\"b", r#"{"model":"a\"b"}"#, r#"{"model":"m"}"#);
        assert!(Restorer::new("m", "m").is_none() && Restorer::new("", "m").is_none());
    }

    #[test]
    fn an_untouched_chunk_is_the_same_bytes() {
        let mut restorer = Restorer::new("m2", "m").unwrap();
        let chunk = Bytes::from_static(b"data: {\"model\":\"other\"}\n\n");
        let mut out = Pieces::new();
        assert!(!restorer.push(chunk.clone(), true, &mut out));
        assert_eq!((out.len(), out[0].as_ptr(), out[0].len()), (1, chunk.as_ptr(), chunk.len()));
        assert_eq!(restorer.held_bytes(), 0);
    }
}
