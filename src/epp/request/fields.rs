//! Which fields of a body matter to which API, and what may stand in them.
//!
//! # Model
//!
//! Go decodes a body twice: into a map, where keys are exact, and into a struct, where they match in
//! any case and a value of a wrong type is an error whose text some APIs show. Both are done in the
//! one pass here. `model`, `stream` and the limits on output are the map's; the prompt and all that
//! belongs to it are the struct's. Of a repeated key the last value counts, but a wrong type is
//! wrong wherever it stands.

use std::{borrow::Cow, ops::Range};

use smallvec::SmallVec;

use super::{
    Api, Edit, ParseError, Parsed, PromptForm, PromptSpan,
    json::{JsonError, Kind, Scanner, Text, Value, float, to_string},
    shapes::{
        CHAT, COMPLETIONS, CONVERSATIONS, Check, Checked, EMBEDDINGS, Field, GENERATE, IMAGES,
        MESSAGES, RESPONSES, Record, SGLANG, Want, lookup,
    },
};

/// What a body says of `stream_options.include_usage`.
#[derive(Debug)]
enum Options {
    /// There are no options.
    Missing,
    /// They are null.
    Null(Range<usize>),
    /// They are an object with nothing in it; where its brace is.
    Empty(usize),
    /// They say nothing of usage; where their brace is.
    Without(usize),
    /// False or null, and where that stands.
    No(Range<usize>),
    /// Asked for; or no boolean, which is the engine's to judge; or the client wants usage with every
    /// chunk as soon as it is asked for, which could not be taken out again.
    Settled,
}

impl Options {
    /// Reads the value of `stream_options`.
    fn read(scanner: &mut Scanner<'_>) -> Result<Self, JsonError> {
        match scanner.kind() {
            Some(Kind::Object) => {}
            Some(Kind::Null) => return Ok(Self::Null(scanner.value()?.span)),
            _ => return scanner.value().map(|_| Self::Settled),
        }
        let brace = scanner.at();
        let mut found = Self::Empty(brace);
        let mut continuous = false;
        scanner.fields(|scanner, key| {
            let name = scanner.unescaped(&key);
            let Value { kind, span } = scanner.value()?;
            found = match (&*name, kind) {
                (b"include_usage", Kind::False | Kind::Null) => Self::No(span),
                (b"include_usage", _) => Self::Settled,
                (b"continuous_usage_stats", kind) => {
                    continuous = kind != Kind::False && kind != Kind::Null;
                    std::mem::replace(&mut found, Self::Settled).with_more(brace)
                }
                _ => std::mem::replace(&mut found, Self::Settled).with_more(brace),
            };
            Ok(())
        })?;
        Ok(if continuous { Self::Settled } else { found })
    }

    /// The same after another option.
    fn with_more(self, brace: usize) -> Self {
        match self {
            Self::Empty(_) => Self::Without(brace),
            other => other,
        }
    }
}

/// What an API is about.
struct Rules {
    record: &'static Record,
    /// Name of the field with the prompt.
    prompt: &'static str,
    /// Limits on output of the map, the preferred one first.
    limits: &'static [&'static str],
    /// Before a text about JSON that is none.
    json: &'static str,
    /// Before a text about a field of a wrong type; `None`: the same text as for a missing prompt.
    wrong: Option<&'static str>,
    /// What is said when the prompt is missing.
    missing: &'static str,
}

fn rules(api: Api) -> Option<Rules> {
    const MAP: &str = "error unmarshaling request bodyMap: ";
    let openai = |record, prompt, limits, missing| Rules {
        record,
        prompt,
        limits,
        json: MAP,
        wrong: None,
        missing,
    };
    Some(match api {
        Api::Completions => openai(
            &COMPLETIONS,
            "prompt",
            &["max_tokens"],
            "invalid completions request: must have prompt field",
        ),
        Api::ChatCompletions => openai(
            &CHAT,
            "messages",
            &["max_completion_tokens", "max_tokens"],
            "invalid chat completions request: must have valid messages field",
        ),
        Api::Embeddings => {
            openai(&EMBEDDINGS, "input", &[], "invalid embeddings request: must have input field")
        }
        Api::Responses => openai(
            &RESPONSES,
            "input",
            &["max_output_tokens"],
            "invalid responses request: must have input field",
        ),
        Api::Conversations => openai(
            &CONVERSATIONS,
            "items",
            &[],
            "invalid conversations request: must have items field",
        ),
        Api::Images => openai(
            &IMAGES,
            "prompt",
            &[],
            "invalid images generations request: must have prompt field",
        ),
        Api::Messages => Rules {
            record: &MESSAGES,
            prompt: "messages",
            limits: &["max_tokens"],
            json: "error unmarshaling request body: ",
            wrong: Some("error parsing messages request: "),
            missing: "invalid messages request: must have at least one message",
        },
        Api::Generate => Rules {
            record: &GENERATE,
            prompt: "token_ids",
            limits: &[],
            json: "",
            wrong: Some("invalid generate request: "),
            missing: "invalid generate request: must have non-empty token_ids field",
        },
        Api::SglangGenerate => Rules {
            record: &SGLANG,
            prompt: "input_ids",
            limits: &[],
            json: "invalid generate request: ",
            wrong: Some("invalid generate request: "),
            missing: "invalid generate request: input_ids must be provided",
        },
        Api::CountTokens | Api::Raw => return None,
    })
}

/// Reads a body of an API. Those whose body is not read get an empty result.
pub(super) fn read(api: Api, body: &[u8]) -> Result<Parsed, ParseError> {
    let Some(rules) = rules(api) else { return Ok(Parsed::unread(api)) };
    let mut scanner = Scanner::new(body);
    let mut found = Found::new(&rules, body);
    let json = |error| ParseError::Json { before: rules.json, error };
    let wanted = |value: &'static str| JsonError::Type {
        value: Cow::Borrowed(value),
        into: match api {
            Api::SglangGenerate => "value of type sglanghttp.sgLangGenerateWire".into(),
            _ => "value of type map[string]interface {}".into(),
        },
    };
    let kind = scanner.kind();
    match kind {
        Some(Kind::Object) => scanner.fields(|scanner, key| found.field(scanner, &key)),
        _ => scanner.value().map(|_| ()),
    }
    .and_then(|()| scanner.finish())
    .map_err(json)?;
    match kind {
        // Go decodes null into anything, and leaves it empty.
        None | Some(Kind::Object | Kind::Null) => {}
        Some(kind) => return Err(json(wanted(kind.name()))),
    }
    // SGLang's body is not decoded into a map, so that numbers nobody asks for stay unread.
    if let Some(error) = scanner.overflow().filter(|_| api != Api::SglangGenerate) {
        return Err(json(error));
    }
    found.into_parsed(api)
}

/// What the pass over a body found.
struct Found<'a> {
    rules: &'a Rules,
    body: &'a [u8],
    check: Check,
    model: Option<Value>,
    stream: bool,
    limits: [Option<f64>; 2],
    prompt: Option<PromptSpan>,
    /// Why the prompt counts as missing, where that has a text of its own.
    prompt_fault: Option<Cow<'static, str>>,
    /// `system` or `instructions`.
    system: Option<Value>,
    tools: Option<Range<usize>>,
    options: Options,
    salt: Option<Text>,
    salt_fault: bool,
    /// SGLang's `text`.
    text: Option<PromptSpan>,
}

impl<'a> Found<'a> {
    fn new(rules: &'a Rules, body: &'a [u8]) -> Self {
        Self {
            rules,
            body,
            check: Check::default(),
            model: None,
            stream: false,
            limits: [None; 2],
            prompt: None,
            prompt_fault: None,
            system: None,
            tools: None,
            options: Options::Missing,
            salt: None,
            salt_fault: false,
            text: None,
        }
    }

    /// Takes a field of the body in; the cursor is at its value.
    fn field(&mut self, scanner: &mut Scanner<'_>, key: &Text) -> Result<(), JsonError> {
        let name = scanner.unescaped(key);
        // Fields of the map.
        if &*name == b"model" {
            self.model = Some(scanner.value()?);
            return Ok(());
        }
        if let Some(place) = self.rules.limits.iter().position(|limit| limit.as_bytes() == &*name) {
            let value = scanner.value()?;
            let number = (value.kind == Kind::Number).then(|| float(scanner.bytes(&value.span)));
            if let Some(slot) = self.limits.get_mut(place) {
                *slot = number.flatten();
            }
            return Ok(());
        }
        let sglang = self.rules.record.go == SGLANG.go;
        if &*name == b"stream" && !sglang {
            self.stream = scanner.value()?.kind == Kind::True;
            return Ok(());
        }
        if &*name == b"stream_options" && self.reports_usage_on_demand() {
            self.options = Options::read(scanner)?;
            return Ok(());
        }
        // vLLM's generate has its limit in a map inside the map.
        if &*name == b"sampling_params" && !sglang && self.rules.prompt == "token_ids" {
            return self.sampling(scanner, "max_tokens");
        }
        // Fields of the struct.
        let Some(field) = lookup(self.rules.record, &name) else {
            return scanner.value().map(|_| ());
        };
        match field.name {
            "sampling_params" => self.sampling(scanner, "max_new_tokens"),
            "text" => {
                self.text = match prompt(scanner)? {
                    Prompt::Filled(prompt) => Some(prompt),
                    Prompt::Empty | Prompt::Wrong => None,
                };
                Ok(())
            }
            "stream" => {
                let value = self.check.check(scanner, field, self.rules.record)?.value;
                if value.kind != Kind::Null {
                    self.stream = value.kind == Kind::True;
                }
                Ok(())
            }
            _ => self.known(scanner, field),
        }
    }

    /// Takes in a field that is checked before it is kept.
    fn known(&mut self, scanner: &mut Scanner<'_>, field: &Field) -> Result<(), JsonError> {
        match field.want {
            Want::Prompt => {
                self.prompt = match prompt(scanner)? {
                    Prompt::Filled(prompt) => Some(prompt),
                    Prompt::Empty => None,
                    Prompt::Wrong => {
                        self.check.wrong("must be a string or an array");
                        None
                    }
                };
                return Ok(());
            }
            Want::Floats | Want::Integers => return self.tokens(scanner, field),
            _ => {}
        }
        let checked = self.check.check(scanner, field, self.rules.record)?;
        let Checked { value, elements } = checked;
        let some = value.kind != Kind::Null;
        match field.name {
            name if name == self.rules.prompt => {
                if !some && matches!(field.want, Want::Text) {
                    return Ok(());
                }
                let form = match value.kind {
                    Kind::Null => None,
                    Kind::String => Some(PromptForm::Text),
                    Kind::Array => Some(PromptForm::Messages),
                    _ => Some(PromptForm::Json),
                };
                // A list of messages has to have one; anything else only has to be there, but for
                // the text of an image.
                let empty = match field.want {
                    Want::Records(_) => elements == 0,
                    Want::Text => value.span.len() <= 2,
                    _ => false,
                };
                self.prompt = form
                    .filter(|_| !empty)
                    .map(|form| PromptSpan { form, span: value.span.clone() });
            }
            "system" | "instructions" => self.system = some.then_some(value),
            "tools" => self.tools = (some && value.span.len() > 2).then_some(value.span),
            // Null leaves a string of Go as it was.
            "cache_salt" if some => self.salt = text_of(self.body, &value),
            "extra_key" => {
                self.salt_fault = !matches!(value.kind, Kind::String | Kind::Null);
                self.salt = text_of(self.body, &value);
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads `token_ids` or `input_ids`.
    fn tokens(&mut self, scanner: &mut Scanner<'_>, field: &Field) -> Result<(), JsonError> {
        self.prompt = None;
        self.prompt_fault = None;
        let integers = matches!(field.want, Want::Integers);
        match scanner.kind() {
            Some(Kind::Array) => {}
            Some(Kind::Null) => return scanner.value().map(|_| ()),
            _ => {
                let value = scanner.value()?;
                if integers {
                    self.prompt_fault = Some(Cow::Borrowed(NO_INTEGERS));
                } else {
                    let owner = self.rules.record.go;
                    self.check.mismatch(value.kind.name().into(), owner, "token_ids", "[]float64");
                }
                return Ok(());
            }
        }
        let start = scanner.at();
        let mut count: usize = 0;
        let mut fault = None;
        scanner.items(|scanner| {
            scanner.run_of_digits(|_| {
                count += 1;
                true
            });
            if scanner.digits().is_none() {
                let value = scanner.value()?;
                let raw = scanner.bytes(&value.span);
                let number = float(raw).filter(|_| value.kind == Kind::Number);
                match (value.kind, number) {
                    (Kind::Null, _) => {}
                    (_, Some(number)) if integers => {
                        let digits = raw.iter().all(u8::is_ascii_digit);
                        if !digits || number > f64::from(u32::MAX) {
                            fault = fault.take().or(Some(Cow::Borrowed(NO_INTEGERS)));
                        }
                    }
                    (_, Some(number)) => {
                        if !is_token(number) {
                            let number = go_float(number);
                            let text = format!("token_ids[{count}]: invalid value {number}");
                            fault = fault.take().or(Some(text.into()));
                        }
                    }
                    _ if integers => fault = fault.take().or(Some(Cow::Borrowed(NO_INTEGERS))),
                    _ => {
                        let owner = self.rules.record.go;
                        let kind = value.kind.name().into();
                        self.check.mismatch(kind, owner, "token_ids", "float64");
                    }
                }
            }
            count += 1;
            Ok(())
        })?;
        if count == 0 && integers {
            fault = Some(Cow::Borrowed("input_ids cannot be empty"));
        }
        self.prompt_fault = fault;
        self.prompt =
            (count > 0).then(|| PromptSpan { form: PromptForm::Tokens, span: start..scanner.at() });
        Ok(())
    }

    /// Reads the limit on output out of `sampling_params`.
    fn sampling(&mut self, scanner: &mut Scanner<'_>, name: &str) -> Result<(), JsonError> {
        self.limits = [None; 2];
        if scanner.kind() != Some(Kind::Object) {
            return scanner.value().map(|_| ());
        }
        scanner.fields(|scanner, key| {
            let known = &*scanner.unescaped(&key) == name.as_bytes();
            let value = scanner.value()?;
            if known {
                let number = float(scanner.bytes(&value.span));
                self.limits = [number.filter(|_| value.kind == Kind::Number), None];
            }
            Ok(())
        })
    }

    /// Is this an API whose streams report their tokens if they are asked to?
    fn reports_usage_on_demand(&self) -> bool {
        self.rules.record.go == COMPLETIONS.go || self.rules.record.go == CHAT.go
    }

    /// What has to change so that a stream reports its tokens.
    fn usage_edit(&self) -> Option<Edit> {
        if !self.stream || !self.reports_usage_on_demand() {
            return None;
        }
        let place = |at: usize| at..at;
        let (span, text) = match &self.options {
            Options::Missing => {
                // A body with a prompt has keys that may follow.
                let brace = memchr::memchr(b'{', self.body)?;
                (place(brace + 1), r#""stream_options":{"include_usage":true},"#)
            }
            Options::Null(span) => (span.clone(), r#"{"include_usage":true}"#),
            Options::Empty(brace) => (place(brace + 1), r#""include_usage":true"#),
            Options::Without(brace) => (place(brace + 1), r#""include_usage":true,"#),
            Options::No(span) => (span.clone(), "true"),
            Options::Settled => return None,
        };
        Some(Edit { span, text })
    }

    fn into_parsed(self, api: Api) -> Result<Parsed, ParseError> {
        let missing = || ParseError::Field(self.rules.missing.into());
        if let Some(text) = &self.check.wrong {
            return Err(match self.rules.wrong {
                Some(before) => ParseError::Field(format!("{before}{text}").into()),
                None => missing(),
            });
        }
        let usage_edit = self.usage_edit();
        let prompt = self.prompt.or(self.text);
        if prompt.is_none() && self.prompt_fault.is_none() {
            return Err(missing());
        }
        if self.salt_fault {
            let text = "unsupported generate request: extra_key must be a string";
            return Err(ParseError::Field(text.into()));
        }
        if let Some(text) = &self.prompt_fault {
            return Err(ParseError::Field(format!("invalid generate request: {text}").into()));
        }
        let prompt = prompt.ok_or_else(missing)?;
        let scanner = Scanner::new(self.body);
        let string = |text: &Text| to_string(&scanner.unescaped(text));
        let mut spans = SmallVec::new();
        if let Some(system) = self.system {
            let form = match system.kind {
                Kind::String => PromptForm::Text,
                Kind::Array if api == Api::Messages => PromptForm::Blocks,
                _ => PromptForm::Json,
            };
            spans.push(PromptSpan { form, span: system.span });
        }
        spans.push(prompt);
        let model = self.model.as_ref().and_then(|value| text_of(self.body, value));
        let limit = self.limits.into_iter().flatten().find(|n| *n >= 0.0 && n.fract() == 0.0);
        Ok(Parsed {
            api,
            model: model.as_ref().map(string).unwrap_or_default(),
            model_span: self.model.map(|value| value.span),
            stream: self.stream,
            max_output_tokens: limit.map(|n| n as u64),
            cache_salt: self.salt.as_ref().map(string).filter(|salt| !salt.is_empty()),
            prompt: spans,
            tools: self.tools,
            usage_edit,
            multimodal: self.check.multimodal,
        })
    }
}

const NO_INTEGERS: &str = "input_ids must be an array of uint32 integers";

/// Is this float64 a token id?
pub(super) fn is_token(number: f64) -> bool {
    number >= 0.0 && number <= f64::from(u32::MAX) && number.fract() == 0.0
}

/// A float64 as Go's `%v` writes it.
fn go_float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..21).contains(&exponent) && (number.abs() < 1e6 || exponent < 6) {
        return number.to_string();
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// The string that a value is; `None` if it is none.
fn text_of(body: &[u8], value: &Value) -> Option<Text> {
    if value.kind != Kind::String {
        return None;
    }
    let span = value.span.start + 1..value.span.end.saturating_sub(1);
    let escaped = memchr::memchr(b'\\', body.get(span.clone())?).is_some();
    Some(Text { span, escaped })
}

/// What stands in a field for a prompt.
enum Prompt {
    Filled(PromptSpan),
    /// An empty string or list.
    Empty,
    /// Nothing that a prompt can be.
    Wrong,
}

/// Reads the prompt of a completion or the input of embeddings.
fn prompt(scanner: &mut Scanner<'_>) -> Result<Prompt, JsonError> {
    if scanner.kind() != Some(Kind::Array) {
        let Value { kind, span } = scanner.value()?;
        return Ok(match kind {
            Kind::String if span.len() > 2 => {
                Prompt::Filled(PromptSpan { form: PromptForm::Text, span })
            }
            Kind::String => Prompt::Empty,
            _ => Prompt::Wrong,
        });
    }
    let start = scanner.at();
    // The form of the first element, and whether another one has another.
    let mut first = None;
    let mut mixed = false;
    scanner.items(|scanner| {
        let form = match scanner.kind() {
            Some(Kind::String) => scanner.value().map(|_| Some(PromptForm::Texts))?,
            Some(Kind::Array) => list_of_tokens(scanner)?.then_some(PromptForm::TokenLists),
            _ => token(scanner)?.then_some(PromptForm::Tokens),
        };
        mixed |= *first.get_or_insert(form) != form;
        Ok(())
    })?;
    Ok(match first {
        None => Prompt::Empty,
        Some(Some(form)) if !mixed => {
            Prompt::Filled(PromptSpan { form, span: start..scanner.at() })
        }
        Some(_) => Prompt::Wrong,
    })
}

/// Reads a value, and those before it that are plain numbers; is it a token id?
fn token(scanner: &mut Scanner<'_>) -> Result<bool, JsonError> {
    scanner.run_of_digits(|_| true);
    if scanner.digits().is_some() {
        return Ok(true);
    }
    let value = scanner.value()?;
    let number = float(scanner.bytes(&value.span));
    Ok(value.kind == Kind::Number && number.is_some_and(is_token))
}

/// Reads an array; is it a list of token ids, not empty?
fn list_of_tokens(scanner: &mut Scanner<'_>) -> Result<bool, JsonError> {
    let mut all = true;
    let mut count = 0;
    scanner.items(|scanner| {
        all &= token(scanner)?;
        count += 1;
        Ok(())
    })?;
    Ok(all && count > 0)
}
