//! Requests behind a recorded stream, as a small script (`tests/fixtures/engine/`), played into a cache.
//!
//! * `look NAME BLOCKS =LENGTH …`: a request whose prompt has `LENGTH` tokens, those of the blocks in
//!   front; what follows them is made up. It is looked up now. `salt=`, `lora=ID:NAME` and
//!   `item=IDENTIFIER@START+LENGTH` say what else it is; `$rank` is the stream's rank, and `fff` and `a1b2`
//!   stand for the long identifiers of the recordings.
//! * `start NAME`: its prompt is allocated.
//! * `step N NAME…`: `N` steps in which each computes one more token, and a batch after each.
//! * `free NAME`, `reset`, `flush` (ends a step: a batch, if there are events), `new` (another engine).
//! * `serve N FIRST SIZE =LENGTH`: `N` requests one after the other, each with the next `SIZE` blocks.
//! * `answer N FIRST SIZE =LENGTH`: the same, and each makes one further block.

use std::collections::HashMap;

use super::super::{Cache, CacheOptions, Fault, Hits, Sequence};
use crate::{
    loadgen::engine::sequence::{Identity, Item, Lora},
    wire::encode::Event,
};

/// Tokens that are in no recording.
const MADE_UP: u32 = 1 << 30;

struct Playing {
    id: u64,
    sequence: Sequence,
    // Of the prompt and all that it will answer.
    tokens: Vec<u32>,
    hits: Hits,
    computed: usize,
}

struct Player<'a> {
    options: CacheOptions,
    fault: Fault,
    rank: u32,
    blocks: &'a [Vec<u32>],
    cache: Cache,
    requests: HashMap<String, Playing>,
    next: u32,
    batches: Vec<Vec<Event>>,
}

/// Plays a script; `blocks` has the tokens of its blocks. Returns the batches.
pub(super) fn play(
    script: &str,
    rank: u32,
    blocks: &[Vec<u32>],
    options: CacheOptions,
    fault: Fault,
) -> Vec<Vec<Event>> {
    let mut player = Player {
        options,
        fault,
        rank,
        blocks,
        cache: cache(options, fault),
        requests: HashMap::new(),
        next: 0,
        batches: Vec::new(),
    };
    for line in script.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        player.line(&words);
    }
    player.batches
}

pub(super) fn cache(options: CacheOptions, fault: Fault) -> Cache {
    let mut cache = Cache::new(options);
    cache.fault = fault;
    cache
}

impl Player<'_> {
    fn line(&mut self, words: &[&str]) {
        match words {
            ["look", name, chain, rest @ ..] => self.look(name, &numbers(chain), rest),
            ["start", name] => self.start(name),
            ["step", times, names @ ..] => {
                for _ in 0..number(times) {
                    for name in names {
                        self.compute(name);
                    }
                    self.flush();
                }
            }
            ["free", name] => self.free(name),
            ["reset"] => {
                self.cache.reset();
            }
            ["flush"] => self.flush(),
            ["new"] => {
                self.cache = cache(self.options, self.fault);
                self.requests.clear();
            }
            ["serve", times, first, size, length] => {
                for at in 0..number(times) {
                    let first = number(first) + at * number(size);
                    let chain: Vec<usize> = (first..first + number(size)).collect();
                    self.look("-", &chain, &[length]);
                    self.start("-");
                    self.flush();
                    self.free("-");
                }
            }
            ["answer", times, first, size, length] => {
                for at in 0..number(times) {
                    let first = number(first) + at * (number(size) + 1);
                    let chain: Vec<usize> = (first..=first + number(size)).collect();
                    self.look("-", &chain, &[length]);
                    self.start("-");
                    self.flush();
                    for _ in 0..self.options.block_size {
                        self.compute("-");
                        self.flush();
                    }
                    self.free("-");
                }
            }
            other => panic!("{other:?}"),
        }
    }

    fn look(&mut self, name: &str, chain: &[usize], rest: &[&str]) {
        let (length, rest) = rest.split_first().unwrap();
        let length = number(length.strip_prefix('=').unwrap());
        let mut tokens: Vec<u32> =
            chain.iter().flat_map(|block| self.blocks[*block].clone()).collect();
        for _ in 0..self.options.block_size * 2 {
            self.next += 1;
            tokens.push(MADE_UP + self.next);
        }
        let mut identity = Identity::default();
        for option in rest {
            match option.split_once('=').unwrap() {
                ("salt", salt) => identity.salt = Some(salt.to_owned()),
                ("lora", lora) => {
                    let (id, name) = lora.split_once(':').unwrap();
                    identity.lora = Some(Lora { id: number(id) as u64, name: name.into() });
                }
                ("item", item) => identity.items.push(self.item(item)),
                other => panic!("{other:?}"),
            }
        }
        let size = self.options.block_size;
        let sequence = Sequence::new(tokens[..length].to_vec(), identity, size);
        let hits = self.cache.lookup(&sequence);
        let id = u64::from(self.next);
        let playing = Playing { id, sequence, tokens, hits, computed: 0 };
        assert!(self.requests.insert(name.to_owned(), playing).is_none(), "{name} runs");
    }

    fn item(&self, text: &str) -> Item {
        let (identifier, place) = text.split_once('@').unwrap();
        let (start, length) = place.split_once('+').unwrap();
        let identifier = match identifier {
            "fff$rank" => format!("{}{}", "f".repeat(63), self.rank),
            "a1b2" => "a1b2".repeat(16),
            other => other.to_owned(),
        };
        Item { identifier, start: number(start), length: number(length) }
    }

    fn start(&mut self, name: &str) {
        let it = self.requests.get_mut(name).unwrap();
        let computed = it.hits.len() * self.options.block_size;
        let all = it.sequence.tokens().len();
        self.cache.allocate(it.id, &it.sequence, &it.hits, computed, all - computed).unwrap();
        it.computed = all;
    }

    fn compute(&mut self, name: &str) {
        let it = self.requests.get_mut(name).unwrap();
        it.sequence.push(it.tokens[it.computed]);
        self.cache.allocate(it.id, &it.sequence, &Hits::default(), it.computed, 1).unwrap();
        it.computed += 1;
    }

    fn free(&mut self, name: &str) {
        let it = self.requests.remove(name).unwrap();
        self.cache.free(it.id);
    }

    fn flush(&mut self) {
        let events = self.cache.take_events();
        if !events.is_empty() {
            self.batches.push(events);
        }
    }
}

fn number(text: &str) -> usize {
    text.parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// `0..4,6` has both ends.
fn numbers(chain: &str) -> Vec<usize> {
    let mut all = Vec::new();
    for part in chain.split(',') {
        match part.split_once("..") {
            Some((first, last)) => all.extend(number(first)..=number(last)),
            None => all.push(number(part)),
        }
    }
    all
}
