//! Routing policies, and what each one is made of.
//!
//! # Weights
//!
//! What is compared is what is known of prefixes, so all else is the same: queue 2 and KV-cache use 2, as
//! in llm-d's published comparison, from pages that are scraped equally often; and prefixes 3 where there
//! are any. Token loads and requests in flight, which `epp` could weigh as well, are in no policy.
//!
//! The approximate policy has llm-d's default limits: 31 250 blocks for each endpoint, and 256 blocks of
//! a prompt, which the present plugin wants in tokens. Its blocks have at least 64 tokens, as llm-d's; in
//! the published comparison they had 64 characters, so there the limits are given.
//!
//! Prompts that are token ids need no tokenizer anywhere. For text, both policies that know prefixes can
//! ask an engine for the ids; else the precise one has nothing to ask the indexer, and falls back to
//! approximate scores, which is counted.

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs as _},
    str::FromStr,
};

/// Tokens of a block of the approximate policy at least.
pub const APPROXIMATE_BLOCK: usize = 64;

/// What the approximate policy looks at and remembers, in its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApproximateLimits {
    /// Of a prompt, from its beginning; at least 1.
    pub prompt: usize,
    /// Of each endpoint; at least 1.
    pub endpoint: usize,
}

impl Default for ApproximateLimits {
    fn default() -> Self {
        Self { prompt: 256, endpoint: 31_250 }
    }
}

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

    /// `epp`'s configuration; `None` where another endpoint picker decides, or there is no indexer for
    /// one that needs it.
    pub(super) fn document(&self, around: &Surroundings<'_>) -> Option<String> {
        let Surroundings { block_size, approximate, indexer, want_hits, model, render } = *around;
        let prefix = match self {
            Self::RoundRobin | Self::Constant | Self::External { .. } => return None,
            Self::Random => {
                return Some(document("- type: random-picker\n", "  - pluginRef: random-picker\n"));
            }
            Self::LeastLoad => return Some(document(LOAD_PLUGINS, LOAD_WEIGHTS)),
            Self::Approximate => {
                let block = block_size.max(APPROXIMATE_BLOCK);
                format!(
                    "- type: approx-prefix-cache-producer\n  \
                       parameters:\n    \
                         autoTune: false\n    \
                         blockSizeTokens: {block}\n    \
                         maxPrefixTokensToMatch: {}\n    \
                         lruCapacityPerServer: {}\n\
                     - type: prefix-cache-scorer\n",
                    approximate.prompt * block,
                    approximate.endpoint
                )
            }
            Self::Precise => format!(
                "- type: precise-prefix-cache-scorer\n  \
                   parameters:\n    \
                     indexerService: {{address: '{}'}}\n    \
                     speculativeIndexing: true\n    \
                     accuracy: {{metadata: {want_hits}, includeUsage: false}}\n",
                indexer?
            ),
        };
        let scorer = match self {
            Self::Precise => "precise-prefix-cache-scorer",
            _ => "prefix-cache-scorer",
        };
        let tokens = match render {
            None => String::new(),
            Some(engine) => format!(
                "- type: token-producer\n  \
                   parameters: {{vllm: {{url: 'http://{engine}'}}, modelName: '{model}'}}\n"
            ),
        };
        let weights = format!("  - {{pluginRef: {scorer}, weight: 3}}\n{LOAD_WEIGHTS}");
        Some(document(&format!("{tokens}{prefix}{LOAD_PLUGINS}"), &weights))
    }
}

/// What an endpoint picker has around it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Surroundings<'a> {
    /// Tokens per block of the engines.
    pub(super) block_size: usize,
    /// Of the approximate policy.
    pub(super) approximate: ApproximateLimits,
    /// The indexer's gRPC address.
    pub(super) indexer: Option<SocketAddr>,
    /// Predictions come with the end of each response.
    pub(super) want_hits: bool,
    /// Served model name.
    pub(super) model: &'a str,
    /// The engine that makes token ids of text; `None` = prompts are ids.
    pub(super) render: Option<SocketAddr>,
}

const LOAD_PLUGINS: &str = "- type: queue-scorer\n\
                            - type: kv-cache-utilization-scorer\n\
                            - type: max-score-picker\n";
const LOAD_WEIGHTS: &str = "  - {pluginRef: queue-scorer, weight: 2}\n  \
                              - {pluginRef: kv-cache-utilization-scorer, weight: 2}\n  \
                              - pluginRef: max-score-picker\n";

fn document(plugins: &str, profile: &str) -> String {
    format!(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n{plugins}\
         - type: single-profile-handler\nschedulingProfiles:\n- name: default\n  plugins:\n{profile}"
    )
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

    /// The names above, or `external:NAME=host:port[,pid]`, whose host is looked up at once.
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "random" => Self::Random,
            "round-robin" => Self::RoundRobin,
            "least-load" | "load" => Self::LeastLoad,
            "approximate" | "approx" => Self::Approximate,
            "precise" => Self::Precise,
            "constant" => Self::Constant,
            _ => match text.strip_prefix("external:") {
                Some(external) => self::external(external)?,
                None => {
                    return Err(format!(
                        "{text:?} is no policy: random, round-robin, least-load, approximate, precise, \
                         constant, or external:NAME=host:port[,pid]"
                    ));
                }
            },
        })
    }
}

fn external(text: &str) -> Result<Policy, String> {
    let (name, rest) = text.split_once('=').unwrap_or((text, ""));
    let (address, pid) = match rest.split_once(',') {
        None => (rest, None),
        Some((address, pid)) => (address, Some(pid)),
    };
    if name.is_empty() || address.is_empty() {
        return Err(format!("external:{text}: want external:NAME=host:port[,pid]"));
    }
    let found = address.to_socket_addrs().map_err(|error| format!("{address:?}: {error}"))?;
    // gRPC servers that listen on one family only mostly listen on IPv4.
    let mut found: Vec<_> = found.collect();
    found.sort_by_key(SocketAddr::is_ipv6);
    let address = *found.first().ok_or_else(|| format!("{address:?} has no address"))?;
    let number = |pid: &str| match pid.parse() {
        Ok(0) | Err(_) => Err(format!("{pid:?} is no process id")),
        Ok(pid) => Ok(pid),
    };
    Ok(Policy::External { name: name.to_owned(), address, pid: pid.map(number).transpose()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for policy in Policy::ALL.into_iter().chain([Policy::Constant]) {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
    }

    #[test]
    fn external_pickers_have_names_addresses_and_pids() {
        #[track_caller]
        fn check(text: &str, want: Result<(&str, &str, Option<u32>), &str>) {
            let want = want.map(|(name, address, pid)| {
                let address = address.parse().unwrap();
                Policy::External { name: name.to_owned(), address, pid }
            });
            match (text.parse::<Policy>(), want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want),
                (Err(got), Err(part)) => assert!(got.contains(part), "{got}"),
                (got, want) => panic!("{text}: {got:?}, not {want:?}"),
            }
        }
        check("external:go=127.0.0.1:9002", Ok(("go", "127.0.0.1:9002", None)));
        check("external:go=127.0.0.1:9002,17", Ok(("go", "127.0.0.1:9002", Some(17))));
        check("external:a=[::1]:9002", Ok(("a", "[::1]:9002", None)));
        check("external:go", Err("want external:NAME="));
        check("external:=127.0.0.1:1", Err("want external:NAME="));
        check("external:go=127.0.0.1", Err("127.0.0.1"));
        check("external:go=127.0.0.1:1,x", Err("\"x\" is no process id"));
        check("nearest", Err("\"nearest\" is no policy"));
    }

    #[test]
    fn all_but_prefixes_weighs_the_same() {
        let address = Some(([127, 0, 0, 1], 50_051).into());
        let alone = Surroundings {
            block_size: 16,
            approximate: ApproximateLimits::default(),
            indexer: None,
            want_hits: true,
            model: "mock",
            render: None,
        };
        let around = Surroundings { indexer: address, render: address, ..alone };
        for policy in [Policy::LeastLoad, Policy::Approximate, Policy::Precise] {
            let document = policy.document(&around).unwrap();
            assert!(document.contains(LOAD_WEIGHTS), "{document}");
            let prefixes = policy != Policy::LeastLoad;
            assert_eq!(document.contains("weight: 3"), prefixes, "{document}");
            assert_eq!(document.contains("token-producer"), prefixes, "{document}");
        }
        assert_eq!(Policy::Precise.document(&alone), None);
        assert_eq!(Policy::Constant.document(&around), None);
    }
}
