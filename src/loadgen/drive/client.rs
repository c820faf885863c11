//! One HTTP request, streamed and timed, over connections that are kept.
//!
//! # Concurrency
//!
//! A `Client` belongs to one thread. Its requests read into one buffer: nothing of it is kept between
//! two polls.
//!
//! # Failure
//!
//! A kept connection that turns out to be closed before anything of the answer came is replaced once by
//! a new one. Everything else ends the request, with a [`Failure`]; how long that takes is bounded by
//! whoever drops it.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io::{self, IoSlice},
    net::{SocketAddr, ToSocketAddrs as _},
    pin::Pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{self, Poll, ready},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use http::Uri;
use smallvec::SmallVec;
use tokio::{
    io::{AsyncRead as _, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::pki_types::ServerName};

use super::{
    Ended, Exchange, Failure,
    http::{Decoder, Head, Item},
    picker::{Picker, Routed},
    sse::{Events, Garbled, Said, Usage},
};
use crate::{
    loadgen::progress::Progress,
    support::tls::{ClientTls, client_config},
};

/// Idle connections to one address at most, per thread; more are closed.
const MAX_IDLE: usize = 1024;
/// Bytes that one read takes at most.
const READ_BYTES: usize = 64 << 10;
/// Slices of one write at most.
const MAX_SLICES: usize = 32;
/// Bytes of an answer in one piece at most.
const MAX_WHOLE_BYTES: usize = 16 << 20;
/// How long a connection may take to end an answer that has said that it is complete.
const TAIL: Duration = Duration::from_millis(250);
/// Names of pods that are remembered at most; what comes after them is forgotten.
const MAX_NAMES: usize = 4096;

/// What requests have in common apart from their bodies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpOptions {
    /// Whom `https` targets are trusted by.
    pub tls: ClientTls,
    /// Headers that every request has, beside those that it needs; such as `authorization`.
    pub headers: Vec<(String, String)>,
}

/// Nanoseconds since a start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock(pub(super) Instant);

impl Clock {
    pub(super) fn now(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A gateway's address, name and the path before ours.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub(super) address: SocketAddr,
    authority: String,
    base: String,
    /// For `https`.
    tls: Option<ServerName<'static>>,
}

impl Origin {
    /// Looks a URL's name up.
    pub(super) fn resolve(url: &str) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("{url:?} is no URL"))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => anyhow::bail!("{url:?} is neither http://host:port nor https://host:port"),
        };
        let authority = uri.authority().with_context(|| format!("{url:?} names no host"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let address = (host, port)
            .to_socket_addrs()
            .with_context(|| format!("looking up {host}"))?
            .next()
            .with_context(|| format!("{host} has no address"))?;
        let name = || {
            ServerName::try_from(host.to_owned())
                .with_context(|| format!("{host} in a certificate"))
        };
        Ok(Self {
            address,
            authority: authority.to_string(),
            base: uri.path().trim_end_matches('/').to_owned(),
            tls: tls.then(name).transpose()?,
        })
    }
}

/// A request on its way out.
#[derive(Debug)]
pub(super) struct Outgoing {
    id: String,
    head: Vec<u8>,
    body: Vec<Bytes>,
    /// Bytes of both that are written.
    written: usize,
}

impl Outgoing {
    fn len(&self) -> usize {
        self.head.len() + self.body.iter().map(Bytes::len).sum::<usize>()
    }

    /// What is left, as far as one write takes it.
    fn left(&self) -> SmallVec<[IoSlice<'_>; 8]> {
        let mut skip = self.written;
        let parts = std::iter::once(&self.head[..]).chain(self.body.iter().map(|part| &part[..]));
        parts
            .filter_map(|part| {
                let left = part.get(skip..);
                skip = skip.saturating_sub(part.len());
                left.filter(|left| !left.is_empty()).map(IoSlice::new)
            })
            .take(MAX_SLICES)
            .collect()
    }
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that is between two answers, or in one.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    /// Has it been used before?
    used: bool,
}

impl Connection {
    /// Did the other side close it, or send what nobody asked for?
    fn is_stale(&self) -> bool {
        let tcp = match &self.stream {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => tls.get_ref().0,
        };
        // What TLS sends between answers, such as tickets, is no fault, but a new connection is cheap.
        !matches!(tcp.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Writes at once what the socket takes; the rest is left to [`Client::exchange`].
    pub(super) fn write_now(&self, out: &mut Outgoing) {
        let Stream::Plain(tcp) = &self.stream else { return };
        while out.written < out.len() {
            let Ok(written) = tcp.try_write_vectored(&out.left()) else { return };
            out.written += written;
        }
    }

    fn poll_write(
        &mut self,
        context: &mut task::Context<'_>,
        out: &mut Outgoing,
    ) -> Poll<io::Result<()>> {
        fn write<S: AsyncWrite + Unpin>(
            stream: &mut S,
            context: &mut task::Context<'_>,
            out: &mut Outgoing,
        ) -> Poll<io::Result<()>> {
            while out.written < out.len() {
                let written =
                    ready!(Pin::new(&mut *stream).poll_write_vectored(context, &out.left()))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                out.written += written;
            }
            Pin::new(stream).poll_flush(context)
        }
        match &mut self.stream {
            Stream::Plain(stream) => write(stream, context, out),
            Stream::Tls(stream) => write(&mut **stream, context, out),
        }
    }

    fn poll_read(
        &mut self,
        context: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(&mut **stream).poll_read(context, buffer),
        }
    }
}

/// What a request has seen so far; the thread keeps one end, so that nothing is lost when it is cut.
#[derive(Debug)]
pub(super) struct Notes {
    pub(super) exchange: Exchange,
    /// Gaps between pieces with content, nanoseconds.
    pub(super) gaps: Vec<u64>,
}

impl Notes {
    /// Notes pieces with content that came at once.
    fn pieces(&mut self, count: u32, now: u64, progress: &Progress) {
        let exchange = &mut self.exchange;
        if exchange.first_token_ns.is_none() {
            exchange.first_token_ns = Some(now);
            progress.first_token(now.saturating_sub(exchange.intended_ns));
        } else if let Some(last) = exchange.last_token_ns {
            self.gaps.push(now - last);
        }
        // Those behind the first came with it.
        self.gaps.extend((1..count).map(|_| 0));
        exchange.last_token_ns = Some(now);
        exchange.pieces += count;
        progress.tokens.fetch_add(count.into(), Relaxed);
    }

    fn usage(&mut self, usage: Usage) {
        let exchange = &mut self.exchange;
        exchange.prompt_tokens = usage.prompt_tokens.or(exchange.prompt_tokens);
        exchange.cached_tokens = usage.cached_tokens.or(exchange.cached_tokens);
        exchange.output_tokens = usage.completion_tokens.unwrap_or(exchange.output_tokens);
    }

    /// Notes the end, once.
    pub(super) fn end(&mut self, ended: Ended, now: u64) {
        let exchange = &mut self.exchange;
        exchange.ended = ended;
        exchange.ended_ns = now;
        if exchange.output_tokens == 0 {
            exchange.output_tokens = exchange.pieces;
        }
    }
}

/// Connections of one thread, and what their requests have in common.
pub(super) struct Client {
    idle: RefCell<HashMap<SocketAddr, Vec<Connection>>>,
    buffer: RefCell<Vec<u8>>,
    names: RefCell<HashMap<String, Arc<str>>>,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    /// The gateway's; `None` = the pod's address is its name.
    authority: Option<String>,
    /// The request line, and headers that are always the same.
    line: String,
    fixed: String,
    path: &'static str,
    ids: RefCell<fastrand::Rng>,
    picker: Option<Picker>,
    clock: Cell<Clock>,
    progress: Arc<Progress>,
}

/// What a client is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientOptions<'a> {
    pub(super) http: &'a HttpOptions,
    /// `None` = pods.
    pub(super) gateway: Option<&'a Origin>,
    pub(super) picker: Option<SocketAddr>,
    pub(super) path: &'static str,
    pub(super) progress: &'a Arc<Progress>,
}

impl Client {
    /// In the runtime that it will be used in.
    pub(super) fn new(options: ClientOptions<'_>) -> anyhow::Result<Self> {
        let ClientOptions { http, gateway, picker, path, progress } = options;
        let tls = match gateway.and_then(|origin| origin.tls.clone()) {
            Some(name) => {
                let config = client_config(&http.tls, &[b"http/1.1"])?;
                Some((TlsConnector::from(Arc::new(config)), name))
            }
            None => None,
        };
        let base = gateway.map_or("", |origin| &origin.base);
        let mut fixed = String::from(
            "content-type: application/json\r\naccept: text/event-stream, application/json\r\n\
             user-agent: loadgen\r\n",
        );
        for (name, value) in &http.headers {
            let whole = format!("{name}{value}");
            anyhow::ensure!(
                !name.is_empty() && !whole.contains(['\r', '\n']),
                "{name:?}: {value:?} is no header"
            );
            fixed.extend([name, ": ", value, "\r\n"]);
        }
        Ok(Self {
            idle: RefCell::default(),
            buffer: RefCell::new(vec![0; READ_BYTES]),
            names: RefCell::default(),
            tls,
            authority: gateway.map(|origin| origin.authority.clone()),
            line: format!("POST {base}{path} HTTP/1.1\r\nhost: "),
            fixed,
            path,
            ids: RefCell::default(),
            picker: picker.map(Picker::new).transpose()?,
            clock: Cell::new(Clock(Instant::now())),
            progress: Arc::clone(progress),
        })
    }

    /// Counts time from this start.
    pub(super) fn start(&self, clock: Clock) {
        self.clock.set(clock);
    }

    fn now(&self) -> u64 {
        self.clock.get().now()
    }

    /// A request with a head; without an address, the head waits for it.
    pub(super) fn outgoing(&self, body: Vec<Bytes>, to: Option<SocketAddr>) -> Outgoing {
        let (a, b) = {
            let mut ids = self.ids.borrow_mut();
            (ids.u64(..), ids.u64(..))
        };
        // As version 4 of RFC 9562 has it.
        let id = format!(
            "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
            a >> 32,
            a >> 16 & 0xffff,
            a & 0xfff,
            0x8000 | (b >> 48 & 0x3fff),
            b & 0xffff_ffff_ffff
        );
        let mut out = Outgoing { id, head: Vec::new(), body, written: 0 };
        if let Some(to) = to {
            self.write_head(&mut out, to);
        }
        out
    }

    fn write_head(&self, out: &mut Outgoing, to: SocketAddr) {
        let length: usize = out.body.iter().map(Bytes::len).sum();
        let pod;
        let authority = match &self.authority {
            Some(authority) => authority,
            None => {
                pod = to.to_string();
                &pod
            }
        };
        let mut head = String::with_capacity(self.line.len() + self.fixed.len() + 160);
        head.extend([&self.line, authority, "\r\nx-request-id: ", &out.id, "\r\n", &self.fixed]);
        head.extend(["content-length: ", &length.to_string(), "\r\n\r\n"]);
        out.head = head.into_bytes();
    }

    /// An idle connection.
    pub(super) fn take(&self, address: SocketAddr) -> Option<Connection> {
        let mut idle = self.idle.borrow_mut();
        let connections = idle.get_mut(&address)?;
        // The last one that was used is the least likely to have been closed.
        loop {
            let connection = connections.pop()?;
            if !connection.is_stale() {
                return Some(connection);
            }
        }
    }

    fn put(&self, address: SocketAddr, mut connection: Connection) {
        connection.used = true;
        let mut idle = self.idle.borrow_mut();
        let connections = idle.entry(address).or_default();
        if connections.len() < MAX_IDLE {
            connections.push(connection);
        }
    }

    /// Idle connections to an address.
    pub(super) fn idle(&self, address: SocketAddr) -> usize {
        self.idle.borrow().get(&address).map_or(0, Vec::len)
    }

    /// Opens a connection ahead; one that fails will fail again when it is needed.
    pub(super) async fn warm(&self, address: SocketAddr) {
        if let Ok(connection) = self.connect(address).await {
            self.put(address, connection);
        }
    }

    async fn connect(&self, address: SocketAddr) -> Result<Connection, Failure> {
        let tcp = TcpStream::connect(address).await.map_err(|_| Failure::Connect)?;
        tcp.set_nodelay(true).map_err(|_| Failure::Connect)?;
        let stream = match &self.tls {
            None => Stream::Plain(tcp),
            Some((connector, name)) => {
                let tls = connector.connect(name.clone(), tcp).await.map_err(|_| Failure::Tls)?;
                Stream::Tls(Box::new(tls))
            }
        };
        Ok(Connection { stream, used: false })
    }

    /// The remembered name of a pod.
    pub(super) fn name(&self, name: &str) -> Arc<str> {
        let mut names = self.names.borrow_mut();
        if let Some(known) = names.get(name) {
            return Arc::clone(known);
        }
        let new: Arc<str> = name.into();
        if names.len() < MAX_NAMES {
            names.insert(name.to_owned(), Arc::clone(&new));
        }
        new
    }

    /// Sends a request, unless `begun` is a connection that it is being written to, and follows its
    /// answer; all that it sees is in `notes`. With `to`, the endpoint picker is not asked.
    pub(super) async fn exchange(
        &self,
        notes: &RefCell<Notes>,
        mut out: Outgoing,
        to: Option<SocketAddr>,
        begun: Option<Connection>,
    ) {
        let mut routed = None;
        let outcome = self.talk(notes, &mut out, to, begun, &mut routed).await;
        {
            let mut notes = notes.borrow_mut();
            match outcome {
                // The end was noted when it was there.
                Ok(()) => {}
                Err(failure) => notes.end(Ended::Failed(failure), self.now()),
            }
        }
        if let Some(routed) = routed
            && outcome.is_ok()
        {
            let prediction = routed.end().await;
            notes.borrow_mut().exchange.predicted_tokens = prediction.predicted_tokens;
        }
    }

    async fn talk(
        &self,
        notes: &RefCell<Notes>,
        out: &mut Outgoing,
        to: Option<SocketAddr>,
        mut begun: Option<Connection>,
        routed: &mut Option<Routed>,
    ) -> Result<(), Failure> {
        let address = match (to, &self.picker) {
            (Some(to), _) => to,
            (None, None) => return Err(Failure::Picker),
            (None, Some(picker)) => {
                let there = picker.pick(self.path, &out.id, &out.body).await?;
                let pod = there.pod;
                *routed = Some(there);
                self.write_head(out, pod);
                let name = self.name(&pod.to_string());
                let exchange = &mut notes.borrow_mut().exchange;
                exchange.picked_ns = Some(self.now());
                exchange.pod = Some(name);
                pod
            }
        };
        let mut may_retry = true;
        loop {
            let kept = if may_retry { begun.take().or_else(|| self.take(address)) } else { None };
            let mut connection = match kept {
                Some(connection) => connection,
                None => self.connect(address).await?,
            };
            if out.written == 0 && routed.is_none() && may_retry {
                notes.borrow_mut().exchange.sent_ns = self.now();
            }
            let mut answer = Answer::new(self, notes, routed);
            match answer.follow(&mut connection, out).await {
                Ok(kept) => {
                    if kept {
                        self.put(address, connection);
                    }
                    return Ok(());
                }
                Err(Failure::Closed) if may_retry && connection.used && answer.is_fresh() => {
                    may_retry = false;
                    out.written = 0;
                }
                Err(failure) => return Err(failure),
            }
        }
    }
}

/// What kind of body an answer has.
enum Body {
    Events(Events),
    Whole(Vec<u8>),
    /// Of a status that says it all.
    Ignored,
}

/// One answer that is being read.
struct Answer<'a> {
    client: &'a Client,
    notes: &'a RefCell<Notes>,
    routed: &'a mut Option<Routed>,
    decoder: Decoder,
    head: Head,
    body: Body,
    /// Has it said that it is complete?
    done: bool,
}

/// How far an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    More,
    /// Complete, but for the end of its framing.
    Tail,
    End,
}

impl<'a> Answer<'a> {
    fn new(client: &'a Client, notes: &'a RefCell<Notes>, routed: &'a mut Option<Routed>) -> Self {
        let (decoder, head) = (Decoder::new(), Head::default());
        Self { client, notes, routed, decoder, head, body: Body::Ignored, done: false }
    }

    /// Has nothing of it come?
    fn is_fresh(&self) -> bool {
        self.decoder.is_fresh()
    }

    /// Writes what is left of the request and reads the answer. Returns whether the connection can be
    /// used again.
    async fn follow(
        &mut self,
        connection: &mut Connection,
        out: &mut Outgoing,
    ) -> Result<bool, Failure> {
        if out.written < out.len() || matches!(connection.stream, Stream::Tls(_)) {
            std::future::poll_fn(|context| connection.poll_write(context, out))
                .await
                .map_err(|_| Failure::Closed)?;
        }
        loop {
            match self.read(connection).await? {
                Step::More => {}
                Step::End => return Ok(self.head.keeps),
                Step::Tail => {
                    // Whoever waits for the answer has it; the connection may not be worth waiting for.
                    let tail = async {
                        while self.read(connection).await? == Step::Tail {}
                        Ok::<_, Failure>(())
                    };
                    let ended = tokio::time::timeout(TAIL, tail).await;
                    return Ok(matches!(ended, Ok(Ok(()))) && self.head.keeps);
                }
            }
        }
    }

    async fn read(&mut self, connection: &mut Connection) -> Result<Step, Failure> {
        std::future::poll_fn(|context| {
            let client = self.client;
            let mut buffer = client.buffer.borrow_mut();
            let mut buffer = ReadBuf::new(&mut buffer);
            let outcome = ready!(connection.poll_read(context, &mut buffer));
            Poll::Ready(match outcome {
                Ok(()) if buffer.filled().is_empty() => self.closed(),
                Ok(()) => self.feed(buffer.filled()),
                Err(_) => Err(Failure::Closed),
            })
        })
        .await
    }

    fn closed(&mut self) -> Result<Step, Failure> {
        self.head.keeps = false;
        if self.done {
            Ok(Step::End)
        } else if self.decoder.ends_with_connection() {
            self.body_ends()
        } else {
            Err(Failure::Closed)
        }
    }

    fn feed(&mut self, mut input: &[u8]) -> Result<Step, Failure> {
        loop {
            match self.decoder.next(&mut input).map_err(|_| Failure::Garbled)? {
                Item::More if self.done => return Ok(Step::Tail),
                Item::More => return Ok(Step::More),
                Item::Head(head) => self.head_is_there(head),
                Item::Data(data) => self.data(data)?,
                Item::End => {
                    // Bytes that nobody asked for.
                    self.head.keeps &= input.is_empty();
                    return if self.done { Ok(Step::End) } else { self.body_ends() };
                }
            }
        }
    }

    fn head_is_there(&mut self, head: Head) {
        if let Some(routed) = &mut *self.routed {
            routed.headers(head.status, &head.content_type);
        }
        if let Some(pod) = &head.pod {
            let exchange = &mut self.notes.borrow_mut().exchange;
            if exchange.pod.is_none() {
                exchange.pod = Some(self.client.name(pod));
            }
        }
        let is_stream = head.content_type.trim_start().starts_with("text/event-stream");
        self.body = match head.status {
            200..300 if is_stream => Body::Events(Events::default()),
            200..300 => Body::Whole(Vec::new()),
            _ => Body::Ignored,
        };
        self.head = head;
    }

    fn data(&mut self, data: &[u8]) -> Result<(), Failure> {
        if let Some(routed) = &mut *self.routed {
            routed.piece(&Bytes::copy_from_slice(data));
        }
        match &mut self.body {
            // What comes after the end mark is not ours to judge.
            _ if self.done => Ok(()),
            Body::Ignored => Ok(()),
            Body::Whole(whole) => {
                whole.extend_from_slice(data);
                if whole.len() > MAX_WHOLE_BYTES { Err(Failure::Garbled) } else { Ok(()) }
            }
            Body::Events(events) => {
                let (mut pieces, mut usage, mut error, mut done) = (0, None, false, false);
                let outcome = events.feed(data, |event| {
                    let said = Said::of(event)?;
                    pieces += u32::from(said.content);
                    usage = said.usage.or(usage);
                    error |= said.error;
                    done |= said.done;
                    Ok(())
                });
                let now = self.client.now();
                let mut notes = self.notes.borrow_mut();
                if pieces > 0 {
                    notes.pieces(pieces, now, &self.client.progress);
                }
                if let Some(usage) = usage {
                    notes.usage(usage);
                }
                if error {
                    return Err(Failure::Stream);
                }
                outcome.map_err(|Garbled| Failure::Garbled)?;
                if done {
                    self.done = true;
                    notes.end(Ended::Complete, now);
                }
                Ok(())
            }
        }
    }

    /// The body is there as a whole.
    fn body_ends(&mut self) -> Result<Step, Failure> {
        let now = self.client.now();
        let whole = match &self.body {
            Body::Ignored => return Err(Failure::Status(self.head.status)),
            // A stream without its end mark is not the whole answer, however well it is framed.
            Body::Events(_) => return Err(Failure::Closed),
            Body::Whole(whole) => Said::by_serde(whole).map_err(|Garbled| Failure::Garbled)?,
        };
        let mut notes = self.notes.borrow_mut();
        if let Some(usage) = whole.usage {
            notes.usage(usage);
        }
        if whole.error {
            return Err(Failure::Stream);
        }
        if whole.content {
            notes.pieces(1, now, &self.client.progress);
        }
        notes.end(Ended::Complete, now);
        self.done = true;
        Ok(Step::End)
    }
}

/// A request that is under way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) notes: Rc<RefCell<Notes>>,
    pub(super) abort: tokio::task::AbortHandle,
}
