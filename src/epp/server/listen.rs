//! TCP connections → HTTP/2 on threads of their own.
//!
//! # Model
//!
//! ```text
//! accept ──▶ the thread with the fewest connections ──▶ a task a connection ──▶ a task a stream
//! ```
//!
//! Every thread has a runtime of its own, so a stream never moves between cores, its messages wake
//! nobody on another core, and no queue is shared.
//!
//! # Bounds
//!
//! Connections beyond [`ServerOptions::connections`] are closed at once and counted; streams are
//! bounded for each connection. What a peer may have sent and we have not read is bounded by HTTP/2's
//! windows: 16 MiB for a connection.
//!
//! # Failure
//!
//! A failed `accept` (too many open files) is tried again after a pause. A fault of one connection or
//! stream ends that one.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::TcpStream as StdTcpStream,
    num::NonZeroUsize,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use http::{Request, Response};
use hyper::{body::Incoming, rt::Executor, server::conn::http2, service::Service};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{IntCounter, IntGauge};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

/// HTTP/2 window of a stream, in bytes: a body of a megabyte needs no round trip for its window.
const STREAM_WINDOW: u32 = 2 << 20;

/// HTTP/2 window of a connection, in bytes: what all its streams together may have sent and we have
/// not read. The h2 crate ends a connection whose unread DATA frames of less than 256 bytes waste
/// more than half of this at 256 bytes a frame; chunks of token streams are that small, and Envoy has
/// all streams of a thread on one connection, so the window is far larger than throughput needs.
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Largest DATA frame that peers may send, in bytes: a message of 62 000 bytes is one frame. Envoy
/// sends at most 16 KiB whatever we allow.
const FRAME: u32 = 64 << 10;

/// What of one stream's answers may wait for the socket, in bytes. One frame keeps it busy; bodies that
/// are sent back wait as the bytes they came in, not copied into frames.
const SEND_BUFFER: usize = 64 << 10;

/// Bytes of a call's HTTP/2 headers: those of gRPC alone. The headers of the HTTP request that Envoy
/// processes are in messages.
const HEADER_LIST: u32 = 32 << 10;

/// A connection silent for this long is pinged, and given up when the answer takes as long again: a
/// proxy that vanished without a FIN must not hold streams for ever.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Pause after a failed `accept`.
const PAUSE: Duration = Duration::from_millis(100);

/// What a client of HTTP/2 says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Pause after a part of [`PREFACE`].
const PEEK: Duration = Duration::from_millis(10);

/// Accepted connections that wait for their thread.
const HANDOVER: usize = 64;

/// What the server grants its clients.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Threads; 0 = the caller's runtime serves, for listeners with little to do.
    pub threads: usize,
    /// Connections at a time. Envoy opens one for each of its threads.
    pub connections: usize,
    /// Streams at a time on one connection; Envoy opens another connection beyond that. One stream
    /// is one HTTP request, from its headers to the end of its response.
    pub streams: u32,
    /// `None`: plaintext HTTP/2 with prior knowledge.
    pub tls: Option<Arc<ServerConfig>>,
    /// How long a peer may take to say anything, and to shake hands.
    pub handshake_timeout: Duration,
    /// How long a stop waits for streams before it drops them.
    pub drain: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            threads: thread::available_parallelism().map_or(1, NonZeroUsize::get),
            connections: 1024,
            streams: 1 << 16,
            tls: None,
            handshake_timeout: Duration::from_secs(10),
            drain: Duration::from_secs(30),
        }
    }
}

/// What is counted of connections. Clones share one state; [`default`](Self::default) counts unseen.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    /// Open connections.
    pub open: IntGauge,
    /// Accepted connections.
    pub accepted: IntCounter,
    /// Connections closed because there were too many.
    pub refused: IntCounter,
    /// Connections that ended before HTTP/2 began: no TLS, no HTTP/2, silence.
    pub failed: IntCounter,
}

impl Default for ConnectionMetrics {
    fn default() -> Self {
        crate::epp::metrics::unregistered_connections()
    }
}

/// A service that can answer every call on any thread.
pub trait Answers:
    Service<
        Request<Incoming>,
        Response = Response<tonic::body::Body>,
        Error = Infallible,
        Future: Send + 'static,
    > + Clone
    + Send
    + 'static
{
}

impl<S> Answers for S where
    S: Service<
            Request<Incoming>,
            Response = Response<tonic::body::Body>,
            Error = Infallible,
            Future: Send + 'static,
        > + Clone
        + Send
        + 'static
{
}

/// Serves `service` on `listener` until `stop`; then accepts nobody, tells clients to go away, and
/// waits for their streams for at most [`ServerOptions::drain`].
///
/// # Errors
///
/// When the system gives no thread or runtime, or one of the threads panicked.
pub async fn serve<S: Answers>(
    listener: TcpListener,
    options: ServerOptions,
    service: S,
    metrics: ConnectionMetrics,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    // Threads end also when this future is dropped.
    let stop = stop.child_token();
    let _stop = stop.clone().drop_guard();
    let serving = Serving {
        streams: options.streams,
        tls: options.tls.clone().map(TlsAcceptor::from),
        handshake_timeout: options.handshake_timeout,
        drain: options.drain,
        metrics: metrics.clone(),
        stop: stop.clone(),
    };
    let mut lanes = Vec::new();
    let mut ended = JoinSet::new();
    for index in 0..options.threads.max(1) {
        let (sender, receiver) = mpsc::channel(HANDOVER);
        lanes.push(Lane { sender, open: Arc::default() });
        let (serving, service) = (serving.clone(), service.clone());
        if options.threads == 0 {
            ended.spawn(async move {
                serving.run(receiver, service).await;
                Ok(())
            });
        } else {
            let end = start(index, serving, receiver, service)?;
            ended.spawn(async move { end.await.context("a thread of the server panicked") });
        }
    }
    let early = tokio::select! {
        biased;
        () = accept(&listener, &lanes, options.connections, &metrics, &stop) => None,
        early = ended.join_next() => early,
    };
    drop((listener, lanes));
    stop.cancel();
    early.transpose()?.transpose()?;
    while let Some(end) = ended.join_next().await {
        end??;
    }
    Ok(())
}

/// Starts a serving thread; the receiver hears when it is done.
fn start<S: Answers>(
    index: usize,
    serving: Serving,
    connections: mpsc::Receiver<Accepted>,
    service: S,
) -> io::Result<oneshot::Receiver<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (done, end) = oneshot::channel();
    thread::Builder::new().name(format!("ext-proc-{index}")).spawn(move || {
        runtime.block_on(serving.run(connections, service));
        // Whoever waited may be gone.
        done.send(()).unwrap_or_default();
    })?;
    Ok(end)
}

/// The way to one thread.
struct Lane {
    sender: mpsc::Sender<Accepted>,
    open: Arc<AtomicUsize>,
}

/// A connection on its way to a thread.
struct Accepted {
    stream: StdTcpStream,
    counted: Counted,
}

/// One open connection in all counts, until it is dropped.
struct Counted {
    of_lane: Arc<AtomicUsize>,
    open: IntGauge,
}

impl Counted {
    fn new(lane: &Lane, metrics: &ConnectionMetrics) -> Self {
        lane.open.fetch_add(1, Ordering::Relaxed);
        metrics.open.inc();
        metrics.accepted.inc();
        Self { of_lane: Arc::clone(&lane.open), open: metrics.open.clone() }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.of_lane.fetch_sub(1, Ordering::Relaxed);
        self.open.dec();
    }
}

/// Accepts connections and hands each to the thread with the fewest, until `stop`.
async fn accept(
    listener: &TcpListener,
    lanes: &[Lane],
    limit: usize,
    metrics: &ConnectionMetrics,
    stop: &CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "Accepting a connection failed.");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(PAUSE) => continue,
                }
            }
        };
        let open = |lane: &&Lane| lane.open.load(Ordering::Relaxed);
        if lanes.iter().map(|lane| open(&lane)).sum::<usize>() >= limit {
            metrics.refused.inc();
            debug!(%peer, limit, "A connection was closed: there are too many.");
            continue;
        }
        let Some(lane) = lanes.iter().min_by_key(open) else { return };
        let counted = Counted::new(lane, metrics);
        let handed = match stream.into_std() {
            Ok(stream) => lane.sender.try_send(Accepted { stream, counted }).is_ok(),
            Err(_) => false,
        };
        if !handed {
            // The thread is so far behind that the peer had better try elsewhere.
            metrics.refused.inc();
        }
    }
}

/// A connection that can begin with HTTP/2.
enum Opened {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What a thread needs to serve its connections.
#[derive(Clone)]
struct Serving {
    streams: u32,
    tls: Option<TlsAcceptor>,
    handshake_timeout: Duration,
    drain: Duration,
    metrics: ConnectionMetrics,
    stop: CancellationToken,
}

impl Serving {
    /// Serves the connections that come, until `stop`, then those that are left.
    async fn run<S: Answers>(self, mut accepted: mpsc::Receiver<Accepted>, service: S) {
        let streams = TaskTracker::new();
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                Some(ended) = connections.join_next() => log(ended),
                next = accepted.recv() => match next {
                    Some(Accepted { stream, counted }) => {
                        let (serving, service) = (self.clone(), service.clone());
                        let streams = streams.clone();
                        connections.spawn(async move {
                            serving.connection(stream, service, streams).await;
                            drop(counted);
                        });
                    }
                    None => break,
                },
            }
        }
        accepted.close();
        streams.close();
        let finished = async {
            while let Some(ended) = connections.join_next().await {
                log(ended);
            }
            streams.wait().await;
        };
        if timeout(self.drain, finished).await.is_err() {
            let (connections, streams) = (connections.len(), streams.len());
            warn!(connections, streams, "Streams that did not end were cut.");
        }
    }

    async fn connection<S: Answers>(self, stream: StdTcpStream, service: S, streams: TaskTracker) {
        let opened = async {
            let stream = TcpStream::from_std(stream)?;
            stream.set_nodelay(true)?;
            match &self.tls {
                None => {
                    preface(&stream).await?;
                    Ok::<_, io::Error>(Opened::Plain(stream))
                }
                Some(tls) => Ok(Opened::Tls(Box::new(tls.accept(stream).await?))),
            }
        };
        let opened = tokio::select! {
            biased;
            () = self.stop.cancelled() => return,
            opened = timeout(self.handshake_timeout, opened) => opened,
        };
        match opened {
            Ok(Ok(Opened::Plain(stream))) => self.http2(stream, service, streams).await,
            Ok(Ok(Opened::Tls(stream))) => self.http2(stream, service, streams).await,
            Ok(Err(error)) => {
                self.metrics.failed.inc();
                debug!(%error, "A connection ended before HTTP/2 began.");
            }
            Err(_) => {
                self.metrics.failed.inc();
                debug!("A connection was closed: its peer took too long to begin.");
            }
        }
    }

    async fn http2<S: Answers>(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
        service: S,
        streams: TaskTracker,
    ) {
        let connection = http2::Builder::new(OnThread(streams))
            .timer(TokioTimer::new())
            .auto_date_header(false)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEADER_LIST)
            .max_concurrent_streams(self.streams)
            // Envoy resets every stream whose HTTP request has a body, and many at once when its
            // clients go away. h2's limits of 20 and 1 024 (for the life of a connection) would take
            // all other streams down. What such a reset can cost us is bounded by `streams`.
            .max_pending_accept_reset_streams(self.streams as usize)
            .max_local_error_reset_streams(None)
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let result = tokio::select! {
            biased;
            result = connection.as_mut() => result,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            debug!(%error, "A connection ended.");
        }
    }
}

/// Waits until the peer has said that it speaks HTTP/2. Nothing is taken from the stream.
async fn preface(stream: &TcpStream) -> io::Result<()> {
    let mut seen = [0; PREFACE.len()];
    loop {
        let length = stream.peek(&mut seen).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if seen[..length] != PREFACE[..length] {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "this is not HTTP/2"));
        }
        if length == PREFACE.len() {
            return Ok(());
        }
        // A part of it is there, so the socket is readable: waiting for that would spin.
        tokio::time::sleep(PEEK).await;
    }
}

fn log(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        warn!(%error, "Serving a connection failed.");
    }
}

/// Runs the tasks of streams on the thread of their connection.
#[derive(Clone, Debug)]
struct OnThread(TaskTracker);

impl<F> Executor<F> for OnThread
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}
