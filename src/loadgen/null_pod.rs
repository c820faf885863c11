//! A pod that computes nothing: the yardstick for what is in front of it.
//!
//! Every request is answered at once, whole bodies read: `GET /metrics` with an idle engine's load, all
//! else with one completion; [`serve_streams`] streams it to whoever asks for a stream.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::{BodyExt as _, Either, Full};
use hyper::{
    body::{Body, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// What `GET /metrics` says.
const METRICS: &str = "vllm:num_requests_waiting 0\n\
                       vllm:num_requests_running 0\n\
                       vllm:kv_cache_usage_perc 0.1\n";
/// What anything else says.
const COMPLETION: &str = r#"{"id":"cmpl-1","object":"chat.completion","model":"bench-model","choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}],"usage":{"prompt_tokens":512,"completion_tokens":8,"total_tokens":520}}"#;

/// One piece of a stream.
const PIECE: &[u8] = b"data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"bench-model\",\"choices\":[{\"index\":0,\"text\":\" word\",\"logprobs\":null,\"finish_reason\":null}]}\n\n";
/// What a stream used.
const USAGE: &[u8] = b"data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"bench-model\",\"choices\":[],\"usage\":{\"prompt_tokens\":512,\"completion_tokens\":16,\"total_tokens\":528,\"prompt_tokens_details\":{\"cached_tokens\":256}}}\n\n";
/// The end of a stream.
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Serves until `stop`; connections that are open then are closed.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve(listener: TcpListener, stop: CancellationToken) -> io::Result<()> {
    serve_streams(listener, 0, stop).await
}

/// [`serve`], with so many pieces for requests whose body has `"stream":true`, each written by itself; 0
/// = they are answered as all others.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve_streams(
    listener: TcpListener,
    pieces: usize,
    stop: CancellationToken,
) -> io::Result<()> {
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
        let connection = http1::Builder::new().serve_connection(
            TokioIo::new(stream),
            service_fn(move |request| answer(request, pieces)),
        );
        connections.spawn(async move {
            // A client that went away is no fault of ours.
            drop(connection.await);
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    pieces: usize,
) -> Result<Response<Either<Full<Bytes>, Pieces>>, Infallible> {
    let metrics = request.uri().path() == "/metrics";
    let mut body = request.into_body();
    let mut streams = false;
    while let Some(Ok(frame)) = body.frame().await {
        let data = frame.data_ref().map_or(&[][..], |data| data);
        streams |= pieces > 0 && memchr::memmem::find(data, br#""stream":true"#).is_some();
    }
    let (content_type, body) = if streams {
        ("text/event-stream", Either::Right(Pieces { left: pieces + 2, waits: false }))
    } else if metrics {
        ("text/plain", Either::Left(Full::new(Bytes::from_static(METRICS.as_bytes()))))
    } else {
        ("application/json", Either::Left(Full::new(Bytes::from_static(COMPLETION.as_bytes()))))
    };
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    Ok(response)
}

/// The body of a stream.
struct Pieces {
    /// With usage and end.
    left: usize,
    /// Is the piece before to be written first?
    waits: bool,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if std::mem::replace(&mut self.waits, false) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let data = match self.left {
            0 => return Poll::Ready(None),
            1 => DONE,
            2 => USAGE,
            _ => PIECE,
        };
        self.left -= 1;
        self.waits = self.left > 0;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(data)))))
    }
}
