//! Routing policies, and what each one is made of.

use std::{fmt, net::SocketAddr, str::FromStr};

/// Who decides where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Policy {
    /// `epp`: any pod.
    Random,
    /// An endpoint picker that names the pods in turn.
    RoundRobin,
    /// `epp`: queue and cache use.
    LeastLoad,
    /// `epp`: the same, and who was sent the prefix before.
    Approximate,
    /// `epp`: the same, and who holds the prefix by the indexer.
    Precise,
    /// An endpoint picker that always names the same pod: the floor of what one costs.
    Constant,
    /// Somebody else's endpoint picker.
    External {
        /// Its name in the report.
        name: String,
        /// Where it listens for `ext_proc`.
        address: SocketAddr,
        /// Its process, if it can be watched.
        pid: Option<u32>,
    },
}

impl Policy {
    /// Those that are compared by default.
    pub const ALL: [Self; 5] =
        [Self::Random, Self::RoundRobin, Self::LeastLoad, Self::Approximate, Self::Precise];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => f.write_str("random"),
            Self::RoundRobin => f.write_str("round-robin"),
            Self::LeastLoad => f.write_str("least-load"),
            Self::Approximate => f.write_str("approximate"),
            Self::Precise => f.write_str("precise"),
            Self::Constant => f.write_str("constant"),
            Self::External { name, .. } => f.write_str(name),
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    /// The names above, or `external:NAME=host:port[,pid]`.
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "random" => Self::Random,
            "round-robin" => Self::RoundRobin,
            "least-load" | "load" => Self::LeastLoad,
            "approximate" | "approx" => Self::Approximate,
            "precise" => Self::Precise,
            "constant" => Self::Constant,
            _ => return Err(format!("{text:?} is no policy")),
        })
    }
}
