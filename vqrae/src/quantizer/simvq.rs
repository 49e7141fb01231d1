//! SimVQ (Zhu et al., arXiv 2411.02038) as VQRAE uses it (arXiv 2511.23386, §3.2): a frozen codebook seen through one
//! learnable linear layer, so that a step moves every code, also those that nobody chose.
//!
//! ```text
//! h = z Aᵀ + a            features D → e                       linear_in
//! Ĉ = C Wᵀ (+ w)          C frozen [K, e], W learnable [e, e]   codebook, transform
//! i = argmin_k ‖h − Ĉ_k‖                                        (cosine: of h/‖h‖ and Ĉ_k/‖Ĉ_k‖; HSQ: by angle alone)
//! loss = mean‖sg(h) − Ĉ_i‖² + β mean‖h − sg(Ĉ_i)‖²
//! z' = (h + sg(Ĉ_i − h)) Bᵀ + b     straight-through, e → D'    linear_out
//! ```

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::common::{Body, Choices, Metric, Norm, Prepared, is_default};
use super::{Gradient, Quantized};
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
    /// How the decoder's gradient passes the choice of a code.
    #[serde(skip_serializing_if = "is_default")]
    pub gradient: Gradient,
    /// What brings features to a fixed scale after `linear_in`.
    #[serde(skip_serializing_if = "is_default")]
    pub norm: Norm,
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
            gradient: Gradient::default(),
            norm: Norm::default(),
        }
    }
}

impl SimVqConfig {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        self.choices().check(self.codebook_size, self.codebook_dim)
    }

    fn choices(&self) -> Choices {
        let Self { metric, gradient, norm, commitment_cost, .. } = *self;
        Choices { metric, gradient, norm, commitment_cost }
    }
}

/// A SimVQ with its weights, in f32 whatever the encoder's dtype: codes must not depend on it more than features do.
#[derive(Debug, Clone)]
pub struct SimVq {
    pub(crate) body: Body,
    /// Detached from whatever the VarBuilder gave, unless the config trains it.
    pub(crate) codebook: Tensor,
    pub(crate) transform: Tensor,
    pub(crate) transform_bias: Option<Tensor>,
}

impl SimVq {
    /// Loads `linear_in`, `codebook`, `transform`, `linear_out`, and `norm` if there is one.
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
        let transform_bias = config.transform_bias.then(bias).transpose()?;
        let body = Body::load(&vb, config.choices(), width_in, e, width_out)?;
        Ok(Self { body, codebook, transform, transform_bias })
    }

    pub(super) fn quantize(&self, features: &Tensor) -> Result<Quantized> {
        self.body.quantize(features, &self.prepare()?)
    }

    pub(super) fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        self.body.lookup(indices, &self.prepare()?)
    }

    pub(super) fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        self.body.codes_loss(quantized, || self.transform_codebook())? + self.body.commitment_loss(quantized)?
    }

    pub(super) fn codebook(&self) -> Result<Tensor> {
        Ok(self.prepare()?.codes)
    }

    fn prepare(&self) -> Result<Prepared> {
        let trained = [Some(&self.codebook), Some(&self.transform), self.transform_bias.as_ref()];
        let trained = trained.into_iter().flatten().any(Tensor::track_op);
        self.body.prepare(trained, || self.transform_codebook())
    }

    /// Ĉ = C Wᵀ (+ w).
    fn transform_codebook(&self) -> Result<Tensor> {
        let codes = self.codebook.matmul(&self.transform.t()?)?; // [K,e]
        match &self.transform_bias {
            Some(bias) => codes.broadcast_add(bias),
            None => Ok(codes),
        }
    }
}
