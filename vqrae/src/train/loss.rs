//! What training minimises: the error of the pixels, what networks that have learnt to see make of it, and the quantizer's
//! own loss, each a mean over the batch, and their weighted sum (VQRAE, arXiv 2511.23386, §3.3, and TiTok's code, from which
//! its perceptual terms come; in stage 2 a distillation joins them, see [`stage`](super::stage)).

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::stage::Target;
use crate::error::Result;
use crate::image::Preprocessor;
use crate::perceptual::{Backbone, ConvNext, Lpips};
use crate::quantizer::{Quantized, Quantizer};

/// The weights of the terms; a term of weight zero is not computed, except the first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Weights {
    /// Of the mean squared error of the pixels, in the normalised range.
    pub reconstruction: f64,
    /// Of the mean absolute error of the pixels, in the normalised range; 0.
    #[serde(skip_serializing_if = "is_zero")]
    pub l1: f64,
    /// Of the quantizer's loss.
    pub quantizer: f64,
    /// LPIPS; none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perceptual: Option<Perceptual>,
    /// The mean squared difference of ConvNeXt's logits; none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub convnext: Option<Logits>,
}

impl Default for Weights {
    fn default() -> Self {
        Self { reconstruction: 1.0, l1: 0.0, quantizer: 1.0, perceptual: None, convnext: None }
    }
}

/// LPIPS as a term: `perceptual = { weight = 1.0, weights = "lpips_vgg16.safetensors" }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Perceptual {
    /// Of the mean over the images.
    pub weight: f64,
    /// The file, which `weights/convert_lpips.py` makes.
    pub weights: PathBuf,
    /// The network: `vgg16`, or `alex`; VGG16.
    #[serde(default = "vgg16")]
    pub network: Backbone,
}

/// ConvNeXt's logits as a term: `convnext = { weight = 0.1, weights = "convnext_small.safetensors" }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logits {
    /// Of the mean over images and classes.
    pub weight: f64,
    /// The file, which `weights/convert_convnext.py` makes.
    pub weights: PathBuf,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

fn vgg16() -> Backbone {
    Backbone::Vgg16
}

impl Weights {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let named = [
            ("reconstruction", Some(self.reconstruction)),
            ("l1", Some(self.l1)),
            ("quantizer", Some(self.quantizer)),
            ("perceptual.weight", self.perceptual.as_ref().map(|term| term.weight)),
            ("convnext.weight", self.convnext.as_ref().map(|term| term.weight)),
        ];
        let wrong = |weight: f64| !(weight.is_finite() && weight >= 0.0);
        match named.into_iter().find(|(_, weight)| weight.is_some_and(wrong)) {
            Some((name, weight)) => Err(format!("loss.{name} is {}, expected: 0 or more", weight.unwrap_or_default())),
            None => Ok(()),
        }
    }
}

/// What the terms are computed of: one batch, or one part of it where gradients are accumulated.
#[derive(Debug)]
pub struct Seen<'a> {
    /// The pixels to paint, normalised, `[B, 3, H', W']`.
    pub pixels: &'a Tensor,
    /// What was painted, in the same range and shape.
    pub painted: &'a Tensor,
    /// What says how they are normalised.
    pub preprocessor: &'a Preprocessor,
    /// The encoder's output `[B, N, D]`, two states side by side where features are fused of them.
    pub states: &'a Tensor,
    /// The features that were quantised, `[B, N, D]`.
    pub features: &'a Tensor,
    /// What quantising them gave.
    pub quantized: &'a Quantized,
    /// What has quantised them.
    pub quantizer: &'a Quantizer,
    /// The frozen teacher's output for the same pixels, in the shape of `states`.
    pub teacher: Option<&'a Tensor>,
}

/// The losses of a run: the weights, and the networks that some terms need.
#[derive(Debug)]
pub struct Losses {
    weights: Weights,
    lpips: Option<(f64, Lpips)>,
    convnext: Option<(f64, ConvNext)>,
    /// What distillation compares, and its weight.
    distillation: Option<(Target, f64)>,
}

/// The name of the mean squared error of the pixels.
pub(super) const RECONSTRUCTION: &str = "reconstruction";

impl Losses {
    /// Reads the networks that the weights ask for; with a distillation if there is one.
    ///
    /// # Errors
    /// If a file is missing or is not such a network.
    pub fn open(weights: &Weights, distillation: Option<(Target, f64)>, device: &Device) -> Result<Self> {
        let lpips = match weights.perceptual.as_ref().filter(|term| term.weight > 0.0) {
            Some(term) => Some((term.weight, Lpips::open(&term.weights, term.network, device)?)),
            None => None,
        };
        let convnext = match weights.convnext.as_ref().filter(|term| term.weight > 0.0) {
            Some(term) => Some((term.weight, ConvNext::open(&term.weights, device)?)),
            None => None,
        };
        Ok(Self { weights: weights.clone(), lpips, convnext, distillation })
    }

    /// The terms of what was seen.
    pub fn terms(&self, seen: &Seen) -> candle_core::Result<Terms> {
        let quantizer = seen.quantizer.loss(seen.quantized)?;
        let mut terms = self.of_pixels(seen.preprocessor, seen.pixels, seen.painted, quantizer)?;
        if let Some((target, weight)) = self.distillation {
            terms.add("distillation", weight, target.compare(seen)?)?;
        }
        Ok(terms)
    }

    /// The terms for pixels and their reconstruction, `[B, 3, H, W]` each as `preprocessor` normalises them, and the
    /// quantizer's loss. What the networks see of the reconstruction is not clamped, so that every pixel has a gradient.
    pub fn of_pixels(
        &self,
        preprocessor: &Preprocessor,
        pixels: &Tensor,
        painted: &Tensor,
        quantizer: Tensor,
    ) -> candle_core::Result<Terms> {
        let pixels = &pixels.detach();
        let difference = (painted - pixels)?;
        let reconstruction = difference.sqr()?.mean_all()?;
        let total = (&reconstruction * self.weights.reconstruction)?;
        let mut terms = Terms { total, named: vec![(RECONSTRUCTION, reconstruction)] };
        terms.add("quantizer", self.weights.quantizer, quantizer)?;
        if self.weights.l1 > 0.0 {
            terms.add("l1", self.weights.l1, difference.abs()?.mean_all()?)?;
        }
        if self.lpips.is_none() && self.convnext.is_none() {
            return Ok(terms);
        }
        let unit = |x: &Tensor| {
            let [mean, std] = preprocessor.unit_mean_and_std().map(|values| Tensor::new(&values, x.device()));
            x.broadcast_mul(&std?.reshape((1, 3, 1, 1))?)?.broadcast_add(&mean?.reshape((1, 3, 1, 1))?)
        };
        let (pixels, painted) = (unit(pixels)?, unit(painted)?);
        if let Some((weight, lpips)) = &self.lpips {
            let signed = |x: &Tensor| x.affine(2.0, -1.0);
            let distances = lpips.forward(&signed(&painted)?, &signed(&pixels)?)?;
            terms.add("perceptual", *weight, distances.mean_all()?)?;
        }
        if let Some((weight, convnext)) = &self.convnext {
            let logits = (convnext.forward(&painted)? - convnext.forward(&pixels)?)?;
            terms.add("convnext", *weight, logits.sqr()?.mean_all()?)?;
        }
        Ok(terms)
    }
}

/// The terms of one batch, each a scalar.
#[derive(Debug, Clone)]
pub struct Terms {
    /// What is minimised.
    pub total: Tensor,
    /// All of them before their weights, by their names in the config.
    pub named: Vec<(&'static str, Tensor)>,
}

impl Terms {
    /// Adds one more, `weight` times.
    pub fn add(&mut self, name: &'static str, weight: f64, value: Tensor) -> candle_core::Result<()> {
        self.total = (&self.total + (&value * weight)?)?;
        self.named.push((name, value));
        Ok(())
    }
}
