use proptest::prelude::*;

use super::*;

/// All finds of a page that is fed in chunks of `step` bytes.
fn read(names: &Names, page: &[u8], step: usize) -> Vec<String> {
    let mut finds = Vec::new();
    let mut scanner = Scanner::default();
    let mut note = |found: Found<'_>| finds.push(show(&found));
    for chunk in page.chunks(step.max(1)) {
        scanner.feed(names, chunk, &mut note);
    }
    scanner.finish(names, &mut note);
    finds
}

fn show(found: &Found<'_>) -> String {
    match found {
        Found::Malformed { name } => format!("{name} malformed"),
        Found::NotScalar { name } => format!("{name} not scalar"),
        Found::Sample(Sample { name, labels, value, timestamp }) => {
            let mut text = format!("{name} {value} @{timestamp}");
            for label in ["a", "le", "model_name"] {
                if let Some(found) = labels.get(label) {
                    text += &format!(" {label}={}", String::from_utf8_lossy(&found));
                }
            }
            text
        }
    }
}

/// The reference: every line is parsed, character by character, and names are compared last.
fn naive(names: &[&str], page: &str) -> Vec<String> {
    page.split('\n').filter_map(|line| naive_line(names, line)).collect()
}

fn naive_line(names: &[&str], line: &str) -> Option<String> {
    let name_of = |text: &str| {
        let end = text
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
            .unwrap_or(text.len());
        let at = names.iter().position(|name| !name.is_empty() && *name == &text[..end])?;
        Some((at, text[end..].to_owned()))
    };
    let blanks: &[char] = &[' ', '\t'];
    if line.starts_with('#') {
        let (at, kind) = name_of(line.strip_prefix("# TYPE ")?.trim_start_matches(blanks))?;
        let kind = kind.trim_ascii();
        return ["histogram", "summary", "gaugehistogram"]
            .contains(&kind)
            .then(|| format!("{at} not scalar"));
    }
    let (at, rest) = name_of(line.trim_start_matches(blanks))?;
    Some(naive_sample(&rest).map_or(format!("{at} malformed"), |sample| format!("{at} {sample}")))
}

fn naive_sample(rest: &str) -> Option<String> {
    let chars: Vec<char> = rest.trim_start_matches([' ', '\t']).chars().collect();
    let mut labels: Vec<(String, String)> = Vec::new();
    let mut at = 0;
    let blank = |at: &mut usize| {
        while chars.get(*at).is_some_and(|c| " \t".contains(*c)) {
            *at += 1;
        }
    };
    if chars.first() == Some(&'{') {
        at = 1;
        loop {
            blank(&mut at);
            if chars.get(at)? == &'}' {
                at += 1;
                break;
            }
            let mut name = String::new();
            while let Some(c) = chars.get(at) {
                if !(c.is_ascii_alphanumeric() || "_:".contains(*c)) {
                    break;
                }
                name.push(*c);
                at += 1;
            }
            blank(&mut at);
            if name.is_empty() || chars.get(at)? != &'=' {
                return None;
            }
            at += 1;
            blank(&mut at);
            if chars.get(at)? != &'"' {
                return None;
            }
            at += 1;
            let mut value = String::new();
            loop {
                match (chars.get(at)?, chars.get(at + 1)) {
                    ('"', _) => break,
                    ('\\', None) => return None,
                    ('\\', Some('n')) => value.push('\n'),
                    ('\\', Some(c @ ('"' | '\\'))) => value.push(*c),
                    ('\\', Some(c)) => value.extend(['\\', *c]),
                    (c, _) => {
                        value.push(*c);
                        at += 1;
                        continue;
                    }
                }
                at += 2;
            }
            at += 1;
            labels.push((name, value));
            blank(&mut at);
            match chars.get(at)? {
                ',' => at += 1,
                '}' => {}
                _ => return None,
            }
        }
    }
    let rest: String = chars[at..].iter().collect();
    let rest = rest.replace(|c: char| c.is_ascii_whitespace(), " ");
    let words: Vec<&str> = rest.split(' ').filter(|word| !word.is_empty()).collect();
    let end = words.iter().skip(1).position(|word| word.starts_with('#'));
    let words = &words[..end.map_or(words.len(), |end| end + 1)];
    let value: f64 = words.first()?.parse().ok()?;
    let timestamp = match words {
        [_] => 0.0,
        [_, timestamp] => timestamp.parse().ok().filter(|t: &f64| t.is_finite())?,
        _ => return None,
    };
    let mut text = format!("{value} @{timestamp}");
    for wanted in ["a", "le", "model_name"] {
        if let Some((_, value)) = labels.iter().find(|(name, _)| name == wanted) {
            text += &format!(" {wanted}={value}");
        }
    }
    Some(text)
}

#[test]
fn lines_are_read_as_the_format_says() {
    #[track_caller]
    fn check(page: &str, want: &[&str]) {
        let names = ["m", "m_x", "n:q"];
        let compiled = Names::new(names);
        for step in [1, 2, 3, 7, 1000] {
            assert_eq!(read(&compiled, page.as_bytes(), step), want, "{page:?} by {step}");
        }
        assert_eq!(naive(&names, page), want, "{page:?}, naive");
    }
    check("", &[]);
    check("m 1\n", &["0 1 @0"]);
    check("m 1", &["0 1 @0"]);
    check("m 1\r\nm\t2\r\n", &["0 1 @0", "0 2 @0"]);
    check("  m 1\n\n\tm_x 2", &["0 1 @0", "1 2 @0"]);
    check(
        "m{} 1\nm {a=\"b\"} 2\nm{a=\"b\",} 3\nm{ a = \"b\" , le=\"\" }4",
        &["0 1 @0", "0 2 @0 a=b", "0 3 @0 a=b", "0 4 @0 a=b le="],
    );
    check("mm 1\nm_ 1\nm_xx 1\nm_x 1\nn:q 2\nn 1\nn:qr 1\nxm 1", &["1 1 @0", "2 2 @0"]);
    check(
        "m NaN\nm +Inf\nm -Inf\nm 1e3\nm -1.5E-2\nm .5",
        &["0 NaN @0", "0 inf @0", "0 -inf @0", "0 1000 @0", "0 -0.015 @0", "0 0.5 @0"],
    );
    check(
        "m 1 1700000000000\nm 2 1700000000.5\nm 3 -5",
        &["0 1 @1700000000000", "0 2 @1700000000.5", "0 3 @-5"],
    );
    check(r#"m{a="q\"\\\nx\z}",le="},{"} 1"#, &["0 1 @0 a=q\"\\\nx\\z} le=},{"]);
    check("m{a=\"1\",a=\"2\"} 1", &["0 1 @0 a=1"]);
    check("m{a=\"ü\"} 1", &["0 1 @0 a=ü"]);
    // OpenMetrics.
    check("m 1 # {trace_id=\"x\"} 0.5\nm 1 5.5 # {} 1 2\n# EOF\n", &["0 1 @0", "0 1 @5.5"]);
    check("# TYPE m gauge\n# HELP m summary\n#TYPE m summary\n# TYPE mm summary", &[]);
    check("# TYPE m histogram\n# TYPE m_x  summary\r\n#", &["0 not scalar", "1 not scalar"]);
    for wrong in [
        "m",
        "m ",
        "m x",
        "m 1 x",
        "m 1 2 3",
        "m 1 NaN",
        "m{",
        "m{}",
        "m{a}1",
        "m{a=b} 1",
        "m{a=\"b} 1",
        "m{a=\"b\\",
        "m{a=\"b\"c=\"d\"} 1",
        "m{,} 1",
        "m{=\"b\"} 1",
        "m}1",
        "m{a=\"b\" 1",
        "m 0x10",
        "m 1_000",
    ] {
        check(wrong, &["0 malformed"]);
        check(&format!("{wrong}\nm 1"), &["0 malformed", "0 1 @0"]);
    }
}

#[test]
fn names_with_all_kinds_of_beginnings_are_found() {
    for names in [
        &["m"][..],
        &["m", "m"],
        &["ab", "abc", "abd"],
        &["ab", "x", ""],
        &["vllm:a", "vllm:ab", "vllm:b"],
        &[],
    ] {
        let page = "m 1\nab 2\nabc 3\nabd 4\nx 5\nvllm:a 6\nvllm:ab 7\nvllm:b 8\nvllm: 9\n 1\n";
        let compiled = Names::new(names.iter().copied());
        assert_eq!(read(&compiled, page.as_bytes(), 1000), naive(names, page), "{names:?}");
    }
}

#[test]
fn a_line_without_end_costs_bounded_memory() {
    let names = Names::new(["m"]);
    let mut page = b"m{a=\"".to_vec();
    page.extend(std::iter::repeat_n(b'x', 3 * MAX_LINE));
    page.extend(b"\"} 1\nm 2\n");
    for step in [1000, MAX_LINE, page.len()] {
        assert_eq!(read(&names, &page, step), ["0 malformed", "0 2 @0"], "{step}");
    }
    let mut scanner = Scanner::default();
    for chunk in vec![b'y'; 10 * MAX_LINE].chunks(4096) {
        scanner.feed(&names, chunk, |found| panic!("{found:?}"));
    }
    assert!(scanner.carry.capacity() <= 4 * MAX_LINE);
    // The longest legal line, however it is cut.
    let mut page = b"m 1".to_vec();
    page.resize(MAX_LINE, b' ');
    page.extend(b"\nm 2");
    for step in [1000, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, page.len()] {
        assert_eq!(read(&names, &page, step), ["0 1 @0", "0 2 @0"], "{step}");
    }
}

#[test]
fn an_abandoned_page_leaves_nothing() {
    let names = Names::new(["m"]);
    let mut scanner = Scanner::default();
    scanner.feed(&names, b"m 1", |found| panic!("{found:?}"));
    scanner.abandon();
    scanner.finish(&names, |found| panic!("{found:?}"));
}

fn line_of_a_page() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "m",
        "m_x",
        "n:q",
        "other",
        "{",
        "}",
        "a",
        "le",
        "=",
        "\"",
        "\\",
        ",",
        " ",
        "\t",
        "1",
        "-2.5e3",
        "NaN",
        "+Inf",
        "# TYPE ",
        "# HELP ",
        "histogram",
        "summary",
        "#",
        "\r",
        "ü",
        "a=\"b\"",
        "model_name=\"x\\\"y\"",
        "17000000",
    ]);
    prop_oneof![
        4 => prop::collection::vec(word, 0..12).prop_map(|words| words.concat()),
        1 => "(m|m_x|n:q)(\\{(a|le)=\"[a-z\\\\n]{0,5}\"\\})? [0-9.]{1,4}( [0-9]{1,3})?",
        1 => any::<String>().prop_map(|text| text.replace('\n', "")),
    ]
}

proptest! {
    #[test]
    fn scanner_and_reference_agree(
        lines in prop::collection::vec(line_of_a_page(), 0..20),
        step in 1_usize..50,
    ) {
        let names = ["m", "m_x", "n:q"];
        let page = lines.join("\n");
        let found = read(&Names::new(names), page.as_bytes(), step);
        prop_assert_eq!(found, naive(&names, &page));
    }

    #[test]
    fn any_bytes_are_read(mut page in prop::collection::vec(any::<u8>(), 0..600), step in 1_u8..) {
        page.insert(0, step);
        fuzz::scrape_is_total(&page);
    }
}
