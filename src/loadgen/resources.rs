//! What each component costs: CPU, memory, descriptors and context switches, from `/proc` or cgroups.
//!
//! # Model
//!
//! A component is one or more sources, whose numbers are added. CPU and context switches count from the
//! start of the sampling; memory, descriptors and threads are largest values. CPU of a process comes from
//! `schedstat` of its threads, in nanoseconds; threads that came and went between two samples are seen in
//! `stat` only, which counts in hundredths of a second. A process's children belong to it only as
//! [`Watched::Tree`].
//!
//! # Failure
//!
//! A source that cannot be read at the start is an error. One that goes away later keeps what was seen of
//! it, and is named among the warnings.
//!
//! # Cost
//!
//! Per sample two files for each process and one for each of its threads: some 10 µs per thread.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};

use super::{progress::Progress, report::Resources};

/// Time between two samples unless somebody wants another one.
pub const EVERY: Duration = Duration::from_millis(100);

/// Samples that are kept for each component; with more, every other one is dropped.
const SERIES_LIMIT: usize = 16_384;

/// `stat` counts in this; fixed by Linux for user space.
const TICK: Duration = Duration::from_millis(10);

/// Context switches, descriptors and memory maps are read at every so many samples, and at the end.
const SLOW_EVERY: u64 = 5;

/// A component: its name in the report, and what it consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// `gateway`, `epp`, `indexer`, `engines`, `loadgen`, or another name.
    pub name: String,
    /// Where its numbers come from; several are added.
    pub sources: Vec<Watched>,
}

/// A process or a group of processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// One process, without its children.
    Pid(u32),
    /// A process and all that descend from it, those included that start later.
    Tree(u32),
    /// A directory of cgroup v2.
    Cgroup(PathBuf),
}

/// One sample of one component.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// From the start of the sampling.
    pub at: Duration,
    /// CPU since the start of the sampling.
    pub cpu: Duration,
    /// Resident memory, bytes.
    pub rss: u64,
}

/// Samples components on a thread of its own until it is finished.
#[derive(Debug)]
pub struct Sampler {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<Sampled>,
}

/// What was sampled, by component.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// When the sampling started.
    pub started: Option<Instant>,
    /// Sums and peaks; `cpu_ms_per_request` is still to be set by [`Resources::per_request`].
    pub totals: BTreeMap<String, Resources>,
    /// The samples.
    pub series: BTreeMap<String, Vec<Sample>>,
    /// Proportional memory at the end, bytes: pages in common count once. Without cgroups.
    pub pss_bytes: BTreeMap<String, u64>,
    /// What went away, as sentences.
    pub warnings: Vec<String>,
}

impl Sampler {
    /// Starts with a sample.
    ///
    /// # Errors
    ///
    /// A component that cannot be read, by name; a thread that cannot be started.
    pub fn start(components: Vec<Component>, every: Duration) -> anyhow::Result<Self> {
        Self::start_showing(components, every, None)
    }

    /// Does the same, and tells `progress` about once a second how many cores are in use.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn start_showing(
        components: Vec<Component>,
        every: Duration,
        progress: Option<Arc<Progress>>,
    ) -> anyhow::Result<Self> {
        let mut sampling = Sampling::new(components)?;
        let (stop, stopped) = mpsc::channel();
        let sample = move || {
            let every = every.max(Duration::from_millis(1));
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                sampling.sample(false);
                if let Some(progress) = &progress {
                    sampling.show(progress);
                }
            }
            sampling.sample(true);
            sampling.end()
        };
        let thread = std::thread::Builder::new()
            .name("resources".to_owned())
            .spawn(sample)
            .context("cannot start the thread that samples")?;
        Ok(Self { stop, thread })
    }

    /// Takes a last sample. A component that went away keeps what was seen of it.
    #[must_use]
    pub fn finish(self) -> Sampled {
        drop(self.stop);
        self.thread.join().unwrap_or_else(|_| Sampled {
            warnings: vec!["the thread that samples resources panicked".to_owned()],
            ..Sampled::default()
        })
    }
}

/// The state of the thread.
struct Sampling {
    started: Instant,
    samples: u64,
    shown: Duration,
    components: Vec<Followed>,
}

/// One component's state.
struct Followed {
    name: String,
    sources: Vec<Source>,
    peaks: Usage,
    series: Vec<Sample>,
}

impl Sampling {
    fn new(components: Vec<Component>) -> anyhow::Result<Self> {
        let started = Instant::now();
        let components = components.into_iter().map(|Component { name, sources }| {
            let sources: anyhow::Result<Vec<_>> = sources.into_iter().map(Source::new).collect();
            let sources = sources.with_context(|| format!("cannot watch {name}"))?;
            Ok(Followed { name, sources, peaks: Usage::default(), series: Vec::new() })
        });
        let components = components.collect::<anyhow::Result<_>>()?;
        let mut this = Self { started, samples: 0, shown: Duration::ZERO, components };
        this.sample(true);
        Ok(this)
    }

    fn sample(&mut self, thorough: bool) {
        self.samples += 1;
        let thorough = thorough || self.samples.is_multiple_of(SLOW_EVERY);
        for component in &mut self.components {
            component.sources.iter_mut().for_each(|source| source.sample(thorough));
            let at = self.started.elapsed();
            let sum = component.sum();
            component.peaks.raise(&sum);
            component.series.push(Sample { at, cpu: sum.cpu, rss: sum.rss });
            if component.series.len() > SERIES_LIMIT {
                let mut keep = false;
                component.series.retain(|_| {
                    keep = !keep;
                    keep
                });
            }
        }
    }

    fn show(&mut self, progress: &Progress) {
        let now = self.started.elapsed();
        if now - self.shown < Duration::from_secs(1) {
            return;
        }
        self.shown = now;
        let cores = self.components.iter().filter_map(|component| {
            let last = component.series.last()?;
            let then = now.saturating_sub(Duration::from_secs(1));
            let earlier = component.series.iter().rev().find(|sample| sample.at <= then)?;
            let span = (last.at - earlier.at).as_secs_f64();
            let cpu = last.cpu.saturating_sub(earlier.cpu).as_secs_f64();
            (span > 0.0).then(|| (component.name.clone(), cpu / span))
        });
        progress.set_cores(cores.collect());
    }

    fn end(self) -> Sampled {
        let mut sampled = Sampled { started: Some(self.started), ..Sampled::default() };
        let wall = self.started.elapsed().as_secs_f64();
        for component in self.components {
            let sum = component.sum();
            // The kernel's own mark sees what lies between two samples; of several, peaks need not have
            // been at one time.
            let marked = match component.sources.as_slice() {
                [source] => source.high_water_mark(),
                _ => None,
            };
            let totals = Resources {
                cpu_ms_per_request: None,
                cpu_s: sum.cpu.as_secs_f64(),
                cores: if wall > 0.0 { sum.cpu.as_secs_f64() / wall } else { 0.0 },
                rss_peak_bytes: component.peaks.rss.max(marked.unwrap_or(0)),
                voluntary_switches: sum.voluntary,
                involuntary_switches: sum.involuntary,
                fds_peak: component.peaks.fds,
                threads_peak: component.peaks.threads,
            };
            let pss: u64 = component.sources.iter().filter_map(Source::pss).sum();
            if pss > 0 {
                sampled.pss_bytes.insert(component.name.clone(), pss);
            }
            for source in component.sources.iter().filter(|source| source.gone) {
                sampled.warnings.push(format!(
                    "{} ({}) went away during the run; its numbers end there",
                    component.name,
                    source.describe()
                ));
            }
            sampled.totals.insert(component.name.clone(), totals);
            sampled.series.insert(component.name, component.series);
        }
        sampled
    }
}

impl Followed {
    fn sum(&self) -> Usage {
        let mut sum = Usage::default();
        self.sources.iter().for_each(|source| sum.add(&source.usage()));
        sum
    }
}

/// What something has used since the start of the sampling, and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    cpu: Duration,
    rss: u64,
    voluntary: u64,
    involuntary: u64,
    fds: u64,
    threads: u64,
}

impl Usage {
    fn add(&mut self, other: &Self) {
        self.cpu += other.cpu;
        self.rss += other.rss;
        self.voluntary += other.voluntary;
        self.involuntary += other.involuntary;
        self.fds += other.fds;
        self.threads += other.threads;
    }

    fn raise(&mut self, other: &Self) {
        self.rss = self.rss.max(other.rss);
        self.fds = self.fds.max(other.fds);
        self.threads = self.threads.max(other.threads);
    }
}

/// A source and what was seen of it.
struct Source {
    watched: Watched,
    processes: HashMap<u32, Process>,
    /// CPU of the cgroup at the start, and since.
    group: (Duration, Duration),
    group_rss: u64,
    started: bool,
    gone: bool,
}

impl Source {
    fn new(watched: Watched) -> anyhow::Result<Self> {
        let mut this = Self {
            watched,
            processes: HashMap::new(),
            group: (Duration::ZERO, Duration::ZERO),
            group_rss: 0,
            started: false,
            gone: false,
        };
        if let Watched::Cgroup(folder) = &this.watched {
            let path = folder.join("cpu.stat");
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            this.group.0 = group_cpu(&text)
                .ok_or_else(|| anyhow!("{} does not say usage_usec", path.display()))?;
        }
        this.sample(true);
        if this.gone {
            return Err(anyhow!("{} cannot be read", this.describe()));
        }
        this.started = true;
        Ok(this)
    }

    fn describe(&self) -> String {
        match &self.watched {
            Watched::Pid(pid) | Watched::Tree(pid) => format!("process {pid}"),
            Watched::Cgroup(folder) => format!("cgroup {}", folder.display()),
        }
    }

    fn sample(&mut self, thorough: bool) {
        let pids = match &self.watched {
            Watched::Pid(pid) => vec![*pid],
            Watched::Tree(pid) => descendants(*pid),
            Watched::Cgroup(folder) => {
                let text = fs::read_to_string(folder.join("cpu.stat")).unwrap_or_default();
                match group_cpu(&text) {
                    Some(cpu) => self.group.1 = cpu.saturating_sub(self.group.0),
                    None => self.gone = true,
                }
                self.group_rss = number(&folder.join("memory.current")).unwrap_or(0);
                let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
                procs.lines().filter_map(|line| line.trim().parse().ok()).collect()
            }
        };
        let root = match self.watched {
            Watched::Pid(pid) | Watched::Tree(pid) => Some(pid),
            Watched::Cgroup(_) => None,
        };
        for process in self.processes.values_mut() {
            process.held = Usage::default();
        }
        for pid in pids {
            // What is there at the start counts from then; what starts later counts from its own start.
            let from_zero = self.started;
            let process = self.processes.entry(pid).or_insert_with(|| Process::new(from_zero));
            let alive = process.sample(Path::new(&format!("/proc/{pid}")), thorough);
            self.gone |= !alive && root == Some(pid);
        }
    }

    fn usage(&self) -> Usage {
        let mut sum = Usage::default();
        for process in self.processes.values() {
            sum.add(&Usage { cpu: process.cpu, ..process.held });
            sum.voluntary += process.switches().0;
            sum.involuntary += process.switches().1;
        }
        if matches!(self.watched, Watched::Cgroup(_)) {
            sum.cpu = self.group.1;
            if self.group_rss > 0 {
                sum.rss = self.group_rss;
            }
        }
        sum
    }

    /// The largest resident memory as the kernel noted it, if that was during the sampling.
    fn high_water_mark(&self) -> Option<u64> {
        match &self.watched {
            Watched::Pid(pid) => {
                let process = self.processes.get(pid)?;
                let (first, last) = process.marks?;
                (last > first).then_some(last)
            }
            // The mark of a cgroup may be older than the sampling; there is no telling.
            Watched::Tree(_) | Watched::Cgroup(_) => None,
        }
    }

    fn pss(&self) -> Option<u64> {
        let pids = self.processes.keys();
        let each = pids.filter_map(|pid| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            word(&text, "Pss:").map(|kib| kib * 1024)
        });
        (!matches!(self.watched, Watched::Cgroup(_))).then(|| each.sum())
    }
}

/// A process and what was seen of it.
struct Process {
    /// Count from its start, or from the first sample?
    from_zero: bool,
    /// By thread: CPU in nanoseconds first and last.
    threads: HashMap<u32, Thread>,
    /// Of the whole process by `stat`: first and last.
    ticks: Option<(Duration, Duration)>,
    /// The kernel's high water mark of resident memory, first and last.
    marks: Option<(u64, u64)>,
    cpu: Duration,
    /// Memory, descriptors and threads at the last sample.
    held: Usage,
    fds: u64,
}

#[derive(Default)]
struct Thread {
    cpu_ns: (u64, u64),
    voluntary: Option<(u64, u64)>,
    involuntary: Option<(u64, u64)>,
}

impl Process {
    fn new(from_zero: bool) -> Self {
        Self {
            from_zero,
            threads: HashMap::new(),
            ticks: None,
            marks: None,
            cpu: Duration::ZERO,
            held: Usage::default(),
            fds: 0,
        }
    }

    /// Returns whether it is still there.
    fn sample(&mut self, folder: &Path, thorough: bool) -> bool {
        let Some((ticks, dead)) =
            fs::read_to_string(folder.join("stat")).ok().and_then(|text| stat(&text))
        else {
            return false;
        };
        // A process that has ended and that nobody waited for still says what it used.
        let zero = if self.from_zero { Duration::ZERO } else { ticks };
        let of_all = self.ticks.get_or_insert((zero, ticks));
        of_all.1 = ticks;
        let of_all = ticks.saturating_sub(of_all.0);
        let first = self.threads.is_empty();
        for tid in entries(&folder.join("task")) {
            self.thread(folder, tid, thorough, first && !self.from_zero);
        }
        let of_threads = Duration::from_nanos(
            self.threads.values().map(|thread| thread.cpu_ns.1 - thread.cpu_ns.0).sum(),
        );
        // Both ends of a difference of ticks, of user and system time, are rounded.
        let since = if of_all > of_threads + 4 * TICK { of_all } else { of_threads };
        self.cpu = self.cpu.max(since);
        if dead {
            return false;
        }
        let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
        let bytes = |name| word(&status, name).map_or(0, |kib| kib * 1024);
        let mark = bytes("VmHWM:");
        self.marks.get_or_insert((mark, mark)).1 = mark;
        if thorough {
            self.fds = entries(&folder.join("fd")).len() as u64;
        }
        self.held = Usage {
            rss: bytes("VmRSS:"),
            fds: self.fds,
            threads: word(&status, "Threads:").unwrap_or(0),
            ..Usage::default()
        };
        true
    }

    /// `base`: was it there before the sampling?
    fn thread(&mut self, folder: &Path, tid: u32, thorough: bool, base: bool) {
        let folder = folder.join("task").join(tid.to_string());
        let schedstat = fs::read_to_string(folder.join("schedstat")).unwrap_or_default();
        let ns = schedstat.split_whitespace().next().and_then(|text| text.parse::<u64>().ok());
        let thread = self.threads.entry(tid).or_insert_with(|| {
            let from = if base { ns.unwrap_or(0) } else { 0 };
            Thread { cpu_ns: (from, from), ..Thread::default() }
        });
        if let Some(ns) = ns {
            // The number of a thread that ended may be given again.
            thread.cpu_ns.1 = thread.cpu_ns.1.max(ns);
        }
        if thorough {
            let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
            let note = |place: &mut Option<(u64, u64)>, name| {
                if let Some(count) = word(&status, name) {
                    place.get_or_insert((if base { count } else { 0 }, count)).1 = count;
                }
            };
            note(&mut thread.voluntary, "voluntary_ctxt_switches:");
            note(&mut thread.involuntary, "nonvoluntary_ctxt_switches:");
        }
    }

    /// Context switches that it made by itself, and that it was made to do.
    fn switches(&self) -> (u64, u64) {
        let since =
            |pair: Option<(u64, u64)>| pair.map_or(0, |(first, last)| last.saturating_sub(first));
        self.threads.values().fold((0, 0), |(own, forced), thread| {
            (own + since(thread.voluntary), forced + since(thread.involuntary))
        })
    }
}

/// CPU of a whole process, ended threads included, and whether it has ended.
fn stat(text: &str) -> Option<(Duration, bool)> {
    // The second field, the name, is in parentheses and may hold spaces and parentheses.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u32>().ok();
    let dead = matches!(*fields.first()?, "Z" | "X");
    Some((TICK * ticks(11)?.checked_add(ticks(12)?)?, dead))
}

/// `usage_usec` of `cpu.stat`.
fn group_cpu(text: &str) -> Option<Duration> {
    word(text, "usage_usec ").map(Duration::from_micros)
}

/// The number after `prefix`, at the begin of a line.
fn word(text: &str, prefix: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(prefix))?;
    line.split_whitespace().next()?.parse().ok()
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The entries of a folder that are numbers.
fn entries(folder: &Path) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A process and all that descend from it.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut at = 0;
    while let Some(pid) = found.get(at).copied() {
        at += 1;
        for tid in entries(Path::new(&format!("/proc/{pid}/task"))) {
            let path = format!("/proc/{pid}/task/{tid}/children");
            let text = fs::read_to_string(path).unwrap_or_default();
            found.extend(text.split_whitespace().filter_map(|text| text.parse::<u32>().ok()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_read() {
        let text = "7 (a) b) R 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 100 1 1";
        assert_eq!(stat(text), Some((Duration::from_secs(3), false)));
        assert_eq!(stat(&text.replace(" R ", " Z ")), Some((Duration::from_secs(3), true)));
        assert_eq!(stat("7 (a) R 1"), None);
        assert_eq!(stat(""), None);
        let text = "usage_usec 1500\nuser_usec 1000\n";
        assert_eq!(group_cpu(text), Some(Duration::from_micros(1_500)));
        assert_eq!(word("VmHWM:\t  12 kB\nVmRSS:\t  8 kB\n", "VmRSS:"), Some(8));
        assert_eq!(word("VmRSS:\tmany\n", "VmRSS:"), None);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let component =
            |watched| vec![Component { name: "epp".to_owned(), sources: vec![watched] }];
        #[track_caller]
        fn check(components: Vec<Component>, expected: &str) {
            let error = format!("{:#}", Sampler::start(components, EVERY).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        check(component(Watched::Pid(u32::MAX)), "cannot watch epp: process 4294967295");
        check(
            component(Watched::Cgroup("/nowhere".into())),
            "cannot watch epp: reading /nowhere/cpu.stat",
        );
    }

    #[test]
    fn a_cgroup_counts_from_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 1000000\n");
        write("memory.current", "4096\n");
        let watched = Watched::Cgroup(folder.path().to_owned());
        let mut source = Source::new(watched).unwrap();
        assert_eq!(source.usage(), Usage { rss: 4_096, ..Usage::default() });
        write("cpu.stat", "usage_usec 1250000\n");
        write("memory.current", "8192\n");
        source.sample(false);
        let expected = Usage { cpu: Duration::from_millis(250), rss: 8_192, ..Usage::default() };
        assert_eq!(source.usage(), expected);
        fs::remove_file(folder.path().join("cpu.stat")).unwrap();
        source.sample(false);
        assert!(source.gone);
        assert_eq!(source.usage().cpu, expected.cpu);
    }
}
