//! `Snapshot`: the index as the bytes of a snapshot file, as fast as the caller takes them.
//!
//! A thread copies one row at a time and writes it into a short queue; when the queue is full it
//! waits, holding nothing but that copy. A caller that stops reading is given up after a while, and
//! so is everybody at shutdown.

use std::{
    io::{self, Write},
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
};
use tonic::Status;

use crate::{
    indexer::{
        ScoreError,
        service::{Inner, Service, answers::Answers},
    },
    ingest::snapshot::Source,
    proto::kvindexer::SnapshotChunk,
};

/// Bytes of a chunk.
const CHUNK: usize = 64 << 10;
/// Chunks that wait for the caller.
const QUEUE: usize = 8;
/// How long a caller may not read.
const STALL: Duration = Duration::from_secs(30);

/// Where snapshots come from, and how many may be under way.
#[derive(Debug)]
pub(super) struct Streams {
    source: Arc<dyn Source>,
    permits: Arc<Semaphore>,
}

pub(super) type Slot = OnceLock<Streams>;

impl Service {
    /// Answers `Snapshot` from `source` from now on, to `most` callers at a time. Only the first
    /// call has an effect; before it, the answer is UNIMPLEMENTED.
    pub fn serve_snapshots(&self, source: Arc<dyn Source>, most: usize) {
        let permits = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        self.inner.snapshots.get_or_init(|| Streams { source, permits });
    }
}

/// The chunks of one call.
pub(super) fn stream(inner: &Arc<Inner>) -> Result<Answers<SnapshotChunk>, Status> {
    let Some(streams) = inner.snapshots.get() else {
        return Err(ScoreError::Unimplemented("Snapshot").into());
    };
    let permit = Arc::clone(&streams.permits).try_acquire_owned().map_err(|_| {
        Status::resource_exhausted("as many snapshots as configured are under way; ask later")
    })?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let source = Arc::clone(&streams.source);
    let mut out = Chunks { sender, buffer: Vec::with_capacity(CHUNK), runtime: Handle::current() };
    drop(inner.tasks.spawn_blocking(move || {
        let written = source.write(&mut out).and_then(|_| out.flush());
        if let Err(error) = written {
            tracing::warn!(%error, "A snapshot was not sent in full.");
            out.send(Err(Status::unavailable("the snapshot is not complete"))).unwrap_or_default();
        }
        drop(permit);
    }));
    let stop = inner.stop.clone();
    Ok(Answers::new((receiver, false), move |(mut receiver, ended)| {
        let stop = stop.clone();
        async move {
            if ended {
                return None;
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    receiver.close();
                    Some((Err(ScoreError::ShuttingDown.into()), (receiver, true)))
                }
                chunk = receiver.recv() => chunk.map(|chunk| (chunk, (receiver, false))),
            }
        }
    }))
}

/// Makes chunks of what is written.
struct Chunks {
    sender: mpsc::Sender<Result<SnapshotChunk, Status>>,
    buffer: Vec<u8>,
    runtime: Handle,
}

impl Chunks {
    fn send(&self, chunk: Result<SnapshotChunk, Status>) -> io::Result<()> {
        let sent = self.runtime.block_on(self.sender.send_timeout(chunk, STALL));
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the caller does not read"))
    }
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.send(Ok(SnapshotChunk { data }))
    }
}
