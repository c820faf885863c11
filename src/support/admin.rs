//! A small HTTP/1 server for operators and probes: metrics, health, configuration.
//!
//! # Bounds
//!
//! At most [`Limits::connections`] at a time; more wait in the listen queue. One address has half of
//! them at most, so that it cannot keep probes out; its further ones are closed. A connection that
//! shows no complete request head within [`Limits::header_timeout`] is closed, idle ones included,
//! so that the wait is short. Request bodies are not read: no page takes one.
//!
//! Pages are made on the runtime's threads and must not block.
//!
//! # Access
//!
//! Health and metrics are for everybody: probes and scrapers have no token. What else there is can be
//! [guarded](Routes::guarded).

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fmt, io,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri,
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

use crate::support::{
    access::{Access, Denied},
    metrics,
};

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
type Hear = Box<dyn Fn(Denied) + Send + Sync>;

/// Pages for everybody, whatever [`Routes::guarded`] says.
const OPEN: [&str; 3] = ["/livez", "/readyz", "/metrics"];

/// The pages of a server by their path.
#[derive(Default)]
pub struct Routes {
    pages: BTreeMap<&'static str, Handler>,
    /// Who may see the pages that are not [`OPEN`].
    access: Access,
    /// Hears of refusals.
    refused: Option<Hear>,
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

    /// All pages but `/livez`, `/readyz` and `/metrics` are for those whom `access` admits; `refused`
    /// hears of others.
    #[must_use]
    pub fn guarded(
        mut self,
        access: Access,
        refused: impl Fn(Denied) + Send + Sync + 'static,
    ) -> Self {
        self.access = access;
        self.refused = Some(Box::new(refused));
        self
    }

    /// May the page be seen? If not, what is said instead.
    fn admit(&self, path: &str, headers: &HeaderMap) -> Result<(), Page> {
        if OPEN.contains(&path) {
            return Ok(());
        }
        let authorization = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let Err(denied) = self.access.check(authorization) else { return Ok(()) };
        if let Some(refused) = &self.refused {
            refused(denied);
        }
        let status = match denied {
            Denied::NoToken | Denied::WrongToken => StatusCode::UNAUTHORIZED,
            _ => StatusCode::FORBIDDEN,
        };
        Err(Page::text(status, format!("{path} {denied}")))
    }

    fn answer(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Response<Full<Bytes>> {
        let (page, allow) = match self.pages.get(uri.path()) {
            None => {
                let paths: Vec<&str> = self.pages.keys().copied().collect();
                let text = format!("no such page; there are {}", paths.join(" "));
                (Page::text(StatusCode::NOT_FOUND, text), false)
            }
            Some(make) if method == Method::GET || method == Method::HEAD => (
                self.admit(uri.path(), headers).map_or_else(|refusal| refusal, |()| make(uri)),
                false,
            ),
            Some(_) => (Page::text(StatusCode::METHOD_NOT_ALLOWED, "use GET"), true),
        };
        // hyper leaves the body out of answers to HEAD and keeps its length.
        let page_status = page.status;
        let mut response = Response::new(Full::new(page.body));
        *response.status_mut() = page_status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(page.content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if page_status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
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
    // Held once by each connection of the address.
    let mut addresses: HashMap<IpAddr, Arc<()>> = HashMap::new();
    let share = (limits.connections / 2).max(1);
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
            (Ok(slot), Ok((stream, peer))) => {
                addresses.retain(|_, held| Arc::strong_count(held) > 1);
                let held = addresses.entry(peer.ip().to_canonical()).or_default();
                if Arc::strong_count(held) > share {
                    debug!(%peer, "As many admin connections as one address may have.");
                    continue;
                }
                // Its place in the share is free before the slot is, or whoever waits is turned away.
                let place = (Arc::clone(held), slot);
                let serving = connection(stream, Arc::clone(&routes), limits, stop.clone());
                connections.spawn(async move {
                    serving.await;
                    drop(place);
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
        let response = routes.answer(request.method(), request.uri(), request.headers());
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
