//! Snapshots: the rows of a fleet as bytes, and bytes as rows that go on where they stopped.
//!
//! # Format
//!
//! ```text
//! file     "KVXSNAP\n" │ version : u32 │ section … section
//! section  kind : u32 │ length : u32 │ checksum : u64 │ payload
//!
//! START    when, names of the tiers
//! ROW      a row's identity, hash settings, and how far its stream is applied   ┐
//! PART     a part of what it holds: index::RowImage                     (0 …)   │ per row
//! ROW END  how many parts                                                       ┘
//! END      how many rows and sections; nothing follows
//! ```
//!
//! Numbers are little-endian. A checksum is XXH3 of the payload, with a seed that is made of the
//! section's number, kind and length: no section can be changed, lost, repeated or moved unnoticed,
//! and a file without END is cut short. Sections of this writer have about a quarter of a megabyte.
//!
//! # Loading
//!
//! [`load`] reads everything twice: first to check it and to learn where chains begin, then to
//! restore the rows. It needs the index for itself, so it comes before the first publisher. A
//! restored row is shown as replaying and stale, and scores; a publisher that is declared for it
//! claims it and asks the engine for what came after. What nobody claims is dropped.
//!
//! # Failure
//!
//! A file is loaded as a whole or not at all, except for rows that cannot mean the same here (other
//! hash settings): they are left out, each with its reason. No byte sequence panics, or makes more
//! be allocated than its own size warrants.

mod claim;
mod export;
mod file;
pub mod fuzz;
#[cfg(test)]
mod tests;

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    sync::Arc,
};

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

pub(crate) use self::export::write;
pub use self::{
    export::{Exported, Source},
    file::{Store, StoreError},
};
use crate::{
    hash::Models,
    index::{Anchors, ImageBuilder, ImageError, Reader, RowImage, Writer},
    ingest::fleet::Fleet,
    model::{CountMode, PodState, RowId, TierId, TierTable},
    support::clock::unix_ns,
};

const MAGIC: &[u8; 8] = b"KVXSNAP\n";
/// Changes with the meaning of any byte.
const VERSION: u32 = 1;
/// Bytes of a section's payload at most: an orphan has as many tokens as one batch.
const MAX_SECTION: u32 = 256 << 20;
/// Bytes of a part, about.
const PART: usize = 256 << 10;
/// Bytes that are read before more is allocated.
const STEP: usize = 1 << 20;

const START: u32 = 1;
const ROW: u32 = 2;
const ROW_PART: u32 = 3;
const ROW_END: u32 = 4;
const END: u32 = 5;

/// Why a snapshot is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// It could not be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is something else.
    #[error("it is no snapshot of kv-indexer")]
    Foreign,
    /// It is of another version.
    #[error("it has format version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// It ends early.
    #[error("it is cut short after section {0}")]
    Cut(u64),
    /// Some byte is not what was written.
    #[error("section {0} is damaged")]
    Damaged(u64),
    /// Its checksums hold, but what it says makes no sense.
    #[error("section {section}: {why}")]
    Inconsistent {
        /// Number of the section, from 0.
        section: u64,
        /// What is wrong.
        why: ImageError,
    },
}

impl SnapshotError {
    /// Label value for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Read(_) => "read",
            Self::Foreign => "foreign",
            Self::Version(_) => "version",
            Self::Cut(_) => "cut",
            Self::Damaged(_) => "damaged",
            Self::Inconsistent { .. } => "inconsistent",
        }
    }
}

/// A row's identity, and how far its stream is applied.
#[derive(Clone, Debug, PartialEq)]
pub struct RowMark {
    /// Pod and rank.
    pub id: RowId,
    /// The publisher was declared without a rank, and this is the one that its first batch named.
    pub lead: bool,
    /// Where its events come from; empty: the engine connects to us.
    pub endpoint: Arc<str>,
    /// Canonical name of its model.
    pub model: Arc<str>,
    /// Of its hash settings.
    pub fingerprint: u64,
    /// Life of the publisher.
    pub epoch: u64,
    /// Last batch applied in it.
    pub sequence: u64,
    /// Hash of that batch's payload, to recognize it.
    pub payload_hash: u64,
    /// Newest timestamp applied, seconds of the engine's clock.
    pub newest: f64,
    /// What its blocks can be trusted for, a replay under way aside.
    pub trust: PodState,
    /// A batch that could not be read in full since the last clear.
    pub damaged: Option<u64>,
    /// Its engine keys were reused for other tokens, so it scores nothing.
    pub muted: bool,
    /// Blocks that the engine holds were refused for want of room.
    pub capped: bool,
}

impl RowMark {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.blob(self.id.pod.as_bytes());
        out.optional(self.id.rank.map(u64::from));
        out.u8(u8::from(self.lead));
        out.blob(self.endpoint.as_bytes());
        out.blob(self.model.as_bytes());
        for number in [self.fingerprint, self.epoch, self.sequence, self.payload_hash] {
            out.u64(number);
        }
        out.u64(self.newest.to_bits());
        out.u8(self.trust as u8);
        out.optional(self.damaged);
        out.u8(u8::from(self.muted));
        out.u8(u8::from(self.capped));
        out.finish()
    }

    fn decode(payload: &[u8]) -> Result<Self, ImageError> {
        let reader = &mut Reader::new(payload);
        let pod = Arc::from(reader.text()?);
        let rank = reader.optional()?.map(u32::try_from).transpose();
        let rank = rank.map_err(|_| ImageError::Inconsistent("a rank"))?;
        let mark = Self {
            id: RowId { pod, rank },
            lead: reader.flag()?,
            endpoint: Arc::from(reader.text()?),
            model: Arc::from(reader.text()?),
            fingerprint: reader.u64()?,
            epoch: reader.u64()?,
            sequence: reader.u64()?,
            payload_hash: reader.u64()?,
            newest: f64::from_bits(reader.u64()?),
            trust: PodState::ALL
                .get(usize::from(reader.u8()?))
                .copied()
                .ok_or(ImageError::Inconsistent("a state"))?,
            damaged: reader.optional()?,
            muted: reader.flag()?,
            capped: reader.flag()?,
        };
        reader.end()?;
        let counts = mark.epoch > 0 && mark.epoch < u64::MAX && mark.sequence < u64::MAX - 1;
        if !counts || mark.newest.is_nan() {
            return Err(ImageError::Inconsistent("how far a row is"));
        }
        Ok(mark)
    }
}

fn seed(number: u64, kind: u32, length: u32) -> u64 {
    let mut input = [0; 24];
    input[..8].copy_from_slice(&number.to_le_bytes());
    input[8..12].copy_from_slice(&kind.to_le_bytes());
    input[12..16].copy_from_slice(&length.to_le_bytes());
    input[16..20].copy_from_slice(&VERSION.to_le_bytes());
    xxh3_64(&input)
}

/// Writes a snapshot, row by row.
#[derive(Debug)]
pub struct SnapshotWriter<W> {
    out: W,
    sections: u64,
    rows: u64,
    bytes: u64,
}

impl<W: Write> SnapshotWriter<W> {
    /// Begins one.
    ///
    /// # Errors
    ///
    /// Those of `out`, here and below.
    pub fn begin(mut out: W, tiers: &TierTable) -> io::Result<Self> {
        out.write_all(MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        let mut start = Writer::default();
        start.u64(unix_ns());
        start.count(TierTable::MAX);
        for tier in 0..TierTable::MAX {
            start.blob(tiers.name(TierId(tier as u8)).as_bytes());
        }
        let mut writer = Self { out, sections: 0, rows: 0, bytes: 12 };
        writer.section(START, &start.finish())?;
        Ok(writer)
    }

    /// Adds a row.
    ///
    /// # Errors
    ///
    /// When `out` refuses it.
    pub fn row(&mut self, mark: &RowMark, image: &RowImage) -> io::Result<()> {
        self.section(ROW, &mark.encode())?;
        let mut parts = 0;
        image.encode(PART, |part| {
            parts += 1;
            self.section(ROW_PART, part)
        })?;
        let mut end = Writer::default();
        end.u64(parts);
        self.section(ROW_END, &end.finish())?;
        self.rows += 1;
        Ok(())
    }

    /// Ends it; returns its bytes.
    ///
    /// # Errors
    ///
    /// When `out` refuses the end.
    pub fn finish(mut self) -> io::Result<u64> {
        let mut end = Writer::default();
        end.u64(self.rows);
        end.u64(self.sections + 1);
        self.section(END, &end.finish())?;
        self.out.flush()?;
        Ok(self.bytes)
    }

    fn section(&mut self, kind: u32, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if length > MAX_SECTION {
            return Err(io::Error::other("a single element of a row is too large for a snapshot"));
        }
        let checksum = xxh3_64_with_seed(payload, seed(self.sections, kind, length));
        let mut head = [0; 16];
        head[..4].copy_from_slice(&kind.to_le_bytes());
        head[4..8].copy_from_slice(&length.to_le_bytes());
        head[8..].copy_from_slice(&checksum.to_le_bytes());
        self.out.write_all(&head)?;
        self.out.write_all(payload)?;
        self.sections += 1;
        self.bytes += 16 + u64::from(length);
        Ok(())
    }
}

/// Reads sections, checked.
struct Sections<R> {
    input: R,
    number: u64,
    payload: Vec<u8>,
}

impl<R: Read> Sections<R> {
    fn begin(mut input: R) -> Result<Self, SnapshotError> {
        let (mut magic, mut version) = ([0; 8], [0; 4]);
        fill(&mut input, &mut magic)?.ok_or(SnapshotError::Foreign)?;
        if magic != *MAGIC {
            return Err(SnapshotError::Foreign);
        }
        fill(&mut input, &mut version)?.ok_or(SnapshotError::Cut(0))?;
        match u32::from_le_bytes(version) {
            VERSION => Ok(Self { input, number: 0, payload: Vec::new() }),
            other => Err(SnapshotError::Version(other)),
        }
    }

    /// The next section's kind; its payload is in `payload`.
    fn next(&mut self) -> Result<u32, SnapshotError> {
        let number = self.number;
        let mut head = [0; 16];
        fill(&mut self.input, &mut head)?.ok_or(SnapshotError::Cut(number))?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (kind, length) = (word(0), word(4));
        let checksum = u64::from(word(8)) | u64::from(word(12)) << 32;
        if length > MAX_SECTION {
            return Err(SnapshotError::Damaged(number));
        }
        self.payload.clear();
        let mut left = length as usize;
        while left > 0 {
            // Allocates as what it claims to have arrives.
            let step = left.min(STEP);
            let from = self.payload.len();
            self.payload.resize(from + step, 0);
            let read = fill(&mut self.input, &mut self.payload[from..])?;
            read.ok_or(SnapshotError::Cut(number))?;
            left -= step;
        }
        if xxh3_64_with_seed(&self.payload, seed(number, kind, length)) != checksum {
            return Err(SnapshotError::Damaged(number));
        }
        self.number += 1;
        Ok(kind)
    }
}

/// Reads all of `buffer`; `None` when the input ends before.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<Option<()>> {
    match input.read_exact(buffer) {
        Ok(()) => Ok(Some(())),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a snapshot tells, in order.
enum Told<'a> {
    Start { unix_ns: u64, tiers: [Option<TierId>; TierTable::MAX] },
    Row(RowMark),
    Part(&'a [u8]),
    RowEnd,
}

/// Reads a whole snapshot and hands out what it tells.
fn read(
    input: impl Read,
    tiers: &TierTable,
    each: &mut dyn FnMut(Told<'_>) -> Result<(), ImageError>,
) -> Result<(), SnapshotError> {
    let mut sections = Sections::begin(input)?;
    let (mut rows, mut parts) = (0u64, None::<u64>);
    loop {
        let kind = sections.next()?;
        let section = sections.number - 1;
        let payload = &sections.payload[..];
        let mut reader = Reader::new(payload);
        let mut told = || {
            match (kind, &mut parts) {
                (START, None) if section == 0 => {
                    let (unix_ns, tiers) = start(&mut reader, tiers)?;
                    each(Told::Start { unix_ns, tiers })?;
                }
                (ROW, parts @ None) if section > 0 => {
                    *parts = Some(0);
                    rows += 1;
                    each(Told::Row(RowMark::decode(payload)?))?;
                }
                (ROW_PART, Some(parts)) => {
                    *parts += 1;
                    each(Told::Part(payload))?;
                }
                (ROW_END, Some(_)) => {
                    if Some(reader.u64()?) != parts.take() {
                        return Err(ImageError::Inconsistent("the number of parts"));
                    }
                    reader.end()?;
                    each(Told::RowEnd)?;
                }
                (END, None) if section > 0 => {
                    if (reader.u64()?, reader.u64()?) != (rows, section + 1) {
                        return Err(ImageError::Inconsistent("the number of rows and sections"));
                    }
                    reader.end()?;
                    return Ok(true);
                }
                _ => return Err(ImageError::Inconsistent("the order of sections")),
            }
            Ok(false)
        };
        if told().map_err(|why| SnapshotError::Inconsistent { section, why })? {
            break;
        }
    }
    match sections.input.read(&mut [0])? {
        0 => Ok(()),
        // Two files in one, or a longer one that was overwritten.
        _ => Err(SnapshotError::Damaged(sections.number)),
    }
}

type Tiers = [Option<TierId>; TierTable::MAX];

fn start(reader: &mut Reader<'_>, tiers: &TierTable) -> Result<(u64, Tiers), ImageError> {
    let unix_ns = reader.u64()?;
    let count = reader.count(4)?;
    if count > TierTable::MAX {
        return Err(ImageError::Inconsistent("the number of tiers"));
    }
    let mut known = Tiers::default();
    let other = tiers.name(TierId(TierTable::MAX as u8 - 1));
    let mut before = "";
    for at in 0..count {
        let name = reader.text()?;
        // Numbers that were not given out yet are called so, and so is the last one that was.
        let given = *name != *other || (at + 1 == TierTable::MAX && *before != *other);
        before = name;
        if !given {
            continue;
        }
        let id = tiers.id(Some(name));
        if !known.contains(&Some(id)) {
            known[at] = Some(id);
        }
    }
    reader.end()?;
    Ok((unix_ns, known))
}

/// What was loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// When the snapshot was begun, nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Rows restored.
    pub rows: usize,
    /// Engine blocks that they hold.
    pub blocks: u64,
    /// Rows left out, and why.
    pub refused: Vec<(RowId, String)>,
}

/// Restores the rows of a snapshot into a fleet that has none of them. Nothing else may write to its
/// index meanwhile.
///
/// # Errors
///
/// [`SnapshotError`]; then the fleet is as it was.
pub fn load(
    mut input: impl Read + Seek,
    fleet: &Fleet,
    models: &Models,
    tiers: &TierTable,
) -> Result<Loaded, SnapshotError> {
    let from = input.stream_position()?;
    let mut anchors = Anchors::default();
    // Names of tiers are not given out for a file that is then refused.
    let scratch = TierTable::default();
    read(io::BufReader::with_capacity(PART, &mut input), &scratch, &mut |told| match told {
        Told::Part(part) => anchors.note(part),
        _ => Ok(()),
    })?;
    input.seek(SeekFrom::Start(from))?;

    let mut loaded = Loaded::default();
    let mut names = Tiers::default();
    let mut current: Option<(RowMark, Result<ImageBuilder, String>)> = None;
    let done = read(io::BufReader::with_capacity(PART, &mut input), tiers, &mut |told| {
        match told {
            Told::Start { unix_ns, tiers } => (loaded.unix_ns, names) = (unix_ns, tiers),
            Told::Row(mark) => {
                let builder = suits(&mark, models).map(|()| ImageBuilder::default());
                current = Some((mark, builder));
            }
            Told::Part(part) => {
                if let Some((_, Ok(builder))) = &mut current {
                    builder.add(part)?;
                }
            }
            Told::RowEnd => match current.take() {
                Some((mark, Ok(builder))) => {
                    let mut image = builder.finish();
                    image.renumber(&names)?;
                    let id = mark.id.clone();
                    match restore(mark, &image, fleet, models, &mut anchors)? {
                        Ok(()) => {
                            loaded.rows += 1;
                            loaded.blocks += image.blocks();
                        }
                        Err(why) => loaded.refused.push((id, why)),
                    }
                }
                Some((mark, Err(why))) => loaded.refused.push((mark.id, why)),
                None => {}
            },
        }
        Ok(())
    });
    if let Err(error) = done {
        fleet.drop_unclaimed(|_| true);
        return Err(error);
    }
    Ok(loaded)
}

/// Do its request keys mean here what they meant there?
fn suits(mark: &RowMark, models: &Models) -> Result<(), String> {
    let here = models.scheme(models.canonical(&mark.model));
    if *models.canonical(&mark.model) != *mark.model {
        return Err(format!("model {} has another name here", mark.model));
    }
    if here.fingerprint() != mark.fingerprint {
        return Err(format!(
            "its block keys were made with other settings: model {} has fingerprint {:#018x} here \
             and {:#018x} in the snapshot (algorithm, seed and block size)",
            mark.model,
            here.fingerprint(),
            mark.fingerprint,
        ));
    }
    Ok(())
}

/// Makes the row. The inner error leaves it out, the outer one ends the load.
fn restore(
    mark: RowMark,
    image: &RowImage,
    fleet: &Fleet,
    models: &Models,
    anchors: &mut Anchors,
) -> Result<Result<(), String>, ImageError> {
    let scheme = models.scheme(&mark.model);
    let row = fleet.add(mark.id.clone(), &mark.endpoint, scheme, &mark.model, CountMode::Counted);
    let Some(row) = row else {
        return Ok(Err("there is no room for it, or it is there already".to_owned()));
    };
    match fleet.index().restore(row.slot, image, anchors) {
        Ok(()) => {}
        Err(ImageError::Full) => {
            fleet.remove(row.slot);
            return Ok(Err(ImageError::Full.to_string()));
        }
        Err(error) => {
            fleet.remove(row.slot);
            return Err(error);
        }
    }
    if mark.muted {
        fleet.index().set_muted(row.slot, true);
    }
    row.update(|status| {
        status.state = PodState::Replaying;
        "restored from a snapshot".clone_into(&mut status.reason);
        // Until its engine has been heard, what it evicted since is not known.
        status.stale = true;
        status.restored = true;
        status.capped = mark.capped;
    });
    row.applied(mark.epoch, mark.sequence, unix_ns());
    fleet.keep(&row, mark);
    Ok(Ok(()))
}
