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
//! | [`workload`] | what is asked, and when; pure |
//! | [`drive`] | sends a plan and notes what each request saw |
//! | [`stack`] | engines, indexer, endpoint picker, gateway: processes that a run is made against |
//! | [`freshness`] | how late the index is; bursts of events |
//! | [`resources`] | what each component costs |
//! | [`stats`] | percentiles, intervals, knees; pure |
//! | [`measure`] | what a run saw, as numbers of the report; is it valid? |
//! | [`environment`] | what a run is made on |
//! | [`progress`] | live numbers |
//! | [`report`] | the document at the end, and what is made from it |
//! | [`capacity`] | published results and our model of them |
//! | [`demo`] | `loadgen`: an indexer, three pods, measured numbers |

pub mod capacity;
pub mod demo;
pub mod drive;
pub mod engine;
pub mod environment;
pub mod ext_proc;
pub mod freshness;
pub mod measure;
pub mod null_pod;
pub mod play;
pub mod progress;
pub mod recording;
pub mod replay;
pub mod report;
pub mod resources;
pub mod scenario;
pub mod stack;
pub mod stats;
pub mod workload;
