//! One exchange, from Envoy's side.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{messages, traffic::Traffic};
use crate::proto::ext_proc::{
    BodyResponse, ProcessingRequest, ProcessingResponse, body_mutation::Mutation,
    external_processor_client::ExternalProcessorClient, processing_response::Response,
};

/// Why an exchange gave no pick, or did not end as it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The stream failed.
    #[error("gRPC status {0:?}: {1}")]
    Status(Code, String),
    /// The client would have got an answer of the endpoint picker's.
    #[error("immediate response {0}: {1}")]
    Immediate(i32, String),
    /// The stream ended before everything was answered.
    #[error("the stream ended early")]
    Ended,
    /// The body that came back is not the one that was sent.
    #[error("{got} of {sent} body bytes came back")]
    Body {
        /// Bytes in the answers.
        got: usize,
        /// Bytes sent.
        sent: usize,
    },
    /// A message that does not belong here.
    #[error("unexpected answer {0}")]
    Unexpected(&'static str),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Status(status.code(), status.message().to_owned())
    }
}

/// One exchange.
#[derive(Debug)]
pub(super) struct Session<'a> {
    traffic: &'a Traffic,
    serial: u64,
}

/// The messages of a request: everything up to the end of the body at once, then what the channel
/// brings.
#[derive(Debug)]
pub(in crate::loadgen) struct Outgoing {
    pub(in crate::loadgen) first: std::vec::IntoIter<ProcessingRequest>,
    pub(in crate::loadgen) then: mpsc::Receiver<ProcessingRequest>,
}

impl Stream for Outgoing {
    type Item = ProcessingRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.first.next() {
            Some(message) => Poll::Ready(Some(message)),
            None => self.then.poll_recv(context),
        }
    }
}

impl<'a> Session<'a> {
    /// An exchange with a number of its own, which chooses its body.
    #[must_use]
    pub(super) fn new(traffic: &'a Traffic, serial: u64) -> Self {
        Self { traffic, serial }
    }

    /// Runs it and drops the stream, which resets it. Returns when the routing answer came.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub(super) async fn run(
        self,
        client: &mut ExternalProcessorClient<Channel>,
    ) -> Result<Instant, Failure> {
        let body = self.traffic.body(self.serial);
        let sent = body.len();
        let id = format!("00000000-0000-4000-8000-{:012x}", self.serial);
        let first = vec![
            messages::request_headers("/v1/chat/completions", &id, sent),
            messages::request_body(body, false),
            messages::request_body(bytes::Bytes::new(), true),
        ];
        let (more, then) = mpsc::channel(self.traffic.response.len().max(1));
        let outgoing = Outgoing { first: first.into_iter(), then };
        let mut answers = client.process(outgoing).await?.into_inner();

        match next(&mut answers).await? {
            Response::RequestHeaders(_) => {}
            _ => return Err(Failure::Unexpected("instead of the header mutation")),
        }
        let answered = Instant::now();
        let got = body_bytes(&mut answers, |response| match response {
            Response::RequestBody(body) => Some(body),
            _ => None,
        })
        .await?;
        if got != sent {
            return Err(Failure::Body { got, sent });
        }
        if !self.traffic.response.is_empty() {
            for message in &self.traffic.response {
                // A server that went away shows at the next answer.
                more.try_send(message.clone()).ok();
            }
            match next(&mut answers).await? {
                Response::ResponseHeaders(_) => {}
                _ => return Err(Failure::Unexpected("instead of response headers")),
            }
            body_bytes(&mut answers, |response| match response {
                Response::ResponseBody(body) => Some(body),
                _ => None,
            })
            .await?;
        }
        Ok(answered)
    }
}

async fn next(answers: &mut Streaming<ProcessingResponse>) -> Result<Response, Failure> {
    let answer = answers.message().await?.ok_or(Failure::Ended)?;
    match answer.response.ok_or(Failure::Unexpected("without content"))? {
        Response::ImmediateResponse(said) => Err(Failure::Immediate(
            said.status.map_or(0, |status| status.code),
            String::from_utf8_lossy(&said.body).into_owned(),
        )),
        response => Ok(response),
    }
}

/// Reads body answers up to the one that ends the body; returns their bytes.
async fn body_bytes(
    answers: &mut Streaming<ProcessingResponse>,
    of: impl Fn(Response) -> Option<BodyResponse>,
) -> Result<usize, Failure> {
    let mut bytes = 0;
    loop {
        let body = of(next(answers).await?).ok_or(Failure::Unexpected("instead of a body"))?;
        let mutation = body.response.and_then(|common| common.body_mutation?.mutation);
        let Some(Mutation::StreamedResponse(piece)) = mutation else {
            return Err(Failure::Unexpected("body without a streamed response"));
        };
        bytes += piece.body.len();
        if piece.end_of_stream {
            return Ok(bytes);
        }
    }
}
