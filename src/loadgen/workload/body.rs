//! A prompt as the body of a request.
//!
//! # Cost
//!
//! A part that came twice is remembered as it is written, so a shared prefix costs a reference count. A
//! body is a few pieces, which are not copied together.

use std::{collections::HashMap, io::Write as _};

use bytes::Bytes;

use super::{Part, Planned, Prompt, random::mix};

/// Token ids of prompts are from this one on, so that all have five digits and none has a meaning of its
/// own …
const FIRST_ID: u32 = 10_000;
/// … and so many, so that small vocabularies have them too.
const IDS: u64 = 20_000;
/// Bytes of parts that are remembered at most.
const REMEMBERED: usize = 32 << 20;
/// Parts of which it is known that they came once.
const SEEN: usize = 1 << 15;

/// Words of texts: common ones, of four letters at most, which most tokenizers have as one token each.
/// Their number is a power of two.
const WORDS: [&str; 64] = [
    "the", "and", "for", "are", "but", "not", "you", "all", "any", "can", "her", "was", "one",
    "our", "out", "day", "get", "has", "him", "his", "how", "man", "new", "now", "old", "see",
    "two", "way", "who", "did", "its", "let", "put", "say", "she", "too", "use", "that", "with",
    "have", "this", "will", "your", "from", "they", "know", "want", "been", "good", "much", "some",
    "time", "very", "when", "come", "here", "just", "like", "long", "make", "many", "more", "only",
    "over",
];

/// What the prompt of a request looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BodyForm {
    /// Token ids to `/v1/completions`: exact blocks, no tokenizer.
    #[default]
    Ids,
    /// Words to `/v1/completions`.
    Text,
    /// Words of one user message to `/v1/chat/completions`.
    Chat,
}

/// Writes bodies, and remembers, bounded, how parts look.
#[derive(Debug)]
pub struct BodyWriter {
    form: BodyForm,
    head: Bytes,
    /// What follows the prompt, up to the value of `max_tokens` …
    after: &'static str,
    /// … and what follows that.
    end: &'static str,
    known: HashMap<Part, Bytes>,
    known_bytes: usize,
    /// Seeds that came once, at the place that their hash says; what is overwritten comes a third time.
    seen: Vec<u64>,
}

impl BodyWriter {
    /// Bodies for a served model, streamed, with usage at the end.
    #[must_use]
    pub fn new(form: BodyForm, model: &str) -> Self {
        Self::with_stream(form, model, true)
    }

    /// Bodies for a served model; unless streamed, the answer is one JSON document.
    #[must_use]
    pub fn with_stream(form: BodyForm, model: &str, stream: bool) -> Self {
        let model = serde_json::Value::from(model);
        let (open, after) = match form {
            BodyForm::Ids => (r#""prompt":["#, r#"],"max_tokens":"#),
            BodyForm::Text => (r#""prompt":""#, r#"","max_tokens":"#),
            BodyForm::Chat => (r#""messages":[{"role":"user","content":""#, r#""}],"max_tokens":"#),
        };
        let end = if stream {
            r#","temperature":0,"ignore_eos":true,"stream":true,"stream_options":{"include_usage":true}}"#
        } else {
            r#","temperature":0,"ignore_eos":true}"#
        };
        Self {
            form,
            head: Bytes::from(format!(r#"{{"model":{model},{open}"#)),
            after,
            end,
            known: HashMap::new(),
            known_bytes: 0,
            seen: vec![0; SEEN],
        }
    }

    /// Where these bodies go.
    #[must_use]
    pub fn path(&self) -> &'static str {
        match self.form {
            BodyForm::Ids | BodyForm::Text => "/v1/completions",
            BodyForm::Chat => "/v1/chat/completions",
        }
    }

    /// The body of a request, in pieces that follow each other.
    pub fn write(&mut self, request: &Planned) -> Vec<Bytes> {
        let mut pieces = vec![self.head.clone()];
        // What is not remembered goes into one piece with what follows it.
        let mut fresh = Vec::new();
        for (at, part) in request.prompt.parts.iter().enumerate() {
            // Parts begin with what separates them from the one before; the first one has none before.
            let skip = usize::from(at == 0);
            if let Some(known) = self.recall(*part) {
                if !fresh.is_empty() {
                    pieces.push(Bytes::from(std::mem::take(&mut fresh)));
                }
                pieces.push(known.slice(skip.min(known.len())..));
            } else {
                let start = fresh.len();
                self.render(*part, &mut fresh);
                fresh.drain(start..(start + skip).min(fresh.len()));
            }
        }
        fresh.extend_from_slice(self.after.as_bytes());
        // Writing to a vector does not fail.
        write!(fresh, "{}", request.max_tokens).ok();
        fresh.extend_from_slice(self.end.as_bytes());
        pieces.push(Bytes::from(fresh));
        pieces
    }

    /// The part as it is written, if it came before.
    fn recall(&mut self, part: Part) -> Option<Bytes> {
        if let Some(known) = self.known.get(&part) {
            return Some(known.clone());
        }
        let place = &mut self.seen[(mix(part.seed) as usize) % SEEN];
        if std::mem::replace(place, part.seed) != part.seed {
            return None;
        }
        let mut written = Vec::new();
        self.render(part, &mut written);
        let written = Bytes::from(written);
        if self.known_bytes + written.len() > REMEMBERED {
            self.known.clear();
            self.known_bytes = 0;
        }
        if written.len() <= REMEMBERED {
            self.known_bytes += written.len();
            self.known.insert(part, written.clone());
        }
        Some(written)
    }

    /// Writes a part, each token with what separates it from the one before.
    fn render(&self, part: Part, out: &mut Vec<u8>) {
        if self.form == BodyForm::Ids {
            out.reserve(6 * part.tokens as usize + 128);
            for position in 0..part.tokens {
                let id = token(part.seed, position);
                let digit = |unit: u32| b'0' + (id / unit % 10) as u8;
                out.extend_from_slice(&[
                    b',',
                    digit(10_000),
                    digit(1_000),
                    digit(100),
                    digit(10),
                    digit(1),
                ]);
            }
        } else {
            out.reserve(5 * part.tokens as usize + 128);
            for position in 0..part.tokens {
                out.push(b' ');
                let at = bits(part.seed, position) as usize % WORDS.len();
                out.extend_from_slice(WORDS[at].as_bytes());
            }
        }
    }
}

/// What the token at a position of a part is made from.
fn bits(seed: u64, position: u32) -> u64 {
    // The increment of SplitMix64: parts are stretches of its sequence.
    mix(seed.wrapping_add((u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The token id at a position of a part, 10 000 to 29 999.
fn token(seed: u64, position: u32) -> u32 {
    FIRST_ID + (((bits(seed, position) >> 32) * IDS) >> 32) as u32
}

/// The token ids of a prompt, as [`BodyForm::Ids`] writes them.
pub fn tokens(prompt: &Prompt) -> impl Iterator<Item = u32> {
    let of = |part: &Part| {
        let seed = part.seed;
        (0..part.tokens).map(move |position| token(seed, position))
    };
    prompt.parts.iter().flat_map(of)
}

#[cfg(test)]
mod tests;
