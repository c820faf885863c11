//! What the tests share: the real programs as child processes, patience, fixtures.

pub(crate) mod http;

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kv_indexer::proto::kvindexer::{WaitVisibleRequest, kv_indexer_client::KvIndexerClient};
use tonic::transport::Channel;

pub(crate) use self::http::http_get;

/// How long `eventually` and the harness wait, in seconds; for slow machines.
const PATIENCE_VARIABLE: &str = "KVX_TEST_PATIENCE_SECONDS";
const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(5);

/// Bounds every wait of the tests.
pub(crate) fn patience() -> Duration {
    std::env::var(PATIENCE_VARIABLE)
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .map_or(DEFAULT_PATIENCE, Duration::from_secs_f64)
}

/// Calls `probe` until it gives a value; panics with `what` and its last complaint when patience ends.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        let complaint = match probe() {
            Ok(value) => return value,
            Err(complaint) => complaint,
        };
        assert!(
            Instant::now() < deadline,
            "{what}: still not after {:?}: {complaint}\n({PATIENCE_VARIABLE} gives more time)",
            patience(),
        );
        thread::sleep(STEP);
    }
}

/// `tests/fixtures`, or a file in it.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// For the client side of a test: everything on the test's own thread.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A connected client. Call it on the runtime that uses the client.
pub(crate) async fn connect(grpc: SocketAddr) -> KvIndexerClient<Channel> {
    let client = KvIndexerClient::connect(format!("http://{grpc}")).await.unwrap();
    client.max_decoding_message_size(64 << 20)
}

/// A program under test, with all that it writes. Dropping it stops it with SIGTERM and checks that it
/// ends well.
pub(crate) struct Program {
    name: &'static str,
    child: Child,
    output: Vec<JoinHandle<()>>,
    log: Arc<Mutex<Vec<String>>>,
    finished: bool,
}

impl Program {
    /// Starts it.
    pub(crate) fn start(name: &'static str, mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let output = vec![
            drain(child.stdout.take().unwrap(), &log),
            drain(child.stderr.take().unwrap(), &log),
        ];
        Self { name, child, output, log, finished: false }
    }

    /// Process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The address that it announces after `prefix`; panics if it ends without.
    pub(crate) fn announced(&mut self, prefix: &str) -> SocketAddr {
        let (log, child) = (Arc::clone(&self.log), &mut self.child);
        let found = eventually(prefix, || {
            // Looked at before the log, so that the last lines of a dead process are not missed.
            let ended = child.try_wait().unwrap();
            let log = log.lock().unwrap();
            if let Some(address) = address_after(&log, prefix) {
                return Ok(Ok(address));
            }
            match ended {
                Some(status) => Ok(Err(format!("ended: {status}\n{}", log.join("\n")))),
                None => Err("no such line".to_owned()),
            }
        });
        match found {
            Ok(address) => address,
            Err(ended) => {
                self.finished = true;
                panic!("{} {ended}", self.name);
            }
        }
    }

    /// What it wrote so far, both streams.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(mut self) -> (ExitStatus, String) {
        let status = self.ended();
        (status, self.log())
    }

    /// Stops it with SIGTERM; panics unless it then exits with 0. Returns what it wrote.
    pub(crate) fn finish(mut self) -> String {
        let status = self.stop();
        let log = self.log();
        assert!(status.success(), "{} ended with {status} after SIGTERM:\n{log}", self.name);
        log
    }

    /// Ends it with SIGKILL, as an operating system out of memory does.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.ended();
    }

    fn stop(&mut self) -> ExitStatus {
        terminate(&self.child);
        self.ended()
    }

    /// Waits for the end, and makes it when patience ends.
    fn ended(&mut self) -> ExitStatus {
        self.finished = true;
        let deadline = Instant::now() + patience();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() >= deadline {
                self.child.kill().unwrap();
                break self.child.wait().unwrap();
            }
            thread::sleep(STEP);
        };
        for thread in self.output.drain(..) {
            thread.join().unwrap();
        }
        status
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let status = self.stop();
        if thread::panicking() {
            // The log is what explains the failed test.
            println!("--- {} ({status})\n{}\n---", self.name, self.log());
        } else {
            assert!(status.success(), "{} ended with {status}:\n{}", self.name, self.log());
        }
    }
}

/// Waits until `sequence` of a pod's rank is visible in an epoch later than `after`; returns the epoch.
pub(crate) fn visible(
    runtime: &tokio::runtime::Runtime,
    client: &mut KvIndexerClient<Channel>,
    (pod, rank): (&str, u32),
    sequence: u64,
    after: u64,
) -> u64 {
    eventually(&format!("{pod} rank {rank} sequence {sequence}"), || {
        let request = WaitVisibleRequest {
            pod: pod.to_owned(),
            dp_rank: Some(rank),
            sequence,
            epoch: None,
            timeout_ms: 1_000,
        };
        let answer = runtime.block_on(client.wait_visible(request));
        let answer = answer.map_err(|status| status.to_string())?.into_inner();
        if answer.reached && answer.epoch > after {
            Ok(answer.epoch)
        } else {
            Err(format!("{answer:?}"))
        }
    })
}

/// A running `kv-indexer`. Dropping it stops it with SIGTERM and checks that it ends well.
pub(crate) struct Indexer {
    /// Address of the gRPC API.
    pub(crate) grpc: SocketAddr,
    /// Address of the HTTP admin server.
    pub(crate) admin: SocketAddr,
    program: Program,
    // Deleted when the process is gone.
    _config: Option<tempfile::NamedTempFile>,
}

impl Indexer {
    /// Starts it, on free ports unless the arguments say otherwise, and waits until it is ready.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::launch(None, arguments)
    }

    /// As [`Self::start`], with a configuration file of this content.
    pub(crate) fn with_config(yaml: &str, arguments: &[&str]) -> Self {
        Self::launch(Some(yaml_file(yaml)), arguments)
    }

    fn launch(config: Option<tempfile::NamedTempFile>, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kv-indexer"));
        if !arguments.contains(&"--grpc-listen") {
            command.args(["--grpc-listen", "127.0.0.1:0"]);
        }
        command.args(["--admin-listen", "127.0.0.1:0"]);
        if let Some(file) = &config {
            command.arg("--config").arg(file.path());
        }
        command.args(arguments);
        let mut program = Program::start("kv-indexer", command);
        let grpc = program.announced("grpc listening on ");
        let admin = program.announced("admin listening on ");
        let indexer = Self { grpc, admin, program, _config: config };
        eventually("readiness", || match indexer.get("/readyz") {
            Ok((200, _)) => Ok(()),
            other => Err(format!("/readyz: {other:?}")),
        });
        indexer
    }

    /// `GET path` on the admin server: status and body.
    pub(crate) fn get(&self, path: &str) -> Result<(u16, String), String> {
        http_get(self.admin, path).map_err(|error| error.to_string())
    }

    /// What it wrote so far, both streams.
    pub(crate) fn log(&self) -> String {
        self.program.log()
    }

    /// Ends it without a word.
    pub(crate) fn kill(self) {
        self.program.kill();
    }

    /// Stops it with SIGTERM; panics unless it then exits with 0. Returns what it wrote.
    pub(crate) fn finish(self) -> String {
        self.program.finish()
    }
}

/// A file of this content that is deleted with the value.
pub(crate) fn yaml_file(yaml: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    file.write_all(yaml.as_bytes()).unwrap();
    file.flush().unwrap();
    file
}

/// SIGTERM by process id.
pub(crate) fn terminate(child: &Child) {
    let done = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(done.success(), "kill -TERM {}", child.id());
}

/// SIGINT by process id.
pub(crate) fn interrupt(child: &Child) {
    let done = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(done.success(), "kill -INT {}", child.id());
}

fn drain(stream: impl Read + Send + 'static, log: &Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    let log = Arc::clone(log);
    thread::spawn(move || {
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            log.lock().unwrap().push(line);
        }
    })
}

fn address_after(log: &[String], prefix: &str) -> Option<SocketAddr> {
    log.iter().find_map(|line| {
        let (_, rest) = line.split_once(prefix)?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

#[test]
fn addresses_are_found_in_the_log() {
    let log = ["x".to_owned(), "INFO grpc listening on 127.0.0.1:4711 (plain)".to_owned()];
    let found = address_after(&log, "grpc listening on ");
    assert_eq!(found, Some(SocketAddr::from(([127, 0, 0, 1], 4711))));
    assert_eq!(address_after(&log, "admin listening on "), None);
}

/// A commented sample of a configuration with its examples in force, which stand behind `#: `, and
/// without the lines that they replace.
pub(crate) fn with_examples(sample: &str, is_replaced: impl Fn(&str) -> bool) -> String {
    let lines = sample.lines().filter(|line| !is_replaced(line));
    let lines = lines.map(|line| match line.split_once("#: ") {
        Some((indent, example)) if indent.trim().is_empty() => format!("{indent}{example}\n"),
        _ => format!("{line}\n"),
    });
    lines.collect()
}

/// Paths of all entries; list indices become `[]`. What is below a path that `is_free` knows is left
/// out: its names are the user's.
pub(crate) fn paths(value: &serde_json::Value, is_free: &dyn Fn(&str) -> bool) -> BTreeSet<String> {
    fn visit(
        value: &serde_json::Value,
        at: &str,
        is_free: &dyn Fn(&str) -> bool,
        out: &mut BTreeSet<String>,
    ) {
        match value {
            serde_json::Value::Object(map) => {
                for (name, value) in map {
                    let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                    out.insert(path.clone());
                    if !is_free(&path) {
                        visit(value, &path, is_free, out);
                    }
                }
            }
            serde_json::Value::Array(list) => {
                list.iter().for_each(|value| visit(value, &format!("{at}[]"), is_free, out));
            }
            _ => {}
        }
    }
    let mut out = BTreeSet::new();
    visit(value, "", is_free, &mut out);
    out
}
