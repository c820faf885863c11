//! The `ext_proc` service: a gRPC stream around an [`Exchange`] and the [`Director`].
//!
//! # Model
//!
//! A stream is one [`Session`], which is itself the stream of replies: whoever reads replies drives the
//! exchange. There is no task and no queue beside it. When a stream ends, however it ends, its session
//! is dropped, and with it all that plugins and metrics keep of it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    epp::{
        director::{Decision, Director, NOBODY, Transit},
        ext_proc::{Ask, Exchange, ExchangeConfig, Facts, Phase, Replies, headers::HeaderEdits},
        metrics::{EppMetrics, ErrorCode, Outcome, StreamGuard},
        scheduling::Ending,
    },
    proto::ext_proc::{
        ProcessingRequest, ProcessingResponse, external_processor_server::ExternalProcessor,
        processing_request::Request as Message,
    },
};

/// The service. Clones share one director.
#[derive(Clone, Debug)]
pub struct Service {
    director: Arc<Director>,
    config: Arc<ExchangeConfig>,
    metrics: EppMetrics,
}

impl Service {
    /// A service that routes by `director`.
    #[must_use]
    pub fn new(director: Arc<Director>, config: ExchangeConfig, metrics: EppMetrics) -> Self {
        Self { director, config: Arc::new(config), metrics }
    }
}

#[tonic::async_trait]
impl ExternalProcessor for Service {
    type ProcessStream = Session;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Session>, Status> {
        Ok(Response::new(Session::new(self, request.into_inner())))
    }
}

type Routing = Pin<Box<dyn Future<Output = Decision> + Send>>;

/// One exchange: replies to the messages of one stream.
pub struct Session {
    messages: Streaming<ProcessingRequest>,
    director: Arc<Director>,
    metrics: EppMetrics,
    exchange: Exchange,
    replies: Replies,
    /// The director is asked; no message is read meanwhile.
    routing: Option<Routing>,
    transit: Option<Transit>,
    clock: Clock,
    stream: StreamGuard,
    ended: bool,
}

/// When things happened.
#[derive(Debug)]
struct Clock {
    /// The stream was opened, which is with the request's headers.
    received: Instant,
    /// The response's headers.
    response: Option<Instant>,
    /// The first and the last bytes of the response's body.
    first_chunk: Option<Instant>,
    last_chunk: Option<Instant>,
    /// What the messages of a streamed response took.
    streaming: Duration,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("exchange", &self.exchange).finish_non_exhaustive()
    }
}

impl Session {
    fn new(service: &Service, messages: Streaming<ProcessingRequest>) -> Self {
        Self {
            messages,
            director: Arc::clone(&service.director),
            exchange: Exchange::new(&service.config),
            replies: Replies::new(),
            routing: None,
            transit: None,
            clock: Clock {
                received: Instant::now(),
                response: None,
                first_chunk: None,
                last_chunk: None,
                streaming: Duration::ZERO,
            },
            stream: service.metrics.stream(),
            metrics: service.metrics.clone(),
            ended: false,
        }
    }

    /// Takes a message, and answers what the exchange asks because of it.
    fn take(&mut self, message: ProcessingRequest) {
        let began = self.response_begins(&message);
        match self.exchange.receive(message, &mut self.replies) {
            None => {
                // The exchange itself refuses what is too large, before anybody has read it.
                if let Some(code) = self.exchange.facts().refused {
                    self.metrics.immediate_response(code);
                    self.metrics.request(&NOBODY).refused(code);
                }
            }
            Some(Ask::Route(inbound)) => {
                let director = Arc::clone(&self.director);
                let received = self.clock.received;
                self.routing =
                    Some(Box::pin(async move { director.route(inbound, received).await }));
            }
            Some(Ask::ResponseHeaders(_)) => {
                let mut edits = HeaderEdits::new();
                if let Some(transit) = &mut self.transit {
                    transit.response_headers(&mut edits);
                }
                self.exchange.response_headers(edits, &mut self.replies);
            }
        }
        if let Some(began) = began {
            self.response_message(began);
        }
    }

    /// The time at which a message of the response came; `None` for one of the request.
    fn response_begins(&mut self, message: &ProcessingRequest) -> Option<Instant> {
        match message.request {
            Some(
                Message::ResponseHeaders(_)
                | Message::ResponseBody(_)
                | Message::ResponseTrailers(_),
            ) => Some(Instant::now()),
            _ => None,
        }
    }

    /// Accounts for a message of the response that came at `began` and is now answered.
    fn response_message(&mut self, began: Instant) {
        let facts = self.exchange.facts();
        let clock = &mut self.clock;
        clock.response.get_or_insert(began);
        if facts.first_response_body {
            if clock.first_chunk.is_none() {
                clock.first_chunk = Some(began);
                if let Some(transit) = &mut self.transit {
                    transit.response_started();
                }
            } else if facts.streaming
                && !facts.ended
                && let Some((row, _)) = self.transit.as_ref().and_then(|t| t.metrics.as_ref())
                && let Some(last) = clock.last_chunk
            {
                row.inter_token(began.duration_since(last));
            }
            clock.last_chunk = Some(began);
        }
        if facts.streaming {
            clock.streaming += began.elapsed();
        }
        if facts.ended && !self.ended {
            self.end();
        }
    }

    /// The exchange is over, completed or not. Called once, at the end of the response or when the
    /// session is dropped.
    fn end(&mut self) {
        self.ended = true;
        let facts = self.exchange.finish();
        if let Some(begun) = self.clock.response {
            let took = if facts.streaming { self.clock.streaming } else { begun.elapsed() };
            self.metrics.response_processed(took);
        }
        // What plugins hold is released now: Envoy may keep the stream open for a while. What they say
        // goes out with the reply to the response's end, if that is why we are here.
        let mut transit = self.transit.take();
        if let Some(transit) = &mut transit {
            let report = transit.ended(&Ending {
                completed: facts.phase == Phase::Ended,
                status: facts.response_status,
                usage: facts.usage,
                served: facts.served.as_deref(),
            });
            self.replies.report(&report.numbers);
        }
        let known = transit.as_ref().and_then(|transit| transit.metrics.as_ref());
        let row = || match known {
            Some((row, _running)) => Arc::clone(row),
            // A request without a body, or none at all: nobody knows the model.
            None => self.metrics.request(&NOBODY),
        };
        match facts.response_status {
            Some(status) if status != 200 => row().failed(ErrorCode::ModelServer),
            _ if facts.phase == Phase::Ended
                && (known.is_some() || facts.response_status.is_some()) =>
            {
                row().finished(&self.clock.outcome(facts));
            }
            // Given up by the client or the proxy, or never begun.
            _ => {}
        }
    }

    /// Is it on us to end the stream? After an answer of ours, and where nobody looks at the response.
    /// Else Envoy resets the stream with the end of its request, and an end of ours would be one
    /// message more.
    fn hangs_up(&self) -> bool {
        self.exchange.is_finished() && self.exchange.facts().phase != Phase::Ended
    }

    /// The stream of messages ended.
    fn close(&mut self, fault: Option<&Status>) {
        let code = fault.map_or(Code::Ok, Status::code);
        self.stream.set_code(code);
        match code {
            // How Envoy ends every exchange.
            Code::Ok | Code::Cancelled => {}
            _ => {
                let transit = self.transit.as_ref();
                if let Some((row, _)) = transit.and_then(|transit| transit.metrics.as_ref()) {
                    row.failed(ErrorCode::Unknown);
                }
                let id = transit.map(|transit| &*transit.id).unwrap_or_default();
                tracing::warn!(x_request_id = id, ?code, "An ext_proc stream broke off.");
            }
        }
    }
}

impl Clock {
    fn outcome(&self, facts: &Facts) -> Outcome {
        Outcome {
            duration: self.received.elapsed(),
            ttft: self.first_chunk.map(|first| first.duration_since(self.received)),
            streaming: facts.streaming,
            usage: facts.usage.unwrap_or_default(),
            response_bytes: facts.response_bytes,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            self.end();
        }
    }
}

impl Stream for Session {
    type Item = Result<ProcessingResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let session = self.get_mut();
        loop {
            if let Some(reply) = session.replies.pop() {
                return Poll::Ready(Some(Ok(reply)));
            }
            if let Some(routing) = &mut session.routing {
                let Decision { answer, transit } = ready!(routing.as_mut().poll(context));
                session.routing = None;
                session.transit = Some(transit);
                session.exchange.routed(answer, &mut session.replies);
                continue;
            }
            if session.hangs_up() {
                session.stream.set_code(Code::Ok);
                return Poll::Ready(None);
            }
            match ready!(Pin::new(&mut session.messages).poll_next(context)) {
                Some(Ok(message)) => session.take(message),
                Some(Err(fault)) => {
                    session.close(Some(&fault));
                    if !session.ended {
                        session.end();
                    }
                    // Envoy takes a stream that ends well for our consent, whatever it still waits for.
                    return Poll::Ready(match fault.code() {
                        Code::Cancelled => None,
                        _ => Some(Err(fault)),
                    });
                }
                None => {
                    session.close(None);
                    return Poll::Ready(None);
                }
            }
        }
    }
}
