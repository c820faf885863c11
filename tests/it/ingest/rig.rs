//! The indexer under test, and questions to it.

use std::collections::BTreeMap;

use kv_indexer::proto::kvindexer::{
    ExplainRequest, ListPodsRequest, MultimodalItem, PodState, PodStatus, Prompt,
    RegisterPodRequest, ScoreRequest, SnapshotChunk, SnapshotRequest, TokenIds,
    UnregisterPodRequest, kv_indexer_client::KvIndexerClient, prompt::Input,
};
use tonic::{Status, Streaming, transport::Channel};

use super::{
    engine::{Engine, Router},
    script,
};
use crate::support::{Indexer, connect, eventually, runtime};

/// What a prompt asks, beside its tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query {
    pub(crate) model: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) lora: String,
    pub(crate) salt: String,
    pub(crate) items: Vec<(String, u32, u32)>,
    pub(crate) pods: Vec<String>,
}

impl Query {
    pub(crate) fn new(model: &str, tokens: &str) -> Self {
        let tokens = script::tokens(tokens);
        Self { model: model.to_owned(), tokens, ..Self::default() }
    }

    fn request(&self) -> ScoreRequest {
        let multimodal = self.items.iter().map(|(hash, offset, length)| MultimodalItem {
            hash: hash.clone(),
            offset: *offset,
            length: *length,
        });
        let prompt = Prompt {
            input: Some(Input::TokenIds(TokenIds { ids: self.tokens.clone() })),
            cache_salt: self.salt.clone(),
            multimodal: multimodal.collect(),
        };
        ScoreRequest {
            model: self.model.clone(),
            lora: self.lora.clone(),
            prompts: vec![prompt],
            pods: self.pods.clone(),
            ..ScoreRequest::default()
        }
    }
}

/// Depth and score by row (`pod` or `pod#rank`).
pub(crate) type Scores = BTreeMap<String, (u32, f64)>;

/// A running indexer with a client.
pub(crate) struct Rig {
    runtime: tokio::runtime::Runtime,
    client: KvIndexerClient<Channel>,
    pub(crate) indexer: Indexer,
}

impl Rig {
    /// Starts one with this configuration; ready when it returns.
    pub(crate) fn start(yaml: &str) -> Self {
        Self::over(Indexer::with_config(yaml, &["--log-level", "info,kv_indexer=debug"]))
    }

    pub(crate) fn over(indexer: Indexer) -> Self {
        let runtime = runtime();
        let client = runtime.block_on(connect(indexer.grpc));
        Self { runtime, client, indexer }
    }

    pub(crate) fn try_register(&mut self, request: RegisterPodRequest) -> Result<(), Status> {
        self.runtime.block_on(self.client.register_pod(request)).map(drop)
    }

    /// Registers an engine under a name, with the model that its topic names, and waits until its
    /// batches will be heard.
    #[track_caller]
    pub(crate) fn register(&mut self, pod: &str, engine: &Engine, router: Option<&Router>) {
        self.register_as(engine, router, |request| request.pod = pod.to_owned());
    }

    /// The same, with a change to the request.
    #[track_caller]
    pub(crate) fn register_as(
        &mut self,
        engine: &Engine,
        router: Option<&Router>,
        change: impl FnOnce(&mut RegisterPodRequest),
    ) {
        let mut request = RegisterPodRequest {
            endpoint: engine.endpoint.clone(),
            replay_endpoint: router.map_or_else(String::new, |router| router.endpoint.clone()),
            ..RegisterPodRequest::default()
        };
        change(&mut request);
        self.try_register(request).unwrap();
        engine.subscribed();
    }

    pub(crate) fn unregister(&mut self, pod: &str) -> Result<(), Status> {
        let request = UnregisterPodRequest { pod: pod.to_owned(), dp_rank: None };
        self.runtime.block_on(self.client.unregister_pod(request)).map(drop)
    }

    pub(crate) fn pods(&mut self) -> Vec<PodStatus> {
        let answer = self.runtime.block_on(self.client.list_pods(ListPodsRequest {}));
        answer.unwrap().into_inner().pods
    }

    /// Rows as `pod` or `pod#rank`, sorted.
    pub(crate) fn rows(&mut self) -> Vec<String> {
        let mut rows: Vec<_> = self.pods().iter().map(|p| name(&p.pod, p.dp_rank)).collect();
        rows.sort();
        rows
    }

    /// The only row of a pod.
    #[track_caller]
    pub(crate) fn pod(&mut self, pod: &str) -> PodStatus {
        let pods = self.pods();
        let rows: Vec<_> = pods.iter().filter(|row| row.pod == pod).collect();
        let [row] = rows[..] else { panic!("{pod} among {pods:#?}") };
        row.clone()
    }

    /// Waits until a row's last batch is applied and no repair is under way.
    #[track_caller]
    pub(crate) fn applied(&mut self, row: &str, sequence: u64) -> PodStatus {
        self.until(row, &format!("applied {sequence}"), |status| {
            status.applied_sequence == Some(sequence)
                && !matches!(status.state(), PodState::Replaying | PodState::Connecting)
        })
    }

    /// Waits until a row is in this state.
    #[track_caller]
    pub(crate) fn state(&mut self, row: &str, state: PodState) -> PodStatus {
        self.until(row, state.as_str_name(), |status| status.state() == state)
    }

    /// Waits until a row is like this.
    #[track_caller]
    pub(crate) fn until(
        &mut self,
        row: &str,
        what: &str,
        is: impl Fn(&PodStatus) -> bool,
    ) -> PodStatus {
        eventually(&format!("{row} {what}"), || {
            let pods = self.pods();
            let found =
                pods.iter().find(|p| p.pod == row || name(&p.pod, p.dp_rank) == row).cloned();
            found.filter(|status| is(status)).ok_or_else(|| format!("{pods:#?}"))
        })
    }

    pub(crate) fn ask(&mut self, query: &Query) -> Scores {
        let answer = self.runtime.block_on(self.client.score(query.request())).unwrap();
        let prompts = answer.into_inner().prompts;
        let rows = prompts[0].pods.iter();
        rows.map(|row| {
            assert_eq!(row.depth, row.confirmed_depth);
            (name(&row.pod, row.dp_rank), (row.depth, (row.score * 1e6).round() / 1e6))
        })
        .collect()
    }

    /// Depths alone, as `a=4 b#1=2`.
    pub(crate) fn depths(&mut self, model: &str, tokens: &str) -> String {
        let scores = self.ask(&Query::new(model, tokens));
        let rows: Vec<String> =
            scores.iter().map(|(row, (depth, _))| format!("{row}={depth}")).collect();
        rows.join(" ")
    }

    /// Waits until the depths are these.
    #[track_caller]
    pub(crate) fn expect(&mut self, model: &str, tokens: &str, wanted: &str) {
        eventually(&format!("{wanted:?} for {tokens} of {model}"), || {
            let got = self.depths(model, tokens);
            if got == wanted { Ok(()) } else { Err(format!("{got:?}: {:#?}", self.pods())) }
        });
    }

    pub(crate) fn findings(&mut self, query: &Query, pod: &str) -> String {
        let request = ExplainRequest { request: Some(query.request()), pod: pod.to_owned() };
        let answer = self.runtime.block_on(self.client.explain(request)).unwrap();
        answer.into_inner().findings.join("\n")
    }

    /// All series.
    pub(crate) fn metrics(&self) -> String {
        let (status, text) = self.indexer.get("/metrics").unwrap();
        assert_eq!(status, 200);
        text
    }

    /// The value of one series; 0 when it is not there.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let metrics = self.metrics();
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a series has this value.
    #[track_caller]
    pub(crate) fn counted(&self, series: &str, wanted: f64) {
        eventually(&format!("{series} {wanted}"), || match self.metric(series) {
            value if value == wanted => Ok(()),
            value => Err(value.to_string()),
        });
    }

    /// Ends it with SIGKILL.
    pub(crate) fn kill(self) {
        let Self { runtime, client, indexer } = self;
        drop(client);
        drop(runtime);
        indexer.kill();
    }

    /// What `Snapshot` answers, one call.
    pub(crate) fn snapshot(&mut self) -> Result<Vec<u8>, Status> {
        self.runtime.block_on(async {
            let mut stream = self.client.snapshot(SnapshotRequest {}).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.message().await? {
                bytes.extend_from_slice(&chunk.data);
            }
            Ok(bytes)
        })
    }

    /// Begins a call of `Snapshot` that is not read; it lasts as long as the value.
    pub(crate) fn begin_snapshot(&mut self) -> Result<Streaming<SnapshotChunk>, Status> {
        let answer = self.runtime.block_on(self.client.snapshot(SnapshotRequest {}));
        answer.map(tonic::Response::into_inner)
    }

    /// Ends it with SIGTERM; returns what it wrote.
    pub(crate) fn finish(self) -> String {
        let Self { runtime, client, indexer } = self;
        // The connection ends with its runtime; otherwise the drain would wait for it.
        drop(client);
        drop(runtime);
        indexer.finish()
    }
}

fn name(pod: &str, rank: Option<u32>) -> String {
    rank.map_or_else(|| pod.to_owned(), |rank| format!("{pod}#{rank}"))
}
