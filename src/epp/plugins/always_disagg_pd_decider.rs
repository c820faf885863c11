//! `always-disagg-pd-decider`: a further stage is always worth it.
//!
//! No parameters.

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::scheduling::{Cycle, Decider, Plugin},
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "always-disagg-pd-decider",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(AlwaysDisaggPdDecider))
}

/// A further stage is always worth it.
#[derive(Clone, Copy, Debug, Default)]
pub struct AlwaysDisaggPdDecider;

impl Plugin for AlwaysDisaggPdDecider {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn decider(&self) -> Option<&dyn Decider> {
        Some(self)
    }
}

impl Decider for AlwaysDisaggPdDecider {
    fn decide(&self, _: &Cycle<'_>, _: usize) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::testing::{Rig, build, scraped};
    use serde_json::json;

    #[test]
    fn the_answer_is_yes() {
        let plugin = build(REGISTRATION, json!({})).unwrap();
        let rig = Rig::new([scraped()]);
        assert!(plugin.decider().unwrap().decide(&rig.cycle(), 0));
        assert_eq!(build(REGISTRATION, json!({"x": 1})).unwrap_err(), ["x: unknown field"]);
    }
}
