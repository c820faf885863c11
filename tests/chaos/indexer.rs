//! The real program, and calls to it.

use std::{
    collections::VecDeque,
    io::{BufRead as _, BufReader, Read},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use kv_indexer::proto::kvindexer::{
    ListPodsRequest, PodScore, PodStatus, Prompt, RegisterPodRequest, ScoreDetail, ScoreRequest,
    UnregisterPodRequest, kv_indexer_client::KvIndexerClient, prompt::Input,
};
use rustix::process::{Pid, Signal, kill_process};
use tonic::{Code, Status, transport::Channel};

/// For slow machines, everything is given this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// One call.
const CALL: Duration = Duration::from_secs(10);
/// Lines of its log that are kept.
const LINES: usize = 400;

/// A running `kv-indexer`.
pub(crate) struct Indexer {
    child: Child,
    pub(crate) grpc: SocketAddr,
    log: Arc<Mutex<VecDeque<String>>>,
}

impl Indexer {
    /// Does the program know all that this configuration says?
    pub(crate) fn accepts(config: &Path) -> bool {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kv-indexer"));
        command.args(["--check", "--config"]).arg(config);
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
    }

    pub(crate) fn start(config: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kv-indexer"))
            .args(["--grpc-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::default();
        drain(child.stdout.take().unwrap(), &log);
        drain(child.stderr.take().unwrap(), &log);
        let deadline = Instant::now() + PATIENCE;
        let grpc = loop {
            if let Some(address) = announced(&log.lock().unwrap()) {
                break address;
            }
            let ended = child.try_wait().unwrap();
            let lines = || log.lock().unwrap().iter().cloned().collect::<Vec<_>>().join("\n");
            assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}\n{}", lines());
            thread::sleep(Duration::from_millis(2));
        };
        Self { child, grpc, log }
    }

    /// As an operating system out of memory does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
    }

    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it with SIGTERM; tells whether it ended well.
    pub(crate) fn finish(&mut self) -> bool {
        self.signal(Signal::TERM);
        self.child.wait().unwrap().success()
    }

    /// Panics if it has ended by itself.
    pub(crate) fn still_runs(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "the indexer ended: {ended:?}\n{}", self.last_words());
    }

    pub(crate) fn last_words(&self) -> String {
        self.log.lock().unwrap().iter().cloned().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Indexer {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn drain(stream: impl Read + Send + 'static, log: &Arc<Mutex<VecDeque<String>>>) {
    let log = Arc::clone(log);
    // Ends with the process.
    thread::spawn(move || {
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            let mut log = log.lock().unwrap();
            if log.len() == LINES {
                log.pop_front();
            }
            log.push_back(line);
        }
    });
}

fn announced(log: &VecDeque<String>) -> Option<SocketAddr> {
    log.iter().find_map(|line| {
        let (_, rest) = line.split_once("grpc listening on ")?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

/// Calls to one life of the indexer.
#[derive(Clone)]
pub(crate) struct Client(KvIndexerClient<Channel>);

impl Client {
    /// Call it on the runtime that uses the client.
    pub(crate) fn new(grpc: SocketAddr) -> Self {
        let channel = Channel::from_shared(format!("http://{grpc}")).unwrap().connect_lazy();
        Self(KvIndexerClient::new(channel).max_decoding_message_size(256 << 20))
    }

    pub(crate) async fn register(&mut self, request: RegisterPodRequest) -> Result<(), Status> {
        timed(self.0.register_pod(request)).await.map(drop)
    }

    pub(crate) async fn unregister(&mut self, pod: &str) -> Result<(), Status> {
        let request = UnregisterPodRequest { pod: pod.to_owned(), dp_rank: Some(0) };
        match timed(self.0.unregister_pod(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            other => other.map(drop),
        }
    }

    pub(crate) async fn pods(&mut self) -> Result<Vec<PodStatus>, Status> {
        Ok(timed(self.0.list_pods(ListPodsRequest {})).await?.pods)
    }

    /// Per prompt, the pods that hold some of it.
    pub(crate) async fn score(&mut self, prompts: &[&[u32]]) -> Result<Vec<Vec<PodScore>>, Status> {
        let prompt = |tokens: &&[u32]| Prompt {
            input: Some(Input::TokenIdsLe(
                tokens.iter().flat_map(|token| token.to_le_bytes()).collect(),
            )),
            ..Prompt::default()
        };
        let request = ScoreRequest {
            model: "m".to_owned(),
            prompts: prompts.iter().map(prompt).collect(),
            detail: ScoreDetail::Pods.into(),
            ..ScoreRequest::default()
        };
        let answer = timed(self.0.score(request)).await?;
        Ok(answer.prompts.into_iter().map(|prompt| prompt.pods).collect())
    }
}

async fn timed<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(CALL, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Status::deadline_exceeded("no answer")),
    }
}
