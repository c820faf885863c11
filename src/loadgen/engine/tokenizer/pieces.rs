//! The pseudo-tokenizer, for engines without a model's files.
//!
//! It is the same in every process, a longer text begins with the tokens of a shorter one that ends with
//! a word, there are about as many tokens as a real one makes of English, and its own output, sent back
//! as a part of the next prompt, gives the tokens that were generated.

use serde::Deserialize;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::Tokenizer;
use crate::loadgen::engine::sequence::Item;

/// The deterministic pseudo-tokenizer.
///
/// Words are separated by white space, which is otherwise ignored. A word `~` followed by hexadecimal
/// digits that name an id below [`VOCABULARY`] is this token; that is also how tokens are written. Any
/// other word is cut into pieces of at most four bytes, at characters, and a piece is the XXH3 hash of
/// its bytes modulo the vocabulary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pieces;

/// Size of [`Pieces`]' vocabulary: that of Llama 3, to the next power of two.
pub const VOCABULARY: u32 = 1 << 17;
/// Bytes of a piece at most, unless one character has more.
const PIECE: usize = 4;
/// Tokens that stand for an image.
pub(in super::super) const IMAGE_TOKENS: usize = 64;

impl Pieces {
    /// Tokens of a text.
    #[must_use]
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut tokens = Vec::with_capacity(text.len() / PIECE + 1);
        for word in text.split_whitespace() {
            let literal = word.strip_prefix('~').and_then(|hex| u32::from_str_radix(hex, 16).ok());
            if let Some(token) = literal.filter(|token| *token < VOCABULARY) {
                tokens.push(token);
                continue;
            }
            let mut start = 0;
            for (at, c) in word.char_indices() {
                if at > start && at + c.len_utf8() - start > PIECE {
                    tokens.push(piece(&word[start..at]));
                    start = at;
                }
            }
            tokens.push(piece(&word[start..]));
        }
        tokens
    }
}

impl Tokenizer for Pieces {
    fn text(&self, text: &str, _add_special_tokens: bool) -> Result<Vec<u32>, String> {
        Ok(self.encode(text))
    }

    /// Each message between marks that name its role, then the mark of the answer. A conversation that
    /// goes on has the tokens of the shorter one in front.
    fn chat(&self, body: &[u8]) -> Result<(Vec<u32>, Vec<Item>), String> {
        let Chat { messages } = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        if messages.is_empty() {
            return Err("messages is empty".to_owned());
        }
        let (mut tokens, mut items) = (Vec::new(), Vec::new());
        for message in &messages {
            tokens.extend(self.encode(&format!("<|{}|>", message.role)));
            match &message.content {
                None => {}
                Some(Content::Text(text)) => tokens.extend(self.encode(text)),
                Some(Content::Parts(parts)) => {
                    for part in parts {
                        self.part(part, &mut tokens, &mut items);
                    }
                }
            }
            tokens.extend(self.encode("<|end|>"));
        }
        tokens.extend(self.encode("<|assistant|>"));
        Ok((tokens, items))
    }

    fn answer(&self, _chat: bool, _state: u64, _tokens: usize) -> Vec<u32> {
        Vec::new()
    }

    fn decode(&self, token: u32) -> String {
        format!(" ~{token:x}")
    }
}

impl Pieces {
    fn part(&self, part: &Part, tokens: &mut Vec<u32>, items: &mut Vec<Item>) {
        if let Some(text) = &part.text {
            tokens.extend(self.encode(text));
        }
        if let Some(ImageUrl::Object { url } | ImageUrl::Text(url)) = &part.image_url {
            let identifier = format!("{:032x}", xxh3_128(url.as_bytes()));
            let (start, length) = (tokens.len(), IMAGE_TOKENS);
            items.push(Item { identifier, start, length });
            tokens.resize(start + length, VOCABULARY - 1);
        }
    }
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    text: Option<String>,
    image_url: Option<ImageUrl>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ImageUrl {
    Object { url: String },
    Text(String),
}

fn piece(text: &str) -> u32 {
    (xxh3_64(text.as_bytes()) % u64::from(VOCABULARY)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_cut_into_pieces() {
        let tokens = |text| Pieces.encode(text);
        assert_eq!(tokens("a  b\n").len(), 2);
        assert_eq!(tokens("abcdefghi").len(), 3);
        assert_eq!(tokens("äöüß").len(), 2);
        assert_eq!(tokens("").len(), 0);
        assert_eq!(tokens("one two three four")[..3], tokens("one two three")[..3]);
        assert_eq!(tokens("a"), [piece("a")], "the same in every process");
        assert_eq!(tokens("a"), [tokens("b a")[1]]);
    }

    #[test]
    fn what_it_writes_it_reads_back() {
        let written: String = [0, 7, VOCABULARY - 1].map(|token| Pieces.decode(token)).concat();
        assert_eq!(Pieces.encode(&format!("hello{written}"))[2..], [0, 7, VOCABULARY - 1]);
        assert_eq!(Pieces.encode("~zz").len(), 1);
        assert_eq!(Pieces.encode("~ffffffff").len(), 3);
    }
}
