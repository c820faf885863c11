//! The types that a configuration may name: one table.
//!
//! # Model
//!
//! Every type that any release of llm-d's or the Gateway API Inference Extension's EPP knows is here,
//! under all its names, so that a configuration is either loaded or refused with the name of what is
//! missing. A type that is built refers to the registration in its own file; one that is not has no
//! factory.

use std::sync::Arc;

use crate::{
    epp::{
        plugins::{
            Building, Registration, Stability, active_request_scorer, always_disagg_pd_decider,
            approx_prefix_cache_producer, by_label_filter, core_metrics_extractor, decode_filter,
            disagg_profile_handler, encode_filter, file_discovery, inflight_load_producer,
            kv_cache_utilization_scorer, load_aware_scorer, lora_affinity_scorer, max_score_picker,
            metrics_data_source, no_hit_lru_scorer, overload_filter, pd_profile_handler,
            precise_prefix_cache_producer, precise_prefix_cache_scorer, prefill_filter,
            prefill_header_handler, prefix_based_pd_decider, prefix_cache_scorer, queue_scorer,
            random_picker, running_requests_size_scorer, single_profile_handler, token_load_scorer,
            token_producer, utilization_detector, weighted_random_picker,
        },
        scheduling::Plugin,
    },
    support::fields::{Fields, closest},
};

/// The types that a configuration may name, by name.
#[derive(Clone, Debug, Default)]
pub struct PluginTypes(Vec<Registration>);

impl PluginTypes {
    /// These types.
    #[must_use]
    pub fn new(types: Vec<Registration>) -> Self {
        Self(types)
    }

    /// Adds a type, or replaces the one of the same canonical name.
    pub fn set(&mut self, registration: Registration) {
        self.0.retain(|known| known.type_name != registration.type_name);
        self.0.push(registration);
    }

    /// The type of this canonical name or alias.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Registration> {
        self.0.iter().find(|known| known.type_name == name || known.aliases.contains(&name))
    }

    /// The name most like a wrong one, if one is like it at all.
    #[must_use]
    pub fn suggestion(&self, wrong: &str) -> Option<&'static str> {
        let names = self
            .0
            .iter()
            .flat_map(|known| [known.type_name].into_iter().chain(known.aliases.iter().copied()));
        closest(wrong, names)
    }

    /// All types.
    pub fn iter(&self) -> impl Iterator<Item = &Registration> {
        self.0.iter()
    }
}

/// Names that the Go EPP warns about, and what it says instead.
const DEPRECATED_NAMES: [(&str, &str); 6] = [
    ("by-label", "use label-selector-filter"),
    ("by-label-selector", "use label-selector-filter"),
    (
        "disagg-headers-handler",
        "pd-profile-handler needs it; disagg-profile-handler sets the headers itself",
    ),
    ("kv-cache-scorer", "use kv-cache-utilization-scorer"),
    (
        "prefill-header-handler",
        "pd-profile-handler needs it; disagg-profile-handler sets the headers itself",
    ),
    ("tokenizer", "use token-producer"),
];

/// What to say of a type under the name that a configuration uses for it; `None`: nothing.
#[must_use]
pub(crate) fn deprecation(name: &str, registration: &Registration) -> Option<&'static str> {
    let by_name = DEPRECATED_NAMES.iter().find(|(known, _)| *known == name).map(|&(_, text)| text);
    by_name.or(match registration.stability {
        Stability::Deprecated(text) => Some(text),
        Stability::Beta | Stability::Alpha => None,
    })
}

/// A type whose name is all that matters: a parser, which the request module chooses by name, or a
/// policy of flow control, which has no effect while that is off.
#[derive(Debug)]
struct Inert(&'static str);

impl Plugin for Inert {
    fn type_name(&self) -> &'static str {
        self.0
    }
}

macro_rules! inert {
    ($name:literal) => {{
        fn make(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
            Some(Arc::new(Inert($name)))
        }
        Registration {
            type_name: $name,
            aliases: &[],
            stability: Stability::Beta,
            factory: Some(make),
        }
    }};
}

/// A type without a factory.
const fn pending(type_name: &'static str, stability: Stability) -> Registration {
    Registration { type_name, aliases: &[], stability, factory: None }
}

const fn later(type_name: &'static str) -> Registration {
    pending(type_name, Stability::Beta)
}

const fn later_alpha(type_name: &'static str) -> Registration {
    pending(type_name, Stability::Alpha)
}

/// The types of this program.
#[must_use]
pub fn types() -> PluginTypes {
    let mut types = built();
    types.extend(NOT_BUILT);
    PluginTypes(types)
}

/// Types of this release: those with a file of their own, and inert ones.
fn built() -> Vec<Registration> {
    vec![
        // Filters.
        decode_filter::REGISTRATION,
        prefill_filter::REGISTRATION,
        encode_filter::REGISTRATION,
        by_label_filter::REGISTRATION,
        overload_filter::REGISTRATION,
        // Scorers.
        kv_cache_utilization_scorer::REGISTRATION,
        queue_scorer::REGISTRATION,
        running_requests_size_scorer::REGISTRATION,
        load_aware_scorer::REGISTRATION,
        active_request_scorer::REGISTRATION,
        token_load_scorer::REGISTRATION,
        prefix_cache_scorer::REGISTRATION,
        precise_prefix_cache_scorer::REGISTRATION,
        lora_affinity_scorer::REGISTRATION,
        no_hit_lru_scorer::REGISTRATION,
        // Pickers.
        max_score_picker::REGISTRATION,
        random_picker::REGISTRATION,
        weighted_random_picker::REGISTRATION,
        // Profile handlers, deciders, headers.
        single_profile_handler::REGISTRATION,
        pd_profile_handler::REGISTRATION,
        disagg_profile_handler::REGISTRATION,
        always_disagg_pd_decider::REGISTRATION,
        prefix_based_pd_decider::REGISTRATION,
        prefill_header_handler::REGISTRATION,
        // Producers.
        approx_prefix_cache_producer::REGISTRATION,
        inflight_load_producer::REGISTRATION,
        precise_prefix_cache_producer::REGISTRATION,
        token_producer::REGISTRATION,
        // Data layer.
        file_discovery::REGISTRATION,
        metrics_data_source::REGISTRATION,
        core_metrics_extractor::REGISTRATION,
        utilization_detector::REGISTRATION,
        // Parsers.
        inert!("openai-parser"),
        inert!("anthropic-parser"),
        inert!("vllmhttp-parser"),
        inert!("sglanghttp-parser"),
        inert!("passthrough-parser"),
        // Policies of flow control.
        inert!("fcfs-ordering-policy"),
        inert!("global-strict-fairness-policy"),
        inert!("static-usage-limit-policy"),
    ]
}

/// Known types without a file.
const NOT_BUILT: [Registration; 54] = [
    // Filters.
    later("prefix-cache-affinity-filter"),
    later("slo-headroom-tier-filter"),
    later("header-based-testing-filter"),
    later_alpha("session-affinity-filter"),
    later_alpha("endpoint-attribute-filter"),
    later_alpha("topology-affinity-filter"),
    later_alpha("utilization-filter"),
    later_alpha("multicluster-session-affinity-filter"),
    // Scorers.
    later("context-length-aware"),
    later("latency-scorer"),
    later("mm-embeddings-cache-scorer"),
    later_alpha("session-affinity-scorer"),
    later_alpha("endpoint-attribute-scorer"),
    later_alpha("topology-affinity-scorer"),
    later_alpha("header-label-affinity-scorer"),
    later_alpha("multicluster-queue-scorer"),
    later_alpha("multicluster-kv-cache-utilization-scorer"),
    later_alpha("multicluster-prefix-cache-scorer"),
    // Profile handlers and deciders.
    later("data-parallel-profile-handler"),
    later_alpha("header-profile-handler"),
    later("always-disagg-multimodal-decider"),
    // Producers.
    later("predicted-latency-producer"),
    later("mm-embeddings-cache-producer"),
    later("session-id-producer"),
    later_alpha("burst-prefix-cache-producer"),
    later_alpha("p2p-source-producer"),
    later_alpha("multicluster-approx-prefix-cache-producer"),
    // Flow control, detectors, admitters.
    later("round-robin-fairness-policy"),
    later("program-aware-fairness"),
    later("edf-ordering-policy"),
    later("slo-deadline-ordering-policy"),
    later_alpha("priority-holdback-policy"),
    later_alpha("soft-reflective-ceiling-policy"),
    later_alpha("sheddable-eviction-filter"),
    later_alpha("priority-then-time-eviction-order-policy"),
    later("concurrency-detector"),
    later("latency-slo-admitter"),
    later("probabilistic-admitter"),
    // Data layer.
    later("models-data-source"),
    later("models-data-extractor"),
    later("k8s-notification-source"),
    later("endpoint-notification-source"),
    later_alpha("dcgm-data-source"),
    later_alpha("dcgm-extractor"),
    later_alpha("topology-extractor"),
    later_alpha("multicluster-file-discovery"),
    later_alpha("multicluster-metrics-data-source"),
    later_alpha("multicluster-metrics-extractor"),
    // Parsers.
    later("vllmgrpc-parser"),
    later("vertexai-parser"),
    // Others.
    later("request-attribute-reporter"),
    later("destination-endpoint-served-verifier"),
    later_alpha("agent-identity"),
    later_alpha("disaggregatedset-rollout-screener"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_name_is_given_twice() {
        let types = types();
        let mut names = BTreeSet::new();
        for known in types.iter() {
            for name in [known.type_name].iter().chain(known.aliases) {
                assert!(names.insert(*name), "{name} is registered twice");
            }
        }
        for (name, _) in DEPRECATED_NAMES {
            assert!(names.contains(name), "{name} is deprecated and not registered");
        }
    }

    #[test]
    fn aliases_lead_to_their_type() {
        #[track_caller]
        fn check(name: &str, want: Option<&str>) {
            assert_eq!(types().find(name).map(|known| known.type_name), want, "{name}");
        }
        check("kv-cache-scorer", Some("kv-cache-utilization-scorer"));
        check("disagg-headers-handler", Some("prefill-header-handler"));
        check("by-label", Some("label-selector-filter"));
        check("tokenizer", Some("token-producer"));
        check("queue-scorer", Some("queue-scorer"));
        check("queue-depth-scorer", None);
        check("", None);
        assert_eq!(
            types().suggestion("kv-cache-utilisation-scorer"),
            Some("kv-cache-utilization-scorer")
        );
        assert_eq!(types().suggestion("banana"), None);
    }
}
