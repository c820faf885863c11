//! Plays recorded streams into a running indexer and compares its answers with the reference model.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use kv_indexer::{
    loadgen::replay::{Publisher, PublisherOptions, ReplayForm},
    proto::kvindexer::{
        CountMode, ListPodsRequest, MultimodalItem, PodScore, PodState, PodStatus, Prompt,
        PromptScores, RegisterPodRequest, ScoreRequest, kv_indexer_client::KvIndexerClient,
        prompt::Input,
    },
};
use tonic::transport::Channel;

use crate::{
    streams::{
        decode::Event,
        model::{Chains, Held, NodeId, Query, Requests, Worker, replay},
        truth::{Cached, Fixture},
    },
    support::{connect, eventually, patience, runtime, visible},
};

/// Prompts in one Score call.
const PROMPTS: usize = 200;
/// Mismatches printed per stream.
const SHOWN: usize = 8;

/// A connection to an indexer, and what it got wrong so far.
pub(crate) struct Session {
    runtime: tokio::runtime::Runtime,
    client: KvIndexerClient<Channel>,
    compared: usize,
    /// Comparisons whose expected depth was neither 0 nor the whole prompt.
    telling: usize,
    failures: Vec<String>,
}

/// What an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// The depth of the engine's own cache.
    Exactly,
    /// No deeper than that.
    AtMost,
}

impl Session {
    pub(crate) fn connect(grpc: SocketAddr) -> Self {
        let runtime = runtime();
        let client = runtime.block_on(connect(grpc));
        Self { runtime, client, compared: 0, telling: 0, failures: Vec::new() }
    }

    /// Panics unless every comparison held, and unless there were enough to mean anything: in all,
    /// and with an expected depth between nothing and everything.
    #[track_caller]
    pub(crate) fn finish(self, at_least: usize, telling_at_least: usize) {
        let Self { compared, telling, failures, .. } = self;
        println!("{compared} answers compared, {telling} of them partial prefixes");
        assert!(
            failures.is_empty(),
            "{} of {compared} answers are wrong:\n{}",
            failures.len(),
            failures.join("\n"),
        );
        assert!(compared >= at_least, "only {compared} answers were compared");
        assert!(telling >= telling_at_least, "only {telling} were partial prefixes");
    }

    /// The failures so far.
    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    pub(crate) fn register(&mut self, request: RegisterPodRequest) {
        self.runtime.block_on(self.client.register_pod(request)).unwrap();
    }

    pub(crate) fn status(&mut self, pod: &str, rank: u32) -> PodStatus {
        let pods = self.runtime.block_on(self.client.list_pods(ListPodsRequest {}));
        let pods = pods.unwrap().into_inner().pods;
        let found = pods.iter().find(|row| row.pod == pod && row.dp_rank == Some(rank)).cloned();
        found.unwrap_or_else(|| panic!("{pod} rank {rank} is not among {pods:?}"))
    }

    /// Waits until `sequence` is visible in an epoch later than `after`; returns the epoch.
    pub(crate) fn wait_visible(&mut self, pod: &str, rank: u32, sequence: u64, after: u64) -> u64 {
        let epoch = visible(&self.runtime, &mut self.client, (pod, rank), sequence, after);
        // The last batch is visible a moment before the repair that brought it is over.
        eventually(&format!("{pod} rank {rank} is settled"), || {
            let answer = self.runtime.block_on(self.client.list_pods(ListPodsRequest {}));
            let pods = answer.map_err(|status| status.to_string())?.into_inner().pods;
            let row = pods.iter().find(|row| row.pod == pod && row.dp_rank == Some(rank));
            match row.map(PodStatus::state) {
                None | Some(PodState::Connecting | PodState::Replaying) => Err(format!("{row:?}")),
                Some(_) => Ok(()),
            }
        });
        epoch
    }

    fn score(&mut self, model: &str, pod: &str, queries: &[&Query]) -> Vec<PromptScores> {
        let prompt = |query: &&Query| Prompt {
            input: Some(Input::TokenIdsLe(
                query.tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
            )),
            cache_salt: query.salt.clone(),
            multimodal: query
                .items
                .iter()
                .map(|(hash, offset, length)| MultimodalItem {
                    hash: hash.clone(),
                    offset: *offset as u32,
                    length: *length as u32,
                })
                .collect(),
        };
        let request = ScoreRequest {
            model: model.to_owned(),
            lora: queries[0].lora.clone(),
            prompts: queries.iter().map(prompt).collect(),
            pods: vec![pod.to_owned()],
            ..ScoreRequest::default()
        };
        let answer = self.runtime.block_on(self.client.score(request)).unwrap().into_inner();
        assert_eq!(answer.prompts.len(), queries.len());
        answer.prompts
    }
}

/// How a stream is played.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// Tokens per request block of the server.
    pub(crate) block_size: usize,
    /// Does the publisher have a replay socket?
    pub(crate) replay: bool,
    /// Is the engine named at registration, or to be found out?
    pub(crate) named: bool,
}

/// A stream, its reference model and its pods in an indexer.
pub(crate) struct Subject<'a> {
    pub(crate) fixture: &'a Fixture,
    pub(crate) pod: String,
    setup: Setup,
    model: String,
    workers: Vec<Worker>,
    requests: Requests,
    /// What is asked: chains and their request blocks, by adapter.
    queries: Vec<(Query, Vec<usize>)>,
}

impl<'a> Subject<'a> {
    /// `label` keeps pods and models of one server apart.
    pub(crate) fn new(fixture: &'a Fixture, setup: Setup, label: &str) -> Self {
        let (chains, workers) = replay(fixture, |_, _, _| {});
        let requests = Requests::new(&chains, setup.block_size);
        // Every chain; of the big stream every whole one and a sample of their prefixes.
        let leaves = chains.leaves();
        let asked =
            |node: &NodeId| !fixture.is_big() || leaves.contains(node) || node.is_multiple_of(37);
        let mut queries: Vec<_> = (0..chains.len())
            .filter(asked)
            .map(|node| (chains.query(node), requests.of(&chains, node)))
            .collect();
        queries.sort_by(|(a, _), (b, _)| a.lora.cmp(&b.lora));
        Self {
            fixture,
            pod: format!("{}{label}", fixture.name),
            setup,
            model: format!("{}{label}", fixture.name),
            workers,
            requests,
            queries,
        }
    }

    /// A publisher of a rank's stream.
    pub(crate) fn publisher(&self, rank: usize) -> Publisher {
        let options = PublisherOptions {
            replay: self.setup.replay.then(|| "tcp://127.0.0.1:*".to_owned()),
            form: if self.fixture.two_frame_replay() {
                ReplayForm::TwoFrames
            } else {
                ReplayForm::ThreeFrames
            },
            ..PublisherOptions::default()
        };
        let stream = Arc::clone(&self.fixture.ranks[rank].stream);
        Publisher::bind(stream, "tcp://127.0.0.1:*", options).unwrap()
    }

    /// Registers a rank's publisher and waits until the indexer is subscribed.
    pub(crate) fn register(&self, session: &mut Session, publisher: &mut Publisher) {
        let count_mode = match self.fixture.reannounces() {
            true => CountMode::Set,
            false => CountMode::Unspecified,
        };
        session.register(RegisterPodRequest {
            pod: self.pod.clone(),
            endpoint: publisher.endpoint().to_owned(),
            replay_endpoint: publisher.replay_endpoint().unwrap_or_default().to_owned(),
            model: self.model.clone(),
            dp_rank: Some(publisher.stream().rank),
            engine: if self.setup.named { self.fixture.engine.clone() } else { String::new() },
            count_mode: count_mode.into(),
            ..RegisterPodRequest::default()
        });
        self.subscribed(publisher);
    }

    pub(crate) fn subscribed(&self, publisher: &mut Publisher) {
        let there = publisher.wait_for_subscriber(patience()).unwrap();
        assert!(there, "{}: nobody subscribes to {}", self.pod, publisher.endpoint());
    }

    /// What a rank's events up to there add up to, in the life that they end in.
    pub(crate) fn counted(&self, rank: usize, published: usize) -> Cached {
        let (mut worker, mut chains) = (Worker::new(self.fixture.reannounces()), Chains::default());
        for batch in &self.fixture.ranks[rank].stream.batches[..published] {
            if batch.sequence == 0 {
                worker.restart();
            }
            for event in super::decode::batch(&batch.payload).1 {
                worker.apply(&mut chains, &event);
            }
        }
        worker.counts().clone()
    }

    /// Do these batches of a rank contain a clear?
    pub(crate) fn clears(&self, rank: usize, batches: std::ops::Range<usize>) -> bool {
        self.fixture.ranks[rank].stream.batches[batches]
            .iter()
            .any(|batch| super::decode::batch(&batch.payload).1.contains(&Event::Cleared))
    }

    /// Asks about every chain and compares a rank's row with what `cached` makes of it.
    pub(crate) fn compare(
        &self,
        session: &mut Session,
        rank: usize,
        (label, cached): (&str, &Cached),
        (expect, state): (Expect, PodState),
    ) {
        let started = Instant::now();
        let worker = &self.workers[rank];
        let truth = TruthAt::new(worker, cached);
        let number = self.fixture.ranks[rank].stream.rank;
        let place = format!("{} rank {number} at {label:?}", self.pod);
        let before = session.failures.len();
        for queries in self.queries.chunk_by(|(a, _), (b, _)| a.lora == b.lora) {
            for part in queries.chunks(PROMPTS) {
                let asked: Vec<&Query> = part.iter().map(|(query, _)| query).collect();
                let answers = session.score(&self.model, &self.pod, &asked);
                for ((query, blocks), answer) in part.iter().zip(&answers) {
                    session.compared += 1;
                    let row = answer.pods.iter().find(|row| row.dp_rank == Some(number));
                    let wrong = self.wrong(blocks, answer, row, &truth, (expect, state));
                    let depth = self.requests.depth(blocks, &truth.held);
                    session.telling += usize::from(depth > 0 && depth < blocks.len());
                    if let Err(wrong) = wrong {
                        session.failures.push(format!(
                            "{place}: {wrong}; asked {} tokens from {:?}, lora {:?}, salt {:?}, \
                             items {:?}, request blocks of {}",
                            query.tokens.len(),
                            &query.tokens[..query.tokens.len().min(4)],
                            query.lora,
                            query.salt,
                            query.items,
                            self.setup.block_size,
                        ));
                    }
                }
            }
        }
        let wrong = session.failures.len() - before;
        if wrong > SHOWN {
            session.failures.truncate(before + SHOWN);
            session.failures.push(format!("{place}: {} more", wrong - SHOWN));
        }
        if started.elapsed().as_secs() >= 5 {
            println!("{place}: {} chains in {:?}", self.queries.len(), started.elapsed());
        }
    }

    fn wrong(
        &self,
        blocks: &[usize],
        answer: &PromptScores,
        row: Option<&PodScore>,
        truth: &TruthAt,
        (expect, state): (Expect, PodState),
    ) -> Result<(), String> {
        let Some(row) = row else { return Err(format!("no row in {answer:?}")) };
        let shape = (answer.block_size as usize, answer.total_blocks as usize);
        if shape != (self.setup.block_size, blocks.len()) {
            return Err(format!("block size and blocks {shape:?}, {} expected", blocks.len()));
        }
        if row.state() != state {
            return Err(format!("state {:?}, expected {state:?}", row.state()));
        }
        let depth = self.requests.depth(blocks, &truth.held);
        let got = row.confirmed_depth as usize;
        if expect == Expect::AtMost {
            return if got <= depth {
                Ok(())
            } else {
                Err(format!("depth {got} > {depth}: {row:?}"))
            };
        }
        if (got, row.depth as usize) != (depth, depth) {
            return Err(format!("depth {got}, expected {depth} of {}: {row:?}", blocks.len()));
        }
        if let Some(score) = self.requests.score(blocks, depth, &truth.weighted)
            && (row.score - score).abs() > 1e-3
        {
            return Err(format!("score {}, expected {score}: {row:?}", row.score));
        }
        for (tier, held) in &truth.tiers {
            let expected = self.requests.depth(blocks, held);
            let reported = row.tiers.iter().find(|reported| reported.tier == *tier);
            let got = reported.map_or(0, |reported| reported.depth as usize);
            if got != expected {
                return Err(format!("tier {tier} depth {got}, expected {expected}: {row:?}"));
            }
        }
        let unknown = |reported: &&str| truth.tiers.iter().all(|(tier, _)| tier != reported);
        let mut reported =
            row.tiers.iter().filter(|tier| tier.depth > 0).map(|tier| tier.tier.as_str());
        reported.find(unknown).map_or(Ok(()), |tier| Err(format!("tier {tier}: {row:?}")))
    }

    /// The row of ListPods after the whole stream.
    pub(crate) fn compare_status(&self, session: &mut Session, rank: usize, state: PodState) {
        let rank = &self.fixture.ranks[rank];
        let end = rank.moments.last().unwrap();
        let status = session.status(&self.pod, rank.stream.rank);
        let mut check = |what: &str, got: String, expected: String| {
            if got != expected {
                let place = format!("{} rank {}", self.pod, rank.stream.rank);
                session.failures.push(format!("{place}: {what} {got}, expected {expected}"));
            }
        };
        check("state", format!("{:?}", status.state()), format!("{state:?}"));
        check("model", status.model.clone(), self.model.clone());
        check(
            "applied",
            format!("{:?}", status.applied_sequence),
            format!("{:?}", Some(end.sequence)),
        );
        check("rejected events", status.rejected_events.to_string(), "0".to_owned());
        if state == PodState::Live {
            let distinct: std::collections::BTreeSet<_> =
                end.cached.keys().map(|(_, group, key)| (group, key)).collect();
            check("blocks", status.blocks.to_string(), distinct.len().to_string());
        }
    }
}

/// A cache, looked at in all the ways that an answer reports.
struct TruthAt {
    held: Held,
    tiers: Vec<(String, Held)>,
    weighted: Vec<(f64, Held)>,
}

impl TruthAt {
    fn new(worker: &Worker, cached: &Cached) -> Self {
        let tiers: Vec<_> = Worker::tiers(cached)
            .into_iter()
            .map(|tier| {
                let held = worker.held(cached, Some(&tier));
                (tier, held)
            })
            .collect();
        // The default weights.
        let weight = |tier: &str| match tier {
            "gpu" => 1.0,
            "cpu" => 0.8,
            "external" => 0.3,
            _ => 0.5,
        };
        let weighted = tiers.iter().map(|(tier, held)| (weight(tier), held.clone())).collect();
        Self { held: worker.held(cached, None), tiers, weighted }
    }
}
