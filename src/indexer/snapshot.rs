//! Snapshots of the running service: when they are written, and what a start makes of one.
//!
//! # Start
//!
//! `--bootstrap-from` asks a peer for its snapshot; without it, or if no peer answers, the one in
//! `snapshot.dir` is loaded. Whatever is wrong with either is said and counted, and the service
//! starts without. All of it comes before the first publisher, since loading needs the index alone.
//!
//! # Failure
//!
//! A snapshot that cannot be written is said and counted, and tried again an interval later. It is
//! never a reason to stop.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::{
    hash::Models,
    indexer::metrics::snapshot::SnapshotMetrics,
    ingest::{
        Ingest,
        fleet::Fleet,
        snapshot::{self, Exported, Source, Store},
    },
    model::TierTable,
    proto::kvindexer::{SnapshotRequest, kv_indexer_client::KvIndexerClient},
    support::{clock::unix_ns, sync::lock},
};

/// How often a peer is asked before the start goes on without it.
const ATTEMPTS: u32 = 3;
/// Between two of them.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a peer may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long it may be silent while it sends. It may be copying a large row.
const SILENCE: Duration = Duration::from_secs(30);
/// Bytes of a chunk that are taken from a peer at most.
const MAX_CHUNK: usize = 4 << 20;

/// When snapshots are written, and what becomes of restored rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotConfig {
    /// Where the snapshot is; none: it is neither written nor loaded.
    pub dir: Option<PathBuf>,
    /// Between two snapshots; zero: none but at shutdown.
    pub interval: Duration,
    /// Write one at shutdown.
    pub at_shutdown: bool,
    /// How long a restored row waits for its publisher to be declared.
    pub grace: Duration,
    /// Callers of `Snapshot` at a time.
    pub max_streams: usize,
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self {
            dir: None,
            interval: Duration::from_secs(60),
            at_shutdown: true,
            grace: Duration::from_secs(60),
            max_streams: 2,
        }
    }
}

/// What a start needs to load a snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Loader {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) models: Models,
    pub(crate) tiers: Arc<TierTable>,
    pub(crate) metrics: SnapshotMetrics,
}

impl Loader {
    /// Takes the peer's snapshot, or else the directory's, or else none. Call it before the first
    /// publisher is added.
    ///
    /// # Errors
    ///
    /// When the directory cannot be used: then none could be written either.
    pub(crate) async fn start(
        self,
        config: &SnapshotConfig,
        peer: Option<&str>,
        most_bytes: u64,
    ) -> anyhow::Result<Option<Store>> {
        let store = config.dir.as_deref().map(Store::open).transpose().context("snapshot.dir")?;
        if let Some(peer) = peer {
            let directory = store.as_ref().map(Store::directory);
            match fetch(peer, directory, most_bytes).await {
                Ok(file) => {
                    if self.clone().load(file, format!("of {peer}"), "bootstrap").await {
                        return Ok(store);
                    }
                }
                Err(error) => {
                    self.metrics.failed("bootstrap");
                    tracing::error!(peer, error = %format!("{error:#}"), "No snapshot of the peer.");
                }
            }
        }
        match store.as_ref().map(Store::read) {
            Some(Ok(Some(file))) => {
                let path = store.as_ref().map(Store::path).unwrap_or_default();
                self.load(file, path.display().to_string(), "load").await;
            }
            Some(Err(error)) => {
                self.metrics.failed("load");
                tracing::error!(%error, "The snapshot is not used.");
            }
            Some(Ok(None)) | None => {}
        }
        Ok(store)
    }

    async fn load(self, file: File, which: String, operation: &'static str) -> bool {
        tokio::task::spawn_blocking(move || self.load_now(file, &which, operation))
            .await
            .unwrap_or_default()
    }

    fn load_now(&self, file: File, which: &str, operation: &str) -> bool {
        let begun = Instant::now();
        let loaded = match snapshot::load(file, &self.fleet, &self.models, &self.tiers) {
            Ok(loaded) => loaded,
            Err(error) => {
                self.metrics.failed(operation);
                let reason = error.reason();
                tracing::error!(snapshot = which, reason, %error, "The snapshot is refused.");
                return false;
            }
        };
        for (row, why) in &loaded.refused {
            tracing::warn!(snapshot = which, %row, why, "A row of the snapshot is left out.");
        }
        self.metrics.count("restored", loaded.rows);
        self.metrics.count("refused", loaded.refused.len());
        tracing::info!(
            snapshot = which,
            age_s = unix_ns().saturating_sub(loaded.unix_ns) / 1_000_000_000,
            rows = loaded.rows,
            blocks = loaded.blocks,
            ms = begun.elapsed().as_millis() as u64,
            "Snapshot loaded.",
        );
        true
    }
}

/// A peer's snapshot, in a file that nobody else sees.
async fn fetch(peer: &str, directory: Option<&Path>, most_bytes: u64) -> anyhow::Result<File> {
    let mut attempt = 1;
    loop {
        match fetch_once(peer, directory, most_bytes).await {
            Ok(file) => return Ok(file),
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(error) => {
                tracing::warn!(peer, error = %format!("{error:#}"), "Asking the peer again.");
            }
        }
        attempt += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

async fn fetch_once(peer: &str, directory: Option<&Path>, most_bytes: u64) -> anyhow::Result<File> {
    let mut file = match directory {
        Some(directory) => tempfile::tempfile_in(directory),
        None => tempfile::tempfile(),
    }
    .context("making a file for the peer's snapshot")?;
    let endpoint = Endpoint::from_shared(peer.to_owned())?.connect_timeout(CONNECT);
    let channel = endpoint.connect().await.context("connecting")?;
    let mut client = KvIndexerClient::new(channel).max_decoding_message_size(MAX_CHUNK);
    let asked = tokio::time::timeout(SILENCE, client.snapshot(SnapshotRequest {})).await;
    let mut stream = asked.context("the peer is silent")?.context("asking")?.into_inner();
    let mut bytes = 0;
    loop {
        let chunk = tokio::time::timeout(SILENCE, stream.message()).await;
        let Some(chunk) = chunk.context("the peer fell silent")?.context("reading")? else { break };
        bytes += chunk.data.len() as u64;
        anyhow::ensure!(bytes <= most_bytes, "it has more than {most_bytes} bytes");
        file.write_all(&chunk.data).context("writing the peer's snapshot")?;
    }
    file.seek(SeekFrom::Start(0))?;
    tracing::info!(peer, bytes, "Got the snapshot of the peer.");
    Ok(file)
}

/// The service's snapshots.
#[derive(Debug)]
pub(crate) struct Snapshots {
    ingest: Arc<Ingest>,
    fleet: Arc<Fleet>,
    store: Option<Store>,
    config: SnapshotConfig,
    metrics: SnapshotMetrics,
    /// One is written at a time.
    writing: Mutex<()>,
}

impl Source for Snapshots {
    fn write(&self, out: &mut dyn Write) -> io::Result<Exported> {
        self.ingest.snapshot(out).inspect_err(|_| self.metrics.failed("stream"))
    }
}

/// What is written to the directory; its failures are counted as such.
#[derive(Debug)]
struct Rows<'a>(&'a Ingest);

impl Source for Rows<'_> {
    fn write(&self, out: &mut dyn Write) -> io::Result<Exported> {
        self.0.snapshot(out)
    }
}

impl Snapshots {
    pub(crate) fn new(
        ingest: Arc<Ingest>,
        fleet: Arc<Fleet>,
        store: Option<Store>,
        config: SnapshotConfig,
        metrics: SnapshotMetrics,
    ) -> Self {
        Self { ingest, fleet, store, config, metrics, writing: Mutex::default() }
    }

    /// Writes one now, if there is a directory.
    fn save(&self) {
        let Some(store) = &self.store else { return };
        let _writing = lock(&self.writing);
        let begun = Instant::now();
        match store.write(&Rows(&self.ingest)) {
            Ok(exported) => {
                let metrics = &self.metrics;
                metrics.written_at.set(unix_ns() as f64 / 1e9);
                metrics.bytes.set(i64::try_from(exported.bytes).unwrap_or(i64::MAX));
                metrics.duration.set(begun.elapsed().as_secs_f64());
                metrics.pause.set(exported.longest_pause.as_secs_f64());
                tracing::debug!(
                    rows = exported.rows,
                    bytes = exported.bytes,
                    ms = begun.elapsed().as_millis() as u64,
                    pause_us = exported.longest_pause.as_micros() as u64,
                    "Snapshot written.",
                );
            }
            Err(error) => {
                self.metrics.failed("write");
                tracing::error!(%error, "The snapshot could not be written.");
            }
        }
    }

    /// Writes the last one of this process, when nothing is applied any more.
    pub(crate) fn last(&self) {
        if self.config.at_shutdown && self.store.is_some() {
            self.save();
            tracing::info!("Snapshot at shutdown is done.");
        }
    }

    /// Writes one each interval, and drops what was restored and nobody claims, until `stop`.
    ///
    /// # Errors
    ///
    /// When a write panicked.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) -> anyhow::Result<()> {
        let dropping = tokio::time::sleep(self.config.grace);
        tokio::pin!(dropping);
        let mut dropped = false;
        let writes = self.store.is_some() && !self.config.interval.is_zero();
        // Far away, where it does nothing.
        let interval = if writes { self.config.interval } else { Duration::from_secs(86_400) };
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = &mut dropping, if !dropped => {
                    dropped = true;
                    let rows = self.fleet.drop_unclaimed(|_| true);
                    self.metrics.count("dropped", rows.len());
                    for row in rows {
                        tracing::warn!(%row, "Restored, and declared by nobody: dropped.");
                    }
                }
                _ = ticks.tick() => if writes {
                    let own = Arc::clone(&self);
                    tokio::task::spawn_blocking(move || own.save()).await?;
                },
            }
        }
    }
}
