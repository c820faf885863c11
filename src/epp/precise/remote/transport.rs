//! From an address to a channel.

use std::{
    future::{Ready, ready},
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tonic::{
    codegen::{Service, http::Uri},
    transport::{Channel, Endpoint},
};

use crate::{
    epp::precise::remote::RemoteTls,
    support::tls::{self, ClientTls, TlsError},
};

/// TCP and TLS together.
pub(super) const CONNECT: Duration = Duration::from_secs(1);

/// A connection that is silent for this long is pinged, and given up after as long again.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// HTTP/2 window of a stream and of the connection, in bytes: 256 answers of thousand pods.
const WINDOW: u32 = 8 << 20;

/// Whom to connect to, and how.
#[derive(Clone)]
pub(super) struct Target {
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    endpoint: Endpoint,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Target").field(&self.to_string()).finish()
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

/// A stream of either kind.
trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Io for S {}

type Connection = TokioIo<Box<dyn Io>>;

impl Target {
    /// Reads `host:port`, `http://…` or `https://…`, and certificates.
    ///
    /// # Errors
    ///
    /// An address that is none of these, or certificates that cannot be used.
    pub(super) fn new(address: &str, tls: Option<&RemoteTls>) -> anyhow::Result<Self> {
        let (secure, rest) = match address.split_once("://") {
            None => (tls.is_some(), address),
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some((other, _)) => anyhow::bail!("{address}: {other} is neither http nor https"),
        };
        anyhow::ensure!(secure || tls.is_none(), "{address}: TLS settings, but http");
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let uri: Uri = format!("http://{rest}/").parse().with_context(|| address.to_owned())?;
        let (host, port) = uri.host().zip(uri.port_u16()).with_context(|| {
            format!("{address}: want host:port, with http:// or https:// before it or without")
        })?;
        anyhow::ensure!(uri.path() == "/", "{address}: a path means nothing here");
        // IPv6 has brackets in an address, and none anywhere else.
        let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = if secure {
            let tls = tls.cloned().unwrap_or_default();
            let name = tls.server_name.clone().unwrap_or_else(|| bare.clone());
            let name = ServerName::try_from(name)
                .with_context(|| format!("{address}: no name of a certificate"))?;
            Some((TlsConnector::from(Arc::new(client_config(&tls)?)), name))
        } else {
            None
        };
        let origin: Uri =
            format!("{}://{host}:{port}", if secure { "https" } else { "http" }).parse()?;
        let endpoint = Endpoint::from(uri.clone())
            .origin(origin)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        Ok(Self { host: bare, port, tls, endpoint })
    }

    /// A connected channel.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub(super) async fn channel(&self) -> anyhow::Result<Channel> {
        let connection = tokio::time::timeout(CONNECT, self.dial()).await;
        let connection =
            connection.map_err(|_| anyhow::anyhow!("no connection in {CONNECT:?}"))??;
        Ok(self.endpoint.connect_with_connector(Once(Some(connection))).await?)
    }

    async fn dial(&self) -> anyhow::Result<Connection> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn Io> = match &self.tls {
            None => Box::new(stream),
            Some((connector, name)) => Box::new(connector.connect(name.clone(), stream).await?),
        };
        Ok(TokioIo::new(stream))
    }
}

/// The client's side of TLS, for HTTP/2.
fn client_config(tls: &RemoteTls) -> Result<ClientConfig, TlsError> {
    let trust = ClientTls { ca: tls.ca.clone(), insecure_skip_verify: tls.insecure_skip_verify };
    tls::client_config(&trust, &[b"h2"])
}

/// Gives a connection that there is already. A channel that asks for another one is at its end: a new
/// connection begins with a look at the rows.
struct Once(Option<Connection>);

impl Service<Uri> for Once {
    type Response = Connection;
    type Error = io::Error;
    type Future = Ready<Result<Connection, io::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        ready(self.0.take().ok_or_else(|| io::ErrorKind::NotConnected.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(address: &str, tls: bool, want: Result<&str, &str>) {
        let tls = tls.then(|| RemoteTls { insecure_skip_verify: true, ..RemoteTls::default() });
        let target = Target::new(address, tls.as_ref());
        match (target, want) {
            (Ok(target), Ok(want)) => assert_eq!(target.to_string(), want),
            (Err(error), Err(want)) => {
                let text = format!("{error:#}");
                assert!(text.contains(want), "{text}");
            }
            (target, want) => panic!("{address}: {target:?}, want {want:?}"),
        }
    }

    #[test]
    fn addresses_are_read() {
        check("indexer:50051", false, Ok("http://indexer:50051"));
        check("http://indexer:1/", false, Ok("http://indexer:1"));
        check("[::1]:50051", false, Ok("http://[::1]:50051"));
        check("indexer:50051", true, Ok("https://indexer:50051"));
        check("https://10.0.0.1:50051", true, Ok("https://10.0.0.1:50051"));
        check("http://indexer:1", true, Err("TLS settings, but http"));
        check("indexer", false, Err("want host:port"));
        check("grpc://indexer:1", false, Err("neither http nor https"));
        check("indexer:1/path", false, Err("a path means nothing"));
        check("", false, Err(""));
        check("a b:1", false, Err("a b:1"));
    }

    #[test]
    fn files_that_are_no_certificates_are_named() {
        let tls = RemoteTls { ca: Some("/nonexistent.pem".into()), ..RemoteTls::default() };
        let error = Target::new("indexer:1", Some(&tls)).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent.pem"), "{error:#}");
    }
}
