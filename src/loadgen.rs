//! The load driver: plays recorded event streams over real sockets, and shows what an indexer makes
//! of them.
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`recording`] | reads recorded streams |
//! | [`replay`] | publishes one rank's stream as its engine did: PUB socket and replay socket |
//! | [`play`] | `loadgen replay`: whole files, paced |
//! | [`demo`] | `loadgen`: an indexer, three pods, measured numbers |

pub mod demo;
pub mod play;
pub mod recording;
pub mod replay;
