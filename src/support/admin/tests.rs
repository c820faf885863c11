use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpSocket,
};

use super::*;
use crate::support::task::Readiness;

const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    address: SocketAddr,
    readiness: Readiness,
    stop: CancellationToken,
    task: JoinSet<io::Result<()>>,
}

async fn start(limits: Limits) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let registry = metrics::registry().unwrap();
    metrics::build_info(&registry, "kv_build_info", "9.9.9", &[]).unwrap();
    let readiness = Readiness::default();
    let check = readiness.clone();
    let routes = Routes::new()
        .metrics(registry)
        .readiness(move || check.check())
        .config(&serde_json::json!({"drainMs": 5}))
        .page("/status", |uri| Page::html(format!("<p>{}", uri.query().unwrap_or_default())));
    let stop = CancellationToken::new();
    let mut task = JoinSet::new();
    task.spawn(serve(listener, routes, limits, stop.clone()));
    Server { address, readiness, stop, task }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn ask(&self, request: &str) -> String {
        let mut stream = self.connect().await;
        let head = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        rest(&mut stream).await
    }

    async fn end(mut self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.task.join_next()).await.unwrap();
        ended.unwrap().unwrap().unwrap();
        assert!(TcpStream::connect(self.address).await.is_err(), "still listening");
    }
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    text
}

#[track_caller]
fn check(answer: &str, status: u16, parts: &[&str]) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    for part in parts {
        assert!(answer.contains(part), "{part:?} is not in {answer}");
    }
}

#[tokio::test]
async fn pages_are_served() {
    let server = start(Limits::default()).await;
    let metrics = server.ask("GET /metrics").await;
    check(&metrics, 200, &["content-type: text/plain; version=0.0.4", "version=\"9.9.9\"} 1"]);
    check(&server.ask("GET /livez").await, 200, &["\r\n\r\nok\n"]);
    check(&server.ask("GET /config").await, 200, &["application/json", "\"drainMs\": 5"]);
    check(&server.ask("GET /status?a=b").await, 200, &["text/html", "<p>a=b"]);

    check(&server.ask("GET /readyz").await, 503, &["starting"]);
    server.readiness.set_ready();
    check(&server.ask("GET /readyz").await, 200, &["ok"]);
    server.readiness.drain();
    check(&server.ask("GET /readyz?verbose").await, 503, &["draining"]);
    check(&server.ask("GET /livez").await, 200, &["ok"]);
    server.end().await;
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let server = start(Limits::default()).await;
    check(&server.ask("GET /").await, 404, &["/livez", "/metrics"]);
    check(&server.ask("POST /nothing").await, 404, &[]);
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        check(&server.ask(&format!("{method} /config")).await, 405, &["allow: GET, HEAD"]);
    }
    let head = server.ask("HEAD /livez").await;
    check(&head, 200, &["content-length: 3"]);
    assert!(head.ends_with("\r\n\r\n"), "{head:?}");
    check(&server.ask("nonsense").await, 400, &[]);
    server.end().await;
}

#[tokio::test]
async fn one_address_does_not_keep_others_out() {
    let server = start(Limits { connections: 4, ..Limits::default() }).await;
    let dial = async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 2], 0))).unwrap();
        socket.connect(server.address).await.unwrap()
    };
    let (first, second, mut third) = (dial().await, dial().await, dial().await);
    let ended = tokio::time::timeout(PATIENCE, third.read(&mut [0; 9])).await.unwrap();
    assert_eq!(ended.unwrap_or(0), 0);
    check(&server.ask("GET /livez").await, 200, &["ok"]);
    drop((first, second));
    server.end().await;
}

#[tokio::test]
async fn connections_are_kept_bounded_and_timed() {
    let limits =
        Limits { connections: 1, header_timeout: Duration::from_millis(100), ..Limits::default() };
    let server = start(limits).await;
    let mut first = server.connect().await;
    let request = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut buffer = [0; 4096];
    for _ in 0..2 {
        first.write_all(request.as_bytes()).await.unwrap();
        let read = first.read(&mut buffer).await.unwrap();
        check(std::str::from_utf8(&buffer[..read]).unwrap(), 200, &["ok"]);
    }
    // The only slot is taken by an idle client until its time is up; then the next is served.
    check(&server.ask("GET /livez").await, 200, &["ok"]);
    assert_eq!(first.read(&mut buffer).await.unwrap_or(0), 0, "the idle one is still open");
    let mut slow = server.connect().await;
    slow.write_all(b"GET /livez HTTP/1.1\r\nHo").await.unwrap();
    rest(&mut slow).await;
    server.end().await;
}

#[tokio::test]
async fn a_stop_closes_idle_connections() {
    let server = start(Limits::default()).await;
    let mut idle = server.connect().await;
    idle.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut buffer = [0; 4096];
    assert!(idle.read(&mut buffer).await.unwrap() > 0);
    server.end().await;
    assert_eq!(idle.read(&mut buffer).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_stop_waits_only_so_long_for_a_stalled_peer() {
    let limits = Limits { stop_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = start(limits).await;
    let mut stalled = server.connect().await;
    stalled.write_all(b"GET /liv").await.unwrap();
    server.end().await;
}
