//! What the sequencer remembers: live messages that wait, and hashes of those applied.

use std::collections::{BTreeMap, VecDeque};

use super::Message;

/// Live messages that wait for earlier ones, by sequence, bounded.
#[derive(Debug)]
pub(super) struct Held<P> {
    messages: BTreeMap<u64, Message<P>>,
    bytes: usize,
}

impl<P> Held<P> {
    pub(super) fn new() -> Self {
        Self { messages: BTreeMap::new(), bytes: 0 }
    }

    /// Keeps `message`; false when it does not fit.
    pub(super) fn insert(
        &mut self,
        message: Message<P>,
        max_messages: usize,
        max_bytes: usize,
    ) -> bool {
        let bytes = self.bytes.saturating_add(message.payload_bytes);
        if self.messages.len() >= max_messages || bytes > max_bytes {
            return false;
        }
        self.bytes = bytes;
        if let Some(replaced) = self.messages.insert(message.sequence, message) {
            self.bytes -= replaced.payload_bytes;
        }
        true
    }

    /// The payload hash at `sequence`.
    pub(super) fn hash(&self, sequence: u64) -> Option<u64> {
        self.messages.get(&sequence).map(|message| message.payload_hash)
    }

    /// Lowest sequence held.
    pub(super) fn first(&self) -> Option<u64> {
        self.messages.first_key_value().map(|(&sequence, _)| sequence)
    }

    /// Highest sequence held, and its timestamp.
    pub(super) fn last(&self) -> Option<(u64, f64)> {
        self.messages.last_key_value().map(|(&sequence, message)| (sequence, message.timestamp))
    }

    /// Newest timestamp held.
    pub(super) fn newest(&self) -> f64 {
        let timestamps = self.messages.values().map(|message| message.timestamp);
        timestamps.filter(|at| at.is_finite()).fold(f64::NEG_INFINITY, f64::max)
    }

    /// Takes the message with the lowest sequence.
    pub(super) fn pop(&mut self) -> Option<Message<P>> {
        let (_, message) = self.messages.pop_first()?;
        self.bytes -= message.payload_bytes;
        Some(message)
    }

    /// Forgets messages that are not newer than `timestamp`.
    pub(super) fn retain_newer(&mut self, timestamp: f64) {
        self.messages.retain(|_, message| message.timestamp > timestamp);
        self.bytes = self.messages.values().map(|message| message.payload_bytes).sum();
    }

    pub(super) fn clear(&mut self) {
        self.messages.clear();
        self.bytes = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Sequences and payload hashes of the last applied messages of one epoch, sequences ascending.
#[derive(Debug)]
pub(super) struct Window {
    entries: VecDeque<(u64, u64)>,
}

impl Window {
    /// Messages remembered. A publisher repeats itself, if ever, within one reconnect; 1 024
    /// batches are seconds to minutes of a busy engine and 16 KiB.
    pub(super) const LEN: usize = 1024;

    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new() }
    }

    pub(super) fn push(&mut self, sequence: u64, hash: u64) {
        if self.entries.len() == Self::LEN {
            self.entries.pop_front();
        }
        self.entries.push_back((sequence, hash));
    }

    pub(super) fn hash(&self, sequence: u64) -> Option<u64> {
        let at = self.entries.binary_search_by_key(&sequence, |&(known, _)| known).ok()?;
        self.entries.get(at).map(|&(_, hash)| hash)
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }
}
