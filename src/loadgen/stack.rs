//! Everything that a run is made against, as processes of its own: engines, indexer, endpoint picker and
//! gateway, so that each one's cost can be told.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`fleet`] | `loadgen fleet`: engines in one process |
//! | [`child`] | a process that says where it listens |
//! | [`policy`] | the endpoint picker's configuration for each routing policy |
//! | [`envoy`] | real Envoy |
//!
//! A process is this program again (`loadgen component …`), so that nothing else has to be built or
//! found.

pub mod child;
pub mod envoy;
pub mod fleet;
pub mod policy;

use std::{net::SocketAddr, path::PathBuf};

pub use self::{fleet::FleetOptions, policy::Policy};
use super::{drive::Target, resources::Component};

/// What is started.
#[derive(Clone, Debug)]
pub struct StackOptions {
    /// The engines.
    pub fleet: FleetOptions,
    /// Who routes.
    pub policy: Policy,
    /// Envoy's binary; `None` = we play its part.
    pub envoy: Option<PathBuf>,
    /// Let the endpoint picker tell what it predicted.
    pub want_hits: bool,
    /// Start an indexer even if the policy does not ask one, for freshness.
    pub indexer: bool,
}

/// Where an engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineAddress {
    /// Its name among the endpoints.
    pub name: String,
    /// HTTP.
    pub http: SocketAddr,
    /// Where it publishes, `tcp://host:port`.
    pub events: String,
    /// Where it answers replays.
    pub replay: String,
}

/// A running stack; its processes end with it.
#[derive(Debug)]
pub struct Stack {}

impl Stack {
    /// Starts everything and waits until requests can be sent, and until the indexer, if there is one,
    /// follows all engines.
    ///
    /// # Errors
    ///
    /// What did not start, with the last lines that it said.
    pub async fn start(options: StackOptions) -> anyhow::Result<Self> {
        let _ = options;
        anyhow::bail!("not built yet")
    }

    /// Where requests go.
    #[must_use]
    pub fn target(&self) -> Target {
        Target::Direct(Vec::new())
    }

    /// The engines.
    #[must_use]
    pub fn engines(&self) -> &[EngineAddress] {
        &[]
    }

    /// The indexer's gRPC address.
    #[must_use]
    pub fn indexer(&self) -> Option<SocketAddr> {
        None
    }

    /// The indexer's process.
    #[must_use]
    pub fn indexer_pid(&self) -> Option<u32> {
        None
    }

    /// The endpoint picker's `ext_proc` address.
    #[must_use]
    pub fn ext_proc(&self) -> Option<SocketAddr> {
        None
    }

    /// The endpoint picker's metrics page.
    #[must_use]
    pub fn epp_metrics(&self) -> Option<SocketAddr> {
        None
    }

    /// Its processes, for the sampler; ours is not among them.
    #[must_use]
    pub fn components(&self) -> Vec<Component> {
        Vec::new()
    }

    /// A process that ended by itself, and what it said last.
    pub fn fault(&mut self) -> Option<String> {
        None
    }

    /// Ends all processes.
    pub async fn stop(self) {}
}
