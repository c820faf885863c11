//! The ingest path off the good path: the real `kv-indexer`, real sockets, engines that are scripted.
//!
//! * `script`: a line notation for event batches
//! * `engine`: publishers and replay sockets that do as told
//! * `rig`: the indexer under test, and questions to it
//! * the other files: one topic each
//!
//! Numbers such as C42 are the conformance cases of llm-d's indexer that hold here, too.

mod bad_input;
mod bind;
mod conformance;
pub(crate) mod engine;
mod hybrid;
mod identity;
mod lines;
mod loss;
mod orphans;
mod process;
mod replay;
pub(crate) mod rig;
pub(crate) mod script;
mod snapshots;
