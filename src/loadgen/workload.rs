//! What is asked: prompts with prefixes in common, their lengths, and the order in which they come.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`arrivals`] | when: constant, Poisson, gamma, on/off, bursts |
//! | [`lengths`] | how long: fixed, uniform, normal, lognormal |
//! | [`groups`] | who shares what: groups, turns, popularity; the losing workloads |
//! | [`trace`] | recorded traffic: Mooncake and Azure files, a generator, theoretical hit rates |
//! | [`body`] | a prompt as the body of a request: token ids, text, or a chat |
//!
//! # Model
//!
//! A prompt is a list of [`Part`]s. A part's tokens are a function of its seed and its length, and of
//! nothing else, so two prompts that begin with the same parts begin with the same tokens, a plan of a
//! million requests is small, and what could be reused at best is known before anything is sent.
//! Everything here is pure: equal seeds give equal plans.

pub mod arrivals;
pub mod body;
pub mod groups;
pub mod lengths;
pub mod trace;

use std::{sync::Arc, time::Duration};

pub use self::{
    arrivals::{Arrival, Arrivals},
    body::{BodyForm, BodyWriter},
    groups::Workload,
    lengths::Lengths,
};

/// A stretch of tokens that prompts can have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// What its tokens are made from.
    pub seed: u64,
    /// How many, at least 1.
    pub tokens: u32,
}

/// A prompt, from its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prompt {
    /// In order; not empty.
    pub parts: Arc<[Part]>,
}

impl Prompt {
    /// How long it is, tokens.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.parts.iter().map(|part| u64::from(part.tokens)).sum()
    }
}

/// A request that follows on the answer to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct After {
    /// Index, in the same plan, of the request whose answer has to be complete; a smaller one.
    pub request: u32,
    /// What passes between that answer's end and this request's intended arrival.
    pub think: Duration,
}

/// A request of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// When it is meant to be sent, from the start of the run; `None` in closed loops, where it is sent
    /// as soon as there is a place. With `after` the later of both holds.
    pub at: Option<Duration>,
    /// Which burst it belongs to, from 0.
    pub burst: Option<u32>,
    /// What is asked.
    pub prompt: Prompt,
    /// Tokens of the answer, at least 1.
    pub max_tokens: u32,
    /// Who shares a first part, from 0.
    pub group: u32,
    /// The turn before it, for conversations.
    pub after: Option<After>,
}

/// Requests and when they come; the same for every arm of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// By `at`, where that is given.
    pub requests: Arc<[Planned]>,
}

impl Plan {
    /// Gives the requests these arrivals, one after the other; the shorter of both ends it. Turns of a
    /// conversation whose first turn is there keep coming by `after`.
    #[must_use]
    pub fn open(mut requests: Vec<Planned>, arrivals: &[Arrival]) -> Self {
        requests.truncate(arrivals.len());
        for (request, arrival) in requests.iter_mut().zip(arrivals) {
            request.at = Some(arrival.at);
            request.burst = arrival.burst;
        }
        Self { requests: requests.into() }
    }

    /// Without arrivals: for closed loops.
    #[must_use]
    pub fn closed(requests: Vec<Planned>) -> Self {
        Self { requests: requests.into() }
    }
}
