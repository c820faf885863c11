//! The plots of the page: which quantities of a report are drawn, and how.
//!
//! Every plot is a `<figure>` of panels, one for each scenario (or policy), with a caption that defines what
//! is drawn. A plot without data says "not measured". The number of panels, rows and curves is bounded; what
//! is left out is said.
//! What a first look does not need is behind a heading that opens.

mod cdf;
mod comparisons;
mod freshness;
mod load;
mod predictions;
mod resources;
mod shares;
mod timeline;

use std::fmt::Write as _;

use super::{
    super::{Moment, Report, Scenario},
    chart::{escape, number, shorten},
};
use crate::loadgen::stats;

/// Panels of one plot.
const PANELS: usize = 12;
/// Curves of one panel.
const CURVES: usize = 40;
/// Rows of one panel.
const ROWS: usize = 40;
/// Pods of one policy in a panel.
const PODS: usize = 64;
/// Width of a panel in the units of its view box; the text is laid out for it.
const WIDTH: f64 = 480.0;
/// Width of a panel over the whole page.
const WIDE: f64 = 760.0;
/// Left edge of a frame with numbers at its side.
const LEFT: f64 = 50.0;
/// Room right of a frame, for half of its last number.
const RIGHT: f64 = 18.0;
/// Top of a frame, below its y axis' label.
const TOP: f64 = 24.0;
/// Left edge of a frame with names at its side.
const NAMES: f64 = 150.0;

/// Policies in the order in which they are shown; others follow.
const KNOWN: [&str; 6] =
    ["precise", "approximate", "least-load", "round-robin", "random", "constant"];

/// One chart with a title.
#[derive(Default)]
struct Panel {
    title: String,
    /// What the title has no room for.
    note: String,
    svg: String,
    wide: bool,
    /// Is it behind a heading that opens?
    folded: bool,
}

impl Panel {
    fn html(&self) -> String {
        let class = if self.wide { "panel wide" } else { "panel" };
        let title = escape(&shorten(&self.title, 120));
        let note = match self.note.as_str() {
            "" => String::new(),
            note => format!(r#"<p class="note">{}</p>"#, escape(&shorten(note, 400))),
        };
        format!(r#"<div class="{class}"><h3>{title}</h3>{note}<div>{}</div></div>"#, self.svg)
    }
}

/// Names with a colour each, in order of appearance.
struct Colours<'a>(Vec<&'a str>);

impl<'a> Colours<'a> {
    fn of(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut seen = Vec::new();
        for name in names {
            if !seen.contains(&name) {
                seen.push(name);
            }
        }
        Self(seen)
    }

    /// The class of a name.
    fn class(&self, name: &str) -> String {
        let at = self.0.iter().position(|n| *n == name).unwrap_or_default();
        format!("k{}", at % 8)
    }

    fn legend(&self) -> String {
        if self.0.len() < 2 {
            return String::new();
        }
        let mut html = String::from(r#"<ul class="legend">"#);
        for name in self.0.iter().take(CURVES) {
            let (class, text) = (self.class(name), escape(&shorten(name, 48)));
            _ = write!(
                html,
                r#"<li><button type="button" data-toggle="{class}" aria-pressed="true"><i class="{class}"></i>{text}</button></li>"#
            );
        }
        html.push_str("</ul>");
        html
    }
}

fn figure(id: &str, heading: &str, caption: &str, legend: &str, panels: &[Panel]) -> String {
    let mut html = format!(
        r#"<figure id="{id}" data-plot="{id}"{}><h2>{heading}</h2>"#,
        if panels.is_empty() { r#" data-empty="true""# } else { "" },
    );
    if panels.is_empty() {
        html.push_str(r#"<p class="none">not measured</p>"#);
    } else {
        html.push_str(legend);
        let shown = &panels[..panels.len().min(PANELS)];
        let some = |folded| shown.iter().filter(move |panel| panel.folded == folded);
        let grid = |panels: String| format!(r#"<div class="panels">{panels}</div>"#);
        html.push_str(&grid(some(false).map(Panel::html).collect()));
        let more = some(true).count();
        if more > 0 {
            let of: Vec<_> = some(true).map(|p| escape(&shorten(&p.title, 60))).collect();
            let of = of.join(" · ");
            let inside = grid(some(true).map(Panel::html).collect());
            _ = write!(
                html,
                "<details class=\"more\"><summary>{more} more <span>{of}</span></summary>{inside}</details>"
            );
        }
        if panels.len() > PANELS {
            let more = panels.len() - PANELS;
            _ = write!(html, r#"<p class="none">{more} more are in the JSON document</p>"#);
        }
    }
    _ = write!(html, "<figcaption>{caption}</figcaption></figure>");
    html
}

/// The names of scenarios, in order of appearance.
fn names(report: &Report) -> Vec<&str> {
    Colours::of(report.scenarios.iter().map(|s| s.name.as_str())).0
}

fn named<'a>(report: &'a Report, name: &'a str) -> impl Iterator<Item = &'a Scenario> + Clone {
    report.scenarios.iter().filter(move |s| s.name == name)
}

/// The policies, in an order that does not depend on which ran first.
fn policies(report: &Report) -> Colours<'_> {
    let mut policies = Colours::of(report.scenarios.iter().map(|s| s.policy.as_str()));
    policies.0.sort_by_key(|policy| rank(policy));
    policies
}

fn rank(policy: &str) -> usize {
    KNOWN.iter().position(|known| *known == policy).unwrap_or(KNOWN.len())
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|v| v.is_finite());
    stats::median(&values)
}

fn level(level: Option<f64>) -> String {
    level.map(|l| format!(", level {}", number(l))).unwrap_or_default()
}

fn or_dash(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), number)
}

/// All plots, in the page's order; `how` is the sentence that says how to run it again, as HTML.
pub(super) fn all(report: &Report, how: &str) -> String {
    [
        cdf::cdf(report, how),
        load::load(report, how),
        comparisons::comparisons(report, how),
        timeline::timeline(report, how),
        freshness::freshness(report, how),
        resources::resources(report, how),
        predictions::predictions(report, how),
        shares::shares(report, how),
    ]
    .concat()
}

/// The runs whose course is drawn: sweeps if there are any, the first repeat of each policy, at the highest
/// level; the precise policy's first.
fn courses(report: &Report) -> Vec<&Scenario> {
    let with = || report.scenarios.iter().filter(|s| s.timeline.len() > 1);
    let name = match with().find(|s| s.name == "sweep").or_else(|| with().next()) {
        Some(scenario) => scenario.name.as_str(),
        None => return Vec::new(),
    };
    let mut found: Vec<&Scenario> = Vec::new();
    for scenario in with().filter(|s| s.name == name) {
        match found.iter_mut().find(|f| f.policy == scenario.policy) {
            Some(first) if scenario.level > first.level => *first = scenario,
            Some(_) => {}
            None => found.push(scenario),
        }
    }
    found.sort_by_key(|scenario| rank(&scenario.policy));
    found
}

/// A quantity's course: (begin, end, value) of each slice of time that has it.
fn series(timeline: &[Moment], of: impl Fn(&Moment) -> Option<f64>) -> Vec<[f64; 3]> {
    timeline.iter().filter_map(|m| Some([m.at_s, m.at_s + m.span_s, of(m)?])).collect()
}

/// End of a timeline, seconds.
fn end(timeline: &[Moment]) -> f64 {
    timeline.iter().map(|m| m.at_s + m.span_s).filter(|t| t.is_finite()).fold(0.0, f64::max)
}
