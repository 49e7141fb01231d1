//! What `train --dry-run` prints.

use std::fmt::Write as _;

use vqrae::train::Config;
use vqrae::train::plan::Plan;

use crate::figure::number;

/// Rows of the picture of the schedule.
const ROWS: usize = 8;

/// The plan as text for people.
pub(super) fn text(config: &Config, plan: &Plan) -> String {
    let train = &config.train;
    let mut text = format!(
        "{} steps of {} images in {} part{}\n\n{:<13} {:>14} {:>14} {:>14}  rate\n",
        number(train.steps as f64),
        train.batch_size,
        train.accumulate,
        if train.accumulate == 1 { "" } else { "s" },
        "group",
        "trained",
        "of it decayed",
        "not trained",
    );
    for (name, group) in &plan.groups {
        let [trained, decayed, untrained] = [group.trained, group.decayed, group.untrained].map(grouped);
        let ends = [group.rates.first(), group.rates.last()].map(|rate| rate.copied().unwrap_or_default());
        let peak = group.rates.iter().copied().fold(0.0, f64::max);
        let rate = if peak == 0.0 {
            "frozen".to_string()
        } else {
            format!("{:.1e} ↗ {peak:.1e} ↘ {:.1e}", ends[0], ends[1])
        };
        let _ = writeln!(text, "{name:<13} {trained:>14} {decayed:>14} {untrained:>14}  {rate}");
    }
    text += "\nmemory, an estimate\n";
    let total: u64 = plan.memory.iter().map(|(_, bytes)| bytes).sum();
    for (name, bytes) in plan.memory.iter().filter(|(_, bytes)| *bytes > 0).chain([&("in all", total)]) {
        let _ = writeln!(text, "{name:<24} {:>10.1} MiB", *bytes as f64 / f64::from(1 << 20));
    }
    for (name, group) in plan.groups.iter().filter(|(_, group)| group.rates.iter().any(|&rate| rate > 0.0)) {
        let _ = write!(text, "\nrate of the {name}\n{}", picture(&group.rates, train.steps));
    }
    text.trim_end().to_string()
}

/// 12,345,678, to the last digit.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let parts: Vec<&str> =
        (0..digits.len()).rev().step_by(3).map(|end| &digits[(end + 1).saturating_sub(3)..=end]).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join(",")
}

/// Values from the first to the last step, as columns.
fn picture(values: &[f64], steps: usize) -> String {
    let highest = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let height = |value: f64| (value / highest * ROWS as f64).round() as usize;
    let mut text = String::new();
    for row in (1..=ROWS).rev() {
        let label = if row == ROWS { format!("{highest:.1e}") } else { String::new() };
        let line: String = values.iter().map(|&value| if height(value) >= row { '█' } else { ' ' }).collect();
        let _ = writeln!(text, "{label:>9} │{}", line.trim_end());
    }
    let width = values.len();
    let last = number(steps as f64);
    let _ = writeln!(text, "{:>9} └{}\n{:11}1{last:>rest$}", 0, "─".repeat(width), "", rest = width - 1);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_grouped_by_three() {
        assert_eq!([7, 123, 1234, 12_345_678].map(grouped), ["7", "123", "1,234", "12,345,678"]);
    }

    #[test]
    fn a_picture_rises_and_falls() {
        let text = picture(&[0.0, 4.0, 8.0, 2.0], 400);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "    8.0e0 │  █");
        assert_eq!(lines[4], "          │ ██".trim_end_matches(' '));
        assert_eq!(lines[7], "          │ ███".trim_end_matches(' '));
        assert!(lines[9].ends_with("1400"), "{text}");
    }
}
