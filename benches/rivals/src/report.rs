//! Figures, targets, the table and the JSON list.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    /// A rate; otherwise less is better.
    pub(crate) rate: bool,
}

const fn time(name: &'static str) -> Metric {
    Metric { name, unit: "ns", rate: false }
}

const fn less(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, rate: false }
}

const fn rate(name: &'static str, unit: &'static str) -> Metric {
    Metric { name, unit, rate: true }
}

pub(crate) const FLOOR: Metric = time("floor");
pub(crate) const P50: Metric = time("lookup p50");
pub(crate) const P99: Metric = time("lookup p99");
pub(crate) const COLD: Metric = time("lookup cold p50");
pub(crate) const COLD_P90: Metric = time("lookup cold p90");
pub(crate) const TIER: Metric = less("lookup p50, second tier / plain", "x");
pub(crate) const WHOLE: Metric = time("tokens to answer p50");
pub(crate) const WHOLE_FLOOR: Metric = less("tokens to answer / (floor + lookup)", "x");
pub(crate) const INGEST: Metric = rate("ingest, hashed before", "Mblocks/s");
pub(crate) const INGEST_TOKENS: Metric = rate("ingest, tokens to indexed", "Mblocks/s");
pub(crate) const BESIDE_P50: Metric = time("reader beside a writer, p50");
pub(crate) const BESIDE_P99: Metric = time("reader beside a writer, p99");
pub(crate) const BESIDE_READS: Metric = rate("reader beside a writer, reads", "M/s");
pub(crate) const BESIDE_WRITES: Metric = rate("reader beside a writer, writes", "Mblocks/s");
pub(crate) const MEMORY: Metric = less("memory at the worst point", "B/entry");
pub(crate) const MEMORY_RSS: Metric = less("memory at the end, resident", "B/entry");
pub(crate) const MEMORY_MORE: Metric = less("memory added", "B/entry");
pub(crate) const CHURN_HEAP: Metric = less("churn, heap after 20 passes / 1", "x");
pub(crate) const CHURN_RSS: Metric = less("churn, resident after 20 passes / 1", "x");
pub(crate) const CLEAR: Metric = less("clear until invisible", "ms");
pub(crate) const CLEAR_HEAP: Metric = less("clear until memory is back", "ms");

/// What a figure has to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound {
    /// At most this.
    Most(f64),
    /// At most this many times the best rival.
    Share(f64),
    /// At least this many times the best rival.
    Times(f64),
}

/// The targets: metric, shapes (words; each a list of alternatives, `*` is any), bound.
pub(crate) const TARGETS: &[(Metric, &str, Bound)] = &[
    (P50, "512x8|512x64|512x256 full|half", Bound::Share(0.5)),
    (P99, "512x8|512x64|512x256 full|half", Bound::Share(0.5)),
    (P50, "512x8|512x64|512x256|512x16 frag|stag|mix73", Bound::Share(0.67)),
    (P99, "512x8|512x64|512x256|512x16 frag|stag|mix73", Bound::Share(0.67)),
    (P50, "128x8|128x64|128x256 full|half", Bound::Share(0.5)),
    (P50, "4096x8|4096x64|4096x256 full|half", Bound::Share(0.5)),
    (P50, "* miss", Bound::Most(60.0)),
    (TIER, "*", Bound::Most(1.5)),
    (WHOLE, "512x64 full", Bound::Share(0.67)),
    (WHOLE_FLOOR, "512x64 full", Bound::Most(1.3)),
    (INGEST, "*", Bound::Times(1.3)),
    (INGEST_TOKENS, "*", Bound::Times(1.3)),
    (BESIDE_P99, "*", Bound::Share(0.67)),
    (BESIDE_READS, "*", Bound::Times(1.2)),
    (BESIDE_WRITES, "*", Bound::Times(1.2)),
    (MEMORY, "unique", Bound::Most(32.0)),
    (MEMORY, "x16,equal-keys", Bound::Most(16.0)),
    (MEMORY, "x16,own-keys", Bound::Most(24.0)),
    (MEMORY_MORE, "*", Bound::Most(8.0)),
    (CHURN_HEAP, "*", Bound::Most(1.05)),
    (CHURN_RSS, "*", Bound::Most(1.05)),
    (CLEAR, "*", Bound::Most(1.0)),
    (CLEAR_HEAP, "*", Bound::Most(1000.0)),
];

fn matches(pattern: &str, shape: &str) -> bool {
    let mut words = shape.split(' ');
    pattern == "*"
        || pattern.split(' ').all(|any| {
            let word = words.next().unwrap_or_default();
            any.split('|').any(|one| one == "*" || one == word)
        })
}

impl Bound {
    fn of(metric: Metric, shape: &str) -> Option<Self> {
        let mut all =
            TARGETS.iter().filter(|(its, shapes, _)| *its == metric && matches(shapes, shape));
        all.next().map(|(.., bound)| *bound)
    }

    fn met(self, ours: f64, best: Option<f64>) -> Option<bool> {
        match (self, best) {
            (Self::Most(most), _) => Some(ours <= most),
            (Self::Share(share), Some(best)) => Some(ours <= share * best),
            (Self::Times(times), Some(best)) => Some(ours >= times * best),
            _ => None,
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Most(most) => write!(f, "<= {most}"),
            Self::Share(share) => write!(f, "<= {share} x best rival"),
            Self::Times(times) => write!(f, ">= {times} x best rival"),
        }
    }
}

/// One line.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) metric: Metric,
    pub(crate) shape: String,
    pub(crate) ours: f64,
    pub(crate) rivals: Vec<(&'static str, f64)>,
    pub(crate) note: String,
}

impl Row {
    fn best(&self) -> Option<f64> {
        let all = self.rivals.iter().map(|(_, value)| *value).filter(|value| !value.is_nan());
        all.reduce(if self.metric.rate { f64::max } else { f64::min })
    }

    fn met(&self) -> Option<bool> {
        Bound::of(self.metric, &self.shape)?.met(self.ours, self.best())
    }
}

/// Three significant digits.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    if value.is_nan() { "-".to_owned() } else { format!("{value:.digits$}") }
}

/// Names of all rivals, in the order of their columns.
pub(crate) const RIVALS: [&str; 3] = ["kv-index raw", "kv-index map", "dynamo CRTC"];

/// The figures so far, and which are wanted at all.
#[derive(Debug)]
pub(crate) struct Report {
    only: String,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(only: Option<String>) -> Self {
        Self { only: only.unwrap_or_default(), rows: Vec::new() }
    }

    pub(crate) fn wants(&self, metric: Metric, shape: &str) -> bool {
        format!("{} {shape}", metric.name).contains(&self.only)
    }

    /// Takes a figure, by contender, our own under its name.
    pub(crate) fn add(
        &mut self,
        metric: Metric,
        shape: &str,
        figures: &[(&'static str, f64)],
        note: &str,
    ) {
        if !self.wants(metric, shape) {
            return;
        }
        let (ours, rivals): (Vec<_>, Vec<_>) =
            figures.iter().copied().partition(|(name, _)| *name == "ours");
        let ours = ours.first().map_or(f64::NAN, |(_, value)| *value);
        let (shape, note) = (shape.to_owned(), note.to_owned());
        self.rows.push(Row { metric, shape, ours, rivals, note });
    }

    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let mut metrics: Vec<Metric> = Vec::new();
        for row in &self.rows {
            if !metrics.contains(&row.metric) {
                metrics.push(row.metric);
            }
        }
        for metric in metrics {
            let _ =
                write!(out, "\n{:<48}{:>10}", format!("{} [{}]", metric.name, metric.unit), "ours");
            for name in RIVALS {
                let _ = write!(out, "{name:>14}");
            }
            let _ = writeln!(out, "{:>8}  target", "ratio");
            for row in self.rows.iter().filter(|row| row.metric == metric) {
                let _ = write!(out, "  {:<46}{:>10}", row.shape, figure(row.ours));
                for name in RIVALS {
                    let value = row.rivals.iter().find(|(its, _)| *its == name);
                    let _ =
                        write!(out, "{:>14}", figure(value.map_or(f64::NAN, |(_, value)| *value)));
                }
                let ratio = row.best().map_or(f64::NAN, |best| row.ours / best);
                let _ = write!(out, "{:>8}", figure(ratio));
                if let Some(bound) = Bound::of(row.metric, &row.shape) {
                    let met = match row.met() {
                        Some(true) => "met",
                        Some(false) => "MISSED",
                        None => "no rival",
                    };
                    let _ = write!(out, "  {met}: {bound}");
                }
                for (name, value) in row.rivals.iter().filter(|(name, _)| !RIVALS.contains(name)) {
                    let _ = write!(out, "  {name}: {}", figure(*value));
                }
                let gap = if row.note.is_empty() { "" } else { "  " };
                let _ = writeln!(out, "{gap}{}", row.note);
            }
        }
        let met: Vec<bool> = self.rows.iter().filter_map(Row::met).collect();
        let kept = met.iter().filter(|met| **met).count();
        let _ = writeln!(out, "\n{kept} of {} targets met", met.len());
        out
    }

    pub(crate) fn json(&self) -> Value {
        let number = |value: f64| if value.is_finite() { json!(value) } else { Value::Null };
        let row = |row: &Row| {
            let rivals: Map<_, _> = row
                .rivals
                .iter()
                .map(|(name, value)| ((*name).to_owned(), number(*value)))
                .collect();
            json!({
                "shape": row.shape,
                "metric": row.metric.name,
                "unit": row.metric.unit,
                "ours": number(row.ours),
                "rivals": rivals,
                "ratio": number(row.best().map_or(f64::NAN, |best| row.ours / best)),
                "target": Bound::of(row.metric, &row.shape).map(|bound| bound.to_string()),
                "met": row.met(),
                "note": row.note,
            })
        };
        self.rows.iter().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(matches("*", "512x8 full"));
        assert!(matches("* miss", "128x1024 miss"));
        assert!(matches("512x8|512x64 full|half", "512x64 half"));
        assert!(!matches("512x8|512x64 full|half", "512x64 miss"));
        assert!(!matches("512x8 full", "512x80 full"));
    }

    #[test]
    fn bounds() {
        let row = |metric, shape: &str, ours, rivals: &[f64]| Row {
            metric,
            shape: shape.to_owned(),
            ours,
            rivals: rivals.iter().map(|value| ("kv-index raw", *value)).collect(),
            note: String::new(),
        };
        assert_eq!(row(P50, "512x8 full", 50.0, &[120.0, 100.0]).met(), Some(true));
        assert_eq!(row(P50, "512x8 full", 51.0, &[120.0, 100.0]).met(), Some(false));
        assert_eq!(row(P50, "512x8 miss", 60.0, &[1.0]).met(), Some(true));
        assert_eq!(row(P50, "512x1024 full", 60.0, &[1.0]).met(), None);
        assert_eq!(row(INGEST, "tails, 1 thread", 13.0, &[10.0, 9.0]).met(), Some(true));
        assert_eq!(row(INGEST, "tails, 1 thread", 12.9, &[10.0, f64::NAN]).met(), Some(false));
        assert_eq!(row(INGEST, "tails, 1 thread", 12.9, &[]).met(), None);
    }
}
