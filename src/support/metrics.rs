//! The metrics registry, what every process reports about itself, and its text form.
//!
//! Process metrics carry the names and units that Prometheus's client libraries agree on, so that
//! existing dashboards work. They are read from `/proc/self` at each scrape; where that does not
//! exist (or a file of it cannot be read) the metric is absent.

use std::{
    any::Any,
    fs,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use prometheus::{
    Counter, Gauge, IntGauge, Opts, Registry, TextEncoder,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::support::sync::lock;

/// Clock ticks per second in `/proc`: `USER_HZ`, 100 on every architecture that Rust's std
/// supports on Linux. Asking `sysconf` would need unsafe code.
const TICKS_PER_SECOND: f64 = 100.0;

/// Content type of [`encode`]'s text.
pub const TEXT_FORMAT: &str = prometheus::TEXT_FORMAT;

/// A registry that holds the process metrics.
///
/// # Errors
///
/// Never in practice: the names are legal and the registry is new.
pub fn registry() -> prometheus::Result<Registry> {
    let registry = Registry::new();
    registry.register(Box::new(Process::new()?))?;
    Ok(registry)
}

/// Registers a metric and returns a handle to it.
///
/// # Errors
///
/// When the registry has a metric of the same name.
pub fn add<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// Registers a metric that several parts of a process feed: whoever asks for it again gets a handle to
/// the first one. A metric is the same if its name and its constant labels are.
///
/// # Errors
///
/// When the registry has a metric of that name with other labels or of another type.
pub fn family<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> prometheus::Result<C> {
    /// A registry cannot be asked for what it holds, so the handles are kept here.
    static HANDLES: Mutex<Vec<(u64, Box<dyn Any + Send>)>> = Mutex::new(Vec::new());
    let id = metric.desc().first().map_or(0, |desc| desc.id);
    let mut handles = lock(&HANDLES);
    let known = handles.iter().filter(|(known, _)| *known == id);
    let known = known.filter_map(|(_, handle)| handle.downcast_ref::<C>()).next().cloned();
    let handle = known.unwrap_or_else(|| {
        handles.push((id, Box::new(metric.clone())));
        metric
    });
    match registry.register(Box::new(handle.clone())) {
        Ok(()) | Err(prometheus::Error::AlreadyReg) => Ok(handle),
        Err(error) => Err(error),
    }
}

/// Registers `name`, a gauge that is always 1 and whose labels say what was built: `version` and
/// those given.
///
/// # Errors
///
/// When `name` or a label is illegal or the registry has it already.
pub fn build_info(
    registry: &Registry,
    name: &str,
    version: &str,
    labels: &[(&str, &str)],
) -> prometheus::Result<()> {
    let mut opts =
        Opts::new(name, "Build of this process; always 1.").const_label("version", version);
    for &(label, value) in labels {
        opts = opts.const_label(label, value);
    }
    add(registry, IntGauge::with_opts(opts)?).map(|gauge| gauge.set(1))
}

/// All metrics in Prometheus's text format.
///
/// # Errors
///
/// When two collectors report a family in ways that contradict each other.
pub fn encode(registry: &Registry) -> prometheus::Result<String> {
    TextEncoder::new().encode_to_string(&registry.gather())
}

/// What `/proc` says of a process, in the units of the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// User and system time of all threads.
    pub cpu: Option<Duration>,
    /// Resident memory, bytes.
    pub resident_bytes: Option<u64>,
    /// Virtual memory, bytes.
    pub virtual_bytes: Option<u64>,
    /// Open file descriptors.
    pub open_fds: Option<u64>,
    /// Limit of open file descriptors.
    pub max_fds: Option<u64>,
    /// Threads.
    pub threads: Option<u64>,
    /// Start of the process, seconds since the Unix epoch.
    pub start_seconds: Option<f64>,
}

impl Usage {
    /// Reads the values of this process; the ones that cannot be read are absent.
    #[must_use]
    pub fn now() -> Self {
        let usage = Self::read("self");
        // One of them is the directory that was being read.
        Self { open_fds: usage.open_fds.map(|fds| fds.saturating_sub(1)), ..usage }
    }

    /// Reads the values of another process; of one that does not exist all are absent.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        Self::read(&pid.to_string())
    }

    fn read(process: &str) -> Self {
        let read = |file: &str| fs::read_to_string(format!("/proc/{file}")).unwrap_or_default();
        let of = |file: &str| read(&format!("{process}/{file}"));
        let open_fds = fs::read_dir(format!("/proc/{process}/fd")).ok();
        Self {
            open_fds: open_fds.map(|fds| fds.count() as u64),
            ..Self::parse(&of("stat"), &of("status"), &of("limits"), &read("stat"))
        }
    }

    fn parse(stat: &str, status: &str, limits: &str, boot: &str) -> Self {
        // The second field, the name, is in parentheses and may hold spaces and parentheses.
        let after_name = stat.rfind(')').and_then(|end| stat.get(end + 1..)).unwrap_or_default();
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        // proc(5) counts from 1; the first field here is its third.
        let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<f64>().ok());
        let word = |text: &str, prefix: &str, at: usize| {
            let line = text.lines().find_map(|line| line.strip_prefix(prefix))?;
            line.split_whitespace().nth(at)?.parse::<u64>().ok()
        };
        let kib = |prefix| word(status, prefix, 0).map(|kib| kib * 1024);
        Self {
            cpu: ticks(14)
                .zip(ticks(15))
                .map(|(user, system)| Duration::from_secs_f64((user + system) / TICKS_PER_SECOND)),
            resident_bytes: kib("VmRSS:"),
            virtual_bytes: kib("VmSize:"),
            open_fds: None,
            max_fds: word(limits, "Max open files", 0),
            threads: word(status, "Threads:", 0),
            start_seconds: ticks(22)
                .zip(word(boot, "btime", 0))
                .map(|(start, boot)| boot as f64 + start / TICKS_PER_SECOND),
        }
    }
}

/// A gauge's value, if it could be read.
type Value = fn(&Usage) -> Option<f64>;

/// Collector of the `process_*` metrics.
struct Process {
    scraping: Mutex<()>,
    cpu: Counter,
    gauges: [(Gauge, Value); 6],
}

impl Process {
    fn new() -> prometheus::Result<Self> {
        let gauge = |name, help| Gauge::new(name, help);
        Ok(Self {
            scraping: Mutex::default(),
            cpu: Counter::new(
                "process_cpu_seconds_total",
                "Total user and system CPU time spent in seconds.",
            )?,
            gauges: [
                (gauge("process_resident_memory_bytes", "Resident memory size in bytes.")?, |u| {
                    u.resident_bytes.map(|n| n as f64)
                }),
                (gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.")?, |u| {
                    u.virtual_bytes.map(|n| n as f64)
                }),
                (gauge("process_open_fds", "Number of open file descriptors.")?, |u| {
                    u.open_fds.map(|n| n as f64)
                }),
                (gauge("process_max_fds", "Maximum number of open file descriptors.")?, |u| {
                    u.max_fds.map(|n| n as f64)
                }),
                (gauge("process_threads", "Number of OS threads in the process.")?, |u| {
                    u.threads.map(|n| n as f64)
                }),
                (
                    gauge(
                        "process_start_time_seconds",
                        "Start time of the process since unix epoch in seconds.",
                    )?,
                    |u| u.start_seconds,
                ),
            ],
        })
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = self.gauges.iter().flat_map(|(gauge, _)| gauge.desc());
        self.cpu.desc().into_iter().chain(gauges).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // Two scrapes at once must not both add the same increase.
        let _scraping = self.scraping.lock().unwrap_or_else(PoisonError::into_inner);
        let usage = Usage::now();
        let mut families = Vec::new();
        if let Some(cpu) = usage.cpu {
            self.cpu.inc_by((cpu.as_secs_f64() - self.cpu.get()).max(0.0));
            families.extend(self.cpu.collect());
        }
        for (gauge, value) in &self.gauges {
            if let Some(value) = value(&usage) {
                gauge.set(value);
                families.extend(gauge.collect());
            }
        }
        families
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_understood() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 7 0 1000 \
                    104857600 5000 18446744073709551615";
        let status = "Name:\ta\nVmSize:\t  102400 kB\nVmRSS:\t   20000 kB\nThreads:\t7\n";
        let limits = "Limit  Soft Limit Hard Limit Units\nMax open files   1024   4096   files\n";
        let usage = Usage::parse(stat, status, limits, "cpu 1 2\nbtime 1700000000\n");
        assert_eq!(
            usage,
            Usage {
                cpu: Some(Duration::from_secs(3)),
                resident_bytes: Some(20_480_000),
                virtual_bytes: Some(104_857_600),
                open_fds: None,
                max_fds: Some(1024),
                threads: Some(7),
                start_seconds: Some(1_700_000_010.0),
            }
        );
        assert_eq!(Usage::parse("", "", "", ""), Usage::default());
        assert_eq!(
            Usage::parse("42 (x", "VmRSS:\n", "Max open files\n", "btime"),
            Usage::default()
        );
    }

    #[test]
    fn a_family_is_shared_by_all_who_register_it() {
        let registry = Registry::new();
        let gauge = || IntGauge::new("family_test_shared", "A gauge.").unwrap();
        family(&registry, gauge()).unwrap().add(2);
        family(&registry, gauge()).unwrap().add(3);
        let text = encode(&registry).unwrap();
        assert!(text.contains("\nfamily_test_shared 5\n"), "{text}");
        let labelled = |part: &str| {
            let opts = Opts::new("family_test_parts", "Parts.").const_label("part", part);
            family(&registry, IntGauge::with_opts(opts).unwrap()).unwrap()
        };
        labelled("a").set(1);
        labelled("b").set(2);
        labelled("a").add(10);
        let text = encode(&registry).unwrap();
        assert!(text.contains("family_test_parts{part=\"a\"} 11\n"), "{text}");
        assert!(text.contains("family_test_parts{part=\"b\"} 2\n"), "{text}");
        let other = Gauge::new("family_test_parts", "Parts.").unwrap();
        assert!(family(&registry, other).is_err());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_registry_reports_process_and_build() {
        let registry = registry().unwrap();
        build_info(&registry, "kv_build_info", "1.2.3", &[("algorithm", "xxh3")]).unwrap();
        let text = encode(&registry).unwrap();
        for line in [
            "# TYPE process_cpu_seconds_total counter",
            "# TYPE process_resident_memory_bytes gauge",
            "process_start_time_seconds ",
            "process_open_fds ",
            "kv_build_info{algorithm=\"xxh3\",version=\"1.2.3\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(build_info(&registry, "kv_build_info", "1.2.3", &[]).is_err());
        let start = Usage::now().start_seconds.unwrap();
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        assert!(start <= now + 1.0 && start > now - 86_400.0 * 365.0, "{start} {now}");
    }
}
