//! Lookups of prompts in an index that holds them in one of several shapes.

use std::{hint::black_box, time::Duration};

use crate::{
    contender::{BLOCK, Contender, Event, Place, Writer},
    sample::{self, BATCH, Sample},
    stream::{Prompt, Random},
};

/// How the pods hold the prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Every pod holds all of it.
    Full,
    /// So does it here, and a branch of one block leaves the chain every 16 blocks.
    Frag,
    /// Pod i of W holds (i + 1) / W of it.
    Stag,
    /// Every pod holds the first 73 %, which eight prompts share; one pod holds all of it.
    Mix,
    /// As `Full`; the last 30 % lie in the second tier: on even pods too, on odd ones only there.
    Tier,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    /// The prompt.
    Whole,
    /// Its first half, and something else.
    Half,
    /// Something else in the first block.
    Miss,
}

/// One filled index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) blocks: usize,
    pub(crate) pods: u32,
    pub(crate) fill: Fill,
}

const BRANCH: usize = 16;
const SHARED: usize = 73;
const FIRST_TIER: usize = 70;

impl Shape {
    pub(crate) fn name(&self, case: Case) -> String {
        let what = match (self.fill, case) {
            (Fill::Full, Case::Whole) => "full",
            (_, Case::Half) => "half",
            (_, Case::Miss) => "miss",
            (Fill::Frag, _) => "frag",
            (Fill::Stag, _) => "stag",
            (Fill::Mix, _) => "mix73",
            (Fill::Tier, _) => "tier2",
        };
        format!("{}x{} {what}", self.blocks, self.pods)
    }

    fn held(&self, prompt: usize, pod: u32) -> usize {
        match self.fill {
            Fill::Full | Fill::Frag | Fill::Tier => self.blocks,
            Fill::Stag => self.blocks * (pod as usize + 1) / self.pods as usize,
            Fill::Mix if prompt as u32 % self.pods == pod => self.blocks,
            Fill::Mix => self.shared(),
        }
    }

    fn shared(&self) -> usize {
        self.blocks * SHARED / 100
    }

    /// As many distinct prompts as `entries` (block, pod) pairs have room for, at most a batch.
    fn prompts(&self, entries: usize) -> usize {
        (entries / (self.blocks * self.pods as usize)).clamp(1, BATCH)
    }

    /// The stream and the questions.
    pub(crate) fn plan(&self, entries: usize) -> Plan {
        let mut random = Random(11);
        let mut group = Prompt::new(&mut random, self.blocks);
        let mut prompts = Vec::new();
        for at in 0..self.prompts(entries) {
            if self.fill == Fill::Mix {
                if at % 8 == 0 {
                    group = Prompt::new(&mut random, self.blocks);
                }
                prompts.push(group.diverging(&mut random, self.shared(), self.blocks));
            } else {
                prompts.push(Prompt::new(&mut random, self.blocks));
            }
        }
        Plan { shape: *self, prompts, random }
    }
}

/// A shape's prompts.
#[derive(Debug)]
pub(crate) struct Plan {
    shape: Shape,
    prompts: Vec<Prompt>,
    random: Random,
}

impl Plan {
    pub(crate) fn prompts(&self) -> usize {
        self.prompts.len()
    }

    /// The bytes that hashing the prompts reads.
    pub(crate) fn bytes(&self) -> Vec<Vec<[u8; BLOCK * 4]>> {
        let block = |tokens: &[u32]| std::array::from_fn(|at| tokens[at / 4].to_le_bytes()[at % 4]);
        let prompt = |prompt: &Prompt| prompt.tokens.chunks_exact(BLOCK).map(block).collect();
        self.prompts.iter().map(prompt).collect()
    }

    /// Calls `apply` with each event. First comes what nobody asks for.
    fn events(&self, mut apply: impl FnMut(Event)) {
        let (shape, mut random) = (self.shape, self.random.clone());
        for at in 0..256 {
            Prompt::new(&mut random, 512).stored_whole(at % shape.pods).for_each(&mut apply);
        }
        for (at, prompt) in self.prompts.iter().enumerate() {
            for pod in 0..shape.pods {
                match (shape.fill, shape.held(at, pod)) {
                    (Fill::Tier, blocks) => {
                        let split = blocks * FIRST_TIER / 100;
                        apply(prompt.stored(pod, Place::Gpu, 0..blocks));
                        apply(prompt.stored(pod, Place::Cpu, split..blocks));
                        if pod % 2 == 1 {
                            apply(prompt.removed(pod, Place::Gpu, split..blocks));
                        }
                    }
                    (_, blocks) if blocks == shape.blocks => {
                        prompt.stored_whole(pod).for_each(&mut apply);
                    }
                    (_, blocks) => apply(prompt.stored(pod, Place::Gpu, 0..blocks)),
                }
            }
            if shape.fill == Fill::Frag {
                for branch in (BRANCH..shape.blocks).step_by(BRANCH) {
                    let other = prompt.diverging(&mut random, branch, branch + 1);
                    apply(other.stored(0, Place::Gpu, branch..branch + 1));
                }
            }
        }
    }

    /// The questions of a case, and for each the blocks of its prompt that it has.
    fn questions(&self, case: Case) -> Vec<(Vec<u32>, usize)> {
        // Not the stream of the events: what differs must be in no prompt.
        let (blocks, mut random) = (self.shape.blocks, Random(12));
        let ask = |prompt: &Prompt| {
            let mut tokens = prompt.tokens.to_vec();
            let (changed, common) = match case {
                Case::Whole => (0..0, blocks),
                Case::Half => (blocks / 2 * BLOCK..blocks * BLOCK, blocks / 2),
                Case::Miss => (0..BLOCK, 0),
            };
            let others = random.tokens(changed.len());
            tokens[changed].copy_from_slice(&others);
            (tokens, common)
        };
        self.prompts.iter().map(ask).collect()
    }

    /// What a question's answer is.
    fn truth(&self, prompt: usize, common: usize) -> Vec<(u32, u32)> {
        let pods = 0..self.shape.pods;
        pods.map(|pod| (pod, self.shape.held(prompt, pod).min(common) as u32))
            .filter(|(_, depth)| *depth > 0)
            .collect()
    }
}

/// What timing a subject takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) budget: Duration,
    pub(crate) empty: f64,
    pub(crate) cold: usize,
}

/// A filled index and its prepared questions, whatever its types are.
pub(crate) trait Subject {
    fn name(&self) -> &'static str;
    /// Prepares the questions of a case; returns whether every answer is the truth.
    fn ask(&mut self, case: Case) -> bool;
    /// Lookups alone, by batches.
    fn batches(&mut self, effort: Effort) -> Sample;
    /// Lookups alone, each timed.
    fn calls(&mut self, effort: Effort) -> Sample;
    /// The same, with cold caches.
    fn cold(&mut self, effort: Effort) -> Sample;
    /// Tokens to answer, by batches.
    fn whole(&mut self, effort: Effort) -> Sample;
}

struct Filled<'a, C: Contender> {
    plan: &'a Plan,
    index: C,
    tokens: Vec<Vec<u32>>,
    queries: Vec<C::Query>,
    answer: C::Answer,
    _writer: C::Writer,
}

/// Fills an index of a kind; `None` if it cannot have so many pods.
pub(crate) fn fill<C: Contender>(plan: &Plan) -> Option<Box<dyn Subject + '_>> {
    if plan.shape.pods > C::MAX_PODS {
        return None;
    }
    let index = C::new(plan.shape.pods);
    let mut writer = index.writer();
    plan.events(|event| writer.apply(C::prepare(&event)));
    writer.flush();
    Some(Box::new(Filled {
        plan,
        index,
        tokens: Vec::new(),
        queries: Vec::new(),
        answer: C::Answer::default(),
        _writer: writer,
    }))
}

impl<C: Contender> Subject for Filled<'_, C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn ask(&mut self, case: Case) -> bool {
        let questions = self.plan.questions(case);
        self.queries = questions.iter().map(|(tokens, _)| C::query(tokens)).collect();
        let right = self.queries.iter().zip(&questions).enumerate().all(|(at, (query, asked))| {
            let truth = self.plan.truth(at, asked.1);
            self.index.answers(query, &mut self.answer, &truth)
        });
        self.tokens = questions.into_iter().map(|(tokens, _)| tokens).collect();
        right
    }

    fn batches(&mut self, effort: Effort) -> Sample {
        let count = self.queries.len();
        sample::batches(effort.budget, |at| {
            self.index.lookup(black_box(&self.queries[at % count]), &mut self.answer);
        })
    }

    fn calls(&mut self, effort: Effort) -> Sample {
        let count = self.queries.len();
        sample::calls(effort.budget, effort.empty, |at| {
            self.index.lookup(black_box(&self.queries[at % count]), &mut self.answer);
        })
    }

    fn cold(&mut self, effort: Effort) -> Sample {
        let count = self.queries.len();
        sample::cold_calls(effort.cold, effort.empty, |at| {
            self.index.lookup(black_box(&self.queries[at % count]), &mut self.answer);
        })
    }

    fn whole(&mut self, effort: Effort) -> Sample {
        let count = self.tokens.len();
        sample::batches(effort.budget, |at| {
            let query = C::query(black_box(&self.tokens[at % count]));
            self.index.lookup(&query, &mut self.answer);
        })
    }
}
