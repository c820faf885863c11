use serde_json::{Value, json};

use super::*;
use crate::{
    epp::{
        datalayer::ROLE_LABEL,
        plugins::{
            always_disagg_pd_decider, decode_filter, encode_filter, max_score_picker,
            prefill_filter, prefix_based_pd_decider,
        },
        scheduling::{
            Scheduler,
            testing::{self, Rig, Site, configured, profile},
        },
    },
    support::metrics::encode,
};

/// A site with deciders `always-disagg-pd-decider` and, since it has no threshold, one that always
/// says no: `prefix-based-pd-decider`.
fn site() -> Site {
    let mut site = Site::default();
    site.build(always_disagg_pd_decider::REGISTRATION, json!({})).unwrap();
    site.build(prefix_based_pd_decider::REGISTRATION, json!({})).unwrap();
    site
}

fn built(registration: Registration) -> Arc<dyn Plugin> {
    testing::build(registration, json!({})).unwrap()
}

/// Profiles of these stages with the filters of their roles, under the stages' names.
fn profiles(stages: &[&str]) -> Vec<SchedulingProfile> {
    let picker = built(max_score_picker::REGISTRATION);
    let profile = |stage: &&str| {
        let filter = match *stage {
            "decode" | "d" => decode_filter::REGISTRATION,
            "prefill" | "p" => prefill_filter::REGISTRATION,
            _ => encode_filter::REGISTRATION,
        };
        profile(stage, &[built(filter)], &[], &picker)
    };
    stages.iter().map(profile).collect()
}

fn rig(roles: &[&str]) -> Rig {
    let labels: Vec<[(&str, &str); 1]> = roles.iter().map(|role| [(ROLE_LABEL, *role)]).collect();
    Rig::labelled(&labels.iter().map(|labels| &labels[..]).collect::<Vec<_>>())
}

/// Schedules over pods of these roles; what every stage found, in the order in which they ran, and
/// the decision that was counted.
#[track_caller]
fn check(
    params: Value,
    stages: &[&str],
    roles: &[&str],
    want: &[(&str, Option<usize>)],
    kind: &str,
) {
    let mut site = site();
    let text = params.to_string();
    let handler = site.build(REGISTRATION, params).unwrap();
    let scheduler = Scheduler::new(configured(&handler), profiles(stages));
    let rig = rig(roles);
    let result = scheduler.schedule(&rig.cycle()).unwrap();
    let got: Vec<_> = result
        .results
        .0
        .iter()
        .map(|(name, run)| (&**name, run.as_ref().map(|run| run.picked[0])))
        .collect();
    assert_eq!(got, want, "{text} {roles:?}");
    assert_eq!(result.targets().len(), 1);
    let counted = format!(
        "llm_d_epp_disagg_decision_total{{decision_type=\"{kind}\",model_name=\"model\",\
         plugin_name=\"disagg-profile-handler\",plugin_type=\"disagg-profile-handler\"}} 1"
    );
    let text = encode(&site.registry).unwrap();
    assert!(text.contains(&counted), "{counted} is not in\n{text}");
}

const DECODE_ONLY: &str = "decode-only";
const PREFILL: &str = "prefill-decode";
const ENCODE: &str = "encode-decode";
const ALL: &str = "encode-prefill-decode";

fn deciders(prefill: bool, encode: bool) -> Value {
    let name = |yes| if yes { "always-disagg-pd-decider" } else { "prefix-based-pd-decider" };
    json!({"deciders": {"prefill": name(prefill), "encode": name(encode)}})
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn decode_first_then_what_the_deciders_want() {
    let epd = &["encode", "prefill", "decode"][..];
    let (d, e, p) = (("decode", Some(2)), ("encode", Some(0)), ("prefill", Some(1)));
    check(deciders(true, true),   epd, epd, &[d, e, p], ALL);
    check(deciders(true, false),  epd, epd, &[d, p],    PREFILL);
    check(deciders(false, true),  epd, epd, &[d, e],    ENCODE);
    check(deciders(false, false), epd, epd, &[d],       DECODE_ONLY);
    // No deciders.
    check(json!({}),              epd, epd, &[d],       DECODE_ONLY);
    check(json!({"deciders": {"encode": "always-disagg-pd-decider"}}), epd, epd, &[d, e], ENCODE);
    check(json!({"deciders": {"prefill": "always-disagg-pd-decider"}}), epd, epd, &[d, p], PREFILL);
    // No profiles.
    check(deciders(true, true), &["decode"],            epd, &[d],    DECODE_ONLY);
    check(deciders(true, true), &["prefill", "decode"], epd, &[d, p], PREFILL);
    check(deciders(true, true), &["encode", "decode"],  epd, &[d, e], ENCODE);
    // Stages that find nobody.
    let pd = &["prefill", "prefill", "decode"][..];
    let two = &["decode", "decode"];
    check(deciders(true, true), epd, &["encode", "x", "decode"], &[d, e, ("prefill", None)], ENCODE);
    check(deciders(true, true), &["encode", "decode"], pd, &[d, ("encode", None)], DECODE_ONLY);
    let none = &[("encode", None), ("prefill", None)];
    let rig = rig(two);
    let handler = site().build(REGISTRATION, deciders(true, true)).unwrap();
    let result = Scheduler::new(configured(&handler), profiles(epd)).schedule(&rig.cycle()).unwrap();
    let rest: Vec<_> = result.results.0[1..].iter().map(|(n, r)| (&**n, r.is_some().then_some(0))).collect();
    assert_eq!(rest, none);
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn prefill_first_needs_no_prefill_decider() {
    let order = json!({"stageOrder": "prefill-first"});
    let encode = json!({"stageOrder": "prefill-first", "deciders": {"encode": "always-disagg-pd-decider"}});
    let epd = &["encode", "prefill", "decode"][..];
    let (d, e, p) = (("decode", Some(2)), ("encode", Some(0)), ("prefill", Some(1)));
    check(order.clone(),  epd,                   epd, &[p, d],    PREFILL);
    check(encode.clone(), epd,                   epd, &[p, d, e], ALL);
    check(order.clone(),  &["decode"],           epd, &[d],       DECODE_ONLY);
    check(order,          &["prefill", "decode"], &["x", "x", "decode"], &[("prefill", None), d], DECODE_ONLY);
    check(encode,         epd, &["encode", "x", "decode"], &[("prefill", None), d, e], ENCODE);
}

#[test]
fn both_forms_of_parameters_name_profiles_and_deciders() {
    let stages = &["e", "p", "d"];
    let roles = &["encode", "prefill", "decode"];
    let want = &[("d", Some(2)), ("e", Some(0)), ("p", Some(1))];
    let always = "always-disagg-pd-decider";
    let nested = json!({
        "profiles": {"decode": "d", "prefill": "p", "encode": "e"},
        "deciders": {"prefill": always, "encode": always},
    });
    let flat = json!({
        "stageOrder": "decode-first",
        "decodeProfile": "d", "prefillProfile": "p", "encodeProfile": "e",
        "prefillDeciderPluginName": always, "encodeDeciderPluginName": always,
        // The newer name wins.
        "deciderPluginName": "prefix-based-pd-decider",
    });
    let oldest = json!({
        "decodeProfile": "d", "prefillProfile": "p", "encodeProfile": "e",
        "deciderPluginName": always, "encodeDeciderPluginName": always, "primaryPort": 0,
    });
    for params in [nested, flat, oldest] {
        check(params, stages, roles, want, ALL);
    }
    let empty = json!({"profiles": {"decode": ""}, "deciders": {"prefill": ""}});
    check(empty, &["decode", "prefill"], roles, &[("decode", Some(2))], DECODE_ONLY);
}

#[test]
fn stage_orders_are_read_as_the_reference_reads_them() {
    for text in ["", "decode-first", "DecodeFirst", "decode_first", "decode"] {
        assert_eq!(stage_order(text), Ok(StageOrder::DecodeFirst), "{text}");
    }
    for text in ["prefill-first", "PrefillFirst", "prefill"] {
        assert_eq!(stage_order(text), Ok(StageOrder::PrefillFirst), "{text}");
    }
    assert!(stage_order("encode-first").is_err());
}

#[test]
fn wrong_parameters_are_refused() {
    #[track_caller]
    fn check(params: Value, want: &str) {
        let faults = site().build(REGISTRATION, params).unwrap_err();
        assert!(faults.iter().any(|fault| fault.contains(want)), "{faults:?}");
    }
    let always = "always-disagg-pd-decider";
    check(json!({"stageOrder": "x"}), "stageOrder: \"x\" is not one of");
    check(json!({"deciders": {"prefill": "x"}}), "deciders.prefill: no plugin is named 'x'");
    check(json!({"encodeDeciderPluginName": "x"}), "encodeDeciderPluginName: no plugin is named");
    check(json!({"deciderPluginName": "x"}), "deciderPluginName: no plugin is named");
    check(json!({"profiles": {"decod": "x"}}), "profiles.decod: unknown field");
    check(json!({"profiles": {}, "decodeProfile": "x"}), "decodeProfile: cannot be used together");
    check(json!({"primaryPort": 65536}), "primaryPort: 65536 is out of range");
    for decider in [
        json!({"deciders": {"prefill": always}}),
        json!({"deciderPluginName": always}),
        json!({"prefillDeciderPluginName": always}),
    ] {
        let mut params = decider;
        params["stageOrder"] = "prefill-first".into();
        check(params, "prefill decider is not supported in prefill-first stage order");
    }
    let mut site = site();
    let picker = site.build(max_score_picker::REGISTRATION, json!({})).unwrap();
    let params = json!({"deciders": {"prefill": picker.type_name()}});
    let faults = site.build(REGISTRATION, params).unwrap_err();
    let want =
        "deciders.prefill: plugin 'max-score-picker' of type 'max-score-picker' is no decider";
    assert_eq!(faults, [want]);
}

#[test]
fn without_decode_the_request_is_refused() {
    #[track_caller]
    fn check(params: Value, roles: &[&str]) {
        let mut site = site();
        let handler = site.build(REGISTRATION, params).unwrap();
        let stages = profiles(&["encode", "prefill", "decode"]);
        let scheduler = Scheduler::new(configured(&handler), stages);
        let refusal = scheduler.schedule(&rig(roles).cycle()).unwrap_err();
        let text = "ResourceExhausted - failed to find target endpoint: \
                    failed to find available decode workers";
        assert_eq!(refusal.to_string(), text);
        assert_eq!(refusal.reason, Some(DropReason::RejectedSaturated));
        assert!(!encode(&site.registry).unwrap().contains("decision_type"));
    }
    check(deciders(true, true), &["prefill", "encode"]);
    check(json!({"stageOrder": "prefill-first"}), &["prefill", "encode"]);
    check(deciders(true, true), &[]);
}

#[test]
fn a_pod_does_not_prefill_for_itself() {
    let orders = [deciders(true, false), json!({"stageOrder": "prefill-first"})];
    for params in orders {
        let mut site = site();
        let handler = site.build(REGISTRATION, params).unwrap();
        let scheduler = Scheduler::new(configured(&handler), profiles(&["prefill", "decode"]));
        // With several that can do both, never the same twice.
        for roles in [&["both", "both", "both"][..], &["both", "prefill-decode"]] {
            let rig = rig(roles);
            for _ in 0..50 {
                let result = scheduler.schedule(&rig.cycle()).unwrap();
                let picks: Vec<_> = result.firsts().map(|(_, at)| at).collect();
                assert!(picks.len() == 2 && picks[0] != picks[1], "{roles:?}: {picks:?}");
            }
        }
        // The only one does both, and is not told to ask itself.
        for roles in [&["both"][..], &["both", "encode"]] {
            let rig = rig(roles);
            let result = scheduler.schedule(&rig.cycle()).unwrap();
            assert_eq!(result.targets(), [0]);
            assert!(result.results.get("prefill").is_none());
        }
        // One that only decodes leaves the other free to prefill.
        let rig = rig(&["decode", "both"]);
        for _ in 0..20 {
            let result = scheduler.schedule(&rig.cycle()).unwrap();
            match result.targets() {
                [0] => assert_eq!(result.results.get("prefill").unwrap().picked, [1]),
                [1] => assert!(result.results.get("prefill").is_none()),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn headers_name_the_stages_and_the_rank() {
    let mut params = deciders(true, true);
    params["primaryPort"] = 9000.into();
    let handler = site().build(REGISTRATION, params).unwrap();
    let stages = profiles(&["encode", "prefill", "decode"]);
    let scheduler = Scheduler::new(configured(&handler), stages);
    let rig = rig(&["encode", "prefill", "decode"]);
    let result = scheduler.schedule(&rig.cycle()).unwrap();
    let mut headers = HeaderEdits::new();
    handler.pre_request().unwrap().pre_request(&rig.cycle(), &result, &mut headers).unwrap();
    let got: Vec<_> = headers.sets().iter().map(|(name, value)| (&**name, &**value)).collect();
    let want: [(&str, &[u8]); 3] = [
        ("x-prefiller-host-port", b"10.0.0.2:8000"),
        ("x-encoder-hosts-ports", b"10.0.0.1:8000"),
        ("x-data-parallel-host-port", b"10.0.0.3:8000"),
    ];
    assert_eq!(got, want);
    assert_eq!(scheduler.destination(&rig.cycle(), &result), "10.0.0.3:9000");
}
