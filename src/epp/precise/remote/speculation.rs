//! Speculative entries: our numbers for them, and the service's handles.
//!
//! # Model
//!
//! An entry is *asked* for until the service has given it a handle; what is to become of it meanwhile
//! is kept, and done then. It is forgotten when its time is up, for then it ends there by itself, and
//! all are when the connection ends: they cannot be reached any more, and end with their time.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    epp::precise::{Query, SpeculationId},
    proto::kvindexer as pb,
};

/// Commands that may wait for the connection.
pub(super) const QUEUE: usize = 1024;

/// Entries alive at most.
pub(super) const MAX_OPEN: usize = 65_536;

/// What is to be done about an entry.
#[derive(Clone, Debug)]
pub(super) enum Command {
    Add(Add),
    Extend { id: SpeculationId, until: Instant },
    TakeBack { id: SpeculationId },
}

/// A new entry.
#[derive(Clone, Debug)]
pub(super) struct Add {
    pub(super) id: SpeculationId,
    pub(super) query: Query,
    pub(super) pod: Arc<str>,
    pub(super) rank: Option<u32>,
    pub(super) until: Instant,
}

/// A call that changes an entry.
pub(super) type Change = pb::UnspeculateRequest;

#[derive(Clone, Copy, Debug)]
enum Entry {
    Asked { until: Instant, then: Option<Then> },
    Held { until: Instant, handle: u64 },
}

/// What is to become of an entry that has no handle yet.
#[derive(Clone, Copy, Debug)]
enum Then {
    Extend(Instant),
    TakeBack,
}

/// The entries of one connection.
#[derive(Debug)]
pub(super) struct Ledger {
    entries: HashMap<SpeculationId, Entry>,
    /// Shared with callers, who count an entry before it is here.
    open: Arc<AtomicUsize>,
}

impl Ledger {
    pub(super) fn new(open: Arc<AtomicUsize>) -> Self {
        Self { entries: HashMap::new(), open }
    }

    /// An entry is being asked for.
    pub(super) fn asked(&mut self, id: SpeculationId, until: Instant) {
        self.entries.insert(id, Entry::Asked { until, then: None });
    }

    /// The service has taken it; what to call next.
    pub(super) fn taken(&mut self, id: SpeculationId, handle: u64, now: Instant) -> Option<Change> {
        let Some(&Entry::Asked { until, then }) = self.entries.get(&id) else { return None };
        self.entries.insert(id, Entry::Held { until, handle });
        match then? {
            Then::Extend(until) => self.extend(id, until, now),
            Then::TakeBack => self.take_back(id),
        }
    }

    /// The service has not taken it.
    pub(super) fn refused(&mut self, id: SpeculationId) {
        self.remove(id);
    }

    /// An entry ends at `until` instead; what to call.
    pub(super) fn extend(
        &mut self,
        id: SpeculationId,
        until: Instant,
        now: Instant,
    ) -> Option<Change> {
        match self.entries.get_mut(&id)? {
            Entry::Held { until: known, handle } => {
                *known = until;
                Some(Change { handle: *handle, extend_ms: millis(until, now) })
            }
            Entry::Asked { then: Some(Then::TakeBack), .. } => None,
            Entry::Asked { then, .. } => {
                *then = Some(Then::Extend(until));
                None
            }
        }
    }

    /// An entry ends now; what to call.
    pub(super) fn take_back(&mut self, id: SpeculationId) -> Option<Change> {
        match self.entries.get_mut(&id)? {
            Entry::Held { handle, .. } => {
                let change = Change { handle: *handle, extend_ms: 0 };
                self.remove(id);
                Some(change)
            }
            Entry::Asked { then, .. } => {
                *then = Some(Then::TakeBack);
                None
            }
        }
    }

    /// Forgets entries whose time is up. One without an answer gets one soon.
    pub(super) fn expire(&mut self, now: Instant) {
        let before = self.entries.len();
        self.entries.retain(|_, entry| match entry {
            Entry::Asked { .. } => true,
            Entry::Held { until, .. } => *until > now,
        });
        self.open.fetch_sub(before - self.entries.len(), Ordering::Relaxed);
    }

    fn remove(&mut self, id: SpeculationId) {
        if self.entries.remove(&id).is_some() {
            self.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Room for one more entry, which is taken thereby.
pub(super) fn reserve(open: &AtomicUsize) -> bool {
    let more = |open| (open < MAX_OPEN).then_some(open + 1);
    open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
}

/// Milliseconds from `now`, at least one, since none means now.
pub(super) fn millis(until: Instant, now: Instant) -> u32 {
    let left: Duration = until.saturating_duration_since(now);
    u32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SpeculationId = SpeculationId(7);

    fn ledger() -> (Ledger, Arc<AtomicUsize>) {
        let open = Arc::new(AtomicUsize::new(0));
        assert!(reserve(&open));
        (Ledger::new(Arc::clone(&open)), open)
    }

    fn change(handle: u64, extend_ms: u32) -> Option<Change> {
        Some(Change { handle, extend_ms })
    }

    #[test]
    fn what_comes_before_the_handle_is_done_with_it() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let (mut ledger, open) = ledger();
        ledger.asked(ID, at(100));
        assert_eq!(ledger.extend(ID, at(300), now), None);
        assert_eq!(ledger.taken(ID, 42, at(50)), change(42, 250));
        assert_eq!(ledger.extend(ID, at(400), at(60)), change(42, 340));
        ledger.expire(at(399));
        assert_eq!(open.load(Ordering::Relaxed), 1);
        assert_eq!(ledger.take_back(ID), change(42, 0));
        assert_eq!(open.load(Ordering::Relaxed), 0);
        assert_eq!(ledger.take_back(ID), None);
        assert_eq!(ledger.extend(ID, at(500), now), None, "it is gone");

        assert!(reserve(&open));
        ledger.asked(ID, at(100));
        assert_eq!(ledger.take_back(ID), None);
        assert_eq!(ledger.extend(ID, at(300), now), None, "nothing revives it");
        assert_eq!(ledger.taken(ID, 43, now), change(43, 0));
        assert_eq!(open.load(Ordering::Relaxed), 0);
        assert_eq!(ledger.taken(ID, 44, now), None);
    }

    #[test]
    fn entries_end_by_themselves_and_by_refusal() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let (mut ledger, open) = ledger();
        ledger.asked(ID, at(100));
        ledger.expire(at(1000));
        assert_eq!(open.load(Ordering::Relaxed), 1, "its answer is to come");
        assert_eq!(ledger.taken(ID, 1, at(1000)), None);
        ledger.expire(at(1000));
        assert_eq!(open.load(Ordering::Relaxed), 0);
        assert!(reserve(&open));
        ledger.asked(ID, at(100));
        ledger.refused(ID);
        ledger.refused(ID);
        assert_eq!(open.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn entries_are_bounded() {
        let open = AtomicUsize::new(MAX_OPEN - 1);
        assert!(reserve(&open));
        assert!(!reserve(&open));
        assert_eq!(open.into_inner(), MAX_OPEN);
    }

    #[test]
    fn times_are_never_zero() {
        let now = Instant::now();
        assert_eq!(millis(now, now), 1);
        assert_eq!(millis(now + Duration::from_micros(1001), now), 2);
        assert_eq!(millis(now + Duration::from_secs(1 << 40), now), u32::MAX);
    }
}
