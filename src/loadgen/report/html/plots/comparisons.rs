//! Policies against each other.

use std::fmt::Write as _;

use super::{
    super::{
        super::{Comparison, Report},
        chart::{FOOT, Frame, Scale, number, svg},
    },
    Colours, PANELS, Panel, RIGHT, ROWS, WIDTH, figure, level,
};

/// Quantities that are shown whether lost or won, and what they are called.
const SHOWN: [(&str, &str); 4] = [
    ("throughput_rps", "answers/s"),
    ("ttft_ms.p95", "TTFT P95"),
    ("goodput.share", "goodput"),
    ("hits.hit_ratio", "hits"),
];
/// Left edge of the frame.
const NAMES: f64 = 190.0;

/// One ratio.
struct Row {
    label: String,
    /// How many times better, with its interval.
    times: f64,
    interval: Option<[f64; 2]>,
    lost: bool,
    shown: bool,
}

fn rows(comparison: &Comparison) -> impl Iterator<Item = Row> + '_ {
    comparison.quantities.iter().filter(|(_, d)| d.ratio > 0.0).map(|(name, d)| {
        let better = |ratio: f64| if d.smaller_is_better { 1.0 / ratio } else { ratio };
        let known = SHOWN.iter().find(|(known, _)| known == name);
        Row {
            label: format!("{} · {}", comparison.against, known.map_or(name.as_str(), |k| k.1)),
            times: better(d.ratio),
            interval: d.interval.map(|[a, b]| {
                let (a, b) = (better(a), better(b));
                [a.min(b), a.max(b)]
            }),
            lost: d.lost,
            shown: d.lost || known.is_some(),
        }
    })
}

/// Policies against each other.
pub(super) fn comparisons(report: &Report, how: &str) -> String {
    let titles: Vec<String> = report
        .comparisons
        .iter()
        .map(|c| format!("{}{}: {} against others", c.name, level(c.level), c.policy))
        .collect();
    let mut groups = Vec::new();
    for title in Colours::of(titles.iter().map(String::as_str)).0 {
        let mine = titles.iter().zip(&report.comparisons).filter(|(of, _)| *of == title);
        let all: Vec<Row> = mine.flat_map(|(_, comparison)| rows(comparison)).collect();
        if !all.is_empty() {
            groups.push((title, all));
        }
    }
    // What is left out is never a loss while a win is shown.
    if groups.len() > PANELS {
        groups.sort_by_key(|(_, rows)| !rows.iter().any(|row| row.lost));
    }
    let panels: Vec<Panel> = groups.into_iter().map(|(title, rows)| panel(title, rows)).collect();
    figure(
        "comparisons",
        "Policies against each other",
        &format!(
            "How many times better the policy is than each other one: the median of the ratios of \
             repeats with the same seed, turned so that more is better, with its 95 % bootstrap interval; \
             a hollow dot has none, for want of repeats. Quantities that are not named here are shown \
             where they lost. <strong class=\"bad\">Red</strong>: it lost. {how}"
        ),
        "",
        &panels,
    )
}

fn panel(title: &str, mut rows: Vec<Row>) -> Panel {
    let found = rows.len();
    rows.retain(|row| row.shown);
    rows.sort_by_key(|row| !row.lost);
    rows.truncate(ROWS);
    let lost = match rows.iter().filter(|row| row.lost).count() {
        0 => "no losses".to_owned(),
        1 => "1 loss".to_owned(),
        n => format!("{n} losses"),
    };
    let note = match found - rows.len() {
        0 => lost,
        n => format!("{lost}; {n} more in the JSON document"),
    };
    let height = rows.len().max(1) as f64 * 17.0;
    let ends = rows.iter().flat_map(|row| {
        let [low, high] = row.interval.unwrap_or([row.times; 2]);
        [low, high, row.times, 0.9, 1.1]
    });
    let mut frame = Frame::new(
        [NAMES, 8.0, WIDTH - NAMES - RIGHT - 44.0, height],
        Scale::log(ends),
        Scale::between(0.0, 1.0),
    );
    frame.x_axis("times better (log); left of 1 is worse");
    frame.upright(1.0, "ideal", "equal");
    for (at, row) in rows.iter().enumerate() {
        let y = frame.row(at, rows.len());
        let class = if row.lost { "bad" } else { "k0" };
        let mut says = format!("{}: {} times better", row.label, number(row.times));
        if let Some([low, high]) = row.interval {
            _ = write!(says, ", 95 % interval {} to {}", number(low), number(high));
            frame.span(low, high, y, class, &says);
        }
        let x = frame.at_x(row.times);
        let kind = if row.interval.is_some() { "" } else { " hollow" };
        frame.mark(x, y, &format!("{class}{kind}"), &says);
        frame.row_name(y, if row.lost { "name bad" } else { "name" }, &row.label);
        let word = format!("{} ×", number(row.times));
        frame.text(WIDTH - 4.0, y + 4.0, "end", if row.lost { "tick bad" } else { "tick" }, &word);
    }
    Panel {
        title: title.to_owned(),
        note,
        svg: svg((WIDTH, 8.0 + height + FOOT), &format!("Ratios: {title}"), &[frame]),
        ..Panel::default()
    }
}
