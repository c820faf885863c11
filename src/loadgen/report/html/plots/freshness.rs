//! Freshness by kind and condition.

use super::{
    super::{
        super::{Freshness, Percentiles, Report},
        chart::{FOOT, Frame, Scale, svg},
    },
    Colours, Panel, RIGHT, ROWS, WIDTH, figure, median, named, names, or_dash,
};

/// Left edge of the frame: the names are long.
const NAMES: f64 = 176.0;
/// Kinds and conditions, in the order in which they are shown.
const ORDER: [&str; 8] =
    ["store", "remove", "engine_step", "endpoint_picker", "idle", "steady", "burst", "delayed"];

fn place(word: &str) -> usize {
    ORDER.iter().position(|known| *known == word).unwrap_or(ORDER.len())
}

/// Freshness by kind and condition.
pub(super) fn freshness(report: &Report, how: &str) -> String {
    let mut panels = Vec::new();
    for name in names(report) {
        let all: Vec<&Freshness> =
            named(report, name).filter_map(|s| s.freshness_us.as_ref()).collect();
        let kinds = all.iter().flat_map(|f| f.kinds.keys().map(String::as_str));
        let mut kinds = Colours::of(kinds).0;
        kinds.sort_by_key(|kind| kind.split('.').map(place).collect::<Vec<_>>());
        // (kind, probes, [p50, p95, p99, max])
        let mut rows: Vec<(String, u64, [Option<f64>; 4])> = Vec::new();
        for kind in kinds {
            let of: Vec<_> = all.iter().filter_map(|f| f.kinds.get(kind)).collect();
            let quantile = |get: fn(&Percentiles) -> Option<f64>| {
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
        let over = |of: fn(&Percentiles) -> Option<f64>,
                    which: fn(&Freshness) -> &Option<Percentiles>| {
            or_dash(median(all.iter().filter_map(|f| of(which(f).as_ref()?)).collect()))
        };
        let mut note = if all.iter().any(|f| f.wait_visible.is_some()) {
            format!(
                "µs: WaitVisible P50 {}, P99 {}; ours − WaitVisible: P50 {}, P99 {}",
                over(|p| p.p50, |f| &f.wait_visible),
                over(|p| p.p99, |f| &f.wait_visible),
                over(|p| p.p50, |f| &f.difference),
                over(|p| p.p99, |f| &f.difference),
            )
        } else {
            String::new()
        };
        let resolution = median(all.iter().filter_map(|f| f.pick_resolution_us).collect());
        if let Some(resolution) = resolution {
            let elsewhere: u64 = all.iter().map(|f| f.routed_elsewhere).sum();
            let and = if note.is_empty() { "µs: " } else { "; " };
            note += and;
            note += &format!("between picks {}", or_dash(Some(resolution)));
            if elsewhere > 0 {
                note += &format!("; {elsewhere} times load decided");
            }
        }
        panels.push(Panel {
            title: name.to_owned(),
            note,
            svg: svg((WIDTH, 8.0 + height + FOOT), &format!("Freshness in {name}"), &[frame]),
            folded: panels.len() >= 4,
            ..Panel::default()
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
             engine’s step; <code>endpoint_picker</code> \
             from publishing until the endpoint picker routes by it; each \
             under its condition. Medians of the repeats, the largest of all. <code>WaitVisible</code> is what the \
             indexer itself says of the same events. {how}"
        ),
        key,
        &panels,
    )
}
