//! The text form of workloads and arrivals: `name:field=value,field=value`.

use std::{fmt, str::FromStr, time::Duration};

use crate::support::units;

/// A name and its fields, each taken once.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    pub(super) name: &'a str,
    /// What is left; a value without a name is that of the field "".
    left: Vec<(&'a str, &'a str)>,
    /// Names that were asked for.
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// Reads `name` or `name:fields`. Commas in parentheses do not separate.
    pub(super) fn read(text: &'a str) -> Result<Self, String> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let mut left: Vec<(&str, &str)> = Vec::new();
        for field in split(rest) {
            let (key, value) =
                field.split_once('=').map_or(("", field), |(key, value)| (key.trim(), value));
            if left.iter().any(|(other, _)| *other == key) {
                return Err(format!("{name}: {} is there twice", shown(key)));
            }
            left.push((key, value.trim()));
        }
        Ok(Self { name: name.trim(), left, known: Vec::new() })
    }

    /// The text of a field.
    pub(super) fn text(&mut self, key: &'static str) -> Option<&'a str> {
        self.known.push(key);
        let at = self.left.iter().position(|(other, _)| *other == key)?;
        Some(self.left.swap_remove(at).1)
    }

    /// A field as `read` understands it.
    pub(super) fn with<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        let Some(text) = self.text(key) else { return Ok(None) };
        read(text).map(Some).map_err(|why| format!("{}: {}: {why}", self.name, shown(key)))
    }

    /// A field, or an error that it is missing.
    pub(super) fn need<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, String> {
        let missing = format!("{}: {key} is missing", self.name);
        self.with(key, read)?.ok_or(missing)
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), String> {
        let Some((key, value)) = self.left.first() else { return Ok(()) };
        if key.is_empty() {
            return Err(format!("{}: {value:?} is no field=value", self.name));
        }
        let known = self.known.iter().copied().filter(|known| !known.is_empty());
        Err(format!("{}: {}", self.name, unknown("field", key, known)))
    }
}

fn shown(key: &str) -> &str {
    if key.is_empty() { "the value" } else { key }
}

/// The pieces between commas that are in no parentheses; none of an empty text.
pub(super) fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_usize;
    let pieces = text.split(move |c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    pieces.map(str::trim).filter(|piece| !piece.is_empty())
}

/// `no field "quesiton"; question? (system, question, …)`.
pub(super) fn unknown<'k>(
    kind: &str,
    given: &str,
    known: impl Iterator<Item = &'k str> + Clone,
) -> String {
    let near = known
        .clone()
        .map(|name| (strsim::damerau_levenshtein(given, name), name))
        .min()
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3))
        .map_or(String::new(), |(_, name)| format!("; did you mean {name:?}?"));
    let known = known.collect::<Vec<_>>().join(", ");
    format!("no {kind} {given:?}{near} (there are {known})")
}

/// A whole number in a range.
pub(super) fn whole(from: u32, to: u32) -> impl Fn(&str) -> Result<u32, String> {
    move |text| match text.parse() {
        Ok(number) if (from..=to).contains(&number) => Ok(number),
        _ => Err(format!("{text:?} is no whole number from {from} to {to}")),
    }
}

/// A number in a range.
pub(super) fn number(from: f64, to: f64) -> impl Fn(&str) -> Result<f64, String> {
    move |text| match f64::from_str(text) {
        Ok(number) if (from..=to).contains(&number) => Ok(number),
        _ => Err(format!("{text:?} is no number from {from} to {to}")),
    }
}

/// A duration above 0, such as `250ms`.
pub(super) fn some_time(text: &str) -> Result<Duration, String> {
    match units::duration(text)? {
        Duration::ZERO => Err(format!("{text:?} is not above 0")),
        duration => Ok(duration),
    }
}

/// A duration as [`units::duration`] reads it.
pub(super) struct Written(pub(super) Duration);

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        let (unit, name) = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us")]
            .into_iter()
            .find(|(unit, _)| nanos.is_multiple_of(*unit))
            .unwrap_or((1, "ns"));
        write!(f, "{}{name}", nanos / unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_separated_outside_of_parentheses() {
        let mut fields = Fields::read("x:a=uniform(1,2), b=3,4").unwrap();
        assert_eq!(fields.name, "x");
        assert_eq!(fields.text("a"), Some("uniform(1,2)"));
        assert_eq!(fields.text("b"), Some("3"));
        assert_eq!(fields.text("c"), None);
        assert_eq!(fields.text(""), Some("4"));
        fields.end().unwrap();
        assert_eq!(Fields::read("x:a=1,a=2").unwrap_err(), "x: a is there twice");
        assert_eq!(Fields::read("x:1,2").unwrap_err(), "x: the value is there twice");
    }

    #[test]
    fn errors_name_the_field_and_what_was_meant() {
        let mut fields = Fields::read("x:quesiton=1").unwrap();
        assert_eq!(fields.need("question", whole(1, 9)).unwrap_err(), "x: question is missing");
        let error = fields.end().unwrap_err();
        assert_eq!(
            error,
            "x: no field \"quesiton\"; did you mean \"question\"? (there are question)"
        );
        let mut fields = Fields::read("x:n=0").unwrap();
        let error = fields.need("n", whole(1, 9)).unwrap_err();
        assert_eq!(error, "x: n: \"0\" is no whole number from 1 to 9");
        for wrong in ["nan", "inf", "-1", "", "1e9"] {
            assert!(number(0.0, 1e6)(wrong).is_err(), "{wrong}");
        }
        assert!(some_time("0").is_err());
    }

    #[test]
    fn durations_are_written_in_the_largest_unit_that_is_exact() {
        for text in ["1s", "90s", "1500ms", "2us", "1000001ns"] {
            assert_eq!(Written(units::duration(text).unwrap()).to_string(), text);
        }
    }
}
