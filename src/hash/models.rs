//! Which hash settings and which name a model has.

use std::{collections::HashMap, sync::Arc};

use crate::hash::{Algorithm, Scheme};

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
            default: Arc::new(Scheme::new(Algorithm::default(), "", 16)),
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
