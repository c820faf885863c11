//! CURVE: encrypted ZeroMQ connections, where libzmq is built with it.
//!
//! Where we connect (streams and replay sockets of pods), engines have one key pair, whose public key
//! is [`CurveConfig::server_key`]. Where we bind, we are the server: engines must know our public key,
//! and any engine that does may connect, since keys of clients are not checked.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Bytes of a key.
const KEY: usize = 32;

/// Our keys and the engines'. Keys are in Z85, 40 characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CurveConfig {
    /// Our public key.
    pub public_key: String,
    /// File with our secret key.
    pub secret_key_file: PathBuf,
    /// Public key of the engines that we connect to. `None`: we connect to none.
    pub server_key: Option<String>,
}

impl CurveConfig {
    /// Reads a key's text.
    ///
    /// # Errors
    ///
    /// What is wrong with it; the key is not repeated.
    pub fn key(text: &str) -> Result<Vec<u8>, String> {
        let wrong = || "is no key in Z85 of 40 characters".to_owned();
        zmq::z85_decode(text).ok().filter(|key| key.len() == KEY).ok_or_else(wrong)
    }
}

/// Keys as sockets take them.
pub(crate) struct Keys {
    public: Vec<u8>,
    secret: Vec<u8>,
    server: Option<Vec<u8>>,
}

impl Keys {
    /// Reads the keys.
    ///
    /// # Errors
    ///
    /// A libzmq without CURVE, a file that cannot be read, or something else than keys.
    pub(crate) fn load(config: &CurveConfig) -> anyhow::Result<Self> {
        anyhow::ensure!(
            zmq::has("curve") == Some(true),
            "kvEventsConfig.curve: the libzmq of this program is built without CURVE, which needs \
             libsodium; without the setting, streams are not encrypted"
        );
        Self::read(config)
    }

    fn read(config: &CurveConfig) -> anyhow::Result<Self> {
        let key = |text: &str, field: &str| {
            CurveConfig::key(text)
                .map_err(|why| anyhow::anyhow!("kvEventsConfig.curve.{field} {why}"))
        };
        let path: &Path = &config.secret_key_file;
        let secret = std::fs::read_to_string(path).with_context(|| {
            format!("kvEventsConfig.curve.secretKeyFile: reading {}", path.display())
        })?;
        Ok(Self {
            public: key(&config.public_key, "publicKey")?,
            secret: key(secret.trim(), "secretKeyFile")?,
            server: config.server_key.as_deref().map(|text| key(text, "serverKey")).transpose()?,
        })
    }

    /// Before the socket connects to an engine.
    ///
    /// # Errors
    ///
    /// libzmq's; `EINVAL` without a server key.
    pub(crate) fn connect(&self, socket: &zmq::Socket) -> zmq::Result<()> {
        socket.set_curve_serverkey(self.server.as_deref().ok_or(zmq::Error::EINVAL)?)?;
        socket.set_curve_publickey(&self.public)?;
        socket.set_curve_secretkey(&self.secret)
    }

    /// Before the socket is bound.
    ///
    /// # Errors
    ///
    /// libzmq's.
    pub(crate) fn bind(&self, socket: &zmq::Socket) -> zmq::Result<()> {
        socket.set_curve_server(true)?;
        socket.set_curve_secretkey(&self.secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the specification of ZeroMQ (RFC 26's test keys are pairs; any 32 bytes will do here).
    const ANY: &str = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7";

    fn config(directory: &Path, secret: &str) -> CurveConfig {
        let secret_key_file = directory.join("secret");
        std::fs::write(&secret_key_file, secret).unwrap();
        let server_key = Some(ANY.to_owned());
        CurveConfig { public_key: ANY.to_owned(), secret_key_file, server_key }
    }

    #[test]
    fn keys_are_read_and_never_repeated() {
        let directory = tempfile::tempdir().unwrap();
        let keys = Keys::read(&config(directory.path(), &format!("{ANY}\n"))).unwrap();
        assert_eq!((keys.public.len(), keys.secret.len()), (KEY, KEY));
        let error = |config: &CurveConfig| {
            Keys::read(config).map(|_| ()).map_err(|error| format!("{error:#}")).unwrap_err()
        };
        let short = error(&config(directory.path(), "secret"));
        assert!(
            short.contains("secretKeyFile is no key") && !short.contains("\"secret\""),
            "{short}"
        );
        let mut wrong = config(directory.path(), ANY);
        wrong.server_key = Some("x".to_owned());
        assert!(error(&wrong).contains("serverKey"));
        wrong.secret_key_file = "/nonexistent".into();
        assert!(error(&wrong).contains("/nonexistent"));
    }

    #[test]
    fn a_libzmq_without_curve_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let loaded = Keys::load(&config(directory.path(), ANY));
        if zmq::has("curve") == Some(true) {
            loaded.unwrap();
        } else {
            let error = loaded.map(|_| ()).unwrap_err().to_string();
            assert!(
                error.contains("kvEventsConfig.curve") && error.contains("libsodium"),
                "{error}"
            );
        }
    }
}
