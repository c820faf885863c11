//! Why requests are scored by approximate matches, and why precise scores cannot be right: counted, and
//! said once per cause and model.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use prometheus::IntCounterVec;

use super::params::Expected;
use crate::{
    epp::precise::{PrefixIndex, accuracy::ESTIMATED},
    support::sync::lock,
};

/// Models that are watched.
const MAX_MODELS: usize = 256;
/// Different warnings about a model.
const MAX_CAUSES: usize = 16;

/// No producer of tokens ran or said why.
pub(super) const NO_TOKENS: &str = "no_tokens";
/// The index knows no hash settings for the model.
pub(super) const UNKNOWN_MODEL: &str = "unknown_model";
/// The index knows none of the candidates.
pub(super) const NOT_INDEXED: &str = "not_indexed";

/// Reasons that do not go away by themselves.
const FOR_EVER: [(&str, &str); 4] = [
    (
        ESTIMATED,
        "its tokens are estimates, which match nothing that an engine announces: configure a \
         tokenizer in token-producer",
    ),
    (NO_TOKENS, "nobody makes token ids: give token-producer `local` or `vllm`"),
    ("no_tokenizer", "no tokenizer is configured for it"),
    ("no_chat_template", "it has no chat template, and chats cannot be tokenized without"),
];

/// Counts fallbacks and remembers what was said.
#[derive(Debug)]
pub(super) struct Fallbacks {
    plugin: Arc<str>,
    /// By reason.
    counter: IntCounterVec,
    /// By served name: causes that were said.
    models: Mutex<HashMap<Arc<str>, HashSet<String>>>,
}

impl Fallbacks {
    pub(super) fn new(plugin: Arc<str>, counter: IntCounterVec) -> Self {
        Self { plugin, counter, models: Mutex::default() }
    }

    /// A request for the model was seen.
    pub(super) fn seen(&self, model: &Arc<str>) {
        let mut models = lock(&self.models);
        if !models.contains_key(model) && models.len() < MAX_MODELS {
            models.insert(Arc::clone(model), HashSet::new());
        }
    }

    /// A request for the model falls back.
    pub(super) fn count(&self, model: &str, reason: &str) {
        self.counter.with_label_values(&[reason]).inc();
        if let Some((_, text)) = FOR_EVER.iter().find(|(known, _)| *known == reason) {
            self.say(model, text);
        }
    }

    /// Looks for reasons why scores of models that were asked for cannot be right.
    pub(super) fn look(&self, index: &dyn PrefixIndex, expected: &Expected) {
        let models: Vec<_> = lock(&self.models).keys().cloned().collect();
        for model in models {
            let mut findings = index.impediments(&model);
            match index.addressing(&model) {
                Some(addressing) => findings.extend(expected.contradicts(&addressing.scheme)),
                None if findings.is_empty() => {
                    findings.push("the index has nothing of it under this name".to_owned());
                }
                None => {}
            }
            for finding in findings {
                self.say(&model, &finding);
            }
        }
    }

    /// Warns unless the cause, which is the text up to `: `, was said already: what follows changes as
    /// endpoints come and go.
    fn say(&self, model: &str, cause: &str) {
        let mut models = lock(&self.models);
        let Some(said) = models.get_mut(model) else { return };
        let (head, _) = cause.split_once(": ").unwrap_or((cause, ""));
        if said.len() < MAX_CAUSES && !said.contains(head) {
            said.insert(head.to_owned());
            tracing::warn!(plugin = %self.plugin, model, "Precise prefix scores cannot be right: {cause}.");
        }
    }

    /// What was said about a model.
    #[cfg(test)]
    pub(super) fn said(&self, model: &str) -> Vec<String> {
        let said = lock(&self.models).get(model).cloned().unwrap_or_default();
        let mut said: Vec<_> = said.into_iter().collect();
        said.sort();
        said
    }
}
