//! The kv-indexer service: configuration, gRPC, HTTP admin, wiring.

pub mod api;
mod error;
pub mod metrics;
pub mod ready;
pub mod registry;
pub mod server;
pub mod service;
pub mod speculation;
pub mod tokenize;

pub use self::{api::ApiConfig, error::ScoreError};
