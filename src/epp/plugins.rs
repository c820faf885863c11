//! The plugins, one a file, and their registry: type names, aliases, factories.
//!
//! A factory reads its parameters with [`Fields`], which collects every fault with its path and
//! refuses unknown names; it gets other plugins and shared parts from [`Building`].

use std::{fmt, sync::Arc};

use prometheus::Registry;

use crate::{
    epp::{datalayer::Endpoints, scheduling::Plugin},
    support::fields::Fields,
};

pub mod active_request_scorer;
pub mod approx_prefix_cache_producer;
pub mod inflight_load_producer;
mod lives;
pub mod precise_prefix_cache_scorer;
pub mod prefix;
pub mod prefix_cache_scorer;
pub mod token_load_scorer;

/// What a factory can reach besides its own parameters.
pub trait Building {
    /// The configured name of the plugin that is being built.
    fn name(&self) -> &Arc<str>;
    /// The plugin configured under this name; it is built now if it was not yet. `None`, with a fault
    /// at `field` already noted, if there is none or the references form a loop.
    fn plugin(&self, params: &Fields<'_>, field: &str, name: &str) -> Option<Arc<dyn Plugin>>;
    /// The name of a plugin of this type: the first one configured, or one that is added with default
    /// parameters.
    fn default_of(&self, type_name: &str) -> Arc<str>;
    /// The endpoints.
    fn endpoints(&self) -> &Arc<Endpoints>;
    /// Where a plugin registers metrics of its own. Several plugins of a type share families, so use
    /// `metrics::family` of this module's metrics, not `Registry::register` alone.
    fn registry(&self) -> &Registry;
}

/// Makes a plugin, or notes faults in the reader of `params` and returns `None`.
pub type Factory = fn(params: &Fields<'_>, building: &dyn Building) -> Option<Arc<dyn Plugin>>;

/// How far a type can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// Usable.
    Beta,
    /// Refused without `--allow-experimental-plugins`.
    Alpha,
    /// Works and is warned about; the text says what to use instead.
    Deprecated(&'static str),
}

/// What a configuration may name.
#[derive(Clone, Copy)]
pub struct Registration {
    /// Canonical name.
    pub type_name: &'static str,
    /// Other names of the same.
    pub aliases: &'static [&'static str],
    /// How far it can be relied on.
    pub stability: Stability,
    /// `None`: known, and not built yet.
    pub factory: Option<Factory>,
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("type_name", &self.type_name).finish_non_exhaustive()
    }
}
