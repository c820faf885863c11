//! `loadgen compare`: two reports against each other.
//!
//! # Rule
//!
//! Scenarios are matched by name, policy and level, and compared by the medians of their repeats. A
//! quantity became worse if its median moved in the bad direction by more than the limit, **and** each
//! median lies outside the range of the other report's repeats; with one repeat the range is a point, so
//! that the limit alone decides. A share of errors has to grow by `MIN_ERRORS` besides. A scenario that
//! is in the first report and not in the second is a failure.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::Result;

use super::{
    Report, Spread, Summary,
    repeats::smaller_is_better,
    text::{Table, number, plain},
};

/// What the share of errors has to grow by to count: one request in a thousand.
const MIN_ERRORS: f64 = 0.001;
/// Quantities that are listed, those of components by their ending.
const LISTED: [&str; 12] = [
    "throughput_rps",
    "ttft_ms.p50",
    "ttft_ms.p95",
    "ttft_ms.p99",
    "errors_share",
    "itl_ms.p99",
    "goodput.share",
    "freshness_us.p99",
    "storm.drain_ms.p50",
    "hits.hit_ratio",
    ".cpu_ms_per_request",
    ".rss_peak_bytes",
];

/// Arguments of `loadgen compare`.
#[derive(Clone, Debug, clap::Args)]
pub struct CompareOptions {
    /// Report of before.
    #[arg(value_name = "A.json")]
    pub before: PathBuf,
    /// Report of after.
    #[arg(value_name = "B.json")]
    pub after: PathBuf,
    /// Fail, with exit code 2, if something became worse by more than this and by more than repeats
    /// differ: `5%` or `0.05`. A scenario that vanished fails always.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub fail_over: Option<f64>,
}

/// Reads both reports and writes what changed; tells whether something became worse beyond the limit.
///
/// # Errors
///
/// When a report cannot be read, and those of `out`.
pub fn run(options: &CompareOptions, out: &mut dyn Write) -> Result<bool> {
    let (before, after) = (Report::load(&options.before)?, Report::load(&options.after)?);
    Ok(write(&before, &after, options.fail_over, out)?)
}

/// Reads `5%` or `0.05`.
fn share(text: &str) -> Result<f64, String> {
    let (digits, scale) = text.strip_suffix('%').map_or((text, 1.0), |digits| (digits, 100.0));
    match digits.trim().parse::<f64>() {
        Ok(value) if scale == 1.0 && value >= 1.0 => Err(format!("write {text}% for a percentage")),
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value / scale),
        _ => Err("write a percentage like 5%, or a share like 0.05".to_owned()),
    }
}

/// Writes what changed from `before` to `after`; tells whether something became worse by more than
/// `fail_over` (0.05 = 5 %), or vanished.
///
/// # Errors
///
/// Those of `out`.
pub fn write(
    before: &Report,
    after: &Report,
    fail_over: Option<f64>,
    out: &mut dyn Write,
) -> io::Result<bool> {
    for (name, report) in [("before", before), ("after", after)] {
        let of = &report.environment;
        let sha = of.git_sha.as_deref().unwrap_or("no commit");
        writeln!(out, "{name:<7} {} ({})", plain(&of.version), plain(sha))?;
        if !report.valid {
            writeln!(out, "WARNING: the report of {name} is not valid: it failed its own checks")?;
        }
        if report.interrupted {
            writeln!(out, "WARNING: the run of {name} was interrupted")?;
        }
    }
    machines(before, after, out)?;
    let (old, new) = (summaries(before), summaries(after));
    let mut failed: Vec<String> = Vec::new();
    for was in &old {
        let title = title(was);
        let Some(is) = new.iter().find(|is| same(was, is)) else {
            writeln!(out, "\n{title}\n  VANISHED: not in the report of after")?;
            failed.push(format!("{title}: vanished"));
            continue;
        };
        writeln!(out, "\n{title} ({} and {} repeats)", was.repeats, is.repeats)?;
        for (quantity, judged) in rows(was, is, fail_over, out)? {
            if judged == Judged::Failed {
                failed.push(format!("{title}: {quantity}"));
            }
        }
    }
    for is in new.iter().filter(|is| !old.iter().any(|was| same(was, is))) {
        writeln!(out, "\n{}\n  new: not in the report of before", title(is))?;
    }
    writeln!(out)?;
    match fail_over {
        Some(limit) => writeln!(
            out,
            "{} worse by more than {}% and by more than repeats differ, or vanished",
            failed.len(),
            number(limit * 100.0)
        )?,
        None => writeln!(out, "no limit was given: only what vanished fails")?,
    }
    for what in &failed {
        writeln!(out, "  FAILED {what}")?;
    }
    Ok(!failed.is_empty())
}

/// Repeats taken together, by the report itself or here.
fn summaries(report: &Report) -> Vec<Summary> {
    if !report.summaries.is_empty() {
        return report.summaries.clone();
    }
    let mut report = report.clone();
    report.summarise();
    report.summaries
}

fn same(a: &Summary, b: &Summary) -> bool {
    a.name == b.name && a.policy == b.policy && a.level == b.level
}

fn title(of: &Summary) -> String {
    let level = of.level.map(|level| format!(" at {}", number(level))).unwrap_or_default();
    format!("{} / {}{level}", plain(&of.name), plain(&of.policy))
}

/// Warns of two machines: their numbers cannot be compared.
fn machines(before: &Report, after: &Report, out: &mut dyn Write) -> io::Result<()> {
    let (a, b) = (&before.environment, &after.environment);
    for (what, was, is) in [
        ("CPU", a.cpu.clone(), b.cpu.clone()),
        ("cores", a.cores.to_string(), b.cores.to_string()),
        ("kernel", a.kernel.clone(), b.kernel.clone()),
        ("memory", a.memory_bytes.to_string(), b.memory_bytes.to_string()),
    ] {
        if was != is {
            let (was, is) = (plain(&was), plain(&is));
            writeln!(out, "WARNING: not the same machine: {what} was {was:?}, is {is:?}")?;
        }
    }
    Ok(())
}

/// What is said of one change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Judged {
    Better,
    Worse,
    Noise,
    Failed,
}

/// Writes the table of one scenario.
fn rows(
    was: &Summary,
    is: &Summary,
    fail_over: Option<f64>,
    out: &mut dyn Write,
) -> io::Result<Vec<(String, Judged)>> {
    let mut table = Table::new(&["quantity", "before", "after", "change", "repeats", ""]);
    let mut found = Vec::new();
    let names: BTreeSet<&String> = was.quantities.keys().chain(is.quantities.keys()).collect();
    for listed in LISTED {
        let of = |name: &&&String| match listed.strip_prefix('.') {
            Some(_) => name.ends_with(listed),
            None => name.as_str() == listed,
        };
        for name in names.iter().filter(of) {
            let (old, new) = (was.quantities.get(*name), is.quantities.get(*name));
            let shown = |of: Option<&Spread>| of.map_or("-".to_owned(), |of| number(of.median));
            let mut row = vec![plain(name), shown(old), shown(new)];
            if let Some((old, new)) = old.zip(new) {
                let judged = judge(name, old, new, fail_over);
                row.push(change(old.median, new.median));
                row.push(format!("{} | {}", range(old), range(new)));
                row.push(match judged {
                    Judged::Better => "better".to_owned(),
                    Judged::Worse => "worse".to_owned(),
                    Judged::Noise => String::new(),
                    Judged::Failed => "WORSE".to_owned(),
                });
                found.push(((*name).clone(), judged));
            } else {
                row.extend(["-".to_owned(), "-".to_owned(), "not in both".to_owned()]);
            }
            table.row(row);
        }
    }
    table.write(out)?;
    Ok(found)
}

/// The rule of this module.
fn judge(name: &str, old: &Spread, new: &Spread, fail_over: Option<f64>) -> Judged {
    let inside = |value: f64, of: &Spread| (of.min..=of.max).contains(&value);
    if inside(new.median, old) || inside(old.median, new) {
        return Judged::Noise;
    }
    let by = new.median - old.median;
    if (by > 0.0) != smaller_is_better(name) {
        return Judged::Better;
    }
    if name == "errors_share" && by < MIN_ERRORS {
        return Judged::Noise;
    }
    let beyond = fail_over.is_some_and(|limit| by.abs() > limit * old.median.abs());
    if beyond { Judged::Failed } else { Judged::Worse }
}

fn change(old: f64, new: f64) -> String {
    if old == new {
        return "0%".to_owned();
    }
    if old == 0.0 {
        return "from 0".to_owned();
    }
    format!("{:+.1}%", (new - old) / old.abs() * 100.0)
}

fn range(of: &Spread) -> String {
    if of.min == of.max {
        return number(of.min);
    }
    format!("{}..{}", number(of.min), number(of.max))
}
