//! Supervised tasks and threads: everything that runs is owned, named, and waited for.
//!
//! # Shutdown
//!
//! 1. Someone cancels the token (a signal handler, or the first task that failed).
//! 2. Readiness becomes *draining* and nothing else happens for the grace period, so that load
//!    balancers look elsewhere first. A fault has no grace: the process is to be replaced.
//! 3. [`Stage`] by stage, in order: its token is cancelled, and its tasks and threads are waited
//!    for. All stages together have the drain time.
//! 4. What still runs then is named in the error; tasks are aborted, threads are left behind.
//!
//! # Failure
//!
//! A task that ends before shutdown was asked for, with or without an error, is a fault that stops
//! all others: better restarted as a whole than running with a part missing.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    sync::oneshot,
    task::{Id, JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, error, info, warn};

/// When in a shutdown something stops. In this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Takes requests.
    Serve,
    /// Takes input of other kinds: subscribers, watchers, discovery.
    Receive,
    /// Works off what the others queued.
    Apply,
    /// Tells about the rest, so it goes last: metrics, health.
    Observe,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Serve, Self::Receive, Self::Apply, Self::Observe];
}

/// What to tell whoever asks whether to send us traffic. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicU8>);

impl Readiness {
    const STARTING: u8 = 0;
    const READY: u8 = 1;
    const DRAINING: u8 = 2;

    /// From now on ready; without effect on a process that is draining.
    pub fn set_ready(&self) {
        // A failed exchange means that the state is READY already, or DRAINING for good.
        self.0
            .compare_exchange(Self::STARTING, Self::READY, Ordering::AcqRel, Ordering::Acquire)
            .unwrap_or_default();
    }

    /// From now on not ready, for good.
    pub fn drain(&self) {
        self.0.store(Self::DRAINING, Ordering::Release);
    }

    /// Should traffic be sent here?
    ///
    /// # Errors
    ///
    /// Why not: `starting` or `draining`.
    pub fn check(&self) -> Result<(), &'static str> {
        match self.0.load(Ordering::Acquire) {
            Self::READY => Ok(()),
            Self::DRAINING => Err("draining"),
            _ => Err("starting"),
        }
    }
}

/// Owns the long-running tasks and threads of a process.
#[derive(Debug)]
pub struct Supervisor {
    tasks: JoinSet<anyhow::Result<()>>,
    running: HashMap<Id, (Stage, &'static str)>,
    requested: CancellationToken,
    stops: [CancellationToken; 4],
    readiness: Readiness,
}

impl Supervisor {
    /// A supervisor that begins its shutdown when `requested` is cancelled, and cancels it at a fault.
    #[must_use]
    pub fn new(requested: CancellationToken) -> Self {
        Self {
            tasks: JoinSet::new(),
            running: HashMap::new(),
            requested,
            stops: Default::default(),
            readiness: Readiness::default(),
        }
    }

    /// The process's readiness; it starts as not ready.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// The token that tells a stage to stop.
    #[must_use]
    pub fn stop(&self, stage: Stage) -> CancellationToken {
        self.stops[stage as usize].clone()
    }

    /// Runs `task` until it returns, which must be soon after the token it is given is cancelled.
    ///
    /// Must be called within a tokio runtime, like the other two.
    pub fn spawn<F, T>(&mut self, stage: Stage, name: &'static str, task: F)
    where
        F: FnOnce(CancellationToken) -> T,
        T: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let span = tracing::info_span!("task", name);
        let future = task(self.stop(stage)).instrument(span);
        let id = self.tasks.spawn(future).id();
        self.running.insert(id, (stage, name));
    }

    /// Runs `body` on a thread of its own, under the same rules. Blocking is allowed there.
    ///
    /// # Errors
    ///
    /// When the system gives no thread.
    pub fn spawn_thread<F>(
        &mut self,
        stage: Stage,
        name: &'static str,
        body: F,
    ) -> std::io::Result<()>
    where
        F: FnOnce(CancellationToken) -> anyhow::Result<()> + Send + 'static,
    {
        let (done, ended) = oneshot::channel();
        let stop = self.stop(stage);
        let handle = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Nobody listens after an overlong drain, and then the result is of no use.
            done.send(body(stop)).unwrap_or_default();
        })?;
        self.spawn(stage, name, |_| async move {
            match ended.await {
                Ok(result) => result,
                // The sender was dropped by unwinding, so the thread is as good as over.
                Err(_) => joined(handle.join().map(Ok)),
            }
        });
        Ok(())
    }

    /// Waits for a thread that somebody else started and that ends when [`stop`](Self::stop) of
    /// `stage` is cancelled.
    ///
    /// # Errors
    ///
    /// When the system gives no thread for the waiting, which must not block the runtime's.
    pub fn adopt_thread(
        &mut self,
        stage: Stage,
        name: &'static str,
        handle: JoinHandle<anyhow::Result<()>>,
    ) -> std::io::Result<()> {
        self.spawn_thread(stage, name, move |_| joined(handle.join()))
    }

    /// Waits until shutdown is asked for and everything has ended. `grace` passes between the end
    /// of readiness and the first stop; the stages share `drain`.
    ///
    /// # Errors
    ///
    /// The first fault of a task, and the names of those that were still running after `drain`.
    pub async fn run(mut self, grace: Duration, drain: Duration) -> anyhow::Result<()> {
        let mut fault = None;
        tokio::select! {
            biased; // A task that asks for shutdown and ends has not ended early.
            () = self.requested.cancelled() => info!("Shutdown requested."),
            Some(ended) = self.tasks.join_next_with_id() => fault = self.describe(ended, true),
        }
        // After a fault nobody has asked for the shutdown, and there may be tasks that wait for that.
        self.requested.cancel();
        self.readiness.drain();
        let grace = tokio::time::sleep(grace);
        tokio::pin!(grace);
        while fault.is_none() {
            tokio::select! {
                () = &mut grace => break,
                // Whoever asked for the shutdown may well end now.
                Some(ended) = self.tasks.join_next_with_id() => fault = self.describe(ended, false),
            }
        }
        if tokio::time::timeout(drain, self.stop_all(&mut fault)).await.is_err() {
            let mut names: Vec<&str> = self.running.values().map(|&(_, name)| name).collect();
            names.sort_unstable();
            let names = names.join(", ");
            warn!(?drain, tasks = names, "Still running after the drain time; giving up.");
            for stop in &self.stops {
                stop.cancel();
            }
            self.tasks.shutdown().await;
            let late = format!("still running after {drain:?} of draining: {names}");
            return Err(match fault {
                Some(fault) => fault.context(late),
                None => anyhow::Error::msg(late),
            });
        }
        fault.map_or(Ok(()), Err)
    }

    async fn stop_all(&mut self, fault: &mut Option<anyhow::Error>) {
        for stage in Stage::ALL {
            self.stops[stage as usize].cancel();
            while self.running.values().any(|&(of, _)| of == stage) {
                let Some(ended) = self.tasks.join_next_with_id().await else { break };
                if let Some(error) = self.describe(ended, false) {
                    fault.get_or_insert(error);
                }
            }
        }
    }

    /// Takes an ended task off the books and logs its fault; `early` says that none should have ended
    /// yet.
    fn describe(
        &mut self,
        ended: Result<(Id, anyhow::Result<()>), JoinError>,
        early: bool,
    ) -> Option<anyhow::Error> {
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let (_, name) = self.running.remove(&id).unwrap_or((Stage::Observe, "unnamed"));
        let fault = match ended {
            Ok((_, Ok(()))) if !early => None,
            Ok((_, Ok(()))) => Some(anyhow::format_err!("task {name} ended early")),
            Ok((_, Err(error))) => Some(error.context(format!("task {name}"))),
            Err(join) => Some(anyhow::Error::new(join).context(format!("task {name}"))),
        };
        if let Some(fault) = &fault {
            // At once: the drain may take long, or be cut short from outside.
            error!(error = format!("{fault:#}"), "Task failed.");
        }
        fault
    }
}

/// The result of a joined thread, its panic included.
fn joined(result: std::thread::Result<anyhow::Result<()>>) -> anyhow::Result<()> {
    result.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        Err(anyhow::format_err!("thread panicked: {text}"))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_early_stops_the_rest_without_grace() {
        let mut supervisor = Supervisor::new(CancellationToken::new());
        let readiness = supervisor.readiness();
        readiness.set_ready();
        supervisor.spawn(Stage::Receive, "short", |_| async { Ok(()) });
        supervisor.spawn(Stage::Serve, "long", |stop| async move {
            stop.cancelled().await;
            Ok(())
        });
        let start = tokio::time::Instant::now();
        let error = supervisor.run(600 * SECOND, SECOND).await.unwrap_err();
        assert!(error.to_string().contains("short ended early"), "{error:#}");
        assert!(start.elapsed() < SECOND);
        assert_eq!(readiness.check(), Err("draining"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_a_fault_with_the_name_of_its_task() {
        let mut supervisor = Supervisor::new(CancellationToken::new());
        supervisor.spawn(Stage::Serve, "bad", |_| async { panic!("by design") });
        let error = supervisor.run(SECOND, SECOND).await.unwrap_err();
        assert!(format!("{error:#}").contains("task bad"), "{error:#}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_task_is_named_and_bounded_by_the_drain() {
        let requested = CancellationToken::new();
        let mut supervisor = Supervisor::new(requested.clone());
        supervisor.spawn(Stage::Apply, "stuck", |_| std::future::pending());
        supervisor.spawn(Stage::Serve, "fine", |stop| async move {
            stop.cancelled().await;
            Ok(())
        });
        requested.cancel();
        let error = supervisor.run(Duration::ZERO, SECOND).await.unwrap_err().to_string();
        assert!(error.contains("stuck") && !error.contains("fine"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_ends_those_who_wait_for_the_request_and_is_not_lost_in_a_long_drain() {
        for stuck in [false, true] {
            let requested = CancellationToken::new();
            let mut supervisor = Supervisor::new(requested.clone());
            supervisor.spawn(Stage::Serve, "readiness", |_| async move {
                requested.cancelled().await;
                Ok(())
            });
            supervisor.spawn(Stage::Apply, "bad", |_| async { anyhow::bail!("by design") });
            if stuck {
                supervisor.spawn(Stage::Serve, "stuck", |_| std::future::pending());
            }
            let start = tokio::time::Instant::now();
            let error = format!("{:#}", supervisor.run(SECOND, 60 * SECOND).await.unwrap_err());
            assert!(error.contains("task bad: by design"), "{error}");
            assert_eq!((error.contains("stuck"), start.elapsed() >= SECOND), (stuck, stuck));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn readiness_ends_first_and_stages_stop_in_order() {
        let requested = CancellationToken::new();
        let mut supervisor = Supervisor::new(requested.clone());
        let readiness = supervisor.readiness();
        assert_eq!(readiness.check(), Err("starting"));
        readiness.set_ready();
        assert_eq!(readiness.check(), Ok(()));
        let log: Arc<Mutex<Vec<(Stage, Duration)>>> = Arc::default();
        let start = tokio::time::Instant::now();
        for stage in [Stage::Observe, Stage::Apply, Stage::Receive, Stage::Serve] {
            let log = Arc::clone(&log);
            supervisor.spawn(stage, "member", move |stop| async move {
                stop.cancelled().await;
                log.lock().unwrap().push((stage, start.elapsed()));
                // Each takes a while to stop; the next stage must wait for it.
                tokio::time::sleep(SECOND).await;
                Ok(())
            });
        }
        let request = requested.clone();
        supervisor.spawn(Stage::Observe, "signals", |_| async move {
            request.cancel();
            Ok(())
        });
        let run = supervisor.run(5 * SECOND, 60 * SECOND);
        let seen = async {
            tokio::time::sleep(SECOND).await;
            readiness.check()
        };
        let (result, ready) = tokio::join!(run, seen);
        result.unwrap();
        assert_eq!(ready, Err("draining"));
        readiness.set_ready();
        assert_eq!(readiness.check(), Err("draining"));
        let log = log.lock().unwrap();
        assert_eq!(log.iter().map(|&(stage, _)| stage).collect::<Vec<_>>(), Stage::ALL);
        for (at, &(_, when)) in log.iter().enumerate() {
            assert_eq!(when.as_secs(), 5 + at as u64);
        }
    }

    #[tokio::test]
    async fn threads_are_joined_and_their_faults_reported() {
        let requested = CancellationToken::new();
        let mut supervisor = Supervisor::new(requested.clone());
        let stop = supervisor.stop(Stage::Receive);
        let wait = |stop: CancellationToken| {
            while !stop.is_cancelled() {
                std::thread::yield_now();
            }
            Ok(())
        };
        supervisor.spawn_thread(Stage::Apply, "own", wait).unwrap();
        let adopted = std::thread::spawn(move || wait(stop));
        supervisor.adopt_thread(Stage::Receive, "adopted", adopted).unwrap();
        requested.cancel();
        supervisor.run(Duration::ZERO, 30 * SECOND).await.unwrap();

        let mut supervisor = Supervisor::new(CancellationToken::new());
        supervisor.spawn_thread(Stage::Apply, "bad", |_| panic!("by design")).unwrap();
        let error = supervisor.run(SECOND, 30 * SECOND).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "task bad: thread panicked: by design");
    }
}
