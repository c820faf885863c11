//! What every program of the project needs and none is about: configuration reading, telemetry,
//! process metrics, supervised tasks, watched files, TLS, access, the admin server.
//!
//! Nothing here imports another module of the crate.

pub mod access;
pub mod admin;
pub mod clock;
pub mod fields;
pub mod metrics;
pub mod reload;
pub mod signal;
pub mod sync;
pub mod task;
pub mod telemetry;
pub mod tls;
pub mod units;
pub mod watched;
