//! VQ (van den Oord et al., arXiv 1711.00937): a codebook that learns by gradient, or as a moving average of the features
//! that chose its codes ([`EmaConfig`]), with the semantics of vector-quantize-pytorch 1.32's `VectorQuantize`.
//!
//! ```text
//! h = norm(z Aᵀ + a)      features D → e                        linear_in, norm
//! i = argmin_k ‖h − C_k‖   (cosine: of h/‖h‖ and C_k/‖C_k‖)      codebook
//! loss = α mean‖sg(h) − C_i‖² + β mean‖h − sg(C_i)‖²            (EMA: the second term alone)
//! z' = C_i Bᵀ + b         e → D'                                linear_out
//! ```

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::average::{Averages, CODEBOOK, EmaConfig, Shares, is_average};
use super::bottleneck::{Bottleneck, Settings, check_cost, check_scale};
use super::entropy::EntropyConfig;
use super::kmeans::{self, Choose};
use super::table::{Choices, Chosen, Metric, Table};
use super::{Gradient, Norm, Quantized, is_default};
use crate::weights::Tensors;

/// The sizes and choices of a VQ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VqConfig {
    /// Number K of codes.
    pub codebook_size: usize,
    /// Width e of a code.
    pub codebook_dim: usize,
    /// What nearest means.
    pub metric: Metric,
    /// α, the weight of the term that draws codes to features.
    pub codebook_cost: f64,
    /// β, the weight of the term that draws features to codes; van den Oord et al. have 0.25, vector-quantize-pytorch has 1.
    pub commitment_cost: f64,
    /// Whether the codebook learns; one that does not keeps its values.
    pub train_codebook: bool,
    /// Codes as moving averages of features; without it they learn by gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaConfig>,
    /// How a fresh codebook starts.
    pub init: CodebookInit,
    /// Standard deviation where `init` is `normal`; `null` is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codebook_std: Option<f64>,
    /// Lloyd steps where `init` is `kmeans`.
    pub kmeans_iterations: usize,
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

/// How a fresh codebook starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodebookInit {
    /// Uniform within ±√(6/e): PyTorch's `kaiming_uniform_`, vector-quantize-pytorch's.
    #[default]
    KaimingUniform,
    /// Normal numbers, of a standard deviation of one unless `codebook_std` says otherwise.
    Normal,
    /// Centres of the features of the first training step; zeros before it.
    Kmeans,
    /// Features of the first training step; zeros before it.
    Data,
}

impl Default for VqConfig {
    fn default() -> Self {
        Self {
            codebook_size: 16_384,
            codebook_dim: 64,
            metric: Metric::default(),
            codebook_cost: 1.0,
            commitment_cost: 0.25,
            train_codebook: true,
            ema: None,
            init: CodebookInit::default(),
            codebook_std: None,
            kmeans_iterations: 10,
            entropy: None,
            gradient: Gradient::default(),
            norm: Norm::default(),
        }
    }
}

impl VqConfig {
    fn choices(&self) -> Choices {
        let Self { metric, gradient, codebook_cost, commitment_cost, entropy, .. } = *self;
        let averages = self.ema.is_some();
        let codebook_cost = if averages { 0.0 } else { codebook_cost };
        Choices { metric, gradient, learns: self.train_codebook && !averages, codebook_cost, commitment_cost, entropy }
    }
}

impl Settings for VqConfig {
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
        check_scale(self.norm, self.metric == Metric::Cosine, "metric is `cosine`")?;
        let Some(ema) = self.ema else { return Ok(()) };
        if self.metric == Metric::Hsq {
            return Err("quantizer: metric `hsq` learns codes by gradient; remove ema, or take `cosine`".into());
        }
        if !self.train_codebook {
            return Err("quantizer: ema moves the codebook; remove it, or set train_codebook = true".into());
        }
        ema.check()
    }

    fn is_frozen(&self, name: &str) -> bool {
        name == CODEBOOK && !self.train_codebook
    }

    fn is_average(&self, name: &str) -> bool {
        self.ema.is_some() && is_average(name)
    }

    fn load(&self, vb: VarBuilder) -> Result<Box<dyn Bottleneck>> {
        Ok(Box::new(Vq::load(&vb, self)?))
    }
}

/// A VQ with its weights; residual and product quantizers are made of them.
#[derive(Debug, Clone)]
pub(super) struct Vq {
    config: VqConfig,
    table: Table,
    averages: Option<Averages>,
}

impl Vq {
    /// Loads `codebook` `[K, e]`, and with EMA `cluster_size` `[K]` and `embed_avg` `[K, e]`.
    pub(super) fn load(vb: &VarBuilder, config: &VqConfig) -> Result<Self> {
        let (k, e) = (config.codebook_size, config.codebook_dim);
        let bound = (6.0 / e as f64).sqrt();
        let init = match config.init {
            CodebookInit::KaimingUniform => Init::Uniform { lo: -bound, up: bound },
            CodebookInit::Normal => Init::Randn { mean: 0.0, stdev: config.codebook_std.unwrap_or(1.0) },
            CodebookInit::Kmeans | CodebookInit::Data => candle_nn::init::ZERO,
        };
        let codebook = vb.get_with_hints((k, e), CODEBOOK, init)?;
        let averages = config.ema.map(|ema| Averages::load(vb, ema, k, e)).transpose()?;
        Ok(Self::of(config, codebook, averages))
    }

    fn of(config: &VqConfig, codebook: Tensor, averages: Option<Averages>) -> Self {
        Self { table: Table::new(codebook, None, config.choices()), averages, config: config.clone() }
    }

    pub(super) fn choose(&self, h: &Tensor) -> Result<Chosen> {
        self.table.choose(h)
    }

    pub(super) fn searched(&self) -> &Table {
        &self.table
    }

    /// The moving averages after a step whose `batches` chose of this codebook.
    pub(super) fn follow(&self, batches: &[(Tensor, Tensor)], shares: &dyn Shares, choose: Choose) -> Result<Tensors> {
        match &self.averages {
            Some(averages) => averages.update(&self.table.codebook, self.config.metric, batches, shares, choose),
            None => Ok(Tensors::new()),
        }
    }

    /// First values made of `h` `[B, N, e]`, and the VQ that has them.
    pub(super) fn begin(&self, h: &Tensor, choose: Choose) -> Result<(Tensors, Self)> {
        if !self.waits()? {
            return Ok((Tensors::new(), self.clone()));
        }
        let iterations = if self.config.init == CodebookInit::Kmeans { self.config.kmeans_iterations } else { 0 };
        let points = self.config.metric.met(h)?.flatten_all()?.to_vec1::<f32>()?;
        let (k, e) = self.table.codebook.dims2()?;
        let ranking = self.config.metric.ranking();
        let (centres, sizes) =
            kmeans::run(&points, e, k, iterations, ranking, choose).map_err(candle_core::Error::wrap)?;
        let made = match &self.averages {
            Some(averages) => averages.begin(&self.table.codebook, self.config.metric, &centres, &sizes)?,
            None => {
                let codebook = Tensor::from_vec(centres, (k, e), self.table.codebook.device())?;
                Tensors::from([(CODEBOOK.to_string(), codebook)])
            }
        };
        let begun = Self::of(&self.config, made[CODEBOOK].clone(), self.averages.clone());
        Ok((made, begun))
    }
}

impl Bottleneck for Vq {
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

    fn update(&self, quantized: &Quantized, shares: &dyn Shares, choose: Choose) -> Result<Tensors> {
        self.follow(&[(quantized.projected.clone(), quantized.indices.clone())], shares, choose)
    }

    /// Whether `init` takes the codes from features and the codebook is still all zeros.
    fn waits(&self) -> Result<bool> {
        let of_features = matches!(self.config.init, CodebookInit::Kmeans | CodebookInit::Data);
        Ok(of_features && self.table.codebook.abs()?.max_all()?.to_scalar::<f32>()? == 0.0)
    }

    fn first(&self, h: &Tensor, choose: Choose) -> Result<Tensors> {
        Ok(self.begin(h, choose)?.0)
    }
}
