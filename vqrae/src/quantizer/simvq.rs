//! SimVQ (Zhu et al., arXiv 2411.02038) as VQRAE uses it (arXiv 2511.23386, §3.2): a frozen codebook seen through one
//! learnable linear layer, so that a step moves every code, also those that nobody chose.
//!
//! ```text
//! h = z Aᵀ + a            features D → e                       linear_in
//! Ĉ = C Wᵀ (+ w)          C frozen [K, e], W learnable [e, e]   codebook, transform
//! i = argmin_k ‖h − Ĉ_k‖                                        (cosine: of h/‖h‖ and Ĉ_k/‖Ĉ_k‖)
//! loss = mean‖sg(h) − Ĉ_i‖² + β mean‖h − sg(Ĉ_i)‖²
//! z' = (h + sg(Ĉ_i − h)) Bᵀ + b     straight-through, e → D'    linear_out
//! ```

use std::sync::{Arc, OnceLock};

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};
use vqrae_kernels as kernels;

use super::Quantized;
use crate::ops::Linear;
use crate::weights;

/// The sizes and choices of a SimVQ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SimVqConfig {
    /// Number K of codes; the paper has 16,384.
    pub codebook_size: usize,
    /// Width e of a code; the paper has 1,536.
    pub codebook_dim: usize,
    /// What nearest means; the paper has `euclidean`.
    pub metric: Metric,
    /// β, the weight of the commitment term; the paper has 0.25.
    pub commitment_cost: f64,
    /// Whether the learnable layer W has a bias (the SimVQ authors' code: yes; vector-quantize-pytorch: no).
    pub transform_bias: bool,
    /// How a fresh W starts.
    pub transform_init: TransformInit,
    /// Whether the codebook C is trained together with W: the paper freezes it, SimVQ's authors say that both work.
    pub train_codebook: bool,
    /// Standard deviation of a fresh codebook; `null` is e^(−1/2), SimVQ's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codebook_std: Option<f64>,
}

/// What nearest means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Smallest Euclidean distance: the paper.
    #[default]
    Euclidean,
    /// Largest cosine; features and codes are normalised, and the decoder sees unit vectors.
    Cosine,
}

/// How a fresh W starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransformInit {
    /// PyTorch's `nn.Linear`: uniform within ±e^(−1/2).
    #[default]
    Torch,
    /// The identity: the codes start as the frozen codebook itself.
    Identity,
}

impl Default for SimVqConfig {
    fn default() -> Self {
        Self {
            codebook_size: 16_384,
            codebook_dim: 1_536,
            metric: Metric::default(),
            commitment_cost: 0.25,
            transform_bias: false,
            transform_init: TransformInit::default(),
            train_codebook: false,
            codebook_std: None,
        }
    }
}

impl SimVqConfig {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        for (name, size, limit) in
            [("codebook_size", self.codebook_size, 1 << 24), ("codebook_dim", self.codebook_dim, 1 << 16)]
        {
            if size == 0 || size > limit {
                return Err(format!("quantizer: {name} is {size}, expected: 1 to {limit}"));
            }
        }
        if !self.commitment_cost.is_finite() || self.commitment_cost < 0.0 {
            return Err(format!("quantizer: commitment_cost is {}, expected: 0 or more", self.commitment_cost));
        }
        Ok(())
    }
}

/// A SimVQ with its weights, in f32 whatever the encoder's dtype: codes must not depend on it more than features do.
#[derive(Debug, Clone)]
pub struct SimVq {
    pub(crate) linear_in: Linear,
    /// Detached from whatever the VarBuilder gave, unless the config trains it.
    pub(crate) codebook: Tensor,
    pub(crate) transform: Tensor,
    pub(crate) transform_bias: Option<Tensor>,
    pub(crate) linear_out: Linear,
    metric: Metric,
    beta: f64,
    /// Ĉ and its search structure, kept while nothing that they come from is trained.
    prepared: Arc<OnceLock<Prepared>>,
}

/// Ĉ, and what searches it.
#[derive(Debug, Clone)]
struct Prepared {
    codes: Tensor,
    search: Arc<kernels::Codebook>,
}

impl SimVq {
    /// Loads `linear_in`, `codebook`, `transform` and `linear_out`.
    pub fn load(vb: VarBuilder, config: &SimVqConfig, width_in: usize, width_out: usize) -> Result<Self> {
        let vb = vb.to_dtype(DType::F32);
        let (k, e) = (config.codebook_size, config.codebook_dim);
        let bound = (e as f64).sqrt().recip();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let stdev = config.codebook_std.unwrap_or(bound);
        let codebook = vb.get_with_hints((k, e), "codebook", Init::Randn { mean: 0.0, stdev })?;
        let codebook = if config.train_codebook { codebook } else { codebook.detach() };
        let transform = match config.transform_init {
            TransformInit::Torch => vb.get_with_hints((e, e), "transform.weight", uniform)?,
            TransformInit::Identity => vb.get_with_hints((e, e), "transform.weight", weights::IDENTITY)?,
        };
        let bias = || vb.get_with_hints(e, "transform.bias", uniform);
        Ok(Self {
            linear_in: Linear::load(vb.pp("linear_in"), width_in, e)?,
            codebook,
            transform,
            transform_bias: config.transform_bias.then(bias).transpose()?,
            linear_out: Linear::load(vb.pp("linear_out"), e, width_out)?,
            metric: config.metric,
            beta: config.commitment_cost,
            prepared: Arc::default(),
        })
    }

    pub(super) fn quantize(&self, features: &Tensor) -> Result<Quantized> {
        let (b, n, _) = features.dims3()?;
        let h = self.linear_in.forward(&features.to_dtype(DType::F32)?)?; // [B,N,e]
        let projected = match self.metric {
            Metric::Euclidean => h,
            Metric::Cosine => unit(&h)?,
        };
        let prepared = self.prepare()?;
        let flat = projected.flatten_all()?.to_vec1::<f32>()?;
        let indices = prepared.search.nearest(&flat).map_err(candle_core::Error::wrap)?;
        let indices = Tensor::from_vec(indices, (b, n), features.device())?;
        let codes = gather(&prepared.codes, &indices)?;
        let tokens = self.linear_out.forward(&straight_through(&projected, &codes)?)?;
        Ok(Quantized { tokens, indices, projected, codes })
    }

    pub(super) fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let largest = indices.flatten_all()?.max(0)?.to_scalar::<u32>()?;
        let k = self.codebook.dim(0)?;
        if largest as usize >= k {
            candle_core::bail!("code {largest} is outside the codebook of {k} codes");
        }
        self.linear_out.forward(&gather(&self.prepare()?.codes, indices)?)
    }

    pub(super) fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        let (h, q) = (&quantized.projected, &quantized.codes);
        let codebook = (h.detach() - q)?.sqr()?.mean_all()?;
        let commitment = (h - q.detach())?.sqr()?.mean_all()?;
        codebook + (commitment * self.beta)?
    }

    pub(super) fn codebook(&self) -> Result<Tensor> {
        Ok(self.prepare()?.codes)
    }

    fn prepare(&self) -> Result<Prepared> {
        let trained = [Some(&self.codebook), Some(&self.transform), self.transform_bias.as_ref()];
        let trained = trained.into_iter().flatten().any(Tensor::track_op);
        if trained {
            return self.transform_codebook();
        }
        if let Some(prepared) = self.prepared.get() {
            return Ok(prepared.clone());
        }
        let prepared = self.transform_codebook()?;
        Ok(self.prepared.get_or_init(|| prepared).clone())
    }

    /// Ĉ = C Wᵀ (+ w), normalised where the metric asks for it.
    fn transform_codebook(&self) -> Result<Prepared> {
        let mut codes = self.codebook.matmul(&self.transform.t()?)?; // [K,e]
        if let Some(bias) = &self.transform_bias {
            codes = codes.broadcast_add(bias)?;
        }
        let metric = match self.metric {
            Metric::Euclidean => kernels::Metric::Euclidean,
            Metric::Cosine => {
                codes = unit(&codes)?;
                kernels::Metric::Cosine
            }
        };
        let rows = codes.flatten_all()?.to_vec1::<f32>()?;
        let search = kernels::Codebook::new(rows, codes.dim(1)?, metric).map_err(candle_core::Error::wrap)?;
        Ok(Prepared { codes, search: Arc::new(search) })
    }
}

/// Rows of `codes` `[K, e]` by indices `[B, N]`: `[B, N, e]`.
fn gather(codes: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let (b, n) = indices.dims2()?;
    codes.index_select(&indices.flatten_all()?, 0)?.reshape((b, n, codes.dim(1)?))
}

/// The value of `codes`, bit for bit, with the gradient of `projected`: `projected − sg(projected)` is exactly zero.
fn straight_through(projected: &Tensor, codes: &Tensor) -> Result<Tensor> {
    if !projected.track_op() {
        return Ok(codes.clone());
    }
    codes.detach() + (projected - projected.detach())?
}

/// Rows divided by their length; a zero row stays zero. The bound stands under the root, whose gradient at zero is
/// infinite.
fn unit(x: &Tensor) -> Result<Tensor> {
    const SMALLEST: f64 = 1e-12;
    let square = x.sqr()?.sum_keepdim(D::Minus1)?.maximum(SMALLEST * SMALLEST)?;
    x.broadcast_div(&square.sqrt()?)
}
