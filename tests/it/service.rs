//! The gRPC API over a real socket, with a fake index behind it.

mod calls;
mod explain;
mod fake;
mod lifecycle;
mod pods;
mod score;
mod stream;
mod text;
mod tls;

use std::time::Duration;

use tonic::{Code, Status};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(10);

/// The status has this code, and its message starts with this field path.
#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, start: &str) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(
        status.message().starts_with(start),
        "{:?} starts not with {start:?}",
        status.message()
    );
}
