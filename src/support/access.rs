//! Who may use what is not for everybody: bearer tokens from a file.
//!
//! A file holds one token a line, so that a new one can be valid beside the old one while callers
//! change. Tokens are compared in constant time, and never logged or shown.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use subtle::{Choice, ConstantTimeEq as _};
use tokio_util::sync::CancellationToken;

use crate::support::reload::{self, ReloadMetrics};

/// Shorter tokens can be guessed.
const LEAST_BYTES: usize = 16;

/// Longer files hold something else.
const MOST_BYTES: u64 = 64 << 10;

/// Why a file of tokens cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It cannot be read.
    #[error("reading {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has something else than tokens, or none.
    #[error("{path}: {why}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The tokens of a file. Clones share them.
#[derive(Clone)]
pub struct Tokens {
    path: Arc<Path>,
    current: Arc<ArcSwap<Vec<Vec<u8>>>>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tokens").field(&self.path).finish()
    }
}

impl Tokens {
    /// Reads a file: one token a line, of 16 printable characters or more; empty lines do not count.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or holds no token or something else.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let tokens = read(path)?;
        Ok(Self { path: path.into(), current: Arc::new(ArcSwap::from_pointee(tokens)) })
    }

    /// Looks at the file each second until `stop`, and takes over what changed. A file that cannot be
    /// used leaves the old tokens valid.
    ///
    /// # Errors
    ///
    /// Never; a supervised task wants a result.
    pub async fn follow(
        self,
        metrics: ReloadMetrics,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let (path, first) = (Arc::clone(&self.path), self.current.load().to_vec());
        let take = |tokens: &Vec<Vec<u8>>| {
            self.current.store(Arc::new(tokens.clone()));
            Ok(())
        };
        reload::follow("auth.tokenFile", first, move || Ok(read(&path)?), take, metrics, stop).await
    }

    /// The value of an `Authorization` header with the first token: what a caller sends who has the
    /// file, too.
    #[must_use]
    pub fn authorization(&self) -> String {
        let current = self.current.load();
        let first = current.first().map(Vec::as_slice).unwrap_or_default();
        format!("Bearer {}", String::from_utf8_lossy(first))
    }

    /// Is one of the tokens in this value of an `Authorization` header?
    #[must_use]
    pub fn admit(&self, authorization: &[u8]) -> bool {
        const SCHEME: &[u8] = b"bearer ";
        let Some((scheme, given)) = authorization.split_at_checked(SCHEME.len()) else {
            return false;
        };
        let given = given.trim_ascii();
        // All are compared, so that the time does not tell which one was nearly right.
        let found = self
            .current
            .load()
            .iter()
            .fold(Choice::from(0), |found, token| found | token.as_slice().ct_eq(given));
        scheme.eq_ignore_ascii_case(SCHEME) && bool::from(found)
    }
}

fn read(path: &Path) -> Result<Vec<Vec<u8>>, TokenError> {
    let content = |why: String| TokenError::Content { path: path.to_owned(), why };
    let failed = |source| TokenError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > MOST_BYTES {
        return Err(content(format!("longer than {MOST_BYTES} bytes")));
    }
    let text = fs::read(path).map_err(failed)?;
    let lines = text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let mut tokens = Vec::new();
    for (number, line) in (1..).zip(lines).filter(|(_, line)| !line.is_empty()) {
        if line.len() < LEAST_BYTES || !line.iter().all(u8::is_ascii_graphic) {
            // Not the line itself: this is logged.
            let why = "is no token of 16 printable characters or more, without blanks";
            return Err(content(format!("line {number} {why}")));
        }
        tokens.push(line.to_vec());
    }
    if tokens.is_empty() {
        return Err(content("holds no token".to_owned()));
    }
    Ok(tokens)
}

/// Who may use what is not for everybody.
#[derive(Clone, Debug, Default)]
pub enum Access {
    /// Whoever can connect.
    #[default]
    Everybody,
    /// Whoever has a token.
    Bearer(Tokens),
    /// Nobody, until a setting says how.
    Nobody {
        /// The setting.
        setting: &'static str,
    },
}

/// Why somebody is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// No token came along.
    #[error("needs a token: send `authorization: Bearer …` with one of `auth.tokenFile`")]
    NoToken,
    /// It is none of ours.
    #[error("the token is not one of `auth.tokenFile`")]
    WrongToken,
    /// There is no token that could be sent.
    #[error("is closed on an address that is not loopback: {0}")]
    Closed(&'static str),
}

impl Denied {
    /// A word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::WrongToken => "wrong_token",
            Self::Closed(_) => "closed",
        }
    }
}

impl Access {
    /// May a caller with this `Authorization` header?
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn check(&self, authorization: Option<&[u8]>) -> Result<(), Denied> {
        match (self, authorization) {
            (Self::Everybody, _) => Ok(()),
            (Self::Nobody { setting }, _) => Err(Denied::Closed(setting)),
            (Self::Bearer(_), None) => Err(Denied::NoToken),
            (Self::Bearer(tokens), Some(given)) if tokens.admit(given) => Ok(()),
            (Self::Bearer(_), Some(_)) => Err(Denied::WrongToken),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "0123456789abcdef";

    #[track_caller]
    fn check(text: &str, authorization: &str, want: bool) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let tokens = Tokens::read(file.path()).unwrap();
        assert_eq!(tokens.admit(authorization.as_bytes()), want, "{text:?} {authorization:?}");
        assert!(!format!("{tokens:?}").contains(OLD));
        assert!(tokens.admit(tokens.authorization().as_bytes()));
        let access = Access::Bearer(tokens);
        assert_eq!(access.check(None), Err(Denied::NoToken));
        let checked = access.check(Some(authorization.as_bytes()));
        assert_eq!(checked, if want { Ok(()) } else { Err(Denied::WrongToken) });
    }

    #[test]
    fn every_line_is_a_token_and_nothing_else_is() {
        check(OLD, "Bearer 0123456789abcdef", true);
        check("new-new-new-new-new\r\n\n0123456789abcdef\n", "bearer 0123456789abcdef ", true);
        check("new-new-new-new-new\n0123456789abcdef", "BEARER new-new-new-new-new", true);
        for wrong in ["", "Bearer", "Bearer ", "Basic 0123456789abcdef", "0123456789abcdef"] {
            check(OLD, wrong, false);
        }
        for wrong in ["0123456789abcde", "0123456789abcdef0", "0123456789abcdeF", "ä"] {
            check(OLD, &format!("Bearer {wrong}"), false);
        }
    }

    #[test]
    fn a_file_without_tokens_is_refused_and_not_repeated() {
        #[track_caller]
        fn check(text: &str, part: &str) {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), text).unwrap();
            let error = Tokens::read(file.path()).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("secret"), "{error}");
        }
        check("", "holds no token");
        check(" \n\n", "holds no token");
        check("secret", "line 1 is no token");
        check(&format!("{OLD}\nsecret secret secret"), "line 2 is no token");
        check(&"x".repeat(70_000), "longer than");
        let error = Tokens::read(Path::new("/nonexistent/token")).unwrap_err().to_string();
        assert_eq!(error, "reading /nonexistent/token");
    }

    #[test]
    fn a_closed_door_names_the_setting() {
        let access = Access::Nobody { setting: "set `auth.tokenFile`" };
        let denied = access.check(Some(b"Bearer x")).unwrap_err();
        assert!(denied.to_string().contains("auth.tokenFile"), "{denied}");
        assert_eq!(denied.reason(), "closed");
        assert_eq!(Access::Everybody.check(None), Ok(()));
    }
}
