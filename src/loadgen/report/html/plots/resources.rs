//! CPU and memory over time, and CPU per request.

use super::{
    super::{
        super::{Moment, Report},
        chart::{FOOT, Frame, Scale, number, svg},
    },
    CURVES, Colours, LEFT, NAMES, PANELS, Panel, RIGHT, ROWS, TOP, WIDTH, courses, end, figure,
    median, named, names, policies, series,
};

/// CPU and memory over time, and CPU per request.
pub(super) fn resources(report: &Report, how: &str) -> String {
    let courses = courses(report);
    let named_in =
        |m: &Moment| m.cores.keys().chain(m.rss_bytes.keys()).cloned().collect::<Vec<_>>();
    let over_time: Vec<String> =
        courses.iter().flat_map(|s| s.timeline.iter().flat_map(named_in)).collect();
    let totals = report.scenarios.iter().flat_map(|s| s.resources.keys());
    let components = Colours::of(over_time.iter().chain(totals).map(String::as_str));
    let mut panels = Vec::new();
    for (at, scenario) in courses.into_iter().take(PANELS / 4).enumerate() {
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
            let values = lines.iter().flat_map(|(_, slices)| slices.iter().map(|s| s[2]));
            let y = if log { Scale::log(values) } else { Scale::from_zero(values) };
            let x = Scale::between(0.0, end(course));
            let mut frame = Frame::new([LEFT, TOP, WIDTH - LEFT - RIGHT, 150.0], x, y);
            frame.x_axis("seconds from the start").y_axis(what);
            for (component, slices) in &lines {
                frame.steps(slices, &format!("{} thin", components.class(component)), component);
            }
            panels.push(Panel {
                title: format!("{}, {}: {what}", scenario.name, scenario.policy),
                svg: svg(
                    (WIDTH, TOP + 150.0 + FOOT),
                    &format!("{what} of each component over time"),
                    &[frame],
                ),
                folded: at > 0,
                ..Panel::default()
            });
        }
    }
    for (at, name) in names(report).into_iter().enumerate() {
        panels.extend(cost(report, name, &components, at >= 4));
    }
    figure(
        "resources",
        "CPU and memory, by component",
        &format!(
            "Cores in use and resident memory over the runs above, the largest at each place; bars: CPU milliseconds per request \
             sent, median of repeats and levels, by policy and component. {how}"
        ),
        &components.legend(),
        &panels,
    )
}

/// CPU per request of each component with each policy of a scenario.
fn cost(report: &Report, name: &str, components: &Colours<'_>, folded: bool) -> Option<Panel> {
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
        folded,
        ..Panel::default()
    })
}
