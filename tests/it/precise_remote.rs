//! The `kv-indexer` service as the endpoint picker's index, over a real socket: what it answers, what it
//! is down, slow and wrong for, and how it comes back.

mod down;
mod liar;
pub(crate) mod rig;
mod scores;
mod wrong;
