//! Bursts of events without engines.

use std::{fmt, str::FromStr};

/// What is injected: `publishers=4,rate=20000,burst=50000,interval=5s,…`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StormOptions {}

impl FromStr for StormOptions {
    type Err = String;

    fn from_str(_: &str) -> Result<Self, String> {
        Err("not built yet".to_owned())
    }
}

impl fmt::Display for StormOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("")
    }
}
