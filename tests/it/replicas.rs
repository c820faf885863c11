//! Several indexers over one fleet: equal answers, and an endpoint picker that loses one of them.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use kv_indexer::{
    epp::precise::remote::RemoteConfig,
    proto::kvindexer::{
        Prompt, RegisterPodRequest, ScoreRequest, TokenIds, kv_indexer_client::KvIndexerClient,
        prompt::Input,
    },
};
use tonic::transport::Channel;

use crate::{
    ingest::engine::{Engine, Router},
    precise_remote::rig::{Picker, config, query},
    support::{Indexer, connect, eventually, runtime, visible},
};

const MODEL: &str = "llama";
/// Blocks of a chain, and their size.
const LONGEST: u32 = 6;
const BLOCK: u32 = 4;
const CHAINS: u32 = 8;

/// One indexer with a client.
struct Replica {
    indexer: Indexer,
    runtime: tokio::runtime::Runtime,
    client: KvIndexerClient<Channel>,
    /// Per pod, the epoch that has to be over.
    over: BTreeMap<String, u64>,
    /// Per pod, the epoch last seen.
    seen: BTreeMap<String, u64>,
}

impl Replica {
    fn start() -> Self {
        let indexer = Indexer::start(&["--block-size", &BLOCK.to_string()]);
        let runtime = runtime();
        let client = runtime.block_on(connect(indexer.grpc));
        Self { indexer, runtime, client, over: BTreeMap::new(), seen: BTreeMap::new() }
    }

    fn register(&mut self, pod: &str, engine: &Engine, router: &Router) {
        let request = RegisterPodRequest {
            pod: pod.to_owned(),
            endpoint: engine.endpoint.clone(),
            replay_endpoint: router.endpoint.clone(),
            ..RegisterPodRequest::default()
        };
        self.runtime.block_on(self.client.register_pod(request)).unwrap();
        engine.subscribed();
    }

    fn visible(&mut self, pod: &str, sequence: u64) {
        let after = self.over.get(pod).copied().unwrap_or_default();
        let epoch = visible(&self.runtime, &mut self.client, (pod, 0), sequence, after);
        self.seen.insert(pod.to_owned(), epoch);
    }

    fn depths(&mut self, chain: u32) -> BTreeMap<String, (u32, u64)> {
        let ids = tokens(chain, LONGEST);
        let request = ScoreRequest {
            model: MODEL.to_owned(),
            prompts: vec![Prompt {
                input: Some(Input::TokenIds(TokenIds { ids })),
                ..Prompt::default()
            }],
            ..ScoreRequest::default()
        };
        let answer = self.runtime.block_on(self.client.score(request)).unwrap().into_inner();
        let pods = answer.prompts[0].pods.iter();
        pods.map(|pod| (pod.pod.clone(), (pod.depth, pod.score.to_bits()))).collect()
    }

    fn scores_answered(&self) -> f64 {
        let (_, text) = self.indexer.get("/metrics").unwrap();
        let series = "kv_score_requests_total{code=\"ok\",rpc=\"score_stream\"} ";
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    fn finish(self) {
        drop((self.client, self.runtime));
        self.indexer.finish();
    }
}

fn first_token(chain: u32) -> u32 {
    1 + chain * 1000
}

fn tokens(chain: u32, blocks: u32) -> Vec<u32> {
    (first_token(chain)..first_token(chain) + blocks * BLOCK).collect()
}

/// What an engine holds: copies of each block of each chain.
type Held = BTreeMap<(u32, u32), u32>;

/// Does something, to the model as well; `None`: there was nothing to do.
fn step(engine: &mut Engine, held: &mut Held, random: &mut fastrand::Rng) -> Option<u64> {
    let chain = random.u32(..CHAINS);
    let hash = |block: u32| chain * 100 + block + 1;
    match random.u32(..20) {
        0 => {
            held.clear();
            Some(engine.send("clear"))
        }
        1..=8 => {
            let holds = held.iter().filter(|((of, _), copies)| *of == chain && **copies > 0);
            let blocks: Vec<u32> = holds.map(|((_, block), _)| *block).collect();
            let block = *random.choice(&blocks)?;
            *held.get_mut(&(chain, block)).unwrap() -= 1;
            Some(engine.send(&format!("remove {}", hash(block))))
        }
        _ => {
            let blocks = random.u32(1..=LONGEST);
            for block in 0..blocks {
                *held.entry((chain, block)).or_default() += 1;
            }
            let (first, last) = (first_token(chain), first_token(chain) + blocks * BLOCK - 1);
            let (from, to) = (hash(0), hash(blocks - 1));
            Some(engine.send(&format!("store {from}-{to} of {first}-{last} by {BLOCK}")))
        }
    }
}

fn depth(held: &Held, chain: u32) -> u32 {
    (0..LONGEST).take_while(|&block| held.get(&(chain, block)).is_some_and(|n| *n > 0)).count()
        as u32
}

/// Both indexers subscribe to the same engines, and neither knows of the other. Whenever both have seen
/// the last event, they say the same, and it is right: after stores, removals, clears and restarts.
#[test]
fn replicas_give_equal_answers_about_what_both_have_seen() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut replicas = [Replica::start(), Replica::start()];
    let pods = ["a", "b", "c"];
    let mut engines = pods.map(|pod| Engine::bind(&format!("kv@{pod}@{MODEL}")));
    let routers = engines.each_ref().map(Router::of);
    for replica in &mut replicas {
        for ((pod, engine), router) in pods.iter().zip(&engines).zip(&routers) {
            replica.register(pod, engine, router);
        }
    }
    let mut held = [Held::new(), Held::new(), Held::new()];
    let mut compared = 0;
    for _ in 0..40 {
        let mut last = [None; 3];
        for _ in 0..random.usize(1..8) {
            let at = random.usize(..3);
            let engine = &mut engines[at];
            if engine.next > 0 && random.u32(..20) == 0 {
                for replica in &mut replicas {
                    replica.visible(pods[at], engine.next - 1);
                    replica.over.insert(pods[at].to_owned(), replica.seen[pods[at]]);
                }
                engine.restart();
                held[at].clear();
                engine.subscribed();
                engine.subscribed();
                // A life shows itself by its first event.
                last[at] = Some(engine.send(&format!("store 1 of 1-{BLOCK} by {BLOCK}")));
                held[at].insert((0, 0), 1);
            } else {
                last[at] = step(engine, &mut held[at], &mut random).or(last[at]);
            }
        }
        for (pod, sequence) in pods.iter().zip(last) {
            if let Some(sequence) = sequence {
                replicas.iter_mut().for_each(|replica| replica.visible(pod, sequence));
            }
        }
        for chain in 0..CHAINS {
            let [first, second] = &mut replicas;
            let (first, second) = (first.depths(chain), second.depths(chain));
            assert_eq!(first, second, "seed {seed}, chain {chain}");
            let found: BTreeMap<&str, u32> =
                first.iter().map(|(pod, (depth, _))| (pod.as_str(), *depth)).collect();
            let wanted: BTreeMap<&str, u32> = pods
                .into_iter()
                .zip(held.iter().map(|held| depth(held, chain)))
                .filter(|(_, depth)| *depth > 0)
                .collect();
            assert_eq!(found, wanted, "seed {seed}, chain {chain}");
            compared += 1;
        }
    }
    assert_eq!(compared, 40 * CHAINS);
    replicas.into_iter().for_each(Replica::finish);
}

/// The picker is connected to one of two. That one dies in the middle of questions, and the picker goes on
/// with the other: what fails is what was asked between.
#[test]
fn a_picker_goes_on_with_the_other_replica() {
    let mut replicas = vec![Replica::start(), Replica::start()];
    let mut engine = Engine::bind(&format!("kv@a@{MODEL}"));
    let router = Router::of(&engine);
    replicas.iter_mut().for_each(|replica| replica.register("a", &engine, &router));
    let sequence = engine.send(&format!("store 1-4 of 1-16 by {BLOCK}"));
    replicas.iter_mut().for_each(|replica| replica.visible("a", sequence));

    let addresses: Vec<String> =
        replicas.iter().map(|replica| replica.indexer.grpc.to_string()).collect();
    let picker = Picker::connected(RemoteConfig {
        address: addresses.join(","),
        ..config(replicas[0].indexer.grpc)
    });
    picker.set(&["a"]);
    let prompt: Vec<u32> = (1..=16).collect();
    picker.until_depths(&query(&prompt), &[4]);

    let used = replicas.iter().position(|replica| replica.scores_answered() > 0.0).unwrap();
    let lost = replicas.remove(used);
    let stop = AtomicBool::new(false);
    let (mut right, mut failed) = (0_u32, 0_u32);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (query, mut longest, mut failing) = (query(&prompt), Duration::ZERO, None);
            while !stop.load(Ordering::Relaxed) {
                match picker.depths(&query) {
                    Ok(depths) => {
                        assert_eq!(depths, [4], "no answer is better than a wrong one");
                        right += 1;
                        failing = None;
                    }
                    Err(_) => {
                        failed += 1;
                        let since = *failing.get_or_insert_with(Instant::now);
                        longest = longest.max(since.elapsed());
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            }
            longest
        });
        lost.indexer.kill();
        eventually("the other one answers", || match replicas[0].scores_answered() {
            answered if answered >= 100.0 => Ok(()),
            answered => Err(format!("{answered} answers")),
        });
        stop.store(true, Ordering::Relaxed);
        println!("without answers for {:?} at most", load.join().unwrap());
    });
    println!("{right} answers, {failed} failures");
    assert!(right >= 100, "{right} answers, {failed} failures");
    assert_eq!(picker.depths(&query(&prompt)), Ok(vec![4]));
    drop(picker);
    replicas.into_iter().for_each(Replica::finish);
}
