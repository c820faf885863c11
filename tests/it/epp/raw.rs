//! HTTP/2 below gRPC: connections over TLS, and calls whose bytes are no messages.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kv_indexer::{
    proto::ext_proc::external_processor_client::ExternalProcessorClient,
    support::tls::{ClientTls, client_config},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::{
    TlsConnector,
    rustls::pki_types::{CertificateDer, ServerName},
};

/// A connection for tonic's clients. Clones share it; it ends with the last one.
#[derive(Clone)]
pub(crate) struct Caller {
    sender: http2::SendRequest<tonic::body::Body>,
    _connection: Arc<Mutex<JoinSet<()>>>,
}

/// Connects and takes any certificate, which is returned.
pub(crate) async fn over_tls(
    to: SocketAddr,
) -> (ExternalProcessorClient<Caller>, CertificateDer<'static>) {
    let any = ClientTls { insecure_skip_verify: true, ..ClientTls::default() };
    let config = client_config(&any, &[b"h2", b"http/1.1"]).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TcpStream::connect(to).await.unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let connection = stream.get_ref().1;
    assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
    let certificate = connection.peer_certificates().unwrap()[0].clone().into_owned();
    let (sender, tasks) = handshake(stream).await;
    let caller = Caller { sender, _connection: Arc::new(Mutex::new(tasks)) };
    let origin: Uri = format!("https://{to}").parse().unwrap();
    (ExternalProcessorClient::with_origin(caller, origin), certificate)
}

async fn handshake<B>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> (http2::SendRequest<B>, JoinSet<()>)
where
    B: hyper::body::Body + Unpin + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let made = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (sender, connection) = made.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { connection.await.unwrap_or_default() });
    (sender, tasks)
}

/// Calls `Process` with these bytes as the whole stream; returns the gRPC status.
pub(crate) async fn process(to: SocketAddr, stream: impl Into<Bytes>) -> Option<u16> {
    let tcp = TcpStream::connect(to).await.unwrap();
    let (mut sender, _tasks) = handshake(tcp).await;
    let uri = format!("http://{to}/envoy.service.ext_proc.v3.ExternalProcessor/Process");
    let request = Request::post(uri)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(stream.into()))
        .unwrap();
    let answer: Response<Incoming> = sender.send_request(request).await.unwrap();
    let status =
        |headers: &http::HeaderMap| headers.get("grpc-status")?.to_str().ok()?.parse().ok();
    let at_once = status(answer.headers());
    let collected = answer.into_body().collect().await.ok();
    at_once.or_else(|| collected?.trailers().and_then(status))
}

/// A gRPC message as it goes over the wire.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    let mut out = vec![0];
    out.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    out.extend(message);
    out
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
