//! YAML or JSON text → values, and where each one stands.
//!
//! The only place that knows the YAML crate. A plain `serde_json::Value` forgets in which order and
//! on which line its entries were written; a report of many faults needs both.

use std::{cell::RefCell, collections::HashMap, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

use super::Fault;

/// Where an entry was written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Rank among all entries of the document.
    pub(super) order: usize,
    /// Line, from 1.
    pub(super) line: u64,
}

/// A parsed document.
#[derive(Debug, Default)]
pub struct Document {
    pub(super) value: Value,
    pub(super) places: HashMap<String, Place>,
}

impl Document {
    /// Parses YAML, of which JSON is a part. An empty text is an empty mapping.
    ///
    /// # Errors
    ///
    /// A fault with line and column: a syntax error, a key given twice, a key that is no string, a
    /// number that is not finite.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let places = RefCell::default();
        // Strict: in YAML 1.2 a pod named `n` or `on` is no boolean.
        let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
        let node = Node { path: String::new(), places: &places };
        let value = serde_saphyr::with_deserializer_from_str_with_options(text, options, |de| {
            node.deserialize(de)
        });
        match value {
            Ok(value) => Ok(Self { value, places: places.into_inner() }),
            Err(error) => Err(syntax_fault(&error)),
        }
    }
}

impl Document {
    /// Is there nothing in it, or nothing but comments?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.value.is_null()
    }
}

impl From<Value> for Document {
    fn from(value: Value) -> Self {
        Self { value, places: HashMap::new() }
    }
}

fn syntax_fault(error: &serde_saphyr::Error) -> Fault {
    let message = error.without_snippet().to_string();
    match error.location().filter(|at| at.line() > 0) {
        Some(at) => Fault {
            path: String::new(),
            line: Some(at.line()),
            message: if message.contains("column") {
                message
            } else {
                format!("{message} (column {})", at.column())
            },
        },
        None => Fault { path: String::new(), line: None, message },
    }
}

/// `parent.name`, or `name` at the top.
pub(super) fn child(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}

/// One value on its way in.
struct Node<'p> {
    path: String,
    places: &'p RefCell<HashMap<String, Place>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        // `Value` would silently turn it into null, and null means "use the default".
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom(format_args!("{}: number is not finite", self.path)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let path = format!("{}[{}]", self.path, list.len());
            let node = Node { path: path.clone(), places: self.places };
            let Some(value) = items.next_element_seed(node)? else { return Ok(Value::Array(list)) };
            list.push(value);
            // An element without entries of its own counts as being where its list is.
            let mut places = self.places.borrow_mut();
            if let Some(line) = places.get(&self.path).map(|place| place.line) {
                let order = places.len();
                places.entry(path).or_insert(Place { order, line });
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let path = child(&self.path, &key.value);
            if map.contains_key(&key.value) {
                return Err(A::Error::custom(format_args!("duplicate key {path}")));
            }
            {
                let mut places = self.places.borrow_mut();
                let place = Place { order: places.len(), line: key.referenced.line() };
                // A list element has no line of its own; its first entry's comes close.
                if self.path.ends_with(']') && map.is_empty() {
                    places.insert(self.path.clone(), place);
                }
                let order = places.len();
                places.insert(path.clone(), Place { order, ..place });
            }
            let value = entries.next_value_seed(Node { path, places: self.places })?;
            map.insert(key.value, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn yaml_and_json_become_the_same_values() {
        let yaml = "a: 1e8\nb: [x, {c: ~}]\nd: 0x10\ne: 'no'\nf: 18446744073709551615\ng: -3\n";
        let json = "{\n\t\"a\": 1e8,\n\t\"b\": [\"x\", {\"c\": null}],\n\t\"d\": 16,\n\t\"e\": \"no\",\
                    \n\t\"f\": 18446744073709551615, \"g\": -3\n}";
        let want = json!({
            "a": 1e8, "b": ["x", {"c": null}], "d": 16, "e": "no", "f": u64::MAX, "g": -3
        });
        assert_eq!(Document::parse(yaml).unwrap().value, want);
        assert_eq!(Document::parse(json).unwrap().value, want);
        let escaped = Document::parse(r#"{"s": "a\/b \ud83d\ude00"}"#).unwrap().value;
        assert_eq!(escaped, json!({"s": "a/b 😀"}));
        let words = Document::parse("[n, on, yes, true]").unwrap().value;
        assert_eq!(words, json!(["n", "on", "yes", true]));
        assert_eq!(Document::parse("").unwrap().value, Value::Null);
        assert_eq!(Document::parse("# only a comment\n").unwrap().value, Value::Null);
    }

    #[test]
    fn places_are_kept() {
        let document = Document::parse("b:\n  c: 1\na:\n- z: 2\n  y: 3\n").unwrap();
        let line = |path: &str| document.places[path].line;
        assert_eq!((line("b.c"), line("a"), line("a[0]"), line("a[0].y")), (2, 3, 4, 5));
        let order = |path: &str| document.places[path].order;
        assert!(order("b") < order("b.c") && order("b.c") < order("a"));
        assert!(order("a") < order("a[0].z") && order("a[0].z") < order("a[0].y"));

        let document = Document::parse("a:\n- x\n- {}\n- b: 1\n").unwrap();
        let (line, order) =
            (|path: &str| document.places[path].line, |path: &str| document.places[path].order);
        assert_eq!((line("a[0]"), line("a[1]"), line("a[2]")), (1, 1, 4));
        assert!(order("a[0]") < order("a[1]") && order("a[1]") < order("a[2]"));
    }

    #[test]
    fn syntax_errors_name_the_line() {
        for (text, line, part) in [
            ("a: 1\nb: [1, 2\nc: 3\n", 3, "column"),
            ("a: 1\nb: 2\na: 3\n", 3, "duplicate"),
            ("a:\n  b: 1\n  b: 2\n", 3, "duplicate"),
            ("a: 1\nb: .nan\n", 2, "finite"),
            ("a: 1\n b: 2\n", 2, "column"),
        ] {
            let fault = Document::parse(text).unwrap_err();
            assert!(fault.message.contains(part), "{text:?}: {fault}");
            assert_eq!(fault.line, Some(line), "{text:?}: {fault}");
        }
    }
}
