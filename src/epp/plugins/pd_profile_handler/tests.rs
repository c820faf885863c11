use serde_json::{Value, json};

use super::*;
use crate::{
    epp::{
        datalayer::ROLE_LABEL,
        plugins::{
            always_disagg_pd_decider, decode_filter, max_score_picker, prefill_filter,
            prefix_based_pd_decider, queue_scorer,
        },
        scheduling::{
            Configured, PrefixMatches, Scheduler,
            testing::{self, Rig, Site, configured, profile, request},
        },
    },
    support::metrics::encode,
};

fn site() -> Site {
    let mut site = Site::default();
    site.build(always_disagg_pd_decider::REGISTRATION, json!({})).unwrap();
    site.build(prefix_based_pd_decider::REGISTRATION, json!({})).unwrap();
    let own = site.build(prefix_cache_scorer::REGISTRATION, json!({"blockSize": 64})).unwrap();
    let reading = json!({"prefixMatchInfoProducerName": "prefix-cache-scorer"});
    let reader = site.build(prefix_cache_scorer::REGISTRATION, reading).unwrap();
    let queue = site.build(queue_scorer::REGISTRATION, json!({})).unwrap();
    site.plugins.truncate(2);
    for (name, plugin) in [("prefix-cache-scorer", own), ("reader", reader), ("queue", queue)] {
        site.plugins.push(Configured { name: name.into(), plugin });
    }
    site
}

fn profiles() -> Vec<SchedulingProfile> {
    let built = |registration| testing::build(registration, json!({})).unwrap();
    let picker = built(max_score_picker::REGISTRATION);
    vec![
        profile("prefill", &[built(prefill_filter::REGISTRATION)], &[], &picker),
        profile("decode", &[built(decode_filter::REGISTRATION)], &[], &picker),
    ]
}

/// One pod that decodes and one that prefills; the former holds `cached` blocks of 16 tokens.
fn rig(prompt: &str, cached: Option<u32>) -> Rig {
    let mut rig = Rig::labelled(&[&[(ROLE_LABEL, "decode")], &[(ROLE_LABEL, "prefill")]]);
    rig.request = request("model", prompt);
    if let Some(cached) = cached {
        let matches = PrefixMatches { total: 10, block: 16, matched: vec![cached, 10] };
        rig.produced.set_prefix(&"prefix-cache-scorer".into(), matches);
    }
    rig
}

/// Does a prompt of `length` bytes, of which `cached` blocks are cached, go through prefill?
#[track_caller]
fn check(params: Value, length: usize, cached: Option<u32>, want: bool) {
    let mut site = site();
    let text = params.to_string();
    let handler = site.build(REGISTRATION, params).unwrap();
    let rig = rig(&"x".repeat(length), cached);
    let scheduler = Scheduler::new(configured(&handler), profiles());
    let result = scheduler.schedule(&rig.cycle()).unwrap();
    assert_eq!((&*result.primary, result.targets()), ("decode", &[0][..]));
    let prefill = result.results.get("prefill").map(|run| &*run.picked);
    assert_eq!(prefill, want.then_some(&[1][..]), "{text}, {length} bytes, {cached:?} cached");
    let decision = if want { "prefill-decode" } else { "decode-only" };
    let text = encode(&site.registry).unwrap();
    for name in ["llm_d_epp", "llm_d_inference_scheduler"] {
        let counted = format!("{name}_pd_decision_total{{decision_type=\"{decision}\"");
        assert!(text.contains(&counted), "{counted} is not in\n{text}");
    }
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn uncached_characters_decide() {
    let rule = |threshold: u32, block: u32| json!({"threshold": threshold, "hashBlockSize": block});
    // "hello world" of the reference.
    check(rule(5, 16),   11, Some(0), true);
    check(rule(100, 16), 11, Some(5), false);
    // No threshold: always.
    check(rule(0, 16),            11,  Some(5), true);
    check(json!({"threshold": 0}), 0,  None,    true);
    check(json!({"hashBlockSize": 64}), 11, None, true);
    // Every block counts, also the first.
    check(rule(100, 50), 200, Some(2), true);  // 100 left
    check(rule(101, 50), 200, Some(2), false);
    check(rule(1, 50),   200, Some(4), false); // all cached
    check(rule(1, 50),   200, Some(9), false); // more than all
    // Nothing known: nothing cached.
    check(rule(200, 50), 200, None,    true);
    check(rule(201, 50), 200, None,    false);
    // The block of whoever matched, 64 bytes.
    check(json!({"threshold": 72}), 200, Some(2), true);
    check(json!({"threshold": 73}), 200, Some(2), false);
    // Whoever it is whose matches the plugin reads.
    let reader = json!({"threshold": 73, "prefixPluginName": "reader"});
    check(reader, 200, Some(2), false);
}

#[test]
#[rustfmt::skip] // A table reads best in columns.
fn without_a_threshold_a_decider_decides() {
    check(json!({}),                                                100, None, false);
    check(json!({"deciderPluginName": "always-disagg-pd-decider"}), 100, None, true);
    check(json!({"deciderPluginName": "prefix-based-pd-decider",
                 "prefixPluginType": "x", "prefixPluginName": "y",
                 "prefixMatchInfoProducerName": "z"}),              100, None, false);
}

#[test]
fn prefixes_are_consumed_where_they_matter() {
    let consumes = |params| site().build(REGISTRATION, params).unwrap().consumes();
    assert_eq!(consumes(json!({})), []);
    assert_eq!(consumes(json!({"threshold": 0})), []);
    let prefix = [DataKey::Prefix("prefix-cache-scorer".into())];
    assert_eq!(consumes(json!({"threshold": 10})), prefix);
    let reader = json!({"threshold": 10, "prefixPluginName": "reader"});
    assert_eq!(consumes(reader), prefix);
}

#[test]
fn nobody_decodes_or_nobody_prefills() {
    let handler = site().build(REGISTRATION, json!({"threshold": 0})).unwrap();
    let scheduler = Scheduler::new(configured(&handler), profiles());
    let only = |role| Rig::labelled(&[&[(ROLE_LABEL, role)]]);
    let refusal = scheduler.schedule(&only("prefill").cycle()).unwrap_err();
    let text = "ResourceExhausted - failed to find target endpoint: \
                failed to find available decode workers";
    assert_eq!(refusal.to_string(), text);
    for role in ["decode", "both"] {
        let rig = only(role);
        let result = scheduler.schedule(&rig.cycle()).unwrap();
        assert_eq!(result.targets(), [0]);
        assert_eq!(result.firsts().count(), 1);
    }
}

#[test]
fn a_primary_port_is_called_and_told_the_rank() {
    let params = json!({"threshold": 0, "primaryPort": 9000});
    let handler = site().build(REGISTRATION, params).unwrap();
    let scheduler = Scheduler::new(configured(&handler), profiles());
    let rig = rig("x", None);
    let result = scheduler.schedule(&rig.cycle()).unwrap();
    assert_eq!(scheduler.destination(&rig.cycle(), &result), "10.0.0.1:9000");
    let mut headers = HeaderEdits::new();
    handler.pre_request().unwrap().pre_request(&rig.cycle(), &result, &mut headers).unwrap();
    let [(name, value)] = headers.sets() else { panic!("{headers:?}") };
    assert_eq!((&**name, &**value), ("x-data-parallel-host-port", &b"10.0.0.1:8000"[..]));

    let handler = site().build(REGISTRATION, json!({"threshold": 0})).unwrap();
    assert!(handler.pre_request().is_none());
}

#[test]
fn parameters_of_all_ages_are_read() {
    let good = [
        json!({"threshold": 100, "decodeProfile": "d", "prefillProfile": "p",
               "prefixPluginName": "reader", "hashBlockSize": 32, "primaryPort": 8080}),
        json!({"primaryPort": 0}),
        json!({"primaryPort": 1}),
        json!({"primaryPort": 65535}),
        json!({"decodeProfile": "", "prefillProfile": "", "prefixPluginName": ""}),
        json!({"threshold": 10, "hashBlockSize": 5}),
    ];
    for params in good {
        assert!(site().build(REGISTRATION, params.clone()).is_ok(), "{params}");
    }
    #[track_caller]
    fn refused(params: Value, want: &str) {
        let faults = site().build(REGISTRATION, params).unwrap_err();
        assert!(faults.len() == 1 && faults[0].starts_with(want), "{faults:?}");
    }
    refused(json!({"threshold": -1}), "threshold: -1 is out of range");
    refused(json!({"hashBlockSize": 0}), "hashBlockSize: 0 is out of range");
    refused(json!({"hashBlockSize": -5}), "hashBlockSize: -5 is out of range");
    refused(json!({"primaryPort": 65536}), "primaryPort: 65536 is out of range");
    refused(json!({"primaryPort": -10}), "primaryPort: -10 is out of range");
    refused(json!({"deciderPluginName": "x"}), "deciderPluginName: no plugin is named 'x'");
    let both = json!({"threshold": 1, "deciderPluginName": "always-disagg-pd-decider"});
    refused(both, "deciderPluginName: cannot be used together");
    let wrong = |name| json!({"threshold": 1, "prefixPluginName": name});
    refused(wrong("x"), "prefixPluginName: no plugin is named 'x'");
    refused(wrong("queue"), "prefixPluginName: plugin 'queue' of type 'queue-scorer' knows no");
    refused(json!({"treshold": 1}), "treshold: unknown field; did you mean `threshold`?");
}

#[test]
fn prompts_are_measured_as_the_body_has_them() {
    let mut request = request("model", "12345");
    assert_eq!(prompt_bytes(&request), 5);
    for part in &mut request.parsed.prompt {
        part.form = PromptForm::Messages;
    }
    assert_eq!(prompt_bytes(&request), 7);
    request.parsed.prompt.clear();
    assert_eq!(prompt_bytes(&request), 0);
}
