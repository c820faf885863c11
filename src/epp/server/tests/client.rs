//! A gRPC client on one HTTP/2 connection, plaintext or TLS.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use http::{Request, Response, Uri};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::{
    TlsConnector,
    rustls::pki_types::{CertificateDer, ServerName},
};

use crate::support::tls::{ClientTls, client_config};

/// Where calls go.
pub(super) fn origin(address: SocketAddr) -> Uri {
    format!("http://{address}").parse().unwrap()
}

/// A connection. Clones share it; it ends with the last one.
#[derive(Clone)]
pub(super) struct Caller {
    sender: http2::SendRequest<tonic::body::Body>,
    _connection: Arc<Mutex<JoinSet<()>>>,
}

impl Caller {
    pub(super) async fn plain(address: SocketAddr) -> Self {
        Self::over(connect(address).await.unwrap()).await
    }

    /// Takes any certificate, and returns it.
    pub(super) async fn tls(address: SocketAddr) -> io::Result<(Self, CertificateDer<'static>)> {
        let any = ClientTls { insecure_skip_verify: true, ..ClientTls::default() };
        let config = client_config(&any, &[b"h2"]).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = connect(address).await?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        let connection = stream.get_ref().1;
        assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
        let certificate = connection.peer_certificates().unwrap()[0].clone().into_owned();
        Ok((Self::over(stream).await, certificate))
    }

    async fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let io = TokioIo::new(stream);
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .max_concurrent_reset_streams(1)
            .handshake(io)
            .await
            .unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { connection.await.unwrap_or_default() });
        Self { sender, _connection: Arc::new(Mutex::new(tasks)) }
    }
}

impl tonic::codegen::Service<Request<tonic::body::Body>> for Caller {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
