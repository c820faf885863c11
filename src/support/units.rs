//! Values that are written as text: sizes, Go durations.

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

/// Parses a Go duration such as `2s`, `1m0s`, `1.5h`, `-300ms`; a negative one is zero.
///
/// # Errors
///
/// In words, when `text` is no duration or too long.
pub fn parse_go_duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 8] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("μs", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    let wrong = || format!("{text:?} is no duration; write it like `2s`, `1m30s` or `500ms`");
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(wrong());
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(end);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        seconds += number * factor;
        rest = tail;
    }
    let seconds = if negative { 0.0 } else { seconds };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text:?} is too long"))
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
    fn go_durations_are_read() {
        for (text, want) in [
            ("2s", 2_000),
            ("1m0s", 60_000),
            ("1h2m3.5s", 3_723_500),
            ("300ms", 300),
            ("-5s", 0),
            ("0", 0),
            ("1500us", 1),
        ] {
            assert_eq!(parse_go_duration(text).map(|d| d.as_millis()), Ok(want), "{text}");
        }
        for text in ["", "2", "s", "2 s", "2x", "1m0", "-", "99999999999999999999h"] {
            assert!(parse_go_duration(text).is_err(), "{text}");
        }
    }
}
