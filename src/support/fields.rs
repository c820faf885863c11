//! Reading configuration so that *every* mistake is reported at once, each with its full path.
//!
//! # Model
//!
//! A [`Reader`] holds a parsed [`Document`]; [`Fields`] is one mapping of it and its path. A taker
//! ([`Fields::integer`], [`Fields::one_of`], …) asks for a field by name. Absent fields and nulls
//! give `None`, so the caller keeps its default; a value that cannot be used also gives `None` and
//! leaves a [`Fault`]. [`Fields::finish`] then refuses every field that nobody asked for.
//!
//! So the known names are never written down twice: what a program asks for is what it knows. The
//! suggestions for misspelt names and [`Report::asked`], with which a test compares the commented
//! sample, come from there.

mod document;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    collections::HashMap,
    fmt,
    ops::RangeInclusive,
    time::Duration,
};

use serde_json::{Map, Value};

pub use self::document::Document;
use self::document::child;

/// Something in a configuration that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Path of the field, such as `pods[2].endpoint`; empty for the document as a whole.
    pub path: String,
    /// Line of the document, from 1, where it is known.
    pub line: Option<u64>,
    /// What is wrong, in words that name what would be right.
    pub message: String,
}

impl Fault {
    /// A fault that has no line: of a flag, an environment variable, a file that is not there.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), line: None, message: message.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// What reading a document brought to light.
#[derive(Debug, Default)]
pub struct Report {
    /// Everything that is wrong, in document order.
    pub faults: Vec<Fault>,
    /// What loads and has no effect, or not the expected one, in document order.
    pub warnings: Vec<String>,
    /// Paths of all fields that were asked for; list indices are written `[]`.
    pub asked: BTreeSet<String>,
}

/// A document, and what was noticed in it so far.
#[derive(Debug)]
pub struct Reader {
    document: Document,
    notes: RefCell<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    faults: Vec<Fault>,
    warnings: Vec<(String, String)>,
    unknown: Vec<Unknown>,
    asked: BTreeSet<String>,
}

#[derive(Debug)]
struct Unknown {
    parent: String,
    name: String,
    siblings: Vec<&'static str>,
}

impl Reader {
    /// A reader that has seen nothing yet.
    #[must_use]
    pub fn new(document: Document) -> Self {
        Self { document, notes: RefCell::default() }
    }

    /// The document's top mapping. A document that is none is a fault; an empty one is not.
    pub fn root(&self) -> Fields<'_> {
        let map = match &self.document.value {
            Value::Object(map) => Some(map),
            Value::Null => None,
            other => {
                self.fault("", format!("expected a mapping at the top, got {}", describe(other)));
                None
            }
        };
        Fields {
            reader: self,
            path: String::new(),
            map,
            known: RefCell::default(),
            anything: Cell::default(),
        }
    }

    /// A mapping that the document does not have, for what is read with its defaults alone. What is
    /// noticed is reported at `path`.
    pub fn absent(&self, path: impl Into<String>) -> Fields<'_> {
        Fields { path: path.into(), map: None, ..self.root() }
    }

    /// Records a fault at `path`.
    pub fn fault(&self, path: impl Into<String>, message: impl Into<String>) {
        self.notes.borrow_mut().faults.push(Fault::new(path, message));
    }

    /// Records a warning about `path`.
    pub fn warn(&self, path: impl Into<String>, message: impl Into<String>) {
        self.notes.borrow_mut().warnings.push((path.into(), message.into()));
    }

    /// Everything that was noticed.
    #[must_use]
    pub fn finish(self) -> Report {
        let places = self.document.places;
        let Notes { mut faults, mut warnings, unknown, asked } = self.notes.into_inner();
        faults.extend(unknown.iter().map(|unknown| unknown.fault(&asked)));
        for fault in &mut faults {
            fault.line = nearest(&places, &fault.path).map(|place| place.line);
        }
        let order = |path: &str| nearest(&places, path).map_or(usize::MAX, |place| place.order);
        faults.sort_by_cached_key(|fault| order(&fault.path));
        warnings.sort_by_cached_key(|(path, _)| order(path));
        let warnings = warnings.into_iter().map(|(path, text)| format!("{path}: {text}")).collect();
        Report { faults, warnings, asked }
    }
}

/// The place of `path`, or of what encloses it: a field that is missing is reported there.
fn nearest(places: &HashMap<String, document::Place>, path: &str) -> Option<document::Place> {
    let mut path = path;
    loop {
        if let Some(place) = places.get(path) {
            return Some(*place);
        }
        path = &path[..path.rfind(['.', '['])?];
    }
}

impl Unknown {
    fn fault(&self, asked: &BTreeSet<String>) -> Fault {
        let mut message = "unknown field".to_owned();
        if let Some(name) = closest(&self.name, self.siblings.iter().copied()) {
            message = format!("{message}; did you mean `{name}`?");
        } else if let Some(path) = asked
            .iter()
            .filter(|path| last_name(path) == self.name)
            .min_by_key(|path| path.matches('.').count())
        {
            message = format!("{message} here; it belongs at `{path}`");
        }
        Fault::new(child(&self.parent, &self.name), message)
    }
}

fn last_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// The name most like `wrong`, if one is like it at all.
pub fn closest<'a>(wrong: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.replace(['_', '-'], "").to_lowercase();
    let wrong = plain(wrong);
    names
        .map(|name| (strsim::damerau_levenshtein(&wrong, &plain(name)), name))
        // A third of the letters wrong is a typo; more is another word.
        .filter(|&(distance, name)| distance <= (name.len().max(wrong.len()) / 3).max(1))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name)
}

/// One mapping, or the absence of one: then every taker gives `None`, and the names count as asked.
#[must_use = "unknown fields are found by finish"]
#[derive(Debug)]
pub struct Fields<'r> {
    reader: &'r Reader,
    path: String,
    map: Option<&'r Map<String, Value>>,
    known: RefCell<Vec<&'static str>>,
    /// Whatever it holds is passed over.
    anything: Cell<bool>,
}

impl<'r> Fields<'r> {
    /// Is there such a mapping in the document?
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.map.is_some()
    }

    /// Full path of this mapping; empty at the top.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Full path of a field of this mapping; of the mapping itself if `name` is empty.
    #[must_use]
    pub fn path_of(&self, name: &str) -> String {
        if name.is_empty() { self.path.clone() } else { child(&self.path, name) }
    }

    /// Does the field have a value other than null? Does not count as asking.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.map.and_then(|map| map.get(name)).is_some_and(|value| !value.is_null())
    }

    /// Is the field there and explicitly null? Does not count as asking.
    #[must_use]
    pub fn is_null(&self, name: &str) -> bool {
        self.map.and_then(|map| map.get(name)).is_some_and(Value::is_null)
    }

    /// Records a fault of a field.
    pub fn fault(&self, name: &str, message: impl Into<String>) {
        self.reader.fault(self.path_of(name), message);
    }

    /// Records a warning about a field.
    pub fn warn(&self, name: &str, message: impl Into<String>) {
        self.reader.warn(self.path_of(name), message);
    }

    /// Asks for a field and lets `read` judge its value. The others are made of this one.
    pub fn take<T>(
        &self,
        name: &'static str,
        read: impl FnOnce(&'r Value) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.raw(name)?;
        read(value).map_err(|message| self.fault(name, message)).ok()
    }

    /// A field that has to be there.
    pub fn required<T>(
        &self,
        name: &'static str,
        taker: impl FnOnce(&Self, &'static str) -> Option<T>,
    ) -> Option<T> {
        let present = self.has(name);
        let value = taker(self, name);
        if !present {
            self.fault(name, "missing; this field is required");
        }
        value
    }

    /// A string.
    pub fn string(&self, name: &'static str) -> Option<String> {
        self.parsed(name, |text| Ok(text.to_owned()))
    }

    /// A string that is not empty.
    pub fn nonempty(&self, name: &'static str) -> Option<String> {
        self.parsed(name, |text| match text {
            "" => Err("must not be empty".to_owned()),
            text => Ok(text.to_owned()),
        })
    }

    /// A string that `parse` accepts.
    pub fn parsed<T>(
        &self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        self.take(name, |value| match value {
            Value::String(text) => parse(text),
            Value::Number(_) | Value::Bool(_) => {
                Err(format!("expected a string, got {}; put it in quotes", describe(value)))
            }
            other => Err(format!("expected a string, got {}", describe(other))),
        })
    }

    /// One of a fixed set of words.
    pub fn one_of<T: Clone>(&self, name: &'static str, legal: &[(&str, T)]) -> Option<T> {
        self.parsed(name, |text| {
            legal.iter().find(|(word, _)| *word == text).map(|(_, value)| value.clone()).ok_or_else(
                || {
                    let words: Vec<String> =
                        legal.iter().map(|(word, _)| format!("`{word}`")).collect();
                    let hint = closest(text, legal.iter().map(|&(word, _)| word))
                        .filter(|word| !word.is_empty())
                        .map_or_else(String::new, |word| format!("; did you mean `{word}`?"));
                    format!("{text:?} is not one of {}{hint}", words.join(", "))
                },
            )
        })
    }

    /// A boolean.
    pub fn boolean(&self, name: &'static str) -> Option<bool> {
        self.take(name, |value| {
            value
                .as_bool()
                .ok_or_else(|| format!("expected true or false, got {}", describe(value)))
        })
    }

    /// An integer within `range`; `1e8` is one, too.
    pub fn integer<T: TryFrom<u64>>(
        &self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Option<T> {
        self.take(name, |value| integer(value, &range))
    }

    /// An integer within `range` that may be negative.
    pub fn signed(&self, name: &'static str, range: RangeInclusive<i64>) -> Option<i64> {
        self.take(name, |value| match value.as_i64().or_else(|| whole(value)) {
            Some(number) if range.contains(&number) => Ok(number),
            Some(number) => Err(format!("{number} is out of range; must be in {range:?}")),
            None => Err(format!("expected an integer, got {}", describe(value))),
        })
    }

    /// A number of at least `least`.
    pub fn number(&self, name: &'static str, least: f64) -> Option<f64> {
        self.take(name, |value| match value.as_f64() {
            Some(number) if number >= least && number <= f64::from(f32::MAX) => Ok(number),
            Some(number) => Err(format!("{number} is out of range; must be at least {least}")),
            None => Err(format!("expected a number, got {}", describe(value))),
        })
    }

    /// A duration, given in milliseconds within `range`.
    pub fn millis(&self, name: &'static str, range: RangeInclusive<u64>) -> Option<Duration> {
        self.integer(name, range).map(Duration::from_millis)
    }

    /// A nested mapping; one without entries when it is absent or no mapping (which is a fault).
    pub fn mapping(&self, name: &'static str) -> Fields<'r> {
        let map = self.take(name, |value| {
            value.as_object().ok_or_else(|| format!("expected a mapping, got {}", describe(value)))
        });
        Fields {
            reader: self.reader,
            path: self.path_of(name),
            map,
            known: RefCell::default(),
            anything: Cell::default(),
        }
    }

    /// A list of mappings, with their indices in the paths. Elements that are none are faults.
    pub fn each(&self, name: &'static str) -> Vec<Fields<'r>> {
        let list = self.take(name, |value| {
            value.as_array().ok_or_else(|| format!("expected a list, got {}", describe(value)))
        });
        let mut fields = Vec::new();
        for (at, item) in list.into_iter().flatten().enumerate() {
            let path = format!("{}[{at}]", self.path_of(name));
            match item {
                Value::Object(map) => {
                    let (known, anything) = (RefCell::default(), Cell::default());
                    let map = Some(map);
                    fields.push(Fields { reader: self.reader, path, map, known, anything });
                }
                other => {
                    self.reader.fault(path, format!("expected a mapping, got {}", describe(other)));
                }
            }
        }
        fields
    }

    /// A list of strings, each with its path. Elements that are none are faults.
    pub fn texts(&self, name: &'static str) -> Vec<(String, String)> {
        let list = self.take(name, |value| {
            value.as_array().ok_or_else(|| format!("expected a list, got {}", describe(value)))
        });
        let mut texts = Vec::new();
        for (at, item) in list.into_iter().flatten().enumerate() {
            let path = format!("{}[{at}]", self.path_of(name));
            match item {
                Value::String(text) => texts.push((path, text.clone())),
                other => {
                    self.reader.fault(path, format!("expected a string, got {}", describe(other)));
                }
            }
        }
        texts
    }

    /// A mapping whose keys are free and whose values are strings, by key.
    pub fn strings(&self, name: &'static str) -> Vec<(String, String)> {
        let Some(map) = self.mapping(name).map else { return Vec::new() };
        let mut pairs = Vec::new();
        for (key, value) in map {
            match value {
                Value::String(text) => pairs.push((key.clone(), text.clone())),
                other => self.reader.fault(
                    child(&self.path_of(name), key),
                    format!("expected a string, got {}", describe(other)),
                ),
            }
        }
        pairs
    }

    /// A field that loads whatever it holds and has no effect; `why` becomes a warning.
    pub fn ignored(&self, name: &'static str, why: &str) {
        if self.raw(name).is_some() {
            self.warn(name, why);
        }
    }

    /// Lets every field load that was not asked for, whatever it holds; `why` becomes a warning about
    /// each.
    pub fn ignore_rest(&self, why: &str) {
        self.anything.set(true);
        let known = self.known.borrow();
        for name in self.map.into_iter().flat_map(Map::keys) {
            if !known.contains(&name.as_str()) {
                self.warn(name, why);
            }
        }
    }

    /// Refuses every field that was not asked for.
    pub fn finish(self) {
        if self.anything.get() {
            return;
        }
        let known = self.known.into_inner();
        for name in self.map.into_iter().flat_map(Map::keys) {
            if !known.contains(&name.as_str()) {
                self.reader.notes.borrow_mut().unknown.push(Unknown {
                    parent: self.path.clone(),
                    name: name.clone(),
                    siblings: known.clone(),
                });
            }
        }
    }

    /// The field's value unless it is null, and the note that it was asked for.
    fn raw(&self, name: &'static str) -> Option<&'r Value> {
        self.known.borrow_mut().push(name);
        self.reader.notes.borrow_mut().asked.insert(without_indices(&self.path_of(name)));
        self.map.and_then(|map| map.get(name)).filter(|value| !value.is_null())
    }
}

/// Replaces `target` if there is a value.
pub fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

/// A whole number within `range`, for takers that accept other things, too.
///
/// # Errors
///
/// In words, when `value` is no whole number or out of range.
pub fn integer<T: TryFrom<u64>>(value: &Value, range: &RangeInclusive<u64>) -> Result<T, String> {
    let out_of_range = || {
        let (low, high) = (range.start(), range.end());
        format!("{value} is out of range; must be in {low}..={high}")
    };
    match value.as_u64().or_else(|| whole(value).and_then(|number| u64::try_from(number).ok())) {
        Some(number) if range.contains(&number) => T::try_from(number).map_err(|_| out_of_range()),
        Some(_) => Err(out_of_range()),
        None if value.as_i64().or_else(|| whole(value)).is_some() => Err(out_of_range()),
        None => Err(format!("expected an integer, got {}", describe(value))),
    }
}

/// A float without fraction, within the integers that a float holds exactly.
fn whole(value: &Value) -> Option<i64> {
    const EXACT: f64 = (1_u64 << 53) as f64;
    value
        .as_f64()
        .filter(|number| number.fract() == 0.0 && number.abs() <= EXACT)
        .map(|number| number as i64)
}

/// A value in a message: its kind, and the value itself where it is short.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(flag) => format!("the boolean {flag}"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) if text.len() <= 40 => format!("the string {text:?}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
    }
}

fn without_indices(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut inside = false;
    for c in path.chars() {
        inside = inside && c != ']';
        if !inside {
            out.push(c);
        }
        inside |= c == '[';
    }
    out
}

#[cfg(test)]
mod tests;
