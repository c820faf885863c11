//! Where endpoints come from.
//!
//! A [`Discovery`] runs as a task for the life of the process and keeps [`Endpoints`] as its source
//! says: a [fixed list](StaticList), a [watched file](FileDiscovery). It says when it has put
//! in the first complete set; before that the process is not ready.

use std::{
    collections::BTreeMap,
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
    /// Reads endpoints, each as [`parse`](Self::parse) does.
    ///
    /// # Errors
    ///
    /// Every text that is no endpoint, or has the name of one before it, and why.
    pub fn parse_all(texts: &[String]) -> Result<Self, Vec<String>> {
        let mut endpoints: Vec<EndpointInfo> = Vec::new();
        let mut faults = Vec::new();
        for text in texts {
            match Self::parse(text) {
                Ok(endpoint) if endpoints.iter().any(|known| known.name == endpoint.name) => {
                    let name = endpoint.name;
                    faults.push(format!("{text:?}: there is an endpoint named {name} already"));
                }
                Ok(endpoint) => endpoints.push(endpoint),
                Err(why) => faults.push(format!("{text:?}: {why}")),
            }
        }
        if faults.is_empty() { Ok(Self(endpoints)) } else { Err(faults) }
    }

    /// Reads one endpoint: `[namespace/]name=ip:port[,label=value]…`, in the namespace `default` unless
    /// it says another.
    ///
    /// # Errors
    ///
    /// In words that name the part which is wrong.
    pub fn parse(text: &str) -> Result<EndpointInfo, String> {
        const FORM: &str = "must be NAME=IP:PORT, with labels such as ,llm-d.ai/role=decode";
        let (name, rest) = text.split_once('=').ok_or(FORM)?;
        let (namespace, name) = name.split_once('/').unwrap_or((DEFAULT_NAMESPACE, name));
        if namespace.is_empty() || name.is_empty() || name.contains('/') {
            return Err(format!("the name is missing; {FORM}"));
        }
        let mut parts = rest.split(',');
        let address = parts.next().unwrap_or_default();
        let address: SocketAddr =
            address.parse().map_err(|_| format!("{address:?} is no IP:PORT; {FORM}"))?;
        if address.port() == 0 {
            return Err("the port must be 1 to 65535".to_owned());
        }
        let mut labels = BTreeMap::new();
        for part in parts {
            let (key, value) = part
                .split_once('=')
                .map(|(key, value)| (key.trim(), value.trim()))
                .filter(|(key, _)| !key.is_empty())
                .ok_or_else(|| format!("{part:?} is no LABEL=VALUE"))?;
            if labels.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(format!("label {key} is given twice"));
            }
        }
        let name = EndpointName { namespace: namespace.to_owned(), name: name.to_owned() };
        Ok(EndpointInfo { name, address, metrics_address: address, labels })
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
