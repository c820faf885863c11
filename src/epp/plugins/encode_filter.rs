//! `encode-filter`: keeps the endpoints that encode.
//!
//! Label `llm-d.ai/role`: `encode`, `encode-prefill` or `encode-prefill-decode`. An endpoint without the
//! label is rejected.
//! No parameters.

use std::sync::Arc;

use super::{Building, Registration, Stability, role::RoleFilter};
use crate::{epp::scheduling::Plugin, support::fields::Fields};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "encode-filter",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(RoleFilter {
        type_name: REGISTRATION.type_name,
        roles: &["encode", "encode-prefill", "encode-prefill-decode"],
        unlabelled: false,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::plugins::role::check;

    #[test]
    fn roles_that_encode_pass() {
        check(
            REGISTRATION,
            &[Some("encode"), Some("encode-prefill"), Some("encode-prefill-decode")],
        );
    }
}
