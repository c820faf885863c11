//! What happened so far.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// Counts, shared by everybody.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    events: AtomicU64,
    faults: Mutex<BTreeMap<&'static str, u64>>,
}

impl Stats {
    pub(crate) fn events(&self, count: u64) {
        self.events.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn fault(&self, kind: &'static str) {
        *self.faults.lock().unwrap().entry(kind).or_default() += 1;
    }

    pub(crate) fn all_events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    pub(crate) fn all_faults(&self) -> u64 {
        self.faults.lock().unwrap().values().sum()
    }

    pub(crate) fn faults_by_kind(&self) -> String {
        let faults = self.faults.lock().unwrap();
        faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect::<Vec<_>>().join(", ")
    }
}
