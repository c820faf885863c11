//! The gRPC services: `kvindexer.v1.KvIndexer` and llm-d's `indexer.v1.IndexerService`.
//!
//! The comments of `proto/` are the contract. Each call has a file of its own; here they are joined
//! with the transport: arrival, deadline, metrics, and domain error → status.
//!
//! # Failure
//!
//! A request is refused as a whole or answered as a whole. Nothing here can fail for want of an
//! index: a pod that is being repaired answers with its state.

mod answers;
mod deadline;
mod explain;
pub mod fuzz;
mod llmd;
mod pods;
mod register;
mod request;
mod score;
mod snapshot;
mod speculate;
mod stream;
mod visible;
mod watch;

use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Request, Response, Status, Streaming};

pub use self::answers::Answers;
use self::request::{Prepared, Text};
use crate::{
    indexer::{
        ApiConfig, ScoreError,
        metrics::{Rpc, ScoreMetrics},
        registry::{PodRegistry, RegistryError},
        server::gate::Caller,
        speculation::Speculations,
    },
    ingest::fleet::Fleet,
    model::TierTable,
    proto::{
        kvindexer::{self as pb, kv_indexer_server::KvIndexer},
        llmd as llmd_pb,
    },
    tokenize::Tokenize,
};

/// What the services work on.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Rows, and the index behind them.
    pub fleet: Arc<Fleet>,
    /// Names of the tiers that the index numbers.
    pub tiers: Arc<TierTable>,
    /// Limits and model names.
    pub config: Arc<ApiConfig>,
    /// Who owns the set of publishers.
    pub registry: Arc<dyn PodRegistry>,
    /// The live speculative entries; their `run` is the caller's to supervise.
    pub speculations: Arc<Speculations>,
    /// Where calls are counted.
    pub metrics: ScoreMetrics,
    /// Text → tokens, where configured.
    pub tokenizer: Option<Arc<dyn Tokenize>>,
    /// Does what [`Service::close`] does.
    pub stop: CancellationToken,
}

/// Both services; clones share everything.
#[derive(Clone, Debug)]
pub struct Service {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    fleet: Arc<Fleet>,
    tiers: Arc<TierTable>,
    config: Arc<ApiConfig>,
    registry: Arc<dyn PodRegistry>,
    speculations: Arc<Speculations>,
    metrics: ScoreMetrics,
    tokenizer: Option<Arc<dyn Tokenize>>,
    /// Ends the streaming calls and the waits, with UNAVAILABLE.
    stop: CancellationToken,
    /// Readers of the streaming calls.
    tasks: TaskTracker,
    snapshots: snapshot::Slot,
}

impl Service {
    /// The services over `parts`.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let Parts { fleet, tiers, config, registry, speculations, metrics, tokenizer, stop } =
            parts;
        Self {
            inner: Arc::new(Inner {
                fleet,
                tiers,
                config,
                registry,
                speculations,
                metrics,
                tokenizer,
                // A child: closing the services must not stop others who hold the token.
                stop: stop.child_token(),
                tasks: TaskTracker::new(),
                snapshots: snapshot::Slot::new(),
            }),
        }
    }

    /// The limits that the services were made with.
    #[must_use]
    pub fn config(&self) -> &ApiConfig {
        &self.inner.config
    }

    /// Ends streaming calls and waits with UNAVAILABLE; other calls go on.
    pub fn close(&self) {
        self.inner.stop.cancel();
    }

    /// Closes, and returns when the tasks of all streaming calls have ended.
    pub async fn drained(&self) {
        self.close();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    async fn score_now(
        &self,
        request: pb::ScoreRequest,
        arrival: Instant,
        call: Option<Instant>,
    ) -> Result<pb::ScoreResponse, ScoreError> {
        let inner = &self.inner;
        let text = Text::Allowed(inner.tokenizer.as_ref());
        let prepared = Prepared::new(&inner.config, request, arrival, call, text).await?;
        inner.score(&prepared).await
    }
}

/// Arrival and deadline of a call, and its message.
fn open<T>(request: Request<T>) -> (Instant, Option<Instant>, T) {
    let arrival = Instant::now();
    (arrival, deadline::of(request.metadata(), arrival), request.into_inner())
}

fn reply<T>(answer: Result<T, ScoreError>) -> Result<Response<T>, Status> {
    answer.map(Response::new).map_err(Status::from)
}

/// Runs a call that waits for other threads.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, ScoreError> + Send + 'static,
) -> Result<T, ScoreError> {
    tokio::task::spawn_blocking(call)
        .await
        .unwrap_or_else(|error| Err(RegistryError::Unavailable(error.to_string()).into()))
}

fn code_of<T>(answer: &Result<T, ScoreError>) -> Code {
    answer.as_ref().map_or_else(ScoreError::code, |_| Code::Ok)
}

#[tonic::async_trait]
impl KvIndexer for Service {
    type ScoreStreamStream = Answers<pb::ScoreResponse>;
    type WatchPodsStream = Answers<pb::PodStatus>;
    type SnapshotStream = Answers<pb::SnapshotChunk>;

    async fn score(
        &self,
        request: Request<pb::ScoreRequest>,
    ) -> Result<Response<pb::ScoreResponse>, Status> {
        let (arrival, call, request) = open(request);
        let answer = self.score_now(request, arrival, call).await;
        self.inner.metrics.answered(Rpc::Score, code_of(&answer), arrival.elapsed());
        reply(answer)
    }

    async fn score_stream(
        &self,
        request: Request<Streaming<pb::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let (_, call, inbound) = open(request);
        Ok(Response::new(stream::answers(Arc::clone(&self.inner), inbound, call, caller)))
    }

    async fn explain(
        &self,
        request: Request<pb::ExplainRequest>,
    ) -> Result<Response<pb::ExplainResponse>, Status> {
        let (arrival, call, request) = open(request);
        reply(self.inner.explain(request, arrival, call).await)
    }

    async fn list_pods(
        &self,
        _: Request<pb::ListPodsRequest>,
    ) -> Result<Response<pb::ListPodsResponse>, Status> {
        Ok(Response::new(self.inner.list_pods()))
    }

    async fn watch_pods(
        &self,
        _: Request<pb::WatchPodsRequest>,
    ) -> Result<Response<Self::WatchPodsStream>, Status> {
        Ok(Response::new(watch::watch(Arc::clone(&self.inner))))
    }

    async fn register_pod(
        &self,
        request: Request<pb::RegisterPodRequest>,
    ) -> Result<Response<pb::RegisterPodResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        reply(blocking(move || inner.register_pod(request.into_inner())).await)
    }

    async fn unregister_pod(
        &self,
        request: Request<pb::UnregisterPodRequest>,
    ) -> Result<Response<pb::UnregisterPodResponse>, Status> {
        let inner = Arc::clone(&self.inner);
        reply(blocking(move || inner.unregister_pod(request.get_ref())).await)
    }

    async fn wait_visible(
        &self,
        request: Request<pb::WaitVisibleRequest>,
    ) -> Result<Response<pb::WaitVisibleResponse>, Status> {
        let (arrival, call, request) = open(request);
        reply(self.inner.wait_visible(&request, arrival, call).await)
    }

    async fn speculate(
        &self,
        request: Request<pb::SpeculateRequest>,
    ) -> Result<Response<pb::SpeculateResponse>, Status> {
        let (arrival, call, request) = open(request);
        reply(self.inner.speculate(request, arrival, call).await)
    }

    async fn unspeculate(
        &self,
        request: Request<pb::UnspeculateRequest>,
    ) -> Result<Response<pb::UnspeculateResponse>, Status> {
        reply(self.inner.unspeculate(request.get_ref()))
    }

    async fn snapshot(
        &self,
        _: Request<pb::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        snapshot::stream(&self.inner).map(Response::new)
    }
}

#[tonic::async_trait]
impl llmd_pb::indexer_service_server::IndexerService for Service {
    async fn get_pod_scores(
        &self,
        request: Request<llmd_pb::GetPodScoresRequest>,
    ) -> Result<Response<llmd_pb::GetPodScoresResponse>, Status> {
        let (arrival, call, request) = open(request);
        let answer = self.inner.get_pod_scores(request, arrival, call).await;
        self.inner.metrics.answered(Rpc::GetPodScores, code_of(&answer), arrival.elapsed());
        reply(answer)
    }
}
