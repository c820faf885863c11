//! From addresses to a channel.
//!
//! # Replicas
//!
//! All addresses that the configuration gives, and all that their names lead to, are replicas of one
//! service. Each connection begins with the next one: whoever has just ended a connection, or let
//! one wait, is asked last. Within one attempt each has its share of the time.

use std::{
    future::{Ready, ready},
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
    time::timeout,
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

/// Looking up names, TCP and TLS together, over all replicas.
pub(super) const CONNECT: Duration = Duration::from_secs(1);

/// A connection that is silent for this long is pinged, and given up after as long again.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// HTTP/2 window of a stream and of the connection, in bytes: 256 answers of thousand pods.
const WINDOW: u32 = 8 << 20;

/// Replicas that one attempt asks at most, so that each has time enough.
const MOST_REPLICAS: usize = 8;

/// Whom to connect to, and how.
pub(super) struct Target {
    places: Vec<Place>,
    tls: Option<RemoteTls>,
    /// Attempts so far: which replica is the next.
    attempts: AtomicUsize,
}

/// One address of the configuration.
struct Place {
    host: String,
    port: u16,
    /// The name that its certificate has to have; without TLS none.
    name: Option<ServerName<'static>>,
    endpoint: Endpoint,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Target").field(&self.to_string()).finish()
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, Place { host, port, name, .. }) in self.places.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let scheme = if name.is_some() { "https" } else { "http" };
            match host.contains(':') {
                true => write!(f, "{comma}{scheme}://[{host}]:{port}")?,
                false => write!(f, "{comma}{scheme}://{host}:{port}")?,
            }
        }
        Ok(())
    }
}

/// A stream of either kind.
trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Io for S {}

type Connection = TokioIo<Box<dyn Io>>;

impl Target {
    /// Reads `host:port`, `http://…` or `https://…`, with commas between several, and certificates.
    ///
    /// # Errors
    ///
    /// An address that is none of these, or certificates that cannot be used.
    pub(super) fn new(address: &str, tls: Option<&RemoteTls>) -> anyhow::Result<Self> {
        let places = address
            .split(',')
            .map(|one| Place::new(one.trim(), tls))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let secure = places.iter().any(|place| place.name.is_some());
        let tls = secure.then(|| tls.cloned().unwrap_or_default());
        // Now, so that a file that is missing is told at start.
        tls.as_ref().map(client_config).transpose()?;
        Ok(Self { places, tls, attempts: AtomicUsize::new(fastrand::usize(..1 << 16)) })
    }

    /// A connected channel.
    ///
    /// # Errors
    ///
    /// Why there is none: what the last replica said.
    pub(super) async fn channel(&self) -> anyhow::Result<Channel> {
        let tls = match &self.tls {
            Some(tls) => Some(TlsConnector::from(Arc::new(client_config(tls)?))),
            None => None,
        };
        let began = Instant::now();
        let replicas = timeout(CONNECT, self.replicas())
            .await
            .map_err(|_| anyhow::anyhow!("no address in {CONNECT:?}"))??;
        let mut left = replicas.len();
        let mut failed = anyhow::anyhow!("no address");
        for (place, address) in replicas {
            let share = CONNECT.saturating_sub(began.elapsed()) / u32::try_from(left).unwrap_or(1);
            left -= 1;
            match timeout(share, place.dial(address, tls.as_ref())).await {
                Ok(Ok(channel)) => return Ok(channel),
                Ok(Err(error)) => failed = error.context(address),
                Err(_) => failed = anyhow::anyhow!("{address}: no connection in {share:?}"),
            }
        }
        Err(failed)
    }

    /// All replicas, another one in front at each call.
    async fn replicas(&self) -> anyhow::Result<Vec<(&Place, SocketAddr)>> {
        let mut found = Vec::new();
        let mut failed = None;
        for place in &self.places {
            match lookup_host((place.host.as_str(), place.port)).await {
                Ok(addresses) => found.extend(addresses.map(|address| (place, address))),
                Err(error) => failed = Some(anyhow::Error::new(error).context(place.host.clone())),
            }
        }
        // Resolvers shuffle their answers; the turns of replicas must not depend on that.
        found.sort_by_key(|(_, address)| *address);
        found.dedup_by_key(|(_, address)| *address);
        if let (true, Some(error)) = (found.is_empty(), failed) {
            return Err(error);
        }
        let turn = self.attempts.fetch_add(1, Ordering::Relaxed) % found.len().max(1);
        found.rotate_left(turn);
        found.truncate(MOST_REPLICAS);
        Ok(found)
    }
}

impl Place {
    fn new(address: &str, tls: Option<&RemoteTls>) -> anyhow::Result<Self> {
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
        let name = tls.and_then(|tls| tls.server_name.clone()).unwrap_or_else(|| bare.clone());
        let name = secure
            .then(|| ServerName::try_from(name))
            .transpose()
            .with_context(|| format!("{address}: no name of a certificate"))?;
        let scheme = if secure { "https" } else { "http" };
        let origin: Uri = format!("{scheme}://{host}:{port}").parse()?;
        let endpoint = Endpoint::from(uri.clone())
            .origin(origin)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        Ok(Self { host: bare, port, name, endpoint })
    }

    async fn dial(
        &self,
        address: SocketAddr,
        tls: Option<&TlsConnector>,
    ) -> anyhow::Result<Channel> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn Io> = match (tls, &self.name) {
            (Some(tls), Some(name)) => Box::new(tls.connect(name.clone(), stream).await?),
            _ => Box::new(stream),
        };
        let connection: Connection = TokioIo::new(stream);
        Ok(self.endpoint.connect_with_connector(Once(Some(connection))).await?)
    }
}

/// The client's side of TLS, for HTTP/2.
fn client_config(tls: &RemoteTls) -> Result<ClientConfig, TlsError> {
    let trust = ClientTls { ca: tls.ca.clone(), insecure_skip_verify: tls.insecure_skip_verify };
    tls::client_config_as(&trust, tls.identity.as_ref(), &[b"h2"])
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
    use crate::support::tls::Identity;

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
        check("a:1,b:2", false, Ok("http://a:1,http://b:2"));
        check("https://a:1, [::1]:2", true, Ok("https://a:1,https://[::1]:2"));
        check("a:1,", false, Err(""));
        check("a:1,http://b:2", true, Err("TLS settings, but http"));
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
        let identity = Identity { chain: "/no/tls.crt".into(), key: "/no/tls.key".into() };
        let tls = RemoteTls {
            insecure_skip_verify: true,
            identity: Some(identity),
            ..RemoteTls::default()
        };
        let error = Target::new("indexer:1", Some(&tls)).unwrap_err();
        assert!(format!("{error:#}").contains("/no/tls."), "{error:#}");
    }

    #[tokio::test]
    async fn replicas_take_turns() {
        let target = Target::new("127.0.0.1:1,127.0.0.1:2,127.0.0.1:1", None).unwrap();
        let mut first = Vec::new();
        for _ in 0..4 {
            let replicas = target.replicas().await.unwrap();
            assert_eq!(replicas.len(), 2);
            first.push(replicas[0].1.port());
        }
        assert!(first[0] != first[1] && first[..2] == first[2..], "{first:?}");
    }
}
