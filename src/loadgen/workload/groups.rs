//! Who shares what.

use std::{fmt, str::FromStr};

use super::Planned;

/// A kind of traffic and its measures: `shared-prefix:groups=150,prompts=5,system=6000,…`.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {}

impl Workload {
    /// `count` requests without arrivals, in the order in which they are to be sent.
    #[must_use]
    pub fn requests(&self, seed: u64, count: usize) -> Vec<Planned> {
        let (_, _) = (seed, count);
        Vec::new()
    }

    /// One pass over everything that is asked for again and again, for warming up; empty if nothing is.
    #[must_use]
    pub fn residents(&self, seed: u64) -> Vec<Planned> {
        let _ = seed;
        Vec::new()
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(_: &str) -> Result<Self, String> {
        Err("not built yet".to_owned())
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("")
    }
}
