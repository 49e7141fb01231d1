//! What quantizers with a codebook share: the layers around it, the search, the losses.

use std::sync::{Arc, OnceLock};

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};
use vqrae_kernels as kernels;

use super::{Gradient, Quantized};
use crate::ops::{LayerNorm, Linear};

/// What nearest means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Smallest Euclidean distance: the paper.
    #[default]
    Euclidean,
    /// Largest cosine; features and codes are normalised, and the decoder sees unit vectors.
    Cosine,
    /// Largest cosine, but the decoder sees codes with their length, and the gradient goes to features with theirs: dRAE's
    /// HSQ. The codes are trained by their angle, `1 − cos(sg h, c)`, the features by their distance.
    Hsq,
}

impl Metric {
    /// How the search ranks codes.
    pub(crate) fn ranking(self) -> kernels::Metric {
        match self {
            Self::Euclidean => kernels::Metric::Euclidean,
            Self::Cosine | Self::Hsq => kernels::Metric::Cosine,
        }
    }
}

/// What brings the projected features to a fixed scale before they meet the codes. Features whose length is far from the
/// codes' leave most codes unused, and under EMA both may grow without bound.
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

/// Whether a config's key is at its default, and so left out of `config.json`.
pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
    fn load(vb: VarBuilder, norm: Norm, e: usize) -> Result<Self> {
        /// PyTorch's.
        const EPS: f64 = 1e-5;
        Ok(match norm {
            Norm::None => Self::None,
            Norm::LayerNorm => Self::LayerNorm(LayerNorm::load(vb, e, EPS)?),
            Norm::Scale => Self::Scale(vb.get_with_hints(1, "weight", candle_nn::init::ONE)?),
        })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(x),
            Self::LayerNorm(norm) => norm.forward(&x),
            Self::Scale(factor) => x.broadcast_mul(factor),
        }
    }
}

/// How a quantizer chooses codes and learns from it: the keys that all with a codebook have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choices {
    pub(super) metric: Metric,
    pub(super) gradient: Gradient,
    pub(super) norm: Norm,
    /// β, the weight of the commitment term.
    pub(super) commitment_cost: f64,
}

impl Choices {
    /// Whether they make sense for K codes of width e; the error names the key.
    pub(super) fn check(&self, k: usize, e: usize) -> std::result::Result<(), String> {
        for (name, size, limit) in [("codebook_size", k, 1 << 24), ("codebook_dim", e, 1 << 16)] {
            if size == 0 || size > limit {
                return Err(format!("quantizer: {name} is {size}, expected: 1 to {limit}"));
            }
        }
        if !self.commitment_cost.is_finite() || self.commitment_cost < 0.0 {
            return Err(format!("quantizer: commitment_cost is {}, expected: 0 or more", self.commitment_cost));
        }
        if self.norm == Norm::Scale && self.metric == Metric::Cosine {
            return Err("quantizer: norm `scale` changes nothing where metric is `cosine`; remove it".into());
        }
        Ok(())
    }
}

/// What stands around a codebook: `h = norm(z Aᵀ + a)`, search, gradient, losses, `z' = q Bᵀ + b`.
#[derive(Debug, Clone)]
pub(crate) struct Body {
    pub(crate) linear_in: Linear,
    pub(crate) norm: FeatureNorm,
    pub(crate) linear_out: Linear,
    choices: Choices,
    /// The codes and their search structure, kept while nothing that they come from is trained.
    prepared: Arc<OnceLock<Prepared>>,
}

impl Body {
    /// Loads `linear_in`, `norm` if there is one, and `linear_out`; features are `width_in` wide, codes e, tokens
    /// `width_out`.
    pub(super) fn load(vb: &VarBuilder, choices: Choices, width_in: usize, e: usize, width_out: usize) -> Result<Self> {
        Ok(Self {
            linear_in: Linear::load(vb.pp("linear_in"), width_in, e)?,
            norm: FeatureNorm::load(vb.pp("norm"), choices.norm, e)?,
            linear_out: Linear::load(vb.pp("linear_out"), e, width_out)?,
            choices,
            prepared: Arc::default(),
        })
    }

    /// Codes `[K, e]` ready to be searched: made by `codes` every time while they are `trained`, else once.
    pub(super) fn prepare(&self, trained: bool, codes: impl FnOnce() -> Result<Tensor>) -> Result<Prepared> {
        if let (false, Some(prepared)) = (trained, self.prepared.get()) {
            return Ok(prepared.clone());
        }
        let prepared = Prepared::new(self.met(codes()?)?, self.choices.metric)?;
        Ok(if trained { prepared } else { self.prepared.get_or_init(|| prepared).clone() })
    }

    /// Features `[B, N, D]` as they meet the codes, f32 `[B, N, e]`.
    pub(super) fn project(&self, features: &Tensor) -> Result<Tensor> {
        let h = self.linear_in.forward(&features.to_dtype(DType::F32)?)?; // [B,N,e]
        self.met(self.norm.forward(h)?)
    }

    /// Features or codes as they meet each other.
    fn met(&self, x: Tensor) -> Result<Tensor> {
        if self.choices.metric == Metric::Cosine { unit(&x) } else { Ok(x) }
    }

    pub(super) fn quantize(&self, features: &Tensor, prepared: &Prepared) -> Result<Quantized> {
        let projected = self.project(features)?;
        let indices = prepared.nearest(&projected)?;
        let codes = gather(&prepared.codes, &indices)?;
        let tokens = self.linear_out.forward(&self.pass(&projected, &indices, &codes, &prepared.codes)?)?;
        Ok(Quantized { tokens, indices, projected, codes })
    }

    pub(super) fn lookup(&self, indices: &Tensor, prepared: &Prepared) -> Result<Tensor> {
        let largest = indices.flatten_all()?.max(0)?.to_scalar::<u32>()?;
        let k = prepared.codes.dim(0)?;
        if largest as usize >= k {
            candle_core::bail!("code {largest} is outside the codebook of {k} codes");
        }
        self.linear_out.forward(&gather(&prepared.codes, indices)?)
    }

    /// The codes' term, which draws them to the features: `mean‖sg(h) − q‖²`, for HSQ `mean(1 − cos(sg h, q))`. IBQ adds
    /// `mean‖q' − h‖²`, where q' is q with IBQ's gradient, and asks for all `codes` `[K, e]` as [`Body::prepare`] does.
    pub(super) fn codes_loss(&self, quantized: &Quantized, codes: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let (h, q) = (&quantized.projected, &quantized.codes);
        let loss = match self.choices.metric {
            Metric::Euclidean | Metric::Cosine => (h.detach() - q)?.sqr()?.mean_all()?,
            Metric::Hsq => (unit(&h.detach())? * unit(q)?)?.sum(D::Minus1)?.affine(-1.0, 1.0)?.mean_all()?,
        };
        match self.choices.gradient {
            Gradient::Ibq => {
                let passed = self.pass(h, &quantized.indices, q, &self.met(codes()?)?)?;
                loss + (passed - h)?.sqr()?.mean_all()?
            }
            _ => Ok(loss),
        }
    }

    /// The features' term, which draws them to their codes: `β mean‖h − sg(q)‖²`.
    pub(super) fn commitment_loss(&self, quantized: &Quantized) -> Result<Tensor> {
        (&quantized.projected - quantized.codes.detach())?.sqr()?.mean_all()? * self.choices.commitment_cost
    }

    fn pass(&self, projected: &Tensor, indices: &Tensor, codes: &Tensor, all: &Tensor) -> Result<Tensor> {
        self.choices.gradient.pass(projected, indices, codes, all, self.choices.metric)
    }
}

/// Codes as the decoder sees them, `[K, e]`, and what searches them.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub(super) codes: Tensor,
    search: Arc<kernels::Codebook>,
}

impl Prepared {
    pub(super) fn new(codes: Tensor, metric: Metric) -> Result<Self> {
        let rows = codes.flatten_all()?.to_vec1::<f32>()?;
        let search = kernels::Codebook::new(rows, codes.dim(1)?, metric.ranking()).map_err(candle_core::Error::wrap)?;
        Ok(Self { codes, search: Arc::new(search) })
    }

    /// The nearest code of every feature `[B, N, e]`, u32 `[B, N]`.
    pub(super) fn nearest(&self, projected: &Tensor) -> Result<Tensor> {
        let (b, n, _) = projected.dims3()?;
        let flat = projected.flatten_all()?.to_vec1::<f32>()?;
        let indices = self.search.nearest(&flat).map_err(candle_core::Error::wrap)?;
        Tensor::from_vec(indices, (b, n), projected.device())
    }
}

/// Rows of `codes` `[K, e]` by indices `[B, N]`: `[B, N, e]`.
pub(super) fn gather(codes: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let (b, n) = indices.dims2()?;
    codes.index_select(&indices.flatten_all()?, 0)?.reshape((b, n, codes.dim(1)?))
}

/// Rows divided by their length; a zero row stays zero.
pub(super) fn unit(x: &Tensor) -> Result<Tensor> {
    unit_above(x, 1e-12)
}

/// Rows divided by their length, or by `smallest` if they are shorter. The bound stands under the root, whose gradient at
/// zero is infinite.
pub(super) fn unit_above(x: &Tensor, smallest: f64) -> Result<Tensor> {
    let square = x.sqr()?.sum_keepdim(D::Minus1)?.maximum(smallest * smallest)?;
    x.broadcast_div(&square.sqrt()?)
}
