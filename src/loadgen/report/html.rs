//! One page with plots, without a network.
//!
//! # Model
//!
//! The page is complete as it is: style, script and SVG are inside, and a content security policy forbids
//! everything else. It is readable without the script, which only hides and shows curves.
//!
//! # Invariants
//!
//! - All text of the report is escaped: names of policies come from the command line.
//! - Its size is bounded: lines are thinned, panels, rows and texts are counted, and what is left out is
//!   said.

mod chart;
mod plots;

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::Value;

use self::chart::{escape, number, shorten};
use super::{LoopKind, Percentiles, Report, Scenario};

/// Rows of a table.
const ROWS: usize = 400;
/// Pods that a cell names.
const PODS: usize = 8;
/// Warnings that are shown.
const WARNINGS: usize = 100;
/// Characters of one text from outside.
const TEXT: usize = 400;
/// Characters of the configuration.
const CONFIG: usize = 40_000;

const STYLE: &str = include_str!("html/page.css");
const SCRIPT: &str = include_str!("html/page.js");
/// SHA-256 of [`SCRIPT`], base64: the only script that the page's policy lets run.
const SCRIPT_HASH: &str = "S3ojXsk2ZBjB7WUbWJSisywxX6OXHc5WqrM5NdBjbXY=";

/// The whole page: self-contained HTML of at most 2 MB.
#[must_use]
pub fn page(report: &Report) -> String {
    let how = how_to_repeat(report);
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>loadgen report</title><style>{STYLE}</style></head><body><header>"
    );
    head(report, &mut html);
    html.push_str("</header><main>");
    scenarios(report, &mut html);
    html.push_str(&plots::all(report, &how));
    visible(report, &mut html);
    storms(report, &mut html);
    about(report, &mut html);
    _ = writeln!(
        html,
        "</main><footer>kv-indexer loadgen {} · {}</footer><script>{SCRIPT}</script></body></html>",
        escape(&shorten(&report.environment.version, 40)),
        escape(&shorten(&report.schema, 60)),
    );
    html
}

/// The sentence with command and seeds that ends every caption, as HTML.
fn how_to_repeat(report: &Report) -> String {
    let mut seeds: Vec<u64> = report.scenarios.iter().map(|s| s.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let mut how = String::new();
    if let Some(command) = command(&report.config) {
        _ = write!(how, "<code>{}</code>", escape(&shorten(command, 200)));
    }
    if !seeds.is_empty() {
        let more = if seeds.len() > 8 { ", …" } else { "" };
        let shown: Vec<_> = seeds.iter().take(8).map(u64::to_string).collect();
        let word = if seeds.len() == 1 { "seed" } else { "seeds" };
        let comma = if how.is_empty() { "" } else { ", " };
        _ = write!(how, "{comma}{word} {}{more}", shown.join(", "));
    }
    if how.is_empty() { how } else { format!("<span class=\"how\">{how}</span>") }
}

/// The command line, if the configuration has it as `command`.
fn command(config: &Value) -> Option<&str> {
    config.get("command")?.as_str()
}

/// Title, verdict, warnings.
fn head(report: &Report, html: &mut String) {
    html.push_str("<h1>loadgen report</h1><p class=\"sub\">");
    let requests: u64 = report.scenarios.iter().map(|s| s.requests).sum();
    let runs = report.scenarios.len();
    _ = write!(
        html,
        "{} · {runs} {} · {requests} requests in {} s</p>",
        escape(&date(report.started_unix_ns)),
        if runs == 1 { "run" } else { "runs" },
        number(report.duration_s)
    );
    if !report.valid {
        html.push_str(
            "<p class=\"banner invalid\" role=\"alert\"><strong>Not valid.</strong> The run did not pass its \
             own checks; the warnings say why. Do not quote these numbers.</p>",
        );
    }
    if report.interrupted {
        html.push_str(
            "<p class=\"banner cut\"><strong>Interrupted.</strong> The run was ended by a signal; this is \
             what had been measured.</p>",
        );
    }
    let of_runs = report
        .scenarios
        .iter()
        .flat_map(|s| s.warnings.iter().map(move |warning| format!("{}: {warning}", title(s))));
    let warnings: Vec<String> = report.warnings.iter().cloned().chain(of_runs).collect();
    if !warnings.is_empty() {
        let open = if report.valid && warnings.len() > 5 { "" } else { " open" };
        _ = write!(html, "<details{open}><summary>Warnings: {}</summary><ul>", warnings.len());
        for warning in warnings.iter().take(WARNINGS) {
            _ = write!(html, "<li>{}</li>", escape(&shorten(warning, TEXT)));
        }
        left_out(html, warnings.len(), WARNINGS, "li");
        html.push_str("</ul></details>");
    }
}

fn left_out(html: &mut String, all: usize, most: usize, tag: &str) {
    if all > most {
        _ = write!(html, "<{tag}>{} more are in the JSON document</{tag}>", all - most);
    }
}

/// Which run it is.
fn title(scenario: &Scenario) -> String {
    let mut title = format!("{}, {}", scenario.name, scenario.policy);
    if let Some(level) = scenario.level {
        _ = write!(title, ", level {}", number(level));
    }
    _ = write!(title, ", repeat {}", scenario.repeat);
    title
}

/// A table; cells are HTML.
fn table(
    html: &mut String,
    id: &str,
    heading: &str,
    columns: &[&str],
    rows: impl ExactSizeIterator<Item = (&'static str, Vec<String>)>,
) {
    let all = rows.len();
    _ = write!(
        html,
        "<section id=\"{id}\"><h2>{heading}</h2><div class=\"scroll\"><table><thead><tr>"
    );
    for column in columns {
        _ = write!(html, "<th>{column}</th>");
    }
    html.push_str("</tr></thead><tbody>");
    for (class, cells) in rows.take(ROWS) {
        _ = write!(html, "<tr class=\"{class}\">");
        for cell in cells {
            _ = write!(html, "<td>{cell}</td>");
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table></div>");
    left_out(html, all, ROWS, "p");
    html.push_str("</section>");
}

fn name_cell(text: &str) -> String {
    escape(&shorten(text, 60))
}

fn value_cell(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), number)
}

/// A percentile, marked if it has too few samples.
fn percentile_cell(percentiles: &Percentiles, name: &str, value: Option<f64>) -> String {
    match value {
        Some(value) if percentiles.doubtful.iter().any(|d| d == name) => {
            format!("<span class=\"doubt\" title=\"too few samples\">{}?</span>", number(value))
        }
        value => value_cell(value),
    }
}

fn scenarios(report: &Report, html: &mut String) {
    let rows = report.scenarios.iter().map(|s| {
        let pacing = match s.pacing {
            LoopKind::Closed => s.in_flight.asked.map(|n| format!("{n} in flight")),
            LoopKind::Open => s.asked_rps.map(|r| format!("{} /s", number(r))),
        };
        let fresh = s.freshness_us.as_ref();
        let found = s.hits.as_ref();
        let failed = match (s.errors, s.incomplete) {
            (0, 0) => "0".to_owned(),
            (errors, incomplete) => format!("<span class=\"bad\">{errors} + {incomplete}</span>"),
        };
        let cells = vec![
            name_cell(&s.name),
            name_cell(&s.policy),
            value_cell(s.level),
            s.repeat.to_string(),
            pacing.unwrap_or_else(|| "–".to_owned()),
            s.requests.to_string(),
            failed,
            number(s.throughput_rps),
            number(s.in_flight.mean),
            percentile_cell(&s.ttft_ms, "p50", s.ttft_ms.p50),
            percentile_cell(&s.ttft_ms, "p95", s.ttft_ms.p95),
            percentile_cell(&s.ttft_ms, "p99", s.ttft_ms.p99),
            percentile_cell(&s.itl_ms, "p95", s.itl_ms.p95),
            value_cell(found.map(|h| h.hit_ratio * 100.0)),
            value_cell(found.and_then(|h| h.mean_abs_error_tokens)),
            value_cell(fresh.and_then(|f| f.p99)),
            if s.valid { "yes".to_owned() } else { "<span class=\"bad\">no</span>".to_owned() },
        ];
        (if s.valid { "" } else { "invalid" }, cells)
    });
    table(
        html,
        "scenarios",
        "Scenarios",
        &[
            "scenario",
            "policy",
            "level",
            "repeat",
            "asked",
            "requests",
            "failed + open",
            "answers/s",
            "in flight",
            "TTFT P50 ms",
            "P95",
            "P99",
            "ITL P95 ms",
            "hits %",
            "hit error, tokens",
            "freshness P99 µs",
            "valid",
        ],
        rows,
    );
}

/// Freshness as an outside client sees it, beside what the indexer says of the same events.
fn visible(report: &Report, html: &mut String) {
    let measured = report.scenarios.iter().filter_map(|s| Some((s, s.freshness_us.as_ref()?)));
    let measured: Vec<_> = measured.filter(|(_, fresh)| fresh.wait_visible.is_some()).collect();
    if measured.is_empty() {
        return;
    }
    let rows = measured.iter().map(|(s, fresh)| {
        let of = |percentiles: &Option<Percentiles>| {
            let cells = percentiles.as_ref().map(|p| {
                [("p50", p.p50), ("p95", p.p95), ("p99", p.p99)]
                    .map(|(n, v)| percentile_cell(p, n, v))
            });
            cells.unwrap_or_else(|| ["–", "–", "–"].map(str::to_owned))
        };
        let mut cells = vec![
            name_cell(&s.name),
            name_cell(&s.policy),
            value_cell(s.level),
            s.repeat.to_string(),
            fresh.n.to_string(),
            if fresh.lost == 0 {
                "0".to_owned()
            } else {
                format!("<span class=\"bad\">{}</span>", fresh.lost)
            },
            value_cell(fresh.resolution_us),
        ];
        cells.extend([fresh.p50, fresh.p95, fresh.p99].map(value_cell));
        cells.extend(of(&fresh.wait_visible));
        cells.extend(of(&fresh.difference));
        (if fresh.lost > 0 { "invalid" } else { "" }, cells)
    });
    table(
        html,
        "visible",
        "Freshness, ours and the indexer’s, µs",
        &[
            "scenario",
            "policy",
            "level",
            "repeat",
            "probes",
            "lost",
            "between polls",
            "Score P50",
            "P95",
            "P99",
            "WaitVisible P50",
            "P95",
            "P99",
            "difference P50",
            "P95",
            "P99",
        ],
        rows,
    );
}

fn storms(report: &Report, html: &mut String) {
    let storms: Vec<_> =
        report.scenarios.iter().filter_map(|s| Some((s, s.storm.as_ref()?))).collect();
    if storms.is_empty() {
        return;
    }
    let rows = storms.iter().map(|(s, storm)| {
        let lost = |n: u64| {
            if n == 0 { "0".to_owned() } else { format!("<span class=\"bad\">{n}</span>") }
        };
        let wrong = |pods: &[String]| match pods.len() {
            0 => "none".to_owned(),
            n => {
                let named = pods.iter().take(PODS).map(|pod| name_cell(pod)).collect::<Vec<_>>();
                let more = if n > PODS { format!(" and {} more", n - PODS) } else { String::new() };
                format!("<span class=\"bad\">{}{more}</span>", named.join(", "))
            }
        };
        let cells = vec![
            name_cell(&s.name),
            name_cell(&s.policy),
            name_cell(&storm.options),
            storm.publishers.to_string(),
            storm.bursts.to_string(),
            number(storm.blocks as f64),
            number(storm.blocks_per_s),
            storm.backlog_max_batches.to_string(),
            number(storm.backlog_max_ms),
            value_cell(storm.drain_ms.p50),
            value_cell(storm.drain_ms.max),
            lost(storm.lost_batches),
            storm.gaps.to_string(),
            storm.replays.to_string(),
            wrong(&storm.wrong_pods),
            value_cell(storm.indexer_ns_per_block),
        ];
        (if storm.lost_batches > 0 || !storm.wrong_pods.is_empty() { "invalid" } else { "" }, cells)
    });
    table(
        html,
        "storms",
        "Bursts of events",
        &[
            "scenario",
            "policy",
            "injected",
            "publishers",
            "bursts",
            "blocks",
            "blocks/s",
            "backlog, batches",
            "backlog, ms",
            "drain P50 ms",
            "drain max ms",
            "lost",
            "gaps",
            "replays",
            "wrong pods",
            "indexer ns/block",
        ],
        rows,
    );
}

/// Where and how it ran.
fn about(report: &Report, html: &mut String) {
    let e = &report.environment;
    let text = |t: &str| escape(&shorten(t, TEXT));
    let mut facts: Vec<(String, String)> = vec![
        ("version".to_owned(), text(&e.version)),
        ("commit".to_owned(), text(e.git_sha.as_deref().unwrap_or("–"))),
        ("kernel".to_owned(), text(&e.kernel)),
        ("CPU".to_owned(), text(&e.cpu)),
        ("cores".to_owned(), number(e.cores)),
        (
            "load average".to_owned(),
            format!("{} before, {} after", number(e.load_before), number(e.load_after)),
        ),
        ("memory".to_owned(), format!("{} MiB", e.memory_bytes >> 20)),
    ];
    facts.extend(e.cgroup.iter().take(40).map(|(name, value)| (text(name), text(value))));
    let mut gateways = BTreeMap::<&str, ()>::new();
    gateways.extend(report.scenarios.iter().map(|s| (s.gateway.as_str(), ())));
    for gateway in gateways.keys().filter(|g| !g.is_empty()).take(8) {
        facts.push(("gateway".to_owned(), text(gateway)));
    }
    html.push_str("<section id=\"environment\"><h2>Environment</h2><dl>");
    for (name, value) in facts {
        _ = write!(html, "<dt>{name}</dt><dd>{value}</dd>");
    }
    html.push_str("</dl></section><section id=\"configuration\"><h2>Configuration</h2>");
    let mut workloads: Vec<&str> = report.scenarios.iter().map(|s| s.workload.as_str()).collect();
    workloads.sort_unstable();
    workloads.dedup();
    workloads.retain(|w| !w.is_empty());
    if !workloads.is_empty() {
        html.push_str("<p>Workloads:</p><ul>");
        for workload in workloads.iter().take(20) {
            _ = write!(html, "<li><code>{}</code></li>", text(workload));
        }
        left_out(html, workloads.len(), 20, "li");
        html.push_str("</ul>");
    }
    let config = serde_json::to_string_pretty(&report.config).unwrap_or_default();
    // Line by line, since escaping folds line ends.
    let lines: Vec<String> = shorten(&config, CONFIG).lines().map(escape).collect();
    _ = write!(html, "<pre>{}</pre></section>", lines.join("\n"));
}

/// UTC, to the second, of nanoseconds since the Unix epoch.
fn date(unix_ns: u64) -> String {
    let seconds = unix_ns / 1_000_000_000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Civil date of a day number, with years that begin in March so that leap days come last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        assert_eq!(date(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_782_400_000_000_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(date(1_798_761_599_000_000_000), "2026-12-31 23:59:59 UTC");
    }

    #[test]
    fn the_command_is_taken_from_the_configuration() {
        assert_eq!(command(&serde_json::json!({"command": "c"})), Some("c"));
        assert_eq!(command(&serde_json::json!({"command": ["c"]})), None);
        assert_eq!(command(&Value::Null), None);
    }
}
