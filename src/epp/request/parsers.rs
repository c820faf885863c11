//! Path → API, by the parsers of the configuration.

use std::borrow::Cow;

use super::{Api, Parsed, fields, json::JsonError};
use crate::epp::ext_proc::headers::HeaderList;

/// A parser: a family of APIs, by the name of its plugin type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParserKind {
    /// `openai-parser`.
    OpenAi,
    /// `anthropic-parser`.
    Anthropic,
    /// `vllmhttp-parser`.
    VllmHttp,
    /// `sglanghttp-parser`.
    SglangHttp,
    /// `passthrough-parser`: takes every path that no parser before it claims.
    Passthrough,
}

/// The parsers of a configuration that names none.
pub const DEFAULT_PARSERS: [ParserKind; 4] =
    [ParserKind::OpenAi, ParserKind::Anthropic, ParserKind::VllmHttp, ParserKind::Passthrough];

impl ParserKind {
    /// All parsers.
    pub const ALL: [Self; 5] =
        [Self::OpenAi, Self::Anthropic, Self::VllmHttp, Self::SglangHttp, Self::Passthrough];

    /// The parser of a plugin type; `None` = the type is no parser, or one that is not built.
    #[must_use]
    pub fn of_type(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_name() == name)
    }

    /// The name of the plugin type.
    #[must_use]
    pub fn type_name(self) -> &'static str {
        match self {
            Self::OpenAi => "openai-parser",
            Self::Anthropic => "anthropic-parser",
            Self::VllmHttp => "vllmhttp-parser",
            Self::SglangHttp => "sglanghttp-parser",
            Self::Passthrough => "passthrough-parser",
        }
    }

    /// The ends of paths that it claims, without slashes around; none = every path.
    fn claims(self) -> &'static [(&'static str, Api)] {
        match self {
            Self::OpenAi => &[
                ("chat/completions", Api::ChatCompletions),
                ("completions", Api::Completions),
                ("embeddings", Api::Embeddings),
                ("responses", Api::Responses),
                ("conversations", Api::Conversations),
                ("chat/completions/render", Api::ChatCompletions),
                ("completions/render", Api::Completions),
                ("images/generations", Api::Images),
            ],
            Self::Anthropic => {
                &[("messages", Api::Messages), ("messages/count_tokens", Api::CountTokens)]
            }
            Self::VllmHttp => &[("inference/v1/generate", Api::Generate)],
            Self::SglangHttp => &[("generate", Api::SglangGenerate)],
            Self::Passthrough => &[],
        }
    }
}

/// Why a request has no answer but 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// No parser claims the path, and none takes the rest.
    #[error("no parser registered matching path suffix for: {0}")]
    NoParser(String),
    /// The parser that claims the path does not serve it.
    #[error("unsupported path: {0}")]
    UnsupportedPath(String),
    /// The same, said by the Anthropic parser.
    #[error("unsupported API endpoint: {0}")]
    UnsupportedEndpoint(String),
    /// The body is not JSON, or no object.
    #[error("{before}{error}")]
    Json {
        /// What the parser says first.
        before: &'static str,
        /// What is wrong.
        error: JsonError,
    },
    /// A field is missing, or is not what it has to be.
    #[error("{0}")]
    Field(Cow<'static, str>),
}

/// Where a request goes to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Who reads it.
    pub parser: ParserKind,
    /// As what.
    pub api: Api,
}

/// The parsers of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsers {
    claiming: Vec<ParserKind>,
    fallback: bool,
}

impl Default for Parsers {
    /// [`DEFAULT_PARSERS`].
    fn default() -> Self {
        Self::new(&DEFAULT_PARSERS)
    }
}

impl Parsers {
    /// These parsers. One that is named again, and all after the passthrough parser, are without
    /// effect, as in Go.
    #[must_use]
    pub fn new(kinds: &[ParserKind]) -> Self {
        let before = kinds.iter().position(|&kind| kind == ParserKind::Passthrough);
        let mut claiming = Vec::new();
        for &kind in &kinds[..before.unwrap_or(kinds.len())] {
            if !claiming.contains(&kind) {
                claiming.push(kind);
            }
        }
        Self { claiming, fallback: before.is_some() }
    }

    /// The parser and API of a path; a query is ignored. The longest end that a parser claims wins,
    /// whatever the order of the parsers. An end begins at a slash: `/v1/mycompletions` is not the
    /// OpenAI parser's, although Go takes it to be.
    ///
    /// # Errors
    ///
    /// Nobody claims it, or who claims it does not serve it: the Anthropic and vLLM parsers take no
    /// slash at the end, SGLang's takes no path but `/generate`.
    pub fn route(&self, path: &str) -> Result<Route, ParseError> {
        let path = without_query(path);
        let trimmed = path.trim();
        let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
        let longest = self
            .claiming
            .iter()
            .flat_map(|kind| kind.claims().iter().map(|claim| (*kind, claim)))
            .filter(|(_, (end, _))| ends_with(trimmed, end))
            .max_by_key(|(_, (end, _))| end.len());
        let Some((parser, &(end, api))) = longest else {
            return match self.fallback {
                true => Ok(Route { parser: ParserKind::Passthrough, api: Api::Raw }),
                false => Err(ParseError::NoParser(path.to_owned())),
            };
        };
        match parser {
            ParserKind::Anthropic if !path.ends_with(end) => {
                Err(ParseError::UnsupportedEndpoint(path.to_owned()))
            }
            ParserKind::VllmHttp if !path.ends_with(end) => {
                Err(ParseError::UnsupportedPath(path.to_owned()))
            }
            ParserKind::SglangHttp if trimmed.strip_prefix('/').unwrap_or(trimmed) != end => {
                Err(ParseError::UnsupportedPath(trimmed.to_owned()))
            }
            _ => Ok(Route { parser, api }),
        }
    }

    /// Reads a request: its path out of the headers, and its body as the path says. A missing model
    /// is not an error here (the director may know a rewrite), a missing prompt is.
    ///
    /// # Errors
    ///
    /// What Go answers with 400: no parser for the path, a body that is not JSON, a missing or
    /// wrong field. Missing prompts are reported before missing models, as in Go.
    pub fn parse(&self, headers: &HeaderList, body: &[u8]) -> Result<Parsed, ParseError> {
        let route = self.route(request_path(headers))?;
        fields::read(route.api, body)
    }
}

impl Route {
    /// Reads a body as the route says.
    ///
    /// # Errors
    ///
    /// As [`Parsers::parse`], but for the path.
    pub fn read(self, body: &[u8]) -> Result<Parsed, ParseError> {
        fields::read(self.api, body)
    }
}

/// The path of a request, without its query: `:path`, else `x-original-path`, else
/// `x-forwarded-path`, else `/v1/completions`; an empty header counts as missing.
#[must_use]
pub fn request_path(headers: &HeaderList) -> &str {
    let names = [":path", "x-original-path", "x-forwarded-path"];
    let path = names.iter().find_map(|name| headers.get(name).filter(|path| !path.is_empty()));
    without_query(path.unwrap_or("/v1/completions"))
}

fn without_query(path: &str) -> &str {
    path.split_once('?').map_or(path, |(path, _)| path)
}

/// Does a path end with these segments?
fn ends_with(path: &str, end: &str) -> bool {
    path.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('/'))
}
