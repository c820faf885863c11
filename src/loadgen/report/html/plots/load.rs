//! Latency and throughput against the level.

use super::{
    super::{
        super::super::stats,
        super::{LoopKind, Report, Scenario},
        chart::{FOOT, Frame, Scale, number, svg},
    },
    CURVES, LEFT, Panel, RIGHT, TOP, WIDTH, figure, median, named, names, policies,
};

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

    /// Where more load is not worth it, as the tables say it, too.
    fn knee(&self, pacing: LoopKind) -> Option<f64> {
        let ladder: Vec<_> = self
            .points
            .iter()
            .filter_map(|(at, _, p95, rate)| Some((*at, *rate, (*p95)?)))
            .collect();
        stats::knee(&ladder, pacing)
    }
}

/// Latency and throughput against the level.
pub(super) fn load(report: &Report, how: &str) -> String {
    let policies = policies(report);
    let mut panels = Vec::new();
    for name in names(report) {
        let open = named(report, name).any(|s| s.asked_rps.is_some());
        let pacing = if open { LoopKind::Open } else { LoopKind::Closed };
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
        let mut knees = Vec::new();
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
            let knee = levels.knee(pacing);
            let at = knee.map_or_else(|| "none".to_owned(), number);
            knees.push(format!("{policy} {at}"));
            if let Some(knee) = knee {
                let word = format!("knee of {policy}: {}", number(knee));
                latency.upright(knee, &format!("{class} dotted"), &word);
                throughput.upright(knee, &format!("{class} dotted"), &word);
            }
        }
        for (what, frame) in [("time to the first token", latency), ("answers", throughput)] {
            panels.push(Panel {
                title: format!("{name}: {what}"),
                note: format!("knee: {}", knees.join(", ")),
                svg: svg(
                    (WIDTH, TOP + 190.0 + FOOT),
                    &format!("{name}: {what} by level"),
                    &[frame],
                ),
                ..Panel::default()
            });
        }
    }
    figure(
        "load",
        "Latency and throughput against load",
        &format!(
            "Medians of the repeats at each level. A dotted upright line is the policy’s knee: the last \
             level before P95 exceeds three times that of the lowest level, or fewer are answered than 85 % \
             of the best so far; with a fixed number in flight also before a level that brings less than a \
             quarter of a proportional gain. None: no knee within these levels. {how}"
        ),
        &policies.legend(),
        &panels,
    )
}
