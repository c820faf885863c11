//! One event: array form (vLLM up to 0.23, SGLang up to 0.5.19) or map form (later), decided by
//! the msgpack type of each event.
//!
//! Model: positions of the array form are fields in the order in which vLLM added them, so a
//! shorter array is an older engine and a longer one a newer; unknown tails and unknown keys are
//! passed over. A map may have its keys, the tag too, in any order.

mod field;

use self::field::{Field, Tag};
use super::batch::Scratch;
use super::extra::{self, ExtraFault, Validated};
use super::msgpack::{Cursor, Fault, Kind, MAX_DEPTH};
use super::{BlockRemoved, BlockStored, Event, EventError, Limits};
use crate::model::EngineKey;

/// Bytes of an unknown tag that an error keeps.
const TAG_BYTES: usize = 32;

/// Decodes the event at `at`, which is number `event` of its batch. Returns it with the offset
/// where it ends. `at` must stand on a value that a skip has validated.
#[inline]
pub(super) fn decode<'s>(
    at: Cursor<'s>,
    event: usize,
    limits: &Limits,
    scratch: &'s mut Scratch,
) -> Result<(Event<'s>, usize), EventError> {
    scratch.hashes.clear();
    scratch.tokens.clear();
    let mut decoder =
        Decoder { at, start: at, event, limits, seen: 0, fields: BlockStored::default() };
    let tag = match at.kind() {
        Ok(Kind::Array) => decoder.array_form(scratch)?,
        Ok(Kind::Map) => decoder.map_form(scratch)?,
        Ok(other) => return Err(EventError::NotAnEvent { event, found: other.as_str() }),
        Err(fault) => return Err(decoder.fault(Field::Type, fault)),
    };
    let end = decoder.at.offset();
    decoder.finish(tag, scratch).map(|event| (event, end))
}

struct Decoder<'s, 'l> {
    at: Cursor<'s>,
    /// Where the event starts.
    start: Cursor<'s>,
    event: usize,
    limits: &'l Limits,
    /// Bits of the fields read so far.
    seen: u16,
    /// Everything but the slices, which stay in the scratch space until the end.
    fields: BlockStored<'s>,
}

impl<'s> Decoder<'s, '_> {
    fn array_form(&mut self, scratch: &mut Scratch) -> Result<Tag, EventError> {
        let event = self.event;
        let elements = self.at.array().map_err(|fault| self.fault(Field::Type, fault))?;
        let Some(mut left) = elements.checked_sub(1) else {
            return Err(EventError::MissingTag { event });
        };
        let tag = self.tag()?;
        for &field in tag.positions().iter().take(left) {
            left -= 1;
            // SGLang 0.5.18 and 0.5.19 end a salted store with a map where vLLM has the name.
            if field == Field::LoraName && self.at.kind() == Ok(Kind::Map) {
                self.metadata()?;
                continue;
            }
            self.seen |= field.bit();
            self.field(field, scratch)?;
        }
        self.skip(left, Field::Type)?;
        Ok(tag)
    }

    fn map_form(&mut self, scratch: &mut Scratch) -> Result<Tag, EventError> {
        let mut left = self.at.map().map_err(|fault| self.fault(Field::Type, fault))?;
        let tag = if left > 0 && self.key()? == Some(Field::Type) {
            left -= 1;
            self.seen = Field::Type.bit();
            self.tag()?
        } else {
            self.find_tag()?
        };
        for _ in 0..left {
            let Some(field) = self.key()? else {
                self.skip(1, Field::Type)?;
                continue;
            };
            if self.seen & field.bit() != 0 {
                return Err(EventError::DuplicateKey { event: self.event, field: field.name() });
            }
            self.seen |= field.bit();
            if tag.has(field) && field != Field::Type {
                self.field(field, scratch)?;
            } else {
                self.skip(1, field)?;
            }
        }
        Ok(tag)
    }

    /// The tag of a map that does not start with it. Goes back to the first pair.
    #[cold]
    fn find_tag(&mut self) -> Result<Tag, EventError> {
        self.at = self.start;
        let pairs = self.at.map().map_err(|fault| self.fault(Field::Type, fault))?;
        let first = self.at;
        for _ in 0..pairs {
            if self.key()? == Some(Field::Type) {
                let tag = self.tag()?;
                self.at = first;
                return Ok(tag);
            }
            self.skip(1, Field::Type)?;
        }
        Err(EventError::MissingTag { event: self.event })
    }

    /// Reads a map's key; `None` if we do not know it, or if it is not even a string.
    #[inline(always)] // a map has a dozen: a call costs more than the common case
    fn key(&mut self) -> Result<Option<Field>, EventError> {
        match self.at.str_bytes() {
            Ok(key) => Ok(Field::from_key(key)),
            Err(fault) => self.odd_key(fault),
        }
    }

    #[cold]
    fn odd_key(&mut self, fault: Fault) -> Result<Option<Field>, EventError> {
        if !matches!(fault, Fault::Type { .. }) {
            return Err(self.fault(Field::Type, fault));
        }
        self.skip(1, Field::Type)?;
        Ok(None)
    }

    #[inline]
    fn tag(&mut self) -> Result<Tag, EventError> {
        let event = self.event;
        match self.at.str_bytes() {
            Ok(b"BlockStored") => Ok(Tag::Stored),
            Ok(b"BlockRemoved") => Ok(Tag::Removed),
            Ok(b"AllBlocksCleared") => Ok(Tag::Cleared),
            Ok(other) => {
                let kept = other.get(..TAG_BYTES).unwrap_or(other);
                let tag = String::from_utf8_lossy(kept).into_owned().into_boxed_str();
                Err(EventError::UnknownTag { event, tag })
            }
            Err(Fault::Type { found, .. }) => {
                Err(EventError::TagType { event, found: found.as_str() })
            }
            Err(fault) => Err(self.fault(Field::Type, fault)),
        }
    }

    /// Reads one field's value.
    #[inline]
    fn field(&mut self, field: Field, scratch: &mut Scratch) -> Result<(), EventError> {
        match field {
            Field::BlockHashes => self.hashes(&mut scratch.hashes)?,
            Field::TokenIds => self.tokens(&mut scratch.tokens)?,
            Field::Parent => {
                self.fields.parent =
                    if self.at.take_nil() { None } else { Some(self.hash(field)?) };
            }
            Field::BlockSize => self.fields.block_size = self.u32(field)?,
            Field::LoraId => self.fields.lora_id = self.optional(|this| this.u64(field))?,
            Field::Medium => self.fields.medium = self.optional(|this| this.text(field))?,
            Field::LoraName => self.fields.lora_name = self.optional(|this| this.text(field))?,
            Field::ExtraKeys => self.extra_keys()?,
            Field::Group => self.fields.group = self.optional(|this| this.u32(field))?,
            Field::Kind => self.fields.kind = self.optional(|this| this.text(field))?,
            Field::Window => {
                self.fields.sliding_window = self.optional(|this| this.u32(field))?;
            }
            Field::Locality => self.fields.locality = self.optional(|this| this.text(field))?,
            Field::CacheSalt => self.fields.cache_salt = self.optional(|this| this.text(field))?,
            Field::Type => self.skip(1, field)?,
        }
        Ok(())
    }

    /// SGLang's trailing map of a salted store.
    #[cold]
    fn metadata(&mut self) -> Result<(), EventError> {
        let pairs = self.at.map().map_err(|fault| self.fault(Field::CacheSalt, fault))?;
        for _ in 0..pairs {
            if self.key()? != Some(Field::CacheSalt) {
                self.skip(1, Field::CacheSalt)?;
                continue;
            }
            if self.seen & Field::CacheSalt.bit() != 0 {
                let field = Field::CacheSalt.name();
                return Err(EventError::DuplicateKey { event: self.event, field });
            }
            self.seen |= Field::CacheSalt.bit();
            self.fields.cache_salt = self.optional(|this| this.text(Field::CacheSalt))?;
        }
        Ok(())
    }

    #[inline]
    fn hashes(&mut self, hashes: &mut Vec<EngineKey>) -> Result<(), EventError> {
        let field = Field::BlockHashes;
        let count = self.at.array().map_err(|fault| self.fault(field, fault))?;
        if count > self.limits.blocks {
            let (event, limit) = (self.event, self.limits.blocks);
            return Err(EventError::TooManyBlocks { event, got: count, limit });
        }
        hashes.resize(count, EngineKey::default());
        let mut slots = hashes.as_mut_slice();
        loop {
            let read = self.at.fill_hashes(slots);
            let Some((slot, rest)) = slots.get_mut(read..).and_then(<[_]>::split_first_mut) else {
                return Ok(());
            };
            *slot = self.hash(field)?;
            slots = rest;
        }
    }

    /// One hash: an integer's bits, or the last 8 bytes of a byte string, big-endian.
    fn hash(&mut self, field: Field) -> Result<EngineKey, EventError> {
        let offset = self.at.offset();
        if self.at.kind() != Ok(Kind::Bin) {
            let hash = self.at.int().map_err(|fault| self.fault(field, fault))?;
            return Ok(EngineKey(hash.bits()));
        }
        let bytes = self.at.bin().map_err(|fault| self.fault(field, fault))?;
        if bytes.is_empty() {
            return Err(EventError::EmptyHash { event: self.event, field: field.name(), offset });
        }
        let low = bytes.iter().skip(bytes.len().saturating_sub(8));
        Ok(EngineKey(low.fold(0, |hash, &byte| hash << 8 | u64::from(byte))))
    }

    #[inline]
    fn tokens(&mut self, tokens: &mut Vec<u32>) -> Result<(), EventError> {
        let count = self.at.array().map_err(|fault| self.fault(Field::TokenIds, fault))?;
        if count > self.limits.tokens {
            let (event, limit) = (self.event, self.limits.tokens);
            return Err(EventError::TooManyTokens { event, got: count, limit });
        }
        tokens.resize(count, 0);
        let mut slots = tokens.as_mut_slice();
        loop {
            let read = self.at.fill_u32(slots);
            let Some((slot, rest)) = slots.get_mut(read..).and_then(<[_]>::split_first_mut) else {
                return Ok(());
            };
            *slot = self.token()?;
            slots = rest;
        }
    }

    /// One token of an unusual form: another width, or the first element of an EAGLE pair.
    fn token(&mut self) -> Result<u32, EventError> {
        let event = self.event;
        let offset = self.at.offset();
        let mut followers = 0;
        if self.at.kind() == Ok(Kind::Array) {
            let elements = self.at.array().map_err(|fault| self.fault(Field::TokenIds, fault))?;
            followers = elements.checked_sub(1).ok_or(EventError::Token {
                event,
                offset,
                found: "an empty array",
            })?;
        }
        let token = match self.at.int() {
            Ok(token) => token,
            Err(Fault::Type { found, .. }) => {
                return Err(EventError::Token { event, offset, found: found.as_str() });
            }
            Err(fault) => return Err(self.fault(Field::TokenIds, fault)),
        };
        self.skip(followers, Field::TokenIds)?;
        token.to_u32().ok_or(EventError::Token { event, offset, found: "out of range" })
    }

    #[inline]
    fn extra_keys(&mut self) -> Result<(), EventError> {
        if self.at.take_nil() {
            return Ok(());
        }
        let Validated { keys, any } =
            extra::validate(&mut self.at).map_err(|fault| self.extra_fault(fault))?;
        // Kept even if every block's is nil, until the number of blocks is known.
        self.fields.extra_keys = Some(keys);
        if any {
            self.seen |= HAS_EXTRA;
        }
        Ok(())
    }

    #[inline]
    fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, EventError>,
    ) -> Result<Option<T>, EventError> {
        if self.at.take_nil() { Ok(None) } else { read(self).map(Some) }
    }

    #[inline]
    fn text(&mut self, field: Field) -> Result<&'s str, EventError> {
        let bytes = self.at.str_bytes().map_err(|fault| self.fault(field, fault))?;
        std::str::from_utf8(bytes)
            .map_err(|_| EventError::Utf8 { event: self.event, field: field.name() })
    }

    #[inline]
    fn u64(&mut self, field: Field) -> Result<u64, EventError> {
        let offset = self.at.offset();
        let int = self.at.int().map_err(|fault| self.fault(field, fault))?;
        int.to_u64().ok_or(EventError::FieldRange {
            event: self.event,
            field: field.name(),
            offset,
        })
    }

    #[inline]
    fn u32(&mut self, field: Field) -> Result<u32, EventError> {
        let offset = self.at.offset();
        let value = self.u64(field)?;
        u32::try_from(value).map_err(|_| EventError::FieldRange {
            event: self.event,
            field: field.name(),
            offset,
        })
    }

    #[inline]
    fn skip(&mut self, values: usize, field: Field) -> Result<(), EventError> {
        self.at.skip_values(values, MAX_DEPTH).map_err(|fault| self.fault(field, fault))
    }

    /// Checks what only the whole event can tell, and puts it together.
    #[inline]
    fn finish(mut self, tag: Tag, scratch: &'s Scratch) -> Result<Event<'s>, EventError> {
        match tag {
            Tag::Cleared => Ok(Event::Cleared),
            Tag::Removed => {
                self.require(Field::BlockHashes)?;
                Ok(Event::Removed(BlockRemoved {
                    block_hashes: &scratch.hashes,
                    medium: self.fields.medium,
                    group: self.fields.group,
                    locality: self.fields.locality,
                }))
            }
            Tag::Stored => {
                self.require(Field::BlockHashes)?;
                self.require(Field::TokenIds)?;
                self.require(Field::BlockSize)?;
                if let Some(keys) = &self.fields.extra_keys {
                    self.check_extra(keys.len(), scratch)?;
                    if self.seen & HAS_EXTRA == 0 {
                        self.fields.extra_keys = None;
                    }
                }
                Ok(Event::Stored(BlockStored {
                    block_hashes: &scratch.hashes,
                    tokens: &scratch.tokens,
                    ..self.fields
                }))
            }
        }
    }

    #[inline]
    fn require(&self, field: Field) -> Result<(), EventError> {
        if self.seen & field.bit() == 0 {
            return Err(EventError::MissingField { event: self.event, field: field.name() });
        }
        Ok(())
    }

    /// On a dense event, extra keys are per block. On a sparse one or a placeholder nobody can
    /// tell which block a list belongs to, so any number may stand.
    #[inline]
    fn check_extra(&self, got: usize, scratch: &Scratch) -> Result<(), EventError> {
        let blocks = scratch.hashes.len();
        let tokens = scratch.tokens.len() as u64;
        let dense = tokens != 0 && tokens == blocks as u64 * u64::from(self.fields.block_size);
        if dense && got != blocks {
            return Err(EventError::ExtraKeysLength { event: self.event, got, blocks });
        }
        Ok(())
    }

    #[cold]
    fn fault(&self, field: Field, fault: Fault) -> EventError {
        let event = self.event;
        match fault {
            Fault::Type { offset, found } => {
                EventError::FieldType { event, field: field.name(), offset, found: found.as_str() }
            }
            Fault::Truncated { offset }
            | Fault::Reserved { offset }
            | Fault::TooDeep { offset } => EventError::Malformed { event, offset },
        }
    }

    #[cold]
    fn extra_fault(&self, fault: ExtraFault) -> EventError {
        let (event, field) = (self.event, Field::ExtraKeys.name());
        match fault {
            ExtraFault::Shape(fault) => self.fault(Field::ExtraKeys, fault),
            ExtraFault::TooMany { got, limit } => EventError::TooManyExtras { event, got, limit },
            ExtraFault::Utf8 => EventError::Utf8 { event, field },
            ExtraFault::Offset { offset } => EventError::FieldRange { event, field, offset },
        }
    }
}

/// Bit of [`Decoder::seen`] for extra keys of which at least one block's is not nil.
const HAS_EXTRA: u16 = 1 << 15;
