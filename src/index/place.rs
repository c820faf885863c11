//! Laying engine blocks over request blocks: from a parent's end to a child's place.
//!
//! Request blocks start at multiples of their size from the start of the prompt; engine blocks
//! start wherever their parent ended. An engine block therefore *contains* some request blocks
//! whole, may *complete* one that its ancestors began, and may *begin* one that its children will
//! complete. In the common case (equal sizes, aligned) it is exactly one whole block.

use std::mem;

use smallvec::SmallVec;
use xxhash_rust::xxh3;

use crate::{
    hash::Scheme,
    index::runs::Block,
    model::{ExtraKey, RequestKey},
};

/// Names a prefix that may end inside a request block: equal for equal tokens and extras.
pub(crate) type PrefixId = u64;

/// Prefixes that end inside a request block, each with the offset in it at which it does.
pub(crate) type Ends = SmallVec<[(PrefixId, u32); 2]>;

/// A request block that several engine blocks make up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Completed {
    pub(crate) key: RequestKey,
    /// First token of the request block.
    pub(crate) begin: u32,
    /// The prefixes that end inside it; that of its last engine block is the last.
    pub(crate) ends: Ends,
}

/// The unfinished request block at the end of a prefix; empty at a block boundary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tail {
    pub(crate) tokens: Vec<u32>,
    /// Hash inputs that touch the block so far, each once.
    pub(crate) extras: SmallVec<[Box<[u8]>; 1]>,
    /// The prefixes that end inside the block so far.
    pub(crate) ends: Ends,
}

impl Tail {
    /// Most bytes that a tail can take in blocks of `request` tokens filled `engine` at a time.
    pub(crate) fn most_bytes(request: u64, engine: u64) -> u64 {
        4 * request + size_of::<(PrefixId, u32)>() as u64 * request.div_ceil(engine)
    }

    fn bytes(&self) -> usize {
        let extras: usize = self.extras.iter().map(|extra| extra.len() + 16).sum();
        4 * self.tokens.len() + size_of::<(PrefixId, u32)>() * self.ends.len() + extras
    }
}

/// The end of a prefix, from which its children go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Tokens before this point.
    pub(crate) position: u32,
    /// Key of the last full request block, or the root.
    pub(crate) key: RequestKey,
    /// Where that block lies; absent for the root.
    pub(crate) at: Option<Block>,
    pub(crate) tail: Tail,
    /// Waits for block 0 to be complete.
    pub(crate) salt: Option<Box<[u8]>>,
}

/// What one engine block covers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Laid {
    /// Request blocks that lie inside it, in order.
    pub(crate) whole: SmallVec<[RequestKey; 1]>,
    /// The request block that its ancestors began and it completes.
    pub(crate) joint: Option<Completed>,
    /// The prefix that it leaves inside an unfinished request block.
    pub(crate) tail: Option<PrefixId>,
}

impl Laid {
    /// The request blocks that end inside it, in order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = RequestKey> + '_ {
        self.joint.iter().map(|joint| joint.key).chain(self.whole.iter().copied())
    }
}

impl Cursor {
    /// The start of a prompt.
    pub(crate) fn root(key: RequestKey, salt: Option<&str>) -> Self {
        let salt = salt.map(|salt| salt.as_bytes().into());
        Self { position: 0, key, at: None, tail: Tail::default(), salt }
    }

    /// Goes on over one engine block. `lora` is skipped where the engine repeats it in `extras`.
    pub(crate) fn advance(
        &mut self,
        scheme: &Scheme,
        tokens: &[u32],
        extras: &[ExtraKey<'_>],
        lora: Option<&str>,
        scratch: &mut Vec<u8>,
    ) -> Laid {
        let extras = match extras {
            [ExtraKey::Text(first), rest @ ..] if Some(*first) == lora => rest,
            all => all,
        };
        let size = scheme.block_size();
        let aligned = self.tail.tokens.is_empty() && tokens.len() == size as usize;
        if aligned && extras.is_empty() && self.salt.is_none() {
            self.position += size;
            self.key = scheme.next(self.key, tokens, &[], scratch);
            return Laid { whole: SmallVec::from_elem(self.key, 1), ..Laid::default() };
        }
        self.advance_slowly(scheme, tokens, extras.to_vec(), scratch)
    }

    /// Goes on over one engine block that is exactly one request block, from a block boundary.
    pub(crate) fn advance_one(
        &mut self,
        scheme: &Scheme,
        tokens: &[u32],
        extras: &[ExtraKey<'_>],
        lora: Option<&str>,
        scratch: &mut Vec<u8>,
    ) -> RequestKey {
        if extras.is_empty() && self.salt.is_none() {
            self.position += scheme.block_size();
            self.key = scheme.next(self.key, tokens, &[], scratch);
        } else {
            self.advance(scheme, tokens, extras, lora, scratch);
        }
        self.key
    }

    fn advance_slowly(
        &mut self,
        scheme: &Scheme,
        mut tokens: &[u32],
        mut extras: Vec<ExtraKey<'_>>,
        scratch: &mut Vec<u8>,
    ) -> Laid {
        let size = scheme.block_size();
        let start = self.position;
        if start == 0
            && let Some(at) = extras.iter().rposition(|extra| matches!(extra, ExtraKey::Text(_)))
            && let ExtraKey::Text(salt) = extras.remove(at)
        {
            // Block 0 lists the salt after the multimodal items; both are bare strings in some
            // versions, and then the last one is the salt.
            self.salt = Some(salt.as_bytes().into());
        }
        let mut laid = Laid::default();
        while !tokens.is_empty() {
            let begin = self.position / size * size;
            let take = tokens.len().min((begin + size - self.position) as usize);
            let (now, later) = tokens.split_at(take);
            tokens = later;
            self.tail.tokens.extend_from_slice(now);
            self.position += take as u32;
            self.taint(&extras, start);
            if self.position == begin + size {
                self.finish_block(scheme, start, begin, &mut laid, scratch);
            }
        }
        if !self.tail.tokens.is_empty() {
            let id = self.prefix_id();
            self.tail.ends.push((id, self.tail.tokens.len() as u32));
            laid.tail = Some(id);
        }
        laid
    }

    /// Adds the extras that touch the unfinished block. The engine says where an item starts and
    /// not where it ends, so it taints everything up to the end of its engine block.
    fn taint(&mut self, extras: &[ExtraKey<'_>], start: u32) {
        for extra in extras {
            let (bytes, from) = match *extra {
                ExtraKey::Text(text) => (text.as_bytes(), 0),
                ExtraKey::Item { id, offset } => (id.as_bytes(), offset.max(0)),
                ExtraKey::Bytes(bytes) => (bytes, 0),
            };
            let begins = i64::from(start).saturating_add(from);
            if begins < i64::from(self.position)
                && !self.tail.extras.iter().any(|known| **known == *bytes)
            {
                self.tail.extras.push(bytes.into());
            }
        }
    }

    fn finish_block(
        &mut self,
        scheme: &Scheme,
        start: u32,
        begin: u32,
        laid: &mut Laid,
        scratch: &mut Vec<u8>,
    ) {
        let tail = mem::take(&mut self.tail);
        let salt = if begin == 0 { self.salt.take() } else { None };
        let mut extras: SmallVec<[&[u8]; 4]> = tail.extras.iter().map(|e| &**e).collect();
        extras.extend(salt.as_deref());
        self.key = scheme.next(self.key, &tail.tokens, &extras, scratch);
        if begin >= start {
            laid.whole.push(self.key);
        } else {
            let mut ends = tail.ends;
            ends.push((self.key.0, scheme.block_size()));
            laid.joint = Some(Completed { key: self.key, begin, ends });
        }
    }

    fn prefix_id(&self) -> PrefixId {
        let mut input: Vec<u8> = bytemuck::cast_slice(&self.tail.tokens).to_vec();
        for extra in self.tail.extras.iter().map(|extra| &**extra).chain(self.salt.as_deref()) {
            input.extend_from_slice(&(extra.len() as u32).to_le_bytes());
            input.extend_from_slice(extra);
        }
        // Keeps tokens apart from extras, a salt from an equal extra, a tail from a full block.
        input.extend_from_slice(&(self.tail.tokens.len() as u32).to_le_bytes());
        input.push(u8::from(self.salt.is_some()));
        xxh3::xxh3_64_with_seed(&input, self.key.0)
    }
}

/// Where an engine block lies, and what it covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) start: u32,
    pub(crate) end: u32,
    /// Key of the last full request block at or before `end`, or the root.
    pub(crate) key: RequestKey,
    /// Where that block lies; absent for the root.
    pub(crate) at: Option<Block>,
    /// Absent in the common case: the block is exactly the whole request block `key`.
    pub(crate) odd: Option<Box<Odd>>,
}

/// What an engine block that is not exactly one request block covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Odd {
    pub(crate) whole: SmallVec<[RequestKey; 1]>,
    /// The prefix with which it completes a joint.
    pub(crate) head: Option<PrefixId>,
    /// The prefix that it leaves unfinished.
    pub(crate) tail: Option<PrefixId>,
    /// What its children need to go on.
    pub(crate) rest: Tail,
    pub(crate) salt: Option<Box<[u8]>>,
}

impl Place {
    /// The place that began at `start` and ends at `cursor`, and what it completes.
    pub(crate) fn new(start: u32, laid: Laid, cursor: &Cursor) -> (Self, Option<Completed>) {
        let simple = laid.joint.is_none()
            && laid.tail.is_none()
            && cursor.salt.is_none()
            && laid.whole.len() == 1;
        let odd = (!simple).then(|| {
            Box::new(Odd {
                whole: laid.whole,
                head: laid.joint.as_ref().map(|joint| joint.key.0),
                tail: laid.tail,
                rest: cursor.tail.clone(),
                salt: cursor.salt.clone(),
            })
        });
        (Self { start, end: cursor.position, key: cursor.key, at: cursor.at, odd }, laid.joint)
    }

    /// The place of an engine block that is exactly one request block of `size` tokens.
    pub(crate) fn simple(key: RequestKey, at: Block, number: u32, size: u32) -> Self {
        let start = number * size;
        Self { start, end: start + size, key, at: Some(at), odd: None }
    }

    pub(crate) fn whole(&self) -> &[RequestKey] {
        self.odd.as_ref().map_or(std::slice::from_ref(&self.key), |odd| &odd.whole)
    }

    /// The prefixes by which it takes part in joints.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = PrefixId> + use<> {
        let odd = self.odd.as_ref();
        let head = odd.and_then(|odd| odd.head);
        head.into_iter().chain(odd.and_then(|odd| odd.tail))
    }

    pub(crate) fn cursor(&self) -> Cursor {
        let (tail, salt) = self
            .odd
            .as_ref()
            .map_or_else(Default::default, |odd| (odd.rest.clone(), odd.salt.clone()));
        Cursor { position: self.end, key: self.key, at: self.at, tail, salt }
    }

    /// Equal tokens, extras and position? The prefix ids stand for them.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let tail = |place: &Self| place.odd.as_ref().and_then(|odd| odd.tail);
        (self.start, self.end, self.key, tail(self))
            == (other.start, other.end, other.key, tail(other))
    }

    pub(crate) fn odd_bytes(&self) -> u64 {
        self.odd
            .as_ref()
            .map_or(0, |odd| (size_of::<Odd>() + 8 * odd.whole.len() + odd.rest.bytes()) as u64)
    }
}
