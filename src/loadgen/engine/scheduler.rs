//! vLLM v1's scheduler (`v1/core/sched/scheduler.py`): continuous batching in steps, first come first
//! served. Pure: time is an output, and the tokens that a model would make come with the request or are
//! numbers derived from the sequence, so that equal prompts get equal answers.
//!
//! # Model
//!
//! [`begin`](Scheduler::begin) plans a step: every running request gets its next token, or as much of
//! its prompt as the token budget allows; what is left of the budget goes to waiting requests, in
//! order. Blocks are allocated, and announced, here. It returns how long the model would take.
//! [`finish`](Scheduler::finish) ends the step: it gives out the tokens and the events, and releases
//! the blocks of requests that are through.
//!
//! When blocks run out, the youngest running request is preempted: it loses its blocks and goes to
//! the front of the waiting ones; what it had computed is found in the cache or computed again.

use std::{
    collections::{HashSet, VecDeque},
    time::Duration,
};

use super::{
    cache::{Cache, Hits, RequestId},
    sequence::Sequence,
};
use crate::wire::encode::Event;

/// How long things take. A step takes `step + prefill · (tokens of prompts in it)`, and if requests
/// decode in it `decode + more · (how many)`.
///
/// There is one step at a time, and all requests of an engine share its token budget. So prefills wait for
/// one another, and a long prefill holds up the next token of every request that decodes.
///
/// Answers that are cut to a tenth, and should take as long as whole ones, are made with ten steps for each
/// token. With steps that take ten times as long instead, a new request would wait ten times as long for
/// the step under way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Microseconds that a request needs before it is queued; the engine computes meanwhile.
    pub request_us: f64,
    /// Microseconds of every step.
    pub step_us: f64,
    /// Microseconds per prompt token that is computed; hits in the cache cost nothing.
    pub prefill_us_per_token: f64,
    /// Microseconds of every step in which a request decodes: is on the way to a token after its first.
    pub decode_us_per_step: f64,
    /// Further microseconds of a step for each request that decodes in it.
    pub decode_us_per_sequence: f64,
    /// Steps in which a request decodes for each token after its first one, at least 1.
    pub steps_per_token: u32,
    /// Factor of all times; 0 = as fast as possible.
    pub scale: f64,
}

impl Default for Pace {
    /// Quick enough for tests: a prompt of a thousand tokens takes about two milliseconds.
    fn default() -> Self {
        Self {
            request_us: 0.0,
            step_us: 200.0,
            prefill_us_per_token: 2.0,
            decode_us_per_step: 300.0,
            decode_us_per_sequence: 0.0,
            steps_per_token: 1,
            scale: 1.0,
        }
    }
}

impl Pace {
    /// What a request needs before it is queued.
    #[must_use]
    pub fn request(&self) -> Duration {
        self.scaled(self.request_us)
    }

    fn step(&self, prefill_tokens: usize, decodes: usize) -> Duration {
        let mut us = self.step_us + self.prefill_us_per_token * prefill_tokens as f64;
        if decodes > 0 {
            us += self.decode_us_per_step + self.decode_us_per_sequence * decodes as f64;
        }
        self.scaled(us)
    }

    fn scaled(&self, us: f64) -> Duration {
        Duration::try_from_secs_f64(us * self.scale / 1e6).unwrap_or_default()
    }
}

/// Limits of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Tokens computed in one step at most.
    pub max_num_batched_tokens: usize,
    /// Requests that run at once at most.
    pub max_num_seqs: usize,
    /// May a prompt be computed in several steps?
    pub chunked_prefill: bool,
    /// Adapters that run at once at most.
    pub max_loras: usize,
}

/// A request as it is submitted.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name, not used before.
    pub id: RequestId,
    /// Its prompt, at least one token.
    pub sequence: Sequence,
    /// Tokens to make, at least 1.
    pub max_tokens: usize,
    /// The tokens that it gets, in order; beyond them, numbers derived from the sequence.
    pub answer: Vec<u32>,
}

/// One token of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Whose.
    pub request: RequestId,
    /// The token.
    pub token: u32,
    /// Prompt tokens that were found in the cache when it was first scheduled.
    pub cached_tokens: usize,
    /// Is it the first one?
    pub first: bool,
    /// Is it the last one?
    pub last: bool,
}

/// What a step gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Tokens, in the order of the running requests.
    pub outputs: Vec<Output>,
    /// Cache events, for one batch.
    pub events: Vec<Event>,
}

/// Sums since the start, tokens unless they say otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Prompt tokens looked up in the cache.
    pub queries: u64,
    /// Of these, found there.
    pub hits: u64,
    /// Prompt tokens of requests that made their first token.
    pub prompt: u64,
    /// Tokens made.
    pub generation: u64,
    /// Requests preempted, counted each time.
    pub preemptions: u64,
    /// Requests that made their last token.
    pub finished: u64,
}

#[derive(Clone, Debug)]
struct Running {
    request: Request,
    prompt: usize,
    computed: usize,
    // Tokens that the current step computes.
    scheduled: usize,
    made: usize,
    // Steps in which it decodes before the one that makes its next token.
    before_next: u32,
    cached_tokens: Option<usize>,
}

impl Running {
    fn lora(&self) -> Option<u64> {
        self.request.sequence.identity().lora.as_ref().map(|lora| lora.id)
    }
}

/// See the module's page.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    pace: Pace,
    vocabulary: u32,
    cache: Cache,
    waiting: VecDeque<Running>,
    running: Vec<Running>,
    totals: Totals,
}

impl Scheduler {
    /// A scheduler without requests. Tokens that do not come with their
    /// request are below `vocabulary` (at least 1).
    #[must_use]
    pub fn new(cache: Cache, limits: Limits, pace: Pace, vocabulary: u32) -> Self {
        Self {
            limits,
            pace,
            vocabulary: vocabulary.max(1),
            cache,
            waiting: VecDeque::new(),
            running: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Sums since the start.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// How many requests run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// How many wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Names of the adapters of running and of waiting requests, each once.
    #[must_use]
    pub fn loras(&self) -> [Vec<String>; 2] {
        let names = |requests: &mut dyn Iterator<Item = &Running>| {
            let names: std::collections::BTreeSet<String> = requests
                .filter_map(|it| it.request.sequence.identity().lora.as_ref())
                .map(|lora| lora.name.to_string())
                .collect();
            names.into_iter().collect()
        };
        [names(&mut self.running.iter()), names(&mut self.waiting.iter())]
    }

    /// Queues a request. It has to fit the cache alone, prompt and answer, or it is never through.
    pub fn submit(&mut self, request: Request) {
        let prompt = request.sequence.tokens().len();
        self.waiting.push_back(Running {
            request,
            prompt,
            computed: 0,
            scheduled: 0,
            made: 0,
            before_next: 0,
            cached_tokens: None,
        });
    }

    /// Drops a request, in whatever state; does nothing for an unknown one.
    pub fn abort(&mut self, id: RequestId) {
        self.waiting.retain(|it| it.request.id != id);
        self.running.retain(|it| it.request.id != id);
        self.cache.free(id);
    }

    /// Forgets what is cached, unless blocks are in use; tells whether it did.
    pub fn reset_cache(&mut self) -> bool {
        self.cache.reset()
    }

    /// Plans a step; `None` if there is nothing to do. Then [`finish`](Self::finish) has to follow.
    pub fn begin(&mut self) -> Option<Duration> {
        let mut budget = self.limits.max_num_batched_tokens;
        let (preempted, underway) = self.continue_running(&mut budget);
        if !preempted {
            self.admit(&mut budget);
        }
        let (mut prefill, mut decodes) = (0, underway);
        for it in self.running.iter().filter(|it| it.scheduled > 0) {
            // As much of it as was never made by the model here is prefill.
            let decode = it.made > 0 && it.scheduled == 1;
            prefill += if decode { 0 } else { it.scheduled };
            decodes += usize::from(decode);
        }
        (prefill + decodes > 0).then(|| self.pace.step(prefill, decodes))
    }

    /// Ends the step that [`begin`](Self::begin) planned.
    pub fn finish(&mut self) -> Outcome {
        let mut outputs = Vec::new();
        let mut through = HashSet::new();
        for it in self.running.iter_mut().filter(|it| it.scheduled > 0) {
            it.computed += std::mem::take(&mut it.scheduled);
            let sequence = &mut it.request.sequence;
            if it.computed < sequence.tokens().len() {
                continue;
            }
            let token = it.request.answer.get(it.made).copied();
            let token =
                token.unwrap_or_else(|| (sequence.state() % u64::from(self.vocabulary)) as u32);
            sequence.push(token);
            it.made += 1;
            it.before_next = self.pace.steps_per_token.saturating_sub(1);
            let output = Output {
                request: it.request.id,
                token,
                cached_tokens: it.cached_tokens.unwrap_or_default(),
                first: it.made == 1,
                last: it.made >= it.request.max_tokens,
            };
            self.totals.generation += 1;
            if output.first {
                self.totals.prompt += it.prompt as u64;
            }
            if output.last {
                through.insert(it.request.id);
                self.totals.finished += 1;
                self.cache.free(it.request.id);
            }
            outputs.push(output);
        }
        self.running.retain(|it| !through.contains(&it.request.id));
        Outcome { outputs, events: self.cache.take_events() }
    }

    /// Plans the running requests; tells whether one was preempted, and how many decode without making a
    /// token.
    fn continue_running(&mut self, budget: &mut usize) -> (bool, usize) {
        let (mut preempted, mut underway) = (false, 0);
        let mut at = 0;
        while at < self.running.len() && *budget > 0 {
            let it = &mut self.running[at];
            let left = it.request.sequence.tokens().len() - it.computed;
            if it.before_next > 0 && left == 1 {
                it.before_next -= 1;
                underway += 1;
                at += 1;
                continue;
            }
            let tokens = left.min(*budget);
            let (id, computed) = (it.request.id, it.computed);
            let allocated =
                self.cache.allocate(id, &it.request.sequence, &Hits::default(), computed, tokens);
            if allocated.is_ok() {
                it.scheduled = tokens;
                *budget -= tokens;
                at += 1;
                continue;
            }
            // The last one goes, even if it is the one that needs a block.
            let Some(mut victim) = self.running.pop() else { break };
            self.cache.free(victim.request.id);
            victim.computed = 0;
            self.totals.preemptions += 1;
            self.waiting.push_front(victim);
            preempted = true;
        }
        (preempted, underway)
    }

    fn admit(&mut self, budget: &mut usize) {
        let mut loras: HashSet<u64> = self.running.iter().filter_map(Running::lora).collect();
        let mut at = 0;
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs {
            let Some(it) = self.waiting.get(at) else { break };
            let lora = it.lora();
            if lora.is_some_and(|id| loras.len() >= self.limits.max_loras && !loras.contains(&id)) {
                // It waits for an adapter to be through; others may pass it.
                at += 1;
                continue;
            }
            let sequence = &it.request.sequence;
            let all = sequence.tokens().len();
            let hits = self.cache.lookup(sequence);
            let found = hits.len() * self.cache.block_size();
            let left = all - found;
            if left > *budget && !self.limits.chunked_prefill {
                break;
            }
            let tokens = left.min(*budget);
            if self.cache.allocate(it.request.id, sequence, &hits, found, tokens).is_err() {
                break;
            }
            let Some(mut it) = self.waiting.remove(at) else { break };
            it.computed = found;
            it.scheduled = tokens;
            if it.cached_tokens.is_none() {
                it.cached_tokens = Some(found);
                self.totals.queries += all as u64;
                self.totals.hits += found as u64;
            }
            *budget -= tokens;
            loras.extend(lora);
            self.running.push(it);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loadgen::engine::{
        cache::{CacheOptions, EventFields},
        sequence::{Identity, Lora},
    };

    const LIMITS: Limits =
        Limits { max_num_batched_tokens: 8, max_num_seqs: 4, chunked_prefill: true, max_loras: 1 };

    fn scheduler(blocks: u32, limits: Limits) -> Scheduler {
        let options = CacheOptions {
            num_gpu_blocks: blocks,
            block_size: 2,
            fields: EventFields::default(),
            unhashed_first: true,
        };
        let cache = Cache::new(options);
        Scheduler::new(cache, limits, Pace::default(), 1000)
    }

    fn request(id: RequestId, tokens: &[u32], max_tokens: usize) -> Request {
        let sequence = Sequence::new(tokens.to_vec(), Identity::default(), 2);
        Request { id, sequence, max_tokens, answer: Vec::new() }
    }

    fn step(scheduler: &mut Scheduler) -> Outcome {
        assert!(scheduler.begin().is_some());
        scheduler.finish()
    }

    fn run(scheduler: &mut Scheduler) -> Vec<Output> {
        let mut all = Vec::new();
        while scheduler.begin().is_some() {
            all.extend(scheduler.finish().outputs);
            assert!(all.len() < 10_000, "it does not come to an end");
        }
        all
    }

    #[test]
    fn prompts_are_computed_in_chunks_and_then_a_token_a_step() {
        let mut it = scheduler(20, LIMITS);
        it.submit(request(1, &[7; 12], 2));
        it.submit(request(2, &[8; 3], 1));
        let first = step(&mut it);
        assert_eq!((first.outputs.len(), first.events.len()), (0, 1));
        assert_eq!((it.running(), it.waiting()), (1, 1), "the budget is spent");
        let second = step(&mut it);
        let made: Vec<_> = second.outputs.iter().map(|o| (o.request, o.first, o.last)).collect();
        assert_eq!(made, [(1, true, false), (2, true, true)]);
        let third = step(&mut it);
        assert!(third.outputs[0].last);
        assert_eq!((it.begin(), it.cache().usage()), (None, 0.0));
    }

    #[test]
    fn a_prefill_holds_up_whoever_decodes() {
        let pace = Pace {
            request_us: 7.0,
            step_us: 1000.0,
            prefill_us_per_token: 10.0,
            decode_us_per_step: 100.0,
            decode_us_per_sequence: 1.0,
            steps_per_token: 1,
            scale: 2.0,
        };
        let mut it = Scheduler { pace, ..scheduler(20, LIMITS) };
        assert_eq!(pace.request(), Duration::from_micros(14));
        it.submit(request(1, &[7; 3], 4));
        it.submit(request(2, &[8; 4], 4));
        let takes = |it: &mut Scheduler| {
            let takes = it.begin().unwrap().as_micros();
            it.finish();
            takes
        };
        assert_eq!(takes(&mut it), 2 * (1000 + 7 * 10));
        assert_eq!(takes(&mut it), 2 * (1000 + 100 + 2));
        it.submit(request(3, &[9; 6], 1));
        assert_eq!(takes(&mut it), 2 * (1000 + 6 * 10 + 100 + 2), "one step for all of them");
    }

    #[test]
    fn a_token_can_take_several_short_steps() {
        let pace = Pace { decode_us_per_sequence: 1.0, steps_per_token: 3, ..Pace::default() };
        let mut it = Scheduler { pace, ..scheduler(20, LIMITS) };
        it.submit(request(1, &[7; 3], 3));
        let mut step = || {
            let takes = it.begin().unwrap().as_micros();
            (takes, it.finish().outputs.iter().map(|output| output.request).collect::<Vec<_>>())
        };
        let (prefill, decode) = (200 + 3 * 2, 200 + 300 + 1);
        assert_eq!(step(), (prefill, vec![1]));
        let steps: Vec<_> = (0..3).map(|_| step()).collect();
        assert_eq!(steps, [(decode, vec![]), (decode, vec![]), (decode, vec![1])]);
        it.submit(request(2, &[8; 3], 1));
        let takes = it.begin().unwrap().as_micros();
        assert_eq!(takes, decode + 3 * 2, "who comes in between waits for one step only");
        let outputs = it.finish().outputs;
        assert_eq!(outputs.iter().map(|it| it.request).collect::<Vec<_>>(), [2]);
        assert_eq!(run(&mut it).len(), 1);
    }

    #[test]
    fn equal_prompts_get_equal_tokens_and_later_ones_hit() {
        let mut it = scheduler(20, LIMITS);
        it.submit(request(1, &[1, 2, 3, 4, 5], 3));
        let one = run(&mut it);
        it.submit(request(2, &[1, 2, 3, 4, 5], 3));
        let two = run(&mut it);
        let tokens = |outputs: &[Output]| outputs.iter().map(|o| o.token).collect::<Vec<_>>();
        assert_eq!(tokens(&one), tokens(&two));
        assert_eq!((one[0].cached_tokens, two[0].cached_tokens), (0, 4));
        let totals = it.totals();
        assert_eq!((totals.queries, totals.hits, totals.generation), (10, 4, 6));
    }

    #[test]
    fn the_youngest_is_preempted_and_still_gets_all_its_tokens() {
        // Seven usable blocks of two; each request needs five in the end.
        let limits = Limits { max_num_batched_tokens: 100, ..LIMITS };
        let mut it = scheduler(8, limits);
        it.submit(request(1, &[1; 4], 6));
        it.submit(request(2, &[2; 4], 6));
        let outputs = run(&mut it);
        assert!(it.totals().preemptions > 0);
        for id in [1, 2] {
            let of = outputs.iter().filter(|o| o.request == id).collect::<Vec<_>>();
            assert_eq!((of.len(), of[5].last), (6, true));
        }
        assert_eq!((it.cache().usage(), it.totals().finished), (0.0, 2));
    }

    #[test]
    fn an_adapter_waits_for_its_place_and_lets_others_pass() {
        let lora = |id: u64| Identity {
            lora: Some(Lora { id, name: format!("l{id}").into() }),
            ..Identity::default()
        };
        let mut it = scheduler(40, LIMITS);
        for (id, identity) in [(1, lora(1)), (2, lora(2)), (3, Identity::default())] {
            let sequence = Sequence::new(vec![1; 2], identity, 2);
            it.submit(Request { id, sequence, max_tokens: 2, answer: Vec::new() });
        }
        step(&mut it);
        assert_eq!(it.loras(), [vec!["l1".to_owned()], vec!["l2".to_owned()]]);
        assert_eq!((it.running(), it.waiting()), (2, 1));
        assert_eq!(run(&mut it).len(), 4);
    }

    #[test]
    fn aborted_requests_give_their_blocks_back() {
        let mut it = scheduler(20, LIMITS);
        it.submit(request(1, &[1; 6], 4));
        it.submit(request(2, &[2; 60], 4));
        it.begin();
        it.abort(1);
        it.abort(2);
        it.abort(3);
        assert_eq!(it.finish().outputs, []);
        assert_eq!((it.begin(), it.cache().usage()), (None, 0.0));
    }
}
