//! The kv-indexer service: configuration, gRPC, HTTP admin, wiring.

pub mod api;
pub mod args;
pub mod config;

pub use self::{api::ApiConfig, config::IndexerConfig};
