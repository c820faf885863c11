//! One reader beside one writer.

use std::{
    collections::VecDeque,
    hint::black_box,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use crate::{
    contender::{Contender, Event, Place},
    sample::{Sample, nanos},
    stream::{Prompt, TRAFFIC_PODS, Traffic},
};

const RESIDENT: usize = 500_000;
/// Of 512 blocks; 98 k entries: 128 blocks on each of 16 pods and all of it on one.
const READ: usize = 40;
const READ_BLOCKS: usize = 512;
/// Evicted tails, and tails that stay, that are asked for at the end.
const LEFT: usize = 200;

/// What is resident, what the writer does, and what the reader asks.
#[derive(Debug)]
pub(crate) struct Beside {
    warm: Vec<Event>,
    timed: Vec<Event>,
    asked: Vec<Vec<u32>>,
    /// Of some tails, at the end: prompt, pod, depth.
    left: Vec<(Vec<u32>, u32, usize)>,
}

/// What one run showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Millions per second.
    pub(crate) reads: f64,
    /// Millions of blocks stored per second; as many are removed.
    pub(crate) writes: f64,
    /// The index answers rightly at the end.
    pub(crate) right: bool,
}

impl Beside {
    /// `steps` times the writer stores a tail and evicts the oldest one.
    pub(crate) fn new(steps: usize) -> Self {
        let mut traffic = Traffic::new(31);
        let mut warm: Vec<Event> = traffic.shared().collect();
        let mut asked = Vec::new();
        for at in 0..READ as u32 {
            let prompt = traffic.prompt_of(READ_BLOCKS);
            let tail = Traffic::PREFIX..READ_BLOCKS;
            warm.push(prompt.stored(at % TRAFFIC_PODS, Place::Gpu, tail));
            asked.push(prompt.tokens.to_vec());
        }
        let mut tails: VecDeque<(Prompt, u32)> = VecDeque::new();
        let mut blocks = 0;
        let store = |(prompt, pod): &(Prompt, u32)| {
            prompt.stored(*pod, Place::Gpu, Traffic::PREFIX..prompt.blocks())
        };
        while blocks < RESIDENT {
            let tail = traffic.prompt();
            blocks += tail.0.blocks() - Traffic::PREFIX;
            warm.push(store(&tail));
            tails.push_back(tail);
        }
        let (mut timed, mut left) = (Vec::new(), Vec::new());
        for _ in 0..steps {
            let tail = traffic.prompt();
            timed.push(store(&tail));
            tails.push_back(tail);
            if let Some((prompt, pod)) = tails.pop_front() {
                let old = Traffic::PREFIX..prompt.blocks();
                timed.push(prompt.removed(pod, Place::Gpu, old));
                if left.len() < LEFT {
                    left.push((prompt.tokens.to_vec(), pod, Traffic::PREFIX));
                }
            }
        }
        let rest = tails.iter().rev().take(LEFT);
        left.extend(rest.map(|(prompt, pod)| (prompt.tokens.to_vec(), *pod, prompt.blocks())));
        Self { warm, timed, asked, left }
    }

    pub(crate) fn measure<C: Contender>(&self, empty: f64) -> Figures {
        let index = C::new(TRAFFIC_PODS);
        let prepare = |events: &[Event]| events.iter().map(C::prepare).collect();
        let lane = index.lane(prepare(&self.warm), prepare(&self.timed));
        let queries: Vec<C::Query> = self.asked.iter().map(|tokens| C::query(tokens)).collect();
        let (warmed, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let mut sample = Sample::default();
        let mut answer = C::Answer::default();
        let mut read_for = 0.0;
        let wrote_for = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let time = lane(&|| warmed.store(true, Ordering::Release));
                done.store(true, Ordering::Release);
                time
            });
            while !warmed.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let begin = Instant::now();
            for query in queries.iter().cycle() {
                if done.load(Ordering::Acquire) {
                    break;
                }
                let start = Instant::now();
                index.lookup(black_box(query), &mut answer);
                sample.push((nanos(start.elapsed()) - empty).max(0.0));
            }
            read_for = begin.elapsed().as_secs_f64();
            writer.join().unwrap_or_default()
        });
        let right = self.left.iter().all(|(tokens, pod, depth)| {
            let truth = Traffic::truth(*pod, *depth);
            index.answers(&C::query(tokens), &mut answer, &truth)
        });
        let stored: usize = self.timed.iter().map(Event::stored).sum();
        Figures {
            reads: sample.len() as f64 / read_for / 1e6,
            writes: stored as f64 / wrote_for.as_secs_f64() / 1e6,
            p50: sample.median(),
            p99: sample.quantile(0.99),
            right,
        }
    }
}
