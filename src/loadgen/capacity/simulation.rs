//! A fleet in virtual time: real [`Scheduler`]s, and a clock that jumps to whatever happens next.
//!
//! # Model
//!
//! ```text
//! arrival ── request_ms ──▶ picker ──▶ queue of a pod ──▶ steps ──▶ first token … last token
//!              what the picker knows: loads of the last scrape; blocks, once their events have arrived
//! ```
//!
//! A stage ends with its last answer, and a pause follows; caches stay as they are. Prompts come in one
//! shuffled order, round and round. Pure: equal arguments give equal results.
//!
//! # Cost
//!
//! About that of the schedulers: a second of CPU for some three million tokens.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use super::{
    Constants,
    choice::{Chooser, Known},
    fleet,
    published::{Stage, Study},
};
use crate::{
    loadgen::{
        engine::{
            cache::{Cache, CacheOptions, EventFields, RequestId},
            scheduler::{Limits, Outcome, Request, Scheduler},
            sequence::{Identity, Sequence},
        },
        stack::policy::Policy,
        stats,
        workload::{Part, Planned, Prompt},
    },
    wire::encode::{Event, Hash},
};

/// Tokens are below this.
const VOCABULARY: u32 = 32_000;

/// What is assumed.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Assumptions {
    /// Of the hardware of the 73 % table.
    pub constants: Constants,
    /// Factor of all lengths and caches.
    pub scale_tokens: f64,
    /// From one scrape of the pods' loads to the next, milliseconds.
    pub scrape_ms: f64,
    /// From a step's end until its events are in the index, milliseconds.
    pub events_ms: f64,
}

impl Default for Assumptions {
    /// Whole tokens, and the picker's default interval.
    fn default() -> Self {
        Self { constants: Constants::default(), scale_tokens: 1.0, scrape_ms: 50.0, events_ms: 1.0 }
    }
}

/// What a stage came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct StageOutcome {
    /// Requests per second that were sent on average.
    pub rate: f64,
    /// Requests; all of them were answered.
    pub requests: usize,
    /// Time to first token from the intended arrival, seconds.
    pub ttft_p50_s: f64,
    /// 90th percentile of the same.
    pub ttft_p90_s: f64,
    /// Mean of the same.
    pub ttft_mean_s: f64,
    /// Output tokens per second from the stage's start to its last answer, of the published length.
    pub output_tps: f64,
    /// Share of the prompts' tokens that was found in a cache.
    pub hit_ratio: f64,
    /// Requests that wait in a pod, over pods and scrapes.
    pub waiting_mean: f64,
    /// The most of them in a pod.
    pub waiting_max: usize,
    /// Requests that lost their place, counted each time.
    pub preemptions: u64,
    /// From the stage's start to its last answer, seconds.
    pub seconds: f64,
}

/// Runs the warm-up and these stages with one policy. The last outcome, with rate 0, is of all stages
/// together; its throughput leaves the pauses out.
#[must_use]
pub fn simulate(
    study: &Study,
    stages: &[Stage],
    policy: &Policy,
    seed: u64,
    assumed: &Assumptions,
) -> Vec<StageOutcome> {
    let mut traffic = Traffic::new(study, assumed.scale_tokens, seed);
    let mut run = Simulation::new(study, policy, seed, assumed);
    run.stage(&traffic.stage(study.warm_up));
    let gap = Duration::from_secs_f64(study.gap_s);
    let mut outcomes = Vec::with_capacity(stages.len() + 1);
    let mut all = Measured::default();
    for stage in stages {
        run.now += gap;
        let measured = run.stage(&traffic.stage(*stage));
        all.add(&measured);
        outcomes.push(measured.outcome(stage.rate, assumed.scale_tokens));
    }
    outcomes.push(all.outcome(0.0, assumed.scale_tokens));
    outcomes
}

/// What is asked, and when.
struct Traffic {
    prompts: Vec<Planned>,
    next: usize,
    poisson: bool,
    random: fastrand::Rng,
}

impl Traffic {
    fn new(study: &Study, scale: f64, seed: u64) -> Self {
        let scaled = |tokens: u32| ((f64::from(tokens) * scale) as u32).max(1);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut prompts = Vec::new();
        for group in 0..study.groups {
            let system = Part { seed: random.u64(..), tokens: scaled(study.system) };
            for _ in 0..study.prompts {
                let question = Part { seed: random.u64(..), tokens: scaled(study.question) };
                prompts.push(Planned {
                    at: None,
                    burst: None,
                    prompt: Prompt { parts: [system, question].into() },
                    max_tokens: scaled(study.output),
                    group,
                    after: None,
                });
            }
        }
        random.shuffle(&mut prompts);
        Self { prompts, next: 0, poisson: study.poisson, random }
    }

    fn stage(&mut self, stage: Stage) -> Vec<Planned> {
        let mut planned = Vec::new();
        let mut at = 0.0;
        loop {
            let gap = if self.poisson { -(1.0 - self.random.f64()).ln() } else { 1.0 };
            at += gap / stage.rate;
            if at > stage.seconds {
                return planned;
            }
            let prompt = &self.prompts[self.next % self.prompts.len()];
            self.next += 1;
            planned.push(Planned { at: Some(Duration::from_secs_f64(at)), ..prompt.clone() });
        }
    }
}

enum Happening {
    /// A request of the stage is at the picker.
    Pick(usize),
    /// A pod's step ends.
    Step(usize),
    /// Events of a pod are in the index.
    Seen(usize, Vec<(u64, i32)>),
    /// The pods' loads are read.
    Scrape,
}

struct Pod {
    scheduler: Scheduler,
    steps: bool,
}

/// What is noted of stages.
#[derive(Default)]
struct Measured {
    // Seconds.
    ttft: Vec<f64>,
    open: usize,
    tokens: usize,
    // Sum over pods and scrapes, and how many these are.
    waiting: (usize, usize),
    waiting_max: usize,
    // Tokens looked up and found, requests preempted.
    sums: [u64; 3],
    took: Duration,
}

impl Measured {
    fn add(&mut self, other: &Self) {
        self.ttft.extend(&other.ttft);
        self.tokens += other.tokens;
        self.waiting.0 += other.waiting.0;
        self.waiting.1 += other.waiting.1;
        self.waiting_max = self.waiting_max.max(other.waiting_max);
        for (sum, more) in self.sums.iter_mut().zip(other.sums) {
            *sum += more;
        }
        self.took += other.took;
    }

    fn outcome(mut self, rate: f64, scale_tokens: f64) -> StageOutcome {
        let (ttft, [queries, hits, preemptions]) = (&mut self.ttft, self.sums);
        ttft.sort_unstable_by(f64::total_cmp);
        let seconds = self.took.as_secs_f64();
        StageOutcome {
            rate,
            requests: ttft.len(),
            ttft_p50_s: stats::quantile(ttft, 0.5).unwrap_or_default(),
            ttft_p90_s: stats::quantile(ttft, 0.9).unwrap_or_default(),
            ttft_mean_s: ttft.iter().sum::<f64>() / ttft.len().max(1) as f64,
            output_tps: self.tokens as f64 / scale_tokens / seconds,
            hit_ratio: hits as f64 / queries.max(1) as f64,
            waiting_mean: self.waiting.0 as f64 / self.waiting.1.max(1) as f64,
            waiting_max: self.waiting_max,
            preemptions,
            seconds,
        }
    }
}

struct Simulation {
    now: Duration,
    happenings: BTreeMap<(Duration, u64), Happening>,
    happened: u64,
    pods: Vec<Pod>,
    known: Vec<Known>,
    chooser: Chooser,
    sequences: HashMap<Prompt, Sequence>,
    block_size: usize,
    before_queue: Duration,
    scrape: Duration,
    events: Duration,
    // Requests are named in the order in which they come; the first of this stage.
    first: RequestId,
}

impl Simulation {
    fn new(study: &Study, policy: &Policy, seed: u64, assumed: &Assumptions) -> Self {
        let scale = assumed.scale_tokens;
        let options = fleet(study, scale, 1.0);
        let pace = assumed.constants.for_model(study.factor()).pace(scale, 1.0);
        let limits = Limits {
            max_num_batched_tokens: options.max_num_batched_tokens,
            max_num_seqs: options.max_num_seqs,
            chunked_prefill: true,
            max_loras: 1,
        };
        let cache = CacheOptions {
            num_gpu_blocks: options.num_gpu_blocks,
            block_size: options.block_size,
            fields: EventFields::default(),
            unhashed_first: true,
        };
        let pod = || Pod {
            scheduler: Scheduler::new(Cache::new(cache), limits, pace, VOCABULARY),
            steps: false,
        };
        let tokens_per_block = options.block_size as f64 / scale;
        Self {
            now: Duration::ZERO,
            happenings: BTreeMap::new(),
            happened: 0,
            pods: (0..options.engines).map(|_| pod()).collect(),
            known: vec![Known::default(); options.engines],
            chooser: Chooser::new(policy, study.approximate, tokens_per_block, seed),
            sequences: HashMap::new(),
            block_size: options.block_size,
            before_queue: pace.request(),
            scrape: Duration::from_secs_f64(assumed.scrape_ms.max(1.0) / 1e3),
            events: Duration::from_secs_f64(assumed.events_ms / 1e3),
            first: 0,
        }
    }

    fn stage(&mut self, planned: &[Planned]) -> Measured {
        let start = self.now;
        let before = self.sums();
        let mut measured = Measured { open: planned.len(), ..Measured::default() };
        for (at, request) in planned.iter().enumerate() {
            let intended = start + request.at.unwrap_or_default();
            self.at(intended + self.before_queue, Happening::Pick(at));
        }
        self.at(start, Happening::Scrape);
        while measured.open > 0
            && let Some(((now, _), happening)) = self.happenings.pop_first()
        {
            // What was left over from before the pause comes late; nothing else is to come then.
            self.now = self.now.max(now);
            match happening {
                Happening::Pick(at) => self.pick(at, &planned[at]),
                Happening::Step(pod) => self.step(pod, start, planned, &mut measured),
                Happening::Seen(pod, changes) => self.known[pod].see(&changes),
                Happening::Scrape => self.scrape(&mut measured),
            }
        }
        self.happenings.retain(|_, happening| !matches!(happening, Happening::Scrape));
        self.first += planned.len() as u64;
        measured.took = self.now - start;
        for ((sum, now), before) in measured.sums.iter_mut().zip(self.sums()).zip(before) {
            *sum = now - before;
        }
        measured
    }

    fn at(&mut self, time: Duration, happening: Happening) {
        self.happenings.insert((time, self.happened), happening);
        self.happened += 1;
    }

    fn pick(&mut self, at: usize, planned: &Planned) {
        let block_size = self.block_size;
        let sequence = self
            .sequences
            .entry(planned.prompt.clone())
            .or_insert_with(|| {
                Sequence::new(tokens(&planned.prompt), Identity::default(), block_size)
            })
            .clone();
        let pod = self.chooser.choose(sequence.hashes(), &mut self.known);
        self.pods[pod].scheduler.submit(Request {
            id: self.first + at as u64,
            sequence,
            max_tokens: planned.max_tokens as usize,
            answer: Vec::new(),
        });
        if !self.pods[pod].steps {
            self.begin(pod);
        }
    }

    fn begin(&mut self, pod: usize) {
        let takes = self.pods[pod].scheduler.begin();
        self.pods[pod].steps = takes.is_some();
        if let Some(takes) = takes {
            self.at(self.now + takes, Happening::Step(pod));
        }
    }

    fn step(&mut self, pod: usize, start: Duration, planned: &[Planned], measured: &mut Measured) {
        let Outcome { outputs, events } = self.pods[pod].scheduler.finish();
        for output in &outputs {
            measured.tokens += 1;
            if output.first {
                let planned = &planned[(output.request - self.first) as usize];
                let intended = start + planned.at.unwrap_or_default();
                measured.ttft.push((self.now - intended).as_secs_f64());
            }
            measured.open -= usize::from(output.last);
        }
        if !events.is_empty() {
            self.at(self.now + self.events, Happening::Seen(pod, changes(&events)));
        }
        self.begin(pod);
    }

    fn scrape(&mut self, measured: &mut Measured) {
        for (pod, known) in self.pods.iter().zip(&mut self.known) {
            known.waiting = pod.scheduler.waiting();
            known.usage = pod.scheduler.cache().usage();
            measured.waiting.0 += known.waiting;
            measured.waiting.1 += 1;
            measured.waiting_max = measured.waiting_max.max(known.waiting);
        }
        self.at(self.now + self.scrape, Happening::Scrape);
    }

    /// Tokens looked up and found, and requests preempted, since the start.
    fn sums(&self) -> [u64; 3] {
        self.pods.iter().map(|pod| pod.scheduler.totals()).fold([0; 3], |sums, it| {
            [sums[0] + it.queries, sums[1] + it.hits, sums[2] + it.preemptions]
        })
    }
}

fn tokens(prompt: &Prompt) -> Vec<u32> {
    let of = |part: &Part| {
        let mut random = fastrand::Rng::with_seed(part.seed);
        std::iter::repeat_with(move || random.u32(..VOCABULARY)).take(part.tokens as usize)
    };
    prompt.parts.iter().flat_map(of).collect()
}

/// Blocks that were stored (+1) and removed (-1).
fn changes(events: &[Event]) -> Vec<(u64, i32)> {
    let mut changes = Vec::new();
    for event in events {
        let (hashes, change) = match event {
            Event::BlockStored(stored) => (&stored.block_hashes, 1),
            Event::BlockRemoved(removed) => (&removed.block_hashes, -1),
            // Nobody resets these caches.
            Event::AllBlocksCleared => continue,
        };
        changes.extend(hashes.iter().filter_map(|hash| match hash {
            Hash::Unsigned(hash) => Some((*hash, change)),
            // The mock engine writes numbers.
            Hash::Signed(_) | Hash::Bytes(_) => None,
        }));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loadgen::capacity::published::STUDY_73;

    #[test]
    fn the_shape_of_the_published_table_is_there() {
        let assumed = Assumptions { scale_tokens: 0.05, ..Assumptions::default() };
        let stages = [(3.0, 10.0), (30.0, 25.0)].map(|(rate, seconds)| Stage { rate, seconds });
        let run = |policy: &Policy| simulate(&STUDY_73, &stages, policy, 1, &assumed);
        let (random, precise) = (run(&Policy::Random), run(&Policy::Precise));
        assert_eq!(precise, run(&Policy::Precise), "equal arguments, equal results");
        let requests =
            |it: &[StageOutcome]| it.iter().map(|stage| stage.requests).collect::<Vec<_>>();
        assert_eq!(requests(&random), requests(&precise), "the same traffic");
        assert!(random[0].ttft_p90_s < 5.0 && precise[0].ttft_p90_s < 2.0, "at 3 per second");
        assert!(random[1].ttft_p90_s > 10.0 * precise[1].ttft_p90_s, "{random:?}\n{precise:?}");
        assert!(precise[1].output_tps > 1.4 * random[1].output_tps, "{random:?}\n{precise:?}");
        assert!(precise[1].hit_ratio > 0.8 && random[1].hit_ratio < 0.4);
    }
}
