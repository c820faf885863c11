//! Files that are looked at each second and taken over when they change: certificates, authorities,
//! tokens.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use prometheus::IntCounter;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How often the files are looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// What is counted of reloads. Clones share one state.
#[derive(Clone, Debug)]
pub struct ReloadMetrics {
    /// Changed files in use.
    pub loaded: IntCounter,
    /// Changed files that could not be used.
    pub failed: IntCounter,
}

/// Reads each second until `stop`, and takes over what differs from the last reading, of which
/// `first` is the one at start. What cannot be used is logged and counted once; it may be half of a
/// change, and the old one stays. `what` names it in the log. Ends at `stop` in any case.
///
/// # Errors
///
/// When a reading panics.
pub(crate) async fn follow<T: Clone + PartialEq + Send + 'static>(
    what: &str,
    first: T,
    read: impl Fn() -> anyhow::Result<T> + Send + Sync + 'static,
    take: impl Fn(&T) -> anyhow::Result<()> + Send,
    metrics: ReloadMetrics,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let read = Arc::new(read);
    let mut seen = Ok(first);
    while stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await.is_some() {
        let reading = Arc::clone(&read);
        let now = tokio::task::spawn_blocking(move || reading())
            .await
            .with_context(|| format!("reading {what}"))?
            .map_err(|error| format!("{error:#}"));
        if now == seen {
            continue;
        }
        seen = now;
        let taken = match &seen {
            Ok(now) => take(now).map_err(|error| format!("{error:#}")),
            Err(error) => Err(error.clone()),
        };
        match taken {
            Ok(()) => {
                metrics.loaded.inc();
                info!(what, "A changed file is in use.");
            }
            Err(error) => {
                metrics.failed.inc();
                warn!(what, error, "A changed file cannot be used; the old one stays.");
            }
        }
    }
    Ok(())
}
