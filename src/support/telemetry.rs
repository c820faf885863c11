//! Logs: structured, to stderr, as text for people or JSON for collectors.

use std::{
    io::{self, Write},
    str::FromStr,
};

use anyhow::Context as _;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line for people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

impl LogFormat {
    /// Every format and its name in configuration.
    pub const NAMES: [(&'static str, Self); 2] = [("text", Self::Text), ("json", Self::Json)];

    /// Name in configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|&(_, format)| format).ok_or_else(|| format!("{name:?} is neither text nor json"))
    }
}

/// Checks a log level: `info`, or directives by module such as `info,hyper=warn`.
///
/// # Errors
///
/// In words. The filter's own parser would take a misspelt level for the name of a module.
pub fn check_level(directives: &str) -> Result<(), String> {
    const LEVELS: &str = "must be error, warn, info, debug, trace or off, \
                          or a list such as `info,hyper=warn`";
    for part in directives.split(',') {
        let level = part.split_once('=').map_or(part, |(_, level)| level);
        if LevelFilter::from_str(level.trim()).is_err() || level.trim().is_empty() {
            return Err(format!("{part:?} is no log level; {LEVELS}"));
        }
    }
    EnvFilter::try_new(directives).map(drop).map_err(|error| format!("{error}; {LEVELS}"))
}

/// Starts logging. `RUST_LOG`, where set and not empty, replaces `level`.
///
/// # Errors
///
/// When the directives cannot be parsed or logging runs already.
pub fn init(format: LogFormat, level: &str) -> anyhow::Result<()> {
    let from_env = std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.is_empty());
    let directives = from_env.as_deref().unwrap_or(level);
    let filter = EnvFilter::try_new(directives)
        .with_context(|| format!("parsing the log level {directives:?}"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Careless(std::io::stderr()))
        .log_internal_errors(false);
    let started = match format {
        LogFormat::Text => {
            let color = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(color).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::format_err!("{error}")).context("starting the log")
}

/// A writer that loses what cannot be written: a full disk or a closed pipe behind the log must
/// not stop the service, and there is nowhere left to say so.
#[derive(Debug)]
struct Careless<W>(W);

impl<W: Write> Write for Careless<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.0.write(bytes).unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().or(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_is_lost() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut log = Careless(Full);
        log.write_all(b"line").unwrap();
        log.flush().unwrap();
    }

    #[test]
    fn levels_are_checked() {
        for good in ["info", "off", "INFO", "debug,hyper=warn", "warn,kv_indexer::ingest=trace"] {
            assert_eq!(check_level(good), Ok(()), "{good}");
        }
        for bad in ["", "infoo", "info,", "hyper=loud", "verbose"] {
            assert!(check_level(bad).unwrap_err().contains("no log level"), "{bad}");
        }
    }

    #[test]
    fn formats_have_names() {
        for (name, format) in LogFormat::NAMES {
            assert_eq!(name.parse::<LogFormat>().unwrap(), format);
            assert_eq!(format.as_str(), name);
        }
        assert!("yaml".parse::<LogFormat>().unwrap_err().contains("json"));
    }
}
