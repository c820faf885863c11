//! The integration tests: one binary, one link.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests; allow-unwrap-in-tests sees only #[test] bodies"
)]

mod service;
