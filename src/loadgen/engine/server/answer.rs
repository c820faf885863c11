//! Answers to completions: whole, or as server-sent events.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http_body_util::BodyExt as _;
use hyper::{
    Response, StatusCode,
    body::{Body as HttpBody, Bytes, Frame},
};
use serde_json::{Value, json};

use super::{BadRequest, Body, json_page, with_type};
use crate::loadgen::engine::{rank::Ticket, tokenizer::Tokenizer};

/// What is the same in all parts of an answer.
pub(super) struct Answer {
    pub(super) id: String,
    pub(super) chat: bool,
    pub(super) model: String,
    /// Seconds since the Unix epoch.
    pub(super) created: u64,
    pub(super) fingerprint: String,
    /// Does the last event tell what was used?
    pub(super) usage_at_end: bool,
    /// Does it tell how many tokens were cached?
    pub(super) usage_details: bool,
}

/// One prompt's answer.
pub(super) struct Choice {
    ticket: Ticket,
    prompt_tokens: usize,
    cached_tokens: usize,
    made: usize,
    done: bool,
}

impl Choice {
    pub(super) fn new(ticket: Ticket, prompt_tokens: usize) -> Self {
        Self { ticket, prompt_tokens, cached_tokens: 0, made: 0, done: false }
    }
}

impl Answer {
    /// The answer in one piece.
    pub(super) async fn whole(
        self,
        mut choices: Vec<Choice>,
        tokenizer: &dyn Tokenizer,
    ) -> Result<Response<Body>, BadRequest> {
        let mut parts = Vec::with_capacity(choices.len());
        for (at, choice) in choices.iter_mut().enumerate() {
            let mut text = String::new();
            while !choice.done {
                let Some(output) = choice.ticket.outputs.recv().await else {
                    let status = StatusCode::INTERNAL_SERVER_ERROR;
                    return Err(BadRequest::new(status, "the engine is stopping"));
                };
                choice.made += 1;
                choice.cached_tokens = output.cached_tokens;
                choice.done = output.last;
                text.push_str(&tokenizer.decode(output.token));
            }
            let mut part = json!({
                "index": at, "logprobs": null, "finish_reason": "length", "stop_reason": null,
            });
            if self.chat {
                part["message"] = json!({"role": "assistant", "content": text});
            } else {
                part["text"] = text.into();
            }
            parts.push(part);
        }
        let object = if self.chat { "chat.completion" } else { "text_completion" };
        let mut page = self.envelope(object);
        page["choices"] = parts.into();
        page["usage"] = self.usage(&choices);
        Ok(json_page(&page))
    }

    /// The answer token by token.
    pub(super) fn stream(
        self,
        choices: Vec<Choice>,
        tokenizer: Arc<dyn Tokenizer>,
    ) -> Response<Body> {
        let stage = Stage::Tokens;
        let events = Events { answer: self, choices, tokenizer, stage };
        with_type(events.boxed_unsync(), "text/event-stream; charset=utf-8")
    }

    fn envelope(&self, object: &str) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        })
    }

    fn usage(&self, choices: &[Choice]) -> Value {
        let prompt: usize = choices.iter().map(|choice| choice.prompt_tokens).sum();
        let made: usize = choices.iter().map(|choice| choice.made).sum();
        let cached: usize = choices.iter().map(|choice| choice.cached_tokens).sum();
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": self.usage_details.then(|| json!({"cached_tokens": cached})),
        })
    }

    fn chunk(&self, choices: Value) -> Value {
        let object = if self.chat { "chat.completion.chunk" } else { "text_completion" };
        let mut chunk = self.envelope(object);
        chunk["choices"] = choices;
        chunk
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Tokens,
    Usage,
    Done,
    Over,
}

/// The body of a streamed answer. Dropping it aborts what is not done.
struct Events {
    answer: Answer,
    choices: Vec<Choice>,
    tokenizer: Arc<dyn Tokenizer>,
    stage: Stage,
}

impl Events {
    /// The next token of any choice, as an event.
    fn poll_token(&mut self, context: &mut Context<'_>) -> Poll<Option<Value>> {
        let mut open = false;
        for (at, choice) in self.choices.iter_mut().enumerate().filter(|(_, it)| !it.done) {
            open = true;
            match choice.ticket.outputs.poll_recv(context) {
                Poll::Pending => {}
                // The engine stops: the stream ends without its end mark.
                Poll::Ready(None) => {
                    self.stage = Stage::Over;
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(output)) => {
                    choice.made += 1;
                    choice.cached_tokens = output.cached_tokens;
                    choice.done = output.last;
                    let text = self.tokenizer.decode(output.token);
                    let reason = output.last.then_some("length");
                    let mut part = json!({"index": at, "logprobs": null, "finish_reason": reason});
                    if self.answer.chat {
                        part["delta"] = json!({"content": text});
                        if output.first {
                            part["delta"]["role"] = "assistant".into();
                        }
                    } else {
                        part["text"] = text.into();
                    }
                    return Poll::Ready(Some(self.answer.chunk(json!([part]))));
                }
            }
        }
        if open { Poll::Pending } else { Poll::Ready(None) }
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<String>> {
        if self.stage == Stage::Tokens {
            match self.poll_token(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(chunk)) => return Poll::Ready(Some(chunk.to_string())),
                Poll::Ready(None) if self.stage == Stage::Over => return Poll::Ready(None),
                Poll::Ready(None) if self.answer.usage_at_end => self.stage = Stage::Usage,
                Poll::Ready(None) => self.stage = Stage::Done,
            }
        }
        match self.stage {
            Stage::Usage => {
                self.stage = Stage::Done;
                let mut chunk = self.answer.chunk(json!([]));
                chunk["usage"] = self.answer.usage(&self.choices);
                Poll::Ready(Some(chunk.to_string()))
            }
            Stage::Done => {
                self.stage = Stage::Over;
                Poll::Ready(Some("[DONE]".to_owned()))
            }
            Stage::Tokens | Stage::Over => Poll::Ready(None),
        }
    }
}

impl HttpBody for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.poll_event(context)
            .map(|event| event.map(|data| Ok(Frame::data(format!("data: {data}\n\n").into()))))
    }
}
