//! `Speculate` and `Unspeculate`.
//!
//! # Rank
//!
//! Without `dp_rank` every row of the pod is marked: a router that does not choose the rank scores
//! the pod by the maximum over its ranks, which is then right whichever rank gets the request. The
//! rank that stores the blocks confirms them; the others' marks end with their time.
//!
//! # Handles that have gone
//!
//! Taking back a handle that has expired is no error, for what it asks is so already. Extending one
//! is NOT_FOUND, for its blocks are no longer marked.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    indexer::{
        ScoreError,
        service::{
            Inner,
            request::{Prepared, Text, check_pod},
        },
    },
    proto::kvindexer as pb,
};

impl Inner {
    pub(super) async fn speculate(
        &self,
        request: pb::SpeculateRequest,
        arrival: Instant,
        call: Option<Instant>,
    ) -> Result<pb::SpeculateResponse, ScoreError> {
        check_pod(&self.config, &request.pod, || "pod".to_owned())?;
        let ttl = self.ttl("ttl_ms", request.ttl_ms)?;
        let score = request.request.ok_or_else(|| ScoreError::invalid("request", "is missing"))?;
        if score.prompts.is_empty() {
            return Err(ScoreError::invalid("request.prompts", "at least one prompt is needed"));
        }
        let text = Text::Allowed(self.tokenizer.as_ref());
        let prepared = Prepared::new(&self.config, score, arrival, call, text)
            .await
            .map_err(|error| error.within("request"))?;
        let rows = self.rows_of(&request.pod, request.dp_rank)?;
        let slots: Vec<_> = rows.iter().map(|row| row.slot).collect();
        let handle = self.speculations.add(&slots, prepared.prompts, ttl)?;
        // A row that went meanwhile may have left its slot to another pod.
        let table = self.fleet.table();
        let here = |row| table.slot(slot_of(row)).is_some_and(|now| Arc::ptr_eq(now, row));
        if !rows.iter().all(here) {
            self.speculations.take_back(handle);
            return Err(ScoreError::UnknownPod { pod: crate::indexer::error::echo(&request.pod) });
        }
        Ok(pb::SpeculateResponse { handle })
    }

    pub(super) fn unspeculate(
        &self,
        request: &pb::UnspeculateRequest,
    ) -> Result<pb::UnspeculateResponse, ScoreError> {
        let handle = request.handle;
        if handle == 0 {
            return Err(ScoreError::invalid("handle", "must not be 0"));
        }
        if request.extend_ms == 0 {
            self.speculations.take_back(handle);
        } else {
            let ttl = self.ttl("extend_ms", request.extend_ms)?;
            if !self.speculations.extend(handle, ttl) {
                return Err(ScoreError::UnknownHandle { handle });
            }
        }
        Ok(pb::UnspeculateResponse {})
    }

    fn ttl(&self, field: &str, ms: u32) -> Result<Duration, ScoreError> {
        let (ttl, limit) = (Duration::from_millis(ms.into()), self.config.max_speculation_ttl);
        if ttl.is_zero() || ttl > limit {
            let why = format!("{ms} is not between 1 and {}", limit.as_millis());
            return Err(ScoreError::invalid(field, why));
        }
        Ok(ttl)
    }
}

fn slot_of(row: &Arc<crate::ingest::fleet::Row>) -> crate::model::PodSlot {
    row.slot
}
