//! Certificates and TLS parameters of a gRPC listener.
//!
//! Without files the certificate is made in memory at start (name `localhost`), as the Go EPP does:
//! it encrypts and proves nothing. With files, a [`Certificate`] can follow their changes; a pair that
//! cannot be used leaves the old one in place.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use prometheus::IntCounter;
use tokio_rustls::rustls::{
    CipherSuite, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{TlsError, TlsVersion, certificates, private_key, read, roots};

/// How often the files are looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// What of TLS can be chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// Directory with `tls.crt` (chain) and `tls.key`, both PEM. `None`: self-signed.
    pub cert_path: Option<PathBuf>,
    /// Lowest version.
    pub min_version: TlsVersion,
    /// Cipher suites of TLS 1.2; those of 1.3 cannot be chosen. Empty: all.
    pub cipher_suites: Vec<CipherSuite>,
    /// Clients must show a certificate that one of these, PEM, has signed. `None`: they are not asked.
    /// Read once.
    pub client_ca: Option<PathBuf>,
}

/// The certificate that connections get. Clones share it.
#[derive(Clone, Debug)]
pub struct Certificate {
    current: Arc<ArcSwap<CertifiedKey>>,
    /// Where it came from; `None` = made in memory.
    files: Option<Arc<Files>>,
}

#[derive(Debug)]
struct Files {
    directory: PathBuf,
    /// What they held at start.
    first: Pair,
}

/// The contents of both files.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    chain: Vec<u8>,
    key: Vec<u8>,
}

impl Certificate {
    /// Reads the certificate, or makes one for `localhost`.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or used.
    pub fn new(options: &TlsOptions) -> Result<Self, TlsError> {
        let (key, files) = match &options.cert_path {
            None => (self_signed()?, None),
            Some(directory) => {
                let first = Pair::read(directory)?;
                let key = first.parse(directory)?;
                (key, Some(Arc::new(Files { directory: directory.clone(), first })))
            }
        };
        Ok(Self { current: Arc::new(ArcSwap::from_pointee(key)), files })
    }

    /// Looks at the files each second until `stop`, and takes over a changed pair. One that cannot be
    /// used is logged and counted once; it may be half of a change. Ends at `stop` in any case.
    ///
    /// # Errors
    ///
    /// Never; a supervised task wants a result.
    pub async fn follow(
        self,
        metrics: ReloadMetrics,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let Some(files) = self.files.clone() else {
            stop.cancelled().await;
            return Ok(());
        };
        let mut seen = Ok(files.first.clone());
        while stop.run_until_cancelled(tokio::time::sleep(RELOAD_INTERVAL)).await.is_some() {
            let reading = Arc::clone(&files);
            let pair = tokio::task::spawn_blocking(move || Pair::read(&reading.directory))
                .await
                .context("reading the certificate")?
                .map_err(|error| format!("{:#}", anyhow::Error::new(error)));
            if pair == seen {
                continue;
            }
            seen = pair;
            let usable = match &seen {
                Ok(pair) => pair
                    .parse(&files.directory)
                    .map_err(|error| format!("{:#}", anyhow::Error::new(error))),
                Err(error) => Err(error.clone()),
            };
            match usable {
                Ok(key) => {
                    self.current.store(Arc::new(key));
                    metrics.loaded.inc();
                    info!(path = %files.directory.display(), "A changed certificate is in use.");
                }
                Err(error) => {
                    metrics.failed.inc();
                    warn!(error, "A changed certificate cannot be used; the old one stays.");
                }
            }
        }
        Ok(())
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

/// What is counted of reloads. Clones share one state.
#[derive(Clone, Debug)]
pub struct ReloadMetrics {
    /// Changed pairs in use.
    pub loaded: IntCounter,
    /// Changed pairs that could not be used.
    pub failed: IntCounter,
}

impl Pair {
    fn read(directory: &Path) -> Result<Self, TlsError> {
        Ok(Self { chain: read(directory.join("tls.crt"))?, key: read(directory.join("tls.key"))? })
    }

    fn parse(&self, directory: &Path) -> Result<CertifiedKey, TlsError> {
        let chain = certificates(&self.chain, || directory.join("tls.crt"))?;
        let key = private_key(&self.key, || directory.join("tls.key"))?;
        CertifiedKey::from_der(chain, key, &ring::default_provider())
            .map_err(|source| TlsError::Pair { path: directory.to_owned(), source })
    }
}

fn self_signed() -> Result<CertifiedKey, TlsError> {
    let made = || -> Result<_, rcgen::Error> {
        let key = rcgen::KeyPair::generate()?;
        let mut params = rcgen::CertificateParams::new(["localhost".to_owned()])?;
        let mut name = rcgen::DistinguishedName::new();
        name.push(rcgen::DnType::CommonName, "localhost");
        params.distinguished_name = name;
        Ok((params.self_signed(&key)?, key))
    };
    let (certificate, key) = made().map_err(|error| TlsError::setup(&error))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    CertifiedKey::from_der(vec![certificate.der().clone()], key, &ring::default_provider())
        .map_err(|error| TlsError::setup(&error))
}

/// The TLS side of a listener that speaks HTTP/2 only.
///
/// # Errors
///
/// When version and cipher suites leave nothing to agree on, or the clients' CA cannot be used.
pub fn server_config(
    options: &TlsOptions,
    certificate: Certificate,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(provider(&options.cipher_suites));
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions(options.min_version))
        .map_err(|error| TlsError::setup(&error))?;
    let builder = match &options.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(roots(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| TlsError::setup(&error))?)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(certificate));
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn versions(min: TlsVersion) -> &'static [&'static SupportedProtocolVersion] {
    static FROM_12: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
    static FROM_13: [&SupportedProtocolVersion; 1] = [&TLS13];
    match min {
        TlsVersion::Older | TlsVersion::Tls12 => &FROM_12,
        TlsVersion::Tls13 => &FROM_13,
    }
}

fn provider(chosen: &[CipherSuite]) -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.retain(|suite| {
        chosen.is_empty() || suite.tls13().is_some() || chosen.contains(&suite.suite())
    });
    provider
}
