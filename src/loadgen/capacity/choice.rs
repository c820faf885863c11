//! Who gets a request, by each policy, from what its picker can know at that moment.

use std::collections::{BTreeMap, HashMap};

use super::published::{LOAD, PRECISE, Weights};
use crate::loadgen::stack::policy::Policy;

/// Tokens of a prompt that `approximate` looks at: 256 blocks of 64 characters, four to a token.
const APPROXIMATE_TOKENS: f64 = 4_096.0;
/// Tokens that it takes a pod to hold: 31,250 such blocks.
const APPROXIMATE_CAPACITY: f64 = 500_000.0;

/// What a picker knows of a pod.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// Requests that waited at the last scrape.
    pub(super) waiting: usize,
    /// Share of the cache that was in use then.
    pub(super) usage: f64,
    /// Copies of each block, by the events that have arrived.
    blocks: HashMap<u64, i32>,
    sent: Lru,
}

impl Known {
    /// Takes in events: hashes, +1 for stored and -1 for removed.
    pub(super) fn see(&mut self, changes: &[(u64, i32)]) {
        for &(hash, change) in changes {
            let copies = self.blocks.entry(hash).or_default();
            *copies += change;
            if *copies == 0 {
                self.blocks.remove(&hash);
            }
        }
    }
}

/// The blocks that were sent to a pod last.
#[derive(Clone, Debug, Default)]
struct Lru {
    stamps: HashMap<u64, u64>,
    by_stamp: BTreeMap<u64, u64>,
    next: u64,
}

impl Lru {
    fn touch(&mut self, hash: u64, capacity: usize) {
        if let Some(old) = self.stamps.insert(hash, self.next) {
            self.by_stamp.remove(&old);
        }
        self.by_stamp.insert(self.next, hash);
        self.next += 1;
        while self.stamps.len() > capacity
            && let Some((_, oldest)) = self.by_stamp.pop_first()
        {
            self.stamps.remove(&oldest);
        }
    }
}

/// A policy at work.
#[derive(Debug)]
pub(super) struct Chooser {
    policy: Policy,
    weights: Weights,
    // Blocks of a prompt that `approximate` looks at, and those that it keeps for each pod.
    approximate: (usize, usize),
    random: fastrand::Rng,
    turn: usize,
}

impl Chooser {
    pub(super) fn new(
        policy: &Policy,
        approximate: Weights,
        tokens_per_block: f64,
        seed: u64,
    ) -> Self {
        let blocks = |tokens: f64| (tokens / tokens_per_block) as usize;
        Self {
            policy: policy.clone(),
            weights: match policy {
                Policy::Approximate => approximate,
                Policy::Precise => PRECISE,
                _ => LOAD,
            },
            approximate: (blocks(APPROXIMATE_TOKENS), blocks(APPROXIMATE_CAPACITY)),
            random: fastrand::Rng::with_seed(seed),
            turn: 0,
        }
    }

    /// The pod for a prompt with these blocks.
    pub(super) fn choose(&mut self, prompt: &[u64], pods: &mut [Known]) -> usize {
        let looked_at = &prompt[..prompt.len().min(self.approximate.0)];
        let chosen = match self.policy {
            Policy::Random => self.random.usize(..pods.len()),
            Policy::RoundRobin => {
                self.turn += 1;
                self.turn % pods.len()
            }
            Policy::Approximate => {
                self.best(pods, |pod| share(looked_at, |hash| pod.sent.stamps.contains_key(hash)))
            }
            Policy::Precise => {
                self.best(pods, |pod| share(prompt, |hash| pod.blocks.contains_key(hash)))
            }
            Policy::LeastLoad => self.best(pods, |_| 0.0),
            Policy::Constant | Policy::External { .. } => 0,
        };
        if self.policy == Policy::Approximate {
            for hash in looked_at {
                pods[chosen].sent.touch(*hash, self.approximate.1);
            }
        }
        chosen
    }

    /// The highest sum of scores; one of them, if several have it.
    fn best(&mut self, pods: &[Known], prefix: impl Fn(&Known) -> f64) -> usize {
        let waiting = || pods.iter().map(|pod| pod.waiting);
        let (least, most) = (waiting().min().unwrap_or(0), waiting().max().unwrap_or(0));
        let queue = |pod: &Known| match most - least {
            0 => 1.0,
            range => (most - pod.waiting) as f64 / range as f64,
        };
        let Weights { prefix: p, queue: q, usage: u } = self.weights;
        let score = |pod: &Known| p * prefix(pod) + q * queue(pod) + u * (1.0 - pod.usage);
        let scores: Vec<f64> = pods.iter().map(score).collect();
        let highest = scores.iter().copied().fold(f64::MIN, f64::max);
        let best: Vec<usize> = (0..pods.len()).filter(|at| scores[*at] >= highest).collect();
        best[self.random.usize(..best.len())]
    }
}

/// Share of a prompt's blocks, from the first on, that are there.
fn share(prompt: &[u64], is_there: impl Fn(&u64) -> bool) -> f64 {
    let found = prompt.iter().take_while(|hash| is_there(hash)).count();
    found as f64 / prompt.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVEN: Weights = Weights { prefix: 1.0, queue: 1.0, usage: 1.0 };

    #[track_caller]
    fn check(policy: &Policy, pods: &mut [Known], expected: usize) {
        // Blocks of 1,024 tokens: four are looked at.
        let mut chooser = Chooser::new(policy, EVEN, 1_024.0, 7);
        for _ in 0..8 {
            assert_eq!(chooser.choose(&[1, 2, 3, 4], pods), expected, "{policy}");
        }
    }

    #[test]
    fn each_policy_goes_by_what_it_knows() {
        let mut pods = vec![Known::default(), Known::default(), Known::default()];
        pods[1].see(&[(1, 1), (2, 1), (3, 1), (3, 1), (3, -1)]);
        pods[2].see(&[(1, 1), (2, 1), (3, 1), (3, -1)]);
        check(&Policy::Precise, &mut pods, 1);
        pods[0].usage = 0.5;
        pods[1].waiting = 4;
        check(&Policy::LeastLoad, &mut pods, 2);
        // Three quarters of the prompt weigh more than the queue; not if nothing is there.
        check(&Policy::Precise, &mut pods, 2);
        pods[1].waiting = 0;
        // Whom it chose once holds the prompt, it thinks.
        pods[2].usage = 0.1;
        check(&Policy::Approximate, &mut pods, 1);
        pods[1].usage = 0.9;
        check(&Policy::Approximate, &mut pods, 1);
    }

    #[test]
    fn what_was_sent_long_ago_is_forgotten() {
        let mut lru = Lru::default();
        for hash in [1, 2, 1, 3] {
            lru.touch(hash, 2);
        }
        assert!(lru.stamps.contains_key(&1) && !lru.stamps.contains_key(&2));
        assert_eq!((lru.stamps.len(), lru.by_stamp.len()), (2, 2));
    }
}
