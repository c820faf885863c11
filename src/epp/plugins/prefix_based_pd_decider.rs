//! `prefix-based-pd-decider`: a prefill pod is worth it if enough of the prompt is not cached on the
//! decode pod.
//!
//! ```text
//! uncached = tokens - blocks that the decode endpoint holds × tokens per block
//! prefill  = nonCachedTokens > 0
//!            and tokens ≥ promptTokens and tokens ≥ nonCachedTokens and uncached ≥ nonCachedTokens
//! ```
//!
//! Parameters: `nonCachedTokens` (default 0: never), `promptTokens` (default 0: any length), and
//! `prefixMatchInfoProducerName` (default: the approximate producer), whose blocks count. Where nobody
//! has made token ids, `tokens` is four bytes of text each, as in the Go EPP. If the prefix matches are
//! not known, the answer is no.

use std::sync::Arc;

use super::{Building, Registration, Stability, prefix::input_tokens};
use crate::{
    epp::scheduling::{Cycle, DataKey, Decider, Plugin},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "prefix-based-pd-decider",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

/// Whose prefix matches are read unless one is named.
const DEFAULT_PRODUCER: &str = "approx-prefix-cache-producer";

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let tokens = |name| params.integer(name, 0..=u64::from(u32::MAX)).unwrap_or_default();
    let (non_cached_tokens, prompt_tokens) = (tokens("nonCachedTokens"), tokens("promptTokens"));
    // An empty name is none, as everywhere.
    let named = params.string("prefixMatchInfoProducerName").filter(|name| !name.is_empty());
    let producer = match named {
        Some(name) => Some(name.into()),
        // Without a threshold nobody's matches are read: no producer has to be added for us.
        None => (non_cached_tokens > 0).then(|| building.default_of(DEFAULT_PRODUCER)),
    };
    Some(Arc::new(PrefixBasedPdDecider { non_cached_tokens, prompt_tokens, producer }))
}

/// A prefill pod is worth it if enough of the prompt is not cached on the decode pod.
#[derive(Clone, Debug)]
pub struct PrefixBasedPdDecider {
    non_cached_tokens: u64,
    prompt_tokens: u64,
    producer: Option<Arc<str>>,
}

impl Plugin for PrefixBasedPdDecider {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn decider(&self) -> Option<&dyn Decider> {
        Some(self)
    }
    fn consumes(&self) -> Vec<DataKey> {
        let prefix = self.producer.iter().map(|name| DataKey::Prefix(Arc::clone(name)));
        prefix.chain([DataKey::Tokens]).collect()
    }
}

impl Decider for PrefixBasedPdDecider {
    fn decide(&self, cycle: &Cycle<'_>, decode: usize) -> bool {
        if self.non_cached_tokens == 0 {
            return false;
        }
        let tokens = input_tokens(cycle.request, cycle.produced);
        if tokens < self.prompt_tokens.max(self.non_cached_tokens) {
            return false;
        }
        let matches = self.producer.as_deref().and_then(|name| cycle.produced.prefix(name));
        let Some(matches) = matches else { return false };
        let blocks = matches.matched.get(decode).copied().unwrap_or_default();
        let cached = u64::from(blocks) * u64::from(matches.block);
        tokens.saturating_sub(cached) >= self.non_cached_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::{
        PrefixMatches,
        testing::{Rig, build, request, scraped},
    };
    use serde_json::{Value, json};

    /// `cached` blocks of 1 token are on the endpoint; `None`: nobody knows. Without `tokens` there are
    /// 40 bytes of text.
    #[track_caller]
    fn check(params: Value, tokens: Option<usize>, cached: Option<u32>, want: bool) {
        let text = params.to_string();
        let plugin = build(REGISTRATION, params).unwrap();
        let mut rig = Rig::new([scraped()]);
        rig.request = request("model", &"text".repeat(10));
        rig.produced.tokens =
            tokens.map(|tokens| crate::epp::scheduling::testing::exact_tokens(&vec![1; tokens]));
        if let Some(cached) = cached {
            let matches = PrefixMatches { total: 10, block: 1, matched: vec![cached] };
            rig.produced.set_prefix(&DEFAULT_PRODUCER.into(), matches);
        }
        let got = plugin.decider().unwrap().decide(&rig.cycle(), 0);
        assert_eq!(got, want, "{text}, {tokens:?} tokens, {cached:?} cached");
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn enough_must_be_uncached() {
        let at_least = |tokens: i32| json!({"nonCachedTokens": tokens});
        check(json!({}),    Some(10), Some(5),  false);
        check(at_least(0),  Some(10), Some(5),  false);
        check(at_least(20), Some(10), Some(0),  false); // shorter than the threshold
        check(at_least(5),  Some(10), Some(8),  false);
        check(at_least(5),  Some(10), Some(5),  true);  // exactly
        check(at_least(3),  Some(10), Some(2),  true);
        check(at_least(1),  Some(10), Some(10), false);
        check(at_least(5),  Some(10), Some(0),  true);
        check(at_least(1),  Some(10), Some(99), false);
        check(at_least(5),  Some(10), None,     false);
        check(at_least(10), None,     Some(0),  true);  // 40 bytes are ten tokens
        check(at_least(11), None,     Some(0),  false);
        check(at_least(10), None,     Some(1),  false);
        let short = json!({"nonCachedTokens": 5, "promptTokens": 20});
        check(short.clone(), Some(10), Some(0), false);
        check(short,         Some(20), Some(0), true);
    }

    #[test]
    fn another_producer_can_be_named() {
        let named = |name| json!({"nonCachedTokens": 5, "prefixMatchInfoProducerName": name});
        let plugin = build(REGISTRATION, named("")).unwrap();
        assert_eq!(plugin.consumes(), [DataKey::Prefix(DEFAULT_PRODUCER.into()), DataKey::Tokens]);
        let plugin = build(REGISTRATION, named("mine")).unwrap();
        assert_eq!(plugin.consumes(), [DataKey::Prefix("mine".into()), DataKey::Tokens]);
        let mut rig = Rig::new([scraped()]);
        rig.produced.tokens = Some(crate::epp::scheduling::testing::exact_tokens(&[1; 48]));
        let matches = PrefixMatches { total: 3, block: 16, matched: vec![2] };
        rig.produced.set_prefix(&"mine".into(), matches);
        assert!(plugin.decider().unwrap().decide(&rig.cycle(), 0));
    }

    #[test]
    fn negative_thresholds_are_refused() {
        for field in ["nonCachedTokens", "promptTokens"] {
            let faults = build(REGISTRATION, json!({field: -1})).unwrap_err();
            assert!(faults[0].starts_with(&format!("{field}: -1 is out of range")), "{faults:?}");
        }
    }
}
