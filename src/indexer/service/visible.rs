//! `WaitVisible`: until a pod's events up to a sequence can be seen by `Score`.
//!
//! # Reached
//!
//! `reached` is said only of the epoch that was asked for (absent: the current one on arrival), and
//! only while it lasts: what an older life of the publisher had applied is not remembered, and its
//! blocks are gone. A newer epoch therefore ends the wait with `reached = false` and names itself in
//! `epoch`; an epoch that has not come yet is waited for.
//!
//! # Rows that are not known whole
//!
//! Until its first message tells rank and model, a pod has a provisional row, which then gives way
//! to the final one. A wait goes on there, as nothing was applied before.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    indexer::{
        ScoreError,
        service::{Inner, request::check_pod},
    },
    ingest::fleet::{Progress, Row},
    proto::kvindexer as pb,
};

/// How long a provisional row's successor may take to appear.
const GIVE_WAY: Duration = Duration::from_millis(100);

impl Inner {
    /// Waits as the module says. `call` is the call's own deadline, which ends the wait with
    /// DEADLINE_EXCEEDED where `timeout_ms` ends it with an answer.
    pub(super) async fn wait_visible(
        &self,
        request: &pb::WaitVisibleRequest,
        arrival: Instant,
        call: Option<Instant>,
    ) -> Result<pb::WaitVisibleResponse, ScoreError> {
        check_pod(&self.config, &request.pod, || "pod".to_owned())?;
        let mut changes = self.fleet.changes();
        let mut row = self.only_row(&request.pod, request.dp_rank)?;
        let mut progress = row.progress();
        let wanted = match request.epoch.unwrap_or_default() {
            0 => progress.borrow().epoch,
            epoch => epoch,
        };
        let end = arrival + Duration::from_millis(request.timeout_ms.into());
        loop {
            let now = *progress.borrow_and_update();
            let answer = answer_of(&row, now, wanted, request.sequence);
            if answer.reached || now.epoch > wanted || Instant::now() >= end {
                return Ok(answer);
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(ScoreError::ShuttingDown),
                // Row and fleet hold their own senders, so these end only with a change.
                _ = progress.changed() => {}
                _ = changes.changed() => {
                    let here = self.fleet.table().slot(row.slot)
                        .is_some_and(|now| Arc::ptr_eq(now, &row));
                    if !here {
                        row = self.successor(&row, request).await?;
                        progress = row.progress();
                    }
                }
                () = tokio::time::sleep_until(call.map_or(end, |call| call.min(end))) => {
                    if call.is_some_and(|call| call < end) {
                        return Err(ScoreError::WaitDeadline);
                    }
                }
            }
        }
    }

    /// The row that `old`, which has gone, gave way to.
    async fn successor(
        &self,
        old: &Row,
        request: &pb::WaitVisibleRequest,
    ) -> Result<Arc<Row>, ScoreError> {
        let gone = || ScoreError::UnknownPod { pod: old.id.to_string() };
        // A row that had applied something is final: it was removed.
        if old.now().applied.is_some() {
            return Err(gone());
        }
        // The old row leaves the table shortly before the new one enters it.
        let until = Instant::now() + GIVE_WAY;
        loop {
            match self.only_row(&request.pod, request.dp_rank) {
                Err(ScoreError::UnknownPod { .. }) if Instant::now() < until => {
                    tokio::time::sleep(GIVE_WAY / 20).await;
                }
                Err(ScoreError::UnknownPod { .. }) => return Err(gone()),
                found => return found,
            }
        }
    }

    /// The row of a pod and rank; without a rank, the pod's only row.
    pub(super) fn only_row(&self, pod: &str, rank: Option<u32>) -> Result<Arc<Row>, ScoreError> {
        let rows = self.rows_of(pod, rank)?;
        match <[Arc<Row>; 1]>::try_from(rows) {
            Ok([row]) => Ok(row),
            Err(rows) => {
                let ranks: Vec<String> = rows
                    .iter()
                    .map(|row| row.id.rank.map_or_else(|| "none".to_owned(), |r| r.to_string()))
                    .collect();
                let why = format!("the pod has several rows, name one: {}", ranks.join(", "));
                Err(ScoreError::invalid("dp_rank", why))
            }
        }
    }

    /// The rows of a pod, or the one of a rank; never empty.
    pub(super) fn rows_of(
        &self,
        pod: &str,
        rank: Option<u32>,
    ) -> Result<Vec<Arc<Row>>, ScoreError> {
        let table = self.fleet.table();
        let mut rows = table.pod(pod).to_vec();
        if rank.is_some() {
            rows.retain(|row| row.id.rank == rank);
        }
        if rows.is_empty() {
            let pod = crate::indexer::error::echo(pod);
            let pod = rank.map_or_else(|| pod.clone(), |rank| format!("{pod}#{rank}"));
            return Err(ScoreError::UnknownPod { pod });
        }
        Ok(rows)
    }
}

fn answer_of(row: &Row, now: Progress, wanted: u64, sequence: u64) -> pb::WaitVisibleResponse {
    let reached = now.epoch == wanted && now.applied.is_some_and(|applied| applied >= sequence);
    let visible_unix_ns = if reached { row.visible_since(sequence) } else { 0 };
    // The history belongs to the current epoch; one that began meanwhile says nothing of ours.
    let same = row.now().epoch == now.epoch;
    pb::WaitVisibleResponse {
        applied_sequence: now.applied.unwrap_or_default(),
        visible_unix_ns: if same { visible_unix_ns } else { 0 },
        reached,
        epoch: now.epoch,
    }
}
