//! The prompt as pseudo tokens, without a tokenizer: four bytes are one.

use std::ops::ControlFlow;

use xxhash_rust::xxh64::Xxh64;

use super::{
    Api, Parsed, image,
    json::unescape,
    read::{Media, Piece},
};

/// Bytes of one pseudo token.
const BYTES: usize = 4;
/// Pixels of a picture per token.
const PIXELS: u64 = 1024;
/// Tokens of a picture of unknown size, which counts as 640 × 360, and of a frame of a video.
const IMAGE_TOKENS: u64 = 640 * 360 / PIXELS;
/// Tokens of a video: ten seconds, two frames each second.
const VIDEO_TOKENS: u64 = 10 * 2 * IMAGE_TOKENS;

/// Tokens of one asset at most: what the largest models make of a picture.
const ASSET_TOKENS: u64 = 16_384;
/// Tokens of all assets of a request at most, 4 MiB: a few bytes of body name thousands of them.
const MEDIA_TOKENS: usize = 1 << 20;

/// Appends at most `limit` pseudo tokens of a prompt, as the Go EPP's `estimate` tokenizer packs
/// them:
///
/// - token ids as they are;
/// - else the text, four bytes to a little-endian u32, the last one padded with zeros: the JSON of
///   `tools`, then role and content of each message. Each of several prompts begins a new token;
/// - a picture, video or sound begins a new token, and is so many times the low half of the xxh64 of
///   its address or data: width × height / 1024 of a picture (640 × 360 if its size is not in a
///   `data:` URL), 4500 of a video, a quarter of the data's length of sound; one at least, and at
///   most 16 384, 2²⁰ in all (Go has no bound: a picture that says it is 2³¹ wide fills its memory);
/// - of `responses` the JSON of instructions, tools and input, of `conversations` that of the items,
///   as the client wrote it. (Go re-encodes it, and the tools, with sorted keys: other ids, but
///   equal beginnings stay equal.)
///
/// Nothing for what has no prefix to cache: pictures to generate and bodies that are not read.
/// The ids stand for the text and for nothing else; no engine knows them.
pub fn estimate_tokens(parsed: &Parsed, body: &[u8], out: &mut Vec<u32>, limit: usize) {
    if matches!(parsed.api, Api::Images | Api::CountTokens | Api::Raw)
        || parsed.push_token_ids(body, limit, out).is_some()
    {
        return;
    }
    let tools = parsed.tools.clone().and_then(|span| body.get(span)).unwrap_or_default();
    let mut packer = Packer::new(out, limit);
    packer.expect(tools.len() + parsed.prompt.iter().map(|part| part.span.len()).sum::<usize>());
    if parsed.items_as_json() {
        // Instructions, then tools, then input.
        let (input, instructions) = match parsed.prompt.as_slice() {
            [before @ .., input] => (Some(input), before),
            [] => (None, [].as_slice()),
        };
        let raw = |span: &std::ops::Range<usize>| body.get(span.clone()).unwrap_or_default();
        for part in instructions {
            packer.bytes(raw(&part.span));
        }
        packer.bytes(tools);
        packer.bytes(input.map(|part| raw(&part.span)).unwrap_or_default());
    } else {
        packer.bytes(tools);
        for part in &parsed.prompt {
            if part.walk(body, &mut |piece| packer.piece(&piece)).is_break() {
                break;
            }
        }
    }
    packer.finish();
}

/// Writes bytes over the tokens of a vector until there are enough.
struct Packer<'a> {
    out: &'a mut Vec<u32>,
    /// Length of `out` before.
    start: usize,
    /// Length of `out` that is enough.
    end: usize,
    /// Bytes written.
    at: usize,
    /// Tokens that assets may still have.
    media: usize,
}

impl<'a> Packer<'a> {
    fn new(out: &'a mut Vec<u32>, limit: usize) -> Self {
        let start = out.len();
        Self { out, start, end: start.saturating_add(limit), at: 0, media: MEDIA_TOKENS }
    }

    /// Makes room for so many bytes more, as zeros, as far as they are wanted.
    fn expect(&mut self, bytes: usize) {
        let tokens = (self.at + bytes).div_ceil(BYTES);
        let length = self.start.saturating_add(tokens).min(self.end);
        if length > self.out.len() {
            self.out.resize(length, 0);
        }
    }

    fn piece(&mut self, piece: &Piece<'_>) -> ControlFlow<()> {
        match piece {
            Piece::Text(text) => self.bytes(text),
            Piece::Next => self.align(),
            Piece::Media(media, parts) => self.media(*media, parts),
        }
        let full = self.start + self.at / BYTES >= self.end;
        if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.expect(bytes.len());
        let all: &mut [u8] =
            bytemuck::cast_slice_mut(self.out.get_mut(self.start..).unwrap_or_default());
        let room = all.get_mut(self.at..).unwrap_or_default();
        let length = room.len().min(bytes.len());
        if let (Some(room), Some(bytes)) = (room.get_mut(..length), bytes.get(..length)) {
            room.copy_from_slice(bytes);
        }
        self.at += length;
    }

    /// Fills the token that is begun, with the zeros that are there.
    fn align(&mut self) {
        self.at = self.at.next_multiple_of(BYTES);
    }

    fn finish(mut self) {
        self.align();
        self.out.truncate(self.start + self.at / BYTES);
        // The bytes were written in order; on a big-endian machine that is not yet a number.
        if cfg!(target_endian = "big") {
            for token in self.out.iter_mut().skip(self.start) {
                *token = u32::from_le(*token);
            }
        }
    }

    fn media(&mut self, media: Media, parts: &[&[u8]; 2]) {
        self.align();
        let mut hash = Xxh64::new(0);
        let mut length: u64 = 0;
        for part in parts {
            unescape(part, |piece| {
                hash.update(piece);
                length += piece.len() as u64;
            });
        }
        let count = match media {
            Media::Image => image_tokens(parts[0]),
            Media::Video => VIDEO_TOKENS,
            Media::Audio => length.div_ceil(BYTES as u64),
        };
        let count = usize::try_from(count.clamp(1, ASSET_TOKENS)).unwrap_or_default();
        let room = self.end.saturating_sub(self.start + self.at / BYTES);
        let count = count.min(self.media).min(room);
        self.media -= count;
        // The low half of the hash names the asset.
        let token = (hash.digest() as u32).to_le_bytes();
        self.expect(count * BYTES);
        for _ in 0..count {
            self.bytes(&token);
        }
    }
}

/// Tokens of a picture, by its size if it has one at hand.
fn image_tokens(url: &[u8]) -> u64 {
    const MARK: &[u8] = b"base64,";
    let size = if url.starts_with(b"data:image") {
        // The type may be written with an escaped slash; what follows the mark has no escapes but
        // of its own slashes, and those are looked at below.
        memchr::memmem::find(url, MARK).and_then(|at| url.get(at + MARK.len()..)).and_then(decoded)
    } else if url.starts_with(b"http") {
        None
    } else {
        decoded(url)
    };
    size.map_or(IMAGE_TOKENS, |(width, height)| u64::from(width) * u64::from(height) / PIXELS)
}

fn decoded(base64: &[u8]) -> Option<(u32, u32)> {
    // Base64 has slashes, which some JSON encoders escape.
    if memchr::memchr(b'\\', base64).is_none() {
        return image::size(base64);
    }
    let mut plain = Vec::with_capacity(base64.len());
    unescape(base64, |piece| plain.extend_from_slice(piece));
    image::size(&plain)
}
