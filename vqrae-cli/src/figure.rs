//! Figures as SVG, in the style of a paper: panels side by side, few ticks, readable on light and on dark.

use std::fmt::Write as _;

/// One drawing: a line of text on top, panels below.
pub(crate) struct Figure {
    /// What the figure says in one line.
    pub(crate) heading: String,
    pub(crate) panels: Vec<Panel>,
}

/// One pair of axes and what stands between them.
pub(crate) struct Panel {
    pub(crate) title: &'static str,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) marks: Marks,
    /// Dashed lines with a word beside them.
    pub(crate) rules: Vec<Rule>,
}

/// An axis and the values that it spans.
pub(crate) struct Axis {
    pub(crate) label: &'static str,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) ticks: Ticks,
}

/// How values are spread over an axis, and which of them are written beside it.
pub(crate) enum Ticks {
    Linear,
    /// Powers of ten.
    Log,
    /// These, spread evenly.
    At(Vec<(f64, String)>),
}

/// What is drawn.
pub(crate) enum Marks {
    /// A line through points (x, y).
    Line(Vec<(f64, f64)>),
    /// From x to x, as high as y.
    Bars(Vec<(f64, f64, f64)>),
}

/// A dashed line across a panel.
pub(crate) enum Rule {
    /// At a height, from left to right.
    Across(f64, String),
    /// At a place, from top to bottom.
    Down(f64, String),
}

/// Pixels of one panel's inside, and of what surrounds it.
const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 52.0;

const STYLE: &str = "\
text{font:12px system-ui,-apple-system,'Segoe UI','Helvetica Neue',Arial,sans-serif;fill:#22262b}\
.title{font-weight:600}.tick,.note{font-size:11px;fill:#565d66}.heading{font-size:13px}\
.paper{fill:#fff}.axis{stroke:#565d66;fill:none}.grid{stroke:#e4e7eb}.bar{fill:#3572b0}\
.line{stroke:#3572b0;stroke-width:2;fill:none;stroke-linejoin:round}.rule{stroke:#c4541a;stroke-dasharray:5 4}\
@media(prefers-color-scheme:dark){text{fill:#e6e9ed}.tick,.note{fill:#a7afb9}.paper{fill:#14171b}.axis{stroke:#a7afb9}\
.grid{stroke:#2b3037}.bar{fill:#6aa5e0}.line{stroke:#6aa5e0}.rule{stroke:#f0935c}}";

impl Figure {
    /// The figure as a file's text.
    pub(crate) fn svg(&self) -> String {
        let width = self.panels.len() as f64 * (LEFT + WIDTH + RIGHT);
        let height = TOP + HEIGHT + BOTTOM;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\">\n\
             <title>{0}</title>\n<style>{STYLE}</style>\n<rect class=\"paper\" width=\"{width}\" height=\"{height}\"/>\n\
             <text class=\"heading\" x=\"{LEFT}\" y=\"22\">{0}</text>\n",
            escaped(&self.heading)
        );
        for (i, panel) in self.panels.iter().enumerate() {
            let x = i as f64 * (LEFT + WIDTH + RIGHT) + LEFT;
            let _ = writeln!(svg, "<g transform=\"translate({x} {TOP})\">");
            panel.draw(&mut svg);
            svg += "</g>\n";
        }
        svg + "</svg>\n"
    }
}

impl Panel {
    fn draw(&self, svg: &mut String) {
        let _ = writeln!(svg, "<text class=\"title\" x=\"0\" y=\"-12\">{}</text>", escaped(self.title));
        self.axes(svg);
        match &self.marks {
            Marks::Line(points) => {
                let points: Vec<_> =
                    points.iter().map(|&(x, y)| format!("{:.1},{:.1}", self.x(x), self.y(y))).collect();
                let _ = writeln!(svg, "<polyline class=\"line\" points=\"{}\"/>", points.join(" "));
            }
            Marks::Bars(bars) => bars.iter().for_each(|&bar| self.bar(svg, bar)),
        }
        let _ = writeln!(svg, "<path class=\"axis\" d=\"M0 0V{HEIGHT}H{WIDTH}\"/>");
        self.rules.iter().for_each(|rule| self.rule(svg, rule));
    }

    fn axes(&self, svg: &mut String) {
        for (value, text) in self.y.ticks() {
            let y = self.y(value);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M0 {y:.1}H{WIDTH}\"/><text class=\"tick\" x=\"-8\" y=\"{:.1}\" \
                 text-anchor=\"end\">{text}</text>",
                y + 4.0
            );
        }
        for (value, text) in self.x.ticks() {
            let x = self.x(value);
            let _ = writeln!(
                svg,
                "<path class=\"axis\" d=\"M{x:.1} {HEIGHT}v4\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{}\" \
                 text-anchor=\"middle\">{text}</text>",
                HEIGHT + 17.0
            );
        }
        let (middle, low) = (WIDTH / 2.0, HEIGHT + 38.0);
        let _ =
            writeln!(svg, "<text x=\"{middle}\" y=\"{low}\" text-anchor=\"middle\">{}</text>", escaped(self.x.label));
        let _ = writeln!(
            svg,
            "<text transform=\"translate(-48 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            HEIGHT / 2.0,
            escaped(self.y.label)
        );
    }

    /// A bar with a sliver of paper at either side.
    fn bar(&self, svg: &mut String, (from, to, value): (f64, f64, f64)) {
        let (left, right, top) = (self.x(from) + 0.5, self.x(to) - 0.5, self.y(value));
        if value > 0.0 {
            let (width, height) = ((right - left).max(0.5), (HEIGHT - top).max(0.5));
            let _ = writeln!(
                svg,
                "<rect class=\"bar\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>",
                HEIGHT - height
            );
        }
    }

    fn rule(&self, svg: &mut String, rule: &Rule) {
        let (path, x, y, anchor, text) = match rule {
            Rule::Across(at, text) => {
                let y = self.y(*at);
                (format!("M0 {y:.1}H{WIDTH}"), 6.0, y - 5.0, "start", text)
            }
            Rule::Down(at, text) => {
                let x = self.x(*at);
                let anchor = if x > WIDTH / 2.0 { "end" } else { "start" };
                (format!("M{x:.1} 0V{HEIGHT}"), if x > WIDTH / 2.0 { x - 5.0 } else { x + 5.0 }, 10.0, anchor, text)
            }
        };
        let _ = writeln!(
            svg,
            "<path class=\"rule\" d=\"{path}\"/><text class=\"note\" x=\"{x:.1}\" y=\"{y:.1}\" \
             text-anchor=\"{anchor}\">{}</text>",
            escaped(text)
        );
    }

    fn x(&self, value: f64) -> f64 {
        WIDTH * self.x.share(value)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT * (1.0 - self.y.share(value))
    }
}

impl Axis {
    /// Where a value stands between the ends, 0 to 1; what is beyond them stands at the end.
    fn share(&self, value: f64) -> f64 {
        let place = |value: f64| if matches!(self.ticks, Ticks::Log) { value.max(1e-300).log10() } else { value };
        let (low, high) = (place(self.low), place(self.high));
        ((place(value) - low) / (high - low).max(1e-300)).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        match &self.ticks {
            Ticks::At(ticks) => ticks.clone(),
            Ticks::Log => self.powers(),
            Ticks::Linear => self.round_numbers(),
        }
    }

    fn powers(&self) -> Vec<(f64, String)> {
        let (low, high) = (self.low.log10().ceil() as i32, self.high.log10().floor() as i32);
        // Where powers of ten are few, 2 and 5 join them.
        let factors: &[f64] = if high - low < 2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let values = (low - 1..=high).flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)));
        values.filter(|value| (self.low..=self.high).contains(value)).map(|value| (value, number(value))).collect()
    }

    /// Four to eight multiples of 1, 2 or 5 times a power of ten.
    fn round_numbers(&self) -> Vec<(f64, String)> {
        let rough = ((self.high - self.low) / 5.0).max(1e-300);
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= 0.6 * rough);
        let step = step.unwrap_or(rough);
        let (first, last) = ((self.low / step - 1e-9).ceil() as i64, (self.high / step + 1e-9).floor() as i64);
        let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let text = |value: f64| if step >= 1.0 { number(value) } else { format!("{value:.decimals$}") };
        (first..=last).map(|i| i as f64 * step).map(|value| (value, text(value))).collect()
    }
}

/// A number for people: 813,056; from ten million on 12M.
pub(crate) fn number(value: f64) -> String {
    if value >= 1e7 {
        return format!("{}M", (value / 1e6).round());
    }
    if value < 1.0 {
        return value.to_string();
    }
    let digits = format!("{}", value.round());
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Counts of `values` in `bins` equal bins from the smallest to the largest, as bars.
pub(crate) fn histogram(values: &[f64], bins: usize) -> Vec<(f64, f64, f64)> {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.is_empty() {
        return Vec::new();
    }
    // All the same: one narrow bin around it.
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, low + 0.5) };
    let step = (high - low) / bins as f64;
    let mut counts = vec![0.0; bins];
    for value in values {
        counts[(((value - low) / step) as usize).min(bins - 1)] += 1.0;
    }
    let edge = |i: usize| low + i as f64 * step;
    counts.into_iter().enumerate().map(|(i, count)| (edge(i), edge(i + 1), count)).collect()
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(low: f64, high: f64, ticks: Ticks) -> Vec<String> {
        Axis { label: "", low, high, ticks }.ticks().into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(axis(0.0, 1.0, Ticks::Linear), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(axis(0.0, 2300.0, Ticks::Linear), ["0", "500", "1,000", "1,500", "2,000"]);
        assert_eq!(axis(1.0, 16_384.0, Ticks::Log), ["1", "10", "100", "1,000", "10,000"]);
        assert_eq!(axis(1.0, 30.0, Ticks::Log), ["1", "2", "5", "10", "20"]);
    }

    #[test]
    fn a_histogram_counts_every_value() {
        assert_eq!(
            histogram(&[0.0, 1.0, 3.9, 4.0], 4),
            [(0.0, 1.0, 1.0), (1.0, 2.0, 1.0), (2.0, 3.0, 0.0), (3.0, 4.0, 2.0)]
        );
        assert_eq!(histogram(&[2.0; 3], 2), [(1.5, 2.0, 0.0), (2.0, 2.5, 3.0)]);
        assert!(histogram(&[], 4).is_empty());
    }

    #[test]
    fn text_cannot_break_the_file() {
        let x = Axis { label: "a < b", low: 0.0, high: 1.0, ticks: Ticks::Linear };
        let y = Axis { label: "", low: 0.0, high: 1.0, ticks: Ticks::Linear };
        let marks = Marks::Bars(vec![(0.0, 1.0, 1.0)]);
        let rules = vec![Rule::Across(0.5, "half & half".to_string()), Rule::Down(0.9, String::new())];
        let panel = Panel { title: "", x, y, marks, rules };
        let svg = Figure { heading: "<1>".to_string(), panels: vec![panel] }.svg();
        for part in ["&lt;1&gt;", "a &lt; b", "half &amp; half", "</svg>"] {
            assert!(svg.contains(part), "{part} in {svg}");
        }
    }
}
