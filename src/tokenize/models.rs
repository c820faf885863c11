//! Directories of models → tokenizers by served name.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use prometheus::Registry;
use serde::Deserialize;

use super::{
    Input, MAX_PROMPT, Tokenize, TokenizeError, Tokenized,
    chat::{self, Chat},
    encode::{self, CacheConfig, Encoder},
    pool::{Pool, PoolConfig, SMALL_BYTES, Step},
    template::{self, Clock, Template},
};

/// Bytes of an input from which on to parse and to render it is no small job, however much of the prompt
/// is remembered.
const LARGE_INPUT: usize = 1 << 20;

/// Where the tokenizers are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalConfig {
    /// Served name → directory with `tokenizer.json`.
    pub models: BTreeMap<String, PathBuf>,
    /// A directory of model directories, as below `/mnt/models`; names are those of the directories,
    /// with one `org/` level at most. It may be a model's directory itself, named as it is, or a cache
    /// of the Hugging Face hub with its `models--org--name`.
    pub models_dir: Option<PathBuf>,
    /// Other served names of the above.
    pub aliases: BTreeMap<String, String>,
    /// The model that tokenizes names that nobody knows, such as those of LoRA adapters; if there is
    /// one model only, it is that one.
    pub default: Option<String>,
    /// What each model's encoder may keep.
    pub cache: CacheConfig,
    /// The threads.
    pub pool: PoolConfig,
}

/// Tokenizers of this process.
#[derive(Debug)]
pub struct Local {
    models: BTreeMap<String, Arc<Model>>,
    default: Option<Arc<Model>>,
    pool: Pool,
}

impl Local {
    /// Loads every tokenizer and template. Metrics are named `{prefix}_tokenize_…`.
    ///
    /// # Errors
    ///
    /// The first file that cannot be used, with the reason.
    pub fn load(config: &LocalConfig, registry: &Registry, prefix: &str) -> anyhow::Result<Self> {
        Self::load_with_clock(config, registry, prefix, &template::system_clock())
    }

    /// Like [`Local::load`]; templates that ask for the date ask `clock`.
    ///
    /// # Errors
    ///
    /// As [`Local::load`].
    pub fn load_with_clock(
        config: &LocalConfig,
        registry: &Registry,
        prefix: &str,
        clock: &Clock,
    ) -> anyhow::Result<Self> {
        let mut directories = config.models.clone();
        if let Some(parent) = &config.models_dir {
            for (name, directory) in find(parent)? {
                directories.entry(name).or_insert(directory);
            }
        }
        let mut models = BTreeMap::<String, Arc<Model>>::new();
        for (name, directory) in &directories {
            models.insert(name.clone(), Arc::new(Model::load(directory, config.cache, clock)?));
        }
        let encoders =
            models.iter().map(|(name, model)| (name.clone(), Arc::clone(&model.encoder)));
        encode::register(registry, prefix, encoders.collect())?;
        for (alias, name) in &config.aliases {
            let Some(model) = models.get(name).cloned() else {
                bail!("the alias {alias:?} stands for {name:?}, of which there is no tokenizer");
            };
            models.insert(alias.clone(), model);
        }
        let default = match &config.default {
            Some(name) => match models.get(name) {
                Some(model) => Some(Arc::clone(model)),
                None => bail!("there is no tokenizer of the default model {name:?}"),
            },
            None if directories.len() == 1 => models.values().next().cloned(),
            None => None,
        };
        Ok(Self { models, default, pool: Pool::start(config.pool, registry, prefix)? })
    }

    /// The served names, aliases among them, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.models.keys().map(String::as_str)
    }

    /// How many names there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.models.len()
    }

    /// Tokenizes on the thread of the caller, however long it takes.
    ///
    /// # Errors
    ///
    /// [`TokenizeError`], except those of the queue.
    pub fn tokenize_now(&self, model: &str, input: &Input) -> Result<Tokenized, TokenizeError> {
        let model = self.model(model)?;
        model.ids(&model.prompt(input.clone())?)
    }

    fn model(&self, name: &str) -> Result<&Arc<Model>, TokenizeError> {
        self.models.get(name).or(self.default.as_ref()).ok_or(TokenizeError::NotConfigured)
    }
}

#[tonic::async_trait]
impl Tokenize for Local {
    async fn tokenize(&self, model: &str, input: Input) -> Result<Tokenized, TokenizeError> {
        let model = Arc::clone(self.model(model)?);
        if input.bytes() > LARGE_INPUT {
            let whole = move || model.ids(&model.prompt(input)?);
            return self.pool.run_sized(usize::MAX, whole).await;
        }
        let first = move || {
            let prompt = model.prompt(input)?;
            Ok(if model.is_small(&prompt) {
                Step::Done(model.ids(&prompt)?)
            } else {
                Step::Large((model, prompt))
            })
        };
        self.pool.run_in_steps(first, |(model, prompt)| model.ids(&prompt)).await
    }
}

/// A tokenizer and the templates of its directory.
struct Model {
    encoder: Arc<Encoder>,
    /// Special tokens by name, such as `bos_token`.
    special: BTreeMap<String, String>,
    templates: BTreeMap<String, Template>,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let templates: Vec<_> = self.templates.keys().collect();
        f.debug_struct("Model").field("templates", &templates).finish_non_exhaustive()
    }
}

/// The name of the template that is used unless there is a reason for another.
const DEFAULT: &str = "default";
/// The name of the template for requests with tools.
const TOOL_USE: &str = "tool_use";

impl Model {
    fn load(directory: &Path, cache: CacheConfig, clock: &Clock) -> anyhow::Result<Self> {
        let file = directory.join("tokenizer.json");
        let text = fs::read_to_string(&file);
        let text = text.with_context(|| format!("reading {}", file.display()))?;
        let mut tokenizer: tokenizers::Tokenizer = text
            .parse()
            .map_err(|error| anyhow::anyhow!("{}: not a tokenizer: {error}", file.display()))?;
        // Engines set both by themselves, for each request.
        tokenizer.with_padding(None);
        let untruncated = tokenizer.with_truncation(None).map(|_| ());
        untruncated.map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;

        let file = directory.join("tokenizer_config.json");
        let settings: Settings = match read_if_there(&file)? {
            Some(text) => serde_json::from_str(&text)
                .with_context(|| format!("{}: not usable", file.display()))?,
            None => Settings::default(),
        };
        let mut templates = BTreeMap::new();
        for (name, file, source) in sources(directory, &file, settings.chat_template)? {
            let template = Template::with_clock(&source, Arc::clone(clock))
                .map_err(|reason| anyhow::anyhow!("{}: {reason}", file.display()))?;
            templates.insert(name, template);
        }
        let mut special = BTreeMap::new();
        for (name, token) in settings.others {
            let is_special = name.ends_with("_token") && !name.starts_with("add_");
            if let Some(token) = token_text(&token).filter(|_| is_special) {
                special.insert(name, token.to_owned());
            }
        }
        let encoder = Arc::new(Encoder::new(Arc::new(tokenizer), cache));
        Ok(Self { encoder, special, templates })
    }

    /// The text that the model sees.
    fn prompt(&self, input: Input) -> Result<Prompt, TokenizeError> {
        Ok(match input {
            Input::Text { text, .. } if text.len() > MAX_PROMPT => {
                let what = format!("the prompt is longer than {MAX_PROMPT} bytes");
                return Err(TokenizeError::Invalid(what));
            }
            Input::Text { text, add_special_tokens } => {
                Prompt { text, add_special_tokens, chat: None }
            }
            Input::Chat(body) => {
                let chat = Chat::parse(&body)?;
                let text = self.render(&chat)?.into();
                let add_special_tokens = chat.add_special_tokens();
                Prompt { text, add_special_tokens, chat: Some(chat) }
            }
        })
    }

    /// Is little of it new?
    fn is_small(&self, Prompt { text, .. }: &Prompt) -> bool {
        text.len() <= SMALL_BYTES || self.encoder.cold_bytes(text) <= SMALL_BYTES
    }

    fn ids(&self, prompt: &Prompt) -> Result<Tokenized, TokenizeError> {
        let ids = self.encoder.encode(&prompt.text, prompt.add_special_tokens);
        let mut ids = ids.map_err(TokenizeError::Invalid)?;
        if let Some(chat) = &prompt.chat {
            chat.truncate(&mut ids);
        }
        Ok(ids.into())
    }

    fn render(&self, chat: &Chat) -> Result<String, TokenizeError> {
        let tool_use = self.templates.get(TOOL_USE).filter(|_| chat.has_tools());
        let template = tool_use.or_else(|| self.templates.get(DEFAULT));
        let template = template.ok_or(TokenizeError::NoChatTemplate)?;
        let (variables, continued) =
            chat.variables(template.content_format(), &self.special, template.source())?;
        let mut text = template.render(variables, chat.bytes()).map_err(TokenizeError::Invalid)?;
        if let Some(continued) = continued {
            chat::cut_behind(&mut text, &continued)?;
        }
        Ok(text)
    }
}

/// A text on its way to ids.
struct Prompt {
    text: Arc<str>,
    add_special_tokens: bool,
    /// What it was rendered from.
    chat: Option<Chat>,
}

/// What of `tokenizer_config.json` matters.
#[derive(Debug, Default, Deserialize)]
struct Settings {
    #[serde(default)]
    chat_template: Option<Templates>,
    /// Special tokens are those whose names end in `_token`.
    #[serde(flatten)]
    others: BTreeMap<String, serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// A token is a string, or an object with its text as `content`.
fn token_text(token: &serde_json::Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// Templates by name, each with its file. Files of templates take the place of all in the settings.
fn sources(
    directory: &Path,
    settings: &Path,
    inline: Option<Templates>,
) -> anyhow::Result<Vec<(String, PathBuf, String)>> {
    let mut found = Vec::new();
    let file = directory.join("chat_template.jinja");
    if let Some(source) = read_if_there(&file)? {
        found.push((DEFAULT.to_owned(), file, source));
    }
    for file in entries(&directory.join("chat_templates"))? {
        let name = file.file_stem().and_then(|name| name.to_str()).map(str::to_owned);
        let is_template = file.extension().is_some_and(|extension| extension == "jinja");
        if let (Some(name), true) = (name, is_template) {
            let source = fs::read_to_string(&file);
            let source = source.with_context(|| format!("reading {}", file.display()))?;
            found.push((name, file, source));
        }
    }
    if !found.is_empty() {
        return Ok(found);
    }
    Ok(match inline {
        None => Vec::new(),
        Some(Templates::One(source)) => vec![(DEFAULT.to_owned(), settings.to_owned(), source)],
        Some(Templates::Named(all)) => {
            all.into_iter().map(|one| (one.name, settings.to_owned(), one.template)).collect()
        }
    })
}

/// Model directories below `parent`, by name.
fn find(parent: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    if !parent.is_dir() {
        bail!("{}: not a directory", parent.display());
    }
    if is_model(parent) {
        let whole = parent.canonicalize().unwrap_or_else(|_| parent.to_owned());
        return Ok(vec![(name_of(&whole), parent.to_owned())]);
    }
    let mut found = Vec::new();
    for directory in entries(parent)? {
        let name = name_of(&directory);
        if is_model(&directory) {
            found.push((name, directory));
        } else if let Some(cached) = name.strip_prefix("models--") {
            if let Some(snapshot) = snapshot(&directory)? {
                found.push((cached.replacen("--", "/", 1), snapshot));
            }
        } else {
            let inner = entries(&directory)?.into_iter().filter(|inner| is_model(inner));
            found.extend(inner.map(|inner| (format!("{name}/{}", name_of(&inner)), inner)));
        }
    }
    if found.is_empty() {
        bail!("{}: no directory with a tokenizer.json in it", parent.display());
    }
    Ok(found)
}

/// The snapshot that `refs/main` names in a directory of the hub's cache, or else the last one.
fn snapshot(directory: &Path) -> anyhow::Result<Option<PathBuf>> {
    let snapshots = directory.join("snapshots");
    if let Some(revision) = read_if_there(&directory.join("refs/main"))? {
        let named = snapshots.join(revision.trim());
        if is_model(&named) {
            return Ok(Some(named));
        }
    }
    Ok(entries(&snapshots)?.into_iter().rfind(|snapshot| is_model(snapshot)))
}

fn is_model(directory: &Path) -> bool {
    directory.join("tokenizer.json").is_file()
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What is in a directory, sorted; nothing if there is no such directory.
fn entries(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let context = || format!("reading {}", directory.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).with_context(context)? {
        paths.push(entry.with_context(context)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn read_if_there(file: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(error) => Err(error).with_context(|| format!("reading {}", file.display())),
    }
}

#[cfg(test)]
mod tests;
