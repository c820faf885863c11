//! A walk over an event's JSON that looks only at what [`Said`] is about.
//!
//! `None` = not certain: the caller asks serde_json. That is so for anything unusual (tool calls,
//! escapes in names, members that come twice where it matters, numbers that are no small integers) and
//! for all that is not well-formed as far as this looks.

use memchr::memchr2;

use super::{Said, Usage};

/// Nested lists and objects at most; deeper ones are left to serde_json.
const MAX_DEPTH: u32 = 32;

/// The same as `Said::by_serde`, for usual events.
pub(super) fn scan(data: &[u8]) -> Option<Said> {
    let mut scan = Scan { data, at: 0 };
    let mut said = Said::default();
    let mut seen = Once::default();
    scan.object(|scan, name| match name {
        b"choices" if seen.first(0) => scan.choices(&mut said),
        b"usage" if seen.first(1) => scan.usage(&mut said),
        b"error" if seen.first(2) => {
            said.error |= !scan.is_null();
            scan.skip(MAX_DEPTH)
        }
        b"object" if seen.first(3) => {
            if scan.peek()? == b'"' {
                said.error |= scan.string()? == b"error";
                Some(())
            } else {
                scan.skip(MAX_DEPTH)
            }
        }
        b"choices" | b"usage" | b"error" | b"object" => None,
        _ => scan.skip(MAX_DEPTH),
    })?;
    scan.blanks();
    (scan.at == data.len()).then_some(said)
}

/// Which members have come.
#[derive(Default)]
struct Once(u8);

impl Once {
    fn first(&mut self, bit: u8) -> bool {
        let before = self.0;
        self.0 |= 1 << bit;
        self.0 != before
    }
}

struct Scan<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Scan<'a> {
    fn blanks(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.data.get(self.at) {
            self.at += 1;
        }
    }

    /// The next byte that is not blank; stays before it.
    fn peek(&mut self) -> Option<u8> {
        self.blanks();
        self.data.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn is_null(&mut self) -> bool {
        self.blanks();
        self.data.get(self.at..).is_some_and(|rest| rest.starts_with(b"null"))
    }

    /// What is between the quotes, as it stands there. Ends after it.
    fn string(&mut self) -> Option<&'a [u8]> {
        self.take(b'"')?;
        let start = self.at;
        loop {
            let rest = self.data.get(self.at..)?;
            let found = memchr2(b'"', b'\\', rest)?;
            self.at += found + 1;
            if rest.get(found) == Some(&b'"') {
                return self.data.get(start..self.at - 1);
            }
            // Whatever is escaped is no end.
            self.at += 1;
        }
    }

    /// Calls `member` at each value, with the name before it.
    fn object(&mut self, mut member: impl FnMut(&mut Self, &[u8]) -> Option<()>) -> Option<()> {
        self.take(b'{')?;
        if self.peek()? == b'}' {
            self.at += 1;
            return Some(());
        }
        loop {
            let name = self.string()?;
            if memchr::memchr(b'\\', name).is_some() {
                return None;
            }
            self.take(b':')?;
            member(self, name)?;
            match self.peek()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Some(());
                }
                _ => return None,
            }
        }
    }

    /// Calls `element` at each element.
    fn list(&mut self, mut element: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.take(b'[')?;
        if self.peek()? == b']' {
            self.at += 1;
            return Some(());
        }
        loop {
            element(self)?;
            match self.peek()? {
                b',' => self.at += 1,
                b']' => {
                    self.at += 1;
                    return Some(());
                }
                _ => return None,
            }
        }
    }

    fn skip(&mut self, depth: u32) -> Option<()> {
        match self.peek()? {
            b'"' => self.string().map(drop),
            b'{' if depth > 0 => self.object(|scan, _| scan.skip(depth - 1)),
            b'[' if depth > 0 => self.list(|scan| scan.skip(depth - 1)),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            b'-' | b'0'..=b'9' => {
                while let Some(b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E') =
                    self.data.get(self.at)
                {
                    self.at += 1;
                }
                Some(())
            }
            _ => None,
        }
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.data.get(self.at..)?.starts_with(word).then(|| self.at += word.len())
    }

    /// Is the value a text that is not empty?
    fn text(&mut self) -> Option<bool> {
        if self.peek()? == b'"' {
            return self.string().map(|text| !text.is_empty());
        }
        self.skip(MAX_DEPTH).map(|()| false)
    }

    fn choices(&mut self, said: &mut Said) -> Option<()> {
        if self.peek()? != b'[' {
            return self.skip(MAX_DEPTH);
        }
        self.list(|scan| {
            let mut seen = Once::default();
            scan.object(|scan, name| match name {
                b"text" if seen.first(0) => {
                    said.content |= scan.text()?;
                    Some(())
                }
                // One of the two, never both.
                b"delta" | b"message" if seen.first(1) && scan.peek()? == b'{' => scan.delta(said),
                b"text" | b"delta" | b"message" => None,
                _ => scan.skip(MAX_DEPTH),
            })
        })
    }

    fn delta(&mut self, said: &mut Said) -> Option<()> {
        let mut seen = Once::default();
        self.object(|scan, name| {
            let bit = match name {
                b"content" => 0,
                b"reasoning_content" => 1,
                b"reasoning" => 2,
                b"tool_calls" if scan.is_null() => 3,
                b"tool_calls" => return None,
                _ => return scan.skip(MAX_DEPTH),
            };
            if !seen.first(bit) {
                return None;
            }
            said.content |= scan.text()?;
            Some(())
        })
    }

    fn usage(&mut self, said: &mut Said) -> Option<()> {
        if self.is_null() {
            return self.word(b"null");
        }
        let (mut usage, mut seen) = (Usage::default(), Once::default());
        self.object(|scan, name| {
            match name {
                b"prompt_tokens" if seen.first(0) => usage.prompt_tokens = Some(scan.count()?),
                b"completion_tokens" if seen.first(1) => {
                    usage.completion_tokens = Some(scan.count()?);
                }
                b"prompt_tokens_details" if seen.first(2) => {
                    if scan.is_null() {
                        return scan.word(b"null");
                    }
                    let mut once = Once::default();
                    return scan.object(|scan, name| match name {
                        b"cached_tokens" if once.first(0) => {
                            usage.cached_tokens = Some(scan.count()?);
                            Some(())
                        }
                        b"cached_tokens" => None,
                        _ => scan.skip(MAX_DEPTH),
                    });
                }
                b"prompt_tokens" | b"completion_tokens" | b"prompt_tokens_details" => return None,
                _ => return scan.skip(MAX_DEPTH),
            }
            Some(())
        })?;
        said.usage = Some(usage);
        Some(())
    }

    /// A small integer: up to nine digits and nothing else.
    fn count(&mut self) -> Option<u32> {
        self.blanks();
        let (mut count, start) = (0_u32, self.at);
        while let Some(digit @ b'0'..=b'9') = self.data.get(self.at) {
            if self.at - start == 9 {
                return None;
            }
            count = count * 10 + u32::from(digit - b'0');
            self.at += 1;
        }
        let digits = self.data.get(start..self.at)?;
        let leading_zero = digits.len() > 1 && digits.first() == Some(&b'0');
        let ends = !matches!(self.data.get(self.at), Some(b'.' | b'e' | b'E'));
        (!digits.is_empty() && !leading_zero && ends).then_some(count)
    }
}
