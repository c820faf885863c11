//! The answers of a streaming call, produced one at a time and only when the transport asks.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio_stream::Stream;
use tonic::Status;

type Step<T, S> = Pin<Box<dyn Future<Output = Option<(Result<T, Status>, S)>> + Send>>;

/// A stream from a state and a step: the step turns the state into the next answer and state, or
/// into `None`, the end. Nothing runs ahead of the transport, which is the back-pressure.
pub struct Answers<T> {
    inner: Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>,
}

impl<T: Send + 'static> Answers<T> {
    pub(super) fn new<S, F, N>(state: S, mut step: F) -> Self
    where
        S: Send + Unpin + 'static,
        F: FnMut(S) -> N + Send + Unpin + 'static,
        N: Future<Output = Option<(Result<T, Status>, S)>> + Send + 'static,
    {
        let step = move |state| Box::pin(step(state)) as Step<T, S>;
        Self { inner: Box::pin(Unfold { state: Some(state), step, running: None }) }
    }
}

impl<T> fmt::Debug for Answers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answers").finish_non_exhaustive()
    }
}

impl<T> Stream for Answers<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(cx)
    }
}

struct Unfold<T, S, F> {
    state: Option<S>,
    step: F,
    running: Option<Step<T, S>>,
}

impl<T, S, F> Stream for Unfold<T, S, F>
where
    S: Unpin,
    F: FnMut(S) -> Step<T, S> + Unpin,
{
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(state) = this.state.take() {
            this.running = Some((this.step)(state));
        }
        let Some(running) = this.running.as_mut() else { return Poll::Ready(None) };
        let next = ready!(running.as_mut().poll(cx));
        this.running = None;
        Poll::Ready(next.map(|(answer, state)| {
            this.state = Some(state);
            answer
        }))
    }
}
