//! `report.html`: the figures as a page that needs no other file and no network.

use std::fmt::Write as _;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rayon::prelude::*;
use vqrae::image::{Rgb, encode_jpeg};

use super::gallery::{Shown, fit};
use super::judge::{Metric, Record, Spread};
use super::outcome::{Outcome, Subject};
use crate::figure::{Axis, Figure, Marks, Panel, Rule, Ticks, escaped, histogram, number};
use crate::sheet;

/// Images in the table: a page of more is slow to open. All of them are in eval.json.
const ROWS: usize = 2000;

/// Larger pictures are shown smaller.
const THUMBNAIL: usize = 256;

/// Of the pictures' JPEGs: high, so that their own errors are not taken for the model's.
const QUALITY: u8 = 90;

/// Bars of a histogram at most; of few images there are fewer.
const BINS: usize = 32;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The whole page.
pub(crate) fn html(outcome: &Outcome) -> Result<String> {
    let images = number(outcome.records.len() as f64);
    let (title, subtitle) = match &outcome.subject {
        Subject::Model { id, dtype } => {
            (format!("Reconstructions of {images} images"), format!("model {id}, computed in {dtype}"))
        }
        Subject::Folders => (format!("{images} images against their originals"), "two folders".to_string()),
    };
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{0}: protocol {2}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{0}</h1>\n\
         <p class=\"lead\">{1} · protocol <strong>{2}</strong></p>\n</header>\n<main>\n",
        escaped(&title),
        escaped(&subtitle),
        outcome.protocol.name
    );
    tiles(&mut page, outcome);
    protocol(&mut page, outcome);
    page += "<section>\n<h2>How the images spread</h2>\n<div class=\"plots\">\n";
    outcome.spreads.iter().filter(|spread| !spread.values.is_empty()).for_each(|spread| page += &plot(spread));
    page += "</div>\n</section>\n";
    let worst_by = outcome.worst_by.name();
    let gallery = &outcome.gallery;
    let heading = format!("The {} worst by {worst_by}", gallery.worst.len());
    pairs(&mut page, "worst", &heading, &gallery.worst, &outcome.metrics())?;
    let heading = format!("A sample of {}, evenly spread over the images", gallery.sample.len());
    pairs(&mut page, "sample", &heading, &gallery.sample, &outcome.metrics())?;
    table(&mut page, outcome);
    let _ = write!(
        page,
        "</main>\n<footer>{} {}</footer>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_VERSION")
    );
    Ok(page)
}

/// The figures of all images, large.
fn tiles(page: &mut String, outcome: &Outcome) {
    *page += "<section class=\"tiles\">\n";
    let mut tile = |name: &str, value: String, note: String| {
        let _ = writeln!(
            page,
            "<div class=\"tile\"><span class=\"name\">{}</span><span class=\"value\">{value}</span>\
             <span class=\"small\">{}</span></div>",
            escaped(name),
            escaped(&note)
        );
    };
    for spread in &outcome.spreads {
        let decimals = spread.metric.decimals();
        let shown = |value: Option<f64>| value.map_or("–".to_string(), |value| format!("{value:.decimals$}"));
        let note = match spread.equal {
            0 => format!("{} to {}", shown(spread.quantile(0.0)), shown(spread.quantile(1.0))),
            equal => format!("without {equal} equal images"),
        };
        tile(spread.metric.label(), shown(spread.mean()), note);
    }
    if let Some(fid) = outcome.fid {
        tile("rFID", format!("{fid:.2}"), format!("of {} images", number(outcome.records.len() as f64)));
    }
    if let Some(codes) = &outcome.codes {
        tile("Codes in use", format!("{:.1} %", 100.0 * codes.usage), format!("perplexity {:.0}", codes.perplexity));
        let note = format!("{:.4} by entropy", codes.entropy_bits_per_pixel);
        tile("Bits per pixel", format!("{:.4}", codes.bits_per_pixel), note);
    }
    *page += "</section>\n";
    if let Some(text) = outcome.fid_note() {
        let _ = writeln!(page, "<p class=\"remark\">rFID {}.</p>", escaped(&text));
    }
}

fn protocol(page: &mut String, outcome: &Outcome) {
    let _ = writeln!(page, "<section>\n<h2>Protocol: {}</h2>\n<dl>", outcome.protocol.name);
    for (name, words) in outcome.protocol.lines() {
        let _ = writeln!(page, "<dt>{name}</dt><dd>{}</dd>", escaped(&words));
    }
    for left_out in &outcome.left_out {
        let words = format!("{}: {}", left_out.what, left_out.next_step);
        let _ = writeln!(page, "<dt>left out</dt><dd>{}</dd>", escaped(&words));
    }
    *page += "</dl>\n</section>\n";
}

fn plot(spread: &Spread) -> String {
    let bins = 2 * (spread.values.len() as f64).sqrt().ceil() as usize;
    let bars = histogram(&spread.values, bins.clamp(8, BINS));
    // Below five the ticks would be parts of an image.
    let highest = bars.iter().map(|bar| bar.2).fold(5.0, f64::max);
    let (low, high) = (bars.first().map_or(0.0, |bar| bar.0), bars.last().map_or(1.0, |bar| bar.1));
    let decimals = spread.metric.decimals();
    let mean = spread.mean().unwrap_or_default();
    let median = spread.quantile(0.5).unwrap_or_default();
    let heading = format!("{}: mean {mean:.decimals$}, median {median:.decimals$}", spread.metric.label());
    let panel = Panel {
        title: "",
        x: Axis { label: spread.metric.label(), low, high, ticks: Ticks::Linear },
        y: Axis { label: "images", low: 0.0, high: highest, ticks: Ticks::Linear },
        marks: Marks::Bars(bars),
        rules: vec![Rule::Down(mean, "mean".to_string())],
    };
    Figure { heading, panels: vec![panel] }.svg()
}

/// Original, reconstruction and error of some pairs.
fn pairs(page: &mut String, class: &str, heading: &str, shown: &[Shown], metrics: &[Metric]) -> Result<()> {
    let pictures: Vec<[String; 3]> = shown.par_iter().map(pictures).collect::<Result<_>>()?;
    let _ = writeln!(page, "<section>\n<h2>{}</h2>\n<div class=\"pairs {class}\">", escaped(heading));
    for (shown, pictures) in shown.iter().zip(pictures) {
        *page += "<figure>\n<div class=\"three\">";
        for (name, picture) in ["original", "reconstruction", "error, four times as strong"].into_iter().zip(pictures) {
            let _ = write!(page, "<img alt=\"{name}\" title=\"{name}\" src=\"{picture}\">");
        }
        let figures: Vec<_> =
            metrics.iter().map(|&metric| format!("{} {}", metric.name(), text(&shown.record, metric))).collect();
        let _ = writeln!(
            page,
            "</div>\n<figcaption><span class=\"path\">{}</span> {}</figcaption>\n</figure>",
            escaped(&shown.record.path),
            escaped(&figures.join(" · "))
        );
    }
    *page += "</div>\n</section>\n";
    Ok(())
}

/// As addresses that hold them.
fn pictures(shown: &Shown) -> Result<[String; 3]> {
    let address = |image: &Rgb| -> Result<String> {
        let bytes = encode_jpeg(&fit(image, THUMBNAIL)?, QUALITY)?;
        Ok(format!("data:image/jpeg;base64,{}", STANDARD.encode(bytes)))
    };
    let error = sheet::error_map(&shown.original, &shown.image);
    Ok([address(&shown.original)?, address(&shown.image)?, address(&error)?])
}

fn table(page: &mut String, outcome: &Outcome) {
    let (all, rows) = (outcome.records.len(), outcome.records.len().min(ROWS));
    let few = match rows < all {
        true => format!("The worst {} of {}; eval.json has all. ", number(rows as f64), number(all as f64)),
        false => String::new(),
    };
    let metrics = outcome.metrics();
    let _ = writeln!(
        page,
        "<section>\n<h2>Every image</h2>\n<p class=\"remark\">{few}Click a heading to sort.</p>\n\
         <div class=\"wide\"><table>\n<thead><tr><th scope=\"col\"><button>image</button></th>"
    );
    for &metric in &metrics {
        let sorted = match (metric == outcome.worst_by, metric.rises()) {
            (false, _) => "",
            (true, true) => " aria-sort=\"ascending\"",
            (true, false) => " aria-sort=\"descending\"",
        };
        let _ = write!(
            page,
            "<th scope=\"col\" class=\"figure\"{sorted}><button>{}</button></th>",
            escaped(metric.label())
        );
    }
    *page += "</tr></thead>\n<tbody>\n";
    for record in &outcome.records[..rows] {
        let _ = write!(page, "<tr><td>{}</td>", escaped(&record.path));
        for &metric in &metrics {
            let _ = write!(page, "<td class=\"figure\">{}</td>", text(record, metric));
        }
        *page += "</tr>\n";
    }
    *page += "</tbody>\n</table></div>\n</section>\n";
}

/// A figure of an image, `–` where it has none.
fn text(record: &Record, metric: Metric) -> String {
    let decimals = metric.decimals();
    match record.get(metric) {
        None => "–".to_string(),
        Some(value) if value.is_infinite() => "∞".to_string(),
        Some(value) => format!("{value:.decimals$}"),
    }
}
