//! What every program of the project needs and none is about: configuration reading, telemetry,
//! process metrics, supervised tasks, watched files, TLS, the admin server.
//!
//! Nothing here imports another module of the crate.

pub mod admin;
pub mod clock;
pub mod fields;
pub mod metrics;
pub mod signal;
pub mod sync;
pub mod task;
pub mod telemetry;
pub mod tls;
pub mod units;
pub mod watched;
