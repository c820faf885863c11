//! The load driver's HTML report, looked at in a real browser: nothing complains, nothing is fetched, and
//! every plot is drawn inside its frame.

mod sample;

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kv_indexer::loadgen::report::{Report, html};
use serde::Deserialize;
use serde_json::json;

const PLOTS: [&str; 8] = [
    "ttft-cdf",
    "load",
    "comparisons",
    "timeline",
    "freshness",
    "resources",
    "predictions",
    "shares",
];

/// What the browser says of a page.
#[derive(Debug, Deserialize)]
struct Seen {
    title: String,
    text: String,
    plots: Vec<Plot>,
    /// Marks that a click on a legend hid and a second one showed again.
    toggled: u64,
    /// Colour of the page.
    ground: String,
    page_width: f64,
    window_width: f64,
    scripts: u64,
    foreign: u64,
    hijacked: Option<bool>,
    /// Everything on the console, exceptions and the browser's own log.
    complaints: Vec<String>,
    requests: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Plot {
    name: String,
    empty: bool,
    text: String,
    svgs: u64,
    drawn: u64,
    marks: u64,
    faults: Vec<String>,
}

/// How a page is looked at.
#[derive(Clone, Copy, Debug)]
struct Look {
    width: u32,
    dark: bool,
    click: bool,
}

const DESK: Look = Look { width: 1280, dark: false, click: true };
const NIGHT: Look = Look { dark: true, ..DESK };
const PHONE: Look = Look { width: 400, ..DESK };

/// Where the pages and their pictures are left.
fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("html-report");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Opens the page of a report once for each look.
fn open(name: &str, report: &Report, looks: &[Look]) -> Vec<Seen> {
    let chromium = env::var_os("KV_INDEXER_CHROMIUM").unwrap_or_else(|| {
        panic!(
            "no KV_INDEXER_CHROMIUM: run the tests by tests/run, which installs a headless Chromium"
        )
    });
    let page = folder().join(format!("{name}.html"));
    let text = html::page(report);
    assert!(text.len() <= 2_000_000, "{name}: {} bytes", text.len());
    fs::write(&page, text).unwrap();
    let looks: Vec<_> = looks
        .iter()
        .map(|look| {
            let Look { width, dark, click } = look;
            let scheme = if *dark { "dark" } else { "light" };
            let screenshot = folder().join(format!("{name}-{width}-{scheme}.png"));
            json!({"page": page, "width": width, "dark": dark, "click": click, "screenshot": screenshot})
        })
        .collect();
    let profile = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser/look.mjs");
    let mut node = Command::new("node")
        .arg(script)
        .arg(chromium)
        .arg(profile.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("node, which drives the browser, does not start: {error}"));
    let asked = serde_json::to_vec(&looks).unwrap();
    node.stdin.take().unwrap().write_all(&asked).unwrap();
    let done = node.wait_with_output().unwrap();
    assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

/// What holds for every page.
#[track_caller]
fn check_sound(seen: &Seen) {
    assert_eq!(seen.title, "loadgen report");
    assert!(seen.complaints.is_empty(), "{:#?}", seen.complaints);
    assert!(seen.requests.is_empty(), "{:#?}", seen.requests);
    assert_eq!((seen.scripts, seen.foreign, seen.hijacked), (1, 0, None));
    assert!(
        seen.page_width <= seen.window_width,
        "the page is {} wide in a window of {}",
        seen.page_width,
        seen.window_width
    );
    let names: Vec<_> = seen.plots.iter().map(|plot| plot.name.as_str()).collect();
    assert_eq!(names, PLOTS);
    for plot in &seen.plots {
        assert!(plot.faults.is_empty(), "{}: {:#?}", plot.name, plot.faults);
        assert_eq!(plot.empty, plot.svgs == 0, "{}", plot.name);
        assert_eq!(plot.empty, plot.text.contains("not measured"), "{}", plot.name);
    }
}

#[track_caller]
fn check_drawn(seen: &Seen) {
    check_sound(seen);
    for plot in &seen.plots {
        let Plot { name, svgs, drawn, marks, .. } = plot;
        assert!(*svgs > 0 && *marks >= *svgs && drawn > marks, "{name}: {svgs} {drawn} {marks}");
    }
    assert!(seen.toggled > 0, "the legend hides nothing");
}

#[test]
fn a_full_report_is_drawn_on_every_screen() {
    let seen = open("full", &sample::full(), &[DESK, NIGHT, PHONE]);
    for seen in &seen {
        check_drawn(seen);
        assert!(!seen.text.contains("Not valid"));
        // A loss is said in words, too.
        assert!(seen.text.contains("1 loss"), "{}", seen.text);
        for said in
            ["WaitVisible P50", "ours − WaitVisible: P50 45", "precise none, approximate 30"]
        {
            assert!(seen.text.contains(said), "no {said:?} in {}", seen.text);
        }
    }
    assert_ne!(seen[0].ground, seen[1].ground, "dark screens get the same colours");
}

#[test]
fn an_empty_report_says_that_nothing_was_measured() {
    let report = Report { interrupted: true, ..Report::default() };
    for seen in open("empty", &report, &[Look { click: false, ..DESK }]) {
        check_sound(&seen);
        assert!(seen.plots.iter().all(|plot| plot.empty), "{:#?}", seen.plots);
        assert!(seen.text.contains("Not valid.") && seen.text.contains("Interrupted."));
    }
}

#[test]
fn names_from_outside_are_text() {
    for seen in open("hostile", &sample::hostile(), &[DESK, PHONE]) {
        check_drawn(&seen);
        assert!(seen.text.contains("<script>hijacked=true"), "{}", seen.text);
        assert!(seen.text.contains("wrong-7<script>") && seen.text.contains("and 12 more"));
    }
}

#[test]
fn a_big_report_stays_a_small_page() {
    let seen = open("big", &sample::big(), &[Look { click: false, ..DESK }]);
    for seen in &seen {
        check_sound(seen);
        assert!(seen.text.contains("more are in the JSON document"));
    }
}

#[test]
fn numbers_that_no_run_should_have_break_nothing() {
    for seen in open("odd", &sample::odd(), &[Look { click: false, ..DESK }]) {
        check_sound(&seen);
        assert!(!seen.text.contains("NaN"));
    }
}
