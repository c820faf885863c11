//! Strips above each other with one time axis: what happened when.

use super::{
    super::{
        super::{Moment, Report},
        chart::{FOOT, Frame, Scale, number, svg},
    },
    LEFT, Panel, RIGHT, TOP, WIDE, courses, end, figure, level, series,
};

/// Height of a strip.
const HEIGHT: f64 = 78.0;
/// Arrivals of a burst that are this many times as many as the rest are cut off, or nothing else is seen.
const DWARFS: f64 = 2.5;
/// Bursts of one strip that are drawn.
const BURSTS: usize = 200;

/// (name, class, slices).
type Series<'a> = (&'a str, &'a str, Vec<[f64; 3]>);

/// Strips above each other with one time axis.
pub(super) fn timeline(report: &Report, how: &str) -> String {
    let mut panels = Vec::new();
    for (nth, scenario) in courses(report).into_iter().enumerate() {
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
        let others = course.iter().filter(|m| m.span_s > 0.0).flat_map(|m| {
            let arrivals = if m.burst { 0 } else { m.arrivals };
            [arrivals, m.complete, m.errors].map(|n| n as f64 / m.span_s)
        });
        let others = others.fold(0.0, f64::max);
        let mut frames = Vec::new();
        let mut top = TOP;
        let last = strips.len().saturating_sub(1);
        for (at, (label, log, lines)) in strips.iter().enumerate() {
            let values = lines.iter().flat_map(|(_, _, slices)| slices.iter().map(|s| s[2]));
            let largest = values.clone().filter(|v| v.is_finite()).fold(0.0, f64::max);
            let cut = at == 0 && others > 0.0 && largest > DWARFS * others;
            let y = match (*log, cut) {
                (true, _) => Scale::log(values),
                (_, true) => Scale::from_zero([1.4 * others]),
                _ => Scale::from_zero(values),
            };
            let mut frame = Frame::new([LEFT, top, WIDE - LEFT - RIGHT, HEIGHT], x, y);
            for moment in course.iter().filter(|m| m.burst || m.event_burst).take(BURSTS) {
                let span = (moment.at_s, moment.at_s + moment.span_s);
                // Of two at once, one above the other.
                let middle = if moment.burst && moment.event_burst { 0.5 } else { 1.0 };
                if moment.burst {
                    frame.band(span, (0.0, middle), "band burst", "burst of requests");
                }
                if moment.event_burst {
                    frame.band(span, (1.0 - middle, 1.0), "band storm", "burst of events");
                }
            }
            if at == last {
                frame.x_axis("seconds from the start");
            }
            frame.y_axis(label);
            for (name, class, slices) in lines {
                if slices.iter().any(|s| s[2] != 0.0) || *class != "bad" {
                    frame.steps(slices, class, name);
                }
            }
            if cut {
                peaks(&mut frame, course, top + 11.0);
            }
            frames.push(frame);
            top += HEIGHT + 30.0;
        }
        panels.push(Panel {
            title: format!("{}, {}{}", scenario.name, scenario.policy, level(scenario.level)),
            svg: svg(
                (WIDE, top - 30.0 + FOOT),
                &format!("Course of {} with {}", scenario.name, scenario.policy),
                &frames,
            ),
            wide: true,
            folded: nth > 0,
            ..Panel::default()
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
             began; where its arrivals would dwarf the rest, they are cut off and their number stands \
             beside. Of slices closer than a pixel the largest. {how}"
        ),
        key,
        &panels,
    )
}

/// How many arrived in each burst, beside it, where there is room.
fn peaks(frame: &mut Frame, course: &[Moment], y: f64) {
    let mut free_from = f64::NEG_INFINITY;
    for moment in course.iter().filter(|m| m.burst).take(BURSTS) {
        let word = format!("{} at once", number(moment.arrivals as f64));
        let x = frame.at_x(moment.at_s + moment.span_s) + 5.0;
        let end = x + 6.3 * word.chars().count() as f64;
        if x > free_from && end < WIDE - RIGHT {
            frame.text(x, y, "start", "label clear", &word);
            free_from = end + 4.0;
        }
    }
}
