//! `token-producer`: the token ids of prompts, as the engines make them.
//!
//! # Modes
//!
//! One of these parameters says where ids come from:
//!
//! * `estimate: {}`, the default: nowhere. Who needs a number of tokens estimates it from the text.
//! * `local: {…}`: tokenizers and chat templates of this process, see [`tokenize`](crate::tokenize).
//! * `vllm: {url, timeout, mmTimeout}`, with `modelName`: an engine's render endpoints
//!   (`--enable-scale-out`).
//!
//! Prompts that are written as token ids are exact in every mode. A list of texts is as many prompts.
//!
//! # Failure
//!
//! A request whose prompt could not be tokenized goes on without ids, and whoever wanted them sees why.
//! Counted by [reason](TokenizeError::reason) in `epp_tokenize_failures_total`.

use std::{sync::Arc, time::Duration};

use prometheus::{IntCounterVec, Opts};
use serde_json::Value;
use tokio::time::timeout;

use crate::{
    epp::{
        datalayer::Endpoint,
        plugins::{Building, Registration, Stability},
        request::{Api, InferenceRequest, PromptForm},
        scheduling::{
            BoxFuture, DataKey, DataProducer, PRODUCER_DEADLINE, Plugin, Produced, PromptTokens,
        },
    },
    support::{
        fields::{Fields, set},
        metrics::family,
        units,
    },
    tokenize::{
        Input, Local, Tokenize, TokenizeError, Tokenized,
        models::LocalConfig,
        render::{Render, RenderConfig},
    },
};

/// What a configuration may name.
pub const REGISTRATION: Registration = Registration {
    type_name: "token-producer",
    aliases: &["tokenizer"],
    stability: Stability::Beta,
    factory: Some(build),
};

const ESTIMATE: &str = "estimate";
const VLLM: &str = "vllm";
const LOCAL: &str = "local";
const SOCKET: &str = "udsTokenizerConfig";
const MODEL_NAME: &str = "modelName";

const MAX_TIMEOUT: Duration = Duration::from_secs(300);
const MAX_BUDGET: Duration = Duration::from_secs(10);
/// How much later than the tokenizer's own deadline a request gives up: the reason is known then.
const GRACE: Duration = Duration::from_millis(50);

/// See the [module](self).
#[derive(Debug)]
pub struct TokenProducer {
    /// `None`: no text is tokenized.
    tokenizer: Option<Arc<dyn Tokenize>>,
    /// What all prompts of a request may take together.
    budget: Duration,
    failures: IntCounterVec,
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let model = params.nonempty(MODEL_NAME);
    if params.has(SOCKET) {
        params.ignored(SOCKET, "");
        let text = "tokenizer sidecars are not supported; use `local: {modelsDir: …}`, or \
                    `vllm: {url: …}` with an engine's address";
        params.fault(SOCKET, text);
        return None;
    }
    let modes = [ESTIMATE, VLLM, LOCAL];
    let given: Vec<&str> = modes.into_iter().filter(|mode| params.has(mode)).collect();
    // Each is read, so that all faults come at once and no name is unknown.
    let estimate = params.mapping(ESTIMATE);
    estimate.finish();
    let (vllm, local) = (params.mapping(VLLM), params.mapping(LOCAL));
    let render = read_vllm(vllm, model.clone());
    let local = read_local(local, model.as_deref());
    let (tokenizer, waits): (Option<Arc<dyn Tokenize>>, Duration) = match given[..] {
        [] | [ESTIMATE] => (None, PRODUCER_DEADLINE),
        [VLLM] => {
            if model.is_none() {
                params.fault(MODEL_NAME, "is required with `vllm`");
                return None;
            }
            let waits = render.timeout.max(render.multimodal_timeout);
            match Render::new(render) {
                Ok(render) => (Some(Arc::new(render)), waits),
                Err(why) => {
                    params.fault("vllm.url", why);
                    return None;
                }
            }
        }
        [LOCAL] => {
            let local = local?;
            match Local::load(&local, building.registry(), "epp") {
                Ok(tokenizers) => (Some(Arc::new(tokenizers)), local.pool.budget),
                Err(error) => {
                    params.fault(LOCAL, format!("{error:#}"));
                    return None;
                }
            }
        }
        [first, second, ..] => {
            params.fault(second, format!("is given beside `{first}`; give one of them"));
            return None;
        }
        [_] => return None,
    };
    let failures = Opts::new(
        "epp_tokenize_failures_total",
        "Requests whose prompts could not be tokenized, by reason.",
    );
    let failures = IntCounterVec::new(failures, &["reason"])
        .and_then(|failures| family(building.registry(), failures));
    let failures = failures.map_err(|error| params.fault("", error.to_string())).ok()?;
    Some(Arc::new(TokenProducer { tokenizer, budget: waits, failures }))
}

fn read_vllm(fields: Fields<'_>, model: Option<String>) -> RenderConfig {
    let mut config = RenderConfig { model: model.unwrap_or_default(), ..RenderConfig::default() };
    set(&mut config.url, fields.nonempty("url"));
    set(&mut config.timeout, period(&fields, "timeout", MAX_TIMEOUT));
    set(&mut config.multimodal_timeout, period(&fields, "mmTimeout", MAX_TIMEOUT));
    fields.finish();
    config
}

/// `None`, with a fault noted, if it says nothing about where tokenizers are; without a fault if it is
/// not there.
fn read_local(fields: Fields<'_>, model: Option<&str>) -> Option<LocalConfig> {
    let mut config = LocalConfig::default();
    let directory = fields.nonempty("modelDir");
    let models = fields.strings("models");
    let own = |(name, directory): (String, String)| (name, directory.into());
    config.models = models.into_iter().map(own).collect();
    config.models_dir = fields.nonempty("modelsDir").map(Into::into);
    config.aliases = fields.strings("aliases").into_iter().collect();
    config.default = fields.nonempty("default");
    set(&mut config.pool.threads, fields.integer("threads", 1..=256));
    set(&mut config.pool.queue, fields.integer("queue", 1..=1 << 20));
    set(&mut config.pool.budget, period(&fields, "budget", MAX_BUDGET));
    set(
        &mut config.cache.bytes,
        fields.take("cacheSize", |value| {
            let bytes = units::quantity_value(value)?;
            usize::try_from(bytes).map_err(|_| format!("{bytes} bytes are too many"))
        }),
    );
    let present = fields.is_present();
    match (directory, model) {
        (Some(directory), Some(model)) => {
            if config.models.insert(model.to_owned(), directory.into()).is_some() {
                fields.fault("modelDir", format!("`models` has a directory of {model:?}, too"));
            }
        }
        (Some(_), None) => fields.fault("modelDir", "needs `modelName` beside `local`"),
        (None, Some(model)) => {
            // Whom other names are for, as well.
            config.default.get_or_insert_with(|| model.to_owned());
        }
        (None, None) => {}
    }
    let nowhere = config.models.is_empty() && config.models_dir.is_none();
    if present && nowhere && !fields.has("modelDir") {
        fields.fault("", "needs `modelDir`, `models` or `modelsDir`: where tokenizers are");
    }
    fields.finish();
    (present && !nowhere).then_some(config)
}

/// A duration above 0 and at most `most`.
fn period(fields: &Fields<'_>, name: &'static str, most: Duration) -> Option<Duration> {
    fields.take(name, |value: &Value| match units::duration_value(value)? {
        period if period.is_zero() || period > most => {
            Err(format!("{period:?} is out of range; must be above 0 and at most {most:?}"))
        }
        period => Ok(period),
    })
}

impl TokenProducer {
    fn failed(&self, error: TokenizeError, produced: &mut Produced) {
        self.failures.with_label_values(&[error.reason()]).inc();
        produced.no_tokens = Some(error);
    }
}

/// What is to be tokenized, a prompt each; `None`: nobody here can.
fn inputs(request: &InferenceRequest) -> Option<Vec<Input>> {
    let InferenceRequest { parsed, body, .. } = request;
    match parsed.api {
        Api::ChatCompletions => Some(vec![Input::Chat(body.clone())]),
        Api::Completions => {
            let add_special_tokens = parsed.flag(body, "add_special_tokens").unwrap_or(true);
            let texts = parsed.texts(body);
            let input = |text: String| Input::Text { text: text.into(), add_special_tokens };
            (!texts.is_empty()).then(|| texts.into_iter().map(input).collect())
        }
        _ => None,
    }
}

impl Plugin for TokenProducer {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }

    fn producer(&self) -> Option<&dyn DataProducer> {
        Some(self)
    }
}

impl DataProducer for TokenProducer {
    fn produces(&self, _: &Arc<str>) -> Vec<DataKey> {
        vec![DataKey::Tokens]
    }

    fn produce<'a>(
        &'a self,
        request: &'a InferenceRequest,
        _: &'a [Arc<Endpoint>],
        produced: &'a mut Produced,
    ) -> Option<BoxFuture<'a, ()>> {
        let form = request.parsed.prompt.first().map(|part| part.form);
        if matches!(form, Some(PromptForm::Tokens | PromptForm::TokenLists))
            && let Some(lists) = request.parsed.token_lists(&request.body)
        {
            let prompts = lists.into_iter().map(Into::into).collect();
            produced.tokens = Some(PromptTokens { prompts, exact: true });
            return None;
        }
        let tokenizer = self.tokenizer.as_deref()?;
        let Some(inputs) = inputs(request) else {
            self.failed(TokenizeError::Unsupported, produced);
            return None;
        };
        // Counted where the future is dropped, too.
        let pending = Pending { producer: self, produced, error: Some(TokenizeError::Late) };
        Some(Box::pin(async move {
            let several = inputs.len() > 1;
            let all = async {
                let mut prompts = Vec::with_capacity(inputs.len());
                for input in inputs {
                    prompts.push(tokenizer.tokenize(&request.target_model, input).await?);
                }
                Ok(prompts)
            };
            pending.ended(match several {
                // The tokenizer knows its own deadline, and that of each prompt only.
                true => timeout(self.budget, all).await.unwrap_or(Err(TokenizeError::Late)),
                false => all.await,
            });
        }))
    }

    fn deadline(&self) -> Duration {
        self.budget + GRACE
    }
}

/// A request on its way through the tokenizer. Its failure is known once it is dropped, which may be by
/// the deadline.
struct Pending<'a> {
    producer: &'a TokenProducer,
    produced: &'a mut Produced,
    error: Option<TokenizeError>,
}

impl Pending<'_> {
    fn ended(mut self, outcome: Result<Vec<Tokenized>, TokenizeError>) {
        self.error = None;
        match outcome {
            Ok(prompts) => self.produced.tokens = Some(PromptTokens { prompts, exact: true }),
            Err(error) => self.error = Some(error),
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(error) = self.error.take() {
            self.producer.failed(error, self.produced);
        }
    }
}

#[cfg(test)]
mod tests;
