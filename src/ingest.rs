//! From the engines' ZeroMQ streams to the index.

pub mod fleet;
pub mod sequencer;
