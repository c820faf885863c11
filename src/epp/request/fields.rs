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
    Api, ParseError, Parsed, PromptForm, PromptSpan,
    json::{JsonError, Kind, Scanner, Text, Value, float, to_string},
};

/// A Go struct: its name in error texts, and its fields.
#[derive(Debug)]
struct Record {
    go: &'static str,
    fields: &'static [Field],
}

/// A field that Go decodes.
#[derive(Debug)]
struct Field {
    name: &'static str,
    want: Want,
}

const fn field(name: &'static str, want: Want) -> Field {
    Field { name, want }
}

/// What may stand in a field, besides `null`.
#[derive(Clone, Copy, Debug)]
enum Want {
    Any,
    Text,
    Flag,
    Integer,
    List,
    /// An object; the text is its Go type.
    Map(&'static str),
    /// A string, or a list of strings or of token ids.
    Prompt,
    /// Token ids, by way of float64.
    Floats,
    /// Token ids, digits only.
    Integers,
    Record(&'static Record),
    Records(&'static Record),
    /// A string, or a list of blocks.
    Content(&'static Record),
}

const URL: Record = Record { go: "", fields: &[field("url", Want::Text)] };
const AUDIO: Record =
    Record { go: "", fields: &[field("data", Want::Text), field("format", Want::Text)] };
static CHAT_BLOCK: Record = Record {
    go: "ContentBlock",
    fields: &[
        field("type", Want::Text),
        field("text", Want::Text),
        field("image_url", Want::Record(&URL)),
        field("input_audio", Want::Record(&AUDIO)),
        field("video_url", Want::Record(&URL)),
    ],
};
static CHAT_MESSAGE: Record = Record {
    go: "Message",
    fields: &[
        field("role", Want::Text),
        field("content", Want::Content(&CHAT_BLOCK)),
        field("tool_calls", Want::List),
    ],
};
static SOURCE: Record = Record {
    go: "AnthropicImageSource",
    fields: &[
        field("type", Want::Text),
        field("media_type", Want::Text),
        field("data", Want::Text),
        field("url", Want::Text),
    ],
};
static ANTHROPIC_BLOCK: Record = Record {
    go: "AnthropicContentBlock",
    fields: &[
        field("type", Want::Text),
        field("text", Want::Text),
        field("source", Want::Record(&SOURCE)),
        field("id", Want::Text),
        field("name", Want::Text),
        field("tool_use_id", Want::Text),
        field("content", Want::Content(&ANTHROPIC_BLOCK)),
        field("thinking", Want::Text),
    ],
};
static ANTHROPIC_MESSAGE: Record = Record {
    go: "AnthropicMessage",
    fields: &[field("role", Want::Text), field("content", Want::Content(&ANTHROPIC_BLOCK))],
};
static ANTHROPIC_TOOL: Record = Record {
    go: "AnthropicTool",
    fields: &[
        field("name", Want::Text),
        field("description", Want::Text),
        field("strict", Want::Flag),
        field("defer_loading", Want::Flag),
    ],
};
static ITEM: Record = Record {
    go: "ConversationItem",
    fields: &[field("type", Want::Text), field("role", Want::Text)],
};
static FEATURES: Record = Record {
    go: "",
    fields: &[
        field("mm_hashes", Want::Map("map[string][]string")),
        field("mm_placeholders", Want::Map("map[string][]requesthandling.wirePlaceholder")),
    ],
};

static COMPLETIONS: Record = Record {
    go: "CompletionsRequest",
    fields: &[field("prompt", Want::Prompt), field("cache_salt", Want::Text)],
};
static CHAT: Record = Record {
    go: "ChatCompletionsRequest",
    fields: &[
        field("messages", Want::Records(&CHAT_MESSAGE)),
        field("tools", Want::List),
        field("documents", Want::List),
        field("chat_template", Want::Text),
        field("return_assistant_tokens_mask", Want::Flag),
        field("continue_final_message", Want::Flag),
        field("add_generation_prompt", Want::Flag),
        field("chat_template_kwargs", Want::Map("map[string]interface {}")),
        field("cache_salt", Want::Text),
    ],
};
static RESPONSES: Record = Record {
    go: "ResponsesRequest",
    fields: &[
        field("input", Want::Any),
        field("instructions", Want::Any),
        field("tools", Want::Any),
        field("cache_salt", Want::Text),
    ],
};
static CONVERSATIONS: Record = Record {
    go: "ConversationsRequest",
    fields: &[
        field("items", Want::Records(&ITEM)),
        field("metadata", Want::Map("map[string]interface {}")),
        field("cache_salt", Want::Text),
    ],
};
static EMBEDDINGS: Record = Record {
    go: "EmbeddingsRequest",
    fields: &[field("input", Want::Prompt), field("cache_salt", Want::Text)],
};
static IMAGES: Record = Record {
    go: "ImagesGenerationsRequest",
    fields: &[
        field("prompt", Want::Text),
        field("n", Want::Integer),
        field("size", Want::Text),
        field("num_inference_steps", Want::Integer),
    ],
};
static MESSAGES: Record = Record {
    go: "MessagesRequest",
    fields: &[
        field("messages", Want::Records(&ANTHROPIC_MESSAGE)),
        field("system", Want::Content(&ANTHROPIC_BLOCK)),
        field("tools", Want::Records(&ANTHROPIC_TOOL)),
        field("cache_salt", Want::Text),
    ],
};
static GENERATE: Record = Record {
    go: "",
    fields: &[
        field("token_ids", Want::Floats),
        field("cache_salt", Want::Text),
        field("features", Want::Record(&FEATURES)),
    ],
};
static SGLANG: Record = Record {
    go: "sgLangGenerateWire",
    fields: &[
        field("input_ids", Want::Integers),
        field("text", Want::Any),
        field("extra_key", Want::Any),
        field("sampling_params", Want::Any),
        field("stream", Want::Flag),
    ],
};

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

    fn into_parsed(self, api: Api) -> Result<Parsed, ParseError> {
        let missing = || ParseError::Field(self.rules.missing.into());
        if let Some(text) = &self.check.wrong {
            return Err(match self.rules.wrong {
                Some(before) => ParseError::Field(format!("{before}{text}").into()),
                None => missing(),
            });
        }
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

/// Finds a field as Go does: in any case, and with two characters that fold to ASCII letters.
fn lookup(record: &'static Record, name: &[u8]) -> Option<&'static Field> {
    if let Some(field) = record.fields.iter().find(|field| field.name.as_bytes() == name) {
        return Some(field);
    }
    if name.is_ascii() {
        let name = std::str::from_utf8(name).ok()?;
        return record.fields.iter().find(|field| field.name.eq_ignore_ascii_case(name));
    }
    let folded = std::str::from_utf8(name).ok()?.replace('\u{17f}', "s").replace('\u{212a}', "k");
    record.fields.iter().find(|field| field.name.eq_ignore_ascii_case(&folded))
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

/// Checks values against what Go's structs hold.
#[derive(Debug, Default)]
struct Check {
    /// The first complaint, as Go words it.
    wrong: Option<Cow<'static, str>>,
    /// Was there a block with a picture, a video or sound?
    multimodal: bool,
    /// Fields around the one that is checked.
    path: SmallVec<[&'static str; 4]>,
    /// Contents inside contents.
    contents: u8,
}

/// A value that was checked, and how many elements it has if it is an array.
struct Checked {
    value: Value,
    elements: usize,
}

/// Contents inside contents that are looked into; Go has no limit, but a message has two at most (a
/// tool's result).
const MAX_CONTENTS: u8 = 4;

impl Check {
    fn wrong(&mut self, text: impl Into<Cow<'static, str>>) {
        if self.wrong.is_none() {
            self.wrong = Some(text.into());
        }
    }

    fn mismatch(&mut self, value: Cow<'static, str>, owner: &str, name: &str, go_type: &str) {
        if self.wrong.is_none() {
            let path: String = self.path.iter().flat_map(|name| [name, "."]).collect();
            let into = format!("struct field {owner}.{path}{name} of type {go_type}").into();
            self.wrong(JsonError::Type { value, into }.to_string());
        }
    }

    /// Reads the value at the cursor and checks it.
    fn check(
        &mut self,
        scanner: &mut Scanner<'_>,
        field: &Field,
        owner: &Record,
    ) -> Result<Checked, JsonError> {
        let mut elements = 0;
        let kind = scanner.kind();
        let start = scanner.at();
        let go_type = match (field.want, kind) {
            (Want::Content(block), _) => return self.content(scanner, block),
            (Want::Record(record), Some(Kind::Object)) => {
                self.path.push(field.name);
                self.record(scanner, record)?;
                self.path.pop();
                return Ok(Checked {
                    value: Value { kind: Kind::Object, span: start..scanner.at() },
                    elements,
                });
            }
            (Want::Records(record), Some(Kind::Array)) => {
                scanner.items(|scanner| {
                    elements += 1;
                    self.element(scanner, record, field, owner)
                })?;
                return Ok(Checked {
                    value: Value { kind: Kind::Array, span: start..scanner.at() },
                    elements,
                });
            }
            (Want::Text, _) => "string",
            (Want::Flag, _) => "bool",
            (Want::List, _) => "[]interface {}",
            (Want::Integer, _) => "int64",
            (Want::Map(go_type), _) => go_type,
            (Want::Record(record), _) => match record.go {
                "" => FEATURES_TYPE,
                go => go,
            },
            (Want::Records(record), _) => {
                let value = scanner.value()?;
                if value.kind != Kind::Null {
                    let go_type = format!("[]requesthandling.{}", record.go);
                    self.mismatch(value.kind.name().into(), owner.go, field.name, &go_type);
                }
                return Ok(Checked { value, elements });
            }
            (Want::Any | Want::Prompt | Want::Floats | Want::Integers, _) => {
                return Ok(Checked { value: scanner.value()?, elements });
            }
        };
        let value = scanner.value()?;
        let fits = match (field.want, value.kind) {
            (_, Kind::Null)
            | (Want::Text, Kind::String)
            | (Want::Flag, Kind::True | Kind::False)
            | (Want::List, Kind::Array)
            | (Want::Map(_), Kind::Object) => true,
            (Want::Integer, Kind::Number) => {
                let digits = std::str::from_utf8(scanner.bytes(&value.span));
                digits.is_ok_and(|digits| digits.parse::<i64>().is_ok())
            }
            _ => false,
        };
        if !fits {
            self.mismatch(value.kind.name().into(), owner.go, field.name, go_type);
        }
        Ok(Checked { value, elements })
    }

    fn element(
        &mut self,
        scanner: &mut Scanner<'_>,
        record: &'static Record,
        field: &Field,
        owner: &Record,
    ) -> Result<(), JsonError> {
        if scanner.kind() == Some(Kind::Object) {
            self.path.push(field.name);
            self.record(scanner, record)?;
            self.path.pop();
            return Ok(());
        }
        let value = scanner.value()?;
        if value.kind != Kind::Null {
            let go_type = format!("requesthandling.{}", record.go);
            self.mismatch(value.kind.name().into(), owner.go, field.name, &go_type);
        }
        Ok(())
    }

    /// Checks the fields of the object at the cursor.
    fn record(
        &mut self,
        scanner: &mut Scanner<'_>,
        record: &'static Record,
    ) -> Result<(), JsonError> {
        scanner.fields(|scanner, key| {
            let Some(field) = lookup(record, &scanner.unescaped(&key)) else {
                return scanner.value().map(|_| ());
            };
            let Checked { value, .. } = self.check(scanner, field, record)?;
            if self.contents > 0 && field.name == "type" && value.kind == Kind::String {
                self.multimodal |= is_media(scanner.bytes(&value.span));
            }
            Ok(())
        })
    }

    /// Checks a content: a string, a list of blocks, or null.
    fn content(
        &mut self,
        scanner: &mut Scanner<'_>,
        block: &'static Record,
    ) -> Result<Checked, JsonError> {
        let kind = scanner.kind();
        let start = scanner.at();
        if kind != Some(Kind::Array) || self.contents == MAX_CONTENTS {
            let value = scanner.value()?;
            if !matches!(value.kind, Kind::String | Kind::Null | Kind::Array) {
                self.wrong = Some(Cow::Borrowed(NO_CONTENT));
            }
            return Ok(Checked { value, elements: 0 });
        }
        let before = self.wrong.take();
        self.contents += 1;
        let mut elements = 0;
        scanner.items(|scanner| {
            elements += 1;
            if scanner.kind() == Some(Kind::Object) {
                return self.record(scanner, block);
            }
            if scanner.value()?.kind != Kind::Null {
                self.wrong(NO_CONTENT);
            }
            Ok(())
        })?;
        self.contents -= 1;
        // Whatever is wrong inside, this is what Go says of it, and before all else.
        self.wrong = self.wrong.take().map(|_| Cow::Borrowed(NO_CONTENT)).or(before);
        Ok(Checked { value: Value { kind: Kind::Array, span: start..scanner.at() }, elements })
    }
}

const NO_CONTENT: &str = "anthropic content: must be a string or an array of content blocks";
const FEATURES_TYPE: &str = r#"struct { MMHashes map[string][]string "json:\"mm_hashes\""; MMPlaceholders map[string][]requesthandling.wirePlaceholder "json:\"mm_placeholders\"" }"#;

/// Is this the type, quotes included, of a block that is no text?
fn is_media(quoted: &[u8]) -> bool {
    matches!(
        quoted,
        b"\"image_url\"" | b"\"video_url\"" | b"\"input_audio\"" | b"\"audio_url\"" | b"\"image\""
    )
}
