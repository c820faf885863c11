//! Live numbers of a run: written by the threads that send, read by whoever shows them.
//!
//! # Concurrency
//!
//! What is counted for each request is atomic and relaxed; names and costs, which change seldom, are
//! behind a lock that senders never take. The display empties the times to the first token whenever it
//! shows them, so only one display may run at a time.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{self, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Buckets for each doubling; a bucket is at most an eighth of its value wide.
const PER_DOUBLING: usize = 8;
/// 8 values below 8, then 61 doublings.
const BUCKETS: usize = PER_DOUBLING * 62;

/// Durations in buckets that grow with them; counted by many threads, emptied by one.
#[derive(Debug)]
struct Times(Box<[AtomicU64]>);

impl Default for Times {
    fn default() -> Self {
        Self((0..BUCKETS).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Times {
    fn bucket(ns: u64) -> usize {
        let doubling = ns.max(PER_DOUBLING as u64).ilog2() as usize;
        if ns < PER_DOUBLING as u64 {
            return ns as usize;
        }
        let within = (ns >> (doubling - 3)) as usize & (PER_DOUBLING - 1);
        (doubling - 2) * PER_DOUBLING + within
    }

    /// The middle of a bucket.
    fn value(bucket: usize) -> f64 {
        let (doubling, within) = (bucket / PER_DOUBLING, bucket % PER_DOUBLING);
        match doubling {
            0 => within as f64,
            _ => (PER_DOUBLING as f64 + within as f64 + 0.5) * 2f64.powi(doubling as i32 - 1),
        }
    }

    fn record(&self, ns: u64) {
        self.0[Self::bucket(ns)].fetch_add(1, Relaxed);
    }

    fn drain(&self) -> Vec<u64> {
        self.0.iter().map(|bucket| bucket.swap(0, Relaxed)).collect()
    }

    /// The quantile `p` of drained counts, nanoseconds; `None` of none.
    fn quantile(counts: &[u64], p: f64) -> Option<f64> {
        let total: u64 = counts.iter().sum();
        let mut left = (p * total as f64).ceil().max(1.0) as u64;
        counts.iter().enumerate().find_map(|(bucket, count)| {
            let here = left <= *count && *count > 0;
            left = left.saturating_sub(*count);
            here.then(|| Self::value(bucket))
        })
    }
}

/// What is being run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Arm {
    /// The scenario, and the level if there are several.
    pub scenario: String,
    /// Who routes.
    pub policy: String,
    /// Which arm of the whole run, from 1; 0 = not counted.
    pub number: u32,
    /// How many arms there are.
    pub of: u32,
    /// Requests per second asked for; `None` in closed loops.
    pub asked_rps: Option<f64>,
    /// How long an arm takes, for the time that is left; `None` if nobody knows.
    pub takes: Option<Duration>,
}

#[derive(Debug, Default)]
struct Told {
    arm: Arm,
    /// When the arm began, and what had been counted by then.
    began: Option<(Instant, Counts)>,
    cores: Vec<(String, f64)>,
    backlog: Option<u64>,
}

/// The counters at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    sent: u64,
    complete: u64,
    failed: u64,
    tokens: u64,
}

/// Counters of the run that is under way.
#[derive(Debug, Default)]
pub struct Progress {
    /// Requests sent.
    pub sent: AtomicU64,
    /// Requests that ended with a complete answer.
    pub complete: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
    /// Tokens received.
    pub tokens: AtomicU64,
    first_tokens: Times,
    told: Mutex<Told>,
}

impl Progress {
    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let ended = self.complete.load(Relaxed) + self.failed.load(Relaxed);
        self.sent.load(Relaxed).saturating_sub(ended)
    }

    /// Notes a first token so many nanoseconds after the intended arrival.
    pub fn first_token(&self, ns: u64) {
        self.first_tokens.record(ns);
    }

    /// Says what is run from now on.
    pub fn begin(&self, arm: Arm) {
        let began = Some((Instant::now(), self.counts()));
        self.told(|told| (told.arm, told.began) = (arm, began));
    }

    /// Says how many cores each component uses.
    pub fn set_cores(&self, cores: Vec<(String, f64)>) {
        self.told(|told| told.cores = cores);
    }

    /// Says how many batches of events are published and not applied; `None` = nobody looks.
    pub fn set_backlog(&self, batches: Option<u64>) {
        self.told(|told| told.backlog = batches);
    }

    fn told<T>(&self, with: impl FnOnce(&mut Told) -> T) -> T {
        with(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn counts(&self) -> Counts {
        Counts {
            sent: self.sent.load(Relaxed),
            complete: self.complete.load(Relaxed),
            failed: self.failed.load(Relaxed),
            tokens: self.tokens.load(Relaxed),
        }
    }
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shown {
    /// In place on a terminal, else as lines.
    #[default]
    Auto,
    /// A line every few seconds.
    Lines,
    /// Not at all.
    Quiet,
}

/// How the display behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How it is shown.
    pub shown: Shown,
    /// Time between two updates of a terminal.
    pub refresh: Duration,
    /// Time between two lines.
    pub line: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            shown: Shown::Auto,
            refresh: Duration::from_millis(250),
            line: Duration::from_secs(3),
        }
    }
}

/// Shows progress on standard error, from a thread of its own, until it is finished or dropped.
#[derive(Debug)]
pub struct Display {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Starts to show `progress`. A thread that cannot be started shows nothing.
    #[must_use]
    pub fn start(progress: Arc<Progress>, options: Options) -> Self {
        let terminal = options.shown == Shown::Auto && io::stderr().is_terminal();
        if options.shown == Shown::Quiet {
            return Self { stop: None, thread: None };
        }
        let (stop, stopped) = mpsc::channel();
        let show = move || match terminal {
            true => in_place(&progress, options.refresh, &stopped),
            false => in_lines(&progress, options.line, &stopped, &mut io::stderr()),
        };
        let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(show).ok();
        Self { stop: Some(stop), thread }
    }

    /// Clears the terminal's line and ends.
    pub fn finish(self) {}
}

impl Drop for Display {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A display that panicked has nothing more to show.
            _ = thread.join();
        }
    }
}

fn in_place(progress: &Progress, every: Duration, stopped: &mpsc::Receiver<()>) {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
        bar.set_style(style);
    }
    let mut window = Window::new(progress);
    while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        bar.set_message(window.line(progress));
        bar.tick();
    }
    bar.finish_and_clear();
}

fn in_lines(
    progress: &Progress,
    every: Duration,
    stopped: &mpsc::Receiver<()>,
    out: &mut dyn io::Write,
) {
    let mut window = Window::new(progress);
    while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        // Who closed standard error does not want to see it.
        if writeln!(out, "{}", window.line(progress)).is_err() {
            return;
        }
    }
}

/// The last seconds, for rates and percentiles.
struct Window {
    /// When, what had been counted, and the first tokens since the entry before; oldest first.
    seen: Vec<(Instant, Counts, Vec<u64>)>,
}

/// How far back rates and percentiles look.
const LOOK_BACK: Duration = Duration::from_secs(3);

impl Window {
    fn new(progress: &Progress) -> Self {
        Self { seen: vec![(Instant::now(), progress.counts(), Vec::new())] }
    }

    fn line(&mut self, progress: &Progress) -> String {
        let now = Instant::now();
        self.seen.push((now, progress.counts(), progress.first_tokens.drain()));
        while self.seen.len() > 2 && now.duration_since(self.seen[1].0) >= LOOK_BACK {
            self.seen.remove(0);
        }
        let (since, from, _) = &self.seen[0];
        let mut first_tokens = vec![0; BUCKETS];
        for (_, _, counts) in &self.seen[1..] {
            first_tokens.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        let span = now.duration_since(*since).as_secs_f64().max(1e-3);
        let counts = progress.counts();
        progress.told(|told| {
            describe(told, now, *from, counts, span, &first_tokens, progress.in_flight())
        })
    }
}

fn describe(
    told: &Told,
    now: Instant,
    from: Counts,
    counts: Counts,
    span: f64,
    first_tokens: &[u64],
    in_flight: u64,
) -> String {
    let arm = &told.arm;
    let (began, before) = told.began.unwrap_or((now, Counts::default()));
    let elapsed = now.duration_since(began);
    let mut line = String::new();
    // Writing into a string does not fail.
    let mut part = |text: std::fmt::Arguments<'_>| {
        let between = if line.is_empty() { "" } else { "  " };
        _ = write!(line, "{between}{text}");
    };
    if arm.number > 0 {
        part(format_args!("[{}/{}]", arm.number, arm.of));
    }
    if !arm.scenario.is_empty() {
        part(format_args!("{} {}", arm.scenario, arm.policy));
    }
    part(format_args!("{:.0}s", elapsed.as_secs_f64()));
    let per_second = |now: u64, then: u64| now.saturating_sub(then) as f64 / span;
    let sent = per_second(counts.sent, from.sent);
    match arm.asked_rps {
        Some(asked) => part(format_args!("sent {sent:.0}/{asked:.0} per s")),
        None => part(format_args!("sent {sent:.0} per s")),
    }
    part(format_args!(
        "done {} ({:.0} per s)",
        counts.complete.saturating_sub(before.complete),
        per_second(counts.complete, from.complete)
    ));
    part(format_args!("errors {}", counts.failed.saturating_sub(before.failed)));
    part(format_args!("in flight {in_flight}"));
    let ms = |p| Times::quantile(first_tokens, p).map(|ns| ns * 1e-6);
    if let Some((p50, p95)) = ms(0.5).zip(ms(0.95)) {
        part(format_args!("TTFT p50 {p50:.1} p95 {p95:.1} ms"));
    }
    part(format_args!("{:.0} tokens/s", per_second(counts.tokens, from.tokens)));
    if let Some(batches) = told.backlog {
        part(format_args!("backlog {batches}"));
    }
    if !told.cores.is_empty() {
        let cores: Vec<_> =
            told.cores.iter().map(|(name, cores)| format!("{name} {cores:.2}")).collect();
        part(format_args!("cores {}", cores.join(" ")));
    }
    if let Some(takes) = arm.takes {
        let arms_left = arm.of.saturating_sub(arm.number);
        let left = takes.saturating_sub(elapsed) + takes * arms_left;
        part(format_args!("left {:.0}s", left.as_secs_f64()));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_narrow_and_in_order() {
        let mut last = 0;
        for ns in (0..100_000).chain((17..64).map(|bits| (1u64 << bits) - 1)) {
            let bucket = Times::bucket(ns);
            assert!(bucket >= last && bucket < BUCKETS, "{ns} in {bucket} after {last}");
            last = bucket;
            let (value, exact) = (Times::value(bucket), ns as f64);
            assert!((value - exact).abs() <= exact * 0.07 + 0.5, "{ns} reads as {value}");
        }
        assert_eq!(Times::bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_drained_times() {
        let times = Times::default();
        (1..=1_000u64).for_each(|ms| times.record(ms * 1_000_000));
        let counts = times.drain();
        let near = |p, expected: f64| {
            let ns = Times::quantile(&counts, p).unwrap();
            assert!((ns * 1e-6 / expected - 1.0).abs() < 0.07, "{p}: {ns}");
        };
        near(0.5, 500.0);
        near(0.95, 950.0);
        assert_eq!(Times::quantile(&times.drain(), 0.5), None);
    }

    #[test]
    fn a_line_says_what_happens() {
        let progress = Progress::default();
        progress.sent.fetch_add(100, Relaxed);
        progress.begin(Arm {
            scenario: "sweep".to_owned(),
            policy: "precise".to_owned(),
            number: 2,
            of: 5,
            asked_rps: Some(40.0),
            takes: Some(Duration::from_secs(60)),
        });
        let mut window = Window::new(&progress);
        progress.sent.fetch_add(10, Relaxed);
        progress.complete.fetch_add(7, Relaxed);
        progress.failed.fetch_add(1, Relaxed);
        progress.first_token(10_000_000);
        progress.set_backlog(Some(12));
        progress.set_cores(vec![("indexer".to_owned(), 0.5)]);
        let line = window.line(&progress);
        for part in ["[2/5]", "sweep precise", "/40 per s", "done 7 (", "errors 1", "in flight 102"]
        {
            assert!(line.contains(part), "{part} is not in: {line}");
        }
        for part in ["TTFT p50 10", "backlog 12", "cores indexer 0.50", "left 240s"] {
            assert!(line.contains(part), "{part} is not in: {line}");
        }
        assert!(!Window::new(&Progress::default()).line(&Progress::default()).contains("TTFT"));
    }

    #[test]
    fn lines_end_with_the_display() {
        #[derive(Clone, Default)]
        struct Page(Arc<Mutex<Vec<u8>>>, Option<mpsc::Sender<()>>);
        impl io::Write for Page {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                // The first line ends the display.
                self.1 = None;
                self.0.lock().unwrap().extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (stop, stopped) = mpsc::channel();
        let mut page = Page(Arc::default(), Some(stop));
        in_lines(&Progress::default(), Duration::from_millis(1), &stopped, &mut page);
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        for shown in [Shown::Quiet, Shown::Lines, Shown::Auto] {
            Display::start(Arc::default(), Options { shown, ..Options::default() }).finish();
        }
    }
}
