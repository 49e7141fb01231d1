//! Residual quantisation (SoundStream's algorithm 1, Zeghidour et al., arXiv 2107.03312; RQ-VAE, arXiv 2203.01941), also
//! called hierarchical codebooks: every level quantises what the levels before it left, so a token has L codes from coarse
//! to fine.
//!
//! ```text
//! h = norm(z Aᵀ + a)                      features D → e                                linear_in, norm
//! r_0 = h                                 r_(l+1) = r_l − sg(c_l)
//! c_l = nearest code of r_l in codebook l     (cosine: of r_l/‖r_l‖, and c_l has length one)
//! q = Σ_l c_l                             the level's gradient estimator at every level
//! loss = Σ_l the level's own, of r_l and c_l
//! ```
//!
//! A level is a [VQ](super::vq): learned by gradient or by moving averages, from random codes or from data. Values, indices,
//! losses, gradients and moving averages are those of vector-quantize-pytorch's `ResidualVQ`. As there, every level passes
//! the gradient on, so what reaches the features is L times what came (under the cosine metric, through L
//! normalisations).
//!
//! **Quantize dropout**: in training a step keeps the first levels alone, their number drawn from a seed, so that fewer
//! codes decode well too. The indices of the others are then [`DROPPED`], and a model trained this way also looks up
//! fewer than L codes a token.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::average::Shares;
use super::bottleneck::{self, Bottleneck, DROPPED, Settings};
use super::kmeans::Choose;
use super::vq::{Vq, VqConfig};
use super::{Metric, Norm, Quantized, is_default, prefixed};
use crate::weights::Tensors;

/// The sizes and choices of a residual quantizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResidualConfig {
    /// L: levels, codes a token; VILA-U has 4.
    pub levels: usize,
    /// What each level is; what it leaves out is as in `"type": "vq"`.
    pub level: VqConfig,
    /// Whether all levels share one codebook.
    pub shared_codebook: bool,
    /// Whether training leaves out the last levels at random.
    pub quantize_dropout: bool,
    /// The last level that is always kept, counted from 0.
    pub dropout_cutoff: usize,
    /// The number of kept levels is a multiple of this (EnCodec: 4).
    pub dropout_multiple_of: usize,
    /// What brings features to a fixed scale after `linear_in`.
    #[serde(skip_serializing_if = "is_default")]
    pub norm: Norm,
}

impl Default for ResidualConfig {
    fn default() -> Self {
        Self {
            levels: 4,
            level: VqConfig::default(),
            shared_codebook: false,
            quantize_dropout: false,
            dropout_cutoff: 0,
            dropout_multiple_of: 1,
            norm: Norm::default(),
        }
    }
}

impl Settings for ResidualConfig {
    fn codebook_size(&self) -> usize {
        self.level.codebook_size
    }

    fn width(&self) -> usize {
        self.level.codebook_dim
    }

    fn codes_per_token(&self) -> usize {
        self.levels
    }

    fn norm(&self) -> Norm {
        self.norm
    }

    fn check(&self) -> std::result::Result<(), String> {
        bottleneck::check_size("levels", self.levels, 64)?;
        bottleneck::check_size("dropout_multiple_of", self.dropout_multiple_of, self.levels)?;
        if self.dropout_cutoff >= self.levels {
            return Err(format!(
                "quantizer: dropout_cutoff is {}, expected: less than levels, {}",
                self.dropout_cutoff, self.levels
            ));
        }
        if self.level.metric == Metric::Hsq {
            return Err("quantizer: metric is `hsq`, expected: `euclidean` or `cosine` where codes are added up".into());
        }
        if self.level.norm != Norm::None {
            return Err("quantizer: level.norm stands between levels; set norm beside level instead".into());
        }
        self.level.check()
    }

    fn is_frozen(&self, name: &str) -> bool {
        below(name, "levels").is_some_and(|name| self.level.is_frozen(name))
    }

    fn is_average(&self, name: &str) -> bool {
        below(name, "levels").is_some_and(|name| self.level.is_average(name))
    }

    fn load(&self, vb: VarBuilder) -> Result<Box<dyn Bottleneck>> {
        Ok(Box::new(Residual::load(&vb, self)?))
    }
}

impl ResidualConfig {
    /// Number of codebooks.
    fn tables(&self) -> usize {
        if self.shared_codebook { 1 } else { self.levels }
    }

    /// How many levels are kept in the training step of this seed; all where there is no dropout.
    fn kept(&self, dropout: Option<u64>) -> usize {
        let Some(seed) = dropout.filter(|_| self.quantize_dropout && self.levels > 1) else { return self.levels };
        let last = ChaCha8Rng::seed_from_u64(seed).random_range(self.dropout_cutoff..self.levels);
        (last + 1).next_multiple_of(self.dropout_multiple_of).min(self.levels)
    }
}

/// The rest of a name `STEM.N.rest`.
pub(super) fn below<'a>(name: &'a str, stem: &str) -> Option<&'a str> {
    let (number, rest) = name.strip_prefix(stem)?.strip_prefix('.')?.split_once('.')?;
    number.bytes().all(|digit| digit.is_ascii_digit()).then_some(rest)
}

/// A residual quantizer with its weights.
#[derive(Debug, Clone)]
pub(super) struct Residual {
    config: ResidualConfig,
    /// One, or one a level.
    tables: Vec<Vq>,
}

/// A level's part of what was quantised.
struct Level {
    index: usize,
    /// What it had as it met the codes, `[B, N, e]`.
    met: Tensor,
    /// u32 `[B, N]`.
    indices: Tensor,
    /// `[B, N, e]`.
    codes: Tensor,
}

impl Residual {
    /// Loads `levels.0` .. , of which there is one where levels share their codebook.
    pub(super) fn load(vb: &VarBuilder, config: &ResidualConfig) -> Result<Self> {
        let tables = (0..config.tables()).map(|i| Vq::load(&vb.pp("levels").pp(i), &config.level));
        Ok(Self { config: config.clone(), tables: tables.collect::<Result<_>>()? })
    }

    fn table(&self, level: usize) -> &Vq {
        &self.tables[level.min(self.tables.len() - 1)]
    }

    /// The codes of the first `kept` levels; the others are [`DROPPED`].
    ///
    /// # Shapes
    /// - h: f32 `[B, N, e]`
    /// - [`Quantized::indices`]: `[B, N]` where L is 1, else `[B, N, L]`
    /// - [`Quantized::codes`]: `[B, N, L, e]`
    fn quantize_levels(&self, h: &Tensor, kept: usize) -> Result<Quantized> {
        let (b, n, _) = h.dims3()?;
        let (mut residual, mut tokens) = (h.clone(), None);
        let (mut indices, mut codes) = (Vec::new(), Vec::new());
        for level in 0..self.config.levels {
            if level >= kept {
                indices.push(Tensor::full(DROPPED, (b, n), h.device())?);
                codes.push(h.zeros_like()?);
                continue;
            }
            let chosen = self.table(level).choose(&residual)?;
            tokens = Some(match tokens {
                None => chosen.tokens,
                Some(before) => (before + chosen.tokens)?,
            });
            residual = (residual - chosen.codes.detach())?;
            indices.push(chosen.indices);
            codes.push(chosen.codes);
        }
        Ok(Quantized {
            tokens: tokens.map_or_else(|| h.zeros_like(), Ok)?,
            indices: bottleneck::join(&indices)?,
            projected: h.clone(),
            codes: Tensor::stack(&codes, 2)?,
        })
    }

    /// The levels that were kept.
    fn levels(&self, quantized: &Quantized) -> Result<Vec<Level>> {
        let mut residual = quantized.projected.clone();
        let mut levels = Vec::new();
        for (index, indices) in bottleneck::columns(&quantized.indices, self.config.levels)?.into_iter().enumerate() {
            if indices.flatten_all()?.get(0)?.to_scalar::<u32>()? == DROPPED {
                break;
            }
            let codes = quantized.codes.narrow(2, index, 1)?.squeeze(2)?;
            let met = self.config.level.metric.met(&residual)?;
            residual = (residual - codes.detach())?;
            levels.push(Level { index, met, indices, codes });
        }
        Ok(levels)
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
        for (level, indices) in bottleneck::columns(indices, given)?.iter().enumerate() {
            let codes = self.table(level).searched().lookup(indices, dropout)?;
            sum = Some(match sum {
                None => codes,
                Some(before) => (before + codes)?,
            });
        }
        sum.ok_or_else(|| candle_core::Error::Msg("a residual quantizer without levels".to_string()))
    }

    fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        let zero = Tensor::zeros((), DType::F32, quantized.projected.device())?;
        let mut loss = zero.clone();
        let levels = self.levels(quantized)?;
        // A codebook that dropout left out has a gradient too: zero.
        for left_out in self.tables.iter().skip(levels.len()) {
            // Not by a plain 0.0, which candle takes for no gradient at all.
            loss = (loss + (left_out.searched().raw()?.sum_all()? * &zero)?)?;
        }
        for Level { index, met, indices, codes } in levels {
            loss = (loss + self.table(index).searched().loss(&met, &indices, &codes)?)?;
        }
        Ok(loss)
    }

    fn codebook(&self) -> Result<Tensor> {
        Tensor::cat(&self.tables.iter().map(Bottleneck::codebook).collect::<Result<Vec<_>>>()?, D::Minus2)
    }

    fn update(&self, quantized: &Quantized, shares: &dyn Shares, choose: Choose) -> Result<Tensors> {
        let mut batches: Vec<Vec<(Tensor, Tensor)>> = vec![Vec::new(); self.tables.len()];
        for Level { index, met, indices, .. } in self.levels(quantized)? {
            batches[index.min(self.tables.len() - 1)].push((met, indices));
        }
        let mut made = Tensors::new();
        for (i, (table, batches)) in self.tables.iter().zip(batches).enumerate().filter(|(_, (_, x))| !x.is_empty()) {
            made.extend(prefixed(&format!("levels.{i}."), table.follow(&batches, shares, choose)?));
        }
        Ok(made)
    }

    fn waits(&self) -> Result<bool> {
        self.tables.iter().try_fold(false, |waits, table| Ok(waits || table.waits()?))
    }

    /// Every level starts from what the levels before it, begun themselves, leave of the features.
    fn first(&self, h: &Tensor, choose: Choose) -> Result<Tensors> {
        let (mut residual, mut all) = (h.detach(), Tensors::new());
        for (i, table) in self.tables.iter().enumerate() {
            let (made, begun) = table.begin(&residual, choose)?;
            all.extend(prefixed(&format!("levels.{i}."), made));
            residual = (&residual - begun.choose(&residual)?.codes.detach())?;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Codes 0, 10 and then 0, 1, of width one.
    fn two_levels(config: ResidualConfig) -> Residual {
        let level = VqConfig { codebook_size: 2, codebook_dim: 1, ..config.level };
        let config = ResidualConfig { levels: 2, level, ..config };
        config.check().unwrap();
        let codebook = |codes: [[f32; 1]; 2]| Tensor::new(&codes, &Device::Cpu).unwrap();
        let codebooks = [("levels.0.codebook", [[0.], [10.]]), ("levels.1.codebook", [[0.], [1.]])];
        let tensors = codebooks.map(|(name, codes)| (name.to_string(), codebook(codes)));
        let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        Residual::load(&vb, &config).unwrap()
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
    fn levels_start_from_what_the_ones_before_leave_of_the_data() {
        let level = VqConfig {
            codebook_size: 2,
            codebook_dim: 1,
            init: super::super::CodebookInit::Kmeans,
            ..VqConfig::default()
        };
        let config = ResidualConfig { levels: 2, level, ..ResidualConfig::default() };
        let zeros =
            |level| (format!("levels.{level}.codebook"), Tensor::zeros((2, 1), DType::F32, &Device::Cpu).unwrap());
        let vb = VarBuilder::from_tensors([zeros(0), zeros(1)].into_iter().collect(), DType::F32, &Device::Cpu);
        let residual = Residual::load(&vb, &config).unwrap();
        assert!(residual.waits().unwrap());
        // Two pairs a distance of 10 apart: the first level has the pairs' middles, the second what is left, ±½.
        let h = Tensor::new(&[[[0f32], [11.], [1.], [10.]]], &Device::Cpu).unwrap();
        let made = residual.first(&h, &mut |_, amount| (0..amount).collect()).unwrap();
        let codes = |level| made[&format!("levels.{level}.codebook")].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((codes(0), codes(1)), (vec![0.5, 10.5], vec![-0.5, 0.5]));
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
