//! Certificates and TLS parameters of a gRPC listener.
//!
//! Without files the certificate is made in memory at start (name `localhost`), as the Go EPP does:
//! it encrypts and proves nothing. With files, a [`Certificate`] can follow their changes; a pair that
//! cannot be used leaves the old one in place.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use tokio_rustls::rustls::{
    self, CipherSuite, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio_util::sync::CancellationToken;

use super::{TlsError, TlsVersion, certificates, private_key, read, roots_of};
use crate::support::reload::{self, ReloadMetrics};

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
    pub client_ca: Option<PathBuf>,
    /// A client may also show none; one that is not signed so is refused all the same.
    pub client_optional: bool,
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
        let directory = files.directory.clone();
        let read = move || Ok(Pair::read(&directory)?);
        let take = |pair: &Pair| {
            self.current.store(Arc::new(pair.parse(&files.directory)?));
            Ok(())
        };
        reload::follow("certificate", files.first.clone(), read, take, metrics, stop).await
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
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

/// Who signs the certificates of clients: the `client_ca` of [`TlsOptions`]. Clones share it.
#[derive(Clone, Debug)]
pub struct ClientAuthority {
    path: Arc<Path>,
    optional: bool,
    provider: Arc<CryptoProvider>,
    /// What the file held at start.
    first: Arc<[u8]>,
    current: Arc<ArcSwap<Arc<dyn ClientCertVerifier>>>,
}

impl ClientAuthority {
    /// Reads the file; `None` if clients are not asked for certificates.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or used.
    pub fn new(options: &TlsOptions) -> Result<Option<Self>, TlsError> {
        let Some(path) = &options.client_ca else { return Ok(None) };
        let provider = Arc::new(provider(&options.cipher_suites));
        let optional = options.client_optional;
        let first = read(path.clone())?;
        let verifier = verifier(&first, path, optional, &provider)?;
        let current = Arc::new(ArcSwap::from_pointee(verifier));
        let path = Arc::from(path.as_path());
        Ok(Some(Self { path, optional, provider, first: first.into(), current }))
    }

    /// Looks at the file each second until `stop`, and takes over changed authorities. A connection
    /// that is there already stays.
    ///
    /// # Errors
    ///
    /// Never; a supervised task wants a result.
    pub async fn follow(
        self,
        metrics: ReloadMetrics,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let (path, first) = (self.path.to_path_buf(), self.first.to_vec());
        let take = |pem: &Vec<u8>| {
            let verifier = verifier(pem, &self.path, self.optional, &self.provider)?;
            self.current.store(Arc::new(verifier));
            Ok(())
        };
        reload::follow("clientCa", first, move || Ok(read(path.clone())?), take, metrics, stop)
            .await
    }
}

fn verifier(
    pem: &[u8],
    path: &Path,
    optional: bool,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let roots = Arc::new(roots_of(pem, path)?);
    let builder = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(provider));
    let builder = if optional { builder.allow_unauthenticated() } else { builder };
    builder.build().map_err(|error| TlsError::setup(&error))
}

impl ClientCertVerifier for ClientAuthority {
    /// None: a client that has several certificates must know which one to show.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.current.load().verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.current.load().verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.current.load().supported_verify_schemes()
    }
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
    server_config_with(options, certificate, ClientAuthority::new(options)?)
}

/// [`server_config`] with an authority that somebody [follows](ClientAuthority::follow).
///
/// # Errors
///
/// When version and cipher suites leave nothing to agree on.
pub fn server_config_with(
    options: &TlsOptions,
    certificate: Certificate,
    clients: Option<ClientAuthority>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(Arc::new(provider(&options.cipher_suites)))
        .with_protocol_versions(versions(options.min_version))
        .map_err(|error| TlsError::setup(&error))?;
    let asked = clients.is_some();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(clients) => builder.with_client_cert_verifier(Arc::new(clients)),
    };
    let mut config = builder.with_cert_resolver(Arc::new(certificate));
    if asked {
        // A resumed session would outlive the authority that vouched for it.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
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
