//! Where endpoints come from.
//!
//! A [`Discovery`] runs as a task for the life of the process and keeps [`Endpoints`] as its source
//! says: a [fixed list](StaticList), a [watched file](FileDiscovery). It says when it has put
//! in the first complete set; before that the process is not ready.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use tokio_util::sync::CancellationToken;

use super::{EndpointInfo, EndpointName, Endpoints};
use crate::epp::scheduling::BoxFuture;

mod file;

pub use self::file::{FileDiscovery, FileStats};

/// The namespace of endpoints that name none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// A source of endpoints.
///
/// # Contract
///
/// * Only one source changes a set of [`Endpoints`].
/// * [`Loaded::set`] is called after the first complete set is in, be it empty.
/// * What it put in stays when it ends: a process that stops serves its last requests.
/// * A source that fails later keeps the last good set and tries again.
pub trait Discovery: fmt::Debug + Send {
    /// Keeps `endpoints` current until `stop` is cancelled.
    ///
    /// # Errors
    ///
    /// When there is no first set to begin with.
    fn run(
        self: Box<Self>,
        endpoints: Arc<Endpoints>,
        loaded: Loaded,
        stop: CancellationToken,
    ) -> BoxFuture<'static, Result<(), DiscoveryError>>;
}

/// Why a source has no first set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// The file cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// The file says something that cannot be used.
    #[error("{}: {faults}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong, each with line, entry and field.
        faults: String,
    },
    /// Looking at the file panicked.
    #[error("looking at {}", path.display())]
    Panicked {
        /// The file.
        path: PathBuf,
        /// The panic.
        #[source]
        error: tokio::task::JoinError,
    },
}

/// Whether the first complete set of endpoints is in. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Loaded(CancellationToken);

impl Loaded {
    /// From now on, it is.
    pub fn set(&self) {
        self.0.cancel();
    }

    /// Is it?
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Waits until it is.
    pub async fn wait(&self) {
        self.0.cancelled().await;
    }
}

/// Endpoints that never change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StaticList(pub Vec<EndpointInfo>);

impl StaticList {
    /// Reads one endpoint: `[name=]ip:port[,label=value]…`. The name is `ip:port` when none is given.
    ///
    /// # Errors
    ///
    /// A sentence that names the part that is wrong.
    pub fn parse(text: &str) -> Result<EndpointInfo, String> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default().trim();
        let (name, address) = first.split_once('=').unwrap_or((first, first));
        let address: SocketAddr =
            address.parse().map_err(|_| format!("{text:?}: {address:?} is not ip:port"))?;
        if address.port() == 0 {
            return Err(format!("{text:?}: port 0 is none to connect to"));
        }
        if name.is_empty() {
            return Err(format!("{text:?}: the name is empty"));
        }
        let labels = parts
            .map(|part| match part.split_once('=') {
                Some((key, value)) if !key.trim().is_empty() => {
                    Ok((key.trim().to_owned(), value.trim().to_owned()))
                }
                _ => Err(format!("{text:?}: {part:?} is not label=value")),
            })
            .collect::<Result<_, _>>()?;
        Ok(EndpointInfo {
            name: EndpointName { namespace: DEFAULT_NAMESPACE.to_owned(), name: name.to_owned() },
            address,
            metrics_address: address,
            labels,
        })
    }
}

impl Discovery for StaticList {
    fn run(
        self: Box<Self>,
        endpoints: Arc<Endpoints>,
        loaded: Loaded,
        stop: CancellationToken,
    ) -> BoxFuture<'static, Result<(), DiscoveryError>> {
        Box::pin(async move {
            endpoints.set(self.0);
            loaded.set();
            stop.cancelled().await;
            Ok(())
        })
    }
}

/// An IPv4 literal.
fn ipv4(text: &str) -> Result<IpAddr, String> {
    text.parse::<std::net::Ipv4Addr>()
        .map(IpAddr::V4)
        .map_err(|_| format!("{text:?} is no IPv4 address; names are not looked up"))
}

#[cfg(test)]
mod tests;
