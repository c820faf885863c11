//! Which publishers there are: configuration, pods file, engines that are asked, `RegisterPod`.
//!
//! Every source ends in [`Ingest::add`] and [`Ingest::remove`]. A pod declared by an HTTP address
//! is *asked*: what the engine answers is subscribed to, and asked again from time to time, since
//! an engine that was restarted may publish elsewhere.
//!
//! What changes the publishers waits for the threads of ingest, for seconds if they are busy. So it
//! runs on tokio's blocking threads, one change at a time.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    task::{JoinSet, spawn_blocking},
};
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
/// Engines that are asked at the same time.
const ASKED_AT_ONCE: usize = 16;

type Key = (String, Option<u32>);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pods {
    ingest: Arc<Ingest>,
    max_pods: usize,
    /// Held through a change, however long ingest takes; locked before `asked`.
    changing: Mutex<()>,
    /// Locked briefly, never across a call of ingest.
    asked: Mutex<HashMap<Key, Asked>>,
    news: Notify,
}

/// A pods file, and what its last good version said.
#[derive(Debug)]
pub(crate) struct FollowedFile {
    file: PodsFile,
    known: BTreeMap<Key, PodDeclaration>,
    /// Those of them that are not there, and why; tried again at every look.
    refused: BTreeMap<Key, AddError>,
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
    /// Which of the engine's publishers were unregistered: they stay away until this declaration is
    /// replaced.
    unregistered: HashSet<Key>,
    /// None while it is asked.
    next: Option<tokio::time::Instant>,
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
        Self {
            ingest,
            max_pods,
            changing: Mutex::default(),
            asked: Mutex::default(),
            news: Notify::new(),
        }
    }

    fn changing(&self) -> std::sync::MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks engines until `stop`.
    ///
    /// # Errors
    ///
    /// When what an answer leads to cannot be carried out to its end.
    pub(crate) async fn run_discovery(
        self: Arc<Self>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let mut asking = JoinSet::new();
        loop {
            let room = ASKED_AT_ONCE - asking.len();
            for declaration in self.take_due(room) {
                let pods = Arc::clone(&self);
                asking.spawn(async move {
                    let answer = discovery::resolve(&declaration, ASK_TIMEOUT).await;
                    spawn_blocking(move || pods.resolved(&declaration, answer)).await
                });
            }
            let next = self.asked().values().filter_map(|asked| asked.next).min();
            let next = next.filter(|_| asking.len() < ASKED_AT_ONCE);
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
                Some(ended) = asking.join_next() => ended??,
            }
        }
    }

    /// Up to `room` declarations that are to be asked now. Each is due again once it was answered.
    fn take_due(&self, room: usize) -> Vec<PodDeclaration> {
        let now = tokio::time::Instant::now();
        self.asked()
            .values_mut()
            .filter(|asked| asked.next.is_some_and(|next| next <= now))
            .take(room)
            .map(|asked| {
                asked.next = None;
                asked.declaration.clone()
            })
            .collect()
    }

    fn resolved(&self, declaration: &PodDeclaration, answer: anyhow::Result<Vec<PodDeclaration>>) {
        let _changing = self.changing();
        let now = tokio::time::Instant::now();
        let (found, gone) = {
            let mut asked = self.asked();
            // It may have been removed or replaced while the engine thought.
            let Some(entry) =
                asked.get_mut(&key(declaration)).filter(|entry| entry.declaration == *declaration)
            else {
                return;
            };
            match answer {
                Ok(mut found) => {
                    found.retain(|publisher| !entry.unregistered.contains(&key(publisher)));
                    let keys: Vec<Key> = found.iter().map(key).collect();
                    let mut gone = std::mem::replace(&mut entry.resolved, keys);
                    gone.retain(|old| !entry.resolved.contains(old));
                    entry.patience = ASK_SOON;
                    entry.next = Some(now + ASK_AGAIN);
                    (found, gone)
                }
                Err(error) => {
                    let (pod, address) = (&declaration.pod, &declaration.endpoint);
                    tracing::warn!(%pod, %address, error = format!("{error:#}"), "Engine did not say where it publishes.");
                    entry.next = Some(now + entry.patience);
                    entry.patience = (entry.patience * 2).min(ASK_AGAIN);
                    return;
                }
            }
        };
        for old in gone {
            self.ingest.remove_one(&old);
        }
        for publisher in found {
            let (pod, endpoint) = (publisher.pod.clone(), publisher.endpoint.clone());
            if let Err(error) = self.ingest.add(publisher) {
                tracing::error!(%pod, %endpoint, %error, "Cannot subscribe.");
            }
        }
    }

    /// Begins to follow a pods file: reads it once. With `bound` pods may connect to us.
    pub(crate) fn open_file(&self, path: PathBuf, bound: bool) -> FollowedFile {
        let mut file = FollowedFile {
            file: PodsFile::new(path, bound),
            known: BTreeMap::new(),
            refused: BTreeMap::new(),
        };
        self.look_at(&mut file);
        file
    }

    /// Follows a pods file until `stop`. A broken file keeps what the last good one said.
    ///
    /// # Errors
    ///
    /// When what the file says cannot be carried out to its end.
    pub(crate) async fn run_file(
        self: Arc<Self>,
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
            let pods = Arc::clone(&self);
            let looking = spawn_blocking(move || {
                pods.look_at(&mut file);
                file
            });
            file = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                looked = looking => looked?,
            };
        }
    }

    fn look_at(&self, followed: &mut FollowedFile) {
        let changed = followed.file.changed();
        let path = followed.file.path().display();
        match changed {
            Ok(None) => {
                for own in followed.refused.keys().cloned().collect::<Vec<_>>() {
                    self.try_again(followed, &own);
                }
            }
            Ok(Some(pods)) => {
                let new: BTreeMap<Key, PodDeclaration> =
                    pods.into_iter().map(|pod| (key(&pod), pod)).collect();
                for own in followed.known.keys().filter(|old| !new.contains_key(*old)) {
                    self.remove_one(own);
                }
                tracing::info!(pods = new.len(), %path, "Pods file read.");
                followed.refused.retain(|own, _| new.contains_key(own));
                followed.known = new;
                for own in followed.known.keys().cloned().collect::<Vec<_>>() {
                    self.try_again(followed, &own);
                }
            }
            Err(error) => {
                tracing::error!(%path, error = format!("{error:#}"), "Pods file cannot be used.");
            }
        }
    }

    /// Adds a pod of the file, unless it is there already.
    fn try_again(&self, followed: &mut FollowedFile, own: &Key) {
        let Some(pod) = followed.known.get(own) else { return };
        match self.add(pod.clone()) {
            Ok(()) => {
                if followed.refused.remove(own).is_some() {
                    tracing::info!(pod = %own.0, "Pod of the pods file accepted.");
                }
            }
            Err(error) => {
                // Once, not at every look.
                if followed.refused.get(own) != Some(&error) {
                    tracing::error!(pod = %own.0, %error, "Pod of the pods file refused.");
                    followed.refused.insert(own.clone(), error);
                }
            }
        }
    }

    /// Adds a publisher, or asks its engine for them.
    pub(crate) fn add(&self, declaration: PodDeclaration) -> Result<(), AddError> {
        let _changing = self.changing();
        let own = key(&declaration);
        if !is_asked(&declaration) {
            // It was asked before: what it answered is replaced as well.
            for found in self.forget(&own).into_iter().filter(|found| *found != own) {
                self.ingest.remove_one(&found);
            }
            return self.ingest.add(declaration);
        }
        let subscribed = self.ingest.declaration(&own.0, own.1).is_some();
        let mut asked = self.asked();
        if asked.get(&own).is_some_and(|known| known.declaration == declaration) {
            return Ok(());
        }
        if asked.len() >= self.max_pods && !asked.contains_key(&own) {
            return Err(AddError::Full(own.0));
        }
        // What is subscribed stays until the engine has answered.
        let resolved = match asked.remove(&own) {
            Some(old) => old.resolved,
            None if subscribed => vec![own.clone()],
            None => Vec::new(),
        };
        let next = Some(tokio::time::Instant::now());
        let unregistered = HashSet::new();
        asked.insert(own, Asked { declaration, resolved, unregistered, next, patience: ASK_SOON });
        drop(asked);
        self.news.notify_one();
        Ok(())
    }

    fn forget(&self, own: &Key) -> Vec<Key> {
        self.asked().remove(own).map_or_else(Vec::new, |old| old.resolved)
    }

    fn remove_one(&self, own: &Key) {
        let _changing = self.changing();
        for found in self.forget(own) {
            self.ingest.remove_one(&found);
        }
        self.ingest.remove_one(own);
    }

    fn remove(&self, pod: &str, rank: Option<u32>) -> bool {
        let _changing = self.changing();
        let mut keys: Vec<Key> = self.asked().keys().filter(|k| k.0 == pod).cloned().collect();
        keys.retain(|(_, of)| rank.is_none() || *of == rank);
        let mut found = !keys.is_empty();
        for own in keys {
            for (pod, rank) in self.forget(&own) {
                found |= self.ingest.remove(&pod, rank);
            }
        }
        if rank.is_some() {
            // One of several publishers of an engine that is asked: the next answer names it again.
            let one = (pod.to_owned(), rank);
            for asked in self.asked().values_mut().filter(|asked| asked.resolved.contains(&one)) {
                asked.resolved.retain(|other| *other != one);
                asked.unregistered.insert(one.clone());
            }
        }
        self.ingest.remove(pod, rank) || found
    }
}

impl PodRegistry for Pods {
    fn register(&self, declaration: PodDeclaration) -> Result<(), RegistryError> {
        self.add(declaration).map_err(|error| match error {
            AddError::Full(_) => RegistryError::Full { limit: self.max_pods },
            AddError::Endpoint { why, .. } => {
                RegistryError::Invalid { field: "endpoint".to_owned(), why }
            }
            other => RegistryError::Unavailable(other.to_string()),
        })
    }

    fn unregister(&self, pod: &str, rank: Option<u32>) -> Result<bool, RegistryError> {
        Ok(self.remove(pod, rank))
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        hash::Models,
        index::{IndexConfig, runs::RunIndex},
        ingest::{IngestConfig, fleet::Fleet, metrics::IngestMetrics},
    };

    fn pods(config: IngestConfig) -> Arc<Pods> {
        let fleet = Arc::new(Fleet::new(Arc::new(RunIndex::new(IndexConfig {
            max_pods: config.max_pods,
            ..IndexConfig::default()
        }))));
        let metrics = IngestMetrics::register(&prometheus::Registry::new()).unwrap();
        let max_pods = config.max_pods;
        let ingest = Ingest::start(config, Models::default(), Arc::default(), fleet, metrics);
        Arc::new(Pods::new(Arc::new(ingest.unwrap()), max_pods))
    }

    fn pod(name: &str, endpoint: impl Into<String>) -> PodDeclaration {
        PodDeclaration {
            pod: name.to_owned(),
            endpoint: endpoint.into(),
            model: Some("m".to_owned()),
            ..PodDeclaration::default()
        }
    }

    async fn eventually(what: &str, done: impl Fn() -> bool) {
        let all = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(4), all).await.expect(what);
    }

    #[tokio::test]
    async fn a_silent_engine_does_not_keep_others_waiting() {
        let pods = pods(IngestConfig::default());
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let speaks = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = |at: &TcpListener| format!("http://{}", at.local_addr().unwrap());
        for number in 0..8 {
            pods.add(pod(&format!("silent-{number}"), address(&silent))).unwrap();
        }
        pods.add(pod("speaks", address(&speaks))).unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let (mut stream, _) = speaks.accept().await.unwrap();
            // A request may come in pieces, and what is left unread would reset the answer.
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert!(stream.read_buf(&mut request).await.unwrap() > 0);
            }
            let body = r#"[{"data_parallel_rank": 0, "endpoint": "tcp://127.0.0.1:1"}]"#;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + body).as_bytes()).await.unwrap();
        });
        let stop = CancellationToken::new();
        let mut asking = JoinSet::new();
        asking.spawn(Arc::clone(&pods).run_discovery(stop.clone()));
        eventually("the answer leads to a subscription", || {
            pods.ingest.declaration("speaks", Some(0)).is_some()
        })
        .await;
        stop.cancel();
        asking.join_next().await.unwrap().unwrap().unwrap();
        pods.ingest.stop(ASK_TIMEOUT).unwrap();
    }

    #[tokio::test]
    async fn a_publisher_of_an_engine_stays_unregistered_until_the_engine_is_declared_anew() {
        let pods = pods(IngestConfig::default());
        let engine = pod("a", "http://127.0.0.1:1");
        let found = || {
            let rank = |rank| PodDeclaration { rank: Some(rank), ..pod("a", "tcp://127.0.0.1:1") };
            Ok(vec![rank(0), rank(1)])
        };
        let ranks = || [0, 1].map(|rank| pods.ingest.declaration("a", Some(rank)).is_some());
        pods.add(engine.clone()).unwrap();
        pods.resolved(&engine, found());
        assert_eq!(ranks(), [true, true]);
        assert_eq!(pods.unregister("a", Some(1)), Ok(true));
        // Declared again as it is, asked again.
        pods.add(engine.clone()).unwrap();
        pods.resolved(&engine, found());
        assert_eq!(ranks(), [true, false]);
        assert_eq!(pods.unregister("a", Some(1)), Ok(false));
        let other = PodDeclaration { block_size: Some(16), ..engine };
        pods.add(other.clone()).unwrap();
        pods.resolved(&other, found());
        assert_eq!(ranks(), [true, true]);
        assert_eq!(pods.unregister("a", None), Ok(true));
        assert_eq!(ranks(), [false, false]);
        pods.ingest.stop(ASK_TIMEOUT).unwrap();
    }

    #[tokio::test]
    async fn a_refused_pod_of_the_file_is_tried_again() {
        let pods = pods(IngestConfig { max_pods: 1, ..IngestConfig::default() });
        let file = tempfile::NamedTempFile::new().unwrap();
        let list =
            "[{id: a, endpoint: 'tcp://127.0.0.1:1'}, {id: b, endpoint: 'tcp://127.0.0.1:1'}]";
        std::fs::write(file.path(), list).unwrap();
        let mut file = pods.open_file(file.path().into(), false);
        let known = |pod| pods.ingest.declaration(pod, None).is_some();
        assert_eq!((known("a"), known("b")), (true, false));
        pods.look_at(&mut file);
        assert_eq!((known("a"), known("b")), (true, false));
        assert_eq!(pods.unregister("a", None), Ok(true));
        pods.look_at(&mut file);
        // Only what was refused comes back.
        assert_eq!((known("a"), known("b")), (false, true));
        pods.look_at(&mut file);
        assert_eq!((known("a"), known("b")), (false, true));
        pods.ingest.stop(ASK_TIMEOUT).unwrap();
    }
}
