//! The sampler against real processes: what they burn, hold and leave behind.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use kv_indexer::loadgen::resources::{Component, Sampled, Sampler, Watched};

const EVERY: Duration = Duration::from_millis(20);

/// A shell that has written a line; killed with the value.
struct Shell(Child);

impl Shell {
    fn start(script: &str) -> Self {
        let mut child =
            Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        Self(child)
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // One that ended by itself cannot be killed.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn component(name: &str, sources: Vec<Watched>) -> Component {
    Component { name: name.to_owned(), sources }
}

/// Lets `done` see time pass, for at most 20 s.
fn until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_burning_process_and_we_ourselves_are_told_apart() {
    let burning = Shell::start("echo up; while :; do :; done");
    let own = std::process::id();
    let components = vec![
        component("burning", vec![Watched::Pid(burning.0.id())]),
        component("loadgen", vec![Watched::Pid(own)]),
    ];
    let begin = Instant::now();
    let sampler = Sampler::start(components, EVERY).unwrap();
    until(|| begin.elapsed() > Duration::from_millis(600));
    let sampled = sampler.finish();
    let wall = begin.elapsed().as_secs_f64();
    let burnt = &sampled.totals["burning"];
    // It shares the machine with other tests, so its share of a core may be small.
    assert!(burnt.cpu_s > 0.03 && burnt.cpu_s <= wall * 1.05, "{burnt:?} in {wall} s");
    assert!(burnt.cores > 0.05 && burnt.cores < 1.1, "{burnt:?}");
    assert!(burnt.rss_peak_bytes > 100_000, "{burnt:?}");
    assert!(burnt.threads_peak == 1 && burnt.fds_peak >= 3, "{burnt:?}");
    let own = &sampled.totals["loadgen"];
    assert!(own.threads_peak >= 2 && own.voluntary_switches > 5, "{own:?}");
    let series = &sampled.series["burning"];
    assert!(series.len() > 5, "{} samples", series.len());
    assert!(series.windows(2).all(|pair| pair[0].at < pair[1].at && pair[0].cpu <= pair[1].cpu));
    assert_eq!(sampled.warnings, Vec::<String>::new());
}

#[test]
fn memory_that_came_and_went_is_seen() {
    // 24 MB in one variable, dropped again before the second line.
    let mut child = Command::new("sh")
        .args([
            "-c",
            "echo up; read -r _; big=$(head -c 24000000 /dev/zero | tr '\\0' x); big=; echo gone; read -r _",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "up");
    let pid = child.id();
    let components = vec![component("engines", vec![Watched::Pid(pid)])];
    // So rarely that no sample lies between the two lines.
    let sampler = Sampler::start(components, Duration::from_secs(600)).unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "gone");
    let sampled = sampler.finish();
    drop(stdin);
    child.wait().unwrap();
    let engines = &sampled.totals["engines"];
    assert!(engines.rss_peak_bytes > 24_000_000, "{engines:?}");
    assert!(engines.rss_peak_bytes < 400_000_000, "{engines:?}");
    assert_eq!(sampled.series["engines"].len(), 2);
}

#[test]
fn children_belong_to_a_process_only_if_asked() {
    let parent = Shell::start("(echo up; while :; do :; done) & wait");
    let pid = parent.0.id();
    let child = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let child: u32 = child.trim().parse().unwrap();
    let sampler = Sampler::start(
        vec![
            component("alone", vec![Watched::Pid(pid)]),
            component("tree", vec![Watched::Tree(pid)]),
            component("both", vec![Watched::Pid(pid), Watched::Pid(child)]),
        ],
        EVERY,
    )
    .unwrap();
    let begin = Instant::now();
    until(|| begin.elapsed() > Duration::from_millis(400));
    let Sampled { totals, pss_bytes, .. } = sampler.finish();
    Command::new("kill").arg(child.to_string()).status().unwrap();
    assert!(totals["alone"].cpu_s < 0.01, "{:?}", totals["alone"]);
    assert!(totals["tree"].cpu_s > 0.02, "{:?}", totals["tree"]);
    assert!(totals["both"].cpu_s > 0.02, "{:?}", totals["both"]);
    assert_eq!((totals["alone"].threads_peak, totals["both"].threads_peak), (1, 2));
    assert!(totals["both"].rss_peak_bytes > totals["alone"].rss_peak_bytes);
    assert!(pss_bytes["both"] > 0 && pss_bytes["both"] <= totals["both"].rss_peak_bytes);
}

#[test]
fn a_process_that_goes_away_keeps_its_numbers() {
    let mut shell = Shell::start("echo up; while :; do :; done");
    let pid = shell.0.id();
    let sampler = Sampler::start(vec![component("epp", vec![Watched::Pid(pid)])], EVERY).unwrap();
    let begin = Instant::now();
    until(|| begin.elapsed() > Duration::from_millis(300));
    shell.0.kill().unwrap();
    shell.0.wait().unwrap();
    let died = begin.elapsed();
    until(|| begin.elapsed() > died + 3 * EVERY);
    let sampled = sampler.finish();
    let epp = &sampled.totals["epp"];
    assert!(epp.cpu_s > 0.02 && epp.rss_peak_bytes > 100_000, "{epp:?}");
    let expected = format!("epp (process {pid}) went away during the run; its numbers end there");
    assert_eq!(sampled.warnings, [expected]);
}
