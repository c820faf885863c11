//! The shapes of Go's structs, and whether a value has one.

use std::borrow::Cow;

use smallvec::SmallVec;

use super::json::{JsonError, Kind, Scanner, Value};

/// A Go struct: its name in error texts, and its fields.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) go: &'static str,
    pub(super) fields: &'static [Field],
}

/// A field that Go decodes.
#[derive(Debug)]
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) want: Want,
}

const fn field(name: &'static str, want: Want) -> Field {
    Field { name, want }
}

/// What may stand in a field, besides `null`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Want {
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

static URL: Record = Record { go: "", fields: &[field("url", Want::Text)] };
static AUDIO: Record =
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

pub(super) static COMPLETIONS: Record = Record {
    go: "CompletionsRequest",
    fields: &[field("prompt", Want::Prompt), field("cache_salt", Want::Text)],
};
pub(super) static CHAT: Record = Record {
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
pub(super) static RESPONSES: Record = Record {
    go: "ResponsesRequest",
    fields: &[
        field("input", Want::Any),
        field("instructions", Want::Any),
        field("tools", Want::Any),
        field("cache_salt", Want::Text),
    ],
};
pub(super) static CONVERSATIONS: Record = Record {
    go: "ConversationsRequest",
    fields: &[
        field("items", Want::Records(&ITEM)),
        field("metadata", Want::Map("map[string]interface {}")),
        field("cache_salt", Want::Text),
    ],
};
pub(super) static EMBEDDINGS: Record = Record {
    go: "EmbeddingsRequest",
    fields: &[field("input", Want::Prompt), field("cache_salt", Want::Text)],
};
pub(super) static IMAGES: Record = Record {
    go: "ImagesGenerationsRequest",
    fields: &[
        field("prompt", Want::Text),
        field("n", Want::Integer),
        field("size", Want::Text),
        field("num_inference_steps", Want::Integer),
    ],
};
pub(super) static MESSAGES: Record = Record {
    go: "MessagesRequest",
    fields: &[
        field("messages", Want::Records(&ANTHROPIC_MESSAGE)),
        field("system", Want::Content(&ANTHROPIC_BLOCK)),
        field("tools", Want::Records(&ANTHROPIC_TOOL)),
        field("cache_salt", Want::Text),
    ],
};
pub(super) static GENERATE: Record = Record {
    go: "",
    fields: &[
        field("token_ids", Want::Floats),
        field("cache_salt", Want::Text),
        field("features", Want::Record(&FEATURES)),
    ],
};
pub(super) static SGLANG: Record = Record {
    go: "sgLangGenerateWire",
    fields: &[
        field("input_ids", Want::Integers),
        field("text", Want::Any),
        field("extra_key", Want::Any),
        field("sampling_params", Want::Any),
        field("stream", Want::Flag),
    ],
};

/// Finds a field as Go does: in any case, and with two characters that fold to ASCII letters.
pub(super) fn lookup(record: &'static Record, name: &[u8]) -> Option<&'static Field> {
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

/// Checks values against what Go's structs hold.
#[derive(Debug, Default)]
pub(super) struct Check {
    /// The first complaint, as Go words it.
    pub(super) wrong: Option<Cow<'static, str>>,
    /// Was there a block with a picture, a video or sound?
    pub(super) multimodal: bool,
    /// Fields around the one that is checked.
    path: SmallVec<[&'static str; 4]>,
    /// Contents inside contents.
    contents: u8,
}

/// A value that was checked, and how many elements it has if it is an array.
pub(super) struct Checked {
    pub(super) value: Value,
    pub(super) elements: usize,
}

/// Contents inside contents that are looked into; Go has no limit, but a message has two at most (a
/// tool's result).
const MAX_CONTENTS: u8 = 4;

impl Check {
    pub(super) fn wrong(&mut self, text: impl Into<Cow<'static, str>>) {
        if self.wrong.is_none() {
            self.wrong = Some(text.into());
        }
    }

    pub(super) fn mismatch(
        &mut self,
        value: Cow<'static, str>,
        owner: &str,
        name: &str,
        go_type: &str,
    ) {
        if self.wrong.is_none() {
            let path: String = self.path.iter().flat_map(|name| [name, "."]).collect();
            let into = format!("struct field {owner}.{path}{name} of type {go_type}").into();
            self.wrong(JsonError::Type { value, into }.to_string());
        }
    }

    /// Reads the value at the cursor and checks it.
    pub(super) fn check(
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
