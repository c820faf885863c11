//! When requests come.

use std::{fmt, str::FromStr, time::Duration};

/// One arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// From the start of the run.
    pub at: Duration,
    /// Which burst it belongs to, from 0; `None` between bursts.
    pub burst: Option<u32>,
}

/// A process of arrivals, seeded: one generator, computed before the start.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrivals {
    /// Mean rate, requests per second.
    pub rate: f64,
}

impl Arrivals {
    /// Arrivals from 0 to `duration`, in order.
    #[must_use]
    pub fn times(&self, seed: u64, duration: Duration) -> Vec<Arrival> {
        let (_, _) = (seed, duration);
        Vec::new()
    }
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(_: &str) -> Result<Self, String> {
        Err("not built yet".to_owned())
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rate)
    }
}
