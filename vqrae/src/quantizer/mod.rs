//! Continuous features to codes and back.
//!
//! | `"type"` | what | codes a token, C |
//! |---|---|---|
//! | `simvq` | a frozen codebook through one learnable layer | 1 |
//! | `vq` | codes that learn by gradient or are moving averages | 1 |
//! | `fsq` | every dimension rounded to a few levels | 1 |
//! | `lfq` | every dimension's sign; `spherical`: BSQ | 1 |
//! | `residual` | L codebooks, each for what the ones before left | L |
//! | `product` | G groups of channels with codebooks of their own | G · L |
//!
//! **Shapes.** Indices are u32 `[B, N]` where C is 1 and `[B, N, C]` else; of an image `[h, w]` and `[h, w, C]`, in raster
//! order. Of several codes, those of a group stand together, the coarsest level first.

mod common;
mod estimator;
mod fsq;
pub mod kmeans;
mod lfq;
mod product;
mod residual;
mod shared;
mod simvq;
mod vq;

pub(crate) use common::FeatureNorm;
pub use common::{Metric, Norm};
pub use estimator::Gradient;
pub use fsq::{Fsq, FsqConfig};
pub use lfq::{Lfq, LfqConfig};
pub use product::{Product, ProductConfig};
pub use residual::{Residual, ResidualConfig};
pub use shared::{Between, Bottleneck, DROPPED};
pub use simvq::{SimVq, SimVqConfig, TransformInit};
pub use vq::{CodebookInit, EmaConfig, Vq, VqConfig};

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::ops::Linear;
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
    /// Finite scalar quantisation.
    Fsq(FsqConfig),
    /// Lookup-free quantisation, and BSQ.
    Lfq(LfqConfig),
    /// Residual quantisation.
    Residual(ResidualConfig),
    /// Product quantisation.
    Product(ProductConfig),
}

impl Config {
    /// Number K of codes; with several codes a token, of each of them.
    pub fn codebook_size(&self) -> usize {
        match self {
            Self::SimVq(config) => config.codebook_size,
            Self::Vq(config) => config.codebook_size,
            Self::Fsq(config) => config.codebook_size(),
            Self::Lfq(config) => config.codebook_size(),
            Self::Residual(config) => config.codebook_size,
            Self::Product(config) => config.group.codebook_size,
        }
    }

    /// Width e of what stands between `linear_in` and `linear_out`.
    pub fn codebook_dim(&self) -> usize {
        match self {
            Self::SimVq(config) => config.codebook_dim,
            Self::Vq(config) => config.codebook_dim,
            Self::Fsq(config) => config.levels.len(),
            Self::Lfq(config) => config.codebook_dim,
            Self::Residual(config) => config.codebook_dim,
            Self::Product(config) => config.width(),
        }
    }

    /// Number C of codes a token.
    pub fn codes_per_token(&self) -> usize {
        match self {
            Self::SimVq(_) | Self::Vq(_) | Self::Fsq(_) | Self::Lfq(_) => 1,
            Self::Residual(config) => config.levels,
            Self::Product(config) => config.groups * config.group.levels,
        }
    }

    /// Whether the tensor `quantizer.codebook`, if there is one, is trained.
    pub fn trains_codebook(&self) -> bool {
        match self {
            Self::SimVq(config) => config.train_codebook,
            Self::Vq(_) => true,
            Self::Fsq(_) | Self::Lfq(_) => false,
            Self::Residual(config) => config.train_codebook,
            Self::Product(config) => config.group.train_codebook,
        }
    }

    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self {
            Self::SimVq(config) => config.check(),
            Self::Vq(config) => config.check(),
            Self::Fsq(config) => config.check(),
            Self::Lfq(config) => config.check(),
            Self::Residual(config) => config.check(),
            Self::Product(config) => config.check(),
        }
    }

    /// Whether a tensor, by its name below the quantizer's, never changes in training.
    pub fn is_frozen(&self, name: &str) -> bool {
        name == "codebook" && !self.trains_codebook()
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
    /// The codes, u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`.
    pub indices: Tensor,
    /// The projected features before quantisation, `[B, N, e]`.
    pub projected: Tensor,
    /// The codes' vectors, `[B, N, e]`, with their own gradient to the codebook; of residual and product quantizers
    /// `[B, N, C, e]`, e being a single code's width.
    pub codes: Tensor,
}

/// A quantizer with its weights.
#[derive(Debug, Clone)]
pub enum Quantizer {
    /// SimVQ, as the paper has it.
    SimVq(SimVq),
    /// VQ, whose codes learn by gradient or are moving averages.
    Vq(Vq),
    /// Finite scalar quantisation.
    Fsq(Between<Fsq>),
    /// Lookup-free quantisation, and BSQ.
    Lfq(Between<Lfq>),
    /// Residual quantisation.
    Residual(Between<Residual>),
    /// Product quantisation.
    Product(Between<Product>),
}

/// What a quantizer is made of.
pub(crate) enum Parts<'a> {
    /// It does all by itself.
    SimVq(&'a SimVq),
    /// It does all by itself.
    Vq(&'a Vq),
    /// `linear_in`, what stands between, `linear_out`.
    Between(&'a Linear, &'a dyn Bottleneck, &'a Linear),
}

impl<'a, Q: Bottleneck> From<&'a Between<Q>> for Parts<'a> {
    fn from(around: &'a Between<Q>) -> Self {
        Self::Between(&around.linear_in, &around.inner, &around.linear_out)
    }
}

impl Quantizer {
    /// Loads the quantizer that `config` names, between features `width_in` wide and a decoder `width_out` wide.
    pub fn load(vb: VarBuilder, config: &Config, width_in: usize, width_out: usize) -> Result<Self> {
        let (vb, e) = (vb.to_dtype(DType::F32), config.codebook_dim());
        Ok(match config {
            Config::SimVq(config) => Self::SimVq(SimVq::load(vb, config, width_in, width_out)?),
            Config::Vq(config) => Self::Vq(Vq::load(vb, config, width_in, width_out)?),
            Config::Fsq(config) => Self::Fsq(Between::load(&vb, Fsq::new(config), e, width_in, width_out)?),
            Config::Lfq(config) => Self::Lfq(Between::load(&vb, Lfq::new(config), e, width_in, width_out)?),
            Config::Residual(config) => {
                Self::Residual(Between::load(&vb, Residual::load(&vb, config)?, e, width_in, width_out)?)
            }
            Config::Product(config) => {
                Self::Product(Between::load(&vb, Product::load(&vb, config)?, e, width_in, width_out)?)
            }
        })
    }

    pub(crate) fn parts(&self) -> Parts<'_> {
        match self {
            Self::SimVq(quantizer) => Parts::SimVq(quantizer),
            Self::Vq(quantizer) => Parts::Vq(quantizer),
            Self::Fsq(quantizer) => quantizer.into(),
            Self::Lfq(quantizer) => quantizer.into(),
            Self::Residual(quantizer) => quantizer.into(),
            Self::Product(quantizer) => quantizer.into(),
        }
    }

    /// The codes of every feature. Features that are NaN or infinite are an error.
    ///
    /// # Shapes
    /// - features: `[B, N, D]`
    pub fn quantize(&self, features: &Tensor) -> Result<Quantized> {
        self.quantize_with(features, None)
    }

    /// [`Quantizer::quantize`] as a training step does it: what is drawn at random, such as the levels that quantize
    /// dropout leaves out, follows from `seed` alone.
    pub fn quantize_in_training(&self, features: &Tensor, seed: u64) -> Result<Quantized> {
        self.quantize_with(features, Some(seed))
    }

    fn quantize_with(&self, features: &Tensor, dropout: Option<u64>) -> Result<Quantized> {
        match self.parts() {
            Parts::SimVq(quantizer) => quantizer.quantize(features),
            Parts::Vq(quantizer) => quantizer.quantize(features),
            Parts::Between(linear_in, inner, linear_out) => {
                let h = linear_in.forward(&features.to_dtype(DType::F32)?)?; // [B,N,e]
                let quantized = inner.quantize(&h, dropout)?;
                Ok(Quantized { tokens: linear_out.forward(&quantized.tokens)?, ..quantized })
            }
        }
    }

    /// The decoder's input for given codes: bit for bit the `tokens` of [`Quantizer::quantize`].
    ///
    /// # Shapes
    /// - indices: u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`
    /// - output: `[B, N, D']`
    pub fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        match self.parts() {
            Parts::SimVq(quantizer) => quantizer.lookup(indices),
            Parts::Vq(quantizer) => quantizer.lookup(indices),
            Parts::Between(_, inner, linear_out) => linear_out.forward(&inner.lookup(indices)?),
        }
    }

    /// The quantizer's training loss, a scalar.
    pub fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        match self.parts() {
            Parts::SimVq(quantizer) => quantizer.loss(quantized),
            Parts::Vq(quantizer) => quantizer.loss(quantized),
            Parts::Between(_, inner, _) => inner.loss(quantized),
        }
    }

    /// What a training step makes of the moving averages: new values by name, empty without any. To be called with what
    /// the step quantised, after it; `choose` draws features that replace dead codes.
    pub fn update(&self, quantized: &Quantized, choose: Choose) -> Result<Tensors> {
        match self {
            Self::Vq(quantizer) => quantizer.update(quantized, choose),
            _ => Ok(Tensors::new()),
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
            _ => Ok(Tensors::new()),
        }
    }

    /// The vectors that features are compared with, `[K, e]`; several codebooks stand one below the other.
    pub fn codebook(&self) -> Result<Tensor> {
        match self.parts() {
            Parts::SimVq(quantizer) => quantizer.codebook(),
            Parts::Vq(quantizer) => quantizer.codebook(),
            Parts::Between(_, inner, _) => inner.codebook(),
        }
    }
}
