//! What is fuzzed: by cargo-fuzz in this package, by `tests/mutate` without a nightly compiler, and the
//! corpora by `tests/it`. One line a target.

use kv_indexer::{epp, indexer, ingest, wire};

/// What has to hold for any bytes; panics where it does not.
type Holds = fn(&[u8]);

/// Name, which is that of the corpus; files that the corpus has at least, so that a lost one is noticed;
/// and the property.
pub(crate) const TARGETS: [(&str, usize, Holds); 9] = [
    ("decode", 1, wire::fuzz::decode_is_total),
    ("topic", 1, wire::fuzz::topic_is_total),
    ("replay_reply", 1, wire::fuzz::replay_reply_is_total),
    ("sequencer", 20, ingest::sequencer::fuzz::is_total),
    ("body", 20, epp::request::fuzz::body_is_total),
    ("exchange", 12, epp::ext_proc::fuzz::is_total),
    ("scrape", 1, epp::datalayer::page::fuzz::scrape_is_total),
    ("request", 9, indexer::service::fuzz::request_is_total),
    ("snapshot", 6, ingest::snapshot::fuzz::is_total),
];
