//! Requests by pod.

use std::collections::BTreeMap;

use super::{
    super::{
        super::Report,
        chart::{Frame, Scale, fit, number, svg},
    },
    CURVES, LEFT, PODS, Panel, RIGHT, TOP, WIDTH, figure, named, names, policies,
};

/// Requests by pod.
pub(super) fn shares(report: &Report, how: &str) -> String {
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
            folded: panels.len() >= 4,
            ..Panel::default()
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
