//! The kv-indexer service: configuration, gRPC, HTTP admin, wiring.

pub mod api;

pub use self::api::ApiConfig;
