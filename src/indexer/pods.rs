//! Which publishers there are: configuration, pods file, engines that are asked, `RegisterPod`.
//!
//! Every source ends in [`Ingest::add`] and [`Ingest::remove`]. A pod declared by an HTTP address
//! is *asked*: what the engine answers is subscribed to, and asked again from time to time, since
//! an engine that was restarted may publish elsewhere.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    indexer::registry::{PodRegistry, RegistryError},
    ingest::{
        AddError, Ingest,
        discovery::{self, PodsFile},
        fleet::PodDeclaration,
    },
    model::RowId,
};

/// How long one engine may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How soon an engine that did not answer is asked again; doubles up to [`ASK_AGAIN`].
const ASK_SOON: Duration = Duration::from_secs(1);
/// How often an engine that answered is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(30);

type Key = (String, Option<u32>);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pods {
    ingest: Arc<Ingest>,
    max_pods: usize,
    asked: Mutex<HashMap<Key, Asked>>,
    news: Notify,
}

/// A pods file, and what its last good version said.
#[derive(Debug)]
pub(crate) struct FollowedFile {
    file: PodsFile,
    known: BTreeMap<Key, PodDeclaration>,
}

impl FollowedFile {
    /// The rows that it names.
    pub(crate) fn rows(&self) -> impl Iterator<Item = RowId> {
        self.known.keys().map(|(pod, rank)| RowId { pod: Arc::from(pod.as_str()), rank: *rank })
    }
}

#[derive(Debug)]
struct Asked {
    declaration: PodDeclaration,
    /// What the last answer led to.
    resolved: Vec<Key>,
    next: tokio::time::Instant,
    patience: Duration,
}

fn key(declaration: &PodDeclaration) -> Key {
    (declaration.pod.clone(), declaration.rank)
}

fn is_asked(declaration: &PodDeclaration) -> bool {
    declaration.endpoint.starts_with("http://")
}

impl Pods {
    pub(crate) fn new(ingest: Arc<Ingest>, max_pods: usize) -> Self {
        Self { ingest, max_pods, asked: Mutex::default(), news: Notify::new() }
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks engines until `stop`.
    ///
    /// # Errors
    ///
    /// None; the type is that of supervised tasks.
    pub(crate) async fn run_discovery(&self, stop: CancellationToken) -> anyhow::Result<()> {
        loop {
            let now = tokio::time::Instant::now();
            let due: Vec<PodDeclaration> = self
                .asked()
                .values()
                .filter(|asked| asked.next <= now)
                .map(|asked| asked.declaration.clone())
                .collect();
            for declaration in due {
                let answer = tokio::select! {
                    biased;
                    () = stop.cancelled() => return Ok(()),
                    answer = discovery::resolve(&declaration, ASK_TIMEOUT) => answer,
                };
                self.resolved(&declaration, answer);
            }
            let next = self.asked().values().map(|asked| asked.next).min();
            let wait = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = self.news.notified() => {}
                () = wait => {}
            }
        }
    }

    fn resolved(&self, declaration: &PodDeclaration, answer: anyhow::Result<Vec<PodDeclaration>>) {
        let mut asked = self.asked();
        // It may have been removed or replaced while the engine thought.
        let Some(entry) =
            asked.get_mut(&key(declaration)).filter(|entry| entry.declaration == *declaration)
        else {
            return;
        };
        let now = tokio::time::Instant::now();
        match answer {
            Ok(found) => {
                let keys: Vec<Key> = found.iter().map(key).collect();
                for old in entry.resolved.iter().filter(|old| !keys.contains(old)) {
                    self.ingest.remove_one(old);
                }
                for publisher in found {
                    let (pod, endpoint) = (publisher.pod.clone(), publisher.endpoint.clone());
                    if let Err(error) = self.ingest.add(publisher) {
                        tracing::error!(%pod, %endpoint, %error, "Cannot subscribe.");
                    }
                }
                (entry.resolved, entry.patience) = (keys, ASK_SOON);
                entry.next = now + ASK_AGAIN;
            }
            Err(error) => {
                let (pod, address) = (&declaration.pod, &declaration.endpoint);
                tracing::warn!(%pod, %address, error = format!("{error:#}"), "Engine did not say where it publishes.");
                entry.next = now + entry.patience;
                entry.patience = (entry.patience * 2).min(ASK_AGAIN);
            }
        }
    }

    /// Begins to follow a pods file: reads it once.
    pub(crate) fn open_file(&self, path: PathBuf) -> FollowedFile {
        let mut file = FollowedFile { file: PodsFile::new(path), known: BTreeMap::new() };
        self.look_at(&mut file);
        file
    }

    /// Follows a pods file until `stop`. A broken file keeps what the last good one said.
    ///
    /// # Errors
    ///
    /// None; the type is that of supervised tasks.
    pub(crate) async fn run_file(
        &self,
        mut file: FollowedFile,
        every: Duration,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(every) => {}
            }
            self.look_at(&mut file);
        }
    }

    fn look_at(&self, followed: &mut FollowedFile) {
        let changed = followed.file.changed();
        let path = followed.file.path().display();
        match changed {
            Ok(None) => {}
            Ok(Some(pods)) => {
                let new: BTreeMap<Key, PodDeclaration> =
                    pods.into_iter().map(|pod| (key(&pod), pod)).collect();
                for own in followed.known.keys().filter(|old| !new.contains_key(*old)) {
                    self.remove_one(own);
                }
                for pod in new.values() {
                    if let Err(error) = self.add(pod.clone()) {
                        tracing::error!(pod = %pod.pod, %error, "Pod of the pods file refused.");
                    }
                }
                tracing::info!(pods = new.len(), %path, "Pods file read.");
                followed.known = new;
            }
            Err(error) => {
                tracing::error!(%path, error = format!("{error:#}"), "Pods file cannot be used.");
            }
        }
    }

    /// Adds a publisher, or asks its engine for them.
    pub(crate) fn add(&self, declaration: PodDeclaration) -> Result<(), AddError> {
        let own = key(&declaration);
        if !is_asked(&declaration) {
            // It was asked before: what it answered is replaced as well.
            for found in self.forget(&own).into_iter().filter(|found| *found != own) {
                self.ingest.remove_one(&found);
            }
            return self.ingest.add(declaration);
        }
        let mut asked = self.asked();
        if asked.get(&own).is_some_and(|known| known.declaration == declaration) {
            return Ok(());
        }
        if asked.len() >= self.max_pods && !asked.contains_key(&own) {
            return Err(AddError::Refused(own.0));
        }
        // What is subscribed stays until the engine has answered.
        let resolved = match asked.remove(&own) {
            Some(old) => old.resolved,
            None if self.ingest.declaration(&own.0, own.1).is_some() => vec![own.clone()],
            None => Vec::new(),
        };
        let next = tokio::time::Instant::now();
        asked.insert(own, Asked { declaration, resolved, next, patience: ASK_SOON });
        drop(asked);
        self.news.notify_one();
        Ok(())
    }

    fn forget(&self, own: &Key) -> Vec<Key> {
        self.asked().remove(own).map_or_else(Vec::new, |old| old.resolved)
    }

    fn remove_one(&self, own: &Key) {
        for found in self.forget(own) {
            self.ingest.remove_one(&found);
        }
        self.ingest.remove_one(own);
    }

    fn remove(&self, pod: &str, rank: Option<u32>) -> bool {
        let mut keys: Vec<Key> = self.asked().keys().filter(|k| k.0 == pod).cloned().collect();
        keys.retain(|(_, of)| rank.is_none() || *of == rank);
        let mut found = !keys.is_empty();
        for own in keys {
            for (pod, rank) in self.forget(&own) {
                found |= self.ingest.remove(&pod, rank);
            }
        }
        self.ingest.remove(pod, rank) || found
    }
}

impl PodRegistry for Pods {
    fn register(&self, declaration: PodDeclaration) -> Result<(), RegistryError> {
        self.add(declaration).map_err(|error| match error {
            AddError::Refused(_) => RegistryError::Full { limit: self.max_pods },
            other => RegistryError::Unavailable(other.to_string()),
        })
    }

    fn unregister(&self, pod: &str, rank: Option<u32>) -> Result<bool, RegistryError> {
        Ok(self.remove(pod, rank))
    }
}
