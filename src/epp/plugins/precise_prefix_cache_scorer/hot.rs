//! Hot prefixes: when waiting for the best holder takes longer than computing the prefix again.
//!
//! # Rule
//!
//! ```text
//! cost(p) = uncached tokens in flight to p + uncached tokens of this request at p
//! b       = the candidate that holds most; of several the one of least cost
//! ```
//!
//! If some candidate's cost is less than `cost(b) − marginTokens`, only the candidates of least cost
//! are kept, and whoever is picked becomes a holder. Otherwise, and where nobody holds anything, all
//! are kept. The difference of the requests' own uncached tokens is what the match saves, so this is:
//! the best holder has more in flight than another one, by more than its match saves.
//!
//! A block that is only expected (see `speculation`) is one that the next request will not have to compute,
//! and one that nobody has computed yet. So it counts as held in this request's own tokens, and as
//! uncached in those in flight. Requests that share a prefix while it is being computed for the
//! first time each count for it, though the engine computes it once: that is what spreads a rush,
//! and an estimate that is too high ends with the first answer.
//!
//! Decoding requests do not count: they delay a prefill by little, and queue and cache scorers see
//! them.
//!
//! # Failure
//!
//! A request frees what it holds when its response starts or when it is dropped, so nothing leaks.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::params::switch;
use crate::{
    epp::{
        datalayer::{Endpoint, Endpoints},
        plugins::lives::Lives,
        scheduling::PrefixMatches,
    },
    support::fields::Fields,
};

/// What is configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HotPrefix {
    /// By so many tokens the other pod has to be better.
    margin_tokens: u64,
}

impl HotPrefix {
    /// `None`: it is off, which is the default.
    pub(super) fn read(params: &Fields<'_>) -> Option<Self> {
        const FIELD: &str = "hotPrefix";
        match switch(params, FIELD)? {
            Some(on) => on.then(Self::default),
            None => {
                let fields = params.mapping(FIELD);
                let margin = fields.integer("marginTokens", 0..=1 << 40);
                fields.finish();
                Some(Self { margin_tokens: margin.unwrap_or(0) })
            }
        }
    }
}

/// Uncached tokens in flight, and the rule.
#[derive(Debug)]
pub(super) struct Hot {
    config: HotPrefix,
    in_flight: Lives<AtomicU64>,
}

impl Hot {
    pub(super) fn new(config: HotPrefix, endpoints: &Arc<Endpoints>) -> Self {
        Self { config, in_flight: Lives::new(endpoints) }
    }

    /// Narrows the candidates, of a request of so many tokens. Gives the blocks that the best holder
    /// has if it is left out, else 0.
    pub(super) fn narrow(
        &self,
        matches: &PrefixMatches,
        tokens: u64,
        endpoints: &[Arc<Endpoint>],
        keep: &mut Vec<usize>,
    ) -> u32 {
        let held = |at: usize| matches.matched.get(at).copied().unwrap_or(0);
        let in_flight = self.in_flight.read();
        let cost = |at: usize| {
            let life = endpoints.get(at).and_then(|endpoint| in_flight.get(endpoint.id()));
            let waiting = life.map_or(0, |tokens| tokens.load(Relaxed));
            waiting.saturating_add(uncached(tokens, held(at), matches.block))
        };
        let costs: Vec<u64> = keep.iter().map(|&at| cost(at)).collect();
        let best = keep.iter().zip(&costs).map(|(&at, &cost)| (held(at), cost));
        let best = best.reduce(|a, b| if (b.0, a.1) > (a.0, b.1) { b } else { a });
        let (Some((most, of_best)), Some(&least)) = (best, costs.iter().min()) else { return 0 };
        if most == 0 || least.saturating_add(self.config.margin_tokens) >= of_best {
            return 0;
        }
        let mut costs = costs.into_iter();
        keep.retain(|_| costs.next() == Some(least));
        most
    }

    /// A request with so many uncached tokens is on its way; `None` if the endpoint is gone.
    pub(super) fn hold(&self, endpoint: &Endpoint, tokens: u64) -> Option<Held> {
        let counter = self.in_flight.get_or_make(endpoint.id(), AtomicU64::default)?;
        counter.fetch_add(tokens, Relaxed);
        Some(Held { counter, tokens })
    }

    pub(super) fn remove(&self, endpoint: &Endpoint) {
        self.in_flight.remove(endpoint.id());
    }
}

/// Tokens of a prompt of `tokens` that are to be computed where so many blocks are held.
pub(super) fn uncached(tokens: u64, held: u32, block: u32) -> u64 {
    tokens.saturating_sub(u64::from(held) * u64::from(block))
}

/// Uncached tokens of one request, until it is dropped.
#[derive(Debug)]
pub(super) struct Held {
    counter: Arc<AtomicU64>,
    tokens: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.tokens, Relaxed);
    }
}
