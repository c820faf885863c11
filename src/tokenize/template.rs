//! Jinja chat templates, rendered as `transformers` renders them.
//!
//! # Model
//!
//! A [`Template`] is compiled once, with the environment that `transformers` gives to chat templates:
//! blocks trimmed, loop controls, `raise_exception`, `strftime_now`, `tojson` as Python's `json.dumps`
//! writes, methods of Python's strings, lists and dicts, and values printed as Python prints them.
//! `{% generation %}` marks what the model said; for prompts it means nothing.
//!
//! # Invariants
//!
//! Rendering ends: instructions and bytes are paid from a budget that grows with the input, output and
//! nesting have limits. What exceeds them is an error, not a short prompt.

use std::{
    fmt, io,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, syntax::SyntaxConfig, value::Kwargs,
};

use super::MAX_PROMPT;

mod format;
mod python;

pub use self::format::ContentFormat;

/// Seconds since 1970, as templates see the time.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Work that any template may do: an instruction costs 1, as do 64 bytes that are made.
const FUEL: u64 = 1_000_000;
/// Depth of macros that call macros.
const MAX_RECURSION: usize = 100;
const NAME: &str = "chat template";

/// A compiled chat template.
pub struct Template {
    environment: Environment<'static>,
    source: Arc<str>,
    content_format: ContentFormat,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template").field("content_format", &self.content_format).finish()
    }
}

impl Template {
    /// Compiles a template.
    ///
    /// # Errors
    ///
    /// What is wrong with its syntax, with the line.
    pub fn parse(source: &str) -> Result<Self, String> {
        Self::with_clock(source, system_clock())
    }

    /// Compiles a template that asks `clock` for the time.
    ///
    /// # Errors
    ///
    /// As [`Template::parse`].
    pub fn with_clock(source: &str, clock: Clock) -> Result<Self, String> {
        let plain = without_generation_marks(source);
        let mut environment = environment(clock);
        environment.add_template_owned(NAME, plain.clone()).map_err(|error| words(&error))?;
        let content_format = format::detect(&plain, syntax()?);
        Ok(Self { environment, source: source.into(), content_format })
    }

    /// How the template wants the content of messages.
    #[must_use]
    pub fn content_format(&self) -> ContentFormat {
        self.content_format
    }

    /// The text that was compiled.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders variables that were made from `input_bytes` of input.
    ///
    /// # Errors
    ///
    /// What the template refuses, or which limit it exceeds.
    pub fn render(&self, variables: Value, input_bytes: usize) -> Result<String, String> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + input_bytes.min(MAX_PROMPT) as u64));
        let template = environment.get_template(NAME).map_err(|error| words(&error))?;
        let mut out = Capped(Vec::new());
        match template.render_captured_to(variables, &mut out) {
            Ok(_) => String::from_utf8(out.0).map_err(|error| error.to_string()),
            Err(error) if error.kind() == ErrorKind::OutOfFuel => {
                Err("the chat template does too much for its input".to_owned())
            }
            Err(error) if error.kind() == ErrorKind::WriteFailure => {
                Err(format!("the chat template makes more than {MAX_PROMPT} bytes"))
            }
            Err(error) => Err(words(&error)),
        }
    }
}

/// Takes [`MAX_PROMPT`] bytes.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_PROMPT {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn syntax() -> Result<SyntaxConfig, String> {
    let builder = &mut SyntaxConfig::builder();
    builder.trim_blocks(true).lstrip_blocks(true).build().map_err(|error| words(&error))
}

fn environment(clock: Clock) -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = syntax() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(|out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value| {
        python::print(out, state, value)
    });
    environment.add_filter("tojson", python::to_json);
    environment.add_filter("string", python::to_string);
    environment.add_filter("trim", python::trim);
    environment.add_filter("from_json", python::from_json);
    environment.add_function("raise_exception", python::raise);
    environment.add_function("strftime_now", move |format: &str| python::strftime(format, clock()));
    environment.add_function("dict", |first: Option<Value>, named: Kwargs| {
        python::dict(first.as_ref(), &named)
    });
    environment.add_global("True", true);
    environment.add_global("False", false);
    environment.add_global("None", ());
    environment
}

/// The system's time.
#[must_use]
pub fn system_clock() -> Clock {
    Arc::new(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// An error in one line: what, and in which line of the template.
fn words(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("chat template, line {line}: {what}"),
        None => format!("chat template: {what}"),
    }
}

/// Puts a scope of its own in the place of each `{% generation %}` block, which is what it is when
/// nobody asks for the marks.
fn without_generation_marks(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        plain.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => plain.push_str(&tag.replacen(word, "with", 1)),
            "endgeneration" => plain.push_str(&tag.replacen(word, "endwith", 1)),
            _ => plain.push_str(tag),
        }
        rest = after;
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests;
