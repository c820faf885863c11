//! Images as bytes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use smallvec::SmallVec;

use super::{Chain, EntryImage, ImageError, LedgerImage};
use crate::{
    index::{
        ledger::Group,
        orphans::{Orphan, OwnedExtra},
        place::{Completed, Ends, Odd, Place, Tail},
    },
    model::{CountMode, EngineKey, GroupKind, RequestKey, TierId},
};

/// Kinds of parts.
const HEAD: u8 = 1;
const CHAINS: u8 = 2;
const ENTRIES: u8 = 3;
const JOINTS: u8 = 4;
const ORPHANS: u8 = 5;
const REMOVED: u8 = 6;

type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Appends to a part.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub(crate) fn blob(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn optional(&mut self, value: Option<u64>) {
        self.u8(u8::from(value.is_some()));
        if let Some(value) = value {
            self.u64(value);
        }
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Reads a part.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(ImageError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| ImageError::Truncated)
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The length of a list whose elements have `least` bytes at least.
    pub(crate) fn count(&mut self, least: usize) -> Result<usize> {
        let count = self.u32()? as usize;
        if count > self.rest.len() / least.max(1) {
            return Err(ImageError::Truncated);
        }
        Ok(count)
    }

    pub(crate) fn blob(&mut self) -> Result<&'a [u8]> {
        let count = self.count(1)?;
        self.take(count)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str> {
        std::str::from_utf8(self.blob()?).map_err(|_| ImageError::Inconsistent("a name is no text"))
    }

    pub(crate) fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ImageError::Inconsistent("neither yes nor no")),
        }
    }

    pub(crate) fn optional(&mut self) -> Result<Option<u64>> {
        self.flag()?.then(|| self.u64()).transpose()
    }

    pub(crate) fn end(&self) -> Result<()> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(ImageError::Inconsistent("more than it says"))
    }
}

/// Collects elements of one kind into parts of about a size.
struct Parts<'a, E> {
    kind: u8,
    size: usize,
    part: Writer,
    elements: u32,
    each: &'a mut dyn FnMut(&[u8]) -> Result<(), E>,
}

impl<E> Parts<'_, E> {
    fn add(&mut self, write: impl FnOnce(&mut Writer)) -> Result<(), E> {
        write(&mut self.part);
        self.elements += 1;
        if self.part.bytes.len() >= self.size { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), E> {
        if self.elements == 0 {
            return Ok(());
        }
        let mut part = Writer::default();
        part.bytes.reserve(self.part.bytes.len() + 5);
        part.u8(self.kind);
        part.u32(self.elements);
        part.bytes.append(&mut self.part.bytes);
        self.elements = 0;
        (self.each)(&part.bytes)
    }
}

pub(super) fn encode<E>(
    image: &LedgerImage,
    size: usize,
    each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut parts = Parts { kind: HEAD, size, part: Writer::default(), elements: 0, each };
    parts.add(|out| write_head(image, out))?;
    parts.flush()?;
    parts.kind = CHAINS;
    image.chains.iter().try_for_each(|chain| parts.add(|out| write_chain(chain, out)))?;
    parts.flush()?;
    parts.kind = ENTRIES;
    image.entries.iter().try_for_each(|entry| parts.add(|out| write_entry(entry, out)))?;
    parts.flush()?;
    parts.kind = JOINTS;
    image.joints.iter().try_for_each(|joint| parts.add(|out| write_joint(joint, out)))?;
    parts.flush()?;
    parts.kind = ORPHANS;
    image.orphans.iter().try_for_each(|orphan| parts.add(|out| write_orphan(orphan, out)))?;
    parts.flush()?;
    parts.kind = REMOVED;
    image.removed.iter().try_for_each(|&(key, sequence)| {
        parts.add(|out| {
            out.u64(key.0);
            out.u64(sequence);
        })
    })?;
    parts.flush()
}

pub(super) fn decode(part: &[u8], image: &mut LedgerImage) -> Result<()> {
    let reader = &mut Reader::new(part);
    let kind = reader.u8()?;
    // No element has less than four bytes.
    for _ in 0..reader.count(4)? {
        match kind {
            HEAD => read_head(reader, image)?,
            CHAINS => image.chains.push(read_chain(reader)?),
            ENTRIES => image.entries.push(read_entry(reader)?),
            JOINTS => image.joints.push(read_joint(reader)?),
            ORPHANS => image.orphans.push(read_orphan(reader)?),
            REMOVED => image.removed.push((RequestKey(reader.u64()?), reader.u64()?)),
            _ => return Err(ImageError::Inconsistent("a part of no known kind")),
        }
    }
    reader.end()
}

/// The first keys of a part's chains that begin inside a prompt.
pub(super) fn starts(part: &[u8], mut each: impl FnMut(RequestKey)) -> Result<()> {
    if part.first() != Some(&CHAINS) {
        return Ok(());
    }
    let mut image = LedgerImage::default();
    decode(part, &mut image)?;
    let inside = image.chains.iter().filter(|chain| chain.position > 0);
    inside.filter_map(|chain| chain.keys.first()).for_each(|&key| each(key));
    Ok(())
}

fn write_head(image: &LedgerImage, out: &mut Writer) {
    out.u8(match image.mode {
        CountMode::Counted => 0,
        CountMode::Set => 1,
    });
    out.count(image.groups.len());
    for group in &image.groups {
        out.optional(group.id.map(u64::from));
        out.u8(group.part);
        let (kind, window) = match group.kind {
            GroupKind::Full => (0, 0),
            GroupKind::Sliding { window } => (1, window),
            GroupKind::Unsupported => (2, 0),
        };
        out.u8(kind);
        out.u32(window);
    }
    out.count(image.loras.len());
    image.loras.iter().for_each(|name| out.blob(name.as_bytes()));
    out.count(image.block_sizes.len());
    image.block_sizes.iter().for_each(|&size| out.u32(size));
}

fn read_head(reader: &mut Reader<'_>, image: &mut LedgerImage) -> Result<()> {
    image.mode = if reader.flag()? { CountMode::Set } else { CountMode::Counted };
    for _ in 0..reader.count(7)? {
        let id = reader.optional()?.map(u32::try_from).transpose();
        let id = id.map_err(|_| ImageError::Inconsistent("number of a group"))?;
        let part = reader.u8()?;
        let kind = match (reader.u8()?, reader.u32()?) {
            (0, _) => GroupKind::Full,
            (1, window) if window > 0 => GroupKind::Sliding { window },
            (2, _) => GroupKind::Unsupported,
            _ => return Err(ImageError::Inconsistent("kind of a group")),
        };
        image.groups.push(Group { id, part, kind });
    }
    for _ in 0..reader.count(4)? {
        image.loras.push(Arc::from(reader.text()?));
    }
    for _ in 0..reader.count(4)? {
        image.block_sizes.push(reader.u32()?);
    }
    Ok(())
}

fn write_chain(chain: &Chain, out: &mut Writer) {
    out.u32(chain.position);
    out.count(chain.keys.len());
    chain.keys.iter().for_each(|key| out.u64(key.0));
    chain.engine.iter().for_each(|key| out.u64(key.0));
    out.count(chain.lines.len());
    for (tier, spans) in &chain.lines {
        out.u8(tier.0);
        out.count(spans.len());
        for &(from, to) in spans {
            out.u32(from);
            out.u32(to);
        }
    }
    out.count(chain.copies.len());
    for &(offset, tier, more) in &chain.copies {
        out.u32(offset);
        out.u8(tier.0);
        out.u32(more);
    }
}

fn read_chain(reader: &mut Reader<'_>) -> Result<Chain> {
    let position = reader.u32()?;
    let count = reader.count(16)?;
    let words = |bytes: &[u8]| -> Vec<u64> {
        let words = bytes.as_chunks::<8>().0;
        words.iter().map(|word| u64::from_le_bytes(*word)).collect()
    };
    let keys = words(reader.take(count * 8)?).into_iter().map(RequestKey).collect();
    let engine = words(reader.take(count * 8)?).into_iter().map(EngineKey).collect();
    let mut chain = Chain { position, keys, engine, ..Chain::default() };
    for _ in 0..reader.count(5)? {
        let tier = TierId(reader.u8()?);
        let mut spans = SmallVec::new();
        for _ in 0..reader.count(8)? {
            spans.push((reader.u32()?, reader.u32()?));
        }
        chain.lines.push((tier, spans));
    }
    for _ in 0..reader.count(9)? {
        chain.copies.push((reader.u32()?, TierId(reader.u8()?), reader.u32()?));
    }
    Ok(chain)
}

fn write_entry(entry: &EntryImage, out: &mut Writer) {
    out.u64(entry.at.0.0);
    out.u8(entry.at.1);
    out.count(entry.counts.len());
    for &(tier, count) in &entry.counts {
        out.u8(tier.0);
        out.u32(count);
    }
    out.u8(u8::from(entry.place.is_some()));
    let Some(place) = &entry.place else { return };
    out.u32(place.start);
    out.u32(place.end);
    out.u64(place.key.0);
    out.u8(u8::from(place.at.is_some()));
    out.u8(u8::from(place.odd.is_some()));
    let Some(odd) = &place.odd else { return };
    out.count(odd.whole.len());
    odd.whole.iter().for_each(|key| out.u64(key.0));
    out.optional(odd.head);
    out.optional(odd.tail);
    out.count(odd.rest.tokens.len());
    odd.rest.tokens.iter().for_each(|&token| out.u32(token));
    out.count(odd.rest.extras.len());
    odd.rest.extras.iter().for_each(|extra| out.blob(extra));
    write_ends(&odd.rest.ends, out);
    out.u8(u8::from(odd.salt.is_some()));
    if let Some(salt) = &odd.salt {
        out.blob(salt);
    }
}

fn read_entry(reader: &mut Reader<'_>) -> Result<EntryImage> {
    let at = (EngineKey(reader.u64()?), reader.u8()?);
    let mut counts = SmallVec::new();
    for _ in 0..reader.count(5)? {
        counts.push((TierId(reader.u8()?), reader.u32()?));
    }
    if !reader.flag()? {
        return Ok(EntryImage { at, counts, place: None });
    }
    let (start, end, key) = (reader.u32()?, reader.u32()?, RequestKey(reader.u64()?));
    // Which block it is, the index knows that restores it.
    let block = reader.flag()?.then_some(0);
    let odd = if reader.flag()? { Some(Box::new(read_odd(reader)?)) } else { None };
    let place = Place { start, end, key, at: block, odd };
    Ok(EntryImage { at, counts, place: Some(place) })
}

fn read_odd(reader: &mut Reader<'_>) -> Result<Odd> {
    let mut whole = SmallVec::new();
    for _ in 0..reader.count(8)? {
        whole.push(RequestKey(reader.u64()?));
    }
    let (head, tail) = (reader.optional()?, reader.optional()?);
    let mut rest = Tail::default();
    for _ in 0..reader.count(4)? {
        rest.tokens.push(reader.u32()?);
    }
    for _ in 0..reader.count(4)? {
        rest.extras.push(reader.blob()?.into());
    }
    rest.ends = read_ends(reader)?;
    let salt = if reader.flag()? { Some(reader.blob()?.into()) } else { None };
    Ok(Odd { whole, head, tail, rest, salt })
}

fn write_ends(ends: &Ends, out: &mut Writer) {
    out.count(ends.len());
    for &(prefix, end) in ends {
        out.u64(prefix);
        out.u32(end);
    }
}

fn read_ends(reader: &mut Reader<'_>) -> Result<Ends> {
    let mut ends = Ends::new();
    for _ in 0..reader.count(12)? {
        ends.push((reader.u64()?, reader.u32()?));
    }
    Ok(ends)
}

fn write_joint(joint: &Completed, out: &mut Writer) {
    out.u64(joint.key.0);
    out.u32(joint.begin);
    write_ends(&joint.ends, out);
}

fn read_joint(reader: &mut Reader<'_>) -> Result<Completed> {
    let (key, begin) = (RequestKey(reader.u64()?), reader.u32()?);
    Ok(Completed { key, begin, ends: read_ends(reader)? })
}

fn write_orphan((parent, age_ms, orphan): &(EngineKey, u64, Orphan), out: &mut Writer) {
    out.u64(parent.0);
    out.u64(*age_ms);
    out.u8(orphan.part);
    out.count(orphan.keys.len());
    orphan.keys.iter().for_each(|key| out.u64(key.0));
    out.count(orphan.tokens.len());
    orphan.tokens.iter().for_each(|&token| out.u32(token));
    out.count(orphan.block_size);
    out.count(orphan.extras.len());
    for extras in &orphan.extras {
        out.count(extras.len());
        for extra in extras {
            match extra {
                OwnedExtra::Text(text) => {
                    out.u8(0);
                    out.blob(text.as_bytes());
                }
                OwnedExtra::Item(id, offset) => {
                    out.u8(1);
                    out.u64(offset.cast_unsigned());
                    out.blob(id.as_bytes());
                }
                OwnedExtra::Bytes(bytes) => {
                    out.u8(2);
                    out.blob(bytes);
                }
            }
        }
    }
    out.u8(u8::from(orphan.lora.is_some()));
    if let Some(lora) = &orphan.lora {
        out.blob(lora.as_bytes());
    }
}

fn read_orphan(reader: &mut Reader<'_>) -> Result<(EngineKey, u64, Orphan)> {
    let (parent, age_ms, part) = (EngineKey(reader.u64()?), reader.u64()?, reader.u8()?);
    let mut keys = Vec::new();
    for _ in 0..reader.count(8)? {
        keys.push(EngineKey(reader.u64()?));
    }
    let mut tokens = Vec::new();
    for _ in 0..reader.count(4)? {
        tokens.push(reader.u32()?);
    }
    let block_size = reader.u32()? as usize;
    let mut extras: Vec<Box<[OwnedExtra]>> = Vec::new();
    for _ in 0..reader.count(4)? {
        let mut block = Vec::new();
        for _ in 0..reader.count(5)? {
            block.push(match reader.u8()? {
                0 => OwnedExtra::Text(reader.text()?.into()),
                1 => {
                    let offset = reader.u64()?.cast_signed();
                    OwnedExtra::Item(reader.text()?.into(), offset)
                }
                2 => OwnedExtra::Bytes(reader.blob()?.into()),
                _ => return Err(ImageError::Inconsistent("kind of an extra hash input")),
            });
        }
        extras.push(block.into());
    }
    let lora = if reader.flag()? { Some(reader.text()?.into()) } else { None };
    let at = Instant::now();
    // A clock that began less than that ago makes them younger.
    let at = at.checked_sub(Duration::from_millis(age_ms)).unwrap_or(at);
    let orphan = Orphan {
        part,
        keys: keys.into(),
        tokens: tokens.into(),
        block_size,
        extras: extras.into(),
        lora,
        at,
    };
    Ok((parent, age_ms, orphan))
}
