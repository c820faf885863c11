//! One endpoint's HTTP/1.1 connection.

use std::{future::Future, io, net::SocketAddr, pin::Pin, sync::atomic::Ordering, time::Duration};

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, StatusCode, Uri,
    body::{Body as _, Bytes},
    client::conn::http1::{self, SendRequest},
    header::{ACCEPT, HOST},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::ScrapeStats;

/// Longest page that is read, bytes: some eighty times a usual one.
pub(super) const MAX_PAGE: usize = 8 << 20;

/// Read buffer of a connection at most, bytes: with these a page of 100 kB is two reads.
const MAX_BUFFER: usize = 64 << 10;

/// Why a page did not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PollError {
    /// No connection, TLS included.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// Not in time.
    #[error("no page within {0:?}")]
    Timeout(Duration),
    /// What came is no HTTP, or ended too early.
    #[error("no HTTP response")]
    Http(#[from] hyper::Error),
    /// Another status than 200.
    #[error("status {0}")]
    Status(StatusCode),
    /// The page is too long.
    #[error("a page of more than {MAX_PAGE} bytes")]
    TooLong,
}

impl PollError {
    /// All reasons, in the order of [`index`](Self::index).
    pub(super) const REASONS: [&'static str; 5] =
        ["connect", "timeout", "http", "status", "too_long"];

    /// A bounded label value.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        Self::REASONS[self.index()]
    }

    pub(super) fn index(&self) -> usize {
        match self {
            Self::Connect { .. } => 0,
            Self::Timeout(_) => 1,
            Self::Http(_) => 2,
            Self::Status(_) => 3,
            Self::TooLong => 4,
        }
    }
}

/// Can this be asked for?
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.parse::<Uri>().is_ok()
}

/// A stream of either kind.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// One endpoint's page, and the connection to it while there is one.
pub(super) struct Client {
    address: SocketAddr,
    request: Request<Empty<Bytes>>,
    connector: Option<TlsConnector>,
    connected: Option<Connected>,
}

struct Connected {
    sender: SendRequest<Empty<Bytes>>,
    /// Moves the bytes; ends when the connection does.
    driver: Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>,
    /// It has carried a response.
    used: bool,
}

impl Client {
    /// Not connected yet. `path` is one that [`is_path`] likes.
    pub(super) fn new(address: SocketAddr, path: &str, connector: Option<TlsConnector>) -> Self {
        let request = Request::get(path)
            .header(HOST, address.to_string())
            .header(ACCEPT, "text/plain;version=0.0.4;q=1,*/*;q=0.1")
            .body(Empty::new())
            .unwrap_or_default();
        Self { address, request, connector, connected: None }
    }

    /// Gets the page, in chunks. A kept connection that the server has closed meanwhile is
    /// replaced once; nothing of the page has come then.
    ///
    /// Dropped halfway, it leaves a connection that must not be used again: see
    /// [`disconnect`](Self::disconnect).
    pub(super) async fn get(
        &mut self,
        stats: &ScrapeStats,
        mut chunk: impl FnMut(&[u8]),
    ) -> Result<(), PollError> {
        loop {
            let mut connected = match self.connected.take() {
                Some(connected) => connected,
                None => {
                    stats.connections.fetch_add(1, Ordering::Relaxed);
                    self.connect().await?
                }
            };
            match connected.exchange(self.request.clone(), &mut chunk).await {
                Ok(()) => {
                    connected.used = true;
                    self.connected = Some(connected).filter(|c| !c.sender.is_closed());
                    return Ok(());
                }
                Err(Failure::Unanswered(_)) if connected.used => {}
                Err(Failure::Unanswered(error)) => return Err(error.into()),
                Err(Failure::Answered(error)) => return Err(error),
            }
        }
    }

    /// Drops the connection.
    pub(super) fn disconnect(&mut self) {
        self.connected = None;
    }

    /// Notices that the server closes the connection. Never ends.
    pub(super) async fn watch(&mut self) {
        if let Some(connected) = &mut self.connected {
            if let Err(error) = connected.driver.as_mut().await {
                tracing::debug!(%error, "Connection to a metrics page ended.");
            }
            self.connected = None;
        }
        std::future::pending::<()>().await;
    }

    async fn connect(&mut self) -> Result<Connected, PollError> {
        let address = self.address;
        let failed = |error| PollError::Connect { address, error };
        let tcp = TcpStream::connect(address).await.map_err(failed)?;
        // The request is one segment anyway; without this, TLS may wait for acknowledgements.
        tcp.set_nodelay(true).map_err(failed)?;
        let stream: Box<dyn Stream> = match &self.connector {
            None => Box::new(tcp),
            Some(connector) => {
                let name = ServerName::IpAddress(address.ip().into());
                Box::new(connector.connect(name, tcp).await.map_err(failed)?)
            }
        };
        let (sender, connection) =
            http1::Builder::new().max_buf_size(MAX_BUFFER).handshake(TokioIo::new(stream)).await?;
        Ok(Connected { sender, driver: Box::pin(connection), used: false })
    }
}

enum Failure {
    /// Nothing came back.
    Unanswered(hyper::Error),
    Answered(PollError),
}

impl Connected {
    async fn exchange(
        &mut self,
        request: Request<Empty<Bytes>>,
        chunk: &mut impl FnMut(&[u8]),
    ) -> Result<(), Failure> {
        let Self { sender, driver, .. } = self;
        // The connection may end before the body was taken out of it; the exchange notices both
        // ends, so it alone decides.
        let drive = async {
            if let Err(error) = driver.as_mut().await {
                tracing::debug!(%error, "Connection to a metrics page ended.");
            }
            std::future::pending::<std::convert::Infallible>().await
        };
        let exchange = async {
            sender.ready().await.map_err(Failure::Unanswered)?;
            let response = sender.send_request(request).await.map_err(Failure::Unanswered)?;
            let status = response.status();
            if status != StatusCode::OK {
                return Err(Failure::Answered(PollError::Status(status)));
            }
            let mut body = response.into_body();
            if body.size_hint().lower() > MAX_PAGE as u64 {
                return Err(Failure::Answered(PollError::TooLong));
            }
            let mut total = 0;
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| Failure::Answered(error.into()))?;
                let Ok(data) = frame.into_data() else { continue };
                total += data.len();
                if total > MAX_PAGE {
                    return Err(Failure::Answered(PollError::TooLong));
                }
                chunk(&data);
            }
            Ok(())
        };
        tokio::select! {
            biased;
            result = exchange => result,
            never = drive => match never {},
        }
    }
}
