//! The `kv-indexer` service as a [`PrefixIndex`]: block keys over one `ScoreStream`, compact answers, a
//! circuit breaker.

use std::{sync::Arc, time::Duration};

use prometheus::Registry;

use crate::epp::{datalayer::Endpoints, precise::PrefixIndex, scheduling::Task};

/// Where the service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// `host:port`, or `http://…`, `https://…`.
    pub address: String,
    /// How long a request waits for its scores at most.
    pub deadline: Duration,
    /// TLS; `None` = plaintext.
    pub tls: Option<RemoteTls>,
    /// Failures in a row that open the breaker.
    pub failures: u32,
    /// After this long an open breaker lets one question through.
    pub half_open: Duration,
}

/// How the service's certificate is judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteTls {
    /// PEM file of the authorities; `None`: the system's.
    pub ca: Option<std::path::PathBuf>,
    /// The name that the certificate has to have; `None`: that of the address.
    pub server_name: Option<String>,
    /// Accept any certificate.
    pub insecure_skip_verify: bool,
}

/// Makes the index and what keeps its connection.
///
/// # Errors
///
/// An address or certificate that cannot be used; metrics that cannot be registered.
pub fn connect(
    _config: RemoteConfig,
    _endpoints: &Arc<Endpoints>,
    _registry: &Registry,
) -> anyhow::Result<(Arc<dyn PrefixIndex>, Task)> {
    anyhow::bail!("not built")
}
