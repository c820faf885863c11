//! What a run is made on: versions, machine, limits.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::report::Environment;

/// A machine with more than this share of its cores taken before the run is not a quiet one.
const QUIET: f64 = 0.5;

/// Reads the environment. What cannot be read is empty, 0 or `None`.
#[must_use]
pub fn read() -> Environment {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let load = load_average();
    Environment {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        git_sha: git_sha(Path::new(".")),
        kernel: line("/proc/sys/kernel/osrelease").unwrap_or_default(),
        cpu: field(&cpuinfo, "model name").unwrap_or_default().to_owned(),
        cores: cores(),
        load_before: load,
        load_after: load,
        memory_bytes: field(&memory, "MemTotal")
            .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
            .map_or(0, |kib| kib * 1024),
        cgroup: limits(),
    }
}

/// Doubts the machine if more than half of its cores were taken before the run; not if their number is
/// not known (0).
#[must_use]
pub fn busy(load: f64, cores: f64) -> Option<String> {
    (cores > 0.0 && load > QUIET * cores).then(|| {
        format!(
            "the machine was busy before the run: load average {load:.2} on {cores:.1} cores; end what \
             else runs, or expect wide intervals"
        )
    })
}

/// Returns the load average of the last minute; 0 if it cannot be read.
#[must_use]
pub fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0.0)
}

/// Returns the cores that may be used: affinity and the quota of our cgroup, which need not be whole.
#[must_use]
pub fn cores() -> f64 {
    let whole = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    match limits().get("cpu.max").and_then(|text| quota(text)) {
        // The parallelism is rounded down from the quota.
        Some(quota) if quota < whole + 1.0 => quota,
        _ => whole,
    }
}

/// `MAX PERIOD` of `cpu.max`, in cores; `None` without a limit.
fn quota(text: &str) -> Option<f64> {
    let (quota, period) = text.split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.trim().parse().ok()?);
    (period > 0.0).then_some(quota / period)
}

/// Limits of our cgroup by file name: version 2, and version 1 where that is what there is.
fn limits() -> BTreeMap<String, String> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let two = PathBuf::from(format!("/sys/fs/cgroup{path}"));
    let files = ["cpu.max", "cpu.weight", "memory.max", "memory.high", "pids.max"]
        .map(|name| (two.join(name), name))
        .into_iter()
        .chain(
            [
                ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "cpu.cfs_quota_us"),
                ("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "cpu.cfs_period_us"),
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "memory.limit_in_bytes"),
            ]
            .map(|(path, name)| (PathBuf::from(path), name)),
        );
    files.filter_map(|(path, name)| Some((name.to_owned(), line(path)?))).collect()
}

fn line(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The value of `name : value` or `name: value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

/// The commit that is checked out in `folder`, which is the root of a checkout or of a linked one.
fn git_sha(folder: &Path) -> Option<String> {
    let dot_git = folder.join(".git");
    let directory = match line(&dot_git) {
        Some(text) => folder.join(text.strip_prefix("gitdir: ")?),
        None => dot_git,
    };
    let head = line(directory.join("HEAD"))?;
    let Some(branch) = head.strip_prefix("ref: ") else { return Some(head) };
    // Branches of linked checkouts are in the main one.
    let common =
        line(directory.join("commondir")).map_or(directory.clone(), |at| directory.join(at));
    line(common.join(branch)).or_else(|| {
        let packed = fs::read_to_string(common.join("packed-refs")).ok()?;
        packed.lines().find_map(|line| Some(line.strip_suffix(branch)?.trim().to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let environment = read();
        assert_eq!(environment.version, env!("CARGO_PKG_VERSION"));
        assert!(environment.cores > 0.0);
        assert!(environment.memory_bytes > 1 << 20, "{environment:?}");
        assert!(!environment.kernel.is_empty());
    }

    #[test]
    fn quotas_are_read_in_cores() {
        assert_eq!(quota("150000 100000"), Some(1.5));
        assert_eq!(quota("max 100000"), None);
        assert_eq!(quota("100000 0"), None);
        assert_eq!(quota(""), None);
    }

    #[test]
    fn a_busy_machine_is_doubted() {
        assert_eq!(busy(1.9, 4.0), None);
        assert_eq!(busy(1.9, 0.0), None);
        let doubt = busy(2.1, 4.0).unwrap();
        assert!(doubt.contains("load average 2.10 on 4.0 cores"), "{doubt}");
    }

    #[test]
    fn commits_are_found_in_every_kind_of_checkout() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(git_sha(root), None);
        write(".git/HEAD", "1111\n");
        assert_eq!(git_sha(root).as_deref(), Some("1111"));
        write(".git/HEAD", "ref: refs/heads/main\n");
        assert_eq!(git_sha(root), None);
        write(".git/packed-refs", "# pack-refs\n2222 refs/heads/main\n");
        assert_eq!(git_sha(root).as_deref(), Some("2222"));
        write(".git/refs/heads/main", "3333\n");
        assert_eq!(git_sha(root).as_deref(), Some("3333"));
        write(".git/worktrees/side/HEAD", "ref: refs/heads/main\n");
        write(".git/worktrees/side/commondir", "../..\n");
        write("side/.git", "gitdir: ../.git/worktrees/side\n");
        assert_eq!(git_sha(&root.join("side")).as_deref(), Some("3333"));
    }
}
