//! Our index, through the store path that production takes: tokens and engine keys in, request
//! keys hashed inside.

use std::{sync::Arc, time::Instant};

use kv_indexer::{
    hash::{Algorithm, Prompt, Scheme},
    index::{BlockIndex, Extras, IndexConfig, PodSpec, Remove, Store, runs::RunIndex},
    model::{CountMode, PodSlot, RequestKey, TierId, TierTable},
};

use crate::contender::{BLOCK, Contender, Event, Place, What, Writer};

/// The engine under measurement.
type Engine = RunIndex;

#[derive(Debug)]
pub(crate) struct Ours {
    engine: Arc<Engine>,
    slots: Arc<[PodSlot]>,
    cpu: TierId,
}

fn scheme() -> Arc<Scheme> {
    Arc::new(Scheme::new(Algorithm::Xxh3, "", BLOCK as u32))
}

/// Request keys of a prompt.
pub(crate) fn keys(tokens: &[u32]) -> Vec<RequestKey> {
    thread_local!(static SCHEME: Arc<Scheme> = scheme());
    let prompt = Prompt { model: "model", tokens, ..Prompt::default() };
    SCHEME.with(|scheme| prompt.keys(scheme).unwrap_or_default())
}

impl Ours {
    /// An empty index whose rows count as told.
    pub(crate) fn counting(pods: u32, count_mode: CountMode) -> Self {
        // No cap: what is measured is what everything takes.
        let config = IndexConfig { cap_bytes: 1 << 40, ..IndexConfig::default() };
        let cpu = config.tiers.id(Some("cpu"));
        let engine = Arc::new(Engine::new(config));
        let spec = PodSpec { scheme: scheme(), model: Arc::from("model"), count_mode };
        let slots = (0..pods).map_while(|_| engine.register(spec.clone())).collect();
        Self { engine, slots, cpu }
    }
}

impl Contender for Ours {
    const NAME: &'static str = "ours";
    const HASHES_INSIDE: bool = true;
    const MAX_PODS: u32 = 4096;
    type Event = Event;
    type Query = Vec<RequestKey>;
    type Answer = Vec<(PodSlot, u32)>;
    type Writer = OurWriter;

    fn new(pods: u32) -> Self {
        Self::counting(pods, CountMode::Counted)
    }

    fn prepare(event: &Event) -> Event {
        event.clone()
    }

    fn query(tokens: &[u32]) -> Vec<RequestKey> {
        keys(tokens)
    }

    fn writer(&self) -> OurWriter {
        let (engine, slots) = (Arc::clone(&self.engine), Arc::clone(&self.slots));
        OurWriter { engine, slots, cpu: self.cpu, at: Instant::now() }
    }

    #[inline]
    fn lookup(&self, query: &Self::Query, answer: &mut Self::Answer) {
        self.engine.depths(query, answer);
    }

    fn depths(answer: &Self::Answer) -> Vec<(u32, u32)> {
        answer.iter().map(|&(slot, depth)| (slot.0, depth)).collect()
    }
}

#[derive(Debug)]
pub(crate) struct OurWriter {
    engine: Arc<Engine>,
    slots: Arc<[PodSlot]>,
    cpu: TierId,
    at: Instant,
}

impl Writer for OurWriter {
    type Event = Event;

    fn apply(&mut self, event: Event) {
        let slot = self.slots[event.pod as usize];
        let tier = match event.place {
            Place::Gpu => TierTable::GPU,
            Place::Cpu => self.cpu,
        };
        match &event.what {
            What::Stored { parent, span } => {
                let store = Store {
                    keys: span.keys(),
                    parent: *parent,
                    tokens: span.tokens(),
                    block_size: BLOCK as u32,
                    lora: None,
                    extras: Extras::default(),
                    salt: None,
                    group: None,
                    kind: None,
                    tier,
                    at: self.at,
                };
                self.engine.store(slot, &store);
            }
            What::Removed(keys) => {
                self.engine.remove(slot, &Remove { keys, group: None, tier, sequence: 0 });
            }
            What::Cleared => self.engine.clear(slot),
        }
    }
}
