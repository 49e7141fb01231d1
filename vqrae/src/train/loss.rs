//! What training minimises in stage 1: the squared error of the pixels and the quantizer's own loss
//! (VQRAE, arXiv 2511.23386, §3.3; MODEL.md tells where its formulas and its tables disagree).

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

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

/// The terms of one batch, each a scalar.
#[derive(Debug, Clone)]
pub struct Terms {
    /// What is minimised.
    pub total: Tensor,
    /// Mean squared error of the normalised pixels.
    pub reconstruction: Tensor,
    /// The quantizer's loss.
    pub quantizer: Tensor,
}

impl Terms {
    /// The terms for pixels and their reconstruction, `[B, 3, H, W]` each, and the quantizer's loss.
    pub fn new(weights: &Weights, pixels: &Tensor, painted: &Tensor, quantizer: Tensor) -> Result<Self> {
        let reconstruction = (painted - pixels)?.sqr()?.mean_all()?;
        let total = ((&reconstruction * weights.reconstruction)? + (&quantizer * weights.quantizer)?)?;
        Ok(Self { total, reconstruction, quantizer })
    }
}
