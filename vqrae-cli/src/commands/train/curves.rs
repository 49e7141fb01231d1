//! The curves of a run's log as a picture.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::figure::{Axis, Figure, Marks, Panel, Ticks};

/// What is drawn: a key of the log, the panel's title, its axis and whether powers of ten are spread evenly.
const CURVES: [(&str, &str, &str, bool); 6] = [
    ("loss", "Loss", "loss", true),
    ("psnr", "Training", "PSNR, dB", false),
    ("validation_psnr", "Validation", "PSNR, dB", false),
    ("usage", "Codes in use", "share", false),
    ("gradient_norm", "Gradient", "norm", true),
    ("images_per_second", "Speed", "images/s", false),
];

/// Draws the log at `path` as `picture`; a log that has no curve yet is drawn later.
pub(super) fn draw(path: &Path, picture: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let panels: Vec<Panel> = CURVES.iter().filter_map(|curve| panel(curve, &lines)).collect();
    if panels.is_empty() {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(path);
    let heading =
        format!("{} after {} steps", folder.display(), lines.last().map_or(&Value::Null, |line| &line["step"]));
    let svg = Figure { heading, panels }.svg();
    // Whole or not at all: a browser may look on.
    let temporary = picture.with_extension("svg.partial");
    std::fs::write(&temporary, svg).with_context(|| temporary.display().to_string())?;
    std::fs::rename(&temporary, picture).with_context(|| picture.display().to_string())
}

fn panel((key, title, label, log): &(&str, &'static str, &'static str, bool), lines: &[Value]) -> Option<Panel> {
    let point = |line: &Value| Some((line["step"].as_f64()?, line[key].as_f64()?));
    let points: Vec<(f64, f64)> = lines.iter().filter_map(point).collect();
    let (first, last) = (points.first()?.0, points.last()?.0);
    let (low, high) =
        points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| (low.min(p.1), high.max(p.1)));
    let room = if high > low { 0.05 * (high - low) } else { 0.5 * high.abs().max(1.0) };
    let (low, high, ticks) = match *log && low > 0.0 {
        true => (low / 1.2, high * 1.2, Ticks::Log),
        false => (low - room, high + room, Ticks::Linear),
    };
    let x = Axis { label: "step", low: first.min(last - 1.0), high: last, ticks: Ticks::Linear };
    let y = Axis { label, low, high, ticks };
    Some(Panel { title, x, y, marks: Marks::Line(points), rules: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_becomes_a_panel_a_curve() {
        let folder = tempfile::tempdir().expect("a folder");
        let (log, picture) = (folder.path().join("log.jsonl"), folder.path().join("curves.svg"));
        std::fs::write(&log, "").expect("a write");
        draw(&log, &picture).expect("nothing to draw");
        assert!(!picture.exists());
        let lines = "{\"step\":0,\"validation_psnr\":9.5}\n{\"step\":2,\"loss\":0.5,\"psnr\":20.0}\n\
                     {\"step\":4,\"loss\":0.25,\"psnr\":null}\n{\"step\":4,\"valid";
        std::fs::write(&log, lines).expect("a write");
        draw(&log, &picture).expect("a picture");
        let svg = std::fs::read_to_string(&picture).expect("a picture");
        assert_eq!(svg.matches("<polyline").count(), 3, "{svg}");
        for title in ["Loss", "Training", "Validation", "after 4 steps"] {
            assert!(svg.contains(title), "{title}");
        }
    }
}
