//! The formula, its parameters, and what decided a pick.

use crate::{
    epp::{
        plugins::prefix::{MatchLength, fraction},
        precise::{EndpointMatch, RowState, accuracy::DecidedBy},
        scheduling::{PrefixMatches, Scored},
    },
    model::PodState,
    support::fields::Fields,
};

/// How matches become scores.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scoring {
    minmax: bool,
    length: MatchLength,
    min_tokens: u64,
    states: StateWeights,
}

/// How much of its score an endpoint keeps, by what its row can be trusted for.
#[derive(Clone, Copy, Debug, PartialEq)]
struct StateWeights {
    connecting: f64,
    replaying: f64,
    live: f64,
    partial: f64,
    degraded: f64,
    stale: f64,
}

impl Default for StateWeights {
    fn default() -> Self {
        Self { connecting: 1.0, replaying: 0.7, live: 1.0, partial: 1.0, degraded: 0.7, stale: 0.0 }
    }
}

impl StateWeights {
    fn read(fields: Fields<'_>) -> Self {
        let mut weights = Self::default();
        for (name, weight) in [
            ("connecting", &mut weights.connecting),
            ("replaying", &mut weights.replaying),
            ("live", &mut weights.live),
            ("partial", &mut weights.partial),
            ("degraded", &mut weights.degraded),
            ("stale", &mut weights.stale),
        ] {
            if let Some(given) = fraction(&fields, name) {
                *weight = given;
            }
        }
        fields.finish();
        weights
    }

    fn of(&self, row: Option<RowState>) -> f64 {
        match row {
            None => 0.0,
            Some(row) if row.stale => self.stale,
            Some(row) => match row.state {
                PodState::Connecting => self.connecting,
                PodState::Replaying => self.replaying,
                PodState::Live => self.live,
                PodState::Partial => self.partial,
                PodState::Degraded => self.degraded,
            },
        }
    }
}

impl Scoring {
    pub(super) fn read(params: &Fields<'_>) -> Self {
        let minmax = params.one_of("scoreNormalization", &[("absolute", false), ("minmax", true)]);
        Self {
            minmax: minmax.unwrap_or(false),
            length: MatchLength::read(params),
            min_tokens: params.integer("minMatchTokens", 0..=1 << 40).unwrap_or(0),
            states: StateWeights::read(params.mapping("stateWeights")),
        }
    }

    /// What counts of a match: nothing if its row cannot be trusted, or if it is shorter than
    /// `minMatchTokens`.
    pub(super) fn counted(&self, held: &EndpointMatch, block: u32) -> u32 {
        if self.states.of(held.state) > 0.0 { self.long_enough(held.depth, block) } else { 0 }
    }

    /// The blocks, or none if they are less than `minMatchTokens`.
    pub(super) fn long_enough(&self, blocks: u32, block: u32) -> u32 {
        if u64::from(blocks) * u64::from(block) < self.min_tokens { 0 } else { blocks }
    }

    /// Scores of the endpoints `among`. `rows` are empty where matches are approximate: then all are
    /// trusted, and of one tier.
    pub(super) fn score(
        &self,
        matches: &PrefixMatches,
        rows: &[EndpointMatch],
        among: &[usize],
        scores: &mut [f64],
    ) {
        if matches.total == 0 {
            return;
        }
        for (&endpoint, score) in among.iter().zip(scores.iter_mut()) {
            let depth = matches.matched.get(endpoint).copied().unwrap_or(0);
            if depth == 0 {
                continue;
            }
            let (weighted, trust) = match rows.get(endpoint) {
                Some(row) => (row.score, self.states.of(row.state)),
                None => (f64::from(depth), 1.0),
            };
            let tokens = f64::from(depth) * f64::from(matches.block);
            *score = trust * self.length.score(tokens, weighted / f64::from(matches.total));
        }
        if self.minmax {
            normalize(scores);
        }
    }
}

/// The worst becomes 0 and the best 1; all equal stay 0, or become 1.
fn normalize(scores: &mut [f64]) {
    let least = scores.iter().copied().fold(f64::INFINITY, f64::min);
    let most = scores.iter().copied().fold(0.0, f64::max);
    for score in scores {
        *score = match most - least {
            range if range > 0.0 => (*score - least) / range,
            _ if most > 0.0 => 1.0,
            _ => 0.0,
        };
    }
}

/// What decided a pick among `scored`; `held` are blocks, and `beyond` those of the best holder that
/// was left out because it is busy. Of a lone candidate: [`DecidedBy::Tie`].
pub(super) fn decided(
    scored: &[Scored],
    picked: usize,
    held: impl Fn(usize) -> u32,
    beyond: u32,
) -> DecidedBy {
    let mine = held(picked);
    let all = || scored.iter().map(|scored| held(scored.endpoint));
    if all().chain([beyond]).max().is_some_and(|most| most > mine) {
        return DecidedBy::Load;
    }
    if all().any(|other| other < mine) {
        return DecidedBy::Prefix;
    }
    let best = scored.iter().map(|scored| scored.score).fold(f64::NEG_INFINITY, f64::max);
    let equals = scored.iter().filter(|scored| scored.score == best).count();
    if scored.len() > 1 && equals == 1 { DecidedBy::Load } else { DecidedBy::Tie }
}
