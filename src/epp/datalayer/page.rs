//! Metrics pages in Prometheus's text format, of which only a few families matter.
//!
//! # Model
//!
//! An engine's page has some hundred kilobytes, nearly all of it histograms; a [`Scanner`] gets it in
//! the chunks in which it comes off the network and gives out the samples of the [`Names`] that
//! somebody asked for. Lines of other families are found and skipped, and nothing in them can be
//! wrong.
//!
//! The naive equivalent is in the tests: split the page at line ends and parse every line.
//!
//! # Failure
//!
//! A line of a family that was asked for and that cannot be read is given out as
//! [`Found::Malformed`]; the rest of the page goes on. Nothing panics on any bytes. `OpenMetrics`
//! pages pass, too: exemplars, fractions of seconds and `# EOF` are read over.
//!
//! # Cost
//!
//! One search for line ends and one comparison per line: some 10 µs for 100 kB. Memory is the part of
//! a line that a chunk ended in, at most [`MAX_LINE`] bytes.

use std::{borrow::Cow, fmt};

use memchr::{memchr, memchr_iter};

#[doc(hidden)]
pub mod fuzz;

/// Longest line that is read, bytes: a LoRA line that names thousands of adapters. Longer ones are
/// malformed.
pub const MAX_LINE: usize = 64 << 10;

/// The families to look for.
#[derive(Clone)]
pub struct Names {
    names: Vec<Box<[u8]>>,
    /// What all names begin with, bytes. Pages repeat it in nearly every line.
    common: usize,
    /// What follows the common part in the names, each once.
    keys: Vec<Key>,
}

/// Up to eight bytes of a name, to tell most lines apart with one comparison.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    word: u64,
    /// Bytes of `word` that are the name's.
    mask: u64,
}

impl Key {
    const BYTES: usize = size_of::<u64>();

    fn new(part: &[u8]) -> Self {
        let mut bytes = [0; Self::BYTES];
        let mut mask = [0; Self::BYTES];
        for ((to, mask), &from) in bytes.iter_mut().zip(&mut mask).zip(part) {
            (*to, *mask) = (from, 0xff);
        }
        Self { word: u64::from_ne_bytes(bytes), mask: u64::from_ne_bytes(mask) }
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names.iter().map(|name| String::from_utf8_lossy(name));
        f.debug_list().entries(names).finish()
    }
}

impl Names {
    /// Names to look for; samples refer to them by their place here. Empty names are never found.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<Box<[u8]>> = names.into_iter().map(|name| name.as_bytes().into()).collect();
        let first = names.first().map_or(&[][..], |name| &name[..]);
        let same = |name: &[u8]| first.iter().zip(name).take_while(|(a, b)| a == b).count();
        let common = names.iter().map(|name| same(name)).min().unwrap_or(0);
        let mut keys: Vec<Key> = names.iter().map(|name| Key::new(&name[common..])).collect();
        // One comparison for all names that begin alike.
        keys.sort_unstable();
        keys.dedup();
        Self { names, common, keys }
    }

    /// The name that a line begins with, and the rest of the line.
    fn at_start<'l>(&self, line: &'l [u8]) -> Option<(usize, &'l [u8])> {
        let after = line.get(self.common..)?;
        // Near the end of a short line there is less to compare.
        let word = after.first_chunk().map(|word| u64::from_ne_bytes(*word));
        if word.is_some_and(|word| self.keys.iter().all(|key| word & key.mask != key.word)) {
            return None;
        }
        let found = |name: &[u8]| {
            !name.is_empty()
                && line.starts_with(name)
                && line.get(name.len()).is_none_or(|&byte| !is_name_byte(byte))
        };
        let name = self.names.iter().position(|name| found(name))?;
        Some((name, &line[self.names[name].len()..]))
    }
}

/// Something in a page about a family that was asked for.
#[derive(Debug, PartialEq)]
pub enum Found<'a> {
    /// A sample.
    Sample(Sample<'a>),
    /// The family has a type of which a sample is no scalar: a histogram or a summary. Its samples
    /// follow.
    NotScalar {
        /// Which of the [`Names`].
        name: usize,
    },
    /// A line that cannot be read.
    Malformed {
        /// Which of the [`Names`].
        name: usize,
    },
}

/// One sample: a line of the page.
#[derive(Debug, PartialEq)]
pub struct Sample<'a> {
    /// Which of the [`Names`].
    pub name: usize,
    /// Its labels.
    pub labels: Labels<'a>,
    /// Its value, which may be infinite or NaN.
    pub value: f64,
    /// Its timestamp, 0 when there is none. Only good for comparing: its unit is that of the page.
    pub timestamp: f64,
}

/// The labels of a sample, as they stand in the page.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Labels<'a>(&'a [u8]);

impl<'a> Labels<'a> {
    /// Labels from text that [`as_bytes`](Self::as_bytes) gave out. Of other text only the part that
    /// is well-formed is seen.
    #[must_use]
    pub fn from_bytes(text: &'a [u8]) -> Self {
        Self(text)
    }

    /// What stands between the braces.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// The value of a label; of several of one name, the first.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Cow<'a, [u8]>> {
        let mut rest = self.0;
        while let Some((label, value, after)) = label(rest) {
            if label == name.as_bytes() {
                return Some(unescape(value));
            }
            rest = after;
        }
        None
    }
}

/// Reads a page in chunks of any size.
#[derive(Debug, Default)]
pub struct Scanner {
    /// The beginning of the line that the last chunk ended in.
    carry: Vec<u8>,
    /// The line that the last chunk ended in is too long, and has been dealt with.
    overlong: bool,
}

impl Scanner {
    /// Reads on. `chunk` begins where the last one ended.
    pub fn feed(&mut self, names: &Names, chunk: &[u8], mut found: impl FnMut(Found<'_>)) {
        let mut rest = chunk;
        if !self.carry.is_empty() || self.overlong {
            let Some(end) = memchr(b'\n', rest) else {
                return self.keep(names, rest, &mut found);
            };
            self.keep(names, &rest[..end], &mut found);
            self.finish(names, &mut found);
            rest = &rest[end + 1..];
        }
        let mut start = 0;
        for end in memchr_iter(b'\n', rest) {
            line(names, &rest[start..end], &mut found);
            start = end + 1;
        }
        self.keep(names, &rest[start..], &mut found);
    }

    /// Ends the page; the scanner is as new. The last line may lack its end.
    pub fn finish(&mut self, names: &Names, mut found: impl FnMut(Found<'_>)) {
        if !std::mem::take(&mut self.overlong) {
            line(names, &self.carry, &mut found);
        }
        self.carry.clear();
    }

    /// Forgets what was read of a page that has no end.
    pub fn abandon(&mut self) {
        self.carry.clear();
        self.overlong = false;
    }

    fn keep(&mut self, names: &Names, part: &[u8], found: &mut impl FnMut(Found<'_>)) {
        if self.overlong {
            return;
        }
        let room = (MAX_LINE + 1).saturating_sub(self.carry.len());
        self.carry.extend_from_slice(&part[..part.len().min(room)]);
        if self.carry.len() > MAX_LINE {
            line(names, &self.carry, found);
            self.carry.clear();
            self.overlong = true;
        }
    }
}

/// One line, without its end; of one that is too long, at least the part that shows it.
fn line(names: &Names, line: &[u8], found: &mut impl FnMut(Found<'_>)) {
    let overlong = line.len() > MAX_LINE;
    let line = match line.first() {
        Some(b'#') if overlong => return,
        Some(b'#') => return comment(names, line, found),
        Some(b' ' | b'\t') => skip_blanks(line),
        Some(_) => line,
        None => return,
    };
    if let Some((name, rest)) = names.at_start(line) {
        let sample = if overlong { None } else { sample(name, rest) };
        found(sample.map_or(Found::Malformed { name }, Found::Sample));
    }
}

/// Looks for `# TYPE name histogram`.
fn comment(names: &Names, line: &[u8], found: &mut impl FnMut(Found<'_>)) {
    let Some(rest) = line.strip_prefix(b"# TYPE ") else { return };
    let Some((name, kind)) = names.at_start(skip_blanks(rest)) else { return };
    if matches!(kind.trim_ascii(), b"histogram" | b"summary" | b"gaugehistogram") {
        found(Found::NotScalar { name });
    }
}

/// What follows the name: `{label="value",…} value timestamp`, the labels and the timestamp optional.
fn sample(name: usize, rest: &[u8]) -> Option<Sample<'_>> {
    let mut rest = skip_blanks(rest);
    let mut labels = Labels::default();
    if let Some(inside) = rest.strip_prefix(b"{") {
        let mut after = inside;
        while let Some((.., next)) = label(after) {
            after = next;
        }
        labels = Labels(&inside[..inside.len() - after.len()]);
        rest = skip_blanks(after).strip_prefix(b"}")?;
    }
    let mut words = rest.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty());
    let value = number(words.next()?)?;
    let timestamp = match words.next() {
        // What follows the hash is an exemplar.
        None => 0.0,
        Some(word) if word.starts_with(b"#") => 0.0,
        Some(word) => {
            let timestamp = number(word).filter(|timestamp| timestamp.is_finite())?;
            if words.next().is_some_and(|word| !word.starts_with(b"#")) {
                return None;
            }
            timestamp
        }
    };
    Some(Sample { name, labels, value, timestamp })
}

/// The first label of `text`: its name, its value as written, and what follows it and its comma.
fn label(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let text = skip_blanks(text);
    let end = text.iter().position(|&byte| !is_name_byte(byte)).filter(|&end| end > 0)?;
    let (name, rest) = text.split_at(end);
    let rest = skip_blanks(skip_blanks(rest).strip_prefix(b"=")?).strip_prefix(b"\"")?;
    let mut from = 0;
    let end = loop {
        let at = from + memchr::memchr2(b'"', b'\\', &rest[from..])?;
        if rest[at] == b'"' {
            break at;
        }
        // A backslash takes the next byte with it.
        from = at + 2;
        if from > rest.len() {
            return None;
        }
    };
    let after = skip_blanks(&rest[end + 1..]);
    let after = match after.first() {
        Some(b',') => &after[1..],
        Some(b'}') | None => after,
        Some(_) => return None,
    };
    Some((name, &rest[..end], after))
}

fn unescape(value: &[u8]) -> Cow<'_, [u8]> {
    if memchr(b'\\', value).is_none() {
        return Cow::Borrowed(value);
    }
    let mut out = Vec::with_capacity(value.len());
    let mut bytes = value.iter().copied();
    while let Some(byte) = bytes.next() {
        match (byte, if byte == b'\\' { bytes.next() } else { None }) {
            (_, None) => out.push(byte),
            (_, Some(b'n')) => out.push(b'\n'),
            (_, Some(escaped @ (b'"' | b'\\'))) => out.push(escaped),
            // No escape of the format; it stands for itself.
            (_, Some(other)) => out.extend([b'\\', other]),
        }
    }
    Cow::Owned(out)
}

/// A float as Prometheus writes it.
fn number(word: &[u8]) -> Option<f64> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

fn skip_blanks(text: &[u8]) -> &[u8] {
    match text.iter().position(|byte| !matches!(byte, b' ' | b'\t')) {
        Some(0) => text,
        Some(at) => &text[at..],
        None => &[],
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':')
}

#[cfg(test)]
mod tests;
