//! JSON as Go's `encoding/json` reads it: what it accepts, what it refuses and in which words.
//!
//! # Model
//!
//! A cursor over the body. It hands out positions, never values: a string is where it begins and
//! ends and whether it has escapes, an array that nobody asks about is skipped. Nothing is checked
//! as UTF-8, because Go does not refuse what is not.
//!
//! # Cost
//!
//! One pass. Strings are searched eight bytes at a time, containers are skipped without recursion;
//! memory is a flag per open bracket, at most [`MAX_DEPTH`].

use std::{borrow::Cow, fmt, ops::Range};

use memchr::memchr;
use smallvec::SmallVec;

/// Brackets that may be open at a time, as Go has it.
pub(super) const MAX_DEPTH: usize = 10_000;

/// Why a text is not what was asked for, in the words of Go's `encoding/json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JsonError {
    /// It ends too soon.
    UnexpectedEnd,
    /// A byte that may not stand where it stands.
    Character {
        /// The byte; a space at the end of the text.
        byte: u8,
        /// Where it stands.
        context: &'static str,
    },
    /// A value that does not go into the type that is wanted.
    Type {
        /// What it is: `array`, `number 1e999`.
        value: Cow<'static, str>,
        /// What is wanted, as Go says it: `value of type float64`.
        into: Cow<'static, str>,
    },
}

impl std::error::Error for JsonError {}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnexpectedEnd => f.write_str("unexpected end of JSON input"),
            Self::Character { byte, context } => {
                f.write_str("invalid character ")?;
                quote(*byte, f)?;
                write!(f, " {context}")
            }
            Self::Type { value, into } => {
                write!(f, "json: cannot unmarshal {value} into Go {into}")
            }
        }
    }
}

/// A byte as Go's `quoteChar` writes it: the code point of that number, quoted as in Go source.
fn quote(byte: u8, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match byte {
        b'\'' => f.write_str(r"'\''"),
        b'\\' => f.write_str(r"'\\'"),
        0x07 => f.write_str(r"'\a'"),
        0x08 => f.write_str(r"'\b'"),
        0x09 => f.write_str(r"'\t'"),
        0x0a => f.write_str(r"'\n'"),
        0x0b => f.write_str(r"'\v'"),
        0x0c => f.write_str(r"'\f'"),
        0x0d => f.write_str(r"'\r'"),
        0..0x20 | 0x7f => write!(f, r"'\x{byte:02x}'"),
        // Not printable: C1 controls, the no-break space and the soft hyphen.
        0x80..=0xa0 | 0xad => write!(f, r"'\u{byte:04x}'"),
        _ => write!(f, "'{}'", char::from(byte)),
    }
}

/// Kinds of JSON values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Null,
    True,
    False,
    Number,
    String,
    Array,
    Object,
}

impl Kind {
    /// As Go's errors name it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::True | Self::False => "bool",
            Self::Number => "number",
            Self::String => "string",
            Self::Array => "array",
            Self::Object => "object",
        }
    }
}

/// A value in the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) kind: Kind,
    /// All of it, quotes and brackets included.
    pub(super) span: Range<usize>,
}

/// A string in the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text {
    /// What is between the quotes.
    pub(super) span: Range<usize>,
    /// Has it a backslash?
    pub(super) escaped: bool,
}

/// A cursor over a JSON text.
#[derive(Debug)]
pub(super) struct Scanner<'a> {
    body: &'a [u8],
    at: usize,
    /// Brackets open around the cursor.
    depth: usize,
    /// The first number that no float64 can hold.
    overflow: Option<Range<usize>>,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(body: &'a [u8]) -> Self {
        Self { body, at: 0, depth: 0, overflow: None }
    }

    /// The error of decoding the first number that is too large, if there is one.
    pub(super) fn overflow(&self) -> Option<JsonError> {
        let number = self.body.get(self.overflow.clone()?)?;
        Some(JsonError::Type {
            value: format!("number {}", String::from_utf8_lossy(number)).into(),
            into: "value of type float64".into(),
        })
    }

    /// Where the cursor is.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Bytes of the body; none if the span is not in it.
    pub(super) fn bytes(&self, span: &Range<usize>) -> &'a [u8] {
        self.body.get(span.clone()).unwrap_or_default()
    }

    /// A string without its escapes.
    pub(super) fn unescaped(&self, text: &Text) -> Cow<'a, [u8]> {
        let raw = self.bytes(&text.span);
        if !text.escaped {
            return Cow::Borrowed(raw);
        }
        let mut plain = Vec::with_capacity(raw.len());
        unescape(raw, |piece| plain.extend_from_slice(piece));
        Cow::Owned(plain)
    }

    /// The kind of the value at the cursor, by its first byte. `None`: no value begins so.
    pub(super) fn kind(&mut self) -> Option<Kind> {
        self.space();
        Some(match self.peek()? {
            b'{' => Kind::Object,
            b'[' => Kind::Array,
            b'"' => Kind::String,
            b'-' | b'0'..=b'9' => Kind::Number,
            b't' => Kind::True,
            b'f' => Kind::False,
            b'n' => Kind::Null,
            _ => return None,
        })
    }

    /// Skips a value, whatever it is.
    pub(super) fn value(&mut self) -> Result<Value, JsonError> {
        self.space();
        let start = self.at;
        let kind = match self.peek() {
            Some(b'{') => self.container().map(|()| Kind::Object)?,
            Some(b'[') => self.container().map(|()| Kind::Array)?,
            _ => self.scalar()?,
        };
        Ok(Value { kind, span: start..self.at })
    }

    /// Reads the string at the cursor, which is at its opening quote.
    pub(super) fn text(&mut self) -> Result<Text, JsonError> {
        let start = self.at + 1;
        let mut at = start;
        let mut escaped = false;
        loop {
            at = find_special(self.body, at);
            match self.body.get(at) {
                None => return Err(JsonError::UnexpectedEnd),
                Some(b'"') => {
                    self.at = at + 1;
                    return Ok(Text { span: start..at, escaped });
                }
                Some(b'\\') => {
                    escaped = true;
                    at = self.escape(at + 1)?;
                }
                Some(&byte) => return Err(invalid(byte, "in string literal")),
            }
        }
    }

    /// Reads the object at the cursor, which is at its opening brace. `each` gets each key with the
    /// cursor at its value, and has to read that.
    pub(super) fn fields(
        &mut self,
        mut each: impl FnMut(&mut Self, Text) -> Result<(), JsonError>,
    ) -> Result<(), JsonError> {
        self.open(b'{')?;
        if self.peek() == Some(b'}') {
            self.close();
            return Ok(());
        }
        loop {
            let key = self.key()?;
            each(self, key)?;
            if !self.more(b'}', AFTER_PAIR)? {
                return Ok(());
            }
        }
    }

    /// Reads the array at the cursor, which is at its opening bracket. `each` is called with the
    /// cursor at each element, and has to read that.
    pub(super) fn items(
        &mut self,
        mut each: impl FnMut(&mut Self) -> Result<(), JsonError>,
    ) -> Result<(), JsonError> {
        self.open(b'[')?;
        if self.peek() == Some(b']') {
            self.close();
            return Ok(());
        }
        loop {
            each(self)?;
            if !self.more(b']', AFTER_ELEMENT)? {
                return Ok(());
            }
        }
    }

    /// Reads what follows an element: a comma, or the bracket that closes the container. Is there
    /// another element?
    #[inline]
    fn more(&mut self, close: u8, place: &'static str) -> Result<bool, JsonError> {
        self.space();
        match self.peek() {
            None => Err(JsonError::UnexpectedEnd),
            Some(b',') => {
                self.at += 1;
                self.space();
                Ok(true)
            }
            Some(byte) if byte == close => {
                self.close();
                Ok(false)
            }
            Some(byte) => Err(invalid(byte, place)),
        }
    }

    /// Reads a plain number of up to seven digits; anything else is left for
    /// [`value`](Self::value). Seven digits are enough for the tokens of any vocabulary, and fit with
    /// what follows them into one word, so that the number of digits costs no branch.
    pub(super) fn digits(&mut self) -> Option<u32> {
        let word = u64::from_le_bytes(*self.body.get(self.at..)?.first_chunk()?);
        // A digit is 0x30 to 0x39: so is its upper half, and with six added still. Lanes above the
        // lowest other byte may be wrong (a carry), and do not count.
        let high = lanes(0xf0);
        let other =
            (word & high) ^ lanes(0x30) | (word.wrapping_add(lanes(6)) & high) ^ lanes(0x30);
        let length = other.trailing_zeros() / 8;
        if length == 0 || length == 8 {
            return None;
        }
        let next = (word >> (8 * length)) as u8;
        let leading_zero = length > 1 && word as u8 == b'0';
        if leading_zero || matches!(next, b'.' | b'e' | b'E') {
            return None;
        }
        // The digits at the upper end, zeros in front; then pairs, fours and eights of them.
        let digits = (word & lanes(0x0f)) << (64 - 8 * length);
        let pairs = digits.wrapping_mul(10).wrapping_add(digits >> 8);
        let low = (pairs & 0x0000_00ff_0000_00ff).wrapping_mul(0x000f_4240_0000_0064);
        let high = ((pairs >> 16) & 0x0000_00ff_0000_00ff).wrapping_mul(0x0000_2710_0000_0001);
        self.at += length as usize;
        Some((low.wrapping_add(high) >> 32) as u32)
    }

    /// Reads the plain numbers of a list as far as each is followed by a comma, beginning with the
    /// element at the cursor, which is at an element afterwards, too.
    pub(super) fn run_of_digits(&mut self, mut each: impl FnMut(u32) -> bool) {
        loop {
            let start = self.at;
            let Some(number) = self.digits() else { return };
            self.space();
            if self.peek() != Some(b',') || !each(number) {
                self.at = start;
                return;
            }
            self.at += 1;
            self.space();
        }
    }

    /// Checks that nothing but space follows.
    pub(super) fn finish(&mut self) -> Result<(), JsonError> {
        self.space();
        match self.peek() {
            None => Ok(()),
            Some(byte) => Err(invalid(byte, "after top-level value")),
        }
    }

    fn peek(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    /// The byte at a place. Past the end a space, which is what Go feeds its scanner there.
    fn byte(&self, at: usize) -> u8 {
        self.body.get(at).copied().unwrap_or(b' ')
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.peek() {
            self.at += 1;
        }
    }

    fn open(&mut self, bracket: u8) -> Result<(), JsonError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(invalid(bracket, TOO_DEEP));
        }
        self.at += 1;
        self.space();
        Ok(())
    }

    fn close(&mut self) {
        self.at += 1;
        self.depth -= 1;
    }

    /// Reads a key and its colon; the cursor is at the value then.
    fn key(&mut self) -> Result<Text, JsonError> {
        match self.peek() {
            Some(b'"') => {}
            None => return Err(JsonError::UnexpectedEnd),
            Some(byte) => return Err(invalid(byte, "looking for beginning of object key string")),
        }
        let key = self.text()?;
        self.space();
        match self.peek() {
            Some(b':') => self.at += 1,
            None => return Err(JsonError::UnexpectedEnd),
            Some(byte) => return Err(invalid(byte, "after object key")),
        }
        self.space();
        Ok(key)
    }

    /// Skips the object or array at the cursor.
    fn container(&mut self) -> Result<(), JsonError> {
        // Is the bracket a brace?
        let mut open: SmallVec<[bool; 64]> = SmallVec::new();
        loop {
            match self.peek() {
                Some(bracket @ (b'{' | b'[')) => {
                    let object = bracket == b'{';
                    open.push(object);
                    if self.depth + open.len() > MAX_DEPTH {
                        return Err(invalid(bracket, TOO_DEEP));
                    }
                    self.at += 1;
                    self.space();
                    let empty = if object { b'}' } else { b']' };
                    if self.peek() == Some(empty) {
                        self.at += 1;
                        open.pop();
                    } else {
                        if object {
                            self.key()?;
                        }
                        continue;
                    }
                }
                _ => _ = self.scalar()?,
            }
            loop {
                let Some(&object) = open.last() else { return Ok(()) };
                self.space();
                match (self.peek(), object) {
                    (None, _) => return Err(JsonError::UnexpectedEnd),
                    (Some(b','), _) => {
                        self.at += 1;
                        self.space();
                        if object {
                            self.key()?;
                        }
                        break;
                    }
                    (Some(b'}'), true) | (Some(b']'), false) => {
                        self.at += 1;
                        open.pop();
                    }
                    (Some(byte), true) => return Err(invalid(byte, AFTER_PAIR)),
                    (Some(byte), false) => return Err(invalid(byte, AFTER_ELEMENT)),
                }
            }
        }
    }

    /// Skips a value that is no container.
    fn scalar(&mut self) -> Result<Kind, JsonError> {
        match self.peek() {
            Some(b'"') => self.text().map(|_| Kind::String),
            Some(b'-' | b'0'..=b'9') => self.number().map(|()| Kind::Number),
            Some(b't') => self.literal(b"true", &TRUE).map(|()| Kind::True),
            Some(b'f') => self.literal(b"false", &FALSE).map(|()| Kind::False),
            Some(b'n') => self.literal(b"null", &NULL).map(|()| Kind::Null),
            None => Err(JsonError::UnexpectedEnd),
            Some(byte) => Err(invalid(byte, "looking for beginning of value")),
        }
    }

    fn literal(&mut self, word: &[u8], contexts: &[&'static str]) -> Result<(), JsonError> {
        for (offset, (wanted, context)) in word.iter().zip(contexts).enumerate() {
            let byte = self.byte(self.at + offset);
            if byte != *wanted {
                return Err(invalid(byte, context));
            }
        }
        self.at += word.len();
        Ok(())
    }

    fn number(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        let mut at = start;
        if self.byte(at) == b'-' {
            at += 1;
            self.digit(at, "in numeric literal")?;
        }
        // What follows a leading zero is not of the number.
        at = if self.byte(at) == b'0' { at + 1 } else { self.skip_digits(at) };
        if self.byte(at) == b'.' {
            at += 1;
            self.digit(at, "after decimal point in numeric literal")?;
            at = self.skip_digits(at);
        }
        let exponent = matches!(self.byte(at), b'e' | b'E');
        if exponent {
            at += 1;
            if matches!(self.byte(at), b'+' | b'-') {
                at += 1;
            }
            self.digit(at, "in exponent of numeric literal")?;
            at = self.skip_digits(at);
        }
        self.at = at;
        // Only these can be too large for a float64.
        if (exponent || at - start > 300) && self.overflow.is_none() {
            let number = float(self.bytes(&(start..at)));
            if number.is_some_and(f64::is_infinite) {
                self.overflow = Some(start..at);
            }
        }
        Ok(())
    }

    fn digit(&self, at: usize, context: &'static str) -> Result<(), JsonError> {
        let byte = self.byte(at);
        if byte.is_ascii_digit() { Ok(()) } else { Err(invalid(byte, context)) }
    }

    fn skip_digits(&self, mut at: usize) -> usize {
        while self.byte(at).is_ascii_digit() {
            at += 1;
        }
        at
    }

    /// Checks the escape after a backslash; returns where it ends.
    fn escape(&self, at: usize) -> Result<usize, JsonError> {
        match self.byte(at) {
            b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"' => Ok(at + 1),
            b'u' => {
                for place in at + 1..at + 5 {
                    let byte = self.byte(place);
                    if !byte.is_ascii_hexdigit() {
                        return Err(invalid(byte, "in \\u hexadecimal character escape"));
                    }
                }
                Ok(at + 5)
            }
            byte => Err(invalid(byte, "in string escape code")),
        }
    }
}

const AFTER_PAIR: &str = "after object key:value pair";
const AFTER_ELEMENT: &str = "after array element";
const TOO_DEEP: &str = "exceeded max depth";

const TRUE: [&str; 4] = [
    "",
    "in literal true (expecting 'r')",
    "in literal true (expecting 'u')",
    "in literal true (expecting 'e')",
];
const FALSE: [&str; 5] = [
    "",
    "in literal false (expecting 'a')",
    "in literal false (expecting 'l')",
    "in literal false (expecting 's')",
    "in literal false (expecting 'e')",
];
const NULL: [&str; 4] = [
    "",
    "in literal null (expecting 'u')",
    "in literal null (expecting 'l')",
    "in literal null (expecting 'l')",
];

#[cold]
fn invalid(byte: u8, context: &'static str) -> JsonError {
    JsonError::Character { byte, context }
}

/// A JSON number as a float64; infinite if it is too large.
pub(super) fn float(number: &[u8]) -> Option<f64> {
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// A byte of `n` in each lane.
const fn lanes(n: u8) -> u64 {
    u64::from_ne_bytes([n; 8])
}

/// Marks, with the top bit of a lane, the bytes that end a run of a string: quotes, backslashes and
/// control characters. Lanes above the lowest mark may be marked by mistake (a borrow), so only the
/// lowest counts.
fn special(word: u64) -> u64 {
    let quote = word ^ lanes(b'"');
    let backslash = word ^ lanes(b'\\');
    let control = word.wrapping_sub(lanes(0x20)) & !word;
    let quote = quote.wrapping_sub(lanes(1)) & !quote;
    let backslash = backslash.wrapping_sub(lanes(1)) & !backslash;
    (control | quote | backslash) & lanes(0x80)
}

/// Where the first quote, backslash or control character at or after `from` is; the length of
/// `body` if there is none.
fn find_special(body: &[u8], from: usize) -> usize {
    let rest = body.get(from..).unwrap_or_default();
    let mut at = from;
    let (words, tail) = rest.as_chunks::<8>();
    for word in words {
        let marks = special(u64::from_le_bytes(*word));
        if marks != 0 {
            return at + marks.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let ends = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
    at + tail.iter().position(ends).unwrap_or(tail.len())
}

/// Hands out the text between the quotes of a string, without its escapes, in pieces. Lone
/// surrogates become U+FFFD as in Go; bytes that are not UTF-8 stay as they are.
pub(super) fn unescape(raw: &[u8], mut out: impl FnMut(&[u8])) {
    let mut rest = raw;
    while let Some(at) = memchr(b'\\', rest) {
        let (plain, escape) = rest.split_at(at);
        if !plain.is_empty() {
            out(plain);
        }
        let (decoded, length) = match escape.get(1) {
            Some(b'u') => unicode(escape),
            Some(b'b') => ('\u{8}', 2),
            Some(b'f') => ('\u{c}', 2),
            Some(b'n') => ('\n', 2),
            Some(b'r') => ('\r', 2),
            Some(b't') => ('\t', 2),
            Some(&byte) => (char::from(byte), 2),
            None => (char::REPLACEMENT_CHARACTER, 1),
        };
        out(decoded.encode_utf8(&mut [0; 4]).as_bytes());
        rest = escape.get(length..).unwrap_or_default();
    }
    if !rest.is_empty() {
        out(rest);
    }
}

/// The character of a `\uXXXX`, or of a surrogate pair of two, and its length in the text.
fn unicode(escape: &[u8]) -> (char, usize) {
    let Some(first) = code_unit(escape) else { return (char::REPLACEMENT_CHARACTER, 6) };
    if let Some(c) = char::from_u32(u32::from(first)) {
        return (c, 6);
    }
    let second = escape.get(6..).and_then(code_unit);
    let pair = second.and_then(|second| char::decode_utf16([first, second]).next()?.ok());
    pair.map_or((char::REPLACEMENT_CHARACTER, 6), |c| (c, 12))
}

fn code_unit(escape: &[u8]) -> Option<u16> {
    let digits = escape.strip_prefix(b"\\u")?.get(..4)?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// A string as Go decodes it: each byte that is not UTF-8 becomes U+FFFD.
pub(super) fn to_string(plain: &[u8]) -> String {
    let mut text = String::with_capacity(plain.len());
    for chunk in plain.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    text
}
