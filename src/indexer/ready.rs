//! When the service is ready.
//!
//! # Rule
//!
//! Ready once every pod that was known at start is live, partial or degraded, or once the timeout
//! has passed. Each pod counts once it has been so, whatever becomes of it later; a pod that comes
//! later, is idle or unreachable never takes readiness away, and neither does one that was removed.
//! Only the end of the service does.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    ingest::fleet::Fleet,
    model::{PodState, RowId},
};

/// Which pods are still waited for.
#[derive(Debug)]
pub struct Readiness {
    pending: Vec<Pending>,
    deadline: Instant,
    ready: bool,
}

#[derive(Debug)]
struct Pending {
    /// Without a rank: the whole pod.
    id: RowId,
    /// It had a row before, so having none now means that it was removed.
    seen: bool,
}

impl Readiness {
    /// Waits for `known`, at most until `deadline`.
    #[must_use]
    pub fn new(known: impl IntoIterator<Item = RowId>, deadline: Instant) -> Self {
        let known: HashSet<RowId> = known.into_iter().collect();
        let pending = known.into_iter().map(|id| Pending { id, seen: false }).collect();
        Self { pending, deadline, ready: false }
    }

    /// Takes the rows as they are now; true from the first time that the rule holds.
    pub fn observe(&mut self, now: Instant, rows: &[(RowId, PodState)]) -> bool {
        if !self.ready {
            self.pending.retain_mut(|pending| pending.still(rows));
            self.ready = self.pending.is_empty() || now >= self.deadline;
        }
        self.ready
    }

    /// Pods that are still waited for, for logs.
    pub fn pending(&self) -> impl Iterator<Item = &RowId> {
        self.pending.iter().map(|pending| &pending.id)
    }
}

impl Pending {
    fn still(&mut self, rows: &[(RowId, PodState)]) -> bool {
        let wanted = &self.id;
        let mut own = rows
            .iter()
            .filter(|(id, _)| {
                id.pod == wanted.pod && (wanted.rank.is_none() || id.rank == wanted.rank)
            })
            .map(|&(_, state)| {
                matches!(state, PodState::Live | PodState::Partial | PodState::Degraded)
            })
            .peekable();
        let present = own.peek().is_some();
        let settled = if present { own.all(|settled| settled) } else { self.seen };
        self.seen |= present;
        !settled
    }
}

/// Sets `ready` to true when the rule holds and back to false at `stop`. `known` are the pods known
/// at start beside the rows that the fleet has already; those without a rank stand for all of the
/// pod's rows.
///
/// # Errors
///
/// None; the type is that of supervised tasks.
pub async fn run(
    fleet: Arc<Fleet>,
    known: Vec<RowId>,
    timeout: Duration,
    ready: watch::Sender<bool>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut changes = fleet.changes();
    let table = fleet.table();
    // Whether anybody still declares a row of a snapshot, nobody knows.
    let at_start = table.rows.iter().filter(|row| !row.status().restored);
    let at_start = at_start.map(|row| row.id.clone()).collect::<Vec<_>>();
    let deadline = Instant::now() + timeout;
    let mut readiness = Readiness::new(known.into_iter().chain(at_start), deadline);
    loop {
        changes.mark_unchanged();
        let table = fleet.table();
        let rows: Vec<(RowId, PodState)> =
            table.rows.iter().map(|row| (row.id.clone(), row.status().state)).collect();
        if readiness.observe(Instant::now(), &rows) {
            break;
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            _ = changes.changed() => {}
            () = tokio::time::sleep_until(deadline) => {}
        }
    }
    let pending: Vec<String> = readiness.pending().map(ToString::to_string).collect();
    if pending.is_empty() {
        tracing::info!(rows = fleet.table().rows.len(), "Ready.");
    } else {
        tracing::warn!(pending = %pending.join(", "), "Ready by timeout; some pods are not.");
    }
    ready.send_replace(true);
    stop.cancelled().await;
    ready.send_replace(false);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pod: &str, rank: Option<u32>) -> RowId {
        RowId { pod: pod.into(), rank }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rule() {
        let now = Instant::now();
        let deadline = now + Duration::from_secs(10);
        let ready = |known: &[RowId]| Readiness::new(known.iter().cloned(), deadline);
        let (a, b) = (row("a", None), row("b", None));

        assert!(ready(&[]).observe(now, &[]), "nothing to wait for");

        let mut both = ready(&[a.clone(), b.clone()]);
        assert!(!both.observe(now, &[]));
        assert!(
            !both.observe(now, &[(a.clone(), PodState::Live), (b.clone(), PodState::Connecting)])
        );
        assert_eq!(both.pending().collect::<Vec<_>>(), [&b]);
        let later = [(a.clone(), PodState::Connecting), (b.clone(), PodState::Partial)];
        assert!(both.observe(now, &later), "a was live once");
        let worse = [(b.clone(), PodState::Replaying), (row("c", None), PodState::Connecting)];
        assert!(both.observe(now, &worse), "never taken away");

        let mut slow = ready(std::slice::from_ref(&a));
        assert!(!slow.observe(deadline - Duration::from_millis(1), &[]));
        assert!(slow.observe(deadline, &[]), "timeout");

        let mut removed = ready(std::slice::from_ref(&a));
        assert!(!removed.observe(now, &[(a.clone(), PodState::Connecting)]));
        assert!(removed.observe(now, &[]), "a removed pod is not waited for");

        let mut ranks = ready(&[a, row("b", Some(1))]);
        let rows = [
            (row("a", Some(0)), PodState::Degraded),
            (row("a", Some(1)), PodState::Replaying),
            (row("b", Some(0)), PodState::Connecting),
            (row("b", Some(1)), PodState::Live),
        ];
        assert!(!ranks.observe(now, &rows), "all rows of a, only rank 1 of b");
        assert_eq!(ranks.pending().count(), 1);
    }
}
