//! Values that are written as text, in the notations of Go, go-humanize and Kubernetes: durations, sizes,
//! quantities, booleans.

use std::{ops::RangeInclusive, time::Duration};

use serde_json::Value;

use crate::support::fields::{self, Fields};

/// Units of a size, as go-humanize reads them: `k` and `kb` are decimal, `ki` and `kib` binary.
const SIZE_UNITS: [(&str, u64); 7] = [
    ("", 1),
    ("k", 1_000),
    ("m", 1_000_000),
    ("g", 1_000_000_000),
    ("t", 1_000_000_000_000),
    ("p", 1_000_000_000_000_000),
    ("e", 1_000_000_000_000_000_000),
];

/// A number of bytes: an integer, or a text such as `2GiB`, `500 MB`, `1.5g`; a fault at the field if it
/// is neither or not in `range`.
pub fn bytes<T: TryFrom<u64>>(
    fields: &Fields<'_>,
    name: &'static str,
    range: RangeInclusive<u64>,
) -> Option<T> {
    fields.take(name, |value| match value {
        Value::String(text) => fields::integer(&Value::from(parse_size(text)?), &range),
        other => fields::integer(other, &range),
    })
}

/// Parses a size in bytes the way go-humanize's `ParseBytes` does, fractions of a byte cut off.
///
/// # Errors
///
/// In words, when `text` is no size or more than 64 bits hold.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "{text:?} is no size; write a number and one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    };
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != ',');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let number: f64 = number.replace(',', "").parse().map_err(|_| wrong())?;
    let unit = unit.trim().to_lowercase();
    let unit = unit.strip_suffix('b').unwrap_or(&unit);
    let factor = match unit.strip_suffix('i') {
        Some("") | None => SIZE_UNITS.iter().find(|(name, _)| *name == unit).map(|&(_, f)| f),
        Some(prefix) => {
            SIZE_UNITS.iter().position(|(name, _)| *name == prefix).map(|power| 1 << (10 * power))
        }
    };
    let size = number * factor.ok_or_else(wrong)? as f64;
    if size < u64::MAX as f64 { Ok(size as u64) } else { Err(format!("{text:?} is too large")) }
}

/// A Go duration that is not negative: `50ms`, `1m30s`, `2.5h`, `0`. Units: ns, us, µs, ms, s, m, h.
///
/// # Errors
///
/// In words, when it is no duration, negative or above 292 years, where Go's ends.
pub fn duration(text: &str) -> Result<Duration, String> {
    let nanos = signed_nanos(text)?;
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| format!("{text:?} is negative"))
}

/// A Go duration in nanoseconds, for fields where Go takes a negative one too: `-5s`.
///
/// # Errors
///
/// In words, when there is no unit, the unit is not known, or it is above 292 years, where Go's ends.
pub fn signed_nanos(text: &str) -> Result<i64, String> {
    const UNITS: [(&str, f64); 8] = [
        ("ns", 1.0),
        ("us", 1e3),
        ("µs", 1e3),
        ("μs", 1e3),
        ("ms", 1e6),
        ("s", 1e9),
        ("m", 60e9),
        ("h", 3600e9),
    ];
    let wrong = |why: &str| format!("{text:?} is no duration such as 50ms or 1m30s: {why}");
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(wrong("it is empty"));
    }
    let mut nanos = 0_f64;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(end);
        let number: f64 = number.parse().map_err(|_| wrong("a number is missing"))?;
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let Some((_, factor)) = UNITS.iter().find(|(known, _)| *known == unit) else {
            let missing = unit.is_empty();
            return Err(wrong(if missing { "the unit is missing" } else { "unknown unit" }));
        };
        nanos += number * factor;
        rest = tail;
    }
    // `i64::MAX` as a float rounds up to 2^63.
    if nanos >= i64::MAX as f64 {
        return Err(wrong("it is too long"));
    }
    Ok(sign * nanos.round() as i64)
}

/// A Kubernetes quantity as a whole number, rounded up: `1Gi`, `10k`, `1e3`, `500m` (1). Suffixes:
/// n, u, m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei, or an exponent.
///
/// # Errors
///
/// In words, when it is no quantity, negative, or above 2^63 - 1.
pub fn quantity(text: &str) -> Result<u64, String> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let wrong = || format!("{text:?} is no quantity such as 1Gi, 10k or 500");
    let unsigned = text.strip_prefix('+').unwrap_or(text);
    let digits = unsigned.strip_prefix('-').unwrap_or(unsigned);
    let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    // Exact as far as whole numbers go; `1.5Gi` is a float.
    let exponent = |text: &str| text.parse::<i32>().ok().filter(|n| (-30..=30).contains(n));
    let factor = match SUFFIXES.iter().find(|(known, _)| *known == suffix) {
        Some(&(_, factor)) => factor,
        None if suffix.is_empty() => 1.0,
        None => {
            let power = suffix.strip_prefix(['e', 'E']).and_then(exponent).ok_or_else(wrong)?;
            10_f64.powi(power)
        }
    };
    let value = match number.parse::<u64>() {
        Ok(whole) if factor >= 1.0 => whole.checked_mul(factor as u64).ok_or_else(wrong)?,
        _ => {
            let number: f64 = number.parse().map_err(|_| wrong())?;
            let value = (number * factor).ceil();
            if value >= i64::MAX as f64 {
                return Err(format!("{text:?} is above 2^63 - 1"));
            }
            value as u64
        }
    };
    if value > i64::MAX as u64 {
        return Err(format!("{text:?} is above 2^63 - 1"));
    }
    if unsigned.starts_with('-') && value > 0 {
        return Err(format!("must be non-negative, got {text}"));
    }
    Ok(value)
}

/// A boolean as Go's `strconv.ParseBool` reads it: 1, t, T, true, TRUE, True, and 0, f, F, ….
///
/// # Errors
///
/// In words, when it is none of these.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

/// [`duration`] as a value of a document.
///
/// # Errors
///
/// In words.
pub fn duration_value(value: &Value) -> Result<Duration, String> {
    match value {
        Value::String(text) => duration(text),
        other => Err(format!("expected a duration such as \"60s\", got {other}")),
    }
}

/// [`quantity`] as a value of a document: text or number.
///
/// # Errors
///
/// In words.
pub fn quantity_value(value: &Value) -> Result<u64, String> {
    match value {
        Value::String(text) => quantity(text),
        Value::Number(number) => quantity(&number.to_string()),
        other => Err(format!("expected a quantity such as \"1Gi\", got {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_like_go_humanize() {
        for (text, want) in [
            ("2GiB", 2 << 30),
            ("500MiB", 500 << 20),
            ("1GB", 1_000_000_000),
            ("1.5 gib", 3 << 29),
            ("42", 42),
            ("42 B", 42),
            ("1,000k", 1_000_000),
            ("4Ki", 4096),
            ("3m", 3_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(want), "{text}");
        }
        for text in ["", "GiB", "2 GiBi", "2 XB", "-1", "1.2.3", "2ib", "99999999EiB", "1e9"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_gos() {
        #[track_caller]
        fn check(text: &str, want: Result<u64, &str>) {
            match (duration(text), want) {
                (Ok(got), Ok(micros)) => assert_eq!(got, Duration::from_micros(micros), "{text}"),
                (Err(got), Err(part)) => assert!(got.contains(part), "{text}: {got}"),
                (got, want) => panic!("{text}: {got:?}, not {want:?}"),
            }
        }
        check("50ms", Ok(50_000));
        check("1m30s", Ok(90_000_000));
        check("1.5h", Ok(5_400_000_000));
        check(".5s", Ok(500_000));
        check("2us", Ok(2));
        check("2µs", Ok(2));
        check("0", Ok(0));
        check("0s", Ok(0));
        check("-0", Ok(0));
        check("1h2m3.5s", Ok(3_723_500_000));
        check("1s500ms", Ok(1_500_000));
        check("+1s", Ok(1_000_000));
        check("", Err("empty"));
        check("5", Err("unit is missing"));
        check("5d", Err("unknown unit"));
        check("ms", Err("number is missing"));
        check("1..5s", Err("number is missing"));
        check("-1s", Err("negative"));
        check("300000000h", Err("too long"));
        check("1s ", Err("unknown unit"));
        check("1 s", Err("unknown unit"));
        check("1e3s", Err("unknown unit"));
        check("ns1", Err("number is missing"));
        check(".", Err("number is missing"));
        check("+", Err("empty"));
        check("-", Err("empty"));
        check("1m0", Err("unit is missing"));
        assert_eq!(signed_nanos("-1m0.5s"), Ok(-60_500_000_000));
    }

    #[test]
    fn quantities_are_kubernetes() {
        #[track_caller]
        fn check(text: &str, want: Result<u64, &str>) {
            match (quantity(text), want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want, "{text}"),
                (Err(got), Err(part)) => assert!(got.contains(part), "{text}: {got}"),
                (got, want) => panic!("{text}: {got:?}, not {want:?}"),
            }
        }
        check("1Gi", Ok(1 << 30));
        check("10k", Ok(10_000));
        check("1.5Ki", Ok(1536));
        check("500", Ok(500));
        check("0", Ok(0));
        check("1e3", Ok(1000));
        check("1E3", Ok(1000));
        check("1E", Ok(1_000_000_000_000_000_000));
        check("500m", Ok(1));
        check("9223372036854775807", Ok(i64::MAX as u64));
        check("9223372036854775808", Err("2^63"));
        check("99E", Err("quantity"));
        check("-1", Err("non-negative"));
        check("-0", Ok(0));
        check("1GiB", Err("no quantity"));
        check("", Err("no quantity"));
        check("Gi", Err("no quantity"));
        check("1e99", Err("no quantity"));
        assert_eq!(quantity_value(&serde_json::json!(5000)), Ok(5000));
        assert!(quantity_value(&serde_json::json!(true)).is_err());
        assert!(duration_value(&serde_json::json!(60)).is_err());
    }
}
