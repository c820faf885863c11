//! The reference model on recorded streams and on chains small enough to check by hand. None of these
//! needs an indexer.

use std::collections::{HashMap, HashSet};

use kv_indexer::hash::{Algorithm, MultimodalItem, Prompt, Scheme};

use crate::streams::{
    decode::{Event, Extra, Key, Stored},
    model::{Chains, Requests, Worker, replay},
    truth::Fixture,
};

/// The engine's own cache is what counting the events gives, at every moment of every stream.
#[test]
fn truth_is_what_the_events_say() {
    let mut moments = 0;
    for name in Fixture::names() {
        let fixture = Fixture::load(&name);
        replay(&fixture, |worker, rank, at| {
            let moment = &rank.moments[at];
            let rank = rank.stream.rank;
            assert!(worker.counts() == &moment.cached, "{name} rank {rank} {}", moment.label);
            moments += 1;
        });
        assert!(fixture.ranks.iter().all(|rank| !rank.moments.is_empty()), "{name}");
    }
    assert_eq!(Fixture::names().len(), 29);
    assert!(moments > 140, "{moments}");
}

/// Counting matters: with set semantics most `basic` streams are wrong at a checkpoint, and without
/// them the one that announces again is.
#[test]
fn the_other_semantics_is_noticed() {
    for (name, set_semantics) in
        [("vllm-0.33.0/basic_int_sha256", true), ("vllm-0.33.0/report_full_int", false)]
    {
        let fixture = Fixture::load(name);
        let mut wrong = 0;
        let mut chains = Chains::default();
        for rank in &fixture.ranks {
            let mut worker = Worker::new(set_semantics);
            for (at, batch) in rank.stream.batches.iter().enumerate() {
                let (_, events) = crate::streams::decode::batch(&batch.payload);
                events.iter().for_each(|event| worker.apply(&mut chains, event));
                let here = rank.moments.iter().filter(|moment| moment.published == at + 1);
                wrong += here.filter(|moment| moment.cached != *worker.counts()).count();
            }
        }
        assert!(wrong > 0, "{name}");
    }
}

/// With request blocks as large as engine blocks and one group, depth is a walk down the path.
#[test]
fn depth_is_a_walk_where_blocks_coincide() {
    let mut deep = 0;
    for fixture in &Fixture::small() {
        let (chains, workers) = replay(fixture, |_, _, _| {});
        let requests = Requests::new(&chains, fixture.block_size);
        for (rank, worker) in fixture.ranks.iter().zip(&workers) {
            for moment in &rank.moments {
                let held = worker.held(&moment.cached, None);
                let nodes: Vec<_> = held.groups().collect();
                let [(None, nodes)] = nodes[..] else { continue };
                for node in 0..chains.len() {
                    let path = chains.path(node);
                    let walked = path.iter().take_while(|&node| nodes.contains(node)).count();
                    let blocks = requests.of(&chains, node);
                    assert_eq!(blocks.len(), path.len());
                    assert_eq!(requests.depth(&blocks, &held), walked, "{}", fixture.name);
                    deep += usize::from(walked > 1);
                }
            }
        }
    }
    assert!(deep > 1000, "{deep}");
}

/// Other request block sizes, by brute force over tokens: at each engine position that the request
/// block overlaps, some held block agrees with the prompt as far as both reach.
#[test]
fn other_block_sizes_are_coverage_by_token() {
    let mut partial = 0;
    for name in ["vllm-0.33.0/basic_int_sha256", "sglang-0.5.23/radix_eagle_bigram"] {
        let fixture = Fixture::load(name);
        let (chains, workers) = replay(&fixture, |_, _, _| {});
        let engine = fixture.block_size;
        let prompts: Vec<_> = (0..chains.len()).map(|node| chains.query(node).tokens).collect();
        for size in [8, 16, 24, 64] {
            let requests = Requests::new(&chains, size);
            for (rank, worker) in fixture.ranks.iter().zip(&workers) {
                let cached = &rank.moments[rank.moments.len() / 2].cached;
                let held = worker.held(cached, None);
                let (_, nodes) = held.groups().next().unwrap();
                let covered = |prompt: &[u32], block: usize| {
                    let (from, to) = (block * size, (block + 1) * size);
                    (from / engine..to.div_ceil(engine)).all(|position| {
                        nodes.iter().map(|&node| &prompts[node]).any(|other| {
                            let reach = other.len().min(to);
                            other.len() == (position + 1) * engine
                                && other[..reach] == prompt[..reach]
                        })
                    })
                };
                for (node, prompt) in prompts.iter().enumerate() {
                    let blocks = prompt.len() / size;
                    let expected = (0..blocks).take_while(|&at| covered(prompt, at)).count();
                    let depth = requests.depth(&requests.of(&chains, node), &held);
                    assert_eq!(depth, expected, "{name} {size} {node}");
                    partial += usize::from(depth > 0 && depth < blocks);
                }
            }
        }
    }
    assert!(partial > 20, "{partial}");
}

/// Streams whose engine version does not put salts and items on the wire map several engine keys to
/// one place; newer ones do not.
#[test]
fn invisible_extras_share_a_place() {
    let places = |name: &str| {
        let fixture = Fixture::load(name);
        let (chains, _) = replay(&fixture, |_, _, _| {});
        let roots = (0..chains.len()).filter(|&node| chains.path(node).len() == 1);
        roots
            .map(|node| chains.query(node).tokens)
            .collect::<HashSet<_>>()
            .len()
            .abs_diff((0..chains.len()).filter(|&node| chains.path(node).len() == 1).count())
    };
    // Beside the plain prompt: salt and items visible or not, two adapters visible in all.
    assert!(places("vllm-0.33.0/extra_int") > places("vllm-0.16.0/extra_int"));
    assert!(places("vllm-0.16.0/extra_int") > 0);
    assert_eq!(places("sglang-0.5.10/radix_reencoded"), 0);
    assert!(places("sglang-0.5.23/radix_default") > 0);
}

/// What a router sends for a chain has the keys of the chain's request blocks: equal where those are
/// equal, different where they differ.
#[test]
fn queries_hash_as_the_model_counts() {
    for fixture in &Fixture::small() {
        let (chains, _) = replay(fixture, |_, _, _| {});
        for size in [8, 16, 32, 64] {
            let scheme = Scheme::new(Algorithm::Xxh3, "", size);
            let requests = Requests::new(&chains, size as usize);
            let (mut by_key, mut by_block) = (HashMap::new(), HashMap::new());
            for node in 0..chains.len() {
                let query = chains.query(node);
                let multimodal: Vec<_> = query
                    .items
                    .iter()
                    .map(|(hash, offset, length)| MultimodalItem {
                        hash: hash.clone(),
                        offset: *offset as u32,
                        length: *length as u32,
                    })
                    .collect();
                let prompt = Prompt {
                    model: "m",
                    lora: &query.lora,
                    tokens: &query.tokens,
                    cache_salt: &query.salt,
                    multimodal: &multimodal,
                };
                let (keys, blocks) = (prompt.keys(&scheme).unwrap(), requests.of(&chains, node));
                assert_eq!(keys.len(), blocks.len());
                for (key, block) in keys.into_iter().zip(blocks) {
                    assert_eq!(*by_key.entry(key).or_insert(block), block, "{}", fixture.name);
                    assert_eq!(*by_block.entry(block).or_insert(key), key, "{}", fixture.name);
                }
            }
        }
    }
}

// ---- by hand -----------------------------------------------------------------------------------

const FULL: (u32, Option<usize>) = (0, None);

struct Bench {
    chains: Chains,
    worker: Worker,
}

impl Bench {
    fn new() -> Self {
        Self { chains: Chains::default(), worker: Worker::default() }
    }

    /// Blocks of four tokens, each token the number of its block's key.
    fn store(&mut self, keys: &[Key], parent: Option<Key>, group: (u32, Option<usize>)) {
        let tokens = keys.iter().flat_map(|&key| [key as u32; 4]).collect();
        self.store_tokens(keys, parent, group, tokens);
    }

    fn store_tokens(
        &mut self,
        keys: &[Key],
        parent: Option<Key>,
        (group, window): (u32, Option<usize>),
        tokens: Vec<u32>,
    ) {
        let (keys, medium) = (keys.to_vec(), "GPU".to_owned());
        let block_size = 4;
        let event =
            Stored { keys, parent, tokens, block_size, group, window, medium, ..Stored::default() };
        self.worker.apply(&mut self.chains, &Event::Stored(event));
    }

    fn remove(&mut self, keys: &[Key], group: u32) {
        let event = Event::Removed { keys: keys.to_vec(), group, medium: "GPU".to_owned() };
        self.worker.apply(&mut self.chains, &event);
    }

    #[track_caller]
    fn check(&self, tokens: &[u32], block_size: usize, expected: usize) {
        let requests = Requests::new(&self.chains, block_size);
        let held = self.worker.held(self.worker.counts(), None);
        let mut all = 0..self.chains.len();
        let node = all.find(|&node| self.chains.query(node).tokens == tokens).unwrap();
        assert_eq!(requests.depth(&requests.of(&self.chains, node), &held), expected);
    }
}

fn tokens(blocks: &[u32]) -> Vec<u32> {
    blocks.iter().flat_map(|&block| [block; 4]).collect()
}

#[test]
fn copies_count() {
    let mut bench = Bench::new();
    bench.store(&[1, 2], None, FULL);
    bench.store(&[1, 2], None, FULL);
    bench.remove(&[2], 0);
    bench.check(&tokens(&[1, 2]), 4, 2);
    bench.remove(&[2], 0);
    bench.check(&tokens(&[1, 2]), 4, 1);
    bench.remove(&[2], 0);
    bench.store(&[2], Some(1), FULL);
    bench.check(&tokens(&[1, 2]), 4, 2);
}

#[test]
fn any_key_at_a_position_all_positions() {
    let mut bench = Bench::new();
    bench.store(&[1, 2, 3], None, FULL);
    // Another name for the first block's content, as under an invisible salt.
    bench.store_tokens(&[11], None, FULL, tokens(&[1]));
    bench.remove(&[1], 0);
    bench.check(&tokens(&[1, 2, 3]), 4, 3);
    bench.remove(&[11], 0);
    bench.check(&tokens(&[1, 2, 3]), 4, 0);
}

#[test]
fn request_blocks_of_another_size_are_covered_by_tokens() {
    let mut bench = Bench::new();
    bench.store(&[1, 2, 3, 4], None, FULL);
    bench.check(&tokens(&[1, 2, 3, 4]), 2, 8);
    bench.check(&tokens(&[1, 2, 3, 4]), 8, 2);
    bench.check(&tokens(&[1, 2, 3, 4]), 6, 2);
    bench.check(&tokens(&[1, 2, 3]), 8, 1);
    bench.remove(&[4], 0);
    bench.check(&tokens(&[1, 2, 3, 4]), 2, 6);
    bench.check(&tokens(&[1, 2, 3, 4]), 8, 1);
    bench.check(&tokens(&[1, 2, 3, 4]), 6, 2);
    bench.remove(&[3], 0);
    bench.check(&tokens(&[1, 2, 3, 4]), 6, 1);
    bench.remove(&[1], 0);
    bench.check(&tokens(&[1, 2, 3, 4]), 2, 0);
}

#[test]
fn a_sibling_covers_the_tokens_that_it_shares() {
    let mut bench = Bench::new();
    bench.store(&[1, 2], None, FULL);
    bench.store_tokens(&[3], Some(1), FULL, vec![2, 2, 9, 9]);
    bench.remove(&[2], 0);
    bench.check(&tokens(&[1, 2]), 4, 1);
    // Two-token blocks: 11 11 22 are the sibling's, too.
    bench.check(&tokens(&[1, 2]), 2, 3);
}

#[test]
fn windows_need_the_blocks_that_end_the_prefix() {
    let window = (1, Some(6)); // ceil(5 / 4) = 2 blocks of four
    let mut bench = Bench::new();
    bench.store(&[1, 2, 3, 4, 5], None, FULL);
    bench.store(&[1, 2, 3, 4, 5], None, window);
    let all = tokens(&[1, 2, 3, 4, 5]);
    bench.check(&all, 4, 5);
    bench.remove(&[1, 2, 3], 1);
    bench.check(&all, 4, 5);
    bench.remove(&[4], 1);
    // 5 needs 4; 4 needs itself; 1 … 3 need blocks that are gone.
    bench.check(&all, 4, 0);
    bench.store(&[1], None, window);
    bench.check(&all, 4, 1);
    bench.store(&[2, 3], Some(1), window);
    bench.check(&all, 4, 3);
    bench.remove(&[1], 1);
    bench.check(&all, 4, 3);
    // One block of eight tokens covers the window: 3 and 4 for L = 2, 1 and 2 for L = 1.
    bench.check(&all, 8, 0);
    bench.remove(&[3], 0);
    bench.store(&[1, 2], None, window);
    bench.check(&all, 4, 2);
    bench.check(&all, 8, 1);
}

#[test]
fn sparse_window_stores_are_placed_by_the_full_group() {
    let mut bench = Bench::new();
    bench.store(&[1, 2, 3], None, FULL);
    // Two keys for three blocks of tokens: which ones, only their names tell.
    bench.store_tokens(&[2, 3], None, (1, Some(6)), tokens(&[1, 2, 3]));
    bench.store_tokens(&[], None, (1, Some(6)), tokens(&[1]));
    bench.check(&tokens(&[1, 2, 3]), 4, 3);
    bench.check(&tokens(&[1, 2]), 4, 0);
}

#[test]
fn items_and_salt_become_what_a_router_sends() {
    let item = |id: &str, offset| Extra::Item { id: id.to_owned(), offset };
    let mut bench = Bench::new();
    let stored = Stored {
        keys: vec![1, 2, 3],
        tokens: tokens(&[1, 2, 3]),
        block_size: 4,
        lora: "sql".to_owned(),
        extras: vec![
            vec![Extra::Text("sql".to_owned()), item("a", 3), Extra::Text("tenant".to_owned())],
            vec![Extra::Text("sql".to_owned()), item("a", -1), item("b", 2)],
            vec![],
        ],
        medium: "GPU".to_owned(),
        ..Stored::default()
    };
    bench.worker.apply(&mut bench.chains, &Event::Stored(stored));
    let query = bench.chains.query(2);
    assert_eq!((query.lora.as_str(), query.salt.as_str()), ("sql", "tenant"));
    assert_eq!(query.items, [("a".to_owned(), 3, 5), ("b".to_owned(), 6, 2)]);
    bench.check(&tokens(&[1, 2, 3]), 4, 3);
    bench.check(&tokens(&[1, 2, 3]), 2, 6);
    bench.check(&tokens(&[1, 2, 3]), 6, 2);
}
