//! The size of a picture, out of the head of its file.

use base64::{Engine as _, engine::general_purpose::STANDARD};

/// Bytes of a picture that are decoded to find its size. A JPEG may have a preview of up to 64 KiB
/// in front.
const HEAD: usize = 128 << 10;

/// Width and height in pixels of a picture in base64; `None` if it is not PNG, GIF or JPEG.
pub(super) fn size(base64: &[u8]) -> Option<(u32, u32)> {
    // Whole groups of four characters, three bytes each.
    let length = base64.len().min(HEAD / 3 * 4) / 4 * 4;
    let mut head = vec![0; length / 4 * 3];
    let decoded = STANDARD.decode_slice(base64.get(..length)?, &mut head).ok()?;
    head.truncate(decoded);
    let (width, height) = png(&head).or_else(|| gif(&head)).or_else(|| jpeg(&head))?;
    (width > 0 && height > 0).then_some((width, height))
}

fn png(head: &[u8]) -> Option<(u32, u32)> {
    let rest = head.strip_prefix(b"\x89PNG\r\n\x1a\n")?;
    let (length_and_type, rest) = rest.split_first_chunk::<8>()?;
    let (width, rest) = rest.split_first_chunk()?;
    let (height, _) = rest.split_first_chunk()?;
    length_and_type
        .ends_with(b"IHDR")
        .then_some((u32::from_be_bytes(*width), u32::from_be_bytes(*height)))
}

fn gif(head: &[u8]) -> Option<(u32, u32)> {
    let rest = head.strip_prefix(b"GIF87a").or_else(|| head.strip_prefix(b"GIF89a"))?;
    let (width, rest) = rest.split_first_chunk()?;
    let (height, _) = rest.split_first_chunk()?;
    Some((u16::from_le_bytes(*width).into(), u16::from_le_bytes(*height).into()))
}

/// Goes from segment to segment to the one that begins the frame.
fn jpeg(head: &[u8]) -> Option<(u32, u32)> {
    let mut rest = head.strip_prefix(b"\xff\xd8")?;
    loop {
        // Any number of fill bytes may stand before a marker.
        let start = rest.iter().position(|byte| *byte != 0xff)?;
        if start == 0 {
            return None;
        }
        let marker = *rest.get(start)?;
        rest = rest.get(start + 1..)?;
        if matches!(marker, 0x01 | 0xd0..=0xd7) {
            continue;
        }
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
        // Frames are baseline, extended and progressive; what Go reads.
        if matches!(marker, 0xc0..=0xc2) {
            let [_, _, _, h0, h1, w0, w1] = *rest.first_chunk()?;
            return Some((
                u16::from_be_bytes([w0, w1]).into(),
                u16::from_be_bytes([h0, h1]).into(),
            ));
        }
        rest = rest.get(length.max(2)..)?;
    }
}
