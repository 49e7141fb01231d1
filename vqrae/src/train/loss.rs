//! What training minimises: terms by name, each a mean over the batch, and their weighted sum (VQRAE, arXiv 2511.23386,
//! §3.3; in its stage 2 a distillation joins them, see [`stage`](super::stage)).

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::stage::Target;
use crate::quantizer::{Quantized, Quantizer};

/// The weights of the terms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Weights {
    /// Of the mean squared error of the pixels, in the normalised range.
    pub reconstruction: f64,
    /// Of the quantizer's loss.
    pub quantizer: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { reconstruction: 1.0, quantizer: 1.0 }
    }
}

/// What the terms are computed of: one batch, or one part of it where gradients are accumulated.
#[derive(Debug)]
pub struct Seen<'a> {
    /// The pixels to paint, normalised, `[B, 3, H', W']`.
    pub pixels: &'a Tensor,
    /// What was painted, in the same range and shape.
    pub painted: &'a Tensor,
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

/// The losses of a run. Networks of their own (perceptual ones, a discriminator) belong here, each a term more.
#[derive(Debug, Clone)]
pub struct Losses {
    weights: Weights,
    /// What distillation compares, and its weight.
    distillation: Option<(Target, f64)>,
}

/// The terms of one batch, each a scalar.
#[derive(Debug, Clone)]
pub struct Terms {
    /// What is minimised: the weighted sum.
    pub total: Tensor,
    /// Every term before its weight, by name; `reconstruction` is the mean squared error of the normalised pixels.
    pub named: Vec<(&'static str, Tensor)>,
}

/// The name of the mean squared error of the pixels.
pub(super) const RECONSTRUCTION: &str = "reconstruction";

impl Losses {
    /// With these weights, and a distillation if there is one.
    pub fn new(weights: Weights, distillation: Option<(Target, f64)>) -> Self {
        Self { weights, distillation }
    }

    /// The weighted terms of the pixels alone, which an adversarial loss is weighed against.
    pub fn of_pixels(&self, pixels: &Tensor, painted: &Tensor) -> Result<Tensor> {
        (painted - pixels)?.sqr()?.mean_all()? * self.weights.reconstruction
    }

    /// The terms of what was seen.
    pub fn terms(&self, seen: &Seen) -> Result<Terms> {
        let reconstruction = (seen.painted - seen.pixels)?.sqr()?.mean_all()?;
        let quantizer = seen.quantizer.loss(seen.quantized)?;
        let mut total = ((&reconstruction * self.weights.reconstruction)? + (&quantizer * self.weights.quantizer)?)?;
        let mut named = vec![(RECONSTRUCTION, reconstruction), ("quantizer", quantizer)];
        if let Some((target, weight)) = self.distillation {
            let term = target.compare(seen)?;
            total = (total + (&term * weight)?)?;
            named.push(("distillation", term));
        }
        Ok(Terms { total, named })
    }
}
