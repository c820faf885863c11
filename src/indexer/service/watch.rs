//! `WatchPods`: every row once, then what changed.
//!
//! # Model
//!
//! A watcher remembers what it was last sent. At each wake-up of the fleet, but at most every
//! [`INTERVAL`], it compares that with the rows and queues the difference. The comparison runs only
//! after the queue has been taken, so a slow reader costs one entry a row and gets the newest
//! state, not each one in between.
//!
//! A *change* is anything but the fast counters (sequences, lag, blocks, orphans, rejected events),
//! which come along with the row that changed; `ListPods` has them at any time.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{
    indexer::{
        ScoreError,
        service::{Inner, answers::Answers, pods::status_of},
    },
    ingest::fleet::{Row, Table},
    model::RowId,
    proto::kvindexer as pb,
};

/// Time between two comparisons.
pub(super) const INTERVAL: Duration = Duration::from_millis(50);

/// The answers of one `WatchPods` call.
pub(super) fn watch(inner: Arc<Inner>) -> Answers<pb::PodStatus> {
    let stop = inner.stop.clone();
    let watcher = Watcher {
        changes: inner.fleet.changes(),
        sent: HashMap::new(),
        queue: VecDeque::new(),
        compared: None,
        inner,
    };
    Answers::new((watcher, false), move |(mut watcher, ended)| {
        let stop = stop.clone();
        async move {
            if ended {
                return None;
            }
            let next = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                next = watcher.next() => next,
            };
            Some(match next {
                Some(status) => (Ok(status), (watcher, false)),
                None => (Err(ScoreError::ShuttingDown.into()), (watcher, true)),
            })
        }
    })
}

#[derive(Debug)]
struct Watcher {
    inner: Arc<Inner>,
    changes: watch::Receiver<u64>,
    /// The row that was sent, and its status without fast counters.
    sent: HashMap<RowId, (Arc<Row>, pb::PodStatus)>,
    queue: VecDeque<pb::PodStatus>,
    /// Absent before the initial state.
    compared: Option<Instant>,
}

impl Watcher {
    /// The next row to send; `None` when the fleet has gone.
    async fn next(&mut self) -> Option<pb::PodStatus> {
        loop {
            if let Some(status) = self.queue.pop_front() {
                return Some(status);
            }
            let Some(compared) = self.compared else {
                self.initial();
                continue;
            };
            self.changes.changed().await.ok()?;
            tokio::time::sleep_until(compared + INTERVAL).await;
            self.changes.mark_unchanged();
            self.compare();
        }
    }

    fn initial(&mut self) {
        self.changes.mark_unchanged();
        self.compare();
        match self.queue.back_mut() {
            Some(last) => last.initial_end = true,
            None => self.queue.push_back(pb::PodStatus {
                initial_end: true,
                slot_table_version: self.inner.fleet.table().version,
                ..pb::PodStatus::default()
            }),
        }
    }

    /// Queues what differs from what was sent: removals first, so that a slot or a name that has a
    /// new owner is never held twice.
    fn compare(&mut self) {
        self.compared = Some(Instant::now());
        let table = self.inner.fleet.table();
        let queue = &mut self.queue;
        self.sent.retain(|_, (row, status)| {
            let kept = table.slot(row.slot).is_some_and(|now| Arc::ptr_eq(row, now));
            if !kept {
                queue.push_back(pb::PodStatus {
                    removed: true,
                    slot_table_version: table.version,
                    ..status.clone()
                });
            }
            kept
        });
        for row in &table.rows {
            let notable = notable(&table, row);
            match self.sent.get_mut(&row.id) {
                Some((_, sent)) if *sent == notable => continue,
                Some((_, sent)) => *sent = notable,
                None => {
                    self.sent.insert(row.id.clone(), (Arc::clone(row), notable));
                }
            }
            self.queue.push_back(self.inner.pod_status(&table, row));
        }
    }
}

/// The status of a row without what changes with every batch, nor the version of the table, which
/// changes with every registration of another row.
fn notable(table: &Table, row: &Row) -> pb::PodStatus {
    let progress = row.now();
    pb::PodStatus {
        applied_sequence: None,
        seen_sequence: None,
        lag_us: 0,
        orphans: 0,
        rejected_events: 0,
        slot_table_version: 0,
        ..status_of(table.version, row, progress, row.status(), None)
    }
}
