//! A small HTTP/1 server for operators and probes: metrics, health, configuration.
//!
//! # Bounds
//!
//! At most [`Limits::connections`] at a time; more wait in the listen queue. A connection that
//! shows no complete request head within [`Limits::header_timeout`] is closed, idle ones included,
//! so that the wait is short. Request bodies are not read: no page takes one.
//!
//! Pages are made on the runtime's threads and must not block.

use std::{collections::BTreeMap, convert::Infallible, fmt, io, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::{Bytes, Incoming},
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::Registry;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::support::metrics;

/// An answer.
#[derive(Clone, Debug)]
pub struct Page {
    /// HTTP status.
    pub status: StatusCode,
    /// `Content-Type`.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
}

impl Page {
    /// Plain text. A line feed is added.
    pub fn text(status: StatusCode, text: impl fmt::Display) -> Self {
        let body = format!("{text}\n").into();
        Self { status, content_type: "text/plain; charset=utf-8", body }
    }

    /// Indented JSON with status 200.
    #[must_use]
    pub fn json(value: &Value) -> Self {
        let body = format!("{value:#}\n").into();
        Self { status: StatusCode::OK, content_type: "application/json", body }
    }

    /// HTML with status 200.
    pub fn html(html: impl Into<Bytes>) -> Self {
        let content_type = "text/html; charset=utf-8";
        Self { status: StatusCode::OK, content_type, body: html.into() }
    }
}

type Handler = Box<dyn Fn(&Uri) -> Page + Send + Sync>;

/// The pages of a server by their path.
#[derive(Default)]
pub struct Routes {
    pages: BTreeMap<&'static str, Handler>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.pages.keys()).finish()
    }
}

impl Routes {
    /// `/livez`, which answers as long as the process does.
    #[must_use]
    pub fn new() -> Self {
        Self::default().page("/livez", |_| Page::text(StatusCode::OK, "ok"))
    }

    /// Adds or replaces a page. It is made anew for each request.
    #[must_use]
    pub fn page(
        mut self,
        path: &'static str,
        make: impl Fn(&Uri) -> Page + Send + Sync + 'static,
    ) -> Self {
        self.pages.insert(path, Box::new(make));
        self
    }

    /// `/metrics` in Prometheus's text format.
    #[must_use]
    pub fn metrics(self, registry: Registry) -> Self {
        self.page("/metrics", move |_| match metrics::encode(&registry) {
            Ok(text) => Page {
                status: StatusCode::OK,
                content_type: metrics::TEXT_FORMAT,
                body: text.into(),
            },
            Err(error) => {
                warn!(%error, "Metrics cannot be encoded.");
                Page::text(StatusCode::INTERNAL_SERVER_ERROR, error)
            }
        })
    }

    /// `/readyz`: 200, or 503 with the reason that `check` gives.
    #[must_use]
    pub fn readiness<E: fmt::Display>(
        self,
        check: impl Fn() -> Result<(), E> + Send + Sync + 'static,
    ) -> Self {
        self.page("/readyz", move |_| match check() {
            Ok(()) => Page::text(StatusCode::OK, "ok"),
            Err(reason) => Page::text(StatusCode::SERVICE_UNAVAILABLE, reason),
        })
    }

    /// `/config`: the effective configuration, from which secrets have been removed already.
    #[must_use]
    pub fn config(self, config: &Value) -> Self {
        let page = Page::json(config);
        self.page("/config", move |_| page.clone())
    }

    fn answer(&self, method: &Method, uri: &Uri) -> Response<Full<Bytes>> {
        let (page, allow) = match self.pages.get(uri.path()) {
            None => {
                let paths: Vec<&str> = self.pages.keys().copied().collect();
                let text = format!("no such page; there are {}", paths.join(" "));
                (Page::text(StatusCode::NOT_FOUND, text), false)
            }
            Some(make) if method == Method::GET || method == Method::HEAD => (make(uri), false),
            Some(_) => (Page::text(StatusCode::METHOD_NOT_ALLOWED, "use GET"), true),
        };
        // hyper leaves the body out of answers to HEAD and keeps its length.
        let mut response = Response::new(Full::new(page.body));
        *response.status_mut() = page.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(page.content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if allow {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }
}

/// What the server grants its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// How long a request's head may take, from the end of the request before.
    pub header_timeout: Duration,
    /// How long a stop waits for requests under way.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            header_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(2),
        }
    }
}

/// Serves `routes` on `listener` until `stop`, then lets requests under way finish.
///
/// # Errors
///
/// Never: a failed `accept` (too many open files, a peer that is gone again) is logged and tried
/// again after a pause.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    limits: Limits,
    stop: CancellationToken,
) -> io::Result<()> {
    const PAUSE: Duration = Duration::from_millis(100);
    let routes = Arc::new(routes);
    let slots = Arc::new(Semaphore::new(limits.connections.max(1)));
    let mut connections = JoinSet::new();
    loop {
        // The slot comes first, so that a connection is accepted only when it can be served.
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    warn!(%error, "An admin page failed.");
                }
                continue;
            }
            accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, listener.accept().await)
            } => accepted,
        };
        match accepted {
            (Ok(slot), Ok((stream, _))) => {
                let serving = connection(stream, Arc::clone(&routes), limits, stop.clone());
                connections.spawn(async move {
                    serving.await;
                    drop(slot);
                });
            }
            (_, Err(error)) => {
                warn!(%error, "Accepting a connection failed.");
                tokio::time::sleep(PAUSE).await;
            }
            (Err(_), _) => break, // The semaphore is never closed.
        }
    }
    drop(listener);
    let finished = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.stop_timeout, finished).await.is_err() {
        debug!(open = connections.len(), "Closing admin connections that are still busy.");
        connections.shutdown().await;
    }
    Ok(())
}

async fn connection(
    stream: TcpStream,
    routes: Arc<Routes>,
    limits: Limits,
    stop: CancellationToken,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = routes.answer(request.method(), request.uri());
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        biased;
        result = connection.as_mut() => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        debug!(%error, "Admin connection ended.");
    }
}

#[cfg(test)]
mod tests;
