//! How late the index is, as an outside client sees it through `Score`.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`probe`] | blocks of our own, published and looked for |
//! | [`storm`] | bursts of events without engines |
//! | [`backlog`] | what was published and is not applied yet |
//! | [`delay`] | a proxy that delays, to show that delays are seen |

pub mod backlog;
pub mod delay;
pub mod probe;
pub mod storm;

use std::{net::SocketAddr, time::Instant};

use tokio_util::sync::CancellationToken;

pub use self::storm::StormOptions;
use super::{report, stack::EngineAddress};

/// What is measured, beside whatever load there is.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// The indexer.
    pub indexer: SocketAddr,
    /// Its process, for its cost per block.
    pub indexer_pid: Option<u32>,
    /// Served model name of the probes; that of no engine, so that nothing else is moved.
    pub model: String,
    /// Probes per second, stores and removes each.
    pub probes_per_s: f64,
    /// Under which name the probes are reported: `idle`, `steady`, `burst`, `delayed`. With a storm, those
    /// that were published while a burst was not drained count as `burst` by themselves.
    pub condition: String,
    /// Engines whose own events are timed from the end of the step; may be empty.
    pub engines: Vec<EngineAddress>,
    /// Injected events.
    pub storm: Option<StormOptions>,
    /// Publish through a proxy that delays by 2 ms ± 1 ms.
    pub delayed: bool,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// The probes.
    pub freshness: report::Freshness,
    /// The storm.
    pub storm: Option<report::Storm>,
    /// Probes by time: seconds from the origin, microseconds until visible.
    pub probes: Vec<[f64; 2]>,
    /// Backlog by time: seconds from the origin, batches.
    pub backlog: Vec<[f64; 2]>,
    /// Begin and end of bursts of events, seconds from the origin; the end is when it was drained.
    pub event_bursts: Vec<[f64; 2]>,
}

/// Measures until `stop` is cancelled; times count from `origin`.
///
/// # Errors
///
/// An indexer that is not there, or that does not follow our publisher.
pub async fn watch(
    options: WatchOptions,
    origin: Instant,
    stop: CancellationToken,
) -> anyhow::Result<Watched> {
    let (_, _, _) = (options, origin, stop);
    anyhow::bail!("not built yet")
}
