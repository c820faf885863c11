//! `https` to metrics pages.

use std::{path::PathBuf, sync::Arc};

use tokio_rustls::TlsConnector;

use crate::support::tls::{ClientTls, Identity, TlsError, client_config_as};

/// Whom to trust, and who we are. Files are read once, at the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// Trusted certificates, PEM; none = any certificate will do.
    pub ca: Option<PathBuf>,
    /// Our certificate chain and its key, PEM, for servers that ask.
    pub client: Option<(PathBuf, PathBuf)>,
}

impl TlsConfig {
    pub(super) fn connector(&self) -> Result<TlsConnector, TlsError> {
        let tls = ClientTls { ca: self.ca.clone(), insecure_skip_verify: self.ca.is_none() };
        let identity = self.client.clone().map(|(chain, key)| Identity { chain, key });
        Ok(TlsConnector::from(Arc::new(client_config_as(&tls, identity.as_ref(), &[])?)))
    }
}
