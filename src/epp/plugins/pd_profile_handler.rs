//! `pd-profile-handler`: runs a decode profile, and a prefill profile for prompts that are worth it.
//!
//! Decode runs first and is primary. Whether prefill runs is decided by characters, if `threshold` or
//! `hashBlockSize` is given:
//!
//! ```text
//! cached  = blocks of the prompt that the decode endpoint holds × block
//! prefill = threshold = 0 or (1 - min(cached / length, 1)) × length ≥ threshold
//! ```
//!
//! and else by the plugin `deciderPluginName` (default: a `prefix-based-pd-decider`).
//!
//! `length` is the prompt in bytes as the body has it: text without its quotes, messages with all
//! their JSON. The blocks are those that the plugin `prefixPluginName` (default
//! `prefix-cache-scorer`, which is added if there is none) matched, or the producer by whose matches
//! it scores; `block` is `hashBlockSize` (bytes), or, where it is not given, four bytes for each token
//! of a block of that plugin. If it matched nothing known, nothing is cached. The Go handler subtracts
//! 1 from the blocks because the first one once stood for the model's name; it has not since Gateway
//! API Inference Extension 1.1, so that this would take a cached block for an uncached one.
//!
//! When decode finds nobody: 429 `failed to find available decode workers`; when prefill finds nobody:
//! decode alone. A pod is never the prefill pod of its own decode, as in
//! [`disagg-profile-handler`](super::disagg_profile_handler).
//!
//! Other parameters: `decodeProfile` (default `decode`), `prefillProfile` (default `prefill`),
//! `primaryPort` (default 0: none): the port of a sidecar that fans out to data-parallel ranks;
//! requests go there, and `x-data-parallel-host-port` names the picked rank. `prefixPluginType`,
//! `prefixMatchInfoProducerName` and, with a decider, `prefixPluginName` have no effect, with a warning.

use std::sync::Arc;

use super::{
    Building, Registration, Stability,
    disagg_profile_handler::{decider, decode_and_prefill, pending, primary_port, set_rank_header},
    prefix::BYTES_PER_TOKEN,
    prefix_cache_scorer,
};
use crate::{
    epp::{
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        request::{InferenceRequest, PromptForm},
        scheduling::{
            Cycle, DataKey, Decision, Decisions, Flight, Plugin, PreRequest, ProfileHandler,
            ProfileResults, SchedulingProfile, SchedulingResult,
        },
    },
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "pd-profile-handler",
    aliases: &[],
    stability: Stability::Deprecated("use disagg-profile-handler"),
    factory: Some(build),
};

const PREFIX_PLUGIN: &str = "prefixPluginName";

/// How it is decided whether prefill runs.
#[derive(Debug)]
enum Rule {
    /// Always.
    Always,
    /// By characters that `producer` does not know to be cached; `least` is positive.
    Threshold { least: u64, producer: Arc<str>, block: Option<u32> },
    /// By a decider.
    Decider(Arc<dyn Plugin>),
}

/// Runs a decode profile, and a prefill profile for prompts that are worth it.
#[derive(Debug)]
pub struct PdProfileHandler {
    decode: Arc<str>,
    prefill: Arc<str>,
    rule: Rule,
    primary_port: Option<u16>,
    decisions: Decisions,
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let name = |field, default: &str| -> Arc<str> {
        let name = params.string(field).filter(|name| !name.is_empty());
        name.unwrap_or_else(|| default.to_owned()).into()
    };
    let decode = name("decodeProfile", "decode");
    let prefill = name("prefillProfile", "prefill");
    let by_characters = params.has("threshold") || params.has("hashBlockSize");
    let least = params.integer("threshold", 0..=u64::from(u32::MAX));
    let block = params.integer("hashBlockSize", 1..=u64::from(u32::MAX));
    let decider_name = params.string("deciderPluginName").filter(|name| !name.is_empty());
    let prefix_name = params.string(PREFIX_PLUGIN).filter(|name| !name.is_empty());
    params.ignored("prefixPluginType", "has no effect: plugins are found by name");
    params.ignored("prefixMatchInfoProducerName", "has no effect: deciders name their producers");
    let primary_port = primary_port(params);
    let rule = if by_characters {
        if decider_name.is_some() {
            params.fault(
                "deciderPluginName",
                "cannot be used together with `threshold` or `hashBlockSize`",
            );
        }
        match least {
            Some(least @ 1..) => {
                let producer = matches_of(params, building, prefix_name.as_deref())?;
                Rule::Threshold { least, producer, block }
            }
            _ => Rule::Always,
        }
    } else {
        if prefix_name.is_some() {
            params.warn(PREFIX_PLUGIN, "has no effect without `threshold` or `hashBlockSize`");
        }
        let name = match decider_name {
            Some(name) => name.into(),
            None => building.default_of(super::prefix_based_pd_decider::REGISTRATION.type_name),
        };
        Rule::Decider(decider(params, "deciderPluginName", building, &name)?)
    };
    let decisions = Decisions::new(
        building.registry(),
        ["llm_d_epp_pd_decision_total", "llm_d_inference_scheduler_pd_decision_total"],
        "Total number of P/D disaggregation decisions made",
        building.name(),
        REGISTRATION.type_name,
    );
    Some(Arc::new(PdProfileHandler { decode, prefill, rule, primary_port, decisions }))
}

/// The producer of the matches that the plugin `named`, or else the default one, scores by: itself, or
/// the one whose matches it reads. `None`, with a fault, if there is no such.
fn matches_of(
    params: &Fields<'_>,
    building: &dyn Building,
    named: Option<&str>,
) -> Option<Arc<str>> {
    let name = match named {
        Some(name) => name.into(),
        None => building.default_of(prefix_cache_scorer::REGISTRATION.type_name),
    };
    let plugin = building.plugin(params, PREFIX_PLUGIN, &name)?;
    let written = plugin.producer().map_or_else(Vec::new, |producer| producer.produces(&name));
    let found = written.into_iter().chain(plugin.consumes()).find_map(|key| match key {
        DataKey::Prefix(producer) => Some(producer),
        _ => None,
    });
    if found.is_none() {
        let type_name = plugin.type_name();
        let text = format!("plugin '{name}' of type '{type_name}' knows no prefix matches");
        params.fault(PREFIX_PLUGIN, text);
    }
    found
}

/// Bytes of the prompt as the body has it; quotes of strings are not counted.
fn prompt_bytes(request: &InferenceRequest) -> u64 {
    let bytes = |form: PromptForm, length: usize| match form {
        PromptForm::Text => length.saturating_sub(2),
        _ => length,
    };
    request.parsed.prompt.iter().map(|part| bytes(part.form, part.span.len()) as u64).sum()
}

impl Rule {
    fn wants_prefill(&self, cycle: &Cycle<'_>, decode: usize) -> bool {
        match self {
            Self::Decider(plugin) => {
                plugin.decider().is_some_and(|decider| decider.decide(cycle, decode))
            }
            Self::Always => true,
            Self::Threshold { least, producer, block } => {
                let cached = cycle.produced.prefix(producer).map_or(0, |matches| {
                    let blocks = matches.matched.get(decode).copied().unwrap_or_default();
                    let of_matches = u64::from(matches.block) * BYTES_PER_TOKEN as u64;
                    u64::from(blocks) * block.map_or(of_matches, u64::from)
                });
                prompt_bytes(cycle.request).saturating_sub(cached) >= *least
            }
        }
    }
}

impl Plugin for PdProfileHandler {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn profile_handler(&self) -> Option<&dyn ProfileHandler> {
        Some(self)
    }
    fn pre_request(&self) -> Option<&dyn PreRequest> {
        self.primary_port.map(|_| self as &dyn PreRequest)
    }
    fn consumes(&self) -> Vec<DataKey> {
        match &self.rule {
            Rule::Threshold { producer, .. } => vec![DataKey::Prefix(Arc::clone(producer))],
            Rule::Always | Rule::Decider(_) => Vec::new(),
        }
    }
}

impl ProfileHandler for PdProfileHandler {
    fn pick(
        &self,
        cycle: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &ProfileResults,
    ) -> Vec<usize> {
        let next = if results.ran(&self.decode) {
            let decode = results.get(&self.decode).and_then(|run| run.picked.first());
            decode.and_then(|&decode| {
                pending(&self.prefill, profiles, results)
                    .filter(|_| self.rule.wants_prefill(cycle, decode))
            })
        } else {
            pending(&self.decode, profiles, results)
        };
        next.into_iter().collect()
    }

    fn process_results(
        &self,
        cycle: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &mut ProfileResults,
    ) -> Result<Arc<str>, Refusal> {
        decode_and_prefill(cycle, profiles, results, (&self.decode, &self.prefill))?;
        let decision = Decision::of(false, results.get(&self.prefill).is_some());
        self.decisions.count(&cycle.request.target_model, decision);
        Ok(Arc::clone(&self.decode))
    }

    fn primary_port(&self) -> Option<u16> {
        self.primary_port
    }

    fn needs(&self) -> Option<&str> {
        Some(&self.decode)
    }
}

impl PreRequest for PdProfileHandler {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        set_rank_header(cycle, result, headers);
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
