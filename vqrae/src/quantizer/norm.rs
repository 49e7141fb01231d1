//! What brings the projected features to a fixed scale before they meet the codes.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::ops::LayerNorm;

/// Which one. Features whose length is far from the codes' leave most codes unused, and under EMA both may grow without
/// bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// Nothing.
    #[default]
    None,
    /// A layer norm with weight and bias.
    LayerNorm,
    /// One learned factor, which starts as 1.
    Scale,
}

/// [`Norm`] with its weights.
#[derive(Debug, Clone)]
pub(crate) enum FeatureNorm {
    None,
    LayerNorm(LayerNorm),
    /// `[1]`.
    Scale(Tensor),
}

impl FeatureNorm {
    pub(super) fn load(vb: VarBuilder, norm: Norm, e: usize) -> Result<Self> {
        /// PyTorch's.
        const EPS: f64 = 1e-5;
        Ok(match norm {
            Norm::None => Self::None,
            Norm::LayerNorm => Self::LayerNorm(LayerNorm::load(vb, e, EPS)?),
            Norm::Scale => Self::Scale(vb.get_with_hints(1, "weight", candle_nn::init::ONE)?),
        })
    }

    pub(super) fn forward(&self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x),
            Self::LayerNorm(norm) => norm.forward(&x),
            Self::Scale(factor) => x.broadcast_mul(factor),
        }
    }
}
