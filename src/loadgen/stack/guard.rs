//! The child's side: it ends when its parent does.

use std::{
    ffi::OsString,
    io::{self, Read as _, Write},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tokio_util::sync::CancellationToken;

/// How often a guard looks at what it guards.
const LOOK: Duration = Duration::from_millis(10);

/// Cancels `stop` when standard input ends: when the parent closes it, or is gone. Watches on a thread
/// of its own, which ends with the process.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn stop_with_parent(stop: CancellationToken) -> io::Result<()> {
    let watch = move || {
        let mut byte = [0];
        while matches!(io::stdin().read(&mut byte), Ok(1..)) {}
        stop.cancel();
    };
    thread::Builder::new().name("parent".to_owned()).spawn(watch).map(drop)
}

/// Runs a program that does not know of us until `stop`, then kills it. Writes its process id to `out`;
/// its own output is ours.
///
/// # Errors
///
/// A program that cannot be started, or fails.
pub async fn run(
    line: Vec<OsString>,
    stop: CancellationToken,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let (program, arguments) = line.split_first().context("no program")?;
    let mut process = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let announced = writeln!(out, "pid {}", process.id()).and_then(|()| out.flush());
    while !stop.is_cancelled() {
        if let Some(status) = process.try_wait()? {
            ensure!(status.success(), "{}: {status}", program.display());
            return Ok(());
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    process.kill()?;
    process.wait()?;
    announced.context("telling its process id")
}
