//! A codebook that is searched: what nearest means, how codes and features learn of each other.

use std::sync::{Arc, OnceLock};

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};
use vqrae_kernels as kernels;

use super::bottleneck::{DROPPED, check_cost, check_range, check_size};
use super::entropy::{EntropyConfig, entropies};
use super::{Gradient, Quantized};
use crate::ops::{self, Search};

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

    /// Features or codes as they meet each other.
    pub(super) fn met(self, x: &Tensor) -> Result<Tensor> {
        if self == Self::Cosine { unit(x) } else { Ok(x.clone()) }
    }

    /// `h·c` less `‖c‖²/2` where lengths count, so that the nearest code has the largest score: `[M, K]` for features
    /// `[M, e]` and codes `[K, e]`. By angle, c is taken at length one.
    pub(super) fn scores(self, h: &Tensor, codes: &Tensor) -> Result<Tensor> {
        match self {
            Self::Euclidean => {
                let half = (codes.sqr()?.sum_keepdim(1)?.t()? * 0.5)?; // [1,K]
                h.matmul(&codes.t()?)?.broadcast_sub(&half)
            }
            Self::Cosine => h.matmul(&codes.t()?),
            Self::Hsq => h.matmul(&unit(codes)?.t()?),
        }
    }
}

/// How codes are chosen and learned: the keys that all with a codebook have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choices {
    pub(super) metric: Metric,
    pub(super) gradient: Gradient,
    /// Whether a gradient reaches the codebook, which may change without one too.
    pub(super) learns: bool,
    /// α, the weight of the term that draws codes to features.
    pub(super) codebook_cost: f64,
    /// β, the weight of the term that draws features to codes.
    pub(super) commitment_cost: f64,
    pub(super) entropy: Option<EntropyConfig>,
}

impl Choices {
    /// Whether they make sense for K codes of width e; the error names the key.
    pub(super) fn check(&self, k: usize, e: usize) -> std::result::Result<(), String> {
        check_size("codebook_size", k, 1 << 24)?;
        check_size("codebook_dim", e, 1 << 16)?;
        check_cost("codebook_cost", self.codebook_cost)?;
        check_cost("commitment_cost", self.commitment_cost)?;
        self.entropy.map_or(Ok(()), |entropy| entropy.check())
    }
}

/// K codes of width e and what searches them, which is kept while nothing that they come from is trained.
#[derive(Debug, Clone)]
pub struct Table {
    /// C, `[K, e]`.
    pub(crate) codebook: Tensor,
    /// W, if the codes are C through a layer.
    pub(crate) transform: Option<Transform>,
    choices: Choices,
    prepared: Arc<OnceLock<Prepared>>,
}

/// `C Wᵀ (+ w)`.
#[derive(Debug, Clone)]
pub(crate) struct Transform {
    /// W, `[e, e]`.
    pub(crate) weight: Tensor,
    /// w, `[e]`.
    pub(crate) bias: Option<Tensor>,
}

/// Codes as the decoder sees them, `[K, e]`, and what searches them.
#[derive(Debug, Clone)]
struct Prepared {
    codes: Tensor,
    search: Search,
}

/// What a table finds for features `[B, N, e]`.
pub(super) struct Chosen {
    /// The features as they met the codes.
    pub(super) met: Tensor,
    /// u32 `[B, N]`.
    pub(super) indices: Tensor,
    /// `[B, N, e]`, with their own gradient to the codebook.
    pub(super) codes: Tensor,
    /// The codes' value with the gradient of [`Gradient`], `[B, N, e]`.
    pub(super) tokens: Tensor,
}

impl From<Chosen> for Quantized {
    fn from(chosen: Chosen) -> Self {
        let Chosen { met, indices, codes, tokens } = chosen;
        Self { tokens, indices, projected: met, codes }
    }
}

impl Table {
    pub(super) fn new(codebook: Tensor, transform: Option<Transform>, choices: Choices) -> Self {
        Self { codebook, transform, choices, prepared: Arc::default() }
    }

    /// What nearest means.
    pub(crate) fn metric(&self) -> Metric {
        self.choices.metric
    }

    /// The nearest code of every feature of `h`, `[B, N, e]`.
    pub(super) fn choose(&self, h: &Tensor) -> Result<Chosen> {
        let met = self.choices.metric.met(h)?;
        let prepared = self.prepare()?;
        let indices = prepared.search.nearest(&met)?; // [B,N]
        let codes = self.chosen(&prepared.codes, &indices)?;
        let tokens = self.choices.gradient.pass(&met, &indices, &codes, &prepared.codes, self.choices.metric)?;
        Ok(Chosen { met, indices, codes, tokens })
    }

    /// Rows of `codes` `[K, e]` by indices `[B, N]`, with their gradient to the codebook or the layer it goes through.
    fn chosen(&self, codes: &Tensor, indices: &Tensor) -> Result<Tensor> {
        // Codes of length one are not the layer's own.
        let is_own = self.choices.metric != Metric::Cosine && !self.choices.learns;
        if let Some(Transform { weight, bias }) = self.transform.as_ref().filter(|_| is_own)
            && let Some(rows) = ops::transformed_rows(codes, &self.codebook, weight, indices)?
        {
            // Their value has the bias already.
            return bias.as_ref().map_or(Ok(rows.clone()), |bias| rows.broadcast_add(&(bias - bias.detach())?));
        }
        gather(codes, indices)
    }

    /// The codes `[B, N, e]` of indices u32 `[B, N]`; those of [`DROPPED`], where it is allowed, are zero.
    pub(super) fn lookup(&self, indices: &Tensor, may_be_dropped: bool) -> Result<Tensor> {
        let codes = self.codes()?;
        let flat = indices.flatten_all()?.to_vec1::<u32>()?;
        let is_dropped = |index: u32| may_be_dropped && index == DROPPED;
        check_range(flat.iter().copied().filter(|&index| !is_dropped(index)), codes.dim(0)?)?;
        if !flat.iter().any(|&index| is_dropped(index)) {
            return gather(&codes, indices);
        }
        let (rows, mask): (Vec<u32>, Vec<f32>) =
            flat.iter().map(|&index| if is_dropped(index) { (0, 0.0) } else { (index, 1.0) }).unzip();
        let rows = Tensor::from_vec(rows, indices.shape(), indices.device())?;
        let mask = Tensor::from_vec(mask, indices.shape(), indices.device())?.unsqueeze(D::Minus1)?;
        gather(&codes, &rows)?.broadcast_mul(&mask)
    }

    /// Codes as the decoder sees them, `[K, e]`.
    pub(super) fn codes(&self) -> Result<Tensor> {
        Ok(self.prepare()?.codes)
    }

    /// The loss of features as they met their codes, `[B, N, e]` both, and the codes' indices `[B, N]`.
    ///
    /// - `α mean‖sg(h) − q‖²`, for HSQ `α mean(1 − cos(sg h, q))`, draws the codes to the features; IBQ adds
    ///   `α mean‖q' − h‖²`, where q' is q with IBQ's gradient
    /// - `β mean‖h − sg(q)‖²` draws the features to their codes
    /// - [`EntropyConfig`]
    pub(super) fn loss(&self, h: &Tensor, indices: &Tensor, q: &Tensor) -> Result<Tensor> {
        let Choices { metric, gradient, codebook_cost, commitment_cost, entropy, .. } = self.choices;
        let mut loss = ops::commitment(h, q, commitment_cost)?;
        if codebook_cost > 0.0 {
            let mut term = match metric {
                Metric::Euclidean | Metric::Cosine => (h.detach() - q)?.sqr()?.mean_all()?,
                Metric::Hsq => (unit(&h.detach())? * unit(q)?)?.sum(D::Minus1)?.affine(-1.0, 1.0)?.mean_all()?,
            };
            if gradient == Gradient::Ibq {
                let passed = gradient.pass(h, indices, q, &metric.met(&self.raw()?)?, metric)?;
                term = (term + (passed - h)?.sqr()?.mean_all()?)?;
            }
            loss = (loss + (term * codebook_cost)?)?;
        }
        let Some(entropy) = entropy else { return Ok(loss) };
        // Lengths are of no account where the search goes by angle.
        let h = if metric == Metric::Hsq { unit(h)? } else { h.clone() };
        let scores = metric.scores(&h.flatten_to(1)?, &metric.met(&self.raw()?)?)?;
        let term = entropies(&(scores * (2.0 / entropy.temperature))?, entropy.diversity_gamma)?;
        loss + (term * entropy.weight)?
    }

    /// C, or Ĉ = C Wᵀ (+ w), `[K, e]`, before the metric has its say.
    pub(super) fn raw(&self) -> Result<Tensor> {
        let codebook = if self.choices.learns { self.codebook.clone() } else { self.codebook.detach() };
        let Some(Transform { weight, bias }) = &self.transform else { return Ok(codebook) };
        let codes = codebook.matmul(&weight.t()?)?; // [K,e]
        match bias {
            Some(bias) => codes.broadcast_add(bias),
            None => Ok(codes),
        }
    }

    /// The codes ready to be searched: made every time while they are trained, else once.
    fn prepare(&self) -> Result<Prepared> {
        let transform = self.transform.as_ref();
        let parts = [Some(&self.codebook), transform.map(|t| &t.weight), transform.and_then(|t| t.bias.as_ref())];
        let trained = parts.into_iter().flatten().any(Tensor::track_op);
        if let (false, Some(prepared)) = (trained, self.prepared.get()) {
            return Ok(prepared.clone());
        }
        let codes = self.choices.metric.met(&self.raw()?)?;
        let search = Search::new(&codes, self.choices.metric.ranking())?;
        let prepared = Prepared { codes, search };
        Ok(if trained { prepared } else { self.prepared.get_or_init(|| prepared).clone() })
    }
}

/// Rows of `codes` `[K, e]` by indices `[B, N]`: `[B, N, e]`.
fn gather(codes: &Tensor, indices: &Tensor) -> Result<Tensor> {
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
