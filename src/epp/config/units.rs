//! The notations of Go and Kubernetes: durations, quantities, booleans.

use std::time::Duration;

use serde_json::Value;

/// A Go duration: `50ms`, `1m30s`, `2.5h`, `0`. Units: ns, us, µs, ms, s, m, h.
///
/// # Errors
///
/// In words, when there is no unit, the unit is not known, the duration is negative or above
/// 292 years, where Go's ends.
pub fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 8] = [
        ("ns", 1),
        ("us", 1_000),
        ("µs", 1_000),
        ("μs", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    let wrong = |why: &str| format!("{text:?} is no duration such as 50ms or 1m30s: {why}");
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.starts_with('-') && rest != "-0" {
        return Err(format!("{text:?} is negative"));
    }
    if matches!(rest, "0" | "-0") {
        return Ok(Duration::ZERO);
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
            return Err(wrong(if unit.is_empty() {
                "the unit is missing"
            } else {
                "unknown unit"
            }));
        };
        nanos += number * *factor as f64;
        rest = tail;
    }
    // `i64::MAX` as a float rounds up to 2^63.
    if nanos >= i64::MAX as f64 {
        return Err(wrong("it is too long"));
    }
    Ok(Duration::from_nanos(nanos.round() as u64))
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
        check("+1s", Ok(1_000_000));
        check("", Err("empty"));
        check("5", Err("unit is missing"));
        check("5d", Err("unknown unit"));
        check("ms", Err("number is missing"));
        check("1..5s", Err("number is missing"));
        check("-1s", Err("negative"));
        check("300000000h", Err("too long"));
        check("1s ", Err("unknown unit"));
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
