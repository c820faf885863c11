//! What the filters by role share.

use crate::epp::{
    datalayer::ROLE_LABEL,
    scheduling::{Cycle, Filter, Plugin},
};

/// Keeps endpoints of some roles.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoleFilter {
    pub(super) type_name: &'static str,
    /// Values of the label that pass.
    pub(super) roles: &'static [&'static str],
    /// Does an endpoint without the label pass?
    pub(super) unlabelled: bool,
}

impl Plugin for RoleFilter {
    fn type_name(&self) -> &'static str {
        self.type_name
    }
    fn filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl Filter for RoleFilter {
    fn filter(&self, cycle: &Cycle<'_>, keep: &mut Vec<usize>) {
        keep.retain(|&at| match cycle.endpoints[at].label(ROLE_LABEL) {
            Some(role) => self.roles.contains(&role),
            None => self.unlabelled,
        });
    }
}

/// Of endpoints in every role, without one and in an unknown one, those in `want` pass.
#[cfg(test)]
#[track_caller]
pub(super) fn check(registration: super::Registration, want: &[Option<&str>]) {
    use crate::epp::scheduling::testing::{Rig, build};
    let roles = [
        None,
        Some(""),
        Some("unknown"),
        Some("decode"),
        Some("prefill"),
        Some("encode"),
        Some("prefill-decode"),
        Some("encode-prefill"),
        Some("encode-prefill-decode"),
        Some("both"),
    ];
    let labels = roles.map(|role| role.map(|role| (ROLE_LABEL, role)));
    let labels: Vec<&[(&str, &str)]> = labels.iter().map(Option::as_slice).collect();
    let rig = Rig::labelled(&labels);
    let plugin = build(registration, serde_json::json!({})).unwrap();
    let mut got: Vec<_> = rig.passing(&*plugin).into_iter().map(|at| roles[at]).collect();
    let mut want = want.to_vec();
    got.sort_unstable();
    want.sort_unstable();
    assert_eq!(got, want);
    let faults = build(registration, serde_json::json!({"x": 1})).unwrap_err();
    assert_eq!(faults, ["x: unknown field"]);
}
