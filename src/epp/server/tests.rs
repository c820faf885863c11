//! The server over real sockets on loopback.

use std::{fs, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming, codec::CompressionEncoding};

use self::client::Caller;
use super::{
    ConnectionMetrics, GrpcOptions, ServerOptions, Services,
    health::{Health, NAMES},
    null::Null,
    serve,
};
use crate::{
    epp::{ext_proc::headers::DESTINATION, metrics::EppMetrics},
    proto::{
        ext_proc::{
            HttpBody, HttpHeaders, ProcessingRequest, ProcessingResponse, body_mutation::Mutation,
            external_processor_client::ExternalProcessorClient,
            processing_request::Request as Part, processing_response::Response as Reply,
        },
        health::{
            HealthCheckRequest, HealthListRequest, health_check_response::ServingStatus,
            health_client::HealthClient,
        },
    },
    support::tls::{Certificate, TlsError, TlsOptions, TlsVersion, cipher_suites, server_config},
};

mod client;
mod flood;

/// Long enough for anything that happens at all.
const PATIENCE: Duration = Duration::from_secs(20);

/// A null service that is being served.
struct Served {
    address: std::net::SocketAddr,
    metrics: ConnectionMetrics,
    stop: CancellationToken,
    running: JoinHandle<anyhow::Result<()>>,
}

impl Served {
    async fn start(options: ServerOptions) -> Self {
        let services = Services::new(Null::new("10.0.0.1:8000"), GrpcOptions::default(), None);
        Self::start_services(options, services).await
    }

    async fn start_services(options: ServerOptions, services: Services<Null>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (metrics, stop) = (ConnectionMetrics::default(), CancellationToken::new());
        let serving = serve(listener, options, services, metrics.clone(), stop.clone());
        let running = tokio::task::spawn_local(serving);
        Self { address, metrics, stop, running }
    }

    async fn call(&self) -> Exchange {
        Exchange::open(Caller::plain(self.address).await, self.address).await
    }

    /// Stops, and waits for the end.
    async fn end(self) {
        self.stop.cancel();
        timeout(2 * PATIENCE, self.running).await.unwrap().unwrap().unwrap();
    }
}

/// One `ext_proc` stream of a client.
struct Exchange {
    requests: Option<mpsc::Sender<ProcessingRequest>>,
    replies: Streaming<ProcessingResponse>,
}

impl Exchange {
    async fn open(caller: Caller, address: std::net::SocketAddr) -> Self {
        Self::with(ExternalProcessorClient::with_origin(caller, client::origin(address))).await
    }

    async fn with(client: ExternalProcessorClient<Caller>) -> Self {
        let mut client = client.max_decoding_message_size(usize::MAX);
        let (requests, receiver) = mpsc::channel(16);
        let replies = client.process(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { requests: Some(requests), replies }
    }

    async fn send(&self, part: Part) {
        let request = ProcessingRequest { request: Some(part), ..ProcessingRequest::default() };
        self.requests.as_ref().unwrap().send(request).await.unwrap();
    }

    async fn reply(&mut self) -> Reply {
        let reply = timeout(PATIENCE, self.replies.message()).await.unwrap().unwrap();
        reply.unwrap().response.unwrap()
    }

    /// Sends headers and a body, and checks that the body comes back and the headers name the pod.
    async fn echo(&mut self, body: Bytes) {
        self.send(Part::RequestHeaders(HttpHeaders::default())).await;
        let Reply::RequestHeaders(headers) = self.reply().await else { panic!("no headers") };
        let mutation = headers.response.unwrap().header_mutation.unwrap();
        let header = mutation.set_headers[0].header.as_ref().unwrap();
        assert_eq!((&*header.key, &*header.raw_value), (DESTINATION, &b"10.0.0.1:8000"[..]));
        self.send(Part::RequestBody(HttpBody { body: body.clone(), end_of_stream: true })).await;
        let mut echoed = Vec::new();
        loop {
            let Reply::RequestBody(reply) = self.reply().await else { panic!("no body") };
            let mutation = reply.response.unwrap().body_mutation.unwrap().mutation;
            let Some(Mutation::StreamedResponse(piece)) = mutation else { panic!("not streamed") };
            assert!(piece.body.len() <= 62_000);
            echoed.extend_from_slice(&piece.body);
            if piece.end_of_stream {
                break;
            }
        }
        assert_eq!(echoed.len(), body.len());
        assert!(echoed == body);
    }

    /// Half-closes, and waits for the end of the replies.
    async fn finish(mut self) {
        self.requests = None;
        assert!(timeout(PATIENCE, self.replies.message()).await.unwrap().unwrap().is_none());
    }
}

/// Waits until `condition` holds.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Runs a test on a thread where tasks may be local.
fn on_thread<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

fn options(threads: usize) -> ServerOptions {
    ServerOptions { threads, drain: PATIENCE, ..ServerOptions::default() }
}

#[test]
fn bodies_of_any_size_are_answered_on_every_kind_of_thread() {
    for threads in [0, 1, 3] {
        on_thread(async move {
            let served = Served::start(options(threads)).await;
            for size in [0, 1, 62_000, 62_001, 300_072, 9 << 20] {
                let mut exchange = served.call().await;
                exchange.echo(vec![7; size].into()).await;
                exchange.finish().await;
            }
            assert_eq!(served.metrics.accepted.get(), 6);
            let open = served.metrics.open.clone();
            served.end().await;
            assert_eq!(open.get(), 0);
        });
    }
}

#[test]
fn compressed_messages_are_accepted() {
    on_thread(async {
        let served = Served::start(options(1)).await;
        let caller = Caller::plain(served.address).await;
        let origin = client::origin(served.address);
        let client = ExternalProcessorClient::with_origin(caller, origin)
            .send_compressed(CompressionEncoding::Gzip);
        let mut exchange = Exchange::with(client).await;
        exchange.echo(vec![b'x'; 100_000].into()).await;
        exchange.finish().await;
        served.end().await;
    });
}

#[test]
fn a_message_beyond_the_limit_ends_its_stream_alone() {
    on_thread(async {
        let limits = GrpcOptions { max_receive_bytes: 1000, ..GrpcOptions::default() };
        let services = Services::new(Null::new("10.0.0.1:8000"), limits, None);
        let served = Served::start_services(options(1), services).await;
        let caller = Caller::plain(served.address).await;
        let mut ended = Exchange::open(caller.clone(), served.address).await;
        let mut other = Exchange::open(caller, served.address).await;
        ended
            .send(Part::RequestBody(HttpBody { body: vec![7; 2000].into(), end_of_stream: true }))
            .await;
        // The yardstick takes a faulty message for the end of its stream.
        assert!(timeout(PATIENCE, ended.replies.message()).await.unwrap().unwrap().is_none());
        other.echo(vec![7; 500].into()).await;
        other.finish().await;
        served.end().await;
    });
}

#[test]
fn an_unknown_service_is_unimplemented() {
    on_thread(async {
        let served = Served::start(options(1)).await;
        let caller = Caller::plain(served.address).await;
        let mut client = HealthClient::with_origin(caller, client::origin(served.address));
        let status = client.check(HealthCheckRequest::default()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        assert!(status.message().contains("grpc.health.v1.Health"), "{status}");
        served.end().await;
    });
}

#[test]
fn health_answers_for_every_name() {
    on_thread(async {
        let health = Health::new();
        let served = Served::start_services(options(0), Services::health(health.clone())).await;
        let caller = Caller::plain(served.address).await;
        let mut client = HealthClient::with_origin(caller, client::origin(served.address));
        let others = ["nobody", "other/name"];
        let mut check = async |serving: &[&str]| {
            let list = client.list(HealthListRequest {}).await.unwrap().into_inner().statuses;
            assert_eq!(list.len(), NAMES.len());
            for name in NAMES.into_iter().chain(others) {
                let request = HealthCheckRequest { service: name.to_owned() };
                let status = client.check(request).await.unwrap().into_inner().status();
                let serves = status == ServingStatus::Serving;
                assert!(serves || status == ServingStatus::NotServing);
                assert_eq!(serves, serving.contains(&name), "{name}");
                if let Some(listed) = list.get(name) {
                    assert_eq!(listed.status(), status, "{name}");
                }
            }
        };
        let all: Vec<&str> = NAMES.into_iter().chain(others).collect();
        check(&[]).await;
        health.set_plugins_ready(true);
        check(&[]).await;
        health.set_synced(true);
        check(&all).await;
        health.set_plugins_ready(false);
        check(&["liveness", "nobody", "other/name"]).await;
        health.set_plugins_ready(true);
        health.drain();
        check(&[]).await;

        let watch = client.watch(HealthCheckRequest::default()).await.unwrap_err();
        assert_eq!(watch.code(), Code::Unimplemented);
        served.end().await;
    });
}

#[test]
fn health_can_be_served_beside_ext_proc() {
    on_thread(async {
        let health = Health::new();
        health.set_synced(true);
        health.set_plugins_ready(true);
        let null = Null::new("10.0.0.1:8000");
        let services = Services::new(null, GrpcOptions::default(), Some(health));
        let served = Served::start_services(options(1), services).await;
        let caller = Caller::plain(served.address).await;
        let mut client = HealthClient::with_origin(caller.clone(), client::origin(served.address));
        let request = HealthCheckRequest { service: NAMES[3].to_owned() };
        let status = client.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving);
        Exchange::open(caller, served.address).await.echo("x".into()).await;
        served.end().await;
    });
}

#[test]
fn a_stop_waits_for_streams_and_takes_no_connection() {
    on_thread(async {
        let mut served = Served::start(options(2)).await;
        let mut exchange = served.call().await;
        exchange.echo("before".into()).await;
        served.stop.cancel();
        let refused = async {
            // The socket goes a moment after the stop.
            while TcpStream::connect(served.address).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, refused).await.unwrap();
        exchange.send(Part::ResponseHeaders(HttpHeaders::default())).await;
        assert!(matches!(exchange.reply().await, Reply::ResponseHeaders(_)));
        let early = timeout(Duration::from_millis(100), &mut served.running).await;
        assert!(early.is_err(), "ended before its stream");
        exchange.finish().await;
        served.end().await;
    });
}

#[test]
fn a_stop_waits_no_longer_than_the_drain() {
    on_thread(async {
        let drain = Duration::from_millis(50);
        let served = Served::start(ServerOptions { drain, ..options(1) }).await;
        let mut exchange = served.call().await;
        exchange.echo("x".into()).await;
        served.end().await;
        let end = timeout(PATIENCE, exchange.replies.message()).await.unwrap();
        assert!(end.is_err(), "{end:?}");
    });
}

#[test]
fn connections_beyond_the_limit_are_closed() {
    on_thread(async {
        let served = Served::start(ServerOptions { connections: 2, ..options(2) }).await;
        let mut first = served.call().await;
        let mut second = served.call().await;
        first.echo("x".into()).await;
        let mut third = TcpStream::connect(served.address).await.unwrap();
        let mut nothing = Vec::new();
        // Closed in order, or reset: there may be nothing to read in either case.
        _ = timeout(PATIENCE, third.read_to_end(&mut nothing)).await.unwrap();
        assert!(nothing.is_empty());
        assert_eq!(served.metrics.refused.get(), 1);
        second.echo("x".into()).await;
        drop(first);
        let open = served.metrics.open.clone();
        eventually("a connection is free", || open.get() == 1).await;
        served.call().await.echo("x".into()).await;
        drop(second);
        served.end().await;
    });
}

#[test]
fn peers_that_do_not_speak_are_not_waited_for() {
    on_thread(async {
        let handshake_timeout = Duration::from_millis(50);
        let served = Served::start(ServerOptions { handshake_timeout, ..options(1) }).await;
        let mut silent = TcpStream::connect(served.address).await.unwrap();
        let read = timeout(PATIENCE, silent.read(&mut [0; 8])).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        let failed = served.metrics.failed.clone();
        eventually("it is counted", || failed.get() == 1).await;
        served.call().await.echo("x".into()).await;
        served.end().await;
    });
}

#[test]
fn nonsense_ends_its_connection_alone() {
    on_thread(async {
        let served = Served::start(options(1)).await;
        let mut exchange = served.call().await;
        for nonsense in ["GET / HTTP/1.1\r\n\r\n", "\u{16}\u{3}\u{1}", "PRI * HTTP/2.0\r\n\r\nXX"] {
            let mut peer = TcpStream::connect(served.address).await.unwrap();
            peer.write_all(nonsense.as_bytes()).await.unwrap();
            peer.shutdown().await.unwrap();
            let mut answer = Vec::new();
            _ = timeout(PATIENCE, peer.read_to_end(&mut answer)).await.unwrap();
        }
        assert_eq!(served.metrics.failed.get(), 3);
        // In parts, it is HTTP/2 all the same.
        let mut peer = TcpStream::connect(served.address).await.unwrap();
        peer.set_nodelay(true).unwrap();
        for part in ["PRI * HT", "TP/2.0\r\n\r\n", "SM\r\n\r\n"] {
            peer.write_all(part.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // The head of a SETTINGS frame.
        let mut head = [0; 9];
        timeout(PATIENCE, peer.read_exact(&mut head)).await.unwrap().unwrap();
        assert_eq!(head[3], 4);
        drop(peer);
        exchange.echo("x".into()).await;
        exchange.finish().await;
        served.end().await;
    });
}

/// Serves with TLS.
async fn start_tls(tls: &TlsOptions, certificate: Certificate, drain: Duration) -> Served {
    let tls = Some(server_config(tls, certificate).unwrap());
    Served::start(ServerOptions { tls, drain, ..options(1) }).await
}

#[test]
fn the_self_signed_certificate_is_for_localhost() {
    on_thread(async {
        let tls = TlsOptions::default();
        let served = start_tls(&tls, Certificate::new(&tls).unwrap(), PATIENCE).await;
        let (caller, certificate) = Caller::tls(served.address).await.unwrap();
        let names = String::from_utf8_lossy(&certificate).matches("localhost").count();
        assert!(names >= 2, "common name and subject alternative name, found {names}");
        let mut exchange = Exchange::open(caller, served.address).await;
        exchange.echo(vec![7; 100_000].into()).await;
        exchange.finish().await;
        // Plaintext is no TLS.
        let mut plain = TcpStream::connect(served.address).await.unwrap();
        plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let failed = served.metrics.failed.clone();
        eventually("it is counted", || failed.get() == 1).await;
        served.end().await;
    });
}

/// Writes a new self-signed pair and returns its certificate.
fn write_pair(directory: &Path) -> CertificateDer<'static> {
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(directory.join("tls.crt"), pair.cert.pem()).unwrap();
    fs::write(directory.join("tls.key"), pair.signing_key.serialize_pem()).unwrap();
    pair.cert.der().clone()
}

#[test]
fn a_changed_certificate_is_taken_over_and_a_bad_one_is_not() {
    on_thread(async {
        let directory = tempfile::tempdir().unwrap();
        let first = write_pair(directory.path());
        let tls =
            TlsOptions { cert_path: Some(directory.path().to_owned()), ..TlsOptions::default() };
        let certificate = Certificate::new(&tls).unwrap();
        let reloads = EppMetrics::unregistered().reloads();
        let served = start_tls(&tls, certificate.clone(), PATIENCE).await;
        let follow = certificate.follow(reloads.clone(), served.stop.clone());
        let follow = tokio::task::spawn_local(follow);
        let address = served.address;
        let shown = || async move { Caller::tls(address).await.unwrap().1 };
        assert_eq!(shown().await, first);

        let second = write_pair(directory.path());
        eventually("the second is loaded", || reloads.loaded.get() >= 1).await;
        assert_eq!(shown().await, second);

        fs::write(directory.path().join("tls.key"), "no key").unwrap();
        let before = reloads.failed.get();
        eventually("the bad one is noticed", || reloads.failed.get() > before).await;
        assert_eq!(shown().await, second);
        fs::remove_file(directory.path().join("tls.crt")).unwrap();
        eventually("the lack is noticed", || reloads.failed.get() > before + 1).await;
        assert_eq!(shown().await, second);

        let third = write_pair(directory.path());
        let before = reloads.loaded.get();
        eventually("the third is loaded", || reloads.loaded.get() > before).await;
        assert_eq!(shown().await, third);
        served.end().await;
        follow.await.unwrap().unwrap();
    });
}

#[test]
fn bad_certificates_are_named_at_start() {
    #[track_caller]
    fn check(crt: &str, key: &str, want: &str) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("tls.crt"), crt).unwrap();
        fs::write(directory.path().join("tls.key"), key).unwrap();
        let cert_path = Some(directory.path().to_owned());
        let error = Certificate::new(&TlsOptions { cert_path, ..TlsOptions::default() });
        let error = error.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let pair = || {
        let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        (pair.cert.pem(), pair.signing_key.serialize_pem())
    };
    let ((crt, key), (_, other)) = (pair(), pair());
    check("", &key, "tls.crt holds no certificate");
    check("nonsense", &key, "tls.crt holds no certificate");
    check(&crt, "", "tls.key holds no private key");
    check(&crt, &other, "cannot be used");
    let cert_path = Some("/does/not/exist".into());
    let error = Certificate::new(&TlsOptions { cert_path, ..TlsOptions::default() }).unwrap_err();
    assert!(matches!(error, TlsError::Read { .. }), "{error}");
}

#[test]
fn any_choice_of_versions_and_cipher_suites_can_be_served() {
    for min_version in [TlsVersion::Older, TlsVersion::Tls12, TlsVersion::Tls13] {
        for suites in ["", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256"] {
            let cipher_suites = cipher_suites(suites).unwrap().usable;
            let options = TlsOptions { min_version, cipher_suites, ..TlsOptions::default() };
            server_config(&options, Certificate::new(&options).unwrap()).unwrap();
        }
    }
}

#[test]
fn pages_show_endpoints_and_explain_what_is_not_there() {
    use crate::{
        epp::datalayer::{EndpointInfo, EndpointName, Endpoints, Metrics},
        support::admin,
    };
    on_thread(async {
        let endpoints = Arc::new(Endpoints::new());
        endpoints.upsert(EndpointInfo {
            name: EndpointName { namespace: "ns".into(), name: "pod-a".into() },
            address: "10.0.0.1:8000".parse().unwrap(),
            metrics_address: "10.0.0.1:8000".parse().unwrap(),
            labels: [("llm-d.ai/role".to_owned(), "decode".to_owned())].into(),
        });
        endpoints.list()[0].set_metrics(Metrics {
            waiting: 3,
            updated: Some(std::time::Instant::now()),
            ..Metrics::default()
        });
        let config = serde_json::json!({"plugins": ["x"]});
        let routes = super::admin::debug_routes(endpoints, &config, PATIENCE);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let serving = admin::serve(listener, routes, admin::Limits::default(), stop.clone());
        let serving = tokio::task::spawn_local(serving);
        let get = async |path: &str| {
            let mut peer = TcpStream::connect(address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            peer.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            timeout(PATIENCE, peer.read_to_string(&mut answer)).await.unwrap().unwrap();
            answer
        };
        let page = get("/debug/endpoints").await;
        for part in ["\"ns/pod-a\"", "\"waiting\": 3", "\"stale\": false", "\"decode\""] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert!(get("/debug/config").await.contains("plugins"));
        let pprof = get("/debug/pprof/heap").await;
        assert!(pprof.starts_with("HTTP/1.1 404") && pprof.contains("not built"), "{pprof}");
        stop.cancel();
        serving.await.unwrap().unwrap();
    });
}
