//! `lora-affinity-scorer`: prefers endpoints that have the request's LoRA adapter, or room for it.
//!
//! ```text
//! score = 1.0   if the target model is an active adapter
//!       = 0.8   else if |active| + |waiting| < the adapters that fit
//!       = 0.6   else if the target model is a waiting adapter
//!       = 0.0   else
//! ```
//!
//! No parameters. An endpoint that reports no adapters, or nothing at all, has room for 0 of them.

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::scheduling::{Cycle, Plugin, Scorer},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "lora-affinity-scorer",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(LoraAffinityScorer))
}

/// Prefers endpoints that have the request's LoRA adapter, or room for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoraAffinityScorer;

impl Plugin for LoraAffinityScorer {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn scorer(&self) -> Option<&dyn Scorer> {
        Some(self)
    }
}

impl Scorer for LoraAffinityScorer {
    fn score(&self, cycle: &Cycle<'_>, among: &[usize], scores: &mut [f64]) {
        let model = &*cycle.request.target_model;
        for (score, &at) in scores.iter_mut().zip(among) {
            let lora = &cycle.metrics[at].lora;
            let has = |adapters: &[String]| adapters.iter().any(|adapter| adapter == model);
            *score = if has(&lora.active) {
                1.0
            } else if lora.active.len() + lora.waiting.len() < lora.max_active {
                0.8
            } else if has(&lora.waiting) {
                0.6
            } else {
                0.0
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::{
        datalayer::{LoraMetrics, Metrics},
        scheduling::testing::{Rig, assert_close, request, scraped},
    };

    #[track_caller]
    fn check(active: &[&str], waiting: &[&str], max_active: usize, want: f64) {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let lora = LoraMetrics { active: owned(active), waiting: owned(waiting), max_active };
        let mut rig = Rig::new([Metrics { lora, ..scraped() }]);
        rig.request = request("m1", "");
        assert_close(&rig.scores(&LoraAffinityScorer), &[want]);
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn active_then_room_then_waiting() {
        //    active         waiting  max  score
        check(&["m1"],       &[],     5,   1.0);
        check(&["m1", "m2"], &["m3"], 2,   1.0);
        check(&["m2"],       &["m1"], 5,   0.8);
        check(&["m2"],       &[],     2,   0.8);
        check(&["m2"],       &["m1"], 2,   0.6);
        check(&["m2"],       &["m3"], 2,   0.0);
        check(&["m4", "m5"], &[],     2,   0.0);
        check(&[],           &[],     0,   0.0); // no data
        check(&["m1"],       &[],     0,   1.0); // the limit not reported
    }
}
