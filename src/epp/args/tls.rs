//! Go's names of TLS versions and cipher suites.

/// The lowest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// 1.2.
    Tls12,
    /// 1.3.
    Tls13,
}

/// Suites that are built in, by their IANA names.
pub(super) const BUILT_IN: [&str; 9] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// Suites that Go knows besides: without forward secrecy, with CBC, or with broken ciphers.
const OTHERS: [&str; 16] = [
    "TLS_RSA_WITH_RC4_128_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
];

/// A version by Go's name, and whether it stands for a lower one that is not built in.
pub(super) fn version(name: &str) -> Result<(TlsVersion, bool), String> {
    match name {
        "VersionTLS10" | "VersionTLS11" => Ok((TlsVersion::Tls12, true)),
        "VersionTLS12" => Ok((TlsVersion::Tls12, false)),
        "VersionTLS13" => Ok((TlsVersion::Tls13, false)),
        _ => Err(format!(
            "unknown TLS version {name:?}; supported values: VersionTLS10, VersionTLS11, \
             VersionTLS12, VersionTLS13"
        )),
    }
}

/// A list of suites, sorted out.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Suites {
    /// Built in.
    pub(super) usable: Vec<&'static str>,
    /// Known to Go alone.
    pub(super) others: Vec<&'static str>,
    /// Known to nobody.
    pub(super) unknown: Vec<String>,
}

/// Sorts out a list that is separated by commas.
pub(super) fn suites(list: &str) -> Suites {
    let mut suites = Suites::default();
    for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let known = |names: &[&'static str]| names.iter().copied().find(|known| *known == name);
        match (known(&BUILT_IN), known(&OTHERS)) {
            (Some(name), _) => suites.usable.push(name),
            (None, Some(name)) => suites.others.push(name),
            (None, None) => suites.unknown.push(name.to_owned()),
        }
    }
    suites
}
