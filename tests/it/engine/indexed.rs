//! The mock engine and the real indexer: after load, evictions, a reset and a restart, scores are what the
//! engine's cache holds.

use std::{collections::HashSet, net::SocketAddr, thread};

use kv_indexer::{
    loadgen::engine::{
        EngineOptions, EventForm,
        sequence::{Identity, Lora, Sequence},
    },
    proto::kvindexer::{
        PodState, Prompt, ScoreRequest, kv_indexer_client::KvIndexerClient, prompt::Input,
    },
};
use serde_json::json;
use tonic::transport::Channel;

use super::client::Running;
use crate::support::{
    Indexer, connect,
    http::{post, read, send},
    runtime, visible,
};

const POD: &str = "engine-1";
const BLOCK: usize = 16;
const CLIENTS: usize = 4;

/// A prompt and what besides tokens it is.
#[derive(Clone)]
struct Asked {
    tokens: Vec<u32>,
    lora: bool,
    salt: Option<&'static str>,
}

impl Asked {
    /// Conversation `at`: some share their first blocks, some have an adapter or a salt.
    fn new(at: u32) -> Self {
        let shared = (0..40).map(|token| 1_000 * (at % 3) + token);
        let own = (0..24 + at % 50).map(|token| 100_000 + 1_000 * at + token);
        Self {
            tokens: shared.chain(own).collect(),
            lora: at % 5 == 1,
            salt: (at % 7 == 2).then_some("tenant"),
        }
    }

    fn body(&self) -> String {
        let model = if self.lora { "sql" } else { "mock" };
        let mut body = json!({"model": model, "prompt": self.tokens, "max_tokens": 20});
        if let Some(salt) = self.salt {
            body["cache_salt"] = salt.into();
        }
        body.to_string()
    }

    /// Leading blocks of it that are among these.
    fn depth(&self, cached: &HashSet<u64>) -> usize {
        let lora = self.lora.then(|| Lora { id: 1, name: "sql".into() });
        let salt = self.salt.map(str::to_owned);
        let identity = Identity { lora, salt, ..Identity::default() };
        let sequence = Sequence::new(self.tokens.clone(), identity, BLOCK);
        sequence.hashes().iter().take_while(|hash| cached.contains(hash)).count()
    }
}

/// An engine and an indexer that follows it.
struct Pair {
    engine: Running,
    _indexer: Indexer,
    runtime: tokio::runtime::Runtime,
    client: KvIndexerClient<Channel>,
    /// Epochs up to here are of an engine that was killed.
    over: u64,
    epoch: u64,
}

impl Pair {
    fn start(options: EngineOptions) -> Self {
        let engine = Running::start(options);
        let pod = format!("{POD}=http://{}", engine.http());
        let indexer = Indexer::start(&["--pod", &pod]);
        let runtime = runtime();
        let client = runtime.block_on(connect(indexer.grpc));
        engine.subscribed();
        Self { engine, _indexer: indexer, runtime, client, over: 0, epoch: 0 }
    }

    /// Every client asks all of these at about the same time.
    fn load(&self, asked: &[Asked]) {
        let http = self.engine.http();
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| asked.iter().for_each(|it| ask(http, it)));
            }
        });
        self.engine.idle();
    }

    /// Waits until all that was published is visible, and compares. Returns how many answers were
    /// neither nothing nor everything.
    fn compare(&mut self, asked: &[Asked], ranks: u32) -> usize {
        let mut telling = 0;
        for rank in 0..ranks {
            let contents = self.engine.cache_contents(rank);
            self.visible(rank, contents.last_sequence.unwrap());
            let cached: HashSet<u64> = contents.blocks.iter().map(|block| block.hash).collect();
            for it in asked {
                let request = ScoreRequest {
                    model: "mock".to_owned(),
                    lora: if it.lora { "sql".to_owned() } else { String::new() },
                    prompts: vec![Prompt {
                        input: Some(Input::TokenIdsLe(
                            it.tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
                        )),
                        cache_salt: it.salt.unwrap_or_default().to_owned(),
                        ..Prompt::default()
                    }],
                    pods: vec![POD.to_owned()],
                    ..ScoreRequest::default()
                };
                let answer = self.runtime.block_on(self.client.score(request)).unwrap();
                let rows = answer.into_inner().prompts.remove(0).pods;
                let row = rows.iter().find(|row| row.dp_rank == Some(rank)).unwrap();
                let (want, all) = (it.depth(&cached), it.tokens.len() / BLOCK);
                assert_eq!(
                    (row.confirmed_depth as usize, row.state()),
                    (want, PodState::Live),
                    "rank {rank} of {all}: {row:?}"
                );
                telling += usize::from(want > 0 && want < all);
            }
        }
        telling
    }

    fn visible(&mut self, rank: u32, sequence: u64) {
        let (pod, over) = ((POD, rank), self.over);
        self.epoch = visible(&self.runtime, &mut self.client, pod, sequence, over);
    }
}

fn ask(http: SocketAddr, asked: &Asked) {
    let reply = post(http, "/v1/completions", &asked.body());
    assert_eq!(reply.status, 200, "{reply:?}");
}

fn check(form: EventForm, ranks: u32) {
    let options = EngineOptions {
        form,
        data_parallel_size: ranks,
        block_size: BLOCK,
        // Evictions and preemptions: a request needs up to nine blocks.
        num_gpu_blocks: 48,
        max_num_seqs: 8,
        loras: vec!["sql".to_owned()],
        ..EngineOptions::default()
    };
    let mut pair = Pair::start(options);
    let asked: Vec<Asked> = (0..40).map(Asked::new).collect();
    pair.load(&asked);
    let copies = |pair: &Pair| -> usize {
        (0..ranks).map(|rank| pair.engine.cache_contents(rank).blocks.len()).sum()
    };
    assert!(copies(&pair) > 20 * ranks as usize, "the caches are full");
    let telling = pair.compare(&asked, ranks);
    assert!(telling > 4, "only {telling} partial prefixes");

    // The clear is told with the next step, of each rank.
    assert_eq!(post(pair.engine.http(), "/reset_prefix_cache", "").json()["success"], true);
    assert_eq!(pair.engine.cache_contents(0).pending_events, 1);
    for rank in 0..ranks {
        let rank = rank.to_string();
        let headers = [("x-data-parallel-rank", rank.as_str())];
        let body = asked[3].body();
        read(send(pair.engine.http(), "POST", "/v1/completions", &headers, &body).unwrap())
            .unwrap();
    }
    pair.engine.idle();
    pair.compare(&asked, ranks);

    // Another life at the same ports: what was there is gone.
    if ranks == 1 {
        let options = pair.engine.same_ports();
        pair.engine.kill();
        pair.over = pair.epoch;
        pair.engine = Running::start(options);
        pair.engine.subscribed();
        pair.load(&asked[30..]);
        pair.compare(&asked, ranks);
    }
}

#[test]
fn scores_are_what_the_cache_holds_in_map_form() {
    check(EventForm::Map, 1);
}

#[test]
fn scores_are_what_the_cache_holds_in_array_form() {
    check(EventForm::Array, 1);
}

#[test]
fn scores_are_what_the_caches_of_two_ranks_hold() {
    check(EventForm::Map, 2);
}
