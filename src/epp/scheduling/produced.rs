//! What data producers say about one request, and the keys under which it is found.

use std::{
    any::Any,
    sync::{Arc, OnceLock},
};

use crate::tokenize::{TokenizeError, Tokenized};

/// A kind of data that one plugin writes and others read, for ordering producers and finding missing
/// ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DataKey {
    /// Token ids of the prompt.
    Tokens,
    /// Prefix matches, of the producer with this configured name.
    Prefix(Arc<str>),
    /// Requests and tokens in flight, of the producer with this configured name.
    InFlight(Arc<str>),
}

/// How much of a prompt each candidate is believed to hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PrefixMatches {
    /// Blocks of the prompt.
    pub total: u32,
    /// Tokens per block. Producers that count bytes take four of them for a token.
    pub block: u32,
    /// Blocks that each candidate holds, by index into the cycle's endpoints.
    pub matched: Vec<u32>,
}

/// Load that was sent and has not come back, by index into the cycle's endpoints.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InFlight {
    /// Requests.
    pub requests: Vec<u64>,
    /// Tokens of these requests that had to be computed.
    pub tokens: Vec<u64>,
    /// Tokens that this request would add.
    pub request_tokens: Vec<u64>,
}

/// Token ids of the prompts of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptTokens {
    /// Of each prompt, in order.
    pub prompts: Vec<Tokenized>,
    /// They are the engine's own; estimates match nothing that an engine announces.
    pub exact: bool,
}

impl PromptTokens {
    /// Tokens of all prompts.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.prompts.iter().map(|prompt| prompt.ids.len() as u64).sum()
    }
}

/// All that is known of one request before scheduling.
#[derive(Debug, Default)]
pub struct Produced {
    /// Token ids of the prompts, real or estimated.
    pub tokens: Option<PromptTokens>,
    /// Why there are none, if a producer tried.
    pub no_tokens: Option<TokenizeError>,
    /// Tokens of the prompt as estimated from its text, once somebody needed them.
    estimate: OnceLock<u64>,
    prefix: Vec<(Arc<str>, PrefixMatches)>,
    in_flight: Vec<(Arc<str>, InFlight)>,
    kept: Vec<(Arc<str>, Box<dyn Any + Send + Sync>)>,
}

impl Produced {
    /// Nothing known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many tokens the prompt is estimated to have; `estimate` reads its text the first time.
    pub fn estimated_tokens(&self, estimate: impl FnOnce() -> u64) -> u64 {
        *self.estimate.get_or_init(estimate)
    }

    /// The matches that the producer of this name found.
    #[must_use]
    pub fn prefix(&self, producer: &str) -> Option<&PrefixMatches> {
        self.prefix.iter().find(|(name, _)| **name == *producer).map(|(_, matches)| matches)
    }

    /// Sets the matches of a producer.
    pub fn set_prefix(&mut self, producer: &Arc<str>, matches: PrefixMatches) {
        self.prefix.retain(|(name, _)| name != producer);
        self.prefix.push((Arc::clone(producer), matches));
    }

    /// The load that the producer of this name counts.
    #[must_use]
    pub fn in_flight(&self, producer: &str) -> Option<&InFlight> {
        self.in_flight.iter().find(|(name, _)| **name == *producer).map(|(_, load)| load)
    }

    /// Sets the load of a producer.
    pub fn set_in_flight(&mut self, producer: &Arc<str>, load: InFlight) {
        self.in_flight.retain(|(name, _)| name != producer);
        self.in_flight.push((Arc::clone(producer), load));
    }

    /// Keeps what a producer wants to find again when the request has been routed.
    pub fn keep<T: Any + Send + Sync>(&mut self, producer: &Arc<str>, value: T) {
        self.kept.push((Arc::clone(producer), Box::new(value)));
    }

    /// What the producer of this name kept last, of this type.
    #[must_use]
    pub fn kept<T: Any>(&self, producer: &str) -> Option<&T> {
        let mut own = self.kept.iter().rev().filter(|(name, _)| **name == *producer);
        own.find_map(|(_, value)| value.downcast_ref())
    }
}
