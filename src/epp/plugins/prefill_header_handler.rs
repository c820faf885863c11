//! `prefill-header-handler` (also `disagg-headers-handler`): tells the sidecar of the decode pod who
//! prefills and who encodes.
//!
//! ```text
//! x-prefiller-host-port = ip:port of the first pick of prefillProfile
//! x-encoder-hosts-ports = ip:port of all picks of encodeProfile, joined by commas
//! ```
//!
//! A header without a pick is removed: what a client sends would make our pods call anybody. (The Go
//! EPP cannot remove a header; it leaves the client's or sets an empty one.) Parameters:
//! `prefillProfile` (default `prefill`), `encodeProfile` (default `encode`).

use std::sync::Arc;

use super::{Building, Registration, Stability};
use crate::{
    epp::{
        director::Refusal,
        ext_proc::headers::HeaderEdits,
        scheduling::{Cycle, Flight, Plugin, PreRequest, SchedulingResult},
    },
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "prefill-header-handler",
    aliases: &["disagg-headers-handler"],
    stability: Stability::Beta,
    factory: Some(build),
};

/// `ip:port` of the pod that prefills.
const PREFILLER: &str = "x-prefiller-host-port";
/// `ip:port,…` of the pods that encode.
const ENCODERS: &str = "x-encoder-hosts-ports";

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let prefill = params.string("prefillProfile");
    let encode = params.string("encodeProfile");
    Some(Arc::new(PrefillHeaderHandler {
        prefill: prefill.unwrap_or_else(|| "prefill".to_owned()),
        encode: encode.unwrap_or_else(|| "encode".to_owned()),
    }))
}

/// Tells the sidecar of the decode pod who prefills and who encodes.
#[derive(Clone, Debug)]
pub struct PrefillHeaderHandler {
    prefill: String,
    encode: String,
}

impl Plugin for PrefillHeaderHandler {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn pre_request(&self) -> Option<&dyn PreRequest> {
        Some(self)
    }
}

impl PreRequest for PrefillHeaderHandler {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        set_stage_headers(cycle, result, &self.prefill, &self.encode, headers);
        Ok(None)
    }
}

/// Sets both headers from the results of these profiles.
pub(super) fn set_stage_headers(
    cycle: &Cycle<'_>,
    result: &SchedulingResult,
    prefill: &str,
    encode: &str,
    headers: &mut HeaderEdits,
) {
    let picked = |profile: &str| {
        let run = result.results.get(profile);
        let picked = run.map(|run| run.picked.iter()).into_iter().flatten();
        picked.map(|&at| cycle.endpoints[at].address())
    };
    let prefiller = picked(prefill).next().map(str::to_owned);
    let encoders = picked(encode).collect::<Vec<_>>().join(",");
    for (name, value) in [(PREFILLER, prefiller), (ENCODERS, Some(encoders))] {
        match value.filter(|value| !value.is_empty()) {
            Some(value) => headers.set(name, value),
            // Another plugin with other profiles may have set it.
            None if headers.sets().iter().any(|(set, _)| set == name) => {}
            None => headers.remove(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::{
        ProfileResults, ProfileRun,
        testing::{Rig, build, scraped},
    };
    use serde_json::{Value, json};

    #[track_caller]
    fn check(params: Value, results: &[(&str, &[usize])], set: &[(&str, &str)], removed: &[&str]) {
        let rig = Rig::new(vec![scraped(); 4]);
        let named = results.iter().map(|&(name, picked)| {
            let run = ProfileRun { picked: picked.to_vec(), scored: Vec::new() };
            (name.into(), (!picked.is_empty()).then_some(run))
        });
        let results = ProfileResults(named.collect());
        let result = SchedulingResult { primary: "decode".into(), results };
        let plugin = build(REGISTRATION, params).unwrap();
        let mut headers = HeaderEdits::new();
        let hook = plugin.pre_request().unwrap();
        assert!(hook.pre_request(&rig.cycle(), &result, &mut headers).unwrap().is_none());
        let got: Vec<_> = headers
            .sets()
            .iter()
            .map(|(name, value)| (&**name, std::str::from_utf8(value).unwrap()))
            .collect();
        assert_eq!((&*got, headers.removes()), (set, removed));
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn headers_name_the_picks_of_the_stages() {
        check(json!({}), &[("decode", &[0])], &[], &[PREFILLER, ENCODERS]);
        check(json!({}), &[("decode", &[0]), ("prefill", &[1, 2])],
              &[(PREFILLER, "10.0.0.2:8000")], &[ENCODERS]);
        check(json!({}), &[("decode", &[0]), ("encode", &[2, 3]), ("prefill", &[1])],
              &[(PREFILLER, "10.0.0.2:8000"), (ENCODERS, "10.0.0.3:8000,10.0.0.4:8000")], &[]);
        check(json!({}), &[("decode", &[0]), ("prefill", &[]), ("encode", &[])],
              &[], &[PREFILLER, ENCODERS]);
        let custom = json!({"prefillProfile": "p", "encodeProfile": "e"});
        check(custom, &[("decode", &[0]), ("p", &[1]), ("e", &[2]), ("prefill", &[3])],
              &[(PREFILLER, "10.0.0.2:8000"), (ENCODERS, "10.0.0.3:8000")], &[]);
    }

    #[test]
    fn a_header_that_another_plugin_set_stays() {
        let rig = Rig::new([scraped()]);
        let result =
            SchedulingResult { primary: "decode".into(), results: ProfileResults::default() };
        let mut headers = HeaderEdits::new();
        headers.set(PREFILLER, "1.2.3.4:5");
        set_stage_headers(&rig.cycle(), &result, "prefill", "encode", &mut headers);
        assert_eq!(headers.sets().len(), 1);
        assert_eq!(headers.removes(), [ENCODERS]);
    }
}
