//! What a storm published and is not applied yet, and how long bursts take to drain.
//!
//! A publisher's backlog is what it had sent before `ListPods` was asked minus what the answer says is
//! applied. A burst is drained when `WaitVisible` has answered for the last message that each
//! publisher sent in it.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    Board, Client, PATIENCE, PodHandle, call,
    storm::play::{Burst, Ledger},
};
use crate::{loadgen::progress::Progress, proto::kvindexer::ListPodsRequest, support::sync::lock};

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(10);
/// Points of the series at most.
const MOST_POINTS: usize = 200_000;

type Target = (PodHandle, Arc<Mutex<Ledger>>);

/// What was seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Largest backlog, batches, all publishers together.
    pub(super) most_batches: u64,
    /// Largest age of a batch that was not applied.
    pub(super) oldest: Duration,
    /// Backlog by time; only changes.
    pub(super) series: Vec<[f64; 2]>,
}

/// What is known of a publisher's lives.
#[derive(Clone, Copy, Debug, Default)]
struct Lives {
    life: u64,
    /// Epoch of the indexer's last answer.
    epoch: u64,
    /// Answers of this epoch are about an earlier life.
    stale_epoch: Option<u64>,
}

/// Looks until `quiet`, and tells `progress` meanwhile.
pub(super) async fn watch(
    targets: &[Target],
    (origin, progress): (Instant, Option<&Progress>),
    client: Client,
    quiet: &CancellationToken,
    seen: &mut Seen,
) -> anyhow::Result<()> {
    let tell = |batches| progress.map_or((), |progress| progress.set_backlog(batches));
    let outcome = look(targets, origin, client, quiet, seen, tell).await;
    // Nobody looks any more.
    tell(None);
    outcome
}

async fn look(
    targets: &[Target],
    origin: Instant,
    mut client: Client,
    quiet: &CancellationToken,
    seen: &mut Seen,
    tell: impl Fn(Option<u64>),
) -> anyhow::Result<()> {
    let mut lives = vec![Lives::default(); targets.len()];
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = quiet.cancelled() => return Ok(()),
            _ = ticks.tick() => {}
        }
        let sent: Vec<(u64, u64)> = targets
            .iter()
            .map(|(_, ledger)| {
                let ledger = lock(ledger);
                (ledger.life, ledger.next)
            })
            .collect();
        let rows = call("ListPods", client.list_pods(ListPodsRequest {})).await?;
        let now = Instant::now();
        let mut batches = 0;
        for (((pod, ledger), lives), (life, next)) in targets.iter().zip(&mut lives).zip(sent) {
            let Some(row) = rows.pods.iter().find(|row| row.pod == pod.name) else { continue };
            if life != lives.life {
                lives.life = life;
                lives.stale_epoch = Some(lives.epoch);
            }
            lives.epoch = row.epoch;
            let is_old = lives.stale_epoch.is_some_and(|stale| row.epoch <= stale);
            let applied = row.applied_sequence.filter(|_| !is_old);
            let mut ledger = lock(ledger);
            if ledger.life != life {
                continue;
            }
            while ledger.pending.front().is_some_and(|(at, _)| Some(*at) <= applied) {
                ledger.pending.pop_front();
            }
            batches += next.saturating_sub(applied.map_or(0, |applied| applied + 1));
            if let Some((_, sent)) = ledger.pending.front().filter(|(at, _)| *at < next) {
                seen.oldest = seen.oldest.max(now.saturating_duration_since(*sent));
            }
        }
        tell(Some(batches));
        seen.most_batches = seen.most_batches.max(batches);
        let changed = seen.series.last().is_none_or(|[_, last]| *last != batches as f64);
        if changed && seen.series.len() < MOST_POINTS {
            seen.series.push([(now - origin).as_secs_f64(), batches as f64]);
        }
    }
}

/// How bursts drained.
#[derive(Debug, Default)]
pub(super) struct Drains {
    /// From the last send of each burst, milliseconds.
    pub(super) ms: Vec<f64>,
    /// Begin and end, seconds from the origin.
    pub(super) bursts: Vec<[f64; 2]>,
}

/// Follows bursts until there are no more. A burst that is not drained ten seconds after it left is given
/// up.
pub(super) async fn drains(
    targets: &[Target],
    mut sent: mpsc::Receiver<Burst>,
    origin: Instant,
    client: Client,
    board: &Board,
    drains: &mut Drains,
) -> anyhow::Result<()> {
    while let Some(burst) = sent.recv().await {
        let mut waits = JoinSet::new();
        for &(at, sequence) in &burst.last {
            let (pod, ledger) = targets[at].clone();
            let deadline = burst.sent + PATIENCE;
            waits.spawn(applied(pod, ledger, client.clone(), (sequence, deadline)));
        }
        let mut drained = Some(burst.sent);
        while let Some(applied) = waits.join_next().await {
            drained = drained.zip(applied??).map(|(latest, at)| latest.max(at));
        }
        board.drained.fetch_add(1, Ordering::SeqCst);
        let end = drained.unwrap_or_else(Instant::now);
        if drained.is_some() {
            drains.ms.push((end - burst.sent).as_secs_f64() * 1e3);
        }
        let span = [burst.began, end].map(|at| (at - origin).as_secs_f64());
        drains.bursts.push(span);
    }
    Ok(())
}

/// When a sequence was seen to be applied, or its publisher to have started again; `None` = not in
/// time.
async fn applied(
    pod: PodHandle,
    ledger: Arc<Mutex<Ledger>>,
    mut client: Client,
    (sequence, deadline): (u64, Instant),
) -> anyhow::Result<Option<Instant>> {
    let life = lock(&ledger).life;
    loop {
        let answer = pod.wait(&mut client, sequence, deadline).await?;
        let now = Instant::now();
        if answer.reached || lock(&ledger).life != life {
            return Ok(Some(now));
        }
        if now >= deadline {
            return Ok(None);
        }
    }
}
