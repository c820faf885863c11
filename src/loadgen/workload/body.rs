//! A prompt as the body of a request.

use bytes::Bytes;

use super::Planned;

/// What the prompt of a request looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BodyForm {
    /// Token ids to `/v1/completions`: exact blocks, no tokenizer.
    #[default]
    Ids,
    /// Words to `/v1/completions`.
    Text,
    /// Words of one user message to `/v1/chat/completions`.
    Chat,
}

/// Writes bodies, and remembers, bounded, how parts look.
#[derive(Debug)]
pub struct BodyWriter {
    form: BodyForm,
}

impl BodyWriter {
    /// Bodies for a served model, streamed, with usage at the end.
    #[must_use]
    pub fn new(form: BodyForm, model: &str) -> Self {
        let _ = model;
        Self { form }
    }

    /// Where these bodies go.
    #[must_use]
    pub fn path(&self) -> &'static str {
        match self.form {
            BodyForm::Ids | BodyForm::Text => "/v1/completions",
            BodyForm::Chat => "/v1/chat/completions",
        }
    }

    /// The body of a request, in pieces that follow each other.
    pub fn write(&mut self, request: &Planned) -> Vec<Bytes> {
        let _ = request;
        Vec::new()
    }
}
