//! Promised against found tokens.

use super::{
    super::{
        super::Report,
        chart::{FOOT, Frame, Scale, number, svg},
    },
    LEFT, Panel, RIGHT, TOP, WIDTH, figure, policies,
};

/// Promised against found tokens.
pub(super) fn predictions(report: &Report, how: &str) -> String {
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
                "mean error {} tokens; {} of {} within one block, {} over, {} under",
                number(error / n as f64),
                number(exact as f64),
                number(n as f64),
                number(over as f64),
                number(under as f64),
            ),
        };
        panels.push(Panel {
            title: (*policy).to_owned(),
            note: summary,
            svg: svg(
                (WIDTH, TOP + 260.0 + FOOT),
                &format!("Predicted against found tokens with {policy}"),
                &[frame],
            ),
            ..Panel::default()
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
