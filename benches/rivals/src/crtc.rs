//! `dynamo-kv-router`: `ConcurrentRadixTreeCompressed`, the index it ships.
//!
//! Lookups run in line on the caller's thread. Only its own event loop can apply events; a lane's
//! events are put into the loop's queue before the loop starts, so that no sender competes.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use dynamo_kv_router::{
    ConcurrentRadixTreeCompressed, LocalBlockHash, OverlapScores, RouterEvent, SyncIndexer,
    compute_block_hash_for_seq,
    indexer::WorkerTask,
    protocols::{
        BlockHashOptions, ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData,
        KvCacheRemoveData, KvCacheStoreData, KvCacheStoredBlockData,
    },
};
use tokio::sync::oneshot;

use crate::contender::{BLOCK, Contender, Event, Lane, What, Writer};

pub(crate) struct Crtc {
    tree: Arc<ConcurrentRadixTreeCompressed>,
}

fn hashes(tokens: &[u32]) -> Vec<LocalBlockHash> {
    compute_block_hash_for_seq(tokens, BLOCK as u32, BlockHashOptions::default())
}

/// A task whose answer says that everything sent before it is applied.
fn barrier() -> (WorkerTask, oneshot::Receiver<()>) {
    let (done, wait) = oneshot::channel();
    (WorkerTask::Flush(done), wait)
}

impl Crtc {
    fn start(&self, tasks: flume::Receiver<WorkerTask>) -> JoinHandle<()> {
        let tree = Arc::clone(&self.tree);
        std::thread::spawn(move || tree.worker(tasks, None).unwrap_or_default())
    }
}

impl Contender for Crtc {
    const NAME: &'static str = "dynamo CRTC";
    const HASHES_INSIDE: bool = false;
    const MAX_PODS: u32 = u32::MAX;
    type Event = RouterEvent;
    type Query = Vec<LocalBlockHash>;
    type Answer = OverlapScores;
    type Writer = CrtcWriter;

    fn new(_pods: u32) -> Self {
        Self { tree: Arc::new(ConcurrentRadixTreeCompressed::new()) }
    }

    fn prepare(event: &Event) -> RouterEvent {
        let data = match &event.what {
            What::Stored { parent, span } => {
                let blocks = span.keys().iter().zip(hashes(span.tokens()));
                KvCacheEventData::Stored(KvCacheStoreData {
                    parent_hash: parent.map(|key| ExternalSequenceBlockHash(key.0)),
                    start_position: None,
                    blocks: blocks
                        .map(|(key, tokens_hash)| KvCacheStoredBlockData {
                            block_hash: ExternalSequenceBlockHash(key.0),
                            tokens_hash,
                            mm_extra_info: None,
                        })
                        .collect(),
                })
            }
            What::Removed(keys) => KvCacheEventData::Removed(KvCacheRemoveData {
                block_hashes: keys.iter().map(|key| ExternalSequenceBlockHash(key.0)).collect(),
            }),
            What::Cleared => KvCacheEventData::Cleared,
        };
        let event_id = 0;
        RouterEvent::new(u64::from(event.pod), KvCacheEvent { event_id, data, dp_rank: 0 })
    }

    fn query(tokens: &[u32]) -> Self::Query {
        hashes(tokens)
    }

    fn writer(&self) -> CrtcWriter {
        let (tasks, queue) = flume::bounded(256);
        CrtcWriter { tasks, thread: Some(self.start(queue)) }
    }

    #[inline]
    fn lookup(&self, query: &Self::Query, answer: &mut Self::Answer) {
        *answer = self.tree.find_matches(query, false);
    }

    fn depths(answer: &Self::Answer) -> Vec<(u32, u32)> {
        answer.scores.iter().map(|(pod, &depth)| (pod.worker_id as u32, depth)).collect()
    }

    fn lane(&self, warm: Vec<RouterEvent>, timed: Vec<RouterEvent>) -> Lane {
        let (tasks, queue) = flume::unbounded();
        let ((first, first_done), (last, last_done)) = (barrier(), barrier());
        let all = warm
            .into_iter()
            .map(WorkerTask::Event)
            .chain([first])
            .chain(timed.into_iter().map(WorkerTask::Event))
            .chain([last, WorkerTask::Terminate]);
        for task in all {
            drop(tasks.send(task));
        }
        let tree = Arc::clone(&self.tree);
        Box::new(move |warmed| {
            let loops = std::thread::spawn(move || tree.worker(queue, None).unwrap_or_default());
            drop(first_done.blocking_recv());
            let start = Instant::now();
            warmed();
            drop(last_done.blocking_recv());
            let time: Duration = start.elapsed();
            drop(tasks);
            drop(loops.join());
            time
        })
    }
}

/// Feeds one event loop.
pub(crate) struct CrtcWriter {
    tasks: flume::Sender<WorkerTask>,
    thread: Option<JoinHandle<()>>,
}

impl CrtcWriter {
    fn send(&self, task: WorkerTask) {
        drop(self.tasks.send(task));
    }
}

impl Writer for CrtcWriter {
    type Event = RouterEvent;

    fn apply(&mut self, event: RouterEvent) {
        self.send(WorkerTask::Event(event));
    }

    fn flush(&mut self) {
        let (task, done) = barrier();
        self.send(task);
        drop(done.blocking_recv());
    }

    fn sweep(&mut self) {
        self.send(WorkerTask::CleanupStaleChildren);
        self.flush();
    }
}

impl Drop for CrtcWriter {
    fn drop(&mut self) {
        self.send(WorkerTask::Terminate);
        drop(self.thread.take().map(JoinHandle::join));
    }
}
