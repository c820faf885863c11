//! Who is let in, and what a hostile client cannot do to others.
//!
//! The indexer is the real program. Hostile clients come from an address of their own, 127.0.0.2.

use std::{
    convert::Infallible,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kv_indexer::{
    epp::precise::remote::RemoteTls,
    proto::kvindexer::{
        BlockKeys, ExplainRequest, ListPodsRequest, Prompt, RegisterPodRequest, ScoreRequest,
        TokenIds, WatchPodsRequest, kv_indexer_client::KvIndexerClient, prompt::Input,
    },
    support::tls::Identity,
};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpSocket, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, transport::Channel};

use crate::{
    ingest::engine::Engine,
    precise_remote::rig::Picker,
    support::{Indexer, connect, eventually, http, patience, runtime},
};

const OLD: &str = "old-token-old-token";
const NEW: &str = "new-token-new-token";

fn metric(indexer: &Indexer, series: &str) -> f64 {
    let (_, text) = indexer.get("/metrics").unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {series}")).parse().unwrap()
}

fn refusals(indexer: &Indexer, reason: &str) -> f64 {
    metric(indexer, &format!("kv_refused_total{{reason=\"{reason}\"}}"))
}

fn with_token<T>(message: T, token: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        let value = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    request
}

fn score(tokens: u32) -> ScoreRequest {
    let ids = (1..=tokens).collect();
    let input = Some(Input::TokenIds(TokenIds { ids }));
    ScoreRequest {
        model: "m".to_owned(),
        prompts: vec![Prompt { input, ..Prompt::default() }],
        ..ScoreRequest::default()
    }
}

fn explain() -> ExplainRequest {
    ExplainRequest { request: Some(score(64)), pod: "nobody".to_owned() }
}

/// What a call that is guarded comes to.
async fn guarded(client: &mut KvIndexerClient<Channel>, token: Option<&str>) -> Status {
    let register = client.register_pod(with_token(RegisterPodRequest::default(), token)).await;
    let explained = client.explain(with_token(explain(), token)).await;
    let explained = explained.map_or_else(|status| status, |_| Status::ok(""));
    let auth =
        |status: &Status| [Code::Unauthenticated, Code::PermissionDenied].contains(&status.code());
    assert_eq!(auth(&register.unwrap_err()), auth(&explained), "{explained}");
    explained
}

#[test]
fn a_token_opens_what_is_not_for_routers() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    fs::write(&file, OLD).unwrap();
    let indexer = Indexer::with_config(
        &format!("auth: {{tokenFile: {}}}", file.display()),
        &["--log-level", "info"],
    );
    let runtime = runtime();
    let mut client = runtime.block_on(connect(indexer.grpc));
    let page = |path: &str, token: Option<&str>| {
        let value = format!("Bearer {}", token.unwrap_or_default());
        let headers = [("authorization", value.as_str())];
        let headers = if token.is_some() { &headers[..] } else { &[] };
        http::read(http::send(indexer.admin, "GET", path, headers, "").unwrap()).unwrap()
    };
    runtime.block_on(async {
        client.score(score(64)).await.unwrap();
        client.list_pods(ListPodsRequest {}).await.unwrap();
        let none = guarded(&mut client, None).await;
        assert_eq!(none.code(), Code::Unauthenticated);
        assert!(none.message().starts_with("Explain needs a token"), "{none}");
        assert_eq!(guarded(&mut client, Some(NEW)).await.code(), Code::Unauthenticated);
        assert_eq!(guarded(&mut client, Some(OLD)).await.code(), Code::Ok);
    });
    for path in ["/metrics", "/livez", "/readyz"] {
        assert_eq!(page(path, None).status, 200, "{path}");
    }
    let closed = page("/config", None);
    assert_eq!(closed.status, 401);
    assert!(closed.head.to_ascii_lowercase().contains("www-authenticate: bearer"), "{closed:?}");
    assert!(closed.body.contains("auth.tokenFile"), "{closed:?}");
    assert_eq!(page("/config", Some(NEW)).status, 401);
    let shown = page("/config", Some(OLD));
    assert_eq!(shown.status, 200);
    assert!(!shown.body.contains(OLD), "{shown:?}");
    assert_eq!(page("/nonsense", None).status, 404);
    assert_eq!(refusals(&indexer, "no_token"), 3.0);
    assert_eq!(refusals(&indexer, "wrong_token"), 3.0);

    fs::write(&file, format!("{OLD}\n{NEW}\n")).unwrap();
    eventually("the new token is in force", || match page("/config", Some(NEW)).status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    assert_eq!(page("/config", Some(OLD)).status, 200, "the old one beside it");
    // What is no file of tokens changes nothing.
    fs::write(&file, "short").unwrap();
    eventually("the bad file is noticed", || {
        let failed = metric(&indexer, "kv_certificate_reloads_total{outcome=\"failed\"}");
        if failed >= 1.0 { Ok(()) } else { Err(failed.to_string()) }
    });
    assert_eq!(page("/config", Some(NEW)).status, 200);
    fs::write(&file, NEW).unwrap();
    eventually("the old token is gone", || match page("/config", Some(OLD)).status {
        401 => Ok(()),
        status => Err(status.to_string()),
    });
    drop((client, runtime));
    let log = indexer.finish();
    assert!(!log.contains(OLD) && !log.contains(NEW), "{log}");
}

#[test]
fn without_a_token_an_open_address_is_closed_for_all_but_routers() {
    let open = ["--grpc-listen", "0.0.0.0:0"];
    let indexer = Indexer::start(&open);
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, indexer.grpc.port()));
    let runtime = runtime();
    runtime.block_on(async {
        let mut client = connect(at).await;
        client.score(score(64)).await.unwrap();
        let denied = guarded(&mut client, Some(OLD)).await;
        assert_eq!(denied.code(), Code::PermissionDenied);
        assert!(denied.message().contains("set `auth.tokenFile`, or"), "{denied}");
    });
    assert_eq!(indexer.get("/config").unwrap().0, 200, "that is on loopback");
    assert!(refusals(&indexer, "closed") >= 2.0);
    assert!(indexer.finish().contains("without a token: set `auth.tokenFile`"));

    let indexer = Indexer::with_config("auth: {allowWithoutToken: true}", &open);
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, indexer.grpc.port()));
    let status = runtime.block_on(async { guarded(&mut connect(at).await, None).await });
    assert_eq!(status.code(), Code::Ok);
    drop(runtime);
    indexer.finish();
}

/// Writes a self-signed pair for `name`; certificate and key.
fn pair(directory: &Path, name: &str) -> Identity {
    let pair = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let (chain, key) = (directory.join("tls.crt"), directory.join("tls.key"));
    fs::write(&key, pair.signing_key.serialize_pem()).unwrap();
    fs::write(&chain, pair.cert.pem()).unwrap();
    Identity { chain, key }
}

#[test]
fn a_picker_shows_its_certificate_and_the_authority_can_change() {
    let [server, first, second] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let shown = pair(server.path(), "indexer.test");
    let (first, second) = (pair(first.path(), "one"), pair(second.path(), "two"));
    let authority = server.path().join("clients.pem");
    fs::copy(&first.chain, &authority).unwrap();
    let indexer = Indexer::with_config(
        &format!(
            "grpcTls: {{certPath: {}, clientCa: {}}}\nreadyTimeoutMs: 0",
            server.path().display(),
            authority.display()
        ),
        &[],
    );
    let tls = |identity: Option<&Identity>| RemoteTls {
        ca: Some(shown.chain.clone()),
        server_name: Some("indexer.test".to_owned()),
        identity: identity.cloned(),
        ..RemoteTls::default()
    };
    let connected = |identity| Picker::tls(indexer.grpc, tls(Some(identity)));
    let picker = connected(&first);
    picker.until("epp_indexer_connected", |connected| connected == 1.0);
    drop(picker);
    let turned_away = |picker: &Picker| {
        // Another one may be under way from before.
        let enough = refusals(&indexer, "handshake") + 2.0;
        eventually("handshakes fail", || match refusals(&indexer, "handshake") {
            failed if failed >= enough => Ok(()),
            failed => Err(failed.to_string()),
        });
        assert_eq!(picker.metric("epp_indexer_connected"), 0.0);
    };
    for stranger in [None, Some(&second)] {
        turned_away(&Picker::tls(indexer.grpc, tls(stranger)));
    }

    // The pickers' files and the service's change; who is connected later is judged by the new ones.
    let late = connected(&second);
    fs::copy(&second.chain, &authority).unwrap();
    late.until("epp_indexer_connected", |connected| connected == 1.0);
    // Pickers of one address share their series.
    drop(late);
    let gone = connected(&first);
    turned_away(&gone);
    // One that renews its certificate needs no restart.
    fs::copy(&second.key, &first.key).unwrap();
    fs::copy(&second.chain, &first.chain).unwrap();
    gone.until("epp_indexer_connected", |connected| connected == 1.0);
    drop(gone);
    indexer.finish();
}

/// A connection from this loopback address.
async fn dial(to: SocketAddr, from: u8) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, from), 0)))?;
    socket.connect(to).await
}

type Sender = hyper::client::conn::http2::SendRequest<
    http_body_util::combinators::BoxBody<Bytes, Infallible>,
>;

/// HTTP/2 without gRPC's manners.
async fn raw(to: SocketAddr, tasks: &mut JoinSet<()>) -> Sender {
    let stream = dial(to, 2).await.unwrap();
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tasks.spawn(async move { connection.await.unwrap_or_default() });
    sender
}

/// A `Score` call of which these bytes are sent, and then nothing; its status, `None` if it was cut off.
async fn half_a_call(sender: &mut Sender, head: u32, body: usize) -> Option<i32> {
    let mut bytes = vec![0];
    bytes.extend(head.to_be_bytes());
    bytes.resize(bytes.len() + body, 0);
    let (more, frames) = mpsc::channel(4);
    more.send(Ok::<_, Infallible>(Frame::data(Bytes::from(bytes)))).await.unwrap();
    let request = hyper::Request::post("http://x/kvindexer.v1.KvIndexer/Score")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(ReceiverStream::new(frames)).boxed())
        .unwrap();
    sender.ready().await.unwrap();
    let answer = sender.send_request(request).await.ok()?;
    drop(more);
    answer.headers().get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// A good client that asks all the time, on one connection and on new ones.
async fn good(at: SocketAddr, stop: Arc<AtomicBool>) -> (u32, Duration) {
    let (mut asked, mut longest) = (0, Duration::ZERO);
    let mut client = connect(at).await;
    while !stop.load(Ordering::Relaxed) {
        if asked % 50 == 49 {
            client = connect(at).await;
        }
        let began = Instant::now();
        let answer = tokio::time::timeout(patience(), client.score(score(64))).await.unwrap();
        let answer = answer.unwrap().into_inner();
        assert_eq!(answer.prompts[0].pods[0].depth, 4);
        longest = longest.max(began.elapsed());
        asked += 1;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    (asked, longest)
}

/// Thousands of connections, halves of messages, messages that are too large, and streams whose answers
/// nobody reads: each is bounded and counted, and somebody else's scores go on.
#[test]
fn a_hostile_client_starves_nobody() {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let indexer = Indexer::with_config(
        "api: {maxConnections: 64, maxMessageBytes: 2MiB, maxPendingBytes: 8MiB, \
         messageTimeoutMs: 1000}",
        &[],
    );
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.unwrap();
    let mut engine = Engine::bind("kv@a@m");
    runtime.block_on(async {
        let register = RegisterPodRequest {
            pod: "a".to_owned(),
            endpoint: engine.endpoint.clone(),
            ..RegisterPodRequest::default()
        };
        connect(indexer.grpc).await.register_pod(register).await.unwrap();
    });
    engine.subscribed();
    engine.send("store 1-4 of 1-64");
    eventually("the engine's blocks", || {
        let answer = runtime.block_on(async { connect(indexer.grpc).await.score(score(64)).await });
        let found = answer.unwrap().into_inner();
        if found.prompts[0].pods.is_empty() { Err(format!("{found:?}")) } else { Ok(()) }
    });

    let stop = Arc::new(AtomicBool::new(false));
    let asking = runtime.spawn(good(indexer.grpc, Arc::clone(&stop)));
    let at = indexer.grpc;

    // Connections that say nothing: the oldest make room.
    let silent = runtime.block_on(async {
        let mut silent = Vec::new();
        for _ in 0..2000 {
            silent.push(dial(at, 2).await.unwrap());
        }
        silent
    });
    eventually("silent connections are displaced", || {
        let displaced = refusals(&indexer, "displaced");
        if displaced >= 1900.0 { Ok(()) } else { Err(displaced.to_string()) }
    });
    let open = metric(&indexer, "kv_grpc_connections");
    assert!(open <= 64.0, "{open}");
    drop(silent);

    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        // Halves of messages: small ones time out.
        let mut sender = raw(at, &mut tasks).await;
        let mut calls = JoinSet::new();
        for _ in 0..100 {
            let mut sender = sender.clone();
            calls.spawn(async move { half_a_call(&mut sender, 1 << 20, 8 << 10).await });
        }
        let statuses = calls.join_all().await;
        let late = Code::DeadlineExceeded as i32;
        assert!(statuses.iter().all(|status| *status == Some(late)), "{statuses:?}");

        // Large ones are more than one address may leave unfinished.
        let mut calls = JoinSet::new();
        for _ in 0..12 {
            let mut sender = sender.clone();
            calls.spawn(async move { half_a_call(&mut sender, 1 << 20, 1_000_000).await });
        }
        let statuses = calls.join_all().await;
        let full = Code::ResourceExhausted as i32;
        let refused = statuses.iter().filter(|status| **status == Some(full)).count();
        assert!((1..12).contains(&refused), "{statuses:?}");

        // A message that says it is too large is refused at its head.
        let began = Instant::now();
        let status = half_a_call(&mut sender, 1 << 30, 100).await;
        assert_eq!(status, Some(Code::OutOfRange as i32));
        assert!(began.elapsed() < Duration::from_secs(1));

        // Streams that only ask.
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{at}"))
            .unwrap()
            // Less than an answer, so that no answer leaves the server unread.
            .initial_stream_window_size(16)
            .connect_with_connector(Connector(at))
            .await
            .unwrap();
        let mut deaf = Vec::new();
        for _ in 0..64 {
            let request = ScoreRequest {
                prompts: vec![Prompt {
                    input: Some(Input::BlockKeys(BlockKeys { keys: (1..=2000).collect() })),
                    ..Prompt::default()
                }],
                ..score(1)
            };
            let requests = tokio_stream::iter((0..300).map(move |_| request.clone()));
            let mut client = KvIndexerClient::new(channel.clone());
            match client.score_stream(requests).await {
                Ok(answers) => deaf.push(answers),
                // The earlier ones have all that this address may have.
                Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
            }
        }
        let deadline = Instant::now() + patience();
        let before = refused as f64;
        while refusals_of(indexer.admin) < before + 10.0 {
            assert!(Instant::now() < deadline, "{}", refusals_of(indexer.admin));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!deaf.is_empty());
        tokio::time::sleep(Duration::from_millis(200)).await;
    });
    assert!(refusals(&indexer, "message_timeout") >= 100.0);

    stop.store(true, Ordering::Relaxed);
    let (asked, longest) = runtime.block_on(asking).unwrap();
    println!("{asked} scores beside, the longest took {longest:?}");
    assert!(asked >= 100, "{asked}");
    runtime.shutdown_timeout(Duration::from_secs(1));
    indexer.finish();
}

/// Of bytes that wait; for use inside a runtime.
fn refusals_of(admin: SocketAddr) -> f64 {
    let text = http::get(admin, "/metrics").body;
    let series = "kv_refused_total{reason=\"pending_bytes\"} ";
    text.lines().find_map(|line| line.strip_prefix(series)).unwrap().parse().unwrap()
}

/// Connects from the hostile address.
struct Connector(SocketAddr);

impl tonic::codegen::Service<hyper::Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: hyper::Uri) -> Self::Future {
        let at = self.0;
        Box::pin(async move { dial(at, 2).await.map(TokioIo::new) })
    }
}

#[test]
fn only_connections_without_calls_are_idle() {
    let indexer = Indexer::with_config("api: {idleTimeoutMs: 300}", &[]);
    let runtime = runtime();
    runtime.block_on(async {
        let mut watcher = connect(indexer.grpc).await;
        let mut watch = watcher.watch_pods(WatchPodsRequest {}).await.unwrap().into_inner();
        assert!(watch.message().await.unwrap().unwrap().initial_end);
        let mut silent = dial(indexer.grpc, 1).await.unwrap();
        let mut said = Vec::new();
        let ended = tokio::time::timeout(patience(), silent.read_to_end(&mut said)).await.unwrap();
        ended.unwrap();
        // A call that says nothing is a call.
        let next = tokio::time::timeout(Duration::from_millis(900), watch.message()).await;
        assert!(next.is_err(), "{next:?}");
        watcher.score(score(64)).await.unwrap();
    });
    assert!(refusals(&indexer, "idle") >= 1.0);
    drop(runtime);
    indexer.finish();
}
