//! What an approximate prefix-cache plugin does for one request: match it before it is scheduled,
//! remember it after.

use std::{slice, sync::Arc};

use super::{
    MAX_CAPACITY,
    hashing::{BlockHasher, Chains},
    metrics::Metrics,
    prompt::{self, BYTES_PER_TOKEN, Content},
    store::PrefixStore,
};
use crate::epp::{
    datalayer::Endpoint,
    plugins::Building,
    request::InferenceRequest,
    scheduling::{Cycle, PrefixMatches, Produced, SchedulingResult},
};

/// The profile whose endpoint prefills, by the name that the Go EPP takes for it.
const PREFILL: &str = "prefill";

/// How a prompt is cut into blocks, and how many an endpoint holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::epp::plugins) struct Sizing {
    /// Take block size and capacity from what the engine reports.
    pub(in crate::epp::plugins) auto_tune: bool,
    /// Bytes of a block unless an engine reports its own.
    pub(in crate::epp::plugins) block_bytes: usize,
    /// No block is smaller.
    pub(in crate::epp::plugins) least_block_bytes: usize,
    /// How much of a prompt is looked at.
    pub(in crate::epp::plugins) limit: Limit,
    /// Blocks are of tokens, with the rest of a prompt as a block of its own; else of the prompt's
    /// bytes, without.
    pub(in crate::epp::plugins) tokens: bool,
    /// Blocks that an endpoint holds unless its engine reports how many.
    pub(in crate::epp::plugins) capacity: usize,
}

/// How much of each prompt is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::epp::plugins) enum Limit {
    /// So many blocks.
    Blocks(usize),
    /// Whole blocks within so many bytes.
    Bytes(usize),
    /// All of it.
    None,
}

impl Sizing {
    /// Bytes of a block for these candidates. The first speaks for all, as in the Go EPP.
    pub(in crate::epp::plugins) fn block_bytes(&self, endpoints: &[Arc<Endpoint>]) -> usize {
        let reported = match endpoints.first() {
            Some(first) if self.auto_tune => first.metrics().cache_block_tokens,
            _ => 0,
        };
        let bytes = match usize::try_from(reported) {
            Ok(0) | Err(_) => self.block_bytes,
            Ok(tokens) => tokens.saturating_mul(BYTES_PER_TOKEN),
        };
        bytes.max(self.least_block_bytes).max(1)
    }

    /// Blocks of each prompt that are looked at.
    pub(in crate::epp::plugins) fn max_blocks(&self, block_bytes: usize) -> usize {
        match self.limit {
            Limit::Blocks(blocks) => blocks,
            Limit::Bytes(bytes) => bytes / block_bytes,
            Limit::None => usize::MAX,
        }
    }

    /// Blocks that an endpoint holds.
    pub(in crate::epp::plugins) fn capacity(&self, reported: u64) -> usize {
        let reported = if self.auto_tune { usize::try_from(reported).unwrap_or(0) } else { 0 };
        let capacity = if reported > 0 { reported } else { self.capacity };
        capacity.clamp(1, MAX_CAPACITY)
    }
}

/// A prefix store with its sizes and metrics, under the name of its plugin.
#[derive(Debug)]
pub(in crate::epp::plugins) struct Matcher {
    name: Arc<str>,
    sizing: Sizing,
    store: PrefixStore,
    metrics: Metrics,
}

impl Matcher {
    /// A matcher that knows nothing yet.
    ///
    /// # Errors
    ///
    /// When the metrics clash with others of the registry.
    pub(in crate::epp::plugins) fn new(
        building: &dyn Building,
        kind: &str,
        sizing: Sizing,
    ) -> prometheus::Result<Self> {
        Self::named(Arc::clone(building.name()), building, kind, sizing)
    }

    /// A matcher that writes under another name than its plugin's.
    ///
    /// # Errors
    ///
    /// When the metrics clash with others of the registry.
    pub(in crate::epp::plugins) fn named(
        name: Arc<str>,
        building: &dyn Building,
        kind: &str,
        sizing: Sizing,
    ) -> prometheus::Result<Self> {
        let metrics = Metrics::new(building.registry(), building.name(), kind)?;
        Ok(Self { name, sizing, store: PrefixStore::new(building.endpoints()), metrics })
    }

    /// The configured name.
    pub(in crate::epp::plugins) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Writes the matches of all candidates, and keeps the hashes.
    pub(in crate::epp::plugins) fn produce(
        &self,
        request: &InferenceRequest,
        endpoints: &[Arc<Endpoint>],
        produced: &mut Produced,
    ) {
        let hashed = self.hash(request, endpoints, produced);
        let matches = PrefixMatches {
            total: hashed.total(),
            block: u32::try_from(hashed.block_bytes.div_ceil(BYTES_PER_TOKEN)).unwrap_or(u32::MAX),
            matched: self.store.matches(&hashed.chains, endpoints),
        };
        produced.set_prefix(&self.name, matches);
        produced.keep(&self.name, hashed);
    }

    /// Remembers where the request went: the first endpoint of the primary profile, and that of the
    /// profile `prefill`. A request that was not matched before is hashed now.
    pub(in crate::epp::plugins) fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
    ) {
        let Some(&target) = result.targets().first() else { return };
        let made;
        let hashed = match cycle.produced.kept::<Hashed>(&self.name) {
            Some(kept) => kept,
            None => {
                made = self.hash(cycle.request, cycle.endpoints, cycle.produced);
                &made
            }
        };
        let matched = match (cycle.produced.prefix(&self.name), cycle.endpoints.get(target)) {
            (Some(matches), _) => matches.matched.get(target).copied(),
            (None, Some(alone)) => {
                self.store.matches(&hashed.chains, slice::from_ref(alone)).first().copied()
            }
            (None, None) => None,
        };
        self.metrics.routed(matched.unwrap_or(0), hashed.total(), hashed.block_bytes);
        let prefill = result.results.get(PREFILL).and_then(|run| run.picked.first().copied());
        let prefill = prefill.filter(|&prefill| prefill != target);
        for pod in [Some(target), prefill].into_iter().flatten() {
            let Some(endpoint) = cycle.endpoints.get(pod) else { continue };
            let reported = cycle.metrics.get(pod).map_or(0, |metrics| metrics.cache_blocks);
            let capacity = self.sizing.capacity(reported);
            let grown = self.store.insert(endpoint.id(), &hashed.chains, capacity);
            self.metrics.resized(grown as i64);
        }
    }

    fn hash(
        &self,
        request: &InferenceRequest,
        endpoints: &[Arc<Endpoint>],
        produced: &Produced,
    ) -> Hashed {
        let block_bytes = self.sizing.block_bytes(endpoints);
        let mut hasher = BlockHasher::new(
            &request.target_model,
            request.parsed.cache_salt.as_deref().unwrap_or_default(),
            block_bytes,
            self.sizing.max_blocks(block_bytes),
            self.sizing.tokens,
        );
        let content = if self.sizing.tokens { Content::Tokens } else { Content::Bytes };
        prompt::hash(request, produced, content, &mut hasher);
        Hashed { chains: hasher.finish(), block_bytes }
    }

    /// Forgets an endpoint.
    pub(in crate::epp::plugins) fn remove(&self, endpoint: &Endpoint) {
        self.metrics.resized(-(self.store.remove(endpoint.id()) as i64));
    }
}

/// What is kept of a request until it has been routed.
#[derive(Debug)]
struct Hashed {
    chains: Chains,
    block_bytes: usize,
}

impl Hashed {
    /// Blocks of all chains.
    fn total(&self) -> u32 {
        u32::try_from(self.chains.total()).unwrap_or(u32::MAX)
    }
}
