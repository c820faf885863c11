//! A service that answers what no service should.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
};

use kv_indexer::proto::kvindexer::{
    self as pb,
    kv_indexer_server::{KvIndexer, KvIndexerServer},
};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Makes an answer of what would be a good one; none = silence.
pub(crate) type Lie =
    Arc<dyn Fn(pb::ScoreResponse) -> Option<Result<pb::ScoreResponse, Status>> + Send + Sync>;

/// Tells rows that it is given, and lies about what they hold.
pub(crate) struct Liar {
    rows: pb::ListPodsResponse,
    lie: Lie,
    /// What was asked last.
    pub(crate) asked: Arc<Mutex<Option<pb::ScoreRequest>>>,
}

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("no"))
}

impl Liar {
    /// Serves until the runtime is dropped.
    pub(crate) fn start(rows: pb::ListPodsResponse, lie: Lie) -> (SocketAddr, Runtime) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let liar = Self { rows, lie, asked: Arc::default() };
        let server = tonic::transport::Server::builder().add_service(KvIndexerServer::new(liar));
        runtime.spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        (address, runtime)
    }
}

#[tonic::async_trait]
impl KvIndexer for Liar {
    type ScoreStreamStream = Answers<pb::ScoreResponse>;
    type WatchPodsStream = Answers<pb::PodStatus>;
    type SnapshotStream = Answers<pb::SnapshotChunk>;

    async fn score_stream(
        &self,
        request: Request<Streaming<pb::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStreamStream>, Status> {
        let (lie, asked) = (Arc::clone(&self.lie), Arc::clone(&self.asked));
        let version = self.rows.slot_table_version;
        let answers = request.into_inner().filter_map(move |request| {
            let request = match request {
                Ok(request) => request,
                Err(status) => return Some(Err(status)),
            };
            let keys = |prompt: &pb::Prompt| match &prompt.input {
                Some(pb::prompt::Input::BlockKeys(keys)) => keys.keys.len() as u32,
                _ => 0,
            };
            let scores = |prompt: &pb::Prompt| pb::PromptScores {
                total_blocks: keys(prompt),
                block_size: super::rig::BLOCK,
                pods: vec![],
                compact: Some(pb::CompactScores {
                    slots: vec![0],
                    depths: vec![1],
                    ..pb::CompactScores::default()
                }),
            };
            let good = pb::ScoreResponse {
                request_id: request.request_id,
                prompts: request.prompts.iter().map(scores).collect(),
                error: None,
                hash_fingerprint: request.hash_fingerprint,
                slot_table_version: version,
            };
            *asked.lock().unwrap() = Some(request);
            lie(good)
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_pods(
        &self,
        _: Request<pb::ListPodsRequest>,
    ) -> Result<Response<pb::ListPodsResponse>, Status> {
        Ok(Response::new(self.rows.clone()))
    }

    async fn watch_pods(
        &self,
        _: Request<pb::WatchPodsRequest>,
    ) -> Result<Response<Self::WatchPodsStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::pending())))
    }

    async fn score(
        &self,
        _: Request<pb::ScoreRequest>,
    ) -> Result<Response<pb::ScoreResponse>, Status> {
        no()
    }

    async fn explain(
        &self,
        _: Request<pb::ExplainRequest>,
    ) -> Result<Response<pb::ExplainResponse>, Status> {
        no()
    }

    async fn register_pod(
        &self,
        _: Request<pb::RegisterPodRequest>,
    ) -> Result<Response<pb::RegisterPodResponse>, Status> {
        no()
    }

    async fn unregister_pod(
        &self,
        _: Request<pb::UnregisterPodRequest>,
    ) -> Result<Response<pb::UnregisterPodResponse>, Status> {
        no()
    }

    async fn wait_visible(
        &self,
        _: Request<pb::WaitVisibleRequest>,
    ) -> Result<Response<pb::WaitVisibleResponse>, Status> {
        no()
    }

    async fn speculate(
        &self,
        _: Request<pb::SpeculateRequest>,
    ) -> Result<Response<pb::SpeculateResponse>, Status> {
        no()
    }

    async fn unspeculate(
        &self,
        _: Request<pb::UnspeculateRequest>,
    ) -> Result<Response<pb::UnspeculateResponse>, Status> {
        no()
    }

    async fn snapshot(
        &self,
        _: Request<pb::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        no()
    }
}
