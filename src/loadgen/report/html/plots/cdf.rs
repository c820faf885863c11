//! Time to the first token: its distribution by policy.

use super::{
    super::{
        super::{Report, Scenario},
        chart::{FOOT, Frame, Scale, svg},
    },
    CURVES, LEFT, Panel, RIGHT, TOP, WIDTH, figure, level, median, named, names, or_dash, policies,
};

/// Time to the first token: its distribution by policy.
pub(super) fn cdf(report: &Report, how: &str) -> String {
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
            let foot = (scenario.ttft_cdf[0][0], 0.0);
            let points = scenario.ttft_cdf.iter().map(|p| (p[0], p[1]));
            let points: Vec<_> = std::iter::once(foot).chain(points).collect();
            let title = format!(
                "{}, repeat {}: P50 {} ms, P95 {} ms, P99 {} ms",
                scenario.policy,
                scenario.repeat,
                or_dash(scenario.ttft_ms.p50),
                or_dash(scenario.ttft_ms.p95),
                or_dash(scenario.ttft_ms.p99),
            );
            let class = format!("{} thin", policies.class(&scenario.policy));
            frame.line(&points, &class, &title);
        }
        panels.push(Panel {
            title: format!("{name}{}", level(middle)),
            svg: svg(
                (WIDTH, TOP + 190.0 + FOOT),
                &format!("Distribution of the time to the first token in {name}"),
                &[frame],
            ),
            folded: panels.len() >= 4,
            ..Panel::default()
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
