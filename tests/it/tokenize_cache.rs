//! The token cache against the tokenizer itself: whatever is typed, cut off, inserted or repeated, the
//! ids are those of encoding the whole text.
//!
//! `TOKENIZE_CASES` is the number of texts for each tokenizer, `TOKENIZE_SEED` where they begin.

use std::{env, fs, sync::Arc};

use kv_indexer::tokenize::encode::{CacheConfig, Cuts, Encoder, register};
use prometheus::Registry;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::tokenize::rig::tokenizers;

const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_MARKS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
];

/// Added tokens that begin alike, contain and overlap each other.
const ADDED: [&str; 8] =
    ["<|im_start|>", "<|im_end|>", "<|im_end|><|", "|><|x", "<|", "<think>", "\n\n", "<｜User｜>"];

/// What texts are made of.
#[rustfmt::skip]
const FRAGMENTS: [&str; 82] = [
    "the", "Hello", "world", "a", "I", "it's", "'s", "'S", "'re", "'", "don't", "x'll", "naïve", "É",
    "e\u{301}", "\u{301}", " \u{308}", "o\u{338}", "\u{212a}", "\u{37e}", "ſ", "'ſ", "ß", "ǅ", "ʰ", " ",
    "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\r", "\u{a0}", "\u{2000}", "\u{2001}", "\u{2009}",
    "\u{3000}", "\u{200b}", "\u{feff}", "\u{180e}", "\u{85}", "\u{1}", "\u{7f}", ".", ",", "!?", "...",
    "/", "//", "_", "(", ")", "{\"k\":", "\"", "<", "|", ">", "0", "12", "3456", "٣", "½", "中", "文字",
    "，", "。", "、", "！", "（好）", "かな", "カナ", "한국어", "각", "👍", "👩‍👩‍👧", "\u{e000}", "'\u{301}",
    "中'", "\u{1100}\u{1161}\u{11a8}", "ﬁ",
];

struct Dice {
    random: fastrand::Rng,
    /// Added tokens, whole or in part among the rest.
    added: Vec<String>,
    /// Of a hundred fragments so many are added tokens or parts of them.
    share: u8,
}

impl Dice {
    fn new(seed: u64) -> Self {
        let added = ADDED.map(str::to_owned).to_vec();
        Self { random: fastrand::Rng::with_seed(seed), added, share: 10 }
    }

    fn text(&mut self, most: usize) -> String {
        let count = self.random.usize(..=most);
        (0..count).map(|_| self.fragment()).collect()
    }

    fn fragment(&mut self) -> String {
        if self.random.u8(..100) < self.share {
            return self.some_added_token();
        }
        match self.random.u8(..20) {
            0 => char::from_u32(self.random.u32(..0x3_0000)).unwrap_or('x').to_string(),
            1 => self.random.lowercase().to_string().repeat(self.random.usize(1..4)),
            _ => FRAGMENTS[self.random.usize(..FRAGMENTS.len())].to_owned(),
        }
    }

    /// An added token, its beginning or its end.
    fn some_added_token(&mut self) -> String {
        let whole = &self.added[self.random.usize(..self.added.len())];
        let cut = whole.floor_char_boundary(self.random.usize(..=whole.len()));
        match self.random.u8(..4) {
            0 => whole[..cut].to_owned(),
            1 => whole[cut..].to_owned(),
            _ => whole.clone(),
        }
    }

    fn at(&mut self, text: &str) -> usize {
        text.floor_char_boundary(self.random.usize(..=text.len()))
    }

    /// A text made of one that was there before.
    fn edit(&mut self, text: &mut String) {
        match self.random.u8(..20) {
            0..=14 => text.push_str(&self.text(40)),
            15 => text.truncate(self.at(text)),
            16 => {
                let at = self.at(text);
                text.insert_str(at, &self.text(3));
            }
            17 => {
                let start = self.at(text);
                let end = text.floor_char_boundary(start + self.random.usize(..12));
                text.replace_range(start..end.max(start), "");
            }
            18 => {
                let (a, b) = (self.at(text), self.at(text));
                let copy = text[a.min(b)..a.max(b)].to_owned();
                text.push_str(&copy);
            }
            _ => {
                self.share = [0, 1, 15][self.random.usize(..3)];
                *text = self.text(200);
            }
        }
        if text.len() > 4000 {
            *text = text.split_off(text.floor_char_boundary(3000));
        }
    }
}

fn knob(name: &str, default: u64) -> u64 {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Encodes random texts and edits of them with a cache, with a tiny one, and without.
#[track_caller]
fn check(name: &str, tokenizer: Tokenizer, cuts: Cuts, cases: u64) {
    let tokenizer = Arc::new(tokenizer);
    let roomy = Encoder::new(Arc::clone(&tokenizer), CacheConfig { bytes: 16 << 20 });
    let tiny = Encoder::new(Arc::clone(&tokenizer), CacheConfig { bytes: 96 << 10 });
    assert_eq!(roomy.cuts(), cuts, "{name}");
    let seed = knob("TOKENIZE_SEED", 1);
    let mut dice = Dice::new(seed);
    let own = tokenizer.get_added_vocabulary().get_added_tokens_decoder().values();
    // The many reserved ones are alike.
    let own =
        own.filter(|token| !token.content.contains("reserved") && !token.content.contains("place"));
    dice.added.extend(own.map(|token| token.content.clone()));
    dice.added.sort_unstable();
    dice.added.dedup();
    let mut text = String::new();
    for case in 0..cases {
        dice.edit(&mut text);
        let special = dice.random.bool();
        let expected = tokenizer.encode(text.as_str(), special).unwrap();
        let round = |encoder: &Encoder| {
            let cold = encoder.cold_bytes(&text);
            assert!(cold <= text.len());
            let ids = encoder.encode(&text, special).unwrap();
            assert_eq!(ids, expected.get_ids(), "{name}, seed {seed}, case {case}: {text:?}");
        };
        round(&roomy);
        round(&tiny);
    }
    let stats = roomy.stats();
    assert!(stats.bytes <= 16 << 20 && tiny.stats().bytes <= 96 << 10, "{name}: {stats:?}");
    if cuts != Cuts::None && cases >= 40 {
        assert!(stats.hits > 0 && stats.reused_tokens > 0, "{name}: {stats:?}");
        let tiny = tiny.stats();
        assert!(cases < 2000 || tiny.evictions > 0, "{name}: {tiny:?}");
    }
    println!("{name}: {cases} texts, {stats:?}");
}

/// The byte as `ByteLevel` writes it.
fn byte_char(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte) - 0x7f).unwrap(),
        0xad => '\u{143}',
    }
}

/// A byte-level BPE that merges without regard to words: a wrong cut shows in the ids.
fn bpe(seed: u64) -> Value {
    let mut dice = Dice::new(seed);
    let mut tokens: Vec<String> = (0..=255).map(|byte| byte_char(byte).to_string()).collect();
    let mut vocabulary = serde_json::Map::new();
    for (id, token) in tokens.iter().enumerate() {
        vocabulary.insert(token.clone(), json!(id));
    }
    let mut merges = Vec::new();
    while merges.len() < 3000 {
        // Pairs as they occur, so that most merges are used.
        let text: String = dice.text(6).bytes().map(byte_char).collect();
        let Some((a, b)) = pair(&mut dice, &tokens, &text) else { continue };
        let joined = format!("{a}{b}");
        if vocabulary.contains_key(&joined) {
            continue;
        }
        vocabulary.insert(joined.clone(), json!(vocabulary.len()));
        tokens.push(joined);
        merges.push(json!([a, b]));
    }
    json!({"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": seed.is_multiple_of(2)})
}

/// Two tokens that stand side by side somewhere in a text.
fn pair(dice: &mut Dice, tokens: &[String], text: &str) -> Option<(String, String)> {
    let at = text.char_indices().map(|(at, _)| at).nth(dice.random.usize(..text.len().max(1)))?;
    let fits = |rest: &str| {
        let longest = tokens.iter().filter(|token| token.len() < 12 && rest.starts_with(*token));
        longest.max_by_key(|token| token.len()).cloned()
    };
    let first = fits(&text[at..])?;
    let second = fits(&text[at + first.len()..])?;
    Some((first, second))
}

fn added(normalized: impl Fn(usize) -> bool) -> Value {
    let token = |(number, content): (usize, &&str)| {
        json!({
            "id": 100_000 + number, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": normalized(number), "special": number % 2 == 0,
        })
    };
    ADDED.iter().enumerate().map(token).collect()
}

fn byte_level(own_pattern: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": own_pattern,
    })
}

fn splits(patterns: &[&str]) -> Value {
    let split = |pattern: &&str| {
        json!({
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false,
        })
    };
    let mut steps: Vec<Value> = patterns.iter().map(split).collect();
    steps.push(byte_level(false));
    json!({"type": "Sequence", "pretokenizers": steps})
}

/// Begin and end of text around.
fn template() -> Value {
    let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let (start, end) = (special("<|im_start|>"), special("<|im_end|>"));
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let pair = json!({"Sequence": {"id": "B", "type_id": 0}});
    json!({"type": "Sequence", "processors": [byte_level(true), {
        "type": "TemplateProcessing",
        "single": [start, text, end],
        "pair": [start, text, pair],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [100_000], "tokens": ["<|im_start|>"]},
            "<|im_end|>": {"id": "<|im_end|>", "ids": [100_001], "tokens": ["<|im_end|>"]},
        },
    }]})
}

/// A `tokenizer.json` in pieces, to be changed by tests.
fn parts(pre_tokenizer: &Value, seed: u64) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added(|_| false),
        "normalizer": null, "pre_tokenizer": pre_tokenizer, "post_processor": template(),
        "decoder": null, "model": bpe(seed),
    })
}

fn built(parts: &Value) -> Tokenizer {
    Tokenizer::from_bytes(parts.to_string()).unwrap()
}

#[test]
fn ids_are_those_of_the_tokenizer_for_every_known_pattern() {
    let cases = knob("TOKENIZE_CASES", 40);
    let known: [(&str, Value); 7] = [
        ("cl100k", splits(&[CL100K])),
        ("qwen", splits(&[QWEN])),
        ("qwen with marks", splits(&[QWEN_MARKS])),
        ("o200k", splits(&[O200K])),
        ("tekken", splits(&[TEKKEN])),
        ("deepseek", splits(&DEEPSEEK)),
        ("gpt-2", byte_level(true)),
    ];
    for ((name, pre_tokenizer), seed) in known.into_iter().zip(1..) {
        let mut parts = parts(&pre_tokenizer, seed);
        check(name, built(&parts), Cuts::Words, cases);
        parts["normalizer"] = json!({"type": "NFC"});
        check(&format!("{name}, NFC"), built(&parts), Cuts::Words, cases);
        parts["normalizer"] = json!({"type": "Sequence", "normalizers": []});
        parts["added_tokens"] = added(|number| number % 3 != 0);
        parts["post_processor"] = Value::Null;
        check(&format!("{name}, normalized tokens"), built(&parts), Cuts::Words, cases);
    }
}

#[test]
fn ids_are_those_of_the_tokenizer_where_less_is_proved() {
    let cases = knob("TOKENIZE_CASES", 40);
    let with = |field: &str, value: Value| {
        let mut parts = parts(&splits(&[CL100K]), 3);
        parts[field] = value;
        parts
    };
    let metaspace =
        |scheme| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme});
    let mut unusual = parts(&splits(&[CL100K]), 4);
    unusual["normalizer"] = json!({"type": "NFC"});
    unusual["added_tokens"] = added(|number| number % 2 == 0);
    let mut stripping = added(|_| false);
    stripping[0]["rstrip"] = json!(true);
    let mut single = added(|_| false);
    single[5]["single_word"] = json!(true);
    let truncation = json!({
        "direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0,
    });
    let prefix_space = json!({
        "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
    });
    let other = splits(&[r"\w+|\W+"]);
    for (name, parts, cuts) in [
        ("normalized tokens under NFC", unusual, Cuts::Added),
        ("another pattern", with("pre_tokenizer", other), Cuts::Added),
        ("prefix space", with("pre_tokenizer", prefix_space), Cuts::Added),
        ("no pre-tokenizer", with("pre_tokenizer", Value::Null), Cuts::Added),
        ("metaspace", with("pre_tokenizer", metaspace("always")), Cuts::Added),
        ("metaspace at the start", with("pre_tokenizer", metaspace("first")), Cuts::None),
        ("lowercase", with("normalizer", json!({"type": "Lowercase"})), Cuts::Added),
        ("prepend", with("normalizer", json!({"type": "Prepend", "prepend": "_"})), Cuts::Added),
        ("stripping token", with("added_tokens", stripping), Cuts::None),
        ("single words", with("added_tokens", single), Cuts::None),
        ("truncation", with("truncation", truncation), Cuts::None),
    ] {
        check(name, built(&parts), cuts, cases / 2);
    }
}

#[test]
fn real_tokenizers_agree() {
    let cases = knob("TOKENIZE_CASES", 60);
    for name in ["qwen3", "llama3_1", "deepseek_v3", "gptoss"] {
        let path = tokenizers().join(name).join("tokenizer.json");
        let text = fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{}: {error}; run tests/run", path.display()));
        let tokenizer = text.parse().unwrap();
        check(name, tokenizer, Cuts::Words, cases);
    }
}

#[test]
fn a_growing_chat_encodes_its_new_turn_only() {
    let encoder = Arc::new(Encoder::new(
        Arc::new(built(&parts(&splits(&[QWEN]), 5))),
        CacheConfig::default(),
    ));
    let turn = |number: usize| {
        let words = format!("This is sentence {number} of a long message. ").repeat(40);
        format!("<|im_start|>user\n{words}<|im_end|>")
    };
    let mut chat = String::new();
    for number in 0..8 {
        chat.push_str(&turn(number));
        let cold = encoder.cold_bytes(&chat);
        assert!(cold <= turn(number).len(), "turn {number}: {cold}");
        let before = encoder.stats();
        let count = encoder.encode(&chat, false).unwrap().len() as u64;
        let after = encoder.stats();
        assert!(after.encoded_tokens - before.encoded_tokens <= count / (number as u64 + 1) + 8);
        assert!(encoder.cold_bytes(&chat) < 64);
    }

    let registry = Registry::new();
    register(&registry, "epp", vec![("m".to_owned(), Arc::clone(&encoder))]).unwrap();
    let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
    let stats = encoder.stats();
    for (name, value) in [
        ("hits_total", stats.hits),
        ("misses_total", stats.misses),
        ("reused_tokens_total", stats.reused_tokens),
        ("encoded_tokens_total", stats.encoded_tokens),
        ("evictions_total", 0),
        ("bytes", stats.bytes),
    ] {
        let line = format!("epp_token_cache_{name}{{model=\"m\"}} {value}\n");
        assert!(text.contains(&line), "{line} is not in {text}");
    }
}

#[test]
fn threads_that_encode_at_once_agree() {
    let tokenizer = Arc::new(built(&parts(&splits(&[O200K]), 6)));
    let encoder = Encoder::new(Arc::clone(&tokenizer), CacheConfig { bytes: 96 << 10 });
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (encoder, tokenizer) = (&encoder, &tokenizer);
            scope.spawn(move || {
                let mut dice = Dice::new(thread % 2);
                let mut text = String::new();
                for _ in 0..100 {
                    dice.edit(&mut text);
                    let expected = tokenizer.encode(text.as_str(), false).unwrap();
                    assert_eq!(
                        encoder.encode(&text, false).unwrap(),
                        expected.get_ids(),
                        "{text:?}"
                    );
                }
            });
        }
    });
    assert!(encoder.stats().bytes <= 96 << 10);
}
