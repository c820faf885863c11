//! Blocks that a pod will have as soon as it has computed a prompt that was just sent to it.
//!
//! # Model
//!
//! Every routed request makes entries of its own, so that concurrent requests do not shorten each
//! other. An entry is extended at half its time to live for as long as the response has not started;
//! it is taken back if the request fails before that. Otherwise it ends by itself, and events are to
//! have confirmed it.
//!
//! # What is counted
//!
//! `made`, or `refused` by the index. Of those made: `taken_back`; `confirmed` if, at the tick after the
//! response ended, events alone say that the pod holds more of the prompt than when it was picked;
//! `expired` if they do not; `unchecked` if it could not be found out: the index gave no answer, or
//! more than [`CHECKS`] responses ended within a tick.

use std::{
    collections::HashSet,
    slice,
    sync::{Arc, Mutex},
    time::Duration,
};

use prometheus::{IntCounter, IntCounterVec};

use crate::{
    epp::{
        datalayer::Endpoint,
        precise::{PrefixIndex, Query, SpeculationId},
    },
    support::sync::lock,
};

/// Entries that are looked up in one tick, so that counting costs little beside scoring.
pub(super) const CHECKS: usize = 64;
/// Shortest time between ticks.
const LEAST_TICK: Duration = Duration::from_millis(10);

/// The entries of all requests on their way.
#[derive(Debug)]
pub(super) struct Speculation {
    index: Arc<dyn PrefixIndex>,
    ttl: Duration,
    /// Entries whose response has not started.
    pending: Mutex<HashSet<SpeculationId>>,
    /// Claims whose response has ended since the last tick.
    ended: Mutex<Vec<Claim>>,
    outcomes: Outcomes,
}

#[derive(Debug)]
struct Outcomes {
    made: IntCounter,
    refused: IntCounter,
    taken_back: IntCounter,
    confirmed: IntCounter,
    expired: IntCounter,
    unchecked: IntCounter,
}

/// What an entry says.
#[derive(Debug)]
struct Claim {
    query: Query,
    endpoint: Arc<Endpoint>,
    /// Blocks that events had confirmed before.
    confirmed: u32,
}

/// One entry of a request. Taken back when dropped before its response has started.
#[derive(Debug)]
pub(super) struct Entry {
    speculation: Arc<Speculation>,
    id: SpeculationId,
    claim: Option<Claim>,
    open: bool,
}

impl Speculation {
    /// `outcomes` has one label, the outcome.
    pub(super) fn new(
        index: Arc<dyn PrefixIndex>,
        ttl: Duration,
        outcomes: &IntCounterVec,
    ) -> Self {
        let of = |outcome| outcomes.with_label_values(&[outcome]);
        Self {
            index,
            ttl,
            pending: Mutex::default(),
            ended: Mutex::default(),
            outcomes: Outcomes {
                made: of("made"),
                refused: of("refused"),
                taken_back: of("taken_back"),
                confirmed: of("confirmed"),
                expired: of("expired"),
                unchecked: of("unchecked"),
            },
        }
    }

    /// The endpoint will hold the blocks, of which events have confirmed `confirmed`.
    pub(super) fn claim(
        self: &Arc<Self>,
        query: &Query,
        endpoint: &Arc<Endpoint>,
        confirmed: u32,
    ) -> Option<Entry> {
        let Some(id) = self.index.speculate(query, endpoint, self.ttl) else {
            self.outcomes.refused.inc();
            return None;
        };
        self.outcomes.made.inc();
        lock(&self.pending).insert(id);
        let claim = Claim { query: query.clone(), endpoint: Arc::clone(endpoint), confirmed };
        Some(Entry { speculation: Arc::clone(self), id, claim: Some(claim), open: true })
    }

    /// Time between ticks.
    pub(super) fn tick_interval(&self) -> Duration {
        (self.ttl / 2).max(LEAST_TICK)
    }

    /// Extends what is pending and finds out what became of what has ended.
    pub(super) async fn tick(&self) {
        {
            // Under the lock, so that no entry is extended after it was taken back.
            let pending = lock(&self.pending);
            pending.iter().for_each(|&id| self.index.extend(id, self.ttl));
        }
        let ended = std::mem::take(&mut *lock(&self.ended));
        for Claim { query, endpoint, confirmed } in ended {
            let rows = self.index.score(&query, slice::from_ref(&endpoint)).await;
            match rows.ok().and_then(|rows| rows.first().copied()) {
                None => self.outcomes.unchecked.inc(),
                Some(row) if row.confirmed > confirmed => self.outcomes.confirmed.inc(),
                Some(_) => self.outcomes.expired.inc(),
            }
        }
    }
}

impl Entry {
    /// The prompt has been computed: the entry ends by itself.
    pub(super) fn started(&mut self) {
        if std::mem::take(&mut self.open) {
            lock(&self.speculation.pending).remove(&self.id);
        }
    }

    /// The request failed, or its response is complete.
    pub(super) fn ended(&mut self, failed: bool) {
        let Some(claim) = self.claim.take() else { return };
        if failed {
            return self.take_back();
        }
        self.started();
        let mut ended = lock(&self.speculation.ended);
        if ended.len() < CHECKS {
            ended.push(claim);
        } else {
            self.speculation.outcomes.unchecked.inc();
        }
    }

    fn take_back(&mut self) {
        self.started();
        self.speculation.index.take_back(self.id);
        self.speculation.outcomes.taken_back.inc();
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        match self.claim.take() {
            Some(_) if self.open => self.take_back(),
            // Nobody told how it ended.
            Some(_) => self.speculation.outcomes.unchecked.inc(),
            None => {}
        }
    }
}
