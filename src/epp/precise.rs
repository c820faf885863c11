//! Who holds how much of a prompt, by the engines' own events: what the precise prefix scorer asks.
//!
//! # Model
//!
//! A [`PrefixIndex`] answers a [`Query`] (block keys of a request's prompts, hashed once) with one
//! [`EndpointMatch`] for each candidate. There are two: [`remote`], the `kv-indexer` service over one
//! `ScoreStream`, and [`embedded`], an index in this process whose subscriptions follow the endpoints.
//!
//! [`accuracy`] compares what was predicted with what engines report.
//!
//! # Which rows are an endpoint's
//!
//! A row belongs to the endpoint whose `ip:port` is the row's pod; else to the one whose pod name it
//! is; else to the one with that bare IP, if there is only one. Of an endpoint's ranks the one with the
//! highest score counts, since the engine decides which rank serves.
//!
//! A row of the embedded index that was declared for an endpoint belongs to that life of it alone: an
//! endpoint that comes back at the same address begins with nothing. The service sees its pods itself,
//! and says itself what their rows are worth.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    epp::{datalayer::Endpoint, scheduling::BoxFuture},
    hash::Scheme,
    model::{PodState, RequestKey},
};

pub mod accuracy;
pub mod embedded;
pub mod remote;

/// How a model's prompts are hashed, and under which names.
#[derive(Clone, Debug)]
pub struct Addressing {
    /// The name under which the model is indexed.
    pub model: Arc<str>,
    /// The adapter, if the served name is one's; empty = base model.
    pub lora: Arc<str>,
    /// Hash settings.
    pub scheme: Arc<Scheme>,
}

/// The block keys of one request.
#[derive(Clone, Debug)]
pub struct Query {
    /// Names and hash settings.
    pub addressing: Addressing,
    /// Of each prompt, all full blocks in order.
    pub prompts: Arc<[Vec<RequestKey>]>,
}

/// What an endpoint holds of a request's prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EndpointMatch {
    /// Leading blocks held, speculative entries included, summed over prompts.
    pub depth: u32,
    /// The same by events alone.
    pub confirmed: u32,
    /// `depth` with each block weighed by its best tier.
    pub score: f64,
    /// What this can be trusted for; `None`: nobody indexes the endpoint.
    pub state: Option<RowState>,
}

/// Trust in an endpoint's row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowState {
    /// Without the overlay.
    pub state: PodState,
    /// Overlay: disconnected, or traffic without events.
    pub stale: bool,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Too many failures lately; nobody is asked.
    #[error("the indexer is taken for down")]
    Open,
    /// No connection, or it broke.
    #[error("no connection to the indexer")]
    Disconnected,
    /// No answer in time.
    #[error("the indexer did not answer in time")]
    Deadline,
    /// As many questions are open as may be.
    #[error("too many questions are open")]
    Busy,
    /// An answer that is none.
    #[error("the indexer answered nonsense: {0}")]
    Garbage(String),
    /// It refused the question.
    #[error("the indexer refuses: {0}")]
    Refused(String),
    /// It hashes otherwise; the settings are being read again.
    #[error("the indexer's hash settings have changed")]
    Settings,
}

impl IndexError {
    /// A word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Open => "breaker_open",
            Self::Disconnected => "disconnected",
            Self::Deadline => "deadline",
            Self::Busy => "busy",
            Self::Garbage(_) => "garbage",
            Self::Refused(_) => "refused",
            Self::Settings => "settings",
        }
    }
}

/// A speculative entry. It ends by itself after its time; see [`PrefixIndex::take_back`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpeculationId(pub u64);

/// Who knows what endpoints hold.
pub trait PrefixIndex: fmt::Debug + Send + Sync {
    /// How prompts for a served model name are hashed. A name that no row and no alias has is taken for
    /// a LoRA adapter's if all rows are of one model. `None`: nothing is known yet, and nothing can match.
    fn addressing(&self, served: &str) -> Option<Addressing>;

    /// What each of `endpoints` holds, in their order. Never waits longer than the configured deadline.
    fn score<'a>(
        &'a self,
        query: &'a Query,
        endpoints: &'a [Arc<Endpoint>],
    ) -> BoxFuture<'a, Result<Vec<EndpointMatch>, IndexError>>;

    /// Marks the blocks as expected on an endpoint for `ttl`. Does not wait; `None` if as many entries
    /// are open as may be, or nobody indexes the endpoint. Each call is an entry of its own.
    fn speculate(&self, query: &Query, endpoint: &Endpoint, ttl: Duration)
    -> Option<SpeculationId>;

    /// An entry ends this much from now instead. Does not wait.
    fn extend(&self, entry: SpeculationId, ttl: Duration);

    /// An entry ends now: the engine will not store these blocks. Does not wait.
    fn take_back(&self, entry: SpeculationId);

    /// Why scores for this model cannot be right (nothing can match, or too much does), in plain words,
    /// one finding each; empty while all is well. What may change while the cause stays, such as names of
    /// endpoints, comes behind the first `: ` of a finding.
    /// Looked at from time to time, not per request.
    fn impediments(&self, served: &str) -> Vec<String>;
}
