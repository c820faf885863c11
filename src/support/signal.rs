//! SIGTERM and SIGINT → cancellation.

use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Cancels `token` at the first SIGTERM or SIGINT. The listener ends when the result is dropped.
///
/// # Errors
///
/// When a handler cannot be installed.
pub fn cancel_on_terminate(token: CancellationToken) -> std::io::Result<JoinSet<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM received."),
            _ = interrupt.recv() => tracing::info!("SIGINT received."),
        }
        token.cancel();
    });
    Ok(tasks)
}
