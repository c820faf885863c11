//! Who shares what.
//!
//! # Model
//!
//! | kind | its prompts |
//! | --- | --- |
//! | `shared-prefix` | `groups` × `prompts` pairs of a system prompt and a question, asked again and again |
//! | `unique` | nothing in common |
//! | `short` | the same, shorter than most blocks |
//! | `one-prefix` | one system prompt for all, and a new question each time |
//! | `chat` | conversations: a turn is all that was said before, and a new question |
//!
//! `shared-prefix` goes through all pairs in a random order, then in another one; with `zipf` a group is
//! drawn by its popularity instead. In `chat`, `sessions` conversations take turns, and as many new ones
//! follow when they are through. What an engine answered is not known when a plan is made: a later turn
//! has as many other tokens in its place, so that of the turn before its prompt can be reused, not its
//! answer.

use std::{collections::VecDeque, fmt, str::FromStr, time::Duration};

use fastrand::Rng;

use super::{
    After, Lengths, Part, Planned, Prompt,
    random::{Role, Zipf, seed_of},
    text::{Fields, Written, number, unknown, whole},
};
use crate::support::units;

/// Names, and what they stand for. A kind's own name has the lengths of the published workload with 73 %
/// of the fleet's capacity.
const NAMED: [(&str, &str); 8] = [
    ("capacity-73", "shared-prefix:groups=150,prompts=5,system=6000,question=1200,output=1000"),
    ("capacity-37", "shared-prefix:groups=83,prompts=3,system=8000,question=1000,output=1000"),
    (
        "zipf-1.2",
        "shared-prefix:groups=150,prompts=5,system=6000,question=1200,output=1000,zipf=1.2",
    ),
    ("shared-prefix", "shared-prefix:groups=150,prompts=5,system=6000,question=1200,output=1000"),
    ("unique", "unique:prompt=7200,output=1000"),
    ("short", "short:prompt=12,output=16"),
    ("one-prefix", "one-prefix:system=6000,question=1200,output=1000"),
    ("chat", "chat:sessions=50,turns=6,system=6000,question=300,answer=300,think=1s"),
];
/// Groups, prompts of a group, sessions, turns, at most.
const MAX_COUNT: u32 = 1_000_000;
/// Pairs of group and prompt at most.
const MAX_PAIRS: u64 = 10_000_000;

/// A kind of traffic and its measures: `shared-prefix:groups=150,prompts=5,system=6000,…`, or one of the
/// names `capacity-73`, `capacity-37`, `zipf-1.2`, with other values for some fields if need be:
/// `capacity-73:scale=0.1`. Every field may be left out. Lengths are written as [`Lengths`] are.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Who shares what.
    pub kind: Kind,
    /// Factor of all lengths, above 0; nothing becomes shorter than one token.
    pub scale: f64,
}

/// Kinds of traffic; see the module's page.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Pairs of group and question, asked again and again.
    SharedPrefix {
        /// Groups, each with a system prompt.
        groups: u32,
        /// Questions of each group.
        prompts: u32,
        /// Of a system prompt.
        system: Lengths,
        /// Of a question.
        question: Lengths,
        /// Of an answer.
        output: Lengths,
        /// Exponent of the popularity of groups; `None` = all alike.
        zipf: Option<f64>,
    },
    /// Nothing in common.
    Unique {
        /// Of a prompt.
        prompt: Lengths,
        /// Of an answer.
        output: Lengths,
    },
    /// Nothing in common, and short.
    Short {
        /// Of a prompt.
        prompt: Lengths,
        /// Of an answer.
        output: Lengths,
    },
    /// One system prompt for all, and a question of its own for each.
    OnePrefix {
        /// Of the system prompt.
        system: Lengths,
        /// Of a question.
        question: Lengths,
        /// Of an answer.
        output: Lengths,
    },
    /// Conversations, with one system prompt for all.
    Chat {
        /// Conversations that take turns.
        sessions: u32,
        /// Turns of each.
        turns: u32,
        /// Of the system prompt.
        system: Lengths,
        /// Of a question.
        question: Lengths,
        /// Of an answer.
        answer: Lengths,
        /// From an answer's end to the next question.
        think: Duration,
    },
}

/// Draws of one workload.
#[derive(Clone, Copy)]
struct Draw {
    seed: u64,
    scale: f64,
}

impl Draw {
    /// A part of a role; its length depends on its seed only.
    fn part(self, role: Role, index: u64, lengths: &Lengths) -> Part {
        let seed = seed_of(self.seed, role, index);
        Part { seed, tokens: lengths.draw(&mut Rng::with_seed(seed), self.scale) }
    }

    fn request<const N: usize>(self, parts: [Part; N], group: u32, max_tokens: u32) -> Planned {
        let prompt = Prompt { parts: parts.into() };
        Planned { at: None, burst: None, prompt, max_tokens, group, after: None }
    }

    fn output(self, index: u64, lengths: &Lengths) -> u32 {
        self.part(Role::Output, index, lengths).tokens
    }
}

impl Workload {
    /// `count` requests without arrivals, in the order in which they are to be sent.
    #[must_use]
    pub fn requests(&self, seed: u64, count: usize) -> Vec<Planned> {
        self.requests_from(seed, 0, count)
    }

    /// The same for a later stage of a run, before which `first` requests were made in all: what is
    /// asked again and again is the same, what is asked once is new.
    #[must_use]
    pub fn requests_from(&self, seed: u64, first: u64, count: usize) -> Vec<Planned> {
        let draw = Draw { seed, scale: self.scale };
        let serials = (first..).take(count);
        match &self.kind {
            Kind::SharedPrefix { groups, prompts, zipf, .. } => {
                let mut rng = Rng::with_seed(seed_of(seed, Role::Order, first));
                match zipf {
                    Some(exponent) => {
                        let zipf = Zipf::new(*groups, *exponent);
                        serials
                            .map(|_| {
                                let group = zipf.draw(&mut rng);
                                self.pair(draw, group, rng.u32(..(*prompts).max(1)))
                            })
                            .collect()
                    }
                    None => {
                        let mut order = pairs(*groups, *prompts);
                        let mut requests = Vec::with_capacity(count);
                        while requests.len() < count && !order.is_empty() {
                            rng.shuffle(&mut order);
                            let left = order.iter().take(count - requests.len());
                            requests.extend(
                                left.map(|&(group, prompt)| self.pair(draw, group, prompt)),
                            );
                        }
                        requests
                    }
                }
            }
            Kind::Unique { prompt, output } | Kind::Short { prompt, output } => serials
                .map(|at| {
                    let part = draw.part(Role::Unique, at, prompt);
                    // Groups are for counting; nobody makes four thousand million requests.
                    draw.request([part], (at % (1 << 32)) as u32, draw.output(at, output))
                })
                .collect(),
            Kind::OnePrefix { system, question, output } => {
                let system = draw.part(Role::System, 0, system);
                serials
                    .map(|at| {
                        let question = draw.part(Role::Unique, at, question);
                        draw.request([system, question], 0, draw.output(at, output))
                    })
                    .collect()
            }
            Kind::Chat { .. } => self.conversations(draw, first, count),
        }
    }

    /// One pass over everything that is asked for again and again, for warming up; empty if nothing is.
    #[must_use]
    pub fn residents(&self, seed: u64) -> Vec<Planned> {
        let draw = Draw { seed, scale: self.scale };
        match &self.kind {
            Kind::SharedPrefix { groups, prompts, .. } => pairs(*groups, *prompts)
                .into_iter()
                .map(|(group, prompt)| self.pair(draw, group, prompt))
                .collect(),
            Kind::OnePrefix { system, output, .. } | Kind::Chat { system, answer: output, .. } => {
                let system = draw.part(Role::System, 0, system);
                vec![draw.request([system], 0, draw.output(0, output))]
            }
            Kind::Unique { .. } | Kind::Short { .. } => Vec::new(),
        }
    }

    /// Requests that come of one arrival: the turns of a conversation, otherwise 1.
    #[must_use]
    pub fn turns(&self) -> u32 {
        match self.kind {
            Kind::Chat { turns, .. } => turns.max(1),
            _ => 1,
        }
    }

    /// The request of a pair: always the same.
    fn pair(&self, draw: Draw, group: u32, prompt: u32) -> Planned {
        let Kind::SharedPrefix { prompts, system, question, output, .. } = &self.kind else {
            return draw.request([], group, 1);
        };
        let index = u64::from(group) * u64::from(*prompts) + u64::from(prompt);
        let parts = [
            draw.part(Role::System, group.into(), system),
            draw.part(Role::Question, index, question),
        ];
        draw.request(parts, group, draw.output(index, output))
    }

    fn conversations(&self, draw: Draw, first: u64, count: usize) -> Vec<Planned> {
        let Kind::Chat { sessions, turns, system, question, answer, think } = &self.kind else {
            return Vec::new();
        };
        let turns = (*turns).max(1);
        let sessions = (*sessions).max(1) as usize;
        let system = draw.part(Role::System, 0, system);
        let mut requests: Vec<Planned> = Vec::with_capacity(count);
        // Conversations that take turns: what was said, and the turn that is next. A number of their own
        // for each request keeps stages of a run apart.
        let mut open: VecDeque<(Vec<Part>, u32)> = VecDeque::new();
        while requests.len() < count {
            if open.is_empty() {
                open.extend((0..sessions).map(|_| (vec![system], 0)));
            }
            let Some((mut said, turn)) = open.pop_front() else { break };
            let at = requests.len();
            let serial = first + at as u64;
            said.push(draw.part(Role::Unique, serial, question));
            let max_tokens = draw.output(serial, answer);
            let mut request = draw.request([], 0, max_tokens);
            request.prompt = Prompt { parts: said.as_slice().into() };
            // All conversations are at the same turn: the turn before was one round earlier.
            request.after = u32::try_from(at.wrapping_sub(sessions))
                .ok()
                .filter(|_| turn > 0)
                .map(|request| After { request, think: *think });
            requests.push(request);
            if turn + 1 < turns {
                let seed = seed_of(draw.seed, Role::Answer, serial);
                said.push(Part { seed, tokens: max_tokens });
                open.push_back((said, turn + 1));
            }
        }
        requests
    }
}

fn pairs(groups: u32, prompts: u32) -> Vec<(u32, u32)> {
    (0..groups).flat_map(|group| (0..prompts).map(move |prompt| (group, prompt))).collect()
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut given = Fields::read(text)?;
        let Some((_, base)) = NAMED.iter().find(|(name, _)| *name == given.name) else {
            let known = NAMED.iter().map(|(name, _)| *name);
            return Err(unknown("workload", given.name, known));
        };
        let mut base = Fields::read(base)?;
        let kind = base.name;
        // The given value, else that of the name.
        let mut length = |key| match given.with(key, Lengths::from_str)? {
            Some(lengths) => Ok(lengths),
            None => base.need(key, Lengths::from_str),
        };
        let kind = match kind {
            "shared-prefix" => {
                let [system, question, output] =
                    [length("system")?, length("question")?, length("output")?];
                let mut count = |key| match given.with(key, whole(1, MAX_COUNT))? {
                    Some(count) => Ok(count),
                    None => base.need(key, whole(1, MAX_COUNT)),
                };
                let (groups, prompts) = (count("groups")?, count("prompts")?);
                if u64::from(groups) * u64::from(prompts) > MAX_PAIRS {
                    return Err(format!("{kind}: groups × prompts is more than {MAX_PAIRS}"));
                }
                let zipf = match given.with("zipf", number(0.0, 10.0))? {
                    None => base.with("zipf", number(0.0, 10.0))?,
                    zipf => zipf,
                };
                Kind::SharedPrefix { groups, prompts, system, question, output, zipf }
            }
            "unique" => Kind::Unique { prompt: length("prompt")?, output: length("output")? },
            "short" => Kind::Short { prompt: length("prompt")?, output: length("output")? },
            "one-prefix" => Kind::OnePrefix {
                system: length("system")?,
                question: length("question")?,
                output: length("output")?,
            },
            _ => {
                let [system, question, answer] =
                    [length("system")?, length("question")?, length("answer")?];
                let mut count = |key, most| match given.with(key, whole(1, most))? {
                    Some(count) => Ok(count),
                    None => base.need(key, whole(1, most)),
                };
                let (sessions, turns) = (count("sessions", MAX_COUNT)?, count("turns", 1_000)?);
                let think = match given.with("think", units::duration)? {
                    Some(think) => think,
                    None => base.need("think", units::duration)?,
                };
                Kind::Chat { sessions, turns, system, question, answer, think }
            }
        };
        let scale = given.with("scale", number(1e-6, 1e3))?.unwrap_or(1.0);
        given.end()?;
        Ok(Self { kind, scale })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::SharedPrefix { groups, prompts, system, question, output, zipf } => {
                write!(
                    f,
                    "shared-prefix:groups={groups},prompts={prompts},system={system},\
                     question={question},output={output}"
                )?;
                if let Some(zipf) = zipf {
                    write!(f, ",zipf={zipf}")?;
                }
            }
            Kind::Unique { prompt, output } => write!(f, "unique:prompt={prompt},output={output}")?,
            Kind::Short { prompt, output } => write!(f, "short:prompt={prompt},output={output}")?,
            Kind::OnePrefix { system, question, output } => {
                write!(f, "one-prefix:system={system},question={question},output={output}")?;
            }
            Kind::Chat { sessions, turns, system, question, answer, think } => {
                let think = Written(*think);
                write!(
                    f,
                    "chat:sessions={sessions},turns={turns},system={system},question={question},\
                     answer={answer},think={think}"
                )?;
            }
        }
        if self.scale != 1.0 {
            write!(f, ",scale={}", self.scale)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
