//! Continuous features to codes and back.

mod common;
mod estimator;
pub mod kmeans;
mod simvq;
mod vq;

pub(crate) use common::FeatureNorm;
pub use common::{Metric, Norm};
pub use estimator::Gradient;
pub use simvq::{SimVq, SimVqConfig, TransformInit};
pub use vq::{CodebookInit, EmaConfig, Vq, VqConfig};

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::weights::Tensors;
use kmeans::Choose;

/// Which quantizer, and its sizes: the `quantizer` section of `config.json`, told apart by its `type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Config {
    /// SimVQ, as the paper has it.
    SimVq(SimVqConfig),
    /// VQ, whose codes learn by gradient or are moving averages.
    Vq(VqConfig),
}

impl Config {
    /// Number K of codes.
    pub fn codebook_size(&self) -> usize {
        match self {
            Self::SimVq(config) => config.codebook_size,
            Self::Vq(config) => config.codebook_size,
        }
    }

    /// Width e of a code.
    pub fn codebook_dim(&self) -> usize {
        match self {
            Self::SimVq(config) => config.codebook_dim,
            Self::Vq(config) => config.codebook_dim,
        }
    }

    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self {
            Self::SimVq(config) => config.check(),
            Self::Vq(config) => config.check(),
        }
    }

    /// Whether a tensor, by its name below the quantizer's, never changes in training.
    pub fn is_frozen(&self, name: &str) -> bool {
        matches!(self, Self::SimVq(config) if name == "codebook" && !config.train_codebook)
    }

    /// Whether a tensor, by its name below the quantizer's, is a moving average, which [`Quantizer::update`] moves and no
    /// gradient.
    pub fn is_average(&self, name: &str) -> bool {
        matches!(self, Self::Vq(config) if config.is_average(name))
    }
}

/// What quantising features gives.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// The decoder's input, `[B, N, D']`; its gradient reaches the features as the config's `gradient` says.
    pub tokens: Tensor,
    /// The codes, u32 `[B, N]`.
    pub indices: Tensor,
    /// The projected features before quantisation, `[B, N, e]`.
    pub projected: Tensor,
    /// The codes' vectors, `[B, N, e]`, with their own gradient to the codebook.
    pub codes: Tensor,
}

/// A quantizer with its weights.
#[derive(Debug, Clone)]
pub enum Quantizer {
    /// SimVQ, as the paper has it.
    SimVq(SimVq),
    /// VQ, whose codes learn by gradient or are moving averages.
    Vq(Vq),
}

impl Quantizer {
    /// Loads the quantizer that `config` names, between features `width_in` wide and a decoder `width_out` wide.
    pub fn load(vb: VarBuilder, config: &Config, width_in: usize, width_out: usize) -> Result<Self> {
        match config {
            Config::SimVq(config) => SimVq::load(vb, config, width_in, width_out).map(Self::SimVq),
            Config::Vq(config) => Vq::load(vb, config, width_in, width_out).map(Self::Vq),
        }
    }

    /// The nearest code of every feature. Features that are NaN or infinite are an error.
    ///
    /// # Shapes
    /// - features: `[B, N, D]`
    pub fn quantize(&self, features: &Tensor) -> Result<Quantized> {
        match self {
            Self::SimVq(quantizer) => quantizer.quantize(features),
            Self::Vq(quantizer) => quantizer.quantize(features),
        }
    }

    /// The decoder's input for given codes: bit for bit the `tokens` of [`Quantizer::quantize`].
    ///
    /// # Shapes
    /// - indices: u32 `[B, N]`
    /// - output: `[B, N, D']`
    pub fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        match self {
            Self::SimVq(quantizer) => quantizer.lookup(indices),
            Self::Vq(quantizer) => quantizer.lookup(indices),
        }
    }

    /// The quantizer's training loss, a scalar.
    pub fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        match self {
            Self::SimVq(quantizer) => quantizer.loss(quantized),
            Self::Vq(quantizer) => quantizer.loss(quantized),
        }
    }

    /// What a training step makes of the moving averages: new values by name, empty without any. To be called with what
    /// the step quantised, after it; `choose` draws features that replace dead codes.
    pub fn update(&self, quantized: &Quantized, choose: Choose) -> Result<Tensors> {
        match self {
            Self::Vq(quantizer) => quantizer.update(quantized, choose),
            Self::SimVq(_) => Ok(Tensors::new()),
        }
    }

    /// First values, by name, of a codebook that starts from features and has not yet: to be called before the first
    /// training step. Empty for any other, which does not ask for `features`; `choose` draws of them.
    ///
    /// # Shapes
    /// - features: `[B, N, D]`
    pub fn first(&self, features: impl FnOnce() -> Result<Tensor>, choose: Choose) -> Result<Tensors> {
        match self {
            Self::Vq(quantizer) => quantizer.first(features, choose),
            Self::SimVq(_) => Ok(Tensors::new()),
        }
    }

    /// The vectors that features are compared with, `[K, e]`.
    pub fn codebook(&self) -> Result<Tensor> {
        match self {
            Self::SimVq(quantizer) => quantizer.codebook(),
            Self::Vq(quantizer) => quantizer.codebook(),
        }
    }
}
