//! Tables for people: at most [`WIDTH`] columns of ASCII.

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use super::{Percentiles, Report, Scenario, repeats::grouped};
use crate::loadgen::stats::{self, median};

/// Columns of a line.
pub const WIDTH: usize = 120;
/// Components in one table of costs.
const COMPONENTS: usize = 5;

/// What the words mean, printed once.
const DEFINITIONS: &str = "\
Levels are concurrency or requests/s; repeats are taken together by their median.
TTFT is from the intended arrival to the first token, and counts unfinished requests with what they had waited;
'sent p95' is the same from the send. ITL: all gaps between pieces of an answer. Hit: cached / prompt tokens.
Off: mean |predicted - actual| tokens per request. Regret: tokens that the best pod held and the chosen one did not.
Fresh: from publishing an event to the first score that shows it; endpoint_picker: to the first request routed by it,
'elsewhere' if load decided. Imbal: largest / mean share of a pod.
Knee: last level before P95 exceeds 3 times the first level's, or throughput falls, or stays where more was in flight.
~ marks percentiles with too few samples (p95 wants 200, p99 1000, p99.9 10000). '-' was not measured.";

/// Writes the summary tables.
///
/// # Errors
///
/// Those of `out`.
pub fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let of = &report.environment;
    let head = format!(
        "loadgen {} on {} ({} cores, load {} -> {}), {} s{}",
        of.version,
        of.cpu,
        number(of.cores),
        number(of.load_before),
        number(of.load_after),
        number(report.duration_s),
        if report.interrupted { ", INTERRUPTED" } else { "" },
    );
    line(out, "", &head)?;
    if !report.valid {
        line(out, "", "NOT VALID: the run failed its own checks, see the warnings")?;
    }
    for warning in &report.warnings {
        line(out, "  ", &format!("warning: {warning}"))?;
    }
    let groups = grouped(report);
    let mut names: Vec<&str> = Vec::new();
    for group in &groups {
        if !names.contains(&group[0].name.as_str()) {
            names.push(&group[0].name);
        }
    }
    for name in names {
        let rows: Vec<&[&Scenario]> =
            groups.iter().filter(|group| group[0].name == name).map(Vec::as_slice).collect();
        scenario(name, &rows, out)?;
    }
    comparisons(report, out)?;
    writeln!(out)?;
    writeln!(out, "{DEFINITIONS}")
}

/// All tables of one name.
fn scenario(name: &str, groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let Some(first) = groups.first().map(|group| group[0]) else { return Ok(()) };
    writeln!(out)?;
    let kind = format!("{:?}", first.pacing).to_lowercase();
    line(out, "", &format!("== {name} ({kind} loop): {}", first.workload))?;
    latencies(groups, out)?;
    knees(groups, out)?;
    index(groups, out)?;
    visible(groups, out)?;
    costs(groups, out)?;
    bursts(groups, out)?;
    storms(groups, out)?;
    let gateways: BTreeSet<&str> = groups
        .iter()
        .flat_map(|group| group.iter().map(|of| of.gateway.as_str()))
        .filter(|text| !text.is_empty())
        .collect();
    for gateway in gateways {
        line(out, "  ", gateway)?;
    }
    for of in groups.iter().flat_map(|group| group.iter()) {
        let who = format!("{}{}, repeat {}", of.policy, at(of.level), of.repeat);
        if !of.valid {
            line(out, "  ", &format!("NOT VALID: {who}"))?;
        }
        for warning in &of.warnings {
            line(out, "  ", &format!("warning: {who}: {warning}"))?;
        }
        if !of.errors_by_label.is_empty() {
            let labels: Vec<String> =
                of.errors_by_label.iter().map(|(label, n)| format!("{label} {n}")).collect();
            line(out, "  ", &format!("errors: {who}: {}", labels.join(", ")))?;
        }
    }
    Ok(())
}

fn latencies(groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&[
        "policy",
        "level",
        "requests",
        "errors",
        "asked",
        "in flight",
        "req/s",
        "TTFT p50",
        "p90",
        "p95",
        "p99 ms",
        "sent p95",
        "ITL p50",
        "p99 ms",
    ]);
    for group in groups {
        let asked = over(group, |of| of.in_flight.asked.map(|asked| asked as f64).or(of.asked_rps));
        let unit = if group[0].in_flight.asked.is_none() && asked != "-" { "/s" } else { "" };
        table.row(vec![
            plain(&group[0].policy),
            group[0].level.map_or("-".to_owned(), number),
            group.iter().map(|of| of.requests).sum::<u64>().to_string(),
            group.iter().map(|of| of.errors).sum::<u64>().to_string(),
            format!("{asked}{unit}"),
            over(group, |of| Some(of.in_flight.mean)),
            over(group, |of| Some(of.throughput_rps)),
            percentile(group, "p50", |of| Some(&of.ttft_ms)),
            percentile(group, "p90", |of| Some(&of.ttft_ms)),
            percentile(group, "p95", |of| Some(&of.ttft_ms)),
            percentile(group, "p99", |of| Some(&of.ttft_ms)),
            percentile(group, "p95", |of| Some(&of.ttft_from_send_ms)),
            percentile(group, "p50", |of| Some(&of.itl_ms)),
            percentile(group, "p99", |of| Some(&of.itl_ms)),
        ]);
    }
    table.write(out)
}

/// The first level that gives nearly all the throughput there is, by policy.
fn knees(groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let mut policies: Vec<&str> = Vec::new();
    for group in groups {
        if !policies.contains(&group[0].policy.as_str()) {
            policies.push(&group[0].policy);
        }
    }
    let mut knees = Vec::new();
    for policy in policies {
        let of_policy = groups.iter().filter(|group| group[0].policy == policy);
        let mut levels: Vec<(f64, f64, f64)> = of_policy
            .clone()
            .filter_map(|group| {
                let rates: Vec<f64> = group.iter().map(|of| of.throughput_rps).collect();
                let p95s: Vec<f64> = group.iter().filter_map(|of| of.ttft_ms.p95).collect();
                Some((group[0].level?, median(&rates)?, median(&p95s)?))
            })
            .collect();
        levels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let pacing = of_policy.map(|group| group[0].pacing).next().unwrap_or_default();
        if levels.len() > 1 {
            let knee = stats::knee(&levels, pacing);
            let at = knee.map_or_else(|| "none".to_owned(), number);
            knees.push(format!("{policy} {at}"));
        }
    }
    if knees.is_empty() {
        return Ok(());
    }
    line(out, "  ", &format!("knee: {}", knees.join(", ")))
}

/// Hits, predictions, freshness and balance.
fn index(groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&[
        "policy",
        "level",
        "hit",
        "ideal",
        "off tok",
        "regret tok",
        "fresh p50",
        "p99",
        "max us",
        "lost",
        "vs WaitVisible us",
        "imbal",
        "goodput",
    ]);
    for group in groups {
        table.row(vec![
            plain(&group[0].policy),
            group[0].level.map_or("-".to_owned(), number),
            over(group, |of| Some(of.hits.as_ref()?.hit_ratio)),
            over(group, |of| of.hits.as_ref()?.ideal_hit_ratio),
            over(group, |of| of.hits.as_ref()?.mean_abs_error_tokens),
            over(group, |of| Some(of.hits.as_ref()?.regret_tokens? as f64)),
            over(group, |of| of.freshness_us.as_ref()?.p50),
            over(group, |of| of.freshness_us.as_ref()?.p99),
            over(group, |of| of.freshness_us.as_ref()?.max),
            over(group, |of| Some(of.freshness_us.as_ref()?.lost as f64)),
            percentile(group, "p50", |of| of.freshness_us.as_ref()?.difference.as_ref()),
            over(group, |of| of.imbalance),
            over(group, |of| Some(of.goodput.as_ref()?.share)),
        ]);
    }
    table.write(out)
}

/// Freshness by kind and condition: stores and removes, from the end of an engine's step, and through
/// the endpoint picker.
fn visible(groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&[
        "fresh, us",
        "level",
        "kind",
        "n",
        "p50",
        "p95",
        "p99",
        "max",
        "between polls",
        "elsewhere",
    ]);
    fn of<'a>(of: &'a Scenario, kind: &str) -> Option<&'a Percentiles> {
        of.freshness_us.as_ref()?.kinds.get(kind)
    }
    for group in groups {
        let measured = || group.iter().filter_map(|of| of.freshness_us.as_ref());
        let kinds: BTreeSet<&String> = measured().flat_map(|it| it.kinds.keys()).collect();
        for kind in kinds {
            let picks = kind.starts_with("endpoint_picker.");
            table.row(vec![
                plain(&group[0].policy),
                group[0].level.map_or("-".to_owned(), number),
                plain(kind),
                group.iter().filter_map(|it| Some(of(it, kind)?.n)).sum::<u64>().to_string(),
                percentile(group, "p50", |it| of(it, kind)),
                percentile(group, "p95", |it| of(it, kind)),
                percentile(group, "p99", |it| of(it, kind)),
                percentile(group, "max", |it| of(it, kind)),
                over(group, |it| {
                    let fresh = it.freshness_us.as_ref()?;
                    match picks {
                        true => fresh.pick_resolution_us,
                        // Nobody polls regularly for steps.
                        false if kind.starts_with("engine_step.") => None,
                        false => fresh.resolution_us,
                    }
                }),
                match picks {
                    true => most(group, |it| Some(it.freshness_us.as_ref()?.routed_elsewhere)),
                    false => "-".to_owned(),
                },
            ]);
        }
    }
    table.write(out)
}

/// CPU per request and memory, by component.
fn costs(groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let components: BTreeSet<&str> = groups
        .iter()
        .flat_map(|group| group.iter())
        .flat_map(|of| of.resources.keys().map(String::as_str))
        .collect();
    let components: Vec<&str> = components.into_iter().collect();
    for some in components.chunks(COMPONENTS) {
        let mut head = vec!["CPU-ms/req, MiB".to_owned(), "level".to_owned()];
        head.extend(some.iter().map(|component| clipped(&plain(component), 14)));
        let mut table = Table::new(&head);
        for group in groups {
            let mut row =
                vec![plain(&group[0].policy), group[0].level.map_or("-".to_owned(), number)];
            for component in some {
                let cpu = over(group, |of| of.resources.get(*component)?.cpu_ms_per_request);
                let memory = over(group, |of| {
                    let bytes = of.resources.get(*component)?.rss_peak_bytes;
                    (bytes > 0).then_some(bytes as f64 / f64::from(1 << 20))
                });
                row.push(format!("{cpu}, {memory}"));
            }
            table.row(row);
        }
        table.write(out)?;
    }
    Ok(())
}

fn bursts(groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&[
        "bursts",
        "level",
        "count",
        "size",
        "release p50",
        "max ms",
        "TTFT p95 ms",
        "recovery p50",
        "max s",
    ]);
    for group in groups.iter().filter(|group| group.iter().any(|of| of.bursts.is_some())) {
        table.row(vec![
            plain(&group[0].policy),
            group[0].level.map_or("-".to_owned(), number),
            over(group, |of| Some(of.bursts.as_ref()?.count as f64)),
            over(group, |of| Some(of.bursts.as_ref()?.size as f64)),
            percentile(group, "p50", |of| Some(&of.bursts.as_ref()?.release_ms)),
            percentile(group, "max", |of| Some(&of.bursts.as_ref()?.release_ms)),
            percentile(group, "p95", |of| Some(&of.bursts.as_ref()?.ttft_ms)),
            percentile(group, "p50", |of| Some(&of.bursts.as_ref()?.recovery_s)),
            percentile(group, "max", |of| Some(&of.bursts.as_ref()?.recovery_s)),
        ]);
    }
    table.write(out)
}

fn storms(groups: &[&[&Scenario]], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new(&[
        "event storm",
        "level",
        "blocks",
        "blocks/s",
        "backlog",
        "age ms",
        "drain p50",
        "max ms",
        "lost",
        "gaps",
        "replays",
        "wrong pods",
        "ns/block",
    ]);
    for group in groups.iter().filter(|group| group.iter().any(|of| of.storm.is_some())) {
        table.row(vec![
            plain(&group[0].policy),
            group[0].level.map_or("-".to_owned(), number),
            over(group, |of| Some(of.storm.as_ref()?.blocks as f64)),
            over(group, |of| Some(of.storm.as_ref()?.blocks_per_s)),
            over(group, |of| Some(of.storm.as_ref()?.backlog_max_batches as f64)),
            over(group, |of| Some(of.storm.as_ref()?.backlog_max_ms)),
            percentile(group, "p50", |of| Some(&of.storm.as_ref()?.drain_ms)),
            percentile(group, "max", |of| Some(&of.storm.as_ref()?.drain_ms)),
            most(group, |of| Some(of.storm.as_ref()?.lost_batches)),
            most(group, |of| Some(of.storm.as_ref()?.gaps)),
            most(group, |of| Some(of.storm.as_ref()?.replays)),
            most(group, |of| Some(of.storm.as_ref()?.wrong_pods.len() as u64)),
            over(group, |of| of.storm.as_ref()?.indexer_ns_per_block),
        ]);
    }
    table.write(out)
}

/// What is printed of each comparison: title and quantity.
const AGAINST: [(&str, &str); 5] = [
    ("req/s", "throughput_rps"),
    ("TTFT p50", "ttft_ms.p50"),
    ("TTFT p90", "ttft_ms.p90"),
    ("TTFT p95", "ttft_ms.p95"),
    ("success", "success_share"),
];

/// Ratios with their intervals, then every loss in words.
fn comparisons(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    if report.comparisons.is_empty() {
        return Ok(());
    }
    writeln!(out)?;
    line(out, "", "== policies against each other: ratio [95% interval], by pairs of repeats")?;
    let mut head = vec!["scenario", "level", "policies"];
    head.extend(AGAINST.map(|(title, _)| title));
    let mut table = Table::new(&head);
    let mut losses = Vec::new();
    for of in &report.comparisons {
        let policies = format!("{} / {}", of.policy, of.against);
        let mut row =
            vec![plain(&of.name), of.level.map_or("-".to_owned(), number), plain(&policies)];
        for (_, quantity) in AGAINST {
            row.push(of.quantities.get(quantity).map_or("-".to_owned(), |difference| {
                let lost = if difference.lost { " LOST" } else { "" };
                format!("{}{}{lost}", number(difference.ratio), ends(difference.interval))
            }));
        }
        table.row(row);
        for (quantity, difference) in of.quantities.iter().filter(|(_, of)| of.lost) {
            losses.push(format!(
                "{}{}: {policies} {quantity} {}{}",
                of.name,
                at(of.level),
                number(difference.ratio),
                ends(difference.interval),
            ));
        }
    }
    table.write(out)?;
    writeln!(out)?;
    if losses.is_empty() {
        return line(out, "", "lost: nothing by more than 5% with an interval that excludes 1");
    }
    line(out, "", "LOST, by more than 5% and beyond the interval where there is one:")?;
    losses.iter().try_for_each(|loss| line(out, "  ", loss))
}

fn ends(interval: Option<[f64; 2]>) -> String {
    interval.map(|[low, high]| format!(" [{}, {}]", number(low), number(high))).unwrap_or_default()
}

fn at(level: Option<f64>) -> String {
    level.map(|level| format!(" at {}", number(level))).unwrap_or_default()
}

/// Median over the repeats that have it.
fn over(group: &[&Scenario], of: impl Fn(&Scenario) -> Option<f64>) -> String {
    let values: Vec<f64> = group.iter().filter_map(|scenario| of(scenario)).collect();
    median(&values).map_or("-".to_owned(), number)
}

/// Largest of the repeats: of faults, one is enough.
fn most(group: &[&Scenario], of: impl Fn(&Scenario) -> Option<u64>) -> String {
    let most = group.iter().filter_map(|scenario| of(scenario)).max();
    most.map_or("-".to_owned(), |most| most.to_string())
}

/// Median over the repeats, with a mark where one of them had too few samples.
fn percentile(
    group: &[&Scenario],
    name: &str,
    of: impl Fn(&Scenario) -> Option<&Percentiles>,
) -> String {
    let all: Vec<&Percentiles> = group.iter().filter_map(|scenario| of(scenario)).collect();
    let value = |of: &&Percentiles| match name {
        "p50" => of.p50,
        "p90" => of.p90,
        "p95" => of.p95,
        "p99" => of.p99,
        _ => of.max,
    };
    let values: Vec<f64> = all.iter().filter_map(value).collect();
    let Some(value) = median(&values) else { return "-".to_owned() };
    let doubtful = all.iter().any(|of| of.doubtful.iter().any(|doubtful| doubtful == name));
    format!("{}{}", if doubtful { "~" } else { "" }, number(value))
}

/// A number with three digits that mean something.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    let decimals = match size {
        _ if !value.is_finite() => return "-".to_owned(),
        _ if size == 0.0 || size >= 100.0 || (size >= 1.0 && size.fract() == 0.0) => 0,
        _ if size >= 10.0 => 1,
        _ if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// Printable ASCII; everything else, which names and warnings from elsewhere may hold, becomes `?`.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// The beginning, if it is longer.
fn clipped(text: &str, width: usize) -> String {
    if text.len() <= width {
        return text.to_owned();
    }
    format!("{}..", &text[..width - 2])
}

/// Writes words, broken into lines of at most [`WIDTH`].
fn line(out: &mut dyn Write, indent: &str, text: &str) -> io::Result<()> {
    let mut written = indent.to_owned();
    for word in plain(text).split(' ') {
        if written.len() > indent.len() {
            if written.len() + 1 + word.len() > WIDTH {
                writeln!(out, "{written}")?;
                written = format!("{indent}  ");
            } else {
                written.push(' ');
            }
        }
        written.push_str(&clipped(word, WIDTH - indent.len() - 2));
    }
    writeln!(out, "{written}")
}

/// Rows under a head, in columns as wide as they must be.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new<T: ToString>(head: &[T]) -> Self {
        Self { rows: vec![head.iter().map(ToString::to_string).collect()] }
    }

    /// Adds a row, of ASCII.
    pub(super) fn row(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Writes the table; nothing if it has no rows but its head, and no column that has nothing in it
    /// but `-`. A first column that would make it too wide is cut.
    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let [head, rows @ ..] = self.rows.as_slice() else { return Ok(()) };
        if rows.is_empty() {
            return Ok(());
        }
        let said = |column: &usize| rows.iter().any(|row| row[*column] != "-");
        let columns: Vec<usize> = (0..head.len()).filter(said).collect();
        let width = |column: usize| self.rows.iter().map(|row| row[column].len()).max();
        let mut widths: Vec<usize> =
            columns.iter().map(|column| width(*column).unwrap_or(0)).collect();
        let excess = (widths.iter().map(|width| width + 2).sum::<usize>()).saturating_sub(WIDTH);
        if let Some(first) = widths.first_mut() {
            *first = first.saturating_sub(excess).max(8);
        }
        for row in &self.rows {
            let mut written = String::new();
            for (place, (column, width)) in columns.iter().zip(&widths).enumerate() {
                let cell = clipped(&row[*column], (*width).max(2));
                if place == 0 {
                    written += &format!("  {cell:<width$}");
                } else {
                    written += &format!("  {cell:>width$}");
                }
            }
            writeln!(out, "{}", written.trim_end())?;
        }
        Ok(())
    }
}
