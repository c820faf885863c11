//! An answer → what each row holds, or why it is no answer.
//!
//! Everything that the protocol promises is checked, so that a service that errs is taken for one that
//! is down, and never credits a pod with what it does not hold.

use tonic::Code;

use crate::{
    epp::{
        datalayer::Endpoint,
        precise::{Addressing, EndpointMatch, IndexError, remote::table::Joined},
    },
    proto::kvindexer as pb,
};

/// What a block may weigh at most. Weights of tiers are configured there and are 1 or less in any
/// configuration that makes sense; this much room is for those that scale them.
const MAX_WEIGHT: f64 = 100.0;

/// What was asked.
#[derive(Clone, Debug)]
pub(super) struct Asked<'a> {
    pub(super) addressing: &'a Addressing,
    /// Blocks of each prompt.
    pub(super) blocks: &'a [usize],
}

/// What a row holds, summed over prompts.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    depth: u32,
    confirmed: u32,
    score: f64,
    /// Number of the last prompt that named the row, from 1.
    named: usize,
}

/// An answer that was found to be one, by row.
#[derive(Debug)]
pub(super) struct Verdict(Vec<Held>);

/// Does the answer speak of these rows?
///
/// # Errors
///
/// What the service refuses; [`IndexError::Settings`] if it speaks of a slot table that is not this.
pub(super) fn judge(
    answer: &pb::ScoreResponse,
    asked: &Asked<'_>,
    joined: &Joined,
) -> Result<Verdict, IndexError> {
    let garbage = |what: String| Err(IndexError::Garbage(what));
    if let Some(error) = &answer.error {
        return Err(refusal(error));
    }
    let (fingerprint, rows) = (asked.addressing.scheme.fingerprint(), &*joined.rows);
    if answer.hash_fingerprint != fingerprint {
        return garbage(format!(
            "hash_fingerprint: {:#018x}, asked for {fingerprint:#018x}",
            answer.hash_fingerprint
        ));
    }
    if answer.prompts.len() != asked.blocks.len() {
        return garbage(format!(
            "prompts: {}, asked for {}",
            answer.prompts.len(),
            asked.blocks.len()
        ));
    }
    if answer.slot_table_version != rows.version {
        return Err(IndexError::Settings);
    }
    let mut held = vec![Held::default(); rows.rows.len()];
    for (number, (scores, &blocks)) in (1..).zip(answer.prompts.iter().zip(asked.blocks)) {
        let field = |name: &str| format!("prompts[{}].{name}", number - 1);
        if scores.total_blocks as usize != blocks {
            return garbage(format!(
                "{}: {}, asked for {blocks}",
                field("total_blocks"),
                scores.total_blocks
            ));
        }
        let size = asked.addressing.scheme.block_size();
        if scores.block_size != size {
            return garbage(format!(
                "{}: {}, asked for {size}",
                field("block_size"),
                scores.block_size
            ));
        }
        let Some(compact) = &scores.compact else {
            return garbage(format!("{}: absent", field("compact")));
        };
        let (slots, depths) = (&compact.slots, &compact.depths);
        let same = |len| len == 0 || len == slots.len();
        if depths.len() != slots.len()
            || !same(compact.scores.len())
            || !same(compact.confirmed.len())
        {
            return garbage(format!(
                "{}: {} slots, {} depths, {} scores, {} confirmed",
                field("compact"),
                slots.len(),
                depths.len(),
                compact.scores.len(),
                compact.confirmed.len()
            ));
        }
        for (at, (&slot, &depth)) in slots.iter().zip(depths).enumerate() {
            let field = |name: &str| format!("prompts[{}].compact.{name}[{at}]", number - 1);
            let Some(row) = rows.at_slot(slot) else {
                return garbage(format!("{}: {slot} is no pod's", field("slots")));
            };
            if rows.rows[row].model != asked.addressing.model {
                return garbage(format!("{}: a pod of another model", field("slots")));
            }
            let held = &mut held[row];
            if std::mem::replace(&mut held.named, number) == number {
                return garbage(format!("{}: {slot} is there twice", field("slots")));
            }
            if depth as usize > blocks {
                return garbage(format!("{}: {depth} of {blocks} blocks", field("depths")));
            }
            let confirmed = compact.confirmed.get(at).copied().unwrap_or(depth);
            if confirmed > depth {
                return garbage(format!("{}: {confirmed} of {depth}", field("confirmed")));
            }
            let score = compact.scores.get(at).copied().map_or(f64::from(depth), f64::from);
            // NaN is in no range.
            if !(0.0..=f64::from(depth) * MAX_WEIGHT).contains(&score) {
                return garbage(format!("{}: {score} for {depth} blocks", field("scores")));
            }
            held.depth = held.depth.saturating_add(depth);
            held.confirmed = held.confirmed.saturating_add(confirmed);
            held.score += score;
        }
    }
    Ok(Verdict(held))
}

/// What an error in an answer means.
fn refusal(error: &pb::Error) -> IndexError {
    match Code::from(error.code) {
        Code::Ok => IndexError::Garbage("error: with code 0".to_owned()),
        Code::FailedPrecondition => IndexError::Settings,
        Code::DeadlineExceeded => IndexError::Deadline,
        Code::Unavailable => IndexError::Disconnected,
        code => IndexError::Refused(format!("{code:?}: {}", error.message)),
    }
}

impl Verdict {
    /// Nothing is held, and nobody was asked.
    pub(super) fn nothing(joined: &Joined) -> Self {
        Self(vec![Held::default(); joined.rows.rows.len()])
    }

    /// What each endpoint holds: of its rows, the one with the highest score.
    pub(super) fn of(
        &self,
        joined: &Joined,
        endpoints: &[std::sync::Arc<Endpoint>],
    ) -> Vec<EndpointMatch> {
        let of = |endpoint: &Endpoint| {
            let owned = joined.of(endpoint)?;
            let rows = owned.rows.iter().filter_map(|&at| {
                Some((self.0.get(at as usize)?, joined.rows.rows.get(at as usize)?))
            });
            // The first of equals.
            let (held, row) = rows.reduce(|best, row| {
                let order =
                    row.0.score.total_cmp(&best.0.score).then(row.0.depth.cmp(&best.0.depth));
                if order.is_gt() { row } else { best }
            })?;
            Some(EndpointMatch {
                depth: held.depth,
                confirmed: held.confirmed,
                score: held.score,
                state: Some(row.state()),
            })
        };
        endpoints.iter().map(|endpoint| of(endpoint).unwrap_or_default()).collect()
    }
}

#[cfg(test)]
mod tests;
