//! Stores: traffic into an empty index.

use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

use crate::{
    contender::{Contender, Event, What},
    ours,
    stream::{TRAFFIC_PODS, Traffic},
};

/// Events of one thread each: pods are dealt out to threads.
pub(crate) type Lanes = Vec<Vec<Event>>;

/// Traffic of about `entries` (block, pod) pairs; the tails in events of all their blocks, or of one.
pub(crate) fn lanes(entries: usize, single: bool, threads: u32) -> Lanes {
    let mut traffic = Traffic::new(21);
    let mut lanes: Lanes = vec![Vec::new(); threads as usize];
    let mut blocks = 0;
    for event in traffic.shared() {
        blocks += event.stored();
        lanes[(event.pod % threads) as usize].push(event);
    }
    while blocks < entries {
        let (prompt, pod) = traffic.prompt();
        let lane = &mut lanes[(pod % threads) as usize];
        let tail = Traffic::PREFIX..prompt.blocks();
        blocks += tail.len();
        let step = if single { 1 } else { tail.len() };
        let events = tail.clone().step_by(step);
        lane.extend(
            events.map(|at| prompt.stored(pod, crate::contender::Place::Gpu, at..at + step)),
        );
    }
    lanes
}

/// Time of the slowest of some jobs that start together, each on a thread of its own.
fn together<T, F>(jobs: Vec<F>) -> (Duration, Vec<T>)
where
    T: Send,
    F: FnOnce() -> (Duration, T) + Send,
{
    let start = Barrier::new(jobs.len());
    let done: Vec<(Duration, T)> = std::thread::scope(|scope| {
        let run = |job: F| {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                job()
            })
        };
        let threads: Vec<_> = jobs.into_iter().map(run).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let slowest = done.iter().map(|(time, _)| *time).max().unwrap_or_default();
    (slowest, done.into_iter().map(|(_, result)| result).collect())
}

/// Millions of blocks per second: hashed before, and from tokens on. An index that hashes inside
/// has its hashing, measured by itself over the same events, taken off for the former.
pub(crate) fn rates<C: Contender>(lanes: &Lanes) -> (f64, f64) {
    let blocks: usize = lanes.iter().flatten().map(Event::stored).sum();
    let rate = |time: Duration| blocks as f64 / time.as_secs_f64() / 1e6;
    let prepare = |events: &'_ Vec<Event>| {
        let events = events.clone();
        move || {
            let start = Instant::now();
            let prepared: Vec<C::Event> = events.iter().map(C::prepare).collect();
            (start.elapsed(), prepared)
        }
    };
    let (hashing, prepared) = together(lanes.iter().map(prepare).collect());
    let index = C::new(TRAFFIC_PODS);
    let jobs = prepared.into_iter().map(|events| {
        let lane = index.lane(Vec::new(), events);
        move || (lane(&|| ()), ())
    });
    let (applying, _) = together(jobs.collect());
    if C::HASHES_INSIDE {
        let hash = |events: &'_ Vec<Event>| {
            let events = events.clone();
            move || {
                let start = Instant::now();
                for event in &events {
                    if let What::Stored { span, .. } = &event.what {
                        std::hint::black_box(ours::keys(span.tokens()));
                    }
                }
                (start.elapsed(), ())
            }
        };
        let (hashing, _) = together(lanes.iter().map(hash).collect());
        (rate(applying.saturating_sub(hashing)), rate(applying))
    } else {
        (rate(applying), rate(applying + hashing))
    }
}
