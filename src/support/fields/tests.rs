use super::*;

/// Asks for one field of each kind and reports.
fn read(text: &str) -> (Report, Option<u32>, Option<u8>) {
    let reader = Reader::new(Document::parse(text).unwrap());
    let root = reader.root();
    let size = root.integer("size", 1..=100_000_000);
    let mode = root.one_of("mode", &[("fast", 1), ("slow", 2)]);
    let nested = root.mapping("nested");
    nested.boolean("flag");
    nested.number("weight", 0.0);
    nested.millis("delayMs", 0..=10);
    nested.signed("offset", -5..=5);
    nested.finish();
    for item in root.each("items") {
        item.required("name", Fields::nonempty);
        item.finish();
    }
    root.strings("names");
    root.ignored("old", "has no effect");
    root.finish();
    (reader.finish(), size, mode)
}

#[track_caller]
fn check(text: &str, want: &[&str]) {
    let faults: Vec<String> = read(text).0.faults.iter().map(Fault::to_string).collect();
    assert_eq!(faults, want, "{text}");
}

#[test]
fn good_values_are_taken_and_nulls_are_absent() {
    let (report, size, mode) = read(
        "size: 1e8\nmode: slow\nnested: {flag: true, weight: 0, delayMs: 10, offset: -5}\n\
         items: [{name: a}]\nnames: {a: b}\nold: {any: thing}\n",
    );
    assert_eq!((size, mode), (Some(100_000_000), Some(2)));
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert_eq!(report.warnings, ["old: has no effect"]);
    let (report, size, mode) = read("size: ~\nmode: null\nnested:\nitems:\nnames:\nold:\n");
    assert_eq!((size, mode), (None, None));
    assert!(report.faults.is_empty() && report.warnings.is_empty(), "{report:?}");
}

#[test]
fn each_kind_of_fault_has_path_line_and_remedy() {
    check("size: many", &["line 1: size: expected an integer, got the string \"many\""]);
    check("size: 0", &["line 1: size: 0 is out of range; must be in 1..=100000000"]);
    check("size: -3", &["line 1: size: -3 is out of range; must be in 1..=100000000"]);
    check("size: 1.5", &["line 1: size: expected an integer, got the number 1.5"]);
    check("size: 1e300", &["line 1: size: expected an integer, got the number 1e+300"]);
    check(
        "mode: fats",
        &["line 1: mode: \"fats\" is not one of `fast`, `slow`; did you mean `fast`?"],
    );
    check("mode: 7", &["line 1: mode: expected a string, got the number 7; put it in quotes"]);
    check("nested: {flag: 1}", &["line 1: nested.flag: expected true or false, got the number 1"]);
    check(
        "nested: {weight: -0.1}",
        &["line 1: nested.weight: -0.1 is out of range; must be at least 0"],
    );
    check("nested: {offset: 9}", &["line 1: nested.offset: 9 is out of range; must be in -5..=5"]);
    check("nested: [1]", &["line 1: nested: expected a mapping, got a list"]);
    check("items: {name: a}", &["line 1: items: expected a list, got a mapping"]);
    check(
        "items:\n- name: a\n- b\n- name: ''",
        &[
            "line 1: items[1]: expected a mapping, got the string \"b\"",
            "line 4: items[2].name: must not be empty",
        ],
    );
    check("names: {a: 1}", &["line 1: names.a: expected a string, got the number 1"]);
    check("[1]", &["expected a mapping at the top, got a list"]);
}

#[test]
fn unknown_fields_are_refused_with_a_suggestion() {
    check("sise: 3", &["line 1: sise: unknown field; did you mean `size`?"]);
    check(
        "nested: {delay_ms: 3}",
        &["line 1: nested.delay_ms: unknown field; did you mean `delayMs`?"],
    );
    check("offset: 3", &["line 1: offset: unknown field here; it belongs at `nested.offset`"]);
    check("banana: 3", &["line 1: banana: unknown field"]);
    check(
        "items:\n- nme: a",
        &[
            "line 2: items[0].name: missing; this field is required",
            "line 2: items[0].nme: unknown field; did you mean `name`?",
        ],
    );
}

#[test]
fn all_faults_come_at_once_in_document_order() {
    check(
        "items:\n- {}\nzzz: 1\nnested:\n  flag: maybe\n  delayMs: 11\nsize: x\n",
        &[
            "line 1: items[0].name: missing; this field is required",
            "line 3: zzz: unknown field",
            "line 5: nested.flag: expected true or false, got the string \"maybe\"",
            "line 6: nested.delayMs: 11 is out of range; must be in 0..=10",
            "line 7: size: expected an integer, got the string \"x\"",
        ],
    );
}

#[test]
fn asked_names_are_known_even_of_absent_mappings() {
    let asked = read("items: [{name: a}, {name: b}]").0.asked;
    for path in ["size", "nested", "nested.flag", "items[].name", "old"] {
        assert!(asked.contains(path), "{path} is not in {asked:?}");
    }
    assert_eq!(asked.len(), 11);
}

#[test]
fn a_mapping_may_hold_anything() {
    let reader = Reader::new(Document::parse("known: 1\nother: {deep: 2}\nmore: x\n").unwrap());
    let root = reader.root();
    let known: Option<u8> = root.integer("known", 0..=9);
    root.ignore_rest("has no effect");
    root.finish();
    let report = reader.finish();
    assert_eq!(known, Some(1));
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert_eq!(report.warnings, ["other: has no effect", "more: has no effect"]);
}
