//! TLS of listeners and of clients.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`server`] | a listener's certificate, from files or made in memory, and who signs clients', with their reload; parameters |
//! | [`client`] | whom a client trusts, and who it is |
//! | [`names`] | Go's names of versions and cipher suites |

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tokio_rustls::rustls::{
    self,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

pub mod client;
pub mod names;
pub mod server;

pub use self::{
    client::{ClientTls, Identity, client_config, client_config_as},
    names::{CipherSuites, TlsVersion, cipher_suites, version},
    server::{Certificate, ClientAuthority, TlsOptions, server_config, server_config_with},
};
pub use crate::support::reload::ReloadMetrics;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("reading {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file has no certificate, or no key.
    #[error("{path} holds no {what}")]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// Certificate and key do not belong together, or are of a kind that is not supported.
    #[error("the certificate in {path} cannot be used")]
    Pair {
        /// Their file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The chosen parameters leave nothing to agree on, or no certificate could be made.
    #[error("setting up TLS: {0}")]
    Setup(String),
}

impl TlsError {
    fn setup(error: &impl ToString) -> Self {
        Self::Setup(error.to_string())
    }
}

fn read(path: PathBuf) -> Result<Vec<u8>, TlsError> {
    fs::read(&path).map_err(|source| TlsError::Read { path, source })
}

/// The certificates of `pem`, which is what `path` holds; at least one.
fn certificates(
    pem: &[u8],
    path: impl FnOnce() -> PathBuf,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found
        .ok()
        .filter(|chain| !chain.is_empty())
        .ok_or_else(|| TlsError::Pem { path: path(), what: "certificate" })
}

/// The private key in `pem`, which is what `path` holds.
fn private_key(
    pem: &[u8],
    path: impl FnOnce() -> PathBuf,
) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|_| TlsError::Pem { path: path(), what: "private key" })
}

/// The certificates of a file, as roots of trust.
fn roots(path: &Path) -> Result<rustls::RootCertStore, TlsError> {
    roots_of(&read(path.to_owned())?, path)
}

/// The certificates in `pem`, which is what `path` holds, as roots of trust.
fn roots_of(pem: &[u8], path: &Path) -> Result<rustls::RootCertStore, TlsError> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(pem, || path.to_owned())? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Pair { path: path.to_owned(), source })?;
    }
    Ok(roots)
}
