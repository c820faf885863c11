//! How many connections there may be, and how much their callers may leave unfinished.
//!
//! # Model
//!
//! Two things are shared by all callers: connections, and bytes that wait for somebody (requests that
//! have begun and not ended, requests of a stream that are read and not answered, answers that are
//! not taken). Each address may have as much of either as is *left over*: one that takes all it can
//! get ends with half, two with a third each, and some is left for whoever comes next.
//!
//! A connection beyond that takes the place of the one of the same address that has had no call for
//! the longest; without such a one it is closed at once. A connection without a call for
//! [`Limits::idle`] is closed, too.
//!
//! # Concurrency
//!
//! Connections come and go under a lock; calls and bytes are atomic counters. The sums may exceed
//! the limit by what is asked for in the same instant.

use std::{
    collections::HashMap,
    future::Future as _,
    io,
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
    time::{Instant, Sleep},
};
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpIncoming};

use crate::{
    indexer::{ApiConfig, metrics::ServerMetrics},
    support::sync::lock,
};

/// What callers are granted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connections.
    pub(crate) connections: usize,
    /// A connection without a call for this long is closed.
    pub(crate) idle: Duration,
    /// Bytes that wait for a caller.
    pub(crate) pending_bytes: usize,
    /// How long a message may take from its first byte to its last.
    pub(crate) message: Duration,
}

impl From<&ApiConfig> for Limits {
    fn from(config: &ApiConfig) -> Self {
        Self {
            connections: config.max_connections.max(1),
            idle: config.idle_timeout,
            // Somebody alone gets half, which must be enough for a message.
            pending_bytes: config.max_pending_bytes.max(config.max_message_bytes.saturating_mul(2)),
            message: config.message_timeout,
        }
    }
}

/// What callers are refused for, beside the lack of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many connections as may be.
    Connections,
    /// A connection without a call made room for a new one.
    Displaced,
    /// A connection has had no call for too long.
    Idle,
    /// As many bytes wait as may.
    PendingBytes,
    /// A message took too long.
    MessageTimeout,
    /// A TLS handshake failed, or took too long.
    Handshake,
}

impl Refusal {
    /// All, in the order of their labels.
    pub(crate) const ALL: [Self; 6] = [
        Self::Connections,
        Self::Displaced,
        Self::Idle,
        Self::PendingBytes,
        Self::MessageTimeout,
        Self::Handshake,
    ];

    /// A word for metrics.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Displaced => "displaced",
            Self::Idle => "idle",
            Self::PendingBytes => "pending_bytes",
            Self::MessageTimeout => "message_timeout",
            Self::Handshake => "handshake",
        }
    }
}

/// See the module's documentation. Clones share everything.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    metrics: ServerMetrics,
    /// When the times of connections begin.
    began: Instant,
    pending: AtomicUsize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, Entry>,
    peers: HashMap<IpAddr, Arc<Peer>>,
}

#[derive(Debug)]
struct Entry {
    caller: Caller,
    /// Dropped to close the connection.
    _open: oneshot::Sender<()>,
}

/// Everybody at one address.
#[derive(Debug)]
struct Peer {
    address: IpAddr,
    /// Changed under the lock only.
    connections: AtomicUsize,
    pending: AtomicUsize,
}

/// Whoever is at the other end of a connection. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Caller(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    number: u64,
    gate: Gate,
    peer: Arc<Peer>,
    calls: AtomicUsize,
    /// When the last call began or ended, milliseconds.
    last: AtomicU64,
}

impl Gate {
    pub(crate) fn new(limits: Limits, metrics: ServerMetrics) -> Self {
        let (pending, open) = (AtomicUsize::new(0), Mutex::default());
        Self(Arc::new(Shared { limits, metrics, began: Instant::now(), pending, open }))
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub(crate) fn refused(&self, refusal: Refusal) {
        self.0.metrics.refused(refusal.reason());
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Lets a connection in, or drops it.
    fn admit(&self, io: TcpStream) -> Option<Admitted> {
        // A peer without an address is gone already.
        let address = io.peer_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.ip());
        let (lease, closed) = self.lease(address.to_canonical())?;
        let idle = Box::pin(tokio::time::sleep(self.0.limits.idle));
        Some(Admitted { io, lease, closed, idle })
    }

    /// Somebody without a connection.
    #[cfg(test)]
    pub(super) fn caller(&self) -> Caller {
        self.lease(Ipv4Addr::LOCALHOST.into()).map(|(lease, _)| lease.0.clone()).unwrap()
    }

    fn lease(&self, address: IpAddr) -> Option<(Lease, oneshot::Receiver<()>)> {
        let limit = self.0.limits.connections;
        let mut open = lock(&self.0.open);
        let of_peer = |open: &Open| {
            open.peers.get(&address).map_or(0, |peer| peer.connections.load(Ordering::Relaxed))
        };
        let full = |open: &Open| of_peer(open) >= limit.saturating_sub(open.connections.len());
        if full(&open) {
            let idle = open
                .connections
                .values()
                .filter(|entry| entry.caller.0.peer.address == address && entry.caller.is_idle());
            let Some(longest) = idle.min_by_key(|entry| entry.caller.last()) else {
                drop(open);
                self.refused(Refusal::Connections);
                return None;
            };
            let number = longest.caller.0.number;
            self.refused(Refusal::Displaced);
            close(&mut open, number);
        }
        let peer = open.peers.entry(address).or_insert_with(|| {
            let (connections, pending) = (AtomicUsize::new(0), AtomicUsize::new(0));
            Arc::new(Peer { address, connections, pending })
        });
        peer.connections.fetch_add(1, Ordering::Relaxed);
        let peer = Arc::clone(peer);
        let number = open.next;
        open.next += 1;
        let caller = Caller(Arc::new(Connection {
            number,
            gate: self.clone(),
            peer,
            calls: AtomicUsize::new(0),
            last: AtomicU64::new(self.millis()),
        }));
        let (sender, closed) = oneshot::channel();
        open.connections.insert(number, Entry { caller: caller.clone(), _open: sender });
        self.0.metrics.connections.set(i64::try_from(open.connections.len()).unwrap_or(i64::MAX));
        Some((Lease(caller), closed))
    }
}

/// Forgets a connection, which thereby closes.
fn close(open: &mut Open, number: u64) {
    let Some(Entry { caller, .. }) = open.connections.remove(&number) else { return };
    let peer = &caller.0.peer;
    if peer.connections.fetch_sub(1, Ordering::Relaxed) == 1 {
        // What it still owes keeps it alive, and counts in the sum.
        open.peers.remove(&peer.address);
    }
}

impl Caller {
    fn is_idle(&self) -> bool {
        self.0.calls.load(Ordering::Relaxed) == 0
    }

    fn last(&self) -> u64 {
        self.0.last.load(Ordering::Relaxed)
    }

    /// How long there has been no call.
    fn idle(&self) -> Duration {
        let idle =
            if self.is_idle() { self.0.gate.millis().saturating_sub(self.last()) } else { 0 };
        Duration::from_millis(idle)
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// A call begins; it ends when the value is dropped.
    pub(crate) fn call(&self) -> Call {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        self.0.last.store(self.0.gate.millis(), Ordering::Relaxed);
        Call(self.clone())
    }

    /// Nothing yet that waits for this caller.
    pub(crate) fn charge(&self) -> Charge {
        Charge { caller: self.clone(), bytes: 0 }
    }
}

/// A call under way.
#[derive(Debug)]
pub(crate) struct Call(Caller);

impl Drop for Call {
    fn drop(&mut self) {
        let connection = &self.0.0;
        connection.last.store(connection.gate.millis(), Ordering::Relaxed);
        connection.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Bytes that wait for a caller, until it is dropped.
#[derive(Debug)]
pub(crate) struct Charge {
    caller: Caller,
    bytes: usize,
}

impl Charge {
    /// It is so many bytes now; `false`, and counted, if that is more than the caller may have.
    #[must_use]
    pub(crate) fn set(&mut self, bytes: usize) -> bool {
        if bytes <= self.bytes {
            self.shrink(bytes);
            return true;
        }
        let (all, own) = (&self.caller.0.gate.0.pending, &self.caller.0.peer.pending);
        let more = bytes - self.bytes;
        let all_now = all.fetch_add(more, Ordering::Relaxed) + more;
        let own_now = own.fetch_add(more, Ordering::Relaxed) + more;
        self.bytes = bytes;
        let left = self.caller.0.gate.0.limits.pending_bytes.saturating_sub(all_now);
        let fits = own_now <= left.max(FREE);
        if !fits {
            self.caller.gate().refused(Refusal::PendingBytes);
        }
        fits
    }

    /// It is so many bytes now, which are not more than before.
    fn shrink(&mut self, bytes: usize) {
        let less = self.bytes - bytes;
        if less > 0 {
            self.caller.0.gate.0.pending.fetch_sub(less, Ordering::Relaxed);
            self.caller.0.peer.pending.fetch_sub(less, Ordering::Relaxed);
        }
        self.bytes = bytes;
    }
}

/// What an address may have even in a full house, bytes: a prompt of some thousand tokens.
const FREE: usize = 64 << 10;

impl Drop for Charge {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

/// A place among the connections.
#[derive(Debug)]
struct Lease(Caller);

impl Drop for Lease {
    fn drop(&mut self) {
        let gate = self.0.gate();
        let mut open = lock(&gate.0.open);
        close(&mut open, self.0.0.number);
        gate.0.metrics.connections.set(i64::try_from(open.connections.len()).unwrap_or(i64::MAX));
    }
}

/// Connections that were let in.
pub(super) struct Admitting {
    tcp: TcpIncoming,
    gate: Gate,
}

impl Admitting {
    pub(super) fn new(tcp: TcpIncoming, gate: Gate) -> Self {
        Self { tcp, gate }
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }
}

impl Stream for Admitting {
    type Item = io::Result<Admitted>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match Pin::new(&mut self.tcp).poll_next(cx) {
                Poll::Ready(Some(Ok(stream))) => {
                    if let Some(admitted) = self.gate.admit(stream) {
                        return Poll::Ready(Some(Ok(admitted)));
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// A connection with its place. To be closed it is at its end, as if the peer had closed it.
#[derive(Debug)]
pub(super) struct Admitted {
    io: TcpStream,
    lease: Lease,
    closed: oneshot::Receiver<()>,
    idle: Pin<Box<Sleep>>,
}

impl Admitted {
    /// Is this the end?
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if Pin::new(&mut self.closed).poll(cx).is_ready() {
            return Poll::Ready(());
        }
        while self.idle.as_mut().poll(cx).is_ready() {
            let caller = &self.lease.0;
            let (limit, idle) = (caller.gate().limits().idle, caller.idle());
            if idle >= limit {
                caller.gate().refused(Refusal::Idle);
                return Poll::Ready(());
            }
            self.idle.as_mut().reset(Instant::now() + (limit - idle));
        }
        Poll::Pending
    }
}

impl Connected for Admitted {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.lease.0.clone()
    }
}

impl AsyncRead for Admitted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.poll_end(cx) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => Pin::new(&mut self.io).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Admitted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(connections: usize, pending_bytes: usize) -> Gate {
        let second = Duration::from_secs(1);
        let limits = Limits { connections, idle: second, pending_bytes, message: second };
        Gate::new(limits, ServerMetrics::register(&prometheus::Registry::new()).unwrap())
    }

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, last).into()
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_has_half_and_its_idlest_connection_makes_room() {
        let gate = gate(8, 0);
        let mut own = Vec::new();
        for _ in 0..4 {
            own.push(gate.lease(address(1)).unwrap());
            tokio::time::advance(Duration::from_millis(5)).await;
        }
        let busy = own[0].0.0.call();
        let mut more = Vec::new();
        for (_, closed) in own.iter_mut().skip(1) {
            more.push(gate.lease(address(1)).unwrap());
            assert_eq!(closed.try_recv(), Err(oneshot::error::TryRecvError::Closed));
            tokio::time::advance(Duration::from_millis(5)).await;
        }
        assert_eq!(own[0].1.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        // Others have half of the rest.
        let others: Vec<_> = (0..2).map(|_| gate.lease(address(2)).unwrap()).collect();
        assert_eq!(lock(&gate.0.open).connections.len(), 6);
        let calls: Vec<_> = more.iter().chain(&others).map(|(lease, _)| lease.0.call()).collect();
        assert!(gate.lease(address(1)).is_none() && gate.lease(address(2)).is_none());
        assert!(gate.lease(address(3)).is_some());
        drop((busy, calls, own, more, others));
        let open = lock(&gate.0.open);
        assert!(open.connections.is_empty() && open.peers.is_empty());
        assert_eq!(gate.0.metrics.connections.get(), 0);
    }

    #[tokio::test]
    async fn bytes_that_wait_are_shared_by_what_is_left_over() {
        let gate = gate(8, 3 << 20);
        let (first, _open) = gate.lease(address(1)).unwrap();
        let (second, _open) = gate.lease(address(2)).unwrap();
        let mut charges: Vec<Charge> = Vec::new();
        let mut take = |caller: &Caller, bytes: usize| {
            let mut charge = caller.charge();
            let fits = charge.set(bytes);
            if fits {
                charges.push(charge);
            }
            fits
        };
        assert!(!take(&first.0, 2 << 20));
        assert!(take(&first.0, 1 << 20) && take(&first.0, 1 << 19));
        assert!(!take(&first.0, 1 << 18));
        assert!(take(&second.0, 1 << 19));
        assert!(!take(&first.0, 1), "what it has is more than is left");
        assert!(take(&second.0, 1 << 10));
        drop(charges);
        assert_eq!(gate.0.pending.load(Ordering::Relaxed), 0);
        assert_eq!(first.0.0.peer.pending.load(Ordering::Relaxed), 0);
    }
}
