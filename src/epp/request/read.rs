//! The prompt, read out of the body by its spans.
//!
//! The body was scanned, so nothing here can fail: a span that is not in the body, or is not what
//! it should be, reads as nothing.

use std::{borrow::Cow, ops::ControlFlow};

use super::{
    Api, Parsed, PromptForm, PromptSpan,
    fields::is_token,
    json::{JsonError, Kind, Scanner, Text, float, unescape},
};

/// Blocks with this text in front are left out of system prompts, as in Go: they differ from request
/// to request.
const BILLING_HEADER: &[u8] = b"x-anthropic-billing-header";

/// A picture, a video or sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Media {
    Image,
    Video,
    Audio,
}

/// A piece of a prompt, in order.
#[derive(Debug)]
pub(super) enum Piece<'a> {
    Text(&'a [u8]),
    /// The next text is of another prompt of the same request.
    Next,
    /// Its address or data, as written: escapes are still in it. Sound has its format as a second
    /// part.
    Media(Media, [&'a [u8]; 2]),
}

/// Takes pieces until it has enough.
type Visit<'v> = dyn FnMut(Piece<'_>) -> ControlFlow<()> + 'v;

impl PromptSpan {
    /// Hands out the text of the prompt in order, unescaped, in pieces: for messages the role, then
    /// the content's string or the text of its parts; thoughts, tool calls and results of Anthropic's
    /// messages, too. Token ids have no text.
    pub fn visit_text(&self, body: &[u8], visit: &mut dyn FnMut(&[u8])) {
        let ended = self.walk(body, &mut |piece| {
            if let Piece::Text(text) = piece {
                visit(text);
            }
            ControlFlow::Continue(())
        });
        debug_assert!(ended.is_continue());
    }

    /// Hands out the pieces of the prompt until the visitor breaks.
    pub(super) fn walk(&self, body: &[u8], visit: &mut Visit<'_>) -> ControlFlow<()> {
        let Some(value) = body.get(self.span.clone()) else { return ControlFlow::Continue(()) };
        let mut out = Out { visit, ended: false };
        // An error is the visitor's break, or a span of another body.
        _ = match self.form {
            PromptForm::Text => out.string(unquoted(value)),
            PromptForm::Texts => out.strings(value),
            PromptForm::Messages => each(value, |scanner| out.message(scanner)),
            PromptForm::Blocks => out.content(value, true),
            PromptForm::Json => out.text(value),
            PromptForm::Tokens | PromptForm::TokenLists => Ok(()),
        };
        if out.ended { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn raw<'b>(&self, body: &'b [u8]) -> &'b [u8] {
        body.get(self.span.clone()).unwrap_or_default()
    }

    /// The string between the quotes, if the prompt is one.
    fn plain<'b>(&self, body: &'b [u8]) -> Option<&'b [u8]> {
        let raw = self.raw(body).strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        (self.form == PromptForm::Text).then_some(raw)
    }
}

impl Parsed {
    /// The prompt as bytes to be hashed in blocks: of a single string the text without its escapes,
    /// of anything else the JSON as the client wrote it. (Go hashes messages as it re-encodes them.
    /// The hashes never leave the process, so all that matters is that an equal beginning of a
    /// prompt gives equal bytes.) Borrowed from the body unless there are escapes or several parts.
    #[must_use]
    pub fn prompt_bytes<'b>(&self, body: &'b [u8]) -> Cow<'b, [u8]> {
        match self.prompt.as_slice() {
            [] => Cow::Borrowed(&[]),
            [only] => prompt_bytes(only, body),
            parts => {
                let mut all = Vec::with_capacity(parts.iter().map(|part| part.span.len()).sum());
                for part in parts {
                    all.extend_from_slice(&prompt_bytes(part, body));
                }
                Cow::Owned(all)
            }
        }
    }

    /// The length of [`prompt_bytes`](Self::prompt_bytes), in bytes; allocates nothing.
    #[must_use]
    pub fn prompt_len(&self, body: &[u8]) -> usize {
        let length = |part: &PromptSpan| match part.plain(body) {
            Some(plain) => {
                let mut length = 0;
                unescape(plain, |piece| length += piece.len());
                length
            }
            None => part.raw(body).len(),
        };
        self.prompt.iter().map(length).sum()
    }

    /// The token ids of a prompt that is written as such; several lists follow each other.
    /// `None`: it is not, or a body of another request.
    #[must_use]
    pub fn token_ids(&self, body: &[u8]) -> Option<Vec<u32>> {
        let mut ids = Vec::new();
        self.push_token_ids(body, usize::MAX, &mut ids)?;
        Some(ids)
    }

    /// The token ids of each prompt that is written as such, in order.
    /// `None`: none is, or a body of another request.
    #[must_use]
    pub fn token_lists(&self, body: &[u8]) -> Option<Vec<Vec<u32>>> {
        let [part] = self.prompt.as_slice() else { return None };
        let mut lists = Vec::new();
        match part.form {
            PromptForm::Tokens => lists.push(self.token_ids(body)?),
            PromptForm::TokenLists => {
                let read = Scanner::new(part.raw(body)).items(|scanner| {
                    let mut ids = Vec::new();
                    scanner.items(|scanner| {
                        scanner.run_of_digits(|id| {
                            ids.push(id);
                            true
                        });
                        ids.push(token(scanner)?);
                        Ok(())
                    })?;
                    lists.push(ids);
                    Ok(())
                });
                read.ok()?;
            }
            _ => return None,
        }
        Some(lists)
    }

    /// The texts of the prompts, unescaped, each by itself; none of messages, or token ids.
    #[must_use]
    pub fn texts(&self, body: &[u8]) -> Vec<String> {
        let mut texts = Vec::new();
        for part in &self.prompt {
            if !matches!(part.form, PromptForm::Text | PromptForm::Texts) {
                continue;
            }
            let mut text = Vec::with_capacity(part.span.len());
            let ended = part.walk(body, &mut |piece| {
                match piece {
                    Piece::Text(piece) => text.extend_from_slice(piece),
                    Piece::Next => texts.push(lossy(std::mem::take(&mut text))),
                    Piece::Media(..) => {}
                }
                ControlFlow::Continue(())
            });
            debug_assert!(ended.is_continue());
            texts.push(lossy(text));
        }
        texts
    }

    /// A boolean at the top of the body; of repeated ones the last.
    #[must_use]
    pub fn flag(&self, body: &[u8], name: &str) -> Option<bool> {
        let [value] = pick(&mut Scanner::new(body), [name]).ok()?;
        match value {
            b"true" => Some(true),
            b"false" => Some(false),
            _ => None,
        }
    }

    /// Appends the token ids, at most `limit`; `None` if the prompt is not written as such.
    pub(super) fn push_token_ids(
        &self,
        body: &[u8],
        limit: usize,
        out: &mut Vec<u32>,
    ) -> Option<()> {
        let [part] = self.prompt.as_slice() else { return None };
        let raw = part.raw(body);
        let lists = match part.form {
            PromptForm::Tokens => false,
            PromptForm::TokenLists => true,
            _ => return None,
        };
        let end = out.len().saturating_add(limit);
        // Digits and a comma, at least; usually four digits or more.
        out.reserve(limit.min(raw.len() / 4));
        let mut scanner = Scanner::new(raw);
        let mut list = |scanner: &mut Scanner<'_>| {
            scanner.items(|scanner| {
                scanner.run_of_digits(|id| {
                    let room = out.len() < end;
                    if room {
                        out.push(id);
                    }
                    room
                });
                if out.len() == end {
                    return Err(ENOUGH);
                }
                out.push(token(scanner)?);
                Ok(())
            })
        };
        let read = if lists { scanner.items(list) } else { list(&mut scanner) };
        (read.is_ok() || out.len() == end).then_some(())
    }

    /// Is the prompt better read as the JSON that it is than as text? So it is for lists of items,
    /// whose calls and results have no content.
    pub(super) fn items_as_json(&self) -> bool {
        matches!(self.api, Api::Responses | Api::Conversations)
    }
}

/// What is no UTF-8 is replaced, as the scanner's escapes are.
fn lossy(text: Vec<u8>) -> String {
    String::from_utf8(text)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

fn prompt_bytes<'b>(part: &PromptSpan, body: &'b [u8]) -> Cow<'b, [u8]> {
    let Some(plain) = part.plain(body) else { return Cow::Borrowed(part.raw(body)) };
    let text = Text { span: 0..plain.len(), escaped: memchr::memchr(b'\\', plain).is_some() };
    Scanner::new(plain).unescaped(&text)
}

/// Reads a token id; null is 0, as in Go.
fn token(scanner: &mut Scanner<'_>) -> Result<u32, JsonError> {
    if let Some(id) = scanner.digits() {
        return Ok(id);
    }
    let value = scanner.value()?;
    let number = float(scanner.bytes(&value.span)).filter(|number| is_token(*number));
    Ok(number.unwrap_or_default() as u32)
}

/// Ends a walk whose visitor has enough.
const ENOUGH: JsonError = JsonError::UnexpectedEnd;

type Step = Result<(), JsonError>;

/// Whoever takes the pieces.
struct Out<'v, 'w> {
    visit: &'v mut Visit<'w>,
    ended: bool,
}

impl Out<'_, '_> {
    fn put(&mut self, piece: Piece<'_>) -> Step {
        match (self.visit)(piece) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                self.ended = true;
                Err(ENOUGH)
            }
        }
    }

    fn text(&mut self, text: &[u8]) -> Step {
        if text.is_empty() { Ok(()) } else { self.put(Piece::Text(text)) }
    }

    /// A string as it is written, without its quotes.
    fn string(&mut self, raw: &[u8]) -> Step {
        if memchr::memchr(b'\\', raw).is_none() {
            return self.text(raw);
        }
        let mut step = Ok(());
        unescape(raw, |piece| {
            if step.is_ok() {
                step = self.text(piece);
            }
        });
        step
    }

    /// The strings of a list, each a prompt.
    fn strings(&mut self, list: &[u8]) -> Step {
        let mut first = true;
        each(list, |scanner| {
            let element = scanner.value()?;
            if !std::mem::take(&mut first) {
                self.put(Piece::Next)?;
            }
            self.string(unquoted(scanner.bytes(&element.span)))
        })
    }

    /// The message, or the item, at the cursor: its role, then its content.
    fn message(&mut self, scanner: &mut Scanner<'_>) -> Step {
        let [role, content] = pick(scanner, ["role", "content"])?;
        self.string(unquoted(role))?;
        self.content(content, false)
    }

    /// A content: a string, or blocks.
    fn content(&mut self, content: &[u8], system: bool) -> Step {
        match content.first() {
            Some(b'"') => self.string(unquoted(content)),
            Some(b'[') => each(content, |scanner| self.block(scanner, system)),
            _ => Ok(()),
        }
    }

    fn block(&mut self, scanner: &mut Scanner<'_>, system: bool) -> Step {
        let [kind, text, image, video, audio, source, thinking, id, name, input, content] =
            pick(scanner, BLOCK)?;
        match unquoted(kind) {
            b"text" | b"input_text" | b"output_text" => {
                let text = unquoted(text);
                if system && text.starts_with(BILLING_HEADER) { Ok(()) } else { self.string(text) }
            }
            _ if system => Ok(()),
            b"image_url" => self.asset(Media::Image, image, ["url", ""]),
            b"video_url" => self.asset(Media::Video, video, ["url", ""]),
            b"input_audio" | b"audio_url" => self.asset(Media::Audio, audio, ["data", "format"]),
            b"image" => self.source(source),
            b"thinking" => self.string(unquoted(thinking)),
            b"tool_use" => {
                self.string(unquoted(id))?;
                self.string(unquoted(name))?;
                self.text(input)
            }
            b"tool_result" => self.result(content),
            _ => Ok(()),
        }
    }

    /// The result of a tool: its text, one line a block, then its pictures.
    fn result(&mut self, content: &[u8]) -> Step {
        if content.first() == Some(&b'"') {
            return self.string(unquoted(content));
        }
        let mut first = true;
        each(content, |scanner| {
            let [kind, text] = pick(scanner, ["type", "text"])?;
            if unquoted(kind) != b"text" {
                return Ok(());
            }
            if !std::mem::take(&mut first) {
                self.text(b"\n")?;
            }
            self.string(unquoted(text))
        })?;
        each(content, |scanner| {
            let [kind, source] = pick(scanner, ["type", "source"])?;
            if unquoted(kind) == b"image" { self.source(source) } else { Ok(()) }
        })
    }

    fn asset(&mut self, media: Media, value: &[u8], parts: [&str; 2]) -> Step {
        let parts = pick(&mut Scanner::new(value), parts)?.map(unquoted);
        self.put(Piece::Media(media, parts))
    }

    /// The source of an Anthropic picture: its address, else its data; none of both is no picture.
    fn source(&mut self, source: &[u8]) -> Step {
        let [url, data] = pick(&mut Scanner::new(source), ["url", "data"])?.map(unquoted);
        let picture = if url.is_empty() { data } else { url };
        if picture.is_empty() {
            return Ok(());
        }
        self.put(Piece::Media(Media::Image, [picture, b""]))
    }
}

/// What is between the quotes of a string; of anything else nothing.
fn unquoted(value: &[u8]) -> &[u8] {
    let inside = value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\""));
    inside.unwrap_or_default()
}

/// Calls a function at each element of a list, which it has to read; anything else has none.
fn each<'a>(list: &'a [u8], step: impl FnMut(&mut Scanner<'a>) -> Step) -> Step {
    if list.first() != Some(&b'[') {
        return Ok(());
    }
    Scanner::new(list).items(step)
}

/// Reads the object at the cursor: the values of these keys, empty for those that it has not; of
/// repeated ones the last. Anything else has none.
fn pick<'a, const N: usize>(
    scanner: &mut Scanner<'a>,
    names: [&str; N],
) -> Result<[&'a [u8]; N], JsonError> {
    let mut values: [&[u8]; N] = [b""; N];
    match scanner.kind() {
        Some(Kind::Object) => {}
        Some(_) => return scanner.value().map(|_| values),
        // Nothing at all: a value that was not there to be picked.
        None => return Ok(values),
    }
    scanner.fields(|scanner, key| {
        let name = scanner.unescaped(&key);
        let slot = names.iter().position(|known| name.eq_ignore_ascii_case(known.as_bytes()));
        let value = scanner.value()?;
        if let Some(slot) = slot.and_then(|slot| values.get_mut(slot)) {
            *slot = scanner.bytes(&value.span);
        }
        Ok(())
    })?;
    Ok(values)
}

/// What is read of a block.
const BLOCK: [&str; 11] = [
    "type",
    "text",
    "image_url",
    "video_url",
    "input_audio",
    "source",
    "thinking",
    "id",
    "name",
    "input",
    "content",
];
