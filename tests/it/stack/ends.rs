//! How stacks end, and what is said of those that do not start.

use std::{
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use kv_indexer::loadgen::{
    resources::Watched,
    stack::{Launch, Policy, Stack, child::Child},
};

use super::rig::{Client, launch, options, prompt, runs, start};
use crate::support::{Program, eventually, http, patience, runtime};

fn pids(stack: &Stack) -> Vec<u32> {
    let sources = stack.components().into_iter().flat_map(|component| component.sources);
    let pid = |watched| match watched {
        Watched::Pid(pid) => pid,
        other => panic!("{other:?}"),
    };
    sources.map(pid).collect()
}

#[test]
fn no_process_is_left_after_stop_or_drop() {
    runtime().block_on(async {
        let stack = start(options(Policy::Precise)).await;
        let stopped = pids(&stack);
        assert_eq!(stopped.len(), 3);
        stack.stop().await;
        assert!(!stopped.iter().copied().any(runs), "{stopped:?}");

        let stack = start(options(Policy::Constant)).await;
        let dropped = pids(&stack);
        drop(stack);
        assert!(!dropped.iter().copied().any(runs), "{dropped:?}");
    });
}

#[test]
fn children_end_with_a_parent_that_is_killed() {
    // The shell is the only one that holds the other end of the pipe, as we are for a stack.
    const PARENT: &str = "mkfifo \"$1\"
        \"$0\" component guard -- sleep 1000 < \"$1\" & echo guard $!
        \"$0\" component fleet -- --engines 1 < \"$1\" & echo fleet $!
        exec 3> \"$1\"
        wait";
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", PARENT, env!("CARGO_BIN_EXE_loadgen")]).arg(folder.path().join("pipe"));
    let parent = Program::start("parent", command);
    let children = eventually("the children", || {
        let log = parent.log();
        let after = |prefix: &str| {
            let words = log.lines().find_map(|line| line.strip_prefix(prefix));
            words.and_then(|words| words.parse::<u32>().ok()).ok_or_else(|| log.clone())
        };
        let served = log.lines().any(|line| line.starts_with("http://"));
        let children = [after("guard ")?, after("fleet ")?, after("pid ")?];
        served.then_some(children).ok_or_else(|| log.clone())
    });
    assert!(children.iter().copied().all(runs), "{children:?}");
    parent.kill();
    eventually("the end of all children", || match children.iter().find(|pid| runs(**pid)) {
        Some(pid) => Err(format!("{pid} runs")),
        None => Ok(()),
    });
}

#[test]
fn a_process_that_ended_is_a_fault_with_its_last_words() {
    runtime().block_on(async {
        let mut stack = start(options(Policy::LeastLoad)).await;
        assert_eq!(stack.fault(), None);
        let epp = stack.components().into_iter().find(|it| it.name == "epp").unwrap();
        let [Watched::Pid(pid)] = epp.sources[..] else { panic!("{epp:?}") };
        assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
        let fault = eventually("the fault", || stack.fault().ok_or_else(|| "none".to_owned()));
        assert!(fault.contains("epp ended: signal: 9"), "{fault}");
        stack.stop().await;
    });
}

/// A program of the test's own.
fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("program");
    let mut file = std::fs::File::create(&path).unwrap();
    writeln!(file, "#!/bin/sh\n{text}").unwrap();
    file.set_permissions(std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn what_does_not_start_gives_its_last_words() {
    #[track_caller]
    fn check(program: &Path, patience: Duration, parts: &[&str]) {
        let launch = Launch { program: Some(program.to_owned()), patience, ..launch() };
        let error =
            runtime().block_on(Stack::start_with(options(Policy::Precise), &launch)).unwrap_err();
        let text = format!("{error:#}");
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
    let folder = tempfile::tempdir().unwrap();
    check(&folder.path().join("none"), patience(), &["starting fleet", "none", "No such file"]);
    let fails = "for i in $(seq 100); do echo line $i >&2; done; echo no more engines >&2; exit 3";
    let program = script(folder.path(), fails);
    check(&program, patience(), &["fleet ended: exit status: 3", "no more engines", "line 52"]);
    let mute = tempfile::tempdir().unwrap();
    let program = script(mute.path(), "echo thinking >&2; read line");
    check(&program, Duration::from_millis(300), &["did not say", "within 300ms", "thinking"]);
}

#[test]
fn envoy_that_does_not_start_gives_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(Policy::Constant);
    options.envoy = Some(script(folder.path(), "echo no such option >&2; exit 1"));
    let error = runtime().block_on(Stack::start_with(options, &launch())).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("envoy ended") && text.contains("no such option"), "{text}");
}

#[test]
fn a_child_that_does_not_end_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let program = script(folder.path(), "echo ready 17; while :; do sleep 1000; done");
    runtime().block_on(async {
        let mut child = Child::start("stubborn", &program, [""; 0]).unwrap();
        assert_eq!(child.announced::<u32>("ready ", patience()).await.unwrap(), 17);
        let pid = child.pid();
        let begun = Instant::now();
        drop(child);
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(!runs(pid));
    });
}

#[test]
fn a_fresh_stack_knows_nothing_of_the_last_one() {
    runtime().block_on(async {
        for _ in 0..2 {
            let stack = start(options(Policy::Precise)).await;
            let mut client = Client::new(&stack);
            let served = client.ask(&prompt(1, 1)).await;
            assert_eq!(served.cached_tokens, 0, "{served:?}");
            assert_eq!(served.prediction.predicted_tokens.unwrap_or(0), 0, "{served:?}");
            stack.stop().await;
        }
    });
}

#[test]
fn a_fleet_says_where_each_engine_is_and_serves_until_a_signal() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadgen"));
    command.args(["fleet", "--engines=2", "--time-scale=0", "--listen=127.0.0.1:0"]);
    let fleet = Program::start("fleet", command);
    let lines = eventually("both lines", || {
        let log = fleet.log();
        let lines: Vec<_> = log.lines().map(str::to_owned).collect();
        if lines.len() == 2 { Ok(lines) } else { Err(log) }
    });
    assert_ne!(lines[0], lines[1]);
    for line in &lines {
        let words: Vec<_> = line.split(' ').collect();
        let [url, "events", events, "replay", replay] = words[..] else { panic!("{line}") };
        assert!(events.starts_with("tcp://127.0.0.1:") && replay.starts_with("tcp://127.0.0.1:"));
        let address = url.strip_prefix("http://").unwrap().parse().unwrap();
        let reply = http::get(address, "/v1/models");
        assert_eq!(reply.json()["data"][0]["id"], "mock");
    }
    fleet.finish();
}
