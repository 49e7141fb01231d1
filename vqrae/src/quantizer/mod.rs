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

mod average;
mod bottleneck;
mod entropy;
mod estimator;
mod fsq;
pub mod kmeans;
mod lfq;
mod norm;
mod product;
mod residual;
mod simvq;
mod table;
mod vq;

pub use average::{EmaConfig, Shares};
pub use bottleneck::{Bottleneck, DROPPED, Settings};
pub use entropy::EntropyConfig;
pub use estimator::Gradient;
pub use fsq::FsqConfig;
pub use lfq::LfqConfig;
pub(crate) use norm::FeatureNorm;
pub use norm::Norm;
pub use product::ProductConfig;
pub use residual::ResidualConfig;
pub use simvq::{SimVqConfig, TransformInit};
pub use table::{Metric, Table};
pub use vq::{CodebookInit, VqConfig};

use std::ops::Deref;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::ops::Linear;
use crate::weights::Tensors;
use kmeans::Choose;

/// Which quantizer, and its sizes: the `quantizer` section of `config.json`, told apart by its `type`. What all have is in
/// [`Settings`].
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

impl Deref for Config {
    type Target = dyn Settings;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::SimVq(config) => config,
            Self::Vq(config) => config,
            Self::Fsq(config) => config,
            Self::Lfq(config) => config,
            Self::Residual(config) => config,
            Self::Product(config) => config,
        }
    }
}

/// Whether a config's key is at its default, and so left out of `config.json`.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Tensors under longer names.
fn prefixed(prefix: &str, tensors: Tensors) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}{name}"), tensor))
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

/// A quantizer with its weights, in f32 whatever the encoder's dtype: codes must not depend on it more than features do.
#[derive(Debug, Clone)]
pub struct Quantizer {
    pub(crate) linear_in: Linear,
    pub(crate) norm: FeatureNorm,
    pub(crate) inner: Arc<dyn Bottleneck>,
    pub(crate) linear_out: Linear,
}

impl Quantizer {
    /// Loads `linear_in`, `norm` if there is one, the tensors of the quantizer that `config` names, and `linear_out`, between
    /// features `width_in` wide and a decoder `width_out` wide.
    pub fn load(vb: VarBuilder, config: &Config, width_in: usize, width_out: usize) -> Result<Self> {
        let (vb, e) = (vb.to_dtype(DType::F32), config.width());
        Ok(Self {
            // First, so that what does not fit is named by the codebook and not by the layers around it.
            inner: config.load(vb.clone())?.into(),
            linear_in: Linear::load(vb.pp("linear_in"), width_in, e)?,
            norm: FeatureNorm::load(vb.pp("norm"), config.norm(), e)?,
            linear_out: Linear::load(vb.pp("linear_out"), e, width_out)?,
        })
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
        let quantized = self.inner.quantize(&self.project(features)?, dropout)?;
        Ok(Quantized { tokens: self.linear_out.forward(&quantized.tokens)?, ..quantized })
    }

    /// Features `[B, N, D]` to `[B, N, e]`.
    fn project(&self, features: &Tensor) -> Result<Tensor> {
        self.norm.forward(self.linear_in.forward(&features.to_dtype(DType::F32)?)?)
    }

    /// The decoder's input for given codes: bit for bit the `tokens` of [`Quantizer::quantize`].
    ///
    /// # Shapes
    /// - indices: u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`
    /// - output: `[B, N, D']`
    pub fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        self.linear_out.forward(&self.inner.lookup(indices)?)
    }

    /// The quantizer's training loss, a scalar.
    pub fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        self.inner.loss(quantized)
    }

    /// What a training step makes of the moving averages: new values by name, empty without any. To be called with what
    /// the step quantised, after it; `choose` draws features that replace dead codes.
    pub fn update(&self, quantized: &Quantized, choose: Choose) -> Result<Tensors> {
        self.update_shared(quantized, &average::Whole, choose)
    }

    /// [`Quantizer::update`] where `quantized` is one of several shares of a step's batch: the new values are those that the
    /// whole batch makes, the same in all shares. `choose` draws of the whole batch and has to draw the same in all.
    pub fn update_shared(&self, quantized: &Quantized, shares: &dyn Shares, choose: Choose) -> Result<Tensors> {
        self.inner.update(quantized, shares, choose)
    }

    /// First values, by name, of a codebook that starts from features and has not yet: to be called before the first
    /// training step. Empty for any other, which does not ask for `features`; `choose` draws of them.
    ///
    /// # Shapes
    /// - features: `[B, N, D]`
    pub fn first(&self, features: impl FnOnce() -> Result<Tensor>, choose: Choose) -> Result<Tensors> {
        if !self.inner.waits()? {
            return Ok(Tensors::new());
        }
        self.inner.first(&self.project(&features()?)?, choose)
    }

    /// The vectors that features are compared with, `[K, e]`; several codebooks stand one below the other.
    pub fn codebook(&self) -> Result<Tensor> {
        self.inner.codebook()
    }
}
