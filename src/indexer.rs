//! The kv-indexer service: configuration, gRPC, HTTP admin, wiring.

pub mod api;
pub mod args;
pub mod command;
pub mod config;
mod error;
pub mod explain;
pub mod metrics;
mod pods;
pub mod ready;
pub mod registry;
mod run;
pub mod server;
pub mod service;
pub mod snapshot;
mod tokenizers;

pub use self::{
    api::ApiConfig,
    config::IndexerConfig,
    error::ScoreError,
    run::{Addresses, run},
};
pub use crate::ingest::speculation;
