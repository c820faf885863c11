//! Tokens from an engine: vLLM's `/v1/completions/render` and `/v1/chat/completions/render`, which it has
//! with `--enable-scale-out`, and which `vllm launch render` has alone.
//!
//! # Concurrency
//!
//! A connection for each call, closed behind it. A kept one belongs to the runtime that drives it, and
//! requests come from several; to connect to a renderer on the same host or pod is cheap beside what
//! it does.
//!
//! # Failure
//!
//! A renderer that is not there, or answers what is no answer, is [`TokenizeError::Unavailable`]; one that
//! refuses the input with 400 or 422, [`TokenizeError::Invalid`]. At most 64 MiB of an answer are read.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request, StatusCode, Uri,
    client::conn::http1,
    header::{CONNECTION, CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use memchr::{memchr2, memmem};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::net::TcpStream;

use super::{Input, Tokenize, TokenizeError, Tokenized};
use crate::hash::MultimodalItem;

/// Longest answer that is read, bytes. Features of pictures come in it, too.
const MAX_ANSWER: usize = 64 << 20;
/// Longest reason that is passed on, characters.
const MAX_REASON: usize = 200;
/// What only chats with pictures and such have. In a text they make the wait longer, no more.
const MEDIA: [&str; 5] =
    ["\"image_url\"", "\"input_audio\"", "\"audio_url\"", "\"video_url\"", "\"image_pil\""];

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderConfig {
    /// `http://host:port` of the engine or of `vllm launch render`.
    pub url: String,
    /// The model's name there; empty: that of the request.
    pub model: String,
    /// For text.
    pub timeout: Duration,
    /// For chats with pictures and such.
    pub multimodal_timeout: Duration,
}

impl Default for RenderConfig {
    /// An engine on this host; 5 s, 30 s for pictures and such.
    fn default() -> Self {
        Self {
            url: "http://localhost:8000".to_owned(),
            model: String::new(),
            timeout: Duration::from_secs(5),
            multimodal_timeout: Duration::from_secs(30),
        }
    }
}

/// Asks an engine.
#[derive(Debug)]
pub struct Render {
    config: RenderConfig,
    host: String,
    port: u16,
    /// `host:port` as the URL has it.
    authority: String,
    /// Path of the URL, without a slash at its end.
    base: String,
}

impl Render {
    /// A client; nothing is asked yet.
    ///
    /// # Errors
    ///
    /// A URL that is none, in words.
    pub fn new(config: RenderConfig) -> Result<Self, String> {
        let url = &config.url;
        let uri: Uri = url.parse().map_err(|error| format!("{url:?} is no URL: {error}"))?;
        if uri.scheme_str() != Some("http") {
            return Err(format!("{url:?} does not begin with http://"));
        }
        let authority = uri.authority().ok_or_else(|| format!("{url:?} names no host"))?;
        if uri.query().is_some() || authority.as_str().contains('@') {
            return Err(format!("{url:?} has more than host, port and path"));
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let port = authority.port_u16().unwrap_or(80);
        let (authority, base) =
            (authority.to_string(), uri.path().trim_end_matches('/').to_owned());
        Ok(Self { config, host, port, authority, base })
    }

    fn model<'a>(&'a self, of_request: &'a str) -> &'a str {
        if self.config.model.is_empty() { of_request } else { &self.config.model }
    }

    /// Posts a body and reads the answer to it.
    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, TokenizeError> {
        let request = Request::post(format!("{}{path}", self.base))
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json")
            .header(CONNECTION, "close")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.unavailable(error))?;
        let address = (self.host.as_str(), self.port);
        let stream = TcpStream::connect(address).await.map_err(|error| self.unavailable(error))?;
        // The request may be two segments; the second one must not wait for an acknowledgement.
        stream.set_nodelay(true).map_err(|error| self.unavailable(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unavailable(error))?;
        let exchange = async {
            let response =
                sender.send_request(request).await.map_err(|error| self.unavailable(error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok((status, body.map_err(|error| self.unavailable(error))?.to_bytes()))
        };
        // The connection may end before the body was taken out of it; the exchange notices both
        // ends, so it alone decides.
        let drive = async {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "Connection to a renderer ended.");
            }
            std::future::pending::<std::convert::Infallible>().await
        };
        let (status, answer) = tokio::select! {
            biased;
            result = exchange => result,
            never = drive => match never {},
        }?;
        match status {
            StatusCode::OK => {
                serde_json::from_slice(&answer).map_err(|error| self.unavailable(error))
            }
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => {
                Err(TokenizeError::Invalid(reason(&answer)))
            }
            _ => Err(self.unavailable(format!("{status}: {}", reason(&answer)))),
        }
    }

    fn unavailable(&self, why: impl std::fmt::Display) -> TokenizeError {
        TokenizeError::Unavailable(format!("renderer {}: {why}", self.authority))
    }
}

#[tonic::async_trait]
impl Tokenize for Render {
    async fn tokenize(&self, model: &str, input: Input) -> Result<Tokenized, TokenizeError> {
        let model = self.model(model);
        let media = matches!(&input, Input::Chat(body) if has_media(body));
        let asked = async {
            match input {
                Input::Text { text, add_special_tokens } => {
                    let body = serde_json::json!({
                        "model": model,
                        "prompt": &*text,
                        "add_special_tokens": add_special_tokens,
                    });
                    let path = "/v1/completions/render";
                    let prompts: Vec<Rendered> =
                        self.post(path, body.to_string().into_bytes()).await?;
                    match <[Rendered; 1]>::try_from(prompts) {
                        Ok([prompt]) => Ok(prompt),
                        Err(prompts) => {
                            Err(self
                                .unavailable(format!("{} prompts came back of one", prompts.len())))
                        }
                    }
                }
                Input::Chat(body) => {
                    self.post("/v1/chat/completions/render", with_model(&body, model)).await
                }
            }
        };
        let timeout = if media { self.config.multimodal_timeout } else { self.config.timeout };
        let rendered = tokio::time::timeout(timeout, asked).await;
        rendered.map_err(|_| TokenizeError::Late)??.tokenized().map_err(|why| self.unavailable(why))
    }
}

/// A prompt as the engine would see it; the rest of the answer does not matter.
#[derive(Debug, Deserialize)]
struct Rendered {
    token_ids: Vec<u32>,
    #[serde(default)]
    features: Option<Features>,
}

#[derive(Debug, Deserialize)]
struct Features {
    /// By modality, as the next one.
    #[serde(default)]
    mm_hashes: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    mm_placeholders: BTreeMap<String, Vec<Placeholder>>,
}

#[derive(Debug, Deserialize)]
struct Placeholder {
    offset: u32,
    length: u32,
}

impl Rendered {
    fn tokenized(self) -> Result<Tokenized, String> {
        let mut items = Vec::new();
        if let Some(Features { mm_hashes, mut mm_placeholders }) = self.features {
            for (modality, hashes) in mm_hashes {
                let places = mm_placeholders.remove(&modality).unwrap_or_default();
                if places.len() != hashes.len() {
                    return Err(format!(
                        "{} hashes and {} places of {modality:?}",
                        hashes.len(),
                        places.len()
                    ));
                }
                for (hash, Placeholder { offset, length }) in hashes.into_iter().zip(places) {
                    items.push(MultimodalItem { hash, offset, length });
                }
            }
            if let Some(modality) = mm_placeholders.keys().next() {
                return Err(format!("places of {modality:?} without hashes"));
            }
        }
        Ok(Tokenized { ids: self.token_ids.into(), items: items.into() })
    }
}

/// The message of an error, or the beginning of whatever it is.
fn reason(answer: &[u8]) -> String {
    let value: Option<serde_json::Value> = serde_json::from_slice(answer).ok();
    let message = value.as_ref().and_then(|value| {
        value.get("error").unwrap_or(value).get("message")?.as_str().map(str::to_owned)
    });
    let text = message.unwrap_or_else(|| String::from_utf8_lossy(answer).into_owned());
    text.chars().take(MAX_REASON).collect()
}

fn has_media(body: &[u8]) -> bool {
    MEDIA.iter().any(|name| memmem::find(body, name.as_bytes()).is_some())
}

/// The body with another model. Everything else stays as it is: templates print tools in the order in
/// which they were written.
fn with_model(body: &[u8], model: &str) -> Vec<u8> {
    let model = serde_json::Value::from(model).to_string();
    let mut out = Vec::with_capacity(body.len() + model.len());
    let mut from = 0;
    for span in values_of(body, b"model") {
        out.extend_from_slice(&body[from..span.start]);
        out.extend_from_slice(model.as_bytes());
        from = span.end;
    }
    out.extend_from_slice(&body[from..]);
    out
}

/// Where the values of a key at the top of a JSON object are. The object is taken for granted; nothing
/// is found in what is none, or nonsense, but within its bounds.
fn values_of(body: &[u8], key: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let (mut at, mut depth) = (0, 0_usize);
    // The string that was read last at the top, and where the value behind the colon begins.
    let mut name: &[u8] = b"";
    let mut value = None;
    while let Some(&byte) = body.get(at) {
        let start = at;
        at += 1;
        match byte {
            b'"' => {
                at = end_of_string(body, at);
                if depth == 1 && value.is_none() {
                    name = &body[start + 1..at.saturating_sub(1).max(start + 1)];
                }
            }
            b'{' | b'[' => depth += 1,
            b':' if depth == 1 => value = Some(at),
            b',' | b'}' | b']' => {
                if depth == 1
                    && let Some(value) = value.take()
                    && name == key
                {
                    found.push(value..start);
                }
                if byte != b',' {
                    depth = depth.saturating_sub(1);
                }
            }
            _ => {}
        }
    }
    found
}

/// Behind the closing quote of a string whose text begins at `at`.
fn end_of_string(body: &[u8], mut at: usize) -> usize {
    while let Some(next) = body.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        at += next;
        if body[at] == b'"' {
            return at + 1;
        }
        at += 2;
    }
    body.len()
}

#[cfg(test)]
mod tests;
