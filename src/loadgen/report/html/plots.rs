//! The plots of the page: which quantities of a report are drawn, and how.
//!
//! Every plot is a `<figure>` of panels, one for each scenario (or policy), with a caption that defines what
//! is drawn. A plot without data says "not measured". The number of panels, rows and curves is bounded; what
//! is left out is said.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    super::{Comparison, Freshness, Moment, Report, Scenario},
    chart::{FOOT, Frame, Scale, escape, fit, number, shorten, svg},
};

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

/// One chart with a title.
struct Panel {
    title: String,
    svg: String,
    wide: bool,
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
        html.push_str(r#"<div class="panels">"#);
        for panel in panels.iter().take(PANELS) {
            let class = if panel.wide { "panel wide" } else { "panel" };
            let title = escape(&shorten(&panel.title, 120));
            let svg = &panel.svg;
            _ = write!(html, r#"<div class="{class}"><h3>{title}</h3><div>{svg}</div></div>"#);
        }
        html.push_str("</div>");
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

fn policies(report: &Report) -> Colours<'_> {
    Colours::of(report.scenarios.iter().map(|s| s.policy.as_str()))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
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
        cdf(report, how),
        load(report, how),
        timeline(report, how),
        resources(report, how),
        predictions(report, how),
        shares(report, how),
        comparisons(report, how),
        freshness(report, how),
    ]
    .concat()
}

/// Time to the first token: its distribution by policy.
fn cdf(report: &Report, how: &str) -> String {
    let policies = policies(report);
    let mut panels = Vec::new();
    for name in names(report) {
        // One panel cannot hold all levels: the middle one has neither an idle nor a full fleet.
        let levels: Vec<f64> = named(report, name).filter_map(|s| s.level).collect();
        let middle = median(levels);
        let curves: Vec<&Scenario> = named(report, name)
            .filter(|s| s.level == middle && s.ttft_cdf.len() > 1)
            .take(CURVES)
            .collect();
        if curves.is_empty() {
            continue;
        }
        let all = curves.iter().flat_map(|s| s.ttft_cdf.iter().map(|p| p[0]));
        let mut frame = Frame::new(
            [LEFT, TOP, WIDTH - LEFT - RIGHT, 190.0],
            Scale::log(all),
            Scale::between(0.0, 1.0),
        );
        frame.x_axis("time to the first token, ms").y_axis("share of requests");
        for scenario in &curves {
            let points: Vec<_> = scenario.ttft_cdf.iter().map(|p| (p[0], p[1])).collect();
            let title = format!(
                "{}, repeat {}: P50 {} ms, P95 {} ms, P99 {} ms",
                scenario.policy,
                scenario.repeat,
                or_dash(scenario.ttft_ms.p50),
                or_dash(scenario.ttft_ms.p95),
                or_dash(scenario.ttft_ms.p99),
            );
            frame.line(&points, &policies.class(&scenario.policy), &title);
        }
        panels.push(Panel {
            title: format!("{name}{}", level(middle)),
            svg: svg(
                (WIDTH, TOP + 190.0 + FOOT),
                &format!("Distribution of the time to the first token in {name}"),
                &[frame],
            ),
            wide: false,
        });
    }
    figure(
        "ttft-cdf",
        "Time to the first token, by policy",
        &format!(
            "Share of requests that had their first token within the time, from the <em>intended</em> \
             arrival; incomplete requests count with what they had waited. One curve for each repeat; \
             further left is better. Of several levels the middle one. {how}"
        ),
        &policies.legend(),
        &panels,
    )
}

/// One policy's repeats by level.
struct Levels<'a> {
    policy: &'a str,
    /// (level, P50, P95, throughput): medians of the repeats.
    points: Vec<(f64, Option<f64>, Option<f64>, f64)>,
}

impl<'a> Levels<'a> {
    fn of(scenarios: impl Iterator<Item = &'a Scenario> + Clone, policy: &'a str) -> Self {
        let mine = scenarios.filter(|s| s.policy == policy);
        let mut at: Vec<f64> =
            mine.clone().filter_map(|s| s.level).filter(|l| l.is_finite()).collect();
        at.sort_by(f64::total_cmp);
        at.dedup();
        let points = at.into_iter().map(|level| {
            let here = || mine.clone().filter(move |s| s.level == Some(level));
            (
                level,
                median(here().filter_map(|s| s.ttft_ms.p50).collect()),
                median(here().filter_map(|s| s.ttft_ms.p95).collect()),
                median(here().map(|s| s.throughput_rps).collect()).unwrap_or_default(),
            )
        });
        Self { policy, points: points.collect() }
    }

    /// The last level before P95 leaves three times that of the lowest level, if it leaves it.
    fn knee(&self) -> Option<f64> {
        let limit = 3.0 * self.points.first()?.2?;
        let over = self.points.iter().position(|p| p.2.is_some_and(|p95| p95 > limit))?;
        Some(self.points[over.checked_sub(1)?].0)
    }
}

/// Latency and throughput against the level.
fn load(report: &Report, how: &str) -> String {
    let policies = policies(report);
    let mut panels = Vec::new();
    for name in names(report) {
        let open = named(report, name).any(|s| s.asked_rps.is_some());
        let levels: Vec<Levels<'_>> = policies
            .0
            .iter()
            .take(CURVES)
            .map(|policy| Levels::of(named(report, name), policy))
            .filter(|levels| !levels.points.is_empty())
            .collect();
        if levels.iter().map(|l| l.points.len()).max().unwrap_or_default() < 2 {
            continue;
        }
        let points = || levels.iter().flat_map(|l| &l.points);
        let x = Scale::log(points().map(|p| p.0));
        let place = [LEFT, TOP, WIDTH - LEFT - RIGHT, 190.0];
        let y = Scale::log(points().flat_map(|p| [p.1, p.2]).flatten());
        let mut latency = Frame::new(place, x, y);
        let mut throughput = Frame::new(place, x, Scale::from_zero(points().map(|p| p.3)));
        let unit = if open { "requests per second, asked" } else { "requests in flight, asked" };
        latency.x_axis(unit).y_axis("TTFT, ms: P95 solid, P50 dashed");
        throughput.x_axis(unit).y_axis("complete answers per second");
        for levels in &levels {
            let (policy, class) = (levels.policy, policies.class(levels.policy));
            let (mut p50, mut p95, mut rate) = (Vec::new(), Vec::new(), Vec::new());
            for &(at, median, high, complete) in &levels.points {
                p50.extend(median.map(|ms| (at, ms)));
                p95.extend(high.map(|ms| (at, ms)));
                rate.push((at, complete));
            }
            latency.line(&p50, &format!("{class} dashed"), &format!("{policy}: P50"));
            latency.line(&p95, &class, &format!("{policy}: P95"));
            throughput.line(&rate, &class, policy);
            for (x, y) in p95.iter().take(CURVES) {
                let title = format!("{policy} at {}: P95 {} ms", number(*x), number(*y));
                latency.dot(*x, *y, &class, &title);
            }
            for (x, y) in rate.iter().take(CURVES) {
                let title = format!("{policy} at {}: {} per second", number(*x), number(*y));
                throughput.dot(*x, *y, &class, &title);
            }
            if let Some(knee) = levels.knee() {
                let word = format!("knee of {policy}: {}", number(knee));
                latency.upright(knee, &format!("{class} dotted"), &word);
                throughput.upright(knee, &format!("{class} dotted"), &word);
            }
        }
        for (what, frame) in [("time to the first token", latency), ("throughput", throughput)] {
            panels.push(Panel {
                title: format!("{name}: {what}"),
                svg: svg(
                    (WIDTH, TOP + 190.0 + FOOT),
                    &format!("{name}: {what} by level"),
                    &[frame],
                ),
                wide: false,
            });
        }
    }
    figure(
        "load",
        "Latency and throughput against load",
        &format!(
            "Medians of the repeats at each level. A dotted upright line is the policy's knee: the last \
             level before P95 exceeds three times that of the lowest level; no line, no knee within \
             these levels. {how}"
        ),
        &policies.legend(),
        &panels,
    )
}

/// The runs whose course is drawn: sweeps if there are any, the first repeat of each policy, at the highest
/// level.
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
    found
}

type Series<'a> = (&'a str, &'a str, Vec<(f64, f64)>);

fn series(timeline: &[Moment], of: impl Fn(&Moment) -> Option<f64>) -> Vec<(f64, f64)> {
    timeline.iter().filter_map(|m| Some((m.at_s, of(m)?))).collect()
}

/// End of a timeline, seconds.
fn end(timeline: &[Moment]) -> f64 {
    timeline.iter().map(|m| m.at_s + m.span_s).filter(|t| t.is_finite()).fold(0.0, f64::max)
}

/// Strips above each other with one time axis.
fn timeline(report: &Report, how: &str) -> String {
    let mut panels = Vec::new();
    for scenario in courses(report) {
        let course = scenario.timeline.as_slice();
        let rate = |count: fn(&Moment) -> u64| {
            series(course, |m| (m.span_s > 0.0).then(|| count(m) as f64 / m.span_s))
        };
        let strips: Vec<(&str, bool, Vec<Series<'_>>)> = vec![
            (
                "requests per second",
                false,
                vec![
                    ("arrivals", "k7", rate(|m| m.arrivals)),
                    ("completions", "k0", rate(|m| m.complete)),
                    ("failures", "bad", rate(|m| m.errors)),
                ],
            ),
            (
                "requests in flight",
                false,
                vec![("in flight", "k2", series(course, |m| Some(m.in_flight as f64)))],
            ),
            ("TTFT P95, ms", true, vec![("TTFT P95", "k1", series(course, |m| m.ttft_p95_ms))]),
            (
                "freshness, largest, µs",
                true,
                vec![("freshness", "k3", series(course, |m| m.freshness_max_us))],
            ),
            (
                "backlog, batches",
                false,
                vec![("backlog", "k4", series(course, |m| m.backlog_batches.map(|b| b as f64)))],
            ),
        ];
        let strips: Vec<_> =
            strips.into_iter().filter(|(_, _, lines)| !lines[0].2.is_empty()).collect();
        let x = Scale::between(0.0, end(course));
        let mut frames = Vec::new();
        let mut top = TOP;
        let last = strips.len().saturating_sub(1);
        for (at, (label, log, lines)) in strips.iter().enumerate() {
            let values = lines.iter().flat_map(|(_, _, points)| points.iter().map(|p| p.1));
            let y = if *log { Scale::log(values) } else { Scale::from_zero(values) };
            let mut frame = Frame::new([LEFT, top, WIDE - LEFT - RIGHT, 78.0], x, y);
            for moment in course.iter().filter(|m| m.burst || m.event_burst).take(200) {
                let (class, title) = match (moment.burst, moment.event_burst) {
                    (true, true) => ("band burst storm", "burst of requests and of events"),
                    (true, false) => ("band burst", "burst of requests"),
                    _ => ("band storm", "burst of events"),
                };
                frame.band(moment.at_s, moment.at_s + moment.span_s, class, title);
            }
            if at == last {
                frame.x_axis("seconds from the start");
            }
            frame.y_axis(label);
            for (name, class, points) in lines {
                if points.iter().any(|p| p.1 != 0.0) || *class != "bad" {
                    frame.steps(points, class, name);
                }
            }
            frames.push(frame);
            top += 78.0 + 30.0;
        }
        panels.push(Panel {
            title: format!("{}, {}{}", scenario.name, scenario.policy, level(scenario.level)),
            svg: svg(
                (WIDE, top - 30.0 + FOOT),
                &format!("Course of {} with {}", scenario.name, scenario.policy),
                &frames,
            ),
            wide: true,
        });
    }
    let key = concat!(
        r#"<ul class="legend"><li><i class="k7"></i>arrivals</li><li><i class="k0"></i>completions</li>"#,
        r#"<li><i class="bad"></i>failures</li><li><i class="burst"></i>burst of requests</li>"#,
        r#"<li><i class="storm"></i>burst of events</li></ul>"#
    );
    figure(
        "timeline",
        "What happened when",
        &format!(
            "Slices of one run of each policy, on one time axis: requests meant to be sent and answers \
             completed; most in flight; P95 of the time to the first token of requests that arrived in \
             the slice; largest freshness (from publishing an event to the first score that shows it); \
             largest backlog (batches published and not yet applied). Bands are slices in which a burst \
             began. {how}"
        ),
        key,
        &panels,
    )
}

/// CPU and memory over time, and CPU per request.
fn resources(report: &Report, how: &str) -> String {
    let courses = courses(report);
    let named_in =
        |m: &Moment| m.cores.keys().chain(m.rss_bytes.keys()).cloned().collect::<Vec<_>>();
    let over_time: Vec<String> =
        courses.iter().flat_map(|s| s.timeline.iter().flat_map(named_in)).collect();
    let totals = report.scenarios.iter().flat_map(|s| s.resources.keys());
    let components = Colours::of(over_time.iter().chain(totals).map(String::as_str));
    let mut panels = Vec::new();
    for scenario in courses.into_iter().take(PANELS / 3) {
        let course = scenario.timeline.as_slice();
        let lines = |of: &dyn Fn(&Moment, &str) -> Option<f64>| {
            let lines = components
                .0
                .iter()
                .take(CURVES)
                .map(|component| (*component, series(course, |m| of(m, component))));
            lines.filter(|(_, points)| !points.is_empty()).collect::<Vec<_>>()
        };
        let cores = lines(&|m, c| m.cores.get(c).copied());
        let memory = lines(&|m, c| m.rss_bytes.get(c).map(|b| *b as f64 / f64::from(1 << 20)));
        for (what, log, lines) in [("cores in use", false, cores), ("resident MiB", true, memory)] {
            if lines.is_empty() {
                continue;
            }
            let values = lines.iter().flat_map(|(_, points)| points.iter().map(|p| p.1));
            let y = if log { Scale::log(values) } else { Scale::from_zero(values) };
            let x = Scale::between(0.0, end(course));
            let mut frame = Frame::new([LEFT, TOP, WIDTH - LEFT - RIGHT, 150.0], x, y);
            frame.x_axis("seconds from the start").y_axis(what);
            for (component, points) in &lines {
                frame.line(points, &components.class(component), component);
            }
            panels.push(Panel {
                title: format!("{}, {}: {what}", scenario.name, scenario.policy),
                svg: svg(
                    (WIDTH, TOP + 150.0 + FOOT),
                    &format!("{what} of each component over time"),
                    &[frame],
                ),
                wide: false,
            });
        }
    }
    for name in names(report) {
        panels.extend(cost(report, name, &components));
    }
    figure(
        "resources",
        "CPU and memory, by component",
        &format!(
            "Cores in use and resident memory over the runs above; bars: CPU milliseconds per request \
             sent, median of repeats and levels, by policy and component. {how}"
        ),
        &components.legend(),
        &panels,
    )
}

/// CPU per request of each component with each policy of a scenario.
fn cost(report: &Report, name: &str, components: &Colours<'_>) -> Option<Panel> {
    let mut rows = Vec::new();
    for policy in policies(report).0 {
        for component in &components.0 {
            let costs = named(report, name)
                .filter(|s| s.policy == policy)
                .filter_map(|s| s.resources.get(*component)?.cpu_ms_per_request);
            if let Some(cost) = median(costs.collect()) {
                rows.push((policy, *component, cost));
            }
        }
    }
    rows.truncate(ROWS);
    if rows.is_empty() {
        return None;
    }
    let height = rows.len() as f64 * 15.0;
    let mut frame = Frame::new(
        [NAMES, 8.0, WIDTH - NAMES - RIGHT - 34.0, height],
        Scale::from_zero(rows.iter().map(|r| r.2)),
        Scale::between(0.0, 1.0),
    );
    frame.x_axis("CPU milliseconds per request");
    let mut before = "";
    for (at, (policy, component, cost)) in rows.iter().enumerate() {
        let y = frame.row(at, rows.len());
        let title = format!("{policy}, {component}: {} CPU-ms per request", number(*cost));
        let class = format!("bar {}", components.class(component));
        frame.bar(*cost, y, 11.0, &class, &title);
        let end = frame.at_x(*cost);
        frame.text(end + 5.0, y + 4.0, "start", "tick", &number(*cost));
        if before != *policy {
            frame.row_name(y, "name", policy);
        }
        before = policy;
    }
    Some(Panel {
        title: format!("{name}: CPU per request"),
        svg: svg((WIDTH, 8.0 + height + FOOT), &format!("CPU per request in {name}"), &[frame]),
        wide: false,
    })
}

/// Promised against found tokens.
fn predictions(report: &Report, how: &str) -> String {
    let policies = policies(report);
    let mut panels = Vec::new();
    for policy in &policies.0 {
        let mine = || report.scenarios.iter().filter(|s| s.policy == *policy);
        let dots: Vec<(f64, f64)> =
            mine().flat_map(|s| s.predictions.iter().map(|p| (p[0], p[1]))).collect();
        if dots.is_empty() {
            continue;
        }
        let scale = Scale::from_zero(dots.iter().flat_map(|(x, y)| [*x, *y]));
        let mut frame = Frame::new([LEFT, TOP, WIDTH - LEFT - RIGHT, 260.0], scale, scale);
        frame.x_axis("tokens predicted").y_axis("tokens found by the engine");
        let most = dots.iter().flat_map(|(x, y)| [*x, *y]).fold(0.0, f64::max);
        frame.line(&[(0.0, 0.0), (most, most)], "ideal", "predicted = found");
        frame.cloud(&dots, &policies.class(policy));
        let (mut n, mut error, mut exact, mut over, mut under) = (0, 0.0, 0, 0, 0);
        for hits in mine().filter_map(|s| s.hits.as_ref()) {
            if let Some(mean) = hits.mean_abs_error_tokens {
                n += hits.requests;
                error += mean * hits.requests as f64;
                (exact, over, under) = (exact + hits.exact, over + hits.over, under + hits.under);
            }
        }
        let summary = match n {
            0 => String::new(),
            n => format!(
                ": mean error {} tokens; {} of {} within one block, {} over, {} under",
                number(error / n as f64),
                number(exact as f64),
                number(n as f64),
                number(over as f64),
                number(under as f64),
            ),
        };
        panels.push(Panel {
            title: format!("{policy}{summary}"),
            svg: svg(
                (WIDTH, TOP + 260.0 + FOOT),
                &format!("Predicted against found tokens with {policy}"),
                &[frame],
            ),
            wide: false,
        });
    }
    figure(
        "predictions",
        "Predicted against actual cache hits",
        &format!(
            "Each dot is a request: prompt tokens that the router expected to find in the chosen pod's \
             cache, and those that its engine found. On the diagonal the prediction was right; below it \
             too much was promised. {how}"
        ),
        "",
        &panels,
    )
}

/// Requests by pod.
fn shares(report: &Report, how: &str) -> String {
    let policies = policies(report);
    let mut panels = Vec::new();
    for name in names(report) {
        // Sums over repeats and levels, by policy and pod.
        let mut groups: Vec<(&str, BTreeMap<&str, u64>)> = Vec::new();
        for policy in policies.0.iter().take(CURVES) {
            let mut pods = BTreeMap::new();
            for scenario in named(report, name).filter(|s| s.policy == *policy) {
                for (pod, share) in &scenario.pods {
                    *pods.entry(pod.as_str()).or_default() += share.requests;
                }
            }
            if !pods.is_empty() {
                groups.push((policy, pods));
            }
        }
        if groups.is_empty() {
            continue;
        }
        let percent = |requests: u64, pods: &BTreeMap<&str, u64>| {
            100.0 * requests as f64 / (pods.values().sum::<u64>() as f64).max(1.0)
        };
        let most = groups.iter().flat_map(|(_, pods)| pods.values().map(|n| percent(*n, pods)));
        let y = Scale::from_zero(most);
        let width = WIDTH - LEFT - RIGHT;
        let x = Scale::between(0.0, groups.len() as f64);
        let mut frame = Frame::new([LEFT, TOP, width, 150.0], x, y);
        frame.y_axis("requests, %");
        for (at, (policy, pods)) in groups.iter().enumerate() {
            let shown = pods.len().min(PODS);
            let wide = 0.84 / shown as f64;
            for (n, (pod, requests)) in pods.iter().take(PODS).enumerate() {
                let share = percent(*requests, pods);
                let title = format!("{policy}, {pod}: {requests} requests, {} %", number(share));
                let class = format!("bar {}", policies.class(policy));
                let thick = (width / groups.len() as f64 * wide - 1.0).max(0.5);
                frame.column(
                    at as f64 + 0.08 + (n as f64 + 0.5) * wide,
                    share,
                    thick,
                    &class,
                    &title,
                );
            }
            let room = width / groups.len() as f64 - 4.0;
            let middle = frame.at_x(at as f64 + 0.5);
            frame.text(middle, TOP + 166.0, "middle", "tick", &fit(policy, room));
        }
        let pods = groups.iter().map(|(_, pods)| pods.len()).max().unwrap_or(1);
        frame.across(100.0 / pods as f64, "ideal", "equal shares");
        panels.push(Panel {
            title: name.to_owned(),
            svg: svg((WIDTH, TOP + 178.0), &format!("Requests by pod in {name}"), &[frame]),
            wide: false,
        });
    }
    figure(
        "shares",
        "Requests by pod",
        &format!(
            "Share of a policy's requests that each pod served, over repeats and levels; the dashed line \
             is an equal share. {how}"
        ),
        &policies.legend(),
        &panels,
    )
}

/// Policies against each other.
fn comparisons(report: &Report, how: &str) -> String {
    /// One interval.
    struct Row {
        label: String,
        /// How many times better, with its interval.
        times: f64,
        interval: Option<[f64; 2]>,
        lost: bool,
    }
    let rows = |comparison: &Comparison| {
        let rows = comparison.quantities.iter().filter(|(_, d)| d.ratio > 0.0).map(|(name, d)| {
            let better = |ratio: f64| if d.smaller_is_better { 1.0 / ratio } else { ratio };
            Row {
                label: format!(
                    "{} : {}{} · {name}",
                    comparison.policy,
                    comparison.against,
                    level(comparison.level)
                ),
                times: better(d.ratio),
                interval: d.interval.map(|[a, b]| {
                    let (a, b) = (better(a), better(b));
                    [a.min(b), a.max(b)]
                }),
                lost: d.lost,
            }
        });
        rows.collect::<Vec<_>>()
    };
    let mut panels = Vec::new();
    for name in Colours::of(report.comparisons.iter().map(|c| c.name.as_str())).0 {
        let mut all: Vec<Row> =
            report.comparisons.iter().filter(|c| c.name == name).flat_map(rows).collect();
        let found = all.len();
        // What is left out is never a loss while a win is shown.
        all.sort_by_key(|row| !row.lost);
        all.truncate(ROWS);
        if all.is_empty() {
            continue;
        }
        let height = all.len() as f64 * 18.0;
        let ends = all.iter().flat_map(|r| {
            let [low, high] = r.interval.unwrap_or([r.times; 2]);
            [low, high, r.times, 0.9, 1.1]
        });
        let left = 330.0;
        let mut frame = Frame::new(
            [left, 8.0, WIDE - left - RIGHT - 60.0, height],
            Scale::log(ends),
            Scale::between(0.0, 1.0),
        );
        frame.x_axis("times better (log); left of 1 is worse");
        frame.upright(1.0, "ideal", "equal");
        for (at, row) in all.iter().enumerate() {
            let y = frame.row(at, all.len());
            let class = if row.lost { "bad" } else { "k0" };
            let mut title = format!("{}: {} times better", row.label, number(row.times));
            if let Some([low, high]) = row.interval {
                _ = write!(title, ", 95 % interval {} to {}", number(low), number(high));
                frame.span(low, high, y, class, &title);
            }
            let x = frame.at_x(row.times);
            frame.mark(x, y, class, &title);
            frame.row_name(y, if row.lost { "name bad" } else { "name" }, &row.label);
            let word = format!("{} ×", number(row.times));
            let value = if row.lost { "tick bad" } else { "tick" };
            frame.text(WIDE - 4.0, y + 4.0, "end", value, &word);
        }
        let lost = all.iter().filter(|r| r.lost).count();
        let left_out = match found - all.len() {
            0 => String::new(),
            n => format!(", {n} more in the JSON document"),
        };
        let lost = match lost {
            0 => "no losses".to_owned(),
            1 => "1 loss".to_owned(),
            n => format!("{n} losses"),
        };
        panels.push(Panel {
            title: format!("{name}: {lost}{left_out}"),
            svg: svg(
                (WIDE, 8.0 + height + FOOT),
                &format!("Ratios of policies in {name}"),
                &[frame],
            ),
            wide: true,
        });
    }
    figure(
        "comparisons",
        "Policies against each other",
        &format!(
            "How many times better the first policy is than the second, by quantity: the median of the \
             ratios of repeats with the same seed, turned so that more is better, with its 95 % bootstrap \
             interval. <strong class=\"bad\">Red</strong>: it lost, beyond the interval. {how}"
        ),
        "",
        &panels,
    )
}

/// Freshness by kind and condition.
fn freshness(report: &Report, how: &str) -> String {
    let mut panels = Vec::new();
    for name in names(report) {
        let all: Vec<&Freshness> =
            named(report, name).filter_map(|s| s.freshness_us.as_ref()).collect();
        let kinds = all.iter().flat_map(|f| f.kinds.keys().map(String::as_str));
        let mut kinds = Colours::of(kinds).0;
        kinds.sort_unstable();
        // (kind, probes, [p50, p95, p99, max])
        let mut rows: Vec<(String, u64, [Option<f64>; 4])> = Vec::new();
        for kind in kinds {
            let of: Vec<_> = all.iter().filter_map(|f| f.kinds.get(kind)).collect();
            let quantile = |get: fn(&super::super::Percentiles) -> Option<f64>| {
                median(of.iter().filter_map(|p| get(p)).collect())
            };
            let most = of
                .iter()
                .filter_map(|p| p.max)
                .fold(None, |a: Option<f64>, b| Some(a.map_or(b, |a| a.max(b))));
            let values = [quantile(|p| p.p50), quantile(|p| p.p95), quantile(|p| p.p99), most];
            rows.push((kind.to_owned(), of.iter().map(|p| p.n).sum(), values));
        }
        if rows.is_empty() {
            for f in all.iter().filter(|f| f.p50.is_some()).take(1) {
                rows.push(("all".to_owned(), f.n, [f.p50, f.p95, f.p99, f.max]));
            }
        }
        rows.retain(|row| row.2.iter().flatten().any(|v| *v > 0.0));
        rows.truncate(ROWS);
        if rows.is_empty() {
            continue;
        }
        let height = rows.len() as f64 * 22.0;
        let x = Scale::log(rows.iter().flat_map(|r| r.2).flatten());
        let mut frame =
            Frame::new([NAMES, 8.0, WIDTH - NAMES - RIGHT, height], x, Scale::between(0.0, 1.0));
        frame.x_axis("from publishing to visible, µs (log)");
        for (at, (kind, probes, [p50, p95, p99, most])) in rows.iter().enumerate() {
            let y = frame.row(at, rows.len());
            let title = format!(
                "{kind}: P50 {}, P95 {}, P99 {}, largest {} µs; {probes} probes",
                or_dash(*p50),
                or_dash(*p95),
                or_dash(*p99),
                or_dash(*most)
            );
            if let (Some(from), Some(to)) = (p50, most) {
                frame.span(*from, *to, y, "k3 thin", &title);
            }
            if let (Some(from), Some(to)) = (*p50, p95.or(*p99)) {
                frame.span(from, to, y, "k3 thick", &title);
            }
            for (value, class) in [(p50, "k3"), (p99, "k1"), (most, "k7")] {
                if let Some(value) = value.filter(|v| *v > 0.0) {
                    let x = frame.at_x(value);
                    frame.mark(x, y, class, &title);
                }
            }
            frame.row_name(y, "name", kind);
        }
        panels.push(Panel {
            title: name.to_owned(),
            svg: svg((WIDTH, 8.0 + height + FOOT), &format!("Freshness in {name}"), &[frame]),
            wide: false,
        });
    }
    let key = concat!(
        r#"<ul class="legend"><li><i class="k3"></i>P50 to P95</li><li><i class="k1"></i>P99</li>"#,
        r#"<li><i class="k7"></i>largest</li></ul>"#
    );
    figure(
        "freshness",
        "Freshness of the index",
        &format!(
            "Time from publishing an event to the first score that shows it, as an outside client sees \
             it: <code>store</code> and <code>remove</code>; <code>engine_step</code> from the end of an \
             engine’s step; <code>endpoint_picker</code> until the endpoint picker routes by it; each \
             under its condition. Medians of the repeats, the largest of all. {how}"
        ),
        key,
        &panels,
    )
}
