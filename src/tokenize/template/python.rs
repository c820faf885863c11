//! What templates expect of Python: how values print, `json.dumps`, methods, `strftime`.

use std::fmt::{self, Write};

use minijinja::{
    Error, ErrorKind, Output, State, Value,
    value::{Kwargs, ValueKind, from_args},
};

/// Nesting of values that are printed, at most.
const MAX_DEPTH: usize = 200;

/// Characters that Python's `str.strip` and `str.split` take for white space: Rust's, and four
/// separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn invalid(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

fn unprintable(_: fmt::Error) -> Error {
    Error::new(ErrorKind::WriteFailure, "the output is full")
}

/// Writes a value as `{{ value }}` does.
pub(super) fn print(
    out: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text).map_err(unprintable),
        None if value.kind() == ValueKind::Invalid => Err(invalid(value.to_string())),
        None => out.write_str(&to_string(state, value)?).map_err(unprintable),
    }
}

/// `str(value)`. What it makes is paid for while it is made: a list that holds another one twice, and so
/// on, is small itself, and endless in print.
pub(super) fn to_string(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = String::new();
    repr(state, &mut out, value, 0)?;
    Ok(out)
}

/// `raise_exception(message)`.
pub(super) fn raise(state: &State<'_, '_>, message: &Value) -> Result<Value, Error> {
    Err(invalid(to_string(state, message)?))
}

/// `repr(value)`.
fn repr(state: &State<'_, '_>, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("values nest too deeply to be printed"));
    }
    let before = out.len();
    match value.kind() {
        ValueKind::String => repr_text(out, value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => out.push_str(&float(value)),
        ValueKind::Seq | ValueKind::Iterable => {
            let brackets = if is_tuple(value) { ['(', ')'] } else { ['[', ']'] };
            out.push(brackets[0]);
            let mut count = 0;
            for item in items(value) {
                out.push_str(if count > 0 { ", " } else { "" });
                repr(state, out, &item, depth + 1)?;
                count += 1;
            }
            out.push_str(if is_tuple(value) && count == 1 { "," } else { "" });
            out.push(brackets[1]);
            return state.consume_fuel(1);
        }
        ValueKind::Map => {
            out.push('{');
            for (index, (key, item)) in pairs(value).enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(state, out, &key, depth + 1)?;
                out.push_str(": ");
                repr(state, out, &item, depth + 1)?;
            }
            out.push('}');
            return state.consume_fuel(1);
        }
        _ => write!(out, "{value}").unwrap_or_default(),
    }
    state.consume_fuel(1 + (out.len() - before) as u64 / 64)
}

fn is_tuple(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.is::<minijinja::value::Tuple>())
}

fn repr_text(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if (c as u32) < 0x20 || (0x7f..0xa1).contains(&(c as u32)) || c == '\u{ad}' => {
                write!(out, "\\x{:02x}", c as u32).unwrap_or_default();
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
fn float(value: &Value) -> String {
    let Ok(number) = f64::try_from(value.clone()) else { return value.to_string() };
    if !number.is_finite() {
        let word = if number.is_nan() { "nan" } else { "inf" };
        return if number < 0.0 { format!("-{word}") } else { word.to_owned() };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if number != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => {
            let plain = number.to_string();
            if plain.contains('.') { plain } else { format!("{plain}.0") }
        }
    }
}

fn items(value: &Value) -> impl Iterator<Item = Value> {
    value.try_iter().into_iter().flatten()
}

fn pairs(value: &Value) -> impl Iterator<Item = (Value, Value)> {
    items(value).map(|key| {
        let item = value.get_item(&key).unwrap_or_default();
        (key, item)
    })
}

/// The filter `tojson` of `transformers`: `json.dumps` without escapes for HTML, and without
/// `ensure_ascii` unless asked.
#[expect(clippy::needless_pass_by_value, reason = "filters are given their arguments")]
pub(super) fn to_json(
    state: &State<'_, '_>,
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let indent = indent.or(named.get("indent")?).filter(|indent| !indent.is_none());
    let separators: Option<Vec<String>> = named.get("separators")?;
    let indent = match indent {
        None => None,
        Some(indent) => match indent.as_str() {
            Some(text) => Some(text.to_owned()),
            None => Some(" ".repeat(usize::try_from(indent)?.min(64))),
        },
    };
    let (mut between, after_key) = match separators.as_deref() {
        None => (", ".to_owned(), ": ".to_owned()),
        Some([between, after]) => (between.clone(), after.clone()),
        Some(_) => return Err(invalid("separators of tojson are not two")),
    };
    if indent.is_some() && separators.is_none() {
        between = ",".to_owned();
    }
    let mut json = Json {
        out: String::new(),
        ascii: ensure_ascii.or(named.get("ensure_ascii")?).unwrap_or(false),
        sorted: named.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        between,
        after_key,
        state,
        paid: 0,
    };
    named.assert_all_used()?;
    json.value(value, 0)?;
    Ok(json.out)
}

struct Json<'s> {
    out: String,
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    between: String,
    after_key: String,
    state: &'s State<'s, 's>,
    paid: usize,
}

impl Json<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("values nest too deeply for tojson"));
        }
        self.state.consume_fuel(1 + (self.out.len() - self.paid) as u64 / 64)?;
        self.paid = self.out.len();
        if let Some(text) = value.as_str() {
            self.text(text);
            return Ok(());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => {
                write!(self.out, "{value}").unwrap_or_default();
            }
            ValueKind::Number => {
                let word = match float(value).as_str() {
                    "nan" => "NaN".to_owned(),
                    "inf" => "Infinity".to_owned(),
                    "-inf" => "-Infinity".to_owned(),
                    number => number.to_owned(),
                };
                self.out.push_str(&word);
            }
            ValueKind::Seq => {
                self.open('[');
                let mut any = false;
                for item in items(value) {
                    self.next(any, depth + 1);
                    any = true;
                    self.value(&item, depth + 1)?;
                }
                self.close(']', any, depth);
            }
            ValueKind::Map => {
                self.open('{');
                let mut all: Vec<_> = pairs(value).collect();
                if self.sorted {
                    all.sort_by(|a, b| a.0.cmp(&b.0));
                }
                let any = !all.is_empty();
                for (index, (key, item)) in all.into_iter().enumerate() {
                    self.next(index > 0, depth + 1);
                    self.key(&key)?;
                    self.out.push_str(&self.after_key);
                    self.value(&item, depth + 1)?;
                }
                self.close('}', any, depth);
            }
            kind => return Err(invalid(format!("tojson of {kind}"))),
        }
        Ok(())
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match (key.as_str(), key.kind()) {
            (Some(text), _) => self.text(text),
            (None, ValueKind::None | ValueKind::Bool | ValueKind::Number) => {
                self.out.push('"');
                self.value(key, 0)?;
                self.out.push('"');
            }
            (None, kind) => return Err(invalid(format!("tojson of a key of kind {kind}"))),
        }
        Ok(())
    }

    fn open(&mut self, bracket: char) {
        self.out.push(bracket);
    }

    fn next(&mut self, more: bool, depth: usize) {
        if more {
            self.out.push_str(&self.between);
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, any: bool, depth: usize) {
        if any {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}").unwrap_or_default();
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// The filter `from_json`, which some templates expect of their engine.
pub(super) fn from_json(text: &str) -> Result<Value, Error> {
    serde_json::from_str(text).map_err(|error| invalid(format!("from_json: {error}")))
}

/// The filter `trim`, with Python's white space.
pub(super) fn trim(
    state: &State<'_, '_>,
    value: &Value,
    chars: Option<&str>,
) -> Result<String, Error> {
    let text = to_string(state, value)?;
    Ok(match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    })
}

/// `dict(…)`.
pub(super) fn dict(first: Option<&Value>, named: &Kwargs) -> Result<Value, Error> {
    let mut all: Vec<(Value, Value)> = first.into_iter().flat_map(pairs).collect();
    for name in named.args() {
        all.push((Value::from(name), named.get(name)?));
    }
    Ok(Value::from_pairs(all))
}

/// Methods of Python's types, as far as minijinja's own differ or are missing.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(text, name, args)?
    {
        return Ok(result);
    }
    if value.kind() == ValueKind::Seq && name == "index" {
        let (wanted,): (&Value,) = from_args(args)?;
        let at = items(value).position(|item| item == *wanted);
        return at.map(Value::from).ok_or_else(|| invalid("the value is not in the list"));
    }
    if value.kind() == ValueKind::Map && name == "copy" {
        return Ok(Value::from_pairs(pairs(value)));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            Value::from(match name {
                "strip" => text.trim_matches(strips),
                "lstrip" => text.trim_start_matches(strips),
                _ => text.trim_end_matches(strips),
            })
        }
        "split" | "rsplit" => {
            let (separator, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.or(named.get("sep")?).filter(|value| !value.is_none());
            let most = most.or(named.get("maxsplit")?).unwrap_or(-1);
            named.assert_all_used()?;
            let most = usize::try_from(most).unwrap_or(usize::MAX - 1);
            let separator = separator.as_ref().and_then(Value::as_str);
            split(text, separator, most, name == "rsplit")?
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let last = name == "rpartition";
            let halves =
                if last { text.rsplit_once(separator) } else { text.split_once(separator) };
            let parts = match halves {
                Some((before, after)) => [before, separator, after],
                None if last => ["", "", text],
                None => [text, "", ""],
            };
            parts.into_iter().collect()
        }
        "index" | "rindex" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = if name == "index" { text.find(wanted) } else { text.rfind(wanted) };
            let at = at.ok_or_else(|| invalid("substring not found"))?;
            Value::from(text.get(..at).unwrap_or_default().chars().count())
        }
        _ => return Ok(None),
    }))
}

fn split(text: &str, separator: Option<&str>, most: usize, from_end: bool) -> Result<Value, Error> {
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(invalid("empty separator")),
        Some(separator) if from_end => text.rsplitn(most + 1, separator).collect(),
        Some(separator) => text.splitn(most + 1, separator).collect(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), text);
            loop {
                rest = if from_end {
                    rest.trim_end_matches(is_space)
                } else {
                    rest.trim_start_matches(is_space)
                };
                if rest.is_empty() {
                    break;
                }
                let end = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
                match end.filter(|_| parts.len() < most) {
                    Some(at) if from_end => {
                        let width = rest[at..].chars().next().map_or(0, char::len_utf8);
                        parts.push(&rest[at + width..]);
                        rest = &rest[..at];
                    }
                    Some(at) => {
                        parts.push(&rest[..at]);
                        rest = &rest[at..];
                    }
                    None => {
                        parts.push(rest);
                        break;
                    }
                }
            }
            parts
        }
    };
    if from_end {
        parts.reverse();
    }
    Ok(parts.into_iter().collect())
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `datetime.strftime` in UTC, which is the time zone of containers unless somebody sets another.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let days = i64::try_from(seconds / 86_400).unwrap_or(0);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil(days);
    let named = |names: &[&'static str], at: u64| {
        usize::try_from(at).ok().and_then(|at| names.get(at)).copied().unwrap_or_default()
    };
    let month_name = named(&MONTHS, month - 1);
    let week_day = days.rem_euclid(7).unsigned_abs().wrapping_add(4) % 7;
    let day_name = named(&DAYS, week_day);
    let half = if hour < 12 { "AM" } else { "PM" };
    let hour12 = (hour + 11) % 12 + 1;
    let year_day = days - days_before(year, 1, 1) + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let width = if bare { 0 } else { 2 };
        let written = match directive {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:0width$}", year % 100),
            Some('m') => write!(out, "{month:0width$}"),
            Some('d') => write!(out, "{day:0width$}"),
            Some('e') => write!(out, "{day:width$}"),
            Some('H') => write!(out, "{hour:0width$}"),
            Some('I') => write!(out, "{hour12:0width$}"),
            Some('M') => write!(out, "{minute:0width$}"),
            Some('S') => write!(out, "{second:0width$}"),
            Some('j') => write!(out, "{year_day:0width$}", width = if bare { 0 } else { 3 }),
            Some('p') => out.write_str(half),
            Some('B') => out.write_str(month_name),
            Some('b' | 'h') => out.write_str(&month_name[..3]),
            Some('A') => out.write_str(day_name),
            Some('a') => out.write_str(&day_name[..3]),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('Z' | 'z') => Ok(()),
            Some('%') => out.write_char('%'),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(invalid(format!("strftime_now: %{other} is not known")));
            }
        };
        written.unwrap_or_default();
    }
    Ok(out)
}

/// Days since 1970 → year, month, day of the Gregorian calendar.
fn civil(days: i64) -> (i64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before(year + 1, 1, 1) <= days {
        year += 1;
    }
    let month = (1..=12).rev().find(|month| days_before(year, *month, 1) <= days).unwrap_or(1);
    let day = days - days_before(year, month, 1) + 1;
    (year, month.unsigned_abs(), day.unsigned_abs())
}

/// Days from 1970 to a date.
fn days_before(year: i64, month: i64, day: i64) -> i64 {
    // Years that begin in March put the leap day at their end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
    let in_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year * 365 + year / 4 - year / 100 + in_year - 719_468
}
