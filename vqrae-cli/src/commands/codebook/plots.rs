//! What the plots of `codebook` show.

use super::{Book, Tally};
use crate::figure::{Axis, Figure, Marks, Panel, Rule, Ticks, histogram, number};

/// Bars of a histogram.
const BINS: usize = 48;

/// Points of the curve: more would fall on one another.
const POINTS: usize = 300;

/// How the codes lie: norms, distance and angle to the nearest other code.
pub(super) fn geometry(book: &Book) -> Figure {
    let distances: Vec<f64> = book.neighbours.iter().map(|neighbour| neighbour.distance).collect();
    let angles: Vec<f64> = book.neighbours.iter().filter_map(|neighbour| neighbour.angle).collect();
    let (identical, near) = (number(book.twins.identical as f64), number(book.twins.near as f64));
    let mut panels = vec![
        spread("Norms", "length of a code", &book.norms),
        spread("Nearest other code", "distance to it", &distances),
        spread("Nearest other code", "angle to it, degrees", &angles),
    ];
    panels[1].rules.push(Rule::Down(book.twins.below, "near-duplicates".to_string()));
    let heading = format!(
        "{} codes of width {}: {identical} identical to another, {near} nearer than {} of the median distance",
        number(book.norms.len() as f64),
        book.width,
        book.near
    );
    Figure { heading, panels }
}

fn spread(title: &'static str, label: &'static str, values: &[f64]) -> Panel {
    let bars = histogram(values, BINS);
    let highest = bars.iter().map(|bar| bar.2).fold(1.0, f64::max);
    let low = bars.first().map_or(0.0, |bar| bar.0);
    let high = bars.last().map_or(1.0, |bar| bar.1);
    // From zero on where little is lost by it: lengths and angles are compared with it.
    let low = if low > 0.0 && low < high / 2.0 { 0.0 } else { low };
    let x = Axis { label, low, high, ticks: Ticks::Linear };
    Panel { title, x, y: codes(highest), marks: Marks::Bars(bars), rules: Vec::new() }
}

/// How evenly the codes are used: tokens a code by rank, and codes by their number of tokens.
pub(super) fn usage(tally: &Tally) -> Figure {
    let usage = &tally.usage;
    let heading = format!(
        "{} tokens of {} images: {} of {} codes used ({:.1} %), perplexity {}, Gini {:.2}",
        number(usage.tokens as f64),
        number(tally.files as f64),
        number(usage.used as f64),
        number((usage.used + usage.dead) as f64),
        100.0 * usage.usage,
        number(usage.perplexity),
        usage.gini
    );
    Figure { heading, panels: vec![ranks(tally), classes(&tally.counts.counts())] }
}

/// The curve of rank and frequency, both logarithmic.
fn ranks(tally: &Tally) -> Panel {
    let mut counts: Vec<u64> = tally.counts.counts().iter().copied().filter(|&count| count > 0).collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let last = counts.len().saturating_sub(1) as f64;
    let rank = |i: usize| ((last + 1.0).powf(i as f64 / POINTS as f64) - 1.0).round().min(last) as usize;
    let mut points: Vec<usize> = (0..=POINTS).map(rank).collect();
    points.dedup();
    let line = points.into_iter().filter_map(|i| Some((i as f64 + 1.0, *counts.get(i)? as f64))).collect();
    let k = tally.counts.counts().len() as f64;
    let uniform = tally.usage.tokens as f64 / k;
    let highest = counts.first().map_or(1.0, |&count| count as f64);
    Panel {
        title: "Tokens of a code, by rank",
        x: Axis { label: "rank of the code", low: 1.0, high: k.max(2.0), ticks: Ticks::Log },
        y: Axis { label: "tokens", low: uniform.min(1.0), high: highest.max(2.0), ticks: Ticks::Log },
        marks: Marks::Line(line),
        rules: vec![Rule::Across(uniform, format!("all codes alike: {}", brief(uniform)))],
    }
}

/// Codes by their number of tokens, in classes that double: 0, 1, 2 and 3, 4 to 7, …
fn classes(counts: &[u64]) -> Panel {
    let class = |count: u64| (u64::BITS - count.leading_zeros()) as usize;
    let classes = counts.iter().map(|&count| class(count)).max().unwrap_or_default() + 1;
    let mut heights = vec![0.0; classes];
    counts.iter().for_each(|&count| heights[class(count)] += 1.0);
    let bars = heights.iter().enumerate().map(|(i, &height)| (i as f64, i as f64 + 1.0, height)).collect();
    let name = |i: usize| match i {
        0 => "0".to_string(),
        11.. => format!("{}k", 1u64 << (i - 11)),
        _ => (1u64 << (i - 1)).to_string(),
    };
    // Every other name where all would touch.
    let step = classes.div_ceil(13);
    let ticks = (0..classes).step_by(step).map(|i| (i as f64 + 0.5, name(i))).collect();
    Panel {
        title: "Codes, by their number of tokens",
        x: Axis {
            label: "tokens of a code, from this many to the next",
            low: 0.0,
            high: classes as f64,
            ticks: Ticks::At(ticks),
        },
        y: codes(heights.iter().copied().fold(1.0, f64::max)),
        marks: Marks::Bars(bars),
        rules: Vec::new(),
    }
}

fn codes(highest: f64) -> Axis {
    Axis { label: "codes", low: 0.0, high: 1.15 * highest, ticks: Ticks::Linear }
}

/// A mean with about three digits.
fn brief(value: f64) -> String {
    if value >= 10.0 { number(value) } else { format!("{value:.2}") }
}
