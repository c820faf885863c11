//! An HTTP/1.1 answer, as it comes: its head, and its body without the framing. Pure.
//!
//! Why not a library's client: an answer of sixteen events is sixteen reads, and here each of them is
//! one system call and one walk over the bytes where they lie, into a buffer that all connections of a
//! thread share; and the moment of a send is ours.

#[cfg(test)]
mod tests;

use memchr::{memchr, memmem};

/// Bytes of an answer's head at most.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Bytes of a chunk's size line, or of a trailer's line, at most.
const MAX_LINE_BYTES: u32 = 8 << 10;
/// Digits of a chunk's size at most.
const MAX_SIZE_DIGITS: u32 = 15;

/// Not HTTP/1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotHttp;

/// What we want to know of a head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) content_type: String,
    /// May the connection be used again?
    pub(super) keeps: bool,
    /// Who served it, as the gateway says, or else the pod itself.
    pub(super) pod: Option<String>,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// Nothing before more bytes are there.
    More,
    Head(Head),
    /// A stretch of the body, not empty.
    Data(&'a [u8]),
    /// The answer is complete.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    /// So many bytes, then the end.
    Length(u64),
    /// All until the connection ends.
    Rest,
    /// In a chunk's size: value and digits so far.
    Size(u64, u32),
    /// After the digits: bytes so far.
    Extension(u64, u32),
    Chunk(u64),
    /// Behind a chunk's data: was there a carriage return?
    ChunkEnd(bool),
    /// In a line of the trailer: bytes so far, without carriage returns; and of all lines.
    Trailer(u32, u32),
    End,
}

/// Reads one answer.
#[derive(Debug)]
pub(super) struct Decoder {
    state: State,
    /// The beginning of a head that has not come as a whole.
    head: Vec<u8>,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { state: State::Head, head: Vec::new() }
    }

    /// The next item; `input` is cut to what comes after it, and empty after [`Item::More`].
    pub(super) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Item<'a>, NotHttp> {
        loop {
            if self.state == State::End {
                return Ok(Item::End);
            }
            if input.is_empty() {
                return Ok(Item::More);
            }
            match self.state {
                State::Head => {
                    if let Some(head) = self.head(input)? {
                        return Ok(Item::Head(head));
                    }
                }
                State::Rest => return Ok(Item::Data(std::mem::take(input))),
                State::Length(left) => {
                    let data = take(input, left);
                    let left = left - data.len() as u64;
                    self.state = if left == 0 { State::End } else { State::Length(left) };
                    return Ok(Item::Data(data));
                }
                State::Chunk(left) => {
                    let data = take(input, left);
                    let left = left - data.len() as u64;
                    self.state =
                        if left == 0 { State::ChunkEnd(false) } else { State::Chunk(left) };
                    return Ok(Item::Data(data));
                }
                _ => {
                    let Some((byte, rest)) = input.split_first() else { return Ok(Item::More) };
                    *input = rest;
                    self.state = between(self.state, *byte)?;
                }
            }
        }
    }

    /// Has nothing come yet?
    pub(super) fn is_fresh(&self) -> bool {
        self.state == State::Head && self.head.is_empty()
    }

    /// Is the end of the connection the end of the answer?
    pub(super) fn ends_with_connection(&self) -> bool {
        self.state == State::Rest
    }

    /// Takes from `input` what belongs to the head.
    fn head(&mut self, input: &mut &[u8]) -> Result<Option<Head>, NotHttp> {
        const END: &[u8] = b"\r\n\r\n";
        // What does not begin like an answer is none, however it goes on.
        let begins = |bytes: &[u8]| bytes.iter().zip(b"HTTP/1.").all(|(a, b)| a == b);
        let (head, body) = if self.head.is_empty()
            && let Some(end) = memmem::find(input, END)
        {
            let (head, rest) = input.split_at(end + END.len());
            *input = rest;
            parse(head)?
        } else {
            let seen = self.head.len().saturating_sub(END.len() - 1);
            let before = self.head.len();
            self.head.extend_from_slice(input);
            if !begins(&self.head) {
                return Err(NotHttp);
            }
            let tail = self.head.get(seen..).unwrap_or_default();
            let Some(end) = memmem::find(tail, END).map(|at| seen + at + END.len()) else {
                *input = &[];
                return if self.head.len() > MAX_HEAD_BYTES { Err(NotHttp) } else { Ok(None) };
            };
            *input = input.get(end - before..).unwrap_or_default();
            self.head.truncate(end);
            let parsed = parse(&self.head)?;
            self.head.clear();
            parsed
        };
        // 100 Continue and the like: the answer itself is to come.
        if head.status / 100 == 1 {
            return Ok(None);
        }
        self.state = body;
        Ok(Some(head))
    }
}

fn take<'a>(input: &mut &'a [u8], at_most: u64) -> &'a [u8] {
    let (data, rest) =
        input.split_at(input.len().min(usize::try_from(at_most).unwrap_or(usize::MAX)));
    *input = rest;
    data
}

/// One byte of a chunked body that is not data.
fn between(state: State, byte: u8) -> Result<State, NotHttp> {
    let sized = |size| if size == 0 { State::Trailer(0, 0) } else { State::Chunk(size) };
    Ok(match (state, byte) {
        (State::Size(_, digits), _) if digits > MAX_SIZE_DIGITS => return Err(NotHttp),
        (State::Size(size, digits), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
            let digit = (byte as char).to_digit(16).unwrap_or_default();
            State::Size(size << 4 | u64::from(digit), digits + 1)
        }
        (State::Size(_, 0), _) => return Err(NotHttp),
        (State::Size(size, _) | State::Extension(size, _), b'\n') => sized(size),
        (State::Size(size, _), b'\r' | b';' | b' ' | b'\t') => State::Extension(size, 0),
        (State::Extension(size, bytes), _) if bytes < MAX_LINE_BYTES => {
            State::Extension(size, bytes + 1)
        }
        (State::ChunkEnd(false), b'\r') => State::ChunkEnd(true),
        (State::ChunkEnd(_), b'\n') => State::Size(0, 0),
        (State::Trailer(0, _), b'\n') => State::End,
        (State::Trailer(_, all), b'\n') => State::Trailer(0, all + 1),
        (State::Trailer(line, all), b'\r') if all < MAX_LINE_BYTES => State::Trailer(line, all + 1),
        (State::Trailer(line, all), _) if all < MAX_LINE_BYTES => State::Trailer(line + 1, all + 1),
        _ => return Err(NotHttp),
    })
}

/// A head, up to the empty line, and how its body is framed.
fn parse(head: &[u8]) -> Result<(Head, State), NotHttp> {
    let mut lines =
        head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.next().ok_or(NotHttp)?;
    let [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ (b'0' | b'1'), b' ', a, b, c, rest @ ..] =
        first
    else {
        return Err(NotHttp);
    };
    let digits = [*a, *b, *c].map(|byte| byte.wrapping_sub(b'0'));
    if digits.iter().any(|digit| *digit > 9) || !matches!(rest.first(), None | Some(b' ')) {
        return Err(NotHttp);
    }
    let status = digits.iter().fold(0, |status, digit| status * 10 + u16::from(*digit));
    let mut found = Head { status, keeps: *minor == b'1', ..Head::default() };
    let mut length = None;
    let mut chunked = false;
    let mut by_gateway = false;
    for line in lines.filter(|line| !line.is_empty()) {
        let colon = memchr(b':', line).ok_or(NotHttp)?;
        let (name, value) =
            (line.get(..colon).unwrap_or_default(), line.get(colon + 1..).unwrap_or_default());
        let value = value.trim_ascii();
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        let text = || String::from_utf8_lossy(value).into_owned();
        let says = |word: &str| {
            value
                .split(|byte| *byte == b',')
                .any(|part| part.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
        };
        if is("content-length") {
            let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            length = Some(number.ok_or(NotHttp)?);
        } else if is("transfer-encoding") {
            chunked = says("chunked");
        } else if is("connection") {
            found.keeps = (found.keeps || says("keep-alive")) && !says("close");
        } else if is("content-type") {
            found.content_type = text();
        } else if is("x-gateway-destination-endpoint-served") {
            by_gateway = true;
            found.pod = Some(text());
        } else if is("x-served-by") && !by_gateway {
            found.pod = Some(text());
        }
    }
    let body = match length {
        _ if matches!(status, 204 | 304) => State::End,
        _ if chunked => State::Size(0, 0),
        Some(0) => State::End,
        Some(length) => State::Length(length),
        None => {
            found.keeps = false;
            State::Rest
        }
    };
    Ok((found, body))
}
