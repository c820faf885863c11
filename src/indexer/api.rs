//! Settings of the gRPC API. The defaults are documented in `config/kv-indexer.yaml`.

use std::{collections::HashMap, sync::Arc, time::Duration};

use crate::hash::Scheme;

/// Limits and names of the score API.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Bytes of one gRPC message.
    pub max_message_bytes: usize,
    /// Tokens of one prompt.
    pub max_tokens: usize,
    /// Prompts of one request.
    pub max_prompts: usize,
    /// Multimodal items of one prompt.
    pub max_multimodal: usize,
    /// Bytes of a pod id.
    pub max_pod_id_bytes: usize,
    /// Calls in flight per connection.
    pub max_concurrent_calls: u32,
    /// Speculative entries at most, over all pods.
    pub max_speculations: usize,
    /// Longest life of a speculative entry.
    pub max_speculation_ttl: Duration,
    /// Names of models.
    pub models: Models,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            max_message_bytes: 16 << 20,
            max_tokens: 2 << 20,
            max_prompts: 1024,
            max_multimodal: 4096,
            max_pod_id_bytes: 512,
            max_concurrent_calls: 256,
            max_speculations: 65_536,
            max_speculation_ttl: Duration::from_secs(600),
            models: Models::default(),
        }
    }
}

/// Aliases of model names, and hash settings by model.
#[derive(Clone, Debug)]
pub struct Models {
    /// Settings of models that are not listed.
    pub default: Arc<Scheme>,
    /// Models whose settings differ.
    pub listed: HashMap<String, Arc<Scheme>>,
    /// Served name → the name in configuration or topic.
    pub aliases: HashMap<String, String>,
}

impl Default for Models {
    fn default() -> Self {
        Self {
            default: Arc::new(Scheme::new(crate::hash::Algorithm::default(), "", 16)),
            listed: HashMap::new(),
            aliases: HashMap::new(),
        }
    }
}

impl Models {
    /// The name under which a model is indexed.
    #[must_use]
    pub fn canonical<'a>(&'a self, name: &'a str) -> &'a str {
        self.aliases.get(name).map_or(name, String::as_str)
    }

    /// The hash settings of a model, by its canonical name.
    #[must_use]
    pub fn scheme(&self, canonical: &str) -> &Arc<Scheme> {
        self.listed.get(canonical).unwrap_or(&self.default)
    }
}
