//! Where the texts of a given tokenizer may be parted, found by looking at its parts.
//!
//! Added tokens: the tokenizer splits texts at those that are not `normalized` first, normalizes what is
//! between, and splits that at those that are. Each text between is then pre-tokenized and encoded by
//! itself. So a text between two occurrences may be encoded by itself, if
//!
//! * occurrences are those that [`Matcher`] finds: no token is `single_word`, `lstrip` or `rstrip`, and
//!   special ones are not told to be encoded as text;
//! * such a text alone has no occurrence in it: none can be, since the leftmost is always taken;
//! * normalizer, pre-tokenizer and model look at nothing but the text that they are given: those listed
//!   here do. `Metaspace` with the scheme `first` does not, nor does a model that rolls dice;
//! * nothing is done with the ids of the whole but putting a constant number of others around them:
//!   no truncation, no padding, a post-processor that is seen to do just that.
//!
//! If the normalizer does nothing, tokens that are `normalized` part a text as well. Otherwise only the
//! others do, and those are left to the tokenizer.

use serde_json::Value;
use tokenizers::{Encoding, ModelWrapper, PostProcessor, Token, Tokenizer};

use super::{
    added::Matcher,
    cuts::{self, PATTERNS},
};

/// How texts are parted.
#[derive(Debug)]
pub(super) struct Plan {
    /// Tokens that are looked for first.
    first: Matcher,
    /// Tokens that are looked for between those.
    second: Matcher,
    /// Text between added tokens may be cut where [`cuts`] says.
    pub(super) words: bool,
    /// Ids that go before those of a text when special tokens are wanted.
    pub(super) before: Vec<u32>,
    /// Ids that go behind.
    pub(super) after: Vec<u32>,
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// An added token.
    Added(u32),
    /// Text without added tokens, not empty.
    Text(&'a str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Normalizer {
    Nothing,
    Nfc,
    /// Another one that looks at its text only.
    Other,
}

impl Plan {
    /// `None` if nothing is proved.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        if tokenizer.get_truncation().is_some()
            || tokenizer.get_padding().is_some()
            || tokenizer.get_encode_special_tokens()
        {
            return None;
        }
        match tokenizer.get_model() {
            ModelWrapper::BPE(bpe) if bpe.dropout.is_some_and(|dropout| dropout > 0.0) => {
                return None;
            }
            ModelWrapper::Unigram(unigram) if unigram.alpha.is_some() => return None,
            _ => {}
        }
        let (before, after) = around(tokenizer)?;
        let normalizer = normalizer(&serde_json::to_value(tokenizer.get_normalizer()).ok()?)?;
        let pre_tokenizer = serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?;
        if !is_local(&pre_tokenizer) {
            return None;
        }
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        if added.values().any(|token| token.single_word || token.lstrip || token.rstrip) {
            return None;
        }
        let tokens = |normalized| {
            let tokens = added.iter().filter(move |(_, token)| token.normalized == normalized);
            tokens.map(|(id, token)| (token.content.as_str(), *id))
        };
        let second = tokens(true);
        let words = is_known(&pre_tokenizer)
            && match normalizer {
                Normalizer::Nothing => true,
                Normalizer::Nfc => second.clone().next().is_none(),
                Normalizer::Other => false,
            };
        Some(Self {
            first: Matcher::new(tokens(false)),
            second: match normalizer {
                Normalizer::Nothing => Matcher::new(second),
                _ => Matcher::default(),
            },
            words,
            before,
            after,
        })
    }

    /// Added tokens and the texts between them.
    pub(super) fn parts<'a>(&'a self, text: &'a str) -> impl Iterator<Item = Part<'a>> {
        split(&self.first, text).flat_map(|part| {
            let (added, text) = match part {
                Part::Added(id) => (Some(Part::Added(id)), ""),
                Part::Text(text) => (None, text),
            };
            added.into_iter().chain(split(&self.second, text))
        })
    }

    /// A text's chunks: where cuts are proved, of `least` bytes and a few more.
    pub(super) fn chunks<'a>(&self, text: &'a str, least: usize) -> impl Iterator<Item = &'a str> {
        cuts::pieces(text, if self.words { least } else { usize::MAX })
    }
}

fn split<'a>(matcher: &'a Matcher, text: &'a str) -> impl Iterator<Item = Part<'a>> {
    let mut rest = text;
    let mut found = None;
    std::iter::from_fn(move || {
        if let Some(id) = found.take() {
            return Some(Part::Added(id));
        }
        if rest.is_empty() {
            return None;
        }
        let Some((start, end, id)) = matcher.find(rest) else {
            return Some(Part::Text(std::mem::take(&mut rest)));
        };
        let (text, behind) = (rest.get(..start)?, rest.get(end..)?);
        rest = behind;
        if text.is_empty() {
            return Some(Part::Added(id));
        }
        found = Some(id);
        Some(Part::Text(text))
    })
}

/// What the post-processor puts around ids, seen by giving it one that no vocabulary has.
fn around(tokenizer: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    const PROBE: u32 = u32::MAX;
    let process = |special| {
        let probe = Encoding::from_tokens(vec![Token::new(PROBE, String::new(), (0, 0))], 0);
        let processed = match tokenizer.get_post_processor() {
            Some(processor) => processor.process(probe, None, special).ok()?,
            None => probe,
        };
        Some(processed.get_ids().to_vec())
    };
    if process(false)? != [PROBE] {
        return None;
    }
    let ids = process(true)?;
    let mut sides = ids.split(|&id| id == PROBE);
    match (sides.next(), sides.next(), sides.next()) {
        (Some(before), Some(after), None) => Some((before.to_vec(), after.to_vec())),
        _ => None,
    }
}

fn kind(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// `None` for normalizers that are not known to look at their text only.
fn normalizer(value: &Value) -> Option<Normalizer> {
    if value.is_null() {
        return Some(Normalizer::Nothing);
    }
    match kind(value) {
        "NFC" => Some(Normalizer::Nfc),
        "Sequence" => {
            let kinds: Option<Vec<_>> =
                items(value, "normalizers").iter().map(normalizer).collect();
            match *kinds? {
                [] => Some(Normalizer::Nothing),
                [one] => Some(one),
                _ => Some(Normalizer::Other),
            }
        }
        "NFD" | "NFKC" | "NFKD" | "Lowercase" | "Prepend" | "Replace" | "Strip"
        | "StripAccents" | "BertNormalizer" => Some(Normalizer::Other),
        _ => None,
    }
}

/// Does a pre-tokenizer look at nothing but the text that it is given?
fn is_local(value: &Value) -> bool {
    if value.is_null() {
        return true;
    }
    match kind(value) {
        "Sequence" => items(value, "pretokenizers").iter().all(is_local),
        "Metaspace" => {
            matches!(value.get("prepend_scheme").and_then(Value::as_str), Some("always" | "never"))
        }
        "ByteLevel" | "Split" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit"
        | "BertPreTokenizer" | "CharDelimiterSplit" => true,
        _ => false,
    }
}

/// Is a pre-tokenizer one of those that [`cuts`] is proved for: `Split`s of known patterns and then
/// `ByteLevel`, or `ByteLevel` with its own pattern?
fn is_known(value: &Value) -> bool {
    let flag = |value: &Value, name: &str| value.get(name).and_then(Value::as_bool);
    let byte_level = |value: &Value, own_pattern: bool| {
        kind(value) == "ByteLevel"
            && flag(value, "add_prefix_space") == Some(false)
            && flag(value, "use_regex") == Some(own_pattern)
    };
    let (splits, last) = match kind(value) {
        "ByteLevel" => return byte_level(value, true),
        "Sequence" => match items(value, "pretokenizers") {
            [splits @ .., last] => (splits, last),
            [] => return false,
        },
        _ => return false,
    };
    let patterns: Option<Vec<&str>> = splits
        .iter()
        .map(|split| {
            let plain = kind(split) == "Split"
                && split.get("behavior").and_then(Value::as_str) == Some("Isolated")
                && flag(split, "invert") == Some(false);
            if plain { split.get("pattern")?.get("Regex")?.as_str() } else { None }
        })
        .collect();
    byte_level(last, false) && patterns.is_some_and(|found| PATTERNS.contains(&found.as_slice()))
}
