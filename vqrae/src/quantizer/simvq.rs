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

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::bottleneck::{Bottleneck, Settings, check_cost, check_scale};
use super::entropy::EntropyConfig;
use super::table::{Choices, Metric, Table, Transform};
use super::{Gradient, Norm, Quantized, is_default};
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
        name == "codebook" && !self.train_codebook
    }

    fn load(&self, vb: VarBuilder) -> Result<Box<dyn Bottleneck>> {
        Ok(Box::new(SimVq::load(&vb, self)?))
    }
}

/// A SimVQ with its weights.
#[derive(Debug, Clone)]
pub(super) struct SimVq(Table);

impl SimVq {
    /// Loads `codebook`, detached from whatever the VarBuilder gives unless the config trains it, and `transform`.
    fn load(vb: &VarBuilder, config: &SimVqConfig) -> Result<Self> {
        let (k, e) = (config.codebook_size, config.codebook_dim);
        let bound = (e as f64).sqrt().recip();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let stdev = config.codebook_std.unwrap_or(bound);
        let codebook = vb.get_with_hints((k, e), "codebook", Init::Randn { mean: 0.0, stdev })?;
        // What is frozen is prepared once, whatever the VarBuilder gives.
        let codebook = if config.train_codebook { codebook } else { codebook.detach() };
        let init = match config.transform_init {
            TransformInit::Torch => uniform,
            TransformInit::Identity => weights::IDENTITY,
        };
        let weight = vb.get_with_hints((e, e), "transform.weight", init)?;
        let bias = || vb.get_with_hints(e, "transform.bias", uniform);
        let bias = config.transform_bias.then(bias).transpose()?;
        Ok(Self(Table::new(codebook, Some(Transform { weight, bias }), config.choices())))
    }
}

impl Bottleneck for SimVq {
    fn quantize(&self, h: &Tensor, _: Option<u64>) -> Result<Quantized> {
        Ok(self.0.choose(h)?.into())
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        self.0.lookup(indices, false)
    }

    fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        self.0.loss(&quantized.projected, &quantized.indices, &quantized.codes)
    }

    fn codebook(&self) -> Result<Tensor> {
        self.0.codes()
    }

    fn table(&self) -> Option<&Table> {
        Some(&self.0)
    }
}
