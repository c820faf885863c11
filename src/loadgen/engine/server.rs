//! The HTTP API of a vLLM server, as far as routers and clients of completions need it.
//!
//! `POST /v1/completions`, `/v1/chat/completions`, both with `/render` behind, `/tokenize`,
//! `/reset_prefix_cache`; `GET /v1/models`, `/health`, `/ping`, `/version`, `/metrics`,
//! `/kv_event_sources`. Every answer has `x-served-by`, the address of the server, and completions the
//! same in `system_fingerprint`.
//!
//! # Ranks
//!
//! A request goes to the rank that the header `X-data-parallel-rank` names, else to the ranks in turn.
//!
//! # Failure
//!
//! A client that goes away aborts its requests: dropping a body or an unfinished answer drops their
//! tickets. Tests can make it fail, see [`EngineHandle`](super::EngineHandle).
//!
//! # Bounds
//!
//! Bodies of at most 32 MiB, 64 prompts each; 4 096 connections, more wait in the listen queue.

mod answer;
mod openai;
mod seen;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

pub use self::seen::RequestHead;
use self::{
    answer::{Answer, Choice},
    openai::{Ask, BadRequest},
    seen::Heads,
};
use super::{
    EngineOptions,
    metrics::{self, Load},
    rank::{Rank, Refusal},
    reset_all, scheduler,
    sequence::{Identity, Lora, Sequence},
    tokenizer::Tokenizer,
};
use crate::support::clock::unix_ns;

/// Bytes of a request body at most.
const MAX_BODY: usize = 32 << 20;
/// Connections at a time at most.
const MAX_CONNECTIONS: usize = 4096;
/// What `/version` says: the engine whose API this is.
const VERSION: &str = "0.33.0";
/// Names the server in each answer.
const SERVED_BY: HeaderName = HeaderName::from_static("x-served-by");
/// Says that an engine does not render.
const NO_SCALE_OUT: &str = "Scale-out endpoints are disabled. Restart vllm serve with \
                            --enable-scale-out to enable them.";
/// Chooses the rank.
const RANK: &str = "x-data-parallel-rank";

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// How the metrics page fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetricsFault {
    /// Status 500.
    Error,
    /// No answer, until the client gives up.
    Hang,
    /// Status 200 and a body that is no metrics page.
    Garbage,
}

/// What tests have switched.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Faults {
    pub(super) load: Option<Load>,
    pub(super) loras: Option<[Vec<String>; 2]>,
    pub(super) metrics: Option<MetricsFault>,
    pub(super) refuse: bool,
}

/// See the module's page.
pub struct Server {
    options: Arc<EngineOptions>,
    ranks: Vec<Arc<Rank>>,
    faults: watch::Receiver<Faults>,
    heads: Heads,
    tokenizer: Arc<dyn Tokenizer>,
    turn: AtomicUsize,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("listen", &self.options.listen).finish_non_exhaustive()
    }
}

/// Accepts connections until told to stop; then ends answers in flight, for as long as the grace lasts.
pub(super) async fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    mut stopping: watch::Receiver<bool>,
) {
    let mut faults = server.faults.clone();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut listener = Some(listener);
    loop {
        let refuse = faults.borrow_and_update().refuse;
        if refuse && listener.take().is_some() {
            connections.shutdown().await;
        }
        if !refuse && listener.is_none() {
            listener = TcpListener::bind(server.options.listen).await.ok();
        }
        let accept = async {
            match &listener {
                Some(listener) => {
                    // The semaphore is never closed.
                    let slot = Arc::clone(&slots).acquire_owned().await.ok();
                    Some((listener.accept().await, slot))
                }
                // Nothing to accept: look again after a change, or soon if the port is not free yet.
                None if refuse => std::future::pending().await,
                None => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    None
                }
            }
        };
        tokio::select! {
            biased;
            _ = stopping.changed() => break,
            changed = faults.changed() => if changed.is_err() { break },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = accept => if let Some((accepted, slot)) = accepted {
                match accepted {
                    Ok((stream, _)) => {
                        let (server, stopping) = (Arc::clone(&server), stopping.clone());
                        connections.spawn(async move {
                            connection(server, stream, stopping).await;
                            drop(slot);
                        });
                    }
                    // Out of descriptors, normally.
                    Err(error) => {
                        tracing::debug!(%error, "A connection cannot be accepted.");
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(super::GRACE, ended).await.is_err() {
        connections.shutdown().await;
    }
}

async fn connection(server: Arc<Server>, stream: TcpStream, mut stopping: watch::Receiver<bool>) {
    // Tokens are small messages that must not wait for each other.
    drop(stream.set_nodelay(true));
    let service = service_fn(move |request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(server.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "A connection ended early.");
    }
}

impl Server {
    pub(super) fn new(
        options: Arc<EngineOptions>,
        ranks: Vec<Arc<Rank>>,
        faults: watch::Receiver<Faults>,
        tokenizer: Arc<dyn Tokenizer>,
    ) -> Self {
        let heads = Heads::default();
        Self { options, ranks, faults, heads, tokenizer, turn: AtomicUsize::new(0) }
    }

    pub(super) fn heads(&self) -> &Heads {
        &self.heads
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        self.heads.count();
        let mut response = self.route(request).await.unwrap_or_else(|refused| refused.response());
        if let Ok(address) = HeaderValue::try_from(self.options.listen.to_string()) {
            response.headers_mut().insert(SERVED_BY, address);
        }
        response
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Response<Body>, BadRequest> {
        let path = request.uri().path().to_owned();
        match (request.method(), path.as_str()) {
            (&Method::GET, "/health" | "/ping") => Ok(Response::new(body(Bytes::new()))),
            (&Method::GET, "/version") => Ok(json_page(&json!({"version": VERSION}))),
            (&Method::GET, "/v1/models") => Ok(json_page(&self.models())),
            (&Method::GET, "/kv_event_sources") => Ok(json_page(&self.event_sources())),
            (&Method::GET, "/metrics") => Ok(self.metrics().await),
            (&Method::POST, "/reset_prefix_cache") => {
                let reset = reset_all(&self.ranks);
                Ok(json_page(&json!({"success": reset})))
            }
            (&Method::POST, "/tokenize") => {
                let (_, _, bytes) = self.read(request).await?;
                let tokens = openai::tokenize(&bytes, &*self.tokenizer)?;
                Ok(json_page(&json!({
                    "tokens": tokens,
                    "count": tokens.len(),
                    "max_model_len": self.options.max_model_len,
                    "token_strs": null,
                })))
            }
            (&Method::POST, "/v1/completions" | "/v1/chat/completions") => {
                let chat = path == "/v1/chat/completions";
                let (method, headers, bytes) = self.read(request).await?;
                self.heads.keep(&method, &path, &headers, &bytes);
                let ask = openai::parse(&bytes, chat, &*self.tokenizer)?;
                self.complete(ask, chat, &headers).await
            }
            (&Method::POST, "/v1/completions/render" | "/v1/chat/completions/render") => {
                if !self.options.scale_out {
                    return Err(BadRequest::new(StatusCode::FORBIDDEN, NO_SCALE_OUT));
                }
                let (_, headers, bytes) = self.read(request).await?;
                self.render(&bytes, path == "/v1/chat/completions/render", &headers)
            }
            (_, known) if KNOWN.contains(&known) => {
                Err(BadRequest::new(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"))
            }
            _ => Err(BadRequest::new(StatusCode::NOT_FOUND, "Not Found")),
        }
    }

    async fn read(
        &self,
        request: Request<Incoming>,
    ) -> Result<(Method, HeaderMap, Bytes), BadRequest> {
        let (head, incoming) = request.into_parts();
        let collected = Limited::new(incoming, MAX_BODY).collect().await;
        let bytes = collected
            .map_err(|error| {
                BadRequest::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("cannot read the body: {error}"),
                )
            })?
            .to_bytes();
        Ok((head.method, head.headers, bytes))
    }

    async fn complete(
        &self,
        ask: Ask,
        chat: bool,
        headers: &HeaderMap,
    ) -> Result<Response<Body>, BadRequest> {
        let model = ask.model.clone().unwrap_or_else(|| self.options.model.clone());
        let lora = self.adapter(&model)?;
        let rank = self.rank(headers)?;
        let max_tokens = ask.max_tokens.unwrap_or(self.options.default_max_tokens);
        let identity = Identity { lora, salt: ask.salt.clone(), items: ask.items.clone() };
        for tokens in &ask.prompts {
            self.check_length(tokens.len(), max_tokens)?;
        }
        let arrived = Instant::now();
        let before = self.options.pace.request();
        if !before.is_zero() {
            tokio::time::sleep(before).await;
        }
        let mut choices = Vec::with_capacity(ask.prompts.len());
        for tokens in ask.prompts {
            let prompt_tokens = tokens.len();
            let block_size = self.options.block_size;
            let sequence = Sequence::new(tokens, identity.clone(), block_size);
            let answer = self.tokenizer.answer(chat, sequence.state(), max_tokens);
            let ticket = rank
                .submit(arrived, |id| scheduler::Request { id, sequence, max_tokens, answer })
                .map_err(|refused| match refused {
                    Refusal::Full | Refusal::Stopped => {
                        BadRequest::new(StatusCode::SERVICE_UNAVAILABLE, refused.to_string())
                    }
                })?;
            choices.push(Choice::new(ticket, prompt_tokens));
        }
        let answer = Answer {
            id: request_id(chat, headers),
            chat,
            model,
            created: unix_ns() / 1_000_000_000,
            fingerprint: format!("mock-engine {} rank {}", self.options.listen, rank.number()),
            usage_at_end: ask.include_usage,
            usage_details: self.options.prompt_tokens_details,
        };
        if ask.stream {
            return Ok(answer.stream(choices, Arc::clone(&self.tokenizer)));
        }
        answer.whole(choices, &*self.tokenizer).await
    }

    /// The prompts of a body as tokens: a list for completions, one object for a chat.
    fn render(
        &self,
        bytes: &[u8],
        chat: bool,
        headers: &HeaderMap,
    ) -> Result<Response<Body>, BadRequest> {
        let Ask { model, prompts, .. } = openai::parse(bytes, chat, &*self.tokenizer)?;
        let model = model.unwrap_or_else(|| self.options.model.clone());
        self.adapter(&model)?;
        let mut rendered = Vec::with_capacity(prompts.len());
        for tokens in prompts {
            self.check_length(tokens.len(), 1)?;
            rendered.push(json!({
                "request_id": request_id(chat, headers),
                "token_ids": tokens,
                "token_offsets": null,
                "features": null,
                "model": model,
            }));
        }
        // A chat is one prompt.
        let page = if chat { rendered.pop().unwrap_or_default() } else { rendered.into() };
        Ok(json_page(&page))
    }

    /// The adapter that a served name means; none for the model itself.
    fn adapter(&self, model: &str) -> Result<Option<Lora>, BadRequest> {
        if model == self.options.model {
            return Ok(None);
        }
        match self.options.loras.iter().position(|name| name == model) {
            Some(at) => Ok(Some(Lora { id: at as u64 + 1, name: model.into() })),
            None => Err(BadRequest::unknown_model(model)),
        }
    }

    fn rank(&self, headers: &HeaderMap) -> Result<&Arc<Rank>, BadRequest> {
        let at = match headers.get(RANK) {
            None => self.turn.fetch_add(1, Ordering::Relaxed) % self.ranks.len(),
            Some(value) => value
                .to_str()
                .ok()
                .and_then(|value| value.parse().ok())
                .ok_or_else(|| BadRequest::invalid(format!("{RANK} is no number")))?,
        };
        let there = self.ranks.len();
        self.ranks
            .get(at)
            .ok_or_else(|| BadRequest::invalid(format!("{RANK} is {at}, there are {there} ranks")))
    }

    fn check_length(&self, prompt: usize, max_tokens: usize) -> Result<(), BadRequest> {
        let cache = (self.options.num_gpu_blocks.max(2) as usize - 1) * self.options.block_size;
        let most = self.options.max_model_len.min(cache);
        if prompt.saturating_add(max_tokens) <= most {
            return Ok(());
        }
        Err(BadRequest::invalid(format!(
            "This model's maximum context length is {most} tokens. However, you requested \
             {max_tokens} output tokens and your prompt contains {prompt} input tokens."
        )))
    }

    fn models(&self) -> Value {
        let options = &self.options;
        let model = |id: &str, parent: Option<&str>| {
            json!({
                "id": id, "object": "model", "created": 0, "owned_by": "vllm",
                "root": id, "parent": parent, "max_model_len": options.max_model_len,
            })
        };
        let loras = options.loras.iter().map(|lora| model(lora, Some(&options.model)));
        let all: Vec<Value> = std::iter::once(model(&options.model, None)).chain(loras).collect();
        json!({"object": "list", "data": all})
    }

    fn event_sources(&self) -> Value {
        let sources = self.ranks.iter().filter_map(|rank| rank.source()).map(|source| {
            let config = json!({
                "enable_kv_cache_events": true,
                "publisher": "zmq",
                "endpoint": source.endpoint,
                "replay_endpoint": source.replay_endpoint,
                "buffer_steps": self.options.buffer_steps,
                "topic": source.topic,
            });
            (source.rank.to_string(), config)
        });
        Value::Object(sources.collect())
    }

    async fn metrics(&self) -> Response<Body> {
        let faults = self.faults.borrow().clone();
        match faults.metrics {
            Some(MetricsFault::Error) => {
                let mut response = Response::new(body("out of order"));
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                return response;
            }
            Some(MetricsFault::Hang) => std::future::pending().await,
            Some(MetricsFault::Garbage) => {
                return Response::new(body(
                    "<html>vllm:num_requests_running{ NaN NaN\u{0}</html>\n",
                ));
            }
            None => {}
        }
        let mut ranks: Vec<_> = self.ranks.iter().map(|rank| rank.page()).collect();
        for rank in &mut ranks {
            rank.load = faults.load.unwrap_or(rank.load);
            if let Some(loras) = &faults.loras {
                rank.loras.clone_from(loras);
            }
        }
        let options = &self.options;
        let with_loras = !options.loras.is_empty() || faults.loras.is_some();
        let facts = metrics::Facts {
            model: options.model.clone(),
            block_size: options.block_size,
            num_gpu_blocks: options.num_gpu_blocks,
            max_loras: with_loras.then_some(options.max_loras),
            padding: options.metrics_padding,
        };
        let page = metrics::page(&facts, &ranks, unix_ns() as f64 / 1e9);
        with_type(body(page), "text/plain; version=1.0.0; charset=utf-8")
    }
}

/// Paths that exist.
const KNOWN: [&str; 12] = [
    "/health",
    "/ping",
    "/version",
    "/metrics",
    "/tokenize",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/completions/render",
    "/v1/chat/completions/render",
    "/kv_event_sources",
    "/reset_prefix_cache",
];

/// The name of a request: the client's, or a new one.
fn request_id(chat: bool, headers: &HeaderMap) -> String {
    let id = headers
        .get("x-request-id")
        .and_then(|id| id.to_str().ok())
        .map_or_else(|| format!("{:016x}", unix_ns()), str::to_owned);
    format!("{}-{id}", if chat { "chatcmpl" } else { "cmpl" })
}

fn body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

fn with_type(body: Body, content_type: &'static str) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn json_page(value: &Value) -> Response<Body> {
    with_type(body(value.to_string()), "application/json")
}
