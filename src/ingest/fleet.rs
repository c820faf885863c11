//! The rows that the index knows, and what each row's answer can be trusted for.
//!
//! Written by ingest, read by the API. A reader takes one snapshot ([`Fleet::table`]) and works on
//! it: slots in it are the ones that the index answers with.
//!
//! # Which pod a slot names
//!
//! The index answers with slots, and a slot gets a new owner after its pod has gone. A lookup
//! therefore stands between two reads of the row table ([`Fleet::look_up`]): a match counts only if
//! both name the same row. A pod that is removed meanwhile is absent; one that takes its slot is not
//! credited.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::{
    hash::Scheme,
    index::{BlockIndex, Match, PodSpec},
    ingest::{loss::LossPolicy, snapshot::RowMark},
    model::{CountMode, PodSlot, PodState, RequestKey, RowId},
    support::{clock::unix_ns, sync::lock},
};

/// Visibility instants remembered per row for `WaitVisible`.
pub const VISIBLE_HISTORY: usize = 4096;

/// A publisher as declared: by configuration, a pods file, discovery or `RegisterPod`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodDeclaration {
    /// Name of the pod; the EPP matches endpoints by it.
    pub pod: String,
    /// `tcp://host:port` of the PUB socket, or `http://host:port` of the engine, which is asked;
    /// empty: the engine connects to our bound socket.
    pub endpoint: String,
    /// `tcp://host:port` of the replay socket.
    pub replay_endpoint: Option<String>,
    /// Model name; otherwise the topic's, otherwise what the engine's `/v1/models` names.
    pub model: Option<String>,
    /// Data-parallel rank; otherwise the batch's.
    pub rank: Option<u32>,
    /// Only topics with this prefix.
    pub topic_filter: String,
    /// `vllm`, `sglang` or empty: by content.
    pub engine: String,
    /// Version of the engine, for behaviour that the stream does not show.
    pub engine_version: Option<String>,
    /// Index streams of engines whose hashes are not chained (SGLang before 0.5.7).
    pub trust_unchained: bool,
    /// How stores and removals add up.
    pub count_mode: CountMode,
    /// The engine's block size. Accepted and without effect: every event that needs it carries it.
    pub block_size: Option<u32>,
    /// First sequence of a life of the engine.
    pub first_sequence: u64,
    /// What becomes of its blocks when events were lost; otherwise as configured for all.
    pub loss_policy: Option<LossPolicy>,
}

/// What a row is, fixed for its life.
#[derive(Debug)]
pub struct Row {
    /// Pod and rank.
    pub id: RowId,
    /// Number in the index and in compact answers.
    pub slot: PodSlot,
    /// Model that roots its request keys; empty while none is known (then nothing is indexed).
    pub model: Arc<str>,
    /// Where its events come from; empty: the engine connects to us.
    pub endpoint: Arc<str>,
    /// Hash settings of its model.
    pub scheme: Arc<Scheme>,
    status: Mutex<RowStatus>,
    /// State and stale overlay of `status`: every score asks for them of every row.
    trust: AtomicU8,
    applied: Mutex<Applied>,
    /// Told only while somebody listens: a batch is cheaper than waking nobody.
    progress: watch::Sender<Progress>,
}

#[derive(Debug)]
struct Applied {
    progress: Progress,
    /// Sequences and when they became visible, the last [`VISIBLE_HISTORY`].
    visible: VecDeque<(u64, u64)>,
}

/// How far a row's stream is applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Lives of the publisher noticed so far; starts at 1.
    pub epoch: u64,
    /// Last sequence that is visible to lookups.
    pub applied: Option<u64>,
}

/// What changes during a row's life, other than its [`Progress`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowStatus {
    /// Trust, without the stale overlay.
    pub state: PodState,
    /// Why it is partial or degraded; empty otherwise.
    pub reason: String,
    /// Overlay: disconnected, or traffic without events.
    pub stale: bool,
    /// The stream's connection is up. Always true for bind mode.
    pub connected: bool,
    /// Last sequence received, applied or not.
    pub seen: Option<u64>,
    /// From the newest applied batch's timestamp to its visibility, microseconds.
    pub lag_us: i64,
    /// Live messages received.
    pub messages: u64,
    /// Times that the connection was made again.
    pub reconnections: u64,
    /// Gaps noticed.
    pub gaps: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Blocks that ever waited for an unknown parent.
    pub orphans: u64,
    /// Events that were skipped because they could not be used.
    pub rejected_events: u64,
    /// Blocks that were refused because the index is at its cap.
    pub refused_blocks: u64,
    /// Some of them belong to what the engine holds now: none was forgotten since by a clear or a
    /// new life.
    pub capped: bool,
    /// Its blocks are from a snapshot, and no publisher has been declared for it yet.
    pub restored: bool,
    /// Wall clock of the last applied batch, nanoseconds since the Unix epoch; 0 = never.
    pub last_applied_unix_ns: u64,
}

const START: Progress = Progress { epoch: 1, applied: None };

impl RowStatus {
    /// May the score be lower than the engine's cache?
    #[must_use]
    pub fn may_undercount(&self) -> bool {
        self.stale || self.state != PodState::Live || self.capped
    }

    /// May the score be higher than the engine's cache?
    #[must_use]
    pub fn may_overcount(&self) -> bool {
        self.stale || self.state == PodState::Degraded
    }
}

/// The bit of the stale overlay beside the state's place in [`PodState::ALL`].
const STALE: u8 = 1 << 7;

fn packed(state: PodState, stale: bool) -> u8 {
    state as u8 | if stale { STALE } else { 0 }
}

impl Row {
    fn new(
        id: RowId,
        slot: PodSlot,
        endpoint: &str,
        scheme: &Arc<Scheme>,
        model: &Arc<str>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            slot,
            model: Arc::clone(model),
            endpoint: Arc::from(endpoint),
            scheme: Arc::clone(scheme),
            status: Mutex::default(),
            trust: AtomicU8::new(packed(PodState::default(), false)),
            applied: Mutex::new(Applied { progress: START, visible: VecDeque::new() }),
            progress: watch::Sender::new(START),
        })
    }

    /// A copy of the changing part.
    #[must_use]
    pub fn status(&self) -> RowStatus {
        lock(&self.status).clone()
    }

    /// State and stale overlay, without a lock.
    #[must_use]
    pub fn trust(&self) -> (PodState, bool) {
        let trust = self.trust.load(Ordering::Acquire);
        let state = PodState::ALL.get(usize::from(trust & !STALE)).copied();
        (state.unwrap_or_default(), trust & STALE != 0)
    }

    /// Changes the status in place.
    pub fn update(&self, change: impl FnOnce(&mut RowStatus)) {
        let mut status = lock(&self.status);
        change(&mut status);
        self.trust.store(packed(status.state, status.stale), Ordering::Release);
    }

    /// How far the stream is applied.
    #[must_use]
    pub fn now(&self) -> Progress {
        lock(&self.applied).progress
    }

    /// The same, with a way to wait for more.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        let applied = lock(&self.applied);
        let receiver = self.progress.subscribe();
        self.progress
            .send_if_modified(|told| std::mem::replace(told, applied.progress) != applied.progress);
        receiver
    }

    /// Announces that everything up to `sequence` is visible since `unix_ns`.
    pub fn applied(&self, epoch: u64, sequence: u64, unix_ns: u64) {
        let mut applied = lock(&self.applied);
        if applied.visible.len() == VISIBLE_HISTORY {
            applied.visible.pop_front();
        }
        applied.visible.push_back((sequence, unix_ns));
        self.announce(&mut applied, Progress { epoch, applied: Some(sequence) });
    }

    /// Announces a new life: nothing of the old one is visible any more.
    pub fn new_epoch(&self, epoch: u64) {
        let mut applied = lock(&self.applied);
        applied.visible.clear();
        self.announce(&mut applied, Progress { epoch, applied: None });
    }

    fn announce(&self, applied: &mut Applied, progress: Progress) {
        applied.progress = progress;
        // Under the lock, so that nobody can begin to listen in between and miss it.
        if self.progress.receiver_count() > 0 {
            self.progress.send_replace(progress);
        }
    }

    /// When `sequence` of the current epoch became visible, nanoseconds since the Unix epoch; 0 when
    /// it is not or older than the last [`VISIBLE_HISTORY`].
    #[must_use]
    pub fn visible_since(&self, sequence: u64) -> u64 {
        let visible = &lock(&self.applied).visible;
        if visible.front().is_none_or(|&(first, _)| sequence < first) {
            return 0;
        }
        // A sequence that never came (a hole) became visible with the next one that did.
        let at = visible.partition_point(|&(applied, _)| applied < sequence);
        visible.get(at).map_or(0, |&(_, ns)| ns)
    }
}

/// An immutable snapshot of the rows.
#[derive(Debug, Default)]
pub struct Table {
    /// In order of registration.
    pub rows: Vec<Arc<Row>>,
    /// Slots are dense, and every answer asks for as many as it names.
    by_slot: Vec<Option<Arc<Row>>>,
    by_pod: HashMap<Arc<str>, Vec<Arc<Row>>>,
    /// Changes with every registration and removal.
    pub version: u64,
}

impl Table {
    /// The row of a slot.
    #[must_use]
    pub fn slot(&self, slot: PodSlot) -> Option<&Arc<Row>> {
        self.by_slot.get(slot.0 as usize)?.as_ref()
    }

    /// The rows of a pod, by rank.
    #[must_use]
    pub fn pod(&self, pod: &str) -> &[Arc<Row>] {
        self.by_pod.get(pod).map_or(&[], Vec::as_slice)
    }

    fn new(rows: Vec<Arc<Row>>, version: u64) -> Self {
        let mut by_slot = Vec::new();
        for row in &rows {
            let at = row.slot.0 as usize;
            by_slot.resize(by_slot.len().max(at + 1), None);
            by_slot[at] = Some(Arc::clone(row));
        }
        let mut by_pod: HashMap<Arc<str>, Vec<Arc<Row>>> = HashMap::new();
        for row in &rows {
            by_pod.entry(Arc::clone(&row.id.pod)).or_default().push(Arc::clone(row));
        }
        for rows in by_pod.values_mut() {
            rows.sort_by_key(|row| row.id.rank);
        }
        Self { rows, by_slot, by_pod, version }
    }
}

/// The registry of rows.
#[derive(Debug)]
pub struct Fleet {
    index: Arc<dyn BlockIndex>,
    table: ArcSwap<Table>,
    writing: Mutex<()>,
    changes: watch::Sender<u64>,
    version: AtomicU64,
    /// Rows from a snapshot that no publisher has claimed yet.
    pub(super) restored: Mutex<HashMap<PodSlot, RowMark>>,
}

impl Fleet {
    /// An empty fleet over `index`.
    #[must_use]
    pub fn new(index: Arc<dyn BlockIndex>) -> Self {
        // Versions differ between processes, so that a router notices our restart.
        let version = (unix_ns() >> 12).max(1);
        Self {
            index,
            table: ArcSwap::from_pointee(Table { version, ..Table::default() }),
            writing: Mutex::new(()),
            changes: watch::Sender::new(0),
            version: AtomicU64::new(version),
            restored: Mutex::default(),
        }
    }

    /// The index that the slots refer to.
    #[must_use]
    pub fn index(&self) -> &Arc<dyn BlockIndex> {
        &self.index
    }

    /// The current rows.
    #[must_use]
    pub fn table(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// The rows of `model` in `table` that hold a prefix of `keys`, in slot order. `found` is
    /// overwritten and can be reused.
    pub fn look_up(
        &self,
        table: &Table,
        model: &str,
        keys: &[RequestKey],
        tiers: bool,
        found: &mut Vec<Match>,
    ) {
        self.index.lookup(keys, tiers, found);
        let after = self.table.load();
        found.retain(|found| {
            // The model is part of xxh3 keys. llm-d's algorithms let an adapter's name replace it,
            // and then pods of another base model hold equal keys.
            table.slot(found.slot).is_some_and(|row| {
                *row.model == *model
                    && (after.version == table.version
                        || after.slot(found.slot).is_some_and(|now| Arc::ptr_eq(row, now)))
            })
        });
    }

    /// Wakes at every registration, removal and state change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Tells watchers that some row's state changed.
    pub fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Adds a row; `None` when the index has no slot left, or there is a row of that identity.
    #[must_use]
    pub fn add(
        &self,
        id: RowId,
        endpoint: &str,
        scheme: &Arc<Scheme>,
        model: &Arc<str>,
        count_mode: CountMode,
    ) -> Option<Arc<Row>> {
        let _writing = lock(&self.writing);
        if self.table.load().rows.iter().any(|row| row.id == id) {
            return None;
        }
        let spec = PodSpec { scheme: Arc::clone(scheme), model: Arc::clone(model), count_mode };
        let slot = self.index.register(spec)?;
        let row = Row::new(id, slot, endpoint, scheme, model);
        let mut rows = self.table.load().rows.clone();
        rows.push(Arc::clone(&row));
        self.publish(rows);
        Some(row)
    }

    /// Does another row than `own` have this identity?
    #[must_use]
    pub fn is_taken(&self, id: &RowId, own: PodSlot) -> bool {
        self.table().pod(&id.pod).iter().any(|row| row.id.rank == id.rank && row.slot != own)
    }

    /// Puts a row in the place of one whose identity turned out to be another. It keeps slot, status
    /// and speculative marks. `None` when there is a row of that identity already.
    #[must_use]
    pub fn replace(
        &self,
        old: &Row,
        id: RowId,
        scheme: &Arc<Scheme>,
        model: &Arc<str>,
        count_mode: CountMode,
    ) -> Option<Arc<Row>> {
        let _writing = lock(&self.writing);
        let mut rows = self.table.load().rows.clone();
        if rows.iter().any(|row| row.id == id && row.slot != old.slot) {
            return None;
        }
        let spec = PodSpec { scheme: Arc::clone(scheme), model: Arc::clone(model), count_mode };
        self.index.respec(old.slot, spec);
        let row = Row::new(id, old.slot, &old.endpoint, scheme, model);
        row.update(|status| *status = old.status());
        rows.retain(|row| row.slot != old.slot);
        rows.push(Arc::clone(&row));
        self.publish(rows);
        Some(row)
    }

    /// Puts a row in the place of one that is heard from another address. It keeps everything else.
    pub(super) fn readdress(&self, old: &Row, endpoint: &str) -> Option<Arc<Row>> {
        let _writing = lock(&self.writing);
        let mut rows = self.table.load().rows.clone();
        let at = rows.iter_mut().find(|row| row.slot == old.slot)?;
        let row = Row::new(old.id.clone(), old.slot, endpoint, &old.scheme, &old.model);
        row.update(|status| *status = old.status());
        let Progress { epoch, applied } = old.now();
        match applied {
            Some(sequence) => row.applied(epoch, sequence, unix_ns()),
            None => row.new_epoch(epoch),
        }
        *at = Arc::clone(&row);
        self.publish(rows);
        Some(row)
    }

    /// Removes a row and its blocks. The slot leaves the table before the index frees it, so that
    /// no reader of the new table can meet its next owner under the old name.
    pub fn remove(&self, slot: PodSlot) {
        let _writing = lock(&self.writing);
        let mut rows = self.table.load().rows.clone();
        rows.retain(|row| row.slot != slot);
        self.publish(rows);
        self.index.unregister(slot);
    }

    fn publish(&self, rows: Vec<Arc<Row>>) {
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        self.table.store(Arc::new(Table::new(rows, version)));
        self.changed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{IndexConfig, naive::NaiveIndex};

    #[test]
    fn trust_is_that_of_the_status() {
        let fleet = Fleet::new(Arc::new(NaiveIndex::new(IndexConfig::default())));
        let id = RowId { pod: "a".into(), rank: None };
        let (scheme, model) = (crate::hash::Models::default().default, "m".into());
        let row = fleet.add(id, "", &scheme, &model, CountMode::Counted).unwrap();
        assert_eq!(row.trust(), (PodState::Connecting, false));
        for state in PodState::ALL {
            for stale in [false, true] {
                row.update(|status| (status.state, status.stale) = (state, stale));
                assert_eq!(row.trust(), (state, stale));
            }
        }
        let id = RowId { pod: "a".into(), rank: Some(1) };
        let again = fleet.replace(&row, id, &scheme, &model, CountMode::Counted).unwrap();
        assert_eq!(again.trust(), row.trust());
    }
}
