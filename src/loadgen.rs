//! The load driver: plays recorded event streams over real sockets, shows what an indexer makes of
//! them, and stands in for engines.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`recording`] | reads recorded streams |
//! | [`replay`] | publishes one rank's stream as its engine did: PUB socket and replay socket |
//! | [`play`] | `loadgen replay`: whole files, paced |
//! | [`engine`] | a mock inference engine: vLLM's cache, scheduling, events, HTTP API and metrics |
//! | [`ext_proc`] | `loadgen ext-proc`: Envoy's part towards an endpoint picker, measured |
//! | [`null_pod`] | a pod that computes nothing, for comparisons |
//! | [`demo`] | `loadgen`: an indexer, three pods, measured numbers |

pub mod demo;
pub mod engine;
pub mod ext_proc;
pub mod null_pod;
pub mod play;
pub mod recording;
pub mod replay;
