//! A batch: its header, found by skipping over the whole payload, and its events, one at a time.
//!
//! Model: `[timestamp, [event, …], rank]`. The rank comes last, so the header scan walks every
//! byte; while it does, it proves that the payload is well-formed msgpack within the limits and
//! that nothing follows it. Decoding an event can then only fail on what the event *means*, and
//! the next one is always found.
//!
//! Cost: two passes over the bytes (scan, decode). In steady state nothing is allocated: hashes
//! and tokens go to a [`Scratch`] that the caller keeps.

use super::event;
use super::msgpack::{Cursor, Fault, MAX_DEPTH};
use super::{DecodeError, Event, EventError, Limits};
use crate::model::EngineKey;

/// What a batch says about itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchHeader {
    /// When the publisher made the batch, in seconds since the Unix epoch by its clock. Finite.
    pub timestamp: f64,
    /// Data-parallel rank of the publisher. Absent when the batch has two elements (vLLM 0.9.0,
    /// SGLang up to 0.5.16) or nil (SGLang from 0.5.17).
    pub rank: Option<u32>,
    /// How many events the batch holds, at most [`Limits::events`].
    pub events: usize,
}

/// Reads the header of a batch and validates the whole payload.
///
/// # Errors
///
/// If the payload is over a limit, is not one well-formed msgpack value and nothing else, or is
/// not `[number, [...]]`, `[number, [...], nil or rank]` or a longer array that starts so.
pub fn header(payload: &[u8], limits: &Limits) -> Result<BatchHeader, DecodeError> {
    scan(payload, limits).map(|(header, _)| header)
}

/// Buffers that a [`BatchReader`] decodes into; keep one per thread or publisher and reuse it.
///
/// Grows to the largest event seen, which [`Limits`] bounds, and does not shrink.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) hashes: Vec<EngineKey>,
    pub(super) tokens: Vec<u32>,
}

/// The events of one validated batch, in their order.
#[derive(Clone, Debug)]
pub struct BatchReader<'a> {
    header: BatchHeader,
    limits: Limits,
    at: Cursor<'a>,
    /// Number of the event that comes next.
    next: usize,
}

impl<'a> BatchReader<'a> {
    /// Validates `payload` as [`header`] does, and stands before its first event.
    ///
    /// # Errors
    ///
    /// Those of [`header`].
    pub fn new(payload: &'a [u8], limits: &Limits) -> Result<Self, DecodeError> {
        let (header, at) = scan(payload, limits)?;
        Ok(Self { header, limits: limits.clone(), at, next: 0 })
    }

    /// What the batch says about itself.
    #[must_use]
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// Decodes the next event into `scratch`; `None` after the last. An event that fails takes
    /// nothing else with it: the call after it returns the event behind it.
    ///
    /// # Errors
    ///
    /// If the event is of an unknown type, breaks a rule of its type, or is over a limit.
    #[inline]
    pub fn next_event<'s>(
        &mut self,
        scratch: &'s mut Scratch,
    ) -> Option<Result<Event<'s>, EventError>>
    where
        'a: 's,
    {
        if self.next >= self.header.events {
            return None;
        }
        let number = self.next;
        self.next += 1;
        Some(match event::decode(self.at, number, &self.limits, scratch) {
            Ok((event, end)) => {
                self.at.advance_to(end);
                Ok(event)
            }
            Err(error) => {
                self.skip_failed();
                Err(error)
            }
        })
    }

    #[cold]
    fn skip_failed(&mut self) {
        // The scan has already skipped this value, so this cannot fail; if it did, no event after
        // it could be found either.
        if self.at.skip(MAX_DEPTH).is_err() {
            self.next = self.header.events;
        }
    }
}

/// The header, and a cursor at the first event.
fn scan<'a>(payload: &'a [u8], limits: &Limits) -> Result<(BatchHeader, Cursor<'a>), DecodeError> {
    if payload.len() > limits.payload_bytes {
        let (got, limit) = (payload.len(), limits.payload_bytes);
        return Err(DecodeError::PayloadSize { got, limit });
    }
    let depth = limits.depth.min(MAX_DEPTH);
    let broken = |fault| {
        // `skip` takes any type, so only the other faults reach this.
        DecodeError::from_fault(fault, depth, |offset, _| DecodeError::Malformed { offset })
    };
    let too_deep = |offset| broken(Fault::TooDeep { offset });

    let mut at = Cursor::new(payload);
    let within_batch = depth.checked_sub(1).ok_or_else(|| too_deep(0))?;
    let elements = at.array().map_err(|fault| {
        DecodeError::from_fault(fault, depth, |_, found| DecodeError::NotABatch { found })
    })?;
    let Some(rest) = elements.checked_sub(2) else {
        return Err(DecodeError::BatchLength { got: elements });
    };

    let timestamp = at.number().map_err(|fault| {
        DecodeError::from_fault(fault, depth, |_, found| DecodeError::Timestamp { found })
    })?;
    // An infinite one would make every later batch look late, a NaN none.
    if !timestamp.is_finite() {
        return Err(DecodeError::Timestamp { found: "not finite" });
    }

    let within_events = within_batch.checked_sub(1).ok_or_else(|| too_deep(at.offset()))?;
    let events = at.array().map_err(|fault| {
        DecodeError::from_fault(fault, depth, |_, found| DecodeError::Events { found })
    })?;
    if events > limits.events {
        return Err(DecodeError::TooManyEvents { got: events, limit: limits.events });
    }
    let first = at;
    at.skip_values(events, within_events).map_err(broken)?;

    let mut rank = None;
    if let Some(unknown) = rest.checked_sub(1) {
        rank = self::rank(&mut at, depth)?;
        at.skip_values(unknown, within_batch).map_err(broken)?;
    }
    if !at.rest().is_empty() {
        return Err(DecodeError::TrailingBytes { offset: at.offset(), bytes: at.rest().len() });
    }
    Ok((BatchHeader { timestamp, rank, events }, first))
}

fn rank(at: &mut Cursor<'_>, depth: usize) -> Result<Option<u32>, DecodeError> {
    if at.take_nil() {
        return Ok(None);
    }
    let offset = at.offset();
    let rank = at.int().map_err(|fault| {
        DecodeError::from_fault(fault, depth, |offset, found| DecodeError::Rank { offset, found })
    })?;
    match rank.to_u32() {
        Some(rank) => Ok(Some(rank)),
        None => Err(DecodeError::Rank { offset, found: "out of range" }),
    }
}
