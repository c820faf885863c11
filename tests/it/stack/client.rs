//! The client that plays Envoy's part, against pickers that are not there, refuse, or go away.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::Command,
};

use bytes::Bytes;
use kv_indexer::loadgen::drive::{Failure, picker::Picker};

use super::rig::{COMPLETIONS, body, prompt};
use crate::{
    epp::rig::Epp,
    support::{Program, runtime},
};

const POD: &str = "127.0.0.1:8000";

/// An endpoint picker at this address that names one pod.
fn null(address: SocketAddr) -> (Program, SocketAddr) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadgen"));
    command.args(["null", "--ext-proc", &address.to_string(), "--destination", POD]);
    let mut program = Program::start("null", command);
    let bound = program.announced("ext_proc listening on ");
    (program, bound)
}

async fn pick(picker: &Picker, body: &[Bytes]) -> Result<SocketAddr, Failure> {
    picker.pick(COMPLETIONS, "id", body).await.map(|routed| routed.pod)
}

#[test]
fn a_picker_that_comes_back_is_asked_again() {
    let runtime = runtime();
    runtime.block_on(async {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let picker = Picker::new(address).unwrap();
        let body = [body(prompt(0, 0))];
        assert_eq!(pick(&picker, &body).await, Err(Failure::Picker), "nobody is there");

        let (first, _) = null(address);
        assert_eq!(pick(&picker, &body).await, Ok(POD.parse().unwrap()));
        // The answer of an exchange that was under way is not held up, and predicts nothing.
        let mut routed = picker.pick(COMPLETIONS, "id", &body).await.unwrap();
        first.kill();
        routed.headers(200, "text/event-stream");
        for _ in 0..10_000 {
            routed.piece(&Bytes::from_static(b"data: {}\n\n"));
        }
        assert_eq!(routed.end().await, Default::default());

        let (_second, _) = null(address);
        let deadline = std::time::Instant::now() + crate::support::patience();
        while pick(&picker, &body).await != Ok(POD.parse().unwrap()) {
            assert!(std::time::Instant::now() < deadline, "no new connection");
        }
    });
}

#[test]
fn large_bodies_and_many_exchanges_share_a_connection() {
    let (_program, address) = null((Ipv4Addr::LOCALHOST, 0).into());
    let pod: SocketAddr = POD.parse().unwrap();
    runtime().block_on(async {
        let picker = Picker::new(address).unwrap();
        let large = vec![Bytes::from(vec![b' '; 3 << 20]), Bytes::from_static(b"{}")];
        assert_eq!(pick(&picker, &large).await, Ok(pod));
        let mut open = Vec::new();
        for _ in 0..500 {
            open.push(picker.pick(COMPLETIONS, "id", &[body(prompt(0, 0))]).await.unwrap());
        }
        assert!(open.iter().all(|routed| routed.pod == pod));
        for routed in open {
            routed.end().await;
        }
    });
}

#[test]
fn a_refusal_has_its_status() {
    // Nobody to send it to.
    let config = "plugins: [{type: decode-filter}]\n\
                  schedulingProfiles: [{name: default, plugins: [{pluginRef: decode-filter}]}]\n";
    let epp = Epp::start(config, &["--endpoint", "a=127.0.0.1:1,llm-d.ai/role=prefill"]);
    runtime().block_on(async {
        let picker = Picker::new(epp.grpc).unwrap();
        let refused = pick(&picker, &[body(prompt(0, 0))]).await;
        assert!(matches!(refused, Err(Failure::Refused(429 | 503))), "{refused:?}");
        let refused = pick(&picker, &[Bytes::from_static(b"{\"model\": 1")]).await;
        assert_eq!(refused, Err(Failure::Refused(400)));
    });
}
