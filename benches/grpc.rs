//! `cargo bench --bench grpc`: what a `Score` costs the server beyond the transport.
//!
//! Measures: CPU time of a server's thread per call, over loopback, on one connection; the service as
//! it runs beside a handler that decodes the request and returns a prebuilt answer.
//! Model: 512 block keys that 64 pods hold in full; both servers in this process, each on a thread of
//! its own that does nothing else, called by turns from a third.
//! Reads as: medians over the turns in µs, and their ratio. The target: at most 1.25 for compact
//! answers.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a bench tells its user")]

mod common;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use kv_indexer::{
    indexer::{server::serve, service::Service},
    proto::kvindexer::{
        BlockKeys, Prompt, ScoreDetail, ScoreRequest, ScoreResponse,
        kv_indexer_client::KvIndexerClient, kv_indexer_server, prompt::Input,
    },
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::{oneshot, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    codegen::{BoxFuture, Context, Poll, http},
    transport::{Channel, Server, server::TcpIncoming},
};

const PODS: u32 = 64;
const BLOCKS: u32 = 512;

/// Answers each call with what is kept for its detail.
#[derive(Clone)]
struct Prebuilt(Arc<Vec<ScoreResponse>>);

impl tonic::server::NamedService for Prebuilt {
    const NAME: &'static str = kv_indexer_server::SERVICE_NAME;
}

impl tonic::codegen::Service<http::Request<tonic::body::Body>> for Prebuilt {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let handler = Handler(Arc::clone(&self.0));
        Box::pin(async move {
            let codec = tonic_prost::ProstCodec::<ScoreResponse, ScoreRequest>::default();
            Ok(tonic::server::Grpc::new(codec).unary(handler, request).await)
        })
    }
}

struct Handler(Arc<Vec<ScoreResponse>>);

impl tonic::server::UnaryService<ScoreRequest> for Handler {
    type Response = ScoreResponse;
    type Future = BoxFuture<tonic::Response<ScoreResponse>, tonic::Status>;

    fn call(&mut self, request: tonic::Request<ScoreRequest>) -> Self::Future {
        let answer = self.0[request.get_ref().detail as usize].clone();
        Box::pin(async move { Ok(tonic::Response::new(answer)) })
    }
}

/// The prebuilt answers on a server with the windows of the real one.
async fn serve_prebuilt(listener: TcpListener, answers: Arc<Vec<ScoreResponse>>) {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        .add_service(Prebuilt(answers))
        .serve_with_incoming(incoming)
        .await
        .expect("a server that runs");
}

async fn serve_ours(listener: TcpListener, service: Service) {
    let (_ready, ready) = watch::channel(true);
    serve(listener, None, service, ready, CancellationToken::new(), Duration::ZERO)
        .await
        .expect("a server that runs");
}

/// A server on a thread of its own.
struct Target {
    client: KvIndexerClient<Channel>,
    /// Where its CPU time stands.
    schedstat: String,
}

impl Target {
    fn start<F: Future<Output = ()>>(
        client: &Runtime,
        server: impl FnOnce(TcpListener) -> F + Send + 'static,
    ) -> Self {
        let (started, told) = oneshot::channel::<(SocketAddr, String)>();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
                let own = std::fs::read_link("/proc/thread-self").expect("Linux");
                let schedstat = format!("/proc/{}/schedstat", own.display());
                let address = listener.local_addr().expect("bound");
                started.send((address, schedstat)).expect("somebody who waits");
                server(listener).await;
            });
        });
        client.block_on(async {
            let (address, schedstat) = told.await.expect("a thread that starts");
            let address = format!("http://{address}");
            let client = KvIndexerClient::connect(address).await.expect("a server");
            Self { client, schedstat }
        })
    }

    /// CPU time of its thread so far, in µs.
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(&self.schedstat).expect("a thread that runs");
        let nanos = stat.split_whitespace().next().and_then(|first| first.parse::<f64>().ok());
        nanos.expect("a number") / 1e3
    }

    /// CPU time per call of `calls` calls, `flight` at a time.
    async fn turn(&self, request: &ScoreRequest, calls: u32, flight: u32) -> f64 {
        let before = self.cpu();
        let mut callers = JoinSet::new();
        for _ in 0..flight {
            let (mut client, request) = (self.client.clone(), request.clone());
            callers.spawn(async move {
                for _ in 0..calls / flight {
                    let answer = client.score(request.clone()).await.expect("an answer");
                    assert_eq!(answer.get_ref().prompts.len(), 1);
                }
            });
        }
        callers.join_all().await;
        (self.cpu() - before) / f64::from(calls)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let (turns, calls) =
        if std::env::args().any(|arg| arg == "--bench") { (21, 2048) } else { (2, 64) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (service, tokens) = common::service::filled(PODS, BLOCKS);
    let keys = common::keys(&tokens).into_iter().map(|key| key.0).collect();
    let prompt = Prompt { input: Some(Input::BlockKeys(BlockKeys { keys })), ..Prompt::default() };
    let request = |detail: ScoreDetail| ScoreRequest {
        model: "model".to_owned(),
        prompts: vec![prompt.clone()],
        detail: detail.into(),
        ..ScoreRequest::default()
    };
    let ours = Target::start(&runtime, move |listener| serve_ours(listener, service));
    let details = [ScoreDetail::Unspecified, ScoreDetail::Pods, ScoreDetail::Compact];
    let answers = details.map(|detail| {
        let answer = runtime.block_on(ours.client.clone().score(request(detail)));
        answer.expect("an answer").into_inner()
    });
    let compact = answers[2].prompts[0].compact.as_ref().expect("a compact answer");
    assert_eq!(compact.depths, vec![BLOCKS; PODS as usize], "all pods hold everything");
    let answers = Arc::new(answers.to_vec());
    let plain = Target::start(&runtime, move |listener| serve_prebuilt(listener, answers));

    println!("| answer | calls in flight | ours, µs of CPU | prebuilt | ratio |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    for (detail, name) in details.into_iter().zip(["detailed", "without tiers", "compact"]).rev() {
        for flight in [1, 16] {
            let request = request(detail);
            let (mut own, mut other) = (Vec::new(), Vec::new());
            for turn in 0..=turns {
                let times = runtime.block_on(async {
                    let own = ours.turn(&request, calls, flight).await;
                    (own, plain.turn(&request, calls, flight).await)
                });
                // The first turn warms up.
                if turn > 0 {
                    own.push(times.0);
                    other.push(times.1);
                }
            }
            let (own, other) = (median(own), median(other));
            println!("| {name} | {flight} | {own:.1} | {other:.1} | {:.2} |", own / other);
        }
    }
}
