//! The process: start, end, exit codes, the pods file, engines that are asked, readiness, admin pages.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use kv_indexer::proto::kvindexer::PodState;

use super::{engine::Engine, rig::Rig};
use crate::support::{Indexer, eventually};

/// Runs it to its end: exit code, and what it wrote to standard output and error.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kv-indexer"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + crate::support::patience();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{arguments:?} does not end");
        }
        thread::sleep(Duration::from_millis(5));
    };
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (status.code().unwrap(), out, err)
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.flush().unwrap();
    file
}

#[test]
fn bad_command_lines_and_configurations_exit_with_64() {
    let (code, _, err) = run(&["--nonsense"]);
    assert!(code == 64 && err.contains("--nonsense"), "{code} {err}");
    let (code, _, err) = run(&["--pod", "a=udp://h:1"]);
    assert!(code == 64 && err.contains("udp"), "{code} {err}");
    let typo = file("kvEventsConfig: {zmqEndpont: 'tcp://*:1'}\n");
    let path = typo.path().to_str().unwrap();
    for check in [&["--check"][..], &[]] {
        let (code, _, err) = run(&[&["--config", path], check].concat());
        assert_eq!(code, 64, "{err}");
        assert!(err.contains("zmqEndpont") && err.contains("zmqEndpoint"), "{err}");
    }
    // Without a bound socket, a pod without endpoint cannot be heard.
    let unheard = file("pods: [{id: a}]\n");
    let (code, _, err) = run(&["--check", "--config", unheard.path().to_str().unwrap()]);
    assert!(code == 64 && err.contains("endpoint"), "{code} {err}");
    let heard = file("kvEventsConfig: {zmqEndpoint: 'tcp://*:1'}\npods: [{id: a}]\n");
    let (code, out, _) = run(&["--check", "--config", heard.path().to_str().unwrap()]);
    assert!(code == 0 && out.contains("valid"), "{code} {out}");
}

#[test]
fn a_taken_port_exits_with_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, out, err) = run(&["--grpc-listen", &address, "--admin-listen", "127.0.0.1:0"]);
    assert!(code == 1 && err.contains("grpcListen") && out.is_empty(), "{code} {out} {err}");
    let config = file(&format!("kvEventsConfig: {{zmqEndpoint: 'tcp://{address}'}}\n"));
    let path = config.path().to_str().unwrap();
    let ports = ["--grpc-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let (code, _, err) = run(&[&["--config", path], &ports[..]].concat());
    assert!(code == 1 && err.contains(&address), "{code} {err}");
}

/// Every batch that was received is applied before the end, and the end is a good one.
#[test]
fn sigterm_drains() {
    let mut rig = Rig::start("kvEventsConfig: {concurrency: 1}");
    let mut engine = Engine::bind("kv@a@m");
    rig.register("a", &engine, None);
    for block in 0..2_000 {
        let first = block * 16 + 1;
        let after = if block == 0 { String::new() } else { format!("after {block}") };
        engine.send(&format!("store {} of {first}-{} {after}", block + 1, first + 15));
    }
    // Received to the last one, applied or not.
    rig.until("a", "received", |row| row.seen_sequence == Some(1_999));
    let log = rig.finish();
    assert!(!log.contains("were not applied"), "{log}");
}

#[test]
fn admin_pages_and_llmd_names() {
    let mut engine = Engine::bind("kv@a@m");
    for aliases in [true, false] {
        let mut rig = Rig::start(&format!("llmdMetrics: {aliases}"));
        assert_eq!(rig.indexer.get("/livez").unwrap().0, 200);
        assert_eq!(rig.indexer.get("/readyz").unwrap().0, 200);
        let (status, config) = rig.indexer.get("/config").unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!((status, &config["llmdMetrics"]), (200, &serde_json::json!(aliases)));
        rig.register("a", &engine, None);
        engine.send("store 1-2 of 1-32");
        rig.expect("m", "1-32", "a#0=2");
        let series = "kv_pod_blocks{pod=\"a\",rank=\"0\"}";
        assert_eq!(rig.metric(series), 2.0);
        assert_eq!(rig.metrics().contains("llm_d_epp_kv_cache_"), aliases);
        if aliases {
            let messages =
                "llm_d_epp_kv_cache_events_messages_received_total{pod_identifier=\"a\"}";
            assert_eq!(rig.metric(messages), 1.0);
            assert_eq!(rig.metric("llm_d_epp_kv_cache_events_active_subscribers"), 1.0);
        }
        rig.unregister("a").unwrap();
        let metrics = rig.metrics();
        assert!(!metrics.contains("pod=\"a\"") && !metrics.contains("pod_identifier=\"a\""));
        rig.finish();
        engine.next = 0;
    }
}

/// Ready when the timeout has passed, with one pod dead and one idle; and at once when each pod
/// known at start has been heard of.
#[test]
fn readiness() {
    let idle = Engine::bind("kv@idle@m");
    let started = Instant::now();
    let mut rig = Rig::start(&format!(
        "readyTimeoutMs: 600
kvEventsConfig: {{replay: {{idleMs: 50}}}}
pods:
- {{id: dead, endpoint: 'tcp://127.0.0.1:9'}}
- {{id: gone, endpoint: 'tcp://127.0.0.1:9', replayEndpoint: 'tcp://127.0.0.1:10'}}
- {{id: idle, endpoint: '{}'}}",
        idle.endpoint,
    ));
    assert!(started.elapsed() >= Duration::from_millis(600));
    // An engine that was never there is not one whose replay is silent.
    assert_eq!(rig.pod("gone").state(), PodState::Connecting);
    let log = rig.finish();
    assert!(log.contains("Ready by timeout"), "{log}");

    // Its pods file counts as known at start; replay tells that the engine is there.
    let mut engine = Engine::bind("kv@a@m");
    engine.keep("store 1 of 1-16");
    let router = super::engine::Router::of(&engine);
    let pods = file(&format!(
        "[{{id: a, endpoint: '{}', replayEndpoint: '{}'}}]",
        engine.endpoint, router.endpoint,
    ));
    let path = pods.path().to_str().unwrap();
    let mut rig = Rig::over(Indexer::start(&["--pods-file", path]));
    assert_eq!(rig.pod("a").state(), PodState::Live);
    rig.expect("m", "1-16", "a#0=1");
    rig.finish();
}

#[test]
fn the_pods_file_is_followed() {
    let mut engines: Vec<Engine> = (0..4).map(|_| Engine::bind("kv@x@m")).collect();
    let entry =
        |id: &str, engine: &Engine| format!("- {{id: {id}, endpoint: '{}'}}\n", engine.endpoint);
    let pods = file(&entry("a", &engines[0]));
    // By renaming, as a ConfigMap is changed.
    let write = |text: &str| {
        let new = pods.path().with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, pods.path()).unwrap();
    };
    let config =
        format!("readyTimeoutMs: 0\npodsFile: '{}'\npodsFilePollMs: 20\n", pods.path().display(),);
    let mut rig = Rig::start(&config);
    let names = |rig: &mut Rig, wanted: &[&str]| {
        eventually(&format!("{wanted:?}"), || {
            let mut pods: Vec<String> = rig.pods().into_iter().map(|row| row.pod).collect();
            pods.sort();
            if pods == wanted { Ok(()) } else { Err(format!("{pods:?}")) }
        });
    };
    names(&mut rig, &["a"]);
    engines[0].subscribed();
    engines[0].send("store 1 of 1-16");
    rig.expect("m", "1-16", "a#0=1");
    // Add.
    write(&(entry("a", &engines[0]) + &entry("b", &engines[1])));
    names(&mut rig, &["a", "b"]);
    // Break: the last good one holds.
    write("- {id: [");
    eventually("the broken file is noticed", || match rig.indexer.log() {
        log if log.contains("Pods file cannot be used") => Ok(()),
        log => Err(log),
    });
    names(&mut rig, &["a", "b"]);
    assert_eq!(rig.depths("m", "1-16"), "a#0=1");
    // Change one, remove the other, and list one pod twice, with ranks.
    let ranked = format!("- {{id: c, rank: 1, endpoint: '{}'}}\n", engines[3].endpoint);
    write(&(entry("b", &engines[2]) + &entry("c", &engines[0]) + &ranked));
    names(&mut rig, &["b", "c", "c"]);
    assert_eq!(rig.depths("m", "1-16"), "");
    engines[2].subscribed();
    engines[2].send("store 1 of 1-16");
    engines[3].subscribed();
    engines[3].send("store 1 of 1-16");
    rig.expect("m", "1-16", "b#0=1 c#1=1");
    // The entry without rank goes alone.
    write(&(entry("b", &engines[2]) + &ranked));
    names(&mut rig, &["b", "c"]);
    assert_eq!(rig.depths("m", "1-16"), "b#0=1 c#1=1");
    rig.finish();
}

/// A very small HTTP server: a body by path, 404 otherwise.
struct Http {
    address: String,
    bodies: Arc<Mutex<Vec<(String, String)>>>,
}

impl Http {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let bodies = Arc::<Mutex<Vec<(String, String)>>>::default();
        let known = Arc::clone(&bodies);
        // Ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(&stream);
                let mut line = String::new();
                drop(reader.read_line(&mut line));
                let mut header = String::new();
                while reader.read_line(&mut header).is_ok_and(|read| read > 2) {
                    header.clear();
                }
                let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                let body = known.lock().unwrap().iter().find(|known| known.0 == path).cloned();
                let (code, body) =
                    body.map_or(("404 Not Found", String::new()), |(_, body)| ("200 OK", body));
                let head = format!("HTTP/1.1 {code}\r\nContent-Length: {}\r\n\r\n", body.len());
                // A client that went away is its own business.
                drop((&stream).write_all((head + &body).as_bytes()));
            }
        });
        Self { address, bodies }
    }

    fn answer(&self, path: &str, body: &serde_json::Value) {
        self.bodies.lock().unwrap().push((path.to_owned(), body.to_string()));
    }
}

#[test]
fn an_engine_is_asked_where_it_publishes() {
    let http = Http::start();
    let mut ranks = [Engine::bind("").with_rank(Some(0)), Engine::bind("").with_rank(Some(1))];
    let sources: Vec<_> = (0..)
        .zip(&ranks)
        .map(|(rank, engine)| {
            let endpoint = engine.endpoint.replace("127.0.0.1", "*");
            serde_json::json!({
                "data_parallel_rank": rank, "endpoint": endpoint, "replay_endpoint": null, "topic": "",
            })
        })
        .collect();
    let pod = format!("p={}", http.address);
    let mut rig = Rig::over(Indexer::with_config("readyTimeoutMs: 0", &["--pod", &pod]));
    // It has not come up yet; it is asked again.
    eventually("asked in vain", || match rig.indexer.log() {
        log if log.contains("did not say where it publishes") => Ok(()),
        log => Err(log),
    });
    assert!(rig.rows().is_empty());
    http.answer("/v1/models", &serde_json::json!({"data": [{"id": "served"}]}));
    http.answer("/kv_event_sources", &serde_json::json!(sources));
    for engine in &mut ranks {
        engine.subscribed();
        engine.send("store 1 of 1-16");
    }
    rig.expect("served", "1-16", "p#0=1 p#1=1");
    // Declared otherwise, what was found out is replaced, too.
    let mut direct = Engine::bind("kv@x@m");
    rig.register("p", &direct, None);
    direct.send("store 1 of 1-16");
    rig.expect("m", "1-16", "p#0=1");
    assert_eq!(rig.rows(), ["p#0"]);
    // And back.
    rig.try_register(kv_indexer::proto::kvindexer::RegisterPodRequest {
        pod: "p".to_owned(),
        endpoint: http.address.clone(),
        ..Default::default()
    })
    .unwrap();
    for engine in &mut ranks {
        engine.subscribed();
    }
    eventually("only what the engine announces", || match rig.rows() {
        rows if rows == ["p#0", "p#1"] => Ok(()),
        rows => Err(format!("{rows:?}")),
    });
    rig.unregister("p").unwrap();
    assert!(rig.rows().is_empty());
    rig.finish();
}

/// A log on a full disk, and a peer that connects and never speaks: the service serves, drains and
/// ends with 0 all the same.
#[test]
fn neither_a_full_disk_nor_an_idle_peer_is_a_fault() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_kv-indexer"))
        .args(["--grpc-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
        .args(["--log-level", "debug"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(full)
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let grpc = said.next().unwrap().unwrap();
    let grpc = grpc.strip_prefix("grpc listening on ").unwrap().to_owned();
    let idle = std::net::TcpStream::connect(grpc).unwrap();
    crate::support::terminate(&child);
    let deadline = Instant::now() + crate::support::patience();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "still running");
        thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(0));
    drop(idle);
}
