//! Go's names of TLS versions and cipher suites.

use tokio_rustls::rustls::CipherSuite;

/// A version of TLS, as the lowest one that is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// 1.0 or 1.1, which are not built in: 1.2 is taken.
    Older,
    /// 1.2.
    #[default]
    Tls12,
    /// 1.3.
    Tls13,
}

/// Suites that are built in, by their IANA names.
const BUILT_IN: [(&str, CipherSuite); 9] = [
    ("TLS_AES_128_GCM_SHA256", CipherSuite::TLS13_AES_128_GCM_SHA256),
    ("TLS_AES_256_GCM_SHA384", CipherSuite::TLS13_AES_256_GCM_SHA384),
    ("TLS_CHACHA20_POLY1305_SHA256", CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
    (
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
    (
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
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

/// Reads a version by Go's name; the default one of an empty text.
///
/// # Errors
///
/// In words, with the names that there are.
pub fn version(name: &str) -> Result<TlsVersion, String> {
    match name {
        "" => Ok(TlsVersion::default()),
        "VersionTLS10" | "VersionTLS11" => Ok(TlsVersion::Older),
        "VersionTLS12" => Ok(TlsVersion::Tls12),
        "VersionTLS13" => Ok(TlsVersion::Tls13),
        _ => Err(format!(
            "unknown TLS version {name:?}; supported values: VersionTLS10, VersionTLS11, \
             VersionTLS12, VersionTLS13"
        )),
    }
}

/// A list of cipher suites, sorted out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CipherSuites {
    /// Built in; empty = all that are.
    pub usable: Vec<CipherSuite>,
    /// The names of those that Go has and this program has not.
    pub left_out: Vec<&'static str>,
}

/// Reads a list of cipher suites by Go's names, which are separated by commas.
///
/// # Errors
///
/// In words, when a name is nobody's, or there are names and none is built in.
pub fn cipher_suites(list: &str) -> Result<CipherSuites, String> {
    let mut suites = CipherSuites::default();
    let mut unknown = Vec::new();
    for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        // Go knows the ChaCha suites of TLS 1.2 by a shorter name, too.
        let is = |known: &str| {
            known == name
                || name.ends_with("POLY1305") && known.strip_suffix("_SHA256") == Some(name)
        };
        let usable = BUILT_IN.iter().find(|(known, _)| is(known));
        match (usable, OTHERS.iter().find(|known| **known == name)) {
            (Some((_, suite)), _) => suites.usable.push(*suite),
            (None, Some(name)) => suites.left_out.push(name),
            (None, None) => unknown.push(name),
        }
    }
    if !unknown.is_empty() {
        return Err(format!("unknown cipher suites {}", unknown.join(", ")));
    }
    if suites.usable.is_empty() && !suites.left_out.is_empty() {
        let names = BUILT_IN.map(|(name, _)| name);
        return Err(format!("none of these is built in; there are {}", names.join(", ")));
    }
    Ok(suites)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_gos_names() {
        assert_eq!(version(""), Ok(TlsVersion::Tls12));
        assert_eq!(version("VersionTLS10"), Ok(TlsVersion::Older));
        assert_eq!(version("VersionTLS11"), Ok(TlsVersion::Older));
        assert_eq!(version("VersionTLS12"), Ok(TlsVersion::Tls12));
        assert_eq!(version("VersionTLS13"), Ok(TlsVersion::Tls13));
        let error = version("1.2").unwrap_err();
        assert!(error.starts_with("unknown TLS version \"1.2\"; supported values"), "{error}");
    }

    #[test]
    fn cipher_suites_have_gos_names() {
        const CHACHA: CipherSuite = CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256;
        #[track_caller]
        fn good(list: &str, usable: &[CipherSuite], left_out: &[&'static str]) {
            let (usable, left_out) = (usable.to_vec(), left_out.to_vec());
            assert_eq!(cipher_suites(list), Ok(CipherSuites { usable, left_out }), "{list}");
        }
        #[track_caller]
        fn bad(list: &str, want: &str) {
            let error = cipher_suites(list).unwrap_err();
            assert!(error.contains(want), "{list}: {error}");
        }
        good("", &[], &[]);
        good("TLS_AES_128_GCM_SHA256", &[CipherSuite::TLS13_AES_128_GCM_SHA256], &[]);
        good("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305", &[CHACHA], &[]);
        good(
            " TLS_RSA_WITH_RC4_128_SHA, TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,",
            &[CHACHA],
            &["TLS_RSA_WITH_RC4_128_SHA"],
        );
        bad("X,TLS_AES_128_GCM_SHA256,Y", "unknown cipher suites X, Y");
        bad("TLS_RSA_WITH_RC4_128_SHA", "none of these is built in; there are TLS_AES");
    }

    #[test]
    fn every_suite_that_is_built_in_has_a_name() {
        let provider = tokio_rustls::rustls::crypto::ring::default_provider();
        let there: Vec<CipherSuite> =
            provider.cipher_suites.iter().map(|suite| suite.suite()).collect();
        assert_eq!(there.len(), BUILT_IN.len());
        for (name, suite) in BUILT_IN {
            assert!(there.contains(&suite), "{name}");
        }
    }
}
