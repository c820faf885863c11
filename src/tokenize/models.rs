//! Directories of models → tokenizers by served name.

use std::{collections::BTreeMap, path::PathBuf};

use prometheus::Registry;

use super::{Input, Tokenize, TokenizeError, Tokenized, encode::CacheConfig, pool::PoolConfig};

/// Where the tokenizers are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalConfig {
    /// Served name → directory with `tokenizer.json`.
    pub models: BTreeMap<String, PathBuf>,
    /// A directory of model directories, as below `/mnt/models`; names are those of the directories,
    /// with one `org/` level at most.
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
    _private: (),
}

impl Local {
    /// Loads every tokenizer and template. Metrics are named `{prefix}_tokenize_…`.
    ///
    /// # Errors
    ///
    /// The first file that cannot be used, with the reason.
    pub fn load(
        _config: &LocalConfig,
        _registry: &Registry,
        _prefix: &str,
    ) -> anyhow::Result<Self> {
        anyhow::bail!("not built")
    }
}

#[tonic::async_trait]
impl Tokenize for Local {
    async fn tokenize(&self, _model: &str, _input: Input) -> Result<Tokenized, TokenizeError> {
        Err(TokenizeError::NotConfigured)
    }
}
