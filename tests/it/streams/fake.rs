//! A small indexer that answers from the reference model: with it the tests of this directory are
//! tested themselves, right answers and planted faults. It needs streams from their first batch on,
//! live or by replay, and is far too slow for anything else.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use kv_indexer::{
    hash,
    model::RequestKey,
    proto::kvindexer::{
        self as api, kv_indexer_server::KvIndexer, kv_indexer_server::KvIndexerServer,
    },
};
use tonic::{Request, Response, Status};

use crate::streams::{
    decode::{self, Event},
    model::{Chains, Query, Requests, Worker},
};

/// What the fake does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Every tenth removal is not applied.
    LosesRemovals,
    /// Stores do not add up.
    DoesNotCount,
    /// A window group is taken for a group that nobody needs.
    IgnoresWindows,
    /// Salts are not part of a prompt.
    IgnoresSalts,
    /// The old life of a restarted engine stays.
    IgnoresRestarts,
    /// What is missing is not asked for.
    NeverReplays,
}

/// What is known of one (pod, rank).
struct Row {
    request: api::RegisterPodRequest,
    chains: Chains,
    worker: Worker,
    epoch: u64,
    applied: Option<u64>,
    /// Wall clock of each sequence's visibility, nanoseconds.
    visible: HashMap<u64, u64>,
    removals: usize,
    /// The chains by request key; they only grow.
    index: Index,
}

#[derive(Default)]
struct Index {
    chains: usize,
    requests: Option<Requests>,
    by_key: HashMap<RequestKey, usize>,
}

type Rows = Arc<Mutex<Vec<Row>>>;
type Threads = Arc<Mutex<Vec<JoinHandle<()>>>>;

/// A running fake; ends with drop.
pub(crate) struct Fake {
    pub(crate) grpc: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Threads,
}

struct Service {
    block_size: usize,
    fault: Fault,
    rows: Rows,
    stop: Arc<AtomicBool>,
    threads: Threads,
}

impl Fake {
    pub(crate) fn start(block_size: usize, fault: Fault) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let grpc = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (rows, flag) = (Rows::default(), Arc::clone(&stop));
        let threads = Threads::default();
        let (stops, starts) = (Arc::clone(&stop), Arc::clone(&threads));
        let service = Service { block_size, fault, rows, stop: stops, threads: starts };
        let server = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let incoming =
                    tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
                let service = KvIndexerServer::new(service).max_decoding_message_size(64 << 20);
                let until = async {
                    while !flag.load(Ordering::Relaxed) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                let server = tonic::transport::Server::builder().add_service(service);
                tokio::select! {
                    served = server.serve_with_incoming(incoming) => served.unwrap(),
                    () = until => {}
                }
            });
        });
        threads.lock().unwrap().push(server);
        Self { grpc, stop, threads }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.lock().unwrap().drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking());
        }
    }
}

impl Service {
    fn row<T>(&self, pod: &str, rank: Option<u32>, look: impl FnOnce(&Row) -> T) -> Option<T> {
        let rows = self.rows.lock().unwrap();
        rows.iter().find(|row| row.request.pod == pod && row.request.dp_rank == rank).map(look)
    }

    fn subscribe(&self, request: &api::RegisterPodRequest) {
        let (rows, stop, fault) = (Arc::clone(&self.rows), Arc::clone(&self.stop), self.fault);
        let (pod, rank) = (request.pod.clone(), request.dp_rank);
        let (endpoint, replay) = (request.endpoint.clone(), request.replay_endpoint.clone());
        let subscriber = thread::spawn(move || {
            let context = zmq::Context::new();
            let socket = context.socket(zmq::SUB).unwrap();
            socket.set_subscribe(b"").unwrap();
            socket.set_rcvhwm(0).unwrap();
            socket.set_reconnect_ivl(20).unwrap();
            socket.connect(&endpoint).unwrap();
            while !stop.load(Ordering::Relaxed) {
                if socket.poll(zmq::POLLIN, 10).unwrap() == 0 {
                    continue;
                }
                let frames = socket.recv_multipart(0).unwrap();
                let sequence = u64::from_be_bytes(frames[1][..].try_into().unwrap());
                let mut rows = rows.lock().unwrap();
                let ours = |row: &&mut Row| row.request.pod == pod && row.request.dp_rank == rank;
                let row = rows.iter_mut().find(ours).unwrap();
                let expected = row.applied.map_or(0, |applied| applied + 1);
                if sequence > expected && !replay.is_empty() && fault != Fault::NeverReplays {
                    let missing = replayed(&context, &replay, expected);
                    for (sequence, payload) in
                        missing.into_iter().filter(|(replayed, _)| *replayed < sequence)
                    {
                        row.apply(sequence, &payload, fault);
                    }
                }
                if row.applied.is_none_or(|applied| sequence == 0 || sequence > applied) {
                    row.apply(sequence, &frames[2], fault);
                }
            }
        });
        self.threads.lock().unwrap().push(subscriber);
    }

    fn score(&self, row: &mut Row, prompts: &[(Query, usize)], lora: &str) -> Vec<api::PodScore> {
        let scheme = hash::Scheme::new(hash::Algorithm::Xxh3, "", self.block_size as u32);
        if row.index.requests.is_none() || row.index.chains != row.chains.len() {
            let requests = Requests::new(&row.chains, self.block_size);
            let mut by_key = HashMap::new();
            for node in 0..row.chains.len() {
                let keys = self.keys(&row.chains.query(node), &scheme);
                by_key.extend(keys.into_iter().zip(requests.of(&row.chains, node)));
            }
            row.index = Index { chains: row.chains.len(), requests: Some(requests), by_key };
        }
        let row = &*row;
        let Index { requests: Some(requests), by_key, .. } = &row.index else { unreachable!() };
        let cached = row.worker.counts();
        let held = |tier: Option<&str>| match self.fault {
            Fault::IgnoresWindows => row.worker.held(cached, tier).without_windows(),
            _ => row.worker.held(cached, tier),
        };
        let tiers: Vec<_> =
            Worker::tiers(cached).into_iter().map(|tier| (held(Some(&tier)), tier)).collect();
        let weighted: Vec<_> = tiers
            .iter()
            .map(|(held, tier)| (if tier == "gpu" { 1.0 } else { 0.8 }, held.clone()))
            .collect();
        let everything = held(None);
        let one = |(query, _): &(Query, usize)| {
            let mut query = query.clone();
            lora.clone_into(&mut query.lora);
            let known = self.keys(&query, &scheme).into_iter().map_while(|key| by_key.get(&key));
            let blocks: Vec<usize> = known.copied().collect();
            let depth = requests.depth(&blocks, &everything);
            api::PodScore {
                pod: row.request.pod.clone(),
                dp_rank: row.request.dp_rank,
                score: requests.score(&blocks, depth, &weighted).unwrap_or_default(),
                depth: depth as u32,
                confirmed_depth: depth as u32,
                tiers: tiers
                    .iter()
                    .map(|(held, tier)| api::TierDepth {
                        tier: tier.clone(),
                        depth: requests.depth(&blocks, held) as u32,
                    })
                    .collect(),
                state: api::PodState::Live.into(),
            }
        };
        prompts.iter().map(one).collect()
    }

    fn keys(&self, query: &Query, scheme: &hash::Scheme) -> Vec<RequestKey> {
        let multimodal: Vec<_> = query
            .items
            .iter()
            .map(|(hash, offset, length)| hash::MultimodalItem {
                hash: hash.clone(),
                offset: *offset as u32,
                length: *length as u32,
            })
            .collect();
        let salt = if self.fault == Fault::IgnoresSalts { "" } else { &query.salt };
        let prompt = hash::Prompt {
            model: "",
            lora: &query.lora,
            tokens: &query.tokens,
            cache_salt: salt,
            multimodal: &multimodal,
        };
        prompt.keys(scheme).unwrap()
    }
}

impl Row {
    fn apply(&mut self, sequence: u64, payload: &[u8], fault: Fault) {
        if sequence == 0 && self.applied.is_some() {
            self.epoch += 1;
            self.visible.clear();
            if fault != Fault::IgnoresRestarts {
                self.worker.restart();
            }
        }
        for event in decode::batch(payload).1 {
            if let Event::Removed { .. } = event {
                self.removals += 1;
                if fault == Fault::LosesRemovals && self.removals.is_multiple_of(10) {
                    continue;
                }
            }
            self.worker.apply(&mut self.chains, &event);
        }
        self.applied = Some(sequence);
        self.visible.insert(sequence, kv_indexer::support::clock::unix_ns());
    }
}

/// Everything that a replay socket has from `start` on.
fn replayed(context: &zmq::Context, endpoint: &str, start: u64) -> Vec<(u64, Vec<u8>)> {
    let socket = context.socket(zmq::DEALER).unwrap();
    socket.set_linger(0).unwrap();
    socket.set_rcvhwm(0).unwrap();
    socket.set_rcvtimeo(10_000).unwrap();
    socket.connect(endpoint).unwrap();
    socket.send_multipart([b"", &start.to_be_bytes()[..]], 0).unwrap();
    let mut batches = Vec::new();
    loop {
        let mut frames = socket.recv_multipart(0).unwrap();
        let payload = frames.pop().unwrap();
        let sequence = u64::from_be_bytes(frames.pop().unwrap()[..].try_into().unwrap());
        if sequence == u64::MAX {
            return batches;
        }
        batches.push((sequence, payload));
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Stream<T> = std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

fn absent<T>() -> Answer<T> {
    Err(Status::unimplemented("the fake has no such thing"))
}

#[tonic::async_trait]
impl KvIndexer for Service {
    type ScoreStreamStream = Stream<api::ScoreResponse>;
    type WatchPodsStream = Stream<api::PodStatus>;
    type SnapshotStream = Stream<api::SnapshotChunk>;

    async fn register_pod(
        &self,
        request: Request<api::RegisterPodRequest>,
    ) -> Answer<api::RegisterPodResponse> {
        let request = request.into_inner();
        let set = request.count_mode() == api::CountMode::Set || self.fault == Fault::DoesNotCount;
        self.subscribe(&request);
        self.rows.lock().unwrap().push(Row {
            request,
            chains: Chains::default(),
            worker: Worker::new(set),
            epoch: 1,
            applied: None,
            visible: HashMap::new(),
            removals: 0,
            index: Index::default(),
        });
        Ok(Response::new(api::RegisterPodResponse {}))
    }

    async fn wait_visible(
        &self,
        request: Request<api::WaitVisibleRequest>,
    ) -> Answer<api::WaitVisibleResponse> {
        let request = request.into_inner();
        let now = |row: &Row| api::WaitVisibleResponse {
            applied_sequence: row.applied.unwrap_or_default(),
            reached: row.applied.is_some_and(|applied| applied >= request.sequence),
            epoch: row.epoch,
            visible_unix_ns: row.visible.get(&request.sequence).copied().unwrap_or_default(),
        };
        let answer = self.row(&request.pod, request.dp_rank, now);
        answer.map(Response::new).ok_or_else(|| Status::not_found("pod"))
    }

    async fn score(&self, request: Request<api::ScoreRequest>) -> Answer<api::ScoreResponse> {
        let request = request.into_inner();
        let prompts: Vec<(Query, usize)> = request
            .prompts
            .iter()
            .map(|prompt| {
                let Some(api::prompt::Input::TokenIdsLe(bytes)) = &prompt.input else {
                    panic!("tokens only");
                };
                let (words, _) = bytes.as_chunks();
                let tokens: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
                let items = prompt
                    .multimodal
                    .iter()
                    .map(|item| (item.hash.clone(), item.offset as usize, item.length as usize));
                let blocks = tokens.len() / self.block_size;
                let (lora, salt) = (String::new(), prompt.cache_salt.clone());
                (Query { tokens, lora, salt, items: items.collect() }, blocks)
            })
            .collect();
        let mut rows = self.rows.lock().unwrap();
        let ours = rows.iter_mut().filter(|row| request.pods.contains(&row.request.pod));
        let scores: Vec<_> = ours.map(|row| self.score(row, &prompts, &request.lora)).collect();
        let prompts = prompts.iter().enumerate().map(|(at, (_, blocks))| api::PromptScores {
            total_blocks: *blocks as u32,
            block_size: self.block_size as u32,
            pods: scores.iter().map(|rows| rows[at].clone()).collect(),
            compact: None,
        });
        Ok(Response::new(api::ScoreResponse {
            prompts: prompts.collect(),
            ..api::ScoreResponse::default()
        }))
    }

    async fn list_pods(&self, _: Request<api::ListPodsRequest>) -> Answer<api::ListPodsResponse> {
        let status = |row: &Row| {
            let blocks = row.worker.counts().keys().map(|(_, group, key)| (group, key));
            api::PodStatus {
                pod: row.request.pod.clone(),
                dp_rank: row.request.dp_rank,
                model: row.request.model.clone(),
                state: api::PodState::Live.into(),
                applied_sequence: row.applied,
                epoch: row.epoch,
                blocks: blocks.collect::<std::collections::BTreeSet<_>>().len() as u64,
                ..api::PodStatus::default()
            }
        };
        let pods = self.rows.lock().unwrap().iter().map(status).collect();
        Ok(Response::new(api::ListPodsResponse { pods, ..api::ListPodsResponse::default() }))
    }

    async fn score_stream(
        &self,
        _: Request<tonic::Streaming<api::ScoreRequest>>,
    ) -> Answer<Self::ScoreStreamStream> {
        absent()
    }

    async fn explain(&self, _: Request<api::ExplainRequest>) -> Answer<api::ExplainResponse> {
        absent()
    }

    async fn watch_pods(&self, _: Request<api::WatchPodsRequest>) -> Answer<Self::WatchPodsStream> {
        absent()
    }

    async fn unregister_pod(
        &self,
        _: Request<api::UnregisterPodRequest>,
    ) -> Answer<api::UnregisterPodResponse> {
        absent()
    }

    async fn speculate(&self, _: Request<api::SpeculateRequest>) -> Answer<api::SpeculateResponse> {
        absent()
    }

    async fn unspeculate(
        &self,
        _: Request<api::UnspeculateRequest>,
    ) -> Answer<api::UnspeculateResponse> {
        absent()
    }

    async fn snapshot(&self, _: Request<api::SnapshotRequest>) -> Answer<Self::SnapshotStream> {
        absent()
    }
}
