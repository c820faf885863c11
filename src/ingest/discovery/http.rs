//! One bounded HTTP GET.

use std::{convert::Infallible, time::Duration};

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    header::{ACCEPT, CONNECTION, HOST},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::address::{Scheme, split};

/// Longest body that is read, bytes: SGLang's `/server_info` is some 100 KiB.
const MAX_BODY: usize = 1 << 20;

/// Host and port of an engine's HTTP server.
#[derive(Debug)]
pub(super) struct Server<'a> {
    /// As written, IPv6 in brackets.
    pub(super) host: &'a str,
    port: u16,
    timeout: Duration,
}

impl<'a> Server<'a> {
    pub(super) fn new(address: &'a str, timeout: Duration) -> anyhow::Result<Self> {
        match split(address).map_err(anyhow::Error::msg)? {
            (Scheme::Http, host, port) => Ok(Self { host, port, timeout }),
            (Scheme::Tcp, ..) => bail!("{address:?} does not start with http://"),
        }
    }

    /// The JSON document at `path`; none when the server has no such path.
    ///
    /// # Errors
    ///
    /// When it cannot be reached, does not answer in time, answers with another status than 200,
    /// with more than [`MAX_BODY`] bytes or with something else than JSON.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Option<serde_json::Value>> {
        let answer = tokio::time::timeout(self.timeout, self.exchange(path)).await;
        let (status, body) = match answer {
            Ok(answer) => answer.with_context(|| self.asking(path))?,
            Err(_) => bail!("{}: no answer within {:?}", self.asking(path), self.timeout),
        };
        match status {
            StatusCode::OK => {}
            // What frameworks say about a path that they do not serve.
            StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_IMPLEMENTED => {
                return Ok(None);
            }
            other => bail!("{}: status {other}", self.asking(path)),
        }
        let json = serde_json::from_slice(&body).with_context(|| self.asking(path))?;
        Ok(Some(json))
    }

    fn asking(&self, path: &str) -> String {
        format!("asking http://{}:{}{path}", self.host, self.port)
    }

    async fn exchange(&self, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        let name = self.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((name, self.port)).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::get(path)
            .header(HOST, format!("{}:{}", self.host, self.port))
            .header(ACCEPT, "application/json")
            .header(CONNECTION, "close")
            .body(Empty::<Bytes>::new())?;
        // The connection may end before the body was taken out of it; the exchange notices both
        // ends, so it alone decides.
        let drive = async {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "Connection to an engine ended.");
            }
            std::future::pending::<Infallible>().await
        };
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!(error))?;
            Ok((status, body.to_bytes()))
        };
        tokio::select! {
            biased;
            answer = exchange => answer,
            never = drive => match never {},
        }
    }
}
