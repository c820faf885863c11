//! TCP connections → TLS connections.
//!
//! # Concurrency
//!
//! Each handshake has a task, so a peer that is slow or silent holds up nobody. At most
//! [`HANDSHAKES`] are under way; further connections wait in the kernel's queue.
//!
//! # Failure
//!
//! A peer that does not speak TLS, has no certificate that is wanted, or takes longer than
//! [`PATIENCE`] loses its connection; nobody else hears of it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use super::gate::{Admitted, Admitting, Caller, Refusal};

/// Handshakes under way at most.
const HANDSHAKES: usize = 256;

/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connections whose handshake is done, in the order in which they are done.
pub(super) struct TlsIncoming {
    tcp: Admitting,
    acceptor: TlsAcceptor,
    under_way: JoinSet<Option<Secured>>,
}

impl TlsIncoming {
    pub(super) fn new(tcp: Admitting, config: Arc<ServerConfig>) -> Self {
        Self { tcp, acceptor: config.into(), under_way: JoinSet::new() }
    }
}

impl Stream for TlsIncoming {
    type Item = io::Result<Secured>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match self.under_way.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Some(secured)))) => return Poll::Ready(Some(Ok(secured))),
                // A failed handshake, or one that panicked, ended its own connection.
                Poll::Ready(Some(_)) => {
                    self.tcp.gate().refused(Refusal::Handshake);
                    continue;
                }
                Poll::Pending if self.under_way.len() >= HANDSHAKES => return Poll::Pending,
                Poll::Pending | Poll::Ready(None) => {}
            }
            match Pin::new(&mut self.tcp).poll_next(cx) {
                Poll::Ready(Some(Ok(stream))) => {
                    let acceptor = self.acceptor.clone();
                    self.under_way.spawn(handshake(acceptor, stream));
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

async fn handshake(acceptor: TlsAcceptor, stream: Admitted) -> Option<Secured> {
    let shaken = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await;
    let failed = match shaken {
        Ok(Ok(stream)) => return Some(Secured(Box::new(stream))),
        Ok(Err(error)) => error,
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    tracing::debug!(error = %failed, "A TLS handshake failed.");
    None
}

/// A TLS connection, as tonic wants it.
pub(super) struct Secured(Box<TlsStream<Admitted>>);

impl Connected for Secured {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.0.get_ref().0.connect_info()
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
