//! A score request → the block keys of its prompts, with every field checked.

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    hash::{MultimodalItem, Prompt, PromptError, Scheme},
    indexer::{ApiConfig, ScoreError, error::echo},
    model::RequestKey,
    proto::kvindexer as pb,
    tokenize::{self, Tokenize, TokenizeError, Tokenized},
};

/// Tokens hashed, or keys looked up times the block size, before other calls get a turn: some
/// 100 µs of work.
pub(super) const TURN_TOKENS: usize = 1 << 18;

/// What a prompt may consist of on this call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Text<'a> {
    /// Text goes to the tokenizer, if there is one.
    Allowed(Option<&'a Arc<dyn Tokenize>>),
    /// Text is refused: its tokenization would hold up the stream.
    Stream,
}

/// The part of a request that is checked before any prompt is hashed.
#[derive(Clone, Debug)]
pub(super) struct Head {
    /// Canonical name.
    pub(super) model: String,
    /// Hash settings of the model.
    pub(super) scheme: Arc<Scheme>,
    /// Their fingerprint.
    pub(super) fingerprint: u64,
    /// Rows with tiers, without, or slots.
    pub(super) detail: pb::ScoreDetail,
    /// When the caller stops waiting.
    pub(super) deadline: Option<Instant>,
}

/// A request that can be scored.
#[derive(Clone, Debug)]
pub(super) struct Prepared {
    pub(super) head: Head,
    pub(super) request_id: u64,
    pub(super) pods: Vec<String>,
    pub(super) max_pods: usize,
    /// Keys of each prompt, in order.
    pub(super) prompts: Vec<Vec<RequestKey>>,
}

/// The tokens or keys of a prompt.
#[derive(Debug)]
pub(super) enum Input<'a> {
    Tokens(Cow<'a, [u32]>),
    /// Of text, with the multimodal items that the tokenizer found.
    Tokenized(Tokenized),
    Keys(&'a [u64]),
}

impl Head {
    /// Checks everything but the prompts' contents.
    ///
    /// `arrival` and `call` are when the request came and when the call's own deadline is.
    pub(super) fn check(
        config: &ApiConfig,
        request: &pb::ScoreRequest,
        arrival: Instant,
        call: Option<Instant>,
    ) -> Result<Self, ScoreError> {
        let head = Self::resolve(config, request, arrival, call)?;
        if request.hash_fingerprint != 0 && request.hash_fingerprint != head.fingerprint {
            return Err(ScoreError::Fingerprint {
                field: "hash_fingerprint".to_owned(),
                model: echo(&request.model),
                request: request.hash_fingerprint,
                server: head.fingerprint,
            });
        }
        Ok(head)
    }

    /// [`check`](Self::check) without the fingerprint, for `Explain`, which reports a mismatch.
    pub(super) fn resolve(
        config: &ApiConfig,
        request: &pb::ScoreRequest,
        arrival: Instant,
        call: Option<Instant>,
    ) -> Result<Self, ScoreError> {
        if request.model.is_empty() {
            return Err(ScoreError::invalid("model", "must not be empty"));
        }
        if request.prompts.len() > config.max_prompts {
            let (got, limit) = (request.prompts.len(), config.max_prompts);
            return Err(ScoreError::invalid("prompts", format!("{got} prompts, at most {limit}")));
        }
        check_pods(config, "pods", &request.pods)?;
        let detail = pb::ScoreDetail::try_from(request.detail).map_err(|_| {
            ScoreError::invalid("detail", format!("{} is no ScoreDetail", request.detail))
        })?;
        for (at, prompt) in request.prompts.iter().enumerate() {
            check_items(config, at, prompt)?;
        }
        let model = config.models.canonical(&request.model);
        let scheme = Arc::clone(config.models.scheme(model));
        let own = (request.timeout_ms > 0)
            .then(|| arrival + std::time::Duration::from_millis(request.timeout_ms.into()));
        Ok(Self {
            model: model.to_owned(),
            fingerprint: scheme.fingerprint(),
            scheme,
            detail,
            deadline: match (own, call) {
                (Some(own), Some(call)) => Some(own.min(call)),
                (own, call) => own.or(call),
            },
        })
    }

    /// Fails once the caller has stopped waiting.
    pub(super) fn in_time(&self, done: usize, prompts: usize) -> Result<(), ScoreError> {
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => {
                Err(ScoreError::Deadline { done, prompts })
            }
            _ => Ok(()),
        }
    }

    /// Keys of all full blocks of `prompt`, the one at `at`.
    pub(super) fn keys(
        &self,
        lora: &str,
        at: usize,
        prompt: &pb::Prompt,
        input: &Input<'_>,
    ) -> Result<Vec<RequestKey>, ScoreError> {
        let tokens = match input {
            Input::Keys(keys) => return Ok(keys.iter().copied().map(RequestKey).collect()),
            Input::Tokens(tokens) => &**tokens,
            Input::Tokenized(tokenized) => &tokenized.ids,
        };
        let multimodal = input.items(prompt);
        let sent = prompt.multimodal.len();
        let prompt = Prompt {
            model: &self.model,
            lora,
            tokens,
            cache_salt: &prompt.cache_salt,
            multimodal: &multimodal,
        };
        prompt.keys(&self.scheme).map_err(|error| {
            let field = match error {
                PromptError::ItemOutOfRange { item, .. } if item < sent => {
                    format!("prompts[{at}].multimodal[{item}]")
                }
                // An item that the tokenizer found.
                PromptError::ItemOutOfRange { .. } => format!("prompts[{at}]"),
                PromptError::TooManyOverlaps { .. } => format!("prompts[{at}].multimodal"),
            };
            ScoreError::invalid(field, error.to_string())
        })
    }
}

impl Prepared {
    /// Checks `request` and hashes its prompts; gives other calls a turn now and then.
    pub(super) async fn new(
        config: &ApiConfig,
        request: pb::ScoreRequest,
        arrival: Instant,
        call: Option<Instant>,
        text: Text<'_>,
    ) -> Result<Self, ScoreError> {
        let head = Head::check(config, &request, arrival, call)?;
        let count = request.prompts.len();
        let mut prompts = Vec::with_capacity(count);
        let mut since_turn = 0;
        // Every prompt is read before the first one is hashed, so that a bad one costs little.
        for (at, prompt) in request.prompts.iter().enumerate() {
            if !matches!(
                prompt.input,
                Some(pb::prompt::Input::Text(_) | pb::prompt::Input::ChatJson(_))
            ) {
                input(config, &head, at, prompt)?;
            }
        }
        for (at, prompt) in request.prompts.iter().enumerate() {
            head.in_time(0, count)?;
            let input = tokenized(config, &head, at, prompt, text).await?;
            since_turn += input.tokens(head.scheme.block_size());
            prompts.push(head.keys(&request.lora, at, prompt, &input)?);
            if since_turn >= TURN_TOKENS {
                since_turn = 0;
                tokio::task::yield_now().await;
            }
        }
        Ok(Self {
            head,
            request_id: request.request_id,
            pods: request.pods,
            max_pods: request.max_pods as usize,
            prompts,
        })
    }
}

impl Input<'_> {
    /// Token ids, unless there are only keys.
    pub(super) fn ids(&self) -> Option<&[u32]> {
        match self {
            Self::Tokens(tokens) => Some(tokens),
            Self::Tokenized(tokenized) => Some(&tokenized.ids),
            Self::Keys(_) => None,
        }
    }

    /// The multimodal items that `prompt` has, then those that the tokenizer found.
    pub(super) fn items(&self, prompt: &pb::Prompt) -> Vec<MultimodalItem> {
        let item = |item: &pb::MultimodalItem| MultimodalItem {
            hash: item.hash.clone(),
            offset: item.offset,
            length: item.length,
        };
        let mut items: Vec<_> = prompt.multimodal.iter().map(item).collect();
        if let Self::Tokenized(tokenized) = self {
            items.extend_from_slice(&tokenized.items);
        }
        items
    }

    fn tokens(&self, block_size: u32) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Tokenized(tokenized) => tokenized.ids.len(),
            Self::Keys(keys) => keys.len().saturating_mul(block_size as usize),
        }
    }
}

/// The input of a prompt, text through the tokenizer.
pub(super) async fn tokenized<'a>(
    config: &ApiConfig,
    head: &Head,
    at: usize,
    prompt: &'a pb::Prompt,
    text: Text<'_>,
) -> Result<Input<'a>, ScoreError> {
    let (name, text_of) = match &prompt.input {
        Some(pb::prompt::Input::Text(body)) => {
            ("text", tokenize::Input::Text { text: body.as_str().into(), add_special_tokens: true })
        }
        Some(pb::prompt::Input::ChatJson(body)) => {
            ("chat_json", tokenize::Input::Chat(Bytes::copy_from_slice(body.as_bytes())))
        }
        _ => return input(config, head, at, prompt),
    };
    let field = format!("prompts[{at}].{name}");
    let tokenizer = match text {
        Text::Stream => return Err(ScoreError::NotOnStream { field }),
        Text::Allowed(tokenizer) => tokenizer,
    };
    let found = match tokenizer {
        Some(tokenizer) => tokenized_in_time(&**tokenizer, head, text_of).await,
        None => Err(TokenizeError::NotConfigured),
    };
    let found = found.map_err(|error| {
        let (field, model) = (field.clone(), echo(&head.model));
        match error {
            TokenizeError::NotConfigured => ScoreError::NoTokenizer { field, model },
            TokenizeError::Invalid(why) => ScoreError::invalid(field, why),
            error => ScoreError::Tokenize { field, error },
        }
    })?;
    check_length(config, &field, found.ids.len())?;
    Ok(Input::Tokenized(found))
}

/// Text → tokens, as long as the caller waits.
async fn tokenized_in_time(
    tokenizer: &dyn Tokenize,
    head: &Head,
    text: tokenize::Input,
) -> Result<Tokenized, TokenizeError> {
    let tokenizing = tokenizer.tokenize(&head.model, text);
    match head.deadline {
        None => tokenizing.await,
        Some(deadline) => {
            tokio::time::timeout_at(deadline, tokenizing).await.unwrap_or(Err(TokenizeError::Late))
        }
    }
}

/// The tokens or keys of a prompt that has no text.
pub(super) fn input<'a>(
    config: &ApiConfig,
    head: &Head,
    at: usize,
    prompt: &'a pb::Prompt,
) -> Result<Input<'a>, ScoreError> {
    use pb::prompt::Input as Sent;
    let field = |name: &str| format!("prompts[{at}].{name}");
    let input = match &prompt.input {
        Some(Sent::TokenIdsLe(bytes)) => {
            if !bytes.len().is_multiple_of(4) {
                let why = format!("length {} is not a multiple of 4", bytes.len());
                return Err(ScoreError::invalid(field("token_ids_le"), why));
            }
            check_length(config, &field("token_ids_le"), bytes.len() / 4)?;
            Input::Tokens(tokens_le(bytes))
        }
        Some(Sent::TokenIds(tokens)) => {
            check_length(config, &field("token_ids"), tokens.ids.len())?;
            Input::Tokens(Cow::Borrowed(&tokens.ids))
        }
        Some(Sent::BlockKeys(keys)) => {
            let input = Input::Keys(&keys.keys);
            let (tokens, limit) = (input.tokens(head.scheme.block_size()), config.max_tokens);
            if tokens > limit {
                let why =
                    format!("{} keys stand for {tokens} tokens, at most {limit}", keys.keys.len());
                return Err(ScoreError::invalid(field("block_keys"), why));
            }
            input
        }
        Some(Sent::Text(_) | Sent::ChatJson(_)) | None => {
            let why = "one of token_ids_le, token_ids, block_keys, text and chat_json is needed";
            return Err(ScoreError::invalid(format!("prompts[{at}]"), why));
        }
    };
    Ok(input)
}

/// Pods that may be asked for, together and each.
pub(super) fn check_pods(
    config: &ApiConfig,
    field: &str,
    pods: &[String],
) -> Result<(), ScoreError> {
    let (got, limit) = (pods.len(), config.max_pods_asked);
    if got > limit {
        return Err(ScoreError::invalid(field, format!("{got} pods, at most {limit}")));
    }
    for (at, pod) in pods.iter().enumerate() {
        check_pod(config, pod, || format!("{field}[{at}]"))?;
    }
    Ok(())
}

/// A pod id that can exist.
pub(super) fn check_pod(
    config: &ApiConfig,
    pod: &str,
    field: impl FnOnce() -> String,
) -> Result<(), ScoreError> {
    let limit = config.max_pod_id_bytes;
    if pod.is_empty() {
        return Err(ScoreError::invalid(field(), "must not be empty"));
    }
    if pod.len() > limit {
        return Err(ScoreError::invalid(field(), format!("{} bytes, at most {limit}", pod.len())));
    }
    Ok(())
}

fn check_length(config: &ApiConfig, field: &str, tokens: usize) -> Result<(), ScoreError> {
    let limit = config.max_tokens;
    if tokens > limit {
        return Err(ScoreError::invalid(field, format!("{tokens} tokens, at most {limit}")));
    }
    Ok(())
}

fn check_items(config: &ApiConfig, at: usize, prompt: &pb::Prompt) -> Result<(), ScoreError> {
    let (got, limit) = (prompt.multimodal.len(), config.max_multimodal);
    if got > limit {
        let field = format!("prompts[{at}].multimodal");
        return Err(ScoreError::invalid(field, format!("{got} items, at most {limit}")));
    }
    for (item, multimodal) in prompt.multimodal.iter().enumerate() {
        let field = || format!("prompts[{at}].multimodal[{item}]");
        if multimodal.hash.is_empty() {
            return Err(ScoreError::invalid(field() + ".hash", "must not be empty"));
        }
        if multimodal.length == 0 {
            return Err(ScoreError::invalid(field() + ".length", "must be at least 1"));
        }
    }
    Ok(())
}

/// Little-endian bytes as numbers, in place where the machine and the alignment allow it.
fn tokens_le(bytes: &[u8]) -> Cow<'_, [u32]> {
    if cfg!(target_endian = "little")
        && let Ok(tokens) = bytemuck::try_cast_slice(bytes)
    {
        return Cow::Borrowed(tokens);
    }
    let (words, _) = bytes.as_chunks::<4>();
    Cow::Owned(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_endian_tokens_read_at_any_alignment() {
        let bytes: Vec<u8> = (0..33).collect();
        for start in 0..4 {
            let slice = &bytes[start..start + 28];
            let want: Vec<u32> =
                slice.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
            assert_eq!(*tokens_le(slice), want[..]);
        }
    }
}
