use std::time::{Duration, Instant};

use super::*;

fn context(json: &str) -> Value {
    serde_json::from_str(json).unwrap()
}

#[track_caller]
fn check(source: &str, variables: &str, expected: &str) {
    let clock: Clock = Arc::new(|| 1_754_395_205);
    let template = Template::with_clock(source, clock).unwrap();
    assert_eq!(template.render(context(variables), 0).as_deref(), Ok(expected), "{source}");
}

#[track_caller]
fn refused(source: &str, reason: &str) {
    let began = Instant::now();
    let error = Template::parse(source).and_then(|it| it.render(context("{}"), 0)).unwrap_err();
    assert!(error.contains(reason), "{reason:?} is not in {error:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{source} took {:?}", began.elapsed());
}

#[test]
fn json_is_pythons() {
    let value =
        r#"{"v": {"z": [1, 2.0, 1e22, 1.5e-7, 0.1, -0.0, true, null], "a": "<é&'\"\n\u0001👍"}}"#;
    let plain =
        r#"{"z": [1, 2.0, 1e+22, 1.5e-07, 0.1, -0.0, true, null], "a": "<é&'\"\n\u0001👍"}"#;
    check("{{ v | tojson }}", value, plain);
    check("{{ v.a | tojson(ensure_ascii=true) }}", value, r#""<\u00e9&'\"\n\u0001\ud83d\udc4d""#);
    let nested = r#"{"v": {"b": [1, {}], "a": []}}"#;
    let indented = "{\n  \"a\": [],\n  \"b\": [\n    1,\n    {}\n  ]\n}";
    check("{{ v | tojson(indent=2, sort_keys=True) }}", nested, indented);
    check("{{ v | tojson(separators=(',', ':')) }}", nested, r#"{"b":[1,{}],"a":[]}"#);
}

#[test]
fn values_print_as_in_python() {
    let values = r#"{"v": [1.0, 1e16, 123456789012345680.0, 0.0001, 0.00001, true, null, "it's", {"k": "a\nb"}]}"#;
    let printed =
        r#"[1.0, 1e+16, 1.2345678901234568e+17, 0.0001, 1e-05, True, None, "it's", {'k': 'a\nb'}]"#;
    check("{{ v }}", values, printed);
    check(
        "{{ none }}{{ true }}{{ True }}{{ None is none }}{{ missing }}",
        "{}",
        "NoneTrueTrueTrue",
    );
    check("{{ (1, 'a') }} {{ (1,) }} {{ [()] }}", "{}", "(1, 'a') (1,) [()]");
    check("{{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 'a' * 3 }}", "{}", "3 3.5 2 aaa");
}

#[test]
fn methods_are_pythons() {
    check("{{ '\\x1f a \u{3000}'.strip() }}|{{ 'xxaxx'.strip('x') }}", "{}", "a|a");
    check(
        "{{ ' a  b c '.split() | join('|') }} {{ 'a,b,c'.split(',', 1)[-1] }}",
        "{}",
        "a|b|c b,c",
    );
    check("{{ 'a b c'.rsplit(' ', 1)[0] }} {{ 'a b  c '.rsplit(none, 1)[0] }}", "{}", "a b a b");
    check(
        "{{ 'abc'.removeprefix('a').removesuffix('c') }} {{ 'a=b=c'.partition('=')[2] }}",
        "{}",
        "b b=c",
    );
    check(
        "{{ 'abcdef'[::-1] }} {{ 'abcdef'[-2:] }} {{ [1, 2, 3][:-1] }}",
        "{}",
        "fedcba ef [1, 2]",
    );
    check(
        "{% for k, v in v.items() %}{{ k }}={{ v }};{% endfor %}",
        r#"{"v":{"z":1,"a":2}}"#,
        "z=1;a=2;",
    );
    check(
        "{{ v.get('z') }} {{ v.get('q', 5) }} {{ v['q'] is defined }}",
        r#"{"v":{"z":1}}"#,
        "1 5 False",
    );
    check("{{ '{} {x}'.format(1, x=2) }} {{ '%s-%d' | format('a', 3) }}", "{}", "1 2 a-3");
    check("{{ dict(a=1, b='x') | tojson }}", "{}", r#"{"a": 1, "b": "x"}"#);
}

#[test]
fn dates_are_the_clocks() {
    let formats = "%Y-%m-%d %d %b %Y %B %A %a %H:%M:%S %I %p %y %j %-d %-m %%";
    let expected = "2025-08-05 05 Aug 2025 August Tuesday Tue 12:00:05 12 PM 25 217 5 8 %";
    check(&format!("{{{{ strftime_now('{formats}') }}}}"), "{}", expected);
    let at = |days: u64| python::strftime("%F %a %j", days * 86_400).unwrap();
    assert_eq!(at(0), "1970-01-01 Thu 001");
    assert_eq!(at(19_782), "2024-02-29 Thu 060");
    assert_eq!(at(20_088), "2024-12-31 Tue 366");
    assert_eq!(at(47_541), "2100-03-01 Mon 060");
    refused("{{ strftime_now('%Q') }}", "%Q is not known");
}

#[test]
fn generation_marks_mean_nothing() {
    let source = "{% for m in v %}\n    {%- generation -%}\n  {{ m }}\n    {% endgeneration %}\n{% endfor %}";
    check(source, r#"{"v": [1, 2]}"#, "1\n2\n");
}

#[test]
fn templates_refuse_with_their_words() {
    refused("a\n{{ raise_exception('roles must alternate') }}", "line 2: roles must alternate");
    refused("{% if %}", "line 1: ");
    refused("{{ missing.key }}", "undefined");
    refused("{{ 'a' + 1 }}", "line 1: ");
    refused("{{ x | nonsense }}", "nonsense");
}

#[test]
fn what_a_template_does_is_bounded() {
    refused(
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "too much",
    );
    refused("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "recursion");
    let doubling = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}";
    refused(doubling, "too much");
    let nested = |inner: &str, then: &str| {
        format!(
            "{{% set ns = namespace(v='x') %}}{{% for i in range(150) %}}{{% set ns.v = {inner} %}}\
             {{% endfor %}}{{{{ {then} }}}}"
        )
    };
    for inner in ["[ns.v, ns.v]", "(ns.v, ns.v)", "{1: ns.v, 2: ns.v}"] {
        for then in ["ns.v", "ns.v | string", "ns.v | trim", "raise_exception(ns.v)"] {
            refused(&nested(inner, then), "too much");
        }
    }
    refused(&nested("[ns.v, ns.v]", "ns.v | tojson"), "too much");
    refused(&nested("[ns.v]", "[[ns.v, 1]]").replace("150", "250"), "too deeply");
    for source in [
        "{{ range(1000000000) | list }}",
        "{{ 'x' * 1000000000 }}",
        "{{ range(99999) | join('x' * 99999) }}",
    ] {
        refused(source, "");
    }
    let long = "{% set s = 'x' * 1000000 %}{% for i in range(40) %}{{ s }}{% endfor %}";
    refused(long, "makes more than");
}

#[test]
fn content_format_is_told_by_loops() {
    let check = |source: &str, expected| {
        assert_eq!(Template::parse(source).unwrap().content_format(), expected, "{source}");
    };
    let (string, parts) = (ContentFormat::String, ContentFormat::Parts);
    check("{% for m in messages %}{{ m.content }}{% endfor %}", string);
    check("{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}", parts);
    check(
        "{% for m in messages %}{% for c in m['content'] | list %}{% endfor %}{% endfor %}",
        parts,
    );
    let renamed = "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}\
                   {% if m.content is string %}{% else %}{% for c in m['content'] %}{% endfor %}{% endif %}{% endfor %}";
    check(renamed, parts);
    check("{% for m in messages %}{% for c in m.tool_calls %}{% endfor %}{% endfor %}", string);
    check(
        "{% for m in messages %}{% set c = m.content %}{% for p in c %}{% endfor %}{% endfor %}",
        string,
    );
    let named = "{% for m in messages %}{% set content = m.content %}{% for p in content %}{% endfor %}{% endfor %}";
    check(named, parts);
    let given = "{% macro show(c) %}{% for p in c %}{% endfor %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}";
    check(given, parts);
    check(&given.replace("m.content", "m.role"), string);
}
