//! Continuous features to codes and back.

mod simvq;

pub use simvq::{Metric, SimVq, SimVqConfig, TransformInit};

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// Which quantizer, and its sizes: the `quantizer` section of `config.json`, told apart by its `type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Config {
    /// SimVQ, as the paper has it.
    SimVq(SimVqConfig),
}

impl Config {
    /// Number K of codes.
    pub fn codebook_size(&self) -> usize {
        match self {
            Self::SimVq(config) => config.codebook_size,
        }
    }

    /// Width e of a code.
    pub fn codebook_dim(&self) -> usize {
        match self {
            Self::SimVq(config) => config.codebook_dim,
        }
    }

    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self {
            Self::SimVq(config) => config.check(),
        }
    }
}

/// What quantising features gives.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// The decoder's input, `[B, N, D']`; its gradient reaches the features straight through.
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
}

impl Quantizer {
    /// Loads the quantizer that `config` names, between features `width_in` wide and a decoder `width_out` wide.
    pub fn load(vb: VarBuilder, config: &Config, width_in: usize, width_out: usize) -> Result<Self> {
        match config {
            Config::SimVq(config) => SimVq::load(vb, config, width_in, width_out).map(Self::SimVq),
        }
    }

    /// The nearest code of every feature. Features that are NaN or infinite are an error.
    ///
    /// # Shapes
    /// - features: `[B, N, D]`
    pub fn quantize(&self, features: &Tensor) -> Result<Quantized> {
        match self {
            Self::SimVq(quantizer) => quantizer.quantize(features),
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
        }
    }

    /// The quantizer's training loss, a scalar.
    pub fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        match self {
            Self::SimVq(quantizer) => quantizer.loss(quantized),
        }
    }

    /// The vectors that features are compared with, `[K, e]`.
    pub fn codebook(&self) -> Result<Tensor> {
        match self {
            Self::SimVq(quantizer) => quantizer.codebook(),
        }
    }
}
