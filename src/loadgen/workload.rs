//! What is asked: prompts with prefixes in common, their lengths, and the order in which they come.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`arrivals`] | when: constant, Poisson, gamma, on/off, bursts |
//! | [`lengths`] | how long: fixed, uniform, normal, lognormal |
//! | [`groups`] | who shares what: groups, turns, popularity; the losing workloads |
//! | [`trace`] | recorded traffic: Mooncake and Azure files, a generator, theoretical hit rates |
//! | [`body`] | a prompt as the body of a request: token ids, text, or a chat |
//! | [`hits`] | what a cache could reuse at best |
//! | `random`, `text` | draws and seeds; the text form of all this |
//!
//! # Model
//!
//! A prompt is a list of [`Part`]s. A part's tokens are a function of its seed and its length, and of
//! nothing else, so two prompts that begin with the same parts begin with the same tokens, a plan of a
//! million requests is small, and what could be reused at best is known before anything is sent.
//! Everything here is pure, but for the reading of files: equal seeds give equal plans.

pub mod arrivals;
pub mod body;
pub mod groups;
pub mod hits;
pub mod lengths;
mod random;
mod text;
pub mod trace;

use std::{sync::Arc, time::Duration};

pub use self::{
    arrivals::{Arrival, Arrivals},
    body::{BodyForm, BodyWriter},
    groups::Workload,
    hits::{IdealHits, ideal_hits},
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
    /// Gives the requests these arrivals, one after the other; the shorter of both ends it. Later turns
    /// of a conversation take none: they come by [`Planned::after`], and only if their first turn does.
    #[must_use]
    pub fn open(requests: Vec<Planned>, arrivals: &[Arrival]) -> Self {
        let mut arrivals = arrivals.iter();
        // Where in the plan each request is.
        let mut places: Vec<Option<u32>> = Vec::with_capacity(requests.len());
        let mut planned: Vec<Planned> = Vec::with_capacity(requests.len());
        for mut request in requests {
            let before = request.after.and_then(|after| {
                let place = places.get(after.request as usize).copied().flatten()?;
                Some(After { request: place, ..after })
            });
            let comes = match (request.after, before, arrivals.as_slice().first()) {
                (Some(_), Some(after), _) => {
                    request.after = Some(after);
                    true
                }
                (None, _, Some(arrival)) => {
                    arrivals.next();
                    (request.at, request.burst) = (Some(arrival.at), arrival.burst);
                    true
                }
                _ => false,
            };
            places.push(comes.then(|| u32::try_from(planned.len()).unwrap_or(u32::MAX)));
            if comes {
                planned.push(request);
            }
        }
        Self { requests: planned.into() }
    }

    /// Without arrivals: for closed loops.
    #[must_use]
    pub fn closed(requests: Vec<Planned>) -> Self {
        Self { requests: requests.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_turns_come_by_the_turn_before_them() {
        let chat: Workload = "chat:sessions=2,turns=3,think=1s".parse().unwrap();
        let arrivals: Vec<Arrival> =
            (1..=3).map(|n| Arrival { at: Duration::from_secs(n), burst: None }).collect();
        let plan = Plan::open(chat.requests(1, 12), &arrivals);
        let times: Vec<_> = plan.requests.iter().map(|it| it.at.map(|at| at.as_secs())).collect();
        // The fourth conversation has no arrival; the third one's turns close ranks.
        let [some, none] = [Some, |_| None];
        assert_eq!(
            times,
            [some(1), some(2), none(0), none(0), none(0), none(0), some(3), none(0), none(0)]
        );
        let after: Vec<_> = plan.requests.iter().map(|it| it.after.map(|it| it.request)).collect();
        assert_eq!(after, [None, None, Some(0), Some(1), Some(2), Some(3), None, Some(6), Some(7)]);
    }

    #[test]
    fn the_shorter_of_requests_and_arrivals_ends_a_plan() {
        let unique: Workload = "unique:prompt=5,output=1".parse().unwrap();
        let arrivals =
            [Duration::ZERO, Duration::from_secs(1)].map(|at| Arrival { at, burst: Some(3) });
        let plan = Plan::open(unique.requests(1, 5), &arrivals);
        assert_eq!(plan.requests.len(), 2);
        assert_eq!(plan.requests[1].at, Some(Duration::from_secs(1)));
        assert_eq!(plan.requests[1].burst, Some(3));
        assert_eq!(Plan::open(unique.requests(1, 1), &arrivals).requests.len(), 1);
        assert!(Plan::open(unique.requests(1, 1), &[]).requests.is_empty());
    }
}
