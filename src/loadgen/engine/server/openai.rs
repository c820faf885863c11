//! Bodies of OpenAI requests, and what is wrong with them.

use hyper::{Response, StatusCode};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::json;

use super::{Body, json_page};
use crate::loadgen::engine::{sequence::Item, tokenizer::Tokenizer};

/// Prompts of one request at most.
const MAX_PROMPTS: usize = 64;

/// Why a request is not served, as OpenAI's API says it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {message}")]
pub(super) struct BadRequest {
    status: StatusCode,
    message: String,
    param: Option<&'static str>,
}

impl BadRequest {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn unknown_model(model: &str) -> Self {
        let message = format!("The model `{model}` does not exist.");
        Self { param: Some("model"), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    pub(super) fn response(&self) -> Response<Body> {
        let kind = match self.status {
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::BAD_REQUEST => "BadRequestError",
            StatusCode::FORBIDDEN => "PermissionDeniedError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            _ => "InvalidRequestError",
        };
        let mut response = json_page(&json!({"error": {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.status.as_u16(),
        }}));
        *response.status_mut() = self.status;
        response
    }
}

/// What a client wants.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ask {
    pub(super) model: Option<String>,
    /// Tokens of each prompt, at least one prompt of at least one token.
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) items: Vec<Item>,
    pub(super) max_tokens: Option<usize>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) salt: Option<String>,
}

#[derive(Deserialize)]
struct CompletionBody {
    prompt: Prompt,
    #[serde(default = "yes")]
    add_special_tokens: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct Common {
    model: Option<String>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    cache_salt: Option<String>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// Reads a body.
pub(super) fn parse(
    bytes: &[u8],
    chat: bool,
    tokenizer: &dyn Tokenizer,
) -> Result<Ask, BadRequest> {
    let common: Common = json_of(bytes)?;
    let (prompts, items) = if chat {
        let (prompt, items) = tokenizer.chat(bytes).map_err(BadRequest::invalid)?;
        (vec![prompt], items)
    } else {
        (prompt_tokens(json_of(bytes)?, tokenizer)?, Vec::new())
    };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(BadRequest::invalid("a prompt has at least one token"));
    }
    if prompts.len() > MAX_PROMPTS {
        return Err(BadRequest::invalid(format!("more than {MAX_PROMPTS} prompts")));
    }
    let max_tokens = common.max_completion_tokens.or(common.max_tokens);
    if max_tokens == Some(0) {
        return Err(BadRequest::invalid("max_tokens is at least 1"));
    }
    if common.cache_salt.as_deref() == Some("") {
        return Err(BadRequest::invalid("cache_salt is not empty"));
    }
    Ok(Ask {
        model: common.model,
        prompts,
        items,
        max_tokens,
        stream: common.stream.unwrap_or(false),
        include_usage: common.stream_options.and_then(|it| it.include_usage).unwrap_or(false),
        salt: common.cache_salt,
    })
}

/// Tokens of a `/tokenize` body: a prompt, or messages.
pub(super) fn tokenize(bytes: &[u8], tokenizer: &dyn Tokenizer) -> Result<Vec<u32>, BadRequest> {
    #[derive(Deserialize)]
    struct Body {
        prompt: Option<String>,
        messages: Option<IgnoredAny>,
        #[serde(default = "yes")]
        add_special_tokens: bool,
    }
    match json_of(bytes)? {
        Body { prompt: Some(prompt), add_special_tokens, .. } => {
            tokenizer.text(&prompt, add_special_tokens).map_err(BadRequest::invalid)
        }
        Body { messages: Some(_), .. } => {
            tokenizer.chat(bytes).map(|(tokens, _)| tokens).map_err(BadRequest::invalid)
        }
        _ => Err(BadRequest::invalid("neither prompt nor messages")),
    }
}

fn json_of<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, BadRequest> {
    serde_json::from_slice(bytes).map_err(|error| BadRequest::invalid(error.to_string()))
}

fn prompt_tokens(
    body: CompletionBody,
    tokenizer: &dyn Tokenizer,
) -> Result<Vec<Vec<u32>>, BadRequest> {
    let tokens =
        |text: &str| tokenizer.text(text, body.add_special_tokens).map_err(BadRequest::invalid);
    match body.prompt {
        Prompt::Text(text) => Ok(vec![tokens(&text)?]),
        Prompt::Tokens(tokens) => Ok(vec![tokens]),
        Prompt::Texts(texts) => texts.iter().map(|text| tokens(text)).collect(),
        Prompt::TokenLists(lists) => Ok(lists),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loadgen::engine::tokenizer::pieces::{IMAGE_TOKENS, Pieces};

    fn completion(body: &str) -> Result<Ask, BadRequest> {
        parse(body.as_bytes(), false, &Pieces)
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        let prompts = |body| completion(body).unwrap().prompts;
        assert_eq!(prompts(r#"{"prompt": [1, 2]}"#), [[1, 2]]);
        assert_eq!(prompts(r#"{"prompt": [[1, 2], [3]]}"#), [vec![1, 2], vec![3]]);
        assert_eq!(prompts(r#"{"prompt": "a b"}"#), [Pieces.encode("a b")]);
        let two = prompts(r#"{"prompt": ["a", "b"]}"#);
        assert_eq!(two, [Pieces.encode("a"), Pieces.encode("b")]);
    }

    #[test]
    fn options_are_read() {
        let ask = completion(
            r#"{"model": "m", "prompt": [1], "max_tokens": 3, "stream": true,
                "stream_options": {"include_usage": true}, "cache_salt": "s", "temperature": 0}"#,
        );
        assert_eq!(
            ask.unwrap(),
            Ask {
                model: Some("m".to_owned()),
                prompts: vec![vec![1]],
                items: vec![],
                max_tokens: Some(3),
                stream: true,
                include_usage: true,
                salt: Some("s".to_owned()),
            }
        );
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for wrong in [
            "",
            "[]",
            "{}",
            r#"{"prompt": []}"#,
            r#"{"prompt": ""}"#,
            r#"{"prompt": [[1], []]}"#,
            r#"{"prompt": [-1]}"#,
            r#"{"prompt": [1], "max_tokens": 0}"#,
            r#"{"prompt": [1], "max_tokens": -1}"#,
            r#"{"prompt": [1], "cache_salt": ""}"#,
        ] {
            assert_eq!(completion(wrong).unwrap_err().status, StatusCode::BAD_REQUEST, "{wrong}");
        }
        assert!(parse(br#"{"messages": []}"#, true, &Pieces).is_err());
    }

    #[test]
    fn a_longer_conversation_begins_with_the_shorter_one() {
        let of = |body: &str| parse(body.as_bytes(), true, &Pieces).unwrap();
        let short = of(r#"{"messages": [{"role": "user", "content": "hi there"}]}"#);
        let long = of(r#"{"messages": [{"role": "user", "content": [{"type": "text", "text":
            "hi there"}]}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}"#);
        assert!(long.prompts[0].starts_with(&short.prompts[0]));
        let image = of(r#"{"messages": [{"role": "user", "content": [{"type": "image_url",
            "image_url": {"url": "http://x"}}]}]}"#);
        assert_eq!((image.items.len(), image.items[0].length), (1, IMAGE_TOKENS));
    }
}
