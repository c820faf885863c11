//! Where a text may be cut so that both sides are pre-tokenized as they are in the whole.
//!
//! # The rule
//!
//! Between two characters `a` and `b` if either
//!
//! 1. `b` is U+0020 and `a` is solid: surely no whitespace, by any version of Unicode; or
//! 2. `a` is a plain letter (A–Z, a–z, U+4E00–U+9FA5) and `b` is a plain mark: tab, line feed, carriage
//!    return, ASCII punctuation or symbol other than the apostrophe, or one of `、。！（），：；？`.
//!
//! # Why it holds
//!
//! Every pattern of [`PATTERNS`] is an alternation without anchors, look-behind and back-references, in
//! which
//!
//! * (i) no alternative consumes a space after a character that is no whitespace: each begins with an
//!   optional space or an optional character of a class that has the space, goes on with classes that
//!   have no whitespace but `\r` and `\n`, or consumes whitespace only;
//! * (ii) after a letter no alternative consumes anything but letters, marks (`\p{M}`), or an apostrophe
//!   and letters;
//! * (iii) the only look-ahead is `(?!\S)`, right after whitespace was consumed.
//!
//! By (i) and (ii), no attempt at a match, whichever way it backtracks, goes from `a` over the cut to
//! `b`. So a search on the left of the cut reads nothing of the right, except by looking ahead from the
//! cut itself, which (iii) rules out, since `a` is no whitespace: the matches on the left are those of
//! the left side alone, and none spans the cut. A search that has come to the cut reads nothing of
//! the left, since nothing looks behind: the matches on the right are those of the right side alone.
//!
//! What the pattern does not match becomes a piece of its own, the longest such stretch between two
//! matches. A stretch does not span the cut either: under rule 1 because something matches at a space
//! (`\s+` does), under rule 2 because something matches at a letter, so that `a` is the last character of
//! a match or of a piece of an earlier split.
//!
//! Several splits one after the other (DeepSeek) work on pieces of the former, and each meets the above:
//! `\p{N}{1,3}` and `[一-龥぀-ゟ゠-ヿ]+` have neither space nor look-ahead, and the marks of rule 2 are not
//! in the latter's ranges, so no match of theirs goes over a cut. If one of them splits at the cut, all is
//! said; if not, `a` and `b` are in one piece of the next.
//!
//! NFC before that: `b` is a starter that never combines with what is before it (Unicode Standard Annex
//! 15), so the sides normalize as in the whole. With what follows, `<`, `=` and `>` combine to another
//! symbol (U+0338: `≮`), for which rule 2 holds as well: it is no letter, mark or apostrophe; the others
//! do not change. `a` under rule 2 does not change, and under rule 1 what solid characters normalize to is
//! no whitespace.
//!
//! Added tokens: the rule is used on text in which there is none, so there is none in its parts.

/// The split patterns that the rule is proved for, one after the other as a tokenizer has them.
pub(super) const PATTERNS: [&[&str]; 7] = [
    // Llama 3, GLM 4, Phi 4 (cl100k of OpenAI in the syntax of Oniguruma).
    &[
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    // Qwen 2 and 3: digits by themselves.
    &[
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    // Qwen 3.5: marks go with letters.
    &[
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    // gpt-oss, Llama 4 (o200k).
    &[
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    // Mistral's Tekken: the same without contractions, digits by themselves.
    &[
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    // DeepSeek V3 and R1.
    &[
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    // GPT-2: what `ByteLevel` has built in.
    &[r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
];

/// What a byte may begin, after a cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    Nothing,
    Space,
    Mark,
    /// Perhaps a mark of three bytes.
    Wide,
}

const AFTER: [After; 256] = {
    let mut table = [After::Nothing; 256];
    let mut byte = 0;
    while byte < 128 {
        if (byte as u8).is_ascii_punctuation() {
            table[byte] = After::Mark;
        }
        byte += 1;
    }
    table[b'\'' as usize] = After::Nothing;
    table[b'\t' as usize] = After::Mark;
    table[b'\n' as usize] = After::Mark;
    table[b'\r' as usize] = After::Mark;
    table[b' ' as usize] = After::Space;
    // 、 and 。 begin with the first, ！（），：；？ with the second.
    table[0xe3] = After::Wide;
    table[0xef] = After::Wide;
    table
};

/// The first cut behind `from`; the text's end if there is none. `from` is a boundary of characters.
pub(super) fn next(text: &str, from: usize) -> usize {
    let bytes = text.as_bytes();
    let mut at = from + 1;
    while let Some(&byte) = bytes.get(at) {
        let cut = match AFTER[usize::from(byte)] {
            After::Nothing => false,
            After::Space => before(text, at).is_some_and(is_solid),
            After::Mark => before(text, at).is_some_and(is_letter),
            After::Wide => {
                before(text, at).is_some_and(is_letter)
                    && text.get(at..).and_then(|rest| rest.chars().next()).is_some_and(is_wide_mark)
            }
        };
        if cut {
            return at;
        }
        at += 1;
    }
    text.len()
}

/// The shortest parts of a text.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    pieces(text, 1)
}

/// Parts of a text that have `least` bytes, and as few more as the rule allows; the last one is what
/// is left. Where a part ends depends on nothing behind its end but the next character.
pub(super) fn pieces(text: &str, least: usize) -> impl Iterator<Item = &str> {
    let mut start = 0;
    std::iter::from_fn(move || {
        if start >= text.len() {
            return None;
        }
        let mut from = start + least.max(1) - 1;
        if from >= text.len() {
            from = text.len() - 1;
        }
        let end = next(text, text.floor_char_boundary(from));
        let piece = text.get(start..end);
        start = end;
        piece
    })
}

/// The character before a boundary of characters; `None` if it is no boundary.
fn before(text: &str, at: usize) -> Option<char> {
    match text.as_bytes().get(at.checked_sub(1)?) {
        Some(&byte) if byte.is_ascii() => Some(char::from(byte)),
        _ => text.get(..at)?.chars().next_back(),
    }
}

/// Is this surely no whitespace, whoever is asked, nor turned into whitespace by NFC? Format characters
/// and what was whitespace in some version of Unicode are left out.
fn is_solid(c: char) -> bool {
    match c {
        '\0'..='\u{7f}' => c.is_ascii_graphic(),
        '\u{80}'..='\u{a0}' | '\u{1680}' | '\u{180e}' => false,
        '\u{2000}'..='\u{206f}' | '\u{3000}' | '\u{feff}' => false,
        _ => true,
    }
}

/// Is this a letter, and nothing that NFC changes?
fn is_letter(c: char) -> bool {
    matches!(c, 'A'..='Z' | 'a'..='z' | '\u{4e00}'..='\u{9fa5}')
}

fn is_wide_mark(c: char) -> bool {
    matches!(c, '、' | '。' | '！' | '（' | '）' | '，' | '：' | '；' | '？')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        assert_eq!(words(text).collect::<Vec<_>>(), expected);
        assert_eq!(pieces(text, usize::MAX / 2).collect::<Vec<_>>(), [text]);
    }

    #[test]
    fn words_end_where_it_is_proved() {
        check("Hello, world. It's 10 km", &["Hello", ",", " world", ".", " It's", " 10", " km"]);
        check("a  b\n\n c", &["a", "  b", "\n\n c"]);
        check("foo.bar(baz)\n\tx", &["foo", ".bar", "(baz", ")\n\tx"]);
        check("你好，世界。x", &["你好", "，世界", "。x"]);
        check("é e\u{301} f", &["é", " e\u{301}", " f"]);
        check("\u{3000} \u{a0} \u{2009} x", &["\u{3000} \u{a0} \u{2009} x"]);
        check("1.5, 2", &["1.5,", " 2"]);
        check("かな。x", &["かな。x"]);
    }

    #[test]
    fn pieces_have_their_least_length_and_lie_still_while_the_text_grows() {
        let text = "one two three four five six seven eight nine ten ".repeat(20);
        let whole: Vec<&str> = pieces(&text, 64).collect();
        assert_eq!(whole.concat(), text);
        for (piece, end) in whole.iter().zip(1..) {
            assert!(piece.len() >= 64 || end == whole.len(), "{piece:?}");
            assert!(piece.len() < 80, "{piece:?}");
        }
        for length in 0..text.len() {
            let part: Vec<&str> = pieces(&text[..length], 64).collect();
            let settled = part.len().saturating_sub(1);
            assert_eq!(part[..settled], whole[..settled], "{length}");
        }
    }
}
