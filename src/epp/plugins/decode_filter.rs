//! `decode-filter`: keeps the endpoints that decode.
//!
//! Label `llm-d.ai/role`: `decode`, `prefill-decode`, `both` or `encode-prefill-decode`; or no such label.
//! No parameters.

use std::sync::Arc;

use super::{Building, Registration, Stability, role::RoleFilter};
use crate::{epp::scheduling::Plugin, support::fields::Fields};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "decode-filter",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

fn build(_: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    Some(Arc::new(RoleFilter {
        type_name: REGISTRATION.type_name,
        roles: &["decode", "prefill-decode", "both", "encode-prefill-decode"],
        unlabelled: true,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::plugins::role::check;

    #[test]
    fn roles_that_decode_pass() {
        check(
            REGISTRATION,
            &[
                Some("decode"),
                Some("prefill-decode"),
                Some("both"),
                Some("encode-prefill-decode"),
                None,
            ],
        );
    }
}
