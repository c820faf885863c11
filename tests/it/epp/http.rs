//! The client's side: one HTTP/1.1 request over a connection of its own.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet};

use crate::support::patience;

/// A request to be sent.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    method: Method,
    path: String,
    headers: Vec<(String, String)>,
    body: Bytes,
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// An answer whose body is still coming. Dropping it closes the connection.
pub(crate) struct Open {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    _connection: JoinSet<()>,
}

impl Call {
    pub(crate) fn get(path: &str) -> Self {
        Self::new(Method::GET, path, Bytes::new())
    }

    pub(crate) fn post(path: &str, body: impl Into<Bytes>) -> Self {
        Self::new(Method::POST, path, body.into()).header("content-type", "application/json")
    }

    fn new(method: Method, path: &str, body: Bytes) -> Self {
        Self { method, path: path.to_owned(), headers: Vec::new(), body }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sends it and reads the whole answer.
    pub(crate) async fn send(&self, to: SocketAddr) -> Result<Answer, String> {
        let whole = async {
            let open = self.open(to).await?;
            let (status, headers) = (open.status, open.headers.clone());
            Ok(Answer { status, headers, body: open.rest().await? })
        };
        within(whole).await
    }

    /// Sends it and reads the head of the answer.
    pub(crate) async fn open(&self, to: SocketAddr) -> Result<Open, String> {
        within(self.begin(to)).await
    }

    async fn begin(&self, to: SocketAddr) -> Result<Open, String> {
        let stream = TcpStream::connect(to).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let mut running = JoinSet::new();
        running.spawn(async move {
            // A broken connection shows where the answer is read.
            drop(connection.await);
        });
        let mut request = Request::builder()
            .method(self.method.clone())
            .uri(&self.path)
            .header("host", to.to_string());
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(self.body.clone())).unwrap();
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let (head, body) = answer.into_parts();
        Ok(Open { status: head.status, headers: head.headers, body, _connection: running })
    }
}

impl Open {
    /// The next piece of the body; `None` at its end.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(error.to_string()),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// The rest of the body.
    pub(crate) async fn rest(self) -> Result<Bytes, String> {
        let collected = self.body.collect().await.map_err(|error| error.to_string())?;
        Ok(collected.to_bytes())
    }
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header's value; empty if there is none.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

async fn within<T>(run: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let limit: Duration = patience();
    tokio::time::timeout(limit, run).await.unwrap_or_else(|_| Err(format!("not within {limit:?}")))
}
