//! `ListPods`, and how a row reads in the API.

use std::sync::Arc;

use crate::{
    hash::Scheme,
    index::PodUsage,
    indexer::service::Inner,
    ingest::fleet::{Progress, Row, RowStatus, Table},
    model::{PodState, TierId},
    proto::kvindexer as pb,
};

impl Inner {
    /// Every row, and the hash settings.
    pub(super) fn list_pods(&self) -> pb::ListPodsResponse {
        let table = self.fleet.table();
        let models = &self.config.models;
        let mut listed: Vec<pb::ModelHash> = models
            .listed
            .iter()
            .map(|(model, scheme)| pb::ModelHash {
                model: model.clone(),
                hash: Some(hash_info(scheme)),
            })
            .collect();
        listed.sort_by(|a, b| a.model.cmp(&b.model));
        pb::ListPodsResponse {
            pods: table.rows.iter().map(|row| self.pod_status(&table, row)).collect(),
            hash: Some(hash_info(&models.default)),
            models: listed,
            slot_table_version: table.version,
            aliases: models.aliases.clone(),
        }
    }

    /// The full status of a row.
    pub(super) fn pod_status(&self, table: &Table, row: &Arc<Row>) -> pb::PodStatus {
        let usage = self.fleet.index().pod_usage(row.slot);
        let progress = row.now();
        status_of(table.version, row, progress, row.status(), Some((&usage, self)))
    }
}

/// The status without what the index holds, when `usage` is absent.
pub(super) fn status_of(
    version: u64,
    row: &Row,
    progress: Progress,
    status: RowStatus,
    usage: Option<(&PodUsage, &Inner)>,
) -> pb::PodStatus {
    let mut answer = pb::PodStatus {
        pod: row.id.pod.to_string(),
        dp_rank: row.id.rank,
        model: row.model.to_string(),
        endpoint: row.endpoint.to_string(),
        state: proto_state((status.state, status.stale)).into(),
        may_undercount: status.may_undercount(),
        may_overcount: status.may_overcount(),
        applied_sequence: progress.applied,
        seen_sequence: status.seen,
        epoch: progress.epoch,
        lag_us: status.lag_us,
        gaps: status.gaps,
        replays: status.replays,
        orphans: status.orphans,
        rejected_events: status.rejected_events,
        slot: row.slot.0,
        slot_table_version: version,
        reason: status.reason,
        ..pb::PodStatus::default()
    };
    if let Some((usage, inner)) = usage {
        answer.blocks = usage.blocks;
        answer.unconfirmed_blocks = usage.unconfirmed;
        let tiers = (0_u8..).zip(&usage.blocks_by_tier).filter(|&(_, &blocks)| blocks > 0);
        answer.blocks_by_tier = tiers
            .map(|(tier, &blocks)| pb::TierBlocks {
                tier: inner.tiers.name(TierId(tier)).to_string(),
                blocks,
            })
            .collect();
    }
    answer
}

/// State and stale overlay as the API names them: the overlay hides the state beneath.
pub(super) fn proto_state((state, stale): (PodState, bool)) -> pb::PodState {
    if stale {
        return pb::PodState::Stale;
    }
    match state {
        PodState::Connecting => pb::PodState::Connecting,
        PodState::Replaying => pb::PodState::Replaying,
        PodState::Live => pb::PodState::Live,
        PodState::Partial => pb::PodState::Partial,
        PodState::Degraded => pb::PodState::Degraded,
    }
}

fn hash_info(scheme: &Scheme) -> pb::HashInfo {
    pb::HashInfo {
        algorithm: scheme.algorithm().as_str().to_owned(),
        block_size: scheme.block_size(),
        seed: scheme.seed().to_owned(),
        fingerprint: scheme.fingerprint(),
    }
}
