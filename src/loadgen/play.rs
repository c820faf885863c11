//! `loadgen replay`: plays recorded files as the engines that sent them.
//!
//! Each rank of each file is a publisher with its own thread. Rank `r` of the first file publishes at
//! the port of `--publish` plus `r`, which is vLLM's rule; the next file goes on after the ranks of
//! the one before. Where a stream's sequence falls, the recorded engine was restarted, and so is the
//! publisher.

use std::{
    io::Write,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::loadgen::{
    recording::{RankStream, Recording},
    replay::{Publisher, PublisherOptions, ReplayForm},
};

/// Distance between a publisher's port and that of its replay socket, unless `--replay-bind` says
/// otherwise.
const REPLAY_PORT_OFFSET: u16 = 100;
/// How often a publisher that waits looks whether it should stop.
const SLICE: Duration = Duration::from_millis(50);
/// How often a publisher reports its progress.
const PROGRESS: Duration = Duration::from_secs(1);

/// Arguments of `loadgen replay`.
#[derive(Clone, Debug, clap::Args)]
pub struct PlayOptions {
    /// Recorded streams (JSON lines with rank, topic, seq, payload_b64; may be gzip-compressed).
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Where rank 0 of the first file publishes; every further publisher takes the next port. Port *
    /// = each takes a free one.
    #[arg(long, value_name = "ENDPOINT", default_value = "tcp://127.0.0.1:5557")]
    pub publish: String,
    /// Where its replay socket binds, likewise; `off` = no replay sockets. Default: 100 ports above
    /// --publish.
    #[arg(long, value_name = "ENDPOINT")]
    pub replay_bind: Option<String>,
    /// Layout of replay answers: with or without the topic.
    #[arg(long, value_enum, default_value = "three")]
    pub replay_form: ReplayForm,
    /// Batches that a replay can return.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub buffer_steps: usize,
    /// Multiple of the recorded pace (arrival times, else the timestamps in the batches); 0 = as fast
    /// as possible.
    #[arg(long, value_name = "N", default_value_t = 0.0)]
    pub speed: f64,
    /// Hold each stream back, also after a restart in it, until somebody subscribes; give up after so
    /// many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub wait_subscriber: Option<f64>,
    /// Begin again after the last batch, as an engine that was restarted, until interrupted.
    #[arg(long = "loop")]
    pub repeat: bool,
    /// Keep answering replay requests for so many seconds after the last batch.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub serve_after: f64,
}

/// One publisher's part of the work.
struct Job {
    file: PathBuf,
    stream: Arc<RankStream>,
    publish: String,
    options: PublisherOptions,
}

/// What one publisher did.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    batches: u64,
    bytes: u64,
    restarts: u64,
    took: Duration,
}

/// Plays the files until they are through or `stop` is set. Addresses and summary go to `out`,
/// progress to `progress`, in plain lines.
///
/// # Errors
///
/// Unreadable files, endpoints that cannot be bound, a subscriber that does not come.
pub fn run(
    options: &PlayOptions,
    stop: &AtomicBool,
    out: &mut dyn Write,
    progress: &mut dyn Write,
) -> Result<()> {
    if !(options.speed.is_finite() && options.speed >= 0.0) {
        bail!("--speed is a multiple of the recorded pace, 0 or more");
    }
    seconds(options.wait_subscriber.unwrap_or_default(), "--wait-subscriber")?;
    seconds(options.serve_after, "--serve-after")?;
    let jobs = jobs(options)?;
    let (lines, printed) = mpsc::sync_channel::<String>(64);
    thread::scope(|scope| {
        let mut workers = Vec::new();
        let mut failure = None;
        for job in &jobs {
            let (bound, wait) = mpsc::sync_channel(1);
            let (go, start) = mpsc::sync_channel::<()>(1);
            let lines = lines.clone();
            let worker = scope.spawn(move || work(job, options, stop, &bound, &start, &lines));
            let name = format!("{} rank {}", job.file.display(), job.stream.rank);
            workers.push((name.clone(), go, worker));
            // A worker that cannot bind ends without reporting; its error comes with the join.
            let Ok((endpoint, replay)) = wait.recv() else {
                stop.store(true, Ordering::Relaxed);
                break;
            };
            let replay: String = replay.unwrap_or_else(|| "none".to_owned());
            writeln!(out, "publishing {name} on {endpoint} (replay {replay})")?;
        }
        out.flush()?;
        drop(lines);
        for (_, go, _) in &workers {
            if go.send(()).is_err() {
                // That worker is gone already; its error comes with the join.
                stop.store(true, Ordering::Relaxed);
            }
        }
        for line in printed {
            writeln!(progress, "{line}")?;
        }
        let mut total = Done::default();
        for (name, _, worker) in workers {
            match worker.join() {
                Ok(Ok(done)) => {
                    let Done { batches, bytes, restarts, took } = done;
                    writeln!(
                        out,
                        "published {name}: {batches} batches, {bytes} payload bytes, {restarts} \
                         restarts in {:.3} s",
                        took.as_secs_f64(),
                    )?;
                    total.batches += batches;
                    total.bytes += bytes;
                }
                Ok(Err(error)) => failure = failure.or(Some(error.context(name))),
                Err(_) => bail!("{name}: the publisher's thread panicked"),
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        writeln!(out, "total: {} batches, {} payload bytes", total.batches, total.bytes)?;
        Ok(())
    })
}

fn jobs(options: &PlayOptions) -> Result<Vec<Job>> {
    let replay_base = match options.replay_bind.as_deref() {
        Some("off") => None,
        Some(endpoint) => Some(endpoint.to_owned()),
        None => Some(shift_port(&options.publish, u32::from(REPLAY_PORT_OFFSET))?),
    };
    let mut jobs = Vec::new();
    let mut first_port = 0_u32;
    for file in &options.files {
        let recording = Recording::open(file)?;
        let mut ports = 0;
        for stream in recording.ranks {
            let offset = first_port.saturating_add(stream.rank);
            ports = ports.max(stream.rank.saturating_add(1));
            jobs.push(Job {
                file: file.clone(),
                publish: shift_port(&options.publish, offset)?,
                options: PublisherOptions {
                    replay: replay_base.as_deref().map(|at| shift_port(at, offset)).transpose()?,
                    form: options.replay_form,
                    buffer_steps: options.buffer_steps,
                    ..PublisherOptions::default()
                },
                stream,
            });
        }
        first_port = first_port.saturating_add(ports);
    }
    Ok(jobs)
}

/// One publisher, from bind to the last batch.
fn work(
    job: &Job,
    options: &PlayOptions,
    stop: &AtomicBool,
    bound: &mpsc::SyncSender<(String, Option<String>)>,
    start: &mpsc::Receiver<()>,
    lines: &mpsc::SyncSender<String>,
) -> Result<Done> {
    let mut publisher =
        Publisher::bind(Arc::clone(&job.stream), &job.publish, job.options.clone())?;
    let replay = publisher.replay_endpoint().map(str::to_owned);
    bound.send((publisher.endpoint().to_owned(), replay)).context("nobody waits any more")?;
    start.recv().context("the start was called off")?;
    let began = Instant::now();
    let mut done = Done::default();
    let outcome = loop {
        let outcome = play_once(job, &mut publisher, options, stop, lines, &mut done);
        if outcome.is_err() || !options.repeat || stop.load(Ordering::Relaxed) {
            break outcome;
        }
        publisher.rewind()?;
        done.restarts += 1;
    };
    done.took = began.elapsed();
    outcome?;
    wait_until(Instant::now() + seconds(options.serve_after, "--serve-after")?, stop);
    Ok(done)
}

fn play_once(
    job: &Job,
    publisher: &mut Publisher,
    options: &PlayOptions,
    stop: &AtomicBool,
    lines: &mpsc::SyncSender<String>,
    done: &mut Done,
) -> Result<()> {
    wait_for_subscriber(publisher, options, stop)?;
    let (began, first) = (Instant::now(), publisher.peek().and_then(|batch| batch.time()));
    let (mut previous, mut reported) = (None, Instant::now());
    let mut in_stream = 0_usize;
    while let Some(batch) = publisher.peek() {
        let (sequence, bytes, time) = (batch.sequence, batch.payload.len(), batch.time());
        if let (true, Some(first), Some(time)) = (options.speed > 0.0, first, time) {
            let after = ((time - first) / options.speed).max(0.0);
            if let Ok(after) = Duration::try_from_secs_f64(after) {
                wait_until(began + after, stop);
            }
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        if previous.is_some_and(|previous| sequence < previous) {
            publisher.restart()?;
            done.restarts += 1;
            wait_for_subscriber(publisher, options, stop)?;
        }
        publisher.publish_next()?;
        previous = Some(sequence);
        in_stream += 1;
        done.batches += 1;
        done.bytes += bytes as u64;
        if reported.elapsed() >= PROGRESS {
            reported = Instant::now();
            let (file, rank) = (job.file.display(), job.stream.rank);
            let all = job.stream.batches.len();
            lines.send(format!("{file} rank {rank}: {in_stream} of {all} batches"))?;
        }
    }
    Ok(())
}

fn wait_for_subscriber(
    publisher: &mut Publisher,
    options: &PlayOptions,
    stop: &AtomicBool,
) -> Result<()> {
    let Some(patience) = options.wait_subscriber else { return Ok(()) };
    let deadline = Instant::now() + seconds(patience, "--wait-subscriber")?;
    while !publisher.wait_for_subscriber(SLICE)? {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("no subscriber on {} within {patience} s", publisher.endpoint());
        }
    }
    Ok(())
}

fn wait_until(when: Instant, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let left = when.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left.min(SLICE));
    }
}

fn seconds(value: f64, flag: &str) -> Result<Duration> {
    Duration::try_from_secs_f64(value).with_context(|| format!("{flag} {value}"))
}

/// `tcp://host:port` with the port `by` higher; port `*` or 0 stays the operating system's choice.
fn shift_port(endpoint: &str, by: u32) -> Result<String> {
    let parsed = endpoint.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':'));
    let Some((host, port)) = parsed else {
        bail!("{endpoint:?} is not tcp://HOST:PORT");
    };
    if port == "*" || port == "0" {
        return Ok(format!("tcp://{host}:*"));
    }
    let base: u16 = port.parse().with_context(|| format!("port of {endpoint:?}"))?;
    let port = u16::try_from(u32::from(base).saturating_add(by))
        .with_context(|| format!("{endpoint:?} plus {by} is no port"))?;
    Ok(format!("tcp://{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(endpoint: &str, by: u32, expected: Option<&str>) {
        assert_eq!(shift_port(endpoint, by).ok().as_deref(), expected);
    }

    #[test]
    fn ports_count_up() {
        check("tcp://127.0.0.1:5557", 0, Some("tcp://127.0.0.1:5557"));
        check("tcp://127.0.0.1:5557", 101, Some("tcp://127.0.0.1:5658"));
        check("tcp://[::1]:5557", 1, Some("tcp://[::1]:5558"));
        check("tcp://*:*", 3, Some("tcp://*:*"));
        check("tcp://127.0.0.1:0", 3, Some("tcp://127.0.0.1:*"));
        check("tcp://127.0.0.1:65535", 1, None);
        check("ipc:///tmp/x", 0, None);
        check("tcp://127.0.0.1", 0, None);
    }
}
