//! The norms of a transformer: layer norm, or root mean square.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::LayerNorm;

/// A norm over the last dimension with its parameters.
#[derive(Debug, Clone)]
pub enum Norm {
    /// Mean and variance (Ba et al., arXiv 1607.06450).
    Layer(LayerNorm),
    /// Root mean square (Zhang & Sennrich, arXiv 1910.07467): `x / √(mean x² + ε) · weight`.
    Rms {
        /// `[D]`.
        weight: Tensor,
        /// ε.
        eps: f64,
    },
}

impl Norm {
    /// Loads `weight` `[D]` and, for a layer norm, `bias` `[D]`.
    pub fn load(vb: VarBuilder, d: usize, eps: f64, rms: bool) -> Result<Self> {
        if rms {
            Ok(Self::Rms { weight: vb.get_with_hints(d, "weight", candle_nn::init::ONE)?, eps })
        } else {
            LayerNorm::load(vb, d, eps).map(Self::Layer)
        }
    }

    /// A layer norm without parameters.
    pub fn plain(d: usize, eps: f64, dtype: DType, device: &Device) -> Result<Self> {
        let (weight, bias) = (Tensor::ones(d, dtype, device)?, Tensor::zeros(d, dtype, device)?);
        Ok(Self::Layer(LayerNorm { weight, bias, eps }))
    }

    /// `[…, D]` to `[…, D]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            #[cfg(feature = "cuda")]
            Self::Rms { weight, eps } if super::untracked::serves(x, &[weight]) => {
                super::untracked::norm(x, weight, None, *eps)
            }
            Self::Rms { weight, eps } => {
                let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
                x.broadcast_div(&(mean_square + *eps)?.sqrt()?)?.broadcast_mul(weight)
            }
        }
    }
}
