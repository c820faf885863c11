//! Charts as SVG: axes with round ticks, lines, steps, bars, dots, bands. Pure.
//!
//! # Model
//!
//! A [`Frame`] is one rectangle with two [`Scale`]s; a chart is one or more frames in one SVG. Colours are
//! classes (`k0`…`k7`), so that the page's style decides them for light, dark and paper. Every text that
//! comes from outside passes [`escape`]; every coordinate is clamped into its frame.

use std::fmt::Write as _;

/// Points of a line that are kept. A chart is about 400 pixels wide, so that nothing visible is lost.
const LINE_POINTS: usize = 240;
/// A gap of a course that is bridged, in the units of the view box; three slices always are.
const HOLD: f64 = 12.0;
/// Width of the narrowest band.
const BAND: f64 = 4.0;
/// Dots of a scatter that are kept.
const DOTS: usize = 2_000;
/// Height of an axis' numbers and its label below a frame.
pub(super) const FOOT: f64 = 38.0;
/// Width of a character of the charts' text, rather too wide.
const CHARACTER: f64 = 6.3;

/// Text for HTML and for attributes in double quotes; characters that XML forbids are dropped.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\t' | '\n' => safe.push(' '),
            // Direction overrides would let a name rearrange what stands beside it.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
            c if c.is_control() => {}
            c => safe.push(c),
        }
    }
    safe
}

/// At most `most` characters, with an ellipsis where something is missing.
pub(super) fn shorten(text: &str, most: usize) -> String {
    match text.char_indices().nth(most.saturating_sub(1)) {
        Some((at, c)) if at + c.len_utf8() < text.len() => format!("{}…", &text[..at]),
        _ => text.to_owned(),
    }
}

/// As much of the text as has room in a width, in the units of the view box.
pub(super) fn fit(text: &str, width: f64) -> String {
    let wide = |c: char| match c {
        c if !c.is_ascii() => 12.0,
        'W' | 'M' | 'm' | 'w' | '@' | '%' => 10.5,
        c if c.is_ascii_uppercase() => 8.5,
        _ => CHARACTER,
    };
    let mut used = 0.0;
    let fits = text.chars().take_while(|c| {
        used += wide(*c);
        used <= width
    });
    shorten(text, fits.count().max(1))
}

/// A number with three significant digits, thousands as `k`, `M`, `G`.
pub(super) fn number(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    if value.abs() >= 999.5e9 || (value != 0.0 && value.abs() < 5e-5) {
        return format!("{value:.0e}");
    }
    let (scaled, unit) = match value.abs() {
        v if v >= 999.5e6 => (value / 1e9, "G"),
        v if v >= 999.5e3 => (value / 1e6, "M"),
        v if v >= 9_999.5 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        v if v >= 99.95 || v == 0.0 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        v if v >= 0.09995 => 3,
        _ => 4,
    };
    let mut text = format!("{scaled:.digits$}");
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    if text == "-0" {
        text.remove(0);
    }
    if unit.is_empty() { text } else { format!("{text}\u{a0}{unit}") }
}

/// From a quantity to a place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    /// From 0 to a round number that holds all values.
    pub(super) fn from_zero(values: impl IntoIterator<Item = f64>) -> Self {
        let high = values.into_iter().filter(|v| v.is_finite()).fold(0.0, f64::max);
        let high = if high > 0.0 { high } else { 1.0 };
        let step = step(high);
        Self { low: 0.0, high: (high / step - 1e-9).ceil() * step, log: false }
    }

    /// From `low` to `high`.
    pub(super) fn between(low: f64, high: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        Self { low, high, log: false }
    }

    /// Logarithmic, holding all positive values.
    pub(super) fn log(values: impl IntoIterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0_f64);
        for value in values.into_iter().filter(|v| v.is_finite() && *v > 0.0) {
            low = low.min(value);
            high = high.max(value);
        }
        if high <= 0.0 {
            (low, high) = (1.0, 10.0);
        }
        // Twelve decades are more than any measured quantity spans.
        low = low.max(high * 1e-12);
        let (low, high) = (round_log(low, false), round_log(high, true));
        Self { low, high: if high > low { high } else { low * 10.0 }, log: true }
    }

    /// 0 at the low end, 1 at the high end; what lies outside is put at the end.
    fn part(&self, value: f64) -> f64 {
        let part = if self.log {
            let value = value.max(f64::MIN_POSITIVE);
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 }
    }

    /// Can the value be shown?
    fn shows(&self, value: f64) -> bool {
        value.is_finite() && (!self.log || value > 0.0)
    }

    /// Round numbers within the scale: as many as there are, but no more than `most` (at least two).
    fn ticks(&self, most: usize) -> Vec<f64> {
        let most = most.max(2);
        if !self.log {
            let span = self.high - self.low;
            let power = 10_f64.powf((span / most as f64).max(f64::MIN_POSITIVE).log10().floor());
            let with = |factor: f64| {
                let step = factor * power;
                let first = (self.low / step - 1e-9).ceil();
                let ticks = (0..=most).map(move |n| (first + n as f64) * step);
                ticks.filter(|t| *t <= self.high + step * 1e-6).collect::<Vec<_>>()
            };
            let fitting =
                [1.0, 2.0, 5.0, 10.0, 20.0].map(with).into_iter().find(|t| t.len() <= most);
            return fitting.unwrap_or_else(|| vec![self.low, self.high]);
        }
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let with = |factors: &[f64], every: usize| {
            let all = (first..=last)
                .step_by(every)
                .flat_map(|decade| factors.iter().map(move |factor| factor * 10_f64.powi(decade)));
            all.filter(|t| *t >= self.low * 0.999 && *t <= self.high * 1.001).collect::<Vec<_>>()
        };
        let sets: [(&[f64], usize); 6] = [
            (&[1.0, 2.0, 5.0], 1),
            (&[1.0, 3.0], 1),
            (&[1.0], 1),
            (&[1.0], 2),
            (&[1.0], 3),
            (&[1.0], 6),
        ];
        sets.into_iter()
            .map(|(factors, every)| with(factors, every))
            .find(|ticks| (2..=most).contains(&ticks.len()))
            .unwrap_or_else(|| vec![self.low, self.high])
    }
}

/// A round step that divides the span into three to six.
fn step(span: f64) -> f64 {
    let rough = (span / 4.0).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(rough.log10().floor());
    let factor = match rough / power {
        f if f < 1.5 => 1.0,
        f if f < 3.5 => 2.0,
        f if f < 7.5 => 5.0,
        _ => 10.0,
    };
    factor * power
}

/// The next of 1, 2, 5, 10… below or above.
fn round_log(value: f64, up: bool) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let found = if up {
        steps.into_iter().find(|s| *s >= value * 0.9999)
    } else {
        steps.into_iter().rev().find(|s| *s <= value * 1.0001)
    };
    found.unwrap_or(value)
}

/// Keeps the extremes of equal slices, in order, so that a short peak stays visible.
pub(super) fn thin(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let slice = points.len().div_ceil((most / 2).max(1));
    let mut kept = Vec::with_capacity(most);
    for part in points.chunks(slice) {
        let by = |a: &(usize, f64), b: &(usize, f64)| a.1.total_cmp(&b.1);
        let heights = || part.iter().map(|p| p.1).enumerate();
        let (Some(low), Some(high)) = (heights().min_by(by), heights().max_by(by)) else {
            continue;
        };
        kept.push(part[low.0.min(high.0)]);
        if low.0 != high.0 {
            kept.push(part[low.0.max(high.0)]);
        }
    }
    kept
}

/// One rectangle with two scales, and what is drawn in it.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
    x: Scale,
    y: Scale,
    body: String,
}

impl Frame {
    /// An empty frame at a place, in the units of the SVG's view box.
    pub(super) fn new(place: [f64; 4], x: Scale, y: Scale) -> Self {
        let [left, top, width, height] = place;
        Self { left, top, width, height, x, y, body: String::new() }
    }

    pub(super) fn at_x(&self, value: f64) -> f64 {
        self.left + self.x.part(value) * self.width
    }

    pub(super) fn at_y(&self, value: f64) -> f64 {
        self.top + (1.0 - self.y.part(value)) * self.height
    }

    /// Height of `rows` and of the frame: the middle of a row, from the top.
    pub(super) fn row(&self, row: usize, rows: usize) -> f64 {
        self.top + (row as f64 + 0.5) / rows.max(1) as f64 * self.height
    }

    /// The x axis with its label, and its grid.
    pub(super) fn x_axis(&mut self, label: &str) -> &mut Self {
        let bottom = self.top + self.height;
        let mut free_from = f64::NEG_INFINITY;
        for tick in self.x.ticks((self.width / 48.0) as usize + 1) {
            let (x, text) = (self.at_x(tick), number(tick));
            _ = write!(
                self.body,
                r#"<path class="grid" d="M{x:.1} {:.1}V{bottom:.1}"/>"#,
                self.top
            );
            let half = text.chars().count() as f64 * CHARACTER / 2.0;
            if x - half > free_from {
                self.text(x, bottom + 15.0, "middle", "tick", &text);
                free_from = x + half + 4.0;
            }
        }
        _ = write!(
            self.body,
            r#"<path class="axis" d="M{:.1} {bottom:.1}h{:.1}"/>"#,
            self.left, self.width
        );
        self.text(self.left + self.width / 2.0, bottom + 31.0, "middle", "label", label);
        self
    }

    /// The y axis with its label above, and its grid.
    pub(super) fn y_axis(&mut self, label: &str) -> &mut Self {
        for tick in self.y.ticks((self.height / 26.0) as usize + 1) {
            let y = self.at_y(tick);
            _ = write!(
                self.body,
                r#"<path class="grid" d="M{:.1} {y:.1}h{:.1}"/>"#,
                self.left, self.width
            );
            self.text(self.left - 6.0, y + 4.0, "end", "tick", &number(tick));
        }
        _ = write!(
            self.body,
            r#"<path class="axis" d="M{:.1} {:.1}v{:.1}"/>"#,
            self.left, self.top, self.height
        );
        self.text(self.left - 40.0, self.top - 9.0, "start", "label", label);
        self
    }

    /// A text; it is escaped.
    pub(super) fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        let text = escape(text);
        _ = write!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" class="{class}">{text}</text>"#
        );
    }

    /// A name left of the frame, cut to the room there is.
    pub(super) fn row_name(&mut self, y: f64, class: &str, name: &str) {
        let name = fit(name, self.left - 12.0);
        self.text(self.left - 8.0, y + 4.0, "end", class, &name);
    }

    /// What a quantity was in slices of time, each (begin, end, value): level within a slice, interrupted
    /// where there is nothing for long. Slices that share a unit of the view box become their largest, so
    /// that a short peak is neither lost nor wider than that unit.
    pub(super) fn steps(&mut self, slices: &[[f64; 3]], class: &str, title: &str) -> &mut Self {
        let mut columns: Vec<[f64; 3]> = Vec::new();
        for [begin, end, value] in slices {
            if !self.x.shows(*begin) || !self.y.shows(*value) {
                continue;
            }
            let (begin, y) = (self.at_x(*begin), (self.at_y(*value) * 10.0).round() / 10.0);
            let end = self.at_x(*end).max(begin + 0.5).min(self.left + self.width);
            match columns.last_mut() {
                Some(last) if last[0].floor() >= begin.floor() => {
                    (last[1], last[2]) = (last[1].max(end), last[2].min(y));
                }
                _ => columns.push([begin, end, y]),
            }
        }
        let mut d = String::new();
        let mut before: Option<(f64, f64)> = None;
        for [begin, end, y] in columns {
            let hold = HOLD.max(3.5 * (end - begin));
            _ = match before {
                Some((until, level)) if begin - until < hold && level == y => Ok(()),
                Some((until, _)) if begin - until < hold => write!(d, "H{begin:.1}V{y:.1}"),
                Some((until, _)) => write!(d, "H{until:.1}M{begin:.1} {y:.1}"),
                None => write!(d, "M{begin:.1} {y:.1}"),
            };
            before = Some((end, y));
        }
        if let Some((until, _)) = before {
            _ = write!(d, "H{until:.1}");
            self.drawn(&d, class, title);
        }
        self
    }

    fn drawn(&mut self, d: &str, class: &str, title: &str) {
        _ = write!(
            self.body,
            r#"<path class="line {class}" d="{d}"><title>{}</title></path>"#,
            escape(title)
        );
    }

    /// A line through the points; `class` says its colour and kind, `title` what it is.
    pub(super) fn line(&mut self, points: &[(f64, f64)], class: &str, title: &str) -> &mut Self {
        let (x, y) = (self.x, self.y);
        let shown: Vec<_> =
            points.iter().copied().filter(|(a, b)| x.shows(*a) && y.shows(*b)).collect();
        if shown.is_empty() {
            return self;
        }
        let mut d = String::new();
        for (at, (a, b)) in thin(&shown, LINE_POINTS).into_iter().enumerate() {
            let to = if at == 0 { 'M' } else { 'L' };
            _ = write!(d, "{to}{:.1} {:.1}", self.at_x(a), self.at_y(b));
        }
        if shown.len() == 1 {
            // One point alone would be invisible.
            d.push_str("h1");
        }
        self.drawn(&d, class, title);
        self
    }

    /// A dot with a title.
    pub(super) fn dot(&mut self, x: f64, y: f64, class: &str, title: &str) -> &mut Self {
        if self.x.shows(x) && self.y.shows(y) {
            let (x, y) = (self.at_x(x), self.at_y(y));
            self.mark(x, y, class, title);
        }
        self
    }

    /// A dot at a place of the SVG.
    pub(super) fn mark(&mut self, x: f64, y: f64, class: &str, title: &str) {
        _ = write!(
            self.body,
            r#"<circle class="dot {class}" cx="{x:.1}" cy="{y:.1}" r="3.5"><title>{}</title></circle>"#,
            escape(title)
        );
    }

    /// Many dots in one path, without titles.
    pub(super) fn cloud(&mut self, points: &[(f64, f64)], class: &str) -> &mut Self {
        let every = points.len().div_ceil(DOTS).max(1);
        let mut d = String::new();
        for (x, y) in points.iter().step_by(every) {
            if self.x.shows(*x) && self.y.shows(*y) {
                _ = write!(d, "M{:.1} {:.1}h.01", self.at_x(*x), self.at_y(*y));
            }
        }
        if !d.is_empty() {
            _ = write!(self.body, r#"<path class="cloud {class}" d="{d}"/>"#);
        }
        self
    }

    /// A bar from the x axis' low end to `x`, around the place `y` of the SVG.
    pub(super) fn bar(&mut self, x: f64, y: f64, thick: f64, class: &str, title: &str) {
        let width = (self.at_x(x) - self.left).max(1.0);
        self.rect([self.left, y - thick / 2.0, width, thick], class, title);
    }

    /// A column from the y axis' low end to `y`, around `x`.
    pub(super) fn column(&mut self, x: f64, y: f64, wide: f64, class: &str, title: &str) {
        let (top, bottom) = (self.at_y(y), self.top + self.height);
        let height = (bottom - top).max(1.0);
        self.rect([self.at_x(x) - wide / 2.0, bottom - height, wide, height], class, title);
    }

    /// A band over a part of the height (0 its top, 1 its foot), wide enough to be seen.
    pub(super) fn band(&mut self, span: (f64, f64), part: (f64, f64), class: &str, title: &str) {
        let (from, to) = (self.at_x(span.0), self.at_x(span.1));
        let right = self.left + self.width;
        let width = (to - from).max(BAND).min(right - from).max(0.5);
        let (top, height) = (self.top + part.0 * self.height, (part.1 - part.0) * self.height);
        self.rect([from, top, width, height], class, title);
    }

    /// A line across at the height `y`.
    pub(super) fn across(&mut self, y: f64, class: &str, title: &str) {
        let y = self.at_y(y);
        _ = write!(
            self.body,
            r#"<path class="line {class}" d="M{:.1} {y:.1}h{:.1}"><title>{}</title></path>"#,
            self.left,
            self.width,
            escape(title)
        );
    }

    /// A line between two values at the place `y` of the SVG.
    pub(super) fn span(&mut self, from: f64, to: f64, y: f64, class: &str, title: &str) {
        let (from, to) = (self.at_x(from), self.at_x(to));
        _ = write!(
            self.body,
            r#"<path class="line {class}" d="M{from:.1} {y:.1}H{:.1}"><title>{}</title></path>"#,
            to.max(from + 1.0),
            escape(title)
        );
    }

    fn rect(&mut self, place: [f64; 4], class: &str, title: &str) {
        let [x, y, width, height] = place;
        _ = write!(
            self.body,
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"><title>{}</title></rect>"#,
            escape(title)
        );
    }

    /// An upright line at `x`, with a word at its top.
    pub(super) fn upright(&mut self, x: f64, class: &str, word: &str) {
        let at = self.at_x(x);
        _ = write!(
            self.body,
            r#"<path class="line {class}" d="M{at:.1} {:.1}v{:.1}"><title>{}</title></path>"#,
            self.top,
            self.height,
            escape(word)
        );
    }
}

/// The SVG of some frames; `says` is what it shows, for those who cannot see it.
pub(super) fn svg(size: (f64, f64), says: &str, frames: &[Frame]) -> String {
    let (width, height) = size;
    let body: String = frames.iter().map(|frame| frame.body.as_str()).collect();
    let says = escape(says);
    let label = format!(r#"role="img" aria-label="{says}""#);
    format!(r#"<svg viewBox="0 0 {width:.0} {height:.0}" {label}>{body}</svg>"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        #[track_caller]
        fn check(scale: Scale, want: &[f64]) {
            let ticks = scale.ticks(6);
            assert_eq!(ticks.len(), want.len(), "{ticks:?}");
            for (tick, want) in ticks.iter().zip(want) {
                assert!((tick - want).abs() <= want.abs() * 1e-9, "{ticks:?}");
            }
        }
        check(Scale::from_zero([0.0, 9.3]), &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        check(Scale::from_zero([]), &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        check(Scale::from_zero([f64::NAN, -3.0, 100.0]), &[0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        check(Scale::log([3.0, 40.0]), &[2.0, 5.0, 10.0, 20.0, 50.0]);
        check(Scale::log([250.0, 21_000.0]), &[300.0, 1e3, 3e3, 1e4, 3e4]);
        check(Scale::log([1.0, 99_000.0]), &[1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
        check(Scale::log([0.0, -1.0, f64::NAN]), &[1.0, 2.0, 5.0, 10.0]);
        check(Scale::between(5.0, 5.0), &[5.0, 5.2, 5.4, 5.6, 5.8, 6.0]);
    }

    #[test]
    fn numbers_are_short() {
        for (value, want) in [
            (0.0, "0"),
            (-0.0, "0"),
            (0.0123, "0.0123"),
            (0.5, "0.5"),
            (12.345, "12.3"),
            (100.0, "100"),
            (9_999.0, "9999"),
            (12_345.0, "12.3\u{a0}k"),
            (2.5e6, "2.5\u{a0}M"),
            (1e300, "1e300"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(number(value), want);
        }
    }

    #[test]
    fn thinning_keeps_the_peak_and_the_order() {
        let mut points: Vec<_> = (0..10_000).map(|n| (f64::from(n), 1.0)).collect();
        points[6_789].1 = 50.0;
        let kept = thin(&points, 240);
        assert!(kept.len() <= 240, "{}", kept.len());
        assert!(kept.contains(&(6_789.0, 50.0)));
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn a_short_peak_is_one_column_wide() {
        let mut slices: Vec<_> = (0..6_000).map(|n| [n, n + 1, 1].map(f64::from)).collect();
        slices[3_003][2] = 10.0;
        let (x, y) = (Scale::between(0.0, 6_000.0), Scale::from_zero([10.0]));
        let mut frame = Frame::new([0.0, 0.0, 600.0, 100.0], x, y);
        frame.steps(&slices, "k0", "");
        assert!(
            frame.body.contains(r#"d="M0.0 90.0H300.0V0.0H301.0V90.0H600.0""#),
            "{}",
            frame.body
        );
    }

    #[test]
    fn a_course_ends_where_nothing_was_measured() {
        let (x, y) = (Scale::between(0.0, 100.0), Scale::from_zero([10.0]));
        let mut frame = Frame::new([0.0, 0.0, 100.0, 100.0], x, y);
        frame.steps(&[[0.0, 1.0, 5.0], [3.0, 4.0, 10.0], [60.0, 61.0, 5.0]], "k0", "");
        assert!(
            frame.body.contains(r#"d="M0.0 50.0H3.0V0.0H4.0M60.0 50.0H61.0""#),
            "{}",
            frame.body
        );
    }

    #[test]
    fn whatever_is_drawn_stays_in_the_frame() {
        let mut frame = Frame::new(
            [10.0, 10.0, 100.0, 50.0],
            Scale::between(0.0, 1.0),
            Scale::log([1.0, 10.0]),
        );
        for wild in [f64::NAN, f64::INFINITY, -1e300, 1e300, 0.0] {
            frame.steps(&[[wild, wild, wild], [0.5, wild, wild]], "k0", "");
            frame.line(&[(wild, wild), (0.5, wild)], "k0", "").dot(wild, wild, "k0", "");
            assert!((10.0..=110.0).contains(&frame.at_x(wild)));
            assert!((10.0..=60.0).contains(&frame.at_y(wild)));
        }
        assert!(!frame.body.contains("NaN") && !frame.body.contains("inf"), "{}", frame.body);
    }

    #[test]
    fn what_could_be_markup_is_text() {
        assert_eq!(
            escape("<script>\"a\"&'b'</script>\u{202e}\u{0}\n"),
            "&lt;script&gt;&quot;a&quot;&amp;&#39;b&#39;&lt;/script&gt; "
        );
        assert_eq!(shorten("abcdef", 4), "abc…");
        assert_eq!(shorten("äbcd", 4), "äbcd");
    }
}
