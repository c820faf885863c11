//! The body of an OpenAI chat completion → messages, tools, options.
//!
//! # Model
//!
//! A [`Chat`] holds what reaches the template when vLLM serves the body, in vLLM's order of keys:
//! parts of content become strings or parts as the template wants, arguments of tool calls become
//! objects, tools get the keys that their schema has, messages lose keys that are null. Numbers,
//! strings and orders that the body has are kept.
//!
//! # Failure
//!
//! Bodies that the engine would refuse are [`TokenizeError::Invalid`]: among them those that bring a
//! `chat_template` of their own, which engines do not trust unless told to. Pictures and such are
//! [`TokenizeError::Multimodal`].

use std::collections::BTreeMap;

use minijinja::{Value, value::ValueKind};
use serde::{Deserialize, de::IgnoredAny};

use super::{TokenizeError, template::ContentFormat};

/// What of the body matters to the prompt.
#[derive(Debug, Deserialize)]
struct Body {
    messages: Vec<Value>,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    #[serde(default)]
    documents: Option<Vec<Value>>,
    #[serde(default)]
    chat_template: Option<IgnoredAny>,
    #[serde(default)]
    chat_template_kwargs: Option<Value>,
    #[serde(default)]
    reasoning_effort: Option<Value>,
    #[serde(default = "yes")]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    add_special_tokens: bool,
    #[serde(default)]
    truncate_prompt_tokens: Option<i64>,
    #[serde(default)]
    truncation_side: Option<Side>,
}

fn yes() -> bool {
    true
}

/// Which tokens are cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Left,
    Right,
}

/// Names under which messages carry what the model thought.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// A line that one client puts before its system prompt, other in each request. vLLM drops it.
const ATTRIBUTION: &str = "x-anthropic-billing-header";
/// Marks where the last message ends, so that the template's text after it can be cut off.
const FINAL_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A parsed chat.
#[derive(Debug)]
pub struct Chat {
    body: Body,
    bytes: usize,
}

impl Chat {
    /// Parses a body.
    ///
    /// # Errors
    ///
    /// [`TokenizeError::Invalid`]: no JSON, wrong types, or what engines refuse.
    pub fn parse(body: &[u8]) -> Result<Self, TokenizeError> {
        let bytes = body.len();
        let body: Body =
            serde_json::from_slice(body).map_err(|error| invalid(format!("chat: {error}")))?;
        if body.messages.is_empty() {
            return Err(invalid("messages: there is none"));
        }
        if body.tools.as_ref().is_some_and(Vec::is_empty) {
            return Err(invalid("tools: an empty list is refused"));
        }
        if body.chat_template.is_some() {
            return Err(invalid("chat_template: templates of requests are not trusted"));
        }
        if body.continue_final_message && body.add_generation_prompt {
            let what = "continue_final_message: not with add_generation_prompt, which is on unless \
                        it is false";
            return Err(invalid(what));
        }
        if let Some(kwargs) = &body.chat_template_kwargs {
            if !matches!(kwargs.kind(), ValueKind::Map | ValueKind::None) {
                return Err(invalid("chat_template_kwargs: not an object"));
            }
            for name in ["chat_template", "tokenize", "messages", "conversation"] {
                let value = get(kwargs, name);
                if !value.is_none() && !value.is_undefined() {
                    return Err(invalid(format!("chat_template_kwargs.{name}: not allowed")));
                }
            }
        }
        Ok(Self { body, bytes })
    }

    /// Bytes of the body.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there are tools, for which some models have a template of its own.
    #[must_use]
    pub fn has_tools(&self) -> bool {
        self.body.tools.is_some()
    }

    /// Whether the tokenizer shall put its special tokens around what the template made.
    #[must_use]
    pub fn add_special_tokens(&self) -> bool {
        self.body.add_special_tokens
    }

    /// Cuts tokens off as the body asks. −1, which stands for the engine's limit, cuts nothing.
    pub fn truncate(&self, ids: &mut Vec<u32>) {
        let Some(Ok(most)) = self.body.truncate_prompt_tokens.map(usize::try_from) else { return };
        match self.body.truncation_side {
            Some(Side::Right) => ids.truncate(most),
            _ => drop(ids.drain(..ids.len().saturating_sub(most))),
        }
    }

    /// The variables of the template, and the text of the message that is to be continued.
    /// `special` are the tokenizer's special tokens by name; `source` is the template's text.
    ///
    /// # Errors
    ///
    /// [`TokenizeError::Invalid`] for messages and tools that are none, [`TokenizeError::Multimodal`].
    pub fn variables(
        &self,
        format: ContentFormat,
        special: &BTreeMap<String, String>,
        source: &str,
    ) -> Result<(Value, Option<String>), TokenizeError> {
        let body = &self.body;
        let mut messages = Vec::with_capacity(body.messages.len());
        for (index, raw) in body.messages.iter().enumerate() {
            let message = message(raw, format).map_err(|error| at("messages", index, error))?;
            messages.push(message);
        }
        let last = messages.last_mut().filter(|_| body.continue_final_message);
        let continued = last.map(|last| tag(last, source)).transpose()?;
        let tools = body.tools.as_deref().map(|tools| {
            let each = tools.iter().enumerate();
            each.map(|(index, raw)| tool(raw).map_err(|error| at("tools", index, error)))
                .collect::<Result<Vec<_>, _>>()
        });
        let tools = tools.transpose()?.map_or(Value::from(()), Value::from);

        let mut all = Pairs::default();
        for (name, token) in special {
            all.set(name, Value::from(token.as_str()));
        }
        all.set("tools", tools);
        all.set("documents", Value::from(()));
        for (name, value) in pairs(body.chat_template_kwargs.as_ref()) {
            all.set(name.as_str().unwrap_or_default(), value);
        }
        if let Some(effort) = body.reasoning_effort.as_ref().filter(|effort| !effort.is_none()) {
            let thinks = effort.as_str() != Some("none");
            all.set("reasoning_effort", effort.clone());
            if get(body.chat_template_kwargs.as_ref().unwrap_or(effort), "enable_thinking")
                .is_undefined()
            {
                all.set("enable_thinking", Value::from(thinks));
            }
        }
        if let Some(documents) = &body.documents {
            all.set("documents", Value::from(documents.clone()));
        }
        let messages: Vec<Value> = messages.into_iter().map(Pairs::value).collect();
        all.set("messages", Value::from(messages));
        all.set("add_generation_prompt", Value::from(body.add_generation_prompt));
        Ok((all.value(), continued))
    }
}

/// Cuts off what the template put behind the message that is to be continued.
///
/// # Errors
///
/// [`TokenizeError::Invalid`] if the template did not render the message as it is.
pub fn cut_behind(rendered: &mut String, continued: &str) -> Result<(), TokenizeError> {
    let at = rendered.rfind(FINAL_TAG.trim_end());
    let Some(at) = at.filter(|_| rendered.contains(continued.trim())) else {
        return Err(invalid("continue_final_message: the template does not show the last message"));
    };
    let whole = rendered.get(at..).is_some_and(|rest| rest.starts_with(FINAL_TAG));
    rendered.truncate(at);
    if !whole {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(())
}

/// Puts [`FINAL_TAG`] behind the text of a message, and returns that text.
fn tag(message: &mut Pairs, source: &str) -> Result<String, TokenizeError> {
    if !source.contains("content") {
        return Err(invalid("continue_final_message: the template does not take content"));
    }
    let content = message.get("content");
    if let Some(text) = content.as_ref().and_then(Value::as_str) {
        let text = text.to_owned();
        message.set("content", Value::from(format!("{text}{FINAL_TAG}")));
        return Ok(text);
    }
    let mut parts: Vec<Value> = content.iter().flat_map(items).collect();
    let last = parts.iter_mut().rev().find(|part| !get(part, "text").is_undefined());
    let Some(last) = last else {
        return Err(invalid("continue_final_message: the last message has no text"));
    };
    let text = get(last, "text").as_str().unwrap_or_default().to_owned();
    let mut tagged =
        Pairs(pairs(Some(last)).map(|(key, value)| (key.to_string(), value)).collect());
    tagged.set("text", Value::from(format!("{text}{FINAL_TAG}")));
    *last = tagged.value();
    message.set("content", Value::from(parts));
    Ok(text)
}

/// A message as the template sees it.
fn message(raw: &Value, format: ContentFormat) -> Result<Pairs, TokenizeError> {
    if raw.kind() != ValueKind::Map {
        return Err(invalid("not an object"));
    }
    let role = get(raw, "role");
    let Some(role) = role.as_str() else { return Err(invalid("role: not a string")) };
    let mut content = content(&get(raw, "content"), role, format)?;
    let mut message = Pairs::default();
    let mut rest = Pairs::default();
    match role {
        "assistant" => {
            let calls = get(raw, "tool_calls");
            if !calls.is_none() && !calls.is_undefined() {
                let calls = tool_calls(&calls)?;
                if !calls.is_empty() {
                    rest.set("tool_calls", Value::from(calls));
                }
            }
            let reasoning = ["reasoning", "reasoning_content"].map(|name| get(raw, name));
            let reasoning = reasoning.into_iter().find(|it| !it.is_none() && !it.is_undefined());
            if let Some(reasoning) = reasoning {
                if reasoning.as_str().is_none() {
                    return Err(invalid("reasoning: not a string"));
                }
                rest.set("reasoning", reasoning.clone());
                rest.set("reasoning_content", reasoning);
            }
        }
        "tool" => {
            rest.set("tool_call_id", get(raw, "tool_call_id"));
            if content.as_str().is_none()
                && items(&content).all(|part| get(&part, "type").as_str() == Some("text"))
            {
                let texts: Vec<String> =
                    items(&content).map(|part| get(&part, "text").to_string()).collect();
                content = Value::from(texts.join("\n"));
            }
        }
        _ => {}
    }
    for name in ["name", "task"] {
        let value = get(raw, name);
        if value.as_str().is_some() {
            rest.set(name, value);
        }
    }
    if role == "developer" {
        rest.set("tools", get(raw, "tools"));
    }
    // The last name of what was thought is the one that most templates read, `thinking` gpt-oss's.
    if let Some(thought) = REASONING.iter().find_map(|name| rest.get(name)) {
        message.set("thinking", thought);
    }
    message.set("role", Value::from(role));
    message.set("content", content);
    for (name, value) in rest.0 {
        if !value.is_none() && !value.is_undefined() {
            message.set(&name, value);
        }
    }
    Ok(message)
}

/// The content of a message: a string, or a list of parts.
fn content(raw: &Value, role: &str, format: ContentFormat) -> Result<Value, TokenizeError> {
    let parts = match raw.kind() {
        ValueKind::None | ValueKind::Undefined => Vec::new(),
        ValueKind::String => vec![raw.clone()],
        ValueKind::Seq => items(raw).collect(),
        _ => return Err(invalid("content: neither a string nor a list")),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let text = part_text(part).map_err(|error| at("content", index, error))?;
        let text = match text {
            Some(text) if role == "system" => without_attribution(text),
            text => text,
        };
        // Empty strings of a list vanish in vLLM, where they are false.
        texts.extend(text.filter(|text| format == ContentFormat::Parts || !text.is_empty()));
    }
    Ok(match format {
        ContentFormat::String => Value::from(texts.join("\n")),
        ContentFormat::Parts => {
            let part = |text| {
                Value::from_pairs([("type", Value::from("text")), ("text", Value::from(text))])
            };
            texts.into_iter().map(part).collect()
        }
    })
}

/// The text of a part of content; `None` for one that is left out.
fn part_text(part: &Value) -> Result<Option<String>, TokenizeError> {
    if let Some(text) = part.as_str() {
        return Ok(Some(text.to_owned()));
    }
    if part.kind() != ValueKind::Map {
        return Err(invalid("neither a string nor an object"));
    }
    let kind = get(part, "type");
    let key = match kind.as_str() {
        Some("text" | "input_text" | "output_text") => "text",
        Some("refusal") => "refusal",
        Some("thinking") => "thinking",
        Some(
            "image_url" | "input_image" | "image_embeds" | "image_pil" | "audio_url"
            | "input_audio" | "audio_embeds" | "video_url" | "prompt_embeds",
        ) => return Err(TokenizeError::Multimodal),
        Some(other) => return Err(invalid(format!("parts of type {other:?} are not known"))),
        None if ["image_url", "audio_url", "input_audio", "video_url", "image_embeds"]
            .iter()
            .any(|name| !get(part, name).is_undefined()) =>
        {
            return Err(TokenizeError::Multimodal);
        }
        None => return Err(invalid("type: not a string")),
    };
    let text = get(part, key);
    match text.kind() {
        ValueKind::String => Ok(Some(text.as_str().unwrap_or_default().to_owned())),
        ValueKind::None | ValueKind::Undefined => Ok(None),
        _ => Err(invalid(format!("{key}: not a string"))),
    }
}

fn without_attribution(text: String) -> Option<String> {
    if !text.starts_with(ATTRIBUTION) {
        return Some(text);
    }
    text.split_once('\n').map(|(_, rest)| rest.to_owned()).filter(|rest| !rest.is_empty())
}

/// Tool calls with their arguments as objects; arguments that are none become an empty one.
fn tool_calls(raw: &Value) -> Result<Vec<Value>, TokenizeError> {
    if raw.kind() != ValueKind::Seq {
        return Err(invalid("tool_calls: not a list"));
    }
    let each = items(raw).enumerate();
    each.map(|(index, raw)| tool_call(&raw).map_err(|error| at("tool_calls", index, error)))
        .collect()
}

fn tool_call(raw: &Value) -> Result<Value, TokenizeError> {
    let function = get(raw, "function");
    if function.kind() != ValueKind::Map {
        return Err(invalid("function: not an object"));
    }
    if get(&function, "name").as_str().is_none() {
        return Err(invalid("function.name: not a string"));
    }
    let given = get(&function, "arguments");
    let arguments = match given.as_str() {
        Some(text) => serde_json::from_str(text).unwrap_or_default(),
        None => given,
    };
    let is_object = arguments.kind() == ValueKind::Map;
    let arguments = if is_object { arguments } else { Value::from_pairs::<_, &str, Value>([]) };
    let mut ordered = ordered(&function, &["arguments", "name"]);
    ordered.set("arguments", arguments);
    let mut call = self::ordered(raw, &["id", "function", "type"]);
    call.set("function", ordered.value());
    Ok(call.value())
}

/// A tool with the keys of its schema, in the schema's order; others are dropped.
fn tool(raw: &Value) -> Result<Value, TokenizeError> {
    let function = get(raw, "function");
    if function.kind() != ValueKind::Map {
        return Err(invalid("function: not an object"));
    }
    if get(&function, "name").as_str().is_none() {
        return Err(invalid("function.name: not a string"));
    }
    let or_null = |value: Value| if value.is_undefined() { Value::from(()) } else { value };
    let mut described = Pairs::default();
    for name in ["name", "description", "parameters"] {
        described.set(name, or_null(get(&function, name)));
    }
    let defer = get(raw, "defer_loading");
    let known = |value: &Value| !value.is_none() && !value.is_undefined();
    let inner = [get(&function, "strict"), get(&function, "defer_loading")];
    let [strict, inner_defer] = inner;
    let inner_defer = if known(&inner_defer) { inner_defer } else { defer.clone() };
    for (name, value) in [("strict", strict), ("defer_loading", inner_defer)] {
        if known(&value) {
            described.set(name, value);
        }
    }
    let mut tool = Pairs::default();
    tool.set("type", Value::from("function"));
    tool.set("function", described.value());
    if known(&defer) {
        tool.set("defer_loading", defer);
    }
    Ok(tool.value())
}

/// The pairs of an object, the named ones first.
fn ordered(raw: &Value, first: &[&str]) -> Pairs {
    let mut ordered = Pairs::default();
    for name in first {
        let value = get(raw, name);
        if !value.is_undefined() {
            ordered.set(name, value);
        }
    }
    for (name, value) in pairs(Some(raw)) {
        ordered.set(name.as_str().unwrap_or_default(), value);
    }
    ordered
}

/// An object under construction, in order. A key may come again; its last value counts, at the place of
/// the first, as in Python. Requests bring any number of keys, so that nothing is looked for on the way.
#[derive(Debug, Default)]
struct Pairs(Vec<(String, Value)>);

impl Pairs {
    fn get(&self, name: &str) -> Option<Value> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }

    fn set(&mut self, name: &str, value: Value) {
        self.0.push((name.to_owned(), value));
    }

    fn value(self) -> Value {
        Value::from_pairs(self.0)
    }
}

/// A key of an object; undefined if it has none.
fn get(object: &Value, name: &str) -> Value {
    object.get_attr(name).unwrap_or_default()
}

fn items(list: &Value) -> impl Iterator<Item = Value> + use<> {
    list.try_iter().into_iter().flatten()
}

fn pairs(object: Option<&Value>) -> impl Iterator<Item = (Value, Value)> {
    object.into_iter().flat_map(|object| {
        let keys = if object.kind() == ValueKind::Map { Some(items(object)) } else { None };
        keys.into_iter().flatten().map(move |key| {
            let value = object.get_item(&key).unwrap_or_default();
            (key, value)
        })
    })
}

fn invalid(what: impl Into<String>) -> TokenizeError {
    TokenizeError::Invalid(what.into())
}

/// Says where an error is.
fn at(list: &str, index: usize, error: TokenizeError) -> TokenizeError {
    match error {
        TokenizeError::Invalid(what) if what.starts_with(char::is_lowercase) => {
            invalid(format!("{list}[{index}].{what}"))
        }
        error => error,
    }
}
