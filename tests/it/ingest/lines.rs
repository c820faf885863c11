//! Connections that break, or only seem to hold.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use kv_indexer::proto::kvindexer::PodState;

use super::{
    engine::{Engine, Router},
    rig::Rig,
};

/// A TCP proxy that can stop forwarding without closing anything, as a firewall does that has
/// forgotten a connection.
struct Proxy {
    endpoint: String,
    stalled: Arc<AtomicBool>,
}

impl Proxy {
    fn to(endpoint: &str) -> Self {
        let target: SocketAddr = endpoint.trim_start_matches("tcp://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("tcp://{}", listener.local_addr().unwrap());
        let stalled = Arc::new(AtomicBool::new(false));
        let stall = Arc::clone(&stalled);
        // Its threads end with the connections and, for the listener, with the process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(client) = stream else { return };
                let Ok(server) = TcpStream::connect(target) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let stall = Arc::clone(&stall);
                    thread::spawn(move || forward(from, to, &stall));
                }
            }
        });
        Self { endpoint, stalled }
    }

    fn stall(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::Release);
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, stalled: &AtomicBool) {
    from.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let mut buffer = [0; 4096];
    let mut lost = false;
    loop {
        // What passes a stalled proxy is gone, and so is the connection, though nobody hears of it.
        lost |= stalled.load(Ordering::Acquire);
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) if lost => {}
            Ok(read) => {
                if to.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) => {}
            Err(_) => break,
        }
    }
    // Either side may be gone already.
    drop(to.shutdown(std::net::Shutdown::Both));
}

#[test]
fn a_half_open_connection_is_noticed_and_made_again() {
    for replay in [true, false] {
        let mut rig = Rig::start(
            "kvEventsConfig: {heartbeatMs: 100, reconnectMs: 20, reconnectMaxMs: 100, replay: {idleMs: 200}}",
        );
        let mut engine = Engine::bind("kv@a@m");
        let proxy = Proxy::to(&engine.endpoint);
        let router = replay.then(|| Router::of(&engine));
        let direct = std::mem::replace(&mut engine.endpoint, proxy.endpoint.clone());
        rig.register("a", &engine, router.as_ref());
        engine.endpoint = direct;
        engine.send("store 1 of 1-16");
        rig.expect("m", "1-16", "a#0=1");
        rig.state("a", PodState::Live);
        proxy.stall(true);
        let row = rig.state("a", PodState::Stale);
        assert!(row.may_undercount && row.may_overcount, "{row:?}");
        assert_eq!(rig.depths("m", "1-16"), "a#0=1", "what is known is still answered");
        assert_eq!(rig.metric("kv_pod_connected{pod=\"a\",rank=\"0\"}"), 0.0);
        engine.send("store 2 of 17-32 after 1");
        proxy.stall(false);
        engine.subscribed();
        let last = engine.send("store 3 of 33-48 after 2");
        let row = rig.applied("a", last);
        if replay {
            rig.expect("m", "1-48", "a#0=3");
            rig.state("a", PodState::Live);
        } else {
            assert_eq!(row.state(), PodState::Degraded, "{row:?}");
        }
        assert!(rig.metric("kv_events_reconnections_total") >= 1.0);
        rig.finish();
    }
}

#[test]
fn an_engine_that_was_killed_begins_a_new_epoch() {
    for replay in [true, false] {
        let mut rig = Rig::start(
            "kvEventsConfig: {reconnectMs: 20, reconnectMaxMs: 100, replay: {idleMs: 200}}",
        );
        let mut engine = Engine::bind("kv@a@m");
        let router = replay.then(|| Router::of(&engine));
        rig.register("a", &engine, router.as_ref());
        engine.send("store 1-4 of 1-64");
        let last = engine.send("store 5 of 65-80 after 4");
        rig.applied("a", last);
        assert_eq!(rig.depths("m", "1-80"), "a#0=5");
        engine.restart();
        if replay {
            // Said before we are back: only replay has it.
            engine.keep("store 9 of 1-16");
        }
        engine.subscribed();
        engine.send("store 10 of 1-16; store 11 of 17-32 after 10");
        rig.expect("m", "1-80", "a#0=2");
        let row = rig.state("a", PodState::Live);
        assert_eq!(row.epoch, 2, "replay {replay}: {row:?}");
        rig.finish();
    }
}

/// An engine that is not there yet is waited for, and one that ends is shown as stale.
#[test]
fn engines_come_late_and_leave() {
    let mut rig = Rig::start("kvEventsConfig: {reconnectMs: 20, reconnectMaxMs: 100}");
    let engine = Engine::bind("kv@a@m");
    let endpoint = engine.endpoint.clone();
    drop(engine);
    let request = kv_indexer::proto::kvindexer::RegisterPodRequest {
        pod: "a".to_owned(),
        endpoint: endpoint.clone(),
        ..Default::default()
    };
    rig.try_register(request).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(rig.pod("a").state(), PodState::Connecting);
    let mut engine = Engine::bind("kv@a@m");
    engine.endpoint = endpoint;
    engine.restart();
    engine.subscribed();
    engine.send("store 1 of 1-16");
    rig.expect("m", "1-16", "a#0=1");
    drop(engine);
    rig.state("a", PodState::Stale);
    assert_eq!(rig.depths("m", "1-16"), "a#0=1");
    rig.finish();
}
