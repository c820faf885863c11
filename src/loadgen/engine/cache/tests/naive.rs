//! The cache against a model of it that has no linked list and no maps, on random requests.

use std::collections::HashMap;

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use super::{
    super::{CacheOptions, EventFields, Fault, Hits, Sequence},
    script::cache,
};
use crate::{
    loadgen::engine::sequence::Identity,
    wire::encode::{Event, Hash},
};

const SIZE: usize = 2;

/// What a test does. Numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// Looks a prompt up and remembers what was found.
    Look {
        prompt: u8,
        length: u8,
    },
    /// Allocates what was looked up, if it is still true, in full or in part.
    Start {
        part: u8,
    },
    /// The next token of a request, or the rest of its prompt.
    Compute {
        request: u8,
    },
    Free {
        request: u8,
    },
    Reset,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..6_u8, 1..14_u8).prop_map(|(prompt, length)| Op::Look { prompt, length }),
        6 => any::<u8>().prop_map(|part| Op::Start { part }),
        8 => any::<u8>().prop_map(|request| Op::Compute { request }),
        5 => any::<u8>().prop_map(|request| Op::Free { request }),
        1 => Just(Op::Reset),
    ]
}

/// Prompts that share beginnings: 0 and 1 four tokens, and so on.
fn prompt(number: u8, length: u8) -> Vec<u32> {
    (0..u32::from(length))
        .map(|at| if at < 4 { u32::from(number / 2) } else { 100 * u32::from(number) + at })
        .collect()
}

/// Blocks by number; the free ones in a plain list.
#[derive(Default)]
struct Naive {
    users: Vec<usize>,
    hashes: Vec<Option<u64>>,
    /// Age of each hash: when its block got it.
    ages: Vec<u64>,
    clock: u64,
    queue: Vec<usize>,
    requests: HashMap<u64, (Vec<usize>, usize)>,
    told: Vec<(bool, u64)>,
    unhashed_first: bool,
}

impl Naive {
    fn new(blocks: usize, unhashed_first: bool) -> Self {
        Self {
            users: vec![0; blocks],
            hashes: vec![None; blocks],
            ages: vec![0; blocks],
            queue: (1..blocks).collect(),
            unhashed_first,
            ..Self::default()
        }
    }

    fn lookup(&self, sequence: &Sequence) -> Vec<usize> {
        let most = (sequence.tokens().len() - 1) / SIZE;
        let oldest = |hash: &u64| {
            let blocks = (0..self.hashes.len()).filter(|block| self.hashes[*block] == Some(*hash));
            blocks.min_by_key(|block| self.ages[*block])
        };
        sequence.hashes().iter().take(most).map_while(oldest).collect()
    }

    fn allocate(&mut self, id: u64, sequence: &Sequence, hits: &[usize], until: usize) -> bool {
        let held = self.requests.get(&id).map_or(0, |(blocks, _)| blocks.len()) + hits.len();
        let needed = until.div_ceil(SIZE).saturating_sub(held);
        let queued = hits.iter().filter(|hit| self.queue.contains(hit)).count();
        if needed + queued > self.queue.len() {
            return false;
        }
        let (mut blocks, mut announced) = self.requests.remove(&id).unwrap_or_default();
        for hit in hits {
            self.queue.retain(|block| block != hit);
            self.users[*hit] += 1;
            blocks.push(*hit);
            announced += 1;
        }
        for _ in 0..needed {
            let block = self.queue.remove(0);
            self.users[block] = 1;
            if let Some(hash) = self.hashes[block].take() {
                self.told.push((false, hash));
            }
            blocks.push(block);
        }
        while announced < until.min(sequence.tokens().len()) / SIZE {
            let hash = sequence.hashes()[announced];
            self.clock += 1;
            self.hashes[blocks[announced]] = Some(hash);
            self.ages[blocks[announced]] = self.clock;
            self.told.push((true, hash));
            announced += 1;
        }
        self.requests.insert(id, (blocks, announced));
        true
    }

    fn free(&mut self, id: u64) {
        let (blocks, _) = self.requests.remove(&id).unwrap();
        let mut first = Vec::new();
        for block in blocks.into_iter().rev() {
            self.users[block] -= 1;
            if self.users[block] > 0 {
                continue;
            }
            if self.unhashed_first && self.hashes[block].is_none() {
                first.push(block);
            } else {
                self.queue.push(block);
            }
        }
        self.queue.splice(0..0, first);
    }
}

struct Running {
    id: u64,
    sequence: Sequence,
    computed: usize,
}

/// Stores and removals one by one, and counts of what the stream says is held.
fn replay(events: Vec<Event>, held: &mut HashMap<u64, usize>) -> Vec<(bool, u64)> {
    let mut told = Vec::new();
    let number = |hash: &Hash| match hash {
        Hash::Unsigned(hash) => *hash,
        _ => panic!("{hash:?}"),
    };
    for event in events {
        match event {
            Event::BlockStored(it) => {
                for hash in &it.block_hashes {
                    *held.entry(number(hash)).or_default() += 1;
                    told.push((true, number(hash)));
                }
            }
            Event::BlockRemoved(it) => {
                for hash in &it.block_hashes {
                    let count = held.get_mut(&number(hash)).expect("removed and not held");
                    *count -= 1;
                    if *count == 0 {
                        held.remove(&number(hash));
                    }
                    told.push((false, number(hash)));
                }
            }
            Event::AllBlocksCleared => held.clear(),
        }
    }
    told
}

fn run(ops: &[Op], blocks: u32, unhashed_first: bool, fault: Fault) -> Result<(), TestCaseError> {
    let options = CacheOptions {
        num_gpu_blocks: blocks,
        block_size: SIZE,
        fields: EventFields::default(),
        unhashed_first,
    };
    let mut cache = cache(options, fault);
    let mut naive = Naive::new(blocks as usize, unhashed_first);
    let mut looked: Vec<(Sequence, Hits, Vec<usize>)> = Vec::new();
    let mut running: Vec<Running> = Vec::new();
    let mut held = HashMap::new();
    let mut next = 0;
    for op in ops {
        match *op {
            Op::Look { prompt: number, length } => {
                let sequence = Sequence::new(prompt(number, length), Identity::default(), SIZE);
                let (hits, want) = (cache.lookup(&sequence), naive.lookup(&sequence));
                prop_assert_eq!(
                    &hits.blocks.iter().map(|b| *b as usize).collect::<Vec<_>>(),
                    &want
                );
                looked.push((sequence, hits, want));
            }
            Op::Start { part } => {
                let Some((sequence, hits, want)) = looked.pop() else { continue };
                // Hits are valid until they are evicted: two may be looked up, then both started.
                if naive.lookup(&sequence)[..].get(..want.len()) != Some(&want[..]) {
                    continue;
                }
                let found = hits.len() * SIZE;
                let tokens = 1 + usize::from(part) % (sequence.tokens().len() - found);
                let got = cache.allocate(next, &sequence, &hits, found, tokens).is_ok();
                prop_assert_eq!(got, naive.allocate(next, &sequence, &want, found + tokens));
                if got {
                    running.push(Running { id: next, sequence, computed: found + tokens });
                }
                next += 1;
            }
            Op::Compute { request } if !running.is_empty() => {
                let at = usize::from(request) % running.len();
                let it = &mut running[at];
                if it.computed == it.sequence.tokens().len() {
                    it.sequence.push(it.computed as u32 % 3);
                }
                let until = it.sequence.tokens().len();
                let got = cache
                    .allocate(
                        it.id,
                        &it.sequence,
                        &Hits::default(),
                        it.computed,
                        until - it.computed,
                    )
                    .is_ok();
                prop_assert_eq!(got, naive.allocate(it.id, &it.sequence, &[], until));
                if got {
                    it.computed = until;
                } else {
                    let it = running.remove(at);
                    cache.free(it.id);
                    naive.free(it.id);
                }
            }
            Op::Free { request } if !running.is_empty() => {
                let it = running.remove(usize::from(request) % running.len());
                cache.free(it.id);
                naive.free(it.id);
            }
            Op::Reset => {
                let all = naive.users.iter().all(|users| *users == 0);
                prop_assert_eq!(cache.reset(), all);
                if all {
                    naive.hashes.fill(None);
                    looked.clear();
                }
            }
            Op::Compute { .. } | Op::Free { .. } => {}
        }
        let told = replay(cache.take_events(), &mut held);
        prop_assert_eq!(told, std::mem::take(&mut naive.told), "{:?}", op);
        let used = naive.users.iter().filter(|users| **users > 0).count();
        prop_assert_eq!(cache.free_blocks() + used, cache.usable_blocks());
        let queue: Vec<usize> = cache.free.iter().map(|block| block as usize).collect();
        prop_assert_eq!(&queue, &naive.queue, "{:?}", op);
        // What the events add up to is what is there.
        let contents: HashMap<u64, usize> =
            cache.contents().map(|block| (block.hash, block.copies)).collect();
        prop_assert_eq!(&contents, &held);
    }
    Ok(())
}

proptest! {
    #[test]
    fn it_does_what_the_model_does(
        ops in prop::collection::vec(op(), 1..200),
        blocks in 4..30_u32,
        unhashed_first: bool,
    ) {
        run(&ops, blocks, unhashed_first, Fault::None)?;
    }
}

#[test]
fn planted_errors_are_found() {
    for fault in [Fault::ForwardFree, Fault::Fifo, Fault::YoungestCopy, Fault::StoresOnce] {
        let config = Config { failure_persistence: None, ..Config::default() };
        let rng = TestRunner::deterministic().new_rng();
        let mut runner = TestRunner::new_with_rng(config, rng);
        let ops = prop::collection::vec(op(), 1..200);
        let found = runner.run(&ops, |ops| run(&ops, 12, true, fault));
        assert!(found.is_err(), "{fault:?}");
    }
}
