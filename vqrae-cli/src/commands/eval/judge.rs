//! Figures of pairs of images: those of each pair, and those of all together.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use vqrae::image::Rgb;
use vqrae::metrics::{self, Statistics};
use vqrae::perceptual::{Backbone, FidInput, Inception, Lpips};
use vqrae::{Device, Tensor};

use crate::alike::Alike;

/// Pixels that go through the networks of LPIPS at once, about: what VGG16 makes of them takes some hundreds of MiB.
const PIXELS: usize = 4 * 256 * 256;

/// Images that go through Inception at once.
const IMAGES: usize = 8;

/// A figure that each image has.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Peak signal-to-noise ratio, dB
    Psnr,
    /// Structural similarity
    Ssim,
    /// Structural similarity on five scales
    MsSsim,
    /// Perceptual distance of VGG16's features
    LpipsVgg,
    /// Perceptual distance of AlexNet's features
    LpipsAlex,
}

impl Metric {
    /// In the order in which they are shown.
    pub(crate) const ALL: [Self; 5] = [Self::Psnr, Self::Ssim, Self::MsSsim, Self::LpipsVgg, Self::LpipsAlex];

    /// In files.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Psnr => "psnr",
            Self::Ssim => "ssim",
            Self::MsSsim => "ms_ssim",
            Self::LpipsVgg => "lpips_vgg",
            Self::LpipsAlex => "lpips_alex",
        }
    }

    /// For people.
    pub(crate) fn name(self) -> &'static str {
        if self == Self::Psnr { "PSNR" } else { self.label() }
    }

    /// The same with its unit.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Psnr => "PSNR, dB",
            Self::Ssim => "SSIM",
            Self::MsSsim => "MS-SSIM",
            Self::LpipsVgg => "LPIPS (VGG)",
            Self::LpipsAlex => "LPIPS (Alex)",
        }
    }

    /// Digits after the point that mean something.
    pub(crate) fn decimals(self) -> usize {
        if self == Self::Psnr { 2 } else { 4 }
    }

    /// Whether more is better.
    pub(crate) fn rises(self) -> bool {
        matches!(self, Self::Psnr | Self::Ssim | Self::MsSsim)
    }
}

/// The figures of one pair; `None` where an image is too small for a measure or its weights were not given.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// The image's relative path.
    pub(crate) path: String,
    values: [Option<f64>; Metric::ALL.len()],
}

impl Record {
    pub(crate) fn get(&self, metric: Metric) -> Option<f64> {
        self.values[metric as usize]
    }

    /// The larger the worse; what has no such figure is never the worst.
    pub(crate) fn badness(&self, metric: Metric) -> f64 {
        self.get(metric).map_or(f64::NEG_INFINITY, |value| if metric.rises() { -value } else { value })
    }

    /// As `eval.json` has it: a PSNR of equal images, which is infinite, is `null`, and so is what is missing.
    pub(crate) fn json(&self, metrics: &[Metric]) -> Value {
        let mut fields = Map::new();
        fields.insert("path".to_string(), json!(self.path));
        for &metric in metrics {
            let rounded = self.get(metric).map(|value| (value * 1e6).round() / 1e6);
            fields.insert(metric.key().to_string(), json!(rounded));
        }
        Value::Object(fields)
    }
}

#[cfg(test)]
impl Record {
    /// With this figure alone.
    pub(crate) fn with_psnr(path: &str, psnr: f64) -> Self {
        Self { path: path.to_string(), values: [Some(psnr), None, None, None, None] }
    }
}

/// The networks that were given.
#[derive(Default)]
pub(crate) struct Networks {
    pub(crate) vgg: Option<Lpips>,
    pub(crate) alex: Option<Lpips>,
    pub(crate) inception: Option<(Inception, FidInput)>,
}

impl Networks {
    /// Reads the files that were named.
    pub(crate) fn open(files: [Option<&PathBuf>; 3], input: FidInput, device: &Device) -> Result<Self> {
        let lpips = |file: Option<&PathBuf>, backbone| file.map(|file| Lpips::open(file, backbone, device)).transpose();
        let inception = files[2].map(|file| Inception::open(file, device)).transpose()?;
        Ok(Self {
            vgg: lpips(files[0], Backbone::Vgg16)?,
            alex: lpips(files[1], Backbone::Alex)?,
            inception: inception.map(|inception| (inception, input)),
        })
    }

    /// The metrics that can be measured.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let has = |metric: &Metric| match metric {
            Metric::LpipsVgg => self.vgg.is_some(),
            Metric::LpipsAlex => self.alex.is_some(),
            _ => true,
        };
        Metric::ALL.into_iter().filter(has).collect()
    }
}

/// Measures pairs of images, and remembers figures alone.
pub(crate) struct Judge {
    networks: Networks,
    device: Device,
    pub(crate) records: Vec<Record>,
    /// Features of the originals and of the images.
    features: Option<[Statistics; 2]>,
}

/// An original and what is compared with it, of one size.
pub(crate) type Pair = (Rgb, Rgb);

impl Judge {
    pub(crate) fn new(networks: Networks, device: Device) -> Self {
        let statistics = |(inception, _): &(Inception, FidInput)| [(); 2].map(|()| Statistics::new(inception.width()));
        let features = networks.inception.as_ref().map(statistics);
        Self { networks, device, records: Vec::new(), features }
    }

    pub(crate) fn metrics(&self) -> Vec<Metric> {
        self.networks.metrics()
    }

    /// Measures pairs, whose images have these relative paths.
    pub(crate) fn add(&mut self, paths: Vec<String>, pairs: &[&Pair]) -> Result<()> {
        let plain = |(a, b): &&Pair| {
            let (ssim, ms_ssim) = metrics::ssim_and_ms_ssim(a, b);
            [metrics::psnr(a, b), ssim, ms_ssim]
        };
        let plain: Vec<_> = pairs.par_iter().map(plain).collect();
        let vgg = self.lpips(self.networks.vgg.as_ref(), Backbone::Vgg16, pairs)?;
        let alex = self.lpips(self.networks.alex.as_ref(), Backbone::Alex, pairs)?;
        self.add_features(pairs)?;
        for (i, path) in paths.into_iter().enumerate() {
            let [psnr, ssim, ms_ssim] = plain[i];
            self.records.push(Record { path, values: [psnr, ssim, ms_ssim, vgg[i], alex[i]] });
        }
        Ok(())
    }

    fn lpips(&self, network: Option<&Lpips>, backbone: Backbone, pairs: &[&Pair]) -> Result<Vec<Option<f64>>> {
        let Some(network) = network else { return Ok(vec![None; pairs.len()]) };
        let size = |(original, _): &&Pair| (original.height, original.width);
        let most = pairs.iter().map(|pair| size(pair).0 * size(pair).1).max().unwrap_or(1);
        let measure = |alike: &[&&Pair]| {
            let (h, w) = size(alike[0]);
            if h.min(w) < backbone.least_side() {
                return Ok(vec![None; alike.len()]);
            }
            let of = |image: fn(&Pair) -> &Rgb| self.signed(alike.iter().map(|pair| image(pair)), (h, w));
            let distances = network.forward(&of(|pair| &pair.0)?, &of(|pair| &pair.1)?)?;
            Ok(distances.to_vec1::<f32>()?.into_iter().map(|distance| Some(f64::from(distance))).collect())
        };
        Alike::of(pairs, PIXELS / most, size, measure)?.into_items(Ok)
    }

    /// Images of one size in −1..1, `[B, 3, H, W]`.
    fn signed<'a>(&self, images: impl Iterator<Item = &'a Rgb>, (h, w): (usize, usize)) -> Result<Tensor> {
        let bytes: Vec<u8> = images.flat_map(|image| image.data.iter().copied()).collect();
        let count = bytes.len() / (3 * h * w);
        let bytes = Tensor::from_vec(bytes, (count, h, w, 3), &self.device)?;
        let levels: Vec<f32> = (0..3 * 256).map(|i| (i % 256) as f32 / 127.5 - 1.0).collect();
        Ok(vqrae::ops::pixels(&bytes, &Tensor::from_vec(levels, (3, 256), &self.device)?)?)
    }

    fn add_features(&mut self, pairs: &[&Pair]) -> Result<()> {
        let (Some((inception, input)), Some([of_originals, of_images])) =
            (&self.networks.inception, &mut self.features)
        else {
            return Ok(());
        };
        for pairs in pairs.chunks(IMAGES) {
            let originals: Vec<&Rgb> = pairs.iter().map(|(original, _)| original).collect();
            let images: Vec<&Rgb> = pairs.iter().map(|(_, image)| image).collect();
            of_originals.add(&inception.features(&originals, *input)?)?;
            of_images.add(&inception.features(&images, *input)?)?;
        }
        Ok(())
    }

    /// The rFID of all that was measured, if there is a network for it and there are two images.
    pub(crate) fn fid(&self) -> Result<Option<f64>> {
        match &self.features {
            Some([originals, images]) if images.count() > 1 => Ok(Some(metrics::fid(originals, images)?)),
            _ => Ok(None),
        }
    }
}

/// One metric over all images.
#[derive(Debug, Clone)]
pub(crate) struct Spread {
    pub(crate) metric: Metric,
    /// Finite values, ascending.
    pub(crate) values: Vec<f64>,
    /// Pairs of equal images, whose PSNR is infinite.
    pub(crate) equal: usize,
}

impl Spread {
    pub(crate) fn of(records: &[Record], metric: Metric) -> Self {
        let (mut values, mut equal) = (Vec::with_capacity(records.len()), 0);
        for value in records.iter().filter_map(|record| record.get(metric)) {
            if value.is_infinite() {
                equal += 1;
            } else {
                values.push(value);
            }
        }
        values.sort_by(f64::total_cmp);
        Self { metric, values, equal }
    }

    /// Over the finite values: each image counts alike.
    pub(crate) fn mean(&self) -> Option<f64> {
        (!self.values.is_empty()).then(|| self.values.iter().sum::<f64>() / self.values.len() as f64)
    }

    pub(crate) fn quantile(&self, q: f64) -> Option<f64> {
        vqrae::codebook::quantile(&self.values, q)
    }

    pub(crate) fn json(&self) -> Value {
        let mut facts = json!({
            "mean": self.mean(),
            "min": self.quantile(0.0),
            "median": self.quantile(0.5),
            "max": self.quantile(1.0),
            "images": self.values.len(),
        });
        if self.equal > 0 {
            facts["equal_images"] = json!(self.equal);
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(path: &str, psnr: f64, ssim: Option<f64>) -> Record {
        Record { path: path.to_string(), values: [Some(psnr), ssim, None, Some(0.5), None] }
    }

    #[test]
    fn equal_images_are_counted_beside_the_mean() {
        let records = [record("a", 20.0, None), record("b", f64::INFINITY, Some(1.0)), record("c", 30.0, Some(0.5))];
        let psnr = Spread::of(&records, Metric::Psnr);
        assert_eq!((psnr.mean(), psnr.equal, psnr.quantile(0.0)), (Some(25.0), 1, Some(20.0)));
        assert_eq!(Spread::of(&records, Metric::Ssim).mean(), Some(0.75));
        assert_eq!(Spread::of(&records, Metric::MsSsim).mean(), None);
        assert_eq!(records[1].json(&[Metric::Psnr, Metric::Ssim]), json!({ "path": "b", "psnr": null, "ssim": 1.0 }));
    }

    #[test]
    fn the_worst_has_the_lowest_psnr_or_the_highest_distance() {
        let (a, b) = (record("a", 20.0, None), record("b", 30.0, Some(0.1)));
        assert!(a.badness(Metric::Psnr) > b.badness(Metric::Psnr));
        assert!(a.badness(Metric::Ssim) < b.badness(Metric::Ssim), "what has no figure is never the worst");
        assert_eq!(a.badness(Metric::LpipsVgg), 0.5);
    }
}
