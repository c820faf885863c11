//! `kv-index` (SMG): `ChainIndex`, which reports each pod and its depth to a closure.

use std::sync::Arc;

use kv_index::{
    ChainBlockMap, ChainIndex, ContentHash, SequenceHash, StoredBlock,
    compute_request_content_hashes,
};
use rustc_hash::FxHashMap;

use crate::contender::{BLOCK, Contender, Event, What, Writer};

/// The answer as a list, the least that can be done with what is reported.
pub(crate) struct ChainRaw {
    index: Arc<ChainIndex>,
    ids: Arc<[u32]>,
}

/// An event, pre-hashed.
#[derive(Debug)]
pub(crate) enum ChainEvent {
    Stored(u32, Option<SequenceHash>, Vec<StoredBlock>),
    Removed(u32, Vec<SequenceHash>),
    Cleared(u32),
}

impl Contender for ChainRaw {
    const NAME: &'static str = "kv-index raw";
    const HASHES_INSIDE: bool = false;
    const MAX_PODS: u32 = 1024;
    type Event = ChainEvent;
    type Query = Vec<ContentHash>;
    type Answer = Vec<(u32, u32)>;
    type Writer = ChainWriter;

    fn new(pods: u32) -> Self {
        let index = ChainIndex::with_max_workers(pods.max(64) as usize);
        // An id that is not given out is beyond every map: its use panics.
        let ids = (0..pods).map_while(|pod| index.intern_worker(&pod.to_string()).ok()).collect();
        Self { index: Arc::new(index), ids }
    }

    fn prepare(event: &Event) -> ChainEvent {
        let pod = event.pod;
        match &event.what {
            What::Stored { parent, span } => {
                let content = compute_request_content_hashes(span.tokens(), BLOCK);
                let blocks = span.keys().iter().zip(content).map(|(key, content_hash)| {
                    StoredBlock { seq_hash: SequenceHash(key.0), content_hash }
                });
                let parent = parent.map(|key| SequenceHash(key.0));
                ChainEvent::Stored(pod, parent, blocks.collect())
            }
            What::Removed(keys) => {
                ChainEvent::Removed(pod, keys.iter().map(|key| SequenceHash(key.0)).collect())
            }
            What::Cleared => ChainEvent::Cleared(pod),
        }
    }

    fn query(tokens: &[u32]) -> Self::Query {
        compute_request_content_hashes(tokens, BLOCK)
    }

    fn writer(&self) -> ChainWriter {
        let maps = (0..self.ids.len()).map(|_| ChainBlockMap::new()).collect();
        ChainWriter { index: Arc::clone(&self.index), ids: Arc::clone(&self.ids), maps }
    }

    #[inline]
    fn lookup(&self, query: &Self::Query, answer: &mut Self::Answer) {
        answer.clear();
        let report = |pod, depth| answer.push((pod, depth));
        self.index.score_into(query, |content| content.0, false, report);
    }

    fn depths(answer: &Self::Answer) -> Vec<(u32, u32)> {
        answer.clone()
    }
}

/// The answer as the hash map that its own `find_matches` returns.
pub(crate) struct ChainMap(ChainRaw);

impl Contender for ChainMap {
    const NAME: &'static str = "kv-index map";
    const HASHES_INSIDE: bool = false;
    const MAX_PODS: u32 = ChainRaw::MAX_PODS;
    type Event = ChainEvent;
    type Query = Vec<ContentHash>;
    type Answer = FxHashMap<u32, u32>;
    type Writer = ChainWriter;

    fn new(pods: u32) -> Self {
        Self(ChainRaw::new(pods))
    }

    fn prepare(event: &Event) -> ChainEvent {
        ChainRaw::prepare(event)
    }

    fn query(tokens: &[u32]) -> Self::Query {
        ChainRaw::query(tokens)
    }

    fn writer(&self) -> ChainWriter {
        self.0.writer()
    }

    #[inline]
    fn lookup(&self, query: &Self::Query, answer: &mut Self::Answer) {
        *answer = self.0.index.find_matches(query, false).scores;
    }

    fn depths(answer: &Self::Answer) -> Vec<(u32, u32)> {
        answer.iter().map(|(&pod, &depth)| (pod, depth)).collect()
    }
}

/// Keeps the block maps of its pods.
pub(crate) struct ChainWriter {
    index: Arc<ChainIndex>,
    ids: Arc<[u32]>,
    maps: Vec<ChainBlockMap>,
}

impl Writer for ChainWriter {
    type Event = ChainEvent;

    fn apply(&mut self, event: ChainEvent) {
        match event {
            ChainEvent::Stored(pod, parent, blocks) => {
                let (id, map) = (self.ids[pod as usize], &mut self.maps[pod as usize]);
                // A store it refuses shows in the answers, which are compared with the truth.
                drop(self.index.apply_stored(id, &blocks, parent, map));
            }
            ChainEvent::Removed(pod, keys) => {
                let (id, map) = (self.ids[pod as usize], &mut self.maps[pod as usize]);
                self.index.apply_removed(id, &keys, map);
            }
            ChainEvent::Cleared(pod) => {
                let (id, map) = (self.ids[pod as usize], &mut self.maps[pod as usize]);
                self.index.apply_cleared(id, map);
            }
        }
    }
}
