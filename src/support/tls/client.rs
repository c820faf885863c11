//! Whom a client trusts, and who it is. Files are read once.

use std::{path::PathBuf, sync::Arc};

use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{self, CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::{TlsError, certificates, private_key, read, roots};

/// Where distributions keep their trusted certificates.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Whom to trust.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// Trusted certificates, PEM; `None`: the system's, in the file that `SSL_CERT_FILE` names, or where
    /// distributions keep it.
    pub ca: Option<PathBuf>,
    /// Take every certificate, and any name; `ca` is not read then.
    pub insecure_skip_verify: bool,
}

/// Our certificate chain and its key, for servers that ask; PEM both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The chain, our certificate first.
    pub chain: PathBuf,
    /// The key of the first certificate.
    pub key: PathBuf,
}

/// The client's side of TLS, with the protocols that it offers, such as `b"h2"`; none = no ALPN.
///
/// # Errors
///
/// When the file, or the system's, cannot be read or used.
pub fn client_config(tls: &ClientTls, alpn: &[&[u8]]) -> Result<ClientConfig, TlsError> {
    client_config_as(tls, None, alpn)
}

/// [`client_config`] of a client that can say who it is.
///
/// # Errors
///
/// As [`client_config`], and when the identity's files cannot be read or used.
pub fn client_config_as(
    tls: &ClientTls,
    identity: Option<&Identity>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::setup(&error))?;
    let builder = match &tls.ca {
        _ if tls.insecure_skip_verify => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        }
        Some(path) => builder.with_root_certificates(roots(path)?),
        None => builder.with_root_certificates(system_roots()?),
    };
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(Identity { chain, key }) => {
            let private = private_key(&read(key.clone())?, || key.clone())?;
            let certificates = certificates(&read(chain.clone())?, || chain.clone())?;
            builder
                .with_client_auth_cert(certificates, private)
                .map_err(|source| TlsError::Pair { path: chain.clone(), source })?
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

/// The first of [`BUNDLES`] that there is. Certificates of a kind that is not supported are left out.
fn system_roots() -> Result<RootCertStore, TlsError> {
    let named = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty());
    let path = named
        .map(PathBuf::from)
        .or_else(|| BUNDLES.map(PathBuf::from).into_iter().find(|path| path.exists()))
        .ok_or_else(|| TlsError::Setup("the system has no file of trusted certificates".into()))?;
    let mut roots = RootCertStore::empty();
    let (usable, _) =
        roots.add_parsable_certificates(certificates(&read(path.clone())?, || path.clone())?);
    if usable == 0 {
        return Err(TlsError::Pem { path, what: "certificate that can be used" });
    }
    Ok(roots)
}

/// Takes every certificate, as engines have self-signed ones; the handshake's signatures still count.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
