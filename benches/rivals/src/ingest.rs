//! Stores: traffic into an empty index.

use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

use crate::{
    contender::{BLOCK, Contender, Event, Place, What},
    ours,
    stream::{TRAFFIC_PODS, Traffic},
};

/// Traffic for an empty index.
#[derive(Debug)]
pub(crate) struct Load {
    /// Events of one thread each: pods are dealt out to threads.
    lanes: Vec<Vec<Event>>,
    /// Some prompts, and who holds all of them.
    asked: Vec<(Vec<u32>, u32)>,
}

/// What one run showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// Millions of blocks per second, hashed before. An index that hashes inside has its hashing,
    /// measured by itself over the same events, taken off.
    pub(crate) hashed: f64,
    /// From tokens on.
    pub(crate) tokens: f64,
    /// The index answers rightly at the end.
    pub(crate) right: bool,
}

/// Traffic of about `entries` (block, pod) pairs; the tails in events of all their blocks, or of one.
pub(crate) fn load(entries: usize, single: bool, threads: u32) -> Load {
    const ASKED: usize = 64;
    let mut traffic = Traffic::new(21);
    let mut lanes: Vec<Vec<Event>> = vec![Vec::new(); threads as usize];
    let (mut blocks, mut asked) = (0, Vec::new());
    for event in traffic.shared() {
        blocks += event.stored();
        lanes[(event.pod % threads) as usize].push(event);
    }
    while blocks < entries {
        let (prompt, pod) = traffic.prompt();
        if asked.len() < ASKED {
            asked.push((prompt.tokens.to_vec(), pod));
        }
        let lane = &mut lanes[(pod % threads) as usize];
        let tail = Traffic::PREFIX..prompt.blocks();
        blocks += tail.len();
        let step = if single { 1 } else { tail.len() };
        let events = tail.clone().step_by(step);
        lane.extend(events.map(|at| prompt.stored(pod, Place::Gpu, at..at + step)));
    }
    Load { lanes, asked }
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

/// Applies a load to an empty index.
pub(crate) fn rates<C: Contender>(load: &Load) -> Rates {
    let lanes = &load.lanes;
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
    let mut answer = C::Answer::default();
    let right = load.asked.iter().all(|(tokens, pod)| {
        let truth = Traffic::truth(*pod, tokens.len() / BLOCK);
        index.answers(&C::query(tokens), &mut answer, &truth)
    });
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
        Rates { hashed: rate(applying.saturating_sub(hashing)), tokens: rate(applying), right }
    } else {
        Rates { hashed: rate(applying), tokens: rate(applying + hashing), right }
    }
}
