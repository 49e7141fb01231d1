//! What an evaluation found, as files and in words.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value, json};
use vqrae::codes::write_whole;
use vqrae::image::Rgb;
use vqrae::metrics::CodeCounts;

use super::gallery::{Gallery, worse_first};
use super::judge::{Judge, Metric, Record, Spread};
use super::page;
use super::protocol::Protocol;
use crate::figure::number;
use crate::output::save_png;
use crate::report::{self, Summary};
use crate::sheet;

/// Below this an FID says more of the number of images than of their quality.
const FEW: u64 = 10_000;

/// What was measured.
#[derive(Debug)]
pub(crate) enum Subject {
    /// A model's reconstructions.
    Model { id: String, dtype: String },
    /// Images of one folder against those of another.
    Folders,
}

/// Codes that were used, and the pixels that they stand for.
#[derive(Debug)]
pub(crate) struct Codes {
    counts: CodeCounts,
    codes: u64,
    pixels: u64,
}

/// The same in figures.
#[derive(Serialize, Debug, Clone)]
pub(crate) struct CodeFigures {
    /// Share of the codes that were chosen at least once.
    pub(crate) usage: f64,
    pub(crate) perplexity: f64,
    pub(crate) codes: u64,
    /// log2 K · codes / pixels.
    pub(crate) bits_per_pixel: f64,
    /// The same with the codes' entropy for log2 K: what an ideal entropy coder needs that knows how often each is used.
    pub(crate) entropy_bits_per_pixel: f64,
}

impl Codes {
    pub(crate) fn new(counts: CodeCounts) -> Self {
        Self { counts, codes: 0, pixels: 0 }
    }

    /// The codes of one image.
    pub(crate) fn add(&mut self, indices: &[u32], image: &Rgb) {
        self.counts.add(indices);
        self.codes += indices.len() as u64;
        self.pixels += (image.width * image.height) as u64;
    }

    fn figures(&self) -> CodeFigures {
        let a_pixel = self.codes as f64 / self.pixels.max(1) as f64;
        let size = self.counts.counts().len().max(1) as f64;
        CodeFigures {
            usage: self.counts.usage(),
            perplexity: self.counts.perplexity(),
            codes: self.codes,
            bits_per_pixel: size.log2() * a_pixel,
            entropy_bits_per_pixel: self.counts.bits() * a_pixel,
        }
    }
}

/// A figure that was not measured, and what it takes.
#[derive(Serialize, Debug, Clone)]
pub(crate) struct LeftOut {
    pub(crate) what: &'static str,
    pub(crate) next_step: &'static str,
}

/// All that was found.
pub(crate) struct Outcome {
    pub(crate) protocol: Protocol,
    pub(crate) subject: Subject,
    pub(crate) spreads: Vec<Spread>,
    pub(crate) fid: Option<f64>,
    pub(crate) codes: Option<CodeFigures>,
    pub(crate) left_out: Vec<LeftOut>,
    pub(crate) worst_by: Metric,
    /// The worst first.
    pub(crate) records: Vec<Record>,
    pub(crate) gallery: Gallery,
}

/// `eval.json` but for its last field, the images one a line.
#[derive(Serialize)]
struct File<'a> {
    tool: &'static str,
    version: &'static str,
    protocol: &'a Protocol,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<Value>,
    images: usize,
    metrics: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rfid: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    codes: Option<&'a CodeFigures>,
    left_out: &'a [LeftOut],
    worst_by: &'static str,
}

/// The line on stdout.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    protocol: &'static str,
    #[serde(flatten)]
    means: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rfid: Option<f64>,
    #[serde(flatten)]
    codes: Option<&'a CodeFigures>,
}

impl Outcome {
    /// Of all that was measured; computes the FID.
    pub(crate) fn of(
        judge: Judge,
        gallery: Gallery,
        worst_by: Metric,
        protocol: Protocol,
        subject: Subject,
        codes: Option<Codes>,
    ) -> Result<Self> {
        let (fid, metrics) = (judge.fid()?, judge.metrics());
        let mut records = judge.records;
        records.sort_by(|a, b| worse_first(a, b, worst_by));
        let spreads: Vec<Spread> = metrics.into_iter().map(|metric| Spread::of(&records, metric)).collect();
        let left_out = left_out(&spreads, fid, records.len());
        let codes = codes.map(|codes| codes.figures());
        Ok(Self { protocol, subject, spreads, fid, codes, left_out, worst_by, records, gallery })
    }

    /// The metrics that were measured.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        self.spreads.iter().map(|spread| spread.metric).collect()
    }

    /// What is to be said of an FID of so few images.
    pub(crate) fn fid_note(&self) -> Option<String> {
        let images = self.records.len();
        (self.fid.is_some() && (images as u64) < FEW).then(|| {
            format!(
                "of {} images: with fewer images the FID is higher, whatever they show; compare values of one number of images",
                number(images as f64)
            )
        })
    }

    /// Writes all files.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let pairs: Vec<(Rgb, Rgb)> =
            self.gallery.worst.iter().map(|shown| (shown.original.clone(), shown.image.clone())).collect();
        if let Some(sheet) = sheet::compose(&pairs) {
            save_png(&folder.join("worst.png"), &sheet)?;
        }
        write_whole(folder.join("report.html"), page::html(self)?.as_bytes())?;
        Ok(write_whole(folder.join("eval.json"), self.json()?.as_bytes())?)
    }

    fn json(&self) -> Result<String> {
        let file = File {
            tool: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            protocol: &self.protocol,
            model: match &self.subject {
                Subject::Model { id, dtype } => Some(json!({ "id": id, "dtype": dtype })),
                Subject::Folders => None,
            },
            images: self.records.len(),
            metrics: self.spreads.iter().map(|spread| (spread.metric.key().to_string(), spread.json())).collect(),
            rfid: self.fid,
            codes: self.codes.as_ref(),
            left_out: &self.left_out,
            worst_by: self.worst_by.key(),
        };
        let mut text = serde_json::to_string_pretty(&file)?;
        text.truncate(text.trim_end_matches(['}', '\n']).len());
        text += ",\n  \"per_image\": [";
        let metrics = self.metrics();
        for (i, record) in self.records.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            let _ = write!(text, "{comma}\n    {}", record.json(&metrics));
        }
        Ok(text + "\n  ]\n}\n")
    }

    /// The table for people on stderr, and the line for machines on stdout.
    pub(crate) fn tell(&self, folder: &Path, summary: &Summary) -> Result<()> {
        report::say(&self.table());
        report::say(&format!(
            "figures of every image, and pictures of the worst: {}",
            folder.join("report.html").display()
        ));
        let mean = |spread: &Spread| (spread.metric.key().to_string(), json!(spread.mean()));
        let line = Line {
            summary,
            protocol: self.protocol.name,
            means: self.spreads.iter().map(mean).collect(),
            rfid: self.fid,
            codes: self.codes.as_ref(),
        };
        report::data(&serde_json::to_string(&line)?);
        Ok(())
    }

    fn table(&self) -> String {
        let mut text = String::new();
        let protocol = &self.protocol;
        let _ = writeln!(text, "protocol {}: {} images", protocol.name, number(self.records.len() as f64));
        for (name, words) in protocol.lines() {
            let _ = writeln!(text, "  {name:<10} {words}");
        }
        let _ = writeln!(text, "{:<14} {:>9} {:>9} {:>9} {:>9}", "", "mean", "worst", "median", "best");
        for spread in &self.spreads {
            let decimals = spread.metric.decimals();
            let shown = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.decimals$}"));
            let ends = [spread.quantile(0.0), spread.quantile(1.0)];
            let (worst, best) = if spread.metric.rises() { (ends[0], ends[1]) } else { (ends[1], ends[0]) };
            let cells = [spread.mean(), worst, spread.quantile(0.5), best].map(shown);
            let [mean, worst, median, best] = &cells;
            let _ = write!(text, "{:<14} {mean:>9} {worst:>9} {median:>9} {best:>9}", spread.metric.label());
            let missing = self.records.len() - spread.values.len() - spread.equal;
            if missing > 0 {
                let _ = write!(text, "  ({missing} images are too small)");
            }
            if spread.equal > 0 {
                let _ = write!(text, "  ({} equal images left out)", spread.equal);
            }
            text.push('\n');
        }
        if let Some(fid) = self.fid {
            let note = self.fid_note().map_or(String::new(), |note| format!("  ({note})"));
            let _ = writeln!(text, "{:<14} {fid:>9.3}{note}", "rFID");
        }
        if let Some(codes) = &self.codes {
            let _ = writeln!(
                text,
                "codes          {:.2} % in use, perplexity {:.1}, {:.5} bits per pixel ({:.5} by entropy)",
                100.0 * codes.usage,
                codes.perplexity,
                codes.bits_per_pixel,
                codes.entropy_bits_per_pixel
            );
        }
        for LeftOut { what, next_step } in &self.left_out {
            let _ = writeln!(text, "left out: {what}; {next_step}");
        }
        text.trim_end().to_string()
    }
}

/// What was not measured.
fn left_out(spreads: &[Spread], fid: Option<f64>, images: usize) -> Vec<LeftOut> {
    let has = |metric: Metric| spreads.iter().any(|spread| spread.metric == metric);
    let mut left_out = Vec::new();
    if !has(Metric::LpipsVgg) {
        let next_step = "pass --lpips-vgg FILE; `python weights/convert_lpips.py FOLDER` makes lpips_vgg16.safetensors";
        left_out.push(LeftOut { what: "LPIPS (VGG)", next_step });
    }
    if !has(Metric::LpipsAlex) {
        let next_step = "pass --lpips-alex FILE; `python weights/convert_lpips.py FOLDER` makes lpips_alex.safetensors";
        left_out.push(LeftOut { what: "LPIPS (Alex)", next_step });
    }
    if fid.is_none() {
        let next_step = match images {
            0 | 1 => "it wants at least two images",
            _ => "pass --inception FILE; `python weights/convert_inception.py FILE` makes it",
        };
        left_out.push(LeftOut { what: "rFID", next_step });
    }
    left_out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_per_pixel_by_hand() {
        // 2 codes of 4 for 2×2 pixels: 2 · 2 / 4 bits; one of each of two codes: 1 bit each.
        let mut codes = Codes::new(CodeCounts::new(4, 1));
        codes.add(&[0, 3], &Rgb { width: 2, height: 2, data: vec![0; 12] });
        let figures = codes.figures();
        assert_eq!((figures.usage, figures.codes, figures.bits_per_pixel), (0.5, 2, 1.0));
        assert!((figures.perplexity - 2.0).abs() < 1e-12 && (figures.entropy_bits_per_pixel - 0.5).abs() < 1e-12);
    }
}
