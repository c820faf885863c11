//! What every index under measurement can do, in its own types.
//!
//! Measurements are generic over [`Contender`], so that each index is called directly; one file
//! implements one of them, in the way its own documentation asks for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kv_indexer::model::EngineKey;

/// Tokens per block, the engines' and everybody's.
pub(crate) const BLOCK: usize = 16;

/// Consecutive blocks of a prompt: engine keys and tokens. Clones share both.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) all_keys: Arc<[EngineKey]>,
    pub(crate) all_tokens: Arc<[u32]>,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Span {
    pub(crate) fn keys(&self) -> &[EngineKey] {
        &self.all_keys[self.start..self.end]
    }

    pub(crate) fn tokens(&self) -> &[u32] {
        &self.all_tokens[self.start * BLOCK..self.end * BLOCK]
    }
}

/// What an engine says.
#[derive(Clone, Debug)]
pub(crate) enum What {
    Stored { parent: Option<EngineKey>, span: Span },
    Removed(Arc<[EngineKey]>),
    Cleared,
}

/// Where a copy lies. Only our index knows tiers; a measurement with others uses the first alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Gpu,
    Cpu,
}

/// One event of one pod.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) pod: u32,
    pub(crate) place: Place,
    pub(crate) what: What,
}

impl Event {
    /// Blocks stored.
    pub(crate) fn stored(&self) -> usize {
        match &self.what {
            What::Stored { span, .. } => span.end - span.start,
            _ => 0,
        }
    }
}

/// Applies events of its own pods, in order; no other writer has these pods.
pub(crate) trait Writer: Send + 'static {
    type Event;
    fn apply(&mut self, event: Self::Event);
    /// Returns when lookups see everything applied before.
    fn flush(&mut self) {}
    /// Does what the index does now and then to give memory back.
    fn sweep(&mut self) {}
}

/// Events that are in place to be applied on one thread. Called with what to do between those
/// that prepare the index and those that are timed; returns the time of the latter.
pub(crate) type Lane = Box<dyn FnOnce(&(dyn Fn() + Sync)) -> Duration + Send>;

/// One index under measurement.
pub(crate) trait Contender: Send + Sync + Sized + 'static {
    const NAME: &'static str;
    /// Applying a store includes hashing its tokens.
    const HASHES_INSIDE: bool;
    /// Pods at most.
    const MAX_PODS: u32;
    /// An event as the index takes it.
    type Event: Send + 'static;
    /// A prompt as the index takes it.
    type Query: Send + Sync;
    /// Room for an answer.
    type Answer: Default + Send;
    type Writer: Writer<Event = Self::Event>;

    /// An empty index for pods `0..pods`.
    fn new(pods: u32) -> Self;
    /// Tokens → what the index is given, with its own hash functions.
    fn prepare(event: &Event) -> Self::Event;
    /// Tokens → what a lookup is given, with its own hash functions.
    fn query(tokens: &[u32]) -> Self::Query;
    fn writer(&self) -> Self::Writer;
    fn lookup(&self, query: &Self::Query, answer: &mut Self::Answer);
    /// The pods of an answer and their depths, in any order.
    fn depths(answer: &Self::Answer) -> Vec<(u32, u32)>;

    /// Is the answer the truth, which is in the order of pods?
    fn answers(
        &self,
        query: &Self::Query,
        answer: &mut Self::Answer,
        truth: &[(u32, u32)],
    ) -> bool {
        self.lookup(query, answer);
        let mut depths = Self::depths(answer);
        depths.sort_unstable();
        depths == truth
    }

    /// Puts events in place; see [`Lane`].
    fn lane(&self, warm: Vec<Self::Event>, timed: Vec<Self::Event>) -> Lane {
        let mut writer = self.writer();
        Box::new(move |warmed| {
            warm.into_iter().for_each(|event| writer.apply(event));
            warmed();
            let start = Instant::now();
            timed.into_iter().for_each(|event| writer.apply(event));
            writer.flush();
            start.elapsed()
        })
    }
}
