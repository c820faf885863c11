//! Counters of how requests were split between prefill and decode.
//!
//! A family under its present name, with `plugin_name`, `plugin_type`,
//! `model_name` and `decision_type`, and under its old one with the last two. The counters of a
//! model are looked up once and then found by one hash of its name.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
};

use arc_swap::ArcSwap;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

use crate::support::sync::lock;

/// Distinct models after which all others count as `other`: a client must not be able to fill our
/// memory with names of models.
const MAX_MODELS: usize = 1000;

/// How a request was split. Label `decision_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// One pod does everything.
    DecodeOnly,
    /// A pod prefills for another.
    PrefillDecode,
    /// A pod encodes for another.
    EncodeDecode,
    /// Three stages.
    EncodePrefillDecode,
}

impl Decision {
    /// All decisions.
    pub const ALL: [Self; 4] =
        [Self::DecodeOnly, Self::PrefillDecode, Self::EncodeDecode, Self::EncodePrefillDecode];

    /// From the stages that ran besides decode.
    #[must_use]
    pub fn of(encode: bool, prefill: bool) -> Self {
        match (encode, prefill) {
            (false, false) => Self::DecodeOnly,
            (false, true) => Self::PrefillDecode,
            (true, false) => Self::EncodeDecode,
            (true, true) => Self::EncodePrefillDecode,
        }
    }

    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DecodeOnly => "decode-only",
            Self::PrefillDecode => "prefill-decode",
            Self::EncodeDecode => "encode-decode",
            Self::EncodePrefillDecode => "encode-prefill-decode",
        }
    }
}

/// Counters of one model, in the order of [`Decision::ALL`]; new and old name.
type Counters = [Vec<IntCounter>; Decision::ALL.len()];

/// Counts decisions of one profile handler.
pub struct Decisions {
    families: Vec<IntCounterVec>,
    models: ArcSwap<HashMap<Arc<str>, Arc<Counters>>>,
    growing: Mutex<()>,
}

impl fmt::Debug for Decisions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decisions").field("models", &self.models.load().len()).finish()
    }
}

impl Decisions {
    /// Registers the family of these names, present and old, for the plugin of this name and type. A
    /// family that the registry does not take (it has one of the same labels
    /// already) is warned about and not counted.
    #[must_use]
    pub fn new(
        registry: &Registry,
        [new, old]: [&str; 2],
        help: &str,
        name: &str,
        type_name: &str,
    ) -> Self {
        let old_help = format!("[ALPHA] [Deprecated: Use {new}] {help}");
        // The plugin's labels are fixed for us, so that several plugins can share the family.
        let new = Opts::new(new, format!("[ALPHA] {help}"))
            .const_label("plugin_name", name)
            .const_label("plugin_type", type_name);
        let register = |opts: Opts| {
            let vec = IntCounterVec::new(opts, &["model_name", "decision_type"])?;
            crate::support::metrics::add(registry, vec)
        };
        let mut families = Vec::new();
        for opts in [new, Opts::new(old, old_help)] {
            match register(opts) {
                Ok(vec) => families.push(vec),
                Err(error) => tracing::warn!(%error, plugin = name, "decisions are not counted"),
            }
        }
        Self { families, models: ArcSwap::default(), growing: Mutex::default() }
    }

    /// Counts one decision for a request to `model`; an empty one is `unknown`.
    pub fn count(&self, model: &Arc<str>, decision: Decision) {
        let at = decision as usize;
        let count = |counters: &Counters| counters[at].iter().for_each(IntCounter::inc);
        if let Some(counters) = self.models.load().get(model) {
            return count(counters);
        }
        let _growing = lock(&self.growing);
        let known = self.models.load_full();
        let full = known.len() >= MAX_MODELS;
        let label = match &**model {
            _ if full => "other",
            "" => "unknown",
            model => model,
        };
        let counters: Counters = Decision::ALL.map(|decision| {
            let labels = [label, decision.as_str()];
            self.families.iter().map(|family| family.with_label_values(&labels)).collect()
        });
        count(&counters);
        if !full {
            let mut known = HashMap::clone(&known);
            known.insert(Arc::clone(model), Arc::new(counters));
            self.models.store(Arc::new(known));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::metrics::encode;

    const NAMES: [&str; 2] =
        ["llm_d_epp_pd_decision_total", "llm_d_inference_scheduler_pd_decision_total"];

    #[test]
    fn decisions_count_under_both_names() {
        let registry = Registry::new();
        let make = |name| Decisions::new(&registry, NAMES, "Help.", name, "pd");
        let (one, two) = (make("one"), make("two"));
        let model: Arc<str> = "m".into();
        one.count(&model, Decision::PrefillDecode);
        one.count(&model, Decision::PrefillDecode);
        one.count(&"".into(), Decision::DecodeOnly);
        two.count(&model, Decision::DecodeOnly);
        let text = encode(&registry).unwrap();
        for line in [
            "llm_d_epp_pd_decision_total{decision_type=\"prefill-decode\",model_name=\"m\",\
             plugin_name=\"one\",plugin_type=\"pd\"} 2",
            "llm_d_epp_pd_decision_total{decision_type=\"decode-only\",model_name=\"m\",\
             plugin_name=\"two\",plugin_type=\"pd\"} 1",
            "llm_d_inference_scheduler_pd_decision_total{decision_type=\"prefill-decode\",\
             model_name=\"m\"} 2",
            "llm_d_inference_scheduler_pd_decision_total{decision_type=\"decode-only\",\
             model_name=\"unknown\"} 1",
            "# HELP llm_d_epp_pd_decision_total [ALPHA] Help.",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn models_beyond_the_limit_are_others() {
        let registry = Registry::new();
        let decisions = Decisions::new(&registry, NAMES, "Help.", "n", "t");
        for model in 0..MAX_MODELS + 7 {
            decisions.count(&model.to_string().into(), Decision::EncodeDecode);
        }
        let text = encode(&registry).unwrap();
        let other = "llm_d_inference_scheduler_pd_decision_total{decision_type=\"encode-decode\",\
                     model_name=\"other\"} 7";
        assert!(text.contains(other), "{other} is not in the text");
        assert_eq!(decisions.models.load().len(), MAX_MODELS);
    }
}
