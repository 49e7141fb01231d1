//! Residual quantisation (SoundStream's algorithm 1, Zeghidour et al., arXiv 2107.03312; RQ-VAE, arXiv 2203.01941):
//! every level quantises what the levels before it left, so a token has L codes from coarse to fine.
//!
//! ```text
//! h = z Aᵀ + a                            features D → e                                linear_in
//! r_0 = h                                 r_(l+1) = r_l − sg(c_l)
//! c_l = nearest code of r_l in codebook l     (cosine: of r_l/‖r_l‖, and c_l has length one)
//! q = Σ_l c_l                             straight-through at every level
//! loss = Σ_l α mean‖sg(r_l) − c_l‖² + β mean‖r_l − sg(c_l)‖²
//! ```
//!
//! Values, indices, losses and gradients are those of vector-quantize-pytorch's `ResidualVQ` with the straight-through
//! estimator. As there, every level passes the gradient on, so what reaches the features is L times what came (under the
//! cosine metric, through L normalisations). The codebooks are trained by their loss.
//!
//! **Quantize dropout**: in training a step keeps the first levels alone, their number drawn from a seed, so that fewer
//! codes decode well too. The indices of the others are then [`DROPPED`], and a model trained this way also looks up
//! fewer than L codes a token.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::shared::{self, Bottleneck, DROPPED, Table};
use super::{Metric, Quantized};

/// The sizes and choices of a residual quantizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResidualConfig {
    /// L: levels, codes a token; VILA-U has 4.
    pub levels: usize,
    /// K: codes of a codebook.
    pub codebook_size: usize,
    /// e: width of a code.
    pub codebook_dim: usize,
    /// What nearest means.
    pub metric: Metric,
    /// Whether all levels share one codebook.
    pub shared_codebook: bool,
    /// α, the weight of the term that moves codes to features.
    pub codebook_cost: f64,
    /// β, the weight of the term that moves features to codes.
    pub commitment_cost: f64,
    /// Whether the codebooks are trained; those that are not keep their values.
    pub train_codebook: bool,
    /// Standard deviation of fresh codes; `null` is e^(−1/2), which makes their length about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codebook_std: Option<f64>,
    /// Whether training leaves out the last levels at random.
    pub quantize_dropout: bool,
    /// The last level that is always kept, counted from 0.
    pub dropout_cutoff: usize,
    /// The number of kept levels is a multiple of this (EnCodec: 4).
    pub dropout_multiple_of: usize,
}

impl Default for ResidualConfig {
    fn default() -> Self {
        Self {
            levels: 4,
            codebook_size: 16_384,
            codebook_dim: 256,
            metric: Metric::default(),
            shared_codebook: false,
            codebook_cost: 1.0,
            commitment_cost: 0.25,
            train_codebook: true,
            codebook_std: None,
            quantize_dropout: false,
            dropout_cutoff: 0,
            dropout_multiple_of: 1,
        }
    }
}

impl ResidualConfig {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        shared::check_size("levels", self.levels, 64)?;
        shared::check_size("codebook_size", self.codebook_size, 1 << 24)?;
        shared::check_size("codebook_dim", self.codebook_dim, 1 << 16)?;
        shared::check_size("dropout_multiple_of", self.dropout_multiple_of, self.levels)?;
        if self.dropout_cutoff >= self.levels {
            return Err(format!(
                "quantizer: dropout_cutoff is {}, expected: less than levels, {}",
                self.dropout_cutoff, self.levels
            ));
        }
        shared::check_cost("codebook_cost", self.codebook_cost)?;
        shared::check_cost("commitment_cost", self.commitment_cost)?;
        shared::check_cost("codebook_std", self.codebook_std.unwrap_or_default())
    }

    /// Number of codebooks.
    pub(super) fn tables(&self) -> usize {
        if self.shared_codebook { 1 } else { self.levels }
    }

    /// `tables` codebooks, one tensor `codebook` `[tables, K, e]`.
    pub(super) fn load_codebook(&self, vb: &VarBuilder, tables: usize) -> Result<Tensor> {
        let e = self.codebook_dim;
        let stdev = self.codebook_std.unwrap_or_else(|| (e as f64).sqrt().recip());
        let shape = (tables, self.codebook_size, e);
        let codebook = vb.get_with_hints(shape, "codebook", Init::Randn { mean: 0.0, stdev })?;
        Ok(if self.train_codebook { codebook } else { codebook.detach() })
    }

    /// How many levels are kept in the training step of this seed; all where there is no dropout.
    fn kept(&self, dropout: Option<u64>) -> usize {
        let Some(seed) = dropout.filter(|_| self.quantize_dropout && self.levels > 1) else { return self.levels };
        let last = ChaCha8Rng::seed_from_u64(seed).random_range(self.dropout_cutoff..self.levels);
        (last + 1).next_multiple_of(self.dropout_multiple_of).min(self.levels)
    }
}

/// A residual quantizer between its projections.
#[derive(Debug, Clone)]
pub struct Residual {
    config: ResidualConfig,
    /// One, or one a level.
    tables: Vec<Table>,
}

impl Residual {
    /// Loads `codebook` `[1 or L, K, e]`.
    pub fn load(vb: &VarBuilder, config: &ResidualConfig) -> Result<Self> {
        Self::new(&config.load_codebook(vb, config.tables())?, config)
    }

    /// Of codebooks `[1 or L, K, e]` and a checked config.
    pub(super) fn new(codebook: &Tensor, config: &ResidualConfig) -> Result<Self> {
        let table = |i| Ok(Table::new(codebook.narrow(0, i, 1)?.squeeze(0)?, config.metric));
        let tables = (0..codebook.dim(0)?).map(table).collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), tables })
    }

    fn table(&self, level: usize) -> &Table {
        &self.tables[level.min(self.tables.len() - 1)]
    }

    /// The codes of the first `kept` levels; the others are [`DROPPED`].
    ///
    /// # Shapes
    /// - h: f32 `[B, N, e]`
    /// - [`Quantized::indices`]: `[B, N]` where L is 1, else `[B, N, L]`
    /// - [`Quantized::codes`]: `[B, N, L, e]`
    pub fn quantize_levels(&self, h: &Tensor, kept: usize) -> Result<Quantized> {
        let (b, n, _) = h.dims3()?;
        let (mut residual, mut tokens) = (h.clone(), None);
        let (mut indices, mut codes) = (Vec::new(), Vec::new());
        for level in 0..self.config.levels {
            if level >= kept {
                indices.push(Tensor::full(DROPPED, (b, n), h.device())?);
                codes.push(h.zeros_like()?);
                continue;
            }
            let found = self.table(level).nearest(&residual)?;
            let through = shared::straight_through(&found.compared, &found.codes)?;
            tokens = Some(match tokens {
                None => through,
                Some(before) => (before + through)?,
            });
            residual = (residual - found.codes.detach())?;
            indices.push(found.indices);
            codes.push(found.codes);
        }
        let tokens = tokens.map_or_else(|| h.zeros_like(), Ok)?;
        Ok(Quantized {
            tokens,
            indices: shared::join(&indices)?,
            projected: h.clone(),
            codes: Tensor::stack(&codes, 2)?,
        })
    }
}

impl Bottleneck for Residual {
    fn quantize(&self, h: &Tensor, dropout: Option<u64>) -> Result<Quantized> {
        self.quantize_levels(h, self.config.kept(dropout))
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let dropout = self.config.quantize_dropout;
        let given = match *indices.dims() {
            // A model trained with dropout decodes the first levels alone.
            [_, _] if dropout => 1,
            [_, _, c] if dropout && c > 1 && c < self.config.levels => c,
            _ => self.config.levels,
        };
        let mut sum: Option<Tensor> = None;
        for (level, indices) in shared::columns(indices, given)?.iter().enumerate() {
            let codes = self.table(level).lookup(indices, dropout)?;
            sum = Some(match sum {
                None => codes,
                Some(before) => (before + codes)?,
            });
        }
        sum.ok_or_else(|| candle_core::Error::Msg("a residual quantizer without levels".to_string()))
    }

    fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        let mut residual = quantized.projected.clone();
        let mut loss = Tensor::zeros((), DType::F32, residual.device())?;
        let indices = shared::columns(&quantized.indices, self.config.levels)?;
        for (level, indices) in indices.iter().enumerate() {
            if indices.flatten_all()?.get(0)?.to_scalar::<u32>()? == DROPPED {
                break;
            }
            let codes = quantized.codes.narrow(2, level, 1)?.squeeze(2)?;
            let compared = shared::compared(&residual, self.config.metric)?;
            let codebook = (compared.detach() - &codes)?.sqr()?.mean_all()?;
            let commitment = (compared - codes.detach())?.sqr()?.mean_all()?;
            loss = ((loss + (codebook * self.config.codebook_cost)?)? + (commitment * self.config.commitment_cost)?)?;
            residual = (residual - codes.detach())?;
        }
        Ok(loss)
    }

    fn codebook(&self) -> Result<Tensor> {
        Tensor::cat(&self.tables.iter().map(Table::codes).collect::<Result<Vec<_>>>()?, D::Minus2)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Codes 0, 10 and then 0, 1, of width one.
    fn two_levels(config: ResidualConfig) -> Residual {
        let config = ResidualConfig { levels: 2, codebook_size: 2, codebook_dim: 1, ..config };
        config.check().unwrap();
        let codebook = Tensor::new(&[[[0f32], [10.]], [[0.], [1.]]], &Device::Cpu).unwrap();
        Residual::new(&codebook, &config).unwrap()
    }

    fn features() -> Tensor {
        Tensor::new(&[[[11f32], [0.75], [9.]]], &Device::Cpu).unwrap()
    }

    #[test]
    fn the_second_level_has_what_the_first_left() {
        let residual = two_levels(ResidualConfig::default());
        let quantized = residual.quantize(&features(), None).unwrap();
        assert_eq!(quantized.indices.to_vec3::<u32>().unwrap(), [[[1, 1], [0, 1], [1, 0]]]);
        assert_eq!(quantized.tokens.to_vec3::<f32>().unwrap(), [[[11.], [1.], [10.]]]);
        assert_eq!(residual.lookup(&quantized.indices).unwrap().to_vec3::<f32>().unwrap(), [[[11.], [1.], [10.]]]);
        // Level 0: 1² + 0.75² + 1²; level 1: 0² + 0.25² + 1²; each over 3 tokens, times 1 + β = 1.25.
        let loss = residual.loss(&quantized).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss - 1.25 * (2.5625 + 1.0625) / 3.0).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn every_level_passes_the_gradient_on() {
        let features = Var::from_tensor(&features()).unwrap();
        let quantized = two_levels(ResidualConfig::default()).quantize(&features, None).unwrap();
        let gradients = quantized.tokens.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&features).unwrap().to_vec3::<f32>().unwrap(), [[[2.], [2.], [2.]]]);
    }

    #[test]
    fn dropped_levels_have_no_code_and_no_loss() {
        let residual = two_levels(ResidualConfig { quantize_dropout: true, ..ResidualConfig::default() });
        let quantized = residual.quantize_levels(&features(), 1).unwrap();
        assert_eq!(quantized.indices.to_vec3::<u32>().unwrap(), [[[1, DROPPED], [0, DROPPED], [1, DROPPED]]]);
        let expected = [[[10.], [0.], [10.]]];
        assert_eq!(quantized.tokens.to_vec3::<f32>().unwrap(), expected);
        assert_eq!(residual.lookup(&quantized.indices).unwrap().to_vec3::<f32>().unwrap(), expected);
        let coarse = Tensor::new(&[[1u32, 0, 1]], &Device::Cpu).unwrap();
        assert_eq!(residual.lookup(&coarse).unwrap().to_vec3::<f32>().unwrap(), expected);
        let loss = residual.loss(&quantized).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss - 1.25 * 2.5625 / 3.0).abs() < 1e-6, "{loss}");
        // Without dropout, neither is understood.
        let whole = two_levels(ResidualConfig::default());
        assert!(whole.lookup(&quantized.indices).is_err());
        assert!(whole.lookup(&coarse).unwrap_err().to_string().contains("2 codes a token"));
    }

    #[test]
    fn what_is_kept_follows_the_seed_within_its_limits() {
        let config = ResidualConfig {
            levels: 8,
            quantize_dropout: true,
            dropout_cutoff: 2,
            dropout_multiple_of: 2,
            ..ResidualConfig::default()
        };
        let mut seen: Vec<usize> = (0..100).map(|seed| config.kept(Some(seed))).collect();
        assert_eq!(seen, (0..100).map(|seed| config.kept(Some(seed))).collect::<Vec<_>>());
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [4, 6, 8]);
        assert_eq!(config.kept(None), 8);
    }
}
