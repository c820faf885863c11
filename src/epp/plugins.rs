//! The plugins, one a file, and their registry: type names, aliases, factories.
//!
//! A factory reads its parameters with [`Fields`], which collects every fault with its path and
//! refuses unknown names; it gets other plugins and shared parts from [`Building`].

pub mod active_request_scorer;
pub mod always_disagg_pd_decider;
pub mod approx_prefix_cache_producer;
pub mod by_label_filter;
pub mod core_metrics_extractor;
pub mod decode_filter;
pub mod disagg_profile_handler;
pub mod encode_filter;
pub mod file_discovery;
pub mod inflight_load_producer;
pub mod kv_cache_utilization_scorer;
mod lives;
pub mod load_aware_scorer;
pub mod lora_affinity_scorer;
pub mod max_score_picker;
pub mod metrics_data_source;
pub mod no_hit_lru_scorer;
pub mod overload_filter;
pub mod pd_profile_handler;
pub mod precise_prefix_cache_producer;
pub mod precise_prefix_cache_scorer;
pub mod prefill_filter;
pub mod prefill_header_handler;
pub mod prefix;
pub mod prefix_based_pd_decider;
pub mod prefix_cache_scorer;
pub mod queue_scorer;
pub mod random_picker;
mod registry;
mod role;
pub mod running_requests_size_scorer;
pub mod single_profile_handler;
pub mod token_load_scorer;
pub mod token_producer;
pub mod utilization_detector;
pub mod weighted_random_picker;

use std::{fmt, sync::Arc};

use prometheus::Registry;

use crate::{
    epp::{datalayer::Endpoints, scheduling::Plugin},
    support::fields::Fields,
};

pub(crate) use self::registry::deprecation;
pub use self::registry::{PluginTypes, types};

/// What a factory can reach besides its own parameters.
pub trait Building {
    /// The configured name of the plugin that is being built.
    fn name(&self) -> &Arc<str>;
    /// The plugin configured under this name; it is built now if it was not yet. `None`, with a fault
    /// at `field` already noted, if there is none or the references form a loop.
    fn plugin(&self, params: &Fields<'_>, field: &str, name: &str) -> Option<Arc<dyn Plugin>>;
    /// The name of the plugin that stands in when parameters name none: the one that bears its type's
    /// name, added with default parameters if none is configured. A plugin of the type that has
    /// another name is not taken, as in the Go EPP: only what names it uses it.
    fn default_of(&self, type_name: &str) -> Arc<str>;
    /// The endpoints.
    fn endpoints(&self) -> &Arc<Endpoints>;
    /// Where a plugin registers metrics of its own. Several plugins of a type share families, so use
    /// [`family`](crate::support::metrics::family), not `Registry::register` alone.
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
