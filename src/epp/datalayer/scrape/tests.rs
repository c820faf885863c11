use std::sync::atomic::AtomicUsize;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::epp::datalayer::{EndpointInfo, discovery::StaticList};

const LONG_PAGE: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/metrics/vllm-100k.prom"));

fn page(waiting: u64) -> String {
    format!(
        "vllm:num_requests_waiting {waiting}\nvllm:num_requests_running 1\n\
         vllm:kv_cache_usage_perc 0.5\nvllm:cache_config_info{{block_size=\"16\"}} 1\n"
    )
}

/// What a server does with a request.
#[derive(Clone, Debug)]
enum Reply {
    /// A page, with its length.
    Page(String),
    /// A page in HTTP chunks.
    Chunked(String),
    /// A page, and then the connection is closed without a word.
    PageAndClose(String),
    /// A page that counts requests.
    Counting,
    Raw(Vec<u8>),
    Hang,
}

/// A server that speaks just enough HTTP.
struct Server {
    address: SocketAddr,
    reply: Mutex<Reply>,
    connections: AtomicUsize,
    open: AtomicUsize,
    requests: AtomicUsize,
    last: Mutex<String>,
}

impl Server {
    async fn start(tasks: &mut JoinSet<()>, reply: Reply) -> Arc<Self> {
        Self::start_with(tasks, reply, None).await
    }

    async fn start_with(
        tasks: &mut JoinSet<()>,
        reply: Reply,
        tls: Option<tokio_rustls::TlsAcceptor>,
    ) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            reply: Mutex::new(reply),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            last: Mutex::default(),
        });
        tasks.spawn(Arc::clone(&server).accept(listener, tls));
        server
    }

    async fn accept(self: Arc<Self>, on: TcpListener, tls: Option<tokio_rustls::TlsAcceptor>) {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = on.accept().await {
            self.connections.fetch_add(1, Ordering::SeqCst);
            let (server, tls) = (Arc::clone(&self), tls.clone());
            connections.spawn(async move {
                server.open.fetch_add(1, Ordering::SeqCst);
                match tls {
                    None => server.serve(stream).await,
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            server.serve(stream).await;
                        }
                    }
                }
                server.open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }

    /// One connection, until it is closed.
    async fn serve(&self, mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin) {
        let mut head = Vec::new();
        loop {
            head.clear();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => return,
                }
            }
            *lock(&self.last) = String::from_utf8(head.clone()).unwrap();
            let number = self.requests.fetch_add(1, Ordering::SeqCst) + 1;
            let sized = |page: &str| {
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{page}", page.len())
            };
            let reply = lock(&self.reply).clone();
            let text = match &reply {
                Reply::Page(page) | Reply::PageAndClose(page) => sized(page).into_bytes(),
                Reply::Counting => sized(&page(number as u64)).into_bytes(),
                Reply::Chunked(page) => {
                    let mut text =
                        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
                    for chunk in page.as_bytes().chunks(1000) {
                        text.extend(format!("{:x}\r\n", chunk.len()).as_bytes());
                        text.extend(chunk);
                        text.extend(b"\r\n");
                    }
                    text.extend(b"0\r\n\r\n");
                    text
                }
                Reply::Raw(text) => text.clone(),
                Reply::Hang => std::future::pending().await,
            };
            if stream.write_all(&text).await.is_err() || matches!(reply, Reply::PageAndClose(_)) {
                return;
            }
        }
    }

    fn say(&self, reply: Reply) {
        *lock(&self.reply) = reply;
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// A scraper of one endpoint.
struct Running {
    scraper: Arc<Scraper>,
    endpoints: Arc<Endpoints>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

const FAST: Duration = Duration::from_millis(2);

fn fast() -> ScrapeConfig {
    ScrapeConfig { floor: FAST, ceiling: 5 * FAST, timeout: 100 * FAST, ..ScrapeConfig::default() }
}

/// An endpoint that is named as its address.
fn info(address: SocketAddr) -> EndpointInfo {
    StaticList::parse(&format!("{address}={address}")).unwrap()
}

fn start(config: ScrapeConfig, addresses: &[SocketAddr]) -> Running {
    let scraper = Arc::new(Scraper::new(config, Engines::default()).unwrap());
    let endpoints = Arc::new(Endpoints::new());
    for address in addresses {
        endpoints.upsert(info(*address));
    }
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&scraper).run(Arc::clone(&endpoints), stop.clone()));
    Running { scraper, endpoints, stop, tasks }
}

impl Running {
    fn metrics(&self) -> Arc<Metrics> {
        self.endpoints.list()[0].metrics()
    }

    fn errors(&self, reason: &str) -> u64 {
        let mut errors = self.scraper.stats().poll_errors();
        errors.find_map(|(name, count)| (name == reason).then_some(count)).unwrap()
    }

    fn all_errors(&self) -> u64 {
        self.scraper.stats().poll_errors().map(|(_, count)| count).sum()
    }

    async fn stop(mut self) {
        self.stop.cancel();
        self.tasks.join_next().await.unwrap().unwrap();
    }
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    async move {
        while !holds() {
            assert!(Instant::now() < deadline, "still not: {what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn pages_come_over_one_connection_and_are_published() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks, Reply::Page(LONG_PAGE.to_owned())).await;
    let running = start(fast(), &[server.address]);
    assert!(!running.metrics().is_known());
    eventually("pages", || server.requests() > 5).await;
    server.say(Reply::Chunked(LONG_PAGE.replace("waiting{engine", "waiting{a=\"b\",engine")));
    let before = server.requests();
    eventually("chunked pages", || server.requests() > before + 5).await;
    let metrics = running.metrics();
    assert!(metrics.is_known() && metrics.age(Instant::now()).unwrap() < Duration::from_secs(30));
    assert_eq!((metrics.waiting, metrics.running, metrics.kv_usage), (3, 17, 0.4375));
    assert_eq!((metrics.cache_block_tokens, metrics.cache_blocks), (16, 27_487));
    assert_eq!(metrics.lora.active, ["sql"]);
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
    let stats = running.scraper.stats();
    assert_eq!((stats.connections(), running.all_errors(), stats.extract_errors()), (1, 0, 0));
    assert!(stats.bytes() >= 10 * LONG_PAGE.len() as u64 && !stats.total_time().is_zero());
    let last = lock(&server.last).clone();
    assert!(last.starts_with("GET /metrics HTTP/1.1\r\nhost: 127.0.0.1:"), "{last}");
    running.stop().await;
    eventually("the connection is closed", || server.open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn the_page_may_be_elsewhere() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks, Reply::Page(page(4))).await;
    let (path, port) = ("/m?name[]=a".to_owned(), Some(server.address.port()));
    let config = ScrapeConfig { path, port, ..fast() };
    let running = start(config, &[SocketAddr::new(server.address.ip(), 1)]);
    eventually("metrics", || running.metrics().waiting == 4).await;
    let last = lock(&server.last).clone();
    assert!(last.starts_with("GET /m?name[]=a HTTP/1.1\r\n"), "{last}");
    for path in ["metrics", "", "/a b"] {
        let config = ScrapeConfig { path: path.to_owned(), ..fast() };
        assert!(matches!(Scraper::new(config, Engines::default()), Err(ScrapeError::Path(_))));
    }
    running.stop().await;
}

#[tokio::test]
async fn a_server_that_closes_connections_is_asked_on_new_ones() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks, Reply::PageAndClose(page(1))).await;
    let running = start(fast(), &[server.address]);
    eventually("pages", || server.requests() > 20).await;
    assert_eq!(running.all_errors(), 0);
    assert!(server.connections.load(Ordering::SeqCst) > 20);
    running.stop().await;
}

#[tokio::test]
async fn faults_are_counted_and_the_last_values_stay() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks, Reply::Page(page(5))).await;
    let running = start(ScrapeConfig { timeout: 50 * FAST, ..fast() }, &[server.address]);
    eventually("metrics", || running.metrics().is_known()).await;
    let raw = |text: &str| Reply::Raw(text.as_bytes().to_vec());
    let cut = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nvllm:num_requests_waiting 9\n";
    let mut huge = b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\n".to_vec();
    huge.resize(9_000_000, b'\n');
    for (reason, reply) in [
        ("status", raw("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")),
        ("status", raw("HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n")),
        ("http", raw("\x00\x01garbage\r\n\r\n")),
        ("timeout", Reply::Hang),
        ("timeout", raw(cut)),
        ("too_long", Reply::Raw(huge)),
    ] {
        let before = running.errors(reason);
        server.say(reply);
        eventually(reason, || running.errors(reason) > before + 1).await;
        assert_eq!(running.metrics().waiting, 5);
        // It comes back by itself.
        let updated = running.metrics().updated;
        server.say(Reply::Page(page(5)));
        eventually("recovery", || running.metrics().updated > updated).await;
    }
    // Something that is no metrics page: nothing is new.
    let before = running.scraper.stats().extract_errors();
    server.say(Reply::Page("<html>\n</html>".to_owned()));
    eventually("extract", || running.scraper.stats().extract_errors() > before + 2).await;
    let updated = running.metrics().updated;
    let requests = server.requests();
    eventually("more", || server.requests() > requests + 2).await;
    assert_eq!((running.metrics().updated, running.metrics().waiting), (updated, 5));
    // A part of a page is taken.
    server.say(Reply::Page("vllm:num_requests_waiting 6\n".to_owned()));
    eventually("a part", || running.metrics().waiting == 6).await;
    assert_eq!(running.metrics().running, 1);
    running.stop().await;
}

#[tokio::test]
async fn a_page_without_end_is_given_up() {
    let mut tasks = JoinSet::new();
    let mut endless = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    endless.resize(9_000_000, b'\n');
    let server = Server::start(&mut tasks, Reply::Raw(endless)).await;
    let config = ScrapeConfig { timeout: Duration::from_secs(30), ..fast() };
    let running = start(config, &[server.address]);
    eventually("given up", || running.errors("too_long") > 0).await;
    assert!(!running.metrics().is_known());
    running.stop().await;
}

#[tokio::test]
async fn a_server_may_be_started_again() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks, Reply::Page(page(1))).await;
    let running = start(fast(), &[server.address]);
    eventually("metrics", || running.metrics().waiting == 1).await;
    tasks.shutdown().await;
    eventually("refused", || running.errors("connect") > 1).await;
    assert!(running.metrics().is_known());
    let listener = TcpListener::bind(server.address).await.unwrap();
    server.say(Reply::Page(page(2)));
    tasks.spawn(Arc::clone(&server).accept(listener, None));
    eventually("metrics are back", || running.metrics().waiting == 2).await;
    running.stop().await;
}

#[tokio::test]
async fn endpoints_come_and_go() {
    let mut tasks = JoinSet::new();
    let first = Server::start(&mut tasks, Reply::Page(page(1))).await;
    let second = Server::start(&mut tasks, Reply::Page(page(2))).await;
    let running = start(fast(), &[first.address]);
    eventually("the first", || running.metrics().is_known()).await;
    running.endpoints.upsert(info(second.address));
    eventually("the second", || second.requests() > 3).await;
    let list = running.endpoints.list();
    let gone = list.iter().find(|endpoint| endpoint.info().address == first.address).unwrap();
    running.endpoints.remove(&gone.info().name);
    eventually("closed", || first.open.load(Ordering::SeqCst) == 0).await;
    let (asked, before) = (first.requests(), second.requests());
    eventually("the second goes on", || second.requests() > before + 3).await;
    assert_eq!(first.requests(), asked);
    assert_eq!(lock(&running.scraper.targets).len(), 1);
    running.stop().await;
    eventually("all closed", || second.open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn without_requests_the_pace_slows_and_the_first_one_wakes_it() {
    let mut tasks = JoinSet::new();
    let server = Server::start(&mut tasks, Reply::Counting).await;
    let config = ScrapeConfig {
        floor: Duration::from_millis(1),
        ceiling: Duration::from_secs(3600),
        ..ScrapeConfig::default()
    };
    let running = start(config, &[server.address]);
    let start = Instant::now();
    // 1, 2, 4, … ms: at the eleventh, two seconds and more have passed, and the next is as far away.
    eventually("slow", || server.requests() >= 11).await;
    assert!(start.elapsed() >= Duration::from_millis(2000), "{:?}", start.elapsed());
    let woken = Instant::now();
    running.scraper.touch();
    eventually("woken", || server.requests() > 11).await;
    assert!(woken.elapsed() < Duration::from_secs(2), "{:?}", woken.elapsed());
    // Under traffic there is no slowing down.
    let before = server.requests();
    let start = Instant::now();
    eventually("fast", || {
        running.scraper.touch();
        server.requests() > before + 100
    })
    .await;
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(running.scraper.stats().connections(), 1);
    running.stop().await;
}

#[tokio::test]
async fn pages_come_over_tls() {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let other = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name)
    };
    let (good, bad) = (write("good", made.cert.pem()), write("bad", other.cert.pem()));
    let key = write("key", other.signing_key.serialize_pem());
    let key_der =
        tokio_rustls::rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der())
            .unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let server = tokio_rustls::rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key_der)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    let mut tasks = JoinSet::new();
    let reply = Reply::Page(LONG_PAGE.to_owned());
    let server = Server::start_with(&mut tasks, reply, Some(acceptor)).await;
    let tls = |ca: Option<&std::path::PathBuf>, client| ScrapeConfig {
        tls: Some(TlsConfig { ca: ca.cloned(), client }),
        timeout: Duration::from_secs(10),
        ..fast()
    };
    for config in [tls(None, None), tls(Some(&good), Some((bad.clone(), key.clone())))] {
        let running = start(config, &[server.address]);
        eventually("metrics", || running.metrics().waiting == 3).await;
        assert_eq!(running.all_errors(), 0);
        running.stop().await;
    }
    let running = start(tls(Some(&bad), None), &[server.address]);
    eventually("refused", || running.errors("connect") > 0).await;
    assert!(!running.metrics().is_known());
    running.stop().await;
    for (ca, client) in
        [(&key, None), (&dir.path().join("none"), None), (&good, Some((key.clone(), key.clone())))]
    {
        let made = Scraper::new(tls(Some(ca), client), Engines::default());
        assert!(matches!(made, Err(ScrapeError::Tls(_))), "{ca:?}");
    }
}

#[test]
fn a_thread_of_its_own_stops_when_told() {
    let scraper = Arc::new(Scraper::new(fast(), Engines::default()).unwrap());
    assert_eq!(scraper.longest_interval(), 5 * FAST);
    let stop = CancellationToken::new();
    stop.cancel();
    scraper.run_blocking(Arc::new(Endpoints::new()), stop).unwrap();
}

#[tokio::test]
async fn no_pick_is_slept_through() {
    let activity = Activity::default();
    let seen = activity.picks();
    activity.touch();
    // It came before the sleep.
    activity.sleep(seen).await;
    let seen = activity.picks();
    let pick = async {
        tokio::task::yield_now().await;
        activity.touch();
    };
    tokio::join!(activity.sleep(seen), activity.sleep(seen), pick);
}

#[test]
fn neighbours_are_spread_over_the_interval() {
    let mut turns: Vec<f64> = (0..64).map(|id| spread(EndpointId(id))).collect();
    turns.sort_by(f64::total_cmp);
    let widest = turns.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
    assert!((0.0..1.0).contains(&turns[0]) && turns[63] < 1.0 && widest < 2.0 / 64.0, "{widest}");
}
