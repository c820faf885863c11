//! Pods that die and come, endpoints that change, and an endpoint picker that is killed.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use http::StatusCode;
use tokio::task::JoinSet;

use super::{
    http::Call,
    path::{Path, Pods},
    rig::{Envoy, Epp, Labelled, endpoints_yaml},
};
use crate::support::{eventually, yaml_file};

const BODY: &str = r#"{"model": "mock", "prompt": "one two three", "max_tokens": 2}"#;

fn call() -> Call {
    Call::post("/v1/completions", BODY)
}

#[test]
fn pods_come_and_go() {
    const CONFIG: &str = "
plugins:
- type: file-discovery
  parameters: {path: ENDPOINTS, watchFile: true}
- type: random-picker
dataLayer:
  discovery: {pluginRef: file-discovery}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: random-picker}]
";
    let mut pods = Pods::start(2);
    let file = yaml_file("");
    let write = |pods: &[(&str, SocketAddr)]| {
        let list: Vec<Labelled<'_>> =
            pods.iter().map(|(name, address)| (*name, *address, &[][..])).collect();
        // As ConfigMaps and careful editors do.
        let new = file.path().with_extension("new");
        std::fs::write(&new, endpoints_yaml(&list)).unwrap();
        std::fs::rename(new, file.path()).unwrap();
    };
    let [a, b] = pods.addresses()[..] else { unreachable!() };
    write(&[("a", a), ("b", b)]);
    let epp = Epp::start(&CONFIG.replace("ENDPOINTS", file.path().to_str().unwrap()), &[]);
    let envoy = Envoy::start("recommended.yaml", epp.grpc, &[a, b]);
    eventually("both endpoints are known", || {
        let ready = epp.metric("llm_d_epp_ready_endpoints", "");
        if ready == 2.0 { Ok(()) } else { Err(format!("{ready}")) }
    });
    let send = |pods: &Pods| {
        let answer = pods.runtime.block_on(call().send(envoy.clients)).unwrap();
        (answer.status, answer.header("x-served-by").to_owned())
    };

    // A pod that died and is still listed: Envoy tries another one.
    let dead = pods.engines.remove(0);
    pods.runtime.block_on(dead.kill());
    for _ in 0..20 {
        assert_eq!(send(&pods), (StatusCode::OK, b.to_string()));
    }
    assert!(epp.metric("epp_picks_total", "default/a") > 0.0, "nobody picked the dead pod");

    // Taken off the list, it is picked no more.
    write(&[("b", b)]);
    eventually("the dead pod is forgotten", || {
        let ready = epp.metric("llm_d_epp_ready_endpoints", "");
        if ready == 1.0 { Ok(()) } else { Err(format!("{ready}")) }
    });
    assert!(!epp.scrape().contains("default/a"), "metrics of a pod that is gone");

    // A file that is no list keeps the pods.
    std::fs::write(file.path(), "endpoints: nonsense").unwrap();
    eventually("the bad file is noticed", || {
        let log = epp.program.log();
        if log.contains("nonsense") || log.contains("endpoints") { Ok(()) } else { Err(log) }
    });
    assert_eq!(send(&pods), (StatusCode::OK, b.to_string()));

    // A new one is used.
    pods.add();
    let c = pods.engines.last().unwrap().http();
    envoy.set_pods(&[b, c]);
    write(&[("b", b), ("c", c)]);
    eventually("the new pod serves", || match send(&pods) {
        (StatusCode::OK, by) if by == c.to_string() => Ok(()),
        other => Err(format!("{other:?}")),
    });
    epp.program.finish();
    envoy.program.finish();
    pods.stop();
}

/// What became of one request.
#[derive(Clone, Copy, Debug)]
struct Sent {
    began: Instant,
    ended: Instant,
    ok: bool,
}

#[test]
fn a_killed_endpoint_picker_is_no_outage() {
    const RATE: u32 = 200;
    const SECONDS: u32 = 3;
    let path = Path::start("recommended.yaml", 2);
    let clients = path.envoy.clients;
    let Path { envoy, epp, pods } = path;
    let killed = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&killed);
    let load = pods.runtime.spawn(async move {
        let mut sent = JoinSet::new();
        let start = Instant::now();
        for n in 0..RATE * SECONDS {
            tokio::time::sleep_until((start + Duration::from_secs(1) / RATE * n).into()).await;
            sent.spawn(async move {
                let began = Instant::now();
                let answer = call().send(clients).await;
                let ok = answer.is_ok_and(|answer| answer.status == StatusCode::OK);
                Sent { began, ended: Instant::now(), ok }
            });
        }
        assert!(flag.load(Ordering::Relaxed), "the load ended before the kill");
        sent.join_all().await
    });
    std::thread::sleep(Duration::from_secs(1));
    let before = Instant::now();
    epp.program.kill();
    let after = Instant::now();
    killed.store(true, Ordering::Relaxed);
    let sent = pods.runtime.block_on(load).unwrap();
    assert_eq!(sent.len(), (RATE * SECONDS) as usize);
    let count = |of: &dyn Fn(&Sent) -> bool| sent.iter().filter(|sent| of(sent)).count();
    let failed = count(&|sent| !sent.ok);
    // Envoy keeps the body until it is routed, so even those inside ext_proc at the kill get through.
    let inside = count(&|sent| sent.began < after && sent.ended > before);
    let failed_later = count(&|sent| !sent.ok && sent.began >= after);
    let failed_earlier = count(&|sent| !sent.ok && sent.ended <= before);
    println!("{} sent, {inside} under way at the kill, {failed} of them failed", sent.len());
    assert_eq!((failed_earlier, failed_later), (0, 0), "{failed} failed, {inside} under way");
    assert_eq!(failed, 0, "of the {inside} under way");
    let later = count(&|sent| sent.began >= after);
    assert!(later > (RATE * SECONDS) as usize / 3, "only {later} requests came after the kill");
    envoy.program.finish();
    pods.stop();
}
