//! Where added tokens occur in a text.

use std::collections::HashMap;

/// Finds occurrences of tokens: leftmost first, of several at one place the longest, without overlap.
/// That is how `tokenizers` does it for tokens without `single_word`, `lstrip` and `rstrip`.
#[derive(Debug, Default)]
pub(super) struct Matcher {
    ids: HashMap<Box<[u8]>, u32>,
    /// By first byte.
    heads: HashMap<u8, Head>,
    /// The first bytes.
    firsts: Vec<u8>,
}

#[derive(Debug)]
struct Head {
    /// Which bytes come second, to pass quickly over `<` in code.
    seconds: [bool; 256],
    /// Lengths of tokens, longest first.
    lengths: Vec<usize>,
}

impl Matcher {
    pub(super) fn new<'a>(tokens: impl Iterator<Item = (&'a str, u32)>) -> Self {
        let mut matcher = Self::default();
        for (content, id) in tokens {
            let bytes = content.as_bytes();
            let Some(&first) = bytes.first() else { continue };
            let head = matcher
                .heads
                .entry(first)
                .or_insert_with(|| Head { seconds: [false; 256], lengths: Vec::new() });
            match bytes.get(1) {
                Some(&second) => head.seconds[usize::from(second)] = true,
                None => head.seconds = [true; 256],
            }
            head.lengths.push(bytes.len());
            matcher.ids.insert(bytes.into(), id);
        }
        for head in matcher.heads.values_mut() {
            head.lengths.sort_unstable_by(|a, b| b.cmp(a));
            head.lengths.dedup();
        }
        matcher.firsts = matcher.heads.keys().copied().collect();
        matcher
    }

    /// The first occurrence: start, end and id.
    pub(super) fn find(&self, text: &str) -> Option<(usize, usize, u32)> {
        let bytes = text.as_bytes();
        let mut from = 0;
        loop {
            let rest = bytes.get(from..)?;
            let at = from
                + match *self.firsts {
                    [] => return None,
                    [a] => memchr::memchr(a, rest)?,
                    [a, b] => memchr::memchr2(a, b, rest)?,
                    [a, b, c] => memchr::memchr3(a, b, c, rest)?,
                    _ => rest.iter().position(|byte| self.firsts.contains(byte))?,
                };
            if let Some((length, id)) = self.longest(bytes.get(at..)?) {
                return Some((at, at + length, id));
            }
            from = at + 1;
        }
    }

    /// The longest token that these bytes begin with.
    fn longest(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        let head = self.heads.get(bytes.first()?)?;
        if let Some(&second) = bytes.get(1)
            && !head.seconds[usize::from(second)]
        {
            return None;
        }
        head.lengths.iter().find_map(|&length| {
            let id = self.ids.get(bytes.get(..length)?)?;
            Some((length, *id))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(tokens: &[&str], text: &str, expected: Option<(usize, usize, u32)>) {
        let matcher = Matcher::new(tokens.iter().copied().zip(0..));
        assert_eq!(matcher.find(text), expected, "{tokens:?} in {text:?}");
    }

    #[test]
    fn leftmost_then_longest() {
        check(&[], "<a>", None);
        check(&["<a>"], "", None);
        check(&["<a>"], "x<<a><a>", Some((2, 5, 0)));
        check(&["<a>", "<a><b>"], "<a><b>", Some((0, 6, 1)));
        check(&["<a>", "<a><b>"], "<a><c>", Some((0, 3, 0)));
        check(&["a<b", "<b>>>>"], "a<b>>>>", Some((0, 3, 0)));
        check(&["<", "<|x|>"], "<|x", Some((0, 1, 0)));
        check(&["<|x|>"], "<|x", None);
        check(&["a", "b", "c", "d", "e"], "xyze", Some((3, 4, 4)));
        check(&["<｜a｜>", "日"], "本<｜a｜>日", Some((3, 12, 0)));
    }
}
