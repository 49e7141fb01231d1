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
//!
//! A gradient moves W along the codes that were chosen. Where all of them are far too short or too long a few are chosen
//! always, and it never reaches the others (StableVQ, arXiv 2609.26774): [`TransformInit::Data`] starts W from features.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::bottleneck::{Bottleneck, Settings, check_cost, check_scale};
use super::entropy::EntropyConfig;
use super::kmeans::Choose;
use super::table::{Choices, Metric, Table, Transform};
use super::{Gradient, Norm, Quantized, is_default};
use crate::cholesky::cholesky;
use crate::weights::{self, Tensors};

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
    /// Standard deviation of a fresh codebook; `null` is e^(−1/2), SimVQ's, and what `transform_init` = `data` brings any to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codebook_std: Option<f64>,
    /// Entropies that keep codes in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<EntropyConfig>,
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
    /// From the features of the first training step: the codes have their covariance, with `transform_bias` about their
    /// mean and without it about zero. Zeros before it.
    Data,
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
            entropy: None,
            gradient: Gradient::default(),
            norm: Norm::default(),
        }
    }
}

impl SimVqConfig {
    fn choices(&self) -> Choices {
        let Self { metric, gradient, commitment_cost, entropy, .. } = *self;
        Choices { metric, gradient, learns: self.train_codebook, codebook_cost: 1.0, commitment_cost, entropy }
    }
}

impl Settings for SimVqConfig {
    fn codebook_size(&self) -> usize {
        self.codebook_size
    }

    fn width(&self) -> usize {
        self.codebook_dim
    }

    fn norm(&self) -> Norm {
        self.norm
    }

    fn check(&self) -> std::result::Result<(), String> {
        self.choices().check(self.codebook_size, self.codebook_dim)?;
        check_cost("codebook_std", self.codebook_std.unwrap_or_default())?;
        check_scale(self.norm, self.metric == Metric::Cosine, "metric is `cosine`")
    }

    fn is_frozen(&self, name: &str) -> bool {
        name == CODEBOOK && !self.train_codebook && self.transform_init != TransformInit::Data
    }

    fn is_average(&self, name: &str) -> bool {
        name == CODEBOOK && !self.train_codebook && self.transform_init == TransformInit::Data
    }

    fn load(&self, vb: VarBuilder) -> Result<Box<dyn Bottleneck>> {
        Ok(Box::new(SimVq::load(&vb, self)?))
    }
}

const CODEBOOK: &str = "codebook";
const WEIGHT: &str = "transform.weight";
const BIAS: &str = "transform.bias";

/// A SimVQ with its weights.
#[derive(Debug, Clone)]
pub(super) struct SimVq {
    table: Table,
    transform: Transform,
    init: TransformInit,
}

impl SimVq {
    /// Loads `codebook`, detached from whatever the VarBuilder gives unless the config trains it, and `transform`.
    fn load(vb: &VarBuilder, config: &SimVqConfig) -> Result<Self> {
        let (k, e) = (config.codebook_size, config.codebook_dim);
        let bound = (e as f64).sqrt().recip();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let stdev = config.codebook_std.unwrap_or(bound);
        let codebook = vb.get_with_hints((k, e), CODEBOOK, Init::Randn { mean: 0.0, stdev })?;
        // What is frozen is prepared once, whatever the VarBuilder gives.
        let codebook = if config.train_codebook { codebook } else { codebook.detach() };
        let init = match config.transform_init {
            TransformInit::Torch => uniform,
            TransformInit::Identity => weights::IDENTITY,
            TransformInit::Data => candle_nn::init::ZERO,
        };
        let weight = vb.get_with_hints((e, e), WEIGHT, init)?;
        let bias = || vb.get_with_hints(e, BIAS, uniform);
        let transform = Transform { weight, bias: config.transform_bias.then(bias).transpose()? };
        let table = Table::new(codebook, Some(transform.clone()), config.choices());
        Ok(Self { table, transform, init: config.transform_init })
    }
}

impl Bottleneck for SimVq {
    fn quantize(&self, h: &Tensor, _: Option<u64>) -> Result<Quantized> {
        Ok(self.table.choose(h)?.into())
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        self.table.lookup(indices, false)
    }

    fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        self.table.loss(&quantized.projected, &quantized.indices, &quantized.codes)
    }

    fn codebook(&self) -> Result<Tensor> {
        self.table.codes()
    }

    fn table(&self) -> Option<&Table> {
        Some(&self.table)
    }

    /// Whether `transform_init` takes W from features and it is still all zeros.
    fn waits(&self) -> Result<bool> {
        let is_zero =
            || Ok::<_, candle_core::Error>(self.transform.weight.abs()?.max_all()?.to_scalar::<f32>()? == 0.0);
        Ok(self.init == TransformInit::Data && is_zero()?)
    }

    /// C at SimVQ's own spread, so that its rate fits W whatever C was, and W and w that make codes like `h` of it.
    fn first(&self, h: &Tensor, _: Choose) -> Result<Tensors> {
        const SMALLEST: f64 = 1e-30;
        // What a few features leave undetermined gets a hundredth of the usual spread.
        const LEAST: f64 = 1e-4;
        let points = self.table.metric().met(h)?.flatten_to(1)?; // [M,e]
        let (m, e) = points.dims2()?;
        let centre = match self.transform.bias {
            Some(_) => points.mean_keepdim(0)?,
            None => points.narrow(0, 0, 1)?.zeros_like()?,
        };
        let points = points.broadcast_sub(&centre)?;
        let covariance = (points.t()?.matmul(&points)? / m as f64)?.to_dtype(DType::F64)?;
        let root = Tensor::from_vec(cholesky(covariance.flatten_all()?.to_vec1()?, e, LEAST), (e, e), h.device())?;
        let codebook = self.table.codebook.detach();
        let spread = f64::from(codebook.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
        let usual = (e as f64).sqrt().recip();
        let mut made = Tensors::from([
            (CODEBOOK.to_string(), (codebook * (usual / spread.max(SMALLEST)))?),
            (WEIGHT.to_string(), (root / usual)?.to_dtype(DType::F32)?),
        ]);
        if self.transform.bias.is_some() {
            made.insert(BIAS.to_string(), centre.squeeze(0)?);
        }
        Ok(made)
    }
}
