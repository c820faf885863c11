//! `tokenProcessorConfig`, `models`, `modelAliases`: how tokens become block keys.

use std::{collections::HashMap, sync::Arc};

use super::IndexerConfig;
use crate::{
    hash::Models,
    hash::{Algorithm, Scheme},
    ingest::discovery::MAX_BLOCK_SIZE,
    support::fields::Fields,
};

/// Tokens per block unless configured, as in vLLM and llm-d.
const DEFAULT_BLOCK_SIZE: u32 = 16;

impl IndexerConfig {
    /// Reads the hash settings. `block_size` of the command line goes before the document's
    /// default, not before what `models` says about one model.
    pub(super) fn read_keys(
        &mut self,
        root: &Fields<'_>,
        indexer: &Fields<'_>,
        redis: bool,
        block_size: Option<u32>,
    ) {
        const NAME: &str = "tokenProcessorConfig";
        let top = root.mapping(NAME);
        let fields = if root.has(NAME) {
            let text = "has no effect: the one at the top of the document goes before it";
            indexer.ignored(NAME, text);
            top
        } else {
            // Asked in vain, so that its names are known.
            read_scheme(top, Algorithm::default());
            // Where it was in llm-d until 2026.
            indexer.mapping(NAME)
        };
        let usual = if redis { Algorithm::CborFnv } else { Algorithm::default() };
        let default = read_scheme(fields, usual);
        let size = block_size.unwrap_or(default.block_size());
        let default = Scheme::new(default.algorithm(), default.seed(), size);
        let aliases = read_aliases(root);
        let listed = read_models(root, &default, &aliases);
        self.api.models = Models { default: Arc::new(default), listed, aliases };
    }
}

/// Reads a `tokenProcessorConfig` whose algorithm is `usual` unless it names one.
fn read_scheme(fields: Fields<'_>, usual: Algorithm) -> Scheme {
    // Zero is an absent size, as in llm-d.
    let size = |name| fields.integer(name, 0..=MAX_BLOCK_SIZE).filter(|&size: &u32| size > 0);
    let deprecated = size("blockSize");
    if deprecated.is_some() {
        fields.warn("blockSize", "is deprecated; use `blockSizeTokens`");
    }
    let size = size("blockSizeTokens").or(deprecated).unwrap_or(DEFAULT_BLOCK_SIZE);
    let seed = fields.string("hashSeed").unwrap_or_default();
    let algorithm = read_algorithm(&fields).unwrap_or(usual);
    fields.finish();
    Scheme::new(algorithm, seed, size)
}

/// An empty name is an absent one, as in llm-d.
fn read_algorithm(fields: &Fields<'_>) -> Option<Algorithm> {
    let name = |algorithm: Algorithm| (algorithm.as_str(), Some(algorithm));
    let legal =
        [name(Algorithm::Xxh3), name(Algorithm::Xxh64), name(Algorithm::CborFnv), ("", None)];
    fields.one_of("hashAlgorithm", &legal).flatten()
}

fn read_models(
    root: &Fields<'_>,
    default: &Scheme,
    aliases: &HashMap<String, String>,
) -> HashMap<String, Arc<Scheme>> {
    let mut listed = HashMap::new();
    for fields in root.each("models") {
        let name = fields.required("name", Fields::nonempty);
        let size = fields.integer("blockSizeTokens", 1..=MAX_BLOCK_SIZE);
        let algorithm = read_algorithm(&fields).unwrap_or(default.algorithm());
        let seed = fields.string("hashSeed").unwrap_or_else(|| default.seed().to_owned());
        if let Some(name) = name {
            if let Some(canonical) = aliases.get(&name) {
                let text = format!("is an alias of {canonical:?}, whose settings count");
                fields.warn("name", text);
            }
            let scheme = Scheme::new(algorithm, seed, size.unwrap_or(default.block_size()));
            if listed.contains_key(&name) {
                fields.fault("name", format!("model {name:?} is listed twice"));
            }
            listed.insert(name, Arc::new(scheme));
        }
        fields.finish();
    }
    listed
}

fn read_aliases(root: &Fields<'_>) -> HashMap<String, String> {
    const NAME: &str = "modelAliases";
    let aliases: HashMap<String, String> = root.strings(NAME).into_iter().collect();
    let mut names: Vec<_> = aliases.iter().collect();
    names.sort_unstable();
    for (served, canonical) in names {
        let at = format!("{NAME}.{served}");
        if canonical.is_empty() || served.is_empty() {
            root.fault(&at, "names must not be empty");
        } else if aliases.contains_key(canonical) {
            // One look-up resolves a name; chains and loops would be answered half-way.
            let text = format!("{canonical:?} is an alias itself; name the model it stands for");
            root.fault(&at, text);
        }
    }
    aliases
}
