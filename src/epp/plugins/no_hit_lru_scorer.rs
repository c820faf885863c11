//! `no-hit-lru-scorer`: spreads prompts that nobody has cached, the endpoint longest without one first.
//!
//! # Formula
//!
//! ```text
//! warm (some candidate holds a block):  0.5 for everyone
//! cold, n candidates:                   1 if n = 1
//!   never used, the ith of them:        1 − i / (n − 1)
//!   used, at place p of the list:       max(0, 1 − (never used + p) / (n − 1))    p = 0: longest ago
//! ```
//!
//! When a cold request is routed, the first endpoint of the primary profile goes to the end of the
//! list, and then that of the profile `prefill`. No prefix matches: cold.
//!
//! Parameters: `lruSize` (endpoints, default 1024, positive), `prefixMatchInfoProducerName` (default:
//! the approximate producer). `prefixPluginType` and `prefixPluginName` of older releases load and have
//! no effect.
//!
//! # Differences to the Go EPP
//!
//! * A removed endpoint leaves the list at once; Go keeps it until others push it out.
//! * Whether a request is cold is judged by the candidates of the primary profile alone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use super::{Building, Registration, Stability, prefix_cache_scorer::match_producer};
use crate::{
    epp::{
        datalayer::{Endpoint, EndpointId},
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        scheduling::{Cycle, DataKey, Flight, Plugin, PreRequest, SchedulingResult, Scorer},
    },
    support::{fields::Fields, sync::lock},
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "no-hit-lru-scorer",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

const PRODUCER: &str = "prefixMatchInfoProducerName";
/// The profile whose pick counts besides the primary one's.
const PREFILL: &str = "prefill";

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let size = params.integer("lruSize", 1..=1 << 20).unwrap_or(1024);
    for old in ["prefixPluginType", "prefixPluginName"] {
        params.ignored(old, "has no effect; use `prefixMatchInfoProducerName`");
    }
    let named = params.string(PRODUCER).filter(|name| !name.is_empty());
    let producer = match_producer(params, building, PRODUCER, named.as_deref())?;
    Some(Arc::new(NoHitLruScorer { size, producer, used: Mutex::default() }))
}

/// Spreads prompts that nobody has cached.
#[derive(Debug)]
pub struct NoHitLruScorer {
    size: usize,
    producer: Arc<str>,
    /// Who was sent cold requests, the last one last; at most `size`.
    used: Mutex<Vec<EndpointId>>,
}

impl NoHitLruScorer {
    fn is_cold(&self, cycle: &Cycle<'_>, mut among: impl Iterator<Item = usize>) -> bool {
        let Some(matches) = cycle.produced.prefix(&self.producer) else { return true };
        !among.any(|at| matches.matched.get(at).is_some_and(|&blocks| blocks > 0))
    }

    fn touch(&self, id: EndpointId) {
        let mut used = lock(&self.used);
        used.retain(|known| *known != id);
        if used.len() >= self.size {
            used.remove(0);
        }
        used.push(id);
    }
}

impl Plugin for NoHitLruScorer {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }
    fn pre_request(&self) -> Option<&dyn PreRequest> {
        Some(self)
    }
    fn consumes(&self) -> Vec<DataKey> {
        vec![DataKey::Prefix(Arc::clone(&self.producer))]
    }
    fn endpoint_removed(&self, endpoint: &Endpoint) {
        lock(&self.used).retain(|known| *known != endpoint.id());
    }
}

impl Scorer for NoHitLruScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        if !self.is_cold(cycle, among.iter().copied()) {
            return scores.fill(0.5);
        }
        if among.len() < 2 {
            return scores.fill(1.0);
        }
        let places: HashMap<EndpointId, usize> =
            lock(&self.used).iter().enumerate().map(|(place, &id)| (id, place)).collect();
        let place = |at: usize| places.get(&cycle.endpoints[at].id()).copied();
        let unused = among.iter().filter(|&&at| place(at).is_none()).count();
        let last = (among.len() - 1) as f64;
        let mut rank = 0;
        for (&at, score) in among.iter().zip(scores) {
            let before = place(at).map_or_else(
                || {
                    rank += 1;
                    rank - 1
                },
                |place| unused + place,
            );
            *score = (1.0 - before as f64 / last).max(0.0);
        }
    }
}

impl PreRequest for NoHitLruScorer {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        _: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        let primary = result.results.get(&result.primary);
        let scored = primary.map_or(&[][..], |run| &run.scored);
        if self.is_cold(cycle, scored.iter().map(|scored| scored.endpoint)) {
            let first = |profile| result.results.get(profile)?.picked.first().copied();
            for at in [first(&result.primary), first(PREFILL)].into_iter().flatten() {
                self.touch(cycle.endpoints[at].id());
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::{
        PrefixMatches, ProfileResults, ProfileRun, Scored,
        testing::{Rig, assert_close, build, scraped},
    };
    use serde_json::json;

    const APPROXIMATE: &str = "approx-prefix-cache-producer";

    fn rig(pods: usize, matched: Option<Vec<u32>>) -> Rig {
        let mut rig = Rig::new(vec![scraped(); pods]);
        if let Some(matched) = matched {
            let matches = PrefixMatches { total: 4, block: 16, matched };
            rig.produced.set_prefix(&APPROXIMATE.into(), matches);
        }
        rig
    }

    /// Routes a request to the first endpoints of these profiles, the first of which is primary.
    fn route(plugin: &dyn Plugin, rig: &Rig, picks: &[(&str, usize)]) {
        let scored: Vec<_> =
            (0..rig.endpoints.len()).map(|endpoint| Scored { endpoint, score: 0.0 }).collect();
        let run = |at| Some(ProfileRun { picked: vec![at], scored: scored.clone() });
        let results = picks.iter().map(|&(name, at)| (name.into(), run(at))).collect();
        let result =
            SchedulingResult { primary: picks[0].0.into(), results: ProfileResults(results) };
        let hears = plugin.pre_request().unwrap();
        hears.pre_request(&rig.cycle(), &result, &mut HeaderEdits::new()).unwrap();
    }

    #[test]
    fn a_warm_request_has_no_opinion() {
        let plugin = build(REGISTRATION, json!({})).unwrap();
        let warm = rig(3, Some(vec![0, 2, 0]));
        assert_close(&warm.scores(&*plugin), &[0.5, 0.5, 0.5]);
        // And it changes nothing.
        route(&*plugin, &warm, &[("default", 0)]);
        assert_close(&rig(3, None).scores(&*plugin), &[1.0, 0.5, 0.0]);
    }

    #[test]
    fn cold_requests_go_to_whoever_waited_longest() {
        let plugin = build(REGISTRATION, json!({"lruSize": 4})).unwrap();
        for matched in [None, Some(vec![0, 0, 0])] {
            assert_close(&rig(3, matched).scores(&*plugin), &[1.0, 0.5, 0.0]);
        }
        assert_close(&rig(1, None).scores(&*plugin), &[1.0]);
        let rig = rig(3, None);
        route(&*plugin, &rig, &[("default", 0)]);
        assert_close(&rig.scores(&*plugin), &[0.0, 1.0, 0.5]);
        route(&*plugin, &rig, &[("decode", 1), ("prefill", 2)]);
        assert_close(&rig.scores(&*plugin), &[1.0, 0.5, 0.0]);
        route(&*plugin, &rig, &[("default", 0)]);
        assert_close(&rig.scores(&*plugin), &[0.0, 1.0, 0.5]);
        plugin.endpoint_removed(&rig.endpoints[1]);
        assert_close(&rig.scores(&*plugin), &[0.0, 1.0, 0.5]);
    }

    #[test]
    fn the_list_is_bounded() {
        let plugin = build(REGISTRATION, json!({"lruSize": 1})).unwrap();
        let rig = rig(3, None);
        route(&*plugin, &rig, &[("default", 0)]);
        route(&*plugin, &rig, &[("default", 1)]);
        assert_close(&rig.scores(&*plugin), &[1.0, 0.0, 0.5]);
    }

    #[test]
    fn old_parameters_load() {
        let old = json!({"prefixPluginType": "prefix-cache-scorer", "prefixPluginName": "x"});
        let plugin = build(REGISTRATION, old).unwrap();
        assert_eq!(plugin.consumes(), [DataKey::Prefix(APPROXIMATE.into())]);
        let faults = build(REGISTRATION, json!({"lruSize": 0})).unwrap_err();
        assert!(faults[0].starts_with("lruSize: 0 is out of range"), "{faults:?}");
    }
}
