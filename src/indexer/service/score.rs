//! Block keys → scores: lookup, and the rows of the answer.

use std::{cmp::Ordering, sync::Arc};

use prost::Message;
use tokio::time::Instant;

use crate::{
    index::Match,
    indexer::{
        ScoreError,
        service::{
            Inner,
            pods::proto_state,
            request::{Prepared, TURN_TOKENS},
        },
    },
    ingest::fleet::{Row, Table},
    model::{RequestKey, TierTable},
    proto::kvindexer as pb,
};

/// Tier name of speculative entries.
const SPECULATIVE: &str = "speculative";

/// A row of the answer and how much of the prompt it holds.
#[derive(Clone, Copy, Debug)]
struct Scored<'a> {
    /// The pod as it was asked for; empty when none was.
    pod: &'a str,
    /// Absent: no such pod.
    row: Option<&'a Arc<Row>>,
    /// Absent: not even the first block.
    found: Option<&'a Match>,
}

impl Inner {
    /// Answers a prepared request; gives other calls a turn now and then.
    pub(super) async fn score(&self, request: &Prepared) -> Result<pb::ScoreResponse, ScoreError> {
        let count = request.prompts.len();
        let table = self.fleet.table();
        let mut response = pb::ScoreResponse {
            request_id: request.request_id,
            prompts: Vec::with_capacity(count),
            hash_fingerprint: request.head.fingerprint,
            slot_table_version: table.version,
            ..pb::ScoreResponse::default()
        };
        let limit = self.config.max_message_bytes;
        let (mut found, mut bytes, mut since_turn) = (Vec::new(), response.encoded_len(), 0_usize);
        for (done, keys) in request.prompts.iter().enumerate() {
            request.head.in_time(done, count)?;
            let scores = self.score_prompt(request, &table, keys, &mut found);
            let size = scores.encoded_len();
            // One byte says which field it is.
            bytes += 1 + prost::length_delimiter_len(size) + size;
            if bytes > limit {
                return Err(ScoreError::AnswerTooLarge { bytes, limit });
            }
            response.prompts.push(scores);
            since_turn += keys.len().saturating_mul(request.head.scheme.block_size() as usize);
            if since_turn >= TURN_TOKENS {
                since_turn = 0;
                tokio::task::yield_now().await;
            }
        }
        debug_assert_eq!(bytes, response.encoded_len());
        Ok(response)
    }

    /// Scores one prompt. `found` is overwritten and can be reused.
    fn score_prompt(
        &self,
        request: &Prepared,
        table: &Table,
        keys: &[RequestKey],
        found: &mut Vec<Match>,
    ) -> pb::PromptScores {
        let head = &request.head;
        let tiers = head.detail == pb::ScoreDetail::Unspecified;
        self.look_up(table, &head.model, keys, tiers, found);
        let mut scores = pb::PromptScores {
            total_blocks: keys.len() as u32,
            block_size: head.scheme.block_size(),
            ..pb::PromptScores::default()
        };
        let asked = !request.pods.is_empty();
        let mut rows = if asked {
            requested(table, &request.pods, found)
        } else {
            let held = found.iter();
            held.map(|found| Scored { pod: "", row: table.slot(found.slot), found: Some(found) })
                .collect()
        };
        if !asked || request.max_pods > 0 {
            keep_best(&mut rows, request.max_pods);
        }
        let best = rows.iter().filter_map(|row| Some(row.found?.depth)).max().unwrap_or(0);
        if head.detail == pb::ScoreDetail::Compact {
            scores.compact = Some(compact(&rows));
        } else {
            let row = |scored: &Scored<'_>| match scored.row {
                Some(row) => pod_score(&self.tiers, row, scored.found, tiers),
                None => pb::PodScore { pod: scored.pod.to_owned(), ..pb::PodScore::default() },
            };
            scores.pods = rows.iter().map(row).collect();
        }
        self.metrics.prompt(keys.len(), best);
        scores
    }

    /// The rows of `model` that hold a prefix of `keys`, in slot order.
    pub(super) fn look_up(
        &self,
        table: &Table,
        model: &str,
        keys: &[RequestKey],
        tiers: bool,
        found: &mut Vec<Match>,
    ) {
        found.clear();
        if keys.is_empty() {
            return;
        }
        let start = Instant::now();
        self.fleet.look_up(table, model, keys, tiers, found);
        self.metrics.looked_up(start.elapsed());
    }
}

/// One entry for each row of each requested pod, in order; `found` is in slot order.
fn requested<'a>(table: &'a Table, pods: &'a [String], found: &'a [Match]) -> Vec<Scored<'a>> {
    let mut rows = Vec::with_capacity(pods.len());
    for pod in pods {
        let known = table.pod(pod);
        if known.is_empty() {
            rows.push(Scored { pod, row: None, found: None });
        }
        rows.extend(known.iter().map(|row| {
            let at = found.binary_search_by_key(&row.slot, |found| found.slot).ok();
            Scored { pod, row: Some(row), found: at.and_then(|at| found.get(at)) }
        }));
    }
    rows
}

/// Best first: by score, then by depth, then by slot, so that equal answers have equal order.
/// Rows without a match come last.
fn better(a: &Scored<'_>, b: &Scored<'_>) -> Ordering {
    match (a.found, b.found) {
        (Some(a), Some(b)) => {
            b.score.total_cmp(&a.score).then(b.depth.cmp(&a.depth)).then(a.slot.cmp(&b.slot))
        }
        (a, b) => b.is_some().cmp(&a.is_some()),
    }
}

/// Sorts and keeps the first `most`; 0 keeps all.
fn keep_best(rows: &mut Vec<Scored<'_>>, most: usize) {
    if most > 0 && most < rows.len() {
        rows.select_nth_unstable_by(most, better);
        rows.truncate(most);
    }
    rows.sort_by(better);
}

/// Parallel arrays. An unknown pod has no slot, so it is absent.
fn compact(rows: &[Scored<'_>]) -> pb::CompactScores {
    let mut compact = pb::CompactScores {
        slots: Vec::with_capacity(rows.len()),
        depths: Vec::with_capacity(rows.len()),
        scores: Vec::with_capacity(rows.len()),
        confirmed: Vec::with_capacity(rows.len()),
    };
    let (mut plain, mut sure) = (true, true);
    for (row, found) in rows.iter().filter_map(|scored| Some((scored.row?, scored.found))) {
        let (depth, score, confirmed) =
            found.map_or((0, 0.0, 0), |found| (found.depth, found.score, found.confirmed));
        compact.slots.push(row.slot.0);
        compact.depths.push(depth);
        compact.scores.push(score as f32);
        compact.confirmed.push(confirmed);
        plain &= score == f64::from(depth);
        sure &= confirmed == depth;
    }
    if plain {
        compact.scores.clear();
    }
    if sure {
        compact.confirmed.clear();
    }
    compact
}

/// The answer's row; without a match, depth 0.
pub(super) fn pod_score(
    names: &TierTable,
    row: &Row,
    found: Option<&Match>,
    tiers: bool,
) -> pb::PodScore {
    let mut score = pb::PodScore {
        pod: row.id.pod.to_string(),
        dp_rank: row.id.rank,
        state: proto_state(row.trust()).into(),
        ..pb::PodScore::default()
    };
    let Some(found) = found else { return score };
    score.score = found.score;
    score.depth = found.depth;
    score.confirmed_depth = found.confirmed;
    if tiers {
        let named = |&(tier, depth)| pb::TierDepth { tier: names.name(tier).to_string(), depth };
        score.tiers = found.tiers.iter().map(named).collect();
        if found.speculative > 0 {
            let tier = SPECULATIVE.to_owned();
            score.tiers.push(pb::TierDepth { tier, depth: found.speculative });
        }
    }
    score
}
