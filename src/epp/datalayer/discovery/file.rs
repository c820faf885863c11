//! Endpoints from a file.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::{
    DEFAULT_NAMESPACE, Discovery, DiscoveryError, EndpointInfo, EndpointName, Endpoints, Loaded,
    ipv4,
};
use crate::{
    epp::scheduling::BoxFuture,
    support::{
        fields::{Document, Fields, Reader},
        watched::WatchedFile,
    },
};

/// Longest file that is read, bytes. As in Go.
const MAX_FILE: u64 = 1 << 20;

/// How often a watched file is looked at; what an operator does not notice, and some microseconds.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A YAML or JSON file that lists endpoints:
///
/// ```yaml
/// endpoints:
/// - name: vllm-0            # required
///   namespace: default
///   address: "10.0.0.1"     # required, IPv4
///   port: "8000"            # required, in quotes
///   labels: {llm-d.ai/role: decode}
/// ```
///
/// At most 1 MiB. Of entries of one namespace and name the last counts. Metrics are scraped where
/// requests go. An endpoint that a later version of the file lacks is removed.
///
/// A file with anything wrong in it changes nothing: at the start that is an error that names entry
/// and field, later the last good set stays, and the fault is counted and logged once. An empty file,
/// or one without a list under `endpoints`, is wrong as well, since that is what a half-written file
/// looks like; no endpoints are `endpoints: []`.
#[derive(Clone, Debug)]
pub struct FileDiscovery {
    path: PathBuf,
    watch: bool,
    stats: Arc<FileStats>,
}

/// What happened to a watched file.
#[derive(Debug, Default)]
pub struct FileStats {
    loads: AtomicU64,
    faults: AtomicU64,
}

impl FileStats {
    /// Versions of the file that were taken over.
    #[must_use]
    pub fn loads(&self) -> u64 {
        self.loads.load(Ordering::Relaxed)
    }

    /// Versions of the file that could not be.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }
}

impl FileDiscovery {
    /// Reads `path` once, or with `watch` again whenever it changes.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, watch: bool) -> Self {
        Self { path: path.into(), watch, stats: Arc::default() }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What happened to the file; clones of the discovery share it.
    #[must_use]
    pub fn stats(&self) -> Arc<FileStats> {
        Arc::clone(&self.stats)
    }

    async fn follow(
        self,
        endpoints: Arc<Endpoints>,
        loaded: Loaded,
        stop: CancellationToken,
    ) -> Result<(), DiscoveryError> {
        let mut file = WatchedFile::new(&self.path, MAX_FILE);
        let mut first = true;
        loop {
            let (back, look) = self.look(file).await?;
            file = back;
            match look {
                Ok(None) => {}
                Ok(Some(infos)) => {
                    info!(path = %self.path.display(), endpoints = infos.len(), "Endpoints loaded.");
                    endpoints.set(infos);
                    self.stats.loads.fetch_add(1, Ordering::Relaxed);
                    loaded.set();
                }
                Err(fault) if first => return Err(fault),
                Err(fault) => {
                    self.stats.faults.fetch_add(1, Ordering::Relaxed);
                    let error = format!("{:#}", anyhow::Error::new(fault));
                    error!(
                        error,
                        "Endpoints file is not usable; the last good one stays in force."
                    );
                }
            }
            first = false;
            let next = async {
                if !self.watch {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = next => {}
            }
        }
    }

    /// The endpoints if the file changed. Files can be on disks that hang, hence the other thread.
    async fn look(
        &self,
        mut file: WatchedFile,
    ) -> Result<(WatchedFile, Result<Option<Vec<EndpointInfo>>, DiscoveryError>), DiscoveryError>
    {
        let path = self.path.clone();
        let look = move || {
            let look = match file.changed() {
                Ok(None) => Ok(None),
                Ok(Some(text)) => {
                    parse(text).map(Some).map_err(|faults| DiscoveryError::Invalid { path, faults })
                }
                Err(error) => Err(DiscoveryError::Read { path, error }),
            };
            (file, look)
        };
        tokio::task::spawn_blocking(look)
            .await
            .map_err(|error| DiscoveryError::Panicked { path: self.path.clone(), error })
    }
}

impl Discovery for FileDiscovery {
    fn run(
        self: Box<Self>,
        endpoints: Arc<Endpoints>,
        loaded: Loaded,
        stop: CancellationToken,
    ) -> BoxFuture<'static, Result<(), DiscoveryError>> {
        Box::pin(self.follow(endpoints, loaded, stop))
    }
}

/// Reads a list of endpoints.
///
/// # Errors
///
/// Everything that is wrong, each with line, entry and field.
pub(super) fn parse(text: &str) -> Result<Vec<EndpointInfo>, String> {
    if text.trim().is_empty() {
        return Err("empty; a file without endpoints says `endpoints: []`".to_owned());
    }
    let reader = Reader::new(Document::parse(text).map_err(|fault| fault.to_string())?);
    let root = reader.root();
    if !root.has("endpoints") {
        root.fault("endpoints", "missing; a file without endpoints says `endpoints: []`");
    }
    let infos: Vec<_> = root.each("endpoints").into_iter().map(entry).collect();
    root.finish();
    let faults = reader.finish().faults;
    if !faults.is_empty() {
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        return Err(faults.join("; "));
    }
    Ok(infos.into_iter().flatten().collect())
}

/// One entry; none, with a fault noted, if it is wrong.
fn entry(fields: Fields<'_>) -> Option<EndpointInfo> {
    let name = fields.required("name", Fields::nonempty);
    // Go takes an empty namespace for none.
    let namespace = fields.string("namespace").filter(|namespace| !namespace.is_empty());
    let address = fields.required("address", |f, name| f.parsed(name, ipv4));
    let port = fields.required("port", |f, name| f.parsed(name, port));
    let labels = fields.strings("labels").into_iter().collect();
    fields.finish();
    let address = SocketAddr::new(address?, port?);
    Some(EndpointInfo {
        name: EndpointName {
            namespace: namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
            name: name?,
        },
        address,
        metrics_address: address,
        labels,
    })
}

fn port(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|&port| port != 0)
        .ok_or_else(|| format!("{text:?} is no port; must be in \"1\"..=\"65535\""))
}
