//! A pod that computes nothing: the yardstick for what is in front of it.
//!
//! Every request is answered at once, whole bodies read: `GET /metrics` with an idle engine's load, all
//! else with one completion.

use std::{convert::Infallible, io};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// What `GET /metrics` says.
const METRICS: &str = "vllm:num_requests_waiting 0\n\
                       vllm:num_requests_running 0\n\
                       vllm:kv_cache_usage_perc 0.1\n";
/// What anything else says.
const COMPLETION: &str = r#"{"id":"cmpl-1","object":"chat.completion","model":"bench-model","choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}],"usage":{"prompt_tokens":512,"completion_tokens":8,"total_tokens":520}}"#;

/// Serves until `stop`; connections that are open then are closed.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve(listener: TcpListener, stop: CancellationToken) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            // Ended ones are forgotten.
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted?,
        };
        stream.set_nodelay(true)?;
        let connection =
            http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
        connections.spawn(async move {
            // A client that went away is no fault of ours.
            drop(connection.await);
        });
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let metrics = request.uri().path() == "/metrics";
    let mut body = request.into_body();
    while let Some(Ok(_)) = body.frame().await {}
    let (content_type, text) =
        if metrics { ("text/plain", METRICS) } else { ("application/json", COMPLETION) };
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    Ok(response)
}
