//! `label-selector-filter` (also `by-label-selector` and `by-label`): keeps endpoints by their labels.
//!
//! As a Kubernetes label selector; all conditions must hold, and an empty selector keeps everyone:
//!
//! ```text
//! matchLabels: {key: value}                         the label has this value
//! matchExpressions:
//!   - {key: k, operator: In, values: [a, b]}        the label has one of the values
//!   - {key: k, operator: NotIn, values: [a, b]}     it has none of them, or there is no label
//!   - {key: k, operator: Exists}                    there is such a label
//!   - {key: k, operator: DoesNotExist}              there is none
//! ```
//!
//! Or in the form of `by-label`: `label` (required), `validValues` (list), `allowsNoLabel` (false; an
//! endpoint without the label passes), one of the latter two needed. The forms exclude each other.

use std::sync::Arc;

use serde_json::Value;

use super::{Building, Registration, Stability};
use crate::{
    epp::{
        datalayer::Endpoint,
        scheduling::{Cycle, Filter, Plugin},
    },
    support::fields::Fields,
};

/// The plugin's type.
pub const REGISTRATION: Registration = Registration {
    type_name: "label-selector-filter",
    aliases: &["by-label-selector", "by-label"],
    stability: Stability::Beta,
    factory: Some(build),
};

/// Fields of the form of `by-label`.
const BY_LABEL: [&str; 3] = ["label", "validValues", "allowsNoLabel"];
/// Fields of a selector.
const SELECTOR: [&str; 2] = ["matchLabels", "matchExpressions"];

/// One condition on one label.
#[derive(Clone, Debug)]
struct Condition {
    label: String,
    /// Values that pass; `None` = any.
    values: Option<Vec<String>>,
    /// Does an endpoint without the label pass?
    absent: bool,
    /// Invert what is said of values: none of them may be the label's.
    inverted: bool,
}

impl Condition {
    fn holds(&self, endpoint: &Endpoint) -> bool {
        let Some(value) = endpoint.label(&self.label) else { return self.absent };
        let listed = self.values.as_ref().is_none_or(|values| values.iter().any(|v| v == value));
        listed != self.inverted
    }
}

/// Keeps endpoints by their labels.
#[derive(Clone, Debug)]
pub struct ByLabelFilter {
    conditions: Vec<Condition>,
}

fn build(params: &Fields<'_>, _: &dyn Building) -> Option<Arc<dyn Plugin>> {
    let by_label = BY_LABEL.iter().any(|field| params.has(field));
    let selector = SELECTOR.iter().find(|field| params.has(field));
    if let (true, Some(field)) = (by_label, selector) {
        params.fault(field, "cannot be used together with `label`");
    }
    // Both are always asked for, so that all names are known.
    let labels = params.strings("matchLabels").into_iter().map(|(label, value)| Condition {
        label,
        values: Some(vec![value]),
        absent: false,
        inverted: false,
    });
    let expressions = params.each("matchExpressions").into_iter().filter_map(expression);
    let mut conditions: Vec<Condition> = labels.chain(expressions).collect();

    let label = if by_label {
        params.required("label", Fields::nonempty)
    } else {
        params.nonempty("label")
    };
    let values = string_list(params, "validValues").unwrap_or_default();
    let absent = params.boolean("allowsNoLabel").unwrap_or_default();
    if by_label && values.is_empty() && !absent {
        params.fault("validValues", "must not be empty unless `allowsNoLabel` is true");
    }
    if let Some(label) = label {
        conditions.push(Condition { label, values: Some(values), absent, inverted: false });
    }
    Some(Arc::new(ByLabelFilter { conditions }))
}

/// A list of strings; absent if it is not there.
fn string_list(params: &Fields<'_>, name: &'static str) -> Option<Vec<String>> {
    params.take(name, |value| {
        let strings = value.as_array().and_then(|list| {
            list.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        });
        strings.ok_or_else(|| match value {
            Value::Array(_) => "expected a list of strings; put numbers in quotes".to_owned(),
            _ => "expected a list of strings".to_owned(),
        })
    })
}

/// One entry of `matchExpressions`, if it is right.
fn expression(fields: Fields<'_>) -> Option<Condition> {
    // (are there values, does no label pass, inverted)
    let operators = [
        ("In", (true, false, false)),
        ("NotIn", (true, true, true)),
        ("Exists", (false, false, false)),
        ("DoesNotExist", (false, true, true)),
    ];
    let label = fields.required("key", Fields::nonempty);
    let operator = fields.required("operator", |fields, name| fields.one_of(name, &operators));
    let values = string_list(&fields, "values");
    if let Some((listed, ..)) = operator {
        let some = values.as_ref().is_some_and(|values| !values.is_empty());
        if listed && !some {
            fields.fault("values", "must not be empty with the operators `In` and `NotIn`");
        } else if !listed && some {
            fields.fault("values", "must be empty with `Exists` and `DoesNotExist`");
        }
    }
    fields.finish();
    let (listed, absent, inverted) = operator?;
    Some(Condition { label: label?, values: values.filter(|_| listed), absent, inverted })
}

impl Plugin for ByLabelFilter {
    fn type_name(&self) -> &'static str {
        REGISTRATION.type_name
    }
    fn filter(&self) -> Option<&dyn Filter> {
        Some(self)
    }
}

impl Filter for ByLabelFilter {
    fn filter(&self, cycle: &Cycle<'_>, keep: &mut Vec<usize>) {
        keep.retain(|&at| {
            let endpoint = &cycle.endpoints[at];
            self.conditions.iter().all(|condition| condition.holds(endpoint))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epp::scheduling::testing::{Rig, build};
    use serde_json::json;

    /// Endpoints 0..=3: app=a tier=x; app=b; app=a; none.
    #[track_caller]
    fn check(params: Value, want: &[usize]) {
        let rig =
            Rig::labelled(&[&[("app", "a"), ("tier", "x")], &[("app", "b")], &[("app", "a")], &[]]);
        let text = params.to_string();
        let plugin = build(REGISTRATION, params).unwrap();
        assert_eq!(rig.passing(&*plugin), want, "{text}");
    }

    fn expression(key: &str, operator: &str, values: &[&str]) -> Value {
        json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]})
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn selectors_select_as_in_kubernetes() {
        check(json!({}),                                              &[0, 1, 2, 3]);
        check(json!({"matchLabels": {"app": "a"}}),                   &[0, 2]);
        check(json!({"matchLabels": {"app": "a", "tier": "x"}}),      &[0]);
        check(json!({"matchLabels": {"app": "z"}}),                   &[]);
        check(expression("app", "In", &["a", "b"]),                   &[0, 1, 2]);
        check(expression("app", "In", &["b"]),                        &[1]);
        check(expression("app", "NotIn", &["a"]),                     &[1, 3]);
        check(expression("tier", "Exists", &[]),                      &[0]);
        check(expression("tier", "DoesNotExist", &[]),                &[1, 2, 3]);
        check(json!({"matchLabels": {"app": "a"},
                     "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}), &[2]);
    }

    #[test]
    #[rustfmt::skip] // A table reads best in columns.
    fn the_older_form_selects_by_one_label() {
        check(json!({"label": "app", "validValues": ["a"]}),                          &[0, 2]);
        check(json!({"label": "app", "validValues": ["a", "b"]}),                     &[0, 1, 2]);
        check(json!({"label": "app", "validValues": ["a"], "allowsNoLabel": true}),   &[0, 2, 3]);
        check(json!({"label": "app", "allowsNoLabel": true}),                         &[3]);
        check(json!({"label": "tier", "validValues": ["y"]}),                         &[]);
    }

    #[track_caller]
    fn refused(params: Value, want: &str) {
        let faults = build(REGISTRATION, params).unwrap_err();
        assert!(faults.iter().any(|fault| fault.contains(want)), "{faults:?}");
    }

    #[test]
    fn wrong_parameters_are_refused() {
        refused(json!({"validValues": ["a"]}), "label: missing");
        refused(json!({"label": "", "validValues": ["a"]}), "label: must not be empty");
        refused(json!({"label": "app"}), "validValues: must not be empty unless");
        refused(json!({"label": "app", "validValues": "a"}), "expected a list of strings");
        refused(json!({"label": "app", "validValues": [1]}), "put numbers in quotes");
        refused(json!({"label": "app", "matchLabels": {}}), "cannot be used together");
        refused(expression("a", "Is", &[]), "matchExpressions[0].operator: \"Is\" is not one of");
        refused(expression("a", "In", &[]), "values: must not be empty");
        refused(expression("a", "Exists", &["b"]), "values: must be empty");
        refused(expression("", "Exists", &[]), "key: must not be empty");
        refused(json!({"matchLabel": {}}), "did you mean `matchLabels`?");
    }
}
