//! From the engines' ZeroMQ streams to the index.

pub mod config;
pub mod discovery;
pub mod fleet;
pub mod sequencer;

pub use self::config::IngestConfig;
