//! `single-profile-handler`: runs the one profile there is.
//!
//! Every profile is run once (a configuration has exactly one with this handler); the first is
//! primary. Parameters are ignored with a warning, as in the Go EPP. When its filters leave nobody:
//! 429 `no endpoints available for the given request`, reason `rejected-saturated`.

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::{
        director::{DropReason, Refusal, RefusalCode},
        scheduling::{Cycle, Plugin, ProfileHandler, ProfileResults, SchedulingProfile},
    },
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "single-profile-handler",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    params.ignore_rest("has no effect: this plugin has no parameters");
    Some(Arc::new(SingleProfileHandler))
}

/// Runs the one profile there is.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleProfileHandler;

impl Plugin for SingleProfileHandler {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn profile_handler(&self) -> Option<&dyn ProfileHandler> {
        Some(self)
    }
}

impl ProfileHandler for SingleProfileHandler {
    fn pick(
        &self,
        _: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &ProfileResults,
    ) -> Vec<usize> {
        if results.0.is_empty() { (0..profiles.len()).collect() } else { Vec::new() }
    }

    fn process_results(
        &self,
        _: &Cycle<'_>,
        _: &[SchedulingProfile],
        results: &mut ProfileResults,
    ) -> Result<Arc<str>, Refusal> {
        match &*results.0 {
            [(name, Some(_))] => Ok(Arc::clone(name)),
            [(_, None)] => Err(no_endpoints()),
            _ => Err(Refusal::new(
                RefusalCode::Internal,
                "failed to find target endpoint: single profile handler is intended to be used \
                 with a single profile, failed to process multiple profiles",
            )),
        }
    }
}

/// The refusal when filters leave nobody.
fn no_endpoints() -> Refusal {
    Refusal::new(RefusalCode::ResourceExhausted, "no endpoints available for the given request")
        .because(DropReason::RejectedSaturated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::{
        ProfileRun,
        testing::{Rig, build, scraped},
    };
    use serde_json::json;

    fn results(found: &[bool]) -> ProfileResults {
        let run = || ProfileRun { picked: vec![0], scored: Vec::new() };
        let named = |(at, found): (usize, &bool)| (format!("p{at}").into(), found.then(run));
        ProfileResults(found.iter().enumerate().map(named).collect())
    }

    #[test]
    fn one_profile_is_run_and_is_primary() {
        let handler = build(REGISTRATION, json!({"whatever": [1]})).unwrap();
        let handler = handler.profile_handler().unwrap();
        let rig = Rig::new([scraped()]);
        let process = |found: &[bool]| {
            let refused = handler.process_results(&rig.cycle(), &[], &mut results(found));
            refused.map(|name| name.to_string()).map_err(|refusal| refusal.to_string())
        };
        assert_eq!(process(&[true]), Ok("p0".to_owned()));
        let exhausted = "ResourceExhausted - no endpoints available for the given request";
        assert_eq!(process(&[false]), Err(exhausted.to_owned()));
        assert!(process(&[true, true]).unwrap_err().contains("with a single profile"));
    }
}
