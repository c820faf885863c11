//! An index in this process as a [`PrefixIndex`]: subscriptions follow the endpoints, one per pod and
//! rank.

use std::sync::Arc;

use prometheus::Registry;

use crate::{
    epp::{datalayer::Endpoints, precise::PrefixIndex, scheduling::Task},
    hash::Models,
};

/// What is indexed, and how.
#[derive(Clone, Debug)]
pub struct EmbeddedConfig {
    /// Hash settings and aliases.
    pub models: Models,
    /// Tier names and weights.
    pub tiers: Vec<(String, f64)>,
    /// Weight of a tier that is not listed.
    pub unlisted_weight: f64,
    /// Weight of a block that only a speculative entry claims.
    pub speculative_weight: f64,
    /// Estimated bytes beyond which stores are refused.
    pub cap_bytes: u64,
    /// Subscribe to each endpoint, at its IP and `socket_port` plus its rank.
    pub discover_pods: bool,
    /// Port of the engines' PUB sockets.
    pub socket_port: u16,
    /// Port of the engines' replay sockets; `None` = none.
    pub replay_port: Option<u16>,
    /// Topic prefix.
    pub topic_filter: String,
    /// Bind address of a central SUB socket, if engines connect to us.
    pub bind: Option<String>,
    /// `vllm`, `sglang` or empty: by content.
    pub engine: String,
    /// Writer threads; 0 = by the number of cores.
    pub lanes: usize,
}

/// Makes the index and what feeds it.
///
/// # Errors
///
/// When a thread or socket cannot be made, or metrics cannot be registered.
pub fn start(
    _config: EmbeddedConfig,
    _endpoints: &Arc<Endpoints>,
    _registry: &Registry,
) -> anyhow::Result<(Arc<dyn PrefixIndex>, Task)> {
    anyhow::bail!("not built")
}
