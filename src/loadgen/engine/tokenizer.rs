//! Text to tokens and back.
//!
//! A mock engine has no vocabulary. [`Pieces`] stands in for one: it is the same in every process, a
//! longer text begins with the tokens of a shorter one that ends with a word, there are about as many
//! tokens as a real one makes of English, and its own output, sent back as a part of the next prompt,
//! gives the tokens that were generated.

use xxhash_rust::xxh3::xxh3_64;

/// Turns text into token ids and back.
pub trait Tokenizer: Send + Sync {
    /// Tokens of a text.
    fn encode(&self, text: &str) -> Vec<u32>;
    /// Text of one generated token, such that texts can be joined.
    fn decode(&self, token: u32) -> String;
    /// Ids are below this.
    fn vocabulary(&self) -> u32;
}

/// The deterministic pseudo-tokenizer.
///
/// Words are separated by white space, which is otherwise ignored. A word `~` followed by hexadecimal
/// digits that name an id below [`vocabulary`](Tokenizer::vocabulary) is this token; that is also how
/// tokens are written. Any other word is cut into pieces of at most four bytes, at characters, and a
/// piece is the XXH3 hash of its bytes modulo the vocabulary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pieces;

/// Size of [`Pieces`]' vocabulary: that of Llama 3, to the next power of two.
const VOCABULARY: u32 = 1 << 17;
/// Bytes of a piece at most, unless one character has more.
const PIECE: usize = 4;

impl Tokenizer for Pieces {
    fn encode(&self, text: &str) -> Vec<u32> {
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

    fn decode(&self, token: u32) -> String {
        format!(" ~{token:x}")
    }

    fn vocabulary(&self) -> u32 {
        VOCABULARY
    }
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
