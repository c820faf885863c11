//! `disagg-profile-handler`: splits a request over pods that encode, prefill and decode.
//!
//! ```text
//! decode-first (default):  decode → encode, if deciders.encode says so
//!                                 → prefill, if deciders.prefill says so
//! prefill-first:           prefill → decode → encode, if deciders.encode says so
//! ```
//!
//! The decode profile is primary. A stage whose profile is not configured, or finds nobody, or whose
//! decider is missing or says no, is left out; without a decode endpoint the request is refused with
//! 429 `failed to find available decode workers`. The headers of
//! [`prefill-header-handler`](super::prefill_header_handler) are set.
//!
//! A pod is never the prefill pod of its own decode (pods of the role `both` pass both filters): the
//! prefill profile's picker chooses again without it, and if it was the only candidate, the request
//! is decoded where it is.
//!
//! Parameters: `stageOrder`; `profiles: {decode, prefill, encode}`, the profiles' names, by default
//! these; `deciders: {prefill, encode}`, names of plugins. Or instead of `profiles` and `deciders` the
//! older flat names `decodeProfile`, `prefillProfile`, `encodeProfile`, `prefillDeciderPluginName`
//! (before it `deciderPluginName`), `encodeDeciderPluginName`. `primaryPort`: see
//! [`pd-profile-handler`](super::pd_profile_handler).
//!
//! Encode runs after decode in either order, so that its decider knows the decode endpoint.

use std::sync::Arc;

use super::{Building, Registration, Stability, prefill_header_handler::set_stage_headers};
use crate::{
    epp::{
        director::{DropReason, Refusal, RefusalCode},
        ext_proc::headers::HeaderEdits,
        scheduling::{
            Cycle, Decision, Decisions, Flight, Plugin, PreRequest, ProfileHandler, ProfileResults,
            SchedulingProfile, SchedulingResult, Scored,
        },
    },
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "disagg-profile-handler",
    aliases: &[],
    stability: Stability::Beta,
    factory: Some(build),
};

/// Older flat names, in the place of `profiles` and `deciders`.
const FLAT: [&str; 6] = [
    "decodeProfile",
    "prefillProfile",
    "encodeProfile",
    "prefillDeciderPluginName",
    "encodeDeciderPluginName",
    "deciderPluginName",
];

/// Which stage is scheduled first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StageOrder {
    DecodeFirst,
    PrefillFirst,
}

/// Accepts what the Go EPP does: any case, with or without `-`, `_` and `first`.
fn stage_order(text: &str) -> Result<StageOrder, String> {
    match text.to_lowercase().replace(['-', '_'], "").as_str() {
        "" | "decodefirst" | "decode" => Ok(StageOrder::DecodeFirst),
        "prefillfirst" | "prefill" => Ok(StageOrder::PrefillFirst),
        _ => Err(format!("{text:?} is not one of `decode-first`, `prefill-first`")),
    }
}

/// Splits a request over pods that encode, prefill and decode.
#[derive(Debug)]
pub struct DisaggProfileHandler {
    order: StageOrder,
    decode: Arc<str>,
    prefill: Arc<str>,
    encode: Arc<str>,
    prefill_decider: Option<Arc<dyn Plugin>>,
    encode_decider: Option<Arc<dyn Plugin>>,
    primary_port: Option<u16>,
    decisions: Decisions,
}

fn build(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let order = params.parsed("stageOrder", stage_order).unwrap_or(StageOrder::DecodeFirst);
    let nested = ["profiles", "deciders"].iter().any(|field| params.has(field));
    if let Some(flat) = FLAT.iter().find(|field| nested && params.has(field)) {
        params.fault(flat, "cannot be used together with `profiles` or `deciders`");
    }
    let (profiles, deciders) = (params.mapping("profiles"), params.mapping("deciders"));
    // An empty name is none, as in the Go EPP.
    let name = |fields: &Fields<'_>, nested, flat| {
        let names = [fields.string(nested), params.string(flat)];
        names.into_iter().flatten().find(|name| !name.is_empty())
    };
    let profile = |stage: &'static str, flat| {
        name(&profiles, stage, flat).unwrap_or_else(|| stage.to_owned()).into()
    };
    let decode = profile("decode", "decodeProfile");
    let prefill = profile("prefill", "prefillProfile");
    let encode = profile("encode", "encodeProfile");
    let oldest = params.string("deciderPluginName").filter(|name| !name.is_empty());
    let prefill_decider = name(&deciders, "prefill", "prefillDeciderPluginName");
    let encode_decider = name(&deciders, "encode", "encodeDeciderPluginName");
    let decider = |stage: &str, flat: &str, name: Option<String>| {
        let name = name?;
        if deciders.has(stage) {
            decider(&deciders, stage, building, &name)
        } else {
            decider(params, flat, building, &name)
        }
    };
    let flat = if prefill_decider.is_some() { FLAT[3] } else { FLAT[5] };
    let prefill_decider = prefill_decider.or(oldest);
    if order == StageOrder::PrefillFirst && prefill_decider.is_some() {
        params.fault("stageOrder", "prefill decider is not supported in prefill-first stage order");
    }
    let prefill_decider = decider("prefill", flat, prefill_decider);
    let encode_decider = decider("encode", FLAT[4], encode_decider);
    profiles.finish();
    deciders.finish();
    Some(Arc::new(DisaggProfileHandler {
        order,
        decode,
        prefill,
        encode,
        prefill_decider,
        encode_decider,
        primary_port: primary_port(params),
        decisions: Decisions::new(
            building.registry(),
            ["llm_d_epp_disagg_decision_total", "llm_d_inference_scheduler_disagg_decision_total"],
            "Total number of disaggregation routing decisions made",
            building.name(),
            REGISTRATION.type_name,
        ),
    }))
}

/// The decider of this name, or a fault at `field`.
pub(super) fn decider(
    params: &Fields<'_>,
    field: &str,
    building: &dyn Building,
    name: &str,
) -> Option<Arc<dyn Plugin>> {
    let plugin = building.plugin(params, field, name)?;
    if plugin.decider().is_none() {
        let type_name = plugin.type_name();
        params.fault(field, format!("plugin '{name}' of type '{type_name}' is no decider"));
        return None;
    }
    Some(plugin)
}

/// `primaryPort`; 0 = none.
pub(super) fn primary_port(params: &Fields<'_>) -> Option<u16> {
    params.integer("primaryPort", 0..=u64::from(u16::MAX)).filter(|&port| port != 0)
}

/// With a primary port: tells the sidecar behind it which rank was picked.
pub(super) fn set_rank_header(
    cycle: &Cycle<'_>,
    result: &SchedulingResult,
    headers: &mut HeaderEdits,
) {
    if let Some(&at) = result.targets().first() {
        let address = cycle.endpoints[at].address().to_owned();
        headers.set("x-data-parallel-host-port", address);
    }
}

/// The index of a profile that is configured and has not run.
pub(super) fn pending(
    name: &str,
    profiles: &[SchedulingProfile],
    results: &ProfileResults,
) -> Option<usize> {
    let at = profiles.iter().position(|profile| *profile.name == *name)?;
    (!results.ran(name)).then_some(at)
}

/// The first pick of the decode profile, or the refusal when there is none; removes that endpoint
/// from the picks of the prefill profile.
pub(super) fn decode_and_prefill(
    cycle: &Cycle<'_>,
    profiles: &[SchedulingProfile],
    results: &mut ProfileResults,
    (decode, prefill): (&str, &str),
) -> Result<usize, Refusal> {
    let first = results.get(decode).and_then(|run| run.picked.first().copied());
    let decode = first.ok_or_else(|| {
        Refusal::new(
            RefusalCode::ResourceExhausted,
            "failed to find target endpoint: failed to find available decode workers",
        )
        .because(DropReason::RejectedSaturated)
    })?;
    let Some((_, found)) = results.0.iter_mut().find(|(name, _)| **name == *prefill) else {
        return Ok(decode);
    };
    let Some(run) = found.as_mut().filter(|run| run.picked.contains(&decode)) else {
        return Ok(decode);
    };
    let mut others: Vec<Scored> =
        run.scored.iter().copied().filter(|scored| scored.endpoint != decode).collect();
    let picker = profiles.iter().find(|profile| *profile.name == *prefill);
    let picker = picker.and_then(|profile| profile.picker.plugin.picker());
    run.picked = match picker {
        Some(picker) if !others.is_empty() => picker.pick(cycle, &mut others),
        _ => Vec::new(),
    };
    if run.picked.is_empty() {
        *found = None;
    }
    Ok(decode)
}

impl DisaggProfileHandler {
    /// Does a decider say that its stage is worth it?
    fn wanted(decider: Option<&Arc<dyn Plugin>>, cycle: &Cycle<'_>, decode: usize) -> bool {
        let decider = decider.and_then(|plugin| plugin.decider());
        decider.is_some_and(|decider| decider.decide(cycle, decode))
    }

    /// The profile to run next.
    fn next(
        &self,
        cycle: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &ProfileResults,
    ) -> Option<usize> {
        let pending = |name: &str| pending(name, profiles, results);
        // Without a decode profile nothing is run, and that is a fault.
        if !results.ran(&self.decode) {
            let decode = pending(&self.decode)?;
            let before = (self.order == StageOrder::PrefillFirst).then_some(&self.prefill);
            return Some(before.and_then(|name| pending(name)).unwrap_or(decode));
        }
        let decode = *results.get(&self.decode)?.picked.first()?;
        let decode_first = self.order == StageOrder::DecodeFirst;
        // In decode-first order prefill is last: once it ran, encode has been decided.
        if let Some(encode) = pending(&self.encode)
            && !(decode_first && results.ran(&self.prefill))
            && Self::wanted(self.encode_decider.as_ref(), cycle, decode)
        {
            return Some(encode);
        }
        pending(&self.prefill)
            .filter(|_| decode_first && Self::wanted(self.prefill_decider.as_ref(), cycle, decode))
    }
}

impl Plugin for DisaggProfileHandler {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn profile_handler(&self) -> Option<&dyn ProfileHandler> {
        Some(self)
    }
    fn pre_request(&self) -> Option<&dyn PreRequest> {
        Some(self)
    }
}

impl ProfileHandler for DisaggProfileHandler {
    fn pick(
        &self,
        cycle: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &ProfileResults,
    ) -> Vec<usize> {
        self.next(cycle, profiles, results).into_iter().collect()
    }

    fn process_results(
        &self,
        cycle: &Cycle<'_>,
        profiles: &[SchedulingProfile],
        results: &mut ProfileResults,
    ) -> Result<Arc<str>, Refusal> {
        decode_and_prefill(cycle, profiles, results, (&self.decode, &self.prefill))?;
        let found = |name: &str| results.get(name).is_some();
        let decision = Decision::of(found(&self.encode), found(&self.prefill));
        self.decisions.count(&cycle.request.target_model, decision);
        Ok(Arc::clone(&self.decode))
    }

    fn primary_port(&self) -> Option<u16> {
        self.primary_port
    }

    fn needs(&self) -> Option<&str> {
        Some(&self.decode)
    }
}

impl PreRequest for DisaggProfileHandler {
    fn pre_request(
        &self,
        cycle: &Cycle<'_>,
        result: &SchedulingResult,
        headers: &mut HeaderEdits,
    ) -> Result<Option<Box<dyn Flight>>, Refusal> {
        set_stage_headers(cycle, result, &self.prefill, &self.encode, headers);
        if self.primary_port.is_some() {
            set_rank_header(cycle, result, headers);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
