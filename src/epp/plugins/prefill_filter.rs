//! `prefill-filter`: keeps the endpoints that prefill.
//!
//! Label `llm-d.ai/role`: `prefill`, `encode-prefill`, `prefill-decode`, `both` or `encode-prefill-decode`.
//! An endpoint without the label is rejected.
//! No parameters.

use std::sync::Arc;

use super::{Building, Registration, Stability, role::RoleFilter};
use crate::{epp::scheduling::Plugin, support::fields::Fields};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "prefill-filter",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(RoleFilter {
        type_name: REGISTRATION.type_name,
        roles: &["prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"],
        unlabelled: false,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::plugins::role::check;

    #[test]
    fn roles_that_prefill_pass() {
        check(
            REGISTRATION,
            &[
                Some("prefill"),
                Some("encode-prefill"),
                Some("prefill-decode"),
                Some("both"),
                Some("encode-prefill-decode"),
            ],
        );
    }
}
